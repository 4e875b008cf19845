"""Locks of a folder that several machines share."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion.leases import Busy, holding

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1.5

_HOLDER = """
import socket, sys, time
from pathlib import Path
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
from diffusion.leases import holding
with holding(Path(sys.argv[1]), seconds=float(sys.argv[3])):
    print("held", flush=True)
    time.sleep(float(sys.argv[4]))
    print(f"freed {time.time()}", flush=True)
"""


def holder(path: Path, machine: str, work: float) -> subprocess.Popen[str]:
    """A process, on ``machine`` if it has a name, that holds the lock and works for so many seconds."""
    arguments = [sys.executable, "-c", _HOLDER, str(path), machine, str(SECONDS), str(work)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_one_holds_it_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    with holding(path):
        assert path.exists()
        with pytest.raises(Busy, match="held by another process"), holding(path, wait=False):
            pass
    with holding(path, wait=False):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("machine", ["", "another"])
def test_a_live_holder_keeps_it_longer_than_a_lease(machine: str, tmp_path: Path) -> None:
    process = holder(tmp_path / ".lease", machine, 2.5 * SECONDS)
    with holding(tmp_path / ".lease", seconds=SECONDS):
        taken = time.time()
    out, _ = process.communicate(timeout=60)
    assert out.startswith("freed ")
    assert taken >= float(out.split()[1]) - 0.01


@pytest.mark.parametrize(("machine", "least", "most"), [("", 0.0, SECONDS), ("another", SECONDS / 2, 3 * SECONDS)])
def test_a_dead_holder_keeps_it_no_longer_than_a_lease(machine: str, least: float, most: float, tmp_path: Path) -> None:
    process = holder(tmp_path / ".lease", machine, 600)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = time.monotonic()
    with holding(tmp_path / ".lease", seconds=SECONDS):
        assert least <= time.monotonic() - killed < most + 1.0


def test_a_holder_that_slept_is_told_that_it_lost_it(tmp_path: Path) -> None:
    process = holder(tmp_path / ".lease", "another", 4 * SECONDS)
    os.kill(process.pid, signal.SIGSTOP)
    with holding(tmp_path / ".lease", seconds=SECONDS):
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(2 * SECONDS)
        # The one that lost it does not free what is ours now.
        _, err = process.communicate(timeout=60)
        assert (tmp_path / ".lease").exists()
    assert "was lost (owner changed)" in err
