"""From the composed config to checked objects, before anything heavy is loaded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import TypeAdapter, ValidationError

from diffusion.finite import find_not_finite
from diffusion.sampling import Sampling
from erasure.protocols import check_pair
from experiments import CONFIG_FOLDER
from experiments.command.architecture import check_architecture
from experiments.command.errors import CommandError, explain_instantiation, explain_validation, unknown
from experiments.command.kinds import require_kind
from experiments.command.targets import require_known_targets
from experiments.fit import FITTED, family_of, fitted
from experiments.job.floors import check_floor
from experiments.job.settings import Job, Settings

OBJECTS = (
    *("model", "concept", "prompt_set", "retained_set", "judge", "eraser", "pruning", "attack", "evaluator", "tracker"),
    *("protocol", "transfer"),
)
"""Keys of the config that hold a class and its arguments (``evaluator``: several, by name)."""

PROMPT_SETS = ("prompt_set", "retained_set")
"""Keys of the config that hold a class which reads prompts."""


def build(config: DictConfig, choices: Mapping[str, str] | None = None) -> Job:
    """Make and check every object of a composed config; no model is loaded.

    Raises:
        CommandError: A value or a field is wrong.
        ValueError: A pair of choices makes no sense, or a prompt set is broken, or there is no floor to be had.
        FileNotFoundError: A prompt set is not there.
    """
    named = {
        group: f"{choice}.{preset}"
        for group, choice in (choices or {}).items()
        if group in FITTED and (preset := OmegaConf.select(config, f"{group}.preset")) and choice in _plain_names(group)
    }
    # Which family a Hub id is of is told by what is composed alone, and no job keeps it.
    family = family_of(config.get("model"))
    plain = fitted(config)
    taken = plain.pop("taken", None)
    fields = {field.name for field in dataclasses.fields(Settings)}
    if extra := set(plain) - fields - set(OBJECTS):
        raise CommandError(unknown(min(extra), fields | set(OBJECTS), what="is unknown; the fields are"))
    try:
        settings = TypeAdapter(Settings).validate_python({key: plain[key] for key in fields & set(plain)})
    except ValidationError as error:
        raise CommandError(explain_validation(error, known=[f.name for f in dataclasses.fields(Sampling)])) from error
    if (infinite := find_not_finite(plain)) is not None:
        raise CommandError(f"{'.'.join(infinite[0])} is {infinite[1]}; it must be a finite number.")
    config = config.copy()
    with open_dict(config):
        config.update(
            {group: _literal(plain[group]) for group in ("model", *FITTED) if isinstance(plain.get(group), dict)}
        )
    objects = {name: make_object(config, name) for name in OBJECTS}
    evaluators = objects.pop("evaluator")
    check_pair(objects["eraser"], objects["pruning"])
    model = {**plain["model"], "family": family}
    check_architecture({group: objects[group] for group in FITTED}, model, choices or {})
    prompt_set, retained_set = (objects.pop(key) for key in PROMPT_SETS)
    job = Job(
        **objects,
        evaluators=evaluators,
        settings=settings,
        prompts=prompt_set.read()[: settings.prompts],
        retained=retained_set.read()[: settings.retained],
        config={**plain, "taken": taken} if taken else plain,
        choices={**(choices or {}), **named},
    )
    check_floor(job)
    return job


def make_object(config: DictConfig, name: str) -> Any:
    """One of the :data:`OBJECTS` of a composed config, made and checked.

    Raises:
        CommandError: A value or a field of it is wrong.
    """
    if config.get(name) is None:
        raise CommandError(f"{name} is missing; choose one, as in {name}=... (run.py --help lists them).")
    require_known_targets(OmegaConf.to_container(config[name], resolve=True), name)
    try:
        made = instantiate(config[name], _convert_="all")
    except InstantiationException as error:
        sentence = explain_instantiation(error, lambda key: _fields_at(config, key))
        if sentence is None:
            raise
        raise CommandError(sentence) from error
    require_kind(name, made)
    return made


def _plain_names(group: str) -> set[str]:
    return {path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")}


def _literal(value: Any) -> Any:
    """Plain data as OmegaConf takes it, text like ``${x}`` as it is."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _fields_at(config: DictConfig, key: str) -> list[str]:
    target = get_class(OmegaConf.select(config, key)["_target_"])
    return [field.name for field in dataclasses.fields(target)]
