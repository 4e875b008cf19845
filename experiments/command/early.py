"""What can be told of a composed config before anything heavy is imported."""

from collections.abc import Iterator, Mapping

from omegaconf import DictConfig

from experiments import CONFIG_FOLDER


def check_early(config: DictConfig) -> None:
    """Look for the model.

    Raises:
        FileNotFoundError: It is not here, and cannot be fetched.
    """
    if config.model and config.model.get("_target_") == "diffusion.loading.ModelSource":
        # The Hub's library, which --help and misspelt choices can do without.
        from diffusion.sources import locate  # noqa: PLC0415

        locate(config.model.source)


def canvas_settings(choices: Mapping[str, str]) -> Iterator[str]:
    """A sentence for every choice whose settings are the canvas's, where there are published ones for the model."""
    if choices.get("model", "canvas") == "canvas":
        return
    for group in ("eraser", "attack"):
        for suffix in ("_sd14", "_paper"):
            published = f"{choices.get(group)}{suffix}"
            if (CONFIG_FOLDER / group / f"{published}.yaml").exists():
                yield f"{group}={choices[group]} is sized for the canvas; {group}={published} has published settings"
