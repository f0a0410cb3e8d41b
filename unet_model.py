"""The network, its loss, and one training or test step on every replica.

Owns the U-Net (Ronneberger et al., arXiv 1505.04597, with ``same`` convolutions), the exported SavedModel, the
optimizer, and `UNetTrainer`, which runs steps under a tf.distribute strategy. Its geometry, on which databases and
inference depend as well, stands in `lmdb_utils`: `SIZE_FACTOR` and `RADIUS`.

Several replicas train exactly as one with the same global batch would: batch normalization and optimizer see sums over
all of them, so that every replica of every process holds the same network at any time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from cli import InputError, PathLike, cause_of, replacing_folder, shield_keras, without_patterns
from lmdb_utils import MODEL_METADATA_FILE, SIZE_FACTOR

shield_keras()

import tensorflow as tf  # noqa: E402

LEVELS = SIZE_FACTOR.bit_length() - 1  # poolings
CONVOLUTIONS_PER_LEVEL = 2
DROPOUT_RATE = 0.5
DROPOUT_LEVELS = 2  # the deepest ones
# Moving averages over some tens of steps: the usual 0.99 lags so far behind that the first test epochs mean nothing.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-3  # added to the variance
LARGEST_SCALE, LARGEST_SHIFT = 3.0, 5.0  # of batch renormalization, as in its paper
CORRECTED_FROM, CORRECTED_FULLY = 100, 250  # steps between which it takes effect, once the averages mean something
LONGEST_AVERAGE = 1000  # steps that a moving average of the weights goes back, at most
FIRST_LAYER, LAST_LAYER = slice(0, 2), slice(-2, None)  # their kernels and biases, among the weights of a network
AVERAGED_EACH_STEP, AVERAGING_INTERVAL = 100, 10  # the first steps of a run; the steps between updates after them


def build_unet(
    channels: int,
    number_classes: int,
    baseline_feature_depth: int = 64,
    dropout_rate: float = DROPOUT_RATE,
    batch_norm: bool = True,
    dropout_key: Optional[Callable[[], "tf.Tensor"]] = None,
    precision: str = "float32",
    deep_supervision: bool = False,
) -> "tf.keras.Model":
    """Build a U-Net.

    Parameters
    ----------
    channels : int
        Channels of the image.
    number_classes : int
        Classes, background included.
    baseline_feature_depth : int
        Features of the top level, doubled with each level; the paper's network has 64.
    dropout_rate : float
        Of the two deepest levels while training.
    batch_norm : bool
        Whether batch normalization follows each convolution.
    dropout_key : callable, optional
        Asked at each training step for two integers, of which what is dropped is a function.
    precision : str
        ``"float32"``, or ``"mixed_float16"`` to compute in float16 with float32 weights.
    deep_supervision : bool
        Whether the coarser levels of the decoder have logits of their own, to train by. Each output has half as many
        rows and columns as the one before.

    Returns
    -------
    keras.Model
        From ``(N, H, W, channels)`` float32, H and W multiples of `SIZE_FACTOR`, to logits
        ``(N, H, W, number_classes)`` float32; with deep supervision to a list, of which these are the first.
    """
    parts = Parts(number_classes, dropout_rate, batch_norm, dropout_key, precision)
    image = tf.keras.Input((None, None, channels))
    features, skips = image, []
    for level in range(LEVELS):
        features = parts.drop(parts.convolve(features, baseline_feature_depth * 2**level), level)
        skips.append(features)  # (N, H/2^l, W/2^l, 2^l F)
        features = tf.keras.layers.MaxPooling2D(2, dtype=precision)(features)
    features = parts.drop(parts.convolve(features, baseline_feature_depth * 2**LEVELS), LEVELS)  # (N, H/16, W/16, 16 F)
    logits = []  # the coarsest first
    for level in reversed(range(LEVELS)):
        features = parts.join(features, skips[level], baseline_feature_depth * 2**level)  # (N, H/2^l, W/2^l, 2^l F)
        if deep_supervision or level == 0:
            logits.append(parts.classify(features))  # (N, H/2^l, W/2^l, classes)
    return tf.keras.Model(image, logits[::-1] if deep_supervision else logits[0])


@dataclass(frozen=True)
class Parts:
    """What a U-Net consists of; the parameters of `build_unet` that concern single layers."""

    number_classes: int
    dropout_rate: float
    batch_norm: bool
    dropout_key: Optional[Callable[[], "tf.Tensor"]]
    precision: str

    def convolve(self, features: Any, depth: int) -> Any:
        """Return features of some depth: the convolutions of a level, with what follows each of them."""
        for _ in range(CONVOLUTIONS_PER_LEVEL):
            convolution = tf.keras.layers.Conv2D(
                depth, 3, padding="same", activation="relu", kernel_initializer="he_normal", dtype=self.precision
            )
            features = convolution(features)
            if self.batch_norm:
                features = BatchNormalization()(features)
        return features

    def drop(self, features: Any, level: int) -> Any:
        """Return the features with dropout if the level is one of the deepest."""
        if level <= LEVELS - DROPOUT_LEVELS:
            return features
        return StatelessDropout(self.dropout_rate, level, self.dropout_key, dtype=self.precision)(features)

    def join(self, features: Any, skip: Any, depth: int) -> Any:
        """Return features of twice as many rows and columns, made of those of the level below and of the encoder's."""
        # Kernel and stride both 2: each output pixel comes from one input pixel, which adds nothing to the radius.
        features = tf.keras.layers.Conv2DTranspose(depth, 2, strides=2, dtype=self.precision)(features)
        features = tf.keras.layers.Concatenate(dtype=self.precision)([skip, features])
        return self.convolve(features, depth)

    def classify(self, features: Any) -> Any:
        """Return logits, in float32."""
        logits = tf.keras.layers.Conv2D(self.number_classes, 1, dtype=self.precision)(features)
        return tf.keras.layers.Activation("linear", dtype="float32")(logits)


def without_coarse_outputs(network: "tf.keras.Model") -> "tf.keras.Model":
    """Return what a network is tested and exported as: the same layers without those of deep supervision."""
    return tf.keras.Model(network.input, network.outputs[0]) if len(network.outputs) > 1 else network


class StatelessDropout(tf.keras.layers.Layer):
    """Dropout that is a function of a key, so that a resumed run drops what an uninterrupted one would have dropped.

    Keras' own layer draws, in TensorFlow 2.12 to 2.15, from a state inside the operation, which no checkpoint holds.

    Parameters
    ----------
    rate : float
        Share of the features that become 0; the others grow to keep the mean.
    number : int
        Tells the layers of a network apart.
    key : callable, optional
        Asked at each call for a tensor of two integers; without it the numbers are drawn from TensorFlow's global seed.
    """

    def __init__(self, rate: float, number: int, key: Optional[Callable[[], "tf.Tensor"]], dtype: Any = None) -> None:
        super().__init__(dtype=dtype)
        self.rate, self._number, self._key = rate, number, key

    def call(self, features: "tf.Tensor", training: bool = False) -> "tf.Tensor":
        """Drop while training; at any other time the features pass unchanged."""
        if not training or not self.rate:
            return features
        if self._key is None:
            return tf.nn.dropout(features, self.rate)
        seed = tf.random.experimental.stateless_fold_in(self._key(), self._number)
        return tf.nn.experimental.stateless_dropout(features, self.rate, seed)


class BatchNormalization(tf.keras.layers.Layer):
    """Batch renormalization (Ioffe, arXiv 1702.03275) over the global batch: that of all replicas.

    The statistics of a few images can be far from the moving averages, by which the network is tested. So the features
    of a batch are normalized by its own statistics, then corrected to what the moving averages would have given, within
    limits. The correction counts as a constant: gradients are those of batch normalization.

    Takes and returns float16 or float32; means and variances are float32. Keras' own layer gives other moving variances
    in Keras 2 than in Keras 3, and keeps them for each replica.

    Attributes
    ----------
    correction_share : callable, optional
        Asked at each training step for a scalar tensor in 0 to 1: the share of the limits that is in force. Without it,
        or with 0, this is batch normalization (Ioffe and Szegedy, arXiv 1502.03167).
    """

    def __init__(self) -> None:
        super().__init__(dtype="float32", autocast=False)
        self.correction_share: Optional[Callable[[], tf.Tensor]] = None

    def build(self, shape: Sequence[Optional[int]]) -> None:
        """Make the weights: one of each kind for each feature."""

        def add(name: str, initializer: str, trainable: bool = True) -> Any:
            return self.add_weight(
                name=name, shape=(shape[-1],), initializer=initializer, trainable=trainable, dtype="float32"
            )

        self.gamma, self.beta = add("gamma", "ones"), add("beta", "zeros")
        self.moving_mean, self.moving_variance = (
            add("moving_mean", "zeros", False),
            add("moving_variance", "ones", False),
        )
        self.built = True

    def call(self, features: "tf.Tensor", training: bool = False) -> "tf.Tensor":
        """Normalize by the global batch while training, and note its statistics; by these at any other time."""
        weights = self.gamma, self.beta, self.moving_mean, self.moving_variance
        gamma, beta, moving_mean, moving_variance = map(tf.convert_to_tensor, weights)
        if not training:
            exact = tf.cast(features, tf.float32)  # on a CPU faster than the operation that is used below
            exact = tf.nn.batch_normalization(exact, moving_mean, moving_variance, beta, gamma, BATCH_NORM_EPSILON)
            return tf.cast(exact, features.dtype)
        mean, variance = global_statistics(features, moving_mean)
        if self.correction_share is not None:
            scale, shift = correction(mean, variance, moving_mean, moving_variance, self.correction_share())
            gamma, beta = gamma * scale, beta + gamma * shift
        if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
            normalized, *_ = tf.raw_ops.FusedBatchNormV3(
                x=features, scale=gamma, offset=beta, mean=[], variance=[], epsilon=BATCH_NORM_EPSILON
            )
        else:
            normalized = normalize_global_batch(features, gamma, beta, mean, variance)
        for variable, moving, new in (
            (self.moving_mean, moving_mean, mean),
            (self.moving_variance, moving_variance, variance),
        ):
            assign(variable, moving - (1 - BATCH_NORM_MOMENTUM) * (moving - new))
        return normalized


def mean_of_replicas(values: list[Any]) -> list[Any]:
    """Return the means of float32 tensors of one shape over all replicas."""
    context = tf.distribute.get_replica_context()
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(values))
    return tf.unstack(sums / context.num_replicas_in_sync)


def global_statistics(features: "tf.Tensor", near: "tf.Tensor") -> tuple["tf.Tensor", "tf.Tensor"]:
    """Return mean and variance over all replicas, float32 of shape (F,), as constants: without gradients.

    Parameters
    ----------
    features : tensor of float16 or float32, shape (N, H, W, F)
        Of this replica; all have as many.
    near : tensor of float32, shape (F,)
        A guess at the means; the closer, the smaller the rounding error of the variances.
    """
    mean, variance = tf.nn.moments(tf.cast(tf.stop_gradient(features), tf.float32), [0, 1, 2])
    if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
        return mean, variance
    distance = mean - near
    distance, square = mean_of_replicas([distance, variance + tf.square(distance)])
    return near + distance, tf.maximum(square - tf.square(distance), 0.0)


def correction(
    mean: "tf.Tensor", variance: "tf.Tensor", moving_mean: "tf.Tensor", moving_variance: "tf.Tensor", share: "tf.Tensor"
) -> tuple["tf.Tensor", "tf.Tensor"]:
    """Return the factor and the summand that turn normalization by a batch into one by the moving averages.

    With a `share` of 0 they are 1 and 0. With 1, `LARGEST_SCALE` and `LARGEST_SHIFT` limit them in both directions.
    """
    deviation, moving_deviation = (tf.sqrt(each + BATCH_NORM_EPSILON) for each in (variance, moving_variance))
    largest_scale, largest_shift = 1 + share * (LARGEST_SCALE - 1), share * LARGEST_SHIFT
    scale = tf.clip_by_value(deviation / moving_deviation, 1 / largest_scale, largest_scale)
    shift = tf.clip_by_value((mean - moving_mean) / moving_deviation, -largest_shift, largest_shift)
    return scale, shift


@tf.custom_gradient
def normalize_global_batch(features: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
    """Return features normalized by mean and variance over all replicas.

    Parameters
    ----------
    features : tensor of float16 or float32, shape (N, H, W, F)
        Of this replica; all have as many.
    gamma, beta : tensor of float32, shape (F,)
        Standard deviation and mean to give them.
    mean, variance : tensor of float32, shape (F,)
        Of all replicas. The gradient takes them as what they are, functions of the features.

    Notes
    -----
    Written out, because automatic gradients would keep several copies of the features in float32.
    """

    def gradient(change: Any) -> Any:
        change, inverse = tf.cast(change, tf.float32), tf.math.rsqrt(variance + BATCH_NORM_EPSILON)
        standard = (tf.cast(features, tf.float32) - mean) * inverse
        beta_change, gamma_change = tf.reduce_sum(change, [0, 1, 2]), tf.reduce_sum(change * standard, [0, 1, 2])
        pixels = tf.cast(tf.reduce_prod(tf.shape(features)[:3]), tf.float32)
        common_beta, common_gamma = mean_of_replicas([beta_change / pixels, gamma_change / pixels])
        change = gamma * inverse * (change - common_beta - standard * common_gamma)
        return tf.cast(change, features.dtype), gamma_change, beta_change, None, None

    normalized, *_ = tf.raw_ops.FusedBatchNormV3(
        x=features,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=BATCH_NORM_EPSILON,
        is_training=False,
    )
    return normalized, gradient


def assign(variable: Any, value: "tf.Tensor") -> None:
    """Set this replica's copy of a variable, to what all replicas set theirs to."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def counted_pixels(masks: "tf.Tensor") -> "tf.Tensor":
    """Return which pixels (N, H, W) have a class: all but those to ignore, which have the largest value of the type."""
    masks = tf.convert_to_tensor(masks)
    return tf.not_equal(masks, masks.dtype.max)


def sum_of_pixels(values: "tf.Tensor") -> "tf.Tensor":
    """Return the sum of values (classes, N, H, W) for each class.

    Row by row, then image by image: TensorFlow may add one number after the other, and with millions of them float32
    would lose several percent.
    """
    return tf.reduce_sum(tf.reduce_sum(tf.reduce_sum(values, axis=3), axis=2), axis=1)


def classes_first_log_softmax(logits: "tf.Tensor") -> "tf.Tensor":
    """Return the log softmax of logits (N, H, W, classes) as (classes, N, H, W).

    In this order a CPU works on many pixels at once. TensorFlow's own functions, for which the classes of a pixel lie
    side by side, take several times as long with few classes.
    """
    logits = tf.transpose(logits, [3, 0, 1, 2])
    logits -= tf.stop_gradient(tf.reduce_max(logits, axis=0))
    return logits - tf.math.log(tf.reduce_sum(tf.exp(logits), axis=0))


@dataclass(frozen=True)
class Loss:
    """Cross-entropy, and the Dice loss beside it if wanted, of all counted pixels of a global batch or a test set.

    The Dice loss (Milletari et al., arXiv 1606.04797) is 1 minus the mean, over the classes that occur, of
    ``2 * overlap / (predicted + true)``: of softmax and true class, summed over all pixels. So a class of few pixels
    matters as much as one of many. Both losses are functions of a few sums, which replicas and batches simply add.

    Attributes
    ----------
    number_classes : int
        Classes, background included.
    with_dice : bool
        Whether to add the Dice loss to the cross-entropy.
    label_smoothing : float
        Share of the target that is spread over all classes alike.
    class_weights : tuple of float, optional
        Factor for the cross-entropy of each class's pixels, and its weight in the mean of the Dice loss.
    """

    number_classes: int
    with_dice: bool = False
    label_smoothing: float = 0.0
    class_weights: Optional[tuple[float, ...]] = None

    def cross_entropy(self, masks: "tf.Tensor", logits: "tf.Tensor") -> "tf.Tensor":
        """Return the cross-entropy of each pixel, (N, H, W), in natural units; 0 for those to ignore; see `sums`."""
        return self._cross_entropy(self._one_hot(masks), classes_first_log_softmax(logits))

    def _one_hot(self, masks: "tf.Tensor") -> "tf.Tensor":
        """Return 1 for the class of each pixel, otherwise 0, (classes, N, H, W); pixels to ignore have no class."""
        return tf.one_hot(tf.where(counted_pixels(masks), tf.cast(masks, tf.int32), -1), self.number_classes, axis=0)

    def _cross_entropy(self, true: "tf.Tensor", logarithms: "tf.Tensor") -> "tf.Tensor":
        """Return the cross-entropy of each pixel, given its class and its log softmax, (classes, N, H, W)."""
        losses = -tf.reduce_sum(true * logarithms, axis=0)
        if self.label_smoothing:
            of_all_classes = -tf.reduce_sum(true, axis=0) * tf.reduce_mean(logarithms, axis=0)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * of_all_classes
        if self.class_weights is not None:
            losses *= tf.tensordot(tf.constant(self.class_weights, tf.float32), true, 1)
        return losses

    def sums(self, masks: "tf.Tensor", logits: "tf.Tensor", weights: Optional["tf.Tensor"] = None) -> "tf.Tensor":
        """Return what `value` needs to know of some images.

        Parameters
        ----------
        masks : tensor of integers, shape (N, H, W)
            Class ids; see `counted_pixels`.
        logits : tensor of float32, shape (N, H, W, classes)
            What the network gives.
        weights : tensor of float32, shape (N,), optional
            Images of weight 0 do not count.

        Returns
        -------
        tensor of float32
            Sum of the cross-entropy and number of counted pixels; with the Dice loss also overlap, softmax and pixels
            of each class. They may be added to those of other images.
        """
        true, logarithms = self._one_hot(masks), classes_first_log_softmax(logits)
        if weights is not None:
            true *= tf.cast(weights > 0, tf.float32)[:, None, None]
        losses, counted = self._cross_entropy(true, logarithms), tf.reduce_sum(true, axis=0)
        sums = [tf.stack([tf.reduce_sum(losses), tf.reduce_sum(counted)])]
        if self.with_dice:
            predicted = tf.exp(logarithms) * counted
            sums += [sum_of_pixels(values) for values in (predicted * true, predicted, true)]
        return tf.concat(sums, axis=0)

    def value(self, sums: "tf.Tensor") -> "tf.Tensor":
        """Return the loss, a scalar, of what `sums` returned, added up; 0 if no pixel counts."""
        pixels = tf.maximum(sums[1], 1)
        loss = sums[0] / pixels
        if not self.with_dice:
            return loss
        overlap, predicted, true = tf.unstack(tf.reshape(sums[2:], [3, self.number_classes]))
        weights = tf.cast(true > 0, sums.dtype)
        if self.class_weights is not None:
            weights *= tf.constant(self.class_weights, sums.dtype)
        share = self.label_smoothing / self.number_classes
        overlap = (1 - self.label_smoothing) * overlap + share * predicted
        true = (1 - self.label_smoothing) * true + share * pixels
        dice = 2 * overlap / tf.maximum(predicted + true, 1e-5)
        return loss + tf.math.divide_no_nan(tf.reduce_sum(weights * (1 - dice)), tf.reduce_sum(weights))


def confusion_matrix(masks: "tf.Tensor", logits: "tf.Tensor", weights: "tf.Tensor", number_classes: int) -> "tf.Tensor":
    """Count the pixels of each pair of true and predicted class.

    Parameters
    ----------
    masks : tensor of integers, shape (N, H, W)
        True class ids; see `counted_pixels`.
    logits : tensor of float32, shape (N, H, W, classes)
        What the network gives; the largest is the predicted class.
    weights : tensor of float32, shape (N,)
        Images of weight 0 do not count.
    number_classes : int
        Classes, background included.

    Returns
    -------
    tensor of int64, shape (classes, classes)
        Rows are true classes, columns predicted ones.
    """
    cells = number_classes**2
    cell = tf.cast(masks, tf.int32) * number_classes + tf.argmax(logits, axis=-1, output_type=tf.int32)
    counted = counted_pixels(masks) & (weights[:, None, None] > 0)
    cell = tf.where(counted, cell, cells)  # all else goes to one more cell, which is dropped
    with tf.device("CPU:0"):  # a GPU's way to count is not deterministic
        counts = tf.math.bincount(tf.reshape(cell, [-1]), minlength=cells + 1, maxlength=cells + 1)
    return tf.cast(tf.reshape(counts[:cells], [number_classes, number_classes]), tf.int64)


class Adam(tf.Module):
    """Adam (Kingma and Ba, arXiv 1412.6980), with a loss scale that keeps small gradients of a float16 network.

    Gradients are summed over all replicas before anything looks at them, so that all replicas agree whether one of them
    had an overflow: then the step is left out and the scale halved. After `GROWTH_STEPS` steps without any it doubles.

    Parameters
    ----------
    variables : sequence of variables
        To train; called in the scope of their strategy.
    loss_scaling : bool
        Whether the network computes in float16.
    """

    BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
    FIRST_LOSS_SCALE, GROWTH_STEPS = 2.0**15, 2000

    def __init__(self, variables: Sequence[Any], loss_scaling: bool) -> None:
        super().__init__()
        self._loss_scaling = loss_scaling
        self.means, self.variances = (
            [tf.Variable(tf.zeros(variable.shape), trainable=False) for variable in variables] for _ in range(2)
        )
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.loss_scale = tf.Variable(self.FIRST_LOSS_SCALE if loss_scaling else 1.0, trainable=False)
        self.steps_without_overflow = tf.Variable(0, dtype=tf.int64, trainable=False)

    def scale(self, loss: "tf.Tensor") -> "tf.Tensor":
        """Return a loss whose gradients float16 has numbers for."""
        return loss * self.loss_scale if self._loss_scaling else loss

    def apply(self, gradients: list["tf.Tensor"], variables: Sequence[Any], learning_rate: "tf.Tensor") -> None:
        """Update the variables by the gradients of a scaled loss, each replica by the sum over all."""
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        if not self._loss_scaling:
            self._update(gradients, variables, learning_rate)
            return
        scale, steps = tf.convert_to_tensor(self.loss_scale), self.steps_without_overflow + 1
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
        unscaled = [gradient / scale for gradient in gradients]
        tf.cond(finite, lambda: self._update(unscaled, variables, learning_rate), lambda: None)
        grow = steps >= self.GROWTH_STEPS
        assign(self.loss_scale, tf.where(finite, tf.where(grow, 2 * scale, scale), tf.maximum(scale / 2, 1.0)))
        assign(self.steps_without_overflow, tf.where(finite & ~grow, steps, 0))

    def _update(self, gradients: list["tf.Tensor"], variables: Sequence[Any], learning_rate: "tf.Tensor") -> None:
        """Take the step of Adam; one operation for each variable."""
        updates = self.updates + 1
        assign(self.updates, updates)
        powers = [tf.pow(beta, tf.cast(updates, tf.float32)) for beta in (self.BETA_1, self.BETA_2)]
        for variable, mean, variance, gradient in zip(variables, self.means, self.variances, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle, m=mean.handle, v=variance.handle, beta1_power=powers[0], beta2_power=powers[1],
                lr=learning_rate, beta1=self.BETA_1, beta2=self.BETA_2, epsilon=self.EPSILON, grad=gradient,
            )  # fmt: skip


def average_interval(step: int) -> int:
    """Return after how many steps the averaged weights are updated, so late in a run: rarely enough to cost nothing."""
    return 1 if step < AVERAGED_EACH_STEP else AVERAGING_INTERVAL


def average_decay(step: int) -> float:
    """Return what the averaged weights keep of themselves in an update.

    They go back about a tenth of the steps taken, so that those of a network that knew little count little.
    """
    of_a_step = min((1 + step) / (10 + step), 1 - 1 / LONGEST_AVERAGE)
    return float(of_a_step ** average_interval(step))


class UNetTrainer:
    """A network, its optimizer, and its training and test steps under a strategy.

    Parameters
    ----------
    strategy : tf.distribute.Strategy
        Over the replicas.
    model : callable
        Takes a `dropout_key` (see `build_unet`) and returns a keras.Model; called inside the strategy's scope, such as
        ``lambda dropout_key: build_unet(1, 2, dropout_key=dropout_key)``. It may have more outputs, as those of deep
        supervision; their losses count alike.
    learning_rate : float
        Of Adam; may be changed between steps.
    loss : Loss
        To train with, and to test with but for its label smoothing.
    seed : int
        Of dropout.
    average_weights : bool
        Whether to test a moving average of the weights instead of those of the last step.
    loss_scaling : bool
        Whether to keep small gradients of a float16 network from vanishing.
    xla : bool, optional
        Whether to compile the training step, of a single replica; None tries it in the first step and does without it
        if it cannot be done, as often its files are missing.

    Attributes
    ----------
    network : keras.Model
        What is trained, with all its outputs.
    model : keras.Model
        The same with the first output alone.
    averaged : keras.Model
        Of the same layers, with the weights that are tested and exported: their average, or `model` itself. It is
        about that of the last tenth of all steps, of at most `LONGEST_AVERAGE`, batch normalization included.
    test_loss : Loss
        What to make of the sums that `test_step` returns.
    optimizer : Adam
    step : tf.Variable of int64
        Training steps taken.
    num_replicas : int
        Devices that share a global batch, on all nodes.
    """

    def __init__(
        self,
        strategy: Any,
        model: Callable[[Callable[[], "tf.Tensor"]], "tf.keras.Model"],
        learning_rate: float,
        loss: Loss,
        seed: int = 0,
        average_weights: bool = False,
        loss_scaling: bool = False,
        xla: Optional[bool] = False,
    ) -> None:
        self._strategy, self._seed = strategy, seed
        self._loss, self.test_loss = loss, replace(loss, label_smoothing=0.0)
        self._learning_rate = learning_rate
        self.num_replicas: int = strategy.num_replicas_in_sync
        with strategy.scope():
            self.step = tf.Variable(
                0, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )
            self.network = model(self._dropout_key)
            for layer in self.network.layers:
                if isinstance(layer, BatchNormalization):
                    layer.correction_share = self._correction_share
            self.model = without_coarse_outputs(self.network)
            self.averaged = without_coarse_outputs(model(self._dropout_key)) if average_weights else self.model
            self.optimizer = Adam(self.network.trainable_variables, loss_scaling)
        self.begin_average()
        self._steps_taken: Optional[int] = None
        self._xla_on_trial = xla is None
        self._step_function = self._make_step_function(xla is not False)
        self._concrete_step: Any = None

    def _dropout_key(self) -> "tf.Tensor":
        """Return two integers that no other step and replica of the run has."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.stack([tf.constant(self._seed, tf.int64), self.step * self.num_replicas + tf.cast(replica, tf.int64)])

    def _correction_share(self) -> "tf.Tensor":
        """Return which share of batch renormalization is in force at this step, 0 to 1."""
        steps = tf.cast(self.step - CORRECTED_FROM, tf.float32)
        return tf.clip_by_value(steps / (CORRECTED_FULLY - CORRECTED_FROM), 0.0, 1.0)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        self._learning_rate = learning_rate

    def distribute(self, reader: Any) -> Any:
        """Return an endless iterator over global batches: one batch of the reader for each replica of this process."""
        return iter(self._strategy.distribute_datasets_from_function(lambda context: reader.get_tf_dataset()))

    def train_step(self, batch: Any, votes: Sequence[float] = ()) -> "tf.Tensor":
        """Take one optimizer step.

        Parameters
        ----------
        batch : item of `distribute`
            A global batch.
        votes : sequence of float
            Of this process, such as 1 to stop and 0 not to.

        Returns
        -------
        tensor of float32, shape (2 + len(votes),)
            The mean loss of the global batch's counted pixels, and how many these are; the sum of each vote over all
            replicas, so that all processes know of it at the same step. A GPU may still be computing it.
        """
        if self._steps_taken is None:
            self._steps_taken = int(self.step.numpy())  # of a resumed run, too; counted here then: asking takes time
        numbers = tf.constant([self._learning_rate, *map(float, votes)], tf.float32)
        result = (self._try_xla if self._xla_on_trial else self._take_step)(batch, numbers)
        self._steps_taken += 1
        if self.averaged is not self.model and self._steps_taken % average_interval(self._steps_taken) == 0:
            self._update_average(tf.constant(average_decay(self._steps_taken), tf.float32))
        return result

    def start_from(self, folder: PathLike) -> str:
        """Take the weights of an exported network; layers for other channels or classes stay as they are.

        Parameters
        ----------
        folder : path
            A SavedModel of this suite.

        Returns
        -------
        str
            A short text that two networks share only if their weights are the same.

        Raises
        ------
        InputError
            If that network is of another kind or depth.
        """
        weights = read_weights(folder)
        new = different_layers(weights, self.model, folder)
        first, last = FIRST_LAYER.stop * ("first" in new), len(weights) + LAST_LAYER.start * ("last" in new)
        for variable, values in list(zip(self.model.weights, weights))[first:last]:
            variable.assign(values)
        self.begin_average()
        digest = hashlib.sha256(b"".join(values.tobytes() for values in weights)).hexdigest()[:12]
        logging.info("beginning with the network in %s, fingerprint %s", folder, digest)
        for layer, reason in new.items():
            logging.info("its %s layer is new: %s", layer, reason)
        return digest

    def begin_average(self) -> None:
        """Set the averaged weights to those of the last step."""
        if self.averaged is not self.model:
            self._update_average(tf.constant(0.0))

    @tf.function(autograph=False)
    def _update_average(self, decay: "tf.Tensor") -> None:
        """Move the averaged weights toward those of the last step, each replica its own copy of them."""

        def update() -> None:
            for averaged, last in zip(self.averaged.weights, self.model.weights):
                assign(averaged, decay * tf.convert_to_tensor(averaged) + (1 - decay) * tf.convert_to_tensor(last))

        self._strategy.run(update)

    def _take_step(self, batch: Any, numbers: "tf.Tensor") -> "tf.Tensor":
        """Take a step. All batches have one shape, so that the function for it is looked up once: that takes 2 ms."""
        if self._concrete_step is None:
            self._concrete_step = self._step_function.get_concrete_function(batch, numbers)
        return self._concrete_step(batch, numbers)

    def _make_step_function(self, xla: bool) -> Any:
        """Return the function that takes a step on all replicas."""
        # No Python condition in a step depends on a tensor, so nothing needs translating.
        replica_step = (
            tf.function(self._train_replica, jit_compile=True, autograph=False) if xla else self._train_replica
        )

        @tf.function(autograph=False)
        def step(batch: Any, numbers: "tf.Tensor") -> "tf.Tensor":
            sums = self._strategy.run(replica_step, args=(*batch, numbers))
            self.step.assign_add(1)
            return self._strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

        return step

    def _try_xla(self, batch: Any, numbers: "tf.Tensor") -> "tf.Tensor":
        """Take the first step compiled or, if that fails, otherwise from then on."""
        self._xla_on_trial, before = False, self.step.numpy()
        try:
            result = self._take_step(batch, numbers)
            result.numpy()  # waits for it
        except tf.errors.OpError as error:  # while it compiles, before anything has changed
            logging.info("training without XLA, which fails here: %s", str(error).splitlines()[0])
            self.step.assign(before)
            self._step_function, self._concrete_step = self._make_step_function(False), None
            result = self._take_step(batch, numbers)
        return result

    def test_step(self, batch: Any, votes: Sequence[float] = ()) -> tuple["tf.Tensor", "tf.Tensor", "tf.Tensor"]:
        """Evaluate a global batch.

        Parameters
        ----------
        batch : tuple
            As for `train_step`.
        votes : sequence of float
            As for `train_step`.

        Returns
        -------
        votes : tensor of float32, shape (len(votes),)
            The sums of the votes.
        sums : tensor of float32
            Of `test_loss`.
        confusion : tensor of int64, shape (classes, classes)
            Counted pixels by true and predicted class.
        """
        return self._test_step(batch, tf.constant([float(vote) for vote in votes], tf.float32))

    @tf.function(autograph=False)
    def _test_step(self, batch: Any, votes: "tf.Tensor") -> tuple["tf.Tensor", ...]:
        results = self._strategy.run(self._test_replica, args=(*batch, votes))
        return tuple(self._strategy.reduce(tf.distribute.ReduceOp.SUM, result, axis=None) for result in results)

    def _train_replica(
        self, images: "tf.Tensor", masks: "tf.Tensor", weights: "tf.Tensor", numbers: "tf.Tensor"
    ) -> "tf.Tensor":
        """Take a step on one replica's batch; `numbers` are the learning rate and the votes."""
        variables, context = self.network.trainable_variables, tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(self.network(images, training=True))
            own = sums = tf.stack(
                [self._loss.sums(masks[:, :: 2**level, :: 2**level], logits) for level, logits in enumerate(outputs)]
            )
            if self.num_replicas > 1:
                # The loss of the global batch, of which each replica takes the gradient by its own part of the sums:
                # these gradients add up to that of the loss.
                with tape.stop_recording():
                    of_others = context.all_reduce(tf.distribute.ReduceOp.SUM, own) - own
                sums = own + of_others
            losses = [self._loss.value(of_output) for of_output in tf.unstack(sums)]
            scaled = self.optimizer.scale(tf.add_n(losses))
        self.optimizer.apply(tape.gradient(scaled, variables), variables, numbers[0])
        return tf.concat([tf.stack([losses[0] / self.num_replicas, own[0, 1]]), numbers[1:]], axis=0)

    def _test_replica(
        self, images: "tf.Tensor", masks: "tf.Tensor", weights: "tf.Tensor", votes: "tf.Tensor"
    ) -> tuple["tf.Tensor", "tf.Tensor", "tf.Tensor"]:
        """Evaluate one replica's batch."""
        logits = self.averaged(images, training=False)
        confusion = confusion_matrix(masks, logits, weights, self._loss.number_classes)
        return tf.identity(votes), self.test_loss.sums(masks, logits, weights), confusion


def read_weights(folder: PathLike) -> list[np.ndarray]:
    """Return the weights of a SavedModel that `export_saved_model` wrote, in the order of the network's own.

    Raises
    ------
    InputError
        If there are none.
    """
    with without_patterns(folder) as path:
        try:
            reader = tf.train.load_checkpoint(f"{path}/variables/variables")
            names = [name for name in reader.get_variable_to_shape_map() if name.startswith("weights/")]
            weights = [reader.get_tensor(f"weights/{i}/.ATTRIBUTES/VARIABLE_VALUE") for i in range(len(names))]
        except MemoryError:
            raise
        except Exception as error:  # TensorFlow raises whatever comes of reading a damaged file
            reason = cause_of(error).replace(path, str(folder))
            raise InputError(
                f"cannot read the weights in {folder}: {reason}; give a folder saved_model that train_unet.py wrote"
            ) from error
    return weights


def different_layers(weights: Sequence[np.ndarray], model: "tf.keras.Model", folder: PathLike) -> dict[str, str]:
    """Return which layers of a network other weights do not fit: ``first`` and ``last``, each with the reason.

    Raises
    ------
    InputError
        If more differs than the channels of the image and the number of classes.
    """
    found, expected = ([tuple(each.shape) for each in of] for of in (weights, model.weights))
    features = [shapes[0][-1] if shapes and len(shapes[0]) == 4 else 0 for shapes in (found, expected)]
    if features[0] and features[0] != features[1]:
        raise InputError(
            f"expected a network of --baseline_feature_depth {features[1]} in {folder}, found one of {features[0]}; "
            f"train with --baseline_feature_depth {features[0]}, or begin with another network"
        )
    between = slice(FIRST_LAYER.stop, LAST_LAYER.start)
    if len(found) != len(expected) or found[between] != expected[between]:
        raise InputError(f"expected in {folder} a U-Net that train_unet.py wrote, found weights of another network")
    reasons = {}
    if found[FIRST_LAYER] != expected[FIRST_LAYER]:
        reasons["first"] = f"{expected[0][2]} channels instead of {found[0][2]}"
    if found[LAST_LAYER] != expected[LAST_LAYER]:
        reasons["last"] = f"{expected[-1][0]} classes instead of {found[-1][0]}"
    return reasons


def export_saved_model(model: "tf.keras.Model", folder: PathLike, metadata: dict[str, Any]) -> None:
    """Write a SavedModel with its metadata, replacing an older one only when the new one is whole.

    Parameters
    ----------
    model : keras.Model
        From images to logits.
    folder : path
        Final folder, such as ``output_dir/saved_model``.
    metadata : dict
        JSON-compatible; stored as `MODEL_METADATA_FILE` inside the folder.

    Notes
    -----
    The signature ``serving_default`` takes ``(N, H, W, C)`` float32, z-scored, and returns ``softmax``,
    ``(N, H, W, classes)`` float32.
    """
    module = tf.Module()  # of the weights and the function alone: whatever Keras would save is of no use here
    module.weights = model.weights

    signature = tf.TensorSpec([None, None, None, model.input_shape[-1]], tf.float32, name="image")

    @tf.function(input_signature=[signature], autograph=False)
    def predict(image: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        return {"softmax": tf.nn.softmax(tf.cast(model(image, training=False), tf.float32))}

    with replacing_folder(Path(folder)) as new:
        tf.saved_model.save(module, os.fspath(new), signatures={"serving_default": predict})
        (new / MODEL_METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
