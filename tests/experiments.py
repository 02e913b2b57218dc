"""Break it and see: small changes to the code, and what each does to the toy run.

    python tests/experiments.py                    # all of them, and the table
    python tests/experiments.py sgd no_flip        # some
    python tests/experiments.py --list             # place, change, question; runs nothing

A change is one text or a few, each with another text in its place, applied to a copy of the project.
A text must be in its file exactly once. A change whose line has changed fails by its name, and no
number is ever printed for a change that was not made.

Every run is the toy recipe with --iters iterations and one thread. The unchanged code runs too, with
the same seeds. A run leaves its folder in --out and is not repeated: remove the folder to measure
again, after the code has changed."""

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


class Edit(NamedTuple):
    """In `file` the text `old`, which stands there once, becomes `new`."""

    file: str
    old: str
    new: str


class Experiment(NamedTuple):
    """change: what the edits mean; question: what they ask; guess: what one should expect, before
    looking."""

    name: str
    edits: list[Edit]
    change: str
    question: str
    guess: str


# Edits that several experiments make.
NO_POSITIONS = Edit(
    "model.py",
    "x = x + resize_pos_embed(",
    "x = x + 0 * resize_pos_embed(",
)
NO_ATTENTION = Edit(
    "model.py",
    "branch = self.ls1(self.attn(",
    "branch = 0 * self.ls1(self.attn(",
)
GREY = Edit(
    "model.py",
    "return self.proj(images)",
    "return self.proj(images.mean(1, keepdim=True).expand_as(images))",
)
NO_PYRAMID = Edit(
    "upernet.py",
    "pyramid.append(conv(pooled))",
    "pyramid.append(0 * conv(pooled))",
)
NO_TOP_DOWN = Edit(
    "upernet.py",
    "levels[i] + resize(levels[i + 1], size)",
    "levels[i] + 0 * resize(levels[i + 1], size)",
)
NO_SCALING = Edit(
    "ade20k.py",
    "ratio = rng.random() * 1.5 + 0.5",
    "ratio = rng.random() * 0 + 1",
)
# The convolutions of the heads see the picture mirrored beyond its border, not zeros. (The fast
# form of the one over several maps knows only zeros, so its plain form takes its place.)
REFLECT = [
    Edit("upernet.py", "bias=False)", 'padding_mode="reflect", bias=False)'),
    Edit(
        "upernet.py",
        "x = conv3x3_of_resized(x, self.conv.weight)",
        "x = self.conv(torch.cat([resize(m, x[0].shape[2:]) for m in x], 1))",
    ),
]
# The head gets the maps with their places shuffled, in each step another way, and its logits are
# put back in order: what lies side by side in the picture does not in the head.
SHUFFLE = [
    Edit(
        "upernet.py",
        "top = maps[-1]  # (B, D, h_4, w_4)",
        "order = torch.randperm(maps[0][0, 0].numel()).to(maps[0].device); "
        "maps = [m.flatten(2)[:, :, order].view(m.shape) for m in maps]; top = maps[-1]",
    ),
    Edit(
        "upernet.py",
        "return self.classifier(x)  # (B, C, h_1, w_1)",
        "x = self.classifier(x); return x.flatten(2)[:, :, order.argsort()].view(x.shape)",
    ),
]

UNCHANGED = Experiment("unchanged", [], "**nothing**", "", "")

EXPERIMENTS = [
    # ---- place: who knows where a patch lies?
    Experiment(
        "no_positions",
        [NO_POSITIONS],
        "no positions",
        "Attention sees a set of patches. Does it need to be told where each one lies?",
        "Much worse: sky is up and road is down.",
    ),
    Experiment(
        "reflect",
        REFLECT,
        "the head's convolutions pad with reflections, not zeros",
        "Zeros beyond the border tell a convolution where the border is. Does it use that?",
        "Not as long as there are positions.",
    ),
    Experiment(
        "no_positions_reflect",
        [NO_POSITIONS, *REFLECT],
        "no positions, and reflections",
        "With both gone, does anything still tell up from down?",
        "Worse than each of them.",
    ),
    Experiment(
        "shuffle",
        SHUFFLE,
        "the head sees shuffled patches",
        "Attention knows the positions. Must the head's convolutions see neighbours as neighbours?",
        "A little worse, at borders: attention has mixed everything before.",
    ),
    Experiment(
        "no_positions_shuffle",
        [NO_POSITIONS, *SHUFFLE],
        "no positions, and the head sees shuffled patches",
        "Now the picture is a bag of patches, for all layers. What is left?",
        "What colour and texture of a patch say, and which others there are.",
    ),
    Experiment(
        "no_scaling",
        [NO_SCALING],
        "no scaling",
        "Pictures are evaluated at scale 1. Why train at 0.5 to 2?",
        "Better in short runs, worse in long ones.",
    ),
    Experiment(
        "no_positions_no_scaling",
        [NO_POSITIONS, NO_SCALING],
        "no positions, and no scaling",
        "Scaled crops show any part of a scene. Unscaled ones are as high as the picture: in them a "
        "row of the table means a height. Do positions pay now? (Compare with no scaling.)",
        "Yes.",
    ),
    # ---- colour
    Experiment(
        "grey",
        [GREY],
        "grey pictures",
        "How much of the answer is colour?",
        "A lot: grass and road differ in little else.",
    ),
    Experiment(
        "no_positions_grey",
        [NO_POSITIONS, GREY],
        "no positions, and grey pictures",
        "Perhaps colour gives the place away. Are positions missed without it? (Compare with grey.)",
        "Yes: grey sky and grey sea differ by place.",
    ),
    # ---- context: who tells a patch what scene it is in?
    Experiment(
        "no_attention",
        [NO_ATTENTION],
        "no attention",
        "Every patch goes through the backbone by itself. Do the head's convolutions and its pyramid "
        "stand in for attention?",
        "Much worse.",
    ),
    Experiment(
        "no_pyramid",
        [NO_PYRAMID],
        "no pyramid pooling",
        "Pooling was invented for networks that see a part of the picture. A ViT sees all of it "
        "in every layer. Does it still help?",
        "Hardly any change.",
    ),
    Experiment(
        "no_attention_no_pyramid",
        [NO_ATTENTION, NO_PYRAMID],
        "no attention, and no pyramid pooling",
        "Only convolutions are left, which see a few patches. Is the whole picture needed?",
        "Worse than each of them.",
    ),
    Experiment(
        "no_top_down",
        [NO_TOP_DOWN],
        "no top-down path",
        "Must the finer levels be told what the coarser ones have understood, if the fusion reads "
        "all of them side by side?",
        "Hardly any change.",
    ),
    Experiment(
        "no_pyramid_no_top_down",
        [NO_PYRAMID, NO_TOP_DOWN],
        "no pyramid pooling, and no top-down path",
        "Does one stand in for the other?",
        "Hardly any change.",
    ),
    # ---- depth, size, gradient
    Experiment(
        "last_layer_only",
        [Edit("model.py", "return maps", "return [maps[3]] * 4")],
        "the last layer four times, not four depths",
        "Does the head need early layers, if all maps have one resolution?",
        "A little worse, at borders.",
    ),
    Experiment(
        "neck",
        [Edit("train.py", 'arch="toy_p8",', 'arch="toy_p8", neck="mln",')],
        "neck `mln` (takes several times as long)",
        "Published for DeiT-S: one point of mIoU. Here?",
        "Better, at the borders: the head draws on a grid of 2 pixels instead of 8.",
    ),
    Experiment(
        "no_auxiliary",
        [Edit("upernet.py", "AUX_WEIGHT = 0.4", "AUX_WEIGHT = 0.0")],
        "no auxiliary loss",
        "Does gradient that goes past the head help a network of four layers?",
        "A little slower at the start, if anything.",
    ),
    # ---- errors that train without a word
    Experiment(
        "class_token_kept",
        [Edit("model.py", "[:, self.extra :]", "[:, : -self.extra]")],
        "the class token stays, the last patch goes",
        "The classic slip by one: every patch of the maps lies one place too far right. "
        "Does training tell?",
        "Half a patch of error along each border, unless the network learns to undo it.",
    ),
    Experiment(
        "unlabelled_is_a_class",
        [Edit("ade20k.py", "table[[0, IGNORE_INDEX]] = IGNORE_INDEX", "table[[0, IGNORE_INDEX]] = 0")],
        "unlabelled pixels count as the first class",
        "The classic silent error: balloons become buildings, in training and in the score. "
        "Does the score tell?",
        "Hardly: both agree.",
    ),
    # ---- the optimizer
    Experiment(
        "no_warmup",
        [Edit("train.py", "warmup=50,", "warmup=0,")],
        "no warmup",
        "Are Adam's first steps, of full size in every weight, as harmful as they say?",
        "Worse at first; a pretrained backbone would lose more.",
    ),
    Experiment(
        "rate_times_10",
        [Edit("train.py", "lr=2e-3", "lr=2e-2")],
        "ten times the rate",
        "How far is the rate from the edge?",
        "Much worse, or it diverges.",
    ),
    Experiment(
        "sgd",
        [Edit("train.py", "lr=2e-3", 'optimizer="sgd", lr=1e-2')],
        "SGD with its published rate",
        "Convolutional networks are trained with SGD. Transformers?",
        "Much worse, in so few iterations.",
    ),
    Experiment(
        "two_at_a_time",
        [Edit("train.py", "batch_size=4,", "batch_size=4, micro_batch=2,")],
        "BatchNorm over two pictures (over one it cannot)",
        "The gradient is still of four pictures. Is the network the same?",
        "A little worse: the statistics are noise, and another noise than in evaluation.",
    ),
    # ---- augmentation (the random draws stay, so that everything else stays the same)
    Experiment(
        "no_flip",
        [Edit("ade20k.py", "if rng.random() < 0.5:", "if rng.random() < 0:")],
        "no flip",
        "Are 96 pictures enough without their mirror images? (The sea lies on the left in all.)",
        "Better: no validation picture is mirrored.",
    ),
    Experiment(
        "no_distortion",
        [Edit("ade20k.py", "image = distort(image, rng)", "distort(image, rng)")],
        "no colour distortion",
        "Colour is a good part of the answer in these scenes. Why spoil it?",
        "Better in short runs.",
    ),
]


# ---- making the change ---------------------------------------------------------------------------


def read(file, folder=PROJECT):
    with open(os.path.join(folder, file), encoding="utf-8") as source:
        return source.read()


def patched(experiment, folder=PROJECT):
    """{file: its text after the change}. Ends the program if an old text is not there exactly
    once."""
    texts = {}
    for file, old, new in experiment.edits:
        text = texts.get(file) or read(file, folder)
        count = text.count(old)
        if count != 1:
            sys.exit(
                f"error: {experiment.name}: {file} holds {old!r} {count} times, it must be once: "
                "the line has changed, so must the experiment in tests/experiments.py"
            )
        texts[file] = text.replace(old, new)
    return texts


def copy_project(experiment, folder):
    """The six files, with the change made."""
    os.makedirs(folder)
    for path in glob(os.path.join(PROJECT, "*.py")):
        shutil.copy(path, folder)

    for file, text in patched(experiment).items():
        with open(os.path.join(folder, file), "w", encoding="utf-8") as changed:
            changed.write(text)


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
        with open(f"{folder}.txt", "w") as file:
            done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=file, stderr=file)

    result = score(args, experiment, seed)
    words = f"code {done.returncode}, {file.name}"
    if result is not None:
        words = f"mIoU {result:.2f}"
    print(f"{experiment.name}, seed {seed}: {words}", file=sys.stderr, flush=True)


def train_all(args, chosen):
    """All runs, --jobs at a time, the seeds of one change after those of the other. The data set is
    drawn before the first, in PROJECT, for all of them."""
    command = [sys.executable, os.path.join(PROJECT, "ade20k.py"), "toy", "data/toy"]
    subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL, check=True)

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
    """Places, question and guess of each, to read before looking at the table."""
    print("| name | places, and what they become | question | guess |")
    print("| --- | --- | --- | --- |")

    for experiment in chosen:
        places = []
        for file, old, new in experiment.edits:
            before, _, _ = read(file).partition(old)
            line = before.count("\n") + 1
            places.append(f"{file}:{line} `{old}` -> `{new}`")
        cells = [experiment.name, "; ".join(places), experiment.question, experiment.guess]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [experiment.name for experiment in EXPERIMENTS]
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which ones (all): {', '.join(names)}")
    add("--list", action="store_true", help="print places, question and guess of each, run nothing")
    add("--iters", type=int, default=400, help="of each run (%(default)s; the toy recipe has 800)")
    add("--seeds", type=int, default=5, help="runs of each, seeds 0, 1, ... (%(default)s)")
    add("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    add("--out", default="runs/experiments", metavar="DIR", help="(%(default)s)")
    args = parser.parse_args()

    unknown = sorted(set(args.names) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    asked = args.names or names
    chosen = [EXPERIMENTS[names.index(name)] for name in asked]
    for experiment in chosen:
        patched(experiment)  # all of them, before the first run

    if args.list:
        return catalogue(chosen)

    chosen = [UNCHANGED, *chosen]
    train_all(args, chosen)
    table(args, chosen)


if __name__ == "__main__":
    main()
