"""Neurons of a concept: activations and their comparisons against their definitions, and a whole analysis in small."""

import sys
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch

from erasure.edit import Edit
from erasure.neurons import (
    Sensitivity,
    activations,
    choose,
    neuron_layers,
    standardised_differences,
)
from evaluation.statistics import Mean
from experiments.command import collect, console
from experiments.command.stored_runs import job_of_summary
from experiments.job.summary import read_summaries
from experiments.results import neurons
from experiments.results.neurons import Analysis, Measurements, PruningEffect, RunNeurons
from tests import tiny_job
from tests.conftest import make_tiny_pipeline
from tests.oracles import neurons as oracle

PROMPTS = ["a church", "a red fish in the snow", "a photo"]
SEEDS = [3, 1, 4]
GUIDANCE = [2.0, 1.0, 3.0]
RECORDS = {"feed_forward": oracle.hidden_units, "cross_attention": oracle.output_channels}


def measured(model, units="feed_forward", *, prompts=PROMPTS, batch_size=2):
    return activations(model, prompts, seeds=SEEDS, guidance=GUIDANCE, steps=3, batch_size=batch_size, units=units)


@pytest.mark.parametrize("units", list(RECORDS))
def test_activations_are_mean_sizes_at_every_step_of_the_prompts_half(tiny_model64, units):
    model = tiny_model64
    values = measured(model, units)

    with torch.no_grad():
        text, empty = model.encode_prompts(PROMPTS), model.encode_prompts([""])[0]
        expected = [
            oracle.sampled(
                model.unet,
                RECORDS[units],
                model.alphas_cumprod.double().tolist(),
                model.sampling_timesteps(3).tolist(),
                SEEDS[row],
                model.latent_shape,
                text[row],
                empty,
                GUIDANCE[row],
            )
            for row in range(len(PROMPTS))
        ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(values[:, 0], expected[:, 0], rtol=1e-9, atol=1e-12)
    # The sampler takes roots of its schedule in float32.
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    assert values.shape[2] == sum(neuron_layers(model, units).values())


def test_activations_cost_the_pictures_alone_and_do_not_hang_on_the_batch_size(tiny_model64):
    values = measured(tiny_model64, batch_size=2)
    # The second picture is not guided, but shares a batch with one that is.
    assert tiny_model64.unet_evaluations == 3 * (2 + 2 + 2)
    torch.testing.assert_close(measured(tiny_model64, batch_size=1), values, rtol=1e-9, atol=1e-12)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model64.unet.modules())


def test_activations_are_those_of_the_model_as_it_is_now(tiny_model64):
    name = next(iter(neuron_layers(tiny_model64, "feed_forward"))).replace("net.2", "net.0.proj.weight")
    kept = torch.ones(tiny_model64.unet.get_parameter(name).shape, dtype=torch.bool)
    kept[0] = False  # the value of the first unit, not its gate
    with Edit.from_mask({name: kept}).applied(tiny_model64):
        pruned = measured(tiny_model64)
    untouched = measured(tiny_model64)
    bias = tiny_model64.unet.get_parameter(name.replace("weight", "bias"))
    assert bias[0] != 0
    assert not torch.allclose(pruned[..., 0], untouched[..., 0])
    torch.testing.assert_close(pruned[:, 0, 1:9], untouched[:, 0, 1:9], rtol=1e-9, atol=1e-12)


def test_a_model_without_such_layers_is_one_sentence(tiny_model):
    tiny_model.unet = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'tiny' has no layer attn2.to_out.0, so no cross_attention units; choose"):
        neuron_layers(tiny_model, "cross_attention")


@pytest.mark.parametrize("spread", ["paired", "pooled"])
def test_standardised_differences_follow_the_formula(spread):
    generator = torch.Generator().manual_seed(0)
    present, absent = torch.rand((2, 5, 3, 4), generator=generator, dtype=torch.float64)
    expected = [
        oracle.standardised_difference(present[..., unit].tolist(), absent[..., unit].tolist(), spread)
        for unit in range(4)
    ]
    found = standardised_differences(present, absent, spread=spread)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_neuron_that_does_not_change_has_no_difference_and_one_pair_is_refused():
    same = torch.rand((3, 2, 1), generator=torch.Generator().manual_seed(0))
    assert standardised_differences(same, same).tolist() == [0.0]
    with pytest.raises(ValueError, match="1 pairs of prompts have no spread"):
        standardised_differences(same[:1], same[:1])


def test_the_highest_are_chosen_and_as_many_others_at_random():
    correlation = torch.rand(100, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(100, dtype=torch.bool)
    allowed[correlation.argmax()] = False
    correlated, random = choose(correlation, allowed, percent=10, seed=0)

    ranked = sorted((i for i in range(100) if allowed[i]), key=lambda i: -correlation[i])
    assert correlated.tolist() == ranked[:10]
    assert len(set(random.tolist())) == 10
    assert set(random.tolist()) <= set(ranked[10:])
    assert torch.equal(choose(correlation, allowed, percent=10, seed=0)[1], random)
    assert not torch.equal(choose(correlation, allowed, percent=10, seed=1)[1], random)
    assert len(choose(correlation, allowed, percent=0.1, seed=0)[0]) == 1


@pytest.mark.parametrize("percent", [0, 51, 100])
def test_more_neurons_than_leave_as_many_others_are_refused(percent):
    with pytest.raises(ValueError, match=f"percent is {percent} of 10 neurons; it must be above 0 and at most 50"):
        choose(torch.rand(10), torch.ones(10, dtype=torch.bool), percent=percent, seed=0)


def test_sensitivity_is_relative_to_the_plain_prompts_in_the_original_model():
    generator = torch.Generator().manual_seed(0)
    original, erased, attacked = torch.rand((3, 6, 4), generator=generator, dtype=torch.float64)
    sensitivity = Sensitivity.of(original, erased, attacked)

    for name, values in (("original", original), ("erased", erased), ("attacked", attacked)):
        columns = [oracle.relative(original[:, unit].tolist(), values[:, unit].tolist()) for unit in range(4)]
        expected = torch.tensor(columns, dtype=torch.float64).T
        torch.testing.assert_close(getattr(sensitivity, name), expected, rtol=1e-9, atol=0)
    expected = oracle.reactivation(original.tolist(), erased.tolist(), attacked.tolist())
    assert sensitivity.reactivation.tolist() == pytest.approx(expected, rel=1e-9)
    rows = torch.tensor([True, False] * 3)
    assert sensitivity.on(rows).reactivation.tolist() == pytest.approx(expected[::2], rel=1e-9)


def test_silent_neurons_are_refused():
    original = torch.ones(2, 3)
    original[:, 1] = 0
    with pytest.raises(ValueError, match="1 of 3 neurons are silent"):
        Sensitivity.of(original, original, original)


def test_a_bootstrapped_mean_has_an_interval_that_depends_on_the_seed_alone():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = Mean.bootstrapped(values, seed=0)
    assert first == Mean.bootstrapped(values.tolist(), seed=0)
    assert first != Mean.bootstrapped(values, seed=1)
    student = Mean.of(values)
    assert (first.n, first.mean) == (student.n, student.mean)
    # Of many normal values both intervals are nearly the same; of skewed ones the bootstrap's leans.
    assert (first.low, first.high) == pytest.approx((student.low, student.high), abs=0.01)
    skewed = Mean.bootstrapped(values.exp(), seed=0)
    assert skewed.high - skewed.mean > skewed.mean - skewed.low


def test_a_bootstrapped_mean_without_spread_has_an_interval_without_width():
    assert Mean.bootstrapped([2.0, 2.0], seed=0) == Mean(2, 2.0, 2.0, 2.0)
    assert Mean.bootstrapped([3.0], seed=0) == Mean(1, 3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        Mean.bootstrapped([], seed=0)


@pytest.fixture(scope="module")
def world(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the run of an unpruned and of a pruned model, and pairs of prompts."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_pipeline(tokenizer_folder).save_pretrained(folder / "model")
    tiny_job.write_world(folder)
    # The first pair is one of the prompts that are attacked.
    pairs = ["with,without", "a red fish,a fish", "a church at night,a night", "a church in the snow,snow"]
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    for pruning in ("off", "on"):
        steps = ["eraser.steps=4", "attack.timesteps=1", *(["pruning.steps=4"] if pruning == "on" else [])]
        tiny_job.run([*command(folder), f"pruning={pruning}", *steps], folder / pruning)
    return folder


def command(world: Path) -> list[str]:
    return [*tiny_job.overrides(world, world / "store"), f"concept.pairs={world / 'pairs.csv'}"]


@pytest.fixture
def summaries(world: Path):
    found = read_summaries(world / "store")
    return sorted(found, key=lambda summary: summary["choices"]["pruning"])


ANALYSIS = Analysis(percent=5, seeds_per_pair=2)


def test_a_run_is_measured_on_its_own_prompts_model_and_adversarial_prompts(summaries):
    summary = summaries[0]
    run = Measurements(ANALYSIS, job_of_summary).of(summary)

    model = tiny_job.make_job(*command(Path(summary["path"]).parents[3])).model.load()
    cases = summary["cases"]
    plain = [case["prompt"] for case in cases]
    options = {"seeds": [61 + n for n in range(5)], "guidance": [3.0] * 5, "steps": 2, "batch_size": 5}
    options["units"] = "feed_forward"
    original = activations(model, plain, **options).mean(1)
    edit = Edit.load(Path(summary["artefacts"]["edit"]) / "edit.safetensors")
    with edit.applied(model):
        erased = activations(model, plain, **options).mean(1)
        attacked = activations(model, [case["adversarial_prompt"] for case in cases], **options).mean(1)
    every = Sensitivity.of(original, erased, attacked)
    columns = {tuple(column) for column in every.attacked.T.round(decimals=9).tolist()}
    for group in run.groups.values():
        assert group.attacked.shape == (5, round(original.shape[1] * 0.05))
        assert {tuple(column) for column in group.attacked.T.round(decimals=9).tolist()} <= columns
    assert run.pairs == 2 * 2  # without the pair that is attacked
    assert run.tried.tolist() == [not case["erased"] for case in cases]
    assert run.broken.tolist() == [case["attacked"] and not case["erased"] for case in cases]
    assert bool((run.absent["correlated"] < 1).all())


def test_what_was_measured_is_found_again_and_both_runs_share_the_original_model(summaries, monkeypatch):
    measurements = Measurements(ANALYSIS, job_of_summary)
    first = [measurements.of(summary) for summary in summaries]
    (model,) = measurements._models.values()
    spent = model.unet_evaluations
    again = [measurements.of(summary) for summary in summaries]
    assert model.unet_evaluations == spent
    for one, other in zip(first, again, strict=True):
        for name, group in one.groups.items():
            torch.testing.assert_close(group.attacked, other.groups[name].attacked, rtol=0, atol=0)
    torch.testing.assert_close(
        first[0].groups["correlated"].original, first[1].groups["correlated"].original, rtol=0, atol=0
    )


def test_the_command_writes_a_figure_and_tables(world, summaries, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "collect_runs", lambda *_: (summaries, ["a third job"]))
    monkeypatch.setattr(
        sys, "argv", ["eraselab", "neurons", "--folder", str(tmp_path), "--percent", "5", "--units", "cross_attention"]
    )
    console.main()
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / f"neurons{suffix}") for suffix in (".md", ".csv", ".png", ".pdf")]
    assert "1 of 3 runs are missing" in err
    assert (tmp_path / "neurons.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "neurons.pdf").read_bytes().startswith(b"%PDF")
    frame = pd.read_csv(tmp_path / "neurons.csv")
    assert set(frame["analysis_units"]) == {"cross_attention"}
    assert set(frame["run"]) == {summary["run"] for summary in summaries}
    every = frame[frame["prompts"] == "attacked"]
    assert list(every["neurons"]) == ["correlated", "random"] * 2
    for _, row in every.iterrows():
        assert row["attacked_low"] <= row["attacked"] <= row["attacked_high"]
        assert row["attacked"] - row["erased"] == pytest.approx(row["reactivation"], rel=1e-9)
    text = (tmp_path / "neurons.md").read_text()
    assert "Do the correlated neurons come back under attack?" in text
    assert "1 runs are missing: a third job." in text
    assert f"{every['attacked'].iloc[0]:.0%}".replace("%", " %") in text


def test_a_figure_has_a_panel_per_model_and_one_that_compares_them(summaries):
    measurements = Measurements(ANALYSIS, job_of_summary)
    runs = [measurements.of(summary) for summary in summaries]
    numbers = neurons.long_table(runs, ANALYSIS)
    figure = neurons.draw(runs, numbers)
    off, on, compared = figure.axes
    assert ["pruning off" in off.get_title(), "pruning on" in on.get_title()] == [True, True]
    assert f"{int(runs[0].broken.sum())} of {int(runs[0].tried.sum())} prompts" in off.get_title()
    rows = numbers[(numbers["run"] == summaries[0]["run"]) & (numbers["prompts"] == "attacked")]
    lines = [line.get_ydata() for line in off.get_lines() if len(line.get_ydata()) == 3]
    for _, row in rows.iterrows():
        assert any(list(line) == [row["original"], row["erased"], row["attacked"]] for line in lines)
    assert [label.get_text() for label in compared.get_xticklabels()] == ["esd,\npruning off", "esd,\npruning on"]


def invented(reactivation: list[float], tried: list[bool], *, pruning: str, scale: float = 0.0) -> RunNeurons:
    """A run whose correlated neurons gain ``reactivation`` by prompt and whose random ones gain ``scale`` of it."""
    gains = torch.tensor(reactivation, dtype=torch.float64)[:, None].expand(-1, 2)
    ones = torch.ones_like(gains)
    groups = {
        name: Sensitivity(ones, ones / 2, ones / 2 + share * gains)
        for name, share in (("correlated", 1.0), ("random", scale))
    }
    summary = {
        "run": pruning,
        "seed": 0,
        "concept": "van_gogh",
        "choices": {"eraser": "esd", "pruning": pruning, "attack": "unlearndiff"},
        "identity": {"pruning": pruning, "edit": pruning, "concept": "van_gogh"},
    }
    absent = {name: torch.ones(2) for name in groups}
    return RunNeurons(summary, groups, absent, torch.tensor(tried), torch.tensor(tried), 4)


@pytest.mark.parametrize(
    ("off", "on", "verdict"),
    [
        ([0.3, 0.4, 0.5, 0.4], [0.1, -0.1, 0.1, -0.1], "shown"),
        ([0.5, 0.6, 0.7, 0.6], [0.1, 0.2, 0.1, 0.2], "in part: with pruning the correlated neurons come back less"),
        (
            [0.3, 0.4, 0.5, 0.4],
            [0.3, 0.5, 0.4, 0.4],
            "not shown: with pruning the correlated neurons come back no less",
        ),
        (
            [0.1, -0.1, 0.1, -0.1],
            [0.0, 0.1, -0.1, 0.0],
            "not shown: without pruning the correlated neurons do not come back",
        ),
    ],
)
def test_the_verdict_follows_from_the_intervals(off, on, verdict):
    runs = [invented(values, [True] * 4, pruning=name) for name, values in (("off", off), ("on", on))]
    (effect,) = neurons.pruning_effects(runs, seed=0)
    assert effect.verdict == verdict
    assert neurons.effects_table([effect])["the claim"][0] == verdict


def test_neurons_that_come_back_as_random_ones_do_say_nothing_of_the_concept():
    off = invented([0.3, 0.4, 0.5, 0.4], [True] * 4, pruning="off", scale=1.0)
    on = invented([0.0] * 4, [True] * 4, pruning="on")
    (effect,) = neurons.pruning_effects([off, on], seed=0)
    assert effect.verdict.startswith("not shown: without pruning the correlated neurons come back no more than random")


def test_pruning_is_compared_beyond_random_neurons_on_the_prompts_attacked_in_both():
    off = invented([0.4, 0.8, 0.6, 0.2], [True, True, True, False], pruning="off", scale=0.5)
    on = invented([0.2, 0.0, 0.4, 0.6], [True, False, True, True], pruning="on")
    effect = PruningEffect.of(on, off, seed=0)
    assert effect is not None
    assert effect.groups["off", "correlated"].mean == pytest.approx(fmean([0.4, 0.8, 0.6]))
    assert effect.groups["off", "random"].mean == pytest.approx(fmean([0.2, 0.4, 0.3]))
    assert (effect.excess["off"].n, effect.excess["off"].mean) == (3, pytest.approx(fmean([0.2, 0.4, 0.3])))
    assert (effect.excess["on"].n, effect.excess["on"].mean) == (3, pytest.approx(fmean([0.2, 0.4, 0.6])))
    assert (effect.difference.n, effect.difference.mean) == (2, pytest.approx(fmean([0.2 - 0.2, 0.3 - 0.4])))
    disjoint = invented([0.1] * 4, [False, False, False, True], pruning="on")
    assert PruningEffect.of(disjoint, off, seed=0) is None
    assert neurons.pruning_effects([off, disjoint], seed=0) == []


def test_runs_that_cannot_be_measured_are_one_sentence(summaries, tmp_path):
    summary = summaries[0]
    measurements = Measurements(ANALYSIS, job_of_summary)
    cases = [{**case, "variant": "embeddings"} for case in summary["cases"]]
    with pytest.raises(ValueError, match="ended with more than a text"):
        measurements.of({**summary, "cases": cases})
    cases = [{**case, "erased": True} for case in summary["cases"]]
    with pytest.raises(ValueError, match="attacked no prompt"):
        measurements.of({**summary, "cases": cases})
    config = summary["config"]
    with pytest.raises(ValueError, match=r"concept.pairs of 'van_gogh' is null"):
        measurements.of({**summary, "config": {**config, "concept": {**config["concept"], "pairs": None}}})
    (tmp_path / "pairs.csv").write_text("with,without\na red fish,a fish\n")
    few = {**config["concept"], "pairs": str(tmp_path / "pairs.csv")}
    with pytest.raises(ValueError, match="has 0 pairs besides the prompts that are measured"):
        measurements.of({**summary, "config": {**config, "concept": few}})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--percent", "60"], "percent is 60.0; it must be 50.0 or less."),
        (
            ["--percent", "x"],
            "Invalid value for '--percent': Input should be a valid number, unable to parse string as a number.",
        ),
        (["--seeds-per-pair", "0"], "seeds_per_pair is 0; it must be 1 or more."),
    ],
)
def test_bad_settings_are_one_sentence(monkeypatch, option, message):
    monkeypatch.setattr(sys, "argv", ["eraselab", "neurons", *option])
    with pytest.raises(SystemExit) as exit_:
        console.main()
    assert str(exit_.value) == message


def test_the_experiment_is_esd_without_and_with_pruning_on_each_task():
    jobs = collect.experiment_jobs("neurons")
    cells = [(job["concept"]["name"], job["pruning"]["_target_"].rpartition(".")[2]) for job in jobs]
    assert cells == [(concept, pruning) for concept in ("van_gogh", "church", "fire") for pruning in ("Off", "Learned")]
    shared = collect.experiment_jobs("claim")
    assert all(job in shared for job in jobs)
