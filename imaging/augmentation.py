"""Random changes of whole images: flips, color, camera. All images are RGB uint8 (H, W, 3)."""

import io
from statistics import NormalDist

import cv2
import numpy as np
from PIL import Image

# The quantiles of a standard normal distribution at 256 evenly spaced probabilities.
NORMAL_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copy an image (H, W, C), mirrored left-right and top-bottom with a probability of one half each."""
    code = (None, 0, 1, -1)[rng.integers(4)]
    return image.copy() if code is None else cv2.flip(image, code)


# --- Color -------------------------------------------------------------------------------------


def recolor_scene(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change hue, saturation and brightness of a background or a whole photo mildly."""
    hue, saturation = rng.uniform(-15, 15), rng.uniform(0.6, 1.4)  # hue in OpenCV's units of 2 degrees
    gamma = np.exp(rng.uniform(-0.4, 0.4))  # below 1 brightens
    levels = np.arange(256, dtype=np.float32)
    channels = (levels + hue) % 180, np.clip(levels * saturation, 0, 255), 255 * (levels / 255) ** gamma
    table = np.stack(channels, axis=-1)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, table.astype(np.uint8)[None]), cv2.COLOR_HSV2RGB)


# --- Camera ------------------------------------------------------------------------------------


def camera_degradation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate a camera: brightness and contrast, and sometimes blur, noise and JPEG artifacts."""
    levels = np.arange(256) * rng.uniform(0.75, 1.25) + rng.uniform(-25, 25)
    image = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        # Random bytes and a table of quantiles: many times faster than drawing normal numbers.
        table = np.rint(NORMAL_QUANTILES * rng.uniform(2, 10)).astype(np.int16)
        noise = cv2.LUT(rng.integers(256, size=image.shape, dtype=np.uint8), table)
        image = cv2.add(image, noise, dtype=cv2.CV_8U)
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
        image = np.asarray(Image.open(buffer))
    return image
