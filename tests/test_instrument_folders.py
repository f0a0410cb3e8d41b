"""Run folders as agencies and microscopes write them through build, training, inference, scores and report."""

import csv

import numpy as np
import rasterio
import tifffile
from conftest import make_pair, run_script
from test_train_unet import arguments

from lmdb_utils import Database

BANDS = ("_B02", "_B03", "_B8A")


def run_all(folder, *options, build_options=()):
    """Build, train, segment and score; return the rows of the scores by image name."""
    folders = ["--image_folder", folder / "images", "--mask_folder", folder / "masks"]
    done = run_script("build_lmdb.py", *folders, "--output_folder", folder / "db", *options, *build_options)
    assert done.returncode == 0, done.stdout
    databases = [folder / "db" / f"{side}-dataset.lmdb" for side in ("train", "test")]
    done = run_script(
        "train_unet.py", *arguments(databases, folder / "run", "--test_every_n_steps", 2, "--max_epochs", 1)
    )
    assert done.returncode == 0, done.stdout
    options = [option for option in options if option not in ("--channel_suffixes", ",".join(BANDS))]  # from the model
    done = run_script(
        "inference_unet.py", "--saved_model_filepath", folder / "run" / "saved_model", *folders, "--output_folder",
        folder / "out", "--save_report", 1, "--save_table", 1, "--no_data_class", 3, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (folder / "out" / "report.html").read_text().count("data:image/jpeg") > 3
    with open(folder / "out" / "scores.csv", newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def test_a_tree_of_scenes_with_a_file_for_each_band(tmp_path):
    place = {"crs": "EPSG:32632", "height": 64, "width": 80, "count": 1}
    names = [f"tile{tile}/{date}/scene" for tile in range(2) for date in ("2024-05-01", "2024-06-01")]
    for index, name in enumerate(names):
        image, mask = make_pair(index, (64, 80, 3), "uint16")
        image[:10, :20] = 0
        where = rasterio.Affine(10, 0, 7e5 + 800 * index, 0, -10, 5e6)
        for kind in ("images", "masks"):
            (tmp_path / kind / name).parent.mkdir(parents=True)
        for band, suffix in enumerate(BANDS):
            path = tmp_path / "images" / f"{name}{suffix}.tif"
            with rasterio.open(path, "w", dtype="uint16", nodata=0, transform=where, **place) as file:
                file.write(image[..., band], 1)
        tifffile.imwrite(tmp_path / "masks" / f"{name}.tif", mask)
    scores = run_all(
        tmp_path, "--recursive", 1, "--channel_suffixes", ",".join(BANDS), build_options=["--split_by", "^[^/]+"]
    )
    assert sorted(scores) == sorted([*(f"{name}.tif" for name in names), "total"])
    assert scores["total"]["pixels"] == str(4 * (64 * 80 - 10 * 20))
    sides = []
    for side in ("train", "test"):
        with Database(tmp_path / "db" / f"{side}-dataset.lmdb") as database:
            assert database.metadata.image_shape == (64, 80, 3)
            sides.append({name.split("/")[0] for name in database.metadata.names})
    assert sorted(map(len, sides)) == [1, 1] and sides[0] != sides[1]
    with rasterio.open(tmp_path / "out" / f"{names[3]}.tif") as file:
        mask = file.read(1)
        assert file.crs == place["crs"] and file.transform == where and file.nodata == 3
    assert (mask[:10, :20] == 3).all() and (mask == 3).sum() == 200
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["unit"] == "m²" and float(rows[0]["area"]) == 100 * int(rows[0]["pixels"])


def test_stacks_with_a_file_for_each_channel(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    axes = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    for index in range(4):
        pairs = [make_pair(3 * index + plane, (64, 80, 3), "uint8") for plane in range(3)]
        image, mask = (np.stack(each) for each in zip(*pairs))
        for channel, suffix in enumerate(BANDS):
            path = tmp_path / "images" / f"embryo{index}{suffix}.tif"
            tifffile.imwrite(path, image[..., channel], ome=True, metadata=axes, photometric="minisblack")
        tifffile.imwrite(tmp_path / "masks" / f"embryo{index}.tif", mask, ome=True, metadata=axes)
    scores = run_all(tmp_path, "--stack", "planes", "--channel_suffixes", ",".join(BANDS))
    labels = [f"embryo{index}.tif#z{plane}" for index in range(4) for plane in range(3)]
    assert sorted(scores) == sorted([*labels, "total"])
    for index in range(4):
        with tifffile.TiffFile(tmp_path / "out" / f"embryo{index}.tif") as file:
            assert file.series[0].axes == "ZYX" and file.series[0].shape == (3, 64, 80)
