"""Device, precision, processes and signals."""

import torch

import runtime


def test_amp_choices(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert runtime.amp_dtype("off", cuda) is None
    assert runtime.amp_dtype("bf16", cpu) is torch.bfloat16
    assert runtime.amp_dtype("fp16", cpu) is torch.float16
    assert runtime.amp_dtype("auto", torch.device("mps")) is None
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert runtime.amp_dtype("auto", cuda) is expected
