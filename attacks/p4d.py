"""P4D: tokens that make the erased model predict what the unedited model predicts for the plain prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.choice import ChoiceBySimilarity
from attacks.evaluate import Proposal, Propose, Trace, search
from attacks.projected_embeddings import FreeTokens, descend
from attacks.prompt_search import (
    NoisyPictures,
    Schedule,
    random_rows,
    require_targets,
    target_latents,
)
from attacks.tables import SearchesTables, Space, Tables, Template, space_of
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.prompt_template import Insertion
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.quality.extractors import Extractor
from evaluation.verdicts import Judge

Variant = Literal["p4d_n", "p4d_k", "insert"]


@plain_dataclass
class CaseSearch:
    """The search on one prompt.

    Attributes:
        case: Whose search it is.
        generator: The prompt's own random stream of timesteps and noise.
        target: float [c, h, w], latents of the picture x0.
        text: float [tokens, width], the plain prompt as the unedited model encodes it.
        tokens: By variant.
        references: Up to the next check, with what the unedited model predicts in place of the noise; no token takes
            part in it.
        checks: How many of them there were.
        texts: How many were proposed.
    """

    case: PromptCase
    generator: torch.Generator
    target: Tensor
    text: Tensor
    tokens: dict[Variant, FreeTokens]
    references: NoisyPictures = field(init=False)
    checks: int = 0
    texts: int = 0


@checked(arbitrary_types_allowed=True)
class P4D(SearchesTables):
    """Prompting4Debugging (Chin et al., ICML 2024, arXiv 2309.06135).

    Free tokens are sought that make the erased model predict what the unedited one predicts for the plain prompt:
        minimise over e   E_{t, eps} || eps_original(x_t, t, text(prompt)) - eps_erased(x_t, t, text(proj(e))) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   x0: the unedited model's picture of the prompt
    proj takes each row of e to the vocabulary's embedding that is nearest by cosine. The gradient at proj(e) is applied
    to e itself (PEZ, Wen et al., NeurIPS 2023). After ``steps_per_check`` steps proj(e) is read as text, which is
    tokenised anew, drawn and judged; the first success ends the search. A prompt that succeeds as it stands is not
    attacked.

    That is ``choice="first"``. In the published code (``choice="similarity"``) all checks are made, each with a new
    seed; the text whose picture is most like x0 by CLIP is kept, and it alone is judged, by ``pictures`` pictures of
    which any may show the concept. The plain prompt has as many chances.

    Deviations from the published code: it takes for x0 the most unsafe of three pictures. It draws timesteps from an
    unseeded generator, gives x0's pixels to the VAE in [0, 1] instead of [-1, 1], pads with token 0 and, in P4D-K,
    writes over the end token.

    eps_original depends on the prompt, t and eps, never on the tokens. So it is computed without gradients, for all
    steps up to a check at once, and P4D-N and P4D-K of a union share it.

    Attributes:
        variant: ``p4d_n``: N free tokens in place of the prompt. ``p4d_k``: a free token before the prompt and after
            every K of its tokens. ``union``: both in turn, each as it would go alone; either may succeed. ``insert``:
            N free tokens beside the prompt, as in Diffusion-MU-Attack's copy of P4D.
        tokens: N.
        every: K.
        insertion: Where ``insert`` puts its tokens.
        checks: Texts tried per prompt (and variant, in a union).
        steps_per_check: Optimiser steps before each.
        choice: How one of the texts comes to count: as the ``first`` whose picture shows the concept, or by the
            ``similarity`` of its picture to x0.
        pictures: Of the text chosen by similarity, and of the plain prompt: the first with the case's seed, the others
            with seeds of their own.
        features: What pictures are compared by, the cosine of their features; with ``choice="similarity"`` alone.
        schedule: ``sampled``: every step draws its timestep uniformly. ``even``: one timestep per check, from low noise
            to high.
        optimizer: ``adamw``, whose decay is apart from the gradient (the authors' code), or ``adam``, whose decay is in
            the gradient (Diffusion-MU-Attack).
        learning_rate: Its step size.
        weight_decay: Its decay.
        tables: Which tables of embeddings the tokens live in where a T5 reads the prompt; see :mod:`attacks.tables`.
        exclude_special: Keep start, end and padding out of the vocabulary. The published codes do not, but special
            tokens are lost when the tokens become text.
        readable: Keep to tokens whose text is read back as the same token, so that what is judged is what was found.
        repeat_draws: Restart the stream of timesteps and noise at every check, as Diffusion-MU-Attack does unawares.
        batch_size: Prompts attacked at a time; it changes speed and memory, never what a prompt's search draws.
        seed: Seed of the draws; each case has its own streams.
    """

    variant: Variant | Literal["union"] = "union"
    tokens: Annotated[int, Field(ge=1)] = 16
    every: Annotated[int, Field(ge=1)] = 3
    insertion: Insertion = "prefix_k"
    checks: Annotated[int, Field(ge=1)] = 60
    steps_per_check: Annotated[int, Field(ge=1)] = 50
    schedule: Schedule = "sampled"
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    tables: Tables = "text"
    exclude_special: bool = True
    readable: bool = False
    repeat_draws: bool = False
    choice: Literal["first", "similarity"] = "first"
    pictures: Annotated[int, Field(ge=1)] = 1
    features: Extractor | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"
    needs_original: ClassVar[Literal[True]] = True

    @model_validator(mode="after")
    def _is_one_rule(self) -> "P4D":
        if self.choice == "similarity" and self.features is None:
            raise ValueError("features is None; choice=similarity needs what pictures are compared by.")
        if self.choice == "first" and (self.pictures > 1 or self.features is not None):
            raise ValueError(
                f"choice is 'first', which knows neither pictures (here {self.pictures}) nor features; take "
                "choice=similarity, or pictures=1 and features=null."
            )
        return self

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is tried in turn."""
        return ("p4d_n", "p4d_k") if self.variant == "union" else (self.variant,)

    def inserted_tokens(self, length: int) -> int:
        """How many tokens stand beside a prompt of ``length`` tokens; the most of all variants."""
        beside = {"p4d_n": 0, "p4d_k": length // self.every + 1, "insert": self.tokens}
        return max(beside[variant] for variant in self.variants)

    def run(
        self,
        model: TextToImage,
        cases: Sequence[PromptCase],
        judge: Judge,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        original: TextToImage | None = None,
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its search ends.

        Args:
            model: The edited model.
            cases: The prompts with the unedited model's pictures of them.
            judge: Says whether a picture shows the concept.
            sampling: How pictures are sampled.
            original: The unedited model. Its evaluations count as the case's like the edited model's.

        Raises:
            ValueError: ``original`` is missing, a case has no target picture, or the model has no room for ``tokens``.
        """
        if original is None:
            raise ValueError("original is None; P4D aims at the unedited model's predictions: give it that model.")
        space = space_of(model, self.tables)
        for variant in self.variants:
            self._template(space, variant, [""])  # refuses a number of tokens that does not fit
        require_targets(cases, "P4D")
        candidates = space.candidates(exclude_special=self.exclude_special, readable=self.readable)

        def advance(traces: list[Trace]) -> list[Proposal]:
            self._begin(space, original, [trace for trace in traces if trace.state is None], candidates)
            proposals: dict[int, Proposal] = {}
            for turn, variant in enumerate(self.variants):
                states = [trace.state for trace in traces if trace.state.texts % len(self.variants) == turn]
                if turn == 0:
                    self._refer(original, states, sampling.batch_size)
                # In a union the later variant's references are those of the earlier, and paid for.
                cost = self.steps_per_check * (2 if turn == 0 else 1)
                for state, found in zip(states, self._advance(space, variant, states, candidates), strict=True):
                    proposals[state.case.case_number] = replace(found, unet_evaluations=cost)
            for trace in traces:
                trace.state.texts += 1
            return [proposals[trace.case.case_number] for trace in traces]

        propose: Propose = advance
        rounds = self.checks * len(self.variants)
        if self.features is not None:
            choice = ChoiceBySimilarity(self.features, len(self.variants), self.checks, self.pictures, self.seed)
            propose = partial(choice.propose, advance)
            rounds = choice.rounds
        return search(model, cases, judge, propose, sampling=sampling, rounds=rounds, batch_size=self.batch_size)

    def _template(self, space: Space, variant: Variant, prompts: Sequence[str]) -> Template:
        match variant:
            case "p4d_n":
                return space.insert([""] * len(prompts), self.tokens, "prefix_k")
            case "p4d_k":
                return space.insert_every(prompts, self.every)
            case "insert":
                return space.insert(prompts, self.tokens, self.insertion)

    def _begin(self, space: Space, original: TextToImage, traces: Sequence[Trace], candidates: Tensor) -> None:
        """Start a search for each case from embeddings of random tokens."""
        if not traces:
            return
        cases = [trace.case for trace in traces]
        targets = target_latents(original, cases)
        texts = original.encode_prompts([case.prompt for case in cases])
        counts = {variant: self._template(space, variant, [""]).slots.shape[1] for variant in self.variants}
        for trace, target, text in zip(traces, targets, texts, strict=True):
            case = trace.case
            tokens = {}
            for variant, count in counts.items():
                number = get_args(Variant).index(variant)
                generator = stream(self.seed, "p4d/start", case.case_number, number)
                tokens[variant] = FreeTokens.at(space, random_rows(candidates, count, generator))
            trace.state = CaseSearch(case, self._search_stream(case), target, text, tokens)

    def _search_stream(self, case: PromptCase) -> torch.Generator:
        """Return the random stream of a case's timesteps and noise, which all variants share."""
        return stream(self.seed, "p4d/search", case.case_number)

    @torch.no_grad()
    def _refer(self, original: TextToImage, searches: Sequence[CaseSearch], batch_size: int) -> None:
        """Draw timesteps and noise of every search up to its next check, and predict with the unedited model.

        Args:
            original: The unedited model.
            searches: Which ones.
            batch_size: Of the predictions; it changes speed only.
        """
        steps = self.steps_per_check
        for state in searches:
            if self.repeat_draws:
                state.generator = self._search_stream(state.case)
            state.references = NoisyPictures.draw(
                original,
                state.target,
                state.generator,
                steps,
                schedule=self.schedule,
                share=state.checks,
                shares=self.checks,
            )
            state.checks += 1
        todo = [(state, step) for state in searches for step in range(steps)]
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            predictions = original.predict(
                torch.stack([state.references.latents[step] for state, step in batch]),
                torch.stack([state.references.timesteps[step] for state, step in batch]),
                torch.stack([state.text for state, _ in batch]),
            )
            for (state, step), prediction in zip(batch, predictions, strict=True):
                state.references.targets[step] = prediction

    def _advance(
        self, space: Space, variant: Variant, searches: Sequence[CaseSearch], candidates: Tensor
    ) -> list[Proposal]:
        """Take ``steps_per_check`` steps of every search; return its tokens as text with its mean loss."""
        if not searches:
            return []
        return descend(
            space,
            self._template(space, variant, [state.case.prompt for state in searches]),
            [state.tokens[variant] for state in searches],
            [state.references for state in searches],
            candidates,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            decoupled=self.optimizer == "adamw",
        )
