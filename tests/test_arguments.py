"""What people type reaches the config as it stands, whatever Hydra's grammar makes of it."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from experiments.command.arguments import quoted, tidy_arguments


def read(override: str) -> object:
    return OverridesParser.create().parse_override(override).value()


@pytest.mark.parametrize(
    "value",
    ["epoch=05-step=1000.ckpt", "é/日本.csv", "/a(b)/c", "it's.pt", "#1.png", "a&b", "a'b\\", "C:\\x'y", 'say "no".pt'],
)
def test_a_value_with_any_sign_is_read_as_it_stands(value: str) -> None:
    assert read(quoted(f"eraser.path={value}")) == value


@given(st.text(alphabet="ab/.'\\\"=#&()é本 ", min_size=1).map(str.strip).filter(bool))
def test_what_is_quoted_is_the_value(value: str) -> None:
    override = quoted(f"eraser.path={value}")
    if override != f"eraser.path={value}":
        assert read(override) == value


@pytest.mark.parametrize("value", ["20", "[1,2]", "null", "${store}/x", "{a: 1}", "'quoted'", "a,b", "range(0,3)"])
def test_what_hydra_reads_stays_as_it_is(value: str) -> None:
    assert quoted(f"field={value}", sweeps=True) == f"field={value}"


def test_members_of_lists_and_of_sweeps_are_quoted_one_by_one() -> None:
    assert read(quoted("concept.targets=[梵高,van gogh]")) == ["梵高", "van gogh"]
    assert quoted("eraser.path=a=1.pt,b.pt", sweeps=True) == "eraser.path='a=1.pt',b.pt"


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert quoted("store=~/artifacts") == "store=/home/someone/artifacts"


def test_the_name_of_a_file_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "a,b.csv"
    path.write_text("")
    assert read(quoted(f"concept.prompts={path}")) == str(path)


def test_flags_and_deletions_stay(tmp_path: Path) -> None:
    assert tidy_arguments(["seed=1", "~model", "-m"]) == ["-m", "seed=1", "~model"]


def test_a_field_of_a_swept_group_is_left_to_the_jobs() -> None:
    typed = ["-m", "pruning=on,finetuned", "pruning.steps=10", "eraser.steps=5", "pruning.rate=1,2"]
    told = ["-m", "pruning=on,finetuned", "pruning.steps=choice(10)", "eraser.steps=5", "pruning.rate=1,2"]
    assert tidy_arguments(typed) == told
