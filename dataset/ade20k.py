"""ADE20K, scene parsing benchmark (20210/2000/3352 images): 150 classes stored as 1..150, 0 = not labeled."""
from __future__ import annotations

from dataset.spec import DatasetSpec, SplitSpec, id_tables, register_dataset

CLASSES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""

ADE20K = register_dataset(DatasetSpec(
    name="ade20k", title="ADE20K",
    classes=tuple(" ".join(name.split()) for name in CLASSES.split(",")),
    splits={
        "train": SplitSpec("images/training", "annotations/training", (".jpg",), id_list=True, published=20210),
        "val": SplitSpec("images/validation", "annotations/validation", (".jpg",), id_list=True, published=2000),
        "test": SplitSpec("images/testing", None, (".jpg",), id_list=True, published=3352),
    },
    train_crop=(512, 512), upright_labels=True,
    **id_tables({stored: stored - 1 for stored in range(151)}),
))
