r"""Draw images next to their true and predicted masks, and print how well the masks agree.

    python data/draw_example.py --test_database data/example/test-cells.lmdb --image_folder data/images \
        --mask_folder data/masks --predicted_folder data/example/masks --output data/example/result.png

Only the images in the test database count, since the network was not trained on them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_files import ChannelStatistics, displayable, normalize, read_image
from inference_unet import CONFUSED_COLOR, FALSE_COLOR, MISSED_COLOR
from lmdb_utils import Database

ROWS = 2


def draw(panels: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], output: Path) -> None:
    """Save a picture with a row of image, truth, prediction and errors for each panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 4, figsize=(12, 3.1 * len(panels)), squeeze=False)
    for row, (name, image, truth, predicted) in zip(axes, panels):
        classes = max(truth.max(), predicted.max(), 1)
        statistics = ChannelStatistics.measure([image])
        picture = displayable(normalize(image, statistics.mean, statistics.deviation))
        row[0].imshow(picture)
        row[1].imshow(truth, cmap="viridis", vmin=0, vmax=classes, interpolation="nearest")
        row[2].imshow(predicted, cmap="viridis", vmin=0, vmax=classes, interpolation="nearest")
        row[3].imshow(with_errors(picture, truth, predicted), interpolation="nearest")
        for axis, title in zip(row, (name, "truth", "prediction", "errors")):
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def with_errors(picture: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return a picture (H, W, 3) in gray with wrong pixels in the colors that overlays have."""
    gray = np.repeat(picture.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    wrong = truth != predicted
    for kind, color in (
        (truth == 0, FALSE_COLOR),
        (predicted == 0, MISSED_COLOR),
        (truth * predicted > 0, CONFUSED_COLOR),
    ):
        gray[wrong & kind] = color
    return gray


def main() -> int:
    """Print the foreground Dice of the test images, and draw the first few."""
    parser = argparse.ArgumentParser(description="Compare predicted masks with true masks.")
    for option in ("test_database", "image_folder", "mask_folder", "predicted_folder", "output"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    args = parser.parse_args()
    with Database(args.test_database) as database:
        names = database.metadata.names
    hits = sizes = 0
    panels = []
    for name in names:
        truth, predicted = (read_image(folder / name)[..., 0] for folder in (args.mask_folder, args.predicted_folder))
        hits += int(((truth > 0) & (predicted > 0)).sum())
        sizes += int((truth > 0).sum() + (predicted > 0).sum())
        panels.append((name, read_image(args.image_folder / name), truth, predicted))
    draw(panels[:ROWS], args.output)
    print(f"foreground Dice {2 * hits / max(sizes, 1):.4f} over {len(names)} test images that the network has not seen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
