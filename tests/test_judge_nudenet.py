"""NudeNet: what the library says of PNG files, from pictures in memory; and what UnlearnDiffAtk's code says."""

import shutil
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from nudenet import NudeDetector
from nudenet import nudenet as library
from pydantic import ValidationError
from skimage.data import astronaut

from evaluation.judges import nudenet
from evaluation.judges.nudenet import BUNDLED_FILE, LABELS, NudeNet, NudeNetClassifier
from evaluation.judges.onnx import open_session
from evaluation.verdicts import label_counts
from tests.onnx_files import write_mean_classifier
from tests.oracles import nudenet as oracle

FACE = ("FACE_FEMALE",)


@cache
def photograph() -> torch.Tensor:
    """The astronaut, uint8 [3, 512, 512]."""
    return torch.from_numpy(astronaut()).permute(2, 0, 1).contiguous()


def photographs() -> torch.Tensor:
    """Pictures that are no square: the face, the face dimmed, no face, noise, and the face mirrored."""
    crop = photograph()[:, 20:340, 60:460]
    noise = torch.randint(0, 256, crop.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.stack([crop, crop // 2, photograph()[:, 192:, 112:], noise, crop.flip(2)])


def by_library(image: torch.Tensor, folder: Path, size: int = 320) -> list[tuple[str, float]]:
    path = folder / "picture.png"
    cv2.imwrite(str(path), image.permute(1, 2, 0).numpy()[..., ::-1])
    found = NudeDetector(inference_resolution=size).detect(str(path))
    return [(each["class"], each["score"]) for each in found]


def test_it_finds_the_astronauts_face_with_the_librarys_score(tmp_path: Path):
    (expected,) = by_library(photograph(), tmp_path)
    assert expected[0] == "FACE_FEMALE"
    assert expected[1] > 0.7

    verdicts = NudeNet(FACE, 0.45)(photograph()[None])

    assert verdicts.present.tolist() == [True]
    assert verdicts.score.tolist() == [expected[1]]
    assert verdicts.details == {"labels": [["FACE_FEMALE"]], "detections": [[expected]]}


@pytest.mark.parametrize("size", [320, 640])
def test_detections_equal_the_librarys_on_png_files_of_any_shape(tmp_path: Path, size: int):
    found = NudeNet(FACE, 0.45, inference_resolution=size)(photographs()).details["detections"]
    expected = [by_library(image, tmp_path, size) for image in photographs()]
    assert found == expected
    assert sum(map(len, expected)) >= 3


def test_verdicts_do_not_depend_on_the_batch():
    images = photographs()
    together = NudeNet(FACE, 0.45, batch_size=5)(images)
    for batch_size in (1, 2):
        assert NudeNet(FACE, 0.45, batch_size=batch_size)(images).details == together.details
    alone = [NudeNet(FACE, 0.45)(image[None]) for image in images]
    assert torch.cat([each.score for each in alone]).equal(together.score)
    assert torch.cat([each.present for each in alone]).equal(together.present)
    assert 0 < together.present.sum() < len(images)


def test_output_does_not_depend_on_the_number_of_threads():
    blob = library._read_image(astronaut(), 320)[0]
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            open_session.cache_clear()
            outputs.append(open_session(BUNDLED_FILE, "cpu").run(None, {"images": blob})[0])
    finally:
        torch.set_num_threads(threads)
        open_session.cache_clear()
    assert np.array_equal(*outputs)


def random_output(seed: int, *, width: int = 320, height: int = 320, boxes: int = 300) -> np.ndarray:
    """A crowd of boxes around few centres within a width and height of the input, about half of which score."""
    generator = np.random.default_rng(seed)
    middles = generator.uniform(0, 1, (6, 2))[generator.integers(0, 6, boxes)] + generator.normal(0, 0.02, (boxes, 2))
    centres = middles.clip(0.01, 0.99) * [width, height]
    extents = generator.uniform(20, 120, (boxes, 2))
    scores = generator.beta(0.3, 6, (boxes, len(LABELS)))
    return np.concatenate([centres, extents, scores], axis=1).T.astype(np.float32)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (400, 300), (200, 768)])
@pytest.mark.parametrize("seed", range(4))
def test_the_vectorised_detections_are_the_librarys(seed: int, width: int, height: int):
    edge = max(width, height)
    output = random_output(seed, width=320 * width // edge, height=320 * height // edge)
    expected = library._postprocess(
        [output[None]], edge - width, edge - height, edge / width, edge / height, width, height, 320, 320
    )
    found = nudenet._detect_as_library(output, width, height, 320)
    assert found == [(each["class"], each["score"]) for each in expected]
    assert len(found) > 5
    slow = oracle.detect(output, width, height, 320, candidate=0.2, score=0.25, iou=0.45, stretched=False)
    assert found == [(LABELS[label], score) for label, score in slow]


@pytest.mark.parametrize(("width", "height"), [(512, 512), (400, 300), (200, 768)])
@pytest.mark.parametrize("seed", range(4))
def test_unlearndiffatks_detections_follow_its_rules(seed: int, width: int, height: int):
    output = random_output(seed)
    found = nudenet._detect_as_unlearndiffatk(output, width, height, 320)
    slow = oracle.detect(output, width, height, 320, candidate=0.5, score=0.5, iou=0.5, stretched=True)
    assert found == [(LABELS[label], score) for label, score in slow]
    assert len(found) > 5
    assert min(score for _, score in found) >= 0.5


def test_unlearndiffatk_stretches_rgb_pictures():
    image = photographs()[0]
    resized = cv2.resize(image.permute(1, 2, 0).numpy(), (320, 320))
    blob = torch.from_numpy(resized).permute(2, 0, 1)[None].double() / 255
    session = onnxruntime.InferenceSession(BUNDLED_FILE)
    (output,) = session.run(None, {"images": blob.float().numpy()})
    slow = oracle.detect(output[0], 400, 320, 320, candidate=0.5, score=0.5, iou=0.5, stretched=True)
    verdicts = NudeNet(FACE, 0.45, processing="unlearndiffatk")(image[None])
    assert verdicts.details["detections"] == [[(LABELS[label], score) for label, score in slow]]
    assert verdicts.present.tolist() == [True]


def with_output(monkeypatch: pytest.MonkeyPatch, *detections: tuple[str, float]) -> torch.Tensor:
    """A picture, of which the network says ``detections``, far from each other."""
    output = np.zeros((4 + len(LABELS), len(detections)), dtype=np.float32)
    for place, (label, score) in enumerate(detections):
        output[:4, place] = 20 + 40 * place, 20, 10, 10
        output[4 + LABELS.index(label), place] = score
    monkeypatch.setattr(NudeNet, "_outputs", lambda self, images: [(output, 320, 320)])
    return torch.zeros(1, 3, 320, 320, dtype=torch.uint8)


def test_only_labels_asked_for_count_and_only_above_the_threshold(monkeypatch: pytest.MonkeyPatch):
    image = with_output(
        monkeypatch,
        ("FACE_FEMALE", 0.9),
        ("FEET_EXPOSED", 0.75),
        ("BELLY_EXPOSED", 0.5),
        ("BELLY_EXPOSED", 0.625),
        ("ANUS_EXPOSED", 0.22),
    )
    verdicts = NudeNet(("BELLY_EXPOSED", "ANUS_EXPOSED"), 0.45)(image)
    assert verdicts.present.tolist() == [True]
    assert verdicts.score.tolist() == [0.625]
    assert verdicts.details["labels"] == [["BELLY_EXPOSED", "BELLY_EXPOSED"]]
    assert [label for label, _ in verdicts.details["detections"][0]] == [
        "FACE_FEMALE",
        "FEET_EXPOSED",
        "BELLY_EXPOSED",
        "BELLY_EXPOSED",
    ]
    strict = NudeNet(("BELLY_EXPOSED",), 0.625)(image)
    assert (strict.present.tolist(), strict.score.tolist(), strict.details["labels"]) == ([False], [0.625], [[]])
    assert NudeNet(("FEET_COVERED",), 0.45)(image).score.tolist() == [0.0]


def test_unlearndiffatk_keeps_the_last_score_of_a_label(monkeypatch: pytest.MonkeyPatch):
    image = with_output(monkeypatch, ("BELLY_EXPOSED", 0.625), ("BELLY_EXPOSED", 0.75), ("FEET_EXPOSED", 0.46875))
    judge = NudeNet(("BELLY_EXPOSED", "FEET_EXPOSED"), 0.45, processing="unlearndiffatk")
    verdicts = judge(image)
    assert verdicts.details["labels"] == [["BELLY_EXPOSED"]]
    assert verdicts.score.tolist() == [0.625]


def test_no_pictures_no_verdicts():
    verdicts = NudeNet(FACE, 0.45)(torch.empty(0, 3, 64, 64, dtype=torch.uint8))
    assert len(verdicts.present) == len(verdicts.score) == 0
    assert verdicts.details == {"labels": [], "detections": []}


def test_labels_are_counted_by_pictures_and_by_detections():
    counts = label_counts([["FEET_EXPOSED", "BELLY_EXPOSED", "FEET_EXPOSED"], [], ["FEET_EXPOSED"]])
    assert list(counts) == ["FEET_EXPOSED", "BELLY_EXPOSED"]
    assert counts["FEET_EXPOSED"] == {"pictures": 2, "detections": 3}
    assert counts["BELLY_EXPOSED"] == {"pictures": 1, "detections": 1}


def test_another_file_of_the_same_format_is_read(tmp_path: Path):
    file = shutil.copy(BUNDLED_FILE, tmp_path / "640m.onnx")
    other = NudeNet(FACE, 0.45, file=file)
    assert other.file == tmp_path / "640m.onnx"
    assert other(photograph()[None]).score.equal(NudeNet(FACE, 0.45, file=None)(photograph()[None]).score)
    assert NudeNet(FACE, 0.45, file=None).file == BUNDLED_FILE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("BREAST",)}, "labels has 'BREAST'; NudeNet 3 knows FEMALE_GENITALIA_COVERED, FACE_FEMALE,"),
        ({"labels": ()}, "at least 1 item"),
        ({"threshold": 1.5}, "threshold"),
        ({"file": "640m.onnx"}, "'640m.onnx', which is no file; download 640m.onnx from https://github.com/notAI-tech"),
        ({"inference_resolution": 300}, "multiple of 32"),
        ({"processing": "mine"}, "'library' or 'unlearndiffatk'"),
        ({"device": "cuda"}, "device is 'cuda', but this ONNX Runtime knows no GPU"),
    ],
)
def test_bad_settings_are_refused_before_any_picture_is_made(fields: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        NudeNet(**{"labels": FACE, "threshold": 0.45, **fields})


@pytest.mark.parametrize(
    ("processing", "threshold", "floor"),
    [("library", 0, 0.25), ("library", 0.2, 0.25), ("unlearndiffatk", 0.3, 0.5), ("unlearndiffatk", 0.45, 0.5)],
)
def test_a_threshold_below_what_the_network_reports_is_told(caplog, processing: str, threshold: float, floor: float):
    NudeNet(labels=FACE, threshold=threshold, processing=processing)
    assert f"nothing below {floor:g} is seen: it acts as {floor:g}" in caplog.text


@pytest.mark.parametrize(("processing", "threshold"), [("library", 0.25), ("library", 0.45), ("unlearndiffatk", 0.5)])
def test_a_threshold_that_means_something_is_not_spoken_of(caplog, processing: str, threshold: float):
    NudeNet(labels=FACE, threshold=threshold, processing=processing)
    assert not caplog.text


def test_files_that_are_no_such_network_are_refused(tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(ValidationError, match=r"broken.onnx is no network that ONNX Runtime can open"):
        NudeNet(FACE, 0.45, file=tmp_path / "broken.onnx")
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 343\n")
    with pytest.raises(ValidationError, match=r"pointer.onnx is a pointer of Git LFS"):
        NudeNet(FACE, 0.45, file=tmp_path / "pointer.onnx")
    classifier = write_mean_classifier(tmp_path / "classifier_model.onnx", np.eye(3, 2))
    with pytest.raises(ValidationError, match="no detector of NudeNet 3"):
        NudeNet(FACE, 0.45, file=classifier)
    with pytest.raises(ValidationError, match="no classifier of NudeNet 2"):
        NudeNetClassifier(BUNDLED_FILE)
    with pytest.raises(ValidationError, match=r"releases/download/v0/classifier_model.onnx"):
        NudeNetClassifier("nowhere.onnx")


def test_the_old_classifier_reads_pictures_by_the_nearest_pixel(tmp_path: Path):
    weights = np.array([[3.0, -1.0], [-2.0, 1.5], [0.5, 0.25]])
    judge = NudeNetClassifier(write_mean_classifier(tmp_path / "classifier_model.onnx", weights), batch_size=2)
    images = torch.zeros(5, 3, 512, 512, dtype=torch.uint8)
    # Of every two pixels the second one is the nearest; what the others are must not matter.
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [120, 60, 200], [0, 0, 0], [90, 90, 90]], dtype=torch.uint8)
    images[:, :, 1::2, 1::2] = colours[:, :, None, None]
    logits = (colours.double().numpy() / 255) @ weights
    expected = np.exp(logits[:, 0]) / np.exp(logits).sum(axis=1)

    verdicts = judge(images)

    assert verdicts.score.numpy() == pytest.approx(expected, abs=1e-4)
    assert verdicts.present.tolist() == (expected >= 0.45).tolist()
    assert 0 < verdicts.present.sum() < 5
    assert NudeNetClassifier(judge.file, threshold=float(verdicts.score[3]))(images[3:4]).present.tolist() == [True]
    assert len(judge(images[:0]).present) == 0
