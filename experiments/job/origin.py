"""Who makes an artefact: which revision of the code, which packages, which machine."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffusion.model import TextToImage

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "torchmetrics", "hydra-core", "numpy")

SMALL = 100_000_000
"""Weights of a U-Net from which on one CPU thread is too slow to be the rule; Stable Diffusion's has 860 million."""

_CPU_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)

MACHINE = ("device", "cpu", "capability", "threads")
"""What the order of sums depends on, so that the same command gives other last digits on another machine."""


def origin(model: TextToImage, processes: int) -> dict[str, Any]:
    """Revision, versions, device, processor, threads and processes of the work that begins now, as JSON values."""
    return {
        **code_state(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def code_state() -> dict[str, Any]:
    """Revision of the repository and versions of the packages."""
    return {
        "git": git_state(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **dict(_versions(PACKAGES))},
    }


@contextmanager
def computing_threads(model: TextToImage, asked: int | None) -> Iterator[None]:
    """Let PyTorch compute with ``asked`` CPU threads for the length of the context.

    By default that is one for a small model on the CPU, whose numbers so depend on no machine's number of cores, and
    as many as PyTorch takes by itself for a large model or a GPU.
    """
    before = torch.get_num_threads()
    if asked is None:
        small = sum(weight.numel() for weight in model.network.parameters()) < SMALL
        asked = 1 if small and model.device.type == "cpu" else before
    torch.set_num_threads(asked)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machines(origins: Iterable[Mapping[str, Any]]) -> list[str]:
    """The different machines among ``origins``, in words."""
    told = [tuple(str(origin.get(name, "unknown")) for name in MACHINE) for origin in origins]
    return [
        f"{device}, {cpu} ({capability}), {threads} thread{'s' if threads != '1' else ''}"
        for device, cpu, capability, threads in dict.fromkeys(told)
    ]


def revisions(origins: Iterable[Mapping[str, Any]]) -> list[str]:
    """The different revisions among ``origins``, in short."""
    states: Sequence[Mapping[str, Any]] = [origin.get("git") or {} for origin in origins]
    return list(
        dict.fromkeys(
            f"{state['revision'][:12]}{' and changes' if state.get('dirty') else ''}" if state else "unknown"
            for state in states
        )
    )


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    if information.exists() and (found := _CPU_NAME.search(information.read_text(errors="replace"))):
        return found[1]
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, Any] | None:
    """The revision of the repository around ``folder`` and whether files differ from it; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        # Asking for the state must not lock the index of whoever commits at the time.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
        return done.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
