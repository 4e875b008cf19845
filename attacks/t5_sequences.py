"""Prompts with free slots as a T5 reads them, in tokens of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.prompt_template import PromptTemplate
from diffusion.text.with_t5 import T5


@dataclass(frozen=True)
class T5Sequences:
    """What a T5 reads, tokens and embeddings alike.

    Attributes:
        t5: The T5.
        length: Tokens of a prompt, the end token included.
        device: Where tokens and embeddings are, wherever the T5 waits.
    """

    t5: T5
    length: int
    device: torch.device

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.t5.tokenizer

    @property
    def size(self) -> int:
        """Tokens that have an embedding."""
        return len(self.t5.table)

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.t5.table.shape[1]

    def look_up(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens int64 [...], float [..., width]."""
        table = self.t5.table
        return table[tokens.to(table.device)].to(tokens.device)

    def template(self, sequences: Sequence[Sequence[int | None]], slots: int) -> PromptTemplate:
        """Ids of sequences in which None is a slot; what is too long loses its tail, but no slot.

        Raises:
            ValueError: There is no room for the slots.
        """
        rows, places, ends = [], [], []
        end, padding = (int(token) for token in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id))
        most = self.length - 1
        if slots > most:
            raise ValueError(f"{slots} tokens cannot be inserted: T5's prompts take 1 to {most} of them here.")
        for sequence in sequences:
            own = [place for place, token in enumerate(sequence) if token is not None]
            dropped = set(own[len(own) - max(len(sequence) - most, 0) :])
            kept = [token for place, token in enumerate(sequence) if place not in dropped]
            opened = [place for place, token in enumerate(kept) if token is None]
            places.append(opened + [self.length] * (slots - len(opened)))
            ends.append(len(kept))
            filled = [end if token is None else token for token in kept]
            rows.append([*filled, end, *[padding] * (most - len(kept))])
        return PromptTemplate(*(torch.tensor(values, device=self.device) for values in (rows, places, ends)))

    def rows(self, template: PromptTemplate, embeddings: Tensor) -> Tensor:
        """All embeddings of a template with those float [n, k, width] in its slots, float [n, length, width]."""
        slots = template.slots[..., None].expand_as(embeddings)
        rows = functional.pad(self.look_up(template.ids), (0, 0, 0, 1)).to(embeddings.dtype)
        return rows.scatter(1, slots, embeddings)[:, :-1]

    def reads(self, template: PromptTemplate, tokens: Tensor, texts: Sequence[str]) -> Tensor:
        """Whether texts are read as the template with tokens int64 [n, k] in its slots, bool [n]."""
        filled = template.fill(tokens)
        return (self.t5.ids(texts, self.length).to(filled.device) == filled).all(dim=1)
