"""The report of a real run in a real browser: plots are drawn, nothing is logged, text that wants to run does not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from browsing import Browser, browser, need_chromium
from fusechat.commands.run import run
from fusechat.pipeline import build_steps, load_recipe
from fusechat.report import stage
from fusechat.run.files import read_json, write_json
from reporting import HOSTILE, OWN

pytestmark = pytest.mark.slow

TITLE = "tiny · FuseChat"
DIRECTORY = f'<img src=x onerror="{OWN}">'  # of a model: what tables call it by
ANSWER = f'<script>{OWN}</script><img src=x onerror="{OWN}">'


@pytest.fixture(scope="module")
def page(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with such text in its conversations, a model's name, a tensor's name and the answers."""
    need_chromium()
    directory = tmp_path_factory.mktemp("browser")
    named = shutil.copytree(models["mistral"], directory / DIRECTORY)
    path = runs.write_recipe(directory, {**models, "mistral": named}, fuse={"training": runs.TRAINING})
    for name in ("train.jsonl", "own.jsonl", "held-out.jsonl", "own-held-out.jsonl"):
        lines = (directory / name).read_text(encoding="utf-8")
        messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": ANSWER}]
        (directory / name).write_text(json.dumps({"messages": messages}) + "\n" + lines, encoding="utf-8")
    recipe, work = load_recipe(path), directory / "work"
    run(recipe, work)
    upstream = dict(build_steps(recipe, work)[-1].upstream)
    merged = work / "merge" / "merge_report.json"
    report = read_json(merged)
    report["tensors"] |= {
        f"model.layers.0.{ANSWER}": next(t for t in report["tensors"].values() if "coefficients" in t)
    }
    write_json(merged, report)
    answering = [step for name, step in upstream.items() if name.startswith("answers/")]
    assert answering
    for step in answering:
        entries = read_json(step.directory / "answers.json")
        write_json(step.directory / "answers.json", [{**entry, "text": ANSWER} for entry in entries])
    (directory / "report").mkdir()
    stage._write(directory / "report", recipe, upstream)
    return directory / "report" / stage.PAGE


@pytest.fixture(scope="module")
def chromium(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def state(chromium: Browser) -> dict[str, Any]:
    return {
        "title": chromium.run("document.title"),
        "plots": chromium.run("document.documentElement.dataset.plots"),
        "said": chromium.said,
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_plots_are_drawn_and_nothing_is_logged(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    chromium.open(page, width=width, dark=dark)
    assert state(chromium) == {"title": TITLE, "plots": "6", "said": []}
    assert chromium.run("document.querySelectorAll('.plot svg.main-svg').length") >= 6
    assert chromium.run("[...document.querySelectorAll('.plot')].every(e => e.querySelector('.trace, .hm image'))")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("innerWidth") == width
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert {address.partition(":")[0] for address in chromium.asked} <= {"file", "data"}
    assert len([address for address in chromium.asked if address.startswith("file:")]) == 1


def test_hostile_text_is_shown_and_does_not_run(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert chromium.run("document.querySelectorAll('img, [onerror], [onload], a[href*=\":\"]').length") == 0
    assert chromium.run("document.scripts.length") == 4, "three of ours and Plotly"

    def texts(selector: str) -> list[str]:
        return list(chromium.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"))

    assert texts(".answer.fused .said")[0] == ANSWER
    assert HOSTILE in texts(".question")
    assert any(DIRECTORY in text for text in texts("#models td"))
    assert any(DIRECTORY in text for text in texts("table.results td"))
    assert any(text == HOSTILE for text in texts("#alignment .asked"))
    assert "<script>document.title='owned'</script>" in "".join(texts("#alignment .token.pivot > bdi"))
    assert ANSWER in texts("#plot-coefficients-0 .xtick text")
    assert state(chromium)["title"] == TITLE


def test_no_script_runs_even_where_text_were_taken_for_markup(chromium: Browser, page: Path, tmp_path: Path) -> None:
    """The page with an answer put in as it is: the policy holds where escaping would fail."""
    html = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(
        html.replace("<main>", f'<main>{ANSWER}<a id=bad href="javascript:{OWN}">x</a>', 1), encoding="utf-8"
    )
    chromium.open(broken)
    chromium.run("document.getElementById('bad').click()")
    found = state(chromium)
    assert (found["title"], found["plots"]) == (TITLE, "6")
    assert sum("Content Security Policy" in text for text in found["said"]) >= 3


def test_what_is_told_of_a_token_and_of_a_tensor_comes_with_the_mouse(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert chromium.run("[...document.querySelectorAll('.tip')].every(e => getComputedStyle(e).display === 'none')")
    chromium.point_at("details[open] .token")
    shown = "[...document.querySelectorAll('.tip')].filter(e => getComputedStyle(e).display !== 'none')"
    assert chromium.run(f"{shown}.length") == 1
    assert "pivot token 0" in chromium.run(f"{shown}[0].textContent")
    chromium.point_at("#plot-coefficients-0 .nsewdrag")
    hover = chromium.run(
        """new Promise((resolve) => {
            const look = (left) => {
                const text = document.querySelector("#plot-coefficients-0 .hoverlayer")?.textContent || "";
                if (text || !left) resolve(text); else setTimeout(() => look(left - 1), 50);
            };
            look(60);
        })"""
    )
    assert "coefficient 0." in hover


def test_on_paper_everything_is_open_and_afterwards_as_it_was(chromium: Browser, page: Path) -> None:
    chromium.open(page, dark=True)
    closed = chromium.run("document.querySelectorAll('details:not([open])').length")
    assert closed
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    assert chromium.run("document.querySelectorAll('details:not([open])').length") == 0
    assert chromium.run("Math.max(...[...document.querySelectorAll('.main-svg')].map(e => e.clientWidth))") == 660
    chromium.run("dispatchEvent(new Event('afterprint'))")
    assert chromium.run("document.querySelectorAll('details:not([open])').length") == closed
    pdf = chromium.pdf()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") >= 5
    assert chromium.said == []


def test_a_browser_that_cannot_unpack_says_so(chromium: Browser, page: Path) -> None:
    added = chromium.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    chromium.open(page)
    chromium.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
    assert state(chromium) == {"title": TITLE, "plots": "failed", "said": []}
    said = chromium.run("[...document.querySelectorAll('.plot')].map(e => e.textContent)")
    assert set(said) == {"The plots cannot be drawn: this browser cannot unpack them (no DecompressionStream)."}
