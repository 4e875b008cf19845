"""Where inserted tokens go, what survives as text, and the projection on the simplex."""

import pytest
import torch

from attacks.prompt_search import candidate_tokens, project_to_simplex
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from tests.oracles.p4d import interleave
from tests.oracles.simplex import project_row
from tests.oracles.unlearndiff import encode_one_hot, insert, prompt_tokens

MODES = ["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"]
LONG = "a painting of a church, " * 12


@pytest.mark.parametrize("mode", MODES)
def test_insertion_agrees_with_lists(tiny_model: TextToImage, mode: str) -> None:
    model = tiny_model
    prompts = ["", "church", "a photo of a red church in the snow", LONG]
    for count in (1, 3, 5):
        tokens = list(range(40, 40 + count))
        template = PromptTemplate.insert(model, prompts, count, mode)
        filled = template.fill(torch.tensor([tokens] * len(prompts)))
        texts = template.texts(model, torch.tensor([tokens] * len(prompts)))
        for index, prompt in enumerate(prompts):
            body = insert(prompt_tokens(model, prompt, count), tokens, mode)
            row = [model.tokenizer.bos_token_id, *body, model.tokenizer.eos_token_id]
            row += [model.tokenizer.pad_token_id] * (model.max_tokens - len(row))
            assert filled[index].tolist() == row
            assert template.ends[index] == 1 + len(body)
            assert texts[index] == model.tokenizer.decode(body).strip()


@pytest.mark.parametrize("mode", MODES)
def test_embedding_agrees_with_one_hot_rows_and_with_the_encoder(tiny_model64: TextToImage, mode: str) -> None:
    model = tiny_model64
    prompts = ["a photo of a red church in the snow", "", LONG]
    template = PromptTemplate.insert(model, prompts, 3, mode)
    tokens = torch.randint(40, 250, (3, 3), generator=torch.Generator().manual_seed(0))
    text = template.encode(model, model.vocabulary[tokens])
    torch.testing.assert_close(text, model.encode_ids(template.fill(tokens)), rtol=0, atol=1e-12)
    for prompt, row, encoded in zip(prompts, tokens, text, strict=True):
        one_hot = torch.nn.functional.one_hot(row, len(model.vocabulary)).double()
        torch.testing.assert_close(encoded, encode_one_hot(model, prompt, one_hot, mode)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("period", [1, 3, 30])
def test_slots_at_every_few_tokens_agree_with_lists(tiny_model64: TextToImage, period: int) -> None:
    model = tiny_model64
    room = model.max_tokens - 2
    words = "a photo of a red church in the snow and a photo of a blue fish in the snow and two red fish"
    prompts = [" ".join(words.split()[:length]) for length in range(room)] + [LONG]
    template = PromptTemplate.insert_every(model, prompts, period)
    inserted = torch.arange(40, 40 + template.slots.shape[1]).expand(len(prompts), -1)
    filled = template.fill(inserted)
    texts = template.texts(model, inserted)
    for index, prompt in enumerate(prompts):
        own = model.tokenizer(prompt, add_special_tokens=False).input_ids
        body = interleave(own, inserted[index].tolist(), period, room)
        row = [model.tokenizer.bos_token_id, *body, model.tokenizer.eos_token_id]
        assert filled[index].tolist() == row + [model.tokenizer.pad_token_id] * (model.max_tokens - len(row))
        assert template.ends[index] == len(row) - 1
        assert texts[index] == model.tokenizer.decode(body).strip()
    encoded = template.encode(model, model.vocabulary[inserted])
    torch.testing.assert_close(encoded, model.encode_ids(filled), rtol=0, atol=1e-12)


def test_a_prompt_that_fills_every_position_loses_its_tail_and_keeps_its_end(tiny_model: TextToImage) -> None:
    model = tiny_model
    plain = model.tokenize([LONG])[0].tolist()
    template = PromptTemplate.insert(model, [LONG], 4, "suffix_k")
    row = template.fill(torch.tensor([[41, 42, 43, 44]]))[0].tolist()
    assert row == [*plain[:-5], 41, 42, 43, 44, model.tokenizer.eos_token_id]
    assert template.ends.item() == model.max_tokens - 1


def test_tokens_may_take_the_whole_prompt_but_not_more(tiny_model: TextToImage) -> None:
    most = tiny_model.max_tokens - 2
    template = PromptTemplate.insert(tiny_model, ["a red church"], most, "mid_k")
    assert template.slots[0].tolist() == list(range(1, most + 1))
    with pytest.raises(ValueError, match=f"{most + 1} tokens cannot be inserted.*1 to {most}"):
        PromptTemplate.insert(tiny_model, [""], most + 1, "prefix_k")


def test_padding_is_the_tokenizers_own(tiny_model: TextToImage) -> None:
    tiny_model.tokenizer.plain.pad_token = tiny_model.tokenizer.convert_ids_to_tokens(7)
    template = PromptTemplate.insert(tiny_model, ["a church"], 2, "prefix_k")
    filled = template.fill(torch.tensor([[41, 42]]))[0]
    assert filled[template.ends.item() + 1 :].eq(7).all()
    assert template.texts(tiny_model, torch.tensor([[41, 42]]))[0].endswith("a church")


def test_special_tokens_are_candidates_only_on_request(tiny_model: TextToImage) -> None:
    special = set(tiny_model.tokenizer.all_special_ids)
    assert special.isdisjoint(candidate_tokens(tiny_model).tolist())
    assert candidate_tokens(tiny_model, exclude_special=False).tolist() == list(range(len(tiny_model.vocabulary)))


def test_readable_tokens_are_those_whose_prompts_are_read_back_as_found(tiny_model: TextToImage) -> None:
    model = tiny_model
    readable = candidate_tokens(model, readable=True)
    assert 0 < len(readable) < len(candidate_tokens(model))
    template = PromptTemplate.insert(model, ["church in the snow"] * len(readable), 2, "prefix_k")
    tokens = torch.stack([readable, readable.flip(0)], dim=1)
    assert torch.equal(model.tokenize(template.texts(model, tokens)), template.fill(tokens))
    pieces = sorted(set(candidate_tokens(model).tolist()) - set(readable.tolist()))
    assert all(model.tokenizer(model.tokenizer.decode([piece])).input_ids[1:-1] != [piece] for piece in pieces)


@pytest.mark.parametrize(
    "row",
    [
        [0.7],
        [-3.0],
        [0.25] * 4,
        [5.0, 5.0, -1.0],
        [0.2, 0.3, 0.5],
        [1.0, 0.0, 0.0],
        [1e6, 1e6 - 0.5, 0.0],
        [-1e3, -1e3 + 0.25, -2e3],
        [0.1, 0.1, 0.1, 0.1, 0.9, 0.9],
    ],
)
def test_projection_of_special_rows_agrees_with_bisection(row: list[float]) -> None:
    ours = project_to_simplex(torch.tensor(row, dtype=torch.float64))
    torch.testing.assert_close(ours, torch.tensor(project_row(row), dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 30.0])
def test_projection_of_random_rows_agrees_with_bisection(scale: float) -> None:
    points = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale + 1 / 200
    ours = project_to_simplex(points)
    slow = torch.tensor([[project_row(row) for row in rows] for rows in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (ours >= 0).all()


def test_projection_of_a_row_does_not_depend_on_its_neighbours() -> None:
    points = torch.randn(16, 5000, generator=torch.Generator().manual_seed(2)) * 0.01
    together = project_to_simplex(points)
    alone = torch.cat([project_to_simplex(points[row : row + 1]) for row in range(len(points))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)
    assert together.sum(-1).sub(1).abs().max() < 1e-5


def test_projection_of_a_row_with_nan_ends_and_spares_its_neighbours() -> None:
    points = torch.randn(3, 500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = project_to_simplex(points)
    points[1, 7] = torch.nan
    projected = project_to_simplex(points)
    assert projected[1].isnan().any()
    torch.testing.assert_close(projected[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0])
def test_projection_of_rows_with_many_active_coordinates_agrees_with_bisection(scale: float) -> None:
    points = torch.randn(3, 3000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * scale + 1 / 3000
    slow = torch.tensor([project_row(row) for row in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(project_to_simplex(points), slow, rtol=0, atol=1e-13)
