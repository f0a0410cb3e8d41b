"""The network, its loss, and one training or test step on every replica.

Owns the U-Net (Ronneberger et al., arXiv 1505.04597, with ``same`` convolutions), the exported SavedModel, the
optimizer, and `UNetTrainer`, which runs steps under a tf.distribute strategy. The network's geometry, `SIZE_FACTOR` and
`RADIUS`, is in `lmdb_utils`, because databases and inference depend on it too.

Several replicas train exactly as a single one would with the same global batch. Batch normalization and the optimizer
use sums over all replicas, so every replica of every process has the same network at any time.
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

from cli import InputError, PathLike, cause_of, counted, replacing_folder, shield_keras, without_patterns
from lmdb_utils import MODEL_METADATA_FILE, SIZE_FACTOR

shield_keras()

import tensorflow as tf  # noqa: E402

LEVELS = SIZE_FACTOR.bit_length() - 1  # number of poolings
CONVOLUTIONS_PER_LEVEL = 2
DROPOUT_RATE = 0.5
DROPOUT_LEVELS = 2  # the deepest ones
# This averages over tens of steps. The usual 0.99 lags so far behind that the first test epochs are meaningless.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-3  # added to the variance
LARGEST_SCALE, LARGEST_SHIFT = 3.0, 5.0  # limits of batch renormalization, as in its paper
CORRECTED_FROM, CORRECTED_FULLY = 100, 250  # steps over which it is phased in; earlier averages mean little
LONGEST_AVERAGE = 1000  # most steps that a moving average of the weights covers
FIRST_LAYER, LAST_LAYER = slice(0, 2), slice(-2, None)  # kernels and biases in a network's list of weights
AVERAGED_EACH_STEP, AVERAGING_INTERVAL = 100, 10  # first steps, each with an update; steps between later ones


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
        Number of channels of the image.
    number_classes : int
        Number of classes, background included.
    baseline_feature_depth : int
        Features of the top level, doubled at each level below; the paper's network has 64.
    dropout_rate : float
        Dropout rate of the two deepest levels while training.
    batch_norm : bool
        Whether batch normalization follows each convolution.
    dropout_key : callable, optional
        Called at each training step; returns two integers that determine which features are dropped.
    precision : str
        ``"float32"``, or ``"mixed_float16"`` to compute in float16 with float32 weights.
    deep_supervision : bool
        Whether the coarser levels of the decoder have logits of their own for training. Each output has half as many
        rows and columns as the previous output.

    Returns
    -------
    keras.Model
        Maps ``(N, H, W, channels)`` float32, with H and W multiples of `SIZE_FACTOR`, to logits
        ``(N, H, W, number_classes)`` float32. With deep supervision it returns a list that starts with these logits.
    """
    parts = Parts(number_classes, dropout_rate, batch_norm, dropout_key, precision)
    image = tf.keras.Input((None, None, channels))
    features, skips = image, []
    for level in range(LEVELS):
        features = parts.drop(parts.convolve(features, baseline_feature_depth * 2**level), level)
        skips.append(features)  # (N, H/2^l, W/2^l, 2^l F)
        features = tf.keras.layers.MaxPooling2D(2, dtype=precision)(features)
    features = parts.drop(parts.convolve(features, baseline_feature_depth * 2**LEVELS), LEVELS)  # (N, H/16, W/16, 16 F)
    logits = []  # coarsest first
    for level in reversed(range(LEVELS)):
        features = parts.join(features, skips[level], baseline_feature_depth * 2**level)  # (N, H/2^l, W/2^l, 2^l F)
        if deep_supervision or level == 0:
            logits.append(parts.classify(features))  # (N, H/2^l, W/2^l, classes)
    return tf.keras.Model(image, logits[::-1] if deep_supervision else logits[0])


@dataclass(frozen=True)
class Parts:
    """The parts of a U-Net, with the parameters of `build_unet` that concern single layers."""

    number_classes: int
    dropout_rate: float
    batch_norm: bool
    dropout_key: Optional[Callable[[], "tf.Tensor"]]
    precision: str

    def convolve(self, features: Any, depth: int) -> Any:
        """Return `depth` features from the convolutions of a level, each with batch normalization if enabled."""
        for _ in range(CONVOLUTIONS_PER_LEVEL):
            convolution = tf.keras.layers.Conv2D(
                depth, 3, padding="same", activation="relu", kernel_initializer="he_normal", dtype=self.precision
            )
            features = convolution(features)
            if self.batch_norm:
                features = BatchNormalization()(features)
        return features

    def drop(self, features: Any, level: int) -> Any:
        """Return the features, with dropout if the level is one of the deepest."""
        if level <= LEVELS - DROPOUT_LEVELS:
            return features
        return StatelessDropout(self.dropout_rate, level, self.dropout_key, dtype=self.precision)(features)

    def join(self, features: Any, skip: Any, depth: int) -> Any:
        """Upsample the features of the level below, join them with the encoder's features, and convolve both."""
        # With kernel and stride both 2, each output pixel comes from one input pixel, so the radius does not grow.
        features = tf.keras.layers.Conv2DTranspose(depth, 2, strides=2, dtype=self.precision)(features)
        features = tf.keras.layers.Concatenate(dtype=self.precision)([skip, features])
        return self.convolve(features, depth)

    def classify(self, features: Any) -> Any:
        """Return logits, in float32."""
        logits = tf.keras.layers.Conv2D(self.number_classes, 1, dtype=self.precision)(features)
        return tf.keras.layers.Activation("linear", dtype="float32")(logits)


def without_coarse_outputs(network: "tf.keras.Model") -> "tf.keras.Model":
    """Return the network to test and export: the same layers without the outputs of deep supervision."""
    return tf.keras.Model(network.input, network.outputs[0]) if len(network.outputs) > 1 else network


class StatelessDropout(tf.keras.layers.Layer):
    """Dropout that depends on a key, so that a resumed run drops the same features as an uninterrupted one.

    In TensorFlow 2.12 to 2.15, the Keras layer draws from a state inside the operation, which no checkpoint contains.

    Parameters
    ----------
    rate : float
        Fraction of the features to set to 0; the others are scaled up to keep the mean.
    number : int
        Number of the layer, unique in its network.
    key : callable, optional
        Called at each training step; returns a tensor of two integers. If not given, TensorFlow's global seed is used.
    """

    def __init__(self, rate: float, number: int, key: Optional[Callable[[], "tf.Tensor"]], dtype: Any = None) -> None:
        super().__init__(dtype=dtype)
        self.rate, self._number, self._key = rate, number, key

    def call(self, features: "tf.Tensor", training: bool = False) -> "tf.Tensor":
        """Drop features while training; otherwise return them unchanged."""
        if not training or not self.rate:
            return features
        if self._key is None:
            return tf.nn.dropout(features, self.rate)
        seed = tf.random.experimental.stateless_fold_in(self._key(), self._number)
        return tf.nn.experimental.stateless_dropout(features, self.rate, seed)


class BatchNormalization(tf.keras.layers.Layer):
    """Batch renormalization (Ioffe, arXiv 1702.03275) over the global batch of all replicas.

    The statistics of a few images can be far from the moving averages, which are used in testing. So the features of a
    batch are normalized by its own statistics and then corrected, within limits, to match normalization by the moving
    averages. The correction counts as a constant, so gradients are the same as in batch normalization.

    Takes and returns float16 or float32; means and variances are float32. The Keras layer computes different moving
    variances in Keras 2 and Keras 3, and keeps separate ones for each replica.

    Attributes
    ----------
    correction_share : callable, optional
        Called at each training step; returns a scalar tensor from 0 to 1, the share of the limits that applies. If not
        given, or with 0, this is plain batch normalization (Ioffe and Szegedy, arXiv 1502.03167).
    """

    def __init__(self) -> None:
        super().__init__(dtype="float32", autocast=False)
        self.correction_share: Optional[Callable[[], tf.Tensor]] = None

    def build(self, shape: Sequence[Optional[int]]) -> None:
        """Create the weights: one of each kind for each feature."""

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
        """Normalize by the global batch and update the moving averages while training; otherwise use these averages."""
        weights = self.gamma, self.beta, self.moving_mean, self.moving_variance
        gamma, beta, moving_mean, moving_variance = map(tf.convert_to_tensor, weights)
        if not training:
            exact = tf.cast(features, tf.float32)  # faster on a CPU than the operation below
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
    """Return the mean over all replicas of each float32 tensor; all tensors have the same shape."""
    context = tf.distribute.get_replica_context()
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(values))
    return tf.unstack(sums / context.num_replicas_in_sync)


def global_statistics(features: "tf.Tensor", near: "tf.Tensor") -> tuple["tf.Tensor", "tf.Tensor"]:
    """Return mean and variance over all replicas, float32 of shape (F,), as constants without gradients.

    Parameters
    ----------
    features : tensor of float16 or float32, shape (N, H, W, F)
        Features of this replica; all replicas have the same shape.
    near : tensor of float32, shape (F,)
        Estimate of the means; a closer one reduces the rounding error of the variances.
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
    """Return the factor and the offset that turn normalization by a batch into normalization by moving averages.

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
        Features of this replica; all replicas have the same shape.
    gamma, beta : tensor of float32, shape (F,)
        Standard deviation and mean of the result.
    mean, variance : tensor of float32, shape (F,)
        Statistics over all replicas. The gradient treats them as functions of the features.

    Notes
    -----
    The gradient is written out, because an automatic one would keep several copies of the features in float32.
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
    """Set this replica's copy of a variable; all replicas must set the same value."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def counted_pixels(masks: "tf.Tensor") -> "tf.Tensor":
    """Return which pixels (N, H, W) have a class; pixels to ignore have the largest value of the type."""
    masks = tf.convert_to_tensor(masks)
    return tf.not_equal(masks, masks.dtype.max)


def sum_of_pixels(values: "tf.Tensor") -> "tf.Tensor":
    """Return the sum of values (classes, N, H, W) for each class.

    Sums row by row, then image by image. TensorFlow may add numbers one after the other, and with millions of them
    float32 would lose several percent.
    """
    return tf.reduce_sum(tf.reduce_sum(tf.reduce_sum(values, axis=3), axis=2), axis=1)


def classes_first_log_softmax(logits: "tf.Tensor") -> "tf.Tensor":
    """Return the log softmax of logits (N, H, W, classes) as (classes, N, H, W).

    In this order a CPU processes many pixels at once. TensorFlow's own functions expect the classes of a pixel side by
    side, and take several times as long with few classes.
    """
    logits = tf.transpose(logits, [3, 0, 1, 2])
    logits -= tf.stop_gradient(tf.reduce_max(logits, axis=0))
    return logits - tf.math.log(tf.reduce_sum(tf.exp(logits), axis=0))


@dataclass(frozen=True)
class Loss:
    """Cross-entropy, optionally plus the Dice loss, of all counted pixels of a global batch or a test set.

    The Dice loss (Milletari et al., arXiv 1606.04797) is 1 minus the mean of ``2 * overlap / (predicted + true)`` over
    the classes that occur. Its terms are sums over all pixels of softmax and true class, so a class with few pixels
    matters as much as a class with many. Both losses are functions of a few sums, which simply add up over replicas and
    batches.

    Attributes
    ----------
    number_classes : int
        Number of classes, background included.
    with_dice : bool
        Whether to add the Dice loss to the cross-entropy.
    label_smoothing : float
        Fraction of the target that is spread evenly over all classes.
    class_weights : tuple of float, optional
        Factor of each class in the cross-entropy, and its weight in the mean of the Dice loss.
    """

    number_classes: int
    with_dice: bool = False
    label_smoothing: float = 0.0
    class_weights: Optional[tuple[float, ...]] = None

    def cross_entropy(self, masks: "tf.Tensor", logits: "tf.Tensor") -> "tf.Tensor":
        """Return the cross-entropy of each pixel, (N, H, W), in natural units, 0 for pixels to ignore; see `sums`."""
        return self._cross_entropy(self._one_hot(masks), classes_first_log_softmax(logits))

    def _one_hot(self, masks: "tf.Tensor") -> "tf.Tensor":
        """Return 1 for the class of each pixel and 0 otherwise, (classes, N, H, W); pixels to ignore have no class."""
        return tf.one_hot(tf.where(counted_pixels(masks), tf.cast(masks, tf.int32), -1), self.number_classes, axis=0)

    def _cross_entropy(self, true: "tf.Tensor", logarithms: "tf.Tensor") -> "tf.Tensor":
        """Return the cross-entropy of each pixel from its class and its log softmax, both (classes, N, H, W)."""
        losses = -tf.reduce_sum(true * logarithms, axis=0)
        if self.label_smoothing:
            of_all_classes = -tf.reduce_sum(true, axis=0) * tf.reduce_mean(logarithms, axis=0)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * of_all_classes
        if self.class_weights is not None:
            losses *= tf.tensordot(tf.constant(self.class_weights, tf.float32), true, 1)
        return losses

    def sums(self, masks: "tf.Tensor", logits: "tf.Tensor", weights: Optional["tf.Tensor"] = None) -> "tf.Tensor":
        """Return the sums over some images that `value` needs.

        Parameters
        ----------
        masks : tensor of integers, shape (N, H, W)
            Class ids; see `counted_pixels`.
        logits : tensor of float32, shape (N, H, W, classes)
            Output of the network.
        weights : tensor of float32, shape (N,), optional
            Images of weight 0 do not count.

        Returns
        -------
        tensor of float32
            Sum of the cross-entropy and number of counted pixels. With the Dice loss, also overlap, softmax and pixels
            of each class. Sums of different images may be added.
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
        """Return the scalar loss for the total of the results of `sums`; 0 if no pixel counts."""
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
        Output of the network; the largest value marks the predicted class.
    weights : tensor of float32, shape (N,)
        Images of weight 0 do not count.
    number_classes : int
        Number of classes, background included.

    Returns
    -------
    tensor of int64, shape (classes, classes)
        Rows are true classes, columns are predicted classes.
    """
    cells = number_classes**2
    cell = tf.cast(masks, tf.int32) * number_classes + tf.argmax(logits, axis=-1, output_type=tf.int32)
    counted = counted_pixels(masks) & (weights[:, None, None] > 0)
    cell = tf.where(counted, cell, cells)  # all other pixels go to an extra cell, which is dropped
    with tf.device("CPU:0"):  # counting on a GPU is not deterministic
        counts = tf.math.bincount(tf.reshape(cell, [-1]), minlength=cells + 1, maxlength=cells + 1)
    return tf.cast(tf.reshape(counts[:cells], [number_classes, number_classes]), tf.int64)


class Adam(tf.Module):
    """Adam (Kingma and Ba, arXiv 1412.6980), with loss scaling that preserves small gradients of a float16 network.

    Gradients are summed over all replicas before they are checked, so all replicas agree on whether an overflow
    occurred. After an overflow, the step is skipped and the scale is halved. After `GROWTH_STEPS` steps without an
    overflow, the scale is doubled.

    Parameters
    ----------
    variables : sequence of variables
        Variables to train. Create the optimizer in the scope of their strategy.
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
        """Return the loss, scaled so that float16 can represent its gradients."""
        return loss * self.loss_scale if self._loss_scaling else loss

    def apply(self, gradients: list["tf.Tensor"], variables: Sequence[Any], learning_rate: "tf.Tensor") -> None:
        """Update the variables by the gradients of a scaled loss, summed over all replicas."""
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
        """Take a step of Adam, with one operation for each variable."""
        updates = self.updates + 1
        assign(self.updates, updates)
        powers = [tf.pow(beta, tf.cast(updates, tf.float32)) for beta in (self.BETA_1, self.BETA_2)]
        for variable, mean, variance, gradient in zip(variables, self.means, self.variances, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle, m=mean.handle, v=variance.handle, beta1_power=powers[0], beta2_power=powers[1],
                lr=learning_rate, beta1=self.BETA_1, beta2=self.BETA_2, epsilon=self.EPSILON, grad=gradient,
            )  # fmt: skip


def average_interval(step: int) -> int:
    """Return the number of steps between updates of the averaged weights; late updates are rare, to cost nothing."""
    return 1 if step < AVERAGED_EACH_STEP else AVERAGING_INTERVAL


def average_decay(step: int) -> float:
    """Return the fraction of the averaged weights that an update keeps.

    The average covers about the last tenth of the steps taken, so that early weights count little.
    """
    of_a_step = min((1 + step) / (10 + step), 1 - 1 / LONGEST_AVERAGE)
    return float(of_a_step ** average_interval(step))


class UNetTrainer:
    """A network, its optimizer, and its training and test steps under a strategy.

    Parameters
    ----------
    strategy : tf.distribute.Strategy
        Strategy over the replicas.
    model : callable
        Takes a `dropout_key` (see `build_unet`) and returns a keras.Model, such as
        ``lambda dropout_key: build_unet(1, 2, dropout_key=dropout_key)``. Called inside the strategy's scope. The model
        may have several outputs, as with deep supervision; their losses count equally.
    learning_rate : float
        Learning rate of Adam; may change between steps.
    loss : Loss
        Loss to train with, and to test with, apart from its label smoothing.
    seed : int
        Seed of dropout.
    average_weights : bool
        Whether to test a moving average of the weights instead of the weights of the last step.
    loss_scaling : bool
        Whether to keep small gradients of a float16 network from vanishing.
    xla : bool, optional
        Whether to compile the training step of a single replica. None tries to compile in the first step and continues
        without XLA if that fails, often because XLA's files are missing.

    Attributes
    ----------
    network : keras.Model
        Network in training, with all its outputs.
    model : keras.Model
        The same network with only its first output.
    averaged : keras.Model
        Network with the weights to test and export: their moving average, or `model` itself. The average covers about
        the last tenth of all steps, at most `LONGEST_AVERAGE`, and includes batch normalization.
    test_loss : Loss
        Loss that turns the sums from `test_step` into a value.
    optimizer : Adam
    step : tf.Variable of int64
        Training steps taken.
    num_replicas : int
        Number of devices on all nodes that share a global batch.
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
        """Return two integers that are unique to this step and replica of the run."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.stack([tf.constant(self._seed, tf.int64), self.step * self.num_replicas + tf.cast(replica, tf.int64)])

    def _correction_share(self) -> "tf.Tensor":
        """Return the share of batch renormalization that applies at this step, 0 to 1."""
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
            Votes of this process, such as 1 to stop and 0 to continue.

        Returns
        -------
        tensor of float32, shape (2 + len(votes),)
            Mean loss of the counted pixels in the global batch, the number of these pixels, and the sum of each vote
            over all replicas. All processes thus learn of a vote at the same step. A GPU may still be computing it all.
        """
        if self._steps_taken is None:
            self._steps_taken = int(self.step.numpy())  # not 0 in a resumed run; read only once, which takes time
        numbers = tf.constant([self._learning_rate, *map(float, votes)], tf.float32)
        result = (self._try_xla if self._xla_on_trial else self._take_step)(batch, numbers)
        self._steps_taken += 1
        if self.averaged is not self.model and self._steps_taken % average_interval(self._steps_taken) == 0:
            self._update_average(tf.constant(average_decay(self._steps_taken), tf.float32))
        return result

    def start_from(self, folder: PathLike) -> str:
        """Load the weights of an exported network; layers for other channels or classes stay unchanged.

        Parameters
        ----------
        folder : path
            A SavedModel of this suite.

        Returns
        -------
        str
            Fingerprint: a short text that two networks share only if their weights are the same.

        Raises
        ------
        InputError
            If the network has another architecture or depth.
        """
        weights = read_weights(folder)
        new = different_layers(weights, self.model, folder)
        first, last = FIRST_LAYER.stop * ("first" in new), len(weights) + LAST_LAYER.start * ("last" in new)
        for variable, values in list(zip(self.model.weights, weights))[first:last]:
            variable.assign(values)
        self.begin_average()
        digest = hashlib.sha256(b"".join(values.tobytes() for values in weights)).hexdigest()[:12]
        logging.info("starting from the network in %s, fingerprint %s", folder, digest)
        for layer, reason in new.items():
            logging.info("its %s layer is new: %s", layer, reason)
        return digest

    def begin_average(self) -> None:
        """Set the averaged weights to the weights of the last step."""
        if self.averaged is not self.model:
            self._update_average(tf.constant(0.0))

    @tf.function(autograph=False)
    def _update_average(self, decay: "tf.Tensor") -> None:
        """Move each replica's copy of the averaged weights toward the weights of the last step."""

        def update() -> None:
            for averaged, last in zip(self.averaged.weights, self.model.weights):
                assign(averaged, decay * tf.convert_to_tensor(averaged) + (1 - decay) * tf.convert_to_tensor(last))

        self._strategy.run(update)

    def _take_step(self, batch: Any, numbers: "tf.Tensor") -> "tf.Tensor":
        """Take a step. All batches have the same shape, so the function is looked up only once; that takes 2 ms."""
        if self._concrete_step is None:
            self._concrete_step = self._step_function.get_concrete_function(batch, numbers)
        return self._concrete_step(batch, numbers)

    def _make_step_function(self, xla: bool) -> Any:
        """Return the function that takes a step on all replicas."""
        # No Python condition in a step depends on a tensor, so AutoGraph is not needed.
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
        """Take the first step with XLA; if that fails, take it and all later steps without."""
        self._xla_on_trial, before = False, self.step.numpy()
        try:
            result = self._take_step(batch, numbers)
            result.numpy()  # waits for the result
        except tf.errors.OpError as error:  # from compiling, before any variable has changed
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
            Sums for `test_loss`.
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
        """Take a step on one replica's batch; `numbers` contains the learning rate and the votes."""
        variables, context = self.network.trainable_variables, tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(self.network(images, training=True))
            own = sums = tf.stack(
                [self._loss.sums(masks[:, :: 2**level, :: 2**level], logits) for level, logits in enumerate(outputs)]
            )
            if self.num_replicas > 1:
                # Each replica differentiates the loss of the global batch by its own part of the sums. These gradients
                # add up to the gradient of the loss.
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
    """Return the weights of a SavedModel that `export_saved_model` wrote, in the order of the network's weights.

    Raises
    ------
    InputError
        If they cannot be read.
    """
    with without_patterns(folder) as path:
        try:
            reader = tf.train.load_checkpoint(f"{path}/variables/variables")
            names = [name for name in reader.get_variable_to_shape_map() if name.startswith("weights/")]
            weights = [reader.get_tensor(f"weights/{i}/.ATTRIBUTES/VARIABLE_VALUE") for i in range(len(names))]
        except MemoryError:
            raise
        except Exception as error:  # TensorFlow may raise anything for a damaged file
            reason = cause_of(error).replace(path, str(folder))
            raise InputError(
                f"cannot read the weights in {folder}: {reason}; pass a saved_model folder that train_unet.py wrote"
            ) from error
    return weights


def different_layers(weights: Sequence[np.ndarray], model: "tf.keras.Model", folder: PathLike) -> dict[str, str]:
    """Return the layers of a network that other weights do not fit: ``first``, ``last``, each with the reason.

    Raises
    ------
    InputError
        If the networks differ in more than image channels and number of classes.
    """
    found, expected = ([tuple(each.shape) for each in of] for of in (weights, model.weights))
    features = [shapes[0][-1] if shapes and len(shapes[0]) == 4 else 0 for shapes in (found, expected)]
    if features[0] and features[0] != features[1]:
        raise InputError(
            f"expected a network with --baseline_feature_depth {features[1]} in {folder}, found {features[0]}; "
            f"train with --baseline_feature_depth {features[0]}, or start from another network"
        )
    between = slice(FIRST_LAYER.stop, LAST_LAYER.start)
    if len(found) != len(expected) or found[between] != expected[between]:
        raise InputError(f"expected a U-Net from train_unet.py in {folder}, found the weights of another network")
    reasons = {}
    if found[FIRST_LAYER] != expected[FIRST_LAYER]:
        reasons["first"] = f"{counted(expected[0][2], 'channel')} instead of {found[0][2]}"
    if found[LAST_LAYER] != expected[LAST_LAYER]:
        reasons["last"] = f"{expected[-1][0]} classes instead of {found[-1][0]}"
    return reasons


def export_saved_model(model: "tf.keras.Model", folder: PathLike, metadata: dict[str, Any]) -> None:
    """Write a SavedModel with its metadata, replacing an older one only when the new one is complete.

    Parameters
    ----------
    model : keras.Model
        Maps images to logits.
    folder : path
        Final folder, such as ``output_dir/saved_model``.
    metadata : dict
        JSON-compatible values; stored as `MODEL_METADATA_FILE` inside the folder.

    Notes
    -----
    The signature ``serving_default`` takes ``(N, H, W, C)`` float32, z-scored, and returns ``softmax``,
    ``(N, H, W, classes)`` float32.
    """
    module = tf.Module()  # only the weights and the function; nothing else that Keras saves is needed
    module.weights = model.weights

    signature = tf.TensorSpec([None, None, None, model.input_shape[-1]], tf.float32, name="image")

    @tf.function(input_signature=[signature], autograph=False)
    def predict(image: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        return {"softmax": tf.nn.softmax(tf.cast(model(image, training=False), tf.float32))}

    with replacing_folder(Path(folder)) as new:
        tf.saved_model.save(module, os.fspath(new), signatures={"serving_default": predict})
        (new / MODEL_METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
