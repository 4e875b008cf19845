"""Tiny ONNX networks for tests, written byte by byte: the package that makes such files is not among ours."""

from pathlib import Path

import numpy as np

FLOAT = 1


def _number(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded, value = encoded + bytes([value % 128 + 128]), value // 128
    return encoded + bytes([value])


def _field(key: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _number(key << 3) + _number(value)
    content = value.encode() if isinstance(value, str) else value
    return _number(key << 3 | 2) + _number(len(content)) + content


def _node(operator: str, inputs: list[str], output: str, *attributes: bytes) -> bytes:
    named = b"".join(_field(1, name) for name in inputs)
    return named + _field(2, output) + _field(4, operator) + b"".join(_field(5, one) for one in attributes)


def _value(name: str, shape: list[int | str]) -> bytes:
    dimensions = b"".join(_field(1, _field(1 if isinstance(size, int) else 2, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, FLOAT) + _field(2, dimensions)))


def write_mean_classifier(path: Path, weights: np.ndarray) -> Path:
    """Write softmax(mean colour @ weights [3, classes]) of float pictures [n, 256, 256, 3] into ``path``."""
    axes = _field(1, "axes") + _field(8, 1) + _field(8, 2) + _field(20, 7)
    flat = _field(1, "keepdims") + _field(3, 0) + _field(20, 2)
    matrix = b"".join(_field(1, size) for size in weights.shape) + _field(2, FLOAT) + _field(8, "weights")
    matrix += _field(9, weights.astype("<f4").tobytes())
    graph = b"".join(
        _field(1, node)
        for node in (
            _node("ReduceMean", ["pictures"], "colour", axes, flat),
            _node("MatMul", ["colour", "weights"], "logits"),
            _node("Softmax", ["logits"], "probabilities"),
        )
    )
    graph += _field(2, "mean_classifier") + _field(5, matrix)
    graph += _field(11, _value("pictures", ["n", 256, 256, 3]))
    graph += _field(12, _value("probabilities", ["n", weights.shape[1]]))
    path.write_bytes(_field(1, 8) + _field(8, _field(1, "") + _field(2, 13)) + _field(7, graph))
    return path
