"""tools/measure_crossings.py: the true cables that it draws, and how it judges centerlines."""

import numpy as np

from imaging.centerlines import find_crossings
from tools import measure_crossings as tool


def probed_scene():
    """A drawn scene: its cables, its mask, and a lone wide-angle crossing with its probes."""
    for seed in range(20):
        cables, mask = tool.draw_scene(np.random.default_rng([0, seed]))
        crossings = find_crossings(cables)
        for crossing in crossings:
            probes = tool.probe(crossing, cables, crossings)
            if (
                crossing.angle > 60
                and crossing.cables[0] != crossing.cables[1]
                and probes
                and probes.is_alone
            ):
                return cables, mask, crossing, probes
    raise AssertionError("no such scene")


def test_the_mask_is_drawn_around_the_true_cables_and_its_crossings_are_judged_by_identity():
    cables, mask, crossing, probes = probed_scene()
    for cable in cables:
        inside = ((cable.points >= 0) & (cable.points <= [tool.WIDTH - 1, tool.HEIGHT - 1])).all(axis=1)
        x, y = cable.points[inside].astype(int).T
        assert mask[y, x].mean() > 0.99
    assert tool.is_resolved(crossing, probes, cables, cables)  # the truth is right
    first, second = (cables[number - 1] for number in crossing.cables)
    half = int(np.linalg.norm(first.points - crossing.point, axis=1).argmin())
    cut = [
        tool.Cable(1, first.points[:half], first.widths[:half], False, ()),
        tool.Cable(2, first.points[half:], first.widths[half:], False, ()),
        tool.Cable(3, second.points, second.widths, False, ()),
    ]
    assert not tool.is_resolved(crossing, probes, cables, cut)
    assert not tool.is_resolved(crossing, probes, cables, [])


def test_the_command_prints_shares(capsys):
    assert tool.main(["--scenes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| angle |") and len(lines) == 2 + len(tool.ANGLES) - 1 + 2
    assert "60 to 90 degrees" in lines[6] and "%" in lines[6]
    assert "exact edge" in lines[-2] and "rough edge" in lines[-1]
