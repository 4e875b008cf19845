"""What can be told of a composed config before anything heavy is imported."""

from omegaconf import DictConfig

MODEL_SOURCES = ("diffusion.loading.ModelSource", "diffusion.canvas.source.CanvasSource")
"""Classes whose ``source`` names a model."""


def check_early(config: DictConfig) -> None:
    """Look for the model.

    Raises:
        FileNotFoundError: It is not here, and cannot be fetched.
    """
    if config.model and config.model.get("_target_") in MODEL_SOURCES:
        # The Hub's library, which --help and misspelt choices can do without.
        from diffusion.sources import locate  # noqa: PLC0415

        locate(config.model.source)
