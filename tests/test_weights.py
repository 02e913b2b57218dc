"""convert_weights.py: exact both ways, or an error that lists the tensors; nothing in a file is
ever executed."""

import json
import os
import pickle
import struct
import subprocess
import sys

import formulas
import numpy as np
import pytest
import torch
from conftest import ROOT, write_mmseg

import ade20k
import convert_weights
from convert_weights import WeightsError, load_into, load_weights, to_mmseg
from upernet import build_model


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_model("toy_p8", "ln_mln", 9).eval()


def convert(*arguments, cwd):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, "convert_weights.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("middle", ["mmseg", "timm"])
def test_there_and_back_is_bit_equal(net, middle, tmp_path, main):
    torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
    for src, dst, to in (("a.pt", "b.pth", middle), ("b.pth", "c.pt", "ours")):
        main(convert_weights, tmp_path / src, tmp_path / dst, "--to", to)
    back = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    want = {
        k: v for k, v in net.state_dict().items() if middle == "mmseg" or k.startswith("backbone.")
    }

    assert set(back) == set(want) and all(torch.equal(back[k], v) for k, v in want.items())
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pth", "c.pt"]


def test_prefixes_of_data_parallel_are_taken_off(net, tmp_path):
    theirs = {"module." + k: v for k, v in to_mmseg(net.state_dict()).items()}
    torch.save(
        {"state_dict": theirs, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pth"
    )
    state_dict, facts = load_weights(str(tmp_path / "x.pth"))

    assert (
        facts["kind"] == "mmsegmentation"
        and facts["neck"] == "ln_mln"
        and facts["num_classes"] == 9
    )
    assert all(torch.equal(state_dict[k], v) for k, v in net.state_dict().items())


def test_deit_b_is_told_from_vit_b_by_the_config_in_the_file(tmp_path):
    with torch.device("meta"):
        names = to_mmseg(build_model("deit_b16").state_dict())
    weights = {
        k: torch.zeros(()).expand(v.shape) for k, v in names.items()
    }  # 1 value each, however large the shape

    for config, arch in (
        ("pretrained='pretrain/deit_base_patch16_224-b5f2ef4d.pth'", "deit_b16"),
        ("", "vit_b16"),
    ):
        torch.save({"state_dict": weights, "meta": {"config": config}}, tmp_path / "x.pth")
        assert load_weights(str(tmp_path / "x.pth"))[1]["arch"] == arch


@pytest.mark.parametrize(
    "damage,message",
    [
        (
            lambda d: d.pop("backbone.layers.2.ln1.weight"),
            "missing backbone.blocks.2.norm1.weight (128,)",
        ),
        (lambda d: d.update(extra=torch.zeros(3)), "left over extra (3,)"),
        (
            lambda d: d.update({"decode_head.bottleneck.bn.bias": torch.zeros(5)}),
            "decode_head.bottleneck.bn.bias is (5,) in the file, (64,) in the model",
        ),
        (
            lambda d: [d.pop(k) for k in list(d) if k.startswith("backbone.layers.3.")],
            "3 layers, 128 wide",
        ),
        (lambda d: d.clear(), "no known kind of checkpoint"),
    ],
)
def test_what_does_not_fit_is_listed(net, damage, message, tmp_path):
    weights = to_mmseg(net.state_dict())
    damage(weights)
    torch.save({"state_dict": weights}, tmp_path / "x.pth")

    with pytest.raises(WeightsError) as error:
        load_weights(str(tmp_path / "x.pth"))
    assert message in str(error.value) and str(tmp_path / "x.pth") in str(error.value)


def test_a_whole_model_does_not_load_into_another(net, tmp_path):
    state_dict, facts = load_weights(write_mmseg(net.state_dict(), tmp_path / "x.pth"))
    with pytest.raises(
        WeightsError, match=r"decode_head.classifier.weight is \(9, .* in the file, \(150"
    ):
        load_into(build_model("toy_p8", "ln_mln"), state_dict, facts)
    with pytest.raises(WeightsError, match="left over neck"):
        load_into(build_model("toy_p8", "ln", 9), state_dict, facts)


def test_a_backbone_sets_the_backbone_alone_and_says_what_it_left_out(net, tmp_path):
    torch.save(
        {
            k.removeprefix("backbone."): v
            for k, v in net.state_dict().items()
            if k.startswith("backbone.")
        },
        tmp_path / "x.pth",
    )
    state_dict, facts = load_weights(str(tmp_path / "x.pth"))
    other = build_model("toy_p8", "mln", 4)
    head = other.decode_head.classifier.weight.clone()
    load_into(other, state_dict, facts)

    assert torch.equal(other.backbone.pos_embed, net.backbone.pos_embed)
    assert torch.equal(other.decode_head.classifier.weight, head)
    assert sorted(facts["left_out"]) == [
        "backbone.norm.bias (the model has no final norm)",
        "backbone.norm.weight (the model has no final norm)",
    ]
    del state_dict["backbone.blocks.1.mlp.fc1.bias"]

    with pytest.raises(WeightsError, match="missing backbone.blocks.1.mlp.fc1.bias"):
        load_into(other, state_dict, facts)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_pickle_is_executed_and_no_damage_passes(net, tmp_path):
    torch.save({"state_dict": to_mmseg(net.state_dict()), "hook": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"model": net.state_dict()}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html>404</html>")
    torch.save([1, 2], tmp_path / "list.pt")

    for name in ("bomb.pth", "raw.pth", "cut.pt", "empty.pt", "page.pth", "list.pt", "absent.pt"):
        with pytest.raises(WeightsError, match=name) as error:
            load_weights(str(tmp_path / name))
        assert "\n" not in str(error.value)

    done = convert("bomb.pth", "out.pt", cwd=tmp_path)

    assert (
        done.returncode == 2
        and "bomb.pth" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out.pt").exists()


def test_a_file_that_cannot_be_fetched_says_what_else_to_do(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ade20k.time, "sleep", lambda seconds: None)  # between the tries
    with pytest.raises(SystemExit) as end:
        main(
            convert_weights,
            "http://127.0.0.1:9/deit_small_patch16_224-cd65a155.pth",
            tmp_path / "out.pt",
        )

    error = capsys.readouterr().err

    assert end.value.code == 2 and "--pretrained none" in error and "give the file's path" in error


def at_224(arch="deit_s16", neck="mln", classes=150):
    """A whole model that was trained at 224: its table of positions is 14x14."""
    net = build_model(arch, neck, classes)
    net.backbone.set_grid((14, 14))
    torch.nn.init.normal_(net.backbone.pos_embed)
    return net


def test_a_whole_model_of_another_size_has_the_references_logits(golden, tmp_path):
    gold = golden("positions")
    net = at_224()
    path = write_mmseg(net.state_dict(), tmp_path / "x.pth")
    state_dict, facts = load_weights(path)

    assert facts["grid"] == (14, 14) and facts["resolution"] == "224x224"
    assert tuple(gold["pos_embed"]) == state_dict["backbone.pos_embed"].shape

    other = build_model("deit_s16", "mln").eval()
    load_into(other, state_dict, facts)

    for h, w in ((224, 224), (97, 131)):
        with torch.inference_mode():
            logits = other(torch.from_numpy(formulas.image(h, w)))
        want, largest = gold[f"logits_{h}x{w}"], gold[f"max_{h}x{w}"]
        np.testing.assert_allclose(formulas.samples(logits), want, atol=1e-4 * largest)


@pytest.mark.parametrize("to", ["mmseg", "timm", "ours"])
def test_a_whole_model_keeps_its_positions_to_the_bit(to, tmp_path, main):
    net = at_224("toy_p8", "ln_mln", 9)
    torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
    main(convert_weights, tmp_path / "a.pt", tmp_path / "b.pt", "--to", to)
    written = torch.load(tmp_path / "b.pt", weights_only=True)
    tensors = written.get("model") or written.get("state_dict") or written
    found = [v for k, v in tensors.items() if k.endswith("pos_embed")]

    assert len(found) == 1 and torch.equal(found[0], net.backbone.pos_embed)


def test_training_on_a_whole_model_goes_on_in_its_grid_and_a_backbone_does_not(tmp_path):
    net = at_224("toy_p8", "ln", 9)
    torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
    other = build_model("toy_p8", "ln", 4)
    load_into(other, *load_weights(str(tmp_path / "a.pt")), new_classes=True)

    assert torch.equal(other.backbone.pos_embed, net.backbone.pos_embed)

    loss, _ = other(torch.randn(2, 3, 112, 112), torch.zeros(2, 112, 112, dtype=torch.int64))
    loss.backward()

    assert other.backbone.pos_embed.grad.shape == (1, 197, 128)

    torch.save(net.backbone.state_dict(), tmp_path / "b.pt")
    fresh = build_model("toy_p8", "ln", 4)
    load_into(fresh, *load_weights(str(tmp_path / "b.pt")))

    assert fresh.backbone.grid == (16, 16) and fresh.backbone.pos_embed.shape == (1, 257, 128)


def test_a_failed_load_leaves_the_grid_as_it_was(tmp_path):
    torch.save({"model": at_224("toy_p8", "ln", 9).state_dict()}, tmp_path / "a.pt")
    other = build_model("toy_p8", "ln", 4)
    with pytest.raises(WeightsError, match="another class count"):
        load_into(other, *load_weights(str(tmp_path / "a.pt")))
    assert other.backbone.grid == (16, 16) and other.backbone.pos_embed.shape == (1, 257, 128)


# ---- What is written ----


def parse_safetensors(path):
    """-> {name: numpy array}, by the format's specification; 16 bit numbers as uint16."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, out, end = json.loads(data[8 : 8 + size]), {}, 0
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<u2", "BF16": "<u2", "I64": "<i8"}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype = np.dtype(dtypes[entry["dtype"]])
        assert begin == end and begin % dtype.itemsize == 0, "no holes, and all can be mapped"
        raw = data[8 + size + begin : 8 + size + stop]
        out[name], end = np.frombuffer(raw, dtype).reshape(entry["shape"]), stop
    assert 8 + size + end == len(data)
    return out


@pytest.mark.parametrize("to", ["ours", "mmseg", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_called_safetensors_is_one(net, to, dtype, tmp_path, main):
    want = {k: v.to(dtype) if v.ndim > 1 else v for k, v in net.state_dict().items()}
    torch.save({"model": want}, tmp_path / "a.pt")
    main(convert_weights, tmp_path / "a.pt", tmp_path / "b.safetensors", "--to", to)

    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.safetensors"]

    back, facts = load_weights(str(tmp_path / "b.safetensors"))

    assert all(torch.equal(v, want[k]) and v.dtype == want[k].dtype for k, v in back.items())

    kept = [k for k in want if to != "timm" or k.startswith("backbone.")]

    assert sorted(back) == sorted(kept)

    parsed = parse_safetensors(tmp_path / "b.safetensors")
    if to == "ours":
        for name, value in parsed.items():
            bits = want[name]
            if bits.dtype == torch.bfloat16:
                bits = bits.view(torch.uint16)
            assert np.array_equal(value, bits.numpy()), name

    safetensors = pytest.importorskip("safetensors.torch")
    theirs = safetensors.load_file(tmp_path / "b.safetensors")

    assert theirs.keys() == parsed.keys()
    if to == "ours":
        assert all(torch.equal(v, want[k]) for k, v in theirs.items())


@pytest.mark.parametrize("same", ["itself", "symbolic link", "hard link", "part"])
def test_a_file_is_not_written_over_itself(net, same, tmp_path, main, capsys):
    src, dst = tmp_path / "a.pt", tmp_path / "b.pt"
    if same == "itself":
        dst = tmp_path / "." / "a.pt"
    if same == "part":
        src = tmp_path / "b.pt.part"
    torch.save({"model": net.state_dict()}, src)
    before = src.read_bytes()
    if same == "symbolic link":
        dst.symlink_to(src)
    if same == "hard link":
        dst.hardlink_to(src)

    for source in (src, f"{src}:model"):
        with pytest.raises(SystemExit) as end:
            main(convert_weights, source, dst, "--to", "mmseg")
        assert end.value.code == 2 and "give it another name" in capsys.readouterr().err
    assert src.read_bytes() == before


def test_what_becomes_ours_keeps_its_classes_and_its_architecture(tmp_path, main):
    net = build_model("deit_t16", "none", 9)
    classes = [[f"thing {k}" for k in range(9)], [[k, k, k] for k in range(9)]]
    meta = {"CLASSES": classes[0], "PALETTE": classes[1], "config": "reduce_zero_label=True"}
    write_mmseg(net.state_dict(), tmp_path / "a.pth", meta=meta)
    main(convert_weights, tmp_path / "a.pth", tmp_path / "b.pt")
    main(convert_weights, tmp_path / "b.pt", tmp_path / "c.pt")
    facts = load_weights(str(tmp_path / "c.pt"))[1]

    assert facts["arch"] == "deit_t16"
    assert facts["classes"] == (tuple(classes[0]), classes[1], True, None)


def test_colours_of_unlabelled_pixels_come_back_as_they_were_saved(tmp_path):
    classes = ade20k.Classes(("a", "b"), [[0, 0, 0], [9, 0, 255]], False, [[1, 2, 3]])
    args = dict(arch="toy_p8", neck="none")
    content = {"model": build_model("toy_p8", "none", 2).state_dict(), "args": args}
    torch.save(content | {"classes": tuple(classes)}, tmp_path / "a.pt")
    assert load_weights(str(tmp_path / "a.pt"))[1]["classes"] == tuple(classes)

    for wrong in ([[1, 2]], [[1, 2, 256]], "red"):
        changed = tuple(classes._replace(ignored_colours=wrong))
        torch.save(content | {"classes": changed}, tmp_path / "b.pt")
        assert "classes" not in load_weights(str(tmp_path / "b.pt"))[1]
