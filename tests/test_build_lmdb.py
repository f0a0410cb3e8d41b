import itertools
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import skimage.io
import tifffile
from conftest import ROOT, STORED, build, make_pair, run_script, write_folders, write_stored, write_tiff

import build_lmdb
from lmdb_utils import Database

SEED_OPTIONS = """--image_folder IMAGE_FOLDER --mask_folder MASK_FOLDER --output_folder OUTPUT_FOLDER
    --dataset_name DATASET_NAME --train_fraction TRAIN_FRACTION --image_format IMAGE_FORMAT --use_tiling USE_TILING
    --tile_size TILE_SIZE"""


def start(folder, *arguments):
    return run_script(
        "build_lmdb.py", "--image_folder", folder / "images", "--mask_folder", folder / "masks", "--output_folder",
        folder / "db", "--dataset_name", "t", *arguments,
    )  # fmt: skip


def refused(folder, *words, arguments=()):
    """Assert that the build exits with code 2, reports all words in errors and writes nothing; return its output."""
    done = start(folder, *arguments)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    errors = "\n".join(line for line in done.stdout.splitlines() if re.search(r"\bERROR\b|\berror:", line))
    for word in words:
        assert word in errors, done.stdout
    assert not (folder / "db").exists() or os.listdir(folder / "db") == []
    return done.stdout


def test_help_shows_every_option_of_the_specification():
    done = run_script("build_lmdb.py", "-h")
    text = re.sub(r"\s+", " ", done.stdout)
    assert done.returncode == 0 and text.startswith("usage: build_lmdb [-h]")
    for option in re.findall(r"--\w+ \w+", SEED_OPTIONS):
        assert f"[{option}]" in text


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_records_are_the_pixels_of_the_files(tmp_path, dtype, channels):
    paths = build(tmp_path, count=3, shape=(32, 48, channels), dtype=dtype)
    found = {}
    for path in paths:
        with Database(path) as database:
            for index in range(len(database)):
                image, mask = database.read(index)
                found[database.metadata.names[database.metadata.record_image[index]]] = image.copy(), mask.copy()
    assert sorted(found) == ["cell0.tif", "cell1.tif", "cell2.tif"]
    for index in range(3):
        image, mask = make_pair(index, (32, 48, channels), dtype)
        np.testing.assert_array_equal(found[f"cell{index}.tif"][0], image)
        np.testing.assert_array_equal(found[f"cell{index}.tif"][1], mask)
        assert found[f"cell{index}.tif"][0].dtype == dtype


def test_counts_of_images_and_pixels_are_printed(tmp_path):
    write_folders(tmp_path, count=5)
    output = start(tmp_path).stdout
    assert "train-t.lmdb: 4 images, 4 records of 64 x 64 x 1 uint16" in output
    assert "test-t.lmdb: 1 image, 1 record" in output
    assert "class 0: 8192 pixels (50.00 %), in 4 records" in output
    assert "class 1: 2048 pixels (50.00 %), in 1 record" in output


def test_one_seed_builds_the_same_bytes_and_another_splits_differently(tmp_path):
    contents = []
    for index, seed in enumerate((1, 1, 2)):
        contents.append([path.read_bytes() for path in build(tmp_path / str(index), "--seed", seed, count=8)])
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_the_split_is_by_image_and_leaves_one_on_each_side(tmp_path):
    for fraction, expected in (("0.99", 3), ("0.01", 1), ("0.5", 2)):
        folder = tmp_path / fraction
        train, test = build(folder, "--train_fraction", fraction, "--use_tiling", 1, "--tile_size", 112, count=4,
                            shape=(128, 128, 1))  # fmt: skip
        with Database(train) as one:
            names = set(one.metadata.names)
        with Database(test) as other:
            assert len(names) == expected and len(other.metadata.names) == 4 - expected
            assert not names & set(other.metadata.names)


def test_tiles_cover_every_pixel_and_overlap_by_the_radius(tmp_path):
    shape = (150, 331, 2)
    train, _ = build(tmp_path, "--use_tiling", 1, "--tile_size", 128, count=2, shape=shape)
    seen = np.zeros(shape[:2], int)
    with Database(train) as database:
        metadata = database.metadata
        image, mask = make_pair(int(metadata.names[0][4]), shape)
        for index in range(len(database)):
            row, column = metadata.record_row[index], metadata.record_column[index]
            tile, tile_mask = database.read(index)
            assert tile.shape == (128, 128, 2)
            np.testing.assert_array_equal(tile, image[row : row + 128, column : column + 128])
            np.testing.assert_array_equal(tile_mask, mask[row : row + 128, column : column + 128])
            seen[row : row + 128, column : column + 128] += 1
        columns = np.unique(metadata.record_column)
    assert seen.min() >= 1
    assert np.diff(columns).max() == 128 - build_lmdb.RADIUS and columns[-1] == 331 - 128


@pytest.mark.parametrize("shape", [(128, 128, 1), (129, 200, 1), (300, 417, 1), (100, 300, 1)])
def test_tiles_for_testing_count_each_pixel_of_an_image_once(shape, tmp_path):
    _, test = build(tmp_path, "--use_tiling", 1, "--tile_size", 128, count=2, shape=shape)
    with Database(test) as database:
        metadata = database.metadata
        mask = tifffile.imread(tmp_path / "masks" / metadata.names[0])
        counts = np.zeros(mask.shape, int)
        for index in range(len(database)):
            row, column = metadata.record_row[index], metadata.record_column[index]
            _, tile = database.read(index)
            rows, columns = np.nonzero(tile != metadata.ignored_id)
            np.testing.assert_array_equal(tile[rows, columns], mask[row + rows, column + columns])
            np.add.at(counts, (row + rows, column + columns), 1)
            if 0 < row < shape[0] - 128:  # each pixel has at least half an overlap of context
                assert min(rows) >= 48 and max(rows) < 80
    assert (counts == 1).all()


def test_tiles_have_no_class_that_marks_ignored_pixels(tmp_path):
    write_folders(tmp_path, count=4, shape=(150, 150, 1))
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, np.where(tifffile.imread(path) > 0, 255, 0).astype(np.uint8))
    done = start(tmp_path, "--use_tiling", 1, "--tile_size", 128)
    assert done.returncode == 2 and "--label_map 0:0,255:1 to map" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout and not list((tmp_path / "db").glob("*.lmdb"))
    done = start(tmp_path, "--use_tiling", 1, "--tile_size", 128, "--label_map", "0:0,255:1")
    assert done.returncode == 0, done.stdout


def test_an_image_smaller_than_a_tile_is_padded_by_reflection(tmp_path):
    train, _ = build(tmp_path, "--use_tiling", 1, "--tile_size", 112, count=2, shape=(40, 112, 1))
    with Database(train) as database:
        image, mask = make_pair(int(database.metadata.names[0][4]), (40, 112, 1))
        got = database.read(0)  # views, valid only while the database is open
        np.testing.assert_array_equal(got[0], np.pad(image, [(0, 72), (0, 0), (0, 0)], mode="reflect"))
        np.testing.assert_array_equal(got[1], np.pad(mask, [(0, 72), (0, 0)], mode="reflect"))


def test_without_tiling_images_are_cropped_about_their_centre(tmp_path):
    train, _ = build(tmp_path, count=2, shape=(50, 67, 1))
    with Database(train) as database:
        image = make_pair(int(database.metadata.names[0][4]), (50, 67, 1))[0]
        np.testing.assert_array_equal(database.read(0)[0], image[1:49, 1:65])


def test_png_and_jpg_images_with_png_masks(tmp_path):
    for suffix in ("png", "jpg"):
        folder = tmp_path / suffix
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True)
        for index in range(2):
            image, mask = make_pair(index, (32, 32, 3), "uint8")
            skimage.io.imsave(folder / "images" / f"a{index}.{suffix}", image)
            skimage.io.imsave(folder / "masks" / f"a{index}.png", mask, check_contrast=False)
        done = start(folder, "--image_format", suffix)
        assert done.returncode == 0, done.stdout
        with Database(folder / "db" / "train-t.lmdb") as database:
            assert database.metadata.image_shape == (32, 32, 3)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("--tile_size", "500"), "try 496 or 512 (-h lists all options)"),
        (("--tile_size", "96"), "above 96"),
        (("--train_fraction", "1"), "between 0 and 1"),
        (("--train_fraction", "most"), "such as 0.8, got 'most'"),
        (("--split_by", "("), "expected a regular expression, got '('"),
        (("--channels", "0,0"), "expected different channels counted from 0, such as 0,1,2, got '0,0'"),
        (("--channels", "red"), "got 'red'"),
        (("--label_map", "255"), "expected VALUE:CLASS, FIRST-LAST:CLASS or VALUE:ignore, got '255'"),
        (("--label_map", "0:0,9-5:1"), "expected an ascending range"),
        (("--label_map", "0-5:0,5:1"), "expected each value once, got 5 twice"),
        (("--train_fraction", "80"), "between 0 and 1"),
        (("--train_fraction", "nan"), "between 0 and 1"),
        (("--image_format", "gif"), "gif"),
        (("--seed", "-1"), "-1"),
        (("--image_folder", "nowhere"), "there is no folder nowhere"),
        (("--dataset_name", "a/b"), "a/b"),
        (("--mask_format", "jpeg"), "expected tif or png, got 'jpeg'"),
        (("--use_tilling", "1"), "did you mean --use_tiling?"),
        (("--train_fracton=0.5",), "did you mean --train_fraction?"),
        (("--image_folder", str(ROOT)), "and the folders "),
        (("--describe", str(ROOT)), "is a folder"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(tmp_path, arguments, word):
    write_folders(tmp_path, count=2)
    output = refused(tmp_path, word, arguments=arguments)
    assert len([line for line in output.splitlines() if " INFO " not in line]) == 1, output


@pytest.mark.parametrize("text", ["TIF", ".tif", "tiff"])
def test_an_extension_may_be_written_in_other_ways(tmp_path, text):
    write_folders(tmp_path, count=2)
    assert start(tmp_path, "--image_format", text, "--mask_format", text).returncode == 0


def test_images_given_as_masks_are_noticed(tmp_path):
    write_folders(tmp_path, count=3)
    done = run_script("build_lmdb.py", "--image_folder", tmp_path / "masks", "--mask_folder", tmp_path / "images",
                      "--output_folder", tmp_path / "db")  # fmt: skip
    assert done.stdout.count("are --image_folder and --mask_folder swapped?") == 1, done.stdout
    assert "--label_map" not in done.stdout


def test_masks_of_different_integer_types_are_stored_in_one_that_fits_all(tmp_path):
    write_folders(tmp_path, count=4)
    masks = [
        np.full((64, 64), value, dtype) for value, dtype in ((1, "uint8"), (300, "uint16"), (2, "uint8"), (3, "int32"))
    ]
    for index, mask in enumerate(masks):
        tifffile.imwrite(tmp_path / "masks" / f"cell{index}.tif", mask)
    assert start(tmp_path).returncode == 0
    for side in ("train", "test"):
        with Database(tmp_path / "db" / f"{side}-t.lmdb") as database:
            for index, name in enumerate(database.metadata.names):
                np.testing.assert_array_equal(database.read(index)[1], masks[int(name[4])])


def test_an_image_without_mask_and_a_mask_without_image_are_named(tmp_path):
    _, masks = write_folders(tmp_path, count=3)
    (masks / "cell1.tif").rename(masks / "cell1_mask.tif")
    output = refused(tmp_path, "images without a mask (1)", "cell1.tif", "masks without an image (1)", "--skip_bad 1")
    assert "try --mask_suffix _mask" in output
    (tmp_path / "images" / "cell1.tif").unlink()
    output = refused(tmp_path, "masks without an image (1)", "cell1_mask.tif")
    assert "images without" not in output


def test_two_files_of_one_stem_are_refused(tmp_path):
    images, _ = write_folders(tmp_path, count=2)
    (images / "cell0.tiff").write_bytes((images / "cell0.tif").read_bytes())
    output = refused(tmp_path, "files that share a name (2)", "cell0.tif: there is also cell0.tiff")
    assert "without" not in output


def bad_mask(array, **options):
    return lambda folder: tifffile.imwrite(folder / "masks" / "cell0.tif", array, **options)


def bad_image(array, **options):
    return lambda folder: tifffile.imwrite(folder / "images" / "cell0.tif", array, **options)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (bad_mask(np.zeros((64, 64, 3), np.uint8)), ("single-channel mask", "masks/cell0.tif", "3 channels")),
        (bad_mask(np.zeros((64, 64), np.float32)), ("masks/cell0.tif", "float32", "whole numbers")),
        (bad_mask(np.zeros((64, 64), np.uint32)), ("masks/cell0.tif", "uint32", "--label_map")),
        (bad_mask(np.zeros((64, 64), np.uint8), compression="jpeg"), ("masks/cell0.tif", "JPEG")),
        (bad_mask(np.full((64, 64), -1, np.int32)), ("masks with negative", "masks/cell0.tif", "--label_map=-1:0,0:0")),
        (bad_mask(np.zeros((64, 60), np.uint8)), ("differ in size", "64 x 64", "64 x 60", "cell0.tif")),
        (bad_image(np.zeros((64, 64), np.float64)), ("images/cell0.tif", "float64", "to float32")),
        (bad_image(np.zeros((64, 64), np.uint32)), ("images/cell0.tif", "uint32", "to int32")),
        (bad_image(np.zeros((64, 64), np.complex64)), ("images/cell0.tif", "complex64")),
        (
            bad_image(np.zeros((64, 64), np.uint8)),
            ("differ in type", "images/cell0.tif", "1 channel of uint8", "(2 of 3)"),
        ),
        (bad_image(np.zeros((64, 64, 3), np.uint16)), ("differ in type", "3 channels", "1 channel of uint16")),
        (bad_image(np.zeros((5, 64, 64), np.uint16), metadata={"axes": "ZYX"}), ("images/cell0.tif", "axes ZYX")),
        (bad_image(np.zeros((5, 64, 64), np.uint16), imagej=True, metadata={"axes": "TYX"}), ("cell0.tif", "axes TYX")),
        (lambda folder: (folder / "images" / "cell0.tif").write_bytes(b""), ("cannot read", "images/cell0.tif")),
        (lambda folder: (folder / "masks" / "cell0.tif").write_bytes(b""), ("cannot read", "masks/cell0.tif")),
        (lambda folder: os.truncate(folder / "images" / "cell0.tif", 1000), ("images/cell0.tif",)),
        (lambda folder: (folder / "images" / "cell0.tif").write_text("text"), ("cannot read", "images/cell0.tif")),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, spoil, words):
    write_folders(tmp_path, count=3)
    spoil(tmp_path)
    refused(tmp_path, *words)


def test_mixed_sizes_are_refused_without_tiling_and_built_with_it(tmp_path):
    write_folders(tmp_path, count=3, shape=(144, 128, 1))
    image, mask = make_pair(9, (128, 160, 1))
    tifffile.imwrite(tmp_path / "images" / "cell0.tif", image[..., 0])
    tifffile.imwrite(tmp_path / "masks" / "cell0.tif", mask)
    refused(tmp_path, "images that differ in size from most (1)", "128 x 160", "--use_tiling 1")
    assert start(tmp_path, "--use_tiling", 1, "--tile_size", 128).returncode == 0


def test_one_image_is_too_few_and_one_of_fifteen_pixels_too_small(tmp_path):
    write_folders(tmp_path / "one", count=1)
    refused(tmp_path / "one", "at least 2 images")
    write_folders(tmp_path / "small", count=2, shape=(15, 64, 1))
    refused(tmp_path / "small", "at least 16 x 16", "15 x 64")


def test_an_empty_folder_is_refused_with_the_types_found(tmp_path):
    write_folders(tmp_path, count=2)
    refused(tmp_path, "expected png images", ".tif", arguments=("--image_format", "png"))


def test_masks_of_0_and_255_get_a_hint(tmp_path):
    write_folders(tmp_path, count=2)
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, tifffile.imread(path) * 255)
    output = start(tmp_path).stdout
    assert "--number_classes 256" in output and "--label_map 0:0,255:1" in output
    for side in "train", "test":
        with Database(tmp_path / "db" / f"{side}-t.lmdb") as database:
            assert database.metadata.classes.tolist() == [0, 255]


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    write_folders(tmp_path, count=2)
    (tmp_path / "file").write_text("")
    done = start(tmp_path, "--output_folder", tmp_path / "file" / "db")
    assert done.returncode == 2 and "cannot write a database" in done.stdout and "Traceback" not in done.stdout


def masks_of(database):
    """Return the masks of a database by the name of their image."""
    metadata = database.metadata
    return {
        metadata.names[metadata.record_image[index]]: database.read(index)[1].copy() for index in range(len(database))
    }


def test_all_problems_are_reported_at_once_with_counts_and_some_names(tmp_path):
    images, masks = write_folders(tmp_path, count=12)
    for index in range(5):
        tifffile.imwrite(masks / f"cell{index}.tif", np.zeros((64, 60), np.uint8))
    (masks / "cell5.tif").unlink()
    (images / "cell6.tif").write_bytes(b"II*\0")
    tifffile.imwrite(images / "cell7.tif", np.zeros((64, 64), np.float64))
    output = refused(
        tmp_path, "masks that differ in size from their images (5):", "cell0.tif is", "cell2.tif is", "and 2 more",
        "images without a mask (1);", "files that cannot be read (1):", "images that cannot be stored (1):",
        "8 files cannot be used",
    )  # fmt: skip
    assert "cell4.tif is" not in output


def test_problems_of_pixels_are_reported_at_once_too(tmp_path):
    write_folders(tmp_path, count=6, dtype="float32")
    for index, value in enumerate((1e30, np.inf, -np.inf)):
        image = make_pair(index, dtype="float32")[0]
        image[5, 7] = value
        write_tiff(tmp_path / "images" / f"cell{index}.tif", image)
    tifffile.imwrite(tmp_path / "masks" / "cell3.tif", np.full((64, 64), -7, np.int16))
    refused(
        tmp_path,
        "images with infinity or values that are too large (3):",
        "cell0.tif",
        "cell2.tif",
        "masks with negative values (1):",
        "-7:0",
    )


def test_bad_files_are_left_out_and_listed(tmp_path):
    images, masks = write_folders(tmp_path, count=9, shape=(144, 130, 1))
    (masks / "cell0.tif").unlink()
    tifffile.imwrite(masks / "cell1.tif", np.full((144, 130), -1, np.int8))
    tifffile.imwrite(masks / "cell2.tif", np.zeros((5, 5), np.uint8))
    os.truncate(images / "cell3.tif", 9000)
    write_tiff(images / "cell8.tif", make_pair(8, (144, 130, 2))[0])
    bad = {f"cell{index}.tif" for index in (0, 1, 2, 3, 8)}
    more = ["--skip_bad", 1, "--use_tiling", 1, "--tile_size", 128, "--train_fraction", 0.4]
    done = start(tmp_path, *more)
    assert done.returncode == 0 and "left out 5 files, listed in" in done.stdout, done.stdout
    listed = (tmp_path / "db" / "skipped-t.tsv").read_text().splitlines()
    assert listed[0] == "file\tproblem\tdetails"
    assert sorted(Path(line.split("\t")[0]).name for line in listed[1:]) == sorted(bad)
    names = []
    for side in "train", "test":
        with Database(tmp_path / "db" / f"{side}-t.lmdb") as database:
            names += database.metadata.names
            assert len(database) == 4 * len(database.metadata.names) and database.metadata.info["left_out"] == 5
    assert sorted(names) == [f"cell{index}.tif" for index in range(4, 8)]
    for path in list(images.iterdir()) + list(masks.iterdir()):
        if path.name in bad:
            path.unlink()
    assert start(tmp_path, *more).returncode == 0
    assert not (tmp_path / "db" / "skipped-t.tsv").exists()


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("options", [[], ["--use_tiling", 1, "--tile_size", 112]])
def test_each_record_has_the_statistics_of_its_complete_image(tmp_path, dtype, options):
    paths = build(tmp_path, *options, count=3, shape=(150, 131, 2), dtype=dtype)
    for path in paths:
        with Database(path) as database:
            for index in range(len(database)):
                name = database.metadata.names[database.metadata.record_image[index]]
                image = tifffile.imread(tmp_path / "images" / name)
                stored = database.record(index)
                np.testing.assert_allclose(stored.mean, image.mean((0, 1), np.float64), rtol=1e-12)
                np.testing.assert_allclose(stored.deviation, image.std((0, 1), np.float64), rtol=1e-12)


def test_floats_are_divided_by_at_least_a_hundredth_of_the_median_deviation_and_integers_by_1(tmp_path):
    deviations = {"a": [3.0, 0.01], "b": [5.0, 0.02], "c": [40.0, 0.03], "d": [0.0, 0.0], "e": [7.0, 0.5]}
    images, masks = write_folders(tmp_path, count=0)
    pattern = np.resize([[-1.0, 1.0]], (32, 32))[..., None]
    for name, deviation in deviations.items():
        write_tiff(images / f"{name}.tif", (pattern * deviation + 100).astype(np.float32))
        tifffile.imwrite(masks / f"{name}.tif", make_pair(0, (32, 32, 1))[1])
    train, test = build(tmp_path, count=0)
    with Database(train) as database, Database(test) as other:
        names = [Path(name).stem for name in database.metadata.names]
        used = np.array([deviations[name] for name in names if name != "d"])
        np.testing.assert_allclose(database.metadata.deviation_floor, 0.01 * np.median(used, axis=0), rtol=1e-3)
        np.testing.assert_array_equal(other.metadata.deviation_floor, database.metadata.deviation_floor)
    train, _ = build(tmp_path / "integers", shape=(64, 64, 2))
    with Database(train) as database:
        assert database.metadata.deviation_floor.tolist() == [1.0, 1.0]


def test_a_large_image_with_a_bad_end_leaves_no_tiles(tmp_path, monkeypatch):
    images, _ = write_folders(tmp_path, count=4, shape=(144, 128, 1), dtype="float32")
    image, mask = make_pair(0, (2900, 1300, 1), "float32")
    image[-1, -1] = np.inf
    tifffile.imwrite(images / "cell1.tif", image[..., 0], tile=(256, 256))
    tifffile.imwrite(tmp_path / "masks" / "cell1.tif", mask)
    done = start(tmp_path, "--skip_bad", 1, "--use_tiling", 1, "--tile_size", 128, "--train_fraction", 0.5)
    assert done.returncode == 0 and "images with infinity or values that are too large (1)" in done.stdout, done.stdout
    for side in "train", "test":
        with Database(tmp_path / "db" / f"{side}-t.lmdb") as database:
            assert len(database) == 2 * len(database.metadata.names) and "cell1.tif" not in database.metadata.names


@pytest.mark.parametrize(
    "label_map, dtype, values, expected",
    [
        ("0:0,255:1", "uint8", [0, 255], [0, 1]),
        ("0:0,1-65535:1", "uint16", [0, 1, 7, 65535], [0, 1, 1, 1]),
        ("-1:0,0-2:7,3:300", "int32", [-1, 0, 1, 3], [0, 7, 7, 300]),
        ("-5--2:1,0:0", "int8", [0, -2, -5, -3], [0, 1, 1, 1]),
        ("0:0,1-4294967295:1", "uint32", [0, 4000000000, 5, 1], [0, 1, 1, 1]),
        ("0:0,1-9:2", "int64", [0, 9, 5, 1], [0, 2, 2, 2]),
        ("0:1,1:0", "bool", [0, 1, 1, 0], [1, 0, 0, 1]),
    ],
)
def test_mask_values_become_the_classes_of_the_label_map(tmp_path, label_map, dtype, values, expected):
    write_folders(tmp_path, count=2, shape=(32, 32, 1))
    chosen = np.random.default_rng(0).integers(len(values), size=(32, 32))
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, np.array(values).astype(dtype)[chosen])
    done = start(tmp_path, f"--label_map={label_map}")
    assert done.returncode == 0, done.stdout
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        mask = database.read(0)[1]
        np.testing.assert_array_equal(mask, np.array(expected)[chosen])
        assert mask.dtype == ("uint16" if 300 in expected else "uint8")
        assert database.metadata.info["label_map"] == label_map
        assert database.metadata.classes.tolist() == sorted(set(expected))


def test_values_that_the_label_map_does_not_name_are_refused(tmp_path):
    write_folders(tmp_path, count=2)
    tifffile.imwrite(tmp_path / "masks" / "cell0.tif", np.full((64, 64), 7, np.uint8))
    refused(
        tmp_path,
        "masks with values that --label_map does not name (1):",
        "masks/cell0.tif",
        "found 7",
        arguments=["--label_map", "0:0,1:1"],
    )


@pytest.mark.parametrize(
    "values, hint",
    [
        ([0, 1, 2, 4, 8], "--label_map 0:0,1:1,2:2,4:3,8:4 to map"),
        ([3, 5], "--label_map 0:0,3:1,5:2 to map"),
        (range(40), "if they number individual objects, use --objects 1 to map"),
    ],
)
def test_unusual_classes_get_a_hint_that_fixes_them(tmp_path, values, hint):
    write_folders(tmp_path, count=2)
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, np.resize(np.array(values, np.uint8), (64, 64)))
    done = start(tmp_path)
    assert done.returncode == 0 and hint in done.stdout, done.stdout
    done = start(tmp_path, *hint[hint.index("--") :].split()[:2])
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout


def test_a_mask_with_negative_values_gets_a_hint_that_fixes_it(tmp_path):
    write_folders(tmp_path, count=2)
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, np.resize(np.array([-2, -1, 0, 3], np.int16), (64, 64)))
    option = re.search(r"(--label_map=\S+) to map", refused(tmp_path, "negative"))[1]
    assert start(tmp_path, option).returncode == 0
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        np.testing.assert_array_equal(np.unique(database.read(0)[1]), [0, 1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["palette png", "gray png", "palette tif", "gray tif"])
def test_masks_of_few_bits_and_palettes_give_their_indices(tmp_path, kind, bits):
    colours, suffix = kind.split()
    write_folders(tmp_path, count=2, shape=(32, 32, 1))
    ids = np.random.default_rng(bits).integers(2**bits, size=(32, 32)).astype(np.uint8)
    for path in list((tmp_path / "masks").iterdir()):
        path.unlink()
        path = path.with_suffix(f".{suffix}")
        if suffix == "tif":
            palette = np.random.default_rng(0).integers(65535, size=(3, 256)).astype(np.uint16)
            options = {"photometric": "palette", "colormap": palette} if colours == "palette" else {}
            tifffile.imwrite(path, ids > 0 if kind == "gray tif" and bits == 1 else ids, **options)
        else:
            write_png(path, ids, bits, 3 if colours == "palette" else 0)
    done = start(tmp_path)
    assert done.returncode == 0, done.stdout
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        np.testing.assert_array_equal(database.read(0)[1], ids)


def write_png(path, ids, bits, colour):
    """Write a PNG with `bits` per pixel, gray (`colour` 0) or with a palette (`colour` 3), without a PNG library."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    each_bit = np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :]
    rows = np.packbits(each_bit.reshape(len(ids), -1), axis=1)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, colour, 0, 0, 0)
    palette = np.random.default_rng(0).integers(256, size=3 * 2**bits).astype(np.uint8).tobytes()
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", palette) if colour == 3 else b""]
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    "stored, dtype", [("int8", "int32"), ("int16", "int32"), ("float16", "float32"), ("bool", "uint8")]
)
def test_types_that_widen_without_loss_are_widened_and_reported(tmp_path, stored, dtype):
    write_folders(tmp_path, count=2, shape=(32, 32, 1))
    image = (make_pair(0, (32, 32, 1), "float32")[0][..., 0] - 100).astype(stored)
    for path in (tmp_path / "images").iterdir():
        tifffile.imwrite(path, image, photometric="minisblack")
    done = start(tmp_path)
    assert f"2 files of {stored} are stored as {dtype}, which loses nothing" in done.stdout
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        got = database.read(0)[0]
        assert got.dtype == dtype
        np.testing.assert_array_equal(got[..., 0], image)


def test_names_of_any_bytes_are_paired_stored_and_listed(tmp_path):
    images, masks = write_folders(tmp_path, count=6)
    names = ["caf\udce9", "tab\tand\nline end", "zu\u0308rich"]
    for index, name in enumerate(names):
        (images / f"cell{index}.tif").rename(images / f"{name}.tif")
        (masks / f"cell{index}.tif").rename(masks / f"{unicodedata.normalize('NFC', name)}.tif")
    for more in ([], ["--skip_bad", 1]):
        done = start(tmp_path, *more)
        assert done.returncode == 0, done.stdout
        found = []
        for side in ("train", "test"):
            with Database(tmp_path / "db" / f"{side}-t.lmdb") as database:
                found += database.metadata.names
        stems = names if not more else names[2:]
        assert sorted(found) == sorted([f"{name}.tif" for name in [*stems, "cell3", "cell4", "cell5"]])
        for name in names[:2]:
            (images / f"{name}.tif").write_bytes(b"no image")
    lines = (tmp_path / "db" / "skipped-t.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and all(len(line.split("\t")) == 3 for line in lines)
    assert "caf\\udce9.tif" in lines[1] and "tab\\tand\\nline end.tif" in lines[2]


def test_a_preview_replaces_no_image(tmp_path):
    images, masks = write_folders(tmp_path, count=0)
    for index, name in enumerate(["train-t", "other"]):
        skimage.io.imsave(images / f"{name}.png", make_pair(index, dtype="uint8")[0][..., 0], check_contrast=False)
        tifffile.imwrite(masks / f"{name}.tif", make_pair(index)[1])
    before = (images / "train-t.png").read_bytes()
    done = start(tmp_path, "--image_format", "png", "--output_folder", images, "--preview", 1)
    assert done.returncode == 2 and "train-t.png would replace an image or mask" in done.stdout, done.stdout
    assert (images / "train-t.png").read_bytes() == before and len(list(images.iterdir())) == 2


def test_a_preview_replaces_no_database(tmp_path):
    train, _ = build(tmp_path, count=5)
    other = shutil.copy(train, train.with_suffix(".png"))
    before = other.read_bytes()
    train.unlink()
    train.symlink_to(other)
    for database in (other, train):
        done = run_script("build_lmdb.py", "--describe", database, "--preview", 1)
        assert done.returncode == 2 and "train-t.png would replace its database" in done.stdout, done.stdout
        assert other.read_bytes() == before


def test_names_in_a_preview_are_no_formulas_and_need_not_be_utf8(tmp_path):
    images, masks = write_folders(tmp_path, count=0)
    for index, name in enumerate([b"a$_$b.tif", b"caf\xe9.tif", b"c.tif"]):
        image, mask = make_pair(index)
        write_tiff(images / os.fsdecode(name), image)
        tifffile.imwrite(masks / os.fsdecode(name), mask)
    done = start(tmp_path, "--train_fraction", 0.7, "--preview", 1)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    assert (tmp_path / "db" / "train-t.png").exists()


def test_a_link_to_nowhere_is_named(tmp_path):
    images, _ = write_folders(tmp_path, count=4)
    (images / "cell0.tif").unlink()
    (images / "cell0.tif").symlink_to("/nowhere/cell0.tif")
    refused(tmp_path, "cell0.tif, found a link to /nowhere/cell0.tif, which does not exist", "1 file cannot be used")


@pytest.mark.parametrize("kind", STORED)
def test_images_are_built_however_they_are_stored(tmp_path, kind):
    write_folders(tmp_path, count=2)
    for index in range(2):
        write_stored(tmp_path / "images" / f"cell{index}.tif", make_pair(index, (64, 64, 3))[0], kind)
    assert start(tmp_path).returncode == 0
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        index = int(database.metadata.names[0][4])
        np.testing.assert_array_equal(database.read(0)[0], make_pair(index, (64, 64, 3))[0])


def test_channels_are_selected_and_a_constant_one_is_pointed_out(tmp_path):
    write_folders(tmp_path, count=2, shape=(32, 32, 4), dtype="uint8")
    images = {}
    for path in (tmp_path / "images").iterdir():
        images[path.name] = make_pair(int(path.stem[4]), (32, 32, 4), "uint8")[0]
        images[path.name][..., 3] = 255
        tifffile.imwrite(path, images[path.name], photometric="rgb", extrasamples=["unassalpha"])
    done = start(tmp_path)
    assert "the same value everywhere in channel 3 (alpha?): --channels 0,1,2 leaves it out" in done.stdout
    done = start(tmp_path, "--channels", "2,0")
    assert done.returncode == 0 and "alpha" not in done.stdout
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        np.testing.assert_array_equal(database.read(0)[0], images[database.metadata.names[0]][..., [2, 0]])
        assert database.metadata.info["channels"] == [2, 0]
    shutil.rmtree(tmp_path / "db")
    refused(tmp_path, "expected at least 5 channels", "found 4", arguments=["--channels", "0,4"])


def test_masks_with_a_suffix_are_found_also_beside_their_images(tmp_path):
    images, masks = write_folders(tmp_path, count=4)
    for path in list(masks.iterdir()):
        path.rename(images / f"{path.stem}_mask.tif")
    done = start(tmp_path, "--mask_folder", images, "--mask_suffix", "_mask")
    assert done.returncode == 0, done.stdout
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        for name, mask in masks_of(database).items():
            np.testing.assert_array_equal(mask, make_pair(int(name[4]))[1])
    shutil.rmtree(tmp_path / "db")
    refused(tmp_path, "the same files", arguments=["--mask_folder", images])


def test_only_masks_of_the_mask_format_are_used(tmp_path):
    _, masks = write_folders(tmp_path, count=2)
    for path in list(masks.iterdir()):
        skimage.io.imsave(path.with_suffix(".png"), 1 - tifffile.imread(path), check_contrast=False)
    refused(tmp_path, "files that share a name (4)", "cell0.png: there is also cell0.tif")
    assert start(tmp_path, "--mask_format", "png").returncode == 0
    with Database(tmp_path / "db" / "train-t.lmdb") as database:
        for name, mask in masks_of(database).items():
            np.testing.assert_array_equal(mask, 1 - make_pair(int(name[4]))[1])


def test_jpeg_masks_are_refused_with_the_reason(tmp_path):
    _, masks = write_folders(tmp_path, count=2)
    for path in list(masks.iterdir()):
        path.rename(path.with_suffix(".jpg"))
    refused(tmp_path, "expected tif or png masks", ".jpg", "a JPEG mask has stray values")


def test_files_of_a_group_go_to_one_side(tmp_path):
    images, masks = write_folders(tmp_path, count=12)
    for index in range(12):
        for folder in (images, masks):
            (folder / f"cell{index}.tif").rename(folder / f"slide{index % 4}_field{index}.tif")
    for pattern in (r"^[^_]+", r"slide(\d)_"):
        assert start(tmp_path, "--split_by", pattern, "--train_fraction", 0.5).returncode == 0
        sides = []
        for side in "train", "test":
            with Database(tmp_path / "db" / f"{side}-t.lmdb") as database:
                sides.append({name[:6] for name in database.metadata.names})
                assert len(database) == 6
        assert len(sides[0]) == len(sides[1]) == 2 and not sides[0] & sides[1]
    shutil.rmtree(tmp_path / "db")
    refused(tmp_path, "finds nothing in the name of", arguments=["--split_by", "patient"])
    refused(tmp_path, "at least 2 groups", arguments=["--split_by", "slide"])


@pytest.mark.parametrize(
    "options, folders",
    [
        (["--use_tiling", 1, "--tile_size", 112], {"count": 7, "shape": (300, 200, 2)}),
        ([], {"count": 300, "shape": (32, 32, 1)}),  # enough results to reuse pieces of shared memory
    ],
)
def test_any_number_of_workers_builds_the_same_bytes(tmp_path, options, folders):
    contents = [
        [path.read_bytes() for path in build(tmp_path / str(workers), *options, "--num_workers", workers, **folders)]
        for workers in (1, 2, 5)
    ]
    assert contents[0] == contents[1] == contents[2]


def test_a_large_image_is_tiled_in_parts_with_the_same_result(tmp_path):
    """Compare a tiled file, which is read in parts, with one that can only be read in one piece."""
    image, mask = make_pair(0, (2300, 1300, 1))
    contents = []
    for kind, options in (("parts", {"tile": (256, 256)}), ("whole", {"compression": "zlib", "rowsperstrip": 2300})):
        write_folders(tmp_path / kind, count=1, shape=(128, 128, 1))
        tifffile.imwrite(tmp_path / kind / "images" / "large.tif", image[..., 0], **options)
        tifffile.imwrite(tmp_path / kind / "masks" / "large.tif", mask, **options)
        assert start(tmp_path / kind, "--use_tiling", 1, "--tile_size", 128).returncode == 0
        contents.append([(tmp_path / kind / "db" / f"{side}-t.lmdb").read_bytes() for side in ("train", "test")])
    assert contents[0] == contents[1]


def test_a_database_is_described_again_later_with_a_picture(tmp_path):
    train, _ = build(tmp_path, "--label_map", "0:0,1:1", count=5)
    done = run_script("build_lmdb.py", "--describe", train, "--preview", 1)
    assert done.returncode == 0, done.stdout
    expected = [
        "4 images, 4 records of 64 x 64 x 1 uint16, masks uint8", "label_map 0:0,1:1", "train side of dataset t",
        "class 1: 8192 pixels (50.00 %), in 4 records", "values 3", "train-t.png",
    ]  # fmt: skip
    for text in expected:
        assert text in done.stdout, done.stdout
    with Database(train) as database:
        least, greatest = database.metadata.info["value_range"][0]
        pixels = np.stack([database.read(index)[0] for index in range(4)])
        assert (least, greatest) == (pixels.min(), pixels.max())
    picture = skimage.io.imread(train.with_suffix(".png"))
    assert picture.std(axis=(0, 1)).max() > 20
    done = run_script("build_lmdb.py", "--describe", tmp_path / "images" / "cell0.tif")
    assert done.returncode == 2 and "is not a database or is damaged" in done.stdout and "Traceback" not in done.stdout


def test_a_second_build_of_the_same_database_is_refused_while_one_runs(tmp_path):
    write_folders(tmp_path, count=40, shape=(512, 512, 1))
    first = start_in_background(tmp_path)
    refused_while_running = start(tmp_path, "--num_workers", 1)
    assert first.poll() is None, first.communicate()[0]
    assert refused_while_running.returncode == 2, refused_while_running.stdout
    assert "another build is writing" in refused_while_running.stdout
    first.send_signal(signal.SIGCONT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 0, output
    assert sorted(os.listdir(tmp_path / "db")) == ["test-t.lmdb", "train-t.lmdb"]


def start_in_background(folder, **options):
    """Start a build, suspend it once it writes, and return its process."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "build_lmdb.py", "--image_folder", folder / "images", "--mask_folder", folder / "masks",
         "--output_folder", folder / "db", "--dataset_name", "t", "--num_workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip
    while not list(folder.glob("db/.train-t.*.part.lmdb")):
        time.sleep(0.001)
        assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_ends_the_build_quietly_and_leaves_nothing(tmp_path, number):
    write_folders(tmp_path, count=40, shape=(512, 512, 1))
    process = start_in_background(tmp_path, start_new_session=True)
    os.killpg(process.pid, signal.SIGCONT)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    lines = [line for line in output.splitlines() if " INFO " not in line]
    assert len(lines) == 1 and lines[0].endswith("interrupted; no incomplete files were left behind"), output
    assert os.listdir(tmp_path / "db") == []


def test_a_full_disk_is_reported_and_leaves_the_old_databases(tmp_path):
    (tmp_path / "db").mkdir()
    if os.system(f"mount -t tmpfs -o size=4m tmpfs {tmp_path / 'db'} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    try:
        before = [path.read_bytes() for path in build(tmp_path, count=2)]
        write_folders(tmp_path, count=20, shape=(512, 512, 1))
        for workers in (1, 2):
            done = start(tmp_path, "--num_workers", workers)
            assert done.returncode == 2 and "cannot write a database in" in done.stdout, done.stdout
            assert "Traceback" not in done.stdout
            assert sorted(os.listdir(tmp_path / "db")) == ["test-t.lmdb", "train-t.lmdb"]
            assert [(tmp_path / "db" / f"{side}-t.lmdb").read_bytes() for side in ("train", "test")] == before
    finally:
        os.system(f"umount {tmp_path / 'db'}")


def test_a_database_that_is_in_use_stays_as_it_was_when_it_is_built_again(tmp_path):
    train, _ = build(tmp_path, count=8)
    file = train.stat().st_ino
    with Database(train) as database:
        before = database.read(0)[0].copy()
        assert start(tmp_path, "--seed", 1).returncode == 0
        assert train.stat().st_ino != file, "the file was overwritten in place"
        np.testing.assert_array_equal(database.read(0)[0], before)


def test_what_a_killed_build_left_does_not_get_into_the_next_one(tmp_path):
    other, _ = build(tmp_path / "other", count=7, shape=(32, 32, 1))
    train, _ = build(tmp_path, count=5)
    whole = train.read_bytes()
    shutil.copy(other, tmp_path / "db" / ".train-t.01234567.part.lmdb")
    assert start(tmp_path).returncode == 0
    assert train.read_bytes() == whole
    assert sorted(os.listdir(tmp_path / "db")) == ["test-t.lmdb", "train-t.lmdb"]


def test_a_worker_that_is_killed_ends_the_build_with_a_reason(tmp_path):
    write_folders(tmp_path, count=40, shape=(512, 512, 1))
    process = start_in_background(tmp_path)
    for worker in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(worker.cmdline()) and "resource_tracker" not in " ".join(worker.cmdline()):
            worker.kill()
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "a process that reads images exited unexpectedly" in output, output
    assert "Traceback" not in output and os.listdir(tmp_path / "db") == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_leaves_the_old_database_and_the_next_one_clears_up(tmp_path, signal_number):
    train, _ = build(tmp_path, count=40, shape=(512, 512, 1))
    old = train.read_bytes()
    arguments = ["--image_folder", tmp_path / "images", "--mask_folder", tmp_path / "masks"]
    arguments += ["--output_folder", tmp_path / "db", "--dataset_name", "t", "--seed", "1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "build_lmdb.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list((tmp_path / "db").glob(".train-t.*.part.lmdb")):
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal_number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130), output
    assert train.read_bytes() == old and "Traceback" not in output
    assert start(tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path / "db")) == ["test-t.lmdb", "train-t.lmdb"]
    assert train.read_bytes() == old


@pytest.mark.parametrize("nbytes, ahead", [(0, 6 * 16), (100 * 2**20, 3)])
def test_results_of_at_most_256_mb_wait_to_be_written(nbytes, ahead, monkeypatch):
    """The limit applies to all processes together. Each gets up to three groups of sixteen small tasks in advance."""
    monkeypatch.setattr(build_lmdb, "allocate_shared_memory", lambda size: os.open("/nowhere", os.O_RDONLY))
    asked = []
    with build_lmdb.Workers(2) as workers:
        results = workers.run(abs, (asked.append(task) or task for task in range(-200, 0)), str, lambda task: nbytes)
        assert next(results) == (-200, 200)
        assert ahead <= len(asked) <= ahead + 1  # a group ends when the first task of the next one is read
        results.close()


def test_results_come_through_shared_memory_in_the_order_of_the_tasks_and_leave_none(monkeypatch):
    sizes = []
    allocate = build_lmdb.allocate_shared_memory
    monkeypatch.setattr(build_lmdb, "allocate_shared_memory", lambda size: sizes.append(size) or allocate(size))
    tasks = [np.full(2**19, number, np.int32) for number in range(20)]
    with build_lmdb.Workers(2) as workers:
        for task, result in workers.run(np.copy, tasks, str, lambda task: task.nbytes):
            np.testing.assert_array_equal(result, task)
        assert sizes == 6 * [2**22]  # three for each process; finished chunks pass theirs on
        large = [np.full(2**21, number, np.int32) for number in range(8)]
        for task, result in workers.run(np.copy, large, str, lambda task: task.nbytes):
            np.testing.assert_array_equal(result, task)
        assert sizes[6:] == 8 * [2**23]
        assert sum(memory.size for memory in workers._idle) == 6 * 2**22  # large results do not change that
        next(workers.run(np.copy, tasks, str, lambda task: task.nbytes))
    # Results that nobody read are gone as well (checked in conftest.py).


def names_of_sides(folder):
    """Return the names in the train and test databases."""
    sides = []
    for side in "train", "test":
        with Database(folder / "db" / f"{side}-t.lmdb") as database:
            sides.append(set(database.metadata.names))
    assert not sides[0] & sides[1]
    return sides


@pytest.mark.parametrize("grouped", [False, True])
def test_each_image_is_tested_in_exactly_one_fold(tmp_path, grouped):
    images, masks = write_folders(tmp_path, count=11)
    names = [f"slide{index % 4 if grouped else index}_{index}.tif" for index in range(11)]
    for index, name in enumerate(names):
        for folder in (images, masks):
            (folder / f"cell{index}.tif").rename(folder / name)
    folds, tested = (3 if grouped else 5), []
    for fold in range(1, folds + 1):
        options = ["--fold", f"{fold}/{folds}", *(["--split_by", "^[^_]+"] if grouped else [])]
        done = start(tmp_path, *options)
        assert f"seed 0, fold {fold}/{folds}, " in done.stdout
        train, test = names_of_sides(tmp_path)
        assert train | test == set(names)
        assert not grouped or not {name[:6] for name in train} & {name[:6] for name in test}
        tested.append(test)
        assert set((tmp_path / "db" / "test-t.txt").read_text().splitlines()) == test
    assert sorted(itertools.chain(*tested)) == sorted(names)
    # Groups of 3, 3, 3 and 2 images in three folds; single images in five.
    assert sorted(map(len, tested)) in ([[3, 3, 5], [2, 3, 6]] if grouped else [[2, 2, 2, 2, 3]])


def test_more_folds_than_groups_are_refused(tmp_path):
    write_folders(tmp_path, count=4)
    refused(tmp_path, "expected at least 5 images with masks, one for each fold, found 4", arguments=["--fold", "5/5"])
    for wrong in ("1/1", "0/5", "6/5", "2", "2/"):
        refused(tmp_path, "--fold", repr(wrong), arguments=["--fold", wrong])
    refused(tmp_path, "not allowed with", arguments=["--fold", "1/2", "--test_list", "a"])


def test_the_test_images_can_be_listed(tmp_path):
    write_folders(tmp_path, count=6)
    listed = tmp_path / "test.txt"
    listed.write_bytes("\ufeffcell4.tif\r\n\r\n  cell1 \r\n".encode())
    assert start(tmp_path, "--test_list", listed).returncode == 0
    assert names_of_sides(tmp_path) == [{f"cell{index}.tif" for index in (0, 2, 3, 5)}, {"cell1.tif", "cell4.tif"}]


@pytest.mark.parametrize(
    "names, words",
    [
        ("cell1\ncell9\ncell8.tif\n", "found cell9, cell8.tif not in"),
        ("cell1\ncell2\ncell1.tif\n", "found cell1 more than once"),
        ("\n", "found 0 names, none of these images"),
        ("cell0\ncell1\ncell2\ncell3\n", "found 4 names, all of these images"),
        (None, "cannot read --test_list"),
    ],
)
def test_a_list_of_test_images_that_cannot_be_is_refused(tmp_path, names, words):
    write_folders(tmp_path, count=4)
    if names is not None:
        (tmp_path / "test.txt").write_text(names)
    refused(tmp_path, words, arguments=["--test_list", tmp_path / "test.txt"])


def test_a_list_that_parts_a_group_is_refused(tmp_path):
    write_folders(tmp_path, count=4)
    (tmp_path / "test.txt").write_text("cell0\n")
    arguments = ["--test_list", tmp_path / "test.txt", "--split_by", "ce(?=ll[01])|cell(?=[23])"]
    refused(tmp_path, "has 1 of the 2 images in the group of", "cell0.tif", arguments=arguments)
    (tmp_path / "test.txt").write_text("cell0\ncell1\n")
    assert start(tmp_path, *arguments).returncode == 0
    assert names_of_sides(tmp_path)[1] == {"cell0.tif", "cell1.tif"}


def test_a_listed_image_without_a_mask_is_reported_as_that(tmp_path):
    _, masks = write_folders(tmp_path, count=4)
    (masks / "cell3.tif").unlink()
    (tmp_path / "test.txt").write_text("cell0\ncell3\n")
    refused(tmp_path, "images without a mask (1)", arguments=["--test_list", tmp_path / "test.txt"])
    assert start(tmp_path, "--test_list", tmp_path / "test.txt", "--skip_bad", 1).returncode == 0
    assert names_of_sides(tmp_path)[1] == {"cell0.tif"}
