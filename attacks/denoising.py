"""What attacks share that look, prompt by prompt, for embeddings with which the erased model denoises a picture."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_search import (
    Criterion,
    Schedule,
    adam_step,
    embedding_gradient,
    middle_timestep,
    require_targets,
    require_timesteps,
    target_latents,
)
from attacks.tables import SearchesTables, Space, Tables, Template, space_of
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.prompt_template import Insertion
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from evaluation.verdicts import Judge


@plain_dataclass
class DenoisingSearch:
    """The search on one prompt.

    Its numbers are float64 whatever the model's precision: a token is drawn by comparing probabilities, and in
    float64 the search itself adds nothing to the noise that batched kernels put into a float32 gradient.

    Attributes:
        case: Whose search it is.
        restart: How many searches went before.
        generator: The random stream of the search's steps.
        target: float [c, h, w], latents of the picture that should come back.
        variables: float64 [k, any], what is optimised.
        mean: float64 [k, any], Adam's first moment.
        variance: float64 [k, any], Adam's second moment.
        steps: Steps taken.
    """

    case: PromptCase
    restart: int
    generator: torch.Generator
    target: Tensor
    variables: Tensor
    mean: Tensor
    variance: Tensor
    steps: int = 0


@checked
class DenoisingAttack(SearchesTables, ABC):
    """UnlearnDiffAtk's objective, schedule and checks; what is optimised is the attack's.

        minimise   E_{t, eps} || eps - eps_erased(x_t, t, text(prompt with k embeddings inserted)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   x0: the unedited model's picture of the prompt
    After ``steps_per_timestep`` Adam steps a picture is made and judged; the first success ends the search. A prompt
    that succeeds as it stands is not attacked. The unedited model takes part only through x0.

    Attributes:
        tokens: k, how many are inserted.
        insertion: Where they go.
        timesteps: Number of timesteps, and of checks of a search.
        steps_per_timestep: Adam steps before each check.
        schedule: ``even``: timesteps spread over the noise schedule, from low noise to high. ``sampled``: every step
            draws its own, uniformly.
        learning_rate: Adam's step size.
        weight_decay: Added to the gradient as weight_decay times what is optimised.
        criterion: ``l2`` or ``l1`` error of the noise.
        tables: Which tables of embeddings the tokens live in where a T5 reads the prompt; see :mod:`attacks.tables`.
        exclude_special: Keep start, end and padding out of the vocabulary.
        repeat_draws: Restart the random stream at every timestep, as UnlearnDiffAtk's published code does unawares
            (its sampler reseeds the global generator), so that all timesteps share their draws.
        restarts: Searches that follow one without success, each over all timesteps, from a random start and with a
            random stream of its own. The published code has none.
        batch_size: Prompts attacked at a time; it changes speed and memory, never what a prompt's search draws.
        seed: Seed of the draws; each case has its own stream.
    """

    tokens: Annotated[int, Field(ge=1)] = 3
    insertion: Insertion = "prefix_k"
    timesteps: Annotated[int, Field(ge=1)] = 50
    steps_per_timestep: Annotated[int, Field(ge=1)] = 40
    schedule: Schedule = "even"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    criterion: Criterion = "l2"
    tables: Tables = "text"
    exclude_special: bool = True
    repeat_draws: bool = False
    restarts: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"

    @abstractmethod
    def candidates(self, space: Space) -> Tensor:
        """List the tokens that the search knows, int64 [candidates]."""

    @abstractmethod
    def start_stream(self, case_number: int, restart: int) -> torch.Generator:
        """Return the random stream that a search starts with."""

    @abstractmethod
    def search_stream(self, case_number: int, restart: int) -> torch.Generator:
        """Return the random stream of a search's steps."""

    @abstractmethod
    def start(self, table: Tensor, generator: torch.Generator, *, restarted: bool) -> Tensor:
        """Return what is optimised as it is at first, float64 [k, any].

        Args:
            table: float [candidates, width], the embeddings of the candidates.
            generator: Draws it, for the prompt and the start.
            restarted: Start at random, whatever the first search started from.
        """

    @abstractmethod
    def embed(self, variables: Tensor, table: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the embeddings to insert at one step, float [n, k, width]; ``variables`` float64 [n, k, any]."""

    @abstractmethod
    def pull_back(self, gradient: Tensor, table: Tensor) -> Tensor:
        """Return the gradient of the variables, float64 [n, k, any], for that of the embeddings, [n, k, width]."""

    def constrain(self, variables: Tensor) -> Tensor:
        """Return the admissible variables nearest to ``variables``, float64 [n, k, any]."""
        return variables

    @abstractmethod
    def proposals(
        self, model: TextToImage, searches: Sequence[DenoisingSearch], template: Template, candidates: Tensor
    ) -> list[Proposal]:
        """Return what to draw of every search as it stands, without loss and cost."""

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its search ends.

        Raises:
            ValueError: A case has no target picture; the model has no room for ``tokens`` or fewer timesteps than
                ``timesteps``, or lacks the ``tables``.
        """
        space = space_of(model, self.tables)
        space.insert([""], self.tokens, self.insertion)  # refuses a k that does not fit
        require_timesteps(model, self.timesteps)
        require_targets(cases, type(self).__name__)
        candidates = self.candidates(space)

        def propose(traces: list[Trace]) -> list[Proposal]:
            self._begin(model, [trace for trace in traces if trace.attempts % self.timesteps == 0], candidates)
            return self._advance(model, [trace.state for trace in traces], candidates)

        rounds = self.timesteps * (1 + self.restarts)
        return search(model, cases, judge, propose, sampling=sampling, rounds=rounds, batch_size=self.batch_size)

    def _begin(self, model: TextToImage, traces: Sequence[Trace], candidates: Tensor) -> None:
        """Start a search for each case, or start it anew."""
        if not traces:
            return
        table = space_of(model, self.tables).look_up(candidates)
        targets = target_latents(model, [trace.case for trace in traces])
        for trace, target in zip(traces, targets, strict=True):
            restart = trace.attempts // self.timesteps
            number = trace.case.case_number
            first = self.start(table, self.start_stream(number, restart), restarted=restart > 0)
            variables = first.to(model.device)
            generator = self.search_stream(number, restart)
            mean, variance = torch.zeros_like(variables), torch.zeros_like(variables)
            trace.state = DenoisingSearch(trace.case, restart, generator, target, variables, mean, variance)

    def _advance(self, model: TextToImage, searches: Sequence[DenoisingSearch], candidates: Tensor) -> list[Proposal]:
        """Take ``steps_per_timestep`` steps of every search and propose what came of them."""
        space = space_of(model, self.tables)
        template = space.insert([state.case.prompt for state in searches], self.tokens, self.insertion)
        table = space.look_up(candidates)
        targets = torch.stack([state.target for state in searches])
        variables = torch.stack([state.variables for state in searches])
        mean = torch.stack([state.mean for state in searches])
        variance = torch.stack([state.variance for state in searches])
        shares = [state.steps // self.steps_per_timestep for state in searches]
        timesteps = torch.tensor([middle_timestep(model, share, self.timesteps) for share in shares]).to(model.device)
        losses = torch.zeros(len(searches), dtype=torch.float64, device=model.device)
        if self.repeat_draws:
            for state in searches:
                state.generator = self.search_stream(state.case.case_number, state.restart)
        generators = [state.generator for state in searches]

        for _ in range(self.steps_per_timestep):
            embeddings = self.embed(variables, table, generators)
            noise = torch.stack([torch.randn(model.latent_shape, generator=generator) for generator in generators])
            noise = noise.to(model.device, model.dtype)
            if self.schedule == "sampled":
                draws = [model.process.draw_one(generator) for generator in generators]
                timesteps = torch.stack(draws).to(model.device)
            latents = model.add_noise(targets, noise, timesteps)
            wanted = model.process.target(targets, noise)
            gradient, loss = embedding_gradient(
                model, template, embeddings, latents, timesteps, wanted, criterion=self.criterion
            )
            losses += loss
            for state in searches:
                state.steps += 1
            adam_step(
                variables,
                self.pull_back(gradient, table),
                mean,
                variance,
                steps=torch.tensor([state.steps for state in searches], device=model.device),
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
            )
            variables = self.constrain(variables)

        for state, *rows in zip(searches, variables, mean, variance, strict=True):
            state.variables, state.mean, state.variance = rows
        return [
            replace(proposal, loss=loss / self.steps_per_timestep, unet_evaluations=self.steps_per_timestep)
            for proposal, loss in zip(
                self.proposals(model, searches, template, candidates), losses.tolist(), strict=True
            )
        ]
