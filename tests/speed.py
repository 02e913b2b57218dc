"""Every timing there is. Nothing else should run meanwhile.

    python tests/speed.py                       # the published models on this machine
    python tests/speed.py models --arch deit_s16 --neck mln --dtype float32
    python tests/speed.py scaling               # against the picture's area, and the batch
    python tests/speed.py data --data DIR       # training pictures, from file to crop
    python tests/speed.py peers --data DIR      # beside mmsegmentation 1.2.2; half an hour

Every figure is taken in a process of its own, after a warm-up: the fastest of several runs, and the
peak memory, on a GPU of what torch gave out, on a CPU of the whole process. "Of peak" is the share
of what one large matrix product reaches right before, in the same process (a shared machine's speed
drifts). --dtype auto, the default, is bfloat16 where the hardware has it.

peers needs an environment with both: pip install -r requirements.txt, then mmsegmentation==1.2.2
mmcv-lite==2.1.0 mmengine==0.10.7 ftfy regex opencv-python-headless. Both sides get random weights
of the same shapes, the same pictures and all threads (training pictures one), and are measured in
turn, in two rounds. mmsegmentation computes in float32, its default on CPUs; here it is float32,
and again --dtype.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import ade20k  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from model import ARCHS, NECKS  # noqa: E402
from upernet import build_model  # noqa: E402

# The "ln" variants differ by one LayerNorm, DeiT-B + MLN and ViT-B + MLN by their weights alone.
PAIRS = [("deit_s16", "none"), ("deit_s16", "mln"), ("deit_b16", "none"), ("vit_b16", "mln")]
PEER_PAIRS = [("deit_s16", "none"), ("deit_s16", "mln"), ("vit_b16", "mln")]
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


# ---- what is measured ----------------------------------------------------------------------------


def baddbmm_flops(total, a, b, out_shape=None):
    """Of Tensor.baddbmm_, which torch's counter would pass over: it knows the other form alone."""
    batch, rows, inner = a
    return 2 * batch * rows * inner * b[2]


def count_flops(arch, neck, height, width, training=False):
    """Operations (two per multiply and add) in matrix products and convolutions for one picture:
    forward through the head, or in training forward and backward through both heads."""
    in_place = {torch.ops.aten.baddbmm_: baddbmm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.device("meta"), counter:  # shapes without numbers
        model = build_model(arch, neck)
        maps = model.features(torch.zeros(2, 3, height, width))
        logits = model.decode_head(maps)
        if training:
            auxiliary = model.auxiliary_head(maps)
            loss = logits.sum() + auxiliary.sum()
            loss.backward()
    return counter.get_total_flops() / 2


def training_step(model, size, batch, device, dtype):
    """-> a function that takes one step of train.py's loop on random pictures."""
    rng = np.random.default_rng(0)
    optimizer = train.build_optimizer(model, "adamw", 6e-5)
    pixels = rng.integers(0, 256, (batch, 3, size, size), np.uint8)
    classes = rng.integers(0, 150, (batch, size, size), np.uint8)
    images = torch.from_numpy(pixels)
    labels = torch.from_numpy(classes)
    layout = evaluate.memory_format(device, dtype)

    def step():
        x = ade20k.normalise(images.to(device))
        x = x.contiguous(memory_format=layout)
        truth = labels.to(device).long()
        with evaluate.autocast(device, dtype):
            loss, _ = model(x, truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ours(what, arch, neck, size, batch, dtype, pairs):
    """-> (a function that does the work once, on how many pictures, operations or None)"""
    _, _, device = evaluate.setup_processes()
    if what == "data":
        samples = ade20k.TrainSet(pairs, seed=0)
        count = 4 * len(pairs)
        return lambda: [samples[k] for k in range(count)], count, None

    model = evaluate.prepare(build_model(arch, neck), device, dtype, False)
    if what == "training":
        flops = batch * count_flops(arch, neck, size, size, training=True)
        return training_step(model, size, batch, device, dtype), batch, flops

    model.eval()
    if what == "multi-scale":
        image = ade20k.load_image(pairs[0][0])
        return lambda: evaluate.predict(model, image, SCALES, True, dtype=dtype), 1, None

    flops = count_flops(arch, neck, size, size)
    if what == "head":  # a batch, to logits at the head's size
        x = torch.randn(batch, 3, size, size, device=device)

        def forward():
            with torch.inference_mode():
                evaluate.view_logits(model, x, dtype)

        return forward, batch, batch * flops

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    return lambda: evaluate.predict(model, image, short=size, dtype=dtype), 1, flops


class Absent(types.ModuleType):
    """mmcv.ops: compiled, and never called by ViT and UPerNet."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def plain_batch_norm(node):
    """A config with BN for SyncBN, which runs on GPUs alone."""
    if isinstance(node, dict):
        return {k: "BN" if v == "SyncBN" else plain_batch_norm(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain_batch_norm(v) for v in node]
    return node


def their_config(arch, neck):
    """mmsegmentation's config of a published pair, and all that it names ready to be built."""
    warnings.filterwarnings("ignore")
    sys.modules.setdefault("mmcv.ops", Absent("mmcv.ops"))
    import mmseg
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.utils import register_all_modules

    logging.disable(logging.WARNING)
    register_all_modules()
    init_default_scope("mmseg")

    middle = {"none": "_upernet", "mln": "_mln_upernet"}[neck]
    name = f"vit_{arch.replace('_', '-')}{middle}_8xb2-160k_ade20k-512x512.py"
    folder = os.path.join(os.path.dirname(mmseg.__file__), ".mim/configs/vit")
    return Config.fromfile(os.path.join(folder, name))


def theirs(what, arch, neck, size, batch, pairs):
    """-> (a function in which mmsegmentation does the work once, on how many pictures)"""
    cfg = their_config(arch, neck)
    samples = []
    for image_path, label_path in pairs:
        sample = dict(img_path=image_path, seg_map_path=label_path, seg_fields=[])
        samples.append(sample | dict(reduce_zero_label=True, label_map=None))

    if what == "data":
        return their_transforms(cfg, samples * 4), 4 * len(samples)

    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    settings = cfg.model.to_dict() | {"pretrained": None}
    model = MODELS.build(ConfigDict(plain_batch_norm(settings)))
    if what == "training":
        return their_training_step(model, cfg, size, batch), batch

    model.eval()
    if what == "multi-scale":
        return their_multi_scale(model, cfg, samples[0]), 1
    return their_inference(model, size), 1


def their_transforms(cfg, samples):
    """-> a function that reads and augments training pictures."""
    import cv2
    from mmcv.transforms import Compose

    cv2.setNumThreads(1)
    pipeline = Compose(cfg.train_pipeline)
    return lambda: [pipeline(dict(sample)) for sample in samples]


def their_training_step(model, cfg, size, batch):
    """-> a function that takes one step on random pictures."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, size, size), np.uint8)
    classes = rng.integers(0, 150, (1, size, size))
    picture = torch.from_numpy(pixels)
    label = PixelData(data=torch.from_numpy(classes))

    meta = dict(img_shape=(size, size))
    samples = [SegDataSample(gt_sem_seg=label, metainfo=meta) for _ in range(batch)]
    data = dict(inputs=[picture] * batch, data_samples=samples)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    return lambda: model.train_step(data, optimizer)


def their_multi_scale(model, cfg, sample):
    """-> a function that labels one picture at six scales, flipped and not."""
    from mmcv.transforms import Compose
    from mmengine.dataset import pseudo_collate
    from mmseg.models import SegTTAModel

    # Its config scales each picture's own size. The published protocol, as here, scales
    # (2048, 512).
    sizes = [(int(2048 * scale), int(512 * scale)) for scale in SCALES]
    resizes = [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes]
    cfg.tta_pipeline[1]["transforms"][0] = resizes

    tester = SegTTAModel(module=model).eval()
    pipeline = Compose(cfg.tta_pipeline)

    def label():
        views = pipeline(dict(sample))
        with torch.no_grad():
            tester.test_step(pseudo_collate([views]))

    return label


def their_inference(model, size):
    """-> a function that labels one random picture."""
    from mmseg.structures import SegDataSample

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, size, size), np.uint8)
    picture = torch.from_numpy(pixels)
    meta = dict(ori_shape=(size, size), img_shape=(size, size), pad_shape=(size, size))

    def label():
        samples = [SegDataSample(metainfo=meta)]
        with torch.no_grad():
            model.test_step(dict(inputs=[picture], data_samples=samples))

    return label


# ---- measuring -----------------------------------------------------------------------------------


def measure(action, device, runs):
    """-> (seconds of the fastest of `runs` after a warm-up, peak MB)"""
    times = []
    for run in range(runs + 1):
        began = time.perf_counter()
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize()  # kernels run behind Python's back
        if run > 0:
            times.append(time.perf_counter() - began)

    return min(times), peak_memory(device) / 1e6


def peak_memory(device):
    """-> bytes"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")

    unit = 1 if sys.platform == "darwin" else 1024
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return unit * usage.ru_maxrss


def matmul_rate(device, dtype):
    """Floating-point operations a second of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds, _ = measure(lambda: a @ b, device, 5)
    return 2 * n**3 / seconds


def measure_here(item, args):
    """One figure, in this process: prints it as JSON."""
    side, what, arch, neck, size, batch = item.split()
    pairs = []
    if args.data:
        root = ade20k.data_root(args.data)
        pairs = ade20k.find_pairs(root, "training")
    if what == "data":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {0})

    device = evaluate.choose_device(world=1)
    dtype = evaluate.choose_dtype(args.dtype, device)
    work = (what, arch, neck, int(size), int(batch))
    if side == "theirs":
        action, pictures = theirs(*work, pairs)
        flops = None
    else:
        action, pictures, flops = ours(*work, dtype, pairs)
    rate = None
    if flops:
        rate = matmul_rate(device, dtype)

    runs = {"multi-scale": 1, "training": 2, "data": 2}.get(what, args.runs)
    seconds, peak = measure(action, device, runs)
    figures = dict(
        seconds=seconds,
        pictures=pictures,
        peak=peak,
        flops=flops,
        rate=rate,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    print(json.dumps(figures))


def figure(args, what, arch="deit_s16", neck="none", size=512, batch=1, side="ours", dtype=None):
    """The figures of one item, measured in a process of its own."""
    item = f"{side} {what} {arch} {neck} {size} {batch}"
    command = [sys.executable, os.path.abspath(__file__), args.table, "--here", item]
    command += ["--dtype", dtype or args.dtype]
    command += ["--runs", str(args.runs)]
    if args.data:
        command += ["--data", args.data]

    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {side} {what} {arch} {neck} could not be measured, see above")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the tables ----------------------------------------------------------------------------------


def row(*cells):
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def header(*names):
    row(*names)
    row(*["---"] * len(names))


def of_peak(f):
    reached = f["flops"] / f["seconds"]
    return f"{reached / f['rate']:.0%}"


def models(args):
    """Each published pair: labelling one picture, and a training step of two (as each of the eight
    GPUs of a published run had them)."""
    pairs = PAIRS
    if args.arch or args.neck:
        pairs = [(args.arch or "deit_s16", args.neck or "none")]

    for what, batch in (("inference", 1), ("training", 2)):
        header(what, "GFLOP", "seconds", "pictures a second", "MB", "of peak")
        for arch, neck in pairs:
            f = figure(args, what, arch, neck, args.size, batch)
            cells = [
                f"{f['flops'] / 1e9:.0f}",
                f"{f['seconds']:.3f}",
                f"{f['pictures'] / f['seconds']:.2f}",
                f"{f['peak']:.0f}",
                of_peak(f),
            ]
            row(f"{arch} {neck}", *cells)
        print()

    rate = f"matrix products at {f['rate'] / 1e9:.0f} GFLOP/s"
    machine = f"{f['device']}, {f['threads']} threads, {f['dtype']}"
    print(f"{machine}, {rate}; {args.size}x{args.size}")


def scaling(args):
    """Time against the picture's area and against the batch."""
    arch = args.arch or "deit_s16"
    neck = args.neck or "none"
    header("", "inference, s", "of peak", "training, s", "of peak")

    sizes = [(size, 2) for size in (256, 512, 768, 1024)]
    sizes += [(256, batch) for batch in (1, 4, 8)]
    for size, batch in sizes:
        f = figure(args, "head", arch, neck, size, batch)
        cells = [f"{f['seconds']:.3f}", of_peak(f)]
        if batch > 1:  # BatchNorm
            f = figure(args, "training", arch, neck, size, batch)
            cells += [f"{f['seconds']:.3f}", of_peak(f)]
        else:
            cells += ["", ""]
        row(f"{batch} of {size}x{size}", *cells)


def data(args):
    """Training pictures from file to augmented 512x512 crop, on one core."""
    f = figure(args, "data")
    ms = 1000 * f["seconds"] / f["pictures"]
    rate = 1000 / ms
    print(f"{ms:.2f} ms a picture, {rate:.0f} a second on one core, {f['peak']:.0f} MB")


def peers(args):
    """Beside mmsegmentation 1.2.2: in float32, and in --dtype where that is another one here."""
    items = [("inference", *pair, 512, 1) for pair in PEER_PAIRS]
    items += [("training", *pair, 512, 2) for pair in PEER_PAIRS]
    items.append(("multi-scale", "deit_s16", "mln", 512, 1))
    items.append(("data", "deit_s16", "none", 512, 1))

    dtypes = ["float32"]
    if evaluate.choose_dtype(args.dtype, evaluate.choose_device(world=1)) != torch.float32:
        dtypes.append(args.dtype)
    names = [name for dtype in dtypes for name in (dtype, "times")]
    header("seconds", "mmsegmentation 1.2.2", *names, "peak MB")

    for item in items:
        best = fastest_of_two(args, item, dtypes)
        there, *here = [f["seconds"] / f["pictures"] for f in best]
        cells = [f"{there:.4g}"]
        for seconds in here:
            cells += [f"{seconds:.4g}", f"{there / seconds:.2f}"]
        memory = " / ".join(f"{f['peak']:.0f}" for f in best)
        row(" ".join(item[:3]), *cells, memory)

    threads = torch.get_num_threads()
    print(f"\nseconds a picture; {best[-1]['device']}, {threads} threads (data: one)")


def fastest_of_two(args, item, dtypes):
    """-> the figures of mmsegmentation, and of ours in each dtype, the better ones of two rounds,
    in which all take turns."""
    sides = [("theirs", "float32")] + [("ours", dtype) for dtype in dtypes]

    def one_round():
        return [figure(args, *item, side=side, dtype=dtype) for side, dtype in sides]

    first = one_round()
    second = one_round()
    best = []
    for both in zip(first, second):
        best.append(min(both, key=lambda f: f["seconds"]))
    return best


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"models": models, "scaling": scaling, "data": data, "peers": peers}
    add = parser.add_argument
    add("table", nargs="?", choices=tables, default="models", help="what to measure")
    add("--arch", choices=ARCHS, help="of models and scaling: this one (default: the published)")
    add("--neck", choices=NECKS, help="of models and scaling: this one")
    add("--size", type=int, default=512, help="of models: height and width of the pictures")
    add("--dtype", choices=("auto", *evaluate.DTYPES), default="auto")
    add("--runs", type=int, default=5, help="of which the fastest counts")
    add("--data", metavar="DIR", help="of data and peers: a data set, or toy")
    add("--here", help=argparse.SUPPRESS)  # one figure, in this process
    args = parser.parse_args()

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("one process on one device is timed: run it without torchrun")
    if args.table in ("data", "peers") and not args.data:
        parser.error(f"{args.table} needs pictures: --data DIR, or --data toy")

    if args.here:
        measure_here(args.here, args)
    else:
        tables[args.table](args)


if __name__ == "__main__":
    main()
