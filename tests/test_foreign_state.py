"""Check files that somebody has changed since the suite wrote them, damaged databases, and foreign settings."""

import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys

import lmdb
import numpy as np
import pytest
from conftest import ROOT, WITHOUT_GPU, build, errors_of, make_pair, run_script, write_tiff
from test_inference_unet import save_random_model
from test_train_unet import arguments, read_csv

import cli
import imagereader
import inference_unet
import lmdb_utils
import reports
import train_unet
from lmdb_utils import METADATA_KEY, Database, record_key

DEEP = "[" * 10**5
# Contents of a JSON file that are not an object, and not always text.
NO_OBJECTS = ["", "[1]", '{"a', "5", DEEP, "\xff", "null"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_tiff(folder / "cell.tif", make_pair(0)[0])
    return folder


# ---------------------------------------------------------------------------------------------- databases


def rewrite(source, target, change_header=lambda header: None, change_arrays=lambda arrays: None, raw=None):
    """Copy a database with changed metadata."""
    with Database(source) as database:
        records = [bytes(database._transaction.get(record_key(index))) for index in range(len(database))]
        arrays = lmdb_utils.read_archive(bytes(database._transaction.get(METADATA_KEY)))
    header = json.loads(arrays["header"].tobytes())
    change_header(header)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    change_arrays(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with lmdb.open(os.fspath(target), subdir=False, lock=False, map_size=2**26) as environment:
        with environment.begin(write=True) as transaction:
            for index, record in enumerate(records):
                transaction.put(record_key(index), record)
            transaction.put(METADATA_KEY, buffer.getvalue() if raw is None else raw)


HEADERS = {
    "count": [None, -1, 10**30, "5", 1.5, 3],
    "image_shape": [[64, 64], [64, 64, 0], None, [64, "64", 1], 64],
    "image_dtype": ["float64", 5, None, ["uint8"]],
    "mask_dtype": ["uint64", None],
    "deviation_floor": [[], [0.0], ["1"], [float("nan")], 1.0, [10**400]],
    "ignored_id": ["255", -1],
    "ignored_pixels": [None, -5],
    "value_range": [[], [[1]], [["a", "b"]], 5, [[0, 10**400]]],
    "missing_shares": [[], ["x"], [10**400]],
    "channels": [5, ["0"], [-1]],
    "label_map": [5],
    "image_no_data": ["x", 10**400],
    "side": [None],
    "tile_size": ["64", 0],
}
ARRAYS = {
    "classes": [np.array(["a", "b"]), np.array([1, 0]), np.zeros(0, np.int64), np.zeros((1, 2), np.int64)],
    "pixel_counts": [np.array([1]), np.array([-1, 5]), np.array([1.5, 2.5])],
    "record_offsets": [np.array([0]), np.array([0, 99, 5]), np.array([5, 1, 2])],
    "class_records": [np.array([99] * 10, np.int32), np.zeros(0, np.int32)],
    "record_image": [np.full(16, 99, np.int32), np.zeros(3, np.int32)],
    "header": [np.frombuffer(b"[1]", np.uint8), np.frombuffer(DEEP.encode(), np.uint8), np.zeros(0, np.uint8)],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in HEADERS.items() for value in values])
def test_metadata_of_another_kind_is_refused_by_name(databases, tmp_path, name, value):
    target = tmp_path / "changed.lmdb"
    rewrite(databases[0], target, lambda header: header.update({name: value}))
    with pytest.raises(cli.InputError, match="changed.lmdb"):
        Database(target)


def test_a_database_with_little_about_its_origin_is_still_described(databases, tmp_path):
    needed = ("format", "version", "count", "image_shape", "image_dtype", "mask_dtype", "deviation_floor", "ignored_id")
    needed += ("ignored_pixels",)
    changed = tmp_path / "changed.lmdb"
    rewrite(databases[0], changed, lambda header: [header.pop(name) for name in set(header) - set(needed)])
    done = run_script("build_lmdb.py", "--describe", changed)
    assert done.returncode == 0 and "class 1: " in done.stdout, done.stdout


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ARRAYS.items() for value in values])
def test_arrays_that_do_not_fit_are_refused_by_name(databases, tmp_path, name, value):
    target = tmp_path / "changed.lmdb"
    rewrite(databases[0], target, change_arrays=lambda arrays: arrays.update({name: value}))
    with pytest.raises(cli.InputError, match="changed.lmdb"):
        Database(target)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def compressed(size):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.zeros(size, np.uint8))
    return buffer.getvalue()


def with_other_flags(position, value):
    """Return an archive of arrays with one byte changed in the first entry of its central directory."""
    buffer = io.BytesIO()
    np.savez(buffer, header=np.zeros(9, np.uint8))
    content = bytearray(buffer.getvalue())
    content[content.index(b"PK\1\2") + position] |= value
    return bytes(content)


ARCHIVES = {"none": b"", "text": b"PK", "npy": npy(np.arange(3)), "bomb": compressed(2**28)}
ARCHIVES |= {
    "encryption": with_other_flags(8, 0x40),
    "patch": with_other_flags(8, 0x20),
    "new": with_other_flags(6, 255),
}


@pytest.mark.parametrize("raw", ARCHIVES.values(), ids=ARCHIVES)
def test_metadata_that_is_no_archive_is_refused_by_name(databases, tmp_path, raw):
    rewrite(databases[0], tmp_path / "changed.lmdb", raw=raw)
    with pytest.raises(cli.InputError, match="changed.lmdb"):
        Database(tmp_path / "changed.lmdb")


def test_a_pipe_is_not_a_database(tmp_path):
    os.mkfifo(tmp_path / "pipe.lmdb")
    done = run_script("build_lmdb.py", "--describe", tmp_path / "pipe.lmdb", timeout=20)
    assert done.returncode == 2 and "is not a regular file" in done.stdout, done.stdout


def mutations(content, count, seed=0):
    """Yield copies of a file with bytes changed, zeroed or cut off, more often in its tables than in its pixels."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            page = int(rng.integers(len(content) // 4096)) * 4096
            at = page + int(rng.integers(64 if number % 2 else 4096))
            kind = rng.integers(4)
            if kind == 0:
                changed[at : at + 8] = rng.bytes(8)
            elif kind == 1:
                changed[page : page + 4096] = bytes(4096)
            elif kind == 2:
                changed[at] ^= 1 << int(rng.integers(8))
            else:
                changed[page : page + 32] = rng.bytes(32)
        yield changed[: rng.integers(len(changed))] if number % 20 == 0 else changed


def test_a_damaged_database_is_read_or_refused_in_one_line(tmp_path):
    train, _ = build(tmp_path, count=6)
    damaged, refused = tmp_path / "damaged.lmdb", 0
    for number, changed in enumerate(mutations(train.read_bytes(), 60)):
        damaged.write_bytes(changed)
        done = run_script("build_lmdb.py", "--describe", damaged, timeout=20)
        assert done.returncode in (0, 2) and "Traceback" not in done.stdout, (number, done.stdout)
        errors = errors_of(done.stdout)
        assert len(errors) == (done.returncode == 2), (number, done.stdout)
        refused += done.returncode == 2
    assert 10 < refused < 60


def test_a_reader_survives_a_damaged_database(tmp_path):
    train, _ = build(tmp_path, count=6)
    damaged, refused = tmp_path / "damaged.lmdb", 0
    for changed in mutations(train.read_bytes(), 25, seed=1):
        damaged.write_bytes(changed)
        try:
            Database.probe(damaged)
            with imagereader.ImageReader(damaged, batch_size=2) as reader:
                for batch, _ in zip(reader.generator(), range(4)):
                    assert np.isfinite(batch.images).all() and batch.masks.max() < 2
        except cli.InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 3 < refused < 25


def test_a_database_that_is_cut_short_while_it_is_read_is_named(tmp_path):
    train, _ = build(tmp_path, count=20, shape=(256, 256, 1))
    with pytest.raises(cli.InputError, match="cut short or overwritten"):
        with imagereader.ImageReader(train, batch_size=1, shuffle=False) as reader:
            batches = reader.generator()
            next(batches)
            os.truncate(train, 16384)
            for _ in range(40):
                next(batches)


def test_a_damaged_record_ends_training_as_bad_input(databases, tmp_path):
    damaged = tmp_path / "damaged.lmdb"
    damaged.write_bytes(databases[0].read_bytes().replace(b"SSEG", b"SSEX"))
    done = run_script("train_unet.py", *arguments((damaged, databases[1]), tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert len(errors_of(done.stdout)) == 1, done.stdout


# ---------------------------------------------------------------------------------------------- models and runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved_model"
    save_random_model(folder, 1, 2)
    return folder


def objects(name, *values):
    return [f'{{"{name}": {value}}}' for value in values]


CHANGED_MODELS = [
    *NO_OBJECTS,
    *objects("radius", '"x"', -96, 0, 10**9, "null"),
    *objects("size_factor", 0, -16, 17, '"x"'),
    *objects("source_channels", 5, '["0"]', "[0,1]", "[-1]"),
    *objects("deviation_floor", "[]", "[0]", '["x"]', "[1,1]", "NaN", f"[{10**400}]"),
    *objects("value_range", "[]", "[[1]]", 5, f"[[0, {10**400}]]"),
    *objects("baseline_feature_depth", '"x"'),
    *objects("image_dtype", 5),
    *objects("image_no_data", "[]"),
]


@pytest.mark.parametrize("text", CHANGED_MODELS, ids=range(len(CHANGED_MODELS)))
def test_changed_metadata_of_a_model_is_refused_by_name(model, tmp_path, text):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet_metadata.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(cli.InputError) as error:
        inference_unet.load_model(tmp_path / "model")
    assert f"{tmp_path}/model/unet_metadata.json" in str(error.value) and "\n" not in str(error.value)


def test_a_no_data_value_of_a_model_may_be_a_whole_number(model, image_folder, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet_metadata.json").write_text('{"image_no_data": 0}')
    done = run_script("inference_unet.py", "--saved_model_filepath", tmp_path / "model", "--image_folder", image_folder,
                      "--output_folder", tmp_path / "masks")  # fmt: skip
    assert done.returncode == 0 and "1 of 1 images done" in done.stdout, done.stdout


def test_metadata_of_a_model_that_are_a_link_to_themselves_are_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.json"))
    (tmp_path / "model" / "unet_metadata.json").symlink_to("unet_metadata.json")
    with pytest.raises(cli.InputError, match=f"{tmp_path}/model/unet_metadata.json"):
        inference_unet.load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["variables/variables.index", "fingerprint.pb"])
def test_a_pipe_in_place_of_a_part_of_a_model_is_refused(model, tmp_path, name):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    os.mkfifo(tmp_path / "model" / name)
    with pytest.raises(cli.InputError, match=f"expected a regular file at {tmp_path}/model/{name}"):
        inference_unet.load_model(tmp_path / "model")


def test_a_model_cut_short_is_named_by_its_own_path(model, tmp_path):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("variables"))
    with pytest.raises(cli.InputError) as error:
        inference_unet.load_model(tmp_path / "model")
    assert "/proc/" not in str(error.value) and str(tmp_path / "model") in str(error.value)


def test_a_model_that_cannot_be_used_ends_inference_in_one_line(model, image_folder, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet_metadata.json").write_text('{"radius": -96}')
    done = run_script("inference_unet.py", "--saved_model_filepath", tmp_path / "model", "--image_folder", image_folder,
                      "--output_folder", tmp_path / "masks")  # fmt: skip
    errors = errors_of(done.stdout)
    assert done.returncode == 2 and "Traceback" not in done.stdout and len(errors) == 1, done.stdout


def test_a_pipe_in_place_of_metadata_does_not_wait(model, image_folder, tmp_path):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.json"))
    os.mkfifo(tmp_path / "model" / "unet_metadata.json")
    done = run_script("inference_unet.py", "--saved_model_filepath", tmp_path / "model", "--image_folder", image_folder,
                      "--output_folder", tmp_path / "masks", timeout=60)  # fmt: skip
    assert done.returncode == 2 and "was not written by this suite" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def finished(databases, tmp_path_factory):
    """Return the output folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    done = run_script("train_unet.py", *arguments(databases, folder, *ONE_EPOCH))
    assert done.returncode == 0, done.stdout
    return folder


ONE_EPOCH = ["--test_every_n_steps", 3, "--max_epochs", 1]
TWO_EPOCHS = ["--test_every_n_steps", 3, "--max_epochs", 2]


def resume(finished, databases, tmp_path, change):
    """Resume a run after a change to its folder; return the finished process."""
    shutil.copytree(finished, tmp_path / "out")
    change(tmp_path / "out")
    done = run_script("train_unet.py", *arguments(databases, tmp_path / "out", *TWO_EPOCHS), timeout=120)
    assert "Traceback" not in done.stdout, done.stdout
    return done


STATE = dataclasses.asdict(train_unet.RunState(train_unet.EarlyStopping(1)))
STATES = [*NO_OBJECTS, "{}", '{"step": "x"}', '{"settings": 5}']
STATES += [json.dumps({**STATE, name: 10**400}) for name in ("step", "epoch_loss", "planned_minutes")]
STATES += [json.dumps({**STATE, "step": 2**62})]
STATES += [json.dumps({**STATE, "seconds": seconds}) for seconds in (-1e308, -1, 1e308, math.inf, math.nan)]
STATES += [json.dumps({**STATE, "stopping": {**STATE["stopping"], "_reference_loss": 10**400}})]


@pytest.mark.parametrize("text", STATES, ids=range(len(STATES)))
def test_a_state_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(cli.InputError, match=r"state\.json"):
        train_unet.RunState.read(tmp_path / "state.json")


@pytest.mark.parametrize("text", [DEEP, '{"settings": 5}'], ids=("deep", "settings"))
def test_a_run_whose_state_is_none_is_refused(finished, databases, tmp_path, text):
    done = resume(
        finished, databases, tmp_path,
        lambda folder: (folder / "checkpoint" / "000001" / "state.json").write_text(text),
    )  # fmt: skip
    assert done.returncode == 2 and "no checkpoint in" in done.stdout, done.stdout


METRICS = ["", "x", "epoch,step\n1,x\n", "epoch\n" + "9" * 5000 + "\n", "epoch,step\n1\n", "\0\n1,\0\n"]
COLUMNS = "epoch,step,learning_rate,train_loss,test_loss,accuracy,mean_iou,iou_0,iou_1,dice_0,dice_1\n"
METRICS += [f"{COLUMNS}1,3,1,1,1.7e308,1,1,1,1,1,1\n", f"{COLUMNS}1,3,1,1,-inf,1,1,1,1,1,1\n"]
METRICS += [f"{COLUMNS}1,3,1,1,{'x' * 10**5},1,1,1,1,1,1\n"]
METRICS += [f"{COLUMNS}1,3,1,1,1,1,1,x,1,1,1\n", f"{COLUMNS}1,{'9' * 400},1,1,1,1,1,1,1,1,1\n"]


@pytest.mark.parametrize("text", METRICS, ids=range(len(METRICS)))
def test_changed_metrics_are_started_over_or_refused(databases, tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    try:
        reports.Report(tmp_path, databases[1], np.ones(1), 2, epoch=1, step=3)
    except cli.InputError as error:
        assert "metrics.csv is not what training wrote" in str(error) and len(str(error)) < 500
        assert (tmp_path / "metrics.csv").exists()
    else:
        assert read_csv(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize(
    "name", ["train.log", "metrics.csv", "tensorboard-train/events.*", "checkpoint/000001/weights.index"]
)
def test_a_pipe_in_place_of_any_file_of_a_run_is_refused(finished, databases, tmp_path, name):
    def change(folder):
        [path] = folder.glob(name)
        path.unlink()
        os.mkfifo(path)

    done = resume(finished, databases, tmp_path, change)
    assert done.returncode == 2 and "expected a regular file" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["settings.json", "test_loss.csv", "curves.png", "tensorboard-test"])
def test_a_folder_in_place_of_a_file_of_a_run_and_the_reverse_are_named(finished, databases, tmp_path, name):
    def change(folder):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
            path.touch()
        else:
            path.unlink()
            path.mkdir()

    done = resume(finished, databases, tmp_path, change)
    assert done.returncode == 2 and f"out/{name}, found something else; move it away" in done.stdout, done.stdout


def test_a_copy_of_a_checkpoint_disturbs_nothing(finished, databases, tmp_path):
    def copy(folder):
        for name in ("000001 (copy)", "5-backup", "999999999999999999999999"):
            shutil.copytree(folder / "checkpoint" / "000001", folder / "checkpoint" / name)

    done = resume(finished, databases, tmp_path, copy)
    assert done.returncode == 0 and "at step 3, after 1 test epochs" in done.stdout
    kept = {"000001", "000002", "000001 (copy)", "5-backup", "999999999999999999999999"}
    assert set(os.listdir(tmp_path / "out" / "checkpoint")) == kept


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(finished, databases, tmp_path):
    """Its first row of metrics may exist. More rows or no checkpoint folder mean that somebody removed checkpoints."""

    def remove(folder):
        shutil.rmtree(folder / "checkpoint" / "000001")

    done = resume(finished, databases, tmp_path, remove)
    assert done.returncode == 0, done.stdout
    assert [row["epoch"] for row in read_csv(tmp_path / "out" / "metrics.csv")] == ["1", "2"]
    shutil.rmtree(tmp_path / "out" / "checkpoint")
    (tmp_path / "out" / "checkpoint").mkdir()
    again = run_script("train_unet.py", *arguments(databases, tmp_path / "out", *TWO_EPOCHS))
    assert again.returncode == 2 and "contains results but no checkpoint" in again.stdout, again.stdout


@pytest.mark.parametrize("ending", ["cut", "another"])
def test_curves_of_tensorboard_have_no_steps_that_are_taken_again(tmp_path, ending):
    import tensorflow as tf

    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        for step in (3, 6, 9):
            tf.summary.scalar("loss", 1.0, step)
    writer.close()
    [file] = tmp_path.iterdir()
    with tf.io.TFRecordWriter(str(tmp_path / "other")) as other:
        other.write(b"no event")
    with open(file, "ab") as end:
        end.write((tmp_path / "other").read_bytes() if ending == "another" else b"cut short")
    (tmp_path / "other").unlink()
    reports.drop_later_events(file, 6)
    events = list(tf.compat.v1.train.summary_iterator(str(file)))
    assert [event.step for event in events if event.summary.value] == [3, 6]


def test_a_picture_of_many_classes_shows_those_that_are_confused():
    confusion = np.diag(np.full(64, 1000))
    confusion[40, 50] = 500
    axes = reports.draw_confusion(confusion).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert len(names) == reports.CONFUSION_CLASSES and {"40", "50"} < set(names)
    assert len(axes.texts) == reports.CONFUSION_CLASSES**2


# ---------------------------------------------------------------------------------------------- other projects


def keras_json(folder, **values):
    folder.mkdir()
    usual = {"floatx": "float32", "epsilon": 1e-07, "backend": "tensorflow", "image_data_format": "channels_last"}
    (folder / "keras.json").write_text(json.dumps({**usual, **values}))
    return {"KERAS_HOME": str(folder)}


@pytest.mark.parametrize(
    "setting",
    [{"image_data_format": "channels_first"}, {"floatx": "float16"}, {"backend": "theano"}, {"floatx": 5}, "jax", "tf"],
    ids=str,
)
def test_what_other_projects_set_for_keras_does_not_matter(databases, tmp_path, setting):
    variables = {"jax": {"KERAS_BACKEND": "jax"}, "tf": {"TF_USE_LEGACY_KERAS": "1"}}
    environment = keras_json(tmp_path / "keras", **setting) if isinstance(setting, dict) else variables[setting]
    command = [sys.executable, ROOT / "train_unet.py", *arguments(databases, tmp_path / "out", *ONE_EPOCH)]
    done = subprocess.run(
        [*map(str, command)], env={**WITHOUT_GPU, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["number_classes"] == 2


def test_inference_loads_no_keras(model, image_folder, tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference_unet\n"
    script += "assert inference_unet.main(sys.argv[1:]) == 0\n"
    script += "print('keras' in sys.modules, 'unet_model' in sys.modules)"
    command = [sys.executable, "-c", script, "--saved_model_filepath", model, "--image_folder", image_folder,
               "--output_folder", tmp_path / "masks"]  # fmt: skip
    done = subprocess.run([*map(str, command)], env=WITHOUT_GPU, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith("False"), done.stdout
