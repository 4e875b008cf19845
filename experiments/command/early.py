"""What can be told of a composed config before anything heavy is imported."""

from omegaconf import DictConfig

MODEL_SOURCE, CANVAS_SOURCE = "diffusion.loading.ModelSource", "diffusion.canvas.source.CanvasSource"
"""Classes whose ``source`` names a model."""


def check_early(config: DictConfig) -> None:
    """Look for the model.

    Raises:
        FileNotFoundError: It is not here, and cannot be fetched.
    """
    if not config.model or (target := config.model.get("_target_")) not in {MODEL_SOURCE, CANVAS_SOURCE}:
        return
    # The Hub's library, which --help and misspelt choices can do without.
    from diffusion.canvas.canvases import canvas_folder  # noqa: PLC0415
    from diffusion.sources import locate  # noqa: PLC0415

    locate(str(canvas_folder(config.model.source)) if target == CANVAS_SOURCE else config.model.source)
