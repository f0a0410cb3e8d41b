r"""Segment every image of a folder with a trained model.

    python inference_unet.py --saved_model_filepath results/cells/saved_model --image_folder images/ \
        --output_folder masks/

Owns tiling and the folder loop. The tiled result equals that of the whole image in one pass (Majurski and Bajcsy,
J. Res. NIST 126:126009): each tile carries a halo of the network's radius, of which nothing is kept. TensorFlow is
imported inside functions, so that ``-h`` answers at once.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from lmdb_utils import (
    EXIT_BAD_INPUT,
    InputError,
    Progress,
    configure_logging,
    count_classes,
    existing_folder,
    log_settings,
    positive_int,
    run_script,
)

DEFAULT_TILE_SIZE = 1024  # pixels, halo included; halos of 96 then cost up to (1024 / 832)^2 = 1.5 times one pass


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="inference",
        description="Script to segment the images of a folder with the selected unet model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--saved_model_filepath",
        required=True,
        default=argparse.SUPPRESS,
        help="SavedModel filepath to the model to use (Required)",
    )
    parser.add_argument(
        "--image_folder",
        required=True,
        type=existing_folder,
        default=argparse.SUPPRESS,
        help="filepath to the folder containing the images to inference (Required)",
    )
    parser.add_argument(
        "--output_folder",
        required=True,
        type=Path,
        default=argparse.SUPPRESS,
        help="filepath to the folder where the masks will be placed (Required)",
    )
    parser.add_argument(
        "--image_format",
        metavar="IMAGE_FORMAT",
        choices=("tif", "png", "jpg"),
        default="tif",
        help="format (extension) of the input images. E.g {tif, jpg, png)",
    )
    parser.add_argument(
        "--tile_size",
        type=positive_int,
        default=DEFAULT_TILE_SIZE,
        help="edge in pixels of the tiles that larger images are cut into, overlap included; the result does not "
        "depend on it, memory and speed do",
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; return its exit code."""
    args = build_parser().parse_args(argv)
    configure_logging()
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Segment all images; a bad one is reported and the others go on."""
    from imagereader import list_images

    log_settings(args)
    images = list_images(args.image_folder, args.image_format)
    prepare_output_folder(args.output_folder, args.image_folder)
    model = load_model(args.saved_model_filepath)
    model.check_tile_size(args.tile_size)
    failed = []
    for number, path in enumerate(images, 1):
        target = args.output_folder / mask_name(path)
        start = time.monotonic()
        try:
            shape, mask = segment_file(path, model, args.tile_size)
            write_mask(target, mask)
        except InputError as error:
            failed.append(path.name)
            logging.error("%s", error)
            continue
        logging.info(
            "%d/%d %s: %s, %.1f s, %s",
            number,
            len(images),
            target.name,
            " x ".join(map(str, shape)),
            time.monotonic() - start,
            describe_histogram(mask),
        )
    logging.info(
        "%d of %d images done; the masks are in %s", len(images) - len(failed), len(images), args.output_folder
    )
    if failed:
        logging.error("%d images failed: %s", len(failed), ", ".join(failed))
    return EXIT_BAD_INPUT if failed else 0


# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Model:
    """A loaded SavedModel and what has to be known about it.

    Attributes
    ----------
    predict : callable
        From float32 (1, H, W, C) to softmax, ndarray of float32 (1, H, W, classes).
    channels, number_classes : int
    radius : int
        Pixels beyond each edge of a block of the pooling grid on which its results depend; the halo of a tile.
    size_factor : int
        Heights, widths and tile origins are multiples of it.
    """

    predict: Any
    channels: int
    number_classes: int
    radius: int
    size_factor: int

    def check_tile_size(self, tile_size: int) -> None:
        """Refuse a tile size off the network's grid, or one that leaves nothing between the halos."""
        least = 2 * self.radius + self.size_factor
        if tile_size % self.size_factor or tile_size < least:
            raise InputError(
                f"expected --tile_size to be a multiple of {self.size_factor} and at least {least} (a halo of "
                f"{self.radius} to each side), got {tile_size}; try {DEFAULT_TILE_SIZE}"
            )


def load_model(filepath: str) -> Model:
    """Load a SavedModel with a ``serving_default`` signature.

    Raises
    ------
    InputError
        If the folder is missing or holds no such model.
    """
    folder = Path(filepath)
    if not (folder / "saved_model.pb").is_file():
        raise InputError(
            f"expected a SavedModel in {folder}, found no saved_model.pb; give the folder saved_model that "
            "train_unet.py wrote in its --output_dir"
        )
    import tensorflow as tf

    from unet_model import METADATA_FILE, RADIUS, SIZE_FACTOR

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    try:
        loaded = tf.saved_model.load(os.fspath(folder))
        signature = loaded.signatures["serving_default"]
        (input_name, input_spec), = signature.structured_input_signature[1].items()  # fmt: skip
        (output_name, output_spec), = signature.structured_outputs.items()  # fmt: skip
        channels, number_classes = input_spec.shape[3], output_spec.shape[3]
    except (OSError, KeyError, ValueError, IndexError, tf.errors.OpError) as error:
        raise InputError(
            f"{folder} is no SavedModel of a segmentation network ({error}); train one with train_unet.py"
        ) from error
    metadata_file = folder / METADATA_FILE
    metadata = json.loads(metadata_file.read_text()) if metadata_file.exists() else {}

    def predict(images: np.ndarray, _keep: Any = loaded) -> np.ndarray:
        return signature(**{input_name: tf.constant(images)})[output_name].numpy()

    return Model(
        predict,
        channels,
        number_classes,
        metadata.get("radius", RADIUS),
        metadata.get("size_factor", SIZE_FACTOR),
    )


# ---------------------------------------------------------------------------------------------- one image


def segment_file(path: Path, model: Model, tile_size: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Read an image and return its shape (H, W, C) and its mask, shape (H, W)."""
    from imagereader import read_image, z_score

    image = read_image(path, channels=model.channels)
    if image.shape[2] != model.channels:
        raise InputError(
            f"expected {model.channels} channels, as the model was trained with, found {image.shape[2]} in {path}; "
            "choose the model or the images that belong together"
        )
    if image.dtype.kind not in "buif":
        raise InputError(f"expected integer or float pixels in {path}, found {image.dtype}; convert the image")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(f"expected finite pixels in {path}, found NaN or infinity; replace them, for example by 0")
    return image.shape, segment(z_score(image), model, tile_size)


def segment(image: np.ndarray, model: Model, tile_size: int) -> np.ndarray:
    """Segment a normalised image of any size.

    Parameters
    ----------
    image : ndarray of float32, shape (H, W, C)
    model : Model
    tile_size : int
        Edge of a tile in pixels, halo included.

    Returns
    -------
    ndarray, shape (H, W)
        Class ids in the smallest unsigned type that holds the model's classes.
    """
    height, width, _ = image.shape
    padded = pad_to_multiple(image, model.size_factor)
    mask = np.empty(padded.shape[:2], np.min_scalar_type(model.number_classes - 1))
    tiles = list(plan_tiles(padded.shape[0], padded.shape[1], tile_size, model.radius, model.size_factor))
    progress = Progress("segmenting", len(tiles), "tiles")
    for done, tile in enumerate(tiles, 1):
        softmax = model.predict(padded[None, tile.rows, tile.columns])
        zone = np.argmax(softmax[0], axis=-1)
        mask[tile.zone_rows, tile.zone_columns] = zone[tile.kept_rows, tile.kept_columns]
        progress.update(done)
    progress.close()
    return mask[:height, :width]


def pad_to_multiple(image: np.ndarray, size_factor: int) -> np.ndarray:
    """Return an image (H, W, C) extended by reflection at its bottom and right to multiples of `size_factor`."""
    missing = [-length % size_factor for length in image.shape[:2]]
    return np.pad(image, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="reflect") if any(missing) else image


class Tile(NamedTuple):
    """One tile: the window it reads, the zone of responsibility it writes, and where that lies in the window."""

    rows: slice
    columns: slice
    zone_rows: slice
    zone_columns: slice

    @property
    def kept_rows(self) -> slice:
        """Rows of the zone, counted from the window's first row."""
        return slice(self.zone_rows.start - self.rows.start, self.zone_rows.stop - self.rows.start)

    @property
    def kept_columns(self) -> slice:
        """Columns of the zone, counted from the window's first column."""
        return slice(self.zone_columns.start - self.columns.start, self.zone_columns.stop - self.columns.start)


def plan_tiles(height: int, width: int, tile_size: int, radius: int, size_factor: int) -> Iterator[Tile]:
    """Yield tiles of one size whose zones of responsibility cover an image once.

    Parameters
    ----------
    height, width : int
        Multiples of `size_factor`.
    tile_size : int
        Edge of a tile with its halo; a multiple of `size_factor`.
    radius : int
        Least distance of a zone from an edge of its tile that is not an edge of the image.
    size_factor : int
        Origins are multiples of it, so that a tile pools the pixels together which the image pools together.

    Notes
    -----
    A tile ends where the image ends: beyond that edge the whole image has no context either. So all tiles have one
    shape (each new one would cost TensorFlow a new trace), and those at the end are moved inwards.
    """
    halo = -(-radius // size_factor) * size_factor
    for rows, zone_rows in plan_axis(height, tile_size, halo):
        for columns, zone_columns in plan_axis(width, tile_size, halo):
            yield Tile(rows, columns, zone_rows, zone_columns)


def plan_axis(length: int, tile_size: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Yield (window, zone) along one axis."""
    size = min(tile_size, length)
    done = 0
    while done < length:
        start = min(max(done - halo, 0), length - size)
        end = start + size
        zone_end = length if end == length else end - halo
        yield slice(start, end), slice(done, zone_end)
        done = zone_end


# ---------------------------------------------------------------------------------------------- masks on disk


def prepare_output_folder(folder: Path, image_folder: Path) -> None:
    """Create the output folder; refuse the one that the images are in, where masks would replace them."""
    if folder.exists() and folder.resolve() == image_folder.resolve():
        raise InputError(
            f"--output_folder {folder} is the image folder, the masks would replace the images; choose another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create --output_folder {folder}: {error.strerror}; choose another folder") from error


def mask_name(image: Path) -> str:
    """Return the file name of an image's mask: the image's own, but png for JPEG, which would change class ids."""
    return image.name if image.suffix.lower() in (".tif", ".tiff", ".png") else f"{image.stem}.png"


def write_mask(target: Path, mask: np.ndarray) -> None:
    """Write a mask so that it appears under its name only when whole."""
    temporary = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        if target.suffix.lower() == ".png":
            from skimage.io import imsave

            imsave(temporary, mask, check_contrast=False)
        else:
            import tifffile

            tifffile.imwrite(temporary, mask, compression="zlib", tile=(256, 256), photometric="minisblack")
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error}; free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def describe_histogram(mask: np.ndarray) -> str:
    """Return the share of each class in words; an all-background result should be seen at once."""
    return ", ".join(
        f"class {class_id}: {100 * count / mask.size:.1f} %" for class_id, count in count_classes(mask).items()
    )


if __name__ == "__main__":
    sys.exit(main())
