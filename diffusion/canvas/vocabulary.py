"""Trains the text model's vocabulary on captions, in the format of CLIP.

Common byte-pair training leaves tokens that no text encodes to: steps on the way to longer tokens. An attack that
searches over all tokens would meet their untrained embeddings. Here a merge is admitted only if both of its parts
still occur often enough elsewhere once it is applied, so every token of the vocabulary is seen in training.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import CLIPTokenizer

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
END_OF_WORD = "</w>"

FEWEST_OCCURRENCES = 10
"""How often both parts of a merge must still occur elsewhere in the training captions, and the merge itself."""

Pair = tuple[str, str]


def train_tokenizer(captions: Iterable[str], folder: Path, *, size: int = 1000, max_length: int = 32) -> None:
    """Train a byte-pair vocabulary on captions and write it for ``CLIPTokenizer.from_pretrained(folder)``.

    Args:
        captions: Training texts.
        folder: Where ``vocab.json``, ``merges.txt``, ``tokenizer_config.json`` and ``special_tokens_map.json`` go;
            created if missing.
        size: Upper bound on the number of tokens, both special tokens included.
        max_length: The tokenizer's ``model_max_length``, in tokens.

    Raises:
        ValueError: ``captions`` holds no word, or its characters alone exceed ``size``.

    """
    word_counts = _count_words(captions)
    if not word_counts:
        raise ValueError("no words to train on")
    alphabet, merges = _learn_merges(word_counts, most_tokens=size - 2)
    # Ids follow the order of learning, special tokens last, as in CLIP.
    tokens = [*alphabet, *("".join(pair) for pair in merges), START_TOKEN, END_TOKEN]

    folder.mkdir(parents=True, exist_ok=True)
    special_tokens = {
        "bos_token": START_TOKEN,
        "eos_token": END_TOKEN,
        "unk_token": END_TOKEN,
        "pad_token": END_TOKEN,
    }
    config = {
        **special_tokens,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special_tokens)
    merge_lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """Count the words as CLIP's own normalisation and pre-tokenisation cut them, in byte-level characters."""
    # An untrained tokenizer carries the same text pipeline as the one that reads the finished folder.
    pipeline = CLIPTokenizer().backend_tokenizer
    counts: Counter[str] = Counter()
    for caption in captions:
        text = pipeline.normalizer.normalize_str(caption)
        counts.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(text))
    return counts


def _learn_merges(word_counts: Counter[str], *, most_tokens: int) -> tuple[list[str], list[Pair]]:
    """Return the alphabet and the merges in order; every token occurs in the final split of some word."""
    words = [[*word[:-1], word[-1] + END_OF_WORD] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: Counter[Pair] = Counter()
    token_counts: Counter[str] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)

    def tally(index: int, sign: int) -> None:
        for token in words[index]:
            token_counts[token] += sign * counts[index]
        for pair in zip(words[index], words[index][1:], strict=False):
            pair_counts[pair] += sign * counts[index]
            words_with[pair].add(index)

    for index in range(len(words)):
        tally(index, 1)
    alphabet = sorted(token_counts)
    if len(alphabet) > most_tokens:
        raise ValueError(f"the captions use {len(alphabet)} characters, more than the {most_tokens} tokens asked for")

    merges: list[Pair] = []
    while len(alphabet) + len(merges) < most_tokens:
        # Ties break by the pair's text, so that the result does not depend on the order of the captions.
        frequent = [(-count, pair) for pair, count in pair_counts.items() if count >= FEWEST_OCCURRENCES]
        for _, pair in sorted(frequent):
            if "".join(pair) in token_counts:
                continue
            merged = {index: _merge(words[index], pair) for index in words_with[pair]}
            if _all_remain(pair, merged, words, counts, token_counts):
                break
        else:
            break
        for index, tokens in merged.items():
            tally(index, -1)
            words[index] = tokens
            tally(index, 1)
        merges.append(pair)
    return alphabet, merges


def _all_remain(
    pair: Pair,
    merged: dict[int, list[str]],
    words: Sequence[Sequence[str]],
    counts: Sequence[int],
    token_counts: Counter[str],
) -> bool:
    """Whether both parts of a merge still occur often enough after the merge."""
    for part in pair:
        removed = sum(
            counts[index] * (words[index].count(part) - tokens.count(part)) for index, tokens in merged.items()
        )
        if token_counts[part] - removed < FEWEST_OCCURRENCES:
            return False
    return True


def _merge(tokens: Sequence[str], pair: Pair) -> list[str]:
    """Return the tokens with every occurrence of the pair joined, from left to right."""
    result: list[str] = []
    position = 0
    while position < len(tokens):
        if tuple(tokens[position : position + 2]) == pair:
            result.append("".join(pair))
            position += 2
        else:
            result.append(tokens[position])
            position += 1
    return result


def _write_json(path: Path, content: dict[str, str] | dict[str, int] | dict[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
