"""What the jobs of a sweep leave in its folder, whichever process and machine each of them runs on."""

import json
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion.files import write_atomically

_FOLDER = "jobs"


@dataclass(frozen=True)
class Record:
    """How one job of a sweep ended.

    Attributes:
        number: Its number in the sweep, from 0.
        overrides: What was asked of it.
        summary: The path of its summary, if it has one.
        grid: The path of its picture grid.
        failure: Otherwise why it failed, in one sentence.
    """

    number: int
    overrides: list[str]
    summary: str | None = None
    grid: str | None = None
    failure: str | None = None

    def write(self, sweep: Path) -> None:
        """Leave it in the folder of the sweep."""
        (sweep / _FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(sweep, self.number), json.dumps(asdict(self)))

    @classmethod
    def read_all(cls, sweep: Path) -> list["Record"]:
        """Every record in the folder of a sweep, in the jobs' order."""
        _look_anew(sweep / _FOLDER)
        records = [cls(**json.loads(path.read_text())) for path in (sweep / _FOLDER).glob("*.json")]
        return sorted(records, key=lambda record: record.number)

    @classmethod
    def exists(cls, sweep: Path, number: int) -> bool:
        """Whether the job of this number left one."""
        _look_anew(sweep / _FOLDER)
        return cls._path(sweep, number).exists()

    @staticmethod
    def forget_all(sweep: Path) -> None:
        """Take away what an earlier sweep left in the same folder."""
        for record in (sweep / _FOLDER).glob("*.json"):
            record.unlink()

    @staticmethod
    def _path(sweep: Path, number: int) -> Path:
        return sweep / _FOLDER / f"{number}.json"


def _look_anew(folder: Path) -> None:
    """Write to a folder, so that a network's file system shows what other machines have written there."""
    with suppress(OSError):
        probe = folder / f".{secrets.token_hex(8)}.probe"
        probe.touch()
        probe.unlink()
