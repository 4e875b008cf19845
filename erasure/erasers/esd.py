"""ESD: fine-tune the concept away with the model's own negative guidance as the teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.parameters import substituted
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Trained, noise_error, retaining
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Objective
from erasure.trajectories import FrozenSamples, Trajectories, check_pool, current_points, target_noise


@checked
class ESD(Trained):
    """Erased Stable Diffusion (Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023).

    L = || eps_theta(x_t, c, t) - [eps*(x_t, r, t) - eta (eps*(x_t, c, t) - eps*(x_t, r, t))] ||^2 (mean), with r the
    empty prompt in their equations 7 and 8; eps* is the frozen model, c the concept's text. x_t lies on a guided
    sampling trajectory of c that stops at a random step. The defaults are the paper's. Several concepts take turns.

    With ``erase_from``, the phrase f of something that c is an attribute of ("cowboy" for "a cowboy hat"), f takes c's
    place in all but the guidance, and x_t lies on trajectories of f:
    L = || eps_theta(x_t, f, t) - [eps*(x_t, f, t) - eta (eps*(x_t, c, t) - eps*(x_t, r, t))] ||^2.

    Attributes:
        scope: What is trained: ``xattn`` is ESD-x, ``noxattn`` ESD-u.
        eta: Strength of the negative guidance, relative to the prediction for r. None counts as the authors' diffusers
            code does, from the prediction for what is trained on: 1, or 2 with ``erase_from``.
        reference: What r is: ``unconditional``, the empty prompt, as in the paper; or ``anchor``, the concept's anchor
            in the same template as c, which leaves alone what the template says besides the concept.
        erase_from: f in every template of c; None trains on c itself.
        steps: Optimiser steps (Adam).
        learning_rate: Adam's.
        batch_size: Trajectory points per step; several targets take turns.
        sampling_steps: Sampler steps of a trajectory.
        trajectory_guidance: Guidance scale of a trajectory.
        trajectory: Whose trajectories: the ``frozen`` model's (the authors' diffusers code), all computed beforehand
            in batches; or the ``current`` model's, the one being edited (the paper), sampled at every step.
        trajectories: None gives every training sample a trajectory of its own, as in the paper. A number is an
            approximation: so many frozen trajectories, every step of which becomes a training sample.
        published_offset: x_t is less noisy than t says, as in the authors' CompVis code; see ``lagging`` in
            :class:`erasure.trajectories.Trajectories`.
        retain_weight: Weight of the retain term on the concept's preserved phrases; 0, as in the paper, for none.
        sampling_batch_size: Trajectories sampled at a time; it changes speed and memory only.
    """

    scope: UNetScope = "xattn"
    eta: Annotated[float, Field(gt=0)] | None = 1.0
    reference: Literal["unconditional", "anchor"] = "unconditional"
    erase_from: Annotated[str, Field(min_length=1)] | None = None
    steps: Annotated[int, Field(ge=1)] = 1000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 1
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    trajectory_guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectory: Literal["frozen", "current"] = "current"
    trajectories: Annotated[int, Field(ge=1)] | None = None
    published_offset: bool = False
    retain_weight: Annotated[float, Field(ge=0)] = 0.0
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_pool(self.trajectories, trajectory=self.trajectory, published_offset=self.published_offset)
        return self

    @property
    def strength(self) -> float:
        """Eta as a number."""
        if self.eta is not None:
            return self.eta
        return 1.0 if self.erase_from is None else 2.0

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

    def objective(self) -> Objective:
        """The loss, with the retain term if it has weight."""
        trajectories = replace(self.settings, lagging=False)
        return retaining(ESDObjective(self), self.retain_weight, trajectories, self.batch_size)

    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """See :class:`erasure.finetuning.Trained`."""
        return FineTuning(self.scope, self.steps, self.learning_rate)


class ESDObjective:
    """The loss of :class:`ESD` and the frozen predictions that it needs."""

    def __init__(self, config: ESD) -> None:
        self._config = config
        self._samples: FrozenSamples | None = None

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        targets, anchors = zip(*concept.turns, strict=True)
        self._text = model.encode_prompts(targets)
        references = model.encode_prompts(anchors) if config.reference == "anchor" else None
        self._attribute: Tensor | None = None
        if config.erase_from is not None:
            if concept.also:
                raise ValueError(
                    f"erase_from is {config.erase_from!r} and concept {concept.name!r} consists of several; an "
                    "attribute is erased from one thing at a time, so set concept.also=[] or erase_from=null."
                )
            self._attribute = self._text
            self._text = model.encode_prompts(replace(concept, anchor=config.erase_from).target_anchors)
        if config.trajectory == "frozen":
            self._samples = FrozenSamples(
                model,
                self._text,
                config.settings,
                target_guidance=-config.strength,
                reference=references,
                attribute=self._attribute,
                steps=steps,
                batch_size=config.batch_size,
                seed=seed,
                checkpoint=checkpoint,
            )
            return self._samples.unet_evaluations
        self._reference = model.encode_prompts([""]).expand_as(self._text) if references is None else references
        self._base = {name: value.detach().clone() for name, value in scope_parameters(model, scope).items()}
        return 0

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        if self._samples is not None:
            samples, text = self._samples.batch(step)
            return noise_error(model, samples.latents, samples.timesteps, text, samples.targets)
        config = self._config
        latents, timesteps, prompts = current_points(
            model, self._text, config.settings, batch_size=config.batch_size, seed=self._seed, step=step
        )
        text = self._text[prompts]
        reference = self._reference[prompts]
        attribute = None if self._attribute is None else self._attribute[prompts]
        with substituted(model, self._base):
            targets = target_noise(model, latents, timesteps, text, reference, -config.strength, attribute)
        return noise_error(model, latents, timesteps, text, targets)
