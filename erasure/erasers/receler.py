"""Receler: adapters behind cross-attention unlearn the concept, where it is, against prompts that bring it back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from diffusion.streams import stream
from erasure.additions.adapters import Adapters, AdaptersAtWork
from erasure.attention import (
    concept_columns,
    concept_maps,
    layer_size,
    nearest,
    recorded_attention,
    reduced_size,
)
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import minimise, prune_after, require_trainable_precision, retaining
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning, check_pair
from erasure.trajectories import FrozenSamples, Trajectories, check_pool, current_points, stage


@checked
class Receler:
    """Receler (Huang et al., "Reliable Concept Erasing ... via Lightweight Erasers", ECCV 2024).

    The weights stay as they are. A layer l of cross-attention that put out h is given an adapter, o_l = U GELU(D h + a)
    + b, and puts out h + o_l (:mod:`erasure.additions.adapters`). Every step takes a point x_t on a guided sampling
    trajectory of c, the concept's text, and

    1. lets the frozen model predict eps*(x_t, r, t) and eps*(x_t, c, t), with r the empty prompt, and takes for the
       concept's mask M the pixels where the mean cross-attention to the concept's tokens in the second, over heads and
       the layers of one size, stretched to 0 .. 1, is at least ``mask_threshold``;
    2. learns adversarial embeddings e, which stand behind the concept's tokens in c's text embedding, with Adam:
       L_adv = || eps_theta(x_t, [c, e], t) - eps*(x_t, c, t) ||^2 (mean);
    3. trains the adapters theta with Adam on
       L = || eps_theta(x_t, [c, e], t) - [eps*(x_t, r, t) - eta (eps*(x_t, c, t) - eps*(x_t, r, t))] ||^2 (mean)
           + lambda / layers  sum_l  sum over pixels p outside M of mean(o_l[p]^2) / their number.

    The e of a target prompt are kept from step to step, with what Adam remembers of them. Several concepts are erased
    by one set of adapters: they take turns, as in the authors' code, each with embeddings of its own. The defaults are
    the authors' but where their code differs from the formulas: ``published_offset``; and their e never reaches the
    U-Net, as what is written into ``emb_n[:, indices, :].data`` lands in a copy, so that their code equals
    ``attack_steps`` 0, at 50 times the cost.

    Attributes:
        rank: Rows of D.
        eta: Strength of the negative guidance, relative to the prediction for r.
        reference: What r is: ``unconditional``, the empty prompt, as in the paper; or ``anchor``, the concept's anchor
            in the same template as c.
        regularisation_weight: lambda; 0 for none.
        mask_threshold: Of the stretched attention.
        mask_reduction: M comes from the layers that see latents so many times smaller; others take the nearest pixels.
        steps: Optimiser steps (Adam).
        learning_rate: Adam's.
        batch_size: Points per step; several targets take turns.
        tokens: Embeddings in e. A prompt without room for them loses its tail to them.
        attack_steps: Steps on e for every step on theta; 0 trains on c alone.
        attack_learning_rate: Adam's, on e.
        attack_weight_decay: Adam's, on e; added to the gradient.
        stale_attack: Step 3 goes without e's last step and takes the attack's last evaluation for its own, which saves
            one in ``attack_steps + 1``; so the authors' code is written, but see above.
        sampling_steps: Sampler steps of a trajectory.
        trajectory_guidance: Guidance scale of a trajectory.
        trajectory: Whose trajectories: the ``current`` model's, adapters included (the authors' code), or the
            ``frozen`` model's, computed beforehand in batches.
        trajectories: None gives every training sample a trajectory of its own, as published. A number is an
            approximation: so many frozen trajectories, every step of which becomes a training sample.
        published_offset: x_t is less noisy than t says, as in the authors' code; see ``lagging`` in
            :class:`erasure.trajectories.Trajectories`.
        retain_weight: Weight of the retain term on the concept's preserved phrases; 0, as in the paper, for none.
        sampling_batch_size: Trajectories sampled at a time; it changes speed and memory only.
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    rank: Annotated[int, Field(ge=1)] = 128
    eta: Annotated[float, Field(gt=0)] = 1.0
    reference: Literal["unconditional", "anchor"] = "unconditional"
    regularisation_weight: Annotated[float, Field(ge=0)] = 0.1
    mask_threshold: Annotated[float, Field(ge=0, le=1)] = 0.1
    mask_reduction: Annotated[int, Field(ge=1)] = 4
    steps: Annotated[int, Field(ge=1)] = 500
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    batch_size: Annotated[int, Field(ge=1)] = 1
    tokens: Annotated[int, Field(ge=1)] = 16
    attack_steps: Annotated[int, Field(ge=0)] = 50
    attack_learning_rate: Annotated[float, Field(gt=0)] = 0.1
    attack_weight_decay: Annotated[float, Field(ge=0)] = 0.1
    stale_attack: bool = False
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    trajectory_guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectory: Literal["frozen", "current"] = "current"
    trajectories: Annotated[int, Field(ge=1)] | None = None
    published_offset: bool = False
    retain_weight: Annotated[float, Field(ge=0)] = 0.0
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64
    scope: UNetScope = "xattn"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_pool(self.trajectories, trajectory=self.trajectory, published_offset=self.published_offset)
        return self

    @property
    def settings(self) -> Trajectories:
        """How trajectories are sampled."""
        return Trajectories(
            self.sampling_steps,
            self.trajectory_guidance,
            self.trajectories,
            self.sampling_batch_size,
            lagging=self.published_offset,
        )

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        check_pair(self, pruning)
        require_trainable_precision(model)
        adapters = Adapters.untrained(model, self.rank, stream(seed, "receler/adapters"))
        weights = list(adapters.weights.values())
        at_work = AdaptersAtWork(adapters, model)
        own = RecelerObjective(self, at_work)
        trajectories = replace(self.settings, lagging=False)
        objective = retaining(own, self.retain_weight, trajectories, self.batch_size)
        try:
            with at_work.silenced():
                spent = objective.prepare(
                    model, concept, scope=self.scope, steps=self.steps, seed=seed, checkpoint=checkpoint
                )
            losses, cost = minimise(
                model,
                lambda step: objective.loss(model, step),
                [*weights, *own.prompts.state],
                torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=self.learning_rate),
                steps=self.steps,
                label="adapters",
                checkpoint=stage(checkpoint, "weights"),
            )
        finally:
            at_work.detach()
        trained = Adapters({name: weight.detach().cpu() for name, weight in adapters.weights.items()})
        erasure = Erasure(Edit({}, {}, (trained,)), losses, spent + cost)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)


class RecelerObjective:
    """The loss of :class:`Receler`, whose adapters are at work in the model.

    Args:
        config: Its settings.
        at_work: The adapters.

    Attributes:
        prompts: The adversarial embeddings; after :meth:`prepare`.
    """

    def __init__(self, config: Receler, at_work: AdaptersAtWork) -> None:
        self._config = config
        self._at_work = at_work
        self._samples: FrozenSamples | None = None

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        prompts = concept.target_prompts
        self._text = model.encode_prompts(prompts)
        anchors = concept.target_anchors if config.reference == "anchor" else [""] * len(prompts)
        self._references = model.encode_prompts(anchors)
        self._columns = concept_columns(model, concept).to(model.device)
        self._mask_size = reduced_size(model, config.mask_reduction)
        self.prompts = AdversarialPrompts(config, model, prompts, self._text, seed=seed)
        self._turns = torch.tensor([prompts.index(target) for target, _ in concept.turns], device=model.device)
        if config.trajectory == "current":
            return 0
        self._samples = FrozenSamples(
            model,
            self._text[self._turns],
            config.settings,
            target_guidance=1.0,
            steps=steps,
            batch_size=config.batch_size,
            seed=seed,
            checkpoint=checkpoint,
        )
        return self._samples.unet_evaluations

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`; it attacks before."""
        config = self._config
        latents, timesteps, rows = self._points(model, step)
        named, targets, masks = self._teach(model, latents, timesteps, rows)

        attacks_last = config.stale_attack and config.attack_steps > 0
        with self._at_work.fixed():
            for _ in range(config.attack_steps - attacks_last):
                text = self.prompts.text(rows).requires_grad_()
                self._attack(text, model.predict_noise(latents, timesteps, text), named, rows)
        text = self.prompts.text(rows) if config.attack_steps else self._text[rows]
        with self._at_work.heard() as added:
            noise = model.predict_noise(latents, timesteps, text.requires_grad_(attacks_last))
        if attacks_last:
            self._attack(text, noise, named, rows, retain_graph=True)
        error = functional.mse_loss(noise.to(targets.dtype), targets)
        if not config.regularisation_weight:
            return error
        return error + config.regularisation_weight * added_outside(added, masks, model.latent_shape[1:])

    def _attack(self, text: Tensor, noise: Tensor, named: Tensor, rows: Tensor, *, retain_graph: bool = False) -> None:
        """Take a step towards the prediction ``named``, from the prediction ``noise`` for ``text``."""
        # Every sample has its own mean to lower, whatever the batch.
        error = len(rows) * functional.mse_loss(noise.to(named.dtype), named)
        (gradient,) = torch.autograd.grad(error, text, retain_graph=retain_graph)
        self.prompts.step(rows, gradient)

    def _points(self, model: TextToImage, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, float [n, c, h, w], t and the target prompts' numbers, int64 [n]."""
        if self._samples is not None:
            samples, _ = self._samples.batch(step)
            return samples.latents, samples.timesteps, self._turns[samples.prompts]
        config = self._config
        latents, timesteps, turns = current_points(
            model,
            self._text[self._turns],
            config.settings,
            batch_size=config.batch_size,
            seed=self._seed,
            step=step,
        )
        return latents, timesteps, self._turns[turns]

    @torch.no_grad()
    def _teach(
        self, model: TextToImage, latents: Tensor, timesteps: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the frozen model predicts for c, what is to be predicted, float [n, c, h, w], and M, bool [n, h, w]."""
        texts = torch.cat([self._references[rows], self._text[rows]])
        with self._at_work.silenced(), recorded_attention(model) as record:
            noise = model.predict_noise(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), texts).to(latents.dtype)
        reference, named = noise.chunk(2)
        maps = concept_maps(record, self._columns[rows].repeat(2, 1), self._mask_size)[len(rows) :]
        targets = reference - self._config.eta * (named - reference)
        return named, targets, maps >= self._config.mask_threshold


class AdversarialPrompts:
    """Embeddings that are learned behind every target prompt, and Adam's memory of them.

    Args:
        config: How many and how they are learned.
        model: Whose text encoder.
        prompts: The target prompts.
        text: Their embeddings, float [prompts, tokens, width].
        seed: Of the first values, uniform in 0 .. 1.

    Attributes:
        state: All that changes in them, to be saved and restored.
    """

    def __init__(self, config: Receler, model: TextToImage, prompts: Sequence[str], text: Tensor, *, seed: int) -> None:
        self._text = text
        slots = PromptTemplate.insert(model, prompts, config.tokens, "suffix_k").slots
        self._slots = slots.to(text.device)[..., None].expand(-1, -1, text.shape[2])
        self._embeddings = [
            torch.rand((config.tokens, text.shape[2]), generator=stream(seed, "receler/prompts", row)).to(text)
            for row in range(len(prompts))
        ]
        self._optimizer = torch.optim.Adam(
            self._embeddings, lr=config.attack_learning_rate, weight_decay=config.attack_weight_decay
        )
        memory = [
            {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(embedding),
                "exp_avg_sq": torch.zeros_like(embedding),
            }
            for embedding in self._embeddings
        ]
        # Made here rather than by Adam at its first step, so that it has a place to be restored to.
        self._optimizer.state.update(zip(self._embeddings, memory, strict=True))
        self.state = [*self._embeddings, *(value for values in memory for value in values.values())]

    def text(self, rows: Tensor) -> Tensor:
        """The target prompts ``rows`` with their embeddings behind them, float [n, tokens, width]."""
        learned = torch.stack([self._embeddings[row] for row in rows.tolist()])
        return self._text[rows].scatter(1, self._slots[rows], learned)

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """Take a step of Adam, given the gradient by :meth:`text`, float [n, tokens, width]."""
        for row, share in zip(rows.tolist(), gradient.gather(1, self._slots[rows]), strict=True):
            embedding = self._embeddings[row]
            embedding.grad = share if embedding.grad is None else embedding.grad + share
        self._optimizer.step()
        self._optimizer.zero_grad()


def added_outside(added: Mapping[str, Tensor], masks: Tensor, latents: Sequence[int]) -> Tensor:
    """Concept-localised regularisation: the mean square of what adapters add outside the concept's mask, a scalar.

    Args:
        added: By layer, float [n, pixels, width].
        masks: bool [n, height, width], where the concept is.
        latents: Height and width of the latents.
    """
    height, width = latents
    shares = []
    for output in added.values():
        outside = ~nearest(masks, layer_size((height, width), output.shape[1])).flatten(1)
        squares = output.to(torch.promote_types(output.dtype, torch.float32)).square().mean(2)
        shares.append((squares * outside).sum(1) / outside.sum(1).clamp(min=1))
    return torch.stack(shares).mean()
