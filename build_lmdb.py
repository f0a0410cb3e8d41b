r"""Turn a folder of images and a folder of masks into a training and a test database.

    python build_lmdb.py --image_folder data/images/ --mask_folder data/masks/ --output_folder data/ \
        --dataset_name cells

Owns pairing, checking, splitting, and cropping or tiling. Never imports TensorFlow: it runs on login nodes.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from lmdb_utils import (
    IMAGE_DTYPES,
    MASK_DTYPES,
    DatabaseWriter,
    InputError,
    Metadata,
    Progress,
    add_flag,
    configure_logging,
    existing_folder,
    log_settings,
    new_databases,
    positive_int,
    run_script,
    seed_int,
)

# The same as in unet_model.py, which cannot be imported without TensorFlow; a test compares them.
SIZE_FACTOR = 16
RADIUS = 96

MASK_SUFFIXES = (".tif", ".tiff", ".png")
SIDES = ("train", "test")


class Pair(NamedTuple):
    """One image file and the mask file of the same stem."""

    image: Path
    mask: Path


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="build_lmdb",
        description="Script which converts two folders of images and masks into a pair of lmdb databases for training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_file_options(parser.add_argument_group("files"))
    add_split_options(parser.add_argument_group("split and tiles"))
    return parser


def add_file_options(group: Any) -> None:
    """Add what is read and written."""
    text = "filepath to the folder containing the images"
    group.add_argument("--image_folder", type=existing_folder, default="data/images/", help=text)
    text = "filepath to the folder containing the masks: tif or png, with the names of their images"
    group.add_argument("--mask_folder", type=existing_folder, default="data/masks/", help=text)
    text = "filepath to the folder where the outputs will be placed"
    group.add_argument("--output_folder", type=Path, default="data/", help=text)
    text = "name of the dataset to be used in creating the lmdb files"
    group.add_argument("--dataset_name", type=file_stem, default="dataset", help=text)
    group.add_argument(
        "--image_format",
        metavar="IMAGE_FORMAT",
        choices=("tif", "png", "jpg"),
        default="tif",
        help="format (extension) of the input images. E.g {tif, jpg, png)",
    )


def add_split_options(group: Any) -> None:
    """Add how images are split and tiled."""
    text = "what fraction of the dataset to use for training (0.0, 1.0)"
    group.add_argument("--train_fraction", type=open_fraction, default=0.8, help=text)
    add_flag(group, "--use_tiling", 0, "Whether to shard the image into tiles [0 = False, 1 = True]")
    group.add_argument(
        "--tile_size",
        type=tile_size,
        default=512,
        help="The size of the tiles to crop out of the source images, striding across all available pixels in the "
        f"source images; a multiple of {SIZE_FACTOR}",
    )
    group.add_argument("--seed", type=seed_int, default=0, help="seed of the split into train and test")


def file_stem(text: str) -> str:
    """Return `text` if it can be part of a file name; the ``type`` of ``--dataset_name``."""
    if not text or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name without slashes, got {text!r}")
    return text


def open_fraction(text: str) -> float:
    """Return `text` as a number strictly between 0 and 1; the ``type`` of ``--train_fraction``."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, both excluded, got {text!r}; try 0.8")
    return value


def tile_size(text: str) -> int:
    """Return `text` as a tile size; the ``type`` of ``--tile_size``."""
    value = positive_int(text)
    if value % SIZE_FACTOR:
        below = max(value // SIZE_FACTOR, 1) * SIZE_FACTOR
        raise argparse.ArgumentTypeError(
            f"tile size must be a multiple of {SIZE_FACTOR}, got {value}; try {below} or {below + SIZE_FACTOR}"
        )
    if value <= RADIUS:
        raise argparse.ArgumentTypeError(
            f"tile size must be above {RADIUS}, the overlap of neighbouring tiles, got {value}; try 256"
        )
    return value


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; return its exit code."""
    args = build_parser().parse_args(argv)
    configure_logging()
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Build both databases."""
    log_settings(args)
    pairs = find_pairs(args.image_folder, args.mask_folder, args.image_format)
    sides = dict(zip(SIDES, split_pairs(pairs, args.train_fraction, args.seed)))
    targets = [args.output_folder / f"{side}-{args.dataset_name}.lmdb" for side in SIDES]
    info = {
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        "tile_size": args.tile_size if args.use_tiling else None,
    }
    with new_databases(*targets) as writers:
        progress = Progress("building", len(pairs), "images")
        writer = DatasetWriter(args.tile_size if args.use_tiling else None)
        done = 0
        for side, database in zip(SIDES, writers):
            for pair in sides[side]:
                writer.add(pair, database)
                done += 1
                progress.update(done)
        progress.close()
        built = [database.finish({**info, "side": side}) for side, database in zip(SIDES, writers)]
    for target, metadata in zip(targets, built):
        report(target, metadata)


# ---------------------------------------------------------------------------------------------- pairing and splitting


def find_pairs(image_folder: Path, mask_folder: Path, image_format: str) -> list[Pair]:
    """Return the image and mask of each stem, sorted by stem.

    Raises
    ------
    InputError
        If a file has no partner, or two files in a folder have one stem.
    """
    from imagereader import list_images

    images = by_stem(list_images(image_folder, image_format), image_folder)
    masks = by_stem([path for path in mask_folder.iterdir() if path.suffix.lower() in MASK_SUFFIXES], mask_folder)
    if not masks:
        raise InputError(
            f"expected tif or png masks in {mask_folder}, found none (a JPEG mask has stray values and cannot be used)"
        )
    for have, lack, kind, other in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
        alone = sorted(have.keys() - lack.keys())
        if alone:
            raise InputError(
                f"{len(alone)} of {len(have)} {kind}s have no {other} of the same name, such as "
                f"{', '.join(have[stem].name for stem in alone[:3])}; names must be equal but for the extension"
            )
    return [Pair(images[stem], masks[stem]) for stem in sorted(images)]


def by_stem(paths: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Return the paths by stem; two files of one stem are refused, for their partner would be a guess."""
    stems: dict[str, Path] = {}
    for path in sorted(paths):
        if path.stem in stems:
            raise InputError(f"{stems[path.stem].name} and {path.name} in {folder} have one stem; remove or rename one")
        stems[path.stem] = path
    return stems


def split_pairs(pairs: Sequence[Pair], train_fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split by image, at random but reproducibly, with at least one on each side.

    Raises
    ------
    InputError
        If there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise InputError(f"expected at least 2 images, one to train and one to test, found {len(pairs)}")
    count = min(max(round(len(pairs) * train_fraction), 1), len(pairs) - 1)
    order = np.random.default_rng(seed).permutation(len(pairs))
    train, test = sorted(order[:count]), sorted(order[count:])
    return [pairs[index] for index in train], [pairs[index] for index in test]


# ---------------------------------------------------------------------------------------------- checking


def read_mask(filepath: Path) -> np.ndarray:
    """Read a mask as an array of one of the database's mask types, shape (H, W).

    Raises
    ------
    InputError
        If it is not integer, not single-channel, or has negative classes.
    """
    from imagereader import read_image

    mask = read_image(filepath)
    if mask.shape[2] != 1:
        raise InputError(
            f"expected a single-channel mask in {filepath}, found {mask.shape[2]} channels; "
            "save class ids as a grayscale image"
        )
    mask = mask[..., 0]
    if mask.dtype == np.bool_:
        mask = mask.astype(np.uint8)
    if mask.dtype.name not in MASK_DTYPES:
        raise InputError(
            f"expected a mask of {', '.join(MASK_DTYPES)} in {filepath}, found {mask.dtype}; "
            "save class ids in one of these"
        )
    if mask.min() < 0:
        raise InputError(f"expected class ids of at least 0 in {filepath}, found {mask.min()}; renumber the classes")
    return mask


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Read and check an image (H, W, C) and its mask (H, W)."""
    from imagereader import read_image

    mask = read_mask(pair.mask)
    image = read_image(pair.image, size=mask.shape)
    if image.dtype.name not in IMAGE_DTYPES:
        raise InputError(
            f"expected an image of {', '.join(IMAGE_DTYPES)} in {pair.image}, found {image.dtype}; "
            "convert it to one of these"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(
            f"expected finite pixels in {pair.image}, found NaN or infinity; replace them, for example by 0"
        )
    if image.shape[:2] != mask.shape:
        raise InputError(
            f"expected image and mask of one size, found {image.shape[0]} x {image.shape[1]} in {pair.image} and "
            f"{mask.shape[0]} x {mask.shape[1]} in {pair.mask}; is the mask that of another image?"
        )
    if min(mask.shape) < SIZE_FACTOR:
        raise InputError(
            f"expected at least {SIZE_FACTOR} x {SIZE_FACTOR} pixels in {pair.image}, "
            f"found {mask.shape[0]} x {mask.shape[1]}; leave it out or use larger images"
        )
    return image, mask


class DatasetWriter:
    """Reads pairs, checks that they go together, and appends their tiles or crops to a database.

    Parameters
    ----------
    tile_size : int or None
        Edge of the tiles in pixels; None to crop whole images instead.
    """

    def __init__(self, tile_size: Optional[int]) -> None:
        self._tile_size = tile_size
        self._first: Optional[tuple[Path, tuple[int, int, int], np.dtype]] = None

    def add(self, pair: Pair, database: DatabaseWriter) -> None:
        """Append all records of one pair."""
        image, mask = read_pair(pair)
        self._check_alike(pair.image, image)
        if self._tile_size is None:
            image, row, column = centre_crop(image)
            mask, _, _ = centre_crop(mask)
            database.append(image, mask, pair.image.name, row, column)
            return
        image, mask = pad_to(image, self._tile_size), pad_to(mask, self._tile_size)
        for row, column in tile_origins(mask.shape[0], mask.shape[1], self._tile_size):
            window = np.s_[row : row + self._tile_size, column : column + self._tile_size]
            database.append(image[window], mask[window], pair.image.name, row, column)

    def _check_alike(self, path: Path, image: np.ndarray) -> None:
        """Refuse an image whose type, channels, or (without tiling) size differ from the first one's."""
        if self._first is None:
            self._first = (path, image.shape, image.dtype)
        first_path, first_shape, first_dtype = self._first
        if (image.dtype, image.shape[2]) != (first_dtype, first_shape[2]):
            raise InputError(
                f"expected images of one type, found {first_shape[2]} channels of {first_dtype} in {first_path} and "
                f"{image.shape[2]} of {image.dtype} in {path}; convert them to one type"
            )
        if self._tile_size is None and image.shape != first_shape:
            raise InputError(
                f"expected images of one size, found {first_shape[0]} x {first_shape[1]} in {first_path} and "
                f"{image.shape[0]} x {image.shape[1]} in {path}; set --use_tiling 1"
            )


# ---------------------------------------------------------------------------------------------- cropping and tiling


def centre_crop(array: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the centre of an array (H, W, ...) with sizes that are multiples of `SIZE_FACTOR`, and its origin."""
    height, width = (length // SIZE_FACTOR * SIZE_FACTOR for length in array.shape[:2])
    row, column = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[row : row + height, column : column + width], row, column


def pad_to(array: np.ndarray, least: int) -> np.ndarray:
    """Return an array (H, W, ...) extended by reflection at its bottom and right to at least `least` pixels."""
    missing = [max(least - length, 0) for length in array.shape[:2]]
    if not any(missing):
        return array
    return np.pad(array, [(0, rows) for rows in missing] + [(0, 0)] * (array.ndim - 2), mode="reflect")


def tile_origins(height: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the origins (row, column) of tiles that cover every pixel, the last row and column moved inside the image.

    Neighbours overlap by at least `RADIUS`, so that each pixel is seen with some surroundings in one of them.
    """
    for row in tile_starts(height, size):
        for column in tile_starts(width, size):
            yield row, column


def tile_starts(length: int, size: int) -> list[int]:
    """Return where tiles start along one axis of `length` >= `size` pixels."""
    return [*range(0, length - size, size - RADIUS), length - size]


# ---------------------------------------------------------------------------------------------- reporting


def report(target: Path, metadata: Metadata) -> None:
    """Log what a database holds."""
    height, width, channels = metadata.image_shape
    logging.info(
        "%s: %d images, %d %s of %d x %d x %d %s",
        target,
        len(metadata.names),
        metadata.count,
        "tiles" if metadata.info["tile_size"] else "records",
        height,
        width,
        channels,
        metadata.info["image_dtype"],
    )
    total = int(metadata.pixel_counts.sum())
    for position, (class_id, pixels) in enumerate(zip(metadata.classes, metadata.pixel_counts)):
        records = len(metadata.records_of_class(position))
        logging.info("  class %d: %d pixels (%.2f %%), in %d records", class_id, pixels, 100 * pixels / total, records)
    if int(metadata.classes.max()) > len(metadata.classes) - 1:
        logging.warning(
            "  class ids have gaps: training needs --number_classes %d, or masks renumbered 0, 1, 2, ...%s",
            int(metadata.classes.max()) + 1,
            " (0 and 255 are usually meant as 0 and 1)" if metadata.classes.tolist() == [0, 255] else "",
        )


if __name__ == "__main__":
    sys.exit(main())
