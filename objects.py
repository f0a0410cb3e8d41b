"""Individual objects in masks.

Converts a mask that numbers its objects into classes and borders for training. After inference, converts a mask of
classes back into objects with consecutive ids, measures them, and scores how well they match the true objects.

A mask may be larger than memory. Everything here therefore processes a mask in strips of complete rows, from top to
bottom. Memory use is proportional to the width of the mask and the number of its objects.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import numpy as np

BACKGROUND, INSIDE, BORDER = 0, 1, 2  # the classes that objects become
LARGEST_BORDER = 32  # pixels
LARGEST_ID, LARGEST_UINT32 = 2**31 - 1, 2**32 - 1
STRIP_PIXELS = 2**20  # per strip, so that small masks need few strips and wide masks little memory
# Thresholds of the intersection over union, as in the Data Science Bowl 2018.
MATCH_THRESHOLDS = np.round(np.arange(0.5, 1.0, 0.05), 2)

# ---------------------------------------------------------------------------------------------- from objects to classes


class ObjectClasses(NamedTuple):
    """The rule that turns a mask of object ids, with 0 for background, into a mask of classes."""

    border_width: int = 0  # pixels; 0 for no border class
    meets_background: bool = False  # whether the border to the background belongs to the class, too

    def __str__(self) -> str:
        """Return a description of the classes."""
        if not self.border_width:
            return "their pixels are class 1"
        others = "other objects or the background" if self.meets_background else "other objects"
        return f"their pixels are class 1, but those within {self.border_width} pixels of {others} are class 2"

    @property
    def number_classes(self) -> int:
        """Number of classes, including background."""
        return 3 if self.border_width else 2

    @staticmethod
    def are(values: Any) -> bool:
        """Whether values from a file have the form of `_asdict`."""
        return (
            isinstance(values, dict)
            and values.keys() == {"border_width", "meets_background"}
            and type(values["border_width"]) is int
            and 0 <= values["border_width"] <= LARGEST_BORDER
            and type(values["meets_background"]) is bool
        )

    def apply(self, ids: np.ndarray) -> np.ndarray:
        """Return the class of each pixel.

        Parameters
        ----------
        ids : ndarray, shape (H, W)
            Object ids as int32: 0 for background, -1 for ignored pixels. Pixels within `border_width` of an edge are
            correct only if the mask ends there.

        Returns
        -------
        ndarray, shape (H, W)
            Classes as int8: `BACKGROUND`, `INSIDE`, or `BORDER` for object pixels with a pixel of another object (or
            of the background, if that counts) within a disk of radius `border_width`; -1 for ignored pixels.
        """
        from scipy.ndimage import maximum_filter, minimum_filter
        from skimage.morphology import disk

        classes = np.sign(ids).astype(np.int8)
        if self.border_width and ids.any():
            around = disk(self.border_width)
            others = ids >= 0 if self.meets_background else ids > 0
            lowest = np.where(others, ids, LARGEST_ID)
            differs = maximum_filter(ids, footprint=around, mode="nearest") > ids
            differs |= minimum_filter(lowest, footprint=around, mode="nearest") < ids
            classes[differs & (ids > 0)] = BORDER
        return classes


class ObjectCensus(NamedTuple):
    """The objects in a mask or in a part of it."""

    ids: np.ndarray  # ascending, (objects,)
    touching: np.ndarray  # pairs of ids whose pixels share an edge, smaller id first, (pairs, 2)

    @classmethod
    def of(cls, ids: np.ndarray) -> "ObjectCensus":
        """Return the census of ids (H, W)."""
        present = np.unique(ids)
        neighbors = [
            np.stack([one[different], other[different]], axis=1)
            for one, other in ((ids[:-1], ids[1:]), (ids[:, :-1], ids[:, 1:]))
            for different in [(one != other) & (one > 0) & (other > 0)]
        ]
        return cls(present[present > 0], np.unique(np.sort(np.concatenate(neighbors), axis=1), axis=0))

    def joined(self, other: "ObjectCensus") -> "ObjectCensus":
        """Return the combined census of two parts of one mask."""
        touching = np.concatenate([self.touching, other.touching])
        return ObjectCensus(np.union1d(self.ids, other.ids), np.unique(touching, axis=0))


NO_OBJECTS = ObjectCensus(np.zeros(0, np.int32), np.zeros((0, 2), np.int32))


# ---------------------------------------------------------------------------------------------- from classes to objects


def strips_of(height: int, width: int, least: int = 1, multiple: int = 1) -> list[slice]:
    """Return the rows of strips that cover a mask; each but the last has at least `least`, a multiple of `multiple`."""
    rows = -(-max(STRIP_PIXELS // width, least) // multiple) * multiple
    return [slice(first, min(first + rows, height)) for first in range(0, height, rows)]


def labeled(classes: np.ndarray, has_border: bool) -> tuple[np.ndarray, int]:
    """Return the connected regions of a strip, int (rows, columns), and their number.

    Pixels of the same class are connected across edges, not across corners. Background and border get the label 0.
    """
    from skimage.measure import label

    inside = np.where(classes == BORDER, BACKGROUND, classes) if has_border else classes
    return label(inside, background=BACKGROUND, connectivity=1, return_num=True)


class Numbering:
    """Assigns consecutive ids to the regions of a mask, in the order of their first pixels, row by row.

    Strips are added once, from top to bottom. A second pass over the strips then applies the ids; see `numbered`.

    Parameters
    ----------
    has_border : bool
        Whether class `BORDER` separates objects and is part of none.
    smallest : int
        Regions with fewer pixels get the id 0.
    """

    def __init__(self, has_border: bool, smallest: int = 1) -> None:
        self._has_border, self._smallest = has_border, smallest
        self._areas: list[np.ndarray] = []  # of the labels in each strip
        self._touching: list[np.ndarray] = []  # labels in neighboring strips that form one region, (2, pairs)
        self._count = 0
        self._above: Optional[tuple[np.ndarray, np.ndarray]] = None  # classes and labels of the last row

    def add(self, classes: np.ndarray) -> None:
        """Add a strip (rows, columns) of classes."""
        labels, count = labeled(classes, self._has_border)
        self._areas.append(np.bincount(labels.ravel(), minlength=count + 1)[1:])
        numbers = np.where(labels[[0, -1]] > 0, labels[[0, -1]] + self._count, 0)
        if self._above is not None:
            same = (self._above[0] == classes[0]) & (self._above[1] > 0) & (numbers[0] > 0)
            self._touching.append(np.unique(np.stack([self._above[1][same], numbers[0][same]]), axis=1))
        self._above, self._count = (classes[-1].copy(), numbers[1]), self._count + count

    def finish(self) -> "Ids":
        """Return the ids of all labels."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        size = self._count + 1
        one, other = np.concatenate([np.zeros((2, 0), np.int64), *self._touching], axis=1)
        graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(size, size))
        total, region_of = connected_components(graph, directed=False)
        areas = np.bincount(region_of, np.concatenate([[0], *self._areas]), total)
        first = np.full(total, size)
        np.minimum.at(first, region_of, np.arange(size))  # lowest label; labels are in the order of first pixels
        kept = np.sort(first[areas >= max(self._smallest, 1)])
        ids = np.searchsorted(kept, first) + 1
        ids[~np.isin(first, kept)] = 0
        return Ids(ids[region_of].astype(np.uint32), [len(areas) for areas in self._areas], len(kept))


class Ids(NamedTuple):
    """The ids of the labels of all strips of a mask."""

    of_label: np.ndarray  # uint32, for label 0 and then for the labels of all strips
    labels: list[int]  # number of labels in each strip
    objects: int  # number of objects with an id


class Strip(NamedTuple):
    """Rows of a mask with the ids of its objects."""

    rows: slice
    classes: np.ndarray  # (rows, columns)
    ids: np.ndarray  # uint32 (rows, columns)


def numbered(strips: Iterator[tuple[slice, np.ndarray]], ids: Ids, has_border: bool) -> Iterator[Strip]:
    """Yield each strip with the ids of its regions; `strips` must be the same as those added to the `Numbering`."""
    before = 0
    for (rows, classes), count in zip(strips, ids.labels):
        labels, _ = labeled(classes, has_border)
        of_strip = np.concatenate([[0], ids.of_label[before + 1 : before + count + 1]]).astype(np.uint32)
        yield Strip(rows, classes, of_strip[labels])
        before += count


def grown(strips: Iterator[Strip], distance: int) -> Iterator[Strip]:
    """Yield strips in which border pixels belong to the nearest object within a distance.

    All strips but the last must have at least `distance` rows.
    """
    from skimage.segmentation import expand_labels

    above: Optional[Strip] = None
    for strip, below in paired_with_next(strips):
        ids = [
            above.ids[-distance:] if above else strip.ids[:0],
            strip.ids,
            below.ids[:distance] if below else strip.ids[:0],
        ]
        expanded = expand_labels(np.concatenate(ids), distance)[len(ids[0]) :][: len(strip.ids)]
        all_ids = np.where(strip.classes == BORDER, expanded, strip.ids)
        yield Strip(strip.rows, np.where(all_ids > 0, INSIDE, strip.classes), all_ids)
        above = strip


def paired_with_next(strips: Iterator[Strip]) -> Iterator[tuple[Strip, Optional[Strip]]]:
    """Yield each strip with the next strip below, or None for the last."""
    strip = next(strips, None)
    while strip is not None:
        below = next(strips, None)
        yield strip, below
        strip = below


# ---------------------------------------------------------------------------------------------- object properties


class ObjectTable:
    """Measures objects strip by strip; the properties are defined as in `skimage.measure.regionprops`.

    Parameters
    ----------
    count : int
        Number of objects, which have the ids 1 to `count`.
    channels : int
        Number of channels of the image.

    Attributes
    ----------
    classes, areas : ndarray, shape (count,)
        Class and number of pixels of each object.
    """

    def __init__(self, count: int, channels: int) -> None:
        self.classes, self.areas = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._sums = np.zeros((2, count))  # of row and column indices
        self._low, self._high = np.full((2, count), np.iinfo(np.int64).max), np.zeros((2, count), np.int64)
        self._values, self._valid = np.zeros((channels, count)), np.zeros((channels, count), np.int64)

    def add(self, strip: Strip, pixels: np.ndarray, missing: Optional[np.ndarray] = None) -> None:
        """Add a strip with its image pixels (rows, columns, C); `missing` marks pixels without data."""
        rows, columns = np.nonzero(strip.ids)
        index, count = strip.ids[rows, columns].astype(np.int64) - 1, len(self.areas)
        self.classes[index] = strip.classes[rows, columns]
        self.areas += np.bincount(index, minlength=count)
        for axis, places in enumerate((rows + strip.rows.start, columns)):
            self._sums[axis] += np.bincount(index, places, count)
            np.minimum.at(self._low[axis], index, places)
            np.maximum.at(self._high[axis], index, places)
        for channel in range(pixels.shape[2]):
            values = pixels[rows, columns, channel].astype(np.float64)
            valid = np.ones(len(values)) if missing is None else ~missing[rows, columns, channel]
            self._values[channel] += np.bincount(index, np.where(valid, values, 0), count)
            self._valid[channel] += np.bincount(index, valid, count).astype(np.int64)

    @property
    def centroids(self) -> np.ndarray:
        """Mean row and column of each object, float64 (count, 2)."""
        return (self._sums / self.areas).T

    @property
    def boxes(self) -> np.ndarray:
        """First row and column of each object, then one past its last row and column, int64 (count, 4)."""
        return np.concatenate([self._low, self._high + 1]).T

    @property
    def means(self) -> np.ndarray:
        """Mean value of each object in each channel, float64 (count, channels); NaN without data."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self._values / self._valid).T


class Overlaps:
    """Counts the pixels that true and found objects share, strip by strip."""

    def __init__(self) -> None:
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, truth: np.ndarray, found: np.ndarray, ignored: Optional[np.ndarray] = None) -> None:
        """Add a strip of true ids and found ids (rows, columns); `ignored` pixels do not count."""
        codes = truth.astype(np.int64) << 32 | found.astype(np.int64)
        self._pairs.append(np.unique(codes if ignored is None else codes[~ignored], return_counts=True))

    def matches(self) -> "Matches":
        """Return how many objects match at each threshold."""
        codes, where = np.unique(np.concatenate([pair[0] for pair in self._pairs]), return_inverse=True)
        shared = np.bincount(where.ravel(), np.concatenate([pair[1] for pair in self._pairs]), len(codes))
        (truth, true_index), (found, found_index) = (
            np.unique(ids, return_inverse=True) for ids in (codes >> 32, codes & LARGEST_UINT32)
        )
        union = np.bincount(true_index, shared)[true_index] + np.bincount(found_index, shared)[found_index] - shared
        overlap = (shared / union)[(truth[true_index] > 0) & (found[found_index] > 0)]
        hits = [int(np.count_nonzero(overlap > threshold)) for threshold in MATCH_THRESHOLDS]
        return Matches(int(np.count_nonzero(truth)), int(np.count_nonzero(found)), hits)


class Matches(NamedTuple):
    """The number of true and found objects, and the number that match each other."""

    true: int
    found: int
    hits: list[int]  # at each of `MATCH_THRESHOLDS`; above 0.5 an object matches at most one other

    @property
    def precision(self) -> list[float]:
        """The average precision at each threshold, as the Data Science Bowl 2018 defines it; NaN without objects."""
        return [hits / (self.true + self.found - hits) if self.true + self.found else math.nan for hits in self.hits]
