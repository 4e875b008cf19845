"""AdvUnlearn: adversarial training of the text encoder, against prefixes that bring the concept back."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.parameters import substituted
from diffusion.prompt_template import Insertion, PromptTemplate
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Trained, noise_error, retaining
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Objective
from erasure.trajectories import FrozenSamples, Trajectories, check_pool


@checked
class AdvUnlearn(Trained):
    """AdvUnlearn (Zhang et al., "Defensive Unlearning with Adversarial Training", NeurIPS 2024).

    L = || eps_theta(z, c_adv) - [eps*(z, 0) - eta (eps*(z, c) - eps*(z, 0))] ||^2
        + w || eps_theta(z_r, c_r) - eps*(z_r, c_r) ||^2 (means),
    c_adv = [p, c] with p = argmin over k token embeddings of || eps_theta(z', [p, c]) - eps*(z', c) ||^2.
    eps* is the frozen model, 0 the empty prompt, c the concept's text, c_r a preserved one; z and z' are points of
    guided sampling trajectories of c, z_r of c_r. theta are the weights of the text encoder: the U-Net stays as it is.
    Each training step attacks anew: p starts as random tokens and takes ``attack_steps`` steps of Adam, every one at
    another z'. In the first ``warmup`` steps c stands in for c_adv. Several targets take turns. The defaults are the
    authors', for nudity.

    Trajectories and the predictions for c are the frozen model's, computed beforehand in batches. That is exact for the
    text encoder; where the U-Net is trained, the authors sample z from the model that is being edited.

    Attributes:
        scope: What is trained: ``text_encoder`` is its layers without the embedding tables; or a part of the U-Net.
            Pruning that names no scope of its own then acts on ``xattn``.
        layers: Only so many layers of the text encoder, from the first; None for all, the final norm included.
        eta: Strength of the negative guidance, relative to the prediction for the empty prompt.
        steps: Optimiser steps (Adam).
        learning_rate: Adam's.
        batch_size: Trajectory points per step, each with a p of its own.
        warmup: Steps without attack.
        tokens: k.
        insertion: Where p stands in c.
        attack_steps: Steps of one attack; 0 trains without attack throughout.
        attack_learning_rate: Adam's in the attack.
        attack: ``adam``; or ``sign``, whose Adam is given the gradient's sign alone (their fast variant).
        accumulate: The attack's gradients add up over its steps, as in the authors' code, which never clears them.
        retain_weight: w; 0 for no such term.
        retain_batch_size: Preserved samples per step.
        sampling_steps: Sampler steps of a trajectory.
        trajectory_guidance: Guidance scale of a trajectory.
        trajectories: None gives every sample of training, attack and retain term a trajectory of its own, as published.
            A number is an approximation: so many of each kind, every step of which is a sample, used again and again.
        published_offset: z is less noisy than t says, as in the authors' code; see ``lagging`` in
            :class:`erasure.trajectories.Trajectories`.
        sampling_batch_size: Trajectories sampled at a time; it changes speed and memory only.
    """

    scope: UNetScope | Literal["text_encoder"] = "text_encoder"
    layers: Annotated[int, Field(ge=1)] | None = None
    eta: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 1000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 1
    warmup: Annotated[int, Field(ge=0)] = 200
    tokens: Annotated[int, Field(ge=1)] = 1
    insertion: Insertion = "prefix_k"
    attack_steps: Annotated[int, Field(ge=0)] = 30
    attack_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    attack: Literal["adam", "sign"] = "adam"
    accumulate: bool = False
    retain_weight: Annotated[float, Field(ge=0)] = 0.3
    retain_batch_size: Annotated[int, Field(ge=1)] = 5
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    trajectory_guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectories: Annotated[int, Field(ge=1)] | None = None
    published_offset: bool = False
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers is not None and self.scope != "text_encoder":
            raise ValueError(
                f"layers is {self.layers} and scope {self.scope!r}; they are the text encoder's, so set "
                "scope=text_encoder or layers=null."
            )
        check_pool(self.trajectories, published_offset=self.published_offset)
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

    def objective(self) -> Objective:
        """The loss, with the retain term if it has weight."""
        objective = AdvUnlearnObjective(self)
        return retaining(objective, self.retain_weight, self.settings, self.retain_batch_size, learns_text=True)

    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """See :class:`erasure.finetuning.Trained`."""
        if self.scope != "text_encoder":
            return FineTuning(self.scope, self.steps, self.learning_rate)
        names = text_layers(model, self.layers)
        return FineTuning("xattn", self.steps, self.learning_rate, text_parameters=names)

    def batches_before(self, step: int) -> int:
        """How many batches of samples the training steps before ``step`` take: one each, and one per attack step."""
        return step + max(0, step - self.warmup) * self.attack_steps


class AdvUnlearnObjective:
    """The loss of :class:`AdvUnlearn`, its attacks, and the frozen predictions that both need."""

    def __init__(self, config: AdvUnlearn) -> None:
        self._config = config

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        prompts = [target for target, _ in concept.turns]
        self._ids = model.tokenize(prompts)
        self._attacked = PromptTemplate.insert(model, prompts, config.tokens, config.insertion)
        self._unconditional = model.encode_prompts([""])
        self._base = {name: value.detach().clone() for name, value in scope_parameters(model, scope).items()}
        batches = [config.batches_before(step) for step in range(steps + 1)]
        turns = [torch.arange(step * config.batch_size, (step + 1) * config.batch_size) for step in range(steps)]
        # An attack aims at the prompts that its training step is about.
        rows = [turn.repeat(batches[step + 1] - batches[step]) for step, turn in enumerate(turns)]
        self._samples = FrozenSamples(
            model,
            model.encode_prompts(prompts),
            config.settings,
            target_guidance=1.0,
            steps=batches[-1],
            batch_size=config.batch_size,
            seed=seed,
            checkpoint=checkpoint,
            prompts=torch.cat(rows) % len(prompts),
        )
        return self._samples.unet_evaluations

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        samples, _ = self._samples.batch(config.batches_before(step))
        if step < config.warmup or not config.attack_steps:
            text = model.encode_ids(self._ids[samples.prompts])
        else:
            template = self._attacked[samples.prompts]
            text = template.encode(model, self._attack(model, template, step))
        unconditional = self._unconditional.expand(len(text), -1, -1)
        with torch.no_grad(), substituted(model, self._base):
            empty = model.predict_noise(samples.latents, samples.timesteps, unconditional).to(samples.targets.dtype)
        targets = empty - config.eta * (samples.targets - empty)
        return noise_error(model, samples.latents, samples.timesteps, text, targets)

    def _attack(self, model: TextToImage, template: PromptTemplate, step: int) -> Tensor:
        """The adversarial embeddings of a training step, float [batch, k, width]."""
        config = self._config
        vocabulary = model.vocabulary.detach()
        tokens = torch.randint(
            len(vocabulary),
            (config.batch_size, config.tokens),
            generator=stream(self._seed, "advunlearn/attack", step),
        )
        prefix = vocabulary[tokens.to(vocabulary.device)].requires_grad_()
        optimizer = torch.optim.Adam([prefix], lr=config.attack_learning_rate)
        first = config.batches_before(step) + 1
        for number in range(first, first + config.attack_steps):
            samples, _ = self._samples.batch(number)
            with torch.enable_grad():
                text = template.encode(model, prefix)
                error = noise_error(model, samples.latents, samples.timesteps, text, samples.targets)
                # Every prefix has its own sample's mean to lower, whatever the batch.
                (gradient,) = torch.autograd.grad(config.batch_size * error, prefix)
            if config.accumulate and prefix.grad is not None:
                gradient = gradient + prefix.grad
            prefix.grad = gradient.sign() if config.attack == "sign" else gradient
            optimizer.step()
        return prefix.detach()


def text_layers(model: TextToImage, layers: int | None) -> tuple[str, ...]:
    """Names of the parameters of the text encoder's first ``layers`` layers; None for all, the final norm included.

    Raises:
        ValueError: It has fewer layers.
    """
    names = tuple(scope_parameters(model, "text_encoder"))
    if layers is None:
        return names
    numbers = {name: int(found[1]) for name in names if (found := re.search(r"\.layers\.(\d+)\.", name))}
    most = max(numbers.values()) + 1
    if layers > most:
        raise ValueError(f"layers is {layers} and the text encoder of {model.name!r} has {most}; give 1 to {most}.")
    return tuple(name for name, number in numbers.items() if number < layers)
