import numpy as np
import pytest

from components.retriever.filters import ItemFilter
from infra.errors import ConfigError


def allowed(**conditions):
    times = conditions.pop("times", None)
    return np.flatnonzero(ItemFilter(**conditions).mask(5, times)).tolist()


def test_no_condition_allows_all():
    assert allowed() == [0, 1, 2, 3, 4]


def test_only_what_is_on_the_allow_list():
    assert allowed(allow=np.array([3, 1])) == [1, 3]


def test_an_empty_allow_list_allows_nothing():
    assert allowed(allow=np.array([], dtype=np.int64)) == []


def test_deny_wins_over_allow():
    assert allowed(allow=np.array([3, 1]), deny=np.array([1, 0])) == [3]


def test_only_items_that_appeared_at_the_given_time_or_later():
    assert allowed(newer_than_ms=20, times=np.array([10, 20, 30, 19, 21])) == [1, 2, 4]


def test_freshness_without_times_is_refused():
    with pytest.raises(ConfigError, match="when items appeared"):
        allowed(newer_than_ms=20)


@pytest.mark.parametrize("item", [-1, 5])
def test_an_item_outside_the_catalogue_is_refused(item):
    with pytest.raises(ConfigError, match=f"item {item} is not one of the catalogue's 5"):
        allowed(deny=np.array([item]))
