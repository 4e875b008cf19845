"""Which tables of embeddings the tokens of a search live in, where a T5 reads the prompt beside CLIP.

- ``clip``: CLIP's tokens, with those tables side by side where there are two CLIPs; T5 reads the plain prompt all the
  while. What is found is a pair of prompts, one for CLIP and one for T5, as the pipelines of diffusers take them.
- ``text``: CLIP's tokens; at every step T5 reads the text that they make. The gradient goes through CLIP alone.
- ``words``: words that CLIP's tokenizer and T5's both read as one token, with all tables side by side, so that the
  gradient goes through all encoders; a vocabulary of words, as EAP takes for FLUX.
- ``t5``: T5's tokens; CLIP reads the plain prompt during the search.

Models without a T5 have CLIP's tokens alone, and there ``clip`` and ``text`` are one. But for ``clip`` a picture is
made of the text that is found, which every encoder reads anew in tokens of its own. Whether these are the tokens that
were found is kept with the check, and the picture counts either way: it is of what somebody could type.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attacks.evaluate import Proposal
from attacks.prompt_search import candidate_tokens
from attacks.t5_sequences import T5Sequences
from diffusion.model import TextToImage
from diffusion.needs import A_T5, NOTHING, Need
from diffusion.precision import at_least_float32
from diffusion.prompt_template import Insertion, PromptTemplate, insertion_points
from diffusion.text.with_t5 import T5, TextEncodersWithT5

Tables = Literal["clip", "text", "words", "t5"]

READ_BACK = "read_back_"
"""With the name of an encoder: whether it reads the tokens that were found, among what a check has measured."""


class Space:
    """CLIP's tokens, and their embeddings.

    Args:
        model: The model under attack.
    """

    def __init__(self, model: TextToImage) -> None:
        self.model = model

    @property
    def tokenizer(self) -> Any:
        """What reads them."""
        return self.model.tokenizer

    def candidates(self, *, exclude_special: bool = True, readable: bool = False) -> Tensor:
        """List the ids that may be inserted, int64 [candidates].

        Args:
            exclude_special: Leave out start, end and padding.
            readable: Leave out tokens whose text is not read back as that token.
        """
        return candidate_tokens(self.model, exclude_special=exclude_special, readable=readable)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens int64 [...], float [..., width]."""
        return self.model.token_embeddings(tokens)

    def insert(self, prompts: Sequence[str], count: int, insertion: Insertion) -> "Template":
        """See :meth:`diffusion.prompt_template.PromptTemplate.insert`."""
        return PromptTemplate.insert(self.model, prompts, count, insertion)

    def insert_every(self, prompts: Sequence[str], period: int) -> "Template":
        """See :meth:`diffusion.prompt_template.PromptTemplate.insert_every`."""
        return PromptTemplate.insert_every(self.model, prompts, period)

    def at_placeholder(self, captions: Sequence[str], count: int) -> "Template":
        """See :meth:`diffusion.prompt_template.PromptTemplate.at_placeholder`."""
        return PromptTemplate.at_placeholder(self.model, captions, count)


class JointSpace(Space, ABC):
    """Tokens in prompts that a T5 reads too.

    Args:
        model: The model under attack.
        t5: Its T5.
        encoders: What its T5 is beside.
    """

    def __init__(self, model: TextToImage, t5: T5, encoders: TextEncodersWithT5) -> None:
        super().__init__(model)
        self.t5 = T5Sequences(t5, encoders.t5_tokens, model.vocabulary.device)
        self.encoders = encoders

    def insert(self, prompts: Sequence[str], count: int, insertion: Insertion) -> "Template":
        """See :meth:`diffusion.prompt_template.PromptTemplate.insert`."""
        return self._beside(prompts, PromptTemplate.insert(self.model, prompts, count, insertion))

    def insert_every(self, prompts: Sequence[str], period: int) -> "Template":
        """See :meth:`diffusion.prompt_template.PromptTemplate.insert_every`."""
        return self._beside(prompts, PromptTemplate.insert_every(self.model, prompts, period))

    def at_placeholder(self, captions: Sequence[str], count: int) -> "Template":
        """See :meth:`diffusion.prompt_template.PromptTemplate.at_placeholder`; plain prompts have nothing there."""
        plain = [" ".join(caption.replace("{}", " ", 1).split()) for caption in captions]
        return self._beside(plain, PromptTemplate.at_placeholder(self.model, captions, count))

    def _beside(self, prompts: Sequence[str], clip: PromptTemplate) -> "JointTemplate":
        return JointTemplate(self, tuple(prompts), clip, None)

    @abstractmethod
    def encode(self, model: TextToImage, template: "JointTemplate", embeddings: Tensor) -> Tensor:
        """See :meth:`diffusion.prompt_template.PromptTemplate.encode`."""

    def texts(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> list[str]:
        """See :meth:`diffusion.prompt_template.PromptTemplate.texts`."""
        return template.clip.texts(model, tokens)

    def read_back(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> dict[str, Tensor]:
        """Whether the encoders read the text as the tokens that are searched, bool [n] by encoder."""
        return {"clip": template.clip.comes_back(model, tokens)}

    def proposals(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> list[Proposal]:
        """The texts with tokens int64 [n, k] in the slots, and what is known of them."""
        read = self.read_back(model, template, tokens)
        measured = [{READ_BACK + name: float(each[row]) for name, each in read.items()} for row in range(len(tokens))]
        return [
            Proposal(text, measured=known)
            for text, known in zip(self.texts(model, template, tokens), measured, strict=True)
        ]


class PairSpace(JointSpace):
    """``clip``: T5 reads the plain prompt."""

    def encode(self, model: TextToImage, template: "JointTemplate", embeddings: Tensor) -> Tensor:
        """See :class:`JointSpace`."""
        return template.clip.encode(model, embeddings, template.prompts)

    def proposals(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> list[Proposal]:
        """See :class:`JointSpace`; each picture is of a pair of prompts."""
        found = super().proposals(model, template, tokens)
        ids = model.tokenize([proposal.prompt for proposal in found]).to(tokens.device)
        with torch.no_grad():
            texts = model.encode_embeddings(
                model.token_embeddings(ids), model.text_encoders.ends(ids), template.prompts
            )
        return [
            replace(proposal, text=text, variant=f"T5 reads {prompt!r}")
            for proposal, text, prompt in zip(found, texts, template.prompts, strict=True)
        ]


class TextSpace(JointSpace):
    """``text``: T5 reads what CLIP's tokens make."""

    def encode(self, model: TextToImage, template: "JointTemplate", embeddings: Tensor) -> Tensor:
        """See :class:`JointSpace`; embeddings that are no token's count as those of the nearest."""
        first = model.text_encoder.get_input_embeddings().weight
        first = first.to(at_least_float32(first.dtype))
        own = embeddings.detach()[..., : first.shape[1]].to(first)
        nearest = (own @ first.T - first.square().sum(dim=1) / 2).argmax(dim=-1)
        return template.clip.encode(model, embeddings, template.clip.texts(model, nearest))


class WordSpace(JointSpace):
    """``words``: one token for CLIP and one for T5."""

    def candidates(self, *, exclude_special: bool = True, readable: bool = False) -> Tensor:
        """See :class:`Space`.

        Raises:
            ValueError: There is no word.
        """
        found = super().candidates(exclude_special=exclude_special, readable=readable)
        shared = found[self._words(found) >= 0]
        if not len(shared):
            raise ValueError(f"tables is 'words', and the tokenizers of {self.model.name!r} have none in common.")
        return shared

    def look_up(self, tokens: Tensor) -> Tensor:
        """See :class:`Space`."""
        own = super().look_up(tokens)
        return torch.cat([own, self.t5.look_up(self._words(tokens)).to(own.dtype)], dim=-1)

    def encode(self, model: TextToImage, template: "JointTemplate", embeddings: Tensor) -> Tensor:
        """See :class:`JointSpace`."""
        width = embeddings.shape[-1] - self.t5.width
        return template.clip.encode(
            model, embeddings[..., :width], self.t5.rows(template.beside, embeddings[..., width:])
        )

    def read_back(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> dict[str, Tensor]:
        """See :class:`JointSpace`."""
        texts = self.texts(model, template, tokens)
        t5 = self.t5.reads(template.beside, self._words(tokens), texts)
        return {**super().read_back(model, template, tokens), "t5": t5}

    def _words(self, tokens: Tensor) -> Tensor:
        return self.encoders.shared_words.to(tokens.device)[tokens]

    def _beside(self, prompts: Sequence[str], clip: PromptTemplate) -> "JointTemplate":
        """T5's tokens of what stands between the slots."""
        sequences: list[list[int | None]] = []
        for row, slots, end in zip(clip.ids.tolist(), clip.slots.tolist(), clip.ends.tolist(), strict=True):
            borders = [0, *(slot for slot in slots if slot < end), end]
            pieces = [
                self.model.tokenizer.decode(row[start + 1 : stop], skip_special_tokens=True).strip()
                for start, stop in pairwise(borders)
            ]
            sequence: list[int | None] = []
            for ids in self.t5.tokenizer(pieces, add_special_tokens=False).input_ids:
                sequence += [*ids, None]
            sequences.append(sequence[:-1])
        return JointTemplate(self, tuple(prompts), clip, self.t5.template(sequences, clip.slots.shape[1]))


class T5Space(JointSpace):
    """``t5``: CLIP reads the plain prompt until a picture is made."""

    @property
    def tokenizer(self) -> Any:
        """See :class:`Space`."""
        return self.t5.tokenizer

    def candidates(self, *, exclude_special: bool = True, readable: bool = False) -> Tensor:
        """See :class:`Space`."""
        tokenizer = self.t5.tokenizer
        special = set(tokenizer.all_special_ids) if exclude_special else set()
        tokens = [token for token in range(min(len(tokenizer), self.t5.size)) if token not in special]
        if readable:
            texts = tokenizer.batch_decode([[token] for token in tokens])
            read = tokenizer(texts, add_special_tokens=False).input_ids
            tokens = [token for token, ids in zip(tokens, read, strict=True) if ids == [token]]
        return torch.tensor(tokens, device=self.model.vocabulary.device)

    def look_up(self, tokens: Tensor) -> Tensor:
        """See :class:`Space`."""
        return self.t5.look_up(tokens)

    def insert(self, prompts: Sequence[str], count: int, insertion: Insertion) -> "Template":
        """See :class:`Space`; places are counted in T5's tokens."""
        return self._opened(prompts, count, lambda length: insertion_points(length, count, insertion))

    def insert_every(self, prompts: Sequence[str], period: int) -> "Template":
        """See :class:`Space`; places are counted in T5's tokens."""
        count = -(-(self.t5.length - 1) // (period + 1))
        return self._opened(prompts, count, lambda length: list(range(0, length + 1, period))[:count])

    def encode(self, model: TextToImage, template: "JointTemplate", embeddings: Tensor) -> Tensor:
        """See :class:`JointSpace`."""
        clip = template.clip
        return model.encode_embeddings(
            model.token_embeddings(clip.ids), clip.ends, self.t5.rows(template.beside, embeddings)
        )

    def texts(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> list[str]:
        """See :class:`JointSpace`."""
        filled, ends = template.beside.fill(tokens).tolist(), template.beside.ends.tolist()
        rows = [row[:end] for row, end in zip(filled, ends, strict=True)]
        return [self.t5.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def read_back(self, model: TextToImage, template: "JointTemplate", tokens: Tensor) -> dict[str, Tensor]:
        """See :class:`JointSpace`."""
        return {"t5": self.t5.reads(template.beside, tokens, self.texts(model, template, tokens))}

    def _opened(self, prompts: Sequence[str], count: int, points_of: Callable[[int], list[int]]) -> "JointTemplate":
        sequences: list[list[int | None]] = []
        for ids in self.t5.tokenizer(list(prompts), add_special_tokens=False).input_ids:
            sequence: list[int | None] = list(ids[: max(self.t5.length - 1 - count, 0)])
            for index, point in enumerate(points_of(len(sequence))):
                sequence.insert(point + index, None)
            sequences.append(sequence)
        ids = self.model.tokenize(prompts)
        clip = PromptTemplate(ids, ids.new_zeros((len(ids), 0)), self.model.text_encoders.ends(ids))
        return JointTemplate(self, tuple(prompts), clip, self.t5.template(sequences, count))


@dataclass(frozen=True)
class JointTemplate:
    """Prompts with free slots that CLIP and T5 read; see :class:`diffusion.prompt_template.PromptTemplate`.

    Attributes:
        space: What may go into the slots, and how it is read.
        prompts: The plain prompts.
        clip: What CLIP reads.
        t5: What T5 reads in tokens of its own, if it is given those.
    """

    space: JointSpace
    prompts: tuple[str, ...]
    clip: PromptTemplate
    t5: PromptTemplate | None

    @property
    def beside(self) -> PromptTemplate:
        """T5's tokens.

        Raises:
            ValueError: T5 reads texts.
        """
        if self.t5 is None:
            raise ValueError("T5 reads texts here, and no tokens.")
        return self.t5

    @property
    def slots(self) -> Tensor:
        """The positions of the inserted tokens, int64 [n, k]."""
        return self.clip.slots if self.t5 is None else self.t5.slots

    def repeat(self, times: int) -> "JointTemplate":
        """Take each prompt several times in a row."""
        return self[torch.arange(len(self.prompts), device=self.clip.ids.device).repeat_interleave(times)]

    def __getitem__(self, index: Tensor) -> "JointTemplate":
        """Take the prompts at ``index``, int64 [m], which may repeat."""
        prompts = tuple(self.prompts[row] for row in index.tolist())
        return replace(self, prompts=prompts, clip=self.clip[index], t5=None if self.t5 is None else self.t5[index])

    def encode(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings``, float [n, k, width], in the slots; differentiable in them."""
        return self.space.encode(model, self, token_embeddings)

    @torch.no_grad()
    def encode_detached(self, model: TextToImage, token_embeddings: Tensor) -> Tensor:
        """Encode the prompts with ``token_embeddings`` of any precision, without gradients."""
        return self.encode(model, token_embeddings.to(model.vocabulary.dtype))

    def encode_tokens(self, model: TextToImage, tokens: Tensor) -> Tensor:
        """Encode the prompts with ``tokens``, int64 [n, k], in the slots."""
        return self.encode(model, self.space.look_up(tokens))

    def comes_back(self, model: TextToImage, tokens: Tensor) -> Tensor:
        """Whether every encoder reads the text with ``tokens``, int64 [n, k], as what it was made of, bool [n]."""
        return torch.stack(list(self.space.read_back(model, self, tokens).values())).all(dim=0)

    def texts(self, model: TextToImage, tokens: Tensor) -> list[str]:
        """Read the prompts as text, with ``tokens``, int64 [n, k], in the slots."""
        return self.space.texts(model, self, tokens)


Template: TypeAlias = PromptTemplate | JointTemplate

_SPACES: dict[Tables, type[JointSpace]] = {"clip": PairSpace, "text": TextSpace, "words": WordSpace, "t5": T5Space}


def space_of(model: TextToImage, tables: Tables) -> Space:
    """The tokens that a search of ``model`` may insert.

    Raises:
        ValueError: ``tables`` needs a T5 and the model has none.
    """
    encoders = model.text_encoders
    if isinstance(encoders, TextEncodersWithT5) and encoders.t5 is not None:
        return _SPACES[tables](model, encoders.t5, encoders)
    if needs_of_tables(tables):
        raise ValueError(
            f"tables is {tables!r}, and {model.name!r} is without a T5; take tables=text, which is CLIP's tokens, or a "
            "model with its T5 (model.t5=true)."
        )
    return Space(model)


def needs_of_tables(tables: Tables) -> frozenset[Need]:
    """What a search in these tables needs; see :mod:`diffusion.needs`."""
    return A_T5 if tables in {"words", "t5"} else NOTHING


class SearchesTables:
    """An attack with the field ``tables``."""

    tables: Tables

    @property
    def needs(self) -> frozenset[Need]:
        """See :mod:`diffusion.needs`."""
        return needs_of_tables(self.tables)


def proposals_of(model: TextToImage, template: Template, tokens: Tensor) -> list[Proposal]:
    """What to draw of tokens int64 [n, k] in the slots, without loss and cost."""
    if isinstance(template, JointTemplate):
        return template.space.proposals(model, template, tokens)
    return [Proposal(text) for text in template.texts(model, tokens)]
