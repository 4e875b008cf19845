"""Scored pruning: scores and masks against their formulas, exact costs, one sparsity for all, and the fill."""

from dataclasses import replace

import pytest
import torch

from diffusion.parameters import named_parameters
from diffusion.streams import derived_seed, stream
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.none import NoEraser
from erasure.pictures import Painting
from erasure.pruning.cad import CAD
from erasure.pruning.calibration import input_squares, sizes_times_use
from erasure.pruning.conceptprune import ConceptPrune
from erasure.pruning.learned import Learned
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity, maskable_parameters
from erasure.pruning.random import Random
from erasure.pruning.saliency import Saliency
from erasure.pruning.taylor import Taylor
from erasure.pruning.wanda import Wanda
from tests.oracles import scored_pruning as oracle
from tests.oracles.esd import trajectory_point

CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=("{}", "a church, {}"),
    preserved=("a photo",),
)
SHORT = {"sampling_steps": 3, "guidance": 2.0}
STRATEGIES = [
    Wanda(pictures=2, **SHORT),
    ConceptPrune(pictures=2, first_steps=2, **SHORT),
    Saliency(pictures=2, timesteps=2, **SHORT),
    Taylor(pictures=2, timesteps=2, **SHORT),
    CAD(sampling_steps=3, sparsity=Sparsity(0.05, "row")),
    Magnitude(),
    Random(),
]
NAMES = [type(strategy).__name__ for strategy in STRATEGIES]


def prune(model, strategy, *, scope="xattn", seed=0, checkpoint=None):
    return strategy.prune(model, CONCEPT, None, scope=scope, seed=seed, checkpoint=checkpoint)


def pruned_places(masks):
    return {(name, tuple(index)) for name, kept in masks.items() for index in (~kept).nonzero(as_tuple=False).tolist()}


def picture_seeds(seed, count, purpose="painting/seeds"):
    return torch.randint(2**31, (count,), generator=stream(seed, purpose)).tolist()


def alphas(model):
    return model.process.alphas.double().tolist()


@pytest.mark.parametrize("fraction", ["0.29", "0.5", "1"])
@pytest.mark.parametrize("per", ["global", "layer", "row", 2, 4])
def test_sparsity_prunes_the_lowest_of_each_group_and_breaks_ties_by_index(per, fraction):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 8), "kernel": (2, 4, 3, 3), "other": (5, 20)}
    scores = {name: torch.randint(4, shape, generator=generator).double() for name, shape in shapes.items()}

    masks = Sparsity(float(fraction), per).kept(scores)

    by_place = {(name, index): float(scores[name][index]) for name, index in oracle.places(shapes)}
    assert pruned_places(masks) == oracle.pruned(by_place, fraction, per)
    assert all(masks[name].shape == values.shape for name, values in scores.items())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_groups_that_do_not_divide_the_inputs_are_refused_before_anything_is_sampled(tiny_model, strategy):
    with pytest.raises(ValueError, match=r"sparsity.per is 5 and '.*' has \d+ inputs; choose a divisor"):
        prune(tiny_model, replace(strategy, sparsity=Sparsity(0.5, 5)))
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"fraction": 1.5}, "less than or equal to 1"), ({"per": 1}, "greater than or equal to 2"), ({"per": "x"}, "row")],
)
def test_bad_sparsity_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Magnitude(sparsity=fields)


@pytest.fixture
def recorded(tiny_model64):
    """Two pictures of two steps, recorded call by call: (model, text, layers, records)."""
    model = tiny_model64
    with torch.no_grad():
        text = model.encode_prompts(["a church", "a photo"])
        layers = sorted({name.rpartition(".")[0] for name in maskable_parameters(model, "linear_conv")})
        records = oracle.recorded_steps(
            model.network,
            layers,
            alphas(model),
            model.sampling_timesteps(3).tolist(),
            2,
            list(zip(picture_seeds(4, 2), text, strict=True)),
            model.encode_prompts([""])[0],
            2.0,
            model.latent_shape,
        )
    return model, text, records


@pytest.mark.parametrize("unit_tokens", [False, True])
def test_wanda_scores_of_matrices_are_size_times_norm_of_the_inputs(recorded, unit_tokens):
    model, text, records = recorded
    weights = maskable_parameters(model, "xattn_ffn")
    squares, spent = input_squares(
        model, weights, text, Painting(2, 3, 2.0, 1), seed=4, checkpoint=None, until=2, unit_tokens=unit_tokens
    )

    assert spent == 2 * 2 * 2
    for step, record in enumerate(records):
        scores = sizes_times_use(weights, {name: values[step] for name, values in squares.items()})
        for name in list(weights)[::9]:
            inputs = record[name.rpartition(".")[0]]
            weight = weights[name]
            for j in range(0, weight.shape[1], 5):
                used = oracle.norm(inputs, j, unit_tokens)
                assert scores[name][:, j].tolist() == pytest.approx(
                    [abs(value) * used for value in weight[:, j].tolist()], rel=1e-6
                )


def test_wanda_scores_of_kernels_follow_every_position_they_meet(recorded):
    model, text, records = recorded
    names = (
        "conv_in.weight",
        "down_blocks.0.downsamplers.0.conv.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight",
    )
    weights = {name: model.network.get_parameter(name) for name in names}
    squares, _ = input_squares(model, weights, text, Painting(2, 3, 2.0, 2), seed=4, checkpoint=None, until=2)

    for name, weight in weights.items():
        module = model.network.get_submodule(name.rpartition(".")[0])
        size = weight.shape[-1]
        for channel, y, x in [(0, 0, 0), (3, size - 1, size // 2), (2, size // 2, size - 1)]:
            used = oracle.kernel_norm(records[1][name.rpartition(".")[0]], channel, y, x, size, module.stride[0])
            assert float(squares[name][1, channel, y, x].sqrt()) == pytest.approx(used, rel=1e-6)


def test_wanda_prunes_the_lowest_scores_of_each_row_over_all_steps(tiny_model64):
    strategy = Wanda(pictures=2, **SHORT, sparsity=Sparsity(0.25, "row"))
    masks = prune(tiny_model64, strategy).edit.masks()

    weights = maskable_parameters(tiny_model64, "xattn")
    text = tiny_model64.encode_prompts(CONCEPT.preserved_prompts)[[0, 0]]
    own = derived_seed(0, "wanda/pictures")
    squares, _ = input_squares(tiny_model64, weights, text, Painting(2, 3, 2.0, 1), seed=own, checkpoint=None)
    expected = set()
    for name, weight in weights.items():
        scores = {
            (name, index): abs(float(weight[index])) * float(squares[name][:, index[1]].sum()) ** 0.5
            for _, index in oracle.places({name: tuple(weight.shape)})
        }
        expected |= oracle.pruned(scores, "0.25", "row")

    assert pruned_places(masks) == expected


@pytest.mark.parametrize("agreement", [0.0, 0.5])
def test_conceptprune_prunes_what_is_skilled_at_more_steps_than_agreed(tiny_model64, agreement):
    model = tiny_model64
    strategy = ConceptPrune(
        pictures=3, first_steps=2, sampling_steps=3, guidance=2.0, sparsity=Sparsity(0.05, "row"), agreement=agreement
    )
    masks = prune(model, strategy, seed=4).edit.masks()

    weights = maskable_parameters(model, "ffn2")
    layers = {name: name.rpartition(".")[0] for name in weights}
    own = picture_seeds(derived_seed(4, "conceptprune/pictures"), 3)
    # Four target prompts over three pictures.
    with torch.no_grad():
        targets, anchors = (
            oracle.recorded_steps(
                model.network,
                list(layers.values()),
                alphas(model),
                model.sampling_timesteps(3).tolist(),
                2,
                [(seed, model.encode_prompts([prompts[n]])[0]) for n, seed in zip((0, 1, 2), own, strict=True)],
                model.encode_prompts([""])[0],
                2.0,
                model.latent_shape,
            )
            for prompts in (CONCEPT.target_prompts, CONCEPT.target_anchors)
        )
    times = {}
    for step in range(2):
        for name, layer in layers.items():
            use = [
                [oracle.norm(kind[step][layer], j, unit_tokens=True) for j in range(weights[name].shape[1])]
                for kind in (targets, anchors)
            ]
            for place in oracle.skilled(weights[name], *use, "0.05", name):
                times[place] = times.get(place, 0) + 1
    expected = {place for place, count in times.items() if count > agreement * 2}

    assert 0 < len(expected) < len(times) or agreement == 0
    assert pruned_places(masks) == expected


def test_conceptprune_stops_sampling_after_the_first_steps(tiny_model):
    strategy = ConceptPrune(pictures=3, first_steps=2, sampling_steps=20, sampling_batch_size=2)

    assert prune(tiny_model, strategy).unet_evaluations == tiny_model.unet_evaluations == 2 * 2 * 3 * 2


def test_conceptprune_takes_the_context_that_it_is_told(tiny_model):
    concept = Concept("x", "style", targets=("van gogh",), anchor="a picture", preserved_templates=("a church, {}",))
    asked = []
    encode = tiny_model.encode_prompts
    tiny_model.encode_prompts = lambda prompts: asked.append(list(prompts)) or encode(prompts)
    strategy = ConceptPrune(pictures=1, first_steps=1, sampling_steps=2, context="preserved_templates")

    strategy.prune(tiny_model, concept, None, scope="xattn", seed=0, checkpoint=None)

    assert asked == [["a church, van gogh"], ["a church, a picture"]]


def noised_pictures(model, prompts, seed, timesteps):
    """(t, pictures with noise and text) for two pictures of three steps, and the t evenly spread."""
    text = [model.encode_prompts([prompts[place * len(prompts) // 2]])[0] for place in range(2)]
    empty = model.encode_prompts([""])[0]
    with torch.no_grad():
        latents = []
        for picture_seed, condition in zip(picture_seeds(seed, 2), text, strict=True):
            # A last step to the end of the schedule, where diffusers has the first timestep's alpha.
            steps = model.sampling_timesteps(3).tolist()
            x = trajectory_point(
                model.network, alphas(model), steps, 2, picture_seed, model.latent_shape, condition, empty, 2.0
            )
            t = torch.tensor([steps[2]])
            e_0, e_c = (model.network(x, t, c[None]).sample for c in (empty, condition))
            a, end = alphas(model)[steps[2]], model.make_scheduler(3).final_alpha_cumprod.double().item()
            e = e_0 + 2.0 * (e_c - e_0)
            latents.append((end**0.5 * (x - (1 - a) ** 0.5 * e) / a**0.5 + (1 - end) ** 0.5 * e)[0])
    for place in range(timesteps):
        noise = torch.randn((2, *model.latent_shape), generator=stream(seed, "calibration/noise", place)).double()
        yield int((place + 0.5) * 1000 / timesteps), list(zip(latents, noise, text, strict=True))


def denoising_gradients(model, weights, prompts, seed, timesteps):
    for t, pictures in noised_pictures(model, prompts, seed, timesteps):
        losses = list(oracle.denoising(model.network, alphas(model), t, pictures))
        yield sum(loss.item() for loss in losses), oracle.gradients(iter(losses), weights)


@pytest.mark.parametrize("score", ["snip", "salun"])
def test_saliency_prunes_the_highest_under_the_concepts_denoising_loss(tiny_model64, score):
    strategy = Saliency(score=score, pictures=2, timesteps=2, batch_size=1, sparsity=Sparsity(0.02), **SHORT)
    erasure = prune(tiny_model64, strategy, scope="xattn_kv", seed=3)

    assert erasure.unet_evaluations == 2 * 3 * 2 + 2 * 2
    weights = maskable_parameters(tiny_model64, "xattn_kv")
    with tiny_model64.trainable(list(weights.values())):
        own = derived_seed(3, "saliency/pictures")
        parts = [g for _, g in denoising_gradients(tiny_model64, weights, CONCEPT.target_prompts, own, 2)]
    summed = {name: parts[0][name] + parts[1][name] for name in weights}
    scores = oracle.scored(summed, lambda g, w: -abs(g * w) if score == "snip" else -abs(g), weights)
    assert pruned_places(erasure.edit.masks()) == oracle.pruned(scores, "0.02", "global")


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_taylor_prunes_the_lowest_over_the_timesteps_with_enough_loss(tiny_model64, threshold):
    strategy = Taylor(
        pictures=2, timesteps=4, batch_size=2, threshold=threshold, sparsity=Sparsity(0.3, "layer"), **SHORT
    )
    erasure = prune(tiny_model64, strategy, scope="xattn_kv", seed=3)

    weights = maskable_parameters(tiny_model64, "xattn_kv")
    with tiny_model64.trainable(list(weights.values())):
        own = derived_seed(3, "taylor/pictures")
        parts = list(denoising_gradients(tiny_model64, weights, CONCEPT.preserved_prompts, own, 4))
    taken = [gradients for loss, gradients in parts if loss > threshold * max(loss for loss, _ in parts)]
    scores = {}
    for gradients in taken:
        for place, value in oracle.scored(gradients, lambda g, w: abs(g * w), weights).items():
            scores[place] = scores.get(place, 0) + value
    assert (0 < len(taken) < 4) == (threshold > 0)
    assert erasure.unet_evaluations == 2 * 3 * 2 + 2 * 4 + 2 * len(taken)
    assert pruned_places(erasure.edit.masks()) == oracle.pruned(scores, "0.3", "layer")


def test_cad_prunes_the_highest_positive_attributions_of_each_row(tiny_model64):
    model = tiny_model64
    strategy = CAD(trajectories=1, sampling_steps=3, trajectory_guidance=2.0, sparsity=Sparsity(0.7, "row"))
    erasure = prune(model, strategy, seed=3)

    weights = maskable_parameters(model, "ffn")
    steps = model.sampling_timesteps(3).tolist()
    empty, text = model.encode_prompts([""])[0], model.encode_prompts(CONCEPT.target_prompts)[0]
    (own,) = picture_seeds(derived_seed(3, "cad/trajectories"), 1, "trajectories/pool")
    with torch.no_grad():
        points = [
            trajectory_point(model.network, alphas(model), steps, stop, own, model.latent_shape, text, empty, 2.0)
            for stop in range(3)
        ]
        without = [model.network(x, torch.tensor([t]), empty[None]).sample for x, t in zip(points, steps, strict=True)]
    with model.trainable(list(weights.values())):
        losses = (
            (model.network(x, torch.tensor([t]), text[None]).sample - e).pow(2).sum()
            for x, t, e in zip(points, steps, without, strict=True)
        )
        scores = oracle.scored(oracle.gradients(losses, weights), lambda g, w: -g * w, weights)
    highest = oracle.pruned(scores, "0.7", "row")

    assert erasure.unet_evaluations == 3 * 2 + 3
    expected = {place for place in highest if scores[place] < 0}
    assert len(expected) < len(highest)
    assert pruned_places(erasure.edit.masks()) == expected


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_scored_pruning_leaves_the_model_alone_and_says_what_it_cost(tiny_model, strategy):
    base = {name: weight.detach().clone() for name, weight in named_parameters(tiny_model).items()}

    erasure = NoEraser().erase(tiny_model, CONCEPT, strategy, seed=0)

    assert all(torch.equal(weight, base[name]) for name, weight in named_parameters(tiny_model).items())
    assert not any(weight.requires_grad for weight in named_parameters(tiny_model).values())
    assert erasure.unet_evaluations == tiny_model.unet_evaluations
    assert erasure.edit.metadata["pruned_weights"] > 0
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())


@pytest.mark.parametrize("strategy", STRATEGIES[:5], ids=NAMES[:5])
def test_scores_do_not_depend_on_how_many_pictures_are_taken_at_a_time(tiny_model64, strategy):
    at_once = {name: 3 for name in ("batch_size", "sampling_batch_size") if hasattr(strategy, name)}
    single = dict.fromkeys(at_once, 1)

    first, second = (prune(tiny_model64, replace(strategy, **sizes)) for sizes in (at_once, single))

    assert pruned_places(first.edit.masks()) == pruned_places(second.edit.masks())
    assert first.unet_evaluations == second.unet_evaluations


@pytest.mark.parametrize("strategy", STRATEGIES[:5], ids=NAMES[:5])
def test_a_killed_run_takes_up_the_pictures_that_it_has(tiny_model, strategy, tmp_path):
    undisturbed = prune(tiny_model, strategy, checkpoint=tmp_path / "work")
    spent = tiny_model.unet_evaluations

    resumed = prune(tiny_model, strategy, checkpoint=tmp_path / "work")

    assert tiny_model.unet_evaluations - spent < spent
    assert resumed.unet_evaluations == undisturbed.unet_evaluations
    assert pruned_places(resumed.edit.masks()) == pruned_places(undisturbed.edit.masks())


@pytest.mark.parametrize("strategy", [Wanda(), Taylor()], ids=["Wanda", "Taylor"])
def test_pruning_for_what_is_preserved_needs_some(tiny_model, strategy):
    with pytest.raises(ValueError, match=r"names no preserved phrases; add some to concept.preserved or set prompts"):
        strategy.prune(tiny_model, Concept("x", "style", targets=("y",)), None, scope="xattn", seed=0, checkpoint=None)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_every_strategy_fills_what_it_prunes_as_told(tiny_model, strategy):
    base = {name: weight.detach().clone() for name, weight in named_parameters(tiny_model).items()}
    edit = prune(tiny_model, replace(strategy, fill="resampled")).edit

    with edit.applied(tiny_model):
        for name, kept in edit.masks().items():
            weight = named_parameters(tiny_model)[name]
            assert torch.equal(weight[kept], base[name][kept])
            assert weight[~kept].count_nonzero() > 0.9 * (~kept).sum()


def test_resampled_weights_are_as_large_as_those_left_and_come_back_from_disk(tiny_model, tmp_path):
    weights = maskable_parameters(tiny_model, "ffn")
    masks = {
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3
        for name, weight in weights.items()
    }
    edit = Edit.from_mask(masks, fill="resampled", seed=5)
    edit.save(tmp_path / "edit.safetensors")

    def filled(edit):
        with edit.applied(tiny_model):
            return {name: weight.detach().clone() for name, weight in maskable_parameters(tiny_model, "ffn").items()}

    first = filled(edit)
    other = filled(Edit.from_mask(masks, fill="resampled", seed=6))
    for name, again in filled(Edit.load(tmp_path / "edit.safetensors")).items():
        assert torch.equal(first[name], again)
        assert not torch.equal(first[name], other[name])
        left, drawn = first[name][masks[name]], first[name][~masks[name]]
        assert float(drawn.std()) == pytest.approx(float(left.std()), rel=0.25)
        assert torch.isin(drawn, left).float().mean() < 0.01
    assert len({entry.seed for entry in edit.entries.values()}) == len(edit.entries)


def test_an_edit_with_an_unknown_fill_is_refused(tiny_model, tmp_path):
    weight = next(iter(maskable_parameters(tiny_model, "xattn").items()))
    Edit.from_mask({weight[0]: weight[1] > 0}, fill="median").save(tmp_path / "edit.safetensors")

    with pytest.raises(ValueError, match="is damaged at"):
        Edit.load(tmp_path / "edit.safetensors")


def test_learned_masks_are_filled_unless_weights_are_tuned_under_them():
    assert Learned(fill="mean").fill == "mean"
    with pytest.raises(ValueError, match=r"fill is 'mean' and finetune 'after'.*set fill=zero or finetune=none"):
        Learned(fill="mean", finetune="after")
