"""Compare images that have a file for each channel with the same images in one file each."""

import json
import shutil

import numpy as np
import pytest
import rasterio
import skimage.io
import tifffile
from conftest import errors_of, make_pair, run_script, write_tiff
from test_inference_unet import infer, save_random_model
from test_train_unet import arguments

from image_files import read_image
from lmdb_utils import Database

SUFFIXES = "_B02,_B8A,_B1"
COUNT = 6


@pytest.fixture(params=["uint8", "uint16", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def folders(tmp_path, dtype):
    """Write images with all channels in one file, copies with one file per channel in mixed formats, and masks."""
    for name in ("whole", "split", "masks"):
        (tmp_path / name).mkdir()
    for index in range(COUNT):
        image, mask = make_pair(index, (64, 80, 3), dtype)
        write_tiff(tmp_path / "whole" / f"scene{index}.tif", image)
        tifffile.imwrite(tmp_path / "masks" / f"scene{index}.tif", mask)
        for channel, suffix in enumerate(SUFFIXES.split(",")):
            path = tmp_path / "split" / f"scene{index}{suffix}"
            if channel == 1 and dtype != "float32":
                skimage.io.imsave(path.with_suffix(".png"), image[..., channel], check_contrast=False)
            else:
                tiles = {"tile": (32, 32), "compression": "zlib"} if channel else {}
                tifffile.imwrite(path.with_suffix(".tif"), image[..., channel], **tiles)
        tifffile.imwrite(tmp_path / "split" / f"scene{index}_B10.tif", image[..., 0])  # no suffix selects it
    return tmp_path


def build(folder, images, *options):
    return run_script(
        "build_lmdb.py", "--image_folder", folder / images, "--mask_folder", folder / "masks",
        "--output_folder", folder / f"db_{images}", *options,
    )  # fmt: skip


def records_of(folder):
    """Return the records and the metadata of both databases."""
    records, about = [], []
    for side in ("train", "test"):
        with Database(folder / f"{side}-dataset.lmdb") as database:
            metadata = database.metadata
            for index in range(metadata.count):
                stored = database.record(index)
                records.append((metadata.names[metadata.record_image[index]], *map(np.ndarray.tobytes, stored[:4])))
            about.append({**metadata.info, "channel_suffixes": None})
    return records, about


@pytest.mark.parametrize("options", [[], ["--use_tiling", 1, "--tile_size", 112], ["--channels", "2,0"]])
def test_the_database_is_that_of_complete_files(folders, options):
    assert build(folders, "whole", *options).returncode == 0
    done = build(folders, "split", "--channel_suffixes", SUFFIXES, *options)
    assert done.returncode == 0, done.stdout
    found, expected = (records_of(folders / f"db_{name}") for name in ("split", "whole"))
    assert found == expected and len(found[0]) >= COUNT


def test_masks_are_those_of_complete_files(folders, tmp_path):
    save_random_model(tmp_path / "model", 3, 3)
    options = ["--mask_folder", folders / "masks", "--save_report", 1, "--save_overlay", 1, "--tile_size", 208]
    for name, more in (("whole", []), ("split", ["--channel_suffixes", SUFFIXES])):
        done = infer(tmp_path / "model", folders / name, tmp_path / f"out_{name}", *options, *more)
        assert done.returncode == 0, done.stdout
    for file in (tmp_path / "out_whole").rglob("scene*.*"):
        if file.suffix in (".tif", ".png"):
            other = tmp_path / "out_split" / file.relative_to(tmp_path / "out_whole")
            np.testing.assert_array_equal(read_image(other), read_image(file))
    for name in ("scores.csv", "confusion.csv"):
        assert (tmp_path / "out_split" / name).read_bytes() == (tmp_path / "out_whole" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["uint16"], indirect=True)
def test_the_model_knows_the_names_and_order_of_its_channels(folders, tmp_path):
    assert build(folders, "split", "--channel_suffixes", SUFFIXES).returncode == 0
    databases = [folders / "db_split" / f"{side}-dataset.lmdb" for side in ("train", "test")]
    with Database(databases[0]) as database:
        assert database.metadata.info["channel_suffixes"] == SUFFIXES.split(",")
    done = run_script(
        "train_unet.py", *arguments(databases, tmp_path / "run", "--test_every_n_steps", 2, "--max_epochs", 1)
    )
    assert done.returncode == 0, done.stdout
    model = tmp_path / "run" / "saved_model"
    assert json.loads((model / "unet_metadata.json").read_text())["channel_suffixes"] == SUFFIXES.split(",")
    done = infer(model, folders / "split", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    done = infer(model, folders / "whole", tmp_path / "out_whole", "--channel_suffixes", "none")
    assert done.returncode == 0, done.stdout
    for path in (tmp_path / "out_whole").iterdir():
        np.testing.assert_array_equal(read_image(tmp_path / "out" / path.name), read_image(path))
    done = infer(model, folders / "split", tmp_path / "other", "--channel_suffixes", "_B8A,_B02,_B1")
    assert done.returncode == 2 and f"expected --channel_suffixes {SUFFIXES}, the order" in errors_of(done.stdout)[0]
    done = infer(model, folders / "whole", tmp_path / "other")
    assert done.returncode == 2 and "or set --channel_suffixes none" in errors_of(done.stdout)[0]
    assert not list((tmp_path / "other").glob("*.tif"))


def missing(folder):
    (folder / "scene2_B1.tif").unlink()
    return "expected one file for the channel _B1 of scene2, found none"


def doubled(folder):
    shutil.copy(folder / "scene2_B1.tif", folder / "scene2_B1.png")
    return "expected one file for the channel _B1 of scene2, found scene2_B1.png and scene2_B1.tif"


def smaller(folder):
    tifffile.imwrite(folder / "scene2_B1.tif", tifffile.imread(folder / "scene2_B1.tif")[:-1])
    return "scene2_B1.tif with 63 x 80 and orientation 1; resample them to one grid"


def colored(folder):
    skimage.io.imsave(folder / "scene2_B8A.png", np.zeros((64, 80, 3), np.uint8), check_contrast=False)
    return "scene2_B8A.png, found 3; check the suffixes"


@pytest.mark.parametrize("dtype", ["uint8"], indirect=True)
@pytest.mark.parametrize("damage", [missing, doubled, smaller, colored])
def test_images_that_are_not_complete_are_reported_by_name(folders, tmp_path, damage):
    words = damage(folders / "split")
    done = build(folders, "split", "--channel_suffixes", SUFFIXES)
    assert done.returncode == 2 and words in "\n".join(errors_of(done.stdout)), done.stdout
    assert not list((folders / "db_split").glob("*.lmdb"))
    done = build(folders, "split", "--channel_suffixes", SUFFIXES, "--skip_bad", 1)
    assert done.returncode == 0, done.stdout
    save_random_model(tmp_path / "model", 3, 2)
    done = infer(tmp_path / "model", folders / "split", tmp_path / "out", "--channel_suffixes", SUFFIXES)
    assert done.returncode == 2 and words in "\n".join(errors_of(done.stdout)), done.stdout
    others = sorted(path.name for path in (tmp_path / "out").glob("*.tif"))
    expected = [] if damage in (missing, doubled) else [f"scene{i}.tif" for i in range(COUNT) if i != 2]
    assert others == expected  # missing and duplicate files are reported before work begins


@pytest.mark.parametrize("suffixes", ["_a,,_b", "_a,_a", "", "x/y"])
def test_suffixes_that_cannot_be_are_refused(tmp_path, suffixes):
    done = run_script("build_lmdb.py", "--channel_suffixes", suffixes)
    assert done.returncode == 2 and "expected distinct suffixes" in done.stdout


def test_types_are_widened_and_pixels_without_data_stay_so(tmp_path):
    for name in ("split", "whole", "masks"):
        (tmp_path / name).mkdir()
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 7e5, 0, -10, 5e6), "height": 64, "width": 80}
    for index in range(2):
        image, mask = make_pair(index, (64, 80, 2), "uint16")
        tifffile.imwrite(tmp_path / "masks" / f"s{index}.tif", mask)
        image[:16, :, 0], image[8:20, :, 1] = 0, 0
        whole = image.astype(np.float32)
        whole[image == 0] = np.nan
        write_tiff(tmp_path / "whole" / f"s{index}.tif", whole)
        for channel, kind in enumerate(("uint16", "float32")):
            path = tmp_path / "split" / f"s{index}_{channel}.tif"
            with rasterio.open(path, "w", count=1, dtype=kind, nodata=0, **place) as file:
                file.write(image[..., channel].astype(kind), 1)
    assert build(tmp_path, "whole").returncode == 0
    done = build(tmp_path, "split", "--channel_suffixes", "_0,_1")
    assert done.returncode == 0, done.stdout
    assert records_of(tmp_path / "db_split")[0] == records_of(tmp_path / "db_whole")[0]
    save_random_model(tmp_path / "model", 2, 2)
    done = infer(tmp_path / "model", tmp_path / "split", tmp_path / "out", "--channel_suffixes", "_0,_1")
    assert done.returncode == 0, done.stdout
    with rasterio.open(tmp_path / "out" / "s0.tif") as file:
        assert (file.crs, file.transform) == (place["crs"], place["transform"])


def test_values_without_data_that_differ_are_refused(tmp_path):
    for name in ("split", "masks"):
        (tmp_path / name).mkdir()
    for index in range(2):
        image, mask = make_pair(index, (64, 80, 2), "uint16")
        tifffile.imwrite(tmp_path / "masks" / f"s{index}.tif", mask)
        for channel, declared in enumerate((0, 9)):
            tag = [(42113, "s", 0, str(declared), True)]
            tifffile.imwrite(tmp_path / "split" / f"s{index}_{channel}.tif", image[..., channel], extratags=tag)
    done = build(tmp_path, "split", "--channel_suffixes", "_0,_1")
    assert done.returncode == 2 and "channels with the same value for pixels" in "\n".join(errors_of(done.stdout))
