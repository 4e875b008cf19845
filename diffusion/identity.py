"""What identifies a model: all that its pictures depend on, wherever it came from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffusion.model import TextToImage
from diffusion.source_code import code_of

_SAYS_NOTHING = frozenset({"transformers_version", "architectures", "dtype", "torch_dtype"})
"""Fields of a configuration that say how it was stored."""

_STATE_OF_USE = frozenset({"padding", "truncation"})
"""Fields of a tokenizer that its last call left there; every call of ours sets them."""


def identity(model: TextToImage) -> dict[str, Any]:
    """Plain data that is equal for two models if, and only if, they draw the same pictures in the same way.

    The weights and every configuration count by their content, so a folder, a copy of it, a snapshot of the Hub and
    the pipeline in memory are one model; another noise schedule, scaling factor, activation or vocabulary makes
    another. So do other code, and a device or a number of CPU threads that sums in another order.
    """
    return {
        "weights": model.fingerprint(),
        **{part: _digest(settings) for part, settings in configuration(model).items()},
        "sampler": model.scheduler_name,
        "autocast": str(model.autocast),
        "resolution": model.resolution,
        "code": code_of(model),
        **arithmetic(model.device),
    }


def configuration(model: TextToImage) -> dict[str, Any]:
    """All that a model is besides its weights, as JSON values by part: what a folder's files other than weights say."""
    text = model.text_encoders
    return {
        model.denoiser.part: _network(model.network),
        "vae": _network(model.vae),
        "text_encoder": [_network(encoder) for encoder in text.all_encoders],
        "tokenizer": [_tokenizer(tokenizer) for tokenizer in text.all_tokenizers],
        "scheduler": _fields(model.process.config),
        **({"pipeline": text.settings} if text.settings else {}),
    }


def arithmetic(device: torch.device) -> dict[str, Any]:
    """How sums are ordered: ``device``, and on the CPU the number of threads."""
    if device.type != "cpu":
        return {"device": device.type}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def _network(network: Any) -> dict[str, Any]:
    config = network.config
    kind = type(network)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "dtype": str(network.dtype),
        **_fields(config.to_dict() if hasattr(config, "to_dict") else config),
    }


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without names, paths and versions."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _SAYS_NOTHING}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        with TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            files = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())}
    else:
        files = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _STATE_OF_USE}
    return {
        "class": type(tokenizer).__qualname__,
        "length": tokenizer.model_max_length,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {str(token): place for token, place in tokenizer.get_added_vocab().items()},
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "vocabulary": files,
    }


def _digest(settings: Any) -> str:
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
