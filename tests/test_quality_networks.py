"""FID, KID, LPIPS and CLIP score as the field measures them, on random weights in files of the real format."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.models import alexnet

from diffusion.canvas.classifier import CanvasClassifier
from diffusion.streams import stream
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Evaluator, Measurement, Measures, measure
from evaluation.quality.clip_score import CLIP_FOLDER, load_clip
from evaluation.quality.distances import FrechetDistance, KernelDistance
from evaluation.quality.extractors import Classifier, Clip, Features, Inception
from evaluation.quality.lpips import Lpips, load_network
from evaluation.quality.open_clip_score import OpenClipScore, load_open_clip
from evaluation.quality.weights import weights_file
from tests.oracles import quality as oracle
from tests.test_loading import Evil
from tests.test_quality import classifier_folder, clip_folder, pictures  # noqa: F401 - fixtures

# ruff: noqa: F811 - fixtures are imported and then named as parameters

PROMPTS = ["a church", "a tench", "a gas pump on fire", "a photo of a dog at night"]


def rows(count: int) -> list[PromptRow]:
    return [PromptRow(number, PROMPTS[number % len(PROMPTS)]) for number in range(count)]


def features_of(folder: Path, images: Tensor) -> np.ndarray:
    return CanvasClassifier.from_pretrained(folder).double().features(images).numpy()


def by_hand(metric: Any, images: Tensor, base: Tensor) -> Any:
    metric.update(base, real=True)
    metric.update(images, real=False)
    return metric.compute()


def in_parts(evaluator: Evaluator, images: Tensor, base: Tensor, part: int, file: Path) -> Measures:
    """Measure some pictures at a time, each time by a measurement that goes on from the state of the one before."""
    for start in range(0, len(images), part):
        measurement = restored(evaluator, file)
        end = start + part
        measurement.update(images[start:end], base[start:end], rows(len(images))[start:end])
        torch.save(measurement.state(), file)
    return restored(evaluator, file).compute()


def restored(evaluator: Evaluator, file: Path) -> Measurement:
    measurement = evaluator.start()
    if file.exists():
        measurement.restore(torch.load(file, weights_only=True))
    return measurement


def test_fid_equals_the_formula_and_torchmetrics_by_hand(classifier_folder: Path) -> None:
    images, base = pictures(300, seed=0), pictures(300, seed=1) // 2
    extractor = Classifier(classifier_folder)
    fid = measure(FrechetDistance(extractor), images, base, rows(300))["fid"]
    expected = oracle.frechet_distance(features_of(classifier_folder, images), features_of(classifier_folder, base))
    assert fid == pytest.approx(expected, rel=1e-4)
    assert fid == float(by_hand(FrechetInceptionDistance(feature=extractor.load()), images, base))


def test_kid_equals_the_formula_on_its_subsets_and_torchmetrics_by_hand(classifier_folder: Path) -> None:
    images, base = pictures(40, seed=0), pictures(40, seed=1) // 2
    settings = KernelDistance(Classifier(classifier_folder), subsets=3, subset_size=12, seed=5)
    measures = measure(settings, images, base, rows(40))

    metric = KernelInceptionDistance(feature=Classifier(classifier_folder).load(), subsets=3, subset_size=12)
    torch.set_rng_state(stream(5, "kid/subsets").get_state())
    assert [measures["kid"], measures["kid_std"]] == [float(value) for value in by_hand(metric, images, base)]

    first, second = features_of(classifier_folder, base), features_of(classifier_folder, images)
    generator = stream(5, "kid/subsets")
    values = []
    for _ in range(3):
        subset = first[torch.randperm(40, generator=generator)[:12]]
        values.append(oracle.kernel_distance(subset, second[torch.randperm(40, generator=generator)[:12]]))
    assert measures["kid"] == pytest.approx(np.mean(values), rel=1e-9)
    assert measures["kid_std"] == pytest.approx(np.std(values), rel=1e-6)


def test_kid_leaves_the_random_numbers_of_others_alone(classifier_folder: Path) -> None:
    settings = KernelDistance(Classifier(classifier_folder), subsets=2, subset_size=4)
    settings.extractor.load()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = measure(settings, pictures(8, seed=0), pictures(8, seed=1), rows(8))
    assert torch.equal(torch.rand(3), expected)
    assert measure(settings, pictures(8, seed=0), pictures(8, seed=1), rows(8)) == first


def test_small_sets_are_refused_or_make_small_subsets(classifier_folder: Path) -> None:
    settings = KernelDistance(Classifier(classifier_folder), subsets=2)
    assert measure(settings, pictures(5, seed=0), pictures(5, seed=1), rows(5))["kid_n"] == 5
    for name, few in (("KID", settings), ("FID", FrechetDistance(Classifier(classifier_folder)))):
        with pytest.raises(ValueError, match=f"{name} of 1 pictures does not exist"):
            measure(few, pictures(1, seed=0), pictures(1, seed=1), rows(1))


def test_distances_to_a_folder_of_real_pictures(classifier_folder: Path, tmp_path: Path) -> None:
    images, real = pictures(30, seed=0), pictures(20, seed=1)
    (tmp_path / "real" / "more").mkdir(parents=True)
    for number, picture in enumerate(real):
        folder = tmp_path / "real" / ("more" if number % 2 else "")
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    extractor = Classifier(classifier_folder)
    distance = FrechetDistance(extractor, reference=tmp_path / "real")
    expected = oracle.frechet_distance(features_of(classifier_folder, images), features_of(classifier_folder, real))
    measures = measure(distance, images, images, rows(30))
    assert measures == {"fid": pytest.approx(expected, rel=1e-4), "fid_n": 30}
    kernel = KernelDistance(extractor, subsets=2, subset_size=9, reference=tmp_path / "real")
    assert measure(kernel, images, images, rows(30))["kid"] != 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValidationError, match="must be a folder of real pictures"):
        FrechetDistance(extractor, reference=tmp_path / "empty")


def test_measures_do_not_depend_on_parts_and_survive_an_interruption(
    classifier_folder: Path, clip_folder: Path, alexnet_file: Path, open_clip_file: Path, tmp_path: Path
) -> None:
    images, base = pictures(12, seed=0), pictures(12, seed=1)
    large, large_base = (torch.nn.functional.interpolate(part, size=(64, 64)) for part in (images, base))
    for settings, one, other in (
        (FrechetDistance(Classifier(classifier_folder)), images, base),
        (KernelDistance(Clip(clip_folder), subsets=2, subset_size=6), images, base),
        (Lpips(alexnet_file, device="cpu"), large, large_base),
        (OpenClipScore(TINY, open_clip_file, device="cpu"), images, base),
    ):
        whole, parts = (
            measure(settings, one, other, rows(12)),
            in_parts(settings, one, other, 5, tmp_path / type(settings).__name__),
        )
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_two_distances_share_the_features_of_the_same_pictures() -> None:
    calls: list[int] = []

    def extract(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1).double()

    features, images, base = Features(extract, 3 * 32 * 32), pictures(3, seed=0), pictures(2, seed=1)
    assert torch.equal(features(images), features(images))
    features(base)
    features(images)
    assert calls == [3, 2]
    features(images.clone())
    assert calls == [3, 2, 3]


def test_clip_features_are_normalised_and_of_the_networks_width(clip_folder: Path) -> None:
    features = Clip(clip_folder, device="cpu").load()
    assert features.num_features == 16
    torch.testing.assert_close(features(pictures(3, seed=0)).norm(dim=1), torch.ones(3))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the names and shapes of torch-fidelity's file."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), file)
    return file


@torch.backends.mkldnn.flags(enabled=True)
def test_inception_is_torchmetrics_own_with_weights_from_a_file(inception_file: Path) -> None:
    images, base = pictures(3, seed=0), pictures(3, seed=1)
    extractor = Inception(inception_file, device="cpu")
    measures = measure(FrechetDistance(extractor), images, base, rows(3))
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(inception_file))
    assert measures["fid"] == pytest.approx(max(0.0, float(by_hand(metric, images, base))), abs=1e-6)
    assert extractor.load().num_features == 2048
    assert extractor.load()(images).shape == (3, 2048)


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), file)
    return file


def test_lpips_is_torchmetrics_own_and_zero_where_nothing_changed(
    alexnet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, base = (torch.nn.functional.interpolate(pictures(4, seed=seed), size=(64, 64)) for seed in (0, 1))
    settings = Lpips(alexnet_file, device="cpu", batch_size=3)
    assert settings.distances(images, images).tolist() == [0.0] * 4
    distances = settings.distances(images, base)
    network = load_network(alexnet_file, torch.device("cpu"))
    monkeypatch.setattr("torchmetrics.functional.image.lpips._NoTrainLpips", lambda **_: network)
    expected = learned_perceptual_image_patch_similarity(images / 127.5 - 1, base / 127.5 - 1, net_type="alex")
    assert float(distances.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert bool((distances > 0).all())


def test_lpips_trunk_is_the_file_and_its_heads_are_the_published_ones(alexnet_file: Path) -> None:
    network = load_network(alexnet_file, torch.device("cpu"))
    trunk = torch.load(alexnet_file, weights_only=True)
    assert torch.equal(network.net.slice2[1].weight, trunk["features.3.weight"])
    assert float(network.lin0.model[1].weight.abs().sum()) > 0


TINY = "tiny-test"


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that open_clip knows by name, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(TINY).state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def test_clip_score_is_open_clips_by_hand(open_clip_file: Path) -> None:
    images = pictures(4, seed=0)
    network, _, preprocess = open_clip.create_model_and_transforms(TINY, pretrained=str(open_clip_file))
    tokens = open_clip.get_tokenizer(TINY)(PROMPTS)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
        picture_vectors, text_vectors = network.eval().encode_image(pixels), network.encode_text(tokens)
    expected = oracle.clip_score(picture_vectors.numpy(), text_vectors.numpy())
    assert min(expected) < max(expected)
    for batch_size in (1, 3, 64):
        settings = OpenClipScore(TINY, open_clip_file, device="cpu", batch_size=batch_size)
        assert settings.scores(images, PROMPTS).tolist() == pytest.approx(expected, abs=1e-3)
    cosines = OpenClipScore(TINY, open_clip_file, device="cpu", scale=1)
    assert measure(cosines, images, images, rows(4))["clip_score"]["mean"] == pytest.approx(
        np.mean(expected) / 100, abs=1e-5
    )


BASE = "ViT-B-32-quickgelu"


@pytest.mark.parametrize(
    ("model", "weights", "sentence"),
    [
        ("ViT-Z", "openai", "open_clip knows"),
        (BASE, "laion9", f"neither a file nor one of open_clip's for {BASE}: .*openai"),
        (BASE, "openai", "run `hf download timm/vit_base_patch32_clip_224.openai open_clip_model"),
    ],
    ids=["model", "name", "offline"],
)
def test_what_open_clip_cannot_have_is_told_when_the_job_is_composed(
    model: str, weights: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.quality.open_clip_score.hub_answers", lambda: False)
    with pytest.raises(ValidationError, match=sentence):
        OpenClipScore(model, weights)


def test_a_checkpoint_of_another_model_is_told(open_clip_file: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no weights of open_clip's tiny-test"):
        load_open_clip(TINY, tmp_path / "other.pt", torch.device("cpu"))


def test_weights_that_are_nowhere_are_told_with_their_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValidationError, match=r"no route to host\); download https://.*inception.* or name the file"):
        Inception(None)
    with pytest.raises(ValidationError, match=r"which is no file; download https://.*alexnet"):
        Lpips(tmp_path / "none.pth")


def test_weights_in_torchs_hub_folder_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    content = b"weights"
    for name in ("net.pth", f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"):
        (tmp_path / "checkpoints" / name).write_bytes(content)
        found = weights_file(f"https://example.org/{name}").func(None)  # type: ignore[call-arg]
        assert found == tmp_path / "checkpoints" / name


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"other weights", "not the published file .*; delete it"), (b"<html>", "it is a web page")],
    ids=["others", "a page"],
)
def test_other_weights_in_torchs_hub_folder_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, sentence: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]).write_bytes(content)
    with pytest.raises(ValidationError, match=sentence):
        Inception(None)


@pytest.mark.parametrize("whole", [True, False], ids=["beside weights", "alone"])
def test_code_in_a_networks_file_is_refused_and_never_runs(inception_file: Path, tmp_path: Path, whole: bool) -> None:
    weights = torch.load(inception_file, weights_only=True) if whole else {}
    torch.save({**weights, "extra": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth is damaged or holds more than tensors .*no code"):
        Inception(tmp_path / "evil.pth", device="cpu").load()
    with pytest.raises(ValueError, match=r"evil.pth is damaged or holds more than tensors .*no code"):
        load_network(tmp_path / "evil.pth", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_told(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds no weights of Inception-v3; download it again: "):
        Inception(tmp_path / "other.pth", device="cpu").load()
    with pytest.raises(ValueError, match=r"other.pth holds no weights of AlexNet; download it again: "):
        load_network(tmp_path / "other.pth", torch.device("cpu"))


def test_a_damaged_clip_is_told(tmp_path: Path) -> None:
    shutil.copytree(CLIP_FOLDER, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"it holds model.safetensors, which is a pointer of Git LFS"):
        load_clip(tmp_path / "clip")
