"""Controls for models without a twin: U-Nets that know nothing, and one that knows and hides it."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from diffusion.model import TextToImage
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.foreign_prompt import ForeignPrompt
from erasure.erasers.output_zero import OutputZero
from erasure.erasers.random_weights import RandomWeights
from erasure.protocols import Eraser
from erasure.pruning.off import Off
from experiments.job.floors import CONTROLS
from tests.tiny_flux import make_tiny_flux
from tests.tiny_job import method_config
from tests.tiny_sd3 import T5_TOKENS, make_tiny_sd3

CONCEPT = Concept("church", "object", ("church",))
PROMPTS = ["a church", "two blue fish"]


def edit_of(control: Eraser, model: TextToImage, seed: int = 0) -> Edit:
    return control.erase(model, CONCEPT, Off(), seed=seed).edit


def predicted(model: TextToImage, prompts: list[str] = PROMPTS) -> torch.Tensor:
    latents = torch.randn((len(prompts), *model.latent_shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.predict(latents.to(model.dtype), 500, model.encode_prompts(prompts))


def test_output_zero_predicts_nothing_and_comes_off(tiny_model: TextToImage) -> None:
    before = predicted(tiny_model)
    with edit_of(OutputZero(), tiny_model).applied(tiny_model):
        assert not predicted(tiny_model).any()
    assert before.any()
    assert torch.equal(predicted(tiny_model), before)


@pytest.mark.parametrize("transformer", ["sd3", "flux"])
def test_output_zero_knows_the_last_layer_of_every_architecture(transformer: str, tokenizer_folder: Path) -> None:
    make = {"sd3": make_tiny_sd3, "flux": partial(make_tiny_flux, guided=False)}[transformer]
    model = TextToImage(make(tokenizer_folder), name="tiny", scheduler=None, resolution=(16, 16), t5_tokens=T5_TOKENS)
    with edit_of(OutputZero(), model).applied(model):
        assert not predicted(model).any()
    assert predicted(model).any()


def test_random_weights_are_those_that_layers_start_with(tiny_model: TextToImage) -> None:
    original = {name: value.clone() for name, value in tiny_model.network.named_parameters()}
    with edit_of(RandomWeights(), tiny_model).applied(tiny_model):
        values = {name: value.clone() for name, value in tiny_model.network.named_parameters()}
        norms = {
            f"{path}.{name}"
            for path, module in tiny_model.network.named_modules()
            if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
            for name, _ in module.named_parameters()
        }
    for name, value in values.items():
        layer = name.rpartition(".")[0]
        if name in norms:
            assert torch.equal(value, torch.full_like(value, 1.0 if name.endswith("weight") else 0.0))
            continue
        assert not torch.equal(value, original[name])
        bound = 1 / math.sqrt(values[f"{layer}.weight"][0].numel())
        assert float(value.abs().max()) <= bound
        if value.numel() > 200:
            assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert all(torch.equal(value, original[name]) for name, value in tiny_model.network.named_parameters())


def test_random_weights_are_the_seeds(tiny_model: TextToImage) -> None:
    def weights(seed: int) -> torch.Tensor:
        with edit_of(RandomWeights(), tiny_model, seed).applied(tiny_model):
            return tiny_model.network.conv_in.weight.detach().clone()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_foreign_prompt_takes_the_place_of_all_but_the_empty_one(tiny_model: TextToImage, tmp_path: Path) -> None:
    foreign, nothing = predicted(tiny_model, ["two red cars"]), predicted(tiny_model, [""])
    edit_of(ForeignPrompt(prompt="two red cars"), tiny_model).save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").applied(tiny_model):
        for prompt in PROMPTS:
            torch.testing.assert_close(predicted(tiny_model, [prompt]), foreign)
        torch.testing.assert_close(predicted(tiny_model, [""]), nothing)
        # What searches for a text by gradients gets one, which says that no text matters.
        ids = tiny_model.tokenize(["a church"])
        embeddings = tiny_model.token_embeddings(ids).detach().requires_grad_()
        ends = (ids == tiny_model.tokenizer.eos_token_id).int().argmax(1)
        tiny_model.encode_embeddings(embeddings, ends).square().sum().backward()
        assert embeddings.grad is not None
        assert not embeddings.grad.any()
    assert not torch.equal(predicted(tiny_model, PROMPTS[:1]), foreign)


@pytest.mark.parametrize("name", CONTROLS)
def test_configs_are_of_the_controls(name: str) -> None:
    assert type(instantiate(method_config("eraser", name), _convert_="all")) is CONTROLS[name][0]
