r"""Turn a folder of images and a folder of masks into a training and a test database.

    python build_lmdb.py --image_folder data/images/ --mask_folder data/masks/ --output_folder data/ \
        --dataset_name cells

Owns pairing, checking, splitting, and cropping or tiling. Never imports TensorFlow, because it runs on login nodes.

All files are checked first (only their headers, unless they are large), so that all problems are reported at once.
Several processes then read them, measure their channels and encode records, which the main process appends in order.
Problems that only the pixels show, such as infinity, are found at this point and collected in the same way. A database
appears only when all of it is valid.
"""

import os
import signal
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while modules are loaded

import argparse
import array
import collections
import contextlib
import enum
import functools
import heapq
import itertools
import logging
import multiprocessing
import pickle
import queue
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

import numpy as np

from cli import (
    STOP_SIGNALS,
    InputError,
    Parser,
    Part,
    PathLike,
    Progress,
    SharedMemory,
    StopRequest,
    add_flag,
    allocate_shared_memory,
    attach_shared_memory,
    counted,
    end_with_parent,
    file_stem,
    log_settings,
    number_type,
    printable,
    process_count,
    real_number,
    replacing,
    run_script,
    seed_int,
    signals_held,
    some_path,
    whole_number,
)
from image_files import (
    MASK_FORMATS,
    ChannelStatistics,
    Folder,
    ImageFile,
    Source,
    UnusablePixels,
    by_stem,
    clipped,
    composed,
    guess_suffix,
    image_format,
    list_channels,
    list_images,
    list_masks,
    listed_stems,
    mask_fault,
    paired_planes,
    reflect_to,
    relative_window,
    suffix_list,
    widened,
    without_data,
)
from lmdb_utils import (
    IGNORED,
    IMAGE_DTYPES,
    LARGEST_RECORD,
    MANY_CLASSES,
    MASK_DTYPES,
    RADIUS,
    SIZE_FACTOR,
    Database,
    DatabaseWriter,
    LabelMap,
    Metadata,
    Record,
    UnnamedValues,
    advise_label_map,
    any_int,
    ignored_id,
    new_databases,
    object_ids,
    record_bytes,
)
from objects import LARGEST_BORDER, NO_OBJECTS, ObjectCensus, ObjectClasses

SIDES = ("train", "test")
LOSSLESS_WIDENING = {"bool": "uint8", "int8": "int32", "int16": "int32", "float16": "float32"}

JOB_BYTES = 32 * 2**20  # of records that a process encodes at once, if a file can be read in parts
LARGEST_TILE = 2**14  # edge in pixels
MANY_CHANNELS = 2**16
INDIVISIBLE_FACTOR = 16  # multiple of JOB_BYTES, if reading any part decodes the complete file
WORKER_BYTES = 8 * 2**20  # of files that make it worth starting a process
CHUNK_TASKS, CHUNK_BYTES = 16, 4 * 2**20  # sent to a process together, because each message takes time
PREFETCHED_CHUNKS = 3  # for each process
PREFETCHED_BYTES = 256 * 2**20  # of records that may wait to be appended
SHOWN_PROBLEMS = 3  # of each kind
FLOOR_FRACTION = 0.01  # of the median deviation of the training images; the smallest divisor of float32 channels

Task = TypeVar("Task")
Result = TypeVar("Result")


class ProblemKind(enum.Enum):
    """Why files cannot be used, worded as the heading of a list of files."""

    NO_MASK = "images without a mask"
    NO_IMAGE = "masks without an image"
    SHARED_NAME = "files that share a name"
    UNREADABLE = "files that cannot be read"
    OTHER_SIZE = "masks that differ in size from their images"
    BAD_IMAGE = "images that cannot be stored"
    BAD_MASK = "masks that contain no class ids"
    MIXED_TYPES = "images that differ in type from most"
    MIXED_SIZES = "images that differ in size from most"
    BAD_PIXELS = "images with infinity or values that are too large"
    UNMAPPED = "masks with values that --label_map does not name"
    NEGATIVE = "masks with negative values"
    BAD_OBJECTS = "masks that do not number objects"
    BAD_STACK = "stacks that do not fit together"
    BAD_CHANNELS = "images without one file for each channel"
    RESERVED = "masks with the value that stands for ignored pixels"


class Pair(NamedTuple):
    """An image and the mask file that belongs to it."""

    image: Source
    mask: Source


class Problem(NamedTuple):
    """Why a file cannot be used: the kind of problem, the file, the full message, and advice for the kind."""

    kind: ProblemKind
    path: str
    message: str
    advice: str = ""


class Unusable(InputError):
    """A pair of files cannot be used for a known kind of reason."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser(
        "build_lmdb",
        "Script which converts two folders of images and masks into a pair of lmdb databases for training.",
    )
    add_database_options(parser.add_argument_group("databases"))
    content = parser.add_argument_group("contents of the files")
    for add_options in (add_folder_options, add_split_options, add_mask_options, add_image_options):
        add_options(content)
    add_work_options(parser.add_argument_group("work and results"))
    return parser


def add_database_options(group: Any) -> None:
    """Add the options of the specification, in its order."""
    text = "filepath to the folder containing the images"
    group.add_argument("--image_folder", type=some_path, default="data/images/", help=text)
    text = "filepath to the folder containing the masks, with the names of their images"
    group.add_argument("--mask_folder", type=some_path, default="data/masks/", help=text)
    text = "filepath to the folder where the outputs will be placed"
    group.add_argument("--output_folder", type=some_path, default="data/", help=text)
    text = "name of the dataset to be used in creating the lmdb files: train-NAME.lmdb and test-NAME.lmdb"
    group.add_argument("--dataset_name", type=file_stem, default="dataset", help=text)
    text = "fraction of the images to use for training (0.0, 1.0); the rest become the test images"
    group.add_argument("--train_fraction", type=open_fraction, default=0.8, help=text)
    text = "format (extension) of the input images: tif, png or jpg"
    group.add_argument("--image_format", type=image_format, default="tif", help=text)
    text = (
        "Whether to shard the image into tiles [0 = False, 1 = True]; without tiling, images are cropped around the "
        f"center to multiples of {SIZE_FACTOR}"
    )
    add_flag(group, "--use_tiling", 0, text)
    text = (
        "The size of the tiles to crop out of the source images, striding across all available pixels in the source "
        f"images; in pixels, a multiple of {SIZE_FACTOR}"
    )
    group.add_argument("--tile_size", type=tile_size, default=512, help=text)


def add_folder_options(group: Any) -> None:
    """Add the options for pairing files."""
    text = "format (extension) of the masks, tif or png; both if not given"
    group.add_argument("--mask_format", type=mask_format, help=text)
    text = "suffix that a mask's name adds to the name of its image, such as _mask for cell1.tif and cell1_mask.tif"
    group.add_argument("--mask_suffix", metavar="SUFFIX", type=file_stem, help=text)
    text = (
        "whether to also use the images in all subfolders of IMAGE_FOLDER, with masks in subfolders of the same names; "
        "lists and --split_by then identify images by their paths in IMAGE_FOLDER [0 = False, 1 = True]"
    )
    add_flag(group, "--recursive", 0, text)
    text = (
        "'planes' treats each plane of a TIFF that has several (Z, T, OME images, or pages) as an image, paired with "
        "the same plane of its mask; all planes of a file go to the same side of the split"
    )
    group.add_argument("--stack", choices=("planes",), help=text)


def add_split_options(group: Any) -> None:
    """Add the options for choosing test images."""
    text = "seed of the split into training and test images, which is by image, never by tile"
    group.add_argument("--seed", type=seed_int, default=0, help=text)
    text = (
        "regular expression for the part of an image's name (without extension) that identifies its slide, patient or "
        "field, such as '^[^_]+' for slide7_03.tif; a (group) selects part of the match. All images of a slide go to "
        "the same side, because testing on a slide that was also used for training makes the network look better than "
        "it is"
    )
    group.add_argument("--split_by", metavar="REGEX", type=regular_expression, help=text)
    text = (
        "fold of a cross-validation; 2/5 tests on the second fifth of the images (or of the groups from --split_by) "
        "and trains on the others; each image is in the test set of exactly one fold; lists the test images "
        "in OUTPUT_FOLDER/test-NAME.txt; replaces --train_fraction"
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument("--fold", metavar="FOLD/FOLDS", type=fold, help=text)
    text = (
        "text file with the names of the test images, one per line, with or without extension; all other images are "
        "used for training; replaces --train_fraction"
    )
    either.add_argument("--test_list", metavar="FILE", type=some_path, help=text)


def add_mask_options(group: Any) -> None:
    """Add the options for mask values."""
    text = (
        "class of each mask value or range of values, such as 0:0,255:1, or 0:0,1-65535:1 for masks that number "
        "objects, or 255:ignore for pixels to exclude; unlisted values are rejected, unless the map lists only values "
        "to ignore; write --label_map=-1:0,... if the first value is negative"
    )
    group.add_argument("--label_map", metavar="VALUES:CLASS,...", type=LabelMap.parse, help=text)
    text = (
        "value of mask pixels without a class, such as 255 for void; excluded from training, scores and class "
        "statistics; the same as --label_map VALUE:ignore, and can be combined with a label map"
    )
    group.add_argument("--ignore_value", metavar="VALUE", type=any_int, help=text)
    text = "whether masks have an id for each object and 0 for background; objects become class 1 [0 = False, 1 = True]"
    add_flag(group, "--objects", 0, text)
    text = (
        "pixels of an object that are at most this many pixels from another object become class 2, so that the network"
        " learns to separate touching objects; 0 for no class 2; needs --objects 1"
    )
    group.add_argument("--border_width", metavar="PIXELS", type=whole_number(0, LARGEST_BORDER), default=0, help=text)
    text = (
        "whether pixels of an object within --border_width of the background also become class 2 [0 = False, 1 = True]"
    )
    add_flag(group, "--border_to_background", 0, text)


def add_image_options(group: Any) -> None:
    """Add the options for pixels, channels, and files that cannot be used."""
    text = (
        "value of image pixels without data, such as --image_no_data=-9999, in addition to NaN and the value of a GDAL "
        "no-data tag; excluded from mean and standard deviation; the network sees 0, and if no channel of a pixel has "
        "data, its class is ignored; inference uses the same value"
    )
    group.add_argument("--image_no_data", metavar="VALUE", type=real_number, help=text)
    text = "channels of the images to use, counted from 0; 0,1,2 leaves out alpha; inference uses the same channels"
    group.add_argument("--channels", metavar="CHANNELS", type=channel_list, help=text)
    text = (
        "suffixes that channel files add to the image name, in channel order, for images with one file per channel, "
        "such as _B02,_B03,_B04; the files may have any format; inference uses the same suffixes"
    )
    group.add_argument("--channel_suffixes", metavar="SUFFIX,...", type=suffix_list, help=text)
    text = (
        "whether to skip files that cannot be used and list them in skipped-NAME.tsv, instead of stopping [0 = False, "
        "1 = True]"
    )
    add_flag(group, "--skip_bad", 0, text)


def add_work_options(group: Any) -> None:
    """Add the options for processes and for viewing a database."""
    text = (
        "number of processes that read, check and encode; if not given, one for each core, or fewer if there is little"
        " to do; the result is the same for any number"
    )
    group.add_argument("--num_workers", type=process_count, help=text)
    add_flag(
        group,
        "--preview",
        0,
        "whether to save a picture of 16 random images or tiles with their masks in the folder of the database "
        "[0 = False, 1 = True]",
    )
    text = "print the contents of a database and build nothing"
    group.add_argument("--describe", metavar="DATABASE_FILEPATH", type=some_path, help=text)


def mask_format(text: str) -> str:
    """Return `text` as a mask format, tif or png; the ``type`` of ``--mask_format``."""
    name = image_format(text)
    if name not in MASK_FORMATS:
        raise argparse.ArgumentTypeError(f"expected tif or png, got {text!r}; JPEG alters class ids")
    return name


open_fraction = number_type(float, lambda value: 0 < value < 1, "a number between 0 and 1, both excluded, such as 0.8")


def fold(text: str) -> Part:
    """Return `text` as one fold of several; the ``type`` of ``--fold``."""
    value = Part.parse(text)
    if value.parts < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 folds, such as 1/5, got {text!r}")
    return value


def tile_size(text: str) -> int:
    """Return `text` as a tile size; the ``type`` of ``--tile_size``."""
    value = whole_number(1, LARGEST_TILE)(text)
    if value % SIZE_FACTOR:
        below = max(value // SIZE_FACTOR, 1) * SIZE_FACTOR
        raise argparse.ArgumentTypeError(
            f"tile size must be a multiple of {SIZE_FACTOR}, got {value}; try {below} or {below + SIZE_FACTOR}"
        )
    if value <= RADIUS:
        raise argparse.ArgumentTypeError(
            f"tile size must be above {RADIUS}, the overlap of neighboring tiles, got {value}; try 256"
        )
    return value


def regular_expression(text: str) -> "re.Pattern[str]":
    """Return `text` as a compiled pattern; the ``type`` of ``--split_by``."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None


def channel_list(text: str) -> tuple[int, ...]:
    """Return `text` as indices of channels; the ``type`` of ``--channels``."""
    try:
        channels = tuple(int(part) for part in text.split(","))
    except ValueError:
        channels = (-1,)
    if min(channels) < 0 or max(channels) >= MANY_CHANNELS or len(set(channels)) < len(channels):
        raise argparse.ArgumentTypeError(f"expected different channels counted from 0, such as 0,1,2, got {text!r}")
    return channels


def label_map_of(args: argparse.Namespace) -> Optional[LabelMap]:
    """Return --label_map and --ignore_value combined, or None if neither is given."""
    parts = [args.label_map.text] if args.label_map is not None else []
    if args.ignore_value is not None:
        parts.append(f"{args.ignore_value}:ignore")
    try:
        return LabelMap.parse(",".join(parts)) if parts else None
    except argparse.ArgumentTypeError as error:
        raise InputError(f"cannot combine --label_map and --ignore_value: {error}") from None


def objects_of(args: argparse.Namespace, label_map: Optional[LabelMap]) -> Optional[ObjectClasses]:
    """Return the classes that object ids become, or None if masks contain classes."""
    if not args.objects:
        if args.border_width or args.border_to_background:
            raise InputError("--border_width and --border_to_background need --objects 1; set it, or leave them out")
        return None
    if label_map is not None and not label_map.only_ignores:
        raise InputError(
            f"expected --objects 1 without a --label_map that names classes, got {label_map}; all objects become "
            "class 1, and --ignore_value leaves one out"
        )
    if args.border_to_background and not args.border_width:
        raise InputError("expected --border_width with --border_to_background 1, got 0; try --border_width 2")
    return ObjectClasses(args.border_width, bool(args.border_to_background))


def smallest_mask_type(class_id: int) -> np.dtype:
    """Return the smallest mask type that can represent a class."""
    return np.dtype(next(name for name in MASK_DTYPES if class_id <= np.iinfo(name).max))


# ---------------------------------------------------------------------------------------------- running a build


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; return its exit code."""
    return run_script(build_parser, run, argv)


def run(args: argparse.Namespace, stop: StopRequest) -> None:
    """Build both databases, or describe one."""
    if args.describe is not None:
        Database.probe(args.describe)
        describe_databases([args.describe], bool(args.preview))
        return
    log_settings(args)
    images, problems = find_images(args)
    pairs, unpaired = find_pairs(args, images)
    problems += unpaired
    if len(pairs) < 2:
        report_problems(problems, bool(args.skip_bad))
    sides = split_pairs(pairs, images, args)
    options = options_of(args)
    targets = [args.output_folder / f"{side}-{args.dataset_name}.lmdb" for side in SIDES]
    if args.preview:
        previews = [target.with_suffix(".png") for target in targets]
        inputs = itertools.chain.from_iterable((*pair.image.files, *pair.mask.files) for pair in pairs)
        check_previews(previews, inputs, "an image or mask; choose another --output_folder")
    with Workers(args.num_workers or sensible_workers(pairs)) as workers:
        specs, measured, unusable = survey(workers, pairs, options)
        problems += unusable
        report_problems(problems, options.skip_bad)
        if not specs:
            raise InputError("no usable pair of files remains; fix the files that were left out")
        with new_databases(*targets) as writers:
            problems += fill_databases(Build(workers, specs, measured, options), sides, writers, args, len(problems))
            list_skipped(problems, args.output_folder / f"skipped-{args.dataset_name}.tsv")
            if args.fold:
                left_out = {problem.path for problem in problems}
                list_images_of(
                    [pair for pair in sides[1] if str(pair.image) not in left_out],
                    args.output_folder / f"test-{args.dataset_name}.txt",
                )
    describe_databases(targets, bool(args.preview))


def options_of(args: argparse.Namespace) -> "Options":
    """Return the settings that the processes need from the arguments."""
    tile_size, label_map = args.tile_size if args.use_tiling else None, label_map_of(args)
    return Options(
        tile_size, args.channels, label_map, bool(args.skip_bad), args.image_no_data, objects_of(args, label_map)
    )


def fill_databases(
    build: "Build",
    sides: Sequence[list[Pair]],
    writers: Sequence[DatabaseWriter],
    args: argparse.Namespace,
    left_out: int,
) -> list[Problem]:
    """Write the records and the metadata of both databases; return the pairs whose pixels cannot be used.

    `left_out` is the number of problems found earlier.
    """
    options = build.options
    filled = [
        build.fill(pairs, writer, counts_once=options.tile_size is not None and side == "test")
        for side, pairs, writer in zip(SIDES, sides, writers)
    ]
    report_problems(build.problems, options.skip_bad)
    for side, writer in zip(SIDES, writers):
        if not len(writer):
            raise InputError(f"no image remains to {side} with; fix the files that were left out, or change --seed")
    about = describe_build(args, options, left_out + len(build.problems))
    about["deviation_floor"] = filled[0].deviation_floors(build.image_dtype)  # testing normalizes like training
    about["ignored_id"] = build.ignored_id
    for side, contents, writer in zip(SIDES, filled, writers):
        writer.finish({**about, "side": side, **contents.described()})
    return build.problems


def check_previews(previews: Iterable[Path], inputs: Iterable[PathLike], advice: str) -> None:
    """Raise `InputError` if a preview would replace an input; `advice` describes the input and what to do."""
    places = {os.path.realpath(path) for path in inputs}
    for preview in previews:
        if os.path.realpath(preview) in places:
            raise InputError(f"{preview} would replace {advice}")


def sensible_workers(pairs: Sequence[Pair]) -> int:
    """Return the number of processes: one for each core, or fewer if the work does not justify starting that many."""
    cores, nbytes = len(os.sched_getaffinity(0)), 0
    for pair in pairs:
        with contextlib.suppress(OSError):  # a broken link, which is reported when it is read
            nbytes += pair.image.nbytes + pair.mask.nbytes
        if nbytes >= (cores - 1) * WORKER_BYTES:  # checking the sizes of all files takes long if there are many
            return cores
    return 1 + nbytes // WORKER_BYTES


def describe_build(args: argparse.Namespace, options: "Options", left_out: int) -> dict[str, Any]:
    """Return the entries of a database's metadata that record how it was made."""
    return {
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        "train_fraction": None if args.fold or args.test_list else args.train_fraction,
        "split_by": args.split_by and args.split_by.pattern,
        "fold": args.fold and str(args.fold),
        "test_list": args.test_list and str(args.test_list),
        "tile_size": options.tile_size,
        "label_map": options.label_map and options.label_map.text,
        "objects": options.objects and options.objects._asdict(),
        "image_no_data": options.image_no_data,
        "channels": args.channels,
        "channel_suffixes": args.channel_suffixes,
        "left_out": left_out,
    }


def report_problems(problems: Sequence[Problem], skip_bad: bool) -> None:
    """Log problems by kind, with the first few of each; raise `InputError` unless bad files are skipped."""
    log = logging.warning if skip_bad else logging.error
    kinds: dict[ProblemKind, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    for kind, group in kinds.items():
        log("%s (%d)%s:", kind.value, len(group), group[0].advice)
        for problem in group[:SHOWN_PROBLEMS]:
            log("  %s", problem.message)
        if len(group) > SHOWN_PROBLEMS:
            log("  and %d more", len(group) - SHOWN_PROBLEMS)
    if problems and not skip_bad:
        several = len(problems) > 1
        raise InputError(
            f"nothing was built, because {counted(len(problems), 'file')} cannot be used; fix "
            f"{'them, or leave them' if several else 'it, or leave it'} out with --skip_bad 1"
        )


def list_skipped(problems: Sequence[Problem], path: Path) -> None:
    """Write a list of the files left out, with the reasons; remove the list of an earlier build if there are none."""
    if not problems:
        path.unlink(missing_ok=True)
        return
    rows = [("file", "problem", "details"), *((each.path, each.kind.value, each.message) for each in problems)]
    with replacing(path) as temporary:
        temporary.write_text("".join("\t".join(map(printable, row)) + "\n" for row in rows), encoding="utf-8")
    logging.warning("left out %s, listed in %s", counted(len(problems), "file"), path)


def list_images_of(pairs: Sequence[Pair], path: Path) -> None:
    """Write the names of images, one per line, as input for --test_list and for --image_list of inference."""
    with replacing(path) as temporary:
        temporary.write_bytes(
            b"".join(os.fsencode(name) + b"\n" for name in dict.fromkeys(pair.image.name for pair in pairs))
        )


# ---------------------------------------------------------------------------------------------- pairing and splitting


def folders_of(args: argparse.Namespace) -> tuple[Folder, Folder]:
    """Return the folders of images and of masks, each without subfolders that serve another purpose."""
    folders = args.image_folder, args.mask_folder, args.output_folder
    images, masks = (Folder(folder, bool(args.recursive), folders) for folder in folders[:2])
    return images, masks


def find_images(args: argparse.Namespace) -> tuple[list[Source], list[Problem]]:
    """Return the images, sorted by name, and problems of images with no file or several files for a channel."""
    folder = folders_of(args)[0]
    if args.channel_suffixes is None:
        return list_images(folder, args.image_format), []
    images, faults = list_channels(folder, args.channel_suffixes)
    return images, [Problem(ProblemKind.BAD_CHANNELS, *fault) for fault in faults]


def find_pairs(args: argparse.Namespace, images: Sequence[Source]) -> tuple[list[Pair], list[Problem]]:
    """Return each image with its mask, sorted by name, and problems of files with no partner or several partners."""
    suffix = composed(args.mask_suffix or "")
    masks = list_masks(folders_of(args)[1], args.mask_format, suffix)
    if os.path.samefile(args.image_folder, args.mask_folder):
        if not suffix and {image.files[0] for image in images} & {mask.files[0] for mask in masks}:
            raise InputError(f"images and masks are the same files in {args.image_folder}; check the folders")
        images = [image for image in images if not suffix or not image.stem.endswith(suffix)]
    by_image, by_mask = by_stem(images), by_stem(masks, suffix)
    problems = []
    for group in (*by_image.values(), *by_mask.values()):
        for each in group if len(group) > 1 else ():
            others = ", ".join(os.path.basename(other.name) for other in group if other != each)
            problems.append(Problem(ProblemKind.SHARED_NAME, str(each), f"{each}: there is also {others}"))
    lone_images, lone_masks = sorted(by_image.keys() - by_mask.keys()), sorted(by_mask.keys() - by_image.keys())
    advice = f"; names must be equal except for the extension{guess_suffix(lone_images, lone_masks)}"
    for kind, lone, stems in (
        (ProblemKind.NO_MASK, lone_images, by_image), (ProblemKind.NO_IMAGE, lone_masks, by_mask),
    ):  # fmt: skip
        names = [str(each) for stem in lone for each in stems[stem] if len(stems[stem]) == 1]
        problems += [Problem(kind, name, name, advice) for name in names]
    both = sorted(by_image.keys() & by_mask.keys())
    one_of_each = [stem for stem in both if len(by_image[stem] + by_mask[stem]) == 2]
    pairs = [Pair(by_image[stem][0], by_mask[stem][0]) for stem in one_of_each]
    if args.stack is None:
        return pairs, problems
    planes: list[Pair] = []
    for pair in pairs:
        try:
            planes += [Pair(*both) for both in paired_planes(*pair)]
        except InputError as error:
            problems.append(Problem(ProblemKind.BAD_STACK, str(pair.image), str(error)))
    return planes, problems


def split_pairs(
    pairs: Sequence[Pair], images: Sequence[Source], args: argparse.Namespace
) -> tuple[list[Pair], list[Pair]]:
    """Split by image or by group of images, with at least one on each side; return the training and the test pairs.

    The split is random but reproducible, unless the test images are listed. `images` includes images without a mask.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(group_of(pair, args.split_by), []).append(pair)
    least = args.fold.parts if args.fold else 2
    if len(groups) < least:
        what = "images with masks" if args.split_by is None else "groups of images (--split_by)"
        needed = "one for each fold" if args.fold else "one to train and one to test"
        raise InputError(f"expected at least {least} {what}, {needed}, found {len(groups)}")
    members = list(groups.values())
    order = [members[index] for index in np.random.default_rng(args.seed).permutation(len(members))]
    if args.test_list:
        test = listed_groups(members, images, args)
    elif args.fold:
        test = folds_of(order, args.fold.parts)[args.fold.part - 1]
    else:
        counts = np.cumsum([len(group) for group in order])[:-1]
        test = order[int(np.argmin(np.abs(counts - args.train_fraction * len(pairs)))) + 1 :]
    tested = set(itertools.chain(*test))
    return sorted(set(pairs) - tested), sorted(tested)


def folds_of(groups: Sequence[list[Pair]], folds: int) -> list[list[list[Pair]]]:
    """Return the groups of each fold; each group goes to the fold with the fewest images so far."""
    parts: list[list[list[Pair]]] = [[] for _ in range(folds)]
    sizes = [(0, fold) for fold in range(folds)]
    for group in groups:
        size, fold = heapq.heappop(sizes)
        parts[fold].append(group)
        heapq.heappush(sizes, (size + len(group), fold))
    return parts


def listed_groups(groups: Sequence[list[Pair]], images: Sequence[Source], args: argparse.Namespace) -> list[list[Pair]]:
    """Return the groups that --test_list names; raise `InputError` for part of a group, and for all or no groups."""
    listed = listed_stems(args.test_list, "--test_list", images, args.image_folder)
    test = []
    for group in groups:
        chosen = [pair for pair in group if pair.image.stem in listed]
        if 0 < len(chosen) < len(group):
            raise InputError(
                f"--test_list {args.test_list} has {len(chosen)} of the {len(group)} images in the group of "
                f"{chosen[0].image} (--split_by), expected all or none; complete the list"
            )
        test += [group] if chosen else []
    if not 0 < len(test) < len(groups):
        raise InputError(
            f"expected some but not all of the images with masks in --test_list {args.test_list}, found "
            f"{len(listed)} names, {'all' if test else 'none'} of these images"
        )
    return test


def group_of(pair: Pair, split_by: "Optional[re.Pattern[str]]") -> str:
    """Return the part of an image's name that identifies its group; the full name without a pattern."""
    if split_by is None:
        return pair.image.name
    match = split_by.search(os.path.splitext(pair.image.name)[0])
    if match is None:
        raise InputError(f"--split_by {split_by.pattern} finds nothing in the name of {pair.image}; change the pattern")
    return "\0".join(group or "" for group in match.groups()) if split_by.groups else match[0]


# ---------------------------------------------------------------------------------------------- reading headers


class Options(NamedTuple):
    """Settings that the processes need. The last two are known once all headers have been read."""

    tile_size: Optional[int]
    channels: Optional[tuple[int, ...]]
    label_map: Optional[LabelMap]
    skip_bad: bool
    image_no_data: Optional[float]
    objects: Optional[ObjectClasses] = None  # the classes that object ids become, if masks contain ids
    counts_once: bool = False  # whether each pixel of an image counts in only one of its tiles, as for testing
    mask_dtype: str = "int32"
    may_ignore: bool = True  # whether the largest value of the mask type stands for ignored pixels


class PairSpec(NamedTuple):
    """Properties of a pair from its headers."""

    height: int
    width: int
    channels: int  # number in use
    dtypes: tuple[str, str]  # of image and mask in the files
    divisible: bool  # whether both files can be read in parts
    may_lack_data: bool  # whether there is a value for pixels without data
    notes: tuple[str, ...] = ()  # what the user should know about how the files are read

    @property
    def image_dtype(self) -> str:
        """Type of the image in the database."""
        return LOSSLESS_WIDENING.get(self.dtypes[0], self.dtypes[0])

    @property
    def mask_dtype(self) -> str:
        """Type of the mask in the database, if all masks have this type and no values are mapped."""
        return LOSSLESS_WIDENING.get(self.dtypes[1], self.dtypes[1])


def survey(
    workers: "Workers", pairs: Sequence[Pair], options: Options
) -> tuple[dict[Pair, PairSpec], dict[Pair, ChannelStatistics], list[Problem]]:
    """Check the headers of all pairs; return the usable pairs, the statistics of large images, and the problems."""
    specs: dict[Pair, PairSpec] = {}
    measured: dict[Pair, ChannelStatistics] = {}
    known: dict[PairSpec, PairSpec] = {}  # a million pairs of one kind share one object
    problems = []
    progress = Progress("checking", len(pairs), "pairs")
    for pair, found in workers.run(functools.partial(survey_pair, options), pairs, lambda pair: str(pair.image)):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            spec, statistics = found
            specs[pair] = known.setdefault(spec, spec)
            if statistics is not None:
                measured[pair] = statistics
        progress.update(len(specs) + len(problems))
    progress.close()
    widened = collections.Counter(name for spec in specs.values() for name in spec.dtypes if name in LOSSLESS_WIDENING)
    for name, count in widened.items():
        logging.info("%d files of %s are stored as %s, which loses nothing", count, name, LOSSLESS_WIDENING[name])
    for note, count in collections.Counter(note for spec in specs.values() for note in spec.notes).items():
        logging.info("%d %s", count, note)
    problems += differing(
        specs,
        ProblemKind.MIXED_TYPES,
        lambda spec: f"{counted(spec.channels, 'channel')} of {spec.image_dtype}",
        "convert it",
    )
    if options.tile_size is None:
        advice = "set --use_tiling 1"
        problems += differing(
            specs, ProblemKind.MIXED_SIZES, lambda spec: f"{spec.height} x {spec.width} pixels", advice
        )
    return specs, measured, problems


def differing(
    specs: dict[Pair, PairSpec], kind: ProblemKind, describe: Callable[[PairSpec], str], advice: str
) -> list[Problem]:
    """Remove the pairs that differ from most others, and return them as problems."""
    counts = collections.Counter(map(describe, specs.values()))
    if len(counts) < 2:
        return []
    (usual, count), *_ = counts.most_common()
    most = f"most ({count} of {len(specs)}) have {usual}"
    odd = {pair: describe(spec) for pair, spec in specs.items() if describe(spec) != usual}
    for pair in odd:
        del specs[pair]
    return [
        Problem(kind, str(pair.image), f"{pair.image} has {found}, {most}; {advice}") for pair, found in odd.items()
    ]


def survey_pair(options: Options, pair: Pair) -> Union[tuple[PairSpec, Optional[ChannelStatistics]], Problem]:
    """Check the headers of a pair; runs in a worker process.

    A large image, which several jobs encode in parts, is measured here, because each record contains the statistics of
    the complete image.
    """

    def work() -> tuple[PairSpec, Optional[ChannelStatistics]]:
        with open_pair(pair, options) as (image, mask):
            spec = check_headers(image, mask, options)
            is_large = len(encode_jobs(pair, spec, options)) > 1
            return spec, ChannelStatistics.of_file(image) if is_large else None

    return problem_or(work, pair)


def problem_or(work: Callable[[], Result], pair: Pair) -> Union[Result, Problem]:
    """Return the result of `work`, or why a pair cannot be used."""
    try:
        return work()
    except UnusablePixels as error:
        return Problem(ProblemKind.BAD_PIXELS, str(pair.image), str(error))
    except InputError as error:
        return Problem(getattr(error, "kind", ProblemKind.UNREADABLE), str(pair.image), str(error))


@contextlib.contextmanager
def open_pair(pair: Pair, options: Options) -> Iterator[tuple[ImageFile, ImageFile]]:
    """Open both files and yield them; the size of the mask identifies the channel axis of the image."""
    with pair.mask.open(as_mask=True) as mask:
        with pair.image.open(size=mask.shape[:2], no_data=options.image_no_data) as image:
            yield image, mask


def check_headers(image: ImageFile, mask: ImageFile, options: Options) -> PairSpec:
    """Return the specification of a pair of files; raise `Unusable` if their headers show a problem."""
    fault = describe_mask_fault(mask, options)
    if fault:
        raise Unusable(ProblemKind.BAD_MASK, fault)
    height, width, _ = image.shape
    if (height, width) != mask.shape[:2]:
        raise Unusable(
            ProblemKind.OTHER_SIZE,
            f"{image.path} is {height} x {width}, {mask.path} is {mask.shape[0]} x {mask.shape[1]}; does the mask "
            "belong to another image?",
        )
    fault = describe_image_fault(image)
    if fault:
        raise Unusable(ProblemKind.BAD_IMAGE, fault)
    if options.channels is not None:
        try:
            image.select_channels(options.channels)
        except InputError as error:
            raise Unusable(ProblemKind.BAD_IMAGE, str(error)) from None
    if options.tile_size is None and record_bytes(image.shape, image.dtype, np.int32) > LARGEST_RECORD:
        raise Unusable(
            ProblemKind.BAD_IMAGE,
            f"{image.path} is larger than the 4 GiB limit of a database record; set --use_tiling 1",
        )
    dtypes = image.dtype.name, mask.dtype.name
    notes = *(f"images: {note}" for note in image.notes), *(f"masks: {note}" for note in mask.notes)
    divisible, may_lack_data = image.divisible and mask.divisible, image.no_data is not None
    return PairSpec(height, width, image.shape[2], dtypes, divisible, may_lack_data, notes)


def describe_image_fault(image: ImageFile) -> str:
    """Return why an image cannot be stored, judging by its header, or an empty string."""
    height, width, _ = image.shape
    if min(height, width) < SIZE_FACTOR:
        return (
            f"expected at least {SIZE_FACTOR} x {SIZE_FACTOR} pixels in {image.path}, found {height} x {width}; leave "
            "it out or use larger images"
        )
    if image.dtype.name not in (*IMAGE_DTYPES, *LOSSLESS_WIDENING):
        return (
            f"expected an image of {', '.join(IMAGE_DTYPES)} in {image.path}, found {image.dtype}, which none of them "
            f"can store without loss; convert it, for example to {'int32' if image.dtype.kind in 'iu' else 'float32'}"
        )
    return ""


def describe_mask_fault(mask: ImageFile, options: Options) -> str:
    """Return why a mask cannot contain class ids, judging by its header, or an empty string."""
    fault = mask_fault(mask)
    if options.objects is not None:
        return fault
    if fault or mask.dtype.name in (*MASK_DTYPES, *LOSSLESS_WIDENING):
        return fault
    if options.label_map is None or options.label_map.only_ignores:
        return (
            f"expected a mask of {', '.join(MASK_DTYPES)} in {mask.path}, found {mask.dtype}; convert it, or map its "
            "values with --label_map, such as 0:0,1-4294967295:1"
        )
    return ""


# ---------------------------------------------------------------------------------------------- reading and encoding


class EncodeJob(NamedTuple):
    """Records of a pair that a process encodes at once."""

    pair: Pair
    size: tuple[int, int]  # height and width of a record
    origins: list[tuple[int, int]]  # row and column of each record in the image
    record_bytes: int
    statistics: Optional[ChannelStatistics] = None  # of the complete image, if other jobs encode parts of it

    @property
    def nbytes(self) -> int:
        """Total size of the records in bytes."""
        return len(self.origins) * self.record_bytes


class Encoded(NamedTuple):
    """The records of a job, and the statistics of the complete image."""

    records: list[Record]
    statistics: ChannelStatistics
    objects: Optional[ObjectCensus] = None  # of these records, if masks number objects


class Contents:
    """Statistics of the images of one side: value ranges, deviations and objects."""

    def __init__(self) -> None:
        self._minimum, self._maximum = np.array(np.inf), np.array(-np.inf)
        self._deviations = array.array("f")  # compact, because there may be a million images
        self._pixels, self._valid = 0, np.zeros((), np.int64)
        self.objects = self.touching = 0  # objects, and pairs of touching objects
        self._of_image = NO_OBJECTS  # objects of the image that was added last

    def add(self, statistics: ChannelStatistics, spec: PairSpec) -> None:
        """Add an image."""
        self._pixels, self._valid = self._pixels + spec.height * spec.width, self._valid + statistics.valid
        self._minimum = np.minimum(self._minimum, statistics.minimum)
        self._maximum = np.maximum(self._maximum, statistics.maximum)
        self._deviations.extend(statistics.deviation)
        self._of_image = NO_OBJECTS

    def add_objects(self, census: ObjectCensus) -> None:
        """Add the objects in a part of the image that was added last."""
        joined = self._of_image.joined(census)
        self.objects += len(joined.ids) - len(self._of_image.ids)
        self.touching += len(joined.touching) - len(self._of_image.touching)
        self._of_image = joined

    def described(self) -> dict[str, Any]:
        """Return the statistics that a database's metadata contains."""
        return {
            "value_range": self.value_range,
            "missing_shares": self.missing_shares,
            "object_count": self.objects,
            "touching_pairs": self.touching,
        }

    @property
    def value_range(self) -> list[tuple[float, float]]:
        """Minimum and maximum of each channel; 0 for a channel without data."""
        limits = np.stack([self._minimum, self._maximum], axis=1)
        return [(low, high) for low, high in np.where(np.isfinite(limits), limits, 0).tolist()]

    @property
    def missing_shares(self) -> list[float]:
        """Share of pixels without data in each channel."""
        shares: list[float] = (1 - self._valid / self._pixels).tolist()
        return shares

    def deviation_floors(self, image_dtype: str) -> list[float]:
        """Return the smallest deviation by which each channel is divided.

        For integers it is 1, as in the NIST reference implementation. Floats have no natural unit, so the deviation is
        a fraction of the median over all images that are not constant.
        """
        of_channels = np.asarray(self._deviations, np.float64).reshape(-1, len(self._minimum)).T
        if image_dtype != "float32":
            return [1.0] * len(of_channels)
        return [FLOOR_FRACTION * float(np.median(each[each > 0])) if each.any() else 1.0 for each in of_channels]


def grid_of(spec: PairSpec, tile_size: Optional[int]) -> tuple[tuple[int, int], list[int], list[int]]:
    """Return height and width of the records of an image, and the rows and the columns at which they start."""
    if tile_size is not None:
        rows, columns = (tile_starts(max(length, tile_size), tile_size) for length in (spec.height, spec.width))
        return (tile_size, tile_size), rows, columns
    height, width = (length // SIZE_FACTOR * SIZE_FACTOR for length in (spec.height, spec.width))
    return (height, width), [(spec.height - height) // 2], [(spec.width - width) // 2]


def encode_jobs(pair: Pair, spec: PairSpec, options: Options) -> list[EncodeJob]:
    """Return the jobs for a pair, in complete rows of tiles unless they are too large, so that little is read twice."""
    size, rows, columns = grid_of(spec, options.tile_size)
    origins = [(row, column) for row in rows for column in columns]
    nbytes = record_bytes((*size, spec.channels), spec.image_dtype, options.mask_dtype)
    max_bytes = JOB_BYTES * (1 if spec.divisible else INDIVISIBLE_FACTOR)
    count = max(max_bytes // nbytes, 1)
    if len(columns) * nbytes <= 4 * max_bytes:
        count = max(count // len(columns), 1) * len(columns)
    return [EncodeJob(pair, size, origins[first : first + count], nbytes) for first in range(0, len(origins), count)]


def tile_starts(length: int, size: int) -> list[int]:
    """Return where tiles start along one axis of `length` >= `size` pixels; the last tile is moved inside the image.

    Neighbors overlap by at least `RADIUS`, so that one of them shows each pixel with some surroundings.
    """
    return [*range(0, length - size, size - RADIUS), length - size]


def own_part(ids: np.ndarray, origin: tuple[int, int], shape: Sequence[int], ignored: int) -> np.ndarray:
    """Return the mask of a tile with all pixels outside its zone of responsibility set to `ignored`.

    The zones of neighbors meet in the middle of their overlap, where both tiles show about the same surroundings of a
    pixel. Reflected pixels outside the image belong to no zone. The scores of all tiles are therefore the scores of the
    images.
    """
    own = []
    for start, length, size in zip(origin, shape, ids.shape):
        starts = tile_starts(max(length, size), size)
        borders = [0, *((one + size + next_one) // 2 for one, next_one in zip(starts, starts[1:])), length]
        index = starts.index(start)
        own.append(slice(borders[index] - start, borders[index + 1] - start))
    result = np.full_like(ids, ignored)
    result[tuple(own)] = ids[tuple(own)]
    return result


def encode_records(options: Options, job: EncodeJob) -> Encoded:
    """Read, check and encode the records of a job; raise `InputError` if a file or its pixels cannot be used."""
    with open_pair(job.pair, options) as (image, mask):
        if options.channels is not None:
            image.select_channels(options.channels)
        rows, columns = job.size
        squares = ((slice(row, row + rows), slice(column, column + columns)) for row, column in job.origins)
        windows = [clipped(square, mask.shape) for square in squares]
        statistics = job.statistics
        if statistics is None:  # this job has all records of the image, which is small enough to be read at once
            [complete] = image.windows([image.extent])
            statistics = ChannelStatistics.of_file(image, complete)
            parts: Iterable[np.ndarray] = (complete[window] for window in windows)
        else:
            parts = image.windows(windows)
        records, census = [], NO_OBJECTS
        around = options.objects.border_width if options.objects else 0
        wider = [widened(window, around, mask.shape) for window in windows]
        for origin, window, outer, pixels, values in zip(job.origins, windows, wider, parts, mask.windows(wider)):
            pixels = pixels.astype(LOSSLESS_WIDENING.get(pixels.dtype.name, pixels.dtype), copy=False)
            ids, inside, no_data = values[..., 0], relative_window(window, outer), None
            if options.objects is not None:
                ids = checked_objects(ids, mask.path, options)
                census = census.joined(ObjectCensus.of(ids[inside]))
            ids = class_ids(ids, mask.path, options)[inside]
            missing = without_data(pixels, image.no_data)
            if missing is not None:
                no_data = image.no_data
                ids[missing.all(axis=2)] = ignored_id(options.mask_dtype)
            pixels, ids = reflect_to(pixels, job.size), reflect_to(ids, job.size)
            if options.counts_once:
                ids = own_part(ids, origin, mask.shape, ignored_id(options.mask_dtype))
            records.append(Record.encode(pixels, ids, statistics.mean, statistics.deviation, no_data, *origin))
    return Encoded(records, statistics, census if options.objects else None)


def class_ids(mask: np.ndarray, path: Path, options: Options) -> np.ndarray:
    """Return the values (H, W) of a mask as class ids and `ignored_id`, in the database's mask type."""
    reserved, ids = ignored_id(options.mask_dtype), mask
    if options.objects is not None:
        ids = options.objects.apply(mask)
    elif options.label_map is not None:
        try:
            ids = options.label_map.apply(mask)
        except UnnamedValues as error:
            raise Unusable(ProblemKind.UNMAPPED, f"{path}: {error}; add them") from None
    elif mask.dtype.kind == "i" and mask.min() < 0:
        values = np.unique(mask)
        raise Unusable(ProblemKind.NEGATIVE, f"{path}: {advise_label_map(values.tolist())}")
    if options.may_ignore and ids.max() >= reserved:
        raise Unusable(
            ProblemKind.RESERVED,
            f"{path}: {reserved} stands for ignored pixels in masks of {options.mask_dtype}; "
            f"{advise_label_map(np.unique(mask).tolist())}",
        )
    result = ids.astype(options.mask_dtype)
    if options.label_map is not None and options.label_map.ignores:
        result[ids == IGNORED] = reserved
    return result


def checked_objects(mask: np.ndarray, path: Path, options: Options) -> np.ndarray:
    """Return the object ids in a mask (H, W) as int32, with `IGNORED` for ignored pixels."""
    try:
        return object_ids(mask, options.label_map, path)
    except InputError as error:
        raise Unusable(ProblemKind.BAD_OBJECTS, str(error)) from None


def encode_or_problem(options: Options, job: EncodeJob) -> Union[Encoded, Problem]:
    """Return the records of a job, or why its pair cannot be used; runs in a worker process."""
    return problem_or(lambda: encode_records(options, job), job.pair)


def find_problem(options: Options, job: EncodeJob) -> Optional[Problem]:
    """Return why the pair of a job cannot be used, or None if it can; runs in a worker process."""
    encoded = encode_or_problem(options, job)
    return encoded if isinstance(encoded, Problem) else None


class Build:
    """Encodes the usable pairs in worker processes, and appends their records.

    Attributes
    ----------
    options : Options
        Settings of all processes, completed from the headers of the files.
    problems : list of Problem
        One for each pair whose pixels turned out to be unusable.
    image_dtype : str
        Image type of the records.
    ignored_id : int or None
        Value of ignored pixels in place of a class id; None if no pixel can be ignored.
    """

    def __init__(
        self,
        workers: "Workers",
        specs: dict[Pair, PairSpec],
        measured: dict[Pair, ChannelStatistics],
        options: Options,
    ) -> None:
        label_map = options.label_map
        may_ignore = options.tile_size is not None or any(each.may_lack_data for each in specs.values())
        may_ignore = may_ignore or label_map is not None and label_map.ignores
        if options.objects is not None:
            mask_dtype = smallest_mask_type(options.objects.number_classes - 1)
        elif label_map is not None and not label_map.only_ignores:
            mask_dtype = smallest_mask_type(label_map.largest_class + may_ignore)
        else:
            mask_dtype = np.result_type(*{spec.mask_dtype for spec in specs.values()})
        self.ignored_id = ignored_id(mask_dtype) if may_ignore else None
        self._workers, self._specs, self._measured = workers, specs, measured
        self.options = options._replace(mask_dtype=mask_dtype.name, may_ignore=may_ignore)
        self.image_dtype = next(iter(specs.values())).image_dtype
        self.problems: list[Problem] = []
        if options.skip_bad:
            self._try_large_images()
        records = sum(
            images * len(job.origins)
            for spec, images in collections.Counter(specs.values()).items()
            for job in encode_jobs(Pair(Source("", ("",)), Source("", ("",))), spec, self.options)
        )
        self._unit = "images" if options.tile_size is None else "tiles"
        self._progress, self._done = Progress("building", records, self._unit), 0

    def _try_large_images(self) -> None:
        """Leave out unusable images that take several jobs, before any of their records is appended."""
        jobs = itertools.chain.from_iterable(self._jobs(pair) for pair in self._measured if pair in self._specs)
        find = functools.partial(find_problem, self.options)
        for job, problem in self._workers.run(find, jobs, lambda job: str(job.pair.image)):
            if problem is not None and self._specs.pop(job.pair, None) is not None:
                self.problems.append(problem)

    def _jobs(self, pair: Pair) -> Iterator[EncodeJob]:
        """Yield the jobs for a usable pair, with the statistics of its image if the image is large."""
        for job in encode_jobs(pair, self._specs[pair], self.options):
            yield job._replace(statistics=self._measured.get(pair))

    def fill(self, pairs: Sequence[Pair], writer: DatabaseWriter, counts_once: bool) -> Contents:
        """Append the records of the usable pairs; return the statistics of their images."""
        contents, last_pair, uncounted = Contents(), None, 0
        jobs = itertools.chain.from_iterable(self._jobs(pair) for pair in pairs if pair in self._specs)
        encode = functools.partial(encode_or_problem, self.options._replace(counts_once=counts_once))
        for job, encoded in self._workers.run(encode, jobs, lambda job: str(job.pair.image), lambda job: job.nbytes):
            if isinstance(encoded, Problem):
                if not self.problems or self.problems[-1].path != encoded.path:
                    self.problems.append(encoded)
            elif self.options.skip_bad or not self.problems:  # otherwise only further problems matter
                for record in encoded.records:
                    if record.class_counts.keys() == {self.ignored_id}:
                        uncounted += 1
                    else:
                        writer.append(record, job.pair.image.label)
                if job.pair != last_pair:  # once per image
                    contents.add(encoded.statistics, self._specs[job.pair])
                    last_pair = job.pair
                if encoded.objects is not None:
                    contents.add_objects(encoded.objects)
            self._done += len(job.origins)
            self._progress.update(self._done)
        self._progress.close()
        if uncounted:
            logging.info("left out %d %s in which every pixel is ignored or without data", uncounted, self._unit)
        return contents


# ---------------------------------------------------------------------------------------------- worker processes


class Workers(contextlib.AbstractContextManager["Workers"]):
    """Processes that do tasks and return the results in task order; a context manager.

    Arrays in results go through shared memory, which is several times as fast as a pipe. With a `count` of 1, the
    current process does the tasks itself.
    """

    def __init__(self, count: int) -> None:
        self._max_chunks = PREFETCHED_CHUNKS * count
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()  # connections of idle processes
        self._threads = ThreadPoolExecutor(count)  # each waits for a process
        self._pending: collections.deque[Chunk] = collections.deque()
        self._memories: list[SharedMemory] = []
        self._idle: list[SharedMemory] = []  # shared memory of finished chunks
        try:
            for _ in range(count if count > 1 else 0):
                self._start_process()
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def _start_process(self) -> None:
        """Start a process by spawning, because a forked one would inherit open databases and other state."""
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        process = context.Process(target=serve, args=(other,), daemon=True)
        with signals_held():
            process.start()
        other.close()  # so that the connection ends when the process exits
        self._processes.append(process)
        self._connections.append(connection)
        self._free.put(connection)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        name: Callable[[Task], str],
        nbytes: Callable[[Task], int] = lambda _: 0,
    ) -> Iterator[tuple[Task, Result]]:
        """Yield each task with the result of `function`, a module-level function, in order.

        Parameters
        ----------
        tasks : iterable
            Consumed a few tasks ahead of the results.
        name : callable
            Returns the file name of a task, for messages.
        nbytes : callable
            Returns the size of the arrays in the result of a task. Only about `PREFETCHED_BYTES` wait to be yielded.

        Raises
        ------
        InputError
            If a process exits unexpectedly.
        """
        if not self._processes:
            yield from ((task, function(task)) for task in tasks)
            return
        pending, chunk_tasks = self._pending, []
        try:
            for chunk_tasks in chunks_of(tasks, nbytes):
                pending.append(self._submit(function, chunk_tasks, sum(map(nbytes, chunk_tasks))))
                while len(pending) >= self._max_chunks or sum(chunk.nbytes for chunk in pending) > PREFETCHED_BYTES:
                    yield from self._finish_first()
            while pending:
                yield from self._finish_first()
        except WorkerDied:
            unfinished = pending[0].tasks if pending else chunk_tasks
            raise InputError(
                f"a process that reads images exited unexpectedly at {name(unfinished[0])} or one of the next files, "
                "because memory ran out or a file is damaged; try fewer --num_workers, or leave out the file"
            ) from None

    def _submit(self, function: Callable[[Any], Any], tasks: list[Any], nbytes: int) -> "Chunk":
        """Submit tasks; if there is too little shared memory, their results come through the pipe."""
        is_kept = nbytes <= CHUNK_BYTES
        memory = self._idle.pop() if self._idle and 0 < nbytes and is_kept else None
        if nbytes and memory is None:
            with contextlib.suppress(OSError):
                memory = allocate_shared_memory(max(nbytes, CHUNK_BYTES))
                self._memories.append(memory)
        message = function, tasks, memory and memory.name, is_kept
        return Chunk(tasks, nbytes, memory, self._threads.submit(self._have_done, message))

    def _have_done(self, message: tuple[Any, ...]) -> tuple[bytes, list[int]]:
        """Send tasks to a process and wait for its answer; runs in a thread."""
        connection = self._free.get()
        try:
            connection.send(message)
            answer, trace = connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        finally:
            self._free.put(connection)
        if trace is not None:
            raise answer from RuntimeError(trace)
        result: tuple[bytes, list[int]] = answer
        return result

    def _finish_first(self) -> Iterator[tuple[Any, Any]]:
        """Wait for the first chunk and yield its tasks with their results."""
        content, ends = self._pending[0].future.result()
        chunk = self._pending.popleft()
        memory: Any = chunk.memory
        arrays = [bytes(memory.buf[start:end]) for start, end in zip(ends, ends[1:])]
        if memory is not None and chunk.nbytes <= CHUNK_BYTES:
            self._idle.append(memory)
        elif memory is not None:
            memory.close()
            self._memories.remove(memory)
        yield from zip(chunk.tasks, pickle.loads(content, buffers=arrays))

    def __exit__(self, kind: Optional[type] = None, *exception: object) -> None:
        """Stop the processes; kill them after an exception, because their results are no longer needed."""
        for process in self._processes if kind is not None else ():
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()
        for memory in self._memories:
            memory.close()


class WorkerDied(Exception):
    """A process exited before its work was done."""


class Chunk(NamedTuple):
    """Tasks that a process does at once, the size of the arrays in their results, and where these results arrive."""

    tasks: list[Any]
    nbytes: int
    memory: Optional[SharedMemory]
    future: "Future[tuple[bytes, list[int]]]"


def chunks_of(tasks: Iterable[Task], nbytes: Callable[[Task], int]) -> Iterator[list[Task]]:
    """Yield tasks in groups of up to `CHUNK_TASKS`, with results of up to `CHUNK_BYTES` unless one task has more."""
    chunk: list[Task] = []
    for task in tasks:
        if chunk and (len(chunk) == CHUNK_TASKS or sum(map(nbytes, chunk)) + nbytes(task) > CHUNK_BYTES):
            yield chunk
            chunk = []
        chunk.append(task)
    if chunk:
        yield chunk


def serve(connection: Any) -> None:
    """Do the tasks that come through a connection; the main function of a worker process.

    It leaves Ctrl-C to the main process, and exits when the main process exits, for whatever reason.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked while the process was started
    end_with_parent()
    with contextlib.suppress(EOFError):
        while True:
            message = connection.recv()
            try:
                answer: Any = do_chunk(*message)
                trace = None
            except Exception as error:
                answer, trace = error, traceback.format_exc()
            connection.send((answer, trace))


def do_chunk(
    function: Callable[[Any], Any], tasks: list[Any], memory_name: Optional[str], is_kept: bool
) -> tuple[bytes, list[int]]:
    """Do tasks in a worker process, and put the arrays of their results into shared memory if they fit.

    Returns
    -------
    content : bytes
        The pickled results, without their arrays if these are in shared memory.
    ends : list of int
        Boundaries of the arrays in shared memory, one after another.
    """
    results = [function(task) for task in tasks]
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(results, 5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    ends = list(itertools.accumulate((array.nbytes for array in arrays), initial=0))
    memory: Any = memory_name and (kept_memory if is_kept else attach_shared_memory)(memory_name)
    if memory is None or ends[-1] > memory.size:
        return pickle.dumps(results, 5), []
    for each, start, end in zip(arrays, ends, ends[1:]):
        memory.buf[start:end] = each
    if not is_kept:
        memory.close()
    return content, ends


kept_memory = functools.lru_cache(attach_shared_memory)


# ---------------------------------------------------------------------------------------------- describing a database


def describe_databases(filepaths: Sequence[Path], preview: bool) -> None:
    """Log the contents of databases, with hints about anything unusual; draw some of their records if `preview`."""
    unusual = {}
    for filepath in filepaths:
        picture = filepath.with_suffix(".png")
        if preview:
            check_previews([picture], [filepath], "its database; rename the database so that it ends in .lmdb")
        with Database(filepath) as database:
            for line in describe(filepath, database.metadata):
                logging.info("%s", line)
            if preview:
                from reports import draw_records

                logging.info("  some of its records: %s", draw_records(database, picture))
            unusual.update(dict.fromkeys(unusual_content(database.metadata)))
    for line in unusual:
        logging.warning("%s", line)


def describe(filepath: Path, metadata: Metadata) -> Iterator[str]:
    """Yield lines that describe the contents of a database and how it was made."""
    info = metadata.info
    height, width, channels = metadata.image_shape
    kind = "tile" if info.get("tile_size") else "record"
    yield (
        f"{filepath}: {counted(len(metadata.names), 'image')}, {counted(metadata.count, kind)} of "
        f"{height} x {width} x {channels} {info['image_dtype']}, masks {info['mask_dtype']}"
    )
    names = (
        "seed", "train_fraction", "fold", "test_list", "split_by", "label_map", "image_no_data", "channels", "left_out",
    )  # fmt: skip
    made = {name: info.get(name) for name in names}
    shown = ", ".join(f"{name} {value}" for name, value in made.items() if value is not None)
    yield f"  the {info.get('side')} side of dataset {info.get('dataset_name')}: {shown}"
    ranges = [f"{minimum:g} to {maximum:g}" for minimum, maximum in info.get("value_range", [])]
    if ranges:
        yield f"  values {ranges[0]}" if channels == 1 else f"  values of each channel: {'; '.join(ranges)}"
    if any(info.get("missing_shares", [])):
        yield f"  without data in each channel: {', '.join(f'{100 * share:.2f} %' for share in info['missing_shares'])}"
    total = int(metadata.pixel_counts.sum())
    for position, (class_id, pixels) in enumerate(zip(metadata.classes, metadata.pixel_counts)):
        if position == MANY_CLASSES:
            yield f"  and {len(metadata.classes) - position} more classes, up to {metadata.classes[-1]}"
            break
        records = counted(len(metadata.records_of_class(position)), "record")
        yield f"  class {class_id}: {pixels} pixels ({100 * pixels / total:.2f} %), in {records}"
    if info.get("objects"):
        yield (
            f"  {counted(info['object_count'], 'object')}, {counted(info['touching_pairs'], 'touching pair')}; "
            f"{ObjectClasses(**info['objects'])}"
        )
    if info["ignored_pixels"]:
        ignored = info["ignored_pixels"]
        is_divided = info.get("tile_size") and info.get("side") == "test"  # between neighboring tiles
        which = "ignored, without data or counted in a neighboring tile" if is_divided else "ignored or without data"
        yield f"  {which}: {ignored} more pixels ({100 * ignored / (total + ignored):.2f} % of all)"


def unusual_content(metadata: Metadata) -> Iterator[str]:
    """Yield descriptions of likely mistakes, with the option that fixes each."""
    if len(metadata.classes) == 1:
        yield f"only class {metadata.classes[0]} occurs, so there is nothing to learn; are these the right masks?"
    advice = advise_label_map(metadata.classes.tolist())
    if len(metadata.classes) > MANY_CLASSES and metadata.classes[0] > 0:
        yield (
            "no mask pixel is 0 (background), but many other values occur; are --image_folder and --mask_folder "
            "swapped?"
        )
    elif advice:
        yield f"training needs --number_classes {metadata.classes[-1] + 1}; {advice}"
    info = metadata.info
    if info.get("side") == "train":
        if info.get("image_no_data") is not None and not any(info.get("missing_shares", [1.0])):
            yield f"no pixel has the value of --image_no_data, {info['image_no_data']:g}; is it the right value?"
        if "ignore" in (info.get("label_map") or "") and not info["ignored_pixels"]:
            yield f"no pixel is ignored by --label_map {info['label_map']}; are these the right values?"
    if "value_range" not in info:
        return
    spread = np.ptp(info["value_range"], axis=1)  # of each channel
    constant, others = np.flatnonzero(spread == 0), np.flatnonzero(spread)
    if len(constant) and len(others):
        chosen = info.get("channels") or range(metadata.image_shape[2])
        yield (
            f"the same value everywhere in channel {', '.join(str(chosen[channel]) for channel in constant)} (alpha?): "
            f"--channels {','.join(str(chosen[channel]) for channel in others)} leaves it out"
        )


if __name__ == "__main__":
    sys.exit(main())
