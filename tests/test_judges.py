from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from diffusion.canvas.classifier import HEADS, CanvasClassifier
from evaluation.judges.canvas import CanvasJudge


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    gains = torch.rand((260, 3, 1, 1), generator=generator)
    return (gains * torch.randint(0, 256, (260, 3, 32, 32), generator=generator)).to(torch.uint8)


@pytest.fixture
def classifier_folder(tmp_path: Path, images: torch.Tensor) -> Path:
    torch.manual_seed(0)
    classifier = CanvasClassifier(width=4).eval()
    with torch.no_grad():
        features = classifier.features(images)
        for layer in classifier.heads.values():
            layer.weight *= 30
            layer.bias -= layer(features).mean(dim=0)  # so that verdicts differ between random pictures
    classifier.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("head", list(HEADS))
def test_verdicts_follow_the_classifiers_softmax(classifier_folder: Path, images: torch.Tensor, head: str):
    network = CanvasClassifier.from_pretrained(classifier_folder).double()
    probabilities = network(images)[head].exp()
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    label = HEADS[head][int(probabilities.argmax(dim=1).mode().values)]

    verdicts = CanvasJudge(head, label, classifier_folder)(images)

    expected = [HEADS[head][index] for index in probabilities.argmax(dim=1)]
    assert verdicts.details["label"] == expected
    assert verdicts.present.dtype == torch.bool
    assert verdicts.present.tolist() == [name == label for name in expected]
    assert 0 < verdicts.present.sum() < len(images)
    torch.testing.assert_close(verdicts.score, probabilities[:, HEADS[head].index(label)].float(), atol=1e-5, rtol=0)


def test_a_verdict_does_not_depend_on_its_batch(classifier_folder: Path, images: torch.Tensor):
    judge = CanvasJudge("subject", "church", classifier_folder)
    together = judge(images)
    alone = [judge(image[None]) for image in images[:8]]
    assert [bool(each.present) for each in alone] == together.present[:8].tolist()
    torch.testing.assert_close(torch.cat([each.score for each in alone]), together.score[:8], atol=1e-5, rtol=0)


def test_no_pictures_no_verdicts(classifier_folder: Path):
    verdicts = CanvasJudge("style", "neon", classifier_folder)(torch.empty((0, 3, 32, 32), dtype=torch.uint8))
    assert len(verdicts.present) == len(verdicts.score) == len(verdicts.details["label"]) == 0


@pytest.mark.parametrize(
    ("head", "label", "message"),
    [
        ("style", "church", "label is 'church'; the canvas judge's head 'style' knows photo, van_gogh"),
        ("burning", "fire", "knows no, yes"),
        ("mood", "neon", "'style', 'subject' or 'burning'"),
    ],
)
def test_unknown_heads_and_labels_are_refused_before_anything_is_loaded(head: str, label: str, message: str):
    with pytest.raises(ValidationError, match=message):
        CanvasJudge(head, label, Path("nowhere"))


def test_a_missing_classifier_is_named_at_the_first_call(images: torch.Tensor):
    judge = CanvasJudge("style", "neon", Path("nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere holds no canvas classifier"):
        judge(images[:1])
