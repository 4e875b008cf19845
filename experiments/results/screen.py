"""What a job and a sweep show on the screen when they end."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attacks.shell import ENERGY, RESIDUAL
from diffusion.files import replacing
from diffusion.text_files import visible
from evaluation.statistics import Mean, PairedComparison, Rate
from experiments.job.job import Finished
from experiments.job.origin import machines, revisions
from experiments.job.result import Summary, warnings_of
from experiments.job.summary import compare, pruning_pairs
from experiments.results import grid
from experiments.results.floors import floor_table, floor_texts, trainings_table
from experiments.results.published import published_numbers

SHOWN_PROMPTS = 8
"""Prompts found by an attack; the file of prompts has all."""

DOUBT = " (!)"
"""Marks a run that supports no claim."""

RATES = {"base": "base model", "erased": "erased", "attacked": "under attack"}


def show_job(finished: Finished) -> None:
    """Draw a job's grid; print its table, the first prompts that the attack found, and where its files are."""
    summary = finished.summary
    base_present = [case.base for case in summary.cases]
    drawn = grid.draw(finished.rows, finished.base, finished.erased, finished.outcomes, base_present)
    with replacing(finished.grid) as partial:
        drawn.save(partial)
    console = open_console()
    table = Table(title=title(summary.as_dict()), title_justify="left")
    table.add_column("")
    table.add_column("value")
    table.add_column("base model")
    _add_rates(table, summary)
    table.add_section()
    for name, value in summary.measures.items():
        if not name.endswith(("_base", "_n")):
            base = summary.measures.get(f"{name}_base")
            table.add_row(f"retained {name.replace('_', ' ')}", measure_text(value), measure_text(base))
    table.add_section()
    for stage, cost in summary.costs.items():
        memory = f"{cost.peak_memory_bytes / 2**30:.1f} GiB"
        table.add_row(f"cost: {stage}", f"{cost.unet_evaluations:,} U-Net evaluations, {cost.seconds:.1f} s, {memory}")
        if cost.unet_gradients or cost.text_encodings:
            table.add_row("", f"{cost.unet_gradients:,} U-Net gradients, {cost.text_encodings:,} texts encoded")
    table.add_row("edit", f"{summary.edit['size_bytes'] / 2**20:.2f} MiB")
    console.print(table)
    found = [case.adversarial_prompt for case in summary.cases if case.attacked and not case.erased]
    published = published_numbers(summary.as_dict())
    lines = [f"published: {number.metric} {number} in {number.source}" for number in published]
    for line in [*(f"warning: {sentence}" for sentence in summary.warnings), *lines]:
        console.print(line, soft_wrap=True)
    files = [*(("summary", path) for path in finished.paths)]
    files += [("prompts", finished.prompts), ("pictures", finished.grid)]
    for label, text in [*(("found", prompt) for prompt in found[:SHOWN_PROMPTS]), *files]:
        # Prompts and paths stay whole and plain, so that they can be copied.
        console.print(visible(f"{label}: {text}"), soft_wrap=True)


def _add_rates(table: Table, summary: Summary) -> None:
    for name, label in RATES.items():
        table.add_row(visible(f"{summary.concept} shown, {label}"), str(summary.rates[name]), "")
    for kind in summary.sets:
        if told := set_text(summary.sets[kind]):
            table.add_row({"prompts": "prompts", "retained": "retained prompts"}[kind], told, "")
    for row in floor_texts(summary.as_dict()).items():
        table.add_row(*row, "")
    for row in protocol_texts(summary.as_dict()).items():
        table.add_row(*row, "")
    for row in [*holding_texts(summary.as_dict()).items(), *noise_texts(summary.as_dict()).items()]:
        table.add_row(*row, "")
    for name, rate in summary.members.items():
        table.add_row(f"broken by {name}", str(rate), "")
    for label in sorted({label for counts in summary.labels.values() for label in counts}):
        shown = {name: summary.labels[name].get(label, {}).get("pictures", 0) for name in RATES}
        values = f"erased {shown['erased']}, under attack {shown['attacked']}"
        table.add_row(f"pictures with {label}", values, str(shown["base"]))
    if summary.unpruned:
        comparison = PairedComparison(**summary.unpruned["attacked"])
        table.add_row("under attack, against pruning=off", str(comparison), "")


def show_sweep(summaries: Sequence[Mapping[str, Any]], pictures: Sequence[Path]) -> None:
    """Print one table of all runs of a sweep, and pruning on against off where both are there."""
    console = open_console()
    measures = [name for name in _measure_names(summaries) if not name.endswith(("_base", "_n"))]
    table = Table(title="All runs: share of prompts whose picture shows the concept", title_justify="left")
    for heading in ("concept", "eraser", "pruning", "attack", "base", "erased", "under attack", *measures, "run"):
        table.add_column(heading.replace("_", " "))
    for summary in summaries:
        choices, rates = summary["choices"], summary["rates"]
        table.add_row(
            visible(summary["concept"]),
            *(str(choices.get(group, "")) for group in ("eraser", "pruning", "attack")),
            *(f"{100 * rates[name]['rate']:.0f} %{doubt(summary) if name == 'base' else ''}" for name in RATES),
            *(short_text(summary["measures"].get(name)) for name in measures),
            summary["run"],
        )
    console.print(table)
    _print_floors(summaries, console)
    for pruned, unpruned in pruning_pairs(summaries):
        for rate, label in (("erased", "without attack"), ("attacked", "under attack")):
            comparison = PairedComparison(**compare(pruned, unpruned)[rate])
            pruning = pruned["choices"]["pruning"]
            console.print(f"{title(pruned)}, {label}: pruning={pruning} minus pruning=off {comparison}", soft_wrap=True)
    for sentence in doubts(summaries):
        console.print(sentence, soft_wrap=True)
    for sentence in mixtures(summaries):
        console.print(sentence, soft_wrap=True)
    for path in pictures:
        console.print(visible(f"pictures: {path}"), soft_wrap=True)


def _print_floors(summaries: Sequence[Mapping[str, Any]], console: Console) -> None:
    for heading, rows in (("Above the floor", floor_table(summaries)), ("Over trainings", trainings_table(summaries))):
        if len(rows):
            table = Table(*rows.columns, title=heading, title_justify="left")
            for row in rows.itertuples(index=False):
                table.add_row(*(visible(str(cell)) for cell in row))
            console.print(table)


def mixtures(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each way in which runs, or the artefacts that they stand on, are not alike made."""
    origins = _origins(summaries)
    sentences = []
    if len(found := machines(origins)) > 1:
        sentences.append(
            "These runs mix machines or numbers of threads, whose sums differ in their last digits, which training and "
            f"attacks make larger: {'; '.join(found)}."
        )
    if len(found := revisions(origins)) > 1:
        sentences.append(f"These runs mix revisions of the code: {', '.join(found)}.")
    return sentences


def made_sentence(summaries: Sequence[Mapping[str, Any]]) -> str:
    """By which code, on what and with which seeds runs, and the artefacts that they stand on, were made."""
    origins = _origins(summaries)
    seeds = ", ".join(map(str, sorted({summary["seed"] for summary in summaries})))
    return f"Made at revision {', '.join(revisions(origins))} on {'; '.join(machines(origins))}; seeds {seeds}."


def _origins(summaries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        origin
        for summary in summaries
        for origin in [summary, *(made for stage in summary.get("origins", {}).values() for made in stage)]
        if origin
    ]


def doubt(summary: Mapping[str, Any]) -> str:
    """What stands behind the base model's rate in tables where a run supports no claim."""
    return DOUBT if warnings_of(summary) else ""


def doubts(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """For the runs that support no claim, which they are and why."""
    return [f"{DOUBT.strip()} {summary['run']}: {text}" for summary in summaries for text in warnings_of(summary)]


def title(summary: Mapping[str, Any]) -> str:
    """A run's choices in one line."""
    groups = [
        f"{group}={summary['choices'][group]}"
        for group in ("eraser", "pruning", "attack")
        if group in summary["choices"]
    ]
    return visible(" ".join([summary["concept"], *groups, f"seed={summary['seed']}"]))


def set_text(counts: Mapping[str, int]) -> str:
    """What a reader must know of a prompt set, from its :class:`~experiments.job.prompts.PromptCounts`; else empty."""
    taken = counts["taken"]
    parts = [
        (f"{taken} of {counts['asked']} asked for", taken < counts["asked"]),
        (f"{counts['distinct']} of {taken} distinct", counts["distinct"] < taken),
        (f"{counts['cut']} cut at the text encoder's length", counts["cut"]),
        (f"{counts['cut_by_attack']} cut under attack", counts["cut_by_attack"]),
        (f"{counts['other_size']} drawn in another size", counts["other_size"]),
        (f"{counts['below_guidance']} without guidance", counts["below_guidance"]),
    ]
    return ", ".join(text for text, told in parts if told)


def protocol_texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """A run's protocol and its attack success rate by the protocol's rule; empty under our own rules."""
    protocol = summary.get("protocol")
    if not protocol or (protocol["name"], protocol["counting"], protocol["too_long"]) == ("none", "all", 0):
        return {}
    too_long = f", {protocol['too_long']} prompts too long" if protocol["too_long"] else ""
    return {
        "protocol": f"{protocol['name']}, counting {protocol['counting']}{too_long}",
        "success by protocol": measure_text(protocol["success"]) or "no prompt counts",
    }


def holding_texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Whether the texts that an attack found hold with new seeds and before a second judge; empty if not tried."""
    holds = summary.get("holds")
    if not holds or not holds["successes"]:
        return {}
    if not holds["texts"]:
        return {"holds on new seeds": f"no text among {holds['successes']} successes"}
    texts = {}
    if holds["shown"]:
        seeds = f"{holds['seeds']} new seed{'s' * (holds['seeds'] > 1)}"
        texts[f"holds on {seeds}"] = f"{_percent(holds['shown'])} of the pictures of {holds['texts']} texts found"
    if second := holds.get("second_judge"):
        again = f", {_percent(second['shown'])} with new seeds" if second["shown"] else ""
        texts["seen by a second judge"] = f"{Rate(**second['found'])} as found{again}"
    return texts


def noise_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Of attacks that choose the noise, over the prompts attacked; empty for others.

    ``noise_distance`` is the mean energy distance (see :mod:`attacks.shell`) and ``noise_distance_most`` the largest,
    signs left out, ``noise_outside`` how many count for nothing as their noise is none, and ``inversion_residual`` the
    largest residual.
    """
    measured = [case for case in summary["cases"] if ENERGY in case.get("measured", {})]
    if not measured:
        return {}
    distances = [abs(case["measured"][ENERGY]) for case in measured]
    residuals = [case["measured"][RESIDUAL] for case in measured if RESIDUAL in case["measured"]]
    return {
        "noise_of": len(measured),
        "noise_distance": sum(distances) / len(distances),
        "noise_distance_most": max(distances),
        "noise_outside": sum(not case["counts"] for case in measured),
        **({"inversion_residual": max(residuals)} if residuals else {}),
    }


def noise_texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The same in words."""
    numbers = noise_numbers(summary)
    if not numbers:
        return {}
    found = f"{numbers['noise_distance']:.1f} sd of its energy, {numbers['noise_distance_most']:.1f} at most"
    texts = {"distance of the noise from Gaussian noise": found}
    if numbers["noise_outside"]:
        texts["not counted, as the noise is none"] = f"{numbers['noise_outside']} of {numbers['noise_of']}"
    if "inversion_residual" in numbers:
        texts["largest residual of the inversion"] = f"{numbers['inversion_residual']:.2g}"
    return texts


def _percent(mean: Mapping[str, float]) -> str:
    return f"{100 * mean['mean']:.0f} % [{100 * mean['low']:.0f}, {100 * mean['high']:.0f}]"


def measure_text(value: float | Mapping[str, float] | None) -> str:
    """A measure with its interval, as text."""
    match value:
        case None:
            return ""
        case {"rate": _}:
            return str(Rate(**value))  # type: ignore[arg-type]
        case {"mean": _}:
            return str(Mean(**value))  # type: ignore[arg-type]
        case Mapping():
            return ", ".join(f"{key} {number:.4g}" for key, number in value.items())
        case _:
            return f"{value:.4g}"


def short_text(value: float | Mapping[str, float] | None) -> str:
    """A measure without its interval, as text."""
    match value:
        case {"rate": float(rate)}:
            return f"{100 * rate:.0f} %"
        case {"mean": float(mean)}:
            return f"{mean:.2f}"
        case _:
            return measure_text(value)


def _measure_names(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for summary in summaries for name in summary["measures"]))


def open_console() -> Console:
    """Where tables are printed; wide where there is no terminal, as there is no width to respect."""
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    return Console(**options) if sys.stdout.isatty() else Console(width=160, **options)


def size_text(size: float) -> str:
    """Bytes in words.

    >>> size_text(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], heading: str) -> Table:
    """A table whose columns but the first are numbers."""
    table = Table(title=visible(heading), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
