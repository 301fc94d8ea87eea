"""The catalogue: items of the user's table and of the logs, checked, with dense indices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import polars as pl
import pyarrow as pa

from components.sessions.sources import ids_as_text, problems_of, read_frame
from infra import records as r
from infra.errors import DataError, RankGRError, raise_all
from infra.sections import DataConfig


def build_catalogue(data: DataConfig, ids_in_logs: Iterable[str]) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """All items, sorted by id.

    An item that occurs in the logs alone gets its id as title and an empty text; it takes part, by its collaborative
    signal. Rows without id, repeated ids and embeddings that are not finite are quarantined.

    Returns:
        the catalogue (CATALOGUE without popularity), the quarantined rows, and counts.
    """
    if data.items:
        items, bad = _read_items(data)
    else:
        items, bad = _empty(), pl.DataFrame(schema={"source": pl.String, r.REASON: pl.String, r.RAW: pl.String})
    logged = pl.DataFrame({r.ITEM_ID: sorted(set(ids_in_logs))}, schema={r.ITEM_ID: pl.String})
    unknown = logged.join(items, on=r.ITEM_ID, how="anti").with_columns(
        pl.col(r.ITEM_ID).alias(r.TITLE), *(pl.lit("").alias(c) for c in (r.TEXT, r.CATEGORY, r.BRAND))
    )
    catalogue = pl.concat([items, unknown], how="diagonal").sort(r.ITEM_ID)
    catalogue = catalogue.with_row_index(r.ITEM_INDEX).with_columns(pl.col(r.ITEM_INDEX).cast(pl.Int32))
    counts = {"items": len(catalogue), "items_without_features": len(unknown), "bad_items": len(bad)}
    return catalogue, bad, counts


def problems_of_items(data: DataConfig) -> list[RankGRError]:
    """Item files that cannot be read or lack the id; none where no items are given."""
    return problems_of(data.items, {"item_id": data.columns.item_id}) if data.items else []


def catalogue_table(
    catalogue: pl.DataFrame, popularity: Iterable[int], segments: Mapping[str, Mapping[str, int]] | None = None
) -> pa.Table:
    """The CATALOGUE table.

    Args:
        catalogue: of `build_catalogue`.
        popularity: of each item.
        segments: segment of users -> item id -> popularity there.
    """
    of_item: dict[str, list[dict[str, str | int]]] = {}
    for segment, counts in sorted((segments or {}).items()):
        for item_id, count in counts.items():
            of_item.setdefault(item_id, []).append({r.SEGMENT: segment, r.POPULARITY: count})
    table = catalogue.with_columns(pl.Series(r.POPULARITY, list(popularity), dtype=pl.Int64)).to_arrow()
    popular_in = pa.array([of_item.get(item_id) for item_id in catalogue[r.ITEM_ID]], r.CATALOGUE.field(r.SEGMENTS).type)
    return table.append_column(r.SEGMENTS, popular_in).select(r.CATALOGUE.names).cast(r.CATALOGUE)


def _empty() -> pl.DataFrame:
    text = dict.fromkeys((r.ITEM_ID, r.TITLE, r.TEXT, r.CATEGORY, r.BRAND), pl.String)
    return pl.DataFrame(schema={**text, r.EMBEDDING: pl.List(pl.Float32)})


def _read_items(data: DataConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    columns = data.columns
    raise_all(problems_of_items(data))
    raw = read_frame(data.items)
    raw = raw.with_columns(ids_as_text(raw[columns.item_id]))

    def text_of(name: str | None) -> pl.Expr:
        if not name or name not in raw.columns:
            return pl.lit("")
        column = pl.col(name)
        if isinstance(raw.schema[name], pl.List):
            column = column.cast(pl.List(pl.String)).list.join(" ")
        return column.cast(pl.String).fill_null("")

    item_id = pl.col(columns.item_id)
    title = text_of(columns.title)
    embedding = (
        pl.col(columns.embedding).cast(pl.List(pl.Float32), strict=False)
        if columns.embedding in raw.columns
        else pl.lit(None, dtype=pl.List(pl.Float32))
    )
    try:
        items = raw.select(
            item_id.alias(r.ITEM_ID),
            pl.when(title == "").then(item_id).otherwise(title).alias(r.TITLE),
            pl.concat_str([text_of(name) for name in columns.text] or [pl.lit("")], separator=" ").str.strip_chars().alias(r.TEXT),
            text_of(columns.category).alias(r.CATEGORY),
            text_of(columns.brand).alias(r.BRAND),
            embedding.alias(r.EMBEDDING),
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"an item column has a wrong type: {str(error).splitlines()[0]}", where=data.items, mend="see data.columns"
        ) from error
    finite = pl.col(r.EMBEDDING).list.eval(pl.element().is_finite().fill_null(value=False)).list.all().fill_null(value=True)
    reason = (
        pl.when(pl.col(r.ITEM_ID).is_null() | (pl.col(r.ITEM_ID) == ""))
        .then(pl.lit("no item id"))
        .when(~pl.col(r.ITEM_ID).is_first_distinct())
        .then(pl.lit("the item id occurs twice"))
        .when(~finite)
        .then(pl.lit("the embedding holds NaN or infinity"))
    )
    checked = items.with_columns(reason.alias(r.REASON))
    bad = checked.filter(pl.col(r.REASON).is_not_null())
    quarantine = pl.DataFrame(
        {
            "source": ["items"] * len(bad),
            r.REASON: bad[r.REASON],
            r.RAW: [json.dumps(row, default=str) for row in bad.drop(r.REASON).iter_rows(named=True)],
        },
        schema={"source": pl.String, r.REASON: pl.String, r.RAW: pl.String},
    )
    return checked.filter(pl.col(r.REASON).is_null()).drop(r.REASON), quarantine
