"""Ring-A-Bell on one prompt, from its description: one encoding at a time, lists, loops."""

import torch

from diffusion.model import TextToImage


def encode(model: TextToImage, tokens: list[int]) -> list[list[float]]:
    """Text embedding, [positions][width], of a prompt of these tokens."""
    tokenizer = model.tokenizer
    ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    while len(ids) < model.max_tokens:
        ids.append(tokenizer.pad_token_id)
    return model.encode_ids(torch.tensor([ids]))[0].tolist()


def direction(model: TextToImage, pairs: list[tuple[str, str]]) -> list[list[float]]:
    """The mean over the pairs of text(with) - text(without)."""
    width = model.vocabulary.shape[1]
    mean = [[0.0] * width for _ in range(model.max_tokens)]
    for pair in pairs:
        present, absent = (encode(model, model.tokenizer(text, add_special_tokens=False).input_ids) for text in pair)
        for position in range(model.max_tokens):
            for entry in range(width):
                mean[position][entry] += (present[position][entry] - absent[position][entry]) / len(pairs)
    return mean


def pushed(model: TextToImage, prompt: str, eta: float, vector: list[list[float]]) -> list[list[float]]:
    """text(prompt) + eta v."""
    text = encode(model, model.tokenizer(prompt, add_special_tokens=False).input_ids)
    return [[a + eta * b for a, b in zip(*rows, strict=True)] for rows in zip(text, vector, strict=True)]


def distance(model: TextToImage, tokens: list[int], target: list[list[float]]) -> float:
    """Squared error over all positions."""
    total = 0.0
    for row, wanted in zip(encode(model, tokens), target, strict=True):
        for value, goal in zip(row, wanted, strict=True):
            total += (value - goal) ** 2
    return total


def cross(parents: list[list[int]], rate: float, draws: list[list[float]]) -> list[list[int]]:
    """Children of the parents whose first draw is below the rate; the others choose the partner and the cut."""
    children = []
    for index, (chance, partner, cut) in enumerate(draws):
        if chance >= rate:
            continue
        first, second = list(parents[index]), list(parents[int(partner * len(parents))])
        for position in range(len(first)):
            if position >= int(cut * len(first)):
                first[position], second[position] = second[position], first[position]
        children.append(first)
        children.append(second)
    return children


def change(individuals: list[list[int]], rate: float, allowed: list[int], draws: list[list[float]]) -> list[list[int]]:
    """The individuals; those whose first draw is below the rate have one token changed, place and token drawn."""
    result = [list(individual) for individual in individuals]
    for individual, (chance, place, token) in zip(result, draws, strict=True):
        if chance < rate:
            individual[int(place * len(individual))] = allowed[int(token * len(allowed))]
    return result


def search(
    model: TextToImage,
    target: list[list[float]],
    generator: torch.Generator,
    *,
    tokens: int,
    population: int,
    generations: int,
    crossover_rate: float,
    mutation_rate: float,
    parents_mutate: bool,
) -> tuple[list[int], float]:
    """The nearest individual of the last generation and its distance."""

    def draw(count: int) -> list[list[float]]:
        return torch.rand((count, 3), generator=generator, dtype=torch.float64).tolist()

    allowed = [token for token in range(len(model.tokenizer)) if token not in model.tokenizer.all_special_ids]
    first = torch.randint(len(allowed), (population, tokens), generator=generator).tolist()
    individuals = [[allowed[index] for index in row] for row in first]
    for generation in range(generations):
        ranked = sorted((distance(model, individual, target), index) for index, individual in enumerate(individuals))
        if generation == generations - 1:
            return individuals[ranked[0][1]], ranked[0][0]
        parents = [individuals[index] for _, index in ranked[: population // 2]]
        children = cross(parents, crossover_rate, draw(len(parents)))
        if parents_mutate:
            everyone = parents + children
            individuals = change(everyone, mutation_rate, allowed, draw(len(everyone)))
        else:
            individuals = parents + change(children, mutation_rate, allowed, draw(len(children)))
    raise ValueError("at least one generation is needed")
