"""Textual inversions: embeddings that others have learned, as tokens that prompts may use (Gal et al. 2023)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tokenizers import AddedToken, Regex, normalizers
from torch import Tensor

from diffusion.weight_files import read_weights

Vectors = tuple[Tensor, ...]
"""Rows of the token tables that stand for one token, float [k, width] for each text encoder."""

FOLDER_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""Where a folder of diffusers keeps them."""

_OF_SDXL = ("clip_l", "clip_g")
_OF_WEBUI = "emb_params"

_END_OF_WORD = "</w>"
"""What CLIP's vocabulary puts behind a word that no piece follows."""


def read_embeddings(path: Path) -> dict[str, Vectors]:
    """The tokens of a textual-inversion file, and their embeddings.

    Read are files of diffusers and Custom Diffusion (``{token: tensor}``), of the WebUI (``string_to_param``, or
    ``emb_params`` in safetensors) and of SDXL (``clip_l`` and ``clip_g``). Where a file names no token, its own name
    without the suffix is the token.

    Args:
        path: The file, or a folder with one of :data:`FOLDER_FILES`.

    Raises:
        FileNotFoundError: There is nothing at ``path``, or a folder without embeddings.
        ValueError: The file is damaged, holds code, or something else.
    """
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path / FOLDER_FILES[0])
    if not path.is_file():
        raise FileNotFoundError(f"There is no textual inversion at {path}; give the path of its file.")
    content, _ = read_weights(path)
    tokens = _tokens(content, path.stem) if isinstance(content, Mapping) else {}
    if not tokens or not all(token.strip() and all(map(_is_table, rows)) for token, rows in tokens.items()):
        raise ValueError(
            f"{path} is no textual inversion: it must hold the embedding of a token, [width] or [k, width], under the "
            f"token, or as string_to_param, {_OF_WEBUI}, or {' and '.join(_OF_SDXL)}."
        )
    return {token: tuple(torch.atleast_2d(each) for each in rows) for token, rows in tokens.items()}


def add_embeddings(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, path: Path) -> list[str]:
    """Give a pipeline's tokenizers and text encoders the tokens of a textual inversion, which it returns.

    A token of k > 1 embeddings stands for k tokens ``<token>_0`` to ``<token>_{k-1}``, wherever a prompt has it.

    Raises:
        FileNotFoundError: See :func:`read_embeddings`.
        ValueError: See there; or the embeddings are not as wide as the encoders', or a token is known already.
    """
    two = isinstance(pipeline, StableDiffusionXLPipeline)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if two else [pipeline.text_encoder]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2] if two else [pipeline.tokenizer]
    widths = [int(encoder.get_input_embeddings().weight.shape[1]) for encoder in encoders]
    added = read_embeddings(path)
    for token, vectors in added.items():
        if [rows.shape[1] for rows in vectors] != widths:
            raise ValueError(
                f"{path} holds embeddings of width {' and '.join(str(rows.shape[1]) for rows in vectors)}, and the "
                f"model's text has {' and '.join(map(str, widths))}; take one that was learned for this kind of model."
            )
        parts = {token, f"{token.lower()}{_END_OF_WORD}", *_parts(token, len(vectors[0]))}
        if parts & tokenizers[0].get_vocab().keys():
            raise ValueError(
                f"{path} adds the token {token!r}, which the model's vocabulary has already; give it another name."
            )
        for encoder, tokenizer, rows in zip(encoders, tokenizers, vectors, strict=True):
            _add(encoder, tokenizer, token, rows)
    return list(added)


def _tokens(content: Mapping[Any, Any], name: str) -> dict[str, tuple[Any, ...]]:
    if isinstance(learned := content.get("string_to_param"), Mapping):
        own = content.get("name")
        return {own if isinstance(own, str) and own else name: tuple(learned.values())}
    if content.keys() >= {*_OF_SDXL}:
        return {name: tuple(content[part] for part in _OF_SDXL)}
    if _OF_WEBUI in content:
        return {name: (content[_OF_WEBUI],)}
    return {token: (rows,) for token, rows in content.items() if isinstance(token, str)}


def _is_table(rows: Any) -> bool:
    return (
        isinstance(rows, Tensor)
        and rows.ndim in {1, 2}
        and rows.is_floating_point()
        and rows.numel() > 0
        and bool(rows.isfinite().all())
    )


def _parts(token: str, count: int) -> list[str]:
    return [token] if count == 1 else [f"{token}_{number}" for number in range(count)]


@torch.no_grad()
def _add(encoder: Any, tokenizer: Any, token: str, rows: Tensor) -> None:
    parts = _parts(token, len(rows))
    tokenizer.add_tokens([AddedToken(part, normalized=True, single_word=part.isalnum()) for part in parts])
    if len(parts) > 1:
        before, behind = ("(?<!\\w)" if token[0].isalnum() else ""), ("(?!\\w)" if token[-1].isalnum() else r"(?!_\d)")
        whole = normalizers.Replace(Regex(f"{before}(?i:{re.escape(token)}){behind}"), " ".join(parts))
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([whole, *([backend.normalizer] if backend.normalizer else [])])
    table = encoder.get_input_embeddings().weight
    encoder.resize_token_embeddings(max(len(tokenizer), len(table)), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table[tokenizer.convert_tokens_to_ids(parts)] = rows.to(table.device, table.dtype)
    # Configurations of before 2023 look for the end of a text at its greatest id, which is now an added token's.
    for part in encoder.modules():
        if getattr(part, "eos_token_id", None) == 2:
            part.eos_token_id = tokenizer.eos_token_id
