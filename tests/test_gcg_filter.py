"""GCG's filter: what is compared are texts that a tokenizer reads back."""

import pytest
import torch

from attacks.gcg import GCG, read_back
from attacks.prompt_search import candidate_tokens
from diffusion.model import TextToImage
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import Sampling
from tests.attack_cases import make_cases
from tests.judges import never

PROMPTS = ["a red church in the snow", "", "two blue fish"]


@pytest.mark.parametrize("where", ["prefix_k", "suffix_k", "mid_k", "insert_k"])
def test_what_stays_is_read_back_as_the_tokens_that_it_is_made_of(tiny_model: TextToImage, where: str) -> None:
    model, generator = tiny_model, torch.Generator().manual_seed(1)
    candidates = candidate_tokens(model)
    template = PromptTemplate.insert(model, PROMPTS, 3, where)
    texts = candidates[torch.randint(len(candidates), (len(PROMPTS), 200, 3), generator=generator)]
    tokens = candidates[torch.randint(len(candidates), (len(PROMPTS), 3), generator=generator)]
    texts[:, 7] = tokens
    kept = read_back(model, template, texts, tokens)
    assert kept.shape == texts.shape
    fell = 0
    for number in range(len(PROMPTS)):
        for given, found in zip(texts[number], kept[number], strict=True):
            row = PromptTemplate(*(values[number : number + 1] for values in vars(template).values()))
            assert torch.equal(model.tokenize(row.texts(model, found[None])), row.fill(found[None]))
            assert not torch.equal(found, tokens[number])
            fell += not torch.equal(given, found)
    # Half of the canvas's tokens are pieces of words.
    assert fell > 100


def test_where_nothing_stays_the_tokens_stay(tiny_model: TextToImage) -> None:
    template = PromptTemplate.insert(tiny_model, PROMPTS, 2, "suffix_k")
    tokens = candidate_tokens(tiny_model)[torch.tensor([[5, 6], [7, 8], [9, 10]])]
    assert torch.equal(read_back(tiny_model, template, tokens[:, None].repeat(1, 4, 1), tokens)[:, 0], tokens)


def test_what_is_judged_is_what_was_found(tiny_model64: TextToImage) -> None:
    model = tiny_model64
    fields = {"tokens": 3, "timesteps": 2, "steps_per_timestep": 3, "top_k": 60, "substitutions": 40, "draws": 1}
    start = {"initial_token": "a", "insertion": "suffix_k"}
    for filtered in (True, False):
        outcomes = list(
            GCG(**fields, **start, filtered=filtered).run(
                model, make_cases(model, PROMPTS), never, sampling=Sampling(steps=1)
            )
        )
        lengths = [
            len(model.tokenizer(check.prompt, add_special_tokens=False).input_ids)
            - len(model.tokenizer(outcome.prompt, add_special_tokens=False).input_ids)
            for outcome in outcomes
            for check in outcome.checks[1:]
        ]
        assert (set(lengths) == {3}) == filtered
