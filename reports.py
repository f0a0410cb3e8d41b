"""Write results for people: CSV files, scores, TensorBoard, curves, pictures of predictions and of records.

Nothing here affects training or segmentation. TensorFlow and matplotlib are imported inside functions.
"""

import base64
import contextlib
import csv
import html
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from cli import (
    InputError,
    check_values,
    counted,
    list_of,
    optional,
    printable,
    read_json,
    read_own_bytes,
    read_own_file,
    real,
    replacing,
    text_in_utf8,
    whole,
)
from image_files import ImageFile, PixelSize, displayable, normalize, without_data
from lmdb_utils import Database, StoredImage
from objects import MATCH_THRESHOLDS, Matches, ObjectTable

if TYPE_CHECKING:
    from train_unet import RunState

LARGEST_FIGURE = 1e38  # in a CSV file; larger than any value in training, and can be plotted
EXAMPLES = 4  # test images in the picture of predictions
FIGURES_FOLDER = "figures"  # of inference, with one file of measurements per image
OBJECTS_FILE, OBJECT_ROWS = "objects.csv", ".objects.csv"  # of all images; ending of the file names of single images
SCORES_FILE, CONFUSION_FILE, TABLE_FILE, PAGE_FILE = "scores.csv", "confusion.csv", "table.csv", "report.html"
TABLE_COLUMNS = (
    "image", "class", "pixels", "share", "regions", "mean_region_pixels", "unit", "area", "mean_region_area",
    "mean_probability",
)  # fmt: skip
PAGE_IMAGES, PAGE_CLASSES = 500, 8  # maximum on a page
ERROR_COLORS = (
    " Wrong pixels are red if they are background, blue if they were predicted as background, and yellow if they were "
    "confused with another class."
)
SHOWN_WORST = 5  # images
PREVIEW_RECORDS, PREVIEW_COLUMNS = 16, 4
CONFUSION_CLASSES = 16  # in a picture; more are slow to draw and unreadable
PAGE_STYLE = """
:root { color-scheme: light dark; --line: #c8ccd0; --soft: #f3f5f7; --accent: 31, 119, 180; }
@media (prefers-color-scheme: dark) { :root { --line: #4a4f55; --soft: #26292d; --accent: 90, 160, 220; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem; max-width: 100rem; }
h1 { font-size: 1.5rem; margin: 0 0 0.5rem; }
h2 { font-size: 1.15rem; margin: 1.75rem 0 0.5rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0; }
caption { text-align: left; padding: 0.3rem 0; white-space: nowrap; }
th, td { border: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: right; font-variant-numeric: tabular-nums; }
th { background: var(--soft); font-weight: 600; }
td:not([data-key]):not(.share) { text-align: left; }
td:not([data-key]) { max-width: 50rem; overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; white-space: nowrap; }
th button::after { content: " \\2195"; opacity: 0.4; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort] button::after { opacity: 1; }
th[aria-sort="ascending"] button::after { content: " \\25B2"; }
th[aria-sort="descending"] button::after { content: " \\25BC"; }
.share { background: rgba(var(--accent), calc(var(--share) * 0.6)); }
img { display: block; max-width: min(100%, 60rem); height: auto; }
td img { max-width: none; max-height: 12rem; }
@media (max-width: 50rem) { td img { max-height: 6rem; } }
"""
PAGE_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent;
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const rows = [...body.rows].sort((a, b) => {
      const [one, other] = [key(a, column), key(b, column)];
      if (one === "" || other === "") return (one === "") - (other === "");  // empty cells stay at the end
      return sign * (isNaN(one - other) ? one.localeCompare(other, undefined, {numeric: true}) : one - other);
    });
    body.append(...rows);
  }));
}
"""


class Report:
    """Writes the figures of each test epoch to CSV files, pictures, TensorBoard and the log.

    Parameters
    ----------
    folder : path
        Output folder of the run.
    test_database : path
        Source of the images in ``predictions.png``.
    deviation_floor : ndarray, shape (C,)
        Smallest standard deviation by which each of their channels is divided.
    number_classes : int
        Number of classes, including background.
    epoch : int
        Test epochs done; rows of later epochs, from a run that was killed, are dropped.
    step : int
        Training steps done; later TensorBoard events are dropped too.

    Raises
    ------
    InputError
        If a file of an earlier run is not what the suite wrote.
    """

    def __init__(
        self, folder: Path, test_database: str, deviation_floor: np.ndarray, number_classes: int, epoch: int, step: int
    ) -> None:
        import tensorflow as tf

        self._folder, self._classes = folder, range(number_classes)
        for file in sorted(folder.glob("tensorboard-*/events.out.tfevents.*")):
            drop_later_events(file, step)
        self._examples = read_examples(test_database, deviation_floor)
        scores = [f"{score}_{class_id}" for score in ("iou", "dice") for class_id in self._classes]
        head = ["epoch", "step", "learning_rate", "train_loss", "test_loss", "accuracy", "mean_iou"]
        self._begin("metrics.csv", [*head, *scores], epoch)
        read_metrics(folder / "metrics.csv", self._classes)
        self._begin("test_loss.csv", ["epoch", "test_loss"], epoch)
        predicted = [f"predicted_{class_id}" for class_id in self._classes]
        self._begin("confusion.csv", ["epoch", "true_class", *predicted], epoch)
        self._writers = {
            name: tf.summary.create_file_writer(os.fspath(self._folder / f"tensorboard-{name}"))
            for name in ("train", "test")
        }

    def write(self, state: "RunState", train: dict[str, float], test: dict[str, Any], model: Any) -> None:
        """Write the results of a test epoch.

        `train` contains ``loss``, ``learning_rate`` and, if steps were taken, ``images_per_second`` and
        `BatchSupply.figures`. `test` contains ``loss``, ``confusion`` and the figures of `score_confusion`. `model`
        returns logits for the pictures.
        """
        mean_iou = mean_of_present(test["iou"])
        scores = [text_of_score(score) for score in (test["accuracy"], mean_iou, *test["iou"], *test["dice"])]
        losses = [f"{train['loss']:.6f}", f"{test['loss']:.6f}"]
        self._append("metrics.csv", [state.epoch, state.step, f"{train['learning_rate']:g}", *losses, *scores])
        self._append("test_loss.csv", [state.epoch, losses[1]])
        for class_id, row in enumerate(test["confusion"]):
            self._append("confusion.csv", [state.epoch, class_id, *row])
        pictures = {
            "curves": draw_curves(self._folder / "metrics.csv", self._classes),
            "predictions": draw_predictions(self._examples, model, len(self._classes)),
            "confusion": draw_confusion(test["confusion"]),
        }
        for name in ("curves", "predictions"):
            with replacing(self._folder / f"{name}.png") as path:
                pictures[name].savefig(path, dpi=100)
        self._write_tensorboard(state.step, train, {**test, "mean_iou": mean_iou}, pictures)
        self._log(state, train, test)

    def write_page(self, state: "RunState", test: dict[str, Any]) -> None:
        """Write the page about the network exported after this test epoch."""
        with replacing(self._folder / PAGE_FILE) as path:
            path.write_text(page_of_training(self._folder, state, test), encoding="utf-8")

    def conclude(self, reason: str, state: "RunState") -> None:
        """Log why the run stopped, the best figures of each class, and where the results are."""
        rows = read_metrics(self._folder / "metrics.csv", self._classes)
        best = next((row for row in rows if int(row["epoch"]) == state.best_epoch), {})
        logging.info(
            "done: %s; best test loss %.4f, in epoch %d of %d", reason, state.stopping.best_loss, state.best_epoch,
            state.epoch,
        )  # fmt: skip
        for class_id in self._classes if best else ():
            iou, dice = best[f"iou_{class_id}"], best[f"dice_{class_id}"]
            logging.info("class %d: %s", class_id, f"IoU {iou}, Dice {dice}" if iou else "absent from the test images")
            if iou and float(iou) == 0:
                logging.warning(
                    "the network finds no pixels of class %d; train longer, lower --learning_rate, or give rare "
                    "classes more weight with --balance_classes 1 or --class_weights auto", class_id,
                )  # fmt: skip
        logging.info("the model is in %s", self._folder / "saved_model")
        logging.info(
            "see predictions.png and curves.png in %s, or run tensorboard --logdir %s", self._folder, self._folder
        )

    def _log(self, state: "RunState", train: dict[str, float], test: dict[str, Any]) -> None:
        dice = ", ".join("absent" if math.isnan(score) else f"{score:.3f}" for score in test["dice"])
        speed = ""
        if "images_per_second" in train:
            speed = (
                f"; {train['images_per_second']:.1f} images/s, queue {train['reader/queue_fill']:.0%} full, waited for "
                f"data {train['reader/wait_share']:.0%}"
            )
        logging.info(
            "epoch %d step %d: train loss %.4f, test loss %.4f%s, accuracy %.4f, Dice of each class %s%s",
            state.epoch, state.step, train["loss"], test["loss"],
            " (best)" if state.best_epoch == state.epoch else "", test["accuracy"], dice, speed,
        )  # fmt: skip

    def _write_tensorboard(
        self, step: int, train: dict[str, float], test: dict[str, Any], pictures: dict[str, Any]
    ) -> None:
        import tensorflow as tf

        with self._writers["train"].as_default(step):
            for name, value in train.items():
                tf.summary.scalar(name, value)
            self._writers["train"].flush()
        with self._writers["test"].as_default(step):
            for name in ("loss", "accuracy", "mean_iou"):
                tf.summary.scalar(name, test[name])
            for name in ("iou", "dice"):
                for class_id, value in enumerate(test[name]):
                    if not math.isnan(value):
                        tf.summary.scalar(f"{name}/class_{class_id}", value)
            for name in ("predictions", "confusion"):
                tf.summary.image(name, pixels_of(pictures[name])[None])
            self._writers["test"].flush()

    def _begin(self, name: str, columns: list[str], epoch: int) -> None:
        """Start a CSV file, with the rows of earlier epochs if there are any."""
        rows: list[list[str]] = []
        if (self._folder / name).exists():
            found = csv.reader(read_own_file(self._folder / name).splitlines())
            try:
                rows = [row for row in found if row and row[0].isdecimal() and int(row[0]) <= epoch]
            except (csv.Error, ValueError) as error:
                raise InputError(f"{self._folder / name} is not what training wrote ({error}); move it away") from error
        with replacing(self._folder / name) as path, open(path, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])

    def _append(self, name: str, row: Sequence[Any]) -> None:
        """Append one row to a CSV file; open and close it each time, so that a killed job loses nothing."""
        with open(self._folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def drop_later_events(file: Path, step: int) -> None:
    """Remove events after a step from a TensorBoard file, since a run that was killed repeats these steps.

    The file may be truncated.
    """
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    kept, is_later = [], False
    with contextlib.suppress(tf.errors.DataLossError, DecodeError):
        for record in tf.data.TFRecordDataset(os.fspath(file)).as_numpy_iterator():
            if tf.compat.v1.Event.FromString(record).step > step:
                is_later = True
            else:
                kept.append(record)
    if is_later:
        with replacing(file) as path, tf.io.TFRecordWriter(os.fspath(path)) as writer:
            for record in kept:
                writer.write(record)


def read_metrics(path: Path, classes: range) -> list[dict[str, str]]:
    """Return the rows of metrics.csv; raise `InputError` if they are not what training wrote."""
    scores = [f"{score}_{class_id}" for score in ("iou", "dice") for class_id in classes]
    figures = ["train_loss", "test_loss", "accuracy", *scores]
    try:
        rows = list(csv.DictReader(io.StringIO(read_own_file(path))))
        for row in rows:
            is_possible = {name: abs(float(row[name] or 0)) <= LARGEST_FIGURE for name in figures}
            is_possible |= {name: whole(0)(int(row[name])) for name in ("epoch", "step")}
            for name, possible in is_possible.items():
                if not possible:
                    raise ValueError(f"{name} {row[name][:20]}")
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not what training wrote ({str(error)[:100]}); move it away") from error
    return rows


def score_confusion(confusion: np.ndarray) -> dict[str, Any]:
    """Return the scores of a confusion matrix.

    Parameters
    ----------
    confusion : ndarray of integers, shape (classes, classes)
        Rows are true classes, columns are predicted classes.

    Returns
    -------
    dict
        ``accuracy`` (float), ``iou`` and ``dice`` (ndarray of float64, shape (classes,)); NaN for a class that neither
        truth nor prediction contains.
    """
    hits = np.diag(confusion).astype(np.float64)
    sizes = confusion.sum(0) + confusion.sum(1)  # of truth and prediction together
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"accuracy": hits.sum() / confusion.sum(), "iou": hits / (sizes - hits), "dice": 2 * hits / sizes}


def mean_of_present(scores: np.ndarray) -> float:
    """Return the mean over the classes that occur; NaN if none does."""
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if len(present) else math.nan


def text_of_score(score: float) -> str:
    """Return a score as text for a CSV file; an empty text for an absent class."""
    return "" if math.isnan(score) else f"{score:.6f}"


# ---------------------------------------------------------------------------------------------- scores of inference


class AboutObjects(NamedTuple):
    """Number of objects in a mask, and their matches with true objects."""

    smallest: int  # minimum pixels of an object
    number: int
    matches: Optional[Matches]  # with true objects; None if these are unknown

    @classmethod
    def read(cls, values: Sequence[Any], path: Path) -> "AboutObjects":
        """Return the values from a file; raise `InputError` if they are not what `Figures.write` writes."""
        about = cls(*values)
        three_values = list_of(lambda value: True, 3)
        check_values(
            about._asdict(), {"smallest": whole(1), "number": whole(0), "matches": optional(three_values)}, path
        )
        if about.matches is None:
            return about
        matches, hits = Matches(*about.matches), list_of(whole(0), len(MATCH_THRESHOLDS))
        check_values(matches._asdict(), {"true": whole(0), "found": whole(0), "hits": hits}, path)
        return about._replace(matches=matches)


class Figures(NamedTuple):
    """Measurements of the mask of one image, in a small JSON file, so that processes and runs share the work."""

    image: str  # file name
    pixels: np.ndarray  # int64 (classes,), of each class, without pixels that have no data
    regions: np.ndarray  # int64 (classes,), connected regions of each class
    pixel_size: Optional[PixelSize]
    probability: Optional[float]  # mean probability of each pixel's class; None if no longer known
    truth: Optional[list[Any]]  # name, size (bytes) and modification time (ns) of the true mask
    confusion: Optional[np.ndarray]  # int64 (classes, classes); rows are true, columns are predicted classes
    objects: Optional[AboutObjects] = None  # None if objects are not numbered

    def write(self, path: Path) -> None:
        """Write the file."""
        values = {**self._asdict(), "image": printable(self.image)}
        lists = {name: value.tolist() for name, value in values.items() if isinstance(value, np.ndarray)}
        path.write_text(json.dumps({**values, **lists}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, number_classes: int) -> "Figures":
        """Read the file; raise `InputError` if it is not what `write` writes for this number of classes."""
        counts, anything = list_of(whole(0), number_classes), list_of(lambda value: True, 3)
        checks = {
            "image": text_in_utf8, "pixels": counts, "regions": counts, "pixel_size": optional(anything),
            "probability": optional(real(0, 1)), "truth": optional(anything),
            "confusion": optional(list_of(counts, number_classes)), "objects": optional(list_of(lambda value: True, 3)),
        }  # fmt: skip
        values = read_json(path)
        if isinstance(values, dict):
            values.setdefault("objects", None)  # earlier versions did not count objects
        check_values(values, checks, path)
        if values["pixel_size"] is not None:
            values["pixel_size"] = PixelSize(*values["pixel_size"])
            check_values(
                values["pixel_size"]._asdict(), {"height": real(0), "width": real(0), "unit": text_in_utf8}, path
            )
        if values["objects"] is not None:
            values["objects"] = AboutObjects.read(values["objects"], path)
        for name in ("pixels", "regions", "confusion"):
            values[name] = None if values[name] is None else np.array(values[name], np.int64)
        return cls(**{name: values[name] for name in cls._fields})

    @property
    def matches(self) -> Optional[Matches]:
        """The matches of its objects with true objects; None if unknown."""
        return None if self.objects is None else self.objects.matches

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur; NaN without truth."""
        return math.nan if self.confusion is None else mean_of_present(score_confusion(self.confusion)["iou"])


NOTHING = np.empty((0, 0, 0), np.float32)


class Measurement:
    """Collects the figures of one mask, block by block, row by row of blocks.

    Parameters
    ----------
    number_classes : int
        Number of classes, including background.
    width : int
        Columns of the mask. Memory use is proportional to it.
    """

    def __init__(self, number_classes: int, width: int) -> None:
        self._classes = number_classes
        self._pixels, self._regions = np.zeros(number_classes, np.int64), RegionCounter(number_classes, width)
        self._confusion = np.zeros((number_classes, number_classes), np.int64)
        self._probability = 0.0  # sum over all counted pixels; NaN if any is unknown

    def add(
        self,
        row: int,
        column: int,
        classes: np.ndarray,
        missing: Optional[np.ndarray] = None,
        softmax: np.ndarray = NOTHING,
        truth: Optional[np.ndarray] = None,
    ) -> None:
        """Add a block that starts at a row and column.

        `classes` (rows, columns) are the classes of the mask. `missing` is True for pixels without data. `softmax` has
        a channel for each class, or is empty. `truth` is negative for ignored pixels.
        """
        ids = classes.astype(np.int32)
        if missing is not None:
            ids[missing] = -1
        self._pixels += np.bincount(ids[ids >= 0], minlength=self._classes)
        self._regions.add(column, ids)
        if softmax.size:
            self._probability += float(np.max(softmax, axis=-1).sum(dtype=np.float64, where=ids >= 0))
        else:
            self._probability = math.nan
        if truth is not None:
            self._confusion += count_confusion(truth, classes, self._classes)

    def figures(self, image: str, pixel_size: Optional[PixelSize], truth: Optional[list[Any]]) -> Figures:
        """Return the figures; `truth` identifies the true mask, if there was one."""
        probability = self._probability / max(int(self._pixels.sum()), 1)
        known = None if math.isnan(probability) else min(probability, 1.0)
        confusion = None if truth is None else self._confusion
        return Figures(image, self._pixels, self._regions.counts, pixel_size, known, truth, confusion)


class RegionCounter:
    """Counts the connected regions of each class; pixels connect over edges, not over corners.

    Remembers the regions of the pixels next to later blocks, in the row above and in the column to the left. Region 0
    represents pixels without a class, which are -1.

    Parameters
    ----------
    number_classes : int
        Number of classes, including background.
    width : int
        Columns of the mask.
    """

    def __init__(self, number_classes: int, width: int) -> None:
        self.counts = np.zeros(number_classes, np.int64)
        self._class_of = np.array([-1])  # of each remembered region
        self._above, self._left = np.zeros(width, np.int64), np.zeros(0, np.int64)  # regions

    def add(self, column: int, ids: np.ndarray) -> None:
        """Add the classes (rows, columns) of a block; blocks come from left to right, row by row."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
        from skimage.measure import label

        labels, count = label(ids + 1, background=0, connectivity=1, return_num=True)
        class_of_label = np.full(count + 1, -1)
        class_of_label[labels.ravel()] = ids.ravel()
        remembered, class_of = len(self._class_of), np.concatenate([self._class_of, class_of_label[1:]])
        top, bottom, left, right = (
            np.where(edge > 0, edge + remembered - 1, 0)
            for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        )
        columns = slice(column, column + ids.shape[1])
        if not column:
            self._left = np.zeros(len(ids), np.int64)
        neighbors = np.stack([np.append(self._above[columns], self._left), np.append(top, left)])
        touching = neighbors[:, class_of[neighbors[0]] == class_of[neighbors[1]]]
        graph = coo_array((np.ones(touching.shape[1]), tuple(touching)), shape=(len(class_of), len(class_of)))
        total, region_of = connected_components(graph, directed=False)
        class_of_region = np.empty(total, np.int64)
        class_of_region[region_of] = class_of
        self.counts += self._count(class_of_region) - self._count(self._class_of)
        self._above[columns] = bottom
        regions = region_of[np.concatenate([[0], self._above, right])]
        kept, numbers = np.unique(regions, return_inverse=True)  # region 0 stays first
        self._class_of = class_of_region[kept]
        self._above, self._left = np.split(numbers[1:], [len(self._above)])

    def _count(self, class_of: np.ndarray) -> np.ndarray:
        """Return how many regions of each class there are."""
        return np.bincount(class_of + 1, minlength=len(self.counts) + 1)[1:]


def count_confusion(truth: np.ndarray, predicted: np.ndarray, number_classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 (classes, classes), of the pixels whose truth is not negative (ignored)."""
    counted = truth >= 0
    cells = truth[counted].astype(np.int64) * number_classes + predicted[counted]
    return np.bincount(cells, minlength=number_classes**2).reshape(number_classes, number_classes)


class Wanted(NamedTuple):
    """Which files inference is to write about all its masks."""

    scores: bool = False
    table: bool = False
    page: bool = False
    objects: bool = False


def report_masks(folder: Path, number_classes: int, wanted: Wanted, about: Sequence[str]) -> None:
    """Write the wanted files about all masks that have figures, and log their scores.

    `about` describes how the masks were made, in lines of text.
    """
    while True:  # repeats if another process finished an image meanwhile, so that no older result remains
        paths = measured_masks(folder)
        found = [Figures.read(path, number_classes) for path in paths]
        scored = [each for each in found if each.confusion is not None]
        if wanted.scores and scored:
            write_scores(folder, number_classes, scored)
        if wanted.objects:
            pool_objects(folder, [(each.image, path) for each, path in zip(found, paths)])
        if wanted.table:
            write_csv(folder / TABLE_FILE, [TABLE_COLUMNS, *(row for each in found for row in rows_of_table(each))])
        if wanted.page:
            with replacing(folder / PAGE_FILE) as path:
                path.write_text(page_of_masks(folder, number_classes, found, paths, about), encoding="utf-8")
        if measured_masks(folder) == paths:
            break
    if wanted.scores and scored:
        log_scores(folder, scored)


def measured_masks(folder: Path) -> list[Path]:
    """Return the figures files of the existing masks."""
    figures = folder / FIGURES_FOLDER
    paths = sorted(figures.rglob("*.json"))
    names = [os.fspath(path.relative_to(figures).with_suffix("")) for path in paths]
    # The figures of a plane in a stack are named after the file, followed by the place of the plane.
    return [
        path
        for path, name in zip(paths, names)
        if any(map(os.path.isfile, (folder / name, folder / name.rpartition("#")[0])))
    ]


def write_scores(folder: Path, number_classes: int, scored: Sequence[Figures]) -> None:
    """Write the scores and the confusion matrix of the images with truth."""
    scores = [f"{score}_{class_id}" for score in ("iou", "dice") for class_id in range(number_classes)]
    total = total_confusion(scored)
    rows = [row_of_scores(each.image, each.confusion) for each in scored]
    table = [["image", "pixels", "accuracy", "mean_iou", *scores], *rows, row_of_scores("total", total)]
    matches = [each.matches for each in scored]
    if any(matches):
        of_objects = [["true_objects", "found_objects", "ap_50", "ap"]]
        of_objects += [*(row_of_matches([each]) for each in matches), row_of_matches(matches)]
        table = [[*row, *more] for row, more in zip(table, of_objects)]
    write_csv(folder / SCORES_FILE, table)
    columns = [f"predicted_{class_id}" for class_id in range(number_classes)]
    write_csv(folder / CONFUSION_FILE, [["true_class", *columns], *([i, *row] for i, row in enumerate(total))])


def total_confusion(scored: Sequence[Figures]) -> np.ndarray:
    """Return the confusion matrix of all images with truth."""
    return np.sum([each.confusion for each in scored if each.confusion is not None], axis=0)


def log_scores(folder: Path, scored: Sequence[Figures]) -> None:
    """Log the total scores and the images with the lowest scores."""
    figures = score_confusion(total_confusion(scored))
    logging.info(
        "scores of %s: accuracy %.4f, mean IoU %.4f, Dice of each class %s; in %s", counted(len(scored), "image"),
        figures["accuracy"], mean_of_present(figures["iou"]), ", ".join(f"{dice:.4f}" for dice in figures["dice"]),
        folder / SCORES_FILE,
    )  # fmt: skip
    matches = [each.matches for each in scored if each.matches is not None]
    if matches:
        at_half, mean = mean_precision(matches)
        counts = sum(each.found for each in matches), sum(each.true for each in matches)
        logging.info(
            "objects: %d found, %d true; average precision %.4f at an IoU of 0.5, mean %.4f", *counts, at_half, mean
        )
    worst = sorted((each for each in scored if not math.isnan(each.mean_iou)), key=lambda each: each.mean_iou)
    if worst:
        shown = (f"{each.image} {each.mean_iou:.4f}" for each in worst[:SHOWN_WORST])
        logging.info("lowest mean IoU: %s", ", ".join(shown))


def row_of_scores(name: str, confusion: Any) -> list[str]:
    """Return the row of an image in the score table."""
    scores = score_confusion(confusion)
    values = (scores["accuracy"], mean_of_present(scores["iou"]), *scores["iou"], *scores["dice"])
    return [name, str(confusion.sum()), *map(text_of_score, values)]


def row_of_matches(matches: Sequence[Optional[Matches]]) -> list[str]:
    """Return the numbers of objects and the average precision, which is a mean for several images."""
    known = [each for each in matches if each is not None]
    if not known:
        return [""] * 4
    counts = sum(each.true for each in known), sum(each.found for each in known)
    return [*map(str, counts), *map(text_of_score, mean_precision(known))]


def mean_precision(matches: Sequence[Matches]) -> tuple[float, float]:
    """Return the average precision at an intersection over union of 0.5, and its mean over all thresholds.

    Both are means over images, as in the Data Science Bowl 2018; NaN if no image has an object.
    """
    precision = np.array([each.precision for each in matches if each.true + each.found])
    return (float(precision[:, 0].mean()), float(precision.mean())) if len(precision) else (math.nan, math.nan)


def write_objects(path: Path, table: ObjectTable, image: ImageFile) -> None:
    """Write a row for each object of an image."""
    size, places, boxes, means = image.pixel_size, table.centroids, table.boxes, table.means
    coordinates = image.coordinates(*places.T)
    head = ["id", "class", "pixels", "unit", "area", "row", "column", "map_x", "map_y"]
    head += ["first_row", "first_column", "end_row", "end_column"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, *(f"mean_{channel}" for channel in range(image.shape[2]))])
        for index, (class_id, pixels) in enumerate(zip(table.classes.tolist(), table.areas.tolist())):
            area = [f"{size.unit}²", f"{pixels * size.area:.6g}"] if size else ["", ""]
            on_map = ["", ""] if coordinates is None else [f"{each:.12g}" for each in coordinates[index]]
            values = ("" if math.isnan(mean) else f"{mean:.6g}" for mean in means[index])
            row = [index + 1, class_id, pixels, *area, *(f"{each:.2f}" for each in places[index]), *on_map]
            writer.writerow([*row, *boxes[index].tolist(), *values])


def pool_objects(folder: Path, images: Sequence[tuple[str, Path]]) -> None:
    """Write the objects of all images into one table, with the name of the image at the start of each row."""
    with replacing(folder / OBJECTS_FILE) as temporary, open(temporary, "w", newline="", encoding="utf-8") as pooled:
        is_first = True
        for name, figures in images:
            path = figures.with_suffix(OBJECT_ROWS)
            if not path.is_file():
                continue
            start = io.StringIO()
            csv.writer(start, lineterminator="").writerow([printable(name)])
            with open(path, encoding="utf-8", errors="replace", newline="") as rows:
                head = next(rows, "")
                if is_first:
                    pooled.write(f"image,{head}")
                pooled.writelines(f"{start.getvalue()},{row}" for row in rows)
            is_first = False


def rows_of_table(figures: Figures) -> Iterator[list[Any]]:
    """Yield the table rows of an image, one for each class."""
    total, size = max(int(figures.pixels.sum()), 1), figures.pixel_size
    for class_id, (pixels, regions) in enumerate(zip(figures.pixels.tolist(), figures.regions.tolist())):
        mean = pixels / regions if regions else math.nan
        areas = [f"{size.unit}²", f"{pixels * size.area:.6g}", f"{mean * size.area:.6g}"] if size else ["", "", ""]
        areas[2] = areas[2] if regions else ""
        yield [
            figures.image, class_id, pixels, f"{pixels / total:.6f}", regions, f"{mean:.6g}" if regions else "",
            *areas, text_of_score(math.nan if figures.probability is None else figures.probability),
        ]  # fmt: skip


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file, which appears only when it is complete."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


# ---------------------------------------------------------------------------------------------- pages


def page_of_masks(
    folder: Path, number_classes: int, found: Sequence[Figures], paths: Sequence[Path], about: Sequence[str]
) -> str:
    """Return a page about masks, with how they were made, their scores, and a row for each image worth viewing.

    `paths` are the files of the figures, which may have thumbnails next to them.
    """
    scored = [each for each in found if each.confusion is not None]
    parts = [heading("Masks", about)]
    if scored:
        total = total_confusion(scored)
        parts += [
            f"<h2>Scores of {counted(len(scored), 'image')}</h2>",
            scores_in_html(total),
            confusion_in_html(total),
        ]
    chosen = sorted(range(len(found)), key=lambda i: order_of_interest(found[i]))[:PAGE_IMAGES]
    kind = "lowest scores" if scored else "least certain masks"
    some = f": the {len(chosen)} of {len(found)} with the {kind}" if len(chosen) < len(found) else ""
    parts.append(f"<h2>Images{some}</h2>")
    shown = most_frequent(found, number_classes)
    if len(shown) < number_classes:
        parts.append(f"<p>Of {number_classes} classes, only the {len(shown)} with the most pixels are shown.</p>")
    columns = ["picture", "image", "pixels", *(f"class {class_id}" for class_id in shown), "mean probability"]
    if scored:
        columns += ["mean IoU", *(f"Dice {class_id}" for class_id in shown)]
    of_objects = ["objects"] * any(each.objects for each in found)
    of_objects += ["average precision"] * any(each.matches for each in found)
    rows = (
        row_of_page(found[i], paths[i].with_suffix(".jpg"), shown, bool(scored))
        + cells_of_objects(found[i])[: len(of_objects)]
        for i in chosen
    )
    columns += of_objects
    parts.append(
        "<p>Each picture shows an image and its mask. Outlines enclose regions of the classes."
        f"{ERROR_COLORS if scored else ''}"
        f"{' Numbered objects are shown in colors instead.' if of_objects else ''}</p>"
    )
    parts.append(sortable_table(columns, rows))
    return html_page(f"Masks in {folder.name}", parts)


def order_of_interest(figures: Figures) -> tuple[float, float]:
    """Return the sort key of images, with the worst scores first, then the least certain images without scores."""
    score = figures.mean_iou
    probability = math.inf if figures.probability is None else figures.probability
    return (math.inf if math.isnan(score) else score), probability


def most_frequent(found: Sequence[Figures], number_classes: int) -> list[int]:
    """Return the most frequent classes of masks and truth, as many as a page can show."""
    pixels = np.zeros(number_classes, np.int64)
    for each in found:
        pixels += each.pixels if each.confusion is None else each.confusion.sum(0) + each.confusion.sum(1)
    return sorted(np.argsort(-pixels, kind="stable")[:PAGE_CLASSES].tolist())


def row_of_page(figures: Figures, thumbnail: Path, shown: Sequence[int], scored: bool) -> list[str]:
    """Return the cells of an image."""
    picture = ""
    if thumbnail.is_file():
        picture = picture_in_html(read_own_bytes(thumbnail), "jpeg", f"image and mask of {figures.image}")
    total = max(int(figures.pixels.sum()), 1)
    numbers = [figures.pixels[class_id] / total for class_id in shown]
    probability = math.nan if figures.probability is None else figures.probability
    cells = [cell(picture), cell(html.escape(figures.image), figures.image), cell(f"{total:,}", total)]
    cells += [number_cell(value, "{:.1%}") for value in numbers]
    cells.append(number_cell(probability, "{:.4f}"))
    if scored:
        dice = [math.nan] * len(shown)
        if figures.confusion is not None:
            dice = score_confusion(figures.confusion)["dice"][list(shown)].tolist()
        cells += [number_cell(value, "{:.4f}") for value in (figures.mean_iou, *dice)]
    return cells


def cells_of_objects(figures: Figures) -> list[str]:
    """Return the cells about the objects of an image."""
    number = math.nan if figures.objects is None else figures.objects.number
    precision = math.nan if figures.matches is None else mean_precision([figures.matches])[1]
    return [number_cell(number, "{:,.0f}"), number_cell(precision, "{:.4f}")]


def page_of_training(folder: Path, state: "RunState", test: dict[str, Any]) -> str:
    """Return a page about the best network of a training run so far, with its scores, pictures and settings."""
    parts = [
        heading(
            "Training",
            [f"Network of epoch {state.epoch}, step {state.step}, with a test loss of {test['loss']:.4f}"],
        ),
        "<h2>Scores of the test images</h2>",
        "<p>The network was selected by its loss on these images, so expect slightly lower scores on other images.</p>",
        scores_in_html(test["confusion"]),
        confusion_in_html(test["confusion"]),
    ]
    titles = {
        "predictions": "Test images with truth and prediction (gray pixels of the truth are not counted)",
        "curves": "Curves",
    }
    for name, title in titles.items():
        parts += [f"<h2>{title}</h2>", picture_in_html((folder / f"{name}.png").read_bytes(), "png", title)]
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    cells = ([cell(html.escape(name)), cell(html.escape(json.dumps(value)))] for name, value in settings.items())
    parts += ["<h2>Settings</h2>", sortable_table(["name", "value"], cells)]
    return html_page(f"Training in {folder.name}", parts)


def heading(title: str, lines: Sequence[str]) -> str:
    """Return a heading, with lines of text and the date below it."""
    date = time.strftime("%Y-%m-%d %H:%M")
    return f"<h1>{title}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in (*lines, f"Written on {date}."))


def scores_in_html(confusion: np.ndarray) -> str:
    """Return the scores of a confusion matrix as HTML."""
    scores = score_confusion(confusion)
    text = f"<p>Accuracy {scores['accuracy']:.4f}, mean IoU {mean_of_present(scores['iou']):.4f}</p>"
    rows = (
        [cell(str(i), i), number_cell(share, "{:.2%}"), number_cell(iou, "{:.4f}"), number_cell(dice, "{:.4f}")]
        for i, (share, iou, dice) in enumerate(
            zip(confusion.sum(1) / max(confusion.sum(), 1), scores["iou"], scores["dice"])
        )
    )
    return text + sortable_table(["class", "share of truth", "IoU", "Dice"], rows)


def confusion_in_html(confusion: np.ndarray) -> str:
    """Return a confusion matrix as shares of each true class, for the classes from `most_wrong`."""
    shown = most_wrong(confusion)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{class_id}</th>" for class_id in shown)
    rows = "".join(
        f"<tr><th>{i}</th>"
        + "".join(f'<td style="--share: {shares[i, j]:.3f}" class="share">{shares[i, j]:.1%}</td>' for j in shown)
        + "</tr>"
        for i in shown
    )
    some = f", for the {len(shown)} classes with the most wrong pixels" if len(shown) < len(confusion) else ""
    caption = f"Confusion matrix (rows are true classes, columns are predicted classes){some}"
    return f'<div class="wide"><table><caption>{caption}</caption><tr><th></th>{head}</tr>{rows}</table></div>'


def sortable_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that a click on a column heading sorts; the cells of `rows` come from `cell`."""
    head = "".join(f'<th><button type="button">{html.escape(name)}</button></th>' for name in columns)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{table}</div>'


def cell(content: str, key: Any = "") -> str:
    """Return a table cell, with a sort key if it differs from the content."""
    given = f' data-key="{html.escape(str(key))}"' if key != "" else ""
    return f"<td{given}>{content}</td>"


def number_cell(value: float, form: str) -> str:
    """Return a cell with a number; an empty cell for NaN."""
    return cell("") if math.isnan(value) else cell(form.format(value), f"{value:.6g}")


def picture_in_html(content: bytes, kind: str, text: str) -> str:
    """Return a picture that is embedded in the page."""
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(text)}" loading="lazy">'


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return a page that needs no other files and no internet access."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
{body}
<script>{PAGE_SCRIPT}</script>
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------- pictures


def read_examples(database: str, deviation_floor: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the z-scores (H, W, C) and masks (H, W) of a few images from all parts of a database."""
    with Database(database) as opened:
        count = opened.metadata.count
        chosen = np.unique(np.linspace(0, count - 1, EXAMPLES).astype(int))
        examples = [opened.record(int(record)) for record in chosen]
        return [(scores_of(each, deviation_floor), np.array(each.mask)) for each in examples]


def scores_of(stored: StoredImage, deviation_floor: Any) -> np.ndarray:
    """Return the z-scores (H, W, C) of a record's image."""
    missing = without_data(stored.image, stored.no_data)
    return normalize(stored.image, stored.mean, stored.deviation, deviation_floor, missing=missing)


def draw_predictions(examples: list[tuple[np.ndarray, np.ndarray]], model: Any, number_classes: int) -> Any:
    """Return a figure with a row for each example: image, truth, prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.5 * len(examples)), layout="constrained")
    axes = figure.subplots(len(examples), 3, squeeze=False)
    for row, (image, mask) in zip(axes, examples):
        row[0].imshow(displayable(image))
        show_classes(row[1], mask, number_classes)
        show_classes(row[2], np.argmax(model(image[None], training=False)[0], axis=-1), number_classes)
        for place in row:
            place.set_axis_off()
    for place, title in zip(axes[0], ("image", "truth", "prediction")):
        place.set_title(title)
    return figure


def show_classes(axes: Any, mask: np.ndarray, number_classes: int) -> None:
    """Draw a mask (H, W) of the classes 0 to ``number_classes - 1`` in colors; ignored pixels are gray."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"].with_extremes(bad="0.7")
    known = np.ma.masked_greater_equal(mask, number_classes)
    axes.imshow(known, cmap=colors, vmin=0, vmax=max(number_classes - 1, 1), interpolation="nearest")


def draw_records(database: Database, output: Path) -> Path:
    """Draw random records of a database with their masks; return the path of the picture."""
    from matplotlib.figure import Figure

    metadata = database.metadata
    count = min(PREVIEW_RECORDS, metadata.count)
    chosen = sorted(np.random.default_rng(0).choice(metadata.count, count, replace=False).tolist())
    rows = -(-count // PREVIEW_COLUMNS)
    figure = Figure(figsize=(4 * PREVIEW_COLUMNS, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * PREVIEW_COLUMNS, squeeze=False).ravel()
    for place in axes:
        place.set_axis_off()
    for left, right, index in zip(axes[::2], axes[1::2], chosen):
        stored = database.record(index)
        # Scaled even if the image hardly varies, so that its content is visible.
        left.imshow(displayable(scores_of(stored, np.finfo(np.float32).tiny)))
        name = printable(metadata.names[metadata.record_image[index]])
        left.set_title(name, fontsize=7, parse_math=False)  # a $ does not start a formula
        # Numbered consecutively, so that gaps in the class ids use no colors.
        show_classes(right, np.searchsorted(metadata.classes, stored.mask), len(metadata.classes))
        found = np.intersect1d(stored.mask, metadata.classes)
        right.set_title(f"classes {', '.join(map(str, found[:6]))}", fontsize=7)
    with replacing(output) as path:
        figure.savefig(path, dpi=100)
    return output


def draw_curves(metrics: Path, classes: range) -> Any:
    """Return a figure of the losses and the scores of each class, from metrics.csv."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics, classes)
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for axes, names in (
        (losses, ["train_loss", "test_loss"]),
        (scores, ["accuracy", *(f"dice_{class_id}" for class_id in classes)]),
    ):
        for name in names:
            axes.plot(steps, [float(row[name] or "nan") for row in rows], marker=".", label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.legend()
    return figure


def most_wrong(confusion: np.ndarray) -> np.ndarray:
    """Return the classes to show; if there are too many, those with the most wrong pixels."""
    wrong = confusion.sum(0) + confusion.sum(1) - 2 * np.diag(confusion)
    return np.sort(np.argsort(-wrong, kind="stable")[:CONFUSION_CLASSES])


def draw_confusion(confusion: np.ndarray) -> Any:
    """Return a figure of a confusion matrix as shares of each true class, for at most `CONFUSION_CLASSES` classes."""
    from matplotlib.figure import Figure

    shares, shown = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1), most_wrong(confusion)
    edge = 2 + 0.5 * len(shown)
    figure = Figure(figsize=(edge, edge), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares[np.ix_(shown, shown)], cmap="Blues", vmin=0, vmax=1)
    for row, true_class in enumerate(shown):
        for column, predicted in enumerate(shown):
            share = shares[true_class, predicted]
            axes.text(column, row, f"{share:.1%}", ha="center", va="center", color="gray", size=8)
    axes.set_xticks(range(len(shown)), shown)
    axes.set_yticks(range(len(shown)), shown)
    if len(shown) < len(confusion):
        axes.set_title(f"the {len(shown)} of {len(confusion)} classes\nwith the most wrong pixels")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def pixels_of(figure: Any) -> np.ndarray:
    """Return a figure as an array of uint8, shape (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
