"""What a run is prepared with."""

import json
from pathlib import Path

import yaml
from conftest import run_tiny, tiny_config

import experiment


def test_a_run_has_about_eight_tests_by_default_and_keeps_their_interval(
    tiny_weights, config_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = config_file(percentage=1.5)  # 9 samples in batches of 2: 5 iterations an epoch
    assert run_tiny(config, tiny_weights, "-e", 4, "-b", 2) == 0
    lines = [json.loads(line) for line in Path("exp/run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert yaml.safe_load(Path("exp/run/args.yaml").read_text())["test_interval"] == 3
    for flags, expected in (((), 3), (("--test_interval", 7), 7)):
        resumed = tiny_config(config, tiny_weights, "-n", "run", "--resume", "-e", 8, "-b", 2, *flags)
        assert experiment.prepare(resumed).config.test_interval == expected
