"""Receler against its formulas: adapters, masks, attacks and loss; its exact cost, resumption and effect."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from diffusion.loading import load_model
from diffusion.parameters import named_parameters
from diffusion.streams import derived_seed, stream
from erasure import finetuning
from erasure.addition import attached
from erasure.additions.adapters import Adapters, AdaptersAtWork, layer_widths
from erasure.attention import concept_columns
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.receler import Receler, RecelerObjective, added_outside
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.trajectories import draw_stops
from tests.canvas_effect import effect_on_canvas
from tests.erasures import assert_same_erasure
from tests.night import nightly
from tests.oracles import esd
from tests.oracles import receler as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a house, {} in the snow"),
    preserved=("a fish", "a red church"),
)
CHURCH = Concept("church", "object", targets=("a church",), preserved=("a tench",))
BOTH = dataclasses.replace(CONCEPT, also=(CHURCH,))


def make(**changes):
    small = {
        "rank": 3,
        "mask_reduction": 1,
        "mask_threshold": 0.4,
        "regularisation_weight": 0.7,
        "steps": 4,
        "batch_size": 2,
        "tokens": 2,
        "attack_steps": 2,
        "sampling_steps": 3,
    }
    return Receler(**{**small, **changes})


def trained(model, *, rank=3, scale=0.3):
    """Adapters as in the middle of training."""
    adapters = Adapters.untrained(model, rank, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return Adapters(
        {
            name: value + scale * torch.randn(value.shape, generator=generator)
            for name, value in adapters.weights.items()
        }
    )


def prepared(model, config, adapters, concept=CONCEPT, *, steps=4, seed=7):
    """The objective, with the adapters in the model."""
    at_work = AdaptersAtWork(adapters, model)
    objective = RecelerObjective(config, at_work)
    with at_work.silenced():
        objective.prepare(model, concept, scope="xattn", steps=steps, seed=seed, checkpoint=None)
    return objective


def expected_points(frozen, weights, config, objective, step):
    """x_t [1, c, h, w], t and the target prompt's number, of every sample of a training step."""
    if config.trajectories is not None:
        samples, _ = objective._samples.batch(step)
        rows = objective._turns[samples.prompts].tolist()
        return [(samples.latents[[place]], int(samples.timesteps[place]), row) for place, row in enumerate(rows)]

    class Adapted(torch.nn.Module):
        def forward(self, x, t, text):
            noise, _ = oracle.predict(frozen.network, weights, x, int(t), text[0])
            return type("Output", (), {"sample": noise})

    unet = frozen.network if config.trajectory == "frozen" else Adapted()
    timesteps = frozen.sampling_timesteps(3).tolist()
    stops, seeds = draw_stops(7, step, config.batch_size, 3)
    points = []
    for place, (stop, seed) in enumerate(zip(stops.tolist(), seeds, strict=True)):
        turn = (config.batch_size * step + place) % len(objective._turns)
        row = int(objective._turns[turn])
        x = esd.trajectory_point(
            unet,
            frozen.process.alphas.tolist(),
            timesteps,
            stop,
            seed,
            (4, 8, 8),
            objective._text[row],
            frozen.encode([""])[0],
            guidance=3.0,
        )
        points.append((x, timesteps[stop], row))
    return points


def oracle_prompts(frozen, concept, config):
    return [
        oracle.Prompt(
            frozen.encode([prompt])[0].detach(),
            len(frozen.tokenizer(prompt, add_special_tokens=False).input_ids),
            torch.rand((config.tokens, 32), generator=stream(7, "receler/prompts", row)).double().tolist(),
            config.attack_learning_rate,
            config.attack_weight_decay,
        )
        for row, prompt in enumerate(concept.target_prompts)
    ]


def test_an_adapter_adds_what_the_formula_says(tiny_model64):
    adapters = trained(tiny_model64)
    latents, text = tiny_model64.initial_latents([1, 2]), tiny_model64.encode(["a church", ""])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        tiny_model64.network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.setdefault(name, output)
        )
        for name in adapters.layers
    ]
    at_work = AdaptersAtWork(adapters, tiny_model64)
    with torch.no_grad(), at_work.heard() as heard:
        tiny_model64.predict(latents, 300, text)
    at_work.detach()
    for hook in hooks:
        hook.remove()

    assert heard.keys() == layer_widths(tiny_model64).keys()
    for name, outputs in heard.items():
        matrices = [part.tolist() for part in adapters.layers[name]]
        expected = [[oracle.added(pixel, *matrices) for pixel in sample.tolist()] for sample in seen[name]]
        torch.testing.assert_close(outputs, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_u_net_with_adapters_is_the_oracles(tiny_model64):
    adapters = trained(tiny_model64)
    latents, text = tiny_model64.initial_latents([1]), tiny_model64.encode(["a church"])
    expected, _ = oracle.predict(tiny_model64.network, dict(adapters.weights), latents, 300, text[0])
    plain = tiny_model64.predict(latents, 300, text)

    with attached(tiny_model64, adapters):
        torch.testing.assert_close(tiny_model64.predict(latents, 300, text), expected, rtol=1e-10, atol=1e-10)
    assert (expected - plain).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("reduction", "size"), [(1, (8, 8)), (2, (4, 4))])
def test_masks_are_exactly_the_formulas_in_the_layers_of_one_size(tiny_model64, reduction, size):
    config = make(mask_reduction=reduction, batch_size=4)
    frozen = copy.deepcopy(tiny_model64)
    objective = prepared(tiny_model64, config, trained(tiny_model64))
    latents = tiny_model64.initial_latents([0, 1, 2, 3])
    timesteps, rows = torch.tensor([0, 300, 600, 999]), torch.tensor([3, 1, 2, 0])
    columns = concept_columns(frozen, CONCEPT)

    named, targets, masks = objective._teach(tiny_model64, latents, timesteps, rows)

    assert masks.shape == (4, *size)
    assert 0 < masks.double().mean() < 1
    for place, (t, row) in enumerate(zip(timesteps.tolist(), rows.tolist(), strict=True)):
        text = frozen.encode([CONCEPT.target_prompts[row]])[0]
        x = latents[[place]]
        tokens = columns[row].nonzero().flatten().tolist()
        assert masks[place].tolist() == oracle.concept_mask(frozen.network, x, t, text, tokens, size, 0.4)
        wanted = esd.target(frozen.network, x, t, text, frozen.encode([""])[0], 1.0)
        torch.testing.assert_close(targets[[place]], wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(named[[place]], frozen.network(x, t, text[None]).sample, rtol=1e-9, atol=1e-9)


def test_regularisation_counts_what_is_added_outside_the_mask_layer_by_layer():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand((3, 4, 4), generator=generator) < 0.5
    masks[2] = True
    masks[2, 0, 1] = False  # lost in the layer of 2x2
    added = {
        str(pixels): torch.randn((3, pixels, 5), generator=generator, dtype=torch.float64) for pixels in (64, 16, 4)
    }
    expected = [
        oracle.regularisation([output[place] for output in added.values()], masks[place].tolist()).item()
        for place in range(3)
    ]

    assert added_outside(added, masks, (8, 8)).item() == pytest.approx(sum(expected) / 3, rel=1e-12)
    assert added_outside(added, torch.ones_like(masks), (8, 8)).item() == 0


@pytest.mark.parametrize(
    ("changes", "concept"),
    [
        ({}, CONCEPT),
        nightly({"stale_attack": True, "attack_steps": 3}, CONCEPT),
        ({"stale_attack": True, "attack_steps": 1, "batch_size": 1}, BOTH),
        ({"trajectory": "frozen", "reference": "anchor", "eta": 2.0}, BOTH),
        ({"trajectory": "frozen", "trajectories": 4, "mask_reduction": 2, "batch_size": 5}, CONCEPT),
        nightly({"attack_steps": 0, "tokens": 1, "regularisation_weight": 0.0}, CONCEPT),
    ],
    ids=["current", "stale", "stale, both", "frozen, anchor, both", "pool", "no attack"],
)
def test_losses_are_the_papers_formula_at_the_embeddings_that_the_attacks_find(tiny_model64, changes, concept):
    config = make(**changes)
    frozen = copy.deepcopy(tiny_model64)
    adapters = trained(tiny_model64)
    weights = dict(adapters.weights)
    objective = prepared(tiny_model64, config, adapters, concept)
    prompts = oracle_prompts(frozen, concept, config)
    columns = concept_columns(frozen, concept)
    anchors = concept.target_anchors if config.reference == "anchor" else [""] * len(prompts)
    edge = 8 // config.mask_reduction

    for step in range(2):
        with torch.no_grad():
            points = expected_points(frozen, weights, config, objective, step)
            named = [frozen.network(x, torch.tensor([t]), prompts[row].text[None]).sample for x, t, row in points]

        def attack(points=points, named=named):
            slopes: dict[int, list] = {}
            for (x, t, row), wanted in zip(points, named, strict=True):
                slope = torch.tensor(prompts[row].gradient(frozen.network, weights, x, t, wanted), dtype=torch.float64)
                slopes[row] = slopes.get(row, 0) + slope
            for row, slope in slopes.items():
                prompts[row].step(slope.tolist())

        for _ in range(config.attack_steps - config.stale_attack):
            attack()
        expected = 0.0
        with torch.no_grad():
            for x, t, row in points:
                text = prompts[row].attacked() if config.attack_steps else prompts[row].text
                noise, outputs = oracle.predict(frozen.network, weights, x, t, text)
                wanted = esd.target(
                    frozen.network, x, t, prompts[row].text, frozen.encode([anchors[row]])[0], config.eta
                )
                tokens = columns[row].nonzero().flatten().tolist()
                mask = oracle.concept_mask(frozen.network, x, t, prompts[row].text, tokens, (edge, edge), 0.4)
                error = ((noise - wanted) ** 2).mean() + config.regularisation_weight * oracle.regularisation(
                    outputs, mask
                )
                expected += error.item() / len(points)
        if config.stale_attack:
            attack()

        # The sampler's own arithmetic is in single precision in part.
        assert objective.loss(tiny_model64, step).item() == pytest.approx(expected, rel=1e-5)
    for embedding, prompt in zip(objective.prompts._embeddings, prompts, strict=True):
        torch.testing.assert_close(embedding, torch.tensor(prompt.rows, dtype=torch.float64), rtol=1e-3, atol=1e-5)


def test_one_step_of_the_attack_is_exact_where_points_are(tiny_model64):
    config = make(trajectory="frozen", trajectories=4, batch_size=1, attack_steps=1)
    frozen = copy.deepcopy(tiny_model64)
    adapters = trained(tiny_model64)
    objective = prepared(tiny_model64, config, adapters)
    prompts = oracle_prompts(frozen, CONCEPT, config)
    [(x, t, row)] = expected_points(frozen, dict(adapters.weights), config, objective, 0)
    before = [embedding.clone() for embedding in objective.prompts._embeddings]

    objective.loss(tiny_model64, 0)

    wanted = frozen.network(x, torch.tensor([t]), prompts[row].text[None]).sample
    prompts[row].step(prompts[row].gradient(frozen.network, dict(adapters.weights), x, t, wanted))
    for number, embedding in enumerate(objective.prompts._embeddings):
        assert torch.equal(embedding, before[number]) == (number != row)
        torch.testing.assert_close(
            embedding, torch.tensor(prompts[number].rows, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("retain_weight", [0.0, 0.5])
@pytest.mark.parametrize("stale", [False, True])
def test_gradients_flow_into_the_adapters_alone_and_are_those_of_the_formula(tiny_model64, stale, retain_weight):
    config = make(trajectory="frozen", trajectories=4, batch_size=1, attack_steps=1, stale_attack=stale)
    frozen = copy.deepcopy(tiny_model64)
    adapters = trained(tiny_model64)
    weights = {name: value.clone().requires_grad_() for name, value in adapters.weights.items()}
    at_work = AdaptersAtWork(adapters, tiny_model64)
    own = RecelerObjective(config, at_work)
    objective = finetuning.retaining(own, retain_weight, config.settings, 1)
    with at_work.silenced():
        objective.prepare(tiny_model64, CONCEPT, scope="xattn", steps=1, seed=7, checkpoint=None)
    for value in adapters.weights.values():
        value.requires_grad_()
    [(x, t, row)] = expected_points(frozen, weights, config, own, 0)
    before = own.prompts.text(torch.tensor([row]))[0]

    objective.loss(tiny_model64, 0).backward()

    text = before if stale else own.prompts.text(torch.tensor([row]))[0]
    named = frozen.encode([CONCEPT.target_prompts[row]])[0]
    tokens = concept_columns(frozen, CONCEPT)[row].nonzero().flatten().tolist()
    mask = oracle.concept_mask(frozen.network, x, t, named, tokens, (8, 8), 0.4)
    wanted = esd.target(frozen.network, x, t, named, frozen.encode([""])[0], 1.0)
    noise, outputs = oracle.predict(frozen.network, weights, x, t, text)
    expected = ((noise - wanted) ** 2).mean() + 0.7 * oracle.regularisation(outputs, mask)
    if retain_weight:
        samples, kept = objective._samples.batch(0)
        noise, _ = oracle.predict(frozen.network, weights, samples.latents, int(samples.timesteps), kept[0])
        expected = expected + retain_weight * ((noise - samples.targets) ** 2).mean()
    gradients = torch.autograd.grad(expected, list(weights.values()))
    for (name, value), gradient in zip(adapters.weights.items(), gradients, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-7, atol=1e-11, msg=name)
    assert all(parameter.grad is None for parameter in named_parameters(tiny_model64).values())
    assert all(embedding.grad is None and not embedding.requires_grad for embedding in own.prompts._embeddings)


def test_an_attack_brings_the_prediction_closer_to_the_concepts(tiny_model):
    config = make(trajectory="frozen", trajectories=4, attack_weight_decay=0.0, batch_size=4)
    adapters = trained(tiny_model)

    def distance(attack_steps):
        objective = prepared(tiny_model, dataclasses.replace(config, attack_steps=attack_steps), adapters)
        latents, timesteps, rows = objective._points(tiny_model, 0)
        named, _, _ = objective._teach(tiny_model, latents, timesteps, rows)
        objective.loss(tiny_model, 0)
        text = objective.prompts.text(rows)
        error = finetuning.prediction_error(tiny_model, latents, timesteps, text, named).item()
        objective._at_work.detach()
        return error

    assert distance(20) < 0.9 * distance(1)


def test_several_concepts_take_turns_with_masks_of_their_own_tokens(tiny_model):
    objective = prepared(tiny_model, make(), trained(tiny_model), BOTH)

    assert [BOTH.target_prompts[row] for row in objective._turns.tolist()] == [
        "van gogh style",
        "a church",
        "a house, van gogh style in the snow",
        "a church",
        "by vincent",
        "a church",
        "a house, by vincent in the snow",
        "a church",
    ]
    assert len(objective.prompts._embeddings) == 5


@pytest.mark.parametrize(
    ("changes", "concept"),
    [
        ({}, CONCEPT),
        ({"stale_attack": True}, BOTH),
        ({"attack_steps": 0}, CONCEPT),
        nightly({"attack_steps": 0, "stale_attack": True}, CONCEPT),
        nightly({"trajectory": "frozen", "retain_weight": 0.5}, BOTH),
        ({"trajectory": "frozen", "trajectories": 3, "retain_weight": 0.5}, CONCEPT),
        nightly({"published_offset": True, "stale_attack": True}, CONCEPT),
    ],
    ids=["current", "stale, both", "no attack", "no attack, stale", "frozen, both", "pool", "published"],
)
def test_cost_is_exactly_the_formulas(tiny_model, changes, concept):
    config = make(**changes)
    attacks = config.attack_steps
    # The frozen model's two predictions, the attack's, the loss's.
    training = 4 * 2 * (2 + attacks + (0 if config.stale_attack and attacks else 1))
    retained = 0
    if config.trajectories:
        sampling = 2 * 3 * 3
        retained = sampling + 4 * 2
    else:
        stops = torch.cat([draw_stops(5, step, 2, 3)[0] for step in range(4)])
        run = (stops + 2).clamp(max=3) - 1 if config.published_offset else stops
        sampling = int(2 * run.sum()) + (8 if config.trajectory == "frozen" else 0)
        if config.retain_weight:
            own = [draw_stops(derived_seed(5, "retaining/samples"), step, 2, 3)[0] for step in range(4)]
            retained = int(2 * torch.cat(own).sum()) + 8 + 4 * 2
    expected = sampling + training + retained

    erasure = config.erase(tiny_model, concept, Off(), seed=5)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert len(erasure.losses) == 4


@pytest.mark.parametrize("choice", ["receler_sd14", "receler_published_sd14"])
def test_the_papers_settings_cost_no_more_than_the_authors_code(monkeypatch, choice):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    config = make_job(f"eraser={choice}").eraser
    # Steps of a trajectory are guided; the published sampler makes one more on average.
    sampling = 2 * (25.48 if config.published_offset else 24.5)
    attack = config.attack_steps
    forward = 500 * (sampling + 2 + attack + 1)
    # A backward pass counts as two evaluations.
    whole = forward + 500 * 2 * (attack + 1)

    # What the authors' attack learns is written into a copy of the text, so that the U-Net never sees it.
    assert attack == {"receler_sd14": 50, "receler_published_sd14": 0}[choice]
    assert (config.steps, config.batch_size) == (500, 1)
    assert forward <= 500 * (2 * 25.48 + 2 + 50)
    assert whole <= 1.03 * 101e3


def test_erasing_lowers_the_loss_adds_adapters_only_and_leaves_the_model_alone(tiny_model):
    fingerprint = tiny_model.fingerprint()
    text, latents = tiny_model.encode_prompts(["a church"]), tiny_model.initial_latents([1])
    before = tiny_model.predict(latents, 500, text)
    config = make(
        steps=24, learning_rate=1e-2, attack_steps=1, trajectory="frozen", trajectories=2, regularisation_weight=0.1
    )

    erasure = config.erase(tiny_model, CONCEPT, Off(), seed=0)

    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]
    assert torch.equal(tiny_model.predict(latents, 500, text), before)
    assert not any(parameter.requires_grad for parameter in named_parameters(tiny_model).values())
    assert not erasure.edit.entries
    [added] = erasure.edit.additions
    assert list(added.layers) == list(layer_widths(tiny_model))
    assert not any(value.requires_grad for value in added.weights.values())
    assert sum(erasure.losses[-6:]) < 0.9 * sum(erasure.losses[:6])
    assert erasure.edit.metadata["method"] == "Receler"


def test_the_edit_is_read_back_as_it_was_saved_and_reverts_bit_for_bit(tiny_model, tmp_path: Path):
    text, latents = tiny_model.encode_prompts(["a church"]), tiny_model.initial_latents([1])
    before = tiny_model.predict(latents, 500, text)
    edit = make(learning_rate=0.05).erase(tiny_model, CONCEPT, Off(), seed=0).edit
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    found = []
    for one in (edit, read):
        with one.applied(tiny_model):
            found.append(tiny_model.predict(latents, 500, text))
            assert torch.equal(one.unedited(tiny_model).predict(latents, 500, text), before)
        assert torch.equal(tiny_model.predict(latents, 500, text), before)

    assert torch.equal(*found)
    assert not torch.equal(found[0], before)
    assert read.size_bytes == edit.size_bytes
    assert all(torch.equal(value, edit.additions[0].weights[name]) for name, value in read.additions[0].weights.items())


def test_untrained_adapters_add_nothing_and_are_drawn_by_the_seed_alone(tiny_model):
    text, latents = tiny_model.encode_prompts(["a church"]), tiny_model.initial_latents([1])
    before = tiny_model.predict(latents, 500, text)
    one, other = (Adapters.untrained(tiny_model, 128, torch.Generator().manual_seed(3)) for _ in range(2))

    with attached(tiny_model, one):
        assert torch.equal(tiny_model.predict(latents, 500, text), before)
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    for name, (down, down_bias, up, up_bias) in one.layers.items():
        width = layer_widths(tiny_model)[name]
        assert down.shape == (128, width)
        assert 0.9 * width**-0.5 < down.abs().max() <= width**-0.5
        assert down_bias.abs().max() <= width**-0.5
        assert not up.any() and not up_bias.any()


def test_a_model_in_half_precision_takes_the_adapters(tiny_model):
    adapters = trained(tiny_model)
    tiny_model.network.to(torch.bfloat16)
    text, latents = tiny_model.encode_prompts(["a church"]), tiny_model.initial_latents([1])

    with attached(tiny_model, adapters):
        assert tiny_model.predict(latents, 500, text).dtype == torch.bfloat16


def test_adapters_of_another_model_are_refused(tiny_model):
    adapters = trained(tiny_model)
    name = next(iter(adapters.layers))
    wider = Adapters(
        {
            **adapters.weights,
            f"{name}.down.weight": torch.zeros(3, 5),
            f"{name}.up.weight": torch.zeros(5, 3),
            f"{name}.up.bias": torch.zeros(5),
        }
    )
    elsewhere = Adapters({key.replace("mid_block", "last_block"): value for key, value in adapters.weights.items()})
    for odd, wanted in ((wider, f"{name}' of width 5"), (elsewhere, "last_block")):
        with pytest.raises(ValueError, match=f"{wanted}.* 'tiny' has no such layer"):
            odd.attach(tiny_model)
    assert not any(layer._forward_hooks for layer in tiny_model.network.modules())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("up.bias", None, "consists of down.weight, down.bias, up.weight; it must be"),
        ("up.weight", torch.zeros(2, 3), "do not go together"),
        ("down.bias", torch.zeros(()), "do not go together"),
        ("middle.weight", torch.zeros(2, 3), "consists of .*middle.weight; it must be"),
    ],
)
def test_damaged_adapters_are_refused(tiny_model, part, value, message):
    weights = dict(trained(tiny_model).weights)
    name = f"{next(iter(layer_widths(tiny_model)))}.{part}"
    if value is None:
        del weights[name]
    else:
        weights[name] = value

    with pytest.raises(ValueError, match=message):
        Adapters.restored({}, weights)
    with pytest.raises(ValueError, match="holds no adapters"):
        Adapters.restored({}, {})


class KilledError(Exception):
    """Stands in for kill -9."""


@pytest.mark.parametrize(
    "changes",
    [nightly({}), {"trajectory": "frozen", "trajectories": 3, "retain_weight": 0.5, "stale_attack": True}],
    ids=["current", "pool"],
)
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    config = make(steps=5, **changes)
    undisturbed = config.erase(tiny_model, CONCEPT, Off(), seed=1)
    fingerprint = tiny_model.fingerprint()
    loss = RecelerObjective.loss

    def dying_loss(self, model, step):
        if step == 3:
            raise KilledError
        return loss(self, model, step)

    monkeypatch.setattr(RecelerObjective, "loss", dying_loss)
    with pytest.raises(KilledError):
        config.erase(tiny_model, CONCEPT, Off(), seed=1, checkpoint=tmp_path / "work")
    assert tiny_model.fingerprint() == fingerprint
    assert not any(layer._forward_hooks for layer in tiny_model.network.modules())
    monkeypatch.setattr(RecelerObjective, "loss", loss)
    before = tiny_model.unet_evaluations
    resumed = config.erase(tiny_model, CONCEPT, Off(), seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


def test_scored_pruning_acts_on_the_model_with_adapters(tiny_model):
    erasure = make().erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.5)), seed=0)

    assert [addition.kind for addition in erasure.edit.additions] == ["adapters"]
    assert erasure.edit.masks()


def test_pruning_that_learns_is_refused(tiny_model):
    with pytest.raises(ValueError, match="eraser 'Receler' has none"):
        make().erase(tiny_model, CONCEPT, Learned(), seed=0)
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"eta": 0.0}, "greater than 0"),
        ({"mask_threshold": 1.5}, "less than or equal to 1"),
        ({"attack_steps": -1}, "greater than or equal to 0"),
        ({"reference": "empty"}, "'unconditional' or 'anchor'"),
        ({"trajectories": 4}, "set trajectory=frozen or trajectories=null"),
        ({"trajectory": "frozen", "trajectories": 4, "published_offset": True}, "set trajectories=null"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "concept", "message"),
    [
        ({"tokens": 23}, CONCEPT, "23 tokens cannot be inserted: this model's prompts take 1 to 22 of them"),
        ({"retain_weight": 1.0}, dataclasses.replace(CONCEPT, preserved=()), "names no preserved phrases"),
        ({"mask_reduction": 4}, CONCEPT, "No cross-attention layer looks with 2x2 pixels"),
    ],
)
def test_what_does_not_fit_the_model_or_the_concept_is_refused(tiny_model, changes, concept, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).erase(tiny_model, concept, Off(), seed=0)
    assert not any(layer._forward_hooks for layer in tiny_model.network.modules())


def test_half_precision_weights_are_refused(tiny_model):
    tiny_model.network.to(torch.float16)
    with pytest.raises(ValueError, match="training needs float32"):
        make().erase(tiny_model, CONCEPT, Off(), seed=0)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("eraser/receler*.yaml")), ids=lambda path: path.stem)
def test_config_instantiates_and_names_every_field(monkeypatch, path):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    job = make_job(f"eraser={path.stem}")

    assert isinstance(job.eraser, Receler)
    assert set(job.config["eraser"]) - {"_target_"} == {field.name for field in dataclasses.fields(job.eraser)}


def test_the_papers_preset_is_the_classs_defaults(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    own = make_job("eraser=receler_sd14").eraser

    assert dataclasses.replace(own, sampling_batch_size=64) == Receler()


@torch.backends.mkldnn.flags(enabled=True)
def test_a_short_run_unlearns_some_of_the_canvas_concept(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    shortened = ["trajectories=4", "steps=16", "attack_steps=1", "batch_size=4", "retain_weight=0"]
    job = make_job("concept=church", "eraser=receler", *(f"eraser.{part}" for part in shortened))

    losses = job.eraser.erase(load_model("canvas"), job.concept, job.pruning, seed=0).losses

    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["van_gogh", "church"])
def test_half_of_the_concept_goes_from_the_canvas_and_most_of_the_rest_stays(concept, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas(concept, "eraser=receler", prompts=24, retained=48)

    assert shown <= 0.5
    assert kept >= 0.8
