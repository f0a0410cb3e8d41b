from dataclasses import replace

import numpy as np
import pytest
import skimage.transform
from conftest import make_pair
from scipy import ndimage, stats

from augment import Augmenter, Transformation, gaussian_kernel, inverse_affine, sample_transformation

LIMITS = {
    "reflection_flag": True,
    "rotation_flag": True,
    "jitter_augmentation_severity": 0.1,
    "noise_augmentation_severity": 0.02,
    "scale_augmentation_severity": 0.1,
    "blur_max_sigma": 2,
    "intensity_augmentation_severity": 0.05,
}
GEOMETRY = {
    name: LIMITS[name]
    for name in ("reflection_flag", "rotation_flag", "jitter_augmentation_severity", "scale_augmentation_severity")
}
IMAGE = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
MASK = np.arange(12, dtype=np.uint8).reshape(3, 4)


def apply_transformation(transformation, image, mask, rng=None):
    return Augmenter(image.shape, mask.dtype).apply(transformation, image, mask, rng)


def test_no_transformation_changes_nothing():
    image, mask = apply_transformation(Transformation(), IMAGE, MASK)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(mask, MASK)


@pytest.mark.parametrize(
    "transformation, expected",
    [
        (Transformation(reflect_rows=True), MASK[::-1]),
        (Transformation(reflect_columns=True), MASK[:, ::-1]),
        (Transformation(rotation=np.pi), MASK[::-1, ::-1]),
        (Transformation(jitter_rows=1), [[4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]),
        (Transformation(jitter_columns=-1), [[1, 2, 3, 2], [5, 6, 7, 6], [9, 10, 11, 10]]),
    ],
)
def test_each_geometric_transformation_gives_the_pixels_written_out(transformation, expected):
    image, mask = apply_transformation(transformation, IMAGE, MASK)
    np.testing.assert_allclose(image[..., 0], expected, atol=1e-5)
    np.testing.assert_array_equal(mask, expected)


def test_a_quarter_turn_equals_rot90():
    square = np.arange(25, dtype=np.float32).reshape(5, 5, 1)
    image, mask = apply_transformation(Transformation(rotation=np.pi / 2), square, square[..., 0].astype(np.uint8))
    assert any(np.allclose(image[..., 0], np.rot90(square[..., 0], turns), atol=1e-4) for turns in (1, 3))
    np.testing.assert_array_equal(mask, np.rint(image[..., 0]))


@pytest.mark.parametrize("scale_rows, scale_columns", [(2, 1.5), (1, 1.3), (1.07, 1)])
def test_scale_magnifies_about_the_centre(scale_rows, scale_columns):
    image, mask = make_pair(5, (41, 60, 1), "float32")
    result, _ = apply_transformation(Transformation(scale_rows=scale_rows, scale_columns=scale_columns), image, mask)
    rows, columns = ((np.arange(n) - (n - 1) / 2) / s + (n - 1) / 2 for n, s in ((41, scale_rows), (60, scale_columns)))
    along = np.stack([np.interp(columns, np.arange(60), row) for row in image[..., 0]])
    expected = np.stack([np.interp(rows, np.arange(41), column) for column in along.T], axis=1)
    np.testing.assert_allclose(result[..., 0], expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(80, 96, 3), (300, 250, 1), (16, 512, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_the_composed_warp_agrees_with_scipy_over_the_entire_image(shape, seed):
    """Cover several blocks of rows, and pixels beyond the border, where both reflect."""
    image, mask = make_pair(seed, shape, "float32", classes=5)
    t = sample_transformation(np.random.default_rng(seed), *shape[:2], **GEOMETRY)
    matrix, offset = inverse_affine(t, *shape[:2])
    got_image, got_mask = apply_transformation(t, image, mask)
    for channel in range(shape[2]):
        expected = ndimage.affine_transform(
            image[..., channel].astype(np.float64), matrix, offset, order=1, mode="mirror", prefilter=False
        )
        np.testing.assert_allclose(got_image[..., channel], expected, atol=2e-6 * np.ptp(image) + 1e-6 * image.max())
    expected_mask = ndimage.affine_transform(mask, matrix, offset, order=0, mode="mirror", prefilter=False)
    source = np.tensordot(matrix, np.mgrid[: shape[0], : shape[1]], 1) + offset[:, None, None]
    decided = (np.abs(source % 1 - 0.5) > 1e-5).all(0)  # elsewhere two pixels are equally near, up to rounding
    assert decided.mean() > 0.999
    np.testing.assert_array_equal(got_mask[decided], expected_mask[decided])


def test_the_composed_warp_agrees_with_skimage_inside_the_border():
    image, mask = make_pair(0, (80, 96, 3), "float32")
    t = Transformation(True, False, 0.7, 3.3, -5.1, 1.07, 0.93)
    matrix, offset = inverse_affine(t, 80, 96)
    homogeneous = np.eye(3)  # skimage maps (column, row)
    homogeneous[:2, :2], homogeneous[:2, 2] = matrix[::-1, ::-1], offset[::-1]
    inverse = skimage.transform.AffineTransform(matrix=homogeneous)
    got_image, got_mask = apply_transformation(t, image, mask)
    expected = skimage.transform.warp(image.astype(np.float64), inverse, order=1, mode="reflect")
    rows, columns = np.mgrid[:80, :96]
    source = np.tensordot(matrix, np.stack([rows, columns]), 1) + offset[:, None, None]
    inside = (source[0] > 1) & (source[0] < 78) & (source[1] > 1) & (source[1] < 94)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(got_image[inside], expected[inside], atol=2e-4)
    nearest = np.rint(source).astype(int)
    np.testing.assert_array_equal(got_mask[inside], mask[nearest[0][inside], nearest[1][inside]])


def test_a_shift_by_several_images_is_still_reflected():
    far = Transformation(jitter_rows=3 * 2 * (IMAGE.shape[0] - 1) + 1)  # a reflected image repeats after 2 (size - 1)
    near = Transformation(jitter_rows=1)
    np.testing.assert_allclose(apply_transformation(far, IMAGE, MASK)[0], apply_transformation(near, IMAGE, MASK)[0])
    np.testing.assert_array_equal(apply_transformation(far, IMAGE, MASK)[1], apply_transformation(near, IMAGE, MASK)[1])


def test_an_augmenter_forgets_the_image_before():
    augmenter, rng = Augmenter((64, 80, 2), np.uint8), np.random.default_rng(0)
    for seed in range(6):
        image, mask = make_pair(seed, (64, 80, 2))
        t = sample_transformation(rng, 64, 80, **LIMITS)
        results = [
            each.apply(t, image, mask, np.random.default_rng(seed))
            for each in (augmenter, Augmenter((64, 80, 2), "u1"))
        ]
        for one, other in zip(*results):
            np.testing.assert_array_equal(one, other)


def test_a_class_id_is_never_mixed_from_others():
    mask = np.where(make_pair(1)[1], 200, 3).astype(np.uint8)
    for seed in range(10):
        t = sample_transformation(np.random.default_rng(seed), 64, 64, **LIMITS)
        warped = apply_transformation(t, mask[..., None], mask, np.random.default_rng(0))[1]
        assert set(np.unique(warped)) <= {3, 200} and warped.dtype == np.uint8


@pytest.mark.parametrize("shape", [(64, 64, 2), (100, 75, 1), (16, 33, 1), (5, 200, 1)])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.5, 2.0, 9.0])
def test_blur_is_that_of_scipy_in_each_channel_alone(shape, sigma):
    image, mask = make_pair(2, shape, "float32")
    result, same = apply_transformation(Transformation(blur_sigma=sigma), image, mask)
    for channel in range(shape[2]):
        expected = ndimage.gaussian_filter(image[..., channel].astype(np.float64), sigma, mode="mirror")
        np.testing.assert_allclose(result[..., channel], expected, rtol=1e-5)
    np.testing.assert_array_equal(same, mask)


def test_the_blur_of_a_point_is_the_kernel_written_out():
    image = np.zeros((9, 9, 1), np.float32)
    image[4, 4] = 1
    result, _ = apply_transformation(Transformation(blur_sigma=0.5), image, np.zeros((9, 9), np.uint8))
    weights = np.array([np.exp(-8.0), np.exp(-2.0), 1, np.exp(-2.0), np.exp(-8.0)])
    weights /= weights.sum()
    np.testing.assert_allclose(gaussian_kernel(0.5), weights)
    np.testing.assert_allclose(result[2:7, 2:7, 0], np.outer(weights, weights), rtol=1e-6)


def draw_noise(seed, shape=(512, 512, 2)):
    """Return the noise that is added to an image of range 1000 at 2 % of its range."""
    image = np.zeros(shape, np.float32)
    image[0, 0] = 1000
    result, _ = apply_transformation(
        Transformation(noise_sigma=0.02), image, np.zeros(shape[:2], np.uint8), np.random.default_rng(seed)
    )
    return (result - image).astype(np.float64)


def test_noise_is_gaussian_with_the_asked_deviation_of_the_range():
    noise = draw_noise(1).ravel()
    sample_error = 1 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 5 * 20 * sample_error
    assert noise.std() == pytest.approx(20, rel=5 * sample_error)
    standard = noise / noise.std()
    assert np.mean(standard**3) == pytest.approx(0, abs=5 * np.sqrt(6) * sample_error)
    assert np.mean(standard**4) == pytest.approx(3, abs=5 * np.sqrt(24) * sample_error)
    assert stats.kstest(noise, "norm", (0, 20)).pvalue > 1e-3
    assert np.abs(standard).max() > 4


def test_noise_differs_between_pixels_channels_and_images():
    noise = draw_noise(1)
    size = noise[..., 0].size
    others = [noise[..., 1], draw_noise(2)[..., 0]]
    others += [np.roll(noise[..., 0], shift, axis) for shift in (1, 7, 128, 256) for axis in (0, 1)]
    for other in others:
        assert abs(np.corrcoef(noise[..., 0].ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(size)
    np.testing.assert_array_equal(draw_noise(1), noise)


def test_noise_without_random_numbers_is_an_error():
    with pytest.raises(ValueError, match="random generator"):
        apply_transformation(Transformation(noise_sigma=0.1), IMAGE, MASK)


def test_intensity_shifts_by_a_fraction_of_the_range():
    result, _ = apply_transformation(Transformation(intensity_shift=0.5), IMAGE, MASK)
    np.testing.assert_allclose(result, IMAGE + 5.5)


def test_the_input_is_not_changed():
    image, mask = make_pair(3, dtype="float32")
    before = image.copy(), mask.copy()
    t = sample_transformation(np.random.default_rng(0), 64, 64, **LIMITS)
    apply_transformation(t, image, mask, np.random.default_rng(0))
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_sampled_parameters_fill_their_ranges():
    drawn = [sample_transformation(np.random.default_rng(seed), 100, 200, **LIMITS) for seed in range(2000)]
    for name, low, high in [
        ("rotation", 0, 2 * np.pi),
        ("jitter_rows", -10, 10),
        ("jitter_columns", -20, 20),
        ("scale_rows", 0.9, 1.1),
        ("scale_columns", 0.9, 1.1),
        ("noise_sigma", 0, 0.02),
        ("blur_sigma", 0, 2),
        ("intensity_shift", -0.05, 0.05),
    ]:
        values = np.array([getattr(t, name) for t in drawn])
        assert values.min() >= low and values.max() <= high, name
        assert values.min() == pytest.approx(low, abs=0.01 * (high - low)), name
        assert values.max() == pytest.approx(high, abs=0.01 * (high - low)), name
    assert np.mean([t.reflect_rows for t in drawn]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([t.reflect_columns for t in drawn]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([t.blur_sigma == 0 for t in drawn]) == pytest.approx(0.5, abs=0.05)


def test_all_limits_at_zero_give_the_identity():
    assert sample_transformation(np.random.default_rng(0), 64, 64) == Transformation()


@pytest.mark.parametrize(
    "probability, names",
    [
        ("rotation_probability", ["rotation"]),
        ("jitter_probability", ["jitter_rows", "jitter_columns"]),
        ("noise_probability", ["noise_sigma"]),
        ("scale_probability", ["scale_rows", "scale_columns"]),
        ("blur_probability", ["blur_sigma"]),
        ("intensity_probability", ["intensity_shift"]),
    ],
)
def test_an_image_gets_a_transformation_with_its_probability_and_the_others_as_before(probability, names):
    def draw(**more):
        return [sample_transformation(np.random.default_rng(seed), 100, 200, **LIMITS, **more) for seed in range(1000)]

    always, none = draw(), Transformation()
    without = [replace(t, **{name: getattr(none, name) for name in names}) for t in always]
    of_all = 0.5 if probability == "blur_probability" else 1.0  # half of the sigmas are below 0
    for share in (0.0, 0.3, 1.0):
        drawn = draw(**{probability: share})
        assert all(t in pair for t, *pair in zip(drawn, always, without))
        assert np.mean([t != other for t, other in zip(drawn, without)]) == pytest.approx(of_all * share, abs=0.05)
