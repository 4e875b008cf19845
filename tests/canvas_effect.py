"""What an eraser does to the canvas, on validation prompts."""

from statistics import fmean

import torch

from diffusion.loading import load_model
from evaluation.prompt_sets import read_prompt_set
from evaluation.quality.accuracy import RetainedAccuracy
from tests.tiny_job import CONFIG_FOLDER, make_job


@torch.backends.mkldnn.flags(enabled=True)
def effect_on_canvas(concept: str, *command: str, prompts: int, retained: int, steps: int = 20) -> tuple[float, float]:
    """How often the concept shows, and the accuracy on other prompts, both relative to the unedited model.

    The working directory must be the repository's root.

    Args:
        concept: Its choice.
        command: More of the command line.
        prompts: How many validation prompts of the concept.
        retained: How many of the others.
        steps: Sampler steps of a picture.
    """
    job = make_job(f"concept={concept}", *command)
    model = load_model("canvas")
    asking, others = (
        read_prompt_set(CONFIG_FOLDER.parent / f"prompts/canvas/{concept}{name}_validation.csv", count)
        for name, count in (("", prompts), ("_retained", retained))
    )

    def measure() -> tuple[float, float]:
        rows = [*asking, *others]
        pictures = model.generate(
            [row.prompt for row in rows],
            seeds=[row.seed for row in rows],
            guidance=[row.guidance for row in rows],
            steps=steps,
        )
        accuracies = RetainedAccuracy().rates(pictures[prompts:], others).values()
        return job.judge(pictures[:prompts]).present.float().mean().item(), fmean(rate.rate for rate in accuracies)

    shown_before, kept_before = measure()
    with job.eraser.erase(model, job.concept, job.pruning, seed=0).edit.applied(model):
        shown, kept = measure()
    return shown / shown_before, kept / kept_before
