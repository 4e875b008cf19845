"""Text encoders with a T5 beside CLIP's: those of Stable Diffusion 3, where it may be absent, and of FLUX."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.memory import visiting
from diffusion.text.encoders import Beside, Span, TextEncoders


@dataclass(frozen=True)
class T5:
    """A T5 encoder, which reads texts in tokens of its own.

    Attributes:
        encoder: The encoder.
        tokenizer: Its tokenizer.
        visits: Where it is taken while it reads, if it waits elsewhere.
    """

    encoder: Any
    tokenizer: Any
    visits: torch.device | None = None

    def ids(self, texts: Sequence[str], count: int) -> Tensor:
        """Its tokens of ``texts``, cut and padded, int64 [n, count]."""
        padded = self.tokenizer(
            list(texts), padding="max_length", max_length=count, truncation=True, return_tensors="pt"
        )
        return padded.input_ids  # type: ignore[no-any-return]

    def read(self, texts: Sequence[str], count: int) -> Tensor:
        """The last hidden states of ``texts``, cut and padded to ``count`` tokens, float [n, count, width]."""
        ids = self.ids(texts, count)
        with nullcontext() if self.visits is None else visiting(self.encoder, self.visits):
            return self.encoder(ids.to(self.encoder.device)).last_hidden_state  # type: ignore[no-any-return]

    @property
    def table(self) -> Tensor:
        """Its token embeddings, float [vocabulary, width]."""
        return self.encoder.get_input_embeddings().weight  # type: ignore[no-any-return]

    def read_embeddings(self, token_embeddings: Tensor) -> Tensor:
        """The last hidden states of rows of :attr:`table`, float [n, count, width], differentiable in them.

        One that only visits stays there from then on, as gradients must come back through it.
        """
        stays = self.visits is not None and torch.is_grad_enabled()
        if stays:
            self.encoder.to(self.visits)
        with nullcontext() if stays or self.visits is None else visiting(self.encoder, self.visits):
            return self.encoder(inputs_embeds=token_embeddings.to(self.table)).last_hidden_state  # type: ignore[no-any-return]

    def read_either(self, beside: Beside | None, count: int) -> Tensor:
        """The last hidden states of texts, or of token embeddings.

        Raises:
            ValueError: There are neither.
        """
        if beside is None:
            raise ValueError(
                "Embeddings of CLIP's tokens are no text for the model's T5; load the model with model.t5=false if it "
                "can be without, or choose a method that says what T5 reads (attack=unlearndiff, p4d, pez, gcg or "
                "embedding)."
            )
        return self.read_embeddings(beside) if isinstance(beside, Tensor) else self.read(beside, count)

    def span(self, first: int, texts: Sequence[str], count: int) -> Span:
        """Where the ``count`` rows of :meth:`read` are that start at row ``first``."""
        ids = self.tokenizer(list(texts), max_length=count, truncation=True).input_ids
        return Span(slice(first, first + count), [len(row) - 1 for row in ids])


class TextEncodersWithT5(TextEncoders):
    """CLIP encoders beside which there may be a T5.

    Attributes:
        t5: The T5, or None.
        t5_tokens: Rows of T5.
    """

    t5: T5 | None
    t5_tokens: int

    @cached_property
    def shared_words(self) -> Tensor:
        """For every token of CLIP the token of T5 with the same text, int64 [vocabulary]; -1 where there is none.

        Only a text that either tokenizer reads as one token, and that a space goes before, has both.
        """
        size = len(self.tokenizer)
        found = torch.full((size,), -1)
        if self.t5 is None:
            return found
        texts = self.tokenizer.batch_decode([[token] for token in range(size)], clean_up_tokenization_spaces=False)
        words = [text.strip() for text in texts]
        clip = self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        other = self.t5.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        special = {*self.tokenizer.all_special_ids}
        unknown = {*self.t5.tokenizer.all_special_ids}
        for token, (word, own, theirs) in enumerate(zip(words, clip, other, strict=True)):
            if word and own == [token] and token not in special and len(theirs) == 1 and theirs[0] not in unknown:
                found[token] = theirs[0]
        return found


class TripleTextEncoder(TextEncodersWithT5):
    """The text encoders of Stable Diffusion 3 (Esser et al., ICML 2024), section 5.2.

    The rows are the penultimate hidden states of both CLIP encoders side by side, padded with zeros to the width of
    T5, and below them T5's last hidden states; the pooled embedding is both encoders' projected one, side by side.
    Where there is no T5, its rows are zeros, as many as in diffusers, for the network attends to them all the same:
    pictures depend on their number.

    Args:
        encoders: The two CLIP encoders, with projection.
        tokenizers: Theirs.
        t5: The T5, or None.
        t5_tokens: Rows of T5.
        width: Of a row.
    """

    def __init__(
        self,
        encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        *,
        t5: T5 | None,
        t5_tokens: int,
        width: int,
    ) -> None:
        super().__init__(encoders, tokenizers)
        self.t5 = t5
        self.t5_tokens = t5_tokens
        self.reads_text = t5 is not None
        self._width = width
        self.pooled_width = sum(int(encoder.config.projection_dim) for encoder in encoders)

    @property
    def all_encoders(self) -> tuple[Any, ...]:
        """See :attr:`TextEncoders.all_encoders`."""
        return self.encoders if self.t5 is None else (*self.encoders, self.t5.encoder)

    @property
    def all_tokenizers(self) -> tuple[Any, ...]:
        """See :attr:`TextEncoders.all_tokenizers`."""
        return self.tokenizers if self.t5 is None else (*self.tokenizers, self.t5.tokenizer)

    @property
    def parts(self) -> dict[str, Any]:
        """See :attr:`TextEncoders.parts`."""
        third = (None, None) if self.t5 is None else (self.t5.encoder, self.t5.tokenizer)
        return {**super().parts, "text_encoder_3": third[0], "tokenizer_3": third[1]}

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`TextEncoders.settings`."""
        return {"t5": self.t5 is not None, "t5_tokens": self.t5_tokens}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of CLIP, of T5, and a row; and their width."""
        return self.max_tokens + self.t5_tokens + 1, self._width

    def read_ids(self, ids: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """See :meth:`TextEncoders.read_ids`; T5 reads ``texts``, or else what the ids spell."""
        ends = self.ends(ids)
        outputs = self._outputs(self._padded(ids, ends))
        if self.t5 is None:
            return self._join(outputs, ends)
        texts = self.spelled(ids, ends) if texts is None else texts
        return self._stack(outputs, self.t5.read(texts, self.t5_tokens))

    def read_embeddings(self, token_embeddings: Tensor, ends: Tensor, beside: Beside | None = None) -> Tensor:
        """See :meth:`TextEncoders.read_embeddings`.

        Raises:
            ValueError: There is a T5 and nothing for it to read.
        """
        if self.t5 is None:
            return super().read_embeddings(token_embeddings, ends)
        below = self.t5.read_either(beside, self.t5_tokens)
        return self._stack(self._outputs_of_embeddings(token_embeddings, ends), below)

    def split(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`TextEncoders.split`."""
        return text[:, :-1], text[:, -1, : self.pooled_width]

    def spans(self, ids: Tensor, texts: Sequence[str]) -> list[Span]:
        """See :meth:`TextEncoders.spans`; rows of a T5 that is not there are nobody's."""
        clip = super().spans(ids, texts)
        if self.t5 is None or not self.t5_tokens:
            return clip
        return [*clip, self.t5.span(self.max_tokens, texts, self.t5_tokens)]

    def _join(self, outputs: Sequence[Any], ends: Tensor) -> Tensor:
        first = outputs[0].hidden_states[-2]
        return self._stack(outputs, first.new_zeros((len(first), self.t5_tokens, self._width)))

    def _stack(self, outputs: Sequence[Any], below: Tensor) -> Tensor:
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        clip = torch.cat([self._widened(tokens), below.to(tokens)], dim=1)
        return torch.cat([clip, self._widened(pooled)[:, None]], dim=1)

    def _widened(self, rows: Tensor) -> Tensor:
        return functional.pad(rows, (0, self._width - rows.shape[-1]))


class FluxTextEncoder(TextEncodersWithT5):
    """The text encoders of FLUX.1: the rows are T5's alone, and CLIP's gives the pooled embedding.

    Args:
        encoder: CLIP's.
        tokenizer: Its tokenizer.
        t5: The T5.
        t5_tokens: Rows of T5.
        width: Of a row.
    """

    reads_text = True
    t5: T5

    def __init__(self, encoder: Any, tokenizer: Any, *, t5: T5, t5_tokens: int, width: int) -> None:
        super().__init__((encoder,), (tokenizer,))
        self.t5 = t5
        self.t5_tokens = t5_tokens
        self._width = width
        self.pooled_width = int(encoder.config.hidden_size)

    @property
    def all_encoders(self) -> tuple[Any, ...]:
        """See :attr:`TextEncoders.all_encoders`."""
        return (*self.encoders, self.t5.encoder)

    @property
    def all_tokenizers(self) -> tuple[Any, ...]:
        """See :attr:`TextEncoders.all_tokenizers`."""
        return (*self.tokenizers, self.t5.tokenizer)

    @property
    def parts(self) -> dict[str, Any]:
        """See :attr:`TextEncoders.parts`."""
        return {**super().parts, "text_encoder_2": self.t5.encoder, "tokenizer_2": self.t5.tokenizer}

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`TextEncoders.settings`."""
        return {"t5_tokens": self.t5_tokens}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of T5 and a row, and their width."""
        return self.t5_tokens + 1, self._width

    def read_ids(self, ids: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """See :meth:`TextEncoders.read_ids`; T5 reads ``texts``, or else what the ids spell."""
        ends = self.ends(ids)
        texts = self.spelled(ids, ends) if texts is None else texts
        return self._stack(self._outputs(self._padded(ids, ends)), self.t5.read(texts, self.t5_tokens))

    def read_embeddings(self, token_embeddings: Tensor, ends: Tensor, beside: Beside | None = None) -> Tensor:
        """See :meth:`TextEncoders.read_embeddings`.

        Raises:
            ValueError: There is nothing for T5 to read.
        """
        rows = self.t5.read_either(beside, self.t5_tokens)
        return self._stack(self._outputs_of_embeddings(token_embeddings, ends), rows)

    def split(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`TextEncoders.split`."""
        return text[:, :-1], text[:, -1, : self.pooled_width]

    def spans(self, ids: Tensor, texts: Sequence[str]) -> list[Span]:
        """See :meth:`TextEncoders.spans`: T5's alone."""
        return [self.t5.span(0, texts, self.t5_tokens)]

    def _join(self, outputs: Sequence[Any], ends: Tensor) -> Tensor:
        pooled = outputs[0].pooler_output
        return self._stack(outputs, pooled.new_zeros((len(pooled), self.t5_tokens, self._width)))

    def _stack(self, outputs: Sequence[Any], rows: Tensor) -> Tensor:
        pooled = outputs[0].pooler_output
        widened = functional.pad(pooled, (0, self._width - pooled.shape[-1]))
        return torch.cat([rows.to(pooled), widened[:, None]], dim=1)
