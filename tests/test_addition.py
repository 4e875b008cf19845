"""What every addition of an edit goes through, on one made for these tests."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from diffusion.guard import Guard
from diffusion.model import TextToImage
from erasure.addition import Addition, addition_class, set_guard
from erasure.edit import Edit
from erasure.export import export

PROMPTS = ["a church", "a tench"]


class Shift(Addition):
    """Adds a vector to what the first convolution gives."""

    kind = "shift"

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    def settings(self) -> dict[str, Any]:
        return {"size": len(self.vector)}

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        if len(tensors["vector"]) != settings["size"]:
            raise ValueError("the vector has another size.")
        return cls(tensors["vector"])

    def attach(self, model: TextToImage) -> Callable[[], None]:
        vector = self.vector[:, None, None]
        return model.network.conv_in.register_forward_hook(lambda _module, _inputs, output: output + vector).remove


class Guarding(Shift):
    """A guard that does nothing."""

    def attach(self, model: TextToImage) -> Callable[[], None]:
        return set_guard(model, Guard())


@pytest.fixture
def edit() -> Edit:
    return Edit({}, {"method": "test"}, (Shift(torch.linspace(-1, 1, 16)),))


def noise_of(model: TextToImage) -> Tensor:
    latents = model.initial_latents([1, 2])
    return model.predict(latents, 500, model.encode_prompts(PROMPTS))


def test_an_addition_acts_while_it_is_applied_and_leaves_no_trace(tiny_model: TextToImage, edit: Edit):
    before = noise_of(tiny_model)
    with edit.applied(tiny_model):
        assert not torch.equal(noise_of(tiny_model), before)
    assert torch.equal(noise_of(tiny_model), before)


def test_the_unedited_model_beside_it_is_without_the_addition(tiny_model: TextToImage, edit: Edit):
    before = noise_of(tiny_model)
    with edit.applied(tiny_model):
        acting = noise_of(tiny_model)
        assert torch.equal(noise_of(edit.unedited(tiny_model)), before)
        assert torch.equal(noise_of(tiny_model), acting)
    assert torch.equal(noise_of(tiny_model), before)


def test_an_edit_with_an_addition_is_read_back_as_it_was_saved(tiny_model: TextToImage, edit: Edit, tmp_path: Path):
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    assert read.size_bytes == edit.size_bytes == 16 * 4
    assert read.metadata["method"] == "test"
    with edit.applied(tiny_model):
        expected = noise_of(tiny_model)
    with read.applied(tiny_model):
        assert torch.equal(noise_of(tiny_model), expected)


def test_an_edit_after_another_keeps_the_additions_of_both(tiny_model: TextToImage, edit: Edit):
    name, weight = next(iter(tiny_model.network.named_parameters()))
    both = edit.then(Edit.from_weights({name: weight}, {name: weight * 2}), tiny_model)
    assert both.additions == edit.additions
    assert set(both.entries) == {name}
    assert bool(edit)
    assert not Edit.identity()


def test_a_damaged_addition_is_refused(edit: Edit, tmp_path: Path):
    edit.additions[0].settings = lambda: {"size": 3}  # type: ignore[method-assign]
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="the vector has another size"):
        Edit.load(tmp_path / "edit.safetensors")


def test_an_addition_cannot_be_exported(tiny_model: TextToImage, edit: Edit, tmp_path: Path):
    with pytest.raises(ValueError, match="adds shift to the model, which no plain pipeline folder can hold"):
        export(tiny_model, edit, tmp_path / "folder")


def test_a_model_takes_one_guard(tiny_model: TextToImage):
    guards = (Guarding(torch.zeros(1)), Guarding(torch.zeros(1)))
    with pytest.raises(ValueError, match="'tiny' already has a Guard and takes one guard"):
        Edit({}, {}, guards).apply(tiny_model)
    assert tiny_model.guard is None
    with Edit({}, {}, guards[:1]).applied(tiny_model):
        assert tiny_model.guard is not None
    assert tiny_model.guard is None


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'os' is no kind of addition"):
        addition_class("os")
