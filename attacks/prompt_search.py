"""What token attacks share: which tokens may go in a prompt, gradients, optimiser, projections."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from attacks.cases import PromptCase
from diffusion.finite import is_finite, require_finite
from diffusion.model import TextToImage
from diffusion.precision import at_least_float32

EmbeddingStart = Literal["mean", "random"]
"""Free embeddings at first: the mean of the vocabulary's, or those of random tokens."""

Criterion = Literal["l2", "l1"]
"""The mean squared, or the mean absolute error."""

Schedule = Literal["even", "sampled"]
"""Timesteps spread over the noise schedule, one for each check, from low noise to high; or drawn anew, uniformly."""

ATTACK_DIVERGED = "the attack has diverged, or the arithmetic of model.precision overflows; take a smaller step size"
"""What to do about a loss that is not finite."""

LARGEST = 256
"""Coordinates that the projection on the simplex starts from; it changes speed only."""


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


def middle_timestep(model: TextToImage, share: int, shares: int) -> float:
    """Return the middle of one of equal shares of the noise schedule, from low noise to high (10, 30, ..., 990)."""
    return model.process.middle(share, shares)


@dataclass(frozen=True)
class NoisyPictures:
    """Draws of x_t, one picture x0 with noise.

    Attributes:
        timesteps: [draws].
        latents: float [draws, c, h, w], x_t.
        targets: float [draws, c, h, w], what should be predicted of it: of Stable Diffusion the noise.
    """

    timesteps: Tensor
    latents: Tensor
    targets: Tensor

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
            timesteps = model.process.draw(draws, generator)
        timesteps = timesteps.to(model.device)
        noise = torch.randn((draws, *model.latent_shape), generator=generator).to(model.device, model.dtype)
        pictures = target.expand_as(noise)
        return cls(timesteps, model.add_noise(pictures, noise, timesteps), model.process.target(pictures, noise))


def summed_errors(predictions: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
    """Sum the error of each noise prediction; float [n], in single precision at least.

    Sums, because the gradient of a mean over many pixels underflows in half precision.
    """
    errors = (predictions.to(at_least_float32(predictions.dtype)) - targets).flatten(1)
    errors = errors.square() if criterion == "l2" else errors.abs()
    return errors.sum(dim=1)


class Slots(Protocol):
    """Prompts with free slots: :class:`diffusion.prompt_template.PromptTemplate` or one that more encoders read."""

    def encode(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings``, float [n, k, width], in the slots; differentiable in them."""


def embedding_gradient(
    model: TextToImage,
    template: Slots,
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
        targets: float [n, c, h, w], what should be predicted.
        criterion: What the error is.

    Returns:
        The gradient, float [n, k, width], and the losses, float [n]; both in single precision at least.

    Raises:
        NotFiniteError: They are infinite or NaN.
    """
    embeddings = embeddings.detach().requires_grad_()
    with torch.enable_grad():
        predictions = model.predict(latents, timesteps, template.encode(model, embeddings))
        sums = summed_errors(predictions, targets, criterion)
        (gradient,) = torch.autograd.grad(sums.sum(), embeddings)
    # Asked once, as the answer is waited for.
    if not is_finite(torch.cat([sums.detach(), gradient.flatten()])):
        require_finite(sums.detach(), "The attack's loss", ATTACK_DIVERGED)
        require_finite(gradient, "The gradient of the attack's loss", ATTACK_DIVERGED)
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
