"""The check of all files, and the cache of what it recorded."""

import json
import os
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import write_dataset
from PIL import Image

from imaging import checking, pairing
from imaging.masks import read_mask
from imaging.pairing import Pair


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    """4 pairs of 48 x 64 pixels."""
    return pairing.find_pairs(write_dataset(tmp_path / "a", 4))[0]


def test_a_check_records_intact_files_and_names_the_others(tmp_path):
    folder = write_dataset(tmp_path / "a", 4)
    pairs, _ = pairing.find_pairs(folder)
    pairs[1].image_path.write_bytes(pairs[1].image_path.read_bytes()[:200])
    Image.new("L", (9, 8)).save(pairs[2].mask_path)
    background = tmp_path / "b.png"
    background.write_bytes(pairs[3].image_path.read_bytes())
    by_item, faults = checking.check_files([*pairs, background, pairs[0]])
    assert by_item.keys() == {pairs[0], pairs[3], background}
    infos = {path: info for item in by_item.values() for path, info in item.items()}
    masks = [pair.mask_path for pair in (pairs[0], pairs[3])]
    assert infos.keys() == {pairs[0].image_path, pairs[3].image_path, background, *masks}
    assert [infos[path].foreground for path in masks] == [read_mask(path).mean() for path in masks]
    assert infos[background].foreground is None
    assert {info.size for info in infos.values()} == {(48, 64)}
    assert infos[background] == infos[pairs[3].image_path]  # equal pixels
    assert infos[pairs[0].image_path] != infos[pairs[3].image_path]
    assert len(faults) == 2
    assert faults[0].startswith(f"{pairs[1].image_path}: cannot be decoded")
    assert faults[1] == f"{pairs[2].image_path}: is 48 x 64 (h x w) but its mask is 8 x 9"


def test_the_check_refuses_large_images(tmp_path):
    pairs, _ = pairing.find_pairs(write_dataset(tmp_path / "a", 1))
    infos, faults = checking.check_files(pairs, max_pixels=1000)
    assert infos == {} and len(faults) == 1 and "has 48 x 64 pixels" in faults[0]


# --- memory ---


@pytest.mark.parametrize(("pairs_at_once", "expected"), [(2, 2), (0.5, 1)])
def test_few_pixels_are_decoded_at_once(tmp_path, monkeypatch, pairs_at_once, expected):
    pairs, _ = pairing.find_pairs(write_dataset(tmp_path / "a", 8))
    active, peak, lock, decode = 0, 0, threading.Lock(), checking._decode

    def slowly(item):
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
        time.sleep(0.03)
        infos = decode(item)
        with lock:
            active -= 1
        return infos

    monkeypatch.setattr(checking, "_decode", slowly)
    monkeypatch.setattr(checking, "PIXELS_AT_ONCE", int(pairs_at_once * 2 * 48 * 64))
    infos, faults = checking.check_files(pairs)
    assert len(infos) == 8 and faults == []
    assert peak == expected


# --- cache ---


def test_a_second_check_decodes_nothing_and_finds_the_same(tmp_path, pairs, decoded):
    palette = Image.open(pairs[1].mask_path).convert("P")
    palette.putpalette([0, 0, 0, *([200, 30, 0] * 255)])
    palette.save(pairs[1].mask_path)  # a mask with a color
    background = tmp_path / "b.png"
    background.write_bytes(pairs[0].image_path.read_bytes())
    first = checking.check_files([*pairs, background])
    assert len(decoded) == 5
    assert first[0][pairs[1]][pairs[1].mask_path].colors == {(200, 30, 0)}
    assert first[0][pairs[0]][pairs[0].mask_path].level == 255
    decoded.clear()
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    again, _ = pairing.find_pairs(moved)
    infos, faults = checking.check_files([*again, background])
    assert decoded == [] and faults == []
    facts = [[list(info.values()) for info in found.values()] for found in (infos, first[0])]
    assert facts[0] == facts[1]


def test_a_changed_byte_is_seen(pairs, decoded):
    before, _ = checking.check_files(pairs)
    decoded.clear()
    pixels = np.array(Image.open(pairs[2].image_path))
    pixels[0, 0] ^= 1
    stat = pairs[2].image_path.stat()
    Image.fromarray(pixels).save(pairs[2].image_path)
    os.utime(pairs[2].image_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as copying programs do
    mask = np.array(Image.open(pairs[3].mask_path))
    mask[:, :9] = 255
    Image.fromarray(mask).save(pairs[3].mask_path)
    after, _ = checking.check_files(pairs)
    assert set(decoded) == {pairs[2], pairs[3]}
    assert after[pairs[2]][pairs[2].image_path].digest != before[pairs[2]][pairs[2].image_path].digest
    assert after[pairs[3]][pairs[3].mask_path].foreground == (mask > 0).mean()


def test_facts_of_a_file_that_changes_during_its_check_are_not_kept(pairs, monkeypatch):
    decode = checking._decode

    def change_then_decode(item):
        Image.new("RGB", (64, 48)).save(item.image_path)
        return decode(item)

    monkeypatch.setattr(checking, "_decode", change_then_decode)
    assert len(checking.check_files(pairs[:1])[0]) == 1
    assert checking._load_records() == {}


def test_what_the_reading_depends_on_is_checked_apart(pairs, decoded, monkeypatch):
    checking.check_files(pairs[:1])
    decoded.clear()
    other_values = Pair(pairs[0].image_path, pairs[0].mask_path, "nonzero")
    other_mask = Pair(pairs[0].image_path, pairs[1].mask_path)
    others = [other_values, other_mask, pairs[0].image_path]
    infos, _ = checking.check_files([pairs[0], *others])
    assert set(decoded) == set(others)
    assert infos[other_values][pairs[0].mask_path].level is None
    decoded.clear()
    monkeypatch.setattr(checking, "_reading_rules", lambda: b"another version")
    checking.check_files(pairs[:1])
    assert decoded == pairs[:1]


def test_the_largest_size_holds_for_known_files_as_well(pairs, decoded):
    assert len(checking.check_files(pairs)[0]) == 4
    infos, faults = checking.check_files(pairs, max_pixels=48 * 64 - 1)
    assert infos == {} and len(faults) == 4 and "--max_pixels 3071" in faults[0]
    decoded.clear()
    assert len(checking.check_files(pairs, max_pixels=48 * 64)[0]) == 4 and decoded == []


def test_faults_are_found_again_at_every_start(pairs, decoded):
    Image.new("L", (9, 8)).save(pairs[2].mask_path)
    first = checking.check_files(pairs)
    decoded.clear()
    assert checking.check_files(pairs) == first and len(first[1]) == 1
    assert decoded == [pairs[2]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"0", b"1"),
        lambda content: content.replace(b"[48,64]", b"[48,65]"),
        lambda content: b"",
        lambda content: b"{}",
        lambda content: b"\xff\xfe" + bytes(range(256)) * 40,
    ],
)
def test_a_damaged_or_foreign_cache_is_ignored_and_replaced(pairs, decoded, spoil):
    first = checking.check_files(pairs)
    content = checking.cache_file().read_bytes()
    assert spoil(content) != content
    checking.cache_file().write_bytes(spoil(content))
    decoded.clear()
    assert checking.check_files(pairs) == first and set(decoded) == set(pairs)
    assert set(checking._load_records()) == set(json.loads(content.partition(b"\n")[2]))


def test_a_cache_that_cannot_be_written_costs_a_warning(pairs, cache_folder, monkeypatch):
    monkeypatch.setattr(checking, "SAVE_INTERVAL", -1)  # tries after every item
    (cache_folder / "finetune_sam_cables").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"cannot be kept.*XDG_CACHE_HOME") as warned:
        infos, faults = checking.check_files(pairs)
    assert len(infos) == 4 and faults == [] and len(warned) == 1


def test_a_user_without_a_home_folder_costs_a_warning(pairs, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does then
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(checking.check_files(pairs)[0]) == 4
    assert not Path("~").exists()


def test_checks_at_the_same_time_keep_the_facts_of_both(pairs, decoded, monkeypatch):
    add = checking._Cache.add

    def add_while_another_check_ends(cache, key, infos):
        monkeypatch.setattr(checking._Cache, "add", add)
        checking.check_files(pairs[2:])
        cache.add(key, infos)

    monkeypatch.setattr(checking._Cache, "add", add_while_another_check_ends)
    checking.check_files(pairs[:2])
    decoded.clear()
    assert len(checking.check_files(pairs)[0]) == 4 and decoded == []
    assert len(list(checking.cache_file().parent.iterdir())) == 1  # no temporary file is left


def test_the_cache_drops_the_oldest_items(pairs, decoded, monkeypatch):
    monkeypatch.setattr(checking, "MAX_KEPT_ITEMS", 2)
    for pair in pairs[:3]:
        checking.check_files([pair])
    decoded.clear()
    checking.check_files(pairs[:3])
    assert decoded == pairs[:1]
    decoded.clear()
    checking.check_files(pairs[:3])  # the items of one check are all kept
    assert decoded == []


# --- interruption ---


def test_an_interrupted_check_starts_no_more_files_and_keeps_what_it_found(tmp_path, decoded, monkeypatch):
    pairs, _ = pairing.find_pairs(write_dataset(tmp_path / "b", 12))
    add, decode = checking._Cache.add, checking._decode

    def interrupt(cache, key, infos):
        add(cache, key, infos)
        raise KeyboardInterrupt

    monkeypatch.setattr(checking._Cache, "add", interrupt)
    monkeypatch.setattr(checking, "_decode", lambda item: time.sleep(0.05) or decode(item))
    monkeypatch.setattr(checking, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 2))
    with pytest.raises(KeyboardInterrupt):
        checking.check_files(pairs)
    assert len(decoded) <= 6
    assert len(checking._load_records()) == 1


def test_threads_that_wait_for_memory_decode_nothing_after_the_end():
    budget = checking._PixelBudget(100)
    with ThreadPoolExecutor(1) as pool, budget.take(60):
        waiting = pool.submit(budget.take(50).__enter__)
        budget.close()
        with pytest.raises(CancelledError):
            waiting.result(timeout=10)


# --- progress ---


def test_a_long_check_shows_its_progress(pairs, monkeypatch, capsys):
    monkeypatch.setattr(checking, "BAR_DELAY", 0.0)
    checking.check_files(pairs)
    assert capsys.readouterr().err == ""
    checking.check_files(pairs, show_progress=True)
    assert "checking the files" in capsys.readouterr().err
