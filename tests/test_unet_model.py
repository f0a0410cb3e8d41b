import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

import build_lmdb
import unet_model
from unet_model import RADIUS, SIZE_FACTOR, build_unet, confusion_matrix, export_saved_model, score_confusion


def test_the_network_is_the_papers():
    model = build_unet(1, 2, 64)
    convolutions = [layer for layer in model.layers if isinstance(layer, tf.keras.layers.Conv2D)]
    depths = [layer.filters for layer in convolutions if type(layer) is tf.keras.layers.Conv2D]
    assert depths == [64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024, 512, 512, 256, 256, 128, 128, 64, 64, 2]
    assert sum(isinstance(layer, tf.keras.layers.MaxPooling2D) for layer in model.layers) == 4
    assert [layer.rate for layer in model.layers if isinstance(layer, tf.keras.layers.Dropout)] == [0.5, 0.5]
    assert model.count_params() == pytest.approx(31.0e6, rel=0.01)


def test_the_output_has_the_size_of_the_input_and_one_value_for_each_class():
    logits = build_unet(3, 5, 2)(np.zeros((2, 32, 48, 3), np.float32))
    assert logits.shape == (2, 32, 48, 5) and logits.dtype == tf.float32


def test_a_block_of_the_pooling_grid_depends_on_94_pixels_to_each_side_and_no_more():
    model = build_unet(1, 2, 2)
    for layer in model.layers:  # positive weights: no influence can cancel
        layer.set_weights([np.abs(weights) + 0.1 for weights in layer.get_weights()])
    size, block = 2 * 208, slice(208, 208 + SIZE_FACTOR)
    ramp = np.linspace(1, 2, size, dtype=np.float32)
    reached = []
    for slope in (ramp[::-1], ramp):  # a pooling passes its largest pixel on: here the first, there the last
        image = tf.Variable(np.broadcast_to(slope[:, None] + slope, (1, size, size))[..., None])
        with tf.GradientTape() as tape:
            result = tf.reduce_sum(model(image)[0, block, block, 0])
        gradient = tape.gradient(result, image)[0, ..., 0].numpy()
        reached.append([np.flatnonzero(gradient.any(axis)) for axis in (0, 1)])
    for axis in (0, 1):
        assert block.start - reached[0][axis][0] == 94
        assert reached[1][axis][-1] - (block.stop - 1) == 94
    assert RADIUS >= 94 and RADIUS % SIZE_FACTOR == 0


def test_build_lmdb_uses_the_geometry_of_the_network():
    assert (build_lmdb.SIZE_FACTOR, build_lmdb.RADIUS) == (SIZE_FACTOR, RADIUS)


def test_confusion_matrix_counts_pixels_and_leaves_padding_out():
    rng = np.random.default_rng(0)
    masks, logits = rng.integers(0, 3, (4, 8, 8)).astype(np.uint8), rng.random((4, 8, 8, 3), np.float32)
    weights = np.array([1, 0, 1, 1], np.float32)
    expected = np.zeros((3, 3), np.int64)
    np.add.at(expected, (masks[weights > 0].ravel(), logits.argmax(-1)[weights > 0].ravel()), 1)
    np.testing.assert_array_equal(confusion_matrix(masks, tf.constant(logits), tf.constant(weights), 3), expected)


def test_scores_of_a_confusion_matrix_written_out():
    scores = score_confusion(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert scores["accuracy"] == pytest.approx(9 / 12)
    np.testing.assert_allclose(scores["iou"], [6 / 9, 3 / 6, np.nan])
    np.testing.assert_allclose(scores["dice"], [12 / 15, 6 / 9, np.nan])


def test_a_saved_model_loads_with_tensorflow_alone_and_gives_the_models_softmax(tmp_path):
    model = build_unet(2, 3, 2)
    folder = tmp_path / "saved_model"
    export_saved_model(build_unet(2, 3, 2), folder, {"channels": 0})
    export_saved_model(model, folder, {"channels": 2})  # replaces the first
    image = np.random.default_rng(0).random((1, 48, 32, 2), np.float32)
    np.save(tmp_path / "image.npy", image)
    script = (
        "import sys, numpy as np, tensorflow as tf\n"
        "signature = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "[result] = signature(tf.constant(np.load(sys.argv[2]))).values()\n"
        "np.save(sys.argv[3], result)\n"
    )
    arguments = [folder, tmp_path / "image.npy", tmp_path / "result.npy"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, cwd=tmp_path)
    result = np.load(tmp_path / "result.npy")
    np.testing.assert_allclose(result, tf.nn.softmax(model(image)), atol=1e-6)
    np.testing.assert_allclose(result.sum(-1), 1, atol=1e-5)
    assert json.loads((folder / unet_model.METADATA_FILE).read_text()) == {"channels": 2}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("saved_model")] == ["saved_model"]


REPLICAS = """
import sys
sys.path.insert(0, {root!r})
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from unet_model import UNetTrainer, build_unet, export_saved_model

rng = np.random.default_rng(0)
images = rng.standard_normal((3, 4, 32, 32, 1), np.float32)
masks = rng.integers(0, 2, (3, 4, 32, 32)).astype(np.uint8)


class Reader:
    def __init__(self, batch_size):
        self.batch_size = batch_size

    def get_tf_dataset(self):
        arrays = (images, masks, np.ones((3, 4), np.float32))
        return tf.data.Dataset.from_tensor_slices(arrays).unbatch().batch(self.batch_size)


results, losses = [], []
for replicas in (1, 2):
    tf.keras.utils.set_random_seed(1)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{{index}}" for index in range(replicas)])
    trainer = UNetTrainer(strategy, lambda: build_unet(1, 2, 4, dropout_rate=0, batch_norm=False), 2, 1e-2)
    first = np.concatenate([np.ravel(weights) for weights in trainer.model.get_weights()])
    batches = trainer.distribute(Reader(4 // replicas))
    losses.append([float(trainer.train_step(next(batches))) for _ in range(3)])
    last = np.concatenate([np.ravel(weights) for weights in trainer.model.get_weights()])
    results.append((first, last))
    tests = trainer.distribute(Reader(4 // replicas))
    loss, confusion = trainer.test_step(next(tests))
    assert confusion.numpy().sum() == 4 * 32 * 32, confusion
np.testing.assert_array_equal(results[0][0], results[1][0])
assert np.abs(results[0][1] - results[0][0]).max() > 1e-2, "nothing was learnt"
np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)

trainer = UNetTrainer(strategy, lambda: build_unet(1, 2, 4), 2, 1e-3)  # as it is used: dropout and batch normalisation
batches = trainer.distribute(Reader(2))
assert np.isfinite(float(trainer.train_step(next(batches))))
export_saved_model(trainer.model, sys.argv[1], {{}})
print("difference", np.abs(results[0][1] - results[1][1]).max())
"""


def test_two_replicas_give_the_weights_of_one_with_the_same_global_batch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REPLICAS.format(root=str(ROOT)), str(tmp_path / "saved_model")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "difference" in done.stdout
