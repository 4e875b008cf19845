"""Every method of the project on a tiny Stable Diffusion 3: it works, or says that it does not and what does."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from diffusion.model import TextToImage
from erasure.additions.safe_guidance import SafeGuidance, SafetyGuard
from erasure.parameters import scope_parameters
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.structures import structure_of
from tests.oracles import sld as oracle
from tests.sd3_methods import (
    PROMPTS,
    assert_attack_works,
    assert_eraser_works_or_says_what_it_needs,
    assert_pruning_works,
)
from tests.test_sdxl import CONCEPT, choices, in_the_repository  # noqa: F401
from tests.tiny_sd3 import make_tiny_sd3

FITTED = "model.family=sd3"


@pytest.fixture
def model(tokenizer_folder: Path) -> TextToImage:
    return TextToImage(make_tiny_sd3(tokenizer_folder), name="tiny-sd3", scheduler=None, t5_tokens=0)


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("eraser", "retrained", "uce_debias"))
def test_every_eraser_works_or_says_what_it_needs(choice: str, model: TextToImage, tmp_path: Path) -> None:
    assert_eraser_works_or_says_what_it_needs(choice, model, FITTED, tmp_path)


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("pruning"))
def test_every_pruning_works(choice: str, model: TextToImage) -> None:
    assert_pruning_works(choice, model, FITTED)


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("attack"))
def test_every_attack_works(choice: str, model: TextToImage, tmp_path: Path) -> None:
    # Without a CLIP that would have to be downloaded.
    overrides = [FITTED, *["attack.preset=mu_attack"] * (choice == "p4d")]
    assert_attack_works(choice, model, overrides, tmp_path, edge=16)


@torch.no_grad()
def test_safe_guidance_weighs_differences_of_noise(model: TextToImage) -> None:
    """Its formula for the noise that velocities come to, x + (1 - s) v, and back."""
    model.network.double()
    text, empty = model.encode(PROMPTS[:1]).double(), model.encode([""]).double()
    concept = model.encode(["a house"]).double()
    latents, share = model.initial_latents([1]).double(), 0.3
    settings = {"safety_scale": 2.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4}
    added = SafeGuidance(concept[0], warmup_steps=0, scaling="at_most_1", **settings)
    time = torch.tensor([1000 * share])
    guided = SafetyGuard(added).guidance(model)(latents, time, text, empty[0], torch.tensor([5.0]))
    noises = [(latents + (1 - share) * model.predict(latents, time, each))[0] for each in (empty, text, concept)]
    noise, _ = oracle.guided(*noises, [0.0] * latents.numel(), guidance=5.0, warm=True, scaling="at_most_1", **settings)
    torch.testing.assert_close(guided[0], (noise - latents[0]) / (1 - share))


def test_heads_are_pruned_with_all_that_text_and_picture_have_of_them(model: TextToImage) -> None:
    weights = {name: value for name, value in scope_parameters(model, "attn").items() if name.endswith(".weight")}
    weights = {name: value for name, value in weights.items() if value.ndim == 2}
    structure = structure_of(model, weights, "head")
    groups = {name: group for name, (group, _) in structure.places.items()}
    assert set(groups.values()) == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
    assert {structure.units[group] for group in groups.values()} == {(4,)}
    # Four heads of eight channels: rows of what leads into a head, columns of what leads out of it.
    _, into = structure.places["transformer_blocks.0.attn.add_k_proj.weight"]
    _, out = structure.places["transformer_blocks.0.attn.to_add_out.weight"]
    assert into.flatten().tolist() == out.flatten().tolist() == [channel // 8 for channel in range(32)]
    assert (into.shape, out.shape) == ((32, 1), (1, 32))


def test_the_last_block_has_a_query_of_text_that_leads_nowhere(model: TextToImage) -> None:
    """What scope=xattn trains there has a gradient of exactly zero, so nothing is lost."""
    parameters = scope_parameters(model, "xattn")
    latents, text = model.initial_latents([1]), model.encode(PROMPTS[:1])
    with model.trainable(list(parameters.values())):
        loss = model.predict(latents, 500.0, text).square().sum()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    assert {name.rpartition(".")[0] for name in idle} >= {"transformer_blocks.1.attn.add_q_proj"}
    assert not any("transformer_blocks.0" in name and "weight" in name for name in idle)


def test_magnitude_prunes_the_share_that_is_asked_for(model: TextToImage) -> None:
    concept = instantiate(CONCEPT, _convert_="all")
    pruning = Magnitude(sparsity=Sparsity(0.25, "layer"))
    erasure = pruning.prune(model, concept, None, scope="ffn", seed=0, checkpoint=None)
    with erasure.edit.applied(model):
        matrices = [value for value in scope_parameters(model, "ffn").values() if value.ndim == 2]
        zeros = [float((matrix == 0).float().mean()) for matrix in matrices]
    assert zeros == pytest.approx([0.25] * len(matrices), abs=0.01)
