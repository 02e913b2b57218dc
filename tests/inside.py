"""What becomes of a picture on its way through the network, on one sheet: attention, positions, the
maps from backbone to classifier, confidence.

    python tests/inside.py --checkpoint FILE --image FILE --out DIR [--at X Y]

draws DIR/NAME_inside.png. The numbers come first, then where they are taken from (hooks on the
model's own modules), then the sheet, row by row, and the program."""

import argparse
import math
import os
import sys
import textwrap

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor, nn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import evaluate  # noqa: E402
from ade20k import (  # noqa: E402
    Classes,
    errors_in_one_sentence,
    load_image,
    normalise,
    resize_bilinear,
    say,
    scaled_size,
)
from evaluate import caption, legend, palette, stack, view_logits  # noqa: E402
from upernet import Segmenter, resize  # noqa: E402

SIDE = 200  # of a panel, in pixels: the longer one
RAMP = (  # red, green and blue of black, violet, red, orange, white
    (0, 87, 205, 252, 255),
    (0, 16, 65, 175, 255),
    (0, 110, 70, 60, 235),
)


def attention_weights(qkv: Tensor, heads: int, queries: list[int]) -> Tensor:
    """What Attention never holds: softmax(q k^T / sqrt(d)), here only of some tokens. qkv
    (N, 3 D), as Attention.qkv returns it -> (queries, heads, N); each row sums to 1."""
    qkv = qkv.float().reshape(len(qkv), 3, heads, -1)
    q, k, _ = qkv.permute(1, 2, 0, 3)  # each (heads, N, d)

    d = q.shape[2]
    products = q[:, queries] @ k.mT  # (heads, queries, N)
    scores = products / math.sqrt(d)
    weights = scores.softmax(2)
    return weights.transpose(0, 1)


def position_similarity(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines of the learned positions of 7 x 7 places with all positions: (1, 1 + h w, D) -> 7 x 7
    maps of (h, w) as one, a line apart."""
    h, w = grid
    table = nn.functional.normalize(pos_embed[0, 1:], dim=1)  # (h w, D)
    cosines = table @ table.T
    cosines = cosines.view(h, w, h, w)

    middles = torch.arange(1, 14, 2)  # of seven parts, in fourteenths
    rows = middles * h // 14
    columns = middles * w // 14
    cosines = cosines[rows][:, columns]  # (7, 7, h, w)

    cosines = nn.functional.pad(cosines, (0, 1, 0, 1), value=1)
    return cosines.transpose(1, 2).reshape(7 * h + 7, 7 * w + 7)


def confidence(logits: Tensor) -> Tensor:
    """1 - entropy / log C: 1 where one class is certain, 0 where all are alike. (C, h, w) ->
    (h, w)"""
    p = logits.softmax(0)
    entropy = torch.special.entr(p).sum(0)  # entr(p) is -p log p, and 0 at 0
    largest = math.log(max(2, len(p)))
    return 1 - entropy / largest


def principal_colours(features: Tensor) -> ndarray:
    """Show D channels as three: (D, h, w) -> (h, w, 3) uint8. Red, green and blue are the first
    three principal components: grey their mean, black and full two standard deviations from it.

    The axes are eigenvectors of the covariance (D, D), which is small however large the map is."""
    x = features.float().flatten(1).T  # (h w, D)
    x = x - x.mean(0)
    covariance = x.T @ x  # up to a factor
    _, axes = torch.linalg.eigh(covariance)  # in columns, the one of the largest variance last
    axes = axes[:, -3:].flip(1)  # (D, 3)
    signs = axes.sum(0).sign()  # an axis may point either way: here to where its sum is positive
    x = x @ (axes * signs)  # (h w, 3)

    deviation = x.std(0, correction=0).clamp(min=1e-9)
    x = 0.5 + x / (4 * deviation)
    colours = (255 * x.clamp(0, 1)).byte()
    return colours.view(*features.shape[1:], 3).cpu().numpy()


def heat(values: Tensor) -> ndarray:
    """(h, w) -> (h, w, 3) uint8, from black, 0 or less, by violet and orange to white, 1."""
    values = values.cpu().numpy()
    stops = np.linspace(0, 1, 5)
    channels = [np.interp(values, stops, channel) for channel in RAMP]
    return np.stack(channels, axis=2).astype(np.uint8)


def watch(model: Segmenter, x: Tensor, dtype: torch.dtype) -> dict:
    """Label a normalised picture (1, 3, H, W) -> {module: (input, output)} of those worth a look.
    (The BatchNorm of the bottleneck stands for the bottleneck: the ReLU changes its output in
    place.)"""
    backbone, head = model.backbone, model.decode_head
    modules = [
        backbone,
        backbone.blocks[-1].attn.qkv,
        head,
        *head.lateral_convs,
        head.bottleneck.bn,
        *head.fpn_convs,
        head.classifier,
    ]

    seen = {}

    def note(module, inputs, output):
        seen[module] = inputs[0], output

    hooks = [module.register_forward_hook(note) for module in modules]
    with torch.compiler.set_stance("force_eager"):  # compiled modules may skip hooks
        view_logits(model, x, dtype)
    for hook in hooks:
        hook.remove()
    return seen


def panel_row(title: str, panels: dict[str, ndarray], size: tuple[int, int]) -> Image.Image:
    """A title above panels, six side by side. panels: {caption: (h, w, 3) uint8}, all drawn at one
    size, (width, height), each place a rectangle."""
    drawn = []
    for text, colours in panels.items():
        picture = Image.fromarray(colours)
        picture = picture.resize(size, Image.Resampling.NEAREST)
        drawn.append(stack([caption(text), picture], 0))

    parts = [caption(line) for line in textwrap.wrap(title, 100)]
    for start in range(0, len(drawn), 6):
        row = drawn[start : start + 6]
        parts.append(stack(row, 1))
    return stack(parts, 0)


def attention_rows(model: Segmenter, seen: dict, at: tuple, size: tuple) -> list:
    """Where each head of the last layer looks, for the class token and for the patch at a place."""
    backbone = model.backbone
    attention = backbone.blocks[-1].attn
    _, maps = seen[backbone]
    h, w = maps[0].shape[2:]
    row = int(at[1] * h)
    column = int(at[0] * w)
    token = backbone.extra + row * w + column

    _, qkv = seen[attention.qkv]  # (1, N, 3 D)
    weights = attention_weights(qkv[0], attention.heads, [0, token])
    titles = (
        "Attention of the class token in the last layer, as square roots. Nothing here reads its "
        "answer: a pretrained backbone still looks where it was taught to.",
        "Attention of the marked patch in the last layer: where each head fetches what it adds "
        "there. A head with nothing to add may rest on the class token, or on registers.",
    )

    rows = []
    for title, of_heads in zip(titles, weights):
        panels = {}
        for head, of_tokens in enumerate(of_heads, start=1):
            x = of_tokens[backbone.extra :].view(h, w)
            bright = (x / x.max().clamp(min=1e-30)).sqrt()
            panels[f"head {head}: {x.sum():.0%} on patches"] = heat(bright)
        rows.append(panel_row(title, panels, size))
    return rows


def map_rows(model: Segmenter, seen: dict, size: tuple) -> list:
    """What becomes of the four maps, from the backbone to the classifier, a level a column; the
    last panel is all of them as one."""
    head = model.decode_head
    laterals = [seen[module][1] for module in (*head.lateral_convs, head.bottleneck.bn)]
    top_down = [seen[module][0] for module in head.fpn_convs]
    smoothed = [seen[module][1] for module in head.fpn_convs]
    stages = {
        "The backbone's maps, after each quarter of its layers. Red, green and blue are the first "
        "three principal components of each: colours tell its places apart, not maps.":
            seen[model.backbone][1],
        "The maps after the neck.": seen[head][0] if model.neck else [],
        "Head, laterals: 1 x 1 convolutions. The last map is pooled over the whole picture first, "
        "so that each of its places knows the scene.": laterals,
        "Head, top-down: each level plus the coarser one on its right.": top_down,
        "Head, smoothed: 3 x 3 convolutions. Last, all four levels as one map: the classifier "
        "reads a place's label from its channels.": [*smoothed, seen[head.classifier][0]],
    }

    rows = []
    for title, maps in stages.items():
        panels = {}
        for level, x in enumerate(maps, start=1):
            panels[f"{level}: {x.shape[3]} x {x.shape[2]}"] = principal_colours(x[0])
        if panels:
            rows.append(panel_row(title, panels, size))
    return rows


def overview(image: ndarray, label: ndarray, logits: Tensor, at: tuple, size: tuple) -> dict:
    """Panels of the picture, with a ring around the place, of its label, both (H, W, 3) uint8, and
    of the confidence, from logits (1, C, h, w)."""
    width, height = size
    picture = Image.fromarray(image).resize(size)
    x, y = at[0] * width, at[1] * height
    ring = (x - 6, y - 6, x + 6, y + 6)
    ImageDraw.Draw(picture).ellipse(ring, outline="cyan", width=2)

    logits = resize(logits.float(), (height, width))
    sure = confidence(logits[0])
    return {
        "picture": np.asarray(picture),
        "label": label,
        f"confidence, mean {sure.mean():.2f}": heat(sure),
    }


@torch.inference_mode()
def look_inside(
    model: Segmenter,
    image: ndarray,
    prediction: ndarray,
    classes: Classes,
    at: tuple[float, float] = (0.5, 0.5),
    short: int = 512,
    dtype: torch.dtype = torch.float32,
) -> Image.Image:
    """The sheet of a picture (H, W, 3) and its label (H, W), both uint8; the network sees it as at
    scale 1. at: the place (x, y) whose attention is shown, from 0, left and top, to below 1."""
    backbone = model.backbone
    h, w = scaled_size(*image.shape[:2], short, 1)
    x = torch.tensor(resize_bilinear(image, h, w))
    x = x[None].to(backbone.pos_embed.device)  # (1, 3, h, w)
    seen = watch(model, normalise(x), dtype)

    # All panels have one size. A strip is drawn thicker than it is, to be seen.
    size = tuple(max(SIDE // 8, SIDE * n // max(h, w)) for n in (w, h))

    _, logits = seen[model.decode_head]
    cosines = position_similarity(backbone.pos_embed, backbone.grid)
    left = [
        panel_row(
            f"The picture, {w} x {h} pixels for the network; its label; how sure that is: "
            "1 - entropy / log C, white where certain, black where all classes are alike.",
            overview(image, palette(classes)[prediction], logits, at, size),
            size,
        ),
        panel_row(
            "Learned positions: the cosine of one place's vector with all others, white 1, black 0 "
            "or less (ViT, figure 7). Nobody told the network which patches are neighbours.",
            {"7 x 7 places": heat(cosines)},
            (2 * SIDE, 2 * SIDE),
        ),
        *attention_rows(model, seen, at, size),
    ]
    panels = stack([stack(left, 0), stack(map_rows(model, seen, size), 0)], 1)
    below = legend([prediction], classes, panels.width)
    return stack([panels, below], 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default="runs", help="as evaluate.py's (default: the newest run)")
    add("--image", required=True, help="a picture, or a folder of pictures")
    add("--out", required=True, metavar="DIR", help="where NAME_inside.png goes")
    add("--at", nargs=2, type=evaluate.at_least(0, float), default=(0.5, 0.5), metavar=("X", "Y"),
        help="the place whose attention is shown, in parts of width and height (default: 0.5 0.5)")
    args = parser.parse_args()
    if max(args.at) >= 1:
        parser.error("--at needs two numbers of 0 or more and below 1")
    with errors_in_one_sentence():
        draw(args)


def draw(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    _, _, device = evaluate.setup_processes()
    dtype = evaluate.choose_dtype("auto", device)
    checkpoint = evaluate.choose_checkpoint(args.checkpoint)
    model, facts = evaluate.load_model(checkpoint)
    model = evaluate.prepare(model, device, dtype, compiled=False)
    short = facts.get("args", {}).get("short_side", 512)
    pairs, classes, _ = evaluate.find_data(args, facts)

    os.makedirs(args.out, exist_ok=True)
    for path, _ in pairs:
        image = load_image(path)
        prediction = evaluate.predict(model, image, short=short, dtype=dtype)
        sheet = look_inside(model, image, prediction, classes, args.at, short, dtype)
        stem, _ = os.path.splitext(os.path.basename(path))
        path = os.path.join(args.out, stem + "_inside.png")
        sheet.save(path)
        say(path)


if __name__ == "__main__":
    main()
