"""Hydra in a process of tests: what it reads in a file, and what it makes of the same choices, it makes once.

A composed config is kept as bytes and given out as a copy of its own. It is made anew as soon as one of the files that
it comes from is another one.
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig

State = tuple[int, int] | None
"""When a file was changed, ns, and its size, bytes; None where there is none."""


def compose_once() -> None:
    """Let Hydra remember what it composes in this process."""
    # Where Hydra looks for plugins it makes its own classes anew, so it has to have looked.
    Plugins.instance()
    files = SourcesRegistry.instance().resolve("file")
    files.load_config = remembering_files(files.load_config)  # type: ignore[method-assign]
    config_loader_impl.create_defaults_list = remembering_choices(config_loader_impl.create_defaults_list)
    ConfigLoaderImpl._compose_config_from_defaults_list = remembering_configs(  # type: ignore[method-assign]
        ConfigLoaderImpl._compose_config_from_defaults_list
    )


def remembering_files(load: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Hydra's reading of a YAML file, which happens once as long as the file stays as it is."""
    read: dict[tuple[Path, State], bytes] = {}

    def remembered(source: Any, config_path: str) -> Any:
        file = file_of(source, config_path)
        if (state := state_of(file)) is None:
            return load(source, config_path)
        if (file, state) not in read:
            read[file, state] = pickle.dumps(load(source, config_path))
        return pickle.loads(read[file, state])

    return remembered


def remembering_choices(create: Callable[..., DefaultsList]) -> Callable[..., DefaultsList]:
    """Hydra's list of the files that a job's choices lead to, which overrides of single fields leave as it is."""
    made: dict[Any, tuple[dict[Path, State], bytes]] = {}

    def remembered(
        repo: CachingConfigRepository, config_name: str | None, overrides_list: list[Override], **how: bool
    ) -> DefaultsList:
        typed = [override for override in overrides_list if not override.is_sweep_override()]
        fields = [override for override in typed if is_field(repo, override)]
        choices = [override for override in typed if not is_field(repo, override)]
        key = places(repo), config_name, tuple(choice.input_line for choice in choices), tuple(how.items())
        if key not in made or not as_they_were(made[key][0]):
            new = create(repo, config_name, choices, **how)
            looked_at = [name.removeprefix("config_path=") for name in repo.cache]
            made[key] = states(repo, looked_at), pickle.dumps((new.defaults, new.overrides.known_choices))
        defaults, known = pickle.loads(made[key][1])
        return DefaultsList(defaults, None, fields, SimpleNamespace(known_choices=known))  # type: ignore[arg-type]

    return remembered


def remembering_configs(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Hydra's merging of the files that a job's choices lead to, before overrides of single fields."""
    made: dict[Any, tuple[dict[Path, State], bytes]] = {}

    def remembered(self: ConfigLoaderImpl, defaults: Sequence[Any], repo: CachingConfigRepository) -> DictConfig:
        key = places(repo), repr(defaults)
        if key not in made or not as_they_were(made[key][0]):
            composed = compose(self, defaults=defaults, repo=repo)
            made[key] = states(repo, [default.config_path for default in defaults]), pickle.dumps(composed)
        config: DictConfig = pickle.loads(made[key][1])
        return config

    return remembered


def is_field(repo: CachingConfigRepository, override: Override) -> bool:
    """Whether Hydra takes an override for one of fields, not for a choice."""
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)


def places(repo: CachingConfigRepository) -> tuple[str, ...]:
    """Where configs are looked for, in order."""
    return tuple(f"{source.scheme()}://{source.path}" for source in repo.get_sources())


def file_of(source: ConfigSource, config_path: str) -> Path:
    """Where a source would have a config."""
    return Path(source.path, source._normalize_file_name(config_path))


def state_of(file: Path) -> State:
    """See :data:`State`."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def states(repo: CachingConfigRepository, config_paths: Sequence[str]) -> dict[Path, State]:
    """Every file that one of the configs lies in, or would lie in, with its state."""
    files = {
        file_of(source, path) for source in repo.get_sources() if source.scheme() == "file" for path in config_paths
    }
    return {file: state_of(file) for file in files}


def as_they_were(files: dict[Path, State]) -> bool:
    """Whether all files still have those states."""
    return all(state_of(file) == state for file, state in files.items())
