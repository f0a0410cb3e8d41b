import contextlib
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tifffile
from conftest import ROOT, build, record_of, shared_memory_of, write_folders, write_tiff, z_score

import augment
import imagereader
import inference_unet
from cli import InputError
from image_files import ChannelStatistics, ImageFile, clipped
from imagereader import ImageReader, MemoryRecycler, ReaderError, RingLayout
from lmdb_utils import Database


def take(reader, count):
    return list(itertools.islice(reader.generator(), count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        for part, other_part in zip(one, other):
            np.testing.assert_array_equal(part, other_part)


# ---------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_workers": 0}, "at least 1 reader"),
        ({"batch_size": 0}, "1 image per batch"),
        ({"shuffle": False, "balance_classes": True}, "cannot balance classes"),
    ],
)
def test_options_of_a_reader_that_make_no_sense_are_refused(databases, options, words):
    with pytest.raises(InputError, match=words):
        ImageReader(databases[0], **{"batch_size": 2, **options})


def test_batches_do_not_depend_on_the_number_of_readers_and_repeat_with_the_seed(databases):
    options = {"use_augmentation": True, "batch_size": 3}
    streams = []
    for workers, seed in ((1, 5), (3, 5), (1, 5), (1, 6)):
        with ImageReader(databases[0], num_workers=workers, seed=seed, **options) as reader:
            streams.append(take(reader, 9))
    assert_same(streams[0], streams[1])
    assert_same(streams[0], streams[2])
    assert not np.array_equal(streams[0][0].images, streams[3][0].images)


def test_the_stream_of_images_does_not_depend_on_the_batch_size(databases):
    streams = []
    for batch_size in (2, 6):
        with ImageReader(databases[0], use_augmentation=True, batch_size=batch_size) as reader:
            streams.append(np.concatenate([batch.images for batch in take(reader, 12 // batch_size)]))
    np.testing.assert_array_equal(*streams)


def test_augmentation_differs_from_image_to_image(databases):
    with ImageReader(databases[0], use_augmentation=True, batch_size=8) as reader:
        images = np.concatenate([batch.images for batch in take(reader, 4)])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_without_augmentation_a_batch_is_the_normalized_records(databases):
    with ImageReader(databases[1], shuffle=False, batch_size=2) as reader, Database(databases[1]) as database:
        batch = take(reader, 2)[1]
        for index in range(2):
            image, mask = database.read(2 + index)
            np.testing.assert_allclose(batch.images[index], z_score(image), atol=1e-6)
            np.testing.assert_array_equal(batch.masks[index], mask)
    assert batch.images.dtype == np.float32 and batch.masks.dtype == np.uint8


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [[], ["--use_tiling", 1, "--tile_size", 112]])
def test_the_readers_pixels_are_those_of_inference_to_the_bit(tmp_path, dtype, channels, options):
    shape = (150, 331, channels) if options else (70, 83, channels)
    paths = build(tmp_path, *options, count=3, shape=shape, dtype=dtype)
    with Database(paths[0]) as database:
        floor = database.metadata.deviation_floor
    model = inference_unet.Model(lambda batch: batch, channels, 2, 96, 16, deviation_floor=floor.tolist())
    for path in paths:
        with ImageReader(path, shuffle=False, batch_size=1, deviation_floor=floor) as reader:
            metadata, count = reader.metadata, reader.get_image_count()
            records = np.concatenate([batch.images for batch in take(reader, count)])
        for record, got in enumerate(records):
            name = metadata.names[metadata.record_image[record]]
            row, column = metadata.record_row[record], metadata.record_column[record]
            seen = seen_by_inference(tmp_path / "images" / name, model)
            expected = seen[row : row + got.shape[0], column : column + got.shape[1]]
            np.testing.assert_array_equal(got, expected)
            assert 0.3 < got.std() < 3


def seen_by_inference(path, model):
    """Return an image as inference passes it to the network, assembled from its tiles."""
    with ImageFile(path, channels=model.channels) as image:
        seen = np.empty((*image.shape[:2], model.channels), np.float32)
        tiles = inference_unet.plan_tiles(image.shape, (208, 208), model)
        statistics = ChannelStatistics.of_file(image)
        for [(tile, _)], [[pixels]] in inference_unet.read_batches(image, statistics, tiles, 1, model):
            rows, columns = clipped(tile.window, image.shape)
            seen[rows, columns] = pixels[: rows.stop - rows.start, : columns.stop - columns.start]
    return seen


def test_tiles_of_an_image_are_not_normalized_by_themselves(tmp_path):
    images, masks = write_folders(tmp_path, count=0)
    rng = np.random.default_rng(0)
    for index in range(2):  # one quarter has content, and the rest is empty
        image = rng.normal(2000, 30, (256, 256))
        image[:128, :128] += 1200 * (rng.random((128, 128)) < 0.5)
        write_tiff(images / f"{index}.tif", image[..., None].astype(np.uint16))
        tifffile.imwrite(masks / f"{index}.tif", (image > 2500).astype(np.uint8))
    train, _ = build(tmp_path, "--use_tiling", 1, "--tile_size", 128, count=0)
    with ImageReader(train, shuffle=False, batch_size=1) as reader:
        deviations = [batch.images.std() for batch in take(reader, reader.get_image_count())]
    assert min(deviations) < 0.15 and max(deviations) > 1.2


def test_a_test_reader_divides_by_the_deviations_of_the_training_database(tmp_path):
    paths = build(tmp_path, count=3, dtype="float32")
    with Database(paths[1]) as database:
        floor = 100 * database.record(0).deviation
    for given, expected in ((None, 1.0), (floor, 0.01)):
        with ImageReader(paths[1], shuffle=False, batch_size=1, deviation_floor=given) as reader:
            assert take(reader, 1)[0].images.std() == pytest.approx(expected, rel=1e-4)


def test_a_shuffled_pass_contains_each_image_once_in_another_order_each_time(databases):
    with ImageReader(databases[0], batch_size=4) as reader:
        count = reader.get_image_count()
        images = np.concatenate([batch.images for batch in take(reader, 2 * count // 4)]).reshape(2, count, -1)
    first, second = (np.unique(one_pass, axis=0) for one_pass in images)
    assert len(first) == count
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(images[0], images[1])


def test_processes_share_each_global_batch_and_a_resumed_stream_continues_where_it_was():
    def steps(world_size, replicas, batch_size, first_sample=0):
        """Return the samples of each of three steps, for all processes and replicas in turn."""
        streams = [
            imagereader.Stream(0, True, False, 100, batch_size, replicas, rank, world_size, first_sample)
            for rank in range(world_size)
        ]
        return [
            [s for stream in streams for r in range(replicas) for s in stream.samples(step * replicas + r)]
            for step in range(3)
        ]

    alone = steps(1, 1, 12)
    assert alone == [list(range(0, 12)), list(range(12, 24)), list(range(24, 36))]
    assert steps(2, 3, 2) == steps(3, 1, 4) == steps(1, 2, 6) == alone
    assert steps(2, 3, 2, first_sample=12)[:2] == alone[1:]


@pytest.mark.parametrize(
    "batch_size, workers, replicas, world_size", [(2, 1, 1, 1), (4, 3, 1, 1), (2, 2, 2, 1), (7, 1, 1, 1), (2, 1, 1, 2)]
)
def test_each_test_pass_contains_each_image_exactly_once(databases, batch_size, workers, replicas, world_size):
    options = {"shuffle": False, "batch_size": batch_size, "num_workers": workers, "replicas": replicas}
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(ImageReader(databases[1], rank=rank, world_size=world_size, **options))
            for rank in range(world_size)
        ]
        database = stack.enter_context(Database(databases[1]))
        assert len(database) == 5  # not a multiple of 2, 4 or 7
        expected = np.stack([z_score(database.read(index)[0]) for index in range(5)])
        streams = [reader.generator() for reader in readers]
        for _ in range(3):
            steps = [
                batch
                for _ in range(readers[0].get_pass_steps())
                for stream in streams
                for batch in itertools.islice(stream, replicas)
            ]
            seen = np.concatenate([batch.images[batch.weights > 0] for batch in steps])
            np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_balanced_classes_are_drawn_equally_often(tmp_path):
    from lmdb_utils import new_databases

    with new_databases(tmp_path / "a.lmdb") as [writer]:
        for index in range(20):  # class 2 is in one image of twenty, class 0 in all
            mask = np.zeros((16, 16), np.uint8)
            mask[0, 0] = 2 if index == 7 else 0
            writer.append(record_of(np.full((16, 16, 1), index, np.uint8), mask), f"{index}.tif")
        writer.finish({})
    options = {"number_classes": 3, "batch_size": 50}
    shares = []
    for balance in (True, False):
        with ImageReader(tmp_path / "a.lmdb", balance_classes=balance, **options) as reader:
            masks = np.concatenate([batch.masks for batch in take(reader, 8)])
        shares.append((masks == 2).any((1, 2)).mean())
    assert shares[0] == pytest.approx(0.5 + 0.5 / 20, abs=0.1)
    assert shares[1] == pytest.approx(1 / 20)


def test_the_augmentation_block_sets_every_limit_and_an_attribute_that_is_none_is_refused(databases):
    limits = ImageReader(databases[0]).augmentation_limits
    assert limits == {
        "reflection_flag": True,
        "rotation_flag": True,
        "jitter_augmentation_severity": 0.1,
        "noise_augmentation_severity": 0.02,
        "scale_augmentation_severity": 0.1,
        "blur_max_sigma": 2,
        "rotation_probability": 0.5,
        "jitter_probability": 0.5,
        "noise_probability": 0.5,
        "scale_probability": 0.5,
        "blur_probability": 0.5,
    }
    others = inspect.getfullargspec(augment.sample_transformation).kwonlyargs
    assert sorted({*others} - limits.keys()) == ["intensity_augmentation_severity", "intensity_probability"]
    with pytest.raises(ValueError, match="found _rotation_flg$"):
        imagereader.augmentation_limits({"_rotation_flg": True, "_blur_max_sigma": 2})


def test_a_class_beyond_the_network_is_refused_with_file_and_option(tmp_path):
    train, _ = build(tmp_path, count=3, classes=4)
    with pytest.raises(InputError, match=r"found 2 in .*cell.*; set --number_classes 4$"):
        ImageReader(train, number_classes=2)


def test_the_tensorflow_dataset_has_the_batches_of_the_generator(databases):
    with ImageReader(databases[0], use_augmentation=True, batch_size=3, num_workers=2) as reader:
        expected = take(reader, 6)
    with ImageReader(databases[0], use_augmentation=True, batch_size=3, num_workers=2) as reader:
        got = list(itertools.islice(reader.get_tf_dataset().as_numpy_iterator(), 6))
    assert_same(got, expected)


def checksum(batch):
    """Return a number that depends on every bit of a batch and on its position."""
    parts = (np.asarray(part).view(np.int32 if part.dtype == np.float32 else part.dtype) for part in batch)
    return sum(int(np.sum(part.ravel().astype(np.int64) * np.arange(1, 2 * part.size, 2))) for part in parts)


def tensorflow_checksum(*batch):
    """Return the same number, computed by TensorFlow while it reads the batch, and the images."""
    import tensorflow as tf

    total = tf.constant(0, tf.int64)
    for part in batch:
        words = tf.reshape(tf.bitcast(part, tf.int32) if part.dtype == tf.float32 else part, [-1])
        total += tf.reduce_sum(tf.cast(words, tf.int64) * tf.range(1, 2 * tf.size(words, tf.int64), 2))
    return total, batch[0]


def test_no_batch_changes_while_tensorflow_or_its_user_has_it(databases):
    """Send thousands of batches to a fast consumer, and to a slow one that keeps some of them for a while."""
    count = 2000
    options = {"batch_size": 2, "num_workers": 2}
    with ImageReader(databases[0], **options) as reader:
        expected = [checksum(batch) for batch in itertools.islice(reader.generator(), 2 * count)]
    assert len(set(expected)) > 100
    with ImageReader(databases[0], **options) as reader:
        checksums = iter(reader.get_tf_dataset().map(tensorflow_checksum))
        assert [int(next(checksums)[0]) for _ in range(count)] == expected[:count]
        held = []
        for index in range(count, 2 * count):
            value, images = next(checksums)
            assert int(value) == expected[index]
            held.append((images, images.numpy().copy()))
            if index % 50 == 0:
                time.sleep(0.02)  # the ring and TensorFlow's queue fill up
                for images, copy in held:
                    np.testing.assert_array_equal(images, copy)
                held.clear()


def tensorflow_copies_everything():
    """Return whether TensorFlow copies even batches that it could take over, as 2.18 does with numpy 2."""
    import tensorflow as tf

    batch = np.zeros(2**16, np.float32)
    batch = batch[-batch.ctypes.data % 4096 // 4 :]
    taken = next(
        iter(tf.data.Dataset.from_generator(lambda: iter([batch]), output_signature=tf.TensorSpec(batch.shape)))
    )
    batch[:] = 1
    return not taken.numpy().any()


def test_tensorflow_takes_a_batch_over_without_a_second_copy(databases, monkeypatch):
    if tensorflow_copies_everything():
        pytest.skip("this TensorFlow copies every batch")
    with ImageReader(databases[0], batch_size=2) as reader:
        blocks, new_block = [], reader._recycler.new_block

        def new_block_noted():
            block = new_block()
            blocks.append(block.ctypes.data)
            return block

        monkeypatch.setattr(reader._recycler, "new_block", new_block_noted)
        batches = iter(reader.get_tf_dataset())
        for _ in range(100):
            assert np.asarray(memoryview(next(batches)[0])).ctypes.data in blocks
    assert len(set(blocks)) < 20  # the memory is reused


def test_memory_is_not_recycled_while_a_view_of_a_view_lives():
    recycler = MemoryRecycler(1000)
    layout = RingLayout(1, 1, 1, (4, 4, 1), "uint8")
    view = layout.batch(recycler.new_block(), 0).masks[0][1:, 1:].T
    address = view.ctypes.data
    others = [recycler.new_block() for _ in range(3)]
    assert all(not other.ctypes.data <= address < other.ctypes.data + 1000 for other in others)
    del view
    again = recycler.new_block()
    assert again.ctypes.data <= address < again.ctypes.data + 1000
    assert again.ctypes.data % 64 == 0


# ---------------------------------------------------------------------------------------------- processes


def workers_of(pid):
    return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_startup_and_shutdown_may_be_called_twice_and_again(databases):
    reader = ImageReader(databases[0], num_workers=2)
    reader.shutdown()
    streams = []
    for _ in range(2):
        reader.startup()
        reader.startup()
        assert len(workers_of(os.getpid())) == 2
        streams.append(take(reader, 3))
        reader.shutdown()
        reader.shutdown()
        assert not workers_of(os.getpid())
    assert_same(*streams)


def test_a_killed_reader_is_reported_with_its_name_and_exit_code(databases, caplog):
    with ImageReader(databases[0], num_workers=2, name="train reader") as reader:
        take(reader, 1)
        workers_of(os.getpid())[1].send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while "exit code -9" not in caplog.text and time.monotonic() < deadline:  # without a request for a batch
            time.sleep(0.05)
        assert "train reader worker 1" in caplog.text and "killed by SIGKILL, exit code -9" in caplog.text
        with pytest.raises(ReaderError, match="exit code -9"):
            take(reader, 1000)
    assert not workers_of(os.getpid())


def test_a_damaged_record_is_bad_input_and_is_named(databases, tmp_path):
    damaged = tmp_path / "damaged.lmdb"
    content = databases[1].read_bytes()
    damaged.write_bytes(content.replace(b"SSEG", b"SSEX"))
    with ImageReader(damaged, shuffle=False) as reader, pytest.raises(InputError) as error:
        take(reader, 1)
    assert "record 0 (cell" in str(error.value) and "not in this suite's format" in str(error.value)
    assert str(damaged) in str(error.value) and "\n" not in str(error.value)


def test_an_exception_in_a_worker_arrives_with_the_record_and_its_traceback(databases):
    with ImageReader(databases[1], shuffle=False, deviation_floor=np.array(["x"])) as reader:
        with pytest.raises(ReaderError) as error:
            take(reader, 1)
    assert "record 0 (cell" in str(error.value) and "UFunc" in str(error.value)
    assert "Traceback" in str(error.value) and "normalize" in str(error.value)


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from imagereader import ImageReader
if __name__ == "__main__":
    reader = ImageReader({database!r}, num_workers=2)
    reader.startup()
    next(reader.generator())
    print("ready", flush=True)
    {ending}
"""


@pytest.mark.parametrize("ending", ["killed", "interrupted", "raised", "left"])
def test_no_process_and_no_shared_memory_outlives_the_main_process(databases, tmp_path, ending):
    script = tmp_path / "holder.py"
    last = {"raised": "raise ValueError('x')", "left": "pass"}.get(ending, "time.sleep(1000)")
    script.write_text(HOLDER.format(root=str(ROOT), database=str(databases[0]), ending=last))
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if ending == "killed":
            assert len(children) >= 2 and len(shared_memory_of(process.pid)) == 1
            process.kill()
        elif ending == "interrupted":
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C signals the entire group too
        process.wait(30)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    finally:
        process.kill()
        process.wait()


def test_a_reader_process_loads_no_tensorflow(databases):
    with ImageReader(databases[0]) as reader:
        take(reader, 1)
        [worker] = workers_of(os.getpid())
        libraries = {os.path.basename(region.path) for region in worker.memory_maps()}
    assert any("lmdb" in name or "cpython" in name for name in libraries)
    assert not [name for name in libraries if "tensorflow" in name]


def test_starvation_is_reported_once_and_so_is_its_end(databases, caplog, monkeypatch):
    reader = ImageReader(databases[0])
    slots = reader._layout.total_slots
    sizes = iter([0, 0, slots, 0, 0, slots // 2, slots])
    monkeypatch.setattr(reader, "get_queue_size", lambda: next(sizes))
    reader._report_starvation()  # nothing taken yet, so the queue has had no chance to fill
    reader._taken = slots
    for _ in range(6):
        reader._report_starvation()
    messages = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert messages == ["Input Queue Starvation !!!!", "Input Queue Starvation Over"] * 2


def run_with_shared_memory(size, script, tmp_path, **values):
    """Run a script in its own mount namespace, in which /dev/shm has a given size; return its output."""
    if subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"], capture_output=True
    ).returncode:
        pytest.skip("a mount namespace needs root")
    path = tmp_path / "script.py"
    path.write_text(script.format(root=str(ROOT), **values))
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec '{sys.executable}' '{path}'"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("asked_beforehand", [True, False])
def test_too_little_shared_memory_is_refused_with_what_is_needed(databases, asked_beforehand, tmp_path):
    """If the first check is wrong, the reservation reports it."""
    printed = run_with_shared_memory(
        "1m", TOO_LITTLE_SHARED_MEMORY, tmp_path, database=str(databases[0]), lie=not asked_beforehand
    )
    pattern = r"need 1\d\d\.\d MiB of shared memory, /dev/shm has [01]\.\d MiB free \(.+\); lower --batch_size"
    assert re.search(pattern, printed)


TOO_LITTLE_SHARED_MEMORY = """
import os, sys
sys.path.insert(0, {root!r})
import cli, imagereader
if __name__ == "__main__":
    reader = imagereader.ImageReader({database!r}, batch_size=3000)
    if {lie}:
        asked = cli.free_shared_memory
        answers = iter([1e12])
        cli.free_shared_memory = lambda: next(answers, None) or asked()
    try:
        reader.startup()
    except imagereader.InputError as error:
        print(error)
    assert not os.listdir("/dev/shm")
"""


def test_a_small_shared_memory_makes_a_shorter_queue_for_both_readers(databases, tmp_path):
    """A container gets 64 MB by default."""
    printed = run_with_shared_memory(
        "64m", LITTLE_SHARED_MEMORY, tmp_path, train_database=str(databases[0]), test_database=str(databases[1])
    )
    assert printed == "5 batches of (300, 64, 64, 1) in each of two readers\n"


LITTLE_SHARED_MEMORY = """
import itertools, sys
sys.path.insert(0, {root!r})
from imagereader import ImageReader
if __name__ == "__main__":
    train, test = (ImageReader(path, batch_size=300) for path in ({train_database!r}, {test_database!r}))
    with train, test:
        for reader in (train, test):
            shapes = {{batch.images.shape for batch in itertools.islice(reader.generator(), 12)}}
        print(reader.get_queue_capacity(), "batches of", *shapes, "in each of two readers")
    assert train.get_queue_capacity() == test.get_queue_capacity()
"""
