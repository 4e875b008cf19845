"""Textual inversions of every tool become tokens of a model, whose embeddings prompts, attacks and pictures meet."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from attacks.prompt_search import candidate_tokens
from diffusion.added_tokens import add_embeddings, read_embeddings
from diffusion.loading import ModelSource
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from tests.conftest import make_tiny_pipeline
from tests.test_checkpoints import erased
from tests.test_loading import Evil
from tests.test_sdxl import make_tiny_sdxl

ONE = torch.linspace(-1, 1, 32)
THREE = torch.stack([ONE, ONE.flip(0), ONE**2])

FILES: dict[str, tuple[str, str, Callable[[Path, Tensor], object]]] = {
    "diffusers, pickled": ("learned_embeds.bin", "<cat-toy>", lambda path, rows: torch.save({"<cat-toy>": rows}, path)),
    "diffusers": ("learned_embeds.safetensors", "<cat-toy>", lambda path, rows: save_file({"<cat-toy>": rows}, path)),
    "the WebUI, pickled": (
        "style.pt",
        "my-style",
        lambda path, rows: torch.save(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "my-style", "step": 3}, path
        ),
    ),
    "the WebUI, without a name": (
        "style.pt",
        "style",
        lambda path, rows: torch.save({"string_to_param": {"*": rows}}, path),
    ),
    "the WebUI": ("style.safetensors", "style", lambda path, rows: save_file({"emb_params": rows}, path)),
}


@pytest.fixture
def pipeline(tokenizer_folder: Path) -> StableDiffusionPipeline:
    return make_tiny_pipeline(tokenizer_folder)


@pytest.mark.parametrize("rows", [ONE, ONE[None], THREE], ids=["flat", "one", "three"])
@pytest.mark.parametrize(("name", "token", "write"), FILES.values(), ids=FILES)
def test_a_prompt_with_the_token_meets_its_embeddings(pipeline, tmp_path, name, token, write, rows):
    write(tmp_path / name, rows)
    rows = torch.atleast_2d(rows)
    old = len(pipeline.tokenizer)

    assert add_embeddings(pipeline, tmp_path / name) == [token]
    model = TextToImage(pipeline)

    ids = model.tokenize([f"a church in {token} paint"])[0].tolist()
    added = [number for number in ids if number >= old]
    assert torch.equal(model.token_embeddings(torch.tensor(added)), rows)
    assert len(model.vocabulary) == len(pipeline.tokenizer) == old + len(rows)
    plain = model.tokenize(["a church in paint"])[0].tolist()
    assert [number for number in ids if number < old][:5] == plain[:5]


def test_the_text_embedding_is_that_of_the_sequence_with_the_rows_in_it(pipeline, tmp_path):
    torch.save({"<s>": THREE}, tmp_path / "s.bin")
    add_embeddings(pipeline, tmp_path / "s.bin")
    model = TextToImage(pipeline)

    template = PromptTemplate.insert(model, ["a church"], 3, "suffix_k")

    by_hand = template.encode(model, THREE[None])
    torch.testing.assert_close(model.encode(["a church <s>"]), by_hand)
    assert not torch.allclose(model.encode(["a church"]), by_hand)


def test_text_of_the_tokens_is_read_back_as_them(pipeline, tmp_path):
    torch.save({"<s>": THREE, "<t>": ONE}, tmp_path / "s.bin")
    assert add_embeddings(pipeline, tmp_path / "s.bin") == ["<s>", "<t>"]
    tokenizer = pipeline.tokenizer
    ids = tokenizer("a <s> and <t> <S>").input_ids
    again = tokenizer(tokenizer.decode(ids, skip_special_tokens=True)).input_ids

    old = len(tokenizer) - 4
    assert [number for number in ids if number >= old] == [old, old + 1, old + 2, old + 3, old, old + 1, old + 2]
    assert [number for number in again if number >= old] == [number for number in ids if number >= old]
    model = TextToImage(pipeline)
    assert set(range(len(tokenizer) - 4, len(tokenizer))) <= set(candidate_tokens(model).tolist())


def test_a_model_with_another_token_is_another_model(tokenizer_folder, tmp_path):
    prints = {TextToImage(make_tiny_pipeline(tokenizer_folder)).fingerprint()}
    for token in ("<a>", "<b>"):
        pipeline = make_tiny_pipeline(tokenizer_folder)
        torch.save({token: ONE}, tmp_path / "t.bin")
        add_embeddings(pipeline, tmp_path / "t.bin")
        prints.add(TextToImage(pipeline).fingerprint())
    assert len(prints) == 3


def test_a_source_loads_its_embeddings(world, tmp_path):
    torch.save({"<s>": ONE}, tmp_path / "learned_embeds.bin")
    model = ModelSource(str(world / "model"), device="cpu", embeddings=(tmp_path,)).load()

    assert torch.equal(model.vocabulary[-1], ONE)
    pictures = model.generate(["a <s> church", "a church"], seeds=[1, 1], steps=2, guidance=3.0)
    assert not torch.equal(pictures[0], pictures[1])


def test_sdxls_two_encoders_get_theirs(tokenizer_folder, tmp_path):
    pipeline = make_tiny_sdxl(tokenizer_folder)
    widths = [part.get_input_embeddings().weight.shape[1] for part in (pipeline.text_encoder, pipeline.text_encoder_2)]
    rows = [torch.linspace(-1, 1, width)[None] for width in widths]
    save_file({"clip_l": rows[0], "clip_g": rows[1]}, tmp_path / "style.safetensors")

    assert add_embeddings(pipeline, tmp_path / "style.safetensors") == ["style"]

    model = TextToImage(pipeline)
    assert torch.equal(model.vocabulary[-1], torch.cat(rows, dim=1)[0])
    # The pooled embedding is read at the text's end, which no added token is.
    assert model.encode(["a church style"]).isfinite().all()
    short = tmp_path / "short.safetensors"
    save_file({"emb_params": rows[0]}, short)
    with pytest.raises(ValueError, match=r"width \d+, and the model's text has \d+ and \d+"):
        add_embeddings(pipeline, short)


WRONG = {
    "of another width": (lambda path: torch.save({"<s>": torch.ones(7)}, path), "width 7, and the model's text has 32"),
    "a token that is known": (lambda path: torch.save({"<|endoftext|>": ONE}, path), "adds the token '<.endoftext.>'"),
    "a word that is known": (lambda path: torch.save({"A": ONE}, path), "adds the token 'A', which the model's"),
    "not finite": (lambda path: torch.save({"<s>": ONE / 0}, path), "is no textual inversion"),
    "numbers": (lambda path: torch.save({"<s>": 3}, path), "is no textual inversion"),
    "a convolution": (lambda path: torch.save({"<s>": torch.ones(2, 3, 3)}, path), "is no textual inversion"),
    "nothing": (lambda path: torch.save({}, path), "is no textual inversion"),
    "a list": (lambda path: torch.save([ONE], path), "is no textual inversion"),
    "a page": (lambda path: path.write_text("<html>"), "is a web page"),
    "code": (lambda path: torch.save({"<s>": Evil(path.parent / "ran")}, path), "no code of a checkpoint is ever run"),
}


@pytest.mark.parametrize(("write", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_none_is_refused_in_one_sentence(pipeline, tmp_path, write, sentence):
    write(tmp_path / "s.bin")
    with pytest.raises(ValueError, match=sentence) as raised:
        add_embeddings(pipeline, tmp_path / "s.bin")
    assert str(tmp_path) in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(FileNotFoundError, match="no textual inversion at"):
            read_embeddings(path)


def test_weights_are_no_textual_inversion(tiny_model, pipeline, tmp_path):
    torch.save(erased(tiny_model), tmp_path / "esd.pt")
    with pytest.raises(ValueError, match=r"no textual inversion|width"):
        add_embeddings(pipeline, tmp_path / "esd.pt")
