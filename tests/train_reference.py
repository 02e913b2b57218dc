"""A whole training beside the reference's: mmsegmentation 0.17.0 trains what train.py does.

Run in the reference's environment, which has all that ours needs:

    python tests/train_reference.py REFERENCE_DIR --jobs 2           # the toy set, five seeds each
    python tests/train_reference.py REFERENCE_DIR --data DIR --both  # all pictures of DIR

REFERENCE_DIR holds mmseg017.py. Both sides follow the toy recipe (train.TOY) and start from the
same weights: ours of the seed, translated by to_mmseg. Everything else on the reference's side is
its own code: network, data set, pipeline, sampler, optimizer with its groups, schedule, metric.

The two draw their random numbers in different ways, so no two runs see the same crops: one run
cannot be compared with one run, the means over seeds can. Each run is a process of its own with one
thread and leaves a file in --out; a run whose file is there is not repeated."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from statistics import mean

import torch

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)
from ade20k import data_root, read_classes  # noqa: E402
from convert_weights import to_mmseg  # noqa: E402
from experiments import spread, standard_error  # noqa: E402  (beside this file)
from model import ARCHS  # noqa: E402
from train import TOY  # noqa: E402
from upernet import build_model  # noqa: E402

SIDES = ("reference", "ours")


# ---- the two sides -------------------------------------------------------------------------------


def train_ours(recipe, root, seed, out):
    """train.py from the command line. -> [[iteration, mIoU], ...]"""
    folder = os.path.join(out, f"{recipe['iters']}_{seed}")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    command = [sys.executable, os.path.join(PROJECT, "train.py"), "--data", root]
    command += ["--seed", str(seed), "--dtype", "float32", "--workers", "0", "--work-dir", folder]
    for name, value in recipe.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True)

    with open(os.path.join(folder, "log.jsonl")) as file:
        entries = [json.loads(line) for line in file]
    return [[e["iteration"], e["mIoU"]] for e in entries if "mIoU" in e]


def train_theirs(recipe, root, seed, out):
    """The reference's train_segmentor, on a CPU. -> [[iteration, mIoU], ...]"""
    import mmseg017
    from mmcv.parallel import MMDataParallel
    from mmcv.runner import build_optimizer, build_runner
    from mmseg.apis import set_random_seed
    from mmseg.core import EvalHook
    from mmseg.utils import get_root_logger

    classes = read_classes(root)
    cfg = reference_config(mmseg017.config("deit_s16", "none"), recipe, root, classes)
    model = mmseg017.build_segmentor(cfg.model)
    torch.manual_seed(seed)
    start = build_model(recipe["arch"], num_classes=len(classes.names)).state_dict()
    model.load_state_dict(to_mmseg(start))  # strict: every tensor is used, every one is set
    # The head adds to its laterals in place, which today's ReLU does not allow: see make_goldens.py
    for conv in model.decode_head.lateral_convs:
        conv.register_forward_hook(lambda *a: a[-1].clone())

    set_random_seed(seed)
    training, validation = their_loaders(cfg, recipe)
    curve = []

    class OnCPU(MMDataParallel):  # whose own train_step adds a dimension to batches on a CPU
        def train_step(self, batch, optimizer):
            batch = {name: container.data[0] for name, container in batch.items()}
            return self.module.train_step(batch, optimizer)

    class Curve(EvalHook):
        def evaluate(self, runner, results):
            result = self.dataloader.dataset.evaluate(results, metric="mIoU")
            curve.append([runner.iter + 1, 100 * float(result["mIoU"])])
            print(flush=True)

    model = OnCPU(model, device_ids=[])
    optimizer = build_optimizer(model, cfg.optimizer)
    parts = dict(model=model, optimizer=optimizer, work_dir=out, logger=get_root_logger())
    runner = build_runner(dict(type="IterBasedRunner", max_iters=recipe["iters"]), parts)
    runner.register_training_hooks(cfg.lr_config, dict())
    runner.register_hook(Curve(validation, interval=recipe["interval"], pre_eval=True))
    runner.run([training], [("train", 1)])
    return curve


def their_loaders(cfg, recipe):
    """The reference's batches for training, and its pictures for validation."""
    from mmseg.datasets import build_dataloader, build_dataset

    loaders = []
    for split, training in ((cfg.data.train, True), (cfg.data.val, False)):
        data = build_dataset(split, None if training else dict(test_mode=True))
        loader = build_dataloader(
            data,
            samples_per_gpu=recipe["batch_size"] if training else 1,
            workers_per_gpu=0,
            dist=False,
            shuffle=training,
            drop_last=training,
            persistent_workers=False,
        )
        loaders.append(loader)
    return loaders


def reference_config(cfg, recipe, root, classes):
    """The released config of DeiT-S with the sizes of the recipe's architecture, its crops, its
    schedule, and the classes of the data set."""
    arch, width = ARCHS[recipe["arch"]], ARCHS[recipe["arch"]]["width"]
    quarter = arch["depth"] // 4
    m = cfg.model
    m.pretrained = None
    m.backbone.update(
        img_size=(arch["grid"] * arch["patch"],) * 2,
        patch_size=arch["patch"],
        embed_dims=width,
        num_layers=arch["depth"],
        num_heads=arch["heads"],
        out_indices=tuple(range(quarter - 1, arch["depth"], quarter)),
        drop_path_rate=arch["drop_path"],
    )
    m.decode_head.update(in_channels=[width] * 4, channels=arch["channels"])
    m.auxiliary_head.update(in_channels=width, channels=arch["channels"] // 2)
    for head in (m.decode_head, m.auxiliary_head):
        head.norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN is for GPUs
        head.num_classes = len(classes.names)

    crop = (recipe["crop_size"],) * 2
    scale = (4 * recipe["short_side"], recipe["short_side"])
    for step in cfg.data.train.pipeline:
        if step.type == "LoadAnnotations":
            step.reduce_zero_label = classes.zero_ignored
        if step.type == "Resize":
            step.img_scale = scale
        if step.type == "RandomCrop":
            step.crop_size = crop
        if step.type == "Pad":
            step.size = crop
    cfg.data.val.pipeline[1].img_scale = scale
    for split in (cfg.data.train, cfg.data.val):  # ADE20KDataset knows only its own 150 classes
        split.update(
            type="CustomDataset",
            data_root=root,
            classes=classes.names,
            palette=classes.palette,
            reduce_zero_label=classes.zero_ignored,
            img_suffix=".jpg",
            seg_map_suffix=".png",
        )

    cfg.optimizer.lr = recipe["lr"]
    cfg.lr_config.warmup_iters = recipe["warmup"]
    return cfg


# ---- all runs ------------------------------------------------------------------------------------


def all_pictures(root, out):
    """A data set of links, whose training and validation are both all pictures of root."""
    new = os.path.join(out, "data")
    os.makedirs(new, exist_ok=True)
    names = os.path.join(root, "classes.txt")
    if os.path.exists(names):
        shutil.copy(names, new)
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            folder = os.path.join(new, kind, split)
            os.makedirs(folder, exist_ok=True)
            for path in glob(os.path.join(os.path.abspath(root), kind, "*", "*")):
                link = os.path.join(folder, os.path.basename(path))
                if not os.path.exists(link):
                    os.symlink(path, link)
    return new


def result_file(args, side, seed):
    return os.path.join(args.out, side, f"{args.iters}_{seed}.json")


def train_one(args, recipe, root, side, seed):
    """One run in this process; its curve is left in a file."""
    torch.set_num_threads(1)
    out = os.path.join(args.out, side)
    os.makedirs(out, exist_ok=True)
    curve = (train_ours if side == "ours" else train_theirs)(recipe, root, seed, out)
    with open(result_file(args, side, seed), "w") as file:
        json.dump(curve, file)


def train_all(args):
    """Those runs whose files are not there yet, --jobs at a time."""
    missing = [
        (side, seed)
        for seed in args.seeds
        for side in SIDES
        if not os.path.exists(result_file(args, side, seed))
    ]

    def start(item):
        side, seed = item
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        command = [sys.executable, *sys.argv, "--here", side, str(seed)]
        with open(os.path.join(args.out, f"{side}_{args.iters}_{seed}.txt"), "w") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=file)
        if done.returncode:
            print(f"error: the run failed, see {file.name}", file=sys.stderr)
        return done.returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        if any(pool.map(start, missing)):
            sys.exit(1)


# ---- the table -----------------------------------------------------------------------------------


def table(args):
    """The curves' means over seeds, then every run's last number."""
    curves = {}
    for side in SIDES:
        files = [result_file(args, side, seed) for seed in args.seeds]
        curves[side] = [dict(json.load(open(path))) for path in files]

    steps = list(curves["ours"][0])
    print("| mIoU after | " + " | ".join(map(str, steps)) + " | last, by seed |")
    print("| --- " * (len(steps) + 2) + "|")
    for side, runs in curves.items():
        cells = []
        for step in steps:
            values = [run[step] for run in runs]
            few = f" ± {spread(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{few}")
        last = ", ".join(f"{run[steps[-1]]:.2f}" for run in runs)
        print(f"| {side} | {' | '.join(cells)} | {last} |")

    a, b = ([run[steps[-1]] for run in curves[side]] for side in ("ours", "reference"))
    if len(a) > 1:
        print(
            f"\nours - reference: {mean(a) - mean(b):+.2f}, standard error "
            f"{standard_error(a, b):.2f} (± is the standard deviation of one run)"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("reference", metavar="REFERENCE_DIR", help="holds mmseg017.py")
    add("--data", default="toy", metavar="DIR", help="a data set of jpg and png files (toy)")
    add("--both", action="store_true", help="train and validate on all pictures of --data")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--iters", type=int, default=TOY["iters"], help="(%(default)s)")
    add("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    add("--out", metavar="DIR", help="(runs/reference_ and the name of --data)")
    add("--here", nargs=2, help=argparse.SUPPRESS)  # side and seed: one run, in this process
    args = parser.parse_args()

    sys.path.insert(0, args.reference)
    name = os.path.basename(os.path.normpath(args.data))
    args.out = args.out or os.path.join("runs", f"reference_{name}")
    os.makedirs(args.out, exist_ok=True)
    root = all_pictures(args.data, args.out) if args.both else data_root(args.data)
    recipe = TOY | dict(iters=args.iters, interval=max(1, args.iters // 4))
    if args.here:
        return train_one(args, recipe, root, args.here[0], int(args.here[1]))
    train_all(args)
    table(args)


if __name__ == "__main__":
    main()
