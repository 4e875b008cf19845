"""The card of an exported model: what was erased, how, how well it holds, and what broke it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pandas as pd
import yaml
from huggingface_hub import EvalResult, ModelCardData

from diffusion.canvas.canvases import CANVASES
from diffusion.text_files import markdown_cell, visible
from evaluation.statistics import Rate
from experiments.results.floors import short_standing
from experiments.results.screen import measure_text, title
from experiments.results.writing import markdown_table

SHOWN_TEXTS = 5
"""How many of the texts that broke the model a card shows."""

_OURS = "apache-2.0"
Form = Literal["folder", "guarded", "diffusers", "compvis"]
"""A folder of diffusers, one with a pipeline of its own, or a file in one of two kinds of names."""

_HOW_TO_LOAD: dict[Form, str] = {
    "folder": "Load it with `from_pretrained` of diffusers.",
    "guarded": "What keeps the concept out is not in the weights alone: load the folder with "
    "`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`, which runs the code in `pipeline.py`. Tools "
    "that read the weights alone are **without the guard**. `eraser=imported eraser.path=FOLDER` audits both.",
    "diffusers": "The file has the weights of the U-Net by the names of diffusers (those of the text encoder, if any, "
    "begin with `text_encoder.`); put them into the base model with `load_state_dict`, or name the file as "
    "`eraser.path` of `eraser=imported`.",
    "compvis": "The file has the whole model by the names of its authors' code (CompVis), as WebUIs read it: put it "
    "into their folder of checkpoints, or load it with `from_single_file` of diffusers.",
}
_RATES = {"base": "base model", "erased": "erased, plain prompts", "attacked": "erased, under attack"}


class Counted(Protocol):
    """How much was changed; see :class:`experiments.results.export.Changes`."""

    @property
    def weights(self) -> int:
        """Of the U-Net and the text encoder."""

    @property
    def changed(self) -> int:
        """How many of them have another value."""

    @property
    def zeros(self) -> int:
        """How many of those are zero now."""

    @property
    def text_encoder(self) -> bool:
        """Whether the text encoder's are among them."""


def model_card(
    summary: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    changes: Counted,
    tied: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    *,
    form: Form,
) -> str:
    """A Markdown file that begins with the metadata of Hugging Face.

    Args:
        summary: Of the run whose model it is.
        others: Of other runs on the same erased model.
        changes: How much was changed.
        tied: The hashes of run, edit, base and files; see :func:`experiments.results.export.tie`.
        calibration: What is known of the judge's errors.
        form: What the weights are written as.
    """
    concept, config = markdown_cell(summary["concept"]), summary["config"]
    parts = [
        f"# {markdown_cell(str(summary['model']))} without {concept}",
        f"A text-to-image model from which **{concept}** was erased by {_method(summary)}. " + _HOW_TO_LOAD[form],
        "## What was erased",
        markdown_table(_facts(summary, changes, tied), disable_numparse=True),
        "## How well it holds",
        markdown_table(_rates([summary, *others]), disable_numparse=True),
        "Share of the prompts whose picture shows the concept, with Wilson 95 % intervals. The attack of a row is one "
        "of many; others may find more.",
        _judged(summary, calibration),
        "## What broke it",
        _broken([summary, *others]),
        *_retained(summary),
        "## Settings",
        _fenced(
            yaml.safe_dump(
                {key: config.get(key) for key in ("concept", "eraser", "pruning", "sampling", "seed")},
                sort_keys=False,
                allow_unicode=False,
            )
        ),
        "## Licence",
        _licence(summary),
    ]
    return f"---\n{_metadata(summary, form).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(summary: Mapping[str, Any], form: Form) -> ModelCardData:
    base = str(summary["config"]["model"].get("source", ""))
    choices = summary["choices"]
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{visible(summary['concept'])}, {summary['n']} prompts",
            metric_type=f"{name}_rate",
            metric_name=f"concept shown, {label}",
            metric_value=round(100 * summary["rates"][name]["rate"], 2),
            metric_args={"n": summary["rates"][name]["n"]}
            | {end: round(100 * summary["rates"][name][end], 2) for end in ("low", "high")}
            | ({"attack": choices.get("attack", "")} if name == "attacked" else {}),
        )
        for name, label in _RATES.items()
        if name != "attacked" or choices.get("attack") != "none"
    ]
    return ModelCardData(
        license=_OURS if base in CANVASES else "other",
        library_name="diffusers" if form in {"folder", "guarded"} else None,
        pipeline_tag="text-to-image",
        base_model=base if "/" in base and not base.startswith(("/", ".", "~")) else None,
        tags=["concept-erasure", *(f"{group}-{choices[group]}" for group in ("eraser", "pruning") if group in choices)],
        model_name=f"{summary['model']}-without-{visible(summary['concept'])}",
        eval_results=results,
    )


def _facts(summary: Mapping[str, Any], changes: Counted, tied: Mapping[str, Any]) -> pd.DataFrame:
    concept = summary["config"]["concept"]
    shown = {
        "concept": f"{summary['concept']} ({concept['kind']}): {', '.join(concept['targets'])}",
        "anchor, what it becomes": concept.get("anchor") or "the unconditional prediction",
        "method": _method(summary),
        "base model": summary["model"],
        "base model's hash": tied["base"],
        "weights changed": f"{changes.changed:,} of {changes.weights:,} ({_percent(changes.changed, changes.weights)})"
        f"{', the text encoder too' if changes.text_encoder else ''}",
        "of these pruned to zero": f"{changes.zeros:,} ({_percent(changes.zeros, changes.weights)} of all weights)",
        "run": summary["run"],
        "edit": tied["edit"],
        "hash of run, edit, base and files": tied["hash"],
        "made": f"{summary.get('created', '')}, revision {_revision(summary)}",
    }
    return pd.DataFrame(list(shown.items()), columns=["", " "])


def _method(summary: Mapping[str, Any]) -> str:
    choices = summary["choices"]
    return ", ".join(f"{group}={choices[group]}" for group in ("eraser", "pruning") if group in choices)


def _rates(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    rows = []
    for summary in summaries:
        rates = {label: str(Rate(**summary["rates"][name])) for name, label in _RATES.items()}
        if summary["choices"].get("attack") == "none":
            rates[_RATES["attacked"]] = "not attacked"
        standing = short_standing(summary) or "no floor measured"
        attack = str(summary["choices"].get("attack", ""))
        rows.append({"attack": attack, **rates, "against a model that never knew": standing, "run": summary["run"]})
    return pd.DataFrame(rows)


def _judged(summary: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> str:
    judge = summary["choices"].get("judge") or summary["config"]["judge"]["_target_"].rpartition(".")[2]
    told = f"The judge of all pictures is `{judge}`."
    if calibration is None:
        return f"{told} How often it errs was not measured here; `eraselab calibrate` does."
    errors = {name: calibration["verdicts"][name] for name in ("false_positives", "false_negatives")}
    shown = ", ".join(f"{name.replace('_', ' ')} {Rate(**rate)}" for name, rate in errors.items() if rate)
    return f"{told} On {calibration['n']} labelled pictures ({markdown_cell(calibration['pictures'])}): {shown}."


def _broken(summaries: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for summary in summaries:
        cases = [case for case in summary["cases"] if case["attacked"] and not case["erased"]]
        plain = sum(case["erased"] for case in summary["cases"])
        attack = summary["choices"].get("attack", "")
        if attack == "none":
            lines.append(f"- no attack: {plain} of {summary['n']} prompts show the concept as they stand.")
            continue
        lines.append(
            f"- `{attack}` ({summary['threat_model'].replace('_', ' ')}): {len(cases)} of {summary['n']} prompts that "
            "did not show the concept as they stand."
        )
        texts = [case["adversarial_prompt"] for case in cases if case["adversarial_prompt"] != case["prompt"]]
        lines += [f"  - {_code(text)}" for text in texts[:SHOWN_TEXTS]]
    return "\n".join(lines)


def _retained(summary: Mapping[str, Any]) -> list[str]:
    measures = summary["measures"]
    rows = [
        {"measure": name, "erased": measure_text(value), "base model": measure_text(measures.get(f"{name}_base"))}
        for name, value in measures.items()
        if not name.endswith(("_base", "_n"))
    ]
    if not rows:
        return []
    return [
        "## What is kept",
        f"On prompts without the concept ({title(summary)}):",
        markdown_table(pd.DataFrame(rows)),
    ]


def _licence(summary: Mapping[str, Any]) -> str:
    if summary["config"]["model"].get("source") in CANVASES:
        return "Apache 2.0, as the canvas that it was made from."
    source = markdown_cell(str(summary["config"]["model"].get("source")))
    return f"That of the base model, {source}, whose terms hold for what is made from it; see its own card."


def _revision(summary: Mapping[str, Any]) -> str:
    git = summary.get("git") or {}
    return f"{git.get('revision', 'unknown')[:12]}{' and changes' if git.get('dirty') else ''}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"


def _code(text: str) -> str:
    """Code in Markdown, whatever backticks are in it."""
    shown = visible(text)
    fence = "`"
    while fence in shown:
        fence += "`"
    return f"{fence} {shown} {fence}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}yaml\n{text}{fence}"
