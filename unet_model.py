"""The network, its loss, and one training or test step on every replica.

Owns the U-Net (Ronneberger et al., arXiv 1505.04597, with ``same`` convolutions), the geometry that inference depends
on (`SIZE_FACTOR`, `RADIUS`), the exported SavedModel, and `UNetTrainer`, which runs
steps under a tf.distribute strategy.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lmdb_utils import PathLike

LEVELS = 4  # poolings
SIZE_FACTOR = 2**LEVELS  # height and width must be multiples of it
# The results of a block of the pooling grid (SIZE_FACTOR pixels each way) depend on 94 pixels beyond each of its edges:
# 92 for two 3x3 convolutions at 1, 2, 4, 8, 16, 8, 4, 2, 1 pixels each, and 2 because a pixel of a level counts as a
# whole. Rounded up to a multiple of SIZE_FACTOR, so that tiles pool as the whole image does.
RADIUS = 96
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
) -> "tf.keras.Model":
    """Build a U-Net.

    Parameters
    ----------
    channels : int
        Channels of the image.
    number_classes : int
    baseline_feature_depth : int
        Features of the top level, doubled with each level; the paper's network has 64.
    dropout_rate : float
        Of the two deepest levels while training.
    batch_norm : bool
        Whether batch normalisation follows each convolution.

    Returns
    -------
    keras.Model
        From ``(N, H, W, channels)`` float32, H and W multiples of `SIZE_FACTOR`, to logits
        ``(N, H, W, number_classes)`` float32.
    """
    layers = tf.keras.layers

    def convolve(features: Any, depth: int, dropout: bool) -> Any:
        for _ in range(CONVOLUTIONS_PER_LEVEL):
            features = layers.Conv2D(depth, 3, padding="same", activation="relu", kernel_initializer="he_normal")(
                features
            )
            if batch_norm:
                features = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)(features)
        return layers.Dropout(dropout_rate)(features) if dropout else features

    image = tf.keras.Input((None, None, channels))
    features, skips = image, []
    for level in range(LEVELS):
        depth = baseline_feature_depth * 2**level
        features = convolve(features, depth, dropout=level > LEVELS - DROPOUT_LEVELS)  # (N, H/2^l, W/2^l, 2^l F)
        skips.append(features)
        features = layers.MaxPooling2D(2)(features)
    features = convolve(features, baseline_feature_depth * 2**LEVELS, dropout=True)  # (N, H/16, W/16, 16 F)
    for level in reversed(range(LEVELS)):
        depth = baseline_feature_depth * 2**level
        # Kernel and stride both 2: each output pixel comes from one input pixel, which adds nothing to the radius.
        features = layers.Conv2DTranspose(depth, 2, strides=2)(features)
        features = layers.Concatenate()([skips[level], features])
        features = convolve(features, depth, dropout=False)  # (N, H/2^l, W/2^l, 2^l F)
    logits = layers.Conv2D(number_classes, 1)(features)  # (N, H, W, classes)
    logits = layers.Activation("linear", dtype="float32")(logits)
    return tf.keras.Model(image, logits)


def per_pixel_loss(masks: "tf.Tensor", logits: "tf.Tensor") -> "tf.Tensor":
    """Return the cross-entropy of each pixel.

    Parameters
    ----------
    masks : tensor of integers, shape (N, H, W)
        Class ids.
    logits : tensor of float32, shape (N, H, W, classes)

    Returns
    -------
    tensor of float32, shape (N, H, W)
    """
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(masks, tf.int32), logits)


def confusion_matrix(masks: "tf.Tensor", logits: "tf.Tensor", weights: "tf.Tensor", number_classes: int) -> "tf.Tensor":
    """Count the pixels of each pair of true and predicted class.

    Parameters
    ----------
    masks : tensor of integers, shape (N, H, W)
    logits : tensor of float32, shape (N, H, W, classes)
    weights : tensor of float32, shape (N,)
        Images of weight 0 do not count.
    number_classes : int

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
    model : callable returning a keras.Model
        Called inside the strategy's scope, such as ``lambda: build_unet(1, 2)``.
    number_classes : int
    learning_rate : float

    Attributes
    ----------
    model : keras.Model
    optimizer : keras.optimizers.Adam
    num_replicas : int
        Devices that share a global batch.
    """

    def __init__(self, strategy: Any, model: Any, number_classes: int, learning_rate: float) -> None:
        self._strategy, self._number_classes = strategy, number_classes
        self.num_replicas: int = strategy.num_replicas_in_sync
        with strategy.scope():
            self.model = model()
            self.optimizer = tf.keras.optimizers.Adam(learning_rate)
            # Slots made later, inside the traced step, fail under a strategy (keras-team/keras#23085).
            self.optimizer.build(self.model.trainable_variables)

    def distribute(self, reader: Any) -> Any:
        """Return an endless iterator over global batches: one batch of the reader for each replica."""
        return iter(self._strategy.distribute_datasets_from_function(lambda context: reader.get_tf_dataset()))

    @tf.function
    def train_step(self, batch: Any) -> "tf.Tensor":
        """Take one optimizer step on a global batch (an item of `distribute`); return the batch's mean loss."""
        losses = self._strategy.run(self._train_replica, args=batch)
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    @tf.function
    def test_step(self, batch: Any) -> tuple["tf.Tensor", "tf.Tensor"]:
        """Return the sum of the mean losses of a global batch's images, and the confusion matrix of their pixels."""
        losses, confusions = self._strategy.run(self._test_replica, args=batch)
        reduce = self._strategy.reduce
        return (
            reduce(tf.distribute.ReduceOp.SUM, losses, axis=None),
            reduce(tf.distribute.ReduceOp.SUM, confusions, axis=None),
        )

    def _train_replica(self, images: "tf.Tensor", masks: "tf.Tensor", weights: "tf.Tensor") -> "tf.Tensor":
        """Take a step on one replica's batch; the gradients of all replicas are summed by the optimizer."""
        with tf.GradientTape() as tape:
            pixel_losses = per_pixel_loss(masks, self.model(images, training=True))
            # Each replica divides by the pixels of the global batch, so that the sum over replicas is the mean.
            loss = tf.reduce_mean(pixel_losses) / self.num_replicas
        variables = self.model.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    def _test_replica(
        self, images: "tf.Tensor", masks: "tf.Tensor", weights: "tf.Tensor"
    ) -> tuple["tf.Tensor", "tf.Tensor"]:
        """Evaluate one replica's batch."""
        logits = self.model(images, training=False)
        image_losses = tf.reduce_mean(per_pixel_loss(masks, logits), axis=[1, 2])
        return tf.reduce_sum(image_losses * weights), confusion_matrix(masks, logits, weights, self._number_classes)


def score_confusion(confusion: np.ndarray) -> dict[str, Any]:
    """Turn a confusion matrix into figures.

    Parameters
    ----------
    confusion : ndarray of integers, shape (classes, classes)
        Rows are true classes, columns predicted ones.

    Returns
    -------
    dict
        ``accuracy`` (float), ``iou`` and ``dice`` (ndarray of float64, shape (classes,)); NaN for a class that neither
        truth nor prediction holds.
    """
    hits = np.diag(confusion).astype(np.float64)
    sizes = confusion.sum(0) + confusion.sum(1)  # of truth and prediction together
    with np.errstate(invalid="ignore"):
        return {"accuracy": hits.sum() / confusion.sum(), "iou": hits / (sizes - hits), "dice": 2 * hits / sizes}


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
    channels = model.input_shape[-1]

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, channels], tf.float32, name="image")])
    def predict(image: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        return {"softmax": tf.nn.softmax(tf.cast(model(image, training=False), tf.float32))}

    folder = Path(folder)
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tf.saved_model.save(model, os.fspath(new), signatures={"serving_default": predict})
    (new / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
