"""Gradient descent on tokens through continuous embeddings (PEZ, Wen et al., NeurIPS 2023), as PEZ and P4D need it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from attacks.evaluate import Proposal
from attacks.prompt_search import Criterion, NoisyPictures, adam_step, embedding_gradient, nearest_tokens
from attacks.tables import Space, Template, proposals_of


@dataclass
class FreeTokens:
    """Tokens of one prompt that are searched for, float64 [k, width] each.

    Attributes:
        embeddings: e, the continuous embeddings.
        mean: Adam's first moment.
        variance: Adam's second moment.
        steps: Steps taken.
    """

    embeddings: Tensor
    mean: Tensor
    variance: Tensor
    steps: int = 0

    @classmethod
    def at(cls, space: Space, tokens: Tensor) -> "FreeTokens":
        """Start at the embeddings of ``tokens``, int64 [k]."""
        embeddings = space.look_up(tokens).double()
        return cls(embeddings, torch.zeros_like(embeddings), torch.zeros_like(embeddings))


def descend(
    space: Space,
    template: Template,
    searches: Sequence[FreeTokens],
    pictures: Sequence[NoisyPictures],
    candidates: Tensor,
    *,
    learning_rate: float,
    weight_decay: float,
    decoupled: bool = True,
    criterion: Criterion = "l2",
) -> list[Proposal]:
    """Take one step of every search for each of its draws.

    A step takes every row of e to the candidate's embedding that is nearest by cosine, computes the gradient of the
    error there and applies it to e itself.

    Args:
        space: The tokens of the erased model.
        template: Of n prompts.
        searches: One per prompt; they are advanced in place.
        pictures: One per prompt, all of as many draws: what the model should predict.
        candidates: int64 [candidates], ids that may be found.
        learning_rate: Adam's step size.
        weight_decay: Its decay.
        decoupled: AdamW in place of Adam.
        criterion: What the error is.

    Returns:
        Per prompt its text with the nearest tokens after the last step and the mean loss of the steps, without cost.
    """
    model, table = space.model, space.look_up(candidates)
    directions = functional.normalize(table.to(torch.promote_types(table.dtype, torch.float32)), dim=-1)
    embeddings = torch.stack([state.embeddings for state in searches])
    mean = torch.stack([state.mean for state in searches])
    variance = torch.stack([state.variance for state in searches])
    taken = torch.tensor([state.steps for state in searches], device=model.device)
    timesteps = torch.stack([drawn.timesteps for drawn in pictures])
    latents = torch.stack([drawn.latents for drawn in pictures])
    targets = torch.stack([drawn.targets for drawn in pictures])
    losses = torch.zeros(len(searches), dtype=torch.float64, device=model.device)
    steps = timesteps.shape[1]

    for step in range(steps):
        projected = table[nearest_tokens(embeddings, directions)]
        gradient, loss = embedding_gradient(
            model, template, projected, latents[:, step], timesteps[:, step], targets[:, step], criterion=criterion
        )
        losses += loss
        adam_step(
            embeddings,
            gradient.double(),
            mean,
            variance,
            steps=taken + step + 1,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )

    for state, *rows in zip(searches, embeddings, mean, variance, strict=True):
        state.embeddings, state.mean, state.variance = rows
        state.steps += steps
    found = proposals_of(model, template, candidates[nearest_tokens(embeddings, directions)])
    return [replace(proposal, loss=loss) for proposal, loss in zip(found, (losses / steps).tolist(), strict=True)]
