"""Training and test samples, epochs, and the loaders that make samples in other processes.

Images are RGB uint8 (H, W, 3). A mask is read as bool (H, W). After that it is soft, float32 in 0..1, so that
thin cables survive resizing. Every random choice comes from a generator that is a function of (seed, epoch,
index in the epoch) or (seed, index), never from global state.
"""

import copy
import multiprocessing
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

import runtime
from base.errors import UserError
from dataset_index import DatasetIndex
from imaging.compositing import (
    bounded_size,
    composite,
    draw_canvas,
    load_background,
    load_cut_out,
    load_directly,
    load_pair,
    longest_side,
    photo_sample,
)
from imaging.decoded_cache import DecodedCache
from imaging.files import FileError
from imaging.geometry import InputSpec, ModelInput, fit_size, to_model_input
from imaging.metrics import GroundTruth
from imaging.prompts import draw_prompt
from imaging.visualize import shrink

# --- Epochs -----------------------------------------------------------------------------------


class Purpose(IntEnum):
    """First part of every generator's key: what the generator is for."""

    PLAN = 0
    TRAIN = 1
    TEST = 2
    PROMPT = 3


def make_rng(seed: int, *key: int) -> np.random.Generator:
    """An independent generator for each (seed, key)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def epoch_plan(datasets: list[DatasetIndex], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs one epoch uses, and in which order.

    A dataset contributes its `samples_per_epoch`: whole passes, and a new random subset each
    epoch, in which no pair occurs twice.

    Returns:
        int (n, 2), rows of (dataset, pair), one per index in the epoch; and a permutation of the indices.
    """
    rng = make_rng(seed, Purpose.PLAN, epoch)
    rows = []
    for number, dataset in enumerate(datasets):
        n_pairs = len(dataset.pairs)
        passes, rest = divmod(dataset.samples_per_epoch, n_pairs)
        drawn = np.concatenate([np.tile(np.arange(n_pairs), passes), rng.permutation(n_pairs)[:rest]])
        rows.append(np.column_stack([np.full(len(drawn), number), drawn]))
    plan = np.concatenate(rows)
    return plan, rng.permutation(len(plan))


@dataclass(frozen=True)
class SampleKey:
    """One use of a training sample.

    The sample itself is a function of (`created_epoch`, `index_in_epoch`), which chose its `dataset`, its
    `pair` and its augmentation. `epoch` uses it, with a prompt of its own. `cache_slot` is where its
    embedding is kept for later epochs, or None.
    """

    epoch: int
    index_in_epoch: int
    created_epoch: int
    dataset: int
    pair: int
    cache_slot: int | None


# --- Datasets ---------------------------------------------------------------------------------


class TrainSample(ModelInput):
    """A sample, or a batch of them with a leading axis B: the model's input and a prompt.

    points, labels: float32 (N, 2) and int64 (N,); see `sam.decoder.decode`.
    """

    points: Tensor
    labels: Tensor


class TestSample(TrainSample):
    """One test sample, with what the test needs of the image at its own resolution.

    name: that of the image file.
    thumbnail: RGB uint8, at most SHOWN_SIDE pixels a side.
    """

    name: str
    ground_truth: GroundTruth
    thumbnail: np.ndarray


SHOWN_SIDE = 512  # longest side in pixels of a test image as TensorBoard and the report show it
RETRY_AFTER = 1.0  # seconds, long enough for a network disk to recover
Sample = TypeVar("Sample")


def with_retry(make: Callable[[Any], Sample], key: Hashable) -> Sample:
    """Return `make(key)`. If a file cannot be read, try once more after a second, then raise UserError."""
    try:
        return make(key)
    except FileError:
        time.sleep(RETRY_AFTER)
    try:
        return make(key)
    except FileError as error:
        raise UserError(f"{error}; the file was intact when the run began") from error


def make_sample(
    dataset: DatasetIndex,
    pair: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    read: Callable[..., np.ndarray] = load_directly,
) -> tuple[np.ndarray, np.ndarray]:
    """A composite or a photo, as the config of the dataset says.

    Returns the image, uint8 (h, w, 3), and its soft mask, float32 (h, w), both of `size`.
    """
    augment = dataset.config.w_aug
    if dataset.config.composites:
        return composite(dataset.pairs, dataset.backgrounds, pair, size, rng, augment=augment, read=read)
    return photo_sample(dataset.pairs[pair], size, rng, augment=augment, read=read)


def prompt_tensors(
    kind: str, target: Tensor, size: Tensor, spec: InputSpec, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """`points` float32 (N, 2) and `labels` int64 (N,) of a random prompt for a sample."""
    height, width = size.tolist()
    points, labels = draw_prompt(kind, target[0].numpy(), (height, width), spec.img_size, rng)
    return torch.from_numpy(points), torch.from_numpy(labels)


class TrainSet(Dataset[TrainSample]):
    """Training samples. Each is a function of (seed, epoch, index in the epoch) alone; see `SampleKey`.

    Args:
        reuse: in how many epochs a composite or an augmented photo is used before a new one replaces it.
        keep_photos: whether the embeddings of photos that never change are kept for all epochs.
        cache_bytes: memory for decoded files, in bytes.
    """

    def __init__(
        self,
        datasets: list[DatasetIndex],
        *,
        spec: InputSpec,
        prompt: str,
        seed: int,
        reuse: int = 1,
        keep_photos: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.datasets, self.spec, self.prompt, self.seed, self.reuse = datasets, spec, prompt, seed, reuse
        self.keep_photos = keep_photos
        self.read = DecodedCache(_decoded_shapes(datasets, longest_side((spec.finest_side, 0))), cache_bytes)
        self._number()

    def _number(self) -> None:
        """Number the indices of an epoch and the cache slots."""
        # Where those of each dataset begin.
        self.first_index: list[int] = []
        self.first_slot: list[int] = []
        self.epoch_length, self.n_cache_slots = 0, 0
        for dataset in self.datasets:
            self.first_index.append(self.epoch_length)
            self.first_slot.append(self.n_cache_slots)
            self.epoch_length += dataset.samples_per_epoch
            if dataset.is_constant:
                self.n_cache_slots += len(dataset.pairs) if self.keep_photos else 0
            elif self.reuse > 1:
                self.n_cache_slots += dataset.samples_per_epoch

    def without_kept_photos(self) -> "TrainSet":
        """A copy that has cache slots for composites and augmented photos only."""
        other = copy.copy(self)
        other.keep_photos = False
        other._number()
        return other

    def epoch(self, epoch: int) -> list[SampleKey]:
        """The samples of one epoch, in order.

        A new sample is created at an index in every epoch with (epoch + index) % reuse == 0.
        """
        plan, order = epoch_plan(self.datasets, self.seed, epoch)
        created = np.maximum(0, epoch - (epoch + np.arange(len(plan))) % self.reuse)
        plans = {int(e): epoch_plan(self.datasets, self.seed, int(e))[0] for e in np.unique(created)}
        return [self._key(epoch, int(index), int(created[index]), plan, plans) for index in order]

    def _key(
        self, epoch: int, index: int, created: int, plan: np.ndarray, plans: dict[int, np.ndarray]
    ) -> SampleKey:
        number = int(plan[index, 0])
        if self.datasets[number].is_constant:
            pair = int(plan[index, 1])
            slot = self.first_slot[number] + pair if self.keep_photos else None
            return SampleKey(epoch, index, 0, number, pair, slot)
        slot = self.first_slot[number] + index - self.first_index[number] if self.reuse > 1 else None
        return SampleKey(epoch, index, created, number, int(plans[created][index, 1]), slot)

    def epoch_batches(self, epoch: int, *, batch_size: int) -> list[list[SampleKey]]:
        """The batches of one epoch; each holds the samples of all processes."""
        keys = self.epoch(epoch)
        return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]

    def __getitem__(self, key: SampleKey) -> TrainSample:
        """A sample; raises UserError if its files cannot be read any more."""
        return with_retry(self._make, key)

    def _make(self, key: SampleKey) -> TrainSample:
        dataset = self.datasets[key.dataset]
        rng = make_rng(self.seed, Purpose.TRAIN, key.created_epoch, key.index_in_epoch)
        if dataset.config.composites and dataset.config.w_aug:
            canvas = draw_canvas(self.spec.finest_side, rng)
        else:
            canvas = fit_size(dataset.image_size(key.pair), self.spec.finest_side)
        image, mask = make_sample(dataset, key.pair, canvas, rng, self.read)
        inputs = to_model_input(image, mask, self.spec)
        points, labels = self.draw_prompt(key, inputs["target"], inputs["size"])
        return {**inputs, "points": points, "labels": labels}

    def draw_prompt(self, key: SampleKey, target: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt of one use of a sample: `points` (N, 2) and `labels` (N,)."""
        rng = make_rng(self.seed, Purpose.PROMPT, key.epoch, key.index_in_epoch)
        return prompt_tensors(self.prompt, target, size, self.spec, rng)


def _decoded_shapes(datasets: list[DatasetIndex], longest: int) -> dict[Hashable, tuple[int, int, int]]:
    """Largest shapes of what training reads, by (function, item), as `DecodedCache` takes them.

    What is read most often per byte comes first. A few backgrounds of many photos are read many times in an
    epoch.
    """
    shapes: dict[Hashable, tuple[int, int, int]] = {}
    uses: dict[Hashable, float] = defaultdict(float)  # in an epoch
    for dataset in datasets:
        if dataset.is_constant:
            continue
        load, channels = (load_cut_out, 5) if dataset.config.composites else (load_pair, 4)
        for number, pair in enumerate(dataset.pairs):
            shapes[load, pair] = (*bounded_size(dataset.image_size(number), longest), channels)
            uses[load, pair] += dataset.samples_per_epoch / len(dataset.pairs)
        for path in dataset.backgrounds:
            shapes[load_background, path] = (*bounded_size(dataset.infos[path].size, longest), 3)
            uses[load_background, path] += dataset.samples_per_epoch / len(dataset.backgrounds)
    return dict(sorted(shapes.items(), key=lambda item: -uses[item[0]] / prod(item[1])))


class TestSet(Dataset[TestSample]):
    """Test samples. Each is a function of (seed, index) alone and keeps its mask at full resolution.

    A `percentage` below 1 gives a fixed subset; above 1 it counts as 1.
    """

    __test__ = False  # not a pytest class

    def __init__(self, dataset: DatasetIndex, *, spec: InputSpec, prompt: str, seed: int) -> None:
        self.dataset, self.spec, self.prompt, self.seed = dataset, spec, prompt, seed
        n_pairs = len(dataset.pairs)
        count = min(n_pairs, dataset.samples_per_epoch)
        self.pairs = np.sort(make_rng(seed, Purpose.TEST).permutation(n_pairs)[:count])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TestSample:
        """A sample; raises UserError if its files cannot be read any more."""
        return with_retry(self._make, index)

    def _make(self, index: int) -> TestSample:
        pair = int(self.pairs[index])
        rng = make_rng(self.seed, Purpose.TEST, index)
        image, mask = make_sample(self.dataset, pair, self.dataset.image_size(pair), rng)
        inputs = to_model_input(image, mask, self.spec)
        points, labels = prompt_tensors(self.prompt, inputs["target"], inputs["size"], self.spec, rng)
        return {
            **inputs,
            "points": points,
            "labels": labels,
            "name": self.dataset.pairs[pair].image_path.name,
            "ground_truth": GroundTruth.from_mask(mask > 0.5),
            "thumbnail": shrink(image, SHOWN_SIDE),
        }


# --- Loaders ----------------------------------------------------------------------------------

# Workers that are forked share the memory of decoded files; those that are spawned do not.
WORKER_CONTEXT = "fork" if sys.platform == "linux" else None


WORKER_TIMEOUT = 600  # seconds for one batch; a slow disk needs less
SHARED_MEMORY = Path("/dev/shm")  # Linux; a container has 64 MB of it by default
SHARED_MEMORY_HINT = (
    "in a container, give more shared memory with --shm-size or --ipc=host; or use --num_workers 0"
)


class _ErrorsAsValues(Dataset[Any]):
    """The same samples, but a UserError is returned: PyTorch would add a traceback to its message."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.samples[key]
        except UserError as error:
            return error


def _collate(samples: list[Any]) -> Any:
    """One batch of several samples, or the first UserError among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return default_collate(samples)


def _keep(sample: Any) -> Any:
    return sample


def train_loader(
    train_set: TrainSet, key_groups: Iterable[list[SampleKey]], *, num_workers: int, pin_memory: bool
) -> Iterator[TrainSample]:
    """Batches of samples, one per group of keys.

    The workers start once, at the first batch, and work ahead. Raises UserError if a sample cannot be made
    or a worker dies.
    """
    sample_bytes = 3 * train_set.spec.img_size**2 + train_set.spec.mask_grid**2
    batching = {"batch_sampler": key_groups, "collate_fn": _collate, "pin_memory": pin_memory}
    loader = _data_loader(_ErrorsAsValues(train_set), num_workers, **batching)
    return _iterate(loader, sample_bytes)


def test_loader(test_set: TestSet, *, num_workers: int, rank: int, world_size: int) -> Iterator[TestSample]:
    """The test samples of this process, one by one because their sizes differ.

    Raises UserError as `train_loader` does.
    """
    share = Subset(_ErrorsAsValues(test_set), range(rank, len(test_set), world_size))
    loader = _data_loader(share, num_workers, batch_size=None, collate_fn=_keep)
    return _iterate(loader, 3 * test_set.spec.img_size**2)


def _data_loader(samples: Dataset[Any], num_workers: int, **batching: Any) -> DataLoader[Any]:
    return DataLoader(
        samples,
        num_workers=num_workers,
        multiprocessing_context=WORKER_CONTEXT if num_workers else None,
        worker_init_fn=runtime.init_data_worker,
        timeout=WORKER_TIMEOUT if num_workers else 0,
        **batching,
    )


def _iterate(loader: DataLoader[Any], sample_bytes: int) -> Iterator[Any]:
    """The batches of a loader. Raises UserError if a worker does not answer or cannot be started."""
    if loader.num_workers:
        _require_shared_memory(sample_bytes)
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:  # the system has no more processes, files or memory
        raise UserError(f"the data workers cannot be started ({error}); use fewer --num_workers") from error
    finally:
        workers = set(multiprocessing.active_children()) - others
        runtime.watch_data_workers(workers)
    while True:
        asked = time.monotonic()
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except RuntimeError as error:
            if loader.num_workers and time.monotonic() - asked >= WORKER_TIMEOUT:
                raise UserError(
                    f"no data came from the data workers for {WORKER_TIMEOUT} s ({SHARED_MEMORY_HINT})"
                ) from error
            raise
        if isinstance(batch, UserError):
            raise batch
        yield batch
    runtime.forget_data_workers(workers)


def _require_shared_memory(sample_bytes: int) -> None:
    """Raise UserError if not even a few samples fit into the memory through which workers pass them."""
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < 4 * sample_bytes:
            raise UserError(f"{SHARED_MEMORY} has only {free >> 20} MiB left ({SHARED_MEMORY_HINT})")
