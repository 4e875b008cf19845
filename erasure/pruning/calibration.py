"""What pruning strategies score weights on: pictures of prompts while they are sampled, or noised afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.model import TextToImage
from diffusion.progress import track
from diffusion.training import step_generator
from erasure.concept import Concept
from erasure.finetuning import noise_error
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


@dataclass(frozen=True)
class Pictures:
    """Pictures that the model samples.

    Attributes:
        count: How many; prompts are spread evenly over them.
        steps: Sampler steps of a picture.
        guidance: Guidance scale.
        batch_size: Pictures at a time; it changes speed and memory only.
    """

    count: int
    steps: int
    guidance: float
    batch_size: int

    def text(self, model: TextToImage, prompts: Sequence[str]) -> Tensor:
        """The text of every picture, float [count, tokens, width]."""
        return model.encode_prompts(prompts)[torch.arange(self.count) * len(prompts) // self.count]

    def seeds(self, seed: int) -> list[int]:
        """The seed of every picture's noise."""
        return torch.randint(2**31, (self.count,), generator=step_generator(seed, 0)).tolist()  # type: ignore[no-any-return]

    def chunks(self) -> Iterator[slice]:
        """Which pictures are sampled at a time."""
        starts = range(0, self.count, self.batch_size)
        for start in track(starts, "pictures", len(starts)):
            yield slice(start, min(start + self.batch_size, self.count))

    def sample(self, model: TextToImage, text: Tensor, seed: int, chunk: slice, until: int | None = None) -> Tensor:
        """Latents of the pictures ``chunk`` before step ``until``, or finished; float [n, c, h, w]."""
        return model.sample(
            text[chunk],
            seeds=self.seeds(seed)[chunk],
            steps=self.steps,
            guidance=self.guidance,
            until=until,
            batch_size=self.batch_size,
        )


def input_squares(
    model: TextToImage,
    weights: Mapping[str, Tensor],
    text: Tensor,
    pictures: Pictures,
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
        pictures: How they are sampled.
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

    def measure(chunk: slice) -> dict[str, Tensor]:
        with _watched(model, weights, unit_tokens) as seen:
            pictures.sample(model, text, seed, chunk, until)
        return {name: torch.stack(steps) for name, steps in seen.items()}

    for chunk in pictures.chunks():
        part = f"squares-{chunk.start}-{chunk.stop}"
        squares, evaluations = remembered(checkpoint, part, partial(measure, chunk), model)
        spent += evaluations
        totals = {name: totals.get(name, 0) + value.cpu() for name, value in squares.items()}
    return totals, spent


def sizes_times_use(weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S_ij = |W_ij| ||X_j||_2 by parameter name, from the sums of squares of the inputs, float of weight.shape[1:]."""
    return {
        name: weight.detach().abs()
        * squares[name].sqrt().to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }


@contextmanager
def _watched(model: TextToImage, weights: Mapping[str, Tensor], unit_tokens: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Sums of squares of every layer's inputs, one per call of the U-Net."""
    seen: dict[str, list[Tensor]] = {name: [] for name in weights}

    def watch(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[name].append(_sum_of_squares(module, inputs[0].detach(), unit_tokens))

    with ExitStack() as hooks:
        for name in weights:
            module = model.unet.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(partial(watch, name)).remove)
        yield seen


def _sum_of_squares(module: nn.Module, inputs: Tensor, unit_tokens: bool) -> Tensor:
    """Over samples and positions, of what every weight of an output is multiplied with; float64 on the CPU."""
    features = 1 if isinstance(module, nn.Conv2d) else -1
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    squares = (functional.normalize(inputs, dim=features) if unit_tokens else inputs).square()
    if isinstance(module, nn.Conv2d):
        columns = functional.unfold(
            squares,
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,  # type: ignore[arg-type]
            stride=module.stride,
        )
        return columns.sum(-1).cpu().double().sum(0).reshape(module.weight.shape[1:])
    # Sample by sample in the model's precision, so that the batch size does not matter.
    return squares.reshape(len(squares), -1, squares.shape[-1]).sum(1).cpu().double().sum(0)


class DenoisingLoss:
    """|| noise - eps_theta(x_t, c, t) ||^2 (mean), with x_t noised pictures that the model made of prompts.

    Args:
        model: The model before it is pruned.
        prompts: What the pictures are of.
        pictures: How they are sampled.
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
        pictures: Pictures,
        *,
        timesteps: int,
        batch_size: int,
        seed: int,
        checkpoint: Path | None,
    ) -> None:
        self.timesteps = ((torch.arange(timesteps) + 0.5) * model.training_timesteps / timesteps).long()
        self._text = pictures.text(model, prompts)
        self._batch_size = batch_size
        self._seed = seed
        self.unet_evaluations = 0
        made = []
        for chunk in pictures.chunks():
            sample = partial(pictures.sample, model, self._text, seed, chunk)
            part = f"pictures-{chunk.start}-{chunk.stop}"
            kept, spent = remembered(checkpoint, part, lambda sample=sample: {"latents": sample()}, model)  # type: ignore[misc]
            made.append(kept["latents"])
            self.unet_evaluations += spent
        self._pictures = torch.cat(made)

    def parts(self, model: TextToImage, place: int) -> Iterator[Tensor]:
        """Scalars that add up to the loss at ``timesteps[place]``, differentiable in the U-Net's weights."""
        count = len(self._pictures)
        noise = torch.randn(self._pictures.shape, generator=step_generator(self._seed, 1 + place)).to(self._pictures)
        for rows in torch.arange(count).split(self._batch_size):
            timesteps = self.timesteps[place].to(model.device).expand(len(rows))
            latents = model.add_noise(self._pictures[rows], noise[rows], timesteps)
            yield noise_error(model, latents, timesteps, self._text[rows], noise[rows]) * len(rows) / count


def gradient(losses: Iterator[Tensor], weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of the sum of ``losses`` by parameter name, summed in float32 at least.

    Args:
        losses: Scalars, each computed when its turn comes.
        weights: Trainable parameters of the model.
    """
    total = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }
    for loss in losses:
        for name, part in zip(total, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += part
    return total
