"""What erasers that learn share: training weights under an objective, the retain term, and the way to an erasure."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.finite import is_finite, require_finite
from diffusion.model import TextToImage
from diffusion.parameters import named_parameters, substituted
from diffusion.precision import at_least_float32
from diffusion.streams import derived_seed
from diffusion.training import fit
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Eraser, Erasure, Objective, Pruning, check_pair
from erasure.trajectories import FrozenSamples, Trajectories, remembered, stage

CHECKPOINT_EVERY = 50
"""Optimiser steps that a killed run may lose."""

_FLOAT16_SCALES = (2.0**16, 2.0**8, 1.0, 2.0**-8)
"""What losses are multiplied with on the way to gradients in float16, where those of a mean over many pixels underflow;
the first that overflows nowhere is taken."""

_NO_SCORES = "a weight of the model is damaged, or its arithmetic overflows"


@dataclass(frozen=True)
class FineTuning:
    """How weights are trained.

    Attributes:
        scope: Which ones.
        steps: Optimiser steps.
        learning_rate: Of Adam, or of AdamW where weights decay.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest norm of the gradient, None for any.
        token_rows: If given, the rows of the token embedding table, int64 [k], that are trained in place of the scope.
        text_parameters: If given, the names of the text encoder's parameters that are trained in place of the scope.
    """

    scope: UNetScope
    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None
    token_rows: Tensor | None = None
    text_parameters: tuple[str, ...] | None = None

    def parameters(self, model: TextToImage) -> dict[str, nn.Parameter]:
        """What is trained, by name; not for ``token_rows``."""
        if self.text_parameters is None:
            return scope_parameters(model, self.scope)
        named = named_parameters(model)
        return {name: named[name] for name in self.text_parameters}


class Retaining:
    """An objective with a retain term.

    L + weight * || eps_theta(x_t, p, t) - eps_theta*(x_t, p, t) ||^2 (mean), with x_t on the frozen model's
    trajectories of the preserved phrases p.

    Args:
        objective: What L is.
        weight: Of the retain term.
        trajectories: How x_t is sampled.
        batch_size: Preserved samples per step.
        learns_text: The text encoder changes, so that p is encoded anew at every step.
    """

    def __init__(
        self,
        objective: Objective,
        weight: float,
        trajectories: Trajectories,
        batch_size: int,
        *,
        learns_text: bool = False,
    ) -> None:
        self._objective = objective
        self._weight = weight
        self._trajectories = trajectories
        self._batch_size = batch_size
        self._learns_text = learns_text

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        require_preserved(concept, self._weight)
        spent = self._objective.prepare(model, concept, scope=scope, steps=steps, seed=seed, checkpoint=checkpoint)
        self._ids = model.tokenize(concept.preserved_prompts)
        self._samples = FrozenSamples(
            model,
            model.encode_prompts(concept.preserved_prompts),
            self._trajectories,
            target_guidance=1.0,
            steps=steps,
            batch_size=self._batch_size,
            seed=derived_seed(seed, "retaining/samples"),
            checkpoint=stage(checkpoint, "retain"),
        )
        return spent + self._samples.unet_evaluations

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        samples, text = self._samples.batch(step)
        if self._learns_text:
            text = model.encode_ids(self._ids[samples.prompts])
        kept = prediction_error(model, samples.latents, samples.timesteps, text, samples.targets)
        return self._objective.loss(model, step) + self._weight * kept


def retaining(
    objective: Objective, weight: float, trajectories: Trajectories, batch_size: int, *, learns_text: bool = False
) -> Objective:
    """The objective with a retain term, if that has weight; see :class:`Retaining`."""
    if not weight:
        return objective
    return Retaining(objective, weight, trajectories, batch_size, learns_text=learns_text)


def require_preserved(concept: Concept, weight: float, name: str = "retain_weight") -> None:
    """Refuse a term on preserved phrases, with its weight's ``name``, where there are none.

    Raises:
        ValueError: The concept names no preserved phrases.
    """
    if not concept.preserved_prompts:
        raise ValueError(
            f"{name} is {weight} and concept {concept.name!r} names no preserved phrases; "
            f"add some to concept.preserved or set {name} to 0."
        )


def prediction_error(model: TextToImage, latents: Tensor, timesteps: Tensor, text: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the model's noise prediction against ``targets``, float [n, c, h, w]; a scalar.

    It is in float32 at least.
    """
    precise = at_least_float32(targets.dtype)
    return functional.mse_loss(model.predict(latents, timesteps, text).to(precise), targets.to(precise))


def gradient(model: TextToImage, losses: Iterator[Tensor], weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of the sum of ``losses`` by parameter name, summed in float32 at least.

    Args:
        model: Through which the losses go.
        losses: Scalars, each computed when its turn comes.
        weights: Trainable parameters of the model.

    Raises:
        NotFiniteError: A loss or a gradient is infinite or NaN.
    """
    total = {name: torch.zeros_like(weight, dtype=at_least_float32(weight.dtype)) for name, weight in weights.items()}
    scales = _FLOAT16_SCALES if (model.autocast or model.dtype) is torch.float16 else (1.0,)
    for loss in losses:
        require_finite(loss.detach(), "A loss whose gradient scores weights", _NO_SCORES)
        for name, part in zip(total, _scaled_gradient(loss, list(weights.values()), scales), strict=True):
            total[name] += part
        # Its graph is not to be in memory beside the next one's.
        del loss
    return total


def _scaled_gradient(loss: Tensor, weights: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """The gradients of one loss, in float32 at least, which went through the network times the first fitting scale."""
    for scale in scales:
        last = scale == scales[-1]
        parts = torch.autograd.grad(loss * scale, weights, materialize_grads=True, retain_graph=not last)
        if last or all(map(is_finite, parts)):
            break
    for part in parts:
        require_finite(part, "A gradient that scores weights", _NO_SCORES)
    return [part.to(at_least_float32(part.dtype)) / scale for part in parts]


def require_trainable_precision(model: TextToImage) -> None:
    """Refuse weights in half precision: Adam's steps are smaller than half a unit in their last place and get lost.

    Raises:
        ValueError: The U-Net's weights are float16 or bfloat16.
    """
    if model.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"The weights of {model.name!r} are {str(model.dtype).removeprefix('torch.')} and training needs float32; "
            "take model.precision=bf16_autocast (float32 weights, half-precision arithmetic) or fp32."
        )


def minimise(
    model: TextToImage,
    loss: Callable[[int], Tensor],
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    label: str,
    checkpoint: Path | None,
    clip_norm: float | None = None,
    learning_rate_factor: Callable[[int], float] | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[list[float], int]:
    """:func:`diffusion.training.fit` with a count of the model's U-Net evaluations that survives a kill.

    Returns:
        The losses, and the evaluations spent on all steps.
    """
    spent = torch.zeros((), dtype=torch.int64)
    counted = model.unet_evaluations

    def finish_step(_: int) -> None:
        nonlocal counted
        if after_step is not None:
            after_step()
        spent.add_(model.unet_evaluations - counted)
        counted = model.unet_evaluations

    losses = fit(
        # The count is saved and restored with what is trained.
        [*trained, spent],
        loss,
        steps=steps,
        optimizer=optimizer,
        label=label,
        learning_rate_factor=learning_rate_factor,
        clip_norm=clip_norm,
        checkpoint=checkpoint,
        checkpoint_every=CHECKPOINT_EVERY,
        after_step=finish_step,
        scaler=torch.amp.GradScaler(model.device.type) if model.autocast is torch.float16 else None,
    )
    return losses, int(spent)


def train_beside(
    model: TextToImage,
    loss: Callable[[int], Tensor],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    label: str,
    part: str,
    checkpoint: Path | None,
    clip_norm: float | None = None,
    learning_rate_factor: Callable[[int], float] | None = None,
) -> tuple[dict[str, Tensor], list[float], int]:
    """:func:`minimise` over tensors that are no parameters of the model, kept under the name ``part`` when done.

    Returns:
        The trained tensors by their names, the losses, and the U-Net evaluations.
    """

    def train() -> dict[str, Tensor]:
        losses, spent = minimise(
            model,
            loss,
            list(tensors.values()),
            optimizer,
            steps=steps,
            label=label,
            checkpoint=stage(checkpoint, f"training-{part}"),
            clip_norm=clip_norm,
            learning_rate_factor=learning_rate_factor,
        )
        told = {"losses": torch.tensor(losses, dtype=torch.float64), "spent": torch.tensor(spent)}
        return {**{name: tensor.detach() for name, tensor in tensors.items()}, **told}

    # What a run spent before it was killed is in its training's own count alone.
    kept, _ = remembered(checkpoint, part, train, model)
    return {name: kept[name] for name in tensors}, kept["losses"].tolist(), int(kept["spent"])


def fine_tune(
    model: TextToImage,
    objective: Objective,
    training: FineTuning,
    *,
    checkpoint: Path | None,
    first_step: int = 0,
    kept: Mapping[str, Tensor] | None = None,
) -> Erasure:
    """Train the weights of a scope on a prepared objective; ``model`` is left as it was.

    Args:
        model: Whose weights.
        objective: Prepared for ``first_step + training.steps`` steps.
        training: What is trained and how.
        checkpoint: File that a killed run continues from.
        first_step: The objective's step that training starts with.
        kept: Masks by parameter name; where False, weights are zero from the start and stay so.
    """
    require_trainable_precision(model)
    parameters = training.parameters(model)
    base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    pruned = {name: ~mask.to(parameters[name].device) for name, mask in (kept or {}).items()}

    @torch.no_grad()
    def zero_pruned() -> None:
        for name, where in pruned.items():
            parameters[name].masked_fill_(where, 0)

    weights = list(parameters.values())
    try:
        with model.trainable(weights):
            zero_pruned()
            losses, spent = minimise(
                model,
                lambda step: objective.loss(model, first_step + step),
                weights,
                torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=training.weight_decay),
                steps=training.steps,
                label="fine-tuning",
                checkpoint=checkpoint,
                clip_norm=training.clip_norm,
                after_step=zero_pruned,
            )
        metadata = {} if training.text_parameters is None else {"scope": "text_encoder"}
        return Erasure(Edit.from_weights(base, parameters, metadata), losses, spent)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(base[name])


def fine_tune_tokens(
    model: TextToImage, objective: Objective, training: FineTuning, rows: Tensor, *, checkpoint: Path | None
) -> Erasure:
    """Train ``rows`` int64 [k] of the token embedding table on a prepared objective; ``model`` is left as it was."""
    require_trainable_precision(model)
    [(name, table)] = scope_parameters(model, "token_embedding").items()
    embeddings = table.detach()[rows].requires_grad_()

    def loss(step: int) -> Tensor:
        with substituted(model, {name: table.detach().index_copy(0, rows, embeddings)}):
            return objective.loss(model, step)

    losses, spent = minimise(
        model,
        loss,
        [embeddings],
        torch.optim.AdamW([embeddings], lr=training.learning_rate, weight_decay=training.weight_decay),
        steps=training.steps,
        label="fine-tuning",
        checkpoint=checkpoint,
        clip_norm=training.clip_norm,
    )
    edit = Edit.from_rows(name, rows, embeddings, table.shape, {"scope": "token_embedding"})
    return Erasure(edit, losses, spent)


class Trained(ABC):
    """An eraser that minimises an objective: over weights, or over a mask if the pruning learns one."""

    has_objective: ClassVar[bool] = True

    @abstractmethod
    def objective(self) -> Objective:
        """What is minimised, not yet prepared."""

    @abstractmethod
    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """Which weights are trained and how, where the pruning learns no mask."""

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        objective, training = self.objective(), self.training(model, concept)
        scope = training.scope
        if pruning.needs_objective:
            pruned = pruning.prune(model, concept, objective, scope=scope, seed=seed, checkpoint=checkpoint)
            return described(pruned, self, pruning, model, concept, scope=scope, seed=seed)
        spent = objective.prepare(model, concept, scope=scope, steps=training.steps, seed=seed, checkpoint=checkpoint)
        weights = stage(checkpoint, "weights")
        trained = (
            fine_tune(model, objective, training, checkpoint=weights)
            if training.token_rows is None
            else fine_tune_tokens(model, objective, training, training.token_rows, checkpoint=weights)
        )
        erasure = Erasure(trained.edit, trained.losses, spent + trained.unet_evaluations)
        return prune_after(erasure, self, pruning, model, concept, scope=scope, seed=seed, checkpoint=checkpoint)


def prune_after(
    erasure: Erasure,
    eraser: Eraser,
    pruning: Pruning,
    model: TextToImage,
    concept: Concept,
    *,
    scope: UNetScope,
    seed: int,
    checkpoint: Path | None,
) -> Erasure:
    """Prune the erased model by a strategy that needs no objective, and describe the result.

    Raises:
        ValueError: The strategy needs an objective.
    """
    check_pair(eraser, pruning)
    with erasure.edit.applied(model):
        pruned = pruning.prune(model, concept, None, scope=scope, seed=seed, checkpoint=checkpoint)
    both = Erasure(
        erasure.edit.then(pruned.edit, model),
        [*erasure.losses, *pruned.losses],
        erasure.unet_evaluations + pruned.unet_evaluations,
    )
    return described(both, eraser, pruning, model, concept, scope=scope, seed=seed)


def described(
    erasure: Erasure,
    eraser: Eraser,
    pruning: Pruning,
    model: TextToImage,
    concept: Concept,
    *,
    scope: UNetScope,
    seed: int,
) -> Erasure:
    """The same erasure, whose edit says how it was made and from which model."""
    metadata = {
        "method": type(eraser).__name__,
        "pruning": type(pruning).__name__,
        "concept": _as_json(concept),
        "base": model.fingerprint(),
        "scope": scope,
        "seed": seed,
        "config": {"eraser": _as_json(eraser), "pruning": _as_json(pruning)},
        **erasure.edit.metadata,
    }
    return Erasure(erasure.edit.with_metadata(metadata), erasure.losses, erasure.unet_evaluations)


def _as_json(configurable: Any) -> Any:
    return json.loads(json.dumps(asdict(configurable), default=str))
