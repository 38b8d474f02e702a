"""A whole street: plans what stands where, then paints it from far to near."""

from __future__ import annotations

import numpy as np

from dataset.toy_streets import furniture, ground, people, plants, sky
from dataset.toy_streets.buildings import closing_house, garden_wall, house
from dataset.toy_streets.canvas import Canvas
from dataset.toy_streets.ground import Street
from dataset.toy_streets.labels import VOID, mix, rgb, scale
from dataset.toy_streets.photo import develop
from dataset.toy_streets.vehicles import vehicle
from dataset.toy_streets.world import Camera, Light, Stage, Thing

_FAR = 90.0


def paint_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint one street.

    Args:
        rng: decides everything; the same state gives the same picture.
        height, width: size of the picture in pixels, at least 32 each.

    Returns:
        image uint8 [height, width, 3], BGR, and label uint8 [height, width], 0..10 (CamVid's order) or 11 = void.

    Raises:
        ValueError: the size is below 32 pixels.
    """
    if height < 32 or width < 32:
        raise ValueError(f"a toy street needs at least 32 x 32 pixels, got {height} x {width}")
    light, street = sky.sample_light(rng), ground.sample_street(rng)
    camera = _camera(rng, street, 2 * height, 2 * width)
    stage = Stage(rng, camera, light, Canvas(2 * height, 2 * width))
    things = _plan(rng, light, street)
    sky.paint_sky(stage)
    sky.paint_skyline(stage)
    ground.paint_ground(stage, street, things)
    if rng.random() < 0.2:
        sky.paint_wires(stage)
    for thing in sorted(things, key=lambda t: -t.z):
        if camera.sees(thing.x, thing.z, thing.reach):
            thing.paint(stage)
    if rng.random() < 0.28:
        _bonnet(stage)
    return develop(stage), stage.canvas.label_half()


def _camera(rng: np.random.Generator, street: Street, height: int, width: int) -> Camera:
    left, right = street.left + street.parking_left, street.right - street.parking_right
    lane = (right - left) / street.lanes
    lateral = left + lane * (int(rng.integers(street.lanes)) + 0.5) + rng.uniform(-0.6, 0.6)
    if rng.random() < 0.08:
        lateral = street.kerb_line(1) + rng.uniform(0.2, 1.2)
    return Camera(
        width,
        height,
        width * rng.uniform(0.72, 1.15),
        height * rng.uniform(0.4, 0.56),
        rng.uniform(1.25, 2.2),
        lateral,
        rng.normal(0, 0.07),
        float(np.clip(rng.normal(0, 0.0011), -0.003, 0.003)),
        rng.normal(0, 0.012),
    )


def _plan(rng: np.random.Generator, light: Light, street: Street) -> list[Thing]:
    """Everything that stands on or beside the street."""
    things: list[Thing | None] = []
    gap = (street.junction - 5, street.junction + 5) if street.junction else None
    for side in (-1, 1):
        things += _plots(rng, light, street, side, gap)
        things += _pavement_things(rng, light, street, side, gap)
        things += _parked(rng, light, street, side, gap)
    things += _traffic(rng, light, street)
    things += _walkers(rng, light, street)
    if rng.random() < 0.35:
        z, width = rng.uniform(60, _FAR), rng.uniform(8, 16)
        things += [closing_house(rng, light, x, x + width, z) for x in np.arange(-34.0, 30.0, width)]
    return [t for t in things if t is not None]


def _plots(
    rng: np.random.Generator, light: Light, street: Street, side: int, gap: tuple[float, float] | None
) -> list[Thing]:
    """Houses, gardens and parks beyond the pavement, plot after plot into the distance."""
    things: list[Thing] = []
    line = street.house_line(side)
    z = rng.uniform(2.0, 6.0)
    kinds = ("flush", "garden", "park", "open")
    habit, adjoined = rng.dirichlet((2.2, 1.5, 0.9, 0.35)), 0.0
    while z < _FAR:
        length = rng.uniform(7, 18)
        if gap and z < gap[1] and z + length > gap[0]:
            if z + 5 > gap[0]:
                z, adjoined = gap[1], 0.0
                continue
            length = gap[0] - z
        kind = str(rng.choice(kinds, p=habit))
        if kind == "flush":
            thing, adjoined = house(rng, light, side, line, z, z + length, adjoined=adjoined)
            things.append(thing)
        elif kind == "garden":
            things += _garden(rng, light, side, line, z, length)
        else:
            things += _green(rng, light, side, line, z, length, kind == "park")
        alley = rng.uniform(0.5, 4) if rng.random() < 0.25 else 0.0
        z += length + alley
        if kind != "flush" or alley:
            adjoined = 0.0
    return [t for t in things if t.z > 4]


def _garden(rng: np.random.Generator, light: Light, side: int, line: float, z: float, length: float) -> list[Thing]:
    """A house behind a front garden with a fence, wall or hedge."""
    ends = z + rng.uniform(0, 1.5), z + length - rng.uniform(0, 1.5)
    things = [house(rng, light, side, line + side * rng.uniform(2.5, 6.0), *ends, heights=(5.0, 9.0))[0]]
    front = furniture.fence if rng.random() < 0.55 else garden_wall
    things.append(front(rng, light, side, line + side * 0.1, z, z + length))
    for _ in range(int(rng.integers(0, 4))):
        things.append(plants.bush(rng, light, line + side * rng.uniform(0.8, 2.5), rng.uniform(z, z + length)))
    if rng.random() < 0.35:
        things.append(plants.tree(rng, light, line + side * rng.uniform(1.4, 3), z + rng.uniform(1, length), 0.75))
    return things


def _green(
    rng: np.random.Generator, light: Light, side: int, line: float, z: float, length: float, park: bool
) -> list[Thing]:
    """Grass with bushes, mostly fenced; in a park there are trees."""
    things = []
    if rng.random() < 0.7:
        things.append(furniture.fence(rng, light, side, line + side * 0.1, z, z + length))
    for _ in range(int(rng.integers(2, 5)) if park else 0):
        x, at = line + side * rng.uniform(1.5, 16), z + rng.uniform(3, length + 3)
        things.append(plants.tree(rng, light, x, at, rng.uniform(0.8, 1.5)))
    for _ in range(int(rng.integers(0, 3))):
        things.append(plants.bush(rng, light, line + side * rng.uniform(1, 7), z + rng.uniform(2, length)))
    return things


def _pavement_things(
    rng: np.random.Generator, light: Light, street: Street, side: int, gap: tuple[float, float] | None
) -> list[Thing]:
    """Lamps, signs, signals, street trees, railings and bins along the kerb."""
    kerb = street.kerb_line(side)
    width = street.pavement_left if side < 0 else street.pavement_right
    near = kerb + side * 0.5
    things: list[Thing] = []
    spacing, start = rng.uniform(17, 30), rng.uniform(6, 20)
    things += [furniture.lamp_post(rng, light, near, z, side) for z in np.arange(start, 65, spacing)]
    for _ in range(int(rng.integers(0, 4))):
        z = float(rng.choice((rng.uniform(5.5, 14), rng.uniform(10, 45))))
        things.append(furniture.traffic_sign(rng, light, near + side * rng.uniform(-0.2, 0.6), z))
    if street.crossing and rng.random() < 0.6:
        things.append(furniture.traffic_light(rng, light, near, street.crossing + float(rng.choice((-3.0, 2.0))), side))
    elif gap and rng.random() < 0.6:
        things.append(furniture.traffic_light(rng, light, near, gap[0] - 0.5, side))
    if rng.random() < 0.38:
        first, step = rng.uniform(5, 18), rng.uniform(6, 14)
        size = rng.uniform(0.55, 1.0)
        things += [
            plants.tree(rng, light, near + side * 0.3, float(z), size * rng.uniform(0.85, 1.15))
            for z in np.arange(first, 75, step)
        ]
    if width > 1.8 and rng.random() < 0.2:
        z = rng.uniform(5, 25)
        things.append(furniture.fence(rng, light, side, kerb + side * 0.35, z, z + rng.uniform(4, 14)))
    things += [
        furniture.bin_or_box(rng, light, kerb + side * rng.uniform(0.6, max(0.8, width - 0.4)), rng.uniform(6, 35))
        for _ in range(int(rng.integers(0, 3)))
    ]
    return [t for t in things if not (gap and gap[0] < t.z < gap[1])]


def _parked(
    rng: np.random.Generator, light: Light, street: Street, side: int, gap: tuple[float, float] | None
) -> list[Thing | None]:
    """A row of parked cars with holes, where the street has a parking lane."""
    parking = street.parking_left if side < 0 else street.parking_right
    if not parking and rng.random() < 0.8:
        return []
    inner = 1.05 if parking else 0.9
    fill, heading = rng.uniform(0.1, 0.7), 0.0 if (side > 0) == (rng.random() < 0.85) else np.pi
    row: list[Thing | None] = []
    for z in np.arange(rng.uniform(4.5, 9), 75, 5.9):
        blocked = (gap and gap[0] - 3 < z < gap[1] + 3) or (street.crossing and abs(z - street.crossing) < 5)
        if rng.random() < fill and not blocked:
            row.append(
                vehicle(rng, light, street.kerb_line(side) - side * inner, float(z), heading + rng.normal(0, 0.03))
            )
    return row


def _traffic(rng: np.random.Generator, light: Light, street: Street) -> list[Thing | None]:
    """Moving cars, lane by lane, and sometimes one that crosses at the junction."""
    left, right = street.left + street.parking_left, street.right - street.parking_right
    lane = (right - left) / street.lanes
    out: list[Thing | None] = []
    for k in range(street.lanes):
        x = left + lane * (k + 0.5)
        heading = 0.0 if x > 0 or street.lanes == 1 else np.pi
        z = rng.uniform(8, 40)
        while z < 95 and rng.random() < 0.55:
            out.append(vehicle(rng, light, x + rng.uniform(-0.3, 0.3), z, heading + rng.normal(0, 0.03)))
            z += rng.uniform(9, 40)
    if street.junction and rng.random() < 0.5:
        out.append(vehicle(rng, light, rng.uniform(-8, 8), street.junction, float(rng.choice((-1, 1))) * np.pi / 2))
    return out


def _walkers(rng: np.random.Generator, light: Light, street: Street) -> list[Thing]:
    """People on the pavements and crossings, bicyclists on the road."""
    out: list[Thing] = []
    for side in (-1, 1):
        width = street.pavement_left if side < 0 else street.pavement_right
        for _ in range(int(rng.integers(0, 4))):
            z = rng.uniform(6, 16) if rng.random() < 0.45 else rng.uniform(12, 50)
            x = street.kerb_line(side) + side * rng.uniform(0.6, max(0.9, width - 0.3))
            out.append(people.pedestrian(rng, light, x, z))
            if rng.random() < 0.3:
                out.append(people.pedestrian(rng, light, x + side * 0.55, z + rng.uniform(-0.3, 0.3)))
    if rng.random() < 0.3 or street.crossing:
        z = street.crossing or rng.uniform(10, 35)
        out += [
            people.pedestrian(rng, light, rng.uniform(street.left, street.right), z + rng.uniform(-1.3, 1.3))
            for _ in range(int(rng.integers(0, 4)))
        ]
    for _ in range(int(rng.integers(0, 3))):
        side = float(rng.choice((-1, 1)))
        parking = street.parking_left if side < 0 else street.parking_right
        x = street.kerb_line(int(side)) - side * (parking + rng.uniform(0.5, 1.3))
        view = rng.uniform(-0.35, 0.35) if rng.random() < 0.65 else float(rng.choice((-1, 1))) * rng.uniform(0.7, 1.0)
        out.append(people.bicyclist(rng, light, x, rng.uniform(6, 22), view))
    return out


def _bonnet(stage: Stage) -> None:
    """The bonnet of the camera's own car at the lower edge: void."""
    width, height = stage.canvas.width, stage.canvas.height
    rise = height * stage.rng.uniform(0.05, 0.11)
    color = scale(mix(rgb(*stage.rng.uniform(20, 120, 3)), rgb(60, 62, 66), 0.7), stage.light.gain((0.0, 1.0, 0.0))[1])
    stage.canvas.ellipse(width / 2, height + rise, width * 0.62, rise * 2.0, color, VOID)
    stage.canvas.ellipse(width * 0.42, height + rise * 1.2, width * 0.3, rise * 1.7, scale(color, 1.25), VOID)
