"""Masks over neurons and heads, and weights trained before or with the mask."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion.parameters import named_parameters
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.esd import ESD
from erasure.finetuning import FineTuning, fine_tune
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.masks import maskable_parameters
from erasure.pruning.structures import structure_of
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import masks as oracle
from tests.oracles import structures

CONCEPT = Concept("van_gogh", "style", targets=("van gogh style",))
ERASER = ESD(batch_size=2, sampling_steps=2, eta=3, trajectory="frozen")
SHORT = Learned(scope="xattn_ffn", steps=6, learning_rate=0.5, initial_score=0.6)
HEADS, INNER, HIDDEN = 2, 16, 64
"""Of the tiny model's first level."""


def copied(model):
    return {name: weight.detach().clone() for name, weight in named_parameters(model).items()}


def edited(model, edit):
    with edit.applied(model):
        return copied(model)


@pytest.mark.parametrize("granularity", ["neuron", "head"])
def test_every_weight_hangs_on_the_score_of_its_unit(tiny_model, granularity):
    weights = {
        name: weight for name, weight in maskable_parameters(tiny_model, "linear_conv").items() if "up_" not in name
    }
    structure = structure_of(tiny_model, weights, granularity)
    scores = {
        group: torch.arange(units, dtype=torch.float64) + 1000 * place
        for place, (group, [units]) in enumerate(structure.units.items())
    }
    values = structure.by_weight(scores, weights)

    members = {}
    for name, value in values.items():
        flat = value.flatten(2)[..., 0] if value.ndim > 2 else value
        for index, score in zip(structures.some_places(value.shape), flat.flatten().tolist(), strict=True):
            members.setdefault(score, set()).add((name, index))
    heads = {name: module.heads for name, module in tiny_model.network.named_modules() if hasattr(module, "heads")}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = structures.units(shapes, heads if granularity == "head" else {})
    assert {frozenset(places) for places in members.values()} == expected
    assert sum(int(size.sum()) for size in structure.sizes.values()) == sum(math.prod(s) for s in shapes.values())


@pytest.mark.parametrize("granularity", ["neuron", "head"])
def test_unit_sizes_count_the_weights_in_the_scope(tiny_model, granularity):
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    per = INNER // HEADS if granularity == "head" else 1

    def sizes(scope):
        weights = maskable_parameters(tiny_model, scope)
        return structure_of(tiny_model, weights, granularity).sizes

    assert sizes("xattn_ffn")[f"{block}.attn2"].tolist() == [(16 + 32 + 32 + 16) * per] * (INNER // per)
    assert sizes("xattn_kv")[f"{block}.attn2"].tolist() == [(32 + 32) * per] * (INNER // per)
    assert sizes("xattn_ffn")[f"{block}.ff"].tolist() == [3 * 16] * HIDDEN
    assert sizes("ffn2")[f"{block}.ff"].tolist() == [16] * HIDDEN
    assert sizes("linear_conv")["conv_in.weight"].tolist() == [4 * 9] * 16


@pytest.mark.parametrize("scope", ["xattn_ffn", "linear_conv"])
@pytest.mark.parametrize("granularity", ["neuron", "head"])
def test_units_are_pruned_as_a_whole(tiny_model, granularity, scope):
    base = copied(tiny_model)
    erasure = ERASER.erase(tiny_model, CONCEPT, replace(SHORT, granularity=granularity, scope=scope), seed=0)

    weights = maskable_parameters(tiny_model, scope)
    masks = {
        **{name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()},
        **erasure.edit.masks(),
    }
    heads = {name: module.heads for name, module in tiny_model.network.named_modules() if hasattr(module, "heads")}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    first_taps = {name: mask.flatten(2)[..., 0] if mask.ndim > 2 else mask for name, mask in masks.items()}
    kept = {name: mask.tolist() for name, mask in first_taps.items()}
    for unit in structures.units(shapes, heads if granularity == "head" else {}):
        assert len({kept[name][row][column] for name, (row, column, *_) in unit}) == 1
    assert all(
        torch.equal(mask, first_taps[name].reshape(*mask.shape[:2], *[1] * (mask.ndim - 2)).expand_as(mask))
        for name, mask in masks.items()
    )
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert 0 < pruned == erasure.edit.metadata["pruned_weights"] < erasure.edit.metadata["maskable_weights"]
    after = edited(tiny_model, erasure.edit)
    for name, weight in base.items():
        assert torch.equal(after[name], torch.where(masks[name], weight, 0) if name in masks else weight)
    assert {entry.kind for entry in erasure.edit.entries.values()} <= {"bits", "indices"}


def test_a_pruned_hidden_unit_or_head_says_nothing_more(tiny_model64):
    """Its output is gone although the biases of the feed-forward stay."""
    model = tiny_model64
    block = model.network.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    inputs = torch.randn(2, 9, INNER, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prefix = "down_blocks.0.attentions.0.transformer_blocks.0"
    weights = {name: value for name, value in maskable_parameters(model, "xattn_ffn").items() if prefix in name}
    structure = structure_of(model, weights, "head")
    kept = {group: torch.ones(units, dtype=torch.bool) for group, units in structure.units.items()}
    kept[f"{prefix}.ff"][5] = False
    kept[f"{prefix}.attn2"][1] = False
    text = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    gate, project = block.ff.net[0], block.ff.net[2]
    hidden = gate(inputs)
    hidden[..., 5] = 0
    expected = nn.functional.linear(hidden, project.weight, project.bias)
    attention = block.attn2
    query, key, value = attention.to_q(inputs), attention.to_k(text), attention.to_v(text)
    width = INNER // HEADS
    scores = query[..., :width] @ key[..., :width].transpose(1, 2) / width**0.5
    first_head = torch.cat([scores.softmax(-1) @ value[..., :width], torch.zeros(2, 9, width)], dim=-1)

    with Edit.from_mask(structure.by_weight(kept, weights)).applied(model):
        torch.testing.assert_close(block.ff(inputs), expected, rtol=1e-9, atol=1e-12)
        # Half precision of the softmax is not asked for: the model computes in float64.
        torch.testing.assert_close(
            attention(inputs, encoder_hidden_states=text), attention.to_out[0](first_head), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5])
def test_budget_counts_the_weights_of_units(budget):
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.randint(-3, 2, (size,), generator=generator) for name, size in {"a": 20, "b": 12}.items()}
    sizes = {name: torch.randint(1, 9, values.shape, generator=generator) for name, values in scores.items()}

    masks = Learned(budget=budget).binary_masks(scores, sizes)

    flat = [torch.cat(list(tensors.values())).tolist() for tensors in (masks, scores, sizes)]
    assert flat[0] == structures.kept_within_budget(flat[1], flat[2], budget)


@pytest.mark.parametrize("granularity", ["neuron", "head"])
def test_budget_is_nearly_filled_and_never_exceeded(tiny_model, granularity):
    pruning = replace(SHORT, granularity=granularity, budget=0.05)
    metadata = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0).edit.metadata

    assert 0.03 < metadata["pruned_weights"] / metadata["maskable_weights"] <= 0.05


@pytest.mark.parametrize("relaxation", ["straight_through", "hard_concrete", "annealed"])
def test_units_share_their_relaxed_mask(tiny_model, relaxation):
    pruning = replace(SHORT, granularity="head", scope="xattn", relaxation=relaxation)
    weights = maskable_parameters(tiny_model, "xattn")
    structure = structure_of(tiny_model, weights, "head")
    scores = {group: torch.randn(units) for group, units in structure.units.items()}

    masks = structure.by_weight(pruning.relaxed_masks(scores, 2, 0, structure.sizes), weights)

    assert len({float(value) for mask in masks.values() for value in mask.unique()}) <= sum(map(len, scores.values()))


def test_expected_pruned_fraction_is_of_weights():
    scores = {"a": torch.tensor([0.3, -1.0]), "b": torch.tensor([2.0])}
    sizes = {"a": torch.tensor([5, 1]), "b": torch.tensor([10])}

    fraction = Learned().expected_pruned_fraction(scores, 0, sizes).item()

    closed = 5 * oracle.sigmoid(-0.3) + oracle.sigmoid(1.0) + 10 * oracle.sigmoid(-2.0)
    assert fraction == pytest.approx(closed / 16)


def test_the_gradient_of_a_units_score_is_the_sum_over_its_weights(tiny_model64):
    """d L / d s = sigmoid'(s) * sum over the unit of W * dL/d(mW), at a mask that keeps everything."""
    objective = ERASER.objective()
    objective.prepare(tiny_model64, CONCEPT, scope="xattn_ffn", steps=1, seed=0, checkpoint=None)
    weights = maskable_parameters(tiny_model64, "xattn_ffn")
    with tiny_model64.trainable(list(weights.values())):
        objective.loss(tiny_model64, 0).backward()
        products = {name: weight.grad * weight.detach() for name, weight in weights.items()}
    seen = {}

    class Spy(Learned):
        def binary_masks(self, scores, sizes=None):
            seen.update(scores)
            return super().binary_masks(scores, sizes)

    Spy(scope="xattn_ffn", steps=1, learning_rate=1e-9, granularity="head").prune(
        tiny_model64, CONCEPT, ERASER.objective(), scope="xattn", seed=0, checkpoint=None
    )
    slope = oracle.sigmoid(1.0) * (1 - oracle.sigmoid(1.0))
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    width = INNER // HEADS
    second = sum(float(products[f"{block}.attn2.{leaf}.weight"][width:].sum()) for leaf in ("to_q", "to_k", "to_v"))
    second += float(products[f"{block}.attn2.to_out.0.weight"][:, width:].sum())
    unit = products[f"{block}.ff.net.0.proj.weight"]
    seventh = float(unit[7].sum() + unit[HIDDEN + 7].sum() + products[f"{block}.ff.net.2.weight"][:, 7].sum())
    assert float(seen[f"{block}.attn2"].grad[1]) == pytest.approx(slope * second, rel=1e-6)
    assert float(seen[f"{block}.ff"].grad[7]) == pytest.approx(slope * seventh, rel=1e-6)


def test_finetuning_before_masks_the_weights_that_it_made(tiny_model):
    pruning = replace(SHORT, finetune="before", finetune_steps=3, finetune_learning_rate=1e-3)
    base = copied(tiny_model)
    objective = ERASER.objective()
    objective.prepare(tiny_model, CONCEPT, scope="xattn_ffn", steps=9, seed=0, checkpoint=None)
    tuned = fine_tune(tiny_model, objective, FineTuning("xattn_ffn", 3, 1e-3), checkpoint=None)
    weights = edited(tiny_model, tuned.edit)

    erasure = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0)

    assert all(torch.equal(weight, base[name]) for name, weight in named_parameters(tiny_model).items())
    assert erasure.losses[:3] == tuned.losses
    with torch.no_grad(), tuned.edit.applied(tiny_model):
        assert erasure.losses[3] == pytest.approx(objective.loss(tiny_model, 3).item(), rel=1e-6)
    after = edited(tiny_model, erasure.edit)
    maskable = maskable_parameters(tiny_model, "xattn_ffn")
    pruned = 0
    for name, weight in after.items():
        zero = (weight == 0) & (weights[name] != 0) if name in maskable else torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(weight, torch.where(zero, 0, weights[name]))
        pruned += int(zero.sum())
    assert 0 < pruned == erasure.edit.metadata["pruned_weights"]


def test_weights_trained_jointly_follow_adam_on_the_masked_loss(tiny_model64):
    model = tiny_model64
    pruning = replace(SHORT, scope="xattn_kv", steps=3, finetune="jointly", finetune_learning_rate=1e-2)
    objective = ERASER.objective()
    objective.prepare(model, CONCEPT, scope="xattn_kv", steps=3, seed=0, checkpoint=None)

    expected, losses = structures.trained_jointly(
        model.network, list(scope_parameters(model, "xattn_kv")), lambda step: objective.loss(model, step), pruning
    )
    erasure = ERASER.erase(model, CONCEPT, pruning, seed=0)

    assert erasure.losses == pytest.approx(losses, rel=1e-9)
    after = edited(model, erasure.edit)
    for name, (weight, kept) in expected.items():
        torch.testing.assert_close(after[name], torch.where(kept, weight, 0), rtol=1e-7, atol=1e-10)
        assert not after[name][~kept].any()
    pruned = sum(int((~kept).sum()) for _, kept in expected.values())
    assert 0 < pruned == erasure.edit.metadata["pruned_weights"]


def test_training_jointly_moves_biases_and_lowers_the_loss_below_the_masks_alone(tiny_model):
    pruning = replace(SHORT, steps=12, learning_rate=0.1, initial_score=1.0)
    base = copied(tiny_model)
    alone = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0)
    joint = ERASER.erase(tiny_model, CONCEPT, replace(pruning, finetune="jointly", finetune_learning_rate=1e-3), seed=0)

    after = edited(tiny_model, joint.edit)
    assert {name for name, weight in after.items() if not torch.equal(weight, base[name])} == set(
        scope_parameters(tiny_model, "xattn_ffn")
    )
    assert sum(joint.losses[-6:]) < sum(alone.losses[-6:])


@pytest.mark.parametrize(
    ("granularity", "finetune"),
    [
        ("weight", "before"),
        nightly("weight", "jointly"),
        nightly("head", "none"),
        nightly("head", "after"),
        ("head", "jointly"),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one_and_costs_are_exact(
    tiny_model, tmp_path, monkeypatch, granularity, finetune
):
    class Killed(Exception):
        pass

    monkeypatch.setattr("erasure.finetuning.CHECKPOINT_EVERY", 2)
    pruning = replace(SHORT, granularity=granularity, finetune=finetune, steps=5, finetune_steps=3)
    undisturbed = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0)
    steps = 5 + (3 if finetune in ("before", "after") else 0)
    # What the objective costs beforehand, and two samples a step.
    prepared = ERASER.objective().prepare(tiny_model, CONCEPT, scope="xattn_ffn", steps=steps, seed=0, checkpoint=None)
    assert undisturbed.unet_evaluations == prepared + 2 * steps

    original, calls = tiny_model.predict, 0

    def dying(*arguments, **named):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == steps:
            raise Killed
        return original(*arguments, **named)

    tiny_model.predict = dying
    with pytest.raises(Killed):
        ERASER.erase(tiny_model, CONCEPT, pruning, seed=0, checkpoint=tmp_path / "work")
    tiny_model.predict = original
    spent = tiny_model.unet_evaluations
    resumed = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0, checkpoint=tmp_path / "work")
    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - spent < 2 * steps


def test_what_cannot_be_filled_is_refused():
    assert Learned(fill="mean", finetune="before").fill == "mean"
    with pytest.raises(ValueError, match=r"fill is 'mean' and finetune 'jointly'.*set fill=zero or finetune=none"):
        Learned(fill="mean", finetune="jointly")
    with pytest.raises(ValueError, match="'weight', 'neuron' or 'head'"):
        Learned(granularity="channel")
