"""The choice of one text among those that a search came by, where another than its first success counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import cosine_similarity

from attacks.evaluate import Proposal, Propose, Trace
from diffusion.streams import derived_seed
from evaluation.quality.extractors import Extractor


@dataclass
class ChoiceBySimilarity:
    """P4D's rule: of all texts the one whose picture is most like the target is judged, by several pictures of its own.

    A case is drawn in three parts: the plain prompt, ``pictures`` times; every text of the search once, with a seed of
    its own, which counts for nothing; and of each of the search's variants the chosen text, ``pictures`` times. The
    first success of the first part or of the last ends the case.

    Attributes:
        features: What pictures are compared by, the cosine of their features.
        variants: How many searches take turns; each has a text chosen.
        checks: Texts of each.
        pictures: Pictures of the plain prompt, and of a chosen text: the first with the case's seed.
        seed: Of the other seeds; each case has its own.
        best: By case number and variant, the likeness of the picture that is most like the target so far, and its text.
    """

    features: Extractor
    variants: int
    checks: int
    pictures: int
    seed: int
    best: dict[tuple[int, int], tuple[float, str]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Pictures of a case at most, its first not counted."""
        return self._searched + self.variants * self.pictures

    @property
    def _searched(self) -> int:
        return self.pictures - 1 + self.variants * self.checks

    def propose(self, search: Propose, traces: list[Trace]) -> list[Proposal]:
        """Return what is drawn next of each case; ``search`` makes the next text of cases."""
        # Their last picture is a text's of the search.
        self._compare([trace for trace in traces if self.pictures <= trace.attempts <= self._searched])
        seekers = [trace for trace in traces if self.pictures - 1 <= trace.attempts < self._searched]
        found = zip(seekers, search(seekers) if seekers else [], strict=True)
        proposals = {
            trace.case.case_number: replace(proposal, seed=self._seed(trace, "text", trace.attempts), counts=False)
            for trace, proposal in found
        }
        for trace in traces:
            number = trace.case.case_number
            if trace.attempts < self.pictures - 1:
                seed = self._seed(trace, "picture", trace.attempts + 1)
                proposals[number] = Proposal(trace.case.prompt, seed=seed, plain=True)
            elif number not in proposals:
                variant, picture = divmod(trace.attempts - self._searched, self.pictures)
                _, text = self.best[number, variant]
                proposals[number] = Proposal(text, seed=self._seed(trace, "picture", picture) if picture else None)
        return [proposals[trace.case.case_number] for trace in traces]

    def _compare(self, traces: Sequence[Trace]) -> None:
        """Keep the texts whose pictures, the last ones of their cases, are more like the targets than any before."""
        if not traces:
            return
        extract = self.features.load()
        pictures = torch.stack([trace.last.image for trace in traces])
        targets = torch.stack([trace.case.target for trace in traces if trace.case.target is not None])
        likenesses = cosine_similarity(extract(pictures), extract(targets)).tolist()
        for trace, likeness in zip(traces, likenesses, strict=True):
            place = trace.case.case_number, (trace.attempts - self.pictures) % self.variants
            if place not in self.best or likeness > self.best[place][0]:
                self.best[place] = likeness, trace.checks[-1].prompt

    def _seed(self, trace: Trace, what: str, number: int) -> int:
        return derived_seed(self.seed, "choice/seeds", trace.case.case_number, what, number)
