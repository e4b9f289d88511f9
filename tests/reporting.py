"""A report's contents by hand, and text that would run if it were taken for markup."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fusechat.data.rejected import LeftOut
from fusechat.generate.chosen import read_candidates
from fusechat.models.facts import DataFile, Facts, Model
from fusechat.recipe.generate import Choose
from fusechat.report.answers import cards
from fusechat.report.authors import largest, places
from fusechat.report.costs import Cost, StageCost
from fusechat.report.examples import examples, pick
from fusechat.report.generated import AnswerCost, Generated
from fusechat.report.page import Contents
from fusechat.report.results import result_tables
from fusechat.report.summary import summarise
from fusechat.report.teaching import ChoiceRow

OWN = "document.title='owned'"
HOSTILE = (
    f'</script><script>{OWN}</script><img src=x onerror="{OWN}"><!-- <svg onload={OWN}> {{{{ 7 * 7 }}}} & \u2028\''
)


def students_t(items: int) -> float:
    """Standard errors in half of a 95% interval over so many items, by SciPy."""
    from scipy.stats import t

    return float(t.ppf(0.975, items - 1))


def record(**changes: Any) -> dict[str, Any]:
    """A record of results.json in schema 2."""
    return {
        "suite": "bits-per-byte",
        "data": "data-held-out",
        "metric": "bits_per_byte",
        "role": "pivot",
        "model": "llama",
        "value": 1.5,
        "standard_error": 0.1,
        "n": 20,
        "missing": 0,
        "why": None,
        "higher_is_better": False,
        "compared_with": None,
        "difference_to_pivot": None,
        "difference_standard_error": None,
        "difference_n": 0,
        "settings": {"dtype": "float32"},
        "versions": {"fusechat": "0.1.0"},
        **changes,
    }


def compared(difference: float | None, error: float | None, **changes: Any) -> dict[str, Any]:
    """A record of another model, with its difference to the pivot."""
    return record(
        **{
            "role": "fused",
            "model": "tiny",
            "value": 1.5 + (difference or 0),
            "compared_with": "llama",
            "difference_to_pivot": difference,
            "difference_standard_error": error,
            "difference_n": 20,
            **changes,
        }
    )


def results(*scores: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 2, "scores": list(scores)}


def contents(text: str = "text", **changes: Any) -> Contents:
    """A small page's contents, with `text` wherever a model, a file or a user may put one."""
    coefficients = {"coefficients": {"one": 0.3, "two": 0.7}, "selected": 0.5, "erased": 0.1}
    asked = {"data": "data-held-out", "id": "1", "prompt": [{"role": "user", "content": text}], "reference": text}
    answers = {
        name: [{**asked, "text": text, "complete": name != "fused"}] for name in ("fused", "pivot", "source-one")
    }
    model = Model(
        "source", text, text, (text,), f"sha256:{'a' * 64}", text, Facts(text, 2, 1000, text, 1, 9, text, text)
    )
    scores = results(record(model=text), compared(-0.5, 0.1, model=text, why=text, settings={text: text}))
    given: dict[str, Any] = {
        "name": text,
        "summary": summarise(scores, text),
        "tables": result_tables(scores),
        "models": [model],
        "data": [DataFile(text, text, text, text, {"conversations": 1, "responses": 1, "response_tokens": 1})],
        "overlap": [
            {"evaluation": text, "training": text, "conversations": 3, "found": {text: 1, "same prompt": 1}},
            {"evaluation": text, "training": "other", "conversations": 3, "found": {}},
        ],
        "losses": {text: [{"step": 1, "sft_loss": 2.0, "fusion_loss": 3.0}, {"step": 2, "eval_loss": float("nan")}]},
        "alignment": {text: {"positions": 3, "coverage_of_positions": 0.5, "back_off_mass": text}},
        "samples": {},
        "choices": [ChoiceRow(text, text, "conversation", 4, ((text, 3, 0.75), ("pivot", 1, 0.25)), 0)],
        "merged": {
            "targets": ["one", "two"],
            "method": text,
            "mean_coefficients": {"one": 0.3, "two": 0.7},
            "tensors": {f"model.layers.0.{text}": coefficients},
        },
        "answers": cards(answers, {"fused": text, "source-one": text}),
        "costs": [StageCost(Cost("fuse", 61.2, 10**9, None, 10**6), (Cost(text, 61.2, 10**9, None, 10**6),))],
        "recipe": text,
        "seed": 7,
        "left_out": [LeftOut(text, text, 3, {text: 1}, Path(text))],
        "notes": [(text, text)],
        "versions": {"fusechat": "0.1.0", text: text},
    }
    return Contents(**{**given, **changes})


def line(prompt: str, *candidates: tuple[str, dict[str, int], dict[str, float | None]], **more: Any) -> dict[str, Any]:
    """A line of candidates.jsonl: a prompt, and of each candidate its text, how many answers of whom it is, its scores."""
    return {
        "prompt_id": prompt,
        "data": ["data"],
        "messages": [{"role": "user", "content": prompt}],
        "candidates": [{"text": text, "answers": answers, "scores": scores} for text, answers, scores in candidates],
        "chosen": 0,
        "author": next(iter(candidates[0][1])) if candidates else None,
        "score": None,
        "kept": True,
        "no_candidates": {},
        **more,
    }


def read(directory: Path, *lines: dict[str, Any]) -> list[Any]:
    """These lines as the report reads them, from a file; each author scores by its own name."""
    (directory / "candidates.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return list(read_candidates(directory, {name: name for one in lines for name in _authors(one)}))


def _authors(line: dict[str, Any]) -> list[str]:
    return [name for one in line["candidates"] for name in one["answers"]]


def generated(lines: list[Any], text: str = "text", **changes: Any) -> Generated:
    """What the page tells of these lines, with `text` wherever a model, a file or a user may put one."""
    names = list(dict.fromkeys(name for one, _ in lines for name in _authors(one)))
    by_name = {name: sum(one["kept"] and one["author"] == name for one, _ in lines) for name in names}
    every = places(lines, names, "likelihood")
    given: dict[str, Any] = {
        "counts": {
            "prompts": len(lines),
            "chosen_by": "likelihood",
            "chosen": sum(one["kept"] for one, _ in lines),
            "authors": by_name,
            "agreement": 0.5,
            "left_out": {text: 3},
            "repeated": 2,
        },
        "by": text,
        "unit": "nats per byte",
        "by_author": True,
        "places": tuple(largest(every)),
        "sets": max(1, len(every) - 1),
        "asked": (),
        "sha256": f"sha256:{'b' * 64}",
        "examples": tuple(examples(lines, pick(lines, Choose(by="likelihood"), 0))),
        "left_out": (LeftOut(text, text, 3, {text: 1}, Path(text)),),
        "costs": (AnswerCost(text, 5, 50, 7, 70, 9, 61.0), AnswerCost("pivot", None, None, 7, 90, None, 2.0)),
    }
    return Generated(**{**given, **changes})


class Elements(HTMLParser):
    """The elements of a page, each with its attributes and what it holds directly; comments are none of the page's."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.inside: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "br"):
            self.inside.append(self.found[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.inside[-1][2].append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def named(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(data)) for name, attributes, data in self.found if name == tag]
