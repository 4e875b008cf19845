"""Pages as text: one self-contained HTML document each, from templates that escape whatever they are given."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffusion.files import write_atomically
from experiments.job.store import content_hash
from experiments.results.report.comparison import compare_runs
from experiments.results.report.facts import gather, percent, title_of
from experiments.results.report.words import readable, shown

TEMPLATES = "templates"


def environment() -> Environment:
    """Templates in which every text is escaped, and shown with all its characters."""
    made = Environment(
        loader=PackageLoader(__package__, TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "readable": readable}
    return made


def run_page(summary: Mapping[str, Any]) -> str:
    """The page of one run.

    Raises:
        ValueError: A file of the run is damaged.
    """
    return _page("run.html", title_of(summary), run=gather(summary))


def comparison_page(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The page of several runs.

    Raises:
        ValueError: A file of a run is damaged.
    """
    return _page("comparison.html", f"{len(summaries)} runs", comparison=compare_runs(summaries))


def leaderboard_page(boards: object, folder: Path) -> str:
    """The page of the leaderboard; see :mod:`experiments.results.report.leaderboard`."""
    return _page("leaderboard.html", "Leaderboard", boards=boards, folder=str(folder))


def write_report(summaries: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the page of one run or of several into ``folder``, under a name of its own."""
    page = run_page(summaries[0]) if len(summaries) == 1 else comparison_page(summaries)
    runs = [summary["run"] for summary in summaries]
    name = f"report_{runs[0]}" if len(runs) == 1 else f"report_{len(runs)}_runs_{content_hash(sorted(runs))}"
    return write_page(page, folder / f"{name}.html")


def write_page(page: str, path: Path) -> Path:
    """Write a page to ``path``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _page(template: str, title: str, **facts: object) -> str:
    made = environment()
    style, script = (_source(name) for name in ("style.css", "script.js"))
    # The page's own script runs, by its hash, and no other; nothing is fetched from anywhere.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return made.get_template(template).render(
        title=title, style=Markup(style), script=Markup(script), policy=Markup(policy), **facts
    )


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value
