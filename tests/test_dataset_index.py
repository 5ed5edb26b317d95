from dataclasses import replace

import numpy as np
import pytest
from conftest import dataset_index, rng, write_dataset
from PIL import Image

from base.errors import UserError
from dataset_index import file_digests


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
