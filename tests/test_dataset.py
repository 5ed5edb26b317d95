import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import rng, write_dataset
from PIL import Image
from torch.utils.data import DataLoader

import dataset
from base.errors import UserError
from config import DatasetConfig
from dataset import DatasetIndex, TestSet, TrainSet
from imaging import files
from imaging.files import FileInfo, Pair
from imaging.geometry import InputSpec

FRAME = InputSpec(64, 32)


def source(data, *, backgrounds=True, name="cables", **keys):
    keys = {
        "data_dir": str(data / name),
        "bg_paths": [str(data / "backgrounds")] if backgrounds else None,
        **keys,
    }
    config = DatasetConfig.model_validate(keys, context={"yaml_dir": data})
    return dataset.index_datasets([config])[0]


# --- index ---


def test_all_faults_in_the_data_are_listed(tmp_path):
    folder = write_dataset(tmp_path / "a", 6)
    (folder / "masks" / "0.png").unlink()
    (folder / "imgs" / "1.png").unlink()
    Image.open(folder / "imgs" / "2.png").save(folder / "imgs" / "2.jpg")
    whole = (folder / "imgs" / "3.png").read_bytes()
    (folder / "imgs" / "3.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "masks" / "4.png")
    Image.fromarray(rng().integers(0, 255, (48, 64)).astype(np.uint8)).save(folder / "masks" / "5.png")
    (tmp_path / "backgrounds").mkdir()
    with pytest.raises(UserError) as error:
        source(tmp_path, name="a")
    message = str(error.value)
    assert message.startswith("7 problem(s)")
    for part in (
        "0.png: has no mask",
        "1.png: has no image",
        "same stem as 2",
        "3.png: cannot be decoded",
        "4.png: is 48 x 64 (h x w) but its mask is 9 x 9",
        "5.png: not a binary",
        "backgrounds: no .png",
    ):
        assert part in message, message


def test_of_many_faults_ten_are_shown_and_all_counted(tmp_path):
    folder = write_dataset(tmp_path / "a", 13)
    for path in (folder / "imgs").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        source(tmp_path, backgrounds=False, name="a")
    assert str(error.value).startswith("13 problem(s)")
    assert str(error.value).count("cannot be decoded") == 10 and "... and 3 more" in str(error.value)


# --- samples ---


def test_photos_are_used_as_they_are_without_backgrounds(data):
    cables = source(data, backgrounds=False)
    image, mask = dataset.make_sample(cables, 1, (48, 64), rng())
    assert (image == files.read_image(cables.pairs[1].image_path)).all()
    assert (mask == files.read_mask(cables.pairs[1].mask_path)).all()


# --- epochs ---


def fake_source(n, percentage):
    config = DatasetConfig.model_construct(percentage=percentage, bg_paths=(), w_aug=False)
    pairs = tuple(Pair(f"{i}", f"{i}") for i in range(n))
    return DatasetIndex(config, pairs, (), {pair.image_path: FileInfo((48, 64), "") for pair in pairs})


@pytest.mark.parametrize(
    ("n", "percentage", "expected"),
    [(100, 0.1, 10), (100, 1.0, 100), (7, 0.5, 4), (30, 0.001, 1), (10, 2.5, 25), (3, 3.0, 9)],
)
def test_percentage_over_several_epochs(n, percentage, expected):
    subsets = []
    for epoch in range(5):
        plan, _ = dataset.epoch_plan([fake_source(n, percentage)], 0, epoch)
        counts = np.bincount(plan[:, 1], minlength=n)
        assert len(plan) == expected
        assert counts.min() >= int(percentage) and counts.max() <= int(np.ceil(percentage))
        subsets.append(tuple(counts))
    assert len(set(subsets)) > 1 or percentage in (1.0, 3.0)


def test_an_epoch_mixes_all_datasets_in_a_new_order():
    sources = [fake_source(20, 0.5), fake_source(5, 2.0)]

    def plan(seed, epoch):
        rows, order = dataset.epoch_plan(sources, seed, epoch)
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
    return list(
        dataset.train_loader(
            train_set, batch_size=4, epochs=2, start=0, num_workers=num_workers, pin_memory=False
        )
    )


def test_samples_depend_on_nothing_but_seed_epoch_and_index(data):
    sources = [source(data, w_aug=True), source(data, backgrounds=False, name="test")]
    train_set = TrainSet(sources, spec=FRAME, prompt="mixed", seed=5)
    plain = run_of_batches(train_set, 0, seed=1)
    assert [len(batch["image"]) for batch in plain] == [4, 4, 1, 4, 4, 1]
    for num_workers in (1, 3):
        for batch, same in zip(plain, run_of_batches(train_set, num_workers, seed=2), strict=True):
            assert batch.keys() == same.keys()
            assert all(torch.equal(batch[name], same[name]) for name in batch)
    cached = TrainSet(sources, spec=FRAME, prompt="mixed", seed=5, cache_bytes=1 << 20)
    for batch, same in zip(plain, run_of_batches(cached, 2, seed=3), strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    use = train_set.epoch(1)[3]  # out of order
    alone = train_set[use]
    assert torch.equal(alone["image"], plain[3]["image"][3])
    other_seed = TrainSet(sources, spec=FRAME, prompt="mixed", seed=6)
    assert not torch.equal(other_seed[use]["image"], alone["image"])
    assert not torch.equal(train_set[replace(use, born=0)]["image"], alone["image"])


def test_a_run_can_start_at_any_batch():
    train_set = TrainSet([fake_source(7, 1.0)], spec=FRAME, prompt="none", seed=0)
    span = {"batch_size": 3, "epochs": 4}
    whole = list(train_set.batches(**span, start=0))
    assert [len(batch) for batch in whole] == [3, 3, 1] * 4
    assert [batch[0].epoch for batch in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted(use.pair for batch in whole[:3] for use in batch) == list(range(7))
    for start in range(13):
        assert list(train_set.batches(**span, start=start)) == whole[start:]
        assert list(train_set.batches_to_make(**span, start=start)) == whole[start:]


# --- reuse ---


def reuse_source(n, percentage=1.0):
    """A source of composites that is never read, for what is planned only."""
    config = DatasetConfig.model_construct(percentage=percentage, bg_paths=("b",), w_aug=True)
    pairs = tuple(Pair(f"{i}", f"{i}") for i in range(n))
    return DatasetIndex(config, pairs, (), {pair.image_path: FileInfo((48, 64), "") for pair in pairs})


@pytest.mark.parametrize("reuse", [1, 2, 3, 4])
def test_reuse_renews_exactly_the_stated_samples(reuse):
    train_set = TrainSet([reuse_source(10), reuse_source(5)], spec=FRAME, prompt="none", seed=0, reuse=reuse)
    assert train_set.places == (15 if reuse > 1 else 0)
    epochs_of = {}
    for epoch in range(12):
        uses = train_set.epoch(epoch)
        assert sorted(use.slot for use in uses) == list(range(15))
        for use in uses:
            is_new = epoch == 0 or (epoch + use.slot) % reuse == 0
            assert (use.born == epoch) == is_new
            assert use.place == (use.slot if reuse > 1 else None)
            epochs_of.setdefault((use.born, use.slot), []).append((epoch, use.source, use.pair))
        if epoch:
            assert abs(sum(use.born == epoch for use in uses) - 15 / reuse) < 1
    for (born, _), used in epochs_of.items():
        assert [epoch for epoch, _, _ in used] == list(range(born, born + len(used)))
        assert len({(number, pair) for _, number, pair in used}) == 1
        if 0 < born < 12 - reuse:
            assert len(used) == reuse


@pytest.mark.parametrize(("batch_size", "start"), [(4, 0), (4, 6), (3, 17), (20, 0)])
def test_every_sample_is_made_once_before_its_first_use(batch_size, start):
    sources = [reuse_source(9), fake_source(4, 1.5), reuse_source(3, 0.5)]
    train_set = TrainSet(sources, spec=FRAME, prompt="none", seed=0, reuse=3, keep_photos=True)
    assert train_set.places == 9 + 4 + 2
    span = {"batch_size": batch_size, "epochs": 8, "start": start}
    made = train_set.batches_to_make(**span)
    held, sizes = {}, []
    for batch in train_set.batches(**span):
        while any(held.get(use.place) != use.born for use in batch):
            new = next(made)
            sizes.append(len(new))
            assert len({use.place for use in new}) == len(new) <= batch_size
            assert all(held.get(use.place) != use.born for use in new)  # nothing twice
            held.update({use.place: use.born for use in new})
    assert next(made, None) is None
    per_epoch = train_set.epoch_length
    assert sum(sizes) <= per_epoch + (8 - start * batch_size // per_epoch) * (per_epoch - 6) / 3 + 8


def test_photos_that_never_change_have_one_place_in_all_epochs():
    train_set = TrainSet([fake_source(6, 0.5)], spec=FRAME, prompt="point", seed=0, keep_photos=True)
    uses = [use for epoch in range(20) for use in train_set.epoch(epoch)]
    assert {use.place for use in uses} == set(range(6))
    assert all(use.place == use.pair and use.born == 0 for use in uses)


def test_a_reused_sample_is_the_same_with_a_prompt_of_its_own(data):
    sources = [source(data, w_aug=True)]
    train_set = TrainSet(sources, spec=FRAME, prompt="point", seed=0, reuse=3)
    by_slot = [{use.slot: use for use in train_set.epoch(epoch)} for epoch in (3, 4, 5)]
    slot = next(slot for slot, use in by_slot[0].items() if use.born == 3)
    samples = [train_set[uses[slot]] for uses in by_slot]
    for sample in samples[1:]:
        assert all(torch.equal(sample[name], samples[0][name]) for name in ("image", "target", "size"))
    prompts = {tuple(sample["points"].flatten().tolist()) for sample in samples}
    assert len(prompts) == 3
    redrawn = train_set.draw_prompt(by_slot[1][slot], samples[0]["target"], samples[0]["size"])
    assert all(torch.equal(redrawn[name], samples[1][name]) for name in redrawn)


def test_the_cache_covers_all_that_training_reads(data, monkeypatch):
    sources = [source(data, w_aug=True), source(data, backgrounds=False, w_aug=True, name="test")]
    train_set = TrainSet(sources, spec=FRAME, prompt="none", seed=0, cache_bytes=1 << 22)
    before = [train_set[use] for epoch in range(9) for use in train_set.epoch(epoch)]
    for folder in ("cables", "test", "backgrounds"):
        shutil.rmtree(data / folder)
    again = [train_set[use] for epoch in range(9) for use in train_set.epoch(epoch)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(before, again, strict=True))


def test_the_test_set_is_the_same_at_every_use_and_keeps_full_resolution(data):
    tests = TestSet(source(data, percentage=0.5, w_aug=True), spec=FRAME, prompt="box", seed=0)
    again = TestSet(source(data, percentage=0.5, w_aug=True), spec=FRAME, prompt="box", seed=0)
    assert len(tests) == 3
    for first, second in zip(
        DataLoader(tests, batch_size=None), DataLoader(again, batch_size=None, num_workers=2), strict=True
    ):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert first["truth"].shape == (48, 64) and first["truth"].dtype == torch.bool
    assert len(TestSet(source(data, percentage=4.0), spec=FRAME, prompt="none", seed=0)) == 6


def test_training_is_not_fed_the_test_sets_composites(data):
    train_set = TrainSet([source(data)], spec=FRAME, prompt="none", seed=0)
    tests = TestSet(source(data), spec=FRAME, prompt="none", seed=0)
    seen = {train_set[use]["image"].numpy().tobytes() for use in train_set.epoch(0)}
    assert not seen & {tests[index]["image"].numpy().tobytes() for index in range(6)}
