"""Paraphrase: other words for the concept, from a list that a person wrote."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PlainValidator

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from diffusion.checked import checked
from diffusion.files import shipped
from diffusion.model import TextToImage
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.prompt_sets import csv_rows
from evaluation.verdicts import Judge

KINDS = ("synonym", "description", "misspelling", "translation")
"""In the order of trying."""

COLUMNS = ("slot", "kind", "text")


@plain_dataclass(frozen=True)
class Wording:
    """One way to say the concept.

    Attributes:
        slot: The place in a sentence that it fills; wordings of one slot can stand for each other. Empty if it stands
            alone and can be put behind any prompt.
        kind: One of :data:`KINDS`.
        text: The words.
    """

    slot: str
    kind: str
    text: str


def _file_of_wordings(value: Any) -> Path:
    path = shipped(Path(value)) if isinstance(value, (str, Path)) else None
    if path is None or not path.is_file():
        raise ValueError(
            f"wordings is {str(value)!r}, which is no file; write a CSV file with the columns {','.join(COLUMNS)}, "
            "as prompts/paraphrases/church.csv, and name it by attack.wordings=..."
        )
    read_wordings(path)
    return path


@checked
class Paraphrase:
    """Say the concept in up to ``tries`` other ways, until a picture shows it. No model is looked into.

    Every wording of the list that occurs in the prompt (whole words, whatever their case, the longest first) gives way
    to another of its slot; where none occurs, a wording without a slot is put behind the prompt. Kinds take turns:
    synonym, description, misspelling, translation, synonym, ... Besides the list's misspellings there are those by
    rule: two neighbouring letters swapped, one dropped, or one doubled, in the wording that occurs.

    Attributes:
        wordings: CSV file with the columns slot, kind and text.
        tries: Pictures per prompt; give it the number of checks of the attack that it stands beside.
        order: Of the wordings of one kind: ``listed``, as in the file, or ``drawn``. Misspellings by rule follow the
            list's and are always drawn.
        misspell: Make misspellings by rule.
        seed: Seed of the draws; each case has its own stream.
    """

    wordings: Annotated[Path, PlainValidator(_file_of_wordings)]
    tries: Annotated[int, Field(ge=1)] = 10
    order: Literal["listed", "drawn"] = "listed"
    misspell: bool = True
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "black_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when it ends.

        Raises:
            ValueError: The list has nothing to change a prompt by.
        """
        wordings = read_wordings(self.wordings)
        texts = {case.case_number: self._paraphrases(case, wordings) for case in cases}

        def propose(traces: list[Trace]) -> list[Proposal]:
            # A case that runs out of texts begins again, which costs the last one's picture at most.
            return [
                Proposal(prompts[trace.attempts % len(prompts)])
                for trace in traces
                for prompts in [texts[trace.case.case_number]]
            ]

        return search(
            model, cases, judge, propose, sampling=sampling, rounds=self.tries, batch_size=sampling.batch_size
        )

    def _paraphrases(self, case: PromptCase, wordings: Sequence[Wording]) -> list[str]:
        """Return what to try in the place of a case's prompt, in order."""
        generator = stream(self.seed, "paraphrase/order", case.case_number)
        pieces = split_prompt(case.prompt, wordings)
        if pieces == [case.prompt]:
            pieces += [", ", Wording("", "", "")]
        options = [
            self._options(piece, wordings, generator) if isinstance(piece, Wording) else [piece] for piece in pieces
        ]
        if not all(options):
            raise ValueError(
                f"{self.wordings} has nothing to say {case.prompt!r} otherwise; add a wording with an empty slot, "
                "which is put behind prompts in which no wording occurs, and at least two for every other slot."
            )
        count = max(map(len, options))
        return ["".join(choices[number % len(choices)] for choices in options) for number in range(count)]

    def _options(self, found: Wording, wordings: Sequence[Wording], generator: torch.Generator) -> list[str]:
        """Return what may stand in the place of a wording, kinds in turn."""
        queues = []
        for kind in KINDS:
            queue = [
                wording.text
                for wording in wordings
                if (wording.slot, wording.kind) == (found.slot, kind) and wording.text.lower() != found.text.lower()
            ]
            if self.order == "drawn":
                queue = shuffled(queue, generator)
            if self.misspell and kind == "misspelling":
                queue += shuffled(misspellings(found.text), generator)
            queues.append(queue)
        return [text for text in chain.from_iterable(zip_longest(*queues)) if text is not None]


def read_wordings(path: Path) -> list[Wording]:
    """Read wordings from the columns ``slot``, ``kind`` and ``text`` of a UTF-8 CSV file, in the order of its rows.

    Raises:
        ValueError: A column is missing, a row lacks its text or has an unknown kind, or there are no rows.
    """
    wordings = []
    with csv_rows(path, COLUMNS) as reader:
        for cells in reader:
            slot, kind, text = ((cells[column] or "").strip() for column in COLUMNS)
            if not text or kind not in KINDS:
                raise ValueError(
                    f"{path} is broken in line {reader.line_num}; it needs a text, and a kind that is one of "
                    f"{', '.join(KINDS)}."
                )
            wordings.append(Wording(slot, kind, text))
    if not wordings:
        raise ValueError(f"{path} has no wordings below its first line.")
    return wordings


def split_prompt(prompt: str, wordings: Sequence[Wording]) -> list[str | Wording]:
    """Cut a prompt into what must stay, as text, and the wordings with a slot that occur in it, as they are written.

    Where several begin at the same place, the longest is taken. A prompt without any is returned as its only piece.
    """
    longest_first = sorted((wording for wording in wordings if wording.slot), key=lambda wording: -len(wording.text))
    alternatives = "|".join(f"({re.escape(wording.text)})" for wording in longest_first)
    pieces: list[str | Wording] = []
    end = 0
    for match in re.finditer(rf"(?<!\w)(?:{alternatives})(?!\w)", prompt, re.IGNORECASE) if alternatives else ():
        known = next(w for w, text in zip(longest_first, match.groups(), strict=True) if text is not None)
        pieces += [prompt[end : match.start()], Wording(known.slot, known.kind, match[0])]
        end = match.end()
    return [piece for piece in (*pieces, prompt[end:]) if piece != ""] or [prompt]


def misspellings(text: str) -> list[str]:
    """Return every way to swap two neighbouring letters of ``text``, to drop or to double one; each once, in order.

    >>> misspellings("of")
    ['fo', 'f', 'oof', 'o', 'off']
    """
    found = []
    for place, letter in enumerate(text):
        if letter.isalpha():
            before, after = text[:place], text[place + 1 :]
            if after[:1].isalpha():
                found.append(before + after[0] + letter + after[1:])
            found += [before + after, before + 2 * letter + after]
    return [changed for changed in dict.fromkeys(found) if changed.strip() and changed != text]


def shuffled(texts: Sequence[str], generator: torch.Generator) -> list[str]:
    """Return ``texts`` in a random order."""
    return [texts[index] for index in torch.randperm(len(texts), generator=generator).tolist()]
