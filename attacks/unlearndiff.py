"""UnlearnDiffAtk: tokens that make the erased model denoise a picture of the erased concept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_search import (
    Criterion,
    Insertion,
    PromptTemplate,
    Schedule,
    adam_step,
    candidate_tokens,
    embedding_gradient,
    middle_timestep,
    one_hot_gradient,
    project_to_simplex,
    require_targets,
    require_timesteps,
    target_latents,
)
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.training import step_generator
from evaluation.verdicts import Judge

RESTART_STREAM = 2**32
"""Added to the seed for each restart."""


@plain_dataclass
class TokenSearch:
    """The search on one prompt.

    Its numbers are float64 whatever the model's precision: a token is drawn by comparing probabilities, and in
    float64 the search itself adds nothing to the noise that batched kernels put into a float32 gradient.

    Attributes:
        case: Whose search it is.
        seed: Seed of this start.
        generator: The prompt's own random stream.
        target: float [c, h, w], latents of the picture that the tokens should bring back.
        probabilities: float64 [k, candidates], each row on the simplex.
        mean: float64 [k, candidates], Adam's first moment.
        variance: float64 [k, candidates], Adam's second moment.
        steps: Steps taken.
    """

    case: PromptCase
    seed: int
    generator: torch.Generator
    target: Tensor
    probabilities: Tensor
    mean: Tensor
    variance: Tensor
    steps: int = 0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class UnlearnDiffAtk:
    """UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868).

    The erased model is itself a classifier: a prompt names the concept if it helps to denoise a picture x0 of it.
        minimise over P   E_{t, eps} || eps - eps_erased(x_t, t, text(prompt with tokens ~ P inserted)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   P: k rows on the probability simplex over the vocabulary
    Each step draws a token per row, passes the gradient of its one-hot vector straight through to P, clipped to
    [-1, 1], takes an Adam step and projects P back on the simplex. After ``steps_per_timestep`` steps the most probable
    tokens are read as text, which is tokenised anew, drawn and judged; the first success ends the search. A prompt
    that succeeds as it stands is not attacked. The unedited model takes part only through x0.

    Attributes:
        tokens: k, tokens inserted.
        insertion: Where they go.
        timesteps: Number of timesteps, and of checks of a search.
        steps_per_timestep: Adam steps before each check.
        schedule: ``even``: timesteps spread over the noise schedule, from low noise to high. ``sampled``: every step
            draws its own, uniformly.
        learning_rate: Adam's step size.
        weight_decay: Added to the gradient as weight_decay * P.
        criterion: ``l2`` or ``l1`` error of the noise.
        initialization: Rows of P at the start: ``uniform``, or ``random`` (projected uniform numbers).
        exclude_special: Keep start, end and padding out of the vocabulary. The published code samples them too, but
            they are lost when the tokens become text.
        readable: Keep to tokens whose text is read back as the same token, so that what is judged is what was found.
            The published code takes all; of SD's vocabulary most are words, of the canvas's only half.
        repeat_draws: Restart the random stream at every timestep, as the published code does unawares (its sampler
            reseeds the global generator), so that all timesteps share their draws.
        restarts: Searches that follow one without success, each over all timesteps, from random rows and with a random
            stream of its own. The published code has none; a command adds them with ``+attack.restarts=1``.
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
    initialization: Literal["uniform", "random"] = "uniform"
    exclude_special: bool = True
    readable: bool = False
    repeat_draws: bool = False
    restarts: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its search ends.

        Raises:
            ValueError: A case has no target picture, or the model has no room for ``tokens`` or fewer timesteps than
                ``timesteps``.
        """
        PromptTemplate.insert(model, [""], self.tokens, self.insertion)  # refuses a k that does not fit
        require_timesteps(model, self.timesteps)
        require_targets(cases, "UnlearnDiffAtk")
        candidates = candidate_tokens(model, exclude_special=self.exclude_special, readable=self.readable)

        def propose(traces: list[Trace]) -> list[Proposal]:
            self._begin(model, [trace for trace in traces if trace.attempts % self.timesteps == 0], len(candidates))
            return self._advance(model, [trace.state for trace in traces], candidates)

        rounds = self.timesteps * (1 + self.restarts)
        return search(model, cases, judge, propose, sampling=sampling, rounds=rounds, batch_size=self.batch_size)

    def _begin(self, model: TextToImage, traces: Sequence[Trace], candidates: int) -> None:
        """Start a search for each case, or start it anew."""
        if not traces:
            return
        targets = target_latents(model, [trace.case for trace in traces])
        for trace, target in zip(traces, targets, strict=True):
            restart = trace.attempts // self.timesteps
            seed = self.seed + restart * RESTART_STREAM
            generator = step_generator(seed, trace.case.case_number)
            shape = (self.tokens, candidates)
            probabilities = torch.full(shape, 1 / candidates, dtype=torch.float64)
            if self.initialization == "random" or restart > 0:
                probabilities = project_to_simplex(torch.rand(shape, generator=generator, dtype=torch.float64))
            probabilities = probabilities.to(model.device)
            mean, variance = torch.zeros_like(probabilities), torch.zeros_like(probabilities)
            trace.state = TokenSearch(trace.case, seed, generator, target, probabilities, mean, variance)

    def _advance(self, model: TextToImage, searches: Sequence[TokenSearch], candidates: Tensor) -> list[Proposal]:
        """Take ``steps_per_timestep`` steps of every search and read off its most probable tokens as text."""
        template = PromptTemplate.insert(model, [state.case.prompt for state in searches], self.tokens, self.insertion)
        table = model.vocabulary[candidates]
        targets = torch.stack([state.target for state in searches])
        probabilities = torch.stack([state.probabilities for state in searches])
        mean = torch.stack([state.mean for state in searches])
        variance = torch.stack([state.variance for state in searches])
        shares = [state.steps // self.steps_per_timestep for state in searches]
        timesteps = torch.tensor([middle_timestep(model, share, self.timesteps) for share in shares]).to(model.device)
        losses = torch.zeros(len(searches), dtype=torch.float64, device=model.device)
        if self.repeat_draws:
            for state in searches:
                state.generator = step_generator(state.seed, state.case.case_number)

        for _ in range(self.steps_per_timestep):
            race, noise = self._draw(model, searches, probabilities)
            if self.schedule == "sampled":
                draws = [torch.randint(model.training_timesteps, (), generator=state.generator) for state in searches]
                timesteps = torch.stack(draws).to(model.device)
            embeddings = table[draw_tokens(probabilities, race)]
            latents = model.add_noise(targets, noise, timesteps)
            gradient, loss = embedding_gradient(
                model, template, embeddings, latents, timesteps, noise, criterion=self.criterion
            )
            losses += loss
            for state in searches:
                state.steps += 1
            adam_step(
                probabilities,
                straight_through_gradient(gradient, table),
                mean,
                variance,
                steps=torch.tensor([state.steps for state in searches], device=model.device),
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
            )
            probabilities = project_to_simplex(probabilities)

        for state, *rows in zip(searches, probabilities, mean, variance, strict=True):
            state.probabilities, state.mean, state.variance = rows
        texts = template.texts(model, candidates[probabilities.argmax(dim=-1)])
        return [
            Proposal(text, loss=loss / self.steps_per_timestep, unet_evaluations=self.steps_per_timestep)
            for text, loss in zip(texts, losses.tolist(), strict=True)
        ]

    def _draw(
        self, model: TextToImage, searches: Sequence[TokenSearch], probabilities: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw one step's numbers: exponentials [n, k, candidates] and noise [n, c, h, w], each row from its own."""
        shape = probabilities.shape[1:]
        race = [torch.empty(shape, dtype=torch.float64).exponential_(generator=state.generator) for state in searches]
        noise = [torch.randn(model.latent_shape, generator=state.generator) for state in searches]
        return torch.stack(race).to(model.device), torch.stack(noise).to(model.device, model.dtype)


def draw_tokens(probabilities: Tensor, race: Tensor) -> Tensor:
    """Draw one token per row of ``probabilities``, float [..., candidates]; int64 [...].

    Each token runs for an exponential time at the rate of its probability, and the first to arrive is drawn. Unlike
    with a search in the cumulative sums, a small change of one token's probability can only change the draw to or from
    that token, so rounding hardly ever changes it.

    Args:
        probabilities: Any positive multiple of a distribution.
        race: Unit exponentials of the same shape.
    """
    return (probabilities / race).argmax(dim=-1)


def straight_through_gradient(gradient: Tensor, table: Tensor) -> Tensor:
    """Clip the gradient with respect to the one-hot rows to [-1, 1]; the simplex rows receive it instead.

    Args:
        gradient: float [n, k, width], with respect to the rows' embeddings.
        table: float [candidates, width], the embeddings of the candidates.

    Returns:
        float64 [n, k, candidates].
    """
    return one_hot_gradient(gradient, table).clamp(-1, 1).double()
