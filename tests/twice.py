"""The same command twice, by one process: ``python -m tests.twice FOLDER ARGUMENTS...``.

What it imports, and the fork server that its jobs come from, serve both. What the first one says lies in ``FOLDER``,
in ``first.stdout``, ``first.stderr`` and ``first.status``; of the second one likewise. What the jobs say is not there.
"""

import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from experiments.command.run import command_line


def run_into(name: Path, arguments: list[str]) -> None:
    """Run the command line, and write what it says and its exit status to files that are called ``name``."""
    sys.argv = ["run.py", *arguments]
    status: object = 0
    with name.with_suffix(".stdout").open("w") as out, name.with_suffix(".stderr").open("w") as err:
        try:
            with redirect_stdout(out), redirect_stderr(err):
                command_line()
        except SystemExit as ended:
            status = ended.code
            if isinstance(status, str):
                print(status, file=err)
                status = 1
    name.with_suffix(".status").write_text(str(status or 0))


if __name__ == "__main__":
    folder, asked = Path(sys.argv[1]), sys.argv[2:]
    for which in ("first", "second"):
        run_into(folder / which, asked)
