"""Stable Diffusion 1.4 at its full size with random weights: what loading, a step of each method and a picture cost.

Nothing is downloaded: the parts are built from their published configuration, with CLIP's own vocabulary, and written
as a diffusers folder of float32 weights (4 GB, removed at the end), which is loaded as ``model=folder`` loads one.
Prints a line of JSON for each stage. Every stage runs in a process of its own, whose peak memory holds the loaded
model. Steps are timed without the pictures that they start from: a trajectory's steps cost what the picture's do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attacks.cases import PromptCase
from attacks.p4d import P4D
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.canvas.plan import make_scheduler
from diffusion.loading import load_model
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.esd import ESD
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.off import Off
from evaluation.judges.nudenet import LABELS, NudeNet
from evaluation.verdicts import Verdicts
from experiments.job.cost import peak_memory_bytes

PROMPT = "a painting of a church by van gogh"
LEVELS = 4
PICTURE = "picture.png"


def main() -> None:
    """Build the model, then measure each stage in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--picture", type=Path, help="where the picture is kept")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.folder:
        (stage,) = arguments.stages
        measures = STAGES[stage](arguments.folder)
        peak = peak_memory_bytes() / 2**30
        report = {"benchmark": "sd14_full_size", "stage": stage, **measures, "peak_gib": peak}
        print(json.dumps(report | {"device": "cpu", "threads": arguments.threads}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline().save_pretrained(folder)
        for stage in arguments.stages:
            command = [sys.executable, __file__, "--folder", folder, "--stages", stage]
            subprocess.run([*command, "--threads", str(arguments.threads)], check=True)
        if arguments.picture and (Path(folder) / PICTURE).exists():
            arguments.picture.write_bytes((Path(folder) / PICTURE).read_bytes())


class Undrawn(TextToImage):
    """A model whose pictures are noise: they cost no evaluation."""

    def sample(self, text: Tensor, *, seeds: Sequence[int], **_: Any) -> Tensor:
        """Return the initial noise."""
        return self.initial_latents(seeds)


def measure_loading(folder: Path) -> dict[str, Any]:
    """Load the folder."""
    started = time.perf_counter()
    model = load_model(str(folder), scheduler="lms")
    return {
        "seconds": time.perf_counter() - started,
        "parameters": sum(
            p.numel() for part in (model.network, model.text_encoder, model.vae) for p in part.parameters()
        ),
        "latents": list(model.latent_shape),
    }


def measure_esd(folder: Path, pruning: Off | Learned) -> dict[str, Any]:
    """Take one training step of ESD-x."""
    concept = Concept("van_gogh", "style", targets=("van gogh",))
    model = load_undrawn(folder)
    started = time.perf_counter()
    erasure = ESD(scope="xattn", steps=1, batch_size=1).erase(model, concept, pruning, seed=0)
    return {
        "seconds": time.perf_counter() - started,
        "unet_evaluations": erasure.unet_evaluations,
        "loss": erasure.losses[0],
        "edit_bytes": erasure.edit.size_bytes,
    }


def measure_unlearndiff(folder: Path) -> dict[str, Any]:
    """Take one step of UnlearnDiffAtk on one prompt."""
    model = load_undrawn(folder)
    attack = UnlearnDiffAtk(timesteps=1, steps_per_timestep=1)
    started = time.perf_counter()
    (outcome,) = attack.run(model, [make_case(model)], never, sampling=Sampling(steps=1))
    return {
        "seconds": time.perf_counter() - started,
        "unet_evaluations": model.unet_evaluations,
        "loss": outcome.checks[-1].loss,
    }


def measure_p4d(folder: Path) -> dict[str, Any]:
    """Take one step of P4D, which needs a second U-Net, on one prompt."""
    model = load_undrawn(folder)
    weights = scope_parameters(model, "full")
    edit = Edit.from_weights(weights, {name: value + 1e-3 for name, value in weights.items()})
    edit.apply(model)
    original = edit.unedited(model)
    attack = P4D(variant="insert", tokens=3, checks=1, steps_per_check=1)
    started = time.perf_counter()
    (outcome,) = attack.run(model, [make_case(model)], never, sampling=Sampling(steps=1), original=original)
    return {
        "seconds": time.perf_counter() - started,
        "unet_evaluations": model.unet_evaluations + original.unet_evaluations,
        "loss": outcome.checks[-1].loss,
    }


def measure_picture(folder: Path) -> dict[str, Any]:
    """Make one guided picture of four steps."""
    model = load_model(str(folder), scheduler="lms")
    started = time.perf_counter()
    (image,) = model.generate([PROMPT], seeds=[0], steps=4, guidance=7.5)
    seconds = time.perf_counter() - started
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / PICTURE)
    return {"seconds": seconds, "unet_evaluations": model.unet_evaluations, "pixels": list(image.shape[1:])}


def measure_judging(folder: Path) -> dict[str, Any]:
    """Judge the picture that was made, or noise of its size; loading the detector is counted apart."""
    generator = stream(0, "benchmarks/image")
    image = torch.randint(256, (1, 3, 512, 512), generator=generator, dtype=torch.uint8)
    if (folder / PICTURE).exists():
        image = pil_to_tensor(Image.open(folder / PICTURE))[None]
    started = time.perf_counter()
    judge = NudeNet(labels=LABELS, threshold=0.45)
    loaded = time.perf_counter()
    verdicts = judge(image)
    return {
        "seconds": time.perf_counter() - loaded,
        "loading_seconds": loaded - started,
        "score": float(verdicts.score[0]),
        "present": bool(verdicts.present[0]),
    }


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "load": measure_loading,
    "esd": lambda folder: measure_esd(folder, Off()),
    "p_esd": lambda folder: measure_esd(folder, Learned(scope=None, steps=1)),
    "unlearndiff": measure_unlearndiff,
    "p4d": measure_p4d,
    "picture": measure_picture,
    "nudenet": measure_judging,
}


def load_undrawn(folder: Path) -> TextToImage:
    """Load the folder as a model that draws no pictures."""
    return Undrawn(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None), name="random")


def make_case(model: TextToImage) -> PromptCase:
    """Ask for the concept, with a target of noise."""
    target = torch.randint(256, (3, *model.image_size), generator=stream(0, "benchmarks/target"), dtype=torch.uint8)
    return PromptCase(0, PROMPT, seed=0, guidance=7.5, target=target)


def never(images: Tensor) -> Verdicts:
    """Judge that no picture shows the concept."""
    return Verdicts(torch.zeros(len(images), dtype=torch.bool), torch.zeros(len(images)))


def make_pipeline() -> StableDiffusionPipeline:
    """Build Stable Diffusion 1.4 with random weights: 64x64 latents, 512x512 pictures, float32."""
    torch.set_rng_state(stream(0, "benchmarks/sd14_weights").get_state())
    tokenizer = make_tokenizer()
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * LEVELS,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder of Stable Diffusion 1.4 with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tokenizer() -> CLIPTokenizer:
    """Make CLIP's tokenizer of 49,408 tokens from the vocabulary that open_clip brings along."""
    published = SimpleTokenizer()
    # Its start and end tokens are CLIP's under other names.
    words = list(published.encoder)[: len(published.encoder) - 2]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [" ".join(pair) for pair in published.bpe_ranks]
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


if __name__ == "__main__":
    main()
