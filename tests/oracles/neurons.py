"""Neurons of a concept from their definitions: one picture at a time, one value at a time, DDIM written out."""

from statistics import fmean, stdev, variance

import torch
from torch import Tensor, nn


def hidden_units(unet: nn.Module, x: Tensor, t: int, text: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The U-Net's output, and what every GEGLU gives, computed anew from what it is given: [positions, units] each."""
    output, given = watched(unet, ".ff.net.0", x, t, text)
    values = []
    for geglu, inputs in given:
        both = inputs @ geglu.proj.weight.T + geglu.proj.bias
        half = both.shape[1] // 2
        gate = both[:, half:]
        values.append(both[:, :half] * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)))
    return output, values


def output_channels(unet: nn.Module, x: Tensor, t: int, text: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The U-Net's output, and what every cross-attention's output projection gives, from what it is given."""
    output, given = watched(unet, ".attn2.to_out.0", x, t, text)
    return output, [inputs @ linear.weight.T + linear.bias for linear, inputs in given]


def watched(unet: nn.Module, ending: str, x: Tensor, t: int, text: Tensor) -> tuple[Tensor, list]:
    """The U-Net's output for one sample, and the modules of such a name with what they were given, in their order."""
    modules = [module for name, module in unet.named_modules() if name.endswith(ending)]
    given = {}
    hooks = [module.register_forward_pre_hook(lambda m, inputs: given.update({m: inputs[0][0]})) for module in modules]
    output = unet(x, torch.tensor([t]), text[None]).sample
    for hook in hooks:
        hook.remove()
    return output, [(module, given[module]) for module in modules]


def activations(values: Tensor) -> list[float]:
    """By unit, the mean of the absolute value over positions."""
    positions = values.tolist()
    return [fmean(abs(position[unit]) for position in positions) for unit in range(values.shape[1])]


def sampled(
    unet: nn.Module,
    record,
    alphas: list[float],
    timesteps: list[int],
    seed: int,
    shape: tuple[int, int, int],
    text: Tensor,
    empty: Tensor,
    guidance: float,
) -> list[list[float]]:
    """Activations of all neurons at every step of a guided DDIM trajectory: a list per step."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.float64)[None]
    steps = []
    for step, t in enumerate(timesteps):
        e_c, layers = record(unet, x, t, text)
        steps.append([value for values in layers for value in activations(values)])
        if step + 1 < len(timesteps):
            e_0 = unet(x, torch.tensor([t]), empty[None]).sample
            e = e_0 + guidance * (e_c - e_0)
            x_0 = (x - (1 - alphas[t]) ** 0.5 * e) / alphas[t] ** 0.5
            following = alphas[timesteps[step + 1]]
            x = following**0.5 * x_0 + (1 - following) ** 0.5 * e
    return steps


def standardised_difference(present: list[list[float]], absent: list[list[float]], spread: str) -> float:
    """Of one neuron: ``present[i][t]`` and ``absent[i][t]``, pair by pair and step by step."""
    at_steps = []
    for t in range(len(present[0])):
        with_concept = [picture[t] for picture in present]
        without = [picture[t] for picture in absent]
        differences = [a - b for a, b in zip(with_concept, without, strict=True)]
        if spread == "paired":
            deviation = stdev(differences)
        else:
            deviation = ((variance(with_concept) + variance(without)) / 2) ** 0.5
        at_steps.append(fmean(differences) / deviation)
    return fmean(at_steps)


def relative(original: list[float], values: list[float]) -> list[float]:
    """One neuron's ``values``, prompt by prompt, as multiples of its mean over ``original``."""
    return [value / fmean(original) for value in values]


def reactivation(original: list[list[float]], erased: list[list[float]], attacked: list[list[float]]) -> list[float]:
    """By prompt: the mean over neurons of what the attack adds. Arguments are [prompt][neuron]."""
    by_prompt = []
    for prompt in range(len(erased)):
        gains = []
        for neuron in range(len(erased[prompt])):
            unit = fmean(row[neuron] for row in original)
            gains.append((attacked[prompt][neuron] - erased[prompt][neuron]) / unit)
        by_prompt.append(fmean(gains))
    return by_prompt
