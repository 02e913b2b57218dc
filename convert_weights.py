"""Weights: reads the checkpoints that people have into our names and shapes, exactly or not at all,
and writes them again.

    state_dict, facts = load_weights("any.pth")  # facts: kind, arch, neck, what is left out and why
    load_into(model, state_dict, facts)  # every tensor used once, or an error that lists the others
    python convert_weights.py SRC DST --to ours|mmseg|timm

Everybody's ViT has the same tensors under other names, so most of the work is a table of names for
each kind of file. The tables come first. Then come the steps from a file to a state_dict:

    unwrap, translate, identify, recall, check_settings, add_known_missing, fit_positions, compare

Then come load_into, the way back to the names of others, the files themselves and, last, URLs. A
file's content tells what it is, whatever it is called: the first bytes tell the container (torch's
zip or old pickle, safetensors, numpy's npz), the name of the patch embedding tells the kind. No
pickle is executed: torch.load runs with weights_only=True, which builds only tensors and plain
containers; for all else we give it stand-ins that do nothing."""

import argparse
import ast
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import glob
from math import isqrt
from os.path import exists, isdir, join
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ade20k import (
    PALETTE,
    UserError,
    about,
    errors_in_one_sentence,
    fetch_url,
    listed,
    one_line,
    say,
)
from model import ARCHS, NECKS, VisionTransformer, resize_pos_embed
from upernet import Segmenter, build_model

Tensors = dict[str, Tensor]  # by name


# ---- What the others call our tensors ------------------------------------------------------------


def read_table(text: str) -> dict:
    """-> {key: value}. Each line holds a key and, behind blanks, its value."""
    return dict(line.split(maxsplit=1) for line in text.strip().splitlines())


# On the left stands a piece of a file's names, on the right what it is in ours. rename() replaces
# one after the other, so a longer piece stands above one that it contains. What no line names is
# called the same in both. Where q, k and v are one matrix, they lie in this order everywhere.

# mmsegmentation, and mmpretrain, whose attention has our names.
MMSEG = read_table("""
    backbone.ln1.                                       backbone.norm.
    patch_embed.projection.                             patch_embed.proj.
    .ln1.                                               .norm1.
    .attn.attn.in_proj_                                 .attn.qkv.
    .attn.attn.out_proj.                                .attn.proj.
    .ln2.                                               .norm2.
    .ffn.layers.0.0.                                    .mlp.fc1.
    .ffn.layers.1.                                      .mlp.fc2.
    backbone.layers.                                    backbone.blocks.
    neck.lateral_convs.0.conv.                          neck.lateral_convs.0.
    neck.lateral_convs.1.conv.                          neck.lateral_convs.1.
    neck.lateral_convs.2.conv.                          neck.lateral_convs.2.
    neck.lateral_convs.3.conv.                          neck.lateral_convs.3.
    neck.convs.0.conv.                                  neck.convs.0.
    neck.convs.1.conv.                                  neck.convs.1.
    neck.convs.2.conv.                                  neck.convs.2.
    neck.convs.3.conv.                                  neck.convs.3.
    psp_modules.0.1.                                    ppm.0.
    psp_modules.1.1.                                    ppm.1.
    psp_modules.2.1.                                    ppm.2.
    psp_modules.3.1.                                    ppm.3.
    auxiliary_head.convs.0.                             auxiliary_head.conv.
    head.conv_seg.                                      head.classifier.
""")

# Names of the authors of DeiT-III and DINOv2 that differ from timm's, which are ours.
TIMM = read_table("""
    .gamma_1                                            .ls1.gamma
    .gamma_2                                            .ls2.gamma
    register_tokens                                     reg_token
""")

# layers. and .attention.x_proj. are what transformers 5 says; the last three lines are DINOv2's.
HUGGING_FACE = read_table("""
    embeddings.cls_token                                backbone.cls_token
    embeddings.distillation_token                       backbone.dist_token
    embeddings.position_embeddings                      backbone.pos_embed
    embeddings.patch_embeddings.projection.             backbone.patch_embed.proj.
    encoder.layer.                                      backbone.blocks.
    .layernorm_before.                                  .norm1.
    layers.                                             backbone.blocks.
    .attention.q_proj.                                  .attn.q.
    .attention.k_proj.                                  .attn.k.
    .attention.v_proj.                                  .attn.v.
    .attention.o_proj.                                  .attn.proj.
    .attention.attention.query.                         .attn.q.
    .attention.attention.key.                           .attn.k.
    .attention.attention.value.                         .attn.v.
    .attention.output.dense.                            .attn.proj.
    .layernorm_after.                                   .norm2.
    .intermediate.dense.                                .mlp.fc1.
    .output.dense.                                      .mlp.fc2.
    layernorm.                                          backbone.norm.
    embeddings.register_tokens                          backbone.reg_token
    .layer_scale1.lambda1                               .ls1.gamma
    .layer_scale2.lambda1                               .ls2.gamma
""")

# In torchvision's files of 2021 the MLP is linear_1 and linear_2.
TORCHVISION = read_table("""
    class_token                                         backbone.cls_token
    encoder.pos_embedding                               backbone.pos_embed
    conv_proj.                                          backbone.patch_embed.proj.
    encoder.layers.encoder_layer_                       backbone.blocks.
    .ln_1.                                              .norm1.
    .self_attention.in_proj_                            .attn.qkv.
    .self_attention.out_proj.                           .attn.proj.
    .ln_2.                                              .norm2.
    .mlp.0.                                             .mlp.fc1.
    .mlp.3.                                             .mlp.fc2.
    .mlp.linear_1.                                      .mlp.fc1.
    .mlp.linear_2.                                      .mlp.fc2.
    encoder.ln.                                         backbone.norm.
""")

# Google's own files.
JAX = read_table("""
    cls                                                 backbone.cls_token
    Transformer/posembed_input/pos_embedding            backbone.pos_embed
    embedding/                                          backbone.patch_embed.proj.
    Transformer/encoderblock_                           backbone.blocks.
    /LayerNorm_0/                                       .norm1.
    /MultiHeadDotProductAttention_1/query/              .attn.q.
    /MultiHeadDotProductAttention_1/key/                .attn.k.
    /MultiHeadDotProductAttention_1/value/              .attn.v.
    /MultiHeadDotProductAttention_1/out/                .attn.proj.
    /LayerNorm_2/                                       .norm2.
    /MlpBlock_3/Dense_0/                                .mlp.fc1.
    /MlpBlock_3/Dense_1/                                .mlp.fc2.
    Transformer/encoder_norm/                           backbone.norm.
    kernel                                              weight
    scale                                               weight
""")

# The kinds of files. Key: what a kind calls the patch embedding. Value: the kind, what we put
# before its names, its table. ours: also what DINOv2's training writes. mmsegmentation: whole
# models of 0.x and 1.x, backbones as its vit2mmseg.py writes them, and mmpretrain. timm: also DeiT,
# MAE and DINOv2.
KINDS = {
    "backbone.patch_embed.proj.weight":       ("ours", "", TIMM),
    "backbone.patch_embed.projection.weight": ("mmsegmentation", "", MMSEG),
    "patch_embed.projection.weight":          ("mmsegmentation backbone", "backbone.", MMSEG),
    "embeddings.patch_embeddings.projection.weight": ("Hugging Face", "", HUGGING_FACE),
    "patch_embed.proj.weight":                ("timm", "backbone.", TIMM),
    "conv_proj.weight":                       ("torchvision", "", TORCHVISION),
    "embedding/kernel":                       ("JAX", "", JAX),
}

# What is left out on purpose: how the names of these tensors start (without "backbone."), and why.
# (ema_: mmcv's EMAHook swaps the averaged weights and the others before it saves.)
LEFT_OUT = read_table("""
    head.                       a classifier of whole images
    head/                       a classifier of whole images
    heads.                      a classifier of whole images
    fc.                         a classifier of whole images
    pre_logits.                 a classifier of whole images
    pre_logits/                 a classifier of whole images
    pooler.                     a classifier of whole images
    head_dist.                  the classifier of DeiT's distillation
    mask_token                  stands for hidden patches in pretraining
    embeddings.mask_token       stands for hidden patches in pretraining
    decoder_                    the decoder of MAE's pretraining
    decoder.decoder_            the decoder of MAE's pretraining
    decoder.                    the decoder of another kind of model
    fc_norm.                    the norm of pooled features
    ema_                        a second set of weights, those before averaging
    steps                       counts the steps of an average
    n_averaged                  counts the steps of an average
""")

# What mmsegmentation's config says about a backbone and the tensors do not. DEFAULTS: what holds
# there if the config does not say it. SETTINGS: what holds here, for the sizes of an architecture.
# HUGGING_FACE_CONFIG: what its config.json says, in mmsegmentation's words.
DEFAULTS = read_table("""
    img_size            224
    num_heads           12
    norm_cfg            dict(type='LN')
""")
SETTINGS = """
    num_heads           {heads}
    out_indices         {layers}
    with_cls_token      True
    interpolate_mode    'bicubic'
    out_origin          False
    patch_pad           'corner'
    act_cfg             dict(type='GELU')
    norm_cfg            dict(type='LN', eps=1e-06)
"""
HUGGING_FACE_CONFIG = (
    "dict(backbone=dict(num_heads={num_attention_heads}, img_size={image_size}, "
    "act_cfg=dict(type='{hidden_act}'), norm_cfg=dict(type='LN', eps=1e-06)))"
)


def rename(name: str, table: dict) -> str:
    """backbone.layers.7.ln1.bias -> backbone.blocks.7.norm1.bias, with the table MMSEG."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name


# ---- From a file to a state_dict -----------------------------------------------------------------


class WeightsError(UserError):
    """A weight file that cannot be used, in one sentence: the file, what is wrong, the way out."""


def load_weights(path_or_url: str) -> tuple:
    """Read any known format. -> (state_dict in our names, facts), or WeightsError. Where a file
    holds several models, a name behind a colon says which one is meant, as in x.pth:teacher.

    facts:
        kind         one of those in KINDS
        arch         the first one in ARCHS of these shapes, unless the file says more: a bare
                     deit_b16 is called vit_b16, from which it differs only in drop path
        neck         one of NECKS, None for a backbone
        num_classes  None for a backbone
        dtype        of the patch embedding's numbers in the file
        tensors      how many are used
        added        tensors that the file lacks but whose values are known, each with its reason
        left_out     what is not used or not there, tensors and other entries, each with its reason
        grid         (h, w) of the returned position table
        resolution   height x width of the training's pictures, from the positions in the file
        assumed      what only a config could tell. Missing where one, or our arguments, tell it
        classes      the fields of ade20k.Classes for a whole model; names () if none are known
        zero_ignored "True" if 0 in label files means "not labelled", else "False"; None: unknown
        args         the arguments of the training. Missing except in our own checkpoints

    A whole model keeps its pos_embed to the bit. A backbone starts a new model, so its pos_embed is
    resized to the architecture's grid, with resize_pos_embed. A tensor may be a view of the file:
    copy it before the file is overwritten."""
    path, choice = split_choice(path_or_url)
    if isdir(path):  # made by Hugging Face's save_pretrained. (Shards have an index: refused.)
        path = join(
            path, min(glob("model.safetensors*", root_dir=path), default="model.safetensors")
        )
    content = read_checkpoint(path)
    facts = {"added": [], "left_out": [], "grid": content.get("grid")}

    with about(path, WeightsError):
        weights = unwrap(content, choice, facts["left_out"])
        tensors = translate(weights, facts)

        model = identify(tensors, facts)
        config = recall(content, facts)
        if facts["kind"] == "Hugging Face":
            with suppress(Exception):  # if there is none beside the file, or another program's
                beside = Path(path).with_name("config.json").read_text()
                config = HUGGING_FACE_CONFIG.format(**json.loads(beside)).replace("gelu", "GELU")
        check_settings(config, facts)
        add_known_missing(tensors, facts)
        fit_positions(tensors, model.backbone, facts)
        compare(tensors, model.state_dict())

    facts |= dict(grid=model.backbone.grid, tensors=len(tensors))
    return tensors, facts


def split_choice(source: str) -> tuple:
    """ "x.pth:state.model" -> ("x.pth", "state.model"); ("x.pth", "") without a choice. The colon
    of C:\\x.pth, of a URL or of a file's own name chooses nothing."""
    match = re.fullmatch(r"(..+):([A-Za-z_][\w.-]*)", source)
    return match.groups() if match and not exists(source) else (source, "")


# What torch.compile, FSDP and activation checkpointing put inside names, wherever they wrap a part;
# and the chunks that DINOv2's training puts blocks in: blocks.1.6. is block 6.
WRAPPERS = (
    r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.|(?<=\bblocks\.)\d+\.(?=\d+\.)"
)

# Finds the patch embeddings in a list of names, one a line. The group is what stands before the
# name in KINDS, so before all names of that model.
PATCH_EMBED = rf"(?m)^(|.*?\.)(?:{'|'.join(map(re.escape, KINDS))})$"


def unwrap(content: dict, choice: str, left_out: list) -> Tensors:
    """Find the one model in a file's content and take off what stands before its names.
    WeightsError if there is no model, or several and no choice.

    {"epoch": 3, "state_dict": {"module.cls_token": x, ...}} -> {"cls_token": x, ...}"""
    entries = unique(flatten(content, "", set()))
    tensors = [name for name, value in entries.items() if isinstance(value, Tensor)]

    # What a user calls each model, and what stands before its names. "top": nothing does.
    prefixes = re.findall(PATCH_EMBED, "\n".join(tensors))
    models = {prefix.rstrip(".") or "top": prefix for prefix in prefixes}
    if not models:
        raise WeightsError(
            "no known kind of checkpoint (of a whole model save the state_dict()), its "
            f"tensors: {listed(tensors)}"
        )
    if not choice and len(models) == 1:
        (choice,) = models
    if choice not in models:
        raise WeightsError(
            f"holds several models, choose one as FILE:NAME, of {listed(list(models))}"
            " (where mmengine averages, state_dict holds the average, ema_state_dict does not)"
        )

    # One dictionary may hold a model inside another: "cls_token", "ema_model.cls_token". The names
    # of the inner one are not this one's.
    prefix = models[choice]
    inner = tuple(other for other in prefixes if len(other) > len(prefix))
    used = {name for name in tensors if name.startswith(prefix) and not name.startswith(inner)}

    # Without a decode_head it is a backbone. Beside it may stand parts of another kind of model:
    # "neck.x", "depth_head.x". But the only backbone beside a decode_head is part of a whole model,
    # even if we do not know its names: "backbone.module.cls_token", "decode_head.conv_seg.bias".
    if "decode_head." not in " ".join(used):
        if len(models) == 1 and "decode_head." in " ".join(entries):
            raise WeightsError(
                "the names of its backbone and of its decode_head begin differently: take off what "
                "stands before one of them"
            )
        used = {name for name in used if name.startswith(prefix + "backbone.")} or used

    others = {
        ".".join(name.split(".")[:2])
        for name in entries.keys() - used
        if not name.startswith(("args.", "classes", "grid", "meta."))  # see recall
    }
    if others:
        left_out.append(f"the file's other entries ({listed(sorted(others))})")
    return {name.removeprefix(prefix): entries[name] for name in used}


def flatten(holder: dict, where: str, seen: set) -> Iterator:
    """The entries of nested dictionaries by their whole names, without wrappers:
    {"state": {"_orig_mod.cls_token": x}} -> ("state.cls_token", x). `where` stands before the names
    in holder. A dictionary in several places, or in itself, comes once: its id is in `seen`."""
    seen.add(id(holder))
    for key, value in holder.items():
        name = where + re.sub(WRAPPERS, "", str(key))
        if not isinstance(value, dict):
            yield name, value
        elif id(value) not in seen:
            yield from flatten(value, name + ".", seen)


def unique(pairs: Iterable) -> dict:
    """dict(pairs), or WeightsError if a name stands twice."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise WeightsError(f"two of its entries are {name}")
        found[name] = value
    return found


def translate(weights: Tensors, facts: dict) -> Tensors:
    """The tensors in our names and shapes, without those that are left out on purpose. WeightsError
    for numbers that no training would survive."""
    # The largest model here has 383 million. (With a stride of 0 a small file can claim tensors of
    # any size.)
    if sum(value.numel() for value in weights.values()) > 500_000_000:
        raise WeightsError("claims to hold more numbers than any model here has")

    (patch_embed,) = KINDS.keys() & weights
    facts["kind"], prefix, table = KINDS[patch_embed]

    pairs = []
    for name, value in sorted(weights.items()):
        part = name.removeprefix("backbone.")
        reasons = [reason for start, reason in LEFT_OUT.items() if part.startswith(start)]
        if reasons:
            facts["left_out"] += [f"{name} ({reasons[0]})"]
            continue

        # (Only BatchNorm's counters have no dimension. They are whole numbers.)
        if value.ndim and not (value.is_floating_point() and value.float().isfinite().all()):
            raise WeightsError(
                f"{name} holds {value.dtype} that are not finite floating point numbers: it is "
                "quantised, damaged, or of a run that diverged; take an earlier file"
            )
        if table is JAX:
            value = from_jax(name, value)
        pairs.append((rename(prefix + name, table), value))

    return join_qkv(unique(pairs))


def from_jax(name: str, value: Tensor) -> Tensor:
    """Bring a tensor to torch's shape. JAX multiplies from the other side, so a kernel is (in,
    out). Those of q, k and v are (in, heads, d), that of attention's output is (heads, d, out),
    that of the patch embedding (h, w, in, out)."""
    if name.endswith("bias"):
        return value.flatten()  # those of attention are (heads, d)
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)  # (out, in, h, w)
    if "/out/" in name:
        return value.flatten(0, -2).T  # (out, heads d)
    if name.endswith("kernel"):
        return value.flatten(1).T  # (heads d, in), or (out, in)
    return value


def join_qkv(tensors: Tensors) -> Tensors:
    """Three matrices q, k and v (D, D) become one (3 D, D) with the rows of all, for a single,
    larger product. Their biases (D,) become one (3 D,)."""
    for q in [name for name in tensors if ".attn.q." in name]:
        # Where k or v is missing, the result is too small, which compare() sees.
        tensors[q.replace(".q.", ".qkv.")] = torch.cat(
            [tensors.pop(q.replace(".q.", f".{x}."), torch.empty(0)) for x in "qkv"]
        )
    return tensors


def identify(tensors: Tensors, facts: dict) -> Segmenter:
    """Find arch, neck, num_classes and dtype. -> a model of that arch and neck, on the device meta,
    so with shapes but without memory. WeightsError if no architecture fits."""
    patch_embed = tensors["backbone.patch_embed.proj.weight"]
    found = {
        "width": patch_embed.shape[0],
        "patch": patch_embed.shape[-1],
        "depth": len({name.split(".")[2] for name in tensors if ".blocks." in name}),
        "registers": tensors.get("backbone.reg_token", torch.empty(1, 0)).shape[1],
        "layer_scale": "backbone.blocks.0.ls1.gamma" in tensors,
    }

    # What an architecture does not name, it does not have: 0 registers, no layer scale.
    fits = [a for a, own in ARCHS.items() if all(own.get(k, 0) == found[k] for k in found)]
    if not fits:
        raise WeightsError(f"no architecture has its sizes, {found}")

    has = ("backbone.norm.weight" in tensors, "neck.convs.0.weight" in tensors)  # as in NECKS
    neck = {needs: name for name, needs in NECKS.items()}[has]
    num_classes = len(tensors.get("decode_head.classifier.weight", ())) or None

    facts |= dict(
        arch=fits[0],
        neck=num_classes and neck,  # None for a backbone
        num_classes=num_classes,
        dtype=patch_embed.dtype,
    )
    with torch.device("meta"):
        return build_model(fits[0], neck, num_classes or 150)


def recall(content: dict, facts: dict) -> str:
    """Add what the file says about its training to the facts. Our checkpoints hold args, classes
    and grid. mmsegmentation's "meta" holds the run's config, as text, and the data set's classes.
    Other people's files may hold anything there: what is not as we know it counts as not there.
    -> the config of a whole model, "" if there is none"""
    # Version 1.x has cfg where 0.x has config, and the classes in meta's dataset_meta.
    said = flatten(content, "", set())
    entries = {name.lower().replace("dataset_meta.", ""): value for name, value in said}
    config = str(entries.get("meta.config") or entries.get("meta.cfg") or "")
    if facts["arch"] == "vit_b16" and "deit" in config:
        facts["arch"] = "deit_b16"

    # The fields of ade20k.Classes, each by itself. What 0 means decides what --save-labels writes:
    # where nothing says it, it is the first class, except with ADE20K's 150 classes.
    n = facts["num_classes"]
    names = ()
    palette = (PALETTE.tolist() * 2)[:n]
    with suppress(Exception):
        # (One is called "bed ".)
        names = tuple(one_line(name.strip()) for name in entries["meta.classes"])
    with suppress(Exception):
        palette = np.array(entries["meta.palette"], np.uint8).reshape(n, 3).tolist()
    zero_ignored = "reduce_zero_label=True" in config if config else n == 150
    classes = names, palette, entries.get("meta.reduce_zero_label", zero_ignored)

    arch = str(entries.get("args.arch"))
    if arch in ARCHS:
        facts |= dict(args=content["args"], arch=arch)
        classes = content.get("classes") or classes
    facts |= dict(classes=classes, zero_ignored=n and str(classes[2]))
    return config if n else ""  # that of a backbone's pretraining tells other settings


def check_settings(config: str, facts: dict) -> None:
    """WeightsError if the config, in mmsegmentation's words, names what does not hold here: the
    tensors would load, but the network would compute something else. Its size of pictures gives the
    grid. It is Python code, which is read and never executed. If there is no config,
    facts["assumed"] says what is taken for granted."""
    arguments = ARCHS[facts["arch"]]
    layers = tuple(arguments["depth"] * k // 4 - 1 for k in range(1, 5))  # the quarters' last
    ours = read_table(SETTINGS.format(layers=layers, **arguments))
    theirs = {}

    with suppress(Exception):
        # In the form of SETTINGS: some configs have a list as out_indices, and 1.x sorts by name.
        nodes = ast.walk(ast.parse(config.replace("[", "(").replace("]", ")")))
        backbone = next(node.value for node in nodes if getattr(node, "arg", 0) == "backbone")
        theirs = DEFAULTS | {
            each.arg: ast.unparse(each.value)
            .replace("eps=1e-06, type='LN'", "type='LN', eps=1e-06")
            for each in backbone.keywords
        }
        size = ast.literal_eval(theirs["img_size"])  # s, (s,) or (h, w)
        facts["grid"] = (np.broadcast_to(size, 2) // arguments["patch"]).tolist()

    wrong = dict(theirs.items() - (theirs | ours).items())
    if wrong:
        raise WeightsError(f"its config says {wrong}, this network has only {ours}")
    if not theirs and "args" not in facts:
        facts["assumed"] = (
            f"{arguments['heads']} heads, a square of learned positions, GELU, maps after layers "
            f"{layers} counted from 0: check that the model is so"
        )


def add_known_missing(tensors: Tensors, facts: dict) -> None:
    """Add the patch bias where a file has none; say so where it has no auxiliary head."""
    bias = "backbone.patch_embed.proj.bias"
    if "mmsegmentation" in facts["kind"] and bias not in tensors:
        tensors[bias] = torch.zeros(len(tensors["backbone.patch_embed.proj.weight"]))
        facts["added"] += ["a patch bias of zeros, as mmsegmentation has none from 1.2 on"]

    if facts["neck"] and "auxiliary_head.classifier.weight" not in tensors:
        facts["left_out"] += ["auxiliary_head (not in the file, training starts a new one)"]


def fit_positions(tensors: Tensors, backbone: VisionTransformer, facts: dict) -> None:
    """Resize a backbone's positions to the architecture's grid; for a whole model, give `backbone`
    the grid of the positions. Where no config tells height and width, the grid is a square. If
    there is no table, compare() says so."""
    if "backbone.pos_embed" not in tensors:
        return

    pos_embed = tensors["backbone.pos_embed"]  # (1, N, D)
    if tensors.pop("backbone.dist_token", None) is not None:  # its position is the second
        pos_embed = pos_embed[:, torch.arange(pos_embed.shape[1]) != 1]  # (1, N - 1, D)
        facts["left_out"] += [
            "dist_token and its position (in DeiT's distillation the patches attend to it: without "
            "it, features differ by 3 to 4%)"
        ]

    rows = pos_embed.shape[1]
    side = isqrt(rows)
    h, w = grid = facts["grid"] or (side, side)
    if rows == h * w and not facts["neck"]:  # DeiT-III, and timm's DINOv2 with registers
        pos_embed = F.pad(pos_embed, (0, 0, 1, 0))  # (1, 1 + N, D)
        facts["added"] += ["a position of zeros for the class token, which has none"]
    elif rows != 1 + h * w:
        raise WeightsError(
            f"its {rows} rows of positions are not a square, or not what its config says: add the "
            'true grid to the file, as the entry "grid": (height, width)'
        )

    size = backbone.patch_embed.patch
    facts["resolution"] = f"{h * size}x{w * size}"
    if facts["neck"]:
        backbone.set_grid((h, w))
    else:
        tensors["backbone.pos_embed"] = resize_pos_embed(pos_embed.float(), grid, backbone.grid)


def compare(tensors: Tensors, wanted: Tensors) -> None:
    """WeightsError if tensors are missing, left over or of another shape than those wanted, the
    model's. It lists them.

    A file may hold a backbone, a neck, a decode_head and an auxiliary_head. It must hold every
    tensor of the parts that it has, and of the model's neck if it has a head.

    (load_state_dict lists such tensors too, but it has overwritten half of a model by then, and
    does not notice that BatchNorm's num_batches_tracked is missing.)"""
    parts = {name.split(".")[0] for name in tensors}
    if "decode_head" in parts:
        parts.add("neck")

    theirs, ours = [
        {f"{name} {tuple(x.shape)}" for name, x in held.items() if name.split(".")[0] in parts}
        for held in (tensors, wanted)
    ]
    if theirs != ours:
        raise WeightsError(
            f"the file has {listed(sorted(theirs - ours)) or 'nothing'} "
            f"where the model has {listed(sorted(ours - theirs)) or 'nothing'}"
        )


# ---- From a state_dict to a model ----------------------------------------------------------------


def load_into(
    model: Segmenter, state_dict: Tensors, facts: dict, new_classes: bool = False
) -> None:
    """Copy what load_weights gave into a model, whose grid of positions becomes facts["grid"].
    Every tensor of the file is used and every tensor of the model is set, or WeightsError and the
    model stays as it was. There are three exceptions; the last two add to facts["left_out"]:

    - a backbone leaves neck and heads as they are, and a file without auxiliary head leaves the
      model's as it is;
    - the final norm of a backbone is left out if the model has none;
    - with new_classes, a whole model for another number of classes leaves both classifiers as they
      are."""
    left_out = ()  # how the names of tensors start that are left out here
    if not facts["neck"] and model.backbone.norm is None:
        left_out = ("backbone.norm.",)
    elif new_classes and facts["num_classes"] != model.decode_head.classifier.out_channels:
        left_out = ("decode_head.classifier.", "auxiliary_head.classifier.")

    used, ours = [
        {name: value for name, value in tensors.items() if not name.startswith(left_out)}
        for tensors in (state_dict, model.state_dict())
    ]
    ours["backbone.pos_embed"] = used["backbone.pos_embed"]  # set_grid makes room for it
    compare(used, ours)

    facts["left_out"] += [
        f"{name} (the model has none, or another shape)" for name in state_dict if name not in used
    ]
    model.backbone.set_grid(facts["grid"])
    model.load_state_dict(used, strict=False)  # compare() was the strict part


def describe(facts: dict) -> str:
    """facts in one line."""
    keys = "kind arch neck num_classes zero_ignored resolution tensors dtype added left_out assumed"
    return "; ".join(
        f"{key} {listed(value) if isinstance(value, list) else value}"
        for key in keys.split()
        if (value := facts.get(key))
    )


# ---- Back to the names of others -----------------------------------------------------------------


def to_mmseg(state_dict: Tensors) -> Tensors:
    """Our names -> those of mmsegmentation 0.x. The tensors are the same objects."""
    table = {ours: theirs for theirs, ours in MMSEG.items()}
    return {rename(name, table): value for name, value in state_dict.items()}


def backbone_of(state_dict: Tensors) -> Tensors:
    """The tensors of the backbone, without "backbone." before their names."""
    return {
        name.removeprefix("backbone."): value
        for name, value in state_dict.items()
        if name.startswith("backbone.")
    }


def to_timm(state_dict: Tensors, arch: str) -> Tensors:
    """The backbone in timm's names. Some of timm's models give the class token no position of its
    own: there the position is added to the token."""
    out = backbone_of(state_dict)
    if not ARCHS[arch].get("cls_position", True):
        cls, out["pos_embed"] = out["pos_embed"].tensor_split([1], dim=1)  # (1, 1, D), (1, h w, D)
        out["cls_token"] = out["cls_token"] + cls
    return out


# ---- Files ---------------------------------------------------------------------------------------


def read_checkpoint(path: str) -> dict:
    """The dictionary in a file, or behind a URL, which is fetched to torch's cache first. Its first
    bytes name the container. WeightsError if unreadable."""
    path = local_path(path)
    with about(f"{path}: cannot be read as a checkpoint", WeightsError):
        with open(path, "rb") as file:
            first = file.read(9)

        if first.endswith(b"{"):  # behind the 8 bytes of a length: JSON
            return read_safetensors(path)
        if first.startswith(b"PK"):  # a zip
            return read_zip(path)
        return read_torch(path, mapped=False)  # a bare pickle, as torch wrote before 2020


def read_zip(path: str) -> dict:
    """A zip: numpy's archive of arrays (numpy refuses Python objects by itself), or what torch.save
    writes."""
    with about("a damaged zip", ValueError), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if entries[0].filename.endswith(".npy"):
            with np.load(path) as arrays:
                return {name: torch.from_numpy(value) for name, value in arrays.items()}

        # Reading an entry compares it with its checksum, which torch does not do. A checksum of 0
        # means that torch was told to compute none.
        for entry in entries:
            if entry.CRC:
                archive.read(entry)

    compressed = any(entry.compress_type for entry in entries)  # cannot be mapped
    return read_torch(path, get_unsafe_globals_in_checkpoint(path), mapped=not compressed)


class Skipped:
    """Stands in for an object of a foreign class (loss curves, paths, a trainer's own). It takes
    any arguments and any state, and ignores them."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# Names with another stand-in than Skipped. (A real defaultdict would call its argument for each
# missing key.)
STAND_INS = {"collections.defaultdict": lambda *args: {}}


def read_torch(path: str, names: Iterable = STAND_INS, mapped: bool = True) -> dict:
    """The dictionary that torch.save wrote. A mapped file takes memory only for the tensors that
    are used.

    A pickle names the classes and functions that build its objects. torch knows those of tensors
    and plain containers. For the others, `names`, we give it stand-ins that do nothing. torch calls
    the stand-ins and never imports what the pickle names."""
    stand_ins = [(STAND_INS.get(name, Skipped), name) for name in names]

    try:
        with warnings.catch_warnings(action="ignore"), safe_globals(stand_ins):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception as error:  # torch's words advise to execute the file
        raise ValueError(
            "it is damaged, too large for the memory, torch's under the name .safetensors, or "
            "holds no tensors by name: of a whole model save the state_dict(), of a web page or a "
            "pointer of Git LFS fetch the file itself, of an index in JSON join the shards, by "
            "save_pretrained(DIR, max_shard_size='9GB')"
        ) from error


# safetensors: u64 n | n bytes of JSON {name: {dtype, shape, data_offsets: [a, b]}} | the data
SAFETENSORS_DTYPES = read_table("""
    F64             float64
    F32             float32
    F16             float16
    BF16            bfloat16
    I64             int64
    I32             int32
    I16             int16
    I8              int8
    U8              uint8
    BOOL            bool
    U16             uint16
    U32             uint32
    U64             uint64
    C64             complex64
    F8_E4M3         float8_e4m3fn
    F8_E5M2         float8_e5m2
    F8_E8M0         float8_e8m0fnu
    F8_E4M3FNUZ     float8_e4m3fnuz
    F8_E5M2FNUZ     float8_e5m2fnuz
""")


def read_safetensors(path: str) -> Tensors:
    """Tensors that are views of the mapped file, read when they are used."""
    data = np.memmap(path, np.uint8, mode="c")  # bytes; a change to them never reaches the file
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]), object_pairs_hook=unique)
    header.pop("__metadata__", None)

    tensors = {}
    for name, entry in header.items():
        value = torch.from_numpy(data[start:][slice(*entry["data_offsets"])])
        dtype = getattr(torch, SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = value.view(dtype).reshape(entry["shape"])

    return tensors


def write_checkpoint(content: dict, path: str) -> None:
    """torch.save, so that a reader never sees half a file. OSError or torch's RuntimeError if it
    cannot be written."""
    with whole_or_not_at_all(path) as part, open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it has its name, should the power fail


@contextmanager
def whole_or_not_at_all(path: str) -> Iterator:
    """Gives a name to write to, path.part, and then moves the file to path. After an error path
    stays as it was."""
    part = Path(path + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield str(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # a full disk needs the room


# ---- URLs ----------------------------------------------------------------------------------------

# The pretrained backbone of each architecture. (toy_p8 has none.)
PRETRAINED = read_table("""
    vit_b16         https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/jx_vit_base_p16_224-80ecf9dd.pth
    vit_l16         https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/jx_vit_large_p16_224-4ee7a4dc.pth
    deit_b16        https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth
    deit_s16        https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth
    deit_t16        https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth
    deit3_s16       https://dl.fbaipublicfiles.com/deit/deit_3_small_224_21k.pth
    deit3_b16       https://dl.fbaipublicfiles.com/deit/deit_3_base_224_21k.pth
    deit3_l16       https://dl.fbaipublicfiles.com/deit/deit_3_large_224_21k.pth
    dinov2_s14      https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth
    dinov2_b14      https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth
    dinov2_l14      https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth
    dinov2_s14_reg  https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth
    dinov2_b14_reg  https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth
    dinov2_l14_reg  https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth
""")


def local_path(source: str) -> str:
    """A path stays as it is. A URL's file is fetched to torch's cache, if it is not there yet.
    -> the file's path. With several processes, one has to call this before the others do. Names
    like x-0123abcd.pth end with the first digits of the file's sha256, which is checked. Other
    names do not tell files apart, as many are called model.safetensors: the cache calls such a file
    by the sha256 of its address.

    torch's own download would not notice that a file is cut short. So the file is read once."""
    if "://" not in source:
        return source

    with about(
        f"{source}: cannot be fetched, download it by other means and give the file's path, or "
        "take --pretrained none",
        WeightsError,
    ):
        named = re.search(r"[^/]*-([0-9a-f]{8,64})\.[^/]*$", urlparse(source).path)
        name = named[0] if named else hashlib.sha256(source.encode()).hexdigest()
        path = join(torch.hub.get_dir(), "checkpoints", name)
        if not exists(path):
            with whole_or_not_at_all(path) as part:
                fetch_url(source, part, named and named[1])
                read_checkpoint(part)  # so only a file that can be opened enters the cache
        return path


# ---- python convert_weights.py -------------------------------------------------------------------


def convert(src: str, dst: str, to: str) -> None:
    """Read src, write dst in the names of `to` (ours, mmseg or timm), say what was done."""
    if dst.endswith(".safetensors"):
        raise WeightsError("safetensors are only read; torch's file is written, as x.pt")
    # (dst is written as dst.part first.)
    if exists(dst) or exists(dst + ".part"):
        raise WeightsError(f"{dst} or {dst}.part exists: remove it or give it another name")

    state_dict, facts = load_weights(src)
    arch = facts["arch"]
    say(describe(facts))

    content = {  # what recall() reads again
        "args": facts.get("args", {"arch": arch}),
        "classes": facts["classes"],
        "grid": facts["grid"],
    }
    if to == "ours":
        content["model"] = state_dict
    elif to == "timm":
        content = to_timm(state_dict, arch)
    elif ARCHS[arch].get("layer_scale"):
        raise WeightsError(f"{src}: has layer scale, mmsegmentation's ViT has none: take --to timm")
    else:
        weights = to_mmseg(state_dict)
        content |= {
            "state_dict": weights,
            "meta": {"CLASSES": facts["classes"][0], "PALETTE": facts["classes"][1]},
        }
        if not facts["neck"]:
            content = backbone_of(weights)
        say(
            "mmsegmentation 1.2 and later need patch_bias=True in the backbone's config, or they "
            "drop the bias of the patch embedding without a word"
        )

    with about(dst + ": cannot be written (is the disk full?)", WeightsError):
        write_checkpoint(content, dst)
    say(f"written: {dst}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of any known kind.",
        epilog="example: python convert_weights.py upernet_deit-s16.pth deit_s.pt",
    )
    add = parser.add_argument
    add("src", help="file or URL; SRC:path.to.it means one of several models in it")
    add("dst", help="the file to write, as torch.save does; it must not exist")
    add("--to", choices=("ours", "mmseg", "timm"), default="ours",
        help="whose names. mmseg: mmsegmentation's, a whole model in {'state_dict': ...}; timm: "
        "only the backbone (default: ours)")

    with errors_in_one_sentence():
        convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
