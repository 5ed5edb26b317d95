import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import composite_index, constant_index, dataset_index, rng

import dataset
from dataset import TestSet, TrainSet
from imaging import files, masks
from imaging.geometry import InputSpec

SPEC = InputSpec(64, 32)


# --- samples ---


def test_photos_are_used_as_they_are_without_backgrounds(data):
    cables = dataset_index(data, backgrounds=False)
    image, mask = dataset.make_sample(cables, 1, (48, 64), rng())
    assert (image == files.read_image(cables.pairs[1].image_path)).all()
    assert (mask == masks.read_mask(cables.pairs[1].mask_path)).all()


def test_augmented_composites_have_many_proportions_and_others_those_of_the_photo(data):
    sizes = {}
    for augment in (True, False):
        cables = dataset_index(data, w_aug=augment, percentage=10.0)
        train_set = TrainSet([cables], spec=SPEC, prompt="none", seed=0)
        sizes[augment] = np.array([train_set[key]["size"].tolist() for key in train_set.epoch(0)])
    assert (sizes[False] == (48, 64)).all()
    shortest = sizes[True].min(axis=1) / 64
    assert (sizes[True].max(axis=1) == 64).all() and 0.56 <= shortest.min() < 0.7
    assert 0.3 < (shortest == 1).mean() < 0.7
    assert (sizes[True][:, 0] < 64).any() and (sizes[True][:, 1] < 64).any()


# --- epochs ---


@pytest.mark.parametrize(
    ("n", "percentage", "expected"),
    [(100, 0.1, 10), (100, 1.0, 100), (7, 0.5, 4), (30, 0.001, 1), (10, 2.5, 25), (3, 3.0, 9)],
)
def test_percentage_over_several_epochs(n, percentage, expected):
    subsets = []
    for epoch in range(5):
        plan, _ = dataset.epoch_plan([constant_index(n, percentage)], 0, epoch)
        counts = np.bincount(plan[:, 1], minlength=n)
        assert len(plan) == expected
        assert counts.min() >= int(percentage) and counts.max() <= int(np.ceil(percentage))
        subsets.append(tuple(counts))
    assert len(set(subsets)) > 1 or percentage in (1.0, 3.0)


def test_an_epoch_mixes_all_datasets_in_a_new_order():
    datasets = [constant_index(20, 0.5), constant_index(5, 2.0)]

    def plan(seed, epoch):
        rows, order = dataset.epoch_plan(datasets, seed, epoch)
        return rows[order]

    plans = [plan(0, epoch) for epoch in range(3)]
    for rows in plans:
        assert np.bincount(rows[:, 0]).tolist() == [10, 10]
        assert len(set(rows[:10, 0])) == 2  # shuffled, not one dataset after the other
    assert not (plans[0] == plans[1]).all()
    assert (plans[1] == plan(0, 1)).all()
    assert not (plans[1] == plan(1, 1)).all()


def run_of_batches(train_set, num_workers, seed):
    np.random.seed(seed)
    torch.manual_seed(seed)
    groups = [keys for epoch in range(2) for keys in train_set.epoch_batches(epoch, batch_size=4)]
    return list(dataset.train_loader(train_set, groups, num_workers=num_workers, pin_memory=False))


def test_samples_depend_on_nothing_but_seed_epoch_and_index(data):
    datasets = [dataset_index(data, w_aug=True), dataset_index(data, backgrounds=False, name="test")]
    train_set = TrainSet(datasets, spec=SPEC, prompt="mixed", seed=5)
    plain = run_of_batches(train_set, 0, seed=1)
    assert [len(batch["image"]) for batch in plain] == [4, 4, 1, 4, 4, 1]
    for num_workers in (1, 3):
        for batch, same in zip(plain, run_of_batches(train_set, num_workers, seed=2), strict=True):
            assert batch.keys() == same.keys()
            assert all(torch.equal(batch[name], same[name]) for name in batch)
    cached = TrainSet(datasets, spec=SPEC, prompt="mixed", seed=5, cache_bytes=1 << 20)
    for batch, same in zip(plain, run_of_batches(cached, 2, seed=3), strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    key = train_set.epoch(1)[3]  # out of order
    alone = train_set[key]
    assert torch.equal(alone["image"], plain[3]["image"][3])
    other_seed = TrainSet(datasets, spec=SPEC, prompt="mixed", seed=6)
    assert not torch.equal(other_seed[key]["image"], alone["image"])
    assert not torch.equal(train_set[replace(key, created_epoch=0)]["image"], alone["image"])


def test_batches_hold_the_samples_of_an_epoch_in_order():
    train_set = TrainSet([constant_index(7, 1.0)], spec=SPEC, prompt="none", seed=0)
    batches = train_set.epoch_batches(1, batch_size=3)
    assert [len(keys) for keys in batches] == [3, 3, 1]
    assert [key for keys in batches for key in keys] == train_set.epoch(1)


# --- reuse ---


@pytest.mark.parametrize("reuse", [1, 2, 3, 4])
def test_reuse_renews_exactly_the_stated_samples(reuse):
    train_set = TrainSet(
        [composite_index(10), composite_index(5)], spec=SPEC, prompt="none", seed=0, reuse=reuse
    )
    assert train_set.n_cache_slots == (15 if reuse > 1 else 0)
    epochs_of = {}
    for epoch in range(12):
        keys = train_set.epoch(epoch)
        assert sorted(key.index_in_epoch for key in keys) == list(range(15))
        for key in keys:
            is_new = epoch == 0 or (epoch + key.index_in_epoch) % reuse == 0
            assert (key.created_epoch == epoch) == is_new
            assert key.cache_slot == (key.index_in_epoch if reuse > 1 else None)
            epochs_of.setdefault((key.created_epoch, key.index_in_epoch), []).append(
                (epoch, key.dataset, key.pair)
            )
        if epoch:
            assert abs(sum(key.created_epoch == epoch for key in keys) - 15 / reuse) < 1
    for (created, _), used in epochs_of.items():
        assert [epoch for epoch, _, _ in used] == list(range(created, created + len(used)))
        assert len({(number, pair) for _, number, pair in used}) == 1
    whole_lives = [used for (created, _), used in epochs_of.items() if 0 < created < 12 - reuse]
    assert whole_lives and all(len(used) == reuse for used in whole_lives)


def test_photos_that_never_change_have_one_slot_in_all_epochs():
    train_set = TrainSet([constant_index(6, 0.5)], spec=SPEC, prompt="point", seed=0, keep_photos=True)
    keys = [key for epoch in range(20) for key in train_set.epoch(epoch)]
    assert {key.cache_slot for key in keys} == set(range(6))
    assert all(key.cache_slot == key.pair and key.created_epoch == 0 for key in keys)


def test_a_reused_sample_is_the_same_with_a_prompt_of_its_own(data):
    datasets = [dataset_index(data, w_aug=True)]
    train_set = TrainSet(datasets, spec=SPEC, prompt="point", seed=0, reuse=3)
    by_index = [{key.index_in_epoch: key for key in train_set.epoch(epoch)} for epoch in (3, 4, 5)]
    index = next(index for index, key in by_index[0].items() if key.created_epoch == 3)
    samples = [train_set[keys[index]] for keys in by_index]
    for sample in samples[1:]:
        assert all(torch.equal(sample[name], samples[0][name]) for name in ("image", "target", "size"))
    prompts = {tuple(sample["points"].flatten().tolist()) for sample in samples}
    assert len(prompts) == 3
    points, labels = train_set.draw_prompt(by_index[1][index], samples[0]["target"], samples[0]["size"])
    assert torch.equal(points, samples[1]["points"]) and torch.equal(labels, samples[1]["labels"])


def test_the_cache_covers_all_that_training_reads(data, monkeypatch):
    datasets = [
        dataset_index(data, w_aug=True),
        dataset_index(data, backgrounds=False, w_aug=True, name="test"),
    ]
    train_set = TrainSet(datasets, spec=SPEC, prompt="none", seed=0, cache_bytes=1 << 22)
    before = [train_set[key] for epoch in range(9) for key in train_set.epoch(epoch)]
    for folder in ("cables", "test", "backgrounds"):
        shutil.rmtree(data / folder)
    again = [train_set[key] for epoch in range(9) for key in train_set.epoch(epoch)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(before, again, strict=True))


def test_what_is_read_most_often_per_byte_is_cached_first(data):
    def kinds(*datasets):
        return [load.__name__ for load, _ in dataset._decoded_shapes(list(datasets), 1024)]

    two_for_one = dataset_index(data)  # 6 photos on 3 backgrounds, which have 1.5 times the bytes
    seldom = dataset_index(data, backgrounds=False, w_aug=True, percentage=0.5, name="test")
    assert kinds(seldom, two_for_one) == ["load_background"] * 3 + ["load_cut_out"] * 6 + ["load_pair"] * 3
    one_for_one = dataset_index(data, name="test")
    assert kinds(one_for_one) == ["load_cut_out"] * 3 + ["load_background"] * 3
    train_set = TrainSet([two_for_one], spec=SPEC, prompt="none", seed=0, cache_bytes=60_000)
    assert {load.__name__ for load, _ in train_set.read.slots} == {"load_background"}


def test_the_test_set_is_the_same_at_every_use_and_keeps_full_resolution(data):
    tests = TestSet(dataset_index(data, percentage=0.5, w_aug=True), spec=SPEC, prompt="box", seed=0)
    again = TestSet(dataset_index(data, percentage=0.5, w_aug=True), spec=SPEC, prompt="box", seed=0)
    assert len(tests) == 3
    for first, second in zip(
        dataset.test_loader(tests, num_workers=0, rank=0, world_size=1),
        dataset.test_loader(again, num_workers=2, rank=0, world_size=1),
        strict=True,
    ):
        tensors = first.keys() - {"name", "ground_truth", "thumbnail"}
        assert all(torch.equal(first[name], second[name]) for name in tensors)
        masks = [sample["ground_truth"].mask for sample in (first, second)]
        assert masks[0].shape == (48, 64) and masks[0].dtype == bool and (masks[0] == masks[1]).all()
        assert (first["thumbnail"] == second["thumbnail"]).all() and first["name"] == second["name"]
    assert len(TestSet(dataset_index(data, percentage=4.0), spec=SPEC, prompt="none", seed=0)) == 6


def test_training_is_not_fed_the_test_sets_composites(data):
    train_set = TrainSet([dataset_index(data)], spec=SPEC, prompt="none", seed=0)
    tests = TestSet(dataset_index(data), spec=SPEC, prompt="none", seed=0)
    seen = {train_set[key]["image"].numpy().tobytes() for key in train_set.epoch(0)}
    assert not seen & {tests[index]["image"].numpy().tobytes() for index in range(6)}
