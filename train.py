"""Training: the published recipes, from pretrained weights to a checkpoint, on one process or many.

    batch (B, 3, S, S) uint8, (B, S, S) uint8 --normalise--> model --> loss --> backward --> step

First the schedule, the optimizer and the arithmetic of a batch. Then `train()`, which builds its
parts and loops. Below it stand the functions it calls: for the start, the log and the validation,
for checkpoints, and for signals. The command line comes last.

What the published runs did, where it differs from what their configs say:

- "No weight decay for norm layers": the key is `norm`, the layers are called `ln1` and `ln2`, so
  nothing matches. LayerNorm and BatchNorm decay; only tokens and positions do not. Same here.
- The poly decay already runs during the warmup: the two factors are multiplied.

--optimizer sgd is mmsegmentation's default schedule, which all of these recipes override: no
warmup, a floor of 1e-4, and everything decays."""

import json
import math
import os
import re
import signal
import sys
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import takewhile
from os.path import basename, exists, isfile, join, normpath
from time import monotonic
from typing import NoReturn
from warnings import filterwarnings

import numpy as np
import torch
import torch.distributed as dist
from numpy.random import default_rng
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ade20k import (
    DEFAULT_ROOT,
    Classes,
    TrainSet,
    about,
    data_root,
    data_warnings,
    errors_in_one_sentence,
    find_pairs,
    first_line,
    normalise,
    progress,
    read_classes,
    sample_positions,
    say,
    warn,
)
from convert_weights import (
    PRETRAINED,
    describe,
    load_into,
    load_weights,
    local_path,
    read_checkpoint,
    split_choice,
    whole_or_not_at_all,
    write_checkpoint,
)
from evaluate import (
    COUNT,
    DTYPES,
    POSITIVE,
    REAL,
    SHARE,
    SIGNALS,
    UsageError,
    autocast,
    checkpoints,
    choose_dtype,
    curves,
    end_alone,
    evaluate,
    ignore_deaths,
    memory_format,
    newest_run,
    prepare,
    scores,
    setup_processes,
    sheet,
    start_worker,
    table,
    wait_for_all,
    ways_out,
)
from model import ARCHS, NECKS
from upernet import Segmenter, build_model

# What --optimizer decides: --lr, --warmup and --weight-decay where they are not given, and the
# power and the floor of the poly decay.
OPTIMIZERS = {
    "adamw": dict(lr=6e-5, warmup=1500, weight_decay=0.01, power=1.0, floor=0.0),
    "sgd": dict(lr=0.01, warmup=0, weight_decay=5e-4, power=0.9, floor=1e-4),
}
PATIENCE = 5  # a run ends after so many losses in a row that are not finite
LOG_EVERY = 50  # iterations


def learning_rate(i: int, iters: int, lr: float, power: float, floor: float, warmup: int) -> float:
    """The rate of iteration i = 0 .. iters - 1: poly decay from lr to floor, times a warmup that is
    linear from 1e-6 to 1.

    Poly (DeepLab, Chen et al. 2017, arXiv:1606.00915, section 4.1): far from a minimum large steps
    help; near it they only add noise. A rate that falls all the time needs no decision about when
    to change. Warmup: Adam divides a gradient by its average size, so its first steps move every
    weight by the full lr, however small the gradient is. And the heads, still random, would push
    the pretrained backbone in random directions."""
    rate = (lr - floor) * (1 - i / iters) ** power + floor

    if i < warmup:
        rate *= 1 - (1 - i / warmup) * (1 - 1e-6)
    return rate


def build_optimizer(
    model: Segmenter,
    name: str,
    lr: float,
    weight_decay: float = 0.01,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101; torch's betas are the published ones) or
    SGD. fused: one kernel for all weights, the same arithmetic.

    Early layers of a pretrained backbone are general and need little change. So each group has a
    "scale", which multiplies its learning rate: layer_decay ** (depth + 1 - k) for layer k, where
    the embeddings are layer 0, the blocks 1 to depth, and the new neck and heads depth + 1 (BEiT,
    Bao et al. 2022, arXiv:2106.08254; MAE, He et al. 2022, arXiv:2111.06377, both in the
    appendix)."""
    depth = len(model.backbone.blocks)
    weights = defaultdict(list)  # by (exempt from weight decay, scale)
    for key, weight in model.named_parameters():
        # Tokens and positions are added, they multiply nothing, so decay does not regularise them.
        # (The SGD schedule decays them anyway.) Recipes with layer decay also exempt biases, norms
        # and layer scales, in the head too; the published ones decay them.
        exempt = (name == "adamw" and key.endswith(("cls_token", "pos_embed", "reg_token"))) or (
            layer_decay < 1 and weight.ndim == 1
        )
        scale = layer_decay ** (depth + 1 - layer_of(key, depth))
        if weight.requires_grad:
            weights[exempt, scale].append(weight)

    groups = [  # sorted: checkpoints hold the optimizer's state by position
        dict(params=weights[exempt, scale], weight_decay=0 if exempt else weight_decay, scale=scale)
        for exempt, scale in sorted(weights)
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def layer_of(key: str, depth: int) -> int:
    """The layer of the parameter `key`: 0 for the embeddings, 1 to depth for the blocks, depth + 1
    for the rest, the final norm included."""
    block = re.match(r"backbone\.blocks\.(\d+)\.", key)
    if block:
        return 1 + int(block[1])

    if key.startswith("backbone.") and ".norm." not in key:
        return 0
    return depth + 1


def split_batch(batch: int, world: int, micro: int | None) -> tuple:
    """Find how often gradients of micro pictures must be accumulated: batch = world processes x
    micro x accumulated. micro=None: all pictures of a process at once. -> (micro, accumulated), or
    UsageError."""
    pictures = batch // world  # of each process
    micro = micro or pictures

    if batch % world or pictures % micro:
        raise UsageError(
            f"a batch of {batch} pictures is not {world} processes x {micro} pictures x a whole "
            "number: change --batch-size, --micro-batch or the number of processes"
        )
    if world * micro == 1:
        raise UsageError(
            "one picture at a time leaves BatchNorm a single value to normalise, in each channel "
            "of the head's 1x1 pooling: use a larger --batch-size or --micro-batch"
        )
    return micro, pictures // micro


# ---- The loop ------------------------------------------------------------------------------------


def train(args: Namespace, checkpoint: dict) -> None:
    """A run from its first iteration, or the checkpoint's, to its last. (seed, position) decide a
    sample, (seed, iteration, process) dropout: a resumed run is the run that was never stopped."""
    # Processes: each takes an equal part of every batch, `micro` pictures at a time.
    rank, world, device = setup_processes(args.timeout)
    dtype = choose_dtype(args.dtype, device)
    micro, accumulated = split_batch(args.batch_size, world, args.micro_batch)
    if args.deterministic:
        fix_order_of_sums()

    # Data: this process's part, b pictures, of every batch to come. Worker processes read and
    # augment. -> images (b, 3, S, S) uint8, labels (b, S, S) uint8, sizes (b, 2) before padding
    root = data_root(args.data)
    train_pairs = find_pairs(root, "training", optional=args.dry_run)
    val_pairs = find_pairs(root, "validation", optional=True)
    classes = read_classes(root)
    fingerprint = check_files(args, checkpoint, train_pairs + val_pairs, classes)
    samples = TrainSet(train_pairs, args.seed, args.crop_size, args.short_side, classes)
    start = saved_at = checkpoint.get("iteration", 0)  # saved_at: where --resume would start
    loader = DataLoader(
        samples, batch_sampler=sample_positions(start, args.iters, args.batch_size, rank, world),
        num_workers=args.workers, prefetch_factor=4 if args.workers else None,
        worker_init_fn=start_worker, pin_memory=device.type == "cuda",
        timeout=args.workers and args.timeout / 6,  # before the others give up; without workers 0
    )

    # Model: random, pretrained or the checkpoint's. --dry-run needs only shapes: meta.
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        model = build_model(args.arch, args.neck, len(classes.names))

    log = Log(args, rank, checkpoint)
    plan = (
        "{args.work_dir}: {args.arch}, neck {args.neck}, {count:,} parameters, "
        "{dtype} on {world} x {device.type}\n"
        "batch {args.batch_size} = {world} processes x {micro} pictures x {accumulated} "
        "accumulated; {args.data}: {pictures} training pictures, iterations {start} to {args.iters}"
    ).format(
        args=args, count=sum(p.numel() for p in model.parameters()), dtype=dtype, device=device,
        world=world, micro=micro, accumulated=accumulated, pictures=len(train_pairs), start=start,
    )
    if args.dry_run:
        return log.say(plan)

    load_start(model, log, checkpoint)
    adapt(model, args.drop_path, args.freeze)
    model = parallel = prepare(model, device, dtype, args.compile)  # parallel runs, model is saved
    if world > 1:
        # It starts with the weights of rank 0. BatchNorm keeps its statistics equal by itself.
        filterwarnings("ignore", "Grad strides do not match")  # (those of 1x1 convolutions)
        parallel = DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    # Optimizer. The smallest float16 is 6e-8, above many gradients: the scaler multiplies the loss
    # by a power of two that keeps them in range, and divides it out before the step. bfloat16 has
    # float32's range and needs no scaler.
    optimizer = build_optimizer(model, args.optimizer, args.lr, args.weight_decay, args.layer_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        with about(checkpoint["path"], UsageError):
            optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:  # a disabled one has no state
                scaler.load_state_dict(checkpoint["scaler"])

    if rank == 0:
        os.makedirs(args.work_dir, exist_ok=True)
        log.say(plan, iteration=start, args=vars(args))
        for words in doubts(args, train_pairs, val_pairs, classes, fingerprint, checkpoint):
            log.say(f"warning: {words}")

    # BatchNorm's mean and variance, and a copy from before the step. (Its counter is not read.)
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    old_statistics = [b.clone() for b in statistics]
    batch, batches = None, iter(loader)
    signals = watch_signals()
    i, stop, skipped = start, False, 0  # iterations done; whether to stop; steps in a row not taken
    while True:
        due = i > 0 and (i % args.interval == 0 or i == args.iters)
        if i > saved_at and (due or stop or skipped == PATIENCE):
            save(
                log, skipped, model=model.state_dict(), optimizer=optimizer.state_dict(),
                iteration=i, scaler=scaler.state_dict(), args=vars(args), classes=tuple(classes),
                names=fingerprint, entries=log.entries, steps=log.steps, grid=model.backbone.grid,
            )
            saved_at = i  # before its validation: --resume starts with that
        if skipped == PATIENCE:
            leave(f"error: {PATIENCE} losses in a row were not finite: continue with --resume and "
                  "a lower --lr, or without the newest checkpoints or the pictures named above", 3)
        if stop:  # the reason may be another process's
            leave(f"stopped after iteration {i}: continue with --resume", (signals or [1])[0])
        if due and val_pairs:  # on --resume too: a checkpoint is written before its validation
            validate(log, i, signals, model, val_pairs, classes, dtype, world)
        if i >= args.iters:  # (more, where --resume has a smaller --iters)
            break

        # The learning rate; the seed of dropout and drop path (it ends with 2, samples' with 0, 1).
        rate = learning_rate(i, args.iters, args.lr, args.power, args.floor, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        torch.manual_seed(int(default_rng([args.seed, i, rank, 2]).integers(2**63)))
        torch.backends.cudnn.benchmark = not args.deterministic  # pays, as all crops have one size
        began = monotonic()
        batch = fetch(batches, batch, signals)
        waited = monotonic() - began
        images, labels, sizes = (t.to(device, non_blocking=True) for t in batch)
        torch._foreach_copy_(old_statistics, statistics)

        # Forward and backward, `micro` pictures at a time: their gradients add up. The loss is a
        # mean over all pixels, labelled or not, so the mean over equal parts is that of the batch.
        losses = torch.zeros(3, device=device)  # loss, decode, aux
        for first in range(0, len(images), micro):
            end = first + micro
            if world > 1:  # processes only exchange gradients after the last part (DDP's no_sync)
                parallel.require_backward_grad_sync = end == len(images)

            x = normalise(images[first:end], sizes[first:end])  # (micro, 3, S, S) float32
            x = x.contiguous(memory_format=memory_format(device, dtype))
            with autocast(device, dtype):
                loss, parts = parallel(x, labels[first:end].long())
            losses += torch.stack([loss.detach(), parts["decode"], parts["aux"]]) / accumulated
            if end == len(images) and losses.is_cuda:  # copied while the device goes backward
                losses = losses.to("cpu", non_blocking=True)
                copied = torch.cuda.current_stream().record_event()
            scaler.scale(loss / accumulated).backward()

        # All processes take the step, or none does. Here the CPU waits for the device, once.
        if device.type == "cuda":
            copied.synchronize()
        losses, stop = agree(losses, signals, world)
        if math.isfinite(losses[0]):
            scaler.step(optimizer)
            scaler.update()
            skipped = 0
        else:  # put statistics back: infinite ones would stay infinite
            torch._foreach_copy_(statistics, old_statistics)
            if stop:  # on --resume this iteration comes again
                continue
            skipped += 1
            log.skip(i + 1, samples)
        optimizer.zero_grad()
        i += 1
        log.step(i, [*losses, monotonic() - began, waited], rate)

    wait_for_all()
    if not log.saved:
        leave("error: the last checkpoint is not saved, make room and continue with --resume", 1)
    log.say(f"evaluate it: python evaluate.py --checkpoint {args.work_dir}")
    if args.data == "toy":
        log.say(AFTER_TOY)


def fetch(batches: Iterator, last, signals: list) -> tuple:
    """-> the next batch. If it cannot be fetched (a damaged picture, a loader that died), say why,
    and ask all processes to stop and to save. Until they stop they exchange statistics and
    gradients with this process. So it goes through the iteration with the last batch, whose
    pictures become nan: the loss is nan, and no process takes the step."""
    try:
        return next(batches)
    except Exception as error:
        # (A loader's error comes with its traceback before the sentence.)
        warn("error: the next batch cannot be read: " + str(error).rpartition("Error: ")[2].strip())
        if not last:  # nothing is lost
            sys.exit(2)
        signals += [1, monotonic()]
        return last[0] * math.nan, *last[1:]


def agree(losses: Tensor, signals: list, world: int) -> tuple:
    """losses (3,) of this process -> their means over all processes, and whether any process has to
    stop. If the loss of one process is not finite, the mean is not finite in all."""
    total = torch.tensor([*losses.tolist(), len(signals)], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(total)  # on the CPU, so by gloo, not NCCL

    *means, stop = (total / world).tolist()
    return means, stop > 0


# ---- The start of a run --------------------------------------------------------------------------


def fix_order_of_sums() -> None:
    """--deterministic: take kernels that add in the same order every time; torch warns of
    operations that have none. Attention takes its plain kernel. (Its fused ones have a fixed order
    only in torch's strict mode, which refuses the gradient of resized positions.)"""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def check_files(args: Namespace, checkpoint: dict, pairs: list, classes: Classes) -> str:
    """Compare what must be equal. UsageError if the classes are not the checkpoint's, or if this
    process has other arguments, checkpoint or pictures than process 0 (each node may have a disk of
    its own). -> a fingerprint of the pictures, by which --resume notices others"""
    if Classes(*checkpoint.get("classes", classes)) != classes:
        raise UsageError(
            f"{args.data}: its classes are not those of the checkpoint, give it back its "
            "classes.txt or start a new run with --pretrained and the checkpoint"
        )

    names = os.fsencode("\n".join(basename(image) for image, _ in pairs))
    fingerprint = f"{len(pairs)} pictures, crc {zlib.crc32(names):08x} of names"
    facts = vars(args) | {
        "data": fingerprint,
        "checkpoint": checkpoint.get("path"),
        "iteration": checkpoint.get("iteration"),
    }
    first = [facts]
    if dist.is_initialized():
        dist.broadcast_object_list(first)
    differ = dict(facts.items() - first[0].items())
    if differ:
        raise UsageError(
            f"a process has {differ}, unlike process 0: give all of them one command, work "
            "directory and data"
        )
    return fingerprint


def load_start(model: Segmenter, log: "Log", checkpoint: dict) -> None:
    """Give the model the checkpoint's weights, or pretrained ones. Rank 0 fetches what lies behind
    a URL, then all processes read the file."""
    source = checkpoint.get("path") or log.args.pretrained
    if source == "auto":
        # (The sentence ends with the KeyError's words, the architecture.)
        with about("--pretrained none starts from scratch, no file is known for", UsageError):
            source = PRETRAINED[log.args.arch]
    if source == "none":
        return

    if log.rank == 0:
        local_path(split_choice(source)[0])
    wait_for_all()
    state_dict, facts = load_weights(source)
    with about(source, UsageError):
        load_into(model, state_dict, facts, new_classes=not checkpoint)
    if not checkpoint:
        log.say(f"{source}: {describe(facts)}")


def adapt(model: Segmenter, drop_path: float | None, freeze: bool) -> None:
    """--drop-path: the rate of the last layer. --freeze: no gradient for the backbone, so autograd
    keeps none of its activations. In a frozen backbone drop path is noise that nothing learns from,
    so it is off unless --drop-path asks for it."""
    if freeze:
        model.backbone.requires_grad_(False)
        drop_path = drop_path or 0.0

    if drop_path is not None:
        model.backbone.drop_path = drop_path


def doubts(
    args: Namespace, train_pairs: list, val_pairs: list, classes: Classes, fingerprint: str,
    checkpoint: dict,
) -> Iterator:
    """A sentence about each thing that may make a run worth less than its time, before the run
    takes any."""
    yield from data_warnings("training", train_pairs, classes)
    if val_pairs:
        yield from data_warnings("validation", val_pairs, classes)
    else:
        yield "the data set has no images/validation, this run trains without validating"

    if 2 * args.warmup > args.iters:  # half way the decay has halved the rate
        yield (
            f"--warmup {args.warmup} is more than half of --iters: the learning rate stays below "
            "about half of --lr"
        )
    before = checkpoint.get("names", fingerprint)
    if fingerprint != before:
        yield f"{before} until here, from here on other pictures: {fingerprint}"


# ---- Log and validation --------------------------------------------------------------------------


class Log:
    """The work directory of a run. What rank 0 says goes to the terminal; facts go to
    WORK_DIR/log.jsonl too, as one JSON object a line. A checkpoint holds all lines before it. So
    --resume drops those after it, and they come again."""

    def __init__(self, args: Namespace, rank: int, checkpoint: dict):
        self.args = args
        self.rank = rank
        self.saved = checkpoint.get("path")  # the last checkpoint, None if it could not be written
        self.entries = checkpoint.get("entries", [])  # the lines of log.jsonl

        # Of each step that was taken since the last line with a loss: loss, decode, aux, seconds,
        # and how many of the seconds it waited for data.
        self.steps = checkpoint.get("steps", [])

    @contextmanager
    def writing(self, name: str) -> Iterator:
        """Gives the path of a file in the work directory. If writing it fails (a full disk, a
        picture that cannot be drawn), print a warning and continue: days of training must not be
        lost for one file. The next file tries again."""
        path = join(self.args.work_dir, name)
        try:
            yield path
        except Exception as error:
            warn(
                f"warning: {path} is not written ({first_line(error)}); training continues, and "
                "tries again"
            )

    def say(self, words: str, **entry) -> None:
        """Print words on rank 0. The facts (entry), if there are any, become a line of the log."""
        if self.rank > 0:
            return

        say(*words.splitlines())
        if entry:
            self.entries.append(entry)
            # Write all lines and move the file into place: a reader never sees half a line, and
            # those that a full disk refused come with the next.
            with self.writing("log.jsonl") as path, whole_or_not_at_all(path) as part:
                with open(part, "w") as file:
                    file.writelines(json.dumps(entry) + "\n" for entry in self.entries)

    def skip(self, n: int, samples: TrainSet) -> None:
        """Name the pictures of iteration n, whose loss is not finite."""
        batches = sample_positions(n - 1, n, self.args.batch_size)
        files = ", ".join(samples.paths(position)[0] for position in next(batches))
        self.say(
            f"warning: iteration {n}: the loss is not finite, the step is not taken; its pictures: "
            f"{files}",
            iteration=n,
            skipped=files,
        )

    def step(self, n: int, row: list, rate: float) -> None:
        """Take the row of iteration n, see self.steps. Every LOG_EVERY iterations, and after the
        last, say the means over the steps that were taken."""
        if math.isfinite(row[0]):
            self.steps.append(row)
        if (n % LOG_EVERY and n != self.args.iters) or not self.steps:
            if self.rank == 0:
                progress(f"{n} of {self.args.iters} iterations")
            return

        loss, decode, aux, seconds, waited = np.mean(self.steps, axis=0).tolist()
        self.steps = []
        entry = dict(
            iteration=n,
            loss=loss,
            decode=decode,
            aux=aux,
            lr=rate,
            seconds=seconds,
            data_seconds=waited,
        )
        words = (
            "{iteration}/{args.iters}  loss {loss:.4f} (decode {decode:.4f} + aux {aux:.4f})  "
            "lr {lr:.3e}  {seconds:.3f} s/iter ({data_seconds:.3f} waiting for data)  {left} left"
        )
        left = timedelta(seconds=int((self.args.iters - n) * seconds))
        self.say(words.format(args=self.args, left=left, **entry), **entry)


def validate(
    log: Log,
    n: int,
    signals: list,
    model: Segmenter,
    pairs: list,
    classes: Classes,
    dtype: torch.dtype,
    world: int,
) -> None:
    """Score the model on the validation pictures after iteration n. Rank 0 logs the scores, draws
    four of the pictures that it labelled and the curves, and copies the best checkpoint to best.pt.
    Nothing resumes from best.pt or removes it."""
    rows = []

    def look(i, *row):
        if signals:
            leave("stopped in a validation; --resume starts with that validation", signals[0])
        if 4 * i >= len(pairs) * len(rows):  # the first one of each quarter
            rows.append(row)  # image, label, prediction

    torch.backends.cudnn.benchmark = False  # pictures have many sizes
    with torch.compiler.set_stance("force_eager"):  # --compile is for crops, all of one size
        matrix = evaluate(
            model, pairs, classes, log.rank, world, log.args.workers, look,
            short=log.args.short_side, dtype=dtype,
        )

    if log.rank == 0:
        with log.writing(f"sheet_{n}.png") as path:
            sheet(rows, classes).save(path)
        result = scores(matrix)
        summary = table(result, classes.names)[-1]
        log.say(f"{n}/{log.args.iters}  validation: {summary}  {path}", iteration=n, **result)

        if log.saved and result["mIoU"] == max(entry.get("mIoU") or 0 for entry in log.entries):
            with log.writing("best.pt") as path:  # (reading compares checksums, a copy would not)
                write_checkpoint(read_checkpoint(log.saved), path)
        with log.writing("curves.png") as path:
            curves(log.entries).save(path)


# ---- Saving and resuming -------------------------------------------------------------------------


def save(log: Log, skipped: int, **content) -> None:
    """Write checkpoint_N.pt on rank 0, then remove those before the last --keep; the other
    processes wait. Weights that are not finite end the run: the last good checkpoint stays. Finite
    ones may be useless too: where the last step was not taken, nothing is removed."""
    if not all(x.isfinite().all() for x in content["model"].values()):
        leave("error: the weights are not finite, they are not saved: continue with --resume and a "
              f"lower --lr from {log.saved or log.args.work_dir}", 3)

    log.saved = None
    with log.writing(f"checkpoint_{content['iteration']}.pt") as path:
        if log.rank == 0:
            write_checkpoint(content, path)
            if not skipped:
                # Newer ones are damaged, as --resume has passed over them: they do not count.
                found = checkpoints(log.args.work_dir)
                for old in found[: found.index(path) + 1][: -log.args.keep]:
                    with suppress(OSError):  # Windows refuses while a file is mapped: next time
                        os.remove(old)
        log.saved = path  # on the other ranks too, though only rank 0 knows that it is there
    wait_for_all()


def newest_whole(found: list) -> dict:
    """The content of the newest of these checkpoints that can be read, and its path as "path"."""
    for path in reversed(found):
        try:
            content = read_checkpoint(path)
            if "entries" not in content:
                raise UsageError(f"{path}: is no checkpoint of this version")
            return content | {"path": path}
        except Exception as error:  # whatever is wrong with it, the one before may be whole
            warn(f"warning: {first_line(error)}; it is passed over")

    raise UsageError("no checkpoint can be used: start a new run in another --work-dir")


# ---- Signals and other ends ----------------------------------------------------------------------


def watch_signals() -> list:
    """-> a list, empty until this process has to stop: then [exit code, when]. fetch() adds to it
    too. A signal that comes more than two seconds later ends the process at once."""
    signals = []

    def note(number, frame):
        # torchrun passes the terminal's Ctrl-C on to processes that got it from the terminal
        # themselves: within two seconds it is the same request.
        if not signals:
            signals.extend([128 + number, monotonic()])
        elif monotonic() - signals[1] > 2:
            os._exit(128 + number)

    for number in SIGNALS:
        # nohup has SIGHUP ignored. (SIGINT is ignored in each shell script's background.)
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)

    ignore_deaths()  # of loaders: fetch() is told
    return signals


def leave(words: str, code: int) -> NoReturn:
    """End this process with a sentence and an exit code."""
    warn(words)
    sys.exit(code)


# ---- python train.py -----------------------------------------------------------------------------

# torchrun --max-restarts repeats the command after a process has died. Then the run resumes.
RESTARTED = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

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
Look at the last sheet: pictures that training has not seen, their labels, the predictions. Next to
it lies curves.png.
  python tests/inside.py --image data/toy/images/validation/toy_000.jpg --out look
  python tests/experiments.py --list   # change one line: guess what happens, and measure it
  README.md, "Your own data"           # train it on pictures of your own"""
# Arguments that change nothing in what a run computes: --resume says nothing where they differ.
NO_EFFECT = ("work_dir", "resume", "workers", "keep", "timeout", "dry_run")
# Those that weights and the optimizer's state depend on: --resume takes them from the checkpoint.
FIXED = ("arch", "neck", "optimizer", "weight_decay", "layer_decay", "freeze")


def options() -> ArgumentParser:
    """The command line. Its defaults are those of the published DeiT-S recipe."""
    parser = ArgumentParser(
        description="Train ViT/DeiT + UPerNet on ADE20K. Defaults stand in brackets.",
        epilog="example: torchrun --nproc_per_node 8 train.py --arch deit_s16 --neck mln "
        "--iters 160000",
    )
    add = parser.add_argument_group("recipe").add_argument
    add("--arch", choices=ARCHS, default="deit_s16", help="(%(default)s)")
    add("--neck", choices=NECKS, default="none",
        help="ln: LayerNorm after the last layer, mln: multi-level neck (%(default)s)")
    add("--iters", type=POSITIVE, default=160000,
        help="80000 or 160000 are published (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(%(default)s)")

    add("--lr", type=REAL, help="base learning rate (adamw 6e-05, sgd 0.01)")
    add("--warmup", type=COUNT, help="iterations of linear warmup (adamw 1500, sgd 0)")
    add("--weight-decay", type=REAL,
        help="(adamw 0.01, but 0 for cls_token, reg_token and pos_embed; sgd 0.0005)")
    add("--layer-decay", type=SHARE, default=1.0,
        help="multiplies the learning rate of layer k by this ** (depth + 1 - k) (%(default)s)")
    add("--drop-path", type=SHARE,
        help="drop path rate of the last layer, below 1 (as in the recipe of --arch and --neck)")
    add("--freeze", action="store_true", help="only train neck and heads")

    add("--batch-size", type=POSITIVE, default=16,
        help="pictures a step over all processes (%(default)s)")
    add("--crop-size", type=POSITIVE, default=512,
        help="side of the training crops in pixels (%(default)s)")
    add("--short-side", type=POSITIVE, default=512,
        help="short side of pictures at scale 1, in pixels (%(default)s)")

    add("--pretrained", default="auto", metavar="auto|none|FILE|URL",
        help="auto: the backbone the recipe starts from, fetched once; none: from scratch; or any "
        "file convert_weights.py reads (%(default)s)")
    add("--seed", type=COUNT, default=0,
        help="decides data order, augmentation, initialisation and dropout (%(default)s)")
    more_options(parser)
    return parser


def more_options(parser: ArgumentParser) -> None:
    """What does not belong to the recipe."""
    add = parser.add_argument_group("run").add_argument
    add("--data", default=DEFAULT_ROOT,
        help="data set in ADE20K's layout; or toy, drawn here, which is small and has defaults of "
        "its own: TOY in train.py (%(default)s)")
    add("--work-dir",
        help="folder for checkpoints, log and pictures (a new one under runs/)")
    add("--interval", type=POSITIVE,
        help="iterations from one checkpoint and validation to the next (a tenth of --iters; with "
        "--data toy 200)")
    add("--resume", action="store_true",
        help="continue from the newest checkpoint in --work-dir, or start there if it has none; "
        "without --work-dir continue the newest run under runs/")
    add("--keep", type=POSITIVE, default=2,
        help="how many of the newest checkpoints to keep; best.pt is one more (%(default)s)")
    add("--timeout", type=POSITIVE, default=1800,
        help="seconds that processes wait for one that hangs (%(default)s)")
    add("--micro-batch", type=POSITIVE,
        help="pictures at a time on each process; gradients are accumulated until its part of the "
        "batch is done (all of the part)")
    add("--dry-run", action="store_true",
        help="print the plan and stop; data and weights may be missing")

    add = parser.add_argument_group("speed").add_argument
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto: bfloat16 where the hardware has it, otherwise float32; on V100 and T4 float16 "
        "is several times as fast (%(default)s)")
    add("--workers", type=COUNT, default=2,
        help="processes that read and augment, for each training process (%(default)s)")
    add("--compile", action=BooleanOptionalAction,  # --no-compile where --resume would keep it
        help="torch.compile the model: minutes at the start, then faster")
    add("--deterministic", action=BooleanOptionalAction,
        help="the same result every time on one machine, where torch has such operations (it warns "
        "of the others); slower. CPUs do not need it")


def parse(argv: list | None = None) -> tuple:
    """-> the arguments, and the content of the checkpoint to continue from or {}.

    What the command line does not say, the checkpoint says, otherwise the toy recipe (with --data
    toy), otherwise the published one. They set the parser's defaults, so the command line is read
    again after each of them."""
    parser = options()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unknown arguments: {unknown}. (--resume takes no file: name its folder by --work-dir."
            " torch.distributed.launch adds --local-rank: start with torchrun.)"
        )
    if args.data == "toy":
        parser.set_defaults(**TOY)
        args = parser.parse_args(argv)

    resume = args.resume or RESTARTED
    folder = args.work_dir or default_work_dir(args)
    found = checkpoints(folder)
    checkpoint = {}
    if isfile(folder) or (found and not resume):
        raise UsageError(
            f"{folder}: is a file, or holds the checkpoints of a run: continue the run with "
            "--resume, or name another --work-dir"
        )
    if found:
        checkpoint = newest_whole(found)
        saved = checkpoint["args"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)

        for key, old in saved.items():
            new = getattr(args, key)
            option = "--" + key.replace("_", "-")
            if new == old or key in NO_EFFECT:
                continue
            if key in FIXED:
                setattr(args, key, old)
                warn(f"{option} {new} is ignored: the checkpoint has {old}")
            else:
                warn(f"{option} was {old} until here, from here on {new}")
    elif resume:
        warn(f"{folder}: holds no checkpoint yet, a new run starts")

    for key, value in OPTIMIZERS[args.optimizer].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.interval = args.interval or max(1, args.iters // 10)
    args.work_dir = folder
    return args, checkpoint


def default_work_dir(args: Namespace) -> str:
    """With --resume the newest run under runs/. Otherwise runs/ARCH_NECK_DATA_ITERS, with -2, -3,
    ... if that is taken. After a restart by torchrun, the last of these that is taken."""
    if args.resume:
        return newest_run("runs")

    base = f"runs/{args.arch}_{args.neck}_{basename(normpath(args.data))}_{args.iters}"
    names = [base] + [f"{base}-{k}" for k in range(2, 10000)]
    taken = len([*takewhile(exists, names)])
    if RESTARTED and taken:
        taken -= 1
    return names[taken]


def main() -> None:
    with end_alone(), errors_in_one_sentence(), ways_out():
        train(*parse())


if __name__ == "__main__":
    main()
