"""What a name on the command line means: names that choices had before, and concepts that several models have."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from experiments import CONFIG_FOLDER
from experiments.command.errors import CommandError
from experiments.fit import family_of, within

OLD_NAMES = Path(__file__).with_name("old_names.yaml")
"""By group and name: the ``choice`` that it stands for, and the fields that it sets."""

DEFAULT_CONCEPT = "van_gogh"
"""The concept where none is typed; see conf/config.yaml."""


@cache
def old_names() -> dict[str, dict[str, dict[str, Any]]]:
    """What :data:`OLD_NAMES` says."""
    names: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(OLD_NAMES.read_text(encoding="utf-8"))
    return names


def make_known(group: str, names: Sequence[str]) -> None:
    """Let Hydra find the old ones among ``names`` as choices of a group."""
    for name in names:
        if name in old_names().get(group, {}):
            fields = dict(old_names()[group][name])
            choice = fields.pop("choice")
            ConfigStore.instance().store(name, {"defaults": [choice, "_self_"], **fields}, group=group)


def concepts_for(concepts: str, families: Sequence[str]) -> str:
    """Put for concepts that the canvas and Stable Diffusion both have, as van_gogh, those of the models.

    Args:
        concepts: One or, of a sweep, several, separated by commas.
        families: Of the models.

    Raises:
        CommandError: There are models of both kinds, so that one name would be two concepts.
    """
    found = []
    for concept in concepts.split(","):
        twin = _twin(concept.strip())
        canvas = ["canvas" in within(family) for family in families]
        if twin is None or all(canvas):
            found.append(concept)
        elif any(canvas):
            raise CommandError(
                f"concept={concept} is one concept on the canvas and another, {twin}, on Stable Diffusion; "
                "sweep over models of one family."
            )
        else:
            found.append(twin)
    return ",".join(found)


def _twin(concept: str) -> str | None:
    """The concept of Stable Diffusion with the name of one of the canvas's."""
    if "/" in concept or not (CONFIG_FOLDER / "concept" / f"{concept}.yaml").exists():
        return None
    twins = sorted((CONFIG_FOLDER / "concept").glob(f"*/{concept}.yaml"))
    return f"{twins[0].parent.name}/{concept}" if twins else None


def families_of(arguments: Mapping[str, str]) -> list[str]:
    """The families of the models that a command line names, one after the other.

    Args:
        arguments: Its values by name.
    """
    found = []
    sources = arguments.get("model.source", "").split(",")
    for model in arguments.get("model", "canvas").split(","):
        path = CONFIG_FOLDER / "model" / f"{model.strip()}.yaml"
        config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        for source in sources:
            typed = {"source": source.strip("'\"")} if source else {}
            family = arguments.get("model.family", config.get("family"))
            found.append(family_of({**config, **typed, "family": family}))
    return found
