"""The report page in a real browser, where there is one: it runs without errors, fetches nothing and fits a phone."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.results.report.page import comparison_page, run_page
from tests.report_runs import HOSTILE, make_run, make_sweep

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def browse(folder: Path, page: Path, *options: str) -> tuple[str, str]:
    """What headless Chromium prints of ``page``, and what it logs; a folder keeps its profile."""
    profile = folder / "profile"
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-features=NetworkTimeServiceQuerying", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"),
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def console_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


BROWSERS_OWN = re.compile(
    r"(data|chrome|chrome-extension|file|about|devtools):|https?://([\w-]+\.)*(google|googleapis|gvt1)\.com/"
)
"""What is no request, and what the browser asks for by itself on any page."""


def requests(log: Path) -> set[str]:
    """Every address that a page asked for, by the browser's log of the network."""
    asked = re.findall(r'"url":"([^"]+)"', log.read_text(errors="replace"))
    return {address for address in asked if not BROWSERS_OWN.match(address)}


PROBE = """<script>
window.addEventListener("load", () => {
  const frame = document.querySelector("iframe").contentDocument;
  const told = {};
  WORK
  const out = document.createElement("output");
  out.textContent = JSON.stringify(told);
  document.body.append(out);
});
</script>"""


def probed(folder: Path, page: Path, work: str, width: int = 390) -> str:
    """What the JavaScript ``work`` puts into ``told`` of the page, as it is in a window so wide."""
    outer = folder / "probe.html"
    outer.write_text(
        f"<!doctype html><body><iframe src='{page.name}' style='border:0;width:{width}px;height:900px'></iframe>"
        + PROBE.replace("WORK", work)
    )
    found, log = browse(folder, outer, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    assert not console_lines(log)
    return found[found.index("<output>") :]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    prompts = [HOSTILE, "a long " + 30 * "word" + " prompt", "third", "fourth"]
    path = tmp_path / "page.html"
    path.write_text(run_page(make_run(tmp_path / "store", prompts=prompts, mask=True, retained=6)))
    return path


def test_no_error_and_no_request(tmp_path: Path, page: Path) -> None:
    several = tmp_path / "several.html"
    several.write_text(comparison_page(make_sweep(tmp_path / "sweep")))
    for path in (page, several):
        net = tmp_path / f"{path.stem}.json"
        dom, log = browse(tmp_path, path, f"--log-net-log={net}", "--dump-dom")
        assert not console_lines(log)
        assert "</html>" in dom
        assert not requests(net)


def test_an_error_and_a_request_would_be_seen(tmp_path: Path) -> None:
    path, net = tmp_path / "broken.html", tmp_path / "net.json"
    path.write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'><script>undefinedFunction()</script>")
    assert console_lines(browse(tmp_path, path, f"--log-net-log={net}", "--dump-dom")[1])
    assert requests(net) == {"http://127.0.0.1:9/x.png"}


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(tmp_path: Path, page: Path, width: int) -> None:
    told = probed(tmp_path, page, "told.wide = frame.documentElement.scrollWidth;", width)
    assert f'"wide":{width}' in told


def test_filters_blur_and_enlarging_work(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(run_page(make_run(tmp_path / "store", concept="fire", erased="0000", attacked="1100")))
    told = probed(
        tmp_path,
        page,
        """
        const shown = () => [...frame.querySelectorAll(".gallery .case")].filter((one) => one.offsetParent).length;
        told.all = shown();
        frame.querySelector("[data-filter='held']").click();
        told.held = shown();
        frame.querySelector("[data-filter='']").click();
        told.again = shown();
        const view = frame.querySelector("button.view");
        const filter = () => frame.defaultView.getComputedStyle(view.querySelector("img")).filter;
        told.blurred = filter() !== "none";
        view.click();
        told.revealed = filter() === "none";
        told.closed = !frame.querySelector("dialog").open;
        view.click();
        told.open = frame.querySelector("dialog").open;
        told.same = frame.querySelector("dialog img").src === view.querySelector("img").src;
        """,
    )
    assert '"all":4,"held":2,"again":4,"blurred":true,"revealed":true,"closed":true,"open":true,"same":true' in told


@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_is_drawn(tmp_path: Path, page: Path, width: int) -> None:
    shot = tmp_path / f"{width}.png"
    browse(tmp_path, page, f"--window-size={width},900", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        assert picture.size == (width, 900)
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
