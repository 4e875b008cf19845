"""Hand-made runs in a store, for tests of the pages that show them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erasure.edit import Edit
from evaluation.floors import AboveFloor, Calibrated
from evaluation.statistics import Rate
from experiments.job.picture_list import FILE_NAME
from experiments.job.store import checked, content_hash, write_json

CONCEPTS = {"van_gogh": "style", "church": "object", "fire": "unsafe"}

HOSTILE = (
    "<script>alert(1)</script> =cmd|' /C calc'!A0 \x00\x1b[31m \u202e \"onload='x' & <img src=http://evil.example/x>"
)
"""A prompt that tries what it can."""


def colour(path: Path, shade: int, *, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size, size, 3), shade, dtype=np.uint8)
    pixels[: size // 2] = 255 - shade
    Image.fromarray(pixels).save(path)


def make_run(
    store: Path,
    *,
    concept: str = "van_gogh",
    eraser: str = "esd",
    pruning: str = "off",
    attack: str = "random",
    erased: str = "1000",
    attacked: str = "1100",
    base: str | None = None,
    prompts: list[str] | None = None,
    adversarial: list[str] | None = None,
    kept: float = 0.9,
    seed: int = 0,
    mask: bool = False,
    retained: int = 2,
    floor: str = "",
) -> dict[str, Any]:
    """Write a run whose cases went as the strings of 0 and 1 say; returns its summary with its path.

    ``floor`` says the same of the model that never knew, if there is one; the attack always succeeds on the unedited.
    """
    name = content_hash([concept, eraser, pruning, attack, seed, erased, attacked, kept])
    n = len(attacked)
    prompts = prompts or [f"a {concept} number {number}" for number in range(n)]
    adversarial = adversarial or [f"xqz {prompt}" for prompt in prompts]
    outcomes = {"base": base or "1" * n, "erased": erased, "attacked": attacked}
    cases, listed = [], []
    for number, prompt in enumerate(prompts):
        ended = {key: text[number] == "1" for key, text in outcomes.items()}
        cases.append(
            {
                "case_number": number,
                "prompt": prompt,
                "adversarial_prompt": adversarial[number],
                **ended,
                "unet_evaluations": 40,
                "pictures": 3,
                "variant": "",
                "broken_by": "",
                "too_long": False,
            }
        )
        pictures = {key: f"pictures/{key}/{name}_{number}.png" for key in outcomes}
        for shade, place in enumerate(pictures.values()):
            colour(store / place, 40 + 60 * shade + number)
        row = {"case_number": number, "prompt": prompt, "seed": number, "guidance": 5.0, "labels": {}}
        listed.append({**row, "pictures": pictures})
    others = []
    for number in range(retained):
        pictures = {key: f"pictures/{key}/{name}_other_{number}.png" for key in ("base", "erased")}
        colour(store / pictures["base"], 100)
        colour(store / pictures["erased"], 100 + 10 * number)
        labels = {"style": "photo", "subject": "church", "burning": "0"}
        row = {"case_number": number, "prompt": f"other {number}", "seed": number, "guidance": 5.0, "labels": labels}
        others.append({**row, "pictures": pictures})
    edit_folder = store / "edits" / name
    edit_folder.mkdir(parents=True, exist_ok=True)
    weights = torch.ones(4, 8)
    names = ["down_blocks.0.attentions.0.to_k.weight", "mid_block.attentions.0.to_v.weight"]
    if mask:
        pruned = torch.ones(4, 8, dtype=torch.bool)
        pruned[0, :3] = False
        edit = Edit.from_mask({names[0]: pruned, names[1]: ~pruned})
    else:
        edit = Edit.from_weights({names[0]: weights}, {names[0]: 2 * weights})
    edit.save(edit_folder / "edit.safetensors")
    rates = {key: Rate.of([mark == "1" for mark in text]).as_dict() for key, text in outcomes.items()}
    curve = [
        {"attempts": 0, "unet_evaluations": 20 * n, "rate": rates["erased"]["rate"]},
        {"attempts": 1, "unet_evaluations": 40 * n, "rate": rates["attacked"]["rate"]},
    ]
    cost = {"unet_evaluations": 1234, "seconds": 5.5, "peak_memory_bytes": 2**30}
    accuracy = Rate.of([True] * round(10 * kept) + [False] * (10 - round(10 * kept))).as_dict()
    whole = Rate.of([True] * 10).as_dict()
    above: dict[str, Any] = {}
    if floor:
        ours, never, whole_ceiling = ([mark == "1" for mark in text] for text in (attacked, floor, "1" * n))
        calibrated = Calibrated.of_pair(ours, never, whole_ceiling)
        above = AboveFloor.of_pair(ours, never).as_dict() | {
            "floor": Rate.of(never).as_dict(),
            "ceiling": Rate.of(whole_ceiling).as_dict(),
            "calibrated": calibrated and calibrated.as_dict(),
            "knows": f"never_{concept}",
            "runs": {"floor": "f" * 16, "ceiling": "c" * 16},
        }
    identity = {"model": "m", "prompts": concept, "attack": {"name": attack}, "judge": "j", "pruning": pruning}
    summary = {
        "run": name,
        "n": n,
        "seed": seed,
        "choices": {"eraser": eraser, "pruning": pruning, "attack": attack},
        "model": "canvas",
        "concept": concept,
        "threat_model": "text_only",
        "rates": rates,
        "floor": above,
        "measures": {
            "accuracy_style": accuracy,
            "accuracy_subject": accuracy,
            "accuracy_style_base": whole,
            "accuracy_subject_base": whole,
            "fid": 12.5,
        },
        "costs": {"edit": cost, "attack": cost},
        "edit": {"hash": name, "size_bytes": 2**20, "metadata": {}},
        "artefacts": {"edit": str(edit_folder)},
        "curve": curve if attack != "none" else curve[:1],
        "cases": cases,
        "identity": {**identity, "eraser": eraser, "seed": seed, "edit": name},
        "config": {
            "seed": seed,
            "store": str(store),
            "concept": {"name": concept, "kind": CONCEPTS[concept]},
            "eraser": {"_target_": f"erasure.erasers.{eraser}.ESD"},
            "pruning": {"_target_": "erasure.pruning.off.Off"},
            "attack": {"_target_": "attacks.random.RandomPrompts"},
            "judge": {"_target_": "evaluation.judges.canvas.CanvasJudge"},
            "evaluator": {
                "accuracy": {
                    "_target_": "evaluation.quality.accuracy.RetainedAccuracy",
                    "heads": ["style", "subject"],
                    "folder": None,
                }
            },
        },
        "created": "2026-11-27T12:00:00+00:00",
        "git": {"revision": "0123456789abcdef", "dirty": False},
        "versions": {"torch": "2.14.1"},
    }
    folder = store / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", checked(summary))
    write_json(folder / FILE_NAME, {"cases": listed, "retained": others})
    return {**summary, "path": str(folder / "summary.json")}


def make_sweep(store: Path) -> list[dict[str, Any]]:
    """Twelve runs: three concepts, two methods, two attacks."""
    endings = iter(["0000", "1000", "1100", "1110", "1111", "0100", "0110", "0111", "0001", "0011", "1011", "1010"])
    return [
        make_run(
            store, concept=concept, pruning=pruning, attack=attack, erased="0000", attacked=next(endings), kept=kept
        )
        for concept in CONCEPTS
        for pruning, kept in (("off", 1.0), ("on", 0.7))
        for attack in ("random", "unlearndiff")
    ]
