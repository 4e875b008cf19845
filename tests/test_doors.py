"""Closed forms where text enters a transformer by two matrices: against the formula solved directly, and by effect."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion.model import TextToImage
from erasure.closed_form import doors_of
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.rece import RECE
from erasure.erasers.uce import UCE, Debias
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from tests.oracles import rece as rece_oracle
from tests.oracles import uce as uce_oracle
from tests.tiny_flux import make_tiny_flux
from tests.tiny_sd3 import T5_TOKENS, TOKENS, make_tiny_sd3

ROWS, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"
CONCEPT = Concept(
    "church", "object", targets=("church", "red church"), anchor="fish", preserved=("a red fish", "a cat")
)

Read = tuple[list[Tensor], list[int]]
"""Rows of a prompt by tokenizer, and where the last subject token of each is."""


@pytest.fixture(params=["sd3", "sd3_t5", "flux"])
def model(tokenizer_folder: Path, request: pytest.FixtureRequest) -> TextToImage:
    if request.param == "flux":
        pipeline = make_tiny_flux(tokenizer_folder, guided=True)
    else:
        pipeline = make_tiny_sd3(tokenizer_folder, t5=request.param == "sd3_t5")
    model = TextToImage(pipeline, name=request.param, scheduler=None, t5_tokens=T5_TOKENS)
    for part in (model.network, *model.text_encoders.all_encoders):
        part.double()
    return model


def read_rows(model: TextToImage, prompt: str) -> Read:
    """By the tokenizers of the plain pipeline."""
    pipeline = model.as_pipeline()
    text = model.encode([prompt])[0]
    parts, last = [], []
    if model.name.startswith("sd3"):
        ids = pipeline.tokenizer(prompt).input_ids
        parts.append(text[:TOKENS])
        last.append(uce_oracle.last_token(ids, pipeline.tokenizer.eos_token_id))
    third = pipeline.tokenizer_2 if model.name == "flux" else pipeline.tokenizer_3
    if third is not None:
        first = 0 if model.name == "flux" else TOKENS
        parts.append(text[first : first + T5_TOKENS])
        # The end token is 1 and closes every text; an empty one has nothing before it.
        last.append(max(len(third(prompt, truncation=True, max_length=T5_TOKENS).input_ids) - 2, 0))
    return parts, last


def read_pooled(model: TextToImage, prompt: str) -> Read:
    return [model.text_encoders.split(model.encode([prompt]))[1]], [0]


def doors(model: TextToImage) -> dict[str, Callable[[str], Read]]:
    return {ROWS: lambda prompt: read_rows(model, prompt), POOLED: lambda prompt: read_pooled(model, prompt)}


def weights(model: TextToImage) -> dict[str, Tensor]:
    parameters = dict(model.network.named_parameters())
    return {name: parameters[name].detach().clone() for name in (ROWS, POOLED)}


def edited(model: TextToImage, edit: Edit) -> dict[str, Tensor]:
    assert set(edit.entries) == {ROWS, POOLED}
    with edit.applied(model):
        return weights(model)


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["last", "from_last"])
def test_uce_is_the_least_squares_of_each_matrix(model: TextToImage, tokens: str) -> None:
    rule = uce_oracle.pairs_2025 if tokens == "last" else uce_oracle.pairs_2023
    config = UCE(tokens, ridge=0.3, erase_scale=2.0, preserve_scale=0.7)
    found = edited(model, config.erase(model, CONCEPT, Off(), seed=0).edit)
    original = weights(model)
    for name, read in doors(model).items():
        pairs, kept = [], []
        for target in CONCEPT.targets:
            for one, at, other, there in zip(*read(target), *read(CONCEPT.anchor), strict=True):
                pairs += rule(one, at, other, there)
        for prompt in CONCEPT.preserved if tokens == "last" else ("", *CONCEPT.preserved):
            for rows, at in zip(*read(prompt), strict=True):
                kept += [rows[at]] if tokens == "last" else list(rows)
        expected = uce_oracle.edit_matrix(original[name], pairs, kept, 0.3, 2.0, 0.7)
        assert (found[name] - expected).norm() <= 1e-9 * expected.norm()
        assert (found[name] - original[name]).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def test_rece_is_its_formula_at_each_matrix(model: TextToImage) -> None:
    config = RECE(UCE(), adversarial_ridge=0.1, ridge=0.3, erase_scale=2.0, preserve_scale=0.7)
    first = edited(model, config.uce.erase(model, CONCEPT, Off(), seed=0).edit)
    found = edited(model, config.erase(model, CONCEPT, Off(), seed=0).edit)
    original = weights(model)

    def every(read: Callable[[str], Read], prompts: tuple[str, ...]) -> list[Tensor]:
        return [row for prompt in prompts for rows in read(prompt)[0] for row in rows]

    for name, read in doors(model).items():
        (expected,) = rece_oracle.edit(
            [first[name]],
            [original[name]],
            every(read, CONCEPT.targets),
            every(read, ("",) * len(CONCEPT.targets)),
            every(read, ("", *CONCEPT.preserved)),
            adversarial_ridge=0.1,
            ridge=0.3,
            erase_scale=2.0,
            preserve_scale=0.7,
        )
        assert (found[name] - expected).norm() <= 1e-8 * expected.norm()
        assert (found[name] - first[name]).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def test_the_concept_enters_as_its_anchor_and_others_as_they_did(model: TextToImage) -> None:
    network = model.network
    layers: dict[str, nn.Module] = {
        ROWS: network.context_embedder,
        POOLED: network.time_text_embed.text_embedder.linear_1,
    }

    def entering(prompt: str) -> list[Tensor]:
        return [
            layers[name](rows[at])
            for name, read in doors(model).items()
            for rows, at in zip(*read(prompt), strict=True)
        ]

    before = {prompt: entering(prompt) for prompt in ("church", "fish", *CONCEPT.preserved)}
    assert len(before["church"]) == {"sd3": 2, "sd3_t5": 3, "flux": 2}[model.name]
    # A pooled embedding of the tiny CLIP hardly knows words apart, so that hardly any ridge is needed.
    edit = UCE(ridge=1e-9).erase(model, CONCEPT, Off(), seed=0).edit
    with edit.applied(model):
        after = {prompt: entering(prompt) for prompt in before}
    for now, then, anchor in zip(after["church"], before["church"], before["fish"], strict=True):
        assert (now - anchor).norm() < 1e-4 * (then - anchor).norm()
    for prompt in CONCEPT.preserved:
        for now, then in zip(after[prompt], before[prompt], strict=True):
            assert (now - then).norm() < 1e-4 * then.norm()


@torch.no_grad()
def test_attributes_are_added_at_both_matrices(model: TextToImage) -> None:
    def with_strengths(*strengths: float) -> dict[str, Tensor]:
        debias = Debias(("a cat", "a dog"), strengths)
        with UCE(debias=debias).erase(model, CONCEPT, Off(), seed=0).edit.applied(model):
            return weights(model)

    original, still, changed = weights(model), with_strengths(0.0, 0.0), with_strengths(0.5, 0.2)
    for name, weight in original.items():
        assert torch.equal(still[name], weight)
        assert (changed[name] - weight).norm() > 1e-4 * weight.norm()


def test_matrices_are_stored_as_they_are_where_that_is_smaller(model: TextToImage) -> None:
    entries = UCE().erase(model, CONCEPT, Off(), seed=0).edit.entries
    for door in doors_of(model):
        ((name, weight),) = door.weights.items()
        square = weight.shape[1] ** 2
        assert entries[name].kind == ("right_multiplied" if square < weight.numel() else "dense")


def test_pruning_takes_the_scope_of_the_text(model: TextToImage) -> None:
    edit = UCE().erase(model, CONCEPT, Magnitude(Sparsity(0.5, "layer")), seed=0).edit
    assert edit.metadata["scope"] == "text_projection"
    with edit.applied(model):
        zeros = [float((weight == 0).double().mean()) for weight in weights(model).values()]
    assert zeros == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("tokens", ["last", "from_last"])
def test_prompts_at_a_time_change_nothing(model: TextToImage, monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    together = edited(model, UCE(tokens).erase(model, CONCEPT, Off(), seed=0).edit)
    monkeypatch.setattr("erasure.closed_form._PROMPTS", 1)
    monkeypatch.setattr("erasure.closed_form._PROMPTS_WITH_T5", 1)
    for name, weight in edited(model, UCE(tokens).erase(model, CONCEPT, Off(), seed=0).edit).items():
        torch.testing.assert_close(weight, together[name])
