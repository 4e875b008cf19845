"""What mkdocs makes of the code: a page for the fields of every group, the published numbers, and results as they lie.

Fields come from what ``eraselab explain`` prints, so that no page can say something else.
"""

import csv
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
CANVASES = {"canvas": "weights", "canvas_mmdit": "weights_mmdit"}
"""Folder of the site, and where the pictures of a canvas lie in diffusion/canvas."""

INTRODUCTION = """# Every field

Generated from the YAML files and docstrings, as `eraselab explain` prints them. A field is typed by its dotted name,
`eraser.steps=200`; one with a plus is the class's own, which the YAML file leaves out. A default as *1000 (canvas:
250)* is the published value first, then what others take ([presets](../presets.md)).

| group | choices |
|---|---|
"""

PUBLISHED = """# Published numbers

What papers and leaderboards report, with what is to be doubted. A run by the same protocol, concept and method prints
its number in the job's last lines and in tables, with everything that makes it not comparable; conditions are in
`experiments/results/published_conditions.yaml`. **No published number was reproduced with this code yet**: our own
measurements, on the canvas, are [here](measured.md), and comparable with none of these. Numbers are as printed in the
source; none was checked by running their code.

| protocol | model | concept | method | metric | value | prompts | source | doubt |
|---|---|---|---|---|---|---|---|---|
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those that lie in docs/."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - the pages can be made without mkdocs

    for path, text in generated_pages():
        files.append(File.generated(config, path, content=text))
    lying = {"results": [*RESULTS.glob("*.md"), *RESULTS.glob("*.png")]}
    lying |= {name: [*(ROOT / "diffusion" / "canvas" / folder).glob("*.png")] for name, folder in CANVASES.items()}
    for folder, paths in lying.items():
        for path in sorted(paths):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show what docstrings call ``:class:`x``` as code."""
    return re.sub(r":(?:class|func|meth|mod|attr|data|exc):<code>~?([^<]+)</code>", r"<code>\1</code>", html)


def generated_pages() -> Iterator[tuple[str, str]]:
    """Path within docs/ and text of every generated page."""
    from experiments.command.explaining import choices, explain_choice, explain_job, groups  # noqa: PLC0415

    index = INTRODUCTION + "| [job](job.md) | fields that belong to no choice |\n"
    for group in groups():
        names = choices(group)
        index += f"| [{group}]({group}.md) | {', '.join(f'`{name}`' for name in names)} |\n"
        plus = "+" if group in {"experiment", "method"} else ""
        parts = [f"# {group}\n"]
        for name, comment in names.items():
            explained = explain_choice(f"{group}={name}")
            parts.append(f"## `{plus}{group}={name}`\n")
            parts.append(_told(explained.comment or comment))
            parts.append(f"Class `{explained.target}`.\n" if explained.target else "")
            parts.append(_told(explained.about))
            parts.append(_table(explained.fields))
        yield f"fields/{group}.md", "\n".join(parts)
    yield "fields/job.md", f"# The job\n\nFields that belong to no choice.\n\n{_table(explain_job().fields)}"
    yield "fields/index.md", index
    yield "published.md", PUBLISHED + "\n".join(_published())


def _published() -> Iterator[str]:
    with (ROOT / "experiments" / "results" / "published.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            value = " ".join(filter(None, [row["value"], row["unit"]]))
            cells = (
                *(row["protocols"], row["model"], row["concept"], row["method"], row["metric"], value),
                *(row["prompts"], row["source"], row["doubt"] or ""),
            )
            yield f"| {' | '.join(map(_cell, cells))} |"


def _table(fields: Any) -> str:
    if not fields:
        return "No fields.\n"
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in fields:
        told = [field.meaning, f"*Allowed:* {field.allowed}." if field.allowed else ""]
        told.append(f"*Source:* {field.source}" if field.source else "")
        meaning = " ".join(map(_cell, filter(None, told)))
        lines.append(f"| `{field.typed}` | {_cell(field.default)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text within a table: no markup of its own but what is put around it here."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[", "\\[").replace("_", "\\_")


def _told(text: str) -> str:
    """A comment or docstring in paragraphs and lists, without markup of its own."""
    paragraphs = (re.sub(r"\n(?!\s*- )\s*", " ", part.strip()) for part in text.split("\n\n"))
    return "\n".join(f"<p style='white-space: pre-line'>{escape(each)}</p>" for each in paragraphs if each) + "\n"
