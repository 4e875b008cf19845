"""What the stages of a job hand on: an edit, and the outcomes of an attack."""

from dataclasses import dataclass
from pathlib import Path

from attacks.cases import Outcome
from diffusion.files import set_aside
from erasure.edit import Edit
from experiments.job.cost import Cost
from experiments.job.store import RESULT, Store

EDIT = "edit.safetensors"
"""What an edit's file is called in its folder of the store."""


@dataclass(frozen=True)
class StoredEdit:
    """An edit and how it came about.

    Attributes:
        edit: As read back from the disk, whether it was made now or before.
        losses: The objective at every optimiser step.
        cost: What it cost when it was made.
        folder: Where it lies.
        origin: Who made it; see :meth:`experiments.job.store.Store.sign`.
    """

    edit: Edit
    losses: list[float]
    cost: Cost
    folder: Path
    origin: str

    @property
    def name(self) -> str:
        """Hash of what made it; ``none`` if it changes nothing."""
        return self.folder.name if self.edit else "none"

    @property
    def key(self) -> str:
        """Hash of what it changes, which what is made with it depends on; ``none`` if that is nothing."""
        return self.edit.fingerprint()[:16] if self.edit else "none"


@dataclass(frozen=True)
class Attacked:
    """The outcomes of all cases, in their order, and what they cost when they were found.

    Attributes:
        outcomes: One for each case.
        cost: Of all together.
        folder: Where they lie.
        key: Hash of everything that they depend on, and of the last pictures.
        too_long: Of each case whether the protocol leaves its prompt out of the attack.
        origins: Who found them; see :meth:`experiments.job.store.Store.sign`.
    """

    outcomes: list[Outcome]
    cost: Cost
    folder: Path
    key: str
    too_long: list[bool]
    origins: list[str]


def read_edit(store: Store, folder: Path) -> StoredEdit | None:
    """The edit in a ``folder`` of the store; None if it is not complete, or damaged and set aside."""
    stored, path = store.result(folder), folder / EDIT
    if stored is None:
        return None
    try:
        edit = Edit.load(path)
        if edit.fingerprint() != stored.value["edit"]:
            raise ValueError("it is another edit than the result beside it speaks of")
    except FileNotFoundError:
        set_aside(folder / RESULT, f"{path.name} is missing")
        return None
    except ValueError as error:
        set_aside(path, error)
        (folder / RESULT).unlink()
        return None
    return StoredEdit(edit, stored.value["losses"], Cost.of(stored.value), folder, stored.origin)
