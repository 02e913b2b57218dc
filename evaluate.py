"""Evaluation: one label per pixel for whole pictures, at one scale or several, flipped or not; the
metric; the pictures.

    picture --resize to (2048, 512) x scale--> model --> logits --bilinear--> the picture's own size
            --softmax--> mean over scales and flips --argmax--> label
            --> confusion matrix (C, C) --> IoU per class --> mIoU

The metric is that of FCN (Long et al. 2015, arXiv:1411.4038, section 5): intersection over union,
of one confusion matrix for the whole data set, not a mean over pictures. A class that is neither
there nor predicted has no IoU (0 / 0) and is left out of the mean. The protocol is the reference's:
two bilinear steps (to the resized picture, then to its own size), the mean of the softmax outputs
rather than of the logits.

First inference, the metric and the pictures, then the program; number formats, devices and
processes come last."""

import atexit
import ctypes
import json
import math
import os
import signal
import sys
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from glob import glob
from multiprocessing import active_children, get_start_method, parent_process
from os.path import (
    basename,
    dirname,
    exists,
    isdir,
    isfile,
    islink,
    join,
    normcase,
    realpath,
    splitext,
)
from time import monotonic

import numpy as np
import torch
import torch.distributed as dist
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ade20k import (
    DEFAULT_ROOT,
    Classes,
    DataError,
    UserError,
    data_root,
    errors_in_one_sentence,
    find_pairs,
    from_tests,
    load,
    normalise,
    one_line,
    progress,
    read_classes,
    resize_bilinear,
    scaled_size,
)
from convert_weights import (
    MOST_PIXELS,
    WeightsError,
    describe,
    load_into,
    load_weights,
    local_path,
    split_choice,
)
from upernet import (
    IGNORE_INDEX,
    Segmenter,
    build_model,
    resize,
    resize_matrix,
    rows_at_once,
    source_rows,
)

Pairs = list[tuple[str, str | None]]  # paths of pictures, and of their label files where there are
INSIDE = "_inside.png"  # behind a picture's name: the sheet that tests/inside.py draws of it


# ---- inference -----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: Segmenter,
    image: ndarray,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    short: int = 512,
    dtype: torch.dtype = torch.float32,
    slide: tuple[int, int] | None = None,
) -> ndarray:
    """Label a whole picture. model in eval mode; image (H, W, 3) uint8 RGB -> (H, W) uint8, class
    0..C-1 of each pixel.

    Each scale s resizes into (4 short, short) * s, keeping the aspect; flip adds the mirrored
    picture to every scale; slide: (window, stride), see slide_logits. The plain form:

        total = 0
        for x in views:  # the picture at each scale, and mirrored
            logits = view_logits(model, x)  # mirrored back where x was
            logits = resize(resize(logits, x.shape[2:]), (H, W))
            total = total + logits.softmax(dim=1)
        return total.argmax(dim=1)

    Each view's logits stay at the head's own size (with slide: at the view's). They are brought to
    the picture's for some rows after the other, so that no (C, H, W) is ever held."""
    H, W = image.shape[:2]
    device = next(model.parameters()).device

    views = []
    for scale in sorted(scales, reverse=True):  # the largest leaves memory for the others
        h, w = scaled_size(H, W, int(4 * short * scale), int(short * scale))
        x = torch.tensor(resize_bilinear(image, h, w), device=device)
        x = normalise(x[None])  # (1, 3, h, w)
        if flip:
            x = torch.cat([x, x.flip(3)])  # (2, 3, h, w)

        if slide:
            logits = slide_logits(model, x, dtype, *slide)  # (1 or 2, C, h, w)
        else:
            logits = view_logits(model, x, dtype)  # (1 or 2, C, h', w')

        views.append(resized_rows(logits[:1], (h, w), (H, W)))
        if flip:
            views.append(resized_rows(logits[1:].flip(3), (h, w), (H, W)))
    return vote(views).cpu().numpy()


def vote(views: list[Iterator]) -> Tensor:
    """The label (H, W) uint8 of each pixel, from the logits that each view has of the same rows of
    the picture, (rows, W, C), one block of rows after the other.

    The sum is over probabilities, not logits: each view has one vote to share out among the
    classes, and none outvotes the others by the size of its logits."""
    labels = []
    first, *others = views
    for total in first:  # (rows, W, C)
        if others:  # (of one view alone the largest stays the largest)
            total = total.softmax(2)
        for view in others:
            total += next(view).softmax(2)
        labels.append(total.argmax(2).to(torch.uint8))  # (rows, W)
    return torch.cat(labels)


def resized_rows(logits: Tensor, between: tuple[int, int], size: tuple[int, int]) -> Iterator:
    """Logits (1, C, h', w') at the size (H, W), some rows after the other, each (rows, W, C). The
    plain form:

        resize(resize(logits, between), size)[0].permute(1, 2, 0).split(rows)

    Both steps are one matrix along y (see upernet.py). Along x a dense matrix would be slower."""
    _, C, small, _ = logits.shape
    (h, w), (H, W) = between, size
    matrix = resize_matrix(h, H, logits) @ resize_matrix(small, h, logits)  # (H, h')
    rows = rows_at_once(logits.device, W * C)

    for start in range(0, H, rows):
        stop = min(start + rows, H)
        first, end = source_rows(*source_rows(start, stop, h, H), small, h)
        near = logits[:, :, first:end]  # (1, C, n, w'): all that these rows are mixed from
        near = resize(resize(near, (end - first, w)), (end - first, W))  # (1, C, n, W)
        near = near[0].permute(1, 2, 0).flatten(1)  # (n, W C)
        yield (matrix[start:stop, first:end] @ near).view(-1, W, C)


def view_logits(model: Segmenter, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalised pictures (B, 3, h, w) -> logits (B, C, h', w'), float32, at the head's own size.

    On CPUs one picture at a time: as fast as a batch, in half the memory."""
    x = x.contiguous(memory_format=memory_format(x.device, dtype))
    at_once = 1 if x.device.type == "cpu" else len(x)
    with autocast(x.device, dtype):
        logits = [model.decode_head(model.features(some)) for some in x.split(at_once)]
    return torch.cat(logits).float().contiguous(memory_format=torch.channels_last)


def slide_logits(
    model: Segmenter, x: Tensor, dtype: torch.dtype, window: int, stride: int
) -> Tensor:
    """Logits by windows of the training crops' size, where positions are as they were learned:
    (B, 3, h, w) -> (B, C, h, w), for each pixel the mean over the windows that see it. The protocol
    of Segmenter (Strudel et al. 2021, arXiv:2105.05633) and BEiT, mmsegmentation's mode slide."""
    B, _, h, w = x.shape
    C = model.decode_head.classifier.out_channels
    total = x.new_zeros(B, C, h, w).contiguous(memory_format=torch.channels_last)
    seen = x.new_zeros(h, w)

    for rows in windows(h, window, stride):
        for columns in windows(w, window, stride):
            crop = x[:, :, rows, columns]
            logits = view_logits(model, crop, dtype)  # (B, C, h', w')
            total[:, :, rows, columns] += resize(logits, crop.shape[2:])
            seen[rows, columns] += 1
    return total / seen


def windows(length: int, window: int, stride: int) -> list[slice]:
    """Windows along an axis: one begins every stride pixels, the last one ends with the axis."""
    last = max(length - window, 0)
    return [slice(start, start + window) for start in (*range(0, last, stride), last)]


# ---- the metric ----------------------------------------------------------------------------------


def confusion_matrix(label: ndarray, prediction: ndarray, num_classes: int) -> ndarray:
    """(H, W) uint8 twice -> (C, C) int64, pixels with row = true class, column = predicted; 255 in
    label is left out."""
    kept = label != IGNORE_INDEX

    cells = label[kept].astype(np.int64) * num_classes + prediction[kept]
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def scores(matrix: ndarray) -> dict:
    """(C, C) confusion matrix -> mIoU, mAcc, aAcc in percent and lists IoU, Acc per class, None
    where there is none.

    IoU needs the class in truth or prediction, Acc in truth; the means are over the classes that
    have one."""
    hit = matrix.diagonal()
    true = matrix.sum(1)
    union = true + matrix.sum(0) - hit

    result = {}
    for name, whole in (("IoU", union), ("Acc", true)):
        there = whole > 0
        values = 100 * hit / np.maximum(whole, 1)
        result["m" + name] = float(values[there].mean()) if there.any() else None
        result[name] = np.where(there, values, None).tolist()
    result["aAcc"] = 100 * int(hit.sum()) / int(true.sum()) if true.any() else None
    return result


def table(result: dict, classes: tuple[str, ...]) -> str:
    """The scores per class and their summary as text."""
    lines = ["class                        IoU     Acc"]
    absent = []
    for name, iou, acc in zip(classes, result["IoU"], result["Acc"]):
        if iou is None:
            absent.append(name)
        else:
            lines.append(f"{name:24s}{percent(iou)}{percent(acc)}")

    if absent:
        text = f"absent, not in the means ({len(absent)}): {', '.join(absent)}"
        lines += textwrap.wrap(text, 100, subsequent_indent="  ")

    means = [f"{name} {percent(result[name])}" for name in ("mIoU", "mAcc", "aAcc")]
    count = len(classes) - len(absent)
    lines.append(f"{'  '.join(means)}  ({count} of {len(classes)} classes)")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "      --" if value is None else f"{value:8.2f}"


# ---- many pictures -------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    pairs: Pairs,
    classes: Classes,
    matrix: ndarray,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    faults: list[str] | None = None,
    **how,
) -> Iterator[tuple]:
    """Label pictures, every world-th of all for this process: yields (index in pairs, path, image
    (H, W, 3), label (H, W) or None, prediction (H, W)) of each.

    matrix (C, C) int64: the pixels are counted into it, and when the loop has ended it holds the
    sum over all processes; so all of them go to the end, or none. A file that cannot be used ends
    the loop with a DataError; given a list of faults, its sentence is added to the list instead.
    how: predict's scales, flip, short, dtype and slide."""
    mine = list(enumerate(pairs))[rank::world]  # without padding: no picture is counted twice
    loader = DataLoader(
        mine, batch_size=None, collate_fn=partial(load_or_fault, classes=classes),
        num_workers=workers, worker_init_fn=start_worker,
    )
    started = monotonic()
    was_training = model.training
    model.eval()

    try:
        for n, (i, path, image, label) in enumerate(loader, start=1):
            if isinstance(image, DataError):
                if faults is None:
                    raise image
                faults.append(str(image))
                continue

            prediction = predict(model, image, **how)
            if label is not None:
                matrix += confusion_matrix(label, prediction, len(classes.names))
            yield i, path, image, label, prediction

            if rank == 0:
                rate = n / (monotonic() - started)
                left = f"{rate:.2f} a second, {(len(mine) - n) / rate:.0f} s left"
                progress(f"{n} of {len(mine)} pictures, {left}", started)
    finally:  # also where the caller leaves its loop early
        model.train(was_training)
        progress("", started)

    if world > 1:
        dist.all_reduce(torch.from_numpy(matrix))  # in place; on the CPU (gloo) also beside NCCL


def load_or_fault(numbered: tuple[int, tuple], classes: Classes) -> tuple:
    """(index, pair) -> index, path, image, label; or index, path, DataError, None where the picture
    or its label cannot be used."""
    i, pair = numbered
    try:
        return i, pair[0], *load(*pair, classes)
    except DataError as fault:
        return i, pair[0], fault, None


# ---- pictures ------------------------------------------------------------------------------------

FONT = ImageFont.load_default(15)


def sheet(
    rows: list[tuple[ndarray, ndarray | None, ndarray]], classes: Classes, opacity: float = 1
) -> Image.Image:
    """One row of panels for each (picture (H, W, 3), truth or None, prediction (H, W), all uint8),
    a legend below. With truth: picture, truth, prediction, each at most 400 pixels wide. Without:
    the prediction alone, at the picture's own size up to 4000. Colours lie over the picture with an
    opacity of 0 to 1."""
    columns = {"picture": [], "truth": [], "prediction": []}
    labels = []
    colours = palette(classes)

    for image, truth, prediction in rows:
        step = math.ceil(image.shape[1] / (4000 if truth is None else 400))
        picture = np.asarray(Image.fromarray(image).reduce(step))
        if truth is not None:
            columns["picture"].append(picture)

        for title, label in (("truth", truth), ("prediction", prediction)):
            if label is not None:
                mixed = opacity * colours[label[::step, ::step]] + (1 - opacity) * picture
                columns[title].append(mixed.round().astype(np.uint8))
                labels.append(label)

    drawn = [stack([caption(title), *column], 0) for title, column in columns.items() if column]
    panels = stack(drawn, 1)
    return Image.fromarray(stack([panels, legend(labels, classes, panels.shape[1])], 0))


def legend(labels: list[ndarray], classes: Classes, width: int) -> ndarray:
    """Colour and name of every class in labels, the largest first, down the columns, of which as
    many as fit into width pixels stand side by side. -> (h, w, 3) uint8"""
    counts = sum(np.bincount(label.ravel(), minlength=256) for label in labels)
    names = dict(enumerate(classes.names)) | {IGNORE_INDEX: "not labelled"}
    colours = palette(classes).tolist()
    shown = [k for k in np.argsort(-counts) if counts[k]]
    entries = [caption(names[k], tuple(colours[k])) for k in shown]

    widest = max(entry.shape[1] for entry in entries)
    columns = max(1, width // (8 + widest))
    rows = math.ceil(len(entries) / columns)
    starts = range(0, len(entries), rows)
    return stack([stack(entries[start : start + rows], 0) for start in starts], 1)


def palette(classes: Classes) -> ndarray:
    """The colour of every value in a label, (256, 3) uint8; what nobody labelled is black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(classes.palette)] = classes.palette
    return colours


def stack(pictures: list[ndarray], axis: int) -> ndarray:
    """Pictures (h, w, 3) one below the other (axis 0) or side by side (axis 1), on white, 8 pixels
    apart."""
    longest = max(picture.shape[1 - axis] for picture in pictures)
    padded = []

    for picture in pictures:
        pad = [(0, longest - picture.shape[1 - axis])] * 2  # before and behind, of rows and columns
        pad[axis] = (4, 4)
        padded.append(np.pad(picture, [*pad, (0, 0)], constant_values=255))
    return np.concatenate(padded, axis)


def caption(text: str, colour: tuple | None = None) -> ndarray:
    """A line of text, behind a square of the colour if there is one. -> (20, w, 3) uint8"""
    canvas = Image.new("RGB", (24 + int(FONT.getlength(text)), 20), "white")
    draw = ImageDraw.Draw(canvas)

    left = 0
    if colour:
        draw.rectangle((0, 2, 15, 17), colour, "black")
        left = 23
    draw.text((left, 10), text, "black", FONT, anchor="lm")
    return np.asarray(canvas)


def curves(entries: list[dict]) -> Image.Image:
    """Loss, learning rate and mIoU by iteration, one below the other. entries: a run's log."""
    titles = {"loss": "training loss", "lr": "learning rate", "mIoU": "validation mIoU (%)"}
    last = max(entry["iteration"] for entry in entries)
    canvas = Image.new("RGB", (800, 640), "white")
    draw = ImageDraw.Draw(canvas)

    for base, (key, title) in zip((190, 400, 610), titles.items()):
        points = [(e["iteration"], e[key]) for e in entries if e.get(key) is not None]
        top = max([value for _, value in points], default=0) or 1
        draw.text((90, base - 145), f"{title} by iteration", "black", FONT, anchor="lb")

        for part in (0, 0.25, 0.5, 0.75, 1):
            x = 90 + 690 * part
            y = base - 140 * part
            draw.line((90, y, 780, y), "lightgrey")
            draw.text((x, base + 6), f"{part * last:.0f}", "black", FONT, anchor="mt")
            draw.text((82, y), f"{part * top:.3g}", "black", FONT, anchor="rm")

        line = [(90 + 690 * i / last, base - 140 * value / top) for i, value in points]
        draw.line(line, "steelblue", 2)
        if len(line) < 30:  # few points are dots, one alone would be no line at all
            for point in line:
                draw.circle(point, 3, "steelblue")
    return canvas


# ---- python evaluate.py: plan --------------------------------------------------------------------


def plan(args: Namespace, device: torch.device, say: Callable) -> tuple[Segmenter, Pairs, Classes]:
    """Fill in what the command line leaves to the checkpoint and the machine, say it, and refuse
    what cannot be done. -> the model, on the CPU; the pictures; what their labels mean."""
    if isdir(args.checkpoint) or args.checkpoint == "runs":
        args.checkpoint, why = choose_checkpoint(args.checkpoint)
        say(f"{args.checkpoint}: {why}")

    model, facts = load_model(args.checkpoint)
    say(f"{args.checkpoint}: {describe(facts)}")

    trained = facts.get("args", {})  # of our own checkpoints
    args.data = args.data or trained.get("data", DEFAULT_ROOT)
    args.short_side = args.short_side or trained.get("short_side", 512)
    args.dtype = str(choose_dtype(args.dtype, device)).removeprefix("torch.")

    if args.image:
        classes = known_classes(facts)
        pairs = find_pictures(args.image)
    else:
        root = data_root(args.data)
        classes = read_classes(root)
        check_classes(args.checkpoint, facts, root, classes.names)
        pairs = find_pairs(root, args.split)
    refuse_overwriting(args, pairs)

    how = ", ".join(f"{name} {value}" for name, value in protocol(args).items())
    say(f"{args.image or args.data}: {len(pairs)} pictures on {device.type}; {how}")
    return model, pairs, classes


def protocol(args: Namespace) -> dict:
    """What scores depend on."""
    names = ("checkpoint", "data", "split", "scales", "flip", "short_side")
    return {name: getattr(args, name) for name in (*names, "slide", "stride", "dtype")}


def find_checkpoints(folder: str) -> list[str]:
    """The checkpoint_*.pt in a work directory and in those below it, the last written first."""
    names = [*glob("checkpoint_*.pt", root_dir=folder), *glob("*/checkpoint_*.pt", root_dir=folder)]
    return sorted([join(folder, name) for name in names], key=os.path.getmtime, reverse=True)


def checkpoints(folder: str) -> list[str]:
    """The same; UsageError if there is none."""
    found = find_checkpoints(folder)
    if not found:
        raise UsageError(
            f"{folder}: no checkpoint_*.pt in it, train one with `python train.py --data toy` or "
            "name a file with --checkpoint"
        )
    return found


def choose_checkpoint(folder: str) -> tuple[str, str]:
    """-> (path, why). Of a work directory the checkpoint with the best validation, as its log says;
    where there was none, and of a folder of work directories, the newest."""
    found = checkpoints(folder)
    log = join(folder, "log.jsonl")
    scored = {}  # the mIoU of each that was validated
    try:
        with open(log) as file:
            for line in file:
                entry = json.loads(line)
                if entry.get("mIoU") is not None:
                    path = join(folder, f"checkpoint_{entry['iteration']}.pt")
                    scored[path] = float(entry["mIoU"])
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError, AttributeError):  # there may stand anything
        raise UsageError(f"{log}: a line of it is damaged, name a file of {folder}") from None

    best = max(found, key=lambda path: scored.get(path, -1))  # of equals the newest
    why = f"the best of its run, mIoU {scored[best]:.2f}" if best in scored else "the newest"
    return best, why


def load_model(path: str) -> tuple[Segmenter, dict]:
    """The model a checkpoint describes, with its weights, on the CPU, in eval mode. -> (model,
    facts)"""
    state_dict, facts = load_weights(path)
    if facts["neck"] is None:
        raise UsageError(
            f"{path}: a {facts['kind']} has no segmentation head to evaluate, train it first with "
            "`python train.py --pretrained FILE`"
        )
    if facts["num_classes"] > 255:
        n = facts["num_classes"]
        raise UsageError(f"{path}: knows {n} classes, labels of 8 bits hold 255")

    with torch.device("meta"):  # no initialisation: load_into sets every value, or fails
        model = build_model(facts["arch"], facts["neck"], facts["num_classes"])
    load_into(model.to_empty(device="cpu"), state_dict, facts)
    return model.eval(), facts


def known_classes(facts: dict) -> Classes:
    """What a checkpoint was trained on: as it says itself, or ADE20K, or numbers for names."""
    if "classes" in facts:
        return Classes(*facts["classes"])

    n = facts["num_classes"]
    ade = Classes()
    if n == len(ade.names):
        return ade
    return Classes(tuple(f"class {k}" for k in range(n)), (ade.palette * 2)[:n])


def check_classes(path: str, facts: dict, root: str, there: tuple[str, ...]) -> None:
    """UsageError if the checkpoint in path knows other classes than the data in root has; where it
    says no names itself, another number of them."""
    known = known_classes(facts).names
    if known != there and ("classes" in facts or len(known) != len(there)):
        raise UsageError(
            f"{path}: knows {len(known)} classes ({', '.join(known[:3])}, ...), {root} has "
            f"{len(there)} ({', '.join(there[:3])}, ...): train on that data first"
        )


def find_pictures(path: str) -> Pairs:
    """One picture, or all files in a folder but hidden ones; none has a label."""
    if not isdir(path):
        return [(path, None)]

    with os.scandir(path) as entries:
        files = sorted(e.path for e in entries if isfile(e) and not e.name.startswith("."))

    if not files:
        raise DataError(f"{path}: holds no files")
    return [(file, None) for file in files]


def refuse_overwriting(args: Namespace, pairs: Pairs) -> None:
    """UsageError where an output would replace a file that is read, or another output; or where
    something lies that is no plain file: a link leads out of the folder, a pipe waits for ever."""
    inputs = [args.checkpoint, join(args.data, "classes.txt")]
    inputs += [path for pair in pairs for path in pair if path]
    read = {file_id(path): path for path in inputs}

    outputs = [(args.json, "the scores")] if args.json else []
    for folder in args.folders:
        outputs += [(destination(folder, path), path) for path, _ in pairs]
    if args.inside:
        outputs += [(destination(args.show, path, INSIDE), path) for path, _ in pairs]

    written = {}
    for output, source in outputs:
        key = file_id(output)
        if key in read:
            raise UsageError(f"{output} would replace {read[key]}, which is read: write elsewhere")
        if key in written:
            raise UsageError(
                f"{output} would hold both what is made of {written[key]} and of {source}: "
                "write to another folder, or rename one of them"
            )
        if islink(output) or (exists(output) and not isfile(output)):
            raise UsageError(
                f"{output}: is a link, a folder, a pipe or a device: remove it, or write elsewhere"
            )
        written[key] = source


def destination(folder: str, path: str, suffix: str = ".png") -> str:
    """Where the result for the picture in path goes."""
    return join(folder, splitext(basename(path))[0] + suffix)


def file_id(path: str) -> tuple | str:
    """Equal for all paths of one file, however they are written, links among them."""
    path = realpath(path)  # (without x/.., which the making of x may bring to life)
    if exists(path):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return normcase(path)


# ---- python evaluate.py: label, write, report ----------------------------------------------------


def label_and_report(args: Namespace) -> None:
    """What the command line says, on every process."""
    rank, world, device = setup_processes()

    def say(words: str) -> None:
        if rank == 0:
            print(words, flush=True)

    checkpoint, _ = split_choice(args.checkpoint)
    if args.dry_run:
        for path in (checkpoint, args.image or args.data or "toy"):
            if path != "toy" and not exists(path):  # (toy is drawn where it is not)
                return say(f"{path}: not there yet, the rest of the command is in order")

    if rank == 0:
        local_path(checkpoint)  # one process fetches what lies behind a URL
    if world > 1:
        dist.barrier()

    model, pairs, classes = plan(args, device, say)
    if args.dry_run:
        return

    open_outputs(args, rank)
    dtype = DTYPES[args.dtype]
    model = prepare(model, device, dtype, args.compile)
    slide = args.slide and (args.slide, args.stride)
    how = dict(scales=args.scales, flip=args.flip, short=args.short_side, dtype=dtype, slide=slide)
    matrix = np.zeros([len(classes.names)] * 2, np.int64)
    started = monotonic()

    faults = []
    kept = faults if isdir(args.image or "") else None  # in a folder one bad picture ends nothing
    labelled = evaluate(model, pairs, classes, matrix, rank, world, args.workers, kept, **how)
    for _, path, image, label, prediction in labelled:
        write(args, model, classes, path, image, label, prediction)

    all_faults = [faults] * world  # of each process
    if world > 1:
        dist.all_gather_object(all_faults, faults)
    leave_processes(world)

    if rank == 0:
        report(args, classes, matrix, len(pairs), sum(all_faults, []), started)


def open_outputs(args: Namespace, rank: int) -> None:
    """Look for what draws, make the folders, try to write the scores: an error comes now, not after
    an hour."""
    if args.inside:
        from_tests("inside")  # which a copy of the scripts may lack
    for folder in args.folders:
        os.makedirs(folder, exist_ok=True)
    if args.json and rank == 0:
        os.makedirs(dirname(args.json) or ".", exist_ok=True)
        open(args.json, "a").close()  # what is in it stays until there is more to write


def write(
    args: Namespace, model: Segmenter, classes: Classes, path: str, image, label, prediction
) -> None:
    """Save what is asked for of one picture, as evaluate() gives it."""
    if args.save_labels:
        values = prediction
        if classes.ignored_colours is not None:
            values = np.uint8(classes.palette)[prediction]  # (H, W, 3): label files in colour
        elif classes.zero_ignored:
            values = prediction + 1
        Image.fromarray(values).save(destination(args.save_labels, path))

    if args.show:
        drawn = sheet([(image, label, prediction)], classes, args.opacity)
        drawn.save(destination(args.show, path))

    if args.inside:
        how = (args.at or (0.5, 0.5), args.short_side, DTYPES[args.dtype])
        inside = from_tests("inside")
        drawn = inside.look_inside(model, image, prediction, classes, *how)
        drawn.save(destination(args.show, path, INSIDE))


def report(
    args: Namespace,
    classes: Classes,
    matrix: ndarray,
    count: int,
    faults: list[str],
    started: float,
) -> None:
    """Print the scores and what was written, write the scores, and name the pictures that could not
    be labelled; the exit code says whether there were any."""
    images = count - len(faults)
    rate = images / (monotonic() - started)
    progress(f"{images} pictures, {rate:.2f} a second", started, done=True)

    for folder in args.folders:
        print(f"{folder}: {images} files written")
    if args.inside:
        print(f"{args.show}: {images} more, *{INSIDE}")

    if not args.image:
        result = scores(matrix)
        print(table(result, classes.names))
        if args.json:
            result["classes"] = classes.names
            result["confusion"] = matrix.tolist()  # row: the true class, column: the predicted one
            result["protocol"] = protocol(args) | {"images": images}
            write_json(result, args.json)

    for fault in faults:
        print(f"not labelled: {one_line(fault)}", file=sys.stderr)
    if faults:
        sys.exit(1)


def write_json(result: dict, path: str) -> None:
    """One line a key."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    with open(path, "w") as file:
        file.write("{" + ",\n ".join(lines) + "}\n")


# ---- python evaluate.py: the command line --------------------------------------------------------


def main() -> None:
    args = parse()
    with errors_in_one_sentence():
        label_and_report(args)


def parse(argv: list[str] | None = None) -> Namespace:
    """The arguments. What cannot be met together is refused here."""
    parser = options()
    args = parser.parse_args(argv)
    args.folders = [folder for folder in (args.show, args.save_labels) if folder]

    if (args.slide or 0) < (args.stride or 0) or (args.slide and not args.stride):
        parser.error("--slide needs a --stride, of as many pixels or fewer")
    if args.image and not args.folders:
        parser.error("--image needs --show DIR or --save-labels DIR, or nothing would come out")
    if args.inside and not args.show:
        parser.error("--inside needs --show DIR, the folder of its sheets")
    if args.at and not args.inside:
        parser.error("--at is a place that --inside looks at, add --inside")
    if args.image and args.json:
        parser.error("--json holds scores, and --image has no labels to score with")
    return args


def options() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        description="Evaluate a checkpoint on a data set, or label pictures with it.",
        epilog="example: python evaluate.py --checkpoint upernet.pth --flip --scales 0.5,...,1.75",
    )

    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", metavar="FILE", default="runs",
        help="any file convert_weights.py reads, a URL, a work directory (the checkpoint with the "
        "best validation), or a folder of these (the newest; default: runs)")
    add("--data", metavar="DIR",
        help=f"data set, or toy (default: what the checkpoint was trained on, else {DEFAULT_ROOT})")
    add("--split", default="validation",
        help="images/SPLIT and annotations/SPLIT (default: validation)")
    add("--image", metavar="FILE_OR_DIR",
        help="label these pictures instead; needs --show or --save-labels")

    add = parser.add_argument_group("how").add_argument
    add("--scales", type=parse_scales, default=(1.0,), metavar="S,S,...",
        help="sizes relative to (2048, 512); 0.5,...,1.75 means steps of 0.25 (default: 1)")
    add("--flip", action="store_true", help="add the mirrored picture at every scale")
    add("--short-side", type=SIZE, metavar="PIXELS",
        help="of pictures at scale 1 (default: as trained, else 512)")
    add("--slide", type=SIZE, metavar="PIXELS",
        help="label square windows of this side instead of whole pictures, e.g. 512")
    add("--stride", type=SIZE, metavar="PIXELS",
        help="from one window to the next, e.g. 341")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto (default): bfloat16 if in hardware, else float32")
    add("--workers", type=WORKERS, default=2,
        help="processes that read pictures (default: 2)")
    add("--compile", action="store_true",
        help="torch.compile the model: a minute at each new size of pictures, then faster")
    add("--dry-run", action="store_true",
        help="load the checkpoint, look at the data, print the plan or what is missing")

    add = parser.add_argument_group("results").add_argument
    add("--json", metavar="FILE", help="write scores and protocol")
    add("--save-labels", metavar="DIR",
        help="write one png a picture, with the values of the data set's own label files")
    add("--show", metavar="DIR",
        help="write one sheet a picture: picture, truth, prediction, legend; or an overlay")
    add("--inside", action="store_true",
        help="one more sheet a picture: attention, maps, ...")
    add("--at", nargs=2, type=RATE, metavar=("X", "Y"),
        help="the place whose attention it shows, in parts of width and height (default: 0.5 0.5)")
    add("--opacity", type=FACTOR, default=0.6,
        help="of the classes' colours over the pictures, 0 to 1 (default: 0.6)")
    return parser


def parse_scales(text: str) -> tuple[float, ...]:
    """ "0.5,0.75,1" -> (0.5, 0.75, 1.0); "0.5,...,1.75" means steps of 0.25."""
    first, dots, last = text.partition(",...,")
    try:
        if dots:
            scales = np.arange(float(first), float(last) + 1e-9, 0.25)
        else:
            scales = np.array(text.split(","), float)
    except ValueError:
        scales = np.zeros(1)

    if not scales.size or not all((0 < scales) & (scales <= 16)):
        raise ArgumentTypeError(
            f"{text!r} is not a list of numbers above 0, and at most 16, like 0.5,1,1.5 or "
            "0.5,...,1.75"
        )
    return tuple(scales.tolist())


def number(kind: type, words: str, low: float, high: float = 2**63) -> Callable[[str], float]:
    """-> an argparse type: an int or float, at least low and below high, or argparse's error, that
    it is not what `words` say. (nan is in no interval.)"""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            raise ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return read


POSITIVE = number(int, "a whole number above 0, and at most 10^9", 1, 10**9 + 1)
SIZE = number(int, f"a whole number above 0, and at most {MOST_PIXELS}", 1, MOST_PIXELS + 1)
WORKERS = number(int, "a whole number of 0 or more, and at most 1024", 0, 1025)
COUNT = number(int, "a whole number of 0 or more", 0)
REAL = number(float, "a number of 0 or more", 0)
FACTOR = number(float, "a number from 0 to 1", 0, math.nextafter(1, 2))
RATE = number(float, "a number of 0 or more and below 1", 0, 1)


class UsageError(UserError):
    """An option that cannot be met."""


# ---- where and how to compute --------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype; auto is bfloat16 where the hardware is known to compute in it, else float32. (Where
    it is emulated it is the slower one. Apple's M1 and M2 do so, and torch cannot tell.)"""
    if name != "auto":
        return DTYPES[name]

    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products and convolutions in dtype; in float32 stay the weights, the sum that runs
    through the backbone with its LayerNorms, and the loss."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """How maps lie in memory: channels last, but for float32 on CPUs, where gradients of weights
    then take thrice the time, and for Apple's GPUs, see contiguous_batch_norm."""
    if device.type == "mps" or (device.type, dtype) == ("cpu", torch.float32):
        return torch.contiguous_format
    return torch.channels_last


def prepare(
    model: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool
) -> nn.Module:
    """The model on the device, in its layout; compiled by parts, anew for each size of input."""
    if compiled:
        for part in model.children():
            part.compile(dynamic=False)
    if device.type == "mps":
        contiguous_batch_norm(model)
    return model.to(device, memory_format=memory_format(device, dtype))


def contiguous_batch_norm(model: nn.Module) -> None:
    """Have BatchNorm see contiguous maps, whatever comes: its gradients on Apple's GPUs are wrong
    for others (pytorch issue 175189)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, maps: maps[0].contiguous())


# ---- processes -----------------------------------------------------------------------------------
# What one platform or another lacks is asked for here and nowhere else. Without it everything
# works, with less comfort.

# What asks to stop: Ctrl-C, and clusters in two customs (Windows has no SIGUSR1).
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


def setup_processes(timeout: float = 1800) -> tuple[int, int, torch.device]:
    """-> (rank, number of processes, device). Under torchrun joins the others: NCCL for tensors on
    CUDA, gloo on CPUs; RuntimeError in all of them when one has not answered for `timeout`
    seconds."""
    keep_memory()
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise UsageError(
            "of RANK and WORLD_SIZE the environment sets one alone: start with torchrun, which "
            "sets both, or unset it"
        )
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(world)
    if world == 1 or dist.is_initialized():
        return rank, world, device

    # Where torchrun restarts its processes, its store still holds the addresses of the dead ones,
    # and the new ones wait for them in vain (pytorch issue 135712 is closed; in torch 2.13 it is so
    # for all but --standalone). A prefix for each try keeps them apart. Several nodes count their
    # tries each by itself, and prefixes would part those that belong together.
    meet = {}
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=min(timeout, 300))  # torch's own: 300, whatever --timeout says
        store = dist.TCPStore(host, port, is_master=False, timeout=wait)
        prefix = f"try {os.environ['TORCHELASTIC_RESTART_COUNT']}"
        meet = dict(store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)

    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **meet)
    return rank, world, device


def choose_device(world: int) -> torch.device:
    """This process's GPU, LOCAL_RANK of those that torch finds; else the CPU. Several processes on
    a Mac take the CPU too: gloo, the only way they have to talk, knows tensors on CPUs alone."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or (device.type == "mps" and world > 1):
        return torch.device("cpu")

    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.accelerator.device_count()
    if index >= count:
        raise UsageError(
            f"there is no GPU for process {index + 1} of this machine, it has {count}: start one "
            f"process for each, with --nproc_per_node {count}"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def libc(name: str) -> Callable:
    """A function of the C library; where there is none of this name, one that does nothing."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (TypeError, OSError, AttributeError):  # Windows has no such library, others no such name
        return lambda *arguments: None


def keep_memory() -> None:
    """glibc gives large arrays back when they are freed, and gets the next ones zeroed, page by
    page: 40% of the time of the transforms, 10% of the model's on a CPU. From here on it keeps
    those below 80 MB (larger ones would leave large holes)."""
    mallopt = libc("mallopt")
    mallopt(-3, 80_000_000)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: which does not shrink


def start_worker(worker: int) -> None:
    """In each of a loader's processes."""
    # A signal to the whole group is the main process's to answer: a loader that obeyed it would be
    # missed before the checkpoint is saved.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    keep_memory()

    # Where the main process is killed, its loaders die with it. torch's loaders look for it between
    # two pictures alone: one that waits for somebody to take its last picture would never look,
    # stay for good, and hold connections open on which the other processes wait.
    libc("prctl")(1, 9)  # PR_SET_PDEATHSIG: SIGKILL when the parent dies (Linux)
    if get_start_method() == "fork" and os.getppid() != parent_process().pid:
        os._exit(1)  # it has died already


@atexit.register
def kill_workers() -> None:
    """When the main process ends: multiprocessing would send its loaders SIGTERM, which they
    ignore, and wait for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for child in active_children():
        if child.daemon:
            child.kill()


@atexit.register
def leave_group() -> None:
    """When the main process ends, by an error too: torch's threads that still listen to the others
    would abort it, one time in fifteen, with SIGABRT for an exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_processes(world: int) -> None:
    """At the end, together: nobody leaves while another may still be talking to it."""
    if world > 1:
        dist.barrier()
        leave_group()


if __name__ == "__main__":
    main()
