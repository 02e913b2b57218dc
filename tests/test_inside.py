"""evaluate.py --inside: what the sheet shows against plain loops and numpy, its size for any
picture and architecture, and the command line."""

import os

import formulas
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ade20k
import evaluate
import model
from upernet import build_model, resize

REGISTERS = dict(formulas.SMALL, patch=14, grid=5, registers=4, layer_scale=True)


@pytest.fixture
def net(monkeypatch):
    """net(arch, neck) -> a model of six classes, in eval mode, that is sure of something."""
    monkeypatch.setitem(model.ARCHS, "registers", REGISTERS)

    def build(arch="toy_p8", neck="none"):
        torch.manual_seed(0)
        net = build_model(arch, neck, 6).eval()
        torch.nn.init.normal_(net.decode_head.classifier.weight)
        for weight in (net.backbone.pos_embed, net.backbone.blocks[-1].attn.qkv.weight):
            torch.nn.init.normal_(weight, std=0.3)
        return net

    return build


CLASSES = ade20k.Classes(tuple("abcdef"), [[40 * k, 0, 200] for k in range(6)])


@torch.no_grad()
def test_attention_weights_equal_a_plain_loop_and_make_the_layers_own_output():
    torch.manual_seed(0)
    layer, x, queries = model.Attention(12, 3), torch.randn(1, 7, 12), [4, 0, 6]
    qkv = layer.qkv(x)[0]
    weights = evaluate.attention_weights(qkv, 3, queries)
    assert weights.shape == (3, 3, 7)
    assert torch.allclose(weights.sum(2), torch.ones(3, 3), atol=1e-6)

    values = qkv[:, 24:]
    out = torch.zeros(3, 12)
    for n, query in enumerate(queries):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            q = qkv[query, :12][part]
            scores = torch.stack([q @ qkv[token, 12:24][part] / 4**0.5 for token in range(7)])
            plain = scores.exp() / scores.exp().sum()
            assert torch.allclose(weights[n, head], plain, atol=1e-6)
            out[n, part] = weights[n, head] @ values[:, part]
    assert torch.allclose(layer.proj(out), layer(x)[0, queries], atol=1e-6)


def test_attention_is_that_of_the_class_token_and_of_the_patch_at_the_place(net, monkeypatch):
    net, rows = net("registers", "mln"), []
    monkeypatch.setattr(evaluate, "panel_row", lambda title, panels, size: rows.append(panels))
    x = torch.from_numpy(formulas.image(56, 80))  # 4 x 6 patches of 14, of which some hang over
    with torch.no_grad():
        seen = evaluate.watch(net, x, torch.float32)
        evaluate.attention_rows(net, seen, (0.7, 0.3), (60, 40))
        attention = net.backbone.blocks[-1].attn
        tokens = seen[attention.qkv][0][0]  # (5 + 4 * 6, D)
        q, k, _ = (tokens @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=1)

    patch = 5 + 1 * 6 + 4  # row int(0.3 * 4), column int(0.7 * 6), behind class token and registers
    for panels, query in zip(rows, (0, patch), strict=True):
        assert len(panels) == attention.heads
        for head, (text, colours) in enumerate(panels.items()):
            part = slice(32 * head, 32 * head + 32)
            weights = (k[:, part] @ q[query, part] / 32**0.5).softmax(0)[5:]
            want = evaluate.heat((weights / weights.max()).sqrt().view(4, 6))
            assert np.abs(colours.astype(int) - want).max() <= 1
            assert text == f"head {head + 1}: {weights.sum():.0%} on patches"


@pytest.mark.parametrize("h,w", [(3, 5), (16, 16), (1, 9)])
def test_position_similarity_is_the_cosine_of_49_places_with_all(h, w):
    table = torch.randn(1, 1 + h * w, 8)
    drawn = evaluate.position_similarity(table, (h, w))
    assert drawn.shape == (7 * (h + 1), 7 * (w + 1))
    for i in range(7):
        for j in range(7):
            place = table[0, 1 + (2 * i + 1) * h // 14 * w + (2 * j + 1) * w // 14]
            cosines = F.cosine_similarity(place[None], table[0, 1:]).view(h, w)
            part = drawn[i * (h + 1) :, j * (w + 1) :]
            assert torch.allclose(part[:h, :w], cosines, atol=1e-6)
            assert (part[h, : w + 1] == 1).all() and (part[: h + 1, w] == 1).all()


@pytest.mark.parametrize("D,h,w", [(8, 5, 7), (20, 2, 3)])
def test_principal_colours_are_numpys_svd_up_to_sign(D, h, w):
    features = np.random.default_rng(0).normal(size=(D, h, w)) * np.arange(1, D + 1)[:, None, None]
    colours = evaluate.principal_colours(torch.from_numpy(features))
    x = features.reshape(D, -1).T
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)

    for channel in range(3):
        component = u[:, channel] * s[channel]
        grey = [
            np.clip(127.5 + sign * 255 * component / (4 * component.std()), 0, 255)
            for sign in (1, -1)
        ]
        error = [np.abs(colours[..., channel].ravel() - want).max() for want in grey]
        assert min(error) <= 1 and max(error) > 50


def test_principal_colours_do_not_depend_on_where_an_axis_points():
    features = torch.randn(6, 4, 5)
    colours = evaluate.principal_colours(features).astype(int)
    again = evaluate.principal_colours(features[:, :, [0, 1, 2, 3, 4]] * 3 + 1).astype(int)
    inverse = evaluate.principal_colours(-features).astype(int)
    assert np.abs(again - colours).max() <= 1 and np.abs(inverse - (255 - colours)).max() <= 1


def test_a_map_without_differences_is_grey():
    for shape in ((7, 1, 1), (7, 2, 3)):
        colours = evaluate.principal_colours(torch.full(shape, 3.0))
        assert colours.shape == (*shape[1:], 3) and (colours == 127).all()


def test_confidence_is_one_minus_entropy_by_its_largest_value():
    sure = torch.tensor([0.0, 200.0, 0.0]).view(3, 1, 1)
    assert evaluate.confidence(sure).item() == pytest.approx(1)
    assert evaluate.confidence(torch.full((3, 1, 1), 7.0)).item() == pytest.approx(0, abs=1e-6)
    p = np.array([0.5, 0.25, 0.25])
    logits = torch.from_numpy(np.log(p)).view(3, 1, 1)
    want = 1 + (p * np.log(p)).sum() / np.log(3)
    assert evaluate.confidence(logits).item() == pytest.approx(want)
    assert evaluate.confidence(torch.zeros(1, 2, 2)).tolist() == [[1, 1], [1, 1]]  # of one class


def test_heat_grows_brighter_from_black_to_white():
    values = torch.linspace(-0.5, 1.5, 41)[None]
    light = evaluate.heat(values)[0] @ [0.3, 0.59, 0.11]
    assert light[:11].max() == 0 and (np.diff(light[10:31]) > 0).all()
    assert light[30:].min() == light.max() > 250


@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_what_is_watched_is_what_the_network_computes(compiled, net):
    net = evaluate.prepare(net("toy_p8", "mln"), torch.device("cpu"), torch.float32, compiled)
    head, x = net.decode_head, torch.from_numpy(formulas.image(60, 90))
    seen = evaluate.watch(net, x, torch.float32)
    assert not any(module._forward_hooks for module in net.modules())  # nothing stays behind

    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(seen[head][1], head(net.features(x)))
        for got, want in zip(seen[net.backbone][1], net.backbone(x), strict=True):
            assert torch.equal(got, want)
    top = seen[head.bottleneck.bn][1]
    assert (top >= 0).all()  # behind the ReLU
    want = seen[head.lateral_convs[2]][1] + resize(top, seen[head][0][2].shape[2:])
    assert torch.equal(seen[head.fpn_convs[2]][0], want)
    assert torch.equal(head.classifier(seen[head.classifier][0]), seen[head][1])


@pytest.mark.parametrize("height,width", [(1, 1), (1, 10000), (10000, 1), (7, 300), (37, 41)])
def test_the_sheet_of_any_strip_has_all_panels(height, width, net):
    image, net = np.full((height, width, 3), 99, np.uint8), net()
    label = np.zeros((height, width), np.uint8)
    drawn = evaluate.look_inside(net, image, label, CLASSES, (0.99, 0.0), short=32)
    assert 1300 < drawn.width + drawn.height < 3200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arch,neck,rows", [("toy_p8", "none", 0), ("small", "ln_mln", 1), ("registers", "mln", 1)]
)
def test_the_sheet_of_any_network_has_a_row_for_its_neck_alone(
    arch, neck, rows, dtype, net, monkeypatch
):
    image = formulas.picture(60, 90)
    net = net(arch, neck)
    label, drawn_rows, map_rows = evaluate.predict(net, image, short=64), [], evaluate.map_rows
    monkeypatch.setattr(
        evaluate, "map_rows", lambda *parts: drawn_rows.extend(map_rows(*parts)) or drawn_rows
    )
    drawn = evaluate.look_inside(net, image, label, CLASSES, short=64, dtype=dtype)
    assert len(drawn_rows) == 4 + rows
    assert drawn.height > sum(row.shape[0] for row in drawn_rows) > 4 * 133
    colours = set(map(tuple, np.asarray(drawn).reshape(-1, 3)))
    assert {tuple(CLASSES.palette[k]) for k in np.unique(label)} <= colours


@pytest.fixture
def folder(tmp_path, net, monkeypatch):
    """A working directory with a checkpoint under runs, and a folder of two pictures."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/a")
    os.makedirs("in")
    args = dict(arch="toy_p8", neck="none", data="set", short_side=48)
    content = {"model": net().state_dict(), "iteration": 5, "args": args}
    torch.save(content | {"classes": tuple(CLASSES)}, "runs/a/checkpoint_5.pt")
    for name in ("a", "b"):
        Image.fromarray(formulas.picture(40, 60)).save(f"in/{name}.png")


def test_the_option_writes_one_more_sheet_a_picture(folder, main, capsys):
    main(evaluate, "--image", "in", "--show", "plain", "--workers", 0)
    assert sorted(os.listdir("plain")) == ["a.png", "b.png"]
    main(evaluate, "--image", "in", "--show", "out", "--workers", 0, "--inside")
    names = ["a.png", "a_inside.png", "b.png", "b_inside.png"]
    assert sorted(os.listdir("out")) == names
    assert "out: 2 more, *_inside.png" in capsys.readouterr().out
    for name in ("a.png", "b.png"):
        with open(f"plain/{name}", "rb") as plain, open(f"out/{name}", "rb") as other:
            assert plain.read() == other.read()

    main(evaluate, "--image", "in", "--show", "corner", "--workers", 0, "--inside", "--at", 0, 0)
    middle, corner = (np.asarray(Image.open(f"{name}/a_inside.png")) for name in ("out", "corner"))
    assert middle.shape == corner.shape and (middle != corner).any()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--save-labels", "out", "--inside"), "--inside needs --show DIR"),
        (("--show", "out", "--at", "0.5", "0.5"), "add --inside"),
        (("--show", "out", "--inside", "--at", "0.5", "1"), "--at: '1' is not a number of 0 or"),
        (("--show", "out", "--inside", "--at", "0.5"), "--at: expected 2 arguments"),
        (("--show", "in", "--inside"), "in/a.png would replace in/a.png, which is read"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(arguments, message, folder, main, capsys):
    with pytest.raises(SystemExit) as end:
        main(evaluate, "--image", "in", *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not os.path.exists("out")


def test_no_sheet_replaces_a_file_that_is_read_or_another_sheet(folder, main, capsys):
    os.rename("in/b.png", "in/a_inside.png")
    for arguments, message in (
        (("in", "--show", "out"), "out/a_inside.png would hold both what is made of"),
        (("in/a.png", "--show", "in/deep/.."), "in/deep/../a.png would replace in/a.png"),
    ):
        with pytest.raises(SystemExit) as end:
            main(evaluate, "--image", *arguments, "--inside")
        assert end.value.code == 2 and message in capsys.readouterr().err
    os.link("runs/a/checkpoint_5.pt", "c_inside.png")
    Image.fromarray(formulas.picture(40, 60)).save("c.jpg")
    with pytest.raises(SystemExit):
        main(evaluate, "--image", "c.jpg", "--show", ".", "--inside")
    assert "c_inside.png would replace runs/a/checkpoint_5.pt" in capsys.readouterr().err
