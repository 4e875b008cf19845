"""Judges by image classifiers: artists, ImageNet's objects."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from pydantic import ValidationError
from torchvision.models import ResNet50_Weights, resnet50
from transformers import ResNetForImageClassification, ViTForImageClassification, pipeline

from evaluation.judges.labels import find_label
from evaluation.judges.objects import ObjectJudge
from evaluation.judges.style import StyleJudge
from tests.networks import pictures, write_hub_cache, write_resnet, write_vit
from tests.oracles import judges as oracle
from tests.test_loading import Evil

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 343\n"

ARTISTS = ("claude-monet", "paul-cezanne", "pablo-picasso", "vincent-van-gogh", "rembrandt")
OBJECTS = ("tench, Tinca tinca", "church, church building", "garbage truck, dustcart", "chain saw, chainsaw")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vit(tmp_path_factory.mktemp("vit"), ARTISTS)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_resnet(tmp_path_factory.mktemp("resnet"), OBJECTS)


@torch.no_grad()
def vit_logits(folder: Path, images: torch.Tensor) -> np.ndarray:
    """Of pictures of the network's own size, so that nothing is resized."""
    network = ViTForImageClassification.from_pretrained(folder, dtype=torch.float64).eval()
    return network(images.double() / 127.5 - 1).logits.numpy()


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_style_is_there_when_its_artist_is_among_the_most_likely(vit: Path, top_k: int):
    images = pictures(24)
    logits = vit_logits(vit, images)
    artist = 3
    verdicts = StyleJudge(vit, "van_gogh", top_k)(images)
    assert verdicts.present.tolist() == [oracle.rank(one, artist) < top_k for one in logits]
    assert 0 < verdicts.present.sum() < len(images)
    assert verdicts.score.tolist() == pytest.approx([oracle.softmax(one)[artist] for one in logits], abs=1e-5)
    assert verdicts.details["label"] == [ARTISTS[one.argmax()] for one in logits]


def test_verdicts_do_not_depend_on_the_batch(vit: Path):
    images = pictures(9, (48, 40))
    together = StyleJudge(vit, "van_gogh", batch_size=9)(images)
    alone = StyleJudge(vit, "van_gogh", batch_size=1)(images)
    assert alone.present.equal(together.present)
    torch.testing.assert_close(alone.score, together.score, atol=1e-6, rtol=0)
    assert StyleJudge(vit, "van_gogh")(images[:0]).details == {"label": []}


def test_an_object_is_there_when_its_class_is_the_most_likely(resnet: Path):
    # What a shorter edge of 32 / 0.875 pixels is cropped from, so that nothing is resized.
    images = pictures(24, (36, 50))
    network = ResNetForImageClassification.from_pretrained(resnet, dtype=torch.float64).eval()
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]
    with torch.no_grad():
        logits = network((images[:, :, 2:34, 9:41].double() / 255 - mean) / deviation).logits.numpy()
    assert len({one.argmax() for one in logits}) > 1
    for index, name in enumerate(("tench", "church", "garbage_truck", "chain_saw")):
        verdicts = ObjectJudge(resnet, name)(images)
        assert verdicts.score.tolist() == pytest.approx([oracle.softmax(one)[index] for one in logits], abs=1e-4)
        assert verdicts.present.tolist() == [one.argmax() == index for one in logits]


def test_pictures_of_any_size_are_read_as_the_published_codes_pipeline_reads_them(vit: Path):
    images = pictures(5, (60, 44))
    classify = pipeline("image-classification", model=str(vit), device="cpu")
    verdicts = StyleJudge(vit, "van_gogh")(images)
    for image, score in zip(images, verdicts.score.tolist(), strict=True):
        answers = classify(Image.fromarray(image.permute(1, 2, 0).numpy()), top_k=len(ARTISTS))
        assert score == pytest.approx({each["label"]: each["score"] for each in answers}["vincent-van-gogh"], abs=1e-5)


@torch.backends.mkldnn.flags(enabled=True)
def test_torchvisions_weights_file_is_read_as_torchvision_reads_it(tmp_path: Path):
    torch.manual_seed(0)
    with torch.device("meta"):
        network = resnet50()
    network.to_empty(device="cpu")
    for name, value in network.state_dict().items():
        # Quicker than its own way to fresh weights.
        value.fill_(1) if "running_var" in name else value.copy_(0.05 * torch.randn(value.shape))
    images = pictures(1, (250, 300))
    torch.save(network.state_dict(), tmp_path / "weights")
    for weights in ResNet50_Weights:
        file = tmp_path / Path(weights.url).name
        file.hardlink_to(tmp_path / "weights")
        with torch.no_grad():
            logits = network.eval()(weights.transforms()(images)).double().numpy()
        verdicts = ObjectJudge(file, "gas_pump", top_k=500)(images)
        assert verdicts.score.tolist() == pytest.approx([oracle.softmax(one)[571] for one in logits], rel=1e-3)
        assert verdicts.present.tolist() == [oracle.rank(one, 571) < 500 for one in logits]
        assert verdicts.details["label"] == [weights.meta["categories"][one.argmax()] for one in logits]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("cassette_player", 482),
        ("church", 497),
        ("english_springer", 217),
        ("french_horn", 566),
        ("garbage_truck", 569),
        ("gas_pump", 571),
        ("golf_ball", 574),
        ("parachute", 701),
        ("tench", 0),
        ("chain_saw", 491),
    ],
)
def test_the_ten_classes_of_imagenette_are_found_by_name(name: str, number: int):
    assert find_label(name, ResNet50_Weights.IMAGENET1K_V2.meta["categories"]) == number


@pytest.mark.parametrize(
    ("name", "artist"), [("van_gogh", 3), ("Van Gogh", 3), ("vincent-van-gogh", 3), ("monet", 0), ("Rembrandt", 4)]
)
def test_an_artist_is_found_by_surname(name: str, artist: int):
    assert find_label(name, ARTISTS) == artist


def test_names_that_fit_no_label_or_several_are_refused_with_what_is_near(vit: Path):
    with pytest.raises(ValidationError, match=r"none of the classifier's 5 labels; the nearest are 'pablo-picasso'"):
        StyleJudge(vit, "pablo_piccasso")
    with pytest.raises(ValidationError, match=r"they are like 'claude-monet'"):
        StyleJudge(vit, "xyz")
    with pytest.raises(ValueError, match="'truck', which fits 'garbage truck', 'pickup truck'; write one of them"):
        find_label("truck", ["garbage truck", "pickup truck"])
    with pytest.raises(ValueError, match="'gogh-van'"):
        find_label("gogh-van", ARTISTS)
    with pytest.raises(ValueError, match="label is '_'"):
        find_label("_", ARTISTS)


def test_a_missing_network_is_one_sentence_that_says_what_to_do(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValidationError, match=r"run `hf download microsoft/resnet-50 .*safetensors\"` where there is a"
    ):
        ObjectJudge("microsoft/resnet-50", "church")
    with pytest.raises(
        ValidationError, match=r"it is null; give the folder of a classifier of artists.*judge=style_clip"
    ):
        StyleJudge(None, "van_gogh")
    with pytest.raises(ValidationError, match="'nowhere', which is no folder; give"):
        StyleJudge("nowhere", "van_gogh")
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(
        ValidationError, match=r"model.pth'; give the folder .* resnet50-0676ba61.pth or resnet50-11ad3fa6"
    ):
        ObjectJudge(tmp_path / "model.pth", "church")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValidationError, match=r"a folder without model.safetensors"):
        StyleJudge(tmp_path, "van_gogh")
    with pytest.raises(ValidationError, match="PyTorch finds no GPU"):
        StyleJudge(vit, "van_gogh", device="cuda")


def test_damaged_weights_are_one_sentence(vit: Path, tmp_path: Path):
    for file in vit.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    judge = StyleJudge(tmp_path, "van_gogh")
    with pytest.raises(ValueError, match="cannot be read; download it again"):
        judge(pictures(1))


def test_a_pointer_in_a_judges_folder_is_called_one(vit: Path, tmp_path: Path):
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"it holds model.safetensors, which is a pointer of Git LFS"):
        StyleJudge(tmp_path / "vit", "van_gogh")(pictures(1))
    shutil.copytree(vit, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(POINTER)
    with pytest.raises(ValidationError, match=r"it holds config.json, which is a pointer of Git LFS"):
        StyleJudge(tmp_path / "other", "van_gogh")


def test_a_judge_with_half_precision_files_alone_is_read(vit: Path, tmp_path: Path):
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "vit" / "model.fp16.safetensors")
    images = pictures(3)
    assert torch.equal(
        StyleJudge(tmp_path / "vit", "van_gogh")(images).score, StyleJudge(vit, "van_gogh")(images).score
    )


def test_a_judge_that_brings_its_own_code_is_refused_without_a_question(vit: Path, tmp_path: Path):
    shutil.copytree(vit, tmp_path / "vit")
    config = tmp_path / "vit" / "config.json"
    code = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "evil", "auto_map": code}))
    (tmp_path / "vit" / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    with pytest.raises(ValidationError, match="holds no image classifier"):
        StyleJudge(tmp_path / "vit", "van_gogh")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [POINTER, "<!doctype html>"], ids=["a pointer", "a page"])
def test_what_lies_in_the_place_of_torchvisions_file_is_called_what_it_is(tmp_path: Path, content: str):
    (tmp_path / "resnet50-11ad3fa6.pth").write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read; download it again: .*(a pointer of Git LFS|a web page)"):
        ObjectJudge(tmp_path / "resnet50-11ad3fa6.pth", "church")(pictures(1))


def test_code_in_torchvisions_file_never_runs(tmp_path: Path):
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "resnet50-11ad3fa6.pth")
    with pytest.raises(ValueError, match="no code of a checkpoint is ever run"):
        ObjectJudge(tmp_path / "resnet50-11ad3fa6.pth", "church")(pictures(1))
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_stands_for_its_files_in_the_cache(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    write_hub_cache(tmp_path, "someone/artists", vit)
    judge = StyleJudge("someone/artists", "van_gogh")
    assert judge.network.is_dir()
    images = pictures(3)
    assert judge(images).score.equal(StyleJudge(vit, "van_gogh")(images).score)
