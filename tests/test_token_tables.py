"""Where a T5 reads prompts too: which tables the tokens of a search live in, and what every encoder reads of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.embedding import EmbeddingAttack
from attacks.gcg import GCG
from attacks.p4d import P4D
from attacks.pez import PEZ
from attacks.protocols import is_given_original
from attacks.tables import JointTemplate, Tables, proposals_of, space_of
from attacks.textual_inversion import TextualInversion
from attacks.union import Union
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion.model import TextToImage
from diffusion.needs import A_T5, NOTHING, needs_of
from diffusion.prompt_template import PromptTemplate
from diffusion.sampling import Sampling
from tests.attack_cases import make_cases
from tests.judges import one_in
from tests.tiny_flux import make_tiny_flux
from tests.tiny_sd3 import T5_TOKENS, TOKENS, make_tiny_sd3

PROMPTS = ["a church", "a red fish"]
TABLES: tuple[Tables, ...] = ("clip", "text", "words", "t5")


@pytest.fixture(params=["sd3", "flux"])
def model(tokenizer_folder: Path, request: pytest.FixtureRequest) -> TextToImage:
    if request.param == "flux":
        pipeline = make_tiny_flux(tokenizer_folder, guided=True)
        return TextToImage(pipeline, name="flux", scheduler=None, resolution=(16, 16), t5_tokens=T5_TOKENS)
    pipeline = make_tiny_sd3(tokenizer_folder, t5=True)
    return TextToImage(pipeline, name="sd3", scheduler=None, t5_tokens=T5_TOKENS)


def parts(model: TextToImage, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIP and what T5 gave: of FLUX the pooled embedding is all of CLIP's."""
    rows, pooled = model.text_encoders.split(text)
    assert pooled is not None
    clip = rows[:, : TOKENS if model.name == "sd3" else 0]
    return torch.cat([clip.flatten(1), pooled], dim=1), rows[:, clip.shape[1] :]


def words(model: TextToImage, tables: Tables, *texts: str) -> torch.Tensor:
    """Two tokens for each of the prompts, by their text in the vocabulary of the search."""
    ids = [space_of(model, tables).tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return torch.tensor(ids)


@pytest.mark.parametrize("tables", TABLES)
def test_a_search_reads_what_its_text_is_read_as(model: TextToImage, tables: Tables) -> None:
    space = space_of(model, tables)
    template = space.insert(PROMPTS, 2, "suffix_k")
    tokens = words(model, tables, "red fish", "fish a")
    found = ["a church red fish", "a red fish fish a"]
    assert template.texts(model, tokens) == found
    clip, t5 = parts(model, template.encode_tokens(model, tokens))
    told_clip, told_t5 = parts(model, model.encode(found))
    plain_clip, plain_t5 = parts(model, model.encode(PROMPTS))
    torch.testing.assert_close(clip, plain_clip if tables == "t5" else told_clip)
    torch.testing.assert_close(t5, plain_t5 if tables == "clip" else told_t5)
    assert not torch.allclose(told_clip, plain_clip)
    assert not torch.allclose(told_t5, plain_t5)
    # The same for some of the prompts, and for embeddings in the place of tokens.
    last = template[torch.tensor([1])]
    torch.testing.assert_close(last.encode(model, space.look_up(tokens[1:])), template.encode_tokens(model, tokens)[1:])


@pytest.mark.parametrize("tables", TABLES)
def test_gradients_go_through_the_encoders_of_the_tables(model: TextToImage, tables: Tables) -> None:
    space = space_of(model, tables)
    tokens = words(model, tables, "red fish", "fish a")
    embeddings = space.look_up(tokens).detach().requires_grad_()
    clip, t5 = parts(model, space.insert(PROMPTS, 2, "prefix_k").encode(model, embeddings))
    through = []
    for part in (clip, t5):
        (gradient,) = torch.autograd.grad(part.square().sum(), embeddings, retain_graph=True, allow_unused=True)
        through.append(gradient is not None and bool(gradient.any()))
    assert through == [tables != "t5", tables in {"words", "t5"}]


@pytest.mark.parametrize("insertion", ["prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"])
def test_words_stand_in_both_sequences_where_the_text_has_them(model: TextToImage, insertion: Any) -> None:
    template = space_of(model, "words").insert(["a fish", "a red fish"], 2, insertion)
    tokens = words(model, "words", "fish red", "fish a")
    clip, t5 = parts(model, template.encode_tokens(model, tokens))
    told_clip, told_t5 = parts(model, model.encode(template.texts(model, tokens)))
    torch.testing.assert_close(clip, told_clip)
    torch.testing.assert_close(t5, told_t5)


def test_shared_words_are_one_token_for_either(model: TextToImage) -> None:
    found = space_of(model, "words").candidates()
    texts = model.tokenizer.batch_decode(found[:, None])
    t5 = space_of(model, "t5").tokenizer
    assert {"a", "red", "fish"} <= {text.strip() for text in texts}
    assert len(found) < len(model.tokenizer) / 4
    for text in texts:
        (own,) = t5(text.strip(), add_special_tokens=False).input_ids
        assert own not in t5.all_special_ids


@pytest.mark.parametrize("tables", TABLES)
def test_what_is_read_as_other_tokens_is_told(model: TextToImage, tables: Tables) -> None:
    space = space_of(model, tables)
    template = space.insert(PROMPTS, 2, "prefix_k")
    good = words(model, tables, "red fish", "fish a")
    encoders = {"clip": {"clip"}, "text": {"clip"}, "words": {"clip", "t5"}, "t5": {"t5"}}[tables]
    for proposal, prompt in zip(proposals_of(model, template, good), PROMPTS, strict=True):
        assert proposal.measured == {f"read_back_{name}": 1.0 for name in encoders}
        assert (proposal.variant, proposal.text is None) == (
            (f"T5 reads {prompt!r}", False) if tables == "clip" else ("", True)
        )
    assert template.comes_back(model, good).all()
    # The end token has no text.
    bad = torch.full_like(good, space.tokenizer.eos_token_id)
    if tables != "words":
        assert all(0.0 in proposal.measured.values() for proposal in proposals_of(model, template, bad))
        assert not template.comes_back(model, bad).any()


def test_a_pair_is_drawn_as_the_pipeline_draws_it(tokenizer_folder: Path) -> None:
    pipeline = make_tiny_sd3(tokenizer_folder, t5=True)
    model = TextToImage(pipeline, name="sd3", scheduler=None, t5_tokens=T5_TOKENS)
    template = space_of(model, "clip").insert(PROMPTS, 2, "prefix_k")
    proposals = proposals_of(model, template, words(model, "clip", "red fish", "fish a"))
    found = [proposal.prompt for proposal in proposals]
    rows, _, pooled, _ = pipeline.encode_prompt(
        found, found, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    own = model.text_encoders.split(torch.stack([proposal.text for proposal in proposals if proposal.text is not None]))
    torch.testing.assert_close(own, (rows, pooled))


@pytest.mark.parametrize("every", [False, True])
def test_prompts_make_room_for_t5s_slots(model: TextToImage, every: bool) -> None:
    space = space_of(model, "t5")
    prompt = ["a red fish a red church"]
    template = space.insert_every(prompt, 2) if every else space.insert(prompt, 3, "prefix_k")
    assert isinstance(template, JointTemplate)
    ids, slots = template.beside.ids[0].tolist(), template.slots[0].tolist()
    assert len(ids) == T5_TOKENS
    assert slots == ([0, 3] if every else [0, 1, 2])
    assert ids[template.beside.ends[0]] == space.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"6 tokens cannot be inserted: T5's prompts take 1 to {T5_TOKENS - 1}"):
        space.insert(prompt, 6, "prefix_k")


ATTACKS: dict[str, Any] = {
    "unlearndiff": UnlearnDiffAtk(tokens=2, timesteps=1, steps_per_timestep=2),
    "p4d": P4D(variant="union", tokens=2, checks=1, steps_per_check=2),
    "pez": PEZ(tokens=2, timesteps=1, steps_per_timestep=2),
    "gcg": GCG(tokens=2, timesteps=1, steps_per_timestep=1, top_k=2, substitutions=3, draws=1, filtered=True),
    "embedding": EmbeddingAttack(tokens=2, timesteps=1, steps_per_timestep=2),
}


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_search_in_the_tables_and_their_texts_are_judged(
    tokenizer_folder: Path, name: str, tables: Tables
) -> None:
    pipeline = make_tiny_sd3(tokenizer_folder, t5=True)
    model = TextToImage(pipeline, name="sd3", scheduler=None, t5_tokens=2 * T5_TOKENS)
    attack = replace(ATTACKS[name], tables=tables)
    options = {"original": model} if is_given_original(attack) else {}
    cases = make_cases(model, PROMPTS)
    outcomes = list(attack.run(model, cases, one_in(10**9), sampling=Sampling(steps=1, batch_size=2), **options))
    assert len(outcomes) == 2
    for outcome in outcomes:
        last = outcome.checks[-1]
        if name == "embedding":
            assert last.variant.startswith("embeddings after")
            continue
        assert outcome.adversarial_prompt != outcome.prompt
        assert set(last.measured.values()) <= {0.0, 1.0}
        assert last.measured
        assert last.variant.startswith("T5 reads ") == (tables == "clip")


def test_free_embeddings_of_a_concept_leave_t5_its_prompts(model: TextToImage) -> None:
    attack = TextualInversion(
        pairs=(("a church", "a"),), pictures=2, captions=("a {}",), tokens=1, checks=1, steps_per_check=2,
        pictures_per_step=2, initial_word="church",
    )  # fmt: skip
    cases = make_cases(model, PROMPTS)
    outcomes = list(attack.run(model, cases, one_in(10**9), sampling=Sampling(steps=1, batch_size=2), original=model))
    assert [outcome.adversarial_prompt for outcome in outcomes] == PROMPTS
    space = space_of(model, "clip")
    free = space.look_up(words(model, "clip", "fish", "red"))
    _, t5 = parts(model, space.at_placeholder(["a {} church", "a {}"], 1).encode_detached(model, free))
    torch.testing.assert_close(t5, parts(model, model.encode(["a church", "a"]))[1])


@pytest.mark.parametrize("name", ATTACKS)
def test_what_needs_a_t5_says_so(name: str) -> None:
    for tables in TABLES:
        attack = replace(ATTACKS[name], tables=tables)
        assert needs_of(attack) == needs_of(Union({"one": attack})) == (A_T5 if tables in {"words", "t5"} else NOTHING)


def test_a_model_without_a_t5_has_clips_tokens_alone(tokenizer_folder: Path) -> None:
    model = TextToImage(make_tiny_sd3(tokenizer_folder), name="bare", scheduler=None, t5_tokens=0)
    for tables in ("clip", "text"):
        assert isinstance(space_of(model, tables).insert(PROMPTS, 1, "prefix_k"), PromptTemplate)
    with pytest.raises(ValueError, match=r"tables is 't5', and 'bare' is without a T5; take tables=text"):
        space_of(model, "t5")
