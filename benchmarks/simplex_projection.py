"""Simplex projection of all rows at once against one row at a time by bisection. Prints one line of JSON.

The bisection takes three sums and reads them back from the device at every halving, and works in float32, as the
published attack's does; ours works in float64, as our attack does, and stops when it is exact. Where that happens after
few passes over all rows, what bounds it is the memory they are read from.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from published_flow import bisect_rows
from torch import Tensor

from attacks.prompt_search import project_to_simplex
from diffusion.allocator import keep_freed_memory
from diffusion.streams import stream


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

    results: dict[str, dict[str, float]] = {}
    for name, points in make_points(arguments.rows, arguments.vocabulary).items():
        double = points.to(arguments.device)
        single = double.float()
        ours = seconds(project_to_simplex, double, arguments.repeats)
        theirs = seconds(bisect_rows, single, arguments.repeats)
        theirs_double = seconds(bisect_rows, double, arguments.repeats)
        exact = project_to_simplex(double)
        results[name] = {
            "ratio": theirs / ours,
            "ratio_same_precision": theirs_double / ours,
            "seconds_bisection_float32": theirs,
            "seconds_bisection_float64": theirs_double,
            "seconds_ours_float64": ours,
            "largest_difference": (exact - bisect_rows(single)).abs().max().item(),
            "bisection_row_sum": bisect_rows(single).sum(dim=-1).mean().item(),
            "our_row_sum": exact.sum(dim=-1).mean().item(),
        }
    print(
        json.dumps(
            {
                "benchmark": "simplex_projection",
                "ratio": min(result["ratio"] for result in results.values()),
                **results,
                "rows": arguments.rows,
                "vocabulary": arguments.vocabulary,
                "device": arguments.device,
                "threads": arguments.threads,
            }
        )
    )


def make_points(rows: int, vocabulary: int) -> dict[str, Tensor]:
    """Points before the projection, float64 [rows, vocabulary]: dense after a first step of 0.01, sparse later."""
    generator = stream(0, "benchmarks/points")
    directions = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    sparse = project_to_simplex(directions * 0.05)
    return {"first_step": 1 / vocabulary + 0.01 * directions.sign(), "late_step": sparse + 0.01 * directions}


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
