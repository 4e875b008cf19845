"""Ring-A-Bell: tokens that encode as the prompt would with more of the concept, found by the text encoder alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_pairs import Pair, Pairs, resolve_pairs
from attacks.prompt_search import candidate_tokens
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.noise_schedule import at_least_float32
from diffusion.progress import look_inside
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge

log = logging.getLogger(__name__)

Individual = tuple[int, ...]
"""K token ids."""

ENCODED_AT_ONCE = 256
"""Individuals in one pass of the text encoder; it changes speed and memory only."""


@checked
class RingABell:
    """Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012).

    Prompt pairs with and without the concept give its direction among text embeddings; a prompt is pushed along it:
        v = mean over pairs of (text(with) - text(without))
        minimise over K tokens   || text(tokens) - (text(prompt) + eta v) ||^2,   summed over all positions
    A genetic search finds the tokens, which take the place of the whole prompt. In every generation the nearer half of
    the population are the parents. With ``crossover_rate`` a parent meets a random one, and both exchange what follows
    a random cut, which makes two more individuals; then each individual changes a random token with
    ``mutation_rate``. The nearest of the last generation is read as text, which is tokenised anew, drawn and judged,
    once. A prompt that succeeds as it stands is not attacked.

    The search sees neither the U-Net nor a picture. All embeddings come from the text encoder of the model under
    attack, so they change with the edit only where that edits the text encoder.

    Attributes:
        pairs: The prompt pairs, or a CSV file of them with the columns ``with`` and ``without``; one that is listed
            twice weighs twice.
        eta: Length of the push in units of v.
        tokens: K, length of the prompt found.
        population: Individuals in the first generation; each later one has half as many parents and their children.
        generations: Populations that are compared with the target.
        crossover_rate: Chance that a parent has children.
        mutation_rate: Chance that an individual changes one token.
        mutated: ``all``, as in the published code, where the best may be lost; or ``children``, which keeps every
            parent as it is.
        readable: Keep to tokens whose text is read back as the same token, so that what is judged is what was found.
        batch_size: Prompts searched for at a time; it changes speed and memory, never what a prompt's search draws.
        seed: Seed of the draws; each case has its own stream.
    """

    pairs: Pairs
    eta: Annotated[float, Field(gt=0)] = 3.0
    tokens: Annotated[int, Field(ge=1)] = 16
    population: Annotated[int, Field(ge=2)] = 200
    generations: Annotated[int, Field(ge=1)] = 3000
    crossover_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    mutation_rate: Annotated[float, Field(ge=0, le=1)] = 0.25
    mutated: Literal["all", "children"] = "all"
    readable: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "text_only"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its picture is judged.

        Raises:
            ValueError: The model's prompts have no room for ``tokens``.
        """
        PromptTemplate.insert(model, [""], self.tokens, "prefix_k")  # refuses a K that does not fit
        vector = concept_vector(model, resolve_pairs(self.pairs))

        def propose(traces: list[Trace]) -> list[Proposal]:
            prompts = [trace.case.prompt for trace in traces]
            generators = [stream(self.seed, "ringabell/evolution", trace.case.case_number) for trace in traces]
            targets = model.encode_prompts(prompts) + self.eta * vector
            rows, distances = zip(*self.evolve(model, targets, generators), strict=True)
            texts = read_as_text(model, rows, targets)
            return [Proposal(text, loss=distance) for text, distance in zip(texts, distances, strict=True)]

        return search(model, cases, judge, propose, sampling=sampling, rounds=1, batch_size=self.batch_size)

    def evolve(
        self, model: TextToImage, targets: Tensor, generators: Sequence[torch.Generator]
    ) -> list[tuple[Individual, float]]:
        """Search for the tokens of each target, in independent populations.

        Args:
            model: Its text encoder is used.
            targets: float [n, positions, width], text embeddings.
            generators: One per target, the only source of its draws.

        Returns:
            Per target the nearest individual of the last generation and its squared distance.
        """
        candidates = candidate_tokens(model, readable=self.readable).tolist()
        shape = (self.population, self.tokens)
        populations = [
            [tuple(candidates[index] for index in row) for row in draw.tolist()]
            for draw in (torch.randint(len(candidates), shape, generator=generator) for generator in generators)
        ]
        distances = fitness(model, populations, targets)
        for generation in range(1, self.generations):
            searches = len(generators)
            told = f"generation {generation} of {self.generations} with {searches} in hand"
            look_inside(told, searches * generation / self.generations)
            populations = [
                self._breed(sorted(population, key=known.__getitem__)[: self.population // 2], candidates, generator)
                for population, known, generator in zip(populations, distances, generators, strict=True)
            ]
            distances = fitness(model, populations, targets, distances)
        return [min(known.items(), key=lambda item: item[1]) for known in distances]

    def _breed(
        self, parents: list[Individual], candidates: Sequence[int], generator: torch.Generator
    ) -> list[Individual]:
        """Return the next generation."""
        children = crossover(parents, self.crossover_rate, generator)
        if self.mutated == "children":
            return parents + mutate(children, self.mutation_rate, candidates, generator)
        return mutate(parents + children, self.mutation_rate, candidates, generator)


def concept_vector(model: TextToImage, pairs: Sequence[Pair]) -> Tensor:
    """Compute the concept's direction, float [positions, width]: mean of text(with) - text(without)."""
    present, absent = zip(*pairs, strict=True)
    sides = [model.encode_prompts(prompts) for prompts in (present, absent)]
    with_, without = (text.to(at_least_float32(text.dtype)) for text in sides)
    return (with_ - without).mean(dim=0)


def crossover(parents: Sequence[Individual], rate: float, generator: torch.Generator) -> list[Individual]:
    """Return two children of every parent that is drawn at ``rate``.

    It and a random parent, which may be itself, exchange what follows the first 0 to K - 1 tokens.
    """
    draws = torch.rand((len(parents), 3), generator=generator, dtype=torch.float64).tolist()
    children = []
    for parent, (coin, partner, place) in zip(parents, draws, strict=True):
        if coin < rate:
            other, cut = parents[int(partner * len(parents))], int(place * len(parent))
            children += [parent[:cut] + other[cut:], other[:cut] + parent[cut:]]
    return children


def mutate(
    individuals: Sequence[Individual], rate: float, candidates: Sequence[int], generator: torch.Generator
) -> list[Individual]:
    """Put a random candidate at a random place of every individual that is drawn at ``rate``."""
    draws = torch.rand((len(individuals), 3), generator=generator, dtype=torch.float64).tolist()
    mutants = []
    for individual, (coin, position, choice) in zip(individuals, draws, strict=True):
        place, token = int(position * len(individual)), candidates[int(choice * len(candidates))]
        mutants.append((*individual[:place], token, *individual[place + 1 :]) if coin < rate else individual)
    return mutants


def fitness(
    model: TextToImage,
    populations: Sequence[Sequence[Individual]],
    targets: Tensor,
    known: Sequence[Mapping[Individual, float]] | None = None,
) -> list[dict[Individual, float]]:
    """Compute how far the individuals of independent populations are from their targets; all are encoded together.

    Args:
        model: Its text encoder is used.
        populations: One per target.
        targets: float [n, positions, width].
        known: Per population what is known of its individuals, as returned by this function; they are not encoded
            again.

    Returns:
        Per population the squared distance of each of its individuals; the lower, the fitter. What died out is no
        longer in it: it hardly ever returns, and thousands of generations would fill the memory.
    """
    distances = [
        {row: earlier[row] for row in population if row in earlier}
        for population, earlier in zip(populations, known or [{}] * len(populations), strict=True)
    ]
    new = [
        (index, row)
        for index, population in enumerate(populations)
        for row in dict.fromkeys(population)
        if row not in distances[index]
    ]
    for start in range(0, len(new), ENCODED_AT_ONCE):
        owners, rows = zip(*new[start : start + ENCODED_AT_ONCE], strict=True)
        values = squared_distances(model, whole_prompts(model, rows), targets[list(owners)])
        for index, row, value in zip(owners, rows, values.tolist(), strict=True):
            distances[index][row] = value
    return distances


@torch.no_grad()
def squared_distances(model: TextToImage, ids: Tensor, targets: Tensor) -> Tensor:
    """Compute || text(ids) - target ||^2, float [n]; ids int64 [n, positions], targets float [n, positions, width]."""
    text = model.encode_ids(ids)
    # Squares of half-precision numbers overflow.
    return (text.to(at_least_float32(text.dtype)) - targets).square().sum(dim=(1, 2))


def whole_prompts(model: TextToImage, rows: Sequence[Individual]) -> Tensor:
    """Put start, end and padding around rows of K tokens; ids int64 [n, positions]."""
    length = len(rows[0])
    ids = PromptTemplate.insert(model, [""], length, "prefix_k").ids.repeat(len(rows), 1)
    ids[:, 1 : 1 + length] = torch.tensor(rows, device=ids.device)
    return ids


def read_as_text(model: TextToImage, rows: Sequence[Individual], targets: Tensor) -> list[str]:
    """Read rows of tokens as text, and log what the text loses: it may be cut into other tokens."""
    texts = [model.tokenizer.decode(list(row)).strip() for row in rows]
    found, read = whole_prompts(model, rows), model.tokenize(texts)
    log.info(
        "ring-a-bell: %d of %d texts encode to the tokens that were found, the mean text has %.1f other positions; "
        "mean squared distance %.4g as found, %.4g as text",
        (found == read).all(dim=1).sum(),
        len(rows),
        (found != read).sum() / len(rows),
        squared_distances(model, found, targets).mean(),
        squared_distances(model, read, targets).mean(),
    )
    return texts
