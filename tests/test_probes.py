"""Whether an attack tells models that know from models that do not."""

from itertools import combinations, product
from math import comb, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import probes
from evaluation.probes import Separation, auc, permutation_p_value
from experiments.results.probes import over_concepts, probe_figure, probe_table, write_probes


def slow_auc(knowing: list[float], ignorant: list[float]) -> float:
    wins = 0.0
    for one in knowing:
        for other in ignorant:
            wins += 1 if one > other else 0.5 if one == other else 0
    return wins / (len(knowing) * len(ignorant))


SCORES = [
    ([0.9, 0.8, 0.7], [0.1, 0.2, 0.7]),
    ([0.5] * 3, [0.5] * 4),
    ([1.0, 0.3], [0.4, 0.2, 0.9]),
    ([0.1], [0.2, 0.3]),
]


@pytest.mark.parametrize(("knowing", "ignorant"), SCORES)
def test_auc_and_its_p_count_pairs_and_labellings(knowing: list[float], ignorant: list[float]) -> None:
    found = slow_auc(knowing, ignorant)
    assert auc(knowing, ignorant) == pytest.approx(found)
    scores = [*knowing, *ignorant]
    as_large = 0
    for chosen in combinations(range(len(scores)), len(knowing)):
        others = [score for number, score in enumerate(scores) if number not in chosen]
        as_large += slow_auc([scores[number] for number in chosen], others) >= found - 1e-12
    assert permutation_p_value([(knowing, ignorant)]) == pytest.approx(as_large / comb(len(scores), len(knowing)))


def labellings(knowing: list[float], ignorant: list[float]) -> list[float]:
    """Pairs won under every way to say which models know."""
    scores = [*knowing, *ignorant]
    return [
        slow_auc([scores[i] for i in chosen], [s for i, s in enumerate(scores) if i not in chosen])
        * len(knowing)
        * len(ignorant)
        for chosen in combinations(range(len(scores)), len(knowing))
    ]


def test_models_are_compared_within_their_stratum() -> None:
    # Both concepts tell at most one pair wrong; their levels differ, so that pooled models would tell little.
    strata = [([0.9, 0.8], [0.7]), ([0.3, 0.1], [0.2]), ([0.5, 0.4, 0.2], [0.2, 0.1])]
    won = [slow_auc(*stratum) * len(stratum[0]) * len(stratum[1]) for stratum in strata]
    found = Separation.within(strata)
    assert found.auc == pytest.approx(sum(won) / (2 + 2 + 6))
    sums = [sum(each) for each in product(*(labellings(*stratum) for stratum in strata))]
    assert found.p_value == pytest.approx(sum(total >= sum(won) - 1e-9 for total in sums) / len(sums))
    assert (found.knowing, found.ignorant) == (7, 4)
    # The variance of a weighted mean of independent AUCs.
    a = found.auc
    q1, q2 = a / (2 - a) - a * a, 2 * a * a / (1 + a) - a * a
    variance = sum(
        (len(k) * len(i) / 10) ** 2 * (a * (1 - a) + (len(k) - 1) * q1 + (len(i) - 1) * q2) / (len(k) * len(i))
        for k, i in strata
    )
    assert found.low == pytest.approx(a - 1.959963984540054 * sqrt(variance))


@pytest.mark.parametrize("strata", [1, 2, 3])
def test_the_smallest_p_of_strata_is_one_labelling_in_each(strata: int) -> None:
    assert Separation.within([([1.0, 0.9], [0.1])] * strata).p_value == pytest.approx(3.0**-strata)


@pytest.mark.parametrize(("count", "p"), [(2, 1 / 6), (3, 0.05), (4, 1 / 70), (5, 1 / 252)])
def test_the_smallest_p_is_one_labelling(count: int, p: float) -> None:
    separation = Separation.of([1.0] * count, [0.0] * count)
    assert separation.auc == 1
    assert separation.p_value == pytest.approx(p)


def test_the_interval_is_hanleys_and_mcneils() -> None:
    knowing, ignorant = [5.0, 4.0, 3.0, 2.5, 6.0], [1.0, 2.0, 2.7, 0.0, 0.5]
    a, m, n = slow_auc(knowing, ignorant), 5, 5
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (m * n))
    found = Separation.of(knowing, ignorant)
    assert found.low == pytest.approx(a - 1.959963984540054 * error)
    assert found.high == 1
    # Their variance at .9 with five models each, as the reference has it.
    ten = Separation.of([1.0] * 9 + [0.0], [0.5])
    assert ten.auc == 0.9
    assert found.is_probe
    assert not Separation.of([0.5] * 5, [0.5] * 5).is_probe
    # One model of each kind proves nothing, however far apart, nor does one in each of three concepts.
    assert not Separation.of([1.0], [0.0]).is_probe
    few = Separation.within([([1.0], [0.0])] * 3)
    assert few.low > 0.5
    assert few.p_value == 0.125
    assert not few.is_probe
    assert Separation.within([([1.0, 0.9], [0.0])] * 3).is_probe


def test_many_models_are_tested_with_labellings_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    knowing, ignorant = (generator.normal(size=6) + 0.8).tolist(), generator.normal(size=6).tolist()
    strata = [(knowing, ignorant), (ignorant, knowing)]
    exact, within = permutation_p_value(strata[:1]), permutation_p_value(strata)
    monkeypatch.setattr(probes, "ALL_LABELLINGS", 900)
    assert permutation_p_value(strata[:1]) == pytest.approx(exact, abs=0.05)
    assert permutation_p_value(strata) == pytest.approx(within, abs=0.05)
    assert permutation_p_value([([9.0] * 8, [0.0] * 8)]) == pytest.approx(1 / 901, abs=2 / 901)


def test_models_of_one_kind_tell_nothing() -> None:
    with pytest.raises(ValueError, match="0 models that know and 1 that do not"):
        auc([], [1.0])


def run(
    eraser: str, attack: str, rate: float, *, knows: str = "all", training: int = 0, **others: object
) -> dict[str, Any]:
    config = {
        "model": {"knows": "all" if eraser == "retrained" else knows, "training_seed": training},
        "eraser": {"knows": knows, "training_seed": training} if eraser == "retrained" else {},
    }
    choices = {"eraser": eraser, "pruning": "off", "attack": attack}
    return {
        "concept": "church",
        "choices": choices,
        "n": 8,
        "seed": 0,
        "config": config,
        "rates": {"attacked": {"rate": rate}},
    } | others


def test_attacks_are_told_by_the_models_that_they_tell_apart(tmp_path: Path) -> None:
    summaries = []
    for training in range(4):
        summaries += [
            run("none", "gcg", 0.9, training=training),
            run("retrained", "gcg", 0.1 * training, knows="never_church", training=training),
            run("none", "noise_inversion", 1.0, training=training),
            run("retrained", "noise_inversion", 1.0, knows="never", training=training),
        ]
    # It knows churches, and so does a model behind a surface edit; one that is a twin by choice of model does not.
    summaries += [
        run("none", "gcg", 0.7, knows="never_fire"),
        run("sld", "gcg", 0.05),
        run("none", "gcg", 0.2, knows="never"),
    ]
    # Neither edited weights nor other concepts or models take part.
    summaries += [run("esd", "gcg", 0.0), run("none", "pez", 0.5), run("none", "gcg", 1.0, concept="horse")]
    summaries += [run("none", "gcg", 0.0, config={"model": {}})]
    summaries += [run("none", "gcg", 0.0, choices={"eraser": "none", "pruning": "magnitude", "attack": "gcg"})]
    gcg, inversion = probe_table(summaries).to_dict("records")
    expected = Separation.of([0.9] * 4 + [0.7, 0.05], [0.0, 0.1, 0.2, 0.3, 0.2])
    assert {name: gcg[name] for name in expected.as_dict()} == pytest.approx(expected.as_dict())
    assert (inversion["attack"], inversion["auc"], inversion["p_value"], inversion["probe"]) == (
        "noise_inversion",
        0.5,
        1,
        False,
    )
    paths = write_probes(summaries, tmp_path)
    assert [path.name for path in paths] == ["probes.md", "probes.csv", "probes.png", "probes.pdf"]
    text = paths[0].read_text()
    assert "0.50 [" in text
    assert "No probes, as their AUC is about 0.5 or less: noise_inversion (0.50)." in text
    assert text.count("| no ") == 1
    assert "all_0 behind sld" in text
    with pytest.raises(ValueError, match="eraser=none,retrained"):
        write_probes(summaries[:1], tmp_path)


def test_several_seeds_of_an_attack_are_one_model() -> None:
    summaries = [run("none", "gcg", rate) for rate in (0.2, 0.6)] + [run("retrained", "gcg", 0.3, knows="never_church")]
    other = {**summaries[0]["config"], "attack": {"steps": 9}}
    # Another setting is another attack, which met models of one kind only.
    summaries.append(run("none", "gcg", 1.0, config=other))
    (row,) = probe_table(summaries).to_dict("records")
    assert (row["rate_knowing"], row["knowing"], row["ignorant"], row["auc"]) == (0.4, 1, 1, 1)


def test_concepts_make_one_table_and_one_figure() -> None:
    church = [run("none", "gcg", 0.9), run("sld", "gcg", 0.8), run("retrained", "gcg", 0.1, knows="never_church")]
    fire = [run("none", "gcg", 0.5), run("sld", "gcg", 0.1), run("retrained", "gcg", 0.3, knows="never_fire")]
    summaries = [*church, *({**each, "concept": "fire"} for each in fire)]
    table = probe_table(summaries)
    (row,) = over_concepts(table).to_dict("records")
    assert (row["auc"], row["concepts"], row["knowing"], row["ignorant"]) == (0.75, 2, 4, 2)
    assert row["p_value"] == pytest.approx(3 / 9)
    figure = probe_figure(table, ["gcg"])
    assert [panel.get_title() for panel in figure.axes] == ["church", "fire"]
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert drawn["knowing"] == [0.9, 0.8]
    assert drawn["never knew"] == [0.1]
    # Which of two settings of an attack belong together on other concepts is not known.
    other = [{**each, "config": {**each["config"], "attack": {"steps": 9}}} for each in church]
    assert over_concepts(probe_table([*church, *other])).empty
