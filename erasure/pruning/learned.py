"""Learned pruning: a mask over weights, trained under the eraser's own objective."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.parameters import substituted
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.entries import Fill
from erasure.finetuning import FineTuning, fine_tune, minimise, require_trainable_precision
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure, Objective
from erasure.pruning.masks import Masks, cut_lowest, mask_counts, maskable_parameters
from erasure.pruning.structures import Granularity, structure_of
from erasure.trajectories import stage

Relaxation = Literal["straight_through", "hard_concrete", "annealed"]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard-concrete distribution (Louizos et al., 2018, section 4)."""


@checked
class Learned:
    """Differentiable pruning (Yang et al., "Pruning for Robust Concept Erasing in Diffusion Models", 2024).

    min over s of L(m(s) * W) + sparsity_weight * E[fraction pruned], where L is the eraser's objective (with ESD this
    is P-ESD, with AC P-AC), W the frozen weights of the scope, s one score per weight (the paper's; or one per neuron
    or head, shared by its weights), and m in {0, 1} the mask. While s is learned, m is relaxed:

    - ``straight_through``: m = 1[sigmoid(s) > 0.5], with the gradient of sigmoid(s).
    - ``hard_concrete`` (Louizos et al., 2018): m = clip(sigmoid((log u - log(1 - u) + s) / beta)(zeta - gamma) + gamma,
      0, 1) with u uniform, open with probability sigmoid(s - beta log(-gamma / zeta)).
    - ``annealed``: m = sigmoid(s / T), T falling geometrically from 1 to ``final_temperature``.

    All of them end with m = 1[s > 0]: a weight is the base model's or pruned. The base model's weights may be trained
    on L as well, before, after, or in the same steps as the mask (min over s and W); pruned weights are zero then too.

    Attributes:
        relaxation: See above.
        granularity: What has a score of its own and is pruned as a whole; see
            :data:`erasure.pruning.structures.Granularity`.
        scope: Whose matrices and kernels are masked; None for the eraser's.
        initial_score: Every score at the start; higher holds on to more weights.
        learning_rate: Adam's, on the scores.
        steps: Optimiser steps.
        sparsity_weight: Pressure against pruning, the penalty on the expected fraction of weights pruned.
        budget: Largest fraction of the scope's weights pruned; those of the lowest scores go, neurons and heads until
            the next one would exceed it. None for no limit.
        final_temperature: Where ``annealed`` ends.
        fill: What pruned weights become once the mask is learned, which takes them as zero.
        finetune: When the scope's weights are trained under the same objective: ``before`` the mask is learned over
            them; ``after``, those that it has left; ``jointly``, in its own ``steps`` steps; or ``none``.
        finetune_steps: Optimiser steps of that, before or after.
        finetune_learning_rate: Adam's in that.
    """

    needs_objective: ClassVar[bool] = True

    relaxation: Relaxation = "straight_through"
    granularity: Granularity = "weight"
    scope: UNetScope | None = "xattn_ffn"
    initial_score: Annotated[float, Field(gt=-20, lt=20)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 200
    sparsity_weight: Annotated[float, Field(ge=0)] = 0.0
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    final_temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    fill: Fill = "zero"
    finetune: Literal["none", "before", "after", "jointly"] = "none"
    finetune_steps: Annotated[int, Field(ge=1)] = 100
    finetune_learning_rate: Annotated[float, Field(gt=0)] = 1e-4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fill != "zero" and self.finetune in ("after", "jointly"):
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
        extra_steps = self.finetune_steps if self.finetune in ("before", "after") else 0
        prepared = objective.prepare(
            model, concept, scope=scope, steps=self.steps + extra_steps, seed=seed, checkpoint=checkpoint
        )
        tune = partial(
            fine_tune,
            model,
            objective,
            FineTuning(scope, self.finetune_steps, self.finetune_learning_rate),
            checkpoint=stage(checkpoint, "weights"),
        )
        learn = partial(self._learn, model, objective, scope=scope, seed=seed, checkpoint=stage(checkpoint, "mask"))
        if self.finetune == "before":
            tuned = tune()
            with tuned.edit.applied(model):
                masks, losses, spent = learn(first_step=self.finetune_steps)
            edit = tuned.edit.then(Edit.from_mask(masks, fill=self.fill, seed=seed), model)
            losses, spent = [*tuned.losses, *losses], tuned.unet_evaluations + spent
        elif self.finetune == "jointly":
            base = scope_parameters(model, scope)
            weights = {name: value.detach().clone().requires_grad_() for name, value in base.items()}
            masks, losses, spent = learn(trained=weights)
            left = {name: torch.where(kept, weights[name].detach(), 0) for name, kept in masks.items()}
            edit = Edit.from_weights(base, {**weights, **left})
        elif self.finetune == "after":
            masks, losses, spent = learn()
            tuned = tune(first_step=self.steps, kept=masks)
            edit = tuned.edit
            losses, spent = [*losses, *tuned.losses], spent + tuned.unet_evaluations
        else:
            masks, losses, spent = learn()
            edit = Edit.from_mask(masks, fill=self.fill, seed=seed)
        return Erasure(edit.with_metadata({"scope": scope, **mask_counts(masks)}), losses, prepared + spent)

    def _learn(
        self,
        model: TextToImage,
        objective: Objective,
        *,
        scope: UNetScope,
        seed: int,
        checkpoint: Path | None,
        first_step: int = 0,
        trained: Mapping[str, Tensor] | None = None,
    ) -> tuple[Masks, list[float], int]:
        """Learn a mask over the model's weights as they are, or over ``trained`` ones that learn with it.

        Args:
            model: Whose weights.
            objective: Prepared for ``first_step + self.steps`` steps.
            scope: Whose matrices and kernels are masked.
            seed: Of what a relaxation draws.
            checkpoint: File that a killed run continues from.
            first_step: The objective's step that learning starts with.
            trained: Leaf tensors in place of the scope's parameters, by name; changed in place.

        Returns:
            The masks of single weights, the losses and the U-Net evaluations spent.
        """
        maskable = maskable_parameters(model, scope)
        weights: Mapping[str, Tensor] = trained or maskable
        structure = structure_of(model, maskable, self.granularity)
        some = next(iter(maskable.values()))
        scores = {
            group: torch.full(shape, self.initial_score, dtype=some.dtype, device=some.device, requires_grad=True)
            for group, shape in structure.units.items()
        }

        def loss(step: int) -> Tensor:
            units = self.relaxed_masks(scores, step, seed, structure.sizes)
            masks = structure.by_weight(units, maskable)
            stand_ins = {name: masks[name] * value if name in masks else value for name, value in weights.items()}
            with substituted(model, stand_ins):
                erasing = objective.loss(model, first_step + step)
            return erasing + self.sparsity_weight * self.expected_pruned_fraction(scores, step, structure.sizes)

        groups = [{"params": list(scores.values()), "lr": self.learning_rate}]
        if trained:
            groups.append({"params": list(trained.values()), "lr": self.finetune_learning_rate})
        losses, spent = minimise(
            model,
            loss,
            [*scores.values(), *(trained or {}).values()],
            torch.optim.Adam(groups),
            steps=self.steps,
            label="learning the mask",
            checkpoint=checkpoint,
        )
        return structure.by_weight(self.binary_masks(scores, structure.sizes), maskable), losses, spent

    def binary_masks(self, scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor] | None = None) -> Masks:
        """Masks m = 1[s > 0] within the budget; bool by name, True where the weight or unit is kept.

        Args:
            scores: Of weights, or of units.
            sizes: How many weights a unit has, int64 of the scores' shapes; None where units are weights.
        """
        masks = {name: values.detach() > 0 for name, values in scores.items()}
        if self.budget is None:
            return masks
        allowed = math.floor(self.budget * _weights_of(scores, sizes))
        pruned = {name: ~mask for name, mask in masks.items()}
        if sizes is None:
            count = allowed
        else:
            lowest = torch.cat([scores[name].detach()[which] for name, which in pruned.items()]).argsort(stable=True)
            filled = torch.cat([sizes[name][which] for name, which in pruned.items()])[lowest].cumsum(0)
            count = int((filled <= allowed).sum())
        if sum(int(which.sum()) for which in pruned.values()) <= count:
            return masks
        return cut_lowest(scores, count, candidates=pruned)

    def relaxed_masks(
        self, scores: Mapping[str, Tensor], step: int, seed: int, sizes: Mapping[str, Tensor] | None = None
    ) -> Masks:
        """Masks in [0, 1] by name, differentiable in ``scores``; for ``sizes`` see :meth:`binary_masks`."""
        if self.relaxation == "straight_through":
            hard = self.binary_masks(scores, sizes)
            soft = {name: values.sigmoid() for name, values in scores.items()}
            return {name: hard[name] + (soft[name] - soft[name].detach()) for name in scores}
        if self.relaxation == "hard_concrete":
            generator = stream(seed, "learned/gates", step)
            return {name: hard_concrete(values, generator) for name, values in scores.items()}
        return {name: (values / self._temperature(step)).sigmoid() for name, values in scores.items()}

    def expected_pruned_fraction(
        self, scores: Mapping[str, Tensor], step: int, sizes: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The fraction of weights that the relaxed mask is expected to close, a scalar."""
        shift = BETA * math.log(-GAMMA / ZETA) if self.relaxation == "hard_concrete" else 0.0
        temperature = self._temperature(step) if self.relaxation == "annealed" else 1.0
        closed = {name: (-(values - shift) / temperature).sigmoid() for name, values in scores.items()}
        if sizes is not None:
            closed = {name: values * sizes[name] for name, values in closed.items()}
        return torch.stack([values.sum() for values in closed.values()]).sum() / _weights_of(scores, sizes)

    def _temperature(self, step: int) -> float:
        return math.pow(self.final_temperature, step / max(1, self.steps - 1))


def _weights_of(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor] | None) -> int:
    """How many weights the scores are of."""
    return sum(values.numel() if sizes is None else int(sizes[name].sum()) for name, values in scores.items())


def hard_concrete(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of the hard-concrete gate with log alpha = ``scores``; the same shape, in [0, 1]."""
    uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype).to(scores.device)
    noise = uniform.logit(eps=1e-6)
    return (((noise + scores) / BETA).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
