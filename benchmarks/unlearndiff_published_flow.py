"""UnlearnDiffAtk on many prompts in one batch against the published control flow. Prints one line of JSON.

The published flow is that of :mod:`published_flow`; at each step it multiplies one-hot rows with the vocabulary, takes
Adam's step in float32 and projects row after row by bisection. Both make the same draws. Our projection is exact and
the published one is not, which changes a drawn token now and then; the searches on such a prompt go apart from there.
"""

import torch
from published_flow import PublishedFlow, Setting, Tried, bisect_rows, compare, make_parser
from torch.nn import functional

from attacks.cases import PromptCase
from attacks.prompt_search import middle_timestep, target_latents
from attacks.tables import space_of
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.streams import stream


def main() -> None:
    """Time both and compare the outcomes."""
    parser = make_parser(__doc__, prompts=24)
    parser.add_argument("--timesteps", type=int, default=5)
    parser.add_argument("--steps-per-timestep", type=int, default=10)
    parser.add_argument("--sampling-steps", type=int, default=20)
    arguments = parser.parse_args()
    setting = Setting.prepare(arguments)
    search = UnlearnDiffAtk(
        timesteps=arguments.timesteps,
        steps_per_timestep=arguments.steps_per_timestep,
        learning_rate=0.1,
        batch_size=len(setting.cases),
    )
    published = PublishedUnlearnDiffAtk(setting, search)
    compare(
        "unlearndiff_published_flow",
        arguments,
        setting,
        lambda: search.run(setting.model, setting.cases, setting.judge, sampling=setting.sampling),
        published.attack,
    )


class PublishedUnlearnDiffAtk:
    """The search on one prompt after another.

    Args:
        setting: Whom to attack.
        search: With which settings.
    """

    def __init__(self, setting: Setting, search: UnlearnDiffAtk) -> None:
        self.model, self.search, self.flow = setting.model, search, PublishedFlow(setting)
        self.candidates = search.candidates(space_of(setting.model, search.tables))
        self.table = setting.model.vocabulary[self.candidates]

    def attack(self, case: PromptCase) -> Tried:
        """Try text after text until one succeeds."""
        model, search, flow, size = self.model, self.search, self.flow, len(self.candidates)
        tried = [case.prompt]
        if flow.succeeds(case, case.prompt):
            return tried, True
        generator = stream(search.seed, "unlearndiff/search", case.case_number, 0)
        target, rows = target_latents(model, [case]), flow.embed(case.prompt)
        first = bisect_rows(torch.full((search.tokens, size), 1 / size, device=model.device))
        probabilities = first.requires_grad_()
        optimizer = torch.optim.Adam([probabilities], lr=search.learning_rate, weight_decay=search.weight_decay)
        for check in range(search.timesteps):
            timestep = middle_timestep(model, check, search.timesteps)
            total = 0.0
            for _ in range(search.steps_per_timestep):
                # torch.multinomial by hand: it runs the same race, of float32 numbers.
                race = torch.empty(probabilities.shape, dtype=torch.float64).exponential_(generator=generator)
                drawn = (probabilities.detach() / race.to(model.device)).argmax(dim=-1)
                one_hot = functional.one_hot(drawn, size).to(model.dtype).requires_grad_()
                noise = torch.randn(model.latent_shape, generator=generator)[None].to(model.device, model.dtype)
                text = flow.encode(case.prompt, rows, one_hot @ self.table)
                prediction = model.predict(model.add_noise(target, noise, timestep), timestep, text)
                loss = functional.mse_loss(prediction, noise)
                (gradient,) = torch.autograd.grad(loss, one_hot)
                probabilities.grad = functional.hardtanh(gradient)
                optimizer.step()
                probabilities.data = bisect_rows(probabilities.detach())
                total += loss.item()
            tried.append(flow.read(case.prompt, self.candidates[probabilities.argmax(dim=-1)]))
            if flow.succeeds(case, tried[-1]):
                return tried, True
        return tried, False


if __name__ == "__main__":
    main()
