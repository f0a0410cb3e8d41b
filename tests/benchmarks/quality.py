"""Compare mask quality at equal training time, with and without each lever of the suite, and for another tool.

    python tests/benchmarks/quality.py --results cells.jsonl --image_folder data/images --mask_folder data/masks
    python tests/benchmarks/quality.py ... --variants all peer --seeds 0 1 2 \
        --peer "/path/to/its/python peer.py {folder} {seconds} {seed}"

Every fifth pair is held out and used only for the final scores. The other pairs are built into databases with the given
options of build_lmdb.py. A network is trained for the given number of seconds, including start and export, and segments
the held-out images. The variant ``all`` trains as the README advises for a CPU, ``none`` without any of `LEVERS`,
``all-NAME`` without one lever, and ``only-NAME`` with that lever alone. ``peer`` is a command that trains on the pairs
in FOLDER/tr/images and FOLDER/tr/masks. Its last line must be JSON with a list ``dice``, the Dice of each class over
all pixels of FOLDER/te. The variants take turns at each seed.

Each finished run adds a line to the results file. A run that already has a line is not repeated, so a table that takes
many hours can be interrupted and resumed. Use a separate file for each data set.
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, UNLIMITED, finish, machine, make_parser

import build_lmdb
from cli import positive_int
from image_files import read_image
from reports import mean_of_present, score_confusion

HELD_OUT_EVERY = 5  # pairs
# For each lever: the options of train_unet.py that pull it, the options that do not, and, for a lever without options,
# the assignments in the suite's files that do not.
LEVERS = {
    "features": ("--baseline_feature_depth 8", "--baseline_feature_depth 16", {}),
    "rate": ("--learning_rate 4e-3", "", {}),
    "batch": ("", "--batch_size 8", {}),
    "tests": ("--test_every_n_steps 200", "--test_every_n_steps 40", {}),
    "loss": ("", "--loss cross_entropy", {}),
    "supervision": ("", "--deep_supervision 0", {}),
    "renormalization": ("", "", {"CORRECTED_FROM, CORRECTED_FULLY": f"{2**40}, {2**41}"}),
    "averages": ("", "--average_weights 0", {}),
    "schedule": ("", "--schedule constant", {}),
    "dropout": ("", "--dropout 0.5", {}),
    "augmentation": (
        "", "", {f"self._{name}_probability": 1.0 for name in ("rotation", "jitter", "noise", "scale", "blur")},
    ),
}  # fmt: skip


def parse_arguments():
    """Return the arguments of this script, and the arguments of build_lmdb.py among them."""
    parser = make_parser(f"{__doc__.splitlines()[0]} All other options are passed to build_lmdb.py.")
    parser.add_argument("--results", type=Path, required=True, help="file of finished runs, one JSON line each")
    parser.add_argument("--number_classes", type=positive_int, default=2)
    parser.add_argument("--variants", nargs="+", default=["all", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=positive_int, default=480, help="training time, including start and export")
    parser.add_argument("--options", default="", help="further options of train_unet.py, for all variants")
    parser.add_argument("--peer", help="command of another tool, with {folder}, {seconds} and {seed}")
    args, args.build_options = parser.parse_known_args()
    for variant in args.variants:
        if variant == "peer" and not args.peer:
            parser.error("the variant peer needs a command; set --peer")
        if variant != "peer" and pulled_levers(variant) is None:
            names = ", ".join(LEVERS)
            parser.error(f"expected all, none, peer, all-NAME or only-NAME with a NAME among {names}, got {variant}")
    return args, build_lmdb.build_parser().parse_args(args.build_options)


def pulled_levers(variant):
    """Return the names of the levers that a variant pulls; None if there is no such variant."""
    kind, _, name = variant.partition("-")
    if variant in ("all", "none"):
        return list(LEVERS) if variant == "all" else []
    if name not in LEVERS or kind not in ("all", "only"):
        return None
    return [name] if kind == "only" else [lever for lever in LEVERS if lever != name]


def lay_out(pairs, folder):
    """Link the pairs into the folders tr and te; return the pairs in te."""
    held_out = []
    for index, pair in enumerate(pairs):
        side = "tr" if index % HELD_OUT_EVERY else "te"
        for kind, file in (*(("images", file) for file in pair.image.files), ("masks", pair.mask.files[0])):
            target = folder / side / kind / Path(file).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(file).resolve())
        if side == "te":
            held_out.append(pair)
    return held_out


def copy_suite(folder, assignments):
    """Copy the suite into a folder and replace the values of some assignments."""
    folder.mkdir()
    found = dict.fromkeys(assignments, 0)
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        for target, value in assignments.items():
            text, count = re.subn(rf"^( *{re.escape(target)}) = .*", rf"\1 = {value}", text, flags=re.MULTILINE)
            found[target] += count
        (folder / path.name).write_text(text)
    assert set(found.values()) <= {1}, f"expected one assignment of each kind, found {found}"


def run(command, log):
    """Run a command; if it fails, exit with the last lines of its log."""
    with open(log, "a") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=UNLIMITED).returncode
    if code:
        raise SystemExit("\n".join([f"exit code {code}:", *log.read_text(errors="replace").splitlines()[-20:]]))


def train(args, training, work, variant, seed):
    """Build databases and train a variant; return the seconds and the number of steps."""
    options, attributes, pulled = [], {}, pulled_levers(variant)
    for lever, (pulls, does_not, unpulled) in LEVERS.items():
        options += (pulls if lever in pulled else does_not).split()
        attributes |= {} if lever in pulled else unpulled
    copy_suite(work / "suite", attributes)
    # If an option is given twice, the last value counts.
    folders = ["--image_folder", training / "images", "--mask_folder", training / "masks", "--output_folder", work]
    build = [work / "suite" / "build_lmdb.py", *args.build_options, *folders, "--dataset_name", "quality"]
    run([sys.executable, *build], work / "log")
    command = [sys.executable, work / "suite" / "train_unet.py", "--number_classes", args.number_classes]
    command += ["--train_database", work / "train-quality.lmdb", "--test_database", work / "test-quality.lmdb"]
    command += ["--output_dir", work / "run", "--seed", seed, "--max_minutes", args.seconds / 60]
    start = time.monotonic()
    run([*map(str, command), *options, *shlex.split(args.options)], work / "log")
    steps = (work / "run" / "metrics.csv").read_text().splitlines()[-1].split(",")[1]
    return {"took": round(time.monotonic() - start), "steps": int(steps)}


def score(pairs, masks, build_args, classes):
    """Return the Dice of each class over all pixels of the pairs that the label map does not ignore."""
    confusion = np.zeros((classes, classes), np.int64)
    label_map = build_lmdb.label_map_of(build_args)
    for pair in pairs:
        truth = read_image(pair.mask.files[0], as_mask=True)[..., 0]
        truth = truth if label_map is None else label_map.apply(truth)
        [found] = masks.glob(f"{pair.image.stem}.*")
        counted = truth != build_lmdb.IGNORED
        cells = truth[counted].astype(int) * classes + read_image(found)[..., 0][counted]
        confusion += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    return {"dice": score_confusion(confusion)["dice"].tolist()}


def run_variant(args, build_args, variant, seed):
    """Train and score a variant in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pairs, _ = build_lmdb.find_pairs(build_args, build_lmdb.find_images(build_args)[0])
        held_out = lay_out(pairs, work / "set")
        if variant == "peer":
            command = args.peer.format(folder=work / "set", seconds=args.seconds, seed=seed)
            run(shlex.split(command), work / "log")
            return {"dice": json.loads((work / "log").read_text().splitlines()[-1])["dice"]}
        result = train(args, work / "set" / "tr", work, variant, seed)
        inference = [work / "suite" / "inference_unet.py", "--saved_model_filepath", work / "run" / "saved_model"]
        inference += ["--image_folder", work / "set" / "te" / "images", "--output_folder", work / "masks"]
        run([sys.executable, *inference, "--image_format", build_args.image_format], work / "log")
        return result | score(held_out, work / "masks", build_args, args.number_classes)


def read_results(path):
    """Return the runs in a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarize_runs(runs):
    """Return the mean and range of the mean Dice over the seeds of each variant, and its mean Dice of each class."""
    groups, lines = {}, []
    for run in runs:
        groups.setdefault((run["variant"], run["seconds"], run["options"]), []).append(run["dice"])
    for (variant, seconds, options), dice in groups.items():
        means = [mean_of_present(np.array(of_classes)) for of_classes in dice]
        line = {"variant": variant, "seconds": seconds, "options": options, "runs": len(means)}
        line |= {"mean": statistics.mean(means), "least": min(means), "greatest": max(means)}
        lines.append(line | {"dice": [mean_of_present(np.array(values)) for values in zip(*dice)]})
    return lines


def main():
    """Do the missing runs and print the table of all runs."""
    args, build_args = parse_arguments()
    for seed in args.seeds:
        for variant in args.variants:
            key = {"variant": variant, "seed": seed, "seconds": args.seconds, "options": args.options}
            if not any(key.items() <= line.items() for line in read_results(args.results)):
                line = key | {"machine": machine()} | run_variant(args, build_args, variant, seed)
                with open(args.results, "a") as file:
                    file.write(json.dumps(line) + "\n")
    lines = summarize_runs(read_results(args.results))
    if not args.json:
        for line in lines:
            print(
                f"{line['variant']:18} {line['seconds']:5} s {line['options']}  mean Dice {line['mean']:.4f} "
                f"({line['least']:.4f} to {line['greatest']:.4f}, {line['runs']} runs), per class "
                + ", ".join(f"{value:.3f}" for value in line["dice"])
            )
    finish({"lines": lines}, args.json)


if __name__ == "__main__":
    main()
