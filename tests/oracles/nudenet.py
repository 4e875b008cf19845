"""Detections of a YOLO output in float64, box by box, from the rules that :class:`NudeNet` states."""

import math

import numpy as np


def overlap(one: list[float], other: list[float]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = one[2] * one[3] + other[2] * other[3] - shared
    return shared / union if union > 0 else 0.0


def detect(
    output: np.ndarray,
    width: int,
    height: int,
    size: int,
    *,
    candidate: float,
    score: float,
    iou: float,
    stretched: bool,
) -> list[tuple[int, float]]:
    """Classes with scores, the highest score first.

    Args:
        output: [4 + classes, boxes]: centre x and y, width, height, and the scores of the classes.
        width: Of the picture.
        height: Of the picture.
        size: Edge of the network's input.
        candidate: A box's best class must score this.
        score: And more than this.
        iou: Boxes that overlap a surer one by more than this are suppressed.
        stretched: Boxes lie in a stretched picture and are cut to whole pixels; else in one padded at the right and
            below, and are cut to the picture.
    """
    boxes = []
    for column in output.astype(np.float64).T:
        best = max(column[4:])
        if best < candidate or best <= score:
            continue
        if stretched:
            across, down = width / size, height / size
        else:
            across = down = max(width, height) / size
        box = [
            (column[0] - column[2] / 2) * across,
            (column[1] - column[3] / 2) * down,
            column[2] * across,
            column[3] * down,
        ]
        if stretched:
            box = [float(math.trunc(value)) for value in box]
        else:
            box[0], box[1] = min(max(box[0], 0.0), width), min(max(box[1], 0.0), height)
            box[2], box[3] = min(box[2], width - box[0]), min(box[3], height - box[1])
        boxes.append((best, list(column[4:]).index(best), box))
    kept: list[tuple[float, int, list[float]]] = []
    for found in sorted(boxes, key=lambda found: -found[0]):
        if all(overlap(found[2], other[2]) <= iou for other in kept):
            kept.append(found)
    return [(label, best) for best, label, _ in kept]
