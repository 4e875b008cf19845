"""What can be told of a job's prompts once the model is known: how many there are, and which do not get what they ask.

A number that rests on few prompts, on one prompt many times, or on prompts that the model never reads to their end
looks like any other number, so each of these is counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from attacks.cases import Outcome
from attacks.protocols import Attack
from attacks.union import inserted_tokens
from diffusion.model import UNGUIDED, TextToImage
from evaluation.prompt_sets import PromptRow
from experiments.job.settings import Job

_SEEDS_OF_NOISE = 2**32
"""PyTorch's CPU generator, which draws the noise, tells no more seeds apart."""

_MOST_REPORTED = 3


@dataclass(frozen=True)
class PromptCounts:
    """How many prompts of a set are what.

    Attributes:
        asked: Prompts that the job asks for.
        taken: Prompts that there are of them.
        distinct: Different prompts among those.
        pictures: Different pictures: prompts with the same text, seed and guidance scale have one.
        cut: Prompts that are longer than the text encoder reads; their ends have no effect.
        cut_by_attack: Further prompts whose ends the attack's tokens push out.
        other_size: Prompts that ask for a picture of another width or height than the model's.
        below_guidance: Prompts whose guidance scale is less than 1, which means the prompt alone.
    """

    asked: int
    taken: int
    distinct: int
    pictures: int
    cut: int = 0
    cut_by_attack: int = 0
    other_size: int = 0
    below_guidance: int = 0

    @classmethod
    def of(
        cls, rows: Sequence[PromptRow], asked: int, model: TextToImage, attack: Attack | None = None
    ) -> "PromptCounts":
        """Count the ``rows`` of which ``asked`` were wanted; they are attacked if ``attack`` is given."""
        missing = tokens_cut(model, [row.prompt for row in rows], attack)
        pictures = {(row.prompt, row.seed % _SEEDS_OF_NOISE, max(row.guidance, UNGUIDED)) for row in rows}
        return cls(
            asked=asked,
            taken=len(rows),
            distinct=len({row.prompt for row in rows}),
            pictures=len(pictures),
            cut=sum(plain > 0 for plain, _ in missing),
            cut_by_attack=sum(attacked > 0 and not plain for plain, attacked in missing),
            other_size=len(of_other_size(rows, model)),
            below_guidance=sum(row.guidance < UNGUIDED for row in rows),
        )

    def as_dict(self) -> dict[str, int]:
        """Fields by name, for JSON."""
        return asdict(self)

    def sentences(self, model: TextToImage, kind: str = "prompts") -> Iterator[str]:
        """Whatever a reader of the numbers must know; ``kind`` is the name of the set and of its field."""
        name = kind if kind == "prompts" else f"{kind} prompts"
        if self.taken < self.asked:
            yield f"there are {self.taken} {name}, fewer than the {self.asked} asked for ({kind}={self.asked})"
        if self.distinct < self.taken:
            yield (
                f"of {self.taken} {name} {self.distinct} are distinct ({self.pictures} distinct pictures); rows of one "
                "prompt are not counted as independent in intervals"
            )
        if self.cut:
            yield (
                f"{self.cut} of {self.taken} {name} are longer than the {model.max_tokens} tokens that {model.name} "
                "reads, and their ends have no effect"
            )
        if self.cut_by_attack:
            yield f"the attack's tokens push the ends of {self.cut_by_attack} of {self.taken} {name} out of the model"
        if self.other_size:
            height, width = model.image_size
            yield (
                f"{self.other_size} of {self.taken} {name} ask for pictures of another size; all are drawn with "
                f"{width}x{height} pixels"
            )
        if self.below_guidance:
            yield (
                f"{self.below_guidance} of {self.taken} {name} have a guidance scale below 1; as in diffusers, their "
                "pictures are made without guidance"
            )


def job_prompts(job: Job, model: TextToImage) -> dict[str, PromptCounts]:
    """Count the job's ``prompts`` and ``retained`` prompts.

    Raises:
        ValueError: Prompts ask for pictures of another size than the model's, and their set does not allow for that.
    """
    for rows, setting in ((job.prompts, "prompt_set"), (job.retained, "retained_set")):
        if job.config[setting].get("other_sizes") != "draw":
            require_size(rows, model, setting)
    return {
        "prompts": PromptCounts.of(job.prompts, job.settings.prompts, model, job.attack),
        "retained": PromptCounts.of(job.retained, job.settings.retained, model),
    }


def tokens_cut(
    model: TextToImage, prompts: Sequence[str], attack: Attack | None = None, member: str = ""
) -> list[tuple[int, int]]:
    """Of each prompt the tokens that the text encoder does not read: as it stands, and beside those of ``attack``.

    ``member`` names the attack of a union; without it, the one that needs most room counts.
    """
    counts = model.token_counts(prompts)
    plain = [max(0, count - model.max_tokens) for count in counts]
    if attack is None:
        return [(cut, cut) for cut in plain]
    # Start and end are no tokens of the prompt, and what is cut off needs no room.
    added = [inserted_tokens(attack, min(count, model.max_tokens) - 2, member) for count in counts]
    return [
        (cut, max(0, count + more - model.max_tokens) if more else cut)
        for cut, count, more in zip(plain, counts, added, strict=True)
    ]


def tokens_cut_under_attack(model: TextToImage, outcomes: Sequence[Outcome], attack: Attack) -> list[tuple[int, int]]:
    """Of each outcome the tokens of its prompt, and of the last text tried, that the text encoder does not read."""
    found = tokens_cut(model, [outcome.adversarial_prompt for outcome in outcomes])
    cuts = []
    for outcome, (of_text, _) in zip(outcomes, found, strict=True):
        [(plain, beside)] = tokens_cut(model, [outcome.prompt], attack, outcome.checks[-1].attack)
        # A prompt that succeeds as it stands is not attacked.
        cuts.append((plain, plain if len(outcome.checks) == 1 else max(beside, of_text)))
    return cuts


def of_other_size(rows: Sequence[PromptRow], model: TextToImage) -> list[PromptRow]:
    """The rows that ask for a picture of another width or height than the model's."""
    height, width = model.image_size
    return [row for row in rows if row.width not in {None, width} or row.height not in {None, height}]


def require_size(rows: Sequence[PromptRow], model: TextToImage, setting: str) -> None:
    """Refuse rows that ask for a picture of another size than the model's.

    Args:
        rows: The prompts.
        model: The model.
        setting: The config's key of the set, as in ``prompt_set``.

    Raises:
        ValueError: There are such rows; it names the first.
    """
    if not (others := of_other_size(rows, model)):
        return
    height, width = model.image_size
    told = ", ".join(f"case {row.case_number} ({_size(row)})" for row in others[:_MOST_REPORTED])
    more = f" and {len(others) - _MOST_REPORTED} more" if len(others) > _MOST_REPORTED else ""
    raise ValueError(
        f"{len(others)} of {len(rows)} prompts ask for pictures of another size than the {width}x{height} pixels of "
        f"{model.name}: {told}{more}; set model.resolution=[WIDTH,HEIGHT], leave these rows out, or draw them with the "
        f"model's size by {setting}.other_sizes=draw."
    )


def _size(row: PromptRow) -> str:
    return f"{row.width or 'any'}x{row.height or 'any'}"
