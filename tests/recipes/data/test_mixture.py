"""Mixtures: what `data.sources` may hold, and the samples of each source in an epoch."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.mixture import Part, parse_parts, per_epoch


def counts(*sources: tuple[int, dict[str, Any]]) -> list[int]:
    parts = [Part(path=str(number), **options) for number, (_, options) in enumerate(sources)]
    return per_epoch(parts, [rows for rows, _ in sources])


def test_sources_without_settings_are_read_once():
    assert counts((100, {}), (7, {})) == [100, 7]


def test_a_source_is_read_as_often_as_it_says():
    assert counts((100, {"repeat": 0.5}), (7, {"repeat": 3})) == [50, 21]


def test_a_weight_is_a_share_of_all_samples():
    assert counts((1000, {"weight": 0.5}), (30, {"repeat": 2}), (40, {})) == [100, 60, 40]


def test_weights_alone_are_shares_of_their_sum_and_every_row_is_read():
    assert counts((100, {"weight": 1}), (20, {"weight": 3})) == [100, 300]
    assert counts((100, {"weight": 0.2}), (500, {"weight": 0.8})) == [125, 500]


def test_a_weight_of_0_leaves_a_source_out():
    assert counts((100, {"weight": 0}), (20, {"weight": 3})) == [0, 20]
    assert counts((100, {"weight": 0}), (20, {})) == [0, 20]


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 10)), min_size=1, max_size=5))
def test_shares_are_as_said_to_a_sample(sources):
    found = counts(*[(rows, {"weight": weight}) for rows, weight in sources])
    total = sum(weight for _, weight in sources)
    for (rows, weight), count in zip(sources, found, strict=True):
        assert abs(count - sum(found) * weight / total) <= len(sources)
        assert count >= rows - 1


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        ([], "a list of paths"),
        ("a.json", "a list of paths"),
        ([7], "neither a path nor"),
        ([{"weight": 1}], "neither a path nor"),
        ([{"path": "a", "wieght": 1}], "wieght of a source is not known; it takes path, weight, repeat"),
        ([{"path": "a", "weight": "1"}], "weight of a is '1', and must be a number"),
        ([{"path": "a", "weight": True}], "must be a number"),
        ([{"path": "a", "repeat": -1}], "repeat of a is -1"),
        ([{"path": "a", "repeat": 0}], "leave it out"),
        ([{"path": "a", "weight": float("nan")}], "weight of a is nan, and must be a number of at least 0"),
        ([{"path": "a", "weight": float("inf")}], "weight of a is inf"),
        ([{"path": "a", "repeat": float("nan")}], "repeat of a is nan"),
        ([{"path": "a", "weight": 1, "repeat": 1}], "both a weight and a repeat"),
        (["x/a.json", "y/a.json"], "two of data.sources are called a.json"),
    ],
)
def test_what_is_no_mixture_is_refused(sources, why):
    with pytest.raises(UserError, match=why):
        parse_parts(sources)


def test_weights_must_leave_something_for_the_others():
    with pytest.raises(UserError, match=r"sum 1 leaves nothing"):
        counts((100, {"weight": 1.0}), (20, {}))
    with pytest.raises(UserError, match="all 0"):
        counts((100, {"weight": 0}))


NONE = {
    "half a row": (
        [(1, {"repeat": 0.5}), (100, {})],
        r"0 would have no sample in any epoch: repeat=0.5 of its 1 rows is rounded to 0; set a repeat of at least 1,",
    ),
    "less than half a row, alone": ([(1, {"repeat": 0.4})], "repeat=0.4 of its 1 rows"),
    "a small weight": (
        [(40, {"weight": 0.0001}), (40, {})],
        r"weight=0.0001 of the 40 samples of an epoch is rounded to 0; set a weight of at least 0.025,",
    ),
}


@pytest.mark.parametrize(("sources", "why"), NONE.values(), ids=NONE)
def test_a_source_without_a_sample_in_an_epoch_is_refused(sources: list[tuple[int, dict[str, Any]]], why: str):
    with pytest.raises(UserError, match=why):
        counts(*sources)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.001, 1)), min_size=1, max_size=4), st.integers(1, 50))
def test_what_the_refusal_says_is_enough(sources: list[tuple[int, float]], rows: int):
    """Each source is given the repeat that the sentence names, until none is refused."""
    given = [(count, {"repeat": repeat}) for count, repeat in sources]
    for _ in sources:
        try:
            assert min(counts(*given, (rows, {}))) > 0
        except UserError as error:
            number, said = int(str(error).split()[0]), str(error).partition("at least ")[2].partition(",")[0]
            given[number] = (given[number][0], {"repeat": float(said)})
    assert min(counts(*given, (rows, {}))) > 0


def test_an_epoch_that_would_not_fit_the_memory_is_refused():
    with pytest.raises(UserError, match=r"would have 100,000,000,100 samples \(100,000,000,000 of 0, 100 of 1\)"):
        counts((1, {"weight": 1}), (100, {"weight": 1e-9}))
