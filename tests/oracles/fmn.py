"""Forget-Me-Not from its formula: one sample, one head, one pixel at a time, from the matrices of every layer."""

import math

import torch
from torch import Tensor, nn


def probabilities(layer: nn.Module, pixels: Tensor, text: Tensor) -> list[list[list[float]]]:
    """softmax(q k^T / sqrt(d)) of a cross-attention layer by head, pixel and token; [pixels, any], [tokens, width]."""
    queries = pixels @ layer.to_q.weight.T
    keys = text @ layer.to_k.weight.T
    width = queries.shape[1] // layer.heads
    heads = []
    for head in range(layer.heads):
        columns = slice(head * width, (head + 1) * width)
        rows = []
        for query in queries[:, columns].tolist():
            scores = []
            for key in keys[:, columns].tolist():
                scores.append(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(width))
            total = sum(math.exp(score) for score in scores)
            rows.append([math.exp(score) / total for score in scores])
        heads.append(rows)
    return heads


def seen_by_layers(unet: nn.Module, x_t: Tensor, t: int, text: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The cross-attention layers and the pixels that each looks with, [pixels, any]."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0][0])))
        for name, layer in unet.named_modules()
        if name.endswith("attn2")
    ]
    unet(x_t[None], torch.tensor([t]), text[None])
    for hook in hooks:
        hook.remove()
    return seen


def loss(unet: nn.Module, rows: list[tuple[Tensor, int, Tensor, list[int]]], norm: str) -> float:
    """Mean over rows (x_t, t, text, concept tokens) of the attention's norm, each sample alone in the U-Net."""
    norms = []
    for x_t, t, text, tokens in rows:
        seen = seen_by_layers(unet, x_t, t, text)
        squares = []
        for layer, pixels in seen:
            heads = probabilities(layer, pixels, text)
            squares.append(sum(row[token] ** 2 for head in heads for row in head for token in tokens))
        norms.append(sum(math.sqrt(s) for s in squares) if norm == "layers" else math.sqrt(sum(squares)))
    return sum(norms) / len(norms)
