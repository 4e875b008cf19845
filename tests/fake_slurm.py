"""Slurm's commands as far as submitit needs them, on one machine: ``sbatch`` starts an array, ``sacct`` tells of it."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "squeue", "scancel")


def real() -> bool:
    """Whether a Slurm answers here, which tests take rather."""
    try:
        return subprocess.run(["sinfo", "-h"], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install(folder: Path) -> None:
    """Put the commands into a folder, which is to come first in ``PATH``."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        script = folder / command
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {command} "$@"\n')
        script.chmod(0o755)


def _state(job: str) -> Path:
    return Path(os.environ["FAKE_SLURM"]) / f"{job}.json"


def sbatch(script: str) -> None:
    """Run every task of the array, two at a time, in the background."""
    text = Path(script).read_text()
    array = re.search(r"#SBATCH --array=0-(\d+)", text)
    job = str(os.getpid())
    print(f"Submitted batch job {job}", flush=True)
    if os.fork():
        return
    os.setsid()
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    gate = threading.Semaphore(2)

    def run(task: str | None) -> None:
        name = job if task is None else f"{job}_{task}"
        own = {"SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "here"}
        own |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        own |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": task} if task is not None else {}
        with gate:
            _state(name).write_text(json.dumps("RUNNING"))
            done = subprocess.run(["bash", script], env={**os.environ, **own}, check=False)
            _state(name).write_text(json.dumps("FAILED" if done.returncode else "COMPLETED"))

    tasks = [str(task) for task in range(int(array[1]) + 1)] if array else [None]
    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def srun(*arguments: str) -> None:
    """Run a step of a job, with its output where it is asked for."""
    job, task = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    output = Path(
        arguments[arguments.index("--output") + 1]
        .replace("%A", job)
        .replace("%a", task)
        .replace("%t", "0")
        .replace("%j", job)
    )
    start = next(place for place, word in enumerate(arguments) if word == sys.executable)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        sys.exit(abs(subprocess.run(arguments[start:], stdout=file, stderr=file, check=False).returncode))


def sacct(*_: str) -> None:
    """Tell of all tasks."""
    print("JobID|State|NodeList")
    for path in sorted(Path(os.environ["FAKE_SLURM"]).glob("*.json")):
        print(f"{path.stem}|{json.loads(path.read_text())}|here")


def squeue(*arguments: str) -> None:
    """Tell of a task that has not ended."""
    job = arguments[arguments.index("-j") + 1]
    if not _state(job).exists() or json.loads(_state(job).read_text()) == "RUNNING":
        print(job)


def scancel(*_: str) -> None:
    """Nothing to end."""


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "squeue": squeue, "scancel": scancel}[sys.argv[1]](*sys.argv[2:])
