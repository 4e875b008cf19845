"""Command lines drawn over every group and field, right and wrong: one sentence or a plan, never a traceback.

A line is drawn from its number, so ``pytest -m slow tests/test_command_lines.py -k line-17`` types line 17 again. What
is surely wrong in it, if anything, must be refused, and named.
"""

import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments import CONFIG_FOLDER
from experiments.command.composing import plain_job
from experiments.command.run import command_line
from experiments.command.shorthands import spell_out
from experiments.fit import fitted

LINES = 500

GROUPS = ("concept", "eraser", "pruning", "attack", "evaluator", "judge", "protocol", "prompt_set", "retained_set")
MODELS = ("canvas", "canvas", "folder", "sd14", "sdxl")

NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "true", "no", "abc", "[1]", "{a: 1}", "null5", "'1'x", "--3", "1,", "日本")
"""What no field with a number takes."""

ODD_NUMBERS = ("0", "-1", "1", "0.5", "2", "1e-30", "1e30", "99999999999999999999", "1e9", "0.0", "-0.0", "7")
"""What a field with a number takes or not."""

ODD_VALUES = ("", "null", "[]", "{}", "''", "a=b", "~", "/nope", "é(1)", "a b", "[a,b]", "${seed}", "${nope}", "#", "&")
"""What a field of any kind takes or not."""

NO_OVERRIDES = ("=", "seed", "seed==", "=3", "eraser.", ".steps=3", "+", "a=[", "b={", "'", "seed=[1", "eraser={")

Leaf = tuple[str, Any]


@cache
def leaves(choices: tuple[str, ...]) -> list[Leaf]:
    """The fields of the job that the ``choices`` compose, with their values; none if they do not compose."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("config", spell_out(choices), return_hydra_config=True)
    return list(_leaves(fitted(plain_job(config)[0])))


def _leaves(node: Any, path: str = "") -> Iterator[Leaf]:
    if isinstance(node, (Mapping, DictConfig)) and node:
        for key, value in node.items():
            if str(key) not in {"_target_", "hydra", "taken", "dry_run", "store", "tracker"}:
                yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, node


def files_of(group: str) -> list[str]:
    """The choices of a group, those in folders too."""
    folder = CONFIG_FOLDER / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def draw_line(number: int) -> tuple[list[str], list[str]]:
    """Line ``number``, and those of its words that are surely wrong."""
    draw = random.Random(number)
    groups = draw.sample(GROUPS, draw.choice((0, 1, 1, 2, 3)))
    choices = [f"{group}={draw.choice(files_of(group))}" for group in groups]
    if draw.random() < 0.25:
        choices.append(f"model={draw.choice(MODELS)}")
    line, wrong = list(choices), []
    try:
        known = leaves(tuple(choices))
    except Exception:
        known = leaves(())
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        path, value = draw.choice(known)
        number_field = isinstance(value, (int, float)) and not isinstance(value, bool)
        kind = draw.random()
        if kind < 0.35 and number_field:
            line.append(f"{path}={draw.choice(NO_NUMBERS)}")
            wrong.append(line[-1])
        elif kind < 0.6 and number_field:
            line.append(f"{path}={draw.choice(ODD_NUMBERS)}")
        elif kind < 0.7:
            line.append(f"{path}x={value}")
            wrong.append(line[-1])
        elif kind < 0.8:
            line.append(f"{draw.choice(('+', '~', '++'))}{path}={draw.choice(ODD_VALUES)}")
        else:
            line.append(f"{path}={draw.choice(ODD_VALUES)}")
    if draw.random() < 0.1:
        line.append(f"{draw.choice(GROUPS)}=nope")
        wrong.append(line[-1])
    if draw.random() < 0.08:
        line.append(draw.choice(NO_OVERRIDES))
        wrong.append(line[-1])
    draw.shuffle(line)
    # Of what is said twice the last word counts, so the wrong one may be passed over.
    paths = [word.lstrip("+~").partition("=")[0] for word in line]
    return line, wrong if len(set(paths)) == len(paths) else []


def typed(words: Sequence[str], folder: Path) -> int | str | None:
    """What ``run.py`` exits with; whatever else it raises is a fault of the program."""
    run = [f"hydra.run.dir={folder / 'run'}", f"hydra.sweep.dir={folder / 'sweep'}", f"store={folder / 'store'}"]
    sys.argv = ["run.py", "dry_run=true", "tracker=off", *run, *words]
    try:
        command_line()
    except SystemExit as stopped:
        return stopped.code
    finally:
        GlobalHydra.instance().clear()
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(number, id=f"line-{number}") for number in range(LINES)])
def test_a_command_line_is_planned_or_refused_in_one_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line, wrong = draw_line(number)
    answer = typed(line, tmp_path)
    said = f"{' '.join(line)!r} gives {answer!r}"
    if answer in {0, None}:
        assert not wrong, said
        return
    assert isinstance(answer, str), said
    assert "\n" not in answer, said
    assert len(answer) < 1500, said
    assert "Traceback" not in answer, said
    if wrong:
        # What is wrong may be told second, but the sentence is about something that was typed.
        words = {part for word in line for part in re.split(r"[=.+~/]", word) if len(part) > 2}
        assert any(part in answer for part in words | set(line)), said
    assert not (tmp_path / "run").exists(), f"{said}, and leaves a folder"
