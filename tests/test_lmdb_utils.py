import mmap
import os
import re
import struct
from pathlib import Path

import lmdb
import numpy as np
import pytest
from conftest import record_of

import lmdb_utils
from cli import InputError
from lmdb_utils import Database, DatabaseWriter, decode_record, encode_record, new_databases


def write_small(path, count=3):
    with new_databases(path) as [writer]:
        for index in range(count):
            image, mask = np.full((2, 3, 1), index, np.uint16), np.full((2, 3), index % 200, np.uint8)
            writer.append(record_of(image, mask), f"{index}.tif")
        writer.finish({"side": "train"})


@pytest.mark.parametrize("image_dtype", lmdb_utils.IMAGE_DTYPES)
@pytest.mark.parametrize("mask_dtype", lmdb_utils.MASK_DTYPES)
def test_a_record_comes_back_as_it_went_in(image_dtype, mask_dtype):
    image = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(image_dtype)
    mask = np.arange(6).reshape(2, 3).astype(mask_dtype)
    mean, deviation = np.linspace(-1e9, 1 / 3, 5), np.linspace(0, np.pi, 5)
    stored = decode_record(encode_record(image, mask, mean, deviation))
    for got, expected in zip(stored, (image, mask, mean, deviation)):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype and not got.flags.owndata and not got.flags.writeable


@pytest.mark.parametrize("number", [1e39, -1e39, np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_a_record_with_statistics_that_no_image_has_is_refused(position, number):
    statistics = [0.0, 1.0]
    statistics[position] = number
    image, mask = np.zeros((4, 4, 1), np.float32), np.zeros((4, 4), np.uint8)
    with pytest.raises(InputError, match="mean or deviation"):
        decode_record(encode_record(image, mask, statistics[:1], statistics[1:]))


def test_numbers_are_little_endian_in_the_file_whatever_they_were_before():
    image, mask = np.array([[[1], [256]]], ">u2"), np.array([[3, 70_000]], ">i4")
    value = encode_record(image, mask, [-2.0], [0.5])
    assert value[8:16] == b"<u2\0<i4\0"
    assert value[32:48] == b"\0\0\0\0\0\0\0\xc0" + b"\0\0\0\0\0\0\xe0\x3f"
    assert value[48:56] == np.array(np.inf, "<f8").tobytes()  # all pixels have data
    assert value[56:] == b"\1\0\0\1" + b"\3\0\0\0\x70\x11\1\0"
    np.testing.assert_array_equal(decode_record(value)[0], image)
    np.testing.assert_array_equal(decode_record(value)[1], mask)


@pytest.mark.parametrize(
    "value",
    [b"", b"short", b"x" * 200, encode_record(np.zeros((4, 4, 1), "u1"), np.zeros((4, 4), "u1"), [0], [1])[:-1]],
)
def test_bytes_that_are_not_a_complete_record_are_refused(value):
    with pytest.raises(InputError):
        decode_record(value)


def test_metadata_has_the_classes_and_their_records(tmp_path):
    masks = [[[0, 0], [0, 5]], [[0, 0], [0, 0]], [[5, 5], [2, 2]]]
    with new_databases(tmp_path / "a.lmdb") as [writer]:
        for index, mask in enumerate(masks):
            record = record_of(np.zeros((2, 2, 1), np.uint8), np.array(mask, np.int32), row=7, column=index)
            writer.append(record, f"{index}.tif")
        writer.finish({"seed": 3})
    with Database(tmp_path / "a.lmdb") as database:
        metadata = database.metadata
    assert metadata.classes.tolist() == [0, 2, 5]
    assert metadata.pixel_counts.tolist() == [7, 2, 3]
    assert [metadata.records_of_class(position).tolist() for position in range(3)] == [[0, 1], [2], [0, 2]]
    assert metadata.info["seed"] == 3 and metadata.count == 3 and metadata.image_shape == (2, 2, 1)
    assert metadata.describe_record(2) == "record 2 (2.tif, row 7, column 2)"


def test_the_map_grows_until_the_records_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_utils, "COMMIT_BYTES", 100_000)
    writer = DatabaseWriter(tmp_path / "a.lmdb", initial_map_bytes=64 * 1024)
    images = [np.random.default_rng(index).integers(0, 255, (100, 100, 3)).astype(np.uint8) for index in range(20)]
    for index, image in enumerate(images):
        writer.append(record_of(image, np.zeros((100, 100), np.uint8)), f"{index}.tif")
    writer.finish({})
    with Database(tmp_path / "a.lmdb") as database:
        assert len(database) == 20
        for index, image in enumerate(images):
            np.testing.assert_array_equal(database.read(index)[0], image)


def test_a_failed_build_leaves_the_old_database_and_nothing_else(tmp_path):
    write_small(tmp_path / "a.lmdb")
    with pytest.raises(KeyboardInterrupt), new_databases(tmp_path / "a.lmdb") as [writer]:
        writer.append(record_of(np.zeros((2, 3, 1), np.uint16), np.zeros((2, 3), np.uint8)), "x.tif")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.lmdb"]
    with Database(tmp_path / "a.lmdb") as database:
        assert database.read(2)[0][0, 0, 0] == 2


def test_a_database_on_a_full_disk_is_reported_and_removed(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {full} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(InputError, match="cannot write a database"), new_databases(full / "a.lmdb") as [writer]:
            for index in range(40):
                record = record_of(np.zeros((300, 300, 1), np.uint8), np.zeros((300, 300), np.uint8))
                writer.append(record, f"{index}.tif")
            writer.finish({})
        assert os.listdir(full) == []
    finally:
        os.system(f"umount {full}")


@pytest.mark.parametrize("version", [1, 99])
def test_a_database_of_another_version_is_refused_by_name(tmp_path, version, monkeypatch):
    monkeypatch.setattr(lmdb_utils, "FORMAT_VERSION", version)
    write_small(tmp_path / "a.lmdb")
    monkeypatch.undo()
    with pytest.raises(InputError, match=rf"a\.lmdb .*expected version 2 .*found version {version}.*; build it again"):
        Database(tmp_path / "a.lmdb")


@pytest.mark.parametrize("damage", ["missing", "text", "truncated", "folder"])
def test_a_file_that_is_not_a_complete_database_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "a.lmdb"
    write_small(path, count=2000)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no database " * 1000)
    elif damage == "truncated":
        os.truncate(path, os.path.getsize(path) // 2)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    with pytest.raises((InputError, FileNotFoundError), match="a.lmdb"):
        Database(path)


def test_a_database_of_another_program_is_refused(tmp_path):
    with lmdb.open(str(tmp_path / "a.lmdb"), subdir=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    with pytest.raises(InputError, match="a.lmdb is an LMDB database, but not one made by build_lmdb.py"):
        Database(tmp_path / "a.lmdb")


def test_a_file_of_another_version_of_lmdb_is_refused_as_such(tmp_path):
    write_small(tmp_path / "a.lmdb")
    content = bytearray((tmp_path / "a.lmdb").read_bytes())
    magic, size = struct.pack("<I", 0xBEEFC0DE), mmap.PAGESIZE
    for page in (0, size):  # both meta pages have the version after the magic number
        struct.pack_into("<I", content, content.index(magic, page, page + size) + len(magic), 2)
    (tmp_path / "a.lmdb").write_bytes(content)
    with pytest.raises(InputError, match="a.lmdb: .*; another version of LMDB wrote it, so build it again"):
        Database(tmp_path / "a.lmdb")


def test_a_folder_is_not_replaced_by_a_database(tmp_path):
    (tmp_path / "a.lmdb").mkdir()
    with pytest.raises(InputError, match="a.lmdb is a folder, but a database file must be written there"):
        write_small(tmp_path / "a.lmdb")


@pytest.mark.parametrize(
    ("image", "mask", "channels"),
    [
        (np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8), 1),
        (np.zeros((2, 3, 1), np.uint8), np.zeros((3, 2), np.uint8), 1),
        (np.zeros((2, 3, 1), np.float64), np.zeros((2, 3), np.uint8), 1),
        (np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3), np.float32), 1),
        (np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3), np.uint8), 2),
    ],
)
def test_a_record_that_cannot_be_stored_is_refused(image, mask, channels):
    with pytest.raises(ValueError, match=r"expected image|expected mean|cannot store"):
        encode_record(image, mask, np.zeros(channels), np.ones(channels))


def test_all_records_of_a_database_are_alike(tmp_path):
    with (
        pytest.raises(ValueError, match="different shape or type from b.tif"),
        new_databases(tmp_path / "a.lmdb") as [writer],
    ):
        writer.append(record_of(np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3), np.uint8)), "a.tif")
        writer.append(record_of(np.zeros((2, 4, 1), np.uint8), np.zeros((2, 4), np.uint8)), "b.tif")


@pytest.mark.parametrize("most", [2, 9, 300, 70_000])
@pytest.mark.parametrize("least", [0, -3])
def test_pixels_are_counted_whatever_the_class_ids(least, most):
    mask = np.random.default_rng(0).integers(least, most, (40, 50), dtype=np.int32)
    counts = record_of(np.zeros((40, 50, 1), np.uint8), mask).class_counts
    assert counts == {int(value): int((mask == value).sum()) for value in np.unique(mask)}


def test_keys_sort_in_the_order_of_insertion():
    keys = [lmdb_utils.record_key(index) for index in (0, 9, 10, 99, 10**6, 10**9)] + [lmdb_utils.METADATA_KEY]
    assert keys == sorted(keys)


def test_databases_are_on_the_disk_before_they_take_their_names(tmp_path, disk_log):
    targets = [tmp_path / "train.lmdb", tmp_path / "test.lmdb"]
    with new_databases(*targets) as writers:
        for writer in writers:
            writer.append(record_of(np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3), np.uint8)), "a.tif")
            writer.finish({})
    assert [kind for kind, _ in disk_log] == ["flush", "flush", "rename", "rename", "flush"]
    assert [path.name.partition(".")[2].partition(".")[0] for _, path in disk_log[:2]] == ["train", "test"]
    assert [path for _, path in disk_log[2:]] == [*targets, tmp_path]


def test_the_system_does_not_read_ahead_in_a_database(tmp_path):
    write_small(tmp_path / "a.lmdb")
    with Database(tmp_path / "a.lmdb"):
        maps = Path("/proc/self/smaps").read_text()
    flags = re.findall(rf"{tmp_path}/a.lmdb\n(?:\w+:.*\n)*?VmFlags:(.*)", maps)
    if not flags:
        pytest.skip("this system does not tell how memory is mapped")
    assert [" rr " in each for each in flags] == [True]
