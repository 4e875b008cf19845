"""Which neurons of a model go with a concept, and what erasing and adversarial prompts do to them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffusion.model import TextToImage
from diffusion.progress import track
from diffusion.streams import stream

Units = Literal["feed_forward", "cross_attention"]
"""What counts as a neuron: a hidden unit of a feed-forward (what enters ``ff.net.2``), or a channel that a
cross-attention's output projection (``attn2.to_out.0``) gives."""

Spread = Literal["paired", "pooled"]
"""What a difference is standardised by: the standard deviation of the differences (matched samples), or the root mean
square of the standard deviations with the concept and without it; both with n - 1."""

_FEED_FORWARD = ".ff.net.2"


def neuron_layers(model: TextToImage, units: Units) -> dict[str, int]:
    """The layers that have neurons of a kind and how many, in module order.

    Raises:
        ValueError: The model has none.
    """
    modules = dict(model.network.named_modules())
    if units == "feed_forward":
        names = [name for name in modules if name.endswith(_FEED_FORWARD)]
    else:
        names = [f"{name}.to_out.0" for name in model.denoiser.text_attention()]
    if not names:
        raise ValueError(f"{model.name!r} has no {units} units; choose another of {', '.join(get_args(Units))}.")
    side = "in_features" if units == "feed_forward" else "out_features"
    return {name: int(getattr(modules[name], side)) for name in names}


@torch.no_grad()
def activations(
    model: TextToImage,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    guidance: Sequence[float],
    steps: int,
    batch_size: int,
    units: Units,
) -> Tensor:
    """How active every neuron is at each step of the sampling of each prompt's picture.

    An activation is the mean of a neuron's absolute value over the positions of one U-Net evaluation, of the half of
    guidance that is given the prompt: GEGLU's values have either sign, and their mean over positions would cancel.

    Args:
        model: The model as it is now, edited or not; it encodes the prompts too.
        prompts: What the pictures are of.
        seeds: One per picture.
        guidance: Guidance scale, one per picture.
        steps: Sampler steps from noise to picture.
        batch_size: Pictures at a time; it changes speed and memory only.
        units: What counts as a neuron.

    Returns:
        float [n, steps, neurons] on the CPU, float32 or wider; layer by layer as :func:`neuron_layers` has them.
    """
    text = model.encode_prompts(prompts)
    chunks = torch.arange(len(prompts)).split(batch_size)
    parts = []
    for chunk in track(chunks, "neurons", len(chunks)):
        places = chunk.tolist()
        with _watched(model, units, len(places)) as seen:
            model.sample(
                text[chunk],
                seeds=[seeds[place] for place in places],
                steps=steps,
                guidance=[guidance[place] for place in places],
                batch_size=batch_size,
            )
        parts.append(torch.cat([torch.stack(calls, dim=1) for calls in seen.values()], dim=-1))
    return torch.cat(parts)


def standardised_differences(present: Tensor, absent: Tensor, *, spread: Spread = "paired") -> Tensor:
    """How a neuron's activation goes with a concept, float64 [neurons]; above 0 where the concept makes it more active.

    At each timestep the mean of a_i(with) - a_i(without) over matched prompts i, divided by a spread (0 if both are
    0); then the mean over timesteps.

    Args:
        present: float [n, steps, neurons], on prompts with the concept.
        absent: The same, on the same prompts without it, sampled from the same seeds.
        spread: What the difference is divided by; see :data:`Spread`.

    Raises:
        ValueError: There are fewer than two pairs.
    """
    if len(present) < 2:
        raise ValueError(f"{len(present)} pairs of prompts have no spread; give at least 2.")
    present, absent = present.double(), absent.double()
    differences = present - absent
    deviations = differences.std(0) if spread == "paired" else ((present.var(0) + absent.var(0)) / 2).sqrt()
    means = differences.mean(0)
    return torch.where(means == 0, 0, means / deviations).mean(0)


def choose(correlation: Tensor, candidates: Tensor, *, percent: float, seed: int) -> tuple[Tensor, Tensor]:
    """The neurons that go with a concept most, and as many others at random.

    Args:
        correlation: float [neurons].
        candidates: bool [neurons], which may be chosen.
        percent: How many of 100 candidates go with the concept; one neuron at least.
        seed: Of the random ones.

    Returns:
        Two int64 [chosen], without a neuron in common.

    Raises:
        ValueError: So many are asked for that no others are left.
    """
    allowed = candidates.nonzero().flatten()
    count = max(1, round(len(allowed) * percent / 100))
    if not 0 < percent <= 50 or 2 * count > len(allowed):
        raise ValueError(
            f"percent is {percent:g} of {len(allowed)} neurons; it must be above 0 and at most 50, so that as many "
            "others are left."
        )
    ranked = allowed[correlation[allowed].argsort(descending=True, stable=True)]
    others = ranked[count:]
    picks = torch.randperm(len(others), generator=stream(seed, "neurons/others"))[:count]
    return ranked[:count], others[picks]


@dataclass(frozen=True)
class Sensitivity:
    """Activations of neurons in three situations, each neuron's as a multiple of its own in the original model.

    All are float64 [n, neurons], a row per prompt; their unit is the neuron's mean over the plain prompts in the
    original model, so the columns of ``original`` have the mean 1.

    Attributes:
        original: Plain prompts, original model.
        erased: Plain prompts, erased model; below 1 where erasing deactivates.
        attacked: Adversarial prompts, erased model.
    """

    original: Tensor
    erased: Tensor
    attacked: Tensor

    @classmethod
    def of(cls, original: Tensor, erased: Tensor, attacked: Tensor) -> "Sensitivity":
        """From activations float [n, neurons], which are means over timesteps.

        Raises:
            ValueError: A neuron is silent in the original model, so nothing is relative to it.
        """
        unit = original.double().mean(0)
        if not bool((unit > 0).all()):
            raise ValueError(
                f"{int((unit <= 0).sum())} of {len(unit)} neurons are silent in the original model; leave them out."
            )
        return cls(*(values.double() / unit for values in (original, erased, attacked)))

    @property
    def reactivation(self) -> Tensor:
        """What the attack adds to each prompt, mean over the neurons, in units of the original activation; float64 [n].

        Above 0 where the adversarial prompt makes the neurons of the erased model more active than the plain one does.
        """
        return (self.attacked - self.erased).mean(1)

    def on(self, rows: Tensor) -> "Sensitivity":
        """On some prompts alone, bool or int64 [any]; the unit stays."""
        return Sensitivity(*(values[rows] for values in (self.original, self.erased, self.attacked)))


@contextmanager
def _watched(model: TextToImage, units: Units, count: int) -> Iterator[dict[str, list[Tensor]]]:
    """By layer, for every call of the U-Net, activations of its last ``count`` samples, float [count, neurons]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in neuron_layers(model, units)}

    def keep(name: str, values: Tensor) -> None:
        values = values[-count:].to(torch.promote_types(values.dtype, torch.float32))
        seen[name].append(values.abs().reshape(count, -1, values.shape[-1]).mean(1).cpu())

    def keep_input(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(name, inputs[0])

    def keep_output(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        keep(name, output)

    with ExitStack() as hooks:
        for name in seen:
            layer = model.network.get_submodule(name)
            handle = (
                layer.register_forward_pre_hook(partial(keep_input, name))
                if units == "feed_forward"
                else layer.register_forward_hook(partial(keep_output, name))
            )
            hooks.callback(handle.remove)
        yield seen
