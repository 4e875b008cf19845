"""RECE against its formulas with two sets of matrices."""

from pathlib import Path

import pytest
import torch

from erasure.closed_form import key_value_weights
from erasure.concept import Concept
from erasure.erasers.rece import RECE
from erasure.erasers.uce import UCE
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from tests.oracles import rece as oracle
from tests.tiny_job import make_job

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a house, {}"),
    preserved=("a fish", "a church"),
    preserved_templates=("{}", "a red {}"),
)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        RECE(UCE(), epochs=3),
        RECE(UCE("from_last", preserve_scale=None), epochs=2, adversarial_ridge=1e-3, destination="anchor"),
        RECE(UCE(ridge=1.0), ridge=0.3, erase_scale=2.0, preserve_scale=0.7),
        RECE(UCE("from_last", anchor="art"), destination="anchor", empty_for_each_target=True),
    ],
    ids=["three epochs", "anchor", "scaled", "the authors' for styles"],
)
def test_every_matrix_is_the_papers_closed_form(tiny_model64, config):
    original = key_value_weights(tiny_model64)
    with config.uce.erase(tiny_model64, CONCEPT, Off(), seed=0).edit.applied(tiny_model64):
        expected = [weight.clone() for weight in key_value_weights(tiny_model64).values()]
    first = expected
    concept, destinations = [], []
    for target in CONCEPT.targets:
        for template in CONCEPT.templates:
            anchor = CONCEPT.anchor if config.uce.anchor is None else config.uce.anchor
            wanted = template.format(anchor) if config.destination == "anchor" else ""
            concept += list(tiny_model64.encode([template.format(target)])[0])
            destinations += list(tiny_model64.encode([wanted])[0])
    preserved = [template.format(phrase) for phrase in CONCEPT.preserved for template in CONCEPT.preserved_templates]
    empty = [""] * (4 if config.empty_for_each_target else 1)
    kept = [token for prompt in (*empty, *preserved) for token in tiny_model64.encode([prompt])[0]]
    for _ in range(config.epochs):
        expected = oracle.edit(
            expected,
            list(original.values()),
            concept,
            destinations,
            kept,
            adversarial_ridge=config.adversarial_ridge,
            ridge=config.ridge,
            erase_scale=config.erase_scale,
            preserve_scale=config.preserve_scale,
        )

    with config.erase(tiny_model64, CONCEPT, Off(), seed=0).edit.applied(tiny_model64):
        for weight, wanted, start in zip(key_value_weights(tiny_model64).values(), expected, first, strict=True):
            assert (weight - wanted).norm() <= 1e-9 * wanted.norm()
            assert (weight - start).norm() > 1e-3 * start.norm()


def test_costs_no_unet_evaluation_and_leaves_the_model_alone(tiny_model):
    fingerprint = tiny_model.fingerprint()

    erasure = RECE(epochs=2).erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 0
    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]
    assert erasure.edit.metadata["config"]["eraser"]["uce"]["tokens"] == "last"
    assert erasure.edit.size_bytes == 32 * 32 * 4


@torch.no_grad()
def test_scored_pruning_acts_on_the_erased_weights(tiny_model):
    with RECE().erase(tiny_model, CONCEPT, Off(), seed=0).edit.applied(tiny_model):
        weights = {name: weight.clone() for name, weight in scope_parameters(tiny_model, "xattn_kv").items()}

    with RECE().erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.5)), seed=0).edit.applied(tiny_model):
        pruned = {name: weight == 0 for name, weight in scope_parameters(tiny_model, "xattn_kv").items()}
        for name, weight in scope_parameters(tiny_model, "xattn_kv").items():
            assert torch.equal(weight, weights[name].masked_fill(pruned[name], 0))
    assert sum(int(zeros.sum()) for zeros in pruned.values()) == sum(zeros.numel() for zeros in pruned.values()) // 2


def test_pruning_that_learns_is_refused(tiny_model):
    with pytest.raises(ValueError, match="eraser 'RECE' has none"):
        RECE().erase(tiny_model, CONCEPT, Learned(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"adversarial_ridge": 0.0}, "greater than 0"),
        ({"ridge": 0.0}, "greater than 0"),
        ({"destination": "art"}, "'empty' or 'anchor'"),
        ({"lamb": 0.1}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        RECE(**changes)


def test_presets_hold_the_authors_settings(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    published = {
        ("rece_sd14", "artist/van_gogh"): ("art", "anchor", 1, 1e-3),
        ("rece_sd14", "object/church"): ("", "empty", 1, 1e-3),
        ("rece_nudity_sd14", "nudity"): ("", "empty", 3, 1e-1),
        ("rece_unsafe_sd14", "violence"): ("", "empty", 2, 1e-1),
        ("rece_object_sd14", "object/tench"): ("", "empty", 1, 1e-1),
    }
    for (preset, concept), (anchor, destination, epochs, adversarial_ridge) in published.items():
        uce = UCE("from_last", preserve_scale=None, anchor=anchor)
        expected = RECE(uce, epochs, adversarial_ridge, destination, empty_for_each_target=True)
        assert make_job(f"eraser={preset}", f"concept={concept}", "judge=canvas").eraser == expected
