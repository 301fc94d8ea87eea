"""The report of the quality benchmark: means and deviations over seeds, one table for each setting."""

from pathlib import Path

import pytest

from infra.config import load_config
from infra.errors import ConfigError
from tests.benchmarks.quality import parse_variants
from tests.benchmarks.quality_report import SHOWN, Results, write_report

KEPT, EXCLUDED = "test, seen items kept", "test, seen items excluded"


def figures(value: float) -> dict[str, float]:
    return dict.fromkeys(SHOWN["beauty"], value)


def run(value: float) -> dict[str, dict[str, float]]:
    return {EXCLUDED: figures(2 * value), KEPT: figures(value), "valid, seen items kept": figures(0.5)}


@pytest.fixture
def report(tmp_path: Path) -> tuple[str, dict[str, object], Path]:
    results = Results({"popularity": [run(0.01)], "rankgr": [run(0.1), run(0.2)]}, {"lambda": {"4": figures(0.1), "8": figures(0.2)}})
    summary = write_report(results, "beauty", "the command", load_config(preset="beauty"), folder=tmp_path)
    return (tmp_path / "beauty.md").read_text(), summary, tmp_path


def test_several_seeds_give_mean_and_sample_deviation(report: tuple[str, dict[str, object], Path]) -> None:
    table = report[0].partition("## Test, seen items kept")[2].partition("##")[0]
    assert "| RankGR | 2 | .1500 ± .0707 |" in table
    assert "| popularity, tuned | 1 | .0100 |" in table


def test_the_summary_holds_the_test_figures_with_seen_items_kept(report: tuple[str, dict[str, object], Path]) -> None:
    summary = report[1]
    assert summary["setting"] == KEPT
    assert summary["rankgr"] == pytest.approx(figures(0.15))


def test_a_sweep_is_a_table_and_a_plot(report: tuple[str, dict[str, object], Path]) -> None:
    text, _, folder = report
    assert "| 8 | .2000 |" in text
    assert "(beauty_lambda.svg)" in text
    assert (folder / "beauty_lambda.svg").read_text().rstrip().endswith("</svg>")


def test_a_variant_may_have_seeds_of_its_own() -> None:
    assert parse_variants(["ntp", "rankgr:1,2"], [0]) == {"ntp": [0], "rankgr": [1, 2]}


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="w/o"):
        parse_variants(["w/o"], [0])
