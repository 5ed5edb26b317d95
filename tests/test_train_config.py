"""The flags: defaults, help, and messages for wrong values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_tiny

from sam.variants import VARIANTS
from train_config import MODEL_TYPES, default_workers, parse_args, read_flags

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write to exp/ of the current directory."""
    monkeypatch.chdir(tmp_path)


def test_the_command_of_the_readme_parses():
    argv = (
        "--lr 1e-4 --epoch_num 500 --batch_size 16 --save_interval 50 --test_interval 100 "
        "--exp_name EXPERIMENT_NAME --config path/to/config_file --alpha 0.7"
    )
    args = parse_args(argv.split())
    assert (args.lr, args.epoch_num, args.batch_size, args.alpha) == (1e-4, 500, 16, 0.7)
    assert (args.save_interval, args.test_interval, args.exp_name) == (50, 100, "EXPERIMENT_NAME")
    assert (args.prompt, args.device, args.virtual_batch_size) == ("none", "auto", 1)
    short = parse_args(["-c", "x.yaml", "-e", "3", "-b", "2", "-s", "5", "-n", "name"])
    assert (short.epoch_num, short.batch_size, short.save_interval, short.exp_name) == (3, 2, 5, "name")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--train", "decoder"), (1e-3, 5e-4, 4, 0.7)),
        (("--model_type", "lite_medsam", "--device", "cpu"), (5e-4, 2.5e-4, 1, 0.5)),
        (("--train", "lora"), (5e-4, 1e-3, 1, 0.5)),
        (("--train", "encoder", "--lr", "2e-3", "-b", "8"), (2e-3, 1e-3, 8, 0.5)),
        (("--train", "encoder", "--encoder_lr", "3e-3", "--alpha", "0.6"), (5e-4, 3e-3, 1, 0.6)),
    ],
)
def test_some_defaults_depend_on_what_learns(argv, expected):
    args = parse_args(["-c", "x", *argv])
    assert (args.lr, args.encoder_lr, args.batch_size, args.alpha) == expected


CPU, CUDA = "it does not run on CUDA", "it runs on CUDA"


@pytest.mark.parametrize(
    ("has_cuda", "argv", "expected", "line"),
    [
        (False, "", "lite_medsam_512 encoder", f"--model_type lite_medsam_512 --train encoder ({CPU})"),
        (True, "", "vit_b decoder", f"--model_type vit_b --train decoder ({CUDA})"),
        (
            True,
            "--device cpu",
            "lite_medsam_512 encoder",
            f"--model_type lite_medsam_512 --train encoder ({CPU})",
        ),
        (False, "--device cuda", "vit_b decoder", f"--model_type vit_b --train decoder ({CUDA})"),
        (False, "--model_type lite_medsam", "lite_medsam encoder", f"--train encoder ({CPU})"),
        (False, "--model_type lite_medsam_512", "lite_medsam_512 encoder", f"--train encoder ({CPU})"),
        (True, "--model_type lite_medsam", "lite_medsam decoder", f"--train decoder ({CUDA})"),
        (
            False,
            "--model_type vit_l",
            "vit_l decoder",
            f"--train decoder ({CPU}; the encoder of vit_l would train slowly)",
        ),
        (
            False,
            "--embedding_reuse 4",
            "lite_medsam_512 decoder",
            f"--model_type lite_medsam_512 --train decoder ({CPU}; --embedding_reuse needs a frozen encoder)",
        ),
        (False, "--train lora", "lite_medsam_512 lora", f"--model_type lite_medsam_512 ({CPU})"),
        (True, "--train encoder", "vit_b encoder", f"--model_type vit_b ({CUDA})"),
        (False, "--model_type vit_b --train decoder", "vit_b decoder", None),
    ],
)
def test_model_and_training_follow_the_machine_unless_they_are_given(
    monkeypatch, capsys, has_cuda, argv, expected, line
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    args = parse_args(["-c", "x", *argv.split()])
    assert f"{args.model_type} {args.train}" == expected
    assert capsys.readouterr().out == (f"chosen for this run: {line}\n" if line else "")
    assert args.batch_size == (4 if args.train == "decoder" else 1)  # what depends on it follows


def test_a_resumed_run_keeps_its_model_and_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = tmp_path / "exp/mine"
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text("config: x\nmodel_type: lite_medsam\ntrain: encoder\n")
    args = parse_args(["--exp_name", "mine", "--resume"])
    assert (args.model_type, args.train) == ("lite_medsam", "encoder") and capsys.readouterr().out == ""


def test_only_the_first_process_says_what_was_chosen(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    parse_args(["-c", "x"])
    assert capsys.readouterr().out == ""


def test_help_gives_every_default():
    result = subprocess.run(
        [sys.executable, str(ROOT / "finetune.py"), "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for name, value in vars(parse_args(["-c", "x", "-n", "x"])).items():
        assert f"--{name}" in text
        if value is not None and name not in (
            "config",
            "exp_name",
            "lr",
            "encoder_lr",
            "batch_size",
            "alpha",
            "model_type",
            "train",
            "preview",
            "resume",
            "grad_checkpointing",
        ):
            assert f"(default: {value})" in text, name
    assert "(default: None)" not in text


def test_a_config_is_required_without_resume_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    usage = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(usage) == 2 and "--config FILE" in usage[0] and "--exp_name NAME --resume" in usage[1]
    (tmp_path / "exp/died").mkdir(parents=True)
    for argv in ([], ["--resume", "--exp_name", "died"]):
        with pytest.raises(SystemExit) as code:
            parse_args(argv)
        assert code.value.code == 2
        error = capsys.readouterr().err
        assert "the following arguments are required: --config" in error
        assert ("exp/died holds no args.yaml" in error) == bool(argv)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--alpha", "0", "between 0 and 1"),
        ("--alpha", "1", "between 0 and 1"),
        ("--alpha", "nan", "between 0 and 1"),
        ("--lr", "0", "above 0"),
        ("--lr", "-1e-4", "above 0"),
        ("--lr", "inf", "above 0"),
        ("--lr", "1e300", "at most 1000"),
        ("--epoch_num", "0", "at least 1"),
        ("--epoch_num", "1.5", "at least 1"),
        ("--batch_size", "-2", "at least 1"),
        ("--virtual_batch_size", "0", "at least 1"),
        ("--save_interval", "0", "at least 1"),
        ("--test_interval", "x", "at least 1"),
        ("--warmup_steps", "-1", "at least 0"),
        ("--seed", str(2**63), "from 0 to 2^63 - 1"),
        ("--gamma", "-1", "at least 0"),
        ("--grad_clip", "0", "above 0"),
        ("--prompt", "text", "invalid choice"),
        ("--model_type", "vit_x", "invalid choice"),
        ("--device", "tpu", "invalid choice"),
        ("--exp_name", "../escape", "inside exp/"),
        ("--exp_name", "/absolute", "inside exp/"),
        ("--exp_name", "", "inside exp/"),
    ],
)
def test_bad_flags_end_with_a_message(tiny_weights, config_file, capsys, flag, value, expected):
    assert run_tiny(config_file(), tiny_weights, f"{flag}={value}") == 2
    error = capsys.readouterr().err
    assert flag in error and expected in error
    assert not Path("exp").exists()


def test_every_model_type_is_a_variant():
    assert [name for name in MODEL_TYPES if name != "tiny"] == list(VARIANTS)


def test_reuse_needs_a_frozen_encoder(tiny_weights, config_file, capsys):
    assert run_tiny(config_file(), tiny_weights, "--train", "lora", "--embedding_reuse", 2) == 2
    assert "--embedding_reuse above 1 needs a frozen encoder, but --train is lora" in capsys.readouterr().err
    assert not Path("exp").exists()


def test_a_training_needs_a_loss(tiny_weights, config_file, capsys):
    weights = ("--focal_weight", 0, "--dice_weight", 0, "--iou_weight", 0)
    assert run_tiny(config_file(), tiny_weights, *weights) == 2
    assert "--iou_weight, --cldice_weight are all 0" in capsys.readouterr().err
    assert not Path("exp").exists()
    read_flags(["--config", str(config_file()), *map(str, weights), "--cldice_weight", "0.5"])


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    workers = []
    for processes in (1, 4, 12):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        workers.append(default_workers())
    assert workers == [11, 2, 1]
