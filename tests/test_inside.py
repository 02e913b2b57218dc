"""inside.py: what the sheet shows against plain loops and numpy, its size for any
picture and architecture, and the command line."""

import os
import subprocess
import sys

import formulas
import inside
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, largest_error
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

        backbone = net.backbone
        qkv = backbone.blocks[-1].attn.qkv
        for weight in (backbone.pos_embed, qkv.weight):
            torch.nn.init.normal_(weight, std=0.3)
        return net

    return build


COLOURS = [[40 * k, 0, 200] for k in range(6)]
CLASSES = ade20k.Classes(tuple("abcdef"), COLOURS)


@torch.no_grad()
def test_attention_weights_equal_a_plain_loop_and_make_the_layers_own_output():
    torch.manual_seed(0)
    layer = model.Attention(12, 3)
    x = torch.randn(1, 7, 12)
    queries = [4, 0, 6]
    qkv = layer.qkv(x)[0]

    weights = inside.attention_weights(qkv, 3, queries)
    assert weights.shape == (3, 3, 7)
    sums = weights.sum(2)
    ones = torch.ones(3, 3)
    assert torch.allclose(sums, ones, atol=1e-6)

    q, k, values = qkv.chunk(3, dim=1)
    out = torch.zeros(3, 12)
    for n, query in enumerate(queries):
        for head in range(3):
            start = 4 * head
            part = slice(start, start + 4)
            asked = q[query, part]

            scores = []
            for token in range(7):
                product = asked @ k[token, part]
                scores.append(product / 4**0.5)
            exponentials = torch.stack(scores).exp()
            plain = exponentials / exponentials.sum()
            of_head = weights[n, head]
            assert torch.allclose(of_head, plain, atol=1e-6)

            out[n, part] = of_head @ values[:, part]

    got = layer.proj(out)
    of_all = layer(x)[0]
    want = of_all[queries]
    assert torch.allclose(got, want, atol=1e-6)


def assert_shows_attention(panels, q, k):
    """That the panels, one a head, show what the query q (D) gives the keys k (N, D) of the 4 x 6
    patches, the last of the tokens."""
    for head, (text, colours) in enumerate(panels.items()):
        start = 32 * head
        part = slice(start, start + 32)
        scores = k[:, part] @ q[part]
        scores = scores / 32**0.5
        weights = scores.softmax(0)
        weights = weights[5:]

        brightness = (weights / weights.max()).sqrt()
        as_map = brightness.view(4, 6)
        want = inside.heat(as_map)
        assert largest_error(colours, want) <= 1
        assert text == f"head {head + 1}: {weights.sum():.0%} on patches"


def test_attention_is_that_of_the_class_token_and_of_the_patch_at_the_place(net, monkeypatch):
    rows = []

    def note(title, panels, size):
        rows.append(panels)

    monkeypatch.setattr(inside, "panel_row", note)
    net = net("registers", "mln")
    x = torch.from_numpy(formulas.image(56, 80))  # 4 x 6 patches of 14, of which some hang over
    attention = net.backbone.blocks[-1].attn
    with torch.no_grad():
        seen = inside.watch(net, x, torch.float32)
        inside.attention_rows(net, seen, (0.7, 0.3), (60, 40))

        given, _ = seen[attention.qkv]
        tokens = given[0]  # (5 + 4 * 6, D)
        qkv = tokens @ attention.qkv.weight.T + attention.qkv.bias
        q, k, _ = qkv.chunk(3, dim=1)

    of_class_token, of_patch = rows
    assert len(of_class_token) == attention.heads
    assert len(of_patch) == attention.heads
    assert_shows_attention(of_class_token, q[0], k)
    patch = 5 + 1 * 6 + 4  # row int(0.3 * 4), column int(0.7 * 6), behind class token and registers
    assert_shows_attention(of_patch, q[patch], k)


@pytest.mark.parametrize("h,w", [(3, 5), (16, 16), (1, 9)])
def test_position_similarity_is_the_cosine_of_49_places_with_all(h, w):
    table = torch.randn(1, 1 + h * w, 8)
    positions = table[0, 1:]  # without the class token's
    positions = positions.view(h, w, 8)

    middles = range(1, 14, 2)  # of seven parts, in fourteenths
    rows = [middle * h // 14 for middle in middles]
    columns = [middle * w // 14 for middle in middles]

    high = h + 1
    wide = w + 1
    drawn = inside.position_similarity(table, (h, w))
    assert drawn.shape == (7 * high, 7 * wide)
    tiles = drawn.reshape(7, high, 7, wide)

    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            place = positions[row, column]
            place = place.view(1, 1, 8)
            cosines = F.cosine_similarity(place, positions, dim=2)
            tile = tiles[i, :, j]
            shown = tile[:h, :w]
            assert torch.allclose(shown, cosines, atol=1e-6)

            below = tile[h]
            right = tile[:, w]
            assert (below == 1).all(), "white between the places"
            assert (right == 1).all(), "white between the places"


def in_grey(component, sign):
    """A principal component from black to white: grey its mean, both ends two deviations away."""
    from_black_to_white = 4 * component.std()
    share = sign * component / from_black_to_white
    brightness = 127.5 + 255 * share
    return brightness.clip(0, 255)


@pytest.mark.parametrize("D,h,w", [(8, 5, 7), (20, 2, 3)])
def test_principal_colours_are_numpys_svd_up_to_sign(D, h, w):
    rng = np.random.default_rng(0)
    scale = np.arange(1, D + 1)
    scale = scale.reshape(D, 1, 1)
    noise = rng.normal(size=(D, h, w))
    features = noise * scale

    x = features.reshape(D, -1).T
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    components = u * s  # (h w, D)

    colours = inside.principal_colours(torch.from_numpy(features))
    for channel in range(3):
        got = colours[..., channel].ravel()
        component = components[:, channel]

        errors = []
        for sign in (1, -1):
            want = in_grey(component, sign)
            errors.append(largest_error(got, want))
        assert min(errors) <= 1
        assert max(errors) > 50, "the signs can be told apart"


def test_principal_colours_do_not_depend_on_where_an_axis_points():
    torch.manual_seed(0)
    features = torch.randn(6, 4, 5)
    colours = inside.principal_colours(features)

    order = [3, 0, 4, 1, 2]  # of the columns
    changed = features[:, :, order] * 3 + 1
    again = inside.principal_colours(changed)
    want = colours[:, order]
    assert largest_error(again, want) <= 1
    assert largest_error(again, colours) > 50, "the columns can be told apart"

    inverse = inside.principal_colours(-features)
    want = 255 - colours
    assert largest_error(inverse, want) <= 1


def test_a_map_without_differences_is_grey():
    for shape in ((7, 1, 1), (7, 2, 3)):
        alike = torch.full(shape, 3.0)
        colours = inside.principal_colours(alike)
        assert colours.shape == (*shape[1:], 3)
        assert (colours == 127).all()


def test_confidence_is_one_minus_entropy_by_its_largest_value():
    def of(logits):
        pixel = logits.view(3, 1, 1)
        return inside.confidence(pixel).item()

    sure = torch.tensor([0.0, 200.0, 0.0])
    assert of(sure) == pytest.approx(1)
    unsure = torch.full((3,), 7.0)
    assert of(unsure) == pytest.approx(0, abs=1e-6)

    p = np.array([0.5, 0.25, 0.25])
    log_p = np.log(p)
    entropy = -(p * log_p).sum()
    largest = np.log(3)
    want = 1 - entropy / largest
    logits = torch.from_numpy(log_p)
    assert of(logits) == pytest.approx(want)

    of_one_class = torch.zeros(1, 2, 2)
    sure = inside.confidence(of_one_class)
    assert sure.tolist() == [[1, 1], [1, 1]]


def test_heat_grows_brighter_from_black_to_white():
    values = torch.linspace(-0.5, 1.5, 41)  # 0 is the tenth of them, 1 the thirtieth
    colours = inside.heat(values[None])[0]
    light = colours @ [0.3, 0.59, 0.11]

    black = light[:11]
    between = light[10:31]
    white = light[30:]
    assert black.max() == 0
    steps = np.diff(between)
    assert (steps > 0).all()
    assert white.min() == light.max() > 250


@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_what_is_watched_is_what_the_network_computes(compiled, net):
    net = net("toy_p8", "mln")
    cpu = torch.device("cpu")
    net = evaluate.prepare(net, cpu, torch.float32, compiled)
    head = net.decode_head
    x = torch.from_numpy(formulas.image(60, 90))

    seen = inside.watch(net, x, torch.float32)
    for module in net.modules():
        assert not module._forward_hooks, "nothing stays behind"

    inputs = {}
    outputs = {}
    for module, (given, made) in seen.items():
        inputs[module] = given
        outputs[module] = made

    with torch.compiler.set_stance("force_eager"):
        maps = net.backbone(x)
        features = net.features(x)
        logits = head(features)
    assert torch.equal(outputs[head], logits)
    for got, want in zip(outputs[net.backbone], maps, strict=True):
        assert torch.equal(got, want)

    top = outputs[head.bottleneck.bn]
    assert (top >= 0).all()  # behind the ReLU
    finer = inputs[head][2]
    lateral = outputs[head.lateral_convs[2]]
    size = finer.shape[2:]
    coarser = resize(top, size)
    merged = inputs[head.fpn_convs[2]]
    assert torch.equal(merged, lateral + coarser)

    fused = inputs[head.classifier]
    logits = head.classifier(fused)
    assert torch.equal(logits, outputs[head])


STRIPS = [(1, 1), (1, 10000), (10000, 1), (7, 300), (37, 41)]


@pytest.mark.parametrize("height,width", STRIPS)
def test_the_sheet_of_any_strip_has_all_panels(height, width, net):
    image = np.full((height, width, 3), 99, np.uint8)
    label = np.zeros((height, width), np.uint8)
    net = net()

    place = (0.99, 0.0)
    sheet = inside.look_inside(net, image, label, CLASSES, place, short=32)
    around = sheet.width + sheet.height
    assert 1300 < around < 3200


NETWORKS = [
    ("toy_p8", "none", 0),
    ("small", "ln_mln", 1),
    ("registers", "mln", 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch,neck,rows", NETWORKS)
def test_the_sheet_of_any_network_has_a_row_for_its_neck_if_it_has_one(
    arch, neck, rows, dtype, net, monkeypatch
):
    image = formulas.picture(60, 90)
    net = net(arch, neck)
    label = evaluate.predict(net, image, short=64)
    map_rows = inside.map_rows
    drawn_rows = []

    def note(*parts):
        drawn_rows.extend(map_rows(*parts))
        return drawn_rows

    monkeypatch.setattr(inside, "map_rows", note)
    sheet = inside.look_inside(net, image, label, CLASSES, short=64, dtype=dtype)
    assert len(drawn_rows) == 4 + rows
    heights = [row.height for row in drawn_rows]
    assert sheet.height > sum(heights) > 4 * 133

    pixels = np.asarray(sheet).reshape(-1, 3)
    colours = set(map(tuple, pixels))
    for value in np.unique(label):
        colour = CLASSES.palette[value]
        assert tuple(colour) in colours


@pytest.fixture
def folder(tmp_path, net, monkeypatch):
    """A working directory with a checkpoint under runs, and a folder of two pictures."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/a")
    os.makedirs("in")

    content = {
        "model": net().state_dict(),
        "iteration": 5,
        "args": dict(arch="toy_p8", neck="none", data="set", short_side=48),
        "classes": tuple(CLASSES),
    }
    torch.save(content, "runs/a/checkpoint_5.pt")
    open("runs/a/log.jsonl", "w").close()
    for name in ("a", "b"):
        picture = Image.fromarray(formulas.picture(40, 60))
        picture.save(f"in/{name}.png")


def test_the_program_draws_a_sheet_of_each_picture(folder):
    script = os.path.join(ROOT, "tests", "inside.py")
    one = ("--image", "in/a.png", "--out", "corner", "--at", "0", "0.99")
    for arguments in (("--image", "in", "--out", "out"), one):
        command = [sys.executable, script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    assert sorted(os.listdir("out")) == ["a_inside.png", "b_inside.png"]
    middle = np.asarray(Image.open("out/a_inside.png"))
    corner = np.asarray(Image.open("corner/a_inside.png"))
    assert middle.shape == corner.shape
    assert (middle != corner).any()


IMPOSSIBLE = [
    (["--image", "in"], "--out"),
    (["--image", "in", "--out", "out", "--at", "0.5", "1"], "--at needs two numbers of 0 or more"),
    (["--image", "in", "--out", "out", "--at", "0.5", "-1"], "--at: -1 is not a number from 0 to"),
    (["--image", "in", "--out", "out", "--at", "0.5"], "--at: expected 2 arguments"),
    (["--image", "none.png", "--out", "out"], "none.png"),
    (["--image", "in", "--out", "out", "--checkpoint", "none.pt"], "none.pt"),
]


@pytest.mark.parametrize("arguments,message", IMPOSSIBLE)
def test_what_makes_no_sense_is_refused_in_one_sentence(arguments, message, folder, main, capsys):
    with pytest.raises(SystemExit) as end:
        main(inside, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
