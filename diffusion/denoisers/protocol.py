"""What the model asks of its network."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from diffusion.denoisers.attention import TextAttention

Selector = Callable[[str, nn.Module], bool]
"""(name of a parameter, the module that has it) -> whether it is one of a group."""

ParameterGroups = Mapping[str, Selector]
"""What the names of scopes mean on an architecture; see :mod:`erasure.parameters`. It has no others."""

Reads = Literal["rows", "pooled"]
"""What of a text: the rows that are attended to, or what the prompt is as a whole."""

Doors = Mapping[Reads, Selector]
"""The matrices that text meets first, which are linear in it, by what of it they read."""

TextScope = Literal["xattn_kv", "text_projection"]
"""The scopes that doors belong to."""

GuidanceKind = Literal["classifier_free", "embedded", "none"]
"""How a network's pictures are guided: by a second evaluation for the empty prompt; by a scale that it is given; or not
at all, as it was distilled to the guided pictures."""


class Denoiser(Protocol):
    """A network that predicts what is to be taken off noisy latents, float [n, c, h, w] on every architecture."""

    @property
    def network(self) -> Any:
        """The network, a module of diffusers."""

    @property
    def kind(self) -> str:
        """What it is called in messages."""

    @property
    def part(self) -> str:
        """What diffusers' pipelines and folders call it."""

    @property
    def last_layer(self) -> str:
        """The path of the linear layer or convolution in the network that its output comes from."""

    @property
    def groups(self) -> ParameterGroups:
        """Its parameters by scope."""

    @property
    def doors(self) -> Doors:
        """Where text enters."""

    @property
    def text_scope(self) -> TextScope:
        """The scope that the doors belong to."""

    def with_network(self, network: nn.Module) -> "Denoiser":
        """The same with another network."""

    @property
    def guidance(self) -> GuidanceKind:
        """How pictures are guided."""

    @property
    def channels(self) -> int:
        """Of the latents."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents that it was trained on."""

    @property
    def multiple(self) -> int:
        """What the latents' edges must be multiples of."""

    @property
    def largest(self) -> int | None:
        """The longest edge of latents that it takes, if there is one."""

    def tokens(self, height: int, width: int) -> int:
        """How many positions it sees latents of this size in."""

    def evaluate(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor | None, guidance: Tensor
    ) -> Tensor:
        """The network's output, float [n, c, h, w].

        Args:
            latents: float [n, c, h, w].
            timesteps: [n].
            text: float [n, rows, width].
            pooled: What the prompts are as a whole, float [n, width], if the model has it.
            guidance: Scales of embedded guidance, float [n]; other networks take no notice.
        """

    def watch_text_attention(self, attention: TextAttention, hooks: ExitStack) -> None:
        """Let ``attention`` keep what is computed until ``hooks`` closes.

        Raises:
            ValueError: It cannot be kept.
        """

    def text_attention(self) -> dict[str, Any]:
        """The layers that only read text, each a cross-attention, by name in module order.

        Raises:
            ValueError: It has none; the sentence says what it has.
        """
