"""A model's text encoders, read as one: CLIP's, one or several over one vocabulary, and a T5 beside them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.text.tokenizer import CleaningTokenizer


@dataclass(frozen=True)
class Span:
    """Where the tokens of one tokenizer are among a text's rows.

    Attributes:
        rows: Their rows.
        ends: The end token of each prompt, counted from the first of them.
    """

    rows: slice
    ends: list[int]


Beside = Sequence[str] | Tensor
"""What an encoder that reads text reads beside given embeddings: texts, or its own tokens' embeddings."""


class TextEncoders(ABC):
    """CLIP text encoders that read the ids of one tokenizer.

    Text is one tensor, float [n, rows, width]: the rows that the denoiser attends to, and below them one with the
    pooled embedding, padded with zeros, if the denoiser takes one. All encoders read the first tokenizer's ids; a "!"
    in a prompt, which some second tokenizers take for their padding, stays a "!" here.

    Args:
        encoders: The encoders.
        tokenizers: Theirs.

    Attributes:
        encoders: The encoders of the vocabulary.
        tokenizer: The first tokenizer, with CLIP's clean-up.
        tokenizers: All of them, as they came.
        reads_text: An encoder beside these reads the prompt's text in tokens of its own.

    Raises:
        ValueError: The tokenizers have different vocabularies or lengths, so one sequence of ids cannot serve all.
    """

    reads_text: bool = False

    def __init__(self, encoders: Sequence[Any], tokenizers: Sequence[Any]) -> None:
        first = tokenizers[0]
        for other in tokenizers[1:]:
            if first.get_vocab() != other.get_vocab() or first.model_max_length != other.model_max_length:
                raise ValueError(
                    f"The model's tokenizers differ: {len(first)} and {len(other)} tokens, {first.model_max_length} "
                    f"and {other.model_max_length} positions; both text encoders must read the same vocabulary."
                )
        self.encoders: tuple[Any, ...] = tuple(encoders)
        self.tokenizers: tuple[Any, ...] = tuple(tokenizers)
        self.tokenizer = CleaningTokenizer(first)

    @property
    def all_encoders(self) -> tuple[Any, ...]:
        """The encoders of the vocabulary and what is beside them."""
        return self.encoders

    @property
    def all_tokenizers(self) -> tuple[Any, ...]:
        """Their tokenizers."""
        return self.tokenizers

    @property
    def parts(self) -> dict[str, Any]:
        """What a diffusers pipeline is given of them, by its names."""
        names = ("", "_2")[: len(self.encoders)]
        return {
            **{f"text_encoder{name}": encoder for name, encoder in zip(names, self.encoders, strict=True)},
            **{f"tokenizer{name}": tokenizer for name, tokenizer in zip(names, self.tokenizers, strict=True)},
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What else the text depends on, as JSON values."""
        return {}

    def with_first(self, encoder: nn.Module) -> "TextEncoders":
        """The same with another first encoder."""
        others = copy(self)
        others.encoders = (encoder, *self.encoders[1:])
        return others

    @property
    def vocabulary(self) -> Tensor:
        """All token embedding tables side by side, float [vocabulary, width]."""
        tables = [table.weight for table in self._tables]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of :attr:`vocabulary` without building it: int64 [...] to float [..., width]."""
        if len(self._tables) == 1:
            return self._tables[0].weight[ids]
        return torch.cat([functional.embedding(ids, table.weight) for table in self._tables], dim=-1)

    @property
    def max_tokens(self) -> int:
        """Positions of the encoders, start and end tokens included."""
        # A tokenizer that was saved without a length takes texts of any.
        positions = (int(encoder.config.max_position_embeddings) for encoder in self.encoders)
        return min(int(self.tokenizer.model_max_length), *positions)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and width of one prompt's text."""

    def ends(self, ids: Tensor) -> Tensor:
        """Where each sequence of ids ends, int64 [n]."""
        return (ids == self.tokenizer.eos_token_id).int().argmax(1)  # type: ignore[no-any-return]

    def spelled(self, ids: Tensor, ends: Tensor) -> list[str]:
        """The text between start and end of each sequence of ids."""
        return [
            self.tokenizer.decode(row[1:end], skip_special_tokens=True).strip()
            for row, end in zip(ids.tolist(), ends.tolist(), strict=True)
        ]

    def read_ids(self, ids: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """Text of ids int64 [n, tokens], float [n, rows, width]; ``texts`` are what they were made of, if known."""
        ends = self.ends(ids)
        return self._join(self._outputs(self._padded(ids, ends)), ends)

    def read_embeddings(self, token_embeddings: Tensor, ends: Tensor, beside: Beside | None = None) -> Tensor:
        """Text of token embeddings float [n, tokens, width], whose padding becomes each encoder's own.

        Args:
            token_embeddings: Rows like those of :attr:`vocabulary`, no positions added.
            ends: int64 [n], where each sequence ends.
            beside: For an encoder that reads text.

        Returns:
            float [n, rows, width].
        """
        return self._join(self._outputs_of_embeddings(token_embeddings, ends), ends)

    def split(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows that are attended to, float [n, rows, width], and the pooled embedding, float [n, width], if any."""
        return text, None

    def spans(self, ids: Tensor, texts: Sequence[str]) -> list[Span]:
        """Where the tokens of prompts are among their rows, by tokenizer.

        Args:
            ids: int64 [n, max_tokens].
            texts: What they were made of.
        """
        return [Span(slice(0, self.max_tokens), self.ends(ids).tolist())]

    def readable(self, text: Tensor) -> Tensor:
        """Of text, the rows that belong to the tokens of the vocabulary, float [n, max_tokens, width]."""
        return text[:, : self.max_tokens]

    @property
    def _tables(self) -> tuple[nn.Embedding, ...]:
        return tuple(encoder.get_input_embeddings() for encoder in self.encoders)

    def _padded(self, ids: Tensor, ends: Tensor) -> list[Tensor]:
        """The ids as each encoder's own tokenizer pads them."""
        behind = torch.arange(ids.shape[1], device=ids.device) > ends[:, None]
        return [ids, *(ids.masked_fill(behind, int(other.pad_token_id)) for other in self.tokenizers[1:])]

    def _outputs(self, ids: Sequence[Tensor]) -> list[Any]:
        return [encoder(own, output_hidden_states=True) for encoder, own in zip(self.encoders, ids, strict=True)]

    def _outputs_of_embeddings(self, token_embeddings: Tensor, ends: Tensor) -> list[Any]:
        # The encoders take ids only; hooks on their tables hand them our rows and leave masks and positions to them.
        ids = torch.zeros(token_embeddings.shape[:2], dtype=torch.int64, device=token_embeddings.device)
        ids.scatter_(1, ends[:, None], self.tokenizer.eos_token_id)
        own = token_embeddings.split([table.weight.shape[1] for table in self._tables], dim=-1)
        behind = torch.arange(ids.shape[1], device=ids.device) > ends[:, None]
        with ExitStack() as standing:
            standing.enter_context(_standing_in(self._tables[0], own[0]))
            for rows, table, tokenizer in zip(own[1:], self._tables[1:], self.tokenizers[1:], strict=True):
                padding = table.weight[tokenizer.pad_token_id].to(rows.dtype)
                standing.enter_context(_standing_in(table, torch.where(behind[..., None], padding, rows)))
            return self._outputs([ids] * len(self.encoders))

    @abstractmethod
    def _join(self, outputs: Sequence[Any], ends: Tensor) -> Tensor:
        """Text of what the encoders gave for sequences with these ends."""


class OneTextEncoder(TextEncoders):
    """The text encoder of Stable Diffusion 1 and 2: its last hidden states are all the denoiser sees."""

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens, and their width."""
        return self.max_tokens, self.vocabulary.shape[1]

    def _outputs(self, ids: Sequence[Tensor]) -> list[Any]:
        return [self.encoders[0](ids[0])]

    def _join(self, outputs: Sequence[Any], ends: Tensor) -> Tensor:
        return outputs[0].last_hidden_state  # type: ignore[no-any-return]


class TextEncoderPair(TextEncoders):
    """The two text encoders of Stable Diffusion XL (Podell et al. 2023, 2307.01952), section 2.1.

    The U-Net attends to the penultimate hidden states of both, side by side, and gets the second encoder's pooled and
    projected embedding besides.

    Args:
        encoders: The first and the second encoder.
        tokenizers: Theirs.
        zeros_for_empty: The empty prompt's text is zeros.

    Attributes:
        pooled_width: Width of the pooled embedding, which the last row starts with.
    """

    def __init__(self, encoders: Sequence[Any], tokenizers: Sequence[Any], *, zeros_for_empty: bool) -> None:
        super().__init__(encoders, tokenizers)
        self.pooled_width = int(encoders[1].config.projection_dim)
        self._zeros_for_empty = zeros_for_empty

    @property
    def parts(self) -> dict[str, Any]:
        """See :attr:`TextEncoders.parts`."""
        return {**super().parts, "force_zeros_for_empty_prompt": self._zeros_for_empty}

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`TextEncoders.settings`."""
        return {"zeros": self._zeros_for_empty}

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and a row, and their width."""
        return self.max_tokens + 1, self.vocabulary.shape[1]

    def split(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`TextEncoders.split`."""
        return text[:, :-1], text[:, -1, : self.pooled_width]

    def _join(self, outputs: Sequence[Any], ends: Tensor) -> Tensor:
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = functional.pad(outputs[1].text_embeds, (0, tokens.shape[-1] - self.pooled_width))
        text = torch.cat([tokens, pooled[:, None]], dim=1)
        # Nothing between start and end token.
        return text.masked_fill((ends == 1)[:, None, None], 0) if self._zeros_for_empty else text


@contextmanager
def _standing_in(table: nn.Embedding, rows: Tensor) -> Iterator[None]:
    """Let ``table`` return ``rows`` whatever ids it is given."""
    hook = table.register_forward_hook(lambda *_: rows)
    try:
        yield
    finally:
        hook.remove()
