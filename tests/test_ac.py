"""Concept ablation against its formula, its exact cost, and its resumption."""

import pytest
import torch

from diffusion.training import step_generator
from erasure import finetuning
from erasure.concept import Concept
from erasure.erasers.ac import AC, ACObjective
from erasure.parameters import scope_parameters
from erasure.pruning.learned import Learned
from erasure.pruning.off import Off
from tests.oracles import ac as oracle

TEMPLATES = ("{}", "a church, {}")
CONCEPT = Concept(
    "van_gogh",
    "style",
    targets=("van gogh style", "by vincent"),
    anchor="a picture",
    templates=TEMPLATES,
    preserved=("a fish",),
)


def make(**changes):
    return AC(**{"steps": 4, "batch_size": 2, "images": 3, "sampling_steps": 2, **changes})


@torch.no_grad()
def test_loss_is_the_papers_formula(tiny_model64):
    objective = ACObjective(make())
    objective.prepare(tiny_model64, CONCEPT, scope="xattn_kv", steps=4, seed=3, checkpoint=None)
    for weight in scope_parameters(tiny_model64, "xattn").values():
        weight.mul_(1.2)

    for step in range(2):
        generator = step_generator(3, step)
        picks = torch.randint(3, (2,), generator=generator).tolist()
        timesteps = torch.randint(1000, (2,), generator=generator).tolist()
        noise = torch.randn((2, 4, 8, 8), generator=generator).double()
        rows = []
        for place, (pick, t) in enumerate(zip(picks, timesteps, strict=True)):
            phrases = [CONCEPT.targets[place % 2], CONCEPT.anchor]
            texts = [tiny_model64.encode([TEMPLATES[pick % 2].replace("{}", phrase)])[0] for phrase in phrases]
            rows.append((objective._pictures.latents[pick], noise[place], t, *texts))

        expected = oracle.loss(tiny_model64.unet, tiny_model64.alphas_cumprod.tolist(), rows)
        assert objective.loss(tiny_model64, step).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_reaches_the_target_prompts_prediction_only(tiny_model64):
    concept = Concept("same", "style", targets=("a picture",), anchor="a picture")
    objective = ACObjective(make())
    objective.prepare(tiny_model64, concept, scope="xattn_kv", steps=1, seed=0, checkpoint=None)

    with tiny_model64.trainable(list(scope_parameters(tiny_model64, "xattn_kv").values())):
        loss = objective.loss(tiny_model64, 0)

    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert loss.requires_grad


def test_cost_is_exactly_the_formulas(tiny_model):
    erasure = make().erase(tiny_model, CONCEPT, Off(), seed=0)

    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 3 * 2 * 2 + 4 * 2 * 2
    assert set(erasure.edit.entries) == set(scope_parameters(tiny_model, "xattn_kv"))


@pytest.mark.parametrize("pruning", [Off(), Learned(steps=4, scope=None)], ids=["off", "learned"])
def test_killed_training_resumes_to_the_same_edit_bit_for_bit(tiny_model, tmp_path, monkeypatch, pruning):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 2)
    eraser = make(retain_weight=0.5)
    undisturbed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1)
    loss = ACObjective.loss

    def dying_loss(self, model, step):
        if step == 3:
            raise RuntimeError("killed")
        return loss(self, model, step)

    monkeypatch.setattr(ACObjective, "loss", dying_loss)
    with pytest.raises(RuntimeError, match="killed"):
        eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")
    monkeypatch.setattr(ACObjective, "loss", loss)
    resumed = eraser.erase(tiny_model, CONCEPT, pruning, seed=1, checkpoint=tmp_path / "work")

    assert resumed.losses == undisturbed.losses
    assert resumed.unet_evaluations == undisturbed.unet_evaluations
    for name, entry in undisturbed.edit.entries.items():
        for part, tensor in entry.parts.items():
            assert torch.equal(tensor, resumed.edit.entries[name].parts[part])
