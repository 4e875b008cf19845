"""Experiments: jobs, their artefacts, tracking, tables."""

from typing import Any

from omegaconf import DictConfig, OmegaConf


def _by_kind(values: DictConfig, *, _root_: DictConfig) -> Any:
    kind = OmegaConf.select(_root_, "concept.kind")
    if kind not in values:
        raise ValueError(f"concept.kind is {kind!r}; it must be one of {', '.join(map(str, values))}")
    return values[kind]


# Configs may say ${by_kind:{style: 3, object: 3, unsafe: 5}}, for what papers set by the kind of the concept.
OmegaConf.register_new_resolver("by_kind", _by_kind, replace=True)
