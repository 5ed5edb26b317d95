"""Several processes train as one does. The runs are real ones on gloo, one of them under torchrun."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import NOT_REPEATABLE, run_process, run_tiny, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import run_forked

import checkpoint
import runtime

TINY_RUN = Path(__file__).parent / "tiny_run.py"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def together(config, weights, *argv):
    given = ("-c", config, "--model_type", "tiny", "--checkpoint", weights, "-n", "together")
    return *given, "--device", "cpu", "--amp", "off", "--num_workers", 0, *argv


def run_torchrun(*flags, **environment):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    return run_process(*torchrun, TINY_RUN, *flags, **environment)


def assert_same(one, other):
    weights = [checkpoint.load_weights(Path(f"exp/{name}/checkpoints/last.pth")) for name in (one, other)]
    for key in weights[0]:
        # A bias of all keys changes no attention. Its gradient is rounding alone, which Adam scales up.
        if key.endswith("k_proj.bias"):
            continue
        assert (weights[0][key] - weights[1][key]).abs().max() < 1e-5, key
    curves = [scalars(f"exp/{name}") for name in (one, other)]
    assert curves[0].keys() == curves[1].keys()
    for tag in curves[0].keys() - NOT_REPEATABLE:
        steps, values = zip(*curves[0][tag], strict=True)
        assert [step for step, _ in curves[1][tag]] == list(steps)
        assert [value for _, value in curves[1][tag]] == pytest.approx(list(values), abs=1e-5), tag
    # The images of the whole test set are shown, in its order, and not those of the first process.
    baselines = [first_images(f"exp/{name}") for name in (one, other)]
    assert baselines[0] == baselines[1]


def first_images(folder):
    """The images of the test before training, by their tag."""
    events = EventAccumulator(folder).Reload()
    tags = ("test/panel", "test/worst_and_median")
    return {tag: events.Images(tag)[0].encoded_image_string for tag in tags}


# 9 samples in batches of 4: the last of an epoch has one sample, and the second process none.
@pytest.mark.parametrize(
    "options",
    [(), ("--virtual_batch_size", 2), ("--embedding_reuse", 2, "--prompt", "mixed"), ("--train", "lora")],
)
def test_two_processes_compute_what_one_does(tiny_weights, config_file, options):
    config = config_file(percentage=1.5)
    common = ("-e", 3, "--lr", 3e-3, "--test_interval", 4, "--log_interval", 2, *options)
    assert run_tiny(config, tiny_weights, "-b", 4, *common) == 0
    process = run_forked(*together(config, tiny_weights, "-b", 2, *common), processes=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("baseline -> fine-tuned") == 1  # process 0 alone prints
    assert len(list(Path("exp/together").glob("events.*"))) == 1
    assert_same("run", "together")


# 9 samples of 6 photos: some occur twice in a batch, and both processes take what one of them encoded.
def test_two_processes_share_the_embeddings_of_photos(tiny_weights, config_file):
    config = config_file(percentage=1.5, bg_paths=None, w_aug=False)
    common = ("-e", 3, "--lr", 3e-3, "--test_interval", 4, "--log_interval", 2)
    assert run_tiny(config, tiny_weights, "-b", 4, *common) == 0
    process = run_forked(*together(config, tiny_weights, "-b", 2, *common), processes=2)
    assert process.returncode == 0, process.stderr
    assert_same("run", "together")
    assert not list(Path("exp/together").glob(".*"))


# 1 sample: the second process has none, not even in the first iteration.
def test_fp16_with_a_process_without_samples(tiny_weights, config_file):
    config = config_file(percentage=0.1)
    options = ("-e", 2, "-b", 1, "--amp", "fp16", "--train", "encoder", "--log_interval", 1)
    process = run_forked(*together(config, tiny_weights, *options), processes=2)
    assert process.returncode == 0, process.stderr
    curve = scalars("exp/together")["train/bad_steps"]
    assert curve == [(1, 0), (2, 0)]


def test_a_process_that_dies_ends_all_and_the_run_goes_on_from_its_state(tiny_weights, config_file, capsys):
    config = config_file(percentage=1.5)
    options = ("-e", 4, "--lr", 3e-3, "--test_interval", 4, "--virtual_batch_size", 2, "--log_interval", 1)
    assert run_tiny(config, tiny_weights, "-b", 4, *options) == 0
    # Every iteration saves a state, the last one amid a step.
    # `run_process` fails if a process waits for the dead one.
    flags = together(config, tiny_weights, "-b", 2, *options)
    died = run_torchrun(*flags, "--resume_interval", 1e-9, KILL_IN=8)
    assert died.returncode != 0
    assert not Path("exp/together/checkpoints/last.pth").exists()
    resumed = run_torchrun(*flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed     after iteration 7" in resumed.stdout
    assert_same("run", "together")
    assert run_tiny(config, tiny_weights, "-b", 2, "-n", "together", *options, "--resume") == 2
    assert "processes: were 2, are now 1" in capsys.readouterr().err


def test_a_mistake_in_the_yaml_file_is_shown_once(tiny_weights, data):
    (data / "bad.yaml").write_text("dataset: {train: [{data_dir: nowhere}]}")
    process = run_forked(*together(data / "bad.yaml", tiny_weights), processes=2)
    assert process.returncode == 2
    assert process.stderr.count("error: ") == process.stderr.count("dataset.train[0].data_dir") == 1
    assert "Traceback" not in process.stderr


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert runtime.is_main() and runtime.world_size() == 1
    assert runtime.all_reduce_max([3, 1]) == [3, 1]


def test_one_message_carries_all_gradients(monkeypatch):
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    messages = []

    def all_reduce(flat):  # the other process has the same gradients
        messages.append(len(flat))
        flat.mul_(2)

    monkeypatch.setattr(runtime.dist, "all_reduce", all_reduce)
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in [(3, 2), (4,), (1, 5)]]
    gradients = [torch.randn(3, 2), None, torch.randn(1, 5)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    runtime.all_reduce_gradients(parameters)
    assert messages == [15]
    sums = [2 * gradients[0], torch.zeros(4), 2 * gradients[2]]
    assert all(torch.equal(p.grad, expected) for p, expected in zip(parameters, sums, strict=True))
