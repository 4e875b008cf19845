"""What an edit adds to a model beside its parameters: layers, gates, guards."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, ClassVar, Self

from torch import Tensor

from diffusion.guard import Guard
from diffusion.model import TextToImage
from diffusion.plugins import declared_plugins, is_of

_ROOM = "erasure.additions"


class Addition(ABC):
    """Something that is put into a model and taken out again; the parameters stay as they are.

    Its class stands alone in a module of :mod:`erasure.additions` whose name is its kind; a plugin's may lie anywhere.

    Attributes:
        kind: What files call it.
        is_guard: Whether it looks at prompts or steers the sampling, and is no layer of the network.
    """

    kind: ClassVar[str]
    is_guard: ClassVar[bool] = False

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it is besides its tensors, as JSON values."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name."""

    @classmethod
    @abstractmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The addition whose settings and tensors these are.

        Raises:
            ValueError: They do not fit together.
        """

    @abstractmethod
    def attach(self, model: TextToImage) -> Callable[[], None]:
        """Put it into ``model``; what is returned takes it out.

        Raises:
            ValueError: The model is not the one that it was made from.
        """


def stored_kind(addition: Addition) -> str:
    """What :func:`addition_class` finds the class of ``addition`` by: its kind, or for a plugin's its dotted name."""
    found = type(addition)
    ours = is_of(found.__module__, (_ROOM,))
    return addition.kind if ours else f"{found.__module__}.{found.__qualname__}"


def addition_class(kind: str) -> type[Addition]:
    """The class of a kind of addition.

    Raises:
        ValueError: There is no such kind, or it is that of a plugin which is not declared.
    """
    if "." in kind:
        return _class_of_plugin(kind)
    kinds = sorted(module.name for module in pkgutil.iter_modules(import_module(_ROOM).__path__))
    if kind not in kinds:
        raise ValueError(f"{kind!r} is no kind of addition; this version knows {', '.join(kinds) or 'none'}.")
    module = import_module(f"{_ROOM}.{kind}")
    [found] = [value for value in vars(module).values() if isinstance(value, type) and _is_of_kind(value, kind)]
    return found


def _class_of_plugin(name: str) -> type[Addition]:
    module, _, attribute = name.rpartition(".")
    # A file may name any module, and importing runs it.
    if not is_of(module, declared_plugins()):
        raise ValueError(f"its addition {name} is of a plugin that is not declared; name the plugin by plugins=PATH.")
    found = getattr(import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Addition)):
        raise ValueError(f"its addition {name} is not in the plugin {module} any more.")
    return found


def _is_of_kind(candidate: type, kind: str) -> bool:
    return issubclass(candidate, Addition) and getattr(candidate, "kind", None) == kind


def attach_all(additions: Sequence[Addition], model: TextToImage) -> Callable[[], None]:
    """Put all into ``model``, or none if one does not fit; what is returned takes them out."""
    with ExitStack() as attached:
        for addition in additions:
            attached.callback(addition.attach(model))
        return attached.pop_all().close


@contextmanager
def attached(model: TextToImage, *additions: Addition) -> Iterator[None]:
    """Put ``additions`` into ``model`` for the length of the context."""
    detach = attach_all(additions, model)
    try:
        yield
    finally:
        detach()


def set_guard(model: TextToImage, guard: Guard) -> Callable[[], None]:
    """Let ``guard`` stand before ``model``; what is returned takes it away.

    Raises:
        ValueError: Another stands there.
    """
    if model.guard is not None:
        raise ValueError(
            f"{model.name!r} already has a {type(model.guard).__name__} and takes one guard; leave one of the two out."
        )
    model.guard = guard

    def take_away() -> None:
        model.guard = None

    return take_away
