"""The path of a new user: from labels of a labeling tool to masks, centerlines, an ONNX file and a report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import draw_cable, rng, run_tiny, write_backgrounds
from PIL import Image

import export
import import_labels
import inference
import predict
from imaging.coco import polygons
from imaging.files import read_image
from imaging.masks import read_mask

DOCS = Path(export.__file__).parent / "docs"


def write_labelme(folder: Path, n: int) -> list[np.ndarray]:
    """Photos with the JSON files that labelme 5 writes beside them; returns their masks."""
    folder.mkdir()
    masks = [draw_cable(rng(seed), (48, 64), 5) for seed in range(n)]
    for number, mask in enumerate(masks):
        image = rng(100 + number).integers(0, 60, (*mask.shape, 3)).astype(np.uint8)
        image[mask] = (220, 200, 60)
        Image.fromarray(image).save(folder / f"{number}.png")
        shapes = [
            {"label": "cable", "points": np.reshape(outline, (-1, 2)).tolist(), "shape_type": "polygon"}
            for region in polygons(mask)
            for outline in region["segmentation"]
        ]
        document = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{number}.png"}
        document |= {"imageData": None, "imageHeight": mask.shape[0], "imageWidth": mask.shape[1]}
        (folder / f"{number}.json").write_text(json.dumps(document))
    return masks


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_from_labels_to_everything_a_robot_needs(tiny_weights, in_tmp_path, capsys):
    masks = write_labelme(Path("labeled"), 12)
    assert import_labels.main(["--input", "labeled", "--output", "my_cables"]) == 0
    for number, mask in enumerate(masks):
        assert (read_mask(Path(f"my_cables/masks/{number}.png")) == mask).mean() > 0.99
    write_backgrounds(Path("my_backgrounds"))
    train = {"data_dir": "my_cables", "bg_paths": ["my_backgrounds"], "percentage": 2.0}
    Path("my_data.yaml").write_text(yaml.safe_dump({"dataset": {"train": [train]}}))
    flags = ("--epoch_num", 8, "--batch_size", 8, "--lr", 5e-3, "--val_percentage", 25)
    assert run_tiny(Path("my_data.yaml"), tiny_weights, *flags) == 0
    assert "predict.py" in capsys.readouterr().out
    assert Path("exp/run/report.html").stat().st_size > 1000

    best = Path("exp/run/checkpoints/best.pth")
    image = read_image(Path("my_cables/imgs/0.png"))
    mask = inference.load(best, "cpu", amp="off")(image)
    assert mask.dtype == bool and mask.shape == image.shape[:2]
    argv = ["--checkpoint", best, "--input", "my_cables/imgs", "--output", "predictions", "--centerlines"]
    assert predict.main([*map(str, argv), "--amp", "off", "--device", "cpu"]) == 0
    assert (read_mask(Path("predictions/masks/0.png")) == mask).all()
    assert json.loads(Path("predictions/centerlines/0.json").read_text())["width"] == 64

    assert export.main(["--checkpoint", str(best), "--format", "onnx", "--output", "cables.onnx"]) == 0
    Path("photos").mkdir()
    Image.fromarray(image).save("photos/0.png")
    text = (DOCS / "export.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnx" in code]
    names: dict[str, np.ndarray] = {}
    exec(example, names)
    whole = inference.load(best, "cpu", tiles="off", amp="off")(image)
    assert np.mean(names["mask"] != whole) < 0.01
