"""Draw numbered objects next to their images, to compare what several networks find.

    python tests/benchmarks/objects_sheet.py images truth out_without/objects out_with/objects --output objects.png

Each row shows an image and, from each folder, the objects in the file of the same name, in the colors of the report.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from cli import run_script
from image_files import ChannelStatistics, displayable, normalize, read_image
from inference_unet import OBJECT_COLORS


def file_of(folder, name):
    """Return the file with the given name in a folder, whatever its extension."""
    [path] = Path(folder).glob(f"{name}.*")
    return path


def in_colors(ids):
    """Return a picture (H, W, 3) in which objects have the colors of the report and the background is black."""
    return np.where(ids[..., None] > 0, OBJECT_COLORS[ids % len(OBJECT_COLORS)], 0)


def draw(args):
    """Write the sheet."""
    names = args.names or sorted(path.stem for path in args.images.iterdir())[:4]
    titles = args.titles or [Path(folder).name for folder in args.folders]
    figure, axes = pyplot.subplots(
        len(names), 1 + len(args.folders), figsize=(2.6 * (1 + len(args.folders)), 2.7 * len(names)), squeeze=False
    )
    for row, name in zip(axes, names):
        image = read_image(file_of(args.images, name))[..., : args.channels]
        statistics = ChannelStatistics.measure([image])
        row[0].imshow(displayable(normalize(image, statistics.mean, statistics.deviation)))
        for panel, folder in zip(row[1:], args.folders):
            ids = read_image(file_of(folder, name), as_mask=True)[..., 0].astype(np.int64)
            panel.imshow(in_colors(ids), interpolation="nearest")
            panel.set_xlabel(f"{np.count_nonzero(np.bincount(ids.ravel())[1:])} objects", fontsize=8)
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
    for panel, title in zip(axes[0], ["image", *titles]):
        panel.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.5)
    figure.savefig(args.output, dpi=100)


def build_parser():
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("folders", nargs="+", help="folders of masks with an id for each object")
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument(
        "--names", nargs="+", help="names of the images to draw, without extension; the first four by default"
    )
    parser.add_argument("--titles", nargs="+", help="titles of the folder columns; the folder names by default")
    parser.add_argument("--channels", type=int, default=3, help="number of image channels to use")
    return parser


def main():
    """Run the script; return its exit code."""
    return run_script(build_parser, lambda args, stop: draw(args), None)


if __name__ == "__main__":
    sys.exit(main())
