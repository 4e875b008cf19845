"""UnlearnDiffAtk: tokens that make the erased model denoise a picture of the erased concept."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attacks.denoising import DenoisingAttack, DenoisingSearch
from attacks.evaluate import Proposal
from attacks.prompt_search import one_hot_gradient, project_to_simplex
from attacks.tables import Space, Template, proposals_of
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.streams import stream


@checked
class UnlearnDiffAtk(DenoisingAttack):
    """UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868).

    The erased model is itself a classifier: a prompt names the concept if it helps to denoise a picture x0 of it.
        minimise over P   E_{t, eps} || eps - eps_erased(x_t, t, text(prompt with tokens ~ P inserted)) ||^2
        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   P: k rows on the probability simplex over the vocabulary
    Each step draws a token per row, passes the gradient of its one-hot vector straight through to P, clipped to
    [-1, 1], takes an Adam step and projects P back on the simplex. After ``steps_per_timestep`` steps the most probable
    tokens are read as text, which is tokenised anew, drawn and judged; the first success ends the search. A prompt
    that succeeds as it stands is not attacked. The unedited model takes part only through x0.

    Attributes:
        initialization: Rows of P at the start: ``uniform``, or ``random`` (projected uniform numbers).
        readable: Keep to tokens whose text is read back as the same token, so that what is judged is what was found.
            The published code takes all; of SD's vocabulary most are words, of the canvas's only half.

    The others are those of :class:`attacks.denoising.DenoisingAttack`. The published code samples special tokens too,
    but they are lost when the tokens become text (``exclude_special``).
    """

    initialization: Literal["uniform", "random"] = "uniform"
    readable: bool = False

    def candidates(self, space: Space) -> Tensor:
        """Return the tokens that may be inserted, int64 [candidates]."""
        return space.candidates(exclude_special=self.exclude_special, readable=self.readable)

    def start_stream(self, case_number: int, restart: int) -> torch.Generator:
        """See :class:`attacks.denoising.DenoisingAttack`."""
        return stream(self.seed, "unlearndiff/start", case_number, restart)

    def search_stream(self, case_number: int, restart: int) -> torch.Generator:
        """See :class:`attacks.denoising.DenoisingAttack`."""
        return stream(self.seed, "unlearndiff/search", case_number, restart)

    def start(self, table: Tensor, generator: torch.Generator, *, restarted: bool) -> Tensor:
        """Return the first P, float64 [k, candidates]."""
        shape = (self.tokens, len(table))
        if restarted or self.initialization == "random":
            return project_to_simplex(torch.rand(shape, generator=generator, dtype=torch.float64))
        return torch.full(shape, 1 / len(table), dtype=torch.float64)

    def embed(self, variables: Tensor, table: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw a token per row of P; their embeddings, float [n, k, width]."""
        shape = variables.shape[1:]
        race = [torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) for generator in generators]
        return table[draw_tokens(variables, torch.stack(race).to(variables.device))]

    def pull_back(self, gradient: Tensor, table: Tensor) -> Tensor:
        """Return the gradient of the one-hot rows for P."""
        return straight_through_gradient(gradient, table)

    def constrain(self, variables: Tensor) -> Tensor:
        """Project P on the simplex."""
        return project_to_simplex(variables)

    def proposals(
        self, model: TextToImage, searches: Sequence[DenoisingSearch], template: Template, candidates: Tensor
    ) -> list[Proposal]:
        """Read the most probable tokens as text."""
        tokens = candidates[torch.stack([state.variables for state in searches]).argmax(dim=-1)]
        return proposals_of(model, template, tokens)


def draw_tokens(probabilities: Tensor, race: Tensor) -> Tensor:
    """Draw one token per row of ``probabilities``, float [..., candidates]; int64 [...].

    Each token runs for an exponential time at the rate of its probability, and the first to arrive is drawn. Unlike
    with a search in the cumulative sums, a small change of one token's probability can only change the draw to or from
    that token, so rounding hardly ever changes it.

    Args:
        probabilities: Any positive multiple of a distribution.
        race: Unit exponentials of the same shape.
    """
    return (probabilities / race).argmax(dim=-1)


def straight_through_gradient(gradient: Tensor, table: Tensor) -> Tensor:
    """Clip the gradient with respect to the one-hot rows to [-1, 1]; the simplex rows receive it instead.

    Args:
        gradient: float [n, k, width], with respect to the rows' embeddings.
        table: float [candidates, width], the embeddings of the candidates.

    Returns:
        float64 [n, k, candidates].
    """
    return one_hot_gradient(gradient, table).clamp(-1, 1).double()
