"""What tests of several files ask of erasures."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion.model import TextToImage
from erasure.edit import Edit
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


def assert_comes_back_from_its_file(edit: Edit, model: TextToImage, prompts: Sequence[str], folder: Path) -> None:
    """Saved and loaded, the edit lets ``model`` draw pictures of the shape that it draws without."""
    seeds = list(range(1, len(prompts) + 1))
    plain = model.generate(prompts, seeds=seeds, steps=2, guidance=3.0)
    edit.save(folder / "edit.safetensors")
    with Edit.load(folder / "edit.safetensors").applied(model):
        pictures = model.generate(prompts, seeds=seeds, steps=2, guidance=3.0)
    assert pictures.shape == plain.shape
