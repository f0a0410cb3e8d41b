"""Image files: what formats there are, reading windows of them, and bringing their pixels to one scale.

Owns `ImageFile`, which decodes a TIFF, PNG or JPEG window by window and finds its channels, the normalization of
channels, and the one mapping from an image to something that can be displayed.
"""

import argparse
import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from cli import InputError, PathLike, Progress

IMAGE_FORMATS = {"tif": (".tif", ".tiff"), "png": (".png",), "jpg": (".jpg", ".jpeg")}

LARGE_IMAGE_BYTES = 2**30  # above which it is worth a note that a file can only be read in one piece
JPEG_COMPRESSIONS = (6, 7, 33007, 34892)  # TIFF tags of the encodings that keep tables outside of the segments
STATISTICS_BLOCK_VALUES = 2**20  # pixels times channels that are held as float64 to measure an image
MAX_MAGNITUDE = 1e16  # of a pixel; the network's float32 sums of squares overflow not far above
MEAN_TOLERANCE = 1e-6  # of a normalized channel's mean
DISPLAYED_DEVIATIONS = 2.5  # on each side of the mean, from black to white

Window = tuple[slice, slice]  # rows and columns of an image

# ---------------------------------------------------------------------------------------------- files and folders


def image_format(text: str) -> str:
    """Return the key of `IMAGE_FORMATS` that an extension stands for; the ``type`` of command-line options."""
    extension = f".{text.lower().lstrip('.')}"
    for name, extensions in IMAGE_FORMATS.items():
        if extension in extensions:
            return name
    raise argparse.ArgumentTypeError(f"expected tif, png or jpg, got {text!r}")


def list_images(folder: PathLike, image_format: str) -> list[Path]:
    """Return the images of one format in a folder, sorted by name.

    Parameters
    ----------
    folder : path
        Only its own files count, not those of folders in it.
    image_format : str
        A key of `IMAGE_FORMATS`; ``.tiff`` counts as tif, ``.jpeg`` as jpg, in any case.

    Raises
    ------
    InputError
        If the folder is missing or holds no such file.
    """
    suffixes = IMAGE_FORMATS[image_format]
    entries = list_files(folder)
    images = [path for path in entries if path.suffix.lower() in suffixes]
    if not images:
        types = ", ".join(sorted({path.suffix or "none" for path in entries}))
        folders = ", ".join(sorted(path.name for path in Path(folder).iterdir() if path.is_dir())[:4])
        raise InputError(
            f"expected {image_format} images in {folder}, found {len(entries)} files{types and f' of type {types}'}"
            f"{folders and f' and the folders {folders}'}; check the folder or set --image_format"
        )
    return images


def list_files(folder: PathLike) -> list[Path]:
    """Return the files in a folder that are not hidden, sorted by name.

    Raises
    ------
    InputError
        If the folder is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; check the path")
    with os.scandir(folder) as entries:  # which need not ask about each file, as a path would
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return [folder / name for name in sorted(names)]


def read_image(
    filepath: PathLike, size: Optional[tuple[int, int]] = None, channels: Optional[int] = None, as_mask: bool = False
) -> np.ndarray:
    """Read an image file; parameters and errors are those of `ImageFile`.

    Returns
    -------
    ndarray, shape (H, W, C)
        In the file's own pixel type.
    """
    with ImageFile(filepath, size, channels, as_mask) as image:
        return next(image.windows([image.extent]))


class ImageFile(contextlib.AbstractContextManager["ImageFile"]):
    """An image file that is decoded window by window, so that it may be larger than memory; a context manager.

    Parameters
    ----------
    filepath : path
        TIFF, PNG or JPEG, by its extension.
    size : (int, int), optional
        Height and width, where they are known (from the mask). They, or `channels`, tell where the channels are
        in a TIFF that does not say so.
    channels : int, optional
        Number of channels, where it is known (from the network).
    as_mask : bool
        Whether the pixels are class ids: those of a palette are its indices then, not its colors.

    Attributes
    ----------
    path : Path
    shape : (int, int, int)
        Height, width, channels.
    dtype : dtype
        The file's own pixel type, in native byte order.
    divisible : bool
        Whether a window can be had without decoding all of the file.
    lossy : bool
        Whether the file is or contains a JPEG, which has stray values.
    resolution : (float, float, int), optional
        A TIFF's pixels per unit along a row and along a column, and its code for the unit.

    Raises
    ------
    InputError
        If the file cannot be decoded or is no 2-D image with channels.
    """

    def __init__(
        self,
        filepath: PathLike,
        size: Optional[tuple[int, int]] = None,
        channels: Optional[int] = None,
        as_mask: bool = False,
    ) -> None:
        self.path = Path(filepath)
        self.resolution: Optional[tuple[float, float, int]] = None
        self.lossy = self.path.suffix.lower() in IMAGE_FORMATS["jpg"]
        self._open_file: Any = None  # a TiffFile
        self._channels: Optional[list[int]] = None
        with self._readable_errors():
            self._source = self._open(size, channels, as_mask)
        self.shape: tuple[int, int, int] = self._source.shape
        self.dtype = self._source.dtype
        self.divisible = not isinstance(self._source, _WholeImage)
        if not self.divisible and self.nbytes > LARGE_IMAGE_BYTES:
            logging.info(
                "%s can only be read whole, which takes %.1f GiB of memory; a tiled or uncompressed TIFF would not",
                self.path, self.nbytes / 2**30,
            )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded image."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def extent(self) -> Window:
        """The window that is the whole image."""
        return slice(0, self.shape[0]), slice(0, self.shape[1])

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        """Yield windows of the image in the order of a plan.

        Parameters
        ----------
        plan : sequence of (slice, slice)
            Rows and columns of each window, inside the image.

        Yields
        ------
        ndarray, shape (rows, columns, C)
            Not to be changed.

        Notes
        -----
        A strip or tile of the file is decoded once; what later windows need of it is held until the last of them. So
        the memory that overlapping windows take, row by row, is that of their overlap and of what the file's segments
        have below it.
        """
        with self._readable_errors():
            for window in self._source.windows(plan):
                yield window if self._channels is None else window[..., self._channels]

    def select_channels(self, channels: Sequence[int]) -> None:
        """Have the image consist of some of the file's channels, counted from 0.

        Raises
        ------
        InputError
            If the file has fewer.
        """
        if max(channels) >= self.shape[2]:
            raise InputError(f"expected at least {max(channels) + 1} channels in {self.path}, found {self.shape[2]}")
        self._channels = list(channels)
        height, width, _ = self.shape
        self.shape = height, width, len(channels)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._open_file is not None:
            self._open_file.close()

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self.close()

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn whatever a decoder raises into one line that names the file."""
        try:
            yield
        except InputError:
            self.close()
            raise
        except Exception as error:  # every codec has its own exceptions, and a damaged file may raise any of them
            self.close()
            raise InputError(
                f"cannot read {self.path}: {error or type(error).__name__}; is it damaged or another format?"
            ) from error

    def _open(self, size: Optional[tuple[int, int]], channels: Optional[int], as_mask: bool) -> Any:
        """Return the object that decodes windows of this file: one of the classes below."""
        if self.path.suffix.lower() not in IMAGE_FORMATS["tif"]:
            shape, dtype, decode = _describe_png_or_jpeg(self.path, as_mask)
            return _WholeImage(decode, dtype, AxisLayout.find(shape, "YXS"[: len(shape)], self.path, size, channels))
        import tifffile

        self._open_file = tifffile.TiffFile(self.path)
        series = self._open_file.series[0]
        self.lossy = series.keyframe.compression in JPEG_COMPRESSIONS
        layout = AxisLayout.find(series.shape, series.axes, self.path, size, channels)
        if "XResolution" in series.keyframe.tags:
            self.resolution = (*series.keyframe.resolution, int(series.keyframe.resolutionunit))
        if series.dataoffset is not None:
            return _ContiguousTiff(self.path, series, layout)
        if _SegmentedTiff.suits(series, layout):
            return _SegmentedTiff(series, layout)
        return _WholeImage(series.asarray, series.dtype, layout)


def clipped(window: Window, shape: Sequence[int]) -> Window:
    """Return what of a window lies in an image of some shape (H, W, ...)."""
    rows, columns = (slice(part.start, min(part.stop, length)) for part, length in zip(window, shape))
    return rows, columns


def reflect_to(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return an array (H, W, ...), extended by reflection at its bottom and right to at least a size (H, W)."""
    missing = [(0, max(edge - length, 0)) for edge, length in zip(size, array.shape)]
    return np.pad(array, [*missing, *[(0, 0)] * (array.ndim - 2)], mode="reflect") if np.any(missing) else array


class AxisLayout(NamedTuple):
    """How the array in a file becomes (H, W, C): its shape without axes of length 1, and the axis of the channels."""

    squeezed: tuple[int, ...]
    channel_axis: Optional[int]

    @classmethod
    def find(
        cls, shape: tuple[int, ...], axes: str, path: Path, size: Optional[tuple[int, int]], channels: Optional[int]
    ) -> "AxisLayout":
        """Find the channels by the axes (tifffile's letters), or where these do not tell, by known size or channels."""
        if 0 in shape or len(shape) < 2:
            raise InputError(f"expected an image in {path}, found an array of shape {shape}; is the file damaged?")
        keep = [axis for axis, length in enumerate(shape) if length > 1 or axes[axis] in "YX"]
        axes, squeezed = "".join(axes[axis] for axis in keep), tuple(shape[axis] for axis in keep)
        if len(squeezed) == 2:
            return cls(squeezed, None)
        if len(squeezed) != 3 or any(axis in "ZT" for axis in axes):
            raise InputError(
                f"expected a 2-D image with channels in {path}, found axes {axes} of shape {squeezed}; "
                "save each plane as a file of its own"
            )
        channel_axis = next((axis for axis in range(3) if axes[axis] in "SC"), None)
        if channel_axis is None and size is not None:
            channel_axis = {size == squeezed[:2]: 2, size == squeezed[1:]: 0}.get(True)
        elif channel_axis is None and channels is not None and squeezed.count(channels) == 1:
            channel_axis = squeezed.index(channels)
        if channel_axis is None:  # the file names no axis, and nothing else tells: the shortest is the channels
            channel_axis = int(np.argmin(squeezed))
        return cls(squeezed, channel_axis)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.channels_last(np.broadcast_to(np.uint8(0), self.squeezed)).shape
        return height, width, channels

    def channels_last(self, array: np.ndarray) -> np.ndarray:
        """Return a view of the file's array as (H, W, C)."""
        array = array.reshape(self.squeezed)
        return array[..., None] if self.channel_axis is None else np.moveaxis(array, self.channel_axis, 2)


class _WholeImage:
    """An image that is decoded as a whole, when its first window is asked for, and then held."""

    def __init__(self, decode: Callable[[], np.ndarray], dtype: np.dtype, layout: AxisLayout) -> None:
        self._decode, self._layout = decode, layout
        self.shape, self.dtype = layout.image_shape, dtype.newbyteorder("=")

    @functools.cached_property
    def _array(self) -> np.ndarray:
        return self._layout.channels_last(self._decode())

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        return (self._array[window].astype(self.dtype, copy=False) for window in plan)


class _ContiguousTiff:
    """Pixels that lie in the file one after another, as they are."""

    def __init__(self, path: Path, series: Any, layout: AxisLayout) -> None:
        self._path, self._offset, self._layout = path, series.dataoffset, layout
        self._file_dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        self._file_shape = series.shape
        self.shape, self.dtype = layout.image_shape, series.dtype.newbyteorder("=")
        self._map()  # raises where the file is too short

    def _map(self) -> np.ndarray:
        memory = np.memmap(self._path, self._file_dtype, "r", self._offset, self._file_shape)
        return self._layout.channels_last(memory)

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        # Mapped anew for each window: the pages of a lasting map would count as our memory.
        return (np.array(self._map()[window], self.dtype) for window in plan)


class DecodedSegment(NamedTuple):
    """Pixels (rows, columns, samples) of a strip or tile, and where in the image they begin."""

    pixels: np.ndarray
    row: int
    column: int
    channel: int

    def from_row(self, row: int) -> "DecodedSegment":
        """Return the segment without the rows above `row`, which lets go of their memory."""
        return self if row <= self.row else self._replace(pixels=self.pixels[row - self.row :].copy(), row=row)


class _SegmentedTiff:
    """Strips or tiles, in one page with any number of samples, or in one page for each channel."""

    def __init__(self, series: Any, layout: AxisLayout) -> None:
        self._pages, self._keyframe = list(series.pages), series.keyframe
        self.shape, self.dtype = layout.image_shape, series.dtype.newbyteorder("=")
        page, (height, width, _) = self._keyframe, self.shape
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        self._down, self._across = -(-height // rows), -(-width // columns)
        self._segment_shape = (min(rows, height), min(columns, width))

    @staticmethod
    def suits(series: Any, layout: AxisLayout) -> bool:
        """Whether the channels are the samples of one page, or the pages."""
        page = series.keyframe
        if page.imagedepth != 1 or len(page.dataoffsets) < 2 or any(each is None for each in series.pages):
            return False
        if len(series.pages) == 1:
            return layout.channel_axis is None or page.samplesperpixel > 1
        return layout.channel_axis == 0 and layout.squeezed[0] == len(series.pages) and page.samplesperpixel == 1

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        first_rows: dict[tuple[int, int], list[int]] = {}  # of the windows that share a segment, the next one last
        for window in reversed(plan):
            for segment in self._segments(window):
                first_rows.setdefault(segment, []).append(window[0].start)
        held: dict[tuple[int, int], DecodedSegment] = {}

        def fetch(segment: tuple[int, int]) -> DecodedSegment:
            decoded = held.pop(segment, None) or self._decode(*segment)
            first_rows[segment].pop()
            if first_rows[segment]:
                held[segment] = decoded.from_row(min(first_rows[segment]))
            return decoded

        for window in plan:
            yield self._cut(window, fetch)

    def _segments(self, window: Window) -> Iterator[tuple[int, int]]:
        """Yield page and index of the segments that hold some of a window."""
        rows, columns = (
            range(part.start // length, -(-part.stop // length)) for part, length in zip(window, self._segment_shape)
        )
        for number, page in enumerate(self._pages):
            for plane in range(len(page.dataoffsets) // (self._down * self._across)):
                for row in rows:
                    start = (plane * self._down + row) * self._across
                    yield from ((number, start + column) for column in columns)

    def _cut(self, window: Window, fetch: Callable[[tuple[int, int]], DecodedSegment]) -> np.ndarray:
        """Return a window, put together from its segments."""
        rows, columns = window
        result = np.empty((rows.stop - rows.start, columns.stop - columns.start, self.shape[2]), self.dtype)
        for segment in self._segments(window):
            pixels, row, column, channel = fetch(segment)
            height, width, samples = pixels.shape
            top, bottom = max(row, rows.start), min(row + height, rows.stop)
            left, right = max(column, columns.start), min(column + width, columns.stop)
            target = result[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start]
            target[..., channel : channel + samples] = pixels[top - row : bottom - row, left - column : right - column]
        return result

    def _decode(self, number: int, index: int) -> DecodedSegment:
        """Decode a segment of a page."""
        page = self._pages[number]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        data = None
        if count:
            handle = page.parent.filehandle
            handle.seek(offset)
            data = handle.read(count)
            if len(data) < count:
                raise ValueError(f"segment {index} ends beyond the end of the file")
        options = {}
        if self._keyframe.compression in JPEG_COMPRESSIONS:
            options = {"jpegtables": page.jpegtables, "jpegheader": self._keyframe.jpegheader}
        pixels, (sample, _, row, column, _), shape = self._keyframe.decode(data, index, **options)
        if pixels is None:  # left out of the file
            pixels = np.broadcast_to(self.dtype.type(self._keyframe.nodata), shape)
        return DecodedSegment(pixels[0], row, column, number + sample)


def _describe_png_or_jpeg(path: Path, as_mask: bool) -> tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]:
    """Return the shape, (H, W) or (H, W, samples), and pixel type of an image, and a function that decodes it."""
    from PIL import Image  # comes with scikit-image

    Image.MAX_IMAGE_PIXELS = None  # large images are what this suite is for, not an attack
    with Image.open(path) as picture:
        (width, height), mode, bits = picture.size, picture.mode, 8
        if picture.format == "PNG":
            with open(path, "rb") as file:
                bits, color = file.read(26)[24:]  # bits per sample, type of color
    if bits == 16:  # Pillow would narrow RGB to 8 bits
        import imagecodecs

        shape = {0: (height, width), 2: (height, width, 3), 4: (height, width, 2), 6: (height, width, 4)}[color]
        return shape, np.dtype(np.uint16), lambda: imagecodecs.png_decode(path.read_bytes())
    if mode == "P" and not as_mask:
        mode = "RGB"
    pixel = np.asarray(Image.new(mode, (1, 1)))

    def decode() -> np.ndarray:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert(mode))
        # Pillow stretches 2 and 4 bits of gray to 8.
        return pixels // (255 // (2**bits - 1)) if as_mask and mode == "L" and bits < 8 else pixels

    return (height, width, *pixel.shape[2:]), pixel.dtype, decode


# ---------------------------------------------------------------------------------------------- normalization


class UnusablePixels(InputError):
    """An image contains values that cannot be computed with."""


class ChannelStatistics(NamedTuple):
    """Mean, standard deviation, minimum and maximum of each channel of an image; all float64 of shape (C,)."""

    mean: np.ndarray
    deviation: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray

    @classmethod
    def measure(cls, blocks: Iterable[np.ndarray]) -> "ChannelStatistics":
        """Return the statistics of an image that comes in blocks (rows, columns, C) of any real dtype.

        Notes
        -----
        Count, mean and sum of squared deviations of the parts are combined (Chan, Golub and LeVeque, 1983), all in
        float64.
        """
        count, mean, squares = 0, np.zeros(()), np.zeros(())
        minimum, maximum = np.array(np.inf), np.array(-np.inf)
        for block in blocks:
            planes = np.ascontiguousarray(block.reshape(-1, block.shape[2]).T, np.float64)
            minimum, maximum = np.minimum(minimum, planes.min(1)), np.maximum(maximum, planes.max(1))
            block_mean, added = planes.mean(1), planes.shape[1]
            planes -= block_mean[:, None]
            total = count + added
            squares = squares + np.square(block_mean - mean) * count * added / total
            squares += np.square(planes, out=planes).sum(1)
            mean = mean + (block_mean - mean) * added / total
            count = total
        return cls(mean, np.sqrt(squares / count), minimum, maximum)

    @classmethod
    def of_file(cls, image: ImageFile, pixels: Optional[np.ndarray] = None) -> "ChannelStatistics":
        """Return the statistics of an image file, which is read once, from top to bottom.

        They depend on the pixels alone, to the last bit, and not on how the file stores them.

        Parameters
        ----------
        image : ImageFile
            Opened, its channels selected.
        pixels : ndarray, shape (H, W, C), optional
            All of the image, if it has been read already.

        Raises
        ------
        UnusablePixels
            If a pixel is NaN, infinite, or of a size that float32 cannot compute with.
        """
        height, width, channels = image.shape
        rows = max(1, STATISTICS_BLOCK_VALUES // (width * channels))
        plan = [(slice(row, min(row + rows, height)), slice(0, width)) for row in range(0, height, rows)]
        progress = Progress(f"measuring {image.path.name}", len(plan), "parts")

        def blocks() -> Iterator[np.ndarray]:
            windows = image.windows(plan) if pixels is None else (pixels[window] for window in plan)
            for done, block in enumerate(windows, 1):
                yield block
                progress.update(done)

        with np.errstate(invalid="ignore", over="ignore"):  # reported below
            statistics = cls.measure(blocks())
        progress.close()
        lowest, highest = statistics.minimum.min(), statistics.maximum.max()  # NaN if any pixel is
        if not max(-lowest, highest) <= MAX_MAGNITUDE:
            found = f"{lowest:g} to {highest:g}" if math.isfinite(highest - lowest) else "NaN or infinity"
            raise UnusablePixels(
                f"expected finite pixels of at most {MAX_MAGNITUDE:g} in {image.path}, found {found}; replace them, "
                "for example by 0"
            )
        return statistics


def normalize(
    pixels: np.ndarray, mean: np.ndarray, deviation: np.ndarray, floor: Any = 1.0, out: Optional[np.ndarray] = None
) -> np.ndarray:
    """Return the z-scores of pixels: what they differ from the mean, in standard deviations.

    Training and inference call this with the statistics of the complete image, whatever part of it `pixels` is, so that
    the network sees the same numbers in both.

    Parameters
    ----------
    pixels : ndarray, shape (H, W, C)
        Any real dtype.
    mean, deviation : ndarray of float64, shape (C,)
        Of the complete image.
    floor : ndarray of shape (C,), or float
        Taken for the deviation where that is smaller: an empty image must not become amplified noise.
    out : ndarray of float32, shape (H, W, C), optional
        Where to put the result.

    Returns
    -------
    ndarray of float32, shape (H, W, C)

    Notes
    -----
    What float32 rounds off the mean is subtracted by itself if it could be seen. Integers of 32 bits, which float32
    would round before the difference is taken, are centered in float64.
    """
    out = np.empty(pixels.shape, np.float32) if out is None else out
    center, factor = np.float32(mean), np.float32(1 / np.maximum(deviation, floor))
    rest = np.where(np.abs(mean - center) * factor > MEAN_TOLERANCE, np.float32(mean - center), np.float32(0))
    exact = np.float64 if pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 2 else np.float32
    for source, target, *values in _lines_of_channels(pixels, out, center, rest, factor):
        np.subtract(source, values[0], out=target, dtype=exact, casting="unsafe")
        if rest.any():
            np.subtract(target, values[1], out=target)
        np.multiply(target, values[2], out=target)
    return out


def _lines_of_channels(pixels: np.ndarray, out: np.ndarray, *values: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Yield arrays of pixels and results that numpy goes through fast, with the values of their channels to match."""
    height, width, channels = pixels.shape
    if channels > 1 and pixels.flags.c_contiguous and out.flags.c_contiguous:
        # All channels at once, in the order of memory: one at a time would skip from pixel to pixel.
        lines = height, width * channels
        yield (pixels.reshape(lines), out.reshape(lines), *(np.tile(value, width) for value in values))
    else:
        yield from zip(np.moveaxis(pixels, 2, 0), np.moveaxis(out, 2, 0), *values)


def displayable(scores: np.ndarray) -> np.ndarray:
    """Turn z-scores into something to look at.

    Parameters
    ----------
    scores : ndarray, shape (H, W, C)
        An image with mean 0 and standard deviation 1 in each channel.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        Three channels are taken for red, green and blue; the mean of others is gray. `DISPLAYED_DEVIATIONS` below the
        mean is black, as many above it white.
    """
    colors = scores if scores.shape[2] == 3 else scores.mean(axis=2, keepdims=True)
    levels = np.clip(255 * (0.5 + colors / (2 * DISPLAYED_DEVIATIONS)), 0, 255).astype(np.uint8)
    return np.broadcast_to(levels, (*scores.shape[:2], 3))
