"""Numbers that are infinite or NaN end a job where they arise, with a sentence that says where."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.cases import PromptCase
from attacks.evaluate import Proposal, search
from attacks.noise import PathStep, picture_gradient
from attacks.prompt_search import embedding_gradient
from diffusion.finite import NotFiniteError
from diffusion.loading import ModelSource
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import Sampling
from diffusion.training import fit
from erasure.additions.safe_guidance import SafeGuidance
from erasure.edit import Edit
from erasure.finetuning import gradient, prediction_error
from erasure.parameters import scope_parameters
from erasure.pictures import Painting
from erasure.pruning.calibration import input_products, input_squares
from erasure.pruning.masks import maskable_parameters
from evaluation.verdicts import Verdicts
from experiments.command.errors import explain
from experiments.job.cost import Meter
from experiments.job.journal import Journal
from experiments.job.measuring import Measuring
from experiments.job.store import Store, read_json, write_json
from tests.conftest import make_tiny_pipeline
from tests.night import nightly
from tests.tiny_job import make_job, overrides, run

NAN = float("nan")
SEEDS = [1, 2]
PROMPTS = ["a church", "a red fish"]
WEIGHT = "down_blocks.0.resnets.0.conv1.weight"


def damage(network: nn.Module, name: str, value: float = NAN) -> None:
    with torch.no_grad():
        network.get_parameter(name).flatten()[0] = value


@pytest.mark.parametrize("eraser", ["esd", nightly("ac")])
def test_a_diverged_eraser_ends_the_job_and_leaves_no_result(eraser: str, world: Path, tmp_path: Path) -> None:
    command = [*overrides(world, tmp_path / "store"), f"eraser={eraser}", "eraser.learning_rate=1e30", "attack=none"]
    command = [word for word in command if not word.startswith(("attack.", "eraser.trajectories"))]
    with pytest.raises(NotFiniteError) as caught:
        run(command, tmp_path / "run")
    sentence = explain(caught.value)
    assert sentence is not None
    assert "fine-tuning at step" in sentence
    assert "learning rate" in sentence
    assert not list((tmp_path / "store").glob("**/result.json"))
    assert not list((tmp_path / "store").glob("**/*.png"))


def test_a_damaged_base_model_draws_nothing(tiny_model: TextToImage) -> None:
    damage(tiny_model.network, WEIGHT)
    with pytest.raises(NotFiniteError, match=r"^Latents that 'tiny' samples in 2 steps: [\d,]+ of [\d,]+ values"):
        tiny_model.generate(PROMPTS, seeds=SEEDS, steps=2, guidance=3.0)


def test_a_damaged_text_encoder_and_a_damaged_vae_are_named(tiny_model: TextToImage) -> None:
    latents = tiny_model.initial_latents(SEEDS)
    damage(tiny_model.vae, "decoder.conv_in.weight")
    damage(tiny_model.vae, "encoder.conv_in.weight")
    with pytest.raises(NotFiniteError, match="Pictures that the VAE of 'tiny' decodes"):
        tiny_model.decode(latents)
    with pytest.raises(NotFiniteError, match="Latents that the VAE of 'tiny' encodes"):
        tiny_model.encode_images(torch.zeros((1, 3, 16, 16), dtype=torch.uint8))
    tiny_model.vocabulary.data[:] = NAN
    with pytest.raises(NotFiniteError, match="Text embeddings of 'tiny'"):
        tiny_model.encode_prompts(PROMPTS)


@pytest.mark.parametrize(("precision", "value"), [("fp32", NAN), ("fp32", math.inf), ("fp16", 1e6)])
def test_a_damaged_weight_is_told_when_the_model_is_loaded(
    tokenizer_folder: Path, tmp_path: Path, precision: str, value: float
) -> None:
    pipeline = make_tiny_pipeline(tokenizer_folder)
    damage(pipeline.unet, WEIGHT, value)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(NotFiniteError, match=f"weight of unet '{WEIGHT}': 1 of"):
        ModelSource(str(tmp_path / "model"), precision=precision, device="cpu").load()


@pytest.mark.parametrize("autocast", [True, False])
def test_an_overflow_in_float16_is_called_so(tokenizer_folder: Path, autocast: bool) -> None:
    pipeline = make_tiny_pipeline(tokenizer_folder)
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight *= 3e5
    TextToImage(pipeline).generate(PROMPTS, seeds=SEEDS, steps=2, guidance=3.0)
    half = torch.float16
    model = TextToImage(pipeline if autocast else pipeline.to(half), autocast=half if autocast else None)
    with pytest.raises(NotFiniteError, match=r"float16 whatever exceeds 65,504 overflows, so set model\.precision"):
        model.generate(PROMPTS, seeds=SEEDS, steps=2, guidance=3.0)


def trained(loss: Any, *, steps: int = 5, rate: float = 0.1, **options: Any) -> Tensor:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=rate)
    fit([weight], lambda step: loss(weight, step), steps=steps, optimizer=optimizer, label="training", **options)
    return weight.detach()


def test_training_stops_at_the_step_whose_loss_is_not_finite() -> None:
    def loss(weight: Tensor, step: int) -> Tensor:
        return weight.sum() * (NAN if step == 3 else 1.0)

    with pytest.raises(NotFiniteError, match="The loss of training at step 4 of 5 is nan; the training has diverged"):
        trained(loss)


def test_training_stops_at_a_gradient_that_is_not_finite() -> None:
    # sqrt has the gradient inf at 0, where its value is finite.
    with pytest.raises(NotFiniteError, match="The largest gradient of training at step 1 of 5 is inf"):
        trained(lambda weight, _: (weight - 1).sqrt().sum())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_training_ends_with_finite_weights(ema_decay: float | None) -> None:
    with pytest.raises(NotFiniteError, match="What training has trained: 3 of 3 values"):
        trained(lambda weight, _: weight.sum() * 1e20, steps=1, rate=1e30, ema_decay=ema_decay)


def test_training_in_float16_that_takes_no_step_is_told() -> None:
    def loss(weight: Tensor, _: int) -> Tensor:
        return weight.half().sum().float() * 1000

    with pytest.raises(NotFiniteError, match="Every gradient of training overflows float16; no step was taken"):
        trained(loss, scaler=torch.amp.GradScaler("cpu"))
    assert bool((trained(lambda weight, _: weight.sum(), scaler=torch.amp.GradScaler("cpu")) < 1).all())


def edits() -> Iterator[Any]:
    before = {"w": torch.ones(2, 2)}
    yield "dense", lambda bad: Edit.from_weights(before, {"w": torch.tensor([[1.0, 2.0], [bad, 3.0]])})
    yield "rows", lambda bad: Edit.from_rows("w", torch.tensor([1]), torch.tensor([[bad, 1.0]]), (2, 2))
    yield "right", lambda bad: Edit.from_right_multiplication(torch.tensor([[1.0, bad], [0.0, 1.0]]), before)
    yield (
        "addition",
        lambda bad: Edit({}, {}, (SafeGuidance(torch.tensor([[bad]]), 1.0, 1, 1.0, 0.5, 0.5, "at_most_1"),)),
    )


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize(("kind", "make"), list(edits()))
def test_an_edit_that_is_not_finite_cannot_be_made(kind: str, make: Any, bad: float) -> None:
    assert make(2.0)
    with pytest.raises(NotFiniteError, match="The edit"):
        make(bad)


def test_an_edit_that_overflows_in_the_models_precision_is_not_applied(tokenizer_folder: Path) -> None:
    model = TextToImage(make_tiny_pipeline(tokenizer_folder).to(torch.float16))
    [name, *_] = scope_parameters(model, "xattn_kv")
    right = torch.eye(32, dtype=torch.float64) * 1e30
    edit = Edit.from_right_multiplication(right, {name: scope_parameters(model, "xattn_kv")[name]})
    with pytest.raises(NotFiniteError, match=r"in torch\.float16"):
        edit.apply(model)


def test_a_judge_without_a_score_is_refused() -> None:
    with pytest.raises(NotFiniteError, match="The judge's scores: 1 of 2 values"):
        Verdicts(torch.tensor([True, False]), torch.tensor([0.5, NAN]))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_nothing_that_is_not_finite_is_written(bad: float, tmp_path: Path) -> None:
    result = {"rates": {"base": [1.0, bad]}}
    with pytest.raises(NotFiniteError, match=rf"summary.json, which was to be written, is {bad} at rates\.base\.1"):
        write_json(tmp_path / "summary.json", result)
    with pytest.raises(NotFiniteError):
        Journal(tmp_path / "outcomes.jsonl").append({"score": bad})
    with pytest.raises(NotFiniteError):
        Store(tmp_path / "store").remembered("verdicts", {"key": 1}, lambda: result)
    assert not [
        path for path in tmp_path.rglob("*.json*") if "NaN" in path.read_text() or "Infinity" in path.read_text()
    ]


class NoMeasure:
    """An evaluator whose distance is not there."""

    def start(self) -> "NoMeasure":
        return self

    def compute(self) -> dict[str, Any]:
        return {"clip_score": {"mean": 1.0}, "fid": NAN}


def test_a_measure_that_is_not_finite_is_named(tiny_model: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="A measure of the retained pictures is nan at fid"):
        Measuring(NoMeasure(), Store(tmp_path), tmp_path).finish(Meter(tiny_model))  # type: ignore[arg-type]
    assert not (tmp_path / "result.json").exists()


def test_an_attack_whose_loss_is_not_finite_stops(tiny_model: TextToImage) -> None:
    template = PromptTemplate.insert(tiny_model, PROMPTS, 2, "prefix_k")
    embeddings = torch.zeros((2, 2, 32))
    latents = tiny_model.initial_latents(SEEDS)
    noise = tiny_model.initial_latents(SEEDS[::-1])
    options: Any = (tiny_model, template, embeddings)
    embedding_gradient(*options, latents, torch.tensor([5, 9]), noise)
    with pytest.raises(NotFiniteError, match="The attack's loss: 1 of 2 values"):
        embedding_gradient(*options, latents, torch.tensor([5, 9]), noise.index_fill(0, torch.tensor([1]), NAN))
    text = tiny_model.encode(PROMPTS)
    path = [PathStep(500, 0.5, 0.9, 0)]
    with pytest.raises(NotFiniteError, match="The attack's loss: 512 of 512 values"):
        picture_gradient(tiny_model, lambda x, t: tiny_model.predict(x, t, text), path, noise, latents * NAN)


def test_a_search_does_not_go_on_from_a_loss_that_is_not_finite(tiny_model: TextToImage) -> None:
    def judge(images: Tensor) -> Verdicts:
        return Verdicts(torch.zeros(len(images), dtype=torch.bool), torch.zeros(len(images)))

    def propose(traces: list[Any]) -> list[Proposal]:
        return [Proposal("a fish", loss=NAN if trace.attempts else 1.0) for trace in traces]

    cases = [PromptCase(7, "a church", 1, 1.0)]
    outcomes = search(tiny_model, cases, judge, propose, sampling=Sampling(2), rounds=3, batch_size=1)
    with pytest.raises(NotFiniteError, match="The attack's loss on case 7 after 2 attempts is nan"):
        list(outcomes)


def products_and_squares(model: TextToImage) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every layer, the diagonal of its inputs' products and the sums of their squares, in one order."""
    weights = maskable_parameters(model, "xattn_ffn")
    text = model.encode_prompts(PROMPTS)
    painting = Painting(2, 2, 3.0, 2)
    products, _ = input_products(model, weights, text, painting, seed=0, checkpoint=None)
    squares, _ = input_squares(model, weights, text, painting, seed=0, checkpoint=None)
    for name in weights:
        yield products[name], squares[name].sum(0).movedim(0, -1).flatten()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_statistics_of_layers_are_not_gathered_in_half_precision(
    tokenizer_folder: Path, half: torch.dtype, autocast: bool
) -> None:
    pipeline = make_tiny_pipeline(tokenizer_folder)
    model = TextToImage(pipeline if autocast else pipeline.to(half), autocast=half if autocast else None)
    for products, squares in products_and_squares(model):
        torch.testing.assert_close(products.diagonal(), squares, rtol=1e-5, atol=1e-7)
        assert float(torch.linalg.eigvalsh(products)[0]) > -1e-5 * float(products.diagonal().sum())


def test_gradients_that_score_weights_do_not_underflow_in_float16(tokenizer_folder: Path) -> None:
    """Without care most of them are zero: float16 knows nothing below 6e-8."""
    exact, half = (
        TextToImage(make_tiny_pipeline(tokenizer_folder).to(dtype)) for dtype in (torch.float32, torch.float16)
    )

    def scored(model: TextToImage) -> Tensor:
        weights = maskable_parameters(model, "ffn")
        latents, text = model.initial_latents(SEEDS), model.encode(PROMPTS)
        with model.trainable(list(weights.values())):
            loss = prediction_error(model, latents, torch.tensor([300, 600]), text, torch.zeros_like(latents))
            assert loss.dtype == torch.float32
            return torch.cat([value.flatten() for value in gradient(model, iter([loss * 1e-4]), weights).values()])

    expected, found = scored(exact), scored(half)
    assert found.dtype == torch.float32
    assert float((found == 0).float().mean()) < float((expected == 0).float().mean()) + 0.01
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_base_model_without_the_concept_is_told_everywhere(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*overrides(world, tmp_path / "store"), "eraser=none", "attack=none", "prompts=6"]
    command = [word for word in command if not word.startswith(("attack.", "eraser.")) or word.startswith("+")]
    present = tmp_path / "remainder"
    for remainder in range(3):
        caplog.clear()
        present.write_text(str(remainder))
        summary = run([*command, f"+judge.weights={present}"], tmp_path / f"run-{remainder}")
        shown = summary["rates"]["base"]["successes"]
        sentence = f"The base model shows van_gogh in {shown} of 6 pictures, less than half"
        told = [sentence in text for text in (caplog.text, capsys.readouterr().out, " ".join(summary["warnings"]))]
        assert told == [shown < 3] * 3
        assert read_json(tmp_path / f"run-{remainder}" / "summary.json")["warnings"] == summary["warnings"]
    assert json.loads(present.read_text()) == 2
    assert make_job(*command).choices["eraser"] == "none"
