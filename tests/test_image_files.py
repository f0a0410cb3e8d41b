import io
import re
import struct
import weakref
import zlib

import numpy as np
import pytest
import skimage.io
import tifffile
from conftest import STORED, make_pair, statistics_of, write_stored, z_score
from PIL import Image, ImageOps

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


# The stored pixels of an upright picture, for each orientation code of TIFF and EXIF.
STORED_FOR = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("code", STORED_FOR)
@pytest.mark.parametrize("name", ["a.tif", "tiled.tif", "a.png", "a.jpg"])
def test_pictures_are_upright_whatever_their_orientation(tmp_path, code, name):
    upright = np.arange(48 * 80).reshape(48, 80) // 16 % 256
    upright = np.stack([upright, 255 - upright, upright // 2], -1).astype(np.uint8)
    stored = np.ascontiguousarray(STORED_FOR[code](upright))
    path = tmp_path / name
    if name.endswith("tif"):
        options = {"tile": (32, 16)} if name == "tiled.tif" else {}
        tifffile.imwrite(path, stored, photometric="rgb", extratags=[(274, "H", 1, code, True)], **options)
    else:
        exif = Image.Exif()
        exif[274] = code
        Image.fromarray(stored).save(path, exif=exif, quality=100, subsampling=0)
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(Image.open(path))).shape, upright.shape)
    with ImageFile(path) as file:
        plan = windows_of(upright.shape, (31, 37), 5)
        assert file.shape == upright.shape and file.stored_size == stored.shape[:2]
        assert any("turned upright" in note for note in file.notes) == (code > 1)
        for (rows, columns), got in zip(plan, file.windows(plan)):
            np.testing.assert_allclose(got.astype(int), upright[rows, columns], atol=6 * (name == "a.jpg"))
            row, column, block = file.stored_block(rows.start, columns.start, upright[rows, columns])
            place = slice(row, row + block.shape[0]), slice(column, column + block.shape[1])
            np.testing.assert_array_equal(block, stored[place])


@pytest.mark.parametrize("dtype, white", [("bool", True), ("uint8", 255), ("uint16", 65535)])
def test_an_image_that_counts_from_white_is_as_viewers_show_it_and_a_mask_as_it_is_stored(tmp_path, dtype, white):
    stored = make_pair(0, (40, 50, 1), "uint16")[0][..., 0].astype(dtype)
    stored[:9] = 0
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    expected = ~stored if dtype == "bool" else white - stored
    with ImageFile(tmp_path / "a.tif") as image, ImageFile(tmp_path / "a.tif", as_mask=True) as mask:
        np.testing.assert_array_equal(next(image.windows([image.extent]))[..., 0], expected)
        np.testing.assert_array_equal(next(mask.windows([mask.extent]))[..., 0], stored)
        assert "inverted" in image.notes[0] and "as stored" in mask.notes[0]


def test_twelve_bits_that_count_from_white_do_so_from_4095(tmp_path):
    stored = np.arange(64 * 32, dtype=np.uint16).reshape(64, 32)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite", rowsperstrip=64, compression="zlib")
    bits = np.unpackbits(stored.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    packed = zlib.compress(np.packbits(bits).tobytes())
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        page = tif.pages[0]
        tif.filehandle.seek(page.dataoffsets[0])
        tif.filehandle.write(packed)
        page.tags["StripByteCounts"].overwrite(len(packed))
        page.tags["BitsPerSample"].overwrite(12)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], 4095 - stored)


@pytest.mark.parametrize("photometric, noted", [("separated", "SEPARATED"), ("cielab", "CIELAB"), ("minisblack", None)])
def test_colors_that_are_not_what_they_seem_are_reported(tmp_path, photometric, noted):
    samples = 4 if photometric == "separated" else 3
    image = np.random.default_rng(0).integers(0, 255, (20, 30, samples)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric=photometric, planarconfig="contig")
    with ImageFile(tmp_path / "a.tif") as file:
        assert [noted in note for note in file.notes] == [True] * (noted is not None)
        np.testing.assert_array_equal(next(file.windows([file.extent])), image)


@pytest.mark.parametrize("content", ["TIFF", "PNG", "JPEG"])
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_what_a_file_contains_counts_and_not_what_it_is_called(tmp_path, name, content):
    image = np.linspace(0, 255, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / name, format=content)
    with ImageFile(tmp_path / name) as file:
        np.testing.assert_allclose(next(file.windows([file.extent])).astype(int), image, atol=12 * (content == "JPEG"))
        assert file.lossy == ("JPEG" if content == "JPEG" else "")


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"RIFF1234WEBP", b"BM12"]
)
def test_other_formats_are_refused_and_no_decoder_is_tried(tmp_path, content, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    (tmp_path / "a.png").write_bytes(content + b"\0" * 200)
    with pytest.raises(InputError, match=r"a\.png: expected a TIFF, PNG or JPEG, found another format"):
        ImageFile(tmp_path / "a.png")


LOSSY = ["jpeg", "webp", "jpeg2000", "jpegxl", "jpegxr", "lerc"]


@pytest.mark.parametrize("compression", [*LOSSY, "zlib", "zstd", "lzma"])
def test_encodings_that_may_change_values_are_known(tmp_path, compression):
    image = make_pair(0, (40, 50, 3), "uint8")[0]
    try:
        tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", compression=compression)
    except (ValueError, ImportError) as error:
        pytest.skip(f"this imagecodecs cannot write it: {error}")
    with ImageFile(tmp_path / "a.tif") as file:
        assert bool(file.lossy) == (compression in LOSSY)


def png_of(array, *chunks, **options):
    """Return a PNG of an array with additional chunks (kind and content) before its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    content = buffer.getvalue()
    more = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    start = content.index(b"IDAT") - 4
    return content[:start] + more + content[start:]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("as_mask", [False, True])
def test_a_transparent_color_adds_no_channel_and_is_reported(tmp_path, dtype, as_mask):
    gray = make_pair(0, (20, 30, 1), dtype)[0][..., 0]
    (tmp_path / "a.png").write_bytes(png_of(gray, (b"tRNS", struct.pack(">H", int(gray[0, 0])))))
    with ImageFile(tmp_path / "a.png", as_mask=as_mask) as file:
        np.testing.assert_array_equal(next(file.windows([file.extent]))[..., 0], gray)
        assert "transparent" in file.notes[0]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("palette", [False, True])
def test_masks_of_few_bits_are_what_is_stored(tmp_path, bits, palette):
    ids = np.random.default_rng(0).integers(0, 2**bits, (21, 30)).astype(np.uint8)
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette(bytes(range(3 * 2**bits)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", bits=bits)
    content = buffer.getvalue()
    if not palette:  # the same bits, declared as gray
        content = bytes(image_files._rewritten_png(content, as_gray=True))
    (tmp_path / "a.png").write_bytes(content)
    assert content[24:26] == bytes([bits, 3 if palette else 0])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", as_mask=True)[..., 0], ids)


def test_each_changed_bit_of_a_png_is_noticed(tmp_path):
    image = make_pair(0, (60, 70, 3), "uint8")[0]
    content, rng = png_of(image), np.random.default_rng(0)
    for place in rng.integers(8, len(content) - 12, 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.png"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize("height, width", [(2 * 10**9, 2 * 10**9), (60000, 60000)])
def test_a_png_that_cannot_contain_what_its_header_declares_is_refused_at_once(tmp_path, height, width):
    content = bytearray(png_of(np.zeros((4, 4), np.uint8)))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.png: its header claims {height} x {width} pixels.*too small"):
        ImageFile(tmp_path / "a.png")


def test_an_image_that_does_not_fit_into_memory_is_refused_by_name(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((400, 500), np.uint8), compression="zlib", rowsperstrip=400)
    monkeypatch.setattr(image_files, "MEMORY_CHECK_BYTES", 0)
    monkeypatch.setattr(image_files, "free_host_memory", lambda: 200_000)
    ImageFile(tmp_path / "a.tif").close()
    monkeypatch.setattr(image_files, "free_host_memory", lambda: 199_999)
    with pytest.raises(InputError, match=r"a\.tif .*takes 0\.0 GiB of memory, found 0\.0 GiB free"):
        ImageFile(tmp_path / "a.tif")


@pytest.mark.parametrize("other, subfiletype", [((25, 30), 0), ((25, 30), 1), ((104, 130), 4)])
@pytest.mark.parametrize("first", [True, False])
def test_the_largest_image_of_a_tiff_that_is_no_copy_is_taken(tmp_path, other, subfiletype, first):
    """The other one is a small image, a reduced copy, or a mask with a margin."""
    pages = [(other, subfiletype), ((100, 120), 0)] if first else [((100, 120), 0), (other, subfiletype)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for size, _ in pages:
            writer.write(np.full(size, size[0], np.uint16), subfiletype=1, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        for page, (_, kind) in zip(tif.pages, pages):
            page.tags["NewSubfileType"].overwrite(kind)
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.shape[:2] == (100, 120) and (next(file.windows([file.extent])) == 100).all()


def test_several_images_in_a_file_are_reported(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for size in ((25, 30), (100, 120)):
            writer.write(np.zeros(size, np.uint16), metadata=None)
    with ImageFile(tmp_path / "a.tif") as file:
        assert file.notes == ("the largest of 2 images in the file is used",)


def test_a_pyramid_is_its_full_resolution(tmp_path):
    full = make_pair(0, (128, 160, 1), "uint16")[0][..., 0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(full, subifds=1, tile=(32, 32))
        writer.write(full[::2, ::2], subfiletype=1, tile=(32, 32))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], full)


@pytest.mark.parametrize("axis", ["C", "T", "Z"])
def test_a_file_of_a_set_is_one_image_and_the_others_are_not_opened(tmp_path, axis):
    names = [f"s{index}.ome.tif" for index in range(3)]
    sizes = {name: 3 if name == axis else 1 for name in "CTZ"}
    data = "".join(
        f'<TiffData IFD="0" PlaneCount="1" First{axis}="{index}">'
        f'<UUID FileName="{name}">urn:uuid:{index}</UUID></TiffData>'
        for index, name in enumerate(names)
    )
    for index, name in enumerate(names):
        text = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{index}">'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="30" SizeY="20" '
            f'SizeC="{sizes["C"]}" SizeZ="{sizes["Z"]}" SizeT="{sizes["T"]}">{data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / name, np.full((20, 30), index, np.uint16), description=text, metadata=None)
    (tmp_path / names[2]).write_bytes(b"no image")
    for index in range(2):
        with ImageFile(tmp_path / names[index]) as file:
            assert file.shape == (20, 30, 1)
            assert (next(file.windows([file.extent])) == index).all()


def test_pages_that_nothing_calls_channels_are_not_taken_for_channels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for index in range(5):
            writer.write(np.full((20, 30), index, np.uint8), metadata=None)
    with pytest.raises(InputError, match=r"a\.tif, found 5 pages without axes"):
        read_image(tmp_path / "a.tif", size=(20, 30))


@pytest.mark.parametrize("tables", ["StripOffsets", "StripByteCounts", "TileOffsets", "TileByteCounts"])
def test_a_tiff_that_lists_too_few_parts_is_refused(tmp_path, tables):
    options = {"tile": (32, 32)} if tables.startswith("Tile") else {"rowsperstrip": 10}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((60, 70), np.uint16), compression="zlib", **options)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tag = tif.pages[0].tags[tables]
        tag.overwrite(tag.value[:-2])
    with pytest.raises(InputError, match=r"a\.tif: it lists \d of the 6 strips or tiles"):
        ImageFile(tmp_path / "a.tif")


def test_a_stack_of_planes_is_refused_with_its_axes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 32, 32), np.uint8), imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match="ZYX"):
        read_image(tmp_path / "a.tif")


def windows_of(shape, size, overlap):
    """Return overlapping windows of a given size that cover an image, row by row."""
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


def test_a_large_file_that_must_be_read_completely_is_noted(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(image_files, "MEMORY_CHECK_BYTES", 100_000)
    monkeypatch.setattr(image_files, "LARGE_IMAGE_BYTES", 100_000)
    for kind, noted in (("one compressed strip", True), ("strips", False), ("contiguous", False)):
        write_stored(tmp_path / "a.tif", np.ones((150, 130, 3), np.uint16), kind)
        caplog.clear()
        read_image(tmp_path / "a.tif")
        assert ("can only be read in one piece" in caplog.text) == noted


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


@pytest.mark.parametrize("value", [np.inf, -np.inf, -3.4e38, 2e16])
def test_pixels_that_cannot_be_computed_with_are_refused(tmp_path, value):
    image = make_pair(0, (40, 40, 2), "float32")[0]
    image[7, 8, 1] = value
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig")
    found = re.escape(f"--image_no_data={float(image[7, 8, 1])}")
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
        ("float64", 1e12, 3),
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


def test_a_pixel_is_normalized_to_the_same_bits_whatever_its_position_and_integer_type():
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


@pytest.mark.parametrize(
    "lost, words",
    [
        ("BitsPerSample", "longer than its size and pixel type allow"),  # a TIFF without it has 1 bit
        ("SamplesPerPixel", "tag 258 is damaged or missing"),
        ("StripByteCounts", "no table of the strip or tile lengths"),
        ("StripOffsets", "cannot read"),
    ],
)
def test_a_tiff_that_has_lost_a_tag_is_refused(tmp_path, lost, words):
    image = make_pair(0, (40, 30, 3), "uint8")[0]
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", rowsperstrip=10)
    read_image(tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place = file.pages[0].tags[lost].offset
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[place : place + 2] = (60000).to_bytes(2, "little")  # an unknown code
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_image(tmp_path / "a.tif")


# A tag consists of its code, its type, the number of its values (from byte 4 on) and its value (from byte 8 on).
@pytest.mark.parametrize(
    "tag, byte, value",
    [
        ("BitsPerSample", 0, 1),  # another tag; a TIFF without this one has 1 bit
        ("BitsPerSample", 2, 19),  # an unknown type
        ("BitsPerSample", 4, 17),  # 17 samples
        ("Compression", 5, 7),  # values far beyond the end of the file
        ("PlanarConfiguration", 8, 33),
        ("ImageWidth", 8, 29),
        ("ImageLength", 8, 9),
    ],
)
@pytest.mark.parametrize(
    "compression, rows", [("lzw", 10), ("zlib", 10), ("packbits", 10), ("lzma", 10), ("zlib", 40), ("packbits", 40)]
)
def test_a_damaged_tag_of_a_tiff_is_noticed(tmp_path, tag, byte, value, compression, rows):
    image, path = make_pair(0, (40, 30, 3), "uint8")[0], tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", rowsperstrip=rows, compression=compression)
    np.testing.assert_array_equal(read_image(path), image)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        content[file.pages[0].tags[tag].offset + byte] = value
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tif"):
        read_image(path)


def test_a_jpeg_of_one_bit_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", make_pair(0, (40, 32, 1), "uint8")[0][..., 0], compression="jpeg")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags["BitsPerSample"].overwrite(1)
    with pytest.raises(InputError, match="1 bits per sample"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd"])
@pytest.mark.parametrize("layout", [{"rowsperstrip": 16}, {"tile": (32, 32)}])
def test_no_damaged_tag_changes_pixels_that_another_reader_refuses(tmp_path, compression, layout):
    image, rng = make_pair(0, (64, 72, 3), "uint8")[0], np.random.default_rng(0)
    file, path = io.BytesIO(), tmp_path / "a.tif"
    tifffile.imwrite(file, image, photometric="rgb", compression=compression, **layout)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tif:
        places = [
            tag.offset + byte
            for tag in tif.pages[0].tags
            if tag.name != "PhotometricInterpretation"
            for byte in range(12)
        ]
    refused = 0
    for place in places:
        content = bytearray(file.getvalue())
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            found = read_image(path)
        except InputError:
            refused += 1
            continue
        if found.shape != image.shape or (found != image).any():
            with Image.open(path) as other:
                other.load()
    assert refused > len(places) // 4


def test_strips_in_the_header_of_a_tiff_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", make_pair(0)[0][..., 0], rowsperstrip=16, compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        tag = file.pages[0].tags["StripOffsets"]
        tag.overwrite([0, *tag.value[1:]])
    with pytest.raises(InputError, match="lie in its header"):
        read_image(tmp_path / "a.tif")


def geo_tags(model_type, unit, scale=(0.5, 0.25, 0.0), transformation=None):
    """Return the tags of a GeoTIFF whose coordinate system has a given type and unit."""
    keys = (1, 1, 0, 2, 1024, 0, 1, model_type, 3076, 0, 1, unit)
    tags = [(34735, "H", len(keys), keys, True)]
    if transformation is not None:
        return [*tags, (34264, "d", 16, tuple(np.ravel(transformation)), True)]
    return [*tags, (33550, "d", 3, scale, True)]


ROTATED = [[0.3, -0.8, 0, 7], [0.4, 0.6, 0, 9], [0, 0, 0, 0], [0, 0, 0, 1]]  # steps of 0.5 and 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}, (0.25, 0.5, "µm")),
        ({"imagej": True, "resolution": (2, 4), "metadata": {"unit": "um"}}, (0.25, 0.5, "µm")),
        ({"imagej": True, "resolution": (2, 4), "metadata": {"unit": "\\u00B5m"}}, (0.25, 0.5, "µm")),
        ({"imagej": True, "resolution": (2, 4), "metadata": {"unit": "pixel"}}, None),
        ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}}, (0.25, 0.5, "µm")),
        (
            {
                "ome": True,
                "metadata": {
                    "axes": "YX", "PhysicalSizeX": 5, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 4,
                    "PhysicalSizeYUnit": "nm",
                },
            },
            (4, 5, "nm"),
        ),
        ({"extratags": geo_tags(1, 9001)}, (0.25, 0.5, "m")),
        ({"extratags": geo_tags(1, 9001, transformation=ROTATED)}, (1, 0.5, "m")),
        ({"extratags": geo_tags(2, 9001)}, None),
        ({"extratags": geo_tags(1, 9999)}, None),
        ({"extratags": geo_tags(1, 9001, scale=(0.0, 1.0, 0.0))}, None),
    ],
)  # fmt: skip
def test_the_size_of_pixels_is_what_the_file_declares(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((32, 48), np.uint8), **options)
    with ImageFile(tmp_path / "a.tif") as image:
        found = image.pixel_size
    assert found == (None if expected is None else expected)
