"""ESD against its formula, its exact cost, and its promises: one U-Net, any batch, any interruption."""

import copy
import dataclasses

import pytest
import torch

from diffusion.streams import derived_seed
from erasure import finetuning
from erasure.concept import Concept
from erasure.erasers.esd import ESD, ESDObjective
from erasure.erasers.none import NoEraser
from erasure.parameters import scope_parameters
from erasure.protocols import check_pair
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.trajectories import current_points, draw_stops
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import esd as oracle

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    preserved=("a fish", "a church"),
)
SHAPE = (4, 8, 8)


def make(**changes):
    return ESD(**{"steps": 3, "batch_size": 2, "sampling_steps": 4, "eta": 1.5, "trajectory": "frozen", **changes})


def changed(model):
    """The model with other cross-attention weights, as in the middle of training."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for weight in scope_parameters(edited, "xattn").values():
            weight.mul_(1.2)
    return edited


def points(model, config, step, x_source):
    """(x_t, t, text, target) of a training step by the oracle, x_t from ``x_source``'s trajectories."""
    stops, seeds = draw_stops(7, step, config.batch_size, config.sampling_steps)
    timesteps = model.sampling_timesteps(config.sampling_steps).tolist()
    empty = model.encode([""])[0]
    reference = model.encode([CONCEPT.anchor])[0] if config.reference == "anchor" else empty
    rows = []
    for place, (stop, seed) in enumerate(zip(stops.tolist(), seeds, strict=True)):
        text = model.encode([CONCEPT.targets[(step * config.batch_size + place) % 2]])[0]
        x = oracle.trajectory_point(
            x_source.network, model.process.alphas.tolist(), timesteps, stop, seed, SHAPE, text, empty, 3.0
        )
        t = timesteps[stop]
        rows.append((x, t, text, oracle.target(model.network, x, t, text, reference, config.eta)))
    return rows


@torch.no_grad()
@pytest.mark.parametrize("reference", ["unconditional", "anchor"])
@pytest.mark.parametrize("trajectory", ["frozen", "current"])
def test_loss_is_the_papers_formula(tiny_model64, trajectory, reference):
    config = make(trajectory=trajectory, reference=reference)
    objective = ESDObjective(config)
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=3, seed=7, checkpoint=None)
    edited = changed(tiny_model64)

    for step in range(3):
        expected = points(tiny_model64, config, step, tiny_model64 if trajectory == "frozen" else edited)

        loss = objective.loss(edited, step).item()

        assert loss == pytest.approx(oracle.mean_squared_error(edited.network, expected), rel=1e-5)
        assert loss > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("reference", ["unconditional", "anchor"])
@pytest.mark.parametrize(
    "changes",
    [nightly({}), {"trajectory": "current"}, {"trajectories": 2}],
    ids=["frozen", "current", "pool"],
)
def test_attribute_loss_keeps_what_it_is_erased_from_and_leaves_the_attribute(tiny_model64, changes, reference):
    config = make(erase_from="a picture of a man", reference=reference, **changes)
    objective = ESDObjective(config)
    concept = dataclasses.replace(CONCEPT, templates=("{}", "a house, {}"))
    objective.prepare(tiny_model64, concept, scope="xattn", steps=4, seed=7, checkpoint=None)
    edited = changed(tiny_model64)
    timesteps = tiny_model64.sampling_timesteps(4).tolist()
    empty = tiny_model64.encode([""])[0]
    rows = []

    for step in range(4):
        if config.trajectories:
            samples, _ = objective._samples.batch(step)
            columns = zip(samples.latents, samples.timesteps, samples.prompts, strict=True)
            drawn = [(x[None], int(t), int(prompt)) for x, t, prompt in columns]
        else:
            stops, seeds = draw_stops(7, step, 2, 4)
            drawn = []
            for place, (stop, seed) in enumerate(zip(stops.tolist(), seeds, strict=True)):
                prompt = (2 * step + place) % 4
                whole = tiny_model64.encode([concept.templates[prompt % 2].format(config.erase_from)])[0]
                source = edited if config.trajectory == "current" else tiny_model64
                alphas = tiny_model64.process.alphas.tolist()
                x = oracle.trajectory_point(source.network, alphas, timesteps, stop, seed, SHAPE, whole, empty, 3.0)
                drawn.append((x, timesteps[stop], prompt))
        rows = []
        for x, t, prompt in drawn:
            phrases = (config.erase_from, concept.targets[prompt // 2], concept.anchor)
            whole, attribute, anchor = tiny_model64.encode([concept.templates[prompt % 2].format(p) for p in phrases])
            r = anchor if reference == "anchor" else empty
            wanted = oracle.attribute_target(tiny_model64.network, x, t, whole, attribute, r, config.eta)
            rows.append((x, t, whole, wanted))

        loss = objective.loss(edited, step).item()

        assert loss == pytest.approx(oracle.mean_squared_error(edited.network, rows), rel=1e-5)
        assert loss > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("trajectory", ["frozen", nightly("current")])
def test_published_offset_scores_the_published_codes_latents(tiny_model64, trajectory):
    config = make(published_offset=True, trajectory=trajectory, sampling_steps=5)
    objective = ESDObjective(config)
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=12, seed=7, checkpoint=None)
    ascending = sorted(tiny_model64.sampling_timesteps(5).tolist())
    alphas, empty = tiny_model64.process.alphas.tolist(), tiny_model64.encode([""])[0]
    tills = set()

    for step in range(12):
        stops, seeds = draw_stops(7, step, 2, 5)
        if trajectory == "frozen":
            samples, _ = objective._samples.batch(step)
            latents, timesteps = samples.latents, samples.timesteps
        else:
            latents, timesteps, _ = current_points(
                tiny_model64, objective._text, config.settings, batch_size=2, seed=7, step=step
            )
        for place, (stop, seed) in enumerate(zip(stops.tolist(), seeds, strict=True)):
            till = 4 - stop
            text = tiny_model64.encode([CONCEPT.targets[place]])[0]
            x = oracle.published_point(tiny_model64.network, alphas, ascending, till, seed, SHAPE, text, empty, 3.0)
            torch.testing.assert_close(latents[place], x[0], rtol=0, atol=1e-5)
            assert 200 * till <= timesteps[place] < 200 * (till + 1)
            tills.add(till)
            if trajectory == "frozen":
                wanted = oracle.target(tiny_model64.network, x, int(timesteps[place]), text, empty, config.eta)
                torch.testing.assert_close(samples.targets[place], wanted[0], rtol=0, atol=1e-5)
    assert {0, 1, 4} <= tills


def test_published_offset_costs_one_step_more_than_the_formula_but_for_the_last(tiny_model):
    config = make(published_offset=True)
    stops = torch.cat([draw_stops(5, step, 2, 4)[0] for step in range(3)])

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=5)

    assert erasure.unet_evaluations == sum(2 * min(int(stop) + 1, 3) for stop in stops) + 6 * (2 + 1)


def test_published_offset_needs_the_published_sampler(tiny_model):
    tiny_model.scheduler_name = "pndm"

    with pytest.raises(
        ValueError, match="scheduler is 'pndm'; published_offset follows a published sampler, which is ddim"
    ):
        make(published_offset=True).erase(tiny_model, CONCEPT, Off(), seed=0)


@torch.no_grad()
@pytest.mark.parametrize("trajectory", ["frozen", "current"])
def test_several_concepts_take_turns_each_with_its_own_anchor(tiny_model64, trajectory):
    church = Concept("church", "object", targets=("church",), anchor="house", templates=("{}", "a red {}", "big {}"))
    both = dataclasses.replace(CONCEPT, also=(church,))
    objective = ESDObjective(make(trajectory=trajectory, reference="anchor"))
    objective.prepare(tiny_model64, both, scope="xattn", steps=3, seed=7, checkpoint=None)
    prompts = [
        ("van gogh style", "a picture"),
        ("church", "house"),
        ("by vincent", "a picture"),
        ("a red church", "a red house"),
        ("van gogh style", "a picture"),
        ("big church", "big house"),
    ]
    edited = changed(tiny_model64)
    empty = tiny_model64.encode([""])[0]
    timesteps = tiny_model64.sampling_timesteps(4).tolist()

    for step in range(3):
        stops, seeds = draw_stops(7, step, 2, 4)
        rows = []
        for (target, anchor), stop, seed in zip(prompts[2 * step : 2 * step + 2], stops.tolist(), seeds, strict=True):
            text, reference = tiny_model64.encode([target, anchor])
            source = edited if trajectory == "current" else tiny_model64
            alphas = tiny_model64.process.alphas.tolist()
            x = oracle.trajectory_point(source.network, alphas, timesteps, stop, seed, SHAPE, text, empty, 3.0)
            wanted = oracle.target(tiny_model64.network, x, timesteps[stop], text, reference, 1.5)
            rows.append((x, timesteps[stop], text, wanted))

        assert objective.loss(edited, step).item() == pytest.approx(
            oracle.mean_squared_error(edited.network, rows), rel=1e-5
        )


def test_an_attribute_of_several_concepts_is_refused(tiny_model):
    both = dataclasses.replace(CONCEPT, also=(dataclasses.replace(CONCEPT, name="church"),))

    with pytest.raises(ValueError, match="erase_from is 'a man' and concept 'van_gogh' consists of several"):
        make(erase_from="a man").erase(tiny_model, both, Off(), seed=0)


@torch.no_grad()
def test_frozen_samples_and_targets_are_the_papers(tiny_model64):
    config = make()
    objective = ESDObjective(config)
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=3, seed=7, checkpoint=None)

    for step in range(3):
        samples, text = objective._samples.batch(step)
        for place, (x, t, embedding, target) in enumerate(points(tiny_model64, config, step, tiny_model64)):
            assert samples.timesteps[place] == t
            torch.testing.assert_close(text[place], embedding, rtol=0, atol=1e-9)
            torch.testing.assert_close(samples.latents[place], x[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(samples.targets[place], target[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("trajectories", [None, 3])
def test_precomputation_does_not_depend_on_its_batch_size(tiny_model64, trajectories):
    batches = []
    for sampling_batch_size in (1, 2, 64):
        objective = ESDObjective(make(trajectories=trajectories, sampling_batch_size=sampling_batch_size))
        objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=3, seed=0, checkpoint=None)
        batches.append([objective._samples.batch(step)[0] for step in range(3)])

    for alone, *others in zip(*batches, strict=True):
        for other in others:
            assert torch.equal(alone.timesteps, other.timesteps)
            assert torch.equal(alone.prompts, other.prompts)
            torch.testing.assert_close(alone.latents, other.latents, rtol=0, atol=1e-10)
            torch.testing.assert_close(alone.targets, other.targets, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("reference", ["unconditional", "anchor"])
def test_pool_uses_every_step_of_its_trajectories_before_it_repeats_one(tiny_model64, reference):
    config = make(trajectories=2, sampling_steps=3, batch_size=2, reference=reference)
    objective = ESDObjective(config)
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=6, seed=0, checkpoint=None)
    drawn = [
        (int(t), int(prompt))
        for step in range(6)
        for samples in [objective._samples.batch(step)[0]]
        for t, prompt in zip(samples.timesteps, samples.prompts, strict=True)
    ]
    every = sorted((int(t), prompt) for t in tiny_model64.sampling_timesteps(3) for prompt in (0, 1))

    assert sorted(drawn[:6]) == sorted(drawn[6:]) == every
    samples, text = objective._samples.batch(0)
    for place, t in enumerate(samples.timesteps):
        wanted = oracle.target(
            tiny_model64.network,
            samples.latents[place : place + 1],
            int(t),
            text[place],
            tiny_model64.encode([CONCEPT.anchor if reference == "anchor" else ""])[0],
            config.eta,
        )
        torch.testing.assert_close(samples.targets[place : place + 1], wanted, rtol=0, atol=1e-8)


@torch.no_grad()
def test_retain_term_is_the_distance_to_the_frozen_prediction_of_preserved_phrases(tiny_model64):
    objective = make(retain_weight=0.5).objective()
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=2, seed=7, checkpoint=None)
    edited = changed(tiny_model64)
    samples, text = objective._samples.batch(1)
    rows = [
        (
            samples.latents[[place]],
            int(samples.timesteps[place]),
            text[place],
            tiny_model64.network(samples.latents[[place]], samples.timesteps[[place]], text[[place]]).sample,
        )
        for place in range(2)
    ]
    alone = ESDObjective(make())
    alone.prepare(tiny_model64, CONCEPT, scope="xattn", steps=2, seed=7, checkpoint=None)

    torch.testing.assert_close(text, tiny_model64.encode(CONCEPT.preserved))
    expected = alone.loss(edited, 1).item() + 0.5 * oracle.mean_squared_error(edited.network, rows)
    assert objective.loss(edited, 1).item() == pytest.approx(expected, rel=1e-9)


def test_retain_term_without_preserved_phrases_is_refused(tiny_model):
    concept = Concept("van_gogh", "style", targets=("van gogh style",))

    with pytest.raises(ValueError, match="names no preserved phrases"):
        make(retain_weight=1.0).erase(tiny_model, concept, Off(), seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trajectory_guidance": 1.0},
        {"trajectory": "current"},
        nightly({"trajectories": 3}),
        {"trajectories": 3, "reference": "anchor"},
        nightly({"reference": "anchor"}),
        nightly({"erase_from": "a man"}),
        {"erase_from": "a man", "trajectories": 3},
        nightly({"retain_weight": 1.0}),
        {"retain_weight": 1.0, "trajectories": 3},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "plain",
)
def test_cost_is_exactly_the_formulas(tiny_model, changes):
    config = make(**changes)
    drawn = [draw_stops(5, step, 2, 4)[0] for step in range(3)]
    retained = [draw_stops(derived_seed(5, "retaining/samples"), step, 2, 4)[0] for step in range(3)]
    halves = 1 if config.trajectory_guidance == 1 else 2
    if config.trajectories:
        predictions = 2 + (config.reference == "anchor") + (config.erase_from is not None)
        expected = predictions * 3 * 4 + 3 * 2 + bool(config.retain_weight) * (2 * 3 * 4 + 3 * 2)
    else:
        expected = sum(halves * int(stops.sum()) for stops in drawn)
        expected += 6 * (2 + (config.erase_from is not None) + 1)
        if config.retain_weight:
            expected += sum(2 * int(stops.sum()) for stops in retained) + 6 * (1 + 1)

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=5)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert len(erasure.losses) == 3


@pytest.mark.parametrize("trajectory", ["frozen", "current"])
def test_erasing_lowers_the_loss_changes_the_scope_only_and_leaves_the_model_alone(tiny_model, trajectory):
    fingerprint = tiny_model.fingerprint()
    config = make(steps=12, learning_rate=3e-3, scope="xattn_kv", sampling_steps=2, trajectory=trajectory, eta=3)

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=0)

    assert tiny_model.fingerprint() == fingerprint
    assert not any(parameter.requires_grad for parameter in tiny_model.network.parameters())
    assert set(erasure.edit.entries) == set(scope_parameters(tiny_model, "xattn_kv"))
    assert sum(erasure.losses[-4:]) < sum(erasure.losses[:4])


def test_edit_says_how_it_was_made(tiny_model):
    metadata = make().erase(tiny_model, CONCEPT, Off(), seed=4).edit.metadata

    assert metadata["base"] == tiny_model.fingerprint()
    assert (metadata["method"], metadata["pruning"], metadata["scope"], metadata["seed"]) == ("ESD", "Off", "xattn", 4)
    assert metadata["concept"]["targets"] == list(CONCEPT.targets)
    assert metadata["config"]["eraser"]["eta"] == 1.5


class KilledError(Exception):
    """Stands in for kill -9."""


@pytest.mark.parametrize("trajectory", ["frozen", nightly("current")])
@pytest.mark.parametrize(
    "pruning", [Off(), Learned(steps=5, scope=None, finetune="after", finetune_steps=5)], ids=["off", "learned"]
)
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, trajectory, pruning):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    config = make(steps=5, sampling_steps=2, trajectory=trajectory)
    undisturbed = config.erase(tiny_model, CONCEPT, pruning, seed=1)
    fingerprint = tiny_model.fingerprint()
    loss = ESDObjective.loss

    for killed_at in (3, 8):
        if killed_at == 8 and isinstance(pruning, Off):
            break

        def dying_loss(self, model, step, killed_at=killed_at):
            if step == killed_at:
                raise KilledError
            return loss(self, model, step)

        monkeypatch.setattr(ESDObjective, "loss", dying_loss)
        with pytest.raises(KilledError):
            config.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")
        assert tiny_model.fingerprint() == fingerprint
    monkeypatch.setattr(ESDObjective, "loss", loss)
    before = tiny_model.unet_evaluations
    resumed = config.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


@pytest.mark.parametrize("trajectories", [None, nightly(4)])
def test_killed_precomputation_keeps_its_finished_parts(tiny_model, tmp_path, trajectories):
    config = make(trajectories=trajectories, sampling_batch_size=1, retain_weight=1.0)
    undisturbed = config.erase(tiny_model, CONCEPT, Off(), seed=1)
    calls = 0

    def die(*_):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KilledError

    hook = tiny_model.network.register_forward_pre_hook(die)
    with pytest.raises(KilledError):
        config.erase(tiny_model, CONCEPT, Off(), seed=1, checkpoint=tmp_path / "work")
    hook.remove()
    before = tiny_model.unet_evaluations
    resumed = config.erase(tiny_model, CONCEPT, Off(), seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


@torch.no_grad()
@pytest.mark.parametrize("scheduler", ["ddim", "lms", "pndm", "dpmsolver++"])
@pytest.mark.parametrize("trajectories", [None, 2])
def test_latents_are_in_the_unets_scale_whatever_the_scheduler(tiny_model, scheduler, trajectories):
    """Before the first step x_t is unit noise, where LMS's own latents are 15 times that."""
    tiny_model.scheduler_name = scheduler
    objective = ESDObjective(make(trajectories=trajectories))
    objective.prepare(tiny_model, CONCEPT, scope="xattn", steps=8, seed=0, checkpoint=None)
    samples = [objective._samples.batch(step)[0] for step in range(8)]
    first = int(tiny_model.sampling_timesteps(4)[0])

    latents = torch.cat([sample.latents[sample.timesteps == first] for sample in samples])

    assert len(latents) > 0
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert all(sample.targets.isfinite().all() for sample in samples)


def test_half_precision_weights_are_refused(tiny_model):
    tiny_model.network.to(torch.bfloat16)

    for pruning in (Off(), Learned(steps=1)):
        with pytest.raises(ValueError, match="weights of 'tiny' are bfloat16 and training needs float32"):
            make().erase(tiny_model, CONCEPT, pruning, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, "greater than 0"),
        ({"steps": -1}, "greater than or equal to 1"),
        ({"scope": "cross"}, "'xattn'"),
        ({"trajectory": "current", "trajectories": 4}, "set trajectory=frozen"),
        ({"published_offset": True, "trajectories": 4}, "set trajectories=null"),
        ({"erase_from": ""}, "at least 1 character"),
        ({"trajectory": "frosen"}, "'frozen' or 'current'"),
        ({"lr": 1.0}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_templates_multiply_targets(tiny_model):
    objective = ESDObjective(make())
    concept = dataclasses.replace(CONCEPT, templates=("{}", "a house, {}"))
    objective.prepare(tiny_model, concept, scope="xattn", steps=1, seed=0, checkpoint=None)

    phrases = ["van gogh style", "a house, van gogh style", "by vincent", "a house, by vincent"]
    torch.testing.assert_close(objective._text, tiny_model.encode(phrases))


def test_a_small_pool_leaves_out_no_target(tiny_model):
    concept = dataclasses.replace(CONCEPT, templates=("{}", "a house, {}", "a fish, {}"))
    objective = ESDObjective(make(trajectories=2, sampling_steps=1))
    objective.prepare(tiny_model, concept, scope="xattn", steps=1, seed=0, checkpoint=None)

    samples, _ = objective._samples.batch(0)

    assert sorted(concept.target_prompts[prompt] for prompt in samples.prompts) == ["by vincent", "van gogh style"]


def test_retain_term_takes_preserved_phrases_in_templates(tiny_model):
    concept = dataclasses.replace(CONCEPT, preserved_templates=("{}", "a house, {}"))
    objective = make(retain_weight=1.0).objective()
    objective.prepare(tiny_model, concept, scope="xattn", steps=1, seed=0, checkpoint=None)

    phrases = ["a fish", "a house, a fish", "a church", "a house, a church"]
    torch.testing.assert_close(objective._samples.text, tiny_model.encode(phrases))


def test_a_template_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"'a house' has no {}; every template must contain it"):
        dataclasses.replace(CONCEPT, templates=("a house",))


def test_scored_pruning_acts_on_the_erased_weights(tiny_model):
    erased = make().erase(tiny_model, CONCEPT, Off(), seed=0).edit
    both = make().erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.5)), seed=0).edit
    with erased.applied(tiny_model):
        weights = {name: weight.clone() for name, weight in scope_parameters(tiny_model, "xattn").items()}
    matrices = torch.cat([weight.flatten() for weight in weights.values() if weight.ndim > 1])
    threshold = matrices.abs().sort().values[len(matrices) // 2]

    with both.applied(tiny_model):
        for name, weight in scope_parameters(tiny_model, "xattn").items():
            small = (weights[name].abs() < threshold) if weight.ndim > 1 else torch.zeros_like(weight, dtype=torch.bool)
            assert torch.equal(weight, weights[name].masked_fill(small, 0))


def test_pruning_that_learns_needs_an_objective(tiny_model):
    with pytest.raises(
        ValueError, match=r"'Learned' learns under the eraser's objective and eraser 'NoEraser' has none"
    ):
        check_pair(NoEraser(), Learned())
    with pytest.raises(ValueError, match="has none"):
        NoEraser().erase(tiny_model, CONCEPT, Learned(), seed=0)
    assert NoEraser().erase(tiny_model, CONCEPT, Off(), seed=0).edit.entries == {}
