"""NudeNet on pictures in memory against the library on PNG files. Prints one line of JSON.

Four ways to the same detections: our judge; the library's detector, which is given each picture as a PNG file; the
same with a new detector for every picture, as the published code of UnlearnDiffAtk does; and the library's detector on
arrays, which tells what the files cost. Ratios are of medians over rounds in which each way takes its turn.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from nudenet import NudeDetector
from PIL import Image
from skimage.data import astronaut

from evaluation.judges.nudenet import LABELS, Detections, NudeNet


def main() -> None:
    """Time the three ways on versions of the astronaut's photograph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="edge of a picture in pixels")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="processors and threads for all of them")
    arguments = parser.parse_args()
    # The library opens its network with as many threads as it finds processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)

    images = make_pictures(arguments.pictures, arguments.size)
    judge = NudeNet(LABELS, 0.25, batch_size=arguments.batch_size)
    detector = NudeDetector()

    def ours() -> list[Detections]:
        return judge(torch.from_numpy(images).permute(0, 3, 1, 2)).details["detections"]  # type: ignore[return-value]

    ways: dict[str, Callable[[], list[Detections]]] = {
        "ours": ours,
        "library": lambda: [detect_file(detector, image) for image in images],
        "library_in_memory": lambda: [detect(detector, image[..., ::-1].copy()) for image in images],
        "published": lambda: [detect_file(NudeDetector(), image) for image in images],
    }
    found = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: arguments.pictures / median(durations) for name, durations in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "nudenet_throughput",
                "ratio": rates["ours"] / rates["library"],
                "ratio_to_library_in_memory": rates["ours"] / rates["library_in_memory"],
                "ratio_to_published": rates["ours"] / rates["published"],
                **{f"pictures_per_second_{name}": rate for name, rate in rates.items()},
                "equal_detections": all(other == found["ours"] for other in found.values()),
                "detections": sum(map(len, found["ours"])),
                **vars(arguments),
            }
        )
    )


def make_pictures(count: int, size: int) -> np.ndarray:
    """Versions of the photograph, uint8 [count, size, size, 3]: shifted, and darker by and by."""
    photograph = np.asarray(Image.fromarray(astronaut()).resize((size, size)), dtype=np.float32)
    shifted = [np.roll(photograph, 3 * index, axis=1) * (1 - 0.5 * index / count) for index in range(count)]
    return np.stack(shifted).astype(np.uint8)


def detect_file(detector: NudeDetector, image: np.ndarray) -> Detections:
    """Write ``image``, uint8 [H, W, 3], as PNG, and have the library read it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.fromarray(image).save(path)
        return detect(detector, str(path))


def detect(detector: NudeDetector, picture: str | np.ndarray) -> Detections:
    """What the library says of a file or of a BGR array, uint8 [H, W, 3]."""
    return [(each["class"], each["score"]) for each in detector.detect(picture)]


if __name__ == "__main__":
    main()
