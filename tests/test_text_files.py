"""Whatever a prompt says, a spreadsheet, a terminal, Markdown, LaTeX and a picture show it as text."""

import csv
import io
import logging
from pathlib import Path

import pandas as pd
import pytest
from PIL import ImageFont

from diffusion.text_files import csv_text, markdown_cell, plain_cell, visible
from experiments.command.errors import VisibleFormatter, explain
from experiments.results import grid, screen
from experiments.results.writing import latex, markdown_table, write_csv

WIPE = "a\x1b[2J\x1b]0;owned\x07church\u202e"


def test_every_character_survives_a_csv_file() -> None:
    texts = [f"a{chr(code)}b" for code in (*range(0xD800), *range(0xE000, 0x1000F))]
    (_, *rows) = csv.reader(io.StringIO(csv_text(["text"], [[text] for text in texts]), newline=""), strict=True)
    assert [plain_cell(cell) for (cell,) in rows] == texts


def test_a_table_with_any_text_is_read_back_by_pandas(tmp_path: Path) -> None:
    table = pd.DataFrame({"concept": ["a\rb", "=1+1", None], "rate": [0.1, float("nan"), 1e-17], "n": [1, 2, 3]})
    write_csv(table, tmp_path / "table.csv")
    read = pd.read_csv(tmp_path / "table.csv", lineterminator="\n")
    assert read["concept"].fillna("").tolist() == ["a\rb", "'=1+1", ""]
    assert read["rate"].fillna(-1).tolist() == [0.1, -1, 1e-17]
    assert read["n"].tolist() == [1, 2, 3]


def test_a_markdown_table_shows_any_text_in_its_cell() -> None:
    table = pd.DataFrame({"concept": ["a|b\n<img src=x>", "`c` [d](http://e)"], "rate": ["98 % [90, 99]", ""]})
    rows = markdown_table(table, disable_numparse=True).splitlines()
    assert len(rows) == 4
    assert r"a\|b\\n\<img src=x>" in rows[2]
    assert r"\`c\` [d]\(http://e)" in rows[3]
    assert "98 % [90, 99]" in rows[2]
    assert markdown_cell("a church & a fish") == r"a church \& a fish"


def test_latex_shows_any_text() -> None:
    assert r"\textbackslash input\{x\} 50\% \textbackslash x1b" in latex(pd.DataFrame({"a": ["\\input{x} 50% \x1b"]}))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_nothing_by_a_prompt(terminal: bool, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    console = screen.open_console()
    console.print(visible(f"found: [red]{WIPE}"), soft_wrap=True)
    record = logging.LogRecord("log", logging.INFO, "", 0, "%s\nnext", (WIPE,), None)
    print(VisibleFormatter("%(message)s").format(record))
    print(explain(OSError(WIPE)))
    shown = capsys.readouterr().out
    assert shown.count("\\x1b[2J") == 3
    assert "[red]" in shown
    assert "church\\u202e\nnext" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_a_long_prompt_ends_in_an_ellipsis_and_a_short_one_does_not() -> None:
    assert grid.wrapped("a red church", 2) == ["a red church"]
    *whole, last = grid.wrapped("a red church " * 40, 3)
    assert len(whole) == 2
    assert last.endswith(" …")
    assert all(len(line) > 20 for line in (*whole, last))
    (cut,) = grid.wrapped("x" * 500, 1)
    assert cut.endswith(" …")


def test_a_prompt_is_drawn_in_a_font_that_has_its_letters(monkeypatch) -> None:
    text, font = grid.drawable("церковь")
    assert text == "церковь"
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert font.getmask("ц").getbbox() != font.getmask("я").getbbox() or bytes(font.getmask("ц")) != bytes(
        font.getmask("я")
    )
    monkeypatch.setattr(grid, "_font_files", lambda: (grid._BROAD_FONT,))
    assert grid.drawable("日本 church\n\x1b[2J")[0] == r"\u65e5\u672c church \x1b[2J"
