"""Training: the published recipes, from pretrained weights to a checkpoint, on one process or many.

    batch (B, 3, S, S) uint8, (B, S, S) uint8 --normalise--> model --> loss --> backward --> AdamW or SGD, poly schedule

    python train.py --data toy                                          # two minutes on a laptop, needs nothing
    torchrun --nproc_per_node 8 train.py --arch deit_s16 --iters 160000 # a published recipe, 16 pictures a batch in all

What the published runs did, where it differs from what their configs say:
- "No weight decay for norm layers": the key is `norm`, the layers are called `ln1`, `ln2`, so nothing matches. LayerNorm
  and BatchNorm decay; only cls_token and pos_embed do not. Same here.
- The poly factor goes on during the warmup: both are multiplied.
- SGD is the base schedule that the recipes override: no warmup, a floor of 1e-4, and everything decays.
"""
import argparse
import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ade20k import CLASSES, DEFAULT_ROOT, DataError, Positions, TrainSet, data_root, find_pairs, normalise
from convert_weights import PRETRAINED, WeightsError, describe, load_into, load_weights, read, save
from evaluate import DTYPES, UsageError, autocast, choose_dtype, evaluate, newest_checkpoint, scores, setup_processes, sheet
from model import ARCHS, NECKS
from upernet import Segmenter, build_model

# The published recipes. iters, arch and neck choose among them, the rest they have in common.
RECIPE = dict(arch="deit_s16", neck="none", iters=160000, optimizer="adamw", batch_size=16, crop_size=512, short_side=512,
              pretrained="auto")
# What --data toy changes: a small model from scratch, small pictures, a short schedule with a higher rate.
TOY = dict(arch="toy_p8", iters=800, interval=200, batch_size=4, crop_size=96, short_side=96,
           pretrained="none", lr=2e-3, warmup=50)
OPTIMIZERS = {
    "adamw": dict(lr=6e-5, power=1.0, floor=0.0, warmup=1500),
    "sgd": dict(lr=0.01, power=0.9, floor=1e-4, warmup=0),
}


def learning_rate(i: int, iters: int, lr: float, power: float, floor: float, warmup: int) -> float:
    """The rate of iteration i = 0 .. iters - 1: poly decay from lr to floor, times a linear warmup from 1e-6 to 1."""
    rate = (lr - floor) * (1 - i / iters) ** power + floor
    return rate * (1 - (1 - i / warmup) * (1 - 1e-6)) if i < warmup else rate


def build_optimizer(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or SGD with the published betas, momentum and decays."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)
    # Neither the class token nor the positions are weights that multiply something: pulling them to 0 regularises nothing.
    tokens = [p for n, p in model.named_parameters() if n.endswith(("cls_token", "pos_embed"))]
    others = [p for n, p in model.named_parameters() if not n.endswith(("cls_token", "pos_embed"))]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": tokens, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)     # fused: one kernel, same arithmetic


def split_batch(batch: int, world: int, micro: int | None, sync_bn: bool) -> tuple[int, int]:
    """batch = world processes x micro pictures at a time x accumulated steps. -> (micro, steps), or UsageError."""
    if batch % world:
        good = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UsageError(f"a batch of {batch} cannot be shared by {world} processes, {good} could; or change --batch-size")
    share = batch // world
    micro = micro or share
    good = [n for n in range(1, share + 1) if share % n == 0 and (n > 1 or sync_bn)]
    if micro == 1 and not sync_bn:
        raise UsageError("one picture at a time leaves BatchNorm a single value to normalise (the 1x1 pooling of the head): "
                         f"use fewer processes or a larger --batch-size; --micro-batch {good} would work" if good else
                         "a batch of one leaves BatchNorm a single value to normalise: use a larger --batch-size")
    if share % micro:
        raise UsageError(f"--micro-batch {micro} does not divide the {share} pictures of each process, {good} would")
    return micro, share // micro


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; on --resume what it leaves open comes from the checkpoint, else from RECIPE (and TOY)."""
    parser = argparse.ArgumentParser(
        description="Train ViT/DeiT + UPerNet on ADE20K. The defaults are the published DeiT-S recipe.",
        epilog="example: torchrun --nproc_per_node 8 train.py --arch deit_s16 --neck mln --iters 160000")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--arch", choices=ARCHS, help="deit_s16; with --data toy: toy_p8")
    recipe.add_argument("--neck", choices=NECKS, help="ln: LayerNorm after the last layer, mln: multi-level neck (none)")
    recipe.add_argument("--iters", type=positive, help=f"80000 or 160000 are published (160000; toy {TOY['iters']})")
    recipe.add_argument("--optimizer", choices=OPTIMIZERS, help="(adamw)")
    recipe.add_argument("--lr", type=float, help="base learning rate (adamw 6e-5, sgd 0.01; toy 2e-3)")
    recipe.add_argument("--warmup", type=int, metavar="ITERS", help="linear warmup (adamw 1500, sgd 0; toy 50)")
    recipe.add_argument("--batch-size", type=positive, help="pictures a step over all processes (16; toy 4)")
    recipe.add_argument("--crop-size", type=positive, metavar="PIXELS", help="side of the training crops (512; toy 96)")
    recipe.add_argument("--short-side", type=positive, metavar="PIXELS", help="of pictures at scale 1 (512; toy 96)")
    recipe.add_argument("--pretrained", metavar="auto|none|FILE|URL", help="auto: the backbone the recipe starts from, "
                        "fetched once; none: from scratch; or any file convert_weights.py reads (auto; toy none)")
    recipe.add_argument("--seed", type=int, help="of data order, augmentation, initialisation and dropout (0)")
    run = parser.add_argument_group("run")
    run.add_argument("--data", metavar="DIR", help=f"data set in ADE20K's layout, or toy ({DEFAULT_ROOT})")
    run.add_argument("--work-dir", metavar="DIR", help="checkpoints and log (a new folder under runs/)")
    run.add_argument("--interval", type=positive, metavar="ITERS", help="validate and save every so often (a tenth of "
                     "--iters; toy 200)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --work-dir, or under runs/")
    run.add_argument("--micro-batch", type=positive, help="pictures that go through the model at once on each process; the "
                     "rest of its share is accumulated (all at once)")
    run.add_argument("--dtype", choices=("auto", *DTYPES), help="auto: bfloat16 where the hardware has it, else float32")
    run.add_argument("--workers", type=int, help="processes that read and augment, for each training process (2)")
    args = parser.parse_args(argv)
    known = {}
    if args.resume:
        args.checkpoint = newest_checkpoint(args.work_dir or "runs")
        known = read(args.checkpoint)["args"] | {"work_dir": os.path.dirname(args.checkpoint)}
        for key in ("arch", "neck"):            # a checkpoint knows its own architecture, which wins
            if getattr(args, key) not in (None, known[key]):
                print(f"--{key} {getattr(args, key)} is ignored: {args.checkpoint} is {known[key]}", file=sys.stderr)
            setattr(args, key, known[key])
    known = dict(data=DEFAULT_ROOT, seed=0, dtype="auto", workers=2) | RECIPE \
        | (TOY if "toy" in (args.data, known.get("data")) else {}) | known
    for key, value in vars(args).items():
        if value is None:
            setattr(args, key, known.get(key))
    schedule = OPTIMIZERS[args.optimizer]
    args.lr = schedule["lr"] if args.lr is None else args.lr
    args.warmup = schedule["warmup"] if args.warmup is None else args.warmup
    args.interval = args.interval or max(1, args.iters // 10)
    return args


def positive(text: str) -> int:
    """argparse type: an integer above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def new_work_dir(args: argparse.Namespace) -> str:
    """runs/ARCH_NECK_DATA_ITERS, with -2, -3, ... if that is taken."""
    base = f"runs/{args.arch}_{args.neck}_{os.path.basename(os.path.normpath(args.data))}_{args.iters}"
    names = (base + (f"-{n}" if n > 1 else "") for n in range(1, 10000))
    return next(name for name in names if not os.path.exists(name))


class Log:
    """One JSON object a line in WORK_DIR/log.jsonl, and the same in words on the terminal. On rank 0 alone."""

    def __init__(self, folder: str, iteration: int):
        self.path = os.path.join(folder, "log.jsonl")
        kept = []
        if iteration and os.path.exists(self.path):     # resumed: what came after the checkpoint will come again
            with open(self.path) as file:
                kept = [line for line in file if json.loads(line)["iteration"] <= iteration]
        with open(self.path, "w") as file:
            file.writelines(kept)

    def __call__(self, words: str, **entry) -> None:
        print(words, flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def start_model(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> tuple[Segmenter, dict]:
    """The model with its pretrained or resumed weights, on the device. -> (model, the checkpoint's content or {})"""
    torch.manual_seed(args.seed)
    model, content = build_model(args.arch, args.neck, len(CLASSES)), {}
    source = args.checkpoint if args.resume else PRETRAINED.get(args.arch) if args.pretrained == "auto" else args.pretrained
    if source is None:
        raise UsageError(f"there is no pretrained file for {args.arch}: --pretrained none starts from scratch")
    if source != "none":
        if world > 1 and rank > 0:
            dist.barrier()                      # rank 0 fetches, the others find the file
        state_dict, facts = load_weights(source)
        load_into(model, state_dict, facts)
        content = read(source) if args.resume else {}
        if rank == 0:
            print(f"{source}: {describe(facts)}")
            if world > 1:
                dist.barrier()
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # statistics over all 16 pictures, as published
    return model.to(device, memory_format=torch.channels_last), content


def main() -> None:
    try:
        train(parse())
    except (DataError, WeightsError, UsageError, OSError) as error:
        # A loader's process wraps the sentence in its traceback: keep the sentence.
        print(f"error: {str(error).rsplit('DataError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)


def train_step(model: nn.Module, batch: tuple, micro: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One update from one process's share of a batch, `micro` pictures at a time. -> (3,) loss, decode, aux"""
    images, labels, sizes = (t.split(micro) for t in batch)
    total, steps = 0, len(images)
    optimizer.zero_grad()
    for k, (x, y, size) in enumerate(zip(images, labels, sizes)):
        x, y, size = (t.to(device, non_blocking=True) for t in (x, y, size))        # uint8: a quarter of float32's traffic
        x = normalise(x, size).contiguous(memory_format=torch.channels_last)
        # Gradients travel between the processes once a batch, with its last part.
        wait = isinstance(model, DistributedDataParallel) and k < steps - 1
        with model.no_sync() if wait else nullcontext():
            with autocast(device, dtype):
                loss, parts = model(x, y.long())
            scaler.scale(loss / steps).backward()
        total = total + torch.stack([loss.detach(), parts["decode"], parts["aux"]]) / steps
    scaler.step(optimizer)
    scaler.update()
    return total


def validate(model: Segmenter, pairs: list, args: argparse.Namespace, rank: int, world: int, dtype: torch.dtype, path: str
             ) -> dict:
    """Scores on the validation pictures; rank 0 draws four of its own to path."""
    shown = {len(pairs) * k // 4 // world * world for k in range(4)}                # spread over the set, rank 0's
    rows = []
    matrix = evaluate(model, pairs, len(CLASSES), rank, world, args.workers, short=args.short_side, dtype=dtype,
                      each=lambda i, path, *row: rows.append(row) if i in shown else None)
    if rank == 0:
        sheet(rows, CLASSES).save(path)
    return scores(matrix)


def train(args: argparse.Namespace) -> None:
    rank, world, device = setup_processes()
    torch.backends.cudnn.benchmark = True       # every crop has one size: let cuDNN try its kernels once
    root = data_root(args.data)
    pairs, validation = find_pairs(root, "training"), find_pairs(root, "validation")
    micro, steps = split_batch(args.batch_size, world, args.micro_batch, sync_bn=world > 1 and device.type == "cuda")
    model, content = start_model(args, rank, world, device)
    dtype, start = choose_dtype(args.dtype, device), content.get("iteration", 0)
    if start >= args.iters:
        raise UsageError(f"{args.checkpoint}: has all of its {start} iterations, nothing is left to train")
    optimizer = build_optimizer(model, args.optimizer, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if content:
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
    schedule = OPTIMIZERS[args.optimizer] | dict(lr=args.lr, warmup=args.warmup)
    parallel = DistributedDataParallel(model) if world > 1 else model
    loader = torch.utils.data.DataLoader(
        TrainSet(pairs, args.seed, args.crop_size, args.short_side, len(CLASSES)),
        batch_sampler=Positions(start, args.iters, args.batch_size, rank, world), num_workers=args.workers,
        pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None)
    work = args.work_dir = args.work_dir or new_work_dir(args)
    if rank == 0:
        os.makedirs(work, exist_ok=True)
        log = Log(work, start)
        log(f"{work}: {args.arch}, neck {args.neck}, {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{str(dtype)[6:]} on {world} x {device.type}\nbatch {args.batch_size} = {world} processes x {micro} pictures x "
            f"{steps} accumulated; {len(pairs)} training pictures, iterations {start} to {args.iters}",
            iteration=start, args=vars(args))

    batches, began, window, total, waited, count = iter(loader), time.monotonic(), time.monotonic(), 0, 0.0, 0
    for i in range(start, args.iters):
        before = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        # Dropout and drop path: a seed of their own for every iteration and process, so a resumed run needs no rng state.
        torch.manual_seed((args.seed << 40) + (i << 10) + rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, args.iters, **schedule)
        total = total + train_step(parallel, batch, micro, optimizer, scaler, device, dtype)
        count, n = count + 1, i + 1
        if n % 50 == 0 or n == args.iters:
            if world > 1:
                dist.all_reduce(total)
            loss, decode, aux = (total / count / world).tolist()                    # waits for the GPU, so not every time
            seconds, wait = (time.monotonic() - window) / count, waited / count
            left = (args.iters - n) * (time.monotonic() - began) / (n - start)
            if rank == 0:
                log(f"{n}/{args.iters}  loss {loss:.4f} (decode {decode:.4f} + aux {aux:.4f})  lr {group['lr']:.3e}  "
                    f"{seconds:.3f} s/iter ({wait:.3f} waiting for data)  {args.batch_size / seconds:.1f} images/s  "
                    f"{int(left // 3600)}h{int(left // 60 % 60):02d}m left", iteration=n, loss=loss, decode=decode, aux=aux,
                    lr=group["lr"], seconds=seconds, data_seconds=wait, images_per_second=args.batch_size / seconds)
            window, total, waited, count = time.monotonic(), 0, 0.0, 0
        if n % args.interval == 0 or n == args.iters:
            pause = time.monotonic()
            if rank == 0:                                                           # save first: validation may fail
                save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                          iteration=n, seed=args.seed, args=vars(args)), os.path.join(work, f"checkpoint_{n}.pt"))
            result = validate(model, validation, args, rank, world, dtype, os.path.join(work, f"sheet_{n}.png"))
            if rank == 0:
                means = {k: result[k] for k in ("mIoU", "mAcc", "aAcc")}
                log(f"{n}/{args.iters}  validation: " + "  ".join(f"{k} {v:.2f}" for k, v in means.items())
                    + f"  ({len(validation)} pictures)", iteration=n, **means)
            pause = time.monotonic() - pause                                        # does not count as training
            began, window = began + pause, window + pause
    if rank == 0:
        print(f"{work}/checkpoint_{n}.pt: evaluate it with `python evaluate.py`\n{work}/sheet_{n}.png")
    if world > 1:
        dist.barrier()                          # nobody leaves while another may still be talking to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
