"""Published erased checkpoints: every format gives the erased model, and what is none is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters
from erasure.addition import attached
from erasure.additions.adapters import Adapters, layer_widths
from erasure.additions.membranes import GATE_UNIT, Membranes
from erasure.checkpoints import edit_of
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.imported import Imported
from erasure.export import export
from erasure.imports.reading import read_checkpoint
from erasure.parameters import scope_parameters
from erasure.pruning.magnitude import Magnitude
from erasure.pruning.masks import Sparsity
from erasure.pruning.off import Off
from experiments.job.keys import _contents
from tests import tiny_job
from tests.test_loading import Evil, unet_name

CONCEPT = Concept(name="church", kind="object", targets=("a church",), anchor="a picture")
Weights = dict[str, Tensor]


def erased(model: TextToImage, *, scope: str = "xattn") -> Weights:
    """Weights of a scope after some erasing, by our names."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in scope_parameters(model, scope).items()
    }


def whole_unet(model: TextToImage, changed: Weights) -> Weights:
    return {name: changed.get(name, value.detach()).clone() for name, value in model.network.named_parameters()}


def nested(weights: Weights) -> dict[str, Weights]:
    modules: dict[str, Weights] = {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(f"unet.{module}", {})[leaf] = value
    return modules


def compvis(weights: Weights) -> Weights:
    return {unet_name(name): value for name, value in weights.items()}


def pickled(content: Callable[[TextToImage, Weights], object]) -> Callable[[TextToImage, Weights, Path], Path]:
    def write(model: TextToImage, changed: Weights, folder: Path) -> Path:
        torch.save(content(model, changed), folder / "erased.bin")
        return folder / "erased.bin"

    return write


def as_safetensors(model: TextToImage, changed: Weights, folder: Path) -> Path:
    save_file(changed, folder / "esd.safetensors")
    return folder / "esd.safetensors"


def as_own_edit(model: TextToImage, changed: Weights, folder: Path) -> Path:
    Edit.from_weights(dict(model.network.named_parameters()), changed).save(folder / "edit.safetensors")
    return folder / "edit.safetensors"


def as_pipeline(model: TextToImage, changed: Weights, folder: Path) -> Path:
    export(model, Edit.from_weights(dict(model.network.named_parameters()), changed), folder / "pipeline")
    return folder / "pipeline"


def as_unet_folder(model: TextToImage, changed: Weights, folder: Path) -> Path:
    return as_pipeline(model, changed, folder) / "unet"


UNET_FORMATS = {
    "ESD and UCE of today: some parameters": as_safetensors,
    "SPEED: the same, pickled": pickled(lambda model, changed: changed),
    "SalUn, RECE: the whole U-Net": pickled(whole_unet),
    "STEREO: nested by module": pickled(lambda model, changed: nested(changed)),
    "AC: nested by part": pickled(lambda model, changed: {"unet": changed}),
    "ESD of 2023: CompVis names": pickled(lambda model, changed: compvis(whole_unet(model, changed))),
    "SA: a Lightning checkpoint": pickled(
        lambda model, changed: {"state_dict": compvis(whole_unet(model, changed)), "global_step": 3}
    ),
    "AC of CompVis: some of them": pickled(lambda model, changed: {"state_dict": compvis(changed)}),
    "FMN, MACE: a pipeline's folder": as_pipeline,
    "a U-Net's folder": as_unet_folder,
    "an edit of this project": as_own_edit,
}


def assert_becomes(model: TextToImage, edit: Edit, changed: Weights) -> None:
    before = {name: value.detach().clone() for name, value in named_parameters(model).items()}
    with edit.applied(model):
        for name, value in named_parameters(model).items():
            assert torch.equal(value, changed.get(name, before[name])), name


@pytest.mark.parametrize("write", UNET_FORMATS.values(), ids=UNET_FORMATS)
def test_every_format_gives_the_erased_unet_bit_for_bit(tiny_model, tmp_path, write):
    changed = erased(tiny_model)
    edit = edit_of(write(tiny_model, changed, tmp_path), tiny_model)

    assert edit.entries.keys() == changed.keys()
    assert_becomes(tiny_model, edit, changed)


def test_half_precision_files_change_what_was_erased_and_nothing_else(tiny_model, tmp_path):
    changed = erased(tiny_model)
    path = pickled(lambda model, changed: {k: v.half() for k, v in whole_unet(model, changed).items()})(
        tiny_model, changed, tmp_path
    )

    edit = edit_of(path, tiny_model)

    assert edit.entries.keys() == changed.keys()
    assert_becomes(tiny_model, edit, {name: value.half().float() for name, value in changed.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_takes_a_full_precision_file(tiny_model, tmp_path, dtype):
    path = pickled(whole_unet)(tiny_model, erased(tiny_model), tmp_path)
    changed = {name: value.to(dtype) for name, value in erased(tiny_model).items()}
    for part in (tiny_model.network, tiny_model.text_encoder):
        part.to(dtype)

    edit = edit_of(path, tiny_model)

    assert edit.entries.keys() == changed.keys()
    assert_becomes(tiny_model, edit, changed)


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "cond_stage_model.transformer."])
def test_a_text_encoder_is_found_under_every_prefix(tiny_model, tmp_path, prefix):
    changed = erased(tiny_model, scope="text_encoder")
    torch.save(
        {prefix + name.removeprefix(TEXT_ENCODER_PREFIX): value for name, value in changed.items()}, tmp_path / "te.pt"
    )

    assert_becomes(tiny_model, edit_of(tmp_path / "te.pt", tiny_model), changed)


def test_a_text_encoders_folder_is_read(tiny_model, tmp_path):
    changed = erased(tiny_model, scope="text_encoder")
    with Edit.from_weights(named_parameters(tiny_model), changed).applied(tiny_model):
        tiny_model.text_encoder.save_pretrained(tmp_path / "text_encoder_unlearned")

    assert_becomes(tiny_model, edit_of(tmp_path / "text_encoder_unlearned", tiny_model), changed)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_low_rank_factors_are_folded_into_the_weights(tiny_model64, tmp_path, alpha):
    factors, expected = {}, {}
    generator = torch.Generator().manual_seed(2)
    for name, weight in scope_parameters(tiny_model64, "xattn_kv").items():
        rows, columns = weight.shape
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        factors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
        if alpha is not None:
            factors[f"{layer}.alpha"] = torch.tensor(alpha)
        value = weight.detach().clone()
        for row in range(rows):
            for column in range(columns):
                product = sum(float(up[row, k]) * float(down[k, column]) for k in range(2))
                value[row, column] += (2 if alpha is None else alpha) / 2 * product
        expected[name] = value
    save_file(factors, tmp_path / "spm.safetensors")

    edit = edit_of(tmp_path / "spm.safetensors", tiny_model64)

    with edit.applied(tiny_model64):
        for name, value in expected.items():
            torch.testing.assert_close(named_parameters(tiny_model64)[name], value, rtol=1e-12, atol=1e-12)


def test_low_rank_factors_of_a_convolution_do_what_the_layer_beside_it_does(tiny_model64, tmp_path):
    layer = tiny_model64.network.up_blocks[0].resnets[0].conv1
    generator = torch.Generator().manual_seed(2)
    outputs, inputs, *_ = layer.weight.shape
    down = 0.02 * torch.randn(2, inputs, 3, 3, generator=generator, dtype=torch.float64)
    up = torch.randn(outputs, 2, 1, 1, generator=generator, dtype=torch.float64)
    name = "lora_unet_up_blocks_0_resnets_0_conv1"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "spm.safetensors")
    images = torch.randn(1, inputs, 4, 5, generator=generator, dtype=torch.float64)
    expected = layer(images) + functional.conv2d(functional.conv2d(images, down, padding=1), up)

    with edit_of(tmp_path / "spm.safetensors", tiny_model64).applied(tiny_model64):
        torch.testing.assert_close(layer(images), expected, rtol=1e-10, atol=1e-10)


def spm_file(model: TextToImage, path: Path, **changes: Tensor) -> Membranes:
    """What a published SPM does, and its file: kohya's names, alpha 0.5, some tensors replaced."""
    generator = torch.Generator().manual_seed(2)
    content, up, down = {}, {}, {}
    for name, weight in scope_parameters(model, "transformers").items():
        layer = name.removesuffix(".weight")
        ones = (1,) * (weight.ndim - 2)
        down[layer] = torch.randn(1, 2, *weight.shape[1:], generator=generator)
        up[layer] = torch.randn(1, len(weight), 2, generator=generator)
        key = f"lora_unet_{layer.replace('.', '_')}"
        content[f"{key}.lora_down.weight"] = down[layer][0]
        content[f"{key}.lora_up.weight"] = up[layer].reshape(len(weight), 2, *ones)
        content[f"{key}.alpha"] = torch.tensor(0.5)
        up[layer] = up[layer] * 0.25
    save_file({**content, **changes}, path, metadata={"prompts": "van gogh, by vincent", "rank": "2", "alpha": "0.5"})
    return Membranes(up, down, (("van gogh", "by vincent"),))


@torch.no_grad()
def test_an_spm_is_imported_with_its_gate(tiny_model, tmp_path):
    expected = spm_file(tiny_model, tmp_path / "spm.safetensors")
    prompts = ["a church in van gogh style", "two blue fish"]

    eraser = Imported(path=tmp_path / "spm.safetensors")
    edit = eraser.erase(tiny_model, CONCEPT, Off(), seed=0).edit
    [found] = edit.additions

    assert not edit.entries
    assert found.settings() == expected.settings()
    assert found.tensors().keys() == expected.tensors().keys()
    assert all(torch.equal(value, expected.tensors()[name]) for name, value in found.tensors().items())
    pictures = []
    for each in (edit, Edit({}, {}, (expected,))):
        with each.applied(tiny_model):
            assert tiny_model.encode(prompts)[0, -1, 0] == GATE_UNIT
            pictures.append(tiny_model.generate(prompts, seeds=[1, 2], steps=2, guidance=3.0))
    assert torch.equal(*pictures)


def test_an_spm_of_another_model_or_without_numbers_is_refused(tiny_model, tmp_path):
    path = tmp_path / "spm.safetensors"
    spm_file(tiny_model, path, **{"lora_unet_mid_block_nothing.lora_up.weight": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"does not fit 'tiny': 1 of \d+ entries \('lora_unet_mid_block_nothing"):
        edit_of(path, tiny_model)
    spm_file(
        tiny_model, path, **{f"lora_unet_{LAYER.replace('.', '_')}.lora_up.weight": torch.full((32, 2), torch.nan)}
    )
    with pytest.raises(ValueError, match=r"infinite values or none at all: 1 of \d+ entries \('mid_block"):
        edit_of(path, tiny_model)


def test_any_single_layer_of_compvis_names_finds_its_place(tiny_model, tmp_path):
    for module in dict.fromkeys(name.rpartition(".")[0] for name, _ in tiny_model.network.named_parameters()):
        layer = tiny_model.network.get_submodule(module).named_parameters(prefix=module)
        changed = {name: value.detach() * 1.5 + 0.1 for name, value in layer}
        torch.save(compvis(changed), tmp_path / "delta.ckpt")
        assert_becomes(tiny_model, edit_of(tmp_path / "delta.ckpt", tiny_model), changed)


def receler_erasers(model: TextToImage, rank: int = 3) -> dict[str, Weights]:
    """Erasers as Receler's authors save them: by the block around a transformer."""
    generator = torch.Generator().manual_seed(3)
    erasers = {}
    for name, width in layer_widths(model).items():
        shapes = {"down.weight": (rank, width), "down.bias": (rank,), "up.weight": (width, rank), "up.bias": (width,)}
        erasers[name.partition(".transformer_blocks")[0]] = {
            part: torch.randn(shape, generator=generator) for part, shape in shapes.items()
        }
    return erasers


def write_erasers(folder: Path, erasers: object, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(erasers, folder / "eraser_weights.pt")
    (folder / "eraser_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


ERASERS = {"eraser_type": "adapter", "eraser_rank": 3}


@pytest.mark.parametrize("alone", [False, True])
def test_recelers_erasers_are_adapters_behind_cross_attention(tiny_model, tmp_path, alone):
    erasers = receler_erasers(tiny_model)
    assert {"down_blocks.1.attentions.0", "mid_block.attentions.0"} < erasers.keys()
    path = write_erasers(tmp_path / "given", erasers, ERASERS)
    adapters = Adapters(
        {
            f"{name}.{part}": value
            for name in layer_widths(tiny_model)
            for part, value in erasers[name.partition(".transformer_blocks")[0]].items()
        }
    )
    text, latents = tiny_model.encode_prompts(["a church"]), tiny_model.initial_latents([1])
    with attached(tiny_model, adapters):
        expected = tiny_model.predict(latents, 500, text)

    eraser = Imported(path=path / "eraser_weights.pt" if alone else path)
    edit = eraser.erase(tiny_model, CONCEPT, Off(), seed=0).edit
    edit.save(tmp_path / "edit.safetensors")

    assert not edit.entries
    with edit_of(tmp_path / "edit.safetensors", tiny_model).applied(tiny_model):
        assert torch.equal(tiny_model.predict(latents, 500, text), expected)


def changed_eraser(part: str, value: Tensor | None, block: str = "mid_block.attentions.0") -> Callable[..., object]:
    """Erasers with one of their tensors replaced or left out."""

    def change(erasers: dict[str, Weights], folder: Path) -> object:
        erasers[block] = {**erasers.get(block, {}), part: value}
        if value is None:
            del erasers[block][part]
        return erasers

    return change


WRONG_ERASERS = {
    "a layer is missing": (
        lambda erasers, folder: {key: value for key, value in erasers.items() if key[:3] != "mid"},
        ERASERS,
        "does not fit 'tiny': adapters are lacking for 1 of 7 entries .'mid_block",
    ),
    "a layer too many": (
        lambda erasers, folder: {**erasers, "up_blocks.7.attentions.0": erasers["mid_block.attentions.0"]},
        ERASERS,
        "does not fit 'tiny': .*'up_blocks.7.attentions.0' of width 32 and 'tiny' has no such layer",
    ),
    "a layer twice": (
        lambda erasers, folder: {**erasers, "mid_block": erasers["mid_block.attentions.0"]},
        ERASERS,
        "'mid_block' of width 32 and 'tiny' has no such layer",
    ),
    "half a layer": (changed_eraser("up.bias", None), ERASERS, "does not fit 'tiny': the adapter of 'mid_block"),
    "other shapes": (changed_eraser("up.weight", torch.zeros(4, 4)), ERASERS, r"\[4, 4\].* do not go together"),
    "a number": (changed_eraser("up.bias", torch.tensor(1.0)), ERASERS, "do not go together"),
    "not finite": (changed_eraser("up.bias", torch.full((32,), torch.inf)), ERASERS, "infinite values"),
    "integers": (changed_eraser("up.bias", torch.zeros(32, dtype=torch.int64)), ERASERS, "infinite values or none"),
    "no tensor": (changed_eraser("up.bias", 3), ERASERS, "'mid_block.attentions.0.up.bias'.* are no tensors"),
    "sparse": (changed_eraser("up.bias", torch.zeros(32).to_sparse()), ERASERS, "are no plain tensors"),
    "other keys": (changed_eraser("middle.weight", torch.zeros(3)), ERASERS, "1 of 29 entries .* are none"),
    "of another rank": (lambda erasers, folder: erasers, {**ERASERS, "eraser_rank": 128}, "another rank than"),
    "an odd rank": (lambda erasers, folder: erasers, {**ERASERS, "eraser_rank": [3]}, "another rank than"),
    "of another type": (lambda erasers, folder: erasers, {"eraser_type": "lora"}, "must be 'adapter'"),
    "a list for a config": (lambda erasers, folder: erasers, [3], "must be 'adapter'"),
    "half a config": (lambda erasers, folder: erasers, '{"eraser_type": ', "eraser_config.json is damaged"),
    "a deep config": (lambda erasers, folder: erasers, "[" * 100_000, "eraser_config.json is damaged"),
    "code": (
        lambda erasers, folder: {**erasers, "callbacks": Evil(folder / "ran")},
        ERASERS,
        "eraser_weights.pt is damaged or holds more than tensors .*no code .* is ever run",
    ),
    "nothing": (lambda erasers, folder: {}, ERASERS, "holds no tensors"),
}


@pytest.mark.parametrize(("change", "config", "sentence"), WRONG_ERASERS.values(), ids=WRONG_ERASERS)
def test_erasers_that_do_not_fit_are_refused_in_one_sentence(tiny_model, tmp_path, change, config, sentence):
    path = write_erasers(tmp_path / "given", change(receler_erasers(tiny_model), tmp_path), config)

    with pytest.raises(ValueError, match=sentence) as raised:
        edit_of(path, tiny_model)
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    assert not any(layer._forward_hooks for layer in tiny_model.network.modules())


@pytest.mark.parametrize("name", ["eraser_weights.pt", "eraser_config.json"])
def test_erasers_without_one_of_their_files_are_known_at_once(tiny_model, tmp_path, name):
    path = write_erasers(tmp_path / "given", receler_erasers(tiny_model), ERASERS)
    (path / name).unlink()

    with pytest.raises(FileNotFoundError, match=f"there is no .*{name}"):
        Imported(path=path)


def test_a_checkpoint_of_another_model_ends_the_job_before_any_picture_is_made(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_job.Float64Folder, "load", lambda self: tiny_model)
    tiny_job.write_world(tmp_path)
    torch.save({"mid_block.nothing.weight": torch.ones(2)}, tmp_path / "odd.pt")
    command = tiny_job.overrides(tmp_path, tmp_path / "store")
    command = [part for part in command if not part.startswith(("eraser.", "attack."))]

    with pytest.raises(ValueError, match="1 of 1 entries"):
        tiny_job.run([*command, "attack=none", "eraser=imported", f"eraser.path={tmp_path / 'odd.pt'}"], tmp_path / "r")
    assert tiny_model.unet_evaluations == 0


def test_what_sampling_does_not_use_is_passed_over(tiny_model, tmp_path):
    changed = erased(tiny_model)
    others = {
        "first_stage_model.encoder.weight": torch.ones(2),
        "model_ema.decay": torch.ones(()),
        "betas": torch.ones(3),
    }
    torch.save({"state_dict": {**compvis(changed), **others}}, tmp_path / "whole.ckpt")

    assert_becomes(tiny_model, edit_of(tmp_path / "whole.ckpt", tiny_model), changed)


def test_keys_that_do_not_match_are_counted_and_named_not_dropped(tiny_model, tmp_path):
    changed = erased(tiny_model)
    torch.save({**changed, "mid_block.nothing.weight": torch.ones(2)}, tmp_path / "odd.pt")

    with pytest.raises(ValueError, match=rf"does not fit 'tiny': 1 of {len(changed) + 1} entries \('mid_block.nothing"):
        edit_of(tmp_path / "odd.pt", tiny_model)


def test_shapes_that_do_not_match_are_named(tiny_model, tmp_path):
    name, value = next(iter(erased(tiny_model).items()))
    torch.save({name: value[:1]}, tmp_path / "small.pt")

    with pytest.raises(ValueError, match=rf"does not fit .*{name}' \(\[1, \d+\] for \[\d+, \d+\]\)"):
        edit_of(tmp_path / "small.pt", tiny_model)


def test_code_in_a_file_is_refused_and_never_runs(tiny_model, tmp_path):
    torch.save({**erased(tiny_model), "callbacks": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")

    with pytest.raises(ValueError, match=r"evil\.pt is damaged or holds more than tensors .*no code .* is ever run"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def write_bytes(content: bytes) -> Callable[[Path, TextToImage], None]:
    return lambda path, model: path.write_bytes(content) and None


def write_half_a_file(path: Path, model: TextToImage) -> None:
    torch.save(erased(model), path)
    path.write_bytes(path.read_bytes()[:2000])


def write_half_a_safetensors(path: Path, model: TextToImage) -> None:
    save_file(erased(model), path)
    path.write_bytes(path.read_bytes()[:2000])


def write_looped_dict(path: Path, model: TextToImage) -> None:
    content: dict[str, object] = {}
    content["state_dict"] = content
    torch.save(content, path)


def write_factors(**changes: Tensor) -> Callable[[Path, TextToImage], None]:
    """Low-rank factors of one layer, some of them replaced."""

    def write(path: Path, model: TextToImage) -> None:
        rows, columns = model.network.get_parameter(f"{LAYER}.weight").shape
        parts = {"up": torch.ones(rows, 2), "down": torch.ones(2, columns), **changes}
        names = {"up": "lora_up.weight", "down": "lora_down.weight", "alpha": "alpha"}
        layer = f"lora_unet_{LAYER.replace('.', '_')}"
        torch.save({f"{layer}.{names[part]}": value for part, value in parts.items()}, path)

    return write


def write_twice(path: Path, model: TextToImage) -> None:
    bias = model.network.conv_in.bias.detach()
    torch.save({"conv_in.bias": bias + 1, "unet.conv_in.bias": bias + 2}, path)


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"

REFUSED = {
    "a dict in itself": (write_looped_dict, "are no tensors"),
    "a parameter twice": (
        write_twice,
        r"1 of 2 entries \('unet.conv_in.bias' \(a second value of conv_in.bias\)\) differ",
    ),
    "the autoencoder alone": (
        lambda path, model: torch.save({"first_stage_model.x": torch.ones(2)}, path),
        "nothing of a network or a text encoder, but the autoencoder",
    ),
    "a factor that is a number": (write_factors(up=torch.tensor(1.0)), "2 of 2 entries"),
    "two alphas": (write_factors(alpha=torch.ones(2)), "3 of 3 entries"),
    "rank 0": (write_factors(down=torch.ones(0, 32), up=torch.ones(32, 0)), "2 of 2 entries"),
    "factors of other ranks": (write_factors(down=torch.ones(3, 32)), "2 of 2 entries"),
    "empty": (lambda path, model: path.touch(), "is empty"),
    "text": (write_bytes(b"a church"), "is damaged"),
    "truncated pickle": (write_half_a_file, "is damaged"),
    "truncated safetensors": (write_half_a_safetensors, "is damaged or no checkpoint"),
    "no tensors": (lambda path, model: torch.save({}, path), "holds no tensors"),
    "numbers": (lambda path, model: torch.save({"lr": 0.1}, path), "'lr'.* are no tensors"),
    "EcoDiff": (lambda path, model: torch.save([torch.ones(3)], path), "holds a list, as EcoDiff"),
    "CAD's gradients": (
        lambda path, model: torch.save({k: torch.randn_like(v) for k, v in whole_unet(model, {}).items()}, path),
        "gradients, such as CAD's",
    ),
    "not finite": (
        lambda path, model: torch.save({k: v / 0 for k, v in erased(model).items()}, path),
        "infinite values",
    ),
}


@pytest.mark.parametrize(("write", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_erased_checkpoint_is_refused_in_one_sentence(tiny_model, tmp_path, write, sentence):
    path = tmp_path / "given"
    write(path, tiny_model)

    with pytest.raises(ValueError, match=sentence) as raised:
        edit_of(path, tiny_model)
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["nowhere.pt", "."])
def test_a_missing_checkpoint_is_known_before_any_model_is_loaded(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        Imported(path=Path(path))


def test_imported_models_are_erasures_without_cost_and_scored_pruning_follows(tiny_model, tmp_path):
    changed = erased(tiny_model)
    eraser = Imported(path=as_safetensors(tiny_model, changed, tmp_path), scope="xattn_kv")

    whole = eraser.erase(tiny_model, CONCEPT, Off(), seed=0)
    pruned = eraser.erase(tiny_model, CONCEPT, Magnitude(Sparsity(0.5)), seed=0)

    assert (whole.unet_evaluations, tiny_model.unet_evaluations, whole.losses) == (0, 0, [])
    assert_becomes(tiny_model, whole.edit, changed)
    with pruned.edit.applied(tiny_model):
        values = [named_parameters(tiny_model)[name] for name in scope_parameters(tiny_model, "xattn_kv")]
        zeros, size = sum(int((value == 0).sum()) for value in values), sum(value.numel() for value in values)
    assert zeros == size // 2


def test_a_checkpoint_counts_by_its_content_wherever_it_lies(tiny_model, tmp_path):
    changed = erased(tiny_model)
    (tmp_path / "elsewhere").mkdir()
    here, there = (Imported(path=as_safetensors(tiny_model, changed, tmp_path / f)) for f in (".", "elsewhere"))
    folder = Imported(path=as_pipeline(tiny_model, changed, tmp_path))
    before = _contents(folder)

    assert _contents(here) == _contents(there)
    as_safetensors(tiny_model, {name: value + 1 for name, value in changed.items()}, tmp_path / "elsewhere")
    assert _contents(here) != _contents(there)
    (folder.path / "unet" / "config.json").write_text("{}")
    assert _contents(folder) != before
