import numpy as np
import pytest

from datamodules.components.sample_order import EpochOrder, RankBatches, fixed_batches


def take(batches, n):
    iterator = iter(batches)
    return [next(iterator) for _ in range(n)]


def test_each_item_once_per_epoch_and_epochs_differ():
    order = EpochOrder(23, seed=5)
    items = np.concatenate([items for _, items in take(RankBatches(order, 7), 23)])  # 7 epochs
    epochs = items.reshape(7, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 7


def test_pure_function_of_seed_and_position():
    order = EpochOrder(11, seed=1)
    sequence = order.batch(0, 100)
    for position, size in ((95, 5), (0, 40), (10, 2), (33, 11), (22, 0)):
        assert np.array_equal(order.batch(position, size), sequence[position : position + size])
        assert np.array_equal(EpochOrder(11, seed=1).batch(position, size), sequence[position : position + size])
    assert not np.array_equal(EpochOrder(11, seed=2).batch(0, 100), sequence)
    assert sequence.dtype == np.int64


def test_the_order_is_what_it_was():
    """A new numpy must not reorder the data of a run that is resumed under it."""
    assert EpochOrder(10, seed=0).batch(0, 12).tolist() == [8, 6, 4, 1, 2, 5, 9, 7, 0, 3, 1, 9]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_side_by_side_are_the_batch_of_one_process(world_size):
    order = EpochOrder(30, seed=3)
    whole = take(RankBatches(order, 8, start=2), 10)
    parts = [take(RankBatches(order, 8, rank, world_size, start=2), 10) for rank in range(world_size)]
    for step, (position, items) in enumerate(whole):
        assert position == (2 + step) * 8
        assert np.concatenate([part[step][1] for part in parts]).tolist() == items.tolist()
        assert [part[step][0] for part in parts] == [position + r * 8 // world_size for r in range(world_size)]


def test_start_continues_where_another_stopped():
    order = EpochOrder(13, seed=0)
    whole = take(RankBatches(order, 4), 9)
    later = take(RankBatches(order, 4, start=5), 4)
    assert [items.tolist() for _, items in later] == [items.tolist() for _, items in whole[5:]]


def test_uneven_batch_is_refused():
    message = r"batch_size=10 \(global\) cannot be divided evenly over 4 devices; set batch_size to a multiple of 4"
    with pytest.raises(ValueError, match=message):
        RankBatches(EpochOrder(30, 0), 10, world_size=4)
    with pytest.raises(ValueError, match="batch_size=10"):
        fixed_batches(40, 10, world_size=4)
    with pytest.raises(ValueError, match="held_out=30 cannot be divided evenly over 4 devices"):
        fixed_batches(30, 8, world_size=4)
    with pytest.raises(ValueError, match="count=0"):
        EpochOrder(0, 0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_fixed_batches_cover_everything_once(world_size):
    ranks = [fixed_batches(22, 8, rank, world_size) for rank in range(world_size)]
    assert len({tuple(len(items) for _, items in rank) for rank in ranks}) == 1
    together = [np.concatenate([rank[k][1] for rank in ranks]) for k in range(3)]
    assert [items.tolist() for items in together] == [[*range(8)], [*range(8, 16)], [*range(16, 22)]]
