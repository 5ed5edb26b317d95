"""The files of the datasets: found, checked, split and compared between training and test."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from base.errors import UserError
from config import Config, DatasetConfig
from imaging.checking import FileInfo, check_files
from imaging.files import (
    MAX_PIXELS,
    NO_IMAGE_FILE,
    FileError,
    check_size,
    first_few,
    format_list,
    image_files,
    read_image,
    unread_files,
)
from imaging.masks import MaskValues, read_mask
from imaging.pairing import Pair, find_pairs, normalized

MAX_FOREGROUND = 0.5  # of the pixels, over a dataset: cables cover a few percent


@dataclass(frozen=True)
class DatasetIndex:
    """The files of one dataset of the config, checked.

    infos: size, pixel hash and, of masks, the foreground of every file, as the check at the start saw them.
    unread: files in the folders that are not image files by their suffix.
    """

    config: DatasetConfig
    pairs: tuple[Pair, ...]
    backgrounds: tuple[Path, ...]
    infos: dict[Path, FileInfo]
    unread: tuple[Path, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether its samples are the same in every epoch: photos, neither composited nor augmented."""
        return not self.config.composites and not self.config.w_aug

    @property
    def samples_per_epoch(self) -> int:
        """`round(percentage * n_pairs)`, at least 1."""
        return max(1, round(self.config.percentage * len(self.pairs)))

    def image_size(self, pair: int) -> tuple[int, int]:
        """(h, w) of the image of a pair."""
        return self.infos[self.pairs[pair].image_path].size

    @property
    def foreground(self) -> float:
        """Mean over the masks of the fraction of their pixels that are foreground."""
        return float(np.mean([share for _, share in self._shares()]))

    def _shares(self) -> list[tuple[Path, float]]:
        """Every mask, with the fraction of its pixels that are foreground."""
        return [(pair.mask_path, self.infos[pair.mask_path].foreground or 0.0) for pair in self.pairs]

    def summary(self) -> dict[str, Any]:
        """The keys of the config, and the numbers of pairs and backgrounds, as plain values of JSON."""
        counts = {"pairs": len(self.pairs), "backgrounds": len(self.backgrounds)}
        return self.config.model_dump(mode="json") | counts

    def notes(self) -> list[str]:
        """What a user should know about the files: lines of text."""
        notes = []
        if self.unread:
            names = first_few([f"{path.parent.name}/{path.name}" for path in self.unread])
            notes.append(f"not read: {len(self.unread)} file(s) without the suffix of an image: {names}")
        large = [path for path, share in self._shares() if share > MAX_FOREGROUND]
        if large and not self.config.allow_large_foreground:
            notes.append(
                f"foreground covers more than half of {len(large)} mask(s), e.g. {large[0]}: "
                "are they inverted?"
            )
        colors = sorted({color for pair in self.pairs for color in self.infos[pair.mask_path].colors})
        if len(colors) > 1:
            notes.append(
                f"masks have {len(colors)} colors besides the background; each counts as cable: "
                f"{first_few(colors)} (mask_values selects some)"
            )
        return notes


def index_datasets(
    configs: Iterable[DatasetConfig], *, max_pixels: int = MAX_PIXELS, show_progress: bool = False
) -> list[DatasetIndex]:
    """Find the files of every dataset and check each file once; see `imaging.checking.check_files`.

    Raises one UserError that lists what is wrong in all datasets (the first 10 faults and their number):
    empty folders, unmatched or duplicate stems, undecodable or huge files, size mismatches, masks that are
    not binary, and sets of masks that cannot be right (see `_mask_faults`). If imgs/ and masks/ of a dataset
    are swapped, one sentence says so in place of its other faults.
    """
    configs = list(configs)
    found, faults = _find_files(configs, max_pixels, show_progress)
    if faults:
        swapped = [config for config in configs if _is_swapped(config, max_pixels)]
        if swapped:  # the files of the others are checked again, for their faults alone
            rest = [config for config in configs if config not in swapped]
            sentence = "imgs/ and masks/ seem to be swapped: masks/ holds photos, imgs/ masks"
            faults = [f"{folder}: {sentence}" for folder in dict.fromkeys(c.data_dir for c in swapped)]
            faults += _find_files(rest, max_pixels, show_progress)[1]
        raise UserError(f"{len(faults)} problem(s) in the data:\n  {format_list(faults)}")
    return found


def _find_files(
    configs: list[DatasetConfig], max_pixels: int, show_progress: bool
) -> tuple[list[DatasetIndex], list[str]]:
    """The files of every dataset, and what is wrong with them; see `index_datasets`."""
    faults: list[str] = []
    found: list[DatasetIndex] = []
    for config in configs:
        pairs, pair_faults = find_pairs(config.data_dir, config.mask_values)
        faults += pair_faults
        backgrounds: list[Path] = []
        for folder in config.bg_paths:
            images = image_files(folder)
            if not images:
                faults.append(f"{folder}: {NO_IMAGE_FILE}")
            backgrounds += images
        folders = (config.data_dir / "imgs", config.data_dir / "masks", *config.bg_paths)
        unread = tuple(path for folder in folders if folder.is_dir() for path in unread_files(folder))
        found.append(DatasetIndex(config, tuple(pairs), tuple(backgrounds), {}, unread))
    items: list[Pair | Path] = []
    for dataset in found:
        items += [*dataset.pairs, *dataset.backgrounds]
    infos, file_faults = check_files(items, max_pixels, show_progress=show_progress)
    faults += file_faults
    for dataset in found:
        files: list[Pair | Path] = [*dataset.pairs, *dataset.backgrounds]
        for item in files:
            dataset.infos.update(infos.get(item, {}))
        faults += _mask_faults(dataset)
    return found, faults


N_READ = 5  # files of each folder that show whether imgs/ and masks/ are swapped
LONGEST_READ = 1024  # side in pixels to which a file is reduced before its colors are counted


def _is_swapped(config: DatasetConfig, max_pixels: int) -> bool:
    """Whether the first files of imgs/ are masks and those of masks/ are photos."""
    places = (config.data_dir / "imgs", config.data_dir / "masks")
    if not all(map(os.path.isdir, places)):
        return False
    in_imgs, in_masks = (image_files(place)[:N_READ] for place in places)
    return (
        bool(in_imgs and in_masks)
        and all(_is_photo(path, max_pixels) for path in in_masks)  # first: a true mask ends this early
        and all(_is_mask(path, config.mask_values, max_pixels) for path in in_imgs)
    )


def _is_mask(path: Path, mask_values: MaskValues, max_pixels: int) -> bool:
    """Whether a file can be read as a mask. With `mask_values`, a photo can be read too, but is none."""
    try:
        check_size(path, max_pixels)
        read_mask(path, mask_values)
    except FileError:
        return False
    return mask_values is None or not _is_photo(path, max_pixels)


def _is_photo(path: Path, max_pixels: int) -> bool:
    """Whether an image file has more colors than a gray mask can have."""
    try:
        check_size(path, max_pixels)
        image = read_image(path, LONGEST_READ)
    except FileError:
        return False
    step = -(-max(image.shape) // LONGEST_READ)  # only JPEG files are reduced when they are read
    colors = image[::step, ::step].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    return len(np.unique(colors)) > 256


MAX_FOREGROUND_OF_MASK = 0.95
FULL_SCALES = {1, 255, 65535}  # foreground values that have one meaning, also in one dataset


def _mask_faults(dataset: DatasetIndex) -> list[str]:
    """What is wrong with the masks of a dataset as a whole; each of its files was read without a fault.

    The faults: foreground covers more than half of all pixels or nearly all of one mask; every mask is
    empty; gray masks of two values have different foreground values, as masks of several classes have.
    """
    folder, config = dataset.config.data_dir / "masks", dataset.config
    masks = {pair.mask_path: dataset.infos.get(pair.mask_path) for pair in dataset.pairs}
    shares = {path: info.foreground for path, info in masks.items() if info and info.foreground is not None}
    if not shares:
        return []
    faults = []
    mean = float(np.mean(list(shares.values())))
    full = [path for path, share in shares.items() if share > MAX_FOREGROUND_OF_MASK]
    if (mean > MAX_FOREGROUND or full) and not config.allow_large_foreground:
        what = f"foreground covers {mean:.0%} of the pixels of all masks"
        if mean <= MAX_FOREGROUND:
            what = f"foreground covers nearly all of {len(full)} mask(s), e.g. {full[0].name}"
        faults.append(
            f"{folder}: {what}; are they inverted (cables must be bright), or swapped with imgs/? "
            "If not, set allow_large_foreground: true"
        )
    if mean == 0 and len(shares) == len(dataset.pairs) and not config.allow_empty_masks:
        faults.append(
            f"{folder}: all {len(shares)} masks are empty. If no photo shows a cable, "
            "set allow_empty_masks: true"
        )
    return faults + _level_faults(folder, [info.level for info in masks.values() if info and info.level])


def _level_faults(folder: Path, levels: list[int]) -> list[str]:
    """A fault if the foreground values of gray masks with two values look like labels of several classes."""
    counts = {level: levels.count(level) for level in sorted(set(levels))}
    if len(counts) <= 1 or counts.keys() <= FULL_SCALES:
        return []
    listed = ", ".join(f"{level} in {count}" for level, count in list(counts.items())[:10])
    return [
        f"{folder}: the foreground has different values ({listed} file(s)), as labels of classes have; "
        "write which are cable: mask_values: [1], or mask_values: nonzero for all"
    ]


def find_data(
    data: Config, max_pixels: int, val_percentage: float = 0.0
) -> tuple[list[DatasetIndex], DatasetIndex | None]:
    """The datasets to train on and the one to test on, all checked. Warns of images that are in both.

    Process 0 checks the files. The others get what it found, or raise the same UserError.
    """
    configs = [*data.dataset.train, *([data.dataset.test] if data.dataset.test else [])]
    datasets = runtime.from_main(
        lambda: index_datasets(configs, max_pixels=max_pixels, show_progress=runtime.is_main())
    )
    test = datasets.pop() if data.dataset.test else None
    if val_percentage:
        datasets, test = split_off_test(datasets, val_percentage)
    labeled = find_cables_in_backgrounds(datasets)
    leaks = find_leaks(datasets, test) if test else []
    for fault, files in (
        ("bg_paths contains photos of cables, and training takes these cables for background", labeled),
        ("test images are also used in training, so the test does not measure generalization", leaks),
    ):
        if files and runtime.is_main():
            warnings.warn(f"{fault}:\n  {format_list(files)}", stacklevel=2)
    return datasets, test


def split_off_test(
    datasets: list[DatasetIndex], percentage: float
) -> tuple[list[DatasetIndex], DatasetIndex]:
    """Take about `percentage` percent of the pairs of each dataset for a test set of photos as they are.

    A hash of the stem decides, so a photo stays on its side when others are added. At least one pair of each
    dataset is taken, and one is left.
    """
    train: list[DatasetIndex] = []
    tested: dict[Path, Pair] = {}
    for dataset in datasets:
        by_hash = sorted((_stem_hash(pair), number) for number, pair in enumerate(dataset.pairs))
        count = sum(hashed < percentage / 100 for hashed, _ in by_hash)
        count = min(max(1, count), len(by_hash) - 1)
        numbers = {number for _, number in by_hash[:count]}
        tested |= {pair.image_path: pair for n, pair in enumerate(dataset.pairs) if n in numbers}
        rest = tuple(pair for n, pair in enumerate(dataset.pairs) if n not in numbers)
        train.append(replace(dataset, pairs=rest))
    if not tested:
        raise UserError(f"--val_percentage {percentage:g}: no dataset has more than one pair")
    plain = {"bg_paths": (), "w_aug": False, "aug_details": None, "percentage": 1.0}
    infos = {path: info for dataset in datasets for path, info in dataset.infos.items()}
    config = datasets[0].config.model_copy(update=plain)
    return train, DatasetIndex(config, tuple(tested.values()), (), infos)


def _stem_hash(pair: Pair) -> float:
    """A number in 0..1 that depends only on the stem of the image."""
    stem = normalized(pair.image_path.stem).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(stem, digest_size=6).digest(), "big") / 2**48


def find_leaks(train: list[DatasetIndex], test: DatasetIndex) -> list[str]:
    """Name each test photo that has the same pixels as a training photo or a training background."""
    photos = {d.infos[pair.image_path].digest: pair.image_path for d in train for pair in d.pairs}
    backgrounds = {d.infos[path].digest: path for d in train for path in d.backgrounds}
    leaks = []
    for path in (pair.image_path for pair in test.pairs):
        digest = test.infos[path].digest
        if digest in photos:
            leaks.append(f"{path} = {photos[digest]}")
        if digest in backgrounds:
            leaks.append(
                f"{path} = background {backgrounds[digest]}, so training takes its cables for background"
            )
    return leaks


def find_cables_in_backgrounds(datasets: list[DatasetIndex]) -> list[str]:
    """Name each training background with the same pixels as a photo whose mask is not empty."""
    photos = {
        dataset.infos[pair.image_path].digest: pair.image_path
        for dataset in datasets
        for pair in dataset.pairs
        if dataset.infos[pair.mask_path].foreground
    }
    backgrounds = {path: dataset.infos[path].digest for dataset in datasets for path in dataset.backgrounds}
    return [f"{path} = {photos[digest]}" for path, digest in backgrounds.items() if digest in photos]


def file_digests(datasets: Iterable[DatasetIndex]) -> dict[str, str]:
    """Pixel hash of every file by its name in the data, such as `dataset 1: imgs/a`, without its path."""
    digests: dict[str, str] = {}
    for number, dataset in enumerate(datasets, 1):
        names = {pair.image_path: f"imgs/{pair.image_path.stem}" for pair in dataset.pairs}
        names |= {pair.mask_path: f"masks/{pair.mask_path.stem}" for pair in dataset.pairs}
        folders = {folder: index for index, folder in enumerate(dataset.config.bg_paths)}
        names |= {path: f"bg_paths[{folders[path.parent]}]/{path.name}" for path in dataset.backgrounds}
        for path, name in names.items():
            place = f"dataset {number}: {name}"
            # Photos of several folders may have one stem in the test set of `--val_percentage`.
            digests[place] = digests.get(place, "") + dataset.infos[path].digest
    return digests
