"""Shuffled epochs of mixtures: shares and epochs of each source, decided by seed and epoch alone."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_oss_vision.recipes.data.order import Order

mixtures = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 120)), min_size=1, max_size=5).filter(
    lambda sizes: any(count for _, count in sizes)
)


def order_of(sizes: list[tuple[int, int]], seed: int = 0) -> Order:
    rows, per_epoch = zip(*sizes, strict=True)
    return Order(rows, per_epoch, seed=seed)


@example([(1, 1), (1, 4), (1, 1), (1, 1), (1, 17)], 0)
@given(mixtures, st.integers(0, 3))
def test_the_first_samples_of_an_epoch_hold_the_share_of_each_source(sizes, epoch):
    order = order_of(sizes)
    sources = order.sources(epoch)
    for source, count in enumerate(order.per_epoch):
        found = np.cumsum(sources == source)
        assert found[-1] == count
        share = count / len(order)
        assert (np.abs(found - np.arange(1, len(order) + 1) * share) < 1 + len(sizes) * share).all()


@given(mixtures, st.integers(1, 4))
def test_a_source_is_read_whole_before_a_row_of_it_is_read_again(sizes, epochs):
    order = order_of(sizes)
    read = np.concatenate([order.epoch(number) for number in range(epochs)])
    start = 0
    for rows in order.rows:
        mine = read[(read >= start) & (read < start + rows)]
        for first in range(0, len(mine), rows):
            piece = mine[first : first + rows]
            assert len(set(piece.tolist())) == len(piece)
        start += rows


@given(mixtures, st.integers(0, 500))
def test_the_samples_before_a_place_are_counted_by_source(sizes, place):
    order = order_of(sizes)
    epochs = [order.sources(number) for number in range(place // len(order) + 1)]
    before = np.concatenate(epochs)[:place]
    assert order.read_before(place) == np.bincount(before, minlength=len(sizes)).tolist()


def test_a_source_alone_has_the_order_that_it_has_first_in_a_mixture():
    alone, mixed = Order((10,), seed=3), Order((10, 4), seed=3)
    for epoch in range(3):
        read = mixed.epoch(epoch)
        assert alone.epoch(epoch).tolist() == read[read < 10].tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_sources_do_not_alternate_regularly(seed):
    sources = Order((1000, 1000), seed=seed).sources(0)
    same = (sources[1:] == sources[:-1]).mean()
    assert 0.2 < same < 0.6  # alternating, two data-parallel ranks would each have one source


def test_orders_differ_by_seed_and_by_epoch():
    orders = [Order((40, 40), seed=seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
