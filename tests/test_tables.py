"""Tables and pages about masks, compared with figures from complete arrays."""

import csv
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import skimage.io
import tifffile
from conftest import build, errors_of, make_pair, run_script, write_tiff
from PIL import Image
from scipy import ndimage
from test_inference_unet import infer, save_random_model
from test_train_unet import arguments

from image_files import PixelSize, read_image
from reports import Figures, Measurement, RegionCounter, page_of_masks

CLASSES = 3
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def count_in_blocks(ids, height, width):
    """Return the number of regions of each class in an array (H, W), counted block by block."""
    counter = RegionCounter(int(ids.max()) + 1, ids.shape[1])
    for row in range(0, ids.shape[0], height):
        for column in range(0, ids.shape[1], width):
            counter.add(column, ids[row : row + height, column : column + width])
    return counter.counts.tolist()


@pytest.mark.parametrize("height, width", [(6, 7), (1, 1), (2, 3), (1, 7), (6, 1)])
def test_regions_that_meet_later_count_once(height, width):
    ids = np.array(
        [
            [1, 0, 1, 0, 1, 1, 1],
            [1, 0, 1, 0, 1, 0, 1],
            [1, 0, 1, 0, 1, 2, 1],
            [1, 1, 1, 0, 1, 1, 1],
            [0, 0, 0, 1, 0, 0, 0],
            [2, -1, 2, 0, 0, 2, 2],
        ]
    )
    # The U and the ring of ones touch the single one below only at a corner.
    assert count_in_blocks(ids, height, width) == [5, 3, 4]


def test_regions_are_those_of_the_complete_mask():
    rng = np.random.default_rng(0)
    for scale in (1, 3):
        ids = np.kron(rng.integers(-1, 4, (60 // scale, 90 // scale)), np.ones((scale, scale), int))
        expected = [ndimage.label(ids == class_id)[1] for class_id in range(4)]
        for height, width in ((60, 90), (16, 32), (7, 90), (60, 5)):
            assert count_in_blocks(ids, height, width) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    save_random_model(folder, 1, CLASSES)
    return folder


@pytest.fixture
def images(tmp_path):
    """Write three images; one declares its pixel size, and one has pixels without data."""
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = {"resolution": (2, 4), "metadata": {"unit": "um"}, "imagej": True}
    tifffile.imwrite(folder / "a.tif", make_pair(0, (300, 500, 1), "uint8")[0][..., 0], **sizes)
    image = make_pair(1, (280, 320, 1), "uint8")[0][..., 0].astype(np.float32)
    image[:200, 100:] = np.nan
    tifffile.imwrite(folder / "b.tif", image)
    write_tiff(folder / "c.tif", make_pair(2, (64, 64, 1), "uint8")[0])
    return folder


def read_table(masks):
    with open(masks / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def check_table(images, masks, names="abc", has_probability=True):
    """Compare table.csv with figures computed from the mask and probability files."""
    rows = read_table(masks)
    assert [(row["image"], row["class"]) for row in rows] == [
        (f"{n}.tif", str(c)) for n in names for c in range(CLASSES)
    ]
    for name in names:
        mask, image = read_image(masks / f"{name}.tif")[..., 0], read_image(images / f"{name}.tif")[..., 0]
        known = ~np.isnan(image.astype(float))
        area = 0.5 * 0.25 if name == "a" else None
        for class_id, row in enumerate(row for row in rows if row["image"] == f"{name}.tif"):
            found = (mask == class_id) & known
            regions = ndimage.label(found)[1]
            assert (int(row["pixels"]), int(row["regions"])) == (found.sum(), regions)
            assert float(row["share"]) == pytest.approx(found.sum() / known.sum(), abs=1e-6)
            assert row["unit"] == ("" if area is None else "µm²")
            if regions:
                assert float(row["mean_region_pixels"]) == pytest.approx(found.sum() / regions, rel=1e-5)
            if area is not None:
                assert float(row["area"]) == pytest.approx(found.sum() * area, rel=1e-5)
                assert float(row["mean_region_area"]) == pytest.approx(found.sum() * area / regions, rel=1e-5)
            if has_probability:
                softmax = tifffile.imread(masks / "probabilities" / f"{name}.tif")
                expected = softmax.max(axis=2)[known].mean(dtype=np.float64)
                assert float(row["mean_probability"]) == pytest.approx(expected, abs=2e-6)
            else:
                assert row["mean_probability"] == ""


def test_the_table_is_that_of_the_complete_masks(tmp_path, model, images):
    masks = tmp_path / "masks"
    done = infer(model, images, masks, "--save_table", 1, "--save_probabilities", 1, "--tile_size", 224)
    assert done.returncode == 0, done.stdout
    check_table(images, masks)
    assert not (masks / "scores.csv").exists() and not (masks / "report.html").exists()


def test_masks_of_earlier_runs_and_of_shards_are_in_the_table_once(tmp_path, model, images):
    masks = tmp_path / "masks"
    assert infer(model, images, masks, "--shard", "2/3").returncode == 0
    for part in "1/3", "3/3":
        done = infer(model, images, masks, "--save_table", 1, "--shard", part, "--save_probabilities", 1)
        assert done.returncode == 0, done.stdout
    check_table(images, masks, "ac")
    assert infer(model, images, masks, "--save_table", 1).returncode == 0
    rows = {row["image"]: row["mean_probability"] for row in read_table(masks)}
    assert rows["a.tif"] and rows["c.tif"] and not rows["b.tif"]
    for path in masks.glob("figures/*"):
        path.unlink()
    assert infer(model, images, masks, "--save_table", 1).returncode == 0
    check_table(images, masks, has_probability=False)


def test_scores_that_are_asked_for_later_keep_what_is_known(tmp_path, model, images):
    masks, truth = tmp_path / "masks", tmp_path / "truth"
    assert infer(model, images, masks, "--save_table", 1).returncode == 0
    before = (masks / "table.csv").read_bytes()
    truth.mkdir()
    tifffile.imwrite(truth / "a.tif", np.zeros((300, 500), np.uint8))
    done = infer(model, images, masks, "--save_table", 1, "--mask_folder", truth)
    assert done.returncode == 0 and "scores of 1 image" in done.stdout, done.stdout
    assert (masks / "table.csv").read_bytes() == before


def test_a_mask_that_was_replaced_loses_figures_and_thumbnail(tmp_path, model, images):
    masks = tmp_path / "masks"
    assert infer(model, images, masks, "--save_report", 1).returncode == 0
    assert len(list((masks / "figures").iterdir())) == 6
    assert infer(model, images, masks, "--overwrite", 1).returncode == 0
    assert not list((masks / "figures").iterdir())


def rendered(page, tmp_path, column):
    """Return the text of each row after a click on a column header, and the console errors."""
    errors = "<script>window.seen = []; window.onerror = (message) => window.seen.push(message);</script>"
    click = f"""<script>
        const found = [...document.querySelectorAll("th")].filter((head) => head.textContent === "{column}").pop();
        found.firstElementChild.click();
        const rows = [...found.closest("table").tBodies[0].rows].map((row) => row.innerText);
        document.body.textContent = "<<" + JSON.stringify({{rows, seen: window.seen}}) + ">>";
    </script>"""
    text = page.read_text().replace("<head>", f"<head>{errors}").replace("</body>", f"{click}</body>")
    copy = tmp_path / "copy.html"
    copy.write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--dump-dom", copy],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    result = json.loads(re.search("&lt;&lt;(.*)&gt;&gt;", done.stdout)[1].replace("&amp;", "&"))
    return result["rows"], result["seen"] + re.findall(r".*CONSOLE.*", done.stderr)


def check_page(page):
    """Check that a page needs no other file."""
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=(?!\"data:image)", text) and "http" not in text.replace("http-equiv", "")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_about_masks_opens_and_sorts(tmp_path, model, images):
    masks, truth = tmp_path / "masks", tmp_path / "truth"
    truth.mkdir()
    for name in "ab":
        size = read_image(images / f"{name}.tif").shape[:2]
        skimage.io.imsave(truth / f"{name}.png", np.ones(size, np.uint8), check_contrast=False)
    done = infer(model, images, masks, "--save_report", 1, "--mask_folder", truth)
    assert done.returncode == 0, done.stdout
    page = masks / "report.html"
    check_page(page)
    text = page.read_text()
    assert text.count("data:image/jpeg") == 3 and "Scores of 2 images" in text and f"model {model}" in text
    rows, errors = rendered(page, tmp_path, "pixels")
    assert not errors
    assert [row.split()[0] for row in rows] == ["c.tif", "b.tif", "a.tif"]


def test_thumbnails_show_image_and_mask(tmp_path, model, images):
    masks = tmp_path / "masks"
    assert infer(model, images, masks).returncode == 0
    assert infer(model, images, masks, "--save_report", 1).returncode == 0  # for existing masks
    later = {path.name: np.array(Image.open(path), int) for path in (masks / "figures").glob("*.jpg")}
    assert infer(model, images, masks, "--save_report", 1, "--overwrite", 1).returncode == 0
    for name, picture in later.items():
        now = np.array(Image.open(masks / "figures" / name), int)
        assert now.shape == picture.shape and max(now.shape) <= 512 and np.abs(now - picture).mean() < 1
    assert later["a.tif.jpg"].shape == (150, 500, 3) and later["c.tif.jpg"].shape == (64, 128, 3)
    left, right = np.split(later["c.tif.jpg"], 2, axis=1)
    assert np.ptp(left, axis=2).mean() < 4 < np.ptp(right, axis=2).mean()  # gray image, colored outlines


def make_figures(index, iou=None, probability=0.5):
    """Return the figures of an image with two classes."""
    confusion = None if iou is None else np.array([[0, 0], [100 - iou, iou]])
    measurement = Measurement(2, 10)
    measurement.add(0, 0, np.zeros((10, 10), np.uint8))
    figures = measurement.figures(f"image{index}", PixelSize(1.0, 1.0, "m"), None)
    return figures._replace(confusion=confusion, probability=probability)


def test_a_page_has_at_most_500_images_the_worst_first(tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(600)]
    scored = [make_figures(i, iou=(7 * i) % 100) for i in range(600)]
    names = re.findall(r"<td data-key=\"(image\d+)\"", page_of_masks(tmp_path, 2, scored, paths, []))
    expected = sorted(range(600), key=lambda i: scored[i].mean_iou)[:500]
    assert names == [f"image{i}" for i in expected]
    uncertain = [make_figures(i, probability=math.cos(i) ** 2) for i in range(600)]
    names = re.findall(r"<td data-key=\"(image\d+)\"", page_of_masks(tmp_path, 2, uncertain, paths, []))
    assert names == [f"image{i}" for i in sorted(range(600), key=lambda i: math.cos(i) ** 2)[:500]]


def test_names_cannot_change_a_page(tmp_path):
    figures = make_figures(0)._replace(image='<script>alert("&")</script>')
    text = page_of_masks(tmp_path, 2, [figures], [tmp_path / "a.json"], ["<b>"])
    assert "<script>alert" not in text and "<b>" not in text


def test_figures_come_back_from_their_file(tmp_path):
    for figures in (make_figures(0), make_figures(1, iou=30)._replace(truth=["a.png", 3, 4], pixel_size=None)):
        figures.write(tmp_path / "a.json")
        found = Figures.read(tmp_path / "a.json", 2)
        assert str(found) == str(figures)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_about_a_training_opens_and_sorts(tmp_path):
    databases, folder = build(tmp_path, count=6, shape=(64, 64, 1)), tmp_path / "run"
    more = ["--test_every_n_steps", 2, "--max_epochs", 1]
    done = run_script("train_unet.py", *arguments(databases, folder, *more))
    assert done.returncode == 0, done.stdout
    page = folder / "report.html"
    check_page(page)
    text = page.read_text()
    assert text.count("data:image/png") == 2 and "Network of epoch 1, step 2" in text
    rows, errors = rendered(page, tmp_path, "name")
    assert not errors and len(rows) > 30
    names = [row.split()[0] for row in rows]
    assert names.index("batch_size") < names.index("learning_rate") < names.index("train_database")


def test_a_mask_has_the_pixel_size_that_ome_metadata_declare(tmp_path, model):
    (tmp_path / "images").mkdir()
    image, sizes = make_pair(0)[0][..., 0], {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    tifffile.imwrite(tmp_path / "images" / "a.tif", image, ome=True, metadata=sizes)
    assert infer(model, tmp_path / "images", tmp_path / "masks").returncode == 0
    with tifffile.TiffFile(tmp_path / "masks" / "a.tif") as file:
        page = file.pages[0]
        assert page.resolution == (20000, 40000) and page.resolutionunit == 3


@pytest.mark.parametrize("damage", ["folder", "image", "unit"])
def test_figures_that_somebody_changed_are_reported(tmp_path, model, images, damage):
    masks = tmp_path / "masks"
    assert infer(model, images, masks, "--save_table", 1).returncode == 0
    file = masks / "figures" / "a.tif.json"
    values = json.loads(file.read_text())
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "image":
        file.write_text(json.dumps({**values, "image": "\ud800"}))
    else:
        file.write_text(json.dumps({**values, "pixel_size": [0.5, 0.5, "\ud800"]}))
    done = infer(model, images, masks, "--save_table", 1, "--save_report", 1)
    assert "Traceback" not in done.stdout
    if damage == "folder":
        errors = errors_of(done.stdout)
        assert done.returncode == 2 and str(file) in errors[0], done.stdout
    else:  # measured again from the mask
        assert done.returncode == 0 and json.loads(file.read_text())["image"] == "a.tif", done.stdout


def test_a_thumbnail_that_cannot_be_read_is_named(tmp_path, model, images):
    assert infer(model, images, tmp_path / "masks", "--save_report", 1).returncode == 0
    thumbnail = sorted((tmp_path / "masks" / "figures").glob("*.jpg"))[0]
    thumbnail.unlink()
    thumbnail.symlink_to("/proc/self/mem")  # a regular file, but reading it from the start fails
    done = infer(model, images, tmp_path / "masks", "--save_report", 1)
    assert done.returncode == 2 and str(thumbnail) in errors_of(done.stdout)[-1], done.stdout


def test_a_folder_in_the_place_of_a_result_is_named(tmp_path, model, images):
    (tmp_path / "masks" / "table.csv").mkdir(parents=True)
    done = infer(model, images, tmp_path / "masks", "--save_table", 1)
    [error] = errors_of(done.stdout)
    assert done.returncode == 2 and f"cannot use {tmp_path / 'masks' / 'table.csv'}" in error


def test_truth_that_counts_nowhere_has_no_scores(tmp_path, images):
    save_random_model(tmp_path / "model", 1, 2, label_map="0:0,1:1,255:ignore")
    (tmp_path / "truth").mkdir()
    tifffile.imwrite(tmp_path / "truth" / "c.tif", np.full((64, 64), 255, np.uint8))
    options = ["--save_report", 1, "--mask_folder", tmp_path / "truth"]
    done = infer(tmp_path / "model", images, tmp_path / "masks", *options)
    assert done.returncode == 0 and "RuntimeWarning" not in done.stdout, done.stdout
