"""AdvUnlearn against its formulas, attacks included; whose samples an attack takes; cost, resumption and effect."""

import copy
import dataclasses

import pytest
import torch

from diffusion.parameters import named_parameters
from diffusion.streams import derived_seed, stream
from erasure import finetuning
from erasure.concept import Concept
from erasure.erasers.advunlearn import AdvUnlearn, AdvUnlearnObjective, text_layers
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.trajectories import draw_stops
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import advunlearn as oracle
from tests.oracles import esd
from tests.tiny_job import CONFIG_FOLDER, make_job

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a church, {}"),
    preserved=("a fish", "a parachute"),
)
PROMPTS = ["van gogh style", "a church, van gogh style", "by vincent", "a church, by vincent"]


def make(**changes):
    small = {
        "steps": 4,
        "batch_size": 2,
        "warmup": 2,
        "attack_steps": 3,
        "attack_learning_rate": 0.05,
        "retain_weight": 0.0,
        "sampling_steps": 3,
    }
    return AdvUnlearn(**{**small, **changes})


def prepared(model, config, *, steps=4, seed=7):
    objective = AdvUnlearnObjective(config)
    objective.prepare(model, CONCEPT, scope="xattn", steps=steps, seed=seed, checkpoint=None)
    return objective


def changed(model, scope="text_encoder"):
    """The model with other weights, as in the middle of training."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for weight in scope_parameters(edited, scope).values():
            weight.mul_(1.1)
    return edited


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "scope"),
    [
        ({}, "text_encoder"),
        ({"tokens": 2, "insertion": "mid_k", "trajectories": 4}, "text_encoder"),
        nightly({"attack": "sign"}, "text_encoder"),
        nightly({"accumulate": True, "eta": 2.0}, "text_encoder"),
        ({"attack": "sign", "accumulate": True}, "text_encoder"),
        ({"scope": "xattn"}, "xattn"),
    ],
    ids=["adam", "mid, two tokens, pool", "sign", "accumulate", "accumulated signs", "u-net"],
)
def test_loss_is_the_papers_formula_at_the_embeddings_that_the_attack_finds(tiny_model64, changes, scope):
    config = make(**changes)
    objective = prepared(tiny_model64, config)
    edited = changed(tiny_model64, scope)
    empty = tiny_model64.encode([""])
    batch = 0
    for step in range(4):
        samples, _ = objective._samples.batch(batch)
        attacked = step >= config.warmup
        points = [objective._samples.batch(batch + 1 + attempt)[0] for attempt in range(3 * attacked)]
        batch += 1 + 3 * attacked
        tokens = torch.randint(
            len(edited.vocabulary), (2, config.tokens), generator=stream(7, "advunlearn/attack", step)
        )
        expected = 0.0
        for place in range(2):
            prompt = PROMPTS[int(samples.prompts[place])]
            frozen = tiny_model64.encode([prompt])
            seen = []
            for point in [samples, *points]:
                x, t = point.latents[[place]], int(point.timesteps[place])
                seen.append((x, t, tiny_model64.network(x, torch.tensor([t]), frozen).sample))
            x, t, named = seen[0]
            unnamed = tiny_model64.network(x, torch.tensor([t]), empty).sample
            text = edited.encode([prompt])
            if attacked:
                start = edited.vocabulary[tokens[place]].detach()
                rows = oracle.attack(
                    edited,
                    prompt,
                    start,
                    seen[1:],
                    where=config.insertion,
                    rate=0.05,
                    signs=config.attack == "sign",
                    accumulate=config.accumulate,
                )
                text = oracle.adversarial_text(edited, prompt, rows, config.insertion)
            wanted = unnamed - config.eta * (named - unnamed)
            expected += oracle.squared_error(edited, x, t, text, wanted).item() / 2

        assert objective.loss(edited, step).item() == pytest.approx(expected, rel=1e-7)


@torch.no_grad()
def test_every_sample_lies_on_a_trajectory_of_its_own_prompt(tiny_model64):
    objective = prepared(tiny_model64, make())
    timesteps = tiny_model64.sampling_timesteps(3).tolist()
    alphas = tiny_model64.process.alphas.tolist()
    empty = tiny_model64.encode([""])[0]

    for batch in (0, 1, 4, 9):
        samples, _ = objective._samples.batch(batch)
        stops, seeds = draw_stops(7, batch, 2, 3)
        for place, (stop, seed) in enumerate(zip(stops.tolist(), seeds, strict=True)):
            text = tiny_model64.encode([PROMPTS[int(samples.prompts[place])]])[0]
            x = esd.trajectory_point(
                tiny_model64.network, alphas, timesteps, stop, seed, (4, 8, 8), text, empty, guidance=3.0
            )
            target = tiny_model64.network(x, torch.tensor([timesteps[stop]]), text[None]).sample
            assert samples.timesteps[place] == timesteps[stop]
            torch.testing.assert_close(samples.latents[[place]], x, rtol=0, atol=1e-5)
            torch.testing.assert_close(samples.targets[[place]], target, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("trajectories", [None, 9, 4, 2, 1])
def test_an_attack_takes_samples_of_the_prompts_of_its_training_step(tiny_model, trajectories):
    config = make(trajectories=trajectories, steps=6)
    objective = prepared(tiny_model, config, steps=6)
    # The first of the prompts with a trajectory, or the last such before each.
    having = {place * 4 // trajectories for place in range(trajectories)} if trajectories else {0, 1, 2, 3}
    wanted = [max(have for have in having if have <= prompt) for prompt in range(4)]

    batch = 0
    for step in range(6):
        count = 1 + 3 * (step >= 2)
        for number in range(batch, batch + count):
            drawn = objective._samples.batch(number)[0].prompts.tolist()
            assert drawn == [wanted[2 * step % 4], wanted[(2 * step + 1) % 4]]
        batch += count


@torch.no_grad()
def test_of_a_pool_every_step_of_a_prompts_trajectories_comes_before_one_comes_again(tiny_model):
    objective = prepared(tiny_model, make(trajectories=4, warmup=0), steps=6)
    drawn = {prompt: [] for prompt in range(4)}
    for number in range(24):
        samples, _ = objective._samples.batch(number)
        for prompt, t in zip(samples.prompts.tolist(), samples.timesteps.tolist(), strict=True):
            drawn[prompt].append(t)

    timesteps = sorted(tiny_model.sampling_timesteps(3).tolist())
    for seen in drawn.values():
        assert len(seen) == 12
        assert all(sorted(seen[first : first + 3]) == timesteps for first in range(0, 12, 3))


@torch.no_grad()
def test_retain_term_is_what_the_trained_text_encoder_makes_of_preserved_phrases(tiny_model64):
    objective = make(retain_weight=0.5, retain_batch_size=3).objective()
    objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=2, seed=7, checkpoint=None)
    edited = changed(tiny_model64)
    samples, frozen = objective._samples.batch(1)
    error = 0.0
    for place in range(3):
        x, t = samples.latents[[place]], samples.timesteps[[place]]
        wanted = tiny_model64.network(x, t, frozen[[place]]).sample
        text = edited.encode([CONCEPT.preserved[int(samples.prompts[place])]])
        error += oracle.squared_error(edited, x, int(t), text, wanted).item() / 3

    alone = prepared(tiny_model64, make()).loss(edited, 1).item()
    assert error > 1e-6
    assert objective.loss(edited, 1).item() == pytest.approx(alone + 0.5 * error, rel=1e-9)


def test_more_steps_of_attack_come_closer_to_the_concept(tiny_model):
    edited = changed(tiny_model)
    points = prepared(tiny_model, make(attack_steps=9, trajectories=4, warmup=0))._samples

    def error(attack_steps):
        config = make(attack_steps=attack_steps, trajectories=4, warmup=0, attack_learning_rate=0.1)
        objective = prepared(tiny_model, config)
        template = objective._attacked[torch.tensor([0, 1])]
        text = template.encode(edited, objective._attack(edited, template, 0))
        seen = [points.batch(number)[0] for number in range(10)]
        return sum(
            finetuning.prediction_error(edited, samples.latents, samples.timesteps, text, samples.targets).item()
            for samples in seen
        )

    assert error(40) < 0.9 * error(1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        nightly({"trajectories": 3}),
        {"attack_steps": 0},
        {"warmup": 9},
        nightly({"retain_weight": 1.0}),
        {"retain_weight": 1.0, "trajectories": 3},
    ],
    ids=str,
)
def test_cost_is_exactly_the_formulas(tiny_model, changes):
    config = make(retain_batch_size=3, **changes)
    attacked = max(0, 4 - config.warmup)
    batches = 4 + attacked * config.attack_steps
    training = 2 * (4 * 2 + attacked * config.attack_steps)
    if config.trajectories:
        sampling = 2 * 3 * 3
        retained = 2 * 3 * 3
    else:
        sampling = sum(int(2 * draw_stops(5, batch, 2, 3)[0].sum()) + 2 for batch in range(batches))
        own = derived_seed(5, "retaining/samples")
        retained = sum(int(2 * draw_stops(own, step, 3, 3)[0].sum()) + 3 for step in range(4))
    expected = sampling + training + (retained + 4 * 3 if config.retain_weight else 0)

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=5)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert len(erasure.losses) == 4


def test_the_papers_settings_cost_no_more_than_the_authors_code(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    config = make_job("eraser=advunlearn_sd14").eraser
    batches, attacked = config.batches_before(1000), 800 * config.attack_steps
    trajectories = (batches + 1000 * config.retain_batch_size) * (2 * 24.5 + 1)
    # A backward pass counts as two evaluations.
    training = 3 * attacked + 1000 * (1 + 3) + 1000 * config.retain_batch_size * 3

    assert (batches, attacked) == (25_000, 24_000)
    assert trajectories + training < 1.7e6
    pool = 2 * 2 * 500 * 50
    assert pool + training < 0.25e6


@pytest.mark.parametrize("layers", [None, 1])
def test_erasing_lowers_the_loss_changes_the_text_encoder_only_and_leaves_the_model_alone(tiny_model, layers):
    fingerprint = tiny_model.fingerprint()
    config = make(steps=30, warmup=28, learning_rate=3e-3, trajectories=2, layers=layers)

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=0)

    assert tiny_model.fingerprint() == fingerprint
    assert not any(parameter.requires_grad for parameter in named_parameters(tiny_model).values())
    names = {name.removeprefix("text_encoder.") for name in scope_parameters(tiny_model, "text_encoder")}
    wanted = {name for name in names if layers is None or ".0." in name}
    # Keys' biases move no attention.
    movable = {name for name in wanted if not name.endswith("k_proj.bias")}
    assert movable <= {name.removeprefix("text_encoder.") for name in erasure.edit.entries} <= wanted
    assert erasure.edit.metadata["scope"] == "text_encoder"
    assert erasure.edit.metadata["method"] == "AdvUnlearn"
    assert sum(erasure.losses[20:28]) < 0.9 * sum(erasure.losses[:8])


def test_all_layers_are_the_text_encoders_scope_with_the_final_norm(tiny_model):
    assert text_layers(tiny_model, None) == tuple(scope_parameters(tiny_model, "text_encoder"))
    assert not any("final" in name or "embedding" in name for name in text_layers(tiny_model, 2))
    with pytest.raises(ValueError, match=r"layers is 3 and the text encoder of 'tiny' has 2; give 1 to 2\."):
        make(layers=3).erase(tiny_model, CONCEPT, Off(), seed=0)


def test_an_edited_text_encoder_is_saved_applied_and_reverted(tiny_model, tmp_path):
    before = tiny_model.encode_prompts(PROMPTS)
    edit = make(learning_rate=1e-2).erase(tiny_model, CONCEPT, Off(), seed=0).edit
    edit.save(tmp_path / "edit.safetensors")

    with type(edit).load(tmp_path / "edit.safetensors").applied(tiny_model):
        assert (tiny_model.encode_prompts(PROMPTS) - before).abs().max() > 1e-3
    assert torch.equal(tiny_model.encode_prompts(PROMPTS), before)


def test_a_part_of_the_u_net_can_be_trained_instead(tiny_model):
    edit = make(scope="xattn_kv", learning_rate=1e-2).erase(tiny_model, CONCEPT, Off(), seed=0).edit

    assert set(edit.entries) == set(scope_parameters(tiny_model, "xattn_kv"))
    assert edit.metadata["scope"] == "xattn_kv"


@pytest.mark.parametrize("scope", ["text_encoder", "ffn"])
def test_learned_pruning_masks_the_u_net_under_the_adversarial_loss(tiny_model, scope):
    eraser = make(scope=scope)

    erasure = eraser.erase(tiny_model, CONCEPT, Learned(steps=4, scope=None, learning_rate=0.9), seed=0)

    masked = "xattn" if scope == "text_encoder" else scope
    assert 0 < len(erasure.edit.masks()) == len(erasure.edit.entries)
    assert set(erasure.edit.entries) <= set(scope_parameters(tiny_model, masked))


def test_scored_pruning_joins_the_text_encoders_edit(tiny_model):
    edit = make(learning_rate=1e-2).erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.5)), seed=0).edit

    assert {name.startswith("text_encoder.") for name in edit.entries} == {True, False}


def test_several_concepts_take_turns(tiny_model):
    church = Concept("church", "object", targets=("a church",), preserved=("a fish",))
    both = dataclasses.replace(CONCEPT, also=(church,))
    objective = AdvUnlearnObjective(make(batch_size=1))
    objective.prepare(tiny_model, both, scope="xattn", steps=3, seed=0, checkpoint=None)

    numbers = [objective._samples.batch(number)[0].prompts.item() for number in range(6)]

    prompts = ["van gogh style", "a church", *["a church, van gogh style"] * 4]
    assert torch.equal(objective._ids[numbers], tiny_model.tokenize(prompts))


class KilledError(Exception):
    """Stands in for kill -9."""


@pytest.mark.parametrize("trajectories", [nightly(None), 3])
@pytest.mark.parametrize("pruning", [Off(), nightly(Learned(steps=4, scope=None))], ids=["off", "learned"])
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, pruning, trajectories):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make(retain_weight=0.5, trajectories=trajectories, warmup=1)
    undisturbed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1)
    fingerprint = tiny_model.fingerprint()
    attack = AdvUnlearnObjective._attack

    def dying_attack(self, model, template, step):
        if step == 3:
            raise KilledError
        return attack(self, model, template, step)

    monkeypatch.setattr(AdvUnlearnObjective, "_attack", dying_attack)
    with pytest.raises(KilledError):
        eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")
    assert tiny_model.fingerprint() == fingerprint
    monkeypatch.setattr(AdvUnlearnObjective, "_attack", attack)
    before = tiny_model.unet_evaluations
    resumed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


@torch.no_grad()
@pytest.mark.parametrize("trajectories", [None, 3])
def test_precomputation_does_not_depend_on_its_batch_size(tiny_model64, trajectories):
    one, other = (prepared(tiny_model64, make(trajectories=trajectories, sampling_batch_size=size)) for size in (1, 64))

    for number in range(10):
        for alone, together in zip(
            vars(one._samples.batch(number)[0]).values(), vars(other._samples.batch(number)[0]).values(), strict=True
        ):
            torch.testing.assert_close(alone, together, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"attack": "pgd"}, "'adam' or 'sign'"),
        ({"scope": "token_embedding"}, "'text_encoder'"),
        ({"scope": "xattn", "layers": 1}, "set scope=text_encoder or layers=null"),
        ({"published_offset": True, "trajectories": 4}, "set trajectories=null"),
        ({"eta": 0.0}, "greater than 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_more_tokens_than_prompts_have_room_for_are_refused(tiny_model):
    with pytest.raises(ValueError, match="23 tokens cannot be inserted: this model's prompts take 1 to 22 of them"):
        make(tokens=23).erase(tiny_model, CONCEPT, Off(), seed=0)


def test_retain_term_without_preserved_phrases_is_refused(tiny_model):
    with pytest.raises(ValueError, match="names no preserved phrases"):
        make(retain_weight=1.0).erase(tiny_model, dataclasses.replace(CONCEPT, preserved=()), Off(), seed=0)
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("eraser/advunlearn*.yaml")), ids=lambda path: path.stem)
def test_config_instantiates_and_names_every_field(monkeypatch, path):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    job = make_job(f"eraser={path.stem}")

    assert isinstance(job.eraser, AdvUnlearn)
    assert set(job.config["eraser"]) - {"_target_"} == {field.name for field in dataclasses.fields(job.eraser)}
