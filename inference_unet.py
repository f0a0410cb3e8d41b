r"""Segment every image of a folder with a trained model.

    python inference_unet.py --saved_model_filepath results/cells/saved_model --image_folder images/ \
        --output_folder masks/

Contains the tiling and the loop over a folder. The tiled result equals the result of one pass over the entire image
(Majurski and Bajcsy, J. Res. NIST 126:126009), because each tile has a halo of the network's radius, which is
discarded. TensorFlow is imported inside functions so that ``-h`` responds immediately.
"""

import os
import signal
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH excludes it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C interrupts the imports

import argparse
import contextlib
import dataclasses
import itertools
import logging
import math
import queue
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import numpy as np

from cli import (
    EXIT_BAD_INPUT,
    Check,
    Claims,
    InputError,
    Parser,
    Part,
    PathLike,
    Progress,
    StopRequest,
    add_flag,
    any_text,
    cause_of,
    check_values,
    counted,
    describe_error,
    existing_folder,
    file_stem,
    free_host_memory,
    gpus_of_task,
    is_out_of_memory,
    list_of,
    log_settings,
    optional,
    printable,
    read_json,
    real,
    real_number,
    remove,
    replacing,
    run_script,
    slurm_number,
    some_path,
    temporary_name,
    whole,
    whole_number,
    without_patterns,
)
from image_files import (
    NO_DATA_TAG,
    ORIENTATION_TAG,
    REDUCED_IMAGE,
    RESULTS_MARK,
    ChannelStatistics,
    Folder,
    ImageFile,
    Source,
    StackLayout,
    Window,
    by_stem,
    clipped,
    composed,
    displayable,
    guess_suffix,
    image_format,
    list_channels,
    list_images,
    list_masks,
    listed_stems,
    mask_fault,
    normalize,
    paired_planes,
    reflect_to,
    relative_window,
    suffix_list,
    widened,
    without_data,
)
from lmdb_utils import (
    IGNORED,
    MODEL_METADATA_FILE,
    RADIUS,
    SIZE_FACTOR,
    LabelMap,
    UnnamedValues,
    check_saved_model,
    count_classes,
    object_ids,
)
from objects import (
    Ids,
    Numbering,
    ObjectClasses,
    ObjectTable,
    Overlaps,
    Strip,
    grown,
    numbered,
    strips_of,
)
from reports import (
    FIGURES_FOLDER,
    NOTHING,
    OBJECT_ROWS,
    OBJECTS_FILE,
    PAGE_FILE,
    SCORES_FILE,
    TABLE_FILE,
    AboutObjects,
    Figures,
    Measurement,
    Wanted,
    report_masks,
    write_objects,
)

Item = TypeVar("Item")

OVERVIEWS_ABOVE, SMALLEST_OVERVIEW = 4096, 512  # pixels along the longer edge
TIFF_TILE = 256  # pixels; edge of the tiles inside a TIFF file
TIFF_LAYOUT: Any = {"tile": (TIFF_TILE, TIFF_TILE), "compression": "zlib", "photometric": "minisblack"}
SIZE_WITH_OVERVIEWS = 4 / 3  # relative to a file without overviews
BIGTIFF_FROM_BYTES = 2**32 - 2**25  # classic TIFF has 32-bit file offsets
QUEUED_TILES = 16  # tiles of a file that wait for compression
SUBFOLDERS = ("probabilities", "overlays", "objects", FIGURES_FOLDER)  # in the output folder
PLANES_FOLDER = "planes"  # in the output folder, until all planes of a stack are done
OVERLAY_PIXELS, THUMBNAIL_PIXELS = 2048, 256  # pixels; larger pictures are reduced to this longer edge
THUMBNAIL_QUALITY = 70  # JPEG quality

# Colors of the classes 1, 2, ..., distinguishable with any kind of color vision (Okabe and Ito, 2008).
OUTLINE_COLORS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]],
    np.uint8,
)
OBJECT_COLORS = OUTLINE_COLORS  # of the objects 1, 2, ..., used cyclically
# Colors of wrong pixels that are background, were predicted as background, or were confused with another class.
FALSE_COLOR, MISSED_COLOR, CONFUSED_COLOR = np.array([[255, 0, 0], [0, 0, 255], [255, 255, 0]], np.uint8)

MIRROR_IMAGES = ((), (1,), (2,), (1, 2))  # flipped axes of a batch (N, H, W, C): none, rows, columns, both
MAX_TILE_PIXELS = 1824**2  # halos of 96 pixels add a quarter to the work; at four times the area, a tenth
BATCH_PIXELS = 2**20  # larger batches gain nothing
MEMORY_SHARE = 0.5  # of the free memory, for the network's activations
FEATURE_COPIES = 6  # float32 values in memory for each pixel and feature; measured for 2 to 64 features
BATCHES_HELD = 3  # inputs and outputs in memory: one being read, one in the network, one being written
PAPER_FEATURES = 64  # of a model that does not declare its own
LARGEST_TILE = 2**14  # pixels along an edge
LARGEST_RADIUS = 2**12  # pixels; upper limit for any network
LOAD_ATTEMPTS = 10  # in case a training run replaces the model meanwhile
SHOWN_IMAGES = 5  # in a log line
LARGE_SCALE = 1000  # times the range of the training images; beyond it, the units must differ


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser("inference", "Segment all images in a folder with a trained U-Net model")
    add_data_options(parser)
    add_work_options(parser)
    add_file_options(parser)
    add_measuring_options(parser)
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the specification, for the model, the images and the masks."""
    required: dict[str, Any] = {"required": True, "default": argparse.SUPPRESS}
    text = (
        "filepath to the SavedModel to use, the folder saved_model of a training run (Required); if several are given,"
        " their class probabilities (softmax) are averaged"
    )
    parser.add_argument("--saved_model_filepath", type=some_path, nargs="+", **required, help=text)
    text = "filepath to the folder containing the images to segment (Required)"
    parser.add_argument("--image_folder", type=existing_folder, **required, help=text)
    text = "filepath to the folder for the masks, which get the names of their images (Required)"
    parser.add_argument("--output_folder", type=some_path, **required, help=text)
    text = "format (extension) of the input images: tif, png or jpg"
    parser.add_argument("--image_format", type=image_format, default="tif", help=text)
    text = (
        "'planes' segments each plane of a TIFF that has several (Z, T, OME images, or pages); the masks become a "
        "stack with the same planes"
    )
    parser.add_argument("--stack", choices=("planes",), help=text)
    text = (
        "suffixes that channel files add to the image name, in channel order, for images with one file per channel; "
        "if not given, the suffixes of the training databases; 'none' means one file per image"
    )
    parser.add_argument("--channel_suffixes", metavar="SUFFIX,...", type=suffixes_or_none, help=text)
    text = (
        "whether to also segment the images in all subfolders of IMAGE_FOLDER, into subfolders of the same names; "
        "lists, logs and tables then identify images by their paths in IMAGE_FOLDER [0 = false, 1 = true]"
    )
    add_flag(parser, "--recursive", 0, text)
    text = "text file with the names of the images to segment, one per line, with or without extension"
    parser.add_argument("--image_list", metavar="FILE", type=some_path, help=text)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for how the work is done."""
    text = (
        "largest edge in pixels of the tiles that larger images are cut into, including the halo (a margin of 96 "
        "pixels on each side, which is discarded); affects memory and speed, not the result. If not given, the tile "
        "shape minimizes the work for each image within half of the free memory of the GPU (or of the computer or "
        f"job), up to {MAX_TILE_PIXELS / 1e6:.1f} million pixels. If memory still runs out, tiles are halved"
    )
    parser.add_argument("--tile_size", type=whole_number(1, LARGEST_TILE), help=text)
    text = (
        "whether to average the softmax over each image and its three mirror images, which takes four times as long "
        "and usually improves the masks slightly [0 = false, 1 = true]"
    )
    add_flag(parser, "--flips", 0, text)
    text = (
        "value of image pixels without data, such as --image_no_data=-9999, in addition to NaN and the value of a "
        "GDAL no-data tag; if not given, the value of the training databases"
    )
    parser.add_argument("--image_no_data", metavar="VALUE", type=real_number, help=text)
    text = (
        "mask class of pixels without data in all channels, which TIFF masks then declare as their no-data value; "
        "if not given, these pixels are 0 and no value is declared"
    )
    parser.add_argument("--no_data_class", metavar="CLASS", type=class_id, help=text)
    text = (
        "whether to replace existing masks [0 = false, 1 = true]; with 0, their images are skipped, so that an "
        "interrupted run resumes"
    )
    add_flag(parser, "--overwrite", 0, text)
    text = (
        "process one of several parts of the images, such as 2/8, and leave the others to other processes; under "
        "Slurm, the tasks of an srun and the elements of a job array share the images automatically"
    )
    parser.add_argument("--shard", metavar="PART/PARTS", type=Part.parse, help=text)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the files of each image."""
    text = "whether to also write the network's softmax, as float32 TIFFs with one channel per class, to"
    add_flag(parser, "--save_probabilities", 0, f"{text} OUTPUT_FOLDER/probabilities [0 = false, 1 = true]")
    text = (
        "whether to draw the outlines of all classes except 0 over each image, as PNGs reduced to at most about 2048 "
        "pixels along the longer edge, in"
    )
    add_flag(parser, "--save_overlay", 0, f"{text} OUTPUT_FOLDER/overlays [0 = false, 1 = true]")
    text = (
        f"whether masks of more than {OVERVIEWS_ABOVE} pixels along an edge contain smaller copies of themselves, so "
        "that viewers open them quickly [0 = false, 1 = true]"
    )
    add_flag(parser, "--overviews", 1, text)
    text = (
        "whether to number the objects in each mask; an id for each connected region goes to uint32 TIFFs in "
        f"OUTPUT_FOLDER/objects, a row for each object to OUTPUT_FOLDER/{OBJECTS_FILE} [0 = false, 1 = true]"
    )
    add_flag(parser, "--save_objects", 0, text)
    text = "minimum size of an object in pixels, for --save_objects 1; if not given, 1"
    parser.add_argument("--smallest_object", metavar="PIXELS", type=whole_number(1, 2**31), help=text)


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for measurements of all masks."""
    text = (
        "folder with true masks, named as for build_lmdb.py, whose values become classes as in the training databases; "
        f"accuracy, IoU and Dice of each image and in total are written to OUTPUT_FOLDER/{SCORES_FILE}, and wrong "
        "pixels are marked in overlays"
    )
    parser.add_argument("--mask_folder", type=existing_folder, help=text)
    text = "suffix that the names of true masks add to the image name, such as _mask for cell1.tif and cell1_mask.tif"
    parser.add_argument("--mask_suffix", metavar="SUFFIX", type=file_stem, help=text)
    text = (
        "whether to write the pixels and connected regions of each class in each mask, and the mean probability of "
        f"the predicted classes, to OUTPUT_FOLDER/{TABLE_FILE} [0 = false, 1 = true]"
    )
    add_flag(parser, "--save_table", 0, text)
    text = (
        f"whether to write OUTPUT_FOLDER/{PAGE_FILE}, an HTML page with a row for each mask, its picture and its "
        "figures; the worst or least certain masks come first [0 = false, 1 = true]"
    )
    add_flag(parser, "--save_report", 0, text)


class_id = whole_number(0, 2**16 - 1)


def suffixes_or_none(text: str) -> list[str]:
    """Return suffixes, an empty list for ``none``; the ``type`` of a command-line option."""
    return [] if text == "none" else suffix_list(text)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; return its exit code."""
    return run_script(build_parser, run, argv)


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    """Segment all images; report a bad image and continue with the others."""
    log_settings(args)
    if args.smallest_object is not None and not args.save_objects:
        raise InputError("expected --save_objects 1 with --smallest_object, got 0; set it, or omit --smallest_object")
    images = find_images(args)
    shard = args.shard or shard_from_slurm(os.environ)
    truths = find_truths(images, args)
    targets = plan_targets(images, truths, args)
    wanted = Wanted(
        args.mask_folder is not None, bool(args.save_table), bool(args.save_report), bool(args.save_objects)
    )
    images = images[shard.part - 1 :: shard.parts]
    if shard.parts > 1:
        logging.info(
            "part %d of %d: %d of %d images%s", shard.part, shard.parts, len(images), len(targets),
            "" if args.shard
            else ", shared among the tasks and array elements of this Slurm job; --shard 1/1 processes all",
        )  # fmt: skip
    prepare_output_folder(args.output_folder)
    model, descriptions = load_models(args)
    sizer = TileSizer(model, affordable_pixels(model), args.tile_size)
    waiting = [image for image in images if args.overwrite or not targets[image].exist()]
    if len(waiting) < len(images):
        logging.info("%d masks already exist and are kept; --overwrite 1 replaces them", len(images) - len(waiting))
    mark_as_results(args.output_folder, args.image_folder)
    with Claims(args.output_folder, folders_with_results(targets.values())) as claims:
        failed, others = segment_files(waiting, targets, truths, model, sizer, claims, args)
        if any(wanted):
            earlier = sorted(set(images) - set(waiting))
            failed += measure_masks(earlier, targets, truths, model, args.smallest_object or 1)
        assemble_stacks(targets, claims)
    if others:
        logging.info("left %s to other processes that write to the same folder", counted(others, "image"))
    done = len(images) - len(failed) - others
    logging.info("%d of %d images done; the masks are in %s", done, len(images), args.output_folder)
    if any(wanted):
        report_masks(args.output_folder, model.number_classes, wanted, descriptions)
    if failed:
        logging.error("%s failed: %s", counted(len(failed), "image"), ", ".join(failed))
    return EXIT_BAD_INPUT if failed else 0


def segment_files(
    images: Sequence[Source],
    targets: Mapping[Source, "Targets"],
    truths: Mapping[Source, Source],
    model: "Model",
    sizer: "TileSizer",
    claims: Claims,
    args: argparse.Namespace,
) -> tuple[list[str], int]:
    """Segment images into files; return the names of failed images, and the number left to other processes."""
    failed, others = [], 0
    for number, image in enumerate(images, 1):
        try:
            with own_work(targets[image], claims, bool(args.overwrite)) as is_mine:
                if is_mine:
                    about = segment_file(image, targets[image], model, sizer, truths.get(image))
                    if args.save_objects:
                        save_objects(image, targets[image], truths.get(image), model, args.smallest_object or 1)
                    logging.info("%d/%d %s", number, len(images), about)
                others += not is_mine
        except InputError as error:
            failed.append(image.label)
            logging.error("%s", error)
    return failed, others


def find_images(args: argparse.Namespace) -> list[Source]:
    """Return the images, sorted by name; only those in --image_list, if given."""
    others = [folder for folder in (args.output_folder, args.mask_folder) if folder is not None]
    folder, suffixes = Folder(args.image_folder, bool(args.recursive), others), args.channel_suffixes
    if suffixes is None:
        model = args.saved_model_filepath[0]
        suffixes = read_model_metadata(model, model / MODEL_METADATA_FILE).get("channel_suffixes")
    images = list_complete_images(folder, suffixes) if suffixes else list_images(folder, args.image_format)
    if args.image_list is not None:
        listed = listed_stems(args.image_list, "--image_list", images, args.image_folder)
        images = [image for image in images if image.stem in listed]
        if not images:
            raise InputError(f"expected names of images in --image_list {args.image_list}, found none")
    return images if args.stack is None else [plane for image in images for plane in image.planes()]


def list_complete_images(folder: Folder, suffixes: Sequence[str]) -> list[Source]:
    """Return images with one file per channel; refuse the folder if an image lacks a channel."""
    try:
        images, faults = list_channels(folder, suffixes)
    except InputError as error:
        raise InputError(f"{error}, or set --channel_suffixes none if each image is one file") from None
    if faults:
        shown = "; ".join(fault for _, fault in faults[:SHOWN_IMAGES])
        more = f"; and {len(faults) - SHOWN_IMAGES} more" if len(faults) > SHOWN_IMAGES else ""
        raise InputError(f"{shown}{more}; complete the images, or move their files away")
    return images


@contextlib.contextmanager
def own_work(targets: "Targets", claims: Claims, overwrite: bool) -> Iterator[bool]:
    """Yield whether this process is to write the files; no other process writes them within this block."""
    is_claimed, seen = claims.claim(targets.mask_name), targets.exist()
    try:
        # Another process may have written them since the images were listed.
        yield is_claimed and (overwrite or not seen)
    finally:
        if is_claimed:
            claims.release(targets.mask_name)


# ---------------------------------------------------------------------------------------------- many processes


def shard_from_slurm(environment: Mapping[str, str]) -> Part:
    """Return this process's part among the elements of a job array and the tasks of an ``srun``.

    Notes
    -----
    ``SLURM_STEP_NUM_TASKS`` is set only under ``srun``. ``SLURM_NTASKS`` and ``SLURM_PROCID`` are also set in a batch
    script, where a program started without ``srun`` runs once and has to do all the work.
    """
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        element, first, last, count = (
            slurm_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")
        )
        step = max((last - first) // max(count - 1, 1), 1)
        index = (element - first) // step
        if first + index * step != element or first + (count - 1) * step != last or not 0 <= index < count:
            raise InputError(
                f"expected a job array with evenly spaced elements, to share the images among them, found {count} from "
                f"{first} to {last}; submit again with, for example, --array=0-7 (finished masks are skipped), or set "
                "--shard (1/1 for all images, 3/8 for the third of eight parts)"
            )
    tasks = slurm_number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1:
        index, count = index * tasks + slurm_number(environment, "SLURM_PROCID"), count * tasks
    if not 0 <= index < count:
        raise InputError(
            f"expected a task of this srun, 0 to {count - 1}, found {index}; set --shard 1/1 for a single process"
        )
    return Part(index + 1, count)


# ---------------------------------------------------------------------------------------------- the model


class TileTooLarge(Exception):
    """The network ran out of memory on a tile."""


@dataclass(frozen=True)
class Model:
    """A loaded SavedModel and its properties."""

    predict: Callable[[np.ndarray], np.ndarray]  # from float32 (N, H, W, C) to softmax, float32 (N, H, W, classes)
    channels: int
    number_classes: int
    radius: int  # pixels beyond each edge of a pooling-grid block on which its results depend; the halo
    size_factor: int  # heights, widths and tile origins are multiples of it
    features: int = PAPER_FEATURES  # at the top level; most of the network's memory is proportional to it
    source_channels: Optional[Sequence[int]] = None  # used channels of the training images, if not all of them
    channel_suffixes: Optional[list[str]] = None  # of the channel files, if each channel was a separate file
    deviation_floor: Sequence[float] = (1.0,)  # smallest divisor of each channel (or of all channels)
    value_range: Optional[Sequence[tuple[float, float]]] = None  # of each channel of the training images
    image_dtype: Optional[str] = None  # of the training images
    label_map: Optional[LabelMap] = None  # from the values of the training masks to classes
    objects: Optional[ObjectClasses] = None  # from the object ids in the training masks to classes, if any
    image_no_data: Optional[float] = None  # value of pixels without data, in addition to a file's own
    no_data_class: Optional[int] = None  # class of these pixels if masks declare it; otherwise 0
    members: Sequence["Model"] = ()  # whose softmax is averaged, if this represents several models
    views: Sequence[tuple[int, ...]] = ((),)  # axes that each view flips; the softmax is averaged over views

    def __str__(self) -> str:
        """Return a description in one line."""
        floors = ", ".join(f"{floor:g}" for floor in self.deviation_floor)
        return (
            f"{counted(self.channels, 'channel')}, {self.number_classes} classes, {self.features} features, "
            f"radius {self.radius}, label map {self.label_map}, deviation floors {floors}"
        )

    @property
    def growth(self) -> int:
        """Pixels by which objects grow over the border class, twice the border width; 0 without a border class."""
        return 2 * self.objects.border_width if self.objects else 0

    @property
    def networks(self) -> Sequence["Model"]:
        """The models to run, which are the members or this model."""
        return self.members or (self,)

    @property
    def floors(self) -> list[tuple[float, ...]]:
        """The distinct deviation floors of the networks."""
        return list(dict.fromkeys(tuple(network.deviation_floor) for network in self.networks))

    @property
    def halo(self) -> int:
        """The radius, rounded up so that tiles start on the network's grid."""
        return round_up(self.radius, self.size_factor)

    @property
    def min_tile_size(self) -> int:
        """Edge of the smallest tile that has pixels between its halos."""
        return 2 * self.halo + self.size_factor

    @property
    def mask_dtype(self) -> np.dtype:
        """Smallest unsigned dtype for the classes."""
        return np.min_scalar_type(max(self.number_classes - 1, self.no_data_class or 0))


def load_models(args: argparse.Namespace) -> tuple[Model, list[str]]:
    """Return the models combined into one and changed according to the options, and lines that describe them."""
    models = [load_model(filepath) for filepath in args.saved_model_filepath]
    model = combine(models, args.saved_model_filepath)
    descriptions = [f"model {filepath}: {each}" for each, filepath in zip(models, args.saved_model_filepath)]
    for description in descriptions:
        logging.info("%s", description)
    given, trained = args.channel_suffixes, model.channel_suffixes
    if given and trained and given != trained and set(given) == set(trained):
        raise InputError(
            f"expected --channel_suffixes {','.join(trained)}, the order used in training, got {','.join(given)}; "
            "omit the option"
        )
    if args.flips:
        descriptions.append("mean over the four mirror images of each image")
        model = dataclasses.replace(model, views=MIRROR_IMAGES)
    no_data = model.image_no_data if args.image_no_data is None else args.image_no_data
    return dataclasses.replace(model, image_no_data=no_data, no_data_class=args.no_data_class), descriptions


def combine(models: Sequence[Model], filepaths: Sequence[Path]) -> Model:
    """Return a model that averages the softmax of several, which must agree in inputs and outputs.

    Its warnings about the scale of images come from the first model.
    """
    first = models[0]
    for model, filepath in zip(models, filepaths):
        for name in (
            "channels",
            "number_classes",
            "source_channels",
            "channel_suffixes",
            "label_map",
            "objects",
            "image_no_data",
        ):
            expected, found = getattr(first, name), getattr(model, name)
            if expected != found:
                raise InputError(
                    f"expected models that agree in {name.replace('_', ' ')}, found {expected} in {filepaths[0]} "
                    f"and {found} in {filepath}; use models trained on the same kind of data"
                )
    if len(models) == 1:
        return first
    return dataclasses.replace(
        first,
        radius=max(model.radius for model in models),
        size_factor=math.lcm(*(model.size_factor for model in models)),
        features=max(model.features for model in models),
        members=tuple(models),
    )


def load_model(filepath: PathLike) -> Model:
    """Load a SavedModel with a ``serving_default`` signature; refuse everything else.

    If a training run replaces it meanwhile, load the new one.
    """
    folder = Path(filepath)
    for _ in range(LOAD_ATTEMPTS - 1):
        before = os.stat(folder) if folder.exists() else None
        try:
            return load_model_once(folder)
        except InputError:
            if before is None or not folder.exists() or os.path.samestat(before, os.stat(folder)):
                raise
    return load_model_once(folder)


def load_model_once(folder: Path) -> Model:
    """Load a SavedModel that is not replaced meanwhile."""
    check_saved_model(folder)
    import tensorflow as tf

    gpu = own_gpu()
    if gpu is not None:
        tf.config.set_visible_devices([gpu], "GPU")
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(False)  # its 10 bits make results depend on tiling
    with without_patterns(folder) as path:
        metadata = read_model_metadata(folder, Path(path) / MODEL_METADATA_FILE)
        try:
            loaded = tf.saved_model.load(path)
        except MemoryError:
            raise
        except Exception as error:  # TensorFlow may raise anything for a damaged file
            raise InputError(
                f"cannot load the SavedModel in {folder}: {cause_of(error).replace(path, str(folder))}; copy or "
                "export it again"
            ) from error
    if "serving_default" not in loaded.signatures:
        raise InputError(
            f"expected a SavedModel with the signature serving_default in {folder}, found "
            f"{sorted(loaded.signatures) or 'none'}; train one with train_unet.py"
        )
    network = Network(folder, loaded)
    check_lengths(metadata, network.channels, folder)
    return Model(
        network.predict,
        network.channels,
        network.number_classes,
        metadata.get("radius", RADIUS),
        metadata.get("size_factor", SIZE_FACTOR),
        metadata.get("baseline_feature_depth", PAPER_FEATURES),
        metadata.get("source_channels"),
        metadata.get("channel_suffixes"),
        metadata.get("deviation_floor", (1.0,)),
        metadata.get("value_range"),
        metadata.get("image_dtype"),
        parsed_label_map(metadata, folder),
        ObjectClasses(**metadata["objects"]) if metadata.get("objects") else None,
        metadata.get("image_no_data"),
    )


def read_model_metadata(folder: Path, file: Path) -> dict[str, Any]:
    """Return the metadata of a SavedModel; an empty dictionary if it is not from this suite.

    Raises
    ------
    InputError
        If the metadata is not what `train_unet.py` writes.
    """
    if not os.path.lexists(file):
        return {}
    try:
        metadata = read_json(file)
    except (InputError, OSError) as error:
        reason = describe_error(error).replace(str(file), str(folder / file.name))
        raise InputError(reason.replace("move it away", "export the model again")) from None
    known: dict[str, Check] = {
        "radius": whole(RADIUS, LARGEST_RADIUS),
        "size_factor": lambda value: whole(SIZE_FACTOR, LARGEST_RADIUS)(value) and value % SIZE_FACTOR == 0,
        "baseline_feature_depth": whole(1, 2**16),
        "source_channels": optional(list_of(whole(0, 2**16))),
        "channel_suffixes": optional(list_of(any_text)),
        "deviation_floor": list_of(real(np.finfo(np.float32).tiny)),
        "value_range": optional(list_of(list_of(real(), 2))),
        "image_dtype": optional(any_text),
        "label_map": optional(any_text),
        "objects": optional(ObjectClasses.are),
        "image_no_data": optional(real()),
    }
    check_values(metadata, {name: known[name] for name in known if name in metadata}, folder / file.name)
    return metadata


def parsed_label_map(metadata: Mapping[str, Any], folder: Path) -> Optional[LabelMap]:
    """Return the label map of the training masks; None if their values were the classes."""
    text = metadata.get("label_map")
    try:
        return None if text is None else LabelMap.parse(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{folder / MODEL_METADATA_FILE}: label_map: {error}; export the model again") from None


def check_lengths(metadata: Mapping[str, Any], channels: int, folder: Path) -> None:
    """Refuse SavedModel metadata that does not fit its network."""
    expected = {name: list_of(lambda value: True, channels) for name in ("deviation_floor", "source_channels")}
    expected["value_range"] = expected["source_channels"]
    given = {name: check for name, check in expected.items() if metadata.get(name) is not None}
    check_values(metadata, given, folder / MODEL_METADATA_FILE)


class Network:
    """The signature of a SavedModel, from a float32 batch (N, H, W, C) to one of softmax (N, H, W, classes)."""

    def __init__(self, folder: Path, loaded: Any) -> None:
        self._folder, self._loaded = folder, loaded  # the loaded object must live as long as its signature
        self._signature = loaded.signatures["serving_default"]
        self._input_name, self.channels = self._only("input", self._signature.structured_input_signature[1])
        self._output_name, self.number_classes = self._only("output", self._signature.structured_outputs)

    def _only(self, place: str, specs: Mapping[str, Any]) -> tuple[str, int]:
        """Return the name and depth of the only input or output tensor."""
        if len(specs) == 1:
            ((name, spec),) = specs.items()
            shape = spec.shape.as_list() if spec.shape.rank == 4 else [0]
            if spec.dtype.name == "float32" and shape[:3] == [None, None, None] and shape[3]:
                return name, shape[3]
        found = ", ".join(f"{spec.dtype.name} {spec.shape}" for spec in specs.values())
        raise InputError(
            f"expected a SavedModel in {self._folder} with one float32 {place} of shape (None, None, None, "
            f"{'channels' if place == 'input' else 'classes'}), found {found}; train one with train_unet.py"
        )

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """Return the softmax of a batch; raise `TileTooLarge` if memory runs out."""
        import tensorflow as tf

        try:
            softmax = np.asarray(self._signature(**{self._input_name: tf.constant(batch)})[self._output_name])
        except (tf.errors.OpError, MemoryError) as error:
            if is_out_of_memory(error):
                raise TileTooLarge from error
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the network in {self._folder} fails on tiles of shape {batch.shape}: {reason}"
            ) from error
        if softmax.shape[:3] != batch.shape[:3]:
            raise InputError(
                f"expected a network in {self._folder} that keeps height and width, found {softmax.shape} for "
                f"{batch.shape}; train one with train_unet.py"
            )
        return softmax


# ---------------------------------------------------------------------------------------------- the size of tiles


class TileSizer:
    """Chooses the shape of tiles, and remembers which areas were too large.

    Parameters
    ----------
    model : Model
        Provides the halo and the grid.
    pixels : int
        Largest area in pixels that the network processes at once, including halos.
    longest : int, optional
        Largest edge of a tile in pixels, including halos.

    Raises
    ------
    InputError
        If `longest` is not on the network's grid, or leaves nothing between the halos.
    """

    def __init__(self, model: Model, pixels: int, longest: Optional[int] = None) -> None:
        self._grid, self._halo, self._min_edge = model.size_factor, model.halo, model.min_tile_size
        if longest is not None and (longest % self._grid or longest < self._min_edge):
            raise InputError(
                f"expected --tile_size to be a multiple of {self._grid} and at least {self._min_edge} (a halo of "
                f"{self._halo} on each side), got {longest}; try 512 or 1024"
            )
        self._longest = longest
        self.pixels = max(pixels, (longest or self._min_edge) ** 2)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the tiles that make the least work for an image, as halos are computed twice.

        Among equals, return the largest tile, which makes fewer pieces.
        """
        candidates = set()
        for max_edge in range(self._grid, height + 1, self._grid):
            rows = self._edge(height, max_edge)
            columns = self._edge(width, self.pixels // rows) if rows else None
            if rows and columns:
                candidates.add((rows, columns))
        return min(
            candidates, key=lambda tile: (self._work(height, tile[0]) * self._work(width, tile[1]), -tile[0] * tile[1])
        )

    def _edge(self, length: int, max_edge: int) -> Optional[int]:
        """Return the edge of the fewest possible tiles along an axis, made as small as possible."""
        max_edge = min(max_edge, self._longest or max_edge)
        if length <= max_edge:
            return length
        if max_edge < self._min_edge:
            return None
        inner = length - 2 * self._halo  # total length of the zones, less a halo's width at both ends
        tiles = -(-inner // (max_edge // self._grid * self._grid - 2 * self._halo))
        return -(-inner // (tiles * self._grid)) * self._grid + 2 * self._halo

    def _work(self, length: int, edge: int) -> int:
        """Return the sum of the tiles' edges along an axis."""
        return edge if edge == length else -(-(length - 2 * self._halo) // (edge - 2 * self._halo)) * edge

    def batch_size(self, tile: tuple[int, int]) -> int:
        """Return how many tiles the network processes at once."""
        return max(1, min(self.pixels, BATCH_PIXELS) // (tile[0] * tile[1]))

    def shrink(self, tried: int) -> bool:
        """Allow half of the pixels that were too many; return False if they were already the minimum."""
        self.pixels = max(tried // 2, self._min_edge**2)
        return self.pixels < tried


def affordable_pixels(model: Model) -> int:
    """Return how many pixels the network can process at once with `MEMORY_SHARE` of the free memory."""
    float32_values = FEATURE_COPIES * model.features + BATCHES_HELD * (model.channels + model.number_classes)
    return min(int(MEMORY_SHARE * free_memory() / (4 * float32_values)), MAX_TILE_PIXELS)


def own_gpu() -> Optional[Any]:
    """Return the GPU of this process, or None without a GPU; each task on a node has its own."""
    import tensorflow as tf

    visible = tf.config.list_physical_devices("GPU")
    own = gpus_of_task(len(visible), os.environ, may_share=True)
    return visible[own[0]] if visible else None


def free_memory() -> float:
    """Return the free bytes of this process's GPU or, without a GPU, of this computer and job."""
    gpu = own_gpu()
    if gpu is not None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError, IndexError):
            # TensorFlow reports only its own memory use. It numbers only the devices that CUDA makes visible.
            index, visible = int(gpu.name.rpartition(":")[2]), os.environ.get("CUDA_VISIBLE_DEVICES")
            name = visible.split(",")[index].strip() if visible else str(index)
            query = ["nvidia-smi", f"--id={name}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
            printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            return int(printed) * 2.0**20
    return float(free_host_memory())


# ---------------------------------------------------------------------------------------------- one image


class Tile(NamedTuple):
    """A window of the image and the zone of responsibility inside it, both on the network's grid."""

    window: Window
    zone: Window


class TileInput(NamedTuple):
    """A tile for the network, and its pixels without data in all channels, bool (rows, columns); None if none."""

    tile: Tile
    missing: Optional[np.ndarray]


class Block(NamedTuple):
    """The result for one tile's zone of responsibility, cropped to the image."""

    row: int  # where the block starts in the image
    column: int
    image: np.ndarray  # z-scores, float32 (rows, columns, C); may be `NOTHING`
    softmax: np.ndarray  # float32 (rows, columns, classes); NaN where no channel has data; may be `NOTHING`
    classes: np.ndarray  # the most probable class of each pixel, unsigned (rows, columns)
    missing: Optional[np.ndarray]  # pixels where no channel has data, bool (rows, columns); None if none
    truth: Optional[np.ndarray] = None  # true class or `IGNORED` of each pixel, (rows, columns); None if unknown


Output = Callable[[Block], None]  # takes the blocks of a file
StripOutput = Callable[[Strip, np.ndarray, Optional[np.ndarray]], None]  # takes strips, pixels, missing pixels


class Contents:
    """Counts the pixels of each class in a mask.

    Its text gives the share of each class, so that an all-background result is obvious.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._missing = 0

    def add(self, block: Block) -> None:
        """Count the pixels of a block."""
        known = block.classes if block.missing is None else block.classes[~block.missing]
        self._missing += block.classes.size - known.size
        if known.size:
            self._counts.update(count_classes(known))

    def __str__(self) -> str:
        """Return the shares as text."""
        total = sum(self._counts.values())
        shares = [f"class {class_id}: {100 * count / total:.1f} %" for class_id, count in sorted(self._counts.items())]
        if self._missing:
            shares.append(f"no data in {100 * self._missing / (total + self._missing):.1f} % of the pixels")
        return ", ".join(shares)


@contextlib.contextmanager
def open_image(source: Source, model: Model) -> Iterator[ImageFile]:
    """Yield an image with the channels that the model expects."""
    with source.open(channels=model.channels, no_data=model.image_no_data) as image:
        if model.source_channels and max(model.source_channels) < image.shape[2]:
            image.select_channels(model.source_channels)
        check_image(image, model)
        yield image


def segment_file(
    source: Source, targets: "Targets", model: Model, sizer: TileSizer, true_mask: Optional[Source] = None
) -> str:
    """Segment an image file into files; return a summary for the log."""
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(open_image(source, model))
        truth = stack.enter_context(Truth(true_mask, image, model)) if true_mask else None
        for note in image.notes:
            logging.info("%s: %s", source, note)
        statistics = ChannelStatistics.of_file(image)
        for line in differences_of_scale(image, statistics, model):
            logging.warning("%s", line)
        while True:
            tile = sizer.shape(*(round_up(length, model.size_factor) for length in image.shape[:2]))
            tiles = plan_tiles(image.shape, tile, model)
            batch_size = min(sizer.batch_size(tile), len(tiles))
            try:
                contents = write_results(image, statistics, tiles, batch_size, targets, model, truth)
                size, seconds = " x ".join(map(str, image.shape)), time.monotonic() - start
                return f"{targets.mask_name}: {size}, {seconds:.1f} s, {contents}"
            except TileTooLarge as error:
                if not sizer.shrink(batch_size * tile[0] * tile[1]):
                    raise InputError(
                        f"{source} needs more memory than is available, even in the smallest tiles"
                    ) from error
                logging.warning(
                    "out of memory with %d tiles of %d x %d at once; continuing with at most %d pixels",
                    batch_size, *tile, sizer.pixels,
                )  # fmt: skip


def check_image(image: ImageFile, model: Model) -> None:
    """Refuse an image that the model cannot process."""
    if image.shape[2] != model.channels:
        raise InputError(
            f"expected {counted(model.channels, 'channel')}, as in training, found {image.shape[2]} in {image.path}; "
            "use a model and images that match"
        )
    if image.dtype.kind not in "buif":
        raise InputError(f"expected integer or float pixels in {image.path}, found {image.dtype}; convert the image")


def differences_of_scale(image: ImageFile, statistics: ChannelStatistics, model: Model) -> Iterator[str]:
    """Yield warnings if an image seems to be in different units than the training images.

    The deviation floor replaces the deviation of an image that hardly varies. An image of the training images' own
    integer type is then most likely empty. Otherwise, different units may be the reason.
    """
    if model.value_range is None:
        return
    same_integers = image.dtype.name == model.image_dtype and image.dtype.kind in "iu"
    for channel, (low, high) in enumerate(model.value_range):
        found_low, found_high = statistics.minimum[channel], statistics.maximum[channel]
        hardly_varies = 0 < statistics.deviation[channel] < model.deviation_floor[channel] and not same_integers
        if hardly_varies or found_high - found_low > LARGE_SCALE * (high - low) > 0:
            yield (
                f"{image.path}: values from {found_low:g} to {found_high:g} in channel {channel}, but from {low:g} to "
                f"{high:g} in the training images; if the units differ, convert the image, or its mask will be wrong"
            )


def write_results(
    image: ImageFile,
    statistics: ChannelStatistics,
    tiles: Sequence[Tile],
    batch_size: int,
    targets: "Targets",
    model: Model,
    truth: "Optional[Truth]" = None,
) -> Contents:
    """Segment an image tile by tile and write the files; return the contents of its mask."""
    contents = Contents()
    progress = Progress(f"segmenting {image.path.name}", len(tiles), "tiles")
    blocks = segment(image, statistics, tiles, batch_size, model)
    if truth is not None:
        blocks = truth.added_to(blocks, [clipped(tile.zone, image.shape) for tile in tiles])
    with targets.open(image, model, truth) as outputs, contextlib.closing(blocks):
        for done, block in enumerate(blocks, 1):
            contents.add(block)
            for add in outputs:
                add(block)
            progress.update(done)
    progress.close()
    return contents


def segment(
    image: ImageFile, statistics: ChannelStatistics, tiles: Sequence[Tile], batch_size: int, model: Model
) -> Generator[Block, None, None]:
    """Yield the results for tiles of one shape, in order; the network processes `batch_size` of them at once.

    Reading, prediction and writing overlap.
    """

    def predictions() -> Generator[tuple[Sequence[TileInput], np.ndarray, np.ndarray], None, None]:
        with contextlib.closing(prefetch(read_batches(image, statistics, tiles, batch_size, model))) as batches:
            for part, inputs in batches:
                yield part, inputs[0], mean_softmax(inputs, model)

    with contextlib.closing(prefetch(predictions())) as results:
        for part, batch, predicted in results:
            for (tile, missing), window, scores in zip(part, batch, predicted):
                rows, columns = clipped(tile.zone, image.shape)
                kept = relative_slice(rows, tile.window[0]), relative_slice(columns, tile.window[1])
                softmax, classes = scores[kept], most_probable(scores[kept], model.mask_dtype)
                if missing is not None:
                    missing = missing[kept]
                    classes[missing] = model.no_data_class or 0
                    softmax = np.where(missing[..., None], np.float32(np.nan), softmax)
                yield Block(rows.start, columns.start, window[kept], softmax, classes, missing)


def mean_softmax(inputs: Sequence[np.ndarray], model: Model) -> np.ndarray:
    """Return the softmax (N, H, W, classes) of a batch, the mean over all networks and views.

    Mirrored tiles stay on the network's grid, since their edges are multiples of it. So the result is exact under
    tiling.
    """
    total: Optional[np.ndarray] = None
    for network in model.networks:
        batch = inputs[model.floors.index(tuple(network.deviation_floor))]
        for axes in model.views:
            softmax = np.flip(network.predict(np.flip(batch, axes)), axes) if axes else network.predict(batch)
            total = softmax if total is None else total + softmax
    count = len(model.networks) * len(model.views)
    return total if count == 1 else total / np.float32(count)  # type: ignore[return-value]


def most_probable(softmax: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the most probable class of each pixel; take a few rows at a time, as argmax returns 64-bit integers."""
    classes = np.empty(softmax.shape[:2], dtype)
    for first in range(0, len(classes), 64):
        classes[first : first + 64] = np.argmax(softmax[first : first + 64], axis=-1)
    return classes


def read_batches(
    image: ImageFile, statistics: ChannelStatistics, tiles: Sequence[Tile], batch_size: int, model: Model
) -> Generator[tuple[Sequence[TileInput], list[np.ndarray]], None, None]:
    """Yield tiles and their z-scores (N, H, W, C) for the networks, one array for each of `Model.floors`.

    An image that ends before the network's grid does is padded by reflection.
    """
    size = [part.stop - part.start for part in tiles[0].window]
    windows = image.windows([clipped(tile.window, image.shape) for tile in tiles])
    height, width, _ = image.shape
    no_data = image.no_data if statistics.valid.min() < height * width else None
    for first in range(0, len(tiles), batch_size):
        part: list[TileInput] = []
        shape = (min(batch_size, len(tiles) - first), *size, image.shape[2])
        inputs = [np.empty(shape, np.float32) for _ in model.floors]
        for index, (tile, window) in enumerate(zip(tiles[first : first + batch_size], windows)):
            pixels = reflect_to(window, size)
            missing = without_data(pixels, no_data)
            part.append(TileInput(tile, None if missing is None else np.all(missing, axis=2)))
            for batch, floor in zip(inputs, model.floors):
                normalize(pixels, statistics.mean, statistics.deviation, floor, batch[index], missing)
        yield part, inputs


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


def plan_tiles(shape: Sequence[int], tile: tuple[int, int], model: Model) -> list[Tile]:
    """Return the tiles of an image of shape (H, W, ...), row by row.

    Tiles end at the edge of the image, beyond which the untiled image has no context either. All tiles have the same
    shape, because a GPU would search for its fastest algorithms for each new shape. The last tiles are shifted inward.
    """
    rows, columns = (
        list(plan_axis(round_up(length, model.size_factor), edge, model.halo)) for length, edge in zip(shape, tile)
    )  # fmt: skip
    return [Tile(*zip(row, column)) for row in rows for column in columns]


def plan_axis(length: int, edge: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Yield the window and the zone of responsibility of each tile along one axis."""
    size = min(edge, length)
    done = 0
    while done < length:
        start = min(max(done - halo, 0), length - size)
        end = start + size
        zone_end = length if end == length else end - halo
        yield slice(start, end), slice(done, zone_end)
        done = zone_end


def relative_slice(zone: slice, window: slice) -> slice:
    """Return a zone relative to the start of the window that contains it."""
    return slice(zone.start - window.start, zone.stop - window.start)


def prefetch(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield items while a thread prepares the next one; close `items` when this generator is closed.

    A signal may interrupt the start of the thread or the wait for its end. The executor then loses track of the thread.
    So a lock, not the executor, ensures that nothing runs inside `items` when it is closed.
    """
    end = object()
    in_use = threading.Lock()

    def advance() -> object:
        with in_use:
            return next(items, end)

    try:
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(advance)
            while (item := future.result()) is not end:
                future = executor.submit(advance)
                yield item  # type: ignore[misc]
    finally:
        with in_use:
            items.close()


# ---------------------------------------------------------------------------------------------- scores


def find_truths(images: Sequence[Source], args: argparse.Namespace) -> dict[Source, Source]:
    """Return the true mask of each image that has one."""
    if args.mask_folder is None:
        if args.mask_suffix is not None:
            raise InputError("expected --mask_folder with --mask_suffix, found none; set the folder of true masks")
        return {}
    suffix = composed(args.mask_suffix or "")
    folder = Folder(args.mask_folder, bool(args.recursive), (args.image_folder, args.output_folder))
    masks = by_stem(list_masks(folder, None, suffix), suffix)
    truths: dict[Source, Source] = {}
    lone = []
    for name, planes in itertools.groupby(images, key=lambda image: image._replace(plane=())):
        found = masks.get(name.stem, [])
        if len(found) > 1:
            names = ", ".join(mask.name for mask in found)
            raise InputError(f"expected one mask for {name.name} in {args.mask_folder}, found {names}; move one away")
        if found and any(os.path.samefile(found[0].files[0], file) for file in name.files):
            raise InputError(f"{name} is its own mask; check --mask_folder and --mask_suffix")
        if found and args.stack is not None:
            truths.update(paired_planes(name, found[0]))
        else:
            truths.update(dict.fromkeys(planes, found[0]) if found else {})
        lone += [] if found else [name]
    if not truths:
        advice = guess_suffix([image.stem for image in lone], sorted(masks))
        found_none = f"expected masks in {args.mask_folder} with the names of the images, found none"
        raise InputError(f"{found_none}{advice or '; check the folder'}")
    if lone:
        shown = ", ".join(image.name for image in lone[:SHOWN_IMAGES]) + ", ..." * (len(lone) > SHOWN_IMAGES)
        logging.warning(
            "%s without a mask in %s, and so without scores: %s", counted(len(lone), "image"), args.mask_folder, shown
        )
    return truths


class Truth(contextlib.AbstractContextManager["Truth"]):
    """The true classes of an image, window by window, from a mask file; a context manager.

    Parameters
    ----------
    source : Source
        The true mask.
    image : ImageFile
        The image.
    model : Model
        Provides the label map and the number of classes.

    Raises
    ------
    InputError
        If the file is not a mask of the image's size or, later, if it contains classes that the model lacks.
    """

    def __init__(self, source: Source, image: ImageFile, model: Model) -> None:
        self._file, self._model = source.open(as_mask=True), model
        status = os.stat(source.files[0])
        self.identity = [printable(source.label), status.st_size, status.st_mtime_ns]
        fault = mask_fault(self._file)
        if not fault and self._file.shape[:2] != image.shape[:2]:
            sizes = [" x ".join(map(str, shape[:2])) for shape in (image.shape, self._file.shape)]
            fault = (
                f"{image.path} is {sizes[0]}, its mask {source} is {sizes[1]}; does the mask belong to another image?"
            )
        if fault:
            self._file.close()
            raise InputError(fault)

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self._file.close()

    def windows(self, windows: Sequence[Window]) -> Iterator[np.ndarray]:
        """Yield the class or `IGNORED` for each pixel of each window, (rows, columns)."""
        around = self._model.objects.border_width if self._model.objects else 0
        wider = [widened(window, around, self._file.shape) for window in windows]
        for window, outer, values in zip(windows, wider, self._file.windows(wider)):
            yield self._classes_of(values[..., 0])[relative_window(window, outer)]

    def ids(self, windows: Sequence[Window]) -> Iterator[np.ndarray]:
        """Yield the object id or `IGNORED` for each pixel of each window, (rows, columns)."""
        for values in self._file.windows(windows):
            yield self._ids_of(values[..., 0])

    def _ids_of(self, values: np.ndarray) -> np.ndarray:
        """Return the object ids for values of the file."""
        return object_ids(values, self._model.label_map, self._file.path)

    def _classes_of(self, values: np.ndarray) -> np.ndarray:
        """Return the classes for values of the file."""
        label_map, classes = self._model.label_map, self._model.number_classes
        if self._model.objects is not None:
            return self._model.objects.apply(self._ids_of(values)).astype(np.int32)
        try:
            ids = values if label_map is None else label_map.apply(values)
        except UnnamedValues as error:
            raise InputError(f"{self._file.path}: {error}; use masks like those in training") from None
        known = np.zeros(ids.shape, bool) if label_map is None else ids == IGNORED
        unknown = ~known & ((ids < 0) | (ids >= classes))
        if unknown.any():
            raise InputError(
                f"expected classes 0 to {classes - 1} in {self._file.path}, as in the model, found "
                f"{ids[unknown][0]}; are these masks of another data set, or were they mapped before training?"
            )
        return ids.astype(np.int32)

    def added_to(self, blocks: Generator[Block, None, None], zones: Sequence[Window]) -> Generator[Block, None, None]:
        """Yield blocks with the truth in their zones; pixels without data are ignored."""
        with contextlib.closing(blocks):
            for block, ids in zip(blocks, self.windows(zones)):
                if block.missing is not None:
                    ids[block.missing] = IGNORED
                yield block._replace(truth=ids)


# ---------------------------------------------------------------------------------------------- figures


@contextlib.contextmanager
def measured(targets: "Targets", image: ImageFile, model: Model, truth: Optional[Truth]) -> Iterator[Output]:
    """Start the figures file of a mask; yield a function that takes blocks."""
    if not targets.is_measured:
        yield lambda block: None
        with file_errors(targets.figures):
            for path in (targets.figures, targets.thumbnail):  # of an earlier mask
                path.unlink(missing_ok=True)
        return
    measurement = Measurement(model.number_classes, image.shape[1])
    yield lambda block: measurement.add(*block[:2], block.classes, block.missing, block.softmax, block.truth)
    figures = measurement.figures(targets.source.label, image.pixel_size, truth.identity if truth else None)
    with atomic_output(targets.figures) as temporary:
        figures.write(temporary)


def measure_masks(
    images: Sequence[Source],
    targets: Mapping[Source, "Targets"],
    truths: Mapping[Source, Source],
    model: Model,
    smallest_object: int,
) -> list[str]:
    """Measure the masks of earlier runs that have no figures; return the names of failed images."""
    failed = []
    for image in images:
        try:
            measure_mask(image, targets[image], truths.get(image), model)
            if targets[image].with_objects:
                save_objects(image, targets[image], truths.get(image), model, smallest_object)
        except InputError as error:
            failed.append(image.label)
            logging.error("%s", error)
    return failed


def measure_mask(source: Source, targets: "Targets", true_mask: Optional[Source], model: Model) -> None:
    """Write the figures and thumbnail of an existing mask, if they are missing."""
    found = None
    with contextlib.suppress(InputError, OSError):
        found = Figures.read(targets.figures, model.number_classes)
    is_drawn = targets.is_drawn and not targets.with_objects and not targets.thumbnail.is_file()
    if found is not None and true_mask is None and not is_drawn:
        return
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(open_image(source, model))
        truth = stack.enter_context(Truth(true_mask, image, model)) if true_mask else None
        if found is not None and (truth is None or found.truth == truth.identity) and not is_drawn:
            return
        mask = stack.enter_context(targets.finished_mask().open(as_mask=True))
        if mask.shape != (*image.shape[:2], 1):
            raise InputError(f"{targets.mask} differs in size from {source}; --overwrite 1 replaces the mask")
        measurement = Measurement(model.number_classes, image.shape[1])
        drawing = Drawing(image, model, THUMBNAIL_PIXELS) if is_drawn else None
        for block in blocks_of_mask(mask, image, truth, model, is_drawn):
            measurement.add(*block[:2], block.classes, block.missing, block.softmax, block.truth)
            if drawing is not None:
                drawing.add(block)
        if drawing is not None:
            drawing.save_thumbnail(targets.thumbnail)
        figures = measurement.figures(source.label, image.pixel_size, truth.identity if truth else None)
        with atomic_output(targets.figures) as temporary:  # a mask contains no probabilities
            is_same = found is not None and (truth is None or found.truth == truth.identity)
            objects = found.objects if found is not None and is_same else None
            figures._replace(probability=found and found.probability, objects=objects).write(temporary)


def blocks_of_mask(
    mask: ImageFile, image: ImageFile, truth: Optional[Truth], model: Model, with_image: bool
) -> Iterator[Block]:
    """Yield an existing mask in strips, without softmax; with z-scores only if `with_image`."""
    height, width, _ = mask.shape
    strips = [(slice(row, min(row + TIFF_TILE, height)), slice(0, width)) for row in range(0, height, TIFF_TILE)]
    statistics = ChannelStatistics.of_file(image) if with_image else None

    def blocks() -> Generator[Block, None, None]:
        seen = image.windows(strips) if with_image or image.no_data is not None else itertools.repeat(None)
        for (rows, _), pixels, classes in zip(strips, seen, mask.windows(strips)):
            lacking = None if pixels is None else without_data(pixels, image.no_data)
            scores = NOTHING
            if statistics is not None and pixels is not None:
                scores = normalize(
                    pixels, statistics.mean, statistics.deviation, model.deviation_floor, missing=lacking
                )
            missing = None if lacking is None else np.all(lacking, axis=2)
            unknown = classes[..., 0] >= model.number_classes
            if np.any(unknown if missing is None else unknown & ~missing):
                raise InputError(f"{mask.path} has classes that the model lacks; --overwrite 1 replaces it")
            yield Block(rows.start, 0, scores, NOTHING, classes[..., 0], missing)

    yield from truth.added_to(blocks(), strips) if truth is not None else blocks()


# ---------------------------------------------------------------------------------------------- objects


def save_objects(source: Source, targets: "Targets", true_mask: Optional[Source], model: Model, smallest: int) -> None:
    """Write and measure the objects of a finished mask, unless already done."""
    figures, true_mask = Figures.read(targets.figures, model.number_classes), true_mask if model.objects else None
    known, is_drawn = figures.objects, targets.thumbnail.is_file() or not targets.is_drawn
    if known and known.smallest == smallest and (known.matches or not true_mask) and targets.has_objects and is_drawn:
        return
    if os.path.lexists(targets.complete_objects) and not targets.object_rows.is_file():
        raise InputError(
            f"{targets.complete_objects} was not written by this program; move it, or choose another --output_folder"
        )
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(open_image(source, model))
        truth = stack.enter_context(Truth(true_mask, image, model)) if true_mask else None
        mask = stack.enter_context(targets.finished_mask().open(as_mask=True))
        height, width, _ = mask.shape
        strips = [(rows, slice(0, width)) for rows in strips_of(height, width, model.growth, model.size_factor)]
        progress = Progress(f"objects of {image.path.name}", 2 * len(strips), "strips")  # strips are read twice
        ids = number_objects(mask, image, model, strips, smallest, progress)
        seen, again = itertools.tee(image.windows(strips))  # numbering runs one strip ahead of the output
        found = numbered(strips_of_mask(mask, strips, seen, image.no_data), ids, model.growth > 0)
        found = grown(found, model.growth) if model.growth else found
        true_ids = truth.ids(strips) if truth else itertools.repeat(None)
        table, overlaps = ObjectTable(ids.objects, image.shape[2]), Overlaps()
        with targets.open_objects(image, model) as outputs:
            for done, (strip, pixels, true) in enumerate(zip(found, again, true_ids), len(strips) + 1):
                missing = without_data(pixels, image.no_data)
                table.add(strip, pixels, missing)
                if true is not None:
                    nowhere = true == IGNORED if missing is None else (true == IGNORED) | missing.all(axis=2)
                    overlaps.add(true, strip.ids, nowhere)
                for add in outputs:
                    add(strip, pixels, missing)
                progress.update(done)
            with atomic_output(targets.object_rows) as temporary:  # first, since they mark the ids as ours
                write_objects(temporary, table, image)
            if not targets.is_drawn:
                remove(targets.thumbnail)  # it shows classes, not objects
        progress.close()
        about = AboutObjects(smallest, ids.objects, overlaps.matches() if truth else None)
        with atomic_output(targets.figures) as temporary:
            figures._replace(objects=about).write(temporary)


def number_objects(
    mask: ImageFile, image: ImageFile, model: Model, strips: Sequence[Window], smallest: int, progress: Progress
) -> Ids:
    """Return the ids of the objects in a mask."""
    numbering = Numbering(model.growth > 0, smallest)
    seen = itertools.repeat(None) if image.no_data is None else image.windows(strips)
    for done, (_, classes) in enumerate(strips_of_mask(mask, strips, seen, image.no_data), 1):
        numbering.add(classes)
        progress.update(done)
    return numbering.finish()


def strips_of_mask(
    mask: ImageFile, strips: Sequence[Window], seen: Iterable[Optional[np.ndarray]], no_data: Optional[float]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the rows and classes of mask strips, with class 0 if the pixels `seen` in the image have no data."""
    for (rows, _), classes, pixels in zip(strips, mask.windows(strips), seen):
        missing = None if pixels is None else without_data(pixels, no_data)
        yield rows, classes[..., 0] if missing is None else np.where(missing.all(axis=2), 0, classes[..., 0])


# ---------------------------------------------------------------------------------------------- results on disk


def plan_targets(
    images: Sequence[Source], truths: Mapping[Source, Source], args: argparse.Namespace
) -> dict[Source, "Targets"]:
    """Return the output files of each image.

    Raises
    ------
    InputError
        If a file would replace an image or a true mask, or if two images would get the same file.
    """
    targets = {image: Targets.of(image, args) for image in images}
    originals = {os.path.realpath(file): f"the image {file}" for image in images for file in image.files}
    originals.update(
        {os.path.realpath(file): f"the true mask {file}" for each in truths.values() for file in each.files}
    )
    sources: dict[str, Source] = {}
    for image, files in targets.items():
        for path in {*files.results, files.complete_mask, *([files.complete_objects] if files.with_objects else [])}:
            place = os.path.join(os.path.realpath(path.parent), path.name)
            if place in originals:
                raise InputError(
                    f"{path} would replace {originals[place]}; choose an --output_folder other than "
                    f"{args.output_folder}"
                )
            if sources.setdefault(place, image)._replace(plane=()) != image._replace(plane=()):
                raise InputError(
                    f"{sources[place]} and {image} would both become {path}; rename one of them, or move it to "
                    "another folder"
                )
    return targets


def prepare_output_folder(folder: Path) -> None:
    """Create the output folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create --output_folder {folder}: {cause_of(error)}") from error


def mark_as_results(folder: Path, images: Path) -> None:
    """Mark a new output folder inside the image folder, so that later searches do not take its masks for images."""
    with file_errors(folder):
        if images.resolve() in folder.resolve().parents and not any(folder.iterdir()):
            (folder / RESULTS_MARK).touch()


def folders_with_results(targets: Iterable["Targets"]) -> list[str]:
    """Return the names of all subfolders of the output folder that receive files."""
    names = {(each.file_name, bool(each.source.plane)) for each in targets}
    parents = {os.path.dirname(name) for name, _ in names}
    planes = {os.path.join(PLANES_FOLDER, name) for name, is_stack in names if is_stack}
    return sorted({os.path.join(base, parent) for base in ("", *SUBFOLDERS) for parent in parents} - {""} | planes)


@dataclass(frozen=True)
class Targets:
    """The output files of an image; masks are in the output folder, all other files in its subfolders.

    Masks and probabilities of the planes of a stack are separate files until all planes are done.
    """

    folder: Path  # for all output
    source: Source
    with_probabilities: bool = False
    with_overlay: bool = False
    with_overviews: bool = False
    is_measured: bool = False  # whether figures are requested
    is_drawn: bool = False  # whether thumbnails are requested
    with_objects: bool = False  # whether object ids are requested; existing masks can get all three later

    @classmethod
    def of(cls, source: Source, args: argparse.Namespace) -> "Targets":
        """Return the files for an image."""
        is_measured = bool(args.mask_folder or args.save_table or args.save_report or args.save_objects)
        results = args.save_probabilities, args.save_overlay, args.overviews
        flags = map(bool, (*results, is_measured, args.save_report, args.save_objects))
        return cls(args.output_folder, source, *flags)

    @property
    def file_name(self) -> str:
        """The file name of the mask, which is the image's name, but with png for JPEG, which would change class ids."""
        stem, extension = os.path.splitext(self.source.name)
        return self.source.name if extension.lower() in (".tif", ".tiff", ".png") else f"{stem}.png"

    @property
    def mask_name(self) -> str:
        """The name of the mask, including its plane."""
        return self.file_name + self.source.place

    @property
    def complete_mask(self) -> Path:
        """The mask file for all planes."""
        return self.folder / self.file_name

    @property
    def mask(self) -> Path:
        """The mask file of this image, or of this plane until the stack is assembled."""
        if not self.source.plane:
            return self.complete_mask
        return self.folder / PLANES_FOLDER / self.file_name / f"{self.source.place}.tif"

    @property
    def complete_objects(self) -> Path:
        """The file with the object ids of all planes."""
        return (self.folder / SUBFOLDERS[2] / self.file_name).with_suffix(".tif")

    @property
    def objects(self) -> Path:
        """The file with the object ids of this image or plane."""
        return self.mask.with_name(f"{self.source.place}-objects.tif") if self.source.plane else self.complete_objects

    @property
    def has_objects(self) -> bool:
        """Whether the files with the object ids and with a row for each object exist."""
        return self.object_rows.is_file() and (self.objects.is_file() or self.complete_objects.is_file())

    def remove_objects(self) -> None:
        """Remove the object files of an earlier mask, but no files that this program did not write."""
        if self.object_rows.is_file():
            with file_errors(self.objects):
                for path in (self.objects, self.complete_objects, self.object_rows):
                    path.unlink(missing_ok=True)

    @property
    def object_rows(self) -> Path:
        """The file with the measurements of each object."""
        return self.folder / FIGURES_FOLDER / f"{self.mask_name}{OBJECT_ROWS}"

    def finished_mask(self) -> Source:
        """Return the mask of an earlier run as a source."""
        if self.mask.is_file():
            return Source(self.mask_name, (os.fspath(self.mask),))
        complete = Source(self.file_name, (os.fspath(self.complete_mask),))
        return next(mask for image, mask in paired_planes(self.source, complete) if image == self.source)

    @property
    def complete_probabilities(self) -> Optional[Path]:
        """The softmax file for all planes; None if not requested."""
        file = self.folder / SUBFOLDERS[0] / self.file_name
        return file.with_suffix(".tif") if self.with_probabilities else None

    @property
    def probabilities(self) -> Optional[Path]:
        """The softmax file of this image or plane; None if not requested."""
        if not self.source.plane or not self.with_probabilities:
            return self.complete_probabilities
        return self.mask.with_name(f"{self.source.place}-probabilities.tif")

    @property
    def overlay(self) -> Optional[Path]:
        """The picture of the image with outlines; None if not requested."""
        stem = os.path.splitext(self.file_name)[0]
        return self.folder / SUBFOLDERS[1] / f"{stem}{self.source.place}.png" if self.with_overlay else None

    @property
    def figures(self) -> Path:
        """The file with the measurements of the mask."""
        return self.folder / FIGURES_FOLDER / f"{self.mask_name}.json"

    @property
    def thumbnail(self) -> Path:
        """The small picture for the page about all masks."""
        return self.folder / FIGURES_FOLDER / f"{self.mask_name}.jpg"

    @property
    def results(self) -> list[Path]:
        """The files that only the network can make."""
        return [path for path in (self.mask, self.probabilities, self.overlay) if path is not None]

    def exist(self) -> bool:
        """Whether all results exist, either for this plane or for all planes."""
        complete = [
            path for path in (self.complete_mask, self.complete_probabilities, self.overlay) if path is not None
        ]
        return any(all(path.is_file() for path in files) for files in (self.results, complete))

    @contextlib.contextmanager
    def open(self, image: ImageFile, model: Model, truth: "Optional[Truth]" = None) -> Iterator[list[Output]]:
        """Start the files; yield functions that take the blocks. The mask appears last."""
        self.remove_objects()
        with contextlib.ExitStack() as stack:
            if self.mask.suffix.lower() == ".png":
                mask = png_mask(self.mask, image, model)
            else:
                declared = model.no_data_class
                mask = tiff_of(
                    self.mask, image, model.mask_dtype, lambda block: block.classes, no_data=declared,
                    with_overviews=self.with_overviews,
                )  # fmt: skip
            outputs = [stack.enter_context(mask), stack.enter_context(measured(self, image, model, truth))]
            if self.probabilities is not None:
                softmax = tiff_of(
                    self.probabilities, image, np.dtype(np.float32), lambda block: block.softmax, model.number_classes
                )
                outputs.append(stack.enter_context(softmax))
            if self.overlay is not None:
                outputs.append(stack.enter_context(overlay(self.overlay, image, model)))
            if self.is_drawn and not self.with_objects:
                outputs.append(stack.enter_context(thumbnail(self.thumbnail, image, model)))
            yield outputs

    @contextlib.contextmanager
    def open_objects(self, image: ImageFile, model: Model) -> Iterator[list[StripOutput]]:
        """Start the object files; yield functions that take strips with the pixels of the image."""
        with contextlib.ExitStack() as stack:
            ids = tiff_of(
                self.objects,
                image,
                np.dtype(np.uint32),
                lambda block: block.classes,
                with_overviews=self.with_overviews,
            )
            add = stack.enter_context(ids)
            outputs: list[StripOutput] = [
                lambda strip, pixels, missing: add(Block(strip.rows.start, 0, NOTHING, NOTHING, strip.ids, missing))
            ]
            if self.is_drawn:
                outputs.append(stack.enter_context(thumbnail_of_objects(self.thumbnail, image, model)))
            yield outputs


def assemble_stacks(targets: Mapping[Source, Targets], claims: Claims) -> None:
    """Merge the masks of each stack into one file once all planes are done; do the same for its other files."""
    stacks: dict[Source, list[Targets]] = {}
    for source, files in targets.items():
        if source.plane:
            stacks.setdefault(source._replace(plane=()), []).append(files)
    for source, planes in stacks.items():
        name = planes[0].file_name
        if any(files.mask.parent.is_dir() for files in planes) and claims.claim(name):
            try:
                assemble_stack(source, planes)
            finally:
                claims.release(name)


def assemble_stack(source: Source, planes: Sequence[Targets]) -> None:
    """Merge the masks, probabilities and objects of all planes into one file each; remove the files of the planes.

    The mask comes last, since it marks the stack as done. Objects may be numbered after the mask was written.
    """
    first, layout = planes[0], StackLayout.of(source.files[0])
    kinds = [(first.complete_objects, [files.objects for files in planes], layout.is_named)]
    if all(path.is_file() for files in planes for path in files.results):
        if first.complete_probabilities is not None:
            softmax = [files.probabilities for files in planes if files.probabilities is not None]
            kinds.append((first.complete_probabilities, softmax, False))
        kinds.append((first.complete_mask, [files.mask for files in planes], layout.is_named))
    complete = [kind for kind in kinds if all(path.is_file() for path in kind[1])]
    for target, parts, with_axes in complete:
        with atomic_output(target) as temporary:
            write_stack(temporary, layout, parts, with_axes)
        logging.info("%s: %d planes in one file", target.relative_to(first.folder), len(planes))
    if complete:
        remove(first.mask.parent)
    with contextlib.suppress(OSError):  # fails if other stacks are in progress
        os.removedirs(first.mask.parent.parent)


def write_stack(path: Path, layout: StackLayout, parts: Sequence[Path], with_axes: bool) -> None:
    """Write a TIFF from the plane files of a stack, as OME-TIFF if the axes are to be named."""
    import tifffile

    rest, is_large = iter(parts), sum(map(os.path.getsize, parts)) > BIGTIFF_FROM_BYTES
    with tifffile.TiffWriter(path, ome=with_axes, bigtiff=is_large) as writer:
        for scene, sizes in zip(layout.scenes, layout.sizes):
            shape = [length for _, length in scene]
            files = list(itertools.islice(rest, math.prod(shape)))
            with ImageFile(files[0]) as part:
                placement = {name: value for name, value in part.placement.items() if name != "description"}
            with tifffile.TiffFile(files[0]) as file:
                size, dtype = file.pages[0].shape, file.pages[0].dtype
            axes = "".join(axis.upper() for axis, _ in scene) + "YX"
            writer.write(
                itertools.chain.from_iterable(map(tiles_of, files)),
                shape=(*shape, *size),
                dtype=dtype,
                planarconfig="contig" if len(size) == 3 else None,
                metadata={"axes": axes, **sizes} if with_axes else None,
                **TIFF_LAYOUT,
                **placement,
            )


@contextlib.contextmanager
def file_errors(target: Path) -> Iterator[None]:
    """Turn file system errors into a one-line message that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {target}: {cause_of(error)}") from error


@contextlib.contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """Yield a temporary name, and move the complete file to `target`; write errors become one line."""
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            yield temporary


@contextlib.contextmanager
def tiff_of(
    target: Path,
    image: ImageFile,
    dtype: np.dtype,
    select: Callable[[Block], np.ndarray],
    samples: Optional[int] = None,
    no_data: Optional[int] = None,
    with_overviews: bool = False,
) -> Iterator[Output]:
    """Start a TIFF with the placement of the image's file; yield a function that adds `select(block)` for a block."""
    shape = image.stored_size if samples is None else (*image.stored_size, samples)
    placement = image.placement
    if no_data is not None:
        tags = [*placement.get("extratags", ()), (NO_DATA_TAG, "s", 0, str(no_data), True)]
        placement = {**placement, "extratags": tags}
    smaller = overview_sizes(shape) if with_overviews else []
    with atomic_output(target) as temporary, tiff_with_overviews(temporary, shape, dtype, placement, smaller) as tiff:

        def add(block: Block) -> None:
            with file_errors(target):  # names this file, not another open one
                tiff.add(*image.stored_block(block.row, block.column, select(block)))

        yield add


def overview_sizes(size: Sequence[int]) -> list[tuple[int, int]]:
    """Return the overview sizes of a mask, (rows, columns), each half of the one before; none if the mask is small."""
    sizes = []
    if max(size) > OVERVIEWS_ABOVE:
        while max(size) >= 2 * SMALLEST_OVERVIEW:
            size = [-(-edge // 2) for edge in size]
            sizes.append((size[0], size[1]))
    return sizes


@contextlib.contextmanager
def tiff_with_overviews(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, placement: dict[str, Any], sizes: Sequence[tuple[int, int]]
) -> Iterator["TiledTiff"]:
    """Start a TIFF with overviews, each half the size of the one before; yield it.

    Overviews take every other row and column, so they contain only classes, in their true proportions. Taking the most
    frequent class of four pixels would make thin classes vanish. Overviews are pages of reduced resolution after the
    page of the mask, where GDAL and OpenSlide expect them. Each is a separate file until it is complete.
    """
    with contextlib.ExitStack() as files:
        paths = [temporary_name(path) for _ in sizes]
        for each in paths:
            files.callback(each.unlink, missing_ok=True)
        with contextlib.ExitStack() as stack:
            tiff: Optional[TiledTiff] = None
            for each, size in reversed(list(zip(paths, sizes))):
                tiff = stack.enter_context(TiledTiff(each, size, dtype, {}, tiff))
            yield stack.enter_context(TiledTiff(path, shape, dtype, placement, tiff))
        if sizes:
            append_overviews(path, paths)


def append_overviews(path: Path, paths: Sequence[Path]) -> None:
    """Append the pages of other files to a TIFF as pages of reduced resolution; their tiles are copied unchanged."""
    import tifffile

    with tifffile.TiffWriter(path, append=True) as writer:
        for each in paths:
            with tifffile.TiffFile(each) as file:
                page, tiles = file.pages[0], encoded_tiles(file)
                writer.write(
                    tiles, shape=page.shape, dtype=page.dtype, subfiletype=REDUCED_IMAGE, metadata=None, **TIFF_LAYOUT
                )


def tiles_of(path: Path) -> Iterator[bytes]:
    """Yield the tiles of a single-page TIFF as encoded in the file."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        yield from encoded_tiles(file)


def encoded_tiles(file: Any) -> Iterator[bytes]:
    """Yield the tiles of a TIFF's first page as encoded in the file."""
    page = file.pages[0]
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        file.filehandle.seek(offset)
        yield file.filehandle.read(count)


class TiledTiff(contextlib.AbstractContextManager["TiledTiff"]):
    """A tiled, zlib-compressed TIFF that is written block by block; a context manager.

    A thread compresses and writes tiles as soon as they are full, in any order, and the table of their offsets is
    sorted at the end. Only partially filled tiles are kept in memory. An `overview` receives every other row and column
    of each tile.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype,
        placement: dict[str, Any],
        overview: "Optional[TiledTiff]" = None,
    ) -> None:
        self._path, self._shape, self._dtype, self._placement, self._overview = path, shape, dtype, placement, overview
        self._across = -(-shape[1] // TIFF_TILE)
        self._begun: dict[int, tuple[np.ndarray, int]] = {}  # tile and number of its missing pixels
        self._order: list[int] = []  # of the tiles in the file
        self._full: queue.Queue[Optional[np.ndarray]] = queue.Queue(QUEUED_TILES)
        self._failure: Optional[BaseException] = None  # of the thread
        # A daemon, because a signal may stop the main thread before `__exit__` is called, and the process must exit.
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def add(self, row: int, column: int, pixels: np.ndarray) -> None:
        """Take a block of pixels that starts at a row and column; each pixel must be added exactly once."""
        height, width = pixels.shape[:2]
        for tile_row in range(row // TIFF_TILE, -(-(row + height) // TIFF_TILE)):
            for tile_column in range(column // TIFF_TILE, -(-(column + width) // TIFF_TILE)):
                self._fill(tile_row, tile_column, row, column, pixels)

    def _fill(self, tile_row: int, tile_column: int, row: int, column: int, pixels: np.ndarray) -> None:
        """Copy a block's share of a tile; hand over the tile when it is full."""
        index, (height, width) = tile_row * self._across + tile_column, self._shape[:2]
        first_row, first_column = tile_row * TIFF_TILE, tile_column * TIFF_TILE
        tile, missing = self._begun.pop(index, (None, 0))
        if tile is None:
            tile = np.zeros((TIFF_TILE, TIFF_TILE, *self._shape[2:]), self._dtype)
            missing = min(TIFF_TILE, height - first_row) * min(TIFF_TILE, width - first_column)
        top, left = first_row - row, first_column - column  # of the tile, relative to the block's start
        share = pixels[max(top, 0) : top + TIFF_TILE, max(left, 0) : left + TIFF_TILE]
        tile[max(-top, 0) :, max(-left, 0) :][: share.shape[0], : share.shape[1]] = share
        missing -= share.shape[0] * share.shape[1]
        if missing:
            self._begun[index] = tile, missing
        else:
            self._order.append(index)
            self._hand_over(tile)
            if self._overview is not None:
                half = tile[: height - first_row : 2, : width - first_column : 2]
                self._overview.add(first_row // 2, first_column // 2, half)

    def _hand_over(self, tile: Optional[np.ndarray]) -> None:
        """Put a tile, or None at the end, into the queue; raise the error that stopped the thread."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                return self._full.put(tile, timeout=0.1)
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Raise the error that stopped the thread, if any."""
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        """Write the tiles from the queue; runs in a thread."""
        import tifffile

        try:
            tifffile.imwrite(
                self._path,
                self._tiles(),
                shape=self._shape,
                dtype=self._dtype,
                maxworkers=1,
                planarconfig="contig" if len(self._shape) == 3 else None,
                bigtiff=int(np.prod(self._shape)) * self._dtype.itemsize * SIZE_WITH_OVERVIEWS > BIGTIFF_FROM_BYTES,
                metadata=None if self._overview else {},  # its shape would include all pages
                **TIFF_LAYOUT,
                **self._placement,
            )
        except BaseException as error:
            self._failure = error

    def _tiles(self) -> Iterator[np.ndarray]:
        """Yield the tiles from the queue until None arrives."""
        while (tile := self._full.get()) is not None:
            yield tile

    def _sort(self) -> None:
        """Sort the table of tile offsets from the order of writing into the order of rows and columns."""
        import tifffile

        with tifffile.TiffFile(self._path, mode="r+b") as file:
            for name in ("TileOffsets", "TileByteCounts"):
                tag = file.pages[0].tags[name]
                values = np.empty(len(self._order), np.int64)
                values[self._order] = tag.value
                tag.overwrite(values.tolist())

    def __exit__(self, kind: Optional[type], *exception: object) -> None:
        """Finish the file; after an exception, only stop the thread."""
        if kind is None:
            self._hand_over(None)
            self._thread.join()
            self._raise_failure()
            self._sort()
        else:
            with contextlib.suppress(Exception):
                self._hand_over(None)
            self._thread.join()


@contextlib.contextmanager
def png_mask(target: Path, image: ImageFile, model: Model) -> Iterator[Output]:
    """Start a PNG with the orientation of the image's file, collected in memory; yield a function that takes blocks."""
    from PIL import Image  # comes with scikit-image

    mask = np.zeros(image.stored_size, model.mask_dtype)

    def add(block: Block) -> None:
        row, column, classes = image.stored_block(block.row, block.column, block.classes)
        mask[row : row + classes.shape[0], column : column + classes.shape[1]] = classes

    yield add
    exif = Image.Exif()
    if image.orientation.code > 1:
        exif[ORIENTATION_TAG] = image.orientation.code
    with atomic_output(target) as temporary:
        Image.fromarray(mask).save(temporary, exif=exif)


@contextlib.contextmanager
def overlay(target: Path, image: ImageFile, model: Model) -> Iterator[Output]:
    """Start a picture of the image with the outlines of all classes except 0; yield a function that takes blocks."""
    from PIL import Image  # comes with scikit-image

    drawing = Drawing(image, model, OVERLAY_PIXELS)
    yield drawing.add
    with atomic_output(target) as temporary:
        Image.fromarray(drawing.outlined()).save(temporary)


@contextlib.contextmanager
def thumbnail(target: Path, image: ImageFile, model: Model) -> Iterator[Output]:
    """Start a small picture of the image next to its mask; yield a function that takes blocks."""
    drawing = Drawing(image, model, THUMBNAIL_PIXELS)
    yield drawing.add
    drawing.save_thumbnail(target)


@contextlib.contextmanager
def thumbnail_of_objects(target: Path, image: ImageFile, model: Model) -> Iterator[StripOutput]:
    """Start a small picture of the image next to its objects in colors; yield a function that takes strips."""
    drawing, statistics = Drawing(image, model, THUMBNAIL_PIXELS, with_objects=True), ChannelStatistics.of_file(image)

    def add(strip: Strip, pixels: np.ndarray, missing: Optional[np.ndarray]) -> None:
        scores = normalize(pixels, statistics.mean, statistics.deviation, model.deviation_floor, missing=missing)
        drawing.add(Block(strip.rows.start, 0, scores, NOTHING, strip.ids, None))

    yield add
    drawing.save_thumbnail(target)


class Drawing:
    """A picture of an image and its mask, drawn block by block.

    Large images are reduced by a power of two that divides the network's grid, so that no pixel of the picture belongs
    to two blocks.

    Parameters
    ----------
    image : ImageFile
        The image.
    model : Model
        Provides the grid and the number of classes.
    largest : int
        Maximum pixels of the longer edge, as far as the grid allows.
    with_objects : bool
        Whether blocks contain object ids, which get colors, instead of classes.
    """

    def __init__(self, image: ImageFile, model: Model, largest: int, with_objects: bool = False) -> None:
        height, width, _ = image.shape
        self._factor, self._largest, self._with_objects = 1, largest, with_objects
        while max(height, width) > largest * self._factor and model.size_factor % (2 * self._factor) == 0:
            self._factor *= 2
        self.picture = np.zeros((-(-height // self._factor), -(-width // self._factor), 3), np.uint8)
        self._classes = np.zeros(self.picture.shape[:2], np.uint32 if with_objects else model.mask_dtype)
        self._truth = np.full(self.picture.shape[:2], IGNORED)

    def add(self, block: Block) -> None:
        """Draw a block."""
        from skimage.transform import downscale_local_mean

        factor = self._factor
        small = displayable(downscale_local_mean(block.image, (factor, factor, 1)))
        row, column = block.row // factor, block.column // factor
        place = slice(row, row + small.shape[0]), slice(column, column + small.shape[1])
        self.picture[place] = small
        self._classes[place] = block.classes[::factor, ::factor]
        if block.missing is not None:
            self._classes[place][block.missing[::factor, ::factor]] = 0
        if block.truth is not None:
            self._truth[place] = block.truth[::factor, ::factor]

    def outlined(self) -> np.ndarray:
        """Return the picture, uint8 (rows, columns, 3), with outlines of all classes except 0 and errors in color."""
        from skimage.segmentation import find_boundaries

        picture, classes, truth = self.picture.copy(), self._classes, self._truth
        wrong = (truth != IGNORED) & (truth != classes)
        for kind, color in (
            (truth == 0, FALSE_COLOR), (classes == 0, MISSED_COLOR), (truth * classes > 0, CONFUSED_COLOR),
        ):  # fmt: skip
            picture[wrong & kind] = picture[wrong & kind] // 2 + color // 2
        if self._with_objects:
            inside = classes > 0
            picture[inside] = picture[inside] // 2 + OBJECT_COLORS[classes[inside] % len(OBJECT_COLORS)] // 2
            return picture
        outlines = find_boundaries(classes, connectivity=1, mode="inner", background=0)
        picture[outlines] = OUTLINE_COLORS[(classes[outlines] - 1) % len(OUTLINE_COLORS)]
        return picture

    def save_thumbnail(self, target: Path) -> None:
        """Write a JPEG of the picture without and with outlines, side by side."""
        from PIL import Image  # comes with scikit-image
        from skimage.transform import downscale_local_mean

        step = -(-max(self.picture.shape) // self._largest)  # if the grid did not allow a smaller picture
        self.picture = downscale_local_mean(self.picture, (step, step, 1)).astype(np.uint8)
        self._classes, self._truth = self._classes[::step, ::step], self._truth[::step, ::step]
        pair = Image.fromarray(np.concatenate([self.picture, self.outlined()], axis=1))
        with atomic_output(target) as temporary:
            pair.save(temporary, quality=THUMBNAIL_QUALITY, subsampling=0)  # keeps colored outlines sharp


if __name__ == "__main__":
    sys.exit(main())
