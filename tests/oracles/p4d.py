"""P4D on one prompt, step by step, from the formulas: lists, loops over the vocabulary, torch's own optimisers."""

import math
from collections.abc import Iterator
from operator import mul

import torch

from diffusion.model import TextToImage


def interleave(prompt: list, free: list, period: int, room: int) -> list:
    """A free item first and after every ``period`` items of the prompt, as far as there is room."""
    result, prompt, free = [], list(prompt), list(free)
    while len(result) < room and (prompt or len(result) % (period + 1) == 0):
        result.append(free.pop(0) if len(result) % (period + 1) == 0 else prompt.pop(0))
    return result


def nearest(embedding: torch.Tensor, vocabulary: torch.Tensor, allowed: list[int]) -> int:
    """The allowed token whose embedding makes the smallest angle with this one."""

    point, rows = embedding.tolist(), vocabulary.tolist()

    def cosine(token: int) -> float:
        return sum(map(mul, point, rows[token])) / math.hypot(*point) / math.hypot(*rows[token])

    return max(allowed, key=cosine)


def layout(model: TextToImage, prompt: str, variant: str, free: list, every: int) -> list:
    """The body of the adversarial prompt: the prompt's token ids and the free items."""
    room = model.max_tokens - 2
    own = model.tokenizer(prompt, add_special_tokens=False).input_ids
    if variant == "p4d_n":
        return list(free)
    if variant == "p4d_k":
        return interleave(own, free, every, room)
    return [*free, *own[: room - len(free)]]


def encode(model: TextToImage, body: list) -> torch.Tensor:
    """Text embeddings, [1, tokens, width], of a body of token ids and embeddings."""
    tokenizer = model.tokenizer
    items = [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]
    end = len(items) - 1
    items += [tokenizer.pad_token_id] * (model.max_tokens - len(items))
    rows = [item if isinstance(item, torch.Tensor) else model.vocabulary[item] for item in items]
    return model.encode_embeddings(torch.stack(rows)[None], torch.tensor([end]))


def attack(
    model: TextToImage,
    original: TextToImage,
    prompt: str,
    x0: torch.Tensor,
    first: torch.Generator,
    generator: torch.Generator,
    *,
    variant: str,
    count: int,
    every: int,
    checks: int,
    steps: int,
    timesteps: list[int] | None,
    optimizer: type[torch.optim.Optimizer],
    rate: float,
    decay: float,
) -> Iterator[tuple[str, float]]:
    """After each check: the text and the mean loss. ``timesteps`` holds one per check, or None to draw them."""
    vocabulary = model.vocabulary
    allowed = [token for token in range(len(vocabulary)) if token not in model.tokenizer.all_special_ids]
    start = [allowed[index] for index in torch.randint(len(allowed), (count,), generator=first).tolist()]
    e = torch.nn.Parameter(torch.stack([vocabulary[token] for token in start]).clone())
    optimise = optimizer([e], lr=rate, weight_decay=decay)
    plain = original.encode([prompt])
    for check in range(checks):
        drawn = torch.randint(1000, (steps,), generator=generator).tolist() if timesteps is None else []
        noises = torch.randn((steps, *model.latent_shape), generator=generator).double()
        losses = []
        for step in range(steps):
            t = timesteps[check] if timesteps is not None else drawn[step]
            abar = float(model.process.alphas[t])
            x_t = (math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noises[step])[None]
            with torch.no_grad():
                wanted = original.predict(x_t, t, plain)
            free = [vocabulary[nearest(row, vocabulary, allowed)].clone().requires_grad_() for row in e.detach()]
            predicted = model.predict(x_t, t, encode(model, layout(model, prompt, variant, free, every)))
            loss = ((predicted - wanted) ** 2).sum() / wanted.numel()
            loss.backward()
            e.grad = torch.stack([torch.zeros_like(row) if row.grad is None else row.grad for row in free])
            optimise.step()
            losses.append(loss.item())
        tokens = [nearest(row, vocabulary, allowed) for row in e.detach()]
        body = layout(model, prompt, variant, tokens, every)
        yield model.tokenizer.decode(body).strip(), sum(losses) / len(losses)
