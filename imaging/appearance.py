"""How a pasted cable looks: its color, the light of the scene, its shading. Images are RGB uint8 (H, W, 3).

A composite shows cables of every color under one light. Recoloring works in CIE Lab, where lightness is
apart from color, so that a cable keeps its own shading and texture.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from imaging.geometry import touched_box

# --- Color ------------------------------------------------------------------------------------

# Lightness ranges (L of CIE Lab, 0..100) of cables without color, and how often each is drawn.
ACHROMATIC = {"black": (6.0, 28.0), "gray": (32.0, 72.0), "white": (76.0, 97.0)}
ACHROMATIC_PROBABILITY = 0.15  # of each of the three
OWN_COLOR_PROBABILITY = 0.1
COLOR_LIGHTNESS = (20.0, 88.0)
COLOR_CHROMA = (18.0, 90.0)


@dataclass(frozen=True)
class Color:
    """A color that cables take.

    lab: float (3,), the mean that their pixels get.
    hue_turn: radians by which the colors around the mean turn.
    variety: how much of the variation of color around the mean is kept, 0..1.
    """

    lab: np.ndarray
    hue_turn: float
    variety: float


def draw_color(rng: np.random.Generator) -> Color | None:
    """Draw a color as cables have it: black, gray, white or any hue; None keeps the own color."""
    kind = rng.random()
    for lightness in ACHROMATIC.values():
        kind -= ACHROMATIC_PROBABILITY
        if kind < 0:
            return Color(np.array([rng.uniform(*lightness), *rng.normal(0, 2, 2)]), 0.0, 0.1)
    if kind < OWN_COLOR_PROBABILITY:
        return None
    hue, chroma = rng.uniform(0, 2 * np.pi), rng.uniform(*COLOR_CHROMA)
    lab = np.array([rng.uniform(*COLOR_LIGHTNESS), chroma * np.cos(hue), chroma * np.sin(hue)])
    return Color(lab, rng.uniform(0, 2 * np.pi), rng.uniform(0, 1))


def recolor(pixels: np.ndarray, color: Color | None) -> np.ndarray:
    """Give pixels RGB uint8 (n, 3) a color; returns RGB float32 (n, 3) in 0..255.

    The lightness of each pixel is scaled, so that shading and texture stay. The Lab conversion is CIE 1976
    with sRGB primaries, as OpenCV has it.
    """
    if color is None or len(pixels) == 0:
        return pixels.astype(np.float32)
    lab = cv2.cvtColor(pixels[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    mean = lab[:: 1 + len(lab) // 2000].mean(axis=0)
    texture = np.clip(lab[:, 0] / max(mean[0], 8.0), 0.3, 1.8)
    a, b = lab[:, 1] - mean[1], lab[:, 2] - mean[2]
    cos, sin = color.variety * np.cos(color.hue_turn), color.variety * np.sin(color.hue_turn)
    lab[:, 1] = color.lab[1] + (cos * a - sin * b)
    lab[:, 2] = color.lab[2] + (sin * a + cos * b)
    lab[:, 0] = np.clip(color.lab[0] * texture, 0, 100)
    return 255 * np.clip(cv2.cvtColor(lab[None], cv2.COLOR_LAB2RGB)[0], 0, 1)


# --- Light ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """The light of one scene, which all its cables share.

    direction: unit vector (x, y) from the light; shadows fall this way.
    side: 0..1, how much brighter the side of a cable is that faces the light.
    shadow: 0..1, how dark shadows are; 0 casts none.
    shadow_shift, shadow_blur: distance and softness of shadows, in units of 1/256 of the longest side.
    gain: float (3,), the factor by which the brightness and the white balance of the scene change colors.
    """

    direction: np.ndarray
    side: float
    shadow: float
    shadow_shift: float
    shadow_blur: float
    gain: np.ndarray


def draw_light(image: np.ndarray, rng: np.random.Generator) -> Light:
    """Draw the light of a scene; its color follows the mean color of the image to a random degree."""
    angle = rng.uniform(0, 2 * np.pi)
    mean = np.array(cv2.mean(image[::4, ::4])[:3]) + 10
    brightness = np.clip((mean.mean() / 120) ** rng.uniform(0, 0.5), 0.55, 1.3)
    return Light(
        direction=np.array([np.cos(angle), np.sin(angle)]),
        side=rng.uniform(0, 0.35),
        shadow=rng.uniform(0.2, 0.75) if rng.random() < 0.6 else 0.0,
        shadow_shift=rng.uniform(0, 5),
        shadow_blur=rng.uniform(0.6, 4),
        gain=brightness * np.clip((mean / mean.mean()) ** rng.uniform(0, 0.5), 0.7, 1.4),
    )


def cast_shadow(alpha: np.ndarray, image: np.ndarray, light: Light) -> None:
    """Darken an image uint8 (H, W, 3), in place, beside the cables of soft mask `alpha`, uint8 (H, W)."""
    if not light.shadow:
        return
    height, width = image.shape[:2]
    unit = max(height, width) / 256
    shift = np.column_stack([np.eye(2), unit * light.shadow_shift * light.direction])
    shadow = cv2.warpAffine(alpha, shift, (width, height))
    sigma = unit * light.shadow_blur
    kernel = cv2.getGaussianKernel(2 * round(3 * sigma) + 1, sigma)
    box = touched_box(shadow, margin=len(kernel) // 2 + 1)  # beyond the box, OpenCV mirrors its pixels
    # cv2.GaussianBlur takes twice as long for uint8 images.
    shadow = cv2.sepFilter2D(shadow[box], cv2.CV_32F, kernel, kernel)
    factor = 1 - light.shadow / 255 * shadow
    image[box] = cv2.multiply(image[box], cv2.merge([factor] * 3), dtype=cv2.CV_8U)


# --- Shading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shading:
    """How brightness changes from the center line of a cable (x = 0) to its edge (x = 1): 1 - drop x^power.

    gloss: brightness of a highlight along the cable, 0..1.
    gloss_width: its width as a fraction of the radius.
    """

    drop: float
    power: float
    gloss: float
    gloss_width: float


def draw_shading(rng: np.random.Generator) -> Shading:
    """Draw a shading: in three of four cables the edge is darker, and one in four is glossy."""
    return Shading(
        drop=rng.uniform(0.1, 0.75) if rng.random() < 0.75 else 0.0,
        power=rng.uniform(1.2, 3.5),
        gloss=rng.uniform(0.15, 0.7) if rng.random() < 0.25 else 0.0,
        gloss_width=rng.uniform(0.1, 0.35),
    )


def shade(
    colors: np.ndarray, across: np.ndarray, normals: np.ndarray, shading: Shading, light: Light
) -> np.ndarray:
    """Shade the pixels of a cable as those of a lit cylinder.

    Args:
        colors: RGB float32 (n, 3) in 0..255.
        across: float32 (n,), 0 on the center line and 1 at the edge of the cable.
        normals: float32 (n, 2), unit vectors (x, y) away from the center line.

    Returns:
        RGB float32 (n, 3) in 0..255.
    """
    facing = across * -(normals @ light.direction.astype(np.float32))  # -1..1, 1 at the edge to the light
    factor = (1 - shading.drop * across**shading.power) * (1 + light.side * facing)
    shaded = colors * (factor[:, None] * light.gain.astype(np.float32))
    if shading.gloss:
        # The highlight of a cylinder lies between its center line and the edge to the light.
        highlight = shading.gloss * np.exp(
            -(((facing - 0.4 * np.abs(facing).max()) / shading.gloss_width) ** 2)
        )
        shaded += highlight[:, None] * (255 - shaded)
    return np.clip(shaded, 0, 255)
