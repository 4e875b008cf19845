import re
from pathlib import Path

import numpy as np
import pytest

from attacks.prompt_pairs import read_pairs
from diffusion.canvas.phrases import FIRE_EXPLICIT, FIRE_WORD_STEMS, STYLE_PHRASES, SUBJECT_PHRASES
from diffusion.canvas.prompt_sets import CONCEPTS, PAIRS, SHIPPED_FOLDER, prompt_pairs
from evaluation.prompt_sets import PromptRow, read_prompt_set
from evaluation.prompt_sources import PromptFile
from tests.test_imports import STAND_INS

HEADER = "case_number,prompt,evaluation_seed,evaluation_guidance"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(*lines: str, encoding: str = "utf-8") -> Path:
        path = tmp_path / "prompts.csv"
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        return path

    return write_file


def test_rows_keep_order_and_further_columns_become_labels(write):
    path = write(HEADER + ",style", '7,"a church, in neon",12,5.0,neon', "3,NA,0,7.5,null")
    assert read_prompt_set(path) == [
        PromptRow(7, "a church, in neon", 12, 5.0, {"style": "neon"}),
        PromptRow(3, "NA", 0, 7.5, {"style": "null"}),
    ]


def test_column_order_is_free(write):
    path = write("style,evaluation_guidance,prompt,case_number,evaluation_seed", "neon,5,a church,1,9")
    assert read_prompt_set(path) == [PromptRow(1, "a church", 9, 5.0, {"style": "neon"})]


def test_missing_settings_take_the_published_defaults(write):
    assert read_prompt_set(write("prompt,case_number", "a church,1")) == [PromptRow(1, "a church", 0, 7.5, {})]


def test_a_byte_order_mark_and_blank_lines_are_passed_over(write):
    path = write(HEADER, "", "1,a church,2,3", "", encoding="utf-8-sig")
    assert read_prompt_set(path) == [PromptRow(1, "a church", 2, 3.0, {})]


def test_whole_numbers_may_be_written_as_floats_and_seeds_have_64_bits(write):
    rows = read_prompt_set(write(HEADER, "1.0,a church,42.0,5", "2.00,a tench,18446744073709551615,5", "3.,a dog,7.,5"))
    assert [(row.case_number, row.seed) for row in rows] == [(1, 42), (2, 2**64 - 1), (3, 7)]


@pytest.mark.parametrize("seed", ["seed", "sd_seed"])
@pytest.mark.parametrize("guidance", ["guidance_scale", "sd_guidance_scale", "guidance"])
def test_settings_are_read_under_the_names_of_published_files(write, caplog, seed: str, guidance: str):
    path = write(f"case_number,prompt,{seed},{guidance},style", "0,a church,11,3,neon", "1,a church,12.0,4,oil")
    assert read_prompt_set(path) == [
        PromptRow(0, "a church", 11, 3.0, {"style": "neon"}),
        PromptRow(1, "a church", 12, 4.0, {"style": "oil"}),
    ]
    assert not caplog.messages


def test_the_fields_own_name_of_a_setting_comes_first(write):
    path = write(HEADER + ",sd_seed,guidance_scale", "1,a church,5,6,7,8")
    assert read_prompt_set(path) == [PromptRow(1, "a church", 5, 6.0)]


def test_two_other_names_of_a_setting_must_agree(write):
    header = "case_number,prompt,seed,sd_seed"
    assert read_prompt_set(write(header, "1,a church,5,5.0")) == [PromptRow(1, "a church", 5)]
    with pytest.raises(ValueError, match="line 2: seed is '5' and sd_seed is '6'; call the right one evaluation_seed"):
        read_prompt_set(write(header, "1,a church,5,6"))


def test_sizes_are_read_and_may_be_left_out(write):
    path = write("case_number,prompt,sd_image_width,sd_image_height", "1,a church,768,512.0", "2,a tench,,")
    rows = read_prompt_set(path)
    assert [(row.width, row.height) for row in rows] == [(768, 512), (None, None)]
    with pytest.raises(ValueError, match="line 2: width is '0', not a whole number from 1"):
        read_prompt_set(write("case_number,prompt,width", "1,a church,0"))


def test_unknown_columns_that_look_like_settings_are_named(write, caplog):
    path = write("case_number,prompt,Seed,num_inference_steps,style", "1,a church,5,50,neon")
    assert read_prompt_set(path)[0].seed == 0
    [message] = caplog.messages
    assert "the columns 'Seed', 'num_inference_steps' look like settings" in message
    assert "style" not in message


@pytest.mark.parametrize("column", ["prompt", "case_number", "evaluation_seed", "sd_seed", "width"])
def test_of_two_columns_of_one_name_neither_is_taken(write, column: str):
    header = ["case_number", "prompt", "evaluation_seed", "sd_seed", "width", column]
    with pytest.raises(ValueError, match=rf"prompts\.csv has several columns called {column}, .*rename all but one"):
        read_prompt_set(write(",".join(header), "1,2,3,4,5,6"))


def test_of_two_columns_of_pairs_neither_is_taken(write):
    with pytest.raises(ValueError, match=r"prompts\.csv has several columns called with"):
        read_pairs(write("with,without,with", "a,b,c"))


def test_limit_returns_the_first_rows(write):
    path = write(HEADER, *(f"{number},prompt {number},0,5" for number in range(5)))
    assert [row.case_number for row in read_prompt_set(path, limit=2)] == [0, 1]
    assert len(read_prompt_set(path, limit=9)) == 5
    with pytest.raises(ValueError, match="limit is 0"):
        read_prompt_set(path, limit=0)


def test_every_missing_column_is_named(write):
    with pytest.raises(ValueError, match=r"prompts\.csv lacks the columns case_number, prompt"):
        read_prompt_set(write("text,evaluation_seed", "a church,1"))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("2,a church,1.5,5", "line 3: evaluation_seed is '1.5'"),
        ("2,a church,1e3,5", "line 3: evaluation_seed is '1e3'"),
        ("2,a church,18446744073709551616,5", "line 3: evaluation_seed is '18446744073709551616', more than"),
        ("2,a church,-1,5", "line 3: evaluation_seed is '-1'"),
        ("two,a church,1,5", "line 3: case_number is 'two'"),
        ("2,a church,1,much", "line 3: evaluation_guidance is 'much'"),
        ("2,a church,1,nan", "line 3: evaluation_guidance is 'nan'"),
        ("2,  ,1,5", "line 3: the prompt is empty"),
        ("1,a church,1,5", "line 3: case_number 1 is that of line 2 too"),
        ("2,a church,1", "line 3: it has more or fewer cells"),
        ("2,a church,1,5,6", "line 3: it has more or fewer cells"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(write, row: str, fault: str):
    with pytest.raises(ValueError, match="broken rows") as error:
        read_prompt_set(write(HEADER, "1,a chapel,1,5", row))
    assert "prompts.csv" in str(error.value)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_lines_are_those_of_the_file_when_prompts_span_several(write):
    with pytest.raises(ValueError, match="line 4: evaluation_seed is 'x'"):
        read_prompt_set(write(HEADER, '1,"a church', 'at night",1,5', "2,a church,x,5"))


def test_many_broken_rows_are_summed_up(write):
    with pytest.raises(ValueError, match=r"line 6.*\(and 4 more\)"):
        read_prompt_set(write(HEADER, *(f"{number},,1,5" for number in range(9))))


def test_missing_empty_and_binary_files_are_refused(write, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no prompt set"):
        read_prompt_set(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompt_set(write(HEADER))
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompt_set(path)


SHIPPED = sorted(SHIPPED_FOLDER.glob("*.csv"))


@pytest.mark.parametrize("path", [path for path in SHIPPED if not path.stem.endswith("_pairs")], ids=lambda p: p.stem)
def test_every_shipped_set_is_readable_and_labelled(path: Path):
    for row in read_prompt_set(path):
        assert set(row.labels) == {"style", "subject", "burning"}


CONCEPT_PHRASES = {
    "van_gogh": STYLE_PHRASES["van_gogh"].all,
    "church": SUBJECT_PHRASES["church"],
    "fire": (*FIRE_EXPLICIT.all, *FIRE_WORD_STEMS),
}


@pytest.mark.parametrize("concept", CONCEPTS)
def test_shipped_pairs_differ_in_the_concept_alone(concept: str):
    pairs = read_pairs(SHIPPED_FOLDER / f"{concept}_pairs.csv")
    assert len(pairs) == PAIRS
    for present, absent in pairs:
        assert any(phrase in present for phrase in CONCEPT_PHRASES[concept])
        assert not any(phrase in absent for phrase in CONCEPT_PHRASES[concept])
        added = set(words(absent)) - set(words(present)) - {"a", "an"}
        if concept == "church":
            assert any(added == set(words(names[0])) for names in SUBJECT_PHRASES.values())
        else:
            assert added <= ({"picture"} if concept == "van_gogh" else set())
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", absent)


def words(text: str) -> list[str]:
    return re.findall("[a-z'-]+", text)


def test_pairs_of_an_unknown_concept_are_refused():
    with pytest.raises(ValueError, match="unknown concept 'smoke'"):
        prompt_pairs("smoke", 4, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.txt"])
@pytest.mark.parametrize(("content", "sentence"), STAND_INS.values(), ids=STAND_INS)
def test_what_lies_in_the_place_of_prompts_is_called_what_it_is(tmp_path: Path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        list(PromptFile(tmp_path / name).records())
