"""Edits apply, revert bit for bit, stay small on disk, and refuse what they do not fit."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion.denoisers.unet import UNetDenoiser
from diffusion.parameters import named_parameters
from erasure.additions.adapters import Adapters
from erasure.edit import Edit
from erasure.entries import Entry
from erasure.export import export
from erasure.parameters import scope_parameters


def random_masks(model, scope="xattn", pruned=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator) >= pruned
        for name, weight in scope_parameters(model, scope).items()
        if weight.ndim >= 2
    }


def noisy_weights(model, scope="xattn"):
    before = scope_parameters(model, scope)
    return before, {name: weight.detach() + 0.1 for name, weight in before.items()}


def near_identity():
    return torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))


def right_multiplied(model):
    return Edit.from_right_multiplication(near_identity(), scope_parameters(model, "xattn_kv"))


def some_rows(model):
    [(name, table)] = scope_parameters(model, "token_embedding").items()
    rows = torch.tensor([3, 70, 8])
    return Edit.from_rows(name, rows, table[rows] + 1, table.shape)


@pytest.fixture(params=["dense", "bits", "indices", "text_encoder", "right_multiplied", "rows"])
def edit(request, tiny_model):
    if request.param == "rows":
        return some_rows(tiny_model)
    if request.param == "right_multiplied":
        return right_multiplied(tiny_model)
    if request.param == "bits":
        return Edit.from_mask(random_masks(tiny_model))
    if request.param == "indices":
        return Edit.from_mask(random_masks(tiny_model, pruned=0.01))
    return Edit.from_weights(*noisy_weights(tiny_model, "xattn" if request.param == "dense" else "text_encoder"))


def test_edit_reverts_bit_for_bit(tiny_model, edit):
    fingerprint = tiny_model.fingerprint()

    edit.apply(tiny_model)
    assert tiny_model.fingerprint() != fingerprint
    edit.revert(tiny_model)

    assert tiny_model.fingerprint() == fingerprint


def test_saved_edit_does_the_same(tiny_model, edit, tmp_path):
    edit.with_metadata({"method": "ESD", "seed": 3}).save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    with edit.applied(tiny_model):
        fingerprint = tiny_model.fingerprint()

    with loaded.applied(tiny_model):
        assert tiny_model.fingerprint() == fingerprint
    assert loaded.metadata["method"] == "ESD"
    assert loaded.metadata["seed"] == 3
    assert loaded.metadata["schema"] == 1
    assert loaded.size_bytes == edit.size_bytes


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_right_multiplied_matrices_are_w_t_to_the_models_precision(tiny_model, dtype, tolerance):
    tiny_model.network.to(dtype)
    edit = right_multiplied(tiny_model)
    before = {name: weight.double().clone() for name, weight in scope_parameters(tiny_model, "xattn_kv").items()}

    with edit.applied(tiny_model):
        for name, weight in scope_parameters(tiny_model, "xattn_kv").items():
            expected = before[name] @ near_identity()
            assert weight.dtype == dtype
            assert (weight - before[name]).norm() > 0
            assert (weight - expected).norm() <= tolerance * expected.norm()


def test_one_right_multiplication_is_stored_for_all_matrices(tiny_model, tmp_path):
    edit = right_multiplied(tiny_model)
    edit.save(tmp_path / "edit.safetensors")

    assert len(edit.entries) == len(scope_parameters(tiny_model, "xattn_kv")) > 1
    assert edit.size_bytes == 32 * 32 * 4
    assert [tensor.shape for tensor in load_file(tmp_path / "edit.safetensors").values()] == [(32, 32)]
    assert Edit.load(tmp_path / "edit.safetensors").masks() == {}


def test_files_from_before_entries_shared_their_parts_are_read(tiny_model, tmp_path):
    path = tmp_path / "edit.safetensors"
    edit = Edit.from_mask(random_masks(tiny_model))
    edit.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["edit"])
    for entry in header["entries"].values():
        del entry["parts_of"]
    save_file(load_file(path), path, {"edit": json.dumps(header)})

    masks = Edit.load(path).masks()

    assert masks.keys() == edit.masks().keys()
    assert all(torch.equal(kept, masks[name]) for name, kept in edit.masks().items())


def test_masked_weights_are_the_base_models_or_exactly_zero(tiny_model):
    masks = random_masks(tiny_model)
    base = {name: weight.detach().clone() for name, weight in named_parameters(tiny_model).items()}

    with Edit.from_mask(masks).applied(tiny_model):
        for name, weight in named_parameters(tiny_model).items():
            kept = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            assert torch.equal(weight[kept], base[name][kept])
            assert not weight[~kept].any()


def test_mask_can_fill_with_the_mean_of_what_is_left(tiny_model):
    masks = random_masks(tiny_model)
    name, kept = next(iter(masks.items()))
    mean = named_parameters(tiny_model)[name][kept].mean().item()

    with Edit.from_mask(masks, fill="mean").applied(tiny_model):
        assert named_parameters(tiny_model)[name][~kept].tolist() == pytest.approx([mean] * int((~kept).sum()))


def test_masks_come_back_from_either_packing(tiny_model):
    for pruned, kind in ((0.3, "bits"), (0.001, "indices")):
        masks = {"down": torch.rand(500, 33, generator=torch.Generator().manual_seed(1)) >= pruned}
        edit = Edit.from_mask(masks)

        assert edit.entries["down"].kind == kind
        assert torch.equal(edit.masks()["down"], masks["down"])


def test_mask_over_all_cross_attention_of_stable_diffusion_takes_6_mb_at_most(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
    masks = {
        name: torch.empty(weight.shape, dtype=torch.uint8).random_(10, generator=torch.Generator().manual_seed(0)) > 0
        for name, weight in scope_parameters(
            SimpleNamespace(denoiser=UNetDenoiser(unet, 8), network=unet), "xattn"
        ).items()
        if weight.ndim == 2
    }

    Edit.from_mask(masks).save(tmp_path / "edit.safetensors")

    assert sum(mask.numel() for mask in masks.values()) > 43.9e6
    assert (tmp_path / "edit.safetensors").stat().st_size <= 6_000_000


def test_rows_change_alone_and_are_all_that_is_stored(tiny_model):
    edit = some_rows(tiny_model)
    before = tiny_model.vocabulary.clone()

    with edit.applied(tiny_model):
        changed = (tiny_model.vocabulary != before).any(dim=1).nonzero().flatten().tolist()
        assert torch.equal(tiny_model.vocabulary[[3, 70, 8]], before[[3, 70, 8]] + 1)

    assert changed == [3, 8, 70]
    assert edit.size_bytes == 3 * (8 + 32 * 4)


@pytest.mark.parametrize("broken", [{"rows": torch.tensor([10**6])}, {"values": torch.zeros(2, 32)}])
def test_rows_that_do_not_fit_the_parameter_are_refused(tiny_model, tmp_path, broken):
    edit = some_rows(tiny_model)
    [parts] = [entry.parts for entry in edit.entries.values()]
    parts.update(broken)
    edit.save(tmp_path / "edit.safetensors")

    with pytest.raises(ValueError, match="damaged at"):
        Edit.load(tmp_path / "edit.safetensors")


def test_unchanged_tensors_are_not_stored(tiny_model):
    before, after = noisy_weights(tiny_model)
    unchanged, *changed = after
    after[unchanged] = before[unchanged].detach().clone()

    assert set(Edit.from_weights(before, after).entries) == set(changed)
    assert Edit.from_mask({"weight": torch.ones(2, 2, dtype=torch.bool)}).entries == {}


def test_dense_tensors_load_as_a_plain_state_dict(tiny_model, tmp_path):
    before, after = noisy_weights(tiny_model)
    Edit.from_weights(before, after).save(tmp_path / "edit.safetensors")

    missing_and_unexpected = tiny_model.network.load_state_dict(load_file(tmp_path / "edit.safetensors"), strict=False)

    assert missing_and_unexpected.unexpected_keys == []
    assert all(torch.equal(scope_parameters(tiny_model, "xattn")[name], value) for name, value in after.items())


def test_then_joins_weights_and_a_mask_into_one_edit(tiny_model):
    weights = Edit.from_weights(*noisy_weights(tiny_model, "xattn_kv"))
    mask = Edit.from_mask(random_masks(tiny_model, "xattn"))
    with weights.applied(tiny_model), mask.applied(tiny_model):
        fingerprint = tiny_model.fingerprint()

    joined = weights.then(mask, tiny_model)

    with joined.applied(tiny_model):
        assert tiny_model.fingerprint() == fingerprint
    kinds = {name: entry.kind for name, entry in joined.entries.items()}
    assert all((kind == "dense") == (".to_k." in name or ".to_v." in name) for name, kind in kinds.items())


@pytest.mark.parametrize("scope", ["xattn_kv", "ffn"])
def test_then_joins_a_right_multiplication_and_a_mask(tiny_model, scope):
    right = right_multiplied(tiny_model)
    mask = Edit.from_mask(random_masks(tiny_model, scope))
    with right.applied(tiny_model), mask.applied(tiny_model):
        fingerprint = tiny_model.fingerprint()

    joined = right.then(mask, tiny_model)

    with joined.applied(tiny_model):
        assert tiny_model.fingerprint() == fingerprint
    if scope == "ffn":
        assert joined.size_bytes == right.size_bytes + mask.size_bytes


def test_the_unedited_model_stands_beside_the_edited_one_and_shares_the_rest(tiny_model, edit):
    latents = torch.randn(2, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
    before = tiny_model.predict(latents, 40, tiny_model.encode(["a church", "a fish"]))
    fingerprint = tiny_model.fingerprint()
    spent = tiny_model.unet_evaluations

    with edit.applied(tiny_model):
        edited = tiny_model.fingerprint()
        unedited = edit.unedited(tiny_model)
        assert unedited.fingerprint() == fingerprint
        assert torch.equal(unedited.predict(latents, 40, unedited.encode(["a church", "a fish"])), before)
        assert (unedited.unet_evaluations, tiny_model.unet_evaluations) == (2, spent)
        mine, theirs = named_parameters(tiny_model), named_parameters(unedited)
        assert {name for name in mine if mine[name] is not theirs[name]} == set(edit.entries)
        assert all(
            theirs[name].data_ptr() == value.data_ptr()
            for name, value in edit._applications[tiny_model].replaced.items()
        )
        assert tiny_model.fingerprint() == edited

    assert tiny_model.fingerprint() == unedited.fingerprint() == fingerprint


def test_context_reverts_after_an_error(tiny_model, edit):
    fingerprint = tiny_model.fingerprint()

    with pytest.raises(RuntimeError), edit.applied(tiny_model):
        raise RuntimeError

    assert tiny_model.fingerprint() == fingerprint


@pytest.mark.parametrize("place", [0, 1, -1])
def test_an_edit_that_fails_half_way_leaves_the_model_as_it_was(tiny_model, monkeypatch, place):
    _, changed = noisy_weights(tiny_model)
    adapters = Adapters.untrained(tiny_model, 2, torch.Generator().manual_seed(0))
    edit = Edit(Edit.from_weights(named_parameters(tiny_model), changed).entries, {}, (adapters,))
    before = tiny_model.fingerprint()
    hooks = [len(layer._forward_hooks) for layer in tiny_model.network.modules()]
    failing = list(edit.entries.values())[place]
    value = Entry.value

    def fail(entry, original):
        if entry is failing:
            raise torch.OutOfMemoryError("no memory")
        return value(entry, original)

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "value", fail)
        with pytest.raises(torch.OutOfMemoryError):
            edit.apply(tiny_model)

    assert tiny_model.fingerprint() == before
    assert [len(layer._forward_hooks) for layer in tiny_model.network.modules()] == hooks
    with pytest.raises(ValueError, match="nothing to revert"):
        edit.revert(tiny_model)
    with edit.applied(tiny_model):
        assert torch.equal(named_parameters(tiny_model)[next(iter(changed))], next(iter(changed.values())))
    assert tiny_model.fingerprint() == before


def test_an_addition_that_does_not_fit_leaves_the_model_as_it_was(tiny_model):
    adapters = Adapters.untrained(tiny_model, 2, torch.Generator().manual_seed(0))
    elsewhere = Adapters({f"nowhere.{name}": value for name, value in adapters.weights.items()})
    entries = Edit.from_weights(*noisy_weights(tiny_model)).entries
    before = tiny_model.fingerprint()

    with pytest.raises(ValueError, match="has no such layer"):
        Edit(entries, {}, (adapters, elsewhere)).apply(tiny_model)

    assert tiny_model.fingerprint() == before
    assert not any(layer._forward_hooks for layer in tiny_model.network.modules())


def test_an_unedited_copy_that_fails_leaves_the_additions_where_they_are(tiny_model, monkeypatch):
    adapters = Adapters.untrained(tiny_model, 2, torch.Generator().manual_seed(0))
    edit = Edit({}, {}, (adapters,))

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    with edit.applied(tiny_model):
        hooks = [len(layer._forward_hooks) for layer in tiny_model.network.modules()]
        with monkeypatch.context() as patch:
            patch.setattr("erasure.edit.copy.deepcopy", fail)
            with pytest.raises(torch.OutOfMemoryError):
                edit.unedited(tiny_model)
        assert [len(layer._forward_hooks) for layer in tiny_model.network.modules()] == hooks != [0] * len(hooks)
    assert not any(layer._forward_hooks for layer in tiny_model.network.modules())


def test_applying_twice_and_reverting_too_often_are_refused(tiny_model, edit):
    with edit.applied(tiny_model), pytest.raises(ValueError, match="already applied to 'tiny'"):
        edit.apply(tiny_model)
    with pytest.raises(ValueError, match="not applied to 'tiny'"):
        edit.revert(tiny_model)


def test_another_base_model_is_refused_and_left_alone(tiny_model, edit):
    edit = edit.with_metadata({"base": "0" * 64})
    fingerprint = tiny_model.fingerprint()

    with pytest.raises(ValueError, match="made from another model than 'tiny'"):
        edit.apply(tiny_model)
    assert tiny_model.fingerprint() == fingerprint

    edit.apply(tiny_model, fingerprint="0" * 64)
    edit.revert(tiny_model)


def test_parameters_that_the_model_lacks_are_refused(tiny_model):
    edit = Edit.from_mask({"no.such.weight": torch.zeros(2, 2, dtype=torch.bool)})

    with pytest.raises(ValueError, match=r"'no.such.weight' of shape \[2, 2\]"):
        edit.apply(tiny_model)


def test_no_unedited_model_is_made_of_one_that_is_not_edited(tiny_model, edit):
    with pytest.raises(ValueError, match="is not applied to 'tiny'"):
        edit.unedited(tiny_model)


def test_identity_changes_nothing_and_saves(tiny_model, tmp_path):
    Edit.identity({"method": "NoEraser"}).save(tmp_path / "edit.safetensors")
    fingerprint = tiny_model.fingerprint()

    with Edit.load(tmp_path / "edit.safetensors").applied(tiny_model):
        assert tiny_model.fingerprint() == fingerprint


def test_files_that_are_no_edits_are_refused_with_one_sentence(tiny_model, edit, tmp_path):
    path = tmp_path / "edit.safetensors"
    with pytest.raises(FileNotFoundError, match="There is no edit at"):
        Edit.load(path)

    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        Edit.load(path)

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="safetensors file but no edit"):
        Edit.load(path)

    edit.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        Edit.load(path)


def test_a_change_of_single_values_or_of_the_description_is_noticed(edit, tmp_path):
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    key = next(iter(tensors))
    changed = tensors[key].clone()
    changed.view(-1)[::50] += 1

    for damaged in (
        ({**tensors, key: changed}, metadata),
        (tensors, {**metadata, "edit": metadata["edit"].replace('"shape": [', '"shape": [1, ', 1)}),
    ):
        save_file(damaged[0], path, damaged[1])
        with pytest.raises(ValueError, match="checksum does not fit"):
            Edit.load(path)


def test_tensors_that_do_not_fit_the_header_are_refused(edit, tmp_path):
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    with safe_open(path, "pt") as file:
        metadata = {"edit": file.metadata()["edit"]}
    tensors = load_file(path)
    key = next(iter(tensors))

    save_file({**tensors, key: torch.full((1,), 10**6, dtype=torch.int32)}, path, metadata)
    with pytest.raises(ValueError, match="damaged at"):
        Edit.load(path)

    header = json.loads(metadata["edit"])
    elsewhere = {name: {**entry, "parts_of": "nowhere"} for name, entry in header["entries"].items()}
    save_file(tensors, path, {"edit": json.dumps({**header, "entries": elsewhere})})
    with pytest.raises(ValueError, match="damaged at"):
        Edit.load(path)

    save_file(tensors, path, {"edit": json.dumps({**header, "schema": 99})})
    with pytest.raises(ValueError, match="format 99"):
        Edit.load(path)


@pytest.mark.parametrize("kind", ["bits", "right_multiplied"])
def test_exported_folder_gives_the_same_pictures_in_plain_diffusers(tiny_model, tmp_path, kind):
    edit = Edit.from_mask(random_masks(tiny_model, "xattn_ffn")) if kind == "bits" else right_multiplied(tiny_model)
    prompts, seeds = ["a church", "a fish by van gogh"], [5, 6]
    plain = tiny_model.generate(prompts, seeds=seeds, steps=3, guidance=7.5)
    with edit.applied(tiny_model):
        pictures = tiny_model.generate(prompts, seeds=seeds, steps=3, guidance=7.5)

    export(tiny_model, edit, tmp_path / "exported")

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        latents=tiny_model.initial_latents(seeds),
        num_inference_steps=3,
        guidance_scale=7.5,
        height=16,
        width=16,
        output_type="pt",
    ).images
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert ((theirs * 255).round() - pictures).abs().max() <= 1
    assert not torch.equal(plain, pictures)
    assert list((tmp_path / "exported").rglob("*.bin")) == []
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(tiny_model, edit, tmp_path / "exported")
