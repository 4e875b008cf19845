"""What it costs that a job on the canvas computes with one thread. Prints one line of JSON.

The same job, an ESD erasure and a short attack, runs in three ways on two cores: alone with one thread, alone with two,
and two jobs side by side with one thread each. Each job is a process of its own with an empty store, so what it takes
to start is in its seconds, as it is for a user. Ratios are of medians over rounds in which each way takes its turn.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
JOB = ("tracker=off", "floor=off", "transfer.seeds=0", "prompts=8", "retained=8")


def main() -> None:
    """Time the three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the erasure's training")
    parser.add_argument("--timesteps", type=int, default=3, help="checks of the attack")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    job = ["run.py", *JOB, f"eraser.steps={arguments.steps}", f"attack.timesteps={arguments.timesteps}"]
    ways = {"one_thread": [1], "two_threads": [2], "side_by_side": [1, 1]}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, threads in ways.items():
            measured[name].append(seconds(job, threads))
    wall = {name: median(each[0] for each in rounds) for name, rounds in measured.items()}
    processor = {name: median(each[1] for each in rounds) for name, rounds in measured.items()}
    print(
        json.dumps(
            {
                "benchmark": "threads",
                "two_threads_times_as_fast": wall["one_thread"] / wall["two_threads"],
                "side_by_side_times_as_many_jobs": 2 * wall["one_thread"] / wall["side_by_side"],
                "seconds": wall,
                "processor_seconds": processor,
                "steps": arguments.steps,
                "timesteps": arguments.timesteps,
                "rounds": arguments.rounds,
                "load": os.getloadavg()[0],
            }
        )
    )


def seconds(job: list[str], threads: list[int]) -> tuple[float, float]:
    """Run the job once for each number of threads, all at once; the seconds until the last ends, and the processor's.

    Args:
        job: What Python runs.
        threads: Of each copy.

    Raises:
        SystemExit: A job failed.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        running = [
            subprocess.Popen(
                [
                    *(sys.executable, *job, f"threads={count}"),
                    *(f"store={folder}/store{number}", f"hydra.run.dir={folder}/run{number}"),
                ],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(count), "PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, count in enumerate(threads)
        ]
        try:
            # Each is read to its end in turn; what the others say meanwhile fits their pipes.
            told = [process.communicate()[1] for process in running]
        finally:
            for process in running:
                process.kill()
    for process, said in zip(running, told, strict=True):
        if process.returncode:
            raise SystemExit(said.strip() or f"A job ended with exit status {process.returncode}.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    return time.perf_counter() - started, taken


if __name__ == "__main__":
    main()
