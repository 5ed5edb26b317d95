"""Training and test samples, epochs and loaders.

Images are RGB uint8 (H, W, 3). A mask file is read as bool (H, W); from there on a mask is soft, so
that thin cables survive being resized: float32 (H, W) in 0..1, or uint8 in 0..255 as the fourth channel
of a picture (H, W, 4). Every random choice comes from a generator made of (seed, epoch, slot), never
from global state.
"""

import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import runtime
from base.errors import UserError
from config import DatasetConfig
from imaging.compositing import (
    Read,
    bounded_size,
    composite,
    load_background,
    load_cut_out,
    load_directly,
    load_pair,
    longest_side,
    photo_sample,
)
from imaging.decoded_cache import DecodedCache
from imaging.files import (
    MAX_PIXELS,
    FileError,
    FileInfo,
    Pair,
    check_files,
    files_of,
    find_pairs,
    format_list,
    image_files,
)
from imaging.geometry import InputSpec, fit_size, to_model_input
from imaging.prompts import draw_prompt


@dataclass(frozen=True)
class DatasetIndex:
    """One dataset of the config with its files found, and what was seen of each."""

    config: DatasetConfig
    pairs: tuple[Pair, ...]
    backgrounds: tuple[Path, ...]
    facts: dict[Path, FileInfo]

    @property
    def is_constant(self) -> bool:
        """Whether its samples are the same in every epoch: photos, neither composited nor augmented."""
        return not self.config.composites and not self.config.w_aug


def index_datasets(configs: list[DatasetConfig], *, max_pixels: int = MAX_PIXELS) -> list[DatasetIndex]:
    """Find the files of every dataset and read each once.

    Raises one ValueError that lists what is wrong in all of them (the first 10 and the count):
    empty folders, unmatched or duplicate stems, undecodable or huge files, size mismatches, masks that
    are not binary.
    """
    faults = []
    found = []
    for config in configs:
        pairs, pair_faults = find_pairs(config.data_dir)
        faults += pair_faults
        backgrounds = []
        for folder in config.bg_paths:
            files = image_files(folder)
            if not files:
                faults.append(f"{folder}: no .png, .jpg or .jpeg file in it")
            backgrounds += files
        found.append((config, tuple(pairs), tuple(backgrounds)))
    items = (item for _, pairs, backgrounds in found for item in (*pairs, *backgrounds))
    facts, file_faults = check_files(items, max_pixels)
    faults += file_faults
    if faults:
        raise UserError(f"{len(faults)} problem(s) in the data:\n  {format_list(faults)}")
    return [
        DatasetIndex(config, pairs, backgrounds, {path: facts[path] for path in files_of(pairs, backgrounds)})
        for config, pairs, backgrounds in found
    ]


def find_leaks(train: list[DatasetIndex], test: DatasetIndex) -> list[tuple[Path, Path]]:
    """Photos (test, train) whose pixels are the same, so that testing on them would measure memory."""
    seen = {s.facts[pair.image_path].digest: pair.image_path for s in train for pair in s.pairs}
    photos = [pair.image_path for pair in test.pairs]
    digests = ((path, test.facts[path].digest) for path in photos)
    return [(path, seen[digest]) for path, digest in digests if digest in seen]


# --- Samples -----------------------------------------------------------------------------------


def make_sample(
    source: DatasetIndex,
    pair_index: int,
    canvas: tuple[int, int],
    rng: np.random.Generator,
    read: Read = load_directly,
) -> tuple[np.ndarray, np.ndarray]:
    """A composite or a photo as the dataset's config says: image uint8 and soft mask."""
    pairs, augment = source.pairs, source.config.w_aug
    if source.config.composites:
        return composite(pairs, source.backgrounds, pair_index, canvas, rng, augment=augment, read=read)
    return photo_sample(pairs[pair_index], canvas, rng, augment=augment, read=read)


def make_rng(seed: int, *key: int) -> np.random.Generator:
    """An independent generator for each (seed, key)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# First part of every generator's key: what the generator is for.
PLAN, TRAIN, TEST, PROMPT = range(4)


def epoch_plan(sources: list[DatasetIndex], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs one epoch uses, and in which order.

    Of each dataset `round(percentage * n_pairs)` samples (at least 1): whole passes, plus a subset
    drawn anew each epoch in which no pair occurs twice.

    Returns:
        int (n, 2) rows of (source, pair), one per slot of the epoch, and a permutation of the slots.
    """
    rng = make_rng(seed, PLAN, epoch)
    rows = []
    for number, source in enumerate(sources):
        n_pairs = len(source.pairs)
        passes, rest = divmod(max(1, round(source.config.percentage * n_pairs)), n_pairs)
        drawn = np.concatenate([np.tile(np.arange(n_pairs), passes), rng.permutation(n_pairs)[:rest]])
        rows.append(np.column_stack([np.full(len(drawn), number), drawn]))
    rows = np.concatenate(rows)
    return rows, rng.permutation(len(rows))


# --- Datasets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One use of a sample in training.

    The sample is that of `slot` in the epoch it was `born` in, which chose its `source`, its `pair`
    and its augmentation. `epoch` uses it, with a prompt of its own. `place` is where its embedding is
    kept for later epochs, or None.
    """

    epoch: int
    slot: int
    born: int
    source: int
    pair: int
    place: int | None


RETRY_AFTER = 1.0  # seconds: long enough for a network disk that hiccups


class UnreadableFile(Exception):
    """A file has gone bad since the check at the start; the message names it.

    A loader passes an exception of a worker on with the worker's traceback as its message, of which this
    keeps the end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition("dataset.UnreadableFile: ")[2])


def with_retry(make: Callable, key: Hashable) -> Any:
    """`make(key)`, tried once again if a file cannot be read any more; then raises UnreadableFile."""
    try:
        return make(key)
    except FileError:
        time.sleep(RETRY_AFTER)
    try:
        return make(key)
    except FileError as error:
        raise UnreadableFile(f"{error}; it was intact when the run began") from error


class TrainSet(Dataset):
    """Training samples, each a function of (seed, epoch, slot) alone; keys are of type `Use`.

    Args:
        reuse: epochs in which a composite or an augmented photo is used before it is made anew.
        keep_photos: whether to keep the embeddings of photos that are neither, in all epochs the same.
        cache_bytes: memory for decoded files.
    """

    def __init__(
        self,
        sources: list[DatasetIndex],
        *,
        spec: InputSpec,
        prompt: str,
        seed: int,
        reuse: int = 1,
        keep_photos: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.sources, self.spec, self.prompt, self.seed, self.reuse = sources, spec, prompt, seed, reuse
        rows, _ = epoch_plan(sources, seed, 0)
        self.epoch_length = len(rows)
        self.read = DecodedCache(_shapes(sources, longest_side((spec.finest_side, 0))), cache_bytes)
        # Where each source's places begin: places of slots, or of pairs if its photos never change.
        self.first_slot, self.first_place, self.places = [], [], 0
        for number, source in enumerate(sources):
            self.first_slot.append(int(np.argmax(rows[:, 0] == number)))
            self.first_place.append(self.places)
            if source.is_constant:
                self.places += len(source.pairs) if keep_photos else 0
            elif reuse > 1:
                self.places += int(np.sum(rows[:, 0] == number))
        self.keep_photos = keep_photos

    def epoch(self, epoch: int) -> list[Use]:
        """The uses of one epoch, in order.

        The sample of a slot is made anew in every epoch with (epoch + slot) % reuse == 0.
        """
        plan, order = epoch_plan(self.sources, self.seed, epoch)
        born = np.maximum(0, epoch - (epoch + np.arange(len(plan))) % self.reuse)
        plans = {int(e): epoch_plan(self.sources, self.seed, int(e))[0] for e in np.unique(born)}
        return [self._use(epoch, int(slot), int(born[slot]), plan, plans) for slot in order]

    def _use(self, epoch: int, slot: int, born: int, plan: np.ndarray, plans: dict[int, np.ndarray]) -> Use:
        number = int(plan[slot, 0])
        if self.sources[number].is_constant:
            pair = int(plan[slot, 1])
            place = self.first_place[number] + pair if self.keep_photos else None
            return Use(epoch, slot, 0, number, pair, place)
        place = self.first_place[number] + slot - self.first_slot[number] if self.reuse > 1 else None
        return Use(epoch, slot, born, number, int(plans[born][slot, 1]), place)

    def batches(
        self, *, batch_size: int, epochs: int, start: int, part: int = 0, parts: int = 1
    ) -> Iterator[list[Use]]:
        """The batches of a whole run, epoch after epoch, without the first `start`, which are done.

        Of each batch only one of several parts, of about the same length (0 for some, it may be).
        """
        per_epoch = -(-self.epoch_length // batch_size)
        for epoch in range(start // per_epoch, epochs):
            uses = self.epoch(epoch)
            skipped = start - epoch * per_epoch if epoch == start // per_epoch else 0
            for batch in range(skipped, per_epoch):
                yield uses[batch * batch_size : (batch + 1) * batch_size][part::parts]

    def batches_to_make(
        self, *, batch_size: int, epochs: int, start: int, part: int = 0, parts: int = 1
    ) -> Iterator[list[Use]]:
        """The samples to make for `batches`, in the order of their first use, epoch by epoch.

        With nothing kept these are the very batches; else they hold only what is not in the pool.
        """
        born, made, epoch = {}, [], None
        span = {"batch_size": batch_size, "epochs": epochs, "start": start, "part": part, "parts": parts}
        for batch in filter(None, self.batches(**span)):
            if made and batch[0].epoch != epoch:
                yield made
                made = []
            epoch = batch[0].epoch
            for use in batch:
                if use.place is None or born.get(use.place) != use.born:
                    born[use.place] = use.born
                    made.append(use)
                if len(made) == -(-batch_size // parts):
                    yield made
                    made = []
        if made:
            yield made

    def __getitem__(self, use: Use) -> dict[str, torch.Tensor]:
        """A sample; raises UnreadableFile."""
        return with_retry(self._make, use)

    def _make(self, use: Use) -> dict[str, torch.Tensor]:
        source = self.sources[use.source]
        rng = make_rng(self.seed, TRAIN, use.born, use.slot)
        canvas = fit_size(source.facts[source.pairs[use.pair].image_path].size, self.spec.finest_side)
        image, mask = make_sample(source, use.pair, canvas, rng, self.read)
        sample = to_model_input(image, mask, self.spec)
        return {**sample, **self.draw_prompt(use, sample["target"], sample["size"])}

    def draw_prompt(self, use: Use, target: torch.Tensor, size: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompt of one use, a function of (seed, epoch, slot): `points` (N, 2), `labels` (N,)."""
        rng = make_rng(self.seed, PROMPT, use.epoch, use.slot)
        return _prompt_tensors(self.prompt, target, size, self.spec, rng)


def _prompt_tensors(kind, target, size, spec, rng) -> dict[str, torch.Tensor]:
    points, labels = draw_prompt(kind, target[0].numpy(), tuple(size.tolist()), spec.img_size, rng)
    return {"points": torch.from_numpy(points), "labels": torch.from_numpy(labels)}


def _shapes(sources: list[DatasetIndex], longest: int) -> dict[Hashable, tuple[int, ...]]:
    """Shapes of what is read for training, by (function, item), as `DecodedCache` takes them."""
    shapes = {}
    for source in sources:
        if source.is_constant:
            continue
        load = load_cut_out if source.config.composites else load_pair
        for pair in source.pairs:
            shapes[load, pair] = (*bounded_size(source.facts[pair.image_path].size, longest), 4)
        for path in source.backgrounds:
            shapes[load_background, path] = (*bounded_size(source.facts[path].size, longest), 3)
    return shapes


class TestSet(Dataset):
    """Test samples, each a function of (seed, index) alone, with the truth at full resolution.

    With `percentage` below 1 a fixed subset; above 1 counts as 1.
    """

    __test__ = False  # not a pytest class

    def __init__(self, source: DatasetIndex, *, spec: InputSpec, prompt: str, seed: int) -> None:
        self.source, self.spec, self.prompt, self.seed = source, spec, prompt, seed
        n_pairs = len(source.pairs)
        count = min(n_pairs, max(1, round(source.config.percentage * n_pairs)))
        self.pair_indices = np.sort(make_rng(seed, TEST).permutation(n_pairs)[:count])

    def __len__(self) -> int:
        return len(self.pair_indices)

    def __getitem__(self, index: int) -> dict:
        """A sample; raises UnreadableFile."""
        return with_retry(self._make, index)

    def _make(self, index: int) -> dict:
        pair_index = self.pair_indices[index]
        rng = make_rng(self.seed, TEST, index)
        size = self.source.facts[self.source.pairs[pair_index].image_path].size
        image, mask = make_sample(self.source, pair_index, size, rng)
        sample = to_model_input(image, mask, self.spec)
        prompt = _prompt_tensors(self.prompt, sample["target"], sample["size"], self.spec, rng)
        return {**sample, **prompt, "picture": torch.tensor(image), "truth": torch.from_numpy(mask > 0.5)}


# --- Loaders -----------------------------------------------------------------------------------

# Workers that are forked see the memory of decoded files; those that are spawned do not.
WORKER_CONTEXT = "fork" if sys.platform == "linux" else None


def train_loader(train_set: TrainSet, *, num_workers: int, pin_memory: bool, **span: int) -> DataLoader:
    """One loader for the rest of a run: workers start once and prefetch on.

    It gives the batches of `TrainSet.batches_to_make(**span)`, once.
    """
    return DataLoader(
        train_set,
        batch_sampler=train_set.batches_to_make(**span),
        num_workers=num_workers,
        multiprocessing_context=WORKER_CONTEXT if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=runtime.init_data_worker,
    )


def test_loader(test_set: TestSet, *, num_workers: int, part: int, parts: int) -> DataLoader:
    """The test samples one by one, for their sizes differ, of one of several parts of the set."""
    samples = Subset(test_set, range(part, len(test_set), parts))
    return DataLoader(
        samples, batch_size=None, num_workers=num_workers, worker_init_fn=runtime.init_data_worker
    )
