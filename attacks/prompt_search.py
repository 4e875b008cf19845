"""What token attacks share: where tokens go in a prompt, which may go there, gradients, optimiser, projections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from attacks.cases import PromptCase
from diffusion.model import TextToImage

Insertion = Literal["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"]
"""Where k tokens enter a prompt of L tokens: before it; after it; after L // 2 of its tokens; one after each
L // (k + 1) of them; one before each three of them."""

EmbeddingStart = Literal["mean", "random"]
"""Free embeddings at first: the mean of the vocabulary's, or those of random tokens."""

Criterion = Literal["l2", "l1"]
"""The mean squared, or the mean absolute error."""

Schedule = Literal["even", "sampled"]
"""Timesteps spread over the noise schedule, one for each check, from low noise to high; or drawn anew, uniformly."""

WORDS_PER_TOKEN = 3
"""Prompt tokens that follow each inserted token in ``per_k_words``."""

LARGEST = 256
"""Coordinates that the projection on the simplex starts from; it changes speed only."""


def insertion_points(length: int, count: int, insertion: Insertion) -> list[int]:
    """Count how many of a prompt's ``length`` tokens come before each of ``count`` inserted ones; never decreasing."""
    match insertion:
        case "prefix_k":
            return [0] * count
        case "suffix_k":
            return [length] * count
        case "mid_k":
            return [length // 2] * count
        case "insert_k":
            return [length // (count + 1) * (index + 1) for index in range(count)]
        case "per_k_words":
            return [min(WORDS_PER_TOKEN * index, length) for index in range(count)]


@dataclass(frozen=True)
class PromptTemplate:
    """Tokenised prompts with free slots for inserted tokens.

    Attributes:
        ids: int64 [n, tokens]: start, prompt and slots, end, padding; a slot holds the end token until it is filled.
        slots: int64 [n, k], the positions of the inserted tokens. Where a prompt has fewer than k, the rest lie behind
            the last position, and what is put there is lost.
        ends: int64 [n], the position of the end token.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor

    @classmethod
    def insert(cls, model: TextToImage, prompts: Sequence[str], count: int, insertion: Insertion) -> "PromptTemplate":
        """Open ``count`` slots in each prompt.

        Prompt tokens keep their order and padding makes room. Where there is too little, the prompt loses its tail;
        start token, slots and end token always stay.

        Raises:
            ValueError: The text encoder has too few positions for ``count`` tokens.
        """
        return cls._open(model, prompts, count, lambda _, length: insertion_points(length, count, insertion))

    @classmethod
    def insert_every(cls, model: TextToImage, prompts: Sequence[str], period: int) -> "PromptTemplate":
        """Open a slot before each prompt and after every ``period`` of its tokens: L // period + 1 for L of them.

        A prompt too long for that loses its tail.
        """
        most = model.max_tokens - 2
        count = -(-most // (period + 1))
        return cls._open(model, prompts, count, lambda _, length: list(range(0, length + 1, period))[:count])

    @classmethod
    def at_placeholder(cls, model: TextToImage, captions: Sequence[str], count: int) -> "PromptTemplate":
        """Open ``count`` slots in each caption in the place of its ``{}``.

        A caption too long for that loses its tail.
        """
        before = [model.tokenize([caption.partition("{}")[0]])[0].tolist() for caption in captions]
        points = [row.index(model.tokenizer.eos_token_id) - 1 for row in before]
        prompts = [caption.replace("{}", " ", 1) for caption in captions]
        return cls._open(model, prompts, count, lambda index, length: [min(points[index], length)] * count)

    @classmethod
    def _open(
        cls, model: TextToImage, prompts: Sequence[str], count: int, points_of: Callable[[int, int], list[int]]
    ) -> "PromptTemplate":
        """Open up to ``count`` slots in each prompt, before those tokens that ``points_of`` its index and length tells.

        Raises:
            ValueError: The text encoder has too few positions for ``count`` tokens.
        """
        tokenizer = model.tokenizer
        most = model.max_tokens - 2
        if not 1 <= count <= most:
            raise ValueError(f"{count} tokens cannot be inserted: this model's prompts take 1 to {most} of them.")
        rows, slots, ends = [], [], []
        for number, row in enumerate(model.tokenize(prompts).tolist()):
            tokens = row[1 : row.index(tokenizer.eos_token_id)][: most - count]
            points = points_of(number, len(tokens))
            slots.append([1 + point + index for index, point in enumerate(points)])
            slots[-1] += [model.max_tokens] * (count - len(points))
            for index, point in enumerate(points):
                tokens.insert(point + index, tokenizer.eos_token_id)
            ends.append(1 + len(tokens))
            padding = [tokenizer.pad_token_id] * (most - len(tokens))
            rows.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding])
        device = model.vocabulary.device
        return cls(*(torch.tensor(values, device=device) for values in (rows, slots, ends)))

    def repeat(self, times: int) -> "PromptTemplate":
        """Take each prompt several times in a row."""
        return PromptTemplate(*(values.repeat_interleave(times, dim=0) for values in (self.ids, self.slots, self.ends)))

    def fill(self, tokens: Tensor) -> Tensor:
        """Put ``tokens``, int64 [n, k], in the slots; ids int64 [n, tokens]."""
        return functional.pad(self.ids, (0, 1)).scatter(1, self.slots, tokens)[:, :-1]

    def encode(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings``, float [n, k, width], in the slots; differentiable in them.

        Returns:
            float [n, tokens, width].
        """
        slots = self.slots[..., None].expand_as(token_embeddings)
        rows = functional.pad(model.vocabulary[self.ids], (0, 0, 0, 1)).scatter(1, slots, token_embeddings)
        return model.encode_embeddings(rows[:, :-1], self.ends)

    @torch.no_grad()
    def encode_detached(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings`` of any precision, without gradients."""
        return self.encode(model, token_embeddings.to(model.vocabulary.dtype))

    def __getitem__(self, index: Tensor) -> "PromptTemplate":
        """Take the prompts at ``index``, int64 [m], which may repeat."""
        return PromptTemplate(self.ids[index], self.slots[index], self.ends[index])

    def texts(self, model: TextToImage, tokens: Tensor) -> list[str]:
        """Read the prompts as text, with ``tokens``, int64 [n, k], in the slots.

        Special tokens have no text, and reading the text again may cut it into other tokens.
        """
        filled = self.fill(tokens).tolist()
        return [
            model.tokenizer.decode(row[1:end], skip_special_tokens=True).strip()
            for row, end in zip(filled, self.ends.tolist(), strict=True)
        ]


def candidate_tokens(model: TextToImage, *, exclude_special: bool = True, readable: bool = False) -> Tensor:
    """List the ids that an attack may insert, int64 [candidates].

    Args:
        model: Whose vocabulary it is.
        exclude_special: Leave out start, end and padding.
        readable: Leave out tokens whose text is not read back as that token, such as pieces that join the next word.
    """
    special = set(model.tokenizer.all_special_ids) if exclude_special else set()
    size = min(len(model.tokenizer), len(model.vocabulary))
    tokens = [token for token in range(size) if token not in special]
    if readable:
        texts = model.tokenizer.batch_decode([[token] for token in tokens])
        read_back = model.tokenizer(texts, add_special_tokens=False).input_ids
        tokens = [token for token, ids in zip(tokens, read_back, strict=True) if ids == [token]]
    return torch.tensor(tokens, device=model.vocabulary.device)


def first_embeddings(table: Tensor, count: int, start: EmbeddingStart, generator: torch.Generator) -> Tensor:
    """Return the ``count`` free embeddings that an optimisation starts from, float64 [count, width].

    Args:
        table: float [candidates, width], the embeddings of the vocabulary.
        count: How many.
        start: Which.
        generator: Draws the random tokens.
    """
    if start == "mean":
        return table.double().mean(dim=0).repeat(count, 1)
    return random_rows(table, count, generator).double()


def random_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of the rows (ids of candidates, or their embeddings) uniformly and independently."""
    return rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]


def require_targets(cases: Sequence[PromptCase], attack: str) -> None:
    """Refuse cases without the picture that an attack aims at.

    Raises:
        ValueError: A case has no target picture.
    """
    for case in cases:
        if case.target is None:
            raise ValueError(
                f"case {case.case_number} has no target picture; {attack} needs the unedited model's picture of every "
                "prompt."
            )


def require_timesteps(model: TextToImage, timesteps: int) -> None:
    """Refuse more timesteps than the model has.

    Raises:
        ValueError: There are too many.
    """
    if timesteps > model.training_timesteps:
        raise ValueError(f"timesteps is {timesteps}; the model has {model.training_timesteps}: use fewer.")


def target_latents(model: TextToImage, cases: Sequence[PromptCase]) -> Tensor:
    """Encode the pictures of cases that all have one; float [n, c, h, w]."""
    return model.encode_images(torch.stack([case.target for case in cases if case.target is not None]))


def middle_timestep(model: TextToImage, share: int, shares: int) -> int:
    """Return the middle of one of equal shares of the noise schedule, from low noise to high (10, 30, ..., 990)."""
    return (2 * share + 1) * model.training_timesteps // (2 * shares)


@dataclass(frozen=True)
class NoisyPictures:
    """Draws of x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps of one picture x0.

    Attributes:
        timesteps: int64 [draws].
        latents: float [draws, c, h, w], x_t.
        noise: float [draws, c, h, w], what should be predicted of it: eps.
    """

    timesteps: Tensor
    latents: Tensor
    noise: Tensor

    @classmethod
    def draw(
        cls,
        model: TextToImage,
        target: Tensor,
        generator: torch.Generator,
        draws: int,
        *,
        schedule: Schedule,
        share: int,
        shares: int,
    ) -> "NoisyPictures":
        """Draw timesteps and noise.

        Args:
            model: Whose noise schedule it is.
            target: float [c, h, w], x0.
            generator: The only source of the draws.
            draws: How many.
            schedule: How timesteps are chosen.
            share: Which of the equal ``shares`` of the noise schedule an ``even`` one is at.
            shares: How many there are.
        """
        if schedule == "even":
            timesteps = torch.full((draws,), middle_timestep(model, share, shares))
        else:
            timesteps = torch.randint(model.training_timesteps, (draws,), generator=generator)
        timesteps = timesteps.to(model.device)
        noise = torch.randn((draws, *model.latent_shape), generator=generator).to(model.device, model.dtype)
        return cls(timesteps, model.add_noise(target.expand_as(noise), noise, timesteps), noise)


def summed_errors(predictions: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
    """Sum the error of each noise prediction; float [n], in single precision at least.

    Sums, because the gradient of a mean over many pixels underflows in half precision.
    """
    errors = (predictions - targets).flatten(1)
    errors = errors.square() if criterion == "l2" else errors.abs()
    return errors.sum(dim=1, dtype=torch.promote_types(errors.dtype, torch.float32))


def embedding_gradient(
    model: TextToImage,
    template: PromptTemplate,
    embeddings: Tensor,
    latents: Tensor,
    timesteps: Tensor,
    targets: Tensor,
    *,
    criterion: Criterion = "l2",
) -> tuple[Tensor, Tensor]:
    """Compute the error of each prompt's noise prediction and its gradient with respect to the inserted embeddings.

    Args:
        model: The erased model.
        template: Of n prompts.
        embeddings: float [n, k, width], of the inserted tokens.
        latents: float [n, c, h, w], x_t.
        timesteps: int64 [n].
        targets: float [n, c, h, w], the noise that should be predicted.
        criterion: What the error is.

    Returns:
        The gradient, float [n, k, width], and the losses, float [n]; both in single precision at least.
    """
    embeddings = embeddings.detach().requires_grad_()
    with torch.enable_grad():
        predictions = model.predict_noise(latents, timesteps, template.encode(model, embeddings))
        sums = summed_errors(predictions, targets, criterion)
        (gradient,) = torch.autograd.grad(sums.sum(), embeddings)
    return gradient.to(sums.dtype) / targets[0].numel(), sums.detach() / targets[0].numel()


def one_hot_gradient(gradient: Tensor, table: Tensor) -> Tensor:
    """Compute the gradient with respect to the one-hot rows that choose the embeddings.

    Args:
        gradient: float [n, k, width], with respect to the rows' embeddings.
        table: float [candidates, width], the embeddings of the candidates.

    Returns:
        float [n, k, candidates], in single precision at least.
    """
    precise = torch.promote_types(table.dtype, torch.float32)
    return gradient.to(precise) @ table.to(precise).T


def adam_step(
    parameters: Tensor,
    gradient: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    steps: Tensor,
    learning_rate: float,
    weight_decay: float,
    decoupled: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> None:
    """Take one step of Adam, in place; prompts may differ in steps taken.

    Args:
        parameters: float [n, k, any].
        gradient: Of the same shape, like ``mean`` and ``variance``, its running moments.
        mean: First moment.
        variance: Second moment.
        steps: int64 [n], this step counted.
        learning_rate: Step size.
        weight_decay: Factor of the parameters that is added to the gradient (L2).
        decoupled: Take that factor times the step size off the parameters instead, as AdamW does.
        betas: Decay of the two moments.
        epsilon: Added to the root of the second moment.
    """
    if decoupled:
        parameters *= 1 - learning_rate * weight_decay
    else:
        gradient = gradient + weight_decay * parameters
    mean.lerp_(gradient, 1 - betas[0])
    variance.lerp_(gradient.square(), 1 - betas[1])
    unbiased_mean, unbiased_variance = (
        moment / (1 - beta ** steps.double())[:, None, None]
        for moment, beta in zip((mean, variance), betas, strict=True)
    )
    parameters -= learning_rate * unbiased_mean / (unbiased_variance.sqrt() + epsilon)


def nearest_tokens(embeddings: Tensor, table: Tensor) -> Tensor:
    """Find the row of ``table``, float [candidates, width], that is most alike by cosine; int64 [n, k].

    Args:
        embeddings: float [n, k, width].
        table: Rows of length one; the length of an embedding makes no difference.
    """
    return (embeddings.to(table.dtype) @ table.T).argmax(dim=-1)


def project_to_simplex(points: Tensor) -> Tensor:
    """Project each row on the probability simplex: max(p - theta, 0), with the theta that makes the row sum to 1.

    theta is the largest (sum over S - 1) / |S| of all sets S of coordinates. Sets of the largest few hundred give a
    first value from below; Newton's steps on the sum, which is piecewise linear, lead from there to the exact one
    (Michelot, 1986), mostly in two or three passes over all rows at once. That is several times faster than sorting
    rows of 49,408.

    Args:
        points: float [..., coordinates], in single precision at least.
    """
    points = points - points.amax(dim=-1, keepdim=True)
    largest = points.topk(min(LARGEST, points.shape[-1]), dim=-1).values
    sizes = torch.arange(1, largest.shape[-1] + 1, device=points.device)
    threshold = ((largest.cumsum(dim=-1) - 1) / sizes).amax(dim=-1, keepdim=True)
    above = torch.full_like(threshold, points.shape[-1] + 1)
    while True:
        excess = (points - threshold).clamp_min_(0)
        # Counting by signs stays in one precision; the sum of a mask converts it first, which takes twice as long.
        above, previously = excess.sign().sum(dim=-1, keepdim=True), above
        if not (above < previously).any():
            return excess
        threshold = threshold + ((excess.sum(dim=-1, keepdim=True) - 1) / above).clamp_min(0)
