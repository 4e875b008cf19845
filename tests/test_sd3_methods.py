"""Every method of the project on a tiny Stable Diffusion 3: it works, or says that it does not and what does."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from attacks.protocols import is_given_original
from diffusion.model import TextToImage
from diffusion.needs import needs_of
from diffusion.sampling import Sampling
from erasure.additions.safe_guidance import SafeGuidance, SafetyGuard
from erasure.parameters import scope_parameters
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.pruning.structures import structure_of
from experiments.command.architecture import LACKING
from tests.attack_cases import make_cases
from tests.erasures import assert_comes_back_from_its_file
from tests.judges import one_in
from tests.oracles import sld as oracle
from tests.test_sdxl import CONCEPT, choices, composed, in_the_repository  # noqa: F401
from tests.tiny_sd3 import make_tiny_sd3

PROMPTS = ["a church", "a red fish", ""]
FITTED = "model.family=sd3"


@pytest.fixture
def model(tokenizer_folder: Path) -> TextToImage:
    return TextToImage(make_tiny_sd3(tokenizer_folder), name="tiny-sd3", scheduler=None, t5_tokens=0)


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("eraser", "retrained", "uce_debias"))
def test_every_eraser_works_or_says_what_it_needs(choice: str, model: TextToImage, tmp_path: Path) -> None:
    overrides = [FITTED, f"store={tmp_path}"]
    if choice == "imported":
        name, weight = next(iter(model.network.named_parameters()))
        save_file({f"transformer.{name}": weight.detach() * 1.01}, tmp_path / "erased.safetensors")
        overrides.append(f"eraser.path={tmp_path / 'erased.safetensors'}")
    eraser, concept = composed("eraser", choice, *overrides), instantiate(CONCEPT, _convert_="all")
    if needs_of(eraser) & LACKING["sd3"]:
        # The same, by those who do not compose a config.
        with pytest.raises(ValueError, match=r"cross-attention|one text encoder|scope"):
            eraser.erase(model, concept, Off(), seed=0)
        return
    before = model.fingerprint()
    edit = eraser.erase(model, concept, Off(), seed=0).edit
    assert bool(edit) == (choice != "none")
    assert_comes_back_from_its_file(edit, model, PROMPTS, tmp_path)
    assert model.fingerprint() == before


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("pruning"))
def test_every_pruning_works(choice: str, model: TextToImage) -> None:
    concept = instantiate(CONCEPT, _convert_="all")
    pruning = composed("pruning", choice, FITTED)
    erasure = composed("eraser", "esd", FITTED).erase(model, concept, pruning, seed=0)
    assert len(erasure.losses) >= 2
    assert erasure.edit or pruning.needs_objective


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("attack"))
def test_every_attack_works(choice: str, model: TextToImage, tmp_path: Path) -> None:
    overrides = [FITTED]
    if choice == "transfer":
        (tmp_path / "found.csv").write_text("case_number,prompt,adversarial_prompt\n10,a church,a chapel\n")
        overrides.append(f"attack.found={tmp_path / 'found.csv'}")
    # Without a CLIP that would have to be downloaded.
    overrides += ["attack.preset=mu_attack"] * (choice == "p4d")
    attack = composed("attack", choice, *overrides)
    options = {"original": model} if is_given_original(attack) else {}
    sampling = Sampling(steps=2, batch_size=2)
    outcomes = list(attack.run(model, make_cases(model, ["a church"]), one_in(10**9), sampling=sampling, **options))
    assert [outcome.case_number for outcome in outcomes] == [10]
    assert outcomes[0].image.shape == (3, 16, 16)


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
