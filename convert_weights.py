"""Weights: reads the checkpoints that people have into our names and shapes, exactly or not at all,
and writes them again.

    state_dict, facts = load_weights("any.pth")  # facts: kind, arch, neck, what is left out and why
    load_into(model, state_dict, facts)  # every tensor used once, or an error that lists the others
    python convert_weights.py SRC DST --to ours|mmseg|timm

Everybody's ViT has the same tensors under other names, so most of the work is a table of names for
each kind of file; the tables come first. Then come the steps from a file to a state_dict:

    unwrap, translate, identify, add what is known to be missing, fit the positions, compare

and last the files themselves. What a file is, its content tells and never its name: the container
(torch's zip or old pickle, safetensors, numpy's npz) by its first bytes, the kind by what it calls
the patch embedding. No pickle is executed: torch.load runs with weights_only=True, which builds
tensors and plain containers and nothing else."""

import argparse
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade20k import UserError, errors_in_one_sentence, fetch, first_line, listed, one_line
from model import ARCHS, NECKS, resize_pos_embed
from upernet import build_model

Tensors = dict[str, Tensor]  # by name


# ---- What the others call our tensors ------------------------------------------------------------

# Left a piece of a file's names, right the same piece of ours. rename() replaces one after the
# other, so a longer piece stands above one that it contains. What no line names is called the same
# in both. Where q, k and v are one matrix, they lie in this order everywhere.
MMSEG = {  # and mmpretrain, whose attention has our names
    "backbone.ln1.":                                    "backbone.norm.",
    "patch_embed.projection.":                          "patch_embed.proj.",
    ".ln1.":                                            ".norm1.",
    ".attn.attn.in_proj_":                              ".attn.qkv.",
    ".attn.attn.out_proj.":                             ".attn.proj.",
    ".ln2.":                                            ".norm2.",
    ".ffn.layers.0.0.":                                 ".mlp.fc1.",
    ".ffn.layers.1.":                                   ".mlp.fc2.",
    "backbone.layers.":                                 "backbone.blocks.",
    "neck.lateral_convs.0.conv.":                       "neck.lateral_convs.0.",
    "neck.lateral_convs.1.conv.":                       "neck.lateral_convs.1.",
    "neck.lateral_convs.2.conv.":                       "neck.lateral_convs.2.",
    "neck.lateral_convs.3.conv.":                       "neck.lateral_convs.3.",
    "neck.convs.0.conv.":                               "neck.convs.0.",
    "neck.convs.1.conv.":                               "neck.convs.1.",
    "neck.convs.2.conv.":                               "neck.convs.2.",
    "neck.convs.3.conv.":                               "neck.convs.3.",
    "psp_modules.0.1.":                                 "ppm.0.",
    "psp_modules.1.1.":                                 "ppm.1.",
    "psp_modules.2.1.":                                 "ppm.2.",
    "psp_modules.3.1.":                                 "ppm.3.",
    "auxiliary_head.convs.0.":                          "auxiliary_head.conv.",
    "head.conv_seg.":                                   "head.classifier.",
}
TIMM = {  # what the authors of DeiT-III and DINOv2 call otherwise
    ".gamma_1":                                         ".ls1.gamma",
    ".gamma_2":                                         ".ls2.gamma",
    "register_tokens":                                  "reg_token",
}
HUGGING_FACE = {
    "embeddings.cls_token":                             "backbone.cls_token",
    "embeddings.position_embeddings":                   "backbone.pos_embed",
    "embeddings.patch_embeddings.projection.":          "backbone.patch_embed.proj.",
    "encoder.layer.":                                   "backbone.blocks.",
    ".layernorm_before.":                               ".norm1.",
    ".attention.attention.query.":                      ".attn.q.",
    ".attention.attention.key.":                        ".attn.k.",
    ".attention.attention.value.":                      ".attn.v.",
    ".attention.output.dense.":                         ".attn.proj.",
    ".layernorm_after.":                                ".norm2.",
    ".intermediate.dense.":                             ".mlp.fc1.",
    ".output.dense.":                                   ".mlp.fc2.",
    "layernorm.":                                       "backbone.norm.",
    # DINOv2:
    "embeddings.register_tokens":                       "backbone.reg_token",
    ".layer_scale1.lambda1":                            ".ls1.gamma",
    ".layer_scale2.lambda1":                            ".ls2.gamma",
}
TORCHVISION = {
    "class_token":                                      "backbone.cls_token",
    "encoder.pos_embedding":                            "backbone.pos_embed",
    "conv_proj.":                                       "backbone.patch_embed.proj.",
    "encoder.layers.encoder_layer_":                    "backbone.blocks.",
    ".ln_1.":                                           ".norm1.",
    ".self_attention.in_proj_":                         ".attn.qkv.",
    ".self_attention.out_proj.":                        ".attn.proj.",
    ".ln_2.":                                           ".norm2.",
    ".mlp.0.":                                          ".mlp.fc1.",
    ".mlp.3.":                                          ".mlp.fc2.",
    ".mlp.linear_1.":                                   ".mlp.fc1.",  # in the files of 2021
    ".mlp.linear_2.":                                   ".mlp.fc2.",
    "encoder.ln.":                                      "backbone.norm.",
}
JAX = {
    "cls":                                              "backbone.cls_token",
    "Transformer/posembed_input/pos_embedding":         "backbone.pos_embed",
    "embedding/":                                       "backbone.patch_embed.proj.",
    "Transformer/encoderblock_":                        "backbone.blocks.",
    "/LayerNorm_0/":                                    ".norm1.",
    "/MultiHeadDotProductAttention_1/query/":           ".attn.q.",
    "/MultiHeadDotProductAttention_1/key/":             ".attn.k.",
    "/MultiHeadDotProductAttention_1/value/":           ".attn.v.",
    "/MultiHeadDotProductAttention_1/out/":             ".attn.proj.",
    "/LayerNorm_2/":                                    ".norm2.",
    "/MlpBlock_3/Dense_0/":                             ".mlp.fc1.",
    "/MlpBlock_3/Dense_1/":                             ".mlp.fc2.",
    "Transformer/encoder_norm/":                        "backbone.norm.",
    "kernel":                                           "weight",
    "scale":                                            "weight",
}

# The kinds of files: what each calls the patch embedding, by which it is known, what we put before
# its names, and its table. A longer name comes before one that it ends with. mmsegmentation: whole
# models of 0.x and 1.x, and the backbones that its vit2mmseg.py writes. timm: also DeiT, MAE and
# DINOv2. JAX: Google's own files.
KINDS = {
    "ours":                    ("backbone.patch_embed.proj.weight", "", {}),
    "mmsegmentation":          ("backbone.patch_embed.projection.weight", "", MMSEG),
    "mmsegmentation backbone": ("patch_embed.projection.weight", "backbone.", MMSEG),
    "Hugging Face":            ("embeddings.patch_embeddings.projection.weight", "", HUGGING_FACE),
    "timm":                    ("patch_embed.proj.weight", "backbone.", TIMM),
    "torchvision":             ("conv_proj.weight", "", TORCHVISION),
    "JAX":                     ("embedding/kernel", "", JAX),
}

# What is left out on purpose, and how the names of these tensors start (without "backbone.").
DISTILLATION = "distillation, no part of the model"
LEFT_OUT = {
    "a classifier of whole images":
        ("head.", "head/", "heads.", "fc.", "classifier.", "cls_classifier.",
         "pre_logits.", "pre_logits/", "pooler."),
    DISTILLATION:
        ("dist_token", "head_dist.", "embeddings.distillation_token", "distillation_classifier."),
    "stands for hidden patches in pretraining":
        ("mask_token", "embeddings.mask_token", "decoder.mask_token"),
    "the decoder of MAE's pretraining":
        ("decoder_", "decoder.decoder_"),
    "the decoder of another kind of model":
        ("decoder.",),
    "the norm of pooled features":
        ("fc_norm.",),
    "a second set of weights, those before averaging":  # mmcv's EMAHook swaps the two
        ("ema_",),
}


def rename(name: str, table: dict[str, str]) -> str:
    """backbone.layers.7.ln1.bias -> backbone.blocks.7.norm1.bias, with the table MMSEG."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name


# ---- From a file to a model ----------------------------------------------------------------------


def load_weights(path_or_url: str, bicubic: bool = False) -> tuple[Tensors, dict]:
    """Read any known format. -> (state_dict in our names, facts). WeightsError otherwise. Behind a
    colon, as in x.pth:teacher, stands which model is meant where a file holds several.

    facts:
        kind         one of KINDS
        arch         the first one in ARCHS of these shapes, unless the file says more: vit_b16 for
                     a bare deit_b16, which differs in drop path alone
        neck         one of NECKS, None for a backbone
        num_classes  None for a backbone
        dtype        of the floating point numbers in the file
        tensors      how many are used
        added        what the file lacks and is known, each with its reason
        left_out     what is not used, tensors and other entries, each with its reason
        grid         of the positions (h, w), as they are given here
        resolution   of the pictures in training, from the positions in the file
        classes      the fields of ade20k.Classes, where the file names them
        args         the command line of the training, in our own checkpoints

    A whole model keeps its pos_embed to the bit. That of a backbone, which starts a new model, is
    resized to the architecture's grid: with torch's bicubic, as mmsegmentation and timm do; that of
    a JAX file bilinearly, as Google does, unless bicubic is set. A tensor may be a view of the
    file: copy it before the file is overwritten."""
    path, choice = split_choice(path_or_url)
    content = read_checkpoint(path)

    with about(path):
        kind, weights, beside = unwrap(content, choice, path)
        tensors, left_out = translate(weights, kind)
        check_values(tensors)
        facts = {"kind": kind, **identify(tensors), "added": [], "left_out": beside + left_out}
        recall(content, facts)
        add_known_missing(tensors, facts)
        fit_positions(tensors, facts, bicubic)

        neck = facts["neck"] or ("ln" if "backbone.norm.weight" in tensors else "none")
        with torch.device("meta"):  # shapes without memory
            model = build_model(facts["arch"], neck, facts["num_classes"] or 150)
        compare(tensors, model, facts)

    facts["tensors"] = len(tensors)
    return tensors, facts


def load_into(
    model: nn.Module, state_dict: Tensors, facts: dict, new_classes: bool = False
) -> None:
    """Copy what load_weights gave into a model. Every tensor of the file is used and every one of
    the model set, or WeightsError. The grid of the model's positions becomes that of the file's.
    The exceptions, each added to facts["left_out"]:

    - a backbone leaves neck and heads as they are, and its final norm is left out where the
      model's neck has none;
    - a file without auxiliary head leaves the model's as it is;
    - with new_classes, a whole model for another number of classes leaves both classifiers as they
      are."""
    here, there = model.decode_head.classifier.out_channels, facts["num_classes"]
    left_out, reason = [], ""
    if facts["neck"] is None and model.backbone.norm is None:
        left_out = [name for name in state_dict if name.startswith("backbone.norm.")]
        reason = "the model has no final norm"
    elif facts["neck"] is not None and new_classes and here != there:
        left_out = [name for name in state_dict if ".classifier." in name]
        reason = f"{there} classes in the file, {here} here: starts anew"

    used = {name: value for name, value in state_dict.items() if name not in left_out}
    with about("the weights"):
        compare(used, model, facts, left_out)

    facts["left_out"] = facts["left_out"] + [f"{name} ({reason})" for name in left_out]
    model.backbone.set_grid(facts["grid"])
    model.load_state_dict(used, strict=False)  # compare() was the strict part


def describe(facts: dict) -> str:
    """facts in one line."""
    shown = ("kind", "arch", "neck", "num_classes", "resolution", "tensors", "dtype")
    text = ", ".join(f"{k} {facts[k]}" for k in shown if facts.get(k) is not None)
    if facts["added"]:
        text += "; added: " + "; ".join(facts["added"])
    if facts["left_out"]:
        text += "; left out: " + "; ".join(facts["left_out"])
    return one_line(text)


class WeightsError(UserError):
    """A weight file that cannot be used, in one sentence: the file, what is wrong, the way out."""


@contextmanager
def about(path: str) -> Iterator[None]:
    """Say the file's name before what is wrong with it. Shapes that no whole file has end in an
    error of torch or Python."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise WeightsError(f"{path}: damaged, {first_line(error)}") from error


# ---- Unwrap --------------------------------------------------------------------------------------

# What torch.compile, FSDP and activation checkpointing put inside names, wherever they wrap a part.
WRAPPERS = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


def split_choice(source: str) -> tuple[str, str]:
    """ "x.pth:state.model" -> ("x.pth", "state.model"). What follows the colon of a drive, a URL or
    a file's own name is no choice: it is "" then."""
    path, _, choice = source.rpartition(":")
    if len(path) < 2 or os.path.exists(source) or not re.fullmatch(r"[A-Za-z_][\w.-]*", choice):
        return source, ""
    return path, choice


def unwrap(content: dict, choice: str, path: str) -> tuple[str, Tensors, list[str]]:
    """Find the one model in a file's content, and take off its names what wrappers put before them.
    -> (kind, tensors, what stands beside them). WeightsError where there is none, or several.

    {"epoch": 3, "state_dict": {"module.cls_token": x, ...}} -> "timm", {"cls_token": x, ...}"""
    entries = flatten(content)
    models = find_models(entries)
    if not models:
        first = ", ".join((where + name)[:100] for where, name in list(entries)[:3]) or "nothing"
        raise WeightsError(
            f"no known kind of checkpoint, its {len(entries)} entries start with {first}"
        )

    names = list(models)
    meant = [name for name in names if choice in ("", name)]
    if len(meant) != 1:
        raise WeightsError(
            f"holds {len(names)} models, called {listed(names)}: choose one, as {path}:{names[-1]}"
        )
    kind, home, wrapper = models[meant[0]]

    # All tensors of the model's own dictionary count, unless they are another model's: the wrapper
    # may be the backbone's alone ("vit."), or stand inside another one. All else is beside them.
    weights, beside = {}, []
    for (where, name), value in entries.items():
        owners = [w for _, place, w in models.values() if place == where and name.startswith(w)]
        owner = max(owners, key=len, default=wrapper)
        first = (where + name).removeprefix(home).split(".")[0]
        if where == home and owner == wrapper and isinstance(value, Tensor):
            weights[name.removeprefix(wrapper)] = value
        elif first not in ("meta", "args", "classes", *beside):
            beside.append(first)

    left_out = [f"the file's other entries ({listed(beside)})"] if beside else []
    return kind, weights, left_out


def flatten(content: dict) -> dict:
    """The entries of nested dictionaries, each by the path to its dictionary and its name in it:
    {"state": {"model": {"module.cls_token": x}}} -> {("state.model.", "module.cls_token"): x}. A
    dictionary that stands in several places, or in itself, comes once."""
    entries, seen, todo = {}, set(), [("", content)]

    for where, holder in todo:  # which grows meanwhile
        if len(where) > 10000:
            raise WeightsError(f"holds dictionaries in dictionaries too deep, {where[:20]}...")
        if id(holder) in seen:
            continue
        seen.add(id(holder))

        for key, value in holder.items():
            if isinstance(value, dict) and value:
                todo.append((f"{where}{key}.", value))
            else:
                entries[where, WRAPPERS.sub("", str(key))] = value

    return entries


def find_models(entries: dict) -> dict:
    """What a user may call each model, and its kind, the path to its dictionary, and what stands
    before its names there: {"state.model.module": ("timm", "state.model.", "module.")}."""
    models = {}
    for (where, name), value in entries.items():
        for kind, (patch_embed, _, _) in KINDS.items():
            if isinstance(value, Tensor) and f".{name}".endswith(f".{patch_embed}"):
                wrapper = name.removesuffix(patch_embed)
                models[(where + wrapper).strip(".") or "top"] = (kind, where, wrapper)
                break

    return models


# ---- Translate -----------------------------------------------------------------------------------


MOST = 1 << 26  # numbers of one tensor: a small file may repeat one of them without end


def translate(weights: Tensors, kind: str) -> tuple[Tensors, list[str]]:
    """-> (the tensors in our names and shapes, what is left out on purpose)."""
    _, prefix, table = KINDS[kind]
    tensors, left_out = {}, []

    for name, value in sorted(weights.items()):
        part = name.removeprefix("backbone.")
        reasons = [reason for reason, starts in LEFT_OUT.items() if part.startswith(starts)]
        if reasons:
            left_out.append(f"{name} ({reasons[0]})")
            continue

        if value.numel() > MOST:
            raise WeightsError(f"{name} has {value.numel()} numbers, no layer here is so large")
        ours = rename(prefix + name, table)
        if ours in tensors:
            raise WeightsError(f"two of its tensors are {ours}")
        if kind == "JAX":
            value = from_jax(name, value).contiguous()  # or it would be written with strides
        tensors[ours] = value

    join_qkv(tensors)
    return tensors, left_out


def from_jax(name: str, value: Tensor) -> Tensor:
    """JAX multiplies from the other side: its kernels are (in, out), those of attention
    (in, heads, d) and back, (heads, d, out), that of the patches (h, w, in, out)."""
    if name.endswith("bias"):
        return value.flatten()  # those of attention are (heads, d)
    if not name.endswith("kernel"):
        return value

    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)  # (out, in, h, w)
    if "/out/" in name:
        return value.flatten(0, -2).T  # (out, heads * d)
    return value.flatten(1).T  # (heads * d, in), or (out, in)


def join_qkv(tensors: Tensors) -> None:
    """Three matrices q, k, v become one that holds them side by side: a single larger product."""
    for q in [name for name in tensors if ".attn.q." in name]:
        three = [q.replace(".q.", f".{x}.") for x in "qkv"]
        if all(name in tensors for name in three):
            tensors[q.replace(".q.", ".qkv.")] = torch.cat([tensors.pop(name) for name in three])


def check_values(tensors: Tensors) -> None:
    """WeightsError for numbers that no training would survive."""
    for name, value in tensors.items():
        if name.endswith(".num_batches_tracked"):  # BatchNorm counts
            continue

        if not value.is_floating_point():
            raise WeightsError(
                f"{name} holds {value.dtype}, no floating point numbers: quantised, or damaged; "
                "take the file it was made from"
            )
        if not value.isfinite().all():
            raise WeightsError(
                f"{name} has values that are NaN or infinite: the run that wrote it diverged, or "
                "it is damaged; take an earlier checkpoint"
            )


# ---- Identify ------------------------------------------------------------------------------------


def identify(tensors: Tensors) -> dict:
    """Find arch, neck, num_classes and dtype. WeightsError if no architecture fits."""
    width, _, patch, _ = tensors["backbone.patch_embed.proj.weight"].shape
    found = {
        "width": width,
        "patch": patch,
        "depth": len({name.split(".")[2] for name in tensors if ".blocks." in name}),
        "registers": tensors.get("backbone.reg_token", torch.empty(1, 0)).shape[1],
        "layer_scale": "backbone.blocks.0.ls1.gamma" in tensors,
    }
    plain = {"registers": 0, "layer_scale": False}
    fits = [arch for arch, a in ARCHS.items() if found.items() <= (plain | a).items()]
    if not fits:
        text = "{depth} layers, {width} wide, patches of {patch}, {registers} registers"
        more = ", with layer scale" if found["layer_scale"] else ""
        raise WeightsError(text.format(**found) + more + ": none of " + ", ".join(ARCHS))

    neck = num_classes = None
    if "decode_head" in parts(tensors):
        has = ("backbone.norm.weight" in tensors, "neck" in parts(tensors))
        neck = next(name for name, needs in NECKS.items() if needs == has)
        num_classes = len(tensors.get("decode_head.classifier.weight", ()))

    dtypes = {str(value.dtype) for value in tensors.values() if value.is_floating_point()}
    dtype = ", ".join(sorted(dtypes)).replace("torch.", "")
    return dict(arch=fits[0], neck=neck, num_classes=num_classes, dtype=dtype)


def parts(tensors: Tensors) -> set[str]:
    """backbone, neck, decode_head, auxiliary_head: what the names start with."""
    return {name.split(".")[0] for name in tensors}


def recall(content: dict, facts: dict) -> None:
    """Take over what the file itself says about its training: our checkpoints their args and
    classes, mmsegmentation's the config of the run, as text, and the classes of the data set."""
    args = content.get("args")
    if facts["kind"] == "ours" and are_arguments(args):
        facts |= {"args": args, "arch": args["arch"]}
    elif facts["kind"] == "ours" and args is not None:
        facts["left_out"].append("the arguments of its training (none that train.py writes)")
    elif facts["arch"] == "vit_b16" and "deit" in str(content.get("meta")):
        facts["arch"] = "deit_b16"

    if facts["neck"] is None:
        return

    try:
        classes = classes_said(content)
        if classes:
            facts["classes"] = checked_classes(facts["num_classes"], *classes)
    except Exception:  # there may stand anything
        facts["left_out"].append("the names of its classes (no name and colour for each)")


MOST_PIXELS = 8192  # that a picture's short side, or a crop's, may be asked to have


def are_arguments(args: object) -> bool:
    """Does a file hold, as "args", those of a training, as far as anybody asks for them?"""
    if not isinstance(args, dict) or str(args.get("arch")) not in ARCHS:
        return False
    data, short_side = args.get("data", ""), args.get("short_side", 1)
    path = isinstance(data, str) and data.isprintable()
    return path and isinstance(short_side, int) and 0 < short_side <= MOST_PIXELS


def classes_said(content: dict) -> tuple | None:
    """The fields of ade20k.Classes as the file has them, unchecked."""
    if "classes" in content:  # ours
        return content["classes"]

    meta = content.get("meta", {})
    said = meta.get("dataset_meta", meta)  # mmsegmentation 1.x, 0.x
    said = {key.lower(): value for key, value in said.items()}
    if "classes" not in said:
        return None

    zero_ignored = said.get("reduce_zero_label") or "reduce_zero_label=True" in str(meta)
    return said["classes"], said.get("palette"), zero_ignored


def checked_classes(num_classes: int, names, palette, zero_ignored, ignored_colours=None) -> tuple:
    """The fields of ade20k.Classes, or any exception where they are not a printable name and a
    colour for each class."""
    names = tuple(name.strip() for name in names)  # mmsegmentation says "bed "
    palette = [list(colour) for colour in palette]
    colours = palette + [list(colour) for colour in ignored_colours or []]

    fit = len(names) == len(palette) == num_classes
    printable = all(name.isprintable() and 0 < len(name) <= 100 for name in names)
    rgb = all(len(bytes(colour)) == 3 for colour in colours)  # bytes takes 0 to 255 and no others
    if not (fit and printable and rgb):
        raise ValueError

    return names, palette, bool(zero_ignored), ignored_colours


# ---- Add what is known to be missing, fit the positions ------------------------------------------


def add_known_missing(tensors: Tensors, facts: dict) -> None:
    """Add what some files lack, or say what takes its place."""
    bias = "backbone.patch_embed.proj.bias"
    if facts["kind"].startswith("mmsegmentation") and bias not in tensors:
        tensors[bias] = torch.zeros(ARCHS[facts["arch"]]["width"])
        facts["added"].append("a patch bias of zeros, as mmsegmentation 1.2 has none")

    if facts["neck"] is not None and "auxiliary_head" not in parts(tensors):
        facts["left_out"].append(
            "auxiliary_head (not in the file: evaluation needs none, training starts it anew)"
        )


def fit_positions(tensors: Tensors, facts: dict, bicubic: bool) -> None:
    """Bring the positions of a backbone to our grid; a whole model keeps its own. A table that is
    missing or belongs to no square is left to compare()."""
    name, arch = "backbone.pos_embed", ARCHS[facts["arch"]]
    facts["grid"] = ours = (arch["grid"], arch["grid"])
    if name not in tensors:
        return

    pos_embed = tensors[name]  # (1, N, D)
    rows = pos_embed.shape[1]

    # Of the tokens without a place the class token comes first; DeiT-III gives it no position.
    if math.isqrt(rows) ** 2 == rows:
        pos_embed = F.pad(pos_embed, (0, 0, 1, 0))  # (1, 1 + N, D)
        facts["added"].append("a position of zeros for the class token, which has none")
    elif any(DISTILLATION in text for text in facts["left_out"]):
        pos_embed = torch.cat([pos_embed[:, :1], pos_embed[:, 2:]], dim=1)  # (1, N - 1, D)

    side = math.isqrt(pos_embed.shape[1] - 1)
    if pos_embed.shape[1] != 1 + side * side:
        return

    size = side * arch["patch"]
    facts["resolution"] = f"{size}x{size}"

    if facts["neck"] is not None:
        facts["grid"] = (side, side)
    elif (side, side) != ours:
        google = facts["kind"] == "JAX" and not bicubic
        mode = "bilinear" if google else "bicubic"
        pos_embed = resize_pos_embed(pos_embed.float(), (side, side), ours, mode)
    tensors[name] = pos_embed


# ---- Compare -------------------------------------------------------------------------------------


def compare(tensors: Tensors, model: nn.Module, facts: dict, left_out: list[str] = ()) -> None:
    """WeightsError that lists the tensors that are missing, left over or of another shape, and the
    likely cause. A file must set the model's tensors in those parts that it has itself, and in the
    neck if it is a whole model, except for those that are left_out."""
    must = parts(tensors)
    if facts["neck"] is not None:
        must.add("neck")

    file = {name: tuple(value.shape) for name, value in tensors.items()}
    ours = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.split(".")[0] in must and name not in left_out
    }

    h, w = facts["grid"]  # which the model will have
    ours["backbone.pos_embed"] = (1, 1 + h * w, model.backbone.pos_embed.shape[2])

    faults = {}
    for name in ours | file:
        if name not in file:
            faults[name] = f"missing {name} {ours[name]}"
        elif name not in ours:
            faults[name] = f"left over {name} {file[name]}"
        elif file[name] != ours[name]:
            faults[name] = f"{name} is {file[name]} in the file, {ours[name]} in the model"

    if faults:
        cause = likely_cause(list(faults), [n for n in faults if n in file and n in ours])
        text = "a {kind} file for {arch}, neck {neck}, {num_classes} classes does not fit"
        faults = listed(list(faults.values()), "; ")
        raise WeightsError(f"{text.format(**facts)} ({cause}?): {faults}")


def likely_cause(faults: list[str], reshaped: list[str]) -> str:
    """What most often lies behind faults in tensors of these names, some of another shape."""
    if faults == reshaped and all(".classifier." in name for name in faults):
        return "another class count"
    if any(name.startswith("backbone.") for name in reshaped):
        return "another architecture"
    if any(name.startswith(("neck.", "backbone.norm.")) for name in faults):
        return "another neck"
    return "a file that is not whole, or has more"


# ---- Back to the names of others -----------------------------------------------------------------


def to_mmseg(state_dict: Tensors) -> Tensors:
    """Our names -> those of mmsegmentation 0.x. The tensors are the same objects."""
    table = {ours: theirs for theirs, ours in MMSEG.items()}
    return {rename(name, table): value for name, value in state_dict.items()}


def backbone_alone(state_dict: Tensors) -> Tensors:
    """The tensors of the backbone, without its prefix, so in timm's names; neck and heads have no
    place there."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def to_timm(state_dict: Tensors, arch: str) -> Tensors:
    """The backbone as timm has it: without a position of the class token in those of its models
    that add it to the token once and for all."""
    out = backbone_alone(state_dict)
    if not ARCHS[arch].get("cls_position", True):
        pos_embed = out["pos_embed"]  # (1, 1 + h w, D)
        out["cls_token"] = out["cls_token"] + pos_embed[:, :1]
        out["pos_embed"] = pos_embed[:, 1:].contiguous()
    return out


# ---- Files that nobody has to trust --------------------------------------------------------------


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

    is_zip = first.startswith(b"PK")
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()

        packed = sum(e.file_size for e in entries if e.compress_type != zipfile.ZIP_STORED)
        if packed > LARGEST:
            raise ValueError(f"would unpack to {packed / 1e9:.1f} GB")
        if all(e.filename.endswith(".npy") for e in entries):
            return read_npz(path)

    return read_torch(path, is_zip)


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


def read_npz(path: str) -> Tensors:
    """The arrays of a numpy archive; numpy refuses those of Python objects by itself. (An array's
    header may lie about its size: numpy reserves that much, fails at the end of the data, and has
    touched no more than is there.)"""
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


# safetensors: u64 n | n bytes of JSON {name: {dtype, shape, data_offsets: [a, b]}} | the data
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
    """Tensors that are views of the mapped file, read when they are used. ValueError where the
    header and the file do not agree."""
    data = np.memmap(path, np.uint8, mode="c")  # bytes; what is written to them stays in memory
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)

    spans = sorted(entry["data_offsets"] for entry in header.values())
    begins = [begin for begin, _ in spans]
    ends = [end for _, end in spans]
    if begins + [len(data) - start] != [0] + ends:
        raise ValueError("its tensors overlap, or leave holes")

    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        value = torch.from_numpy(data[start + begin : start + end])
        tensors[name] = value.view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_safetensors(tensors: Tensors, file: BinaryIO) -> None:
    """What read_safetensors reads. The header is filled up to a multiple of 8 bytes and the widest
    numbers come first, so that all of them lie where a mapped file needs them."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))

    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }

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
    finally:
        if os.path.exists(part):
            os.remove(part)  # a full disk needs the room


# ---- URLs ----------------------------------------------------------------------------------------

# The pretrained backbone of each architecture.
PRETRAINED = {
    "vit_b16":
        "https://github.com/rwightman/pytorch-image-models/releases/download/"
        "v0.1-vitjx/jx_vit_base_p16_224-80ecf9dd.pth",
    "vit_l16":
        "https://github.com/rwightman/pytorch-image-models/releases/download/"
        "v0.1-vitjx/jx_vit_large_p16_224-4ee7a4dc.pth",
    "deit_b16":  "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
    "deit_s16":  "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
    "deit_t16":  "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit3_s16": "https://dl.fbaipublicfiles.com/deit/deit_3_small_224_21k.pth",
    "deit3_b16": "https://dl.fbaipublicfiles.com/deit/deit_3_base_224_21k.pth",
    "deit3_l16": "https://dl.fbaipublicfiles.com/deit/deit_3_large_224_21k.pth",
    "dinov2_s14":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_b14":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_l14":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "dinov2_s14_reg":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dinov2_b14_reg":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "dinov2_l14_reg":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
}


def local_path(url: str) -> str:
    """The path itself or, for a URL, where torch's cache keeps the file behind it, which is fetched
    if it is not there yet. By one process at a time. Hexadecimal digits at the end of a file's name
    start its sha256, which is checked."""
    if not url.startswith(("http://", "https://")):
        return url

    name = os.path.basename(urlparse(url).path)
    match = re.search(r"-([0-9a-f]{8,64})\.", name)
    sha = match[1] if match else ""
    if not sha:
        # Many files are called model.safetensors: the address tells them apart.
        name = hashlib.sha256(url.encode()).hexdigest()[:8] + "_" + name

    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not os.path.exists(path):
            fetch(url, path, sha)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{error}; download it by other means and give the file's path, or train from scratch "
            "with --pretrained none"
        ) from error
    return path


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
    arch, whole = facts["arch"], facts["neck"] is not None
    print(describe(facts))

    if to == "ours":
        content = {"model": state_dict, "args": facts.get("args", {"arch": arch})}
        if "classes" in facts:
            content["classes"] = facts["classes"]
    elif to == "timm":
        content = to_timm(state_dict, arch)
    elif ARCHS[arch].get("layer_scale"):
        raise WeightsError(f"{src}: {arch} has layer scale, mmsegmentation's ViT has none")
    else:
        content = to_mmseg(state_dict)
        content = {"state_dict": content} if whole else backbone_alone(content)
        print(
            "mmsegmentation 1.2 and later need patch_bias=True in the backbone's config, or they "
            "drop the bias of the patch embedding without a word"
        )

    if dst.endswith(".safetensors"):  # which holds tensors and nothing else
        content = content.get("model") or content.get("state_dict") or content

    write_checkpoint(content, dst)
    print(f"{dst}: written, {to}")


def main() -> None:
    args = options().parse_args()
    with errors_in_one_sentence():
        convert(args.src, args.dst, args.to, args.bicubic)


if __name__ == "__main__":
    main()
