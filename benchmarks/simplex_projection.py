"""Simplex projection of all rows at once against one row at a time by bisection. Prints one line of JSON.

The bisection reads a number back from the device at every halving and works in float32, as the published attack's does;
ours works in float64, as our attack does.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from attacks.prompt_search import project_to_simplex
from diffusion.allocator import keep_freed_memory

TOLERANCE = 1e-5
"""Of the published bisection, for the threshold."""


def main() -> None:
    """Time both on rows as they are after a first Adam step and after many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49_408)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    result: dict[str, object] = {"benchmark": "simplex_projection", "device": arguments.device}
    for name, points in make_points(arguments.rows, arguments.vocabulary).items():
        double = points.to(arguments.device)
        single = double.float()
        ours = seconds(project_to_simplex, double, arguments.repeats)
        theirs = seconds(bisect_rows, single, arguments.repeats)
        theirs_double = seconds(bisect_rows, double, arguments.repeats)
        exact = project_to_simplex(double)
        result[name] = {
            "ratio": theirs / ours,
            "ratio_same_precision": theirs_double / ours,
            "seconds_bisection_float32": theirs,
            "seconds_bisection_float64": theirs_double,
            "seconds_ours_float64": ours,
            "largest_difference": (exact - bisect_rows(single)).abs().max().item(),
            "bisection_row_sum": bisect_rows(single).sum(dim=-1).mean().item(),
            "our_row_sum": exact.sum(dim=-1).mean().item(),
        }
    print(json.dumps(result))


def make_points(rows: int, vocabulary: int) -> dict[str, Tensor]:
    """Points before the projection, float64 [rows, vocabulary]: dense after a first step of 0.01, sparse later."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    sparse = project_to_simplex(directions * 0.05)
    return {"first_step": 1 / vocabulary + 0.01 * directions.sign(), "late_step": sparse + 0.01 * directions}


def bisect_rows(points: Tensor) -> Tensor:
    """Project row by row: halve an interval of thresholds, one read from the device per halving."""
    return torch.stack([_bisect(row) for row in points])


def _bisect(row: Tensor) -> Tensor:
    clipped = row.clamp(0, 1)
    if abs(clipped.sum().item() - 1) <= TOLERANCE:
        return clipped
    low, high = (row - 1).min().item(), row.max().item()
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        if (row - middle).clamp(0, 1).sum().item() > 1:
            low = middle
        else:
            high = middle
    return (row - (low + high) / 2).clamp(0, 1)


def seconds(project: Callable[[Tensor], Tensor], points: Tensor, repeats: int) -> float:
    """Time one call, the shortest of ``repeats``, until its result is there."""
    project(points).sum().item()
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        project(points).sum().item()
        durations.append(time.perf_counter() - started)
    return min(durations)


if __name__ == "__main__":
    main()
