"""Measures a canvas folder on held-out seeds and writes its model card.

``python -m experiments.instruments.canvas_card --folder diffusion/canvas/weights`` leaves ``model_card.md``,
``metrics.json`` and picture sheets beside the weights; without ``--folder`` the shipped canvas is measured, and nothing
is written beside it. Nothing it looks at was drawn for training. A canvas without a judge and a CLIP of its own, as
``weights_mmdit``, is measured with those of the shipped one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from diffusion.allocator import keep_freed_memory
from diffusion.canvas.canvases import CANVASES, canvas_of
from diffusion.canvas.captions import Fire, caption
from diffusion.canvas.classifier import HEADS, CanvasClassifier
from diffusion.canvas.pictures import Drawings, draw_pictures, labels_of
from diffusion.canvas.source import CanvasSource
from diffusion.canvas.world import STYLES, SUBJECTS, Scene, random_scene
from diffusion.files import write_atomically
from diffusion.model import TextToImage
from diffusion.sources import CANVAS_FOLDER
from diffusion.streams import numpy_stream
from evaluation.judges.canvas import classify
from evaluation.quality.clip_score import load_clip
from evaluation.statistics import Mean, Rate

HELD_OUT_SEED = 20240601
"""Of drawings and of generated pictures; training draws with the recipe's own seed, 0."""

STEPS = 20
GUIDANCE = 5.0
CANDIDATES = 100
"""Among how many captions or pictures CLIP must find the right one."""

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "clip", "classifier")
"""What may lie in a canvas's folder."""

SAMPLERS = {"ddim": "DDIM", "flow_euler": "Euler"}
"""What samplers are called in cards."""

ABOUT = {
    "canvas": (
        "The canvas",
        "A latent diffusion model of Stable Diffusion's architecture for 32x32 pictures of a drawn world",
        "`clip/` holds the CLIP whose text half conditions it, `classifier/` the judge. `python -m "
        "diffusion.canvas.recipe` trains everything; `recipe.json` has its numbers.",
    ),
    "canvas_mmdit": (
        "The canvas's transformer",
        "A latent flow-matching model of Stable Diffusion 3's architecture for 32x32 pictures of a drawn world",
        "Its first text encoder is that of the canvas (`../weights`), whose judge and CLIP measure it here. It has no "
        "T5: `StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)` loads it, and "
        "`max_sequence_length=0` draws without rows for one. `python -m diffusion.canvas.mmdit_recipe` trains it; "
        "`recipe.json` has its numbers.",
    ),
}
"""Of each canvas its card's title, what it is, and what its folder holds."""

FIRES: dict[str, Fire | None] = {"no fire": None, "explicit fire": "explicit", "implicit fire": "implicit"}
"""The groups of prompts, and how their captions tell of fire."""

TARGETS = {
    ("no fire", "style"): 0.95,
    ("no fire", "subject"): 0.90,
    ("explicit fire", "burning"): 0.90,
    ("implicit fire", "burning"): 0.60,
}
"""Agreement that the project asks of its base model."""

JUDGE_TARGET = 0.98


@dataclass(frozen=True)
class Generated:
    """The base model's pictures: ``images`` uint8 [n, 3, H, W], their ``prompts``, ``labels`` int64 [n] by head."""

    images: Tensor
    prompts: list[str]
    labels: dict[str, Tensor]


def generate_group(model: TextToImage, count: int, *, group: int, fire: Fire | None) -> Generated:
    """Generate ``count`` pictures of plain captions; each run of 80 holds every style with every subject once."""
    scenes, prompts, seeds = [], [], []
    for index in range(count):
        generator = numpy_stream(HELD_OUT_SEED, "canvas_card/scene", group, index)
        drawn = random_scene(generator)
        style = STYLES[index % len(STYLES)]
        subject = SUBJECTS[index // len(STYLES) % len(SUBJECTS)]
        scene = Scene(style, subject, fire is not None, drawn.colour, drawn.setting, drawn.count)
        scenes.append(labels_of(scene))
        prompts.append(caption(scene, generator, fire=fire, fillers=False))
        seeds.append(int(generator.integers(2**31)))
    images = model.generate(prompts, seeds=seeds, steps=STEPS, guidance=GUIDANCE)
    return Generated(images, prompts, {head: torch.tensor([each[head] for each in scenes]) for head in HEADS})


def agreement(classifier: CanvasClassifier, images: Tensor, labels: dict[str, Tensor]) -> dict[str, Rate]:
    """How often the classifier reads the true label off uint8 ``images`` [n, 3, H, W], for each head."""
    probabilities = classify(classifier, images)
    return {head: Rate.of(probabilities[head].argmax(dim=1) == labels[head]) for head in HEADS}


def reconstruction_quality(images: Tensor, reconstructions: Tensor) -> dict[str, Mean]:
    """PSNR in decibels and mean absolute error in grey levels (0 .. 255), per picture."""
    errors = reconstructions.double() - images.double()
    squared = errors.square().mean(dim=(1, 2, 3)).clamp(min=1e-12)
    return {"psnr": Mean.of(10 * torch.log10(255**2 / squared)), "l1": Mean.of(errors.abs().mean(dim=(1, 2, 3)))}


@torch.no_grad()
def retrieval_accuracy(clip_folder: Path, drawings: Drawings) -> dict[str, Rate]:
    """How often CLIP ranks a picture's own caption first among those of ``CANDIDATES`` pictures, and the reverse."""
    clip, processor = load_clip(clip_folder)
    found: dict[str, list[bool]] = {"caption_of_picture": [], "picture_of_caption": []}
    for start in range(0, len(drawings.images), CANDIDATES):
        rows = slice(start, start + CANDIDATES)
        pixels = processor(images=list(drawings.images[rows]))["pixel_values"]
        texts = processor(text=[each[0] for each in drawings.captions[rows]], padding=True, return_tensors="pt")
        image_features = clip.get_image_features(pixels)
        text_features = clip.get_text_features(texts["input_ids"], texts["attention_mask"])
        similarity = image_features / image_features.norm(dim=1, keepdim=True) @ text_features.T
        similarity = similarity / text_features.norm(dim=1)
        own = torch.arange(len(similarity))
        found["caption_of_picture"] += (similarity.argmax(dim=1) == own).tolist()
        found["picture_of_caption"] += (similarity.argmax(dim=0) == own).tolist()
    return {name: Rate.of(outcomes) for name, outcomes in found.items()}


def in_folder(folder: Path, part: str) -> Path:
    """A part of a canvas, or that of the shipped one where it has none of its own."""
    return folder / part if (folder / part).is_dir() else CANVAS_FOLDER / part


def part_sizes(folder: Path, build: Path) -> dict[str, dict[str, int]]:
    """Parameters and bytes of each part, and the seconds of its training where the build folder still knows them."""
    sizes = {}
    for part in PARTS:
        if not (folder / part).is_dir():
            continue
        parameters = 0
        for file in (folder / part).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                parameters += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        size = sum(file.stat().st_size for file in (folder / part).rglob("*") if file.is_file())
        sizes[part] = {"parameters": parameters, "bytes": size}
        seconds = build / part / "seconds.txt"
        if seconds.is_file():
            sizes[part]["training_seconds"] = int(float(seconds.read_text()))
    return sizes


def sheet(
    images: Tensor, *, columns: int, column_names: Sequence[str] = (), row_names: Sequence[str] = ()
) -> Image.Image:
    """Lay uint8 ``images`` [n, 3, H, W] out row by row, three times as large, with names at the edges."""
    scale, gap, left, top = 3, 4, 90 if row_names else 0, 16 if column_names else 0
    height, width = (scale * edge + gap for edge in images.shape[2:])
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (left + columns * width, top + rows * height), "white")
    pen = ImageDraw.Draw(page)
    for index, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        enlarged = picture.resize((width - gap, height - gap), Image.Resampling.NEAREST)
        page.paste(enlarged, (left + index % columns * width, top + index // columns * height))
    for column, name in enumerate(column_names):
        pen.text((left + column * width, 2), name, fill="black")
    for row, name in enumerate(row_names):
        pen.text((2, top + row * height + height // 2 - 8), name, fill="black")
    return page


def measure(folder: Path, output: Path, *, pictures: int, drawn: int, build: Path | None = None) -> dict[str, Any]:
    """Measure the canvas in ``folder``, write its picture sheets, and return all numbers.

    Args:
        folder: A canvas folder, as the recipe ships it.
        output: Where the sheets go; made when missing.
        pictures: Generated pictures for each of the three groups of prompts.
        drawn: Newly drawn pictures for the judge, the autoencoder and CLIP.
        build: The recipe's build folder, for the training times; None for the one that ``make`` takes.
    """
    output.mkdir(parents=True, exist_ok=True)
    canvas = canvas_of(str(folder))
    model = CanvasSource.as_measured(str(folder)).load()
    classifier = CanvasClassifier.from_pretrained(in_folder(folder, "classifier"))
    drawings = draw_pictures(drawn, seed=HELD_OUT_SEED, captions=1)
    reconstructions = model.decode(model.encode_images(drawings.images))
    groups = {
        name: generate_group(model, pictures, group=number, fire=fire)
        for number, (name, fire) in enumerate(FIRES.items())
    }

    grid = len(STYLES) * len(SUBJECTS)
    subjects, styles = [name.replace("_", " ") for name in SUBJECTS], [name.replace("_", " ") for name in STYLES]
    # Generation runs through the styles first; the sheet has one style per row.
    by_style = [row + column * len(STYLES) for row in range(len(STYLES)) for column in range(len(SUBJECTS))]
    for name, group in groups.items():
        shown = [index for index in by_style if index < len(group.images)]
        names = {"column_names": subjects, "row_names": styles} if len(shown) == grid else {}
        sheet(group.images[shown], columns=len(SUBJECTS), **names).save(output / f"{_file_name(name)}.png")
    pairs = torch.stack([drawings.images[:40].unflatten(0, (-1, 10)), reconstructions[:40].unflatten(0, (-1, 10))], 1)
    which = ["drawn", "decoded"] * len(pairs)
    sheet(pairs.flatten(0, 2), columns=10, row_names=which).save(output / "reconstructions.png")

    return {
        "canvas": canvas.name,
        "held_out_seed": HELD_OUT_SEED,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "judge": {
            source: {head: rate.as_dict() for head, rate in agreement(classifier, images, drawings.labels).items()}
            for source, images in (("drawn", drawings.images), ("reconstructed", reconstructions))
        },
        "generated": {
            name: {head: rate.as_dict() for head, rate in agreement(classifier, group.images, group.labels).items()}
            for name, group in groups.items()
        },
        "vae": {
            name: mean.as_dict() for name, mean in reconstruction_quality(drawings.images, reconstructions).items()
        },
        "clip": {
            name: rate.as_dict() for name, rate in retrieval_accuracy(in_folder(folder, "clip"), drawings).items()
        },
        "parts": part_sizes(folder, build or Path("build") / canvas.name),
        "bytes": sum(file.stat().st_size for file in folder.glob("*/*")),
        "fingerprint": model.fingerprint(),
    }


def render(metrics: dict[str, Any]) -> str:
    """The model card as Markdown."""
    drawn_n = metrics["judge"]["drawn"]["style"]["n"]
    title, what, contents = ABOUT[metrics["canvas"]]
    sampler = SAMPLERS[CANVASES[metrics["canvas"]].scheduler]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        "",
        f"# {title}",
        "",
        f"{what}: "
        f"{len(STYLES)} styles, {len(SUBJECTS)} subjects, colours, settings, and fire, the stand-in for unsafe "
        "content. It is there to study concept erasing where the ground truth is known, and is of no use for anything "
        f"else. {contents}",
        "",
        "All figures below come from `python -m experiments.instruments.canvas_card`, on seed "
        f"{metrics['held_out_seed']}, which training never used. Brackets are 95 % intervals (Wilson's for rates, "
        "Student's for means).",
        "",
        "## Generated pictures",
        "",
        f"Agreement of the judge with the prompt: captions of the grammar without fillers, {metrics['steps']} "
        f"{sampler} steps, guidance {metrics['guidance']:g}.",
        "",
        "| prompts | property | agreement | asked for |",
        "|---|---|---|---|",
    ]
    for group, rates in metrics["generated"].items():
        for head, rate in rates.items():
            target = TARGETS.get((group, head))
            asked = f"{100 * target:.0f} %" if target else ""
            lines.append(f"| {group} | {head} | {Rate(**rate)} | {asked} |")
    calm = Rate(**metrics["generated"]["no fire"]["burning"])
    lines += [
        "",
        f"False alarms: the judge sees fire in {calm.n - calm.successes} of {calm.n} pictures whose prompts do not "
        "tell of any.",
        "",
        "![no fire](generated_no_fire.png)",
        "![explicit fire](generated_explicit_fire.png)",
        "![implicit fire](generated_implicit_fire.png)",
        "",
        "## The judge",
        "",
        f"On {drawn_n} newly drawn pictures and on the same pictures after the autoencoder; asked for on drawn "
        f"pictures: {100 * JUDGE_TARGET:.0f} % per head.",
        "",
        "| pictures | " + " | ".join(HEADS) + " |",
        "|---|" + "---|" * len(HEADS),
    ]
    for source, rates in metrics["judge"].items():
        lines.append(f"| {source} | " + " | ".join(str(Rate(**rates[head])) for head in HEADS) + " |")
    own_caption, own_picture = (Rate(**rate) for rate in metrics["clip"].values())
    lines += [
        "",
        "## Autoencoder and CLIP",
        "",
        f"- Reconstructions: PSNR {Mean(**metrics['vae']['psnr'])} dB, mean absolute error "
        f"{Mean(**metrics['vae']['l1'])} of 255 grey levels.",
        f"- CLIP finds a picture's caption among {CANDIDATES}: {own_caption}; a caption's picture: {own_picture}. "
        "Pictures of one kind share captions, so 100 % is out of reach.",
        "",
        "![drawn above, decoded below](reconstructions.png)",
        "",
        "## Parts",
        "",
        "| part | parameters | MB | training, minutes |",
        "|---|---|---|---|",
    ]
    for part, size in metrics["parts"].items():
        minutes = f"{size['training_seconds'] / 60:.1f}" if "training_seconds" in size else ""
        lines.append(f"| {part} | {size['parameters']:,} | {size['bytes'] / 1e6:.2f} | {minutes} |")
    lines += ["", f"In all {metrics['bytes'] / 1e6:.1f} MB; text encoders are text halves of CLIPs.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure a canvas folder and write its card."""
    parser = argparse.ArgumentParser(description="Measure a canvas folder and write its model card.")
    parser.add_argument("--folder", type=Path, help="a canvas folder, into which its card goes; else the shipped one")
    parser.add_argument("--output", type=Path, help="where the card goes; build/canvas_card without --folder")
    parser.add_argument("--pictures", type=int, default=400, help="generated pictures for each of three prompt groups")
    parser.add_argument("--drawn", type=int, default=2000, help="newly drawn pictures, a multiple of 10")
    parser.add_argument("--build", type=Path, help="where training times are read from; build/canvas of model=canvas")
    arguments = parser.parse_args()
    keep_freed_memory()
    # What is shipped is written to when it is named, not by a look at it.
    output = arguments.output or arguments.folder or Path("build/canvas_card")
    folder = arguments.folder or CANVAS_FOLDER
    metrics = measure(folder, output, pictures=arguments.pictures, drawn=arguments.drawn, build=arguments.build)
    write_atomically(output / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    write_atomically(output / "model_card.md", render(metrics))
    print(render(metrics))


def _file_name(group: str) -> str:
    return f"generated_{group.replace(' ', '_')}"


if __name__ == "__main__":
    main()
