"""The change of one parameter: how little is stored of it, and what it makes of the original."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.finite import require_finite

Fill = Literal["zero", "mean", "resampled"]
"""What pruned weights become; zeros tell whoever holds the model where the concept was (arXiv 2603.06640).

- ``zero``: exactly zero.
- ``mean``: the mean of the weights that are left in their tensor.
- ``resampled``: (a - b) / sqrt(2) with a and b two weights that are left in their tensor, drawn by the entry's seed:
  as large as those, and the same to the bit on every machine.
"""


@dataclass(frozen=True, eq=False)
class Entry:
    """The change of one parameter.

    Attributes:
        kind: How ``parts`` give the new value; one of those in ``_DECODERS``.
        shape: The parameter's shape.
        parts: What is stored, by part name; the part named "" is stored under the parameter's own name. Entries that
            hold the same dict share it on disk as well.
        fill: For masks, what pruned weights become.
        seed: Of what is drawn in that.
    """

    kind: str
    shape: tuple[int, ...]
    parts: dict[str, Tensor]
    fill: Fill = "zero"
    seed: int = 0

    def value(self, original: Tensor) -> Tensor:
        """The parameter's new value, of the original's shape, dtype and device.

        Raises:
            NotFiniteError: It is infinite or NaN somewhere.
        """
        changed = _DECODERS[self.kind](self, original).to(original.device, original.dtype)
        require_finite(changed, f"What the edit makes of a parameter in {original.dtype}", DIVERGED)
        return changed

    def mask(self) -> Tensor:
        """For masks, which weights are kept; bool of the parameter's shape, on the CPU."""
        size = int(np.prod(self.shape))
        if self.kind == "bits":
            bits = np.unpackbits(self.parts["bits"].numpy(), count=size)
            return torch.from_numpy(bits.astype(bool)).reshape(self.shape)
        kept = torch.ones(size, dtype=torch.bool)
        kept[self.parts["pruned"].long()] = False
        return kept.reshape(self.shape)

    def is_sound(self) -> bool:  # noqa: PLR0911 - one case per kind of entry
        """Whether the kind is known and the parts are what it and the shape call for."""
        if self.kind not in _DECODERS or self.fill not in get_args(Fill):
            return False
        size = int(np.prod(self.shape))
        if self.kind == "dense":
            return set(self.parts) == {""} and tuple(self.parts[""].shape) == self.shape
        if self.kind == "rows":
            rows, values = self.parts.get("rows"), self.parts.get("values")
            if rows is None or values is None or rows.dtype != torch.int64 or rows.ndim != 1:
                return False
            fits = tuple(values.shape) == (len(rows), *self.shape[1:])
            return fits and bool(((rows >= 0) & (rows < self.shape[0])).all())
        if self.kind == "right_multiplied":
            square = self.parts.get("T")
            return square is not None and len(self.shape) == 2 and tuple(square.shape) == (self.shape[1],) * 2
        if self.kind == "bits":
            bits = self.parts.get("bits")
            return bits is not None and bits.dtype == torch.uint8 and len(bits) == (size + 7) // 8
        pruned = self.parts.get("pruned")
        return pruned is not None and bool(((pruned >= 0) & (pruned < size)).all())


def _masked(entry: Entry, original: Tensor) -> Tensor:
    kept = entry.mask().to(original.device)
    left = original[kept]
    if entry.fill == "zero" or not len(left):
        return torch.where(kept, original, 0)
    if entry.fill == "mean":
        return torch.where(kept, original, left.float().mean().to(original.dtype))
    # Part of the file format, so torch's own seeding; the entries' seeds come from a stream.
    generator = torch.Generator().manual_seed(entry.seed)
    drawn = torch.randint(len(left), (2, kept.numel() - len(left)), generator=generator).to(original.device)
    filled = original.clone()
    filled[~kept] = ((left[drawn[0]].double() - left[drawn[1]].double()) / math.sqrt(2)).to(original.dtype)
    return filled


def _right_multiplied(entry: Entry, original: Tensor) -> Tensor:
    # In float64, so that the result is the same on every machine but for its last bit.
    return original.double() @ entry.parts["T"].to(original.device, torch.float64)


def _with_rows(entry: Entry, original: Tensor) -> Tensor:
    rows, values = (entry.parts[part].to(original.device) for part in ("rows", "values"))
    return original.index_copy(0, rows, values.to(original.dtype))


_DECODERS: dict[str, Callable[[Entry, Tensor], Tensor]] = {
    "dense": lambda entry, original: entry.parts[""],
    "rows": _with_rows,
    "right_multiplied": _right_multiplied,
    "bits": _masked,
    "indices": _masked,
}
"""The new value of a parameter by kind of entry: the tensor itself; some rows of it; W T; a mask as bits, or as what it
prunes."""

DIVERGED = "the erasure has diverged, or the file that it comes from is damaged"
"""Why a value may be infinite or NaN."""

MASKS = ("bits", "indices")
"""The kinds of entry that are masks."""


def encode_mask(kept: Tensor, fill: Fill, seed: int) -> Entry:
    """The entry of a mask (bool, True where kept): its bits or the indices of what is pruned, whichever is smaller."""
    flat = kept.cpu().reshape(-1)
    pruned = (~flat).nonzero().reshape(-1).to(torch.int32)
    bits = torch.from_numpy(np.packbits(flat.numpy()))
    if pruned.nbytes < bits.nbytes:
        return Entry("indices", tuple(kept.shape), {"pruned": pruned}, fill, seed)
    return Entry("bits", tuple(kept.shape), {"bits": bits}, fill, seed)
