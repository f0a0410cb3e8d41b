"""Make the example data in this folder, 40 fluorescence-like images of cells with their masks.

    python data/generate_example_data.py

The seed is fixed, so the same versions of numpy and scipy make the same files. Mask value 1 is a cell, 0 is background.
A threshold cannot solve the task, because illumination falls off across the field, cells of different shapes and
brightness touch, and bright debris is not a cell.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

COUNT = 40
SIZE = 256  # pixels
SEED = 20
OFFSET = 400.0  # camera counts of a dark pixel
READ_NOISE = 7.0  # standard deviation in counts
GAIN = 0.12  # shot noise variance, squared counts per count of signal
OPTICS_SIGMA = 1.0  # blur in pixels


def cell_radius_profile(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Return the radius of a cell in 360 directions, in pixels; the cell is an ellipse with a few soft bulges."""
    angle = np.deg2rad(np.arange(360))
    stretch, turn = rng.uniform(1.0, 1.5), rng.uniform(0, np.pi)
    profile = radius / np.sqrt((np.cos(angle - turn) / stretch) ** 2 + (np.sin(angle - turn) * stretch) ** 2)
    for order in range(2, 6):
        profile *= 1 + rng.normal(0, 0.12 / order) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return profile


def polar_grid(row: float, column: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance in pixels and the direction in integer degrees of each pixel from a point."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    distance = np.hypot(rows - row, columns - column)
    return distance, np.rad2deg(np.arctan2(rows - row, columns - column)).astype(int) % 360


def smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Return a random texture (SIZE, SIZE) of mean 0 and standard deviation 1, correlated over `sigma` pixels."""
    texture = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return (texture - texture.mean()) / texture.std()


def cell_centers(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the positions of cells, some alone and some in clusters that touch."""
    centers = []
    for _ in range(rng.integers(5, 10)):
        row, column = rng.uniform(0, SIZE, 2)
        centers.append((row, column))
        for _ in range(rng.choice([0, 0, 1, 2, 3])):
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(26, 36)
            row, column = row + distance * np.sin(angle), column + distance * np.cos(angle)
            centers.append((row, column))
    return centers


def draw_cells(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells' fluorescence in counts and their mask."""
    signal, mask = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE), np.uint8)
    cytoplasm, granules = smooth_noise(rng, 6), smooth_noise(rng, 1.5)
    for row, column in cell_centers(rng):
        distance, direction = polar_grid(row, column)
        profile = cell_radius_profile(rng, rng.uniform(13, 22))[direction]
        inside = distance < profile
        depth = np.clip(1 - (distance / profile) ** 2, 0, 1)  # a cell is thickest in its middle
        body = rng.uniform(250, 900) * (0.35 + 0.65 * np.sqrt(depth))
        texture = np.clip(1 + 0.15 * cytoplasm + 0.15 * granules, 0.4, None)
        nucleus_distance, _ = polar_grid(row + rng.normal(0, 2), column + rng.normal(0, 2))
        nucleus = 1 + rng.uniform(0.3, 0.9) / (1 + np.exp(nucleus_distance - 0.45 * profile))
        signal = np.where(inside & (mask == 0), body * texture * nucleus, signal)
        mask[inside] = 1
    return signal, mask


def draw_debris(rng: np.random.Generator) -> np.ndarray:
    """Return bright specks and fibers in counts, too small or too thin to be cells."""
    debris = np.zeros((SIZE, SIZE))
    for _ in range(rng.integers(4, 12)):
        distance, _ = polar_grid(*rng.uniform(0, SIZE, 2))
        debris += rng.uniform(300, 1800) * np.exp(-((distance / rng.uniform(1.0, 2.6)) ** 2))
    for _ in range(rng.integers(0, 3)):
        steps = np.cumsum(rng.normal(0, 0.08, rng.integers(30, 90))) + rng.uniform(0, 2 * np.pi)
        rows = rng.uniform(0, SIZE) + np.cumsum(np.sin(steps))
        columns = rng.uniform(0, SIZE) + np.cumsum(np.cos(steps))
        seen = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
        debris[rows[seen].astype(int), columns[seen].astype(int)] += rng.uniform(400, 1200)
    return debris


def illumination(rng: np.random.Generator) -> np.ndarray:
    """Return the share of light that reaches each pixel; the peak is off center, and the far corner gets about half."""
    distance, _ = polar_grid(*rng.uniform(0.2 * SIZE, 0.8 * SIZE, 2))
    return np.exp(-((distance / (1.1 * SIZE)) ** 2))


def make_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one image, uint16 (SIZE, SIZE), and its mask, uint8."""
    cells, mask = draw_cells(rng)
    haze = rng.uniform(60, 220) * (1 + 0.25 * smooth_noise(rng, 40)) + 0.08 * ndimage.gaussian_filter(cells, 15)
    light = ndimage.gaussian_filter(cells + haze + draw_debris(rng), OPTICS_SIGMA) * illumination(rng)
    noise = rng.standard_normal((SIZE, SIZE)) * np.sqrt(READ_NOISE**2 + GAIN * np.clip(light, 0, None))
    return np.clip(np.rint(OFFSET + light + noise), 0, 65535).astype(np.uint16), mask


def main() -> int:
    """Write the images and masks."""
    parser = argparse.ArgumentParser(description="Make the example images and masks.")
    parser.add_argument(
        "--output_folder", type=Path, default=Path(__file__).parent, help="folder for images/ and masks/"
    )
    folder = parser.parse_args().output_folder
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(COUNT):
        image, mask = make_pair(np.random.default_rng((SEED, index)))
        for name, array in (("images", image), ("masks", mask)):
            path = folder / name / f"cells_{index:02d}.tif"
            tifffile.imwrite(path, array, compression="zlib", predictor=name == "images", photometric="minisblack")
    print(f"wrote {COUNT} images and masks to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
