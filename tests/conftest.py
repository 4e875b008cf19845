"""Fixtures: a tiny Stable-Diffusion-shaped model with random weights, built offline in a second.

What is slow to import waits until a test needs it: the controller of pytest-xdist reads this file and runs no test.
"""

# ruff: noqa: PLC0415

import functools
import gc
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from filelock import FileLock

# One thread for each worker of pytest-xdist, whose controller reads this file first, and for the jobs that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait for others of their team do not compute in circles meanwhile: the processors are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Configs of tests name classes of tests, in jobs that they start too.
os.environ.setdefault("ERASELAB_PLUGINS", "tests")

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from diffusion.model import TextToImage


@pytest.fixture(scope="session", autouse=True)
def process_settings() -> None:
    """Threads and memory of a process that runs tests."""
    import omegaconf
    import torch
    from diffusers.models.attention_processor import AttnProcessor2_0

    from diffusion.allocator import keep_freed_memory
    from tests.composing import compose_once

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # oneDNN lays weights out anew at every call, which is a third of a step of the tiny U-Net. It pays on the canvas's,
    # for which it is turned on again.
    torch.backends.mkldnn.set_flags(False)
    keep_freed_memory()
    # diffusers asks for it at every call, which is a twentieth of a step of the tiny U-Net.
    AttnProcessor2_0.__call__.__signature__ = inspect.signature(AttnProcessor2_0.__call__)
    # Configs hold the same few texts in every job, in the same files.
    for module in (omegaconf.base, omegaconf._utils):
        module.parse = functools.cache(module.parse)
    compose_once()
    # All that is imported stays; to look through it for what nobody needs any more takes as long as many a test.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tokenizer of some hundred tokens and 24 positions."""
    from diffusion.canvas.captions import caption
    from diffusion.canvas.vocabulary import train_tokenizer
    from diffusion.canvas.world import random_scene

    folder = tmp_path_factory.mktemp("tokenizer")
    generator = np.random.default_rng(0)
    train_tokenizer((caption(random_scene(generator), generator) for _ in range(500)), folder, size=300, max_length=24)
    return folder


def make_tiny_pipeline(tokenizer_folder: Path, *, seed: int = 0) -> "StableDiffusionPipeline":
    """See :func:`diffusion.canvas.tiny.tiny_pipeline`, which is imported when it is asked for."""
    from tests.copies import copied_tiny_pipeline

    return copied_tiny_pipeline(tokenizer_folder, seed)


@pytest.fixture(scope="session")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny canvas, as the recipe ships it; nobody writes there."""
    from diffusion.canvas.plan import QUICK
    from diffusion.canvas.recipe import Build

    def build(folder: Path) -> None:
        made = Build(QUICK, folder / "build")
        made.run()
        made.ship(folder / "shipped")

    return once_for_all(tmp_path_factory, "canvas", build) / "shipped"


@pytest.fixture(scope="session")
def twins(canvas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that canvas's twins that never knew a church, and that knew none of the three; nobody writes."""
    from diffusion.canvas.knowledge import Twin
    from diffusion.canvas.retraining import TwinBuild

    def build(folder: Path) -> None:
        for twin in (Twin("never_church"), Twin("never")):
            TwinBuild(canvas, folder).train(twin)

    return once_for_all(tmp_path_factory, "twins", build)


@pytest.fixture(scope="session")
def mmdit_canvas(canvas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny transformer of that canvas, as its recipe ships it; nobody writes there."""
    from diffusion.canvas.mmdit_recipe import QUICK_MMDIT, MMDiTBuild

    def build(folder: Path) -> None:
        made = MMDiTBuild(QUICK_MMDIT, folder / "build", canvas)
        made.run()
        made.ship(folder / "shipped")

    return once_for_all(tmp_path_factory, "mmdit", build) / "shipped"


@pytest.fixture(scope="session")
def mmdit_twins(mmdit_canvas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twin of that transformer that never knew a church; nobody writes."""
    from diffusion.canvas.knowledge import Twin
    from diffusion.canvas.retraining import TwinBuild

    return once_for_all(
        tmp_path_factory, "mmdit_twins", lambda folder: TwinBuild(mmdit_canvas, folder).train(Twin("never_church"))
    )


def once_for_all(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of that name that ``make`` fills, once for all workers of pytest-xdist, which only read it."""
    own = temporary.getbasetemp()
    # What the workers' folders lie in is the run's own; without workers it is that of all runs.
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = common / f"all_{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            # Renamed when it is whole, so that none goes on with what another left unfinished.
            part = common / f"part_{name}"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture
def tiny_model(tokenizer_folder: Path) -> "TextToImage":
    """A fresh tiny model in float32."""
    from diffusion.model import TextToImage

    return TextToImage(make_tiny_pipeline(tokenizer_folder), name="tiny")


@pytest.fixture
def tiny_model64(tokenizer_folder: Path) -> "TextToImage":
    """The same weights in float64, for comparisons with slow oracles."""
    import torch

    from diffusion.model import TextToImage

    return TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float64), name="tiny")


@pytest.fixture(scope="session")
def world(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and the prompt sets of tests.tiny_job's jobs."""
    from tests.tiny_job import write_world

    folder = tmp_path_factory.mktemp("world")
    make_tiny_pipeline(tokenizer_folder).save_pretrained(folder / "model")
    write_world(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the default job of tests.tiny_job, in a store of its own to which tests add."""
    from tests.tiny_job import overrides, run

    folder = tmp_path_factory.mktemp("undisturbed")
    return run(overrides(world, folder / "store"), folder / "run") | {"store": folder / "store"}


@pytest.fixture
def model(world: Path, monkeypatch: pytest.MonkeyPatch) -> "TextToImage":
    """The model that every job of the test gets, so that its counter tells what was computed."""
    from tests.tiny_job import Float64Folder

    loaded = Float64Folder(world / "model").load()
    monkeypatch.setattr(Float64Folder, "load", lambda self: loaded)
    return loaded
