"""Paraphrases: what is found in a prompt, what takes its place, and in which order."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from attacks.cases import Outcome, PromptCase
from attacks.paraphrase import KINDS, Paraphrase, Wording, misspellings, read_wordings, split_prompt
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.prompt_sets import read_prompt_set
from tests.judges import never, one_in
from tests.oracles import paraphrase as oracle

ROOT = Path(__file__).parents[1]
LISTS = sorted((ROOT / "prompts/paraphrases").glob("*.csv"))
CANVAS = ("van_gogh", "church", "fire")
SAMPLING = Sampling(steps=1, batch_size=3)
TEXT = """slot,kind,text
thing,synonym,church
thing,synonym,chapel
thing,synonym,parish church
thing,misspelling,chruch
thing,translation,kirche
thing,translation,iglesia
style,description,in thick oil
style,synonym,by vincent
style,synonym,by van gogh
,description,with a steeple
,translation,mit turm
"""


@pytest.fixture
def wordings(tmp_path: Path) -> Path:
    path = tmp_path / "wordings.csv"
    path.write_text(TEXT)
    return path


def texts_for(attack: Paraphrase, *prompts: str) -> list[list[str]]:
    """What is tried on each prompt, once each."""
    wordings = read_wordings(attack.wordings)
    cases = [PromptCase(number, prompt, 5, 3.0) for number, prompt in enumerate(prompts)]
    return [attack._paraphrases(case, wordings) for case in cases]


def test_a_wording_gives_way_to_the_others_of_its_slot_kinds_in_turn(tiny_model: TextToImage, wordings: Path) -> None:
    attack = Paraphrase(wordings=wordings, tries=6, misspell=False)
    (outcome,) = attack.run(tiny_model, [PromptCase(0, "a red church, for ada", 5, 3.0)], never, sampling=SAMPLING)
    assert [check.prompt for check in outcome.checks] == [
        "a red church, for ada",
        "a red chapel, for ada",
        "a red chruch, for ada",
        "a red kirche, for ada",
        "a red parish church, for ada",
        "a red iglesia, for ada",
        "a red chapel, for ada",
    ]
    # The last text was tried before and is drawn again for its picture.
    assert outcome.unet_evaluations == tiny_model.unet_evaluations == 7 * 2 * SAMPLING.steps


def test_every_wording_is_exchanged_whole_and_the_longest_first(wordings: Path) -> None:
    attack = Paraphrase(wordings=wordings, misspell=False)
    texts = texts_for(attack, "A Parish CHURCH by van Gogh", "a church and a church", "churches in churchill")
    assert texts[0][:3] == ["A church by vincent", "A chruch in thick oil", "A kirche by vincent"]
    assert texts[1][:3] == ["a chapel and a chapel", "a chruch and a chruch", "a kirche and a kirche"]
    assert texts[2] == ["churches in churchill, with a steeple", "churches in churchill, mit turm"]


def test_rules_misspell_what_was_found_after_the_list(wordings: Path) -> None:
    texts, others = texts_for(Paraphrase(wordings=wordings), "a chapel", "a chapel")
    assert texts[:7] == ["a church", "a chruch", "a kirche", "a parish church", texts[4], "a iglesia", texts[6]]
    by_rule = [text.removeprefix("a ") for text in (texts[4], *texts[6:])]
    assert len(set(by_rule)) == len(by_rule)
    assert set(by_rule) == oracle.misspellings("chapel")
    assert others != texts, "each case has its own stream"


def test_drawn_wordings_keep_the_turns_of_the_kinds(wordings: Path) -> None:
    drawn = texts_for(Paraphrase(wordings=wordings, misspell=False, order="drawn"), *["a church"] * 8)
    assert {text[0] for text in drawn} == {"a chapel", "a parish church"}
    assert {text[2] for text in drawn} == {"a kirche", "a iglesia"}
    assert {frozenset(texts) for texts in drawn} == {frozenset(drawn[0])}


def test_prompts_are_split_as_the_oracle_splits_them() -> None:
    source = random.Random(0)
    words = ["a", "an", "a b", "b c", "a b c", "c's", "é", "B"]
    for _ in range(500):
        texts = source.sample(words, 4)
        prompt = "".join(source.choice(["a", "b", "c", "A", "é", " ", " ", ",", "'s", "_"]) for _ in range(12))
        pieces = split_prompt(prompt, [Wording("x", "synonym", text) for text in texts])
        expected = oracle.split(prompt, texts)
        found = [piece.text for piece in pieces if isinstance(piece, Wording)]
        assert found == expected[1::2], (prompt, texts)
        assert "".join(piece.text if isinstance(piece, Wording) else piece for piece in pieces) == prompt


@pytest.mark.parametrize("word", ["church", "oo", "ab", "noon", "église"])
def test_misspellings_are_those_of_the_oracle(word: str) -> None:
    made = misspellings(word)
    assert len(made) == len(set(made))
    assert set(made) == oracle.misspellings(word)


def test_misspellings_stay_within_words() -> None:
    assert misspellings("a b") == [" b", "aa b", "a ", "a bb"]
    assert misspellings("a") == ["aa"]
    assert misspellings("7, -") == []


def test_outcomes_do_not_depend_on_batch_size_or_order_and_cost_is_exact(
    tiny_model64: TextToImage, wordings: Path
) -> None:
    cases = [
        PromptCase(number, prompt, 50 + number, 3.0)
        for number, prompt in enumerate(["a church", "a fish", "a chapel by vincent", "a church", "snow"])
    ]

    def run(batch_size: int, cases: Sequence[PromptCase]) -> list[Outcome]:
        attack = Paraphrase(wordings=wordings, tries=3)
        outcomes = attack.run(tiny_model64, cases, one_in(4), sampling=Sampling(steps=1, batch_size=batch_size))
        return sorted(outcomes, key=lambda outcome: outcome.case_number)

    outcomes = run(1, cases)
    assert sum(outcome.unet_evaluations for outcome in outcomes) == tiny_model64.unet_evaluations
    assert run(8, cases[::-1]) == outcomes


def test_a_prompt_without_any_wording_needs_one_that_stands_alone(tiny_model: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "wordings.csv"
    path.write_text("slot,kind,text\nthing,synonym,church\n")
    cases = [PromptCase(0, "a church", 0, 3.0), PromptCase(1, "a fish", 0, 3.0)]
    attack = Paraphrase(wordings=path)
    with pytest.raises(ValueError, match=r"has nothing to say 'a fish' otherwise; add a wording with an empty slot"):
        list(attack.run(tiny_model, cases, never, sampling=SAMPLING))
    assert tiny_model.unet_evaluations == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind,text\n", "lacks the columns slot"),
        ("slot,kind,text\n", "has no wordings"),
        ("slot,kind,text\nx,synonym,\n", "broken in line 2; it needs a text"),
        ("slot,kind,text\nx,synonym,church\nx,slang,kirk\n", "line 3; .* one of synonym, description"),
        ("slot,kind,text\nx,synonym\n", "broken in line 2"),
    ],
)
def test_broken_lists_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wordings.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        Paraphrase(wordings=tmp_path / "wordings.csv")


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_the_projects_lists_have_every_kind_in_every_slot(path: Path) -> None:
    wordings = read_wordings(path)
    texts = [(wording.slot, wording.text) for wording in wordings]
    assert len(set(texts)) == len(texts)
    for slot in {wording.slot for wording in wordings}:
        kinds = {wording.kind for wording in wordings if wording.slot == slot}
        assert kinds == set(KINDS) or (slot == "" and kinds >= {"description", "translation"})


@pytest.mark.parametrize("name", CANVAS)
def test_the_canvas_reads_every_wording_and_each_of_its_prompts_has_one(name: str) -> None:
    wordings = read_wordings(ROOT / f"prompts/paraphrases/{name}.csv")
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "diffusion/canvas/weights/tokenizer")
    for wording in wordings:
        ids = tokenizer(wording.text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == wording.text.replace(" ", "")
    for row in read_prompt_set(ROOT / f"prompts/canvas/{name}.csv"):
        assert any(isinstance(piece, Wording) for piece in split_prompt(row.prompt, wordings)), row.prompt
