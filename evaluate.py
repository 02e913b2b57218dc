"""Evaluation: one label per pixel for whole pictures, at one scale or several, flipped or not; the
metric; the pictures.

    picture --resize to (2048, 512) x scale--> model --> logits --bilinear--> the picture's own size --> softmax
            --mean over scales and flips--> argmax --> label --> confusion matrix (C, C) --> IoU per class --> mIoU

The metric is that of FCN (Long et al. 2015, arXiv:1411.4038, section 5): intersection over union,
from one confusion matrix of the whole data set (not a mean over pictures). A class that is neither
there nor predicted has no IoU (0 / 0) and is left out of the mean. The protocol is the reference's:
two bilinear steps (to the resized picture, then to its own size), the mean of the softmax outputs
rather than of the logits."""

import argparse
import atexit
import ctypes
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from glob import glob
from multiprocessing import active_children, get_start_method, parent_process

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ade20k import (
    DEFAULT_ROOT,
    Classes,
    DataError,
    data_root,
    find_pairs,
    load_pair,
    normalise,
    progress,
    read_classes,
    resize_bilinear,
    scaled_size,
)
from convert_weights import WeightsError, describe, load_into, load_weights
from upernet import IGNORE_INDEX, BLOCK, Segmenter, build_model, interpolation_matrix, resize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(Exception):
    """An option that cannot be met, in one sentence."""


# ---- where and how to compute --------------------------------------------------------------------


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype; auto is bfloat16 where the hardware computes in it (a CPU that emulates it would be
    slower), else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and newer
    else:
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products and convolutions in dtype, the rest (norms, softmax, loss) in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """How maps lie in memory: channels last, but for float32 on CPUs, where gradients of weights
    then take thrice the time."""
    return (
        torch.contiguous_format
        if (device.type, dtype) == ("cpu", torch.float32)
        else torch.channels_last
    )


def prepare(
    model: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool
) -> nn.Module:
    """The model on the device, in its layout; compiled by parts and, since `H % patch` asks for it,
    for each size of input."""
    for part in model.children() if compiled else ():
        part.compile(dynamic=False)
    return model.to(device, memory_format=memory_format(device, dtype))


# ---- inference -----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: Segmenter,
    image: np.ndarray,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    short: int = 512,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Label a whole picture. model in eval mode; image (H, W, 3) uint8 RGB -> (H, W) uint8, class
    0..C-1 of each pixel.

    Each scale s resizes into (4 short, short) * s, keeping the aspect; flip adds the mirrored
    picture to every scale."""
    (H, W), device, views = image.shape[:2], next(model.parameters()).device, []
    for scale in sorted(scales, reverse=True):  # what the largest leaves free holds the others
        h, w = scaled_size(H, W, int(4 * short * scale), int(short * scale))
        x = normalise(
            torch.tensor(resize_bilinear(image, h, w)[None], device=device)
        )  # (1, 3, h, w)
        x = (torch.cat([x, x.flip(3)]) if flip else x).contiguous(
            memory_format=memory_format(device, dtype)
        )
        with autocast(device, dtype):  # one batch, but on CPUs two: as fast, in half the memory
            small = [
                model.decode_head(model.features(part))
                for part in x.split(1 if device.type == "cpu" else 2)
            ]
        small = (
            torch.cat(small).float().contiguous(memory_format=torch.channels_last)
        )  # (1 or 2, C, h', w')
        # The two bilinear steps of the protocol, h' x w' -> h x w -> H x W, are taken below for
        # some rows at a time, along x and then, as one matrix, along y: (C, H, W) exists for none
        # of the views, however many there are.
        M = interpolation_matrix(h, H, small) @ interpolation_matrix(
            small.shape[2], h, small
        )  # (H, h')
        views += [(M, w, v.flip(3) if k else v) for k, v in enumerate(small.split(1))]
    C, rows = small.shape[1], []
    step = max(1, BLOCK.get(device.type, 2**26) // (C * W))
    for start in range(0, H, step):
        total = 0
        for M, w, v in views:
            m = M[start : start + step]  # (r, h'), all zero but for a few columns
            used = m.any(0).nonzero().flatten().tolist()
            a, b = used[0], used[-1] + 1
            wide = resize(resize(v[:, :, a:b], (b - a, w)), (b - a, W))  # (1, C, b - a, W)
            logits = (m[:, a:b] @ wide[0].permute(1, 2, 0).flatten(1)).view(len(m), W, C)
            total = total + (
                logits.softmax(2) if len(views) > 1 else logits
            )  # of one view, the argmax is the same
        rows.append(total.argmax(2).to(torch.uint8))
    return torch.cat(rows).cpu().numpy()


def confusion_matrix(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) uint8 twice -> (C, C) int64, pixels with row = true class, column = predicted; 255 in
    label is left out."""
    kept = label != IGNORE_INDEX
    cells = label[kept].astype(np.int64) * num_classes + prediction[kept]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrix: np.ndarray) -> dict:
    """(C, C) confusion matrix -> mIoU, mAcc, aAcc in percent and lists IoU, Acc per class, None
    where there is none.

    IoU needs the class in truth or prediction, Acc in truth; the means are over the classes that
    have one."""
    hit, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, and means "no such class"
        iou, acc = 100 * hit / (true + predicted - hit), 100 * hit / true
        overall = 100 * hit.sum() / matrix.sum()
    mean = {"mIoU": iou, "mAcc": acc, "aAcc": np.array([overall])}
    result = {k: None if np.isnan(v).all() else float(np.nanmean(v)) for k, v in mean.items()}
    return result | {
        k: [None if np.isnan(x) else float(x) for x in v] for k, v in (("IoU", iou), ("Acc", acc))
    }


def evaluate(
    model: nn.Module,
    pairs: list[tuple[str, str | None]],
    classes: Classes,
    matrix: np.ndarray,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    **how,
) -> Iterator[tuple]:
    """Label all pictures, and yield (i, path, image, label, prediction) of those of this process.
    matrix (C, C) int64 is filled in place; after the last picture it is the sum over all processes.

    pairs: (image path, label path or None). how: predict's scales, flip, short and dtype."""
    mine, C = list(range(rank, len(pairs), world)), len(
        classes.names
    )  # without padding: none is counted twice
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=None,
        sampler=mine,
        collate_fn=partial(load_pair, classes=classes),
        num_workers=workers,
        worker_init_fn=start_worker,
    )
    started, was_training = time.monotonic(), model.training
    model.eval()
    for n, (path, image, label) in enumerate(loader, start=1):
        prediction = predict(model, image, **how)
        if label is not None:
            matrix += confusion_matrix(label, prediction, C)
        yield mine[n - 1], path, image, label, prediction
        rate = n / (time.monotonic() - started)
        if rank == 0:
            progress(
                f"{n} of {len(mine)} pictures, {rate:.2f} a second, {(len(mine) - n) / rate:.0f} s left",
                started,
            )
    progress("", started)
    model.train(was_training)
    if world > 1:
        dist.all_reduce(
            torch.from_numpy(matrix)
        )  # a view of it; on the CPU (gloo) also beside NCCL


def table(result: dict, classes: tuple[str, ...]) -> str:
    """The scores per class and their summary as text."""
    lines = [f"{'class':24s}{'IoU':>8s}{'Acc':>8s}"]
    percent = lambda x: "      --" if x is None else f"{x:8.2f}"  # noqa: E731
    shown = [k for k, x in enumerate(result["IoU"]) if x is not None]
    lines += [
        f"{classes[k]:24s}{percent(result['IoU'][k])}{percent(result['Acc'][k])}" for k in shown
    ]
    absent = [name for k, name in enumerate(classes) if k not in shown]
    if absent:
        lines += textwrap.wrap(
            f"absent, not in the means ({len(absent)}): {', '.join(absent)}",
            100,
            subsequent_indent="  ",
        )
    lines.append(
        f"mIoU {percent(result['mIoU'])}  mAcc {percent(result['mAcc'])}  aAcc {percent(result['aAcc'])}  "
        f"({len(shown)} of {len(classes)} classes)"
    )
    return "\n".join(lines)


# ---- pictures ------------------------------------------------------------------------------------


def sheet(
    rows: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]],
    classes: Classes,
    opacity: float = 1,
) -> Image.Image:
    """One row of panels for each (picture (H, W, 3), truth or None, prediction (H, W), all uint8),
    a legend below. With truth: picture, truth, prediction, 160 to 400 pixels wide. Without: the
    prediction alone, at the picture's own size. Colours lie over the picture with an opacity of 0
    to 1."""
    titles, size, gap = (
        ["prediction"] if rows[0][1] is None else ["picture", "truth", "prediction"],
        15,
        8,
    )
    width = max(
        160, min(400 if titles[1:] else 4000, max(row[0].shape[1] for row in rows))
    )  # of one panel
    font, panels = ImageFont.load_default(size), []
    palette = np.uint8(
        classes.palette + [[0, 0, 0]] * (256 - len(classes.palette))
    )  # what nobody labelled is black
    for image, truth, prediction in rows:
        shape = width, round(width * image.shape[0] / image.shape[1])
        picture = Image.fromarray(image).resize(shape, Image.LANCZOS)
        layers = [Image.fromarray(palette[x]) for x in (truth, prediction) if x is not None]
        layers = [
            Image.blend(picture, layer.resize(shape, Image.NEAREST), opacity) for layer in layers
        ]
        panels.append([picture] * len(titles[1:2]) + layers)
    counts = sum(
        np.bincount(x.ravel(), minlength=256) for row in rows for x in row[1:] if x is not None
    )
    legend = [
        (classes.names[k], tuple(classes.palette[k]))
        for k in np.argsort(-counts[:IGNORE_INDEX])
        if counts[k]
    ]
    legend += [("not labelled", (0, 0, 0))] * bool(counts[IGNORE_INDEX])
    cell = max(size + 3 * gap + font.getlength(name) for name, _ in legend)
    total = int(max(gap + len(titles) * (width + gap), gap + cell))
    columns = int((total - gap) // cell)
    top = size + 2 * gap
    bottom = top + sum(row[0].height + gap for row in panels)
    canvas = Image.new(
        "RGB", (total, bottom + gap + -(-len(legend) // columns) * (size + gap)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        draw.text((gap + i * (width + gap), gap), title, "black", font)
    for row in panels:
        for i, panel in enumerate(row):
            canvas.paste(panel, (gap + i * (width + gap), top))
        top += row[0].height + gap
    for i, (name, rgb) in enumerate(legend):  # read down the columns, largest class first
        x = gap + (i // -(-len(legend) // columns)) * cell
        y = bottom + (i % -(-len(legend) // columns)) * (size + gap)
        draw.rectangle((x, y, x + size, y + size), rgb, "black")
        draw.text((x + size + gap, y + size / 2), name, "black", font, anchor="lm")
    return canvas


def curves(entries: list[dict]) -> Image.Image:
    """Loss, learning rate and mIoU against the iteration, one below the other, 800 pixels wide.
    entries: a run's log."""
    names = {"loss": "training loss", "lr": "learning rate", "mIoU": "validation mIoU (%)"}
    lines = {
        name: [(e["iteration"], e[key]) for e in entries if e.get(key) is not None]
        for key, name in names.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    font, left, right, high = (
        ImageFont.load_default(15),
        90,
        780,
        210,
    )  # of one plot; its axes cross at (left, high - 40)
    canvas = Image.new("RGB", (800, high * len(lines) + 20), "white")
    draw, last = ImageDraw.Draw(canvas), max(e["iteration"] for e in entries)

    def ticks(top: float) -> np.ndarray:  # 0, 1, 2, ... or in steps of 2 or 5, times a power of 10
        unit = 10 ** np.floor(np.log10(top / 3))
        return np.arange(
            0, top * 1.0001, unit * max(k for k in (1, 2, 5) if k * unit <= top / 3 * 1.0001)
        )

    for row, (name, points) in enumerate(lines.items()):
        top = max(v for _, v in points) or 1
        base = high * (row + 1) - 20
        at = lambda i, v: (
            left + (right - left) * i / last,
            base - (high - 70) * v / top,
        )  # noqa: E731, B023
        for v in ticks(top):
            draw.line([at(0, v), at(last, v)], "lightgrey")
            draw.text((left - 8, at(0, v)[1]), f"{v:.3g}", "black", font, anchor="rm")
        for i in ticks(last):
            draw.line([at(i, 0), at(i, top)], "lightgrey")
            draw.text((at(i, 0)[0], base + 6), f"{i:.0f}", "black", font, anchor="mt")
        draw.text((left, base - high + 65), name, "black", font, anchor="lb")
        draw.line([at(*point) for point in points], (31, 119, 180), 2)
        if len(points) < 30:  # few points are dots, one alone would be no line at all
            for x, y in [at(*point) for point in points]:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), (31, 119, 180))
    draw.text((right, canvas.height - 2), "iteration", "black", font, anchor="rb")
    return canvas


# ---- processes ---------------------------------------------------------------------------------

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # that ask to stop: Ctrl-C, and clusters in two customs


def setup_processes(timeout: float = 1800) -> tuple[int, int, torch.device]:
    """-> (rank, number of processes, device). Under torchrun joins the others: NCCL for tensors on
    GPUs, gloo on CPUs; RuntimeError in all of them when one has not answered for `timeout`
    seconds."""
    keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        meet = {}
        if (
            os.environ.get("GROUP_WORLD_SIZE") == "1"
        ):  # torchrun, one node. Where it restarts its processes, its store
            # still holds the addresses of the dead ones (pytorch issue 135712): a prefix for each
            # try keeps them apart.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
            )
            prefix = f"try {os.environ['TORCHELASTIC_RESTART_COUNT']}"
            meet = dict(store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            **meet,
        )
    return rank, world, device


def keep_memory() -> None:
    """glibc gives large arrays back when they are freed, and gets the next ones zeroed, page by
    page: 40% of the time of the transforms, 10% of the model's on a CPU. From here on it keeps
    those below 80 MB (larger ones would leave large holes)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 80_000_000)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: which does not shrink


def start_worker(worker: int) -> None:
    """In each of a loader's processes. A signal to the whole group is the main process's to answer;
    but where that one is killed its loaders die with it, or they would hold its connections open
    and the other processes would wait on them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    keep_memory()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # 1: PR_SET_PDEATHSIG, the signal when the parent dies
        if get_start_method() == "fork" and os.getppid() != parent_process().pid:
            os._exit(1)  # it has died already


@atexit.register
def kill_workers() -> None:
    """When the main process ends: multiprocessing would send SIGTERM, which start_worker has its
    processes ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # (torch's handler would report them as lost)
    for child in active_children():
        if child.daemon:
            child.kill()


# ---- python evaluate.py --------------------------------------------------------------------------


def parse_scales(text: str) -> tuple[float, ...]:
    """ "0.5,0.75,1" -> (0.5, 0.75, 1.0); "0.5,...,1.75" means steps of 0.25. argparse's error if it
    is something else."""
    try:
        parts = text.split(",")
        if "..." in parts:
            first, dots, last = parts
            parts = np.arange(float(first), float(last) + 1e-9, 0.25) if dots == "..." else parts
        scales = tuple(float(x) for x in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers like 0.5,1,1.5 or 0.5,...,1.75"
        ) from None
    if not scales or not all(0 < s <= 16 for s in scales):
        raise argparse.ArgumentTypeError(f"{text!r}: scales must be above 0 and at most 16")
    return scales


def checkpoints(folder: str) -> list[str]:
    """The checkpoint_*.pt in a work directory and in those below it, the last written first.
    UsageError if there is none."""
    found = glob(os.path.join(folder, "checkpoint_*.pt")) + glob(
        os.path.join(folder, "*", "checkpoint_*.pt")
    )
    if not found:
        raise UsageError(
            f"{folder}: no checkpoint_*.pt in it, train one with `python train.py --data toy` or name a "
            "file with --checkpoint"
        )
    return sorted(found, key=os.path.getmtime, reverse=True)


def load_model(path: str) -> tuple[nn.Module, dict]:
    """The model a checkpoint describes, with its weights, on the CPU, in eval mode. -> (model,
    facts)"""
    state_dict, facts = load_weights(path)
    if facts["neck"] is None:
        raise UsageError(
            f"{path}: a {facts['kind']} has no segmentation head to evaluate, train it first with "
            "`python train.py --pretrained FILE`"
        )
    with torch.device("meta"):  # no initialisation: load_into sets every value, or fails
        model = build_model(facts["arch"], facts["neck"], facts["num_classes"])
    load_into(model.to_empty(device="cpu"), state_dict, facts)
    return model.eval(), facts


def inputs(
    args: argparse.Namespace, path: str, facts: dict
) -> tuple[list[tuple[str, str | None]], Classes]:
    """The (image, label or None) paths that the command line asks for, and what their labels mean
    to the checkpoint."""
    n = facts[
        "num_classes"
    ]  # of a file that does not name its classes: ADE20K's, or numbers for names
    classes = (
        Classes(*facts["classes"])
        if "classes" in facts
        else (
            Classes()
            if n == len(Classes().names)
            else Classes(tuple(f"class {k}" for k in range(n)), (Classes().palette * 2)[:n])
        )
    )
    if not args.image:
        root = data_root(args.data)
        there = read_classes(root)
        if (
            len(there.names) != len(classes.names)
            or "classes" in facts
            and there.names != classes.names
        ):
            raise UsageError(
                f"{path}: knows {len(classes.names)} classes ({', '.join(classes.names[:3])}, ...), {root} has "
                f"{len(there.names)} ({', '.join(there.names[:3])}, ...): train on that data first"
            )
        return find_pairs(root, args.split), there
    if not os.path.isdir(args.image):
        return [(args.image, None)], classes
    files = sorted(
        f
        for f in os.listdir(args.image)
        if f.lower().endswith(tuple(Image.registered_extensions()))
    )
    if not files:
        raise DataError(f"{args.image}: holds no pictures")
    return [(os.path.join(args.image, f), None) for f in files], classes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what cannot be met together is refused here."""
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint on a data set, or label pictures with it.",
        epilog="example: python evaluate.py --checkpoint upernet_deit-s16.pth --flip --scales 0.5,...,1.75",
    )
    add = parser.add_argument_group("what").add_argument
    add(
        "--checkpoint",
        metavar="FILE",
        help="any file convert_weights.py reads, a URL, or a work directory (default: the "
        "newest under runs/)",
    )
    add(
        "--data",
        metavar="DIR",
        help=f"data set, or toy (default: what the checkpoint was trained on, else {DEFAULT_ROOT})",
    )
    add(
        "--split",
        default="validation",
        help="images/SPLIT and annotations/SPLIT (default: validation)",
    )
    add(
        "--image",
        metavar="FILE_OR_DIR",
        help="label these pictures instead; needs --show or --save-labels",
    )
    add = parser.add_argument_group("how").add_argument
    add(
        "--scales",
        type=parse_scales,
        default=(1.0,),
        metavar="S,S,...",
        help="sizes relative to (2048, 512); 0.5,...,1.75 means steps of 0.25 (default: 1)",
    )
    add("--flip", action="store_true", help="add the mirrored picture at every scale")
    add(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="of pictures at scale 1 (default: as trained, else 512)",
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto (default): bfloat16 if in hardware, else float32",
    )
    add("--workers", type=int, default=2, help="processes that read pictures (default: 2)")
    add(
        "--compile",
        action="store_true",
        help="torch.compile the model: a minute at each new size of pictures, then faster",
    )
    add(
        "--dry-run",
        action="store_true",
        help="load the checkpoint, look at the data, print the plan or what is missing",
    )
    add = parser.add_argument_group("results").add_argument
    add("--json", metavar="FILE", help="write scores and protocol")
    add(
        "--save-labels",
        metavar="DIR",
        help="write one png a picture, with the values of the data set's own label files",
    )
    add(
        "--show",
        metavar="DIR",
        help="write one sheet a picture: picture, truth, prediction, legend; with --image an overlay",
    )
    add(
        "--opacity",
        type=float,
        default=0.6,
        help="of the classes' colours over the pictures, 0 to 1 (default: 0.6)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        parser.error(f"--opacity {args.opacity} must be 0 to 1")
    if args.image and not (args.show or args.save_labels):
        parser.error("--image needs --show DIR or --save-labels DIR, or nothing would come out")
    if args.image and args.json:
        parser.error("--json holds scores, and --image has no labels to score with")
    return args


def run(args: argparse.Namespace) -> None:
    rank, world, device = setup_processes()
    dtype, path = choose_dtype(args.dtype, device), args.checkpoint or "runs"
    missing = [
        x for x in (path, args.image or args.data or path) if not os.path.exists(x) and x != "toy"
    ]
    if args.dry_run and missing:
        if rank == 0:
            print(f"{missing[0]}: not there yet, the rest of the command is in order")
        return
    path = checkpoints(path)[0] if os.path.isdir(path) or not args.checkpoint else path
    model, facts = load_model(path)
    trained = facts.get("args", {})  # of our own checkpoints
    args.data = args.data or trained.get("data", DEFAULT_ROOT)
    short = args.short_side or trained.get("short_side", 512)
    pairs, classes = inputs(args, path, facts)
    if rank == 0:
        print(
            f"{path}: {describe(facts)}\n{args.image or args.data}: {len(pairs)} pictures, short side {short}, scales "
            f"{','.join(f'{s:g}' for s in args.scales)}{' with flip' if args.flip else ''}, {dtype}, {world} x {device.type}".replace(
                "torch.", ""
            ),
            flush=True,
        )
    if args.dry_run:
        return
    for folder in filter(None, (args.show, args.save_labels)):
        os.makedirs(folder, exist_ok=True)

    def write(
        i: int, path: str, image: np.ndarray, label: np.ndarray | None, prediction: np.ndarray
    ) -> None:
        stem = os.path.splitext(os.path.basename(path))[0]
        if args.save_labels:
            values = prediction + np.uint8(classes.zero_ignored)
            Image.fromarray(values).save(os.path.join(args.save_labels, stem + ".png"))
        if args.show:
            sheet([(image, label, prediction)], classes, args.opacity).save(
                os.path.join(args.show, stem + ".png")
            )

    started = time.monotonic()
    matrix = np.zeros((len(classes.names),) * 2, np.int64)
    for row in evaluate(
        prepare(model, device, dtype, args.compile),
        pairs,
        classes,
        matrix,
        rank,
        world,
        args.workers,
        scales=args.scales,
        flip=args.flip,
        short=short,
        dtype=dtype,
    ):
        write(*row)
    if rank == 0:
        progress(
            f"{len(pairs)} pictures, {len(pairs) / (time.monotonic() - started):.2f} a second",
            started,
            done=True,
        )
        for folder in filter(None, (args.show, args.save_labels)):
            print(f"{folder}: {len(pairs)} files written")
        if not args.image:
            result = scores(matrix)
            print(table(result, classes.names))
            if args.json:
                protocol = dict(
                    checkpoint=path,
                    data=args.data,
                    split=args.split,
                    images=len(pairs),
                    scales=list(args.scales),
                    flip=args.flip,
                    short_side=short,
                    dtype=str(dtype).removeprefix("torch."),
                )
                with open(args.json, "w") as file:
                    json.dump(
                        result | {"classes": list(classes.names), "protocol": protocol},
                        file,
                        indent=1,
                    )
    if world > 1:
        dist.barrier()  # nobody leaves while another may still be talking to it
        dist.destroy_process_group()


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """What the user can mend ends the program with its one sentence and code 2, without a
    traceback."""
    try:
        yield
    except (DataError, WeightsError, UsageError, OSError) as error:
        # A loader's process wraps the sentence in its traceback: keep the sentence.
        print(f"error: {str(error).rsplit('DataError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    args = parse()
    with errors_in_one_sentence():
        run(args)


if __name__ == "__main__":
    main()
