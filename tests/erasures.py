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
