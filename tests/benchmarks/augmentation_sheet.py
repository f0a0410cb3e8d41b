"""Draw augmented images of a database, to judge the augmentation limits set in `ImageReader.__init__`.

    python tests/benchmarks/augmentation_sheet.py data/train-cells.lmdb sheet.png

The sheet shows 16 images of the database, each next to its augmented version and its augmented mask.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from cli import run_script, seed_int
from image_files import displayable
from imagereader import ImageReader
from lmdb_utils import Database

COLUMNS, ROWS = 4, 4


def take_batch(database, use_augmentation, seed):
    """Return a batch of `ROWS` * `COLUMNS` images, the same with and without augmentation, and the class count."""
    with Database(database) as opened:
        number_classes = int(opened.metadata.classes.max()) + 1
    options = {"number_classes": number_classes, "batch_size": ROWS * COLUMNS, "seed": seed}
    with ImageReader(database, use_augmentation=use_augmentation, **options) as reader:
        return next(reader.generator()), number_classes


def draw(database, filepath, seed):
    """Write the contact sheet."""
    plain, number_classes = take_batch(database, False, seed)
    augmented, _ = take_batch(database, True, seed)
    figure, axes = pyplot.subplots(ROWS, 3 * COLUMNS, figsize=(3 * COLUMNS * 1.6, ROWS * 1.7))
    for index, panels in enumerate(axes.reshape(ROWS * COLUMNS, 3)):
        panels[0].imshow(displayable(plain.images[index]))
        panels[1].imshow(displayable(augmented.images[index]))
        panels[2].imshow(augmented.masks[index], cmap="viridis", vmin=0, vmax=number_classes - 1)
        for panel, title in zip(panels, ("image", "augmented", "mask")):
            panel.set_axis_off()
            if index < COLUMNS:
                panel.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(filepath, dpi=110)


def build_parser():
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("database", help="training database written by build_lmdb.py")
    parser.add_argument("output", help="PNG file to write")
    parser.add_argument("--seed", type=seed_int, default=0, help="random seed; another seed shows other images")
    return parser


def main():
    """Run the script; return its exit code."""
    return run_script(build_parser, lambda args, stop: draw(args.database, args.output, args.seed), None)


if __name__ == "__main__":
    sys.exit(main())
