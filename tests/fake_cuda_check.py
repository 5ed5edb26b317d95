"""Run the CUDA path of this tool on a machine without a GPU, with a stand-in for the CUDA runtime.

    python tests/fake_cuda_check.py [--sm 75] [--gib 12] [--max_waits 2] [--case "finetune.py --train lora"]

It needs Linux, g++ and the CUDA build of PyTorch, for CUDA 13 (the default of pip). A library made from
fake_cuda.cpp is loaded before libcudart, libcublas and the driver, and takes their place. Memory, streams and
copies are only counted, and kernels do nothing, so no computed number has a meaning. PyTorch's own CUDA code
runs: its checks of devices and dtypes, its choice of the attention kernel for the compute capability, its
memory allocator (peak memory and out of memory are real), and its warning each time the program waits for the
device. Code that is compiled at run time fails, as on a machine without a C compiler. `--compile on` traces
the model and its backward pass, and runs them uncompiled: Inductor and CUDA graphs need kernels that compute.
Convolutions do not use cuDNN.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(importlib.util.find_spec("torch").origin).parent.parent
SOURCE = Path(__file__).with_name("fake_cuda.cpp")

# Flags of every finetune.py case; a case may give them again.
COMMON = "--config c.yaml --device cuda --batch_size 2 --epoch_num 1 --test_interval 3 --num_workers 0"
TINY, LITE = "--model_type tiny --checkpoint tiny.pth", "--model_type lite_medsam"
CASES = (
    f"finetune.py {TINY} --prompt mixed --embedding_reuse 2 --epoch_num 2 --num_workers 1",
    f"finetune.py {TINY} --amp off",
    f"finetune.py {TINY} --train lora --prompt point --virtual_batch_size 2",
    f"finetune.py {TINY} --train encoder --prompt box --grad_checkpointing --cldice_weight 1",
    f"finetune.py {TINY} --train encoder --amp fp16",
    f"finetune.py {LITE}",
    f"finetune.py {LITE} --train encoder",
    "finetune.py --model_type mobile_sam --checkpoint mobile_sam.pth",
    "finetune.py --model_type mobile_sam --checkpoint mobile_sam.pth --train encoder --grad_checkpointing",
    f"finetune.py {TINY} --prompt point --compile on",
    "predict.py --checkpoint tiny.pth --input cables/imgs --output found --device cuda",
    "predict.py --checkpoint tiny.pth --input cables/imgs --output found --device cuda --tiles 40",
    f"tools/bench.py {LITE} --parts encoder step --seconds 0 --device cuda",
)
VIT_B = "--model_type vit_b --checkpoint vit_b.pth"
# Slower, or close to a case above: the command runs them, and the test suite does not.
MORE_CASES = (
    f"finetune.py {LITE} --train lora --prompt mixed --virtual_batch_size 2",
    f"finetune.py {LITE} --train encoder --compile on",
    "finetune.py --model_type lite_medsam_512",
    "finetune.py --model_type lite_medsam_512 --train encoder --grad_checkpointing",
    "finetune.py --model_type mobile_sam --checkpoint mobile_sam.pth --train lora",
    f"finetune.py {TINY} --config photos.yaml --epoch_num 2",  # photos are encoded once
    f"finetune.py {TINY} --train lora --prompt mixed --compile on",
    f"finetune.py {TINY} --train encoder --batch_size auto --virtual_batch_size 2",
    f"finetune.py {VIT_B} --embedding_reuse 2 --epoch_num 2 --prompt mixed",
    f"finetune.py {VIT_B} --train lora",
    f"finetune.py {VIT_B} --train encoder --grad_checkpointing",
    "predict.py --checkpoint vit_b.pth --input cables/imgs --output found_vit_b --device cuda",
    f"tools/bench.py {LITE} --seconds 0 --reuse 2 --device cuda",
)
TWO_PROCESSES = (  # two processes run each of these together
    f"finetune.py {TINY} --epoch_num 2 --prompt mixed --embedding_reuse 2",
    # There is 1 sample, so the second process never has one.
    f"finetune.py {TINY} --epoch_num 2 --config one.yaml --amp fp16 --train encoder",
)

TIMEOUT = 900  # seconds

# Functions that run seldom, in which waiting for the device is allowed.
SELDOM = {"run_test", "encode_test_set", "save_state", "save_checkpoint", "training_scalars", "train_panels"}


# --- The stand-in -----------------------------------------------------------------------------


def build_library(path: Path) -> None:
    """Compile fake_cuda.cpp with an empty function, which returns 0, for all else that PyTorch calls."""
    names = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg")
    parts = [SITE / f"torch/lib/lib{name}.so" for name in names]
    listing = subprocess.run(["nm", "-D", "--undefined-only", *parts], capture_output=True, text=True).stdout
    called = set(re.findall(r"\b((?:__)?cuda[A-Z]\w+|cublas\w+)", listing))
    called |= {name.decode() for name in re.findall(rb"(?<=\0)cu[A-Z]\w+(?=\0)", parts[0].read_bytes())}
    kept = r"cudaGetError(String|Name)|cudaRuntimeGetVersion|__cuda(Unr|R)egister\w+"  # these need no GPU
    source = SOURCE.read_text()
    empty = sorted(name for name in called if f"({name}," not in source and not re.fullmatch(kept, name))
    text = source + "".join(f"API({name}) {{ return 0; }}\n" for name in empty) + '}  // extern "C"\n'
    folders = (*SITE.glob("nvidia/cu*/include"), SITE / "triton/backends/nvidia/include")
    command = ["g++", "-xc++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(path), "-"]
    subprocess.run([*command, *(f"-I{folder}" for folder in folders)], input=text, text=True, check=True)
    # PyTorch would ask NVML for the GPUs of this machine. An empty file cannot be loaded, so it does not.
    path.with_name("libnvidia-ml.so.1").touch()


def environment(library: Path, *, sm: int, gib: int = 80, gpus: int = 1) -> dict[str, str]:
    """The environment of a process that uses the stand-in."""
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return variables | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "FAKE_SM": str(sm),
        "FAKE_GIB": str(gib),
        "FAKE_GPUS": str(gpus),
        "CC": "false",  # nothing can be compiled at run time
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "OMP_NUM_THREADS": "1",
    }


def run_cases(library: Path, cases: list[str], *, sm: int, gib: int = 80, world_size: int = 1) -> list[dict]:
    """Run commands one after the other with the stand-in; returns what `child` prints for each.

    With `world_size`, so many new processes run each command together, and the result of the first process
    that failed counts. A command that a process did not survive has the end of its errors as "error".
    """
    fake = environment(library, sm=sm, gib=gib, gpus=world_size)
    if world_size > 1 and len(cases) > 1:
        return [run_cases(library, [case], sm=sm, gib=gib, world_size=world_size)[0] for case in cases]
    if world_size > 1:
        fake |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        fake |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world_size) as pool:
        ranks = [fake | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        shares = list(pool.map(functools.partial(run_child, cases, Path(folder)), ranks))
    return [next((r for r in results if r["code"]), results[0]) for results in zip(*shares, strict=True)]


def run_child(cases: list[str], folder: Path, variables: dict[str, str]) -> list[dict]:
    """The results of all cases in a new process, in `folder`."""
    command = [sys.executable, __file__, "--child", *cases]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=TIMEOUT)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    lost = {
        "code": 1,
        "error": done.stderr[-2000:],
        "waits": {},
        "stdout": "",
        "stderr": "",
        "batch": [],
        "gb": 0.0,
        "reserved_gb": 0.0,
    }
    return results + [lost] * (len(cases) - len(results))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_good(result: dict, max_waits: float) -> bool:
    return result["code"] == 0 and sum(result["waits"].values()) <= max_waits


# --- In the process with the stand-in -----------------------------------------------------------


def child(cases: list[str]) -> None:
    """Run each case, and print a line of JSON for it.

    code: exit code of the command.
    error, at: the exception, and the lines that it passed through; only if there is one.
    waits: how often each line waits for the device in an iteration, on average.
    stdout, stderr: the end of what the command wrote there.
    batch: the batch size of a training, and its batches per optimizer step.
    gb, reserved_gb: peaks of the device memory that tensors took and that the allocator held.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest
    import torch

    conftest.variants.VARIANTS["tiny"] = conftest.TINY
    avoid_what_the_stand_in_lacks()
    if os.environ.get("RANK", "0") == "0":
        arrange_data(cases)
    while not Path("ready").exists():
        time.sleep(0.1)
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    for number, case in enumerate(cases):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with (
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            result = run_case(case, number)
        result |= {"stdout": output.getvalue()[-2000:], "stderr": errors.getvalue()[-2000:]}
        result["gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        print(json.dumps(result), flush=True)
    os._exit(0)  # the threads of the runtime would not end


def finetune_of_a_benchmark(flags: list[str]) -> int:
    """Run finetune.py in a process that tools/bench.py starts."""
    sys.path.insert(0, str(ROOT))
    import finetune

    avoid_what_the_stand_in_lacks()
    return finetune.main(flags)


def avoid_what_the_stand_in_lacks() -> None:
    """Turn off cuDNN and nccl; attention without a fused kernel is an error; nothing is compiled."""
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # Triton needs a C compiler
    replace_nccl()


def replace_nccl() -> None:
    """Let collectives on the device do nothing; those on the CPU are real."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # it registers the backend "fake"

    init_process_group = dist.init_process_group
    dist.init_process_group = lambda backend: init_process_group(backend.replace("nccl", "fake"))


def arrange_data(cases: list[str]) -> None:
    """Write datasets, three configs, and random weights for the model types that the cases name."""
    import conftest

    conftest.write_backgrounds(conftest.write_dataset(Path("cables"), 8) / "backgrounds")
    composites = "bg_paths: [cables/backgrounds], w_aug: true, percentage: "
    for name, keys in (
        ("c.yaml", composites + "1"),
        ("long.yaml", composites + "4"),
        ("one.yaml", composites + "0.1"),
        ("photos.yaml", "w_aug: false"),
    ):
        Path(name).write_text(
            f"dataset: {{train: [{{data_dir: cables, {keys}}}], test: {{data_dir: cables}}}}"
        )
    for model_type, variant in conftest.variants.VARIANTS.items():
        if any(f"{model_type}.pth" in case for case in cases):
            conftest.checkpoint.save_weights(variant.build().state_dict(), Path(f"{model_type}.pth"))
    Path("ready").touch()


def run_case(case: str, number: int) -> dict:
    """Run a command in this process; returns what `child` prints, without "gb"."""
    script, *flags = shlex.split(case)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if script == "finetune.py":
        flags = [*COMMON.split(), "--exp_name", f"run{number}", *flags]
    if script == "tools/bench.py":
        adapt_benchmark(module)
    result: dict = {"code": 1}
    with count_waits() as waits:
        try:
            result["code"] = module.main(flags)
        except BaseException as error:
            steps = traceback.extract_tb(error.__traceback__)[1:]
            result["error"] = f"{type(error).__name__}: {error}"[:300]
            result["at"] = " ".join(f"{Path(step.filename).name}:{step.lineno}" for step in steps)
    flags_file = Path(f"exp/run{number}/args.yaml")
    flags_of_run = yaml.safe_load(flags_file.read_text()) if flags_file.exists() else {}
    batch = [flags_of_run.get(name) for name in ("batch_size", "virtual_batch_size")]
    return result | {"waits": waits, "batch": batch}


def adapt_benchmark(bench: ModuleType) -> None:
    """Let tools/bench.py measure in this process, and start finetune.py by way of this file."""
    command = vars(bench).setdefault("command_without_stand_in", bench.finetune_command)
    bench.in_new_process = lambda measure, *args: measure(*args)
    bench.finetune_command = lambda *args: [sys.executable, __file__, "--finetune", *command(*args)[2:]]


@contextlib.contextmanager
def count_waits() -> Iterator[dict[str, float]]:
    """Count the waits of the training loop after its first batch; the dict is filled at the end."""
    import finetune

    waits: dict[str, float] = {}
    counts, batches = collections.Counter(), 0
    training_batches, show = finetune.training_batches, warnings.showwarning

    @functools.wraps(training_batches)
    def counted(*args, **options):
        nonlocal batches
        for batch in training_batches(*args, **options):
            batches += 1
            yield batch

    def note(message, *rest, **options):
        frames = traceback.extract_stack()[:-1]
        own = [f for f in frames if ROOT in Path(f.filename).parents and f.filename != __file__]
        if "synchroniz" in str(message) and batches > 1 and own and not SELDOM & {f.name for f in own}:
            counts[f"{Path(own[-1].filename).name}:{own[-1].lineno}"] += 1

    finetune.training_batches, warnings.showwarning = counted, note
    try:
        yield waits
    finally:
        finetune.training_batches, warnings.showwarning = training_batches, show
        waits |= {place: round(n / max(1, batches - 1), 1) for place, n in counts.items()}


# --- Command ----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the CUDA path on a stand-in for the CUDA runtime.")
    parser.add_argument("--sm", type=int, default=80, help="compute capability, such as 75 for 7.5")
    parser.add_argument("--gib", type=int, default=80, help="memory of the device")
    parser.add_argument("--max_waits", type=float, default=2, help="waits for the device per iteration")
    parser.add_argument("--case", action="append", help="command to run instead of the built-in cases")
    parser.add_argument("--processes", type=int, default=1, help="processes that run each --case together")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the cases and print a line for each; returns 1 if one of them fails."""
    args = parse_args(argv)
    groups = [(1, [*CASES, *MORE_CASES]), (2, [*TWO_PROCESSES])]
    if args.case:
        groups = [(args.processes, args.case)]
    all_good = True
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        build_library(library)
        for processes, cases in groups:
            results = run_cases(library, cases, sm=args.sm, gib=args.gib, world_size=processes)
            for case, result in zip(cases, results, strict=True):
                if result["code"] == 0:
                    del result["stdout"], result["stderr"]
                good = is_good(result, args.max_waits)
                all_good &= good
                print("ok  " if good else "FAIL", f"{case} ({processes} processes)", json.dumps(result))
    return int(not all_good)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    sys.exit(finetune_of_a_benchmark(sys.argv[2:]) if sys.argv[1:2] == ["--finetune"] else main())
