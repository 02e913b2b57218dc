"""Weights: reads every known checkpoint format into our names and shapes, exactly or not at all, and writes them again.

    state_dict, facts = load_weights("any.pth")     # kind, architecture, neck, classes, what was left out and why
    load_into(model, state_dict, facts)             # every tensor used once, or an error that lists the others
    python convert_weights.py SRC DST --to ours|mmseg|timm

Files are told apart by the names of their tensors, never by their own name:

    ours                    backbone.blocks.0.attn.qkv.weight          decode_head.ppm.0.conv.weight
    mmsegmentation 0.x      backbone.layers.0.attn.attn.in_proj_weight decode_head.psp_modules.0.1.conv.weight
    its backbones           layers.0.attn.attn.in_proj_weight
    timm and DeiT           blocks.0.attn.qkv.weight                   (DeiT: under the key "model")

No pickle is executed: torch.load runs with weights_only=True, which builds tensors and plain containers and nothing else.
"""
import argparse
import os
import pickle
import re
import sys
import warnings

import torch
from torch import Tensor, nn

from ade20k import fetch
from model import ARCHS, resize_pos_embed
from upernet import build_model

# Names in mmsegmentation -> ours. {} is a number. What no line matches is called the same in both.
MMSEG = {
    "backbone.ln1.": "backbone.norm.",
    "backbone.patch_embed.projection.": "backbone.patch_embed.proj.",
    "backbone.layers.{}.ln{}.": "backbone.blocks.{}.norm{}.",
    "backbone.layers.{}.attn.attn.in_proj_": "backbone.blocks.{}.attn.qkv.",        # q, k, v stacked in this order in both
    "backbone.layers.{}.attn.attn.out_proj.": "backbone.blocks.{}.attn.proj.",
    "backbone.layers.{}.ffn.layers.0.0.": "backbone.blocks.{}.mlp.fc1.",
    "backbone.layers.{}.ffn.layers.1.": "backbone.blocks.{}.mlp.fc2.",
    "neck.lateral_convs.{}.conv.": "neck.lateral_convs.{}.",
    "neck.convs.{}.conv.": "neck.convs.{}.",
    "decode_head.psp_modules.{}.1.": "decode_head.ppm.{}.",
    "decode_head.conv_seg.": "decode_head.classifier.",
    "auxiliary_head.convs.0.": "auxiliary_head.conv.",
    "auxiliary_head.conv_seg.": "auxiliary_head.classifier.",
}
# The pretrained backbone of each architecture; the end of the name is the start of the file's sha256.
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_"
PRETRAINED = {
    "vit_b16": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"
               "jx_vit_base_p16_224-80ecf9dd.pth",
    "deit_b16": DEIT + "base_patch16_224-b5f2ef4d.pth",
    "deit_s16": DEIT + "small_patch16_224-cd65a155.pth",
    "deit_t16": DEIT + "tiny_patch16_224-a1311bcf.pth",
}


class WeightsError(Exception):
    """A weight file that cannot be used, in one sentence: the file, what is wrong, the way out."""


def rename(name: str, rules: dict[str, str]) -> str:
    """The name after the first rule whose left side it starts with, or as it was."""
    for old, new in rules.items():
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return new.format(*match.groups()) + name[match.end():]
    return name


def to_mmseg(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of mmsegmentation 0.x. The tensors are the same objects."""
    rules = {ours: theirs for theirs, ours in MMSEG.items()}
    return {rename(name, rules): value for name, value in state_dict.items()}


def to_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone alone, in timm's names; neck and heads have no place there."""
    return {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}


def read(path: str) -> dict:
    """The dictionary in a file, or behind a URL, which is fetched to torch's cache first. WeightsError if unreadable."""
    if path.startswith(("http://", "https://")):
        url, path = path, os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(path))
        if not os.path.exists(path):
            digest = re.search(r"-([0-9a-f]{8,})\.", os.path.basename(path))
            try:
                fetch(url, path, digest.group(1) if digest else "")
            except (OSError, ValueError) as error:
                raise WeightsError(f"{error}; download it by other means and give the file's path, or "
                                   "train from scratch with --pretrained none") from error
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:     # (torch's own text advises to execute it)
        raise WeightsError(f"{path}: not a checkpoint, or one with objects that would have to be executed to be read; "
                           "only tensors and plain containers are") from error
    except Exception as error:                  # damaged zips raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: not a checkpoint, or a damaged one ({reason})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def load_weights(path_or_url: str) -> tuple[dict[str, Tensor], dict]:
    """Read any known format. -> (state_dict in our names, facts).

    facts: kind, arch (the first one in ARCHS of these shapes, so vit_b16 for a bare deit_b16: they differ in drop path
    alone), neck and num_classes (None for a backbone), tensors (how many are used), left_out (list of str, each with its
    reason), and of our own checkpoints args. pos_embed is resized to the architecture's grid. WeightsError otherwise.
    """
    content, path = read(path_or_url), path_or_url
    tensors = next((content[k] for k in ("state_dict", "model") if isinstance(content.get(k), dict)), content)
    tensors = {k.removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    left_out = []
    if "backbone.blocks.0.attn.qkv.weight" in tensors:
        kind = "ours"
    elif "backbone.layers.0.attn.attn.in_proj_weight" in tensors:
        kind = "mmsegmentation"
        tensors = {rename(k, MMSEG): v for k, v in tensors.items()}
    elif "layers.0.attn.attn.in_proj_weight" in tensors:
        kind = "mmsegmentation backbone"
        tensors = {rename("backbone." + k, MMSEG): v for k, v in tensors.items()}
    elif "blocks.0.attn.qkv.weight" in tensors:
        kind = "timm backbone"
        left_out = [f"{k}: the ImageNet classifier" for k in tensors if k.startswith(("head.", "pre_logits."))]
        tensors = {"backbone." + k: v for k, v in tensors.items() if not k.startswith(("head.", "pre_logits."))}
    else:
        raise WeightsError(f"{path}: no known kind of checkpoint, its {len(tensors)} tensors start with "
                           f"{', '.join(list(tensors)[:3]) or 'nothing'}")
    facts = {"kind": kind, **identify(path, tensors), "left_out": left_out, "tensors": len(tensors)}
    whole = "decode_head.classifier.weight" in tensors
    if kind == "ours" and "args" in content:
        facts["args"] = content["args"]
        facts["arch"] = content["args"]["arch"]
    elif "deit" in str(content.get("meta", "")) and facts["arch"] == "vit_b16":
        facts["arch"] = "deit_b16"              # mmsegmentation stores the config of the run as text
    with torch.device("meta"):                  # shapes without memory
        neck = facts["neck"] or ("ln" if "backbone.norm.weight" in tensors else "none")
        model = build_model(facts["arch"], neck, facts["num_classes"] or 150)
    grid = model.backbone.grid
    old = int((tensors["backbone.pos_embed"].shape[1] - 1) ** 0.5)
    if (old, old) != grid and tensors["backbone.pos_embed"].shape[1] == 1 + old * old:
        tensors["backbone.pos_embed"] = resize_pos_embed(tensors["backbone.pos_embed"].float(), (old, old), grid)
        facts["pos_embed"] = f"{old}x{old} resized to {grid[0]}x{grid[1]}"
    expected = {k: v for k, v in model.state_dict().items() if whole or k.startswith("backbone.")}
    compare(path, tensors, expected, facts)
    return tensors, facts


def identify(path: str, tensors: dict[str, Tensor]) -> dict:
    """arch, neck and num_classes from names and shapes. WeightsError if no architecture fits."""
    try:
        width, _, patch, _ = tensors["backbone.patch_embed.proj.weight"].shape
        tensors["backbone.pos_embed"]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: has no usable patch_embed and pos_embed, it is damaged or no ViT") from error
    depth = len({k.split(".")[2] for k in tensors if k.startswith("backbone.blocks.")})
    arch = next((n for n, a in ARCHS.items() if (a["width"], a["depth"], a["patch"]) == (width, depth, patch)), None)
    if arch is None:
        raise WeightsError(f"{path}: {depth} layers, {width} wide, patches of {patch}: none of {', '.join(ARCHS)}")
    if "decode_head.classifier.weight" not in tensors:
        return {"arch": arch, "neck": None, "num_classes": None}
    parts = ["ln"] * ("backbone.norm.weight" in tensors) + ["mln"] * any(k.startswith("neck.") for k in tensors)
    return {"arch": arch, "neck": "_".join(parts) or "none", "num_classes": len(tensors["decode_head.classifier.weight"])}


def compare(path: str, tensors: dict[str, Tensor], expected: dict[str, Tensor], facts: dict) -> None:
    """WeightsError that lists every tensor that is missing, left over or of another shape."""
    faults = [f"missing {k} {tuple(v.shape)}" for k, v in expected.items() if k not in tensors]
    faults += [f"left over {k} {tuple(v.shape)}" for k, v in tensors.items() if k not in expected]
    faults += [f"{k} is {tuple(v.shape)} in the file, {tuple(expected[k].shape)} in the model"
               for k, v in tensors.items() if k in expected and v.shape != expected[k].shape]
    if faults:
        raise WeightsError(f"{path}: a {facts['kind']} file for {facts['arch']}, neck {facts['neck']}, "
                           f"{facts['num_classes']} classes does not fit (another arch, neck or class count?): "
                           + "; ".join(faults))


def load_into(model: nn.Module, state_dict: dict[str, Tensor], facts: dict) -> None:
    """Copy what load_weights gave into a model; every tensor of the file is used, every one of the model set, or
    WeightsError, with two exceptions: a backbone leaves neck and heads as they are, and its final norm is left out (and
    added to facts["left_out"]) where the model's neck has none."""
    own = model.state_dict()
    if facts["neck"] is None:
        own = {k: v for k, v in own.items() if k.startswith("backbone.")}
        unused = [k for k in state_dict if k.startswith("backbone.norm.") and k not in own]
        facts["left_out"] = facts["left_out"] + [f"{k}: the model has no final norm" for k in unused]
        state_dict = {k: v for k, v in state_dict.items() if k not in unused}
    compare("the weights", state_dict, own, facts)
    model.load_state_dict(state_dict, strict=facts["neck"] is not None)


def describe(facts: dict) -> str:
    """facts in one line."""
    return ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("args", "left_out") and v is not None) + \
        (f"; left out {len(facts['left_out'])}: " + "; ".join(facts["left_out"]) if facts["left_out"] else "")


def save(content: dict, path: str) -> None:
    """torch.save to path.part, then move it into place: a reader never sees half a file."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.save(content, path + ".part")
    os.replace(path + ".part", path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint of any known kind.",
                                     epilog="example: python convert_weights.py upernet_deit-s16.pth deit_s.pt")
    parser.add_argument("src", metavar="SRC", help="file or URL")
    parser.add_argument("dst", metavar="DST", help="the file to write")
    parser.add_argument("--to", choices=("ours", "mmseg", "timm"), default="ours",
                        help="mmseg: {'state_dict': ...} in its names; timm: the backbone alone (default: ours)")
    args = parser.parse_args()
    try:
        state_dict, facts = load_weights(args.src)
        print(describe(facts))
        if args.to == "mmseg" and facts["neck"] is None:
            content = {k.removeprefix("backbone."): v for k, v in to_mmseg(state_dict).items()}
        else:
            content = {"ours": {"model": state_dict}, "mmseg": {"state_dict": to_mmseg(state_dict)},
                       "timm": to_timm(state_dict)}[args.to]
        save(content, args.dst)
        print(f"{args.dst}: written, {args.to}")
    except (WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
