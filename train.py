"""Training: the published recipes, from pretrained weights to a checkpoint, on one process or many.

    batch (B, 3, S, S) uint8, (B, S, S) uint8 --normalise--> model --> loss --> backward --> step

First the schedule, the optimizer and the arithmetic of a batch, then `train()`, the loop. After it
what the loop calls: the parts of a run, its log and its validation; what may go wrong in a week;
and the command line.

What the published runs did, where it differs from what their configs say:

- "No weight decay for norm layers": the key is `norm`, the layers are called `ln1`, `ln2`, so
  nothing matches. LayerNorm and BatchNorm decay; only cls_token and pos_embed do not. Same here.
- The poly factor goes on during the warmup: both are multiplied.

--optimizer sgd is mmsegmentation's default schedule, which all of these recipes override: no
warmup, a floor of 1e-4, and everything decays."""

import json
import math
import os
import re
import signal
import sys
import zipfile
import zlib
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from glob import escape, glob
from os.path import basename, dirname, exists, isdir, join, normpath
from time import monotonic
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ade20k import (
    DEFAULT_ROOT,
    Classes,
    TrainSet,
    data_root,
    errors_in_one_sentence,
    find_pairs,
    first_line,
    label_warnings,
    normalise,
    one_line,
    positions,
    progress,
    read_classes,
)
from convert_weights import (
    PRETRAINED,
    WeightsError,
    describe,
    load_into,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from evaluate import (
    COUNT,
    DTYPES,
    FACTOR,
    POSITIVE,
    RATE,
    REAL,
    SIGNALS,
    SIZE,
    WORKERS,
    UsageError,
    autocast,
    checkpoints,
    choose_dtype,
    curves,
    evaluate,
    find_checkpoints,
    leave_processes,
    memory_format,
    prepare,
    scores,
    setup_processes,
    sheet,
    start_worker,
)
from model import ARCHS, NECKS
from upernet import Segmenter, build_model

OPTIMIZERS = {
    "adamw": dict(lr=6e-5, power=1.0, floor=0.0, warmup=1500),
    "sgd": dict(lr=0.01, power=0.9, floor=1e-4, warmup=0),
}
WEIGHT_DECAY = {"adamw": 0.01, "sgd": 5e-4}
PATIENCE = 5  # losses in a row that are not finite, until a run ends
LOG_EVERY = 50  # iterations


def learning_rate(i: int, iters: int, lr: float, power: float, floor: float, warmup: int) -> float:
    """The rate of iteration i = 0 .. iters - 1: poly decay from lr to floor, times a warmup that is
    linear from 1e-6 to 1.

    Poly (DeepLab, Chen et al. 2017, arXiv:1606.00915, section 4.1): far from a minimum large steps
    help, near it their noise is all that is left, and a rate that falls all the time needs nobody
    to say when the one becomes the other. Warmup: Adam's first steps have the full size `lr` for
    every weight, however small its gradient, since its averages are of one batch; and the heads,
    still random, would send the pretrained backbone anywhere."""
    rate = (lr - floor) * (1 - i / iters) ** power + floor

    if i < warmup:
        rate *= 1 - (1 - i / warmup) * (1 - 1e-6)
    return rate


def build_optimizer(
    model: Segmenter,
    name: str,
    lr: float,
    weight_decay: float | None = None,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or SGD, published betas, momentum and,
    if None is given, weight decay. fused: one kernel for all weights, same arithmetic.

    Each group's "scale" multiplies its learning rate: layer_decay ** (depth + 1 - k) for layer k,
    where the embeddings are 0, the blocks 1 to depth, and neck and heads, new as they are,
    depth + 1 (BEiT, Bao et al. 2022, arXiv:2106.08254; MAE, He et al. 2022, arXiv:2111.06377, both
    in the appendix): early layers of a pretrained backbone are general, and need little change."""
    if weight_decay is None:
        weight_decay = WEIGHT_DECAY[name]

    depth = len(model.backbone.blocks)
    weights = defaultdict(list)
    for key, weight in model.named_parameters():
        # Neither tokens nor positions multiply anything: pulling them to 0 regularises
        # nothing. (The default SGD pulls them all the same.)
        exempt = name == "adamw" and key.endswith(("cls_token", "pos_embed", "reg_token"))
        scale = layer_decay ** (depth + 1 - layer_of(key, depth))
        if weight.requires_grad:
            weights[exempt, scale].append(weight)

    groups = []
    for exempt, scale in sorted(weights):  # checkpoints hold the optimizer's state by position
        decay = 0.0 if exempt else weight_decay
        groups.append(dict(params=weights[exempt, scale], weight_decay=decay, scale=scale))

    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)


def layer_of(key: str, depth: int) -> int:
    """Of a parameter of this name: 0 embeddings, 1 to depth the blocks, depth + 1 what follows."""
    block = re.match(r"backbone\.blocks\.(\d+)\.", key)
    if block:
        return 1 + int(block[1])

    if key.startswith("backbone.") and not key.startswith("backbone.norm."):
        return 0
    return depth + 1


def split_batch(batch: int, world: int, micro: int | None, sync_bn: bool) -> tuple[int, int]:
    """batch = world processes x micro pictures at a time x accumulated. -> (micro, accumulated), or
    UsageError. micro=None: as many as there are."""
    if batch % world:
        good = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UsageError(
            f"a batch of {batch} cannot be shared by {world} processes, {good} could; "
            "or change --batch-size"
        )
    pictures = batch // world  # of each process
    micro = micro or pictures

    good = [n for n in range(1, pictures + 1) if pictures % n == 0 and (n > 1 or sync_bn)]
    if micro == 1 and not sync_bn:
        raise UsageError(
            "one picture at a time leaves BatchNorm a single value to normalise (the 1x1 pooling "
            "of the head): use fewer processes, a larger --batch-size, or another --micro-batch, "
            f"{good or 'none'} would work"
        )
    if pictures % micro:
        raise UsageError(
            f"--micro-batch {micro} does not divide the {pictures} pictures of each process, "
            f"{good} would"
        )
    return micro, pictures // micro


# ---- the loop ------------------------------------------------------------------------------------


def train(args: Namespace, checkpoint: dict) -> None:
    """A run from its first iteration, or the checkpoint's, to its last. All that is random is set
    by (seed, iteration, process), so a resumed run is the run that was never stopped."""
    run = Run(args, checkpoint)
    if args.dry_run:
        return run.say(plan(run))
    begin(run)
    model, optimizer, scaler, device = run.parallel, run.optimizer, run.scaler, run.device
    batches = iter(build_loader(run))

    for i in range(run.start, args.iters):
        rate = learning_rate(i, args.iters, **run.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        torch.manual_seed(dropout_seed(args.seed, i, run.rank))

        batch = next_batch(run, batches)  # this process's part, as uint8: few bytes travel
        images, labels, sizes = (t.to(device, non_blocking=True) for t in batch)
        statistics = [b.clone() for b in run.model.buffers()]  # BatchNorm's, for skip_step

        # Forward and backward, `micro` pictures at a time: their gradients add up. The loss is a
        # mean over all pixels, labelled or not, so the mean over equal parts is that of the batch.
        losses = torch.zeros(3, device=device)  # loss, decode, aux
        for first in range(0, len(images), run.micro):
            end = first + run.micro
            model.require_backward_grad_sync = end == len(images)  # processes talk once (no_sync)

            x = normalise(images[first:end], sizes[first:end])  # (micro, 3, S, S) float32
            x = x.contiguous(memory_format=memory_format(device, run.dtype))
            with autocast(device, run.dtype):
                loss, parts = model(x, labels[first:end].long())
            scaler.scale(loss / run.accumulated).backward()
            losses += torch.stack([loss.detach(), parts["decode"], parts["aux"]]) / run.accumulated

        losses, finite, stop = agree(run, losses)  # waits for the device, once an iteration
        if finite:
            scaler.step(optimizer)
            scaler.update()
        else:
            skip_step(run, i, statistics)
        optimizer.zero_grad()

        n = i + 1
        log(run, n, losses, finite)
        if stop or run.skipped == PATIENCE:
            stop_early(run, n)
        if run.due(n):
            save(run, n)
            validate(run, n)
    finish(run)


def dropout_seed(seed: int, i: int, rank: int) -> int:
    """Of dropout and drop path in iteration i: another one for each process, which holds other
    pictures. 64 bits: 24 of the seed, 30 of i, 10 of the rank. What of the seed is above its
    lowest 24 is mixed into all."""
    return ((seed << 40) + (i << 10) + rank + (seed >> 24) * 0x9E3779B97F4A7C15) % 2**64


def next_batch(run: "Run", batches: Iterator) -> list[Tensor]:
    """The next batch; how long the model has to wait for it is added up."""
    before = monotonic()
    batch = next(batches)
    run.waited += monotonic() - before
    return batch


# ---- the parts of a run --------------------------------------------------------------------------


class Run:
    """The parts of a run, on one of its processes, and how far it is."""

    def __init__(self, args: Namespace, checkpoint: dict):
        self.args = args
        self.start = checkpoint.get("iteration", 0)

        # Where: processes, device, kernels, number format, and who computes what of a batch.
        self.rank, self.world, self.device = setup_processes(args.timeout)
        self.dtype = choose_dtype(args.dtype, self.device)
        self.sync_bn = self.world > 1 and self.device.type == "cuda"
        self.micro, self.accumulated = split_batch(
            args.batch_size, self.world, args.micro_batch, self.sync_bn
        )

        # Data.
        self.train_pairs, self.val_pairs, self.classes = find_data(args, checkpoint)
        self.fingerprint = fingerprint(self.train_pairs)
        self.fingerprint_before = checkpoint.get("names", self.fingerprint)
        self.samples = TrainSet(
            self.train_pairs, args.seed, args.crop_size, args.short_side, self.classes
        )

        # Model. DistributedDataParallel gives all processes the weights of rank 0.
        # self.parallel is its wrapper, or with one process the model itself.
        self.model = self.parallel = start_model(self, checkpoint)
        choose_kernels(args, self.device, self.model)
        if self.world > 1 and not args.dry_run:
            self.parallel = DistributedDataParallel(self.model)

        # Optimizer. The smallest float16 is 6e-8, above many gradients: the scaler multiplies the
        # loss by a power of two that keeps them in range, and divides it out before the step.
        # bfloat16 has float32's range and needs none.
        self.schedule = OPTIMIZERS[args.optimizer] | dict(lr=args.lr, warmup=args.warmup)
        self.optimizer = build_optimizer(
            self.model, args.optimizer, args.lr, args.weight_decay, args.layer_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if checkpoint:
            restore(self, checkpoint)

        # How far it is.
        self.saved = checkpoint.get("path")  # the last checkpoint, None if it could not be written
        self.best = checkpoint.get("best", {})  # the validation with the highest mIoU
        self.skipped = 0  # steps in a row
        self.signals = []  # a signal that asks to stop, and when it came: see watch_signals

        # The log: all lines, and since the last one the sums of loss, decode, aux and of the
        # iterations they are of; the iteration of that line; seconds that the model waited for
        # data; and when the clock was started.
        self.entries = []
        self.window = np.array(checkpoint.get("window", [0.0] * 4))
        self.logged, self.waited, self.clock = self.start, 0.0, monotonic()

    def due(self, n: int) -> bool:
        """Whether iteration n is followed by a checkpoint and a validation."""
        return n % self.args.interval == 0 or n == self.args.iters

    def path(self, name: str) -> str:
        """The path of a file in the work directory."""
        return join(self.args.work_dir, name)

    def say(self, words: str, **entry) -> None:
        """Words for the terminal, and the same as one JSON object a line in WORK_DIR/log.jsonl. Of
        rank 0 alone."""
        if self.rank == 0:
            print(words, flush=True)
            if entry:
                self.entries.append(entry)
                write_or_warn(self.path("log.jsonl"), self.write_log)

    def write_log(self, path: str) -> None:
        """All lines anew, moved into place: never half of one, and what a full disk refused comes
        with the next."""
        with open(path + ".part", "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in self.entries)
        os.replace(path + ".part", path)


def choose_kernels(args: Namespace, device: torch.device, model: Segmenter) -> None:
    """Every crop has one size, so cuDNN may try its kernels once and take the fastest. Or, with
    --deterministic, those that add in the same order every time. On CUDA attention does so in
    torch's strict mode alone, which refuses the gradient of resized positions: where the crops'
    grid is not that of the table, torch warns instead."""
    torch.backends.cudnn.benchmark = not args.deterministic
    if not args.deterministic:
        return

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    side = math.ceil(args.crop_size / model.backbone.patch_embed.patch)
    strict = device.type == "cuda" and model.backbone.grid == (side, side)
    torch.use_deterministic_algorithms(True, warn_only=not strict)


def find_data(args: Namespace, checkpoint: dict) -> tuple[list, list, Classes]:
    """The pairs of files to train on and to validate with, and the classes of their labels."""
    root = data_root(args.data)
    train_pairs = val_pairs = []
    if isdir(root) or not args.dry_run:
        train_pairs = find_pairs(root, "training")
        val_pairs = find_pairs(root, "validation", optional=True)

    classes = read_classes(root)
    before = checkpoint.get("classes", ())
    if str((*before, *classes[len(before) :])) != str(tuple(classes)):  # (older files lack fields)
        raise UsageError(
            f"{root}: its classes are not those that {checkpoint['path']} was trained on, give it "
            f"back its classes.txt or start anew with --pretrained {checkpoint['path']}"
        )
    return train_pairs, val_pairs, classes


def fingerprint(pairs: list) -> str:
    """How many pictures these are, and a checksum of their names, to compare on --resume."""
    names = "\n".join(basename(image) for image, _ in pairs)
    return f"{len(pairs)} training pictures, crc {zlib.crc32(names.encode()):08x} of names"


def build_loader(run: Run) -> DataLoader:
    """This process's part of every batch to come, read and augmented ahead by processes of their
    own. -> images (b, 3, S, S) uint8, labels (b, S, S) uint8, sizes (b, 2)"""
    args = run.args
    return DataLoader(
        run.samples,
        batch_sampler=positions(run.start, args.iters, args.batch_size, run.rank, run.world),
        num_workers=args.workers,
        worker_init_fn=start_worker,
        pin_memory=run.device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
    )


def start_model(run: Run, checkpoint: dict) -> Segmenter:
    """The model on the device, with the checkpoint's weights, pretrained ones, or random ones.

    SyncBN: BatchNorm's mean and variance are taken over the batch of all processes, 16 pictures as
    published. Over the two pictures of one GPU in eight they would be noise. (For GPUs alone.)"""
    args = run.args
    torch.manual_seed(args.seed)

    with torch.device("meta" if args.dry_run else "cpu"):  # a plan needs shapes, no numbers
        model = build_model(args.arch, args.neck, len(run.classes.names))

    if args.dry_run:
        model.to_empty(device="cpu")
    elif checkpoint:
        path = checkpoint["path"]
        weights = load_weights(path)
        try:
            load_into(model, *weights)
        except WeightsError as error:
            raise UsageError(f"{path}: its arguments say otherwise, {error}") from error
    elif args.pretrained != "none":
        load_pretrained(model, args, run.rank, run.world)

    adapt(model, args.drop_path, args.freeze)
    if run.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return prepare(model, run.device, run.dtype, args.compile)


def load_pretrained(model: Segmenter, args: Namespace, rank: int, world: int) -> None:
    """Fetch and load weights, on rank 0. The others wait, make room for a table of positions of the
    same size, and get all with the first broadcast of DistributedDataParallel. What is wrong with
    the file ends all processes."""
    source = PRETRAINED.get(args.arch) if args.pretrained == "auto" else args.pretrained
    if source is None:
        raise UsageError(
            f"there is no pretrained file for {args.arch}: --pretrained none starts from scratch"
        )

    problem = None
    if rank == 0:
        try:
            state_dict, facts = load_weights(source)
            load_into(model, state_dict, facts, new_classes=True)
            print(f"{source}: {describe(facts)}", flush=True)
        except (WeightsError, OSError) as error:
            problem = str(error)

    problem, grid = from_rank_0(world, (problem, model.backbone.grid))
    if problem:
        raise UsageError(problem)
    model.backbone.set_grid(grid)


def adapt(model: Segmenter, drop_path: float | None, freeze: bool) -> None:
    """--drop-path: the rate of the last layer. --freeze: no gradient for the backbone, so autograd
    keeps none of its activations; and no drop path in it, unless asked for, which would be noise
    that nothing can learn from."""
    if freeze:
        model.backbone.requires_grad_(False)
        drop_path = drop_path or 0.0

    if drop_path is not None:
        model.backbone.set_drop_path(drop_path)


def restore(run: Run, checkpoint: dict) -> None:
    """Give optimizer and scaler the state they had. UsageError if it is none of theirs. Their
    settings follow from the arguments, whatever the file says."""
    groups = [dict(group) for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        for weight, state in run.optimizer.state.items():
            wanted = dict(momentum_buffer=weight.shape)
            if run.args.optimizer == "adamw":
                wanted = dict(step=(), exp_avg=weight.shape, exp_avg_sq=weight.shape)
            if {name: value.shape for name, value in state.items()} != wanted:
                raise ValueError("of another model")
        if not all(0 <= value < 2**63 for value in checkpoint["scaler"].values()):
            raise ValueError("a scale that is none")
        if checkpoint["scaler"]:  # a disabled one has no state
            run.scaler.load_state_dict(checkpoint["scaler"])
    except Exception as error:  # there may stand anything
        raise UsageError(
            f"{checkpoint['path']}: the optimizer's state cannot be used ({first_line(error)}), "
            f"start anew with --pretrained {checkpoint['path']}"
        ) from error

    for group, ours in zip(run.optimizer.param_groups, groups):
        group.update(ours)


def plan(run: Run) -> str:
    """What is trained, on what, and the arithmetic of the batch, in two lines."""
    text = (
        "{work_dir}: {arch}, neck {neck}, {count:,} parameters, "
        "{dtype} on {world} x {device.type}\n"
        "batch {batch_size} = {world} processes x {micro} pictures x {accumulated} accumulated; "
        "{data}: {pictures}, iterations {start} to {iters}"
    )

    facts = vars(run.args) | vars(run)
    facts["dtype"] = str(run.dtype).removeprefix("torch.")
    facts["count"] = sum(p.numel() for p in run.model.parameters())
    facts["pictures"] = "the data is not there yet"
    if run.train_pairs:
        facts["pictures"] = f"{len(run.train_pairs)} training pictures"
    return text.format(**facts)


# ---- log and validation --------------------------------------------------------------------------


def log(run: Run, n: int, losses: list[float], finite: bool) -> None:
    """Every 50 iterations, the means of losses (of the steps that were taken) and of times."""
    if finite:
        run.window += [*losses, 1]

    if n % LOG_EVERY and n != run.args.iters:
        if run.rank == 0:
            progress(f"{n} of {run.args.iters} iterations", run.clock)
        return

    loss, decode, aux, _ = (run.window / max(run.window[3], 1)).tolist()
    iterations = n - run.logged
    seconds = (monotonic() - run.clock) / iterations
    hours, minutes = divmod(int((run.args.iters - n) * seconds / 60), 60)
    entry = dict(
        iteration=n,
        loss=loss,
        decode=decode,
        aux=aux,
        lr=max(group["lr"] for group in run.optimizer.param_groups),
        seconds=seconds,
        data_seconds=run.waited / iterations,
        images_per_second=run.args.batch_size / seconds,
    )

    words = (
        "{iteration}/{iters}  loss {loss:.4f} (decode {decode:.4f} + aux {aux:.4f})  lr {lr:.3e}  "
        "{seconds:.3f} s/iter ({data_seconds:.3f} waiting for data)  "
        "{images_per_second:.1f} images/s  {hours}h{minutes:02d}m left"
    )
    left = dict(iters=run.args.iters, hours=hours, minutes=minutes)
    run.say(words.format(**entry, **left), **entry)
    run.window, run.logged, run.waited, run.clock = np.zeros(4), n, 0.0, monotonic()


def validate(run: Run, n: int) -> None:
    """Scores on the validation pictures, if there are any; rank 0 logs them, and draws four of its
    own pictures and the curves. Ends early when a signal comes."""
    before = monotonic()
    count = len(run.val_pairs)
    if not count:
        return

    # Without SyncBN each process has statistics of its own: all take those that are saved.
    if run.world > 1:
        for b in run.model.buffers():
            dist.broadcast(b, 0)

    # Four that are spread over the set, rounded down to multiples of world: those are rank 0's.
    shown = {count * k // 4 // run.world * run.world for k in range(4)}
    rows = []
    matrix = np.zeros([len(run.classes.names)] * 2, np.int64)
    pictures = evaluate(
        run.model, run.val_pairs, run.classes, matrix, run.rank, run.world, run.args.workers,
        short=run.args.short_side, dtype=run.dtype,
    )
    with torch.compiler.set_stance("force_eager"):  # --compile is for crops, all of one size
        for i, _, *row in pictures:
            if run.signals:
                words = "stopped during the validation; go on with --resume, it comes first then"
                leave(words, 128 + run.signals[0])
            if i in shown:
                rows.append(row)  # image, label, prediction

    if run.rank == 0:
        report(run, n, matrix)
        write_or_warn(run.path(f"sheet_{n}.png"), lambda path: sheet(rows, run.classes).save(path))
        write_or_warn(run.path("curves.png"), lambda path: curves(run.entries).save(path))
    run.clock += monotonic() - before  # does not count as training


def report(run: Run, n: int, matrix: np.ndarray) -> None:
    """The validation after iteration n in one line."""
    result = scores(matrix)
    means = {key: result[key] for key in ("mIoU", "mAcc", "aAcc")}
    words = [f"{key} none" if x is None else f"{key} {x:.2f}" for key, x in means.items()]
    there = len(matrix) - result["IoU"].count(None)

    run.say(
        f"{n}/{run.args.iters}  validation: {'  '.join(words)}  "
        f"({len(run.val_pairs)} pictures, {there} of {len(matrix)} classes)",
        iteration=n,
        **means,
    )


# ---- what may go wrong in a week -----------------------------------------------------------------


def warn(words: str) -> None:
    """A sentence beside the run's own output."""
    print(one_line(words), file=sys.stderr)


def leave(words: str, code: int) -> None:
    """End this process with a sentence."""
    warn(words)
    sys.exit(code)


def from_rank_0(world: int, value: object) -> object:
    """The value that rank 0 has, in all processes."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)

    return box[0]


def agree(run: Run, losses: Tensor) -> tuple[list[float], bool, bool]:
    """losses (3,) of this process -> their means over all processes, whether they are finite, and
    whether a signal asks any process to stop. So all take the same step, or none: a loss that is
    not finite in one process makes the mean so in all."""
    total = torch.tensor([*losses.tolist(), bool(run.signals)], dtype=torch.float64)
    if run.world > 1:
        dist.all_reduce(total)  # on the CPU (gloo) also beside NCCL

    *means, stop = (total / run.world).tolist()

    finite = all(math.isfinite(x) for x in means)
    run.skipped = 0 if finite else run.skipped + 1
    return means, finite, stop > 0


def skip_step(run: Run, i: int, statistics: list[Tensor]) -> None:
    """Leave everything as it was before iteration i, whose loss is not finite, and name its
    pictures. (BatchNorm's statistics would stay infinite, and evaluation with them. They cannot be
    computed back, so a copy of them is taken before each step.)"""
    for b, before in zip(run.model.buffers(), statistics):
        b.copy_(before)

    first = i * run.args.batch_size
    batch = range(first, first + run.args.batch_size)
    files = ", ".join(run.samples.paths(position)[0] for position in batch)
    run.say(
        f"warning: iteration {i + 1}: the loss is not finite, the step is not taken; "
        f"its pictures: {files}",
        iteration=i + 1,
        skipped=files,
    )


def watch_signals() -> list:
    """-> a list, empty until a signal asks this process to stop: then [its number, when]. A second
    signal ends the process at once."""
    signals = []

    def note(number, frame):
        # torchrun passes the terminal's Ctrl-C on to processes that got it from the terminal
        # themselves: within two seconds it is the same request.
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if not signals:
            signals.extend([number, monotonic()])
        elif not under_torchrun or monotonic() - signals[1] > 2:
            os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, note)

    return signals


def stop_early(run: Run, n: int) -> None:
    """Save iteration n, the run's last one for now, and say why it is, and how to go on."""
    save(run, n)
    where = "this state could not be saved"
    if run.saved:
        where = f"{run.saved} holds all of it, go on with --resume"

    if run.skipped == PATIENCE:
        leave(
            f"error: the loss was not finite {PATIENCE} times in a row and none of these steps was "
            f"taken: {where} and a lower --lr, or without the pictures named above",
            3,
        )

    number = run.signals[0] if run.signals else signal.SIGTERM  # it came to another process
    leave(f"stopped by a signal after iteration {n}: {where}", 128 + number)


def begin(run: Run) -> None:
    """Watch for signals, open the work directory, say what is about to be done, and what is wrong
    with it. A run that stopped between saving and validating has the validation still to come; one
    that has all of its iterations is done."""
    args, start = run.args, run.start
    run.signals = watch_signals()

    if run.rank == 0:
        os.makedirs(args.work_dir, exist_ok=True)
        run.lock = lock(run.path(".lock"))
        run.entries = read_log(run.path("log.jsonl"), start)

    first_entry = {} if start else dict(iteration=0, args=vars(args))
    run.say(plan(run), **first_entry)
    if run.rank == 0:
        for words in doubts(run):
            run.say(f"warning: {words}")
    run.clock = monotonic()

    validated = any(e["iteration"] == start and "mIoU" in e for e in run.entries)
    validated = from_rank_0(run.world, validated)  # it has the log
    if run.val_pairs and start and run.due(start) and not validated:
        validate(run, start)
    elif start >= args.iters:  # where a cluster repeats the command, this is its end
        leave(f"{run.saved}: has all of its {start} iterations, nothing is left to train", 0)


def lock(path: str) -> TextIO | None:
    """Refuse a work directory that another run writes to. -> the file that holds the lock, which
    ends with this process, however it ends. Windows and some network disks have no such locks."""
    try:
        import fcntl
    except ImportError:
        return None

    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        words = "another run writes to this folder, wait for it or name another --work-dir"
        raise UsageError(f"{dirname(path)}: {words}") from error
    except OSError:
        pass
    return file


def read_log(path: str, last: int) -> list[dict]:
    """The entries up to iteration `last`: what came after the checkpoint will come again. A damaged
    line is named and left out."""
    if not last or not exists(path):
        return []

    entries = []
    with open(path, errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
                float(entry.get("mIoU") or 0)
                if entry["iteration"] <= last:
                    entries.append(entry)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                warn(f"warning: {path}: line {number} is damaged, left out")
    return entries


def doubts(run: Run) -> list[str]:
    """What would make a run worth less than its time, each in a sentence, before it costs any."""
    args = run.args
    found = label_warnings(run.train_pairs, run.classes)

    some = range(0, args.iters, max(1, args.iters // 1000))
    peak = max(learning_rate(i, args.iters, **run.schedule) for i in some)
    if peak < args.lr / 2:
        found.append(
            f"with --warmup {args.warmup} of {args.iters} iterations the learning rate rises to "
            f"{peak:.1e} alone, not to {args.lr:g}: a shorter --warmup would change that"
        )

    if run.fingerprint != run.fingerprint_before:
        found.append(
            f"{args.data}: {run.fingerprint_before} until here, from here on {run.fingerprint}: "
            "the run goes on with other pictures than it would have seen"
        )

    if not run.val_pairs:
        found.append(f"{args.data}: has no images/validation, this run trains without validating")
    return found


def finish(run: Run) -> None:
    """Say where the result is, and leave together."""
    if run.saved is None:
        leave("error: the last checkpoint could not be saved, make room and go on with --resume", 1)

    run.say(f"{run.saved}: evaluate it with `python evaluate.py`")
    if run.val_pairs:
        run.say(run.path(f"sheet_{run.args.iters}.png"))
    if run.args.data == "toy":
        run.say(AFTER_TOY)

    leave_processes(run.world)


def write_or_warn(path: str, write: Callable) -> bool:
    """write(path); where that fails (a full disk, a picture that cannot be drawn), days of training
    must not: it is said, and tried again when the next one is due."""
    try:
        write(path)
        return True
    except Exception as error:
        reason = first_line(error)
        warn(f"warning: {path} is not written ({reason}); training goes on, and tries again")
        return False


def save(run: Run, n: int) -> None:
    """Write checkpoint_n.pt, on rank 0, and remove those before the last --keep, but not the best;
    the other processes wait. run.saved is its path then, None where it failed."""
    path = run.path(f"checkpoint_{n}.pt")
    if run.rank == 0:
        run.best = max((run.best, *run.entries), key=lambda entry: entry.get("mIoU") or 0)
        content = dict(
            model=run.model.state_dict(),
            optimizer=run.optimizer.state_dict(),
            scaler=run.scaler.state_dict(),
            iteration=n,
            window=run.window.tolist(),
            best=run.best,
            seed=run.args.seed,
            args=vars(run.args),
            classes=tuple(run.classes),
            names=run.fingerprint,
        )
        if write_or_warn(path, partial(write_checkpoint, content)):
            remove_older(run, n)
        else:
            path = None

    run.saved = from_rank_0(run.world, path)


def remove_older(run: Run, n: int) -> None:
    """Remove the checkpoints before the last --keep, but not the best. (What is newer than
    iteration n is damaged, or none of this run's: it is left alone.)"""
    found = [path for path in saved_checkpoints(run.args.work_dir) if iteration_of(path) <= n]
    for path in found[: -run.args.keep]:
        if iteration_of(path) != run.best.get("iteration"):
            with suppress(OSError):  # Windows keeps files that are mapped: next time
                os.remove(path)


def saved_checkpoints(folder: str) -> list[str]:
    """The checkpoint_N.pt in a folder, in order of their iterations."""
    found = glob(join(escape(folder), "checkpoint_*.pt"))
    return sorted(filter(iteration_of, found), key=iteration_of)


def iteration_of(path: str) -> int:
    """N of checkpoint_N.pt; 0 of other names, which are none of ours."""
    match = re.search(r"checkpoint_(\d+)\.pt$", path)
    return int(match[1]) if match else 0


def usable_checkpoint(folder: str) -> dict:
    """The content of the newest whole checkpoint in a work directory, or below runs/, and its path
    as "path". Damaged ones are named and passed over."""
    found = checkpoints(dirname(checkpoints(folder)[0]))  # those of one run
    for path in found:
        try:
            return read_whole(path) | {"path": path}
        except (WeightsError, OSError, zipfile.BadZipFile) as error:
            warn(f"warning: {path} cannot be used ({error}), trying the one before")

    raise UsageError(
        f"{dirname(found[0])}: none of its {len(found)} checkpoints can be used, "
        "start anew without --resume"
    )


def read_whole(path: str) -> dict:
    """The content of a checkpoint, every tensor's bytes compared with their checksum."""
    content = read_checkpoint(path)
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()

    if damaged:
        raise WeightsError(f"damaged at {damaged}")
    if not is_whole(content):
        raise WeightsError("not a training checkpoint")
    return content


def is_whole(content: dict) -> bool:
    """Are there the entries that save() writes, of the kinds it writes? (Other programs may have
    written anything; older checkpoints lack the last four.)"""
    newer = dict(window=[0.0] * 4, best={}, classes=(), names="")
    content = newer | content
    kinds = dict(model=dict, optimizer=dict, scaler=dict, iteration=int, args=dict)
    kinds |= {key: type(value) for key, value in newer.items()}
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False

    window, best = content["window"], content["best"]
    numbers = [content["iteration"], *window, *(x or 0 for x in best.values())]
    plain = all(isinstance(x, (int, float)) and abs(x) < 2**63 for x in numbers)
    return plain and len(window) == 4 and content["iteration"] >= 0


# ---- python train.py -----------------------------------------------------------------------------

# torchrun --max-restarts repeats the command after a process has died: go on from what is there.
RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

# What --data toy changes: a small model from scratch, small pictures, a short schedule with a
# higher rate.
TOY = dict(
    arch="toy_p8",
    iters=800,
    interval=200,
    batch_size=4,
    crop_size=96,
    short_side=96,
    pretrained="none",
    lr=2e-3,
    warmup=50,
)
AFTER_TOY = """\
Look at that sheet: pictures it has not seen, their labels, its own; curves.png is beside it. Then:
  python evaluate.py --image data/toy/images/validation/toy_000.jpg --show look --inside
  python tests/experiments.py --list   # change one line: guess what happens, and measure it
  README.md, "Your own data"           # train it on pictures of your own"""
# Arguments that change nothing in what a run computes: they may differ on --resume, unsaid.
NO_EFFECT = ("work_dir", "resume", "workers", "keep", "timeout", "dry_run")
# Those that the optimizer's state holds, which --resume brings back: they may not.
IN_THE_OPTIMIZER = ("optimizer", "weight_decay", "layer_decay", "freeze")


def options() -> ArgumentParser:
    """The command line, but for --help. Its defaults are those of the published DeiT-S recipe."""
    parser = ArgumentParser(
        description="Train ViT/DeiT + UPerNet on ADE20K. Defaults stand in brackets; with --data "
        "toy, --optimizer sgd or --resume others hold, `--help` beside them shows which.",
        epilog="example: torchrun --nproc_per_node 8 train.py --arch deit_s16 --neck mln "
        "--iters 160000",
        add_help=False,
    )
    recipe_options(parser.add_argument_group("recipe").add_argument)
    run_options(parser.add_argument_group("run").add_argument)

    add = parser.add_argument_group("speed").add_argument
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto: bfloat16 where the hardware has it, else float32 (%(default)s)")
    add("--workers", type=WORKERS, default=2,
        help="processes that read and augment, for each training process (%(default)s)")
    add("--compile", action="store_true",
        help="torch.compile the model: minutes at the start, then faster")
    add("--deterministic", action="store_true",
        help="the same result every time on one machine, slower")
    return parser


def recipe_options(add: Callable) -> None:
    """What decides about the result."""
    add("--arch", choices=ARCHS, default="deit_s16", help="(%(default)s)")
    add("--neck", choices=NECKS, default="none",
        help="ln: LayerNorm after the last layer, mln: multi-level neck (%(default)s)")
    add("--iters", type=POSITIVE, default=160000,
        help="80000 or 160000 are published (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(%(default)s)")

    add("--lr", type=REAL, help="base learning rate (%(default)s)")
    add("--warmup", type=COUNT, metavar="ITERS", help="linear warmup (%(default)s)")
    add("--weight-decay", type=REAL,
        help="(adamw 0.01, 0 of cls_token and pos_embed; sgd 5e-4)")
    add("--layer-decay", type=FACTOR, default=1.0,
        help="the learning rate of layer k times this ** (depth + 1 - k) (%(default)s)")
    add("--drop-path", type=RATE, help="of the last layer (as in the recipe of --arch and --neck)")
    add("--freeze", action="store_true", help="train neck and heads alone")

    add("--batch-size", type=SIZE, default=16,
        help="pictures a step over all processes (%(default)s)")
    add("--crop-size", type=SIZE, default=512, metavar="PIXELS",
        help="side of the training crops (%(default)s)")
    add("--short-side", type=SIZE, default=512, metavar="PIXELS",
        help="of pictures at scale 1 (%(default)s)")

    add("--pretrained", default="auto", metavar="auto|none|FILE|URL",
        help="auto: the backbone the recipe starts from, fetched once; none: from scratch; or any "
        "file convert_weights.py reads (%(default)s)")
    add("--seed", type=COUNT, default=0,
        help="of data order, augmentation, initialisation and dropout (%(default)s)")


def run_options(add: Callable) -> None:
    """Where a run reads and writes, and how it goes on."""
    add("--data", default=DEFAULT_ROOT, metavar="DIR",
        help="data set in ADE20K's layout, or toy (%(default)s)")
    add("--work-dir", metavar="DIR",
        help="checkpoints, log and pictures (a new folder under runs/)")
    add("--interval", type=POSITIVE, metavar="ITERS",
        help="validate and save every so often (a tenth of --iters; with --data toy 200)")

    add("--resume", action="store_true",
        help="go on from the newest checkpoint in --work-dir, or start there; without --work-dir "
        "from the newest under runs/")
    add("--keep", type=POSITIVE, default=2,
        help="checkpoints to keep: the newest ones, beside the best (%(default)s)")
    add("--timeout", type=POSITIVE, default=1800, metavar="SECONDS",
        help="how long processes wait for one that hangs (%(default)s)")

    add("--micro-batch", type=SIZE,
        help="pictures at once on each process, the rest of its share is accumulated (all)")
    add("--dry-run", action="store_true",
        help="build everything, print the plan and stop; data and weights may be missing")


def parse(argv: list[str] | None = None) -> tuple[Namespace, dict]:
    """-> the arguments, and the content of the checkpoint to go on from or {}.

    The command line is read twice. The first reading finds what decides about the defaults: the
    optimizer, the toy data, or a checkpoint, whose own arguments go on to hold."""
    parser = options()
    checkpoint = {}
    given, _ = parser.parse_known_args(argv)
    schedule = OPTIMIZERS[given.optimizer]
    parser.set_defaults(lr=schedule["lr"], warmup=schedule["warmup"])
    if given.data == "toy":
        parser.set_defaults(**TOY)

    if given.resume and given.work_dir and not find_checkpoints(given.work_dir):
        warn(f"{given.work_dir}: holds no checkpoint yet, a run starts anew")
    elif given.resume:
        checkpoint = usable_checkpoint(given.work_dir or "runs")
        saved = saved_arguments(checkpoint, {k: parser.get_default(k) for k in vars(given)})
        parser.set_defaults(**saved)

    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    args = parser.parse_args(argv)

    if checkpoint:
        name_changes(args, saved, checkpoint["path"])
        args.work_dir = dirname(checkpoint["path"])

    args.interval = args.interval or max(1, args.iters // 10)
    args.work_dir = args.work_dir or new_work_dir(args)

    if not given.resume and saved_checkpoints(args.work_dir):
        if not RESTARTED:
            raise UsageError(
                f"{args.work_dir}: holds the checkpoints of a run, go on with it by --resume or "
                "name another"
            )
        checkpoint = usable_checkpoint(args.work_dir)
    return args, checkpoint


def saved_arguments(checkpoint: dict, defaults: dict) -> dict:
    """The arguments in a checkpoint, as the command line would read them: there may stand anything.
    What it does not name is as in defaults."""

    def refuse(message):
        raise UsageError(f"{checkpoint['path']}: does not hold arguments of train.py, {message}")

    argv = []
    for key in defaults:
        value = checkpoint["args"].get(key)
        option = f"--{key.replace('_', '-')}"
        if not str(value).isprintable():
            refuse(f"{option} is {value!r}")
        if value is True:
            argv.append(option)
        elif value is not None and value is not False:
            argv.append(f"{option}={value}")

    parser = options()
    parser.error = refuse
    return vars(parser.parse_args(argv, Namespace(**defaults)))


def name_changes(args: Namespace, saved: dict, path: str) -> None:
    """A checkpoint's own architecture wins, and its optimizer is the one that goes on; other
    arguments may change on --resume, but none of them unnoticed."""
    for key, old in saved.items():
        new = getattr(args, key)
        if new == old or key in NO_EFFECT:
            continue

        option = f"--{key.replace('_', '-')}"
        if key in IN_THE_OPTIMIZER:
            raise UsageError(
                f"{option} was {old} and cannot become {new} on --resume: start anew with "
                f"--pretrained {path}"
            )
        if key in ("arch", "neck"):
            setattr(args, key, old)
            warn(f"{option} {new} is ignored: {path} is {old}")
        else:
            warn(f"{option} was {old} until here, from here on {new}")


def new_work_dir(args: Namespace) -> str:
    """runs/ARCH_NECK_DATA_ITERS, with -2, -3, ... if that is taken; after a restart by torchrun the
    last one taken."""
    data = basename(normpath(args.data))
    base = f"runs/{args.arch}_{args.neck}_{data}_{args.iters}"

    name = taken = base
    count = 1
    while exists(name):
        taken = name
        count += 1
        name = f"{base}-{count}"
    return taken if RESTARTED else name


def main() -> None:
    with errors_in_one_sentence():
        args, checkpoint = parse()
        try:
            train(args, checkpoint)
        except RuntimeError as error:
            if not re.search("[Tt]imed out|onnection (closed|reset)|Broken pipe", str(error)):
                raise

            reason = first_line(error)
            leave(f"error: another process has died or hangs ({reason}); go on with --resume", 1)


if __name__ == "__main__":
    main()
