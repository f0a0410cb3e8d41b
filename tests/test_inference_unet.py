import json
import os
import re

import numpy as np
import pytest
import skimage.io
import tensorflow as tf
import tifffile
from conftest import make_pair, run_script, write_tiff

import inference_unet
from imagereader import z_score
from unet_model import RADIUS, SIZE_FACTOR, build_unet, export_saved_model


def save_random_model(folder, channels, classes, seed=0):
    """Save a small network whose normalisation has been in use, and return it."""
    tf.keras.utils.set_random_seed(seed)
    model = build_unet(channels, classes, 4)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weights.shape) for weights in layer.get_weights()])
    export_saved_model(model, folder, {"radius": RADIUS, "size_factor": SIZE_FACTOR})
    return model


@pytest.fixture(scope="module")
def gray_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gray") / "saved_model"
    save_random_model(folder, 1, 2)
    return folder


def infer(model, images, masks, *arguments):
    return run_script(
        "inference_unet.py",
        "--saved_model_filepath",
        model,
        "--image_folder",
        images,
        "--output_folder",
        masks,
        *arguments,
    )


def write_images(folder, count=3, shape=(64, 64, 1), suffix="tif"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = np.squeeze(make_pair(index, shape, "uint8")[0])
        if suffix == "tif":
            tifffile.imwrite(folder / f"a{index}.tif", image)
        else:
            skimage.io.imsave(folder / f"a{index}.{suffix}", image)
    return folder


def test_help_shows_every_option_of_the_specification_and_brackets_the_optional_ones():
    text = re.sub(r"\s+", " ", run_script("inference_unet.py", "-h").stdout)
    assert text.startswith("usage: inference [-h] --saved_model_filepath SAVED_MODEL_FILEPATH")
    assert "--image_folder IMAGE_FOLDER --output_folder OUTPUT_FOLDER [--image_format IMAGE_FORMAT]" in text


@pytest.mark.parametrize("height", [16, 208, 224, 512, 1008])
@pytest.mark.parametrize("width", [208, 400, 1424])
def test_zones_cover_each_pixel_once_and_keep_their_distance(height, width):
    seen = np.zeros((height, width), int)
    for tile in inference_unet.plan_tiles(height, width, 208 + 16, RADIUS, SIZE_FACTOR):
        for window, zone, length in ((tile.rows, tile.zone_rows, height), (tile.columns, tile.zone_columns, width)):
            assert window.stop - window.start == min(224, length) and window.start % SIZE_FACTOR == 0
            assert window.start == 0 or zone.start - window.start >= RADIUS
            assert window.stop == length or window.stop - zone.stop >= RADIUS
            assert 0 <= window.start <= zone.start < zone.stop <= window.stop <= length
        seen[tile.zone_rows, tile.zone_columns] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    "shape, classes, tile_size", [((1000, 1411, 3), 3, 512), ((257, 530, 1), 2, 208), ((300, 40, 2), 4, 256)]
)
def test_the_tiled_mask_equals_that_of_one_pass(tmp_path, shape, classes, tile_size):
    model = save_random_model(tmp_path / "saved_model", shape[2], classes)
    rng = np.random.default_rng(0)
    image = (make_pair(1, shape, "float32", 3)[0] + rng.normal(0, 30, shape)).astype(np.float32)
    (tmp_path / "images").mkdir()
    write_tiff(tmp_path / "images" / "a.tif", image)
    done = infer(tmp_path / "saved_model", tmp_path / "images", tmp_path / "masks", "--tile_size", tile_size)
    assert done.returncode == 0, done.stdout
    mask = tifffile.imread(tmp_path / "masks" / "a.tif")
    pad = [(0, -shape[0] % 16), (0, -shape[1] % 16), (0, 0)]
    expected = np.argmax(model(np.pad(z_score(image), pad, mode="reflect")[None])[0], -1)[: shape[0], : shape[1]]
    assert len(np.unique(expected)) > 1, "the network sees nothing, so the test could not fail"
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


def test_a_halo_that_is_too_small_shows(tmp_path):
    """The comparison above can fail: with a quarter of the halo the tiles do differ."""
    model = save_random_model(tmp_path / "saved_model", 1, 2)
    image = z_score(make_pair(1, (512, 512, 1), "float32", 3)[0])
    whole = np.argmax(model(image[None])[0], -1)
    loaded = inference_unet.load_model(tmp_path / "saved_model")
    masks = [
        inference_unet.segment(image, inference_unet.Model(loaded.predict, 1, 2, radius, 16), 256)
        for radius in (RADIUS, 16)
    ]
    assert (masks[0] == whole).all()
    assert (masks[1] != whole).any()


def test_a_line_for_each_file_tells_size_seconds_and_classes(gray_model, tmp_path):
    done = infer(gray_model, write_images(tmp_path / "images", 2, (64, 80, 1)), tmp_path / "masks")
    assert done.returncode == 0, done.stdout
    for index in range(2):
        assert re.search(rf"{index + 1}/2 a{index}.tif: 64 x 80 x 1, \d+\.\d s, class \d: [\d.]+ %", done.stdout)
    assert sorted(os.listdir(tmp_path / "masks")) == ["a0.tif", "a1.tif"]


def test_png_gives_png_and_jpg_gives_png(gray_model, tmp_path):
    for suffix in ("png", "jpg"):
        images = write_images(tmp_path / suffix / "images", 1, suffix=suffix)
        done = infer(gray_model, images, tmp_path / suffix / "masks", "--image_format", suffix)
        assert done.returncode == 0, done.stdout
        assert os.listdir(tmp_path / suffix / "masks") == ["a0.png"]
        assert skimage.io.imread(tmp_path / suffix / "masks" / "a0.png").shape == (64, 64)


def test_a_bad_file_is_reported_and_the_others_go_on(gray_model, tmp_path):
    images = write_images(tmp_path / "images", 3)
    (images / "a1.tif").write_bytes(b"no image")
    tifffile.imwrite(images / "a3.tif", np.zeros((64, 64, 3), np.uint8))
    tifffile.imwrite(images / "a4.tif", np.full((64, 64), np.nan, np.float32))
    done = infer(gray_model, images, tmp_path / "masks")
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "3 images failed: a1.tif, a3.tif, a4.tif" in done.stdout
    assert "expected 1 channels" in done.stdout and "found 3" in done.stdout and "NaN" in done.stdout
    assert sorted(os.listdir(tmp_path / "masks")) == ["a0.tif", "a2.tif"]


@pytest.mark.parametrize("size, word", [("500", "multiple of 16"), ("192", "at least 208"), ("0", "at least 1")])
def test_a_bad_tile_size_is_refused(gray_model, tmp_path, size, word):
    done = infer(gray_model, write_images(tmp_path / "images"), tmp_path / "masks", "--tile_size", size)
    assert done.returncode == 2 and word in done.stdout and "Traceback" not in done.stdout


def test_missing_and_foreign_models_are_refused(tmp_path):
    images = write_images(tmp_path / "images")
    module = tf.Module()
    module.double = tf.function(lambda value: 2 * value, input_signature=[tf.TensorSpec([3], tf.float32)])
    tf.saved_model.save(module, tmp_path / "foreign", signatures={"serving_default": module.double})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "saved_model.pb").write_bytes(b"x")
    for folder in ("nowhere", "images", "foreign", "damaged"):
        done = infer(tmp_path / folder, images, tmp_path / "masks")
        assert done.returncode == 2 and folder in done.stdout and "SavedModel" in done.stdout, done.stdout
        assert "Traceback" not in done.stdout


def test_a_model_without_our_metadata_works_with_the_papers_geometry(gray_model, tmp_path):
    module = tf.Module()
    module.inner = tf.saved_model.load(str(gray_model))
    tf.saved_model.save(
        module, tmp_path / "other", signatures={"serving_default": module.inner.signatures["serving_default"]}
    )
    model = inference_unet.load_model(tmp_path / "other")
    assert (model.channels, model.number_classes, model.radius, model.size_factor) == (1, 2, 96, 16)


def test_the_output_folder_may_not_be_the_image_folder(gray_model, tmp_path):
    images = write_images(tmp_path / "images")
    before = (images / "a0.tif").read_bytes()
    done = infer(gray_model, images, images)
    assert done.returncode == 2 and "would replace the images" in done.stdout
    assert (images / "a0.tif").read_bytes() == before


def test_metadata_is_read_from_the_saved_model(gray_model):
    assert json.loads((gray_model / "unet_metadata.json").read_text())["radius"] == RADIUS
