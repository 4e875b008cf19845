"""Free embeddings in each prompt: what a token attack could reach if it were not bound to a vocabulary."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from attacks.denoising import DenoisingAttack, DenoisingSearch
from attacks.evaluate import Proposal
from attacks.prompt_search import EmbeddingStart, first_embeddings
from attacks.tables import Space, Tables, Template
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import stream


@checked
class EmbeddingAttack(DenoisingAttack):
    """UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868) without a vocabulary: its upper bound, per prompt.

        minimise over e   E_{t, eps} || eps - eps_erased(x_t, t, text(prompt with e inserted)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   e: k free embeddings
    Each step is Adam's on e itself. The pictures are conditioned on the embeddings, for which there is no text, so
    success here says what the erased model still knows, not what a user could type.

    Attributes:
        initialization: e at the start: the ``mean`` of the vocabulary, or the rows of ``random`` tokens.
        learning_rate: Adam's step size.
        weight_decay: Added to the gradient as weight_decay * e.
        tables: Which tables the rows of e are like. With ``text`` T5 reads the tokens that are nearest to them.

    The others are those of :class:`attacks.denoising.DenoisingAttack`; ``exclude_special`` concerns the start alone.
    """

    initialization: EmbeddingStart = "mean"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    tables: Tables = "clip"

    def candidates(self, space: Space) -> Tensor:
        """Return the tokens of the start, int64 [candidates]."""
        return space.candidates(exclude_special=self.exclude_special)

    def start_stream(self, case_number: int, restart: int) -> torch.Generator:
        """See :class:`attacks.denoising.DenoisingAttack`."""
        return stream(self.seed, "embedding/start", case_number, restart)

    def search_stream(self, case_number: int, restart: int) -> torch.Generator:
        """See :class:`attacks.denoising.DenoisingAttack`."""
        return stream(self.seed, "embedding/search", case_number, restart)

    def start(self, table: Tensor, generator: torch.Generator, *, restarted: bool) -> Tensor:
        """Return the first e, float64 [k, width]."""
        return first_embeddings(table, self.tokens, "random" if restarted else self.initialization, generator)

    def embed(self, variables: Tensor, table: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return e as the model takes it."""
        return variables.to(table.dtype)

    def pull_back(self, gradient: Tensor, table: Tensor) -> Tensor:
        """Return the gradient as it is."""
        return gradient.double()

    def proposals(
        self, model: TextToImage, searches: Sequence[DenoisingSearch], template: Template, candidates: Tensor
    ) -> list[Proposal]:
        """Encode each prompt with its e."""
        embeddings = torch.stack([state.variables for state in searches])
        texts = template.encode_detached(model, embeddings)
        return [
            Proposal(state.case.prompt, text=text, variant=f"embeddings after {state.steps} steps")
            for state, text in zip(searches, texts, strict=True)
        ]
