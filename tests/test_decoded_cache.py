"""Decoded files in shared memory."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest

from imaging.decoded_cache import DecodedCache


def make(item, longest):
    """An image that says what it was made from, and by which process."""
    return np.full((4, 5, 3), [item, longest, os.getpid() % 251], np.uint8)


def test_each_item_is_made_once_and_read_only():
    cache = DecodedCache({(make, 1): (4, 5, 3), (make, 2): (4, 5, 3)}, max_bytes=1000)
    assert cache(make, 1, 7)[0, 0, :2].tolist() == [1, 7]
    assert cache(make, 2, 7)[0, 0, 0] == 2
    assert cache(make, 1, 9)[0, 0, 1] == 7  # not made again
    with pytest.raises(ValueError):
        cache(make, 1, 7)[0, 0] = 0


def test_the_budget_holds_and_the_rest_is_made_at_every_use():
    shapes = {(make, item): (4, 5, 3) for item in range(10)}
    cache = DecodedCache(shapes, max_bytes=230)  # 60 bytes each, and 16 for the size
    assert list(cache.slots) == list(shapes)[:3]
    assert cache._memory.nbytes + cache._sizes.nbytes <= 230
    assert all(cache(make, item, 7)[0, 0, 0] == item for item in range(10))
    assert cache(make, 9, 8)[0, 0, 1] == 8
    assert DecodedCache(shapes, max_bytes=0)(make, 3, 7)[0, 0, 0] == 3


def test_an_item_may_be_smaller_than_its_slot():
    cache = DecodedCache({(make, 1): (9, 5, 3), (make, 2): (4, 7, 3)}, max_bytes=1000)
    for item in (1, 2, 1, 2):
        assert (cache(make, item, 7) == make(item, 7)).all()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers_share_what_one_of_them_made():
    cache = DecodedCache({(make, 1): (4, 5, 3)}, max_bytes=1000)
    worker = multiprocessing.get_context("fork").Process(target=cache, args=(make, 1, 7))
    worker.start()
    worker.join()
    assert cache(make, 1, 7)[0, 0].tolist() == [1, 7, worker.pid % 251]


def test_spawned_workers_go_without():
    cache = DecodedCache({(make, 1): (4, 5, 3)}, max_bytes=1000)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.slots == {} and copy(make, 1, 7)[0, 0, 0] == 1
