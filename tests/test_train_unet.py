import csv
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.io
import tifffile
from conftest import ROOT, WITHOUT_GPU, build, errors_of, run_script, write_folders, write_tiff, z_score

import train_unet
from cli import InputError

# The usage lines of the specification.
USAGE = {
    "build_lmdb.py": """usage: build_lmdb [-h] [--image_folder IMAGE_FOLDER] [--mask_folder MASK_FOLDER]
        [--output_folder OUTPUT_FOLDER] [--dataset_name DATASET_NAME] [--train_fraction TRAIN_FRACTION]
        [--image_format IMAGE_FORMAT] [--use_tiling USE_TILING] [--tile_size TILE_SIZE] """,
    "train_unet.py": """usage: train_unet [-h] --train_database TRAIN_DATABASE_FILEPATH
        --test_database TEST_DATABASE_FILEPATH --output_dir OUTPUT_FOLDER [--batch_size BATCH_SIZE]
        [--number_classes NUMBER_CLASSES] [--learning_rate LEARNING_RATE] [--test_every_n_steps TEST_EVERY_N_STEPS]
        [--balance_classes BALANCE_CLASSES] [--use_augmentation USE_AUGMENTATION]
        [--early_stopping EARLY_STOPPING_COUNT] [--reader_count READER_COUNT] """,
    "inference_unet.py": """usage: inference [-h] --saved_model_filepath SAVED_MODEL_FILEPATH
        --image_folder IMAGE_FOLDER --output_folder OUTPUT_FOLDER [--image_format IMAGE_FORMAT] """,
}


def arguments(databases, folder, *more):
    return [
        "--train_database", databases[0], "--test_database", databases[1], "--output_dir", folder,
        "--baseline_feature_depth", 4, "--batch_size", 2, *more,
    ]  # fmt: skip


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", USAGE)
def test_help_begins_with_the_options_of_the_specification_in_its_order(script):
    text = " ".join(run_script(script, "-h").stdout.split())
    text = text.replace(" [SAVED_MODEL_FILEPATH ...]", "", 1)  # one model as specified, or several
    assert text.startswith(" ".join(USAGE[script].split()) + " ["), text


@pytest.mark.parametrize("script", ["build_lmdb.py", "train_unet.py", "inference_unet.py"])
def test_help_loads_no_heavy_library(script):
    code = f"import sys; sys.argv = ['x', '-h']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"try:\n    import {script[:-3]} as script; script.main(['-h'])\nexcept SystemExit: pass\n"
    heavy = ("tensorflow", "scipy", "skimage", "tifffile", "imagecodecs", "matplotlib")
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout


@pytest.fixture(scope="module")
def run(databases, tmp_path_factory):
    """Return the output folder and the printed output of a finished training run."""
    folder = tmp_path_factory.mktemp("run") / "out put"
    more = ["--test_every_n_steps", 15, "--max_epochs", 4, "--learning_rate", 3e-3, "--reader_count", 2]
    done = run_script("train_unet.py", *arguments(databases, folder, *more))
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_minutes_are_planned_after_the_first_steps_and_once_more_after_the_first_test_epoch(caplog):
    pace = train_unet.Pace()
    run = SimpleNamespace(
        args=parse("--test_every_n_steps", 100, "--max_minutes", 8), pace=pace, stop=False,
        cluster=SimpleNamespace(is_chief=True, world_size=1), trainer=SimpleNamespace(num_replicas=2),
        checkpoints=SimpleNamespace(are_due=lambda minutes: False), state=make_state(step=1, epoch=0, epoch_step=1),
    )  # fmt: skip
    planned = []
    for epoch, duration in ((0, 2.0), (1, 1.0), (2, 0.5)):
        run.state.epoch = epoch
        for run.state.step in range(100 * epoch + 1, 100 * epoch + 60):
            pace._last = 0 if math.isnan(pace._last) else pace._last
            pace.note_step()
            pace._durations.extend([duration] * pace.RECENT)
            votes = train_unet.cast_votes(run)
            if votes.planned_steps:
                planned.append((epoch, run.state.step))
                train_unet.heed(run, votes._replace(planned_steps=2 * votes.planned_steps))
        pace.begin_test()
        pace.finish_test()
    assert planned == [(0, 3), (1, 101)]
    assert run.state.planned_steps == pytest.approx(101 + 480 / 1.0, rel=0.2)


def test_an_epoch_of_few_steps_is_not_enough_to_plan_with():
    pace = train_unet.Pace()
    run = SimpleNamespace(
        args=parse("--test_every_n_steps", 2, "--max_minutes", 8), pace=pace, stop=False,
        cluster=SimpleNamespace(is_chief=True, world_size=1), trainer=SimpleNamespace(num_replicas=1),
        checkpoints=SimpleNamespace(are_due=lambda minutes: False), state=make_state(step=2, epoch=1),
    )  # fmt: skip
    pace.begin_test()
    pace.finish_test()
    assert pace.may_revise and not train_unet.cast_votes(run).planned_steps


NOTE_WHAT_LIVES = """
    import os, weakref
    from unet_model import UNetTrainer

    distribute, leave, iterators = UNetTrainer.distribute, os._exit, []

    def noted(trainer, reader):
        iterators.append((iterator := distribute(trainer, reader)) and weakref.ref(iterator))
        return iterator

    def leave_with_note(code):
        print("alive:", [iterator() is not None for iterator in iterators], flush=True)
        leave(code)

    UNetTrainer.distribute, os._exit = noted, leave_with_note
"""


def test_no_iterator_is_destroyed_when_a_run_ends_which_could_take_a_minute(databases, tmp_path):
    done = run_changed(tmp_path / "out", NOTE_WHAT_LIVES, databases, "--test_every_n_steps", 2, "--max_epochs", 1)
    assert done.returncode == 0 and "alive: [True, True]" in done.stdout, done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="TensorFlow has these operations for such CPUs")
@pytest.mark.parametrize("chosen", [None, "0"])
def test_fast_operations_are_requested_unless_the_user_has_chosen(databases, tmp_path, chosen):
    env = {**WITHOUT_GPU, "TF_CPP_MIN_LOG_LEVEL": "0", **({"TF_ENABLE_ONEDNN_OPTS": chosen} if chosen else {})}
    more = ["--test_every_n_steps", 1, "--max_epochs", 1]
    command = [sys.executable, ROOT / "train_unet.py", *arguments(databases, tmp_path / "out", *more)]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    assert done.returncode == 0, done.stdout
    assert ("oneDNN custom operations are on" in done.stdout) == (chosen is None)


def test_a_run_learns(run):
    rows = read_csv(run[0] / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "15"), ("2", "30"), ("3", "45"), ("4", "60")]
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
        [3e-3 * ((60 - last) / 54) ** 0.9 for last in (14, 29, 44, 59)], rel=1e-5
    )


def test_minutes_end_a_run_with_a_test_and_a_model_and_more_minutes_resume_it(databases, tmp_path):
    folder = tmp_path / "out"
    steps = []
    for minutes in (0.5, 0.5, 0.8):
        done = run_script("train_unet.py", *arguments(databases, folder, "--max_minutes", minutes), timeout=300)
        assert done.returncode == 0 and f"{minutes:g} minutes are used up" in done.stdout, done.stdout
        steps.append(int(read_csv(folder / "metrics.csv")[-1]["step"]))
    assert 0 < steps[0] == steps[1] < steps[2]
    assert (folder / "saved_model" / "saved_model.pb").is_file()
    assert len(read_csv(folder / "metrics.csv")) == 2


def best_epoch(folder):
    """Return the row of metrics.csv whose network is exported."""
    return min(read_csv(folder / "metrics.csv"), key=lambda row: float(row["test_loss"]))


def test_softmax(folder, databases):
    """Return the softmax of a run's exported model for all test images, and their masks."""
    import tensorflow as tf

    from lmdb_utils import Database

    signature = tf.saved_model.load(str(folder / "saved_model")).signatures["serving_default"]
    with Database(databases[1]) as database:
        stored = [database.record(index) for index in range(len(database))]
        softmax = np.concatenate([signature(tf.constant(z_score(each.image)[None]))["softmax"] for each in stored])
        return softmax, np.stack([each.mask for each in stored]).astype(int)


test_softmax.__test__ = False


def mean_loss(softmax, masks):
    """Return the mean cross-entropy of all pixels plus the Dice loss of both classes."""
    softmax = softmax.astype(np.float64)
    of_true_class = np.take_along_axis(softmax, masks[..., None], -1)[..., 0]
    dice = [
        2 * of_true_class[masks == class_id].sum() / (softmax[..., class_id].sum() + (masks == class_id).sum())
        for class_id in range(2)
    ]
    return -np.log(of_true_class).mean() + 1 - np.mean(dice)


CHANGED = """
import sys, time
sys.path.insert(0, {root!r})
import train_unet

if __name__ == "__main__":  # the readers import this file as well
    import numpy as np
    import tensorflow as tf
{change}
    sys.exit(train_unet.main())
"""
TWO_REPLICAS = """
    cpu, logical = tf.config.list_physical_devices("CPU")[0], tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [logical] * 2)
"""


def run_changed(folder, change, databases, *more):
    """Run train_unet.py after the lines of Python in `change`, with results in `folder`."""
    script = folder.parent / "changed.py"
    script.write_text(CHANGED.format(root=str(ROOT), change=change))
    return subprocess.run(
        [sys.executable, script, *map(str, arguments(databases, folder, *more))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=WITHOUT_GPU,
    )


def test_the_network_of_two_replicas_is_the_same_in_testing_in_the_export_and_after_a_resume(databases, tmp_path):
    folder, more = tmp_path / "out", ["--test_every_n_steps", 6, "--learning_rate", 3e-3, "--batch_size", 1]
    for epochs in (1, 3):
        done = run_changed(folder, TWO_REPLICAS, databases, *more, "--max_epochs", epochs)
        assert done.returncode == 0 and "global batch of 2 images" in done.stdout, done.stdout
        best = best_epoch(folder)
        assert float(best["test_loss"]) == pytest.approx(mean_loss(*test_softmax(folder, databases)), rel=1e-5)
    assert "resuming at step 6" in done.stdout and int(best["epoch"]) > 1
    losses = [float(row["train_loss"]) for row in read_csv(folder / "metrics.csv")]
    assert losses[2] < losses[1] < losses[0]


NOT_A_NUMBER = """
    import unet_model
    test_step = unet_model.UNetTrainer.test_step
    def without_number(self, *arguments):
        votes, sums, counts = test_step(self, *arguments)
        return votes, (tf.concat([[np.nan], sums[1:]], 0) if self.step.numpy() > 4 else sums), counts
    unet_model.UNetTrainer.test_step = without_number
"""


def test_a_test_loss_that_is_not_a_number_stops_the_run_names_the_epoch_and_keeps_the_best_model(databases, tmp_path):
    folder = tmp_path / "out"
    done = run_changed(folder, NOT_A_NUMBER, databases, "--test_every_n_steps", 4, "--max_epochs", 3)
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    assert "the test loss became nan in epoch 2; the last checkpoint and the best model so far are kept" in done.stdout
    assert float(best_epoch(folder)["test_loss"]) == pytest.approx(
        mean_loss(*test_softmax(folder, databases)), rel=1e-5
    )
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["000001"]


def test_metrics_are_those_of_every_test_image(run, databases):
    """Recompute the best epoch's figures with the exported model, in one pass of plain numpy."""
    best = best_epoch(run[0])
    softmax, masks = test_softmax(run[0], databases)
    predicted = softmax.argmax(-1)
    assert float(best["test_loss"]) == pytest.approx(mean_loss(softmax, masks), rel=1e-5)
    assert float(best["accuracy"]) == pytest.approx((predicted == masks).mean(), abs=1e-4)
    for class_id in range(2):
        both = ((predicted == class_id) & (masks == class_id)).sum()
        either = ((predicted == class_id) | (masks == class_id)).sum()
        assert float(best[f"iou_{class_id}"]) == pytest.approx(both / either, abs=1e-4)
        assert float(best[f"dice_{class_id}"]) == pytest.approx(2 * both / (both + either), abs=1e-4)


def test_everything_promised_is_written(run):
    folder, output = run
    assert {path.name for path in folder.iterdir()} == {
        "saved_model", "checkpoint", "tensorboard-train", "tensorboard-test", "test_loss.csv", "metrics.csv",
        "confusion.csv", "curves.png", "predictions.png", "report.html", "settings.json", "train.log",
    }  # fmt: skip
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["batch_size"] == 2 and settings["train_data"]["count"] == 16 and settings["seed"] == 0
    assert [row["test_loss"] for row in read_csv(folder / "test_loss.csv")] == [
        row["test_loss"] for row in read_csv(folder / "metrics.csv")
    ]
    assert [path.name for path in sorted((folder / "checkpoint").iterdir())] == ["000003", "000004"]
    assert "training on the CPU" in output and "epoch 4 step 60: train loss" in output
    assert "epoch 4 step 60" in (folder / "train.log").read_text()
    metadata = json.loads((folder / "saved_model" / "unet_metadata.json").read_text())
    assert (metadata["channels"], metadata["number_classes"], metadata["radius"]) == (1, 2, 96)


def test_tensorboard_gets_a_point_for_each_test_epoch(run):
    import tensorflow as tf

    tags, pictures = {}, {}
    for name in ("train", "test"):
        for path in (run[0] / f"tensorboard-{name}").iterdir():
            for record in tf.data.TFRecordDataset(str(path)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    tags.setdefault(f"{name}/{value.tag}", []).append(event.step)
                    if value.metadata.plugin_data.plugin_name == "images":
                        pictures.setdefault(value.tag, []).append(tf.io.decode_png(value.tensor.string_val[2]).numpy())
    for tag in (
        "train/loss",
        "train/images_per_second",
        "train/reader/wait_share",
        "train/reader/queue_fill",
        "test/loss",
        "test/dice/class_1",
    ):
        assert tags[tag] == [15, 30, 45, 60], tag
    for name in ("predictions", "confusion"):
        assert tags[f"test/{name}"] == [15, 30, 45, 60]
        assert all(picture.std() > 10 for picture in pictures[name]), "a picture is blank"
    assert np.any(pictures["predictions"][0] != pictures["predictions"][3])


def test_the_confusion_of_each_epoch_counts_every_test_pixel_and_agrees_with_the_scores(run):
    rows = read_csv(run[0] / "confusion.csv")
    assert [(row["epoch"], row["true_class"]) for row in rows] == [
        (f"{e}", f"{c}") for e in range(1, 5) for c in (0, 1)
    ]
    for epoch, metrics in enumerate(read_csv(run[0] / "metrics.csv")):
        counts = np.array([[int(row[f"predicted_{c}"]) for c in (0, 1)] for row in rows[2 * epoch : 2 * epoch + 2]])
        assert counts.sum() == 5 * 64 * 64
        assert float(metrics["accuracy"]) == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-6)
        iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
        assert [float(metrics[name]) for name in ("iou_0", "iou_1", "mean_iou")] == pytest.approx(
            [*iou, iou.mean()], abs=1e-6
        )


def test_pictures_show_curves_and_predictions(run):
    for name, least in (("curves.png", (300, 800)), ("predictions.png", (900, 700))):
        picture = skimage.io.imread(run[0] / name)
        assert picture.shape[0] >= least[0] and picture.shape[1] >= least[1] and picture[..., :3].std() > 20
    for name in ("see predictions.png", "the model is in", "class 1: IoU 0.", "class 0: IoU 0."):
        assert name in run[1]


def test_a_finished_run_started_again_reports_it_and_changes_nothing(run, databases):
    before = (run[0] / "metrics.csv").read_bytes()
    more = ["--test_every_n_steps", 15, "--max_epochs", 4, "--learning_rate", 3e-3]
    done = run_script("train_unet.py", *arguments(databases, run[0], *more))
    assert done.returncode == 0 and "resuming at step 60, after 4 test epochs" in done.stdout, done.stdout
    assert "done: last epoch reached" in done.stdout
    assert (run[0] / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    "more, words",
    [
        (("--seed", 7), "started with seed 0, now it is 7"),
        (("--baseline_feature_depth", 2), "started with baseline_feature_depth 4, now it is 2"),
        (("--number_classes", 3), "started with number_classes 2, now it is 3"),
        (("--resume", "never"), "expected an empty --output_dir"),
    ],
)
def test_a_run_that_contradicts_its_checkpoint_is_refused_with_both_values(run, databases, more, words):
    before = (run[0] / "metrics.csv").read_bytes()
    done = run_script("train_unet.py", *arguments(databases, run[0], *more))
    assert done.returncode == 2 and words in done.stdout.strip().splitlines()[-1] and "Traceback" not in done.stdout
    assert (run[0] / "metrics.csv").read_bytes() == before


def test_another_database_is_refused_and_a_copy_of_the_same_is_not(run, databases, tmp_path):
    other, _ = build(tmp_path, "--seed", 3, count=21)
    done = run_script("train_unet.py", *arguments((other, databases[1]), run[0]))
    assert done.returncode == 2 and "started with train_database 16 images, fingerprint" in done.stdout
    copied = shutil.copy(databases[0], tmp_path / "copy.lmdb")
    more = ["--test_every_n_steps", 15, "--max_epochs", 4]
    done = run_script("train_unet.py", *arguments((copied, databases[1]), run[0], *more))
    assert done.returncode == 0, done.stdout


def test_label_map_and_channels_travel_to_the_settings_and_to_inference(tmp_path):
    images, masks = write_folders(tmp_path, count=6, shape=(64, 64, 4), dtype="uint8")
    for path in masks.iterdir():
        tifffile.imwrite(path, tifffile.imread(path) * 255)
    options = ["--image_folder", images, "--mask_folder", masks, "--output_folder", tmp_path, "--channels", "3,1"]
    done = run_script("build_lmdb.py", *options, "--label_map", "0:0,255:1")
    assert done.returncode == 0, done.stdout
    found = [tmp_path / f"{side}-dataset.lmdb" for side in ("train", "test")]
    done = run_script(
        "train_unet.py", *arguments(found, tmp_path / "run", "--max_epochs", 1, "--test_every_n_steps", 2)
    )
    assert done.returncode == 0, done.stdout
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["train_data"]["label_map"] == "0:0,255:1" and settings["test_data"]["channels"] == [3, 1]
    metadata = json.loads((tmp_path / "run" / "saved_model" / "unet_metadata.json").read_text())
    assert (metadata["label_map"], metadata["source_channels"], metadata["channels"]) == ("0:0,255:1", [3, 1], 2)
    (tmp_path / "selected").mkdir()
    for path in images.iterdir():
        write_tiff(tmp_path / "selected" / path.name, tifffile.imread(path)[..., [3, 1]])
    for folder in (images, tmp_path / "selected"):
        output = tmp_path / f"masks of {folder.name}"
        done = run_script("inference_unet.py", "--saved_model_filepath", tmp_path / "run" / "saved_model",
                          "--image_folder", folder, "--output_folder", output)  # fmt: skip
        assert done.returncode == 0, done.stdout
    for path in images.iterdir():
        one, other = (tifffile.imread(tmp_path / f"masks of {name}" / path.name) for name in ("images", "selected"))
        np.testing.assert_array_equal(one, other)


def test_float_images_of_a_small_range_are_learned_from_and_recognized_in_other_units(tmp_path):
    """Their standard deviation is far below 1, the floor for integer images."""
    images, masks = write_folders(tmp_path, count=6)
    for path in images.iterdir():
        tifffile.imwrite(path, (tifffile.imread(path) / 10000).astype(np.float32))
    paths = ["--image_folder", images, "--mask_folder", masks, "--output_folder", tmp_path]
    assert run_script("build_lmdb.py", *paths).returncode == 0
    databases = [tmp_path / f"{side}-dataset.lmdb" for side in ("train", "test")]
    fast = ["--max_epochs", 2, "--test_every_n_steps", 200, "--learning_rate", 1e-2]
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "run", *fast))
    assert done.returncode == 0, done.stdout
    assert float(read_csv(tmp_path / "run" / "metrics.csv")[-1]["mean_iou"]) > 0.8
    tifffile.imwrite(images / "other.tif", tifffile.imread(images / "cell0.tif") / np.float32(65535))
    done = run_script("inference_unet.py", "--saved_model_filepath", tmp_path / "run" / "saved_model",
                      "--image_folder", images, "--output_folder", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (tifffile.imread(tmp_path / "out" / "cell0.tif") == tifffile.imread(masks / "cell0.tif")).mean() > 0.9
    [warning] = re.findall(r"WARNING (.*)", done.stdout)
    assert re.search(r"other\.tif: values from \S+e-0\d to \S+e-0\d .* from 0\.\d+ to 0\.\d+", warning), warning


def test_a_run_in_a_folder_of_any_name_is_resumed(databases, tmp_path):
    for epochs in (1, 2):
        done = run_script("train_unet.py", *arguments(databases, tmp_path / "lr [1e-3]*", "--max_epochs", epochs,
                                                      "--test_every_n_steps", 2))  # fmt: skip
        assert done.returncode == 0, done.stdout
    assert "resuming at step 2" in done.stdout


def test_databases_of_different_label_maps_are_refused(databases, tmp_path):
    other = build(tmp_path, "--label_map", "0:1,1:0", count=5)
    done = run_script("train_unet.py", *arguments([databases[0], other[1]], tmp_path / "out"))
    assert done.returncode == 2 and "databases with the same --label_map, found None" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout and not (tmp_path / "out").exists()


def test_masks_of_0_and_255_are_refused_with_the_label_map_that_fixes_them(tmp_path):
    images, masks = write_folders(tmp_path, count=3)
    for path in masks.iterdir():
        tifffile.imwrite(path, tifffile.imread(path) * 255)
    run_script("build_lmdb.py", "--image_folder", images, "--mask_folder", masks, "--output_folder", tmp_path)
    found = [tmp_path / f"{side}-dataset.lmdb" for side in ("train", "test")]
    done = run_script("train_unet.py", *arguments(found, tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    for text in ("found 255 in record 0 (cell", "--number_classes 256", "--label_map 0:0,255:1"):
        assert text in done.stdout, done.stdout


def test_auto_class_weights_let_all_classes_weigh_the_same_and_absent_ones_are_named(databases, caplog):
    args = train_unet.build_parser().parse_args(
        [*map(str, arguments(databases, "x", "--class_weights", "auto", "--number_classes", 4))]
    )
    train = SimpleNamespace(classes=np.array([0, 1, 3]), pixel_counts=np.array([900, 90, 10]))
    weights = train_unet.weights_of_classes(args, train)
    assert "no training image contains class 2: balancing skips it" in caplog.text and weights[2] == 1
    assert [count * weights[class_id] for class_id, count in ((0, 900), (1, 90), (3, 10))] == pytest.approx(
        [1000 / 3] * 3
    )
    args.class_weights = [1, 2]
    with pytest.raises(InputError, match="expected 4 --class_weights, one for each class, got 2"):
        train_unet.weights_of_classes(args, train)


def test_mixed_precision_learns_as_float32_does_and_exports_a_float32_model(run, databases, tmp_path):
    import tensorflow as tf

    more = ["--test_every_n_steps", 15, "--max_epochs", 4, "--learning_rate", 3e-3]
    extra = ["--mixed_precision", 1, "--label_smoothing", 0, "--class_weights", "1,1"]
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "out", *more, *extra))
    assert done.returncode == 0, done.stdout
    mixed, single = (read_csv(folder / "metrics.csv")[-1] for folder in (tmp_path / "out", run[0]))
    assert float(mixed["train_loss"]) == pytest.approx(float(single["train_loss"]), rel=0.1)
    model = tf.saved_model.load(str(tmp_path / "out" / "saved_model"))
    assert {weights.dtype for weights in model.weights} == {tf.float32}
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "out", *more))
    assert done.returncode == 2 and "started with mixed_precision 1, now it is 0" in done.stdout


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, databases, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "out")
    with open(next((folder / "checkpoint" / "000004").glob("weights.data*")), "r+b") as file:
        file.truncate(1000)
    more = ["--test_every_n_steps", 15, "--max_epochs", 4, "--learning_rate", 3e-3]
    done = run_script("train_unet.py", *arguments(databases, folder, *more))
    assert done.returncode == 0, done.stdout
    assert "000004 cannot be read" in done.stdout and "resuming at step 45, after 3 test epochs" in done.stdout
    assert [row["epoch"] for row in read_csv(folder / "metrics.csv")] == ["1", "2", "3", "4"]


def test_checkpoints_that_are_all_damaged_are_refused_and_nothing_is_lost(run, databases, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "out")
    for file in (folder / "checkpoint").glob("*/weights.data*"):
        os.truncate(file, 1000)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}
    done = run_script("train_unet.py", *arguments(databases, folder, "--test_every_n_steps", 15, "--max_epochs", 5))
    assert done.returncode == 2 and "can be read; choose another --output_dir" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_repeats_with_its_seed(run, databases, tmp_path):
    more = ["--test_every_n_steps", 15, "--max_epochs", 4, "--learning_rate", 3e-3]
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "again", *more))
    assert done.returncode == 0, done.stdout
    again, first = (read_csv(folder / "metrics.csv")[0] for folder in (tmp_path / "again", run[0]))
    assert float(again["train_loss"]) == pytest.approx(float(first["train_loss"]), rel=1e-3)
    assert float(again["test_loss"]) == pytest.approx(float(first["test_loss"]), rel=1e-3)


@pytest.mark.parametrize(
    "more, words",
    [
        (("--batch_size", "0"), "from 1 to"),
        (("--reader_count", "x"), "from 1 to"),
        (("--learning_rate", "-1"), "expected a number from 1e-10 to 10, such as 3e-4, got '-1'"),
        (("--learning_rate", "1e38"), "expected a number from 1e-10 to 10"),
        (("--max_minutes", "inf"), "above 0 and at most 10 million"),
        (("--learning_rate", "fast"), "got 'fast'"),
        (("--label_smoothing", "1"), "from 0 to below 1"),
        (("--label_smoothing", "much"), "got 'much'"),
        (("--number_classes", "1"), "--number_classes 2"),
        (("--train_database", "nowhere.lmdb"), "no database nowhere.lmdb"),
        (("--test_database", str(ROOT / "README.md")), "README.md"),
        (("--balance_classes", "true"), "expected 0 or 1, got 'true'"),
        (("--epochs", "3"), "did you mean --max_epochs?"),
    ],
)
def test_bad_input_is_refused_in_one_line(databases, tmp_path, more, words):
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "out", *more))
    assert done.returncode == 2, done.stdout
    assert words in done.stdout and len(done.stdout.splitlines()) == 1, done.stdout
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_that_are_not_a_run_to_resume_is_refused(databases, tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step\n1,10\n")
    for more, words in (
        ([], "contains results but no checkpoint"),
        (["--resume", "never"], "expected an empty --output_dir"),
    ):
        done = run_script("train_unet.py", *arguments(databases, tmp_path, *more))
        assert done.returncode == 2 and words in done.stdout, done.stdout
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_output_folder_that_cannot_be_made_is_refused(databases, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "file" / "run"))
    assert done.returncode == 2 and "cannot write to --output_dir" in done.stdout, done.stdout


def test_paths_that_are_nearly_right_lead_to_the_databases(databases, tmp_path):
    for wrong in (databases[0].parent, databases[0].with_suffix(""), databases[0].with_name("trian-t.lmdb")):
        done = run_script("train_unet.py", *arguments([wrong, databases[1]], tmp_path / "out"))
        assert done.returncode == 2 and f"(found {databases[1].parent}" in done.stdout, done.stdout


def test_a_test_on_the_training_images_is_refused_or_warned_of(databases, tmp_path):
    done = run_script("train_unet.py", *arguments([databases[0], databases[0]], tmp_path / "out"))
    assert done.returncode == 2 and "contain the same images" in done.stdout, done.stdout
    other_split = build(tmp_path, "--train_fraction", "0.77", "--seed", 5, count=21)
    once = ["--max_epochs", 1, "--test_every_n_steps", 1]
    done = run_script("train_unet.py", *arguments([other_split[1], databases[0]], tmp_path / "out", *once))
    assert done.returncode == 0, done.stdout
    assert re.search(r"WARNING \d image names are in both databases, such as cell\d+.tif", done.stdout)
    assert "WARNING --train_database is the test side of a dataset" in done.stdout


@pytest.mark.parametrize(
    "hidden, gpus_of_job, with_cuda, advice",
    [
        ("", "0", True, None),
        (None, None, True, None),
        (None, "0,1", True, "'tensorflow[and-cuda]==2.x'"),
        (None, "0", False, "TensorFlow 2.x was built without CUDA"),
    ],
)
def test_a_gpu_that_tensorflow_cannot_use_is_reported_with_a_solution(
    monkeypatch, caplog, hidden, gpus_of_job, with_cuda, advice
):
    for name, value in (("CUDA_VISIBLE_DEVICES", hidden), ("SLURM_JOB_GPUS", gpus_of_job)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_unet, "GPU_DEVICE", "/nowhere")
    train_unet.report_no_gpu("2.x", with_cuda)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [advice in warning for warning in warnings] == ([True] if advice else [])


def test_a_class_that_is_never_found_is_reported_at_the_end(tmp_path):
    images, masks = write_folders(tmp_path, count=4)
    for index, path in enumerate(sorted(masks.iterdir())):
        mask = np.zeros((64, 64), np.uint8)
        mask[index, :2] = 1  # too few pixels to be found
        tifffile.imwrite(path, mask)
    run_script("build_lmdb.py", "--image_folder", images, "--mask_folder", masks, "--output_folder", tmp_path)
    found = [tmp_path / f"{side}-dataset.lmdb" for side in ("train", "test")]
    more = ["--max_epochs", 3, "--test_every_n_steps", 5, "--learning_rate", 1e-2]
    done = run_script("train_unet.py", *arguments(found, tmp_path / "out", *more))
    assert done.returncode == 0 and "WARNING the network finds no pixels of class 1" in done.stdout, done.stdout


def test_databases_of_different_sizes_are_refused(databases, tmp_path):
    other, _ = build(tmp_path, count=2, shape=(32, 32, 1))
    done = run_script("train_unet.py", *arguments((databases[0], other), tmp_path / "out"))
    assert done.returncode == 2 and "same size" in done.stdout and "Traceback" not in done.stdout


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(databases, tmp_path):
    no_bounds = "    train_unet.rate_float = float"
    done = run_changed(tmp_path / "out", no_bounds, databases, "--learning_rate", 1e39, "--max_epochs", 1)
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    message = re.search(r"ERROR the loss became (?:nan|inf) at step (\d+) \(learning rate 1e\+38\).*", done.stdout)
    from imagereader import ImageReader

    [records] = re.findall(r"The batch contained (record .*)", message[0])
    reader = ImageReader(databases[0], use_augmentation=True, batch_size=2)
    assert records == ", ".join(reader.describe_step(int(message[1]) - 1)) and records.count("cell") == 2


def test_early_stopping_counts_epochs_without_improvement():
    stopping = train_unet.EarlyStopping(patience=2)
    losses = [1.0, 0.9, 0.89995, 0.8, 0.8, 0.79995]
    assert [stopping.update(loss) for loss in losses] == [True, True, True, True, False, True]
    assert stopping.best_loss == 0.79995 and stopping.should_stop
    assert not train_unet.EarlyStopping(1, math.inf).should_stop


def test_the_first_epoch_warms_up_for_at_most_a_thousand_steps():
    args = train_unet.build_parser().parse_args(
        ["--train_database=a", "--test_database=b", "--output_dir=c", "--learning_rate=1", "--test_every_n_steps=5000"]
    )
    state = make_state()
    rates = [train_unet.learning_rate_at(step, args, state) for step in (0, 999, 1000, 5000)]
    assert rates == pytest.approx([0.1, 0.1, 1, 1])


def make_state(**values):
    return train_unet.RunState(train_unet.EarlyStopping(10), **values)


def parse(*more):
    return train_unet.build_parser().parse_args([*map(str, arguments("ab", "out", "--learning_rate", 1, *more))])


def test_the_learning_rate_falls_to_nothing_at_the_last_step():
    args = parse("--test_every_n_steps", 100, "--max_epochs", 10)
    state = make_state(step=350, epoch=3, epoch_step=50)
    rates = [train_unet.learning_rate_at(step, args, state) for step in (0, 99, 100, 550, 999, 1000)]
    assert rates == pytest.approx([0.1, 0.1, 1, 0.5**0.9, (1 / 900) ** 0.9, 0])
    short = parse("--test_every_n_steps", 100, "--max_epochs", 1)
    assert [train_unet.learning_rate_at(step, short, make_state()) for step in (9, 10)] == pytest.approx([0.1, 1])
    constant = parse("--test_every_n_steps", 100, "--max_epochs", 10, "--schedule", "constant")
    assert train_unet.learning_rate_at(999, constant, state) == 1


def test_minutes_become_a_last_step_that_a_resume_keeps_and_other_minutes_change():
    state = make_state(step=350, epoch=3, epoch_step=50, planned_steps=430, planned_minutes=8.0)
    args = parse("--test_every_n_steps", 100, "--max_minutes", 8)
    assert (train_unet.last_step(args, state), train_unet.steps_to_test(args, state)) == (430, 50)
    state.step, state.epoch_step = 410, 10
    assert train_unet.steps_to_test(args, state) == 20
    both = parse("--test_every_n_steps", 100, "--max_minutes", 8, "--max_epochs", 4)
    assert train_unet.last_step(both, make_state(planned_steps=430, planned_minutes=8.0)) == 400
    state.epoch_step = 0
    for step, ended in ((429, False), (430, True), (432, True)):  # steps that are already queued still run
        state.step = step
        run = SimpleNamespace(args=args, state=state)
        assert train_unet.reason_to_end(run) == ("8 minutes are used up" if ended else "")
    for others in (("--max_minutes", 9), ()):
        assert train_unet.last_step(parse(*others), state) is None


def test_without_an_end_the_learning_rate_falls_where_the_test_loss_stops_improving():
    args, state = parse("--test_every_n_steps", 100), make_state(step=800)
    rates = []
    for test_loss in (1.0, *[0.9] * 11):
        state.finish_epoch(test_loss)
        rates.append(train_unet.learning_rate_at(800, args, state))
    assert rates == pytest.approx([1] * 6 + [0.1] * 5 + [0.01]) and state.stopping.should_stop


@pytest.mark.parametrize(
    "step, gpus, words",
    [
        (1, 0, "1000 steps and their test epoch take about 0:17:00"),
        (10, 0, "will take about 2:51:00 on this CPU; with --baseline_feature_depth 16 it would be about"),
        (30, 0, "will take about 8:24:20 on this CPU; with --baseline_feature_depth 8 it would be about 0:22:17"),
        (3600, 0, "on this CPU; with --baseline_feature_depth 8 it would be about 44:1"),
        (30, 1, "1000 steps and their test epoch take about 8:24:20"),
    ],
)
def test_a_test_epoch_that_takes_long_on_a_cpu_is_reported_with_the_features_that_fit(
    step, gpus, words, monkeypatch, caplog
):
    import tensorflow as tf

    caplog.set_level("INFO")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["gpu"] * gpus)
    pace = SimpleNamespace(step_seconds=step, closing_seconds=20 if step == 1 else 260)
    args = parse("--baseline_feature_depth", 64)
    train_unet.report_pace(SimpleNamespace(args=args, pace=pace))
    assert words in caplog.text


def test_steps_that_fit_into_some_seconds_leave_room_for_all_test_epochs(monkeypatch):
    seconds = [1000.0]
    monkeypatch.setattr(train_unet, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    pace = train_unet.Pace()
    pace.begin(50.0, test_steps=4)
    seconds[0] += 7
    assert pace.elapsed() == 57 and not pace.is_known
    for duration in (0, 30, 3, *[2] * 18, 1, 2):
        assert not pace.is_known
        seconds[0] += duration
        pace.note_step()
    assert pace.is_known and pace.step_seconds == 2
    pace.begin_test()
    seconds[0] += 20
    assert not pace.may_revise
    pace.finish_test()
    assert pace.closing_seconds == 20 and pace.may_revise
    assert pace.last_step_within(1020, 7, 50) == 7 + 1000 / (2 + 20 / 50) // 1
    assert pace.last_step_within(60, 7, 50) == 27 and pace.last_step_within(10, 7, 50) == 7
    assert pace.last_step_within(1020, 40, 50) == 450  # seven more steps are not worth a test epoch


@pytest.mark.parametrize("queue, wait, advised", [(0, 5, True), (4, 5, False), (0, 0.25, False)])
def test_more_readers_are_advised_where_training_waits_for_an_empty_queue(queue, wait, advised, monkeypatch, caplog):
    seconds = [0.0]
    monkeypatch.setattr(train_unet, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    class Reader:
        def get_queue_size(self):
            return queue

        def get_queue_capacity(self):
            return 4

        def raise_failure(self):
            pass

    def batches():
        while True:
            seconds[0] += wait
            yield "batch"

    supply = train_unet.BatchSupply(batches(), Reader())
    for _ in range(3):
        assert supply.next_batch() == "batch"
        seconds[0] += 10
    figures = supply.figures()
    assert figures["reader/queue_fill"] == queue / 4
    assert figures["reader/wait_milliseconds"] == pytest.approx(1000 * wait)
    assert figures["reader/wait_share"] == pytest.approx(wait / (wait + 10))
    supply.advise(2)
    assert ("raise --reader_count (now 2)" in caplog.text) == advised


@pytest.mark.parametrize("flag", [0, 1])
def test_options_reach_the_readers(flag, monkeypatch):
    options = ["--batch_size", 3, "--number_classes", 5, "--reader_count", 2, "--seed", 7]
    options += ["--test_reader_count", 3]
    flags = ["--use_augmentation", flag, "--balance_classes", 1 - flag]
    args = train_unet.build_parser().parse_args([*map(str, arguments("ab", "out", *options, *flags))])
    cluster, trainer = train_unet.Cluster(rank=1, world_size=2), SimpleNamespace(num_replicas=8)
    monkeypatch.setattr(train_unet, "ImageReader", lambda database, **options: (database, options))
    monkeypatch.setattr(train_unet, "open_supply", lambda trainer, reader: reader)
    run = train_unet.Run(args, cluster, trainer, None, None, SimpleNamespace(samples=48), None, 2)
    train_data = SimpleNamespace(deviation_floor="of the training images")
    common = {"number_classes": 5, "batch_size": 3, "seed": 7, "replicas": 4}
    common["deviation_floor"] = "of the training images"
    common.update(rank=1, world_size=2)
    train = {"name": "train reader", "num_workers": 8, "use_augmentation": bool(flag), "balance_classes": not flag}
    train.update(shuffle=True, first_sample=48)
    test = {"name": "test reader", "num_workers": 12, "shuffle": False}
    expected = [(Path("a"), {**train, **common}), (Path("b"), {**test, **common})]
    assert list(train_unet.supplies(run, train_data)) == expected


@pytest.mark.parametrize("mixed", [0, 1])
def test_options_reach_the_network_and_its_trainer(mixed, monkeypatch):
    import unet_model

    options = ["--number_classes", 3, "--learning_rate", 2e-3, "--seed", 7, "--label_smoothing", 0.2]
    options += ["--loss", ("cross_entropy", "cross_entropy_dice")[mixed], "--dropout", 0.3, "--average_weights", mixed]
    options += ["--deep_supervision", mixed]
    args = [*map(str, arguments("ab", "out", *options, "--mixed_precision", mixed))]
    parameters = inspect.signature(unet_model.UNetTrainer)
    monkeypatch.setattr(unet_model, "UNetTrainer", lambda *values: parameters.bind(*values).arguments)
    monkeypatch.setattr(unet_model, "build_unet", lambda *values, **options: (values, options))
    strategy = SimpleNamespace(num_replicas_in_sync=1)
    weights = [1.0, 2.0, 3.0]
    trainer, portable = train_unet.build_networks(train_unet.build_parser().parse_args(args), strategy, 6, weights)
    precision = "mixed_float16" if mixed else "float32"
    expected = {"dropout_key": "key", "precision": precision, "deep_supervision": bool(mixed)}
    assert trainer.pop("model")("key") == ((6, 3, 4, 0.3), expected)
    assert portable == ((6, 3, 4), {})
    assert trainer == {
        "strategy": strategy,
        "learning_rate": 2e-3,
        "loss": unet_model.Loss(3, bool(mixed), 0.2, (1.0, 2.0, 3.0)),
        "seed": 7,
        "average_weights": bool(mixed),
        "loss_scaling": bool(mixed),
        "xla": False,
    }


@pytest.mark.parametrize(
    "options, replicas, gpus, expected",
    [
        ([], 1, 1, None),
        ([], 1, 0, False),
        ([], 2, 2, False),
        (["--deterministic", 1], 1, 1, False),
        (["--xla", 0], 1, 1, False),
        (["--xla", 1], 1, 0, True),
        (["--xla", 1, "--deterministic", 1], 1, 1, True),
    ],
)
def test_the_step_of_a_single_gpu_is_compiled_where_that_works(options, replicas, gpus, expected, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["gpu"] * gpus)
    args = train_unet.build_parser().parse_args([*map(str, arguments("ab", "out", *options))])
    assert train_unet.uses_xla(args, SimpleNamespace(num_replicas_in_sync=replicas)) is expected


def test_several_gpus_are_refused_where_one_step_is_to_be_compiled():
    args = train_unet.build_parser().parse_args([*map(str, arguments("ab", "out", "--xla", 1))])
    with pytest.raises(InputError, match="expected a single GPU for --xla 1, found 4"):
        train_unet.uses_xla(args, SimpleNamespace(num_replicas_in_sync=4))


def test_processes_other_than_the_chief_write_no_checkpoint(tmp_path, monkeypatch):
    state = train_unet.RunState(train_unet.EarlyStopping(10))
    for rank, expected in ((1, []), (0, ["000001"])):
        checkpoints = make_checkpoints(tmp_path, rank)
        written = []
        recorder = SimpleNamespace(write=functools.partial(lambda record, path: record(path), written.append))
        monkeypatch.setattr(checkpoints, "_objects", recorder)
        checkpoints.save(state)
        assert [path.name for path in tmp_path.glob("checkpoint/*")] == expected and len(written) == len(expected)


def test_each_item_comes_when_the_next_is_queued_and_the_last_after_the_queue_is_closed():
    queued = []

    def queue():
        for item in range(5):
            queued.append(item)
            yield item

    items = queue()
    for item in train_unet.one_late(items):
        assert queued[-1] == min(item + 1, 3)
        if item == 2:
            items.close()
    assert item == 3 and list(train_unet.one_late(iter([]))) == []


# Errors of a GPU without TensorFlow kernels, without free memory (two kinds), and without a working DNN library.
FAILURES = [
    ("InternalError", "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image", "install a TensorFlow that supports it"),
    ("ResourceExhaustedError", "OOM when allocating tensor", "stop the programs that use its memory"),
    ("UnknownError", "CUDNN_STATUS_ALLOC_FAILED in ...", "stop the programs that use its memory"),
    ("FailedPreconditionError", "DNN library initialization failed.", "update its driver"),
]


@pytest.mark.parametrize("kind, message, advice", FAILURES)
def test_a_gpu_that_cannot_compute_is_named_with_what_to_do(kind, message, advice, monkeypatch):
    import tensorflow as tf

    def fail(*arguments):
        raise getattr(tf.errors, kind)(None, None, f"{message}\nmore")

    details = {"device_name": "NVIDIA B200", "compute_capability": (10, 0)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    cpus = tf.config.list_logical_devices("CPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: cpus)
    gpu = SimpleNamespace(name="/physical_device:GPU:3")
    for precision in ("float32", "float16"):
        train_unet.check_gpus([gpu], precision)
    monkeypatch.setattr(tf.nn, "conv2d", fail)
    expected = rf"expected /physical_device:GPU:3 \(NVIDIA B200, compute capability 10.0\) .* in float16 .*{message}"
    with pytest.raises(InputError, match=f"{expected}\\); .*{advice}"):
        train_unet.check_gpus([gpu], "float16")


@pytest.mark.parametrize("kind, message, _", FAILURES[1:3])
def test_lack_of_memory_is_reported_as_such_in_training_and_in_drawing(kind, message, _):
    import tensorflow as tf

    for context in (train_unet.training_errors(train_unet.Cluster()), train_unet.saving("the predictions")):
        with pytest.raises(train_unet.TrainingError, match="too little memory: lower --batch_size"), context:
            raise getattr(tf.errors, kind)(None, None, message)


def make_checkpoints(folder, rank=0):
    import tensorflow as tf

    model = SimpleNamespace(weights=[tf.Variable(1.0)])
    trainer = SimpleNamespace(network=model, model=model, averaged=model, optimizer=tf.Module(), step=tf.Variable(3))
    return train_unet.Checkpoints(folder, trainer, {"seed": 0}, train_unet.Cluster(rank, 2))


def test_checkpoints_are_due_after_minutes_and_the_chief_asks_for_them(tmp_path, monkeypatch):
    seconds = [1000.0]
    monkeypatch.setattr(train_unet, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    of_the_chief, of_another = (make_checkpoints(tmp_path, rank) for rank in (0, 1))
    for passed, due in ((119, False), (121, True)):
        seconds[0] = 1000.0 + passed
        assert of_the_chief.are_due(2) == due and not of_another.are_due(2)


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, disk_log):
    state = train_unet.RunState(train_unet.EarlyStopping(1), step=3)
    make_checkpoints(tmp_path).save(state)
    folder = tmp_path / "checkpoint"
    written = sorted(path.name for path in (folder / "000001").iterdir())
    assert "state.json" in written and any(name.startswith("weights") for name in written)
    ours = [(kind, path) for kind, path in disk_log if kind == "flush" or path == folder / "000001"]
    assert sorted(path.name for _, path in ours[: len(written)]) == written
    new = ours[0][1].parent
    assert ours[len(written) :] == [("flush", new), ("rename", folder / "000001"), ("flush", folder)]


def changed_weights(before, after):
    """Return the indices of the trainable weights that differ; check that moving statistics were copied as well."""
    from unet_model import build_unet, read_weights

    old, new, network = read_weights(before), read_weights(after), build_unet(1, 2, 4)
    assert len(old) == len(new) == len(network.weights)
    changed, distances = [], []
    for index, (one, other, variable) in enumerate(zip(old, new, network.weights)):
        if not variable.trainable:  # a step changes it by a tenth; in a new network it would be 0 or 1
            distances.append(np.linalg.norm(other - one) / np.linalg.norm(one))
        elif one.shape != other.shape or not np.allclose(one, other, atol=1e-6):
            changed.append(index - len(old) if index > len(old) / 2 else index)
    assert np.median(distances) < 0.5
    return changed


def start_from(model, folder, databases, *options):
    """Start from a model and take two steps that change almost nothing."""
    more = ["--initial_model", model, "--test_every_n_steps", 2, "--max_epochs", 1, "--learning_rate", 1e-10]
    return run_script("train_unet.py", *arguments(databases, folder, *more, *options))


@pytest.mark.parametrize(
    "channels, classes, new, words",
    [
        (1, 2, [], []),
        (3, 2, [0, 1], ["its first layer is new: 3 channels instead of 1"]),
        (1, 3, [-2, -1], ["its last layer is new: 3 classes instead of 2"]),
    ],
)
def test_a_run_starts_with_the_weights_of_another_one(tmp_path, run, channels, classes, new, words):
    databases = build(tmp_path, count=6, shape=(64, 64, channels), dtype="uint8")
    model, folder = run[0] / "saved_model", tmp_path / "run"
    done = start_from(model, folder, databases, "--number_classes", classes)
    assert done.returncode == 0, done.stdout
    assert changed_weights(model, folder / "saved_model") == new
    assert [word for word in words if word in done.stdout] == words and done.stdout.count("layer is new") == len(words)
    settings = json.loads((folder / "settings.json").read_text())
    fingerprint = settings["initial_model_fingerprint"]
    assert len(fingerprint) == 12 and f"fingerprint {fingerprint}" in done.stdout
    assert settings["initial_model"] == str(model)


def test_a_resumed_run_does_not_read_the_initial_model_again(tmp_path, run):
    databases, folder, model = build(tmp_path, count=6, shape=(64, 64, 1)), tmp_path / "run", tmp_path / "model"
    shutil.copytree(run[0] / "saved_model", model)
    assert start_from(model, folder, databases).returncode == 0
    fingerprint = json.loads((folder / "settings.json").read_text())["initial_model_fingerprint"]
    shutil.rmtree(model)
    done = start_from(model, folder, databases, "--max_epochs", 2)
    assert done.returncode == 0 and "starting from the network" not in done.stdout, done.stdout
    assert [row["step"] for row in read_csv(folder / "metrics.csv")] == ["2", "4"]
    assert json.loads((folder / "settings.json").read_text())["initial_model_fingerprint"] == fingerprint
    done = start_from(model, tmp_path / "another", databases)
    assert done.returncode == 2 and f"SavedModel in {model}, found no such folder" in errors_of(done.stdout)[0]


@pytest.mark.parametrize("damage", ["depth", "resumed", "weights", "foreign"])
def test_an_initial_model_that_does_not_fit_is_refused(tmp_path, run, databases, damage):
    model, folder, options = tmp_path / "model", tmp_path / "run", []
    shutil.copytree(run[0] / "saved_model", model)
    if damage == "depth":
        options, words = ["--baseline_feature_depth", 8], "expected a network with --baseline_feature_depth 8"
        words += f" in {model}, found 4"
    elif damage == "resumed":
        shutil.copytree(run[0], folder)
        words = "was started without --initial_model"
    elif damage == "weights":
        [data] = (model / "variables").glob("*.data*")
        data.write_bytes(data.read_bytes()[:1000])
        words = f"cannot read the weights in {model}"
    else:
        import tensorflow as tf

        module = tf.Module()
        module.weights = [tf.Variable(np.zeros((3, 3, 1, 4), np.float32))]
        tf.saved_model.save(module, str(model))
        words = f"expected a U-Net from train_unet.py in {model}"
    done = start_from(model, folder, databases, *options)
    [error] = errors_of(done.stdout)
    assert done.returncode == 2 and words in error, done.stdout
    assert damage == "resumed" or not any((folder / "checkpoint").iterdir())


def test_settings_name_the_version_of_the_suite(run):
    settings = json.loads((run[0] / "settings.json").read_text())
    digest = hashlib.sha256()
    for name in sorted(path.name for path in ROOT.glob("*.py")):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    assert settings["source_sha256"] == digest.hexdigest()
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert settings["git_commit"].startswith(head.stdout.strip())
