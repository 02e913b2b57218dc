"""Evaluation: one label for each pixel of whole pictures, at one scale or several, flipped or not;
the metric; pictures of the results.

    picture --resize into (2048, 512) x scale--> model --> logits --bilinear--> picture's own size
            --softmax--> mean over scales and flips --argmax--> label
            --> confusion matrix (C, C) --> IoU per class --> mIoU

The metric is that of FCN (Long et al. 2015, arXiv:1411.4038, section 5): intersection over union.
One confusion matrix of the whole data set gives it, not a mean over pictures. A class that is
neither in the labels nor predicted has no IoU (0 / 0) and is left out of the mean. The protocol is
the reference's: logits are resized twice, to the resized picture's size and then to the picture's
own, and the mean is that of the softmax outputs rather than of the logits.

Names of dimensions: B pictures, C classes, H W the picture, h w a view of it (the picture at one
scale), h' w' the logits of that view.

Inference, the metric and the pictures come first, then the program. The last two parts,
"Devices and number formats" and "Processes", serve train.py too.
"""

import atexit
import ctypes
import json
import os
import re
import signal
import sys
import threading
import traceback
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from glob import escape, glob
from multiprocessing import active_children, parent_process
from os.path import (
    commonpath,
    dirname,
    exists,
    getmtime,
    isdir,
    isfile,
    join,
    realpath,
    relpath,
    splitext,
)
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader

from ade20k import (
    CLASSES,
    DEFAULT_ROOT,
    Classes,
    DataError,
    UserError,
    about,
    data_root,
    errors_in_one_sentence,
    find_pairs,
    first_line,
    load,
    normalise,
    progress,
    read_classes,
    resize_bilinear,
    say,
    scaled_size,
    warn,
)
from convert_weights import (
    describe,
    load_into,
    load_weights,
    local_path,
    split_choice,
    whole_or_not_at_all,
)
from upernet import (
    IGNORE_INDEX,
    Segmenter,
    build_model,
    resize,
    resize_matrix,
    rows_at_once,
    source_rows,
    summed_cross_entropy,
)


# ---- Inference -----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: Segmenter, image: ndarray, scales: tuple = (1.0,), flip: bool = False,
    short: int = 512, dtype: torch.dtype = torch.float32, slide: tuple | None = None,
    resized: list | None = None,
) -> ndarray:
    """Label a whole picture: (H, W, 3) uint8 RGB -> (H, W) uint8. The model is in eval mode.

    flip adds the mirrored picture at every scale. slide: (window, stride), see slide_logits.
    resized: what at_scales(image, scales, short) gives, if it is there already. The plain form:

        total = 0
        for x in views:  # the picture at each scale, and mirrored
            logits = view_logits(model, x)  # mirrored back where x was
            logits = resize(resize(logits, x.shape[2:]), (H, W))
            total = total + logits.softmax(dim=1)
        return total.argmax(dim=1)

    Each view's logits stay at the head's own size (with slide: at the view's). Only some rows at a
    time are brought to the picture's size, so a large (C, H, W) is never held. The softmax gives
    each view one unit of probability at each pixel, so a view with larger logits does not outweigh
    the others."""
    H, W, _ = image.shape
    device = next(model.parameters()).device

    views = []  # of each: logits (1, C, h', w'), (h, w), the matrix (H, h') of both resizes along y
    for x in resized or at_scales(image, scales, short):
        _, h, w = x.shape
        x = normalise(torch.tensor(x[None], device=device))  # (1, 3, h, w)
        if flip:
            x = torch.cat([x, x.flip(3)])  # (2, 3, h, w)

        # (1 or 2, C, h', w'), with slide (1 or 2, C, h, w)
        logits = slide_logits(model, x, dtype, *slide) if slide else view_logits(model, x, dtype)
        if flip:
            logits[1] = logits[1].flip(2)  # mirrored back
        _, C, small, _ = logits.shape  # small: h'
        along_y = resize_matrix(h, H, logits) @ resize_matrix(small, h, logits)  # (H, h')
        views += [(of_view, (h, w), along_y) for of_view in logits.split(1)]

    labels = []
    step = rows_at_once(device, W * C)
    for start in range(0, H, step):
        for view in views:
            large = resized_rows(view, W, start, start + step)  # (step, W, C)
            if len(views) > 1:  # of one view the largest logit says as much
                large = large.softmax(2)
            # (Beginning with 0 + large would be one more pass over all logits.)
            total = large if view is views[0] else total.add_(large)
        labels.append(total.argmax(2).byte())  # (step, W)
    return torch.cat(labels).cpu().numpy()  # (H, W)


def at_scales(image: ndarray, scales: tuple, short: int) -> list:
    """(H, W, 3) uint8 -> for each scale s the picture, resized into (4 short, short) * s with its
    aspect kept, (3, h, w) uint8. The largest comes first, while memory holds no logits."""
    H, W, _ = image.shape
    scales = sorted(scales, reverse=True)
    return [resize_bilinear(image, *scaled_size(H, W, short, s)) for s in scales]


def resized_rows(view: tuple, W: int, start: int, stop: int) -> Tensor:
    """Bring a view's logits (1, C, h', w') to the picture's size, and there give only the rows
    start to stop - 1, fewer at the picture's end. -> (rows, W, C). The plain form:

        resize(resize(logits, (h, w)), (H, W))[0].permute(1, 2, 0)[start:stop]

    Along y both steps are one matrix (see "Faster" in upernet.py). Each row of it is zero except
    near the place that a row of the picture is mixed from, so only a few rows of logits are needed.
    Along x these are resized in two steps, which is faster than a dense (W, w') matrix."""
    logits, (h, w), along_y = view
    _, C, small, _ = logits.shape  # small: h'

    first, end = source_rows(start, stop, h, len(along_y))  # of the view
    first, end = source_rows(first, end, small, h)  # of the logits
    near = resize(logits[:, :, first:end], (end - first, w))  # (1, C, n, w), n = end - first
    near = resize(near, (end - first, W))  # (1, C, n, W)

    near = near[0].permute(1, 2, 0).flatten(1)  # (n, W C)
    return (along_y[start:stop, first:end] @ near).view(-1, W, C)


def view_logits(model: Segmenter, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalised pictures (B, 3, h, w) -> logits (B, C, h', w'), float32, at the head's own size.
    They are channels last in memory: resized_rows reads the C logits of a pixel side by side.

    A CPU takes one picture at a time: as fast as a batch, in half the memory."""
    x = x.contiguous(memory_format=memory_format(x.device, dtype))
    at_once = 1 if x.device.type == "cpu" else len(x)
    with autocast(x.device, dtype):
        logits = [model.decode_head(model.features(some)) for some in x.split(at_once)]
    return torch.cat(logits).float().contiguous(memory_format=torch.channels_last)


def slide_logits(
    model: Segmenter, x: Tensor, dtype: torch.dtype, window: int, stride: int
) -> Tensor:
    """Logits of square windows, for each pixel the mean over the windows that see it:
    (B, 3, h, w) -> (B, C, h, w). Windows of the training crops' size use the positions as they were
    learned, without resizing them. This is the protocol of Segmenter (Strudel et al. 2021,
    arXiv:2105.05633) and BEiT, mmsegmentation's mode slide."""
    B, _, h, w = x.shape
    C = model.decode_head.classifier.out_channels
    total = x.new_zeros(B, C, h, w).contiguous(memory_format=torch.channels_last)
    seen = x.new_zeros(h, w)  # by how many windows

    for rows in windows(h, window, stride):
        for columns in windows(w, window, stride):
            crop = x[:, :, rows, columns]
            logits = view_logits(model, crop, dtype)  # (B, C, h', w')
            total[:, :, rows, columns] += resize(logits, crop.shape[2:])
            seen[rows, columns] += 1
    return total / seen


def windows(length: int, window: int, stride: int) -> list:
    """Windows along an axis: one begins every stride pixels, the last one ends with the axis. Where
    the axis is shorter than a window, one window holds all of it."""
    last = max(length - window, 0)
    starts = [*range(0, last, stride), last]
    return [slice(start, start + window) for start in starts]


# ---- The metric ----------------------------------------------------------------------------------


def confusion_matrix(label: ndarray, prediction: ndarray, num_classes: int) -> ndarray:
    """label and prediction, each (H, W) uint8 -> (C, C) int64: how many pixels of each true class
    (row) were given each class (column). Pixels whose label is 255 are left out."""
    kept = label != IGNORE_INDEX

    # Number the matrix's cells row by row, and count how often each number occurs.
    cells = label[kept].astype(np.int64) * num_classes + prediction[kept]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrix: ndarray) -> dict:
    """(C, C) confusion matrix -> mIoU, mAcc, aAcc in percent, and lists IoU and Acc with a number
    or None for each class. Acc is the share of a class's pixels that are found, aAcc that of all
    labelled pixels.

    A class has an IoU if it is in the labels or predicted, an Acc if it is in the labels. The means
    are over the classes that have one."""
    hit = matrix.diagonal()
    true = matrix.sum(1)
    union = true + matrix.sum(0) - hit

    # np.ma masks what is divided by 0: mean() leaves it out, tolist() makes it None.
    iou = np.ma.divide(100 * hit, union)
    acc = np.ma.divide(100 * hit, true)
    return {
        "mIoU": iou.mean().tolist(),
        "mAcc": acc.mean().tolist(),
        "aAcc": np.ma.divide(100 * hit.sum(), true.sum()).tolist(),
        "IoU": iou.tolist(),
        "Acc": acc.tolist(),
    }


def table(result: dict, classes: tuple) -> list:
    """Lines of text: the scores of each class that has an IoU, and the means. nan stands for a
    score that does not exist."""
    lines = ["class                        IoU     Acc"]
    for row in zip(classes, *np.array([result["IoU"], result["Acc"]], float)):  # None becomes nan
        if row[1] >= 0:  # (nan is not)
            lines.append("%-24s%8.2f%8.2f" % row)

    means = np.array([result["mIoU"], result["mAcc"], result["aAcc"]], float)
    words = "mIoU %8.2f  mAcc %8.2f  aAcc %8.2f  (%d of %d classes)"
    lines.append(words % (*means, len(lines) - 1, len(classes)))
    return lines


# ---- Many pictures -------------------------------------------------------------------------------


def evaluate(
    model: Segmenter, pairs: list, classes: Classes, rank: int = 0, world: int = 1,
    workers: int = 2, look: Callable | None = None, faults: list | None = None,
    scales: tuple = (1.0,), short: int = 512, **how,
) -> ndarray:
    """Predict labels and compare them with the true ones -> confusion matrix (C, C) int64, the sum
    over all processes. Each process takes every world-th picture.

    look(i, image, label, prediction) is called for each picture of this process: i is its index in
    pairs, image (H, W, 3), label (H, W) or None, prediction (H, W). A file that cannot be used ends
    the loop with a DataError. If there is a list `faults`, the error's sentence is added to it
    instead. scales and short: see at_scales. how: predict's flip, dtype and slide."""
    loader = DataLoader(  # of paths; its processes read and resize, in place of collating batches
        list(enumerate(pairs))[rank::world],  # not padded to equal parts: no picture counts twice
        batch_size=None, collate_fn=partial(read, classes, scales, short),
        num_workers=workers, prefetch_factor=1 if workers else None, worker_init_fn=start_worker,
    )
    C = len(classes.names)
    matrix = np.zeros((C, C), np.int64)
    was_training = model.training
    model.eval()

    for i, image, label, resized in loader:
        if isinstance(image, DataError):
            if faults is None:
                raise image
            faults.append(str(image))
            continue

        prediction = predict(model, image, resized=resized, **how)
        if label is not None:
            matrix += confusion_matrix(label, prediction, C)
        if look:
            look(i, image, label, prediction)

        if rank == 0:
            progress(f"{i + 1} of {len(pairs)} pictures")

    progress("")
    model.train(was_training)
    if world > 1:
        dist.all_reduce(torch.from_numpy(matrix))  # in place; on the CPU, so by gloo, not NCCL
    return matrix


def read(classes: Classes, scales: tuple, short: int, numbered: tuple) -> tuple:
    """(i, (path of the picture, of its label)) -> i, image, label, at_scales of the image. Where a
    file cannot be used, a DataError takes the place of the image. Runs in the loader's
    processes."""
    i, pair = numbered
    try:
        image, label = load(*pair, classes)
    except DataError as fault:
        return i, fault, None, None
    return i, image, label, at_scales(image, scales, short)


# ---- Pictures of the results ---------------------------------------------------------------------

FONT = ImageFont.load_default(15)


def sheet(rows: list, classes: Classes, opacity: float = 1) -> Image.Image:
    """Draw pictures and their labels, with a legend below. rows holds (picture (H, W, 3), truth
    (H, W) or None, prediction (H, W)), all uint8; each becomes a row of panels: the picture, the
    picture under the colours of the truth, and under those of the prediction. opacity is that of
    the colours, 0 to 1. Panels have the picture's size, or a half, a third, ... of it, so that they
    are at most 2000 pixels wide."""
    colours = palette(classes)
    parts = [caption("picture, truth where it is known (black: not labelled), prediction")]
    shown = []

    for image, *labels in rows:
        step = 1 + image.shape[1] // 2000
        picture = Image.fromarray(image).reduce(step)
        panels = [picture]
        for label in labels:
            if label is not None:
                coloured = Image.fromarray(colours[label[::step, ::step]])
                panels.append(Image.blend(picture, coloured, opacity))
                shown.append(label)
        parts.append(stack(panels, 1))

    parts.append(legend(shown, classes, parts[-1].width))
    return stack(parts, 0)


def legend(labels: list, classes: Classes, width: int) -> Image.Image:
    """Colour and name of every class in labels, a list of (H, W), row by row, the largest class
    first. Rows mostly fit into `width` pixels; names longer than 20 letters may need more."""
    counts = np.bincount(np.concatenate(labels, axis=None))  # (zip leaves out that of 255)
    ranked = sorted(zip(counts, classes.names, classes.palette), reverse=True)
    entries = [caption(name, tuple(colour)) for count, name, colour in ranked if count]
    n = min(len(entries), 1 + width // 200)  # columns, of every n-th entry each
    return stack([stack(entries[k::n], 0) for k in range(n)], 1)


def palette(classes: Classes) -> ndarray:
    """-> (256 or more, 3) uint8: the colour of every value in a label. That of 255, "not labelled",
    is black."""
    return np.uint8(classes.palette + 256 * [[0, 0, 0]])


def stack(pictures: list, axis: int) -> Image.Image:
    """One below the other (axis 0) or side by side (axis 1), on white, 8 pixels apart."""
    # Side by side is one below the other with x and y swapped, before and after.
    arrays = [np.asarray(picture).swapaxes(0, axis) for picture in pictures]
    longest = max(array.shape[1] for array in arrays)
    arrays = [
        np.pad(array, ((4, 4), (0, longest - array.shape[1]), (0, 0)), constant_values=255)
        for array in arrays
    ]
    return Image.fromarray(np.concatenate(arrays).swapaxes(0, axis))


def caption(text: str, colour="white") -> Image.Image:
    """A line of text, 20 pixels high, with a box of the colour on its left."""
    canvas = Image.new("RGB", (24 + int(FONT.getlength(text)), 20), "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 2, 11, 17), colour)
    draw.text((16, 10), text, "black", FONT, anchor="lm")
    return canvas


def curves(entries: list) -> Image.Image:
    """Loss, learning rate and mIoU by iteration, each from 0 to its largest value. entries: a run's
    log."""
    last = entries[-1]["iteration"]
    canvas = Image.new("RGB", (800, 400), "white")
    draw = ImageDraw.Draw(canvas)

    for x, key, colour in (10, "loss", "steelblue"), (280, "lr", "grey"), (550, "mIoU", "crimson"):
        found = [entry for entry in entries if entry.get(key) is not None]
        top = max([entry[key] for entry in found], default=0) or 1  # (it divides)
        draw.text((x, 5), f"{key}, 0 to {top:.3g}, {last} iterations", colour, FONT)
        points = [
            (800 * entry["iteration"] / last, 400 - 370 * entry[key] / top) for entry in found
        ]
        draw.line(points, colour, 2)
    return canvas


# ---- python evaluate.py: what is evaluated -------------------------------------------------------


def load_model(path: str) -> tuple:
    """Build the model that a weight file describes, and load its weights. -> (the model on the CPU,
    in eval mode; facts about the file, see load_weights)"""
    state_dict, facts = load_weights(path)
    n = facts["num_classes"]
    with about(path, UsageError):
        if facts["neck"] is None:
            raise ValueError("has no head, train it first: `python train.py --pretrained FILE`")
        if n > 255:
            raise ValueError(f"knows {n} classes, labels of 8 bits hold 255")
        model = build_model(facts["arch"], facts["neck"], n)
        load_into(model, state_dict, facts)
    return model.eval(), facts


def choose_checkpoint(path: str) -> str:
    """The file that --checkpoint means: a file is itself, a folder of runs means its newest run, a
    run means its best.pt. A run that never validated has none: then it means its newest
    checkpoint."""
    if not isdir(path) and path != "runs":  # (where there is no runs/, newest_run says what to do)
        return path

    run = path if checkpoints(path) else newest_run(path)
    best = join(run, "best.pt")
    return best if exists(best) else checkpoints(run)[-1]


def checkpoints(folder: str) -> list:
    """The paths of checkpoint_N.pt directly in a folder, by N, newest last."""
    files = glob("checkpoint_*", root_dir=folder)
    names = filter(re.compile(r"checkpoint_\d+\.pt").fullmatch, files)
    # A number with more digits is larger.
    return [join(folder, name) for name in sorted(names, key=lambda name: (len(name), name))]


def newest_run(folder: str) -> str:
    """The work directory whose log was written last, among those directly below a folder that hold
    checkpoints."""
    logs = [log for log in Path(folder).glob("*/log.jsonl") if checkpoints(log.parent)]
    if not logs:
        raise UsageError(
            f"{folder}: no run with a checkpoint in it, train one with `python train.py --data toy`"
            " or name a file with --checkpoint"
        )
    return str(max(logs, key=getmtime).parent)


def find_data(args: Namespace, facts: dict) -> tuple:
    """-> (the pairs of picture and label that the command line means, the label None for --image;
    their classes; the folder that holds all pictures, or folders with them)"""
    n = facts["num_classes"]
    known = Classes(*facts["classes"])  # to the model
    # Where the file names no classes: ADE20K's names if it has as many, otherwise numbers.
    if n != len(known.names):
        known = known._replace(names=CLASSES if n == len(CLASSES) else tuple(map(str, range(n))))

    if args.image:
        # All below a folder, without hidden files; none below a file.
        files = sorted(filter(isfile, glob(join(escape(args.image), "**"), recursive=True)))
        files = files or [args.image]
        return [(file, None) for file in files], known, commonpath(map(dirname, files))

    args.data = data_root(args.data)
    classes = read_classes(args.data)
    if n != len(classes.names) or facts["classes"][0] not in ((), classes.names):
        raise UsageError(
            f"{args.checkpoint}: knows {n} classes {known.names[:3]}, not those of {args.data}: "
            "train on that data first"
        )
    return find_pairs(args.data, args.split), classes, join(args.data, "images", args.split)


# ---- python evaluate.py: label, write, report ----------------------------------------------------

PLAN = """{checkpoint}: {facts}
{images} pictures of {data}, {dtype} on {device}
scales {scales} of a short side of {short_side}, flip {flip}, slide {slide}, stride {stride}"""
PROTOCOL = "checkpoint data split images scales flip short_side slide stride dtype".split()


def run(args: Namespace) -> None:
    """Do what the command line says, on every process."""
    rank, world, device = setup_processes()
    args.checkpoint = choose_checkpoint(args.checkpoint)
    if rank == 0:
        local_path(split_choice(args.checkpoint)[0])  # one process fetches what is behind a URL
    wait_for_all()

    # The checkpoint and the machine decide what the command line leaves open.
    model, facts = load_model(args.checkpoint)
    trained = facts.get("args", {})  # the arguments of the training, in our own checkpoints
    args.data = args.image or args.data or trained.get("data", DEFAULT_ROOT)
    args.short_side = args.short_side or trained.get("short_side", 512)
    dtype = choose_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    pairs, classes, top = find_data(args, facts)
    args.images = len(pairs)

    # Files with results have the pictures' names, with the folders that are below top.
    names = [splitext(relpath(path, top))[0] + ".png" for path, _ in pairs]
    open_outputs(args, pairs, names)
    if rank == 0:
        say(*PLAN.format(**vars(args), facts=describe(facts), device=device).splitlines())

    faults = [] if args.image else None  # with --image unreadable ones are named at the end
    model = prepare(model, device, dtype, args.compile)
    matrix = evaluate(
        model, pairs, classes, rank, world, args.workers, partial(write, args, classes, names),
        faults, scales=args.scales, flip=args.flip, short=args.short_side, dtype=dtype,
        slide=args.slide and (args.slide, args.stride),
    )

    if rank == 0 and not args.image:
        result = scores(matrix)
        if args.json:
            result |= dict(
                classes=classes.names, confusion=matrix.tolist(),
                protocol={key: getattr(args, key) for key in PROTOCOL},
            )
            with whole_or_not_at_all(args.json) as part:
                Path(part).write_text(json.dumps(result))
        say(*table(result, classes.names))

    wait_for_all()
    if faults:
        for fault in faults:
            warn(f"not labelled: {fault}")
        sys.exit(1)


def open_outputs(args: Namespace, pairs: list, names: list) -> None:
    """Make the folders and try to write the scores, so that an error comes now and not after an
    hour. UsageError if a result would replace a file that is read, another result or, with --image,
    a label file of these pictures, which is not read."""
    taken = {dirname(realpath(path)) for pair in pairs for path in pair if path}  # folders
    # .../images/validation -> .../annotations/validation: the labels of these pictures
    taken |= {"annotations".join(folder.rsplit("images", 1)) for folder in taken}
    if len(set(names)) < len(names):
        raise UsageError(f"{args.image}: two pictures have one name, their results too: rename one")

    for folder in filter(None, (args.show, args.save_labels)):
        folders = {dirname(realpath(join(folder, name))) for name in names}
        if folders & taken:
            raise UsageError(f"{folder}: holds pictures, labels or other results: name another")
        for each in folders:
            os.makedirs(each, exist_ok=True)
        taken |= folders

    if args.json:
        with open(args.json, "ab+") as file:  # old scores stay until new ones are written
            file.seek(0)
            if not isfile(args.json) or file.read(6) not in (b"", b'{"mIoU'):
                raise UsageError(f"{args.json}: exists and holds no scores, name another")


def write(
    args: Namespace, classes: Classes, names: list, i: int, image, label, prediction
) -> None:
    """Save what the command line asks for of picture i. This is the `look` of evaluate()."""
    if args.save_labels:
        colours = palette(classes)
        if classes.ignored_colours is not None:
            picture = Image.fromarray(colours[prediction])  # (H, W, 3): label files in colour
        else:
            # Numbers with a palette, so that they are seen. (With fewer than 256 colours Pillow
            # would save fewer bits, and cut numbers.)
            first = int(classes.zero_ignored)
            picture = Image.fromarray(prediction + first)
            picture.putpalette(bytes(np.roll(colours[:256], first, axis=0)))
        picture.save(join(args.save_labels, names[i]))

    if args.show:
        drawn = sheet([(image, label, prediction)], classes, args.opacity)
        # (Compression level 1 makes larger files in a third of the time.)
        drawn.save(join(args.show, names[i]), compress_level=1)


# ---- python evaluate.py: the command line --------------------------------------------------------


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if args.stride > args.slide or (args.slide and not args.stride):
        parser.error("--slide needs a --stride, of as many pixels or fewer")
    if args.image and (args.json or not (args.show or args.save_labels)):
        parser.error("--image needs --show DIR or --save-labels DIR, and has no scores for --json")
    with end_alone(), errors_in_one_sentence(), ways_out():
        run(args)


def options() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        description="Evaluate a checkpoint on a data set, or label pictures with it.",
        epilog="example: python evaluate.py --checkpoint upernet.pth --flip --scales 0.5,...,1.75",
    )
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", default="runs",
        help="any file convert_weights.py reads, a URL, a work directory (its best.pt, otherwise "
        "its newest checkpoint), or a folder of work directories (the newest; default: runs)")
    add("--data", metavar="DIR",
        help="data set, or toy (default: what the checkpoint was trained on, otherwise ADE20K)")
    add("--split", default="validation",
        help="images/SPLIT and annotations/SPLIT (default: validation)")
    add("--image", metavar="FILE_OR_DIR",
        help="label this picture, or all below this folder, instead of a data set; needs --show or "
        "--save-labels")
    add("--scales", type=list_of_scales, default=(1.0,),
        help="picture sizes relative to --short-side, e.g. 0.5,1; 0.5,...,1.75 means steps of "
        "0.25 (default: 1)")
    add("--flip", action="store_true", help="add the mirrored picture at every scale")
    add("--short-side", type=POSITIVE,
        help="short side of pictures at scale 1, in pixels (default: as trained, otherwise 512)")
    add("--slide", type=COUNT, default=0,
        help="label square windows with this side, in pixels, instead of whole pictures, e.g. 512")
    add("--stride", type=COUNT, default=0,
        help="pixels from one window to the next, e.g. 341")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto (default): bfloat16 where the hardware has it, otherwise float32; on V100 and "
        "T4 float16 is several times as fast")
    add("--workers", type=COUNT, default=min(8, CORES),
        help="processes that read and resize pictures (default: one a core, at most 8)")
    add("--compile", action="store_true",
        help="torch.compile the model: a minute for each new picture size, then faster")
    add("--json", metavar="FILE",
        help="write scores, confusion matrix (rows are true classes) and protocol")
    add("--save-labels", metavar="DIR",
        help="write one png a picture, with the values of the data set's own label files")
    add("--show", metavar="DIR",
        help="write one sheet a picture: picture, truth where it is known, prediction, legend")
    add("--opacity", type=SHARE, default=0.6,
        help="opacity of the classes' colours over the pictures, 0 to 1 (default: 0.6)")
    return parser


def list_of_scales(text: str) -> tuple:
    """ "0.5,0.75,1" -> (0.5, 0.75, 1.0); "0.5,...,1.75" means steps of 0.25."""
    scales = tuple(map(at_least(0.01, float, 100), text.replace(",...", "").split(",")))
    if ",..." in text:
        first, last = sorted(scales)
        return tuple(np.arange(first, last + 1e-9, 0.25).tolist())
    return scales


def at_least(low: float, kind: type = int, high: float = 1e18) -> Callable:
    """-> an argparse type: an int or float from low to high, which keeps out absurd numbers."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # nan is neither above nor below
            raise ArgumentTypeError(f"{text} is not a number from {low} to {high:g}")
        return value

    return number


POSITIVE, COUNT = at_least(1), at_least(0)
REAL, SHARE = at_least(0, float), at_least(0, float, 1)


class UsageError(UserError):
    """The command line asks for what cannot be done."""


# ---- Devices and number formats ------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16")
NO_GPU = (
    "torch from PyPI needs driver 580 and a GPU of 2018 or later, for others install it from "
    "PyTorch's cu126 index, see README.md"
)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that --dtype means: auto is bfloat16 where the hardware is known to compute in it,
    otherwise float32. (Emulated bfloat16 is slower than float32. Apple's M1 and M2 emulate it, and
    torch cannot tell.)"""
    if name != "auto":
        return getattr(torch, name)

    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu.get_capabilities().get("avx512_bf16")  # (CPUs with AMX have it too)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Inside it matrix products and convolutions are computed in dtype. Weights, the residual
    stream with its LayerNorms, and the loss stay in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """How maps lie in memory: channels last, except where that is slow or wrong. In float32 it
    makes gradients of weights take three times as long on CPUs, and GPUs before 2020 are faster
    without it. On Apple's GPUs the gradient of BatchNorm is wrong in channels last (pytorch issue
    175189)."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if device.type == "mps" or (dtype == torch.float32 and (old or device.type == "cpu")):
        return torch.contiguous_format
    return torch.channels_last


def prepare(
    model: Segmenter, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Segmenter:
    """Move the model to the device, in the memory format of its maps. compiled: torch.compile its
    parts; each new size of input is compiled again.

    With a 16-bit dtype, CUDA may round what stays float32, the products of loss and prediction, to
    TF32's 10 bits for its tensor cores. With float32 neither products nor convolutions do so."""
    if device.type == "cuda":
        with about(f"{device}: {NO_GPU}", UsageError):
            torch.ones(1, device=device).item()  # needs a kernel for this GPU
        exact = dtype == torch.float32
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact
    if compiled:
        for part in model.children():
            part.compile(dynamic=False)
        model.block_loss = torch.compile(summed_cross_entropy, dynamic=False)
    return model.to(device, memory_format=memory_format(device, dtype))


# ---- Processes -----------------------------------------------------------------------------------
# Only this part uses what some platforms lack. Everything works without it, with less comfort.

# Signals that ask a program to stop: Ctrl-C, a terminal that is closed, and two that clusters send.
# (Windows lacks half of them.)
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1")]


def setup_processes(timeout: float = 1800) -> tuple:
    """-> (rank, number of processes, device). Under torchrun it joins the others: NCCL for tensors
    on CUDA, gloo on CPUs. If one has not answered gloo for `timeout` seconds, all others end with a
    RuntimeError."""
    keep_memory()
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        # How many tasks srun or mpirun started. (A shell of salloc has SLURM_NTASKS too.)
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        if tasks != "1":
            raise UsageError(
                "srun or mpirun started several tasks, each would do the whole work: start one a "
                "node, `srun --ntasks-per-node 1 torchrun --nproc_per_node GPUS_OF_A_NODE ...`"
            )
        return 0, 1, choose_device(1)

    wait = timedelta(seconds=timeout)
    with about("start with torchrun, or unset RANK and WORLD_SIZE", UsageError):
        if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):  # torch would wait for ever
            raise ValueError("RANK is not below WORLD_SIZE")
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    device = choose_device(world)

    # When torchrun restarts its processes, its store still holds the addresses of the dead ones,
    # and half of the restarts wait for them in vain (torch 2.13, with --standalone too). A prefix
    # for each try keeps old and new addresses apart. Not with several nodes: each counts its own
    # tries, so prefixes would separate processes that belong together.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)

    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)
    return rank, world, device


# How many cores of the CPU this process may use.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def choose_device(world: int) -> torch.device:
    """This process's GPU, number LOCAL_RANK of those that torch finds; the CPU if there is no GPU.
    Several processes on a Mac take the CPU too: they can only talk by gloo, which knows only
    tensors on CPUs."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None and torch.version.cuda and "CUDA_VISIBLE_DEVICES" not in os.environ:
        warn(f"warning: no GPU is found, this runs on the CPU; {NO_GPU}")
    if device is None or (device.type == "mps" and world > 1):
        return torch.device("cpu")

    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


# What errors say for which there is a way out, and the way out.
WAYS_OUT = {
    "DataLoader": "a process that reads pictures has died or hangs, take fewer --workers, or 0",
    "[Tt]imed out|onnection (closed|reset)|Broken pipe": "another process has died or hangs, "
    "continue a training with --resume",  # (gloo's words)
    r"C(\+\+)? compiler": "--compile needs a C++ compiler, install g++ or leave it out "
    "(train.py --resume: --no-compile)",
    "invalid device ordinal": "start no more processes on a node than it has GPUs",
    "MemoryError|out of memory|(not enough|allocate) memory": "the memory is too small, take "
    "smaller pictures, fewer pictures at a time or fewer --workers",
}


@contextmanager
def ways_out() -> Iterator:
    """An error of torch or numpy that the user can mend becomes a UsageError. gloo raises one when
    another process is gone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        for pattern, way in WAYS_OUT.items():
            if re.search(pattern, repr(error)):
                raise UsageError(f"{way}: {first_line(error)}")
        raise


def keep_memory() -> None:
    """Let glibc keep the memory of arrays below 80 MB when they are freed. (Larger ones would leave
    large holes.) Otherwise it returns them to the system and gets the next one page by page, each
    page filled with zeros first: a third of the time of the transforms."""
    with suppress(Exception):  # no C library, or another one
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 80_000_000)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        mallopt(-1, 2_147_483_647)  # M_TRIM_THRESHOLD: the heap does not shrink


def start_worker(worker: int) -> None:
    """Runs first in each of a loader's processes."""
    # A signal may go to the whole process group. The main process answers it, and may still need
    # its loaders until the checkpoint is saved.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    keep_memory()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End a loader when the main process is killed. torch checks that only between two pictures: a
    loader that is blocked handing one over would stay, and keep sockets open on which other
    processes wait."""
    parent_process().join()
    os._exit(1)


def ignore_deaths() -> None:
    """Remove torch's handler of SIGCHLD: when a loader dies, it raises an error wherever this
    process is just then. The code that waits for the loader gets an error of its own."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@atexit.register
def end_loaders() -> None:
    """Runs when the main process ends. Otherwise multiprocessing would send its loaders SIGTERM,
    which they ignore, and wait for them."""
    ignore_deaths()
    for child in active_children():
        child.kill()


@contextmanager
def end_alone() -> Iterator:
    """One of several processes that ends early must not wait for the others: they may be waiting
    for it in an all-reduce. NCCL would wait at exit. With gloo, torch's threads that still listen
    would abort the process (SIGABRT) about one time in fifteen."""
    try:
        yield
    except BaseException as end:
        if not dist.is_initialized():
            raise
        if not isinstance(end, SystemExit):
            traceback.print_exc()
        end_loaders()
        os._exit(getattr(end, "code", 1))
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until all processes are here. No process may leave before: others would miss it, and
    torchrun would end them."""
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
