"""Stacks of planes in one file, compared with each plane in its own file."""

import csv
import itertools

import numpy as np
import pytest
import tifffile
from conftest import errors_of, make_pair, run_script
from test_inference_unet import infer, save_random_model

from lmdb_utils import Database

TIMES, DEPTHS, COUNT = 2, 3, 4
SCENE_PLACES = "#s0z0", "#s0z1", "#s0z2", "#s1t0", "#s1t1"
OME = {"axes": "TZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0, "TimeIncrement": 10.0}
KINDS = {
    "OME": {"ome": True, "metadata": OME, "compression": "zlib", "rowsperstrip": 16},
    "OME, contiguous": {"ome": True, "metadata": OME},
    "ImageJ": {
        "imagej": True,
        "metadata": {"axes": "TZYX", "unit": "um", "spacing": 2.0, "finterval": 10.0},
        "resolution": (2, 4),
    },
}


def stack_of(index, channels=1, dtype="uint16"):
    """Return the planes of an image (T, Z, Y, X, C) and its masks (T, Z, Y, X)."""
    pairs = [make_pair(10 * index + plane, (64, 80, channels), dtype) for plane in range(TIMES * DEPTHS)]
    shape = TIMES, DEPTHS, 64, 80
    return np.stack([image for image, _ in pairs]).reshape(*shape, channels), np.stack(
        [mask for _, mask in pairs]
    ).reshape(shape)


def places():
    return [(time, depth) for time in range(TIMES) for depth in range(DEPTHS)]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folders(tmp_path, kind):
    """Write stacks, with masks as pages without named axes, and also each plane as its own file."""
    for name in ("stacks/images", "stacks/masks", "flat/images", "flat/masks"):
        (tmp_path / name).mkdir(parents=True)
    for index in range(COUNT):
        image, mask = stack_of(index)
        tifffile.imwrite(tmp_path / "stacks" / "images" / f"s{index}.tif", image[..., 0], **KINDS[kind])
        pages = mask.reshape(-1, *mask.shape[2:])
        tifffile.imwrite(tmp_path / "stacks" / "masks" / f"s{index}.tif", pages, photometric="minisblack")
        for time, depth in places():
            name = f"s{index}.tif#t{time}z{depth}.tif"
            tifffile.imwrite(tmp_path / "flat" / "images" / name, image[time, depth, ..., 0])
            tifffile.imwrite(tmp_path / "flat" / "masks" / name, mask[time, depth])
    return tmp_path / "stacks", tmp_path / "flat"


def build(parent, *options):
    folders = ["--image_folder", parent / "images", "--mask_folder", parent / "masks", "--output_folder", parent / "db"]
    return run_script("build_lmdb.py", *folders, *options)


def records_of(parent):
    """Return the side and the contents of each record by name."""
    found = {}
    for side in ("train", "test"):
        with Database(parent / "db" / f"{side}-dataset.lmdb") as database:
            metadata = database.metadata
            for index in range(metadata.count):
                stored = database.record(index)
                name = metadata.names[metadata.record_image[index]]
                found[name] = side, *map(np.ndarray.tobytes, stored[:4])
    return found


def test_planes_become_records(folders):
    done = build(folders[0], "--stack", "planes", "--train_fraction", 0.5)
    assert done.returncode == 0, done.stdout
    found = records_of(folders[0])
    assert len(found) == COUNT * TIMES * DEPTHS
    tests = {name.partition("#")[0] for name, record in found.items() if record[0] == "test"}
    assert len(tests) == 2  # all planes of a file are on one side
    assert all((name.partition("#")[0] in tests) == (record[0] == "test") for name, record in found.items())
    names = folders[1] / "tests.txt"
    names.write_text("\n".join(f"{name}.tif" for name, record in found.items() if record[0] == "test"))
    assert build(folders[1], "--test_list", names).returncode == 0
    expected = records_of(folders[1])
    assert {f"{name}.tif": record for name, record in found.items()} == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    save_random_model(folder, 1, 2)
    return folder


def check_stack(path, folders, kind):
    """Compare a stack of masks with the masks of the single planes."""
    with tifffile.TiffFile(path) as file:
        [series] = file.series
        assert series.axes == "TZYX" and file.is_ome and file.pages[0].is_tiled
        described = file.ome_metadata
    for text in ('PhysicalSizeX="0.5"', 'PhysicalSizeY="0.25"', 'PhysicalSizeZ="2.0"'):
        assert text in described
    found = tifffile.imread(path)
    for time, depth in places():
        flat = folders[1] / "out" / f"{path.name}#t{time}z{depth}.tif"
        np.testing.assert_array_equal(found[time, depth], tifffile.imread(flat))


def test_masks_become_a_stack(folders, model, kind):
    options = ["--save_probabilities", 1, "--save_overlay", 1, "--save_table", 1, "--save_report", 1]
    for parent, more in zip(folders, (["--stack", "planes"], [])):
        done = infer(model, parent / "images", parent / "out", "--mask_folder", parent / "masks", *options, *more)
        assert done.returncode == 0, done.stdout
    out = folders[0] / "out"
    for index in range(COUNT):
        check_stack(out / f"s{index}.tif", folders, kind)
        probabilities = tifffile.imread(out / "probabilities" / f"s{index}.tif").reshape(TIMES, DEPTHS, 64, 80, 2)
        flat = folders[1] / "out" / "probabilities" / f"s{index}.tif#t1z2.tif"
        np.testing.assert_array_equal(probabilities[1, 2], tifffile.imread(flat))
        assert (out / "overlays" / f"s{index}#t1z2.png").is_file()
    assert not (out / "planes").exists()
    for name in ("scores.csv", "table.csv"):
        rows = []
        for parent, extension in zip(folders, (".tif", "")):
            with open(parent / "out" / name, newline="") as file:
                found = ([row[0] + (extension if "#" in row[0] else ""), *row[1:]] for row in csv.reader(file))
                rows.append([[cell for cell in row if cell != "µm²"] for row in found])
        columns = 4 if name == "table.csv" else None  # the flat files declare no pixel sizes
        assert [row[:columns] for row in rows[0]] == [row[:columns] for row in rows[1]]
    done = infer(model, folders[0] / "images", out, "--stack", "planes", *options)
    assert f"{COUNT * TIMES * DEPTHS} masks already exist" in done.stdout
    # Scores computed from the mask files are the same.
    before = (out / "scores.csv").read_bytes()
    for path in (out / "figures").iterdir():
        path.unlink()
    done = infer(model, folders[0] / "images", out, "--stack", "planes", "--mask_folder", folders[0] / "masks")
    assert done.returncode == 0 and (out / "scores.csv").read_bytes() == before, done.stdout


@pytest.mark.parametrize("kind", ["OME"], indirect=True)
def test_shards_and_interrupted_runs_complete_each_other(folders, model, kind):
    out = folders[0] / "out"
    assert infer(model, folders[1] / "images", folders[1] / "out").returncode == 0
    for part in "1/2", "2/2":
        assert not list(out.glob("*.tif"))
        done = infer(model, folders[0] / "images", out, "--stack", "planes", "--shard", part)
        assert done.returncode == 0, done.stdout
    assert not (out / "planes").exists()
    for index in range(COUNT):
        check_stack(out / f"s{index}.tif", folders, kind)
    before = (out / "s0.tif").read_bytes()
    done = infer(model, folders[0] / "images", out, "--stack", "planes", "--overwrite", 1, "--shard", "1/2")
    assert done.returncode == 0 and (out / "s0.tif").read_bytes() == before  # replaced only when all planes are there
    done = infer(model, folders[0] / "images", out, "--stack", "planes", "--overwrite", 1, "--shard", "2/2")
    assert done.returncode == 0, done.stdout
    check_stack(out / "s0.tif", folders, kind)


@pytest.mark.parametrize("kind", ["OME"], indirect=True)
def test_without_the_option_a_stack_is_refused_in_a_line_that_names_it(folders, model, kind):
    done = build(folders[0])
    assert done.returncode == 2 and "set --stack planes" in "\n".join(errors_of(done.stdout))
    done = infer(model, folders[0] / "images", folders[0] / "out")
    assert done.returncode == 2 and "set --stack planes" in "\n".join(errors_of(done.stdout))


@pytest.mark.parametrize("kind", ["OME"], indirect=True)
def test_stacks_that_do_not_fit_are_reported_and_left_out(folders, model, kind):
    masks = folders[0] / "masks"
    tifffile.imwrite(masks / "s1.tif", tifffile.imread(masks / "s1.tif")[:-1], photometric="minisblack")
    strange = np.zeros((2, 3, 64, 80), np.uint16)
    tifffile.imwrite(folders[0] / "images" / "s2.tif", strange, photometric="minisblack")  # two axes without names
    done = build(folders[0], "--stack", "planes")
    errors = "\n".join(errors_of(done.stdout))
    assert done.returncode == 2 and "stacks that do not fit together (2)" in errors, errors
    assert "s1.tif, found 6 (#t0z0 to #t1z2) and 5 (#q0 to #q4)" in errors and "found QQYX" in errors
    assert build(folders[0], "--stack", "planes", "--skip_bad", 1).returncode == 0
    done = infer(model, folders[0] / "images", folders[0] / "out", "--stack", "planes")
    assert done.returncode == 2 and "found QQYX" in "\n".join(errors_of(done.stdout))


def test_scenes_keep_their_sizes(tmp_path, model):
    """One OME-TIFF contains two images of different heights, widths, axes and pixel sizes."""
    about = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}, {"axes": "TYX"}
    for name in ("images", "masks", "flat"):
        (tmp_path / name).mkdir()
    for index in range(2):
        for name, pixels in zip(("images", "masks"), stack_of(index)):
            pixels = pixels.reshape(TIMES, DEPTHS, 64, 80)
            scenes = pixels[0], pixels[:, 0, 16:, 16:]
            with tifffile.TiffWriter(tmp_path / name / f"{index}.ome.tif", ome=True) as writer:
                for scene, metadata in zip(scenes, about):
                    writer.write(scene, metadata=metadata, photometric="minisblack")
            for place, plane in zip(SCENE_PLACES, itertools.chain(*scenes) if name == "images" else ()):
                tifffile.imwrite(tmp_path / "flat" / f"{index}{place}.tif", plane)
    tiled = "--use_tiling", 1, "--tile_size", 112  # because all records have one size
    done = build(tmp_path, "--stack", "planes", "--train_fraction", 0.5, *tiled)
    assert done.returncode == 0, done.stdout
    assert {name for name in records_of(tmp_path)} == {
        f"{i}.ome.tif{place}" for i in range(2) for place in SCENE_PLACES
    }
    done = infer(model, tmp_path / "images", tmp_path / "out", "--stack", "planes", "--mask_folder", tmp_path / "masks")
    assert done.returncode == 0 and infer(model, tmp_path / "flat", tmp_path / "expected").returncode == 0, done.stdout
    for index in range(2):
        with tifffile.TiffFile(tmp_path / "out" / f"{index}.ome.tif") as file:
            assert [(each.axes, each.shape) for each in file.series] == [("ZYX", (3, 64, 80)), ("TYX", (2, 48, 64))]
            assert file.ome_metadata.count('PhysicalSizeZ="2.0"') == 1
            found = itertools.chain(*(each.asarray() for each in file.series))
        for place, plane in zip(SCENE_PLACES, found):
            np.testing.assert_array_equal(plane, tifffile.imread(tmp_path / "expected" / f"{index}{place}.tif"))


def test_channels_in_two_files_are_stacked_as_well(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(2):
        image, mask = stack_of(index, channels=2)
        for channel in range(2):
            path = tmp_path / "images" / f"s{index}_C{channel}.ome.tif"
            tifffile.imwrite(path, image[..., channel], **KINDS["OME"])
        tifffile.imwrite(tmp_path / "masks" / f"s{index}.tif", mask, ome=True, metadata={"axes": "TZYX"})
    options = ["--stack", "planes", "--channel_suffixes", "_C0.ome,_C1.ome"]
    done = build(tmp_path, *options)
    assert done.returncode == 0, done.stdout
    records = records_of(tmp_path)
    image = stack_of(1, channels=2)[0]
    assert records["s1.tif#t1z0"][1] == image[1, 0].tobytes()
    save_random_model(tmp_path / "model", 2, 2)
    done = infer(
        tmp_path / "model", tmp_path / "images", tmp_path / "out", "--mask_folder", tmp_path / "masks", *options
    )
    assert done.returncode == 0 and tifffile.imread(tmp_path / "out" / "s0.tif").shape == (2, 3, 64, 80), done.stdout
