"""What an erased model must hold to be shipped, as ``attacked.high<0.2``."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.results.screen import RATES

RETAINED = "retained"
"""The name before those of measures, as in ``retained.accuracy_style.low>0.9``."""

_WRITTEN = re.compile(r"\s*([\w.]+?)\s*(<=|>=|<|>)\s*([-+.\deE]+)(\s*%)?\s*")
_HOLDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FIELDS = ("rate", "low", "high", "successes", "n")


@dataclass(frozen=True)
class Requirement:
    """A bound on a number of every run.

    Attributes:
        text: As it was written.
        path: The number's place: a rate or ``retained`` and a measure, then perhaps the field of an interval.
        sign: How it compares with ``bound``.
        bound: A number.
    """

    text: str
    path: tuple[str, ...]
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """Read what was written.

        Raises:
            ValueError: It is no requirement.
        """
        written = _WRITTEN.fullmatch(text)
        examples = "as in attacked.high<0.2 or retained.accuracy_style.low>0.9"
        if written is None:
            raise ValueError(f"require is {text!r}; write a number's name, <, <=, > or >=, and a bound, {examples}.")
        name, sign, number, percent = written.groups()
        path = tuple(name.split("."))
        try:
            bound = float(number) / (100 if percent else 1)
        except ValueError as error:
            raise ValueError(f"require is {text!r}; {number!r} is no number.") from error
        if path[0] not in {*RATES, RETAINED} or path == (RETAINED,):
            raise ValueError(
                f"require is {text!r}; it must begin with one of {', '.join(RATES)}, {RETAINED}, {examples}."
            )
        if path[0] != RETAINED and (len(path) > 2 or (len(path) == 2 and path[1] not in _FIELDS)):
            raise ValueError(f"require is {text!r}; a rate has the fields {', '.join(_FIELDS)}.")
        return cls(text.strip(), path, sign, bound)

    def failures(self, summaries: Sequence[Mapping[str, Any]]) -> list[str]:
        """The runs that do not hold it, each in words.

        Raises:
            ValueError: A run has no such number.
        """
        found = []
        for summary in summaries:
            value = self._value(summary)
            if not _HOLDS[self.sign](value, self.bound):
                found.append(f"{summary['choices'].get('attack', summary['run'])} has {value:.4g}")
        return found

    def _value(self, summary: Mapping[str, Any]) -> float:
        name, *fields = self.path
        value: Any = summary["rates"][name] if name != RETAINED else summary["measures"]
        for field in fields:
            if not isinstance(value, Mapping) or field not in value:
                known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no fields"
                raise ValueError(f"require is {self.text!r}; run {summary['run']} has no {field} there, but {known}.")
            value = value[field]
        if isinstance(value, Mapping):
            value = value.get("rate", value.get("mean"))
        if not isinstance(value, int | float):
            raise ValueError(f"require is {self.text!r}; that is no number of run {summary['run']}.")
        return float(value)
