"""Measure how many crossings of drawn cables the centerlines of imaging/centerlines.py resolve correctly.

    python tools/measure_crossings.py

Draws masks of two to five cables of known shapes, 3 to 20 pixels wide, with exact and with rough edges. A
crossing is resolved correctly if a centerline crossing is found there and each of the two cables has one id
before and behind it, which the other cable has not. Prints a table by the angle of the crossing.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial import cKDTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from make_demo import OVERSAMPLING, SIZE, draw_curve

from imaging.centerlines import Cable, Crossing, centerlines, find_crossings

HEIGHT, WIDTH = (side * OVERSAMPLING for side in SIZE)
ANGLES = (0, 15, 30, 45, 60, 90)  # degrees, the limits of the rows
MIN_ANGLE = 5.0  # below it, cables lie beside each other rather than cross


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how many crossings of drawn cables are resolved.")
    parser.add_argument("--scenes", type=int, default=100, help="drawn masks of either kind (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default: 0)")
    return parser.parse_args(argv)


def draw_scene(rng: np.random.Generator) -> tuple[list[Cable], np.ndarray]:
    """Draw two to five cables: the true cables, and the mask of all, bool (H, W)."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cables = []
    for number in range(1, rng.integers(2, 6) + 1):
        points = draw_curve(rng, int(rng.uniform(0.5, 1.5) * WIDTH))
        width = int(rng.integers(3, 21))
        near = cv2.polylines(np.zeros_like(mask), [np.rint(points).astype(np.int32)], False, 1, width + 3)
        rows, columns = np.nonzero(near)
        distances, _ = cKDTree(points).query(np.column_stack([columns, rows]))
        mask[rows, columns] |= distances < width / 2
        widths = np.full(len(points), width, np.float32)
        cables.append(Cable(number, points.astype(np.float32), widths, False, ("free", "free")))
    return cables, mask.astype(bool)


def roughen(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move the edge of a mask in and out at random, with a standard deviation of about 0.6 pixels."""
    noise = cv2.GaussianBlur(rng.normal(0, 1, mask.shape), (0, 0), 1.5)
    soft = cv2.GaussianBlur(mask.astype(float), (0, 0), 1.0)  # at the edge, its slope is 0.4 per pixel
    return soft + 0.25 * noise / noise.std() * (4 * soft * (1 - soft)) > 0.5


@dataclass(frozen=True)
class Probes:
    """Points of two cables before and behind their crossing.

    points: float64 (2, 2, 2): cable, before or behind, (x, y).
    is_alone: whether neither cable crosses another one between its points.
    """

    points: np.ndarray
    is_alone: bool


def probe(crossing: Crossing, cables: list[Cable], others: list[Crossing]) -> Probes | None:
    """Choose the points where the cables of a crossing are apart; None if a cable ends before."""
    both = [cables[number - 1] for number in crossing.cables]
    overlap = sum(float(cable.widths[0]) for cable in both) / 2 / np.sin(np.radians(crossing.angle))
    points, is_alone, used = [], True, -10_000
    for cable in both:
        distances = np.linalg.norm(cable.points - crossing.point, axis=1)
        distances[max(0, used - 20) : max(0, used + 20)] = np.inf  # a cable that crosses itself
        at, reach = int(distances.argmin()), int(overlap + 1.5 * cable.widths[0])
        used = at if both[0] is both[1] else used
        ends = np.array([at - reach, at + reach])
        if ends[0] < 0 or ends[1] >= len(cable.points):
            return None
        points.append(cable.points[ends])
        if ((points[-1] < 0) | (points[-1] > [WIDTH - 1, HEIGHT - 1])).any():
            return None
        part = cable.points[ends[0] : ends[1] + 1]
        for other in others:
            if other is not crossing and cable.id in other.cables:
                is_alone &= float(np.linalg.norm(part - other.point, axis=1).min()) > 2
    return Probes(np.array(points, float), is_alone)


def is_resolved(crossing: Crossing, probes: Probes, true: list[Cable], found: list[Cable]) -> bool:
    """Whether the found centerlines keep the cables of a crossing apart."""
    widths = [float(true[number - 1].widths[0]) for number in crossing.cables]
    ids = np.stack([nearest_ids(points, w, found) for points, w in zip(probes.points, widths, strict=True)])
    is_one = ids.all() and (ids[:, 0] == ids[:, 1]).all()
    is_self = crossing.cables[0] == crossing.cables[1]
    near = max(widths) / np.sin(np.radians(crossing.angle))
    is_seen = any(np.hypot(*np.subtract(c.point, crossing.point)) < near for c in find_crossings(found))
    return bool(is_one and (ids[0, 0] == ids[1, 0]) == is_self and is_seen)


def measure_scene(cables: list[Cable], mask: np.ndarray) -> tuple[list[tuple[bool, int, bool]], list[float]]:
    """Compare the centerlines of a mask with its true cables.

    Returns (whether the crossing is alone, row of `ANGLES`, whether it is resolved) for each crossing, and
    for each cable the largest part of its length that has one id.
    """
    found = centerlines(mask)
    crossings = find_crossings(cables)
    results = []
    for crossing in crossings:
        probes = probe(crossing, cables, crossings) if crossing.angle > MIN_ANGLE else None
        if probes:
            row = int(np.searchsorted(ANGLES, crossing.angle)) - 1
            results.append((probes.is_alone, row, is_resolved(crossing, probes, cables, found)))
    shares = []
    for cable in cables:
        inside = ((cable.points >= 0) & (cable.points <= [WIDTH - 1, HEIGHT - 1])).all(axis=1)
        ids = nearest_ids(cable.points[inside], float(cable.widths[0]), found)
        shares.append(float(np.bincount(ids, minlength=2)[1:].max() / max(1, len(ids))))
    return results, shares


def nearest_ids(points: np.ndarray, width: float, found: list[Cable]) -> np.ndarray:
    """The id of the nearest centerline at each point (N, 2); 0 where none is within half a width and 2 px."""
    gaps = np.full((len(found) + 1, len(points)), width / 2 + 2)
    for cable in found:
        gaps[cable.id] = cKDTree(cable.points).query(points)[0]
    return gaps.argmin(axis=0)


def print_table(results: dict[tuple[bool, bool], list[tuple[int, bool]]]) -> None:
    """Print the share of resolved crossings by angle; `results` are by (is alone, is rough)."""
    print("| angle | alone, exact edge | alone, rough edge | others near, exact | others near, rough |")
    print("|---|---|---|---|---|")
    for row, (low, high) in enumerate(pairwise(ANGLES)):
        cells = []
        for key in ((True, False), (True, True), (False, False), (False, True)):
            right = [is_right for number, is_right in results[key] if number == row]
            cells.append(f"{np.mean(right):.0%} of {len(right)}" if right else "none")
        print(f"| {max(low, MIN_ANGLE):.0f} to {high} degrees | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    results: dict[tuple[bool, bool], list[tuple[int, bool]]] = defaultdict(list)
    shares: dict[bool, list[float]] = {False: [], True: []}
    for number in range(args.scenes):
        rng = np.random.default_rng([args.seed, number])
        cables, mask = draw_scene(rng)
        for is_rough in (False, True):
            found, parts = measure_scene(cables, roughen(mask, rng) if is_rough else mask)
            shares[is_rough] += parts
            for is_alone, row, is_right in found:
                results[is_alone, is_rough].append((row, is_right))
    print_table(results)
    for is_rough, name in ((False, "exact"), (True, "rough")):
        share, count = np.mean(shares[is_rough]), len(shares[is_rough])
        print(f"{name} edge: {share:.1%} of the length of a cable has one id, mean of {count} cables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
