"""Dataclasses of settings whose values are checked when they are made, the same way in every room."""

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticKnownError, core_schema

T = TypeVar("T")

_NO_SCHEMAS = frozenset({"config", "default", "expected", "metadata", "serialization"})
"""Parts of a schema that hold values."""


@overload
def checked(cls: type[T], /) -> type[T]: ...
@overload
def checked(*, arbitrary_types_allowed: bool = ...) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def checked(cls: type[T] | None = None, /, *, arbitrary_types_allowed: bool = False) -> Any:
    """A frozen dataclass that refuses unknown fields, and numbers that are none.

    Infinity, NaN and what is too large for a float (``1e400``) are no numbers, and neither are ``true`` and ``false``,
    which Python takes for 1 and 0.

    Args:
        cls: The class.
        arbitrary_types_allowed: Fields may have types that pydantic cannot check.

    >>> @checked
    ... class Steps:
    ...     count: int
    >>> Steps(3)
    Steps(count=3)
    """

    def decorate(cls: type[T]) -> Any:
        def numbers_only(cls: type[T], source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
            return _without_booleans(handler(source))  # type: ignore[no-any-return]

        cls.__get_pydantic_core_schema__ = classmethod(numbers_only)  # type: ignore[attr-defined]
        config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=arbitrary_types_allowed)
        return dataclass(frozen=True, config=config)(cls)

    return decorate if cls is None else decorate(cls)


def _without_booleans(schema: Any) -> Any:
    """The same schema, in which no number is made of a boolean."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_without_booleans, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in ("int", "float"):
        return core_schema.no_info_before_validator_function(_NOT_BOOLEAN[kind], schema)  # type: ignore[arg-type]
    inner = {key: value if key in _NO_SCHEMAS else _without_booleans(value) for key, value in schema.items()}
    if kind == "union":
        # What a member is called in errors.
        inner["choices"] = [
            (new, old["type"]) if isinstance(old, dict) and old["type"] in ("int", "float") else new
            for old, new in zip(schema["choices"], inner["choices"], strict=True)
        ]
    return inner


def _integer(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


_NOT_BOOLEAN = {"int": _integer, "float": _number}
