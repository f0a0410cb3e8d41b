"""Measure the images per second that readers deliver for each kind of image, with and without augmentation.

    python tests/benchmarks/reader_throughput.py --peer "/path/to/its/python peer.py"

The peer, if given, takes turns with the readers. It is called as
``COMMAND synthetic:SIZE:CHANNELS:DTYPE WORKERS BATCHES BATCH_SIZE AUGMENT``
and must end its output with its images per second, followed by ``img/s``.
Nothing else should run on the machine at the same time.
"""

import itertools
import re
import shlex
import statistics
import subprocess
import time

from common import CASES, finish, machine, make_parser, summarize, synthetic_database

import imagereader
from cli import add_flag, positive_int
from imagereader import ImageReader


def measure_reader(database, readers, augmentation, batches, batch_size):
    """Return the images per second that a consumer without other work takes from a reader."""
    options = {"use_augmentation": augmentation, "num_workers": readers, "batch_size": batch_size}
    with ImageReader(database, **options) as reader:
        stream = reader.generator()
        # The batches that were ready before the clock started are not counted.
        for _ in itertools.islice(stream, reader.get_queue_capacity() + 2 * readers):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(stream, batches):
            pass
        return batches * batch_size / (time.perf_counter() - start)


def measure_filling(database, readers, augmentation, batches, batch_size):
    """Return the images per second at which readers refill an emptied queue while nobody takes a batch.

    Each reader has `batches` slots. The queue is not refilled completely, because a reader that is ahead would stop.
    """
    imagereader.SLOTS_PER_WORKER = (batches, batches)
    options = {"use_augmentation": augmentation, "num_workers": readers, "batch_size": batch_size}
    with ImageReader(database, **options) as reader:
        stream, capacity = reader.generator(), reader.get_queue_capacity()
        wait_for_queue(reader, capacity)  # in the first round, the system has to clear memory
        for _ in itertools.islice(stream, capacity):
            pass
        wait_for_queue(reader, capacity // 4)
        start, ready = time.perf_counter(), reader.get_queue_size()
        wait_for_queue(reader, capacity * 3 // 4)
        return (reader.get_queue_size() - ready) * batch_size / (time.perf_counter() - start)


def wait_for_queue(reader, size):
    """Wait until the queue contains at least `size` batches."""
    while reader.get_queue_size() < size:
        time.sleep(0.002)


def measure_peer(command, case, readers, augmentation, batches, batch_size):
    """Return the images per second that the peer prints."""
    arguments = [f"synthetic:{case}", readers, batches, batch_size, int(augmentation)]
    done = subprocess.run([*shlex.split(command), *map(str, arguments)], capture_output=True, text=True, check=True)
    return float(re.findall(r"([\d.]+) img/s", done.stdout)[-1])


def measure_case(args, case, augmentation):
    """Measure one kind of image; reader counts and the peer take turns, so that all run under the same conditions."""
    measure = measure_filling if args.idle_consumer else measure_reader
    ours, peers = ({readers: [] for readers in args.readers} for _ in range(2))
    with synthetic_database(case) as database:
        for _, readers in itertools.product(range(args.runs), args.readers):
            work = (readers, augmentation, args.batches, args.batch_size)
            ours[readers].append(measure(database, *work))
            if args.peer:
                peers[readers].append(measure_peer(args.peer, case, *work))
    lines = []
    for readers in args.readers:
        line = {"case": case, "augmentation": augmentation, "readers": readers}
        line["images_per_second"] = summarize(ours[readers])
        line["over_first"] = statistics.median(ours[readers]) / statistics.median(ours[args.readers[0]])
        if args.peer:
            line["peer"] = summarize(peers[readers])
            line["over_peer"] = statistics.median(ours[readers]) / statistics.median(peers[readers])
        lines.append(line)
    return lines


def show(line):
    """Print one line of the table."""
    ours = line["images_per_second"]
    text = f"{line['case']:13} {'augmented' if line['augmentation'] else 'plain':10} {line['readers']} reader(s) "
    text += f"{ours['median']:7.0f} images/s ({ours['least']:.0f} to {ours['greatest']:.0f}) {line['over_first']:5.2f}x"
    if "peer" in line:
        peer = line["peer"]
        text += (
            f"   peer {peer['median']:6.0f} ({peer['least']:.0f} to {peer['greatest']:.0f}) {line['over_peer']:5.2f}x"
        )
    print(text, flush=True)


def main():
    """Measure every combination and print the table."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, help="SIZE:CHANNELS:DTYPE of the images")
    parser.add_argument("--augmentation", nargs="+", type=int, choices=(0, 1), default=(1, 0), help="1 with, 0 without")
    parser.add_argument("--readers", nargs="+", type=positive_int, default=(1, 2), help="numbers of readers")
    parser.add_argument("--batches", type=positive_int, default=100, help="number of batches in a measurement")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="images in a batch")
    parser.add_argument("--runs", type=positive_int, default=5, help="number of measurements; the median counts")
    text = "measure how fast readers refill the queue while nobody takes a batch [0 = false, 1 = true]"
    add_flag(parser, "--idle_consumer", 0, text)
    parser.add_argument("--peer", metavar="COMMAND", help="command of another loader; see the top of this file")
    args = parser.parse_args()
    lines = []
    if not args.json:
        print(machine())
    for case, augmentation in itertools.product(args.cases, args.augmentation):
        lines += measure_case(args, case, bool(augmentation))
        if not args.json:
            for line in lines[-len(args.readers) :]:
                show(line)
    finish({"lines": lines}, args.json)


if __name__ == "__main__":
    main()
