"""Runs of a store as a list, and two of them side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from diffusion.text_files import visible
from evaluation.statistics import PairedComparison, Rate
from experiments.job.summary import compare
from experiments.results.screen import RATES, measure_text

GROUPS = ("concept", "eraser", "pruning", "attack")

_MISSING = object()


def fitting(summaries: Sequence[dict[str, Any]], wanted: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, Any]]:
    """Those whose fields have one of the values that are wanted.

    Args:
        summaries: The runs.
        wanted: Fields, as :func:`field_of` knows them, each with its values as texts.

    Raises:
        ValueError: No run has such a field.
    """
    for field, _ in wanted:
        _require(summaries, field)
    return [
        summary
        for summary in summaries
        if all(not set(_texts(summary, field)).isdisjoint(values) for field, values in wanted)
    ]


def sorted_by(summaries: Sequence[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """The runs by a field, the smallest first and those without it last; by ``date`` the newest first.

    Raises:
        ValueError: No run has such a field.
    """
    if field == "date":
        return sorted(summaries, key=lambda summary: str(summary.get("created", "")), reverse=True)
    if field in RATES:
        return sorted(summaries, key=lambda summary: summary["rates"][field]["rate"])
    _require(summaries, field)

    def place(summary: Mapping[str, Any]) -> tuple[int, float, str]:
        value = field_of(summary, field)
        if isinstance(value, int | float):
            return 0, float(value), ""
        return (2, 0.0, "") if value is _MISSING else (1, 0.0, str(value))

    return sorted(summaries, key=place)


def field_of(summary: Mapping[str, Any], field: str) -> Any:
    """A run's choice of a group (``eraser``), or a field of its config (``eraser.steps``)."""
    if field in {"run", "concept", "model"}:
        return summary[field]
    if field in summary["choices"]:
        return summary["choices"][field]
    value: Any = summary["config"]
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def listed(summaries: Sequence[Mapping[str, Any]], heading: str) -> Table:
    """One row a run."""
    table = Table(title=heading, title_justify="left")
    for name in ("date", "run", *GROUPS):
        table.add_column(name)
    for label in RATES.values():
        table.add_column(label, justify="right")
    for summary in summaries:
        date = str(summary.get("created", "")).replace("T", " ")[:16]
        choices = [visible(str(field_of(summary, group))) for group in GROUPS]
        rates = [f"{100 * summary['rates'][name]['rate']:.0f} %" for name in RATES]
        if summary["choices"].get("attack") == "none":
            rates[-1] = "-"
        table.add_row(date, summary["run"], *choices, *rates)
    return table


def compared(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Table | str]:
    """Two runs side by side: how their configs differ, their numbers, and prompts compared one by one if they share."""
    differences = _differences(_flat(first["config"]), _flat(second["config"]))
    yield _two("What differs in the config", first, second, differences)
    numbers = {
        f"{label}": (str(Rate(**first["rates"][name])), str(Rate(**second["rates"][name])))
        for name, label in RATES.items()
    }
    for name in dict.fromkeys([*first["measures"], *second["measures"]]):
        numbers[f"retained {name.replace('_', ' ')}"] = (
            measure_text(first["measures"].get(name)),
            measure_text(second["measures"].get(name)),
        )
    numbers["U-Net evaluations"] = (_evaluations(first), _evaluations(second))
    yield _two("Numbers", first, second, numbers)
    if first["identity"]["prompts"] != second["identity"]["prompts"]:
        yield "The runs have other prompts or seeds, so that they cannot be compared prompt by prompt."
        return
    pairs = compare(first, second)
    for name in ("erased", "attacked"):
        told = PairedComparison(**pairs[name])
        yield f"{RATES[name]}, prompt by prompt: {first['run']} minus {second['run']} {told}"


def _two(
    heading: str, first: Mapping[str, Any], second: Mapping[str, Any], rows: Mapping[str, tuple[str, str]]
) -> Table:
    table = Table(title=heading, title_justify="left")
    for name in ("", first["run"], second["run"]):
        table.add_column(name)
    for name, values in rows.items():
        table.add_row(visible(name), *map(visible, values))
    return table


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys([*first, *second])
    return {
        name: (str(first.get(name, "-")), str(second.get(name, "-")))
        for name in names
        if first.get(name, _MISSING) != second.get(name, _MISSING)
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _evaluations(summary: Mapping[str, Any]) -> str:
    return f"{sum(cost['unet_evaluations'] for cost in summary['costs'].values()):,}"


def _texts(summary: Mapping[str, Any], field: str) -> list[str]:
    """What a filter may call the value of a field."""
    value = field_of(summary, field)
    if value is _MISSING:
        return []
    texts = [str(value), str(value).lower()]
    # A concept goes by its name and by that of its file; a choice with its preset also goes without.
    return [*texts, str(summary["choices"].get(field, value)), texts[0].partition(".")[0]] if field in GROUPS else texts


def _require(summaries: Sequence[Mapping[str, Any]], field: str) -> None:
    if summaries and all(field_of(summary, field) is _MISSING for summary in summaries):
        known = sorted({name for summary in summaries for name in summary["choices"] if "/" not in name})
        raise ValueError(
            f"{field} is no field of any run in the store; it must be one of {', '.join(known)}, or a field of the "
            "config such as eraser.steps."
        )
