import itertools
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import psutil
import pytest
import skimage.io
import tifffile
from conftest import ROOT, STORED, build, make_pair, write_stored
from PIL import Image

import imagereader
from imagereader import (
    ChannelStatistics,
    ImageFile,
    ImageReader,
    MemoryRecycler,
    ReaderError,
    RingLayout,
    read_image,
    z_score,
)
from lmdb_utils import Database, InputError


def take(reader, count):
    return list(itertools.islice(reader.generator(), count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        for part, other_part in zip(one, other):
            np.testing.assert_array_equal(part, other_part)


# ---------------------------------------------------------------------------------------------- image files


@pytest.mark.parametrize(
    "shape, options",
    [
        ((20, 30), {}),
        ((20, 30, 3), {}),
        ((20, 30, 13), {"planarconfig": "contig", "photometric": "minisblack"}),
        ((3, 20, 30), {"planarconfig": "separate", "photometric": "rgb"}),
        ((5, 20, 30), {"metadata": {"axes": "CYX"}}),
        ((5, 20, 30), {}),
        ((20, 30, 5), {}),
        ((5, 20, 30), {"imagej": True}),
    ],
)
def test_a_tiff_comes_as_rows_columns_channels(tmp_path, shape, options):
    array = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    expected = array[..., None] if array.ndim == 2 else array if shape[:2] == (20, 30) else np.moveaxis(array, 0, 2)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", size=(20, 30)), expected)


def test_the_size_of_the_mask_decides_where_unnamed_channels_are(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (17, 16, 18)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert read_image(tmp_path / "a.tif", size=(16, 18)).shape == (16, 18, 17)
    assert read_image(tmp_path / "a.tif", size=(17, 16)).shape == (17, 16, 18)
    assert read_image(tmp_path / "a.tif", channels=17).shape == (16, 18, 17)


def test_png_keeps_sixteen_bits_in_gray_and_colour(tmp_path):
    import imagecodecs

    for shape in ((20, 30), (20, 30, 3)):
        array = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), array.reshape(20, 30, -1))


def test_jpg_is_read(tmp_path):
    array = np.repeat(np.linspace(0, 255, 32).astype(np.uint8), 96).reshape(32, 32, 3)
    skimage.io.imsave(tmp_path / "a.jpg", array)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), array, atol=4)


def test_a_palette_gives_the_colours_of_an_image_and_the_indices_of_a_mask(tmp_path):
    ids, colours = np.arange(24, dtype=np.uint8).reshape(4, 6), np.arange(72, dtype=np.uint8)[::-1].reshape(24, 3)
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette(colours.tobytes())
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours[ids])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", as_mask=True)[..., 0], ids)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("content", [b"", b"not an image at all", None])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    if content is None:
        skimage.io.imsave(tmp_path / name, make_pair(0, (64, 64, 3), "uint8")[0], check_contrast=False)
        content = (tmp_path / name).read_bytes()
        content = content[: len(content) // 3]
    (tmp_path / name).write_bytes(content)
    if name == "a.jpg" and len(content) > 100:
        pytest.skip("a JPEG decoder may return what it has")
    with pytest.raises(InputError, match=name):
        read_image(tmp_path / name)


def test_a_stack_of_planes_is_refused_with_its_axes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 32, 32), np.uint8), imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match="ZYX"):
        read_image(tmp_path / "a.tif")


def windows_of(shape, size, overlap):
    """Return windows of a size, row by row, that cover an image and overlap."""
    starts = [range(0, max(length - overlap, 1), edge - overlap) for length, edge in zip(shape, size)]
    return [
        (slice(row, min(row + size[0], shape[0])), slice(column, min(column + size[1], shape[1])))
        for row in starts[0]
        for column in starts[1]
    ]


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("size, overlap", [((150, 130), 0), ((40, 50), 13), ((1, 130), 0), ((64, 70), 60)])
def test_windows_are_the_same_however_a_file_is_stored_and_read(tmp_path, kind, size, overlap):
    image = np.random.default_rng(0).integers(0, 60000, (150, 130, 3)).astype(np.uint16)
    write_stored(tmp_path / "a.tif", image, kind)
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.shape == image.shape and file.dtype == np.uint16 and file.dtype.isnative
        for plan in (windows_of(image.shape, size, overlap), file.blocks(5000)):
            windows = list(file.windows(plan))
            assert len(windows) == len(plan)
            for window, got in zip(plan, windows):
                assert got.dtype == np.uint16
                np.testing.assert_array_equal(got, image[window])


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("values", [1, 5000, 10**6])
def test_blocks_cover_an_image_once_and_follow_its_segments(tmp_path, kind, values):
    write_stored(tmp_path / "a.tif", np.zeros((150, 130, 3), np.uint16), kind)
    covered = np.zeros((150, 130), int)
    with ImageFile(tmp_path / "a.tif") as file:
        for rows, columns in file.blocks(values):
            covered[rows, columns] += 1
            assert rows.start % file.segment_shape[0] == 0 and columns.start % file.segment_shape[1] == 0
            size = (rows.stop - rows.start) * (columns.stop - columns.start) * 3
            assert size <= max(values, 3 * file.segment_shape[0] * file.segment_shape[1])
    assert (covered == 1).all()


def test_a_large_file_that_must_be_read_whole_is_noted(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(imagereader, "LARGE_IMAGE_BYTES", 100_000)
    for kind, noted in (("one compressed strip", True), ("strips", False), ("contiguous", False)):
        write_stored(tmp_path / "a.tif", np.ones((150, 130, 3), np.uint16), kind)
        caplog.clear()
        read_image(tmp_path / "a.tif")
        assert ("can only be read whole" in caplog.text) == noted


@pytest.mark.parametrize("kind", ["strips", "LZW tiles", "planar tiles", "OME"])
def test_each_part_of_a_file_is_decoded_once_and_let_go_after_its_last_window(tmp_path, kind, monkeypatch):
    image = np.random.default_rng(0).integers(0, 60000, (150, 130, 3)).astype(np.uint16)
    write_stored(tmp_path / "a.tif", image, kind)
    decoded, held = set(), []
    decode, from_row = imagereader._SegmentedTiff._decode, imagereader.DecodedSegment.from_row

    def watch(segment):
        segment = segment._replace(pixels=segment.pixels.copy())
        held.append(weakref.ref(segment.pixels))
        return segment

    def watched_decode(self, number, index):
        assert (number, index) not in decoded
        decoded.add((number, index))
        return watch(decode(self, number, index))

    monkeypatch.setattr(imagereader._SegmentedTiff, "_decode", watched_decode)
    monkeypatch.setattr(imagereader.DecodedSegment, "from_row", lambda self, row: watch(from_row(self, row)))
    with ImageFile(tmp_path / "a.tif") as file:
        plan, (segment_rows, segment_columns) = windows_of(image.shape, (60, 50), 20), file.segment_shape
        for (rows, columns), _ in zip(plan, file.windows(plan)):
            if columns.stop == 130:
                width = -(-130 // segment_columns) * segment_columns
                below = -(-rows.stop // segment_rows) * segment_rows - (rows.stop - 20)
                bytes_held = sum(array().nbytes for array in held if array() is not None)
                assert bytes_held <= below * width * 3 * 2 and (bytes_held == 0) == (rows.stop == 150)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert len(decoded) == sum(len(page.dataoffsets) for page in tif.pages)


def test_tiles_that_a_file_leaves_out_are_empty(tmp_path):
    tile = np.full((32, 32), 7, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", iter([tile, None, None, tile]), shape=(50, 60), dtype=np.uint16, tile=(32, 32))
    expected = np.zeros((50, 60, 1), np.uint16)
    expected[:32, :32] = expected[32:, 32:] = 7
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.segment_shape == (32, 32)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_tiles_have_the_tables_of_their_page(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 255, (150, 130, channels)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image.squeeze(), tile=(64, 48), compression="jpeg")
    expected = tifffile.imread(tmp_path / "a.tif").reshape(image.shape)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


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


def test_a_tiled_file_that_ends_early_is_refused_by_name_when_its_end_is_read(tmp_path):
    write_stored(tmp_path / "a.tif", np.ones((150, 130, 3), np.uint16), "uncompressed tiles")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        last = tif.pages[0].dataoffsets[-1]
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: last + 10])
    with ImageFile(tmp_path / "a.tif") as file:
        windows = file.windows([(slice(0, 32), slice(0, 130)), (slice(100, 150), slice(0, 130))])
        assert (next(windows) == 1).all()
        with pytest.raises(InputError, match=r"a\.tif.*end of the file"):
            next(windows)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_streamed_statistics_agree_with_a_single_pass_in_float64(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(imagereader, "MEASURED_VALUES", 1000)  # many parts of a small image
    image = make_pair(0, (150, 130, 3), dtype)[0]
    if dtype != "uint8":
        image += np.array(10**7, dtype)
    if dtype == "float32":
        image[..., 1] = (image[..., 1] - 10**7) / 1000  # of so small a deviation that it is only centred
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", rowsperstrip=11)
    wide = image.astype(np.float64)
    with ImageFile(tmp_path / "a.tif") as file:
        statistics = ChannelStatistics.measure(file)
        np.testing.assert_allclose(statistics.mean, wide.mean((0, 1)), rtol=1e-13)
        np.testing.assert_allclose(statistics.deviation, wide.std((0, 1)), rtol=1e-9)
        window = statistics.z_score(next(file.windows([(slice(20, 60), slice(30, 50))])))
    np.testing.assert_allclose(window, z_score(image)[20:60, 30:50], atol=2e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_z_score_agrees_with_float64(dtype):
    image = make_pair(0, (64, 48, 3), dtype)[0]
    wide = image.astype(np.float64)
    expected = (wide - wide.mean((0, 1))) / wide.std((0, 1))
    got = z_score(image)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, offset, deviation", [("uint16", 60000, 5), ("int32", 10**9, 50), ("float32", 1e7 + 0.4, 30)]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_z_score_keeps_its_precision_far_from_zero(dtype, offset, deviation, overwrite):
    """Also with channels one after another in memory, as the augmentation returns them."""
    if overwrite and dtype != "float32":
        pytest.skip("only float32 is overwritten")
    noise = np.random.default_rng(0).normal(0, deviation, (2, 300, 250)) * [[[1]], [[3]]]
    image = np.moveaxis((offset + noise).astype(dtype), 0, 2)
    wide = image.astype(np.float64)
    expected = (wide - wide.mean((0, 1))) / wide.std((0, 1))
    out = np.full((300, 250, 2), np.nan, np.float32)
    assert z_score(image, out, overwrite) is out
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(out.mean((0, 1), dtype=np.float64), 0, atol=2e-6)


def test_a_nearly_constant_channel_is_only_centred():
    image = np.full((4, 4, 1), 7.0, np.float32)
    image[0, 0] = 8
    np.testing.assert_allclose(z_score(image), image - image.mean(), atol=1e-6)


@pytest.mark.parametrize("deviation, expected", [(0.9, 0.9), (1.1, 1.0)])
def test_a_deviation_of_1_is_where_scaling_begins(deviation, expected):
    image = np.resize(np.array([5 - deviation, 5 + deviation], np.float32), (4, 4, 1))
    assert z_score(image).std() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- the stream


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


def test_without_augmentation_a_batch_is_the_normalised_records(databases):
    with ImageReader(databases[1], shuffle=False, batch_size=2) as reader, Database(databases[1]) as database:
        batch = take(reader, 2)[1]
        for index in range(2):
            image, mask = database.read(2 + index)
            np.testing.assert_array_equal(batch.images[index], z_score(image))
            np.testing.assert_array_equal(batch.masks[index], mask)
    assert batch.images.dtype == np.float32 and batch.masks.dtype == np.uint8


def test_a_shuffled_pass_holds_each_image_once_in_another_order_each_time(databases):
    with ImageReader(databases[0], batch_size=4) as reader:
        count = reader.get_image_count()
        images = np.concatenate([batch.images for batch in take(reader, 2 * count // 4)]).reshape(2, count, -1)
    first, second = (np.unique(one_pass, axis=0) for one_pass in images)
    assert len(first) == count
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(images[0], images[1])


def test_processes_share_each_global_batch_and_a_resumed_stream_goes_on_where_it_was():
    def steps(processes, replicas, batch_size, first_sample=0):
        """Samples of each of three steps, of all processes and replicas in turn."""
        streams = [
            imagereader.Stream(0, True, False, 100, batch_size, replicas, process, processes, first_sample)
            for process in range(processes)
        ]
        return [
            [s for stream in streams for r in range(replicas) for s in stream.samples(step * replicas + r)]
            for step in range(3)
        ]

    alone = steps(1, 1, 12)
    assert alone == [list(range(0, 12)), list(range(12, 24)), list(range(24, 36))]
    assert steps(2, 3, 2) == steps(3, 1, 4) == steps(1, 2, 6) == alone
    assert steps(2, 3, 2, first_sample=12)[:2] == alone[1:]


@pytest.mark.parametrize("batch_size, workers, replicas", [(2, 1, 1), (4, 3, 1), (2, 2, 2), (7, 1, 1)])
def test_each_test_pass_holds_each_image_exactly_once(databases, batch_size, workers, replicas):
    options = {"shuffle": False, "batch_size": batch_size, "num_workers": workers, "replicas": replicas}
    with ImageReader(databases[1], **options) as reader, Database(databases[1]) as database:
        count = reader.get_image_count()
        assert count == 5  # neither of 2, 4, 7
        for _ in range(3):
            batches = take(reader, reader.get_pass_steps() * replicas)
            seen = np.concatenate([batch.images[batch.weights > 0] for batch in batches])
            expected = np.stack([z_score(database.read(index)[0]) for index in range(count)])
            np.testing.assert_array_equal(seen, expected)


def test_balanced_classes_are_drawn_equally_often(tmp_path):
    from lmdb_utils import Record, new_databases

    with new_databases(tmp_path / "a.lmdb") as [writer]:
        for index in range(20):  # class 2 in one image of twenty, class 0 in every one
            mask = np.zeros((16, 16), np.uint8)
            mask[0, 0] = 2 if index == 7 else 0
            writer.append(Record.encode(np.full((16, 16, 1), index, np.uint8), mask), f"{index}.tif")
        writer.finish({})
    options = {"number_classes": 3, "batch_size": 50}
    shares = []
    for balance in (True, False):
        with ImageReader(tmp_path / "a.lmdb", balance_classes=balance, **options) as reader:
            masks = np.concatenate([batch.masks for batch in take(reader, 8)])
        shares.append((masks == 2).any((1, 2)).mean())
    assert shares[0] == pytest.approx(0.5 + 0.5 / 20, abs=0.1)
    assert shares[1] == pytest.approx(1 / 20)


def test_a_class_beyond_the_network_is_refused_with_file_and_option(tmp_path):
    train, _ = build(tmp_path, count=3, classes=4)
    with pytest.raises(InputError, match=r"found 2 in .*cell.*; set --number_classes 4$"):
        ImageReader(train, number_classes=2)


def test_the_tensorflow_dataset_holds_the_batches_of_the_generator(databases):
    with ImageReader(databases[0], use_augmentation=True, batch_size=3, num_workers=2) as reader:
        expected = take(reader, 6)
    with ImageReader(databases[0], use_augmentation=True, batch_size=3, num_workers=2) as reader:
        got = list(itertools.islice(reader.get_tf_dataset().as_numpy_iterator(), 6))
    assert_same(got, expected)


def checksum(batch):
    """Depends on every bit of a batch and where it stands."""
    parts = (np.asarray(part).view(np.int32 if part.dtype == np.float32 else part.dtype) for part in batch)
    return sum(int(np.sum(part.ravel().astype(np.int64) * np.arange(1, 2 * part.size, 2))) for part in parts)


def tensorflow_checksum(*batch):
    """The same, computed where TensorFlow reads the batch."""
    import tensorflow as tf

    total = tf.constant(0, tf.int64)
    for part in batch:
        words = tf.reshape(tf.bitcast(part, tf.int32) if part.dtype == tf.float32 else part, [-1])
        total += tf.reduce_sum(tf.cast(words, tf.int64) * tf.range(1, 2 * tf.size(words, tf.int64), 2))
    return total, batch[0]


def test_no_batch_changes_while_tensorflow_or_its_user_holds_it(databases):
    """Thousands of batches to a fast consumer and to a slow one, which keeps some of them for a while."""
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
    """Whether batches are copied even if they are as TensorFlow needs them: 2.18 does that, with numpy 2."""
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
        blocks, take_block = [], reader._recycler.take

        def take_and_note():
            block = take_block()
            blocks.append(block.ctypes.data)
            return block

        monkeypatch.setattr(reader._recycler, "take", take_and_note)
        batches = iter(reader.get_tf_dataset())
        for _ in range(100):
            assert np.asarray(memoryview(next(batches)[0])).ctypes.data in blocks
    assert len(set(blocks)) < 20  # and its memory serves again


def test_memory_is_not_recycled_while_a_view_of_a_view_lives():
    recycler = MemoryRecycler(1000)
    layout = RingLayout(1, 1, 1, (4, 4, 1), "uint8")
    view = layout.batch(recycler.take(), 0).masks[0][1:, 1:].T
    address = view.ctypes.data
    others = [recycler.take() for _ in range(3)]
    assert all(not other.ctypes.data <= address < other.ctypes.data + 1000 for other in others)
    del view
    again = recycler.take()
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
        while "exit code -9" not in caplog.text and time.monotonic() < deadline:  # nobody asks for a batch meanwhile
            time.sleep(0.05)
        assert "train reader worker 1" in caplog.text and "killed by SIGKILL, exit code -9" in caplog.text
        with pytest.raises(ReaderError, match="exit code -9"):
            take(reader, 1000)
    assert not workers_of(os.getpid())


def test_an_exception_in_a_worker_arrives_with_the_record_and_its_traceback(databases, tmp_path):
    damaged = tmp_path / "damaged.lmdb"
    content = databases[1].read_bytes()
    damaged.write_bytes(content.replace(b"SSEG\x01", b"SSEX\x01"))
    with ImageReader(damaged, shuffle=False) as reader, pytest.raises(ReaderError) as error:
        take(reader, 1)
    assert "record 0 (cell" in str(error.value) and "not of this suite's format" in str(error.value)
    assert "Traceback" in str(error.value) and "decode_record" in str(error.value)


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from imagereader import ImageReader
if __name__ == "__main__":
    reader = ImageReader({database!r}, num_workers=2)
    reader.startup()
    next(reader.generator())
    print(reader._memory.name, flush=True)
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
            name = process.stdout.readline().strip()
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if ending == "killed":
            assert len(children) >= 2 and os.path.exists(f"/dev/shm/{name}")
            process.kill()
        elif ending == "interrupted":
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to the whole group
        process.wait(30)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5  # where the main process was killed, others clear up
    while os.path.exists(f"/dev/shm/{name}"):
        assert name and time.monotonic() < deadline
        time.sleep(0.1)


def allocate_shared_memory_with(name, step, script):
    """Run a script that allocates shared memory "psm_NAME" and defines what becomes of a step of that, `instead`."""
    lines = f"import mmap, os, secrets, sys; sys.path.insert(0, {str(ROOT)!r}); import imagereader\n{script}\n"
    lines += f"secrets.token_hex, {step} = lambda _: {name!r}, instead\n"
    lines += "try: imagereader.allocate_shared_memory(5000)\nexcept OSError as error: print(error)"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)  # waits for the tracker too


@pytest.mark.parametrize("step", ["os.posix_fallocate", "mmap.mmap"])
def test_a_process_that_is_killed_while_it_makes_shared_memory_leaves_none(step):
    path = f"/dev/shm/psm_{os.getpid()}"
    script = f"def instead(*_): print(os.path.exists({path!r}), flush=True); os.kill(os.getpid(), 9)"
    done = allocate_shared_memory_with(str(os.getpid()), step, script)
    assert (done.stdout, done.returncode) == ("True\n", -9), done.stderr
    assert not os.path.exists(path)


@pytest.mark.parametrize("step", ["os.posix_fallocate", "mmap.mmap", "imagereader.shared_memory._posixshmem.shm_open"])
def test_shared_memory_that_cannot_be_had_leaves_no_file_and_no_complaint(step):
    script = "def instead(*_, **options): raise OSError(12, 'no memory')"
    done = allocate_shared_memory_with(str(os.getpid()), step, script)
    assert (done.stdout, done.stderr, done.returncode) == ("[Errno 12] no memory\n", "", 0)
    assert not os.path.exists(f"/dev/shm/psm_{os.getpid()}")


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
    reader._report_starvation()  # nothing taken yet: the queue has had no chance to fill
    reader._taken = slots
    for _ in range(6):
        reader._report_starvation()
    messages = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert messages == ["Input Queue Starvation !!!!", "Input Queue Starvation Over"] * 2


def run_with_shared_memory(size, script, tmp_path, **values):
    """Run a script in a mount namespace of its own, where /dev/shm has a given size; return what it prints."""
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
    """Without the first check the reservation answers."""
    printed = run_with_shared_memory(
        "1m", TOO_LITTLE_SHARED_MEMORY, tmp_path, database=str(databases[0]), lie=not asked_beforehand
    )
    assert re.search(r"need 1\d\d MiB of shared memory, /dev/shm has [01] MiB free; lower --batch_size", printed)


TOO_LITTLE_SHARED_MEMORY = """
import os, sys
sys.path.insert(0, {root!r})
import imagereader
if __name__ == "__main__":
    reader = imagereader.ImageReader({database!r}, batch_size=3000)
    if {lie}:
        asked = imagereader.free_shared_memory
        answers = iter([1e12])
        imagereader.free_shared_memory = lambda: next(answers, None) or asked()
    try:
        reader.startup()
    except imagereader.InputError as error:
        print(error)
    assert not os.listdir("/dev/shm")
"""


def test_a_small_shared_memory_makes_a_shorter_queue_for_both_readers(databases, tmp_path):
    """The 64 MB that a container gets unless told otherwise."""
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
