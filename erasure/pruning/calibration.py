"""What pruning strategies score weights on: pictures of prompts while they are sampled, or noised afterwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.model import TextToImage
from diffusion.progress import track
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.finetuning import noise_error
from erasure.pictures import PICTURES_PER_FILE, Painting, paint
from erasure.trajectories import remembered

Prompts = Literal["preserved", "targets", "anchors"]
"""Which of a concept's prompts pictures are made of; ``anchors`` are the targets' templates with the anchor in them."""


def prompts_of(concept: Concept, which: Prompts) -> list[str]:
    """The concept's prompts of a kind.

    Raises:
        ValueError: It has none.
    """
    if which == "preserved" and not concept.preserved_prompts:
        raise ValueError(
            f"Concept {concept.name!r} names no preserved phrases; add some to concept.preserved or set "
            "prompts=anchors."
        )
    by_kind = {
        "preserved": concept.preserved_prompts,
        "targets": concept.target_prompts,
        "anchors": concept.target_anchors,
    }
    return by_kind[which]


def spread(prompts: Sequence[str], count: int) -> Tensor:
    """Which of the prompts each of ``count`` pictures is made of, evenly spread; int64 [count]."""
    return torch.arange(count) * len(prompts) // count


def input_squares(
    model: TextToImage,
    weights: Mapping[str, Tensor],
    text: Tensor,
    painting: Painting,
    *,
    seed: int,
    checkpoint: Path | None,
    until: int | None = None,
    unit_tokens: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """How strongly each input of linear layers and convolutions is used at every sampler step.

    Args:
        model: Whose U-Net.
        weights: The layers' weights by parameter name.
        text: The pictures' text, float [n, tokens, width].
        painting: How they are sampled.
        seed: Of their noise.
        checkpoint: Finished parts are kept in files whose names start with this one, and found again.
        until: Sampler steps that are looked at; all by default.
        unit_tokens: Divide the inputs of each position by their norm first.

    Returns:
        Sums of squares over pictures, positions and both halves of guidance by parameter name, float64
        [steps, *weight.shape[1:]] on the CPU, and the U-Net evaluations that they cost.
    """
    totals: dict[str, Tensor] = {}
    spent = 0
    seeds = painting.seeds(seed)

    def measure(chunk: Tensor) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {name: [] for name in weights}

        def watch(name: str, module: nn.Module, inputs: Tensor) -> None:
            seen[name].append(_sum_of_squares(module, inputs, unit_tokens))

        with _watched(model, weights, watch):
            painting.sample(model, text[chunk], [seeds[place] for place in chunk], until)
        return {name: torch.stack(steps) for name, steps in seen.items()}

    chunks = torch.arange(painting.images).split(painting.batch_size)
    for chunk in track(chunks, "pictures", len(chunks)):
        part = f"squares-{int(chunk[0])}-{int(chunk[-1])}"
        squares, evaluations = remembered(checkpoint, part, partial(measure, chunk), model)
        spent += evaluations
        totals = {name: totals.get(name, 0) + value.cpu() for name, value in squares.items()}
    return totals, spent


def input_products(
    model: TextToImage,
    weights: Mapping[str, Tensor],
    text: Tensor,
    painting: Painting,
    *,
    seed: int,
    checkpoint: Path | None,
) -> tuple[dict[str, Tensor], int]:
    """How the inputs of linear layers and convolutions go together: X X^T over all sampler steps.

    Args:
        model: See :func:`input_squares`.
        weights: See there.
        text: See there.
        painting: See there.
        seed: See there.
        checkpoint: See there.

    Returns:
        Sums over steps, pictures, positions and both halves of guidance by parameter name, float64 [inputs, inputs] on
        the CPU, a kernel's inputs with its input channels last; and the U-Net evaluations that they cost.
    """
    totals: dict[str, Tensor] = {}
    spent = 0
    seeds = painting.seeds(seed)

    def measure(chunk: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Module, inputs: Tensor) -> None:
            # Sample by sample in the model's precision, so that the batch size does not matter.
            for columns in _columns(module, inputs.to(torch.promote_types(inputs.dtype, torch.float32))):
                product = (columns.T @ columns).to("cpu", torch.float64)
                seen[name] = seen[name].add_(product) if name in seen else product

        with _watched(model, weights, watch):
            painting.sample(model, text[chunk], [seeds[place] for place in chunk])
        return seen

    chunks = torch.arange(painting.images).split(PICTURES_PER_FILE)
    for chunk in track(chunks, "pictures", len(chunks)):
        products, evaluations = remembered(
            checkpoint, f"products-{int(chunk[0])}-{int(chunk[-1])}", partial(measure, chunk), model
        )
        spent += evaluations
        totals = {name: totals.get(name, 0) + value.cpu() for name, value in products.items()}
    return totals, spent


def sizes_times_use(weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S_ij = |W_ij| ||X_j||_2 by parameter name, from the sums of squares of the inputs, float of weight.shape[1:]."""
    return {
        name: weight.detach().abs()
        * squares[name].sqrt().to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }


@contextmanager
def _watched(
    model: TextToImage, weights: Mapping[str, Tensor], watch: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Show every layer's inputs to ``watch(name of the weight, layer, inputs)``, at each call of the U-Net."""

    def show(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Under autocast products of float32 would be in half precision.
        with torch.autocast(model.device.type, enabled=False):
            watch(name, module, inputs[0].detach())

    with ExitStack() as hooks:
        for name in weights:
            module = model.unet.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(partial(show, name)).remove)
        yield


def _sum_of_squares(module: nn.Module, inputs: Tensor, unit_tokens: bool) -> Tensor:
    """Over samples and positions, of what every weight of an output is multiplied with; float64 on the CPU."""
    features = 1 if isinstance(module, nn.Conv2d) else -1
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    squares = (functional.normalize(inputs, dim=features) if unit_tokens else inputs).square()
    if isinstance(module, nn.Conv2d):
        columns = _unfolded(module, squares)
        return columns.sum(-1).cpu().double().sum(0).reshape(module.weight.shape[1:])
    # Sample by sample in the model's precision, so that the batch size does not matter.
    return squares.reshape(len(squares), -1, squares.shape[-1]).sum(1).cpu().double().sum(0)


def _columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """What every weight of an output is multiplied with, float [n, positions, weights], a kernel's channels last."""
    if isinstance(module, nn.Conv2d):
        columns = _unfolded(module, inputs).unflatten(1, (module.weight.shape[1], -1))
        return columns.transpose(1, 2).flatten(1, 2).transpose(1, 2)  # type: ignore[no-any-return]
    return inputs.reshape(len(inputs), -1, inputs.shape[-1])


def _unfolded(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What a kernel meets at every position, float [n, inputs * height * width of the kernel, positions]."""
    return functional.unfold(
        inputs,
        module.kernel_size,
        dilation=module.dilation,
        padding=module.padding,  # type: ignore[arg-type]
        stride=module.stride,
    )


class DenoisingLoss:
    """|| noise - eps_theta(x_t, c, t) ||^2 (mean), with x_t noised pictures that the model made of prompts.

    Args:
        model: The model before it is pruned.
        prompts: What the pictures are of.
        painting: How they are sampled.
        timesteps: Number of t, evenly spread over the noise schedule; every picture has a noise for each.
        batch_size: Pictures at a time when there are gradients; it changes speed and memory only.
        seed: Of pictures and noise.
        checkpoint: Finished parts are kept in files whose names start with this one, and found again.

    Attributes:
        timesteps: int64, ascending.
        unet_evaluations: Spent on the pictures, by an interrupted run as well.
    """

    def __init__(
        self,
        model: TextToImage,
        prompts: Sequence[str],
        painting: Painting,
        *,
        timesteps: int,
        batch_size: int,
        seed: int,
        checkpoint: Path | None,
    ) -> None:
        self.timesteps = ((torch.arange(timesteps) + 0.5) * model.training_timesteps / timesteps).long()
        self._batch_size = batch_size
        self._seed = seed
        places = spread(prompts, painting.images)
        self._text = model.encode_prompts(prompts)[places]
        pictures, self.unet_evaluations = paint(
            model,
            [prompts[place] for place in places],
            self._text,
            painting,
            seed=seed,
            part="pictures",
            checkpoint=checkpoint,
        )
        self._pictures = pictures.latents

    def parts(self, model: TextToImage, place: int) -> Iterator[Tensor]:
        """Scalars that add up to the loss at ``timesteps[place]``, differentiable in the U-Net's weights."""
        count = len(self._pictures)
        noise = torch.randn(self._pictures.shape, generator=stream(self._seed, "calibration/noise", place)).to(
            self._pictures
        )
        for rows in torch.arange(count).split(self._batch_size):
            timesteps = self.timesteps[place].to(model.device).expand(len(rows))
            latents = model.add_noise(self._pictures[rows], noise[rows], timesteps)
            yield noise_error(model, latents, timesteps, self._text[rows], noise[rows]) * len(rows) / count
