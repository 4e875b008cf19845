"""MACE: refine what surrounds the concept, blind a low-rank copy of the model to it, and fuse both in closed form."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.parameters import substituted
from diffusion.streams import derived_seed, stream
from erasure.attention import concept_columns, concept_maps, concept_squares, nearest, recorded_attention, reduced_size
from erasure.closed_form import SCOPE, Term, key_value_weights, right_multiplication, solved, sum_of_squares
from erasure.concept import Concept, ConceptKind
from erasure.edit import Edit
from erasure.finetuning import prune_after, require_trainable_precision, train_beside
from erasure.pictures import Painting, paint
from erasure.protocols import Erasure, Pruning, check_pair
from erasure.trajectories import remembered

PROMPTS_AT_A_TIME = 256


def _existing(path: Path) -> Path:
    if not path.expanduser().is_file():
        raise ValueError(f"there is no file at {path}; give a text file with one caption a line, or null.")
    return path.expanduser()


@checked
class MACE:
    """Mass concept erasure (Lu et al., "MACE: Mass Concept Erasure in Diffusion Models", CVPR 2024), in three steps.

    1. Refinement, in closed form for every key and value matrix W of cross-attention (:mod:`erasure.closed_form`):
       min over W' of  sum_j || W' e_j - W g_j ||^2 + s_1 sum_p || W' p - W p ||^2 + lambda || W' - W ||^2
       with e_j the embeddings of all tokens of the target prompts but the targets' own, padding included; g_j those of
       the same tokens with the anchor in the target's place; p all tokens of what is preserved.
    2. Every concept i trains low-rank factors of its own (AdamW), W' + B_i A_i, on noised pictures x_t that the
       unedited model made of the concept: L = sum over layers l of || A_l[mask, concept tokens] ||_F, where A_l are the
       cross-attention probabilities of all heads and the mask is the concept's pixels. A batch takes the mean.
    3. Fusion, in closed form: every prompt of concept i is to get what W' + B_i A_i gives it, without the others'
       factors: W'' = W' + sum_i B_i A_i G_i M^-1,  G_i = sum of e e^T over all tokens e of the target prompts of i,
       M = lambda I + sum_i G_i + s_2 P,  P = sum of p p^T.

    Masks come from the unedited model's own attention where the authors ask a segmentation model. The defaults are the
    authors', for objects, but for ``end_tokens``, of which the paper does not speak.

    Attributes:
        ridge: lambda; 0 if the embeddings span all dimensions.
        refinement_preserve_scale: s_1.
        fusion_preserve_scale: s_2.
        preserve_weight: Weight of the concept's preserved prompts in P, beside the captions.
        captions: Text file of prompts, one a line, that are preserved as well (the authors take COCO's); None for none.
        published_prior: Take what is preserved as the authors' code does: with s_1^2 in place of s_1, and, in the
            fusion, sent where the unedited W sends it, which adds s_2 (W - W') P M^-1.
        rank: Of the factors.
        steps: Optimiser steps for each concept.
        learning_rate: AdamW's.
        batch_size: Noised pictures per step.
        weight_decay: AdamW's.
        clip_norm: Largest norm of the gradient.
        images: Pictures of each concept, made once; targets and templates take turns.
        sampling_steps: Sampler steps of a picture.
        image_guidance: Guidance scale of a picture.
        focus: t_1 and t_2, timesteps: t is drawn with probability proportional to
            sigmoid(k (t - t_1)) - sigmoid(k (t - t_2)); None for uniform.
        focus_sharpness: k.
        end_tokens: Whether the end token and the padding after it count as the concept's in L (the authors' code).
        masked_kinds: Kinds of concepts with a mask; L of others counts all pixels.
        mask_threshold: The mask is where the mean attention to the concept's own tokens, stretched to 0 .. 1 for each
            picture, is at least this.
        mask_timestep: How noisy the picture is that the unedited model looks at for it.
        mask_reduction: The layers whose attention counts for it are those that see latents so many times smaller.
        sampling_batch_size: Pictures at a time; it changes speed and memory only.
    """

    has_objective: ClassVar[bool] = False

    ridge: Annotated[float, Field(ge=0)] = 1e3
    refinement_preserve_scale: Annotated[float, Field(ge=0)] = 0.0
    fusion_preserve_scale: Annotated[float, Field(ge=0)] = 0.0
    preserve_weight: Annotated[float, Field(ge=0)] = 1.0
    captions: Annotated[Path, AfterValidator(_existing)] | None = None
    published_prior: bool = False
    rank: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] = 50
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    images: Annotated[int, Field(ge=1)] = 8
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    image_guidance: Annotated[float, Field(ge=0)] = 7.5
    focus: tuple[int, int] | None = (200, 400)
    focus_sharpness: Annotated[float, Field(gt=0)] = 0.05
    end_tokens: bool = False
    masked_kinds: tuple[ConceptKind, ...] = ("object", "unsafe")
    mask_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    mask_timestep: Annotated[int, Field(ge=0, le=999)] = 200
    mask_reduction: Annotated[int, Field(ge=1)] = 4
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.focus is not None and not self.focus[0] < self.focus[1]:
            raise ValueError(f"focus is {list(self.focus)}; its first timestep must be below the second.")
        return self

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        check_pair(self, pruning)
        require_trainable_precision(model)
        base = key_value_weights(model)
        preserved = self.preserved(model, concept)
        right = self.refinement(model, concept, preserved)
        refined = {name: weight.to("cpu", torch.float64) @ right for name, weight in base.items()}
        trained = [
            self.trained_factors(model, part, refined, seed=seed, number=number, checkpoint=checkpoint)
            for number, part in enumerate(concept.parts)
        ]
        fused = self._fused(model, concept, base, refined, preserved, [factors for factors, _, _ in trained])
        erasure = Erasure(
            Edit.from_weights(base, {name: fused[name].to(weight) for name, weight in base.items()}),
            [loss for _, losses, _ in trained for loss in losses],
            sum(spent for _, _, spent in trained),
        )
        return prune_after(erasure, self, pruning, model, concept, scope=SCOPE, seed=seed, checkpoint=checkpoint)

    def refinement(self, model: TextToImage, concept: Concept, preserved: Tensor) -> Tensor:
        """T of W' = W T, float64 [width, width].

        Args:
            model: The unedited model.
            concept: What to erase.
            preserved: P, float64 [width, width].

        Raises:
            ValueError: lambda is 0 and the embeddings do not span all dimensions.
        """
        sources, destinations = surroundings(model, concept)
        kept = self.refinement_preserve_scale ** (2 if self.published_prior else 1) * preserved
        if not self.ridge:
            rank = int(torch.linalg.matrix_rank(sum_of_squares([sources]) + kept, hermitian=True))
            if rank < len(kept):
                raise ValueError(
                    f"ridge is 0 and the embeddings of concept {concept.name!r} and of what is preserved span "
                    f"{rank} of {len(kept)} dimensions; give more captions or set ridge above 0."
                )
        return right_multiplication([Term(sources, destinations, 1.0)], self.ridge, kept)

    def preserved(self, model: TextToImage, concept: Concept) -> Tensor:
        """P, float64 [width, width]."""
        captions = [] if self.captions is None else self.captions.read_text(encoding="utf-8").splitlines()
        total = torch.zeros((model.encode_tokens([""]).shape[-1],) * 2, dtype=torch.float64)
        for weight, prompts in ((1.0, captions), (self.preserve_weight, concept.preserved_prompts)):
            for chunk in _chunks(prompts):
                total += weight * sum_of_squares([model.encode_tokens(chunk).flatten(0, 1)])
        return total

    def trained_factors(
        self,
        model: TextToImage,
        part: Concept,
        refined: Mapping[str, Tensor],
        *,
        seed: int,
        number: int,
        checkpoint: Path | None,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], list[float], int]:
        """B float [any, rank] and A float [rank, width] of one concept by parameter name, losses and evaluations."""
        attention = ConceptAttention(self, model, part, seed=seed, number=number, checkpoint=checkpoint)
        weights = {name: weight.to(model.device, model.dtype) for name, weight in refined.items()}
        generator = stream(seed, "mace/factors", number)
        factors = {
            name: (
                torch.zeros((len(weight), self.rank)).to(weight).requires_grad_(),
                (torch.randn((self.rank, weight.shape[1]), generator=generator) / self.rank)
                .to(weight)
                .requires_grad_(),
            )
            for name, weight in weights.items()
        }
        flat = {f"{name}:{side}": pair[side] for name, pair in factors.items() for side in (0, 1)}

        def loss(step: int) -> Tensor:
            with substituted(model, {name: weights[name] + B @ A for name, (B, A) in factors.items()}):
                return attention.loss(model, step)

        kept, losses, spent = train_beside(
            model,
            loss,
            flat,
            torch.optim.AdamW(flat.values(), lr=self.learning_rate, weight_decay=self.weight_decay),
            steps=self.steps,
            label=f"factors of {part.name}",
            part=f"factors-{number}",
            checkpoint=checkpoint,
            clip_norm=self.clip_norm,
        )
        pairs = {name: (kept[f"{name}:0"], kept[f"{name}:1"]) for name in factors}
        return pairs, losses, attention.unet_evaluations + spent

    def _fused(
        self,
        model: TextToImage,
        concept: Concept,
        base: Mapping[str, Tensor],
        refined: Mapping[str, Tensor],
        preserved: Tensor,
        trained: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    ) -> dict[str, Tensor]:
        """W'' by parameter name, float64 on the CPU."""
        M = self.ridge * torch.eye(len(preserved), dtype=torch.float64) + self.fusion_preserve_scale * preserved
        rows = []
        for part, factors in zip(concept.parts, trained, strict=True):
            G = sum_of_squares([model.encode_tokens(part.target_prompts).flatten(0, 1)])
            M += G
            rows.append(torch.cat([A.to("cpu", torch.float64) for _, A in factors.values()]) @ G)
        right = solved(M, torch.cat(rows), left=False)
        # By concept, matrix and row of A: A_i G_i M^-1.
        shares = right.unflatten(0, (len(trained), len(refined), self.rank))
        fused = {
            name: weight
            + sum(
                factors[name][0].to("cpu", torch.float64) @ share[place]
                for factors, share in zip(trained, shares, strict=True)
            )
            for place, (name, weight) in enumerate(refined.items())
        }
        if self.published_prior:
            drawn = solved(M, self.fusion_preserve_scale * preserved, left=False)
            for name, weight in refined.items():
                fused[name] = fused[name] + (base[name].to("cpu", torch.float64) - weight) @ drawn
        return fused


class ConceptAttention:
    """L of :class:`MACE` for one concept: its pictures, their masks and the columns of its tokens.

    Attributes:
        unet_evaluations: Spent on pictures and masks, by an interrupted run as well.
    """

    def __init__(
        self, config: MACE, model: TextToImage, part: Concept, *, seed: int, number: int, checkpoint: Path | None
    ) -> None:
        self._config = config
        self._seed = seed
        self._number = number
        self._columns = concept_columns(model, part, end_tokens=config.end_tokens).to(model.device)
        self._text = model.encode_prompts(part.target_prompts)
        self._pictures, self.unet_evaluations = paint(
            model,
            part.target_prompts,
            self._text,
            Painting(config.images, config.sampling_steps, config.image_guidance, config.sampling_batch_size),
            seed=derived_seed(seed, "mace/pictures", number),
            part=f"concept-{number}",
            checkpoint=checkpoint,
        )
        self._likelihood: Tensor | None = None
        if config.focus is not None:
            t = torch.arange(model.training_timesteps, dtype=torch.float64)
            rise, fall = (torch.sigmoid(config.focus_sharpness * (t - edge)) for edge in config.focus)
            self._likelihood = rise - fall
        self._masks: Tensor | None = None
        if part.kind in config.masked_kinds:
            columns = concept_columns(model, part).to(model.device)
            found, spent = remembered(
                checkpoint, f"masks-{number}", lambda: {"masks": self._concept_pixels(model, columns)}, model
            )
            self._masks = found["masks"]
            self.unet_evaluations += spent

    def loss(self, model: TextToImage, step: int) -> Tensor:
        """The mean over the step's samples."""
        generator = stream(self._seed, "mace/training", self._number, step)
        size = self._config.batch_size
        picks = torch.randint(len(self._pictures.latents), (size,), generator=generator)
        timesteps = None
        if self._likelihood is not None:
            timesteps = torch.multinomial(self._likelihood, size, replacement=True, generator=generator)
        batch = self._pictures.noised(model, picks, generator, timesteps)
        with recorded_attention(model) as record:
            model.predict_noise(batch.latents, batch.timesteps, self._text[batch.prompts])
        masks = None if self._masks is None else self._masks[picks]
        squares = concept_squares(record, self._columns[batch.prompts], masks)
        # The root of an empty mask's 0 would have no gradient.
        empty = squares == 0
        return squares.where(~empty, 1).sqrt().where(~empty, 0).sum(0).mean()

    @torch.no_grad()
    def _concept_pixels(self, model: TextToImage, columns: Tensor) -> Tensor:
        """The pictures' masks in the latents' size, bool [images, h, w]."""
        config = self._config
        _, height, width = model.latent_shape
        size = reduced_size(model, config.mask_reduction)
        picks = torch.arange(config.images)
        generator = stream(self._seed, "mace/masks", self._number)
        batch = self._pictures.noised(model, picks, generator, torch.full_like(picks, config.mask_timestep))
        masks = []
        for chunk in picks.split(config.sampling_batch_size):
            prompts = batch.prompts[chunk]
            with recorded_attention(model) as record:
                model.predict_noise(batch.latents[chunk], batch.timesteps[chunk], self._text[prompts])
            maps = concept_maps(record, columns[prompts], size)
            masks.append(nearest(maps >= config.mask_threshold, (height, width)))
        return torch.cat(masks)


def surroundings(model: TextToImage, concept: Concept) -> tuple[Tensor, Tensor]:
    """Embeddings of all tokens around the targets, and of the same tokens around the anchor, float [n, width] each.

    Tokens that either prompt has no room for are left out.
    """
    sources, destinations = [], []
    for part in concept.parts:
        anchors = part.as_anchor()
        around, wanted = (
            [text[~own] for text, own in zip(model.encode_tokens(side.target_prompts), columns, strict=True)]
            for side, columns in ((side, concept_columns(model, side).to(model.device)) for side in (part, anchors))
        )
        for before, after in zip(around, wanted * len(part.targets), strict=True):
            length = min(len(before), len(after))
            sources.append(before[:length])
            destinations.append(after[:length])
    return torch.cat(sources), torch.cat(destinations)


def _chunks(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(prompts), PROMPTS_AT_A_TIME):
        yield prompts[start : start + PROMPTS_AT_A_TIME]
