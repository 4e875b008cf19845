"""The numbers of an exported model as Hugging Face reads them: a YAML file a measurement in ``.eval_results``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from diffusion.files import write_atomically
from diffusion.text_files import visible
from evaluation.statistics import Rate

FOLDER = ".eval_results"

OWNER = "robust-concept-erasing"
"""Before the name of a prompt set that lies in no dataset of the Hub."""


def write_eval_results(summaries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the rate of plain prompts, and that under the attack of each run.

    Args:
        summaries: Of runs with one erased model, the exported one first.
        folder: That of the model.
    """
    results = folder / FOLDER
    results.mkdir()
    named = {"plain_prompts": _entry(summaries[0], "erased", "plain_prompts")}
    for summary in summaries:
        attack = str(summary["choices"].get("attack", "attack"))
        if attack != "none":
            name = attack if attack not in named else f"{attack}_{summary['run']}"
            named[name] = _entry(summary, "attacked", attack)
    for name, entry in named.items():
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=False)
        write_atomically(results / f"{name}.yaml", content)


def dataset_of(summary: Mapping[str, Any]) -> str:
    """The dataset of a run's prompts as ``owner/name``: the Hub's, or one of :data:`OWNER` that is not there."""
    source = summary["config"].get("prompt_set", {}).get("source", {})
    name = str(source.get("name", ""))
    return name if name.count("/") == 1 else f"{OWNER}/{visible(summary['concept']).replace(' ', '_')}"


def _entry(summary: Mapping[str, Any], rate: str, task: str) -> EvalResultEntry:
    judge = summary["choices"].get("judge") or summary["config"]["judge"]["_target_"].rpartition(".")[2]
    measured = Rate(**summary["rates"][rate])
    return EvalResultEntry(
        dataset_id=dataset_of(summary),
        task_id=task,
        value=round(100 * measured.rate, 2),
        date=summary.get("created"),
        notes=f"% of prompts whose picture shows {visible(summary['concept'])}, less is better: {measured}, Wilson "
        f"95 %; judge {judge}, seed {summary['seed']}, run {summary['run']}",
    )
