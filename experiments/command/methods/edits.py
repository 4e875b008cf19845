"""What an eraser and a pruning strategy must do, tried on the tiny model."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.parameters import UNetScope, scope_parameters
from erasure.protocols import Erasure, Objective
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.off import Off
from experiments.command.errors import CommandError
from experiments.command.methods.trial import Trial, blamed, quiet, require, require_signature

_PROMPTS = ("a church", "a picture")

Make = Callable[[TextToImage, Path], Any]
"""Makes an erasure with a model; parts of it may be kept in files that begin with the path."""


def check_eraser(trial: Trial, folder: Path) -> Iterator[str]:
    """Yield what is in order.

    Args:
        trial: The eraser in its job.
        folder: For files.

    Raises:
        CommandError: Something is not.
    """
    eraser, concept = trial.method, trial.job.concept
    require(
        isinstance(eraser.has_objective, bool),
        f"{trial.named}: has_objective is {eraser.has_objective!r}; it must be True or False.",
    )
    require_signature(trial, "erase", "model", "concept", "pruning", seed=None, checkpoint=None)
    model = trial.job.model.load()

    def erase(with_pruning: Any) -> Make:
        return lambda model, path: eraser.erase(model, concept, with_pruning, seed=0, checkpoint=path)

    edit = yield from _check_edit(trial, "erase", erase(Off()), model, folder)
    sparse = _made(trial, "erase with pruning=magnitude", erase(Magnitude()), model, folder / "magnitude")
    require(
        sparse.edit.fingerprint() != edit.fingerprint(),
        f"{trial.named}: erase makes the same edit with pruning=magnitude as without; end it with "
        "erasure.finetuning.prune_after, or call pruning.prune yourself.",
    )
    yield "pruning=magnitude prunes what it erased"
    if eraser.has_objective:
        yield from _check_objective(trial, erase, model, folder / "objective")


@dataclass
class _Asked:
    """A pruning strategy that only remembers which objective it is given."""

    needs_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # No fields: what an edit says of its pruning is to have none of it.
        self.objective: Objective | None = None
        self.scope: UNetScope = "xattn"

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
        self.objective, self.scope = objective, scope
        return Erasure(Edit.identity(), [], 0)


def _check_objective(trial: Trial, erase: Callable[[Any], Make], model: TextToImage, folder: Path) -> Iterator[str]:
    asked = _Asked()
    _made(trial, "erase with pruning=on", erase(asked), model, folder)
    objective = asked.objective
    if objective is None:
        raise CommandError(
            f"{trial.named}: has_objective is True, but erase hands no objective to a pruning that needs one; call "
            "pruning.prune(model, concept, objective, ...) there, as erasure.finetuning.Trained does."
        )
    weights = scope_parameters(model, asked.scope)
    with quiet(), blamed(f"{trial.named}: the objective"):
        objective.prepare(model, trial.job.concept, scope=asked.scope, steps=1, seed=0, checkpoint=None)
        with model.trainable(list(weights.values())):
            loss = objective.loss(model, 0)
            require(
                loss.ndim == 0 and bool(torch.isfinite(loss)),
                f"{trial.named}: the loss of its objective is {loss.dtype} {list(loss.shape)}; it must be one finite "
                "number.",
            )
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    require(
        any(gradient is not None for gradient in gradients),
        f"{trial.named}: the loss of its objective does not depend on the weights of scope {asked.scope!r}.",
    )
    yield f"its objective has a loss that the weights of {asked.scope} can be trained on, so pruning=on can be too"


def check_pruning(trial: Trial, folder: Path) -> Iterator[str]:
    """Yield what is in order; see :func:`check_eraser`."""
    pruning, job = trial.method, trial.job
    require(
        isinstance(pruning.needs_objective, bool),
        f"{trial.named}: needs_objective is {pruning.needs_objective!r}; it must be True or False.",
    )
    require_signature(trial, "prune", "model", "concept", "objective", scope=None, seed=None, checkpoint=None)

    def prune(model: TextToImage, path: Path) -> Any:
        # Learned under the objective of ESD, of which none is prepared yet.
        objective = job.eraser.objective() if pruning.needs_objective else None  # type: ignore[attr-defined]
        return pruning.prune(model, job.concept, objective, scope="xattn", seed=0, checkpoint=path)

    edit = yield from _check_edit(trial, "prune", prune, job.model.load(), folder)
    pruned = sum(int((~kept).sum()) for kept in edit.masks().values())
    yield f"{pruned:,} weights are pruned" if pruned else "no weight is pruned, which an edit without masks may mean"


def _check_edit(trial: Trial, name: str, make: Make, model: TextToImage, folder: Path) -> Generator[str, None, Edit]:
    before = model.fingerprint()
    base = _drawn(model)
    erasure = _made(trial, name, make, model, folder / "first")
    require(
        model.fingerprint() == before,
        f"{trial.named}: {name} changes the model; it must leave it as it was and return the change as an Edit.",
    )
    yield f"{name} returns an Erasure, and leaves the model as it was"
    again = _made(trial, name, make, model, folder / "second")
    require(
        again.edit.fingerprint() == erasure.edit.fingerprint(),
        f"{trial.named}: {name} with seed=0 makes another edit the second time; draw what is random from "
        "diffusion.streams.stream(seed, ...).",
    )
    yield "the same seed makes the same edit"
    path = folder / "edit.safetensors"
    with blamed(f"Saving and applying the edit of {trial.named}"):
        erasure.edit.save(path)
        stored = Edit.load(path)
        with erasure.edit.applied(model):
            changed = _drawn(model)
        reverted, left = model.fingerprint(), _drawn(model)
        with stored.applied(model):
            restored = _drawn(model)
    require(
        reverted == before and torch.equal(left, base),
        f"{trial.named}: the model is another one after its edit is reverted; what an addition attaches, the function "
        "that attach returns must take away.",
    )
    require(
        torch.equal(restored, changed),
        f"{trial.named}: its edit draws other pictures once it is read back from its file; settings and tensors of an "
        "addition must hold all that it needs.",
    )
    yield "the edit is reverted bit for bit, and is the same when it is read back from its file"
    if torch.equal(changed, base):
        yield "but the edit changes no picture"
    return erasure.edit


def _made(trial: Trial, name: str, make: Make, model: TextToImage, folder: Path) -> Erasure:
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), blamed(f"{trial.named}: {name}"):
        erasure = make(model, folder / "work")
    if not isinstance(erasure, Erasure):
        raise CommandError(
            f"{trial.named}: {name} returned {type(erasure).__name__}; it must return an erasure.protocols.Erasure."
        )
    require(
        isinstance(erasure.edit, Edit),
        f"{trial.named}: the edit of its Erasure is {type(erasure.edit).__name__}; it must be an erasure.edit.Edit.",
    )
    require(
        all(isinstance(loss, float) and math.isfinite(loss) for loss in erasure.losses),
        f"{trial.named}: the losses of its Erasure must be finite numbers, as loss.item() gives them.",
    )
    spent = erasure.unet_evaluations
    require(
        isinstance(spent, int) and spent >= 0,
        f"{trial.named}: unet_evaluations of its Erasure is {spent!r}; it must be a count, 0 or more.",
    )
    return replace(erasure, losses=list(erasure.losses))


def _drawn(model: TextToImage) -> Tensor:
    return model.generate(_PROMPTS, seeds=[0, 1], steps=2, guidance=3.0)
