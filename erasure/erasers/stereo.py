"""STEREO: search for embeddings that bring the concept back, then erase it and all of them at once."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PlainValidator, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.needs import NO_T5, Need
from diffusion.parameters import substituted
from diffusion.prompt_template import PromptTemplate
from diffusion.streams import derived_seed, stream
from erasure.concept import Concept
from erasure.finetuning import FineTuning, Trained, fine_tune, minimise, prediction_error, retaining
from erasure.parameters import UNetScope, scope_parameters
from erasure.pictures import Painting, Pictures, paint
from erasure.protocols import Objective
from erasure.trajectories import FrozenSamples, Trajectories, check_pool, current_points, stage


def _choice_or_prompts(value: Any) -> Literal["contexts", "anchor"] | tuple[str, ...]:
    match value:
        case "contexts":
            return "contexts"
        case "anchor":
            return "anchor"
        case [_, *_] if all(isinstance(prompt, str) for prompt in value):
            return tuple(value)
    raise ValueError(f"anchors is {value!r}; it must be contexts, anchor, or a list of prompts.")


@checked
class STEREO(Trained):
    """STEREO (Srivatsan et al., "A Two-Stage Framework for Adversarially Robust Concept Erasing", CVPR 2025).

    Search thoroughly enough: every round erases what the one before has found, the first the concept's text c,
        || eps_theta(x_t, v) - [e(x_t, 0) - eta u(v)] ||^2,  e the model that the round starts with,
    and then learns an embedding v* that brings the concept back (textual inversion),
        v* = argmin || eps - eps_theta(y_t, v*) ||^2,  y_t noised pictures that the unedited model made of c.
    Robustly erase once: from the unedited model, which is e now,
        L = || eps_theta(x_t, v) - [e(x_t, 0) - s_n sum over c and all v* of u(.) + s_a u(a)] ||^2 (means).
    v is c, or c with a v* in the phrase's place, in turn; x_t lies on a guided sampling trajectory of v; 0 is the empty
    prompt, a an anchor prompt. u(p) = e(x_t, p) - e(x_t, 0), which adaptive projected guidance (Sadat et al., 2025) can
    shorten to a largest norm, and weaken in its part parallel to e(x_t, p). Several concepts take turns, and each has
    v* of its own. The defaults are the authors'.

    The authors' code, whose scales count from 1 and whose projection changes nothing, comes to eta = 0 in the search,
    and to the means over all negatives with s_n = 3 and s_a = 1 afterwards. It also takes k of 50 sampler steps, k from
    1 to 49, and scores x_t at the timestep k of 50 on the scale of 1000: with ``published_offset``, x_t is less noisy
    than its t says, by 19 timesteps.

    Attributes:
        scope: What is trained, in the search too.
        rounds: Of the search.
        search_steps: Optimiser steps (AdamW) of a round's erasing.
        search_learning_rate: AdamW's in that.
        search_eta: eta.
        inversion_steps: Optimiser steps (AdamW) of a textual inversion.
        inversion_learning_rate: AdamW's in that.
        inversion_batch_size: Noised pictures per step.
        initial_word: What v* starts as, the mean embedding if it has several tokens; None for the concept's anchor.
        images: Pictures of each concept, made once; targets and templates take turns, and every round learns from a
            share of its own.
        image_guidance: Guidance scale of a picture.
        steps: Optimiser steps (AdamW) of the final erasing.
        learning_rate: AdamW's in that.
        weight_decay: AdamW's in all of them.
        negative_scale: s_n.
        negatives: Whether what is taken away is their ``sum``, or their ``mean``.
        anchor_scale: s_a; 0 for no anchor.
        anchors: What a is, drawn anew for every sample: the concept's targets in the ``contexts`` of what is preserved,
            as the authors' prompts have it; the concept's ``anchor`` in v's template; or one of a list of prompts.
        largest_norm: Of u; None for any.
        parallel: Weight of u's parallel part; 1 leaves u as it is.
        batch_size: Trajectory points per step.
        sampling_steps: Sampler steps of a trajectory, and of a picture.
        trajectory_guidance: Guidance scale of a trajectory.
        trajectory: Whose trajectories: the ``current`` model's, the one being edited; or the ``frozen`` one's, computed
            beforehand in batches.
        trajectories: None gives every training sample a trajectory of its own, as published. A number is an
            approximation: so many frozen trajectories, every step of which becomes a training sample.
        published_offset: x_t is less noisy than t says, as in the authors' code; see ``rescaled`` in
            :class:`erasure.trajectories.Trajectories`.
        retain_weight: Weight of the retain term on the concept's preserved phrases; 0, as in the paper, for none.
        sampling_batch_size: Trajectories and pictures sampled at a time; it changes speed and memory only.
    """

    scope: UNetScope = "esd_u"
    rounds: Annotated[int, Field(ge=1)] = 4
    search_steps: Annotated[int, Field(ge=1)] = 200
    search_learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    search_eta: Annotated[float, Field(ge=0)] = 2.0
    inversion_steps: Annotated[int, Field(ge=1)] = 3000
    inversion_learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    inversion_batch_size: Annotated[int, Field(ge=1)] = 1
    initial_word: Annotated[str, Field(min_length=1)] | None = None
    images: Annotated[int, Field(ge=1)] = 500
    image_guidance: Annotated[float, Field(ge=0)] = 7.5
    steps: Annotated[int, Field(ge=1)] = 200
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    negative_scale: Annotated[float, Field(gt=0)] = 2.0
    negatives: Literal["sum", "mean"] = "sum"
    anchor_scale: Annotated[float, Field(ge=0)] = 2.0
    anchors: Annotated[Literal["contexts", "anchor"] | tuple[str, ...], PlainValidator(_choice_or_prompts)] = "contexts"
    largest_norm: Annotated[float, Field(gt=0)] | None = None
    parallel: Annotated[float, Field(ge=0)] = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 1
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    trajectory_guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectory: Literal["frozen", "current"] = "current"
    trajectories: Annotated[int, Field(ge=1)] | None = None
    published_offset: bool = False
    retain_weight: Annotated[float, Field(ge=0)] = 0.0
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    needs: ClassVar[frozenset[Need]] = NO_T5

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_pool(self.trajectories, trajectory=self.trajectory, published_offset=self.published_offset)
        if self.images < self.rounds:
            raise ValueError(
                f"images is {self.images} and rounds {self.rounds}; every round learns from pictures of its own, so "
                f"images must be {self.rounds} or more."
            )
        return self

    @property
    def settings(self) -> Trajectories:
        """How trajectories are sampled."""
        return Trajectories(
            self.sampling_steps,
            self.trajectory_guidance,
            self.trajectories,
            self.sampling_batch_size,
            rescaled=self.published_offset,
        )

    def objective(self) -> Objective:
        """The loss of the final erasing, with the retain term if it has weight; preparing it is the search."""
        trajectories = replace(self.settings, rescaled=False)
        return retaining(STEREOObjective(self), self.retain_weight, trajectories, self.batch_size)

    def training(self, model: TextToImage, concept: Concept) -> FineTuning:
        """See :class:`erasure.finetuning.Trained`."""
        return FineTuning(self.scope, self.steps, self.learning_rate, self.weight_decay)

    def pull(self, prediction: Tensor, empty: Tensor) -> Tensor:
        """Return u of a noise prediction and of that for the empty prompt; all float [n, c, h, w]."""
        difference = prediction - empty
        if self.largest_norm is not None:
            norms = difference.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            difference = difference * (self.largest_norm / norms).clamp(max=1)
        if self.parallel == 1:
            return difference
        direction = prediction / prediction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        along: Tensor = (difference * direction).sum((1, 2, 3), keepdim=True) * direction
        return difference + (self.parallel - 1) * along


class ComposedGuidance:
    """An erasing loss whose teacher steps away from several prompts, and towards an anchor.

    Args:
        config: How points are sampled and u is formed.
        names: float [turns, names, tokens, width], prompts that differ in what they call the concept. Every one is
            trained on, and all of its turn are stepped away from.
        scale: Weight of every one of these steps.
        anchors: float [anchors, tokens, width], and for every turn which of them it may draw, int64 [any]; None for
            no step towards an anchor.
    """

    def __init__(
        self, config: STEREO, names: Tensor, scale: float, anchors: tuple[Tensor, Sequence[Tensor]] | None = None
    ) -> None:
        self._config = config
        self._names = names
        self._scale = scale
        self._anchors = anchors
        self._samples: FrozenSamples | None = None

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """Take ``model`` for the teacher; see :class:`erasure.protocols.Objective`."""
        config = self._config
        self._seed = seed
        self._text = self._names.flatten(0, 1)
        self._empty = model.encode_prompts([""])
        self._base = {name: value.detach().clone() for name, value in scope_parameters(model, scope).items()}
        if config.trajectory == "current":
            return 0
        self._samples = FrozenSamples(
            model,
            self._text,
            config.settings,
            target_guidance=1.0,
            steps=steps,
            batch_size=config.batch_size,
            seed=seed,
            checkpoint=checkpoint,
        )
        return self._samples.unet_evaluations

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        known: list[Tensor] = []
        if self._samples is None:
            latents, timesteps, rows = current_points(
                model, self._text, config.settings, batch_size=config.batch_size, seed=self._seed, step=step
            )
        else:
            samples, _ = self._samples.batch(step)
            latents, timesteps, rows = samples.latents, samples.timesteps, samples.prompts
            known = [samples.targets]
        with substituted(model, self._base):
            targets = self._teach(model, latents, timesteps, rows.cpu(), known, step)
        return prediction_error(model, latents, timesteps, self._text[rows], targets)

    @torch.no_grad()
    def _teach(
        self, model: TextToImage, latents: Tensor, timesteps: Tensor, rows: Tensor, known: list[Tensor], step: int
    ) -> Tensor:
        """What to predict at x_t, float [n, c, h, w]; ``known`` may hold the teacher's predictions for ``rows``."""
        count = self._names.shape[1]
        turns, own = rows // count, rows % count
        texts = [self._empty.expand(len(rows), -1, -1)]
        texts += [self._names[turns, (own + other) % count] for other in range(len(known), count)]
        if self._anchors is not None:
            texts.append(self._anchor_texts(turns, step))
        noise = model.predict(latents.repeat(len(texts), 1, 1, 1), timesteps.repeat(len(texts)), torch.cat(texts)).to(
            latents.dtype
        )
        empty, *predictions = noise.chunk(len(texts))
        target = empty
        if self._anchors is not None:
            target = target + self._config.anchor_scale * self._config.pull(predictions.pop(), empty)
        for prediction in [*known, *predictions]:
            target = target - self._scale * self._config.pull(prediction, empty)
        return target

    def _anchor_texts(self, turns: Tensor, step: int) -> Tensor:
        texts, allowed = self._anchors or (self._empty, [])
        generator = stream(self._seed, "stereo/anchors", step)
        drawn = [
            int(choices[torch.randint(len(choices), (), generator=generator)])
            for choices in (allowed[turn] for turn in turns.tolist())
        ]
        return texts[drawn]


class STEREOObjective:
    """The final loss of :class:`STEREO`, and the search for what it is to withstand."""

    def __init__(self, config: STEREO) -> None:
        self._config = config

    def prepare(
        self, model: TextToImage, concept: Concept, *, scope: UNetScope, steps: int, seed: int, checkpoint: Path | None
    ) -> int:
        """See :class:`erasure.protocols.Objective`."""
        config = self._config
        turns = [concept.target_prompts.index(target) for target, _ in concept.turns]
        named = model.encode_prompts(concept.target_prompts)
        found, spent = self._search(model, concept, named, turns, scope, seed, checkpoint)
        names = torch.stack([named, *found], dim=1)[turns]
        scale = config.negative_scale / (names.shape[1] if config.negatives == "mean" else 1)
        self._guidance = ComposedGuidance(config, names, scale, self._anchors(model, concept, turns))
        return spent + self._guidance.prepare(
            model, concept, scope=scope, steps=steps, seed=seed, checkpoint=checkpoint
        )

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """See :class:`erasure.protocols.Objective`."""
        return self._guidance.loss(model, step)

    def _search(
        self,
        model: TextToImage,
        concept: Concept,
        named: Tensor,
        turns: list[int],
        scope: UNetScope,
        seed: int,
        checkpoint: Path | None,
    ) -> tuple[list[Tensor], int]:
        """For every round the target prompts with v* for the phrase, float [prompts, tokens, width]; and the cost."""
        config = self._config
        training = FineTuning(scope, config.search_steps, config.search_learning_rate, config.weight_decay)
        sizes = [len(part.target_prompts) for part in concept.parts]
        pictures, spent = self._paint(model, concept, named.split(sizes), seed, checkpoint)
        template = PromptTemplate.at_placeholder(model, placeholders(concept), 1)
        rows = torch.arange(len(named)).split(sizes)
        shares = torch.arange(config.images).tensor_split(config.rounds)
        found: list[Tensor] = []
        with ExitStack() as erased:
            for number, share in enumerate(shares):
                files = stage(checkpoint, f"search-{number}")
                guidance = ComposedGuidance(config, [named, *found][-1][turns][:, None], config.search_eta)
                spent += guidance.prepare(
                    model,
                    concept,
                    scope=scope,
                    steps=training.steps,
                    seed=derived_seed(seed, "stereo/search", number),
                    checkpoint=files,
                )
                erasure = fine_tune(model, guidance, training, checkpoint=stage(files, "weights"))
                spent += erasure.unet_evaluations
                erased.enter_context(erasure.edit.applied(model))
                texts = []
                for place, (part, painted) in enumerate(zip(concept.parts, pictures, strict=True)):
                    captions = template[rows[place]]
                    token, cost = self._invert(
                        model,
                        captions,
                        Pictures(painted.latents[share], painted.prompts[share]),
                        config.initial_word or part.anchor,
                        derived_seed(seed, "stereo/token", number, place),
                        stage(files, f"token-{place}"),
                    )
                    texts.append(captions.encode_detached(model, token.expand(len(rows[place]), 1, -1)))
                    spent += cost
                found.append(torch.cat(texts))
        return found, spent

    def _paint(
        self, model: TextToImage, concept: Concept, texts: Sequence[Tensor], seed: int, checkpoint: Path | None
    ) -> tuple[list[Pictures], int]:
        """Pictures of the concepts one by one, and their cost."""
        config = self._config
        painting = Painting(config.images, config.sampling_steps, config.image_guidance, config.sampling_batch_size)
        painted = [
            paint(
                model,
                part.target_prompts,
                text,
                painting,
                seed=derived_seed(seed, "stereo/pictures", number),
                part=f"concept-{number}",
                checkpoint=checkpoint,
            )
            for number, (part, text) in enumerate(zip(concept.parts, texts, strict=True))
        ]
        return [pictures for pictures, _ in painted], sum(cost for _, cost in painted)

    def _invert(
        self,
        model: TextToImage,
        template: PromptTemplate,
        pictures: Pictures,
        start: str,
        seed: int,
        checkpoint: Path | None,
    ) -> tuple[Tensor, int]:
        """Return v*, float [1, width], and the U-Net evaluations that it cost."""
        config = self._config
        ids = model.tokenizer(start, add_special_tokens=False).input_ids
        table = model.vocabulary.detach()
        embedding = (table[ids] if ids else table).mean(dim=0, keepdim=True).requires_grad_()

        def loss(step: int) -> Tensor:
            batch = pictures.draw(model, config.inversion_batch_size, stream(seed, "stereo/inversion", step))
            text = template[batch.prompts].encode(model, embedding.expand(len(batch.prompts), 1, -1))
            return prediction_error(model, batch.latents, batch.timesteps, text, batch.targets)

        _, spent = minimise(
            model,
            loss,
            [embedding],
            torch.optim.AdamW([embedding], lr=config.inversion_learning_rate, weight_decay=config.weight_decay),
            steps=config.inversion_steps,
            label="textual inversion",
            checkpoint=checkpoint,
        )
        return embedding.detach(), spent

    def _anchors(
        self, model: TextToImage, concept: Concept, turns: list[int]
    ) -> tuple[Tensor, Sequence[Tensor]] | None:
        """Anchor texts and which of them each turn may draw; see :class:`ComposedGuidance`."""
        config = self._config
        if not config.anchor_scale:
            return None
        if isinstance(config.anchors, tuple):
            return model.encode_prompts(config.anchors), [torch.arange(len(config.anchors))] * len(turns)
        if config.anchors == "anchor":
            return model.encode_prompts(concept.target_anchors)[turns], list(torch.arange(len(turns))[:, None])
        contexts = [part.in_preserved_contexts.target_prompts for part in concept.parts]
        numbers = torch.arange(sum(map(len, contexts))).split([len(prompts) for prompts in contexts])
        owners = [place for place, part in enumerate(concept.parts) for _ in part.target_prompts]
        texts = model.encode_prompts([prompt for prompts in contexts for prompt in prompts])
        return texts, [numbers[owners[turn]] for turn in turns]


def placeholders(concept: Concept) -> list[str]:
    """For every target prompt its template, with ``{}`` in the phrase's first place and the anchor in any other."""
    captions = []
    for part in concept.parts:
        for template in part.templates:
            before, _, after = template.partition("{}")
            captions.append(before + "{}" + after.replace("{}", part.anchor))
        captions += captions[-len(part.templates) :] * (len(part.targets) - 1)
    return captions
