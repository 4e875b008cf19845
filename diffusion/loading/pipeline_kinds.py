"""Which kind of pipeline a diffusers folder holds, told by its model_index.json, and what of it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusion.architectures import Pipeline

LIBRARIES = ("diffusers", "transformers")
"""Whose classes a model's parts may be."""

GUARDED_PIPELINE = "GuardedPipeline"
"""The class, in code of its own, of a pipeline that keeps a guard beside its weights."""

T5_PARTS = ("tokenizer_3", "text_encoder_3")
"""What a folder of Stable Diffusion 3 may be without."""

_COMMON = ("tokenizer", "text_encoder", "vae", "scheduler")
_SECOND = ("tokenizer_2", "text_encoder_2")


@dataclass(frozen=True)
class PipelineKind:
    """A kind of pipeline.

    Attributes:
        title: What it is called in messages.
        pipeline: Its class.
        begins: How the classes of such pipelines are called.
        parts: What its folder must have.
        signs: A folder with one of these parts is taken for it, whatever it is called.
        left_out: Arguments that leave out what nothing here uses.
    """

    title: str
    pipeline: type[Pipeline]
    begins: str
    parts: tuple[str, ...]
    signs: tuple[str, ...] = ()
    left_out: Mapping[str, Any] = field(default_factory=dict)

    def options(self, present: set[str], *, t5: bool) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for a folder with these parts, with its T5 or without."""
        optional = T5_PARTS if issubclass(self.pipeline, StableDiffusion3Pipeline) else ()
        return {**self.left_out, **{part: None for part in optional if not t5 or part not in present}}


SD = PipelineKind(
    "Stable Diffusion 1 or 2",
    StableDiffusionPipeline,
    "StableDiffusion",
    (*_COMMON, "unet"),
    left_out={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)
SDXL = PipelineKind(
    "Stable Diffusion XL",
    StableDiffusionXLPipeline,
    "StableDiffusionXL",
    (*_COMMON, "unet", *_SECOND),
    ("text_encoder_2",),
    {"image_encoder": None, "feature_extractor": None, "add_watermarker": False},
)
SD3 = PipelineKind(
    "Stable Diffusion 3",
    StableDiffusion3Pipeline,
    "StableDiffusion3",
    (*_COMMON, "transformer", *_SECOND),
    left_out={"image_encoder": None, "feature_extractor": None},
)
FLUX = PipelineKind("FLUX.1", FluxPipeline, "Flux", SD3.parts, left_out=SD3.left_out)


def present_parts(index: Mapping[str, Any]) -> set[str]:
    """The parts that a model_index.json names."""
    return {name for name, value in index.items() if isinstance(value, list | tuple) and value[0] is not None}


def kind_of(index: Mapping[str, Any], source: str) -> PipelineKind:
    """The kind of the pipeline that a model_index.json is of.

    Args:
        index: Its content.
        source: What errors call it.

    Raises:
        ValueError: It lacks a part, a part's code is not known, its kind is not, or it is to have a guard.
    """
    present, name = present_parts(index), str(index.get("_class_name"))
    if GUARDED_PIPELINE in name:
        raise ValueError(
            f"{source} keeps a guard beside its weights, in code that is never run here, and would be loaded without; "
            "load its base model, and the edit in its edit.safetensors (eraser=imported, eraser.path=...)."
        )
    if "transformer" in present and not name.startswith((SD3.begins, FLUX.begins)):
        raise ValueError(
            f"{source} is a model of {name}, which is not known here; name a model of "
            f"{', '.join(kind.title for kind in (SD, SDXL, SD3))} or {FLUX.title} as model.source."
        )
    called = (kind for kind in (FLUX, SD3, SDXL) if name.startswith(kind.begins))
    kind = next(called, SDXL if present.intersection(SDXL.signs) else SD)
    if missing := [part for part in kind.parts if part not in present]:
        problem = f"it lacks {', '.join(missing)}"
        if kind is SDXL:
            problem = f"it has a second text encoder or is called so, but lacks {', '.join(missing)}"
        raise ValueError(f"{source} is no {kind.title} model: {problem}; name another model.source.")
    used = [part for part in (*kind.parts, *T5_PARTS) if part in present]
    if strange := [part for part in used if index[part][0] not in LIBRARIES]:
        raise ValueError(
            f"{source} takes its {strange[0]} from {index[strange[0]][0]!r}, and no code of a model is ever run; its "
            f"parts must be of {' or '.join(LIBRARIES)}."
        )
    return kind
