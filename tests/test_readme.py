"""The options, commands, messages and files in the README match the project."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import textwrap

import numpy as np
import pytest
import rasterio
import tifffile
from conftest import ROOT, make_pair, readme_commands
from option_tables import SCRIPTS, place_of, table
from test_benchmarks import SMALL
from test_inference_unet import infer, save_random_model

TEXT = (ROOT / "README.md").read_text()
# Options that make a command finish within seconds. If an option is given twice, the last value counts.
TINY = ["--baseline_feature_depth", "2", "--test_every_n_steps", "2", "--max_epochs", "1"]
RUN_HERE = {
    "bash data/run_example.sh": TINY,
    "python build_lmdb.py": [],
    "python train_unet.py": TINY,
    "python inference_unet.py": [],
    "python tests/benchmarks/augmentation_sheet.py": [],
}
RUN_ELSEWHERE = {f"python tests/benchmarks/{name}" for name in (*SMALL, "quality.py")}  # test_benchmarks.py
RUN_ELSEWHERE |= {"sbatch train_unet.sbatch", "sbatch --nodes=2", "sbatch --array=1-2"}  # test_slurm.py
RUN_ELSEWHERE |= {". .venv/bin/activate", "bash tests/run.sh"}  # run by whoever runs these tests


def beginning(command):
    return " ".join(shlex.split(command)[:2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_options_is_that_of_the_parser(script):
    written = place_of(script, TEXT)[0]
    assert written == table(importlib.import_module(script).build_parser()), "to fix, run tests/option_tables.py"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copy the project, without ignored files, to a folder with a space in its name; return the folder."""
    folder = tmp_path_factory.mktemp("a fresh") / "clone"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.lmdb", "example", "results")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def test_every_command_is_run_by_some_test():
    assert {beginning(command) for command in readme_commands()} == RUN_HERE.keys() | RUN_ELSEWHERE


@pytest.mark.parametrize("command", [each for each in readme_commands() if beginning(each) in RUN_HERE])
def test_a_command_runs_as_it_is_written_and_leaves_no_temporary_file(project, command, tmp_path):
    more = shlex.join(RUN_HERE[beginning(command)])
    done = run_in(project, "bash", "-c", f"{command} {more}", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert not list(tmp_path.iterdir())


def run_in(folder, *command, **variables):
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def test_the_recipe_of_cross_validation_pools_the_scores_of_its_folds(project, tmp_path):
    [recipe] = re.findall(r"^```sh\n(#!/bin/bash\n#SBATCH --array=1-5.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    recipe = recipe.replace("python ", f"python {shlex.quote(str(project))}/").replace(
        "train_unet.py", f"train_unet.py {shlex.join(TINY)}"
    )
    for name in ("images", "masks"):
        (tmp_path / name).symlink_to(project / "data" / name)
    for fold in (1, 2):
        array = {"ID": fold, "MIN": 1, "MAX": 5, "COUNT": 5}
        variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        done = run_in(tmp_path, "bash", "-e", "-c", recipe, **variables)
        assert done.returncode == 0, done.stdout
    rows = (tmp_path / "folds" / "masks" / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 8 + 1 and rows[-1].startswith(f"total,{2 * 8 * 256 * 256},")


def test_a_second_run_of_the_example_takes_what_is_there(project, tmp_path):
    databases, masks = (sorted((project / "data" / "example").glob(name)) for name in ("*.lmdb", "masks/*.tif"))
    assert (len(databases), len(masks)) == (2, 40)
    before = {path: path.stat().st_mtime_ns for path in databases + masks}
    one_epoch_more = [*TINY[:-1], "2"]
    done = run_in(tmp_path, "bash", project / "data" / "run_example.sh", *one_epoch_more)
    assert done.returncode == 0 and "resuming at step 2, after 1 test epochs" in done.stdout, done.stdout
    assert [path for path in before if path.stat().st_mtime_ns == before[path]] == databases


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Change to a folder with a network and images at the paths in the examples; return the folder of masks."""
    save_random_model(tmp_path / "results" / "cells" / "saved_model", 1, 3)
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    tifffile.imwrite(images / "cells_00.tif", make_pair(0, (90, 70, 1))[0][..., 0])
    size = {"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(images / "slide.tif", make_pair(1)[0][..., 0], **size)
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(0.5, 0, 7e5, 0, -0.5, 5e6)}
    with rasterio.open(images / "scene.tif", "w", width=64, height=64, count=1, dtype="uint16", **place) as file:
        file.write(make_pair(2)[0][..., 0], 1)
    done = infer(tmp_path / "results" / "cells" / "saved_model", images, tmp_path / "results" / "masks")
    assert done.returncode == 0, done.stdout
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results" / "masks"


def run_example(words):
    """Run the only Python example that contains `words`; return its variables."""
    [code] = [each for each in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE) if words in each]
    variables = {}
    exec(code, variables)
    return variables


def test_the_model_is_run_by_tensorflow_alone(results):
    mask = run_example("tf.saved_model.load")["mask"]
    expected = tifffile.imread(results / "cells_00.tif")
    assert (mask == expected).mean() > 0.999 and len(np.unique(expected)) > 1


def test_rasterio_finds_where_a_mask_lies(results):
    variables = run_example("import rasterio")
    with rasterio.open(results.parents[1] / "data" / "images" / "scene.tif") as image:
        assert (variables["mask"].crs, variables["mask"].transform) == (image.crs, image.transform)
    np.testing.assert_array_equal(variables["classes"], tifffile.imread(results / "scene.tif"))


def test_tifffile_finds_the_size_of_a_masks_pixels(results, capsys):
    run_example("rows_per_cm")
    assert capsys.readouterr().out == "0.5 0.25\n"


def messages_of_the_code():
    """Return all strings of the modules, one per line, with "..." in place of interpolated values."""
    found = []
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\w]*[sdfg]", "...", node.value))
    return "\n".join(found)


def test_messages_that_are_explained_are_those_of_the_code():
    section = TEXT.split("## When something is wrong")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    assert len(rows) >= 12
    code = messages_of_the_code()
    missing = [message for message in re.findall(r"`(.*?)`", "".join(rows)) if message not in code]
    assert not missing


def test_files_that_are_named_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:data|tests)/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / name).exists() or name.endswith((".lmdb", ".tsv")) or name.startswith("data/example/"), name


def test_the_block_of_augmentation_parameters_is_that_of_the_reader():
    [block] = re.findall(r"^```python\n(# setup the image data augmentation.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert textwrap.indent(block, 8 * " ") in (ROOT / "imagereader.py").read_text()
