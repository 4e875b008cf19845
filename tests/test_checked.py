import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
import torch
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import Field, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

import attacks
import diffusion
import erasure
import evaluation
import experiments
from diffusion.checked import checked
from experiments.command.config import make_object
from experiments.command.errors import CommandError, explain_validation
from experiments.command.shorthands import spell_out
from tests.night import nightly
from tests.test_run import judge_files, quality_files
from tests.tiny_job import CONFIG_FOLDER, make_job

NO_NUMBERS = [float("inf"), float("-inf"), float("nan"), "1e400", True, False]


@checked
class Inner:
    rate: float = 1.0


@checked
class Everything:
    whole: int = 1
    bounded: Annotated[float, Field(gt=0)] = 1.0
    absent: int | None = None
    named: Annotated[int, Field(ge=2)] | Literal["all"] = "all"
    pair: tuple[float, float] = (0.0, 1.0)
    listed: tuple[int, ...] = ()
    by_name: dict[str, float] = Field(default_factory=dict)
    inner: Inner = Field(default_factory=Inner)
    flag: bool = False
    flag_or_number: bool | int = False


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("field", ["whole", "bounded", "absent", "named", "pair", "listed", "by_name", "inner"])
def test_what_is_no_number_is_refused_in_every_kind_of_field(field: str, value: Any) -> None:
    wrapped = {"pair": [0, value], "listed": [value], "by_name": {"a": value}, "inner": {"rate": value}}
    with pytest.raises(ValidationError):
        Everything(**{field: wrapped.get(field, value)})


def test_numbers_and_flags_stay_what_they_are() -> None:
    made = Everything(2.0, 3, "4", 5, (1, 2.5), [3], {"a": 1}, {"rate": "2"}, True, 7)  # type: ignore[arg-type]
    assert made == Everything(2, 3.0, 4, 5, (1.0, 2.5), (3,), {"a": 1.0}, Inner(2.0), flag=True, flag_or_number=7)
    assert Everything(flag_or_number=True).flag_or_number is True


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"named": True}, "x.named is True; it must be an integer."),
        ({"absent": True}, "x.absent is True; it must be an integer."),
        ({"pair": [0, "nan"]}, "x.pair.1 is 'nan'; it must be a finite number."),
        ({"inner": {"rate": False}}, "x.inner.rate is False; it must be a number."),
    ],
)
def test_a_sentence_names_the_field(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Everything(**given)
    assert explain_validation(caught.value, "x") == sentence


def modules(package: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


@pytest.mark.parametrize("package", [attacks, diffusion, erasure, evaluation, experiments], ids=lambda p: p.__name__)
def test_every_dataclass_that_pydantic_checks_is_a_checked_one(package: ModuleType) -> None:
    own = {
        value
        for module in modules(package)
        for value in vars(module).values()
        if isinstance(value, type) and is_pydantic_dataclass(value) and value.__module__ == module.__name__
    }
    unchecked = [
        cls.__qualname__
        for cls in own
        if "allow_inf_nan" not in cls.__pydantic_config__  # type: ignore[attr-defined]
    ]
    assert own
    assert not unchecked, f"decorate {unchecked} with diffusion.checked.checked"


GROUPS = ("attack", "eraser", "evaluator", "judge", "prompt_set", "protocol", "pruning")
"""Groups whose files hold numbers."""


def choices(group: str) -> list[str]:
    """The names of a group's files, as ``artist/monet``."""
    paths = sorted((CONFIG_FOLDER / group).rglob("*.yaml"))
    return [path.relative_to(CONFIG_FOLDER / group).with_suffix("").as_posix() for path in paths]


def numeric_fields(node: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Where numbers stand in a plain config, as ``sparsity.fraction`` or ``betas[0]``."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numeric_fields(value, (*path, key))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from numeric_fields(value, (*path, str(place)))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield ".".join(path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What choices need that name files, by choice."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    torch.save({"weight": torch.ones(1)}, tmp_path / "erased.pt")
    (tmp_path / "found.csv").write_text("case_number,prompt,adversarial_prompt\n0,a church,a chapel\n")
    return {
        "list": [f"prompt_set.source.path={tmp_path / 'found.csv'}"],
        "ringabell": ["concept=nudity"],
        "imported": [f"eraser.path={tmp_path / 'erased.pt'}"],
        "transfer": [f"attack.found={tmp_path / 'found.csv'}"],
        **judge_files(tmp_path),
        **quality_files(tmp_path),
    }


def with_value(plain: Any, path: list[str], value: float) -> Any:
    """A copy of plain data with another value at a path of keys and indices."""
    if not path:
        return value
    copied = plain.copy()
    place = int(path[0]) if isinstance(plain, list) else path[0]
    copied[place] = with_value(plain[place], path[1:], value)
    return copied


def first_of_each_class(group: str) -> list[str]:
    """The choices that name a class which none before them names, and those that name none or several."""
    first: dict[tuple[str, ...], str] = {}
    for choice in choices(group):
        text = (CONFIG_FOLDER / group / f"{choice}.yaml").read_text(encoding="utf-8")
        named = tuple(re.findall(r"^_target_: (\S+)", text, re.MULTILINE))
        first.setdefault(named or (choice,), choice)
    return list(first.values())


@pytest.mark.parametrize(
    ("chosen", "values"),
    [(first_of_each_class, (float("nan"),)), nightly(choices, (float("inf"), float("nan"), True))],
    ids=["classes", "all"],
)
@pytest.mark.parametrize("group", GROUPS)
def test_no_number_of_a_choice_may_be_what_is_no_number(
    group: str,
    chosen: Callable[[str], list[str]],
    values: tuple[float, ...],
    files: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    GlobalHydra.instance().clear()
    tried: set[tuple[str, str]] = set()
    for choice in chosen(group):
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            config = compose("config", spell_out([f"{group}={choice}", *files.get(choice, [])]))
        plain = OmegaConf.to_container(config[group], resolve=True)
        for field in numeric_fields(plain):
            # Variants of a method share its class, which does the checking.
            case = str(plain.get("_target_", choice)), field
            for value in () if case in tried else values:
                changed = OmegaConf.create({group: with_value(plain, field.split("."), value)})
                with pytest.raises(CommandError) as refusal:
                    make_object(changed, group)
                assert str(refusal.value).startswith(f"{group}.{field} is {value}; it must be")
            tried.add(case)
    assert tried


@pytest.mark.parametrize("field", ["seed", "prompts", "retained", "processes", "sampling.steps", "sampling.batch_size"])
@pytest.mark.parametrize("value", ["inf", nightly("-inf"), "nan", nightly("1e400"), "true"])
def test_no_number_of_a_job_may_be_what_is_no_number(field: str, value: str) -> None:
    with pytest.raises(CommandError, match=f"^{field} is .*; it must be"):
        make_job(f"{field}={value}")


def test_other_packages_methods_are_given_no_infinite_number_either() -> None:
    with pytest.raises(CommandError, match=r"^judge\.threshold is nan; it must be a finite number\.$"):
        make_job("~judge", "+judge._target_=tests.tiny_job.ErraticJudge", "+judge.threshold=nan")
