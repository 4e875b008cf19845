"""Erased models of other projects, attacked and judged as they are."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.additions.membranes import Merge
from erasure.checkpoints import edit_of
from erasure.concept import Concept
from erasure.finetuning import prune_after
from erasure.imports.reading import read_checkpoint
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning


def _readable(path: Path) -> Path:
    read_checkpoint(path.expanduser())
    return path.expanduser()


@checked
class Imported:
    """Takes the weights of a published checkpoint; :mod:`erasure.checkpoints` lists the formats.

    Attributes:
        path: The checkpoint, a file or a folder; it is opened at once, so that a wrong one is known at once.
        scope: What a pruning strategy without a scope of its own prunes.
        merge: For SPM's files, what a permeability m makes of a membrane: ``exact`` m u d, the paper's, or
            ``published`` m^2 u d, the authors' code's; see :class:`erasure.additions.membranes.Membranes`.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: What lies there is damaged, holds code, or is of a kind that is no change of weights.
    """

    has_objective: ClassVar[bool] = False

    path: Annotated[Path, AfterValidator(_readable)]
    scope: UNetScope = "xattn"
    merge: Merge = "exact"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`.

        Raises:
            ValueError: The checkpoint does not fit ``model``.
        """
        erasure = Erasure(edit_of(self.path, model, merge=self.merge), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)
