"""P4D on many prompts in one batch against the published control flow. Prints one line of JSON.

The published flow is that of :mod:`published_flow`, with Diffusion-MU-Attack's P4D; at each step it encodes the plain
prompt and asks the unedited model again, and compares every embedding with the whole vocabulary, vector by vector. Both
make the same draws, so the texts should agree as far as rounding allows.
"""

from typing import get_args

import torch
from published_flow import PublishedFlow, Setting, Tried, compare, make_parser
from torch import Tensor
from torch.nn import functional

from attacks.cases import PromptCase
from attacks.p4d import P4D, Variant
from attacks.prompt_search import candidate_tokens, middle_timestep, random_rows, target_latents
from diffusion.streams import stream


def main() -> None:
    """Time both and compare the outcomes."""
    parser = make_parser(__doc__, prompts=24)
    parser.add_argument("--checks", type=int, default=5)
    parser.add_argument("--steps-per-check", type=int, default=10)
    parser.add_argument("--sampling-steps", type=int, default=20)
    arguments = parser.parse_args()
    setting = Setting.prepare(arguments)
    search = P4D(
        variant="insert",
        tokens=3,
        checks=arguments.checks,
        steps_per_check=arguments.steps_per_check,
        schedule="even",
        optimizer="adam",
        batch_size=len(setting.cases),
    )
    published = PublishedP4D(setting, search)
    compare(
        "p4d_published_flow",
        arguments,
        setting,
        lambda: search.run(
            setting.model, setting.cases, setting.judge, sampling=setting.sampling, original=setting.original
        ),
        published.attack,
    )


class PublishedP4D:
    """The search on one prompt after another.

    Args:
        setting: Whom to attack.
        search: With which settings.
    """

    def __init__(self, setting: Setting, search: P4D) -> None:
        self.model, self.original, self.search = setting.model, setting.original, search
        self.flow = PublishedFlow(setting)
        self.candidates = candidate_tokens(setting.model)
        self.table = setting.model.vocabulary[self.candidates]

    def attack(self, case: PromptCase) -> Tried:
        """Try text after text until one succeeds."""
        model, original, search, flow = self.model, self.original, self.search, self.flow
        tried = [case.prompt]
        if flow.succeeds(case, case.prompt):
            return tried, True
        first = stream(search.seed, "p4d/start", case.case_number, get_args(Variant).index(search.variant))
        generator = stream(search.seed, "p4d/search", case.case_number)
        embeddings = random_rows(self.table, search.tokens, first).requires_grad_()
        optimizer = torch.optim.Adam([embeddings], lr=search.learning_rate, weight_decay=search.weight_decay)
        target, rows = target_latents(original, [case]), flow.embed(case.prompt)
        for check in range(search.checks):
            timestep = middle_timestep(model, check, search.checks)
            shape = (search.steps_per_check, 1, *model.latent_shape)
            total = 0.0
            for noise in torch.randn(shape, generator=generator).to(model.device, model.dtype):
                projected = self.table[self._nearest(embeddings)].requires_grad_()
                noisy = original.add_noise(target, noise, timestep)
                text = flow.encode(case.prompt, rows, projected)
                prediction = model.predict(noisy, timestep, text)
                reference = original.predict(noisy, timestep, flow.encode(case.prompt, rows))
                loss = functional.mse_loss(prediction, reference)
                (embeddings.grad,) = torch.autograd.grad(loss, projected)
                optimizer.step()
                total += loss.item()
            tried.append(flow.read(case.prompt, self.candidates[self._nearest(embeddings)]))
            if flow.succeeds(case, tried[-1]):
                return tried, True
        return tried, False

    def _nearest(self, embeddings: Tensor) -> Tensor:
        """Compare each embedding with each row of the vocabulary; int64 [k]."""
        rows, table = (functional.normalize(values, dim=-1) for values in (embeddings.detach(), self.table))
        return functional.cosine_similarity(rows[:, None], table[None], dim=-1).argmax(dim=-1)


if __name__ == "__main__":
    main()
