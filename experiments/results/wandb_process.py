"""The process that speaks with Weights & Biases for a job: whatever it waits for, the job does not.

Run as a script, it reads pickled (kind, payload) pairs from standard input until that ends, and tells in lines of JSON
on standard output how it goes. It imports nothing of the project.
"""

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

Message = tuple[str, Any]
Say = Callable[[Mapping[str, Any]], None]

TOLD = {
    **{"project": "project", "entity": "entity", "id": "run_id", "name": "run_name", "group": "run_group"},
    **{"job_type": "run_job_type", "tags": "run_tags", "resume": "resume"},
}
"""What wandb calls, once it is set up, those of its options that the environment may give: WANDB_RUN_ID and so on."""

START_SECONDS = 20.0
"""How long an unreachable server may be asked before the run is recorded offline."""


def chosen_mode(wandb: Any, wanted: str) -> str:
    """``online``, ``offline`` or ``disabled``: the environment's word before ours; ``auto`` is online with a key.

    wandb itself is asked for both, as it knows more places for them than we do.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in {"1", "true", "yes"}:
        return "disabled"
    if (told := wandb.setup().settings.mode) != "online" or "WANDB_MODE" in os.environ:
        return str(told)
    if wanted != "auto":
        return wanted
    return "online" if has_key(wandb) else "offline"


def has_key(wandb: Any) -> bool:
    """Whether wandb finds a key: in the environment, in netrc, for whichever server it is set to."""
    try:
        return bool(wandb.login(verify=False))
    except wandb.Error:
        return False


class Run:
    """A W&B run, driven by messages; the methods are named as their kinds.

    Args:
        wandb: The library.
        say: Tells the job how it goes.
    """

    def __init__(self, wandb: Any, say: Say) -> None:
        self._wandb = wandb
        self._say = say
        self._run: Any = None

    def open(self, options: Mapping[str, Any]) -> None:
        """Start it; what the environment says of the run, of its project and of its folder comes first."""
        wandb, options = self._wandb, dict(options)
        mode = chosen_mode(wandb, options.pop("mode"))
        told = wandb.setup().settings
        options |= {name: value for name, setting in TOLD.items() if (value := getattr(told, setting, None))}
        if "WANDB_DIR" in os.environ:
            del options["dir"]
        options["settings"] = wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS)
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # an unreachable server, a wrong key, ...
            if mode != "online":
                raise
            self._say({"warning": f"W&B cannot go online, recording offline: {' '.join(str(error).split())}"})
            mode = "offline"
            self._run = wandb.init(mode=mode, **options)
        self._say({"mode": mode, "url": self._run.url, "folder": str(self._run.settings.sync_dir)})

    def metrics(self, axes: Mapping[str, str]) -> None:
        """Say against what each metric is drawn."""
        for name, axis in axes.items():
            self._run.define_metric(name, step_metric=axis)

    def log(self, values: Mapping[str, Any]) -> None:
        """Add to the history."""
        self._run.log(dict(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set numbers of the whole run."""
        self._run.summary.update(dict(values))

    def pictures(self, found: Mapping[str, Any]) -> None:
        """Log the grid and a table whose cells are texts, truth values and pictures uint8 [H, W, 3]."""
        table = self._wandb.Table(columns=found["columns"])
        for row in found["rows"]:
            table.add_data(*(self._wandb.Image(cell) if hasattr(cell, "shape") else cell for cell in row))
        self._run.log({"prompts": table, "pictures": self._wandb.Image(found["grid"])})

    def artifact(self, found: Mapping[str, Any]) -> None:
        """Log files under one name."""
        artifact = self._wandb.Artifact(found["name"], type=found["type"])
        for path in found["files"]:
            artifact.add_file(path)
        self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> None:
        """End it."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)


def serve(wandb: Any, messages: Iterator[Message], say: Say) -> None:
    """Do what the messages ask; after the first failure say so once and do no more."""
    run = Run(wandb, say)
    try:
        for kind, payload in messages:
            getattr(run, kind)(payload)
    except Exception as error:  # third-party code, the network and the disk may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        say({"warning": f"W&B stopped recording, the job goes on: {reason}"})
        return
    say({"ended": True})


def read_messages(stream: BinaryIO) -> Iterator[Message]:
    """The messages of a stream, until it ends or breaks off."""
    while True:
        try:
            yield pickle.load(stream)
        except EOFError:
            return


def main() -> None:
    """Serve a job."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")

    def say(facts: Mapping[str, Any]) -> None:
        print(json.dumps(facts), file=out, flush=True)

    try:
        import wandb  # noqa: PLC0415 - what is missing is told like any other failure
    except Exception as error:  # a broken installation may raise anything
        say({"warning": f"W&B cannot be imported, the job goes on: {' '.join(str(error).split())}"})
        return
    serve(wandb, read_messages(sys.stdin.buffer), say)


if __name__ == "__main__":
    main()
