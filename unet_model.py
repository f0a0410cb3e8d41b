"""The network, its loss, and one training or test step on every replica.

Owns the U-Net (Ronneberger et al., arXiv 1505.04597, with ``same`` convolutions), the exported SavedModel, and
`UNetTrainer`, which runs steps under a tf.distribute strategy. Its geometry, on which databases and inference depend as
well, stands in `lmdb_utils`: `SIZE_FACTOR` and `RADIUS`.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from cli import PathLike
from lmdb_utils import SIZE_FACTOR

LEVELS = SIZE_FACTOR.bit_length() - 1  # poolings
CONVOLUTIONS_PER_LEVEL = 2
DROPOUT_RATE = 0.5
DROPOUT_LEVELS = 2  # the deepest ones
# Moving averages over some tens of steps: the usual 0.99 lags so far behind that the first test epochs mean nothing.
BATCH_NORM_MOMENTUM = 0.9

METADATA_FILE = "unet_metadata.json"  # inside the SavedModel's folder


def build_unet(
    channels: int,
    number_classes: int,
    baseline_feature_depth: int = 64,
    dropout_rate: float = DROPOUT_RATE,
    batch_norm: bool = True,
    dropout_key: Optional[Callable[[], "tf.Tensor"]] = None,
    precision: str = "float32",
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

    Returns
    -------
    keras.Model
        From ``(N, H, W, channels)`` float32, H and W multiples of `SIZE_FACTOR`, to logits
        ``(N, H, W, number_classes)`` float32.
    """
    layers = tf.keras.layers

    def convolve(features: Any, depth: int) -> Any:
        for _ in range(CONVOLUTIONS_PER_LEVEL):
            convolution = layers.Conv2D(
                depth, 3, padding="same", activation="relu", kernel_initializer="he_normal", dtype=precision
            )
            features = convolution(features)
            if batch_norm:
                features = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, dtype=precision)(features)
        return features

    def drop(features: Any, level: int) -> Any:
        if level <= LEVELS - DROPOUT_LEVELS:
            return features
        return StatelessDropout(dropout_rate, level, dropout_key, dtype=precision)(features)

    image = tf.keras.Input((None, None, channels))
    features, skips = image, []
    for level in range(LEVELS):
        depth = baseline_feature_depth * 2**level
        features = drop(convolve(features, depth), level)  # (N, H/2^l, W/2^l, 2^l F)
        skips.append(features)
        features = layers.MaxPooling2D(2, dtype=precision)(features)
    features = drop(convolve(features, baseline_feature_depth * 2**LEVELS), LEVELS)  # (N, H/16, W/16, 16 F)
    for level in reversed(range(LEVELS)):
        depth = baseline_feature_depth * 2**level
        # Kernel and stride both 2: each output pixel comes from one input pixel, which adds nothing to the radius.
        features = layers.Conv2DTranspose(depth, 2, strides=2, dtype=precision)(features)
        features = layers.Concatenate(dtype=precision)([skips[level], features])
        features = convolve(features, depth)  # (N, H/2^l, W/2^l, 2^l F)
    logits = layers.Conv2D(number_classes, 1, dtype=precision)(features)  # (N, H, W, classes)
    logits = layers.Activation("linear", dtype="float32")(logits)
    return tf.keras.Model(image, logits)


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


def per_pixel_loss(
    masks: "tf.Tensor",
    logits: "tf.Tensor",
    label_smoothing: float = 0.0,
    class_weights: Optional[Sequence[float]] = None,
) -> "tf.Tensor":
    """Return the cross-entropy of each pixel.

    Parameters
    ----------
    masks : tensor of integers, shape (N, H, W)
        Class ids.
    logits : tensor of float32, shape (N, H, W, classes)
        What the network gives.
    label_smoothing : float
        Share of the target that is spread over all classes alike.
    class_weights : sequence of float, optional
        Factor for the pixels of each class.

    Returns
    -------
    tensor of float32, shape (N, H, W)
        In natural units.
    """
    masks = tf.cast(masks, tf.int32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(masks, logits)
    if label_smoothing:
        of_all_classes = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * of_all_classes
    if class_weights is not None:
        losses *= tf.gather(tf.constant(class_weights, tf.float32), masks)
    return losses


def confusion_matrix(masks: "tf.Tensor", logits: "tf.Tensor", weights: "tf.Tensor", number_classes: int) -> "tf.Tensor":
    """Count the pixels of each pair of true and predicted class.

    Parameters
    ----------
    masks : tensor of integers, shape (N, H, W)
        True class ids.
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
    cell = tf.where(weights[:, None, None] > 0, cell, cells)  # padding goes to one more cell, which is dropped
    counts = tf.math.bincount(tf.reshape(cell, [-1]), minlength=cells + 1, maxlength=cells + 1)
    return tf.cast(tf.reshape(counts[:cells], [number_classes, number_classes]), tf.int64)


class UNetTrainer:
    """A network, its optimizer, and its training and test steps under a strategy.

    Parameters
    ----------
    strategy : tf.distribute.Strategy
        Over the replicas.
    model : callable
        Takes a `dropout_key` (see `build_unet`) and returns a keras.Model; called inside the strategy's scope, such as
        ``lambda dropout_key: build_unet(1, 2, dropout_key=dropout_key)``.
    number_classes : int
        Classes, background included.
    learning_rate : float
        Of Adam; may be changed between steps.
    seed : int
        Of dropout.
    label_smoothing : float
        Used in training, not in testing.
    class_weights : sequence of float, optional
        Factor of the loss of each class's pixels, in training and testing.
    loss_scaling : bool
        Whether to keep small gradients of a float16 network from vanishing.

    Attributes
    ----------
    model : keras.Model
    optimizer : keras.optimizers.Optimizer
    step : tf.Variable of int64
        Training steps taken.
    num_replicas : int
        Devices that share a global batch, on all nodes.
    """

    def __init__(
        self,
        strategy: Any,
        model: Callable[[Callable[[], "tf.Tensor"]], "tf.keras.Model"],
        number_classes: int,
        learning_rate: float,
        seed: int = 0,
        label_smoothing: float = 0.0,
        class_weights: Optional[Sequence[float]] = None,
        loss_scaling: bool = False,
    ) -> None:
        self._strategy, self._number_classes, self._seed = strategy, number_classes, seed
        self._label_smoothing, self._class_weights = label_smoothing, class_weights
        self.num_replicas: int = strategy.num_replicas_in_sync
        with strategy.scope():
            self.step = tf.Variable(
                0, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )
            self.model = model(self._dropout_key)
            self._adam = tf.keras.optimizers.Adam(learning_rate)
            self.optimizer = tf.keras.mixed_precision.LossScaleOptimizer(self._adam) if loss_scaling else self._adam
            # Slots made later, inside the traced step, fail under a strategy (keras-team/keras#23085).
            self.optimizer.build(self.model.trainable_variables)

    def _dropout_key(self) -> "tf.Tensor":
        """Return two integers that no other step and replica of the run has."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.stack([tf.constant(self._seed, tf.int64), self.step * self.num_replicas + tf.cast(replica, tf.int64)])

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        self._adam.learning_rate = learning_rate

    def distribute(self, reader: Any) -> Any:
        """Return an endless iterator over global batches: one batch of the reader for each replica of this process."""
        return iter(self._strategy.distribute_datasets_from_function(lambda context: reader.get_tf_dataset()))

    def train_step(self, batch: Any, votes: Sequence[float] = ()) -> np.ndarray:
        """Take one optimizer step.

        Parameters
        ----------
        batch : item of `distribute`
            A global batch.
        votes : sequence of float
            Of this process, such as 1 to stop and 0 not to.

        Returns
        -------
        ndarray of float32, shape (1 + len(votes),)
            The batch's mean loss; the sum of each vote over all replicas, so that all processes know of it at the
            same step.
        """
        return self._train_step(batch, tf.constant([float(vote) for vote in votes], tf.float32)).numpy()

    @tf.function(autograph=False)  # no Python condition in a step depends on a tensor, so nothing needs translating
    def _train_step(self, batch: Any, votes: "tf.Tensor") -> "tf.Tensor":
        sums = self._strategy.run(self._train_replica, args=(*batch, votes))
        self.step.assign_add(1)
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    def test_step(self, batch: Any, votes: Sequence[float] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate a global batch.

        Parameters
        ----------
        batch : tuple
            As for `train_step`.
        votes : sequence of float
            As for `train_step`.

        Returns
        -------
        sums : ndarray of float32, shape (1 + len(votes),)
            The sum of the mean losses of the batch's images; the sums of the votes.
        confusion : ndarray of int64, shape (classes, classes)
            Pixels by true and predicted class.
        """
        sums, confusion = self._test_step(batch, tf.constant([float(vote) for vote in votes], tf.float32))
        return sums.numpy(), confusion.numpy()

    @tf.function(autograph=False)
    def _test_step(self, batch: Any, votes: "tf.Tensor") -> tuple["tf.Tensor", "tf.Tensor"]:
        sums, confusions = self._strategy.run(self._test_replica, args=(*batch, votes))
        reduce = self._strategy.reduce
        return (
            reduce(tf.distribute.ReduceOp.SUM, sums, axis=None),
            reduce(tf.distribute.ReduceOp.SUM, confusions, axis=None),
        )

    def _train_replica(
        self, images: "tf.Tensor", masks: "tf.Tensor", weights: "tf.Tensor", votes: "tf.Tensor"
    ) -> "tf.Tensor":
        """Take a step on one replica's batch; the gradients of all replicas are summed by the optimizer."""
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            pixel_losses = per_pixel_loss(masks, logits, self._label_smoothing, self._class_weights)
            # Each replica divides by the pixels of the global batch, so that the sum over replicas is the mean.
            loss = tf.reduce_mean(pixel_losses) / self.num_replicas
            scaled = self._scale(loss)
        gradients = self._unscale(tape.gradient(scaled, variables))
        self.optimizer.apply_gradients(zip(gradients, variables))
        return tf.concat([loss[None], votes], axis=0)

    def _scale(self, loss: "tf.Tensor") -> "tf.Tensor":
        """Return a loss large enough for gradients in float16."""
        if self.optimizer is self._adam:
            return loss
        # The one thing that Keras 3 and Keras 2 do differently: the names, and who unscales.
        return self.optimizer.scale_loss(loss) if self._keras_3 else self.optimizer.get_scaled_loss(loss)

    def _unscale(self, gradients: list["tf.Tensor"]) -> list["tf.Tensor"]:
        """Return the gradients as the optimizer expects them."""
        if self.optimizer is self._adam or self._keras_3:
            return gradients
        return self.optimizer.get_unscaled_gradients(gradients)

    @property
    def _keras_3(self) -> bool:
        """Whether the optimizer that scales losses is that of Keras 3, which unscales by itself."""
        return hasattr(self.optimizer, "scale_loss")

    def _test_replica(
        self, images: "tf.Tensor", masks: "tf.Tensor", weights: "tf.Tensor", votes: "tf.Tensor"
    ) -> tuple["tf.Tensor", "tf.Tensor"]:
        """Evaluate one replica's batch."""
        logits = self.model(images, training=False)
        pixel_losses = per_pixel_loss(masks, logits, class_weights=self._class_weights)
        loss = tf.reduce_sum(tf.reduce_mean(pixel_losses, axis=[1, 2]) * weights)
        confusion = confusion_matrix(masks, logits, weights, self._number_classes)
        return tf.concat([loss[None], votes], axis=0), confusion


def export_saved_model(model: "tf.keras.Model", folder: PathLike, metadata: dict[str, Any]) -> None:
    """Write a SavedModel with its metadata, replacing an older one only when the new one is whole.

    Parameters
    ----------
    model : keras.Model
        From images to logits.
    folder : path
        Final folder, such as ``output_dir/saved_model``.
    metadata : dict
        JSON-compatible; stored as `METADATA_FILE` inside the folder.

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

    folder = Path(folder)
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tf.saved_model.save(module, os.fspath(new), signatures={"serving_default": predict})
    (new / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
