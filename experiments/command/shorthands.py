"""What a command line may say shortly: ``attack=[a,b]`` and ``transfer=run``; imports nothing heavy."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore

from experiments import CONFIG_FOLDER
from experiments.command.errors import CommandError
from experiments.command.names import DEFAULT_CONCEPT, concepts_for, families_of, make_known

_LIST = re.compile(r"\[([^\[\]]*)\]")
_NO_CHOICE = re.compile(r"|null|true|false|\{\s*\}|[-+]?\d+(\.\d*)?")
_RUN = re.compile(r"[0-9a-f]{16}")


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Put into Hydra's words what Hydra does not know; other arguments stay as they are.

    ``attack=[a,b]``, also among the values of a sweep, becomes the choice ``a+b``, their union, which is made known to
    Hydra. ``transfer=run`` becomes ``attack=transfer attack.found=run``, where a run's name stands for its folder in
    the store. ``transfer.judge=q16`` becomes ``judge@transfer.judge=q16``. Names that choices had are made known to
    Hydra, and ``concept=van_gogh`` becomes ``concept=artist/van_gogh`` where the model is Stable Diffusion.

    Raises:
        CommandError: A list is empty or nested or names an attack twice, a concept means two things, or a group is
            given what is no choice.
    """
    values = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    families = families_of(values)
    spelt: list[str] = []
    for argument in arguments:
        check_choice(argument)
        match argument.partition("="):
            case "attack", "=", attacks:
                make_known("attack", re.split(r"[\[\],\s]+", attacks))
                spelt.append(f"attack={name_unions(attacks)}")
            case ("eraser" | "pruning") as group, "=", names:
                make_known(group, re.split(r"[,\s]+", names))
                spelt.append(argument)
            case "concept", "=", concepts:
                spelt.append(f"concept={concepts_for(concepts, families)}")
            case "transfer", "=", runs:
                spelt += ["attack=transfer", f"attack.found={','.join(map(_locate, runs.split(',')))}"]
            case "transfer.judge", "=", judge:
                spelt.append(f"judge@transfer.judge={judge}")
            case _:
                spelt.append(argument)
    if "concept" not in values and "+experiment" not in values and "~concept" not in values:
        concept = concepts_for(DEFAULT_CONCEPT, families)
        spelt += [f"concept={concept}"] if concept != DEFAULT_CONCEPT else []
    return spelt


def spell_out_params(params: Mapping[str, str], arguments: Sequence[str]) -> dict[str, str]:
    """What a sweep's preset says, spelt out as by :func:`spell_out`; ``arguments`` are what is typed."""
    spelt = dict(params)
    for group in ("eraser", "pruning", "attack"):
        make_known(group, re.split(r"[\[\],\s]+", spelt.get(group, "")))
    if "attack" in spelt:
        spelt["attack"] = name_unions(spelt["attack"])
    if "concept" in spelt:
        typed = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
        spelt["concept"] = concepts_for(spelt["concept"], families_of(typed))
    return spelt


def check_choice(argument: str) -> None:
    """Refuse what is no name of a choice where a group takes one: ``null``, ``true``, ``{}``, a number.

    Raises:
        CommandError: It is such an override.
    """
    key, is_override, values = argument.partition("=")
    group = key.lstrip("+")
    folder = CONFIG_FOLDER / group
    if not (is_override and group and folder.is_dir()):
        return
    for value in values.split(","):
        if _NO_CHOICE.fullmatch(value.strip().lower()):
            choices = sorted(path.stem for path in folder.glob("*.yaml"))
            without = next((f"; {group}={choice} leaves it out" for choice in ("none", "off") if choice in choices), "")
            raise CommandError(
                f"{group}={value} is no choice: {group} takes the name of one of its choices, {', '.join(choices)}"
                f"{without}."
            )


def name_unions(attacks: str) -> str:
    """Put the choice ``a+b`` in the place of every ``[a,b]``; see :func:`spell_out`."""
    choices = _LIST.sub(_union, attacks)
    if "[" in choices or "]" in choices:
        raise CommandError(f"attack={attacks} is no list of attacks; write attack=[unlearndiff,random].")
    return choices


def _union(written: re.Match[str]) -> str:
    """Return the choice that stands for a list of attacks, known to Hydra."""
    names = [name.strip(" '\"") for name in written[1].split(",")]
    if "" in names:
        raise CommandError(f"attack={written[0]} lacks a name; write attack=[unlearndiff,random], or attack=none.")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise CommandError(f"attack={written[0]} names {min(repeated)} twice; name each attack once.")
    choice = "+".join(names)
    if len(names) > 1:
        defaults = [*({f"/attack@members.{name}": name} for name in names), "_self_"]
        union = {"defaults": defaults, "_target_": "attacks.union.Union"}
        ConfigStore.instance().store(choice, union, group="attack")
    return choice


def _locate(run: str) -> str:
    return f"${{store}}/runs/{run}" if _RUN.fullmatch(run) and not Path(run).exists() else run
