"""SPM: thin layers beside the U-Net's learn to take the concept out, and let pass whatever else a prompt asks for."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed, stream
from diffusion.training import cosine_warmup
from erasure.addition import attached
from erasure.additions.membranes import DOWN, UP, Gate, Membranes, Merge
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after, require_preserved, require_trainable_precision, train_beside
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure, Pruning, check_pair
from erasure.trajectories import FrozenSamples, Trajectories, check_pool, current_points, stage, target_noise


@checked
class SPM:
    """Semi-permeable membranes (Lyu et al., "One-dimensional Adapter to Rule Them All ...", CVPR 2024).

    Every layer of the scope gets a membrane beside it, y = W x + m (alpha / r) u d x, that learns to erase one concept:
        L = || eps_m(x_t, c, t) - [eps(x_t, s, t) - eta (eps(x_t, c, t) - eps(x_t, s, t))] ||^2
            + lambda || eps_m(x_t, a, t) - eps(x_t, a, t) ||^2   (means)
    in their equations 4 to 8, with eps_m the model with its membranes wide open (m = 1), eps without; c a target
    prompt, s the surrogate. x_t lies on a guided sampling trajectory of c that stops at a random step. The second term,
    latent anchoring, keeps the predictions for anchors a, drawn with a probability in proportion to
        (1 - |cos(a, c)|)^beta
    d begins as a Kaiming-uniform layer does, u at 0. Several concepts train membranes of their own, and act together
    (equation 9): y = W x + sum_i m_i u_i d_i x.

    Facilitated transport (equations 10 and 11) opens them as far as the prompt p is about their concept:
        m(p) = gamma max over its targets c of max(cos(c, p), |T(c) & T(p)| / |T(c)|)
    with T the set of tokens, and texts as one long vector; it meets both halves of guidance. The defaults are those of
    the paper and its code, but for the optimiser in 8 bits, the other picture sizes in that code's training,
    ``anchor_texts`` and ``published_offset``.

    Attributes:
        scope: Which layers get a membrane; only its linear layers and convolutions do.
        rank: r.
        alpha: As above.
        eta: Strength of the negative guidance.
        surrogate: What s is: ``unconditional``, the empty prompt; or ``anchor``, the concept's anchor in the same
            template as c.
        anchoring_weight: lambda.
        anchors: Anchors per step; the step's points take turns at them.
        anchor_texts: What anchors are: ``noise``, a random direction with about the length of c's text;
            ``noise_and_empty``, such directions and the empty prompt in turn, which is what the authors' code comes to,
            as it takes the second half of [empty, a_1, empty, a_2, ...]; or the concept's ``preserved`` prompts.
        anchor_lengths: Least and greatest length of an anchor of noise, relative to c's.
        anchor_exponent: beta, alpha in the paper.
        steps: Optimiser steps (AdamW) for each concept.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        warmup: Steps in which the learning rate rises.
        cycles: Half cosines in which it falls after that.
        batch_size: Trajectory points per step; targets and templates take turns.
        sampling_steps: Sampler steps of a trajectory.
        trajectory_guidance: Guidance scale of a trajectory.
        trajectory: Whose trajectories: the ``current`` model's with its membranes, sampled at every step; or the
            ``frozen`` one's, all computed beforehand in batches.
        trajectories: As in :class:`erasure.erasers.esd.ESD`.
        published_offset: x_t is less noisy than t says, and never noise alone, as in the authors' code; see
            ``rescaled`` in :class:`erasure.trajectories.Trajectories`.
        gate: ``facilitated``, as above; or ``off``: m = gamma for every prompt.
        strength: gamma.
        merge: ``exact``, the sum above; or ``published``: (sum_i m_i u_i) (sum_j m_j d_j), as the authors' code has it,
            which mixes concepts and squares m.
        sampling_batch_size: Trajectories sampled at a time; it changes speed and memory only.
    """

    has_objective: ClassVar[bool] = False

    scope: UNetScope = "transformers"
    rank: Annotated[int, Field(ge=1)] = 1
    alpha: Annotated[float, Field(gt=0)] = 1.0
    eta: Annotated[float, Field(gt=0)] = 1.0
    surrogate: Literal["unconditional", "anchor"] = "unconditional"
    anchoring_weight: Annotated[float, Field(ge=0)] = 1000.0
    anchors: Annotated[int, Field(ge=1)] = 4
    anchor_texts: Literal["noise", "noise_and_empty", "preserved"] = "noise"
    anchor_lengths: tuple[Annotated[float, Field(gt=0)], float] = (0.8, 1.2)
    anchor_exponent: Annotated[float, Field(ge=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 3000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    warmup: Annotated[int, Field(ge=0)] = 500
    cycles: Annotated[int, Field(ge=1)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 1
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 30
    trajectory_guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectory: Literal["frozen", "current"] = "current"
    trajectories: Annotated[int, Field(ge=1)] | None = None
    published_offset: bool = False
    gate: Gate = "facilitated"
    strength: Annotated[float, Field(gt=0)] = 1.0
    merge: Merge = "exact"
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_pool(self.trajectories, trajectory=self.trajectory, published_offset=self.published_offset)
        if self.anchor_lengths[0] > self.anchor_lengths[1]:
            raise ValueError(f"anchor_lengths is {list(self.anchor_lengths)}; the first must not exceed the second.")
        return self

    @property
    def settings(self) -> Trajectories:
        """How trajectories are sampled."""
        return Trajectories(
            self.sampling_steps,
            self.trajectory_guidance,
            self.trajectories,
            self.sampling_batch_size,
            rescaled=self.published_offset,
        )

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        check_pair(self, pruning)
        require_trainable_precision(model)
        trained = [
            self.trained_membranes(model, part, seed=seed, number=number, checkpoint=checkpoint)
            for number, part in enumerate(concept.parts)
        ]
        membranes = Membranes(
            _together([each.up for each, _, _ in trained]),
            _together([each.down for each, _, _ in trained]),
            tuple(part.targets for part in concept.parts),
            self.gate,
            self.strength,
            self.merge,
        )
        erasure = Erasure(
            Edit({}, {}, (membranes,)),
            [loss for _, losses, _ in trained for loss in losses],
            sum(spent for _, _, spent in trained),
        )
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)

    def trained_membranes(
        self, model: TextToImage, part: Concept, *, seed: int, number: int, checkpoint: Path | None
    ) -> tuple[Membranes, list[float], int]:
        """The wide open membranes of one concept, their losses and their U-Net evaluations."""
        own_seed = derived_seed(seed, "spm/concept", number)
        erasing = LatentAnchoring(
            self, model, part, seed=own_seed, checkpoint=stage(checkpoint, f"concept-{number}-points")
        )
        factors = self.initial_factors(model, own_seed)
        flat = {
            f"{layer}{side}": factor
            for layer, pair in factors.items()
            for side, factor in zip((UP, DOWN), pair, strict=True)
        }
        kept, losses, spent = train_beside(
            model,
            lambda step: erasing.loss(model, self.membranes(factors), step),
            flat,
            torch.optim.AdamW(flat.values(), lr=self.learning_rate, weight_decay=self.weight_decay),
            steps=self.steps,
            label=f"membranes of {part.name}",
            part=f"concept-{number}",
            checkpoint=checkpoint,
            learning_rate_factor=cosine_warmup(self.steps, self.warmup, self.cycles),
        )
        done = {layer: (kept[f"{layer}{UP}"], kept[f"{layer}{DOWN}"]) for layer in factors}
        return self.membranes(done), losses, erasing.unet_evaluations + spent

    def membranes(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Membranes:
        """One concept's membranes, wide open, of u float [outputs, r] and d float [r, inputs, ...] by layer name."""
        return Membranes(
            {layer: (self.alpha / self.rank) * up[None] for layer, (up, _) in factors.items()},
            {layer: down[None] for layer, (_, down) in factors.items()},
            ((),),
            gate="off",
        )

    def initial_factors(self, model: TextToImage, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Trainable u = 0 float [outputs, r] and Kaiming-uniform d float [r, inputs, ...] by layer name.

        Raises:
            ValueError: The scope has no linear layer and no convolution.
        """
        generator = stream(seed, "spm/factors")
        factors = {}
        for name, weight in scope_parameters(model, self.scope).items():
            layer = name.removesuffix(".weight")
            if layer == name or weight.ndim < 2:
                continue
            bound = 1 / math.sqrt(weight[0].numel())
            down = (2 * torch.rand((self.rank, *weight.shape[1:]), generator=generator) - 1) * bound
            up = torch.zeros((len(weight), self.rank))
            factors[layer] = (up.to(weight).requires_grad_(), down.to(weight).requires_grad_())
        if not factors:
            raise ValueError(f"scope {self.scope!r} has no linear layer and no convolution of {model.name!r}.")
        return factors


class LatentAnchoring:
    """L of :class:`SPM` for one concept.

    Attributes:
        unet_evaluations: Spent on trajectories beforehand, by an interrupted run as well.
    """

    def __init__(self, config: SPM, model: TextToImage, part: Concept, *, seed: int, checkpoint: Path | None) -> None:
        self._config = config
        self._seed = seed
        targets, anchors = zip(*part.turns, strict=True)
        self._text = model.encode_prompts(targets)
        surrogate = model.encode_prompts(anchors if config.surrogate == "anchor" else [""])
        self._surrogate = surrogate.expand_as(self._text)
        self._empty = model.encode_prompts([""])[0] if config.anchor_texts == "noise_and_empty" else None
        choices = None
        if config.anchor_texts == "preserved" and config.anchoring_weight:
            require_preserved(part, config.anchoring_weight, "anchoring_weight")
            choices = model.encode_prompts(part.preserved_prompts)
        self.sampler = SimilarityWeighted(choices, config.anchor_exponent, config.anchor_lengths)
        self._samples: FrozenSamples | None = None
        self.unet_evaluations = 0
        if config.trajectory == "frozen":
            self._samples = FrozenSamples(
                model,
                self._text,
                config.settings,
                target_guidance=-config.eta,
                reference=self._surrogate,
                steps=config.steps,
                batch_size=config.batch_size,
                seed=seed,
                checkpoint=checkpoint,
            )
            self.unet_evaluations = self._samples.unet_evaluations

    def loss(self, model: TextToImage, membranes: Membranes, step: int) -> Tensor:
        """The scalar of a training step, differentiable in the membranes."""
        config = self._config
        latents, timesteps, text, targets = self._points(model, membranes, step)
        if not config.anchoring_weight:
            with attached(model, membranes):
                return functional.mse_loss(model.predict_noise(latents, timesteps, text).to(targets), targets)
        places = torch.arange(config.anchors) % len(latents)
        anchors = self.sampler.draw(text[places], stream(self._seed, "spm/anchors", step))
        if self._empty is not None:
            anchors[::2] = self._empty
        with torch.no_grad():
            kept = model.predict_noise(latents[places], timesteps[places], anchors).to(targets)
        with attached(model, membranes):
            predicted = model.predict_noise(
                torch.cat([latents, latents[places]]),
                torch.cat([timesteps, timesteps[places]]),
                torch.cat([text, anchors]),
            ).to(targets)
        erasing = functional.mse_loss(predicted[: len(latents)], targets)
        return erasing + config.anchoring_weight * functional.mse_loss(predicted[len(latents) :], kept)

    def _points(self, model: TextToImage, membranes: Membranes, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t float [n, c, h, w], t int64 [n], the text of c float [n, tokens, width], what to predict as x_t."""
        config = self._config
        if self._samples is not None:
            samples, text = self._samples.batch(step)
            return samples.latents, samples.timesteps, text, samples.targets
        with attached(model, membranes):
            latents, timesteps, prompts = current_points(
                model, self._text, config.settings, batch_size=config.batch_size, seed=self._seed, step=step
            )
        text, surrogate = self._text[prompts], self._surrogate[prompts]
        return latents, timesteps, text, target_noise(model, latents, timesteps, text, surrogate, -config.eta)


class SimilarityWeighted:
    """The distribution of anchors a for a text c, P(a | c) in proportion to (1 - |cos(a, c)|)^beta (equation 6).

    Args:
        choices: float [any, tokens, width], the texts that a can be; None for any direction, uniformly.
        exponent: beta.
        lengths: Least and greatest length of a direction, relative to c's; uniform between them.
    """

    def __init__(self, choices: Tensor | None, exponent: float, lengths: tuple[float, float]) -> None:
        self._choices = choices
        self._exponent = exponent
        self._lengths = lengths

    def draw(self, texts: Tensor, generator: torch.Generator) -> Tensor:
        """One anchor for each of ``texts``, float [n, tokens, width]; the CPU's generator draws."""
        if self._choices is not None:
            chosen = torch.multinomial(self.weights(texts, self._choices).cpu(), 1, generator=generator)
            return self._choices[chosen[:, 0].to(texts.device)]
        return torch.stack([self._direction(text, generator) for text in texts])

    def weights(self, texts: Tensor, choices: Tensor) -> Tensor:
        """(1 - |cos|)^beta, float [texts, choices]."""
        pairs = texts.flatten(1)[:, None], choices.flatten(1)[None]
        cosines = functional.cosine_similarity(*pairs, dim=-1)
        return (1 - cosines.abs()).clamp(min=0) ** self._exponent

    def _direction(self, text: Tensor, generator: torch.Generator) -> Tensor:
        while True:
            noise = torch.randn(text.shape, generator=generator).to(text)
            if float(torch.rand((), generator=generator)) < float(self.weights(text[None], noise[None])):
                break
        least, greatest = self._lengths
        length = least + (greatest - least) * float(torch.rand((), generator=generator))
        anchor: Tensor = noise * (length * text.norm() / noise.norm())
        return anchor


def _together(factors: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The concepts' factors by layer name, one below the other, on the CPU."""
    return {layer: torch.cat([each[layer] for each in factors]).detach().cpu() for layer in factors[0]}
