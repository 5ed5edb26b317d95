"""The plan of what is encoded when, and the pool that keeps embeddings."""

import errno
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import composite_index, constant_index

import runtime
from base.errors import UserError
from dataset import SampleKey, TrainSet
from embeddings import EmbeddingPool, PoolSpec, plan_batches
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


def plans_of_all(train_set, world_size, *, epochs, start=0, sharing=None):
    """Of each iteration, the plans of all processes; `batch_size` is 16 in all."""
    options = {"epochs": epochs, "start": start, "world_size": world_size, "sharing": sharing}
    ranks = sharing or range(world_size)
    plans = [plan_batches(train_set, batch_size=16, rank=rank, **options) for rank in ranks]
    return list(zip(*plans, strict=True))


@pytest.mark.parametrize("start", [0, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_processes_of_one_machine_encode_together_what_one_would(world_size, start):
    datasets = [composite_index(40, 2.0), constant_index(9, 2.5)]
    train_set = TrainSet(datasets, spec=SPEC, prompt="none", seed=0, reuse=4, keep_photos=True)
    (alone,) = zip(*plans_of_all(train_set, 1, epochs=16, start=start), strict=True)
    held = {}
    for plan, plans in zip(alone, plans_of_all(train_set, world_size, epochs=16, start=start), strict=True):
        assert sorted(map(hash, plan.keys)) == sorted(hash(key) for p in plans for key in p.keys)
        encoded = [key for p in plans for group in p.to_encode for key in group]
        assert sorted(map(hash, encoded)) == sorted(hash(key) for group in plan.to_encode for key in group)
        counts = [sum(map(len, p.to_encode)) for p in plans]
        assert max(counts) - min(counts) <= len(plan.to_encode)  # in each iteration, all have the same work
        assert len({key.cache_slot for key in encoded}) == len(encoded)  # one process writes a slot
        held |= {key.cache_slot: key.created_epoch for key in encoded}
        assert all(held[key.cache_slot] == key.created_epoch for p in plans for key in p.keys)


def test_the_share_that_is_encoded_is_one_of_r_whatever_the_processes():
    train_set = TrainSet([composite_index(96)], spec=SPEC, prompt="none", seed=0, reuse=4)
    for world_size in (1, 2, 4, 8):
        plans = [plan for plans in plans_of_all(train_set, world_size, epochs=9) for plan in plans]
        encoded = sum(len(group) for plan in plans for group in plan.to_encode)
        assert encoded == 96 + 8 * 24  # all in the first epoch, then every fourth


def test_a_machine_encodes_what_its_own_processes_use():
    train_set = TrainSet([composite_index(40)], spec=SPEC, prompt="none", seed=0, reuse=4)
    for sharing in (range(0, 2), range(2, 4)):
        held = {}
        for plans in plans_of_all(train_set, 4, epochs=8, sharing=sharing):
            held |= {key.cache_slot: key.created_epoch for p in plans for g in p.to_encode for key in g}
            assert all(held[key.cache_slot] == key.created_epoch for p in plans for key in p.keys)


def test_samples_without_a_slot_are_encoded_by_the_process_that_uses_them():
    datasets = [composite_index(20), constant_index(20, 1.0)]
    train_set = TrainSet(datasets, spec=SPEC, prompt="none", seed=0, keep_photos=True)
    for rank in range(2):
        waiting, sizes = set(), []
        for plan in plan_batches(train_set, batch_size=8, epochs=3, rank=rank, world_size=2):
            sizes += map(len, plan.to_encode)
            waiting |= {key for group in plan.to_encode for key in group if key.cache_slot is None}
            used = {key for key in plan.keys if key.cache_slot is None}
            assert used <= waiting
            waiting -= used
        assert not waiting and max(sizes) == 4 and sizes.count(4) >= len(sizes) - 4


# --- the pool ---


def key(slot, created_epoch=0):
    return SampleKey(0, 0, created_epoch, 0, 0, slot)


def sample(value):
    size = torch.tensor([value, value + 1])
    return torch.full((2, 3, 3), value / 7), torch.full((1, 6, 6), value, dtype=torch.uint8), size


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_pool_returns_what_was_put_last(tmp_path, dtype):
    pool = EmbeddingPool(tmp_path, PoolSpec(4, (2, 3, 3), np.dtype(dtype), mask_grid=6))
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
    pool = EmbeddingPool(tmp_path, PoolSpec(1, (2, 3, 3), np.dtype(np.float16), mask_grid=6))
    embedding = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool.put(key(0), embedding, *sample(1)[1:])
    assert torch.equal(pool.get(key(0))[0].bfloat16(), embedding)


def test_a_sample_without_a_slot_is_returned_once(tmp_path):
    pool = EmbeddingPool(tmp_path, PoolSpec(1, (2, 3, 3), np.dtype(np.float16), mask_grid=6))
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

    spec = PoolSpec(64, (256, 16, 16), np.dtype(np.float16), mask_grid=64)
    pool, size = EmbeddingPool(tmp_path, spec), spec.size
    assert size == 64 * (2 * 256 * 16 * 16 + 64 * 64 + 2 * 8)
    assert list(tmp_path.iterdir()) == [] and mapped_bytes() >= size
    del pool
    assert mapped_bytes() == 0


def in_two_processes(action, folder):
    """What `action(folder)` returns in each of two processes of one machine that train together."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        queue.put((rank, action(folder)))
        runtime.barrier()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [results[rank] for rank in range(2)]


def make_small_pool(folder):
    return EmbeddingPool(folder, PoolSpec(4, (2, 3, 3), np.dtype(np.float32), mask_grid=6))


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc/self/maps")
def test_processes_of_one_machine_read_what_others_put_in_one_file(tmp_path):
    def exchange(folder):
        pool, rank = make_small_pool(folder), runtime.rank()
        pool.put(key(rank), *sample(10 + rank))
        runtime.barrier()
        found = pool.get(key(1 - rank))
        expected = sample(11 - rank)
        maps = [
            line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line
        ]
        inodes = {columns[4] for columns in maps}
        return all(map(torch.equal, found, expected)), inodes, [path.name for path in folder.iterdir()]

    (equal_0, inodes_0, names), (equal_1, inodes_1, _) = in_two_processes(exchange, tmp_path)
    assert equal_0 and equal_1
    assert len(inodes_0) == 1 and inodes_0 == inodes_1
    assert names == ["store"]  # of the test


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_pool_that_one_process_cannot_make_is_refused_in_all(tmp_path, monkeypatch):
    def fail(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    def attempt(folder):
        try:
            make_small_pool(folder)
        except UserError as error:
            return str(error)

    monkeypatch.setattr(os, "posix_fallocate", fail)  # only the first process of a machine calls it
    for message in in_two_processes(attempt, tmp_path):
        assert (
            f"{tmp_path}: cannot reserve 496 bytes for embeddings: " in message and "No space left" in message
        )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
