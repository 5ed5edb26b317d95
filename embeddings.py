"""What a run encodes once and keeps, and the batches that training takes.

One plan for the whole run, `plan_batches`, says when each sample is encoded. The data loader makes samples in
the order of the plan. `training_batches` encodes them, keeps embeddings that are used again in an
`EmbeddingPool`, and puts the batches together.
"""

import itertools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runtime
from base.errors import UserError
from dataset import SampleKey, TestSample, TestSet, TrainSample, TrainSet, test_loader, train_loader
from imaging.metrics import GroundTruth
from imaging.prompts import PROMPT_TOKENS
from inference import LoadedSam

# --- The plan ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """The share of this process of a batch, and the groups of samples that it must encode first."""

    keys: list[SampleKey]
    to_encode: list[list[SampleKey]]


def plan_batches(
    train_set: TrainSet,
    *,
    batch_size: int,
    epochs: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sharing: range | None = None,
) -> Iterator[BatchPlan]:
    """The batches of a run from iteration `start`, with what this process encodes for each.

    A sample is encoded at its first use, and again only if its cache slot holds the sample of another epoch.
    The processes `sharing` (default: all) have the same cache slots. They divide the new samples of their
    shares of a batch evenly, so together they encode as many as one process would. Samples without a slot
    are encoded by the process that uses them.

    Groups are as large as a batch of one process, except the last ones of an epoch. Where nothing is kept,
    each group is exactly one batch. A resumed run encodes again what it needs.
    """
    assert batch_size % world_size == 0
    sharing = range(world_size) if sharing is None else sharing
    group_size = batch_size // world_size
    first_epoch, done = divmod(start, math.ceil(train_set.epoch_length / batch_size))
    in_slot: dict[int, int] = {}  # the epoch in which the sample of each cache slot was created
    for epoch in range(first_epoch, epochs):
        batches = train_set.epoch_batches(epoch, batch_size=batch_size)[done:]
        shares = [keys[rank::world_size] for keys in batches]
        of_sharing = [[key for i, key in enumerate(keys) if i % world_size in sharing] for keys in batches]
        new = [[key for key in keys if _takes_slot(key, in_slot)] for keys in of_sharing]
        without_slot = [[key for key in keys if key.cache_slot is None] for keys in shares]
        shared_groups = _groups(new, group_size * len(sharing))
        own_groups = _groups(without_slot, group_size)
        for keys, shared, own in zip(shares, shared_groups, own_groups, strict=True):
            parts = [group[rank - sharing.start :: len(sharing)] for group in shared]
            yield BatchPlan(keys, [group for group in parts + own if group])
        done = 0


def _takes_slot(key: SampleKey, in_slot: dict[int, int]) -> bool:
    """Whether the slot of a sample holds another sample or none; then the slot gets this sample."""
    if key.cache_slot is None or in_slot.get(key.cache_slot) == key.created_epoch:
        return False
    in_slot[key.cache_slot] = key.created_epoch
    return True


def _groups(samples: list[list[SampleKey]], group_size: int) -> list[list[list[SampleKey]]]:
    """Divide the samples of all batches into groups; returns, for each batch, those that complete it."""
    everything = list(itertools.chain.from_iterable(samples))
    groups = [everything[i : i + group_size] for i in range(0, len(everything), group_size)]
    counts = itertools.accumulate(map(len, samples), initial=0)
    needed = [math.ceil(count / group_size) for count in counts]  # groups before each batch, and in all
    return [groups[first:end] for first, end in itertools.pairwise(needed)]


# --- Kept embeddings --------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolSpec:
    """What an `EmbeddingPool` holds.

    n_slots: how many samples.
    shape: (C, e, e) of an embedding.
    dtype: float16, or float32 to keep an encoder's output exactly.
    mask_grid: side of a target.
    """

    n_slots: int
    shape: tuple[int, ...]
    dtype: np.dtype
    mask_grid: int

    @property
    def size(self) -> int:
        """Bytes on disk: embeddings, targets, and sizes as two int64."""
        return self.n_slots * (prod(self.shape) * self.dtype.itemsize + self.mask_grid**2 + 16)


def pool_spec(n_slots: int, net: LoadedSam) -> PoolSpec:
    """Embeddings are kept in float16, or in float32 where nothing may be rounded (`--amp off`)."""
    embedding = net.sam.prompt_encoder.image_embedding_size
    dtype = np.dtype(np.float16 if net.low_precision else np.float32)
    return PoolSpec(n_slots, (net.sam.prompt_encoder.embed_dim, *embedding), dtype, net.spec.mask_grid)


class EmbeddingPool:
    """Embeddings with their targets and sizes, each in its slot of a memory-mapped temporary file.

    The processes of one machine share the file. A process may read what another one has put once both have
    passed a barrier. All processes make their pools at the same time.

    The file lies in `folder` but has no name there, so its disk space is free again when all pools or
    processes end, however they end. A slot holds the sample that was put there last. Samples without a slot
    wait in memory for their only use, in the process that puts them.

    Raises UserError in every process if one cannot make or open the file.
    """

    def __init__(self, folder: Path, spec: PoolSpec) -> None:
        """Make the file in `folder`, or open that of another process."""
        n, grid = spec.n_slots, spec.mask_grid
        purpose = f"{folder}: cannot reserve {spec.size} bytes for embeddings"
        # The maps keep the file alive.
        with _shared_file(folder, spec.size, purpose) as file, raised_in_all(purpose):
            self._sizes = np.memmap(file, np.int64, "r+", shape=(n, 2))
            offset = self._sizes.nbytes
            self._embeddings = np.memmap(file, spec.dtype, "r+", offset, (n, *spec.shape))
            offset += self._embeddings.nbytes
            self._targets = np.memmap(file, np.uint8, "r+", offset, (n, 1, grid, grid))
        self._waiting: dict[SampleKey, tuple[Tensor, Tensor, Tensor]] = {}

    def put(self, key: SampleKey, embedding: Tensor, target: Tensor, size: Tensor) -> None:
        """Keep a sample that is on the CPU. Arguments as of `get`; the embedding of any float dtype."""
        if key.cache_slot is None:
            self._waiting[key] = embedding, target, size
            return
        dtype = torch.float16 if self._embeddings.dtype == np.float16 else torch.float32
        self._embeddings[key.cache_slot] = embedding.to(dtype).numpy()
        self._targets[key.cache_slot] = target.numpy()
        self._sizes[key.cache_slot] = size.numpy()

    def get(self, key: SampleKey) -> tuple[Tensor, Tensor, Tensor]:
        """`embedding` (C, e, e), `target` uint8 (1, grid, grid), `size` int64 (2,). Do not change them."""
        if key.cache_slot is None:
            return self._waiting.pop(key)
        slot = key.cache_slot
        embedding, target, size = self._embeddings[slot], self._targets[slot], self._sizes[slot]
        return torch.from_numpy(embedding), torch.from_numpy(target), torch.from_numpy(size)


def pool_processes() -> range:
    """Numbers of the processes that share a pool with this one."""
    if os.name != "posix":  # elsewhere the name of an open file cannot be removed
        return range(runtime.rank(), runtime.rank() + 1)
    return runtime.ranks_on_machine()


@contextmanager
def raised_in_all(purpose: str) -> Iterator[None]:
    """If the block raises OSError or UserError in one process, raise UserError in all of them.

    The message is the first one, after `purpose`. Every process must come here, and waits for the others.
    """
    fault = ""
    try:
        yield
    except (OSError, UserError) as error:
        fault = f"{purpose}: {error}"
    faults = [fault for fault in runtime.gather([fault]) if fault]
    if faults:
        raise UserError(faults[0])


@contextmanager
def _shared_file(folder: Path, size: int, purpose: str) -> Iterator[IO[bytes]]:
    """A file of `size` bytes in `folder`, without a name, that all processes of this machine have open."""
    processes = pool_processes()
    is_first, is_alone = runtime.rank() == processes.start, len(processes) == 1
    file: IO[bytes] | None = None
    with ExitStack() as files:
        with raised_in_all(purpose):
            if is_alone:
                file = files.enter_context(tempfile.TemporaryFile(dir=folder))
            elif is_first:
                file = files.enter_context(
                    tempfile.NamedTemporaryFile(dir=folder, prefix=".pool.", delete=False)
                )
        name = runtime.gather([str(file.name) if file else ""])[processes.start]
        try:
            with raised_in_all(purpose):
                file = file or files.enter_context(open(name, "r+b"))
        finally:
            if is_first and not is_alone:
                Path(name).unlink()
        assert file is not None
        with raised_in_all(purpose):  # a full disk must show here, not in the middle of the run
            if is_first and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif is_first:
                file.truncate(size)
        yield file


Reserved = TypeVar("Reserved")


def reserve_or_keep_less(
    train_set: TrainSet, reserve: Callable[[TrainSet], Reserved]
) -> tuple[TrainSet, Reserved]:
    """Reserve space for all kept embeddings; if there is not enough, only for those of composites.

    In that case photos are encoded again in every epoch, and a warning says so. `reserve` raises UserError,
    in all processes, if there is not enough space.
    """
    try:
        return train_set, reserve(train_set)
    except UserError as error:
        less = train_set.without_kept_photos()
        if less.n_cache_slots == train_set.n_cache_slots:
            raise
        if runtime.is_main():
            warnings.warn(f"{error}: photos are encoded again in every epoch", stacklevel=2)
        return less, reserve(less)


# --- Training batches -------------------------------------------------------------------------


class TrainBatch(TypedDict):
    """The share of one process of a batch, on the device. B is 0 if the share is empty.

    keys: the samples.
    embedding: (B, C, e, e), in the compute dtype.
    target: uint8 (B, 1, grid, grid), 255 times the soft mask.
    size: int64 (B, 2), (h, w) of each image in the model's input.
    points, labels: (B, N, 2) and (B, N), the prompts.
    data_wait: seconds spent waiting for the data loader.
    """

    keys: list[SampleKey]
    embedding: Tensor
    target: Tensor
    size: Tensor
    points: Tensor
    labels: Tensor
    data_wait: float


def training_batches(
    train_set: TrainSet,
    net: LoadedSam,
    *,
    folder: Path,
    batch_size: int,
    epochs: int,
    start: int,
    num_workers: int,
) -> Iterator[TrainBatch]:
    """The batches of a run from iteration `start`, each as the share of this process.

    `batch_size` counts the samples of all processes. Kept embeddings lie in an unnamed file in `folder`.
    Raises UserError if a sample cannot be made.
    """
    train_set, pool = reserve_or_keep_less(train_set, partial(_make_pool, net=net, folder=folder))
    plan_of_run = plan_batches(
        train_set,
        batch_size=batch_size,
        epochs=epochs,
        start=start,
        rank=runtime.rank(),
        world_size=runtime.world_size(),
        sharing=pool_processes(),
    )
    plans, plans_of_loader = itertools.tee(plan_of_run)
    groups = (group for plan in plans_of_loader for group in plan.to_encode)
    samples = train_loader(train_set, groups, num_workers=num_workers, pin_memory=net.device.type == "cuda")
    for plan in plans:
        if pool is not None:
            runtime.barrier()  # the others have read the last batch, so its slots may change
            data_wait = sum(_encode_to_pool(net, keys, samples, pool) for keys in plan.to_encode)
            runtime.barrier()  # what the others have put can be read
        if not plan.keys:
            yield _empty_batch(train_set, net)
        elif pool is None:
            yield _encode(net, plan.keys, samples)
        else:
            yield _get(pool, plan.keys, train_set, net, data_wait)


def _make_pool(train_set: TrainSet, *, net: LoadedSam, folder: Path) -> EmbeddingPool | None:
    """A pool for what is kept, or None if nothing is."""
    if not train_set.n_cache_slots:
        return None
    return EmbeddingPool(folder, pool_spec(train_set.n_cache_slots, net))


def _next_samples(samples: Iterator[TrainSample]) -> tuple[TrainSample, float]:
    """The next samples of the loader, and how many seconds they took to come."""
    asked = time.perf_counter()
    sample = next(samples)
    return sample, time.perf_counter() - asked


def _encode(net: LoadedSam, keys: list[SampleKey], samples: Iterator[TrainSample]) -> TrainBatch:
    """The next samples of the loader, which are those of `keys`, with their embeddings."""
    sample, data_wait = _next_samples(samples)
    size = _to_device(sample["size"], net.device)
    return {
        "keys": keys,
        "embedding": net.encode(_to_device(sample["image"], net.device), size),
        "target": _to_device(sample["target"], net.device),
        "size": size,
        "points": _to_device(sample["points"], net.device),
        "labels": _to_device(sample["labels"], net.device),
        "data_wait": data_wait,
    }


def _encode_to_pool(
    net: LoadedSam, keys: list[SampleKey], samples: Iterator[TrainSample], pool: EmbeddingPool
) -> float:
    """Encode the next samples and keep them; returns the seconds spent waiting for them.

    This waits for the device once, for the embeddings. Targets and sizes never leave the CPU.
    """
    sample, data_wait = _next_samples(samples)
    images, sizes = _to_device(sample["image"], net.device), _to_device(sample["size"], net.device)
    embeddings = net.encode(images, sizes).cpu()
    for kept in zip(keys, embeddings, sample["target"], sample["size"], strict=True):
        pool.put(*kept)
    return data_wait


def _get(
    pool: EmbeddingPool, keys: list[SampleKey], train_set: TrainSet, net: LoadedSam, data_wait: float
) -> TrainBatch:
    """A batch of kept samples, each with the prompt of this use."""
    embeddings, targets, sizes = zip(*map(pool.get, keys), strict=True)
    prompts = [train_set.draw_prompt(*sample) for sample in zip(keys, targets, sizes, strict=True)]
    points, labels = zip(*prompts, strict=True)
    embedding = _to_device(torch.stack(embeddings), net.device)
    return {
        "keys": keys,
        "embedding": embedding.to(net.low_precision or torch.float32),
        "target": _to_device(torch.stack(targets), net.device),
        "size": _to_device(torch.stack(sizes), net.device),
        "points": _to_device(torch.stack(points), net.device),
        "labels": _to_device(torch.stack(labels), net.device),
        "data_wait": data_wait,
    }


def _empty_batch(train_set: TrainSet, net: LoadedSam) -> TrainBatch:
    spec, n_tokens = train_set.spec, PROMPT_TOKENS[train_set.prompt]
    images = torch.zeros(0, spec.img_size, spec.img_size, 3, dtype=torch.uint8, device=net.device)
    size = torch.zeros(0, 2, dtype=torch.int64, device=net.device)
    return {
        "keys": [],
        "embedding": net.encode(images, size),
        "target": torch.zeros(0, 1, spec.mask_grid, spec.mask_grid, dtype=torch.uint8, device=net.device),
        "size": size,
        "points": torch.zeros(0, n_tokens, 2, device=net.device),
        "labels": torch.zeros(0, n_tokens, dtype=torch.int64, device=net.device),
        "data_wait": 0.0,
    }


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for it, from pinned memory where the device is a CUDA device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# --- The test set -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTestSample:
    """A test sample, ready to decode. It is kept small, because there may be hundreds.

    embedding: (1, C, e, e) in the compute dtype, on the CPU. A frozen encoder computes it once per run.
    image: uint8 (h, w, 3), the model's input without its padding, if the encoder trains; then `embedding` is
        None.
    points, labels: (1, N, 2) and (1, N), the prompt.
    size: (h, w) of the image in the model's input.
    name: that of the image file.
    thumbnail: RGB uint8, small enough to show.
    """

    embedding: Tensor | None
    image: Tensor | None
    points: Tensor
    labels: Tensor
    size: tuple[int, int]
    name: str
    ground_truth: GroundTruth
    thumbnail: np.ndarray


def encode_test_set(
    test_set: TestSet, net: LoadedSam, *, batch_size: int, num_workers: int, stop: runtime.StopRequest
) -> list[EncodedTestSample]:
    """The share of this process of the test samples, encoded in batches if their embeddings stay the same.

    Raises UserError if a sample cannot be made, and Stopped if a signal ends the run.
    """
    samples = test_loader(
        test_set, num_workers=num_workers, rank=runtime.rank(), world_size=runtime.world_size()
    )
    encoder_is_frozen = not any(p.requires_grad for p in net.sam.image_encoder.parameters())
    encoded: list[EncodedTestSample] = []
    progress = tqdm(samples, "encoding the test set", leave=False, disable=not runtime.is_main())
    checked = _until_stopped(progress, stop)
    while batch := list(itertools.islice(checked, batch_size)):
        embeddings: Sequence[Tensor | None] = [None] * len(batch)
        if encoder_is_frozen:
            images, sizes = (torch.stack([sample[name] for sample in batch]) for name in ("image", "size"))
            # Copies, because each would keep the memory of the whole batch.
            embeddings = [embedding.clone() for embedding in net.encode(images, sizes).cpu().split(1)]
        encoded += map(_encoded_sample, batch, embeddings)
    return encoded


def _until_stopped(samples: Iterable[TestSample], stop: runtime.StopRequest) -> Iterator[TestSample]:
    for sample in samples:
        stop.check()
        yield sample


def _encoded_sample(sample: TestSample, embedding: Tensor | None) -> EncodedTestSample:
    height, width = sample["size"].tolist()
    return EncodedTestSample(
        embedding=embedding,
        image=sample["image"][:height, :width].clone() if embedding is None else None,
        points=sample["points"][None],
        labels=sample["labels"][None],
        size=(height, width),
        name=sample["name"],
        ground_truth=sample["ground_truth"],
        thumbnail=sample["thumbnail"],
    )
