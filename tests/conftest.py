"""Fixtures: a tiny Stable-Diffusion-shaped model with random weights, built offline in a second."""

import os
from pathlib import Path

# One thread for each worker of pytest-xdist, whose controller reads this file first, and for the jobs that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Configs of tests name classes of tests, in jobs that they start too.
os.environ.setdefault("ERASELAB_PLUGINS", "tests")

import numpy as np
import pytest
import torch

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.captions import caption
from diffusion.canvas.tiny import tiny_pipeline as make_tiny_pipeline
from diffusion.canvas.vocabulary import train_tokenizer
from diffusion.canvas.world import random_scene
from diffusion.model import TextToImage
from tests.tiny_job import write_world

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
keep_freed_memory()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tokenizer of some hundred tokens and 24 positions."""
    folder = tmp_path_factory.mktemp("tokenizer")
    generator = np.random.default_rng(0)
    train_tokenizer((caption(random_scene(generator), generator) for _ in range(500)), folder, size=300, max_length=24)
    return folder


@pytest.fixture
def tiny_model(tokenizer_folder: Path) -> TextToImage:
    """A fresh tiny model in float32."""
    return TextToImage(make_tiny_pipeline(tokenizer_folder), name="tiny")


@pytest.fixture
def tiny_model64(tokenizer_folder: Path) -> TextToImage:
    """The same weights in float64, for comparisons with slow oracles."""
    return TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float64), name="tiny")


@pytest.fixture(scope="session")
def world(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and the prompt sets of tests.tiny_job's jobs."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_pipeline(tokenizer_folder).save_pretrained(folder / "model")
    write_world(folder)
    return folder
