"""What happens before training: the check of the data, together and interrupted."""

import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import run_tiny
from PIL import Image

import experiment
from base.errors import UserError
from config import Config, load_config
from imaging import checking


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def decoded(monkeypatch):
    """The items that the check decodes."""
    items, decode = [], checking._decode

    def note(item):
        items.append(item)
        return decode(item)

    monkeypatch.setattr(checking, "_decode", note)
    return items


def test_a_second_start_decodes_no_file(config_file, decoded):
    config = load_config(config_file())
    first = experiment.find_data(config, 10**6)
    assert len(decoded) == 12  # 6 pairs, 3 backgrounds, 3 test pairs
    decoded.clear()
    assert experiment.find_data(config, 10**6) == first
    assert decoded == []


def test_a_test_photo_among_the_backgrounds_is_named(config_file, data):
    tested, background = data / "test/imgs/1.png", data / "backgrounds/bg 3.png"
    Image.open(tested).save(background, compress_level=1)  # other bytes, the same pixels
    with pytest.warns(UserWarning, match="does not measure generalization") as warned:
        experiment.find_data(load_config(config_file()), 10**6)
    leak = f"{tested} = background {background}, so training takes its cables for none"
    assert str(warned[0].message).split("\n  ")[1:] == [leak]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_check_ends_it_with_a_line(
    config_file, tiny_weights, decoded, monkeypatch, capsys, number
):
    handler, decode = signal.getsignal(number), checking._decode

    def signal_at_the_first(item):
        infos = decode(item)
        if len(decoded) == 1:
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        return infos

    monkeypatch.setattr(checking, "PIXELS_AT_ONCE", 1)  # one item after the other
    monkeypatch.setattr(checking, "_decode", signal_at_the_first)
    assert run_tiny(config_file(), tiny_weights) == 128 + number
    assert capsys.readouterr().err == f"{signal.Signals(number).name}: nothing was trained\n"
    assert len(decoded) <= 2 and not Path("exp").exists()
    assert signal.getsignal(number) is handler


def check_together(rank: int, folder: Path, config: Config, results: "multiprocessing.SimpleQueue") -> None:
    """Check the data twice, the second time with a damaged file, in a group that waits for 2 s only."""
    index_datasets = experiment.index_datasets

    def index_slowly(*args, **options):
        results.put((rank, "checks"))
        time.sleep(2.5)
        return index_datasets(*args, **options)

    os.environ["RANK"] = str(rank)
    experiment.index_datasets = index_slowly
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    train, test = experiment.find_data(config, 10**6)
    results.put((rank, f"has {len(train[0].infos)} + {len(test.infos)} files"))
    dist.barrier()
    if rank == 0:
        (config.dataset.test.data_dir / "imgs/1.png").write_bytes(b"")
    try:
        experiment.find_data(config, 10**6)
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
