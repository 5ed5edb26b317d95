import numpy as np
import pytest
from conftest import dataset_index, rng, write_dataset
from PIL import Image

from base.errors import UserError


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
