"""Scores of inference, compared with scores of complete arrays."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import skimage.io
import tifffile
from conftest import errors_of, make_pair, write_tiff
from PIL import Image
from skimage.segmentation import find_boundaries
from test_inference_unet import infer, save_random_model

from image_files import read_image

CLASSES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    save_random_model(folder, 1, CLASSES, label_map="0:0,10:1,20:2,255:ignore")
    return folder


@pytest.fixture
def folders(tmp_path):
    """Write images and true masks with some ignored pixels; the last image has no mask."""
    images, truth = tmp_path / "images", tmp_path / "truth"
    images.mkdir()
    truth.mkdir()
    for index, shape in enumerate([(64, 80), (300, 500), (48, 64), (64, 64)]):
        write_tiff(images / f"cell{index}.tif", make_pair(index, (*shape, 1), "uint8")[0])
        if index < 3:
            mask = np.random.default_rng(index).choice(np.array([0, 10, 20, 255], np.uint8), shape)
            skimage.io.imsave(truth / f"cell{index}_gt.png", mask, check_contrast=False)
    return images, truth


def score(model, folders, masks, *options):
    return infer(model, folders[0], masks, "--mask_folder", folders[1], "--mask_suffix", "_gt", *options)


def expected_confusion(truth, predicted):
    """Return the confusion matrix of one image, counted pixel by pixel."""
    confusion = np.zeros((CLASSES, CLASSES), int)
    for value, found in zip(truth.ravel(), predicted.ravel()):
        if value != 255:
            confusion[value // 10, found] += 1
    return confusion


def read_scores(masks):
    with open(masks / "scores.csv", newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def check_scores(folders, masks, names=("cell0", "cell1", "cell2")):
    """Compare scores.csv and confusion.csv with figures computed from the mask and truth files."""
    rows, total = read_scores(masks), np.zeros((CLASSES, CLASSES), int)
    assert sorted(rows) == [*(f"{name}.tif" for name in names), "total"]
    for name in (*names, None):
        if name is None:
            row, confusion = rows["total"], total
        else:
            truth = skimage.io.imread(folders[1] / f"{name}_gt.png")
            row, confusion = rows[f"{name}.tif"], expected_confusion(truth, read_image(masks / f"{name}.tif")[..., 0])
            total += confusion
        hits, sizes = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
        assert int(row["pixels"]) == confusion.sum()
        iou = hits / (sizes - hits)
        np.testing.assert_allclose(float(row["accuracy"]), hits.sum() / confusion.sum(), atol=1e-6)
        np.testing.assert_allclose(float(row["mean_iou"]), iou.mean(), atol=1e-6)
        for class_id in range(CLASSES):
            np.testing.assert_allclose(float(row[f"iou_{class_id}"]), iou[class_id], atol=1e-6)
            np.testing.assert_allclose(float(row[f"dice_{class_id}"]), 2 * hits[class_id] / sizes[class_id], atol=1e-6)
    with open(masks / "confusion.csv", newline="") as file:
        found = [list(map(int, row)) for row in list(csv.reader(file))[1:]]
    np.testing.assert_array_equal(found, np.column_stack([range(CLASSES), total]))


def test_scores_are_those_of_the_complete_images(tmp_path, model, folders):
    done = score(model, folders, tmp_path / "masks", "--tile_size", 256)
    assert done.returncode == 0, done.stdout
    check_scores(folders, tmp_path / "masks")
    assert "1 image without a mask in" in done.stdout and "cell3.tif" in done.stdout
    assert (tmp_path / "masks" / "cell3.tif").exists()
    assert "scores of 3 images: accuracy" in done.stdout and "lowest mean IoU: cell" in done.stdout


def test_masks_without_figures_are_scored_from_their_files(tmp_path, model, folders):
    masks = tmp_path / "masks"
    assert infer(model, folders[0], masks).returncode == 0
    assert not (masks / "figures").exists()
    assert score(model, folders, masks).returncode == 0
    check_scores(folders, masks)
    # Figures are read from their files unless the truth has changed since.
    file = masks / "figures" / "cell0.tif.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "confusion": [[7, 0, 0], [0, 7, 0], [0, 0, 7]]}))
    assert score(model, folders, masks).returncode == 0
    assert read_scores(masks)["cell0.tif"]["pixels"] == "21"
    file.write_text("{")
    assert score(model, folders, masks).returncode == 0
    check_scores(folders, masks)
    changed = skimage.io.imread(folders[1] / "cell0_gt.png")
    changed[:20] = 10
    skimage.io.imsave(folders[1] / "cell0_gt.png", changed, check_contrast=False)
    assert score(model, folders, masks).returncode == 0
    check_scores(folders, masks)


def test_shards_and_lost_masks_count_once(tmp_path, model, folders):
    masks = tmp_path / "masks"
    for part in "2/2", "1/2":
        assert score(model, folders, masks, "--shard", part).returncode == 0
    check_scores(folders, masks)
    (masks / "cell1.tif").unlink()
    (folders[0] / "cell1.tif").rename(tmp_path / "cell1.tif")
    assert score(model, folders, masks).returncode == 0
    check_scores(folders, masks, ("cell0", "cell2"))


def test_a_mask_that_is_replaced_without_truth_loses_its_figures(tmp_path, model, folders):
    masks = tmp_path / "masks"
    assert score(model, folders, masks).returncode == 0
    other = tmp_path / "other" / "saved_model"
    save_random_model(other, 1, CLASSES, seed=1, label_map="0:0,10:1,20:2,255:ignore")
    assert infer(other, folders[0], masks, "--overwrite", 1).returncode == 0
    assert score(other, folders, masks).returncode == 0
    check_scores(folders, masks)


def test_pixels_without_data_are_not_scored(tmp_path, model):
    folders = tmp_path / "images", tmp_path / "truth"
    for folder in folders:
        folder.mkdir()
    image = make_pair(0, (64, 64, 1), "uint8")[0][..., 0].astype("float32")
    image[:16] = np.nan
    tifffile.imwrite(folders[0] / "a.tif", image)
    skimage.io.imsave(folders[1] / "a_gt.png", np.full((64, 64), 10, np.uint8), check_contrast=False)
    masks = tmp_path / "masks"
    for _ in range(2):
        assert score(model, folders, masks, "--no_data_class", 9).returncode == 0
        assert read_scores(masks)["total"]["pixels"] == str(48 * 64)
        shutil.rmtree(masks / "figures")  # so that the next run scores the mask file


def test_wrong_pixels_are_drawn_into_the_overlay(tmp_path, model, folders):
    masks = tmp_path / "masks"
    assert score(model, folders, masks, "--save_overlay", 1).returncode == 0
    assert infer(model, folders[0], tmp_path / "plain", "--save_overlay", 1).returncode == 0
    truth, found = skimage.io.imread(folders[1] / "cell0_gt.png"), read_image(masks / "cell0.tif")[..., 0]
    with_errors, plain = (np.array(Image.open(f / "overlays" / "cell0.png")) for f in (masks, tmp_path / "plain"))
    differs = (with_errors != plain).any(axis=2)
    wrong = (truth != 255) & (truth // 10 != found)
    outlined = find_boundaries(found, connectivity=1, mode="inner", background=0)
    assert not differs[~wrong | outlined].any() and differs[wrong & ~outlined].mean() > 0.9


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda mask: mask[:-1], "its mask"),
        (lambda mask: np.where(mask == 20, 30, mask).astype(np.uint8), "which --label_map 0:0,10:1"),
        (lambda mask: np.stack([mask] * 3, axis=2), "expected a single-channel mask"),
    ],
)
def test_truth_that_does_not_fit_is_reported(tmp_path, model, folders, change, words):
    path = folders[1] / "cell0_gt.png"
    skimage.io.imsave(path, change(skimage.io.imread(path)), check_contrast=False)
    done = score(model, folders, tmp_path / "masks")
    assert (
        done.returncode == 2 and words in "".join(errors_of(done.stdout)) and "cell0" in "".join(errors_of(done.stdout))
    )
    assert "Traceback" not in done.stdout
    check_scores(folders, tmp_path / "masks", ("cell1", "cell2"))


def test_a_class_that_the_model_lacks_is_reported(tmp_path, folders):
    save_random_model(tmp_path / "saved_model", 1, CLASSES)
    done = score(tmp_path / "saved_model", folders, tmp_path / "masks")
    assert done.returncode == 2 and "expected classes 0 to 2 in" in "".join(errors_of(done.stdout))


def test_options_that_lead_to_no_truth_are_refused(tmp_path, model, folders):
    done = infer(model, folders[0], tmp_path / "masks", "--mask_folder", folders[1])
    assert done.returncode == 2 and "try --mask_suffix _gt" in "".join(errors_of(done.stdout))
    done = infer(model, folders[0], tmp_path / "masks", "--mask_suffix", "_gt")
    assert done.returncode == 2 and "expected --mask_folder" in "".join(errors_of(done.stdout))
    done = infer(model, folders[0], tmp_path / "masks", "--mask_folder", folders[0])
    assert done.returncode == 2 and "is its own mask" in "".join(errors_of(done.stdout))
    assert not (tmp_path / "masks").exists()


def test_folds_are_pooled(tmp_path, model, folders):
    masks = tmp_path / "masks"
    for names in "cell0.tif\ncell2\n", "cell1.tif\n":
        (tmp_path / "list.txt").write_text(names)
        done = score(model, folders, masks, "--image_list", tmp_path / "list.txt")
        assert done.returncode == 0 and "no mask in" not in done.stdout
    check_scores(folders, masks)
    assert not (masks / "cell3.tif").exists()


@pytest.mark.parametrize(
    "names, words", [("cell7", "cell7 not in"), ("cell1\ncell1.tif", "more than once"), ("", "none")]
)
def test_a_list_of_images_that_cannot_be_is_refused(tmp_path, model, folders, names, words):
    (tmp_path / "list.txt").write_text(names)
    done = score(model, folders, tmp_path / "masks", "--image_list", tmp_path / "list.txt")
    assert done.returncode == 2 and words in "".join(errors_of(done.stdout))


def test_a_list_that_is_not_a_file_is_refused(tmp_path, model, folders):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "folder"):
        done = score(model, folders, tmp_path / "masks", "--image_list", path)
        [error] = errors_of(done.stdout)
        assert done.returncode == 2 and f"expected --image_list {path} to be a text file" in error
