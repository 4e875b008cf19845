"""Which methods go with which family of models, told before a model is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.loading.pipeline_kinds import T5_PARTS, present_parts
from diffusion.needs import A_T5, CROSS_ATTENTION, NO_T5, NOTHING, ONE_TEXT_ENCODER, Need, needs_of
from experiments.command.errors import CommandError
from experiments.fit import family_of, read_object, within

LACKING: Mapping[str, frozenset[Need]] = {
    "sdxl": ONE_TEXT_ENCODER,
    "sd3": CROSS_ATTENTION | ONE_TEXT_ENCODER,
    "flux": CROSS_ATTENTION | ONE_TEXT_ENCODER,
}
"""What the models of a family have not, whether they have a T5 or none."""

_WORDS: Mapping[Need, str] = {
    "cross_attention": "cross-attention, which models of Stable Diffusion 3's kind have not",
    "one_text_encoder": "one text encoder, and these models have several",
    "t5": "a T5, and this model is without one",
    "no_t5": "text encoders that read embeddings of CLIP's tokens, and T5 reads none",
}
_OTHERWISE: Mapping[Need, str] = {
    "t5": "tables=text or clip, or load the T5 of a model that has one (model.t5=true)",
    "no_t5": "eraser=esd, ac, salun, uce or rece, or leave T5 out where the model can be without (model.t5=false)",
}
_INSTEAD: Mapping[str, str] = {
    "eraser": "eraser=esd, ac, salun, uce, rece, spm, stereo or sld",
    "pruning": "pruning=magnitude, wanda or on",
    "attack": "attack=unlearndiff, p4d or pez",
}


def check_architecture(methods: Mapping[str, Any], model: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Refuse methods that need what a model has not.

    Args:
        methods: By group: ``eraser``, ``pruning``, ``attack``.
        model: The composed ``model``.
        choices: What was chosen of each group, as far as known.

    Raises:
        CommandError: There is one; the sentence says what to choose in its place.
    """
    family = family_of(model)
    lacking = NOTHING.union(*(LACKING.get(each, NOTHING) for each in within(family)))
    lacking |= NO_T5 if has_t5(model) else A_T5
    for group, method in methods.items():
        if unmet := sorted(needs_of(method) & lacking):
            instead = _OTHERWISE.get(unmet[0], f"{_INSTEAD[group]}, or a model of Stable Diffusion 1 or 2")
            raise CommandError(
                f"{group}={choices.get(group, type(method).__name__)} needs {_WORDS[unmet[0]]} (family {family}); "
                f"choose {instead}."
            )


def has_t5(model: Mapping[str, Any]) -> bool:
    """Whether a T5 will read prompts, by what is composed and by the folder's index if there is one."""
    families = within(family_of(model))
    if "sd3" in families:
        index = Path(str(model.get("source"))).expanduser() / "model_index.json"
        known = index.is_file()
        return bool(model.get("t5", True)) and (not known or T5_PARTS[1] in present_parts(read_object(index)))
    return "flux" in families
