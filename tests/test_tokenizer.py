"""Prompts are cut into the tokens that CLIP's authors cut them into."""

import pytest
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from diffusion.model import TextToImage
from diffusion.text.tokenizer import CleaningTokenizer, cleaned

TEXTS = [
    "a painting of a church",
    "Vincent van Gogh\u2019s \u201cstarry night\u201d \u2026",
    "the \ufb01elds \u2014 o\ufb00ice",
    "caf\u00c3\u00a9 by the sea",
    "\uff26\uff35\uff2c\uff2c width",
    "rock &amp; roll &quot;live&quot;",
    "a\u00a0b\u3000c\u200b d",
    "line\r\nbreaks\u2028and\x1b[31mcolour\x1b[0m",
    "\u65e5\u672c\u306e\u6559\u4f1a, \u0446\u0435\u0440\u043a\u043e\u0432\u044c",
    "l\u2019\u00e9t\u00e9 e\u0301t\u00e9",
]


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    """The authors' tokenizer, as open_clip keeps it."""
    return SimpleTokenizer(clean="lower")


@pytest.fixture(scope="module")
def plain(reference: SimpleTokenizer) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab={text.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): number
               for text, number in reference.encoder.items()},
        merges=list(reference.bpe_ranks),
    )  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_authors_clean_up(text: str, reference: SimpleTokenizer, plain: CLIPTokenizer) -> None:
    assert CleaningTokenizer(plain)(text, add_special_tokens=False).input_ids == reference.encode(text)
    assert CleaningTokenizer(plain)([text], add_special_tokens=False).input_ids == [reference.encode(text)]


def test_without_the_clean_up_some_differ(reference: SimpleTokenizer, plain: CLIPTokenizer) -> None:
    different = [text for text in TEXTS if plain(text, add_special_tokens=False).input_ids != reference.encode(text)]
    assert len(different) >= 5


def test_plain_english_is_not_touched() -> None:
    text = "a photo of 2 churches, 'red' & <old>"
    assert cleaned(text) == text


def test_every_reader_of_a_models_prompts_cleans_them(tiny_model: TextToImage) -> None:
    curly, straight = "van gogh\u2019s church", "van gogh's church"
    assert tiny_model.tokenize([curly]).equal(tiny_model.tokenize([straight]))
    assert tiny_model.tokenizer(curly).input_ids == tiny_model.tokenizer(straight).input_ids
    assert tiny_model.tokenizer.plain(curly).input_ids != tiny_model.tokenizer(straight).input_ids
