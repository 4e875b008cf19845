from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffusion.canvas.classifier import HEADS, CanvasClassifier
from evaluation.prompt_sets import PromptRow
from evaluation.quality import measure
from evaluation.quality.accuracy import RetainedAccuracy
from evaluation.quality.clip_score import ClipScore
from evaluation.quality.fid import Fid
from tests.oracles import quality as oracle

TOKENS = 24
PROMPTS = ["a church", "two gas pumps on fire", "pixel art of a tench, masterpiece", "a photo of a dog at night"]


@pytest.fixture
def clip_folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**tower, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    clip = CLIPModel(config)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    clip.save_pretrained(tmp_path / "clip")
    pixels = {"height": 32, "width": 32}
    images = CLIPImageProcessor(
        size=pixels, crop_size=pixels, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def classifier_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    CanvasClassifier(width=2).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def pictures(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand((count, 3, 1, 1), generator=generator)
    return (gains * torch.randint(0, 256, (count, 3, 32, 32), generator=generator)).to(torch.uint8)


def oracle_scores(folder: Path, images: torch.Tensor, prompts: list[str]) -> list[float]:
    """Score with a float64 CLIP, pixels normalised and texts padded by hand."""
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = []
    for prompt in prompts:
        inner = tokenizer(prompt, add_special_tokens=False).input_ids[: TOKENS - 2]
        padding = [tokenizer.eos_token_id] * (TOKENS - 2 - len(inner))
        ids.append([tokenizer.bos_token_id, *inner, tokenizer.eos_token_id, *padding])
    with torch.no_grad():
        image_features = clip.get_image_features(images.double() / 127.5 - 1).pooler_output
        text_features = clip.get_text_features(torch.tensor(ids)).pooler_output
    return oracle.clip_score(image_features.numpy(), text_features.numpy())


def test_clip_score_is_the_cosine_of_each_pair(clip_folder: Path):
    images = pictures(4, seed=0)
    expected = oracle_scores(clip_folder, images, PROMPTS)
    assert max(expected) > min(expected) + 0.1
    assert ClipScore(clip_folder).scores(images, PROMPTS).tolist() == pytest.approx(expected, abs=1e-3)


def test_long_prompts_are_cut_before_their_end_token(clip_folder: Path):
    images, prompt = pictures(1, seed=0), "a church struck by lightning near kyoto, " * 6
    expected = oracle_scores(clip_folder, images, [prompt])
    assert ClipScore(clip_folder).scores(images, [prompt]).tolist() == pytest.approx(expected, abs=1e-3)


def test_clip_score_reports_both_models_with_intervals(clip_folder: Path):
    images, base = pictures(4, seed=0), pictures(4, seed=1)
    rows = [PromptRow(number, prompt) for number, prompt in enumerate(PROMPTS)]
    score = ClipScore(clip_folder, name="canvas_clip")
    measures = measure(score, images, base, rows)
    assert set(measures) == {"canvas_clip", "canvas_clip_base"}
    for name, of in (("canvas_clip", images), ("canvas_clip_base", base)):
        assert measures[name]["n"] == 4
        assert measures[name]["mean"] == pytest.approx(float(score.scores(of, PROMPTS).mean()), abs=1e-4)
        assert measures[name]["low"] < measures[name]["mean"] < measures[name]["high"]


def test_clip_score_refuses_unequal_numbers_and_missing_folders(clip_folder: Path):
    with pytest.raises(ValueError, match="4 pictures and 1 prompts"):
        ClipScore(clip_folder).scores(pictures(4, seed=0), ["a church"])
    with pytest.raises(FileNotFoundError, match="nowhere holds no CLIP"):
        ClipScore(Path("nowhere")).scores(pictures(1, seed=0), ["a church"])


def test_fid_is_the_frechet_distance_of_the_classifiers_features(classifier_folder: Path):
    images, base = pictures(300, seed=0), pictures(280, seed=1) // 2
    network = CanvasClassifier.from_pretrained(classifier_folder).double()
    expected = oracle.frechet_distance(network.features(images).numpy(), network.features(base).numpy())
    assert expected > 1e-4
    assert Fid(classifier_folder).distance(images, base) == pytest.approx(expected, rel=1e-4)


def test_fid_of_equal_pictures_is_zero_even_where_they_are_few(classifier_folder: Path):
    # 10 pictures leave the 16 features' covariance without full rank.
    images = pictures(10, seed=0)
    spread = CanvasClassifier.from_pretrained(classifier_folder).features(images).var(dim=0).sum()
    measures = measure(Fid(classifier_folder), images, images, [])
    assert measures["fid"] < 1e-5 * float(spread)
    assert measures["fid_n"] == 10


def test_fid_needs_two_pictures(classifier_folder: Path):
    with pytest.raises(ValueError, match="FID of 1 pictures"):
        Fid(classifier_folder).distance(pictures(1, seed=0), pictures(9, seed=0))


def labelled_rows(folder: Path, images: torch.Tensor, wrong: int) -> list[PromptRow]:
    """Rows whose labels are what the classifier sees, except that the first ``wrong`` have the next style."""
    logits = CanvasClassifier.from_pretrained(folder)(images)
    rows = []
    for number in range(len(images)):
        style, subject, burning = (int(logits[head][number].argmax()) for head in ("style", "subject", "burning"))
        style = (style + (number < wrong)) % len(HEADS["style"])
        labels = {"style": HEADS["style"][style], "subject": HEADS["subject"][subject], "burning": str(burning)}
        rows.append(PromptRow(number, "a church", labels=labels))
    return rows


def test_retained_accuracy_counts_agreement_per_head(classifier_folder: Path):
    images = pictures(20, seed=0)
    rows = labelled_rows(classifier_folder, images, wrong=5)
    measures = measure(RetainedAccuracy(folder=classifier_folder), images, images.flip(0), rows)
    assert set(measures) == {f"accuracy_{name}" for name in ("style", "subject", "style_base", "subject_base")}
    assert (measures["accuracy_style"]["successes"], measures["accuracy_style"]["n"]) == (15, 20)
    assert measures["accuracy_subject"]["rate"] == 1.0
    assert measures["accuracy_subject"]["groups"] == 1, "rows of one prompt are not independent"
    flipped = [row.labels["subject"] == other.labels["subject"] for row, other in zip(rows, rows[::-1], strict=True)]
    assert measures["accuracy_subject_base"]["successes"] == sum(flipped)


def test_burning_column_of_zeros_and_ones_is_understood(classifier_folder: Path):
    images = pictures(20, seed=0)
    rows = labelled_rows(classifier_folder, images, wrong=0)
    assert RetainedAccuracy(heads=("burning",), folder=classifier_folder).rates(images, rows)["burning"].rate == 1.0


def test_prompts_without_ground_truth_are_named(classifier_folder: Path):
    rows = [PromptRow(7, "a church", labels={"style": "cubism"})]
    with pytest.raises(ValueError, match="Prompt 7 has the style 'cubism'"):
        RetainedAccuracy(folder=classifier_folder).rates(pictures(1, seed=0), rows)
    with pytest.raises(ValidationError, match="heads"):
        RetainedAccuracy(heads=())


def test_the_oracle_knows_the_distance_of_shifted_gaussians():
    features = np.random.default_rng(0).normal(size=(50, 3))
    assert oracle.frechet_distance(features, features + 2) == pytest.approx(12, abs=1e-6)
