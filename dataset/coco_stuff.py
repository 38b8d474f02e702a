"""COCO-Stuff-164K (118287/5000 images): 182 class ids of which 171 occur, stored as id - 1; 255 = ignore."""
from __future__ import annotations

from dataset.spec import DatasetSpec, SplitSpec, id_tables, register_dataset

#: ids 0..90 are things (11 of them were never annotated), 91..181 are stuff
CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana,
apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror,
dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster,
sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
window-blind, window-other, wood
"""

COCO_STUFF = register_dataset(DatasetSpec(
    name="coco_stuff_164k", title="COCO-Stuff-164K",
    classes=tuple(" ".join(name.split()) for name in CLASSES.split(",")),
    splits={name: SplitSpec(f"images/{name}2017", f"annotations/{name}2017", (".jpg",), id_list=True, published=count)
            for name, count in (("train", 118287), ("val", 5000))},
    train_crop=(512, 512), upright_labels=True,
    absent_classes=(11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90),
    **id_tables({stored: stored for stored in range(182)}, ignore=[255]),
))
