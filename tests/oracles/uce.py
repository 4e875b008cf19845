"""UCE from its formula: every matrix on its own, the sums written out term by term, one token pair at a time."""

import torch
from torch import Tensor

from diffusion.streams import stream

Pair = tuple[Tensor, Tensor]
"""An embedding float64 [width] and the one whose keys and values it is to get."""


def last_token(ids: list[int], end: int) -> int:
    """Position before the first end token."""
    position = 0
    while ids[position] != end:
        position += 1
    return position - 1


def pairs_2025(target: Tensor, target_last: int, guide: Tensor, guide_last: int) -> list[Pair]:
    """The last subject tokens of two phrases, float64 [tokens, width] each."""
    return [(target[target_last], guide[guide_last])]


def pairs_2023(target: Tensor, target_last: int, guide: Tensor, guide_last: int) -> list[Pair]:
    """target[io : n - max(0, f - io)] against guide[ig : n - max(0, f - ig)], with f the later of the two."""
    n, farthest = len(target), max(target_last, guide_last)
    sources = target[target_last : n - max(0, farthest - target_last)]
    destinations = guide[guide_last : n - max(0, farthest - guide_last)]
    return list(zip(sources, destinations, strict=True))


def edit_matrix(
    weight: Tensor, erase: list[Pair], preserve: list[Tensor], ridge: float, erase_scale: float, preserve_scale: float
) -> Tensor:
    """(lambda W + sum_e s_e W c_g c_e^T + sum_p s_p W c_p c_p^T) (lambda I + sum_e s_e c_e c_e^T + ...)^-1."""
    numerator = ridge * weight.clone()
    denominator = ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for source, destination in erase:
        numerator += erase_scale * torch.outer(weight @ destination, source)
        denominator += erase_scale * torch.outer(source, source)
    for kept in preserve:
        numerator += preserve_scale * torch.outer(weight @ kept, kept)
        denominator += preserve_scale * torch.outer(kept, kept)
    return numerator @ torch.linalg.inv(denominator)


def debiasing_pairs(texts: list[tuple[Tensor, int]], strengths: list[float], tokens: int | None) -> list[Pair]:
    """c and c + sum_p alpha_p a_p, token by token from the last subject tokens on.

    Args:
        texts: The target's embeddings float64 [tokens, width] and last subject token, then each attribute's.
        strengths: alpha, one for each attribute.
        tokens: How many; None for as many as all of them have.
    """
    count = min(len(text) - last for text, last in texts) if tokens is None else tokens
    (target, target_last), *attributes = texts
    pairs = []
    for offset in range(count):
        destination = target[target_last + offset].clone()
        for strength, (text, last) in zip(strengths, attributes, strict=True):
            destination += strength * text[last + offset]
        pairs.append((target[target_last + offset], destination))
    return pairs


def shown(model, prompts, judges, pictures, steps, guidance, seed) -> list[int]:
    """Which attribute's judge is surest of each picture; prompts take turns."""
    seeds = torch.randint(2**31, (pictures,), generator=stream(seed, "painting/seeds")).tolist()
    surest = []
    for number, picture_seed in enumerate(seeds):
        text = model.encode_prompts([prompts[number % len(prompts)]])
        latents = model.sample(text, seeds=[picture_seed], steps=steps, guidance=guidance)
        scores = [float(judge(model.decode(latents)).score[0]) for judge in judges]
        surest.append(scores.index(max(scores)))
    return surest
