"""A model with a guard as a folder of diffusers: its own code draws the pictures of the run, or it is refused."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from diffusion.loading import load_model
from diffusion.model import TextToImage
from erasure.additions.adapters import Adapters
from erasure.additions.membranes import Membranes
from erasure.additions.safe_guidance import SafeGuidance
from erasure.additions.safree import Filters
from erasure.edit import Edit
from erasure.imports.reading import read_checkpoint
from experiments.results.guarded import export_guarded, pipeline_source
from tests.conftest import make_tiny_pipeline
from tests.test_addition import Shift
from tests.test_compvis import make_tiny_sd2

PROMPTS = ["a photo of a church", "a red fish in the sea"]
SEEDS = [3, 4]


@pytest.fixture
def model(tokenizer_folder: Path) -> TextToImage:
    return TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float64), name="tiny")


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def safe_guidance(model: TextToImage) -> SafeGuidance:
    return SafeGuidance(model.encode_prompts(["a church"])[0], 2000.0, 1.0, 1, 0.5, 0.7, "at_most_1")


def safree(model: TextToImage, skips: tuple[float, float] | None = (0.3, 0.6)) -> Filters:
    basis = torch.linalg.qr(model.encode_prompts(["a church"])[0, :3].T).Q.T.contiguous()
    negative = model.encode_prompts(["church, chapel"])[0]
    return Filters(basis, negative, True, -0.5, 1.0, 0.0, 3, 4, "prompt_last", skips)


def membranes(model: TextToImage) -> Membranes:
    layers = {name: layer for name, layer in model.network.named_modules() if name.endswith("attn2.to_k")}
    up = {name: some(1, layer.out_features, 1) for name, layer in layers.items()}
    down = {name: some(1, 1, layer.in_features) for name, layer in layers.items()}
    return Membranes(up, down, (("church", "chapel"),))


def adapters(model: TextToImage) -> Adapters:
    untrained = Adapters.untrained(model, 2, torch.Generator().manual_seed(0))
    return Adapters({name: value + 0.3 * some(*value.shape) for name, value in untrained.weights.items()})


MAKERS = {"sld": safe_guidance, "safree": safree, "spm": membranes, "receler": adapters}


def drawn(pipeline: DiffusionPipeline, model: TextToImage, guidance: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=model.initial_latents(SEEDS),
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=16,
        output_type="np",
    ).images


@pytest.mark.parametrize(
    ("kind", "guidance"), [("sld", 1.0), ("sld", 4.0), ("safree", 4.0), ("spm", 4.0), ("receler", 1.0)]
)
def test_the_exported_pipeline_draws_the_runs_pictures(
    kind: str, guidance: float, model: TextToImage, tmp_path: Path
) -> None:
    name, weight = next((n, p) for n, p in model.network.named_parameters() if n.endswith("attn2.to_v.weight"))
    changed = Edit.from_weights({name: weight.detach()}, {name: weight.detach() * -2})
    edit = Edit(changed.entries, {"base": model.fingerprint()}, (MAKERS[kind](model),))
    export_guarded(model, edit, tmp_path / "out")
    with edit.applied(model):
        ours = model.generate(PROMPTS, seeds=SEEDS, steps=4, guidance=guidance).permute(0, 2, 3, 1).numpy()
    options = {"torch_dtype": torch.float64}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True, **options)
    theirs = np.round(drawn(pipeline, model, guidance) * 255).astype(int)
    assert np.abs(theirs - ours.astype(int)).max() <= 1
    # Its second call begins anew, and the weights alone, which diffusers does not load unasked, draw something else.
    assert (np.round(drawn(pipeline, model, guidance) * 255).astype(int) == theirs).all()
    alone = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    assert np.abs(drawn(alone, model, guidance) * 255 - theirs).max() > 2
    with pytest.raises(ValueError, match="trust_remote_code"):
        StableDiffusionPipeline.from_pretrained(tmp_path / "out", **options)


def test_safree_without_re_attention_too(model: TextToImage, tmp_path: Path) -> None:
    edit = Edit({}, {}, (safree(model, None),))
    export_guarded(model, edit, tmp_path / "out")
    with edit.applied(model):
        ours = model.generate(PROMPTS, seeds=SEEDS, steps=4, guidance=3.0).permute(0, 2, 3, 1).numpy()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True, torch_dtype=torch.float64)
    assert np.abs(np.round(drawn(pipeline, model, 3.0) * 255) - ours.astype(int)).max() <= 1


def test_its_code_imports_nothing_of_this_project(model: TextToImage, tmp_path: Path) -> None:
    export_guarded(model, Edit({}, {}, (safe_guidance(model),)), tmp_path / "out")
    imported = set()
    for file in (tmp_path / "out").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert "torch" in imported
    assert not {"attacks", "diffusion", "erasure", "evaluation", "experiments"} & imported


@pytest.mark.slow
def test_its_code_needs_nothing_of_this_project(model: TextToImage, tmp_path: Path) -> None:
    export_guarded(model, Edit({}, {}, (safe_guidance(model),)), tmp_path / "out")
    program = (
        "import sys, torch; from diffusers import DiffusionPipeline; "
        "p = DiffusionPipeline.from_pretrained('out', trust_remote_code=True); "
        "p.set_progress_bar_config(disable=True); "
        "print(p('a church', num_inference_steps=2, height=16, width=16, output_type='np').images.shape); "
        "assert not {'diffusion', 'erasure', 'experiments'} & {name.partition('.')[0] for name in sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 16, 16, 3)"


def test_what_would_go_past_the_guard_is_refused(model: TextToImage, tmp_path: Path) -> None:
    edit = Edit({}, {"base": model.fingerprint()}, (safe_guidance(model),))
    export_guarded(model, edit, tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True, torch_dtype=torch.float64)
    with pytest.raises(ValueError, match="prompt_embeds goes past the guard"):
        pipeline(prompt_embeds=some(1, 24, 32))
    with pytest.raises(ValueError, match="would lack its guard"):
        pipeline.save_pretrained(tmp_path / "again")
    # Here no code of a model is run: the folder is no base model, and as an erased one it is its edit.
    with pytest.raises(ValueError, match="keeps a guard beside its weights"):
        load_model(str(tmp_path / "out"))
    read = read_checkpoint(tmp_path / "out")
    assert isinstance(read, Edit) and read.fingerprint() == edit.fingerprint()


def test_a_guard_of_a_plugin_and_models_that_no_guard_fits_are_refused_by_name(
    model: TextToImage, tokenizer_folder: Path, tmp_path: Path
) -> None:
    plugin = Edit({}, {}, (Shift(torch.zeros(16)),))
    with pytest.raises(ValueError, match=r"adds tests.test_addition.Shift to the model, which is of a plugin"):
        export_guarded(model, plugin, tmp_path / "out")
    velocity = TextToImage(make_tiny_sd2(tokenizer_folder), name="tiny2")
    with pytest.raises(
        ValueError, match="adds safe_guidance to the model, which thinks in noise, and 'tiny2' predicts"
    ):
        export_guarded(velocity, Edit({}, {}, (safe_guidance(velocity),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kinds_that_share_names_are_refused() -> None:
    assert "kinds = {" in pipeline_source(["safe_guidance"])
    with pytest.raises(ValueError, match="adds safe_guidance, safe_guidance to the model, which no one file can hold"):
        pipeline_source(["safe_guidance", "safe_guidance"])
