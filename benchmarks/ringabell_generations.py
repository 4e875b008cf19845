"""Ring-A-Bell's genetic search on many prompts against the published way. Prints one line of JSON.

The published way takes one prompt at a time, encodes the whole population anew in every generation, with autograd on,
and sorts it. Ours encodes what is new in all populations together. Both make the same draws, so they must find the same
tokens.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from attacks.prompt_search import candidate_tokens
from attacks.ringabell import Individual, RingABell, concept_vector, crossover, mutate, read_pairs
from diffusion.allocator import keep_freed_memory
from diffusion.model import TextToImage
from diffusion.training import step_generator


def main() -> None:
    """Time both and compare what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("diffusion/canvas/weights"), help="a diffusers folder")
    parser.add_argument("--csv", type=Path, default=Path("prompts/canvas/van_gogh.csv"), help="a prompt set")
    parser.add_argument("--pairs", type=Path, default=Path("prompts/canvas/van_gogh_pairs.csv"))
    parser.add_argument("--prompts", type=int, default=8, help="how many of its prompts")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--population", type=int, default=200)
    parser.add_argument("--generations", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    model = TextToImage(StableDiffusionPipeline.from_pretrained(arguments.model).to(arguments.device))
    with arguments.csv.open(encoding="utf-8", newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)][: arguments.prompts]
    search = RingABell(
        pairs=arguments.pairs,
        tokens=arguments.tokens,
        population=arguments.population,
        generations=arguments.generations,
    )
    targets = model.encode_prompts(prompts) + search.eta * concept_vector(model, read_pairs(arguments.pairs))

    started = time.perf_counter()
    ours = search.evolve(model, targets, [step_generator(0, case) for case in range(len(prompts))])
    our_seconds = time.perf_counter() - started
    started = time.perf_counter()
    theirs = [evolve_alone(model, search, target, step_generator(0, case)) for case, target in enumerate(targets)]
    their_seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "benchmark": "ringabell_generations",
                "ratio": their_seconds / our_seconds,
                "seconds_published_way": their_seconds,
                "seconds_ours": our_seconds,
                "prompts": len(prompts),
                "population": arguments.population,
                "generations": arguments.generations,
                "same_tokens": sum(row == other for (row, _), other in zip(ours, theirs, strict=True)),
                "device": arguments.device,
                "threads": arguments.threads,
            }
        )
    )


def evolve_alone(model: TextToImage, search: RingABell, target: Tensor, generator: torch.Generator) -> Individual:
    """Search for the tokens of one target; every generation encodes its whole population."""
    candidates = candidate_tokens(model).tolist()
    draws = torch.randint(len(candidates), (search.population, search.tokens), generator=generator)
    population = [tuple(candidates[index] for index in row) for row in draws.tolist()]
    for generation in range(search.generations):
        distances = distances_of(model, population, target)
        order = sorted(range(len(population)), key=distances.__getitem__)
        if generation < search.generations - 1:
            parents = [population[index] for index in order[: search.population // 2]]
            children = crossover(parents, search.crossover_rate, generator)
            population = mutate(parents + children, search.mutation_rate, candidates, generator)
    return population[order[0]]


def distances_of(model: TextToImage, population: Sequence[Individual], target: Tensor) -> list[float]:
    """Encode the whole population in one pass and sum the squared differences over all positions."""
    tokenizer = model.tokenizer
    padding = [tokenizer.pad_token_id] * (model.max_tokens - 2 - len(population[0]))
    ids = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id, *padding] for row in population]
    # The published encoder's weights ask for gradients, so the pass keeps a graph.
    weights = list(model.text_encoder.parameters())
    with model.trainable(weights):
        errors = model.encode_ids(torch.tensor(ids, device=model.device)) - target
        return errors.square().sum(dim=(1, 2)).tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
