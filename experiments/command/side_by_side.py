"""What every method takes on the canvas and on Stable Diffusion, side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import CONFIG_FOLDER
from experiments.command.errors import CommandError, unknown
from experiments.fit import FITTED, KINDS, fitted

SIDES = {"canvas": ("van_gogh", "church", "fire"), "sd14": ("artist/van_gogh", "object/church", "nudity")}
"""For every model a style, an object and unsafe content."""


def side_by_side(choice: str | None = None) -> Iterator[tuple[str, pd.DataFrame]]:
    """The settings of a method, as ``eraser=esd``, or of all: one row a field, one column a model and kind.

    Raises:
        CommandError: There is no such method.
    """
    names = [f"{group}={path.stem}" for group in FITTED for path in sorted((CONFIG_FOLDER / group).glob("*.yaml"))]
    if choice is not None and choice not in names:
        raise CommandError(unknown(choice, set(names), what="is no method; they are"))
    for name in names if choice is None else [choice]:
        group, _, stem = name.partition("=")
        columns = {}
        for model, concepts in SIDES.items():
            for kind, concept in zip(KINDS, concepts, strict=True):
                columns[f"{model}, {kind}"] = _flat(_settings(group, stem, model, concept))
        fields = [field for field in next(iter(columns.values())) if field != "_target_"]
        rows = [
            {"field": field} | {head: str(values.get(field)) for head, values in columns.items()} for field in fields
        ]
        yield name, pd.DataFrame(rows)


def _settings(group: str, name: str, model: str, concept: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("config", [f"model={model}", f"concept={concept}", f"{group}={name}"])
    # What only a job can say is not there.
    for key in config[group]:
        if OmegaConf.is_missing(config[group], key):
            config[group][key] = "to be given"
    plain: dict[str, Any] = fitted(OmegaConf.masked_copy(config, ["model", "concept", group, "seed", "store"]))[group]
    return plain


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
