import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import skimage.io
import tifffile
from conftest import ROOT, build, make_pair, run_script, write_folders

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
    """Assert that the build ends with code 2 and one line that holds all words, and writes nothing."""
    done = start(folder, *arguments)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    for word in words:
        assert word in last, last
    assert not (folder / "db").exists() or os.listdir(folder / "db") == []


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
    assert "test-t.lmdb: 1 images, 1 records" in output
    assert "class 0: 8192 pixels (50.00 %), in 4 records" in output
    assert "class 1: 2048 pixels (50.00 %), in 1 records" in output


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
        (("--tile_size", "500"), "try 496 or 512"),
        (("--tile_size", "96"), "above 96"),
        (("--train_fraction", "1"), "between 0 and 1"),
        (("--train_fraction", "80"), "between 0 and 1"),
        (("--train_fraction", "nan"), "between 0 and 1"),
        (("--image_format", "gif"), "gif"),
        (("--seed", "-1"), "-1"),
        (("--image_folder", "nowhere"), "there is no folder nowhere"),
        (("--dataset_name", "a/b"), "a/b"),
    ],
)
def test_a_bad_argument_is_refused(tmp_path, arguments, word):
    write_folders(tmp_path, count=2)
    refused(tmp_path, word, arguments=arguments)


def test_an_image_without_mask_and_a_mask_without_image_are_named(tmp_path):
    _, masks = write_folders(tmp_path, count=3)
    (masks / "cell1.tif").rename(masks / "cell1_mask.tif")
    refused(tmp_path, "1 of 3 images have no mask", "cell1.tif")
    (tmp_path / "images" / "cell1.tif").unlink()
    refused(tmp_path, "1 of 3 masks have no image", "cell1_mask.tif")


def test_two_files_of_one_stem_are_refused(tmp_path):
    images, _ = write_folders(tmp_path, count=2)
    (images / "cell0.tiff").write_bytes((images / "cell0.tif").read_bytes())
    refused(tmp_path, "cell0.tif and cell0.tiff", "one stem")


def bad_mask(array, **options):
    return lambda folder: tifffile.imwrite(folder / "masks" / "cell0.tif", array, **options)


def bad_image(array, **options):
    return lambda folder: tifffile.imwrite(folder / "images" / "cell0.tif", array, **options)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (bad_mask(np.zeros((64, 64, 3), np.uint8)), ("single-channel mask", "masks/cell0.tif", "3 channels")),
        (bad_mask(np.zeros((64, 64), np.float32)), ("masks/cell0.tif", "float32")),
        (bad_mask(np.full((64, 64), -1, np.int32)), ("masks/cell0.tif", "found -1")),
        (bad_mask(np.zeros((64, 60), np.uint8)), ("one size", "64 x 64", "64 x 60", "cell0.tif")),
        (bad_image(np.zeros((64, 64), np.float64)), ("images/cell0.tif", "float64")),
        (bad_image(np.full((64, 64), np.inf, np.float32)), ("finite pixels in", "images/cell0.tif")),
        (bad_image(np.zeros((64, 64), np.uint8)), ("one type", "uint8", "uint16")),
        (bad_image(np.zeros((64, 64, 3), np.uint16)), ("one type", "3 channels", "1 of uint16")),
        (lambda folder: (folder / "images" / "cell0.tif").write_bytes(b""), ("cannot read", "images/cell0.tif")),
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
    refused(tmp_path, "one size", "--use_tiling 1")
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
    assert "--number_classes 256" in output and "0 and 255 are usually meant as 0 and 1" in output


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    write_folders(tmp_path, count=2)
    (tmp_path / "file").write_text("")
    done = start(tmp_path, "--output_folder", tmp_path / "file" / "db")
    assert done.returncode == 2 and "cannot write a database" in done.stdout and "Traceback" not in done.stdout


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
    building = tmp_path / "db" / ".building-train-t.lmdb"
    while not building.exists():
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal_number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130), output
    assert train.read_bytes() == old and "Traceback" not in output
    assert start(tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path / "db")) == ["test-t.lmdb", "train-t.lmdb"]
    assert train.read_bytes() == old
