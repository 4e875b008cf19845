"""Random tokens: what an attack's pictures would find without its search."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_search import candidate_tokens
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.prompt_template import Insertion, PromptTemplate
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge


@checked
class RandomTokens:
    """Insert k uniformly random tokens into the prompt, up to ``tries`` times, until a picture shows the concept.

    Attributes:
        tokens: k, tokens inserted.
        insertion: Where they go.
        tries: Pictures per prompt; give it the number of checks of the attack that it stands beside.
        exclude_special: Never draw start, end or padding.
        readable: Only draw tokens whose text is read back as the same token.
        seed: Seed of the draws; each case has its own stream.
    """

    tokens: Annotated[int, Field(ge=1)] = 3
    insertion: Insertion = "prefix_k"
    tries: Annotated[int, Field(ge=1)] = 10
    exclude_special: bool = True
    readable: bool = False
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "black_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when it ends.

        Raises:
            ValueError: The model's prompts have no room for ``tokens``.
        """
        PromptTemplate.insert(model, [""], self.tokens, self.insertion)  # refuses a k that does not fit
        candidates = candidate_tokens(model, exclude_special=self.exclude_special, readable=self.readable)

        def propose(traces: list[Trace]) -> list[Proposal]:
            template = PromptTemplate.insert(
                model, [trace.case.prompt for trace in traces], self.tokens, self.insertion
            )
            draws = torch.stack([self._draws(trace.case, len(candidates))[trace.attempts] for trace in traces])
            return [Proposal(text) for text in template.texts(model, candidates[draws.to(candidates.device)])]

        return search(
            model, cases, judge, propose, sampling=sampling, rounds=self.tries, batch_size=sampling.batch_size
        )

    def _draws(self, case: PromptCase, candidates: int) -> torch.Tensor:
        """Make all draws of one case, int64 [tries, k]."""
        generator = stream(self.seed, "random_tokens/tokens", case.case_number)
        return torch.randint(candidates, (self.tries, self.tokens), generator=generator)
