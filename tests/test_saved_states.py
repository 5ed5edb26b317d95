"""When a run saves its state and its best weights, and that both fit together when it is resumed."""

import json
import os
import signal
from pathlib import Path

import pytest
from conftest import FLAGS, assert_same_results, run_tiny

import checkpoint
import evaluation
import finetune


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def iterations_of_tests():
    lines = Path("exp/run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def kill(batch, net):
    """End the run as SIGKILL does, with nothing saved."""
    raise KeyboardInterrupt


def test_a_signal_during_a_test_ends_the_run_within_an_image(
    config, tiny_weights, whole_run, at_iteration, monkeypatch, capsys
):
    compute_stats, calls = evaluation.compute_stats, []

    def signal_in_second_test(logits, ground_truth):
        calls.append(1)
        if len(calls) == 5:  # 3 images in the first test
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_stats(logits, ground_truth)

    monkeypatch.setattr(evaluation, "compute_stats", signal_in_second_test)
    assert run_tiny(config, tiny_weights, *FLAGS) == 143
    assert len(calls) == 5
    assert iterations_of_tests() == [0]
    # The resumed run is killed soon after the test that it repeats.
    at_iteration(2, kill)
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 130
    assert iterations_of_tests() == [0, 6]
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert capsys.readouterr().out.count("resumed     after iteration 6") == 2
    assert_same_results("exp/run", whole_run)
    assert iterations_of_tests() == [0, 6, 12, 18, 20]


def test_a_test_saves_no_state(config, tiny_weights, monkeypatch):
    saved, save_resume_state = [], checkpoint.save_resume_state

    def record(state, path):
        saved.append(state["train_state"]["counters"]["iteration"])
        save_resume_state(state, path)

    monkeypatch.setattr(checkpoint, "save_resume_state", record)
    assert run_tiny(config, tiny_weights, *FLAGS) == 0
    assert iterations_of_tests() == [0, 6, 12, 18, 20]
    assert saved == [6, 20]  # beside the first weights, and at the end


def test_best_weights_that_are_newer_than_the_state_are_trained_again(
    config, tiny_weights, at_iteration, monkeypatch
):
    run_test, checkpoints, seen = finetune.run_test, Path("exp/run/checkpoints"), {}

    def better_each_time(*args, iteration, **options):
        return run_test(*args, iteration=iteration, **options) | {"iou": iteration / 100}

    def look(name, then=None):
        def act(batch, net):
            seen[name] = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
            if then:
                then(batch, net)

        return act

    monkeypatch.setattr(finetune, "run_test", better_each_time)
    assert run_tiny(config, tiny_weights, *FLAGS, "-n", "whole") == 0
    at_iteration(9, look("after 8", kill))
    assert run_tiny(config, tiny_weights, *FLAGS) == 130
    assert set(seen["after 8"]) == {"best.pth", "best.json"}  # of iteration 6, as the state
    at_iteration(9, look("after 14", kill))  # the best is of iteration 12, the state of iteration 6
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 130
    assert set(seen["after 14"]) == {"best.pth", "best.json", "best_at_6.pth", "best_at_6.json"}
    for suffix in (".pth", ".json"):  # the threshold in a sidecar holds for its weights alone
        older, newer = seen["after 14"][f"best_at_6{suffix}"], seen["after 14"][f"best{suffix}"]
        assert older == seen["after 8"][f"best{suffix}"] != newer
    at_iteration(1, look("resumed"))
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert seen["resumed"] == seen["after 8"]
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"best.pth", "best.json", "last.pth", "last.json"}
    assert iterations_of_tests() == [0, 6, 12, 18, 20]
    assert_same_results("exp/run", "exp/whole")


def test_a_run_killed_beside_its_first_weights_can_be_resumed(
    config, tiny_weights, whole_run, monkeypatch, capsys
):
    save_weights = checkpoint.save_weights

    def kill_after(state_dict, path):
        save_weights(state_dict, path)
        raise KeyboardInterrupt  # ends the run as SIGKILL does

    monkeypatch.setattr(checkpoint, "save_weights", kill_after)
    assert run_tiny(config, tiny_weights, *FLAGS) == 130
    assert Path("exp/run/checkpoints/best.pth").exists()
    monkeypatch.setattr(checkpoint, "save_weights", save_weights)
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert_same_results("exp/run", whole_run)
    assert iterations_of_tests() == [0, 6, 12, 18, 20]
    # A state that the user has removed is named, with the way on.
    Path("exp/run/resume.pth").unlink()
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 5, "--resume") == 2
    error = capsys.readouterr().err
    assert "resume.pth is missing" in error and "--checkpoint exp/run/checkpoints/last.pth" in error


def test_the_best_weights_outlive_a_disk_that_is_full(tmp_path):
    for name in ("best.pth", "best.json"):
        (tmp_path / name).write_text(name)
    checkpoint.keep_best(tmp_path, 6)
    checkpoint.remove_kept_best(tmp_path)  # a state fits on the disk, and the new best.pth does not
    assert (tmp_path / "best_at_6.pth").read_text() == "best.pth"
    checkpoint.restore_best(tmp_path, 6)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "best.pth": "best.pth", "best.json": "best.json",
    }  # fmt: skip


def test_checkpoints_that_the_user_copied_are_left_alone(tmp_path):
    copies = {"best_at_friday.pth", "epoch_0001_copy.pth"}
    for name in (*copies, "best.pth", "best_at_6.pth", "epoch_0001.pth", "epoch_0002.pth"):
        (tmp_path / name).touch()
    checkpoint.remove_kept_best(tmp_path)
    finetune.remove_old_checkpoints(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == copies | {"best.pth", "epoch_0002.pth"}
