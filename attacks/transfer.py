"""Transfer: the prompts that an attack found on one model, tried on another or once more on the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from diffusion.checked import checked
from diffusion.files import write_atomically
from diffusion.model import TextToImage
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.text_files import csv_text, plain_cell
from evaluation.prompt_sets import csv_rows
from evaluation.verdicts import Judge

FILE_NAME = "prompts.csv"
"""What a run calls the file of the prompts that it found."""

COLUMNS = ("case_number", "prompt", "adversarial_prompt")
SEED_COLUMN = "evaluation_seed"
VARIANT_COLUMN = "variant"


@plain_dataclass(frozen=True)
class FoundPrompt:
    """What an attack made of one prompt.

    Attributes:
        prompt: The plain prompt.
        adversarial_prompt: The text found, or the last one tried.
        seed: Seed of its picture; that of the plain prompt's if None.
    """

    prompt: str
    adversarial_prompt: str
    seed: int | None


def _file_of_prompts(value: Any) -> Path:
    path = Path(value) if isinstance(value, (str, Path)) else None
    if path is not None and path.name == "summary.json":
        path = path.parent
    if path is not None and path.is_dir():
        path /= FILE_NAME
    if path is None or not path.is_file():
        raise ValueError(
            f"found is {str(value)!r}, which leads to no file; name a run's folder, its summary.json or its "
            f"{FILE_NAME}, or a CSV file with the columns {','.join(COLUMNS)} (a run repeats its command to write one)."
        )
    read_found(path)
    return path


@checked
class Transfer:
    """Draw and judge each case's text of another run, once, from the text and its seed alone.

    Cases belong together by number and plain prompt. One that the other run never broke is tried with the last text of
    its search. As always, a prompt that succeeds as it stands is not attacked. What was not found as a text, such as
    embeddings, noise or weights, cannot be tried anew from a file of texts and is refused.

    Attributes:
        found: ``prompts.csv`` of a finished run, its folder or the ``summary.json`` beside it; or any CSV file with the
            columns case_number, prompt, adversarial_prompt and, for seeds other than the cases' own, evaluation_seed.
    """

    found: Annotated[Path, PlainValidator(_file_of_prompts)]

    threat_model: ClassVar[ThreatModel] = "black_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when it ends.

        Raises:
            ValueError: The file lacks a case, or has another prompt under its number.
        """
        found = read_found(self.found)
        for case in cases:
            require_same(self.found, found, case)

        def propose(traces: list[Trace]) -> list[Proposal]:
            texts = [found[trace.case.case_number] for trace in traces]
            return [Proposal(text.adversarial_prompt, seed=text.seed) for text in texts]

        return search(model, cases, judge, propose, sampling=sampling, rounds=1, batch_size=sampling.batch_size)


def require_same(path: Path, found: Mapping[int, FoundPrompt], case: PromptCase) -> None:
    """Refuse a case that ``found``, read from ``path``, has not.

    Raises:
        ValueError: Its number is missing, or stands for another prompt.
    """
    other = found.get(case.case_number)
    if other is None:
        raise ValueError(
            f"{path} has no case {case.case_number}; attack the same prompts in both runs (prompts={len(found)} takes "
            "the first ones)."
        )
    if other.prompt != case.prompt:
        raise ValueError(
            f"case {case.case_number} is {other.prompt!r} in {path}, but {case.prompt!r} here; both runs must attack "
            "the same prompts."
        )


def write_found(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write what an attack found as a UTF-8 CSV file that :func:`read_found` reads.

    Its further columns: ``plain_success`` and ``success`` (0 or 1), and ``variant``, where it is not empty what the
    picture depended on besides text and seed, so that :func:`read_found` refuses the file.
    """
    rows = []
    for outcome in outcomes:
        last = outcome.checks[-1]
        texts = (outcome.case_number, outcome.prompt, outcome.adversarial_prompt)
        rows.append([*texts, last.seed, int(outcome.plain_success), int(outcome.success), last.variant])
    columns = [*COLUMNS, SEED_COLUMN, "plain_success", "success", VARIANT_COLUMN]
    write_atomically(path, csv_text(columns, rows))


def read_found(path: Path) -> dict[int, FoundPrompt]:
    """Read the prompts that an attack found, by case number, from a UTF-8 CSV file.

    Raises:
        ValueError: A column is missing, a row is broken, a case number occurs twice, there are no rows, or a picture
            depended on more than a text and a seed.
    """
    found: dict[int, FoundPrompt] = {}
    textless: list[tuple[int, str]] = []
    with csv_rows(path, COLUMNS) as reader:
        for cells in reader:
            numbers = [cells["case_number"], cells.get(SEED_COLUMN, "0")]
            if None in cells.values() or None in cells or not all(map(str.isdecimal, numbers)):
                raise ValueError(
                    f"{path} is broken in line {reader.line_num}; it needs a cell for every column, and whole numbers "
                    f"from 0 as case_number and {SEED_COLUMN}."
                )
            number = int(cells["case_number"])
            if number in found:
                raise ValueError(f"{path} has case {number} twice, again in line {reader.line_num}; keep one.")
            seed = int(cells[SEED_COLUMN]) if SEED_COLUMN in cells else None
            plain, adversarial = (plain_cell(cells[column]) for column in ("prompt", "adversarial_prompt"))
            found[number] = FoundPrompt(plain, adversarial, seed)
            if variant := cells.get(VARIANT_COLUMN):
                textless.append((number, plain_cell(variant)))
    if not found:
        raise ValueError(f"{path} has no prompts below its first line.")
    if textless:
        number, variant = textless[0]
        raise ValueError(
            f"{path} has {len(textless)} of {len(found)} cases whose pictures come from more than a text and a seed "
            f"({variant!r} for case {number}); transfer takes the runs of attacks that end in a text."
        )
    return found
