"""SPM against its formulas, its exact cost, and what attacks, pruning and a kill make of membranes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from attacks.embedding import EmbeddingAttack
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.loading import load_model
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import derived_seed, stream
from erasure import finetuning
from erasure.addition import attached
from erasure.additions.membranes import GATE_UNIT, Membranes
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers import spm
from erasure.erasers.spm import SPM, LatentAnchoring
from erasure.export import export
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from erasure.trajectories import draw_stops, latents_before
from tests.attack_cases import make_cases
from tests.canvas_effect import effect_on_canvas
from tests.conftest import make_tiny_pipeline
from tests.erasures import assert_same_erasure
from tests.judges import never
from tests.night import nightly
from tests.oracles import esd as trajectory_oracle
from tests.oracles import spm as oracle
from tests.tiny_job import CONFIG_FOLDER, make_job

STYLE = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    preserved=("a fish", "a red church"),
)
CHURCH = Concept("church", "object", targets=("a church",), templates=("{}", "a photo of {}"), preserved=("a tench",))
BOTH = dataclasses.replace(STYLE, also=(CHURCH,))
PROMPTS = ["a church in van gogh style", "two blue fish", "", "van gogh", "by vincent van gogh, a church " * 5]
PROJECTION = "down_blocks.0.attentions.0.proj_in"
KEYS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def make(**changes):
    small = {"steps": 4, "warmup": 1, "batch_size": 2, "anchors": 3, "sampling_steps": 3, "anchoring_weight": 5.0}
    return SPM(**{**small, **changes})


def factors(model, *, concepts=1, rank=2, scope="transformers", seed=0):
    """u float64 [concepts, outputs, rank] and d [concepts, rank, inputs, ...] by layer, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    up, down = {}, {}
    for name, weight in scope_parameters(model, scope).items():
        layer = name.removesuffix(".weight")
        up[layer] = 0.1 * torch.randn((concepts, len(weight), rank), generator=generator).to(weight)
        down[layer] = 0.1 * torch.randn((concepts, rank, *weight.shape[1:]), generator=generator).to(weight)
    return up, down


def membranes(model, *, concepts=2, **changes):
    up, down = factors(model, concepts=concepts)
    return Membranes(up, down, (STYLE.targets, CHURCH.targets)[:concepts], **changes)


@torch.no_grad()
@pytest.mark.parametrize("merge", ["exact", "published"])
def test_layers_add_what_the_formulas_say(tiny_model64, merge):
    added = membranes(tiny_model64, merge=merge)
    generator = torch.Generator().manual_seed(3)
    gates = torch.tensor([[0.3, 1.0], [0.8, 0.0]], dtype=torch.float64)
    keys, projection = (tiny_model64.network.get_submodule(name) for name in (KEYS, PROJECTION))
    texts = torch.randn((2, 3, keys.in_features), generator=generator).double()
    pictures = torch.randn((2, projection.in_channels, 2, 3), generator=generator).double()
    plain = keys(texts), projection(pictures)

    with attached(tiny_model64, added):
        tiny_model64.guard.openness.gates = gates
        found = keys(texts) - plain[0], projection(pictures) - plain[1]

    for sample in range(2):
        sides = [
            [(gates[sample, i].item(), added.up[name][i].tolist(), added.down[name][i]) for i in range(2)]
            for name in (KEYS, PROJECTION)
        ]
        for token in range(3):
            expected = oracle.linear(texts[sample, token].tolist(), sides[0], 1.0, merge == "published")
            torch.testing.assert_close(found[0][sample, token], torch.tensor(expected).double(), rtol=0, atol=1e-6)
        expected = oracle.convolution(pictures[sample], sides[1], 1.0, merge == "published", 1, 0)
        torch.testing.assert_close(
            found[1][sample].permute(1, 2, 0), torch.tensor(expected).double(), rtol=0, atol=1e-6
        )
    assert found[0].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1)])
def test_convolutions_keep_their_stride_and_padding(tiny_model64, stride, padding):
    name = "down_blocks.0.downsamplers.0.conv" if stride == 2 else "conv_in"
    layer = tiny_model64.network.get_submodule(name)
    up, down = factors(tiny_model64, rank=1, scope="linear_conv")
    added = Membranes({name: up[name]}, {name: down[name]}, (STYLE.targets,), gate="off", strength=0.5)
    picture = torch.randn((layer.in_channels, 4, 4), generator=torch.Generator().manual_seed(1)).double()
    plain = layer(picture[None])[0]

    with attached(tiny_model64, added):
        found = layer(picture[None])[0] - plain

    side = [(0.5, up[name][0].tolist(), down[name][0])]
    expected = oracle.convolution(picture, side, 1.0, False, stride, padding)
    torch.testing.assert_close(found.permute(1, 2, 0), torch.tensor(expected).double(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_two_concepts_add_up_without_cross_terms(tiny_model64):
    added = membranes(tiny_model64, gate="off", strength=0.7)
    text, latents = tiny_model64.encode(PROMPTS[:1]), tiny_model64.initial_latents([1])
    parameters = dict(tiny_model64.network.named_parameters())
    expected = {name: value.detach() for name, value in parameters.items()}
    for concept in range(2):
        pairs = {layer: (added.up[layer][concept], added.down[layer][concept]) for layer in added.up}
        with_one = oracle.with_membranes(tiny_model64.network, pairs, 0.7)
        expected = {name: value + with_one[name].detach() - parameters[name] for name, value in expected.items()}
    wanted = oracle.predict(tiny_model64.network, expected, latents[0], 500, text[0])

    with attached(tiny_model64, added):
        found = tiny_model64.predict(latents, 500, text)[0]
    with attached(tiny_model64, dataclasses.replace(added, merge="published")):
        published = tiny_model64.predict(latents, 500, text)[0]

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert not torch.allclose(published, wanted, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_permeability_is_the_papers_formula(tiny_model64, strength):
    model = tiny_model64
    special = set(model.tokenizer.all_special_ids)
    plain, ids = model.encode(PROMPTS), model.tokenize(PROMPTS).tolist()
    expected = []
    for prompt in zip(plain, ids, strict=True):
        row = []
        for part in (STYLE, CHURCH):
            targets = [(model.encode([c])[0], model.tokenizer(c).input_ids) for c in part.targets]
            row.append(oracle.permeability(targets, prompt, special, strength))
        expected.append(row)

    with attached(model, membranes(model, strength=strength)):
        text = model.encode(PROMPTS)
        given = model.guard.condition(text, torch.zeros(len(text)))
        gates = model.guard.openness.gates

    assert torch.equal(given, plain)
    assert torch.equal(text[:, :-1], plain)
    torch.testing.assert_close(gates, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert gates[3, 0] < gates[4, 0] == pytest.approx(strength)
    assert gates[0].tolist() == pytest.approx([strength, strength])


@torch.no_grad()
def test_free_embeddings_count_as_the_tokens_next_to_them(tiny_model64):
    model = tiny_model64
    ids = model.tokenize(["a church in van gogh style"])
    embeddings = model.vocabulary[ids]
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).to(embeddings)
    distance = torch.cdist(model.vocabulary, model.vocabulary).fill_diagonal_(9).min()
    moved = embeddings + 0.4 * distance * noise / noise.norm(dim=-1, keepdim=True)
    ends = (ids == model.tokenizer.eos_token_id).int().argmax(1)

    with attached(model, membranes(model)):
        gates = [model.encode_embeddings(one, ends)[0, -1, :2] / GATE_UNIT for one in (embeddings, moved)]

    assert gates[0].tolist() == gates[1].tolist() == pytest.approx([1.0, 1.0])


def test_attacks_differentiate_through_the_text_and_not_the_gate(tiny_model64):
    model = tiny_model64
    ids = model.tokenize(["a church"])
    ends = (ids == model.tokenizer.eos_token_id).int().argmax(1)
    with attached(model, membranes(model)):
        embeddings = model.vocabulary[ids].detach().requires_grad_()
        text = model.encode_embeddings(embeddings, ends)
        assert not torch.autograd.grad(text[:, -1].sum(), embeddings, retain_graph=True)[0].any()
        loss = model.predict(model.initial_latents([0]), 300, text).square().sum()
        [gradient] = torch.autograd.grad(loss, embeddings)

    assert gradient.abs().max() > 0


@torch.no_grad()
def test_both_halves_of_guidance_meet_the_prompts_permeability(tiny_model64):
    model = tiny_model64
    added = membranes(model)
    latents = model.initial_latents([1, 2])
    with attached(model, added):
        text, empty = model.encode(PROMPTS[:2]), model.encode([""])
        guided = model.guided(latents, 500, text, empty[0], 3.0)
        gates = text[:, -1, :2] / GATE_UNIT
    plain = model.encode([*PROMPTS[:2], ""])
    for place in range(2):
        up = {name: up * gates[place, :, None, None] for name, up in added.up.items()}
        own = dataclasses.replace(added, gate="off", up=up)
        with attached(model, own):
            expected = model.guided(latents[[place]], 500, plain[[place]], plain[2], 3.0)
        torch.testing.assert_close(guided[[place]], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_text_that_was_encoded_without_the_gate_is_refused(tiny_model):
    text = tiny_model.encode(PROMPTS)
    with (
        attached(tiny_model, membranes(tiny_model)),
        pytest.raises(ValueError, match=r"has 24 rows and that of gated membranes has 25; encode prompts with"),
    ):
        tiny_model.predict(tiny_model.initial_latents([0] * len(text)), 100, text)


@torch.no_grad()
def test_without_gate_no_guard_is_needed(tiny_model):
    text, latents = tiny_model.encode(PROMPTS), tiny_model.initial_latents([0] * len(PROMPTS))
    before = tiny_model.predict(latents, 100, text)
    with attached(tiny_model, membranes(tiny_model, gate="off")):
        assert tiny_model.guard is None
        assert torch.equal(tiny_model.encode(PROMPTS), text)
        assert not torch.allclose(tiny_model.predict(latents, 100, text), before, atol=1e-3)


@torch.no_grad()
def test_many_concepts_take_as_many_rows_as_they_need(tiny_model64):
    up, down = factors(tiny_model64, concepts=40, rank=1)
    added = Membranes(up, down, (*[STYLE.targets] * 39, CHURCH.targets))
    with attached(tiny_model64, added):
        text = tiny_model64.encode(["a church"])
        assert text.shape[1] == 24 + 2
        tiny_model64.guard.condition(text, torch.zeros(1))
        gates = tiny_model64.guard.openness.gates[0]

    assert gates[-1] == pytest.approx(1.0)
    torch.testing.assert_close(gates[:-1], gates[:1].expand(39), rtol=0, atol=1e-12)
    assert gates[0] < 0.99


def anchors_of(config, model, part, texts, step, seed):
    """The step's anchors by the oracle's weights and the code's order of draws."""
    generator = stream(seed, "spm/anchors", step)
    if config.anchor_texts == "preserved":
        choices = model.encode(part.preserved_prompts)
        rows = [[oracle.anchor_weight(one, text, config.anchor_exponent) for one in choices] for text in texts]
        drawn = torch.multinomial(torch.tensor(rows).double(), 1, generator=generator)
        return [choices[number] for number in drawn[:, 0].tolist()]
    found = []
    for text in texts:
        while True:
            noise = torch.randn(text.shape, generator=generator).double()
            chance = torch.rand((), generator=generator).item()
            if chance < oracle.anchor_weight(noise, text, config.anchor_exponent):
                break
        length = 0.8 + 0.4 * torch.rand((), generator=generator).item()
        found.append(noise * length * text.norm() / noise.norm())
    if config.anchor_texts == "noise_and_empty":
        # What the second half of [empty, a_1, empty, a_2, ...] holds.
        found = [model.encode([""])[0] if place % 2 == 0 else text for place, text in enumerate(found)]
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trajectory": "frozen", "surrogate": "anchor", "anchor_texts": "preserved", "anchor_exponent": 2.0},
        {"surrogate": "anchor", "rank": 2, "alpha": 0.5, "eta": 2.0, "anchor_exponent": 30.0},
        nightly({"trajectory": "frozen", "anchoring_weight": 0.0, "batch_size": 3}),
        {"anchor_texts": "noise_and_empty", "anchors": 4, "published_offset": True},
        nightly({"trajectory": "frozen", "published_offset": True}),
    ],
    ids=["paper", "frozen", "rank 2", "no anchoring", "published", "published, frozen"],
)
def test_loss_is_the_papers_formula(tiny_model64, changes):
    model, config = tiny_model64, make(**changes)
    up, down = factors(model, rank=config.rank)
    pairs = {layer: (up[layer][0], down[layer][0]) for layer in up}
    erasing = LatentAnchoring(config, model, STYLE, seed=7, checkpoint=None)
    parameters = oracle.with_membranes(model.network, pairs, config.alpha / config.rank)
    timesteps = model.sampling_timesteps(3).tolist()
    empty = model.encode([""])[0]
    surrogate = model.encode([STYLE.anchor])[0] if config.surrogate == "anchor" else empty

    def walked(x, t, text):
        sample = oracle.predict(
            model.network, parameters if config.trajectory == "current" else None, x[0], int(t), text[0]
        )
        return SimpleNamespace(sample=sample[None])

    for step in range(2):
        stops, seeds = draw_stops(7, step, config.batch_size, 3, first=int(config.published_offset))
        assert not config.published_offset or stops.min() > 0
        points = []
        for place, (stop, seed) in enumerate(zip(stops.tolist(), seeds, strict=True)):
            text = model.encode([STYLE.targets[(step * config.batch_size + place) % 2]])[0]
            x = trajectory_oracle.trajectory_point(
                walked, model.process.alphas.tolist(), timesteps, stop, seed, (4, 8, 8), text, empty, 3.0
            )
            # DDIM's 1000 steps are 1000 to 1, and theirs the one after as many thirds of them.
            scored_at = 1000 - 1000 * stop // 3 if config.published_offset else timesteps[stop]
            points.append((x[0], scored_at, text, surrogate))
        anchors = []
        if config.anchoring_weight:
            texts = [points[place % len(points)][2] for place in range(config.anchors)]
            anchors = anchors_of(config, model, STYLE, texts, step, 7)

        loss = erasing.loss(model, config.membranes(pairs), step).item()

        expected = oracle.loss(model.network, parameters, points, anchors, config.eta, config.anchoring_weight)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert loss > 1e-6


def test_published_points_are_33_to_42_timesteps_less_noisy_than_their_timestep_says(tiny_model):
    text = tiny_model.encode(["a church"])
    published = dataclasses.replace(make(published_offset=True).settings, steps=30, guidance=1.0)

    lags = {}
    for stop in (1, 3, 29):
        latents, timesteps = latents_before(tiny_model, text, [0], stop, published)
        same, own = latents_before(tiny_model, text, [0], stop, dataclasses.replace(published, rescaled=False))
        assert torch.equal(latents, same)
        lags[stop] = int(timesteps - own)
    assert lags == {1: 42, 3: 41, 29: 33}


@torch.no_grad()
def test_preserved_anchors_are_drawn_by_their_distance_from_the_target(tiny_model64):
    texts, choices = (
        tiny_model64.encode(["a church", "a fish"]),
        tiny_model64.encode(["a red church", "a fish", "golf"]),
    )
    sampler = spm.SimilarityWeighted(choices, 1.5, (0.8, 1.2))
    wanted = torch.tensor([[oracle.anchor_weight(one, text, 1.5) for one in choices] for text in texts])

    torch.testing.assert_close(sampler.weights(texts, choices), wanted.double(), rtol=0, atol=1e-6)
    drawn = sampler.draw(texts[[1] * 200], torch.Generator().manual_seed(0))
    assert not any(torch.equal(one, choices[1]) for one in drawn), "the target itself"


@torch.no_grad()
def test_membranes_start_closed_with_a_layers_usual_values(tiny_model):
    config = make(rank=3)
    initial = config.initial_factors(tiny_model, 5)

    assert initial.keys() == {name.removesuffix(".weight") for name in scope_parameters(tiny_model, "transformers")}
    for layer, (up, down) in initial.items():
        weight = tiny_model.network.get_submodule(layer).weight
        assert not up.any()
        assert tuple(up.shape) == (len(weight), 3)
        assert tuple(down.shape) == (3, *weight.shape[1:])
        bound = weight[0].numel() ** -0.5
        assert 0.8 * bound < down.abs().max() <= bound
    assert not torch.equal(config.initial_factors(tiny_model, 6)[KEYS][1], initial[KEYS][1])


@pytest.mark.parametrize("concept", [STYLE, BOTH], ids=["one", "two"])
@pytest.mark.parametrize("trajectory", ["current", "frozen", "pool"])
def test_cost_is_exactly_the_formulas_and_the_model_stays_as_it_is(tiny_model, concept, trajectory):
    config = make(
        trajectory="current" if trajectory == "current" else "frozen", trajectories=2 if trajectory == "pool" else None
    )
    fingerprint = tiny_model.fingerprint()

    erasure = config.erase(tiny_model, concept, Off(), seed=0)

    expected = 0
    for number in range(len(concept.parts)):
        own = derived_seed(0, "spm/concept", number)
        stops = torch.cat([draw_stops(own, step, 2, 3)[0] for step in range(4)])
        walks = 3 * 2 * 3 if trajectory == "pool" else 2 * int(stops.sum()) + 4 * 2 * 2
        expected += walks + 4 * (2 + 2 * 3)
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == expected
    assert len(erasure.losses) == 4 * len(concept.parts)
    assert not erasure.edit.entries
    assert [addition.kind for addition in erasure.edit.additions] == ["membranes"]
    assert tiny_model.fingerprint() == fingerprint == erasure.edit.metadata["base"]
    assert erasure.edit.metadata["scope"] == "transformers"


def test_predictions_cost_half_of_the_published_ones():
    config = SPM()
    published = 2 * (2 + 1 + 2 * config.anchors)  # an unconditional half beside every one

    assert 2 * config.batch_size + config.batch_size + 2 * config.anchors == published / 2


@torch.no_grad()
def test_taking_them_out_leaves_no_trace(tiny_model):
    pictures = {"seeds": [1, 2], "steps": 3, "guidance": 4.0}
    before = tiny_model.generate(PROMPTS[:2], **pictures)
    edit = Edit({}, {}, (membranes(tiny_model),))
    with edit.applied(tiny_model):
        during = tiny_model.generate(PROMPTS[:2], **pictures)
        unedited = edit.unedited(tiny_model).generate(PROMPTS[:2], **pictures)
        again = tiny_model.generate(PROMPTS[:2], **pictures)
    after = tiny_model.generate(PROMPTS[:2], **pictures)

    assert torch.equal(before, after)
    assert torch.equal(before, unedited)
    assert torch.equal(during, again)
    assert not torch.equal(before, during)
    assert tiny_model.guard is None
    assert not any(module._forward_hooks for module in tiny_model.network.modules())


def test_they_are_read_back_as_they_were_saved(tiny_model, tmp_path):
    edit = make(gate="facilitated", strength=2.0, merge="published").erase(tiny_model, BOTH, Off(), seed=0).edit
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    [one], [other] = edit.additions, read.additions

    assert one.settings() == other.settings()
    assert one.targets == (STYLE.targets, CHURCH.targets)
    assert one.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())
    pictures = []
    for each in (edit, read):
        with each.applied(tiny_model):
            pictures.append(tiny_model.generate(PROMPTS[:2], seeds=[1, 2], steps=3, guidance=4.0))
    assert torch.equal(*pictures)


def test_factors_that_do_not_fit_are_refused(tiny_model, tmp_path):
    added = membranes(tiny_model)
    with pytest.raises(ValueError, match=r"The membranes of 1 layers .* do not fit together"):
        Membranes.restored(
            added.settings(), {name: value for name, value in added.tensors().items() if name != f"{KEYS}.up"}
        )
    with pytest.raises(ValueError, match="do not fit together"):
        Membranes.restored({**added.settings(), "targets": [["a church"]]}, added.tensors())
    for layer in ("mid_block.nothing", "conv_norm_out", "conv_in"):
        odd = dataclasses.replace(added, up={layer: added.up[KEYS]}, down={layer: added.down[KEYS]})
        with pytest.raises(ValueError, match=f"a layer '{layer}' of shape .* and 'tiny' has no such"):
            odd.attach(tiny_model)
    assert tiny_model.guard is None
    with pytest.raises(ValueError, match="adds membranes to the model"):
        export(tiny_model, Edit({}, {}, (added,)), tmp_path / "pipeline")


@pytest.mark.parametrize("trajectory", [nightly("current"), "frozen"])
@pytest.mark.parametrize("dies_at", [3, nightly(7)])
def test_killed_training_resumes_to_the_same_membranes_bit_for_bit(
    tiny_model, tmp_path, monkeypatch, trajectory, dies_at
):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make(trajectory=trajectory)
    undisturbed = eraser.erase(tiny_model, BOTH, Off(), seed=1)
    loss = LatentAnchoring.loss
    steps = 0

    def dying_loss(self, model, membranes, step):
        nonlocal steps
        steps += 1
        if steps == dies_at + 1:
            raise RuntimeError("killed")
        return loss(self, model, membranes, step)

    monkeypatch.setattr(LatentAnchoring, "loss", dying_loss)
    with pytest.raises(RuntimeError, match="killed"):
        eraser.erase(tiny_model, BOTH, Off(), seed=1, checkpoint=tmp_path / "work")
    assert not any(module._forward_hooks for module in tiny_model.network.modules())
    monkeypatch.setattr(LatentAnchoring, "loss", loss)
    before = tiny_model.unet_evaluations
    resumed = eraser.erase(tiny_model, BOTH, Off(), seed=1, checkpoint=tmp_path / "work")

    assert_same_erasure(resumed, undisturbed)
    one, other = (erasure.edit.additions[0].tensors() for erasure in (resumed, undisturbed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert tiny_model.unet_evaluations - before < undisturbed.unet_evaluations


def test_training_lowers_the_loss(tiny_model):
    # One trajectory of two steps: every batch has the same points.
    points = {"trajectory": "frozen", "trajectories": 1, "sampling_steps": 2, "anchoring_weight": 0.0, "eta": 3.0}
    losses = make(steps=12, learning_rate=2e-2, **points).erase(tiny_model, STYLE, Off(), seed=0).losses

    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "attack",
    [UnlearnDiffAtk(timesteps=2, steps_per_timestep=2), EmbeddingAttack(timesteps=2, steps_per_timestep=2, tokens=2)],
    ids=["tokens", "free embeddings"],
)
@pytest.mark.parametrize("gate", ["facilitated", "off"])
def test_attacks_meet_the_membranes(tiny_model, attack, gate):
    cases = make_cases(tiny_model, PROMPTS[:2], 4.0)
    sampling = Sampling(steps=3, batch_size=1)
    plain = list(attack.run(tiny_model, cases, never, sampling=sampling))
    with attached(tiny_model, membranes(tiny_model, gate=gate)):
        guarded = list(attack.run(tiny_model, cases, never, sampling=sampling))

    for one, other in zip(plain, guarded, strict=True):
        assert one.unet_evaluations == other.unet_evaluations
        assert not torch.equal(one.image, other.image)


def test_scored_pruning_acts_on_the_model_with_its_membranes(tiny_model):
    edit = make().erase(tiny_model, STYLE, Magnitude(Sparsity(0.5)), seed=0).edit

    assert [addition.kind for addition in edit.additions] == ["membranes"]
    assert edit.masks().keys() == scope_parameters(tiny_model, "transformers").keys()


def test_pruning_that_learns_is_refused_before_any_work(tiny_model):
    with pytest.raises(ValueError, match="eraser 'SPM' has none"):
        make().erase(tiny_model, STYLE, Learned(), seed=0)
    assert tiny_model.unet_evaluations == 0


def test_half_precision_weights_are_refused(tokenizer_folder):
    model = TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float16), name="half")
    with pytest.raises(ValueError, match="float16 and training needs float32"):
        make().erase(model, STYLE, Off(), seed=0)


@torch.no_grad()
def test_gates_survive_half_precision(tokenizer_folder, tiny_model64):
    half = TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float16), name="half")
    gates = []
    for model in (tiny_model64, half):
        with attached(model, membranes(tiny_model64)):
            model.guard.condition(model.encode(PROMPTS), torch.zeros(len(PROMPTS)))
            gates.append(model.guard.openness.gates.double())

    torch.testing.assert_close(gates[1], gates[0], rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"eta": 0.0}, "greater than 0"),
        ({"anchoring_weight": -1.0}, "greater than or equal to 0"),
        ({"anchor_texts": "coco"}, "'noise', 'noise_and_empty' or 'preserved'"),
        ({"anchor_lengths": (1.2, 0.8)}, r"anchor_lengths is \[1.2, 0.8\]; the first must not exceed"),
        ({"trajectories": 3}, "trajectories is 3 and trajectory 'current'"),
        ({"gate": "on"}, "'facilitated' or 'off'"),
        ({"strength": 0.0}, "greater than 0"),
        ({"merge": "sum"}, "'exact' or 'published'"),
        ({"gamma": 2.0}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_preserved_anchors_without_preserved_phrases_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"anchoring_weight is 5\.0 and concept 'van_gogh' names no preserved phrases"):
        make(anchor_texts="preserved").erase(tiny_model, dataclasses.replace(STYLE, preserved=()), Off(), seed=0)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIG_FOLDER / "eraser").glob("spm*.yaml")))
def test_every_preset_names_every_field(choice, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    job = make_job(f"eraser={choice}")

    assert isinstance(job.eraser, SPM)
    assert set(job.config["eraser"]) == {"_target_", *(field.name for field in dataclasses.fields(SPM))}


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        ("spm_sd14", {}),
        ("spm_style_sd14", {"strength": 2.0}),
        ("spm_nudity_sd14", {"steps": 15000, "eta": 3.0, "anchoring_weight": 100.0, "strength": 2.0}),
    ],
)
def test_presets_hold_the_papers_settings(choice, changes, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    code = {"anchor_texts": "noise_and_empty", "published_offset": True, "sampling_batch_size": 8}
    assert make_job(f"eraser={choice}").eraser == SPM(**changes, **code)


@torch.backends.mkldnn.flags(enabled=True)
def test_a_short_run_learns_on_the_canvas(monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    shortened = ["steps=20", "trajectories=4", "sampling_steps=10", "batch_size=4", "anchors=2", "warmup=2"]
    job = make_job("concept=van_gogh", "eraser=spm", *(f"eraser.{part}" for part in shortened))

    losses = job.eraser.erase(load_model("canvas"), job.concept, job.pruning, seed=0).losses

    # Ten batches hold each of the 40 samples once: both halves are about the same ones.
    assert sum(losses[10:]) < 0.9 * sum(losses[:10])


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["van_gogh", "church"])
def test_half_of_the_concept_goes_from_the_canvas_and_most_of_the_rest_stays(concept, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)

    shown, kept = effect_on_canvas(concept, "eraser=spm", prompts=24, retained=48)

    assert shown <= 0.5
    assert kept >= 0.8
