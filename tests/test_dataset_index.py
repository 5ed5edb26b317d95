"""Files of the datasets: what is wrong with them, the check at the start, the test set that is split off."""

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from conftest import constant_index, dataset_index, rng, write_dataset
from PIL import Image

from base.errors import UserError
from config import Config, load_config
from dataset_index import file_digests, find_data, index_datasets, split_off_test
from imaging.pairing import Pair


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
        dataset_index(tmp_path, name="a")
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
        dataset_index(tmp_path, backgrounds=False, name="a")
    assert str(error.value).startswith("13 problem(s)")
    assert str(error.value).count("cannot be decoded") == 10 and "... and 3 more" in str(error.value)


def test_of_files_with_one_stem_in_two_folders_each_counts(data):
    """As in a test set of `--val_percentage`, which has pairs of several folders."""
    cables, others = dataset_index(data), dataset_index(data, name="test")
    both = replace(cables, pairs=cables.pairs + others.pairs, infos=cables.infos | others.infos)
    digests = file_digests([both])
    assert cables.pairs[0].image_path.stem == others.pairs[0].image_path.stem
    for pair in (cables.pairs[0], others.pairs[0]):
        changed = {pair.image_path: replace(both.infos[pair.image_path], digest="changed")}
        assert file_digests([replace(both, infos=both.infos | changed)]) != digests


# --- Training and test ---


def test_a_second_start_decodes_no_file(config_file, decoded):
    config = load_config(config_file())
    first = find_data(config, 10**6)
    assert len(decoded) == 12  # 6 pairs, 3 backgrounds, 3 test pairs
    decoded.clear()
    assert find_data(config, 10**6) == first
    assert decoded == []


def test_a_test_photo_among_the_backgrounds_is_named(config_file, data):
    tested, background = data / "test/imgs/1.png", data / "backgrounds/bg 3.png"
    Image.open(tested).save(background, compress_level=1)  # other bytes, the same pixels
    with pytest.warns(UserWarning, match="does not measure generalization") as warned:
        find_data(load_config(config_file()), 10**6)
    leak = f"{tested} = background {background}, so training takes its cables for background"
    assert str(warned[0].message).split("\n  ")[1:] == [leak]


def test_photos_of_cables_among_the_backgrounds_are_named(config_file, data):
    for name, mask in (("1", None), ("2", Image.new("L", (64, 48)))):
        photo, background = data / f"cables/imgs/{name}.png", data / f"backgrounds/bg {name}.png"
        Image.open(photo).save(background, compress_level=1)  # other bytes, the same pixels
        if mask:  # a photo without a cable may be a background
            mask.save(data / f"cables/masks/{name}.png")
    with pytest.warns(UserWarning, match="takes these cables for background") as warned:
        find_data(load_config(config_file()), 10**6)
    listed = f"{data / 'backgrounds/bg 1.png'} = {data / 'cables/imgs/1.png'}"
    assert str(warned[0].message).split("\n  ")[1:] == [listed]


def check_together(rank: int, folder: Path, config: Config, results: "multiprocessing.SimpleQueue") -> None:
    """Check the data twice, the second time with a damaged file, in a group that waits for 2 s only."""

    def index_slowly(*args, **options):
        results.put((rank, "checks"))
        time.sleep(2.5)
        return index_datasets(*args, **options)

    os.environ["RANK"] = str(rank)
    pytest.MonkeyPatch().setattr("dataset_index.index_datasets", index_slowly)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    train, test = find_data(config, 10**6)
    results.put((rank, f"has {len(train[0].infos)} + {len(test.infos)} files"))
    dist.barrier()
    if rank == 0:
        (config.dataset.test.data_dir / "imgs/1.png").write_bytes(b"")
    try:
        find_data(config, 10**6)
    except UserError as error:
        results.put((rank, str(error)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_process_checks_and_all_have_the_result(config_file, data, tmp_path):
    context = multiprocessing.get_context("fork")
    results, config = context.SimpleQueue(), load_config(config_file())
    processes = [
        context.Process(target=check_together, args=(rank, tmp_path, config, results)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    said = [results.get() for _ in range(6)]
    assert results.empty()
    assert said.count((0, "checks")) == 2  # and process 1 never does
    assert {(0, "has 15 + 6 files"), (1, "has 15 + 6 files")} < set(said)
    faults = [text for _, text in said if "problem" in text]
    assert faults[0] == faults[1]
    assert faults[0].startswith(f"1 problem(s) in the data:\n  {data / 'test/imgs/1.png'}: cannot be decoded")


# --- --val_percentage ---


def index_of(stems, folder="a"):
    dataset = constant_index(0, 1.0)
    pairs = tuple(Pair(Path(folder, "imgs", f"{stem}.png"), Path(folder, f"{stem}.png")) for stem in stems)
    return replace(dataset, pairs=pairs)


def split(*datasets, percentage=20.0):
    train, test = split_off_test(list(datasets), percentage)
    return [{pair.image_path.stem for pair in dataset.pairs} for dataset in train], test


def test_a_fixed_share_of_the_pairs_is_held_out():
    stems = [f"photo {number}" for number in range(1000)]
    (kept,), test = split(index_of(stems))
    held_out = {pair.image_path.stem for pair in test.pairs}
    assert kept | held_out == set(stems) and not kept & held_out
    assert 160 < len(held_out) < 240
    assert not test.config.composites and not test.config.w_aug and test.config.percentage == 1.0
    (more_kept,), _ = split(index_of([*stems, *(f"new {number}" for number in range(50))]))
    assert kept <= more_kept  # photos stay on their side
    (_, other), both = split(index_of(stems), index_of(stems, "b"))
    assert other == kept and len(both.pairs) == 2 * len(held_out)
    _, once = split(index_of(stems), index_of(stems))  # composites of photos, and the photos themselves
    assert len(once.pairs) == len(held_out)


def test_at_least_one_pair_is_held_out_and_one_is_left():
    for percentage in (1.0, 90.0):
        (kept,), test = split(index_of("ab"), percentage=percentage)
        assert len(kept) == len(test.pairs) == 1
    with pytest.raises(UserError, match="no dataset has more than one pair"):
        split(index_of("a"))
