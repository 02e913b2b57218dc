"""Files of every kind that convert_weights.py reads: exact against the code they come from, safe
against damage."""

import argparse
import collections
import datetime
import hashlib
import io
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import types
import zipfile

import formulas
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal, by_formula, load, tensors, write, write_mmseg
from scipy.special import erf

import ade20k
import convert_weights
import evaluate
from convert_weights import (
    WeightsError,
    describe,
    load_into,
    load_weights,
    split_choice,
    to_mmseg,
)
from upernet import build_model


def write_safetensors(weights, path, **changes):
    """The format by its specification; `changes` replaces entries of the header, or adds some."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in weights.items():
        start = len(data)
        data += np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [start, len(data)],
        }
    for name, change in changes.items():
        header[name] = header.get(name, {}) | change
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        file.write(data)
    return str(path)


def write_torch(weights, path, **more):
    return write({"model": tensors(weights), **more}, path)


def read_torch(weights, path):
    """Write as write_torch does, and load."""
    return load_weights(write_torch(weights, path))


def prefixed(prefix, weights):
    """The same tensors, with the prefix before their names."""
    return {prefix + name: value for name, value in weights.items()}


def renamed(old, new, weights):
    """The same tensors, with another text in their names."""
    return {name.replace(old, new): value for name, value in weights.items()}


def assert_same(got, want):
    """The same names, and the same bits."""
    assert got.keys() == want.keys()
    assert_equal(got, want)


def timm_weights(arch="toy_p8", neck="ln"):
    net = build_model(arch, neck)
    weights = {}
    for name, value in net.backbone.state_dict().items():
        weights[name] = formulas.weight(name, value.shape)
    return weights


def features(state_dict, facts, x, arch):
    """The last map, (D, h, w), of one picture."""
    net = build_model(arch, "ln").eval()
    load_into(net, state_dict, facts)
    with torch.inference_mode():
        maps = net.backbone(torch.from_numpy(x))
    return maps[-1][0]


def assert_features(state_dict, facts, arch, size, gold):
    """Those in a golden, which holds tokens, (1, h w, D)."""
    x = formulas.image(size, size)
    got = features(state_dict, facts, x, arch)
    tokens = got.flatten(1).T[None]
    tolerance = 1e-5 * gold["largest"]
    np.testing.assert_allclose(formulas.samples(tokens), gold["features"], atol=tolerance)


@pytest.mark.parametrize("write,suffix", [(write_torch, "pth"), (write_safetensors, "safetensors")])
@pytest.mark.parametrize(
    "kind,name",
    [("timm", "timm"), ("Hugging Face", "transformers"), ("torchvision", "torchvision")],
)
def test_features_are_those_of_the_code_the_file_comes_from(
    kind, name, write, suffix, golden, tmp_path
):
    gold = golden(name)
    path = write(by_formula(gold), tmp_path / "x.bin")  # the name's ending says nothing
    state_dict, facts = load_weights(path)

    assert facts["kind"] == kind
    assert facts["arch"] == "deit_t16"
    assert facts["resolution"] == "512x512"
    net = build_model("deit_t16", "ln")
    assert facts["tensors"] == len(net.backbone.state_dict())
    if suffix == "pth":
        assert_features(state_dict, facts, "deit_t16", 512, gold)


def test_mmsegmentation_1_has_no_patch_bias_and_loads_with_one_of_zeros(golden, tmp_path):
    gold = golden("mmseg122")
    weights = tensors(by_formula(gold))
    meta = {"cfg": str(gold["config"]), "dataset_meta": {"classes": ade20k.CLASSES}}
    state_dict, facts = load({"state_dict": weights, "meta": meta}, tmp_path / "x.pth")

    assert "bias of zeros" in facts["added"][0]
    assert "assumed" not in facts and facts["zero_ignored"] == "True"
    for name in ("eps=1e-6,", "eps=0.000001,", "eps=1e-06,\n"):
        same = meta | {"cfg": meta["cfg"].replace("eps=1e-06,", name)}
        load({"state_dict": weights, "meta": same}, tmp_path / "x.pth")
    for old, new in (("eps=1e-06, ", ""), ("num_heads=6", "num_heads=12"), ("'GELU'", "'ReLU'")):
        changed = meta | {"cfg": meta["cfg"].replace(old, new)}
        assert changed != meta
        with pytest.raises(WeightsError, match="x.pth: its config says"):
            load({"state_dict": weights, "meta": changed}, tmp_path / "x.pth")
    assert facts["neck"] == "mln"
    assert facts["arch"] == "deit_s16"

    net = build_model("deit_s16", "mln").eval()
    load_into(net, state_dict, facts)
    x = formulas.image(97, 131)
    with torch.inference_mode():
        maps = net.features(torch.from_numpy(x))
        logits = net.decode_head(maps)

    tolerance = 1e-5 * gold["largest"]
    np.testing.assert_allclose(formulas.samples(logits), gold["features"], atol=tolerance)


# ---- Google's JAX files, against a plain forward pass in their own layout ----


ATTENTION = "MultiHeadDotProductAttention_1/"


def jax_weights(width=128, depth=4, heads=2, patch=8, grid=16, seed=0):
    r = np.random.RandomState(seed)
    d = width // heads
    w = {
        "cls": r.normal(0, 1, (1, 1, width)),
        "embedding/kernel": r.normal(0, 0.1, (patch, patch, 3, width)),
        "embedding/bias": r.normal(0, 0.1, width),
        "head/kernel": r.normal(0, 1, (width, 10)),
        "head/bias": np.zeros(10),
        "pre_logits/kernel": r.normal(0, 1, (width, width)),
        "pre_logits/bias": np.zeros(width),
        "Transformer/posembed_input/pos_embedding": r.normal(0, 1, (1, 1 + grid * grid, width)),
    }

    def norm(name):
        w[f"Transformer/{name}/scale"] = r.uniform(0.5, 1.5, width)
        w[f"Transformer/{name}/bias"] = r.normal(0, 0.1, width)

    def linear(name, scale, kernel, bias):
        w[f"Transformer/{name}/kernel"] = r.normal(0, scale, kernel)
        w[f"Transformer/{name}/bias"] = r.normal(0, 0.1, bias)

    norm("encoder_norm")
    for i in range(depth):
        block = f"encoderblock_{i}/"
        norm(block + "LayerNorm_0")
        norm(block + "LayerNorm_2")
        for part in ("query", "key", "value"):
            linear(block + ATTENTION + part, 0.1, (width, heads, d), (heads, d))
        linear(block + ATTENTION + "out", 0.1, (heads, d, width), width)
        linear(block + "MlpBlock_3/Dense_0", 0.05, (width, 4 * width), 4 * width)
        linear(block + "MlpBlock_3/Dense_1", 0.05, (4 * width, width), width)
    return {k: v.astype(np.float32) for k, v in w.items()}


def jax_forward(w, x):
    """x (H, W, 3) -> (tokens, width): flax's own formulas in numpy, one product at a time."""

    def norm(t, name):
        mean = t.mean(-1, keepdims=True)
        variance = t.var(-1, keepdims=True)
        t = (t - mean) / np.sqrt(variance + 1e-6)
        return t * w[f"Transformer/{name}/scale"] + w[f"Transformer/{name}/bias"]

    def linear(t, name, product):
        kernel = w[f"Transformer/{name}/kernel"]
        bias = w[f"Transformer/{name}/bias"]
        return np.einsum(product, t, kernel) + bias

    kernel = w["embedding/kernel"]
    tokens = [w["cls"][0, 0]]
    p = kernel.shape[0]
    for i in range(0, x.shape[0], p):
        for j in range(0, x.shape[1], p):
            patch = x[i : i + p, j : j + p]
            embedded = np.einsum("hwc,hwcd->d", patch, kernel)
            tokens.append(embedded + w["embedding/bias"])
    t = np.stack(tokens) + w["Transformer/posembed_input/pos_embedding"][0]

    for i in range(4):
        block = f"encoderblock_{i}/"
        y = norm(t, block + "LayerNorm_0")
        attention = block + ATTENTION
        q = linear(y, attention + "query", "nd,dhe->nhe")
        k = linear(y, attention + "key", "nd,dhe->nhe")
        v = linear(y, attention + "value", "nd,dhe->nhe")

        scores = np.einsum("qhe,khe->hqk", q, k)
        scores = scores / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khe->qhe", scores, v)
        t = t + linear(mixed, attention + "out", "qhe,hed->qd")

        y = norm(t, block + "LayerNorm_2")
        y = linear(y, block + "MlpBlock_3/Dense_0", "nd,de->ne")
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        t = t + linear(y, block + "MlpBlock_3/Dense_1", "nd,de->ne")
    return norm(t, "encoder_norm")


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_features_of_a_jax_file_are_those_of_a_plain_loop(pack, tmp_path):
    w = jax_weights()
    pack(tmp_path / "x.npz", **w)
    state_dict, facts = load_weights(str(tmp_path / "x.npz"))

    assert facts["kind"] == "JAX"
    assert len(facts["left_out"]) == 4
    assert "classifier" in facts["left_out"][0]
    if pack is np.savez:
        x = formulas.image(128, 128)
        last = features(state_dict, facts, x, "toy_p8")
        got = last.flatten(1).T
        tokens = jax_forward(w, x[0].transpose(1, 2, 0))
        np.testing.assert_allclose(got, tokens[1:], atol=2e-4)


def test_pos_embed_of_a_jax_file_is_resized_with_torchs_bicubic(tmp_path):
    w = jax_weights(grid=14)
    np.savez(tmp_path / "x.npz", **w)
    state_dict, _ = load_weights(str(tmp_path / "x.npz"))
    got = state_dict["backbone.pos_embed"][0]

    rows = w["Transformer/posembed_input/pos_embedding"][0]
    table = rows[1:].reshape(14, 14, 128)
    channels = torch.from_numpy(table).permute(2, 0, 1)
    maps = channels[None]  # (1, 128, 14, 14)
    cubic = torch.nn.functional.interpolate(maps, size=16, mode="bicubic")
    want = cubic[0].flatten(1).T
    np.testing.assert_allclose(got[1:], want, atol=1e-6)
    assert np.array_equal(got[0], rows[0]), "the class token has no place"


# ---- What is left out on purpose, and said ----


def test_distilled_mae_and_classifier_tensors_are_left_out_and_said(tmp_path):
    base = timm_weights()
    more = {
        "head.weight": np.zeros((10, 128)),
        "dist_token": np.ones((1, 1, 128)),
        "head_dist.bias": np.zeros(10),
    }
    pos = np.insert(base["pos_embed"], 1, 7, axis=1)
    theirs = base | more | {"pos_embed": pos}
    path = write_torch(theirs, tmp_path / "d.pth", optimizer={"lr": 1}, epoch=3)
    state_dict, facts = load_weights(path)

    assert len(state_dict) == len(base)
    for name, value in base.items():
        assert np.array_equal(state_dict["backbone." + name], value)

    said = " ".join(facts["left_out"])
    others = "other entries (epoch, optimizer.lr)"
    for left in ("dist_token", "head_dist.bias", "head.weight", others):
        assert left in said

    decoder = {
        "mask_token": np.zeros((1, 1, 64)),
        "decoder_embed.weight": np.zeros((64, 128)),
        "decoder_blocks.0.attn.qkv.weight": np.zeros((192, 64)),
        "decoder_pos_embed": np.zeros((1, 257, 64)),
    }
    state_dict, facts = read_torch(base | decoder, tmp_path / "m.pth")

    assert set(state_dict) == {"backbone." + k for k in base}
    assert len(facts["left_out"]) == 4


def test_hugging_faces_deit_has_a_wrapper_and_a_token_more(golden, tmp_path):
    plain = by_formula(golden("transformers"))
    theirs = renamed("vit.", "deit.", plain)
    pos = theirs["deit.embeddings.position_embeddings"]
    theirs["deit.embeddings.position_embeddings"] = np.insert(pos, 1, 5, axis=1)
    theirs["deit.embeddings.distillation_token"] = pos[:, :1]
    a, _ = load_weights(write_safetensors(plain, tmp_path / "a"))
    b, facts = load_weights(write_safetensors(theirs, tmp_path / "b"))

    assert_same(a, b)
    assert any("dist_token and its position" in x for x in facts["left_out"])


def test_objects_of_mmengine_and_ema_copies_are_skipped_never_built(tmp_path, monkeypatch):
    """What mmengine 0.10 pickles beside the weights: HistoryBuffer, numpy arrays,
    argparse.Namespace."""
    built = []
    module = types.ModuleType("mmengine.logging.history_buffer")
    methods = {
        "__module__": module.__name__,
        "__setstate__": lambda self, state: built.append(state),
    }
    module.HistoryBuffer = type("HistoryBuffer", (), methods)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = module.HistoryBuffer()
    history.__dict__.update(_log_history=np.ones(3), scalar=np.float64(2))

    net = build_model("toy_p8", "mln", 9)
    weights = prefixed("module.", to_mmseg(net.state_dict()))
    weights["module.ema_backbone_layers_0_ln1_weight"] = torch.ones(128)
    content = {
        "meta": {"epoch": 1},
        "state_dict": weights,
        "message_hub": {"loss": history},
        "ema_state_dict": {"steps": torch.tensor(3)},
        "args": argparse.Namespace(lr=1),
    }
    torch.save(content, tmp_path / "x.pth")
    monkeypatch.undo()

    with pytest.raises(Exception, match="HistoryBuffer"):  # what torch itself says to this file
        torch.load(tmp_path / "x.pth", weights_only=True)

    state_dict, facts = load_weights(str(tmp_path / "x.pth"))

    assert_equal(state_dict, net.state_dict())
    assert not built

    said = " ".join(facts["left_out"])
    assert "ema_backbone_layers_0_ln1_weight" in said
    assert "ema_state_dict.steps, message_hub.loss" in said


def test_a_file_of_two_models_is_refused(tmp_path):
    base = timm_weights()
    both = prefixed("student.", base) | prefixed("teacher.", base)
    refused = "several models, choose one as FILE:NAME, of model.student, model.teacher"
    with pytest.raises(WeightsError, match=refused):
        read_torch(both, tmp_path / "x.pth")


def test_a_model_without_auxiliary_head_evaluates_and_trains_with_a_new_one(tmp_path):
    net = build_model("toy_p8", "ln", 9)
    weights = to_mmseg(net.state_dict())
    for name in list(weights):
        if name.startswith("auxiliary_head."):
            del weights[name]
    state_dict, facts = load({"state_dict": weights}, tmp_path / "x.pth")
    other = build_model("toy_p8", "ln", 9)
    before = other.auxiliary_head.classifier.weight.clone()
    load_into(other, state_dict, facts)

    assert torch.equal(other.decode_head.classifier.weight, net.decode_head.classifier.weight)
    assert torch.equal(other.auxiliary_head.classifier.weight, before)
    assert any(x.startswith("auxiliary_head (not in the file") for x in facts["left_out"])


def test_another_number_of_classes_loads_all_but_the_classifiers(tmp_path):
    net = build_model("toy_p8", "ln", 9)
    other = build_model("toy_p8", "ln", 4)
    path = write_mmseg(net.state_dict(), tmp_path / "x.pth")
    state_dict, facts = load_weights(path)
    before = {name: value.clone() for name, value in other.state_dict().items()}

    with pytest.raises(WeightsError, match="classifier.weight"):
        load_into(other, state_dict, dict(facts))
    assert_same(other.state_dict(), before)  # no partial load

    load_into(other, state_dict, facts, new_classes=True)

    for name, value in other.state_dict().items():
        want = before if ".classifier." in name else state_dict
        assert torch.equal(value, want[name]), name
    classifiers = [x for x in facts["left_out"] if "classifier" in x]
    assert len(classifiers) == 4


@pytest.mark.parametrize(
    "arch,neck,there",
    [
        ("toy_p8", "mln", r"has backbone.norm.bias \(128,\).* the model has neck.convs.0.bias"),
        ("deit_t16", "ln", r"fc2.bias \(128,\).* the model has .*fc2.bias \(192,\)"),
    ],
)
def test_another_models_tensors_are_listed_with_their_shapes(arch, neck, there, tmp_path):
    net = build_model("toy_p8", "ln", 9)
    path = write_mmseg(net.state_dict(), tmp_path / "x.pth")
    state_dict, facts = load_weights(path)
    with pytest.raises(WeightsError, match=there):
        load_into(build_model(arch, neck, 9), state_dict, facts)


# ---- Damage and malice ----

LIMITED = """
import resource, sys
import convert_weights as c
start = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (start + (1 << 30),) * 2)     # a gigabyte more, and no more
"""


def python(code, *arguments, cwd):
    """Another interpreter runs `code` in the folder cwd, where it can import from."""
    paths = f"{ROOT}{os.pathsep}{cwd}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


REFUSALS = """
for name in sys.argv[1:]:
    try:
        c.load_weights(name)
        print(name, "LOADED")
    except c.WeightsError as error:
        print(name, "refused:", error)
"""


def test_bombs_and_lies_are_refused_in_bounded_memory(tmp_path):
    entry = "embedding/kernel.npy"
    packed = dict(compression=zipfile.ZIP_DEFLATED, compresslevel=1)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", **packed) as archive:
        with archive.open(entry, "w", force_zip64=True) as file:
            for _ in range(129):
                file.write(bytes(1 << 24))

    head = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(head, shape)
    with zipfile.ZipFile(tmp_path / "shape.npz", "w") as archive:
        archive.writestr(entry, head.getvalue() + bytes(64))

    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, np.array([{}], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "object.npz", "w") as archive:
        archive.writestr(entry, pickled.getvalue())

    weights = timm_weights()
    huge = {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}
    write_safetensors(weights, tmp_path / "beyond", **{"norm.bias": {"data_offsets": [0, 1 << 50]}})
    write_safetensors(weights, tmp_path / "dtype", **{"norm.bias": {"dtype": "F64"}})
    write_safetensors(weights, tmp_path / "huge", extra=huge)
    (tmp_path / "header").write_bytes(struct.pack("<Q", 1 << 60) + b'{"a": 1}')

    names = ["bomb.npz", "shape.npz", "object.npz", "beyond", "dtype", "huge", "header"]
    done = python(LIMITED + REFUSALS, *names, cwd=tmp_path)
    lines = done.stdout.splitlines()

    assert done.returncode == 0, done.stderr
    assert len(lines) == len(names), done.stderr
    for name, line in zip(names, lines):
        sentence = f"{name} refused: {name}: cannot be read as a checkpoint: "
        assert line.startswith(sentence), line


DAMAGES = """
import random
for name in sys.argv[1:]:
    good, r, loaded = open(name, "rb").read(), random.Random(name), 0
    whole = {k: v.shape for k, v in c.load_weights(name)[0].items()}
    for trial in range(60):
        bad, kind = bytearray(good), trial % 6
        # Headers and directories are where damage is interesting: half of it goes there.
        at = r.randrange(len(bad))
        if trial % 2 == 0:
            at = r.choice((r.randrange(4096), len(bad) - 1 - r.randrange(4096)))
        if kind == 0: del bad[at:]
        if kind == 1: bad[at] ^= 1 << r.randrange(8)
        if kind == 2: bad[at:at + 64] = r.randbytes(64)
        if kind == 3: bad[at:at] = r.randbytes(r.randrange(1, 64))
        if kind == 4:
            bad[at:at + 8] = r.choice((0, 1 << 31, 1 << 62, 2 ** 64 - 1)).to_bytes(8, "little")
        if kind == 5: del bad[at:at + r.randrange(1, 4096)]
        open("damaged", "wb").write(bad)
        try:
            loaded += {k: v.shape for k, v in c.load_weights("damaged")[0].items()} == whole
        except c.WeightsError as error:
            assert str(error).startswith("damaged: ") and "\\n" not in str(error), error
    print(name, loaded)
"""


def test_damaged_files_of_every_kind_fail_or_load_whole(tmp_path):
    """60 damages to each kind: cut, flipped, overwritten, inserted. No crash, no hang, nothing
    half-loaded, one sentence."""
    weights = timm_weights()
    torch.save(tensors(weights), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    write_torch(weights, tmp_path / "torch")
    write_safetensors(weights, tmp_path / "safetensors")
    np.savez(tmp_path / "jax.npz", **jax_weights())
    np.savez_compressed(tmp_path / "packed.npz", **jax_weights())

    names = ["legacy", "torch", "safetensors", "jax.npz", "packed.npz"]
    done = python(LIMITED + DAMAGES, *names, cwd=tmp_path)

    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == names


def test_bits_flipped_inside_a_tensor_do_not_pass_a_zips_checksum(tmp_path):
    weights = ours()
    torch.save(weights, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    inside = weights["backbone.blocks.2.mlp.fc1.weight"].numpy().tobytes()[1000:2000]
    assert content.count(inside) == 1
    turned = bytes([inside[0] ^ 1]) + inside[1:]
    (tmp_path / "x.pt").write_bytes(content.replace(inside, turned))

    assert torch.load(tmp_path / "x.pt")  # torch itself sees nothing
    message = "x.pt: cannot be read as a checkpoint: a damaged zip: Bad CRC-32"
    with pytest.raises(WeightsError, match=message):
        load_weights(str(tmp_path / "x.pt"))


def test_a_zip_without_checksums_is_read(tmp_path):
    weights = ours()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}

    state_dict, _ = load_weights(str(tmp_path / "x.pt"))
    assert_same(state_dict, weights)


def test_a_zip_that_was_packed_again_is_read(tmp_path):
    """(Mapped, its tensors would be compressed bytes, or an error.)"""
    weights = ours()
    torch.save(weights, tmp_path / "x.pt")
    packed = dict(compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        with zipfile.ZipFile(tmp_path / "y.pt", "w", **packed) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))

    state_dict, _ = load_weights(str(tmp_path / "y.pt"))
    assert_same(state_dict, weights)


def test_arguments_of_other_programs_stop_nothing(tmp_path):
    for args in ({"arch": "vit_base"}, {"arch": ["toy_p8"]}, "toy_p8", [1], 5):
        _, facts = load({"model": ours(), "args": args}, tmp_path / "x.pt")
        assert "args" not in facts
        assert facts["arch"] == "toy_p8"


CONVERSION = """
import resource, sys
import convert_weights as c
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
c.main()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_converting_vit_b_takes_little_more_memory_than_its_file(tmp_path):
    with torch.device("meta"):
        net = build_model("vit_b16", "mln")
    weights = {}
    for name, value in to_mmseg(net.state_dict()).items():
        weights[name] = torch.zeros(value.shape, dtype=value.dtype)
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    size = os.path.getsize(tmp_path / "a.pth")

    done = python(CONVERSION, "a.pth", "b.pt", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1.3 * size
    assert os.path.getsize(tmp_path / "b.pt") > 0.99 * size


# ---- URLs ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_a_url_is_fetched_once_checked_and_cached(server, hub, tmp_path):
    write_torch(timm_weights(), tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    name = f"toy-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = content
    server.files["/wrong-00000000.pth"] = content
    a, _ = load_weights(f"{server.url}/{name}")
    b, _ = load_weights(f"{server.url}/{name}")

    assert server.asked == [f"/{name}"], "the second call asks nobody"
    assert_same(a, b)

    with pytest.raises(WeightsError, match="give the file's path.* --pretrained none.* hash value"):
        load_weights(f"{server.url}/wrong-00000000.pth")
    with pytest.raises(WeightsError, match="give the file's path.* 404"):
        load_weights(f"{server.url}/absent.pth")
    with pytest.raises(WeightsError, match="cannot be fetched"):
        load_weights("http://[x.pth")
    assert os.listdir(hub) == [name], "nothing of what failed is left"


@pytest.mark.parametrize("container", [write_torch, write_safetensors])
def test_a_body_that_is_cut_short_is_never_kept(container, server, hub, tmp_path):
    container(timm_weights(), tmp_path / "x")
    server.files["/x.pth"] = (tmp_path / "x").read_bytes()
    server.faults[:] = [100_000]  # bytes, and the server breaks off

    with pytest.raises(WeightsError, match="x.pth: cannot be fetched"):
        load_weights(f"{server.url}/x.pth")
    assert os.listdir(hub) == []

    load_weights(f"{server.url}/x.pth")
    assert len(os.listdir(hub)) == 1


def test_a_server_that_stalls_is_given_up_and_the_timeout_is_what_it_was(
    server, hub, tmp_path, monkeypatch
):
    write_torch(timm_weights(), tmp_path / "x")
    server.files["/x.pth"] = (tmp_path / "x").read_bytes()
    server.faults[:] = [-100_000]
    given = []
    really = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: given.append(s) or really(s and 0.2))

    with pytest.raises(WeightsError, match="timed out"):
        load_weights(f"{server.url}/x.pth")
    assert given == [60, None]
    assert socket.getdefaulttimeout() is None
    assert os.listdir(hub) == []


def test_two_addresses_with_one_file_name_are_two_files(server, hub, tmp_path):
    urls = [f"{server.url}/{folder}/model.safetensors" for folder in ("a", "b")]
    for k, folder in enumerate(("a", "b")):
        weights = timm_weights()
        weights["norm.bias"] += k
        write_safetensors(weights, tmp_path / "x")
        server.files[f"/{folder}/model.safetensors"] = (tmp_path / "x").read_bytes()
    a, b = [load_weights(url)[0]["backbone.norm.bias"] for url in urls]

    assert torch.allclose(a + 1, b)
    assert len(os.listdir(hub)) == 2


def test_a_page_in_place_of_a_file_is_not_kept(server, hub):
    server.files["/x.pth"] = b"<!DOCTYPE html><html>sign in</html>"
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        load_weights(f"{server.url}/x.pth")
    assert os.listdir(hub) == []


# ---- Names that people's files have ----


def test_torchvisions_published_names_are_those_of_its_constructor(golden, tmp_path):
    """vit_b_16's file of 2021 says linear_1 and linear_2; torchvision renames them on loading."""
    now = by_formula(golden("torchvision"))
    then = renamed("mlp.0.", "mlp.linear_1.", now)
    then = renamed("mlp.3.", "mlp.linear_2.", then)
    linear = [name for name in then if "linear_" in name]
    assert len(linear) == 48

    a, _ = read_torch(now, tmp_path / "a")
    b, facts = read_torch(then, tmp_path / "b")

    assert facts["kind"] == "torchvision"
    assert_same(a, b)


def test_mmpretrains_names_are_read(golden, tmp_path):
    timm = by_formula(golden("timm"))
    pairs = [
        ("patch_embed.proj.", "patch_embed.projection."),
        (".norm1.", ".ln1."),
        (".norm2.", ".ln2."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        ("blocks.", "layers."),
    ]
    theirs = {}
    for name, value in timm.items():
        for old, new in pairs:
            name = name.replace(old, new)
        name = {"norm.weight": "ln1.weight", "norm.bias": "ln1.bias"}.get(name, name)
        name = name.replace("head.", "head.layers.head.")
        if not name.startswith("head."):
            name = "backbone." + name
        theirs[name] = value

    assert "backbone.layers.11.attn.qkv.weight" in theirs
    assert "head.layers.head.bias" in theirs

    want, _ = read_torch(timm, tmp_path / "a")
    got, facts = read_torch(theirs, tmp_path / "b")

    assert facts["neck"] is None
    assert_same(got, want)
    assert facts["left_out"] == ["the file's other entries (model.head)"]


def test_decoders_are_called_what_they_are(tmp_path):
    base = timm_weights()
    segmenter = prefixed("encoder.", base)
    segmenter |= {"decoder.blocks.0.norm1.weight": np.ones(8), "decoder.cls_emb": np.ones(8)}
    state_dict, facts = read_torch(segmenter, tmp_path / "a")

    assert len(state_dict) == len(base)
    said = " ".join(facts["left_out"])
    assert "other entries (model.decoder)" in said
    assert "MAE" not in said

    mae = base | {"decoder.decoder_embed.weight": np.ones((8, 8)), "decoder.x": np.ones(8)}
    _, facts = read_torch(mae, tmp_path / "b")

    assert facts["left_out"] == [
        "decoder.decoder_embed.weight (the decoder of MAE's pretraining)",
        "decoder.x (the decoder of another kind of model)",
    ]


# ---- Containers ----


def ours(neck="ln", classes=9):
    torch.manual_seed(1)
    return dict(build_model("toy_p8", neck, classes).state_dict())


def deep(weights):
    for key in "abcdefgh":
        weights = {key: weights, "epoch": 3}
    return weights


def compiled_and_sharded(weights):
    inside = r"._fsdp_wrapped_module.blocks.\1._checkpoint_wrapped_module."
    return {re.sub(r"\.blocks\.(\d+)\.", inside, name): value for name, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model_state_dict": w},
        lambda w: {"net": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda w: {"module": w, "epoch": 3},
        lambda w: {"state": {"model": w}},
        lambda w: {"state_dict": w, "model": w},  # one model under two names
        lambda w: {"weights": collections.defaultdict(list, w), "log": {}},
        lambda w: {"net": prefixed("module._orig_mod.", w)},
        compiled_and_sharded,
        deep,
    ],
)
def test_one_model_is_found_wherever_it_stands(wrap, tmp_path):
    weights = ours()
    state_dict, facts = load(wrap(weights), tmp_path / "x.pt")

    assert facts["kind"] == "ours"
    assert facts["neck"] == "ln"
    assert facts["num_classes"] == 9
    assert_same(state_dict, weights)


def test_dictionaries_in_dictionaries_end_in_one_short_sentence():
    content = {}
    for _ in range(100_000):
        content = {"a": content}
    with pytest.raises(RecursionError, match="maximum recursion depth exceeded"):
        convert_weights.unwrap(content, "", [])


def test_dictionaries_of_which_each_holds_the_next_one_twice_are_walked_once():
    content = ours()
    for _ in range(60):
        content = {"a": content, "b": content}
    assert convert_weights.unwrap(content, "", []).keys() == ours().keys()


def test_a_tensor_that_stands_twice_is_refused(tmp_path):
    weights = ours()
    weights |= prefixed("_orig_mod.", weights)
    with pytest.raises(WeightsError, match="x.pt: two of its entries are backbone.cls_token"):
        load(weights, tmp_path / "x.pt")


def test_a_name_that_stands_twice_in_a_safetensors_header_is_refused(tmp_path):
    """(json.loads keeps the last one.)"""
    path = tmp_path / "x"
    write_safetensors(timm_weights() | {"norm.biaz": np.ones(128)}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"norm.biaz", b"norm.bias"))

    with pytest.raises(WeightsError, match="x: cannot be read .*two of its entries are norm.bias"):
        load_weights(str(path))

    write_safetensors(timm_weights(), path, **{"norm.bias": {"dtypo": "F32"}})
    path.write_bytes(path.read_bytes().replace(b'"dtypo"', b'"dtype"'))
    with pytest.raises(WeightsError, match="two of its entries are dtype"):
        load_weights(str(path))


@pytest.mark.parametrize("wrap", ["{}", "state_dict.{}"])
@pytest.mark.parametrize("before", ["backbone.module.", "encoder.", "backbone.vit."])
def test_a_backbone_among_the_heads_of_a_whole_model_is_not_read_without_them(
    before, wrap, tmp_path
):
    """Only part of the model is wrapped, or its backbone has a name that is not known."""
    weights = {}
    for name, value in ours().items():
        name = name.replace("backbone.", before)
        weights[wrap.format(name)] = value

    refused = "x.pt: the names of its backbone and of its decode_head begin differently"
    with pytest.raises(WeightsError, match=refused):
        load(weights, tmp_path / "x.pt")


def test_a_whole_model_beside_an_optimizer_that_has_its_names_is_read(tmp_path):
    """(FSDP writes such files.)"""
    weights = ours()
    state = {name: {"exp_avg": torch.ones(1)} for name in weights}
    content = {"module": weights, "optimizer": {"state": state}}
    state_dict, facts = load(content, tmp_path / "x.pt")
    assert_same(state_dict, weights)
    assert facts["left_out"] == ["the file's other entries (optimizer.state)"]


def test_a_backbone_beside_the_heads_of_another_model_is_chosen(tmp_path):
    base = tensors(timm_weights())
    content = {"student": ours(), "teacher": base}
    torch.save(content, tmp_path / "x.pt")
    state_dict, facts = load_weights(f"{tmp_path / 'x.pt'}:teacher")

    assert_same(state_dict, prefixed("backbone.", base))
    assert facts["neck"] is None


def test_a_number_repeated_without_end_and_names_that_clear_the_screen_are_refused(tmp_path):
    weights = tensors(timm_weights())
    weights["norm.bias"] = torch.zeros(1).expand(1 << 40)
    with pytest.raises(WeightsError, match="x.pth: claims to hold more numbers than any model"):
        load(weights, tmp_path / "x.pth")
    assert convert_weights.one_line("a\n\x1b[2J é") == r"a\n\x1b[2J é"


def test_a_dictionary_that_holds_itself_is_read(tmp_path):
    content = {"net": ours()}
    content["self"] = content
    _, facts = load(content, tmp_path / "x.pt")
    assert facts["kind"] == "ours"


def test_of_several_models_the_path_behind_the_colon_chooses(tmp_path):
    one = ours()
    two = {k: v + 1 for k, v in one.items()}
    three = {k: v + 2 for k, v in one.items()}
    both = prefixed("teacher.", three)
    content = {"model": one, "ema": {"model": two}, "both": both}
    torch.save(content, tmp_path / "x.pt")
    path = str(tmp_path / "x.pt")

    for source in (path, path + ":ema", path + ":nothing"):
        with pytest.raises(WeightsError) as error:
            load_weights(source)
        assert "several models, choose one as FILE:NAME, of model, " in str(error.value)
    for choice, weights in (("model", one), ("ema.model", two), ("both.teacher", three)):
        state_dict, _ = load_weights(f"{path}:{choice}")
        assert_same(state_dict, weights)

    inside = one | prefixed("ema_model.", two)  # one dictionary of three, the last a backbone
    base = tensors(timm_weights())
    inside |= prefixed("teacher.", base)
    torch.save({"state_dict": inside}, tmp_path / "y.pt")
    path = str(tmp_path / "y.pt")

    for choice, weights in (
        ("state_dict", one),
        ("state_dict.ema_model", two),
        ("state_dict.teacher", prefixed("backbone.", base)),
    ):
        state_dict, _ = load_weights(f"{path}:{choice}")
        assert_same(state_dict, weights)


@pytest.mark.parametrize(
    "source,path,choice",
    [
        ("x.pth", "x.pth", ""),
        ("x.pth:teacher", "x.pth", "teacher"),
        ("runs/x.pth:state.model_1", "runs/x.pth", "state.model_1"),
        ("C:\\runs\\x.pth", "C:\\runs\\x.pth", ""),
        ("C:x.pth", "C:x.pth", ""),
        ("C:/runs/x.pth:ema", "C:/runs/x.pth", "ema"),
        ("http://host:8080/x.pth", "http://host:8080/x.pth", ""),
        ("https://host/x.pth:ema", "https://host/x.pth", "ema"),
        ("https://host/x.pth?at=12:30", "https://host/x.pth?at=12:30", ""),
    ],
)
def test_a_colon_of_a_drive_or_of_a_url_chooses_nothing(source, path, choice):
    assert split_choice(source) == (path, choice)


def test_a_file_with_a_colon_in_its_name_is_that_file(tmp_path):
    _, facts = load({"net": ours()}, tmp_path / "at:noon")
    assert facts["kind"] == "ours"


def test_averages_choose_by_the_name_that_is_said(tmp_path):
    """What mmengine's EMAHook saves, and what torch's AveragedModel does."""
    net = build_model("toy_p8", "ln", 9)
    weights = to_mmseg(net.state_dict())
    before = {k: v + 1 for k, v in weights.items()}
    steps = {"steps": torch.tensor(3)}
    content = {"state_dict": weights, "ema_state_dict": steps | prefixed("module.", before)}
    path = write(content, tmp_path / "x.pth")

    with pytest.raises(WeightsError, match="of state_dict, .* state_dict holds the average"):
        load_weights(path)
    state_dict, _ = load_weights(path + ":state_dict")
    assert_equal(state_dict, net.state_dict())
    state_dict, facts = load_weights(path + ":ema_state_dict.module")
    assert torch.equal(state_dict["backbone.cls_token"], net.backbone.cls_token + 1)
    assert any("ema_state_dict.steps" in x for x in facts["left_out"])

    # Where "module." was taken off, the counter stands among the weights.
    write({"ema_state_dict": steps | weights}, path)
    state_dict, facts = load_weights(path)
    assert_equal(state_dict, net.state_dict())
    assert facts["left_out"] == ["steps (counts the steps of an average)"]

    averaged = torch.optim.swa_utils.AveragedModel(net)
    for content in (averaged.state_dict(), {"n_averaged": torch.tensor([2])} | net.state_dict()):
        state_dict, facts = load(content, path)
        assert_equal(state_dict, net.state_dict())
        assert "n_averaged" in facts["left_out"][0]


def test_a_backbone_beside_foreign_heads_is_read_and_they_are_said(tmp_path):
    base = tensors(timm_weights())
    foreign = {"neck.x.weight": torch.ones(3), "depth_head.y.weight": torch.ones(3)}
    content = prefixed("backbone.", base) | foreign
    state_dict, facts = load(content, tmp_path / "x.pth")
    assert_same(state_dict, prefixed("backbone.", base))
    assert facts["left_out"] == ["the file's other entries (depth_head.y, neck.x)"]

    # But a model that lacks a part of ours is not a backbone.
    incomplete = ours("mln")
    for name in [name for name in incomplete if name.startswith("neck.")]:
        del incomplete[name]
    with pytest.raises(WeightsError, match="has nothing where the model has neck.|has decode_head"):
        load_into(build_model("toy_p8", "mln", 9), *load(incomplete, tmp_path / "y.pth"))


def test_dinov2s_own_training_files_hold_blocks_in_chunks(tmp_path):
    base = tensors(timm_weights())

    def chunk(match):
        return f"blocks.{int(match[1]) // 2}.{match[1]}."

    chunked = {re.sub(r"blocks\.(\d+)\.", chunk, name): v for name, v in base.items()}
    assert "blocks.1.3.norm1.bias" in chunked
    teacher = prefixed("backbone.", chunked) | {"dino_head.mlp.0.weight": torch.ones(3)}
    for content in (chunked, {"teacher": teacher}):
        state_dict, _ = load(content, tmp_path / "x.pth")
        assert_same(state_dict, prefixed("backbone.", base))


def test_names_of_transformers_5_are_those_of_4(golden, tmp_path):
    old = by_formula(golden("transformers"))
    old = {name: value for name, value in old.items() if not name.startswith("classifier.")}
    new = {}
    for name, value in old.items():
        for a, b in (
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(a, b)
        new[name.removeprefix("vit.")] = value
    assert "layers.11.attention.q_proj.weight" in new

    a, _ = read_torch(old, tmp_path / "a")
    b, facts = read_torch(new, tmp_path / "b")
    assert facts["kind"] == "Hugging Face"
    assert_same(a, b)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_not_a_checkpoint_is_called_what_it_is(legacy, tmp_path):
    net = build_model("toy_p8", "ln", 9)
    path = tmp_path / "x.pth"
    torch.save(net, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"of a whole model save the state_dict\(\)"):
        load_weights(str(path))
    torch.save({"model": net}, path)
    with pytest.raises(WeightsError, match=r"of a whole model save the state_dict\(\)"):
        load_weights(str(path))

    # (torch takes a path that ends with .safetensors for such a file.)
    for path in (path, tmp_path / "x.safetensors"):
        for content in (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346\n",
            b"<!DOCTYPE html><html>sign in</html>",
            json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "b"}}).encode(),
            b"a text\n",
            b"",
        ):
            path.write_bytes(content)
            with pytest.raises(WeightsError, match="web page or a pointer of Git LFS.* the shards"):
                load_weights(str(path))
    torch.save([torch.zeros(2)], path)
    with pytest.raises(WeightsError, match="it is damaged, .* or holds no tensors by name"):
        load_weights(str(path))


def test_the_folder_of_save_pretrained_stands_for_its_file(tmp_path):
    write_safetensors(timm_weights(), tmp_path / "model.safetensors")
    state_dict, facts = load_weights(str(tmp_path))
    assert facts["kind"] == "timm"
    assert len(state_dict) == facts["tensors"]

    os.rename(tmp_path / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match="model.safetensors: cannot be read .*No such file"):
        load_weights(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    with pytest.raises(WeightsError, match="index.json: cannot be read .* join the shards"):
        load_weights(str(tmp_path))


def hugging_face(tmp_path, golden, config):
    """A file of Hugging Face's ViT, deit_t16's sizes, with a config.json beside it. -> its path"""
    write_safetensors(by_formula(golden("transformers")), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    return str(tmp_path)


def test_hugging_faces_config_tells_heads_and_positions(tmp_path, golden):
    """32 x 32 patches, as many as 16 x 64. The config of google/vit-base-patch16-224, shortened."""
    whole = {"hidden_act": "gelu", "image_size": 512, "num_attention_heads": 3, "patch_size": 16}

    def facts_of(**changed):
        folder = hugging_face(tmp_path, golden, json.dumps(whole | changed))
        return load_weights(folder)[1]

    assert facts_of()["resolution"] == "512x512"
    assert "assumed" not in facts_of()
    assert facts_of(image_size=[256, 1024])["resolution"] == "256x1024"
    with pytest.raises(WeightsError, match="its config says {'num_heads': '6'}, this network"):
        facts_of(num_attention_heads=6)
    for name in ("relu", "gelu_new", "quick_gelu"):
        with pytest.raises(WeightsError, match="its config says {'act_cfg': "):
            facts_of(hidden_act=name)
    with pytest.raises(WeightsError, match="1025 rows of positions are not .* what its config"):
        facts_of(image_size=224)


@pytest.mark.parametrize("config", ["{}", "[1]", "{", '{"architecture": "vit_tiny_patch16_224"}'])
def test_a_config_of_another_program_counts_as_none(config, tmp_path, golden):
    _, facts = load_weights(hugging_face(tmp_path, golden, config))
    assert "3 heads" in facts["assumed"]

    config = json.dumps({"num_attention_heads": 7, "image_size": 1})
    (tmp_path / "config.json").write_text(config)
    path = write_safetensors(timm_weights(), tmp_path / "of_timm.safetensors")
    assert "2 heads" in load_weights(path)[1]["assumed"]


def test_kernels_with_time_are_listed_with_their_shape(tmp_path):
    weights = timm_weights()
    weights["patch_embed.proj.weight"] = np.zeros((128, 3, 2, 8, 8), np.float32)
    there = r"patch_embed.proj.weight \(128, 3, 2, 8, 8\) where the model has"
    with pytest.raises(WeightsError, match=there):
        read_torch(weights, tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["F8_E4M3", "U16", "C64"])
def test_safetensors_of_other_numbers_are_not_called_damaged(name, tmp_path):
    """(8 bits that are floating point numbers are read: copying widens them exactly.)"""
    size = {"F8_E4M3": 1, "U16": 2, "C64": 8}[name]
    weights = timm_weights()
    del weights["norm.bias"]
    path = write_safetensors(weights, tmp_path / "x")
    content = open(path, "rb").read()
    end = len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    more = {"dtype": name, "shape": [128], "data_offsets": [end, end + 128 * size]}
    write_safetensors(weights, path, **{"norm.bias": more})
    with open(path, "ab") as file:
        file.write(bytes(128 * size))
    if name == "F8_E4M3":
        state_dict, _ = load_weights(path)
        assert state_dict["backbone.norm.bias"].dtype == torch.float8_e4m3fn
    else:
        with pytest.raises(WeightsError, match="x: norm.bias holds torch.*it is quantised"):
            load_weights(path)


# ---- Values ----


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda v: v.to(torch.int8), "holds torch.int8"),
        (lambda v: v.bool(), "holds torch.bool"),
        (lambda v: v.index_fill(0, torch.tensor(1), torch.nan), "float32 that are not finite"),
        (lambda v: v.index_fill(0, torch.tensor(1), -torch.inf), "float32 that are not finite"),
    ],
)
@pytest.mark.parametrize("name", ["backbone.pos_embed", "backbone.blocks.2.mlp.fc1.weight"])
def test_values_that_no_training_survives_are_refused_with_the_tensors_name(
    damage, message, name, tmp_path
):
    weights = ours()
    weights[name] = damage(weights[name].transpose(0, 1)).transpose(0, 1)

    with pytest.raises(WeightsError, match=f"x.pt: {name} .*{message}"):
        load({"model": weights}, tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_point_numbers_load_and_are_said(dtype, tmp_path):
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ours().items()}
    state_dict, facts = load({"model": weights}, tmp_path / "x.pt")

    assert facts["dtype"] == dtype
    assert f"dtype {dtype}" in describe(facts)

    net = build_model("toy_p8", "ln", 9)
    load_into(net, state_dict, facts)

    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


# ---- Objects beside the weights: skipped, never imported, built or called ----

AUDIT = """
import encodings.cp437, encodings.latin_1, json, sys  # (the codecs of zip and pickle)
import convert_weights as c
c.load_weights("good.pt")  # so that what torch itself imports late is there
events = []
watched = ("import", "exec", "os.", "subprocess.", "pickle.", "shutil.", "ctypes.")

def hook(event, args):
    if event.startswith(watched):
        events.append([event, str(args[:1])])

sys.addaudithook(hook)
for path in sys.argv[1:]:
    events.clear()
    try:
        c.load_weights(path)
        print(json.dumps([path, "loaded", list(events)]))
    except c.WeightsError as error:
        print(json.dumps([path, "refused", list(events)]))
"""


def audited(*paths, cwd):
    """-> {path: (loaded or refused, what python did meanwhile that a program must not)}."""
    done = python(AUDIT, *paths, cwd=cwd)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {path: (what, events) for path, what, events in lines}


def with_call(path, module, name, good, argument="executed"):
    """The file `good` with one entry more, which is the call module.name(argument)."""

    def text(x):
        return b"X" + struct.pack("<I", len(x)) + x.encode()

    call = f"c{module}\n{name}\n".encode() + text(argument) + b"\x85R"  # GLOBAL, tuple of 1, REDUCE
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                before = b"\x80\x02}(" + text("hook") + call + text("net")
                data = before + data[2:-1] + b"u."  # {"hook": call, "net": what was there}
            new.writestr(entry, data)


def test_objects_of_any_class_are_skipped_and_their_modules_never_imported(tmp_path, monkeypatch):
    (tmp_path / "trainer_of_mine.py").write_text(
        "import dataclasses, enum\n"
        "@dataclasses.dataclass\n"
        "class Config:\n    lr: float = 1.0\n"
        "class Mode(enum.Enum):\n    A = 1\n"
        "class Meter:\n    def __init__(self, n):\n        self.n = n\n"
        "    def __reduce__(self):\n        return Meter, (self.n,)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    trainer = __import__("trainer_of_mine")
    weights = ours()
    torch.save(weights, tmp_path / "good.pt")
    beside = {
        "path": pathlib.Path("a/b"),
        "when": datetime.datetime(2021, 6, 24),
        "zone": datetime.timezone.utc,
        "log": collections.defaultdict(list, loss=[1.0]),
        "config": trainer.Config(),
        "mode": trainer.Mode.A,
        "meters": {trainer.Mode.A: trainer.Meter(3)},
        "array": np.ones(3),
        "namespace": argparse.Namespace(lr=1),
        "function": trainer.Meter,
    }
    torch.save({"net": weights, **beside}, tmp_path / "x.pt")
    monkeypatch.delitem(sys.modules, "trainer_of_mine")

    state_dict, facts = load_weights(str(tmp_path / "x.pt"))

    assert_equal(state_dict, weights)

    said = next(x for x in facts["left_out"] if x.startswith("the file's other entries ("))
    for key in beside:
        assert key in said
    assert audited("x.pt", cwd=tmp_path)["x.pt"] == ("loaded", [])


def test_whatever_a_pickle_names_nothing_is_imported_or_called(tmp_path):
    (tmp_path / "trap.py").write_text("open('executed', 'w')\ndef run(x): pass\n")
    torch.save(ours(), tmp_path / "good.pt")
    names = [
        ("trap", "run"),
        ("os", "mkdir"),
        ("posix", "mkdir"),
        ("pathlib", "os.mkdir"),
        ("numpy", "os.mkdir"),
        ("numpy.trap", "run"),
        ("argparse", "Namespace.run"),
        ("argparse.Namespace", "run"),
        ("mmengine.trap", "run"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("importlib", "import_module"),
        ("subprocess", "getoutput"),
        ("collections", "defaultdict"),
        ("collections", "OrderedDict.mkdir"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.serialization", "os.mkdir"),
        ("trap\nrun\n(dtrap", "run"),
    ]
    for k, (module, name) in enumerate(names):
        with_call(tmp_path / f"{k}.pt", module, name, tmp_path / "good.pt")
    found = audited(*[f"{k}.pt" for k in range(len(names))], cwd=tmp_path)

    assert {k: events for k, (_, events) in found.items() if events} == {}

    loaded = [names[k] for k in range(len(names)) if found[f"{k}.pt"][0] == "loaded"]

    assert ("trap", "run") in loaded
    assert ("builtins", "eval") in loaded
    assert ("os", "mkdir") not in loaded, "torch refuses these by itself"
    assert not (tmp_path / "executed").exists()


# ---- Names and colours of the classes in mmsegmentation's files ----

NINE = [f"thing {k}" for k in range(9)]
COLOURS = [[k, 10 * k, 255 - k] for k in range(9)]


def meta_of(version, names=NINE, palette=COLOURS, shifted=True):
    if version == 0:
        text = f"dict(type='LoadAnnotations', reduce_zero_label={shifted})"
        return {"CLASSES": names, "PALETTE": palette, "config": text}
    said = {"classes": names, "palette": palette, "reduce_zero_label": shifted}
    return {"dataset_meta": said, "cfg": "train_pipeline"}


def load_with_meta(meta, path):
    weights = to_mmseg(build_model("toy_p8", "ln", 9).state_dict())
    _, facts = load({"state_dict": weights, "meta": meta}, path)
    return facts


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("shifted", [True, False])
def test_classes_of_mmsegmentation_become_facts(version, shifted, tmp_path):
    meta = meta_of(version, tuple(NINE[:-1]) + ("bed ",), COLOURS, shifted)
    facts = load_with_meta(meta, tmp_path / "x.pth")
    want = ade20k.Classes((*NINE[:-1], "bed"), COLOURS, shifted)
    assert ade20k.Classes(*facts["classes"]) == want


@pytest.mark.parametrize(
    "change",
    [
        dict(names=None),
        dict(names=[*NINE[:8], 5]),
        dict(names=5),
        dict(palette=COLOURS[:8]),
        dict(palette=[*COLOURS[:8], [0, 0, 256]]),
        dict(palette=[*COLOURS[:8], [0, 0, -1]]),
        dict(palette=[*COLOURS[:8], [0, 0]]),
        dict(palette=[*COLOURS[:8], "red"]),
        dict(palette=None),
        dict(palette=np.zeros((9, 3), np.int64)),
    ],
)
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("shifted", [True, False])
def test_names_colours_and_the_meaning_of_0_are_kept_each_by_itself(
    change, version, shifted, tmp_path
):
    """(Until now a bad palette took the two others with it: saved labels were shifted by one.)"""
    facts = load_with_meta(meta_of(version, shifted=shifted, **change), tmp_path / "x.pth")
    names, palette, zero_ignored = facts["classes"]
    assert names == (() if "names" in change else tuple(NINE))
    assert palette == (ade20k.PALETTE[:9].tolist() if "palette" in change else COLOURS)
    assert zero_ignored == shifted
    assert f"zero_ignored {shifted};" in describe(facts)


def test_without_a_record_0_is_the_first_class_except_among_150(tmp_path):
    for n, zero_ignored in ((9, False), (150, True)):
        weights = to_mmseg(build_model("toy_p8", "ln", n).state_dict())
        for meta in (None, 5, {}, {"config": 5}, {"CLASSES": object()}):
            content = {"state_dict": weights} | ({} if meta is None else {"meta": meta})
            _, facts = load(content, tmp_path / "x.pth")
            assert facts["classes"][0] == ()
            assert facts["classes"][2] == zero_ignored or meta == {"config": 5}
            assert f"zero_ignored {facts['classes'][2]};" in describe(facts)


def test_names_that_are_not_the_files_number_of_classes_are_not_used(tmp_path):
    facts = load_with_meta(meta_of(0, names=NINE[:8]), tmp_path / "x.pth")
    args = argparse.Namespace(image="x.jpg", checkpoint="x.pth")
    _, classes, _ = evaluate.find_data(args, facts)
    assert classes.names == tuple("012345678")


def test_names_of_classes_from_elsewhere_cannot_clear_the_screen(tmp_path):
    facts = load_with_meta(meta_of(1, [*NINE[:8], "a\x1b[2Jb"]), tmp_path / "x.pth")
    assert facts["classes"][0][8] == r"a\x1b[2Jb"


# ---- Architectures without a published recipe ----

OTHERS = [
    ("timm_deit3", "deit3_s16", 512),
    ("timm_dinov2", "dinov2_s14", 518),
    ("timm_dinov2_reg", "dinov2_s14_reg", 518),
    ("transformers_dinov2", "dinov2_s14", 518),
    ("transformers_dinov2_reg", "dinov2_s14_reg", 518),
]


@pytest.mark.parametrize("name,arch,size", OTHERS)
def test_features_of_deit_3_and_dinov2_are_those_of_timm_and_transformers(
    name, arch, size, golden, tmp_path
):
    gold = golden(name)
    state_dict, facts = read_torch(by_formula(gold), tmp_path / "x")

    assert facts["arch"] == arch
    assert facts["resolution"] == f"{size}x{size}"
    assert_features(state_dict, facts, arch, size, gold)


def test_the_authors_names_of_layer_scale_and_registers_are_read(golden, tmp_path):
    timm = by_formula(golden("timm_dinov2_reg"))
    want, _ = read_torch(timm, tmp_path / "a")

    facebook = renamed("reg_token", "register_tokens", timm)
    place = formulas.weight("pos_embed of the class", (1, 1, 384))
    facebook["cls_token"] = timm["cls_token"] - place  # its class token has a position of its own
    facebook["pos_embed"] = np.concatenate([place, timm["pos_embed"]], axis=1)
    facebook["mask_token"] = np.zeros((1, 384))
    got, facts = read_torch(facebook, tmp_path / "b")

    assert facts["arch"] == "dinov2_s14_reg"
    assert want.keys() == got.keys()
    assert facts["left_out"] == ["mask_token (stands for hidden patches in pretraining)"]

    sums = [x["backbone.cls_token"] + x["backbone.pos_embed"][:, :1] for x in (want, got)]

    torch.testing.assert_close(*sums)

    timm = by_formula(golden("timm_deit3"))
    deit3 = {re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", k): v for k, v in timm.items()}

    assert sum("gamma_" in k for k in deit3) == 24

    want, _ = read_torch(timm, tmp_path / "a")
    got, _ = read_torch(deit3, tmp_path / "b")

    assert_same(got, want)


@pytest.mark.parametrize("name,arch,size", OTHERS[:3])
def test_what_goes_to_timm_has_timms_names_and_shapes_again(
    name, arch, size, golden, tmp_path, main, capsys
):
    gold = by_formula(golden(name))
    write_torch(gold, tmp_path / "x")
    main(convert_weights, tmp_path / "x", tmp_path / "y", "--to", "timm")
    back = torch.load(tmp_path / "y", weights_only=True)

    assert set(back) == {k for k in gold if not k.startswith("head.")}
    for name, value in back.items():
        assert np.array_equal(value, gold[name]), name
    with pytest.raises(SystemExit):
        main(convert_weights, tmp_path / "x", tmp_path / "z", "--to", "mmseg")
    assert "mmsegmentation's ViT has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arch", ["vit_l16", "deit3_b16", "deit3_l16", "dinov2_b14", "dinov2_l14_reg"]
)
def test_the_large_ones_are_told_apart_by_their_tensors(arch, tmp_path):
    with torch.device("meta"):
        net = build_model(arch, "ln")
    weights = {}
    for name, value in net.backbone.state_dict().items():
        weights[name] = torch.zeros(()).expand(value.shape)
    _, facts = load(weights, tmp_path / "x.pth")
    assert facts["arch"] == arch


def test_a_model_with_layer_scale_and_registers_trains():
    net = build_model("dinov2_s14_reg", "mln", 5)
    images = torch.randn(2, 3, 65, 70)
    labels = torch.randint(0, 5, (2, 65, 70))
    loss, _ = net(images, labels)
    loss.backward()
    named = dict(net.backbone.named_parameters())

    for name in ("reg_token", "blocks.0.ls1.gamma", "blocks.11.ls2.gamma", "pos_embed"):
        assert named[name].grad.abs().max() > 0, name
