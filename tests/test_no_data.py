"""Pixels without a class and pixels without data count nowhere, from the image files to the masks."""

import csv
import itertools
import re

import numpy as np
import pytest
import rasterio
import skimage.io
import tensorflow as tf
import tifffile
from conftest import make_pair, run_script, write_tiff
from PIL import Image

import build_lmdb
import inference_unet
from augment import Augmenter, Transformation
from image_files import ChannelStatistics, ImageFile, clipped
from imagereader import ImageReader
from lmdb_utils import Database, ignored_id
from unet_model import build_unet, export_saved_model

GDAL_NO_DATA = 42113


def no_data_tag(text):
    return {"extratags": [(GDAL_NO_DATA, "s", 0, text, True)]}


def build(folder, *arguments):
    """Build from folder/images and folder/masks; return the finished process and both database paths."""
    done = run_script(
        "build_lmdb.py", "--image_folder", folder / "images", "--mask_folder", folder / "masks",
        "--output_folder", folder / "db", "--dataset_name", "t", *arguments,
    )  # fmt: skip
    return done, [folder / "db" / f"{side}-t.lmdb" for side in ("train", "test")]


def make_folders(folder):
    for name in ("images", "masks"):
        (folder / name).mkdir()
    return folder / "images", folder / "masks"


def palette_png(path, mask):
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tolist())
    picture.save(path)


@pytest.mark.parametrize(
    "dtype, value, options",
    [
        ("uint8", 255, ["--ignore_value", 255]),
        ("uint8", 7, ["--ignore_value", 7]),
        ("palette", 255, ["--ignore_value", 255]),
        ("uint16", 255, ["--ignore_value", 255]),
        ("int16", -1, ["--ignore_value", -1]),
        ("int32", -1, ["--label_map=0:0,1:1", "--ignore_value", -1]),
        ("uint8", 255, ["--label_map", "0:0,1:1,255:ignore"]),
        ("uint16", 900, ["--label_map", "200-65535:ignore"]),
        ("uint32", 9, ["--label_map", "0:0,1:1,9:ignore"]),
    ],
)
def test_ignored_values_are_no_class_in_records_and_statistics(tmp_path, dtype, value, options):
    images, masks = make_folders(tmp_path)
    counts, ignored_pixels = np.zeros(2, int), 0
    for index in range(4):
        image, mask = make_pair(index, (64, 80, 1))
        mask = mask.astype(np.int64)
        mask[5 * index : 30, 10:40] = value
        counts += [(mask == class_id).sum() for class_id in (0, 1)]
        ignored_pixels += (mask == value).sum()
        write_tiff(images / f"{index}.tif", image)
        if dtype == "palette":
            palette_png(masks / f"{index}.png", mask)
        else:
            tifffile.imwrite(masks / f"{index}.tif", mask.astype(dtype))
    done, paths = build(tmp_path, *options)
    assert done.returncode == 0, done.stdout
    assert "ignored or without data:" in done.stdout
    for path in paths:
        with Database(path) as database:
            metadata = database.metadata
            assert metadata.classes.tolist() == [0, 1]
            assert metadata.ignored_id == ignored_id(metadata.info["mask_dtype"])
            counts -= metadata.pixel_counts
            ignored_pixels -= metadata.info["ignored_pixels"]
            for record in range(len(database)):
                index = int(metadata.names[metadata.record_image[record]][0])
                stored = database.read(record)[1]
                np.testing.assert_array_equal(np.argwhere(stored == metadata.ignored_id).min(0), [5 * index, 10])
                np.testing.assert_array_equal(
                    np.where(stored == metadata.ignored_id, -5, stored)[:, 40:],
                    make_pair(index, (64, 80, 1))[1][:, 40:],
                )
    assert counts.tolist() == [0, 0] and ignored_pixels == 0


def test_what_is_to_be_ignored_has_to_be_given_once_and_in_whole_numbers(tmp_path):
    images, masks = make_folders(tmp_path)
    for index in range(3):
        image, mask = make_pair(index, dtype="float32")
        write_tiff(images / f"{index}.tif", image)
        tifffile.imwrite(masks / f"{index}.tif", mask * np.uint8(255))
    for options, words in (
        (["--ignore_value", "2.5"], "expected a whole number"),
        (["--label_map", "0:0,255:1", "--ignore_value", 255], "cannot combine --label_map and --ignore_value"),
        ([], "masks with the value that stands for ignored pixels (3):"),  # 255 is reserved in float data sets
        (["--label_map", "0:0,255:void"], "expected VALUE:CLASS, FIRST-LAST:CLASS or VALUE:ignore"),
        (["--ignore_value", 255, "--label_map", "0:0"], ""),
    ):
        done, _ = build(tmp_path, *options)
        assert (done.returncode, words in done.stdout, "Traceback" in done.stdout) == (
            2 if words else 0,
            True,
            False,
        ), done.stdout


def test_void_beside_small_classes_gets_the_advice_to_ignore_it(tmp_path):
    images, masks = make_folders(tmp_path)
    for dtype, value in (("uint8", 255), ("uint16", 65535), ("int16", -1)):
        for index in range(3):
            image, mask = make_pair(index)
            mask = mask.astype(dtype)
            mask[:9] = value
            write_tiff(images / f"{index}.tif", image)
            tifffile.imwrite(masks / f"{index}.tif", mask)
        done, _ = build(tmp_path)
        assert f"--ignore_value {value} to exclude them" in done.stdout
        done, _ = build(tmp_path, "--ignore_value", value)
        assert done.returncode == 0 and "number_classes" not in done.stdout, done.stdout


def test_tiles_that_count_nothing_are_left_out_and_a_side_of_them_is_refused(tmp_path):
    images, masks = make_folders(tmp_path)
    for index in range(4):
        image, mask = make_pair(index, (128, 256, 1))
        mask[:, 100:] = 255
        write_tiff(images / f"{index}.tif", image)
        tifffile.imwrite(masks / f"{index}.tif", mask)
    done, paths = build(tmp_path, "--ignore_value", 255, "--use_tiling", 1, "--tile_size", 128)
    assert done.returncode == 0 and "tiles in which every pixel is ignored" in done.stdout
    with Database(paths[0]) as database:
        assert set(database.metadata.record_column.tolist()) == {0, 32, 64, 96}
        assert 255 not in database.metadata.classes
    done, _ = build(tmp_path, "--label_map", "0-255:ignore")
    assert done.returncode == 2 and "no image remains to train with" in done.stdout


# ---------------------------------------------------------------------------------------------- images


KINDS = {
    "tag": ("uint16", 65535, no_data_tag("65535"), []),
    "tag of a signed type": ("int16", -9999, no_data_tag("-9999 "), []),
    "option": ("int32", -9999, {}, ["--image_no_data=-9999"]),
    "NaN": ("float32", np.nan, {}, []),
    "tag of a float": ("float32", np.finfo(np.float32).min, no_data_tag("-3.4028234663852886e+38"), []),
    "half floats": ("float16", np.nan, {}, []),
}


def write_with_holes(folder, kind, count=3, shape=(150, 130, 2)):
    """Write images that lack data in one or both channels; return pixels and gaps by name, and the build options."""
    dtype, value, tags, options = KINDS[kind]
    images, masks = make_folders(folder)
    holes = {}
    for index in range(count):
        image, mask = make_pair(index, shape)
        image, missing = image.astype(dtype), np.zeros(shape, bool)
        missing[: 20 + index] = True
        missing[60:90, 40:70, 0] = True
        missing[-9:, -9:, 1] = True
        image[missing] = value
        tifffile.imwrite(images / f"{index}.tif", image, photometric="minisblack", planarconfig="contig", **tags)
        tifffile.imwrite(masks / f"{index}.tif", mask)
        holes[f"{index}.tif"] = image, missing
    return holes, options


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiling", [[], ["--use_tiling", 1, "--tile_size", 112]])
def test_pixels_without_data_are_in_no_statistics_and_0_in_training_as_in_inference(tmp_path, kind, tiling):
    holes, options = write_with_holes(tmp_path, kind)
    done, paths = build(tmp_path, *options, *tiling)
    assert done.returncode == 0, done.stdout
    for path in paths:
        with Database(path) as database:
            metadata = database.metadata
            model = inference_unet.Model(
                None, 2, 2, 96, 16,
                deviation_floor=metadata.deviation_floor.tolist(), image_no_data=metadata.info["image_no_data"],
            )  # fmt: skip
            for record in range(len(database)):
                check_statistics(database.record(record), *holes[metadata.names[metadata.record_image[record]]])
        with ImageReader(path, shuffle=False, batch_size=1) as reader:
            batches = reader.generator()
            for record in range(metadata.count):
                got, name = next(batches), metadata.names[metadata.record_image[record]]
                row, column = metadata.record_row[record], metadata.record_column[record]
                seen, gone = seen_by_inference(tmp_path / "images" / name, model)
                window = slice(row, row + got.images.shape[1]), slice(column, column + got.images.shape[2])
                np.testing.assert_array_equal(got.images[0], seen[window])
                missing = holes[name][1][window]
                assert (got.images[0][missing] == 0).all() and (got.images[0][~missing] != 0).mean() > 0.99
                ignored = missing.all(2)
                if tiling and path == paths[1]:  # pixels that another test tile counts are ignored too
                    ignored = build_lmdb.own_part(ignored, (row, column), seen.shape, True)
                np.testing.assert_array_equal(got.masks[0] == 255, ignored)
                np.testing.assert_array_equal(gone[window], missing.all(2))


def check_statistics(stored, image, missing):
    for channel in range(2):
        known = image[..., channel][~missing[..., channel]].astype(np.float64)
        assert stored.mean[channel] == pytest.approx(known.mean(), rel=1e-12)
        assert stored.deviation[channel] == pytest.approx(known.std(), rel=1e-10)


def seen_by_inference(path, model):
    """Return the network's input that inference makes from the tiles of an image, and where no channel has data."""
    with ImageFile(path, channels=model.channels, no_data=model.image_no_data) as image:
        seen, gone = np.empty((*image.shape[:2], model.channels), np.float32), np.zeros(image.shape[:2], bool)
        tiles = inference_unet.plan_tiles(image.shape, (208, 208), model)
        statistics = ChannelStatistics.of_file(image)
        for [(tile, missing)], [[pixels]] in inference_unet.read_batches(image, statistics, tiles, 1, model):
            rows, columns = clipped(tile.window, image.shape)
            seen[rows, columns] = pixels[: rows.stop - rows.start, : columns.stop - columns.start]
            if missing is not None:
                gone[rows, columns] = missing[: rows.stop - rows.start, : columns.stop - columns.start]
    return seen, gone


def test_a_large_image_is_measured_without_its_pixels_of_no_data(tmp_path, monkeypatch):
    image = np.random.default_rng(0).normal(1000, 50, (300, 200, 2)).astype(np.float32)
    image[:90], image[200:, :, 1] = np.nan, np.nan  # blocks with none, some and only pixels without data
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr("image_files.STATISTICS_BLOCK_VALUES", 10 * 200 * 2)
    with ImageFile(tmp_path / "a.tif") as file:
        found = ChannelStatistics.of_file(file)
    flat = image.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(found.mean, np.nanmean(flat, 0), rtol=1e-13)
    np.testing.assert_allclose(found.deviation, np.nanstd(flat, 0), rtol=1e-12)
    np.testing.assert_array_equal(found.minimum, np.nanmin(flat, 0))
    np.testing.assert_array_equal(found.maximum, np.nanmax(flat, 0))
    np.testing.assert_array_equal(found.valid, (~np.isnan(flat)).sum(0))


def test_a_channel_without_any_data_is_0(tmp_path):
    holes, _ = write_with_holes(tmp_path, "NaN")
    for name, (image, _) in holes.items():
        image[..., 1] = np.nan
        tifffile.imwrite(tmp_path / "images" / name, image, photometric="minisblack", planarconfig="contig")
    done, [train, _] = build(tmp_path)
    assert done.returncode == 0 and "--channels 0 leaves it out" in done.stdout, done.stdout
    with ImageReader(train, batch_size=1) as reader:
        images = next(reader.generator()).images
    assert (images[..., 1] == 0).all() and images[..., 0].any()


def test_classes_beyond_a_byte_and_ignored_pixels_do_not_meet(tmp_path):
    images, masks = make_folders(tmp_path)
    for index in range(3):
        image, mask = make_pair(index)
        mask[:9], mask[10:20] = 255, 254
        write_tiff(images / f"{index}.tif", image)
        tifffile.imwrite(masks / f"{index}.tif", mask)
    done, [train, _] = build(tmp_path, "--ignore_value", 255)
    assert done.returncode == 0, done.stdout
    for number_classes, ignored in ((255, 255), (256, 2**31 - 1), (300, 2**31 - 1)):
        for use_augmentation in (False, True):
            with ImageReader(train, use_augmentation, batch_size=2, number_classes=number_classes) as reader:
                found = np.unique(next(reader.generator()).masks)
            assert found.tolist() == [0, 1, 254, ignored]


@pytest.mark.parametrize(
    "transformation",
    [
        Transformation(reflect_rows=True, noise_sigma=0.2, blur_sigma=1.5),
        Transformation(rotation=0.5, jitter_rows=30, scale_columns=0.8, noise_sigma=0.2, intensity_shift=0.3),
    ],
)
def test_augmentation_moves_pixels_without_data_as_it_moves_the_mask(transformation):
    rng = np.random.default_rng(0)
    image = rng.normal(3, 0.5, (96, 80, 2)).astype(np.float32)
    missing = np.zeros(image.shape, bool)
    missing[:30], missing[50:60, :, 0] = True, True
    image[missing] = 0
    augmenter = Augmenter(image.shape, np.uint8)
    for channel in range(2):
        got, mask = augmenter.apply(transformation, image, missing[..., channel].astype(np.uint8), rng, missing)
        np.testing.assert_array_equal(got[..., channel] == 0, mask == 1)
        assert 0.2 < mask.mean() < 0.8


def test_augmented_batches_are_0_and_ignored_together(tmp_path):
    write_with_holes(tmp_path, "NaN")
    done, [train, _] = build(tmp_path)
    assert done.returncode == 0, done.stdout
    with ImageReader(train, True, batch_size=4) as reader:
        batches = reader.generator()
        for _ in range(5):
            batch = next(batches)
            assert np.isfinite(batch.images).all()
            np.testing.assert_array_equal((batch.images == 0).all(3), batch.masks == 255)


# ---------------------------------------------------------------------------------------------- training and inference


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train on images with ignored pixels and missing data; return folder, databases and counted test pixels."""
    folder = tmp_path_factory.mktemp("trained")
    images, masks = make_folders(folder)
    counted = {}
    for index in range(6):
        image, mask = make_pair(index, (64, 64, 1), "int16")
        mask[:, :20], image[50:, 30:] = 200 + index, -9999
        counted[f"{index}.tif"] = 64 * 64 - 64 * 20 - 14 * 34
        write_tiff(images / f"{index}.tif", image)
        tifffile.imwrite(masks / f"{index}.tif", mask)
    done, paths = build(folder, "--label_map", "200-255:ignore", "--image_no_data=-9999")
    assert done.returncode == 0, done.stdout
    done = run_script(
        "train_unet.py", "--train_database", paths[0], "--test_database", paths[1], "--output_dir", folder / "out",
        "--test_every_n_steps", 3, "--max_epochs", 1, "--batch_size", 2, "--baseline_feature_depth", 2,
        "--balance_classes", 1, "--class_weights", "auto",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    with Database(paths[1]) as database:
        names = database.metadata.names
    return folder, paths, sum(counted[name] for name in names)


def test_scores_and_loss_are_of_the_counted_pixels(trained):
    folder, [train, test], counted = trained
    with open(folder / "out" / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert sum(int(cell) for row in rows for cell in row[2:]) == counted
    with open(folder / "out" / "metrics.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert 0 < float(row["train_loss"]) < 3
    with Database(train) as database:
        weights = database.metadata.pixel_counts.sum() / 2 / database.metadata.pixel_counts
    predict = tf.saved_model.load(folder / "out" / "saved_model").signatures["serving_default"]
    losses, sums = [], np.zeros((3, 2))  # for each class: overlap, softmax, pixels
    with ImageReader(test, shuffle=False, batch_size=1) as reader:
        for batch in itertools.islice(reader.generator(), reader.get_image_count()):
            softmax = predict(tf.constant(batch.images))["softmax"].numpy().astype(np.float64)
            for class_id in (0, 1):
                true, of_class = batch.masks == class_id, softmax[..., class_id]
                losses.append(-np.log(of_class[true]) * weights[class_id])
                sums[:, class_id] += of_class[true].sum(), of_class[batch.masks != 255].sum(), true.sum()
    dice = 2 * sums[0] / (sums[1] + sums[2])
    expected = np.concatenate(losses).mean() + 1 - np.average(dice, weights=weights)
    assert float(row["test_loss"]) == pytest.approx(expected, rel=1e-4)


def test_inference_takes_the_value_of_no_data_from_its_model_or_its_options(trained, tmp_path):
    folder, _, _ = trained
    images = tmp_path / "images"
    images.mkdir()
    image = make_pair(9, (64, 96, 1), "int16")[0]
    image[:16], image[16:32, :48] = -9999, -5
    write_tiff(images / "a.tif", image)
    for options in ([], ["--image_no_data", -5]):
        done = infer(folder / "out" / "saved_model", images, tmp_path / "masks", *options, "--overwrite", 1)
        share = "12.5" if options else "25.0"
        assert done.returncode == 0 and f"no data in {share} % of the pixels" in done.stdout, done.stdout


def infer(model, images, masks, *arguments):
    return run_script(
        "inference_unet.py", "--saved_model_filepath", model, "--image_folder", images, "--output_folder", masks,
        *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    tf.keras.utils.set_random_seed(0)
    export_saved_model(build_unet(1, 2, 2), folder, {})
    return folder


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("options, value", [([], 0), (["--no_data_class", 255], 255), (["--no_data_class", 300], 300)])
def test_masks_have_a_class_of_their_own_for_pixels_without_data(model, tmp_path, options, value):
    images = tmp_path / "images"
    images.mkdir()
    image = make_pair(0, (300, 280, 1), "float32")[0][..., 0]
    image[:70, 30:] = np.nan
    tifffile.imwrite(images / "a.tif", image, tile=(64, 64), compression="zlib")
    full = make_pair(1, (64, 64, 1), "uint16")[0]
    write_tiff(images / "full.tif", full)
    results = []
    for tile_size in (208, 1024):  # in tiles, and in one pass
        done = infer(
            model, images, tmp_path / str(tile_size), *options, "--tile_size", tile_size, "--save_probabilities", 1,
            "--save_overlay", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        share = re.search(r"a\.tif: 300 x 280 .*no data in ([\d.]+) %", done.stdout)
        assert float(share[1]) == pytest.approx(100 * 70 * 250 / (300 * 280), abs=0.06)
        assert not re.search(r"full\.tif: .*no data", done.stdout)
        results.append(tifffile.imread(tmp_path / str(tile_size) / "a.tif"))
    np.testing.assert_array_equal(*results)
    assert results[0].dtype == (np.uint16 if value == 300 else np.uint8)
    assert (results[0][:70, 30:] == value).all() and (results[0][np.isfinite(image)] < 2).all()
    probabilities = tifffile.imread(tmp_path / "208" / "probabilities" / "a.tif")
    np.testing.assert_array_equal(np.isnan(probabilities).all(2), np.isnan(image))
    outlines = skimage.io.imread(tmp_path / "208" / "overlays" / "a.png")
    assert (outlines[:69, 31:, 0] == outlines[:69, 31:, 1]).all(), "pixels without data must have no outline"
    for name in ("a", "full"):
        with rasterio.open(tmp_path / "208" / f"{name}.tif") as file:
            assert file.nodata == (value if options else None)


def test_an_image_without_any_data_is_all_of_that_class(model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    tifffile.imwrite(images / "a.tif", np.full((64, 64), np.nan, np.float32))
    tifffile.imwrite(images / "b.tif", np.full((64, 64), 7, np.uint8), **no_data_tag("7"))
    done = infer(model, images, tmp_path / "masks", "--no_data_class", 9)
    assert done.returncode == 0 and done.stdout.count("no data in 100.0 % of the pixels") == 2, done.stdout
    for name in ("a", "b"):
        assert (tifffile.imread(tmp_path / "masks" / f"{name}.tif") == 9).all()


@pytest.mark.parametrize(
    "dtype, text, options, value",
    [
        ("uint8", "255", {}, 255.0),
        ("uint8", "-9999", {}, None),  # no pixel of this type can have the value
        ("uint8", "nan", {}, None),
        ("uint8", "3.5", {}, None),
        ("uint16", "0", {}, 0.0),
        ("uint8", "0", {"photometric": "miniswhite"}, 255.0),  # stored as 0, seen as 255
        ("int32", "-2147483648", {}, -(2.0**31)),
    ],
)
def test_a_no_data_tag_is_a_pixel_of_the_images_type_or_nothing(tmp_path, dtype, text, options, value):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 20), dtype), **no_data_tag(text), **options)
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.no_data == value


def test_a_no_data_tag_that_means_nothing_or_is_in_a_mask_is_reported(tmp_path):
    for name, text in (("a", "none"), ("b", "0")):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((20, 20), np.uint8), **no_data_tag(text))
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.no_data is None and "not a number" in file.notes[0]
    with ImageFile(tmp_path / "b.tif", as_mask=True) as file:
        assert file.no_data is None and "--ignore_value" in file.notes[0]


@pytest.mark.parametrize(
    "dtype, text, value",
    [
        ("float32", "-3.4028234663852886e+38", np.nan),
        ("float32", "nan", np.nan),
        ("int16", "-9999.0", -9999),
        ("uint8", "255", 255),
        ("uint8", "-9999", None),
    ],
)
@pytest.mark.parametrize("tile", [(32, 32), (64, 64)])
def test_tiles_that_a_file_leaves_out_have_no_data(tmp_path, dtype, text, value, tile):
    image = make_pair(0)[0].astype(dtype)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", image, tile=tile, compression="zlib", **no_data_tag(text))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            tag.overwrite([0, *tag.value[1:]] if tag.count > 1 else 0)
    with ImageFile(tmp_path / "a.tif") as file:
        statistics = ChannelStatistics.of_file(file)
        [pixels] = file.windows([file.extent])
    missing = pixels[: tile[0], : tile[1]]
    if value is None:  # because no pixel of this type can have the value
        assert statistics.valid == 64 * 64 and (missing == 0).all()
    else:
        assert statistics.valid == 64 * 64 - missing.size
        np.testing.assert_array_equal(missing, value)


def test_values_of_no_data_that_no_pixel_has_are_reported(tmp_path):
    images, masks = make_folders(tmp_path)
    for index in range(3):
        image, mask = make_pair(index)
        write_tiff(images / f"{index}.tif", image)
        tifffile.imwrite(masks / f"{index}.tif", mask)
    done, _ = build(tmp_path, "--image_no_data", 3.5, "--ignore_value", 77)
    assert done.returncode == 0 and "no pixel has the value of --image_no_data, 3.5" in done.stdout, done.stdout
    assert "no pixel is ignored by --label_map 77:ignore" in done.stdout
    done, _ = build(tmp_path, "--image_no_data", "nan")
    assert done.returncode == 2 and "expected a number, such as -9999, got 'nan'" in done.stdout
    image[:16] = 0
    tifffile.imwrite(images / "1.tif", image[..., 0], **no_data_tag("0"))
    done, _ = build(tmp_path)
    assert (
        "images: 0 is declared as no data and left out" in done.stdout
        and "without data in each channel: " in done.stdout
    )


def test_a_large_image_with_a_reserved_value_leaves_no_tiles(tmp_path):
    images, masks = make_folders(tmp_path)
    for index in range(3):
        image, mask = make_pair(index, (2900, 1300, 1) if index == 1 else (128, 144, 1), "float32")
        mask[-2:, -2:] = 255 if index == 1 else 1
        tifffile.imwrite(images / f"{index}.tif", image[..., 0], tile=(256, 256))
        tifffile.imwrite(masks / f"{index}.tif", mask)
    done, paths = build(tmp_path, "--skip_bad", 1, "--use_tiling", 1, "--tile_size", 128, "--train_fraction", 0.5)
    assert done.returncode == 0 and "masks with the value that stands for ignored pixels (1)" in done.stdout, (
        done.stdout
    )
    for path in paths:
        with Database(path) as database:
            assert "1.tif" not in database.metadata.names
