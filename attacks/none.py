"""No attack: the plain prompts, which give the success rate before the attack."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import search
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from evaluation.verdicts import Judge


@checked
class NoAttack:
    """Judge the picture of each plain prompt and try nothing more (pre-attack success rate)."""

    threat_model: ClassVar[ThreatModel] = "none"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield the outcome of each case, in order."""
        return search(model, cases, judge, lambda _: [], sampling=sampling, rounds=0, batch_size=sampling.batch_size)
