"""Augmentation of one image and its mask: draw the parameters once, then apply them to both.

Owns `sample_transformation`, which draws a `Transformation`, and `apply_transformation`, which carries it out.
Reflection, rotation, jitter and scale become one affine map about the image centre, so that pixels are interpolated
once only: bilinear in the image, nearest neighbour in the mask (a class id is never a mean of two others). What would
lie outside is filled by reflection about the border pixels.
"""

from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Transformation:
    """Parameters of one augmentation; the defaults change nothing.

    Attributes
    ----------
    reflect_rows, reflect_columns : bool
        Mirror top to bottom, left to right.
    rotation : float
        Radians.
    jitter_rows, jitter_columns : float
        Shift in pixels, positive towards higher indices.
    scale_rows, scale_columns : float
        Magnification, 1 for none.
    blur_sigma : float
        Standard deviation of the Gaussian blur in pixels, no blur unless positive.
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
) -> Transformation:
    """Draw the parameters of one augmentation.

    Parameters
    ----------
    rng : numpy.random.Generator
    height, width : int
        Size of the image in pixels.
    reflection_flag : bool
        Mirror each axis with probability 0.5.
    rotation_flag : bool
        Rotate by an angle uniform over the circle.
    jitter_augmentation_severity : float
        Shift each axis uniformly within this fraction of its size.
    noise_augmentation_severity : float
        Largest noise standard deviation as a fraction of the image's range; uniform from 0.
    scale_augmentation_severity : float
        Magnify each axis uniformly within ``1 - severity .. 1 + severity``; below 1.
    blur_max_sigma : float
        Blur sigma uniform in ``-blur_max_sigma .. blur_max_sigma`` pixels; half of all images stay sharp.
    intensity_augmentation_severity : float
        Shift by a constant uniform within this fraction of the image's range.

    Returns
    -------
    Transformation
        The same number of draws is made whatever the limits are, so that switching one transformation off leaves
        the others as they were.
    """
    reflect = rng.random(2) < 0.5
    turn = rng.random()
    jitter = rng.uniform(-1, 1, 2) * jitter_augmentation_severity * (height, width)
    scale = 1 + rng.uniform(-1, 1, 2) * scale_augmentation_severity
    noise_sigma = rng.random() * noise_augmentation_severity
    blur_sigma = rng.uniform(-1, 1) * blur_max_sigma
    intensity_shift = rng.uniform(-1, 1) * intensity_augmentation_severity
    return Transformation(
        reflect_rows=bool(reflection_flag and reflect[0]),
        reflect_columns=bool(reflection_flag and reflect[1]),
        rotation=2 * np.pi * turn if rotation_flag else 0.0,
        jitter_rows=float(jitter[0]),
        jitter_columns=float(jitter[1]),
        scale_rows=float(scale[0]),
        scale_columns=float(scale[1]),
        blur_sigma=max(blur_sigma, 0.0),
        noise_sigma=noise_sigma,
        intensity_shift=intensity_shift,
    )


def inverse_affine(transformation: Transformation, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the map from output to input pixels.

    Parameters
    ----------
    transformation : Transformation
    height, width : int
        Size of the image in pixels.

    Returns
    -------
    matrix : ndarray of float64, shape (2, 2)
    offset : ndarray of float64, shape (2,)
        Input (row, column) = ``matrix @ (row, column) + offset``. The image is reflected, then scaled, then rotated
        about its centre, then shifted.
    """
    t = transformation
    cosine, sine = np.cos(t.rotation), np.sin(t.rotation)
    magnify = np.array([t.scale_rows, t.scale_columns]) * np.where([t.reflect_rows, t.reflect_columns], -1, 1)
    rotate_back = np.array([[cosine, -sine], [sine, cosine]])  # inverse of [[cosine, sine], [-sine, cosine]]
    matrix = rotate_back / magnify[:, None]
    centre = (np.array([height, width]) - 1) / 2
    return matrix, centre - matrix @ (centre + (t.jitter_rows, t.jitter_columns))


def apply_transformation(
    transformation: Transformation, image: np.ndarray, mask: np.ndarray, rng: Optional[np.random.Generator] = None
) -> tuple[np.ndarray, np.ndarray]:
    """Apply one transformation to an image and its mask.

    Parameters
    ----------
    transformation : Transformation
    image : ndarray, shape (H, W, C)
        Any real dtype.
    mask : ndarray, shape (H, W)
        Class ids.
    rng : numpy.random.Generator, optional
        Source of the noise; needed where `noise_sigma` is positive.

    Returns
    -------
    image : ndarray of float32, shape (H, W, C)
        A new array in the units of the input.
    mask : ndarray, shape (H, W)
        A new array of the mask's dtype, or the same one where geometry stays as it is.

    Notes
    -----
    The order is that of a microscope: geometry, then blur (optics), then noise and offset (camera). Noise and shift
    are fractions of the range (maximum minus minimum over all channels) of the image as it came in.
    """
    t = transformation
    source = image.astype(np.float32)
    value_range = float(source.max() - source.min()) if t.noise_sigma > 0 or t.intensity_shift else 0.0
    result, mask = _warp(t, source, mask)
    if t.blur_sigma > 0:
        for channel in range(result.shape[2]):
            ndimage.gaussian_filter(result[..., channel], t.blur_sigma, output=result[..., channel], mode="mirror")
    if t.noise_sigma > 0:
        if rng is None:
            raise ValueError("noise needs a random generator")
        result += rng.standard_normal(result.shape, np.float32) * np.float32(t.noise_sigma * value_range)
    if t.intensity_shift:
        result += np.float32(t.intensity_shift * value_range)
    return result, mask


def _warp(t: Transformation, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resample a float32 image and its mask through the affine map, if there is anything to move."""
    height, width = mask.shape
    matrix, offset = inverse_affine(t, height, width)
    if np.array_equal(matrix, np.eye(2)) and not offset.any():
        return image, mask
    warped = np.empty_like(image)
    for channel in range(image.shape[2]):
        ndimage.affine_transform(
            image[..., channel], matrix, offset, output=warped[..., channel], order=1, mode="mirror", prefilter=False
        )
    return warped, ndimage.affine_transform(mask, matrix, offset, order=0, mode="mirror", prefilter=False)
