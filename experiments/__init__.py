"""Experiments: jobs, their artefacts, tracking, tables."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import fit

_HERE = Path(__file__).resolve().parent

CONFIG_FOLDER = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"
"""Where the YAML files of all choices lie: inside an installed package, beside it in a checkout."""


def _by(field: str) -> Any:
    def choose(values: DictConfig, *other: Any, _root_: DictConfig) -> Any:
        key = OmegaConf.select(_root_, field)
        if key not in values:
            if other:
                return other[0]
            raise ValueError(f"{field} is {key!r}; it must be one of {', '.join(map(str, values))}")
        return values[key]

    return choose


# Configs may say ${by_kind:{style: 3, object: 3, unsafe: 5}} for what papers set by the kind of the concept, and
# ${by_concept:{nudity: 142, ...}} for what goes by the concept itself, and ${by_protocol:{p4d: 3}, 1} for what goes by
# the protocol; the value behind the braces, which all of them may have, is that of the others.
OmegaConf.register_new_resolver("by_kind", _by("concept.kind"), replace=True)
OmegaConf.register_new_resolver("by_concept", _by("concept.name"), replace=True)
OmegaConf.register_new_resolver("by_protocol", _by("protocol.name"), replace=True)
fit.register()
