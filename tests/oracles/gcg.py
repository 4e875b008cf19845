"""GCG on one prompt, step by step, from the paper's algorithm: one-hot rows, sorted lists, one text at a time."""

from collections.abc import Iterator

import torch

from diffusion.model import TextToImage
from tests.oracles.unlearndiff import insert, loss_of_one_hot, prompt_tokens


def attack(
    model: TextToImage,
    prompt: str,
    x0: torch.Tensor,
    generator: torch.Generator,
    *,
    count: int,
    where: str,
    timesteps: list[int | None],
    steps: int,
    top_k: int,
    substitutions: int,
    draws: int,
    keep_best: bool,
) -> Iterator[tuple[str, float]]:
    """After each timestep, None to draw one for each draw of noise: the text and the mean loss."""
    allowed = [token for token in range(len(model.vocabulary)) if token not in model.tokenizer.all_special_ids]
    own = prompt_tokens(model, prompt, count)
    tokens = [allowed[index] for index in torch.randint(len(allowed), (count,), generator=generator).tolist()]
    for timestep in timesteps:
        losses = []
        for _ in range(steps):
            seen = [timestep] * draws
            if timestep is None:
                seen = torch.randint(1000, (draws,), generator=generator).tolist()
            noises = torch.randn((draws, *model.latent_shape), generator=generator).double()
            positions = torch.randint(count, (substitutions,), generator=generator).tolist()
            ranks = torch.randint(top_k, (substitutions,), generator=generator).tolist()

            def loss_of(one_hot: torch.Tensor, pairs: tuple = tuple(zip(seen, noises, strict=True))) -> torch.Tensor:
                return sum(loss_of_one_hot(model, prompt, one_hot, where, x0, noise, t) for t, noise in pairs) / draws

            one_hot = rows_of(model, tokens).requires_grad_()
            current = loss_of(one_hot)
            current.backward()
            losses.append(current.item())
            tried = []
            for position, rank in zip(positions, ranks, strict=True):
                slopes = one_hot.grad[position].tolist()
                best_first = sorted(allowed, key=slopes.__getitem__)
                changed = [*tokens[:position], best_first[:top_k][rank], *tokens[position + 1 :]]
                with torch.no_grad():
                    tried.append((loss_of(rows_of(model, changed)).item(), changed))
            least, best = min(tried)
            if least < losses[-1] or not keep_best:
                tokens = best
        yield model.tokenizer.decode(insert(own, tokens, where)).strip(), sum(losses) / len(losses)


def rows_of(model: TextToImage, tokens: list[int]) -> torch.Tensor:
    """One-hot rows, float64 [k, vocabulary]."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), len(model.vocabulary)).double()
