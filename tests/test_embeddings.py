"""The plan of what is encoded when, and the pool that keeps embeddings."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import composite_index, constant_index

from dataset import SampleKey, TrainSet
from embeddings import EmbeddingPool, plan_batches
from imaging.geometry import InputSpec

SPEC = InputSpec(64, 32)

# --- the plan ---


def test_a_plan_can_start_at_any_batch_and_encodes_each_batch_where_nothing_is_kept():
    train_set = TrainSet([constant_index(7, 1.0)], spec=SPEC, prompt="none", seed=0)
    whole = list(plan_batches(train_set, batch_size=3, epochs=4))
    assert [len(plan.keys) for plan in whole] == [3, 3, 1] * 4
    assert [plan.keys[0].epoch for plan in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted(key.pair for plan in whole[:3] for key in plan.keys) == list(range(7))
    assert all(plan.to_encode == [plan.keys] for plan in whole)
    for start in range(13):
        assert list(plan_batches(train_set, batch_size=3, epochs=4, start=start)) == whole[start:]


def test_a_process_without_samples_in_a_batch_encodes_nothing_for_it():
    train_set = TrainSet([constant_index(7, 1.0)], spec=SPEC, prompt="none", seed=0)
    plans = list(plan_batches(train_set, batch_size=6, epochs=2, rank=1, world_size=2))
    assert [len(plan.keys) for plan in plans] == [3, 0, 3, 0]
    assert [plan.to_encode for plan in plans] == [[plans[0].keys], [], [plans[2].keys], []]


@pytest.mark.parametrize(("batch_size", "start"), [(4, 0), (4, 6), (3, 17), (20, 0)])
def test_every_sample_is_encoded_once_before_its_first_use(batch_size, start):
    datasets = [composite_index(9), constant_index(4, 1.5), composite_index(3, 0.5)]
    train_set = TrainSet(datasets, spec=SPEC, prompt="none", seed=0, reuse=3, keep_photos=True)
    assert train_set.n_cache_slots == 9 + 4 + 2
    held, sizes = {}, []
    for plan in plan_batches(train_set, batch_size=batch_size, epochs=8, start=start):
        for group in plan.to_encode:
            sizes.append(len(group))
            assert len({key.cache_slot for key in group}) == len(group) <= batch_size
            assert all(held.get(key.cache_slot) != key.created_epoch for key in group)  # nothing twice
            held.update({key.cache_slot: key.created_epoch for key in group})
        assert all(held[key.cache_slot] == key.created_epoch for key in plan.keys)
    per_epoch = train_set.epoch_length
    assert 0 < sum(sizes) <= per_epoch + (8 - start * batch_size // per_epoch) * (per_epoch - 6) / 3 + 8


# --- the pool ---


def key(slot, created_epoch=0):
    return SampleKey(0, 0, created_epoch, 0, 0, slot)


def sample(value):
    size = torch.tensor([value, value + 1])
    return torch.full((2, 3, 3), value / 7), torch.full((1, 6, 6), value, dtype=torch.uint8), size


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_pool_returns_what_was_put_last(tmp_path, dtype):
    pool = EmbeddingPool(tmp_path, 4, (2, 3, 3), np.dtype(dtype), mask_grid=6)
    for slot in range(4):
        pool.put(key(slot), *sample(slot))
    pool.put(key(2, created_epoch=5), *sample(90))
    for slot, value in ((1, 1), (2, 90), (3, 3)):
        embedding, target, size = pool.get(key(slot))
        assert embedding.numpy().dtype == dtype
        expected = sample(value)
        assert torch.equal(embedding, expected[0].to(embedding.dtype))
        assert torch.equal(target, expected[1]) and torch.equal(size, expected[2])
    is_exact = torch.equal(pool.get(key(1))[0].float(), sample(1)[0])
    assert is_exact == (dtype == np.float32)


def test_bfloat16_embeddings_lose_nothing_in_float16(tmp_path):
    pool = EmbeddingPool(tmp_path, 1, (2, 3, 3), np.dtype(np.float16), mask_grid=6)
    embedding = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool.put(key(0), embedding, *sample(1)[1:])
    assert torch.equal(pool.get(key(0))[0].bfloat16(), embedding)


def test_a_sample_without_a_slot_is_returned_once(tmp_path):
    pool = EmbeddingPool(tmp_path, 1, (2, 3, 3), np.dtype(np.float16), mask_grid=6)
    pool.put(key(None), *sample(3))
    assert torch.equal(pool.get(key(None))[0], sample(3)[0])
    with pytest.raises(KeyError):
        pool.get(key(None))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_file_has_the_stated_size_and_no_name_and_goes_with_the_pool(tmp_path):
    def mapped_bytes():
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        return sum(end - start for start, end in spans)

    pool = EmbeddingPool(tmp_path, 64, (256, 16, 16), np.dtype(np.float16), mask_grid=64)
    size = EmbeddingPool.size(64, (256, 16, 16), np.dtype(np.float16), 64)
    assert size == 64 * (2 * 256 * 16 * 16 + 64 * 64)
    assert list(tmp_path.iterdir()) == [] and mapped_bytes() >= size
    del pool
    assert mapped_bytes() == 0
