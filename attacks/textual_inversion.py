"""Concept inversion: one embedding, learned through the erased model, that brings the concept back in every prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_pairs import Pairs, draw_in_turn, resolve_pairs
from attacks.prompt_search import (
    EmbeddingStart,
    adam_step,
    candidate_tokens,
    embedding_gradient,
    first_embeddings,
)
from attacks.tables import Template, space_of
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.progress import look_inside
from diffusion.prompt_template import Insertion
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge


def _prompts_or_templates(value: Any) -> Literal["prompts"] | tuple[str, ...]:
    match value:
        case "prompts":
            return "prompts"
        case [_, *_] if all(isinstance(template, str) and "{}" in template for template in value):
            return tuple(value)
    raise ValueError(f"captions is {value!r}; it must be prompts, or a list of texts with {{}}, the embedding's place.")


@plain_dataclass
class Snapshot:
    """The training at one of its checks.

    Attributes:
        embeddings: float64 [k, width], what was learned so far.
        loss: Mean over the steps since the check before.
        unet_evaluations: Spent since the check before.
    """

    embeddings: Tensor
    loss: float
    unet_evaluations: int


@checked
class TextualInversion:
    """Concept inversion (CCE: Pham et al., "Circumventing Concept Erasure Methods", ICLR 2024, arXiv 2308.01508).

    Textual inversion (Gal et al., ICLR 2023) through the erased model, on pictures x0 of the concept:
        minimise over e   E_{x0, t, eps} || eps - eps_erased(x_t, t, text(caption with e)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   t uniform,   e: k embeddings, the same for all prompts
    The pictures are the unedited model's, of prompts that ask for the concept. e is learned once, by AdamW, and then
    inserted into every prompt that does not succeed as it stands. It is checked ``checks`` times on the way, with what
    is learned by then; a prompt's first success ends its attack. No text stands for e. The training is paid once,
    however many prompts it serves, and only if there is one that needs it.

    Deviations from the published code: it takes a sample of the VAE's posterior instead of the mean, and judges
    pictures of the last embedding alone.

    Attributes:
        pairs: Prompt pairs, or a CSV file of them with the columns ``with`` and ``without``; those with the concept
            are drawn, in turn.
        pictures: How many, each with a seed of its own.
        picture_guidance: Their guidance scale.
        flip: Learn from the mirrored pictures too.
        captions: Where e stands in the training: in a picture's own ``prompts``, inserted as in the attacked ones; or
            in the place of ``{}`` in a list of texts, drawn uniformly, that say nothing else of the picture.
        tokens: k.
        insertion: Where e goes in a prompt.
        initialization: e at the start: the ``mean`` of the vocabulary, or the rows of ``random`` tokens.
        initial_word: If given, e starts as this word's embedding instead, the mean one if it has several tokens.
        checks: Pictures per prompt.
        steps_per_check: Optimiser steps before each.
        pictures_per_step: Pictures, with a timestep and noise each, that the gradient of a step is the mean over.
        learning_rate: AdamW's step size.
        weight_decay: Its decay.
        batch_size: Prompts, and pictures of a step, at a time; it changes speed and memory only.
        seed: Seed of the pictures' seeds and of the training's draws.
    """

    pairs: Pairs
    pictures: Annotated[int, Field(ge=1)] = 25
    picture_guidance: Annotated[float, Field(ge=0)] = 7.5
    flip: bool = True
    captions: Annotated[Literal["prompts"] | tuple[str, ...], PlainValidator(_prompts_or_templates)] = "prompts"
    tokens: Annotated[int, Field(ge=1)] = 1
    insertion: Insertion = "prefix_k"
    initialization: EmbeddingStart = "mean"
    initial_word: Annotated[str, Field(min_length=1)] | None = None
    checks: Annotated[int, Field(ge=1)] = 1
    steps_per_check: Annotated[int, Field(ge=1)] = 5000
    pictures_per_step: Annotated[int, Field(ge=1)] = 16
    learning_rate: Annotated[float, Field(gt=0)] = 0.08
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"
    needs_original: ClassVar[Literal[True]] = True

    def run(
        self,
        model: TextToImage,
        cases: Sequence[PromptCase],
        judge: Judge,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        original: TextToImage | None = None,
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its checks end.

        Args:
            model: The edited model.
            cases: The prompts.
            judge: Says whether a picture shows the concept.
            sampling: How pictures are sampled, those of the training too.
            original: The unedited model. Its evaluations are shared by all cases, like the training's.

        Raises:
            ValueError: ``original`` is missing, the model has no room for ``tokens``, or ``initial_word`` is no word.
        """
        if original is None:
            raise ValueError("original is None; TextualInversion learns from the unedited model's pictures: give it.")
        self._insert(model, [""])  # refuses a k that does not fit
        training = self._train(model, original, self._start(model), sampling)
        # The cases in hand may be at different checks, all behind the training if they came late.
        known: list[Snapshot] = []

        def propose(traces: list[Trace]) -> list[Proposal]:
            ahead = max(trace.attempts for trace in traces) + 1 - len(known)
            known.extend(islice(training, max(0, ahead)))
            snapshots = [known[trace.attempts] for trace in traces]
            template = self._insert(model, [trace.case.prompt for trace in traces])
            texts = template.encode_detached(model, torch.stack([snapshot.embeddings for snapshot in snapshots]))
            return [
                Proposal(
                    trace.case.prompt,
                    loss=snapshot.loss,
                    shared_evaluations=snapshot.unet_evaluations,
                    text=text,
                    variant=f"embedding after {(trace.attempts + 1) * self.steps_per_check} steps",
                )
                for trace, snapshot, text in zip(traces, snapshots, texts, strict=True)
            ]

        return search(model, cases, judge, propose, sampling=sampling, rounds=self.checks, batch_size=self.batch_size)

    def _insert(self, model: TextToImage, prompts: Sequence[str]) -> Template:
        return space_of(model, "clip").insert(prompts, self.tokens, self.insertion)

    def _start(self, model: TextToImage) -> Tensor:
        """Return the first e, float64 [k, width]."""
        tokens = candidate_tokens(model)
        if self.initial_word is not None:
            ids = model.tokenizer(self.initial_word, add_special_tokens=False).input_ids
            if not ids:
                raise ValueError(f"initial_word is {self.initial_word!r}, in which the tokenizer finds no token.")
            tokens = torch.tensor(ids, device=model.vocabulary.device)
        start = "mean" if self.initial_word is not None else self.initialization
        generator = stream(self.seed, "textual_inversion/start")
        return first_embeddings(model.vocabulary[tokens], self.tokens, start, generator)

    def _train(
        self, model: TextToImage, original: TextToImage, start: Tensor, sampling: Sampling
    ) -> Iterator[Snapshot]:
        """Learn e, and give it out at every check; nothing is done before it is asked for."""
        spent = -original.unet_evaluations
        prompts, images = self._draw(original, sampling)
        spent += original.unet_evaluations
        targets = model.encode_images(torch.cat([images, images.flip(-1)]) if self.flip else images)
        if self.captions == "prompts":
            template = self._insert(model, prompts)
        else:
            template = space_of(model, "clip").at_placeholder(self.captions, self.tokens)

        embeddings = start[None].to(model.device)
        mean, variance = torch.zeros_like(embeddings), torch.zeros_like(embeddings)
        loss = 0.0
        for step in range(self.checks * self.steps_per_check):
            look_inside(f"training step {step} of {self.checks * self.steps_per_check}", 0.0)
            generator = stream(self.seed, "textual_inversion/training", step)
            count = self.pictures_per_step
            pictures = torch.randint(len(targets), (count,), generator=generator)
            timesteps = model.process.draw(count, generator).to(model.device)
            noise = torch.randn((count, *model.latent_shape), generator=generator).to(model.device, model.dtype)
            captions = pictures % len(images)
            if self.captions != "prompts":
                captions = torch.randint(len(self.captions), (count,), generator=generator)
            pictures, captions = pictures.to(model.device), captions.to(model.device)
            gradients, losses = [], []
            for batch in torch.arange(count, device=model.device).split(self.batch_size):
                shown = targets[pictures[batch]]
                gradient, error = embedding_gradient(
                    model,
                    template[captions[batch]],
                    embeddings.to(model.vocabulary.dtype).expand(len(batch), -1, -1),
                    model.add_noise(shown, noise[batch], timesteps[batch]),
                    timesteps[batch],
                    model.process.target(shown, noise[batch]),
                )
                gradients.append(gradient.double())
                losses.append(error.double())
            adam_step(
                embeddings,
                torch.cat(gradients).mean(dim=0, keepdim=True),
                mean,
                variance,
                steps=torch.tensor([step + 1], device=model.device),
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                decoupled=True,
            )
            loss += float(torch.cat(losses).mean())
            spent += count
            if (step + 1) % self.steps_per_check == 0:
                yield Snapshot(embeddings[0].clone(), loss / self.steps_per_check, spent)
                loss, spent = 0.0, 0

    def _draw(self, original: TextToImage, sampling: Sampling) -> tuple[list[str], Tensor]:
        """Make the training pictures; their prompts, and uint8 [pictures, 3, H, W]."""
        present = [prompt for prompt, _ in resolve_pairs(self.pairs)]
        seeds = [
            int(torch.randint(2**31, (), generator=stream(self.seed, "textual_inversion/pictures", number)))
            for number in range(self.pictures)
        ]
        return draw_in_turn(original, present, seeds, self.picture_guidance, sampling)
