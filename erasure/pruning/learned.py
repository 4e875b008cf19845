"""Learned pruning: a mask over single weights, trained under the eraser's own objective."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion.model import TextToImage
from diffusion.parameters import substituted
from diffusion.training import step_generator
from erasure.concept import Concept
from erasure.edit import Fill
from erasure.finetuning import FineTuning, fine_tune, minimise, require_trainable_precision
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import Masks, cut_lowest, mask_counts, maskable_parameters, pruned_by
from erasure.trajectories import stage

Relaxation = Literal["straight_through", "hard_concrete", "annealed"]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard-concrete distribution (Louizos et al., 2018, section 4)."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Learned:
    """Differentiable pruning (Yang et al., "Pruning for Robust Concept Erasing in Diffusion Models", 2024).

    min over s of L(m(s) * W) + sparsity_weight * E[fraction pruned], where L is the eraser's objective (with ESD this
    is P-ESD, with AC P-AC), W the frozen weights of the scope, s one score per weight, and m in {0, 1} the mask. While
    s is learned, m is relaxed:

    - ``straight_through``: m = 1[sigmoid(s) > 0.5], with the gradient of sigmoid(s).
    - ``hard_concrete`` (Louizos et al., 2018): m = clip(sigmoid((log u - log(1 - u) + s) / beta)(zeta - gamma) + gamma,
      0, 1) with u uniform, open with probability sigmoid(s - beta log(-gamma / zeta)).
    - ``annealed``: m = sigmoid(s / T), T falling geometrically from 1 to ``final_temperature``.

    All of them end with m = 1[s > 0]: a weight is the base model's or pruned.

    Attributes:
        relaxation: See above.
        scope: Whose matrices and kernels are masked; None for the eraser's.
        initial_score: Every weight's score at the start; higher holds on to more weights.
        learning_rate: Adam's, on the scores.
        steps: Optimiser steps.
        sparsity_weight: Pressure against pruning, the penalty on the expected fraction pruned.
        budget: Largest fraction of the scope's weights pruned; those of the lowest scores go. None for no limit.
        final_temperature: Where ``annealed`` ends.
        fill: What pruned weights become once the mask is learned, which takes them as zero.
        finetune: ``after`` trains what the mask has left, under the same objective; pruned weights stay zero.
        finetune_steps: Optimiser steps of that.
        finetune_learning_rate: Adam's in that.
    """

    needs_objective: ClassVar[bool] = True

    relaxation: Relaxation = "straight_through"
    scope: UNetScope | None = "xattn_ffn"
    initial_score: Annotated[float, Field(gt=-20, lt=20)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 200
    sparsity_weight: Annotated[float, Field(ge=0)] = 0.0
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    final_temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    fill: Fill = "zero"
    finetune: Literal["none", "after"] = "none"
    finetune_steps: Annotated[int, Field(ge=1)] = 100
    finetune_learning_rate: Annotated[float, Field(gt=0)] = 1e-4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fill != "zero" and self.finetune != "none":
            raise ValueError(
                f"fill is {self.fill!r} and finetune {self.finetune!r}, which holds pruned weights at zero; "
                "set fill=zero or finetune=none."
            )
        return self

    def prune(
        self,
        model: TextToImage,
        concept: Concept,
        objective: Objective | None,
        *,
        scope: UNetScope,
        seed: int,
        checkpoint: Path | None,
    ) -> Erasure:
        """See :class:`erasure.protocols.Pruning`."""
        if objective is None:
            raise ValueError("Pruning 'Learned' needs an eraser that trains; choose eraser=esd, ac, salun or fmn.")
        require_trainable_precision(model)
        scope = self.scope or scope
        extra_steps = self.finetune_steps if self.finetune == "after" else 0
        prepared = objective.prepare(
            model, concept, scope=scope, steps=self.steps + extra_steps, seed=seed, checkpoint=checkpoint
        )

        weights = maskable_parameters(model, scope)
        scores = {name: torch.full_like(weight, self.initial_score) for name, weight in weights.items()}
        learned = [values.requires_grad_() for values in scores.values()]

        def loss(step: int) -> Tensor:
            masks = self.relaxed_masks(scores, step, seed)
            with substituted(model, {name: masks[name] * weight for name, weight in weights.items()}):
                erasing = objective.loss(model, step)
            return erasing + self.sparsity_weight * self.expected_pruned_fraction(scores, step)

        losses, spent = minimise(
            model,
            loss,
            learned,
            torch.optim.Adam(learned, lr=self.learning_rate),
            steps=self.steps,
            label="learning the mask",
            checkpoint=stage(checkpoint, "mask"),
        )
        masks = self.binary_masks(scores)
        if self.finetune == "none":
            pruned = pruned_by(masks, scope=scope, fill=self.fill, seed=seed)
            return Erasure(pruned.edit, losses, prepared + spent)
        tuned = fine_tune(
            model,
            objective,
            FineTuning(scope, self.finetune_steps, self.finetune_learning_rate),
            checkpoint=stage(checkpoint, "weights"),
            first_step=self.steps,
            kept=masks,
        )
        return Erasure(
            tuned.edit.with_metadata({"scope": scope, **mask_counts(masks)}),
            [*losses, *tuned.losses],
            prepared + spent + tuned.unet_evaluations,
        )

    def binary_masks(self, scores: Mapping[str, Tensor]) -> Masks:
        """Masks m = 1[s > 0] within the budget; bool by parameter name, True where the weight is kept."""
        masks = {name: values.detach() > 0 for name, values in scores.items()}
        if self.budget is None:
            return masks
        allowed = math.floor(self.budget * sum(mask.numel() for mask in masks.values()))
        if sum(int((~mask).sum()) for mask in masks.values()) <= allowed:
            return masks
        return cut_lowest(scores, allowed, candidates={name: ~mask for name, mask in masks.items()})

    def relaxed_masks(self, scores: Mapping[str, Tensor], step: int, seed: int) -> Masks:
        """Masks in [0, 1] by parameter name, differentiable in ``scores``."""
        if self.relaxation == "straight_through":
            hard = self.binary_masks(scores)
            soft = {name: values.sigmoid() for name, values in scores.items()}
            return {name: hard[name] + (soft[name] - soft[name].detach()) for name in scores}
        if self.relaxation == "hard_concrete":
            generator = step_generator(seed, step)
            return {name: hard_concrete(values, generator) for name, values in scores.items()}
        return {name: (values / self._temperature(step)).sigmoid() for name, values in scores.items()}

    def expected_pruned_fraction(self, scores: Mapping[str, Tensor], step: int) -> Tensor:
        """The fraction of weights that the relaxed mask is expected to close, a scalar."""
        shift = BETA * math.log(-GAMMA / ZETA) if self.relaxation == "hard_concrete" else 0.0
        temperature = self._temperature(step) if self.relaxation == "annealed" else 1.0
        closed = [(-(values - shift) / temperature).sigmoid().sum() for values in scores.values()]
        return torch.stack(closed).sum() / sum(values.numel() for values in scores.values())

    def _temperature(self, step: int) -> float:
        return math.pow(self.final_temperature, step / max(1, self.steps - 1))


def hard_concrete(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of the hard-concrete gate with log alpha = ``scores``; the same shape, in [0, 1]."""
    uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype).to(scores.device)
    noise = uniform.logit(eps=1e-6)
    return (((noise + scores) / BETA).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
