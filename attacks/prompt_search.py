"""What token attacks share: where tokens go in a prompt, which tokens may go there, and the simplex over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion.model import TextToImage

Insertion = Literal["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"]
"""Where k tokens enter a prompt of L tokens: before it; after it; after L // 2 of its tokens; one after each
L // (k + 1) of them; one before each three of them."""

WORDS_PER_TOKEN = 3
"""Prompt tokens that follow each inserted token in ``per_k_words``."""

LARGEST = 256
"""Coordinates that the projection on the simplex starts from; it changes speed only."""


def insertion_points(length: int, count: int, insertion: Insertion) -> list[int]:
    """Count how many of a prompt's ``length`` tokens come before each of ``count`` inserted ones; never decreasing."""
    match insertion:
        case "prefix_k":
            return [0] * count
        case "suffix_k":
            return [length] * count
        case "mid_k":
            return [length // 2] * count
        case "insert_k":
            return [length // (count + 1) * (index + 1) for index in range(count)]
        case "per_k_words":
            return [min(WORDS_PER_TOKEN * index, length) for index in range(count)]


@dataclass(frozen=True)
class PromptTemplate:
    """Tokenised prompts with free slots for inserted tokens.

    Attributes:
        ids: int64 [n, tokens]: start, prompt and slots, end, padding; a slot holds the end token until it is filled.
        slots: int64 [n, k], the positions of the inserted tokens.
        ends: int64 [n], the position of the end token.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor

    @classmethod
    def insert(cls, model: TextToImage, prompts: Sequence[str], count: int, insertion: Insertion) -> "PromptTemplate":
        """Open ``count`` slots in each prompt.

        Prompt tokens keep their order and padding makes room. Where there is too little, the prompt loses its tail;
        start token, slots and end token always stay.

        Raises:
            ValueError: The text encoder has too few positions for ``count`` tokens.
        """
        tokenizer = model.tokenizer
        most = model.max_tokens - 2
        if not 1 <= count <= most:
            raise ValueError(f"{count} tokens cannot be inserted: this model's prompts take 1 to {most} of them.")
        rows, slots, ends = [], [], []
        for row in model.tokenize(prompts).tolist():
            tokens = row[1 : row.index(tokenizer.eos_token_id)][: most - count]
            points = insertion_points(len(tokens), count, insertion)
            slots.append([1 + point + index for index, point in enumerate(points)])
            for index, point in enumerate(points):
                tokens.insert(point + index, tokenizer.eos_token_id)
            ends.append(1 + len(tokens))
            padding = [tokenizer.pad_token_id] * (most - len(tokens))
            rows.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding])
        device = model.vocabulary.device
        return cls(*(torch.tensor(values, device=device) for values in (rows, slots, ends)))

    def fill(self, tokens: Tensor) -> Tensor:
        """Put ``tokens``, int64 [n, k], in the slots; ids int64 [n, tokens]."""
        return self.ids.scatter(1, self.slots, tokens)

    def encode(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings``, float [n, k, width], in the slots; differentiable in them.

        Returns:
            float [n, tokens, width].
        """
        width = token_embeddings.shape[-1]
        rows = model.vocabulary[self.ids].scatter(1, self.slots[..., None].expand(-1, -1, width), token_embeddings)
        return model.encode_embeddings(rows, self.ends)

    def texts(self, model: TextToImage, tokens: Tensor) -> list[str]:
        """Read the prompts as text, with ``tokens``, int64 [n, k], in the slots.

        Special tokens have no text, and reading the text again may cut it into other tokens.
        """
        filled = self.fill(tokens).tolist()
        return [
            model.tokenizer.decode(row[1:end], skip_special_tokens=True).strip()
            for row, end in zip(filled, self.ends.tolist(), strict=True)
        ]


def candidate_tokens(model: TextToImage, *, exclude_special: bool = True) -> Tensor:
    """List the ids that an attack may insert, int64 [candidates]: all but start, end and padding by default."""
    special = set(model.tokenizer.all_special_ids) if exclude_special else set()
    size = min(len(model.tokenizer), len(model.vocabulary))
    return torch.tensor([token for token in range(size) if token not in special], device=model.vocabulary.device)


def project_to_simplex(points: Tensor) -> Tensor:
    """Project each row on the probability simplex: max(p - theta, 0), with the theta that makes the row sum to 1.

    theta is the largest (sum over S - 1) / |S| of all sets S of coordinates. Sets of the largest few hundred give a
    first value from below; Newton's steps on the sum, which is piecewise linear, lead from there to the exact one
    (Michelot, 1986), mostly in two or three passes over all rows at once. That is several times faster than sorting
    rows of 49,408.

    Args:
        points: float [..., coordinates].
    """
    points = points - points.amax(dim=-1, keepdim=True)
    largest = points.topk(min(LARGEST, points.shape[-1]), dim=-1).values
    sizes = torch.arange(1, largest.shape[-1] + 1, device=points.device)
    threshold = ((largest.cumsum(dim=-1) - 1) / sizes).amax(dim=-1, keepdim=True)
    above = torch.full_like(sizes[:1], points.shape[-1] + 1)
    while True:
        excess = (points - threshold).clamp_min_(0)
        above, previously = (excess > 0).sum(dim=-1, keepdim=True), above
        if (above == previously).all():
            return excess
        threshold = threshold + ((excess.sum(dim=-1, keepdim=True) - 1) / above).clamp_min(0)
