"""Break it and see: one-line changes to the code, and what each does to the toy run.

    python tests/experiments.py                    # all of them, and the table
    python tests/experiments.py sgd no_flip        # some
    python tests/experiments.py --list             # place, change, question; runs nothing

Each change is a text in a file and another text in its place, applied to a copy of the project. The
text must be there exactly once: a change whose line has changed fails by its name, and no number is
ever printed for a change that was not made.

Every run is the toy recipe with --iters iterations and one thread; the unchanged code runs beside,
with the same seeds. A run leaves its folder in --out and is not repeated: remove the folder to
measure anew, after the code has changed."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from statistics import mean, stdev
from typing import NamedTuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Experiment(NamedTuple):
    """In `file` the text `old` becomes `new`. change: what that means; question: what it asks;
    guess: what one should expect, before looking."""

    name: str
    file: str
    old: str
    new: str
    change: str
    question: str
    guess: str


UNCHANGED = Experiment("unchanged", "train.py", "", "", "**nothing**", "", "")

EXPERIMENTS = [
    # ---- what the network sees and how it is built
    Experiment(
        "no_positions",
        "model.py",
        "x = x + resize_pos_embed(",
        "x = x + 0 * resize_pos_embed(",
        "no positions",
        "Attention sees a set of patches. Does it need to be told where each one lies?",
        "Much worse: sky is up and road is down.",
    ),
    Experiment(
        "cut_positions",
        "model.py",
        "F.interpolate(patches, size=new, mode=mode, align_corners=corners)",
        "patches[:, :, : new[0], : new[1]]",
        "positions are cut, not resized",
        "Crops have 12 x 12 patches, the table 16 x 16, whole pictures 12 x 16. Why resize it?",
        "Worse: the last four columns of whole pictures have positions that nothing trained.",
    ),
    Experiment(
        "class_token_kept",
        "model.py",
        "tokens[:, self.extra :]",
        "tokens[:, : -self.extra]",
        "the class token stays, the last patch goes",
        "The classic slip by one: every patch of the maps lies one place too far right. "
        "Does training tell?",
        "Half a patch of error along each border, unless the network learns to undo it.",
    ),
    Experiment(
        "last_layer_alone",
        "model.py",
        "return maps",
        "return [maps[3]] * 4",
        "the last layer four times, not four depths",
        "Does the head need early layers, if all maps have one resolution?",
        "A little worse, at borders.",
    ),
    Experiment(
        "two_depths",
        "model.py",
        "return maps",
        "return [maps[1], maps[1], maps[3], maps[3]]",
        "two depths instead of four",
        "Would fewer depths do?",
        "Hardly any change.",
    ),
    Experiment(
        "no_pyramid",
        "upernet.py",
        "pyramid.append(conv(pooled))",
        "pyramid.append(0 * conv(pooled))",
        "no pyramid pooling",
        "Pooling was invented for networks that see a part of the picture. A ViT sees all of it "
        "in every layer. Does it still help?",
        "Hardly any change.",
    ),
    Experiment(
        "no_top_down",
        "upernet.py",
        "levels[i] + resize(",
        "levels[i] + 0 * resize(",
        "no top-down path",
        "Must the finer levels be told what the coarser ones have understood, if the fusion reads "
        "all of them side by side?",
        "Hardly any change.",
    ),
    Experiment(
        "no_auxiliary",
        "upernet.py",
        "AUX_WEIGHT = 0.4",
        "AUX_WEIGHT = 0.0",
        "no auxiliary loss",
        "Does gradient that goes past the head help a network of four layers?",
        "A little slower at the start, if anything.",
    ),
    Experiment(
        "neck",
        "train.py",
        'arch="toy_p8",',
        'arch="toy_p8", neck="mln",',
        "neck `mln` (takes several times as long)",
        "Published: one point of mIoU, at three times the operations. Here?",
        "Better, at the borders: the head draws on a grid of 2 pixels instead of 8.",
    ),
    # ---- labels and colours: what the score hides
    Experiment(
        "zero_is_a_class",
        "ade20k.py",
        "zero_ignored: bool = True",
        "zero_ignored: bool = False",
        "label 0 is a class, not ignored",
        "The classic silent error. Does the score tell?",
        "A disaster?",
    ),
    Experiment(
        "palette_shifted",
        "ade20k.py",
        ".reshape(150, 3)",
        ".reshape(150, 3)[[149, *range(149)]]",
        "the palette shifted by one",
        "Every picture that is drawn has wrong colours. Does the score tell?",
        "Not at all.",
    ),
    # ---- the optimizer
    Experiment(
        "no_warmup",
        "train.py",
        "warmup=50,",
        "warmup=0,",
        "no warmup",
        "Are Adam's first steps, of full size in every weight, as harmful as they say?",
        "Worse at first; a pretrained backbone would lose more.",
    ),
    Experiment(
        "rate_times_10",
        "train.py",
        "lr=2e-3",
        "lr=2e-2",
        "ten times the rate",
        "How far is the rate from the edge?",
        "Much worse, or it diverges.",
    ),
    Experiment(
        "sgd",
        "train.py",
        "lr=2e-3",
        'optimizer="sgd", lr=1e-2',
        "SGD with its published rate",
        "Convolutional networks are trained with SGD. Transformers?",
        "Much worse, in so few iterations.",
    ),
    Experiment(
        "two_at_a_time",
        "train.py",
        "batch_size=4,",
        "batch_size=4, micro_batch=2,",
        "BatchNorm over two pictures (over one it cannot)",
        "The gradient is still of four pictures. Is the network the same?",
        "A little worse: the statistics are noise, and another noise than in evaluation.",
    ),
    # ---- augmentation (the random draws stay, so that all else stays the same)
    Experiment(
        "no_flip",
        "ade20k.py",
        "if rng.random() < 0.5:",
        "if rng.random() < 0:",
        "no flip",
        "Are 96 pictures enough without their mirror images?",
        "A little worse, in long runs.",
    ),
    Experiment(
        "no_scaling",
        "ade20k.py",
        "ratio = rng.random() * 1.5 + 0.5",
        "ratio = rng.random() * 0 + 1",
        "no scaling",
        "Pictures are evaluated at scale 1. Why train at 0.5 to 2?",
        "Better in short runs, worse in long ones.",
    ),
    Experiment(
        "no_distortion",
        "ade20k.py",
        "image = distort(image, rng)",
        "distort(image, rng)",
        "no colour distortion",
        "Colour is half the answer in these scenes. Why spoil it?",
        "Better in short runs.",
    ),
]


# ---- making the change ---------------------------------------------------------------------------


def patched(experiment, folder=PROJECT):
    """The text of the experiment's file after the change, and the line it stands in. Ends the
    program if the old text is not there exactly once."""
    name, file, old, new = experiment[:4]
    with open(os.path.join(folder, file), encoding="utf-8") as source:
        text = source.read()

    count = text.count(old)
    if count != 1:
        sys.exit(
            f"error: {name}: {file} holds {old!r} {count} times, it must be once: "
            "the line has changed, so must the experiment in tests/experiments.py"
        )

    before = text[: text.index(old)]
    line = before.count("\n") + 1
    return text.replace(old, new), line


def copy_project(experiment, folder):
    """The six files and what draws the toy set, with the change made."""
    tests = os.path.join(folder, "tests")
    os.makedirs(tests)
    for path in glob(os.path.join(PROJECT, "*.py")):
        shutil.copy(path, folder)
    shutil.copy(os.path.join(PROJECT, "tests", "toy.py"), tests)

    if experiment.old:
        text, _ = patched(experiment)
        changed = os.path.join(folder, experiment.file)
        with open(changed, "w", encoding="utf-8") as file:
            file.write(text)


# ---- the runs ------------------------------------------------------------------------------------


def run_folder(args, experiment, seed):
    name = f"{args.iters}_{experiment.name}_{seed}"
    return os.path.abspath(os.path.join(args.out, name))


def score(args, experiment, seed):
    """The last validation's mIoU, or None: the run did not get there."""
    path = os.path.join(run_folder(args, experiment, seed), "log.jsonl")
    if not os.path.exists(path):
        return None
    with open(path) as file:
        entries = [json.loads(line) for line in file]

    validations = [entry for entry in entries if "mIoU" in entry]
    found = [entry["mIoU"] for entry in validations if entry["iteration"] == args.iters]
    return found[-1] if found else None


def train_one(args, experiment, seed):
    """One run in a copy of the project; nothing if it was done before."""
    if score(args, experiment, seed) is not None:
        return
    folder = run_folder(args, experiment, seed)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(args.out, exist_ok=True)

    with tempfile.TemporaryDirectory() as temporary:
        copy = os.path.join(temporary, "copy")
        copy_project(experiment, copy)

        command = [sys.executable, os.path.join(copy, "train.py"), "--data", "toy"]
        command += ["--iters", str(args.iters), "--interval", str(args.iters)]
        command += ["--seed", str(seed), "--dtype", "float32", "--workers", "0"]
        command += ["--work-dir", folder]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        with open(f"{folder}.txt", "w") as file:  # in PROJECT lies data/toy, drawn once for all
            done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=file, stderr=file)

    result = score(args, experiment, seed)
    words = f"code {done.returncode}, {file.name}"
    if result is not None:
        words = f"mIoU {result:.2f}"
    print(f"{experiment.name}, seed {seed}: {words}", file=sys.stderr, flush=True)


def train_all(args, chosen):
    """All runs, --jobs at a time, the seeds of one change after those of the other."""
    runs = [(experiment, seed) for experiment in chosen for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train_one(args, *run), runs))


# ---- what is printed -----------------------------------------------------------------------------


def spread(values):
    """The standard deviation of one run, estimated from a few; 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def standard_error(first, second):
    """Of the difference between the means of two groups of runs."""
    variances = [spread(values) ** 2 / len(values) for values in (first, second)]
    return math.sqrt(sum(variances))


def table(args, chosen):
    """mIoU of every change and its difference from the unchanged code."""
    print("| change | mIoU | difference |")
    print("| --- | --- | --- |")

    base = None
    for experiment in chosen:
        values = [score(args, experiment, seed) for seed in range(args.seeds)]
        values = [x for x in values if x is not None]
        label = experiment.change
        if len(values) < args.seeds:
            label += f" ({len(values)} of {args.seeds} runs reached the end)"
        if not values:
            print(f"| {label} | | |")
            continue

        base = base or values  # the unchanged code comes first
        difference = f"{mean(values) - mean(base):+.1f} ± {standard_error(values, base):.1f}"
        if experiment == UNCHANGED:
            difference = ""
        print(f"| {label} | {mean(values):.1f} ± {spread(values):.1f} | {difference} |")

    print(
        f"\n(toy recipe, {args.iters} iterations, {args.seeds} seeds; behind mIoU the standard "
        "deviation of one run, behind the difference its standard error)"
    )


def catalogue(chosen):
    """Place, change, question and guess of each, to read before looking at the table."""
    print("| name | place | becomes | question | guess |")
    print("| --- | --- | --- | --- | --- |")

    for e in chosen:
        _, line = patched(e)
        place = f"{e.file}:{line} `{e.old}`"
        print(f"| {e.name} | {place} | `{e.new}` | {e.question} | {e.guess} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [experiment.name for experiment in EXPERIMENTS]
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which ones (all): {', '.join(names)}")
    add("--list", action="store_true", help="print place, change, question and guess, run nothing")
    add("--iters", type=int, default=400, help="of each run (%(default)s; the toy recipe has 800)")
    add("--seeds", type=int, default=3, help="runs of each, seeds 0, 1, ... (%(default)s)")
    add("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    add("--out", default="runs/experiments", metavar="DIR", help="(%(default)s)")
    args = parser.parse_args()

    unknown = sorted(set(args.names) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    asked = args.names or names
    chosen = [experiment for experiment in EXPERIMENTS if experiment.name in asked]
    for experiment in chosen:
        patched(experiment)  # all of them, before the first run

    if args.list:
        return catalogue(chosen)

    chosen = [UNCHANGED, *chosen]
    train_all(args, chosen)
    table(args, chosen)


if __name__ == "__main__":
    main()
