"""SparseGPT against its formula, on matrices and on a model's own inputs."""

from dataclasses import fields, replace

import pytest
import torch
from hydra.utils import instantiate

from diffusion.parameters import named_parameters
from diffusion.streams import stream
from erasure.concept import Concept
from erasure.erasers.none import NoEraser
from erasure.erasers.uce import UCE
from erasure.pictures import Painting
from erasure.pruning.calibration import input_products
from erasure.pruning.masks import Sparsity, maskable_parameters
from erasure.pruning.off import Off
from erasure.pruning.sparsegpt import SparseGPT
from tests.erasures import assert_same_erasure
from tests.oracles import scored_pruning
from tests.oracles import sparsegpt as oracle
from tests.tiny_job import method_config

CONCEPT = Concept("van_gogh", "style", targets=("van gogh style",), anchor="a picture", preserved=("a photo", "a fish"))
SHORT = SparseGPT(Sparsity(0.5, "layer"), pictures=2, sampling_steps=3, guidance=2.0)


def correlated(columns, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    return values @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("fraction", "per", "block"),
    [("0.5", "layer", 16), ("0.3", "row", 16), ("0.5", 4, 16), ("0.5", 4, 18), ("0.7", "layer", 128), ("0", "row", 8)],
)
def test_a_matrix_is_pruned_by_the_formula(fraction, per, block):
    inputs = correlated(40, 30)
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    after, kept = SparseGPT(Sparsity(float(fraction), per), block_size=block).pruned(weight, inputs.T @ inputs)

    expected = oracle.pruned(weight, 2 * inputs.T @ inputs / 30, fraction, per, block, 0.01)
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(after == 0, expected == 0)
    assert torch.equal(after == 0, ~kept)


def test_what_is_left_makes_up_for_what_is_pruned():
    inputs = correlated(64, 200)
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    after, kept = SHORT.pruned(weight, inputs.T @ inputs)

    assert ((after - weight) @ inputs.T).norm() < 0.85 * ((weight * kept - weight) @ inputs.T).norm()


def test_a_layer_that_meets_nothing_but_zeros_is_pruned_by_size():
    after, _ = SHORT.pruned(torch.tensor([[1.0, -3.0, 2.0, 4.0]]).double(), torch.zeros(4, 4).double())

    assert after.tolist() == [[0, -3, 0, 4]]


@pytest.mark.parametrize(("fraction", "per"), [("0.5", "layer"), ("0.25", "row"), ("0.5", 4)])
def test_the_models_layers_are_pruned_by_the_formula_on_its_own_inputs(tiny_model64, fraction, per):
    model = tiny_model64
    names = {
        "linear": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight",
        "text": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "kernel": "down_blocks.0.downsamplers.0.conv.weight",
        "first": "conv_in.weight",
    }
    base = {name: model.network.get_parameter(name).detach().clone() for name in names.values()}
    layers = [name.rpartition(".")[0] for name in base]
    with torch.no_grad():
        records = scored_pruning.recorded_steps(
            model.network,
            layers,
            model.process.alphas.double().tolist(),
            model.sampling_timesteps(3).tolist(),
            3,
            [
                (seed, model.encode_prompts([prompt])[0])
                for seed, prompt in zip(
                    torch.randint(2**31, (2,), generator=stream(4, "painting/seeds")).tolist(),
                    CONCEPT.preserved,
                    strict=True,
                )
            ],
            model.encode_prompts([""])[0],
            2.0,
            model.latent_shape,
        )

    strategy = replace(SHORT, sparsity=Sparsity(float(fraction), per), block_size=24)
    text = model.encode_prompts(list(CONCEPT.preserved))
    products, spent = input_products(
        model,
        {name: model.network.get_parameter(name) for name in base},
        text,
        Painting(2, 3, 2.0, 1),
        seed=4,
        checkpoint=None,
    )

    assert spent == 2 * 3 * 2
    for name, weight in base.items():
        recorded = [inputs for record in records for inputs in record[name.rpartition(".")[0]]]
        stride = model.network.get_submodule(name.rpartition(".")[0]).stride[0] if weight.ndim == 4 else None
        met = [
            row
            for inputs in recorded
            for row in (
                inputs[0].tolist() if stride is None else oracle.inputs_of_kernel(inputs[0], weight.shape[-1], stride)
            )
        ]
        inputs = torch.tensor(met, dtype=torch.float64)
        matrix = weight.movedim(1, -1).flatten(1)
        expected = oracle.pruned(matrix, 2 * inputs.T @ inputs / len(inputs), fraction, per, 24, 0.01)
        after, kept = strategy.pruned(matrix, products[name])
        assert torch.equal(after == 0, expected == 0)
        assert torch.equal(~kept, expected == 0)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scope", ["xattn_ffn", "linear_conv"])
def test_pruned_weights_are_exactly_zero_and_others_change_in_the_scope_alone(tiny_model, scope):
    base = {name: weight.detach().clone() for name, weight in named_parameters(tiny_model).items()}

    erasure = NoEraser().erase(tiny_model, CONCEPT, replace(SHORT, scope=scope), seed=0)

    assert all(torch.equal(weight, base[name]) for name, weight in named_parameters(tiny_model).items())
    assert not any(module._forward_pre_hooks for module in tiny_model.network.modules())
    assert erasure.unet_evaluations == tiny_model.unet_evaluations == 2 * 3 * 2
    maskable = set(maskable_parameters(tiny_model, scope))
    zeros = 0
    with erasure.edit.applied(tiny_model):
        for name, weight in named_parameters(tiny_model).items():
            assert (name in maskable) != torch.equal(weight, base[name])
            if name in maskable:
                assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
                zeros += int((weight == 0).sum())
    assert zeros == erasure.edit.metadata["pruned_weights"]
    assert erasure.edit.metadata["maskable_weights"] == sum(base[name].numel() for name in maskable)


def test_two_of_four_leaves_two_of_every_four_input_channels(tiny_model):
    edit = NoEraser().erase(tiny_model, CONCEPT, replace(SHORT, sparsity=Sparsity(0.5, 4), scope="linear_conv"), seed=0)

    with edit.edit.applied(tiny_model):
        for weight in maskable_parameters(tiny_model, "linear_conv").values():
            assert (weight.movedim(1, -1).reshape(-1, 4).count_nonzero(dim=1) == 2).all()


def test_it_acts_on_the_erased_weights(tiny_model):
    erased = UCE().erase(tiny_model, CONCEPT, Off(), seed=0).edit
    with erased.applied(tiny_model):
        alone = SHORT.prune(tiny_model, CONCEPT, None, scope="xattn_kv", seed=0, checkpoint=None).edit

    both = UCE().erase(tiny_model, CONCEPT, SHORT, seed=0).edit

    with both.applied(tiny_model):
        for name, weight in maskable_parameters(tiny_model, "xattn_kv").items():
            assert torch.equal(weight, alone.entries[name].parts[""])


def test_results_do_not_depend_on_how_many_pictures_are_taken_at_a_time(tiny_model64):
    one, other = (
        replace(SHORT, sampling_batch_size=size).prune(
            tiny_model64, CONCEPT, None, scope="xattn", seed=0, checkpoint=None
        )
        for size in (1, 2)
    )

    for name, entry in one.edit.entries.items():
        torch.testing.assert_close(entry.parts[""], other.edit.entries[name].parts[""], rtol=1e-9, atol=1e-12)


def test_a_killed_run_takes_up_the_pictures_that_it_has(tiny_model, tmp_path):
    undisturbed = SHORT.prune(tiny_model, CONCEPT, None, scope="xattn", seed=0, checkpoint=tmp_path / "work")
    spent = tiny_model.unet_evaluations

    resumed = SHORT.prune(tiny_model, CONCEPT, None, scope="xattn", seed=0, checkpoint=tmp_path / "work")

    assert tiny_model.unet_evaluations == spent
    assert_same_erasure(resumed, undisturbed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": Sparsity(0.5, "global")}, "sparsity.per is 'global' and SparseGPT prunes one layer at a time"),
        ({"damping": 0.0}, "greater than 0"),
        ({"block_size": 0}, "greater than or equal to 1"),
        ({"fill": "mean"}, "Unexpected keyword"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT(**changes)


def test_groups_that_do_not_divide_the_inputs_are_refused_before_anything_is_sampled(tiny_model):
    strategy = replace(SHORT, sparsity=Sparsity(0.4, 5))
    with pytest.raises(ValueError, match=r"sparsity.per is 5 and '.*' has \d+ inputs; choose a divisor"):
        strategy.prune(tiny_model, CONCEPT, None, scope="xattn", seed=0, checkpoint=None)
    assert tiny_model.unet_evaluations == 0


def test_the_yaml_names_every_field():
    config = method_config("pruning", "sparsegpt")

    assert isinstance(instantiate(config, _convert_="all"), SparseGPT)
    assert set(config) - {"_target_"} == {field.name for field in fields(SparseGPT)}
