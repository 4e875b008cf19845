"""What saves memory changes no gradient, no picture and no weight."""

import pytest
import torch
from torch import Tensor, nn

from diffusion.memory import checkpoint_activations, visiting
from diffusion.model import TextToImage
from diffusion.parameters import substituted
from diffusion.training import fit

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def noise_loss(model: TextToImage) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *model.latent_shape), generator=generator).to(model.dtype)
    return model.predict(latents, 500, model.encode(["a church", "a tench"])).square().sum()


def gradients(model: TextToImage) -> list[Tensor]:
    with model.trainable(list(model.network.parameters())):
        return list(torch.autograd.grad(noise_loss(model), list(model.network.parameters()), materialize_grads=True))


def test_checkpointed_blocks_give_the_same_gradients(tiny_model64: TextToImage) -> None:
    plain = gradients(tiny_model64)
    checkpoint_activations(tiny_model64.network)
    calls: list[int] = []
    resnet = tiny_model64.network.down_blocks[0].resnets[0].conv1
    forward = resnet.forward
    resnet.forward = lambda *arguments: calls.append(1) or forward(*arguments)
    for one, other in zip(gradients(tiny_model64), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2


def test_stand_ins_for_parameters_count_when_activations_are_computed_again(tiny_model64: TextToImage) -> None:
    def gradient() -> Tensor:
        stand_in = (2 * tiny_model64.network.get_parameter(LAYER).detach()).requires_grad_()
        with substituted(tiny_model64, {LAYER: stand_in}):
            loss = noise_loss(tiny_model64)
        (result,) = torch.autograd.grad(loss, stand_in)
        return result

    plain = gradient()
    checkpoint_activations(tiny_model64.network)
    torch.testing.assert_close(gradient(), plain, rtol=1e-12, atol=1e-12)


def test_blocks_with_hooks_keep_their_activations(tiny_model64: TextToImage) -> None:
    """A hook that has changed its mind by the time of the backward pass must not be asked again."""
    layer = tiny_model64.network.get_submodule(LAYER.removesuffix(".weight"))

    def gradient() -> Tensor:
        scales = iter([3.0, 5.0])
        hook = layer.register_forward_hook(lambda _, __, output: next(scales) * output)
        with tiny_model64.trainable([layer.weight]):
            (result,) = torch.autograd.grad(noise_loss(tiny_model64), layer.weight)
        hook.remove()
        return result

    plain = gradient()
    checkpoint_activations(tiny_model64.network)
    torch.testing.assert_close(gradient(), plain, rtol=1e-12, atol=1e-12)


def test_a_visitor_goes_home_whatever_happens() -> None:
    part = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), visiting(part, torch.device("meta")):
        assert part.weight.device.type == "meta"
        raise RuntimeError


def test_the_vae_is_on_the_models_device_only_while_it_is_used(
    tiny_model: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    to = tiny_model.vae.to
    monkeypatch.setattr(tiny_model.vae, "to", lambda device: moves.append(str(device)) or to(device))
    latents = tiny_model.initial_latents([0])
    kept = tiny_model.decode(latents)
    assert not moves
    tiny_model.autoencoder.offload = True
    assert torch.equal(tiny_model.decode(latents), kept)
    tiny_model.encode_images(kept)
    assert moves == ["cpu"] * 4


def test_a_scaled_loss_trains_alike_and_resumes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("scaled")

    def train(scaler: torch.amp.GradScaler | None, *, steps: int, checkpoint: bool = False) -> Tensor:
        weight = torch.full((3,), 2.0, requires_grad=True)
        fit(
            [weight],
            lambda step: (weight * (step + 1)).square().mean(),
            steps=steps,
            optimizer=torch.optim.SGD([weight], lr=0.01),
            label="test",
            clip_norm=0.5,
            scaler=scaler,
            checkpoint=folder / "state" if checkpoint else None,
            checkpoint_every=2,
        )
        return weight.detach()

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    plain = train(None, steps=5)
    torch.testing.assert_close(train(scaler(), steps=5), plain)
    train(scaler(), steps=3, checkpoint=True)
    assert (folder / "state").exists()
    torch.testing.assert_close(train(scaler(), steps=5, checkpoint=True), plain)
