"""Augmentation of one image and its mask: draw the parameters once, then apply them to both.

`sample_transformation` draws a `Transformation`, and `Augmenter` applies it. Reflection, rotation, jitter and scale
form one affine map about the image center, so that pixels are interpolated only once. Interpolation is bilinear in the
image and nearest-neighbor in the mask, so that a class id is never the mean of two others. Pixels outside the image are
filled by reflection about the border pixels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import DTypeLike

BLOCK_PIXELS = 2**16  # processed together, so that a few float32 buffers of this size stay in the processor's cache
BLUR_BLOCK = 32  # rows or columns that one matrix product blurs
BLUR_TRUNCATE = 4.0  # radius of the blur kernel in sigmas, as in scipy.ndimage.gaussian_filter
NOISE_STRETCHES = 2**20  # number of different stretches of a noise pool


@dataclass(frozen=True)
class Transformation:
    """Parameters of one augmentation; the defaults change nothing.

    Attributes
    ----------
    reflect_rows, reflect_columns : bool
        Mirror top to bottom, left to right.
    rotation : float
        Angle in radians.
    jitter_rows, jitter_columns : float
        Shift in pixels, positive toward higher indices.
    scale_rows, scale_columns : float
        Magnification, 1 for none.
    blur_sigma : float
        Standard deviation of the Gaussian blur in pixels; no blur unless positive.
    noise_sigma : float
        Standard deviation of the added Gaussian noise, as a fraction of the image's range.
    intensity_shift : float
        Added constant, as a fraction of the image's range.
    """

    reflect_rows: bool = False
    reflect_columns: bool = False
    rotation: float = 0.0
    jitter_rows: float = 0.0
    jitter_columns: float = 0.0
    scale_rows: float = 1.0
    scale_columns: float = 1.0
    blur_sigma: float = 0.0
    noise_sigma: float = 0.0
    intensity_shift: float = 0.0

    @property
    def is_mirror(self) -> bool:
        """Whether the geometry is at most a reflection, which needs no interpolation."""
        geometry = (self.rotation, self.jitter_rows, self.jitter_columns, self.scale_rows, self.scale_columns)
        return geometry == (0, 0, 0, 1, 1)


def sample_transformation(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    reflection_flag: bool = False,
    rotation_flag: bool = False,
    jitter_augmentation_severity: float = 0.0,
    noise_augmentation_severity: float = 0.0,
    scale_augmentation_severity: float = 0.0,
    blur_max_sigma: float = 0.0,
    intensity_augmentation_severity: float = 0.0,
    rotation_probability: float = 1.0,
    jitter_probability: float = 1.0,
    noise_probability: float = 1.0,
    scale_probability: float = 1.0,
    blur_probability: float = 1.0,
    intensity_probability: float = 1.0,
) -> Transformation:
    """Draw the parameters of one augmentation.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the sixteen draws.
    height, width : int
        Size of the image in pixels.
    reflection_flag : bool
        Mirror each axis with probability 0.5.
    rotation_flag : bool
        Rotate by an angle drawn uniformly from the full circle.
    jitter_augmentation_severity : float
        Shift each axis uniformly within this fraction of its size.
    noise_augmentation_severity : float
        Largest noise standard deviation as a fraction of the image's range; uniform from 0.
    scale_augmentation_severity : float
        Magnify each axis uniformly within ``1 - severity .. 1 + severity``; must be below 1.
    blur_max_sigma : float
        Blur sigma uniform in ``-blur_max_sigma .. blur_max_sigma`` pixels; half of all images stay sharp.
    intensity_augmentation_severity : float
        Add a constant drawn uniformly within this fraction of the image's range.
    rotation_probability, jitter_probability, noise_probability, scale_probability : float
        Fraction of images that are transformed in this way.
    blur_probability, intensity_probability : float
        Same as above.

    Returns
    -------
    Transformation
        The number of draws does not depend on the limits, so that turning off one transformation leaves the others
        unchanged.
    """
    draws = rng.random(16).tolist()
    reflect_rows, reflect_columns, turn, noise = draws[:4]
    jitter_rows, jitter_columns, scale_rows, scale_columns, blur, shift = (2 * draw - 1 for draw in draws[4:10])
    probabilities = (
        rotation_probability, jitter_probability, noise_probability, scale_probability, blur_probability,
        intensity_probability,
    )  # fmt: skip
    rotates, jitters, adds_noise, scales, blurs, shifts = (
        float(draw < probability) for draw, probability in zip(draws[10:], probabilities)
    )
    jitter, scale = jitters * jitter_augmentation_severity, scales * scale_augmentation_severity
    return Transformation(
        reflect_rows=reflection_flag and reflect_rows < 0.5,
        reflect_columns=reflection_flag and reflect_columns < 0.5,
        rotation=rotates * 2 * math.pi * turn if rotation_flag else 0.0,
        jitter_rows=jitter_rows * jitter * height,
        jitter_columns=jitter_columns * jitter * width,
        scale_rows=1 + scale_rows * scale,
        scale_columns=1 + scale_columns * scale,
        blur_sigma=blurs * max(blur * blur_max_sigma, 0.0),
        noise_sigma=adds_noise * noise * noise_augmentation_severity,
        intensity_shift=shifts * shift * intensity_augmentation_severity,
    )


def inverse_affine(transformation: Transformation, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the map from output to input pixels.

    Parameters
    ----------
    transformation : Transformation
        Only its geometry is used.
    height, width : int
        Size of the image in pixels.

    Returns
    -------
    matrix : ndarray of float64, shape (2, 2)
        Rotation, magnification and reflection.
    offset : ndarray of float64, shape (2,)
        Input (row, column) = ``matrix @ (row, column) + offset``. The image is reflected, then scaled, then rotated
        about its center, then shifted.
    """
    t = transformation
    cosine, sine = math.cos(t.rotation), math.sin(t.rotation)
    magnify_rows = -t.scale_rows if t.reflect_rows else t.scale_rows
    magnify_columns = -t.scale_columns if t.reflect_columns else t.scale_columns
    # The inverse of the rotation [[cosine, sine], [-sine, cosine]], then of the magnification.
    matrix = np.array(
        [[cosine / magnify_rows, -sine / magnify_rows], [sine / magnify_columns, cosine / magnify_columns]]
    )
    center = np.array([(height - 1) / 2, (width - 1) / 2])
    return matrix, center - matrix @ (center + (t.jitter_rows, t.jitter_columns))


class _Map(NamedTuple):
    """The affine map in fixed-point numbers with `bits` binary digits after the point.

    The source position (row, column) of pixel (i, j) is ``row_terms[:, i] + column_terms[:, j]``. `last` is the last
    row and column, of shape (2, 1, 1). `beyond` is True if some position lies outside the image, and `far_beyond` is
    True if a single reflection does not bring it inside.
    """

    row_terms: np.ndarray
    column_terms: np.ndarray
    bits: int
    last: np.ndarray
    beyond: bool
    far_beyond: bool


class Augmenter:
    """Applies transformations to images of one shape, in buffers that it allocates once.

    Parameters
    ----------
    image_shape : (int, int, int)
        Height, width, channels.
    mask_dtype : dtype
        Type of the masks that `apply` returns; it must represent every class id.

    Attributes
    ----------
    buffer : ndarray of float32, shape (H, W, C)
        Memory in which an image may be prepared for `apply`, which overwrites it.

    Notes
    -----
    The source position of a pixel and the weights of its four neighbors there are computed once for the mask and all
    channels. Positions are 32-bit fixed-point numbers, so that additions, shifts and bit masks replace several
    floating-point passes for rounding, splitting and reflecting. A block of `BLOCK_PIXELS` goes through all steps
    before the next block.
    """

    def __init__(self, image_shape: tuple[int, int, int], mask_dtype: DTypeLike) -> None:
        height, width, channels = image_shape
        self._height, self._width = height, width
        self._block_rows = min(height, max(1, BLOCK_PIXELS // width))
        block = self._block_rows * width
        # One more row and column, because the neighbors of the last ones have weight 0 but are read. If the width is a
        # power of two, the odd stride also keeps the pixels of a column from competing for the same few cache lines.
        self._padded_source = np.zeros((channels, height + 1, width + 1), np.float32)
        self._source = self._padded_source[:, :height, :width]
        self._padded_mask = np.zeros((height + 1, width + 1), mask_dtype)
        self._source_mask = self._padded_mask[:height, :width]
        self._result = np.empty((channels, height, width), np.float32)
        self.buffer = np.moveaxis(self._result, 0, 2)
        self._result_mask = np.empty((height, width), mask_dtype)
        self._half_blurred = np.empty((height, width), np.float32)
        self._position = np.empty((2, self._block_rows, width), np.int32)
        self._integers = np.empty((2, self._block_rows, width), np.int32)
        self._fraction = np.empty((2, self._block_rows, width), np.float32)
        self._index = np.empty(block, np.intp)
        self._values = np.empty((3, block), np.float32)
        # Two pools of normal random numbers; each channel gets the sum of one stretch from each pool.
        self._noise = np.random.default_rng(0).standard_normal((2, height * width + NOISE_STRETCHES), np.float32)
        self._noise *= np.float32(0.5**0.5)

    def apply(
        self,
        transformation: Transformation,
        image: np.ndarray,
        mask: np.ndarray,
        rng: Optional[np.random.Generator] = None,
        missing: Optional[np.ndarray] = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Apply one transformation to an image and its mask.

        Parameters
        ----------
        transformation : Transformation
            What to do.
        image : ndarray, shape (H, W, C)
            Any real dtype; converted to float32, which represents whole numbers up to 2**24 exactly.
        mask : ndarray, shape (H, W)
            Class ids.
        rng : numpy.random.Generator, optional
            Source of the noise; needed if `noise_sigma` is positive.
        missing : ndarray of bool, shape (H, W, C), optional
            Pixels without data. They move like mask pixels and are 0 in the result.

        Returns
        -------
        image : ndarray of float32, shape (H, W, C)
            In the units of the input.
        mask : ndarray, shape (H, W)
            Like `image`, a view of a buffer that the next call overwrites.

        Notes
        -----
        The steps have the same order as in a microscope: geometry, then blur (optics), then noise and shift (camera).
        Noise and shift are fractions of the range (maximum minus minimum over all channels) of the input image.
        """
        t = transformation
        np.copyto(self._source, np.moveaxis(image, 2, 0), casting="unsafe")
        np.copyto(self._source_mask, mask, casting="unsafe")
        value_range = float(image.max()) - float(image.min()) if t.noise_sigma > 0 or t.intensity_shift else 0.0
        nearest = [(self._padded_mask, self._result_mask)]
        if missing is not None:
            nearest += self._planes_of(missing)
        if t.is_mirror:
            mirrored = np.s_[..., :: -1 if t.reflect_rows else 1, :: -1 if t.reflect_columns else 1]
            np.copyto(self._result, self._source[mirrored])
            for source, result in nearest:
                np.copyto(result, source[: self._height, : self._width][mirrored])
        else:
            self._warp(t, nearest)
        if t.blur_sigma > 0:
            self._blur(t.blur_sigma)
        if t.noise_sigma > 0:
            if rng is None:
                raise ValueError("noise needs a random generator")
            self._add_noise(t.noise_sigma * value_range, rng)
        if t.intensity_shift:
            self._result += np.float32(t.intensity_shift * value_range)
        for plane, (_, without_data) in zip(self._result, nearest[1:]):
            plane[without_data] = 0
        return np.moveaxis(self._result, 0, 2), self._result_mask

    def _planes_of(self, missing: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return a padded source, like the mask's, and an uninitialized result for each channel of an array."""
        height, width, channels = missing.shape
        sources = np.zeros((channels, height + 1, width + 1), bool)
        sources[:, :height, :width] = np.moveaxis(missing, 2, 0)
        return list(zip(sources, np.empty((channels, height, width), bool)))

    # ------------------------------------------------------------------ geometry

    def _warp(self, transformation: Transformation, nearest: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Resample the image through the affine map, and padded sources into their results without interpolation."""
        affine = self._fixed_point_map(*inverse_affine(transformation, self._height, self._width))
        for first in range(0, self._height, self._block_rows):
            rows = slice(first, min(first + self._block_rows, self._height))
            position = self._locate(affine, rows)
            self._take_nearest(affine.bits, position, [(source, result[rows]) for source, result in nearest])
            self._interpolate(affine.bits, position, self._result[:, rows])

    def _fixed_point_map(self, matrix: np.ndarray, offset: np.ndarray) -> _Map:
        row_terms = matrix[:, :1] * np.arange(self._height) + offset[:, None]
        column_terms = matrix[:, 1:] * np.arange(self._width)
        lowest = row_terms.min(1) + column_terms.min(1)
        highest = row_terms.max(1) + column_terms.max(1)
        last = np.array([self._height - 1, self._width - 1])
        reach = np.maximum(np.abs(lowest), np.maximum(highest, last))
        bits = 30 - int(reach.max() + 1).bit_length()
        return _Map(
            row_terms=np.rint(row_terms * 2**bits).astype(np.int32),
            column_terms=np.rint(column_terms * 2**bits).astype(np.int32),
            bits=bits,
            last=(last << bits).astype(np.int32)[:, None, None],
            beyond=bool((lowest < 0).any() or (highest > last).any()),
            far_beyond=bool((reach > 2 * last).any()),
        )

    def _locate(self, affine: _Map, rows: slice) -> np.ndarray:
        """Return the source position of each pixel of some rows, reflected into the image if it lies outside."""
        position, mirrored = (buffer[:, : rows.stop - rows.start] for buffer in (self._position, self._integers))
        np.add(affine.row_terms[:, rows, None], affine.column_terms[:, None], out=position)
        if affine.far_beyond:
            np.remainder(position, np.maximum(2 * affine.last, 1), out=position)
        if affine.beyond:
            np.abs(position, out=position)  # reflects about the first pixel
            np.subtract(2 * affine.last, position, out=mirrored)
            np.minimum(position, mirrored, out=position)  # reflects about the last one
        return position

    def _flat_index(self, integers: np.ndarray) -> np.ndarray:
        """Turn rows and columns, shape (2, rows, W), into indices of a flat padded image; `integers` is overwritten."""
        row, column = integers
        np.multiply(row, self._width + 1, out=row)
        np.add(row, column, out=row)
        index = self._index[: row.size]
        np.copyto(index.reshape(row.shape), row)  # np.take would make its own copy of any other integer type
        return index

    def _take_nearest(self, bits: int, position: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Fill rows of results with the nearest pixels of their padded sources."""
        nearest = self._integers[:, : position.shape[1]]
        np.add(position, 1 << (bits - 1), out=nearest)
        np.right_shift(nearest, bits, out=nearest)
        index = self._flat_index(nearest)
        for source, result in pairs:
            # All indices are valid. Modes other than the default write into `out` without an intermediate buffer.
            np.take(source.reshape(-1), index, out=result.reshape(-1), mode="wrap")

    def _interpolate(self, bits: int, position: np.ndarray, results: np.ndarray) -> None:
        """Fill rows of all channels by bilinear interpolation of four neighbors; `position` is overwritten."""
        integers, fraction = (buffer[:, : results.shape[1]] for buffer in (self._integers, self._fraction))
        np.bitwise_and(position, (1 << bits) - 1, out=integers)
        np.copyto(fraction, integers, casting="unsafe")
        np.multiply(fraction, np.float32(2.0**-bits), out=fraction)
        np.right_shift(position, bits, out=position)
        index = self._flat_index(position)
        down, right = fraction.reshape(2, -1)
        here, below, other = self._values[:, : index.size]
        for plane, result in zip(self._padded_source, results):
            source, lower = plane.reshape(-1), plane[1:].reshape(-1)
            np.take(source, index, out=here, mode="wrap")
            np.take(source[1:], index, out=other, mode="wrap")
            _blend(here, other, right, out=here)
            np.take(lower, index, out=below, mode="wrap")
            np.take(lower[1:], index, out=other, mode="wrap")
            _blend(below, other, right, out=below)
            _blend(here, below, down, out=result.reshape(-1))

    # ------------------------------------------------------------------ blur and noise

    def _blur(self, sigma: float) -> None:
        """Blur each channel by products with banded matrices, first down the columns, then along the rows."""
        kernel = gaussian_kernel(sigma)
        down = blur_operator(kernel, self._height)
        along = down if self._width == self._height else blur_operator(kernel, self._width)
        for plane in self._result:
            for source, target, weights in down:
                np.matmul(weights, plane[source], out=self._half_blurred[target])
            for source, target, weights in along:
                np.matmul(self._half_blurred[:, source], weights.T, out=plane[:, target])

    def _add_noise(self, sigma: float, rng: np.random.Generator) -> None:
        """Add white Gaussian noise.

        Drawing a new normal number for each pixel would take longer than everything else together. The sum of two
        stretches of stored normal numbers is Gaussian, too. Within a channel no stored number is used twice, and with
        about 1e12 pairs of stretches it is unlikely that two images get the same noise.
        """
        pixels, block = self._height * self._width, self._index.size
        for plane in self._result.reshape(-1, pixels):
            one, other = (
                pool[start : start + pixels] for pool, start in zip(self._noise, rng.integers(0, NOISE_STRETCHES, 2))
            )
            for first in range(0, pixels, block):
                part = slice(first, min(first + block, pixels))
                noise = self._values[0, : part.stop - first]
                np.add(one[part], other[part], out=noise)
                np.multiply(noise, np.float32(sigma), out=noise)
                np.add(plane[part], noise, out=plane[part])


def _blend(start: np.ndarray, end: np.ndarray, fraction: np.ndarray, out: np.ndarray) -> None:
    """Write ``start + fraction * (end - start)`` into `out`; `end` is overwritten."""
    np.subtract(end, start, out=end)
    np.multiply(end, fraction, out=end)
    np.add(start, end, out=out)


def gaussian_kernel(sigma: float) -> np.ndarray:
    """Return the weights of a Gaussian at integer pixel distances, float64 of odd length, normalized to a sum of 1."""
    radius = int(BLUR_TRUNCATE * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def blur_operator(kernel: np.ndarray, size: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Return a convolution along an axis as products with small matrices.

    Parameters
    ----------
    kernel : ndarray, shape (2 * radius + 1,)
        Weights of the neighbors, from `gaussian_kernel`.
    size : int
        Length of the axis in pixels; the image is extended by reflection about its border pixels.

    Returns
    -------
    list of (slice, slice, ndarray of float32)
        For each block of pixels: its inputs, its outputs, and the weights, of shape (outputs, inputs).
    """
    radius = len(kernel) // 2
    inputs = np.arange(-radius, size + radius) % max(2 * (size - 1), 1)
    inputs = np.minimum(inputs, 2 * (size - 1) - inputs)  # output i and weight j use the pixel inputs[i + j]
    blocks = []
    matrices: dict[tuple[int, int, int], np.ndarray] = {}  # all blocks away from the borders share one
    for first in range(0, size, BLUR_BLOCK):
        stop = min(first + BLUR_BLOCK, size)
        low, high = max(first - radius, 0), min(stop + radius, size)
        key = (stop - first, first - low, high - stop)
        if key not in matrices:
            shape = (stop - first, high - low)
            outputs = np.arange(stop - first)[:, None]
            flat = outputs * shape[1] + inputs[first + outputs + np.arange(len(kernel))] - low
            weights = np.broadcast_to(kernel, flat.shape)  # if reflections overlap, weights add up
            matrix = np.bincount(flat.ravel(), weights.ravel(), shape[0] * shape[1])
            matrices[key] = matrix.reshape(shape).astype(np.float32)
        blocks.append((slice(low, high), slice(first, stop), matrices[key]))
    return blocks
