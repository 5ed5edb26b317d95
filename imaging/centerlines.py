"""The centerline of each cable in a mask: branches of the skeleton, joined through crossings and over gaps.

The centerlines of a mask say where a robot can grasp, and which parts of it are one cable. A mask does not
say which of two crossing cables is above. Coordinates are (x, y) in pixels; the center of the top left pixel
is (0, 0).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any

import cv2
import networkx as nx
import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree
from skimage.graph import route_through_array

from imaging.skeleton import Branch, arc_lengths, clean, distance_to_edge, find_branches

MIN_LENGTH = 10.0  # pixels of the shortest cable
MIN_ASPECT = 2.0  # a cable is at least this many times longer than wide
DIRECTION_LENGTH = 2.5  # widths over which a direction is measured
MAX_BEND = np.radians(60)  # between the directions at a junction and the line between them
MAX_GAP_BEND = np.radians(30)  # the same over a gap
MAX_GAP = 4.0  # widths between two ends, with what other cables cover
MAX_OVERLAP = 8.0  # length of an overlap of two cables, over the sum of the distances to the edge at its ends
MAX_FORK = np.radians(110)  # between two cables that leave an overlap on one side
MAX_ARMS = 32  # that meet; more are noise, and would take a time that grows with the cube of their number
WIDTH_WEIGHT = 0.5  # radians of bending that count as much as a width that is e times as large
WIDTH_BIAS = 0.5  # pixels; twice the distance between pixel centers is 0 or 1 more than the width
MAX_ID = 65535  # of an instance mask, which is 16-bit
SMOOTHING = 0.3  # widths; the standard deviation of the Gaussian along a centerline


@dataclass(frozen=True)
class Cable:
    """A cable of a mask.

    id: from 1; the longest cable has 1.
    points: float32 (N, 2) with N >= 2, (x, y) in pixels along the centerline, about half a width apart.
    widths: float32 (N,), the width of the cable in pixels at each point. At a crossing it is interpolated.
    closed: whether it is a ring; then the last point is not repeated at its start.
    ends: what is at the first and at the last point: "frame" (the image ends), "cable" (another cable or
        another part of this one begins) or "free". Empty for a ring.
    """

    id: int
    points: np.ndarray
    widths: np.ndarray
    closed: bool
    ends: tuple[str, ...]

    @property
    def length(self) -> float:
        """The length of the centerline in pixels."""
        return float(arc_lengths(_ring(self.points) if self.closed else self.points)[-1])


@dataclass(frozen=True)
class Crossing:
    """A place where the centerlines of two cables, or of one cable twice, cross.

    point: (x, y) in pixels.
    cables: the two ids, the smaller one first.
    angle: between the two in degrees, above 0 and at most 90.
    """

    point: tuple[float, float]
    cables: tuple[int, int]
    angle: float


def centerlines(mask: np.ndarray) -> list[Cable]:
    """Find the cables of a mask, bool (H, W), the longest first.

    Two cables that cross are told apart by their directions before and behind the crossing, and by their
    widths. At a junction of three branches the two straightest are one cable, and the third ends there. A gap
    that is shorter than the cable is wide is bridged if the directions agree. A region without a clear
    direction has no cable.
    """
    mask = clean(mask)
    distance = distance_to_edge(mask)
    branches = find_branches(mask, distance)
    arms = _outer_arms(branches, distance)
    partners = _pair_at_junctions(arms) + _pair_over_gaps(arms, distance)
    return _number_cables(_join(branches, arms, partners, distance))


# --- Arms: branches where they meet ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Arm:
    """One end of a branch, measured outside the blob where branches meet, or outside a blunt end.

    key: the number of the branch, and 0 for its first point or 1 for its last.
    junction: the number of the junction; None for a free end.
    start: how many points of the branch, counted from this end, are in the blob or in the blunt end.
    point: (x, y), where the branch leaves it.
    direction: unit vector (x, y) there, out of the branch.
    width: of the cable there, in pixels.
    length: of the branch, in pixels.
    """

    key: tuple[int, int]
    junction: int | None
    start: int
    point: np.ndarray
    direction: np.ndarray
    width: float
    length: float


_Arms = dict[tuple[int, int], _Arm]


def _outer_arms(branches: Sequence[Branch], distance: np.ndarray) -> _Arms:
    """The arms of all branches, by key, except branches inside a junction.

    The skeleton of a crossing is rarely one node: where two cables overlap, it is one line between two nodes.
    Nodes whose blobs overlap are one junction. So are the nodes at both ends of a line that is not long, if
    an even number of other branches meets at each end. If they are only two, their angle must be small.
    """
    degree = Counter(node for branch in branches for node in branch.nodes)
    blob = {
        node: (point, float(distance[int(point[1]), int(point[0])]))
        for branch in branches
        for node, point in zip(branch.nodes, branch.points[[0, -1]], strict=True)
    }
    lengths = [float(arc_lengths(branch.points)[-1]) for branch in branches]
    between = {
        number: (lengths[number], blob[branch.nodes[0]][1] + blob[branch.nodes[1]][1])
        for number, branch in enumerate(branches)
        if min(degree[node] for node in branch.nodes) > 2
    }
    inner = {number for number, (length, radii) in between.items() if length <= radii}
    arms = _measure_arms(branches, inner, blob, degree, distance)
    meeting = _by_junction(arms)
    for number, (length, radii) in between.items():
        if number in inner or length > MAX_OVERLAP * radii:
            continue
        sides = [arms[number, side] for side in (0, 1)]
        groups = [[arm for arm in meeting[side.junction] if arm is not side] for side in sides]
        if sides[0].junction != sides[1].junction and all(map(_is_fork, groups)):
            inner.add(number)
            for side in sides:  # they are used up
                meeting[side.junction] = []
    return _measure_arms(branches, inner, blob, degree, distance)


def _is_fork(arms: Sequence[_Arm]) -> bool:
    """Whether these can be the arms of whole cables: two at a small angle, or a larger even number."""
    is_even = len(arms) > 0 and len(arms) % 2 == 0
    return is_even and (len(arms) > 2 or float(arms[0].direction @ arms[1].direction) > np.cos(MAX_FORK))


def _by_junction(arms: _Arms) -> dict[int | None, list[_Arm]]:
    meeting: dict[int | None, list[_Arm]] = defaultdict(list)
    for arm in arms.values():
        if arm.junction is not None:
            meeting[arm.junction].append(arm)
    return meeting


def _measure_arms(
    branches: Sequence[Branch],
    inner: set[int],
    blob: dict[int, tuple[np.ndarray, float]],
    degree: Counter[int],
    distance: np.ndarray,
) -> _Arms:
    """Measure the arms of all branches except `inner` ones, whose two nodes become one junction.

    `blob` has the point (x, y) and the radius of each node.
    """
    graph = nx.Graph()
    graph.add_nodes_from(node for node in degree if degree[node] > 1)
    graph.add_edges_from(branches[number].nodes for number in inner)
    junctions = list(nx.connected_components(graph))
    junction_of = {node: number for number, nodes in enumerate(junctions) for node in nodes}
    arms: _Arms = {}
    for number, branch in enumerate(branches):
        if number in inner:
            continue
        half_width = float(np.median(_sample(distance, branch.points)))
        starts = []
        for points, node in zip((branch.points, branch.points[::-1]), branch.nodes, strict=True):
            blobs = [blob[other] for other in junctions[junction_of[node]]] if node in junction_of else []
            if degree[node] == 2:  # a ring, which has no node, begins anywhere
                blobs = []
            elif not blobs:
                blobs = [(points[0], 1.5 * half_width)]  # the skeleton turns to a corner of a blunt end
            starts.append(_points_inside(points, blobs))
        for side, node in enumerate(branch.nodes):
            points = branch.points[starts[0] : len(branch.points) - starts[1]]
            whole = branch.points[-side] - branch.points[side - 1]
            point, direction, width = _measure_end(points[::-1] if side else points, whole, distance)
            length = float(arc_lengths(branch.points)[-1])
            key = (number, side)
            arms[key] = _Arm(key, junction_of.get(node), starts[side], point, direction, width, length)
    return arms


def _points_inside(points: np.ndarray, blobs: Sequence[tuple[np.ndarray, float]]) -> int:
    """How many of the first points (N, 2) are within a blob; less than half of them."""
    inside = np.zeros(len(points), bool)
    for center, radius in blobs:
        inside |= np.linalg.norm(points - center, axis=1) < radius
    count = len(points) if inside.all() else int(np.argmin(inside))
    return min(count, (len(points) - 1) // 2)


def _measure_end(
    points: np.ndarray, whole: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit a line to the first points (N, 2) of a branch: where it begins, its direction there, the width.

    `whole` is the vector to its first point from its last, for a branch with a single point outside blobs.
    """
    arcs = arc_lengths(points)
    half_widths = _sample(distance, points)
    near = arcs <= max(2 * DIRECTION_LENGTH * half_widths[0], 5)
    if near.sum() < 2:
        return points[0], whole / (np.linalg.norm(whole) or 1.0), _width(half_widths[:1])
    (slope, start) = np.polyfit(arcs[near], points[near], 1)
    return start, -slope / (np.linalg.norm(slope) or 1.0), _width(half_widths[near])


def _sample(distance: np.ndarray, points: np.ndarray) -> np.ndarray:
    columns, rows = np.rint(points).astype(int).T
    return distance[rows.clip(0, distance.shape[0] - 1), columns.clip(0, distance.shape[1] - 1)]


def _width(half_widths: np.ndarray) -> float:
    return float(2 * np.median(half_widths)) - WIDTH_BIAS


# --- Pairs: arms that are one cable ------------------------------------------------------------


def _bend(first: _Arm, second: _Arm) -> float:
    """How much a cable bends from one arm to the other, in radians.

    This is the square root of the bending energy of a cubic curve between them, for a curve of length 4. With
    the angles a and b of its ends to the straight line, the energy is a^2 + ab + b^2. An arc bends by the
    angle of each of its ends.
    """
    line = second.point - first.point
    if np.linalg.norm(line) < 1:  # too short to have a direction
        line = first.direction - second.direction
    a = _angle(line, first.direction)
    b = _angle(line, -second.direction)
    return float(np.sqrt(a * a + a * b + b * b))


def _angle(start: np.ndarray, end: np.ndarray) -> float:
    """The angle from one vector (x, y) to another in radians, from -pi to pi."""
    cross, dot = start[0] * end[1] - start[1] * end[0], start @ end
    return float(np.arctan2(cross, dot))


def _pair_at_junctions(arms: _Arms) -> list[tuple[_Arm, _Arm]]:
    """Pair the arms of each junction so that the cables bend least and change their widths least."""
    pairs = []
    for meeting in _by_junction(arms).values():
        if len(meeting) == 2:
            pairs.append((meeting[0], meeting[1]))
        if len(meeting) == 2 or len(meeting) > MAX_ARMS:
            continue
        costs = {}
        for first, second in combinations(meeting, 2):
            change = np.log(first.width / second.width)
            costs[first, second] = _bend(first, second) ** 2 + (WIDTH_WEIGHT * change) ** 2
        pairs += _best_pairs(costs, MAX_BEND**2)
    return pairs


def _best_pairs(costs: dict[tuple[_Arm, _Arm], float], limit: float) -> list[tuple[_Arm, _Arm]]:
    """The pairs with the largest sum of `limit - cost`, in which no arm occurs twice."""
    arms = list(dict.fromkeys(chain.from_iterable(costs)))
    number_of = {arm: number for number, arm in enumerate(arms)}
    graph = nx.Graph()  # of numbers, because the order of a set of arms varies between runs
    for (first, second), cost in costs.items():
        if cost < limit:
            graph.add_edge(number_of[first], number_of[second], weight=limit - cost)
    pairs: list[tuple[_Arm, _Arm]] = []
    for part in nx.connected_components(graph):
        if len(part) <= MAX_ARMS:
            matching = nx.max_weight_matching(graph.subgraph(part))
            pairs += [(arms[first], arms[second]) for first, second in sorted(map(sorted, matching))]
    return pairs


def _pair_over_gaps(arms: _Arms, distance: np.ndarray) -> list[tuple[_Arm, _Arm]]:
    """Pair the free ends between which the mask has a gap that is shorter than the cable is wide.

    Only background counts as gap: the mask of another cable may be in it.
    """
    free = [arm for arm in arms.values() if arm.junction is None and arm.length > arm.width]
    if len(free) < 2:
        return []
    tips = np.array([_tip(arm, distance) for arm in free])
    costs = {}
    for i, j in cKDTree(tips).query_pairs(MAX_GAP * max(arm.width for arm in free)):
        length = float(np.linalg.norm(tips[i] - tips[j]))
        width = min(free[i].width, free[j].width)
        between = np.linspace(tips[i], tips[j], 2 + int(2 * length))
        gap = length * float(np.mean(_sample(distance, between) == 0))
        if length <= MAX_GAP * width and gap <= max(width, 2):
            costs[free[i], free[j]] = _bend(free[i], free[j]) ** 2
    return _best_pairs(costs, MAX_GAP_BEND**2)


def _tip(arm: _Arm, distance: np.ndarray) -> np.ndarray:
    """Where the cable leaves the mask if it goes straight on from a free end; at most 1.5 widths away."""
    steps = arm.point + np.arange(0, 1.5 * arm.width + 1, 0.5)[:, None] * arm.direction
    pixels = np.rint(steps)
    outside = (pixels < 0).any(axis=1) | (pixels >= distance.shape[::-1]).any(axis=1)
    outside |= _sample(distance, steps) == 0
    return steps[max(int(np.argmax(outside)) - 1, 0) if outside.any() else -1]


# --- Cables: branches that are joined ----------------------------------------------------------


def _join(
    branches: Sequence[Branch], arms: _Arms, pairs: Iterable[tuple[_Arm, _Arm]], distance: np.ndarray
) -> list[Cable]:
    """Join the branches whose arms are paired. The cables are smooth, and their ids are 0."""
    partner = {a.key: b for first, second in pairs for a, b in ((first, second), (second, first))}
    cables: list[Cable] = []
    done: set[int] = set()
    for key in [*(key for key in arms if key not in partner), *arms]:  # a ring has no end to begin at
        if key[0] in done:
            continue
        arm: _Arm | None = arms[key]
        start = [] if key in partner else [_end(arms[key], distance)]
        parts, ends = [part for part, _ in start], [kind for _, kind in start]
        while arm is not None and arm.key[0] not in done:
            number, side = arm.key
            done.add(number)
            leaving = arms[number, 1 - side]
            parts.append(_body(branches[number], arms[number, 0], arms[number, 1], distance)[:: 1 - 2 * side])
            arm = partner.get(leaving.key)
            if arm is None:
                part, kind = _end(leaving, distance)
                parts.append(part[::-1])
                ends.append(kind)
            else:
                parts.append(_connect(leaving, arm, distance))
        line = np.concatenate(parts)
        line[:, :2] = line[:, :2].clip(0, np.array(distance.shape[::-1]) - 1)
        if len(line) > 1 and np.isfinite(line[:, 2]).any():
            cables.append(_smooth(line, arm is not None, tuple(ends)))
    return cables


def _body(branch: Branch, first: _Arm, last: _Arm, distance: np.ndarray) -> np.ndarray:
    """The points of a branch outside its ends with the width there: float64 (N, 3) of (x, y, width)."""
    points = branch.points[first.start : len(branch.points) - last.start]
    return np.column_stack([points, 2 * _sample(distance, points) - WIDTH_BIAS])


def _end(arm: _Arm, distance: np.ndarray) -> tuple[np.ndarray, str]:
    """What comes before an arm without a partner, (N, 3) of (x, y, unknown width), and what the end is."""
    if arm.junction is not None:
        return np.empty((0, 3)), "cable"
    tip = _tip(arm, distance)
    margin = max(1.0, arm.width / 2)  # masks often end a little before the frame
    at_frame = (tip < margin).any() or (tip > np.array(distance.shape[::-1]) - 1 - margin).any()
    return np.array([[*tip, np.nan]]), "frame" if at_frame else "free"


def _connect(leaving: _Arm, entering: _Arm, distance: np.ndarray) -> np.ndarray:
    """The path from one arm to another, without its ends: (N, 3) of (x, y, unknown width).

    This is a smooth curve. If that would leave the mask at a junction, the path follows the middle.
    """
    curve = _curve(leaving, entering)
    if leaving.junction is None or (_sample(distance, curve[:, :2]) > 0).all():
        return curve
    both = np.array([leaving.point, entering.point])
    low = np.maximum(0, np.floor(both.min(axis=0) - leaving.width)).astype(int)
    high = np.ceil(both.max(axis=0) + leaving.width).astype(int) + 1
    part = distance[low[1] : high[1], low[0] : high[0]]
    start, end = np.rint(both - low).astype(int).clip(0, np.array(part.shape[::-1]) - 1)[:, ::-1]
    path, _ = route_through_array(1 / (part + 0.01), start, end)
    points = np.array(path[1:-1], float).reshape(-1, 2)[:, ::-1] + low
    return np.column_stack([points, np.full(len(points), np.nan)])


def _curve(leaving: _Arm, entering: _Arm) -> np.ndarray:
    """A cubic curve from one arm to another, without its ends: (N, 3) of (x, y, unknown width)."""
    length = float(np.linalg.norm(entering.point - leaving.point))
    t = np.arange(1, int(length))[:, None] / max(length, 1)
    start, end = length * leaving.direction, -length * entering.direction
    points = (2 * t**3 - 3 * t**2 + 1) * leaving.point + (t**3 - 2 * t**2 + t) * start
    points = points + (3 * t**2 - 2 * t**3) * entering.point + (t**3 - t**2) * end
    return np.column_stack([points, np.full(len(points), np.nan)])


def _smooth(line: np.ndarray, closed: bool, ends: tuple[str, ...]) -> Cable:
    """Smooth the steps of the pixels, and place the points at equal distances of about half a width.

    `line` is (N, 3) of (x, y, width); an unknown width is interpolated.
    """
    width = max(1.0, float(np.nanmedian(line[:, 2])))
    fine = _resample(line, closed, 1.0)
    sigma = max(1.0, SMOOTHING * width)
    if closed:
        smooth = gaussian_filter1d(fine, sigma, axis=0, mode="wrap")
    else:  # mirrored through its ends, so that they stay
        margin = min(int(4 * sigma), len(fine) - 1)
        padded = np.pad(fine, ((margin, margin), (0, 0)), mode="reflect", reflect_type="odd")
        padded[:, 2] = np.pad(fine[:, 2], margin, mode="edge")
        smooth = gaussian_filter1d(padded, sigma, axis=0)[margin : len(padded) - margin]
    line = _resample(smooth, closed, max(1.0, width / 2))
    return Cable(0, line[:, :2].astype(np.float32), line[:, 2].clip(1).astype(np.float32), closed, ends)


def _resample(line: np.ndarray, closed: bool, step: float) -> np.ndarray:
    """Place points at equal distances of about `step` along a line (N, 3) of (x, y, width)."""
    rest = _ring(line) if closed else line
    arcs = arc_lengths(rest[:, :2])
    known = np.isfinite(rest[:, 2])
    count = max(3 if closed else 1, round(arcs[-1] / step))
    at = np.linspace(0, arcs[-1], count + 1)[: count if closed else None]
    columns = [np.interp(at, arcs, rest[:, 0]), np.interp(at, arcs, rest[:, 1])]
    return np.column_stack([*columns, np.interp(at, arcs[known], rest[known, 2])])


def _ring(points: np.ndarray) -> np.ndarray:
    """The points (N, M) of a ring with the first one repeated at the end."""
    return np.concatenate([points, points[:1]])


def _number_cables(cables: Iterable[Cable]) -> list[Cable]:
    """Number the cables that are long enough, the longest first."""
    long = [c for c in cables if c.length >= max(MIN_LENGTH, MIN_ASPECT * float(np.median(c.widths)))]
    long.sort(key=lambda cable: -cable.length)
    return [replace(cable, id=number) for number, cable in enumerate(long[:MAX_ID], 1)]


# --- Crossings and instances -------------------------------------------------------------------


def find_crossings(cables: Sequence[Cable]) -> list[Crossing]:
    """Find where the centerlines of cables cross each other or themselves."""
    if not cables:
        return []
    lines = [_ring(cable.points) if cable.closed else cable.points for cable in cables]
    start = np.concatenate([line[:-1] for line in lines]).astype(float)
    step = np.concatenate([np.diff(line, axis=0) for line in lines]).astype(float)
    owner = np.repeat(np.arange(len(lines)), [len(line) - 1 for line in lines])
    reach = float(np.linalg.norm(step, axis=1).max())
    pairs = cKDTree(start + step / 2).query_pairs(reach, output_type="ndarray")
    a, b = np.sort(pairs, axis=1).T
    with np.errstate(divide="ignore", invalid="ignore"):  # parallel steps
        scale = _cross(step[a], step[b])
        t = _cross(start[b] - start[a], step[b]) / scale
        u = _cross(start[b] - start[a], step[a]) / scale
        meet = (t >= 0) & (t < 1) & (u >= 0) & (u < 1) & ((owner[a] != owner[b]) | (b - a > 1))
    found: dict[tuple[int, int], list[Crossing]] = defaultdict(list)
    for i, j, part in zip(a[meet], b[meet], t[meet], strict=True):
        pair = (cables[owner[i]].id, cables[owner[j]].id)
        x, y = start[i] + part * step[i]
        turn = abs(np.degrees(_angle(step[i], step[j])))
        found[pair].append(Crossing((float(x), float(y)), pair, float(min(turn, 180 - turn))))
    return [crossing for several in found.values() for crossing in several]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def cables_document(name: str, size: tuple[int, int], cables: Sequence[Cable]) -> dict[str, Any]:
    """The JSON document of `predict.py --centerlines` for an image of `size` (h, w).

    docs/prediction.md explains its keys.
    """
    described = [
        {
            "id": cable.id,
            "length": round(cable.length, 1),
            "closed": cable.closed,
            "ends": [
                {"x": round(float(x), 2), "y": round(float(y), 2), "kind": kind}
                for (x, y), kind in zip(cable.points[[0, -1]], cable.ends, strict=False)  # a ring has none
            ],
            "points": [[round(x, 2), round(y, 2)] for x, y in cable.points.tolist()],
            "widths": [round(width, 2) for width in cable.widths.tolist()],
        }
        for cable in cables
    ]
    crossings = [
        {
            "x": round(crossing.point[0], 2),
            "y": round(crossing.point[1], 2),
            "cables": list(crossing.cables),
            "angle": round(crossing.angle, 1),
        }
        for crossing in find_crossings(cables)
    ]
    document = {"image": name, "width": size[1], "height": size[0]}
    return {**document, "cables": described, "crossings": crossings}


def instance_mask(mask: np.ndarray, cables: Sequence[Cable]) -> np.ndarray:
    """Give each pixel of a mask, bool (H, W), the id of its cable: uint16 (H, W), 0 for background.

    A pixel belongs to the cable whose centerline is nearest, in widths of that cable. Where cables cross,
    this divides the pixels that both cover. A region without a centerline is background.
    """
    ids = np.zeros(mask.shape, np.uint16)
    rows, columns = np.nonzero(mask)
    pixels = np.column_stack([columns, rows]).astype(np.float32)
    nearest = np.full(len(pixels), np.inf)
    found = np.zeros(len(pixels), np.uint16)
    for cable in cables:
        reach = 2 + float(cable.widths.max())
        band = np.zeros(mask.shape, np.uint8)
        line = [np.rint(cable.points).astype(np.int32)]
        thickness = min(32767, int(2 * reach))  # OpenCV draws no thicker lines
        cv2.polylines(band, line, cable.closed, 1, thickness)
        near = np.flatnonzero(band[rows, columns])
        fine = _resample(np.column_stack([cable.points, cable.widths]), cable.closed, 1.0)
        distances, index = cKDTree(fine[:, :2]).query(pixels[near], distance_upper_bound=reach)
        relative = distances / np.append(fine[:, 2], 1)[index]
        better = relative < nearest[near]
        nearest[near[better]] = relative[better]
        found[near[better]] = cable.id
    ids[rows, columns] = found
    return _fill(ids, mask)


def _fill(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give the other pixels of each region the nearest id, and none to a region without a centerline."""
    _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    missing = mask & (ids == 0) & np.isin(regions, np.unique(regions[ids > 0]))
    if missing.any():
        known = np.argwhere(ids > 0)
        _, index = cKDTree(known).query(np.argwhere(missing))
        ids[missing] = ids[tuple(known[index].T)]
    return ids
