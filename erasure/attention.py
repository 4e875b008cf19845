"""Cross-attention: its probabilities while the U-Net runs, and which of their columns belong to a concept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.model import TextToImage
from diffusion.noise_schedule import at_least_float32
from erasure.concept import Concept


class AttentionRecord:
    """What the cross-attention layers computed, layer by layer in the order of the U-Net's evaluations."""

    def __init__(self) -> None:
        self._heads: list[tuple[int, float]] = []
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []

    def probabilities(self, pixels: int | None = None) -> Iterator[Tensor]:
        """softmax(scale q k^T) of every layer, float [n, heads, pixels, tokens]; rows sum to 1.

        Args:
            pixels: If given, only of the layers that look with so many.
        """
        for (heads, scale), query, key in zip(self._heads, self._queries, self._keys, strict=True):
            if pixels is not None and query.shape[1] != pixels:
                continue
            # Under autocast queries and keys are in half precision, which is too coarse for products and their softmax.
            q, k = (
                rows.to(at_least_float32(rows.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)
                for rows in (query, key)
            )
            yield (scale * (q @ k.transpose(-1, -2))).softmax(-1)

    @property
    def layer_pixels(self) -> list[int]:
        """With how many pixels layers look, every number once, the largest first."""
        return sorted({query.shape[1] for query in self._queries}, reverse=True)

    def watch(self, layer: nn.Module, hooks: ExitStack) -> None:
        """Keep what ``layer`` computes until ``hooks`` closes."""

        def keep_query(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._heads.append((layer.heads, layer.scale))  # type: ignore[arg-type]
            self._queries.append(output)

        def keep_key(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._keys.append(output)

        hooks.callback(layer.to_q.register_forward_hook(keep_query).remove)  # type: ignore[union-attr, operator]
        hooks.callback(layer.to_k.register_forward_hook(keep_key).remove)  # type: ignore[union-attr, operator]


@contextmanager
def recorded_attention(model: TextToImage) -> Iterator[AttentionRecord]:
    """Record cross-attention for the length of the context, differentiably and without changing what is computed."""
    record = AttentionRecord()
    with ExitStack() as hooks:
        for name, layer in model.unet.named_modules():
            if name.endswith(".attn2"):
                record.watch(layer, hooks)
        yield record


def concept_columns(model: TextToImage, concept: Concept, *, end_tokens: bool = False) -> Tensor:
    """Which tokens of every target prompt belong to the target, bool [prompts, tokens].

    Args:
        model: Whose tokenizer.
        concept: Whose targets and templates, in the order of ``target_prompts``.
        end_tokens: Count the end token and the padding after it as well.

    Raises:
        ValueError: A target lies beyond the last token that the text encoder reads; an empty one lies nowhere.
    """
    columns = torch.zeros((len(concept.target_prompts), model.max_tokens), dtype=torch.bool)
    prompts = ((target, template) for part in concept.parts for target in part.targets for template in part.templates)
    for row, (target, template) in zip(columns, prompts, strict=True):
        text, *rest = template.split("{}")
        for context in rest:
            start, end = _ends(model, [text, text + target])
            row[start:end] = True
            text += target + context
        if target and not row.any():
            raise ValueError(
                f"{target!r} in the template {template!r} lies beyond the {model.max_tokens} tokens that "
                f"{model.name!r} reads; shorten the template."
            )
        if end_tokens:
            row[_ends(model, [text])[0] :] = True
    return columns


def concept_squares(record: AttentionRecord, columns: Tensor, masks: Tensor | None = None) -> Tensor:
    """The squared Frobenius norm of every layer's attention to the concept's tokens, float [layers, n].

    Args:
        record: Of one evaluation of n samples.
        columns: Which tokens belong to the concept, bool [n, tokens].
        masks: If given, the latents' pixels that count, bool [n, height, width]; smaller layers take the nearest ones.
    """
    squares = []
    for A in record.probabilities():
        counted = A.square() * columns[:, None, None, :]
        if masks is not None:
            size = layer_size((masks.shape[1], masks.shape[2]), A.shape[2])
            counted = counted * nearest(masks, size).flatten(1)[:, None, :, None]
        squares.append(counted.sum((1, 2, 3)))
    return torch.stack(squares)


def concept_maps(record: AttentionRecord, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Where in the picture the U-Net looks at the concept: the mean attention over layers, heads and its tokens.

    Args:
        record: Of one evaluation of n samples, or of several evaluations of the same n.
        columns: Which tokens belong to the concept, bool [n, tokens], some in every row.
        size: Height and width of the layers that count; 16x16 is the field's habit with Stable Diffusion.

    Returns:
        float [n, height, width], stretched to 0 .. 1 for every sample; all 0 if the attention is the same everywhere.

    Raises:
        ValueError: No layer has this size.
    """
    maps = [
        (A * columns[:, None, None, :]).sum(-1).mean(1) / columns.sum(-1, keepdim=True)
        for A in record.probabilities(size[0] * size[1])
    ]
    if not maps:
        raise ValueError(
            f"No cross-attention layer looks with {size[0]}x{size[1]} pixels; their numbers of pixels are "
            f"{', '.join(map(str, record.layer_pixels))}."
        )
    mean = torch.stack(maps).mean(0)
    raised = mean - mean.amin(1, keepdim=True)
    largest = raised.amax(1, keepdim=True)
    return (raised / torch.where(largest > 0, largest, 1)).unflatten(1, size)  # type: ignore[no-any-return]


def layer_size(latents: tuple[int, int], pixels: int) -> tuple[int, int]:
    """Height and width that a layer with so many pixels sees latents of this height and width in."""
    height, width = latents
    while height * width > pixels:
        # Convolutions of stride 2 halve the latents and round up.
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def reduced_size(model: TextToImage, reduction: int) -> tuple[int, int]:
    """Height and width of the model's latents, ``reduction`` times smaller and rounded up."""
    height, width = (-(-edge // reduction) for edge in model.latent_shape[1:])
    return height, width


def nearest(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks bool [n, height, width] in another size, every pixel that of the nearest one above and to the left."""
    resized: Tensor = functional.interpolate(masks[:, None].float(), size=size, mode="nearest")
    return resized[:, 0] > 0.5


def _ends(model: TextToImage, texts: list[str]) -> list[int]:
    """Where the end token of each text is."""
    return [ids.index(model.tokenizer.eos_token_id) for ids in model.tokenize(texts).tolist()]
