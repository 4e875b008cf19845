"""What can be told of a composed config before anything heavy is imported."""

from omegaconf import DictConfig

from diffusion.sources import locate


def check_early(config: DictConfig) -> None:
    """Look for the model.

    Raises:
        FileNotFoundError: It is not here, and cannot be fetched.
    """
    if config.model and config.model.get("_target_") == "diffusion.loading.ModelSource":
        locate(config.model.source)
