"""The page of the report: what stands in it, that no text becomes markup, and which scripts may run."""

import base64
import gzip
import hashlib
import json

from plotly.offline import get_plotlyjs

from fusechat.report.answers import LONGEST, cards
from fusechat.report.page import render_page
from fusechat.report.plots import POINTS, loss_figures
from fusechat.report.scripts import as_json
from reporting import HOSTILE, Elements, contents

SECTIONS = "result answers models alignment teaching training merging costs reproduce".split()  # noqa: SIM905


def test_every_section_is_there_and_the_result_first() -> None:
    page = Elements(render_page(contents()))
    assert [attributes["id"] for attributes, _ in page.named("section")] == SECTIONS
    linked = [attributes["href"] for attributes, _ in page.named("a")]
    assert linked == [f"#{section}" for section in SECTIONS]


def test_what_there_is_nothing_of_is_left_out_or_said() -> None:
    merged = {**contents().merged, "tensors": {}}
    html = render_page(contents(answers=[], tables=[], alignment={}, losses={}, merged=merged))
    page = Elements(html)
    assert [attributes["id"] for attributes, _ in page.named("section")] == [
        section for section in SECTIONS if section not in ("answers", "merging")
    ]
    assert "Nothing was measured" in html
    assert "Nothing was aligned" in html
    assert len(html) < 100_000, "without plots there is no Plotly"


def test_no_text_becomes_markup() -> None:
    plain, hostile = (render_page(contents(text)) for text in ("x" * len(HOSTILE), HOSTILE))
    kinds = [[(tag, sorted(attributes)) for tag, attributes, _ in Elements(page).found] for page in (plain, hostile)]
    assert kinds[0] == kinds[1]
    assert "{{ 7 * 7 }}" in hostile


def test_the_policy_names_the_scripts_that_are_there_and_no_other() -> None:
    page = Elements(render_page(contents(HOSTILE)))
    policy = next(a["content"] for a, _ in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    scripts = page.named("script")
    assert [attributes.get("type") for attributes, _ in scripts] == [
        "application/json",
        "application/octet-stream;base64",
        None,
    ]
    packed, own = scripts[1][1], scripts[2][1]
    plotly = gzip.decompress(base64.b64decode(packed)).decode()
    assert plotly == get_plotlyjs()
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (own, plotly)]
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in hashes)
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == "'unsafe-inline'"


def test_data_cannot_close_its_element_and_reads_back_as_it_was() -> None:
    value = {HOSTILE: [HOSTILE, 1.5, None]}
    text = as_json(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")
    page = Elements(render_page(contents(HOSTILE)))
    figures = json.loads(page.named("script")[0][1])
    names = [figure["name"] for figure in figures]
    assert names == ["sft-0", "fusion-0", "coefficients-0", "coefficients-1"]
    places = [a["id"] for a, _ in page.named("div") if a.get("class") == "plot"]
    assert places == [f"plot-{name}" for name in names]


def test_it_is_one_small_file_and_the_same_each_time() -> None:
    page = render_page(contents(HOSTILE))
    assert page == render_page(contents(HOSTILE))
    assert len(page.encode()) < 2_500_000
    for _, attributes, _ in Elements(page).found:
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")


def test_the_two_terms_of_the_loss_have_plots_of_their_own() -> None:
    entries = [{"step": step, "loss": 9.0, "sft_loss": 2.0 * step, "fusion_loss": 1.0} for step in range(1, 4)]
    sft, fusion = loss_figures({"one": [*entries, {"step": 3, "eval_loss": 0.5}]})
    assert [(trace["name"], trace["x"], trace["y"]) for trace in sft.data] == [
        ("training", [1, 2, 3], [2.0, 4.0, 6.0]),
        ("held out", [3], [0.5]),
    ]
    assert [trace["y"] for trace in fusion.data] == [[1.0, 1.0, 1.0]]
    (alone,) = loss_figures({"plain": [{"step": 1, "loss": 2.5}]})
    assert alone.data[0]["y"] == [2.5]
    assert loss_figures({"nothing": []}) == []


def test_a_long_curve_is_drawn_by_means_and_says_so() -> None:
    count = 3 * POINTS
    (figure,) = loss_figures({"one": [{"step": step, "sft_loss": float(step)} for step in range(count)]})
    assert len(figure.data[0]["x"]) == POINTS
    assert figure.data[0]["y"][0] == 1.0
    assert figure.data[0]["x"][-1] == count - 1
    assert "mean of up to 3 steps" in figure.caption
    assert figure.caption in render_page(contents(losses={"one": [{"step": s, "sft_loss": 1.0} for s in range(count)]}))


def test_a_loss_that_is_no_number_is_a_gap() -> None:
    (figure,) = loss_figures({"one": [{"step": 1, "sft_loss": float("nan")}, {"step": 2, "sft_loss": 1.0}]})
    assert figure.data[0]["y"] == [None, 1.0]


def test_the_first_answers_of_each_set_are_open() -> None:
    """Of one set the first three."""
    for sets, expected in (("aaaa", "aaa-"), ("aaabb", "aa-b-"), ("aabbccdd", "a-b-c---")):
        entry = {"prompt": [{"role": "user", "content": "q"}], "text": "x", "complete": True}
        found = cards({"pivot": [{**entry, "data": f"{name}-held-out"} for name in sets]}, {})
        assert "".join(card.data if card.is_open else "-" for card in found) == expected


def test_answers_stand_in_order_and_long_ones_are_cut() -> None:
    def said(text: str) -> list[dict[str, object]]:
        prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
        return [
            {"data": "data-held-out", "id": "1", "prompt": prompt, "reference": "So.", "text": text, "complete": True}
        ]

    (card,) = cards({"fused": said("f"), "source-a": said("x" * (LONGEST + 1)), "pivot": said("")}, {"fused": "tiny"})
    assert card.data == "data"
    assert card.prompt == (("system", "Be short."), ("user", "Why?"))
    assert [(answer.kind, answer.name) for answer in card.answers] == [
        ("pivot", "pivot"),
        ("source", "source-a"),
        ("fused", "tiny"),
        ("reference", "held-out answer"),
    ]
    assert card.answers[1].cut
    assert card.answers[1].text == "x" * LONGEST + "…"
    html = render_page(contents(answers=[card]))
    assert "cut here for the page" in html
    assert "(empty)" in html
