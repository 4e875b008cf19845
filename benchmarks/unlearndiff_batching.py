"""UnlearnDiffAtk on many prompts: all in one batch against one prompt at a time. Prints one line of JSON.

Targets are the model's own pictures of the prompts. The verdict is whether a picture is bright, so that no judge has to
be loaded and the searches end at different checks.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from attacks.cases import Outcome, PromptCase
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.allocator import keep_freed_memory
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.verdicts import Verdicts


def main() -> None:
    """Time both and compare the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("diffusion/canvas/weights"), help="a diffusers folder")
    parser.add_argument("--csv", type=Path, default=Path("prompts/canvas/van_gogh.csv"), help="a prompt set")
    parser.add_argument("--prompts", type=int, default=32, help="how many of its prompts")
    parser.add_argument("--timesteps", type=int, default=10)
    parser.add_argument("--steps-per-timestep", type=int, default=10)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    model = TextToImage(StableDiffusionPipeline.from_pretrained(arguments.model).to(arguments.device))
    sampling = Sampling(steps=arguments.sampling_steps)
    cases = load_cases(model, arguments.csv, arguments.prompts, sampling)
    judge = BrightnessJudge(torch.stack([case.target for case in cases if case.target is not None]))

    def attack(batch_size: int) -> tuple[float, dict[int, Outcome]]:
        search = UnlearnDiffAtk(
            timesteps=arguments.timesteps,
            steps_per_timestep=arguments.steps_per_timestep,
            learning_rate=0.1,
            batch_size=batch_size,
        )
        started = time.perf_counter()
        outcomes = {outcome.case_number: outcome for outcome in search.run(model, cases, judge, sampling=sampling)}
        return time.perf_counter() - started, outcomes

    together_seconds, together = attack(len(cases))
    alone_seconds, alone = attack(1)
    print(
        json.dumps(
            {
                "benchmark": "unlearndiff_batching",
                "ratio": alone_seconds / together_seconds,
                "seconds_one_at_a_time": alone_seconds,
                "seconds_one_batch": together_seconds,
                "prompts": len(cases),
                "same_success": sum(alone[number].success == together[number].success for number in alone),
                "same_texts": sum(texts(alone[number]) == texts(together[number]) for number in alone),
                "unet_evaluations": sum(outcome.unet_evaluations for outcome in together.values()),
                "device": arguments.device,
            }
        )
    )


class BrightnessJudge:
    """Finds the concept in pictures that are brighter than nine in ten of the given ones."""

    def __init__(self, images: torch.Tensor) -> None:
        self.threshold = images.float().mean(dim=(1, 2, 3)).quantile(0.9)

    def __call__(self, images: torch.Tensor) -> Verdicts:
        """Judge every picture by itself."""
        brightness = images.float().mean(dim=(1, 2, 3))
        return Verdicts(brightness > self.threshold, brightness / 255)


def load_cases(model: TextToImage, path: Path, count: int, sampling: Sampling) -> list[PromptCase]:
    """Read the first ``count`` prompts; their targets are what the model makes of them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    prompts = [row["prompt"] for row in rows]
    seeds = [int(row["evaluation_seed"]) for row in rows]
    guidance = [float(row["evaluation_guidance"]) for row in rows]
    targets = model.generate(prompts, seeds=seeds, steps=sampling.steps, guidance=guidance)
    return [
        PromptCase(int(row["case_number"]), *fields)
        for row, *fields in zip(rows, prompts, seeds, guidance, targets, strict=True)
    ]


def texts(outcome: Outcome) -> list[str]:
    """Every text that was tried."""
    return [check.prompt for check in outcome.checks]


if __name__ == "__main__":
    main()
