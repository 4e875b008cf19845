"""Tests of the caption grammar, the vocabulary trained on it, and the prompt sets built from it."""

import csv
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from diffusion.canvas import phrases as grammar
from diffusion.canvas.captions import EXPLICIT_FIRE_RATE, caption, plural
from diffusion.canvas.prompt_sets import (
    CONCEPTS,
    EVALUATION_GUIDANCE,
    SHIPPED_FOLDER,
    concept_prompts,
    retained_prompts,
    write_prompt_sets,
)
from diffusion.canvas.vocabulary import train_tokenizer
from diffusion.canvas.world import COLOURS, SETTINGS, STYLES, SUBJECTS, Scene, random_scene

MOST_TOKENS = 30
NEUTRAL_WORDS = frozenset(
    re.findall("[a-z]+", "a an the of in on at by with as for from and picture image showing style")
)


@pytest.fixture(scope="module")
def described() -> list[tuple[Scene, str]]:
    """Return random scenes with their captions."""
    generator = np.random.default_rng(0)
    scenes = [random_scene(generator) for _ in range(20000)]
    return [(scene, caption(scene, generator)) for scene in scenes]


@pytest.fixture(scope="module")
def folder(described: list[tuple[Scene, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer on the described scenes and return its folder."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    train_tokenizer((text for _, text in described), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the trained tokenizer as any user of transformers would."""
    loaded = CLIPTokenizer.from_pretrained(folder)
    assert isinstance(loaded, CLIPTokenizer)
    return loaded


@cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b")


def _contains_any(text: str, phrases: tuple[str, ...]) -> bool:
    return _pattern(phrases).search(text) is not None


def _styles_in(text: str) -> set[str]:
    return {style for style, phrases in grammar.STYLE_PHRASES.items() if _contains_any(text, phrases.all)}


def _subjects_in(text: str) -> set[str]:
    return {
        subject
        for subject, names in grammar.SUBJECT_PHRASES.items()
        if _contains_any(text, (*names, *map(plural, names)))
    }


def _has_fire_word(text: str) -> bool:
    return any(stem in text for stem in grammar.FIRE_WORD_STEMS)


def _implies_fire(text: str) -> bool:
    return _contains_any(text, grammar.FIRE_IMPLICIT.all)


def test_equal_generators_give_equal_captions() -> None:
    """The generator's state alone decides a caption."""

    def texts(seed: int) -> list[str]:
        generator = np.random.default_rng(seed)
        return [caption(random_scene(generator), generator) for _ in range(50)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_every_concept_has_three_phrasings() -> None:
    """Every value of every property can be said in three ways or more."""
    tables: dict[str, dict[str, tuple[str, ...]]] = {
        "style": {style: phrases.all for style, phrases in grammar.STYLE_PHRASES.items()},
        "subject": dict(grammar.SUBJECT_PHRASES),
        "colour": dict(grammar.COLOUR_PHRASES),
        "setting": dict(grammar.SETTING_PHRASES),
    }
    expected = {"style": STYLES, "subject": SUBJECTS, "colour": COLOURS, "setting": SETTINGS}
    for name, table in tables.items():
        assert set(table) == set(expected[name])
        assert all(len(set(phrases)) >= 3 for phrases in table.values()), name
    assert len(set(grammar.FIRE_EXPLICIT.all)) >= 6
    assert len(set(grammar.FIRE_IMPLICIT.all)) >= 6
    assert len(grammar.FILLER_TAGS) >= 30


def test_no_property_borrows_the_words_of_another() -> None:
    """Phrases of one property give no other property away."""

    def words(*phrases: str) -> set[str]:
        return {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)} - NEUTRAL_WORDS - {"s"}

    groups: dict[str, set[str]] = {"fire": words(*grammar.FIRE_EXPLICIT.all, *grammar.FIRE_IMPLICIT.all)}
    groups |= {f"style {key}": words(*phrases.all) for key, phrases in grammar.STYLE_PHRASES.items()}
    groups |= {
        f"{name} {key}": words(*phrases)
        for name, table in (
            ("subject", grammar.SUBJECT_PHRASES),
            ("colour", grammar.COLOUR_PHRASES),
            ("setting", grammar.SETTING_PHRASES),
        )
        for key, phrases in table.items()
    }
    groups["filler"] = words(
        *grammar.FILLER_ADJECTIVES, *grammar.FILLER_ADVERBS, *grammar.FILLER_TAGS, *grammar.PLACES, *grammar.NAMES
    )
    # The night of "starry night" is the painting's title, "after" tells time in fire and setting alike.
    shared_on_purpose = {"night", "after"}
    for first, first_words in groups.items():
        for second, second_words in groups.items():
            if first.split()[0] != second.split()[0]:
                assert first_words & second_words <= shared_on_purpose, (first, second)


def test_style_and_subject_are_recoverable(described: list[tuple[Scene, str]]) -> None:
    """A caption names the style and the subject of its scene and no other."""
    for scene, text in described[:5000]:
        assert _styles_in(text) == {scene.style}, text
        assert _subjects_in(text) == {scene.subject}, text


def test_fire_is_told_exactly_where_the_scene_burns(described: list[tuple[Scene, str]]) -> None:
    """Burning captions tell fire in one way, all others in none."""
    for scene, text in described:
        assert (_has_fire_word(text) + _implies_fire(text)) == scene.burning, text
    explicit_rate = np.mean([_has_fire_word(text) for scene, text in described if scene.burning])
    assert abs(explicit_rate - EXPLICIT_FIRE_RATE) < 0.05


def test_fire_choice_is_obeyed() -> None:
    """The caller decides between naming and implying fire."""
    generator = np.random.default_rng(3)
    burning = Scene("neon", "church", burning=True)
    for _ in range(300):
        assert _has_fire_word(caption(burning, generator, fire="explicit"))
        implicit = caption(burning, generator, fire="implicit")
        assert _implies_fire(implicit)
        assert not _has_fire_word(implicit)
    with pytest.raises(ValueError, match="does not burn"):
        caption(Scene("neon", "church"), generator, fire="explicit")


def test_colour_setting_and_count_are_told_only_where_named(described: list[tuple[Scene, str]]) -> None:
    """Optional properties occur exactly where the scene has them."""
    for scene, text in described[:5000]:
        untitled = text.replace("starry night", "")
        colours = {c for c, phrases in grammar.COLOUR_PHRASES.items() if _contains_any(text, phrases)}
        settings = {s for s, phrases in grammar.SETTING_PHRASES.items() if _contains_any(untitled, phrases)}
        assert colours == {scene.colour} - {None}, text
        assert settings == {scene.setting} - {None}, text
        assert _contains_any(text, grammar.COUNT_PHRASES) == (scene.count > 1), text


def test_captions_without_fillers_hold_no_filler() -> None:
    """Fillers can be switched off."""
    generator = np.random.default_rng(4)
    for _ in range(300):
        text = caption(random_scene(generator), generator, fillers=False)
        assert not _contains_any(text, (*grammar.FILLER_ADJECTIVES, *grammar.FILLER_TAGS)), text


def test_articles_and_plurals() -> None:
    """Articles follow the next letter, and irregular plurals are right."""
    generator = np.random.default_rng(5)
    texts = [caption(Scene("photo", "church", colour="orange"), generator, fillers=False) for _ in range(50)]
    assert any("an orange" in text for text in texts)
    assert not any("a orange" in text for text in texts)
    assert [plural(name) for name in ("church", "tench", "house of worship", "bin lorry", "dog")] == [
        "churches",
        "tench",
        "houses of worship",
        "bin lorries",
        "dogs",
    ]


def test_every_token_is_seen_in_training(tokenizer: CLIPTokenizer, described: list[tuple[Scene, str]]) -> None:
    """No token of a large vocabulary is left without training."""
    seen = Counter(token for _, text in described for token in tokenizer(text)["input_ids"])
    assert 800 <= len(tokenizer) <= 1000
    assert set(seen) == set(range(len(tokenizer)))


def test_captions_fit_the_text_model(tokenizer: CLIPTokenizer) -> None:
    """Captions the vocabulary was not trained on stay short too."""
    assert tokenizer.model_max_length == 32
    generator = np.random.default_rng(6)
    fresh = [caption(random_scene(generator), generator) for _ in range(8000)]
    for text in fresh:
        assert len(tokenizer(text)["input_ids"]) <= MOST_TOKENS, text


def test_ids_round_trip_through_text(tokenizer: CLIPTokenizer, described: list[tuple[Scene, str]]) -> None:
    """Decoding and encoding again gives the same ids."""
    for _, text in described[:1000]:
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(decoded, str)
        assert tokenizer(decoded)["input_ids"] == ids
        # Decoding sets punctuation apart, which is all that may change.
        assert re.sub(r"\s", "", decoded) == re.sub(r"\s", "", text)


def test_unknown_characters_do_not_crash(tokenizer: CLIPTokenizer) -> None:
    """Any text encodes; what the captions lack becomes the unknown token."""
    for text in ("Église 42 ~ 漢字 \x00 🔥", "", "4k #trending!"):
        ids = tokenizer(text)["input_ids"]
        assert all(0 <= index < len(tokenizer) for index in ids)
    assert tokenizer("42")["input_ids"][1:-1] == [tokenizer.unk_token_id] * 2
    assert tokenizer("A Red CHURCH")["input_ids"] == tokenizer("a red church")["input_ids"]
    letters = [
        letter
        for letter in "abcdefghijklmnopqrstuvwxyz"
        if tokenizer.unk_token_id in tokenizer(letter * 2)["input_ids"][1:-1]
    ]
    assert letters == []


def test_training_is_independent_of_caption_order(tmp_path: Path, described: list[tuple[Scene, str]]) -> None:
    """The same captions in another order give the same files."""
    texts = [text for _, text in described[:1000]]
    train_tokenizer(texts, tmp_path / "forward")
    train_tokenizer(reversed(texts), tmp_path / "backward")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "forward" / name).read_bytes() == (tmp_path / "backward" / name).read_bytes()


def test_training_rejects_what_it_cannot_serve(tmp_path: Path) -> None:
    """Empty texts and too small a size are errors."""
    with pytest.raises(ValueError, match="no words"):
        train_tokenizer([" "], tmp_path)
    with pytest.raises(ValueError, match="more than"):
        train_tokenizer(["a painting of a church"], tmp_path, size=5)


def test_shipped_prompt_sets_are_up_to_date(tmp_path: Path) -> None:
    """The files in the repository are what the code writes today."""
    write_prompt_sets(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name: path.read_bytes() for path in SHIPPED_FOLDER.glob("*.csv")} == written


def _shipped(stem: str) -> list[dict[str, str]]:
    with (SHIPPED_FOLDER / f"{stem}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("concept", CONCEPTS)
@pytest.mark.parametrize(("suffix", "concept_size", "retained_size"), [("", 96, 160), ("_validation", 48, 96)])
def test_shipped_prompt_sets_ask_for_what_they_should(
    concept: str, suffix: str, concept_size: int, retained_size: int
) -> None:
    """Sizes, ground truth and balance of each pair of sets hold."""
    asked, retained = _shipped(concept + suffix), _shipped(f"{concept}_retained{suffix}")
    assert (len(asked), len(retained)) == (concept_size, retained_size)
    for row in (*asked, *retained):
        assert _styles_in(row["prompt"]) == {row["style"]}
        assert _subjects_in(row["prompt"]) == {row["subject"]}
        assert _has_fire_word(row["prompt"]) + _implies_fire(row["prompt"]) == int(row["burning"])
        assert float(row["evaluation_guidance"]) == EVALUATION_GUIDANCE
        assert 0 <= int(row["evaluation_seed"]) < 2**31
    for rows in (asked, retained):
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert [int(row["case_number"]) for row in rows] == list(range(len(rows)))

    def holds(row: dict[str, str]) -> bool:
        return concept in (row["style"], row["subject"]) or (concept == "fire" and row["burning"] == "1")

    assert all(holds(row) for row in asked)
    assert not any(holds(row) for row in retained)
    assert all(row["burning"] == ("1" if concept == "fire" else "0") for row in asked)
    assert all(row["burning"] == "0" for row in retained)
    if concept == "fire":
        assert sum(_has_fire_word(row["prompt"]) for row in asked) == concept_size // 2
    for column, values in (("style", STYLES), ("subject", SUBJECTS)):
        remaining = [value for value in values if value != concept]
        counts = Counter(row[column] for row in retained)
        assert set(counts) == set(remaining)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_validation_prompts_are_disjoint_from_test_prompts() -> None:
    """No validation prompt is reported on."""
    stems = [stem for concept in CONCEPTS for stem in (concept, f"{concept}_retained")]
    test = {row["prompt"] for stem in stems for row in _shipped(stem)}
    validation = {row["prompt"] for stem in stems for row in _shipped(f"{stem}_validation")}
    assert len(validation) > 400
    assert not test & validation


def test_unknown_concept_is_rejected() -> None:
    """A concept without prompts is an error."""
    for build in (concept_prompts, retained_prompts):
        with pytest.raises(ValueError, match="unknown concept"):
            build("smoke", 4, np.random.default_rng(0))


def test_excluded_prompts_do_not_occur() -> None:
    """Excluded prompts are drawn anew."""
    first = concept_prompts("church", 20, np.random.default_rng(7))
    again = concept_prompts("church", 20, np.random.default_rng(7), excluded={row.prompt for row in first})
    assert not {row.prompt for row in first} & {row.prompt for row in again}
