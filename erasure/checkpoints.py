"""Erased checkpoints as other projects publish them, read as edits of a loaded model.

The format is told by what a file holds, never by its name:

- parameters by diffusers names, some or all, as safetensors or pickled (ESD, UCE, SPEED, SalUn, RECE, ConceptPrune; of
  the transformers of Stable Diffusion 3 and FLUX too: ESD, UCE, OCE), with ``transformer.`` before them or without;
- the same nested by module, ``{"unet.mid_block...": {"weight": ..., "bias": ...}}`` (STEREO), or by part,
  ``{"unet": {...}, "text_encoder": {...}}`` (AC's ``delta.bin``);
- CompVis names ``model.diffusion_model...``, bare or as a Lightning ``state_dict``, some or all (ESD, SalUn, AC, whose
  ``embed`` is the token table);
- what a training saves: the weights as ``state_dict``, ``model_state_dict`` or ``model`` beside an optimizer (STEREO's
  first stage), with ``module.`` or ``_orig_mod.`` before the names;
- low-rank factors of kohya's scripts (``lora_unet_...``, ``lora_te_...``), of diffusers (``save_lora_weights``, today's
  and those of 2023; EraseAnything) and of PEFT (a folder with ``adapter_config.json``; EraseFlow), folded into the
  weights at full strength, whatever the prompt; those whose header says what they erase (SPM) as
  :class:`erasure.additions.membranes.Membranes`, as open as the paper's formula says, or the authors' code;
- the folder of a pipeline (FMN, MACE, :func:`erasure.export.export`), of a U-Net or of a CLIP text encoder
  (AdvUnlearn), whole, split or in half precision, or the text encoder's parameters as a file (AdvUnlearn's
  ``TextEncoder-*.pt`` has each twice);
- adapters behind cross-attention, ``eraser_weights.pt`` beside ``eraser_config.json`` or alone (Receler);
- an edit of this project.

No code of a file is ever run. A tensor that has no place in the model is an error, but for what an edit cannot change
or sampling does not use: the autoencoder, the noise schedule, averaged copies and embeddings of added tokens.
"""

import logging
import re
from collections import Counter
from pathlib import Path

from diffusion.model import TextToImage
from erasure.additions.membranes import Merge
from erasure.edit import Edit
from erasure.imports.adapters import adapters_edit
from erasure.imports.dense import Fit, dense_edit, fit, misfit
from erasure.imports.low_rank import Factors, erased_by_spm, folded, is_low_rank, low_rank, membranes
from erasure.imports.reading import ADAPTER, Contents, bare_name, read_checkpoint

log = logging.getLogger(__name__)

_PASSED_OVER = {
    "the autoencoder": r"(first_stage_model|vae)\..*",
    "the noise schedule": r"(\w*(betas|alphas_cumprod)\w*|posterior_\w+|scale_factor|logvar|lvlb_weights)",
    "averaged copies": r"(model_|unet_)?ema\..*",
    "the safety checker": r"safety_checker\..*",
    "CLIP's other half": r"(text_encoder\.)?(vision_model\..*|(visual|text)_projection(\.weight)?|logit_scale)",
    "position tables": r"(transformer\.)?pos_embed\.pos_embed",
    "position ids": r"(.*\.)?position_ids",
}


def edit_of(path: Path, model: TextToImage, *, merge: Merge = "exact") -> Edit:
    """The edit that makes the checkpoint at ``path`` of ``model``.

    A tensor that is the model's own, but for the rounding to the file's precision or the model's, counts as unchanged.

    Args:
        path: A file or a folder.
        model: The unedited model.
        merge: For SPM's files, how permeable their membranes are; see :class:`erasure.additions.membranes.Membranes`.

    Raises:
        FileNotFoundError: See :func:`erasure.imports.reading.read_checkpoint`.
        ValueError: See there; or the checkpoint does not fit ``model``.
    """
    content = read_checkpoint(path)
    if isinstance(content, Edit):
        if content.metadata.get("base") not in {None, model.fingerprint()}:
            log.warning("import: %s was made from other weights than those of %s", path, model.name)
        return Edit(content.entries, {"imported": content.metadata}, content.additions)
    reasons = {key: reason for key in content.tensors if (reason := _skipped_as(bare_name(key)))}
    skipped = Counter(reasons.values())
    weights = {key: tensor for key, tensor in content.tensors.items() if key not in reasons}
    if not weights:
        raise ValueError(f"{path} holds nothing of a network or a text encoder, but {', '.join(skipped)}.")
    if all(ADAPTER.fullmatch(key) and not is_low_rank(key) for key in weights):
        return adapters_edit(path, weights, model)
    factors, dense = _places(path, Contents(weights, content.header), model)
    if factors and not dense.weights and (targets := erased_by_spm(content)):
        log.info("import: membranes of %d layers in %s, against %s", len(factors), path, ", ".join(targets))
        return membranes(path, factors, targets, model, merge)
    if dense.added_tokens > 0:
        skipped["embeddings of added tokens"] = dense.added_tokens
    values = folded(factors, model, dense.weights)
    edit = dense_edit(path, values, model, sums=factors.keys() - dense.weights.keys())
    log.info(
        "import: %d tensors in %s, %d differ from the model's%s",
        len(values),
        path,
        len(edit.entries),
        "".join(f"; {count} of {reason} passed over" for reason, count in skipped.items()),
    )
    return edit


def _places(path: Path, content: Contents, model: TextToImage) -> tuple[Factors, Fit]:
    """The low-rank changes and the whole tensors of a checkpoint by our parameter names.

    Raises:
        ValueError: Some have no place in the model.
    """
    low = {key: tensor for key, tensor in content.tensors.items() if is_low_rank(key)}
    found = low_rank(path, low, content.header, model)
    dense = fit({key: tensor for key, tensor in content.tensors.items() if key not in low}, model)
    if strange := [*found.strange, *dense.strange]:
        raise misfit(path, strange, len(content.tensors), model)
    if not found.factors and not dense.weights:
        raise ValueError(
            f"{path} holds nothing of a network or a text encoder, but the embeddings of {dense.added_tokens} added "
            "tokens; name files of such embeddings in model.embeddings, and use their tokens in prompts."
        )
    return found.factors, dense


def _skipped_as(name: str) -> str | None:
    return next((reason for reason, pattern in _PASSED_OVER.items() if re.fullmatch(pattern, name)), None)
