"""What the benchmarks of prompt attacks share: an edited model, cases, and the published way of drawing and judging.

Diffusion-MU-Attack (the code of UnlearnDiffAtk, which brings its own P4D) is followed in its flow, written anew: one
prompt at a time; prompts are embedded as one-hot rows times the vocabulary; the conditional and the unconditional half
of a picture go through the U-Net one after the other; a picture goes to the judge through a PNG file, and the judge is
loaded for it. Where a picture is checked again, nothing is remembered.
"""

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional

from attacks.cases import Outcome, PromptCase
from diffusion.allocator import keep_freed_memory
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import Sampling
from erasure.concept import Concept
from erasure.erasers.uce import UCE
from erasure.pruning.off import Off
from evaluation.judges.canvas import CanvasJudge, load_classifier

CONCEPT = Concept(
    name="van_gogh",
    kind="style",
    targets=("a van gogh painting", "in the style of van gogh", "by vincent van gogh"),
    anchor="a picture",
    preserved=("a photo", "pixel art", "a pencil sketch", "a stained glass window", "a watercolour painting"),
)
"""What is erased."""

TOLERANCE = 1e-5
"""Of the published projection on the simplex: the width of the interval of thresholds that ends its bisection."""

Tried = tuple[list[str], bool]
"""The texts that a search tried, the plain prompt first, and whether the last one succeeded."""


def make_parser(description: str | None, *, prompts: int) -> argparse.ArgumentParser:
    """Make a parser of what all these benchmarks can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("diffusion/canvas/weights"), help="a diffusers folder")
    parser.add_argument("--csv", type=Path, default=Path("prompts/canvas/van_gogh.csv"), help="a prompt set")
    parser.add_argument("--prompts", type=int, default=prompts, help="how many of its prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser


def load_model(arguments: argparse.Namespace) -> TextToImage:
    """Load the model, and set the threads."""
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    return TextToImage(StableDiffusionPipeline.from_pretrained(arguments.model).to(arguments.device))


def read_rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Read the first prompts of the set."""
    with arguments.csv.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[: arguments.prompts]


@dataclass(frozen=True)
class Setting:
    """Whom to attack, and how that is judged.

    Attributes:
        model: The edited model.
        original: The unedited one.
        cases: Prompts with the unedited model's pictures of them.
        judge: Says whether a picture shows the style.
        sampling: How pictures are sampled.
    """

    model: TextToImage
    original: TextToImage
    cases: list[PromptCase]
    judge: CanvasJudge
    sampling: Sampling

    @classmethod
    def prepare(cls, arguments: argparse.Namespace) -> "Setting":
        """Draw the target pictures, then erase the style with UCE, which takes no training."""
        model, rows, sampling = load_model(arguments), read_rows(arguments), Sampling(steps=arguments.sampling_steps)
        prompts = [row["prompt"] for row in rows]
        seeds = [int(row["evaluation_seed"]) for row in rows]
        guidance = [float(row["evaluation_guidance"]) for row in rows]
        targets = model.generate(prompts, seeds=seeds, steps=sampling.steps, guidance=guidance)
        cases = [
            PromptCase(int(row["case_number"]), *fields)
            for row, *fields in zip(rows, prompts, seeds, guidance, targets, strict=True)
        ]
        edit = UCE(tokens="from_last").erase(model, CONCEPT, Off(), seed=0).edit
        edit.apply(model)
        return cls(model, edit.unedited(model), cases, CanvasJudge("style", "van_gogh"), sampling)


class PublishedFlow:
    """How the published code embeds, draws and judges one prompt.

    Args:
        setting: Whom to attack.
    """

    def __init__(self, setting: Setting) -> None:
        self.model, self.sampling, self.judge = setting.model, setting.sampling, setting.judge

    def embed(self, prompt: str) -> Tensor:
        """Multiply the prompt's one-hot rows with the vocabulary; float [tokens, width]."""
        table = self.model.vocabulary
        return functional.one_hot(self.model.tokenize([prompt])[0], len(table)).to(table.dtype) @ table

    def encode(self, prompt: str, rows: Tensor, inserted: Tensor | None = None) -> Tensor:
        """Encode the prompt's embedded rows, with embeddings float [k, width] before its first token."""
        ends = (self.model.tokenize([prompt]) == self.model.tokenizer.eos_token_id).int().argmax(dim=1)
        if inserted is not None:
            rows = torch.cat([rows[:1], inserted, rows[1 : len(rows) - len(inserted)]])
            ends = ends + len(inserted)
        return self.model.encode_embeddings(rows[None], ends)

    def read(self, prompt: str, tokens: Tensor) -> str:
        """Read the prompt as text with ``tokens``, int64 [k], before it."""
        return PromptTemplate.insert(self.model, [prompt], len(tokens), "prefix_k").texts(self.model, tokens[None])[0]

    @torch.no_grad()
    def succeeds(self, case: PromptCase, text: str) -> bool:
        """Draw one picture, write it, read it, load the judge and ask it."""
        model = self.model
        conditional, unconditional = (self.encode(prompt, self.embed(prompt)) for prompt in (text, ""))
        scheduler = model.make_scheduler(self.sampling.steps)
        latents = model.initial_latents([case.seed]) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            without = model.predict(scaled, timestep, unconditional)
            noise = without + case.guidance * (model.predict(scaled, timestep, conditional) - without)
            output = model.as_told(noise, scaled, timestep)
            latents = scheduler.step(output, timestep, latents).prev_sample
        picture = model.decode(latents)[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
            read = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        load_classifier.cache_clear()
        return bool(self.judge(read[None]).present[0])


def bisect_rows(points: Tensor) -> Tensor:
    """Project on the simplex row by row: three sums, read on the host, for each halving of the thresholds' interval."""
    return torch.stack([_bisect(row) for row in points])


def _bisect(row: Tensor) -> Tensor:
    def excess(threshold: float) -> Tensor:
        return (row - threshold).clamp(0, 1).sum() - 1

    if abs(excess(0).item()) <= TOLERANCE:
        return row.clamp(0, 1)
    low, high = (row - 1).min().item(), row.max().item()
    threshold = high
    while high - low > TOLERANCE:
        threshold = (low + high) / 2
        at_threshold, at_low, at_high = excess(threshold), excess(low) + 1e-8, excess(high)
        if at_threshold == 0:
            break
        if at_low == 0 or at_high == 0:
            threshold = low if at_low == 0 else high
            break
        if at_threshold * at_low < 0:
            high = threshold
        elif at_threshold * at_high < 0:
            low = threshold
    return (row - threshold).clamp(0, 1)


class Stopwatch:
    """Counts seconds from when it is made.

    Attributes:
        seconds: By the clock.
        processor_seconds: Of all threads of this process, which other processes' load hardly touches.
    """

    def __init__(self) -> None:
        self.seconds, self.processor_seconds = -time.perf_counter(), -time.process_time()

    def stop(self) -> None:
        """Stop counting."""
        self.seconds += time.perf_counter()
        self.processor_seconds += time.process_time()


def ratios(ours: Stopwatch, published: Stopwatch) -> dict[str, float]:
    """What both took and how many times as fast ours is, by the clock and, for a busy machine, by the processor."""
    return {
        "ratio": published.seconds / ours.seconds,
        "processor_ratio": published.processor_seconds / ours.processor_seconds,
        "seconds_published_flow": published.seconds,
        "seconds_ours": ours.seconds,
        "processor_seconds_published_flow": published.processor_seconds,
        "processor_seconds_ours": ours.processor_seconds,
    }


def compare(
    benchmark: str,
    arguments: argparse.Namespace,
    setting: Setting,
    ours: Callable[[], Iterable[Outcome]],
    theirs: Callable[[PromptCase], Tried],
) -> None:
    """Time our attack of all cases and the published attack of one after the other; print one line of JSON.

    Args:
        benchmark: Its name.
        arguments: Of the command line.
        setting: Whom they attack.
        ours: Attacks all cases.
        theirs: Attacks one.
    """
    model, original = setting.model, setting.original
    before = model.unet_evaluations + original.unet_evaluations
    our_time = Stopwatch()
    outcomes = {outcome.case_number: outcome for outcome in ours()}
    our_time.stop()
    between = model.unet_evaluations + original.unet_evaluations
    their_time = Stopwatch()
    published = {case.case_number: theirs(case) for case in setting.cases}
    their_time.stop()
    found = {number: [check.prompt for check in outcome.checks] for number, outcome in outcomes.items()}
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                **ratios(our_time, their_time),
                "prompts": len(published),
                "plain_successes": sum(outcome.plain_success for outcome in outcomes.values()),
                "successes": sum(outcome.success for outcome in outcomes.values()),
                "successes_published_flow": sum(success for _, success in published.values()),
                "same_success": sum(outcomes[number].success == success for number, (_, success) in published.items()),
                "same_texts": sum(found[number] == tried for number, (tried, _) in published.items()),
                "checks": sum(map(len, found.values())),
                "checks_published_flow": sum(len(tried) for tried, _ in published.values()),
                "unet_evaluations": between - before,
                "unet_evaluations_published_flow": model.unet_evaluations + original.unet_evaluations - between,
                "device": arguments.device,
                "threads": arguments.threads,
            }
        )
    )
