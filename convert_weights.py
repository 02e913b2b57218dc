"""Weights: reads the checkpoints that people have into our names and shapes, exactly or not at all,
and writes them again.

    state_dict, facts = load_weights("any.pth")  # facts: kind, arch, neck, what is left out and why
    load_into(model, state_dict, facts)  # every tensor used once, or an error that lists the others
    python convert_weights.py SRC DST --to ours|mmseg|timm

What a file is, its content tells and never its name: the container (torch's zip or old pickle,
safetensors, numpy's npz) by its first bytes, the kind by what it calls the patch embedding, see
KINDS. Whatever stands before that name (module., vit., ema_model.module.) is a wrapper's and is
taken off every name. No pickle is executed: torch.load runs with weights_only=True, which builds
tensors and plain containers and nothing else."""

import argparse
import hashlib
import json
import math
import mmap
import os
import re
import sys
import warnings
import zipfile
from typing import BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade20k import fetch
from model import ARCHS, NECKS, resize_pos_embed
from upernet import build_model

Tensors = dict[str, Tensor]  # by name


def load_weights(path_or_url: str, bicubic: bool = False) -> tuple[Tensors, dict]:
    """Read any known format. -> (state_dict in our names, facts). WeightsError otherwise. Behind a
    colon, as in x.pth:teacher, stands which model is meant where a file holds several.

    facts: kind, arch (the first one in ARCHS of these shapes, so vit_b16 for a bare deit_b16: they
    differ in drop path alone), neck and num_classes (None for a backbone), grid (of pos_embed, as
    it is given), resolution (in the file), tensors (how many are used), left_out and added (list of
    str, each with its reason), dtype (of the floating point numbers in the file), classes (the
    fields of ade20k.Classes) where the file names them, and args of our own checkpoints.

    A whole model keeps its pos_embed to the bit. That of a backbone, which starts a new model, is
    resized to the architecture's grid: with torch's bicubic, as mmsegmentation and timm do; that of
    a JAX file bilinearly, as Google does, unless bicubic is set. A tensor may be a view of the
    file: copy it before the file is overwritten."""
    path, choice = split_choice(path_or_url)
    content = read_checkpoint(path)
    facts = {"left_out": [], "added": []}

    weights = unwrap(path, content, choice, facts)
    tensors = translate(path, weights, facts)
    check_values(path, tensors, facts)
    identify(path, tensors, facts)
    recall(content, facts)
    add_known_missing(tensors, facts)

    with torch.device("meta"):  # shapes without memory
        neck = facts["neck"] or ("ln" if "backbone.norm.weight" in tensors else "none")
        model = build_model(facts["arch"], neck, facts["num_classes"] or 150)
    fit_positions(tensors, facts, model.backbone, bicubic)
    compare(path, tensors, tensors_to_set(model, tensors, facts), facts)
    facts["tensors"] = len(tensors)
    return tensors, facts


def load_into(
    model: nn.Module, state_dict: Tensors, facts: dict, new_classes: bool = False
) -> None:
    """Copy what load_weights gave into a model. Every tensor of the file is used and every one of
    the model set, or WeightsError. The grid of the model's positions becomes that of a whole model
    in the file. The exceptions, each added to facts["left_out"]:

    - a backbone leaves neck and heads as they are, and its final norm is left out where the
      model's neck has none;
    - a file without auxiliary head leaves the model's as it is;
    - with new_classes, a whole model for another number of classes leaves both classifiers as they
      are."""
    own, reasons = tensors_to_set(model, state_dict, facts), {}
    here, there = model.decode_head.classifier.out_channels, facts["num_classes"]
    for name in state_dict:
        if facts["neck"] is None and name.startswith("backbone.norm.") and name not in own:
            reasons[name] = "the model has no final norm"
        if new_classes and there not in (here, None) and ".classifier." in name:
            reasons[name] = f"{there} classes in the file, {here} here: starts anew"

    facts["left_out"] = facts["left_out"] + [f"{k} ({why})" for k, why in reasons.items()]
    used = {k: v for k, v in state_dict.items() if k not in reasons}
    own = {k: v for k, v in own.items() if k not in reasons}
    if facts["neck"] is not None:
        # Its shape may differ: set_grid makes room for it below.
        own["backbone.pos_embed"] = used["backbone.pos_embed"]
    compare("the weights", used, own, facts)

    model.backbone.set_grid(facts["grid"])
    model.load_state_dict(used, strict=False)  # compare() was the strict part


class WeightsError(Exception):
    """A weight file that cannot be used, in one sentence: the file, what is wrong, the way out."""


# ---- The steps of load_weights -------------------------------------------------------------------


def split_choice(source: str) -> tuple[str, str]:
    """ "x.pth:state.model" -> ("x.pth", "state.model"). What follows the colon of a drive, a URL or
    a file's own name is no choice: it is "" then."""
    path, _, choice = source.rpartition(":")
    if len(path) < 2 or os.path.exists(source) or not re.fullmatch(r"[A-Za-z_][\w.-]*", choice):
        return source, ""
    return path, choice


def unwrap(path: str, content: dict, choice: str, facts: dict) -> Tensors:
    """The tensors of the one model in a file's content, wherever it stands and without what
    wrappers put before its names. WeightsError where there is none, or several."""
    found = flatten(content)
    models = find_models(found)
    if not models:
        first = ", ".join(list(found)[:3]) or "nothing"
        raise WeightsError(
            f"{path}: no known kind of checkpoint, its {len(found)} entries start with {first}"
        )

    called = {wrapper: wrapper.replace(":", ".").strip(".") or "top" for wrapper in models}
    meant = [w for w in models if called[w] == choice] if choice else list(models)
    if len(meant) != 1:
        names = list(called.values())
        raise WeightsError(
            f"{path}: holds {len(models)} models, called {listed(names)}: choose one, as "
            f"{path}:{names[-1]}"
        )

    wrapper = meant[0]
    facts["kind"] = models[wrapper]
    holder = wrapper[: wrapper.rfind(":") + 1]  # the dictionary, in which all else must be known

    weights, beside = {}, {}
    for name, value in found.items():
        owner = max([w for w in models if name.startswith(w)], key=len, default=wrapper)
        inner = name.removeprefix(holder)
        here = name.startswith(holder) and owner == wrapper and ":" not in inner
        if here and isinstance(value, Tensor):
            weights[name.removeprefix(wrapper).removeprefix(holder)] = value
        else:
            beside[re.split("[.:]", inner)[0]] = True

    said = [name for name in beside if name not in ("meta", "args", "classes")]
    if said:
        facts["left_out"].append(f"{listed(said)} (beside the weights)")
    return weights


def find_models(found: dict) -> dict[str, str]:
    """What stands before the names of each model, and its kind."""
    models = {}
    for name, value in found.items():
        for kind, (mark, _, _) in KINDS.items():
            wrapper = name.removesuffix(mark)
            if isinstance(value, Tensor) and wrapper != name and wrapper[-1:] in ("", ".", ":"):
                models[wrapper] = kind
                break

    return models


def flatten(content: dict) -> dict:
    """Nested dictionaries as one: {"state:model:module.cls_token": value}. A dictionary that stands
    in several places comes once."""
    flat, seen, todo = {}, set(), [("", content)]

    for where, holder in todo:  # which grows meanwhile
        if id(holder) in seen:
            continue
        seen.add(id(holder))

        for key, value in holder.items():
            name = where + INSIDE.sub("", str(key))
            if isinstance(value, dict) and value:
                todo.append((name + ":", value))
            else:
                flat[name] = value

    return flat


def listed(texts: list[str], separator: str = ", ") -> str:
    """All of them, or the first twenty and how many more there are."""
    more = [f"and {len(texts) - 20} more"] if len(texts) > 20 else []
    return separator.join(texts[:20] + more)


def translate(path: str, weights: Tensors, facts: dict) -> Tensors:
    """The tensors in our names and shapes. WeightsError for an unknown kind of file."""
    _, prefix, rules = KINDS[facts["kind"]]
    tensors = {}
    try:
        for name, value in sorted(weights.items()):
            part = name.removeprefix("backbone.")
            reasons = [why for what, why in LEFT_OUT.items() if re.match(what, part)]
            if reasons:
                facts["left_out"].append(f"{name} ({reasons[0]})")
                continue

            if facts["kind"] == "JAX":
                name, value = from_jax(name, value)
            name = rename(prefix + name, rules)
            if name in tensors:
                raise WeightsError(f"{path}: two of its tensors are {name}")
            tensors[name] = value

        join_qkv(tensors)
    except (RuntimeError, IndexError) as error:  # a matrix that is none
        raise WeightsError(f"{path}: damaged, {first_line(error)}") from error
    return tensors


def from_jax(name: str, value: Tensor) -> tuple[str, Tensor]:
    """JAX multiplies from the other side: its kernels are (in, out), those of attention
    (in, heads, d) and back, (heads, d, out), that of the patches (h, w, in, out)."""
    if name.endswith("/kernel"):
        if value.ndim == 4:
            value = value.permute(3, 2, 0, 1)  # (out, in, h, w)
        elif "/out/" in name:
            value = value.flatten(0, -2).T  # (out, heads * d)
        else:
            value = value.flatten(1).T  # (heads * d, in), or (out, in)
    elif name.endswith("/bias"):
        value = value.flatten()  # those of attention are (heads, d)
    return re.sub("/(kernel|scale)$", "/weight", name), value


def rename(name: str, rules: dict[str, str]) -> str:
    """The name after the first rule whose left side it starts with, or as it was."""
    for old, new in rules.items():
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return new.format(*match.groups()) + name[match.end() :]
    return name


def join_qkv(tensors: Tensors) -> None:
    """Three matrices q, k, v become one that holds them side by side: a single larger product."""
    for q in [name for name in tensors if ".attn.q." in name]:
        three = [q.replace(".q.", f".{x}.") for x in "qkv"]
        if tensors.keys() >= set(three):
            tensors[q.replace(".q.", ".qkv.")] = torch.cat([tensors.pop(name) for name in three])


def check_values(path: str, tensors: Tensors, facts: dict) -> None:
    """WeightsError for numbers that no training would survive."""
    dtypes = set()
    for name, value in tensors.items():
        if name.endswith(".num_batches_tracked"):  # BatchNorm counts
            continue
        if not value.is_floating_point():
            raise WeightsError(
                f"{path}: {name} holds {value.dtype}, no floating point numbers: quantised, or "
                "damaged; take the file it was made from"
            )
        if not value.isfinite().all():
            raise WeightsError(
                f"{path}: {name} has values that are NaN or infinite: the run that wrote it "
                "diverged, or it is damaged; take an earlier checkpoint"
            )
        dtypes.add(str(value.dtype).removeprefix("torch."))

    facts["dtype"] = ", ".join(sorted(dtypes))


def identify(path: str, tensors: Tensors, facts: dict) -> None:
    """arch, neck and num_classes from names and shapes. WeightsError if no architecture fits."""
    found = {"layer_scale": "backbone.blocks.0.ls1.gamma" in tensors}
    try:
        found["width"], _, found["patch"], _ = tensors["backbone.patch_embed.proj.weight"].shape
        found["registers"] = tensors.get("backbone.reg_token", torch.empty(1, 0)).shape[1]
        num_classes = len(tensors.get("decode_head.classifier.weight", ()))
    except (ValueError, TypeError, IndexError) as error:
        raise WeightsError(f"{path}: damaged, {first_line(error)}") from error
    layers = {k.split(".")[2] for k in tensors if k.startswith("backbone.blocks.")}
    found["depth"] = len(layers)

    fits = [n for n, a in ARCHS.items() if all(a.get(k, 0) == v for k, v in found.items())]
    if not fits:
        more = ", with layer scale" if found["layer_scale"] else ""
        raise WeightsError(
            f"{path}: {len(layers)} layers, {found['width']} wide, patches of {found['patch']}, "
            f"{found['registers']} registers{more}: none of {', '.join(ARCHS)}"
        )

    facts |= {"arch": fits[0], "neck": None, "num_classes": None}

    if "decode_head" in parts(tensors):
        has = ("backbone.norm.weight" in tensors, "neck" in parts(tensors))
        facts["neck"] = next(name for name, needs in NECKS.items() if needs == has)
        facts["num_classes"] = num_classes


def parts(tensors: Tensors) -> set[str]:
    """backbone, neck, decode_head, auxiliary_head: what the names start with."""
    return {name.split(".")[0] for name in tensors}


def recall(content: dict, facts: dict) -> None:
    """What the file itself says about its training: our checkpoints their args and classes,
    mmsegmentation's the config of the run, as text, and what the data set calls its classes."""
    meta, args = content.get("meta"), content.get("args")
    if facts["kind"] == "ours" and are_arguments(args):
        facts |= {"args": args, "arch": args["arch"]}
    elif facts["kind"] == "ours" and args is not None:
        facts["left_out"].append("the arguments of its training (none that train.py writes)")
    elif facts["arch"] == "vit_b16" and "deit" in str(meta):
        facts["arch"] = "deit_b16"

    try:
        classes = content.get("classes") or classes_of_mmseg(meta)
        if classes is not None and facts["num_classes"] is not None:
            facts["classes"] = checked_classes(facts["num_classes"], *classes)
    except Exception:  # there may stand anything
        facts["left_out"].append("the names of its classes (no name and colour for each)")


def classes_of_mmseg(meta) -> tuple | None:
    """Names, colours and the meaning of 0, where mmsegmentation's files say them."""
    if not isinstance(meta, dict):
        return None
    said = meta.get("dataset_meta", meta)  # 1.x, 0.x
    if not isinstance(said, dict) or not ("classes" in said or "CLASSES" in said):
        return None

    names = said.get("classes", said.get("CLASSES"))
    palette = said.get("palette", said.get("PALETTE"))
    ignored = said.get("reduce_zero_label") or "reduce_zero_label=True" in str(meta)
    return names, palette, bool(ignored)


def are_arguments(args) -> bool:
    """Does a file hold, as "args", those of a training, as far as anybody asks for them?"""
    if not isinstance(args, dict) or str(args.get("arch")) not in ARCHS:
        return False
    data, short_side = args.get("data", ""), args.get("short_side", 1)
    return isinstance(data, str) and isinstance(short_side, int) and short_side > 0


def checked_classes(
    num_classes: int, names, palette, zero_ignored: bool, ignored_colours: list | None = None
) -> tuple:
    """The fields of ade20k.Classes, out of a file that may hold anything: one of the exceptions
    above where they are not a printable name and a colour for each class."""
    names = tuple(name.strip() for name in names)  # mmsegmentation says "bed "
    fit = len(names) == len(palette) == num_classes
    if not fit or not all(name.isprintable() and 0 < len(name) <= 100 for name in names):
        raise ValueError

    palette = checked_colours(palette)
    if ignored_colours is not None:
        ignored_colours = checked_colours(ignored_colours)
    return names, palette, bool(zero_ignored), ignored_colours


def checked_colours(colours) -> list[list[int]]:
    """ValueError where they are not lists of three whole numbers from 0 to 255."""
    table = np.array(colours).reshape(len(colours), 3)
    if len(table) and (table.dtype.kind != "i" or table.min() < 0 or table.max() > 255):
        raise ValueError
    return table.tolist()


def add_known_missing(tensors: Tensors, facts: dict) -> None:
    """What some files lack, and what takes its place."""
    bias = "backbone.patch_embed.proj.bias"
    if facts["kind"].startswith("mmsegmentation") and bias not in tensors:
        tensors[bias] = torch.zeros(ARCHS[facts["arch"]]["width"])
        facts["added"].append("a patch bias of zeros, as mmsegmentation 1.2 has none")
    if facts["neck"] is not None and "auxiliary_head" not in parts(tensors):
        facts["left_out"].append(
            "auxiliary_head (not in the file: evaluation needs none, training starts it anew)"
        )


def tensors_to_set(model: nn.Module, tensors: Tensors, facts: dict) -> Tensors:
    """The tensors of the model that a file with these must set: those of its own parts, and of
    neck and head where it is a whole model."""
    must = parts(tensors) | {"backbone"}
    if facts["neck"] is not None:
        must |= {"neck", "decode_head"}
    return {k: v for k, v in model.state_dict().items() if k.split(".")[0] in must}


def fit_positions(tensors: Tensors, facts: dict, backbone: nn.Module, bicubic: bool) -> None:
    """Bring a backbone's positions to the grid of ours, or the grid of ours to those of a whole
    model. A table of an impossible shape is left to compare()."""
    name, arch = "backbone.pos_embed", ARCHS[facts["arch"]]
    pos_embed = tensors.get(name, torch.empty(0))
    rows = pos_embed.numel() // arch["width"]

    # Of the tokens without a place the class token comes first; DeiT-III gives it no position.
    extra = 1
    if math.isqrt(rows) ** 2 == rows:
        extra = 0
    elif any(DISTILLATION in text for text in facts["left_out"]):
        extra = 2
    side = math.isqrt(max(0, rows - extra))
    if side == 0 or pos_embed.shape != (1, extra + side * side, arch["width"]):
        return
    size = side * arch["patch"]
    facts["resolution"] = f"{size}x{size}"

    if extra == 0:
        pos_embed = F.pad(pos_embed, (0, 0, 1, 0))  # (1, 1 + side^2, D)
        facts["added"].append("a position of zeros for the class token, which has none")
    elif extra == 2:
        pos_embed = torch.cat([pos_embed[:, :1], pos_embed[:, 2:]], dim=1)  # (1, 1 + side^2, D)

    if facts["neck"] is not None:
        backbone.set_grid((side, side))
    elif (side, side) != backbone.grid:
        google = facts["kind"] == "JAX" and not bicubic
        mode = "bilinear" if google else "bicubic"
        pos_embed = resize_pos_embed(pos_embed.float(), (side, side), backbone.grid, mode)
    tensors[name], facts["grid"] = pos_embed, backbone.grid


def compare(path: str, tensors: Tensors, expected: Tensors, facts: dict) -> None:
    """WeightsError that lists the tensors that are missing, left over or of another shape, and the
    likely cause."""
    file = {name: tuple(value.shape) for name, value in tensors.items()}
    model = {name: tuple(value.shape) for name, value in expected.items()}
    faults = {}

    for name in model | file:
        if name not in file:
            faults[name] = f"missing {name} {model[name]}"
        elif name not in model:
            faults[name] = f"left over {name} {file[name]}"
        elif file[name] != model[name]:
            faults[name] = f"{name} is {file[name]} in the file, {model[name]} in the model"

    if not faults:
        return

    cause = likely_cause(faults, [name for name in faults if name in file and name in model])
    raise WeightsError(
        f"{path}: a {facts['kind']} file for {facts['arch']}, neck {facts['neck']}, "
        f"{facts['num_classes']} classes does not fit ({cause}?): "
        + listed(list(faults.values()), "; ")
    )


def likely_cause(faults: dict[str, str], reshaped: list[str]) -> str:
    """What most often lies behind faults in tensors of these names, some of another shape."""
    modules = {name.split(".")[-2] for name in reshaped}
    if modules == {"classifier"} and len(faults) == len(reshaped):
        return "another class count"
    if modules & {"proj", "qkv", "backbone"}:
        return "another architecture"
    if any(name.startswith(("neck.", "backbone.norm.")) for name in faults):
        return "another neck"
    return "a file that is not whole, or has more"


def describe(facts: dict) -> str:
    """facts in one line."""
    shown = ("kind", "arch", "neck", "num_classes", "resolution", "tensors", "dtype")
    text = ", ".join(f"{k} {facts[k]}" for k in shown if facts.get(k) is not None)
    for key in ("added", "left_out"):
        if facts[key]:
            text += f"; {key.replace('_', ' ')}: " + "; ".join(facts[key])
    return text


# ---- The tables of names -------------------------------------------------------------------------

# A file's names, ours. {} is a number. What no line matches is called the same in both. Where q, k
# and v are one matrix, they lie in this order everywhere.
MMSEG = {
    "backbone.ln1.":                                            "backbone.norm.",
    "backbone.patch_embed.projection.":                         "backbone.patch_embed.proj.",
    "backbone.layers.{}.ln{}.":                                 "backbone.blocks.{}.norm{}.",
    "backbone.layers.{}.attn.attn.in_proj_":                    "backbone.blocks.{}.attn.qkv.",
    "backbone.layers.{}.attn.attn.out_proj.":                   "backbone.blocks.{}.attn.proj.",
    "backbone.layers.{}.ffn.layers.0.0.":                       "backbone.blocks.{}.mlp.fc1.",
    "backbone.layers.{}.ffn.layers.1.":                         "backbone.blocks.{}.mlp.fc2.",
    "neck.lateral_convs.{}.conv.":                              "neck.lateral_convs.{}.",
    "neck.convs.{}.conv.":                                      "neck.convs.{}.",
    "decode_head.psp_modules.{}.1.":                            "decode_head.ppm.{}.",
    "decode_head.conv_seg.":                                    "decode_head.classifier.",
    "auxiliary_head.convs.0.":                                  "auxiliary_head.conv.",
    "auxiliary_head.conv_seg.":                                 "auxiliary_head.classifier.",
}
HUGGING_FACE = {
    "embeddings.cls_token":                                     "backbone.cls_token",
    "embeddings.position_embeddings":                           "backbone.pos_embed",
    "embeddings.patch_embeddings.projection.":                  "backbone.patch_embed.proj.",
    "encoder.layer.{}.layernorm_before.":                       "backbone.blocks.{}.norm1.",
    "encoder.layer.{}.attention.attention.query.":              "backbone.blocks.{}.attn.q.",
    "encoder.layer.{}.attention.attention.key.":                "backbone.blocks.{}.attn.k.",
    "encoder.layer.{}.attention.attention.value.":              "backbone.blocks.{}.attn.v.",
    "encoder.layer.{}.attention.output.dense.":                 "backbone.blocks.{}.attn.proj.",
    "encoder.layer.{}.layernorm_after.":                        "backbone.blocks.{}.norm2.",
    "encoder.layer.{}.intermediate.dense.":                     "backbone.blocks.{}.mlp.fc1.",
    "encoder.layer.{}.output.dense.":                           "backbone.blocks.{}.mlp.fc2.",
    # DINOv2, where it differs:
    "embeddings.register_tokens":                               "backbone.reg_token",
    "encoder.layer.{}.norm{}.":                                 "backbone.blocks.{}.norm{}.",
    "encoder.layer.{}.layer_scale{}.lambda1":                   "backbone.blocks.{}.ls{}.gamma",
    "encoder.layer.{}.mlp.fc{}.":                               "backbone.blocks.{}.mlp.fc{}.",
    "layernorm.":                                               "backbone.norm.",
}
# mmpretrain's (and mmcls's) backbone is mmsegmentation's, but for its attention.
MMPRETRAIN = MMSEG | {
    "backbone.layers.{}.attn.qkv.":                             "backbone.blocks.{}.attn.qkv.",
    "backbone.layers.{}.attn.proj.":                            "backbone.blocks.{}.attn.proj.",
}
# What the authors of DeiT-III and DINOv2 call otherwise than timm.
TIMM = {
    "backbone.blocks.{}.gamma_{}":                              "backbone.blocks.{}.ls{}.gamma",
    "backbone.register_tokens":                                 "backbone.reg_token",
}
TORCHVISION = {
    "class_token":                                              "backbone.cls_token",
    "encoder.pos_embedding":                                    "backbone.pos_embed",
    "conv_proj.":                                               "backbone.patch_embed.proj.",
    "encoder.layers.encoder_layer_{}.ln_{}.":                   "backbone.blocks.{}.norm{}.",
    "encoder.layers.encoder_layer_{}.self_attention.in_proj_":  "backbone.blocks.{}.attn.qkv.",
    "encoder.layers.encoder_layer_{}.self_attention.out_proj.": "backbone.blocks.{}.attn.proj.",
    "encoder.layers.encoder_layer_{}.mlp.0.":                   "backbone.blocks.{}.mlp.fc1.",
    "encoder.layers.encoder_layer_{}.mlp.3.":                   "backbone.blocks.{}.mlp.fc2.",
    "encoder.layers.encoder_layer_{}.mlp.linear_1.":            "backbone.blocks.{}.mlp.fc1.",
    "encoder.layers.encoder_layer_{}.mlp.linear_2.":            "backbone.blocks.{}.mlp.fc2.",
    "encoder.ln.":                                              "backbone.norm.",
}
ATTENTION = "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/"
JAX = {
    "cls":                                                      "backbone.cls_token",
    "Transformer/posembed_input/pos_embedding":                 "backbone.pos_embed",
    "embedding/":                                               "backbone.patch_embed.proj.",
    "Transformer/encoderblock_{}/LayerNorm_0/":                 "backbone.blocks.{}.norm1.",
    ATTENTION + "query/":                                       "backbone.blocks.{}.attn.q.",
    ATTENTION + "key/":                                         "backbone.blocks.{}.attn.k.",
    ATTENTION + "value/":                                       "backbone.blocks.{}.attn.v.",
    ATTENTION + "out/":                                         "backbone.blocks.{}.attn.proj.",
    "Transformer/encoderblock_{}/LayerNorm_2/":                 "backbone.blocks.{}.norm2.",
    "Transformer/encoderblock_{}/MlpBlock_3/Dense_0/":          "backbone.blocks.{}.mlp.fc1.",
    "Transformer/encoderblock_{}/MlpBlock_3/Dense_1/":          "backbone.blocks.{}.mlp.fc2.",
    "Transformer/encoder_norm/":                                "backbone.norm.",
}

# Each kind by what it calls the patch embedding, then what we put before its names, then its table.
# A longer patch embedding comes before the one it ends with. (mmsegmentation 0.x and 1.x; a
# backbone alone is what its vit2mmseg.py writes. DeiT and MAE use timm's names, Google JAX's.)
KINDS = {
    "ours":                    ("backbone.patch_embed.proj.weight", "", {}),
    "mmsegmentation":          ("backbone.patch_embed.projection.weight", "", MMPRETRAIN),
    "mmsegmentation backbone": ("patch_embed.projection.weight", "backbone.", MMPRETRAIN),
    "Hugging Face":            ("embeddings.patch_embeddings.projection.weight", "", HUGGING_FACE),
    "timm":                    ("patch_embed.proj.weight", "backbone.", TIMM),
    "torchvision":             ("conv_proj.weight", "", TORCHVISION),
    "JAX":                     ("embedding/kernel", "", JAX),
}

# What torch.compile, FSDP and activation checkpointing put inside names, wherever they wrap a part.
INSIDE = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")

# Tensors that are left out on purpose, by the start of their (unwrapped) name.
DISTILLATION = "distillation, no part of the model"
LEFT_OUT = {
    r"(head|heads|fc|classifier|cls_classifier|pre_logits|pooler)[./]":
        "a classifier of whole images",
    r"dist_token|head_dist\.|embeddings\.distillation_token|distillation_classifier\.":
        DISTILLATION,
    r"((embeddings|decoder)\.)?mask_token":
        "stands for hidden patches in pretraining",
    r"(decoder\.)?decoder_":
        "the decoder of MAE's pretraining",
    r"decoder\.":
        "the decoder of another kind of model",
    r"fc_norm\.":
        "the norm of pooled features",
    r"ema_":  # mmcv's EMAHook swaps the two before it saves
        "a second set of weights, those before averaging",
}

# The pretrained backbone of each architecture. Hexadecimal digits at the end of a name start the
# sha256 of the file.
TIMM_FILES = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"
DEIT = "https://dl.fbaipublicfiles.com/deit/"
DINO = "https://dl.fbaipublicfiles.com/dinov2/"
PRETRAINED = {
    "vit_b16":        TIMM_FILES + "jx_vit_base_p16_224-80ecf9dd.pth",
    "deit_b16":       DEIT + "deit_base_patch16_224-b5f2ef4d.pth",
    "deit_s16":       DEIT + "deit_small_patch16_224-cd65a155.pth",
    "deit_t16":       DEIT + "deit_tiny_patch16_224-a1311bcf.pth",
    "vit_l16":        TIMM_FILES + "jx_vit_large_p16_224-4ee7a4dc.pth",
    "deit3_s16":      DEIT + "deit_3_small_224_21k.pth",
    "deit3_b16":      DEIT + "deit_3_base_224_21k.pth",
    "deit3_l16":      DEIT + "deit_3_large_224_21k.pth",
    "dinov2_s14":     DINO + "dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_b14":     DINO + "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_l14":     DINO + "dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "dinov2_s14_reg": DINO + "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dinov2_b14_reg": DINO + "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "dinov2_l14_reg": DINO + "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
}


def to_mmseg(state_dict: Tensors) -> Tensors:
    """Our names -> those of mmsegmentation 0.x. The tensors are the same objects."""
    rules = {ours: theirs for theirs, ours in MMSEG.items()}
    return {rename(name, rules): value for name, value in state_dict.items()}


def backbone_alone(state_dict: Tensors) -> Tensors:
    """The tensors of the backbone, without its prefix, so in timm's names; neck and heads have no
    place there."""
    names = [name for name in state_dict if name.startswith("backbone.")]
    return {name.removeprefix("backbone."): state_dict[name] for name in names}


def to_timm(state_dict: Tensors, arch: str) -> Tensors:
    """The backbone as timm has it: without a position of the class token in those of its models
    that add it to the token once and for all."""
    out = backbone_alone(state_dict)
    if not ARCHS[arch].get("cls_position", True):
        cls, patches = out["pos_embed"][:, :1], out["pos_embed"][:, 1:]
        out |= {"cls_token": out["cls_token"] + cls, "pos_embed": patches.contiguous()}
    return out


# ---- Files ---------------------------------------------------------------------------------------


def read_checkpoint(path: str) -> dict:
    """The dictionary in a file, or behind a URL, which is fetched to torch's cache first.
    WeightsError if unreadable."""
    file = local_path(path)
    try:
        content = read_file(file)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except Exception as error:  # damaged files raise almost anything
        reason = first_line(error)
        if "eights only load failed" in reason:  # torch goes on to advise to execute it
            reason = "no pickle of tensors and plain containers alone; nothing else is read"
        if file != path:
            os.remove(file)  # or the next try would find it in the cache
        raise WeightsError(f"{path}: not a checkpoint, or a damaged one ({reason})") from error

    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def first_line(error: Exception) -> str:
    """What an exception says, without the advice that follows; its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def local_path(url: str) -> str:
    """The path itself or, for a URL, where torch's cache keeps the file behind it, which is fetched
    if it is not there yet. By one process at a time."""
    if not url.startswith(("http://", "https://")):
        return url

    name = os.path.basename(urlparse(url).path)
    digest = re.search(r"-([0-9a-f]{8,64})\.", name)
    if not digest:
        # Many files are called model.safetensors: the address tells them apart.
        name = hashlib.sha256(url.encode()).hexdigest()[:8] + "_" + name

    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not os.path.exists(path):
            fetch(url, path, digest.group(1) if digest else "")
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{error}; download it by other means and give the file's path, or train from scratch "
            "with --pretrained none"
        ) from error
    return path


LARGEST = 2 << 30  # bytes that compressed entries may unpack to, more than the largest backbone


def read_file(path: str) -> dict:
    """The content of a file, by the container that its first bytes name. Any exception where it is
    damaged."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder, a pipe or a device")
    with open(path, "rb") as file:
        first = file.read(16)

    if first[8:9] == b"{":
        return read_safetensors(path)
    if not first.startswith(b"PK"):
        return read_torch(path, is_zip=False)

    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()

    packed = sum(e.file_size for e in entries if e.compress_type != zipfile.ZIP_STORED)
    if packed > LARGEST:
        raise ValueError(f"would unpack to {packed / 1e9:.1f} GB")

    if entries and all(e.filename.endswith(".npy") for e in entries):
        return read_npz(path)
    return read_torch(path, is_zip=True)


class Skipped:
    """Stands in for an object of a foreign class (loss curves, paths, a trainer's own): takes any
    arguments and state, does nothing with them."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def plain_dict(*args) -> dict:
    """Stands in for collections.defaultdict, whose argument would be called for missing keys."""
    return {}


def read_torch(path: str, is_zip: bool) -> dict:
    """torch.save's file, mapped where it is a zip (all since 2020), so that only the tensors that
    are used take memory. Whatever else the pickle names becomes a stand-in of ours: torch then
    calls that in its place, and neither imports nor looks up what the name says."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    stand_ins = [(Skipped, name) for name in names if name != "collections.defaultdict"]
    allowed = [*stand_ins, (plain_dict, "collections.defaultdict")]
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


SAFETENSORS_DTYPES = {
    "F64":  torch.float64,
    "F32":  torch.float32,
    "F16":  torch.float16,
    "BF16": torch.bfloat16,
    "I64":  torch.int64,
    "I32":  torch.int32,
    "I16":  torch.int16,
    "I8":   torch.int8,
    "U8":   torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: str) -> Tensors:
    """u64 n | n bytes of JSON {name: {dtype, shape, data_offsets: [a, b]}} | the data. Tensors are
    views of the mapped file, read when they are used. ValueError where the header and the file do
    not agree."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)

    tensors, last = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, dtype = entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
        count = math.prod(shape)
        value = torch.frombuffer(data, dtype=dtype, count=count, offset=start + last)
        place = [last, last + value.nbytes]
        if entry["data_offsets"] != place:
            raise ValueError(f"{name} lies at {entry['data_offsets']}, {place} would be its place")
        tensors[name], last = value.reshape(shape), place[1]

    if start + last != len(data):
        raise ValueError(f"{len(data) - start - last} bytes after the last tensor")
    return tensors


def read_npz(path: str) -> Tensors:
    """The arrays of a numpy archive; numpy refuses those of Python objects by itself. (An array's
    header may lie about its size: numpy reserves that much, fails at the end of the data, and has
    touched no more than is there.)"""
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def write_safetensors(tensors: Tensors, file: BinaryIO) -> None:
    """What read_safetensors reads. The header is filled up to a multiple of 8 bytes and the widest
    numbers come first, so that all of them lie where a mapped file needs them."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))

    header, last = {"__metadata__": {"format": "pt"}}, 0
    for name, value in tensors.items():
        place = [last, last + value.nbytes]
        last, shape = place[1], list(value.shape)
        header[name] = {"dtype": names[value.dtype], "shape": shape, "data_offsets": place}

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)

    for value in tensors.values():
        file.write(value.reshape(-1).view(torch.uint8).numpy())


def write_checkpoint(content: dict, path: str) -> None:
    """torch.save, or for x.safetensors a dictionary of tensors alone, to path.part, then move it
    into place: a reader never sees half a file. OSError or (torch) RuntimeError."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path + ".part"
    write = write_safetensors if path.endswith(".safetensors") else torch.save
    try:
        with open(part, "wb") as file:
            write(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it has its name, should the power fail
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)  # a full disk needs the room
        raise


# ---- python convert_weights.py -------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of any known kind.",
        epilog="example: python convert_weights.py upernet_deit-s16.pth deit_s.pt",
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="file or URL; SRC:path.to.it means one of several models in it")
    add("dst", metavar="DST", help="the file to write, torch's or, so called, .safetensors")
    add("--to", choices=("ours", "mmseg", "timm"), default="ours",
        help="mmseg: {'state_dict': ...} in its names; timm: the backbone alone (default: ours)")
    add("--bicubic", action="store_true",
        help="resize the positions of a JAX file as timm does, not bilinearly as Google does")
    return parser


def convert(src: str, dst: str, to: str, bicubic: bool) -> None:
    """Read src, write dst in the names of `to`, say what was done."""
    file, _ = split_choice(src)
    for written in (dst, dst + ".part"):
        if os.path.exists(file) and os.path.exists(written) and os.path.samefile(file, written):
            raise WeightsError(f"{dst}: writing it would overwrite {file}, give it another name")

    state_dict, facts = load_weights(src, bicubic)
    print(describe(facts))
    # JAX's kernels are transposed views, and would be written with strides.
    state_dict = {name: value.contiguous() for name, value in state_dict.items()}

    key, note = None, ""  # what a torch file calls the dictionary of tensors in it
    beside = {}
    if to == "ours":
        content, key = state_dict, "model"
        beside = {"args": facts.get("args", {"arch": facts["arch"]})}
        if "classes" in facts:
            beside["classes"] = facts["classes"]
    elif to == "timm":
        content = to_timm(state_dict, facts["arch"])
    elif ARCHS[facts["arch"]].get("layer_scale"):
        raise WeightsError(f"{src}: {facts['arch']} has layer scale, mmsegmentation's ViT has none")
    else:
        content, key = to_mmseg(state_dict), "state_dict"
        if facts["neck"] is None:
            content, key = backbone_alone(content), None
        note = (
            "; mmsegmentation 1.2 and later need patch_bias=True in the backbone's config, or they "
            "drop the bias of the patch embedding without a word"
        )

    if key and not dst.endswith(".safetensors"):
        content = {key: content, **beside}
    write_checkpoint(content, dst)
    print(f"{dst}: written, {to}{note}")


def main() -> None:
    args = options().parse_args()
    try:
        convert(args.src, args.dst, args.to, args.bicubic)
    except (WeightsError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
