"""Measure the milliseconds of each augmentation operation, and of the same operation in scipy and scikit-image.

python tests/benchmarks/augment_operations.py
"""

import time

import numpy as np
import skimage.transform
from common import CASES, finish, machine, make_parser, random_pair, summarize, synthetic_database
from scipy import ndimage

from augment import Augmenter, Transformation, inverse_affine, sample_transformation
from cli import positive_int
from image_files import ChannelStatistics, normalize
from imagereader import ImageReader

ROTATION = 1.0  # radians; far from the axes, so that neighbors are far apart in memory
WARP = Transformation(rotation=ROTATION, jitter_rows=3.2, jitter_columns=-7.7, scale_rows=1.1, scale_columns=0.9)
BLUR_SIGMA = 1.0  # pixels; the mean sigma of the augmentations that blur


def scipy_warp(image, mask):
    """Warp each channel and the mask as a user of scipy would."""
    matrix, offset = inverse_affine(WARP, *mask.shape)
    for channel in range(image.shape[2]):
        plane = image[..., channel].astype(np.float32)
        ndimage.affine_transform(plane, matrix, offset, order=1, mode="mirror", prefilter=False)
    ndimage.affine_transform(mask, matrix, offset, order=0, mode="mirror", prefilter=False)


def skimage_warp(image, mask):
    """Warp each channel and the mask as a user of scikit-image would."""
    matrix, offset = inverse_affine(WARP, *mask.shape)
    homogeneous = np.eye(3)  # maps (column, row)
    homogeneous[:2, :2], homogeneous[:2, 2] = matrix[::-1, ::-1], offset[::-1]
    inverse = skimage.transform.AffineTransform(matrix=homogeneous)
    for channel in range(image.shape[2]):
        skimage.transform.warp(image[..., channel].astype(np.float32), inverse, order=1, mode="reflect")
    skimage.transform.warp(mask, inverse, order=0, mode="reflect", preserve_range=True)


def scipy_blur(image):
    """Blur each channel."""
    for channel in range(image.shape[2]):
        ndimage.gaussian_filter(image[..., channel].astype(np.float32), BLUR_SIGMA, mode="mirror")


def float64_z_score(image):
    """Normalize with the plain formula in float64."""
    wide = image.astype(np.float64)
    return ((wide - wide.mean((0, 1))) / wide.std((0, 1))).astype(np.float32)


def operations(case):
    """Return the name, the suite's call and the peers' calls (by name) of each operation on a case."""
    rng = np.random.default_rng(0)
    image, mask = random_pair(rng, case)
    augmenter = Augmenter(image.shape, mask.dtype)
    out = np.empty(image.shape, np.float32)
    with synthetic_database(case, count=1) as database:
        limits = ImageReader(database).augmentation_limits

    def apply(transformation):
        return augmenter.apply(transformation, image, mask, rng)[0]

    statistics = ChannelStatistics.measure([image])

    def normalized(target):
        return normalize(image, statistics.mean, statistics.deviation, out=target)

    def whole_recipe():
        source = normalized(augmenter.buffer)
        np.copyto(out, augmenter.apply(sample_transformation(rng, *mask.shape, **limits), source, mask, rng)[0])

    return [
        ("copy to float32", lambda: apply(Transformation()), {}),
        ("mirror", lambda: apply(Transformation(reflect_rows=True, reflect_columns=True)), {}),
        ("warp", lambda: apply(WARP), {
            "scipy": lambda: scipy_warp(image, mask), "skimage": lambda: skimage_warp(image, mask)}),
        ("blur", lambda: apply(Transformation(blur_sigma=BLUR_SIGMA)), {"scipy": lambda: scipy_blur(image)}),
        ("noise", lambda: apply(Transformation(noise_sigma=0.02)), {
            "standard_normal": lambda: image + rng.standard_normal(image.shape, np.float32)}),
        ("normalize", lambda: normalized(out), {"float64": lambda: float64_z_score(image)}),
        ("full recipe", whole_recipe, {}),
    ]  # fmt: skip


def median_milliseconds(work, runs):
    """Return the median, least and greatest time of a call in milliseconds."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return summarize([1000 * value for value in seconds])


def main():
    """Measure every operation and print the table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, help="SIZE:CHANNELS:DTYPE of the images")
    parser.add_argument("--runs", type=positive_int, default=51, help="number of calls; the median counts")
    args = parser.parse_args()
    lines = []
    if not args.json:
        print(machine())
    for case in args.cases:
        for name, work, peers in operations(case):
            line = {"case": case, "operation": name, "milliseconds": median_milliseconds(work, args.runs)}
            line["peers"] = {peer: median_milliseconds(call, args.runs) for peer, call in peers.items()}
            lines.append(line)
            if not args.json:
                others = "".join(f"   {peer} {figures['median']:.2f}" for peer, figures in line["peers"].items())
                print(f"{case:13} {name:16} {line['milliseconds']['median']:7.3f} ms{others}")
    finish({"lines": lines}, args.json)


if __name__ == "__main__":
    main()
