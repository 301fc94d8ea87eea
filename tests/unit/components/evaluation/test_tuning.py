import numpy as np
import pytest

from components.evaluation.protocol import build_cases
from components.evaluation.tuning import DECAYS, search, tune_baselines, tuning_cutoff
from components.retriever.contract import Ranked
from infra.records import Phase

TRAIN, VALID, TEST = Phase.TRAIN, Phase.VALID, Phase.TEST
CLICK, EXPOSURE = 3, 2


@pytest.mark.parametrize(("ks", "expected"), [([5, 10, 20], 10), ([20, 100], 20), ([1, 5], 1)])
def test_baselines_are_tuned_at_ten_or_else_at_the_smallest_cutoff(ks, expected):
    assert tuning_cutoff(ks) == expected


class Constant:
    """Ranks one item."""

    name = "constant"

    def __init__(self, item):
        self.item = item

    def recommend(self, histories, k, *, exclude_seen):
        return [Ranked(np.array([self.item]), np.zeros(1, np.float32)) for _ in histories]


@pytest.fixture
def cases(timelines):
    table = timelines({"a": [(0, CLICK, TRAIN), (3, CLICK, VALID)], "b": [(0, CLICK, TRAIN), (3, CLICK, VALID)]})
    return build_cases(table, VALID, {"click": CLICK}, exclude_seen=True)


def test_the_search_walks_one_setting_after_another_from_the_best_so_far(cases):
    tried = []

    def build(params):
        tried.append(dict(params))
        return Constant(params["tens"] + params["ones"])

    best = search({"ones": [1, 3, 5], "tens": [0, 10]}, build, cases, 1)
    assert best.params == {"ones": 3, "tens": 0}
    assert (best.metric, best.value) == ("hr@1", 1.0)
    assert tried == [{"ones": 1, "tens": 0}, {"ones": 3, "tens": 0}, {"ones": 5, "tens": 0}, {"ones": 3, "tens": 10}]


def test_of_equally_good_settings_the_first_one_stays(cases):
    assert search({"ones": [7, 8]}, lambda params: Constant(params["ones"]), cases, 1).params == {"ones": 7}


def test_recency_is_discovered_where_the_next_item_follows_from_the_last_alone(timelines):
    """Item 2n is always followed by 2n + 1; the older history is noise."""
    generator = np.random.default_rng(0)
    users = {}
    for number in range(120):
        first, second, third = generator.permutation(20)[:3] * 2
        chain = [first, first + 1, second, second + 1, third]
        users[f"u{number}"] = [(int(item), CLICK, TRAIN) for item in chain] + [(int(third) + 1, CLICK, VALID)]
    popularity, item_knn = tune_baselines(timelines(users), 40, {"click": CLICK}, [1], positive_level=CLICK, exclude_seen=True)
    assert item_knn.value is not None
    assert popularity.value is not None
    assert item_knn.value > 0.9 > popularity.value
    assert item_knn.params["decay"] < 1.0


def test_without_validation_users_the_first_settings_are_taken(timelines):
    table = timelines({"a": [(0, CLICK, TRAIN), (1, CLICK, TRAIN), (2, CLICK, TEST)]})
    popularity, item_knn = tune_baselines(table, 3, {"click": CLICK}, [10], positive_level=CLICK, exclude_seen=True)
    assert popularity.params == {"min_level": CLICK, "half_life_days": None}
    assert item_knn.params["decay"] == DECAYS[0]
    assert popularity.value is None
