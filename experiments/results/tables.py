"""Tables of many runs, as Markdown, CSV and LaTeX."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from diffusion.files import write_atomically
from evaluation.statistics import PairedComparison, Rate
from experiments.job.origin import MACHINE, revisions
from experiments.job.result import prompt_groups, warnings_of
from experiments.job.summary import compare, pruning_pairs
from experiments.results.floors import floor_decides, floor_numbers, floor_sections, is_no_probe, no_probe_sentences
from experiments.results.names import GROUPS, model_name, names_of
from experiments.results.published import published_numbers
from experiments.results.screen import (
    RATES,
    doubt,
    doubts,
    holding_texts,
    made_sentence,
    measure_text,
    mixtures,
    noise_numbers,
    protocol_texts,
    short_text,
)
from experiments.results.writing import latex, markdown_table, narrow, write_csv

log = logging.getLogger(__name__)

_KEYS = ["concept", *GROUPS, "seed"]
"""Columns that say which run a row is of."""

_COSTS = ("pruned", "U-Net evaluations", "seconds", "peak memory", "edit")

_IF_ANY = {"settings", "pruned"}
"""Columns of erased models that are left out where they are empty."""


def long_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run: its choices, every number with its interval in columns of its own, and the run itself."""
    rows = []
    for summary in summaries:
        row = names_of(summary) | {"threat_model": summary["threat_model"], "n": summary["n"], "seed": summary["seed"]}
        for name, value in (summary["rates"] | summary["measures"]).items():
            row |= _numbers(name, value)
        if protocol_texts(summary):
            protocol = summary["protocol"]
            row |= {"protocol": protocol["name"], "counting": protocol["counting"], "too_long": protocol["too_long"]}
            for rule, rate in protocol["by_rule"].items():
                row |= _numbers(f"success_{rule}", rate)
        if holds := summary.get("holds"):
            row |= {"new_seeds": holds["seeds"], "found_texts": holds["texts"]} | _numbers("holds", holds["shown"])
            if second := holds.get("second_judge"):
                row |= _numbers("second_judge_found", second["found"]) | _numbers("second_judge_holds", second["shown"])
        row |= floor_numbers(summary) | noise_numbers(summary)
        row |= _published_columns(summary)
        for stage, cost in summary["costs"].items():
            row |= {f"{stage}_unet_evaluations": cost["unet_evaluations"], f"{stage}_seconds": cost["seconds"]}
            # Older runs did not count these.
            row |= {f"{stage}_{name}": cost.get(name) for name in ("unet_gradients", "text_encodings")}
        row |= {name: summary.get(name) for name in (*MACHINE, "processes")} | {"revision": revisions([summary])[0]}
        row |= {"warnings": " ".join(warnings_of(summary))}
        row |= {"edit_bytes": summary["edit"]["size_bytes"], "run": summary["run"], "path": summary["path"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _published_columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """Published numbers by metric, with their sources, methods and doubts; several of one metric share a cell."""
    columns: dict[str, list[str]] = {}
    for number in published_numbers(summary):
        cells = {
            f"published_{number.metric}": number.value,
            f"published_{number.metric}_source": number.source,
            "published_method": number.method,
            "published_model": number.model,
            "published_differences": number.differences,
            "published_doubt": number.doubt,
        }
        for name, cell in cells.items():
            if cell not in columns.setdefault(name, []) or name == f"published_{number.metric}":
                columns[name].append(cell)
    return {name: "; ".join(filter(None, cells)) for name, cells in columns.items()}


def reading_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run for readers: numbers with their intervals as text."""
    rows = []
    for summary in summaries:
        row = names_of(summary) | {"seed": summary["seed"]}
        row |= {label: measure_text(summary["rates"][name]) for name, label in RATES.items()}
        row[RATES["base"]] += doubt(summary)
        row |= protocol_texts(summary)
        row |= holding_texts(summary)
        row |= {label: measure_text(value) for label, value in _measures(summary).items()}
        numbers = published_numbers(summary)
        for metric in dict.fromkeys(number.metric for number in numbers):
            row[f"published {metric}"] = "; ".join(str(number) for number in numbers if number.metric == metric)
        if numbers:
            row["published in"] = "; ".join(dict.fromkeys(number.source for number in numbers))
        rows.append(row | {"run": summary["run"], "path": summary["path"]})
    table = pd.DataFrame(rows)
    last = [column for column in ("published in", "run", "path") if column in table]
    return table[[*(column for column in table if column not in last), *last]].fillna("")


def comparison_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Pruning on against off on the same prompts and seeds, wherever both runs are there."""
    rows = []
    for pruned, unpruned in pruning_pairs(summaries):
        comparison = compare(pruned, unpruned)
        texts = {rate: str(PairedComparison(**comparison[rate])) for rate in ("erased", "attacked")}
        runs = f"{pruned['run']} - {unpruned['run']}"
        rows.append(names_of(pruned) | {"seed": pruned["seed"]} | texts | {"runs": runs})
    return pd.DataFrame(rows)


def seeds_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per choices that ran with several seeds: the mean of each number over the runs, lowest and highest."""
    repeated: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for summary in summaries:
        repeated.setdefault(tuple(names_of(summary).values()), []).append(summary)
    rows = []
    for runs in repeated.values():
        seeds = sorted({run["seed"] for run in runs})
        if len(seeds) > 1:
            row = names_of(runs[0]) | {"seeds": ", ".join(map(str, seeds))}
            row |= {label: _spread([run["rates"][name] for run in runs]) for name, label in RATES.items()}
            measures = [_measures(run) for run in runs]
            row |= {label: _spread([values[label] for values in measures]) for label in measures[0]}
            rows.append(row)
    return pd.DataFrame(rows)


def attack_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Attacks by rows and erased models by columns; empty where no model met several attacks.

    A cell is the rate under attack and the U-Net evaluations per prompt. The last rows are unions, prompt by prompt: of
    the attacks that come down to a text and a seed, and of all; attacks that are no probes are left out of both (see
    :func:`experiments.results.floors.is_no_probe`).
    """
    models: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        models.setdefault(model_name(summary), []).append(summary)
    if max(map(len, models.values()), default=0) < 2:
        return pd.DataFrame()
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for label, runs in models.items():
        for run in runs:
            evaluations = run["costs"]["attack"]["unet_evaluations"] / run["n"]
            row = rows.setdefault((run["choices"]["attack"], run["threat_model"]), {})
            row[label] = f"{_percent(Rate(**run['rates']['attacked']))}, {evaluations:,.0f}"
    for name, members in (("union of texts", comes_as_text), ("union of all", lambda _: True)):
        for label, runs in models.items():
            union = [run for run in runs if members(run) and not is_no_probe(run)]
            rows.setdefault((name, ""), {})[label] = _union(union) if union else ""
    return pd.DataFrame([{"attack": name, "access": access} | row for (name, access), row in rows.items()]).fillna("")


def _union(runs: Sequence[Mapping[str, Any]]) -> str:
    """The share of prompts that one of several attacks broke; of runs with a floor, that on the floor's model too."""
    found = [run["cases"] for run in runs]
    groups = prompt_groups(found[0])
    texts = [_percent(Rate.of([any(case["attacked"] for case in same) for same in zip(*found, strict=True)], groups))]
    if all(map(floor_decides, runs)):
        never = [any(case["floor"] for case in same) for same in zip(*found, strict=True)]
        texts.append(f"floor {100 * Rate.of(never, groups).rate:.0f} %")
    return ", ".join(texts)


def model_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per erased model: what it shows, plain and under each attack, what it keeps, and what erasing cost.

    Empty where all runs are of one model.
    """
    models: dict[tuple[str, str], dict[str, Any]] = {}
    for summary, settings in zip(summaries, varied_settings(summaries), strict=True):
        row = models.setdefault((summary["concept"], summary["edit"]["hash"]), _model_row(summary, settings))
        if summary["choices"]["attack"] != "none":
            row[summary["choices"]["attack"]] = _percent(Rate(**summary["rates"]["attacked"]))
    if len(models) < 2:
        return pd.DataFrame()
    table = pd.DataFrame(models.values()).fillna("")
    attacks = list(dict.fromkeys(s["choices"]["attack"] for s in summaries if s["choices"]["attack"] != "none"))
    first = ["concept", "eraser", "pruning", "settings", "seed", "shown"]
    others = [column for column in table.columns if column not in {*first, *attacks}]
    columns = [*first, *attacks, *others]
    return table[[column for column in columns if column not in _IF_ANY or (table[column] != "").any()]]


def varied_settings(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each run the settings of eraser and pruning in which runs of the same choices differ, as ``steps=100``.

    A field that only some of them have, as the others are of another version, tells nothing of those.
    """
    parts = [{part: summary["config"][part] for part in ("eraser", "pruning")} for summary in summaries]
    # Run by run, as one frame of all would fill in what some do not have.
    settings = [{str(key): str(value) for key, value in pd.json_normalize(own).iloc[0].items()} for own in parts]
    methods = [(s["choices"].get("eraser"), s["choices"].get("pruning")) for s in summaries]

    def varies(name: str, method: tuple[Any, Any]) -> bool:
        found = [own.get(name) for own, other in zip(settings, methods, strict=True) if other == method]
        return len(set(found) - {None}) > 1

    return [
        ", ".join(f"{name.partition('.')[2]}={value}" for name, value in own.items() if varies(name, method))
        for own, method in zip(settings, methods, strict=True)
    ]


def _model_row(summary: Mapping[str, Any], settings: str) -> dict[str, str]:
    names, cost, edit = names_of(summary), summary["costs"]["edit"], summary["edit"]
    masked = edit["metadata"].get("maskable_weights")
    return {
        "concept": names["concept"],
        "eraser": names["eraser"],
        "pruning": names["pruning"],
        "settings": settings,
        "seed": str(summary["seed"]),
        "shown": _percent(Rate(**summary["rates"]["erased"])) + doubt(summary),
        **{label: short_text(value) for label, value in _measures(summary).items()},
        "pruned": f"{100 * edit['metadata']['pruned_weights'] / masked:.1f} %" if masked else "",
        "U-Net evaluations": f"{cost['unet_evaluations']:,}",
        "seconds": f"{cost['seconds']:.1f}",
        "peak memory": f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB",
        "edit": f"{edit['size_bytes'] / 2**20:.2f} MiB",
    }


def comes_as_text(summary: Mapping[str, Any]) -> bool:
    """Return whether what a run's attack found is a text and a seed, and nothing more."""
    return not any(case.get("variant") for case in summary["cases"])


def _percent(rate: Rate) -> str:
    return f"{100 * rate.rate:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def write_tables(
    summaries: Sequence[Mapping[str, Any]], name: str, folder: Path, *, missing: Sequence[str] = ()
) -> list[Path]:
    """Write ``<name>.md``, ``.csv`` and ``.tex`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    reading, comparison, seeds = reading_table(summaries), comparison_table(summaries), seeds_table(summaries)
    parts = [f"# {name}", *_reading_parts(reading)]
    parts += [f"- {sentence}" for sentence in doubts(summaries)]
    parts += floor_sections(summaries)
    attacks = attack_table(summaries)
    # What attacks find is in their own table, if there are several.
    told = {summary["choices"]["attack"] for summary in summaries} if len(attacks) else set()
    parts += _model_parts(model_table(summaries), told)
    if len(attacks):
        parts += [
            "## Attacks",
            *map(markdown_table, narrow(attacks, ["attack", "access"])),
            "Share of prompts whose picture shows the concept under attack, with its interval, and U-Net evaluations "
            "per prompt. A union counts a prompt that at least one of the attacks above it broke; its floor is the "
            "same union on the model that never knew.",
            *no_probe_sentences(summaries),
        ]
    if len(comparison):
        parts += [
            "## Pruning on minus pruning off, prompt by prompt",
            markdown_table(comparison),
            "Percentage points with Newcombe's 95 % interval for paired proportions and McNemar's exact p.",
        ]
    if len(seeds):
        parts += [
            "## Over seeds",
            *map(markdown_table, narrow(seeds, [*seeds.columns[:5]])),
            "Over the seeds of erasure and attack: mean, standard deviation, lowest and highest; the prompts stay.",
        ]
    parts += [made_sentence(summaries)]
    for sentence in mixtures(summaries):
        log.warning(sentence)
        parts += [f"**{sentence}**"]
    if missing:
        parts += [f"{len(missing)} runs are missing: {'; '.join(missing)}."]
    paths = [folder / f"{name}{suffix}" for suffix in (".md", ".csv", ".tex")]
    write_atomically(paths[0], "\n\n".join(parts) + "\n")
    write_csv(long_table(summaries), paths[1])
    rows = "\n".join(map(latex, narrow(reading.drop(columns=["path", "run"]), _KEYS)))
    write_atomically(paths[2], f"% made by eraselab tables {name}; the runs are rows of {name}.csv\n{rows}")
    return paths


def _reading_parts(reading: pd.DataFrame) -> list[str]:
    """The table for readers as parts of a Markdown file, a question each; paths stay in the CSV."""
    rates = [*RATES.values()]
    published = [column for column in reading if str(column).startswith("published")]
    # Those of the protocol and of what holds stand between the rates and the measures, whose names are the evaluators'.
    rest = [column for column in reading if column not in {*_KEYS, *rates, *published, "run", "path"}]
    parts = [
        markdown_table(reading[[*_KEYS, *rates, "run"]]),
        "Rates: share of prompts whose picture shows the concept, with Wilson 95 % intervals; rows of one prompt are "
        "not counted as independent. Run: the name of the folder in the store whose `summary.json` has the whole "
        "configuration; the CSV beside this file has all paths and numbers.",
    ]
    if rest:
        parts += ["## What is kept, and what holds", *map(markdown_table, narrow(reading[[*_KEYS, *rest]], _KEYS))]
    if published:
        parts += [
            "## Published numbers",
            *map(markdown_table, narrow(reading[[*_KEYS, *published]], _KEYS)),
            "Published: numbers of the same protocol, concept and method, with the model that they were measured on; "
            "`published in` says where.",
        ]
    return parts


def _model_parts(models: pd.DataFrame, left_out: Collection[str]) -> list[str]:
    """The table of erased models but for the columns ``left_out``, as parts of a Markdown file: what is shown, cost."""
    if not len(models):
        return []
    keys = [column for column in ("concept", "eraser", "pruning", "settings", "seed") if column in models]
    cost = [column for column in _COSTS if column in models]
    shown = [column for column in models if column not in {*keys, *cost, *left_out}]
    return [
        "## Erased models",
        *(markdown_table(part, disable_numparse=True) for part in narrow(models[[*keys, *shown]], keys)),
        "Shown: share of prompts whose picture shows the concept, without attack and then under each, with 95 % "
        "intervals; retained quality on other prompts.",
        "## What erasing cost",
        *(markdown_table(part, disable_numparse=True) for part in narrow(models[[*keys, *cost]], keys)),
        "Peak memory: the largest resident set of the process meanwhile (libraries and model included); edit: the size "
        "of what is stored of it.",
    ]


def _measures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the evaluators say of the edited model, by a reader's name."""
    measures = summary["measures"].items()
    return {name.replace("_", " "): value for name, value in measures if not name.endswith(("_base", "_n"))}


def _spread(values: Sequence[Any]) -> str:
    """Mean, standard deviation, lowest and highest of one measure of several runs, rates in percent."""
    if isinstance(values[0], Mapping) and "rate" in values[0]:
        numbers, form = [100 * value["rate"] for value in values], "{:.1f} %"
    else:
        numbers, form = [value["mean"] if isinstance(value, Mapping) else value for value in values], "{:.2f}"
    mean, lowest, highest = fmean(numbers), min(numbers), max(numbers)
    return f"{form.format(mean)} ± {stdev(numbers):.2f} ({lowest:.4g} - {highest:.4g})"


def _numbers(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {name if key in {"rate", "mean"} else f"{name}_{key}": number for key, number in value.items()}
