import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from base import atomic
from base.errors import UserError
from embeddings import EmbeddingPool


@dataclass(frozen=True)
class Key:
    place: int | None
    born: int = 0


def sample(value):
    size = torch.tensor([value, value + 1])
    return torch.full((2, 3, 3), value / 7), torch.full((1, 6, 6), value, dtype=torch.uint8), size


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pool_gives_back_what_was_put_last(tmp_path, dtype):
    pool = EmbeddingPool(tmp_path, 4, (2, 3, 3), np.dtype(dtype), grid=6)
    assert not any(pool.holds(Key(place)) for place in range(4))
    for place in range(4):
        pool.put(Key(place), *sample(place))
    pool.put(Key(2, born=5), *sample(90))
    assert pool.holds(Key(2, born=5)) and not pool.holds(Key(2)) and pool.holds(Key(3))
    for key, value in ((Key(1), 1), (Key(2, born=5), 90), (Key(3), 3)):
        embedding, target, size = pool.get(key)
        assert embedding.numpy().dtype == dtype
        expected = sample(value)
        assert torch.equal(embedding, expected[0].to(embedding.dtype))
        assert torch.equal(target, expected[1]) and torch.equal(size, expected[2])
    assert torch.equal(pool.get(Key(1))[0].float(), sample(1)[0]) == (dtype == np.float32)


def test_bfloat16_embeddings_lose_nothing_in_float16(tmp_path):
    pool = EmbeddingPool(tmp_path, 1, (2, 3, 3), np.dtype(np.float16), grid=6)
    embedding = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool.put(Key(0), embedding, *sample(1)[1:])
    assert torch.equal(pool.get(Key(0))[0].bfloat16(), embedding)


def test_samples_without_a_place_are_used_once(tmp_path):
    pool = EmbeddingPool(tmp_path, 1, (2, 3, 3), np.dtype(np.float16), grid=6)
    pool.put(Key(None), *sample(3))
    assert pool.holds(Key(None))
    assert torch.equal(pool.get(Key(None))[0], sample(3)[0])
    assert not pool.holds(Key(None))


def test_the_file_takes_the_stated_room_and_has_no_name(tmp_path):
    before = os.statvfs(tmp_path)
    pool = EmbeddingPool(tmp_path, 64, (256, 64, 64), np.dtype(np.float16), grid=256)
    size = EmbeddingPool.size(64, (256, 64, 64), np.dtype(np.float16), 256)
    assert size == 64 * (2 * atomic.MIB + 256 * 256) == pool._embeddings.nbytes + pool._targets.nbytes
    assert list(tmp_path.iterdir()) == []
    assert (before.f_bfree - os.statvfs(tmp_path).f_bfree) * before.f_frsize > 0.5 * size
    del pool
    assert (before.f_bfree - os.statvfs(tmp_path).f_bfree) * before.f_frsize < 0.5 * size


def test_too_little_room_is_refused(tmp_path, monkeypatch):
    usage = atomic.shutil.disk_usage(tmp_path)
    limited = usage._replace(free=1000 * atomic.MIB)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: limited)
    atomic.require_free_space(tmp_path / "not" / "yet", 1000 * atomic.MIB, "it")
    with pytest.raises(UserError, match=r"it would take 1001 MiB on the disk of .*, which has 1000 MiB left"):
        atomic.require_free_space(tmp_path / "not" / "yet", 1001 * atomic.MIB, "it")
