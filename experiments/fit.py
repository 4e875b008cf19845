"""One name, one method, on every model: which of a method's settings fit a model's family and a concept's kind.

A YAML file of a method says of every setting what its authors publish, and what others take instead:

    steps: "${fit:1000,{canvas: 250, diffusers: 200}}"

Here 1000 is the published value, 250 what the canvas takes, and 200 what ``eraser.preset=diffusers`` takes. The words
before a colon are a family of models, a kind of concept, a concept or a preset, or several of them; of the exceptions
that hold, the last one counts. What the user types replaces all of it.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

FAMILIES = ("canvas", "sd", "sdxl", "sd3", "flux", "schnell", "canvas_mmdit")
"""Families of models. ``sd``, Stable Diffusion 1 and 2, is what papers publish settings for."""

WITHIN = {"schnell": ("flux",), "canvas_mmdit": ("sd3", "canvas")}
"""Families that take what others do, where nothing is said of them: a FLUX that is distilled to few steps, and the
canvas with Stable Diffusion 3's architecture."""

PUBLISHED = {"canvas": "sd", "canvas_mmdit": "sd3"}
"""Whose published settings a preset takes on the canvases."""

KINDS = ("style", "object", "unsafe")
"""Kinds of concepts; see :class:`erasure.concept.Concept`."""

PAPER = "paper"
"""The preset that takes published settings on any model."""

FITTED = ("eraser", "pruning", "attack")
"""The groups whose settings are fitted."""

SMALL_LATENTS = 16
"""Edge of the largest latents that are of the canvas's size and not of Stable Diffusion's."""


def fitting(published: Any, exceptions: Mapping[Any, Any], words: frozenset[str]) -> Any:
    """The published value, or the last exception whose words all hold.

    >>> fitting(1000, {"canvas": 250, "canvas unsafe": 300}, frozenset({"canvas", "style"}))
    250
    """
    value = published
    for key, exception in exceptions.items():
        if words.issuperset(str(key).split()):
            value = exception
    return value


def words_of(root: DictConfig, preset: str | None) -> frozenset[str]:
    """What holds of a composed config: its model's family, its concept's kind and name, and the words of a preset.

    A preset takes published settings on the canvas too, and a kind among its words stands for the concept's.
    """
    own = frozenset(str(preset).split()) if preset is not None else frozenset()
    family = family_of(OmegaConf.select(root, "model"))
    if preset is not None:
        family = PUBLISHED.get(family, family)
    kind = None if own & set(KINDS) else OmegaConf.select(root, "concept.kind")
    name = OmegaConf.select(root, "concept.name")
    return own | within(family) | {str(word) for word in (kind, name) if word is not None}


def within(family: str) -> frozenset[str]:
    """A family, and those whose settings it takes where nothing is said of it."""
    return frozenset({family, *WITHIN.get(family, ())})


def fitted(composed: DictConfig) -> dict[str, Any]:
    """A composed config as plain data, every setting fitted, without what only says how.

    ``taken`` is added: for every method with presets what its settings are, in words.

    Raises:
        ValueError: A preset or a family is unknown.
        omegaconf.errors.OmegaConfBaseException: A value is missing, or cannot be resolved.
    """
    taken: dict[str, str] = {}
    family = family_of(OmegaConf.select(composed, "model"))
    if family not in FAMILIES:
        raise ValueError(f"model.family is {family!r}; it must be one of {', '.join(FAMILIES)}.")
    for group in FITTED:
        for path, method in _methods(composed.get(group), group):
            taken[path] = _taken(path, method, composed, family)
    plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    for group in FITTED:
        _drop_presets(plain.get(group))
    if isinstance(plain.get("model"), dict):
        plain["model"].pop("family", None)
    return {**plain, "taken": taken} if taken else plain


def _drop_presets(node: Any) -> None:
    """Take out what only says how settings are fitted; also a protocol's preset for a method that has none."""
    if isinstance(node, dict):
        node.pop("preset", None)
        node.pop("presets", None)
        for inner in node.values():
            _drop_presets(inner)


def _methods(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every part of a group's config that has presets, by its dotted name."""
    if not isinstance(node, DictConfig):
        return
    if "presets" in node:
        yield path, node
    for key in node:
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, str(key)):
            yield from _methods(node[key], f"{path}.{key!s}")


def _taken(path: str, method: DictConfig, root: DictConfig, family: str) -> str:
    preset = _preset_above(method)
    if preset is None and "canvas" in within(family):
        return "the canvas's settings"
    allowed = list(dict.fromkeys([PAPER, *KINDS, *map(str, method.presets or {})]))
    words = str(preset or PAPER).split()
    if unknown := [word for word in words if word not in allowed]:
        raise ValueError(f"{path}.preset is {' '.join(unknown)!r}; it must be one of {', '.join(allowed)}.")
    kind = next((word for word in words if word in KINDS), OmegaConf.select(root, "concept.kind"))
    others = [word for word in words if word not in {PAPER, *KINDS}]
    source = f"preset {' '.join(others)}" if others else str((method.presets or {}).get(PAPER, "published settings"))
    return f"{source}, for a concept of kind {kind}"


def family_of(model: DictConfig | Mapping[str, Any] | None) -> str:
    """The family of a composed ``model``: what it says, or else what the folder at its source holds."""
    if not model:
        return "canvas"
    return model.get("family") or family_at(str(model.get("source")))


@cache
def family_at(source: str) -> str:
    """The family of a model by its name or by the configuration in its folder; ``sd`` if nothing says otherwise."""
    if "canvas" in within(source):
        # The canvases are called as their families are.
        return source
    folder = Path(source).expanduser()
    pipeline = str(read_object(folder / "model_index.json").get("_class_name", ""))
    for part, family in (("StableDiffusionXL", "sdxl"), ("StableDiffusion3", "sd3"), ("Flux", "flux")):
        if pipeline.startswith(part):
            distilled = (
                family == "flux" and read_object(folder / "transformer" / "config.json").get("guidance_embeds") is False
            )
            return "schnell" if distilled else family
    size = read_object(folder / "unet" / "config.json").get("sample_size")
    return "canvas" if isinstance(size, int) and size <= SMALL_LATENTS else "sd"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none: what is wrong with a model is told when it is loaded."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fit(published: Any, exceptions: DictConfig, *, _parent_: DictConfig, _root_: DictConfig) -> Any:
    return fitting(published, exceptions, words_of(_root_, _preset_above(_parent_)))


def _preset_above(node: Any) -> str | None:
    """The preset of the method that a setting belongs to, however deep it lies, or of the union that has the method."""
    while node is not None:
        if isinstance(node, DictConfig) and node.get("preset") is not None:
            return str(node.preset)
        node = node._get_parent()
    return None


def register() -> None:
    """Let configs say ``${fit:published,{word: value}}``."""
    OmegaConf.register_new_resolver("fit", _fit, replace=True)
