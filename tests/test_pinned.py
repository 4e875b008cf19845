"""What short runs on the canvas give stays as it is, whatever becomes of the code's structure."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pinned import measure

PINNED = Path(__file__).parent / "data" / "pinned_canvas.json"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure()


@pytest.mark.parametrize("name", list(json.loads(PINNED.read_text())))
def test_short_runs_on_the_canvas_give_what_they_gave(measured: dict[str, Any], name: str) -> None:
    """Texts and counts are equal; other numbers may differ by a processor's rounding, which training enlarges."""
    _compare(measured[name], json.loads(PINNED.read_text())[name], name)


def test_a_number_that_is_off_is_told() -> None:
    with pytest.raises(AssertionError, match="losses/1"):
        _compare({"losses": [1.0, 2.0]}, {"losses": [1.0, 2.1]}, "esd")


def _compare(now: Any, before: Any, place: str) -> None:
    if isinstance(before, dict):
        assert now.keys() == before.keys(), place
        for key, value in before.items():
            _compare(now[key], value, f"{place}/{key}")
    elif isinstance(before, list):
        assert len(now) == len(before), place
        for number, (own, value) in enumerate(zip(now, before, strict=True)):
            _compare(own, value, f"{place}/{number}")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=5e-3, abs=1e-4), place
    else:
        assert now == before, place
