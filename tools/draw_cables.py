"""Draw cables with exact masks, as a dataset whose cables are pasted on backgrounds.

    python tools/draw_cables.py --out data/drawn --n 500

Writes imgs/ and masks/ with N pairs of PNG files. The images show cables of many shapes, widths, colors and
materials on a plain background: single wires, ribbons, harnesses with ties, twisted pairs, ropes and coiled
cords. The masks contain cables, and ties and tape on them, but no plugs, ferrules and bare ends. An image
depends only on the seed, its number and the size.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from cable_rendering import Light, Look, Strand, render

from base.errors import UserError
from base.flag_types import count, number, positive_int
from imaging.files import format_list
from imaging.media import write_image

REFERENCE_SIZE = 640  # the side of an image for which lengths below are given, in pixels
WIDTHS = (3.0, 60.0)
MIN_WIDTH = 2.0  # in pixels of any image
MAX_BUNDLE_WIDTH = 0.18  # of the side of an image
MAX_CABLES = 8
MAX_COVERAGE = 0.4  # of the area of an image, counted without overlaps
COLORS = {  # RGB in 0..1
    "red": (0.75, 0.08, 0.08),
    "blue": (0.06, 0.20, 0.62),
    "light blue": (0.25, 0.55, 0.85),
    "yellow": (0.92, 0.78, 0.08),
    "green": (0.08, 0.48, 0.18),
    "orange": (0.93, 0.42, 0.06),
    "brown": (0.36, 0.20, 0.10),
    "purple": (0.42, 0.16, 0.55),
    "pink": (0.90, 0.45, 0.60),
    "teal": (0.10, 0.55, 0.55),
}
METALS = ((0.62, 0.62, 0.64), (0.72, 0.45, 0.28), (0.75, 0.65, 0.40))  # steel, copper, brass
YELLOW, GREEN = np.array(COLORS["yellow"]), np.array(COLORS["green"])
Rng = np.random.Generator


# --- Colors and materials ----------------------------------------------------------------------


def random_color(rng: Rng) -> np.ndarray:
    """Draw black, gray or white in half of the cases, and else the color of a wire."""
    kind = rng.random()
    if kind < 0.5:
        low, high = ((0.02, 0.15), (0.25, 0.65), (0.75, 0.95))[int(rng.choice(3, p=(0.45, 0.25, 0.3)))]
        return (rng.uniform(low, high) + rng.normal(0, 0.012, 3)).clip(0.01, 1)
    if kind < 0.92:
        color = np.array(list(COLORS.values())[rng.integers(len(COLORS))])
        return (color * rng.uniform(0.6, 1.15) + rng.normal(0, 0.04, 3)).clip(0.01, 1)
    return rng.uniform(0.02, 0.95, 3)


def random_look(rng: Rng) -> Look:
    """Draw color and material: matte, glossy, rubber, textile or metal."""
    limb, power = rng.uniform(0.1, 0.75), rng.uniform(1.2, 3.5)
    material = rng.choice(["matte", "glossy", "rubber", "textile", "metal"], p=(0.35, 0.33, 0.14, 0.12, 0.06))
    look = Look(random_color(rng), limb, power, grain=rng.uniform(0.005, 0.04), gloss=rng.uniform(0, 0.08))
    if material == "glossy":
        look = replace(look, gloss=rng.uniform(0.2, 0.75), gloss_width=rng.uniform(0.06, 0.2))
    elif material == "rubber":
        color = look.color.mean() * rng.uniform(0.2, 0.6) + rng.normal(0, 0.01, 3)
        look = replace(look, color=color.clip(0.01, 1), gloss=rng.uniform(0.03, 0.15), gloss_width=0.4)
    elif material == "textile":
        second = random_color(rng) if rng.random() < 0.4 else None
        look = replace(
            look, **random_weave(rng), gloss=0.0, grain=rng.uniform(0.04, 0.12), second_color=second
        )
    elif material == "metal":
        weave = random_weave(rng) if rng.random() < 0.7 else {}
        color = np.array(METALS[rng.integers(len(METALS))]) * rng.uniform(0.7, 1.2)
        look = replace(look, **weave, color=color, gloss=rng.uniform(0.2, 0.5), gloss_width=0.3)
    if not look.weave and rng.random() < 0.14:
        colors = (YELLOW, GREEN) if rng.random() < 0.5 else (look.color, random_color(rng))
        turn = rng.choice([0.0, rng.uniform(0.01, 0.4)])
        look = replace(
            look, color=colors[0], second_color=colors[1], stripe=rng.uniform(0.25, 0.8), stripe_turn=turn
        )
    return replace(look, printed=not look.weave and rng.random() < 0.12)


def random_weave(rng: Rng) -> dict[str, Any]:
    return {
        "weave": str(rng.choice(["helix", "braid"], p=(0.3, 0.7))),
        "weave_depth": rng.uniform(0.2, 0.7),
        "weave_pitch": float(rng.integers(2, 7)),
    }


# --- Curves ------------------------------------------------------------------------------------


def smooth_noise(rng: Rng, n: int, spacing: float) -> np.ndarray:
    """Noise (n,) of standard deviation 1 at knots that are `spacing` values apart, and smooth in between."""
    knots = rng.normal(0, 1, int(n / spacing) + 3)
    at = np.arange(n) / spacing + rng.uniform(0, 1)
    left, share = at.astype(int), at % 1
    return knots[left] + (knots[left + 1] - knots[left]) * share**2 * (3 - 2 * share)


def random_curvature(rng: Rng, n: int, scale: float) -> np.ndarray:
    """Draw the curvature (n,) of a sweep, a wavy cable, loops, a bent cable or a nearly straight one."""
    kind = rng.choice(["sweep", "waves", "loops", "bends", "straight"], p=(0.35, 0.2, 0.15, 0.15, 0.15))
    if kind == "sweep":
        curvature = 0.005 * smooth_noise(rng, n, 200 * scale)
    elif kind == "waves":
        curvature = 0.018 * smooth_noise(rng, n, rng.uniform(35, 90) * scale)
    elif kind == "loops":
        turn = rng.choice([-1, 1]) / rng.uniform(35, 150)
        curvature = turn * (1 + rng.uniform(-0.4, 0.4) * np.linspace(0, 1, n))
        curvature = curvature + 0.002 * smooth_noise(rng, n, 60 * scale)
    elif kind == "bends":
        bends = smooth_noise(rng, n, rng.uniform(25, 60) * scale)
        curvature = 0.06 * np.sign(bends) * np.maximum(np.abs(bends) - 1.2, 0) + 0.001 * bends
    else:
        curvature = 0.0007 * smooth_noise(rng, n, 200 * scale)
    return curvature / scale


def random_curve(rng: Rng, size: int, half_width: float, stiffness: float) -> np.ndarray:
    """Draw the axis of a cable: (n, 2) points (x, y), about one pixel apart.

    The radius of curvature is at least `half_width` x `stiffness`. Some curves cross the whole image, others
    lie in it with both ends, and others end outside.
    """
    scale = size / REFERENCE_SIZE
    crossing = rng.random() < 0.4
    length = size * (rng.uniform(1.1, 1.9) if crossing else np.exp(rng.uniform(np.log(0.2), np.log(2.2))))
    n = max(int(length), int(7 * half_width), 8)
    limit = 1 / (half_width * stiffness)
    heading = np.cumsum(random_curvature(rng, n, scale).clip(-limit, limit))
    curve = np.cumsum(np.column_stack([np.cos(heading), np.sin(heading)]), axis=0)
    if crossing:  # start outside, and go in
        angle = rng.uniform(0, 2 * np.pi)
        start = size / 2 - (size * 0.72 + half_width) * np.array([np.cos(angle), np.sin(angle)])
        target = rng.uniform(0.25, 0.75, 2) * size - start
        # The middle of a curve points from its start to the target.
        middle = curve[min(n - 1, int(size * 0.7))] - curve[0]
        return rotated(curve - curve[0], np.arctan2(*target[::-1]) - np.arctan2(*middle[::-1])) + start
    curve = rotated(curve - curve[rng.integers(n // 4, n - n // 4)], rng.uniform(0, 2 * np.pi))
    return curve + rng.uniform(0.2, 0.8, 2) * size


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def unit_normals(curve: np.ndarray) -> np.ndarray:
    tangent = np.gradient(curve, axis=0)
    return tangent[:, ::-1] * (-1, 1) / np.maximum(np.hypot(*tangent.T), 1e-9)[:, None]


def shifted(curve: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Move each point (n, 2) along the normal of the curve by `offset` (n,)."""
    return curve + unit_normals(curve) * offset[:, None]


# --- Kinds of cables ---------------------------------------------------------------------------


def single_cable(rng: Rng, size: int, width: float, height: float) -> list[Strand]:
    radius = width / 2
    curve = random_curve(rng, size, radius, rng.uniform(2, 5))
    strand = Strand(curve, radius, height, random_look(rng))
    bands = (
        [random_band(rng, curve, np.zeros((1, len(curve))), radius, height)] if rng.random() < 0.12 else []
    )
    return [strand, *bands, *random_end(rng, strand, 0), *random_end(rng, strand, -1)]


def bundle(rng: Rng, size: int, width: float, height: float) -> list[Strand]:
    """A ribbon or a harness: parallel wires with gaps of at most 2 pixels, which may part at the ends."""
    scale = size / REFERENCE_SIZE
    n = int(rng.integers(2, 13))
    radius = max(min(width, MAX_BUNDLE_WIDTH * size / n), WIDTHS[0] * scale, MIN_WIDTH) / 2
    flat = rng.random() < 0.5
    pitch = (2 * radius + rng.uniform(0, 2) * scale) * (1.0 if flat else rng.uniform(0.6, 1.0))
    half_width = n * pitch / 2 + radius
    curve = random_curve(rng, size, half_width, 2.0)
    lanes = (rng.permutation(n) - (n - 1) / 2)[:, None] * pitch * np.ones(len(curve))
    if not flat:
        lanes += [radius * smooth_noise(rng, len(curve), 150 * scale) for _ in range(n)]
    if rng.random() < 0.6:
        lanes = fan_out(rng, lanes, half_width)
    looks = [random_look(rng)] * n
    if rng.random() < 0.5:  # one material in several colors
        looks = [replace(look, color=random_color(rng)) for look in looks]
    elif rng.random() < 0.6:
        palette = [random_look(rng) for _ in range(int(rng.integers(2, n + 1)))]
        looks = [palette[rng.integers(len(palette))] for _ in range(n)]
    end_seed = int(rng.integers(2**32))  # all wires end in the same way
    strands = []
    for i, (lane, look) in enumerate(zip(lanes, looks, strict=True)):
        start, end = (0, len(curve)) if flat else trimmed(rng, len(curve))
        points = gaussian_filter1d(shifted(curve, lane), 0.7 * radius, axis=0, mode="nearest")
        rise = height + (0 if flat else 0.6 * i / n)
        strand = Strand(points[start:end], radius, rise, look)
        strands.append(strand)
        for side in (0, -1):
            strands += random_end(np.random.default_rng(end_seed), strand, side)
    bands = [random_band(rng, curve, lanes, radius, height) for _ in range(int(rng.integers(0, 5)))]
    return strands + bands


def trimmed(rng: Rng, n: int) -> tuple[int, int]:
    """Cut up to an eighth off each end of `n` points."""
    return int(rng.uniform(0, n / 8)), n - int(rng.uniform(0, n / 8))


def fan_out(rng: Rng, lanes: np.ndarray, half_width: float) -> np.ndarray:
    """Spread the lanes (wires, n) at one end or both."""
    n = lanes.shape[1]
    growth: np.ndarray = np.zeros(lanes.shape)
    for distance in [np.arange(n), np.arange(n)[::-1]][: int(rng.integers(1, 3))]:
        spread = rng.uniform(0.3, 2.5)
        reach = min(n / 2, half_width * rng.uniform(2, 4) * (0.5 + spread))
        share = np.clip(1 - distance / reach, 0, 1) ** 2
        growth += share * spread * rng.normal(1, 0.25, (len(lanes), 1))
    return lanes * (1 + growth)


def twisted(rng: Rng, size: int, width: float, height: float) -> list[Strand]:
    """A twisted pair or triple, or a rope of three or four strands."""
    n = int(rng.choice([2, 2, 2, 3, 3, 4]))
    around = {2: 1.0, 3: 1.16, 4: 1.42}[n]  # distance of touching strands from the axis, in their radii
    radius = width / 2 / (1 + around) * (1.5 if n == 2 else 1.0)
    curve = random_curve(rng, size, radius * (1 + around), 3.0)
    phase = 2 * np.pi * np.arange(len(curve)) / (radius * rng.uniform(6, 22))
    phase = phase + 0.6 * smooth_noise(rng, len(curve), 100)
    looks = [random_look(rng)] * n
    if rng.random() < 0.5:
        looks = [random_look(rng) for _ in range(n)]
    turns = [phase + 2 * np.pi * i / n for i in range(n)]
    return [
        Strand(
            shifted(curve, radius * around * np.cos(turn)), radius, height + 0.35 + 0.3 * np.sin(turn), look
        )
        for turn, look in zip(turns, looks, strict=True)
    ]


def coiled_cord(rng: Rng, size: int, width: float, height: float) -> list[Strand]:
    """A telephone cord: a wire that is wound around the curve, and straight at both ends."""
    radius = np.clip(width / 6, 1.5 * size / REFERENCE_SIZE, 0.012 * size)
    around = radius * rng.uniform(2.2, 4.5)
    curve = random_curve(rng, size, around + radius, 2.5)
    n = len(curve)
    at = np.linspace(0, n - 1, 8 * n)
    center = np.column_stack([np.interp(at, np.arange(n), curve[:, axis]) for axis in (0, 1)])
    from_end = np.minimum(at, at[::-1])
    wound = np.clip((from_end - 0.08 * n) / (3 * around), 0, 1)
    phase = 2 * np.pi * np.cumsum(np.clip(4 * wound, 0, 1)) / 8 / (radius * rng.uniform(2.05, 3.5))
    tangent = unit_normals(center)[:, ::-1] * (1, -1)
    points = shifted(center, wound * around * np.cos(phase))
    points = points + tangent * (wound * around * rng.uniform(0.1, 0.4) * np.sin(phase))[:, None]
    return [Strand(points, radius, height + 0.35 + 0.3 * wound * np.sin(phase), random_look(rng))]


# --- Ties and ends -----------------------------------------------------------------------------


def random_band(rng: Rng, curve: np.ndarray, lanes: np.ndarray, radius: float, height: float) -> Strand:
    """A cable tie or a wrap of tape around the wires at `lanes` (wires, n) beside the curve."""
    places = (rng.uniform(0.15, 0.85, 3) * len(curve)).astype(int)
    at = min(places.tolist(), key=lambda place: float(np.ptp(lanes[:, place])))  # where wires are close
    low, high = lanes[:, at].min() - radius, lanes[:, at].max() + radius
    half_width = (high - low) / 2
    length = rng.uniform(0.3, 0.7) * radius + 1.5
    if rng.random() < 0.4:
        length = rng.uniform(0.7, 3) * min(half_width, 5 * radius)
    part = curve[max(0, at - int(length / 2) - 1) : at + int(length / 2) + 2]
    look = replace(random_look(rng), printed=False, weave="", second_color=None)
    if rng.random() < 0.6:
        look = replace(look, color=rng.choice([0.04, 0.85]) * np.ones(3))
    return Strand(
        shifted(part, np.full(len(part), (low + high) / 2)), half_width * 1.02 + 0.5, height + 0.95, look
    )


def random_end(rng: Rng, strand: Strand, end: int) -> list[Strand]:
    """What is at the end of a wire (0 or -1): nothing, a ferrule, bare copper, a plug or a sleeve."""
    points, radius = strand.points, float(np.mean(strand.radius))
    inner = points[min(len(points) - 1, 3)] if end == 0 else points[max(0, len(points) - 4)]
    outward = (points[end] - inner) / max(np.hypot(*(points[end] - inner)), 1e-9)

    def part(start: float, stop: float, width: float, look: Look) -> Strand:
        """A straight part from `start` to `stop` along the wire; all lengths in radii of the wire."""
        along = np.linspace(start, stop, 8)[:, None] * radius
        height = np.broadcast_to(strand.height, len(points))[end] + (0.3 if start < 0 else 0.2)
        return Strand(points[end] + along * outward, width * radius, height, look, is_cable=False)

    metal = Look(np.array(METALS[rng.integers(len(METALS))]), 0.5, 2.0, gloss=0.5, gloss_width=0.25)
    plastic = Look(random_color(rng), rng.uniform(0.2, 0.5), 3.0, gloss=rng.uniform(0, 0.3))
    kind = rng.choice(["cut", "ferrule", "bare", "plug", "sleeve"], p=(0.4, 0.2, 0.1, 0.2, 0.1))
    if kind == "cut":
        return []
    if kind == "ferrule":
        return [part(0, rng.uniform(5, 8), 0.55, metal), part(-0.5, rng.uniform(2, 3.5), 1.25, plastic)]
    if kind == "bare":
        return [part(0, rng.uniform(2, 6), 0.6, replace(metal, weave="helix"))]
    if kind == "sleeve":
        return [part(-1.5, rng.uniform(1, 4), 1.3, plastic)]
    body = replace(plastic, limb=0.15, limb_power=6.0)
    long, wide = rng.uniform(4, 7), rng.uniform(1.5, 2.4)
    shell = replace(metal, limb=0.2, gloss=0.2, gloss_width=0.6)
    return [
        part(long - 0.5, long + rng.uniform(1.5, 4), wide * 0.75, shell),
        part(0, long, wide, body),
        part(-2, 0.5, 1.25, body),
    ]


# --- Images ------------------------------------------------------------------------------------

KINDS = (single_cable, bundle, twisted, coiled_cord)
KIND_PROBABILITIES = (0.58, 0.22, 0.11, 0.09)


def draw_image(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one to eight cables: RGB uint8 (size, size, 3) and mask bool (size, size)."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    angle = rng.uniform(0, 2 * np.pi)
    light = Light(np.array([np.cos(angle), np.sin(angle)]), rng.uniform(0, 0.4), rng.uniform(0.2, 0.65))
    strands: list[Strand] = []
    common_width = random_width(rng, size) if rng.random() < 0.5 else None
    for height in range(int(rng.integers(1, MAX_CABLES + 1))):
        width = common_width * rng.uniform(0.85, 1.2) if common_width else random_width(rng, size)
        kind = KINDS[int(rng.choice(len(KINDS), p=KIND_PROBABILITIES))]
        cable = kind(rng, size, width, float(height))
        if strands and sum(map(area, strands + cable)) > MAX_COVERAGE * size**2:
            break
        strands += cable
    strands = in_perspective(rng, strands, size)
    grain = rng.normal(0, 1, (256, 256)).astype(np.float32)
    return render(strands, (size, size), contrasting_color(rng, strands), light, grain)


def random_width(rng: Rng, size: int) -> float:
    """Draw a width in pixels; thin widths are as frequent as thick ones on a logarithmic scale."""
    return max(MIN_WIDTH, float(np.exp(rng.uniform(*np.log(WIDTHS)))) * size / REFERENCE_SIZE)


def area(strand: Strand) -> float:
    length = np.hypot(*np.diff(strand.points, axis=0).T).sum()
    return float(2 * np.mean(strand.radius) * length)


def in_perspective(rng: Rng, strands: Sequence[Strand], size: int) -> list[Strand]:
    """Let all widths grow by up to 12 % from one side of the image to the other."""
    slope = rng.normal(0, 1, 2)
    slope *= rng.uniform(0, 0.12) / np.hypot(*slope)
    factors = [1 + ((strand.points / size).clip(0, 1) - 0.5) @ slope for strand in strands]
    return [replace(s, radius=s.radius * factor) for s, factor in zip(strands, factors, strict=True)]


def contrasting_color(rng: Rng, strands: Sequence[Strand]) -> np.ndarray:
    """Choose the one of 30 random colors that is farthest from all colors of the strands; RGB in 0..1."""
    looks = [strand.look for strand in strands]
    colors = [look.color for look in looks] + [c for look in looks if (c := look.second_color) is not None]
    candidates = rng.uniform(0.05, 0.95, (30, 3))
    distance = np.linalg.norm(candidates[:, None] - np.array(colors), axis=-1).min(axis=1)
    return candidates[distance.argmax()]


# --- Command -----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw cables with exact masks, as a dataset.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write imgs/ and masks/ to")
    parser.add_argument("--n", type=positive_int, default=500, help="number of images")
    parser.add_argument("--seed", type=count, default=0, help="seed of every random choice")
    side = number(int, lambda value: 256 <= value <= 4096, "a whole number from 256 to 4096")
    parser.add_argument("--size", type=side, default=REFERENCE_SIZE, help="side of an image, in pixels")
    return parser.parse_args(argv)


def require_no_other_files(folder: Path, names: Sequence[str]) -> None:
    """Raise UserError unless the folder is missing or has only files that will be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: it is a file; expected a folder, which may be missing")
    ours = {f"{kind}/{name}" for kind in ("imgs", "masks") for name in names}
    files = (path for path in folder.rglob("*") if not path.is_dir() and not path.name.startswith("."))
    others = sorted({path.relative_to(folder).as_posix() for path in files} - ours)
    if others:
        raise UserError(
            f"--out {folder}: it holds {len(others)} files that this command would not write; choose a new "
            f"folder, or move them away:\n  {format_list(others)}"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after a message."""
    args = parse_args(argv)
    names = [f"drawn_{args.seed}_{index:05d}.png" for index in range(args.n)]
    try:
        require_no_other_files(args.out, names)
        for kind in ("imgs", "masks"):
            (args.out / kind).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            image, mask = draw_image(args.seed, index, args.size)
            write_image(args.out / "imgs" / name, image)
            write_image(args.out / "masks" / name, np.where(mask, 255, 0).astype(np.uint8))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.n} images and masks are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
