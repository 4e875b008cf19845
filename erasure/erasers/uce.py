"""UCE: what the network reads of the concept becomes the anchor's, in closed form."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.closed_form import ClosedForm, Door, Term, multiplied, right_multiplication
from erasure.concept import Concept
from erasure.pictures import Painting, paint

log = logging.getLogger(__name__)

Strengths = Sequence[Sequence[float]]
"""alpha by concept and attribute."""


@checked
class Debias:
    """What pictures of a concept are to show in which shares, in place of erasing it (the paper's section 4.2).

    The destination of a target's embedding c is c + sum_p alpha_p a_p, with a_p the attribute p in the same template.
    Given ``strengths`` are alpha, and the edit is a closed form. ``judges`` find them, from alpha = 0 on: every round
    makes pictures of the concept by the edited model, r_p of which show p most, and

        alpha_p becomes alpha_p + step (r*_p - r_p), with which the edit is solved from the unedited W again,

    until |r_p - r*_p| <= tolerance for all p; a concept that has got there keeps its alpha. The authors' code adds
    step (r*_p - r_p) || W c || W a_p / || W a_p || to what the last round's matrices give instead.

    Attributes:
        attributes: Phrases; a target's place in one is ``{}``, if it has any ("a female {}", "made of glass").
        strengths: alpha by attribute, for every concept.
        judges: One by attribute, which tells from uint8 pictures [n, 3, H, W] in ``score``, float [n], how sure it is;
            a picture shows the attribute of the surest.
        shares: r*, one by attribute, 1 in sum; None for equal ones.
        step: How far alpha follows a share. 0.1 is the default of an option that the authors' code of 2025 never reads:
            there alpha takes the whole difference (1).
        tolerance: How far a share may be off.
        rounds: How often pictures are made at the most.
        pictures: Of a concept in a round, its target prompts in turn.
        sampling_steps: Sampler steps of a picture.
        guidance: Guidance scale of a picture.
        sampling_batch_size: Pictures at a time; it changes speed and memory only.
    """

    attributes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=2)
    strengths: tuple[float, ...] | None = None
    judges: tuple[Callable[[Tensor], Any], ...] | None = None
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    step: Annotated[float, Field(gt=0)] = 0.1
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    rounds: Annotated[int, Field(ge=1)] = 30
    pictures: Annotated[int, Field(ge=1)] = 50
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: Annotated[float, Field(ge=0)] = 7.5
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.strengths is None) == (self.judges is None):
            given = "neither" if self.judges is None else "both"
            raise ValueError(f"debias has {given} of strengths and judges; give the strengths, or judges to find them.")
        for name in ("strengths", "judges", "shares"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.attributes):
                raise ValueError(
                    f"debias.{name} has {len(values)} values and debias.attributes {len(self.attributes)}; "
                    "give one for each attribute."
                )
        if self.shares is not None and not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ValueError(f"debias.shares is {list(self.shares)}, {sum(self.shares):g} in sum; it must be 1.")
        return self

    @property
    def wanted(self) -> Tensor:
        """r*, float64 [attributes]."""
        count = len(self.attributes)
        return torch.tensor(self.shares or [1 / count] * count, dtype=torch.float64)

    def prompts(self, concept: Concept, attribute: str) -> list[str]:
        """For every target prompt of the concept the attribute in the same template."""
        return [
            template.replace("{}", attribute.replace("{}", target))
            for part in concept.parts
            for target in part.targets
            for template in part.templates
        ]

    def measured(
        self, model: TextToImage, concept: Concept, name: str, *, seed: int, checkpoint: Path | None
    ) -> tuple[Tensor, int]:
        """The shares r of the model as it is on a concept's prompts, float64 [attributes]; U-Net evaluations spent."""
        painting = Painting(self.pictures, self.sampling_steps, self.guidance, self.sampling_batch_size)
        prompts = concept.target_prompts
        text = model.encode_prompts(prompts)
        painted, spent = paint(model, prompts, text, painting, seed=seed, part=name, checkpoint=checkpoint)
        pictures = model.decode(painted.latents)
        scores = torch.stack([judge(pictures).score for judge in self.judges or ()])
        shown = scores.argmax(dim=0).bincount(minlength=len(self.attributes))
        return shown.cpu().double() / self.pictures, spent


@checked
class UCE(ClosedForm):
    """Unified Concept Editing (Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024).

    For every key and value matrix W of cross-attention (their equation 7, solved in :mod:`erasure.closed_form`), or for
    the matrices that text enters by where there is none, as in their code for FLUX, whose biases count twice though:
    min sum_e s_e || W' c_e - W c_g ||^2 + sum_p s_p || W' c_p - W c_p ||^2 + lambda || W' - W ||^2
    with c_e the concept's targets in every template, c_g the anchor in the same template, c_p what is preserved. With
    ``debias``, attributes that are added to c_e take the anchor's place.

    Attributes:
        tokens: Which embeddings of a phrase are the c: ``last``, that of its last token before the end token (the
            authors' code of 2025); or ``from_last``, that one and all after it, paired in order, with all tokens of
            the preserved prompts and of the empty one (the authors' code of 2023). A T5 beside CLIP has its own last
            token, and pooled embeddings are one.
        ridge: lambda.
        erase_scale: s_e.
        preserve_scale: s_p; None for max(0.1, 1 / number of preserved prompts, the empty one included), as in the
            code of 2023.
        anchor: A phrase to take for c_g's in place of the concept's anchor; None for that one.
        debias: None erases; see :class:`Debias`.
    """

    tokens: Literal["last", "from_last"] = "last"
    ridge: Annotated[float, Field(gt=0)] = 0.5
    erase_scale: Annotated[float, Field(gt=0)] = 1.0
    preserve_scale: Annotated[float, Field(ge=0)] | None = 1.0
    anchor: str | None = None

    debias: Debias | None = None

    def right_multiplication(self, model: TextToImage, concept: Concept, door: Door) -> Tensor:
        """See :class:`erasure.closed_form.ClosedForm`."""
        if self.debias is None:
            return self._solved(model, concept, door, self._erasing(model, concept, door))
        if self.debias.strengths is None:
            raise ValueError("debias has no strengths, and finding them takes pictures; call erase, or give them.")
        return self._debiased(model, concept, door, self.debias, [self.debias.strengths] * len(concept.parts))

    def solution(
        self, model: TextToImage, concept: Concept, doors: Sequence[Door], *, seed: int, checkpoint: Path | None
    ) -> tuple[list[Tensor], dict[str, Any], int]:
        """See :class:`erasure.closed_form.ClosedForm`."""
        debias = self.debias
        if debias is None or debias.strengths is not None:
            return super().solution(model, concept, doors, seed=seed, checkpoint=checkpoint)
        strengths = torch.zeros(len(concept.parts), len(debias.attributes), dtype=torch.float64)
        shares = torch.zeros_like(strengths)
        unsettled = set(range(len(concept.parts)))
        total = 0
        for number in range(debias.rounds):
            rights = [self._debiased(model, concept, door, debias, strengths.tolist()) for door in doors]
            with multiplied(doors, rights).applied(model):
                for place in sorted(unsettled):
                    shares[place], spent = debias.measured(
                        model,
                        concept.parts[place],
                        f"round-{number}-{place}",
                        seed=derived_seed(seed, "uce/pictures", number, place),
                        checkpoint=checkpoint,
                    )
                    total += spent
            gaps = debias.wanted - shares
            log.info("debiasing, round %d: shares %s", number + 1, shares.tolist())
            unsettled = {place for place in unsettled if gaps[place].abs().max() > debias.tolerance}
            if not unsettled or number + 1 == debias.rounds:
                break
            for place in unsettled:
                strengths[place] += debias.step * gaps[place]
        return rights, {"strengths": strengths.tolist(), "shares": shares.tolist()}, total

    def anchored(self, concept: Concept) -> Concept:
        """The concept with the anchor that it goes to."""
        return concept if self.anchor is None else concept.anchored(self.anchor)

    def _solved(self, model: TextToImage, concept: Concept, door: Door, changing: Term) -> Tensor:
        return right_multiplication([changing, *self._keeping(model, concept, door)], self.ridge)

    def _erasing(self, model: TextToImage, concept: Concept, door: Door) -> Term:
        anchors = self.anchored(concept).target_anchors
        sources, destinations = self._aligned(model, door, concept.target_prompts, anchors)
        return Term(torch.cat(sources), torch.cat(destinations), self.erase_scale)

    def _debiased(
        self, model: TextToImage, concept: Concept, door: Door, debias: Debias, strengths: Strengths
    ) -> Tensor:
        """T that adds attributes to the targets' embeddings."""
        attributes = [debias.prompts(concept, attribute) for attribute in debias.attributes]
        sources, *added = self._aligned(model, door, concept.target_prompts, *attributes)
        counts = [len(part.target_prompts) for part in concept.parts]
        by_prompt = [row for row, count in zip(strengths, counts, strict=True) for _ in range(count)]
        tokenizers = len(sources) // len(by_prompt)
        destinations = [
            source + sum(strength * text for strength, text in zip(row, texts, strict=True))
            for source, row, *texts in zip(sources, by_prompt * tokenizers, *added, strict=True)
        ]
        term = Term(torch.cat(sources), torch.cat(destinations), self.erase_scale)
        return self._solved(model, concept, door, term)

    def _aligned(self, model: TextToImage, door: Door, *kinds: Sequence[str]) -> list[list[Tensor]]:
        """Embeddings of prompts that belong together, one of each kind: of each, float [tokens, width] per prompt.

        They are those of the first tokenizer, and below them those of a second.
        """
        count = 1 if self.tokens == "last" else None
        embedded = [door.from_last_subject_tokens(model, prompts, count) for prompts in kinds]
        lengths = [min(map(len, together)) for together in zip(*embedded, strict=True)]
        return [[text[:length] for text, length in zip(texts, lengths, strict=True)] for texts in embedded]

    def _keeping(self, model: TextToImage, concept: Concept, door: Door) -> list[Term]:
        prompts = concept.preserved_prompts
        scale = max(0.1, 1 / (1 + len(prompts))) if self.preserve_scale is None else self.preserve_scale
        if self.tokens == "from_last":
            return [Term.keeping(door.rows(model, ["", *prompts]), scale)]
        if not prompts:
            return []
        return [Term.keeping(torch.cat(door.from_last_subject_tokens(model, prompts, 1)), scale)]
