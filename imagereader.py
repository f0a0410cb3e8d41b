"""Reading: image files, z-scores, and `ImageReader`, which keeps the GPUs fed.

An `ImageReader` starts worker processes that read records from the memory-mapped database, augment and normalise
them, and fill batches in slots of shared memory; the main process takes finished batches in order. Sample ``i`` of the
stream depends on the database, the seed and ``i`` alone, so neither the number of workers nor the batch size changes
what the network sees. Workers are spawned (forking after TensorFlow has started its threads deadlocks) and import no
TensorFlow, which would cost each of them 400 MB and seconds.
"""

import argparse
import atexit
import contextlib
import errno
import functools
import inspect
import logging
import multiprocessing
import os
import secrets
import signal
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker, shared_memory
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

import augment
from lmdb_utils import Database, InputError, Metadata, PathLike, Progress, advise_label_map

IMAGE_FORMATS = {"tif": (".tif", ".tiff"), "png": (".png",), "jpg": (".jpg", ".jpeg")}

LARGE_IMAGE_BYTES = 2**30  # from which on it is worth a note that a file must be read whole
JPEG_COMPRESSIONS = (6, 7, 33007, 34892)  # TIFF tags of the encodings that keep tables outside of the segments
MEASURED_VALUES = 2**20  # pixels times channels that are held as float64 to measure an image
SUM_VALUES = 2**16  # squares that are added up in float32
MEAN_TOLERANCE = 1e-6  # of a normalised channel's mean

RING_BYTES = 2**30  # shared memory that one ImageReader aims to fill with batches
SLOTS_PER_WORKER = (2, 8)  # at least one to fill while one is read; more only helps against uneven disks
SHARED_MEMORY_FOLDER = "/dev/shm"
ALIGNMENT = 64  # bytes; TensorFlow takes over arrays aligned like this without a copy

STARVED_BELOW, CAUGHT_UP_ABOVE = 0.1, 0.5  # fractions of the queue
POLL_SECONDS = 0.5  # how often every wait looks whether it is time to stop
STOP_SECONDS = 5.0  # what a worker gets to finish the image in hand before it is killed

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # for the main process to answer
READER_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# ---------------------------------------------------------------------------------------------- image files


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


Window = tuple[slice, slice]  # rows and columns of an image


class ImageFile:
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
        Whether the pixels are class ids: those of a palette are its indices then, not its colours.

    Attributes
    ----------
    path : Path
    shape : (int, int, int)
        Height, width, channels.
    dtype : dtype
        The file's own pixel type, in native byte order.
    segment_shape : (int, int)
        Rows and columns that are decoded together, those of a strip or tile; (1, W) where any row can be had.
    divisible : bool
        Whether a window can be had without decoding all of the file.
    lossy : bool
        Whether the file is or holds a JPEG, which has stray values.
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
        self.dtype, self.segment_shape = self._source.dtype, self._source.segment_shape
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

    def blocks(self, values: int) -> list[Window]:
        """Return a plan that covers the image once, segment by segment or in blocks of about so many values."""
        height, width, channels = self.shape
        rows, columns = self.segment_shape
        columns = min(columns * max(1, values // (rows * columns * channels)), width)
        if columns == width:
            rows *= max(1, values // (rows * width * channels))
        return [
            (slice(row, min(row + rows, height)), slice(column, min(column + columns, width)))
            for row in range(0, height, rows)
            for column in range(0, width, columns)
        ]

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._open_file is not None:
            self._open_file.close()

    def __enter__(self) -> "ImageFile":
        """Return itself."""
        return self

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
            return _WholeImage(decode, dtype, Layout.find(shape, "YXS"[: len(shape)], self.path, size, channels))
        import tifffile

        self._open_file = tifffile.TiffFile(self.path)
        series = self._open_file.series[0]
        self.lossy = series.keyframe.compression in JPEG_COMPRESSIONS
        layout = Layout.find(series.shape, series.axes, self.path, size, channels)
        if "XResolution" in series.keyframe.tags:
            self.resolution = (*series.keyframe.resolution, int(series.keyframe.resolutionunit))
        if series.dataoffset is not None:
            return _ContiguousTiff(self.path, series, layout)
        if _SegmentedTiff.suits(series, layout):
            return _SegmentedTiff(series, layout)
        return _WholeImage(series.asarray, series.dtype, layout)


class Layout(NamedTuple):
    """How the array in a file becomes (H, W, C): its shape without axes of length 1, and the axis of the channels."""

    squeezed: tuple[int, ...]
    channel_axis: Optional[int]

    @classmethod
    def find(
        cls,
        shape: tuple[int, ...],
        axes: str,
        path: Path,
        size: Optional[tuple[int, int]],
        channels: Optional[int],
    ) -> "Layout":
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

    def __init__(self, decode: Callable[[], np.ndarray], dtype: np.dtype, layout: Layout) -> None:
        self._decode, self._layout = decode, layout
        self.shape, self.dtype = layout.image_shape, dtype.newbyteorder("=")
        self.segment_shape = (1, self.shape[1])

    @functools.cached_property
    def _array(self) -> np.ndarray:
        return self._layout.channels_last(self._decode())

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        return (self._array[window].astype(self.dtype, copy=False) for window in plan)


class _ContiguousTiff:
    """Pixels that lie in the file one after another, as they are."""

    def __init__(self, path: Path, series: Any, layout: Layout) -> None:
        self._path, self._offset, self._layout = path, series.dataoffset, layout
        self._file_dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        self._file_shape = series.shape
        self.shape, self.dtype = layout.image_shape, series.dtype.newbyteorder("=")
        self.segment_shape = (1, self.shape[1])
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

    def __init__(self, series: Any, layout: Layout) -> None:
        self._pages, self._keyframe = list(series.pages), series.keyframe
        self.shape, self.dtype = layout.image_shape, series.dtype.newbyteorder("=")
        page, (height, width, _) = self._keyframe, self.shape
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        self._down, self._across = -(-height // rows), -(-width // columns)
        self.segment_shape = (min(rows, height), min(columns, width))

    @staticmethod
    def suits(series: Any, layout: Layout) -> bool:
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

        def take(segment: tuple[int, int]) -> DecodedSegment:
            decoded = held.pop(segment, None) or self._decode(*segment)
            first_rows[segment].pop()
            if first_rows[segment]:
                held[segment] = decoded.from_row(min(first_rows[segment]))
            return decoded

        for window in plan:
            yield self._cut(window, take)

    def _segments(self, window: Window) -> Iterator[tuple[int, int]]:
        """Yield page and index of the segments that hold some of a window."""
        rows, columns = (
            range(part.start // length, -(-part.stop // length)) for part, length in zip(window, self.segment_shape)
        )
        for number, page in enumerate(self._pages):
            for plane in range(len(page.dataoffsets) // (self._down * self._across)):
                for row in rows:
                    start = (plane * self._down + row) * self._across
                    yield from ((number, start + column) for column in columns)

    def _cut(self, window: Window, take: Callable[[tuple[int, int]], DecodedSegment]) -> np.ndarray:
        """Return a window, put together from its segments."""
        rows, columns = window
        result = np.empty((rows.stop - rows.start, columns.stop - columns.start, self.shape[2]), self.dtype)
        for segment in self._segments(window):
            pixels, row, column, channel = take(segment)
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
                bits, colour = file.read(26)[24:]  # bits per sample, type of colour
    if bits == 16:  # Pillow would narrow RGB to 8 bits
        import imagecodecs

        shape = {0: (height, width), 2: (height, width, 3), 4: (height, width, 2), 6: (height, width, 4)}[colour]
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


def z_score(image: np.ndarray, out: Optional[np.ndarray] = None, overwrite: bool = False) -> np.ndarray:
    """Normalise each channel of an image to mean 0 and standard deviation 1.

    Parameters
    ----------
    image : ndarray, shape (H, W, C)
        Any real dtype.
    out : ndarray of float32, shape (H, W, C), optional
        Where to put the result.
    overwrite : bool
        Compute in the image's own memory, which loses its content; for float32 only.

    Returns
    -------
    ndarray of float32, shape (H, W, C)
        A channel whose standard deviation is at most 1 is only centred, as in the NIST reference implementation:
        an empty image must not become amplified noise.

    Notes
    -----
    One channel at a time goes through a plane that stays in the cache, and into `out` once. The corrected two-pass
    algorithm (Chan, Golub and LeVeque, 1983) makes float32 sums safe: what rounding left of the mean is measured, taken
    off the variance, and off the image where it could be seen.
    """
    out = np.empty(image.shape, np.float32) if out is None else out
    scratch = np.empty(0 if overwrite else image.shape[:2], np.float32)
    for channel in range(image.shape[2]):
        source = image[..., channel]
        if overwrite:
            scratch = source
        elif image.dtype.kind in "iu" and image.dtype.itemsize > 2:
            # float32 would round large whole numbers, but not their differences.
            np.subtract(source, float(source[0, 0]), out=scratch, dtype=np.float64, casting="unsafe")
        else:
            np.copyto(scratch, source)
        _normalize(scratch, out[..., channel])
    return out


def _normalize(plane: np.ndarray, out: np.ndarray) -> None:
    """Write the z-score of a float32 plane (H, W) into `out`; `plane` is overwritten."""
    ones = np.ones(len(plane), np.float32)

    def mean() -> float:
        return float((ones @ plane).sum(dtype=np.float64)) / plane.size

    np.subtract(plane, np.float32(mean()), out=plane)
    rest = mean()
    rows = max(1, SUM_VALUES // plane.shape[1])
    blocks = (plane[first : first + rows].reshape(-1) for first in range(0, len(plane), rows))
    variance = sum(float(np.dot(block, block)) for block in blocks) / plane.size - rest**2
    factor = 1 / max(variance, 1.0) ** 0.5
    if abs(rest) * factor > MEAN_TOLERANCE:
        np.subtract(plane, np.float32(rest), out=plane)
    np.multiply(plane, np.float32(factor), out=out)


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel of an image; both float64 of shape (C,)."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def measure(cls, image: ImageFile) -> "ChannelStatistics":
        """Read an image once, block by block, and return its statistics.

        Raises
        ------
        InputError
            If a pixel is NaN or infinite.

        Notes
        -----
        Count, mean and sum of squared deviations of the parts are combined (Chan, Golub and LeVeque, 1983), all in
        float64.
        """
        channels = image.shape[2]
        count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
        plan = image.blocks(MEASURED_VALUES)
        progress = Progress(f"measuring {image.path.name}", len(plan), "parts")
        for done, block in enumerate(image.windows(plan), 1):
            parts = range(0, len(block), max(1, MEASURED_VALUES // block[0].size))  # a strip may be a large block
            for start, stop in zip(parts, [*parts[1:], len(block)]):
                part = block[start:stop].astype(np.float64).reshape(-1, channels)
                part_mean = part.mean(axis=0)
                part_squares = np.square(part - part_mean).sum(axis=0)
                total = count + len(part)
                squares += part_squares + np.square(part_mean - mean) * count * len(part) / total
                mean += (part_mean - mean) * len(part) / total
                count = total
            progress.update(done)
        progress.close()
        if not np.isfinite(squares).all():
            raise InputError(
                f"expected finite pixels in {image.path}, found NaN or infinity; replace them, for example by 0"
            )
        return cls(mean, np.sqrt(squares / count))

    def z_score(self, window: np.ndarray, out: Optional[np.ndarray] = None) -> np.ndarray:
        """Return a window (H, W, C) of the image as float32, normalised as `z_score` normalises a whole image."""
        result = np.empty(window.shape, np.float32) if out is None else out
        for channel, (mean, deviation) in enumerate(zip(self.mean, self.deviation)):
            # The difference in float64: float32 would round large numbers before it is taken.
            np.subtract(window[..., channel], mean, out=result[..., channel], dtype=np.float64, casting="unsafe")
            if deviation > 1:
                result[..., channel] *= np.float32(1 / deviation)
        return result


# ---------------------------------------------------------------------------------------------- the ring


class Batch(NamedTuple):
    """One batch as the network takes it.

    Attributes
    ----------
    images : ndarray of float32, shape (B, H, W, C)
        Normalised by `z_score`.
    masks : ndarray of uint8 or int32, shape (B, H, W)
        Class ids.
    weights : ndarray of float32, shape (B,)
        1 for an image, 0 for padding at the end of an unshuffled pass.
    """

    images: np.ndarray
    masks: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class RingLayout:
    """Where the batches of each worker lie in the shared memory.

    After a page of counters follow the slots. Worker ``w`` of ``n`` builds batches ``w, w + n, ...``; its ``j``-th
    goes into its slot ``j modulo slots_per_worker``.
    """

    num_workers: int
    slots_per_worker: int
    batch_size: int
    image_shape: tuple[int, int, int]
    mask_dtype: str

    COUNTER_BYTES = 4096

    @property
    def _part_bytes(self) -> tuple[int, int, int]:
        """Bytes of images, masks and weights in a slot, each rounded up to the alignment."""
        pixels = self.batch_size * self.image_shape[0] * self.image_shape[1]
        sizes = (pixels * self.image_shape[2] * 4, pixels * np.dtype(self.mask_dtype).itemsize, self.batch_size * 4)
        image_bytes, mask_bytes, weight_bytes = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        return image_bytes, mask_bytes, weight_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(self._part_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole shared memory."""
        return self.COUNTER_BYTES + self.num_workers * self.slots_per_worker * self.slot_bytes

    @property
    def total_slots(self) -> int:
        """Batches that fit in the ring."""
        return self.num_workers * self.slots_per_worker

    def slot_offset(self, worker: int, turn: int) -> int:
        """Return where the slot begins that takes worker `worker`'s batch number `turn` (counted from 0), in bytes."""
        return self.COUNTER_BYTES + (worker * self.slots_per_worker + turn % self.slots_per_worker) * self.slot_bytes

    def batch(self, memory: Any, offset: int) -> Batch:
        """Return views of the batch that begins at `offset` in `memory`, an object with a buffer."""
        image_bytes, mask_bytes, _ = self._part_bytes
        shape = (self.batch_size, *self.image_shape)
        return Batch(
            np.ndarray(shape, np.float32, memory, offset),
            np.ndarray(shape[:3], self.mask_dtype, memory, offset + image_bytes),
            np.ndarray(shape[:1], np.float32, memory, offset + image_bytes + mask_bytes),
        )

    def counters(self, memory: Any) -> np.ndarray:
        """Return the counters (int64): a stop flag, then the batches that each worker has finished."""
        return np.ndarray(1 + self.num_workers, np.int64, memory)


def allocate_shared_memory(size: int) -> shared_memory.SharedMemory:
    """Create shared memory of `size` bytes and reserve every page of it.

    Without the reservation a file system that is too small would answer later, with a bus error.

    Raises
    ------
    OSError
        If ``/dev/shm`` cannot hold it.
    """
    # Asked for before reserving: a /dev/shm as large as the memory would hand out all of it before it says no.
    if size > free_shared_memory():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), SHARED_MEMORY_FOLDER)
    name = f"psm_{secrets.token_hex(8)}"
    path = f"{SHARED_MEMORY_FOLDER}/{name}"
    # The process that tidies up knows of it before it exists, so that whoever is killed at any moment leaves nothing.
    resource_tracker.register(f"/{name}", "shared_memory")
    try:
        memory = shared_memory.SharedMemory(name, create=True, size=size)
        if os.path.exists(path):  # Linux; elsewhere there is no file to reserve
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        # SharedMemory may have crossed it off already, and what is not on the list cannot be.
        resource_tracker.register(f"/{name}", "shared_memory")
        resource_tracker.unregister(f"/{name}", "shared_memory")
        raise
    return memory


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back `STOP_SIGNALS` while child processes are started, which inherit that until they let them through.

    Slurm and the terminal signal every process at once. A worker ignores them, but not before Python has started in it;
    the process that multiprocessing tidies up with would be ended by SIGUSR1.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # lets some of the signals through again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def free_shared_memory() -> float:
    """Return the bytes free in the file system of shared memory; infinity where there is none to ask."""
    try:
        status = os.statvfs(SHARED_MEMORY_FOLDER)
    except OSError:
        return float("inf")
    return status.f_bavail * status.f_frsize


def _shared_memory_error(layout: RingLayout) -> InputError:
    return InputError(
        f"the readers need {layout.total_bytes / 2**20:.0f} MiB of shared memory, {SHARED_MEMORY_FOLDER} has "
        f"{free_shared_memory() / 2**20:.0f} MiB free; lower --batch_size or --reader_count, or enlarge it "
        "(docker run --shm-size)"
    )


class MemoryRecycler:
    """Hands out blocks of memory, and takes each back when no array refers to it any more.

    New memory for each batch would cost more than the copy into it, because the system clears every page first.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._idle: list[bytearray] = []

    def take(self) -> np.ndarray:
        """Return a block (uint8) that begins at a multiple of `ALIGNMENT`; its content is arbitrary."""
        memory = self._idle.pop() if self._idle else bytearray(self._block_bytes + ALIGNMENT)
        address = np.ndarray(1, np.uint8, memory).ctypes.data
        block = np.ndarray(self._block_bytes, np.uint8, memory, -address % ALIGNMENT)
        # An array keeps its base alive. For views of the block, and views of these, numpy makes that the block itself,
        # because what lies below it is no array.
        weakref.finalize(block, self._idle.append, memory).atexit = False
        return block


# ---------------------------------------------------------------------------------------------- the sample stream


@dataclass(frozen=True)
class Stream:
    """Which record each sample of the stream takes, and with which random numbers.

    A shuffled stream goes through one permutation of the records after another. A balanced one draws a class, then
    one of its records. An unshuffled one passes over the records in order, each pass padded with empty samples
    (index -1) to `pass_length`.

    Where several processes train together, each step takes `replicas` batches for each of them in turn; a resumed run
    begins at `first_sample`.
    """

    seed: int
    shuffle: bool
    balance_classes: bool
    pass_length: int
    batch_size: int
    replicas: int = 1
    process: int = 0
    processes: int = 1
    first_sample: int = 0

    def samples(self, batch: int) -> range:
        """Return the samples of one of this process's batches."""
        step, replica = divmod(batch, self.replicas)
        first = ((step * self.processes + self.process) * self.replicas + replica) * self.batch_size
        return range(self.first_sample + first, self.first_sample + first + self.batch_size)

    def generator(self, sample: int) -> np.random.Generator:
        """Return the random numbers of one sample."""
        return np.random.default_rng((self.seed, 1, sample))

    def permutation(self, epoch: int, count: int) -> np.ndarray:
        """Return the order of the records in one pass of a shuffled stream."""
        return np.random.default_rng((self.seed, 2, epoch)).permutation(count)


class SampleSource:
    """One worker's view of the stream: picks, reads, augments and normalises sample after sample."""

    def __init__(self, database: Database, stream: Stream, augmentation: Optional[dict[str, Any]]) -> None:
        self._database, self._stream, self._augmentation = database, stream, augmentation
        if augmentation is not None:
            metadata = database.metadata
            self._augmenter = augment.Augmenter(metadata.image_shape, metadata.info["mask_dtype"])
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def pick(self, sample: int, rng: np.random.Generator) -> int:
        """Return the record of a sample, or -1 for padding."""
        metadata = self._database.metadata
        if self._stream.balance_classes:
            records = metadata.records_of_class(int(rng.integers(len(metadata.classes))))
            return int(records[rng.integers(len(records))])
        epoch, position = divmod(sample, self._stream.pass_length)
        if not self._stream.shuffle:
            return position if position < metadata.count else -1
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._stream.permutation(epoch, metadata.count)
        return int(self._order[position])

    def place(self, record: int, rng: np.random.Generator, batch: Batch, index: int) -> None:
        """Put a record into position `index` of a batch."""
        batch.weights[index] = record >= 0
        if record < 0:
            batch.images[index], batch.masks[index] = 0, 0
            return
        image, mask = self._database.read(record)
        if self._augmentation is not None:
            transformation = augment.sample_transformation(rng, *mask.shape, **self._augmentation)
            image, mask = self._augmenter.apply(transformation, image, mask, rng)
        z_score(image, out=batch.images[index], overwrite=self._augmentation is not None)
        batch.masks[index] = mask


# ---------------------------------------------------------------------------------------------- the worker process


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker process gets: plain values, the name of the shared memory, and its semaphores."""

    worker: int
    database: str
    stream: Stream
    augmentation: Optional[dict[str, Any]]
    layout: RingLayout
    memory_name: str
    free: Any  # one semaphore for each of the worker's slots
    filled: Any  # counts the worker's finished batches
    failures: Any  # write end of a pipe


def run_worker(task: WorkerTask) -> None:
    """Fill slots until told to stop; the main function of a worker process."""
    # The main process decides what a signal means; a Ctrl-C reaches the whole group, a scancel every process.
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    end_with_parent()
    record: Optional[int] = None
    try:
        memory = shared_memory.SharedMemory(task.memory_name)
        with Database(task.database) as database:
            source = SampleSource(database, task.stream, task.augmentation)
            turn = 0
            while _wait_for_slot(task, memory, turn):
                batch = task.layout.batch(memory.buf, task.layout.slot_offset(task.worker, turn))
                samples = task.stream.samples(turn * task.layout.num_workers + task.worker)
                for index, sample in enumerate(samples):
                    rng = task.stream.generator(sample)
                    record = source.pick(sample, rng)
                    source.place(record, rng, batch, index)
                turn += 1
                task.layout.counters(memory.buf)[1 + task.worker] = turn
                task.filled.release()
    except BaseException as error:
        where = "start-up" if record is None else database.metadata.describe_record(record)
        task.failures.send((where, f"{type(error).__name__}: {error}", traceback.format_exc()))
        os._exit(1)  # the message is out; a tidy exit could hang on what has just failed
    os._exit(0)  # nothing to tidy up: the parent owns the shared memory, and views of it would make close() fail


def _wait_for_slot(task: WorkerTask, memory: shared_memory.SharedMemory, turn: int) -> bool:
    """Wait until the slot of this turn may be overwritten; False when it is time to stop."""
    counters = task.layout.counters(memory.buf)
    free = task.free[turn % task.layout.slots_per_worker]
    while not counters[0]:
        if free.acquire(timeout=POLL_SECONDS):
            return not counters[0]
    return False


def end_with_parent() -> None:
    """Have this process end as soon as the main process is gone, however that came about."""
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ---------------------------------------------------------------------------------------------- the reader


class ReaderError(RuntimeError):
    """A worker process failed; the message names it, what it was doing, and why."""


class ImageReader:
    """Batches from a database, prepared by worker processes; a context manager.

    Parameters
    ----------
    img_db : path
        Database that `build_lmdb.py` wrote.
    use_augmentation : bool
        Transform each image at random; the limits are in the block below.
    balance_classes : bool
        Draw each class equally often, then an image that holds it. Needs `shuffle`.
    shuffle : bool
        Draw at random; otherwise pass over the database in order, each image once per pass.
    num_workers : int
        Reader processes.
    number_classes : int
        Classes of the network; a database with others is refused.
    batch_size : int
        Images in a batch.
    seed : int
        The stream is a function of this and of the database.
    name : str
        Says in messages which reader speaks.
    replicas : int
        Replicas of this process, each of which takes a batch in a step.
    process, processes : int
        Which of how many processes this is that train together; their streams share no sample. An unshuffled pass is
        padded so that it ends with a step of all replicas.
    first_sample : int
        Where in the stream to begin: how many images all replicas have taken before.

    Raises
    ------
    FileNotFoundError, InputError
        If the database is missing, damaged, or holds a class that the network has not.
    """

    def __init__(
        self,
        img_db: PathLike,
        use_augmentation: bool = False,
        balance_classes: bool = False,
        shuffle: bool = True,
        num_workers: int = 1,
        number_classes: int = 2,
        batch_size: int = 4,
        seed: int = 0,
        name: str = "reader",
        replicas: int = 1,
        process: int = 0,
        processes: int = 1,
        first_sample: int = 0,
    ) -> None:
        check_options(num_workers, batch_size, balance_classes, shuffle)
        # setup the image data augmentation parameters
        self._reflection_flag = True
        self._rotation_flag = True
        self._jitter_augmentation_severity = 0.1  # x% of a FOV
        self._noise_augmentation_severity = 0.02  # vary noise by x% of the dynamic range present in the image
        self._scale_augmentation_severity = 0.1  # vary size by x%
        self._blur_max_sigma = 2  # pixels
        # A constant shift of the whole image is undone by the z-score, so it is of use only with another normalisation.
        # self._intensity_augmentation_severity = 0.05

        self._use_augmentation, self._name = use_augmentation, name
        self._database = os.fspath(img_db)
        with Database(img_db) as database:
            self.metadata = database.metadata
        check_classes(self.metadata, number_classes, self._database)
        multiple = 1 if shuffle else batch_size * replicas * processes
        pass_length = -(-self.metadata.count // multiple) * multiple
        self._stream = Stream(
            seed, shuffle, balance_classes, pass_length, batch_size, replicas, process, processes, first_sample
        )
        self._layout = make_layout(num_workers, batch_size, self.metadata.image_shape, number_classes)
        self._recycler = MemoryRecycler(self._layout.slot_bytes)
        self._forget_workers()
        self._stopping = threading.Event()
        self._taking = threading.Lock()  # held to look at the shared memory, which must not close under a consumer

    def _forget_workers(self) -> None:
        """Set what belongs to one start of the workers to what it is without any."""
        self._memory: Optional[shared_memory.SharedMemory] = None
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._free: list[list[Any]] = []  # of each worker and slot: whether the worker may fill it
        self._filled: list[Any] = []  # of each worker: how many batches wait
        self._watcher: Optional[threading.Thread] = None
        self._failure: Optional[ReaderError] = None
        self._taken = 0
        self._starving = False

    # ------------------------------------------------------------------ lifecycle

    def startup(self) -> None:
        """Start the workers; does nothing where they run already.

        Raises
        ------
        InputError
            If there is too little shared memory.
        """
        if self._processes:
            return
        self._forget_workers()  # and the failure of those before
        self._stopping.clear()
        with signals_held(), _environment({name: "1" for name in READER_THREAD_VARIABLES}):
            try:
                self._memory = allocate_shared_memory(self._layout.total_bytes)
            except OSError as error:
                raise _shared_memory_error(self._layout) from error
            # At exit multiprocessing would send the workers a SIGTERM, which they ignore, and wait for ever.
            atexit.register(self.shutdown)
            logging.info(
                "%s: %d process%s, room for %d batches in %.0f MiB of shared memory",
                self._name, self._layout.num_workers, "es" * (self._layout.num_workers > 1), self._layout.total_slots,
                self._layout.total_bytes / 2**20,
            )  # fmt: skip
            for worker in range(self._layout.num_workers):
                self._start_worker(worker, self._memory.name)
        self._watcher = threading.Thread(target=self._watch, name=f"{self._name} watcher", daemon=True)
        self._watcher.start()

    def _start_worker(self, worker: int, memory_name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._free.append([context.Semaphore(1) for _ in range(self._layout.slots_per_worker)])
        self._filled.append(context.Semaphore(0))
        receiver, sender = context.Pipe(duplex=False)
        self._pipes.append(receiver)
        task = WorkerTask(
            worker,
            self._database,
            self._stream,
            self.augmentation_limits() if self._use_augmentation else None,
            self._layout,
            memory_name,
            self._free[worker],
            self._filled[worker],
            sender,
        )
        process = context.Process(target=run_worker, args=(task,), name=f"{self._name} worker {worker}", daemon=True)
        process.start()
        sender.close()
        self._processes.append(process)

    def shutdown(self) -> None:
        """Stop the workers and remove the shared memory; does nothing where nothing runs."""
        self._stopping.set()
        if self._memory is None:
            return
        atexit.unregister(self.shutdown)
        self._layout.counters(self._memory.buf)[0] = 1
        for semaphore in (semaphore for slots in self._free for semaphore in slots):
            semaphore.release()  # wakes the workers that wait for a slot
        for process in self._processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        if self._watcher is not None:
            self._watcher.join()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.close()
        with self._taking:
            self._processes, self._pipes, self._free, self._filled = [], [], [], []
            memory, self._memory = self._memory, None
            memory.close()
        with contextlib.suppress(FileNotFoundError):  # a login manager may have cleared /dev/shm at the user's logout
            memory.unlink()

    def __enter__(self) -> "ImageReader":
        """Start the workers."""
        self.startup()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the workers."""
        self.shutdown()

    def augmentation_limits(self) -> dict[str, Any]:
        """Return the limits set in ``__init__`` by the names that `augment.sample_transformation` gives them."""
        names = inspect.signature(augment.sample_transformation).parameters
        return {name: getattr(self, f"_{name}") for name in names if hasattr(self, f"_{name}")}

    def _watch(self) -> None:
        """Report a worker that ends before it was told to, at once, even while the main thread is busy elsewhere."""
        while not self._stopping.is_set():
            for sentinel in connection.wait([process.sentinel for process in self._processes], POLL_SECONDS):
                if self._stopping.is_set():
                    return
                worker = [process.sentinel for process in self._processes].index(sentinel)
                process = self._processes[worker]
                process.join()
                self._failure = ReaderError(describe_failure(process, self._pipes[worker]))
                logging.error("%s", self._failure)
                return

    def raise_failure(self) -> None:
        """Raise the `ReaderError` of a worker that failed, if there is one."""
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------ batches

    def get_image_count(self) -> int:
        """Return the number of images in the database."""
        return self.metadata.count

    def get_image_size(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of an image."""
        return self.metadata.image_shape

    def get_pass_steps(self) -> int:
        """Return the number of steps in which all replicas pass over an unshuffled database once, padding included."""
        stream = self._stream
        return -(-stream.pass_length // (stream.batch_size * stream.replicas * stream.processes))

    def describe_step(self, step: int) -> list[str]:
        """Return in words the records that this process's replicas take in a step, counted from the reader's start."""
        described = []
        with Database(self._database) as database:
            source = SampleSource(database, self._stream, None)
            for batch in range(step * self._stream.replicas, (step + 1) * self._stream.replicas):
                for sample in self._stream.samples(batch):
                    record = source.pick(sample, self._stream.generator(sample))
                    described.append(self.metadata.describe_record(record))
        return described

    def get_queue_size(self) -> int:
        """Return the number of finished batches that wait to be taken."""
        with self._taking:
            if self._memory is None:
                return 0
            return int(self._layout.counters(self._memory.buf)[1:].sum()) - self._taken

    def get_queue_capacity(self) -> int:
        """Return the number of finished batches that the queue can hold."""
        return self._layout.total_slots

    def generator(self) -> Iterator[Batch]:
        """Yield batch after batch, without end; it returns when the reader is shut down.

        Yields
        ------
        Batch
            Arrays of their own: one copy out of the slot, aligned so that TensorFlow needs no second one.

        Raises
        ------
        ReaderError
            If a worker has failed.
        """
        while True:
            batch = self._take()
            if batch is None:
                return
            yield batch

    def _take(self) -> Optional[Batch]:
        """Return the next batch of the stream, or None once the reader is shut down."""
        if self._stopping.is_set():
            return None
        turn, worker = divmod(self._taken, self._layout.num_workers)
        self._report_starvation()
        while not self._stopping.is_set() and self._memory is not None:
            self.raise_failure()
            if self._filled[worker].acquire(timeout=POLL_SECONDS):
                with self._taking:
                    if self._stopping.is_set():
                        return None
                    start = self._layout.slot_offset(worker, turn)
                    memory = self._recycler.take()
                    np.copyto(memory, np.ndarray(memory.shape, np.uint8, self._memory.buf, start))
                    self._taken += 1
                    self._free[worker][turn % self._layout.slots_per_worker].release()
                return self._layout.batch(memory, 0)
        return None

    def _report_starvation(self) -> None:
        """Log when the queue runs empty and when it has recovered, once each."""
        size, slots = self.get_queue_size(), self._layout.total_slots
        # The first ring of batches is start-up: the queue has had no chance to fill.
        if not self._starving and size < STARVED_BELOW * slots and self._taken >= slots:
            self._starving = True
            logging.warning("%s: Input Queue Starvation !!!!", self._name)
        elif self._starving and size > CAUGHT_UP_ABOVE * slots:
            self._starving = False
            logging.warning("%s: Input Queue Starvation Over", self._name)

    def get_tf_dataset(self) -> Any:
        """Return the stream as an endless `tf.data.Dataset` of (images, masks, weights), shaped as `Batch`."""
        import tensorflow as tf

        shape = (self._layout.batch_size, *self._layout.image_shape)
        signature = (
            tf.TensorSpec(shape, tf.float32),
            tf.TensorSpec(shape[:3], tf.dtypes.as_dtype(self._layout.mask_dtype)),
            tf.TensorSpec(shape[:1], tf.float32),
        )
        dataset = tf.data.Dataset.from_generator(lambda: map(tuple, self.generator()), output_signature=signature)
        # Nothing here is left to tune, and an iterator cannot be destroyed while the thread that would tune it sleeps,
        # for up to a minute.
        options = tf.data.Options()
        options.autotune.enabled = False
        # Repeated, because TensorFlow then knows that it is endless. Otherwise processes that train together would ask
        # each other before every batch whether all have one.
        return dataset.repeat().prefetch(2).with_options(options)


def make_layout(
    num_workers: int, batch_size: int, image_shape: tuple[int, int, int], number_classes: int
) -> RingLayout:
    """Return a ring as deep as `RING_BYTES`, half of the free shared memory and `SLOTS_PER_WORKER` allow."""
    mask_dtype = "uint8" if number_classes <= 256 else "int32"
    least, most = SLOTS_PER_WORKER
    one = RingLayout(num_workers, 1, batch_size, image_shape, mask_dtype)
    budget = min(RING_BYTES, free_shared_memory() / 2)  # the other half is for the other reader: train and test
    slots = min(max(int(budget // (one.slot_bytes * num_workers)), least), most)
    return RingLayout(num_workers, slots, batch_size, image_shape, mask_dtype)


def check_options(num_workers: int, batch_size: int, balance_classes: bool, shuffle: bool) -> None:
    """Refuse options of a reader that make no sense, or not together."""
    if num_workers < 1 or batch_size < 1:
        raise InputError(f"expected at least 1 reader and 1 image per batch, got {num_workers} and {batch_size}")
    if balance_classes and not shuffle:
        raise InputError("an unshuffled pass shows every image once and cannot balance classes; switch one off")


def check_classes(metadata: Metadata, number_classes: int, database: str) -> None:
    """Refuse a database that holds a class the network has no output for.

    Raises
    ------
    InputError
        Names the classes, and a file that holds one of the offending ones.
    """
    classes = metadata.classes
    outside = np.flatnonzero((classes < 0) | (classes >= number_classes))
    if len(outside):
        example = metadata.describe_record(int(metadata.records_of_class(int(outside[0]))[0]))
        advice = advise_label_map(classes.tolist())
        raise InputError(
            f"expected classes 0 to {number_classes - 1} in {database}, found {classes[outside[0]]} in {example}; "
            f"set --number_classes {int(classes.max()) + 1}{advice and ', or build the database again: '}{advice}"
        )


def describe_failure(process: Any, pipe: Any) -> str:
    """Return in words how a worker ended: what it told through its pipe, or else its exit code."""
    who = f"{process.name} (process {process.pid})"
    with contextlib.suppress(EOFError, OSError):
        if pipe.poll():
            where, error, trace = pipe.recv()
            return f"{who} failed at {where}: {error}\n{trace}"
    how = f"exit code {process.exitcode}"
    if process.exitcode is not None and process.exitcode < 0:
        how = f"killed by {signal.Signals(-process.exitcode).name}, {how}"
    return f"{who} died without a word ({how}); was it killed by hand, by Slurm or for want of memory?"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the child processes started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
