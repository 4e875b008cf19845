"""PEZ: tokens that make the erased model denoise a picture of the concept, found through continuous embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.projected_embeddings import FreeTokens, descend
from attacks.prompt_search import (
    Criterion,
    NoisyPictures,
    Schedule,
    random_rows,
    require_targets,
    require_timesteps,
    target_latents,
)
from attacks.tables import SearchesTables, Space, Tables, space_of
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.prompt_template import Insertion
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge


@plain_dataclass
class EmbeddingSearch:
    """The search on one prompt.

    Attributes:
        generator: The prompt's own random stream.
        target: float [c, h, w], latents of the picture x0.
        tokens: What is searched for.
    """

    generator: torch.Generator
    target: Tensor
    tokens: FreeTokens


@checked
class PEZ(SearchesTables):
    """PEZ (Wen et al., Hard Prompts Made Easy, NeurIPS 2023, arXiv 2302.03668) with UnlearnDiffAtk's objective.

        minimise over e   E_{t, eps} || eps - eps_erased(x_t, t, text(prompt with proj(e) inserted)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   x0: the unedited model's picture of the prompt
    proj takes each row of e to the vocabulary's embedding that is nearest by cosine. The gradient at proj(e) is applied
    to e itself, by AdamW. After ``steps_per_timestep`` steps proj(e) is read as text, which is tokenised anew, drawn
    and judged; the first success ends the search. A prompt that succeeds as it stands is not attacked. The unedited
    model takes part only through x0.

    Deviations from the published code: it matches CLIP's embedding of a picture, and returns the best prompt of all
    steps by that score, where ours tries the last one of every timestep.

    Attributes:
        tokens: k, tokens inserted.
        insertion: Where they go.
        timesteps: Number of timesteps, and of checks.
        steps_per_timestep: AdamW steps before each check.
        schedule: ``even``: timesteps spread over the noise schedule, from low noise to high. ``sampled``: every step
            draws its own, uniformly.
        learning_rate: AdamW's step size.
        weight_decay: Its decay, apart from the gradient.
        criterion: ``l2`` or ``l1`` error of the noise.
        tables: Which tables of embeddings the tokens live in where a T5 reads the prompt; see :mod:`attacks.tables`.
        exclude_special: Keep start, end and padding out of the vocabulary. The published code does not, but they are
            lost when the tokens become text.
        readable: Keep to tokens whose text is read back as the same token, so that what is judged is what was found.
        batch_size: Prompts attacked at a time; it changes speed and memory, never what a prompt's search draws.
        seed: Seed of the first tokens, which are uniformly random, and of all draws; each case has its own stream.
    """

    tokens: Annotated[int, Field(ge=1)] = 16
    insertion: Insertion = "prefix_k"
    timesteps: Annotated[int, Field(ge=1)] = 50
    steps_per_timestep: Annotated[int, Field(ge=1)] = 60
    schedule: Schedule = "even"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    criterion: Criterion = "l2"
    tables: Tables = "text"
    exclude_special: bool = True
    readable: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its search ends.

        Raises:
            ValueError: A case has no target picture, or the model has no room for ``tokens`` or fewer timesteps than
                ``timesteps``.
        """
        space = space_of(model, self.tables)
        space.insert([""], self.tokens, self.insertion)  # refuses a k that does not fit
        require_timesteps(model, self.timesteps)
        require_targets(cases, "PEZ")
        candidates = space.candidates(exclude_special=self.exclude_special, readable=self.readable)

        def propose(traces: list[Trace]) -> list[Proposal]:
            self._begin(space, [trace for trace in traces if trace.attempts == 0], candidates)
            found = descend(
                space,
                space.insert([trace.case.prompt for trace in traces], self.tokens, self.insertion),
                [trace.state.tokens for trace in traces],
                [self._draw(model, trace) for trace in traces],
                candidates,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                criterion=self.criterion,
            )
            return [replace(proposal, unet_evaluations=self.steps_per_timestep) for proposal in found]

        return search(
            model, cases, judge, propose, sampling=sampling, rounds=self.timesteps, batch_size=self.batch_size
        )

    def _begin(self, space: Space, traces: Sequence[Trace], candidates: Tensor) -> None:
        """Start a search for each case from the embeddings of random tokens."""
        if not traces:
            return
        targets = target_latents(space.model, [trace.case for trace in traces])
        for trace, target in zip(traces, targets, strict=True):
            generator = stream(self.seed, "pez/search", trace.case.case_number)
            tokens = FreeTokens.at(space, random_rows(candidates, self.tokens, generator))
            trace.state = EmbeddingSearch(generator, target, tokens)

    def _draw(self, model: TextToImage, trace: Trace) -> NoisyPictures:
        """Draw timesteps and noise of a case up to its next check."""
        return NoisyPictures.draw(
            model,
            trace.state.target,
            trace.state.generator,
            self.steps_per_timestep,
            schedule=self.schedule,
            share=trace.attempts,
            shares=self.timesteps,
        )
