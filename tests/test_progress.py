"""Progress off a terminal."""

import logging
import threading

import pytest

from diffusion import progress
from diffusion.progress import look_inside, progress_bar


def test_long_work_says_how_far_it_is_even_within_a_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REPORTS", 0.01)
    said = threading.Event()
    caplog.handler.addFilter(lambda record: said.set() or True)
    with caplog.at_level(logging.INFO), progress_bar("attack", 8, done=2) as bar:
        bar.note("1 succeeded")
        bar.advance(3)
        said.clear()
        assert said.wait(10)
    first = next(line for line in caplog.messages if "5 of 8" in line)
    assert first.startswith("attack: 5 of 8, about 0:00:00 left, 1 succeeded")
    count = len(caplog.messages)
    assert not threading.Event().wait(0.05)
    assert len(caplog.messages) == count


def test_nothing_is_promised_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    with progress_bar("attack", 8, done=2) as bar:
        assert bar.line() == "attack: 2 of 8"


def test_steps_in_hand_are_told_and_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar("attack", 4) as bar:
        now[0] = 60.0
        look_inside("round 5 of 10 with 2 in hand", 1.0)
        assert bar.line() == "attack: 0 of 4, round 5 of 10 with 2 in hand, about 0:03:00 left"
        with progress_bar("pictures", 8) as inner:
            look_inside("step 3 of 20", 0.0)
            assert inner.line() == "pictures: 0 of 8, step 3 of 20"
        look_inside("", 0.0)
        bar.advance()
        bar.note("1 of 1 succeeded")
        assert bar.line() == "attack: 1 of 4, about 0:03:00 left, 1 of 1 succeeded"
    look_inside("nobody listens", 1.0)
