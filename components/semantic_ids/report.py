"""What a SID table looks like, as a section of a page: figures, charts, items that share codewords.

Shapes: N items, n items of a sample, D feature width, M levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from components.semantic_ids import charts
from components.semantic_ids.shards import Codes, Ints, Matrix
from components.semantic_ids.stats import bucket_sizes

Titles = Callable[[Ints], Sequence[str]]  # of such rows
SECTION: Final = "section.html"
_TEMPLATE = "semantic_ids/report.html.j2"
_FACTS: Final = {
    "quantizer": "quantizer",
    "items": "items",
    "without_features": "items without features",
    "sids": "distinct SIDs",
    "collision_rate_before": "collision rate of the nearest codes",
    "collision_rate": "collision rate",
    "largest_bucket": "items of the fullest SID",
    "moved": "items moved to another SID",
    "duplicates": "items with the vector of another",
    "reconstruction_error": "share of the variance lost",
}
_LEVEL_FACTS: Final = {
    "utilisation": "codewords used",
    "perplexity": "perplexity",
    "gini": "Gini coefficient",
    "entropy": "entropy, bits",
    "conditional_entropy": "given the prefix, bits",
    "size_min": "items of the rarest",
    "size_max": "of the most frequent",
}
_SAMPLE, _GROUPS, _EXAMPLES, _TITLES, _TITLE_LENGTH = 3000, 8, 6, 6, 100


def templates() -> Environment:
    """The pages' templates below `components`; every text is escaped, and `figure` writes numbers for people."""
    loader = FileSystemLoader(Path(__file__).parents[1])
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["figure"] = format_figure
    return found


def format_figure(value: Any) -> str:
    """A number for people: counts with separators, fractions with four digits, what is not finite as n/a."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "n/a"
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "n/a" if value is None else str(value)


def render_section(
    stats: Mapping[str, Any],
    *,
    final_NM: Codes,
    titles: Titles,
    popularity_N: Ints,
    features_ND: Matrix | None = None,
    categories: pa.DictionaryArray | None = None,
    acceptance: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Markup:
    """Draw a SID table; a part without data is left out.

    Args:
        stats: of `sid_statistics`; `prefix_hit_rate` may hold what the function of that name returns, `churn` the shares of SIDs
            `changed` and the number of `new` items, `quantizer` and `without_features` a name and a count.
        final_NM: the table.
        titles: of some items, for people; asked for once, and for few.
        popularity_N: which items are shown first as examples.
        features_ND: what to draw on its two principal axes, or, with D = 2, as it is; only sampled rows are read.
        categories: one an item, empty where there is none; without any the picture shows the first codewords.
        acceptance: of the collaborative signal: `kind`, `content_hit_rate` and `combined_hit_rate`, their relative `gain`, `accepted`
            and `pairs`.
        limits: `max_collision_rate` and `min_utilisation`; 1 and 0 limit nothing.
        seed: of the sample.

    Returns:
        a <section> for `render_page` or any page of its style; equal arguments give equal bytes, and every text is escaped.
    """
    assert len(final_NM) == len(popularity_N), "one popularity an item"
    levels = list(stats.get("levels", ()))
    counts = [level["counts"] for level in levels if level.get("counts")]
    sizes = bucket_sizes(final_NM)
    image, legend = _picture(features_ND, final_NM, categories, seed) if features_ND is not None and len(features_ND) else (None, None)
    macro = getattr(templates().get_template(_TEMPLATE).module, "section")  # noqa: B009 - jinja's modules have no types
    return Markup(  # noqa: S704 - of a template that escapes
        macro(
            facts=_facts(stats, limits or {}),
            levels=_level_rows(levels, limits or {}),
            usage=charts.codeword_usage(counts) if counts else None,
            entropy=_entropy(levels),
            buckets=charts.bucket_bars(sizes) if sizes.max(initial=0) > 1 else None,  # else each SID names one item: no chart needed
            neighbours=_neighbours(acceptance) if acceptance else None,
            hits=_hits(stats.get("prefix_hit_rate")),
            picture=image,
            legend=legend,
            examples=_examples(final_NM, titles, popularity_N),
        )
    )


def render_page(section: Markup, title: str) -> str:
    """A page of its own: no scripts, nothing from outside.

    Args:
        section: of `render_section`.
        title: heading; escaped.
    """
    macro = getattr(templates().get_template(_TEMPLATE).module, "page")  # noqa: B009
    return str(macro(title, caller=lambda: section)).strip() + "\n"


def _facts(stats: Mapping[str, Any], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Name, value and limit of the figures that the statistics have."""
    highest = limits.get("max_collision_rate", 1.0)
    rows: list[dict[str, Any]] = [
        {"name": name, "value": stats[key], "limit": None, "kept": True} for key, name in _FACTS.items() if key in stats
    ]
    changes = stats.get("churn") or {}
    for key, name in (("changed", "SIDs changed since the earlier table"), ("new", "items new since then")):
        rows += [{"name": name, "value": changes[key], "limit": None, "kept": True}] if key in changes else []
    if highest < 1 and "collision_rate" in stats:
        row = next(row for row in rows if row["name"] == _FACTS["collision_rate"])
        row |= {"limit": f"at most {format_figure(float(highest))}", "kept": stats["collision_rate"] <= highest}
    return rows


def _level_rows(levels: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row a figure, a column a level."""
    rows: list[dict[str, Any]] = []
    for key, name in _LEVEL_FACTS.items():
        if any(key in level for level in levels):
            lowest = limits.get("min_utilisation", 0.0) if key == "utilisation" else 0.0
            values = [level.get(key) for level in levels]
            kept = [(value or 0.0) >= lowest for value in values]
            limit = f"at least {format_figure(float(lowest))}" if lowest > 0 else None
            rows.append({"name": name, "values": values, "limit": limit, "kept": kept})
    return rows


def _entropy(levels: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not levels or not all({"entropy", "conditional_entropy", "counts"} <= level.keys() for level in levels):
        return None
    most = math.log2(max(len(level["counts"]) for level in levels))
    return charts.entropy_bars([level["entropy"] for level in levels], [level["conditional_entropy"] for level in levels], most)


def _neighbours(acceptance: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bars of both hit rates; None where one could not be measured."""
    rates = [(name, acceptance.get(key)) for name, key in (("content", "content_hit_rate"), ("content and timelines", "combined_hit_rate"))]
    measured = [(name, float(rate)) for name, rate in rates if rate is not None and math.isfinite(rate)]
    if len(measured) < len(rates):
        return None
    gain = acceptance.get("gain")
    return {
        "bars": charts.hit_rate_bars(measured),
        "kind": acceptance.get("kind"),
        "gain": f"{gain:+.1%}" if gain is not None and math.isfinite(gain) else None,
        "accepted": bool(acceptance.get("accepted")),
        "pairs": acceptance.get("pairs"),
    }


def _hits(rates: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not rates or not rates["pairs"]:
        return None
    return {"pairs": rates["pairs"], "rows": list(zip(rates["rates"], rates["chance"], rates["chance_popular"], strict=True))}


def _picture(features_ND: Matrix, final_NM: Codes, categories: pa.DictionaryArray | None, seed: int) -> tuple[Markup, dict[str, Any]]:
    """The picture of a sample, and what its colours mean."""
    n_items = len(features_ND)
    rows = np.random.default_rng(seed).choice(n_items, min(n_items, _SAMPLE), replace=False)  # shuffled: no group is on top
    sample = np.asarray(features_ND[rows])
    if features_ND.shape[1] == 2:
        points, names = sample.astype(np.float64), ("", "")
    else:
        points, shares = charts.principal_plane(sample)
        names = (f"first principal axis, {shares[0]:.0%} of the variance", f"second, {shares[1]:.0%}")
    by, groups, group_N = _groups(categories, final_NM)
    sizes = np.bincount(group_N, minlength=len(groups)).tolist()
    named = [number for number, group in enumerate(groups) if group and sizes[number]]
    largest = sorted(named, key=lambda number: (-sizes[number], groups[number]))[:_GROUPS]
    colours = dict(zip(largest, charts.GROUP_COLOURS, strict=False))
    legend = [(colour, _shorten(groups[number])) for number, colour in colours.items()]
    if sum(sizes[number] for number in largest) < n_items:
        legend.append((charts.REST_COLOUR, "the rest"))
    image = charts.picture(points, [colours.get(number, charts.REST_COLOUR) for number in group_N[rows].tolist()], names)
    return image, {"by": by, "shown": len(rows), "items": n_items, "groups": legend}


def _groups(categories: pa.DictionaryArray | None, final_NM: Codes) -> tuple[str, list[str], Ints]:
    """What items are grouped by: category, or the first codeword where none has one; names of the groups; the group of each item."""
    if categories is not None and any(names := categories.dictionary.to_pylist()):
        return "category", names, categories.indices.to_numpy()
    codes_N = final_NM[:, 0]
    return "first codeword", [f"{code}, …" for code in range(int(codes_N.max()) + 1)], codes_N.astype(np.int64)


def _examples(final_NM: Codes, titles: Titles, popularity_N: Ints) -> list[dict[str, Any]]:
    """Items that share the first codeword, and those that share the second too, for codewords from the fullest to the emptiest."""
    sizes = np.bincount(final_NM[:, 0])
    shared = np.flatnonzero(sizes > 1)
    shared = shared[np.argsort(-sizes[shared], kind="stable")]
    chosen = shared[np.unique(np.linspace(0, len(shared) - 1, min(_EXAMPLES, len(shared))).round().astype(np.int64))]
    by_popularity = np.argsort(-popularity_N, kind="stable")
    found = [_example(final_NM, by_popularity[final_NM[by_popularity, 0] == code]) for code in chosen]
    parts = [part for example in found for part in (example, example["deeper"]) if part]
    names = iter(titles(np.concatenate([np.empty(0, np.int64), *(part["titles"] for part in parts)])))
    for part in parts:
        part["titles"] = [_shorten(next(names)) for _ in part["titles"]]
    return found


def _example(final_NM: Codes, members: Ints) -> dict[str, Any]:
    """The items of a first codeword, the most popular first, and those of its fullest second one where it has several."""
    example: dict[str, Any] = {
        "code": str(final_NM[members[0], 0]),
        "items": len(members),
        "titles": members[:_TITLES],
        "deeper": None,
    }
    if final_NM.shape[1] > 1:
        sizes = np.bincount(final_NM[members, 1])
        code = int(sizes.argmax())
        if sizes[code] > 1:
            below = members[final_NM[members, 1] == code]
            example["deeper"] = {"code": str(code), "items": len(below), "titles": below[:_TITLES], "more": final_NM.shape[1] > 2}
    return example


def _shorten(text: str) -> str:
    return text if len(text) <= _TITLE_LENGTH else text[: _TITLE_LENGTH - 1].rstrip() + "…"
