import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from scipy import special

import unet_model
from lmdb_utils import MODEL_METADATA_FILE, RADIUS, SIZE_FACTOR
from unet_model import Loss, build_unet, confusion_matrix, export_saved_model


def test_the_network_is_the_papers():
    model = build_unet(1, 2, 64)
    convolutions = [layer for layer in model.layers if isinstance(layer, tf.keras.layers.Conv2D)]
    depths = [layer.filters for layer in convolutions if type(layer) is tf.keras.layers.Conv2D]
    assert depths == [64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024, 512, 512, 256, 256, 128, 128, 64, 64, 2]
    assert sum(isinstance(layer, tf.keras.layers.MaxPooling2D) for layer in model.layers) == 4
    assert [layer.rate for layer in model.layers if isinstance(layer, unet_model.StatelessDropout)] == [0.5, 0.5]
    assert model.count_params() == pytest.approx(31.0e6, rel=0.01)


def test_the_output_has_the_size_of_the_input_and_one_value_for_each_class():
    logits = build_unet(3, 5, 2)(np.zeros((2, 32, 48, 3), np.float32))
    assert logits.shape == (2, 32, 48, 5) and logits.dtype == tf.float32


def test_a_block_of_the_pooling_grid_depends_on_94_pixels_to_each_side_and_no_more():
    model = build_unet(1, 2, 2)
    for layer in model.layers:  # positive weights, so that no influences cancel out
        layer.set_weights([np.abs(weights) + 0.1 for weights in layer.get_weights()])
    size, block = 2 * 208, slice(208, 208 + SIZE_FACTOR)
    ramp = np.linspace(1, 2, size, dtype=np.float32)
    reached = []
    for slope in (ramp[::-1], ramp):  # pooling passes on its largest pixel: the first on one, the last on the other
        image = tf.Variable(np.broadcast_to(slope[:, None] + slope, (1, size, size))[..., None])
        with tf.GradientTape() as tape:
            result = tf.reduce_sum(model(image)[0, block, block, 0])
        gradient = tape.gradient(result, image)[0, ..., 0].numpy()
        reached.append([np.flatnonzero(gradient.any(axis)) for axis in (0, 1)])
    for axis in (0, 1):
        assert block.start - reached[0][axis][0] == 94
        assert reached[1][axis][-1] - (block.stop - 1) == 94
    assert RADIUS >= 94 and RADIUS % SIZE_FACTOR == 0


def test_confusion_matrix_counts_pixels_and_leaves_padding_out():
    rng = np.random.default_rng(0)
    masks, logits = rng.integers(0, 3, (4, 8, 8)).astype(np.uint8), rng.random((4, 8, 8, 3), np.float32)
    weights = np.array([1, 0, 1, 1], np.float32)
    expected = np.zeros((3, 3), np.int64)
    np.add.at(expected, (masks[weights > 0].ravel(), logits.argmax(-1)[weights > 0].ravel()), 1)
    np.testing.assert_array_equal(confusion_matrix(masks, tf.constant(logits), tf.constant(weights), 3), expected)


def test_ignored_pixels_have_no_part_in_loss_gradient_and_counts():
    rng = np.random.default_rng(0)
    masks, logits = rng.integers(0, 3, (2, 16, 16)).astype(np.uint8), rng.normal(0, 3, (2, 16, 16, 3))
    ignored = rng.random(masks.shape) < 0.4
    ignored[1] = True
    loss = Loss(3, True, 0.1, (0.5, 1, 4))
    expected = cross_entropy(logits, masks, [0.5, 1, 4], 0.1) * ~ignored
    for dtype in (np.uint8, np.int32):
        encoded = np.where(ignored, np.iinfo(dtype).max, masks.astype(dtype))
        variable = tf.Variable(logits.astype(np.float32))
        with tf.GradientTape(persistent=True) as tape:
            losses = loss.cross_entropy(tf.constant(encoded), variable)
            value = loss.value(loss.sums(tf.constant(encoded), variable))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        for result in (losses, value):
            gradient = tape.gradient(result, variable).numpy()
            assert (gradient[ignored] == 0).all() and (gradient[~ignored] != 0).all()
        counts = confusion_matrix(tf.constant(encoded), variable, tf.ones(2), 3).numpy()
        hits = (masks == logits.argmax(-1)) & ~ignored
        assert counts.sum() == (~ignored).sum() and np.trace(counts) == hits.sum()


def test_a_step_is_that_of_its_counted_pixels_and_one_of_none_counts_nothing():
    images, masks, weights = make_batch()
    trainer = make_trainer({"batch_norm": False})
    logits = trainer.model(images).numpy()
    masks[0, :, 5:] = 255
    known = masks != 255
    losses = cross_entropy(logits, masks * known, [1, 1])[known]
    _, sums, confusion = trainer.test_step((images, masks, weights))
    np.testing.assert_allclose(sums, [losses.sum(), known.sum()], rtol=1e-5)
    assert confusion.numpy().sum() == known.sum()
    loss, pixels = trainer.train_step((images, masks, weights))
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5) and pixels == known.sum()
    trainer, before = make_trainer({"batch_norm": False}), None
    before = trainer.model.get_weights()
    loss, pixels = trainer.train_step((images, np.full_like(masks, 255), weights))
    assert loss == pixels == 0
    for one, other in zip(before, trainer.model.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_counting_is_left_to_the_cpu_because_no_gpu_counts_deterministically():
    with tf.Graph().as_default() as graph, tf.device("GPU:0"):
        confusion_matrix(tf.zeros((1, 8, 8), tf.uint8), tf.zeros((1, 8, 8, 3)), tf.ones(1), 3)
    counting = [operation for operation in graph.get_operations() if "bincount" in operation.type.lower()]
    assert counting and all("CPU" in operation.device for operation in counting)


def test_the_loss_with_smoothed_labels_and_weighted_classes_is_that_of_scipy():
    rng = np.random.default_rng(0)
    masks, logits = rng.integers(0, 3, (2, 5, 6)).astype(np.uint8), rng.normal(0, 3, (2, 5, 6, 3)).astype(np.float32)
    target = np.eye(3)[masks] * 0.8 + 0.2 / 3
    expected = -(target * special.log_softmax(logits.astype(np.float64), axis=-1)).sum(-1)
    weights = (0.5, 1, 4)
    losses = Loss(3, label_smoothing=0.2, class_weights=weights).cross_entropy(masks, tf.constant(logits))
    np.testing.assert_allclose(losses, expected * np.array(weights)[masks], rtol=1e-5)
    plain = -np.take_along_axis(special.log_softmax(logits.astype(np.float64), axis=-1), masks[..., None], -1)[..., 0]
    np.testing.assert_allclose(Loss(3).cross_entropy(masks, tf.constant(logits)), plain, rtol=1e-5)


def dice_loss(softmax, masks, known, class_weights, label_smoothing=0.0):
    """Return the Dice loss, computed in float64 class by class over all known pixels."""
    losses, weights, classes = [], [], softmax.shape[-1]
    for class_id in range(classes):
        true, predicted = (masks == class_id)[known], softmax[..., class_id][known]
        if true.any():
            target = (1 - label_smoothing) * true + label_smoothing / classes
            losses.append(1 - 2 * (predicted * target).sum() / (predicted.sum() + target.sum()))
            weights.append(class_weights[class_id])
    return np.average(losses, weights=weights)


@pytest.mark.parametrize("label_smoothing, weights", [(0.0, None), (0.2, (0.5, 1.0, 4.0, 2.0))])
def test_dice_and_cross_entropy_are_those_of_all_counted_pixels_of_the_classes_that_occur(label_smoothing, weights):
    rng = np.random.default_rng(0)
    masks, logits = rng.integers(0, 3, (4, 8, 9)), rng.normal(0, 3, (4, 8, 9, 4)).astype(np.float32)
    encoded = np.where(rng.random(masks.shape) < 0.3, 255, masks).astype(np.uint8)
    images = np.array([1, 1, 0, 1], np.float32)
    known = (encoded != 255) & (images[:, None, None] > 0)
    loss = Loss(4, True, label_smoothing, weights)
    of_halves = [loss.sums(encoded[half], logits[half], images[half]) for half in (slice(2), slice(2, 4))]
    ones = weights or (1.0,) * 4
    expected = cross_entropy(logits, masks, ones, label_smoothing)[known].mean()
    expected += dice_loss(special.softmax(logits.astype(np.float64), -1), masks, known, ones, label_smoothing)
    assert float(loss.value(of_halves[0] + of_halves[1])) == pytest.approx(expected, rel=1e-5)
    assert float(loss.value(loss.sums(np.full_like(encoded, 255), logits))) == 0


def test_sums_of_millions_of_pixels_are_exact_enough():
    values = np.full((2, 2, 1024, 1024), 0.97, np.float32)
    np.testing.assert_allclose(unet_model.sum_of_pixels(values), values.astype(np.float64).sum((1, 2, 3)), rtol=1e-4)


def test_the_loss_of_a_training_step_is_that_of_the_softmax_before_it():
    images, masks, _ = make_batch()
    trainer = make_trainer({"batch_norm": False}, Loss(2, with_dice=True))
    softmax = tf.nn.softmax(trainer.model(images)).numpy().astype(np.float64)
    expected = -np.log(np.take_along_axis(softmax, masks[..., None].astype(int), -1)).mean()
    expected += dice_loss(softmax, masks, masks < 2, (1, 1))
    _, sums, _ = trainer.test_step(make_batch())
    assert float(trainer.test_loss.value(sums)) == pytest.approx(expected, rel=1e-5)
    assert float(trainer.train_step(make_batch())[0]) == pytest.approx(expected, rel=1e-5)


def test_the_averaged_weights_are_a_moving_average_of_those_of_every_step(monkeypatch):
    monkeypatch.setattr(unet_model, "AVERAGED_EACH_STEP", 4)
    monkeypatch.setattr(unet_model, "LONGEST_AVERAGE", 2)
    trainer = make_trainer({}, average_weights=True)
    expected = [weights.copy() for weights in trainer.model.get_weights()]
    for average, weights in zip(trainer.averaged.get_weights(), expected):
        np.testing.assert_array_equal(average, weights)
    for step in range(1, 21):
        trainer.train_step(make_batch())
        if step < 4 or step % 10 == 0:
            decay = min((1 + step) / (10 + step), 0.5) ** (1 if step < 4 else 10)
            expected = [decay * one + (1 - decay) * other for one, other in zip(expected, trainer.model.get_weights())]
        for average, weights in zip(trainer.averaged.get_weights(), expected):
            np.testing.assert_allclose(average, weights, rtol=1e-5, atol=1e-6)
    assert trainer.averaged is not trainer.model
    _, tested, _ = trainer.test_step(make_batch())
    images, masks, _ = make_batch()
    np.testing.assert_allclose(tested, trainer.test_loss.sums(masks, trainer.averaged(images)), rtol=1e-5)


def test_dropout_is_a_function_of_its_key_keeps_the_mean_and_rests_outside_of_training():
    keys = iter([[0, 1], [0, 1], [0, 2], [1, 1]])
    layer = unet_model.StatelessDropout(0.5, 3, lambda: tf.constant(next(keys), tf.int64))
    ones = tf.ones((1, 100, 100, 4))
    np.testing.assert_array_equal(layer(ones), ones)
    first, again, next_step, other_seed = (layer(ones, training=True).numpy() for _ in range(4))
    np.testing.assert_array_equal(first, again)
    for other in (next_step, other_seed):
        assert 0.45 < (first == other).mean() < 0.55
    assert set(np.unique(first)) == {0, 2} and 0.95 < first.mean() < 1.05
    elsewhere = unet_model.StatelessDropout(0.5, 4, lambda: tf.constant([0, 1], tf.int64))(ones, training=True)
    assert 0.45 < (first == elsewhere.numpy()).mean() < 0.55


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
    assert json.loads((folder / MODEL_METADATA_FILE).read_text()) == {"channels": 2}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("saved_model")] == ["saved_model"]


def make_batch(size=32):
    rng = np.random.default_rng(0)
    images, masks = rng.standard_normal((2, size, size, 1), np.float32), rng.integers(0, 2, (2, size, size))
    return images, masks.astype(np.uint8), np.ones(2, np.float32)


CROSS_ENTROPY = Loss(2)


def make_trainer(network, loss=CROSS_ENTROPY, **options):
    """Return a trainer on one CPU for a network without dropout; `network` contains options of build_unet."""
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    return unet_model.UNetTrainer(strategy, lambda key: build_unet(1, 2, 2, 0.0, **network), 1e-3, loss, **options)


def cross_entropy(logits, masks, weights, label_smoothing=0.0):
    """Return the loss of each pixel, computed in float64."""
    logarithms = special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    hits = np.take_along_axis(logarithms, masks[..., None].astype(int), axis=-1)[..., 0]
    smooth = (1 - label_smoothing) * hits + label_smoothing * logarithms.mean(axis=-1)
    return -smooth * np.asarray(weights)[masks]


def test_classes_weigh_in_training_and_testing_and_labels_are_smoothed_in_training_alone():
    images, masks, _ = make_batch()
    trainer = make_trainer({"batch_norm": False}, Loss(2, label_smoothing=0.3, class_weights=(1.0, 5.0)))
    logits = trainer.model(images).numpy()
    _, sums, _ = trainer.test_step(make_batch())
    np.testing.assert_allclose(sums, [cross_entropy(logits, masks, [1, 5]).sum(), masks.size], rtol=1e-5)
    loss, pixels = trainer.train_step(make_batch())
    np.testing.assert_allclose(loss, cross_entropy(logits, masks, [1, 5], 0.3).mean(), rtol=1e-5)
    assert pixels == masks.size


def test_deep_supervision_trains_each_level_of_the_decoder_by_every_second_pixel_of_the_finer_one():
    images, masks, _ = make_batch()
    trainer = make_trainer({"batch_norm": False, "deep_supervision": True}, average_weights=True)
    outputs = [output.numpy() for output in trainer.network(images)]
    assert [output.shape for output in outputs] == [(2, 32 // 2**level, 32 // 2**level, 2) for level in range(4)]
    loss, _ = trainer.train_step(make_batch())
    np.testing.assert_allclose(loss, cross_entropy(outputs[0], masks, [1, 1]).mean(), rtol=1e-5)
    for layer in trainer.network.layers:
        if getattr(layer, "kernel_size", None) == (1, 1):
            level = (layer.kernel.shape[2] // 2).bit_length() - 1  # features double with each level
            error = special.softmax(outputs[level], axis=-1) - np.eye(2)[masks[:, :: 2**level, :: 2**level]]
            index = [layer.bias is variable for variable in trainer.network.trainable_variables].index(True)
            gradient = trainer.optimizer.means[index] / (1 - trainer.optimizer.BETA_1)
            np.testing.assert_allclose(gradient, error.mean((0, 1, 2)), rtol=1e-3, atol=1e-7)
    plain = build_unet(1, 2, 2, batch_norm=False)
    assert trainer.model.count_params() == trainer.averaged.count_params() == plain.count_params()
    assert trainer.network.count_params() == plain.count_params() + sum((2 * 2**level + 1) * 2 for level in (1, 2, 3))


def test_loss_scaling_keeps_gradients_that_float16_has_no_number_for():
    """Class weights shrink the loss and its gradients to a millionth."""
    moved = []
    for loss_scaling in (False, True):
        tf.keras.utils.set_random_seed(0)
        trainer = make_trainer(
            {"precision": "mixed_float16"}, Loss(2, class_weights=(1e-6, 1e-6)), loss_scaling=loss_scaling
        )
        before = trainer.model.get_weights()[0].copy()
        trainer.train_step(make_batch())
        moved.append(np.abs(trainer.model.get_weights()[0] - before).max())
    assert moved[0] == 0 < moved[1]


def test_moving_averages_of_batch_normalization_forget_a_tenth_at_each_step():
    model, (images, _, _) = build_unet(1, 2, 2), make_batch()
    layer = next(layer for layer in model.layers if isinstance(layer, unet_model.BatchNormalization))
    averages = []
    for _ in range(2):
        model(images, training=True)
        averages.append(layer.moving_mean.numpy())
    np.testing.assert_allclose(averages[1], 1.9 * averages[0], rtol=1e-5)


def test_the_variance_of_batch_normalization_is_that_of_all_pixels():
    features = np.random.default_rng(0).normal(3, 2, (2, 3, 4, 5)).astype(np.float32)
    layer = unet_model.BatchNormalization()
    normalized = layer(features, training=True)
    mean, variance = (moment(features.astype(np.float64), axis=(0, 1, 2)) for moment in (np.mean, np.var))
    np.testing.assert_allclose(normalized, (features - mean) / np.sqrt(variance + 1e-3), atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.9 + 0.1 * variance, rtol=1e-5)
    tested = (features - 0.1 * mean) / np.sqrt(0.9 + 0.1 * variance + 1e-3)
    np.testing.assert_allclose(layer(features), tested, atol=1e-5)


def test_batch_renormalization_gives_what_the_moving_averages_give_within_limits():
    features = np.random.default_rng(0).normal(3, 2, (2, 3, 4, 4)).astype(np.float32)
    mean, variance = features.mean((0, 1, 2)), features.var((0, 1, 2))
    batch = (features - mean) / np.sqrt(variance + 1e-3)
    layer = unet_model.BatchNormalization()
    layer(features)
    # The last two averages are further from the batch than the limits of the correction.
    averages = mean + [1, -1, 50, 0], variance * [0.5, 2, 1, 400]
    expected = (features - averages[0]) / np.sqrt(averages[1] + 1e-3)
    expected[..., 2], expected[..., 3] = batch[..., 2] - 5, batch[..., 3] / 3
    gradients = []
    for share, normalized in ((0, batch), (1, expected)):
        layer.correction_share = lambda share=share: tf.constant(float(share))
        layer.moving_mean.assign(averages[0])
        layer.moving_variance.assign(averages[1])
        with tf.GradientTape() as tape:
            variable = tf.Variable(features)
            result = layer(variable, training=True)
            total = tf.reduce_sum(result**3)
        np.testing.assert_allclose(result, normalized, atol=1e-4)
        np.testing.assert_allclose(layer.moving_mean, 0.9 * averages[0] + 0.1 * mean, rtol=1e-5)
        gradients.append(tape.gradient(total, variable).numpy())
        along_the_mean = np.abs(gradients[-1].sum((0, 1, 2)))  # a shift of the mean alone changes nothing
        assert along_the_mean.max() < 1e-2 * np.abs(gradients[-1]).max()
    assert np.abs(gradients[1] - gradients[0]).max() > 1e-2


def test_batch_renormalization_sets_in_when_the_averages_mean_something():
    trainer = make_trainer({})
    shares = []
    for step in (0, 100, 175, 250, 10**6):
        trainer.step.assign(step)
        layers = [layer for layer in trainer.network.layers if isinstance(layer, unet_model.BatchNormalization)]
        shares.append({float(layer.correction_share()) for layer in layers})
    assert shares == [{0.0}, {0.0}, {0.5}, {1.0}, {1.0}]


def test_adam_is_that_of_its_paper():
    rng = np.random.default_rng(0)
    values, gradients = rng.normal(0, 1, 100), rng.normal(0, 1, (5, 100)) * 10.0 ** rng.integers(-4, 4, 100)
    variable = tf.Variable(values, dtype=tf.float32)
    adam = unet_model.Adam([variable], loss_scaling=False)
    means, variances = np.zeros(100), np.zeros(100)
    for step, gradient in enumerate(gradients, 1):
        adam.apply([tf.constant(gradient, tf.float32)], [variable], tf.constant(0.01))
        means, variances = 0.9 * means + 0.1 * gradient, 0.999 * variances + 0.001 * gradient**2
        # As in section 2 of the paper, with the constant added to the root of the uncorrected variance.
        rate = 0.01 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        values = values - rate * means / (np.sqrt(variances) + 1e-7)
    np.testing.assert_allclose(variable, values, atol=1e-6)


def test_the_loss_scale_doubles_after_many_steps_without_overflow_and_halves_at_each(monkeypatch):
    monkeypatch.setattr(unet_model.Adam, "GROWTH_STEPS", 3)
    variable = tf.Variable([1.0])
    adam = unet_model.Adam([variable], loss_scaling=True)
    scales = []
    for gradient in (1, 1, 1, 1, np.inf, 1, 1, np.nan, 1, 1, 1):
        before = variable.numpy()
        adam.apply([tf.constant([float(gradient)])], [variable], tf.constant(0.01))
        assert (variable.numpy() == before) == (not np.isfinite(gradient))
        scales.append(adam.loss_scale.numpy() / 2**15)
    assert scales == [1, 1, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 1]


def test_a_compiled_step_is_the_same_step():
    weights = []
    for xla in (False, True):
        tf.keras.utils.set_random_seed(0)
        trainer = make_trainer({}, xla=xla)
        losses = [float(trainer.train_step(make_batch())[0]) for _ in range(3)]
        weights.append([np.array(losses), *trainer.model.get_weights()])
    for one, other in zip(*weights):
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert losses[2] < losses[0]


def test_a_step_that_cannot_be_compiled_is_taken_without_xla_once(caplog):
    def network(dropout_key):
        image = tf.keras.Input((None, None, 1))
        return tf.keras.Model(image, Uncompilable()(tf.keras.layers.Conv2D(2, 1)(image)))

    caplog.set_level("INFO")
    taken = []
    for xla in (None, False):
        tf.keras.utils.set_random_seed(0)
        trainer = unet_model.UNetTrainer(tf.distribute.OneDeviceStrategy("/cpu:0"), network, 1e-3, Loss(2), xla=xla)
        losses = [float(trainer.train_step(make_batch())[0]) for _ in range(3)]
        assert trainer.step.numpy() == 3
        taken.append(losses)
    assert taken[0] == taken[1]
    assert caplog.text.count("training without XLA, which fails here") == 1


class Uncompilable(tf.keras.layers.Layer):
    def call(self, features):
        return features + tf.stop_gradient(tf.reshape(tf.numpy_function(lambda: np.float32(0), [], tf.float32), []))


STEPS = """
import atexit, os, sys
sys.path.insert(0, {root!r})
import numpy as np, tensorflow as tf
from train_unet import Cluster, make_strategy

result, replicas = sys.argv[1], int(sys.argv[2])
cpu, logical = tf.config.list_physical_devices("CPU")[0], tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [logical] * replicas)
cluster = Cluster.find(os.environ)
strategy = make_strategy(cluster)
import unet_model
from unet_model import BatchNormalization, Loss, UNetTrainer, build_unet, export_saved_model

unet_model.CORRECTED_FROM, unet_model.CORRECTED_FULLY = 1, 3  # so that batch renormalization sets in
rng = np.random.default_rng(0)
share = slice(4 // cluster.world_size * cluster.rank, 4 // cluster.world_size * (cluster.rank + 1))
images = rng.standard_normal((5, 4, 32, 32, 1), np.float32)
masks = rng.integers(0, 2, (5, 4, 32, 32)).astype(np.uint8)
masks[:, 0] = 255  # ignored, so that each replica counts a different number of pixels, and one counts none
masks[:, 1, :, 4:] = 255


class Reader:
    def __init__(self, images, masks):
        self.arrays = images[:, share], masks[:, share], np.ones(masks[:, share].shape[:2], np.float32)

    def get_tf_dataset(self):
        dataset = tf.data.Dataset.from_tensor_slices(self.arrays).unbatch()
        return dataset.batch(4 // strategy.num_replicas_in_sync, drop_remainder=True).repeat()


def flat(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def weights_of_replicas(model):
    values = strategy.run(tf.function(lambda: [tf.convert_to_tensor(weights) for weights in model.weights]))
    of_each = [strategy.experimental_local_results(value) for value in values]
    return np.array([flat(of_one) for of_one in zip(*of_each)])


def train(network, learning_rate):
    tf.keras.utils.set_random_seed(1)
    loss = Loss(2, with_dice=True, label_smoothing=0.1, class_weights=(1.0, 3.0))
    trainer = UNetTrainer(strategy, network, learning_rate, loss, average_weights=True)
    first = flat(trainer.model.get_weights())
    batches = trainer.distribute(Reader(images, masks))
    sums = [trainer.train_step(next(batches), (cluster.rank == 1 and step == 3,)) for step in range(5)]
    _, tested, confusion = trainer.test_step(next(trainer.distribute(Reader(images, masks))))
    last, averaged = weights_of_replicas(trainer.model), weights_of_replicas(trainer.averaged)
    assert (last == last[0]).all() and (averaged == averaged[0]).all(), "replicas have different networks"
    figures = {{"first": first, "last": last[0], "averaged": averaged[0], "sums": sums, "tested": tested}}
    return {{**figures, "pixels": confusion.numpy().sum()}}


def smooth_network(dropout_key, precision="float32"):
    image = features = tf.keras.Input((None, None, 1))
    for depth in (4, 8):
        features = tf.keras.layers.Conv2D(depth, 3, padding="same", activation="tanh", dtype=precision)(features)
        features = BatchNormalization()(features)
    logits = tf.keras.layers.Conv2D(2, 1, dtype=precision)(features)
    return tf.keras.Model(image, tf.keras.layers.Activation("linear", dtype="float32")(logits))


def overflow():
    # The gradients of class 1 are too large for float16. Each replica in turn has pixels of it, and every second batch
    # has none at all.
    total, of_each = strategy.num_replicas_in_sync, 4 // strategy.num_replicas_in_sync
    masks = np.zeros((2 * total, 4, 32, 32), np.uint8)
    for replica in range(total):
        masks[2 * replica, replica * of_each : (replica + 1) * of_each] = 1
    images = rng.standard_normal((*masks.shape, 1), np.float32)
    trainer = UNetTrainer(
        strategy,
        lambda key: smooth_network(key, "mixed_float16"),
        1e-3,
        Loss(2, class_weights=(1, 1e6)),
        loss_scaling=True,
    )
    batches, figures = trainer.distribute(Reader(images, masks)), []
    for _ in range(2 * total):
        before = flat(trainer.model.trainable_variables)
        loss = trainer.train_step(next(batches)).numpy()[0]
        after = weights_of_replicas(trainer.model)
        moved = np.abs(flat(trainer.model.trainable_variables) - before).max()
        assert np.isfinite(after).all() and (after == after[0]).all()
        figures.append((loss, moved, float(trainer.optimizer.loss_scale.numpy())))
    return figures


figures = {{f"smooth_{{name}}": value for name, value in train(smooth_network, 1e-2).items()}}
if replicas < 4:  # tracing it takes long
    unet = train(lambda key: build_unet(1, 2, 2, dropout_rate=0, deep_supervision=True), 1e-4)
    figures.update({{f"unet_{{name}}": value for name, value in unet.items()}})
np.savez(result, overflow=overflow(), **figures)

if replicas == 2:  # with dropout, as in real use
    trainer = UNetTrainer(strategy, lambda key: build_unet(1, 2, 4, dropout_key=key), 1e-3, Loss(2))
    outputs = strategy.run(tf.function(lambda: trainer.model(images[0, :1], training=True)))
    one, other = strategy.experimental_local_results(outputs)
    assert np.abs(one - other).max() > 1e-3, "both replicas drop the same features"
    assert np.isfinite(trainer.train_step(next(trainer.distribute(Reader(images, masks))))[0])
    export_saved_model(trainer.model, result + ".saved_model", {{}})
atexit._run_exitfuncs()  # as train_unet.py exits
os._exit(0)
"""


def free_ports(count):
    """Return ports that are free at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the figures of `STEPS` on 1, 2 and 4 replicas, and in two processes that train together."""
    folder = tmp_path_factory.mktemp("trained")
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    (folder / "steps.py").write_text(STEPS.format(root=str(ROOT)))
    tasks = [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in range(2)
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, folder / "steps.py", folder / f"{number}.npz", str(replicas)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **task},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, (replicas, task) in enumerate([(1, {}), (2, {}), (4, {}), *((1, task) for task in tasks)])
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, "\n".join(outputs)
    return [np.load(folder / f"{number}.npz") for number in range(5)]


# A U-Net magnifies rounding errors: if one changes a sign or a maximum, all gradients behind it change. The smooth
# network has no such switches, so its tolerance is tighter. Both networks have batch normalization.
@pytest.mark.parametrize("network, tolerance", [("smooth", 1e-5), ("unet", 1e-3)])
def test_replicas_and_processes_give_the_weights_of_one_with_the_same_global_batch(trained, network, tolerance):
    names = ("first", "last", "averaged", "sums", "tested", "pixels")
    trained = [figures for figures in trained if f"{network}_first" in figures]
    one, *others = ({name: figures[f"{network}_{name}"] for name in names} for figures in trained)
    moved = np.linalg.norm(one["last"] - one["first"])
    assert moved > 100 * tolerance * np.linalg.norm(one["last"]), "nothing was learned"
    for other in others:
        np.testing.assert_array_equal(one["first"], other["first"])
        np.testing.assert_allclose(one["sums"][:, :2], other["sums"][:, :2], rtol=tolerance)
        for name in ("last", "averaged"):
            assert np.linalg.norm(one[name] - other[name]) < tolerance * np.linalg.norm(one[name])
        assert other["pixels"] == one["pixels"] == one["sums"][0, 1] == (2 * 32 + 4) * 32
    for replicas in others[:-2]:
        np.testing.assert_allclose(replicas["tested"], one["tested"], rtol=tolerance)
    for worker in others[-2:]:
        assert list(worker["sums"][:, 2]) == [0, 0, 0, 1, 0], "a request of one process reaches both at the same step"


def test_an_overflow_on_any_replica_of_any_process_leaves_the_step_out_on_all_and_halves_the_scale(trained):
    for figures in trained:
        losses, moved, scales = figures["overflow"].T
        assert np.isfinite(losses).all()
        assert (moved[::2] == 0).all() and (moved[1::2] > 0).all()
        np.testing.assert_array_equal(scales, 2.0**15 / 2 ** np.repeat(np.arange(1, len(scales) // 2 + 1), 2))
