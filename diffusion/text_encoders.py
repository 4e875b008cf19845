"""Stable Diffusion XL's two text encoders, read as one."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional


class TextEncoderPair:
    """Two CLIP text encoders over one vocabulary; SDXL (Podell et al. 2023, 2307.01952), section 2.1.

    The U-Net attends to the penultimate hidden states of both, side by side, and gets the second encoder's pooled and
    projected embedding besides. Here that is one more row below the tokens' rows, padded with zeros to their width, so
    that text stays one tensor. Both encoders read the first tokenizer's ids; a "!" in a prompt, which the second
    tokenizer of the published model takes for its padding, stays a "!" here.

    Args:
        pipeline: Whose encoders and tokenizers; they are used, not copied.

    Attributes:
        encoders: The first and the second encoder.
        parts: What a pipeline of the second encoder is given besides that of one encoder.
        pooled_width: Width of the pooled embedding, which the last row starts with.

    Raises:
        ValueError: The tokenizers have different vocabularies or lengths, so one sequence of ids cannot serve both.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        first, second = pipeline.tokenizer, pipeline.tokenizer_2
        if first.get_vocab() != second.get_vocab() or first.model_max_length != second.model_max_length:
            raise ValueError(
                f"The model's tokenizers differ: {len(first)} and {len(second)} tokens, {first.model_max_length} and "
                f"{second.model_max_length} positions; both text encoders must read the same vocabulary."
            )
        self.encoders: tuple[Any, Any] = (pipeline.text_encoder, pipeline.text_encoder_2)
        self.parts = {
            "text_encoder_2": pipeline.text_encoder_2,
            "tokenizer_2": second,
            "force_zeros_for_empty_prompt": bool(pipeline.config.force_zeros_for_empty_prompt),
        }
        self.pooled_width = int(pipeline.text_encoder_2.config.projection_dim)
        self._second_padding = int(second.pad_token_id)
        self._zeros_for_empty = self.parts["force_zeros_for_empty_prompt"]

    def with_first(self, encoder: nn.Module) -> "TextEncoderPair":
        """The same pair with another first encoder."""
        pair = copy(self)
        pair.encoders = (encoder, self.encoders[1])
        return pair

    @property
    def vocabulary(self) -> Tensor:
        """Both token embedding tables side by side, float [vocabulary, width]."""
        return torch.cat([table.weight for table in self._tables], dim=1)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of :attr:`vocabulary` without building it: int64 [...] to float [..., width]."""
        return torch.cat([functional.embedding(ids, table.weight) for table in self._tables], dim=-1)

    def read_ids(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Text embeddings of ids int64 [n, tokens] whose end tokens are at ``ends`` int64 [n].

        Returns:
            float [n, tokens + 1, width].
        """
        behind = torch.arange(ids.shape[1], device=ids.device) > ends[:, None]
        return self._join((ids, ids.masked_fill(behind, self._second_padding)), ends)

    def read_embeddings(self, token_embeddings: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        """Text embeddings of token embeddings float [n, tokens, width], whose padding becomes each encoder's own.

        Args:
            token_embeddings: Rows like those of :attr:`vocabulary`.
            ids: int64 [n, tokens], the end token at ``ends`` and anything smaller elsewhere.
            ends: int64 [n].

        Returns:
            float [n, tokens + 1, width].
        """
        first, second = token_embeddings.split([table.weight.shape[1] for table in self._tables], dim=-1)
        behind = torch.arange(ids.shape[1], device=ids.device) > ends[:, None]
        second = torch.where(behind[..., None], self._tables[1].weight[self._second_padding].to(second.dtype), second)
        with _standing_in(self._tables[0], first), _standing_in(self._tables[1], second):
            return self._join((ids, ids), ends)

    def split(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens' rows float [n, tokens, width] and pooled embeddings float [n, pooled_width] of text."""
        return text[:, :-1], text[:, -1, : self.pooled_width]

    @property
    def _tables(self) -> tuple[nn.Embedding, nn.Embedding]:
        first, second = (encoder.get_input_embeddings() for encoder in self.encoders)
        return first, second

    def _join(self, ids: tuple[Tensor, Tensor], ends: Tensor) -> Tensor:
        outputs = [encoder(own, output_hidden_states=True) for encoder, own in zip(self.encoders, ids, strict=True)]
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
