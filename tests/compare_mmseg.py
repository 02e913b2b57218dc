"""Speed and memory beside mmsegmentation 1.2.2, in one run on one machine: the table in README.md,
"Speed".

In an environment of its own: pip install -r requirements.txt, then mmsegmentation==1.2.2
mmcv-lite==2.1.0 mmengine==0.10.7 ftfy regex opencv-python-headless. Nothing else may run meanwhile.

    python tests/compare_mmseg.py DATA [--dtype auto]       # DATA: a data set in ADE20K's layout; about half an hour

Every figure is taken in a process of its own, mmsegmentation and this project in turn, three times
(steps and many scales, which take long, twice), of which the fastest counts. Both have random
weights of the same shapes, the same pictures, all threads (the training pictures one). Memory is
the peak of the whole process."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import ade20k  # noqa: E402
import evaluate  # noqa: E402
from scaling import step  # noqa: E402
from upernet import build_model  # noqa: E402

PAIRS = [("deit_s16", "none"), ("deit_s16", "mln"), ("vit_b16", "mln")]
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
ITEMS = [f"{what} {arch} {neck}" for what in ("inference", "training") for arch, neck in PAIRS] + [
    "multi-scale deit_s16 mln",
    "data",
]


class Absent(types.ModuleType):
    """mmcv.ops: compiled, and never called by ViT and UPerNet."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def theirs(what, arch, neck, pairs, picture):
    """-> a function without arguments that does the work once."""
    warnings.filterwarnings("ignore")
    sys.modules.setdefault("mmcv.ops", Absent("mmcv.ops"))
    import logging

    import mmseg
    from mmcv.transforms import Compose
    from mmengine.config import Config, ConfigDict
    from mmengine.dataset import pseudo_collate
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.models import SegTTAModel
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    logging.disable(logging.WARNING)
    register_all_modules()
    init_default_scope("mmseg")
    name = {"none": "_upernet", "mln": "_mln_upernet"}[neck]
    cfg = Config.fromfile(
        os.path.join(
            os.path.dirname(mmseg.__file__),
            ".mim/configs/vit",
            f"vit_{arch.replace('_', '-')}{name}_8xb2-160k_ade20k-512x512.py",
        )
    )
    sample = [
        dict(img_path=a, seg_map_path=b, reduce_zero_label=True, label_map=None, seg_fields=[])
        for a, b in pairs
    ]
    if what == "data":
        import cv2

        cv2.setNumThreads(1)
        pipeline = Compose(cfg.train_pipeline)
        return lambda: [pipeline(dict(x)) for x in sample * 4]
    text = cfg.model.to_dict()
    text["pretrained"] = None

    def without_sync(node):  # SyncBN runs on GPUs alone
        return (
            {k: "BN" if v == "SyncBN" else without_sync(v) for k, v in node.items()}
            if isinstance(node, dict)
            else [without_sync(v) for v in node] if isinstance(node, (list, tuple)) else node
        )

    model = MODELS.build(ConfigDict(without_sync(text)))
    if what == "training":
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        label = torch.from_numpy(np.random.default_rng(0).integers(0, 150, (1, 512, 512)))
        data = dict(
            inputs=[torch.from_numpy(picture[:512, :512]).permute(2, 0, 1)] * 2,
            data_samples=[
                SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=dict(img_shape=(512, 512)))
                for _ in range(2)
            ],
        )
        return lambda: model.train_step(data, optimizer)
    model.eval()
    if what == "multi-scale":
        tester, pipeline = SegTTAModel(module=model), Compose(cfg.tta_pipeline)
        tester.eval()

        def many():
            with torch.no_grad():
                tester.test_step(pseudo_collate([pipeline(dict(sample[0]))]))

        return many
    meta = dict(ori_shape=(512, 512), img_shape=(512, 512), pad_shape=(512, 512))

    def one():
        with torch.no_grad():
            model.test_step(
                dict(
                    inputs=[torch.from_numpy(picture[:512, :512]).permute(2, 0, 1)],
                    data_samples=[SegDataSample(metainfo=meta)],
                )
            )

    return one


def ours(what, arch, neck, pairs, picture, dtype):
    device = torch.device("cpu")
    dtype = evaluate.choose_dtype(dtype, device)
    ade20k.keep_memory()
    if what == "data":
        samples = ade20k.TrainSet(pairs, seed=0)
        return lambda: [samples[k] for k in range(4 * len(pairs))]
    model = build_model(arch, neck).to(memory_format=evaluate.layout(device, dtype))
    if what == "training":
        return step(model, 512, 2, dtype)
    model.eval()
    if what == "multi-scale":
        return lambda: evaluate.predict(
            model, ade20k.load_image(pairs[0][0]), SCALES, True, dtype=dtype
        )
    return lambda: evaluate.predict(model, picture[:512, :512], dtype=dtype)


def measure_one(side, item, pairs, dtype):
    """In a process of its own: print [seconds, peak MB] as JSON."""
    what, arch, neck = (item.split() + ["deit_s16", "none"])[:3]
    if what == "data":
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {0})
    picture = ade20k.load_image(pairs[0][0])
    action = (
        theirs(what, arch, neck, pairs, picture)
        if side == "theirs"
        else ours(what, arch, neck, pairs, picture, dtype)
    )
    times = []
    for _ in range(
        {"multi-scale": 1, "training": 2}.get(what, 5)
    ):  # the first is the warm-up, where there are more
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:] or times) / (4 * len(pairs) if what == "data" else 1)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--items", nargs="*", default=ITEMS)
    parser.add_argument("--one", nargs=2)
    args = parser.parse_args()
    pairs = ade20k.find_pairs(args.data, "training")
    if args.one:
        return measure_one(*args.one, pairs, args.dtype)
    with tempfile.TemporaryDirectory() as folder:  # the first picture, 683 high and 512 wide
        for kind in ("images", "annotations"):
            for k, pair in enumerate(pairs):
                path = pair[kind == "annotations"]
                target = os.path.join(
                    folder, kind, "training", f"{k:02d}" + os.path.splitext(path)[1]
                )
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with Image.open(path) as file:
                    (file if k else file.resize((512, 683), Image.NEAREST)).save(target)
        print(
            f"| | mmsegmentation 1.2.2 | here, {args.dtype} | times as fast | peak MB, there and here |\n|{'---|' * 5}"
        )
        for item in args.items:
            best = {}
            for side in ("theirs", "ours") * (2 if item.startswith(("training", "multi")) else 3):
                out = subprocess.run(
                    [sys.executable, __file__, folder, "--dtype", args.dtype, "--one", side, item],
                    capture_output=True,
                    text=True,
                )
                if out.returncode:
                    sys.exit(out.stderr)
                best[side] = min(best.get(side, [9e9, 0]), json.loads(out.stdout.splitlines()[-1]))
            (a, mb_a), (b, mb_b) = best["theirs"], best["ours"]
            print(
                f"| {item} | {a:.4g} s | {b:.4g} s | {a / b:.2f} | {mb_a:.0f} / {mb_b:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
