"""Textual inversion from its formula: captions as lists of rows, a loss picture by picture, torch's own AdamW."""

from collections.abc import Iterator

import torch

from diffusion.model import TextToImage
from diffusion.streams import stream
from tests.oracles.embedding import denoising_loss
from tests.oracles.p4d import encode
from tests.oracles.unlearndiff import insert, prompt_tokens


def first_embeddings(model: TextToImage, count: int, *, word: str | None, random: bool, seed: int) -> torch.Tensor:
    """Embeddings [k, width] at the start: rows of random tokens, or the mean of the word's or of all ordinary ones."""
    special = model.tokenizer.all_special_ids
    ids = [token for token in range(len(model.vocabulary)) if token not in special]
    if word is not None:
        ids = model.tokenizer(word, add_special_tokens=False).input_ids
    elif random:
        draws = torch.randint(len(ids), (count,), generator=stream(seed, "textual_inversion/start")).tolist()
        return torch.stack([model.vocabulary[ids[draw]] for draw in draws])
    return torch.stack([sum(model.vocabulary[token] for token in ids) / len(ids)] * count)


def pictures(
    original: TextToImage, prompts: list[str], count: int, *, seed: int, guidance: float, steps: int
) -> tuple[list[str], list[torch.Tensor]]:
    """The prompts, in turn, and a picture [3, H, W] of each, with a seed of its own."""
    drawn, images = [], []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        picture_seed = torch.randint(2**31, (), generator=stream(seed, "textual_inversion/pictures", number)).item()
        drawn.append(prompt)
        images.append(original.generate([prompt], seeds=[picture_seed], steps=steps, guidance=guidance)[0])
    return drawn, images


def prompt_with(model: TextToImage, prompt: str, e: torch.Tensor, where: str) -> list:
    """Token ids of a prompt with the embeddings among them."""
    return insert(prompt_tokens(model, prompt, len(e)), list(e), where)


def template_with(model: TextToImage, template: str, e: torch.Tensor) -> list:
    """Token ids of a template with the embeddings in the place of ``{}``; its tail is lost if there is no room."""
    before, after = (model.tokenizer(part, add_special_tokens=False).input_ids for part in template.split("{}"))
    room = model.max_tokens - 2 - len(e)
    return [*before[:room], *e, *after[: max(0, room - len(before))]]


def train(
    model: TextToImage,
    prompts: list[str],
    images: list[torch.Tensor],
    start: torch.Tensor,
    *,
    flip: bool,
    templates: list[str] | None,
    where: str,
    steps: int,
    size: int,
    rate: float,
    decay: float,
    seed: int,
) -> Iterator[tuple[torch.Tensor, float]]:
    """After each step: the embeddings and the loss. Prompts and images are those of the training."""
    shown = [(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    if flip:
        shown += [(image[:, :, list(range(image.shape[2]))[::-1]], prompt) for image, prompt in shown]
    x0s = [model.encode_images(image[None])[0] for image, _ in shown]
    e = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([e], lr=rate, weight_decay=decay)
    for step in range(steps):
        generator = stream(seed, "textual_inversion/training", step)
        picks = torch.randint(len(shown), (size,), generator=generator).tolist()
        times = torch.randint(1000, (size,), generator=generator).tolist()
        noises = torch.randn((size, *model.latent_shape), generator=generator).double()
        if templates is not None:
            chosen = torch.randint(len(templates), (size,), generator=generator).tolist()
            captions = [template_with(model, templates[index], e) for index in chosen]
        else:
            captions = [prompt_with(model, shown[pick][1], e, where) for pick in picks]
        loss = 0
        for pick, t, noise, caption in zip(picks, times, noises, captions, strict=True):
            loss = loss + denoising_loss(model, encode(model, caption), x0s[pick], noise, t) / size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield e.detach().clone(), loss.item()
