"""The toy data set: outdoor scenes drawn by code, to try everything before the real download.

    python ade20k.py toy DIR, or --data toy    96 training and 24 validation pictures, 256 x 192

Training cuts 96 x 96 pixels out of them, 12 x 12 patches of toy_p8. Its positions are a table of
16 x 16, as if for 128 x 128: so the toy run resizes positions too, as every model does that was
pretrained at another size.

A scene is a small world in metres: x to the right, y up, z away from the eye, the ground at y = 0.
The eye stands at (0, eye, 0) and looks along z. By similar triangles the point (x, y, z) appears at

    column = WIDTH / 2 + FOCAL * x / z
    row    = horizon   + FOCAL * (eye - y) / z        (at y = 0, far away: the horizon itself)

Sky and ground are computed pixel by pixel: a row below the horizon shows the ground at the depth
z = FOCAL * eye / (row - horizon). Things are flat polygons, drawn over them from far to near, into
the picture and the label alike.

To add a thing, add its parts to THINGS and let a scene place it. To add a scene, add it to SCENES.
Either changes the pictures that a seed draws, and with them every number measured on them.
"""

import os
import shutil
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates, maximum_filter, minimum_filter

HEIGHT, WIDTH = 192, 256  # of a picture, in pixels
FOCAL = 220  # distance from the eye to the picture's plane, in pixels
HAZE = 450  # metres after which the haze has swallowed all but 1 / e of a colour
ENLARGED = 3  # things are drawn so much larger and then shrunk, for smooth edges

# What ADE20K's label files hold for these classes: index + 1. 0 is "not labelled".
VALUES = {
    "building": 2,
    "sky": 3,
    "tree": 5,
    "road": 7,
    "grass": 10,
    "sidewalk": 12,
    "person": 13,
    "mountain": 17,
    "car": 21,
    "house": 26,
    "sea": 27,
    "sand": 47,
    "flower": 67,
    "boat": 77,
    "nothing": 0,
}

Colour = tuple[int, int, int]  # RGB, 0..255

DARK = (36, 38, 46)
GLASS = (84, 112, 134)
CREAM = (236, 228, 212)
SNOW = (246, 248, 252)
WOOD = (104, 74, 54)
SKIN = (226, 178, 146)
SHADE = (50, 90, 48)
LEAF = (74, 120, 56)
GRASS = (112, 148, 66)
SEA = (44, 116, 138)
SAND = (228, 202, 148)
ROAD = (84, 86, 92)
PAVING = (178, 172, 172)
WALL = (190, 156, 138)
ROCK = (88, 94, 122)
DISTANT_ROCK = (128, 134, 156)
RED = (172, 70, 52)

# One of these by chance, where a part of a thing has no colour of its own.
BRIGHT = [
    (206, 62, 54),
    (240, 184, 60),
    (52, 104, 176),
    (238, 236, 228),
    (224, 112, 158),
    (60, 150, 140),
]


class Light(NamedTuple):
    sun: tuple[float, float, float]  # what red, green and blue are multiplied by
    zenith: Colour  # of the sky above
    haze: Colour  # of the sky at the horizon, and of everything far away
    shadow: float  # how much darker shadows are, 0..1


LIGHTS = [
    Light((1.06, 1.03, 0.97), (66, 128, 205), (186, 216, 236), 0.5),  # noon
    Light((1.14, 0.93, 0.70), (94, 124, 184), (255, 208, 150), 0.55),  # a golden evening
    Light((0.86, 0.90, 0.94), (140, 153, 168), (206, 212, 216), 0.25),  # overcast
]


# ---- things --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Polygons of one colour (None: one of BRIGHT by chance). x, y, z: the corners in metres, from
    the place where the thing stands: a list, an array (polygons, corners), or a number for all."""

    colour: Colour | None
    x: list | ndarray | float
    y: list | ndarray | float
    z: list | ndarray | float = 0


class Thing(NamedTuple):
    """Parts from back to front, and what they are labelled as, see VALUES."""

    label: str
    parts: list[Part]


def regular_polygon(n: int, x, y, rx: float, ry: float) -> tuple[ndarray, ndarray]:
    """The n corners around the centre (x, y): a box for n = 4, rounder for more. rx, ry: from the
    centre to the middle of a side. Lists make several polygons. -> x, y: (polygons, n)"""
    x, y, rx, ry = (np.reshape(v, (-1, 1)) for v in (x, y, rx, ry))
    corner = np.arange(n) + 0.5
    angle = corner * 2 * np.pi / n
    sine = np.sin(angle)
    cosine = np.cos(angle)

    half_a_side = np.pi / n
    to_side = np.cos(half_a_side)  # from the centre, where a corner is at the distance 1
    across = rx * sine / to_side
    up = -ry * cosine / to_side
    return x + across, y + up


def ring(n: int, colour: Colour | None, x, y, rx: float, ry: float) -> Part:
    """Regular polygons that face the eye."""
    x, y = regular_polygon(n, x, y, rx, ry)
    return Part(colour, x, y)


def box(colour: Colour | None, x, y, rx: float, ry: float) -> Part:
    """Rectangles that face the eye."""
    return ring(4, colour, x, y, rx, ry)


def windows() -> Part:
    """Panes on the wall x = 0 of a building, in rows along y and z."""
    heights, depths = np.mgrid[2:9:2.4, -11:0:1.9]
    y, z = regular_polygon(4, heights, depths, 0.7, 0.5)
    return Part(GLASS, 0, y, z)


THINGS = {
    "tree": Thing("tree", [
        Part(WOOD, [-0.2, 0.2, 0.1, -0.1], [0, 0, 3, 3]),
        ring(10, SHADE, [0.3, 0], [2.9, 3.8], 1.5, 1.2),
        ring(10, LEAF, [-0.5, -0.2], [3.1, 4.1], 1, 0.8),
        ring(10, GRASS, -0.6, 3.8, 0.6, 0.6),
    ]),
    "fir": Thing("tree", [
        ring(3, SHADE, 0, [0.8, 2, 3.2], [0.9, 0.7, 0.5], 0.8),
        Part(LEAF, [-1.2, -0.3, 0], [0.1, 0, 4.6]),
    ]),
    "flower": Thing("flower", [
        ring(9, SHADE, 0, 0.28, 0.9, 0.45),
        ring(6, None, [-0.55, 0.55, 0, -0.25, 0.25, 0.1],
             [0.36, 0.3, 0.56, 0.22, 0.1, 0.33], 0.22, 0.17),
    ]),
    "car": Thing("car", [
        box(DARK, [-0.6, 0.6], 0.25, 0.2, 0.25),
        Part(None, [-1, 1, 1, 0.7, -0.7, -1], [0.3, 0.3, 0.9, 1.5, 1.5, 0.9]),
        Part(GLASS, [-0.75, 0.75, 0.55, -0.55], [0.95, 0.95, 1.4, 1.4]),
        box(RED, [-0.75, 0.75], 0.75, 0.15, 0.1),
    ]),
    "person": Thing("person", [
        box(DARK, [-0.16, 0.16], 0.6, 0.14, 0.6),
        Part(None, [-0.48, 0.48, 0.36, -0.36], [1, 1, 1.85, 1.85]),
        ring(8, SKIN, 0, 2.06, 0.21, 0.22),
        box(WOOD, 0, 2.24, 0.21, 0.09),
    ]),
    "house": Thing("house", [
        Part(CREAM, [-5, -2, -2, -3.5, -5], [0, 0, 2.8, 4.8, 2.8]),
        box(PAVING, 1.5, 1.4, 3.5, 1.4),
        Part(RED, [-3.6, 3.5, 5.4, -1.9], [4.9, 4.9, 2.6, 2.6]),
        box(GLASS, [-3.5, -0.4, 2, 4], 1.5, 0.5, 0.5),
    ]),
    "boat": Thing("boat", [
        box(WOOD, 0, 3.5, 0.1, 3.5),
        Part(CREAM, [-0.2, -0.2, -2.6], [1.2, 6.8, 1.2]),
        Part(None, [0.2, 0.2, 2.2], [1.4, 6.2, 1.4]),
        Part(RED, [-2.6, 2.4, 3.2, -3], [0, 0, 1, 1]),
    ]),
    "building": Thing("building", [
        Part(WALL, [0, 30, 30, 0], [0, 0, 10, 10], -12),  # the wall that faces the eye
        Part(WALL, 0, [0, 0, 10, 10], [-12, 0, 0, -12]),  # the wall along the road
        windows(),
    ]),
    "mountain": Thing("mountain", [
        Part(DISTANT_ROCK, [-110, 90, 0, -22, -50, -82], [0, 0, 110, 93, 55, 33]),
        Part(ROCK, [20, 110, 33, 0, 10], [0, 0, 68, 110, 60]),
        Part(SNOW, [0, -22, -9, 2, 24], [110, 93, 80, 88, 80]),
    ]),
    "hill": Thing("grass", [
        ring(16, GRASS, 0, 0, 70, 11),
    ]),
    "lamp": Thing("nothing", [
        box(DARK, [0, -0.4], [2.4, 4.8], [0.1, 0.6], [2.4, 0.1]),
    ]),
    "parasol": Thing("nothing", [
        box(WOOD, 0, 1.1, 0.06, 1.1),
        Part(None, [-1.5, 1.5, 0.8, 0, -0.8], [1.8, 1.8, 2.4, 2.6, 2.4]),
    ]),
    "balloon": Thing("nothing", [
        box(WOOD, 0, 12.7, 0.7, 0.6),
        Part(None, [-0.7, 0.7, 3, 2.5, 0, -2.5, -3], [14, 14, 17, 20, 21, 20, 17]),
    ]),
}


# ---- scenes --------------------------------------------------------------------------------------


class Grain(NamedTuple):
    """Noise on the ground, in patches of width x depth metres."""

    width: float
    depth: float
    strength: float


class Strip(NamedTuple):
    """A strip of ground along the scene's line, from `left` to `right` metres beside it. Painted
    lines and wet sand have no grain, and are darker."""

    label: str
    colour: Colour
    left: float
    right: float
    grain: Grain | None = None


class Crowd(NamedTuple):
    """`count` things, each between left and right metres beside the line, near to far ahead."""

    count: int
    left: float
    right: float
    near: float
    far: float


class Scene(NamedTuple):
    eye: float  # its height above the ground
    line: list[float]  # x(z), where a road or a shore runs: a polynomial, highest power first
    both_sides: bool  # every second thing stands on the other side of the line
    strips: list[Strip]  # later ones lie on earlier ones
    things: dict[str, Crowd]  # name in THINGS -> where they stand


# The scenes, three tables of one form: where the eye stands and the line runs, the ground from
# below to above, and what stands on it.
EVERYWHERE = 9e9
STREET = Scene(
    eye=3.2,
    line=[0.9],
    both_sides=True,
    strips=[
        Strip("sidewalk", PAVING, -EVERYWHERE, EVERYWHERE, Grain(0.5, 0.5, 0.05)),
        Strip("sidewalk", CREAM, -3.7, 3.7),
        Strip("road", ROAD, -3.4, 3.4, Grain(0.06, 0.1, 0.05)),
        Strip("road", CREAM, -0.07, 0.07),
    ],
    things={
        "mountain": Crowd(3, -250, 250, 500, 600),
        "building": Crowd(10, 6.8, 7, 16, 90),
        "tree": Crowd(6, 4.6, 5, 10, 50),
        "car": Crowd(5, 1.5, 2, 9, 40),
        "person": Crowd(6, 4.3, 6, 9, 22),
        "lamp": Crowd(4, 4, 4, 9, 40),
    },
)
BEACH = Scene(
    eye=5,
    line=[0.0004, -0.038, 1.15, -12],
    both_sides=False,
    strips=[
        Strip("sea", SEA, -EVERYWHERE, EVERYWHERE, Grain(1.2, 0.35, 0.07)),
        Strip("sea", CREAM, -0.8, 99, Grain(0.5, 0.3, 0.1)),  # surf
        Strip("sand", SAND, 0.2, 99),
        Strip("sand", SAND, 1.5, 99, Grain(0.1, 0.2, 0.04)),
        Strip("grass", GRASS, 9, EVERYWHERE, Grain(0.04, 0.1, 0.08)),
    ],
    things={
        "mountain": Crowd(3, -300, 100, 450, 600),
        "boat": Crowd(4, -30, -8, 24, 70),
        "house": Crowd(2, 13, 20, 24, 50),
        "person": Crowd(4, 2, 7, 12, 25),
        "tree": Crowd(4, 10, 24, 18, 60),
        "parasol": Crowd(2, 3, 7, 14, 25),
        "flower": Crowd(9, 9, 13, 12, 25),
    },
)
COUNTRY = Scene(
    eye=4,
    line=[0.0008, -0.076, 2, -13.2],
    both_sides=True,
    strips=[
        Strip("grass", GRASS, -EVERYWHERE, EVERYWHERE, Grain(0.04, 0.1, 0.08)),
        Strip("road", ROAD, -2.5, 2.5, Grain(0.06, 0.1, 0.05)),
        Strip("road", CREAM, -0.07, 0.07),
    ],
    things={
        "mountain": Crowd(4, -300, 300, 500, 600),
        "hill": Crowd(4, -99, 99, 120, 200),
        "house": Crowd(3, 9, 20, 22, 60),
        "car": Crowd(2, 1, 1, 9, 30),
        "tree": Crowd(6, 5, 30, 14, 90),
        "fir": Crowd(6, 5, 30, 14, 90),
        "flower": Crowd(14, 3, 8, 9, 18),
        "balloon": Crowd(1, -20, 20, 50, 80),
    },
)
SCENES = [STREET, BEACH, COUNTRY]


# ---- drawing -------------------------------------------------------------------------------------


class View(NamedTuple):
    """What one scene looks like today, and the place on the ground that each pixel shows. Colours
    come first, (3, height, width), and are float32 throughout, for speed."""

    scene: Scene
    sun: ndarray  # (3, 1, 1), as Light's
    zenith: ndarray  # (3, 1, 1)
    haze: ndarray  # (3, 1, 1)
    shadow: ndarray  # (1, 1, 1)
    sun_side: int  # -1: the sun stands on the left, 1: on the right
    mirror: int  # -1: the scene is mirrored
    horizon: int  # its row
    noise: ndarray  # (256, 256), soft, the same left and right and top and bottom
    line: ndarray  # the scene's, straighter or more bent
    depth: ndarray  # (HEIGHT - horizon, WIDTH): metres ahead
    across: ndarray  # (HEIGHT - horizon, WIDTH): metres to the right


class Place(NamedTuple):
    """Where a thing stands. Places sort by z."""

    z: float
    x: float
    name: str


def draw_scene(rng: Generator) -> tuple[ndarray, ndarray]:
    """One toy scene: a picture (192, 256, 3) uint8 RGB and its label (192, 256) uint8 as ADE20K's
    files have it."""
    view = look(rng)

    image = paint_sky(view)  # (3, HEIGHT, WIDTH)
    label = np.full((HEIGHT, WIDTH), VALUES["sky"], np.uint8)

    # Above and below the horizon, as views: what is painted on them is painted on the picture.
    sky = image[:, : view.horizon]
    land = image[:, view.horizon :]
    land_label = label[view.horizon :]
    paint_clouds(view, sky, rng)
    paint_ground(view, land, land_label)

    places = place_things(view, rng)
    cast_shadows(view, land, places)
    image, label = draw_things(view, image, label, places, rng)

    return add_grain(view, image, label, rng)


def pixel_centres() -> tuple[ndarray, ndarray]:
    """-> row (HEIGHT, WIDTH), column (HEIGHT, WIDTH) of each pixel's centre, float32"""
    corners = np.mgrid[:HEIGHT, :WIDTH]
    row, column = corners.astype(np.float32) + 0.5
    return row, column


def look(rng: Generator) -> View:
    """Choose a scene, a light, and which way the eye looks."""
    scene = SCENES[rng.integers(len(SCENES))]
    light = LIGHTS[rng.integers(len(LIGHTS))]
    sun, zenith, haze, shadow = (np.float32(v).reshape(-1, 1, 1) for v in light)
    sun_side, mirror = rng.choice([-1, 1], 2).tolist()
    horizon = int(rng.integers(72, 88))

    # Two octaves: fine grain and soft patches.
    fine = soft_noise(rng, 1)
    soft = soft_noise(rng, 3)

    # The projection, inverted for y = 0, in the rows below the horizon.
    row, column = pixel_centres()
    depth = FOCAL * scene.eye / (row[horizon:] - horizon)
    across = (column[horizon:] - WIDTH / 2) * depth / FOCAL

    return View(
        scene=scene,
        sun=sun,
        zenith=zenith,
        haze=haze,
        shadow=shadow,
        sun_side=sun_side,
        mirror=mirror,
        horizon=horizon,
        noise=fine + soft,
        line=np.float32(scene.line) * rng.uniform(0.6, 1.15),
        depth=depth,
        across=across,
    )


def soft_noise(rng: Generator, sigma: int) -> ndarray:
    """Noise in patches some sigma pixels wide, of about the same strength for any of them, the same
    left and right and top and bottom. -> (256, 256)"""
    noise = rng.standard_normal((256, 256), np.float32)
    return 2 * sigma * gaussian_filter(noise, sigma, mode="wrap")


def texture(view: View, width: float, depth: float, strength: float) -> ndarray:
    """Noise in patches of width x depth metres on the ground, (HEIGHT - horizon, WIDTH)."""
    row = view.depth / depth
    column = view.across / width
    patches = map_coordinates(view.noise, (row, column), order=1, mode="grid-wrap")

    # A patch at this depth is FOCAL * eye * depth / z^2 rows high. Where it is smaller than a
    # pixel it would flicker, and fades instead.
    eye = view.scene.eye
    three_patches = 3 * FOCAL * eye * depth / view.depth**2
    fade = three_patches.clip(0, 1)
    return strength * patches * fade


def into_haze(view: View, colour: ndarray, depth: ndarray | float) -> ndarray:
    """What is left of a colour behind so many metres of air."""
    share = np.exp(-depth / HAZE)
    contrast = colour - view.haze
    return view.haze + contrast * share


def paint(canvas: ndarray, colour: ndarray, cover: ndarray) -> None:
    """Lay a colour on the canvas. cover: the share of each pixel that it takes, 0..1"""
    change = colour - canvas
    canvas += cover * change


def paint_sky(view: View) -> ndarray:
    """From the zenith's colour to the haze's, the sun and its glow. -> (3, HEIGHT, WIDTH), the land
    below the horizon still empty"""
    row, column = pixel_centres()
    down = (row / view.horizon).clip(0, 1)  # 0 at the zenith, 1 at the horizon
    change = view.haze - view.zenith
    image = view.zenith + change * down**1.3  # (3, HEIGHT, WIDTH)

    # Distances from the sun, in pixels.
    sun_row = view.horizon * 0.4
    sun_column = WIDTH * (0.5 + 0.42 * view.sun_side)
    below = row - sun_row
    right = column - sun_column
    away = np.hypot(right, below)

    glow = np.exp(-away / 30)
    disc = np.exp(-((away / 7) ** 4))
    light = glow + disc
    image += light * view.sun * 180 * view.shadow
    return image


def paint_clouds(view: View, sky: ndarray, rng: Generator) -> None:
    """Paint clouds on sky (3, horizon, WIDTH). They lie on a plane above, as the ground does below:
    the ground's noise, upside down."""
    eye = view.scene.eye
    noise = texture(view, eye * 0.2, eye * 0.25, 1)
    upside_down = noise[view.horizon - 1 :: -1]
    clouds = upside_down + rng.uniform(-0.8, 0.2)

    brightest = 0.35 * view.haze + 165
    colour = brightest - 8 * clouds
    dense = clouds * 0.8
    cover = dense.clip(0, 0.85)
    paint(sky, colour, cover)


def line_at(view: View, depth: ndarray | float) -> ndarray:
    """How far to the right the line runs, so many metres ahead. From 60 on it runs straight."""
    depth = np.minimum(depth, 60)
    return np.polyval(view.line, depth)


def paint_ground(view: View, land: ndarray, label: ndarray) -> None:
    """Paint the scene's strips on land (3, HEIGHT - horizon, WIDTH) and into its label."""
    # Metres from the road or shore, and how many of them one pixel covers, for smooth edges.
    line = line_at(view, view.depth)
    beside = view.mirror * view.across - line
    down, across = np.gradient(beside)
    pixel = np.hypot(down, across)

    for strip in view.scene.strips:
        from_left = beside - strip.left
        from_right = strip.right - beside
        inside = np.minimum(from_left, from_right)  # metres, negative outside
        inside = inside / pixel  # pixels
        cover = (inside + 0.5).clip(0, 1)

        brightness = 0.85
        if strip.grain:
            brightness = 1 + texture(view, *strip.grain)
        colour = np.float32(strip.colour).reshape(3, 1, 1)
        colour = colour * view.sun * brightness
        colour = into_haze(view, colour, view.depth)

        paint(land, colour, cover)
        label[cover >= 0.5] = VALUES[strip.label]


def place_things(view: View, rng: Generator) -> list[Place]:
    """Where the scene's things stand, the farthest first."""
    scene = view.scene
    places = []
    for name, crowd in scene.things.items():
        # Distances grow by a factor, not by a step: as many things near as far in the picture.
        growth = crowd.far / crowd.near

        for i in range(crowd.count):
            share = (i + rng.random()) / crowd.count
            z = crowd.near * growth**share

            beside = rng.uniform(crowd.left, crowd.right)
            if scene.both_sides and i % 2 == 1:
                beside = -beside
            line = float(line_at(view, z))
            x = view.mirror * (beside + line)
            places.append(Place(z, x, name))

    return sorted(places, reverse=True)


def cast_shadows(view: View, land: ndarray, places: list[Place]) -> None:
    """Darken the ground where things stand: a soft round spot, on the side away from the sun, as
    wide as the thing's last part. All of them come before all things, which they lie under."""
    for z, x, name in places:
        last = THINGS[name].parts[-1]
        widths = np.abs(last.x)
        radius = float(widths.max()) + 0.3

        # Metres from the spot's middle.
        shift = view.sun_side * radius / 2
        right = view.across - x + shift
        behind = view.depth - z
        away_squared = right**2 + behind**2

        darkness = np.exp(-away_squared / radius**2)
        land *= 1 - view.shadow * darkness


def draw_things(
    view: View,
    image: ndarray,
    label: ndarray,
    places: list[Place],
    rng: Generator,
) -> tuple[ndarray, ndarray]:
    """Draw them over image (3, HEIGHT, WIDTH) and label. -> (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH)"""
    image = image.transpose(1, 2, 0).clip(0, 255)
    image = image.astype(np.uint8)
    image_canvas = Image.fromarray(enlarge(image))
    label_canvas = Image.fromarray(enlarge(label))
    image_pen = ImageDraw.Draw(image_canvas)
    label_pen = ImageDraw.Draw(label_canvas)

    for place in places:
        thing = THINGS[place.name]
        wide, tall = rng.uniform(0.85, 1.15, 2)

        # Things turn their lit side to the sun, buildings their windows to the road.
        side = -view.sun_side
        if place.name == "building":
            side = np.sign(place.x)
        light = light_on(view, side, rng)

        for part in thing.parts:
            colour = part.colour
            if colour is None:
                colour = BRIGHT[rng.integers(len(BRIGHT))]
            lit = np.reshape(colour, (3, 1, 1)) * light
            seen = into_haze(view, lit, place.z).clip(0, 255)
            rgb = tuple(seen.astype(int).ravel())

            for polygon in project(view, place, part, side * wide, tall):
                image_pen.polygon(polygon, rgb)
                label_pen.polygon(polygon, VALUES[thing.label])

    # Of each 3 x 3 pixels the picture takes the mean and the label, which has none, the middle.
    middle = slice(ENLARGED // 2, None, ENLARGED)
    image = np.asarray(image_canvas.reduce(ENLARGED))
    label = np.asarray(label_canvas)[middle, middle]
    return image, label.copy()


def light_on(view: View, side: float, rng: Generator) -> ndarray:
    """What a thing's colours are multiplied by, (3, 1, 1): a little different for each thing. side:
    -1 where the thing is drawn mirrored, else 1"""
    brightness = rng.uniform(0.88, 1.1)
    tint = rng.uniform(0.94, 1.06, (3, 1, 1))
    light = view.sun * brightness * tint

    in_shade = side == view.sun_side
    if in_shade:
        light = light * (1 - 0.5 * view.shadow)
    return light


def enlarge(x: ndarray) -> ndarray:
    """(H, W, ...) -> (ENLARGED H, ENLARGED W, ...), every pixel repeated."""
    taller = x.repeat(ENLARGED, axis=0)
    return taller.repeat(ENLARGED, axis=1)


def project(view: View, place: Place, part: Part, wide: float, tall: float) -> list[list[float]]:
    """Where the corners of a part appear, on the enlarged canvas. wide, tall: factors of the part's
    size; a negative width mirrors it. -> for each polygon [column, row, column, row, ...]"""
    lists = np.atleast_2d(part.x, part.y, part.z)
    x, y, z = np.broadcast_arrays(*lists)  # (polygons, corners)

    across = place.x + wide * x
    height = tall * y
    below = view.scene.eye - height
    depth = place.z + z

    right = FOCAL * across / depth
    down = FOCAL * below / depth
    column = WIDTH / 2 + right
    row = view.horizon + down

    corners = np.stack([column, row], axis=-1)  # (polygons, corners, 2)
    polygons = ENLARGED * corners.reshape(len(x), -1)
    return polygons.tolist()


def add_grain(
    view: View, image: ndarray, label: ndarray, rng: Generator
) -> tuple[ndarray, ndarray]:
    """Roughness of surfaces, most of all of leaves, the camera's noise, and the gaps that
    annotators leave here and there where two classes meet."""
    noise = view.noise[:HEIGHT]
    rough = np.full((HEIGHT, WIDTH), 0.025, np.float32)
    rough[label == VALUES["sky"]] = 0
    rough[label == VALUES["tree"]] = 0.085

    brightness = 1 + rough * noise
    image = image * brightness[:, :, None]
    camera = rng.standard_normal((HEIGHT, WIDTH, 3), np.float32)
    image = image + 4 * camera
    image = image.clip(0, 255).astype(np.uint8)

    highest = maximum_filter(label, 2)
    lowest = minimum_filter(label, 2)
    meeting = highest > lowest
    gap = meeting & (noise > 0.8)
    label[gap] = VALUES["nothing"]
    return image, label


# ---- the data set --------------------------------------------------------------------------------


def make_toy(root: str) -> str:
    """Draw 96 training and 24 validation pictures in ADE20K's layout, in root; where root exists,
    leave it. -> root"""
    if os.path.isdir(root):
        return root

    part = f"{os.path.normpath(root)}.part{os.getpid()}"  # moved into place when whole
    draw_split(part, "training", 0, 96)
    draw_split(part, "validation", 1, 24)

    try:
        os.rename(part, root)
    except OSError:
        if not os.path.isdir(root):
            raise
        shutil.rmtree(part)  # another process was faster, with the same pictures

    return root


def draw_split(root: str, split: str, seed: int, count: int) -> None:
    """Draw `count` pictures and their labels. Each has a seed of its own, [seed, index]."""
    images = os.path.join(root, "images", split)
    labels = os.path.join(root, "annotations", split)
    os.makedirs(images)
    os.makedirs(labels)

    for i in range(count):
        rng = default_rng([seed, i])
        image, label = draw_scene(rng)

        name = f"toy_{i:03d}"
        image_path = os.path.join(images, name + ".jpg")
        label_path = os.path.join(labels, name + ".png")
        Image.fromarray(image).save(image_path, quality=95)
        Image.fromarray(label).save(label_path)
