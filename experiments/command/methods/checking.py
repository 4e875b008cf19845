"""``eraselab check``: whether a method does what its protocol wants."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.command.errors import CommandError, unknown
from experiments.command.methods.edits import check_eraser, check_pruning
from experiments.command.methods.probes import check_attack, check_judge
from experiments.command.methods.trial import Trial
from experiments.command.plugins import choice_files, take_plugins

CHECKS = {"eraser": check_eraser, "pruning": check_pruning, "attack": check_attack, "judge": check_judge}
"""By kind of method."""


def find_method(told: str) -> tuple[str, str]:
    """Kind and name of what ``told`` means: a choice's name, or ``kind=name``.

    Raises:
        CommandError: There is no such choice, or several.
    """
    kind, named, name = told.rpartition("=")
    if named and kind not in CHECKS:
        raise CommandError(unknown(kind, CHECKS, what="is no kind of method; the kinds are"))
    kinds = [kind] if named else list(CHECKS)
    known = {each: set(choice_files(each)) for each in kinds}
    found = [each for each in kinds if name in known[each]]
    if not found:
        every = {choice for choices in known.values() for choice in choices}
        raise CommandError(
            f"{unknown(told, every)} A method of your own is found with plugins=PATH, its file or folder."
        )
    if len(found) > 1:
        raise CommandError(
            f"{told} is the name of {len(found)} choices; write {' or '.join(f'{k}={name}' for k in found)}."
        )
    return found[0], name


def check_method(told: str, *overrides: str, plugins: Path | None = None) -> Iterator[str]:
    """Try a method on the tiny model; yield in a sentence each what is in order.

    Args:
        told: See :func:`find_method`.
        overrides: Further fields of the job.
        plugins: Where a method of others lies.

    Raises:
        CommandError: Something is not: one sentence that says what, where, and what the protocol wants.
    """
    if plugins is not None:
        take_plugins([f"plugins={plugins}"])
    kind, name = find_method(told)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trial = Trial.of(kind, name, folder / "store", *overrides)
        less = f", tried with {', '.join(f'{key}={value}' for key, value in trial.reduced.items())}"
        yield f"{kind}={name} makes {trial.named}{less if trial.reduced else ''}"
        yield from CHECKS[kind](trial, folder / "trial")
        first = trial.run(folder / "first")
        if trial.run(folder / "again") != first:
            raise CommandError(f"{trial.named}: the same job read from the store has other verdicts than when it ran.")
        yield f"a whole job of {len(first)} prompts ends, and the store gives it back"
