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
    x: list | np.ndarray | float
    y: list | np.ndarray | float
    z: list | np.ndarray | float = 0


class Thing(NamedTuple):
    """Parts from back to front, and what they are labelled as, see VALUES."""

    label: str
    parts: list[Part]


def ring(n: int, x, y, rx: float, ry: float) -> tuple[np.ndarray, np.ndarray]:
    """The n corners of a regular polygon around (x, y): a box for n = 4, rounder for more. rx, ry:
    from the centre to the middle of a side. Lists make several polygons. -> x, y: (polygons, n)"""
    x, y, rx, ry = (np.reshape(v, (-1, 1)) for v in (x, y, rx, ry))
    turn = (np.arange(n) + 0.5) * 2 * np.pi / n
    to_side = np.cos(np.pi / n)  # from the centre, where a corner is at the distance 1

    across = rx * np.sin(turn) / to_side
    up = -ry * np.cos(turn) / to_side
    return x + across, y + up


def windows() -> Part:
    """Panes on the wall x = 0 of a building, in rows along y and z."""
    grid = np.mgrid[2:9:2.4, -11:0:1.9]
    heights, depths = grid.reshape(2, -1)
    y, z = ring(4, heights, depths, 0.7, 0.5)
    return Part(GLASS, 0, y, z)


THINGS = {
    "tree": Thing("tree", [
        Part(WOOD, [-0.2, 0.2, 0.1, -0.1], [0, 0, 3, 3]),
        Part(SHADE, *ring(10, [0.3, 0], [2.9, 3.8], 1.5, 1.2)),
        Part(LEAF, *ring(10, [-0.5, -0.2], [3.1, 4.1], 1, 0.8)),
        Part(GRASS, *ring(10, -0.6, 3.8, 0.6, 0.6)),
    ]),
    "fir": Thing("tree", [
        Part(SHADE, *ring(3, 0, [0.8, 2, 3.2], [0.9, 0.7, 0.5], 0.8)),
        Part(LEAF, [-1.2, -0.3, 0], [0.1, 0, 4.6]),
    ]),
    "flower": Thing("flower", [
        Part(SHADE, *ring(9, 0, 0.28, 0.9, 0.45)),
        Part(None, *ring(6, [-0.55, 0.55, 0, -0.25, 0.25, 0.1],
                         [0.36, 0.3, 0.56, 0.22, 0.1, 0.33], 0.22, 0.17)),
    ]),
    "car": Thing("car", [
        Part(DARK, *ring(4, [-0.6, 0.6], 0.25, 0.2, 0.25)),
        Part(None, [-1, 1, 1, 0.7, -0.7, -1], [0.3, 0.3, 0.9, 1.5, 1.5, 0.9]),
        Part(GLASS, [-0.75, 0.75, 0.55, -0.55], [0.95, 0.95, 1.4, 1.4]),
        Part(RED, *ring(4, [-0.75, 0.75], 0.75, 0.15, 0.1)),
    ]),
    "person": Thing("person", [
        Part(DARK, *ring(4, [-0.16, 0.16], 0.6, 0.14, 0.6)),
        Part(None, [-0.48, 0.48, 0.36, -0.36], [1, 1, 1.85, 1.85]),
        Part(SKIN, *ring(8, 0, 2.06, 0.21, 0.22)),
        Part(WOOD, *ring(4, 0, 2.24, 0.21, 0.09)),
    ]),
    "house": Thing("house", [
        Part(CREAM, [-5, -2, -2, -3.5, -5], [0, 0, 2.8, 4.8, 2.8]),
        Part(PAVING, *ring(4, 1.5, 1.4, 3.5, 1.4)),
        Part(RED, [-3.6, 3.5, 5.4, -1.9], [4.9, 4.9, 2.6, 2.6]),
        Part(GLASS, *ring(4, [-3.5, -0.4, 2, 4], 1.5, 0.5, 0.5)),
    ]),
    "boat": Thing("boat", [
        Part(WOOD, *ring(4, 0, 3.5, 0.1, 3.5)),
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
        Part(GRASS, *ring(16, 0, 0, 70, 11)),
    ]),
    "lamp": Thing("nothing", [
        Part(DARK, *ring(4, [0, -0.4], [2.4, 4.8], [0.1, 0.6], [2.4, 0.1])),
    ]),
    "parasol": Thing("nothing", [
        Part(WOOD, *ring(4, 0, 1.1, 0.06, 1.1)),
        Part(None, [-1.5, 1.5, 0.8, 0, -0.8], [1.8, 1.8, 2.4, 2.6, 2.4]),
    ]),
    "balloon": Thing("nothing", [
        Part(WOOD, *ring(4, 0, 12.7, 0.7, 0.6)),
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
    sun: np.ndarray  # (3, 1, 1), as Light's
    zenith: np.ndarray  # (3, 1, 1)
    haze: np.ndarray  # (3, 1, 1)
    shadow: np.ndarray  # (1, 1, 1)
    sun_side: int  # -1: the sun stands on the left, 1: on the right
    mirror: int  # -1: the scene is mirrored
    horizon: int  # its row
    noise: np.ndarray  # (256, 256), soft, the same left and right and top and bottom
    line: np.ndarray  # the scene's, straighter or more bent
    depth: np.ndarray  # (HEIGHT - horizon, WIDTH): metres ahead
    across: np.ndarray  # (HEIGHT - horizon, WIDTH): metres to the right


class Place(NamedTuple):
    """Where a thing stands. Places sort by z."""

    z: float
    x: float
    name: str


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One toy scene: a picture (192, 256, 3) uint8 RGB and its label (192, 256) uint8 as ADE20K's
    files have it."""
    view = look(rng)

    image = paint_sky(view, rng)  # (3, HEIGHT, WIDTH)
    label = np.full((HEIGHT, WIDTH), VALUES["sky"], np.uint8)

    # Below the horizon, as views: what is painted on them is painted on the picture.
    land = image[:, view.horizon :]
    land_label = label[view.horizon :]
    paint_ground(view, land, land_label)

    places = place_things(view, rng)
    cast_shadows(view, land, places)
    image, label = draw_things(view, image, label, places, rng)

    return add_grain(view, image, label, rng)


def pixel_centres() -> tuple[np.ndarray, np.ndarray]:
    """-> row (HEIGHT, WIDTH), column (HEIGHT, WIDTH) of each pixel's centre, float32"""
    corners = np.mgrid[:HEIGHT, :WIDTH]
    row, column = corners.astype(np.float32) + 0.5
    return row, column


def look(rng: np.random.Generator) -> View:
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


def soft_noise(rng: np.random.Generator, sigma: int) -> np.ndarray:
    """Noise in patches some sigma pixels wide, of about the same strength for any of them, the same
    left and right and top and bottom. -> (256, 256)"""
    noise = rng.standard_normal((256, 256), np.float32)
    return 2 * sigma * gaussian_filter(noise, sigma, mode="wrap")


def texture(view: View, width: float, depth: float, strength: float) -> np.ndarray:
    """Noise in patches of width x depth metres on the ground, (HEIGHT - horizon, WIDTH)."""
    places = (view.depth / depth, view.across / width)
    patches = map_coordinates(view.noise, places, order=1, mode="grid-wrap")

    # A patch at this depth is FOCAL * eye * depth / z^2 rows high. Where it is smaller than a
    # pixel it would flicker, and fades instead.
    three_patches = 3 * FOCAL * view.scene.eye * depth / view.depth**2
    fade = three_patches.clip(0, 1)
    return strength * patches * fade


def into_haze(view: View, colour: np.ndarray, depth: np.ndarray | float) -> np.ndarray:
    """What is left of a colour behind so many metres of air."""
    left = np.exp(-depth / HAZE)
    return view.haze + (colour - view.haze) * left


def paint_sky(view: View, rng: np.random.Generator) -> np.ndarray:
    """From the zenith's colour to the haze's, the sun and its glow, clouds. -> (3, HEIGHT, WIDTH),
    the land below the horizon still empty"""
    row, column = pixel_centres()
    down = (row / view.horizon).clip(0, 1)  # 0 at the zenith, 1 at the horizon
    image = view.zenith + (view.haze - view.zenith) * down**1.3  # (3, HEIGHT, WIDTH)

    sun_row = view.horizon * 0.4
    sun_column = WIDTH * (0.5 + 0.42 * view.sun_side)
    away = np.hypot(column - sun_column, row - sun_row)  # in pixels
    glow = np.exp(-away / 30)
    disc = np.exp(-((away / 7) ** 4))
    image += (glow + disc) * view.sun * 180 * view.shadow

    # Clouds lie on a plane above, as the ground does below: the ground's noise, upside down.
    eye = view.scene.eye
    noise = texture(view, eye * 0.2, eye * 0.25, 1)
    clouds = noise[view.horizon - 1 :: -1] + rng.uniform(-0.8, 0.2)
    cover = (clouds * 0.8).clip(0, 0.85)  # share of the pixel
    colour = 0.35 * view.haze + 165 - 8 * clouds

    sky = image[:, : view.horizon]  # a view: painting on it paints the image
    sky += cover * (colour - sky)
    return image


def paint_ground(view: View, land: np.ndarray, label: np.ndarray) -> None:
    """Paint the scene's strips on land (3, HEIGHT - horizon, WIDTH) and into its label."""
    # Metres from the road or shore, and how many of them one pixel covers, for smooth edges.
    line = np.polyval(view.line, view.depth.clip(0, 60))
    beside = view.mirror * view.across - line
    down, across = np.gradient(beside)
    pixel = np.hypot(down, across)

    for strip in view.scene.strips:
        inside = np.minimum(beside - strip.left, strip.right - beside)  # metres, negative outside
        cover = (inside / pixel + 0.5).clip(0, 1)  # share of the pixel

        brightness = 0.85
        if strip.grain:
            brightness = 1 + texture(view, *strip.grain)
        colour = np.float32(strip.colour).reshape(3, 1, 1)
        colour = colour * view.sun * brightness
        colour = into_haze(view, colour, view.depth)

        land += cover * (colour - land)
        label[cover >= 0.5] = VALUES[strip.label]


def place_things(view: View, rng: np.random.Generator) -> list[Place]:
    """Where the scene's things stand, the farthest first."""
    places = []
    for name, crowd in view.scene.things.items():
        for i in range(crowd.count):
            # Distances grow by a factor, not by a step: as many things near as far in the picture.
            share = (i + rng.random()) / crowd.count
            z = crowd.near * (crowd.far / crowd.near) ** share
            beside = rng.uniform(crowd.left, crowd.right)
            if view.scene.both_sides and i % 2 == 1:
                beside = -beside

            # The line is nearly straight from 60 metres on.
            line = float(np.polyval(view.line, min(z, 60)))
            x = view.mirror * (beside + line)
            places.append(Place(z, x, name))

    return sorted(places, reverse=True)


def cast_shadows(view: View, land: np.ndarray, places: list[Place]) -> None:
    """Darken the ground where things stand: a soft round spot, on the side away from the sun, as
    wide as the thing's last part. All of them come before all things, which they lie under."""
    for z, x, name in places:
        last = THINGS[name].parts[-1]
        radius = float(np.abs(last.x).max()) + 0.3
        right = view.across - x + view.sun_side * radius / 2  # of the spot's middle, in metres
        behind = view.depth - z

        darkness = np.exp(-(right**2 + behind**2) / radius**2)
        land *= 1 - view.shadow * darkness


def draw_things(
    view: View,
    image: np.ndarray,
    label: np.ndarray,
    places: list[Place],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw them over image (3, HEIGHT, WIDTH) and label. -> (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH)"""
    image = np.uint8(image.transpose(1, 2, 0).clip(0, 255))
    image_canvas = Image.fromarray(enlarge(image))
    label_canvas = Image.fromarray(enlarge(label))
    image_pen = ImageDraw.Draw(image_canvas)
    label_pen = ImageDraw.Draw(label_canvas)

    for place in places:
        thing = THINGS[place.name]
        wide, tall = rng.uniform(0.85, 1.15, 2)

        # Things turn their lit side to the sun, buildings their windows to the road.
        side = np.sign(place.x) if place.name == "building" else -view.sun_side
        in_shade = side == view.sun_side
        brightness = rng.uniform(0.88, 1.1)
        tint = view.sun * brightness * rng.uniform(0.94, 1.06, (3, 1, 1))
        tint = tint * (1 - 0.5 * view.shadow * in_shade)

        for part in thing.parts:
            colour = part.colour or BRIGHT[rng.integers(len(BRIGHT))]
            colour = np.reshape(colour, (3, 1, 1)) * tint
            colour = into_haze(view, colour, place.z).clip(0, 255)
            rgb = tuple(colour.astype(int).ravel())

            for polygon in project(view, place, part, side * wide, tall):
                image_pen.polygon(polygon, rgb)
                label_pen.polygon(polygon, VALUES[thing.label])

    # Of each 3 x 3 pixels the picture takes the mean and the label, which has none, the middle.
    middle = slice(ENLARGED // 2, None, ENLARGED)
    image = np.asarray(image_canvas.reduce(ENLARGED))
    label = np.asarray(label_canvas)[middle, middle]
    return image, label.copy()


def enlarge(x: np.ndarray) -> np.ndarray:
    """(H, W, ...) -> (ENLARGED H, ENLARGED W, ...), every pixel repeated."""
    return x.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)


def project(view: View, place: Place, part: Part, wide: float, tall: float) -> list[list[float]]:
    """Where the corners of a part appear, on the enlarged canvas. wide, tall: factors of the part's
    size; a negative width mirrors it. -> for each polygon [column, row, column, row, ...]"""
    lists = np.atleast_2d(part.x, part.y, part.z)
    x, y, z = np.broadcast_arrays(*lists)  # (polygons, corners)

    across = place.x + wide * x
    below = view.scene.eye - tall * y
    depth = place.z + z
    column = WIDTH / 2 + FOCAL * across / depth
    row = view.horizon + FOCAL * below / depth

    corners = ENLARGED * np.stack([column, row], axis=-1)  # (polygons, corners, 2)
    return corners.reshape(len(x), -1).tolist()


def add_grain(
    view: View, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Roughness of surfaces, most of all of leaves, the camera's noise, and the gaps that
    annotators leave here and there where two classes meet."""
    noise = view.noise[:HEIGHT]
    on_a_surface = label != VALUES["sky"]
    leaf = label == VALUES["tree"]
    rough = np.float32(0.025 * on_a_surface + 0.06 * leaf)

    brightness = 1 + rough * noise
    image = image * brightness[:, :, None]
    image = image + 4 * rng.standard_normal((HEIGHT, WIDTH, 3), np.float32)
    image = image.clip(0, 255).astype(np.uint8)

    meeting = maximum_filter(label, 2) > minimum_filter(label, 2)
    label[meeting & (noise > 0.8)] = VALUES["nothing"]
    return image, label


# ---- the data set --------------------------------------------------------------------------------


def make_toy(root: str) -> str:
    """Draw 96 training and 24 validation pictures in ADE20K's layout, in root; where root exists,
    leave it. -> root"""
    if os.path.isdir(root):
        return root

    part = f"{os.path.normpath(root)}.part{os.getpid()}"  # moved into place when whole
    for s, (split, count) in enumerate([("training", 96), ("validation", 24)]):
        images = os.path.join(part, "images", split)
        labels = os.path.join(part, "annotations", split)
        os.makedirs(images)
        os.makedirs(labels)

        for i in range(count):
            rng = np.random.default_rng([s, i])
            image, label = draw_scene(rng)
            Image.fromarray(image).save(os.path.join(images, f"toy_{i:03d}.jpg"), quality=95)
            Image.fromarray(label).save(os.path.join(labels, f"toy_{i:03d}.png"))

    try:
        os.rename(part, root)
    except OSError:
        if not os.path.isdir(root):
            raise
        shutil.rmtree(part)  # another process was faster, with the same pictures

    return root
