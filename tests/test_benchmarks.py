"""Check that the benchmarks run and print figures. Judge the figures by hand on a quiet machine."""

import functools
import json
import math
import subprocess
import sys

import pytest
import skimage.io
from conftest import ROOT, write_folders


@functools.lru_cache  # two tests read the output of the inference benchmark
def run_benchmark(name, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmarks" / name, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(value):
    """Return all numbers in nested lists and dictionaries."""
    if isinstance(value, (dict, list)):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


SMALL = {
    "build_database.py": ["--images", 3, "--turns", 1],
    "reader_throughput.py": ["--cases", "32:2:uint8", "--batches", 2, "--batch_size", 2, "--runs", 1],
    "augment_operations.py": ["--cases", "32:2:uint8", "--runs", 1],
    "hand_off.py": ["--case", "32:1:uint8", "--batch_size", 2, "--runs", 1],
    "reader_startup.py": ["--records", 200, "--runs", 1],
    "training_step.py": [
        "--case", "32:1:uint8", "--batch_size", 2, "--baseline_feature_depth", 2, "--steps", 2, "--runs", 1, "--pin", 1,
    ],
    "inference_tiling.py": ["--edge", 500, "--tile_size", 256, "--runs", 1, "--memory_edges", 300],
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_one_line_of_finite_figures(name):
    results = json.loads(run_benchmark(name, *SMALL[name], "--json"))
    found = numbers(results)
    assert len(found) > 5 and all(math.isfinite(number) for number in found)
    assert "numpy" in results["machine"]


def test_the_sheet_of_objects_is_drawn(tmp_path):
    images, masks = write_folders(tmp_path, count=2)
    run_benchmark(
        "objects_sheet.py", images, masks, masks, "--output", tmp_path / "sheet.png", "--titles", "one", "two"
    )
    rows, columns, _ = skimage.io.imread(tmp_path / "sheet.png").shape
    assert columns > rows > 400  # two images in rows, each with two folders of objects


def test_the_throughput_of_a_peer_is_read_from_its_output(tmp_path):
    peer = tmp_path / "a peer.py"
    peer.write_text("import sys; print('n=32 workers=1 of', sys.argv[1:], ': 12.5 img/s')")
    arguments = [*SMALL["reader_throughput.py"], "--readers", 1, "--augmentation", 0]
    printed = run_benchmark("reader_throughput.py", *arguments, "--peer", f"'{sys.executable}' '{peer}'")
    assert "plain" in printed and "peer     12 (12 to 12)" in printed


def test_an_idle_consumer_still_gives_figures():
    arguments = ["--cases", "256:2:uint8", "--augmentation", 1, "--batches", 16, "--batch_size", 4, "--runs", 1]
    arguments += ["--idle_consumer", 1]
    lines = json.loads(run_benchmark("reader_throughput.py", *arguments, "--json"))["lines"]
    assert [line["readers"] for line in lines] == [1, 2] and all(line["over_first"] > 0 for line in lines)


def test_the_contact_sheet_shows_the_augmentation(databases, tmp_path):
    run_benchmark("augmentation_sheet.py", databases[0], tmp_path / "sheet.png")
    sheet = skimage.io.imread(tmp_path / "sheet.png")
    assert sheet.shape[0] > 500 and sheet.shape[1] > 1500 and sheet[..., :3].std() > 20


def test_the_table_of_halos_shows_errors_that_vanish_at_the_radius():
    results = json.loads(run_benchmark("inference_tiling.py", *SMALL["inference_tiling.py"], "--json"))
    *table, automatic = results["lines"]
    assert [line["halo"] for line in table] == list(range(0, 97, 16))
    assert table[0]["misclassified_pixels"] > 0 and table[0]["rmse"] > 2 * table[2]["rmse"] > 1e-5
    assert table[-1]["misclassified_pixels"] == automatic["misclassified_pixels"] == 0
    assert max(table[-1]["rmse"], automatic["rmse"]) < 1e-6
    assert results["memory"][0]["edge"] == 300 and 100 < results["memory"][0]["peak_mebibytes"] < 10_000


COPY_WITHOUT_LEVERS = """
import json, pathlib, sys
import quality
assignments = {target: value for *_, lever in quality.LEVERS.values() for target, value in lever.items()}
quality.copy_suite(pathlib.Path(sys.argv[1]), assignments)
print(json.dumps(assignments))
"""


def test_levers_without_an_option_are_pulled_by_assignments_of_a_copy(tmp_path):
    command = [sys.executable, "-c", COPY_WITHOUT_LEVERS, tmp_path / "suite"]
    done = subprocess.run(command, cwd=ROOT / "tests" / "benchmarks", capture_output=True, text=True, check=True)
    assignments = json.loads(done.stdout)
    changed = "\n".join((tmp_path / "suite" / name).read_text() for name in ("imagereader.py", "unet_model.py"))
    assert len(assignments) == 6 and all(f"{target} = {value}\n" in changed for target, value in assignments.items())


def test_the_table_of_masks_is_continued_and_scores_held_out_images(tmp_path):
    write_folders(tmp_path, count=10, shape=(64, 64, 1))
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import json, os, sys; held = len(os.listdir(sys.argv[1] + '/te/masks'))\n"
        "print(json.dumps({'dice': [held / 10, float(sys.argv[3])]}))"
    )
    arguments = ["--results", tmp_path / "results.jsonl", "--image_folder", tmp_path / "images"]
    arguments += ["--mask_folder", tmp_path / "masks", "--seconds", 15, "--options", "--batch_size 2 --xla 0"]
    arguments += ["--peer", f"'{sys.executable}' '{peer}' {{folder}} {{seconds}} {{seed}}", "--json"]
    first = json.loads(run_benchmark("quality.py", *arguments, "--variants", "all-loss"))["lines"]
    both = json.loads(run_benchmark("quality.py", *arguments, "--variants", "all-loss", "peer", "--seeds", 0, 1))[
        "lines"
    ]
    assert [(line["variant"], line["runs"]) for line in both] == [("all-loss", 2), ("peer", 2)]
    assert both[1]["dice"] == [0.2, 0.5] and (both[1]["least"], both[1]["greatest"]) == (0.1, 0.6)
    assert 0 <= both[0]["least"] <= first[0]["mean"] <= both[0]["greatest"] <= 1
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(run["variant"], run["seed"]) for run in runs] == [
        ("all-loss", 0),
        ("peer", 0),
        ("all-loss", 1),
        ("peer", 1),
    ]
    assert runs[0]["steps"] > 0 and runs[0]["options"] == "--batch_size 2 --xla 0"
