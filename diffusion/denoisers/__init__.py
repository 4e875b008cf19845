"""The network that denoises, whatever its architecture."""
