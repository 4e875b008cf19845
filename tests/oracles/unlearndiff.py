"""UnlearnDiffAtk on one prompt, step by step, from the formulas: lists, explicit one-hot rows, loops."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffusion.model import TextToImage
from tests.oracles.simplex import project_row


def insert(prompt: list, inserted: list, where: str) -> list:
    """The prompt's items with the inserted ones among them."""
    length, count = len(prompt), len(inserted)
    if where == "prefix_k":
        return inserted + prompt
    if where == "suffix_k":
        return prompt + inserted
    if where == "mid_k":
        return prompt[: length // 2] + inserted + prompt[length // 2 :]
    result = []
    if where == "insert_k":
        gap = length // (count + 1)
        for item in inserted:
            result += [*prompt[:gap], item]
            prompt = prompt[gap:]
    elif where == "per_k_words":
        for position, item in enumerate(inserted):
            result.append(item)
            if position < count - 1:
                result += prompt[:3]
                prompt = prompt[3:]
    return result + prompt


def prompt_tokens(model: TextToImage, prompt: str, count: int) -> list[int]:
    """The prompt's own tokens, as many as fit beside ``count`` inserted ones, start and end."""
    ids = model.tokenizer(prompt, add_special_tokens=False).input_ids
    return ids[: model.max_tokens - 2 - count]


def encode_one_hot(model: TextToImage, prompt: str, one_hot: torch.Tensor, where: str) -> torch.Tensor:
    """Text embeddings, [1, tokens, width], of a prompt with the rows of ``one_hot``, [k, vocabulary], inserted."""
    vocabulary = model.vocabulary
    identity = torch.eye(len(vocabulary), dtype=vocabulary.dtype)
    own = [identity[token] for token in prompt_tokens(model, prompt, len(one_hot))]
    rows = [identity[model.tokenizer.bos_token_id], *insert(own, list(one_hot), where)]
    end = len(rows)
    rows.append(identity[model.tokenizer.eos_token_id])
    while len(rows) < model.max_tokens:
        rows.append(identity[model.tokenizer.pad_token_id])
    return model.encode_embeddings((torch.stack(rows) @ vocabulary)[None], torch.tensor([end]))


def loss_of_one_hot(
    model: TextToImage, prompt: str, one_hot: torch.Tensor, where: str, x0: torch.Tensor, noise: torch.Tensor, t: int
) -> torch.Tensor:
    """Mean squared error of the predicted noise at x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
    abar = float(model.process.alphas[t])
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
    predicted = model.predict(x_t[None], t, encode_one_hot(model, prompt, one_hot, where))[0]
    return ((predicted - noise) ** 2).sum() / noise.numel()


@dataclass
class Adam:
    """Adam on one number; the weight decay is part of the gradient."""

    rate: float
    decay: float
    first: float = 0.0
    second: float = 0.0
    count: int = 0

    def step(self, value: float, gradient: float) -> float:
        """The number after one step."""
        gradient += self.decay * value
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        return value - self.rate * first / (math.sqrt(second) + 1e-8)


def attack(
    model: TextToImage,
    prompt: str,
    x0: torch.Tensor,
    generator: torch.Generator,
    *,
    tokens: int,
    where: str,
    timesteps: list[int],
    steps: int,
    rate: float,
    decay: float,
) -> Iterator[tuple[str, float, list[list[float]]]]:
    """After each timestep: the text of the most probable tokens, the mean loss and the simplex rows."""
    vocabulary = len(model.vocabulary)
    allowed = [token for token in range(vocabulary) if token not in model.tokenizer.all_special_ids]
    rows = [[1 / len(allowed)] * len(allowed) for _ in range(tokens)]
    adams = [[Adam(rate, decay) for _ in allowed] for _ in range(tokens)]
    for t in timesteps:
        losses = []
        for _ in range(steps):
            arrivals = torch.empty(tokens, len(allowed), dtype=torch.float64).exponential_(generator=generator)
            noise = torch.randn(model.latent_shape, generator=generator).double()
            one_hot = torch.zeros(tokens, vocabulary, dtype=torch.float64)
            for row, times, hot in zip(rows, arrivals.tolist(), one_hot, strict=True):
                first = min(
                    (time / rate_of_arrival if rate_of_arrival > 0 else math.inf, position)
                    for position, (time, rate_of_arrival) in enumerate(zip(times, row, strict=True))
                )
                hot[allowed[first[1]]] = 1
            one_hot.requires_grad_()
            loss = loss_of_one_hot(model, prompt, one_hot, where, x0, noise, t)
            loss.backward()
            losses.append(loss.item())
            for k in range(tokens):
                moved = [
                    adams[k][j].step(rows[k][j], min(1.0, max(-1.0, one_hot.grad[k, token].item())))
                    for j, token in enumerate(allowed)
                ]
                rows[k] = project_row(moved)
        best = [allowed[max(range(len(allowed)), key=row.__getitem__)] for row in rows]
        ids = insert(prompt_tokens(model, prompt, tokens), best, where)
        yield model.tokenizer.decode(ids).strip(), sum(losses) / len(losses), rows
