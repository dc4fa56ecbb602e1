"""The kinds of shape. A shape's radius reaches to its furthest point; areas are those of radius 1."""

import math

KINDS = ("circle", "square", "triangle", "star", "ring", "cross")

# points, and how far from the centre the corners between them are
POINTED = {"triangle": (3, 0.5), "square": (4, math.sqrt(0.5)), "star": (5, 0.45)}
RING_HOLE = 0.5
CROSS_ARM = 0.32  # half of its width
CROSS_REACH = math.sqrt(1 - CROSS_ARM**2)

SYMMETRY = {kind: points for kind, (points, _) in POINTED.items()} | {"cross": 4}  # who turns visibly
AREA = {kind: n * inner * math.sin(math.pi / n) for kind, (n, inner) in POINTED.items()} | {
    "circle": math.pi,
    "ring": math.pi * (1 - RING_HOLE**2),
    "cross": 8 * CROSS_ARM * CROSS_REACH - 4 * CROSS_ARM**2,
}
# how a shape that stands straight is turned; at angle 0 the first point, or an arm, points to the right
UPRIGHT = {"triangle": -math.pi / 2, "star": -math.pi / 2, "square": math.pi / 4}
