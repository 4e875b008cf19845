"""RECE from its formulas: two sets of matrices, edited ones and originals, one embedding at a time."""

import torch
from torch import Tensor


def adversarial_embedding(edited: list[Tensor], original: list[Tensor], embedding: Tensor, ridge: float) -> Tensor:
    """(mu I + sum_l W_l'^T W_l')^-1 (sum_l W_l'^T W_l) c, float64 [width]."""
    width = len(embedding)
    left = ridge * torch.eye(width, dtype=torch.float64)
    right = torch.zeros(width, dtype=torch.float64)
    for new, old in zip(edited, original, strict=True):
        for new_row, old_row in zip(new, old, strict=True):
            left += torch.outer(new_row, new_row)
            right += new_row * torch.dot(old_row, embedding)
    return torch.linalg.inv(left) @ right


def edit(
    edited: list[Tensor],
    original: list[Tensor],
    concept: list[Tensor],
    destinations: list[Tensor],
    kept: list[Tensor],
    *,
    adversarial_ridge: float,
    ridge: float,
    erase_scale: float,
    preserve_scale: float,
) -> list[Tensor]:
    """One epoch: the adversarial embedding of every concept embedding, then each matrix moved by the sums."""
    found = [adversarial_embedding(edited, original, embedding, adversarial_ridge) for embedding in concept]
    result = []
    for weight in edited:
        numerator = ridge * weight.clone()
        denominator = ridge * torch.eye(weight.shape[1], dtype=torch.float64)
        for source, destination in zip(found, destinations, strict=True):
            numerator += erase_scale * torch.outer(weight @ destination, source)
            denominator += erase_scale * torch.outer(source, source)
        for embedding in kept:
            numerator += preserve_scale * torch.outer(weight @ embedding, embedding)
            denominator += preserve_scale * torch.outer(embedding, embedding)
        result.append(numerator @ torch.linalg.inv(denominator))
    return result
