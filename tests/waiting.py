"""Two processes that wait, for a test that kills the one that started them; imports nothing that they do not need."""

import os
import time
from pathlib import Path

from experiments.job.processes import run_in_processes


def run_two(folder: Path) -> None:
    """Two processes that tell of themselves in ``folder``, and compute on until they are ended."""
    run_in_processes(2, _work, folder)


def _work(_processes: object, folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").write_text("")
    time.sleep(600)
