"""Measures the twins of a canvas and writes their cards.

``python -m experiments.instruments.twin_card never_fire_0`` leaves ``model_card.md``, ``metrics.json`` and a sheet of
pictures beside the twin's weights; ``--source canvas_mmdit`` measures that canvas's. Two questions: how often do
prompts that ask for what it never saw bring pictures that the judge takes for it, beside the judge's false alarms; and
does it draw everything else as well as its base? Prompts are those of validation.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.canvases import CANVASES, canvas_of, network_folder, training_command
from diffusion.canvas.classifier import HEADS
from diffusion.canvas.knowledge import Twin
from diffusion.canvas.source import CanvasSource
from diffusion.model import TextToImage
from evaluation.judges.canvas import CanvasJudge, Head
from evaluation.prompt_sets import PromptRow, read_prompt_set
from evaluation.quality.accuracy import RetainedAccuracy
from evaluation.statistics import PairedComparison, Rate
from experiments.instruments.canvas_card import SAMPLERS, STEPS, sheet

PROMPTS = Path(__file__).resolve().parents[2] / "prompts" / "canvas"

JUDGED: Mapping[str, tuple[Head, str]] = {
    "van_gogh": ("style", "van_gogh"),
    "church": ("subject", "church"),
    "fire": ("burning", "yes"),
}
"""By concept, what the judge reads it off."""

NETWORKS = {"unet": "U-Net", "transformer": "transformer"}
"""What networks are called in cards."""

SHOWN = 12
"""Pictures of each concept on the sheet."""


@dataclass(frozen=True)
class Asked:
    """Prompts that ask for a concept, and prompts that do not."""

    concept: str
    asking: list[PromptRow]
    other: list[PromptRow]

    @property
    def judge(self) -> CanvasJudge:
        """Which says whether a picture shows the concept."""
        return CanvasJudge(*JUDGED[self.concept])


def read_prompts(folder: Path = PROMPTS, limit: int | None = None) -> list[Asked]:
    """The canvas's validation prompts for every concept, ``limit`` of each kind."""
    return [
        Asked(
            concept,
            read_prompt_set(folder / f"{concept}_validation.csv", limit),
            read_prompt_set(folder / f"{concept}_retained_validation.csv", limit),
        )
        for concept in JUDGED
    ]


def generate(model: TextToImage, rows: Sequence[PromptRow], steps: int) -> Tensor:
    """The pictures of ``rows``, uint8 [n, 3, H, W]."""
    guidance = [row.guidance for row in rows]
    return model.generate(
        [row.prompt for row in rows], seeds=[row.seed for row in rows], steps=steps, guidance=guidance
    )


def lacks(row: PromptRow, concept: str) -> bool:
    """Whether the prompt asks for none of the concept."""
    head, label = JUDGED[concept]
    return row.labels[head] != ("1" if head == "burning" else label)


def measure(
    twin: Twin, *, build: str | None = None, source: str = "canvas", asked: Sequence[Asked], steps: int = STEPS
) -> tuple[dict[str, Any], Tensor]:
    """Compare ``twin`` with the model that knows all: of its own training seed, or of seed 0 if it knows all itself.

    Args:
        twin: What is measured.
        build: Where twins lie that are not shipped; None for the canvas's own folder.
        source: The canvas that both are networks of.
        asked: Prompts for every concept.
        steps: Sampler steps.

    Returns:
        The numbers, and of every concept the base's first pictures and then the twin's, uint8 [n, 3, H, W].
    """
    reference = Twin("all", twin.training_seed if twin.forgotten else 0)
    base, model = (
        CanvasSource.as_measured(source, knows=one.knows, training_seed=one.training_seed, build=build).load()
        for one in (reference, twin)
    )
    concepts: dict[str, Any] = {}
    shown = []
    for each in asked:
        pictures = {"base": generate(base, each.asking, steps), "twin": generate(model, each.asking, steps)}
        present = {name: each.judge(images).present for name, images in pictures.items()}
        others = each.judge(generate(base, each.other, steps)).present
        concepts[each.concept] = {
            "never_seen": each.concept in twin.forgotten,
            **{name: Rate.of(of).as_dict() for name, of in present.items()},
            "false_alarms": Rate.of(others).as_dict(),
            "difference": PairedComparison.of(present["twin"], present["base"]).as_dict(),
        }
        shown += [pictures["base"][:SHOWN], pictures["twin"][:SHOWN]]
    rows = [
        row
        for each in asked
        if each.concept in twin.forgotten or not twin.forgotten
        for row in each.other
        if all(lacks(row, concept) for concept in twin.forgotten)
    ]
    accuracy = RetainedAccuracy(heads=tuple(HEADS))  # type: ignore[arg-type]
    agreement = [accuracy.agreement(generate(one, rows, steps), rows) for one in (base, model)]
    retained = {
        head: {
            "base": Rate.of(agreement[0][head]).as_dict(),
            "twin": Rate.of(agreement[1][head]).as_dict(),
            "difference": PairedComparison.of(agreement[1][head], agreement[0][head]).as_dict(),
        }
        for head in HEADS
    }
    numbers = {
        "canvas": canvas_of(source).name,
        "twin": twin.name,
        "reference": reference.name,
        "steps": steps,
        "concepts": concepts,
        "retained": retained,
        "fingerprints": {"base": base.fingerprint(), "twin": model.fingerprint()},
    }
    return numbers, torch.cat(shown)


def render(numbers: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    twin, canvas = Twin.named(numbers["twin"]), CANVASES[numbers["canvas"]]
    network = NETWORKS[canvas.part]
    names = [concept.replace("_", " ") for concept in twin.forgotten]
    unseen = f"was never shown {', '.join(names)}" if names else "was shown everything"
    lines = [
        f"# {twin.name}",
        "",
        f"The {network} of {canvas.name} that {unseen}, training seed {twin.training_seed}. Everything else is as "
        "there: recipe, initial weights, order and noise of the same seed, text encoding, autoencoder and judge. It is "
        f"chosen by `model={canvas.name} model.knows={twin.knows} model.training_seed={twin.training_seed}`, and made "
        f"by `{training_command(canvas.name, twin, canvas.build)}`.",
        "",
        f"Validation prompts, {numbers['steps']} {SAMPLERS[canvas.scheduler]} steps; the base is "
        f"{numbers['reference']}. Rates with Wilson's 95 % intervals; differences of pairs, twin minus base, with "
        "Newcombe's and McNemar's exact p.",
        "",
        "## Pictures that show the concept",
        "",
        "False alarms: the base's pictures of prompts that do not ask for the concept. What encodes text and pictures "
        f"has seen every concept, and the judge knows no answer but its labels: what this {network} is credited with "
        "of a concept that it was never shown is the floor, not knowledge.",
        "",
        f"| concept | seen | this {network} | base | false alarms |",
        "|---|---|---|---|---|",
    ]
    for concept, of in numbers["concepts"].items():
        seen = "never" if of["never_seen"] else "yes"
        rates = (str(Rate(**of[name])) for name in ("twin", "base", "false_alarms"))
        lines.append(f"| {concept} | {seen} | {' | '.join(rates)} |")
    lines += [
        "",
        "## Everything else",
        "",
        "Agreement of the judge with prompts without what was never shown.",
        "",
        f"| property | this {network} | base | difference |",
        "|---|---|---|---|",
    ]
    for head, of in numbers["retained"].items():
        rates = (str(Rate(**of[name])) for name in ("twin", "base"))
        lines.append(f"| {head} | {' | '.join(rates)} | {PairedComparison(**of['difference'])} |")
    lines += ["", f"![by concept: base above, this {network} below](pictures.png)", ""]
    return "\n".join(lines)


def write_card(folder: Path, numbers: Mapping[str, Any], pictures: Tensor) -> None:
    """Write the card, its numbers and its sheet of pictures to ``folder``."""
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    (folder / "model_card.md").write_text(render(numbers))
    names = [f"{concept} {which}"[:16] for concept in numbers["concepts"] for which in ("base", "twin")]
    sheet(pictures, columns=len(pictures) // len(names), row_names=names).save(folder / "pictures.png", optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure twins and write their cards."""
    parser = argparse.ArgumentParser(description="Measure twins of a canvas and write their cards.")
    parser.add_argument("twins", nargs="+", type=Twin.named, help="such as never_fire_0")
    parser.add_argument("--source", default="canvas", help="the canvas: its name, or a folder that a recipe shipped")
    parser.add_argument("--build", default=None, help="where those lie that are not shipped; else the canvas's own")
    given = parser.parse_args(arguments)
    keep_freed_memory()
    asked = read_prompts()
    for twin in given.twins:
        numbers, pictures = measure(twin, build=given.build, source=given.source, asked=asked)
        write_card(network_folder(given.source, twin, given.build), numbers, pictures)
        print(render(numbers))


if __name__ == "__main__":
    main()
