"""Numbers of short runs on the canvas: what no change of the code's structure may change.

``python -m tests.pinned`` prints them as they are now; ``tests/data/pinned_canvas.json`` keeps them.
"""

import json
from typing import Any

import torch
from hydra.utils import instantiate
from torch.nn import functional

from attacks.p4d import P4D
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.loading import load_model
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from erasure.concept import Concept
from erasure.pruning.off import Off
from tests.attack_cases import make_cases
from tests.judges import one_in
from tests.tiny_job import method_config

PROMPTS = ("a church in the style of Van Gogh", "a garbage truck at night", "")
ERASERS: dict[str, dict[str, Any]] = {
    "esd": {"steps": 3, "batch_size": 2, "sampling_steps": 4, "trajectories": 2, "retain_weight": 0.5},
    "ac": {
        **{"steps": 2, "batch_size": 2, "images": 2, "sampling_steps": 3, "cache": None},
        **{"prior_weight": 1.0, "retain_weight": 0.0},
    },
    "salun": {"steps": 2, "batch_size": 2, "images": 2, "retain_images": 2, "sampling_steps": 2},
    "uce": {},
}


@torch.backends.mkldnn.flags(enabled=True)
def measure() -> dict[str, Any]:
    """Losses, pictures and found tokens, as JSON values."""
    torch.set_num_threads(1)
    model = load_model("canvas", device="cpu")
    return {
        "prediction": _prediction(model),
        **{f"picture/{scheduler}": _pictures(scheduler) for scheduler in ("ddim", "pndm")},
        **{eraser: _erased(model, eraser, settings) for eraser, settings in ERASERS.items()},
        "unlearndiff": _found(model, UnlearnDiffAtk(tokens=2, timesteps=2, steps_per_timestep=3, readable=True)),
        "p4d": _found(model, P4D(tokens=3, checks=2, steps_per_check=3, readable=True, **_CHOICE)),
    }


_CHOICE: dict[str, Any] = {"choice": "first", "pictures": 1, "features": None}


def _concept() -> Concept:
    phrases = {"targets": ("Van Gogh",), "anchor": "a painter", "preserved": ("Monet", "a church")}
    return Concept(name="Van Gogh", kind="style", templates=("a fish by {}",), **phrases)


def _summary(tensor: torch.Tensor) -> list[float]:
    """A tensor's mean, root mean square and first numbers."""
    flat = tensor.detach().double().flatten()
    return [float(flat.mean()), float(flat.square().mean().sqrt()), *flat[:3].tolist()]


def _prediction(model: TextToImage) -> list[float]:
    latents = model.initial_latents([1, 2, 3])
    timesteps = torch.tensor([0, 500, 999])
    noisy = model.add_noise(latents, latents.flip(0), timesteps)
    return _summary(model.predict(noisy, timesteps, model.encode(PROMPTS)))


def _pictures(scheduler: Any) -> list[list[float]]:
    """Mean colours of four parts of each picture."""
    model = load_model("canvas", device="cpu", scheduler=scheduler)
    images = model.generate(PROMPTS, seeds=[1, 2, 3], steps=3, guidance=[6.0, 1.0, 3.0])
    return functional.adaptive_avg_pool2d(images.double(), 2).flatten(1).tolist()  # type: ignore[no-any-return]


def _erased(model: TextToImage, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    eraser = instantiate(method_config("eraser", name, store="unused"), **settings)
    erasure = eraser.erase(model, _concept(), Off(), seed=3)
    before = model.unet_evaluations
    with erasure.edit.applied(model):
        model.sample(model.encode(PROMPTS), seeds=[1, 2, 3], steps=2, guidance=3.0)
        prediction = _prediction(model)
    return {
        "losses": erasure.losses,
        "evaluations": [erasure.unet_evaluations, model.unet_evaluations - before],
        "prediction": prediction,
    }


def _found(model: TextToImage, attack: UnlearnDiffAtk | P4D) -> list[Any]:
    cases = make_cases(model, ("a church", "two blue fish"))
    more = {"original": model} if isinstance(attack, P4D) else {}
    outcomes = list(attack.run(model, cases, one_in(10**9), sampling=Sampling(steps=2), **more))
    return [
        [outcome.case_number, outcome.adversarial_prompt, outcome.unet_evaluations, [c.loss for c in outcome.checks]]
        for outcome in sorted(outcomes, key=lambda outcome: outcome.case_number)
    ]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
