"""Compare masks of several models and mirror images with the mean of their softmax on the complete image."""

import numpy as np
import pytest
import tifffile
from conftest import errors_of, make_pair, run_script, write_tiff, z_score
from scipy import special
from test_inference_unet import save_random_model

FLOORS = (1.0, 40.0)  # the second one is above the deviation of the images


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folders of two models that normalize differently, and their networks."""
    folder = tmp_path_factory.mktemp("models")
    networks = [save_random_model(folder / str(i), 1, 3, seed=i, deviation_floor=[FLOORS[i]]) for i in range(2)]
    return [folder / "0", folder / "1"], networks


def whole_image(image, networks, flips):
    """Return the mean softmax (H, W, classes) over networks and mirror images of an image of any size."""
    results = []
    for network, floor in networks:
        scores = z_score(image, floor)
        padded = np.pad(scores, [(0, -length % 16) for length in scores.shape[:2]] + [(0, 0)], mode="reflect")
        for axes in [(), (0,), (1,), (0, 1)] if flips else [()]:
            logits = np.asarray(network(np.ascontiguousarray(np.flip(padded, axes))[None], training=False))[0]
            results.append(np.flip(special.softmax(logits.astype(np.float64), axis=-1), axes))
    height, width = image.shape[:2]
    return np.mean(results, axis=0)[:height, :width]


@pytest.mark.parametrize("count, flips", [(1, 1), (2, 0), (2, 1)])
def test_the_softmax_is_the_mean_over_models_and_mirror_images(tmp_path, models, count, flips):
    image = make_pair(3, (423, 331, 1), "uint8")[0]
    (tmp_path / "images").mkdir()
    write_tiff(tmp_path / "images" / "a.tif", image)
    options = ["--image_folder", tmp_path / "images", "--output_folder", tmp_path / "masks", "--tile_size", 224]
    options += ["--flips", flips, "--save_probabilities", 1]
    done = run_script("inference_unet.py", "--saved_model_filepath", *models[0][:count], *options)
    assert done.returncode == 0, done.stdout
    assert all(f"model {folder}: 1 channel, 3 classes, " in done.stdout for folder in models[0][:count])
    expected = whole_image(image, list(zip(models[1], FLOORS))[:count], flips)
    softmax = tifffile.imread(tmp_path / "masks" / "probabilities" / "a.tif")
    np.testing.assert_allclose(softmax, expected, atol=2e-6)
    mask, best = tifffile.imread(tmp_path / "masks" / "a.tif"), expected.argmax(axis=2)
    sure = np.sort(expected, axis=2)[..., -1] - np.sort(expected, axis=2)[..., -2] > 1e-5
    np.testing.assert_array_equal(mask[sure], best[sure])
    # One model without mirror images gives a different result.
    assert np.abs(softmax - whole_image(image, [(models[1][0], FLOORS[0])], 0)).max() > 1e-3


@pytest.mark.parametrize("channels, classes, words", [(2, 3, "agree in channels"), (1, 2, "agree in number classes")])
def test_models_that_do_not_fit_together_are_refused(tmp_path, models, channels, classes, words):
    save_random_model(tmp_path / "other", channels, classes)
    (tmp_path / "images").mkdir()
    write_tiff(tmp_path / "images" / "a.tif", make_pair(0)[0])
    done = run_script(
        "inference_unet.py", "--saved_model_filepath", models[0][0], tmp_path / "other",
        "--image_folder", tmp_path / "images", "--output_folder", tmp_path / "masks",
    )  # fmt: skip
    [error] = errors_of(done.stdout)
    assert done.returncode == 2 and words in error and str(tmp_path / "other") in error
