"""What the variants of the quality benchmark are, without training any."""

from pathlib import Path

import pyarrow as pa
import pytest

from infra.config import Config
from infra.errors import ConfigError
from tests.benchmarks import quality
from tests.benchmarks.quality_report import told


def settings(task: str, variant: str) -> Config:
    bench = object.__new__(quality.Bench)  # its constructor reads the data set
    bench.device = "cpu"
    bench.task, bench.quick, bench.workspace, bench.files = quality.TASKS[task], False, Path("w"), (Path("l"), Path("i"))
    return bench.config(quality.VARIANTS[variant], seed=0)


@pytest.mark.parametrize("task", list(quality.TASKS))
def test_the_variants_of_a_task_train_or_decode_differently(task: str) -> None:
    found = [settings(task, variant) for variant in quality.TASKS[task].variants]
    assert len({(c.training.model_dump_json(), c.decoding.model_dump_json()) for c in found}) == len(found)


@pytest.mark.parametrize("task", list(quality.TASKS))
def test_rankgr_ranks_with_its_rank_head_and_plain_ntp_has_none(task: str) -> None:
    whole, plain = (settings(task, variant) for variant in ("rankgr", "ntp"))
    assert (whole.decoding.score in ("rsp", "sum"), whole.training.loss.rsp_weight > 0) == (True, True)
    assert (plain.decoding.score, plain.training.loss.rsp_weight, plain.training.loss.alpha) == ("iap", 0, 0)


def test_variants_share_everything_but_their_phases() -> None:
    for task in quality.TASKS:
        whole, plain = (settings(task, variant) for variant in ("rankgr", "ntp"))
        assert (whole.retriever, whole.semantic_ids, whole.data) == (plain.retriever, plain.semantic_ids, plain.data)
        phases = {"rsp_weight": 0.0, "alpha": 0.0}
        assert whole.training.loss.model_copy(update=phases) == plain.training.loss.model_copy(update=phases)


def test_sasrec_predicts_clicks_of_the_target_days_behind_older_ones() -> None:
    """An exposure lies between two old clicks: places are counted among clicks. The last event is for validation."""
    day = 86_400_000
    row = {
        "items": [5, 6, 7, 8, 9],
        "levels": [3, 2, 3, 3, 3],
        "phases": [0, 0, 0, 0, 1],
        "timestamps": [0, day, 2 * day, 9 * day, 10 * day],
    }
    sequences, firsts = quality.train_sequences(pa.Table.from_pylist([row]), 3, 1.0)
    assert [sequence.tolist() for sequence in sequences] == [[5, 7, 8]]
    assert firsts == [2]
    assert quality.train_sequences(pa.Table.from_pylist([row]), 3, None)[1] == [0]


def test_a_variant_may_have_seeds_of_its_own() -> None:
    assert quality.parse_variants(["ntp:1,2", "rankgr"], [0]) == {"ntp": [1, 2], "rankgr": [0]}


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown variant 'iap'"):
        quality.parse_variants(["iap"], [0])


def test_the_written_command_does_not_tell_where_its_workspace_was() -> None:
    assert told(["--data", "beauty", "--workspace", "/somewhere", "--seeds", "0"]) == "--data beauty --seeds 0"
    assert told(["--workspace=/somewhere", "--quick"]) == "--quick"
