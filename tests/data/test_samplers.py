"""Sampling: exact, resumable, the same for every number of ranks."""

import pytest

from fastkd.data.samplers import TrainBatchSampler


def flat(batches):
    return [key for batch in batches for key in batch]


def test_an_epoch_visits_every_sample_once_but_for_the_dropped_rest():
    keys = flat(TrainBatchSampler(23, 4, seed=1))
    assert len(keys) == len({key.sample for key in keys}) == 20


def test_order_depends_on_seed_and_epoch_alone():
    sampler, again, other = (TrainBatchSampler(40, 4, seed=s) for s in (1, 1, 2))
    first = flat(sampler)
    assert first == flat(again)
    assert [k.sample for k in first] != [k.sample for k in flat(other)]
    sampler.set_position(1)
    assert [k.sample for k in first] != [k.sample for k in flat(sampler)]


@pytest.mark.parametrize("update", [0, 1, 3, 5])
def test_an_iteration_starts_at_its_position(update):
    sampler = TrainBatchSampler(41, 4, accumulation=2)
    whole = list(sampler)
    sampler.set_position(0, update)
    assert list(sampler) == whole[2 * update :]
    assert len(sampler) == len(whole) - 2 * update


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("together", [False, True])
def test_ranks_share_the_updates_of_one_process_without_duplicates(world_size, repeats, together):
    whole = list(TrainBatchSampler(50, 8, repeats=repeats))
    options = {"repeats": repeats, "world_size": world_size, "together": together}
    ranks = [
        list(TrainBatchSampler(50, 8 // world_size, rank=r, **options)) for r in range(world_size)
    ]
    for update, batch in enumerate(whole):
        assert sorted(k for rank in ranks for k in rank[update]) == sorted(batch)


def test_copies_stay_with_one_rank_where_they_are_kept_together():
    for rank in range(2):
        options = {"repeats": 3, "rank": rank, "world_size": 2}
        together = next(iter(TrainBatchSampler(36, 6, together=True, **options)))
        apart = next(iter(TrainBatchSampler(36, 6, **options)))
        assert len({key.sample for key in together}) == 2
        assert len({key.sample for key in apart}) == 4


def test_repeated_augmentation_gives_copies_in_one_pass_length():
    keys = flat(TrainBatchSampler(30, 6, repeats=3))
    assert len(keys) == 30
    assert len({key.sample for key in keys}) == 10
    assert {key.copy for key in keys} == {0, 1, 2}
    assert len(set(keys)) == 30


def test_a_data_set_smaller_than_an_update_is_refused():
    with pytest.raises(ValueError, match=r"16 images per update.*only 10"):
        TrainBatchSampler(10, 8, accumulation=2)
