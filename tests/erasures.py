"""Two erasures side by side."""

import torch

from erasure.protocols import Erasure


def assert_same_erasure(one: Erasure, other: Erasure) -> None:
    """Losses, cost and every stored tensor, bit for bit."""
    assert one.losses == other.losses
    assert one.unet_evaluations == other.unet_evaluations
    assert one.edit.entries.keys() == other.edit.entries.keys()
    for name, entry in one.edit.entries.items():
        assert all(torch.equal(part, other.edit.entries[name].parts[key]) for key, part in entry.parts.items())
    for added, same in zip(one.edit.additions, other.edit.additions, strict=True):
        assert (added.kind, added.settings()) == (same.kind, same.settings())
        assert added.tensors().keys() == same.tensors().keys()
        assert all(torch.equal(value, same.tensors()[name]) for name, value in added.tensors().items())
