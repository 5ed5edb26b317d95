"""When a run saves its state and its best weights, and what a resumed run takes from its files."""

import errno
import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FLAGS, assert_same_results, draw_cable, rng, run_finetune, run_tiny, write_dataset
from PIL import Image

import checkpoint
import evaluation
import finetune
import resume
from train_config import parse_args


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- What is saved, and when ---


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
    saved, save_resume_state = [], resume.save_resume_state

    def record(state, path):
        saved.append(state["train_state"]["counters"]["iteration"])
        save_resume_state(state, path)

    monkeypatch.setattr(resume, "save_resume_state", record)
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


def test_a_state_that_is_damaged_or_has_weights_that_are_not_finite_is_refused(config, tiny_weights, capsys):
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 1) == 0
    path = Path("exp/run/resume.pth")
    state, name = torch.load(path, weights_only=True), "mask_decoder.iou_token.weight"
    for number in (float("nan"), float("inf")):
        state["weights"][name][0, 0] = number
        torch.save(state, path)
        assert run_tiny(config, tiny_weights, *FLAGS, "-e", 2, "--resume") == 2
        error = capsys.readouterr().err
        assert f"error: {path} holds weights that are NaN or infinite, such as {name}: " in error
        assert "another --exp_name and --checkpoint exp/run/checkpoints/best.pth" in error
    path.write_bytes(path.read_bytes()[:1000])
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 2, "--resume") == 2
    error = capsys.readouterr().err
    assert (
        f"error: {path} cannot be read, and may be damaged: start the run again with another --exp_name and "
        in error
    )
    weights = checkpoint.load_weights(tiny_weights) | {name: state["weights"][name]}
    checkpoint.save_weights(weights, tiny_weights)
    assert run_tiny(config, tiny_weights, *FLAGS, "-n", "other") == 2
    assert f"{tiny_weights} holds weights that are NaN" in capsys.readouterr().err


# --- What a resumed run takes from its files ---

SEEDED = ("-b", 2, "--lr", 1e-2, "--prompt", "mixed", "--test_interval", 4, "--seed", 3)


def last_weights(name):
    return checkpoint.load_weights(Path(f"exp/{name}/checkpoints/last.pth"))


def test_the_printed_command_resumes_with_the_files_of_the_run(
    tiny_weights, config_file, at_iteration, capsys
):
    config = config_file()
    assert run_tiny(config, tiny_weights, *SEEDED, "-e", 3, "-n", "whole") == 0
    at_iteration(5, lambda batch, net: os.kill(os.getpid(), signal.SIGTERM))
    assert run_tiny(config, tiny_weights, *SEEDED, "-e", 3) == 143
    config.unlink()
    _, command = capsys.readouterr().err.rstrip().split("to continue: ")
    _, script, *argv = shlex.split(command)
    assert Path(script).name == "finetune.py" and argv == ["--exp_name", "run", "--resume"]
    assert run_finetune(*argv) == 0
    assert "resumed     after iteration 5" in capsys.readouterr().out
    whole, resumed = last_weights("whole"), last_weights("run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_whose_folder_was_renamed_goes_on(tiny_weights, config_file):
    assert run_tiny(config_file(), tiny_weights, *SEEDED, "-e", 1) == 0
    Path("exp/run").rename("exp/renamed")
    assert run_finetune("--exp_name", "renamed", "--resume", "-e", 2) == 0
    assert not Path("exp/run").exists() and Path("exp/renamed/checkpoints/last.pth").exists()


def test_flags_of_a_resumed_run_come_from_its_files_and_then_from_the_command(
    tiny_weights, config_file, capsys
):
    assert run_tiny(config_file(), tiny_weights, *SEEDED, "-e", 1, "--grad_checkpointing") == 0
    config = parse_args(["--resume", "--exp_name=run", "--log_interval", "3", "-e", "2"])
    assert (config.lr, config.seed, config.num_workers, config.prompt) == (1e-2, 3, 0, "mixed")
    assert config.grad_checkpointing and config.keep_last is None and config.resume
    assert (config.log_interval, config.epoch_num) == (3, 2)
    assert (config.checkpoint, config.config) == (tiny_weights, Path("exp/run/config.yaml"))
    assert run_finetune("--resume", "-n", "run", "-e", 2, "--lr", 7) == 2
    assert "--lr: was 0.01, is now 7.0" in capsys.readouterr().err
    Path("exp/run/args.yaml").write_text("- no flags")
    assert run_finetune("--resume", "-n", "run") == 2
    assert "exp/run/args.yaml: expected the flags of the run" in capsys.readouterr().err
    assert run_finetune("--resume", "-n", "nothing") == 2
    assert "exp/nothing: there is no such run to resume" in capsys.readouterr().err


def test_a_resumed_run_takes_no_other_settings(tiny_weights, config_file, capsys):
    assert run_tiny(config_file(), tiny_weights, "-e", 1, "--resume") == 2
    assert "exp/run: there is no such run" in capsys.readouterr().err and not Path("exp").exists()
    assert run_tiny(config_file(), tiny_weights, "-e", 1) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("exp").rglob("*")}
    assert run_tiny(config_file(percentage=0.5), tiny_weights, "-e", 2, "--lr", 7, "--resume") == 2
    error = capsys.readouterr().err
    assert "--lr: was 0.001, is now 7.0" in error
    assert "dataset.train[0].percentage: was 1.0, is now 0.5" in error and "data_dir" not in error
    assert "epoch_num" not in error
    assert before == {path: path.stat().st_mtime_ns for path in Path("exp").rglob("*")}
    assert run_finetune("-c", config_file(), "--resume") == 2
    assert "--resume needs the --exp_name" in capsys.readouterr().err


def test_a_run_goes_on_with_data_and_weights_that_were_moved(tiny_weights, config_file, data, capsys):
    config = config_file()
    assert run_tiny(config, tiny_weights, *SEEDED, "-e", 1) == 0
    for name in ("cables", "test", "backgrounds"):
        (data / name).rename(data / f"moved {name}")
    assert run_finetune("--resume", "-n", "run", "-e", 2) == 2
    error = capsys.readouterr().err
    assert "no such folder" in error and "If the data was moved, give --config" in error
    document = yaml.safe_load(config.read_text())
    train = document["dataset"]["train"][0]
    train |= {"data_dir": "moved cables", "bg_paths": ["moved backgrounds"]}
    document["dataset"]["test"]["data_dir"] = "moved test"
    (data / "new.yaml").write_text(yaml.safe_dump(document))
    weights = tiny_weights.rename(tiny_weights.with_name("moved.pth"))
    argv = ("--resume", "-n", "run", "-e", 2, "--config", data / "new.yaml", "--checkpoint", weights)
    assert run_finetune(*argv) == 0
    assert "resumed     after iteration 3" in capsys.readouterr().out
    train["bg_paths"] *= 2
    document["dataset"]["train"].append(train)
    (data / "new.yaml").write_text(yaml.safe_dump(document))
    assert run_finetune(*argv[:-2], "-e", 3) == 2
    error = capsys.readouterr().err
    assert "dataset.train[0].bg_paths: was 1 folder(s), is now 2 folder(s)" in error
    assert f"dataset.train[1]: was missing, is now {data}/moved cables" in error and "{" not in error


def test_photos_that_were_added_or_removed_are_named_with_the_way_on(tiny_weights, config_file, data, capsys):
    assert run_tiny(config_file(), tiny_weights, *SEEDED, "-e", 1) == 0
    write_dataset(data / "new", 1, seed=5)
    for kind in ("imgs", "masks"):
        (data / f"new/{kind}/0.png").rename(data / f"cables/{kind}/extra.png")
        (data / f"test/{kind}/1.png").unlink()
    Image.fromarray(draw_cable(rng(7), (48, 64), 5)).save(data / "cables/masks/2.png")
    capsys.readouterr()
    assert run_finetune("--resume", "-n", "run", "-e", 2) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:-1] == [
        "  changed: dataset 1: masks/2",
        "  added: dataset 1: imgs/extra",
        "  added: dataset 1: masks/extra",
        "  removed: dataset 2: imgs/1",
        "  removed: dataset 2: masks/1",
    ]
    assert lines[-1].endswith("another --exp_name and --checkpoint exp/run/checkpoints/last.pth.")


# --- Lock ---


def test_a_lock_file_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "open in another program", str(path))

    with monkeypatch.context() as patch, resume.locked(tmp_path):
        patch.setattr(Path, "unlink", refuse)
    with resume.locked(tmp_path):  # it was released
        pass
