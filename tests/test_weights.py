"""convert_weights.py: exact both ways, or an error that lists the tensors; nothing in a file is
ever executed."""

import os
import pickle
import subprocess
import sys

import formulas
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal, load, write, write_mmseg

import ade20k
import convert_weights
from convert_weights import WeightsError, load_into, load_weights, to_mmseg
from upernet import build_model


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_model("toy_p8", "ln_mln", 9).eval()


def convert(*arguments, cwd):
    script = os.path.join(ROOT, "convert_weights.py")
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def of_backbone(state_dict):
    found = {}
    for name, value in state_dict.items():
        if name.startswith("backbone."):
            found[name] = value
    return found


@pytest.mark.parametrize("middle", ["mmseg", "timm"])
def test_there_and_back_is_bit_equal(net, middle, tmp_path, main):
    want = net.state_dict()
    write({"model": want}, tmp_path / "a.pt")
    if middle == "timm":
        want = of_backbone(want)

    main(convert_weights, tmp_path / "a.pt", tmp_path / "b.pth", "--to", middle)
    main(convert_weights, tmp_path / "b.pth", tmp_path / "c.pt", "--to", "ours")
    back = torch.load(tmp_path / "c.pt", weights_only=True)["model"]

    assert set(back) == set(want)
    assert_equal(back, want)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pth", "c.pt"]


def test_prefixes_of_data_parallel_are_taken_off(net, tmp_path):
    theirs = {}
    for name, value in to_mmseg(net.state_dict()).items():
        theirs["module." + name] = value
    optimizer = {"state": {}, "param_groups": []}
    content = {"state_dict": theirs, "optimizer": optimizer}
    state_dict, facts = load(content, tmp_path / "x.pth")

    assert facts["kind"] == "mmsegmentation"
    assert facts["neck"] == "ln_mln"
    assert facts["num_classes"] == 9
    assert_equal(state_dict, net.state_dict())


def test_deit_b_is_told_from_vit_b_by_the_config_in_the_file(tmp_path):
    with torch.device("meta"):
        net = build_model("deit_b16")
    # One value each, however large the shape.
    weights = {}
    for name, value in to_mmseg(net.state_dict()).items():
        weights[name] = torch.zeros(()).expand(value.shape)

    for config, arch in (
        ("pretrained='pretrain/deit_base_patch16_224-b5f2ef4d.pth'", "deit_b16"),
        ("", "vit_b16"),
    ):
        content = {"state_dict": weights, "meta": {"config": config}}
        _, facts = load(content, tmp_path / "x.pth")
        assert facts["arch"] == arch


def without_a_norm(weights):
    del weights["backbone.layers.2.ln1.weight"]


def without_a_counter(weights):
    del weights["decode_head.bottleneck.bn.num_batches_tracked"]


def with_one_more(weights):
    weights["extra"] = torch.zeros(3)


def of_another_shape(weights):
    weights["decode_head.bottleneck.bn.bias"] = torch.zeros(5)


def without_a_layer(weights):
    for name in list(weights):
        if name.startswith("backbone.layers.3."):
            del weights[name]


@pytest.mark.parametrize(
    "damage,message",
    [
        (
            without_a_norm,
            "the file has nothing where the model has backbone.blocks.2.norm1.weight (128,)",
        ),
        (without_a_counter, "where the model has decode_head.bottleneck.bn.num_batches_tracked ()"),
        (with_one_more, "the file has extra (3,) where the model has nothing"),
        (
            of_another_shape,
            "the file has decode_head.bottleneck.bn.bias (5,) "
            "where the model has decode_head.bottleneck.bn.bias (64,)",
        ),
        (without_a_layer, "'depth': 3"),
        (dict.clear, "no known kind of checkpoint"),
    ],
)
def test_what_does_not_fit_is_listed(net, damage, message, tmp_path):
    weights = to_mmseg(net.state_dict())
    damage(weights)
    path = write({"state_dict": weights}, tmp_path / "x.pth")

    with pytest.raises(WeightsError) as error:
        load_weights(path)
    assert message in str(error.value)
    assert path in str(error.value)


def test_a_whole_model_does_not_load_into_another(net, tmp_path):
    path = write_mmseg(net.state_dict(), tmp_path / "x.pth")
    state_dict, facts = load_weights(path)
    reshaped = r"has .*classifier.weight \(9, .* where .*classifier.weight \(150, "

    with pytest.raises(WeightsError, match=reshaped):
        load_into(build_model("toy_p8", "ln_mln"), state_dict, facts)
    with pytest.raises(WeightsError, match="has neck.* where the model has nothing"):
        load_into(build_model("toy_p8", "ln", 9), state_dict, facts)


def test_a_backbone_sets_the_backbone_alone_and_says_what_it_left_out(net, tmp_path):
    state_dict, facts = load(net.backbone.state_dict(), tmp_path / "x.pth")
    other = build_model("toy_p8", "mln", 4)
    head = other.decode_head.classifier.weight.clone()
    load_into(other, state_dict, facts)

    assert torch.equal(other.backbone.pos_embed, net.backbone.pos_embed)
    assert torch.equal(other.decode_head.classifier.weight, head)
    assert sorted(facts["left_out"]) == [
        "backbone.norm.bias (the model has none, or another shape)",
        "backbone.norm.weight (the model has none, or another shape)",
    ]

    del state_dict["backbone.blocks.1.mlp.fc1.bias"]
    with pytest.raises(WeightsError, match="has nothing where .* backbone.blocks.1.mlp.fc1.bias"):
        load_into(other, state_dict, facts)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_pickle_is_executed_and_no_damage_passes(net, tmp_path):
    weights = net.state_dict()
    write({"state_dict": to_mmseg(weights), "hook": Bomb()}, tmp_path / "bomb.pth")
    write({"model": weights}, tmp_path / "good.pt")
    write([1, 2], tmp_path / "list.pt")

    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    good = (tmp_path / "good.pt").read_bytes()
    half = len(good) // 2
    (tmp_path / "cut.pt").write_bytes(good[:half])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html>404</html>")

    for name in ("bomb.pth", "raw.pth", "cut.pt", "empty.pt", "page.pth", "list.pt", "absent.pt"):
        with pytest.raises(WeightsError, match=name) as error:
            load_weights(str(tmp_path / name))
        assert "\n" not in str(error.value)

    done = convert("bomb.pth", "out.pt", cwd=tmp_path)

    assert done.returncode == 2
    assert "bomb.pth" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out.pt").exists()


def test_a_file_that_cannot_be_fetched_says_what_else_to_do(main, tmp_path, capsys):
    url = "http://127.0.0.1:9/deit_small_patch16_224-cd65a155.pth"  # where nobody listens
    with pytest.raises(SystemExit) as end:
        main(convert_weights, url, tmp_path / "out.pt")

    error = capsys.readouterr().err

    assert end.value.code == 2
    assert "--pretrained none" in error
    assert "give the file's path" in error


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

    assert facts["grid"] == (14, 14)
    assert facts["resolution"] == "224x224"
    assert tuple(gold["pos_embed"]) == state_dict["backbone.pos_embed"].shape

    other = build_model("deit_s16", "mln").eval()
    load_into(other, state_dict, facts)

    assert_logits(other, gold, [(224, 224), (97, 131)])


# ---- What the tensors do not tell ----


@pytest.fixture
def of_reference(golden, tmp_path):
    """of_reference(name, neck) -> (a small model's file as the reference's Runner writes it, what
    the reference computes with it)"""

    def build(name, neck="none"):
        gold = golden("configs")
        net = build_model("toy_p8", neck)
        meta = {"config": str(gold[f"{name} config"])}
        path = write_mmseg(net.state_dict(), tmp_path / f"{name}.pth", meta=meta)
        logits = {k.split()[1]: gold[k] for k in gold.files if k.startswith(name)}
        return path, logits

    return build


def assert_file_logits(path, gold, sizes):
    state_dict, facts = load_weights(path)
    net = build_model(facts["arch"], facts["neck"], facts["num_classes"]).eval()
    load_into(net, state_dict, facts)
    assert_logits(net, gold, sizes)


def assert_logits(net, gold, sizes):
    for h, w in sizes:
        images = torch.from_numpy(formulas.image(h, w))
        with torch.inference_mode():
            logits = net(images)
        want = gold[f"logits_{h}x{w}"]
        tolerance = 1e-4 * gold[f"max_{h}x{w}"]
        np.testing.assert_allclose(formulas.samples(logits), want, atol=tolerance)


def test_a_rectangle_of_positions_is_what_the_config_says(of_reference, main, tmp_path):
    """8x32 positions, as many as 16x16: the tensors are those of a square."""
    path, gold = of_reference("rectangular", "mln")
    sizes = [(64, 256), (97, 131)]
    assert load_weights(path)[1]["grid"] == (8, 32)
    assert_file_logits(path, gold, sizes)

    # It stays one on the way through the names of others.
    main(convert_weights, path, tmp_path / "a.pt")
    main(convert_weights, tmp_path / "a.pt", tmp_path / "b.pth", "--to", "mmseg")
    main(convert_weights, tmp_path / "b.pth", tmp_path / "c.pt")
    assert_file_logits(str(tmp_path / "c.pt"), gold, sizes)


def test_pictures_one_patch_thin_have_the_references_logits(of_reference):
    path, gold = of_reference("plain")
    assert_file_logits(path, gold, [(97, 131), (8, 200), (200, 8), (1, 1)])


@pytest.mark.parametrize(
    "name", ["with_cls_token", "interpolate_mode", "num_heads", "act_cfg", "norm_cfg"]
)
def test_a_setting_that_the_tensors_do_not_tell_is_refused_by_name(name, of_reference):
    _, plain = of_reference("plain")
    path, gold = of_reference(name)
    size = "97x131"
    differ = np.abs(gold[f"logits_{size}"] - plain[f"logits_{size}"]).max()
    assert differ > 2e-3 * plain[f"max_{size}"], "the reference computes something else"

    only = f"{name}.pth: its config says {{'{name}': [^:]*}}, this network has only"
    with pytest.raises(WeightsError, match=only):
        load_weights(path)


def test_the_released_configs_are_accepted_and_no_others(golden, tmp_path):
    gold = golden("configs")
    released = [key for key in gold.files if " upernet_" in key]
    assert len(released) == 11

    for key in released:
        arch, neck, _ = key.split()
        config = str(gold[key])
        with torch.device("meta"):
            net = build_model(arch, neck)
        weights = {}
        for name, value in to_mmseg(net.state_dict()).items():
            weights[name] = torch.zeros(()).expand(value.shape)

        def read(config):
            return load({"state_dict": weights, "meta": {"config": config}}, tmp_path / "x.pth")

        _, facts = read(config)
        assert facts["arch"] == arch
        assert facts["grid"] == (32, 32)
        assert "assumed" not in facts
        assert facts["zero_ignored"] == "True"

    for old, new in (
        ("out_indices=(2, 5, 8, 11)", "out_indices=(8, 9, 10, 11)"),
        ("with_cls_token=True", "with_cls_token=True, patch_pad=0"),
        ("with_cls_token=True", "out_origin=True"),
        ("norm_cfg=dict(type='LN', eps=1e-06)", "norm_cfg=dict(type='LN')"),
        ("norm_cfg=dict(type='LN', eps=1e-06),", ""),
    ):
        assert old in config
        with pytest.raises(WeightsError, match="x.pth: its config says {'[a-z_]+': [^:]*}, this"):
            read(config.replace(old, new))
    with pytest.raises(WeightsError, match="1025 rows of positions are not"):
        read(config.replace("img_size=(512, 512)", "img_size=(256, 512)"))


def test_a_config_is_never_executed(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = "import os\nos.mkdir('executed')\nmodel = dict(backbone=dict(a=os.mkdir('executed')))"
    with pytest.raises(WeightsError, match="its config says"):
        load({"state_dict": to_mmseg(net.state_dict()), "meta": {"config": config}}, "x.pth")
    assert os.listdir(".") == ["x.pth"]


@pytest.mark.parametrize("h, w", [(31, 33), (25, 41), (5, 7)])
def test_a_count_of_positions_that_is_not_a_square_needs_a_record(h, w, net, tmp_path):
    """31x33 positions and the class token's are 1024 rows, which are not 32x32 without it."""
    net.backbone.set_grid((h, w))
    torch.nn.init.normal_(net.backbone.pos_embed)
    content = {"state_dict": to_mmseg(net.state_dict())}
    with pytest.raises(WeightsError, match=f'its {1 + h * w} rows.*"grid": .height, width'):
        load(content, tmp_path / "x.pth")

    state_dict, facts = load(content | {"grid": (h, w)}, tmp_path / "x.pth")
    assert facts["grid"] == (h, w)
    assert_equal(state_dict, net.state_dict())


def test_what_is_assumed_without_a_config_is_said(net, tmp_path):
    for weights in (net.state_dict(), to_mmseg(net.state_dict()), net.backbone.state_dict()):
        _, facts = load(weights, tmp_path / "x.pth")
        said = convert_weights.describe(facts)
        assert "assumed 2 heads, a square of learned positions" in said
        assert "check that the model is so" in said
    args = {"arch": "toy_p8"}
    _, facts = load({"model": net.state_dict(), "args": args}, tmp_path / "x.pth")
    assert "assumed" not in facts


@pytest.mark.parametrize("to", ["mmseg", "timm", "ours"])
def test_a_whole_model_keeps_its_positions_to_the_bit(to, tmp_path, main):
    net = at_224("toy_p8", "ln_mln", 9)
    write({"model": net.state_dict()}, tmp_path / "a.pt")
    main(convert_weights, tmp_path / "a.pt", tmp_path / "b.pt", "--to", to)

    written = torch.load(tmp_path / "b.pt", weights_only=True)
    tensors = written.get("model") or written.get("state_dict") or written
    found = [v for k, v in tensors.items() if k.endswith("pos_embed")]

    assert len(found) == 1
    assert torch.equal(found[0], net.backbone.pos_embed)


def test_training_on_a_whole_model_goes_on_in_its_grid_and_a_backbone_does_not(tmp_path):
    net = at_224("toy_p8", "ln", 9)
    state_dict, facts = load({"model": net.state_dict()}, tmp_path / "a.pt")
    other = build_model("toy_p8", "ln", 4)
    load_into(other, state_dict, facts, new_classes=True)

    assert torch.equal(other.backbone.pos_embed, net.backbone.pos_embed)

    images = torch.randn(2, 3, 112, 112)
    labels = torch.zeros(2, 112, 112, dtype=torch.int64)
    loss, _ = other(images, labels)
    loss.backward()

    assert other.backbone.pos_embed.grad.shape == (1, 197, 128)

    state_dict, facts = load(net.backbone.state_dict(), tmp_path / "b.pt")
    fresh = build_model("toy_p8", "ln", 4)
    load_into(fresh, state_dict, facts)

    assert fresh.backbone.grid == (16, 16)
    assert fresh.backbone.pos_embed.shape == (1, 257, 128)


def test_a_failed_load_leaves_the_grid_as_it_was(tmp_path):
    net = at_224("toy_p8", "ln", 9)
    state_dict, facts = load({"model": net.state_dict()}, tmp_path / "a.pt")
    other = build_model("toy_p8", "ln", 4)

    with pytest.raises(WeightsError, match="classifier.weight"):
        load_into(other, state_dict, facts)
    assert other.backbone.grid == (16, 16)
    assert other.backbone.pos_embed.shape == (1, 257, 128)


# ---- What is written ----


def test_safetensors_are_not_written_which_is_said_before_anything_is_read(
    tmp_path, main, capsys
):
    with pytest.raises(SystemExit) as end:
        main(convert_weights, tmp_path / "absent.pt", tmp_path / "b.safetensors")
    assert end.value.code == 2
    assert "safetensors are only read" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("same", ["itself", "symbolic link", "hard link", "part"])
def test_a_file_is_not_written_over_itself(net, same, tmp_path, main, capsys):
    src = tmp_path / "a.pt"
    dst = tmp_path / "b.pt"
    if same == "itself":
        dst = tmp_path / "." / "a.pt"
    if same == "part":
        src = tmp_path / "b.pt.part"
    write({"model": net.state_dict()}, src)
    before = src.read_bytes()
    if same == "symbolic link":
        dst.symlink_to(src)
    if same == "hard link":
        dst.hardlink_to(src)

    for source in (src, f"{src}:model"):
        with pytest.raises(SystemExit) as end:
            main(convert_weights, source, dst, "--to", "mmseg")
        assert end.value.code == 2
        assert "give it another name" in capsys.readouterr().err
    assert src.read_bytes() == before


@pytest.mark.parametrize("name", ["log.jsonl", "classes.txt", "best.pt", "device"])
def test_a_conversion_replaces_no_file(name, net, tmp_path, main, capsys):
    """A link stands for /dev/null here: whoever may write to /dev would lose it."""
    write({"model": net.state_dict()}, tmp_path / "a.pt")
    there = tmp_path / name
    if name == "device":
        there.symlink_to("/dev/null")
    else:
        there.write_text("somebody's")

    with pytest.raises(SystemExit) as end:
        main(convert_weights, tmp_path / "a.pt", there)
    assert end.value.code == 2 and f"{there} or {there}.part exists" in capsys.readouterr().err
    assert there.is_symlink() if name == "device" else there.read_text() == "somebody's"
    assert sorted(os.listdir(tmp_path)) == sorted(["a.pt", name])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writer")])
def test_a_full_disk_ends_a_conversion_with_one_sentence(
    error, net, tmp_path, main, monkeypatch, capsys
):
    path = write({"model": net.state_dict()}, tmp_path / "a.pt")

    def save(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as end:
        main(convert_weights, path, tmp_path / "b.pt")
    words = getattr(error, "strerror", None) or error
    sentence = f"b.pt: cannot be written (is the disk full?): {words}\n"
    assert end.value.code == 2 and sentence in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.pt"]


def test_conversions_keep_classes_and_architecture(tmp_path, main):
    net = build_model("deit_t16", "none", 9)
    names = [f"thing {k}" for k in range(9)]
    palette = [[k, k, k] for k in range(9)]
    meta = {"CLASSES": names, "PALETTE": palette, "config": "reduce_zero_label=True"}
    write_mmseg(net.state_dict(), tmp_path / "a.pth", meta=meta)
    main(convert_weights, tmp_path / "a.pth", tmp_path / "b.pt")
    main(convert_weights, tmp_path / "b.pt", tmp_path / "c.pth", "--to", "mmseg")
    main(convert_weights, tmp_path / "c.pth", tmp_path / "d.pt")
    _, facts = load_weights(str(tmp_path / "d.pt"))

    assert facts["arch"] == "deit_t16"
    assert facts["classes"] == (tuple(names), palette, True)

    # As mmsegmentation names them.
    meta = torch.load(tmp_path / "c.pth", weights_only=True)["meta"]
    assert meta == {"CLASSES": tuple(names), "PALETTE": palette}


def test_a_run_converted_to_mmseg_keeps_what_its_labels_mean(tmp_path, main):
    """Saved labels were shifted by one: 0 counted as unlabelled."""
    classes = (("a", "b"), [[9, 0, 0], [0, 9, 0]], False, None)
    args = dict(arch="toy_p8", neck="none", short_side=96)
    net = build_model("toy_p8", "none", 2)
    write({"model": net.state_dict(), "args": args, "classes": classes}, tmp_path / "a.pt")
    main(convert_weights, tmp_path / "a.pt", tmp_path / "b.pth", "--to", "mmseg")
    _, facts = load_weights(str(tmp_path / "b.pth"))

    assert facts["classes"] == classes
    assert facts["args"] == args


def test_colours_of_unlabelled_pixels_come_back_as_they_were_saved(tmp_path):
    palette = [[0, 0, 0], [9, 0, 255]]
    classes = ade20k.Classes(("a", "b"), palette, False, [[1, 2, 3]])
    args = dict(arch="toy_p8", neck="none")
    net = build_model("toy_p8", "none", 2)
    content = {"model": net.state_dict(), "args": args}

    def loaded(classes):
        _, facts = load(content | {"classes": tuple(classes)}, tmp_path / "a.pt")
        return facts.get("classes")

    assert loaded(classes) == tuple(classes)
