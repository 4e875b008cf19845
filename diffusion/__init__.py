"""The model under study: a text-to-image diffusion model and the canvas that this project ships."""
