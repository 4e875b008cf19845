"""What a GPU makes of the methods at Stable Diffusion 1.4's size, with random weights; nothing is downloaded.

Measures pictures per second, training steps of ESD and P-ESD per second, a step of UnlearnDiffAtk on one prompt and on
the batch that is fastest for a prompt, each in several precisions with its peak memory and with how often a step makes
the processor wait for the device; the same step in the published control flow (:mod:`unlearndiff_published_flow`); and
whether the canvas's pictures and verdicts are those of the CPU. Prints a line of JSON for each as soon as it is there,
and leaves out what no longer fits into ``--minutes``. A step is timed as the difference between a long run and a short
one, so that neither loading nor the first call's preparation counts.

``--quick`` does all of it with a network of a few thousand weights, on a CPU too, in some seconds.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from published_flow import Setting
from sd14_full_size import PROMPT, Undrawn, make_case, make_pipeline, make_tokenizer, never
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel
from unlearndiff_published_flow import PublishedUnlearnDiffAtk

from attacks.cases import PromptCase
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.canvas.plan import make_scheduler
from diffusion.loading import load_model
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.erasers.esd import ESD
from erasure.erasers.uce import UCE
from erasure.pruning.learned import Learned
from erasure.pruning.off import Off
from evaluation.judges.canvas import CanvasJudge
from experiments.job.cost import peak_memory_bytes, reset_peak_memory

CONCEPT = Concept("van_gogh", "style", targets=("van gogh",), anchor="a picture", preserved=("a photo",))
CANVAS_PROMPTS = ("a van gogh painting of a church", "a church in the style of van gogh", "a photo of a red fish")
WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"})
"""Calls of the driver in which the processor waits for the device."""


@dataclass(frozen=True)
class Precision:
    """How the U-Net computes.

    Attributes:
        name: Of the precision in the output.
        weights: Of its weights.
        autocast: Of its arithmetic, if that is another.
        channels_last: Whether its tensors lie pixel by pixel.
    """

    name: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    channels_last: bool = False

    def of(self, pipeline: StableDiffusionPipeline, device: str, kind: type[TextToImage]) -> TextToImage:
        """The pipeline as a model that computes so; the pipeline itself is changed."""
        pipeline = pipeline.to(device, self.weights)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        pipeline.unet.to(memory_format=layout)
        return kind(pipeline, name="random", autocast=self.autocast)


FLOAT32 = Precision("fp32")
AUTOCAST = Precision("bf16_autocast", autocast=torch.bfloat16)
CHANNELS_LAST = Precision("bf16_autocast, channels last", autocast=torch.bfloat16, channels_last=True)
BFLOAT16 = Precision("bf16", weights=torch.bfloat16)


@dataclass
class Bench:
    """One run of all measurements.

    Attributes:
        device: As torch names it.
        minutes: After so many no further measurement begins.
        steps: How many steps a long run has more than a short one.
        pictures: How many are drawn at a time.
        batches: Prompts that UnlearnDiffAtk is tried on at a time, in rising order.
        pipeline: What is measured.
        started: When, on :func:`time.perf_counter`.
    """

    device: str
    minutes: float
    steps: int
    pictures: int
    batches: Sequence[int]
    pipeline: StableDiffusionPipeline
    started: float

    def report(self, measure: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Print what ``work`` measures, or that there is no time or no memory for it."""
        spent = time.perf_counter() - self.started
        reset_peak_memory()
        if spent > 60 * self.minutes:
            found: dict[str, Any] = {"skipped": f"{spent:.0f} s have passed"}
        else:
            try:
                found = work()
                found["peak_gib"] = peak_memory_bytes() / 2**30
            except torch.OutOfMemoryError:
                found = {"skipped": "out of memory"}
        print(json.dumps({"benchmark": "gpu", "measure": measure, **found, "device": device_name(self.device)}))
        return found

    def model(self, precision: Precision, kind: type[TextToImage] = Undrawn) -> TextToImage:
        """The pipeline in a precision; ``kind`` may draw no pictures, which then cost nothing."""
        return precision.of(self.pipeline, self.device, kind)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done ``work``."""
        wait(self.device)
        begin = time.perf_counter()
        work()
        wait(self.device)
        return time.perf_counter() - begin

    def seconds_per_step(self, run: Callable[[int], object]) -> float:
        """Of ``run(steps)``, what it was not to prepare."""
        run(2)
        short, long = self.timed(partial(run, 2)), self.timed(partial(run, 2 + self.steps))
        return max(long - short, 1e-9) / self.steps

    def pictures_per_second(self, precision: Precision, sampling_steps: int) -> dict[str, Any]:
        """Guided pictures in one batch."""
        model = self.model(precision, TextToImage)
        draw = partial(model.generate, seeds=range(self.pictures), guidance=7.5, batch_size=self.pictures)
        prompts = [PROMPT] * self.pictures
        draw(prompts, steps=1)
        seconds = self.timed(lambda: draw(prompts, steps=sampling_steps))
        shown = {"batch": self.pictures, "sampling_steps": sampling_steps, "precision": precision.name}
        return {"pictures_per_second": self.pictures / seconds, **shown}

    def training(self, precision: Precision, pruning: Callable[[int], Off | Learned]) -> dict[str, Any]:
        """Steps of ESD-x per second, the trajectories' not counted."""
        model = self.model(precision)

        def run(steps: int) -> None:
            eraser = ESD(scope="xattn", steps=steps, batch_size=1)
            eraser.erase(model, CONCEPT, pruning(steps), seed=0)

        seconds = self.seconds_per_step(run)
        return {"steps_per_second": 1 / seconds, **self.waits(run), "batch": 1, "precision": precision.name}

    def unlearndiff(self, precision: Precision, prompts: int) -> dict[str, Any]:
        """A search step on ``prompts`` prompts at a time."""
        model = self.model(precision)
        cases = [replace(make_case(model), case_number=number) for number in range(prompts)]

        def run(steps: int) -> None:
            attack = UnlearnDiffAtk(timesteps=1, steps_per_timestep=steps, batch_size=prompts)
            list(attack.run(model, cases, never, sampling=Sampling(steps=1)))

        seconds = self.seconds_per_step(run)
        shown = {"prompts": prompts, "precision": precision.name}
        return {"ms_per_step_and_prompt": 1e3 * seconds / prompts, **self.waits(run), **shown}

    def published_unlearndiff(self) -> dict[str, Any]:
        """The same step of one prompt in the published flow, which is in float32."""
        model = self.model(FLOAT32, TextToImage)
        setting = Setting(model, model, [make_case(model)], never, Sampling(steps=1))

        def run(steps: int) -> None:
            PublishedUnlearnDiffAtk(setting, UnlearnDiffAtk(timesteps=1, steps_per_timestep=steps)).attack(
                setting.cases[0]
            )

        return {"ms_per_step_and_prompt": 1e3 * self.seconds_per_step(run), "prompts": 1, "precision": "fp32"}

    def waits(self, run: Callable[[int], object]) -> dict[str, float]:
        """How often a step of ``run`` lets the processor wait for the device, and how often it asks for a number."""
        counts = []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device != "cpu" else [])]
        for steps in (2, 4):
            with profile(activities=activities) as trace:
                run(steps)
            called = {event.key: event.count for event in trace.key_averages()}
            waited = sum(called.get(name, 0) for name in WAITS)
            counts.append((waited, called.get("aten::_local_scalar_dense", 0)))
        (waits, numbers), (more_waits, more_numbers) = counts
        return {"waits_per_step": (more_waits - waits) / 2, "numbers_read_per_step": (more_numbers - numbers) / 2}

    def canvas_equality(self, steps: int, checks: int) -> dict[str, Any]:
        """Pictures and verdicts of the canvas on the device beside those of the CPU."""
        pictures, found = [], []
        for device in ("cpu", self.device):
            model = load_model("canvas", device=device)
            edit = UCE(tokens="from_last").erase(model, CONCEPT, Off(), seed=0).edit
            targets = model.generate(CANVAS_PROMPTS, seeds=range(3), steps=steps, guidance=3.0)
            cases = [
                PromptCase(number, prompt, number, 3.0, target)
                for number, (prompt, target) in enumerate(zip(CANVAS_PROMPTS, targets, strict=True))
            ]
            attack = UnlearnDiffAtk(timesteps=checks, steps_per_timestep=3, learning_rate=0.1)
            with edit.applied(model):
                outcomes = attack.run(model, cases, CanvasJudge("style", "van_gogh"), sampling=Sampling(steps=steps))
                found.append({one.case_number: (one.success, one.adversarial_prompt) for one in outcomes})
            pictures.append(targets.double())
        distance = (pictures[0] - pictures[1]).abs()
        same = [found[0][number] == found[1][number] for number in found[0]]
        verdicts = [found[0][number][0] == found[1][number][0] for number in found[0]]
        return {
            "largest_difference_of_a_pixel": distance.max().item(),
            "mean_difference_of_a_pixel": distance.mean().item(),
            "prompts": len(verdicts),
            "same_verdicts": sum(verdicts),
            "same_texts_and_verdicts": sum(same),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.5, help="no measurement begins later than this")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: does it run?")
    told = parser.parse_args(arguments)
    if told.device == "cpu" and not told.quick:
        parser.error("there is no GPU here: take --quick, or benchmarks/sd14_full_size.py for a CPU.")
    started = time.perf_counter()
    quick = told.quick
    bench = Bench(
        told.device,
        told.minutes,
        *((2, 2, (1, 2)) if quick else (10, 8, (1, 2, 4, 8, 16, 32, 64))),
        make_small_pipeline() if quick else make_pipeline(),
        started,
    )
    sampling_steps = 2 if quick else 20
    for precision in (FLOAT32, BFLOAT16):
        bench.report("pictures", partial(bench.pictures_per_second, precision, sampling_steps))
    for precision in (FLOAT32, AUTOCAST, CHANNELS_LAST):
        bench.report("esd", partial(bench.training, precision, lambda _: Off()))
    bench.report("p_esd", partial(bench.training, AUTOCAST, lambda steps: Learned(scope=None, steps=steps)))
    published = bench.report("unlearndiff_published_flow", bench.published_unlearndiff)
    for precision in (FLOAT32, AUTOCAST, CHANNELS_LAST):
        bench.report("unlearndiff", partial(bench.unlearndiff, precision, 1))
    best = fastest_batch(bench)
    if "ms_per_step_and_prompt" in published and best:
        name = "ms_per_step_and_prompt"
        ratio = {"ratio": published[name] / best[name], "prompts": best["prompts"], "precision": best["precision"]}
        print(json.dumps({"benchmark": "gpu", "measure": "unlearndiff_ratio", **ratio}))
    bench.report("canvas_equality", partial(bench.canvas_equality, 4 if quick else 20, 1 if quick else 4))
    print(json.dumps({"benchmark": "gpu", "measure": "all", "seconds": time.perf_counter() - started}))


def fastest_batch(bench: Bench) -> dict[str, Any] | None:
    """Try more and more prompts at a time until a prompt's step gets no cheaper; the best of them."""
    best: dict[str, Any] | None = None
    for prompts in bench.batches:
        found = bench.report("unlearndiff_batch", partial(bench.unlearndiff, AUTOCAST, prompts))
        if "skipped" in found:
            break
        if best is not None and found["ms_per_step_and_prompt"] > 0.97 * best["ms_per_step_and_prompt"]:
            break
        best = found
    return best


def wait(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device


def make_small_pipeline() -> StableDiffusionPipeline:
    """Build the same kinds of networks with a few thousand weights: 8x8 latents, 16x16 pictures."""
    torch.set_rng_state(stream(0, "benchmarks/small_weights").get_state())
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**text, num_attention_heads=2, pad_token_id=ends["eos_token_id"], **ends)
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
