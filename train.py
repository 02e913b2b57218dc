"""Training: the published recipes, from pretrained weights to a checkpoint, on one process or many.

    batch (B, 3, S, S) uint8, (B, S, S) uint8 --normalise--> model --> loss --> backward --> AdamW or SGD, poly schedule

What the published runs did, where it differs from what their configs say: - "No weight decay for
norm layers": the key is `norm`, the layers are called `ln1`, `ln2`, so nothing matches. LayerNorm
  and BatchNorm decay; only cls_token and pos_embed do not. Same here.
- The poly factor goes on during the warmup: both are multiplied. - SGD is the base schedule that
the recipes override: no warmup, a floor of 1e-4, and everything decays."""

import argparse
import json
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from glob import glob

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ade20k import (
    DEFAULT_ROOT,
    Classes,
    TrainSet,
    data_root,
    find_pairs,
    normalise,
    positions,
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
    SIGNALS,
    start_worker,
    DTYPES,
    UsageError,
    autocast,
    checkpoints,
    choose_dtype,
    curves,
    evaluate,
    memory_format,
    prepare,
    scores,
    errors_in_one_sentence,
    setup_processes,
    sheet,
)
from model import ARCHS, NECKS
from upernet import Segmenter, build_model

# The published recipes. iters, arch and neck choose among them, the rest they have in common.
RECIPE = dict(
    arch="deit_s16",
    neck="none",
    iters=160000,
    optimizer="adamw",
    batch_size=16,
    crop_size=512,
    short_side=512,
    pretrained="auto",
)
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
OPTIMIZERS = {
    "adamw": dict(lr=6e-5, power=1.0, floor=0.0, warmup=1500),
    "sgd": dict(lr=0.01, power=0.9, floor=1e-4, warmup=0),
}
CHANGE_NOTHING = (
    "work_dir",
    "resume",
    "checkpoint",
    "workers",
    "keep",
    "timeout",
    "dry_run",
)  # arguments
PATIENCE = 5  # losses in a row that are not finite
RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def learning_rate(i: int, iters: int, lr: float, power: float, floor: float, warmup: int) -> float:
    """The rate of iteration i = 0 .. iters - 1: poly decay from lr to floor, times a linear warmup
    from 1e-6 to 1."""
    rate = (lr - floor) * (1 - i / iters) ** power + floor
    return rate * (1 - (1 - i / warmup) * (1 - 1e-6)) if i < warmup else rate


def build_optimizer(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or SGD with the published betas,
    momentum and decays."""
    if name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True
        )
    # Neither the class token nor the positions are weights that multiply something: pulling them to
    # 0 regularises nothing.
    tokens = [p for n, p in model.named_parameters() if n.endswith(("cls_token", "pos_embed"))]
    others = [p for n, p in model.named_parameters() if not n.endswith(("cls_token", "pos_embed"))]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": tokens, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.999), fused=True
    )  # fused: one kernel, same arithmetic


def split_batch(batch: int, world: int, micro: int | None, sync_bn: bool) -> tuple[int, int]:
    """batch = world processes x micro pictures at a time x accumulated steps. -> (micro, steps), or
    UsageError."""
    if batch % world:
        good = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UsageError(
            f"a batch of {batch} cannot be shared by {world} processes, {good} could; or change --batch-size"
        )
    share = batch // world
    micro = micro or share
    good = [n for n in range(1, share + 1) if share % n == 0 and (n > 1 or sync_bn)]
    if micro == 1 and not sync_bn:
        raise UsageError(
            "one picture at a time leaves BatchNorm a single value to normalise (the 1x1 pooling of the head): "
            f"use fewer processes or a larger --batch-size; --micro-batch {good} would work"
            if good
            else "a batch of one leaves BatchNorm a single value to normalise: use a larger --batch-size"
        )
    if share % micro:
        raise UsageError(
            f"--micro-batch {micro} does not divide the {share} pictures of each process, {good} would"
        )
    return micro, share // micro


def options() -> argparse.ArgumentParser:
    """The command line. What it leaves open is None, parse fills it in."""
    parser = argparse.ArgumentParser(
        description="Train ViT/DeiT + UPerNet on ADE20K. Defaults, in brackets, are the published DeiT-S recipe.",
        epilog="example: torchrun --nproc_per_node 8 train.py --arch deit_s16 --neck mln --iters 160000",
    )
    add = parser.add_argument_group("recipe").add_argument
    add("--arch", choices=ARCHS, help="(deit_s16; with --data toy: toy_p8)")
    add(
        "--neck",
        choices=NECKS,
        help="ln: LayerNorm after the last layer, mln: multi-level neck (none)",
    )
    add(
        "--iters", type=positive, help=f"80000 or 160000 are published (160000; toy {TOY['iters']})"
    )
    add("--optimizer", choices=OPTIMIZERS, help="(adamw)")
    add("--lr", type=float, help="base learning rate (adamw 6e-5, sgd 0.01; toy 2e-3)")
    add("--warmup", type=int, metavar="ITERS", help="linear warmup (adamw 1500, sgd 0; toy 50)")
    add("--batch-size", type=positive, help="pictures a step over all processes (16; toy 4)")
    add(
        "--crop-size",
        type=positive,
        metavar="PIXELS",
        help="side of the training crops (512; toy 96)",
    )
    add(
        "--short-side", type=positive, metavar="PIXELS", help="of pictures at scale 1 (512; toy 96)"
    )
    add(
        "--pretrained",
        metavar="auto|none|FILE|URL",
        help="auto: the backbone the recipe starts from, fetched once; none: "
        "from scratch; or any file convert_weights.py reads (auto; toy none)",
    )
    add("--seed", type=int, help="of data order, augmentation, initialisation and dropout (0)")
    add = parser.add_argument_group("run").add_argument
    add("--data", metavar="DIR", help=f"data set in ADE20K's layout, or toy ({DEFAULT_ROOT})")
    add(
        "--work-dir", metavar="DIR", help="checkpoints, log and pictures (a new folder under runs/)"
    )
    add(
        "--interval",
        type=positive,
        metavar="ITERS",
        help="validate and save every so often (a tenth of --iters; toy 200)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --work-dir, or under runs/",
    )
    add("--keep", type=positive, help="checkpoints to keep: the newest ones, beside the best (2)")
    add(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help="how long processes wait for one that hangs (1800)",
    )
    add(
        "--micro-batch",
        type=positive,
        help="pictures at once on each process, the rest of its share is accumulated (all)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="build everything, print the plan and stop; data and weights may be missing",
    )
    add = parser.add_argument_group("speed").add_argument
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        help="auto: bfloat16 where the hardware has it, else float32 (auto)",
    )
    add(
        "--workers", type=int, help="processes that read and augment, for each training process (2)"
    )
    add(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile the model: minutes at the start, then faster",
    )
    add(
        "--deterministic",
        action="store_true",
        default=None,
        help="the same result every time on one machine, slower",
    )
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The arguments; on --resume what the command line leaves open comes from the checkpoint, else
    from RECIPE (and TOY). -> (arguments, the content of the checkpoint to go on from or {})"""
    args, known, content = options().parse_args(argv), {}, {}
    if args.resume:
        args.checkpoint, content = usable_checkpoint(args.work_dir or "runs")
        known = content["args"] | {"work_dir": os.path.dirname(args.checkpoint)}
        for key in ("arch", "neck"):  # a checkpoint knows its own architecture, which wins
            if getattr(args, key) not in (None, known[key]):
                print(
                    f"--{key} {getattr(args, key)} is ignored: {args.checkpoint} is {known[key]}",
                    file=sys.stderr,
                )
            setattr(args, key, known[key])
        for key, value in known.items():  # these may change; none of them does so unnoticed
            if getattr(args, key, None) not in (None, value) and key not in CHANGE_NOTHING:
                print(
                    f"--{key.replace('_', '-')} was {value} until here, from here on {getattr(args, key)}",
                    file=sys.stderr,
                )
    recipe = TOY if "toy" in (args.data, known.get("data")) else {}
    known = (
        dict(data=DEFAULT_ROOT, seed=0, dtype="auto", workers=2, keep=2, timeout=1800)
        | RECIPE
        | recipe
        | known
    )
    known = OPTIMIZERS[args.optimizer or known["optimizer"]] | known  # lr and warmup
    for key, value in vars(args).items():
        if value is None:
            setattr(args, key, known.get(key))
    args.interval = args.interval or max(1, args.iters // 10)
    if (
        RESTARTED and not args.resume
    ):  # torchrun --max-restarts repeats the command: go on from what is there
        args.work_dir = args.work_dir or new_work_dir(args)
        args.resume = bool(glob(os.path.join(args.work_dir, "checkpoint_*.pt")))
        if args.resume:
            args.checkpoint, content = usable_checkpoint(args.work_dir)
    elif args.work_dir and not args.resume and glob(os.path.join(args.work_dir, "checkpoint_*.pt")):
        raise UsageError(
            f"{args.work_dir}: holds the checkpoints of a run, go on with it by --resume or name another"
        )
    return args, content


def positive(text: str) -> int:
    """argparse type: an integer above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def new_work_dir(args: argparse.Namespace) -> str:
    """runs/ARCH_NECK_DATA_ITERS, with -2, -3, ... if that is taken; after a restart by torchrun the
    last one taken."""
    base = (
        f"runs/{args.arch}_{args.neck}_{os.path.basename(os.path.normpath(args.data))}_{args.iters}"
    )
    names = [base + (f"-{n}" if n > 1 else "") for n in range(1, 10000)]
    free = next(k for k, name in enumerate(names) if not os.path.exists(name))
    return names[free - 1 if RESTARTED and free else free]


def usable_checkpoint(folder: str) -> tuple[str, dict]:
    """The newest checkpoint in a work directory, or below runs/, that is whole, and its content.
    Damaged ones are named and passed over."""
    found = checkpoints(os.path.dirname(checkpoints(folder)[0]))  # those of one run
    for path in found:
        try:
            damaged = zipfile.ZipFile(
                path
            ).testzip()  # compares every tensor's bytes with their checksum
            content = read_checkpoint(path)
            if damaged is None and {"model", "optimizer", "scaler", "iteration", "args"} <= set(
                content
            ):
                return path, content
            reason = f"damaged at {damaged}" if damaged else "not a training checkpoint"
        except (WeightsError, OSError, zipfile.BadZipFile) as error:
            reason = str(error)
        print(f"warning: {path} cannot be used ({reason}), trying the one before", file=sys.stderr)
    raise UsageError(
        f"{os.path.dirname(found[0])}: none of its {len(found)} checkpoints can be used, "
        "start anew without --resume"
    )


def write_log(path: str, entries: list[dict]) -> None:
    """All lines anew, moved into place: never half of one, and what a full disk refused comes with
    the next."""
    with open(path + ".part", "w") as file:
        file.writelines(json.dumps(e) + "\n" for e in entries)
    os.replace(path + ".part", path)


def attempt(path: str, write: Callable, *arguments) -> bool:
    """write(*arguments); where that fails (a full disk, say), days of training must not: it is
    said, and tried again when the next one is due. (torch reports some failed writes as
    RuntimeError.)"""
    try:
        write(*arguments)
        return True
    except (OSError, RuntimeError) as error:
        print(
            f"warning: {path} is not written ({str(error).splitlines()[0]}); training goes on, make room",
            file=sys.stderr,
        )
        return False


class Stopped(Exception):
    """The run ends before its last iteration: (sentence, exit code)."""


def watch_signals() -> list:
    """-> a list, empty until a signal asks this process to stop: then [128 + its number, when]. A
    second leaves at once."""
    asked = []

    def note(number, frame):
        # torchrun passes the terminal's Ctrl-C on to processes that got it from the terminal
        # themselves: same request.
        if asked and (time.monotonic() - asked[1] > 2 or "TORCHELASTIC_RUN_ID" not in os.environ):
            os._exit(128 + number)
        asked[:] = asked or [128 + number, time.monotonic()]

    for number in SIGNALS:
        signal.signal(number, note)
    return asked


def start_model(
    args: argparse.Namespace,
    content: dict,
    num_classes: int,
    rank: int,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Segmenter:
    """The model with its pretrained weights, or those of a checkpoint's content, on the device."""
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):  # a plan needs shapes, no numbers
        model = build_model(args.arch, args.neck, num_classes)
    if args.dry_run:
        return model.to_empty(device=device)
    source = PRETRAINED.get(args.arch) if args.pretrained == "auto" else args.pretrained
    if content:
        model.load_state_dict(content["model"])
    elif source is None:
        raise UsageError(
            f"there is no pretrained file for {args.arch}: --pretrained none starts from scratch"
        )
    elif source != "none":
        state_dict, facts = load_weights(source)  # (a URL: one process fetches it, the others wait)
        load_into(model, state_dict, facts, new_classes=True)
        if rank == 0:
            print(f"{source}: {describe(facts)}")
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(
            model
        )  # statistics over all 16 pictures, as published
    return prepare(model, device, dtype, args.compile)


def gradients(
    model: nn.Module,
    batch: tuple,
    micro: int,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Adds the gradients of one process's share of a batch, `micro` pictures at a time. -> (3,)
    loss, decode, aux"""
    images, labels, sizes = (t.split(micro) for t in batch)
    total, steps = 0, len(images)
    for k, (x, y, size) in enumerate(zip(images, labels, sizes)):
        x, y, size = (
            t.to(device, non_blocking=True) for t in (x, y, size)
        )  # uint8: a quarter of float32's traffic
        x = normalise(x, size).contiguous(memory_format=memory_format(device, dtype))
        # Gradients travel between the processes once a batch, with its last part.
        wait = isinstance(model, DistributedDataParallel) and k < steps - 1
        with model.no_sync() if wait else nullcontext():
            with autocast(device, dtype):
                loss, parts = model(x, y.long())
            scaler.scale(loss / steps).backward()
        total = total + torch.stack([loss.detach(), parts["decode"], parts["aux"]]) / steps
    return total


class Run:
    """The parts of a run, on one of its processes: what the loop below needs, and what a checkpoint
    holds."""

    def __init__(self, args: argparse.Namespace, content: dict):
        self.args = args
        self.rank, self.world, self.device = rank, world, device = setup_processes(args.timeout)
        if (
            args.deterministic
        ):  # kernels that add in a fixed order, slower; torch warns of those that have none
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = (
            not args.deterministic
        )  # every crop has one size: let cuDNN try its kernels once
        self.micro, self.steps = split_batch(
            args.batch_size, world, args.micro_batch, world > 1 and device.type == "cuda"
        )
        root = data_root(args.data)
        self.pairs, self.validation = (
            ([], [])
            if args.dry_run and not os.path.isdir(root)
            else (find_pairs(root, "training"), find_pairs(root, "validation"))
        )
        self.classes = read_classes(root)
        if content and Classes(*content.get("classes", self.classes)) != self.classes:
            raise UsageError(
                f"{root}: its classes are not those that {args.checkpoint} was trained on, give it back its "
                f"classes.txt or start anew with --pretrained {args.checkpoint}"
            )
        self.dtype, self.start = choose_dtype(args.dtype, device), content.get("iteration", 0)
        self.model = start_model(
            args, content, len(self.classes.names), rank, world, device, self.dtype
        )
        self.parallel = (
            DistributedDataParallel(self.model) if world > 1 and not args.dry_run else self.model
        )
        self.optimizer = build_optimizer(self.model, args.optimizer, args.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if content:
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(
                content["scaler"] or self.scaler.state_dict()
            )  # empty: it was not in float16
        self.best = content.get("best", {})  # the validation with the highest mIoU
        self.window = content.get(
            "window", [0.0] * 4
        )  # sums since the last log line: loss, decode, aux, iterations
        self.samples = TrainSet(
            self.pairs, args.seed, args.crop_size, args.short_side, self.classes
        )
        self.loader = torch.utils.data.DataLoader(
            self.samples,
            batch_sampler=positions(self.start, args.iters, args.batch_size, rank, world),
            num_workers=args.workers,
            worker_init_fn=start_worker,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if args.workers else None,
        )

    def plan(self) -> str:
        args, n = self.args, sum(p.numel() for p in self.model.parameters())
        data = f"{args.data}: " + (
            f"{len(self.pairs)} training pictures" if self.pairs else "the data is not there yet"
        )
        return (
            f"{args.work_dir or new_work_dir(args)}: {args.arch}, neck {args.neck}, {n:,} parameters, "
            f"{str(self.dtype)[6:]} on {self.world} x {self.device.type}\nbatch {args.batch_size} = {self.world} processes"
            f" x {self.micro} pictures x {self.steps} accumulated; {data}, iterations {self.start} to {args.iters}"
        )

    def open(self) -> None:
        """Start writing: the work directory and the log."""
        self.work = self.args.work_dir = self.args.work_dir or new_work_dir(self.args)
        self.asked = watch_signals()
        if self.rank == 0:
            os.makedirs(self.work, exist_ok=True)
            self.entries, self.log_path = [], os.path.join(self.work, "log.jsonl")
            if self.start and os.path.exists(
                self.log_path
            ):  # what came after the checkpoint will come again
                with open(self.log_path) as file:
                    self.entries = [
                        e for e in map(json.loads, file) if e["iteration"] <= self.start
                    ]
            self.log(self.plan(), **{} if self.start else dict(iteration=0, args=vars(self.args)))

    def log(self, words: str, **entry) -> None:
        """Words for the terminal, and the same as one JSON object a line in WORK_DIR/log.jsonl. On
        rank 0 alone."""
        print(words, flush=True)
        if entry:
            self.entries.append(entry)
            attempt(self.log_path, write_log, self.log_path, self.entries)

    def share(self, *values: float) -> list[float]:
        """The sum of each value over all processes, on the CPU (gloo) also beside NCCL."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def step(self, i: int, batch: tuple) -> tuple[bool, bool]:
        """Iteration i: one update of the weights. -> (was any process asked to stop?, was the loss
        finite?)"""
        # Dropout and drop path: a seed of their own for every iteration and process, so a resumed
        # run needs no rng state.
        torch.manual_seed((self.args.seed << 40) + (i << 10) + self.rank)
        schedule = OPTIMIZERS[self.args.optimizer] | dict(lr=self.args.lr, warmup=self.args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(i, self.args.iters, **schedule)
        statistics = [
            b.clone() for b in self.model.buffers()
        ]  # BatchNorm's, before this batch is added to them
        losses = gradients(self.parallel, batch, self.micro, self.scaler, self.device, self.dtype)
        finite = (
            torch.isfinite(losses).all().item()
        )  # waits for the GPU: this must be known before the update
        stop, broken, *losses = self.share(
            bool(self.asked), not finite, *(losses / self.world).tolist()
        )
        if broken:  # in any process: all of them leave weights and statistics as they were
            for b, old in zip(self.model.buffers(), statistics):
                b.copy_(old)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.window = [a + b for a, b in zip(self.window, (*losses, 1))]
        self.optimizer.zero_grad()
        return bool(stop), not broken

    def save(self, n: int) -> str | None:
        """Write checkpoint_n.pt, on rank 0; the others wait until that is done. -> its path, None
        where it failed"""
        path, done = os.path.join(self.work, f"checkpoint_{n}.pt"), 0
        if self.rank == 0:
            best = max(
                (e for e in [self.best, *self.entries] if e.get("mIoU") is not None),
                key=lambda e: e["mIoU"],
                default={},
            )
            done = attempt(
                path,
                write_checkpoint,
                dict(
                    model=self.model.state_dict(),
                    optimizer=self.optimizer.state_dict(),
                    scaler=self.scaler.state_dict(),
                    iteration=n,
                    window=self.window,
                    best=best,
                    seed=self.args.seed,
                    args=vars(self.args),
                    classes=tuple(self.classes),
                ),
                path,
            )
            number = lambda p: int(re.search(r"_(\d+)\.pt$", p)[1])  # noqa: E731
            old = sorted(glob(os.path.join(self.work, "checkpoint_*.pt")), key=number)[
                : -self.args.keep
            ]
            for other in old if done else []:
                if number(other) != best.get("iteration"):
                    os.remove(other)
        return path if self.share(done)[0] else None

    def validate(self, n: int) -> None:
        """Scores on the validation pictures; rank 0 logs them and draws four of its own. Stopped
        when a signal comes."""
        shown = {
            len(self.validation) * k // 4 // self.world * self.world for k in range(4)
        }  # spread over the set
        rows, path = [], os.path.join(self.work, f"sheet_{n}.png")
        for b in (
            self.model.buffers() if self.world > 1 else ()
        ):  # without SyncBN each process has statistics of its own:
            dist.broadcast(b, 0)  # all judge the model that the checkpoint holds

        def each(i, name, *row):
            if self.asked:
                raise Stopped(
                    "stopped during the validation; go on with --resume, it comes first then",
                    self.asked[0],
                )
            rows.extend([row] if i in shown else [])

        with torch.compiler.set_stance(
            "force_eager"
        ):  # --compile is for crops, which have one size
            matrix = evaluate(
                self.model,
                self.validation,
                self.classes,
                self.rank,
                self.world,
                self.args.workers,
                short=self.args.short_side,
                dtype=self.dtype,
                each=each,
            )
        if self.rank == 0:
            means = {k: v for k, v in scores(matrix).items() if k in ("mIoU", "mAcc", "aAcc")}
            words = "  ".join(
                f"{k} none" if v is None else f"{k} {v:.2f}" for k, v in means.items()
            )
            self.log(
                f"{n}/{self.args.iters}  validation: {words}  ({len(self.validation)} pictures)",
                iteration=n,
                **means,
            )
            attempt(path, sheet(rows, self.classes).save, path)
            path = os.path.join(self.work, "curves.png")
            attempt(path, curves(self.entries).save, path)


def train(args: argparse.Namespace, content: dict) -> None:
    run = Run(args, content)
    if args.dry_run:
        if run.rank == 0:
            print(run.plan())
        return
    run.open()
    # A run that stopped between saving and validating has the validation of its iteration still to
    # come.
    due = run.start and (run.start % args.interval == 0 or run.start == args.iters)
    if run.share(
        run.rank == 0
        and due
        and not any(e["iteration"] == run.start and "mIoU" in e for e in run.entries)
    )[0]:
        run.validate(run.start)
    elif run.start >= args.iters:
        raise UsageError(
            f"{args.checkpoint}: has all of its {run.start} iterations, nothing is left to train"
        )
    batches, since, clock, waited, broken = iter(run.loader), run.start, time.monotonic(), 0.0, 0
    path = getattr(args, "checkpoint", None)
    for i in range(run.start, args.iters):
        n, before = i + 1, time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        stop, finite = run.step(i, batch)
        broken = 0 if finite else broken + 1
        if broken and run.rank == 0:
            files = ", ".join(
                run.samples.paths(p)[0] for p in range(i * args.batch_size, n * args.batch_size)
            )
            run.log(
                f"warning: iteration {n}: the loss is not finite, the step is not taken; its pictures: {files}",
                iteration=n,
                skipped=files,
            )
        if n % 50 == 0 or n == args.iters:
            loss, decode, aux = (x / max(run.window[3], 1) for x in run.window[:3])
            seconds, wait = (time.monotonic() - clock) / (n - since), waited / (n - since)
            left, lr = (args.iters - n) * seconds, run.optimizer.param_groups[0]["lr"]
            if run.rank == 0:
                run.log(
                    f"{n}/{args.iters}  loss {loss:.4f} (decode {decode:.4f} + aux {aux:.4f})  lr {lr:.3e}  "
                    f"{seconds:.3f} s/iter ({wait:.3f} waiting for data)  {args.batch_size / seconds:.1f} images/s  "
                    f"{int(left // 3600)}h{int(left // 60 % 60):02d}m left",
                    iteration=n,
                    loss=loss,
                    decode=decode,
                    aux=aux,
                    lr=lr,
                    seconds=seconds,
                    data_seconds=wait,
                    images_per_second=args.batch_size / seconds,
                )
            run.window, since, clock, waited = [0.0] * 4, n, time.monotonic(), 0.0
        due = n % args.interval == 0 or n == args.iters
        if due or stop or broken == PATIENCE:
            path = run.save(n)
            where = (
                f"{path} holds all of it, go on with --resume"
                if path
                else "this state could not be saved"
            )
            if broken == PATIENCE:
                raise Stopped(
                    f"error: the loss was not finite {PATIENCE} times in a row and none of these steps was taken: "
                    f"{where} and a lower --lr, or without the pictures named above",
                    3,
                )
            if stop:
                raise Stopped(
                    f"stopped by a signal after iteration {n}: {where}",
                    (run.asked or [128 + signal.SIGTERM])[0],
                )
            before = time.monotonic()
            run.validate(n)
            clock += time.monotonic() - before  # does not count as training
    if path is None:
        raise Stopped(
            "error: the last checkpoint could not be saved, make room and go on with --resume", 1
        )
    if run.rank == 0:
        print(f"{path}: evaluate it with `python evaluate.py`\n{run.work}/sheet_{args.iters}.png")
    if run.world > 1:
        dist.barrier()  # nobody leaves while another may still be talking to it
        dist.destroy_process_group()


def main() -> None:
    with errors_in_one_sentence():
        args, content = parse()
        try:
            train(args, content)
        except Stopped as stopped:
            print(stopped.args[0], file=sys.stderr)
            sys.exit(stopped.args[1])
        except RuntimeError as error:
            if not re.search("[Tt]imed out|onnection (closed|reset)|Broken pipe", str(error)):
                raise
            sys.exit(
                f"error: another process has died or hangs ({str(error).splitlines()[0]}); go on with --resume"
            )


if __name__ == "__main__":
    main()
