"""Borders, numbers and measures of objects, compared with computations on the complete image."""

import csv
import itertools
import json

import numpy as np
import pytest
import rasterio
import tifffile
from conftest import errors_of, make_pair, run_script, write_tiff
from scipy import ndimage
from skimage.measure import label, regionprops_table
from skimage.segmentation import expand_labels
from test_inference_unet import infer, save_random_model

from lmdb_utils import Database
from objects import (
    BORDER,
    Numbering,
    ObjectCensus,
    ObjectClasses,
    ObjectTable,
    Overlaps,
    grown,
    numbered,
)


def find(classes, rows, has_border, smallest=1, distance=0):
    """Return the ids, the number and the strips of the objects in a class mask taken `rows` rows at a time."""
    strips = [slice(first, min(first + rows, len(classes))) for first in range(0, len(classes), rows)]
    numbering = Numbering(has_border, smallest)
    for strip in strips:
        numbering.add(classes[strip])
    ids = numbering.finish()
    found = numbered(((strip, classes[strip]) for strip in strips), ids, has_border)
    found = list(grown(found, distance) if distance else found)
    return np.concatenate([each.ids for each in found]), ids.objects, found


def blobs(seed, shape, classes):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    return np.digitize(noise, np.quantile(noise, np.linspace(0, 1, classes + 1)[1:-1])).astype(np.uint8)


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
@pytest.mark.parametrize("smallest", [1, 6])
def test_ids_are_those_of_the_complete_image(rows, smallest):
    for seed in range(10):
        classes = blobs(seed, (64, 50), 2)
        expected, count = ndimage.label(classes)
        areas = np.bincount(expected.ravel())
        kept = np.flatnonzero(areas[1:] >= smallest) + 1
        renumbered = np.zeros(count + 1, int)
        renumbered[kept] = np.arange(1, len(kept) + 1)
        ids, found, _ = find(classes, rows, False, smallest)
        np.testing.assert_array_equal(ids, renumbered[expected])
        assert found == len(kept)


@pytest.mark.parametrize("rows", [4, 9, 64])
def test_objects_grow_over_the_border(rows):
    for seed in range(20):
        classes = blobs(seed, (64, 50), 3)
        inside = ndimage.label(classes == 1)[0]
        expected = np.where(classes == BORDER, expand_labels(inside, 4), inside)
        ids, _, _ = find(classes, rows, True, distance=4)
        np.testing.assert_array_equal(ids, expected)


def drawn(*rows):
    """Return an array from strings of digits."""
    return np.array([[int(digit) for digit in row] for row in rows], np.int32)


def test_written_out_objects_get_their_ids():
    """Objects touch at a corner, surround a pixel, lie at each edge, and join only in a lower strip."""
    classes = drawn("1001000", "0110010", "0110101", "0000010", "1010000", "1110111", "0000001")
    expected = drawn("1002000", "0330040", "0330506", "0000070", "8080000", "8880999", "0000009")
    for rows in range(1, 8):
        ids, count, _ = find(classes.astype(np.uint8), rows, False)
        np.testing.assert_array_equal(ids, expected)
        assert count == 9


def test_objects_of_other_classes_are_other_objects():
    classes = blobs(0, (64, 50), 4)
    expected = label(classes, background=0, connectivity=1)
    np.testing.assert_array_equal(find(classes, 7, False)[0], expected)


def test_written_out_borders():
    ids = drawn("1122", "1122", "1102", "0000", "0333")
    assert ObjectClasses().apply(ids).tolist() == (ids > 0).astype(int).tolist()
    expected = drawn("1221", "1221", "1101", "0000", "0111")
    np.testing.assert_array_equal(ObjectClasses(1).apply(ids), expected)
    expected = drawn("1221", "1221", "2202", "0000", "0222")
    np.testing.assert_array_equal(ObjectClasses(1, True).apply(ids), expected)
    ignored = np.where(ids == 0, -1, ids)  # ignored pixels are not background
    expected = np.where(ids == 0, -1, ObjectClasses(1).apply(ids))
    np.testing.assert_array_equal(ObjectClasses(1, True).apply(ignored), expected)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("meets_background", [False, True])
def test_borders_are_those_of_a_search_pixel_by_pixel(width, meets_background):
    ids = ndimage.label(blobs(3, (30, 40), 2))[0]
    ids[:, 20:] += 100 * (ids[:, 20:] > 0)
    offsets = [(i, j) for i in range(-width, width + 1) for j in range(-width, width + 1) if i * i + j * j <= width**2]
    expected = (ids > 0).astype(int)
    for row, column in np.argwhere(ids):
        for i, j in offsets:
            if 0 <= row + i < 30 and 0 <= column + j < 40:
                other = ids[row + i, column + j]
                if other != ids[row, column] and (other or meets_background):
                    expected[row, column] = BORDER
    np.testing.assert_array_equal(ObjectClasses(width, meets_background).apply(ids), expected)
    assert 0 < np.count_nonzero(expected == BORDER) < np.count_nonzero(ids)


def test_the_census_counts_objects_and_pairs_once():
    ids = drawn("1120", "1133", "4400", "4055")
    census = ObjectCensus.of(ids)
    assert census.ids.tolist() == [1, 2, 3, 4, 5]
    assert census.touching.tolist() == [[1, 2], [1, 3], [1, 4], [2, 3]]
    parts = ObjectCensus.of(ids[:3]).joined(ObjectCensus.of(ids[1:]))
    assert parts.ids.tolist() == census.ids.tolist() and parts.touching.tolist() == census.touching.tolist()


@pytest.mark.parametrize("has_border", [False, True])
def test_measures_are_those_of_regionprops(has_border):
    classes, rng = blobs(5, (64, 50), 3), np.random.default_rng(0)
    image = rng.normal(100, 20, (64, 50, 2))
    missing = np.zeros(image.shape, bool)
    missing[10:30, 5:20, 1] = True
    ids, count, strips = find(classes, 9, has_border, distance=3 * has_border)
    table = ObjectTable(count, 2)
    for strip in strips:
        table.add(strip, image[strip.rows], missing[strip.rows])
    expected = regionprops_table(ids, properties=("area", "centroid", "bbox"))
    np.testing.assert_array_equal(table.areas, expected["area"])
    np.testing.assert_allclose(table.centroids.T, [expected["centroid-0"], expected["centroid-1"]])
    np.testing.assert_array_equal(table.boxes.T, [expected[f"bbox-{edge}"] for edge in range(4)])
    for index in range(count):
        inside = ids == index + 1
        if not has_border:
            assert set(classes[inside]) == {table.classes[index]}
        for channel in range(2):
            values = image[inside & ~missing[..., channel], channel]
            assert table.means[index, channel] == pytest.approx(values.mean() if len(values) else np.nan, nan_ok=True)
    assert not has_border or set(table.classes) == {1}


def matches_of(truth, found):
    """Return the numbers of true objects, found objects and, for each threshold, pairs with a larger overlap."""
    overlaps = []
    for one, other in itertools.product(np.unique(truth[truth > 0]), np.unique(found[found > 0])):
        union = np.count_nonzero((truth == one) | (found == other))
        overlaps.append(np.count_nonzero((truth == one) & (found == other)) / union)
    hits = [sum(overlap > 0.5 + 0.05 * step for overlap in overlaps) for step in range(10)]
    return len(np.unique(truth[truth > 0])), len(np.unique(found[found > 0])), hits


def test_matches_are_those_of_all_pairs():
    truth = ndimage.label(blobs(1, (60, 60), 2))[0]
    found = ndimage.label(np.roll(blobs(1, (60, 60), 2), 1, axis=0))[0]
    found[:, :10] = 0
    overlaps = Overlaps()
    for first in range(0, 60, 13):
        overlaps.add(truth[first : first + 13], found[first : first + 13])
    assert tuple(overlaps.matches()) == matches_of(truth, found)
    ignored = np.zeros(truth.shape, bool)
    ignored[20:] = True
    overlaps = Overlaps()
    overlaps.add(truth, found, ignored)
    assert tuple(overlaps.matches()) == matches_of(truth[:20], found[:20])


# ---------------------------------------------------------------------------------------------- build


def build(folder, *options):
    folders = ["--image_folder", folder / "images", "--mask_folder", folder / "masks", "--output_folder", folder / "db"]
    return run_script("build_lmdb.py", *folders, *options)


def write_objects(folder, shape=(64, 80), count=3, dtype="uint16", factor=1):
    """Write images and masks of numbered objects, some of which touch; return the masks."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    masks = []
    for index in range(count):
        image, classes = make_pair(index, (*shape, 1))
        ids = ndimage.label(classes)[0]
        ids[:, shape[1] // 2 :] += ids.max() * (ids[:, shape[1] // 2 :] > 0)
        masks.append((ids * factor).astype(dtype))
        write_tiff(folder / "images" / f"a{index}.tif", image)
        tifffile.imwrite(folder / "masks" / f"a{index}.tif", masks[-1])
    return masks


def records_of(folder):
    """Yield the name, mask, row and column of each record."""
    for side in ("train", "test"):
        with Database(folder / "db" / f"{side}-dataset.lmdb") as database:
            for index in range(database.metadata.count):
                stored = database.record(index)
                metadata = database.metadata
                name = metadata.names[metadata.record_image[index]]
                yield name, stored.mask.copy(), metadata.record_row[index], metadata.record_column[index]


@pytest.mark.parametrize("dtype, factor", [("uint8", 1), ("uint16", 1000), ("int32", 2**20), ("uint32", 2**20)])
def test_ids_of_any_type_become_classes_with_borders(tmp_path, dtype, factor):
    masks = write_objects(tmp_path, dtype=dtype, factor=factor)
    ring = dtype == "int32"
    done = build(tmp_path, "--objects", 1, "--border_width", 2, "--border_to_background", int(ring))
    assert done.returncode == 0, done.stdout
    rule = ObjectClasses(2, ring)
    for name, mask, _, _ in records_of(tmp_path):
        np.testing.assert_array_equal(mask, rule.apply(masks[int(name[1])].astype(np.int64)))
    counts = [ObjectCensus.of(mask) for mask in masks]
    logged = [line for line in done.stdout.splitlines() if " objects, " in line]
    total = [int(line.split(" objects, ")[0].split()[-1]) for line in logged]
    touching = [int(line.split(" objects, ")[1].split()[0]) for line in logged]
    assert sum(total) == sum(len(census.ids) for census in counts)
    assert sum(touching) == sum(len(census.touching) for census in counts) > 0


def test_borders_do_not_depend_on_tiles(tmp_path):
    masks = write_objects(tmp_path, (300, 260))
    done = build(tmp_path, "--objects", 1, "--border_width", 3, "--use_tiling", 1, "--tile_size", 112)
    assert done.returncode == 0, done.stdout
    total = sum(len(ObjectCensus.of(mask).ids) for mask in masks)
    logged = [line.split(" objects, ")[0].split()[-1] for line in done.stdout.splitlines() if " objects, " in line]
    assert sum(map(int, logged)) == total
    expected = [ObjectClasses(3).apply(mask.astype(int)) for mask in masks]
    covered = [np.zeros(mask.shape, bool) for mask in masks]
    for name, mask, row, column in records_of(tmp_path):
        place = slice(row, row + 112), slice(column, column + 112)
        counted = mask != 255  # some pixels of a test tile belong to its neighbors
        np.testing.assert_array_equal(mask[counted], expected[int(name[1])][place][counted])
        covered[int(name[1])][place] |= counted
    assert all(each.all() for each in covered)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--objects", 1, "--label_map", "0:0,1-9:1"], "all objects become class 1"),
        (["--border_width", 2], "need --objects 1"),
        (["--objects", 1, "--border_to_background", 1], "try --border_width 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, words):
    write_objects(tmp_path)
    done = build(tmp_path, *options)
    assert done.returncode == 2 and words in "\n".join(errors_of(done.stdout)), done.stdout


@pytest.mark.parametrize("value, dtype", [(-3, "int32"), (2**31, "uint32")])
def test_ids_out_of_range_are_refused_unless_ignored(tmp_path, value, dtype):
    masks = write_objects(tmp_path, dtype=dtype)
    masks[1][:5, :5] = value
    tifffile.imwrite(tmp_path / "masks" / "a1.tif", masks[1])
    done = build(tmp_path, "--objects", 1)
    assert done.returncode == 2 and f"found {value}" in "\n".join(errors_of(done.stdout)), done.stdout
    done = build(tmp_path, "--objects", 1, f"--ignore_value={value}")
    assert done.returncode == 0, done.stdout
    [mask] = [mask for name, mask, _, _ in records_of(tmp_path) if name == "a1.tif"]
    assert (mask[:5, :5] == 255).all() and np.count_nonzero(mask == 255) == 25


def test_masks_of_many_ids_are_advised_to_use_it(tmp_path):
    write_objects(tmp_path, factor=7)
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, np.arange(64 * 80).reshape(64, 80).astype(np.uint16))
    done = build(tmp_path)
    assert done.returncode == 0 and "--objects 1" in done.stdout


# ---------------------------------------------------------------------------------------------- inference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    save_random_model(folder, 1, 3, seed=5, objects={"border_width": 2, "meets_background": False})
    return folder


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "saved_model"
    save_random_model(folder, 1, 3, seed=5)
    return folder


def objects_of(mask, has_border):
    """Return the object ids of a complete mask."""
    if not has_border:
        return label(mask, background=0, connectivity=1)
    inside = ndimage.label(mask == 1)[0]
    return np.where(mask == BORDER, expand_labels(inside, 4), inside)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("has_border", [False, True])
def test_objects_are_those_of_the_complete_mask(tmp_path, model, plain_model, has_border):
    masks = write_objects(tmp_path, (300, 260), 2)
    truth = ["--mask_folder", tmp_path / "masks"] if has_border else []
    found = []
    for tile_size in (None, 224, 256):
        out = tmp_path / f"out{tile_size}"
        tiles = ["--tile_size", tile_size] if tile_size else []
        options = ["--save_objects", 1, "--save_report", 1, *truth, *tiles]
        done = infer(model if has_border else plain_model, tmp_path / "images", out, *options)
        assert done.returncode == 0, done.stdout
        found.append([tifffile.imread(out / "objects" / f"a{index}.tif") for index in range(2)])
        page = (out / "report.html").read_text()
        assert "shown in colors instead" in page and ("average precision" in page) == has_border
        rows = rows_of(out / "objects.csv")
        for index in range(2):
            mask = tifffile.imread(out / f"a{index}.tif")
            expected = objects_of(mask, has_border)
            assert expected.max() > 20
            np.testing.assert_array_equal(found[-1][index], expected)
            assert found[-1][index].dtype == np.uint32
            image = tifffile.imread(tmp_path / "images" / f"a{index}.tif")
            properties = ("label", "area", "centroid", "bbox", "mean_intensity")
            expected = regionprops_table(expected, image, properties=properties)
            of_image = [row for row in rows if row["image"] == f"a{index}.tif"]
            for name, column in (
                ("id", "label"), ("pixels", "area"), ("row", "centroid-0"), ("column", "centroid-1"),
                ("first_row", "bbox-0"), ("first_column", "bbox-1"), ("end_row", "bbox-2"), ("end_column", "bbox-3"),
                ("mean_0", "mean_intensity"),
            ):  # fmt: skip
                np.testing.assert_allclose([float(row[name]) for row in of_image], expected[column], atol=6e-3)
        if has_border:
            scores = {row["image"]: row for row in rows_of(out / "scores.csv")}
            precision = []
            for index in range(2):
                true, number, hits = matches_of(masks[index], found[-1][index])
                row = scores[f"a{index}.tif"]
                assert (int(row["true_objects"]), int(row["found_objects"])) == (true, number)
                precision.append([hit / (true + number - hit) for hit in hits])
                assert float(row["ap_50"]) == pytest.approx(precision[-1][0], abs=1e-6)
            assert float(scores["total"]["ap"]) == pytest.approx(np.mean(precision), abs=1e-6)
    for other in found[1:]:
        for one, another in zip(found[0], other):
            np.testing.assert_array_equal(one, another)


def test_objects_are_made_later_and_made_again_for_new_masks(tmp_path, model):
    write_objects(tmp_path, count=2)
    out, options = tmp_path / "out", ["--save_objects", 1]
    assert infer(model, tmp_path / "images", out).returncode == 0
    done = infer(model, tmp_path / "images", out, *options)
    assert done.returncode == 0 and "2 masks already exist" in done.stdout
    before = tifffile.imread(out / "objects" / "a0.tif")
    np.testing.assert_array_equal(before, objects_of(tifffile.imread(out / "a0.tif"), True))
    stamp = (out / "objects" / "a0.tif").stat().st_mtime_ns
    assert infer(model, tmp_path / "images", out, *options).returncode == 0
    assert (out / "objects" / "a0.tif").stat().st_mtime_ns == stamp
    done = infer(model, tmp_path / "images", out, *options, "--smallest_object", 9)
    assert done.returncode == 0
    ids = tifffile.imread(out / "objects" / "a0.tif")
    inside = np.bincount(ndimage.label(tifffile.imread(out / "a0.tif") == 1)[0].ravel())[1:]
    assert ids.max() == np.count_nonzero(inside >= 9) < before.max()
    # A run that replaces masks without numbering objects removes the objects of the old masks.
    assert infer(model, tmp_path / "images", out, "--overwrite", 1).returncode == 0
    assert not (out / "objects" / "a0.tif").exists() and not list((out / "figures").glob("*.objects.csv"))
    done = infer(model, tmp_path / "images", out, "--smallest_object", 9)
    assert done.returncode == 2 and "--save_objects" in "\n".join(errors_of(done.stdout))


def test_files_of_others_are_left_alone(tmp_path, model):
    """True masks and other files in the folder ``objects`` are kept; images that would share a file are refused."""
    masks = write_objects(tmp_path, count=1)
    out = tmp_path / "out"
    (out / "objects").mkdir(parents=True)
    (tmp_path / "masks" / "a0.tif").rename(out / "objects" / "a0.tif")
    options = ["--save_objects", 1, "--overwrite", 1]
    done = infer(model, tmp_path / "images", out, "--mask_folder", out / "objects", *options)
    assert done.returncode == 2 and "would replace the true mask" in "\n".join(errors_of(done.stdout)), done.stdout
    done = infer(model, tmp_path / "images", out, *options)
    assert done.returncode == 2 and "was not written by this program" in "\n".join(errors_of(done.stdout)), done.stdout
    assert infer(model, tmp_path / "images", out, "--overwrite", 1).returncode == 0
    np.testing.assert_array_equal(tifffile.imread(out / "objects" / "a0.tif"), masks[0])
    done = infer(model, tmp_path / "images", out, "--mask_folder", out / "objects", "--save_table", 1)
    assert done.returncode == 0, done.stdout
    (tmp_path / "images" / "a0.tiff").write_bytes((tmp_path / "images" / "a0.tif").read_bytes())
    done = infer(model, tmp_path / "images", tmp_path / "other", "--save_objects", 1)
    assert done.returncode == 2 and "would both become" in "\n".join(errors_of(done.stdout)), done.stdout


def test_thumbnails_show_objects_once_these_are_numbered(tmp_path, model):
    write_objects(tmp_path, count=1)
    fresh, out, other = (tmp_path / name for name in ("fresh", "out", "other"))
    both = ["--save_report", 1, "--save_objects", 1]
    assert infer(model, tmp_path / "images", fresh, *both).returncode == 0
    expected = (fresh / "figures" / "a0.tif.jpg").read_bytes()
    for folder, first in ((out, "--save_report"), (other, "--save_objects")):
        assert infer(model, tmp_path / "images", folder, first, 1).returncode == 0
        thumbnail = folder / "figures" / "a0.tif.jpg"
        assert not thumbnail.exists() or thumbnail.read_bytes() != expected
        assert infer(model, tmp_path / "images", folder, "--save_objects", 1).returncode == 0
        assert infer(model, tmp_path / "images", folder, *both).returncode == 0
        assert thumbnail.read_bytes() == expected


def test_training_hands_the_classes_of_objects_to_inference(tmp_path):
    write_objects(tmp_path, count=4)
    assert build(tmp_path, "--objects", 1, "--border_width", 2).returncode == 0
    train = ["--train_database", tmp_path / "db" / "train-dataset.lmdb"]
    test = ["--test_database", tmp_path / "db" / "test-dataset.lmdb"]
    options = ["--number_classes", 3, "--baseline_feature_depth", 2, "--test_every_n_steps", 1, "--max_epochs", 1]
    done = run_script("train_unet.py", *train, *test, "--output_dir", tmp_path / "run", *options)
    assert done.returncode == 0, done.stdout
    truth = ["--mask_folder", tmp_path / "masks", "--save_objects", 1]
    done = infer(tmp_path / "run" / "saved_model", tmp_path / "images", tmp_path / "out", *truth)
    assert done.returncode == 0 and "average precision" in done.stdout, done.stdout
    scores = {row["image"]: row for row in rows_of(tmp_path / "out" / "scores.csv")}
    expected = len(ObjectCensus.of(tifffile.imread(tmp_path / "masks" / "a2.tif").astype(int)).ids)
    assert int(scores["a2.tif"]["true_objects"]) == expected
    (tmp_path / "db" / "test-dataset.lmdb").rename(tmp_path / "test.lmdb")
    assert build(tmp_path, "--objects", 1, "--border_width", 1).returncode == 0
    mixed = ["--test_database", tmp_path / "test.lmdb", "--output_dir", tmp_path / "mixed"]
    done = run_script("train_unet.py", *train, *mixed, *options)
    assert done.returncode == 2 and "--objects" in "\n".join(errors_of(done.stdout)), done.stdout


def test_pixels_without_data_are_in_no_object(tmp_path, model):
    """The image is processed in two strips."""
    write_objects(tmp_path, (1100, 1000), 1)
    image = tifffile.imread(tmp_path / "images" / "a0.tif")
    image[1000:1080, 20:50] = 9999
    tifffile.imwrite(tmp_path / "images" / "a0.tif", image)
    options = ["--save_objects", 1, "--image_no_data", 9999, "--no_data_class", 1]
    done = infer(model, tmp_path / "images", tmp_path / "out", *options, "--mask_folder", tmp_path / "masks")
    assert done.returncode == 0, done.stdout
    mask, ids = (tifffile.imread(tmp_path / "out" / name) for name in ("a0.tif", "objects/a0.tif"))
    assert (mask[image == 9999] == 1).all()
    np.testing.assert_array_equal(ids, objects_of(np.where(image == 9999, 0, mask), True))
    [row, _] = rows_of(tmp_path / "out" / "scores.csv")
    truth = np.where(image == 9999, 0, tifffile.imread(tmp_path / "masks" / "a0.tif"))
    assert int(row["true_objects"]) == len(ObjectCensus.of(truth.astype(int)).ids)
    assert all(float(row["mean_0"]) < 9000 for row in rows_of(tmp_path / "out" / "objects.csv"))


def test_shards_pool_their_objects(tmp_path, model):
    write_objects(tmp_path)
    for part in ("1/2", "2/2"):
        assert infer(model, tmp_path / "images", tmp_path / "out", "--save_objects", 1, "--shard", part).returncode == 0
    assert infer(model, tmp_path / "images", tmp_path / "all", "--save_objects", 1).returncode == 0
    assert (tmp_path / "out" / "objects.csv").read_bytes() == (tmp_path / "all" / "objects.csv").read_bytes()


def test_objects_lie_where_their_image_lies(tmp_path, model):
    write_objects(tmp_path, count=1)
    image = tifffile.imread(tmp_path / "images" / "a0.tif")
    transform = rasterio.Affine(10, 0, 600000, 0, -20, 5100000)
    with rasterio.open(
        tmp_path / "images" / "a0.tif", "w", driver="GTiff", height=64, width=80, count=1, dtype="uint16",
        crs="EPSG:32632", transform=transform,
    ) as file:  # fmt: skip
        file.write(image, 1)
    assert infer(model, tmp_path / "images", tmp_path / "out", "--save_objects", 1).returncode == 0
    with rasterio.open(tmp_path / "out" / "objects" / "a0.tif") as file:
        assert file.transform == transform and file.crs.to_epsg() == 32632
    rows = rows_of(tmp_path / "out" / "objects.csv")
    assert len(rows) > 3
    for row in rows:
        expected = rasterio.transform.xy(transform, float(row["row"]), float(row["column"]))
        assert (float(row["map_x"]), float(row["map_y"])) == pytest.approx(expected, abs=0.2)
        assert float(row["area"]) == pytest.approx(200 * int(row["pixels"])) and row["unit"] == "m²"


def test_objects_of_stacks_are_stacks(tmp_path, model):
    (tmp_path / "images").mkdir()
    planes = np.stack([make_pair(seed, (64, 80, 1))[0][..., 0] for seed in range(3)])
    tifffile.imwrite(tmp_path / "images" / "a.ome.tif", planes, ome=True, metadata={"axes": "ZYX"})
    out, options = tmp_path / "out", ["--stack", "planes", "--save_objects", 1]
    assert infer(model, tmp_path / "images", out, "--stack", "planes").returncode == 0
    for run in range(2):
        done = infer(model, tmp_path / "images", out, *options, "--overwrite", run)
        assert done.returncode == 0 and not (out / "planes").exists(), done.stdout
        masks, ids = tifffile.imread(out / "a.ome.tif"), tifffile.imread(out / "objects" / "a.ome.tif")
        for mask, found in zip(masks, ids):
            np.testing.assert_array_equal(found, objects_of(mask, True))
        assert {row["image"] for row in rows_of(out / "objects.csv")} == {f"a.ome.tif#z{z}" for z in range(3)}


def test_figures_of_an_earlier_version_are_read(tmp_path, model):
    write_objects(tmp_path, count=1)
    out = tmp_path / "out"
    assert infer(model, tmp_path / "images", out, "--save_table", 1).returncode == 0
    path = out / "figures" / "a0.tif.json"
    values = json.loads(path.read_text())
    del values["objects"]
    path.write_text(json.dumps(values))
    assert infer(model, tmp_path / "images", out, "--save_objects", 1).returncode == 0
    assert json.loads(path.read_text())["objects"][1] == tifffile.imread(out / "objects" / "a0.tif").max()
