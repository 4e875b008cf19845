"""What identifies a model: every setting that its pictures depend on, and nothing that they do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusion import source_code
from diffusion.identity import identity
from diffusion.loading import ModelSource, load_model
from diffusion.model import TextToImage
from diffusion.source_code import code_reached, reached
from tests.conftest import make_tiny_pipeline


def _swap_tokens(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings.update({name: value})


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "last beta": ("scheduler/scheduler_config.json", _set("beta_end", 0.02)),
    "prediction type": ("scheduler/scheduler_config.json", _set("prediction_type", "v_prediction")),
    "last alpha": ("scheduler/scheduler_config.json", _set("set_alpha_to_one", True)),
    "timestep spacing": ("scheduler/scheduler_config.json", _set("timestep_spacing", "trailing")),
    "scaling factor": ("vae/config.json", _set("scaling_factor", 0.5)),
    "activation": ("text_encoder/config.json", _set("hidden_act", "gelu")),
    "heads": ("text_encoder/config.json", _set("num_attention_heads", 4)),
    "sample size": ("unet/config.json", _set("sample_size", 16)),
    "frequency shift": ("unet/config.json", _set("freq_shift", 1)),
    "vocabulary": ("tokenizer/tokenizer.json", _swap_tokens),
    "merges": ("tokenizer/tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop()),
    "length": ("tokenizer/tokenizer_config.json", _set("model_max_length", 12)),
    "padding": ("tokenizer/tokenizer_config.json", _set("pad_token", "<|startoftext|>")),
}


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "model"
    make_tiny_pipeline(tokenizer_folder).save_pretrained(path)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_of_a_folder_counts_by_its_content(change: str, folder: Path, tmp_path: Path) -> None:
    file, alter = CHANGES[change]
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    settings = json.loads((changed / file).read_text())
    alter(settings)
    (changed / file).write_text(json.dumps(settings))
    original, other = load_model(str(folder), device="cpu"), load_model(str(changed), device="cpu")
    assert original.fingerprint() == other.fingerprint()
    assert identity(original) != identity(other)


def test_resolution_sampler_and_precision_count(folder: Path) -> None:
    sources = [
        {},
        {"resolution": 32},
        {"scheduler": "lms"},
        {"precision": "bf16"},
        {"precision": "bf16_autocast"},
    ]
    found = [identity(ModelSource(str(folder), device="cpu", **source).load()) for source in sources]
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(sources)


def test_a_copy_elsewhere_and_the_pipeline_in_memory_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    expected = identity(load_model(str(folder), device="cpu"))
    assert identity(load_model(str(tmp_path / "elsewhere"), device="cpu", name="other")) == expected
    assert identity(TextToImage(StableDiffusionPipeline.from_pretrained(folder))) == expected


def test_use_does_not_change_what_a_model_is(tiny_model: TextToImage) -> None:
    before = identity(tiny_model)
    tiny_model.generate(["a church"], seeds=[0], steps=1, guidance=2.0)
    assert identity(tiny_model) == before


def test_the_number_of_threads_counts(tiny_model: TextToImage) -> None:
    threads = torch.get_num_threads()
    one = identity(tiny_model)
    try:
        torch.set_num_threads(threads + 1)
        assert identity(tiny_model) != one
    finally:
        torch.set_num_threads(threads)


def test_code_is_reached_over_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_plugin"
    (package / "inner").mkdir(parents=True)
    files = {
        "__init__": "",
        "method": "from some_plugin.loss import loss\nfrom .inner import near\nimport diffusion.sampling\n",
        "loss": "def loss(x):\n    '''Words.'''\n    return x  # why\n",
        "inner/__init__": "",
        "inner/near": "def lazily():\n    from .. import far\n",
        "far": "FAR = 1\n",
        "unused": "UNUSED = 1\n",
    }
    for name, source in files.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = reached("some_plugin.method", frozenset({"some_plugin", "diffusion"}))
    assert {name.removeprefix("some_plugin.") for name in found if name.startswith("some_plugin.")} == {
        *("method", "loss", "inner", "inner.near", "far")
    }
    assert "diffusion.sampling" in found

    def hash_with(name: str, source: str) -> str:
        for function in (code_reached, source_code._read, source_code._file):
            function.cache_clear()
        (package / f"{name}.py").write_text(source)
        return code_reached("some_plugin.method")

    first = hash_with("far", files["far"])
    assert hash_with("unused", "UNUSED = 2\n") == first
    assert hash_with("loss", '"""New."""\n\ndef loss( x ):\n    "Other words."\n    return x\n') == first
    assert hash_with("far", "FAR = 2\n") != first
