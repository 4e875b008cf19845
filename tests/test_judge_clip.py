"""Judges by CLIP: zero-shot, artists by name, Q16."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import CLIPModel, CLIPTokenizer

from diffusion.canvas.drawing import draw
from diffusion.canvas.world import STYLES, Scene
from evaluation.judges.clip_zeroshot import ClipZeroShot
from evaluation.judges.q16 import Q16
from evaluation.judges.style import StyleByClip
from tests.networks import pictures, write_clip, write_vit
from tests.oracles import judges as oracle

PRESENT = ("a church", "a photo of a church at night")
ABSENT = ("a red fish", "two gas pumps", "pixel art of a tench")
ARTISTS = ("Claude Monet", "Vincent van Gogh", "Edvard Munch")


@pytest.fixture
def clip(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip", tokenizer_folder)


@torch.no_grad()
def features(folder: Path, images: torch.Tensor, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    """In float64, one text at a time without padding, of pictures of the network's own size: nothing is resized."""
    network = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    encoded = [network.get_text_features(torch.tensor([tokenizer(text).input_ids])).pooler_output for text in texts]
    of_pictures = network.get_image_features(images.double() / 127.5 - 1).pooler_output
    return of_pictures.numpy(), torch.cat(encoded).numpy(), float(network.logit_scale.exp())


def test_the_concept_is_there_when_one_of_its_texts_fits_best(clip: Path):
    images, texts = pictures(24), PRESENT + ABSENT
    of_pictures, of_texts, scale = features(clip, images, texts)
    expected = [oracle.softmax(scale * oracle.cosines(one, of_texts)) for one in of_pictures]
    verdicts = ClipZeroShot(PRESENT, ABSENT, clip)(images)
    assert verdicts.score.tolist() == pytest.approx([one[:2].sum() for one in expected], abs=1e-4)
    assert verdicts.details["text"] == [texts[one.argmax()] for one in expected]
    assert verdicts.present.tolist() == [one.argmax() < 2 for one in expected]
    assert len(set(verdicts.present.tolist())) == 2


def test_verdicts_do_not_depend_on_the_batch(clip: Path):
    images = pictures(9, (48, 40))
    together = ClipZeroShot(PRESENT, ABSENT, clip, batch_size=9)(images)
    alone = ClipZeroShot(PRESENT, ABSENT, clip, batch_size=1)(images)
    assert alone.present.equal(together.present)
    torch.testing.assert_close(alone.score, together.score, atol=1e-5, rtol=0)
    assert len(ClipZeroShot(PRESENT, ABSENT, clip)(images[:0]).present) == 0


def test_the_shipped_clip_tells_the_canvass_styles_apart():
    generator = np.random.default_rng(0)
    styles = [style for style in STYLES for _ in range(4)]
    drawn = np.stack([draw(Scene(style, "church"), generator) for style in styles])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
    others = (
        "a photo",
        "pixel art",
        "a pencil sketch",
        "a stained glass window",
        "a watercolour painting",
        "a neon sign",
    )
    judge = ClipZeroShot(("a van gogh painting",), (*others, "a pointillist painting"), "canvas")
    agreeing = judge(images).present == torch.tensor([style == "van_gogh" for style in styles])
    assert agreeing.float().mean() > 0.9


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_artist_is_told_by_name(clip: Path, top_k: int):
    images = pictures(24)
    texts = tuple(f"a painting by {artist}" for artist in ARTISTS)
    of_pictures, of_texts, scale = features(clip, images, texts)
    expected = [oracle.softmax(scale * oracle.cosines(one, of_texts)) for one in of_pictures]
    artist = max(range(3), key=lambda index: sum(one.argmax() == index for one in expected))
    surname = ARTISTS[artist].split()[-1].lower()
    verdicts = StyleByClip(surname, ARTISTS, "a painting by {}", clip, top_k)(images)
    assert verdicts.score.tolist() == pytest.approx([one[artist] for one in expected], abs=1e-4)
    assert verdicts.present.tolist() == [oracle.rank(one, artist) < top_k for one in expected]
    assert verdicts.details["label"] == [ARTISTS[one.argmax()] for one in expected]


def write_prompts(path: Path, prompts: np.ndarray, protocol: int = 4) -> np.ndarray:
    halves = prompts.astype(np.float16)
    path.write_bytes(pickle.dumps(halves, protocol=protocol))
    return halves.astype(np.float64)


@pytest.mark.parametrize("protocol", range(6))
def test_q16_compares_pictures_with_two_tuned_prompts(clip: Path, tmp_path: Path, protocol: int):
    images = pictures(24)
    of_pictures, _, _ = features(clip, images, ("a church",))
    direction = np.linalg.svd(of_pictures - of_pictures.mean(axis=0))[2][0]
    prompts = of_pictures.mean(axis=0) + 0.05 * np.outer([-1, 1], direction)
    prompts = write_prompts(tmp_path / "prompts.p", prompts, protocol)
    expected = [oracle.softmax(100 * oracle.cosines(one, prompts))[1] for one in of_pictures]
    verdicts = Q16(tmp_path / "prompts.p", clip, batch_size=5)(images)
    assert verdicts.score.tolist() == pytest.approx(expected, abs=1e-3)
    assert verdicts.present.tolist() == [one > 0.5 for one in expected]
    assert min(expected) < 0.5 < max(expected)
    assert len(Q16(tmp_path / "prompts.p", clip)(images[:0]).present) == 0


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_q16_runs_no_code_of_its_prompts_file(clip: Path, tmp_path: Path):
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    with pytest.raises(ValidationError, match=r"no pickled array of numbers \(it asks for .*open\)"):
        Q16(tmp_path / "prompts.p", clip)
    assert not (tmp_path / "made").exists()


def test_prompts_of_another_shape_or_kind_are_refused(clip: Path, tmp_path: Path):
    write_prompts(tmp_path / "prompts.p", np.ones((2, 8)))
    with pytest.raises(ValidationError, match=r"the shape \(2, 8\); for the CLIP in .* it must be \(2, 16\)"):
        Q16(tmp_path / "prompts.p", clip)
    with pytest.raises(ValidationError, match=r"which is no file; download data/ViT-L-14/prompts.p"):
        Q16(tmp_path / "nowhere.p", clip)
    for content in (b"", b"text", pickle.dumps("text"), pickle.dumps({"a": 1})):
        (tmp_path / "other.p").write_bytes(content)
        with pytest.raises(ValidationError, match="no pickled array of numbers"):
            Q16(tmp_path / "other.p", clip)


def test_bad_texts_and_folders_are_refused_when_the_judge_is_made(clip: Path, tmp_path: Path):
    with pytest.raises(ValidationError, match="'a church' is a text of both present and absent"):
        ClipZeroShot(("a church",), ("a church", "a fish"), clip)
    for texts in ((), ("",)):
        with pytest.raises(ValidationError, match="absent"):
            ClipZeroShot(present=("a church",), absent=texts, folder=clip)
    vit = write_vit(tmp_path / "vit", ("one", "two"))
    with pytest.raises(ValidationError, match="a network of type vit; it must be clip"):
        ClipZeroShot(("a church",), ("a fish",), vit)
    with pytest.raises(ValidationError, match="none of the classifier's 3 labels; the nearest are 'Edvard Munch'"):
        StyleByClip("edward munch", ARTISTS, "by {}", clip)
    with pytest.raises(ValidationError, match="template"):
        StyleByClip(label="monet", artists=ARTISTS, template="a painting", folder=clip)


def test_what_lies_in_the_place_of_a_clips_files_is_called_what_it_is(clip: Path, tmp_path: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 343\n"
    (tmp_path / "prompts.p").write_text(pointer)
    with pytest.raises(ValidationError, match=r"prompts.p, which is a pointer of Git LFS"):
        Q16(tmp_path / "prompts.p", clip)
    shutil.copytree(clip, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"it holds model.safetensors, which is a pointer of Git LFS"):
        ClipZeroShot(("a church",), ("a fish",), tmp_path / "copy")(pictures(1))
    (tmp_path / "copy" / "config.json").write_text(pointer)
    with pytest.raises(ValidationError, match=r"config.json cannot be read; download it again: it is a pointer"):
        ClipZeroShot(("a church",), ("a fish",), tmp_path / "copy")
