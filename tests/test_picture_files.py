"""Pictures of others are read as they are to be looked at, whatever their format; what is none is told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.picture_files import is_picture_file, picture_suffixes, read_picture_file
from evaluation.quality.distances import _picture_files
from experiments.instruments.labelled_pictures import list_pictures
from tests.test_imports import STAND_INS

GREYS = np.linspace(0, 65535, 64 * 48).round().astype(np.uint16).reshape(48, 64)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_sixteen_bits_become_eight_with_all_their_greys(tmp_path, name):
    Image.fromarray(GREYS).save(tmp_path / name)

    pixels = read_picture_file(tmp_path / name)

    assert pixels.shape == (3, 48, 64)
    assert pixels.dtype == torch.uint8
    expected = torch.from_numpy(np.floor(GREYS.astype(np.float64) / 257 + 0.5).astype(np.uint8))
    assert (pixels.int() - expected.int()).abs().max() <= 0
    assert len(pixels.unique()) == 256


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_turn_that_the_camera_noted_is_made(tmp_path, orientation, turn, suffix):
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / f"turned.{suffix}", exif=exif, quality=95)

    pixels = read_picture_file(tmp_path / f"turned.{suffix}")

    expected = torch.from_numpy(np.rot90(picture, turn).copy()).permute(2, 0, 1)
    assert pixels.shape == expected.shape
    assert (pixels.float() - expected.float()).abs().mean() < 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_colour_becomes_rgb(tmp_path, mode):
    Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode).save(tmp_path / "white.tif")
    assert (read_picture_file(tmp_path / "white.tif") == 255).all()


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "ppm", "jp2", "avif", "tga", "ico"]
)
def test_every_usual_format_is_found_and_read(tmp_path, suffix):
    file = tmp_path / f"A.{suffix.upper()}"
    Image.new("RGB", (32, 32), (200, 100, 50)).save(file)

    assert is_picture_file(file, tmp_path)
    assert read_picture_file(file).shape == (3, 32, 32)


def test_values_without_a_white_are_refused(tmp_path):
    for name, values in (("float.tif", np.ones((4, 4), np.float32)), ("long.tif", np.full((4, 4), 70000, np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is no picture .*white is not known; save it as PNG"):
            read_picture_file(tmp_path / name)


def test_a_program_that_draws_is_no_picture_whatever_it_is_called(tmp_path):
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"page.png is no picture"):
        read_picture_file(tmp_path / "page.png")
    assert not {".eps", ".ps", ".wmf", ".h5", ".mpg"} & picture_suffixes()


@pytest.mark.parametrize(("content", "sentence"), STAND_INS.values(), ids=STAND_INS)
def test_what_lies_in_a_pictures_place_is_called_what_it_is(tmp_path, content, sentence):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_picture_file(tmp_path / "a.png")


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    shown = [tmp_path / "present" / "a.png", tmp_path / "present" / "deep" / "b.TIFF"]
    hidden = [
        tmp_path / "present" / "._a.png",
        tmp_path / "present" / ".thumbnails" / "a.png",
        tmp_path / "present" / "notes.txt",
    ]
    for file in (*shown, *hidden):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file, format="PNG")
    (tmp_path / "present" / "folder.png").mkdir()

    assert list(_picture_files(tmp_path)) == shown
    assert list_pictures(tmp_path) == [(file, True) for file in shown]


def test_a_folder_below_a_hidden_one_has_its_pictures(tmp_path):
    file = tmp_path / ".cache" / "real" / "a.png"
    file.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(file)
    assert list(_picture_files(file.parent)) == [file]


def test_only_files_are_pictures(tmp_path):
    (tmp_path / "x.png").mkdir()
    assert not is_picture_file(tmp_path / "x.png", tmp_path)
    assert not is_picture_file(Path(tmp_path / "none.png"), tmp_path)
