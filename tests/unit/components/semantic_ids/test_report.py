"""The page about a SID table: what it says, what it leaves out, and that nobody's title gets into its markup."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from markupsafe import Markup

from components.semantic_ids import charts
from components.semantic_ids.quantize import ResidualKMeans
from components.semantic_ids.report import format_figure, render_page, render_section
from components.semantic_ids.shards import Codebook
from components.semantic_ids.stats import prefix_hit_rate, sid_statistics

HOSTILE = "<script>alert('x')</script>"
N, CODES = 60, 4
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(N, 5)).astype(np.float32)
BOOKS = [Codebook.free(RANDOM.normal(size=(CODES, 5)).astype(np.float32)) for _ in range(3)]
TABLE = np.stack([np.arange(N) % 3, np.arange(N) // 3 % 2, np.arange(N) % CODES], axis=1).astype(np.int32)
TITLES = [f"Title {number}" for number in range(N)]
POPULARITY = np.arange(N)[::-1].copy()
PAIRS = np.array([[0, 3], [0, 6], [1, 2]])
ACCEPTANCE = {"kind": "pmi", "content_hit_rate": 0.125, "combined_hit_rate": 0.25, "gain": 1.0, "accepted": True, "pairs": 1234}
VOID = {"meta", "br", "link", "img", "hr"}


def stats() -> dict[str, Any]:
    return sid_statistics(FEATURES, TABLE, TABLE, ResidualKMeans.frozen(BOOKS)) | {"prefix_hit_rate": prefix_hit_rate(TABLE, PAIRS)}


def section(**changes: Any) -> Markup:
    parts = {
        "final_NM": TABLE,
        "titles": TITLES,
        "popularity_N": POPULARITY,
        "features_ND": FEATURES,
        "categories": [f"category {number % 10}" for number in range(N)],
        "acceptance": ACCEPTANCE,
        "limits": {"max_collision_rate": 0.5, "min_utilisation": 0.8},
    }
    figures, parts = changes.pop("stats", None) or stats(), parts | changes
    titles, categories = parts.pop("titles"), parts.pop("categories")
    return render_section(
        figures,
        titles=lambda rows: [titles[row] for row in rows],
        categories=None if categories is None else pa.array(categories).dictionary_encode(),
        **parts,
    )


@pytest.fixture(scope="module")
def whole() -> str:
    """The section with all its parts."""
    return str(section())


class Checker(HTMLParser):
    """Tags that close, attributes that load nothing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe", "img", "object"}
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]


def test_the_section_tells_the_figures(whole: str) -> None:
    # The codewords repeat every 12 items: five items a SID.
    for name, value in (("distinct SIDs", "12"), ("items of the fullest SID", "5"), ("collision rate", "1"), ("items", "60")):
        assert f'<td>{name}</td><td class="number">{value}<' in whole
    # Of a level's four codewords 20, 20, 20, 0 or 30, 30, 0, 0 items or 15 each.
    numbers = "".join(f'<td class="number">{value}</td>' for value in ("0.2500", "0.5000", "0.0000"))
    assert f"<td>Gini coefficient</td>{numbers}" in whole
    assert "1,234 pairs" in whole
    assert "(pmi)" in whole and "accepted: +100.0% against content alone" in whole
    assert "0.1250" in whole and "0.2500" in whole


def test_what_a_new_fit_changed_is_told() -> None:
    figures = {"items": N, "quantizer": "rq_vae", "without_features": 3, "churn": {"changed": 0.25, "new": 7}}
    text = section(stats=figures, features_ND=None, acceptance=None)
    for name, value in (("quantizer", "rq_vae"), ("items without features", "3"), ("items new since then", "7")):
        assert f'<td>{name}</td><td class="number">{value}<' in text
    assert '<td>SIDs changed since the earlier table</td><td class="number">0.2500<' in text


def test_limits_say_whether_they_were_kept(whole: str) -> None:
    text = whole
    assert "at most 0.5000: not kept" in text  # all items share their SID
    assert text.count("at least 0.8000: not kept") == 2  # 3 and 2 of 4 codewords
    assert text.count("at least 0.8000: kept") == 1
    for limits in (None, {"max_collision_rate": 1.0, "min_utilisation": 0.0}):
        assert "kept</small>" not in section(limits=limits, features_ND=None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"acceptance": None}, "Neighbours in timelines"),
        ({"acceptance": ACCEPTANCE | {"combined_hit_rate": math.nan}}, "Neighbours in timelines"),
        ({"acceptance": ACCEPTANCE | {"content_hit_rate": None}}, "Neighbours in timelines"),
        ({"features_ND": None}, "Items by category"),
        ({"stats": {"items": N}}, "Entropy of the codewords"),
        ({"stats": {"items": N}}, "<h3>Items a codeword"),
        ({"stats": {"items": N}}, "Codewords that neighbours share"),
        ({"stats": {"items": N}}, "Gini"),
        ({"final_NM": np.stack([np.arange(N)] * 2, axis=1).astype(np.int32)}, "<h3>Items a SID"),
        ({"final_NM": np.stack([np.arange(N)] * 2, axis=1).astype(np.int32)}, "<h3>Items that share codewords"),
    ],
)
def test_a_part_without_data_is_left_out(whole: str, changes: dict[str, Any], told: str) -> None:
    assert told in whole
    assert told not in section(**changes)


def test_a_refused_signal_without_a_gain() -> None:
    text = section(acceptance=ACCEPTANCE | {"accepted": False, "gain": None})
    assert "refused." in text


def test_every_text_is_escaped() -> None:
    text = section(titles=[HOSTILE] * N, categories=[HOSTILE] * N, acceptance=ACCEPTANCE | {"kind": HOSTILE})
    page = render_page(text, HOSTILE)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10


def test_a_section_that_is_no_markup_is_escaped() -> None:
    assert "<script" not in render_page(HOSTILE, "title")  # type: ignore[arg-type]


def test_the_page_is_whole_and_loads_nothing_from_outside(whole: str) -> None:
    page = render_page(Markup(whole), "Semantic IDs")  # noqa: S704
    assert page.startswith("<!doctype html>")
    links = Checker(page).links
    assert links and all(link.startswith("#") for link in links)
    assert {piece for piece in page.split('"') if "://" in piece} == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "@import" not in page and "url(" not in page.replace("url(#", "")


def test_charts_are_well_formed_and_their_ids_do_not_clash(whole: str) -> None:
    found = [ET.fromstring(piece.split("</svg>")[0].join(["<svg", "</svg>"])) for piece in whole.split("<svg")[1:]]  # noqa: S314
    assert len(found) == 5
    ids = [{element.get("id") for element in chart.iter()} - {None} for chart in found]
    assert sum(map(len, ids)) == len(set().union(*ids))


def test_the_same_arguments_give_the_same_bytes(whole: str) -> None:
    assert section() == whole
    assert section(seed=1) != whole


def test_examples_are_the_most_popular_items_of_a_codeword_and_of_its_fullest_second_one() -> None:
    table = np.array([[1, 2], [1, 2], [1, 0], [3, 0], [0, 1], [0, 1], [0, 1]], dtype=np.int32)
    text = section(
        final_NM=table,
        titles=list("ABCDEFG"),
        popularity_N=np.array([1, 2, 9, 9, 5, 6, 7]),
        categories=None,
        features_ND=None,
        stats={"items": 7},
    )
    text = text[text.index("Items that share codewords") :]
    lists = [[item.split("</li>")[0] for item in part.split("</ul>")[0].split("<li>")[1:]] for part in text.split("<ul>")[1:]]
    # First codeword 0 (three items), all of which have the second 1; then 1 (three items), two of which have 2. 3 has one item.
    assert lists == [["G", "F", "E"], ["G", "F", "E"], ["C", "B", "A"], ["B", "A"]]
    assert "1, 2 <span" in text  # no further level: no dots


def test_colours_are_the_most_frequent_categories_or_else_first_codewords() -> None:
    categories = ["rare"] + [f"group {number % 8}" for number in range(N - 1)]
    text = section(categories=categories)
    assert "Items by category" in text and "the rest" in text and ">&#9679;</span>&nbsp;rare" not in text
    assert all(f"group {number}" in text for number in range(8))
    for none in (None, [""] * N):
        text = section(categories=none)
        assert "Items by first codeword" in text and "the rest" not in text


def test_a_large_catalogue_is_sampled_and_the_page_stays_light() -> None:
    many = 10_000
    table = RANDOM.integers(0, 500, size=(many, 4)).astype(np.int32)
    books = [Codebook.free(np.zeros((8192, 8), dtype=np.float32))] * 4
    features = RANDOM.normal(size=(many, 8)).astype(np.float32)
    figures = sid_statistics(features, table, table, ResidualKMeans.frozen(books))
    text = section(
        stats=figures,
        final_NM=table,
        titles=["t" * 300] * many,
        popularity_N=np.zeros(many, np.int64),
        features_ND=features,
        categories=None,
    )
    assert "3,000 of 10,000 items" in text
    assert "t" * 101 not in text
    assert len(render_page(text, "large")) < 1_000_000


def test_the_plane_of_points_on_a_line_has_one_axis_whatever_their_order() -> None:
    line = np.outer(np.arange(-3, 4), [0.0, 2.0, 1.0]).astype(np.float32)
    points, shares = charts.principal_plane(line)
    assert shares == pytest.approx((1.0, 0.0), abs=1e-6)
    assert points[:, 0] == pytest.approx(np.arange(-3, 4) / 3, abs=1e-3)  # rising: the sign is that of the largest component
    assert points[:, 1] == pytest.approx(np.zeros(7), abs=1e-3)
    assert charts.principal_plane(line[::-1])[0][:, 0] == pytest.approx(points[::-1, 0], abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (3, 2)])
def test_few_items_and_narrow_features_are_drawn(shape: tuple[int, int]) -> None:
    count = shape[0]
    features = np.ones(shape, dtype=np.float32)
    text = section(
        features_ND=features,
        final_NM=TABLE[:count],
        titles=TITLES[:count],
        popularity_N=POPULARITY[:count],
        categories=None,
        stats={"items": count},
    )
    assert f"{count} of {count} items" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.1235"),
        (55.3, "55.30"),
        (1234567, "1,234,567"),
        (64.0, "64"),
        (math.inf, "n/a"),
        (None, "n/a"),
        ("cpu", "cpu"),
        (True, "True"),
    ],
)
def test_numbers_are_written_for_people(value: Any, text: str) -> None:
    assert format_figure(value) == text
