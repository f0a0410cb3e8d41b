"""What the scripts write for people: CSV files, scores, TensorBoard, curves, pictures of predictions and of records.

Nothing here changes what is trained or segmented. TensorFlow and matplotlib are imported inside functions.
"""

import contextlib
import csv
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cli import InputError, any_text, check_values, list_of, printable, read_json, read_own_file, replacing, whole
from image_files import displayable, normalize, without_data
from lmdb_utils import Database, StoredImage

if TYPE_CHECKING:
    from train_unet import RunState

LARGEST_FIGURE = 1e38  # in a CSV file; beyond what training computes with, and still drawn
EXAMPLES = 4  # test images in the picture of predictions
FIGURES_FOLDER = "figures"  # of inference: what is measured of each image, one file for each
SCORES_FILE, CONFUSION_FILE = "scores.csv", "confusion.csv"
SHOWN_WORST = 5  # images
PREVIEW_RECORDS, PREVIEW_COLUMNS = 16, 4
CONFUSION_CLASSES = 16  # in a picture; more take long to draw, and nobody reads them


class Report:
    """Writes the figures of each test epoch: CSV files, pictures, TensorBoard, and the log.

    Parameters
    ----------
    folder : path
        Output folder of the run.
    test_database : path
        Where the images of ``predictions.png`` come from.
    deviation_floor : ndarray, shape (C,)
        Least standard deviation by which each channel of them is divided.
    number_classes : int
        Classes, background included.
    epoch : int
        Test epochs done; what the files contain of later ones, from a run that was killed, is dropped.
    step : int
        Training steps done; the same holds for TensorBoard's files.

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

        `train` has ``loss``, ``learning_rate`` and, if steps were taken, ``images_per_second`` and
        `BatchSupply.figures`; `test` has ``loss``, ``confusion`` and the figures of `score_confusion`. `model` gives
        logits for the pictures.
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

    def conclude(self, reason: str, state: "RunState") -> None:
        """Log how the run ended, the best figures of each class, and where everything lies."""
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
                    "the network finds nothing of class %d: train longer, with a lower --learning_rate, or let rare "
                    "classes weigh more with --balance_classes 1 or --class_weights auto", class_id,
                )  # fmt: skip
        logging.info("the model is in %s", self._folder / "saved_model")
        logging.info(
            "look at predictions.png and curves.png in %s, or at: tensorboard --logdir %s", self._folder, self._folder
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
        """Begin a CSV file, with the rows of earlier epochs where there are some."""
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
        """Append one row to a CSV file; opened and closed each time, so that a killed job has lost nothing."""
        with open(self._folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def drop_later_events(file: Path, step: int) -> None:
    """Remove from a file of TensorBoard what comes after a step: a run that was killed will take these steps again.

    The end of the file may be cut short.
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
    """Turn a confusion matrix into figures.

    Parameters
    ----------
    confusion : ndarray of integers, shape (classes, classes)
        Rows are true classes, columns predicted ones.

    Returns
    -------
    dict
        ``accuracy`` (float), ``iou`` and ``dice`` (ndarray of float64, shape (classes,)); NaN for a class that neither
        truth nor prediction contains.
    """
    hits = np.diag(confusion).astype(np.float64)
    sizes = confusion.sum(0) + confusion.sum(1)  # of truth and prediction together
    with np.errstate(invalid="ignore"):
        return {"accuracy": hits.sum() / confusion.sum(), "iou": hits / (sizes - hits), "dice": 2 * hits / sizes}


def mean_of_present(scores: np.ndarray) -> float:
    """Return the mean over the classes that occur; NaN where none does."""
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if len(present) else math.nan


def text_of_score(score: float) -> str:
    """Return a score for a CSV file; an absent class has none."""
    return "" if math.isnan(score) else f"{score:.6f}"


# ---------------------------------------------------------------------------------------------- scores of inference


class Figures(NamedTuple):
    """What is measured of the mask of one image; a small JSON file, so that processes and runs share the work."""

    image: str  # name of the file
    truth: list[Any]  # name, bytes and time of change (ns) of the file with the true classes
    confusion: np.ndarray  # int64 (classes, classes); rows are true classes, columns predicted ones

    def write(self, path: Path) -> None:
        """Write the file."""
        values = {**self._asdict(), "image": printable(self.image), "confusion": self.confusion.tolist()}
        path.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, number_classes: int) -> "Figures":
        """Read the file; raise `InputError` if it is not what `write` writes, for a model of so many classes."""
        values = read_json(path)
        pixels = list_of(list_of(whole(0), number_classes), number_classes)
        check_values(values, {"image": any_text, "truth": list_of(lambda value: True, 3), "confusion": pixels}, path)
        return cls(values["image"], values["truth"], np.array(values["confusion"], np.int64))


def count_confusion(truth: np.ndarray, predicted: np.ndarray, number_classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 (classes, classes), of the pixels whose truth is not negative (ignored)."""
    counted = truth >= 0
    cells = truth[counted].astype(np.int64) * number_classes + predicted[counted]
    return np.bincount(cells, minlength=number_classes**2).reshape(number_classes, number_classes)


def report_scores(folder: Path, number_classes: int) -> None:
    """Write scores and confusion matrix of all images with figures and a mask, and log the total and the worst ones."""
    while True:  # another process may finish an image meanwhile, and have written the scores before this one does
        paths = scored_masks(folder)
        found = [Figures.read(path, number_classes) for path in paths]
        if not found:
            return
        total = np.sum([each.confusion for each in found], axis=0)
        rows = [row_of_scores(each.image, each.confusion) for each in found]
        scores = [f"{score}_{class_id}" for score in ("iou", "dice") for class_id in range(number_classes)]
        head = ["image", "pixels", "accuracy", "mean_iou", *scores]
        write_csv(folder / SCORES_FILE, [head, *rows, row_of_scores("total", total)])
        columns = [f"predicted_{class_id}" for class_id in range(number_classes)]
        write_csv(folder / CONFUSION_FILE, [["true_class", *columns], *([i, *row] for i, row in enumerate(total))])
        if scored_masks(folder) == paths:
            break
    figures = score_confusion(total)
    logging.info(
        "scores of %d images: accuracy %.4f, mean IoU %.4f, Dice of each class %s; in %s", len(found),
        figures["accuracy"], mean_of_present(figures["iou"]), ", ".join(f"{dice:.4f}" for dice in figures["dice"]),
        folder / SCORES_FILE,
    )  # fmt: skip
    worst = sorted((row for row in rows if row[3]), key=lambda row: float(row[3]))[:SHOWN_WORST]
    logging.info("lowest mean IoU: %s", ", ".join(f"{row[0]} {float(row[3]):.4f}" for row in worst))


def scored_masks(folder: Path) -> list[Path]:
    """Return the figures of the masks that are there."""
    paths = sorted((folder / FIGURES_FOLDER).glob("*.json"))
    return [path for path in paths if (folder / path.stem).is_file()]


def row_of_scores(name: str, confusion: np.ndarray) -> list[str]:
    """Return the row of an image in the scores."""
    scores = score_confusion(confusion)
    values = (scores["accuracy"], mean_of_present(scores["iou"]), *scores["iou"], *scores["dice"])
    return [name, str(confusion.sum()), *map(text_of_score, values)]


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file, which appears when it is complete."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


# ---------------------------------------------------------------------------------------------- pictures


def read_examples(database: str, deviation_floor: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return z-scores (H, W, C) and masks (H, W) of a few images, spread over a database."""
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
    """Draw random records of a database with their masks; return where."""
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
        # Scaled also if it hardly varies: there is something to see, whatever the network sees of it.
        left.imshow(displayable(scores_of(stored, np.finfo(np.float32).tiny)))
        name = printable(metadata.names[metadata.record_image[index]])
        left.set_title(name, fontsize=7, parse_math=False)  # a $ begins no formula
        # Ranks, so that gaps in the ids take no colors.
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


def draw_confusion(confusion: np.ndarray) -> Any:
    """Return a figure of a confusion matrix, as shares of each true class; of at most `CONFUSION_CLASSES` classes."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # Of more classes than can be read, those that differ most from what they should be.
    wrong = confusion.sum(0) + confusion.sum(1) - 2 * np.diag(confusion)
    shown = np.sort(np.argsort(-wrong, kind="stable")[:CONFUSION_CLASSES])
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
        axes.set_title(f"the {len(shown)} of {len(confusion)} classes\nwith most wrong pixels")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def pixels_of(figure: Any) -> np.ndarray:
    """Return a figure as an array of uint8, shape (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
