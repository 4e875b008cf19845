"""P4D on many prompts in one batch against the published control flow. Prints one line of JSON.

The published flow (Diffusion-MU-Attack's P4D, written anew here) takes one prompt at a time; at each step it encodes
the plain prompt and asks the unedited model again, and compares every embedding with the whole vocabulary, vector by
vector; the conditional and the unconditional half of a picture go through the U-Net one after the other. Both make the
same draws, so the texts should agree as far as rounding allows.

The edited model is the model with noise on its cross-attention. The verdict is whether a picture is bright, so that no
judge has to be loaded and the searches end at different checks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional
from unlearndiff_batching import BrightnessJudge, load_cases, texts

from attacks.cases import PromptCase
from attacks.p4d import INITIAL_STREAM, P4D
from attacks.prompt_search import PromptTemplate, candidate_tokens, middle_timestep
from diffusion.allocator import keep_freed_memory
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.training import step_generator
from erasure.edit import Edit
from erasure.parameters import scope_parameters


def main() -> None:
    """Time both and compare the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("diffusion/canvas/weights"), help="a diffusers folder")
    parser.add_argument("--csv", type=Path, default=Path("prompts/canvas/van_gogh.csv"), help="a prompt set")
    parser.add_argument("--prompts", type=int, default=32, help="how many of its prompts")
    parser.add_argument("--checks", type=int, default=5)
    parser.add_argument("--steps-per-check", type=int, default=10)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    model = TextToImage(StableDiffusionPipeline.from_pretrained(arguments.model).to(arguments.device))
    sampling = Sampling(steps=arguments.sampling_steps)
    cases = load_cases(model, arguments.csv, arguments.prompts, sampling)
    judge = BrightnessJudge(torch.stack([case.target for case in cases if case.target is not None]))
    original = edit(model)
    search = P4D(
        variant="insert",
        tokens=3,
        checks=arguments.checks,
        steps_per_check=arguments.steps_per_check,
        schedule="even",
        optimizer="adam",
        batch_size=len(cases),
    )

    started = time.perf_counter()
    outcomes = search.run(model, cases, judge, sampling=sampling, original=original)
    ours = {outcome.case_number: (texts(outcome), outcome.success) for outcome in outcomes}
    our_seconds = time.perf_counter() - started
    started = time.perf_counter()
    flow = PublishedFlow(model, original, search, judge, sampling)
    theirs = {case.case_number: flow.attack(case) for case in cases}
    their_seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "benchmark": "p4d_batching",
                "ratio": their_seconds / our_seconds,
                "seconds_published_flow": their_seconds,
                "seconds_ours": our_seconds,
                "prompts": len(cases),
                "checks_published_flow": sum(len(tried) for tried, _ in theirs.values()),
                "checks_ours": sum(len(tried) for tried, _ in ours.values()),
                "same_success": sum(ours[number][1] == success for number, (_, success) in theirs.items()),
                "same_texts": sum(ours[number][0] == tried for number, (tried, _) in theirs.items()),
                "device": arguments.device,
                "threads": arguments.threads,
            }
        )
    )


def edit(model: TextToImage) -> TextToImage:
    """Add noise to the cross-attention and return the unedited model."""
    generator = torch.Generator().manual_seed(0)
    before = scope_parameters(model, "xattn")
    noise = {name: torch.randn(value.shape, generator=generator).to(value.device) for name, value in before.items()}
    change = Edit.from_weights(
        before, {name: value + 0.5 * value.std() * noise[name] for name, value in before.items()}
    )
    change.apply(model)
    return change.unedited(model)


class PublishedFlow:
    """The search on one prompt after another.

    Args:
        model: The edited model.
        original: The unedited one.
        search: Its settings.
        judge: Ends a search.
        sampling: How pictures are sampled.
    """

    def __init__(
        self, model: TextToImage, original: TextToImage, search: P4D, judge: BrightnessJudge, sampling: Sampling
    ) -> None:
        self.model, self.original, self.search = model, original, search
        self.judge, self.sampling = judge, sampling
        self.candidates = candidate_tokens(model)
        self.table = model.vocabulary[self.candidates]

    def attack(self, case: PromptCase) -> tuple[list[str], bool]:
        """Try text after text until one succeeds; return all of them, the plain prompt first, and whether one did."""
        tried = [case.prompt]
        if self._succeeds(case, case.prompt):
            return tried, True
        model, search, steps = self.model, self.search, self.search.steps_per_check
        first = step_generator(search.seed + INITIAL_STREAM, case.case_number)
        generator = step_generator(search.seed, case.case_number)
        drawn = torch.randint(len(self.candidates), (search.tokens,), generator=first)
        embeddings = self.table[drawn.to(model.device)].clone().requires_grad_()
        optimizer = torch.optim.Adam([embeddings], lr=search.learning_rate, weight_decay=search.weight_decay)
        target = self.original.encode_images(case.target[None])  # type: ignore[index]
        for check in range(search.checks):
            timestep = middle_timestep(model, check, search.checks)
            noises = torch.randn((steps, *model.latent_shape), generator=generator).to(model.device, model.dtype)
            for noise in noises:
                noisy = self.original.add_noise(target, noise[None], timestep)
                reference = self.original.predict_noise(noisy, timestep, self.original.encode([case.prompt]))
                projected = self.table[self._nearest(embeddings)].detach().requires_grad_()
                prediction = model.predict_noise(noisy, timestep, self._encode(case.prompt, projected))
                (embeddings.grad,) = torch.autograd.grad(functional.mse_loss(prediction, reference), projected)
                optimizer.step()
            template = PromptTemplate.insert(model, [case.prompt], search.tokens, search.insertion)
            tried += template.texts(model, self.candidates[self._nearest(embeddings)][None])
            if self._succeeds(case, tried[-1]):
                return tried, True
        return tried, False

    def _nearest(self, embeddings: Tensor) -> Tensor:
        """Compare each embedding with each row of the vocabulary."""
        return functional.cosine_similarity(embeddings.detach()[:, None], self.table[None], dim=-1).argmax(dim=-1)

    def _encode(self, prompt: str, projected: Tensor) -> Tensor:
        """Multiply the prompt's one-hot rows with the vocabulary, put the tokens before them and encode them."""
        model = self.model
        one_hot = functional.one_hot(model.tokenize([prompt])[0], len(model.vocabulary)).to(model.dtype)
        rows = one_hot @ model.vocabulary
        spliced = torch.cat([rows[:1], projected, rows[1 : len(rows) - len(projected)]])
        ends = PromptTemplate.insert(model, [prompt], len(projected), "prefix_k").ends
        return model.encode_embeddings(spliced[None], ends)

    @torch.no_grad()
    def _succeeds(self, case: PromptCase, text: str) -> bool:
        """Draw and judge one picture, with two passes of the U-Net in each step."""
        model = self.model
        conditional, unconditional = model.encode([text]), model.encode([""])
        scheduler = model.make_scheduler(self.sampling.steps)
        latents = model.initial_latents([case.seed])
        for timestep in scheduler.timesteps:
            without = model.predict_noise(latents, timestep, unconditional)
            noise = without + case.guidance * (model.predict_noise(latents, timestep, conditional) - without)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        return bool(self.judge(model.decode(latents)).present[0])


if __name__ == "__main__":
    main()
