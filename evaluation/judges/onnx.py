"""ONNX networks, opened so that what they say depends on the pictures alone."""

from functools import lru_cache
from pathlib import Path

import onnxruntime
import torch

from diffusion.files import stands_in
from diffusion.loading import Device

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@lru_cache(maxsize=4)
def open_session(file: Path, device: Device) -> onnxruntime.InferenceSession:
    """The network in ``file``, opened once per process, with as many threads as PyTorch has.

    Raises:
        ValueError: The file is no ONNX network, or ``device`` is ``cuda`` and ONNX Runtime finds none.
    """
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise ValueError(
            "device is 'cuda', but this ONNX Runtime knows no GPU; use device=cpu or install onnxruntime-gpu."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.use_deterministic_compute = True
    # Its threads would wait for the next picture at full speed while the diffusion model needs the processor.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            file, options, providers=[_CUDA, _CPU] if has_cuda and device != "cpu" else [_CPU]
        )
    except Exception as error:  # its exceptions have no public base class
        fault = stands_in(file) or "is no network that ONNX Runtime can open; download it again"
        raise ValueError(f"{file} {fault}.") from error
