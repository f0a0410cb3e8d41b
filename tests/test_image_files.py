import re
import weakref

import numpy as np
import pytest
import skimage.io
import tifffile
from conftest import STORED, make_pair, statistics_of, write_stored, z_score
from PIL import Image

import image_files
from cli import InputError
from image_files import ChannelStatistics, ImageFile, UnusablePixels, displayable, normalize, read_image


@pytest.mark.parametrize(
    "shape, options",
    [
        ((20, 30), {}),
        ((20, 30, 3), {}),
        ((20, 30, 13), {"planarconfig": "contig", "photometric": "minisblack"}),
        ((3, 20, 30), {"planarconfig": "separate", "photometric": "rgb"}),
        ((5, 20, 30), {"metadata": {"axes": "CYX"}}),
        ((5, 20, 30), {}),
        ((20, 30, 5), {}),
        ((5, 20, 30), {"imagej": True}),
    ],
)
def test_a_tiff_comes_as_rows_columns_channels(tmp_path, shape, options):
    array = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    expected = array[..., None] if array.ndim == 2 else array if shape[:2] == (20, 30) else np.moveaxis(array, 0, 2)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", size=(20, 30)), expected)


def test_the_size_of_the_mask_decides_where_unnamed_channels_are(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (17, 16, 18)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert read_image(tmp_path / "a.tif", size=(16, 18)).shape == (16, 18, 17)
    assert read_image(tmp_path / "a.tif", size=(17, 16)).shape == (17, 16, 18)
    assert read_image(tmp_path / "a.tif", channels=17).shape == (16, 18, 17)


def test_png_keeps_sixteen_bits_in_gray_and_color(tmp_path):
    import imagecodecs

    for shape in ((20, 30), (20, 30, 3)):
        array = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), array.reshape(20, 30, -1))


def test_jpg_is_read(tmp_path):
    array = np.repeat(np.linspace(0, 255, 32).astype(np.uint8), 96).reshape(32, 32, 3)
    skimage.io.imsave(tmp_path / "a.jpg", array)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), array, atol=4)


def test_a_palette_gives_the_colors_of_an_image_and_the_indices_of_a_mask(tmp_path):
    ids, colors = np.arange(24, dtype=np.uint8).reshape(4, 6), np.arange(72, dtype=np.uint8)[::-1].reshape(24, 3)
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette(colors.tobytes())
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[ids])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", as_mask=True)[..., 0], ids)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("content", [b"", b"not an image at all", None])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    if content is None:
        skimage.io.imsave(tmp_path / name, make_pair(0, (64, 64, 3), "uint8")[0], check_contrast=False)
        content = (tmp_path / name).read_bytes()
        content = content[: len(content) // 3]
    (tmp_path / name).write_bytes(content)
    if name == "a.jpg" and len(content) > 100:
        pytest.skip("a JPEG decoder may return what it has")
    with pytest.raises(InputError, match=name):
        read_image(tmp_path / name)


def test_a_stack_of_planes_is_refused_with_its_axes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 32, 32), np.uint8), imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match="ZYX"):
        read_image(tmp_path / "a.tif")


def windows_of(shape, size, overlap):
    """Return windows of a size, row by row, that cover an image and overlap."""
    starts = [range(0, max(length - overlap, 1), edge - overlap) for length, edge in zip(shape, size)]
    return [
        (slice(row, min(row + size[0], shape[0])), slice(column, min(column + size[1], shape[1])))
        for row in starts[0]
        for column in starts[1]
    ]


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("size, overlap", [((150, 130), 0), ((40, 50), 13), ((1, 130), 0), ((64, 70), 60)])
def test_windows_are_the_same_however_a_file_is_stored_and_read(tmp_path, kind, size, overlap):
    image = np.random.default_rng(0).integers(0, 60000, (150, 130, 3)).astype(np.uint16)
    write_stored(tmp_path / "a.tif", image, kind)
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.shape == image.shape and file.dtype == np.uint16 and file.dtype.isnative
        plan = windows_of(image.shape, size, overlap)
        windows = list(file.windows(plan))
        assert len(windows) == len(plan)
        for window, got in zip(plan, windows):
            assert got.dtype == np.uint16
            np.testing.assert_array_equal(got, image[window])


def test_a_large_file_that_must_be_read_whole_is_noted(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(image_files, "LARGE_IMAGE_BYTES", 100_000)
    for kind, noted in (("one compressed strip", True), ("strips", False), ("contiguous", False)):
        write_stored(tmp_path / "a.tif", np.ones((150, 130, 3), np.uint16), kind)
        caplog.clear()
        read_image(tmp_path / "a.tif")
        assert ("can only be read whole" in caplog.text) == noted


@pytest.mark.parametrize("kind", ["strips", "LZW tiles", "planar tiles", "OME"])
def test_each_part_of_a_file_is_decoded_once_and_let_go_after_its_last_window(tmp_path, kind, monkeypatch):
    image = np.random.default_rng(0).integers(0, 60000, (150, 130, 3)).astype(np.uint16)
    write_stored(tmp_path / "a.tif", image, kind)
    decoded, held = set(), []
    decode, from_row = image_files._SegmentedTiff._decode, image_files.DecodedSegment.from_row

    def watch(segment):
        segment = segment._replace(pixels=segment.pixels.copy())
        held.append(weakref.ref(segment.pixels))
        return segment

    def watched_decode(self, number, index):
        assert (number, index) not in decoded
        decoded.add((number, index))
        return watch(decode(self, number, index))

    monkeypatch.setattr(image_files._SegmentedTiff, "_decode", watched_decode)
    monkeypatch.setattr(image_files.DecodedSegment, "from_row", lambda self, row: watch(from_row(self, row)))
    with ImageFile(tmp_path / "a.tif") as file:
        plan, (segment_rows, segment_columns) = windows_of(image.shape, (60, 50), 20), file._source._segment_shape
        for (rows, columns), _ in zip(plan, file.windows(plan)):
            if columns.stop == 130:
                width = -(-130 // segment_columns) * segment_columns
                below = -(-rows.stop // segment_rows) * segment_rows - (rows.stop - 20)
                bytes_held = sum(array().nbytes for array in held if array() is not None)
                assert bytes_held <= below * width * 3 * 2 and (bytes_held == 0) == (rows.stop == 150)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert len(decoded) == sum(len(page.dataoffsets) for page in tif.pages)


def test_tiles_that_a_file_leaves_out_are_empty(tmp_path):
    tile = np.full((32, 32), 7, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", iter([tile, None, None, tile]), shape=(50, 60), dtype=np.uint16, tile=(32, 32))
    expected = np.zeros((50, 60, 1), np.uint16)
    expected[:32, :32] = expected[32:, 32:] = 7
    with ImageFile(tmp_path / "a.tif") as file:
        assert file._source._segment_shape == (32, 32)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_tiles_are_decoded(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 255, (150, 130, channels)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image.squeeze(), tile=(64, 48), compression="jpeg")
    expected = tifffile.imread(tmp_path / "a.tif").reshape(image.shape)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("compression", [6, 7, 33007, 34892])
def test_every_kind_of_jpeg_strip_has_the_tables_of_its_page_and_counts_as_lossy(tmp_path, compression):
    image = np.random.default_rng(0).integers(0, 255, (400, 300, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.tif", compression="jpeg")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        assert tif.pages[0].jpegtables and len(tif.pages[0].dataoffsets) > 1
        tif.pages[0].tags["Compression"].overwrite(compression)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), tifffile.imread(tmp_path / "a.tif"))
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.lossy


@pytest.mark.parametrize("kind", [kind for kind in STORED if kind not in ("contiguous",)])
def test_a_tiff_that_ends_early_is_refused_by_name_when_it_is_opened(tmp_path, kind):
    write_stored(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 60000, (150, 130, 3)).astype(np.uint16), kind)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        ends = [sum(pair) for page in tif.pages for pair in zip(page.dataoffsets, page.databytecounts)]
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: max(ends) - 10] if max(ends) > len(content) - 100 else content[:200])
    with pytest.raises(InputError, match=r"a\.tif"):
        ImageFile(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_streamed_statistics_agree_with_a_single_pass_in_float64(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(image_files, "STATISTICS_BLOCK_VALUES", 1000)  # many parts of a small image
    image = make_pair(0, (150, 130, 3), dtype)[0]
    if dtype != "uint8":
        image += np.array(10**7, dtype)
    if dtype == "float32":
        image[..., 1] = (image[..., 1] - 10**7) / 1000
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", rowsperstrip=11)
    wide = image.astype(np.float64)
    with ImageFile(tmp_path / "a.tif") as file:
        statistics = ChannelStatistics.of_file(file)
        np.testing.assert_allclose(statistics.mean, wide.mean((0, 1)), rtol=1e-13)
        np.testing.assert_allclose(statistics.deviation, wide.std((0, 1)), rtol=1e-9)
        np.testing.assert_array_equal(statistics.minimum, wide.min((0, 1)))
        np.testing.assert_array_equal(statistics.maximum, wide.max((0, 1)))
        np.testing.assert_array_equal(ChannelStatistics.of_file(file, image), statistics, "read before")


def test_statistics_are_the_same_to_the_bit_however_a_file_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "STATISTICS_BLOCK_VALUES", 5000)
    image = np.random.default_rng(0).integers(0, 60000, (150, 130, 3)).astype(np.uint16)
    found = []
    for kind in STORED:
        write_stored(tmp_path / "a.tif", image, kind)
        with ImageFile(tmp_path / "a.tif") as file:
            found.append(ChannelStatistics.of_file(file))
    for statistics in found:
        np.testing.assert_array_equal(statistics, found[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4e38, 2e16])
def test_pixels_that_cannot_be_computed_with_are_refused(tmp_path, value):
    image = make_pair(0, (40, 40, 2), "float32")[0]
    image[7, 8, 1] = value
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig")
    found = re.escape(f"{value:g}") if np.isfinite(value) else "NaN or infinity"
    with ImageFile(tmp_path / "a.tif") as file, pytest.raises(UnusablePixels, match=rf"a\.tif, found .*{found}"):
        ChannelStatistics.of_file(file)


@pytest.mark.parametrize(
    "dtype, offset, deviation",
    [
        ("uint8", 100, 20),
        ("uint16", 60000, 5),
        ("int32", 10**9, 50),
        ("int32", 2**30 + 33, 3),
        ("float32", 1e7 + 0.4, 30),
    ],
)
@pytest.mark.parametrize("layout", ["interleaved", "planar", "part"])
def test_normalized_pixels_are_those_of_float64_also_far_from_zero(dtype, offset, deviation, layout):
    noise = np.random.default_rng(0).normal(0, deviation, (2, 300, 250)) * [[[1]], [[3]]]
    image = np.moveaxis((offset + noise).astype(dtype), 0, 2)
    mean, deviations = statistics_of(image)
    expected = z_score(image)
    if layout == "interleaved":
        image = np.ascontiguousarray(image)
    if layout == "part":
        image, expected = image[11:200, 7:100], expected[11:200, 7:100]
    out = np.full(image.shape, np.nan, np.float32)
    assert normalize(image, mean, deviations, out=out) is out
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_pixel_is_normalized_to_the_same_bits_wherever_it_lies_and_whatever_integer_holds_it():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (60, 50, 3)).astype(np.uint8)
    mean, deviation = np.array([99.97, 1 / 3, 1e4]), np.array([31.7, 0.2, 3.0])
    complete = normalize(image, mean, deviation, 1.0)
    np.testing.assert_array_equal(normalize(image[3:40, 7:31], mean, deviation, 1.0), complete[3:40, 7:31])
    for dtype in ("uint16", "int16", "int32", "float32"):
        np.testing.assert_array_equal(normalize(image.astype(dtype), mean, deviation, 1.0), complete)


@pytest.mark.parametrize("floor", [1.0, 0.02])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_deviation_below_its_floor_is_taken_for_the_floor(floor, factor):
    image = np.resize(np.array([5 - factor * floor, 5 + factor * floor], np.float32), (4, 4, 1))
    got = normalize(image, *statistics_of(image), [floor])
    assert got.std() == pytest.approx(min(factor, 1), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_an_image_is_displayed_in_gray_or_color_around_its_mean(channels):
    scores = np.linspace(-4, 4, 40 * channels).reshape(8, 5, channels)
    expected = scores if channels == 3 else scores.mean(axis=2)[..., None].repeat(3, axis=2)
    picture = displayable(scores)
    assert picture.dtype == np.uint8 and picture.shape == (8, 5, 3)
    np.testing.assert_allclose(picture, 255 * np.clip(0.5 + expected / 5, 0, 1), atol=1)
