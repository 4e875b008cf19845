"""The GPU benchmark on a CPU: every line holds numbers, the batch that it picks is the fastest, and time is kept to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its neighbours are found beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    import gpu  # noqa: PLC0415

    return gpu


def bench(gpu: Any, pipeline: Any = None, minutes: float = 5.0, batches: tuple[int, ...] = (1, 2)) -> Any:
    return gpu.Bench("cpu", minutes, 1, 1, batches, pipeline, gpu.time.perf_counter())


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_a_step_of_the_attack_is_measured_beside_the_published_flow(gpu: Any) -> None:
    small = bench(gpu, gpu.make_small_pipeline())
    ours, theirs = small.unlearndiff(gpu.AUTOCAST, 2), small.published_unlearndiff()
    assert ours["ms_per_step_and_prompt"] > 0
    assert theirs["ms_per_step_and_prompt"] > 0
    assert (ours["prompts"], ours["precision"], theirs["precision"]) == (2, "bf16_autocast", "fp32")
    # There is no device to wait for, and each step asks whether its numbers are finite and its rows are projected.
    assert ours["waits_per_step"] == 0
    assert ours["numbers_read_per_step"] >= 2


@pytest.mark.slow
def test_pictures_and_training_are_measured(gpu: Any) -> None:
    small = bench(gpu, gpu.make_small_pipeline())
    assert small.pictures_per_second(gpu.BFLOAT16, 2)["pictures_per_second"] > 0
    assert small.training(gpu.FLOAT32, lambda _: gpu.Off())["steps_per_second"] > 0
    assert small.training(gpu.AUTOCAST, lambda steps: gpu.Learned(scope=None, steps=steps))["steps_per_second"] > 0


def test_the_canvas_is_equal_to_itself(gpu: Any) -> None:
    found = bench(gpu).canvas_equality(2, 1)
    assert found["largest_difference_of_a_pixel"] == 0
    assert found["same_texts_and_verdicts"] == found["same_verdicts"] == found["prompts"] == 3


def test_the_fastest_batch_is_the_last_before_a_prompt_gets_no_cheaper(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = bench(gpu, batches=(1, 2, 4, 8, 16))
    costs = {1: 100.0, 2: 60.0, 4: 40.0, 8: 39.5, 16: 10.0}
    monkeypatch.setattr(
        small, "unlearndiff", lambda _, prompts: {"ms_per_step_and_prompt": costs[prompts], "prompts": prompts}
    )
    assert gpu.fastest_batch(small)["prompts"] == 4
    assert [line["prompts"] for line in lines(capsys)] == [1, 2, 4, 8]

    def exhausted(_: object, prompts: int) -> dict[str, float]:
        if prompts > 1:
            raise torch.OutOfMemoryError
        return {"ms_per_step_and_prompt": 1.0, "prompts": 1}

    monkeypatch.setattr(small, "unlearndiff", exhausted)
    assert gpu.fastest_batch(small)["prompts"] == 1
    assert lines(capsys)[-1]["skipped"] == "out of memory"


def test_what_no_longer_fits_into_the_time_is_left_out(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    late = bench(gpu, minutes=0.0)
    assert "skipped" in late.report("pictures", lambda: pytest.fail("measured"))
    (line,) = lines(capsys)
    assert line["skipped"].endswith("have passed")


def test_without_a_gpu_the_full_size_is_refused(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "take --quick" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it_runs_in_small(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--quick", "--device", "cpu"])
    found = lines(capsys)
    assert not [line for line in found if "skipped" in line]
    measures = {"pictures", "esd", "p_esd", "unlearndiff_published_flow", "unlearndiff", "unlearndiff_batch"}
    assert {line["measure"] for line in found} == {*measures, "unlearndiff_ratio", "canvas_equality", "all"}
