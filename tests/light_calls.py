"""Calls for engines that import nothing heavy."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Seen:
    """Tells which GPU it sees, and how many others were at work on it."""

    folder: Path
    number: int

    def __call__(self) -> str:
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        mark = self.folder / f"{gpu}.{self.number}.working"
        mark.touch()
        time.sleep(0.5)
        beside = len(list(self.folder.glob(f"{gpu}.*.working")))
        (self.folder / f"{self.number}.json").write_text(json.dumps({"gpu": gpu, "beside": beside}))
        mark.unlink()
        return gpu


@dataclass(frozen=True)
class Sleeper:
    """Tells of its process, and works on until it is ended."""

    folder: Path

    def __call__(self) -> None:
        (self.folder / f"{os.getpid()}.pid").touch()
        time.sleep(600)
