"""GCG: tokens that make the erased model denoise a picture of the concept, found by greedy substitutions."""

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
    NoisyPictures,
    Schedule,
    embedding_gradient,
    one_hot_gradient,
    random_rows,
    require_targets,
    require_timesteps,
    summed_errors,
    target_latents,
)
from attacks.tables import SearchesTables, Space, Tables, Template, proposals_of, space_of
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.prompt_template import Insertion
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge


@plain_dataclass
class TokenSearch:
    """The search on one prompt.

    Attributes:
        generator: The prompt's own random stream.
        target: float [c, h, w], latents of the picture x0.
        tokens: int64 [k], ids of the tokens so far.
    """

    generator: torch.Generator
    target: Tensor
    tokens: Tensor


@plain_dataclass
class Draws:
    """What one step of n searches draws.

    Attributes:
        timesteps: int64 [n, draws].
        latents: float [n, draws, c, h, w], x_t.
        targets: float [n, draws, c, h, w], what should be predicted.
        positions: int64 [n, B], which token each substitution replaces.
        ranks: int64 [n, B], by which of the top k of that position.
    """

    timesteps: Tensor
    latents: Tensor
    targets: Tensor
    positions: Tensor
    ranks: Tensor


@checked
class GCG(SearchesTables):
    """Greedy Coordinate Gradient (Zou et al., arXiv 2307.15043) with UnlearnDiffAtk's objective.

        minimise over k tokens s   L(s) = mean over draws of || eps - eps_erased(x_t, t, text(prompt with s)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   x0: the unedited model's picture of the prompt
    Each step draws (t, eps) anew and takes the gradient of L with respect to the one-hot rows of s. The ``top_k``
    tokens with the most negative gradient are what a position may change to. B times a uniformly random position
    changes to a uniformly random one of them; of these B texts, which differ from s in one token each, that with the
    least L, on the same draws, is the next s. After ``steps_per_timestep`` steps s is read as text, which is tokenised
    anew, drawn and judged; the first success ends the search. A prompt that succeeds as it stands is not attacked. The
    unedited model takes part only through x0.

    Deviations from the published code: it goes through the positions in equal shares, where the paper draws them, and
    its filter keeps a text that is read back as as many tokens, even if they are others.

    Attributes:
        tokens: k, tokens inserted.
        insertion: Where they go.
        timesteps: Number of timesteps, and of checks.
        steps_per_timestep: Substitutions made before each check.
        schedule: ``even``: timesteps spread over the noise schedule, from low noise to high. ``sampled``: every draw
            has its own, uniformly.
        top_k: Tokens that a position may change to.
        substitutions: B, texts compared at each step.
        draws: Of (t, eps) at each step; all texts are compared on the same ones.
        keep_best: Keep s where none of the B texts has a lower L. In the paper the best of the B replaces it always.
        initial_token: A token's text, as ``!``, that every position starts from; random tokens if None.
        criterion: ``l2`` or ``l1`` error of the noise.
        tables: Which tables of embeddings the tokens live in where a T5 reads the prompt; see :mod:`attacks.tables`.
        exclude_special: Keep start, end and padding out of the vocabulary; they are lost when the tokens become text.
        readable: Keep to tokens whose text is read back as the same token, so that what is judged is what was found.
        filtered: Of the B texts compare only those that are not s itself and are read back as the tokens that they are
            made of, so that what is judged is what was found. Where none is left, s stays as it is.
        batch_size: Prompts attacked at a time; it changes speed and memory, never what a prompt's search draws.
        forward_batch_size: Texts compared at a time, of all prompts together; it changes speed and memory only.
        seed: Seed of the draws; each case has its own stream.
    """

    tokens: Annotated[int, Field(ge=1)] = 3
    insertion: Insertion = "prefix_k"
    timesteps: Annotated[int, Field(ge=1)] = 50
    steps_per_timestep: Annotated[int, Field(ge=1)] = 10
    schedule: Schedule = "even"
    top_k: Annotated[int, Field(ge=1)] = 256
    substitutions: Annotated[int, Field(ge=1)] = 512
    draws: Annotated[int, Field(ge=1)] = 2
    keep_best: bool = False
    initial_token: str | None = None
    criterion: Criterion = "l2"
    tables: Tables = "text"
    exclude_special: bool = True
    readable: bool = False
    filtered: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 32
    forward_batch_size: Annotated[int, Field(ge=1)] = 128
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its search ends.

        Raises:
            ValueError: A case has no target picture; the model has no room for ``tokens``, or fewer timesteps than
                ``timesteps``; there are fewer tokens than ``top_k``; ``initial_token`` is not one of them.
        """
        space = space_of(model, self.tables)
        space.insert([""], self.tokens, self.insertion)  # refuses a k that does not fit
        require_timesteps(model, self.timesteps)
        require_targets(cases, "GCG")
        candidates = space.candidates(exclude_special=self.exclude_special, readable=self.readable)
        if self.top_k > len(candidates):
            raise ValueError(f"top_k is {self.top_k}; there are {len(candidates)} tokens to choose from: use fewer.")
        initial = None if self.initial_token is None else token_of(space, self.initial_token, candidates)

        def propose(traces: list[Trace]) -> list[Proposal]:
            self._begin(model, [trace for trace in traces if trace.attempts == 0], candidates, initial)
            return self._advance(space, traces, candidates)

        return search(
            model, cases, judge, propose, sampling=sampling, rounds=self.timesteps, batch_size=self.batch_size
        )

    def _begin(self, model: TextToImage, traces: Sequence[Trace], candidates: Tensor, initial: int | None) -> None:
        """Start a search for each case."""
        if not traces:
            return
        targets = target_latents(model, [trace.case for trace in traces])
        for trace, target in zip(traces, targets, strict=True):
            generator = stream(self.seed, "gcg/search", trace.case.case_number)
            tokens = random_rows(candidates, self.tokens, generator)
            trace.state = TokenSearch(
                generator, target, tokens if initial is None else torch.full_like(tokens, initial)
            )

    def _advance(self, space: Space, traces: Sequence[Trace], candidates: Tensor) -> list[Proposal]:
        """Take ``steps_per_timestep`` steps of every search and read its tokens as text."""
        template = space.insert([trace.case.prompt for trace in traces], self.tokens, self.insertion)
        model, table = space.model, space.look_up(candidates)
        tokens = torch.stack([trace.state.tokens for trace in traces])
        losses = torch.zeros(len(traces), dtype=torch.float64, device=model.device)

        for _ in range(self.steps_per_timestep):
            drawn = self._draw(model, traces)
            gradient, loss = self._gradient(model, template, space.look_up(tokens), drawn)
            losses += loss
            promising = candidates[(-one_hot_gradient(gradient, table)).topk(self.top_k, dim=-1).indices]
            texts = substitute(tokens, promising, drawn.positions, drawn.ranks)
            if self.filtered:
                texts = read_back(model, template, texts, tokens)
            least, best = self._losses(model, template, texts, drawn).min(dim=1)
            chosen = texts.take_along_dim(best[:, None, None], dim=1)[:, 0]
            tokens = torch.where((least < loss)[:, None], chosen, tokens) if self.keep_best else chosen

        for trace, row in zip(traces, tokens, strict=True):
            trace.state.tokens = row
        cost = self.steps_per_timestep * self.draws * (1 + self.substitutions)
        return [
            replace(proposal, loss=loss / self.steps_per_timestep, unet_evaluations=cost)
            for proposal, loss in zip(proposals_of(model, template, tokens), losses.tolist(), strict=True)
        ]

    def _draw(self, model: TextToImage, traces: Sequence[Trace]) -> Draws:
        """Draw what the next step needs, each case from its own stream."""
        rows = []
        for trace in traces:
            generator = trace.state.generator
            pictures = NoisyPictures.draw(
                model,
                trace.state.target,
                generator,
                self.draws,
                schedule=self.schedule,
                share=trace.attempts,
                shares=self.timesteps,
            )
            positions = torch.randint(self.tokens, (self.substitutions,), generator=generator).to(model.device)
            ranks = torch.randint(self.top_k, (self.substitutions,), generator=generator).to(model.device)
            rows.append((pictures.timesteps, pictures.latents, pictures.targets, positions, ranks))
        return Draws(*(torch.stack(values) for values in zip(*rows, strict=True)))

    def _gradient(
        self, model: TextToImage, template: Template, embeddings: Tensor, drawn: Draws
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradient of each prompt's L with respect to its embeddings, float [n, k, width], and L itself."""
        parts = [
            embedding_gradient(model, template, embeddings, latents, timesteps, targets, criterion=self.criterion)
            for latents, timesteps, targets in zip(
                drawn.latents.unbind(1), drawn.timesteps.unbind(1), drawn.targets.unbind(1), strict=True
            )
        ]
        gradients, losses = (torch.stack(values).mean(dim=0) for values in zip(*parts, strict=True))
        return gradients, losses

    @torch.no_grad()
    def _losses(self, model: TextToImage, template: Template, texts: Tensor, drawn: Draws) -> Tensor:
        """Compute L, float [n, B], of each prompt with each of its ``texts``, int64 [n, B, k], in the slots."""
        prompts, width = texts.shape[:2]
        rows = texts.flatten(0, 1)
        every_owner = torch.arange(prompts, device=model.device).repeat_interleave(width)
        losses = []
        for tokens, owners in zip(*(each.split(self.forward_batch_size) for each in (rows, every_owner)), strict=True):
            encoded = template[owners].encode_tokens(model, tokens)
            errors = [
                summed_errors(
                    model.predict(drawn.latents[owners, draw], drawn.timesteps[owners, draw], encoded),
                    drawn.targets[owners, draw],
                    self.criterion,
                )
                for draw in range(self.draws)
            ]
            losses.append(torch.stack(errors).mean(dim=0))
        return torch.cat(losses).view(prompts, width) / drawn.targets[0, 0].numel()


def substitute(tokens: Tensor, promising: Tensor, positions: Tensor, ranks: Tensor) -> Tensor:
    """Make B texts of each row of tokens, with one token changed in each; int64 [n, B, k].

    Args:
        tokens: int64 [n, k].
        promising: int64 [n, k, top k], what each position may change to.
        positions: int64 [n, B], which position changes.
        ranks: int64 [n, B], to which of its promising tokens.
    """
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    texts = tokens[:, None].repeat(1, positions.shape[1], 1)
    return texts.scatter(2, positions[..., None], promising[rows, positions, ranks][..., None])


def read_back(model: TextToImage, template: Template, texts: Tensor, tokens: Tensor) -> Tensor:
    """Put texts that are read back as they are in the places of the others, and of those that change nothing.

    Args:
        model: Whose tokenizer.
        template: Of n prompts.
        texts: int64 [n, B, k], what is in their slots.
        tokens: int64 [n, k], what was in their slots before; taken where no text stays.

    Returns:
        int64 [n, B, k].
    """
    prompts, width, count = texts.shape
    same = template.repeat(width).comes_back(model, texts.flatten(0, 1)).view(prompts, width)
    fine = same & (texts != tokens[:, None]).any(dim=2)
    places = torch.arange(width, device=texts.device).expand(prompts, -1)
    last = torch.where(fine, places, -1).amax(dim=1, keepdim=True)
    kept = texts.take_along_dim(torch.where(fine, places, last.clamp(min=0))[..., None].expand(-1, -1, count), dim=1)
    return torch.where(last[..., None] < 0, tokens[:, None], kept)


def token_of(space: Space, text: str, candidates: Tensor) -> int:
    """Return the id of a text that is one of the candidates.

    Raises:
        ValueError: It is several tokens, or one that may not be inserted.
    """
    ids = space.tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] not in candidates.tolist():
        raise ValueError(f"initial_token is {text!r}; it must be the text of one token that may be inserted, as '!'.")
    return int(ids[0])
