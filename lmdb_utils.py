"""The database on disk.

Provides the record format, a writer for pairs of databases that appear complete or not at all, a reader, and the
metadata. It also defines the sizes that the network accepts, because databases, training and inference have to agree.

A database is one LMDB file. Record ``i`` has the key ``b"%010d" % i``, so keys sort in insertion order. Its value is a
32-byte header (`HEADER`), the mean and standard deviation of each channel of the complete source image and the value of
pixels without data (``2 C + 1`` float64), the image as raw row-major ``(H, W, C)`` bytes and the mask as raw ``(H, W)``
bytes, all little-endian. The key ``b"metadata"`` sorts last. Its value is an uncompressed npz archive (`Metadata`).
"""

import argparse
import array
import contextlib
import functools
import glob
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import lmdb
import numpy as np
from numpy.typing import DTypeLike

from cli import (
    Check,
    Claims,
    InputError,
    PathLike,
    any_text,
    cause_of,
    check_kinds,
    check_values,
    flush_to_disk,
    list_of,
    number_of,
    optional,
    real,
    replacing_together,
    survive,
    whole,
    whole_number,
)
from objects import LARGEST_ID, ObjectClasses

FORMAT_NAME = "semantic-segmentation-lmdb"
FORMAT_VERSION = 2
RECORD_MAGIC = b"SSEG"
# magic, version, reserved, image dtype, mask dtype, height, width, channels, padding to 32 bytes
HEADER = struct.Struct("<4sHH4s4sIII4x")
STATISTICS_DTYPE = np.dtype("<f8")
ALL_DATA = np.inf  # replaces the value of pixels without data if all pixels have data
METADATA_KEY = b"metadata"
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
LARGEST_RECORD = 2**32 - 1  # bytes, for LMDB

IGNORED, UNNAMED = -1, -2  # used by LabelMap instead of a class, for values to ignore and values it does not name
IMAGE_DTYPES = ("uint8", "uint16", "int32", "float32")
MASK_DTYPES = ("uint8", "uint16", "int32")

# Databases, network and inference have to agree on these. Defined here, because build_lmdb.py must not load TensorFlow.
SIZE_FACTOR = 16  # pixels; heights and widths are multiples of it, because the network halves them four times
# The results of a block of that grid depend on 94 pixels beyond each of its edges: 92 for two 3x3 convolutions at each
# pixel size of 1, 2, 4, 8, 16, 8, 4, 2, 1, and 2 because a coarse pixel counts entirely. The radius is rounded up to a
# multiple of SIZE_FACTOR, so that tiles are pooled like the full image.
RADIUS = 96  # pixels

INITIAL_MAP_BYTES = 64 * 2**20  # doubled whenever the database outgrows it; the file itself grows with use
COMMIT_BYTES = 2**19  # of records in one transaction, which is repeated if the map was too small

MODEL_METADATA_FILE = "unet_metadata.json"  # in a SavedModel folder; what inference has to know about the model

MANY_CLASSES = 32  # if there are more, class ids look like numbers of individual objects
VOID_VALUES = (255, 65535)  # often mark pixels without a class, as -1 does
PROBED_RECORDS = 100  # read from a database before it is used
FEW_CLASSES = 8  # this few are counted faster one by one than all at once

# ---------------------------------------------------------------------------------------------- records


def record_key(index: int) -> bytes:
    """Return the key of record `index` (0-based)."""
    return b"%010d" % index


def ignored_id(mask_dtype: DTypeLike) -> int:
    """Return the value of ignored pixels, which is the largest value of the mask's type."""
    return int(np.iinfo(mask_dtype).max)


def encode_record(
    image: np.ndarray, mask: np.ndarray, mean: np.ndarray, deviation: np.ndarray, no_data: Optional[float] = None
) -> bytes:
    """Serialize one image, which may be part of a larger one, and its mask.

    Parameters
    ----------
    image : ndarray, shape (H, W, C)
        One of `IMAGE_DTYPES`.
    mask : ndarray, shape (H, W)
        One of `MASK_DTYPES`.
    mean, deviation : ndarray, shape (C,)
        Mean and standard deviation of each channel of the complete source image.
    no_data : float, optional
        Value of pixels without data, possibly NaN; None if all pixels have data.

    Returns
    -------
    bytes
        Header, statistics, image and mask.

    Raises
    ------
    ValueError
        If a shape or dtype is not as above.
    """
    if image.ndim != 3 or image.shape[:2] != mask.shape:
        raise ValueError(f"expected image (H, W, C) and mask (H, W), got {image.shape} and {mask.shape}")
    if image.dtype.name not in IMAGE_DTYPES or mask.dtype.name not in MASK_DTYPES:
        raise ValueError(f"cannot store a {image.dtype} image with a {mask.dtype} mask")
    if np.shape(mean) != image.shape[2:] or np.shape(deviation) != image.shape[2:]:
        raise ValueError(f"expected mean and deviation of {image.shape[2]} channels, got {mean} and {deviation}")
    image = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    mask = np.ascontiguousarray(mask, mask.dtype.newbyteorder("<"))
    header = make_header(image.shape, image.dtype, mask.dtype)
    statistics = np.array([*mean, *deviation, ALL_DATA if no_data is None else no_data], STATISTICS_DTYPE)
    return b"".join((header, statistics.data, image.data, mask.data))


def make_header(shape: Sequence[int], image_dtype: DTypeLike, mask_dtype: DTypeLike) -> bytes:
    """Return the header of a record with an image of shape (H, W, C)."""
    return HEADER.pack(RECORD_MAGIC, FORMAT_VERSION, 0, type_field(image_dtype), type_field(mask_dtype), *shape)


def record_bytes(shape: Sequence[int], image_dtype: DTypeLike, mask_dtype: DTypeLike) -> int:
    """Return the length in bytes of a record with an image of shape (H, W, C)."""
    height, width, channels = shape
    bytes_per_pixel = channels * np.dtype(image_dtype).itemsize + np.dtype(mask_dtype).itemsize
    return int(HEADER.size + (2 * channels + 1) * STATISTICS_DTYPE.itemsize + height * width * bytes_per_pixel)


class StoredImage(NamedTuple):
    """The content of a record as read-only views of its bytes.

    Attributes
    ----------
    image : ndarray, shape (H, W, C)
    mask : ndarray, shape (H, W)
    mean, deviation : ndarray of float64, shape (C,)
        Statistics of the complete source image; `image` may be a tile of it.
    no_data : float, optional
        Value of pixels without data, possibly NaN; None if all pixels have data.
    """

    image: np.ndarray
    mask: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    no_data: Optional[float]


def decode_record(value: Any) -> StoredImage:
    """Return the content of a record without copying it.

    Raises
    ------
    InputError
        If the bytes are not a record of this format and version.
    """
    if len(value) < HEADER.size:
        raise InputError(f"a record of {len(value)} bytes is not an image record; build the database again")
    magic, version, _, image_type, mask_type, height, width, channels = HEADER.unpack_from(value)
    if magic != RECORD_MAGIC or version != FORMAT_VERSION:
        raise InputError("a record is not in this suite's format; build the database again")
    if image_type not in STORED_DTYPES or mask_type not in STORED_DTYPES:
        raise InputError(f"a record has pixels of type {image_type!r} and {mask_type!r}; build the database again")
    image_dtype, mask_dtype = STORED_DTYPES[image_type], STORED_DTYPES[mask_type]
    pixels = height * width
    image_offset = HEADER.size + (2 * channels + 1) * STATISTICS_DTYPE.itemsize
    mask_offset = image_offset + pixels * channels * image_dtype.itemsize
    if len(value) != record_bytes((height, width, channels), image_dtype, mask_dtype):
        raise InputError(f"a record of {len(value)} bytes is truncated; build the database again")
    statistics = np.frombuffer(value, STATISTICS_DTYPE, 2 * channels + 1, HEADER.size)
    if not all(abs(each) <= LARGEST_FLOAT32 for each in statistics[:-1].tolist()):  # faster than numpy for few values
        raise InputError("a record has a mean or deviation that no image can have; build the database again")
    no_data = None if statistics[-1] == ALL_DATA else float(statistics[-1])
    image = np.frombuffer(value, image_dtype, pixels * channels, image_offset).reshape(height, width, channels)
    mask = np.frombuffer(value, mask_dtype, pixels, mask_offset).reshape(height, width)
    return StoredImage(image, mask, statistics[:channels], statistics[channels:-1], no_data)


def type_field(dtype: DTypeLike) -> bytes:
    """Return the name of a type in the header."""
    return np.dtype(dtype).newbyteorder("<").str.encode().ljust(4, b"\0")


STORED_DTYPES = {type_field(name): np.dtype(name).newbyteorder("<") for name in {*IMAGE_DTYPES, *MASK_DTYPES}}


# ---------------------------------------------------------------------------------------------- metadata


@dataclass
class Metadata:
    """Facts that a reader needs before it reads a record.

    Attributes
    ----------
    info : dict
        JSON-compatible values: ``count``, ``image_shape`` (H, W, C), ``image_dtype``, ``mask_dtype`` and anything the
        builder adds, such as dataset name, seed, options, ``deviation_floor`` and ``value_range`` of each channel,
        ``ignored_id`` (not a class, or None) and ``ignored_pixels`` (the number of pixels with that id).
    classes : ndarray of int64, shape (K,)
        The class ids that occur, ascending.
    pixel_counts : ndarray of int64, shape (K,)
        Number of pixels of each class.
    record_offsets : ndarray of int64, shape (K + 1,)
        Class ``classes[k]`` occurs in ``class_records[record_offsets[k]:record_offsets[k + 1]]``.
    class_records : ndarray of int32
        Record indices, grouped by class and ascending within a class.
    joined_names : bytes
        Source file names of the images that contributed records, as the file system stores them, separated by zero
        bytes. A million separate strings would cost every reader process 100 MB.
    record_image, record_row, record_column : ndarray of int32, shape (count,)
        For each record, the index into `names` and the origin of the tile in that image, in pixels.
    """

    info: dict[str, Any]
    classes: np.ndarray
    pixel_counts: np.ndarray
    record_offsets: np.ndarray
    class_records: np.ndarray
    joined_names: bytes
    record_image: np.ndarray
    record_row: np.ndarray
    record_column: np.ndarray

    @property
    def count(self) -> int:
        """Number of records."""
        return int(self.info["count"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of every image in the database."""
        height, width, channels = self.info["image_shape"]
        return height, width, channels

    @property
    def deviation_floor(self) -> np.ndarray:
        """Smallest standard deviation by which each channel is divided, float64 of shape (C,)."""
        return np.array(self.info["deviation_floor"], np.float64)

    @property
    def ignored_id(self) -> Optional[int]:
        """Value of ignored pixels in a mask; None if a mask cannot contain any."""
        value: Optional[int] = self.info["ignored_id"]
        return value

    @property
    def names(self) -> list[str]:
        """Source file name of each image that contributed records."""
        return os.fsdecode(self.joined_names).split("\0")

    def records_of_class(self, position: int) -> np.ndarray:
        """Return the indices of the records that contain class ``classes[position]``."""
        return self.class_records[self.record_offsets[position] : self.record_offsets[position + 1]]

    def describe_record(self, index: int) -> str:
        """Return the origin of a record in words, for messages: its file name and the row and column of its tile."""
        name = self.names[self.record_image[index]]
        return f"record {index} ({name}, row {self.record_row[index]}, column {self.record_column[index]})"

    def to_bytes(self) -> bytes:
        """Serialize as an uncompressed npz archive."""
        arrays: dict[str, Any] = {name: each for name, each in vars(self).items() if isinstance(each, np.ndarray)}
        header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **self.info}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        arrays["names"] = np.frombuffer(self.joined_names, np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, value: bytes, where: PathLike) -> "Metadata":
        """Read and check the output of `to_bytes`.

        Raises
        ------
        InputError
            If it has another version or is damaged; `where` is its file.
        """
        try:
            arrays = read_archive(value)
            info = json.loads(arrays.pop("header").tobytes())
            name, version = info.pop("format", None), info.pop("version", None)
        except MemoryError:
            raise
        except Exception as error:  # zipfile, numpy and json raise many types of errors
            raise InputError(f"{where} has damaged metadata ({cause_of(error)}); copy or build it again") from error
        if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
            raise InputError(
                f"{where} cannot be used: expected version {FORMAT_VERSION} of the format {FORMAT_NAME}, found version "
                f"{version} of {name}; build it again with build_lmdb.py"
            )
        check_info(info, where)
        if arrays.keys() != {"names", *METADATA_ARRAYS}:
            raise InputError(f"{where} has damaged metadata (found arrays {', '.join(sorted(arrays))}); build it again")
        metadata = cls(info=info, joined_names=arrays.pop("names").tobytes(), **arrays)
        metadata.check_arrays(where)
        return metadata

    def check_arrays(self, where: PathLike) -> None:
        """Refuse arrays that do not match each other, the info or the names."""
        classes, records, images = len(self.classes), self.count, self.joined_names.count(b"\0") + 1
        shapes = {
            **dict.fromkeys(("classes", "pixel_counts"), (classes,)),
            "record_offsets": (classes + 1,),
            "class_records": self.class_records.shape[:1],
            **dict.fromkeys(("record_image", "record_row", "record_column"), (records,)),
        }
        fits = classes > 0 and all(getattr(self, name).shape == shape for name, shape in shapes.items())
        fits = fits and all(getattr(self, name).dtype == dtype for name, dtype in METADATA_ARRAYS.items())
        if not (
            fits
            and np.all(np.diff(self.classes) > 0)
            and np.all(self.pixel_counts > 0)
            and self.record_offsets[0] == 0
            and np.all(np.diff(self.record_offsets) > 0)
            and self.record_offsets[-1] == len(self.class_records)
            and within(self.class_records, records)
            and within(self.record_image, images)
        ):
            raise InputError(f"{where} has damaged metadata (arrays that do not match each other); build it again")


METADATA_ARRAYS = {
    **dict.fromkeys(("classes", "pixel_counts", "record_offsets"), np.dtype(np.int64)),
    **dict.fromkeys(("class_records", "record_image", "record_row", "record_column"), np.dtype(np.int32)),
}


def within(indices: np.ndarray, count: int) -> bool:
    """Whether there are indices, and all of them are valid for `count` items."""
    return bool(len(indices) and indices.min() >= 0 and indices.max() < count)


def read_archive(value: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an uncompressed npz archive; they take no more memory than the archive.

    Raises
    ------
    ValueError, TypeError, KeyError, zipfile.BadZipFile
        If the bytes are not an uncompressed npz archive.
    """
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(value)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError("the archive is compressed or encrypted")
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("an array has another format version")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                arrays[entry.filename[: -len(".npy")]] = np.frombuffer(file.read(), dtype).reshape(shape)
    return arrays


def check_info(info: dict[str, Any], where: PathLike) -> None:
    """Refuse values in the metadata that no build writes."""
    check_values(info, {"image_shape": list_of(whole(1, 2**31), 3)}, where)
    channels = info["image_shape"][2]
    checks: dict[str, Check] = {
        "count": whole(1, 2**31),
        "image_dtype": lambda value: value in IMAGE_DTYPES,
        "mask_dtype": lambda value: value in MASK_DTYPES,
        "deviation_floor": list_of(real(np.finfo(np.float32).tiny), channels),
        "ignored_id": optional(whole(0)),
        "ignored_pixels": whole(0),
    }
    of_builds: dict[str, Check] = {  # a database made by other means may lack these
        "side": any_text,
        "dataset_name": any_text,
        "seed": whole(0),
        "train_fraction": optional(real(0)),
        "fold": optional(any_text),
        "test_list": optional(any_text),
        "split_by": optional(any_text),
        "tile_size": optional(whole(1)),
        "label_map": optional(any_text),
        "objects": optional(ObjectClasses.are),
        "object_count": whole(0),
        "touching_pairs": whole(0),
        "image_no_data": optional(real()),
        "channels": optional(list_of(whole(0), channels)),
        "channel_suffixes": optional(list_of(any_text)),
        "left_out": whole(0),
        "value_range": list_of(list_of(real(), 2), channels),
        "missing_shares": list_of(real(0), channels),
    }
    check_values(info, {**checks, **{name: check for name, check in of_builds.items() if name in info}}, where)


# ---------------------------------------------------------------------------------------------- writing


class Record(NamedTuple):
    """An encoded record and its entries in the metadata.

    The value is an array of bytes (uint8), which processes can exchange without a copy.
    """

    value: np.ndarray
    class_counts: dict[int, int]
    row: int
    column: int

    @classmethod
    def encode(
        cls,
        image: np.ndarray,
        mask: np.ndarray,
        mean: np.ndarray,
        deviation: np.ndarray,
        no_data: Optional[float] = None,
        row: int = 0,
        column: int = 0,
    ) -> "Record":
        """Return the record of an image and its mask; parameters and errors are as in `encode_record`.

        `row` and `column` are the origin of the image in its source file, in pixels.
        """
        value = np.frombuffer(encode_record(image, mask, mean, deviation, no_data), np.uint8)
        return cls(value, count_classes(mask), row, column)


class DatabaseWriter:
    """Appends records to a new database file and collects the metadata.

    Parameters
    ----------
    filepath : path
        File to create, which must not exist. `new_databases` gives it its final name only when it is complete.
    initial_map_bytes : int
        Initial size of LMDB's memory map, doubled whenever it is too small.
    """

    def __init__(self, filepath: PathLike, initial_map_bytes: int = INITIAL_MAP_BYTES) -> None:
        self._map_bytes = initial_map_bytes
        # The file is private until `new_databases` renames it, so it needs no lock file and no sync before that.
        self._environment = lmdb.open(
            os.fsencode(filepath), subdir=False, lock=False, sync=False, map_size=initial_map_bytes
        )
        self._pending: list[tuple[bytes, Union[bytes, memoryview]]] = []
        self._pending_bytes = 0
        self._header = b""
        # Compact, because there may be millions of records.
        self._joined_names, self._last_name, self._images = bytearray(), "", 0
        self._origins = array.array("i")  # image, row and column of each record
        self._pixel_counts: dict[int, int] = {}
        self._class_records: dict[int, array.array[int]] = {}

    def __len__(self) -> int:
        """Return the number of records appended so far."""
        return len(self._origins) // 3

    def append(self, record: Record, name: str) -> None:
        """Append one record from the file `name`.

        Raises
        ------
        ValueError
            If its shape or types differ from those of the first record.
        """
        header = record.value[: HEADER.size].tobytes()
        self._header = self._header or header
        if header != self._header:
            raise ValueError(f"expected records like the first one, got a different shape or type from {name}")
        index = len(self)
        if not self._images or self._last_name != name:
            self._joined_names += b"\0" * (self._images > 0) + os.fsencode(name)
            self._last_name = name
            self._images += 1
        self._origins.extend((self._images - 1, record.row, record.column))
        for class_id, count in record.class_counts.items():
            self._pixel_counts[class_id] = self._pixel_counts.get(class_id, 0) + count
            self._class_records.setdefault(class_id, array.array("i")).append(index)
        self._put(record_key(index), record.value.data)

    def finish(self, info: dict[str, Any]) -> Metadata:
        """Write the metadata and close.

        `info` (JSON-compatible values) becomes part of the metadata. Its ``ignored_id``, if any, does not count as a
        class.
        """
        if not self._header:
            raise ValueError("a database needs at least one record")
        metadata = self._make_metadata(info)
        self._put(METADATA_KEY, metadata.to_bytes())
        self._commit()
        self.close()
        return metadata

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._environment.close()

    def _make_metadata(self, info: dict[str, Any]) -> Metadata:
        ignored = info.get("ignored_id")
        classes = sorted(self._class_records.keys() - {ignored})
        records = [np.asarray(self._class_records[class_id], np.int32) for class_id in classes]
        origins = np.asarray(self._origins, np.int32).reshape(-1, 3)
        _, _, _, image_type, mask_type, *shape = HEADER.unpack(self._header)
        return Metadata(
            info={
                "count": len(self),
                "image_shape": shape,
                "image_dtype": STORED_DTYPES[image_type].name,
                "mask_dtype": STORED_DTYPES[mask_type].name,
                "deviation_floor": [1.0] * shape[2],
                "ignored_id": None,
                "ignored_pixels": 0 if ignored is None else self._pixel_counts.get(ignored, 0),
                **info,
            },
            classes=np.asarray(classes, np.int64),
            pixel_counts=np.asarray([self._pixel_counts[class_id] for class_id in classes], np.int64),
            record_offsets=np.cumsum([0] + [len(indices) for indices in records]).astype(np.int64),
            class_records=np.concatenate(records),
            joined_names=bytes(self._joined_names),
            record_image=origins[:, 0].copy(),
            record_row=origins[:, 1].copy(),
            record_column=origins[:, 2].copy(),
        )

    def _put(self, key: bytes, value: Union[bytes, memoryview]) -> None:
        self._pending.append((key, value))
        self._pending_bytes += len(value)
        if self._pending_bytes >= COMMIT_BYTES:
            self._commit()

    def _commit(self) -> None:
        """Write the pending records; if the map is too small, double it and write them again."""
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value, append=True)
                break
            except lmdb.MapFullError:
                self._map_bytes *= 2
                self._environment.set_mapsize(self._map_bytes)
        self._pending.clear()
        self._pending_bytes = 0


def count_classes(mask: np.ndarray) -> dict[int, int]:
    """Return ``{class id: number of pixels}`` of an integer array of any shape."""
    minimum, maximum = int(mask.min()), int(mask.max())
    if minimum >= 0 and maximum < FEW_CLASSES:
        return {value: count for value in range(maximum + 1) if (count := int(np.count_nonzero(mask == value)))}
    if minimum >= 0 and maximum < 2**16:
        counts = np.bincount(mask.reshape(-1))
        classes = np.flatnonzero(counts)
        return dict(zip(classes.tolist(), counts[classes].tolist()))
    classes, counts = np.unique(mask, return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist()))


any_int = whole_number(-(2**63), 2**63 - 1)


class UnnamedValues(InputError):
    """A mask contains values that a label map does not assign to a class."""


class LabelMap(NamedTuple):
    """The class for each mask value; its `parse` is the ``type`` of ``--label_map``."""

    text: str  # as given on the command line
    ranges: tuple[tuple[int, int, int], ...]  # (first, last, class or IGNORED), ascending; last is included

    @classmethod
    def parse(cls, text: str) -> "LabelMap":
        """Read ``VALUE:CLASS`` and ``FIRST-LAST:CLASS``, separated by commas; the class may be ``ignore``."""
        ranges = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?:(\d+|ignore)\s*", part)
            if not match:
                raise argparse.ArgumentTypeError(
                    f"expected VALUE:CLASS, FIRST-LAST:CLASS or VALUE:ignore, got {part!r}; try 0:0,255:1 or "
                    "0:0,1-65535:1"
                )
            first, last = any_int(match[1]), any_int(match[2] or match[1])
            class_id = IGNORED if match[3] == "ignore" else any_int(match[3])
            if last < first or class_id >= ignored_id(np.int32):
                raise argparse.ArgumentTypeError(f"expected an ascending range and a 32-bit class, got {part!r}")
            ranges.append((first, last, class_id))
        ranges.sort()
        for (_, last, _), (first, _, _) in zip(ranges, ranges[1:]):
            if first <= last:
                raise argparse.ArgumentTypeError(f"expected each value once, got {first} twice in {text!r}")
        return cls(text, tuple(ranges))

    def __str__(self) -> str:
        """Return the map as given on the command line."""
        return self.text

    @property
    def ignores(self) -> bool:
        """Whether the map ignores some values."""
        return any(class_id == IGNORED for _, _, class_id in self.ranges)

    @property
    def largest_class(self) -> int:
        """The largest class; `IGNORED` if there is none."""
        return max(class_id for _, _, class_id in self.ranges)

    @property
    def only_ignores(self) -> bool:
        """Whether the map only lists values to ignore; all other values then are class ids already."""
        return self.largest_class == IGNORED

    def covers(self, values: np.ndarray) -> np.ndarray:
        """Return a bool for each value, True if the map names it."""
        named = np.zeros(values.shape, bool)
        for first, last, _ in self.ranges:
            named |= (values >= first) & (values <= last)
        return named

    def apply(self, mask: np.ndarray) -> np.ndarray:
        """Return the class or `IGNORED` for each pixel of an integer mask as int32; may raise `UnnamedValues`."""
        if mask.dtype.itemsize <= 2:
            unsigned = mask.view(f"u{mask.dtype.itemsize}")
            classes = _lookup_table(self, mask.dtype.str)[unsigned]
        else:
            classes = self.find(mask)
        if classes.min() == UNNAMED:
            unknown = np.unique(mask[classes == UNNAMED])
            shown = ", ".join(map(str, unknown[:8])) + ", ..." * (len(unknown) > 8)
            raise UnnamedValues(f"found {shown}, which --label_map {self} does not name")
        return classes

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return the class, `IGNORED` or `UNNAMED` for each value as int32."""
        firsts, lasts, classes = (np.array(column) for column in zip(*self.ranges))
        position = np.searchsorted(firsts, values, side="right") - 1
        inside = (position >= 0) & (values <= lasts[position])
        others = np.where(values >= 0, values, UNNAMED) if self.only_ignores else UNNAMED
        return np.where(inside, classes[position], others).astype(np.int32)


def object_ids(values: np.ndarray, label_map: Optional[LabelMap], path: PathLike) -> np.ndarray:
    """Return the object ids in a mask (H, W) as int32, and `IGNORED` for values that the label map names.

    Raises
    ------
    InputError
        If some are negative or above `LARGEST_ID`.
    """
    ignored = False if label_map is None else label_map.covers(values)
    ids = np.where(ignored, 0, values)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > LARGEST_ID:
        raise InputError(
            f"expected object ids from 0 (background) to {LARGEST_ID} in {path}, found {low if low < 0 else high}; "
            "renumber the objects, or use --ignore_value if this value marks pixels without a class"
        )
    return np.where(ignored, IGNORED, ids).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _lookup_table(label_map: LabelMap, dtype: str) -> np.ndarray:
    """Return the class of each value of an 8-bit or 16-bit type, in the order of the unsigned bit patterns."""
    size = np.dtype(dtype).itemsize
    return label_map.find(np.arange(256**size, dtype=f"u{size}").view(dtype))


def advise_label_map(values: Sequence[int]) -> str:
    """Return a message with the values in masks (ascending) and the option that maps them to consecutive classes.

    The message is empty if the values are 0, 1, 2, ... already.
    """
    shown = ", ".join(map(str, values[:8])) + ", ..." * (len(values) > 8)
    space = "=" if values[0] < 0 else " "  # a value that begins with a minus would look like another option
    if len(values) > MANY_CLASSES:
        below = f"{values[0]}-0:0" if values[0] < 0 else "0:0"
        return (
            f"found {len(values)} different values, {shown}; if they number individual objects, "
            "use --objects 1 to map them to one class (and --border_width 2 to add a class for their borders), or use "
            f"--label_map{space}{below},1-{max(values[-1], 1)}:1"
        )
    positive = [value for value in values if value > 0]
    if values[0] >= 0 and values[-1] == len(positive):
        return ""
    classes = {0: 0, **{value: 0 if value <= 0 else positive.index(value) + 1 for value in values}}
    entries = ",".join(f"{value}:{class_id}" for value, class_id in sorted(classes.items()))
    makes = f"use --label_map{space}{entries} to map them to classes 0, 1, 2, ..."
    void = -1 if values[0] == -1 else values[-1] if values[-1] in VOID_VALUES and len(values) > 2 else None
    if void is not None:
        makes = f"if {void} marks pixels without a class, use --ignore_value {void} to exclude them, otherwise {makes}"
    return f"found the values {shown}; {makes}"


@contextlib.contextmanager
def new_databases(*targets: PathLike) -> Iterator[list[DatabaseWriter]]:
    """Create databases that appear under their final names together, and only if the block raises no exception.

    They are written next to their targets under hidden names, which never remain. An existing target stays readable
    until it is replaced, and even longer for processes that have it open.

    Parameters
    ----------
    *targets : path
        Final file names, all in one folder, which is created if missing.

    Yields
    ------
    list of DatabaseWriter
        One for each target; the block must call `DatabaseWriter.finish` on each.

    Raises
    ------
    InputError
        If the folder is not writable, the disk is full, a target is a folder, or another build is writing a target.
    """
    paths = [Path(target) for target in targets]
    folder = paths[0].parent
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"{path} is a folder, but a database file must be written there; move it away or choose another name"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Claims(folder) as claims, replacing_together(paths) as temporaries, contextlib.ExitStack() as stack:
            for path in paths:
                if not claims.claim(path.name):
                    raise InputError(
                        f"another build is writing {path}; wait until it has finished, or choose another --dataset_name"
                    )
            writers = [DatabaseWriter(temporary) for temporary in temporaries]
            for writer in writers:
                stack.callback(writer.close)
            yield writers
        flush_to_disk(folder)
    except (OSError, lmdb.Error) as error:
        raise InputError(f"cannot write a database in {folder}: {cause_of(error)}") from error


# ---------------------------------------------------------------------------------------------- reading


def databases_in(folder: str) -> str:
    """Return a remark that names some databases in a folder; empty if there are none."""
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "*.lmdb")))[:4]
    return f" (found {', '.join(found)})" if found else ""


@contextlib.contextmanager
def lmdb_errors(filepath: PathLike) -> Iterator[None]:
    """Turn LMDB errors in reading a database into one line that names the file."""
    try:
        yield
    except lmdb.Error as error:
        # Only in words does a recent py-lmdb distinguish another file format from other errors.
        if isinstance(error, lmdb.VersionMismatchError) or "data format" in str(error):
            advice = "; another version of LMDB wrote it, so build it again"
        else:
            advice = "" if number_of(error) else "; it is not a database or is damaged, so copy it or build it again"
        raise InputError(f"cannot read the database {os.fspath(filepath)}: {cause_of(error)}{advice}") from error


class Database(contextlib.AbstractContextManager["Database"]):
    """A finished database, opened read-only; a context manager.

    It must be opened in the process that uses it. An LMDB environment does not survive a fork, and a process may open a
    file only once at a time. A finished file never changes. It therefore needs no locks, which network file systems
    often lack, and a single read transaction lasts until it is closed, which makes zero-copy views possible.

    Parameters
    ----------
    filepath : path
        A file that `build_lmdb.py` wrote.

    Attributes
    ----------
    metadata : Metadata

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    InputError
        If it is not a complete database of this format and version.
    """

    def __init__(self, filepath: PathLike) -> None:
        self.filepath = os.fspath(filepath)
        if os.path.isdir(self.filepath):
            raise InputError(
                f"{self.filepath} is a folder; a database of this suite is a single file made by build_lmdb.py"
                f"{databases_in(self.filepath)}"
            )
        try:
            os.stat(self.filepath)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"no database {self.filepath}; make one with build_lmdb.py or check the path"
                f"{databases_in(os.path.dirname(self.filepath))}"
            ) from None
        if not os.path.isfile(self.filepath):
            raise InputError(f"{self.filepath} is not a regular file, but a database of this suite is one")
        with lmdb_errors(self.filepath):
            self._environment = lmdb.open(
                os.fsencode(self.filepath), subdir=False, readonly=True, lock=False, readahead=False
            )
        try:
            with lmdb_errors(self.filepath):
                self._transaction = self._environment.begin(buffers=True)
                self.metadata = self._read_metadata()
            info = self.metadata.info
            self._header = make_header(info["image_shape"], info["image_dtype"], info["mask_dtype"])  # of every record
        except BaseException:
            self._environment.close()
            raise

    @classmethod
    def probe(cls, filepath: PathLike) -> None:
        """Read some of a database in a child process first, because LMDB may crash on a damaged file; see `survive`."""

        def read_some() -> None:
            with cls(filepath) as database:
                for index in range(0, len(database), max(len(database) // PROBED_RECORDS, 1)):
                    database.record(index)

        survive(read_some, f"{os.fspath(filepath)} is damaged (LMDB crashes on it); copy or build it again")

    def _read_metadata(self) -> Metadata:
        needed = self._environment.info()["last_pgno"] + 1
        # LMDB would read beyond the end of a truncated file and crash with SIGBUS, so the length is checked first.
        if os.path.getsize(self.filepath) < needed * self._environment.stat()["psize"]:
            raise InputError(
                f"{self.filepath} is shorter than its own index declares (an interrupted copy?); copy or build it again"
            )
        value = self._transaction.get(METADATA_KEY)
        if value is None:
            raise InputError(f"{self.filepath} is an LMDB database, but not one made by build_lmdb.py; build it again")
        return Metadata.from_bytes(bytes(value), self.filepath)

    def __len__(self) -> int:
        """Return the number of records."""
        return self.metadata.count

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image ``(H, W, C)`` and mask ``(H, W)`` as views of the memory map, valid until `close`."""
        stored = self.record(index)
        return stored.image, stored.mask

    def record(self, index: int) -> StoredImage:
        """Return the complete content of a record as views of the memory map, valid until `close`."""
        with lmdb_errors(self.filepath):
            value = self._transaction.get(record_key(index))
        if value is None:
            raise InputError(f"{self.filepath} has no record {index}; the file is damaged, so build it again")
        try:
            stored = decode_record(value)
            if value[: HEADER.size] != self._header:
                raise InputError("it differs from the other records; build the database again")
            return stored
        except InputError as error:
            raise InputError(f"record {index} of {self.filepath}: {error}") from None

    def close(self) -> None:
        """Close the file; its views must not be used afterward. May be called twice."""
        self._transaction.abort()
        self._environment.close()

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self.close()


# ---------------------------------------------------------------------------------------------- the SavedModel


def check_saved_model(folder: Path) -> None:
    """Refuse a folder that is obviously not a SavedModel, without TensorFlow, which takes seconds to load."""
    if not (folder / "saved_model.pb").is_file():
        found = "no saved_model.pb" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        meant = [path for path in (folder / "saved_model", folder.parent) if (path / "saved_model.pb").is_file()]
        raise InputError(
            f"expected a SavedModel in {folder}, found {found}; give the folder saved_model that train_unet.py wrote "
            f"to its --output_dir{f', {meant[0]}' if meant else ''}"
        )
    check_kinds(folder, ("saved_model.pb", "fingerprint.pb", "variables/*"))
