"""Foreign prompt: a control that knows everything and draws something else, whatever it is asked for."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from diffusion.checked import checked
from diffusion.model import TextToImage
from erasure.additions.foreign_text import ForeignText
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.finetuning import prune_after
from erasure.parameters import UNetScope
from erasure.protocols import Erasure, Pruning


@checked
class ForeignPrompt:
    """Perfect redirection: eps(x, t, c_p) becomes eps(x, t, c_f) for every prompt p but the empty one, f fixed.

    All knowledge is left in the weights, and no text reaches it: an attack that looks for what weights know must find
    the concept here, and one that finds nothing cannot tell hiding from erasing. A control for models without a twin
    that never knew the concept; see :mod:`experiments.job.floors`.

    Attributes:
        prompt: f.
        scope: What a pruning strategy without a scope of its own prunes.
    """

    has_objective: ClassVar[bool] = False

    prompt: Annotated[str, Field(min_length=1)] = "a photo of a dog"
    scope: UNetScope = "xattn"

    def erase(
        self, model: TextToImage, concept: Concept, pruning: Pruning, *, seed: int, checkpoint: Path | None = None
    ) -> Erasure:
        """See :class:`erasure.protocols.Eraser`."""
        [text] = model.encode_prompts([self.prompt])
        erasure = Erasure(Edit({}, {}, (ForeignText(text.detach().cpu()),)), [], 0)
        return prune_after(erasure, self, pruning, model, concept, scope=self.scope, seed=seed, checkpoint=checkpoint)
