"""Numbers of an exported model in Hugging Face's form: a file a measurement."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from evaluation.statistics import Rate
from experiments.results.eval_results import dataset_of, write_eval_results


def run(name: str, attack: str, attacked: list[bool], **config: Any) -> dict[str, Any]:
    return {
        **{"run": name, "seed": 3, "concept": "church", "created": "2026-11-27T21:11:10+00:00"},
        "choices": {"attack": attack, "judge": "canvas"},
        "config": config,
        "rates": {"erased": Rate.of([False] * 4).as_dict(), "attacked": Rate.of(attacked).as_dict()},
    }


def test_every_attack_has_a_file_and_none_hides_another(tmp_path: Path) -> None:
    half, all_of_them = [True, True, False, False], [True] * 4
    write_eval_results([run("a", "none", half), run("b", "p4d", half), run("c", "p4d", all_of_them)], tmp_path)
    found = {}
    for path in (tmp_path / ".eval_results").iterdir():
        (found[path.name],) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert {name: (entry.task_id, entry.value) for name, entry in found.items()} == {
        "plain_prompts.yaml": ("plain_prompts", 0.0),
        "p4d.yaml": ("p4d", 50.0),
        "p4d_c.yaml": ("p4d", 100.0),
    }
    assert "50.0 % [15.0, 85.0] (2/4), Wilson 95 %; judge canvas, seed 3, run b" in found["p4d.yaml"].notes
    assert found["p4d.yaml"].date == "2026-11-27T21:11:10+00:00"


@pytest.mark.parametrize(
    ("source", "dataset"),
    [
        ({"name": "AIML-TUDA/i2p"}, "AIML-TUDA/i2p"),
        ({"path": "church.csv"}, "robust-concept-erasing/church"),
        ({}, "robust-concept-erasing/church"),
    ],
)
def test_prompts_of_the_hub_are_named_as_there(source: dict[str, str], dataset: str) -> None:
    assert dataset_of(run("a", "none", [True], prompt_set={"source": source})) == dataset
