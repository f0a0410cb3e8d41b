"""Nested folders, compared with the same files in one flat folder."""

import csv
import os

import numpy as np
import pytest
import tifffile
from conftest import errors_of, make_pair, run_script, write_tiff
from test_inference_unet import infer, save_random_model

from image_files import read_image
from lmdb_utils import Database

NAMES = ["day1/plate a/cell0", "day1/plate a/cell1", "day1/cell0", "day2/cell0", "top"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    save_random_model(folder, 1, 2)
    return folder


@pytest.fixture
def tree(tmp_path):
    """Write images and masks into nested folders, and the same files into flat folders; return both parents."""
    for index, name in enumerate(NAMES):
        image, mask = make_pair(index, (64, 80, 1))
        for parent, file in (("tree", name), ("flat", name.replace("/", "+"))):
            for kind, pixels in (("images", image), ("masks", mask)):
                path = tmp_path / parent / kind / f"{file}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tiff(path, pixels if pixels.ndim == 3 else pixels[..., None])
    return tmp_path / "tree", tmp_path / "flat"


def records_of(folder):
    """Return the records of both databases by image name."""
    found = {}
    for side in ("train", "test"):
        with Database(folder / f"{side}-dataset.lmdb") as database:
            metadata = database.metadata
            for index in range(metadata.count):
                name = metadata.names[metadata.record_image[index]]
                found[name.replace("/", "+")] = side, *(each.tobytes() for each in database.read(index))
    return found


def build(parent, *options):
    folders = [
        "--image_folder",
        parent / "images",
        "--mask_folder",
        parent / "masks",
        "--output_folder",
        parent / "out",
    ]
    return run_script("build_lmdb.py", *folders, *options)


def test_a_tree_becomes_what_its_files_become_in_one_folder(tree):
    tests = tree[0].parent / "tests.txt"
    for parent, separator in zip(tree, "/+"):
        tests.write_text("\n".join(name.replace("/", separator) for name in NAMES[2:4]))
        done = build(parent, "--recursive", 1, "--test_list", tests)
        assert done.returncode == 0, done.stdout
    found, expected = (records_of(parent / "out") for parent in tree)
    assert found == expected and len(found) == len(NAMES)
    assert {name for name, record in found.items() if record[0] == "test"} == {"day1+cell0.tif", "day2+cell0.tif"}


def test_folders_are_groups(tree):
    done = build(tree[0], "--recursive", 1, "--split_by", "^[^/]+", "--fold", "1/3")
    assert done.returncode == 0, done.stdout
    sides = {}
    for name, (side, *_) in records_of(tree[0] / "out").items():
        sides.setdefault(name.split("+")[0], set()).add(side)
    assert all(len(of_group) == 1 for of_group in sides.values())
    listed = (tree[0] / "out" / "test-dataset.txt").read_text().split("\n")[:-1]
    assert listed and all((tree[0] / "images" / name).is_file() for name in listed)


def test_what_has_no_partner_is_reported_by_its_path(tree):
    (tree[0] / "masks" / "day2" / "cell0.tif").rename(tree[0] / "masks" / "day2" / "cell1.tif")
    done = build(tree[0], "--recursive", 1)
    text = "\n".join(errors_of(done.stdout))
    assert done.returncode == 2 and str(tree[0] / "images" / "day2" / "cell0.tif") in text
    assert str(tree[0] / "masks" / "day2" / "cell1.tif") in text


def test_without_the_option_folders_are_named(tree):
    for path in tree[0].glob("images/*.tif"):
        path.unlink()
    done = build(tree[0])
    [error] = errors_of(done.stdout)
    assert done.returncode == 2 and "the folders day1, day2" in error and "--recursive 1" in error


def segment(parent, model, *options):
    done = infer(model, parent / "images", parent / "out", "--mask_folder", parent / "masks", *options)
    assert done.returncode == 0, done.stdout
    return done.stdout


OPTIONS = ["--recursive", 1, "--save_overlay", 1, "--save_probabilities", 1, "--save_table", 1, "--save_report", 1]


def test_output_mirrors_the_tree(tree, model):
    log = segment(tree[0], model, *OPTIONS)
    segment(tree[1], model, *OPTIONS)
    assert "day1/plate a/cell0.tif: 64 x 80 x 1" in log
    for name in NAMES:
        flat = name.replace("/", "+")
        for folder, extension in (("", "tif"), ("probabilities", "tif"), ("overlays", "png")):
            found, expected = (
                read_image(parent / "out" / folder / f"{file}.{extension}") for parent, file in zip(tree, (name, flat))
            )
            np.testing.assert_array_equal(found, expected)
        for extension in ("json", "jpg"):
            assert (tree[0] / "out" / "figures" / f"{name}.tif.{extension}").is_file()
    for file in ("scores.csv", "table.csv"):
        rows = []
        for parent in tree:
            with open(parent / "out" / file, newline="") as opened:
                rows.append(sorted([row[0].replace("/", "+"), *row[1:]] for row in csv.reader(opened)))
        assert rows[0] == rows[1]
    assert "5 masks already exist" in segment(tree[0], model, *OPTIONS)


def test_links_hidden_folders_and_earlier_output_are_not_taken_for_input(tree, model):
    images = tree[0] / "images"
    (images / "day1" / "loop").symlink_to(images, target_is_directory=True)
    (images / ".cache").mkdir()
    write_tiff(images / ".cache" / "a.tif", make_pair(0)[0])
    (images / "linked").symlink_to(tree[1] / "images", target_is_directory=True)
    out = images / "day2" / "masks"
    for _ in range(2):
        done = infer(model, images, out, "--recursive", 1)
        assert done.returncode == 0, done.stdout
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.tif"))
    linked = [f"linked/{name.replace('/', '+')}.tif" for name in NAMES]
    assert found == sorted([*(f"{name}.tif" for name in NAMES), *linked])
    again = images / "other masks"
    done = infer(model, images, again, "--recursive", 1)
    assert done.returncode == 0 and f"left out {out}," in done.stdout, done.stdout
    assert sorted(path.relative_to(again).as_posix() for path in again.rglob("*.tif")) == found
    # Output in a folder that also contains images does not hide these images from the next run.
    assert infer(model, tree[1] / "images", images / "day1", "--save_table", 1).returncode == 0
    done = infer(model, images, again, "--recursive", 1)
    assert done.returncode == 0 and (again / "day1" / "day1+cell0.tif").is_file(), done.stdout


def test_what_a_killed_run_left_in_the_tree_is_removed(tree, model):
    segment(tree[0], model, "--recursive", 1)
    left = tree[0] / "out" / "day1" / "plate a" / ".cell0.tif.0123abcd.part.tif"
    left.write_bytes(b"")
    segment(tree[0], model, "--recursive", 1)
    assert not left.exists()


def test_lists_and_shards_share_a_tree(tree, model):
    (tree[0] / "list.txt").write_text("day1/cell0\nday2/cell0.tif\ntop\n")
    for part in "1/2", "2/2":
        done = infer(
            model, tree[0] / "images", tree[0] / "out", "--recursive", 1, "--shard", part, "--image_list",
            tree[0] / "list.txt", "--save_table", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    with open(tree[0] / "out" / "table.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)][::2] == ["day1/cell0.tif", "day2/cell0.tif", "top.tif"]
    assert len(list((tree[0] / "out").rglob("*.tif"))) == 3


def test_masks_beside_their_images_differ_by_their_suffix(tree, tmp_path):
    together = tmp_path / "together"
    for kind, suffix in (("images", ""), ("masks", "_mask")):
        for path in (tree[0] / kind).rglob("*.tif"):
            target = together / path.relative_to(tree[0] / kind).with_name(f"{path.stem}{suffix}.tif")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    out = together / "out"
    for _ in range(2):
        done = run_script(
            "build_lmdb.py", "--image_folder", together, "--mask_folder", together, "--output_folder", out,
            "--mask_suffix", "_mask", "--recursive", 1, "--preview", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    assert len(records_of(out)) == len(NAMES)
    assert tifffile.imread(together / "top.tif").shape == (64, 80)
