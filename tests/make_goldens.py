"""Ask the real mmsegmentation 0.17.0 for its answers and store them as tests/goldens/*.npz.

Run in the reference's environment:  python tests/make_goldens.py REFERENCE_DIR SAMPLE_DIR
REFERENCE_DIR holds mmseg017.py, SAMPLE_DIR the twelve ADE20K pictures. Weights, inputs and labels
come from formulas.py; of the pictures only the reference's outputs, thinned out, are kept."""

import os
import sys
import types
from glob import glob
from zlib import crc32

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, sys.argv[1]]
import mmseg017  # noqa: E402  (fills the gaps between 2021 and today before mmseg is imported)
import torch  # noqa: E402
from formulas import (  # noqa: E402
    PAIRS,
    SIZES,
    SMALL,
    fill,
    image,
    labels,
    picture,
    samples,
    weight,
)
from mmcv.runner import build_optimizer  # noqa: E402
from mmcv.utils import config as mmcv_config  # noqa: E402
from mmcv.runner.hooks.lr_updater import PolyLrUpdaterHook  # noqa: E402
from mmseg.core.evaluation.metrics import intersect_and_union, pre_eval_to_metrics  # noqa: E402
from mmseg.datasets.pipelines import Compose  # noqa: E402

SAMPLE = sys.argv[2]


def store(name, **arrays):
    folder = os.path.join(HERE, "goldens")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name + ".npz")
    np.savez_compressed(path, **arrays)
    print(path, os.path.getsize(path), "bytes", flush=True)


def filled(model, dropout=True):
    """The model with weights by formula; dropout=False turns dropout and drop path off."""
    arrays = fill(model.state_dict())
    model.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items()})

    if not dropout:
        for module in model.modules():
            if type(module).__name__ in ("DropPath", "Dropout2d", "Dropout"):
                module.p = 0.0
                module.drop_prob = 0.0

    return model


def build_small(neck):
    """The reference with the dimensions of formulas.SMALL."""
    cfg = mmseg017.config("deit_s16", neck)
    m = cfg.model
    width = SMALL["width"]
    channels = SMALL["channels"]
    m.backbone.update(
        embed_dims=width,
        num_layers=SMALL["depth"],
        num_heads=SMALL["heads"],
        out_indices=(0, 1, 2, 3),
    )
    m.decode_head.update(in_channels=[width] * 4, channels=channels)
    m.auxiliary_head.update(in_channels=width, channels=channels // 2)
    m.pretrained = None

    for head in (m.decode_head, m.auxiliary_head):
        head.norm_cfg = dict(type="BN", requires_grad=True)
    if m.get("neck"):
        m.neck.update(in_channels=[width] * 4, out_channels=width)
    return mmseg017.build_segmentor(m), cfg


def losses(model, x, y):
    # The head adds to the laterals in place. In 2021 ReLU kept its input for the backward pass,
    # today it keeps its output and refuses: a copy between the two changes no number.
    hooks = []
    for conv in model.decode_head.lateral_convs:
        hook = conv.register_forward_hook(lambda module, inputs, output: output.clone())
        hooks.append(hook)

    parts = model(
        torch.from_numpy(x),
        [{}] * len(x),
        gt_semantic_seg=torch.from_numpy(y)[:, None],
        return_loss=True,
    )
    for hook in hooks:
        hook.remove()

    decode = parts["decode.loss_seg"]
    aux = parts["aux.loss_seg"]
    return decode + aux, decode, aux


def batch_of(count):
    """-> pictures, labels"""
    return image(97, 131, batch=count), labels(97, 131, batch=count)


def backward(model, count):
    """The gradients in float64: in float32 an activation within rounding of 0 is on either side of
    its ReLU by chance."""
    x, y = batch_of(count)
    loss, _, _ = losses(model, x.astype(np.float64), y)
    loss.backward()


def logits_of(model, sizes):
    """-> what is stored of the logits of a picture of each size."""
    out = {}
    for h, w in sizes:
        with torch.no_grad():
            logits = model.encode_decode(torch.from_numpy(image(h, w)), None)
        out[f"logits_{h}x{w}"] = samples(logits)
        out[f"max_{h}x{w}"] = logits.abs().max()
    return out


def models():
    for arch, neck in PAIRS:
        model, cfg = mmseg017.build(arch, neck)
        filled(model, dropout=False)
        out = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "drop_path": cfg.model.backbone.drop_path_rate,
            "keys": np.array(list(model.state_dict())),
        }

        model.eval()
        out.update(logits_of(model, SIZES))

        model.train()
        x, y = batch_of(4)
        with torch.no_grad():
            parts = losses(model, x, y)
        out["loss"] = np.array([part.item() for part in parts])

        filled(model.double(), dropout=False)
        backward(model, 2)
        grads = {name: p.grad for name, p in model.named_parameters()}
        out["grads"] = np.stack([samples(grad, 8) for grad in grads.values()])
        out["grad_max"] = np.array([grad.abs().max() for grad in grads.values()])
        out["grad_names"] = np.array(list(grads))
        store(f"{arch}_{neck}", **out)


def optimizers():
    """Four steps of each optimizer, from iteration 1500 on (past the warmup, where a step is large
    enough to see), in float64."""
    out = {}
    for name in ("adamw", "sgd"):
        model, cfg = build_small("mln")
        filled(model.double(), dropout=False).train()
        if name == "sgd":  # the released schedule that the recipes override
            file = os.path.join(mmseg017.CONFIG_DIR, "../_base_/schedules/schedule_160k.py")
            schedule = mmseg017.Config.fromfile(file)
            cfg.optimizer = schedule.optimizer
            cfg.lr_config = schedule.lr_config

        optimizer = build_optimizer(model, cfg.optimizer)
        hook_args = {k: v for k, v in cfg.lr_config.items() if k not in ("policy", "_delete_")}
        hook = PolyLrUpdaterHook(**hook_args)
        runner = types.SimpleNamespace(optimizer=optimizer, iter=0, max_iters=160000)
        hook.before_run(runner)

        rates = []
        for runner.iter in (0, 1, 749, 1499, 1500, 80000, 159999):
            hook.before_train_iter(runner)
            rates.append(optimizer.param_groups[0]["lr"])
        out[f"{name}_lr"] = np.array(rates)

        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        for runner.iter in range(1500, 1504):
            hook.before_train_iter(runner)
            optimizer.zero_grad()
            backward(model, 4)
            optimizer.step()

        after = {k: p.detach() for k, p in model.named_parameters()}
        weights = np.stack([samples(p, 32) for p in after.values()])
        moved = [(after[k] - before[k]).abs().max().item() for k in after]
        out[f"{name}_weights"] = weights.astype(np.float32)
        out[f"{name}_moved"] = np.array(moved)
        out["names"] = np.array(list(after))

    store("optimizers", **out)


def positions():
    """Logits of a whole model that was trained at 224: its table of positions is 14x14."""
    cfg = mmseg017.config("deit_s16", "mln")
    cfg.model.update(pretrained=None)
    cfg.model.backbone.update(img_size=(224, 224))
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.norm_cfg = dict(type="BN", requires_grad=True)
    model = mmseg017.build_segmentor(cfg.model)
    filled(model).eval()

    shape = np.array(model.backbone.pos_embed.shape)
    out = logits_of(model, [(224, 224), (97, 131)])
    store("positions", pos_embed=shape, **out)


# What is asked of a backbone of toy_p8's sizes: a rectangle of pictures with as many patches as the
# square has, and then, one by one, settings that no tensor tells.
TINY = {
    "rectangular": dict(img_size=(64, 256)),
    "plain": dict(out_indices=[0, 1, 2, 3]),
    "with_cls_token": dict(with_cls_token=False),
    "interpolate_mode": dict(interpolate_mode="bilinear"),
    "num_heads": dict(num_heads=4),
    "act_cfg": dict(act_cfg=dict(type="ReLU")),
    "norm_cfg": dict(norm_cfg=dict(type="LN", eps=0.01)),
}


def configs():
    """The released configs as a Runner writes them into its files. Then small models whose tensors
    are alike: their configs and logits."""
    format_code = mmcv_config.FormatCode

    def without_verify(*args, verify, **more):  # (yapf dropped this argument)
        return format_code(*args, **more)

    mmcv_config.FormatCode = without_verify
    out = {}
    for (arch, neck, iters), name in mmseg017.CONFIGS.items():
        out[f"{arch} {neck} {name}"] = mmseg017.config(arch, neck, iters).pretty_text

    for name, changes in TINY.items():
        cfg = mmseg017.config("deit_s16", "mln" if name == "rectangular" else "none")
        m = cfg.model
        tiny = dict(embed_dims=128, num_layers=4, num_heads=2, patch_size=8, img_size=(128, 128))
        m.backbone.update(**(tiny | dict(out_indices=(0, 1, 2, 3)) | changes))
        m.decode_head.update(in_channels=[128] * 4, channels=64)
        m.auxiliary_head.update(in_channels=128, channels=32)
        m.pretrained = None
        if m.get("neck"):
            m.neck.update(in_channels=[128] * 4, out_channels=128)
        out[f"{name} config"] = cfg.pretty_text  # with SyncBN, as in the file of a run
        for head in (m.decode_head, m.auxiliary_head):
            head.norm_cfg = dict(type="BN", requires_grad=True)

        model = filled(mmseg017.build_segmentor(m)).eval()
        sizes = [(64, 256), (97, 131)]
        if name == "rectangular":
            out["keys"] = np.array(list(model.state_dict()))
        else:
            sizes = [(97, 131), (8, 200), (200, 8), (1, 1)]
        out.update({f"{name} {k}": v for k, v in logits_of(model, sizes).items()})
    store("configs", **out)


def timm_shapes():
    """Of DeiT-S at 224 x 224, in the names of a timm file."""
    D = 384
    shapes = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
        "head.weight": (1000, 384),
        "head.bias": (1000,),
    }
    for i in range(12):
        for name, shape in (
            ("norm1", (D,)),
            ("attn.qkv", (3 * D, D)),
            ("attn.proj", (D, D)),
            ("norm2", (D,)),
            ("mlp.fc1", (4 * D, D)),
            ("mlp.fc2", (D, 4 * D)),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def backbones():
    """A timm file through the reference's own vit2mmseg converter."""
    above = os.path.dirname(mmseg017.CONFIG_DIR)
    sys.path.insert(0, os.path.join(above, "../tools/model_converters"))
    from vit2mmseg import convert_vit

    segmentor, _ = mmseg017.build("deit_s16", "ln_mln")
    model = segmentor.backbone
    model.eval()  # (which returns nothing there)

    shapes = timm_shapes()
    timm = {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}
    converted = convert_vit(timm)
    positions = converted["pos_embed"]
    converted["pos_embed"] = model.resize_pos_embed(positions, (32, 32), (14, 14), "bicubic")
    print(model.load_state_dict(converted))

    with torch.no_grad():
        maps = model(torch.from_numpy(image(300, 401)))

    lines = []
    for name, shape in shapes.items():
        dims = " ".join(map(str, shape))
        lines.append(f"{name} {dims}")
    store(
        "backbone",
        shapes=np.array(lines),
        pos_embed=samples(converted["pos_embed"]),
        maps=np.stack([samples(m) for m in maps]),
        keys=np.array(list(converted)),
    )


def pairs(split):
    paths = glob(os.path.join(SAMPLE, "images", split, "*.jpg"))
    for path in sorted(paths):
        label_path = path.replace("images", "annotations").replace(".jpg", ".png")
        yield path, label_path


def name_of(path):
    return os.path.basename(path).removesuffix(".jpg")


def as_rgb(bgr):
    return np.ascontiguousarray(bgr[:, :, ::-1])


def load(path, label_path, cfg):
    results = dict(
        img_info=dict(filename=path),
        ann_info=dict(seg_map=label_path),
        seg_fields=[],
        img_prefix=None,
        seg_prefix=None,
    )
    return Compose(cfg.train_pipeline[:2])(results)


def transforms():
    """The training pipeline without distortion and normalisation, on real pictures; then the
    distortion by itself."""
    cfg = mmseg017.config("deit_s16", "none")
    colours = ("PhotoMetricDistortion", "Normalize")
    geometry = Compose([step for step in cfg.train_pipeline[2:-2] if step.type not in colours])

    out = {}
    for i, (path, label_path) in enumerate(pairs("training")):
        for seed in (0, 1, 2):
            loaded = load(path, label_path, cfg)
            np.random.seed(1000 * i + seed)
            done = geometry(loaded)

            key = f"{name_of(path)}_{seed}"
            label = np.ascontiguousarray(done["gt_semantic_seg"])
            out[key + "_image"] = as_rgb(done["img"]).reshape(-1, 3)[::397]
            out[key + "_label"] = np.array([crc32(label.tobytes())])
            out[key + "_next"] = np.random.random_sample()  # where the reference left the stream

    out.update(distortion(cfg))
    out.update(resizing())
    store("transforms", **out)


def distortion(cfg):
    steps = [step for step in cfg.train_pipeline if step.type == "PhotoMetricDistortion"]
    distort = Compose(steps)

    out = {}
    for seed in range(24):
        np.random.seed(seed)
        bgr = picture(seed=seed)[:, :, ::-1].copy()
        done = distort(dict(img=bgr))
        out[f"distort_{seed}"] = as_rgb(done["img"])[::5, ::5]
    return out


def resizing():
    resize = Compose([dict(type="LoadImageFromFile"), dict(type="Resize", keep_ratio=True)])

    out = {}
    for path, _ in [*pairs("training"), *pairs("validation")]:
        for ratio in (0.5, 1.0, 1.75):
            scale = (int(2048 * ratio), int(512 * ratio))
            done = resize(dict(img_info=dict(filename=path), img_prefix=None, scale=scale))

            key = f"test_{name_of(path)}_{ratio}"
            out[key] = as_rgb(done["img"]).reshape(-1, 3)[::797]
            out[key + "_size"] = np.array(done["img"].shape[:2])
    return out


def labelled(model, cfg, path, ratios, flip):
    """What the whole test pipeline makes of a picture. -> its label map, and the first view's
    shape"""
    views = cfg.test_pipeline[1].copy()
    views.update(img_ratios=ratios, flip=flip)
    pipeline = Compose([cfg.test_pipeline[0], views])
    data = pipeline(dict(img_info=dict(filename=path), img_prefix=None))

    imgs = [img[None] for img in data["img"]]
    metas = [[meta.data] for meta in data["img_metas"]]
    with torch.no_grad():
        result = model.forward_test(imgs, metas)
    return result[0], imgs[0].shape


def evaluation():
    """Label maps of the whole test pipeline on the six validation pictures, single scale and
    multi-scale with flip."""
    model, cfg = build_small("mln")
    filled(model).eval()
    views = cfg.test_pipeline[1]
    modes = {
        "single": (views.get("img_ratios"), views.flip),  # as its config has it
        "multi": ([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], True),
    }

    out = {}
    areas = []
    for path, label_path in pairs("validation"):
        key = name_of(path)
        for mode, (ratios, flip) in modes.items():
            result, _ = labelled(model, cfg, path, ratios, flip)
            out[f"{key}_{mode}"] = result[::3, ::3].astype(np.uint8)
            print(key, mode, len(np.unique(result)), flush=True)

        label = load(path, label_path, cfg)["gt_semantic_seg"]
        guess = np.roll(label, 9, axis=1)  # a prediction that is right in the middle of things
        guess[guess == 255] = 3
        areas.append(intersect_and_union(guess, label, 150, 255))

    metrics = pre_eval_to_metrics(areas, ["mIoU"])
    store("evaluation", IoU=metrics["IoU"], Acc=metrics["Acc"], aAcc=metrics["aAcc"], **out)


def slide():
    """Label maps of the six validation pictures by windows (mode slide), single scale and two
    scales with flip."""
    model, cfg = build_small("mln")
    filled(model).eval()
    crop = dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
    model.test_cfg = mmseg017.Config(crop)

    out = {}
    for path, _ in pairs("validation"):
        for mode, ratios in (("single", [1.0]), ("multi", [0.75, 1.25])):
            result, shape = labelled(model, cfg, path, ratios, flip=mode == "multi")
            key = f"{name_of(path)}_{mode}"
            out[key] = result[::3, ::3].astype(np.uint8)
            print(key, shape, len(np.unique(result)), flush=True)

    store("slide", **out)


if __name__ == "__main__":
    parts = (
        "optimizers", "backbones", "positions", "configs", "transforms", "evaluation", "slide",
        "models",
    )
    for part in sys.argv[3:] or parts:
        globals()[part]()
