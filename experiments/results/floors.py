"""Success above the floor, for people to read: of one run, of many, and over several trainings."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from evaluation.floors import MARGIN, AboveFloor, Calibrated
from evaluation.savings import Savings
from evaluation.statistics import Rate
from experiments.job.floors import NEVER_KNEW
from experiments.job.store import content_hash
from experiments.results.names import method_name, names_of
from experiments.results.writing import markdown_table

NO_ROOM = "no room"
"""What stands in place of a calibrated success where an attack hardly tells floor and ceiling apart."""

_SEEDS = frozenset({"seed", "training_seed", "knows", "build"})
"""Fields in which repetitions of one job differ."""

EXPLANATION = (
    "Rate: share of prompts whose picture shows the concept under attack. Floor: the same attack, budget, prompts and "
    "seeds on a model that never knew the concept. Excess: rate minus floor in points, with its 95 % interval. "
    "Calibrated: 0 as if never learned, 1 as if never erased; no room where the ceiling's (the unedited model's) lower "
    "limit is within 20 points of the floor."
)


def floor_texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a run's success under attack is above the floor, with its verdict; empty where there is no floor."""
    floor = summary.get("floor")
    if not floor:
        return {}
    return {
        floor_label(summary): str(Rate(**floor["floor"])),
        "ceiling: attack on the unedited model": str(Rate(**floor["ceiling"])),
        **standing_texts(summary),
    }


def floor_label(summary: Mapping[str, Any]) -> str:
    """What the floor's rate is of, in words; of a run without a floor what it would be of."""
    floor = summary.get("floor") or {}
    return f"{_name(floor)}: {_of(floor)}"


def floor_decides(summary: Mapping[str, Any]) -> bool:
    """Whether a run's success stands beside that on a model that never knew: a control in its place decides nothing."""
    floor = summary.get("floor") or {}
    return bool(floor) and not floor.get("control")


def is_no_probe(summary: Mapping[str, Any]) -> bool:
    """Whether the attack of a run finds about as much in the model that never knew as in the unedited one.

    That is the case if the ceiling is at most 10 points above the floor: prompt by prompt the attack's AUC, one half
    plus half of the difference, is then 0.55 at the most. Unknown, and so not said, of runs without a floor.
    """
    if not floor_decides(summary):
        return False
    room = 100 * (summary["floor"]["ceiling"]["rate"] - summary["floor"]["floor"]["rate"])
    return bool(room <= MARGIN)


def no_probe_sentences(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which attacks are left out of unions, and why; nothing where none is."""
    named: dict[str, list[str]] = {}
    for summary in filter(is_no_probe, summaries):
        shown = {name: f"{100 * summary['floor'][name]['rate']:.0f} %" for name in ("floor", "ceiling")}
        text = f"{summary['concept']} (floor {shown['floor']}, ceiling {shown['ceiling']})"
        named.setdefault(summary["choices"]["attack"], []).append(text)
    return [
        f"Left out of the unions: {attack} on {', '.join(dict.fromkeys(texts))}. It finds as much in a model that "
        "never knew the concept as in one that does (AUC about 0.5), so its success says nothing of knowledge."
        for attack, texts in named.items()
    ]


def standing_texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The excess over the floor, the calibrated success and the verdict; empty where there is no floor."""
    floor = summary.get("floor")
    if not floor:
        return {}
    return {
        f"excess over the {_name(floor)}": f"{_points(floor)} points",
        "calibrated success": _calibrated(floor),
        "verdict": verdict_text(floor),
        **_savings_texts(floor.get("savings")),
    }


def _savings_texts(found: Mapping[str, Any] | None) -> dict[str, str]:
    """What relearning saves beside learning, in words; empty where nothing was relearned."""
    if not found:
        return {}
    told = {name: value for name, value in found.items() if name not in {"pictures", "first_step_cosine"}}
    savings, cosines = Savings(**told), found["first_step_cosine"]
    texts = {
        "steps until half of the prompts show it": f"{savings.steps(savings.k50)}; floor "
        f"{savings.steps(savings.k50_floor)}, ceiling {savings.steps(savings.k50_ceiling)}",
        f"savings, with pictures of {found['pictures']}": str(savings),
        "area above the floor's curve": f"{savings.area:+.1f} points "
        f"[{savings.area_low:+.1f}, {savings.area_high:+.1f}]",
    }
    if cosines["attacked"] is not None:
        floor = "none" if cosines["floor"] is None else f"{cosines['floor']:+.3f}"
        texts["cosine of the first step and the way back"] = f"{cosines['attacked']:+.3f}; floor {floor}"
    return texts


def verdict_text(floor: Mapping[str, Any]) -> str:
    """The verdict on a run's floor, with what it is worth where the attack tells floor and ceiling hardly apart."""
    calibrates = floor["calibrated"] or floor.get("control")
    if floor["kind"] in {"at_floor", "below_floor"} and not calibrates:
        return f"{floor['verdict']}, but {NO_ROOM} to tell"
    return str(floor["verdict"])


def floor_rate(summary: Mapping[str, Any], name: str) -> Rate | None:
    """The rate of the ``floor`` or of the ``ceiling``, where there is one."""
    floor = summary.get("floor")
    return Rate(**floor[name]) if floor else None


def short_standing(summary: Mapping[str, Any]) -> str:
    """Floor, excess and calibrated success in one line, for a cell of a table; empty where there is no floor."""
    floor = summary.get("floor")
    if not floor:
        return ""
    rate = f"{_name(floor)} {100 * floor['floor']['rate']:.0f} %"
    return f"{rate}, excess {_points(floor)}, calibrated {_calibrated(floor)}"


def floor_sentence(summary: Mapping[str, Any]) -> str:
    """The same in a sentence, or that no floor was measured and what that means."""
    floor = summary.get("floor")
    if not floor:
        return (
            "No floor was measured: how often the same attack succeeds on a model that never knew the concept is "
            "unknown, so some of these successes may be luck, the judge's errors or what the attack itself brings."
        )
    rate = Rate(**floor["floor"])
    return (
        f"Verdict: {verdict_text(floor)}. The {_name(floor)}, {_of(floor)}, shows it for {rate.successes} of {rate.n} "
        f"prompts under the same attack: the excess is {_points(floor)} points, and "
        + (
            f"calibrated success is {_calibrated(floor)}."
            if floor["calibrated"]
            else "there is no room between floor and ceiling, so this attack tells little of what the model knows."
        )
    )


def floor_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The same as numbers by plain names, such as ``floor``, ``floor_low``, ``excess`` and ``calibrated``."""
    floor = summary.get("floor")
    if not floor:
        return {}
    numbers = {"excess": floor["excess"], "excess_low": floor["low"], "excess_high": floor["high"]}
    for name in ("floor", "ceiling", "calibrated"):
        for part, number in (floor[name] or {}).items():
            numbers[name if part in {"rate", "value"} else f"{name}_{part}"] = number
    if found := floor.get("savings"):
        own = {name: value for name, value in found.items() if name.startswith(("k50", "savings", "bound", "area"))}
        cosines = {f"first_step_cosine_{name}": value for name, value in found["first_step_cosine"].items()}
        numbers |= own | cosines
    runs = {f"{name}_run": run for name, run in floor["runs"].items()}
    return {**numbers, "verdict": floor["verdict"], "floor_model": floor["knows"] or floor.get("control"), **runs}


def floor_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run that has a floor."""
    rows = [
        _row(summary) | {"seed": summary["seed"]} | _cells(Rate(**summary["rates"]["attacked"]).rate, summary["floor"])
        for summary in summaries
        if summary.get("floor")
    ]
    return pd.DataFrame(rows)


def trainings_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per method and attack that ran in several trainings of the base, or with several seeds of erasure.

    The unit is the training: prompts are never pooled over seeds. Where bases of several trainings were erased, a
    training's outcomes are the mean over its seeds of erasure.
    """
    repeated: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        # Controls are made without a training.
        if floor_decides(summary):
            repeated.setdefault(_repeats(summary), []).append(summary)
    rows = []
    for runs in repeated.values():
        units, outcomes = _by_training(runs)
        if len(outcomes["attacked"]) < 2:
            continue
        above = AboveFloor.over_trainings(outcomes["attacked"], outcomes["floor"], units=units)
        calibrated = Calibrated.over_trainings(outcomes["attacked"], outcomes["floor"], outcomes["ceiling"])
        told = above.as_dict() | {
            "floor": {"rate": _mean(outcomes["floor"])},
            "calibrated": calibrated and calibrated.as_dict(),
        }
        over = {"over": f"{above.trainings} {units}"}
        rows.append(_row(runs[0]) | over | _cells(_mean(outcomes["attacked"]), told))
    return pd.DataFrame(rows)


def floor_sections(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Parts of a Markdown file: the table of runs, and that over trainings; nothing where no run has a floor."""
    parts = []
    if len(table := floor_table(summaries)):
        prompts = ", ".join(map(str, sorted({summary["n"] for summary in summaries if summary.get("floor")})))
        how = "; ".join(dict.fromkeys(summary["floor"]["how"] for summary in summaries if summary.get("floor")))
        parts += [
            "## Above the floor",
            markdown_table(table, disable_numparse=True),
            f"{EXPLANATION} n = {prompts} prompts. Interval: {how}.",
        ]
    if len(table := trainings_table(summaries)):
        parts += [
            "## Above the floor, over trainings",
            markdown_table(table, disable_numparse=True),
            "The same over pairs of an erased model and the model that never knew. The unit is the training, as "
            "`over` says, never the prompt: two-way intervals over trainings and prompts. Seeds of erasure alone share "
            "one base and one model that never knew, and say nothing of other trainings of those.",
        ]
    return parts


def _row(summary: Mapping[str, Any]) -> dict[str, Any]:
    names = names_of(summary)
    return {"concept": names["concept"], "method": method_name(summary), "attack": names["attack"]}


def _cells(rate: float, floor: Mapping[str, Any]) -> dict[str, str]:
    return {
        "rate": f"{100 * rate:.0f} %",
        "floor": f"{100 * floor['floor']['rate']:.0f} %",
        "excess": _points(floor),
        "calibrated": _calibrated(floor),
        "verdict": verdict_text(floor),
    }


def _name(floor: Mapping[str, Any]) -> str:
    """What the rate is called that others are compared with."""
    return "control" if floor.get("control") else "floor"


def _of(floor: Mapping[str, Any]) -> str:
    return str(floor.get("of", NEVER_KNEW))


def _points(floor: Mapping[str, Any]) -> str:
    return f"{floor['excess']:+.1f} [{floor['low']:+.1f}, {floor['high']:+.1f}]"


def _calibrated(floor: Mapping[str, Any]) -> str:
    return str(Calibrated(**floor["calibrated"])) if floor["calibrated"] else NO_ROOM


def _repeats(summary: Mapping[str, Any]) -> str:
    """What runs that differ in their seeds alone have in common."""
    config = {group: summary["config"].get(group) for group in ("model", "eraser", "pruning", "attack", "judge")}
    prompts = [(case["case_number"], case["prompt"]) for case in summary["cases"]]
    return content_hash([summary["concept"], without_seeds(config), prompts, summary["config"].get("sampling")])


def without_seeds(config: Any) -> Any:
    """A plain config without the fields in which repetitions of a job differ."""
    if isinstance(config, Mapping):
        return {key: without_seeds(value) for key, value in config.items() if key not in _SEEDS}
    return config


def _by_training(runs: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, list[list[float]]]]:
    """What the units of ``runs`` are, and their outcomes on the edited model, the floor and the ceiling, each a row."""
    newest: dict[tuple[int, int], Mapping[str, Any]] = {}
    for run in runs:
        newest.setdefault((run["config"]["model"].get("training_seed", 0), run["seed"]), run)
    trainings = {training for training, _ in newest}
    several = len(trainings) > 1
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for (training, seed), run in sorted(newest.items()):
        groups.setdefault(training if several else seed, []).append(run)
    outcomes = {
        name: [
            [_mean([[case[name]] for case in same]) for same in zip(*(run["cases"] for run in group), strict=True)]
            for group in groups.values()
        ]
        for name in ("attacked", "floor", "ceiling")
    }
    return "trainings of base and twin" if several else "seeds of erasure", outcomes


def _mean(rows: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))
