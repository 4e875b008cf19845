"""Ring-A-Bell's genetic search on many prompts against the published control flow. Prints one line of JSON.

The published flow takes one prompt at a time and encodes the whole population anew in every generation, with autograd
on. Ours encodes what is new in all populations together, without. Both make the same draws, so they must find the same
tokens. A generation of ours has fewer new individuals the longer the search lasts; the paper's takes 3000.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from published_flow import Stopwatch, load_model, make_parser, ratios, read_rows
from torch import Tensor

from attacks.prompt_pairs import read_pairs
from attacks.prompt_search import candidate_tokens
from attacks.ringabell import Individual, RingABell, concept_vector, crossover, mutate, whole_prompts
from diffusion.model import TextToImage
from diffusion.streams import stream


def main() -> None:
    """Time both and compare what they find."""
    parser = make_parser(__doc__, prompts=3)
    parser.add_argument("--pairs", type=Path, default=Path("prompts/canvas/van_gogh_pairs.csv"))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--population", type=int, default=200)
    parser.add_argument("--generations", type=int, default=300)
    arguments = parser.parse_args()
    model = load_model(arguments)
    prompts = [row["prompt"] for row in read_rows(arguments)]
    search = RingABell(
        pairs=arguments.pairs,
        tokens=arguments.tokens,
        population=arguments.population,
        generations=arguments.generations,
    )
    targets = model.encode_prompts(prompts) + search.eta * concept_vector(model, read_pairs(arguments.pairs))

    before, our_time = model.text_encodings, Stopwatch()
    ours = search.evolve(model, targets, [stream(0, "ringabell/evolution", case) for case in range(len(prompts))])
    our_time.stop()
    between, their_time = model.text_encodings, Stopwatch()
    theirs = [
        evolve_alone(model, search, target, stream(0, "ringabell/evolution", case))
        for case, target in enumerate(targets)
    ]
    their_time.stop()
    print(
        json.dumps(
            {
                "benchmark": "ringabell_published_flow",
                **ratios(our_time, their_time),
                "texts_encoded": between - before,
                "texts_encoded_published_flow": model.text_encodings - between,
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
    # The published encoder's weights ask for gradients, so the pass keeps a graph.
    with model.trainable(list(model.text_encoder.parameters())):
        errors = model.encode_ids(whole_prompts(model, population)) - target
        return errors.square().sum(dim=(1, 2)).tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
