"""The skeleton of a mask, as branches between its ends and junctions."""

from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
from skimage.morphology import skeletonize

MIN_REGION = 10  # pixels of the smallest region that can hold a cable


@dataclass(frozen=True)
class Branch:
    """A line of skeleton pixels between two nodes.

    points: float64 (N, 2) with N >= 2, (x, y) in pixels, from the first node to the last.
    nodes: the numbers of the first and the last node. A branch that is a closed loop has twice the same.
    """

    points: np.ndarray
    nodes: tuple[int, int]


def clean(mask: np.ndarray) -> np.ndarray:
    """Remove specks and fill pinholes, which would give false branches.

    A speck is a region that is smaller than the square of the typical cable width, or than 10 pixels. A
    pinhole is smaller than a quarter of that square. `mask` is bool (H, W); returns a new one.
    """
    regions = _remove_small(mask, MIN_REGION)
    if not regions.any():
        return regions
    distance = distance_to_edge(regions)
    is_ridge = regions & (distance == cv2.dilate(distance, np.ones((3, 3), np.uint8)))
    width = 2 * float(np.median(distance[is_ridge]))  # a median along the cables: a large blob counts little
    return ~_remove_small(~_remove_small(regions, width**2), (width / 2) ** 2, connectivity=4)


def _remove_small(mask: np.ndarray, min_area: float, connectivity: int = 8) -> np.ndarray:
    """Remove the regions of fewer pixels than `min_area`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area
    keep[0] = False  # the background
    return keep[labels]


def distance_to_edge(mask: np.ndarray) -> np.ndarray:
    """The distance in pixels of each pixel to the nearest background pixel, float32 (H, W).

    The border of the image is no edge: a cable that it cuts off keeps its width. Without any background, the
    distance is the sum of the sides.
    """
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV's last digits vary from call to call; the squares of exact distances are whole numbers.
    exact = np.sqrt(np.rint(distance.astype(np.float64) ** 2))
    return np.minimum(exact, sum(mask.shape)).astype(np.float32)


def find_branches(mask: np.ndarray, distance: np.ndarray) -> list[Branch]:
    """Find the branches of the skeleton of a mask, without spurs.

    A spur is a branch with a free end that is hardly longer than the mask is wide where it begins. A rough
    edge gives spurs, and so does each corner of a blunt end.

    Args:
        mask: bool (H, W).
        distance: `distance_to_edge` of it.
    """
    skeleton = skeletonize(mask)
    while True:
        branches = _trace(skeleton)
        degree = Counter(node for branch in branches for node in branch.nodes)
        spurs = [branch for branch in branches if _is_spur(branch, degree, distance)]
        if not spurs:
            return branches
        for spur in spurs:
            # The junction stays, because other branches have it too.
            points = spur.points[:-1] if degree[spur.nodes[0]] == 1 else spur.points[1:]
            columns, rows = points.astype(int).T
            skeleton[rows, columns] = False


def _is_spur(branch: Branch, degree: Counter[int], distance: np.ndarray) -> bool:
    if sorted(min(degree[node], 2) for node in branch.nodes) != [1, 2]:
        return False
    x, y = branch.points[-1 if degree[branch.nodes[0]] == 1 else 0].astype(int)
    return arc_lengths(branch.points)[-1] < 2 * distance[y, x] + 1


def arc_lengths(points: np.ndarray) -> np.ndarray:
    """The length of a polyline (N, 2) from its first point to each point, float64 (N,)."""
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])


def _trace(skeleton: np.ndarray) -> list[Branch]:
    """Follow the pixels of a skeleton, bool (H, W), from node to node.

    A node is a pixel without exactly two neighbors. A loop without a node begins at any of its pixels.
    """
    pixels, neighbors = _neighbors(skeleton)
    points = pixels[:, ::-1].astype(float)
    visited = np.zeros(len(pixels), bool)
    branches = []

    def follow(start: int, following: int) -> list[int]:
        path = [start, following]
        while len(neighbors[path[-1]]) == 2 and path[-1] != start:
            first, second = neighbors[path[-1]]
            path.append(second if first == path[-2] else first)
        visited[path] = True
        return path

    for node, adjacent in enumerate(neighbors):
        if len(adjacent) == 2:
            continue
        for following in adjacent:
            is_node = len(neighbors[following]) != 2
            if node < following if is_node else not visited[following]:
                path = follow(node, following)
                branches.append(Branch(points[path], (path[0], path[-1])))
    for pixel, adjacent in enumerate(neighbors):
        if len(adjacent) == 2 and not visited[pixel]:
            path = follow(pixel, adjacent[0])
            branches.append(Branch(points[path], (pixel, pixel)))
    return branches


def _neighbors(skeleton: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """The pixels (row, column) of a skeleton, int (N, 2), and the numbers of the neighbors of each.

    Pixels that touch at a corner are no neighbors if both touch a third one with their sides: then a corner
    of a staircase does not look like a junction.
    """
    padded = np.pad(skeleton, 1)
    rows, columns = np.nonzero(padded)
    number = np.full(padded.shape, -1, np.int32)
    number[rows, columns] = np.arange(len(rows))
    pairs = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        is_pair = padded[rows + down, columns + right]
        if down and right:
            is_pair &= ~padded[rows + down, columns] & ~padded[rows, columns + right]
        found = (
            number[rows[is_pair], columns[is_pair]],
            number[rows[is_pair] + down, columns[is_pair] + right],
        )
        pairs.append(np.column_stack(found))
    neighbors: list[list[int]] = [[] for _ in range(len(rows))]
    for first, second in np.concatenate(pairs).tolist():
        neighbors[first].append(second)
        neighbors[second].append(first)
    return np.column_stack([rows, columns]) - 1, neighbors
