"""STEREO against its formulas: guidance, search and inversion; what rounds start from; cost, resumption and effect."""

import copy
import dataclasses

import pytest
import torch

from diffusion.prompt_template import PromptTemplate
from diffusion.streams import derived_seed, stream
from erasure import finetuning
from erasure.concept import Concept
from erasure.erasers import stereo
from erasure.erasers.stereo import STEREO, ComposedGuidance, STEREOObjective, placeholders
from erasure.finetuning import fine_tune
from erasure.parameters import scope_parameters
from erasure.pictures import Painting, Pictures
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.trajectories import draw_stops
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import esd
from tests.oracles import stereo as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a church, {}"),
    preserved=("a fish",),
    preserved_templates=("a house, {}", "{} in the snow"),
)
CHURCH = Concept("church", "object", targets=("a church",), anchor="a house", templates=("a red {} by a {}",))
BOTH = dataclasses.replace(CONCEPT, also=(CHURCH,))
PROMPTS = ["van gogh style", "a church, van gogh style", "by vincent", "a church, by vincent"]
CONTEXTS = [
    "a house, van gogh style",
    "van gogh style in the snow",
    "a house, by vincent",
    "by vincent in the snow",
]


def make(**changes):
    small = {
        "scope": "xattn",
        "rounds": 2,
        "search_steps": 2,
        "search_learning_rate": 1e-2,
        "search_eta": 1.5,
        "inversion_steps": 3,
        "inversion_learning_rate": 0.05,
        "inversion_batch_size": 2,
        "images": 5,
        "steps": 3,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "sampling_steps": 3,
    }
    return STEREO(**{**small, **changes})


def prepared(model, config, concept=CONCEPT, *, seed=7, steps=3):
    objective = STEREOObjective(config)
    with torch.enable_grad():
        objective.prepare(model, concept, scope="xattn", steps=steps, seed=seed, checkpoint=None)
    return objective


def changed(model):
    """The model with other cross-attention weights, as in the middle of training."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for weight in scope_parameters(edited, "xattn").values():
            weight.mul_(1.2)
    return edited


def point(source, text, empty, stop, seed):
    """x_t before a step of a trajectory, and its t, by the oracle."""
    timesteps = source.sampling_timesteps(3).tolist()
    alphas = source.process.alphas.tolist()
    return esd.trajectory_point(
        source.network, alphas, timesteps, stop, seed, (4, 8, 8), text, empty, guidance=3.0
    ), timesteps[stop]


@pytest.mark.parametrize("largest_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize("parallel", [1.0, 0.0, 0.4])
def test_pull_is_the_difference_shortened_and_turned_away_from_the_prediction(largest_norm, parallel):
    generator = torch.Generator().manual_seed(0)
    prediction, empty = (torch.randn((3, 2, 2, 2), generator=generator).double() for _ in range(2))
    expected = [oracle.pull(a[None], b[None], largest_norm, parallel) for a, b in zip(prediction, empty, strict=True)]

    pulled = make(largest_norm=largest_norm, parallel=parallel).pull(prediction, empty)

    torch.testing.assert_close(pulled, torch.cat(expected), rtol=1e-12, atol=1e-12)
    if parallel == 0:
        assert (pulled * prediction).sum((1, 2, 3)).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trajectory": "frozen"},
        {"trajectory": "frozen", "trajectories": 4, "negatives": "mean", "negative_scale": 3.0},
        {"anchors": "anchor", "anchor_scale": 0.7},
        {"anchors": ("a fish", "a parachute"), "trajectory": "frozen"},
        {"anchor_scale": 0.0},
        {"largest_norm": 0.5, "parallel": 0.3},
    ],
    ids=str,
)
def test_final_loss_is_the_papers_formula(tiny_model64, changes):
    config = make(**changes)
    objective = prepared(tiny_model64, config)
    edited = changed(tiny_model64)
    guidance = objective._guidance
    names, empty = guidance._names, tiny_model64.encode([""])[0]
    assert names.shape == (4, 3, 24, 32)
    torch.testing.assert_close(names[:, 0], tiny_model64.encode(PROMPTS), rtol=0, atol=1e-9)
    scale = config.negative_scale / (3 if config.negatives == "mean" else 1)

    for step in range(3):
        stops, seeds = draw_stops(7, step, 2, 3)
        error = 0.0
        for place in range(2):
            row = (2 * step + place) % 12
            if config.trajectories:
                samples, _ = guidance._samples.batch(step)
                row, t = int(samples.prompts[place]), int(samples.timesteps[place])
                x = samples.latents[[place]]
            else:
                source = edited if config.trajectory == "current" else tiny_model64
                x, t = point(source, names[row // 3, row % 3], empty, int(stops[place]), seeds[place])
            turn = row // 3
            anchors = []
            if config.anchor_scale:
                drawn = guidance._anchor_texts(torch.tensor([turn] * (place + 1)), step)[place]
                if config.anchors == "anchor":
                    assert torch.equal(drawn, tiny_model64.encode(CONCEPT.target_anchors)[turn])
                anchors = [(config.anchor_scale, drawn)]
            wanted = oracle.target(
                tiny_model64.network,
                x,
                t,
                empty,
                [(scale, text) for text in names[turn]],
                anchors,
                largest_norm=config.largest_norm,
                parallel=config.parallel,
            )
            predicted = edited.network(x, torch.tensor([t]), names[turn, row % 3][None]).sample
            error += ((predicted - wanted) ** 2).mean().item() / 2

        # The sampler's own arithmetic is in single precision in part.
        assert objective.loss(edited, step).item() == pytest.approx(error, rel=1e-9 if config.trajectories else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("anchors", "allowed"), [("contexts", CONTEXTS), (("a fish", "a red church"), ["a fish", "a red church"])]
)
def test_anchors_are_drawn_from_all_that_a_turn_may_have(tiny_model64, anchors, allowed):
    guidance = prepared(tiny_model64, make(anchors=anchors))._guidance
    texts = tiny_model64.encode(allowed)

    drawn = [
        int((texts - guidance._anchor_texts(torch.tensor([2]), step)).abs().sum((1, 2)).argmin()) for step in range(40)
    ]

    for step, number in enumerate(drawn):
        torch.testing.assert_close(guidance._anchor_texts(torch.tensor([2]), step)[0], texts[number], rtol=0, atol=1e-9)
    assert set(drawn) == set(range(len(allowed)))


@torch.no_grad()
def test_several_concepts_have_anchors_and_embeddings_of_their_own(tiny_model64):
    both = dataclasses.replace(BOTH, also=(dataclasses.replace(CHURCH, preserved_templates=("{} in rain",)),))
    guidance = prepared(tiny_model64, make(), both)._guidance
    church = tiny_model64.encode(["a church in rain"])[0]

    # Turns: van gogh, church, van gogh, church, ...
    assert guidance._names.shape[0] == 8
    for step in range(5):
        drawn = guidance._anchor_texts(torch.tensor([0, 1, 2, 3]), step)
        assert [torch.allclose(text, church, rtol=0, atol=1e-9) for text in drawn] == [False, True, False, True]
    torch.testing.assert_close(guidance._names[1], guidance._names[3])
    assert (guidance._names[0, 1] - guidance._names[4, 1]).abs().max() < 1e-9
    assert (guidance._names[0, 1] - guidance._names[1, 1]).abs().max() > 1e-3


def test_placeholders_are_templates_in_the_order_of_the_target_prompts():
    assert placeholders(BOTH) == ["{}", "a church, {}", "{}", "a church, {}", "a red {} by a a house"]


def test_inversion_is_textual_inversion_on_the_rounds_share_of_pictures_through_the_erased_model(
    tiny_model64, monkeypatch
):
    config = make(weight_decay=0.1, initial_word="a red fish")
    seen = []
    invert = STEREOObjective._invert

    def watched(self, model, template, pictures, start, seed, checkpoint):
        token, spent = invert(self, model, template, pictures, start, seed, checkpoint)
        seen.append((copy.deepcopy(model), pictures, seed, token))
        return token, spent

    monkeypatch.setattr(STEREOObjective, "_invert", watched)
    objective = prepared(tiny_model64, config)
    seeds = Painting(5, 3, 7.5, 64).seeds(derived_seed(7, "stereo/pictures", 0))
    painted = tiny_model64.sample(tiny_model64.encode([*PROMPTS, PROMPTS[0]]), seeds=seeds, steps=3, guidance=7.5)
    ids = tiny_model64.tokenizer("a red fish", add_special_tokens=False).input_ids
    start = sum(tiny_model64.vocabulary[token] for token in ids).detach() / len(ids)

    for number, (share, (erased, pictures, seed, token)) in enumerate(zip(([0, 1, 2], [3, 4]), seen, strict=True)):
        assert seed == derived_seed(7, "stereo/token", number, 0)
        torch.testing.assert_close(pictures.latents, painted[share], rtol=0, atol=1e-9)
        captions = [["{}", "a church, {}"][place % 2] for place in share]
        expected = oracle.invert(
            erased,
            list(zip(pictures.latents, captions, strict=True)),
            start,
            seed=seed,
            steps=3,
            size=2,
            rate=0.05,
            decay=0.1,
        )
        torch.testing.assert_close(token, expected, rtol=1e-9, atol=1e-9)
        # v* stands in every target prompt's template.
        texts = [
            oracle.encode(tiny_model64, oracle.template_with(tiny_model64, caption, expected))
            for caption in ("{}", "a church, {}", "{}", "a church, {}")
        ]
        torch.testing.assert_close(objective._guidance._names[:, 1 + number], torch.cat(texts), rtol=0, atol=1e-8)


def test_each_round_erases_what_the_round_before_found_from_the_model_that_it_left(tiny_model64, monkeypatch):
    rounds = []
    before = []

    def watched(model, guidance, training, *, checkpoint):
        before.append({name: weight.clone() for name, weight in scope_parameters(model, "xattn").items()})
        erasure = fine_tune(model, guidance, training, checkpoint=checkpoint)
        rounds.append((guidance, training, erasure))
        return erasure

    monkeypatch.setattr(stereo, "fine_tune", watched)
    fingerprint = tiny_model64.fingerprint()
    objective = prepared(tiny_model64, make())
    names = objective._guidance._names

    assert tiny_model64.fingerprint() == fingerprint
    torch.testing.assert_close(rounds[0][0]._names[:, 0], names[:, 0])
    torch.testing.assert_close(rounds[1][0]._names[:, 0], names[:, 1])
    assert all((training.steps, training.learning_rate) == (2, 1e-2) for _, training, _ in rounds)
    for name, weight in before[1].items():
        first = rounds[0][2].edit.entries[name].parts[""]
        assert torch.equal(weight, first) and not torch.equal(weight, before[0][name])
        assert torch.equal(rounds[1][0]._base[name], weight)
        assert torch.equal(objective._guidance._base[name], before[0][name])


@torch.no_grad()
@pytest.mark.parametrize("trajectory", ["frozen", "current"])
def test_a_rounds_loss_is_negative_guidance_away_from_one_name(tiny_model64, trajectory):
    config = make(trajectory=trajectory)
    names = tiny_model64.encode(PROMPTS[:2])[:, None]
    guidance = ComposedGuidance(config, names, 1.5)
    guidance.prepare(tiny_model64, CONCEPT, scope="xattn", steps=2, seed=3, checkpoint=None)
    edited, empty = changed(tiny_model64), tiny_model64.encode([""])[0]
    stops, seeds = draw_stops(3, 1, 2, 3)
    points = []
    for text, stop, seed in zip(names[:, 0], stops.tolist(), seeds, strict=True):
        x, t = point(edited if trajectory == "current" else tiny_model64, text, empty, stop, seed)
        points.append((x, t, text, esd.target(tiny_model64.network, x, t, text, empty, 1.5)))

    assert guidance.loss(edited, 1).item() == pytest.approx(esd.mean_squared_error(edited.network, points), rel=1e-5)


@torch.no_grad()
def test_what_is_found_denoises_better_than_where_the_inversion_began(tiny_model):
    latents = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    pictures = Pictures(latents, torch.tensor([0, 1, 0, 1]))
    template = PromptTemplate.at_placeholder(tiny_model, ["{}", "a church, {}"], 1)
    batch = pictures.draw(tiny_model, 128, stream(9, "test"))

    def error(embedding):
        text = template[batch.prompts].encode(tiny_model, embedding.expand(128, 1, -1))
        return finetuning.prediction_error(tiny_model, batch.latents, batch.timesteps, text, batch.targets).item()

    objective = STEREOObjective(make(inversion_steps=40, inversion_batch_size=8))
    with torch.enable_grad():
        token, spent = objective._invert(tiny_model, template, pictures, "fish", 0, None)

    assert spent == 40 * 8
    assert error(token) < error(tiny_model.vocabulary[tiny_model.tokenizer("fish").input_ids[1:-1]].mean(0))


@pytest.mark.parametrize(
    ("concept", "changes"),
    [
        (CONCEPT, {}),
        (BOTH, {"trajectory": "frozen"}),
        (CONCEPT, {"trajectory": "frozen", "trajectories": 4}),
        nightly(CONCEPT, {"anchor_scale": 0.0}),
        nightly(BOTH, {"anchors": "anchor", "rounds": 1}),
    ],
    ids=["current", "both, frozen", "pool", "no anchor", "both, anchor"],
)
def test_cost_is_exactly_the_formulas(tiny_model, concept, changes):
    config = make(**changes)
    parts, names = len(concept.parts), 1 + config.rounds
    current = config.trajectory == "current"

    def sampling(seed, steps):
        if config.trajectories:
            return 2 * 4 * 3
        return sum(int(2 * draw_stops(seed, step, 2, 3)[0].sum()) + (0 if current else 2) for step in range(steps))

    def training(steps, named, anchored):
        # Teacher: the empty prompt, the names but the one known beforehand, the anchor; then the student.
        return steps * 2 * (1 + named - (not current) + anchored + 1)

    expected = parts * (5 * 3 * 2 + config.rounds * 3 * 2)
    for number in range(config.rounds):
        expected += sampling(derived_seed(5, "stereo/search", number), 2) + training(2, 1, False)
    expected += sampling(5, 3) + training(3, names, bool(config.anchor_scale))

    erasure = config.erase(tiny_model, concept, Off(), seed=5)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert len(erasure.losses) == 3


def test_erasing_lowers_the_loss_changes_the_scope_only_and_leaves_the_model_alone(tiny_model):
    fingerprint = tiny_model.fingerprint()
    config = make(
        steps=12, learning_rate=3e-3, scope="xattn_kv", trajectory="frozen", trajectories=2, rounds=1, negative_scale=3
    )

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=0)

    assert tiny_model.fingerprint() == fingerprint
    assert not any(parameter.requires_grad for parameter in tiny_model.network.parameters())
    assert set(erasure.edit.entries) == set(scope_parameters(tiny_model, "xattn_kv"))
    assert erasure.edit.metadata["method"] == "STEREO"
    assert sum(erasure.losses[-4:]) < sum(erasure.losses[:4])


def test_retain_term_joins_the_final_erasing(tiny_model):
    config = make(trajectory="frozen", rounds=1)
    plain = config.erase(tiny_model, CONCEPT, Off(), seed=0)
    kept = dataclasses.replace(config, retain_weight=1.0).erase(tiny_model, CONCEPT, Off(), seed=0)

    assert kept.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert kept.losses[1] != plain.losses[1]
    assert kept.unet_evaluations > plain.unet_evaluations


def test_learned_pruning_masks_weights_under_the_final_loss(tiny_model):
    pruning = Learned(steps=3, scope="xattn_ffn", learning_rate=0.9, finetune="after", finetune_steps=2)

    erasure = make().erase(tiny_model, CONCEPT, pruning, seed=0)

    assert len(erasure.losses) == 5
    assert set(erasure.edit.entries) <= set(scope_parameters(tiny_model, "xattn_ffn"))
    assert erasure.edit.metadata["pruned_weights"] > 0


def test_scored_pruning_acts_on_the_erased_weights(tiny_model):
    edit = make(rounds=1).erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.5)), seed=0).edit

    with edit.applied(tiny_model):
        matrices = torch.cat(
            [weight.flatten() for weight in scope_parameters(tiny_model, "xattn").values() if weight.ndim > 1]
        )
    assert (matrices == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


class KilledError(Exception):
    """Stands in for kill -9."""


@pytest.mark.parametrize(
    ("trajectory", "killed_at"), [("frozen", 4), nightly("current", 7), nightly("frozen", 9), nightly("current", 14)]
)
def test_killed_erasing_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, trajectory, killed_at):
    """Step by step: two of a round's erasing, three of its inversion, the same again, and three of the last erasing."""
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 1)
    eraser = make(trajectory=trajectory, retain_weight=0.5, steps=5)
    undisturbed = eraser.erase(tiny_model, CONCEPT, Off(), seed=1)
    fingerprint = tiny_model.fingerprint()
    step = torch.optim.AdamW.step
    steps = 0

    def dying_step(self, *arguments, **named):
        nonlocal steps
        steps += 1
        if steps == killed_at:
            raise KilledError
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying_step)
    with pytest.raises(KilledError):
        eraser.erase(tiny_model, CONCEPT, Off(), seed=1, checkpoint=tmp_path / "work")
    assert tiny_model.fingerprint() == fingerprint
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    before = tiny_model.unet_evaluations
    resumed = eraser.erase(tiny_model, CONCEPT, Off(), seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_eta": -1.0}, "greater than or equal to 0"),
        ({"anchors": "preserved"}, "anchors is 'preserved'; it must be contexts, anchor, or a list of prompts"),
        ({"anchors": []}, "or a list of prompts"),
        ({"negatives": "max"}, "'sum' or 'mean'"),
        ({"images": 1}, "images must be 2 or more"),
        ({"trajectory": "current", "trajectories": 4}, "set trajectory=frozen or trajectories=null"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("eraser/stereo*.yaml")), ids=lambda path: path.stem)
def test_config_instantiates_and_names_every_field(monkeypatch, path):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    job = make_job(f"eraser={path.stem}")

    assert isinstance(job.eraser, STEREO)
    assert set(job.config["eraser"]) - {"_target_"} == {field.name for field in dataclasses.fields(job.eraser)}
