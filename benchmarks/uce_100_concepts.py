"""UCE of many concepts at the text width of Stable Diffusion 1.4. Prints one line of JSON for each token rule.

Text encoder and matrices have that model's sizes and random weights, so nothing is downloaded. ``seconds`` is what the
edit takes from the embeddings to the file; encoding the prompts, which every method has to, is told apart from it.
``core_seconds`` are of all threads together and do not grow when other programs run beside this one.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from sd14_full_size import make_text_encoder, make_tokenizer
from torch import Tensor

from diffusion.canvas.plan import make_scheduler
from diffusion.model import TextToImage
from diffusion.streams import stream
from erasure.closed_form import Door
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.uce import UCE

RULES = {
    "2025": UCE(tokens="last"),
    "2023": UCE(tokens="from_last", preserve_scale=None),
}
"""The authors' settings (conf/eraser/uce.yaml)."""


def main() -> None:
    """Time an edit by each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--preserved", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model()
    weights = make_weights()
    concept = make_concept(arguments.concepts, arguments.preserved)
    for rule, uce in RULES.items():
        result = measure(model, uce, concept, weights)
        settings = {"preserved": arguments.preserved, "device": "cpu", "threads": arguments.threads}
        print(json.dumps({"benchmark": "uce_100_concepts", "rule": rule, **result, **settings}), flush=True)


class Timed(TextToImage):
    """A model that knows how long its text encoder has taken."""

    encoding_seconds = 0.0
    encoding_core_seconds = 0.0

    def encode_prompts(self, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Encode, and add up the time."""
        started, busy = time.perf_counter(), time.process_time()
        embeddings = super().encode_prompts(prompts, batch_size=batch_size)
        self.encoding_seconds += time.perf_counter() - started
        self.encoding_core_seconds += time.process_time() - busy
        return embeddings


def measure(model: Timed, uce: UCE, concept: Concept, weights: dict[str, Tensor]) -> dict[str, object]:
    """Erase, save, and apply to matrices."""
    model.encoding_seconds = model.encoding_core_seconds = 0.0
    started, busy = time.perf_counter(), time.process_time()
    right = uce.right_multiplication(model, concept, Door("rows", weights))
    edit = Edit.from_right_multiplication(right, weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edit.save(path)
        elapsed, elapsed_busy = time.perf_counter() - started, time.process_time() - busy
        size = path.stat().st_size
    started = time.perf_counter()
    for name, entry in edit.entries.items():
        entry.value(weights[name])
    return {
        "concepts": len(concept.parts),
        "seconds": elapsed - model.encoding_seconds,
        "core_seconds": elapsed_busy - model.encoding_core_seconds,
        "encoding_seconds": model.encoding_seconds,
        "encoding_core_seconds": model.encoding_core_seconds,
        "applying_seconds": time.perf_counter() - started,
        "edit_bytes": size,
        "matrices": len(weights),
    }


def make_concept(concepts: int, preserved: int) -> Concept:
    """Make made-up artists to erase together, each turned into art, and others to preserve."""
    generator = stream(0, "benchmarks/names")
    names = [
        "".join(chr(ord("a") + letter) for letter in torch.randint(26, (12,), generator=generator).tolist())
        for _ in range(concepts + preserved)
    ]
    first, *others = [Concept(name, "style", targets=(name,), anchor="art") for name in names[:concepts]]
    return Concept(
        first.name, "style", targets=first.targets, anchor="art", preserved=tuple(names[concepts:]), also=tuple(others)
    )


def make_weights() -> dict[str, Tensor]:
    """Make the matrices that are edited, by parameter name."""
    generator = stream(0, "benchmarks/matrices")
    with torch.device("meta"):
        shapes = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).named_parameters()
    return {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in shapes
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


def make_model() -> Timed:
    """Build Stable Diffusion 1.4's text encoder with random weights; its pictures are none of this benchmark's."""
    torch.set_rng_state(stream(0, "benchmarks/text_encoder").get_state())
    tokenizer = make_tokenizer()
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=768, **blocks)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
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
    return Timed(pipeline, name="random")


if __name__ == "__main__":
    main()
