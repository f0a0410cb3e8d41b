"""Check that one version of TensorFlow reads what another one wrote; tests/compatibility.sh sets up the other."""

import os
import sys

import numpy as np
import pytest
import tifffile
from conftest import run_script
from test_train_unet import arguments, read_csv

OTHER_PYTHON = os.environ.get("OTHER_PYTHON")
pytestmark = pytest.mark.skipif(not OTHER_PYTHON, reason="tests/compatibility.sh names another Python with TensorFlow")
PYTHONS = {"this": sys.executable, "the other": OTHER_PYTHON}
SHORT = ["--test_every_n_steps", 4, "--learning_rate", 3e-3]


@pytest.fixture(scope="module", params=PYTHONS)
def run(request, databases, tmp_path_factory):
    """Return the output folder of a short run, and the Python that did not do the run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    python = PYTHONS[request.param]
    done = run_script("train_unet.py", *arguments(databases, folder, *SHORT, "--max_epochs", 2), python=python)
    assert done.returncode == 0, done.stdout
    return folder, next(other for name, other in PYTHONS.items() if name != request.param)


def test_a_saved_model_gives_the_same_softmax_in_both(run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    tifffile.imwrite(images / "a.tif", np.random.default_rng(0).integers(0, 200, (200, 333)).astype(np.uint16))
    results = []
    for name, python in PYTHONS.items():
        options = ["--saved_model_filepath", run[0] / "saved_model", "--image_folder", images, "--output_folder"]
        done = run_script("inference_unet.py", *options, tmp_path / name, "--save_probabilities", 1, python=python)
        assert done.returncode == 0, done.stdout
        results.append(tifffile.imread(tmp_path / name / "probabilities" / "a.tif"))
    np.testing.assert_allclose(*results, atol=1e-5)
    assert results[0].std() > 1e-3


def test_a_checkpoint_is_resumed_by_the_other(run, databases):
    folder, other = run
    done = run_script("train_unet.py", *arguments(databases, folder, *SHORT, "--max_epochs", 3), python=other)
    assert done.returncode == 0 and "resuming at step 8, after 2 test epochs" in done.stdout, done.stdout
    assert [row["step"] for row in read_csv(folder / "metrics.csv")] == ["4", "8", "12"]
