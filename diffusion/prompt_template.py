"""Prompts with free places for token embeddings: where they go, and the text embeddings they lead to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.model import TextToImage
from diffusion.text.encoders import Beside

Insertion = Literal["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"]
"""Where k tokens enter a prompt of L tokens: before it; after it; after L // 2 of its tokens; one after each
L // (k + 1) of them; one before each three of them."""

WORDS_PER_TOKEN = 3
"""Prompt tokens that follow each inserted token in ``per_k_words``."""


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
        slots: int64 [n, k], the positions of the inserted tokens. Where a prompt has fewer than k, the rest lie behind
            the last position, and what is put there is lost.
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
        return cls._open(model, prompts, count, lambda _, length: insertion_points(length, count, insertion))

    @classmethod
    def insert_every(cls, model: TextToImage, prompts: Sequence[str], period: int) -> "PromptTemplate":
        """Open a slot before each prompt and after every ``period`` of its tokens: L // period + 1 for L of them.

        A prompt too long for that loses its tail.
        """
        most = model.max_tokens - 2
        count = -(-most // (period + 1))
        return cls._open(model, prompts, count, lambda _, length: list(range(0, length + 1, period))[:count])

    @classmethod
    def at_placeholder(cls, model: TextToImage, captions: Sequence[str], count: int) -> "PromptTemplate":
        """Open ``count`` slots in each caption in the place of its ``{}``.

        A caption too long for that loses its tail.
        """
        before = [model.tokenize([caption.partition("{}")[0]])[0].tolist() for caption in captions]
        points = [row.index(model.tokenizer.eos_token_id) - 1 for row in before]
        prompts = [caption.replace("{}", " ", 1) for caption in captions]
        return cls._open(model, prompts, count, lambda index, length: [min(points[index], length)] * count)

    @classmethod
    def _open(
        cls, model: TextToImage, prompts: Sequence[str], count: int, points_of: Callable[[int, int], list[int]]
    ) -> "PromptTemplate":
        """Open up to ``count`` slots in each prompt, before those tokens that ``points_of`` its index and length tells.

        Raises:
            ValueError: The text encoder has too few positions for ``count`` tokens.
        """
        tokenizer = model.tokenizer
        most = model.max_tokens - 2
        if not 1 <= count <= most:
            raise ValueError(f"{count} tokens cannot be inserted: this model's prompts take 1 to {most} of them.")
        rows, slots, ends = [], [], []
        for number, row in enumerate(model.tokenize(prompts).tolist()):
            tokens = row[1 : row.index(tokenizer.eos_token_id)][: most - count]
            points = points_of(number, len(tokens))
            slots.append([1 + point + index for index, point in enumerate(points)])
            slots[-1] += [model.max_tokens] * (count - len(points))
            for index, point in enumerate(points):
                tokens.insert(point + index, tokenizer.eos_token_id)
            ends.append(1 + len(tokens))
            padding = [tokenizer.pad_token_id] * (most - len(tokens))
            rows.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding])
        device = model.vocabulary.device
        return cls(*(torch.tensor(values, device=device) for values in (rows, slots, ends)))

    def repeat(self, times: int) -> "PromptTemplate":
        """Take each prompt several times in a row."""
        return PromptTemplate(*(values.repeat_interleave(times, dim=0) for values in (self.ids, self.slots, self.ends)))

    def fill(self, tokens: Tensor) -> Tensor:
        """Put ``tokens``, int64 [n, k], in the slots; ids int64 [n, tokens]."""
        return functional.pad(self.ids, (0, 1)).scatter(1, self.slots, tokens)[:, :-1]

    def encode(self, model: TextToImage, token_embeddings: Tensor, beside: Beside | None = None) -> Tensor:
        """Encode the prompts with ``token_embeddings``, float [n, k, width], in the slots; differentiable in them.

        Args:
            model: Its text encoders.
            token_embeddings: What goes in the slots.
            beside: What a T5 reads beside them.

        Returns:
            float [n, tokens, width].
        """
        slots = self.slots[..., None].expand_as(token_embeddings)
        rows = functional.pad(model.token_embeddings(self.ids), (0, 0, 0, 1)).scatter(1, slots, token_embeddings)
        return model.encode_embeddings(rows[:, :-1], self.ends, beside)

    def encode_tokens(self, model: TextToImage, tokens: Tensor) -> Tensor:
        """Encode the prompts with ``tokens``, int64 [n, k], in the slots; float [n, tokens, width]."""
        return model.encode_ids(self.fill(tokens))

    def comes_back(self, model: TextToImage, tokens: Tensor) -> Tensor:
        """Whether the text with ``tokens``, int64 [n, k], is read as what it was made of, bool [n]."""
        filled = self.fill(tokens)
        return (model.tokenize(self.texts(model, tokens)).to(filled.device) == filled).all(dim=1)

    @torch.no_grad()
    def encode_detached(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings`` of any precision, without gradients."""
        return self.encode(model, token_embeddings.to(model.vocabulary.dtype))

    def __getitem__(self, index: Tensor) -> "PromptTemplate":
        """Take the prompts at ``index``, int64 [m], which may repeat."""
        return PromptTemplate(self.ids[index], self.slots[index], self.ends[index])

    def texts(self, model: TextToImage, tokens: Tensor) -> list[str]:
        """Read the prompts as text, with ``tokens``, int64 [n, k], in the slots.

        Special tokens have no text, and reading the text again may cut it into other tokens.
        """
        filled = self.fill(tokens).tolist()
        return [
            model.tokenizer.decode(row[1:end], skip_special_tokens=True).strip()
            for row, end in zip(filled, self.ends.tolist(), strict=True)
        ]
