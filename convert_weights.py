"""Weights: reads the checkpoints that people have into our names and shapes, exactly or not at all,
and writes them again.

    state_dict, facts = load_weights("any.pth")     # kind, architecture, neck, classes, what was left out and why
    load_into(model, state_dict, facts)             # every tensor used once, or an error that lists the others
    python convert_weights.py SRC DST --to ours|mmseg|timm

What a file is, its content tells and never its name: the container (torch's zip or old pickle,
safetensors, numpy's npz) by its first bytes, the kind by what it calls the patch embedding, see
KINDS. Whatever stands before that name (module., vit., ema_model.module.) is a wrapper's and is
taken off every name. No pickle is executed: torch.load runs with weights_only=True, which builds
tensors and plain containers and nothing else."""

import argparse
import hashlib
import io
import json
import math
import mmap
import os
import re
import sys
import warnings
import zipfile
from urllib.parse import urlparse

import numpy as np
import torch
from scipy.ndimage import zoom
from torch import Tensor, nn

from ade20k import fetch
from model import ARCHS, resize_pos_embed
from upernet import build_model

# Names in a file -> ours. {} is a number. What no line matches is called the same in both.
MMSEG = {
    "backbone.ln1.": "backbone.norm.",
    "backbone.patch_embed.projection.": "backbone.patch_embed.proj.",
    "backbone.layers.{}.ln{}.": "backbone.blocks.{}.norm{}.",
    # q, k, v stacked in this order in both
    "backbone.layers.{}.attn.attn.in_proj_": "backbone.blocks.{}.attn.qkv.",
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
OURS = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.",
    "norm.",
    "blocks.{}.norm1.",
    "blocks.{}.norm2.",
    "blocks.{}.attn.q.",
    "blocks.{}.attn.k.",
    "blocks.{}.attn.v.",
    "blocks.{}.attn.proj.",
    "blocks.{}.mlp.fc1.",
    "blocks.{}.mlp.fc2.",
)
HUGGING_FACE = dict(
    zip(
        [
            "embeddings.cls_token",
            "embeddings.position_embeddings",
            "embeddings.patch_embeddings.projection.",
            "layernorm.",
        ]
        + [
            "encoder.layer.{}." + name
            for name in (
                "layernorm_before.",
                "layernorm_after.",
                "attention.attention.query.",
                "attention.attention.key.",
                "attention.attention.value.",
                "attention.output.dense.",
                "intermediate.dense.",
                "output.dense.",
            )
        ],
        OURS,
    )
)
TORCHVISION = dict(
    zip(
        ["class_token", "encoder.pos_embedding", "conv_proj.", "encoder.ln."]
        + [
            "encoder.layers.encoder_layer_{}." + name
            for name in (
                "ln_1.",
                "ln_2.",
                "self_attention.in_proj_",
                "self_attention.out_proj.",
                "mlp.0.",
                "mlp.3.",
            )
        ],
        OURS[:6] + ("blocks.{}.attn.qkv.",) + OURS[9:],
    )
)
JAX = dict(
    zip(
        [
            "cls",
            "Transformer/posembed_input/pos_embedding",
            "embedding/",
            "Transformer/encoder_norm/",
        ]
        + [
            "Transformer/encoderblock_{}/" + name
            for name in (
                "LayerNorm_0/",
                "LayerNorm_2/",
                "MultiHeadDotProductAttention_1/query/",
                "MultiHeadDotProductAttention_1/key/",
                "MultiHeadDotProductAttention_1/value/",
                "MultiHeadDotProductAttention_1/out/",
                "MlpBlock_3/Dense_0/",
                "MlpBlock_3/Dense_1/",
            )
        ],
        OURS,
    )
)
# (kind, its patch embedding, its names). A longer patch embedding comes before the one it ends
# with.
KINDS = [
    ("ours", "backbone.patch_embed.proj.weight", {}),
    (
        "mmsegmentation",
        "backbone.patch_embed.projection.weight",
        MMSEG,
    ),  # 0.x and 1.x, whole models
    (
        "mmsegmentation backbone",
        "patch_embed.projection.weight",  # what its vit2mmseg.py writes
        {
            k.removeprefix("backbone."): v.removeprefix("backbone.")
            for k, v in MMSEG.items()
            if k.startswith("backbone.")
        },
    ),
    ("Hugging Face", "embeddings.patch_embeddings.projection.weight", HUGGING_FACE),  # ViT and DeiT
    ("timm", "patch_embed.proj.weight", {}),  # DeiT and MAE too
    ("torchvision", "conv_proj.weight", TORCHVISION),
    ("JAX", "embedding/kernel", JAX),
]  # Google's own
# Tensors that are left out on purpose, by the start of their (unwrapped) name.
LEFT_OUT = {
    r"(head|heads|fc|classifier|cls_classifier|pre_logits|pooler)[./]": "a classifier of whole images",
    r"dist_token|head_dist\.|embeddings\.distillation_token|distillation_classifier\.": "distillation, no part of the model",
    r"embeddings\.mask_token|mask_token|decoder_|decoder\.": "the decoder of MAE's pretraining",
    r"fc_norm\.": "the norm of pooled features",
    r"ema_": "a second set of weights, those before averaging",
}  # mmcv's EMAHook swaps before it saves
# The pretrained backbone of each architecture; the end of the name is the start of the file's
# sha256.
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_"
PRETRAINED = {
    "vit_b16": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"
    "jx_vit_base_p16_224-80ecf9dd.pth",
    "deit_b16": DEIT + "base_patch16_224-b5f2ef4d.pth",
    "deit_s16": DEIT + "small_patch16_224-cd65a155.pth",
    "deit_t16": DEIT + "tiny_patch16_224-a1311bcf.pth",
}
# Python objects that checkpoints carry beside their weights (loss curves, arguments): each becomes
# an empty Skipped.
SKIPPED = ("mmengine.", "mmcv.", "mmseg.", "numpy.", "argparse.Namespace", "builtins.getattr")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST = (
    1 << 30
)  # bytes that compressed entries of an archive may unpack to: three times the largest backbone


class WeightsError(Exception):
    """A weight file that cannot be used, in one sentence: the file, what is wrong, the way out."""


class Skipped:
    """Stands in for an object of a foreign class: takes any arguments and state, does nothing with
    them."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def rename(name: str, rules: dict[str, str]) -> str:
    """The name after the first rule whose left side it starts with, or as it was."""
    for old, new in rules.items():
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return new.format(*match.groups()) + name[match.end() :]
    return name


def to_mmseg(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of mmsegmentation 0.x. The tensors are the same objects."""
    rules = {ours: theirs for theirs, ours in MMSEG.items()}
    return {rename(name, rules): value for name, value in state_dict.items()}


def to_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone alone, in timm's names; neck and heads have no place there."""
    return {
        k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")
    }


# ---- Containers: a file -> a dictionary ----------------------------------------------------------


def read_safetensors(path: str) -> dict[str, Tensor]:
    """u64 n | n bytes of JSON {name: {dtype, shape, data_offsets: [a, b]}} | the data. Tensors are
    views of the mapped file, read when they are used. ValueError where the header and the file do
    not agree."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 < start <= min(len(data), 100 << 20):
        raise ValueError(f"a header of {start - 8} bytes in a file of {len(data)}")
    header, tensors, taken = json.loads(data[8:start]), {}, start
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
        size = math.prod(shape) * dtype.itemsize
        if (
            start + begin != taken
            or end - begin != size
            or start + end > len(data)
            or min(shape, default=0) < 0
        ):
            raise ValueError(
                f"{name} of {size} bytes is said to lie at {begin} to {end} of {len(data) - start}, "
                f"the one before it ends at {taken - start}"
            )
        tensors[name] = (
            torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=taken).reshape(shape)
            if size
            else torch.empty(shape, dtype=dtype)
        )
        taken = start + end
    if taken != len(data):
        raise ValueError(f"{len(data) - taken} bytes after the last tensor")
    return tensors


def read_npz(path: str) -> dict[str, Tensor]:
    """The arrays of a numpy archive. numpy.load would reserve the memory that an array's header
    asks for before it has seen the data, so the header is compared with the entry's own size here.
    ValueError where they do not agree."""
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            data = io.BytesIO(archive.read(entry))
            version = np.lib.format.read_magic(data)
            head = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = head(data)
            if (
                dtype.kind not in "fiu"
                or math.prod(shape) * dtype.itemsize != len(data.getbuffer()) - data.tell()
            ):
                raise ValueError(f"{entry.filename} says it is {dtype} {shape}, its size says no")
            array = np.frombuffer(data.getbuffer(), dtype, offset=data.tell()).reshape(
                shape, order="FC"[not fortran]
            )
            tensors[entry.filename.removesuffix(".npy")] = torch.from_numpy(array)
    return tensors


def read_torch(path: str, is_zip: bool) -> dict:
    """torch.save's file, mapped where it is a zip (all since 2020), so that only the tensors that
    are used take memory."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    refused = [name for name in names if not name.startswith(SKIPPED)]
    if refused:
        raise ValueError(
            f"holds {refused[0]}, which would have to be executed to be read; only tensors and plain "
            "containers are"
        )
    with (
        warnings.catch_warnings(action="ignore"),
        torch.serialization.safe_globals([(Skipped, name) for name in names]),
    ):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def read_checkpoint(path: str) -> dict:
    """The dictionary in a file, or behind a URL, which is fetched to torch's cache first.
    WeightsError if unreadable."""
    url = path if path.startswith(("http://", "https://")) else None
    if url:
        name = os.path.basename(urlparse(url).path)
        digest = re.search(r"-([0-9a-f]{8,64})\.", name)
        if (
            not digest
            # model.safetensors and the like: many files share the name, so the address tells them
            # apart
        ):
            name = hashlib.sha256(url.encode()).hexdigest()[:8] + "_" + name
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
        try:
            if not os.path.exists(path):
                fetch(url, path, digest.group(1) if digest else "")
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{error}; download it by other means and give the file's path, or "
                "train from scratch with --pretrained none"
            ) from error
    try:
        with open(path, "rb") as file:
            first = file.read(16)
        is_zip = first.startswith(b"PK")
        entries = zipfile.ZipFile(path).infolist() if is_zip else []
        if sum(e.file_size for e in entries if e.compress_type != zipfile.ZIP_STORED) > LARGEST:
            raise ValueError(f"would unpack to {sum(e.file_size for e in entries) / 1e9:.1f} GB")
        content = (
            read_npz(path)
            if entries and all(e.filename.endswith(".npy") for e in entries)
            else read_safetensors(path) if first[8:9] == b"{" else read_torch(path, is_zip)
        )
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except Exception as error:  # damaged files raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "eights only load failed" in reason:  # torch goes on to advise to execute it
            reason = "no pickle of tensors and plain containers alone; nothing else is read"
        if url:
            os.remove(path)  # or the next try would find it in the cache
        raise WeightsError(
            f"{url or path}: not a checkpoint, or a damaged one ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


# ---- Kinds: a dictionary -> our names and shapes -------------------------------------------------


def translate(path: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """-> (kind, tensors in our names, what was left out and why). Empties `tensors`: a large file
    is not held twice."""
    for kind, mark, rules in KINDS:
        wrappers = [
            k.removesuffix(mark)
            for k in tensors
            if k.endswith(mark) and k.removesuffix(mark)[-1:] in ("", ".")
        ]
        if wrappers:
            break
    else:
        raise WeightsError(
            f"{path}: no known kind of checkpoint, its {len(tensors)} tensors start with "
            f"{', '.join(list(tensors)[:3]) or 'nothing'}"
        )
    if len(wrappers) > 1:
        raise WeightsError(
            f"{path}: holds {len(wrappers)} models, called {', '.join(w or 'nothing' for w in wrappers)}: "
            "save the one you mean to a file of its own"
        )
    ours, left_out = {}, []
    for name in sorted(tensors):  # (sorted: key before query before value)
        value, name = tensors.pop(name), name.removeprefix(wrappers[0])
        reason = next((r for pattern, r in LEFT_OUT.items() if re.match(pattern, name)), None)
        if reason:
            left_out.append(f"{name} ({reason})")
            continue
        if (
            kind
            == "JAX"
            # kernels are (in, out), those of attention (in, heads, d) and back, of patches (h, w,
            # in, out)
        ):
            if name.endswith("/kernel"):
                value = (
                    value.permute(3, 2, 0, 1)
                    if value.ndim == 4
                    else (value.flatten(0, -2) if "/out/" in name else value.flatten(1)).T
                )
            elif name.endswith("/bias"):
                value = value.flatten()
            name = re.sub("/(kernel|scale)$", "/weight", name)
        name = rename(name, rules).replace("/", ".")
        if name in ours:
            raise WeightsError(f"{path}: two of its tensors are {name}")
        ours[name] = value
        part = re.fullmatch(r"(.*\.attn\.)[qkv]\.(weight|bias)", name)
        qkv = [f"{part[1]}{x}.{part[2]}" for x in "qkv"] if part else [""]
        if all(
            x in ours for x in qkv
        ):  # three matrices side by side in one: a single larger product
            ours[f"{part[1]}qkv.{part[2]}"] = torch.cat([ours.pop(x) for x in qkv])
    whole = kind in ("ours", "mmsegmentation")
    return kind, ours if whole else {"backbone." + k: v for k, v in ours.items()}, left_out


def load_weights(path_or_url: str, bicubic: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Read any known format. -> (state_dict in our names, facts).

    facts: kind, arch (the first one in ARCHS of these shapes, so vit_b16 for a bare deit_b16: they
    differ in drop path alone), neck and num_classes (None for a backbone), resolution, tensors (how
    many are used), left_out and added (list of str, each with its reason), and of our own
    checkpoints args and classes (the fields of ade20k.Classes). pos_embed is resized to the
    architecture's grid: with torch's bicubic, as mmsegmentation and timm do; that of a JAX file
    with scipy's bilinear zoom, as Google does, unless bicubic is set. A tensor may be a view of the
    file: copy it before the file is overwritten. WeightsError otherwise."""
    path, content = path_or_url, read_checkpoint(path_or_url)
    key = next((k for k in ("state_dict", "model") if isinstance(content.get(k), dict)), None)
    tensors = content[key] if key else content
    beside = [k for k in (content if key else {}) if k not in (key, "meta", "args", "classes")]
    tensors = {k: v for k, v in tensors.items() if isinstance(v, Tensor) and isinstance(k, str)}
    try:
        kind, tensors, left_out = translate(path, tensors)
    except (RuntimeError, IndexError) as error:  # a matrix that is none
        raise WeightsError(f"{path}: damaged, {str(error).splitlines()[0]}") from error
    facts = {"kind": kind, **identify(path, tensors), "left_out": left_out, "added": []}
    if beside:
        facts["left_out"].append(f"{', '.join(map(str, beside))} (beside the weights)")
    if (
        kind == "ours"
        and isinstance(content.get("args"), dict)
        and content["args"].get("arch") in ARCHS
    ):
        facts |= {"args": content["args"], "arch": content["args"]["arch"]}
        facts |= {"classes": content["classes"]} if "classes" in content else {}
    elif "deit" in str(content.get("meta", "")) and facts["arch"] == "vit_b16":
        facts["arch"] = "deit_b16"  # mmsegmentation stores the config of the run as text
    bias = "backbone.patch_embed.proj.bias"
    if kind.startswith("mmsegmentation") and bias not in tensors:
        tensors[bias] = torch.zeros(ARCHS[facts["arch"]]["width"])
        facts["added"].append("a patch bias of zeros, as mmsegmentation 1.2 has none")
    with torch.device("meta"):  # shapes without memory
        neck = facts["neck"] or ("ln" if "backbone.norm.weight" in tensors else "none")
        model = build_model(facts["arch"], neck, facts["num_classes"] or 150)
    pos_embed, grid = tensors["backbone.pos_embed"], model.backbone.grid
    if "distillation" in str(left_out) and pos_embed.ndim == 3 and pos_embed.shape[1] > 2:
        pos_embed = torch.cat(
            [pos_embed[:, :1], pos_embed[:, 2:]], dim=1
        )  # the second token was the distillation's
    old = (
        math.isqrt(max(0, pos_embed[0].shape[0] - 1))
        if pos_embed.ndim == 3 and len(pos_embed)
        else 0
    )
    if pos_embed.shape == (1, 1 + old * old, ARCHS[facts["arch"]]["width"]) and old:
        facts["resolution"] = (
            f"{old * ARCHS[facts['arch']]['patch']}x{old * ARCHS[facts['arch']]['patch']}"
        )
        if (old, old) != grid and kind == "JAX" and not bicubic:
            image = zoom(
                pos_embed[0, 1:].reshape(old, old, -1).numpy(),
                (grid[0] / old, grid[1] / old, 1),
                order=1,
            )
            pos_embed = torch.cat(
                [pos_embed[:, :1], torch.from_numpy(image).flatten(0, 1)[None]], dim=1
            )
        elif (old, old) != grid:
            pos_embed = resize_pos_embed(pos_embed.float(), (old, old), grid)
    tensors["backbone.pos_embed"] = pos_embed
    heads = {k.split(".")[0] for k in tensors} | {"backbone"}
    expected = {k: v for k, v in model.state_dict().items() if k.split(".")[0] in heads}
    if facts["neck"] is not None and "auxiliary_head" not in heads:
        facts["left_out"].append(
            "auxiliary_head (not in the file: evaluation needs none, training starts it anew)"
        )
    compare(path, tensors, expected, facts)
    facts["tensors"] = len(tensors)
    return tensors, facts


def identify(path: str, tensors: dict[str, Tensor]) -> dict:
    """arch, neck and num_classes from names and shapes. WeightsError if no architecture fits."""
    try:
        width, _, patch, _ = tensors["backbone.patch_embed.proj.weight"].shape
        tensors["backbone.pos_embed"]
        depth = len({k.split(".")[2] for k in tensors if k.startswith("backbone.blocks.")})
        num_classes = len(tensors.get("decode_head.classifier.weight", []))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise WeightsError(
            f"{path}: has no usable patch_embed, pos_embed and blocks, it is damaged or no ViT"
        ) from error
    arch = next(
        (
            n
            for n, a in ARCHS.items()
            if (a["width"], a["depth"], a["patch"]) == (width, depth, patch)
        ),
        None,
    )
    if arch is None:
        raise WeightsError(
            f"{path}: {depth} layers, {width} wide, patches of {patch}: none of {', '.join(ARCHS)}"
        )
    if not any(k.startswith("decode_head.") for k in tensors):
        return {"arch": arch, "neck": None, "num_classes": None}
    parts = ["ln"] * ("backbone.norm.weight" in tensors) + ["mln"] * any(
        k.startswith("neck.") for k in tensors
    )
    return {"arch": arch, "neck": "_".join(parts) or "none", "num_classes": num_classes}


def compare(
    path: str, tensors: dict[str, Tensor], expected: dict[str, Tensor], facts: dict
) -> None:
    """WeightsError that lists the tensors that are missing, left over or of another shape, and the
    likely cause."""
    faults = {k: f"missing {k} {tuple(v.shape)}" for k, v in expected.items() if k not in tensors}
    faults |= {
        k: f"left over {k} {tuple(v.shape)}" for k, v in tensors.items() if k not in expected
    }
    faults |= {
        k: f"{k} is {tuple(v.shape)} in the file, {tuple(expected[k].shape)} in the model"
        for k, v in tensors.items()
        if k in expected and v.shape != expected[k].shape
    }
    if faults:
        reshaped = {k.split(".")[-2] for k, text in faults.items() if " in the file" in text}
        cause = (
            "another class count"
            if reshaped == {"classifier"} == {k.split(".")[-2] for k in faults}
            else (
                "another architecture"
                if reshaped & {"proj", "qkv", "backbone"}
                else (
                    "another neck"
                    if any(k.startswith(("neck.", "backbone.norm.")) for k in faults)
                    else "a file that is not whole, or has more"
                )
            )
        )
        texts = list(faults.values())
        raise WeightsError(
            f"{path}: a {facts['kind']} file for {facts['arch']}, neck {facts['neck']}, "
            f"{facts['num_classes']} classes does not fit ({cause}?): "
            + "; ".join(texts[:20])
            + (f"; and {len(texts) - 20} more" if len(texts) > 20 else "")
        )


def load_into(
    model: nn.Module, state_dict: dict[str, Tensor], facts: dict, new_classes: bool = False
) -> None:
    """Copy what load_weights gave into a model; every tensor of the file is used, every one of the
    model set, or WeightsError, with these exceptions, each added to facts["left_out"]: a backbone
    leaves neck and heads as they are, and its final norm is left out where the model's neck has
    none; a file without auxiliary head leaves the model's as it is; with new_classes, a whole model
    for another number of classes leaves both classifiers as they are."""
    own = model.state_dict()
    tops = {k.split(".")[0] for k in state_dict} | (
        {"neck", "decode_head"} if facts["neck"] is not None else set()
    )
    own = {k: v for k, v in own.items() if k.split(".")[0] in tops}
    reasons = {}
    if facts["neck"] is None:
        reasons = {
            k: "the model has no final norm"
            for k in state_dict
            if k.startswith("backbone.norm.") and k not in own
        }
    elif new_classes and facts["num_classes"] != len(own["decode_head.classifier.weight"]):
        reasons = {
            k: f"{facts['num_classes']} classes in the file, {len(own['decode_head.classifier.weight'])} here: "
            "starts anew"
            for k in state_dict
            if ".classifier." in k
        }
    facts["left_out"] = facts["left_out"] + [f"{k} ({why})" for k, why in reasons.items()]
    state_dict = {k: v for k, v in state_dict.items() if k not in reasons}
    compare("the weights", state_dict, {k: v for k, v in own.items() if k not in reasons}, facts)
    model.load_state_dict(state_dict, strict=False)  # compare() was the strict part


def describe(facts: dict) -> str:
    """facts in one line."""
    shown = ("kind", "arch", "neck", "num_classes", "resolution", "tensors")
    text = ", ".join(f"{k} {facts[k]}" for k in shown if facts.get(k) is not None)
    return text + "".join(
        f"; {k.replace('_', ' ')}: " + "; ".join(facts[k])
        for k in ("added", "left_out")
        if facts[k]
    )


def write_checkpoint(content: dict, path: str) -> None:
    """torch.save to path.part, then move it into place: a reader never sees half a file. OSError or
    (torch) RuntimeError."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(path + ".part", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(
                file.fileno()
            )  # on the disk before it has its name, should the power fail in between
        os.replace(path + ".part", path)
    except BaseException:
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")  # a full disk needs the room
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of any known kind.",
        epilog="example: python convert_weights.py upernet_deit-s16.pth deit_s.pt",
    )
    parser.add_argument("src", metavar="SRC", help="file or URL")
    parser.add_argument("dst", metavar="DST", help="the file to write")
    parser.add_argument(
        "--to",
        choices=("ours", "mmseg", "timm"),
        default="ours",
        help="mmseg: {'state_dict': ...} in its names; timm: the backbone alone (default: ours)",
    )
    parser.add_argument(
        "--bicubic",
        action="store_true",
        help="resize the pos_embed of a JAX file with torch's bicubic instead of scipy's bilinear zoom",
    )
    args = parser.parse_args()
    try:
        state_dict, facts = load_weights(args.src, args.bicubic)
        print(describe(facts))
        state_dict = {
            k: v.contiguous() for k, v in state_dict.items()
        }  # JAX's kernels are transposed views
        if args.to == "mmseg":
            content = to_mmseg(state_dict)
            content = (
                {"state_dict": content}
                if facts["neck"]
                else {k.removeprefix("backbone."): v for k, v in content.items()}
            )
        else:
            content = {"model": state_dict} if args.to == "ours" else to_timm(state_dict)
        write_checkpoint(content, args.dst)
        print(
            f"{args.dst}: written, {args.to}"
            + "; mmsegmentation 1.2 and later need patch_bias=True in the backbone's "
            "config, or they drop the bias of the patch embedding without a word"
            * (args.to == "mmseg")
        )
    except (WeightsError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
