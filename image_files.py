"""Image files: supported formats, reading by windows, and normalization of pixel values.

Owns `ImageFile`, which decodes a TIFF, PNG or JPEG window by window and finds its channels, the normalization of
channels, and the only mapping from an image to a displayable one.
"""

import argparse
import codecs
import collections
import contextlib
import functools
import io
import itertools
import logging
import math
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, Optional
from xml.etree import ElementTree

import numpy as np

from cli import InputError, PathLike, Progress, cause_of, counted, free_host_memory, printable, read_if_small

IMAGE_FORMATS = {"tif": (".tif", ".tiff"), "png": (".png",), "jpg": (".jpg", ".jpeg")}
MASK_FORMATS = {name: IMAGE_FORMATS[name] for name in ("tif", "png")}  # JPEG alters class ids

SHOWN_NAMES, LONGEST_NAME = 3, 255  # names in a message; characters in a name
RESULTS_MARK = ".unet_results"  # empty file that marks a folder of results inside a tree, which are not input
LARGE_IMAGE_BYTES = 2**30  # above this size, log that a file can only be read in one piece
MEMORY_CHECK_BYTES = 2**26  # below this size, do not check whether an image fits into free memory
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
REDUCED_IMAGE, TRANSPARENCY_MASK = 1, 4  # bits of a TIFF's NewSubfileType
LOSSY_COMPRESSION = re.compile("JP|WEBP|LERC|JETRAW")  # names of TIFF encodings that may change values
# GeoTIFF tags that place an image: pixel scale, tie points, transformation and keys. GDAL's own tags 42112 and 42113
# are not among them, because they describe the values of the image.
PIXEL_SCALE_TAG, TIE_POINTS_TAG, TRANSFORMATION_TAG, GEO_KEYS_TAG = 33550, 33922, 34264, 34735
PLACEMENT_TAGS = (PIXEL_SCALE_TAG, TIE_POINTS_TAG, TRANSFORMATION_TAG, GEO_KEYS_TAG, 34736, 34737)
RASTER_TYPE_KEY, PIXEL_IS_POINT = 1025, 2  # GeoTIFF codes
RESOLUTION_PER_CENTIMETER = 3  # TIFF code
PER_CENTIMETER = {"nm": 1e7, "µm": 1e4, "mm": 10.0, "cm": 1.0}
UNIT_NAMES = {  # spellings that programs use, with either of the two characters for mu
    **dict.fromkeys(("micron", "microns", "um", "\\u00B5m", "\\u00b5m", "\u03bcm"), "µm"),
    **dict.fromkeys(("pixel", "pixels", "px"), ""),
}
PROJECTED_MODEL, LINEAR_UNITS = 1, {9001: "m", 9002: "ft", 9003: "US survey ft"}  # GeoTIFF codes
UNNAMED_AXES, SCENE_AXIS = "iq", "s"  # tifffile's letters for unnamed axes; the letter for the images of an OME file
STACK_AXES = "zt" + UNNAMED_AXES
NO_DATA_TAG = 42113  # GDAL's TIFF tag for the value of pixels without data, as text
ORIENTATION_TAG = 274  # TIFF and EXIF tag; see `Orientation` for the meaning of its codes 1 to 8
ORIENTATIONS = [
    (False, False, False), (False, False, True), (False, True, True), (False, True, False),
    (True, False, False), (True, False, True), (True, True, True), (True, True, False),
]  # fmt: skip
DEFLATE_RATIO = 1032  # largest number of bytes that one byte of a PNG can decompress to
TIFF_HEADER_BYTES = 8
BYTE_COUNT_TAGS = (279, 325)  # of strips and of tiles
TAGS_OF_SAMPLES = (258, 339)  # bits and number format of each sample
SEGMENT_PADDING = 3  # bytes that a strip or tile may have after its pixels
TILE_TAGS = {322, 323, 324, 325}  # width, height, offsets, lengths: a file has all of them or none
PLANAR_TAG, PLANAR_CONFIGURATIONS = 284, (1, 2)  # samples interleaved by pixel, or one plane after another
# How a TIFF stores its pixels: size, bits, encoding, colors, planes, predictor, strips, tiles, subsampling
PIXEL_TAGS = {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 317, 320, *range(322, 326), 338, 339, 347, 530}
# LZW, Deflate, PackBits, LZMA and Zstandard, whose decoders produce bytes, not pixels
BYTEWISE_COMPRESSIONS = (5, 8, 32773, 32946, 34925, 50000, 50013)
JPEG_COMPRESSIONS = (6, 7, 33007, 34892)  # TIFF codes of the encodings that keep tables outside the segments
STATISTICS_BLOCK_VALUES = 2**20  # pixels times channels that are converted to float64 at once to measure an image
MAX_MAGNITUDE = 1e16  # of a pixel; the network's float32 sums of squares overflow not far above it
MEAN_TOLERANCE = 1e-6  # largest error of a normalized channel's mean
DISPLAYED_DEVIATIONS = 2.5  # standard deviations from the mean to black and to white

# tifffile warns that it cannot cast the most common float32 value of GDAL's tag, which this module reads itself.
logging.getLogger("tifffile").addFilter(lambda record: "GDAL_NODATA" not in record.getMessage())

Window = tuple[slice, slice]  # rows and columns of an image

# ---------------------------------------------------------------------------------------------- files and folders


def suffix_list(text: str) -> list[str]:
    """Return `text` as a list of distinct suffixes; the ``type`` of command-line options."""
    suffixes = text.split(",")
    if not all(suffixes) or len(set(suffixes)) < len(suffixes) or any(os.sep in suffix for suffix in suffixes):
        raise argparse.ArgumentTypeError(f"expected distinct suffixes such as _B02,_B03,_B04, got {text!r}")
    return suffixes


def image_format(text: str) -> str:
    """Return the key of `IMAGE_FORMATS` for an extension; the ``type`` of command-line options."""
    extension = f".{text.lower().lstrip('.')}"
    for name, extensions in IMAGE_FORMATS.items():
        if extension in extensions:
            return name
    raise argparse.ArgumentTypeError(f"expected tif, png or jpg, got {text!r}")


Place = tuple[tuple[str, int], ...]  # of a plane in a stack: the letter of each axis, such as z, and the index along it


class Source(NamedTuple):
    """Location of an image: its name in its folder, its file or one file for each channel, and its plane in a stack."""

    name: str  # of the file, with slashes between the parts of a path
    files: tuple[str, ...]
    plane: Place = ()

    def __str__(self) -> str:
        """Return the name that messages use."""
        return self.files[0] + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "") + self.place

    @property
    def place(self) -> str:
        """Label of the plane, such as ``#z3t1``; empty for an image that is not a stack."""
        return "#" * bool(self.plane) + "".join(f"{axis}{index}" for axis, index in self.plane)

    @property
    def label(self) -> str:
        """Name and plane."""
        return self.name + self.place

    @property
    def stem(self) -> str:
        """Name of the file without extension, with one character for each accented letter."""
        return composed(os.path.splitext(self.name)[0])

    @property
    def nbytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(map(os.path.getsize, self.files))

    def open(
        self,
        size: Optional[tuple[int, int]] = None,
        channels: Optional[int] = None,
        no_data: Optional[float] = None,
        as_mask: bool = False,
    ) -> "ImageFile":
        """Open the image; parameters and errors are the same as for `ImageFile`."""
        if len(self.files) > 1:
            return ChannelFiles(self.files, size, no_data, self.plane)
        return ImageFile(self.files[0], size, channels, as_mask, no_data, self.plane)

    def planes(self) -> "list[Source]":
        """Return the planes of a stack in file order, or the image itself if it is not a stack.

        Raises
        ------
        InputError
            If the file cannot be read, its axes are not stack axes, or the files of the channels have different planes.
        """
        found = [StackLayout.of(file).planes for file in self.files]
        for file, planes in zip(self.files, found):
            if planes != found[0]:
                raise InputError(f"expected the same planes in {self.files[0]} and {file}, found different ones")
        return [self._replace(plane=plane) for plane in found[0]]


class Folder(NamedTuple):
    """A folder of images or masks; their names are relative to it."""

    path: Path
    recursive: bool = False  # whether to include files in subfolders
    left_out: Sequence[Path] = ()  # subfolders to skip, because they contain something else

    def files(self) -> list[Source]:
        """Return everything that is neither hidden nor a folder, sorted by name.

        Broken links, pipes and devices are included, so that they are reported instead of silently skipped.

        Raises
        ------
        InputError
            If the folder is missing.
        """
        if not self.path.is_dir():
            raise InputError(f"there is no folder {self.path}; check the path")
        passed = {os.path.realpath(folder) for folder in (self.path, *self.left_out)}
        names = sorted(self._names_below("", passed))
        return [Source(name, (os.path.join(self.path, name),)) for name in names]

    def _names_below(self, folder: str, passed: set[str]) -> Iterator[str]:
        """Yield the files of a folder and, if recursive, of its subfolders, except those already passed."""
        with os.scandir(self.path / folder) as entries:  # saves a system call for each file
            shown = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
        for name, is_folder in shown:
            inside = os.path.join(folder, name)
            if not is_folder:
                yield inside
            elif self.recursive:
                place = os.path.realpath(self.path / inside)
                if place in passed:  # following a link to a parent folder would never end
                    continue
                mark = self.path / inside / RESULTS_MARK
                if os.path.lexists(mark):
                    logging.warning(
                        "left out %s, which contains masks of another run; remove %s to use it", mark.parent, mark
                    )
                else:
                    yield from self._names_below(inside, passed | {place})

    def subfolders(self) -> list[str]:
        """Return the names of a few subfolders, for messages."""
        return sorted(path.name for path in self.path.iterdir() if path.is_dir())[:4]


def of_type(sources: Sequence[Source], extensions: Collection[str]) -> list[Source]:
    """Return the files with one of several extensions, in uppercase or lowercase."""
    return [each for each in sources if os.path.splitext(each.name)[1].lower() in extensions]


def types_of(sources: Sequence[Source], none: str) -> str:
    """Return the extensions of files, for messages; `none` stands for a missing extension."""
    return ", ".join(sorted({os.path.splitext(each.name)[1] or none for each in sources}))


def by_stem(sources: Sequence[Source], suffix: str = "") -> dict[str, list[Source]]:
    """Return files grouped by name without extension and suffix."""
    stems: dict[str, list[Source]] = {}
    for each in sources:
        stem = each.stem
        stems.setdefault(stem[: len(stem) - len(suffix)], []).append(each)
    return stems


def list_images(folder: Folder, image_format: str) -> list[Source]:
    """Return the images of one format in a folder, sorted by name.

    Parameters
    ----------
    folder : Folder
        Where to look.
    image_format : str
        A key of `IMAGE_FORMATS`; ``.tiff`` counts as tif and ``.jpeg`` as jpg, in uppercase or lowercase.

    Raises
    ------
    InputError
        If the folder is missing or contains no matching file.
    """
    entries = folder.files()
    images = of_type(entries, IMAGE_FORMATS[image_format])
    if not images:
        types = types_of(entries, "none")
        folders = "" if folder.recursive else ", ".join(folder.subfolders())
        raise InputError(
            f"expected {image_format} images in {folder.path}, found {len(entries)} files"
            f"{types and f' of type {types}'}{folders and f' and the folders {folders}'}; check the folder"
            f"{folders and ', set --recursive 1 to include its subfolders,'} or set --image_format"
        )
    return images


def list_channels(folder: Folder, suffixes: Sequence[str]) -> tuple[list[Source], list[tuple[str, str]]]:
    """Return the images with one file per channel, and the faults of incomplete images as pairs of file and reason.

    Parameters
    ----------
    folder : Folder
        Where to look.
    suffixes : sequence of str
        Suffix that each channel's file adds to the name of the image, in channel order. The files may have any format.

    Raises
    ------
    InputError
        If the folder is missing or contains no matching file.
    """
    entries = of_type(folder.files(), [extension for each in IMAGE_FORMATS.values() for extension in each])
    longest_first = sorted(map(composed, suffixes), key=len, reverse=True)
    groups: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        suffix = next((each for each in longest_first if entry.stem.endswith(each)), None)
        if suffix is not None:
            groups.setdefault(entry.stem[: -len(suffix)], {}).setdefault(suffix, []).append(entry.files[0])
    if not groups:
        raise InputError(
            f"expected images in {folder.path} whose names end in one of --channel_suffixes {','.join(suffixes)}, "
            f"found {len(entries)} images with other names; check the folder and the suffixes"
        )
    images, faults = [], []
    for stem, found in sorted(groups.items()):
        files = [found.get(composed(suffix), []) for suffix in suffixes]
        first = next(names[0] for names in files if names)
        for suffix, names in zip(suffixes, files):
            if len(names) != 1:
                what = f"found {' and '.join(map(os.path.basename, names)) or 'none'}"
                faults.append((first, f"{first}: expected one file for the channel {suffix} of {stem}, {what}"))
        if all(len(names) == 1 for names in files):
            images.append(Source(f"{stem}.tif", tuple(name for [name] in files)))
    return images, faults


def list_masks(folder: Folder, mask_format: Optional[str], suffix: str) -> list[Source]:
    """Return the masks in a folder whose names without extension end in `suffix`."""
    formats = [mask_format] if mask_format else list(MASK_FORMATS)
    extensions = {extension for name in formats for extension in MASK_FORMATS[name]}
    entries = folder.files()
    masks = [each for each in of_type(entries, extensions) if each.stem.endswith(suffix)]
    if not masks:
        found = types_of(entries, "no extension") or "nothing"
        raise InputError(
            f"expected {' or '.join(formats)} masks {f'whose names end in {suffix} ' * bool(suffix)}in {folder.path}, "
            f"found {len(entries)} files ({found}); check the folder (a JPEG mask has stray values and cannot be used)"
        )
    return masks


def composed(name: str) -> str:
    """Return a name with one character for each accented letter; macOS writes two characters."""
    return unicodedata.normalize("NFC", name)


def listed_stems(file: Path, option: str, images: Sequence[Source], folder: PathLike) -> set[str]:
    """Return the names without extension of the images that a text file lists, one per line, with or without extension.

    Raises
    ------
    InputError
        If the file cannot be read, or contains a name that is not in `images` or is listed more than once.
    """
    try:
        content = read_if_small(file)
    except OSError as error:
        raise InputError(f"cannot read {option} {file}: {cause_of(error)}") from error
    if content is None:
        raise InputError(f"expected {option} {file} to be a text file with one name per line, found something else")
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    names = [composed(os.fsdecode(line.strip())) for line in lines if line.strip()]
    stems = {form: image.stem for image in images for form in (composed(image.name), image.stem)}
    listed = collections.Counter(stems[name] for name in names if name in stems)
    unknown, repeated = [name for name in names if name not in stems], [name for name in listed if listed[name] > 1]
    for wrong, what in ((unknown, f"not in {folder}"), (repeated, "more than once")):
        if wrong:
            shown = ", ".join(printable(name[:LONGEST_NAME]) for name in wrong[:SHOWN_NAMES])
            shown += ", ..." * (len(wrong) > SHOWN_NAMES)
            raise InputError(f"expected names of images in {option} {file}, each once, found {shown} {what}")
    return set(listed)


def guess_suffix(images: Sequence[str], masks: Sequence[str]) -> str:
    """Return the advice to set ``--mask_suffix`` if that would pair most images that have no mask."""
    known = set(masks)
    starts = [stem for stem in images if masks and masks[0].startswith(stem)]
    suffix = masks[0][len(max(starts, key=len)) :] if starts else ""
    matched = sum(stem + suffix in known for stem in images)
    return f"; try --mask_suffix {suffix}" if suffix and 2 * matched > len(images) else ""


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    with contextlib.suppress(OSError):  # the entry may be a link to itself
        return entry.is_dir()
    return False


def read_image(
    filepath: PathLike, size: Optional[tuple[int, int]] = None, channels: Optional[int] = None, as_mask: bool = False
) -> np.ndarray:
    """Read an image file; parameters and errors are the same as for `ImageFile`.

    Returns
    -------
    ndarray, shape (H, W, C)
        In the file's own pixel type.
    """
    with ImageFile(filepath, size, channels, as_mask) as image:
        return next(image.windows([image.extent]))


def mask_fault(mask: "ImageFile") -> str:
    """Return why a file cannot contain class ids, judging by its header, or an empty string."""
    if mask.shape[2] != 1:
        found = f"expected a single-channel mask in {mask.path}, found {counted(mask.shape[2], 'channel')}"
        return f"{found}; save class ids as a grayscale image"
    if mask.lossy:
        return f"{mask.path} is compressed as {mask.lossy}, which changes class ids; save it losslessly"
    if mask.dtype.kind not in "biu":
        found = f"expected a mask of whole numbers in {mask.path}, found {mask.dtype}"
        return f"{found}; save class ids as whole numbers"
    return ""


class ImageFile(contextlib.AbstractContextManager["ImageFile"]):
    """An image file that is decoded window by window, so that it may be larger than memory; a context manager.

    Parameters
    ----------
    filepath : path
        TIFF, PNG or JPEG, whatever its extension.
    size : (int, int), optional
        Height and width, if known (from the mask). They, or `channels`, identify the channel axis of a TIFF that does
        not declare it.
    channels : int, optional
        Number of channels, if known (from the network).
    as_mask : bool
        Whether the pixels are class ids. If so, a palette image yields its indices, not its colors.
    no_data : float, optional
        Value of pixels without data, in addition to NaN and the value that the file declares.
    plane : Place
        The plane of a stack to read.

    Attributes
    ----------
    path : Path
    shape : (int, int, int)
        Height, width, channels.
    dtype : dtype
        The file's own pixel type, in native byte order.
    divisible : bool
        Whether a window can be read without decoding the entire file.
    lossy : str
        Name of the encoding if it may change values, such as JPEG; empty otherwise.
    no_data : float, optional
        Value of pixels without data. It is NaN in float images, whatever value the file uses. It is None for masks and
        for integer images without a no-data value.
    orientation : Orientation
        How the stored pixels are turned.
    placement : dict
        Position, size and orientation of the stored pixels, as arguments of `tifffile.imwrite`.
    notes : tuple of str
        What the user should know about how the file is read.

    Raises
    ------
    InputError
        If the file cannot be decoded or is not a 2-D image with channels.
    """

    def __init__(
        self,
        filepath: PathLike,
        size: Optional[tuple[int, int]] = None,
        channels: Optional[int] = None,
        as_mask: bool = False,
        no_data: Optional[float] = None,
        plane: Place = (),
    ) -> None:
        self.path, self._plane = Path(filepath), plane
        self.lossy, self.orientation = "", Orientation()
        self._declared_no_data: Optional[float] = None  # as a stored value
        self.notes: tuple[str, ...] = ()
        self.placement: dict[str, Any] = {}
        self._white: Optional[int] = None  # the stored value of black, if 0 is white
        self._open_file: Any = None  # a TiffFile
        self._keyframe: Any = None  # the page that contains the pixels
        self._channels: Optional[list[int]] = None
        with self._readable_errors():
            self._source = self._open(size, channels, as_mask)
            height, width, depth = self._source.shape
            self.shape = (width, height, depth) if self.orientation.transposed else (height, width, depth)
            self.dtype, self.divisible = self._source.dtype, not isinstance(self._source, _WholeImage)
            self._check_memory()
        self._set_no_data(as_mask, no_data)
        if self.orientation != Orientation():
            self.notes += ("turned upright, as their orientation tag requires",)
            self.placement.setdefault("extratags", []).append((ORIENTATION_TAG, "H", 1, self.orientation.code, True))

    def _set_no_data(self, as_mask: bool, no_data: Optional[float]) -> None:
        """Find the values of pixels without data, which `windows` replaces with a single one."""
        declared = self._declared_no_data
        if as_mask and declared is not None:
            self.notes += (f"{declared:g} is declared as no data; if it is not a class, --ignore_value leaves it out",)
        elif declared is not None and not math.isnan(declared):
            effect = "and left out" if fitting(declared, self.dtype) is not None else "but does not fit their type"
            self.notes += (f"{declared:g} is declared as no data {effect}",)
        fit = [fitting(value, self.dtype) for value in (declared, no_data) if value is not None and not as_mask]
        white = self._white or 0
        self._no_data_values = [float(int(value) ^ white) if white else value for value in fit if value is not None]
        self.no_data: Optional[float] = None
        if self.dtype.kind == "f" and not as_mask:
            self.no_data = math.nan
        elif self._no_data_values:
            self.no_data = self._no_data_values.pop(0)

    def _unified(self, pixels: np.ndarray) -> np.ndarray:
        """Return pixels in which all those without data have the same value."""
        for value in self._no_data_values:
            missing = pixels == value
            if missing.any():
                pixels = np.where(missing, pixels.dtype.type(self.no_data), pixels)
        return pixels

    def _check_memory(self) -> None:
        """Reject an image that can only be read in one piece and does not fit into memory."""
        if self.divisible or self.nbytes <= MEMORY_CHECK_BYTES:
            return
        gibibytes, free = self.nbytes / 2**30, free_host_memory()
        if self.nbytes > free:
            raise InputError(
                f"{self.path} can only be read in one piece, which takes {gibibytes:.1f} GiB of memory, found "
                f"{free / 2**30:.1f} GiB free; convert it to a tiled TIFF"
            )
        if self.nbytes > LARGE_IMAGE_BYTES:
            logging.info(
                "%s can only be read in one piece, which takes %.1f GiB of memory; "
                "a tiled or uncompressed TIFF takes less",
                self.path, gibibytes,
            )  # fmt: skip

    @property
    def pixel_size(self) -> Optional["PixelSize"]:
        """Size of the stored pixels; None if the file does not declare a length."""
        return None if self._open_file is None else _pixel_size(self._open_file, self._keyframe)

    def coordinates(self, rows: np.ndarray, columns: np.ndarray) -> Optional[np.ndarray]:
        """Return the map coordinates (N, 2) of positions in the image; None without a georeference.

        Whole numbers are pixel centers. The result is None for an image that its orientation tag turns, because the
        georeference applies to the stored pixels.
        """
        found = _georeference(self.placement) if self.orientation.code == 1 else None
        return None if found is None else np.stack([columns, rows, np.ones(len(rows))], axis=1) @ found.T

    @property
    def nbytes(self) -> int:
        """Size of the decoded image in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of the image as stored, which may be on its side."""
        height, width, _ = self.shape
        return (width, height) if self.orientation.transposed else (height, width)

    def stored_block(self, row: int, column: int, pixels: np.ndarray) -> tuple[int, int, np.ndarray]:
        """Return the stored row and column of a block of pixels (rows, columns, ...), and the block as stored."""
        window = slice(row, row + pixels.shape[0]), slice(column, column + pixels.shape[1])
        rows, columns = self.orientation.stored_window(window, self.shape)
        return rows.start, columns.start, self.orientation.stored(pixels)

    @property
    def extent(self) -> Window:
        """The window that covers the entire image."""
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
            Must not be modified. Pixels without data are `no_data`.

        Notes
        -----
        Each strip or tile of the file is decoded once, and the part that later windows need is kept until the last of
        them. Windows that overlap row by row therefore take memory for their overlap, and for the rows below it that
        the file's segments contain.
        """
        with self._readable_errors():
            for window in self._source.windows([self.orientation.stored_window(each, self.shape) for each in plan]):
                window = self.orientation.upright(window)
                if self._white is not None:
                    window = window ^ self.dtype.type(self._white)  # a subtraction, because all its bits are set
                yield self._unified(window if self._channels is None else window[..., self._channels])

    def select_channels(self, channels: Sequence[int]) -> None:
        """Restrict the image to some of the file's channels, counted from 0.

        Raises
        ------
        InputError
            If the file has too few channels.
        """
        if max(channels) >= self.shape[2]:
            raise InputError(
                f"expected at least {counted(max(channels) + 1, 'channel')} in {self.path}, found {self.shape[2]}"
            )
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
        """Turn any exception of a decoder into a one-line message that names the file."""
        try:
            yield
        except InputError:
            self.close()
            raise
        except Exception as error:  # every codec has its own exceptions, and a damaged file may raise any of them
            self.close()
            raise InputError(
                f"cannot read {self.path}: {error or type(error).__name__}; is it damaged or in another format?"
            ) from error

    def _open(self, size: Optional[tuple[int, int]], channels: Optional[int], as_mask: bool) -> Any:
        """Return the object that decodes windows of this file, an instance of one of the classes below.

        The content of the file decides which one, not its name.
        """
        if not self.path.is_file():
            missing = self.path.is_symlink() and not self.path.exists()
            target = f"a link to {os.readlink(self.path)}, which does not exist" if missing else "no regular file"
            raise InputError(f"expected an image file at {self.path}, found {target}; restore it or leave it out")
        with open(self.path, "rb") as file:
            start = file.read(len(PNG_SIGNATURE))
        if start[:4] in TIFF_SIGNATURES:
            return self._open_tiff(size, channels, as_mask)
        if start == PNG_SIGNATURE:
            described = _describe_png(self.path, as_mask)
        elif start[:3] == JPEG_SIGNATURE:
            self.lossy, described = "JPEG", _describe_jpeg(self.path)
        else:
            raise ValueError(f"expected a TIFF, PNG or JPEG, found {'another format' if start else 'an empty file'}")
        shape, dtype, decode, self.orientation, self.notes = described
        layout = AxisLayout.find(shape, "YXS"[: len(shape)], self.path, self._size_as_stored(size), channels)
        return _WholeImage(decode, dtype, layout)

    def _open_tiff(self, size: Optional[tuple[int, int]], channels: Optional[int], as_mask: bool) -> Any:
        import tifffile

        # Other files that this one refers to are not read, because one file is one image.
        self._open_file = tifffile.TiffFile(self.path, _multifile=False, is_mmstack=False, is_ndtiff=False)
        if self._plane:
            series: Any = _Plane.find(self._open_file, self._plane)
        else:
            series, self.notes = _full_resolution_series(self._open_file)
        page = self._keyframe = series.keyframe
        _check_tags(page)
        if LOSSY_COMPRESSION.search(name_of(page.compression)):
            self.lossy = name_of(page.compression)
        self.orientation = Orientation.of(page.tags.valueof(ORIENTATION_TAG, 1))
        self.placement, (more, self._white) = _placement(self._open_file, page), _photometric(page, as_mask)
        self.notes += more
        self._declare_no_data(page)
        layout = AxisLayout.find(series.shape, series.axes, self.path, self._size_as_stored(size), channels)
        _check_segments(series, os.path.getsize(self.path))
        if series.dataoffset is not None:
            return _ContiguousTiff(self.path, series, layout)
        if _SegmentedTiff.suits(series, layout):
            return _SegmentedTiff(series, layout)
        return _WholeImage(functools.partial(_decode_series, series), series.dtype, layout)

    def _declare_no_data(self, page: Any) -> None:
        """Read the TIFF tag for the value of pixels without data, which also fills strips missing from the file."""
        text = page.tags.valueof(NO_DATA_TAG)
        if text is None:
            return
        try:
            self._declared_no_data = float(text)
            value = fitting(self._declared_no_data, page.dtype)
            page.nodata = math.nan if page.dtype.kind == "f" and value is None else value or 0
        except (TypeError, ValueError):
            self.notes += (f"{text!r} is declared as no data, which is not a number and has no effect",)

    def _size_as_stored(self, size: Optional[tuple[int, int]]) -> Optional[tuple[int, int]]:
        return size and (size[::-1] if self.orientation.transposed else size)


class ChannelFiles(ImageFile):
    """An image with a separate file for each channel, read as if it were one file; a context manager.

    Pixels have the smallest type that can represent the pixels of all files without loss. The first file determines the
    placement of the image. Parameters and attributes are the same as for `ImageFile`, except for the list of files.

    Raises
    ------
    InputError
        If a file cannot be decoded, or the files do not match.
    """

    def __init__(
        self,
        files: Sequence[PathLike],
        size: Optional[tuple[int, int]] = None,
        no_data: Optional[float] = None,
        plane: Place = (),
    ) -> None:
        self._opened: list[ImageFile] = []
        try:
            for file in files:
                self._opened.append(ImageFile(file, size, 1, no_data=no_data, plane=plane))
            self._parts = list(self._opened)
            self._check_parts()
        except BaseException:
            self.close()
            raise
        first = self._parts[0]
        self.path, self.orientation, self.placement = first.path, first.orientation, first.placement
        self.shape = (*first.shape[:2], len(files))
        self.dtype = np.result_type(*(part.dtype for part in self._parts))
        self.divisible = all(part.divisible for part in self._parts)
        self.lossy = next((part.lossy for part in self._parts if part.lossy), "")
        self.no_data = math.nan if self.dtype.kind == "f" else first.no_data
        self.notes = tuple(dict.fromkeys(note for part in self._parts for note in part.notes))

    def _check_parts(self) -> None:
        """Reject files that are not channels of the same image."""
        first = self._parts[0]
        for part in self._parts:
            if part.shape[2] != 1:
                raise InputError(f"expected one channel in {part.path}, found {part.shape[2]}; check the suffixes")
            if (part.shape, part.orientation) != (first.shape, first.orientation):
                found = [
                    f"{each.path} with {' x '.join(map(str, each.shape[:2]))} and orientation {each.orientation.code}"
                    for each in (first, part)
                ]
                raise InputError(
                    f"expected channels of the same size and orientation, found {' but '.join(found)}; "
                    "resample them to one grid"
                )
        values = {part.no_data for part in self._parts}
        if len(values) > 1 and all(part.dtype.kind != "f" for part in self._parts):
            shown = ", ".join(
                f"{'none' if part.no_data is None else part.no_data} in {part.path}" for part in self._parts
            )
            raise InputError(
                f"expected channels with the same value for pixels without data, found {shown}; declare it in all "
                "files, or set --image_no_data"
            )

    @property
    def pixel_size(self) -> "Optional[PixelSize]":
        """Size of the stored pixels; None if the first file does not declare a length."""
        return self._parts[0].pixel_size

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        """Yield windows of the image in the order of a plan, as `ImageFile.windows` does."""
        for channels in zip(*(part.windows(plan) for part in self._parts)):
            window = np.empty((*channels[0].shape[:2], len(channels)), self.dtype)
            for index, (part, channel) in enumerate(zip(self._parts, channels)):
                window[..., index] = channel[..., 0]
                if part.no_data is not None and part.dtype.kind != "f" and self.dtype.kind == "f":
                    window[..., index][channel[..., 0] == part.no_data] = math.nan
            yield window

    def select_channels(self, channels: Sequence[int]) -> None:
        """Restrict the image to some of the files, counted from 0."""
        if max(channels) >= self.shape[2]:
            raise InputError(
                f"expected at least {counted(max(channels) + 1, 'channel')} of {self.path}, found {self.shape[2]}"
            )
        self._parts = [self._parts[channel] for channel in channels]
        self.shape = (*self.shape[:2], len(channels))

    def close(self) -> None:
        """Close the files; may be called twice."""
        for part in self._opened:
            part.close()


def fitting(value: float, dtype: np.dtype) -> Optional[float]:
    """Return a value as a pixel type represents it; None for NaN and for values that do not fit the type."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return None if math.isnan(value) else float(dtype.type(value))
    if dtype.kind in "iu" and float(value).is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        return value
    return None


def name_of(code: Any) -> str:
    """Return the name of a TIFF code, or the code as text if it is unknown."""
    return str(getattr(code, "name", code))


def clipped(window: Window, shape: Sequence[int]) -> Window:
    """Return the part of a window that is inside an image of shape (H, W, ...)."""
    rows, columns = (slice(part.start, min(part.stop, length)) for part, length in zip(window, shape))
    return rows, columns


def widened(window: Window, by: int, shape: Sequence[int]) -> Window:
    """Return a window with `by` more pixels on each side, clipped to an image of shape (H, W, ...)."""
    rows, columns = (slice(max(part.start - by, 0), min(part.stop + by, length)) for part, length in zip(window, shape))
    return rows, columns


def relative_window(window: Window, outer: Window) -> Window:
    """Return a window relative to the start of another window that contains it."""
    rows, columns = (slice(one.start - other.start, one.stop - other.start) for one, other in zip(window, outer))
    return rows, columns


def reflect_to(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return an array (H, W, ...) extended by reflection at the bottom and right to at least a size (H, W)."""
    missing = [(0, max(edge - length, 0)) for edge, length in zip(size, array.shape)]
    return np.pad(array, [*missing, *[(0, 0)] * (array.ndim - 2)], mode="reflect") if np.any(missing) else array


class AxisLayout(NamedTuple):
    """How the array in a file becomes (H, W, C): its shape without axes of length 1, and the channel axis."""

    squeezed: tuple[int, ...]
    channel_axis: Optional[int]

    @classmethod
    def find(
        cls, shape: tuple[int, ...], axes: str, path: Path, size: Optional[tuple[int, int]], channels: Optional[int]
    ) -> "AxisLayout":
        """Find the channel axis by its letter in tifffile's axes, otherwise by known size or number of channels."""
        if 0 in shape or len(shape) < 2:
            raise InputError(f"expected an image in {path}, found an array of shape {shape}; is the file damaged?")
        keep = [axis for axis, length in enumerate(shape) if length > 1 or axes[axis] in "YX"]
        axes, squeezed = "".join(axes[axis] for axis in keep), tuple(shape[axis] for axis in keep)
        if len(squeezed) == 2:
            return cls(squeezed, None)
        if len(squeezed) != 3 or any(axis in "ZTI" for axis in axes):
            found = f"found axes {axes}"
            if axes == "IYX":
                found = f"found {squeezed[0]} pages without axes"
            raise InputError(
                f"expected a 2-D image with channels in {path}, {found} of shape {squeezed}; set --stack planes, or "
                "save channels with the axes CYX"
            )
        channel_axis = next((axis for axis in range(3) if axes[axis] in "SC"), None)
        if channel_axis is None and size is not None:
            channel_axis = {size == squeezed[:2]: 2, size == squeezed[1:]: 0}.get(True)
        elif channel_axis is None and channels is not None and squeezed.count(channels) == 1:
            channel_axis = squeezed.index(channels)
        if channel_axis is None:  # nothing identifies the channel axis: assume the shortest one
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


class Orientation(NamedTuple):
    """How to turn stored pixels to make the image upright: transposed first, then reversed along its axes.

    The pixels of an `ImageFile` are upright. The pixels of a result must be stored in the orientation of the file.
    """

    transposed: bool = False
    reversed_rows: bool = False
    reversed_columns: bool = False

    @classmethod
    def of(cls, code: Any) -> "Orientation":
        """Return the orientation for a TIFF or EXIF code from 1 to 8; other codes mean that nothing is turned."""
        return cls(*ORIENTATIONS[code - 1]) if code in range(1, 9) else cls()

    @property
    def code(self) -> int:
        """The TIFF and EXIF code."""
        return 1 + ORIENTATIONS.index((self.transposed, self.reversed_rows, self.reversed_columns))

    @classmethod
    def of_exif(cls, exif: bytes) -> "Orientation":
        """Return the orientation in EXIF data."""
        from PIL import Image

        loaded = Image.Exif()
        loaded.load(exif)
        return cls.of(loaded.get(ORIENTATION_TAG, 1))

    def upright(self, stored: np.ndarray) -> np.ndarray:
        """Return an upright view of stored pixels (H, W, ...)."""
        turned = stored.swapaxes(0, 1) if self.transposed else stored
        return turned[:: -1 if self.reversed_rows else 1, :: -1 if self.reversed_columns else 1]

    def stored(self, upright: np.ndarray) -> np.ndarray:
        """Return a view of upright pixels (H, W, ...) in their stored orientation."""
        turned = upright[:: -1 if self.reversed_rows else 1, :: -1 if self.reversed_columns else 1]
        return turned.swapaxes(0, 1) if self.transposed else turned

    def stored_window(self, window: Window, shape: Sequence[int]) -> Window:
        """Return where a window of the upright image, of shape (H, W, ...), is stored."""
        backwards = self.reversed_rows, self.reversed_columns
        rows, columns = (
            slice(length - part.stop, length - part.start) if turned else part
            for part, length, turned in zip(window, shape, backwards)
        )
        return (columns, rows) if self.transposed else (rows, columns)


class _WholeImage:
    """An image that is decoded in one piece when its first window is requested, and then kept in memory."""

    def __init__(self, decode: Callable[[], np.ndarray], dtype: np.dtype, layout: AxisLayout) -> None:
        self._decode, self._layout = decode, layout
        self.shape, self.dtype = layout.image_shape, dtype.newbyteorder("=")

    @functools.cached_property
    def _array(self) -> np.ndarray:
        return self._layout.channels_last(self._decode())

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        return (self._array[window].astype(self.dtype, copy=False) for window in plan)


class _ContiguousTiff:
    """Pixels that are stored uncompressed, one after another."""

    def __init__(self, path: Path, series: Any, layout: AxisLayout) -> None:
        self._path, self._offset, self._layout = path, series.dataoffset, layout
        self._file_dtype = np.dtype(series.keyframe.parent.byteorder + series.dtype.char)
        of_stack: tuple[tuple[int, ...], tuple[Any, ...]] = getattr(series, "of_stack", (series.shape, ()))
        self._file_shape, self._index = of_stack
        self.shape, self.dtype = layout.image_shape, series.dtype.newbyteorder("=")
        self._map()  # raises if the file is too short

    def _map(self) -> np.ndarray:
        memory = np.memmap(self._path, self._file_dtype, "r", self._offset, self._file_shape)
        return self._layout.channels_last(memory[self._index])

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        # Map again for each window, because the pages of a permanent map would count as memory of this process.
        return (np.array(self._map()[window], self.dtype) for window in plan)


class DecodedSegment(NamedTuple):
    """Pixels (rows, columns, samples) of a strip or tile, and where in the image they start."""

    pixels: np.ndarray
    row: int
    column: int
    channel: int

    def from_row(self, row: int) -> "DecodedSegment":
        """Return the segment without the rows above `row`, which frees their memory."""
        return self if row <= self.row else self._replace(pixels=self.pixels[row - self.row :].copy(), row=row)


class _SegmentedTiff:
    """Strips or tiles, in one page with any number of samples, or in one page for each channel."""

    def __init__(self, series: Any, layout: AxisLayout) -> None:
        self._series, self._pages, self._keyframe = series, list(series.pages), series.keyframe
        self.shape, self.dtype = layout.image_shape, series.dtype.newbyteorder("=")
        page, (height, width, _) = self._keyframe, self.shape
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        self._down, self._across = -(-height // rows), -(-width // columns)
        self._segment_shape = (min(rows, height), min(columns, width))

    @staticmethod
    def suits(series: Any, layout: AxisLayout) -> bool:
        """Return whether the channels are either the samples of one page or separate pages."""
        page = series.keyframe
        if page.imagedepth != 1 or len(page.dataoffsets) < 2 or any(each is None for each in series.pages):
            return False
        if len(series.pages) == 1:
            return layout.channel_axis is None or page.samplesperpixel > 1
        return layout.channel_axis == 0 and layout.squeezed[0] == len(series.pages) and page.samplesperpixel == 1

    def windows(self, plan: Sequence[Window]) -> Iterator[np.ndarray]:
        first_rows: dict[tuple[int, int], list[int]] = {}  # of the windows that share a segment, the next window last
        for window in reversed(plan):
            for segment in self._segments(window):
                first_rows.setdefault(segment, []).append(window[0].start)
        held: dict[tuple[int, int], DecodedSegment] = {}
        _check_first_segment(self._series)

        def fetch(segment: tuple[int, int]) -> DecodedSegment:
            decoded = held.pop(segment, None) or self._decode(*segment)
            first_rows[segment].pop()
            if first_rows[segment]:
                held[segment] = decoded.from_row(min(first_rows[segment]))
            return decoded

        for window in plan:
            yield self._cut(window, fetch)

    def _segments(self, window: Window) -> Iterator[tuple[int, int]]:
        """Yield the page and index of each segment that overlaps a window."""
        rows, columns = (
            range(part.start // length, -(-part.stop // length)) for part, length in zip(window, self._segment_shape)
        )
        for number, page in enumerate(self._pages):
            for plane in range(len(page.dataoffsets) // (self._down * self._across)):
                for row in rows:
                    start = (plane * self._down + row) * self._across
                    yield from ((number, start + column) for column in columns)

    def _cut(self, window: Window, fetch: Callable[[tuple[int, int]], DecodedSegment]) -> np.ndarray:
        """Return a window assembled from its segments."""
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
        if pixels is None:  # missing from the file
            pixels = np.broadcast_to(self.dtype.type(self._keyframe.nodata), shape)
        return DecodedSegment(pixels[0], row, column, number + sample)


class _Plane:
    """A plane of a TIFF series that can be used like a series, as far as this module needs.

    Attributes
    ----------
    of_stack : (tuple, tuple)
        The shape of all planes together, and the index of this plane in it.
    """

    def __init__(self, series: Any, places: Mapping[str, int]) -> None:
        index = tuple(places.get(axis.lower(), slice(None)) for axis in series.axes)
        kept = [axis for axis, place in enumerate(index) if isinstance(place, slice)]
        self.axes = "".join(series.axes[axis] for axis in kept)
        self.shape = tuple(series.shape[axis] for axis in kept)
        self.keyframe, self.dtype, self.dataoffset = series.keyframe, series.dtype, series.dataoffset
        self.of_stack = series.shape, index
        if series.dataoffset is None:
            leading = [math.prod(series.shape[:axis]) for axis in range(len(series.shape))].index(len(series.pages))
            numbers = np.arange(len(series.pages)).reshape(series.shape[:leading])
            self.pages = [series.pages[int(number)] for number in numbers[index[:leading]].ravel()]
        else:
            self.pages = [series.keyframe]

    @classmethod
    def find(cls, file: Any, plane: Place) -> "_Plane":
        """Return the plane of a file at a place from `StackLayout`."""
        places = dict(plane)
        return cls(_scenes(file)[places.pop(SCENE_AXIS, 0)], places)

    def asarray(self) -> np.ndarray:
        """Return the pixels."""
        return np.stack([page.asarray() for page in self.pages]).reshape(self.shape)


def _scenes(file: Any) -> list[Any]:
    """Return the series of a TIFF that are separate images: all images of an OME file, otherwise only the largest."""
    series = [each for each in file.series if not each.keyframe.subfiletype & (REDUCED_IMAGE | TRANSPARENCY_MASK)]
    return series if file.is_ome and len(series) > 1 else [_full_resolution_series(file)[0]]


class StackLayout(NamedTuple):
    """Letters and lengths of the plane axes of each image in a TIFF, slowest first; sizes of pixels and steps."""

    scenes: list[list[tuple[str, int]]]
    sizes: list[dict[str, Any]]  # of pixels and steps in each scene, under their OME names

    @property
    def is_named(self) -> bool:
        """Whether all axes have a name."""
        return not any(axis in UNNAMED_AXES for scene in self.scenes for axis, _ in scene)

    @property
    def planes(self) -> list[Place]:
        """The places of all planes in order; a single empty place if the file is not a stack."""
        planes: list[Place] = []
        for number, scene in enumerate(self.scenes):
            letters, start = [axis for axis, _ in scene], [(SCENE_AXIS, number)] * (len(self.scenes) > 1)
            for places in itertools.product(*(range(length) for _, length in scene)):
                planes.append((*start, *zip(letters, places)))
        return planes

    @classmethod
    def of(cls, path: PathLike) -> "StackLayout":
        """Read the layout of a file.

        Raises
        ------
        InputError
            If the file cannot be read, or its axes are not stack axes.
        """
        import tifffile

        try:
            with open(path, "rb") as opened:
                if opened.read(4) not in TIFF_SIGNATURES:
                    return cls([[]], [{}])
            with tifffile.TiffFile(path, _multifile=False, is_mmstack=False, is_ndtiff=False) as file:
                found = [(each.axes, each.shape) for each in _scenes(file)]
                sizes = _sizes_of_stack(file, len(found))
        except Exception as error:  # a damaged file may raise any exception
            raise InputError(f"cannot read {path}: {error or type(error).__name__}; is it damaged?") from error
        scenes = []
        for axes, shape in found:
            scenes.append(
                [(axis.lower(), length) for axis, length in zip(axes, shape) if axis not in "YXSC" and length > 1]
            )
            letters = {axis for axis, _ in scenes[-1]}
            if len(letters) < len(scenes[-1]) or not letters <= set(STACK_AXES):
                raise InputError(
                    f"expected a stack with the axes {', '.join(STACK_AXES.upper())} in {path}, found {axes} of shape "
                    f"{shape}; save it as OME-TIFF, or each plane as a separate file"
                )
        return cls(scenes, sizes)


def _sizes_of_stack(file: Any, scenes: int) -> list[dict[str, Any]]:
    """Return the pixel sizes and the steps between planes that a TIFF declares, under their OME names."""
    if file.is_ome:
        with contextlib.suppress(ElementTree.ParseError):
            described = [pixels.attrib for pixels in ElementTree.fromstring(file.ome_metadata).iterfind(".//{*}Pixels")]
            if len(described) == scenes:
                return [
                    {name: each[name] for name in each if re.match("PhysicalSize|TimeIncrement", name)}
                    for each in described
                ]
    size, imagej = _pixel_size(file, file.pages[0]), file.imagej_metadata or {}
    if size is None:
        return [{}] * scenes
    sizes: dict[str, Any] = {"PhysicalSizeX": size.width, "PhysicalSizeY": size.height}
    sizes.update({"PhysicalSizeZ": imagej["spacing"]} if "spacing" in imagej else {})
    return [{**sizes, **{f"{name}Unit": size.unit for name in sizes}}] * scenes


def paired_planes(image: Source, mask: Source) -> list[tuple[Source, Source]]:
    """Return each plane of an image with the matching plane of its mask; unnamed axes of a mask match by order.

    Raises
    ------
    InputError
        If the image and the mask do not have the same planes.
    """
    planes, others = image.planes(), mask.planes()
    by_place = {frozenset(each.plane): each for each in others}
    if all(frozenset(each.plane) in by_place for each in planes) and len(planes) == len(others):
        return [(each, by_place[frozenset(each.plane)]) for each in planes]
    unnamed = all(axis in UNNAMED_AXES for axis, _ in others[0].plane)
    if len(planes) != len(others) or not unnamed:
        shown = [f"{len(each)} ({each[0].place} to {each[-1].place})" for each in (planes, others)]
        raise InputError(f"expected the same planes in {image} and {mask}, found {shown[0]} and {shown[1]}")
    return list(zip(planes, others))


def _full_resolution_series(file: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the largest image of a TIFF that is not a reduced copy or mask of another, and notes about it."""
    candidates = [each for each in file.series if not each.keyframe.subfiletype & (REDUCED_IMAGE | TRANSPARENCY_MASK)]
    best = max(candidates or file.series, key=lambda each: each.keyframe.imagelength * each.keyframe.imagewidth)
    count = len(file.series)
    return best, (f"the largest of {count} images in the file is used",) if count > 1 else ()


def _check_segments(series: Any, file_bytes: int) -> None:
    """Reject a TIFF whose tables list fewer strips or tiles than its image has, or some that are not in the file.

    Decoders would return whatever is in memory as pixels. A segment of zero bytes was left out and has no data.
    """
    pages = [each for each in series.pages if each is not None]
    if len(pages) < len(series.pages) and series.dataoffset is None:
        raise ValueError("some of its pages are missing")
    if not any(code in series.keyframe.tags for code in BYTE_COUNT_TAGS):
        raise ValueError("it has no table of the strip or tile lengths")
    needed, longest = math.prod(series.keyframe.chunked), _uncompressed_bytes(series.keyframe)
    for page in pages:
        if min(len(page.dataoffsets), len(page.databytecounts)) < needed:
            raise ValueError(f"it lists {len(page.dataoffsets)} of the {needed} strips or tiles of its image")
        places = [(offset, count) for offset, count in zip(page.dataoffsets, page.databytecounts) if count]
        if max((offset + count for offset, count in places), default=0) > file_bytes:
            raise ValueError("some of its strips or tiles lie beyond the end of the file")
        if min(places, default=(TIFF_HEADER_BYTES, 0))[0] < TIFF_HEADER_BYTES:
            raise ValueError("some of its strips or tiles lie in its header")
        if max(page.databytecounts) >= 2 * longest:
            raise ValueError("its strips or tiles are longer than its size and pixel type allow")


def _check_tags(page: Any) -> None:
    """Reject a TIFF with a damaged tag about its pixel storage, because tifffile would assume the default."""
    file, tiff = page.parent.filehandle, page.parent.tiff
    file.seek(page.offset)
    [count] = struct.unpack(tiff.tagnoformat, file.read(tiff.tagnosize))
    codes = {struct.unpack(f"{tiff.byteorder}H", file.read(tiff.tagsize)[:2])[0] for _ in range(count)}
    missing = TILE_TAGS - codes if codes & TILE_TAGS else set()
    damaged = sorted(missing | codes & PIXEL_TAGS - set(page.tags.keys()))
    for code in codes.intersection(TAGS_OF_SAMPLES).difference(damaged):
        damaged += [code] if page.tags[code].count not in (1, page.samplesperpixel) else []
    if damaged or page.planarconfig not in (None, *PLANAR_CONFIGURATIONS):
        raise ValueError(f"its tag {[*damaged, PLANAR_TAG][0]} is damaged or missing")


def _check_first_segment(series: Any) -> None:
    """Reject a TIFF whose first strip or tile has more pixels than its tags allow.

    Its width, bits or samples are damaged in that case. Decoders discard the excess and return wrong pixels.
    """
    import tifffile

    page = series.keyframe
    if page.compression in JPEG_COMPRESSIONS and page.bitspersample < 8:
        raise ValueError(f"it declares {page.bitspersample} bits per sample, which a JPEG cannot have")
    if page.compression not in BYTEWISE_COMPRESSIONS or name_of(page.photometric) == "YCBCR":
        return
    file, most = page.parent.filehandle, math.prod(_rows_of_segment(page)) + SEGMENT_PADDING
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        if count:
            file.seek(offset)
            if len(tifffile.TIFF.DECOMPRESSORS[page.compression](file.read(count), out=most + 1)) > most:
                raise ValueError("its first strip or tile contains more pixels than its tags allow")
            return


def _decode_series(series: Any) -> np.ndarray:
    """Return all pixels of a TIFF series."""
    _check_first_segment(series)
    pixels: np.ndarray = series.asarray()
    return pixels


def _rows_of_segment(page: Any) -> tuple[int, int]:
    """Return the number of rows in a full strip or tile of a TIFF, and the bytes of an uncompressed row."""
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    return rows, -(-math.prod(page.chunks) // rows * page.bitspersample // 8)


def _uncompressed_bytes(page: Any) -> float:
    """Return the length of a strip or tile of an uncompressed TIFF; infinity for a compressed one."""
    return float(math.prod(_rows_of_segment(page))) if page.compression == 1 else math.inf


def _photometric(page: Any, as_mask: bool) -> tuple[tuple[str, ...], Optional[int]]:
    """Return notes about the meaning of a TIFF's values, and the value of black in an image whose 0 is white."""
    name = name_of(page.photometric)
    if name == "MINISWHITE":
        if as_mask or page.dtype.kind not in "bu":
            return ("used as stored, although the file declares that 0 is white",), None
        return ("inverted, because the file declares that 0 is white",), 2**page.bitspersample - 1
    in_colors = name == "YCBCR" and LOSSY_COMPRESSION.search(name_of(page.compression))  # after decoding
    if name in ("MINISBLACK", "RGB", "CFA") or in_colors or (name == "PALETTE" and as_mask):
        return (), None
    return (f"used as stored, although the file declares the values as {name}",), None


def _placement(file: Any, page: Any) -> dict[str, Any]:
    """Return the position and size of a TIFF's pixels, as arguments of `tifffile.imwrite`."""
    placement: dict[str, Any] = {}
    if "XResolution" in page.tags:
        placement.update(resolution=page.resolution, resolutionunit=int(page.resolutionunit))
    declared = _ome_pixel_size(file)
    if declared is not None and declared.unit in PER_CENTIMETER:
        per_centimeter = [PER_CENTIMETER[declared.unit] / edge for edge in (declared.width, declared.height)]
        placement.update(resolution=tuple(per_centimeter), resolutionunit=RESOLUTION_PER_CENTIMETER)
    tags = (page.tags.get(code) for code in PLACEMENT_TAGS)
    placement["extratags"] = [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags if tag is not None]
    unit = (file.imagej_metadata or {}).get("unit") if file.is_imagej else None
    if unit:  # ImageJ has no code for the unit, but reads it from the description
        placement["description"] = f"ImageJ=1.53t\nunit={unit}\n"
    return placement


def _georeference(placement: Mapping[str, Any]) -> Optional[np.ndarray]:
    """Return the matrix (2, 3) that maps (column, row, 1) of a pixel center to coordinates; None without one."""
    tags = {tag[0]: tag[3] for tag in placement.get("extratags", ())}
    with contextlib.suppress(Exception):  # damaged tags may raise anything, but the pixels do not depend on them
        if TRANSFORMATION_TAG in tags:
            to_map = np.reshape(tags[TRANSFORMATION_TAG], (4, 4))[:2, [0, 1, 3]].astype(np.float64)
        else:
            (across, down, _), tie = tags[PIXEL_SCALE_TAG], tags[TIE_POINTS_TAG]
            to_map = np.array([[across, 0, tie[3] - across * tie[0]], [0, -down, tie[4] + down * tie[1]]], np.float64)
        keys = np.reshape(tags[GEO_KEYS_TAG], (-1, 4))
        if not np.any((keys[:, 0] == RASTER_TYPE_KEY) & (keys[:, 3] == PIXEL_IS_POINT)):
            to_map[:, 2] += to_map[:, :2].sum(axis=1) / 2  # the tags refer to the corners of pixels
        return to_map if np.isfinite(to_map).all() else None
    return None


class PixelSize(NamedTuple):
    """The edge lengths of a pixel, and their unit."""

    height: float
    width: float
    unit: str

    @property
    def area(self) -> float:
        """Area of a pixel in square units."""
        return self.height * self.width

    @classmethod
    def of(cls, height: Any, width: Any, unit: Any) -> "Optional[PixelSize]":
        """Return the size, or None if it is not valid."""
        size = cls(float(height), float(width), UNIT_NAMES.get(str(unit).strip(), str(unit).strip()))
        return size if size.unit and 0 < size.height < math.inf and 0 < size.width < math.inf else None


def _pixel_size(file: Any, page: Any) -> Optional[PixelSize]:
    """Return the pixel size of a TIFF; None if it does not declare a length.

    Dots per inch do not count, because programs write 72 or 96 dots per inch into files of unknown scale.
    """
    with contextlib.suppress(Exception):  # damaged tags may raise anything, but the pixels do not depend on them
        found = _ome_pixel_size(file) or _geographic_pixel_size(page)
        if found is not None:
            return found
        per_unit = page.resolution
        if file.is_imagej:
            return PixelSize.of(1 / per_unit[1], 1 / per_unit[0], (file.imagej_metadata or {}).get("unit", ""))
        if "XResolution" in page.tags and int(page.resolutionunit) == RESOLUTION_PER_CENTIMETER:
            micrometers = PER_CENTIMETER["µm"]
            return PixelSize.of(micrometers / per_unit[1], micrometers / per_unit[0], "µm")
    return None


def _ome_pixel_size(file: Any) -> Optional[PixelSize]:
    """Return the pixel size that OME metadata declare."""
    if not file.is_ome:
        return None
    with contextlib.suppress(ElementTree.ParseError, TypeError, ValueError):
        pixels = ElementTree.fromstring(file.ome_metadata).find(".//{*}Pixels")
        described = {} if pixels is None else pixels.attrib
        units = {described.get(f"PhysicalSize{axis}Unit", "µm") for axis in "YX"}
        if len(units) == 1:
            return PixelSize.of(described.get("PhysicalSizeY"), described.get("PhysicalSizeX"), units.pop())
    return None


def _geographic_pixel_size(page: Any) -> Optional[PixelSize]:
    """Return the pixel size of a GeoTIFF in a projected coordinate system; None without a known unit."""
    tags = page.geotiff_tags if page.is_geotiff else {}
    unit = LINEAR_UNITS.get(int(tags.get("ProjLinearUnitsGeoKey", 0)), "")
    if int(tags.get("GTModelTypeGeoKey", 0)) != PROJECTED_MODEL:
        return None
    if "ModelPixelScale" in tags:
        width, height, *_ = tags["ModelPixelScale"]
        return PixelSize.of(height, width, unit)
    if "ModelTransformation" in tags:  # its columns are the steps per column and per row
        steps = np.reshape(tags["ModelTransformation"], (4, 4))[:2, :2]
        width, height = np.linalg.norm(steps, axis=0)
        return PixelSize.of(height, width, unit)
    return None


class Described(NamedTuple):
    """A PNG or JPEG: shape and pixel type of its array, its decoder, its orientation, and notes about it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    decode: Callable[[], np.ndarray]
    orientation: Orientation
    notes: tuple[str, ...] = ()


def _describe_jpeg(path: Path) -> Described:
    from PIL import Image  # comes with scikit-image

    Image.MAX_IMAGE_PIXELS = None  # this suite is meant for large images, which are not an attack

    def open_picture() -> Any:
        return Image.open(path, formats=["JPEG"])

    def decode() -> np.ndarray:
        with open_picture() as picture:
            return np.asarray(picture)

    with open_picture() as picture:
        (width, height), orientation = picture.size, Orientation.of(picture.getexif().get(ORIENTATION_TAG, 1))
        pixel = np.asarray(Image.new(picture.mode, (1, 1)))
    return Described((height, width, *pixel.shape[2:]), pixel.dtype, decode, orientation)


def _describe_png(path: Path, as_mask: bool) -> Described:
    """Describe a PNG from the chunks before its pixels.

    A palette yields colors, or indices in a mask. libpng decodes indices if the header declares them as grayscale.
    """
    with open(path, "rb") as file:
        chunks = dict(_png_chunks(file, b"IDAT"))
    width, height, bits, color = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    stored_samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    if height * (1 + width * stored_samples * bits // 8) > DEFLATE_RATIO * os.path.getsize(path):
        raise ValueError(f"its header claims {height} x {width} pixels, for which the file is too small")
    samples = 3 if color == 3 and not as_mask else stored_samples
    steps = 255 // (2**bits - 1) if as_mask and bits < 8 else 1  # libpng scales gray values of fewer bits to 8 bits

    def decode() -> np.ndarray:
        import imagecodecs

        content: Any = path.read_bytes()
        if b"tRNS" in chunks or (color == 3 and as_mask):
            content = _rewritten_png(content, as_gray=color == 3 and as_mask)
        else:
            collections.deque(_png_chunks(io.BytesIO(content)), 0)  # verify the checksums
        pixels = imagecodecs.png_decode(content)
        return pixels // steps if steps > 1 else pixels

    shape = (height, width) if samples == 1 else (height, width, samples)
    notes = ("the transparent color is used like any other",) if b"tRNS" in chunks else ()
    orientation = Orientation.of_exif(chunks[b"eXIf"]) if b"eXIf" in chunks else Orientation()
    return Described(shape, np.dtype(np.uint16 if bits == 16 else np.uint8), decode, orientation, notes)


def _png_chunks(file: IO[bytes], before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of the chunks of a PNG, up to its end or to the first chunk of kind `before`.

    Raises
    ------
    ValueError
        If the file is cut short, or a checksum is wrong. Decoders do not check all of them.
    """
    file.seek(len(PNG_SIGNATURE))
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", _read_exactly(file, 8))
        if kind == before:
            return
        content = _read_exactly(file, length)
        if struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))) != _read_exactly(file, 4):
            raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} is wrong")
        yield kind, content


def _read_exactly(file: IO[bytes], count: int) -> bytes:
    """Return the next bytes of a file; raise `ValueError` if it has fewer."""
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it is cut short")
    return content


def _rewritten_png(content: bytes, as_gray: bool) -> bytearray:
    """Return a PNG without its transparent color and, if `as_gray`, with palette indices declared as grayscale."""
    result = bytearray(PNG_SIGNATURE)
    for kind, data in _png_chunks(io.BytesIO(content)):
        if kind == b"IHDR" and as_gray:
            data = data[:9] + b"\0" + data[10:]
        if kind != b"tRNS" and not (kind == b"PLTE" and as_gray):
            checksum = struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
            result += struct.pack(">I", len(data)) + kind + data + checksum
    return result


# ---------------------------------------------------------------------------------------------- normalization


class UnusablePixels(InputError):
    """An image contains infinity, or values too large for float32 sums."""


def without_data(pixels: np.ndarray, no_data: Optional[float]) -> Optional[np.ndarray]:
    """Return which pixels of an array of any shape have no data; None if all have data.

    `no_data` is the value of pixels without data, as in `ImageFile`.
    """
    if no_data is None:
        return None
    missing: np.ndarray = np.isnan(pixels) if math.isnan(no_data) else pixels == no_data
    return missing if missing.any() else None


class ChannelStatistics(NamedTuple):
    """Statistics of each channel of an image, all arrays of shape (C,); pixels without data are left out.

    Attributes
    ----------
    mean, deviation : ndarray of float64
        0 if no pixel has data.
    minimum, maximum : ndarray of float64
        Infinity and minus infinity if no pixel has data.
    valid : ndarray of int64
        Number of pixels with data.
    """

    mean: np.ndarray
    deviation: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    valid: np.ndarray

    @classmethod
    def measure(cls, blocks: Iterable[np.ndarray], no_data: Optional[float] = None) -> "ChannelStatistics":
        """Return the statistics of an image.

        Parameters
        ----------
        blocks : iterable of ndarray, shape (rows, columns, C)
            The parts of the image, of any real dtype.
        no_data : float, optional
            Value of pixels without data; may be NaN.

        Notes
        -----
        Count, mean and sum of squared deviations of the parts are combined (Chan, Golub and LeVeque, 1983), all in
        float64.
        """
        count, mean, squares = np.zeros((), np.int64), np.zeros(()), np.zeros(())
        minimum, maximum = np.array(np.inf), np.array(-np.inf)
        for block in blocks:
            planes = np.ascontiguousarray(block.reshape(-1, block.shape[2]).T, np.float64)
            missing = without_data(planes, no_data)
            valid: Any = True if missing is None else ~missing
            minimum = np.minimum(minimum, planes.min(1, initial=np.inf, where=valid))
            maximum = np.maximum(maximum, planes.max(1, initial=-np.inf, where=valid))
            added = np.full(len(planes), planes.shape[1]) if missing is None else valid.sum(1)
            block_mean = planes.sum(1, where=valid) / np.maximum(added, 1)
            planes -= block_mean[:, None]
            total = count + added
            share = added / np.maximum(total, 1)
            squares = squares + np.square(block_mean - mean) * count * share
            squares += np.square(planes, out=planes).sum(1, where=valid)
            mean = mean + (block_mean - mean) * share
            count = total
        return cls(mean, np.sqrt(squares / np.maximum(count, 1)), minimum, maximum, count)

    @classmethod
    def of_file(cls, image: ImageFile, pixels: Optional[np.ndarray] = None) -> "ChannelStatistics":
        """Return the statistics of an image file, which is read once, from top to bottom.

        They depend only on the pixels, to the last bit, not on how the file stores them.

        Parameters
        ----------
        image : ImageFile
            An open file with its channels selected.
        pixels : ndarray, shape (H, W, C), optional
            The complete image, if it has already been read.

        Raises
        ------
        UnusablePixels
            If a pixel is infinite or too large for computation in float32.
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
            statistics = cls.measure(blocks(), image.no_data)
        progress.close()
        lowest, highest = statistics.minimum.min(), statistics.maximum.max()
        if max(-lowest, highest) > MAX_MAGNITUDE and statistics.valid.any():
            worst = float(lowest if -lowest > MAX_MAGNITUDE else highest)  # with all digits, so that it can be typed
            raise UnusablePixels(
                f"expected values of at most {MAX_MAGNITUDE:g} in {image.path}, found {worst}; if these pixels have no "
                f"data, set --image_no_data={worst}"
            )
        return statistics


def normalize(
    pixels: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    floor: Any = 1.0,
    out: Optional[np.ndarray] = None,
    missing: Optional[np.ndarray] = None,
) -> np.ndarray:
    """Return the z-scores of pixels: their difference from the mean, in standard deviations.

    Training and inference pass the statistics of the complete image even if `pixels` is only a part of it, so that the
    network sees the same numbers in both.

    Parameters
    ----------
    pixels : ndarray, shape (H, W, C)
        Any real dtype.
    mean, deviation : ndarray of float64, shape (C,)
        Statistics of the complete image.
    floor : ndarray of shape (C,), or float
        Replaces a smaller deviation, because an empty image must not become amplified noise.
    out : ndarray of float32, shape (H, W, C), optional
        Array for the result.
    missing : ndarray of bool, shape (H, W, C), optional
        Pixels without data, from `without_data`.

    Returns
    -------
    ndarray of float32, shape (H, W, C)
        0 for pixels without data. The others have mean 0 and standard deviation 1 if `pixels` is the complete image.

    Notes
    -----
    The part of the mean that float32 rounds off is subtracted separately if it is large enough to matter. Types that
    float32 would round before the subtraction, such as int32 and float64, are centered in float64.
    """
    out = np.empty(pixels.shape, np.float32) if out is None else out
    center = mean.astype(np.float64 if pixels.dtype == np.float64 else np.float32)
    factor = np.float32(1 / np.maximum(deviation, floor))
    rest = np.float32(mean - center)
    shows = (np.abs(rest) * factor).max() > MEAN_TOLERANCE
    exact = np.float32 if np.can_cast(pixels.dtype, np.float32) else np.float64
    for source, target, *values in _lines_of_channels(pixels, out, center, rest, factor):
        np.subtract(source, values[0], out=target, dtype=exact, casting="unsafe")
        if shows:
            np.subtract(target, values[1], out=target)
        np.multiply(target, values[2], out=target)
    if missing is not None:
        out[missing] = 0
    return out


def _lines_of_channels(pixels: np.ndarray, out: np.ndarray, *values: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Yield arrays of pixels and results in memory order, with the matching values of their channels."""
    height, width, channels = pixels.shape
    if channels > 1 and pixels.flags.c_contiguous and out.flags.c_contiguous:
        # Process all channels at once in memory order, because one at a time would skip from pixel to pixel.
        lines = height, width * channels
        yield (pixels.reshape(lines), out.reshape(lines), *(np.tile(value, width) for value in values))
    else:
        yield from zip(pixels.transpose(2, 0, 1), out.transpose(2, 0, 1), *values)


def displayable(scores: np.ndarray) -> np.ndarray:
    """Return z-scores as an image for display.

    Parameters
    ----------
    scores : ndarray, shape (H, W, C)
        An image with mean 0 and standard deviation 1 in each channel.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        Three channels are shown as red, green and blue; any other number is shown as its mean in gray.
        `DISPLAYED_DEVIATIONS` below the mean is black, and the same distance above it is white.
    """
    colors = scores if scores.shape[2] == 3 else scores.mean(axis=2, keepdims=True)
    levels = np.clip(255 * (0.5 + colors / (2 * DISPLAYED_DEVIATIONS)), 0, 255).astype(np.uint8)
    return np.broadcast_to(levels, (*scores.shape[:2], 3))
