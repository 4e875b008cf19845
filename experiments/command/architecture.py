"""Which methods go with which family of models, told before a model is loaded."""

from collections.abc import Mapping
from typing import Any

from diffusion.needs import CROSS_ATTENTION, NOTHING, ONE_TEXT_ENCODER, Need, needs_of
from experiments.command.errors import CommandError

LACKING: Mapping[str, frozenset[Need]] = {
    "sdxl": ONE_TEXT_ENCODER,
    "sd3": CROSS_ATTENTION | ONE_TEXT_ENCODER,
    "flux": CROSS_ATTENTION | ONE_TEXT_ENCODER,
}
"""What the models of a family have not."""

_WORDS: Mapping[Need, str] = {
    "cross_attention": "cross-attention, which models of Stable Diffusion 3's kind have not",
    "one_text_encoder": "one text encoder, and these models have several",
}
_INSTEAD: Mapping[str, str] = {
    "eraser": "eraser=esd, ac, salun, uce, rece, spm, stereo or sld",
    "pruning": "pruning=magnitude, wanda or on",
    "attack": "attack=unlearndiff, p4d or pez",
}


def check_architecture(methods: Mapping[str, Any], family: str, choices: Mapping[str, str]) -> None:
    """Refuse methods that need what a family of models has not.

    Args:
        methods: By group: ``eraser``, ``pruning``, ``attack``.
        family: One of :data:`experiments.fit.FAMILIES`.
        choices: What was chosen of each group, as far as known.

    Raises:
        CommandError: There is one; the sentence says what to choose in its place.
    """
    for group, method in methods.items():
        if unmet := sorted(needs_of(method) & LACKING.get(family, NOTHING)):
            raise CommandError(
                f"{group}={choices.get(group, type(method).__name__)} needs {_WORDS[unmet[0]]} (family {family}); "
                f"choose {_INSTEAD[group]}, or a model of Stable Diffusion 1 or 2."
            )
