"""Masks: relaxations against their formulas, budgets to the weight, and binary results."""

import pytest
import torch

from diffusion.parameters import named_parameters
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.erasers.esd import ESD
from erasure.erasers.none import NoEraser
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity, cut_lowest, maskable_parameters
from erasure.pruning.random import Random
from tests.night import nightly
from tests.oracles import masks as oracle

CONCEPT = Concept("van_gogh", "style", targets=("van gogh style",))
ERASER = ESD(batch_size=2, sampling_steps=2, eta=3, trajectory="frozen")
RELAXATIONS = ("straight_through", "hard_concrete", "annealed")


def some_scores(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for name, shape in {"a": (4, 3), "b": (5,)}.items()
    }


def flat(tensors):
    return [value for tensor in tensors.values() for value in tensor.flatten().tolist()]


def test_straight_through_is_a_threshold_with_the_sigmoids_gradient():
    scores = some_scores()
    masks = Learned().relaxed_masks(scores, 0, seed=0)
    sum(mask.sum() for mask in masks.values()).backward()

    assert flat(masks) == [float(oracle.sigmoid(score) > 0.5) for score in flat(scores)]
    gradients = [value.grad for value in scores.values()]
    expected = [oracle.sigmoid(score) * (1 - oracle.sigmoid(score)) for score in flat(scores)]
    assert torch.cat([gradient.flatten() for gradient in gradients]).tolist() == pytest.approx(expected)


def test_hard_concrete_samples_follow_the_formula():
    scores = some_scores()
    masks = Learned(relaxation="hard_concrete").relaxed_masks(scores, 3, seed=5)

    generator = stream(5, "learned/gates", 3)
    uniform = [
        value
        for scored in scores.values()
        for value in torch.rand(scored.shape, generator=generator, dtype=torch.float64).flatten().tolist()
    ]
    expected = [oracle.hard_concrete(score, u) for score, u in zip(flat(scores), uniform, strict=True)]
    assert flat(masks) == pytest.approx(expected)
    assert {0.0, 1.0} & set(flat(masks))


def test_expected_pruned_fraction_follows_each_relaxation():
    scores = some_scores()
    closed = {
        "straight_through": [1 - oracle.sigmoid(score) for score in flat(scores)],
        "hard_concrete": [1 - oracle.hard_concrete_open(score) for score in flat(scores)],
        "annealed": [1 - oracle.sigmoid(score / 0.1) for score in flat(scores)],
    }

    for relaxation, probabilities in closed.items():
        pruning = Learned(relaxation=relaxation, final_temperature=0.01, steps=3)
        fraction = pruning.expected_pruned_fraction(scores, step=1)
        assert fraction.item() == pytest.approx(sum(probabilities) / len(probabilities))


def test_annealing_ends_close_to_binary():
    scores = {"a": torch.tensor([-0.5, 0.5])}
    pruning = Learned(relaxation="annealed", steps=10, final_temperature=0.01)

    start = pruning.relaxed_masks(scores, 0, seed=0)["a"].tolist()
    end = pruning.relaxed_masks(scores, 9, seed=0)["a"].tolist()

    assert start == pytest.approx([oracle.sigmoid(-0.5), oracle.sigmoid(0.5)])
    assert end == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("budget", [0.05, 0.2, 1.0])
def test_budget_keeps_the_lowest_scores_pruned_and_breaks_ties_by_index(budget):
    scores = {name: values.detach().mul(2).round() for name, values in some_scores(seed=1).items()}

    masks = Learned(budget=budget).binary_masks(scores)

    assert flat(masks) == oracle.kept_within_budget(flat(scores), budget)


def test_cut_prunes_exactly_the_count_even_when_all_scores_tie():
    masks = cut_lowest({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, 7)

    assert flat(masks) == [False] * 7 + [True] * 3


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_learned_weights_are_the_base_models_or_exactly_zero(tiny_model, relaxation):
    base = {name: weight.detach().clone() for name, weight in named_parameters(tiny_model).items()}
    pruning = Learned(relaxation=relaxation, scope="xattn", steps=8, learning_rate=0.5, initial_score=0.5)

    erasure = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0)

    assert all(torch.equal(weight, base[name]) for name, weight in named_parameters(tiny_model).items())
    assert erasure.edit.metadata["pruned_weights"] > 0
    pruned = 0
    with erasure.edit.applied(tiny_model):
        for name, weight in named_parameters(tiny_model).items():
            assert bool(((weight == base[name]) | (weight == 0)).all())
            if not torch.equal(weight, base[name]):
                assert ".attn2." in name and weight.ndim == 2
            pruned += int(((weight == 0) & (base[name] != 0)).sum())
    assert pruned == erasure.edit.metadata["pruned_weights"]


@pytest.mark.parametrize("relaxation", [RELAXATIONS[0], *(nightly(other) for other in RELAXATIONS[1:])])
def test_learned_mask_lowers_the_erasers_loss(tiny_model, relaxation):
    pruning = Learned(relaxation=relaxation, steps=30, learning_rate=0.3, initial_score=1.0)
    erasure = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0)
    samples = ERASER.objective()
    samples.prepare(tiny_model, CONCEPT, scope="xattn", steps=30, seed=0, checkpoint=None)

    with torch.no_grad():
        before = sum(samples.loss(tiny_model, step).item() for step in range(30))
        with erasure.edit.applied(tiny_model):
            after = sum(samples.loss(tiny_model, step).item() for step in range(30))

    assert after < before


def test_gradient_of_a_score_is_weight_times_gradient_of_the_masked_weight(tiny_model64):
    """d L / d s = sigmoid'(s) * W * dL/d(mW), at a mask that keeps everything."""
    objective = ERASER.objective()
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=1, seed=0, checkpoint=None)
    weights = maskable_parameters(tiny_model64, "xattn")
    with tiny_model64.trainable(list(weights.values())):
        objective.loss(tiny_model64, 0).backward()
        expected = {name: weight.grad * weight.detach() for name, weight in weights.items()}
    seen = {}

    class Spy(Learned):
        def binary_masks(self, scores, sizes=None):
            seen.update(scores)
            return super().binary_masks(scores, sizes)

    Spy(scope="xattn", steps=1, learning_rate=1e-9).prune(
        tiny_model64, CONCEPT, ERASER.objective(), scope="xattn", seed=0, checkpoint=None
    )
    slope = oracle.sigmoid(1.0) * (1 - oracle.sigmoid(1.0))
    for name, scores in seen.items():
        torch.testing.assert_close(scores.grad, slope * expected[name], rtol=1e-6, atol=1e-12)
    assert all(weight.grad is None for weight in weights.values())


def test_penalty_and_initial_score_hold_weights_back(tiny_model):
    def pruned(**changes):
        pruning = Learned(**{"scope": "xattn", "steps": 10, "learning_rate": 0.2, **changes})
        return ERASER.erase(tiny_model, CONCEPT, pruning, seed=0).edit.metadata["pruned_weights"]

    plain = pruned()
    assert pruned(sparsity_weight=1e4) < plain
    assert pruned(initial_score=5.0) == 0
    assert plain > 0


def test_budget_binds_the_learned_mask_exactly(tiny_model):
    pruning = Learned(scope="xattn", steps=10, learning_rate=0.3, budget=0.01)

    metadata = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0).edit.metadata

    assert metadata["pruned_weights"] == metadata["maskable_weights"] // 100


def test_finetuning_after_the_mask_keeps_pruned_weights_at_zero(tiny_model):
    mask_only = Learned(scope="xattn", steps=10, learning_rate=0.2)
    tuned = Learned(scope="xattn", steps=10, learning_rate=0.2, finetune="after", finetune_steps=3)
    masks = ERASER.erase(tiny_model, CONCEPT, mask_only, seed=0).edit.masks()
    base = {name: weight.detach().clone() for name, weight in named_parameters(tiny_model).items()}

    erasure = ERASER.erase(tiny_model, CONCEPT, tuned, seed=0)

    assert len(erasure.losses) == 13
    with erasure.edit.applied(tiny_model):
        weights = named_parameters(tiny_model)
        for name, kept in masks.items():
            assert not weights[name][~kept].any()
            assert not torch.equal(weights[name][kept], base[name][kept])


def test_pruning_has_its_own_scope_or_the_erasers(tiny_model):
    for scope, part in ((None, ".attn2."), ("ffn", ".ff.")):
        pruning = Learned(scope=scope, steps=6, learning_rate=0.5)
        edit = ERASER.erase(tiny_model, CONCEPT, pruning, seed=0).edit
        assert edit.entries and all(part in name for name in edit.entries)
        assert edit.metadata["scope"] == (scope or "xattn")


def test_magnitude_prunes_the_smallest_weights_of_the_scope(tiny_model):
    edit = NoEraser(scope="xattn_kv").erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.25)), seed=0).edit
    weights = maskable_parameters(tiny_model, "xattn_kv")
    masks = edit.masks()
    size = sum(weight.numel() for weight in weights.values())
    largest_pruned = max(float(weights[name].abs()[~kept].max()) for name, kept in masks.items())
    smallest_kept = min(float(weights[name].abs()[kept].min()) for name, kept in masks.items())

    assert edit.metadata["pruned_weights"] == size // 4
    assert largest_pruned <= smallest_kept


def test_random_pruning_depends_on_the_seed_alone_and_takes_the_exact_fraction(tiny_model):
    def masks(seed):
        return NoEraser().erase(tiny_model, CONCEPT, Random(Sparsity(0.1)), seed=seed).edit

    first, again, other = masks(0), masks(0), masks(1)

    assert all(torch.equal(kept, again.masks()[name]) for name, kept in first.masks().items())
    assert any(not torch.equal(kept, other.masks()[name]) for name, kept in first.masks().items())
    assert first.metadata["pruned_weights"] == first.metadata["maskable_weights"] // 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1.5}, "less than or equal to 1"),
        ({"sparsity_weight": -0.1}, "greater than or equal to 0"),
        ({"relaxation": "sigmoid"}, "'straight_through', 'hard_concrete' or 'annealed'"),
        ({"finetune": True}, "'none', 'before', 'after' or 'jointly'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Learned(**changes)


def test_learned_without_an_objective_is_refused(tiny_model):
    with pytest.raises(ValueError, match="needs an eraser that trains"):
        Learned().prune(tiny_model, CONCEPT, None, scope="xattn", seed=0, checkpoint=None)
