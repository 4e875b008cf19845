"""Whether measuring more pictures takes more memory. Prints one line of JSON for each number of pictures.

Pictures of noise of both models lie on the disk as the store has them and go through FID on a cheap extractor, each
number in a process of its own. ``growth_mib`` is how much the process's peak rose while it measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffusion.streams import stream
from evaluation.prompt_sets import PromptRow
from evaluation.quality.distances import FrechetDistance
from evaluation.quality.extractors import Classifier
from experiments.job.cost import Cost, peak_memory_bytes, reset_peak_memory
from experiments.job.measuring import Measuring, measure_pictures
from experiments.job.pictures import Pictures, write_picture


class Clock:
    """A meter without a model."""

    def read(self) -> Cost:
        """Nothing."""
        return Cost()


def main() -> None:
    """Measure each number of pictures in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--edge", type=int, default=256, help="of a picture, in pixels")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for count in arguments.pictures:
        if arguments.here:
            print(json.dumps(measure(count, arguments.edge)), flush=True)
        else:
            command = [sys.executable, __file__, "--here", "--pictures", str(count), "--edge", str(arguments.edge)]
            subprocess.run(command, check=True)


def measure(count: int, edge: int) -> dict[str, object]:
    """Write the pictures and measure them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = []
        for model in ("base", "edited"):
            generator = stream(0, "benchmarks/pictures", len(models))
            paths = [folder / f"{model}{number}.png" for number in range(count)]
            for path in paths:
                # Smooth pictures are quicker to write and to read.
                coarse = torch.randint(256, (1, 3, 8, 8), generator=generator).float()
                image = torch.nn.functional.interpolate(coarse, size=(edge, edge), mode="bilinear")[0].to(torch.uint8)
                write_picture(path, image, {})
            models.append(Pictures(paths, Cost(), model, folder))
        rows = [PromptRow(number, "a picture") for number in range(count)]
        measuring = Measuring(FrechetDistance(Small()), folder)
        reset_peak_memory()
        before, started = peak_memory_bytes(), time.perf_counter()
        measure_pictures([measuring], models[0], models[1], rows, Clock())  # type: ignore[arg-type]
        return {
            "benchmark": "streaming_memory",
            "pictures": count,
            "edge": edge,
            "growth_mib": (peak_memory_bytes() - before) / 2**20,
            "seconds": time.perf_counter() - started,
        }


class Small:
    """The canvas classifier's features of pictures that are made small."""

    def load(self) -> torch.nn.Module:
        """See :class:`evaluation.quality.extractors.Extractor`."""
        features = Classifier().load()
        small = torch.nn.Module()
        small.num_features = features.num_features
        small.forward = lambda images: features(images[:, :, ::8, ::8])  # type: ignore[method-assign]
        return small


if __name__ == "__main__":
    main()
