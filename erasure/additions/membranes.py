"""Semi-permeable membranes: low-rank layers beside the U-Net's, as open as the prompt is about their concept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.guard import Encode, Guard
from diffusion.model import TextToImage
from erasure.addition import Addition, set_guard

Gate = Literal["facilitated", "off"]
"""Whether the prompt decides how permeable a membrane is, or all are open whatever it says."""

Merge = Literal["exact", "published"]
"""sum_i m_i u_i d_i, each concept by itself, or (sum_i m_i u_i) (sum_j m_j d_j), as the authors' code adds them up."""

UP, DOWN = ".up", ".down"

PROMPTS_READ_AT_ONCE = 8
"""Prompts whose tokens are looked up together; it changes memory only."""

GATE_UNIT = 2.0**-10
"""What stands for permeability 1 in the last rows of a text: next to nothing beside embeddings where texts are
compared, and a normal number in every precision."""


@dataclass(frozen=True, eq=False)
class Membranes(Addition):
    """What SPM adds to a model; :class:`erasure.erasers.spm.SPM` has the formulas.

    Attributes:
        up: float [concepts, outputs, rank] by the layer's name in the U-Net, alpha / rank included.
        down: float [concepts, rank, inputs] by the layer's name, [..., height, width] for convolutions.
        targets: What each concept's permeability is measured against.
        gate: Whether it is.
        strength: gamma, a factor on it.
        merge: How concepts are added up.
    """

    kind: ClassVar[str] = "membranes"
    is_guard: ClassVar[bool] = True

    up: Mapping[str, Tensor]
    down: Mapping[str, Tensor]
    targets: tuple[tuple[str, ...], ...]
    gate: Gate = "facilitated"
    strength: float = 1.0
    merge: Merge = "exact"

    def settings(self) -> dict[str, Any]:
        """See :class:`erasure.addition.Addition`."""
        return {name: value for name, value in vars(self).items() if name not in {"up", "down"}}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`erasure.addition.Addition`."""
        sides = ((UP, self.up), (DOWN, self.down))
        return {f"{layer}{side}": factor for side, factors in sides for layer, factor in factors.items()}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See :class:`erasure.addition.Addition`."""
        up, down = (
            {name.removesuffix(side): factor for name, factor in tensors.items() if name.endswith(side)}
            for side in (UP, DOWN)
        )
        targets = tuple(tuple(phrases) for phrases in settings["targets"])
        both = up.keys() & down.keys()
        odd = {*(up.keys() ^ down.keys()), *(one for one in both if not _fit(up[one], down[one], len(targets)))}
        if odd:
            raise ValueError(f"The membranes of {len(odd)} layers ({min(odd)!r}, ...) do not fit together.")
        return cls(up, down, **{**settings, "targets": targets})

    def attach(self, model: TextToImage) -> Callable[[], None]:
        """See :class:`erasure.addition.Addition`."""
        layers = dict(model.unet.named_modules())
        for name, up in self.up.items():
            expected = (up.shape[1], *self.down[name].shape[2:])
            if name not in layers or not has_membrane_shape(layers[name], expected):
                raise ValueError(
                    f"The membranes were made for a layer {name!r} of shape {list(expected)} and {model.name!r} has no "
                    "such layer; load the model that they were made from."
                )
        openness = Openness(self, model.device)
        with ExitStack() as attached:
            if self.gate == "facilitated":
                attached.callback(set_guard(model, FacilitatedTransport(self, model, openness)))
            for name, up in self.up.items():
                hook = layers[name].register_forward_hook(
                    _Hook(up, self.down[name], self.merge, layers[name], openness)
                )
                attached.callback(hook.remove)
            return attached.pop_all().close


class Openness:
    """How permeable each concept's membrane is for the samples that are in the U-Net, set before they come.

    Attributes:
        gates: float [n, concepts], m; one row stands for any number of samples.
    """

    def __init__(self, added: Membranes, device: torch.device) -> None:
        self.gates = torch.full((1, len(added.targets)), added.strength, dtype=torch.float64, device=device)


class _Hook:
    """What a layer gives besides its own output: u d x of every concept, as permeable as it is."""

    def __init__(self, up: Tensor, down: Tensor, merge: Merge, layer: nn.Module, openness: Openness) -> None:
        weight = layer.get_parameter("weight")
        self.concepts, self.rank = down.shape[:2]
        # By (concept, rank): one product with all concepts' downs, one with all their ups.
        self.down = down.to(weight).flatten(0, 1)
        self.up = up.to(weight).transpose(1, 2).flatten(0, 1).T
        self.merge = merge
        self.openness = openness

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        [x] = arguments
        if isinstance(layer, nn.Conv2d):
            hidden = functional.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            passed = self._permeated(hidden.movedim(1, -1)).movedim(-1, 1)
            return output + functional.conv2d(passed, self.up[:, :, None, None])
        return output + functional.linear(self._permeated(functional.linear(x, self.down)), self.up)

    def _permeated(self, hidden: Tensor) -> Tensor:
        """Gate d x of every concept, float [n, ..., concepts * rank]."""
        split = hidden.unflatten(-1, (self.concepts, self.rank))
        gates = self.openness.gates.to(hidden)
        gates = gates.reshape(len(gates), *[1] * (split.ndim - 3), self.concepts, 1)
        if self.merge == "published":
            split = (gates * split).sum(-2, keepdim=True)
        passed: Tensor = gates * split
        return passed.flatten(-2)


class FacilitatedTransport(Guard):
    """Reads how much a prompt is about each concept, and opens the membranes as far while its noise is predicted.

    What :meth:`read` returns is [text; permeabilities], float [n, tokens + rows, width], with as many rows as the
    concepts' numbers take; they are constants, through which no gradient flows. Both halves of guidance meet the
    prompt's own.

    Args:
        added: What it goes by.
        model: Which it stands before.
        openness: What it sets.
    """

    def __init__(self, added: Membranes, model: TextToImage, openness: Openness) -> None:
        self.strength = added.strength
        self.openness = openness
        self.vocabulary = model.vocabulary.detach()
        self.tokens, _ = model.text_shape
        self.concepts = len(added.targets)
        self.rows = -(-self.concepts // self.vocabulary.shape[1])
        phrases = [phrase for targets in added.targets for phrase in targets]
        self.sizes = [len(targets) for targets in added.targets]
        embeddings = model.encode_prompts(phrases).flatten(1)
        self.precision = torch.promote_types(embeddings.dtype, torch.float32)
        self.embeddings = embeddings.to(self.precision)
        special = set(model.tokenizer.all_special_ids)
        self.bags = torch.zeros((len(phrases), len(self.vocabulary)), dtype=self.precision, device=model.device)
        for bag, ids in zip(self.bags, model.tokenizer(phrases).input_ids, strict=True):
            bag[sorted(set(ids) - special)] = 1

    def read(self, token_embeddings: Tensor, eos_positions: Tensor, encode: Encode) -> Tensor:
        """See :class:`diffusion.guard.Guard`."""
        text = encode(token_embeddings, eos_positions)
        gates = self.permeabilities(token_embeddings.detach(), eos_positions, text.detach())
        rows = text.new_zeros((len(text), self.rows * text.shape[2]))
        rows[:, : self.concepts] = gates * GATE_UNIT
        return torch.cat([text, rows.reshape(len(text), self.rows, -1)], dim=1)

    def permeabilities(self, token_embeddings: Tensor, eos_positions: Tensor, text: Tensor) -> Tensor:
        """Return gamma max(s_f, s_t), the greatest of a concept's targets, float [n, concepts].

        The tokens of a prompt are the vocabulary's that are nearest to its embeddings, where those are free.

        Args:
            token_embeddings: float [n, tokens, width].
            eos_positions: int64 [n].
            text: float [n, tokens, width], what the encoder makes of them.
        """
        flat = text.flatten(1).to(self.precision)
        alike = functional.cosine_similarity(flat[:, None], self.embeddings[None], dim=-1)
        own = torch.cat(list(self._own_tokens(token_embeddings, eos_positions)))
        shared = own @ self.bags.T / self.bags.sum(dim=1).clamp(min=1)
        scores = torch.maximum(alike, shared).split(self.sizes, dim=1)
        return self.strength * torch.stack([targets.amax(dim=1) for targets in scores], dim=1)

    def pair(self, unconditional: Tensor, text: Tensor) -> Tensor:
        """See :class:`diffusion.guard.Guard`."""
        return torch.cat([unconditional[:, : self.tokens], text[:, self.tokens :]], dim=1)

    def condition(self, text: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`diffusion.guard.Guard`.

        Raises:
            ValueError: The text was encoded without this guard.
        """
        if text.shape[1] != self.tokens + self.rows:
            raise ValueError(
                f"The text has {text.shape[1]} rows and that of gated membranes has {self.tokens + self.rows}; encode "
                "prompts with the model that has the membranes, or open them to every text (gate=off)."
            )
        self.openness.gates = text[:, self.tokens :].flatten(1)[:, : self.concepts].detach() / GATE_UNIT
        return text[:, : self.tokens]

    def _own_tokens(self, token_embeddings: Tensor, eos_positions: Tensor) -> Iterator[Tensor]:
        """Which tokens are between a prompt's start and end, float [chunk, vocabulary], some prompts at a time."""
        table = self.vocabulary.to(self.precision)
        places = torch.arange(token_embeddings.shape[1], device=table.device)
        for embeddings, ends in zip(
            token_embeddings.split(PROMPTS_READ_AT_ONCE), eos_positions.split(PROMPTS_READ_AT_ONCE), strict=True
        ):
            # || e - v ||^2 without || e ||^2, which is the same for every v.
            distances = table.square().sum(dim=1) - 2 * embeddings.to(table) @ table.T
            inside = (places > 0) & (places < ends[:, None])
            present = table.new_zeros((len(ends), len(table) + 1))
            nearest = distances.argmin(dim=-1).where(inside, len(table))
            yield present.scatter_(1, nearest, 1.0)[:, :-1]


def has_membrane_shape(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a membrane of ``shape``, outputs and what they are computed from, fits beside ``layer``."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and tuple(layer.weight.shape) == shape
    return isinstance(layer, nn.Linear) and tuple(layer.weight.shape) == shape


def _fit(up: Tensor, down: Tensor, concepts: int) -> bool:
    return up.ndim == 3 and down.ndim in {3, 5} and len(up) == len(down) == concepts and up.shape[2] == down.shape[1]
