import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from components.evaluation.gate import Decision
from components.evaluation.report import render_html

FIGURES = {"hr@10": 0.15, "hr@10_se": 0.01, "ndcg@10": 0.08, "ndcg@10_se": 0.005, "pv/hr@10": 0.2}
REPORT = {
    "retriever": FIGURES,
    "item_knn": {name: value / 2 for name, value in FIGURES.items()},
    "popularity": {name: value / 3 for name, value in FIGURES.items()},
    "users": 943,
    "items": 1682,
    "invalid_rate": 0.0,
    "cold_start_users": 7,
    "params": {"item_knn": {"decay": 0.8}},
    "protocol": {"split": "leave_one_out"},
}
CURVE = [{"step": step, "epoch": 0, "loss": 3.0 / step, "ntp": 2.0 / step} for step in range(1, 9)]
SIDS = Markup("<section><h2>Semantic IDs</h2>&lt;b&gt;</section>")
EXAMPLE = {
    "user_id": "u1",
    "history": ["Fargo"],
    "slate": [{"title": "Heat", "score": -1.5}, {"title": "Alien", "score": -2.0}],
    "truth": ["Heat"],
}
RUN = {
    "versions": {"torch": "2.13"},
    "config": {"seed": 0},
    "seconds": {"training": 12.5, "evaluation": 2.5},
    "data": {"quarantined rows": 3},
}


TOLD = [
    *("0.1500", "+100.0% against item knn", "943", "7 more without a history", "pv/hr@10", "± 0.0100", "15 s"),
    *("Gate: refused", "too low", "Training loss", str(SIDS), "Fargo", "quarantined rows"),
    *("leave_one_out", "item knn: decay", "torch", "&#34;seed&#34;: 0"),
]


def full(**changes):
    parts = {"loss_curve": CURVE, "sid_section": SIDS, "examples": [EXAMPLE], "run": RUN, "decision": Decision(False, ("too low",))}
    return render_html(REPORT, **(parts | changes))


def test_the_page_tells_the_figures_the_decision_and_the_films():
    page = full()
    for text in TOLD:
        assert text in page


def test_an_item_of_the_truth_is_marked_in_the_slate():
    page = full()
    assert '<li class="hit">Heat' in page
    assert "<li>Alien" in page


@pytest.mark.parametrize(
    ("part", "heading"),
    [
        ({"loss_curve": []}, "Training loss"),
        ({"sid_section": None}, "Semantic IDs"),
        ({"examples": []}, "<h2>Examples"),
        ({"run": None}, "Seconds a step"),
        ({"run": None}, "<summary>Configuration"),
        ({"decision": None}, "Gate:"),
    ],
)
def test_a_part_without_data_is_left_out(part, heading):
    assert heading in full()
    assert heading not in full(**part)


def test_an_empty_report_still_gives_a_page():
    assert "RankGR evaluation" in render_html({})


def test_every_text_is_escaped():
    hostile = "<script>alert('x')</script>"
    example = {"user_id": hostile, "history": [hostile], "slate": [{"title": hostile, "score": 0.0}], "truth": [hostile]}
    run = {"versions": {hostile: hostile}, "config": {hostile: hostile}, "seconds": {hostile: 1.0}, "data": {hostile: hostile}}
    page = full(examples=[example], run=run, decision=Decision(True, (hostile,)), sid_section=hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_loads_nothing_from_outside():
    class Links(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag, attrs):
            assert tag not in {"script", "link", "iframe", "img", "object"}
            self.found += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]

    parser = Links()
    parser.feed(full())
    assert all(link.startswith("#") for link in parser.found)
    assert "@import" not in full()


def test_charts_are_well_formed_and_their_ids_do_not_clash():
    page = full()
    charts = [ET.fromstring(piece.split("</svg>")[0].join(["<svg", "</svg>"])) for piece in page.split("<svg")[1:]]  # noqa: S314
    assert len(charts) == 3
    ids = [{element.get("id") for element in chart.iter()} - {None} for chart in charts]
    assert sum(map(len, ids)) == len(set().union(*ids))


def test_the_same_numbers_give_the_same_page():
    assert full() == full()


def test_figures_that_are_not_finite_are_shown_as_missing():
    page = render_html(
        {"retriever": {"hr@10": math.nan, "ndcg@10": 0.1}, "popularity": {"hr@10": 0.1, "ndcg@10": 0.0}, "invalid_rate": math.nan}
    )
    assert "n/a" in page
    assert "nan%" not in page
