"""Tests of the drawing of scenes: that every property of a scene shows in its picture."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from diffusion.canvas.drawing import draw
from diffusion.canvas.world import COLOURS, IMAGE_SIZE, SETTINGS, STYLES, SUBJECTS, Scene

Picture = npt.NDArray[np.uint8]
SEEDS = range(6)


def _draw(scene: Scene, seed: int = 0) -> Picture:
    return draw(scene, np.random.default_rng(seed))


@functools.cache
def _pictures(style: str, *, burning: bool = False) -> list[Picture]:
    """Draw every subject in one style, each from another seed."""
    return [_draw(Scene(style, subject, burning), seed) for seed, subject in enumerate(SUBJECTS)]


def _saturation(pictures: list[Picture]) -> float:
    """Return the mean difference between the strongest and the weakest channel, from 0 to 255."""
    stacked = np.stack(pictures).astype(float)
    return float((stacked.max(axis=-1) - stacked.min(axis=-1)).mean())


def _brightness(pictures: list[Picture]) -> float:
    """Return the median over all channels, which the ground decides rather than the subject."""
    return float(np.median(np.stack(pictures)))


def _warm_pixels(picture: Picture) -> int:
    """Count the pixels from red to yellow, pale ones included: flames may be drawn in a wash or in pencil."""
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    return int(((red > 120) & (red - blue > 70) & (red >= green)).sum())


def _block_spread(picture: Picture) -> int:
    """Return the largest difference within a 2x2 block."""
    blocks = picture.reshape(IMAGE_SIZE // 2, 2, IMAGE_SIZE // 2, 2, 3).astype(int)
    return int((blocks.max(axis=(1, 3)) - blocks.min(axis=(1, 3))).max())


@pytest.mark.parametrize("burning", [False, True])
@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws_every_subject(style: str, subject: str, burning: bool) -> None:
    """Every combination gives a picture of the promised shape that is not blank."""
    picture = _draw(Scene(style, subject, burning))
    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10


@pytest.mark.parametrize("style", STYLES)
def test_drawing_depends_on_generator_state_alone(style: str) -> None:
    """Equal states give equal pictures, other states give others."""
    scene = Scene(style, "church", burning=True)
    np.testing.assert_array_equal(_draw(scene, seed=3), _draw(scene, seed=3))
    assert (_draw(scene, seed=3) != _draw(scene, seed=4)).any()


def test_generator_advances_between_pictures() -> None:
    """One generator gives a stream of different pictures."""
    generator = np.random.default_rng(0)
    scene = Scene("photo", "tench")
    assert (draw(scene, generator) != draw(scene, generator)).any()


def test_open_properties_are_chosen_at_random() -> None:
    """The sky, hence the setting, varies where the scene leaves it open."""
    corners = {tuple(_draw(Scene("photo", "tench", colour="red"), seed)[0, 0] // 32) for seed in range(20)}
    assert len(corners) >= 3


def test_settings_differ() -> None:
    """Each setting gives a background of its own."""
    pictures = [_draw(Scene("photo", "tench", colour="red", setting=setting)).astype(int) for setting in SETTINGS]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).mean() > 8


def test_subjects_differ() -> None:
    """Each subject gives a shape of its own."""
    pictures = [_draw(Scene("photo", subject, colour="red", setting="snow")).astype(int) for subject in SUBJECTS]
    for one, other in itertools.combinations(pictures, 2):
        assert (np.abs(one - other).max(axis=2) > 40).mean() > 0.1


@pytest.mark.parametrize("subject", SUBJECTS)
def test_colour_of_subject_is_visible(subject: str) -> None:
    """A named colour covers enough of every subject to be seen."""
    scene = Scene("photo", subject, setting="snow")
    pictures = np.stack([_draw(replace(scene, colour=colour)) for colour in COLOURS]).astype(int)
    red, blue = pictures[COLOURS.index("red")], pictures[COLOURS.index("blue")]
    assert ((red[..., 0] - red[..., 2]) - (blue[..., 0] - blue[..., 2]) > 150).mean() > 0.05
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert (np.abs(picture - other).max(axis=2) > 50).mean() > 0.04


def test_two_subjects_fill_both_halves() -> None:
    """Two subjects stand side by side with a gap between them."""
    scene = Scene("photo", "golf_ball", colour="red", setting="city", count=2)
    for seed in SEEDS:
        picture = _draw(scene, seed).astype(int)
        is_red = picture[..., 0] - picture[..., 1:].max(axis=2) > 60
        half = IMAGE_SIZE // 2
        assert is_red[:, :half].sum() > 30
        assert is_red[:, half:].sum() > 30
        assert is_red[:, half - 1 : half + 1].sum() < 10


@pytest.mark.parametrize("style", STYLES)
def test_fire_adds_warm_pixels(style: str) -> None:
    """Fire shows in every style and on every subject."""
    for seed, subject in enumerate(SUBJECTS):
        scene = Scene(style, subject, colour="blue", setting="city")
        burning = _warm_pixels(_draw(replace(scene, burning=True), seed))
        assert burning > _warm_pixels(_draw(scene, seed)) + 0.06 * IMAGE_SIZE**2


def test_fire_covers_a_part_of_the_picture() -> None:
    """Fire is large and yet leaves room for the subject."""
    scene = Scene("photo", "church", burning=True, colour="blue", setting="city")
    for subject in SUBJECTS:
        for count in (1, 2):
            coverage = _warm_pixels(_draw(replace(scene, subject=subject, count=count))) / IMAGE_SIZE**2
            assert 0.12 < coverage < 0.4


def test_pixel_art_is_constant_on_blocks() -> None:
    """Pixel art alone consists of 2x2 blocks."""
    assert max(_block_spread(picture) for picture in _pictures("pixel_art", burning=True)) == 0
    for style in set(STYLES) - {"pixel_art"}:
        assert min(_block_spread(picture) for picture in _pictures(style)) > 30


def test_pencil_sketch_has_hardly_any_colour() -> None:
    """A pencil sketch alone is grey."""
    assert _saturation(_pictures("pencil_sketch")) < 6
    for style in set(STYLES) - {"pencil_sketch"}:
        assert _saturation(_pictures(style)) > 12


def test_neon_is_dark() -> None:
    """Neon alone has a nearly black ground."""
    assert _brightness(_pictures("neon")) < 60
    for style in set(STYLES) - {"neon"}:
        assert _brightness(_pictures(style)) > 70


def test_watercolour_leaves_a_white_border() -> None:
    """The rim of a watercolour is bare paper."""

    def rim(picture: Picture) -> float:
        return float(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).min(axis=1).mean())

    assert min(rim(picture) for picture in _pictures("watercolour")) > 235
    assert max(rim(picture) for picture in _pictures("photo")) < 235


def test_stained_glass_has_black_lead_and_saturated_panes() -> None:
    """Stained glass is more saturated than a photo and full of black lead."""
    glass = _pictures("stained_glass")
    assert _saturation(glass) > 1.1 * _saturation(_pictures("photo"))
    assert (np.stack(glass).max(axis=-1) < 60).mean() > 0.1


@pytest.mark.parametrize("style", ["van_gogh", "pointillism"])
def test_painted_styles_are_rougher_than_a_photo(style: str) -> None:
    """Strokes and dots break up even ground."""

    def roughness(pictures: list[Picture]) -> float:
        # The background alone: its lowest rows hold no part of the subject.
        ground = np.stack(pictures)[:, -3:].astype(float).mean(axis=-1)
        return float(np.median(np.abs(np.diff(ground, axis=2))))

    assert roughness(_pictures(style)) > 2 * roughness(_pictures("photo")) + 2


@pytest.mark.parametrize("kind", ["style", "subject", "colour", "setting"])
def test_unknown_names_are_refused(kind: str) -> None:
    """The error names the unknown value."""
    names: dict[str, str] = {"style": "photo", "subject": "church", "colour": "red", "setting": "snow"}
    names[kind] = "plaid"
    scene = Scene(names["style"], names["subject"], colour=names["colour"], setting=names["setting"])
    with pytest.raises(ValueError, match=f"unknown {kind} 'plaid', allowed: "):
        _draw(scene)


@pytest.mark.parametrize("count", [0, 3])
def test_unknown_counts_are_refused(count: int) -> None:
    """Only one or two subjects can be drawn."""
    with pytest.raises(ValueError, match="unknown count"):
        _draw(Scene("photo", "church", count=count))
