import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import skimage.io
import tensorflow as tf
import tifffile
from conftest import ROOT, STORED, WITHOUT_GPU, make_pair, run_script, write_stored, write_tiff, z_score
from scipy import ndimage, special
from skimage import transform

import inference_unet
from cli import InputError, printable
from image_files import ChannelStatistics, ImageFile, Source, normalize, read_image
from inference_unet import TileSizer, TileTooLarge
from lmdb_utils import RADIUS, SIZE_FACTOR
from unet_model import BatchNormalization, build_unet, export_saved_model

CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)


def save_random_model(folder, channels, classes, seed=0, **metadata):
    """Save a small network with random normalization weights, and return it."""
    tf.keras.utils.set_random_seed(seed)
    model = build_unet(channels, classes, 4)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weights.shape) for weights in layer.get_weights()])
    export_saved_model(model, folder, {"radius": RADIUS, "size_factor": SIZE_FACTOR, **metadata})
    return model


@pytest.fixture(scope="module")
def gray_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gray") / "saved_model"
    save_random_model(folder, 1, 2)
    return folder


@pytest.fixture(scope="module")
def color_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("color") / "saved_model"
    return folder, save_random_model(folder, 3, 3)


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


def segment(image, mask, model, sizer):
    source = Source(image.name, (str(image),))
    targets = inference_unet.Targets(mask.parent, Source(mask.name, source.files))
    inference_unet.segment_file(source, targets, model, sizer)


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


@pytest.mark.parametrize("length", [16, 208, 224, 400, 512, 1008, 1424])
def test_zones_cover_each_pixel_once_and_keep_their_distance(length):
    done = 0
    for window, zone in inference_unet.plan_axis(length, 208 + 16, RADIUS):
        assert window.stop - window.start == min(224, length) and window.start % SIZE_FACTOR == 0
        assert window.start == 0 or zone.start - window.start >= RADIUS
        assert window.stop == length or window.stop - zone.stop >= RADIUS
        assert 0 <= window.start <= zone.start == done < zone.stop <= window.stop <= length
        done = zone.stop
    assert done == length


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
    with ImageFile(tmp_path / "images" / "a.tif") as file:
        statistics = ChannelStatistics.of_file(file)
    normalized = normalize(image, statistics.mean, statistics.deviation)
    np.testing.assert_allclose(normalized, z_score(image), atol=1e-6)
    expected = np.argmax(model(np.pad(normalized, pad, mode="reflect")[None])[0], -1)[: shape[0], : shape[1]]
    assert len(np.unique(expected)) > 1, "the network predicts only one class, so the test could not fail"
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


def test_a_halo_that_is_too_small_shows(tmp_path):
    """Show that the comparison above can fail. With a halo of 16 pixels, the tiles do differ."""
    model = save_random_model(tmp_path / "saved_model", 1, 2)
    image = make_pair(1, (512, 512, 1), "float32", 3)[0]
    write_tiff(tmp_path / "a.tif", image)
    whole = np.argmax(model(z_score(image)[None])[0], -1)
    loaded = inference_unet.load_model(tmp_path / "saved_model")
    masks = []
    for radius in (RADIUS, 16):
        candidate = dataclasses.replace(loaded, radius=radius)
        segment(tmp_path / "a.tif", tmp_path / "mask.tif", candidate, TileSizer(candidate, 256**2, 256))
        masks.append(tifffile.imread(tmp_path / "mask.tif"))
    assert (masks[0] == whole).all()
    assert (masks[1] != whole).any()


@pytest.mark.parametrize(
    "kind, message, expected",
    [
        ("ResourceExhaustedError", "OOM when allocating tensor with shape[1,64,1824,1824]", TileTooLarge),
        ("InternalError", "CUDNN_STATUS_ALLOC_FAILED in cudnnCreate", TileTooLarge),
        (
            "NotFoundError",
            "No algorithm worked! RESOURCE_EXHAUSTED: Out of memory while trying to allocate",
            TileTooLarge,
        ),
        ("InvalidArgumentError", "Incompatible shapes", InputError),
    ],
)
def test_lack_of_memory_on_a_gpu_is_recognized_in_all_its_forms(gray_model, monkeypatch, kind, message, expected):
    def fail(**inputs):
        raise getattr(tf.errors, kind)(None, None, message)

    network = inference_unet.Network(gray_model, tf.saved_model.load(str(gray_model)))
    monkeypatch.setattr(network, "_signature", fail)
    with pytest.raises(expected):
        network.predict(np.zeros((1, 16, 16, 1), np.float32))


NVIDIA_SMI = """#!/bin/sh
case "$1" in
    --id=GPU-b) echo 3000;;
    --id=GPU-a) echo 20;;
    --id=1) echo 7000;;
    *) printf '20\\n20\\n'; exit 6;;
esac
"""


@pytest.mark.parametrize(
    "visible, slurm, mebibytes",
    [("GPU-a,GPU-b", {"SLURM_LOCALID": "1"}, 3000), ("GPU-b", {}, 3000), (None, {"SLURM_LOCALID": "1"}, 7000)],
)
def test_free_memory_is_that_of_the_gpu_of_this_process(visible, slurm, mebibytes, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if slurm:
        slurm.update(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2", SLURM_NODEID="0")
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    count = len(visible.split(",")) if visible else 2
    gpus = [types.SimpleNamespace(name=f"/physical_device:GPU:{index}") for index in range(count)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    assert inference_unet.free_memory() == mebibytes * 2**20


def test_inference_computes_in_full_float32(gray_model):
    tf.config.experimental.enable_tensor_float_32_execution(True)
    inference_unet.load_model(gray_model)
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_tiles_get_smaller_where_memory_runs_out(gray_model, tmp_path, caplog):
    caplog.set_level("INFO")
    image = make_pair(1, (700, 500, 1), "uint8")[0]
    write_tiff(tmp_path / "a.tif", image)
    loaded = inference_unet.load_model(gray_model)

    def predict(batch):
        if batch.size > 250 * 250:
            raise TileTooLarge
        return loaded.predict(batch)

    segment(tmp_path / "a.tif", tmp_path / "whole.tif", loaded, TileSizer(loaded, 1024**2))
    assert "out of memory" not in caplog.text
    small = dataclasses.replace(loaded, predict=predict)
    segment(tmp_path / "a.tif", tmp_path / "small.tif", small, TileSizer(small, 1024**2))
    tried = [int(rows) * int(columns) for rows, columns in re.findall(r"1 tiles of (\d+) x (\d+)", caplog.text)]
    assert tried[0] == 704 * 512 and len(tried) > 1 and all(b <= a / 2 for a, b in zip(tried, tried[1:]))
    masks = [tifffile.imread(tmp_path / name) for name in ("whole.tif", "small.tif")]
    np.testing.assert_array_equal(*masks)
    hopeless = dataclasses.replace(loaded, predict=lambda batch: predict(np.zeros((1, 999, 999, 1))))
    with pytest.raises(InputError, match="even in the smallest tiles"):
        segment(tmp_path / "a.tif", tmp_path / "none.tif", hopeless, TileSizer(hopeless, 256**2, 256))
    assert not (tmp_path / "none.tif").exists()


def work_of(shape, tile):
    """Return the number of pixels that the network computes for an image."""
    counts = [len(list(inference_unet.plan_axis(length, edge, RADIUS))) for length, edge in zip(shape, tile)]
    return counts[0] * tile[0] * counts[1] * tile[1]


@pytest.mark.parametrize("shape", [(16, 16), (528, 512), (96, 5008), (1504, 1008), (2000, 208)])
@pytest.mark.parametrize("pixels, longest", [(208**2, None), (300_000, None), (512**2, 512), (10**7, 256)])
def test_no_other_shape_of_tiles_makes_less_work(gray_model, shape, pixels, longest):
    tile = TileSizer(inference_unet.load_model(gray_model), pixels, longest).shape(*shape)
    edges = [
        [edge for edge in {*range(208, length, SIZE_FACTOR), length} if edge <= (longest or edge)] for length in shape
    ]
    allowed = [(rows, columns) for rows in edges[0] for columns in edges[1] if rows * columns <= max(pixels, 208**2)]
    assert tile in allowed
    assert work_of(shape, tile) == min(work_of(shape, other) for other in allowed)


def test_small_tiles_go_through_the_network_together(gray_model, tmp_path):
    write_tiff(tmp_path / "a.tif", make_pair(1, (400, 300, 1), "uint8")[0])
    loaded, batches = inference_unet.load_model(gray_model), []
    watched = dataclasses.replace(loaded, predict=lambda batch: batches.append(len(batch)) or loaded.predict(batch))
    segment(tmp_path / "a.tif", tmp_path / "together.tif", watched, TileSizer(watched, 10**7, 208))
    assert max(batches) == 2**20 // 208**2
    batches.clear()
    segment(tmp_path / "a.tif", tmp_path / "single.tif", watched, TileSizer(watched, 208**2, 208))
    assert max(batches) == 1
    masks = [tifffile.imread(tmp_path / name) for name in ("together.tif", "single.tif")]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("samples, dtype", [(None, "uint8"), (3, "float32")])
@pytest.mark.parametrize("shape", [(700, 900), (256, 512), (20, 30)])
def test_a_tiff_is_complete_whatever_the_order_of_its_blocks(tmp_path, samples, dtype, shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, shape if samples is None else (*shape, samples)).astype(dtype)
    rows, columns = ([0, *sorted(rng.choice(length, 6, replace=False)), length] for length in shape)
    blocks = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in zip(rows, rows[1:])
        for left, right in zip(columns, columns[1:])
        if bottom > top and right > left
    ]
    rng.shuffle(blocks)
    with inference_unet.TiledTiff(tmp_path / "a.tif", image.shape, image.dtype, {}) as tiff:
        for block_rows, block_columns in blocks:
            tiff.add(block_rows.start, block_columns.start, image[block_rows, block_columns])
    with tifffile.TiffFile(tmp_path / "a.tif") as written:
        assert written.pages[0].is_tiled and written.pages[0].compression == 8 and len(written.pages) == 1
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), image)
    np.testing.assert_array_equal(skimage.io.imread(tmp_path / "a.tif"), image)


def test_probabilities_are_those_of_one_pass_and_the_mask_is_their_greatest(tmp_path):
    model = save_random_model(tmp_path / "saved_model", 3, 4)
    (tmp_path / "images").mkdir()
    image = make_pair(1, (500, 430, 3), "uint8", 3)[0]
    write_tiff(tmp_path / "images" / "a.tif", image)
    arguments = [tmp_path / "saved_model", tmp_path / "images", tmp_path / "masks", "--tile_size", 256]
    assert infer(*arguments).returncode == 0
    done = infer(*arguments, "--save_probabilities", 1)
    assert done.returncode == 0 and "1/1 a.tif" in done.stdout, "a mask without its probabilities is incomplete"
    assert "1 masks already exist" in infer(*arguments, "--save_probabilities", 1).stdout
    softmax = tifffile.imread(tmp_path / "masks" / "probabilities" / "a.tif")
    assert softmax.dtype == np.float32 and softmax.shape == (500, 430, 4)
    pad = [(0, 12), (0, 2), (0, 0)]
    logits = model(np.pad(z_score(image), pad, mode="reflect")[None])[0].numpy()[:500, :430]
    expected = special.softmax(logits, axis=-1)
    np.testing.assert_allclose(softmax, expected, atol=1e-5)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "masks" / "a.tif"), softmax.argmax(-1))


@pytest.mark.parametrize(
    "suffix, channels, shape", [("tif", 1, (500, 430)), ("png", 3, (70, 5000)), ("tif", 2, (64, 64))]
)
def test_an_overlay_shows_the_image_and_the_outlines_of_its_classes(tmp_path, suffix, channels, shape):
    save_random_model(tmp_path / "saved_model", channels, 3)
    (tmp_path / "images").mkdir()
    image = make_pair(1, (*shape, channels), "uint8", 3)[0]
    path = tmp_path / "images" / f"a.{suffix}"
    write_tiff(path, image) if suffix == "tif" else skimage.io.imsave(path, image)
    arguments = [tmp_path / "saved_model", tmp_path / "images", tmp_path / "masks", "--image_format", suffix]
    done = infer(*arguments, "--save_overlay", 1, "--tile_size", 256)
    assert done.returncode == 0, done.stdout
    mask = skimage.io.imread(tmp_path / "masks" / f"a.{suffix}")
    picture = skimage.io.imread(tmp_path / "masks" / "overlays" / "a.png").astype(int)
    factor = 4 if shape[1] > 4096 else 1
    small = mask[::factor, ::factor]
    assert picture.shape == (*small.shape, 3) and len(np.unique(small)) > 1
    neighbours = ndimage.maximum_filter(small, footprint=CROSS), ndimage.minimum_filter(small, footprint=CROSS)
    outline = (neighbours[0] != neighbours[1]) & (small > 0)
    for class_id in set(np.unique(small)) - {0}:
        assert (picture[outline & (small == class_id)] == inference_unet.OUTLINE_COLORS[class_id - 1]).all()
    gray = image.mean(axis=2) if channels != 3 else image[..., 1]
    gray = transform.downscale_local_mean(gray, (factor, factor))
    assert np.corrcoef(picture[..., 1][~outline], gray[~outline])[0, 1] > 0.95


@pytest.mark.parametrize(
    "options, size, file", [([], "60k", "b.tif"), (["--save_probabilities", "1"], "1m", "probabilities/b.tif")]
)
def test_a_full_disk_is_reported_by_name_and_leaves_nothing_half_written(gray_model, tmp_path, options, size, file):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    images, masks = write_images(tmp_path / "images", 1), tmp_path / "masks"
    masks.mkdir()
    rng = np.random.default_rng(0)
    tifffile.imwrite(images / "b.tif", rng.integers(0, 255, (1200, 1200), np.uint8))
    command = shlex.join(map(str, [
        sys.executable, ROOT / "inference_unet.py", "--saved_model_filepath", gray_model, "--image_folder", images,
        "--output_folder", masks, *options,
    ]))  # fmt: skip
    masks = shlex.quote(str(masks))
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {masks} && {{ {command}; code=$?; find {masks} -type f; exit $code; }}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert re.search(rf"cannot write \S*masks/{re.escape(file)}: .*No space left", done.stdout), done.stdout
    assert "1 image failed: b.tif" in done.stdout
    files = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path / "masks"))]
    assert files and all(Path(line).name == "a0.tif" for line in files)


def test_a_mask_that_exists_is_kept_unless_overwrite_is_set(gray_model, tmp_path):
    images, masks = write_images(tmp_path / "images", 3), tmp_path / "masks"
    assert infer(gray_model, images, masks).returncode == 0
    (masks / "a1.tif").unlink()
    before = (masks / "a0.tif").stat().st_mtime_ns
    done = infer(gray_model, images, masks)
    assert done.returncode == 0 and "2 masks already exist" in done.stdout and "1/1 a1.tif" in done.stdout
    assert (masks / "a0.tif").stat().st_mtime_ns == before and (masks / "a1.tif").exists()
    assert infer(gray_model, images, masks, "--overwrite", 1).returncode == 0
    assert (masks / "a0.tif").stat().st_mtime_ns > before


def test_shards_together_give_the_masks_of_one_run(gray_model, tmp_path):
    images = write_images(tmp_path / "images", 5)
    assert infer(gray_model, images, tmp_path / "whole").returncode == 0
    for number, names in ((1, ["a0.tif", "a2.tif", "a4.tif"]), (2, ["a1.tif", "a3.tif"])):
        before = set(os.listdir(tmp_path / "parts")) if number > 1 else set()
        done = infer(gray_model, images, tmp_path / "parts", "--shard", f"{number}/2")
        assert done.returncode == 0 and f"part {number} of 2: {len(names)} of 5 images" in done.stdout
        assert sorted(set(os.listdir(tmp_path / "parts")) - before) == names
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/2/3", "-1/2"])
def test_a_shard_that_is_none_is_refused(gray_model, tmp_path, text):
    done = infer(gray_model, write_images(tmp_path / "images", 1), tmp_path / "masks", f"--shard={text}")
    assert done.returncode == 2 and "such as 2/8" in done.stdout and "Traceback" not in done.stdout


def test_tasks_and_array_elements_share_the_images_without_gap_or_overlap():
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "11", "SLURM_ARRAY_TASK_COUNT": "3"}
    found = [
        inference_unet.shard_from_slurm(
            {**array, "SLURM_ARRAY_TASK_ID": str(element), "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task)}
        )
        for element in (3, 7, 11)
        for task in range(2)
    ]
    assert found == [(number, 6) for number in range(1, 7)]
    assert inference_unet.shard_from_slurm({}) == (1, 1)
    in_a_batch_script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert inference_unet.shard_from_slurm(in_a_batch_script) == (1, 1)


def test_a_killed_run_leaves_no_half_mask_and_the_next_one_resumes(gray_model, tmp_path):
    images, masks = write_images(tmp_path / "images", 1), tmp_path / "masks"
    tifffile.imwrite(images / "b.tif", make_pair(0, (1200, 1200, 1), "uint8")[0][..., 0])
    command = ["--saved_model_filepath", gray_model, "--image_folder", images, "--output_folder", masks]
    process = subprocess.Popen(
        [sys.executable, ROOT / "inference_unet.py", *command, "--tile_size", "208"], stdout=subprocess.DEVNULL
    )  # thousands of tiles of 16 x 16 pixels
    deadline = time.monotonic() + 120
    while not any(path.name.startswith(".b") for path in masks.glob("*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [path.name for path in masks.iterdir() if not path.name.startswith(".")] == ["a0.tif"]
    done = infer(gray_model, images, masks)
    assert done.returncode == 0 and "1 masks already exist" in done.stdout and "1/1 b.tif" in done.stdout
    assert sorted(os.listdir(masks)) == ["a0.tif", "b.tif"]


def test_a_mask_is_that_of_the_pixels_however_the_image_is_stored(tmp_path):
    save_random_model(tmp_path / "saved_model", 3, 3)
    image = make_pair(0, (300, 420, 3), "uint16", 3)[0] + np.random.default_rng(0).integers(
        0, 900, (300, 420, 3), np.uint16
    )
    (tmp_path / "images").mkdir()
    for kind in STORED:
        write_stored(tmp_path / "images" / f"{kind}.tif", image, kind)
    done = infer(tmp_path / "saved_model", tmp_path / "images", tmp_path / "masks", "--tile_size", 256)
    assert done.returncode == 0, done.stdout
    masks = [tifffile.imread(tmp_path / "masks" / f"{kind}.tif") for kind in STORED]
    assert len(np.unique(masks[0])) == 3
    for mask in masks:
        np.testing.assert_array_equal(mask, masks[0])


def test_a_mask_keeps_the_resolution_and_opens_elsewhere(gray_model, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    image = make_pair(0, (1000, 1033, 1), "uint8")[0][..., 0]
    tifffile.imwrite(tmp_path / "images" / "a.tif", image, resolution=(5000, 4000), resolutionunit="CENTIMETER")
    done = infer(gray_model, tmp_path / "images", tmp_path / "masks", "--tile_size", 512)
    assert done.returncode == 0, done.stdout
    with tifffile.TiffFile(tmp_path / "masks" / "a.tif") as tif:
        page = tif.pages[0]
        assert page.resolution == (5000, 4000) and page.resolutionunit == 3 and page.is_tiled
        mask = page.asarray()
    assert mask.shape == image.shape and len(np.unique(mask)) == 2
    np.testing.assert_array_equal(skimage.io.imread(tmp_path / "masks" / "a.tif"), mask)
    with Image.open(tmp_path / "masks" / "a.tif") as opened:
        np.testing.assert_array_equal(np.asarray(opened), mask)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "masks" / "a.tif"), cv2.IMREAD_UNCHANGED), mask)


@pytest.mark.parametrize("image_format", ["tif", "png", "jpg"])
def test_a_mask_lies_as_the_file_of_its_image_does(tmp_path, color_model, image_format):
    """Viewers and build_lmdb.py turn both upright, so the mask still covers its image."""
    from PIL import Image

    folder, (model_folder, model) = tmp_path / "images", color_model
    folder.mkdir()
    stored = make_pair(0, (100, 230, 3), "uint8")[0]
    for code in range(1, 9):
        path = folder / f"{code}.{image_format}"
        if image_format == "tif":
            tifffile.imwrite(path, stored, photometric="rgb", extratags=[(274, "H", 1, code, True)])
        else:
            exif = Image.Exif()
            exif[274] = code
            Image.fromarray(stored).save(path, exif=exif)
    done = infer(model_folder, folder, tmp_path / "masks", "--image_format", image_format, "--tile_size", 208,
                 "--save_probabilities", 1)  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("turned upright") == 7, done.stdout
    for path in folder.iterdir():
        upright = read_image(path)
        pad = [(0, -length % 16) for length in upright.shape[:2]]
        scores = model(np.pad(z_score(upright), [*pad, (0, 0)], mode="reflect")[None])[0].numpy()
        expected = scores[: upright.shape[0], : upright.shape[1]].argmax(-1)
        mask = tmp_path / "masks" / path.name.replace("jpg", "png")
        np.testing.assert_array_equal(read_image(mask, as_mask=True)[..., 0], expected, "turned as the image is")
        if image_format == "tif":
            assert tifffile.imread(mask).shape == stored.shape[:2]
        else:
            with Image.open(mask) as picture:
                assert picture.size == stored.shape[1::-1]
        softmax = tmp_path / "masks" / "probabilities" / f"{path.stem}.tif"
        np.testing.assert_array_equal(read_image(softmax).argmax(-1), expected)
        assert tifffile.imread(softmax).shape[:2] == stored.shape[:2]


def test_masks_and_probabilities_are_where_their_images_are_on_earth(gray_model, tmp_path):
    (tmp_path / "images").mkdir()
    profile = {
        "driver": "GTiff", "height": 150, "width": 331, "count": 1, "dtype": "uint16", "nodata": 0, "tiled": True,
        "blockxsize": 64, "blockysize": 64, "crs": "EPSG:32633",
    }  # fmt: skip
    turned = rasterio.Affine(9.8, 1.7, 500000.0, 1.7, -9.8, 4500000.0)
    for name, place in (("north", rasterio.Affine(10, 0, 500000.0, 0, -10, 4500000.0)), ("turned", turned)):
        with rasterio.open(tmp_path / "images" / f"{name}.tif", "w", transform=place, **profile) as file:
            file.write(make_pair(0, (150, 331, 1))[0][..., 0], 1)
            file.update_tags(scale="of the image's values")
    done = infer(gray_model, tmp_path / "images", tmp_path / "masks", "--save_probabilities", 1)
    assert done.returncode == 0, done.stdout
    for name in ("north", "turned"):
        with rasterio.open(tmp_path / "images" / f"{name}.tif") as image:
            for path in (f"{name}.tif", f"probabilities/{name}.tif"):
                with rasterio.open(tmp_path / "masks" / path) as result:
                    assert result.crs == image.crs and result.transform.almost_equals(image.transform, 1e-9)
                    assert result.nodata is None and "scale" not in result.tags()


def test_the_unit_of_an_imagej_image_is_carried_into_the_mask(gray_model, tmp_path):
    (tmp_path / "images").mkdir()
    image = make_pair(0)[0][..., 0]
    tifffile.imwrite(
        tmp_path / "images" / "a.tif", image, imagej=True, resolution=(4.0, 2.5), metadata={"unit": "micron"}
    )
    done = infer(gray_model, tmp_path / "images", tmp_path / "masks")
    assert done.returncode == 0, done.stdout
    with tifffile.TiffFile(tmp_path / "masks" / "a.tif") as tif:
        assert tif.imagej_metadata["unit"] == "micron"
        assert tif.pages[0].resolution == (4.0, 2.5) and tif.pages[0].resolutionunit == 1
        assert tif.asarray().shape == image.shape
    assert read_image(tmp_path / "masks" / "a.tif", as_mask=True).shape == (64, 64, 1)


def test_a_line_for_each_file_reports_size_seconds_and_classes(gray_model, tmp_path):
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


def test_a_bad_file_is_reported_and_the_others_continue(gray_model, tmp_path):
    images = write_images(tmp_path / "images", 3)
    (images / "a1.tif").write_bytes(b"no image")
    tifffile.imwrite(images / "a3.tif", np.zeros((64, 64, 3), np.uint8))
    tifffile.imwrite(images / "a4.tif", np.full((64, 64), np.inf, np.float32))
    done = infer(gray_model, images, tmp_path / "masks")
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "3 images failed: a1.tif, a3.tif, a4.tif" in done.stdout
    for words in ("expected 1 channel", "found 3", "found inf; if these pixels"):
        assert words in done.stdout
    assert sorted(os.listdir(tmp_path / "masks")) == ["a0.tif", "a2.tif"]


@pytest.mark.parametrize("size, word", [("500", "multiple of 16"), ("192", "at least 208"), ("0", "number from 1 to")])
def test_a_bad_tile_size_is_refused(gray_model, tmp_path, size, word):
    done = infer(gray_model, write_images(tmp_path / "images"), tmp_path / "masks", "--tile_size", size)
    assert done.returncode == 2 and word in done.stdout and "Traceback" not in done.stdout


def save_function(folder, function, *shapes, dtype="float32"):
    """Save a function of tensors as a SavedModel."""
    module = tf.Module()
    module.function = tf.function(function, input_signature=[tf.TensorSpec(shape, dtype) for shape in shapes])
    tf.saved_model.save(module, folder, signatures={"serving_default": module.function})


ANY = [None, None, None]


def only_multiples_of_128(image):
    tf.debugging.assert_equal(tf.shape(image)[1] % 128, 0)
    return tf.concat([image, image], -1)


def test_models_that_cannot_be_used_are_refused_in_one_line_with_what_was_found(tmp_path):
    images = write_images(tmp_path / "images", 1)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "results" / "saved_model").mkdir(parents=True)
    for folder in ("damaged", "results/saved_model"):
        (tmp_path / folder / "saved_model.pb").write_bytes(b"x")
    save_function(tmp_path / "vector", lambda value: 2 * value, [3])
    save_function(tmp_path / "fixed size", lambda image: tf.concat([image, image], -1), [None, 256, 256, 1])
    save_function(tmp_path / "any channels", lambda image: image, [*ANY, None])
    save_function(tmp_path / "integers", lambda image: tf.concat([image, image], -1), [*ANY, 1], dtype="uint8")
    save_function(tmp_path / "two inputs", lambda a, b: tf.concat([a, b], -1), [*ANY, 1], [*ANY, 1])
    save_function(tmp_path / "smaller", lambda image: tf.concat([image, image], -1)[:, 1:], [*ANY, 1])
    save_function(tmp_path / "fails", only_multiples_of_128, [*ANY, 1])
    tf.saved_model.save(tf.Module(), tmp_path / "no signature")
    for name, found in {
        "nowhere": "no such folder",
        "results": "results/saved_model$",
        "images": "no saved_model.pb",
        "damaged/saved_model.pb": "found a file.*damaged$",
        "damaged": "cannot load the SavedModel in",
        "vector": r"found float32 \(3,\)",
        "fixed size": r"found float32 \(None, 256, 256, 1\)",
        "any channels": r"found float32 \(None, None, None, None\)",
        "integers": "found uint8",
        "two inputs": "found float32 .*, float32",
        "smaller": r"keeps height and width, found \(1, 63, 64, 2\)",
        "fails": r"fails on tiles of shape \(1, 64, 64, 1\)",
        "no signature": "found none",
    }.items():
        done = infer(tmp_path / name, images, tmp_path / "masks")
        lines = [line for line in done.stdout.splitlines() if name in line and re.search(found, line)]
        assert done.returncode == 2 and lines and "Traceback" not in done.stdout, done.stdout
        assert not list(tmp_path.glob("masks/*"))


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
    assert done.returncode == 2 and "would replace the image " in done.stdout
    assert (images / "a0.tif").read_bytes() == before


@pytest.mark.parametrize(
    "trained, floor, image, warned",
    [
        ("uint16", 1.0, lambda pixels: pixels, False),
        ("uint16", 1.0, lambda pixels: pixels / np.float32(65535), True),
        ("uint16", 1.0, lambda pixels: (pixels // 100).astype(np.uint8), True),
        ("uint16", 1.0, lambda pixels: (pixels > 100).astype(np.uint16), False),  # like an empty image
        ("uint16", 1.0, lambda pixels: pixels * 0.0, False),
        ("uint16", 1.0, lambda pixels: pixels.astype(np.float32) * 1000, False),
        ("uint16", 1.0, lambda pixels: pixels.astype(np.float32) * 100000, True),
        ("float32", 0.3, lambda pixels: pixels.astype(np.float32), False),
        ("float32", 0.3, lambda pixels: (pixels / 255).astype(np.float32), True),
        ("float32", 0.3, lambda pixels: pixels.astype(np.uint8), False),
    ],
)
def test_an_image_in_other_units_than_the_training_images_is_warned_of(tmp_path, caplog, trained, floor, image, warned):
    """The training images have values from 40 to 160."""
    model = inference_unet.Model(
        None, 1, 2, 96, 16, deviation_floor=[floor], value_range=[[40, 160]], image_dtype=trained
    )
    tifffile.imwrite(tmp_path / "a.tif", image(make_pair(0)[0]))
    with ImageFile(tmp_path / "a.tif") as file:
        lines = list(inference_unet.differences_of_scale(file, ChannelStatistics.of_file(file), model))
    assert len(lines) == warned and all("a.tif: values from " in line and "from 40 to 160" in line for line in lines)


def test_a_model_has_the_least_deviations_of_its_channels(tmp_path):
    image = make_pair(0, (64, 64, 2), "float32")[0] / 1000
    write_images(tmp_path / "images", count=0)
    write_tiff(tmp_path / "images" / "a.tif", image)
    for name, floor in (("own", [1e-3, 1e-3]), ("one", [1.0, 1e-3])):
        model = save_random_model(tmp_path / name, 2, 2, deviation_floor=floor)
        done = infer(tmp_path / name, tmp_path / "images", tmp_path / f"masks of {name}")
        assert done.returncode == 0, done.stdout
        mask = tifffile.imread(tmp_path / f"masks of {name}" / "a.tif")
        np.testing.assert_array_equal(mask, np.argmax(model(z_score(image, floor)[None])[0], -1))


@pytest.mark.parametrize(
    "names, options, clash",
    [
        (("a.jpg", "a.jpeg"), ["--image_format", "jpg"], "a.png"),
        (("a.tif", "a.tiff"), ["--save_overlay", 1], "overlays/a.png"),
        (("a.tif", "a.tiff"), [], None),
        (("a.tif", "a.ome.tif"), ["--save_overlay", 1, "--save_probabilities", 1], None),
    ],
)
def test_images_that_would_become_one_file_are_refused_before_work_begins(gray_model, tmp_path, names, options, clash):
    (tmp_path / "images").mkdir()
    for name in names:
        skimage.io.imsave(tmp_path / "images" / name, make_pair(0, dtype="uint8")[0][..., 0], check_contrast=False)
    done = infer(gray_model, tmp_path / "images", tmp_path / "masks", *options)
    assert done.returncode == (2 if clash else 0), done.stdout
    if clash:
        assert f"would both become {tmp_path / 'masks' / clash}" in done.stdout and not (tmp_path / "masks").exists()


def test_results_replace_no_image_whichever_folders_are_given(gray_model, tmp_path):
    images = write_images(tmp_path / "out" / "probabilities", 2)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a0.tif").symlink_to(images / "a0.tif")
    before = (images / "a0.tif").read_bytes()
    for folder in (images, tmp_path / "linked"):
        done = infer(gray_model, folder, tmp_path / "out", "--save_probabilities", 1, "--overwrite", 1)
        assert done.returncode == 2 and "would replace the image" in done.stdout, done.stdout
    assert (images / "a0.tif").read_bytes() == before


def test_a_link_to_nowhere_is_a_bad_file_and_the_others_continue(gray_model, tmp_path):
    images = write_images(tmp_path / "images", 1)
    (images / "lost.tif").symlink_to("/nowhere/lost.tif")
    (images / "loop.tif").symlink_to("loop.tif")
    os.mkfifo(images / "pipe.tif")
    done = infer(gray_model, images, tmp_path / "masks")
    assert done.returncode == 2 and "3 images failed: loop.tif, lost.tif, pipe.tif" in done.stdout, done.stdout
    assert "lost.tif, found a link to /nowhere/lost.tif, which does not exist" in done.stdout
    assert os.listdir(tmp_path / "masks") == ["a0.tif"]


@pytest.mark.parametrize("name", ["a" * 251 + ".tif", "tab\tand\nline end.tif", "caf\udce9.tif", "brackets [a]*.tif"])
def test_an_image_may_have_any_name_and_the_log_stays_readable(gray_model, tmp_path, name):
    images = tmp_path / "images"
    images.mkdir()
    write_tiff(images / name, make_pair(0)[0])
    done = infer(gray_model, images, tmp_path / "masks", "--save_probabilities", 1)
    assert done.returncode == 0, done.stdout
    assert os.listdir(tmp_path / "masks" / "probabilities") == [name] and (tmp_path / "masks" / name).exists()
    assert f"1/1 {printable(name)}: 64 x 64" in done.stdout


@pytest.mark.parametrize("folder", ["a[1]", "what * is {this}?", "back\\slash"])
def test_a_model_may_lie_in_a_folder_of_any_name(gray_model, tmp_path, folder):
    shutil.copytree(gray_model, tmp_path / folder / "saved_model")
    done = infer(tmp_path / folder / "saved_model", write_images(tmp_path / "images", 1), tmp_path / "masks")
    assert done.returncode == 0, done.stdout


def test_metadata_is_read_from_the_saved_model(gray_model):
    assert json.loads((gray_model / "unet_metadata.json").read_text())["radius"] == RADIUS


MEASURE_MEMORY = """
import re, sys
sys.path.insert(0, {root!r})
import numpy as np
import inference_unet

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

model = inference_unet.load_model(sys.argv[1])
model.predict(np.zeros((1, 64, 64, 1), np.float32))  # what the first call allocates once
before = peak_bytes()
inference_unet.free_memory = lambda: 1e9
edge = int(inference_unet.affordable_pixels(model) ** 0.5) // 16 * 16
model.predict(np.zeros((1, edge, edge, 1), np.float32))
print((peak_bytes() - before) / 1e9)
"""


def test_the_network_takes_up_to_half_of_the_free_memory(tmp_path):
    export_saved_model(build_unet(1, 2, 16), tmp_path / "saved_model", {"baseline_feature_depth": 16})
    script = MEASURE_MEMORY.format(root=str(ROOT))
    command = [sys.executable, "-c", script, str(tmp_path / "saved_model")]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=WITHOUT_GPU).stdout
    assert 0.2 < float(printed) < 0.55


@pytest.mark.parametrize("shape, overviews", [((4500, 48), 1), ((4500, 48), 0), ((4096, 48), 1)])
def test_large_masks_have_overviews(tmp_path, gray_model, shape, overviews):
    (tmp_path / "images").mkdir()
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    place = {"height": shape[0], "width": shape[1], "count": 1, "transform": rasterio.Affine(0.5, 0, 7e5, 0, -0.5, 5e6)}
    with rasterio.open(tmp_path / "images" / "a.tif", "w", dtype="uint8", **place) as file:
        file.write(image, 1)
    done = infer(gray_model, tmp_path / "images", tmp_path / "masks", "--overviews", overviews, "--tile_size", 1024)
    assert done.returncode == 0, done.stdout
    expected = [2, 4, 8] if overviews and shape[0] > 4096 else []
    with rasterio.open(tmp_path / "masks" / "a.tif") as file:
        assert file.overviews(1) == expected and file.transform == place["transform"]
        mask = file.read(1)
    assert mask.shape == shape and 0 < mask.mean() < 1
    with tifffile.TiffFile(tmp_path / "masks" / "a.tif") as file:
        [series] = file.series
        assert len(series.levels) == 1 + len(expected)
        for step, level in zip([1, *expected], series.levels):
            np.testing.assert_array_equal(level.asarray(), mask[::step, ::step])
            assert level.keyframe.is_tiled
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["a.tif"]
    again = infer(gray_model, tmp_path / "images", tmp_path / "masks", "--save_table", 1)  # reads the existing mask
    assert again.returncode == 0, again.stdout
    table = (tmp_path / "masks" / "table.csv").read_text().splitlines()
    assert [int(row.split(",")[2]) for row in table[1:]] == np.bincount(mask.ravel()).tolist()
