"""The attention to text: its probabilities while the network runs, and which of their columns belong to a concept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from diffusion.denoisers.attention import TextAttention
from diffusion.model import TextToImage
from erasure.concept import Concept


@contextmanager
def recorded_attention(model: TextToImage) -> Iterator[TextAttention]:
    """Record the attention to text for the length of the context, differentiably and without changing what is computed.

    Raises:
        ValueError: The network's cannot be recorded.
    """
    record = TextAttention()
    with ExitStack() as hooks:
        model.denoiser.watch_text_attention(record, hooks)
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


def concept_squares(record: TextAttention, columns: Tensor, masks: Tensor | None = None) -> Tensor:
    """The squared Frobenius norm of every layer's attention to the concept's tokens, float [layers, n].

    Args:
        record: Of one evaluation of n samples.
        columns: Which tokens belong to the concept, bool [n, tokens]; rows of text beyond them belong to none.
        masks: If given, the latents' pixels that count, bool [n, height, width]; smaller layers take the nearest ones.
    """
    squares = []
    for A in record.probabilities():
        counted = A[..., : columns.shape[1]].square() * columns[:, None, None, :]
        if masks is not None:
            size = layer_size((masks.shape[1], masks.shape[2]), A.shape[2])
            counted = counted * nearest(masks, size).flatten(1)[:, None, :, None]
        squares.append(counted.sum((1, 2, 3)))
    return torch.stack(squares)


def concept_maps(record: TextAttention, columns: Tensor, size: tuple[int, int]) -> Tensor:
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
        (A[..., : columns.shape[1]] * columns[:, None, None, :]).sum(-1).mean(1) / columns.sum(-1, keepdim=True)
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
