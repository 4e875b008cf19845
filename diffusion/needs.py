"""What a method may need of a model's architecture, so that a pair that cannot work is refused before it is loaded."""

from typing import Any, Literal, TypeAlias

Need: TypeAlias = Literal["cross_attention", "one_text_encoder", "t5", "no_t5"]
"""What a method says of itself in its attribute ``needs``, a frozenset; a method without one works with all models.

- ``cross_attention``: layers that only read text, whose keys and values are linear in it.
- ``one_text_encoder``: a single text encoder, that of Stable Diffusion 1 and 2.
- ``t5``: a T5 beside CLIP.
- ``no_t5``: none, as T5 reads no embeddings of CLIP's tokens.
"""

CROSS_ATTENTION: frozenset[Need] = frozenset({"cross_attention"})
ONE_TEXT_ENCODER: frozenset[Need] = frozenset({"one_text_encoder"})
A_T5: frozenset[Need] = frozenset({"t5"})
NO_T5: frozenset[Need] = frozenset({"no_t5"})
NOTHING: frozenset[Need] = frozenset()


def needs_of(method: Any) -> frozenset[Need]:
    """What a method needs."""
    found: frozenset[Need] = getattr(method, "needs", NOTHING)
    return found
