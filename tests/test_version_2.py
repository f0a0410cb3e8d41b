"""Files of format version 2, written with TensorFlow 2.12.1, which every later version of the suite must read."""

import csv
import shutil
from pathlib import Path

import numpy as np
import tifffile
from conftest import run_script

from lmdb_utils import Database

FILES = Path(__file__).with_name("version-2")
DATABASES = ["--train_database", FILES / "train-tiny.lmdb", "--test_database", FILES / "test-tiny.lmdb"]


def test_the_database_is_read():
    with Database(FILES / "train-tiny.lmdb") as database:
        metadata, stored = database.metadata, database.record(0)
        assert metadata.names[0] == "0.tif" and len(database) == 3
        assert (metadata.classes.tolist(), metadata.ignored_id) == ([0, 1], 255)
        assert metadata.pixel_counts.sum() + metadata.info["ignored_pixels"] == 3 * 32 * 32
        image = tifffile.imread(FILES / "images" / "0.tif")
        np.testing.assert_array_equal(stored.image[..., 0], image)
        np.testing.assert_allclose([stored.mean[0], stored.deviation[0]], [image.mean(), image.std()], rtol=1e-12)
        assert (stored.mask[:4] == 255).all() and set(np.unique(stored.mask[4:])) == {0, 1}
        assert stored.no_data is None


def test_the_model_gives_the_mask_that_it_gave(tmp_path):
    done = run_script(
        "inference_unet.py", "--saved_model_filepath", FILES / "run" / "saved_model", "--image_folder",
        FILES / "images", "--output_folder", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    mask, expected = tifffile.imread(tmp_path / "0.tif"), tifffile.imread(FILES / "masks" / "0.tif")
    assert (mask == expected).mean() > 0.99 and 0.1 < expected.mean() < 0.9


def test_the_checkpoint_is_resumed(tmp_path):
    shutil.copytree(FILES / "run", tmp_path / "run")
    done = run_script(
        "train_unet.py", *DATABASES, "--output_dir", tmp_path / "run", "--batch_size", 1, "--baseline_feature_depth",
        1, "--learning_rate", 1e-2, "--test_every_n_steps", 12, "--max_epochs", 2,
        "--loss", "cross_entropy", "--dropout", 0.5, "--average_weights", 0,
        "--deep_supervision", 0,
    )  # fmt: skip
    assert done.returncode == 0 and "at step 12, after 1 test epochs" in done.stdout, done.stdout
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["12", "24"]
