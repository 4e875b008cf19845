"""One step of UnlearnDiffAtk and one of P4D at the size of Stable Diffusion 1.4. Prints one line of JSON for each.

The weights are random, so nothing is downloaded; the VAE is small and pictures are left undrawn, for neither takes part
in a step. Each attack runs in a process of its own, whose peak memory holds the model (two U-Nets for P4D).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attacks.cases import PromptCase
from attacks.p4d import P4D
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.canvas.recipe import make_scheduler
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from erasure.edit import Edit
from erasure.parameters import scope_parameters
from evaluation.verdicts import Verdicts

ATTACKS = ("unlearndiff", "p4d")
PROMPT = "a picture"


def main() -> None:
    """Measure each attack in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--attack", choices=ATTACKS, help="measure this one here")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.attack is None:
        for attack in ATTACKS:
            command = [sys.executable, __file__, "--attack", attack, "--threads", str(arguments.threads)]
            subprocess.run(command, check=True)
    else:
        print(json.dumps(measure(arguments.attack) | {"device": "cpu", "threads": arguments.threads}), flush=True)


class Undrawn(TextToImage):
    """A model whose pictures are noise: they cost no evaluation."""

    def sample(self, text: Tensor, *, seeds: Sequence[int], **_: Any) -> Tensor:
        """Return the initial noise."""
        return self.initial_latents(seeds)


def measure(attack: str) -> dict[str, object]:
    """Take one step on one prompt and report its time and the process's peak memory."""
    model = make_model()
    picture = torch.randint(256, (3, *model.image_size), generator=torch.Generator().manual_seed(0))
    cases = [PromptCase(0, PROMPT, seed=0, guidance=7.5, target=picture.to(torch.uint8))]
    sampling = Sampling(steps=1)
    if attack == "unlearndiff":
        search = UnlearnDiffAtk(timesteps=1, steps_per_timestep=1)
        started = time.perf_counter()
        outcomes = list(search.run(model, cases, never, sampling=sampling))
        evaluations = model.unet_evaluations
    else:
        weights = scope_parameters(model, "full")
        edit = Edit.from_weights(weights, {name: value + 1e-3 for name, value in weights.items()})
        edit.apply(model)
        original = edit.unedited(model)
        p4d = P4D(variant="insert", tokens=3, checks=1, steps_per_check=1)
        started = time.perf_counter()
        outcomes = list(p4d.run(model, cases, never, sampling=sampling, original=original))
        evaluations = model.unet_evaluations + original.unet_evaluations
    return {
        "benchmark": "sd14_attack_step",
        "attack": attack,
        "seconds": time.perf_counter() - started,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "unet_evaluations": evaluations,
        "loss": outcomes[0].checks[-1].loss,
    }


def never(images: Tensor) -> Verdicts:
    """Judge that no picture shows the concept."""
    return Verdicts(torch.zeros(len(images), dtype=torch.bool), torch.zeros(len(images)))


def make_model() -> TextToImage:
    """Build the U-Net and the text encoder of Stable Diffusion 1.4 with random weights: 64x64 latents, float32."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=8, sample_size=512, **blocks)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Undrawn(pipeline, name="random")


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
    """Make 49,408 tokens: letters, and words that no text has."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"word{index}</w>" for index in range(49_406 - len(words))]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        names = [*words, "<|startoftext|>", "<|endoftext|>"]
        vocabulary.write_text(json.dumps({word: index for index, word in enumerate(names)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


if __name__ == "__main__":
    main()
