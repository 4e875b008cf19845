"""SPM from its formulas: one number of a layer, one token of a prompt, one prediction at a time, in float64."""

import math

import torch
from torch import Tensor, nn

Concept = tuple[float, list[list[float]], Tensor]
"""m, u [outputs][rank] and d, float64 [rank, inputs] or [rank, inputs, height, width], of one concept."""


def linear(x: list[float], concepts: list[Concept], scale: float, published: bool) -> list[float]:
    """What the membranes add to a linear layer's output for one input vector."""
    hidden = [[sum(d[k, j].item() * x[j] for j in range(len(x))) for k in range(len(d))] for _, _, d in concepts]
    return mixed(hidden, concepts, scale, published)


def convolution(
    x: Tensor, concepts: list[Concept], scale: float, published: bool, stride: int, padding: int
) -> list[list[list[float]]]:
    """What the membranes add to a convolution's output [h][w][outputs] for one picture float64 [inputs, h, w]."""
    channels, height, width = x.shape
    size = concepts[0][2].shape[-1]
    rows = []
    for top in range(-padding, height + padding - size + 1, stride):
        row = []
        for left in range(-padding, width + padding - size + 1, stride):
            hidden = []
            for _, _, d in concepts:
                sums = [0.0] * len(d)
                for k in range(len(d)):
                    for channel in range(channels):
                        for i in range(size):
                            for j in range(size):
                                if 0 <= top + i < height and 0 <= left + j < width:
                                    sums[k] += d[k, channel, i, j].item() * x[channel, top + i, left + j].item()
                hidden.append(sums)
            row.append(mixed(hidden, concepts, scale, published))
        rows.append(row)
    return rows


def mixed(hidden: list[list[float]], concepts: list[Concept], scale: float, published: bool) -> list[float]:
    """sum_i m_i u_i h_i, or (sum_i m_i u_i) (sum_j m_j h_j); ``hidden`` is [concepts][rank]."""
    outputs, rank = len(concepts[0][1]), len(hidden[0])
    total = [0.0] * outputs
    for i, (m, u, _) in enumerate(concepts):
        for j, (other, _, _) in enumerate(concepts):
            if i != j and not published:
                continue
            for o in range(outputs):
                for k in range(rank):
                    total[o] += scale * m * u[o][k] * hidden[j][k] * (other if published else 1.0)
    return total


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two texts [tokens, width] as one long vector each."""
    product = norm_a = norm_b = 0.0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        product, norm_a, norm_b = product + x * y, norm_a + x * x, norm_b + y * y
    return product / math.sqrt(norm_a * norm_b)


def overlap(target: list[int], prompt: list[int], special: set[int]) -> float:
    """|T(c) and T(p)| / |T(c)|."""
    own = {token for token in target if token not in special}
    return len([token for token in own if token in prompt]) / len(own)


def permeability(
    targets: list[tuple[Tensor, list[int]]], prompt: tuple[Tensor, list[int]], special: set[int], gamma: float
) -> float:
    """m(p) from (text, token ids) of the targets and the prompt."""
    best = -1.0
    for text, ids in targets:
        best = max(best, cosine(text, prompt[0]), overlap(ids, prompt[1], special))
    return gamma * best


def anchor_weight(anchor: Tensor, target: Tensor, exponent: float) -> float:
    """(1 - |cos|)^beta."""
    return (1 - abs(cosine(anchor, target))) ** exponent


def with_membranes(unet: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    """Parameters with scale * u d in the weights of the layers named; u [outputs, r], d [r, inputs, ...]."""
    parameters = dict(unet.named_parameters())
    for layer, (up, down) in factors.items():
        weight = parameters[f"{layer}.weight"].detach().clone()
        for o in range(len(weight)):
            for k in range(len(down)):
                weight[o] += scale * up[o, k] * down[k]
        parameters[f"{layer}.weight"] = weight
    return parameters


def predict(unet: nn.Module, parameters: dict[str, Tensor] | None, x: Tensor, t: int, text: Tensor) -> Tensor:
    """One prediction, float64 [c, h, w]."""
    inputs = (x[None], torch.tensor([t]), text[None])
    if parameters is None:
        return unet(*inputs).sample[0]
    return torch.func.functional_call(unet, parameters, inputs).sample[0]


def squares(prediction: Tensor, wanted: Tensor) -> list[float]:
    """Of every number's error."""
    return [(a - b) ** 2 for a, b in zip(prediction.flatten().tolist(), wanted.flatten().tolist(), strict=True)]


def loss(
    unet: nn.Module,
    membranes: dict[str, Tensor],
    points: list[tuple[Tensor, int, Tensor, Tensor]],
    anchors: list[Tensor],
    eta: float,
    anchoring_weight: float,
) -> float:
    """L over points (x_t, t, text of c, text of s) and anchors, which are taken to the points in turn."""
    erasing, anchoring = [], []
    for x, t, target, surrogate in points:
        e_s, e_c = predict(unet, None, x, t, surrogate), predict(unet, None, x, t, target)
        erasing += squares(predict(unet, membranes, x, t, target), e_s - eta * (e_c - e_s))
    for place, anchor in enumerate(anchors):
        x, t, _, _ = points[place % len(points)]
        anchoring += squares(predict(unet, membranes, x, t, anchor), predict(unet, None, x, t, anchor))
    total = sum(erasing) / len(erasing)
    return total + (anchoring_weight * sum(anchoring) / len(anchoring) if anchoring else 0.0)
