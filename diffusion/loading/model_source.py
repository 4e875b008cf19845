"""Which model a job takes, and how it is loaded: a diffusers folder, a single file, or one of the Hub."""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import nn
from transformers import T5EncoderModel
from transformers.utils import logging as transformers_logging

from diffusion.added_tokens import add_embeddings, read_embeddings
from diffusion.architectures import Pipeline
from diffusion.checked import checked
from diffusion.files import in_short, stands_in, why_unreadable
from diffusion.finite import overflow_remedy, require_finite_tensors
from diffusion.loading.pipeline_kinds import SD, SDXL, T5_PARTS, PipelineKind, kind_of, present_parts
from diffusion.memory import checkpoint_activations
from diffusion.model import TextToImage
from diffusion.processes.noise_schedule import Prediction
from diffusion.sources import SINGLE_FILES, cached_folder, hub_answers, locate, unreachable, weights_variant
from diffusion.weight_files import LOADING_ERRORS, inert_names_allowed

log = logging.getLogger(__name__)

SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"
"""A tensor of the second text encoder, which tells a single file of Stable Diffusion XL."""

Precision = Literal["fp32", "fp16", "bf16", "fp16_autocast", "bf16_autocast"]
Device = Literal["auto", "cpu", "cuda"]
Edge = Annotated[int, Field(ge=8)]
SchedulerName = Literal["ddim", "lms", "pndm", "dpmsolver++", "euler", "flow_euler"]

_WEIGHT_TYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp16_autocast": torch.float32,
    "bf16_autocast": torch.float32,
}
_AUTOCAST: dict[str, torch.dtype] = {"fp16_autocast": torch.float16, "bf16_autocast": torch.bfloat16}


@checked
class ModelSource:
    """Which model to load and how.

    Attributes:
        source: ``canvas``, a diffusers folder, a ``.safetensors`` or ``.ckpt`` file, or a Hub id ``owner/name``.
        precision: Of the weights; ``fp16_autocast`` and ``bf16_autocast`` keep float32 weights, which training needs,
            and compute the U-Net in half precision.
        device: ``auto`` takes a GPU if there is one.
        scheduler: The sampler, one for every method compared; ``flow_euler`` of models that predict velocity between
            noise and picture (Stable Diffusion 3), the others of all others.
        config: Diffusers folder that gives a single file its configuration and tokenizer; without one they come from
            the Hub or its cache.
        name: What results call the model; the last part of ``source`` if none.
        resolution: Edge of a square picture in pixels, or width and height; the model's own if none.
        gradient_checkpointing: Training and white-box attacks keep no activations of the U-Net's blocks, which saves
            memory and costs a second forward pass; no effect on results.
        offload: The VAE, and a T5, wait in the CPU's memory while the GPU does not use them; no effect on results.
        prediction_type: What the network was trained to predict, if its configuration is wrong or none came with it;
            None for what the configuration, or a mark in a single file, says.
        embeddings: Files of textual inversions, whose tokens prompts and attacks may use; see
            :mod:`diffusion.added_tokens` for the formats.
        t5: Whether a T5 is loaded where the model has one (Stable Diffusion 3); pictures depend on it.
        t5_tokens: Rows of T5, zeros where there is none; diffusers takes 256, and pictures depend on it.

    Raises:
        ValueError: ``device`` is ``cuda`` and there is none, ``config`` is no diffusers folder, or ``embeddings`` has a
            file of another kind.
        FileNotFoundError: ``embeddings`` has a file that is not there.
    """

    source: str
    precision: Precision = "fp32"
    device: Device = "auto"
    scheduler: SchedulerName = "ddim"
    config: str | None = None
    name: str | None = None
    resolution: Edge | tuple[Edge, Edge] | None = None
    gradient_checkpointing: bool = False
    offload: bool = False
    prediction_type: Prediction | None = None
    embeddings: tuple[Path, ...] = ()
    t5: bool = True
    t5_tokens: Annotated[int, Field(ge=0, le=512)] = 256

    @model_validator(mode="after")
    def _is_at_hand(self) -> "ModelSource":
        for path in self.embeddings:
            read_embeddings(path.expanduser())
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but PyTorch finds no GPU here; use device=cpu or device=auto.")
        return self

    @model_validator(mode="after")
    def _config_is_a_folder(self) -> "ModelSource":
        if self.config is not None and not (Path(self.config).expanduser() / "model_index.json").is_file():
            raise ValueError(
                f"config is {self.config!r}, which is no diffusers folder with a model_index.json; it gives a single "
                "file its configuration, and other models need none."
            )
        return self

    def load(self) -> TextToImage:
        """Load the model.

        Raises:
            FileNotFoundError: There is nothing at ``source``, or the Hub cannot be asked for it; or there is no file of
                ``embeddings``.
            ValueError: What lies there is no Stable Diffusion model, or is damaged; or ``embeddings`` do not fit it.
            NotFiniteError: A weight is infinite or NaN.
        """
        with quiet_off_a_terminal():
            pipeline = _load_pipeline(self.source, self.config, _WEIGHT_TYPES[self.precision], t5=self.t5)
        for path in self.embeddings:
            tokens = add_embeddings(pipeline, path.expanduser())
            log.info("model: prompts may use %s, from %s", ", ".join(tokens), path)
        if self.prediction_type is not None:
            _configure_scheduler(pipeline, {"prediction_type": self.prediction_type})
        elif self.config is None and self.source.endswith(SINGLE_FILES):
            log.warning(
                "%s comes without configuration; its network is taken to predict %s, which model.prediction_type can "
                "correct",
                self.source,
                pipeline.scheduler.config.get("prediction_type", "epsilon"),
            )
        _require_finite_weights(pipeline, self.source)
        if self.device != "cpu" and torch.cuda.is_available():
            place(pipeline, torch.device("cuda"), t5=not self.offload)
        if self.gradient_checkpointing:
            checkpoint_activations(pipeline.transformer if "transformer" in pipeline.components else pipeline.unet)
        return TextToImage(
            pipeline,
            name=self.name or re.sub(r"\.(safetensors|ckpt)$", "", Path(self.source).name),
            scheduler=self.scheduler,
            autocast=_AUTOCAST.get(self.precision),
            resolution=self.resolution,
            offload=self.offload,
            t5_tokens=self.t5_tokens,
        )


def load_model(
    source: str,
    *,
    precision: Precision = "fp32",
    device: Device = "auto",
    scheduler: SchedulerName = "ddim",
    config: str | None = None,
    name: str | None = None,
) -> TextToImage:
    """Load a model; arguments and errors are those of :class:`ModelSource`."""
    return ModelSource(source, precision, device, scheduler, config, name).load()


def place(pipeline: Pipeline, device: torch.device, *, t5: bool) -> None:
    """Take a pipeline's networks to ``device``, a T5 only if ``t5``: the largest of them may never have to be there."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and (t5 or not isinstance(part, T5EncoderModel)):
            part.to(device)


def _load_pipeline(source: str, config: str | None, dtype: torch.dtype, *, t5: bool) -> Pipeline:
    path = locate(source)
    if path is None:
        return _from_hub(source, dtype, t5=t5)
    return _from_folder(path, dtype, t5=t5) if path.is_dir() else _from_single_file(path, config, dtype)


def _from_folder(folder: Path, dtype: torch.dtype, *, t5: bool) -> Pipeline:
    _check_index(folder)
    try:
        return _from_pretrained(str(folder), dtype, t5=t5)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"The model in {folder} cannot be read; restore its files: {why_unreadable(folder, error)}."
        ) from error


def _check_index(folder: Path) -> PipelineKind:
    """The kind of the pipeline that lies in ``folder``."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is no diffusers folder; it lacks model_index.json.")
    try:
        return kind_of(json.loads(index.read_text(encoding="utf-8")), str(folder))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, IndexError) as error:
        raise ValueError(f"{index} cannot be read; restore it: {why_unreadable(index, error)}.") from error


def _from_pretrained(source: str, dtype: torch.dtype, *, t5: bool, local_files_only: bool = True) -> Pipeline:
    index = DiffusionPipeline.load_config(source, local_files_only=local_files_only)
    kind = kind_of(index, source)
    folder = Path(source) if Path(source).is_dir() else cached_folder(source)
    # transformers would load the text encoder in the precision that its files are stored in.
    return kind.pipeline.from_pretrained(  # type: ignore[no-any-return]
        source,
        dtype=dtype,
        local_files_only=local_files_only,
        variant=_variant(folder, kind) if folder else None,
        low_cpu_mem_usage=is_accelerate_available(),
        **kind.options(present_parts(index), t5=t5),
    )


def _variant(folder: Path, kind: PipelineKind) -> str | None:
    """The variant of the weights, such as ``fp16``, that is asked for because a part has no others."""
    return next(filter(None, map(weights_variant, sorted(folder / part for part in (*kind.parts, *T5_PARTS)))), None)


def _from_single_file(path: Path, config: str | None, dtype: torch.dtype) -> Pipeline:
    if path.suffix not in SINGLE_FILES:
        raise ValueError(f"{path} is no model; a single file must end in {' or '.join(SINGLE_FILES)}.")
    kind: PipelineKind | None = None
    if config is not None:
        kind = _check_index(Path(config).expanduser())
        config = str(Path(config).expanduser())
    try:
        if kind is None:
            kind = SDXL if _is_sdxl_file(path) else SD
        with inert_names_allowed(path):
            loaded = kind.pipeline.from_single_file(
                str(path),
                config=config,
                dtype=dtype,
                local_files_only=config is not None or not hub_answers(),
                **kind.left_out,
            )
        _configure_scheduler(loaded, _marks(path))
        return loaded
    except LOADING_ERRORS as error:
        remedy = "the file may be damaged or of another kind of model"
        if config is None and not hub_answers():
            remedy = (
                "a single file needs configuration and tokenizer from the Hub, which does not answer; point "
                "model.config to a diffusers folder of the same architecture"
            )
        if fault := stands_in(path):
            raise ValueError(f"The model in {path} cannot be read: it {fault}.") from error
        raise ValueError(f"The model in {path} cannot be read; {remedy}: {in_short(error)}.") from error


def _is_sdxl_file(path: Path) -> bool:
    return SDXL_KEY in _names_in(path)


def _marks(path: Path) -> dict[str, Any]:
    """What a single file says of its noise schedule by the names of empty tensors, as trainers write them."""
    names = _names_in(path)
    return {
        **({"prediction_type": "v_prediction"} if "v_pred" in names else {}),
        **({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in names else {}),
    }


def _names_in(path: Path) -> set[str]:
    """The names of a safetensors file's tensors; none of another file's."""
    if path.suffix != ".safetensors":
        return set()
    with safe_open(path, "pt") as file:
        return set(file.keys())


def _configure_scheduler(pipeline: Pipeline, changes: Mapping[str, Any]) -> None:
    """Change settings of the pipeline's scheduler."""
    if not changes:
        return
    config = dict(pipeline.scheduler.config)
    # What a scheduler has by default is passed on to no other.
    config["_use_default_values"] = [name for name in config.get("_use_default_values", []) if name not in changes]
    pipeline.scheduler = DDIMScheduler.from_config({**config, **changes})


def _require_finite_weights(pipeline: Pipeline, source: str) -> None:
    for part, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            remedy = overflow_remedy(getattr(network, "dtype", None), "restore or replace the model's files")
            require_finite_tensors(dict(network.named_parameters()), f"{source}: weight of {part}", remedy)


@contextmanager
def quiet_off_a_terminal() -> Iterator[None]:
    """Keep the libraries' own progress bars for terminals."""
    if sys.stderr.isatty():
        yield
        return
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()


def _from_hub(source: str, dtype: torch.dtype, *, t5: bool) -> Pipeline:
    try:
        return _from_pretrained(source, dtype, t5=t5)
    except LOADING_ERRORS as error:
        log.debug("%s is not in the cache: %s", source, error)
    if not hub_answers():
        raise unreachable(source)
    try:
        return _from_pretrained(source, dtype, t5=t5, local_files_only=False)
    except LOADING_ERRORS as error:
        raise FileNotFoundError(
            f"{source!r} is neither a local file or folder nor a model that {constants.ENDPOINT} gives out; check the "
            f"name, log in with `hf auth login` if it is gated, or set model.source to a folder: {in_short(error)}."
        ) from error
