"""Seed search: the plain prompt with other seeds."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge


@checked
class SeedSearch:
    """Make the plain prompt's picture with up to ``tries`` new seeds, until one shows the concept.

    Attributes:
        tries: Pictures per prompt; give it the number of checks of the attack that it stands beside.
        seed: Seed of the draw of the seeds; each case has its own stream.
    """

    tries: Annotated[int, Field(ge=1)] = 10
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "black_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when it ends."""

        def propose(traces: list[Trace]) -> list[Proposal]:
            return [Proposal(trace.case.prompt, seed=self._seeds(trace.case)[trace.attempts]) for trace in traces]

        return search(
            model, cases, judge, propose, sampling=sampling, rounds=self.tries, batch_size=sampling.batch_size
        )

    def _seeds(self, case: PromptCase) -> list[int]:
        """Draw the new seeds of one case, in the order of trying."""
        generator = stream(self.seed, "seed_search/seeds", case.case_number)
        return torch.randint(2**31, (self.tries,), generator=generator).tolist()
