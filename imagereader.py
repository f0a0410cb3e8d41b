"""`ImageReader`: batches from a database, prepared in separate processes so that the GPUs never wait.

An `ImageReader` starts worker processes that read records from the memory-mapped database, normalize and augment
them, and write batches to slots of shared memory. The main process takes finished batches in order. Sample ``i`` of the
stream depends only on the database, the seed and ``i``, so neither the number of workers nor the batch size changes
what the network sees. Workers are spawned, because forking after TensorFlow has started its threads deadlocks. They do
not import TensorFlow, which would cost each of them 400 MB and several seconds.
"""

import atexit
import contextlib
import inspect
import itertools
import logging
import multiprocessing
import os
import select
import signal
import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, NamedTuple, Optional, Union

import numpy as np

import augment
from cli import (
    SHARED_MEMORY_FOLDER,
    STOP_SIGNALS,
    InputError,
    PathLike,
    SharedMemory,
    allocate_shared_memory,
    attach_shared_memory,
    describe_error,
    end_with_parent,
    free_shared_memory,
    signals_held,
)
from image_files import normalize, without_data
from lmdb_utils import Database, Metadata, advise_label_map, ignored_id

RING_BYTES = 2**30  # shared memory that one ImageReader aims to fill with batches
SLOTS_PER_WORKER = (2, 8)  # one to fill while another is read; more only help if disk speed varies
ALIGNMENT = 64  # bytes; TensorFlow uses arrays with this alignment without copying them

STARVED_BELOW, CAUGHT_UP_ABOVE = 0.1, 0.5  # fractions of the queue
POLL_SECONDS = 0.5  # how often each wait checks whether to stop
STOP_SECONDS = 5.0  # time for a worker to finish its current image before it is killed

CRASHES = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE)  # of LMDB, if its file has changed

READER_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# ---------------------------------------------------------------------------------------------- the ring


class Batch(NamedTuple):
    """One batch, in the form that the network takes.

    Attributes
    ----------
    images : ndarray of float32, shape (B, H, W, C)
        Normalized by the statistics of their complete source images.
    masks : ndarray of uint8 or int32, shape (B, H, W)
        Class ids. Pixels to ignore have the largest value of the type.
    weights : ndarray of float32, shape (B,)
        1 for an image, 0 for padding at the end of an unshuffled pass.
    """

    images: np.ndarray
    masks: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class RingLayout:
    """Positions of each worker's batches in the shared memory.

    The slots follow a page of counters. Worker ``w`` of ``n`` builds batches ``w, w + n, ...``. It writes its ``j``-th
    batch to its slot ``j modulo slots_per_worker``.
    """

    num_workers: int
    slots_per_worker: int
    batch_size: int
    image_shape: tuple[int, int, int]
    mask_dtype: str

    COUNTER_BYTES = 4096

    @property
    def _part_bytes(self) -> tuple[int, int, int]:
        """Bytes of images, masks and weights in a slot, each rounded up to the alignment."""
        pixels = self.batch_size * self.image_shape[0] * self.image_shape[1]
        sizes = (pixels * self.image_shape[2] * 4, pixels * np.dtype(self.mask_dtype).itemsize, self.batch_size * 4)
        image_bytes, mask_bytes, weight_bytes = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        return image_bytes, mask_bytes, weight_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(self._part_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of the entire shared memory."""
        return self.COUNTER_BYTES + self.num_workers * self.slots_per_worker * self.slot_bytes

    @property
    def total_slots(self) -> int:
        """Batches that fit in the ring."""
        return self.num_workers * self.slots_per_worker

    def slot_offset(self, worker: int, round_index: int) -> int:
        """Return the offset in bytes of a worker's batch in a round (counted from 0)."""
        slot = worker * self.slots_per_worker + round_index % self.slots_per_worker
        return self.COUNTER_BYTES + slot * self.slot_bytes

    def batch(self, memory: Any, offset: int) -> Batch:
        """Return views of the batch that begins at `offset` in `memory`, an object with a buffer."""
        image_bytes, mask_bytes, _ = self._part_bytes
        shape = (self.batch_size, *self.image_shape)
        return Batch(
            np.ndarray(shape, np.float32, memory, offset),
            np.ndarray(shape[:3], self.mask_dtype, memory, offset + image_bytes),
            np.ndarray(shape[:1], np.float32, memory, offset + image_bytes + mask_bytes),
        )

    def counters(self, memory: Any) -> np.ndarray:
        """Return the counters (int64): a stop flag, then the number of batches that each worker has finished."""
        return np.ndarray(1 + self.num_workers, np.int64, memory)


def _shared_memory_error(layout: RingLayout, error: OSError) -> InputError:
    return InputError(
        f"the readers need {layout.total_bytes / 2**20:.1f} MiB of shared memory, {SHARED_MEMORY_FOLDER} has "
        f"{free_shared_memory() / 2**20:.1f} MiB free ({error.strerror}); lower --batch_size or --reader_count, or "
        "enlarge it (docker run --shm-size)"
    )


class MemoryRecycler:
    """Provides blocks of memory, and reuses each one once no array refers to it.

    New memory for each batch would cost more than the copy into it, because the system clears every page first.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._idle: list[bytearray] = []

    def new_block(self) -> np.ndarray:
        """Return a block (uint8) that starts at a multiple of `ALIGNMENT`; its content is arbitrary."""
        memory = self._idle.pop() if self._idle else bytearray(self._block_bytes + ALIGNMENT)
        address = np.ndarray(1, np.uint8, memory).ctypes.data
        block = np.ndarray(self._block_bytes, np.uint8, memory, -address % ALIGNMENT)
        # A view keeps the block alive, and so does a view of a view: numpy makes the lowest array the base of both.
        weakref.finalize(block, self._idle.append, memory).atexit = False
        return block


class Tokens:
    """A counter that two processes share: one adds to it, and the other takes from it.

    Its units are bytes in a pipe. Unlike a semaphore, a pipe has no name that could outlive its processes.
    """

    def __init__(self, context: Any, count: int) -> None:
        self._receiver, self._sender = context.Pipe(duplex=False)
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """Add one."""
        os.write(self._sender.fileno(), b"+")

    def take(self, timeout: float) -> bool:
        """Take one, waiting for at most `timeout` seconds; return whether there was one."""
        waiting = select.poll()  # the connection's own poll() takes many times as long
        waiting.register(self._receiver, select.POLLIN)
        return bool(waiting.poll(1000 * timeout) and os.read(self._receiver.fileno(), 1))


# ---------------------------------------------------------------------------------------------- the sample stream


@dataclass(frozen=True)
class Stream:
    """The record and the random numbers of each sample of the stream.

    A shuffled stream takes the records in one random permutation after another. A balanced stream draws a class, then
    one of its records. An unshuffled stream passes over the records in order and pads each pass with empty samples
    (index -1) to `pass_length`.

    If `world_size` processes train together, each step takes `replicas` batches for each rank in turn. A resumed run
    starts at `first_sample`.
    """

    seed: int
    shuffle: bool
    balance_classes: bool
    pass_length: int
    batch_size: int
    replicas: int = 1
    rank: int = 0
    world_size: int = 1
    first_sample: int = 0

    def samples(self, batch: int) -> range:
        """Return the samples of one of this process's batches."""
        step, replica = divmod(batch, self.replicas)
        first = ((step * self.world_size + self.rank) * self.replicas + replica) * self.batch_size
        return range(self.first_sample + first, self.first_sample + first + self.batch_size)

    def generator(self, sample: int) -> np.random.Generator:
        """Return the random number generator of one sample."""
        return np.random.default_rng((self.seed, 1, sample))

    def permutation(self, pass_index: int, count: int) -> np.ndarray:
        """Return the order of the records in one pass of a shuffled stream."""
        return np.random.default_rng((self.seed, 2, pass_index)).permutation(count)


class SampleSource:
    """One worker's view of the stream; picks, reads, normalizes and augments one sample at a time."""

    def __init__(
        self, database: Database, stream: Stream, deviation_floor: np.ndarray, augmentation: Optional[dict[str, Any]]
    ) -> None:
        self._database, self._stream, self._augmentation = database, stream, augmentation
        self._deviation_floor, self._largest_class = deviation_floor, int(database.metadata.classes[-1])
        if augmentation is not None:
            metadata = database.metadata
            self._augmenter = augment.Augmenter(metadata.image_shape, metadata.info["mask_dtype"])
        self._pass_index, self._order = -1, np.empty(0, np.int64)

    def pick(self, sample: int, rng: np.random.Generator) -> int:
        """Return the record of a sample, or -1 for padding."""
        metadata = self._database.metadata
        if self._stream.balance_classes:
            records = metadata.records_of_class(int(rng.integers(len(metadata.classes))))
            return int(records[rng.integers(len(records))])
        pass_index, position = divmod(sample, self._stream.pass_length)
        if not self._stream.shuffle:
            return position if position < metadata.count else -1
        if pass_index != self._pass_index:
            self._pass_index, self._order = pass_index, self._stream.permutation(pass_index, metadata.count)
        return int(self._order[position])

    def place(self, record: int, rng: np.random.Generator, batch: Batch, index: int) -> None:
        """Write a record to position `index` of a batch."""
        batch.weights[index] = record >= 0
        image, mask = batch.images[index], batch.masks[index]
        if record < 0:
            image[:], mask[:] = 0, 0
            return
        stored = self._database.record(record)
        self._check_classes(stored.mask)
        missing = without_data(stored.image, stored.no_data)
        target = image if self._augmentation is None else self._augmenter.buffer
        normalize(stored.image, stored.mean, stored.deviation, self._deviation_floor, target, missing)
        if self._augmentation is None:
            mask[:] = stored.mask
        else:
            transformation = augment.sample_transformation(rng, *stored.mask.shape, **self._augmentation)
            augmented, mask[:] = self._augmenter.apply(transformation, target, stored.mask, rng, missing)
            for channel in range(image.shape[2]):  # copying all at once would jump between channels at each pixel
                image[..., channel] = augmented[..., channel]
        ignored = self._database.metadata.ignored_id
        if ignored is not None and ignored < ignored_id(mask.dtype):  # a narrower type cuts it to its largest value
            mask[mask == ignored] = ignored_id(mask.dtype)

    def _check_classes(self, mask: np.ndarray) -> None:
        """Refuse class ids that the metadata does not list; the network may have no output for them."""
        if mask.view(f"u{mask.itemsize}").max() <= self._largest_class:  # unsigned, negative ids are the largest
            return
        known = mask[mask != self._database.metadata.ignored_id]
        if len(known) and (known.min() < 0 or known.max() > self._largest_class):
            raise InputError(
                f"expected class ids 0 to {self._largest_class}, as the database declares, found another one; the "
                "database is damaged, build it again"
            )


# ---------------------------------------------------------------------------------------------- the worker process


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker process receives: plain values, the name of the shared memory, counters and a pipe."""

    worker: int
    database: str
    stream: Stream
    deviation_floor: np.ndarray
    augmentation: Optional[dict[str, Any]]
    layout: RingLayout
    memory_name: str
    free: Tokens  # counts the worker's slots that may be filled
    filled: Tokens  # counts the worker's finished batches
    failures: Any  # write end of a pipe


def run_worker(task: WorkerTask) -> None:
    """Fill slots until asked to stop; the main function of a worker process."""
    # The main process decides how to react to signals. Ctrl-C and scancel reach the workers as well.
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    end_with_parent()
    record: Optional[int] = None
    try:
        memory = attach_shared_memory(task.memory_name)
        with Database(task.database) as database:
            source = SampleSource(database, task.stream, task.deviation_floor, task.augmentation)
            round_index = 0
            while _wait_for_slot(task, memory):
                batch = task.layout.batch(memory.buf, task.layout.slot_offset(task.worker, round_index))
                samples = task.stream.samples(round_index * task.layout.num_workers + task.worker)
                for index, sample in enumerate(samples):
                    rng = task.stream.generator(sample)
                    record = source.pick(sample, rng)
                    source.place(record, rng, batch, index)
                round_index += 1
                task.layout.counters(memory.buf)[1 + task.worker] = round_index
                task.filled.add()
    except BaseException as error:
        where = "start-up" if record is None else database.metadata.describe_record(record)
        is_input = isinstance(error, (InputError, OSError, MemoryError))
        reason = describe_error(error) if is_input else f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        with contextlib.suppress(OSError):  # the main process may have exited
            task.failures.send((where, reason, is_input))
        os._exit(1)  # the message is sent; a clean exit could hang on whatever has just failed
    os._exit(0)  # nothing to clean up: the parent owns the shared memory, and views of it would make close() fail


def _wait_for_slot(task: WorkerTask, memory: SharedMemory) -> bool:
    """Wait until the next slot may be overwritten; return False when it is time to stop."""
    counters = task.layout.counters(memory.buf)
    while not counters[0]:
        if task.free.take(POLL_SECONDS):
            return not counters[0]
    return False


# ---------------------------------------------------------------------------------------------- the reader


class ReaderError(RuntimeError):
    """A worker process failed; the message names the process, what it was reading, and the cause."""


class ImageReader:
    """Batches from a database, prepared by worker processes; a context manager.

    Parameters
    ----------
    img_db : path
        Database that `build_lmdb.py` wrote.
    use_augmentation : bool
        Transform each image at random, within the limits in the block below.
    balance_classes : bool
        Draw each class equally often, then an image that contains it. Requires `shuffle`.
    shuffle : bool
        Draw at random; otherwise pass over the database in order, each image once per pass.
    num_workers : int
        Number of reader processes.
    number_classes : int
        Classes of the network; a database with other classes is refused.
    batch_size : int
        Images in a batch.
    seed : int
        The stream depends only on the seed and the database.
    name : str
        Name of the reader in messages.
    replicas : int
        Replicas of this process; each takes one batch per step.
    rank, world_size : int
        Rank of this process, and number of processes that train together. Their streams have no sample in common. An
        unshuffled pass is padded to end with a complete step of all replicas.
    first_sample : int
        Position in the stream to start from: the number of images that all replicas have taken before.
    deviation_floor : ndarray, shape (C,), optional
        Smallest standard deviation by which each channel is divided; defaults to the database's own value. Testing
        uses the value of the training database, because the exported network does so too.

    Raises
    ------
    FileNotFoundError, InputError
        If the database is missing or damaged, or contains a class that the network does not have.
    """

    def __init__(
        self,
        img_db: PathLike,
        use_augmentation: bool = False,
        balance_classes: bool = False,
        shuffle: bool = True,
        num_workers: int = 1,
        number_classes: int = 2,
        batch_size: int = 4,
        seed: int = 0,
        name: str = "reader",
        replicas: int = 1,
        rank: int = 0,
        world_size: int = 1,
        first_sample: int = 0,
        deviation_floor: Optional[np.ndarray] = None,
    ) -> None:
        check_options(num_workers, batch_size, balance_classes, shuffle)
        # setup the image data augmentation parameters
        self._reflection_flag = True
        self._rotation_flag = True
        self._jitter_augmentation_severity = 0.1  # x% of a FOV
        self._noise_augmentation_severity = 0.02  # vary noise by x% of the dynamic range present in the image
        self._scale_augmentation_severity = 0.1  # vary size by x%
        self._blur_max_sigma = 2  # pixels
        # self._intensity_augmentation_severity = 0.05  # shift all pixels by x% of the dynamic range
        # with which probability an image gets each of them; the reflections are drawn with 0.5 each
        self._rotation_probability = 0.5
        self._jitter_probability = 0.5
        self._noise_probability = 0.5
        self._scale_probability = 0.5
        self._blur_probability = 0.5
        self.augmentation_limits = augmentation_limits(vars(self))

        self._use_augmentation, self._name, self._database = use_augmentation, name, os.fspath(img_db)
        self.metadata = read_metadata(self._database, number_classes)
        self._deviation_floor = self.metadata.deviation_floor if deviation_floor is None else deviation_floor
        self._stream = make_stream(
            self.metadata.count, seed, shuffle, balance_classes, batch_size, replicas, rank, world_size, first_sample
        )
        self._layout = make_layout(num_workers, batch_size, self.metadata.image_shape, number_classes)
        self._recycler = MemoryRecycler(self._layout.slot_bytes)
        self._forget_workers()
        self._stopping = threading.Event()
        self._taking = threading.Lock()  # held while the shared memory is used, which must not close meanwhile

    def _forget_workers(self) -> None:
        """Reset all state that belongs to one set of workers."""
        self._memory: Optional[SharedMemory] = None
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._free: list[Tokens] = []  # for each worker, how many slots it may fill
        self._filled: list[Tokens] = []  # for each worker, how many batches wait
        self._watcher: Optional[threading.Thread] = None
        self._failure: Union[ReaderError, InputError, None] = None
        self._taken = 0
        self._starving = False

    def startup(self) -> None:
        """Start the workers; do nothing if they already run.

        Raises
        ------
        InputError
            If there is too little shared memory.
        """
        if self._processes:
            return
        self._forget_workers()  # including the failure of earlier ones
        self._stopping.clear()
        with signals_held(), _environment({name: "1" for name in READER_THREAD_VARIABLES}):
            try:
                self._memory = allocate_shared_memory(self._layout.total_bytes)
            except OSError as error:
                raise _shared_memory_error(self._layout, error) from error
            # At exit, multiprocessing would send the workers a SIGTERM, which they ignore, and wait forever.
            atexit.register(self.shutdown)
            logging.info(
                "%s: %d process%s, room for %d batches in %.0f MiB of shared memory",
                self._name, self._layout.num_workers, "es" * (self._layout.num_workers > 1), self._layout.total_slots,
                self._layout.total_bytes / 2**20,
            )  # fmt: skip
            for worker in range(self._layout.num_workers):
                self._start_worker(worker, self._memory.name)
        self._watcher = threading.Thread(target=self._watch, name=f"{self._name} watcher", daemon=True)
        self._watcher.start()

    def _start_worker(self, worker: int, memory_name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._free.append(Tokens(context, self._layout.slots_per_worker))
        self._filled.append(Tokens(context, 0))
        receiver, sender = context.Pipe(duplex=False)
        self._pipes.append(receiver)
        task = WorkerTask(
            worker,
            self._database,
            self._stream,
            self._deviation_floor,
            self.augmentation_limits if self._use_augmentation else None,
            self._layout,
            memory_name,
            self._free[worker],
            self._filled[worker],
            sender,
        )
        process = context.Process(target=run_worker, args=(task,), name=f"{self._name} worker {worker}", daemon=True)
        process.start()
        sender.close()
        self._processes.append(process)

    def shutdown(self) -> None:
        """Stop the workers and release the shared memory; do nothing if no workers run."""
        self._stopping.set()
        if self._memory is None:
            return
        atexit.unregister(self.shutdown)
        self._layout.counters(self._memory.buf)[0] = 1
        for tokens in self._free:
            with contextlib.suppress(OSError):  # the worker has exited
                tokens.add()  # wakes a worker that waits for a slot
        for process in self._processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        if self._watcher is not None:
            self._watcher.join()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.close()
        with self._taking:
            self._processes, self._pipes, self._free, self._filled = [], [], [], []
            memory, self._memory = self._memory, None
            memory.close()

    def __enter__(self) -> "ImageReader":
        """Start the workers."""
        self.startup()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the workers."""
        self.shutdown()

    def _watch(self) -> None:
        """Report a worker that exits too early, immediately and even while the main thread is busy."""
        while not self._stopping.is_set():
            for sentinel in connection.wait([process.sentinel for process in self._processes], POLL_SECONDS):
                if self._stopping.is_set():
                    return
                worker = [process.sentinel for process in self._processes].index(sentinel)
                process = self._processes[worker]
                process.join()
                self._failure = failure_of(process, self._pipes[worker], self._database)
                if isinstance(self._failure, ReaderError):  # an InputError is reported like any other bad input
                    for line in str(self._failure).splitlines():
                        logging.error("%s", line)
                return

    def raise_failure(self) -> None:
        """Raise the error of a failed worker, if any; an `InputError` if the database is at fault."""
        if self._failure is not None:
            raise self._failure

    def get_image_count(self) -> int:
        """Return the number of images in the database."""
        return self.metadata.count

    def get_image_size(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of an image."""
        return self.metadata.image_shape

    def get_pass_steps(self) -> int:
        """Return the number of steps that all replicas take for one unshuffled pass, padding included."""
        stream = self._stream
        return -(-stream.pass_length // (stream.batch_size * stream.replicas * stream.world_size))

    def describe_step(self, step: int) -> list[str]:
        """Return descriptions of the records that this process's replicas take in a step after the reader's start."""
        stream, batches = self._stream, range(step * self._stream.replicas, (step + 1) * self._stream.replicas)
        samples = itertools.chain.from_iterable(map(stream.samples, batches))
        with Database(self._database) as database:
            source = SampleSource(database, stream, self._deviation_floor, None)
            records = [source.pick(sample, stream.generator(sample)) for sample in samples]
        return [self.metadata.describe_record(record) for record in records]

    def get_queue_size(self) -> int:
        """Return the number of finished batches that wait to be taken."""
        with self._taking:
            if self._memory is None:
                return 0
            return int(self._layout.counters(self._memory.buf)[1:].sum()) - self._taken

    def get_queue_capacity(self) -> int:
        """Return the number of finished batches that fit in the queue."""
        return self._layout.total_slots

    def generator(self) -> Iterator[Batch]:
        """Yield one batch after another until the reader is shut down.

        Yields
        ------
        Batch
            Independent arrays, copied from the slot and aligned so that TensorFlow needs no second copy.

        Raises
        ------
        ReaderError
            If a worker has failed.
        """
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            yield batch

    def _next_batch(self) -> Optional[Batch]:
        """Return the next batch of the stream, or None once the reader is shut down."""
        if self._stopping.is_set():
            return None
        round_index, worker = divmod(self._taken, self._layout.num_workers)
        self._report_starvation()
        while not self._stopping.is_set() and self._memory is not None:
            self.raise_failure()
            with self._taking:
                if self._stopping.is_set():
                    return None
                filled = self._filled[worker]
            if filled.take(POLL_SECONDS):
                with self._taking:
                    if self._stopping.is_set():
                        return None
                    start = self._layout.slot_offset(worker, round_index)
                    memory = self._recycler.new_block()
                    np.copyto(memory, np.ndarray(memory.shape, np.uint8, self._memory.buf, start))
                    self._taken += 1
                    self._free[worker].add()
                return self._layout.batch(memory, 0)
        return None

    def _report_starvation(self) -> None:
        """Log when the queue runs empty and when it has recovered, once each."""
        size, slots = self.get_queue_size(), self._layout.total_slots
        # The first ring of batches does not count, because the queue has had no chance to fill.
        if not self._starving and size < STARVED_BELOW * slots and self._taken >= slots:
            self._starving = True
            logging.warning("%s: Input Queue Starvation !!!!", self._name)
        elif self._starving and size > CAUGHT_UP_ABOVE * slots:
            self._starving = False
            logging.warning("%s: Input Queue Starvation Over", self._name)

    def get_tf_dataset(self) -> Any:
        """Return the stream as an endless `tf.data.Dataset` of (images, masks, weights), shaped as `Batch`.

        The dataset ends if a worker fails, and `raise_failure` then raises the error. If the stream raised it instead,
        TensorFlow would log a traceback, even if the only problem is a damaged database.
        """
        import tensorflow as tf

        def stream() -> Iterator[tuple[np.ndarray, ...]]:
            with contextlib.suppress(InputError, ReaderError):
                yield from map(tuple, self.generator())

        shape = (self._layout.batch_size, *self._layout.image_shape)
        signature = (
            tf.TensorSpec(shape, tf.float32),
            tf.TensorSpec(shape[:3], tf.dtypes.as_dtype(self._layout.mask_dtype)),
            tf.TensorSpec(shape[:1], tf.float32),
        )
        dataset = tf.data.Dataset.from_generator(stream, output_signature=signature)
        # There is nothing to tune here, and an iterator cannot be destroyed while its tuning thread sleeps, which can
        # take up to a minute.
        options = tf.data.Options()
        options.autotune.enabled = False
        # repeat() marks the dataset as endless. Otherwise, processes that train together would ask each other before
        # every batch whether all of them have one.
        return dataset.repeat().prefetch(2).with_options(options)


def augmentation_limits(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of the augmentation block as the arguments of `augment.sample_transformation`.

    Raises
    ------
    ValueError
        If the block sets an attribute that is not one of these arguments, because it would have no effect.
    """
    known = [f"_{name}" for name in inspect.getfullargspec(augment.sample_transformation).kwonlyargs]
    if unknown := sorted(block.keys() - set(known)):
        raise ValueError(f"expected attributes {', '.join(known)}, found {', '.join(unknown)}")
    return {name[1:]: limit for name, limit in block.items()}


def read_metadata(filepath: str, number_classes: int) -> Metadata:
    """Return the metadata of a database; refuse a database with classes that the network does not have."""
    with Database(filepath) as database:
        metadata = database.metadata
    check_classes(metadata, number_classes, filepath)
    return metadata


def make_stream(
    count: int,
    seed: int,
    shuffle: bool,
    balance_classes: bool,
    batch_size: int,
    replicas: int,
    rank: int,
    world_size: int,
    first_sample: int,
) -> Stream:
    """Return the stream over `count` records; an unshuffled pass is padded to complete steps of all replicas."""
    multiple = 1 if shuffle else batch_size * replicas * world_size
    pass_length = -(-count // multiple) * multiple
    return Stream(seed, shuffle, balance_classes, pass_length, batch_size, replicas, rank, world_size, first_sample)


def make_layout(
    num_workers: int, batch_size: int, image_shape: tuple[int, int, int], number_classes: int
) -> RingLayout:
    """Return a ring as deep as `RING_BYTES`, half of the free shared memory and `SLOTS_PER_WORKER` allow."""
    mask_dtype = "uint8" if number_classes <= ignored_id("uint8") else "int32"
    one = RingLayout(num_workers, 1, batch_size, image_shape, mask_dtype)
    budget = min(RING_BYTES, free_shared_memory() / 2)  # half, because training and testing have a reader each
    slots = int(np.clip(budget // (one.slot_bytes * num_workers), *SLOTS_PER_WORKER))
    return RingLayout(num_workers, slots, batch_size, image_shape, mask_dtype)


def check_options(num_workers: int, batch_size: int, balance_classes: bool, shuffle: bool) -> None:
    """Refuse reader options that are invalid alone or in combination."""
    if num_workers < 1 or batch_size < 1:
        raise InputError(f"expected at least 1 reader and 1 image per batch, got {num_workers} and {batch_size}")
    if balance_classes and not shuffle:
        raise InputError(
            "an unshuffled pass shows every image once and cannot balance classes; shuffle or do not balance"
        )


def check_classes(metadata: Metadata, number_classes: int, database: str) -> None:
    """Refuse a database that contains a class for which the network has no output.

    Raises
    ------
    InputError
        Names the expected classes, and a file that contains another one.
    """
    classes = metadata.classes
    outside = np.flatnonzero((classes < 0) | (classes >= number_classes))
    if len(outside):
        example = metadata.describe_record(int(metadata.records_of_class(int(outside[0]))[0]))
        advice = advise_label_map(classes.tolist())
        raise InputError(
            f"expected classes 0 to {number_classes - 1} in {database}, found {classes[outside[0]]} in {example}; "
            f"set --number_classes {int(classes.max()) + 1}{advice and ', or build the database again: '}{advice}"
        )


def failure_of(process: Any, pipe: Any, database: str) -> Union[ReaderError, InputError]:
    """Return why a worker exited: the error that it sent through its pipe, or the meaning of its exit code."""
    who = f"{process.name} (process {process.pid})"
    with contextlib.suppress(EOFError, OSError):
        if pipe.poll():
            where, reason, is_input = pipe.recv()
            return (InputError if is_input else ReaderError)(f"{who} failed at {where}: {reason}")
    how = f"exit code {process.exitcode}"
    if process.exitcode is not None and process.exitcode < 0:
        how = f"killed by {signal.Signals(-process.exitcode).name}, {how}"
        if -process.exitcode in CRASHES:
            return InputError(
                f"{who} crashed ({how}) while reading {database}: the file is damaged, or was cut short or "
                "overwritten meanwhile; copy or build it again"
            )
    return ReaderError(f"{who} exited unexpectedly ({how}); killed by hand, by Slurm, or because memory ran out?")


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the child processes started in the block."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
