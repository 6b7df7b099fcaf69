"""The guard sees every kind of fault and wait that is planted for it, and nothing in what is right."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.fixture
def cuda(devices):
    with devices.LogicalCuda() as cuda:
        yield cuda


FIRST, SECOND = "cuda:0", "cuda:1"
MIXED = {
    "a CPU tensor": lambda x: x + torch.ones(3),
    "another device": lambda x: x + torch.ones(3, device=FIRST),
    "a number of another device": lambda x: x + torch.ones((), device=FIRST),
    "a device's number with a CPU tensor": lambda x: torch.ones(3) * x[0],
    "a CPU number in a stack": lambda x: torch.stack([x[0], torch.ones(())]),
    "a table on the CPU": lambda x: nn.functional.embedding(x.long(), torch.ones(9, 2)),
    "a CPU weight": lambda x: nn.Linear(3, 3)(x),
    "a CPU tensor by device indices": lambda x: torch.ones(9)[x.long()],
    "in place": lambda x: x.add_(torch.ones(3)),
    "values from the CPU": lambda x: x.index_put_((torch.zeros(2, dtype=torch.long, device=SECOND),), torch.ones(2)),
    "a generator of the CPU": lambda x: x.normal_(generator=torch.Generator()),
    "the default device": lambda x: x + torch.zeros(3, device="cuda"),
    "the default device by name": lambda x: x + torch.zeros(3).cuda(),
}
RIGHT = {
    "a number from the CPU": lambda x: x * torch.ones(()) + 2,
    "a copy across": lambda x: x.copy_(torch.ones(3)) + torch.ones(3).to(SECOND),
    "two devices by way of a copy": lambda x: x.to(FIRST) + torch.ones(3).cuda(),
    "CPU indices": lambda x: x[torch.tensor([0, 2])],
    "a generator of the device": lambda x: x.normal_(generator=torch.Generator(device=SECOND)),
}
READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy by force": lambda x: x.numpy(force=True),
    "bool": lambda x: bool(x[0]),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "index": lambda x: [5, 6, 7][x[0].long()],
    "slice": lambda x: torch.ones(5)[: x[0].long()],
    "format": lambda x: f"{x[0]:.2f}",
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "a mask": lambda x: x[x > 0],
    "values by a mask": lambda x: x.index_put_((x >= 0,), torch.ones(3, device=SECOND)),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "a copy into a CPU tensor": lambda x: torch.zeros(3).copy_(x),
    "a CPU tensor's number": lambda x: torch.zeros(3).fill_(x[0]),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "save": lambda x: torch.save({"x": x}, io.BytesIO()),
}
COPIES = {
    "tensor": lambda x: torch.tensor([1, 2], device=SECOND),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=SECOND),
    "as_tensor of an array": lambda x: torch.as_tensor(np.ones(2), device=SECOND),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "to": lambda x: torch.ones(3).to(SECOND),
    "to without waiting, of pageable memory": lambda x: torch.ones(3).to(SECOND, non_blocking=True),
    "to of pinned memory": lambda x: torch.ones(3).pin_memory().to(SECOND),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "a list of indices": lambda x: x[[0, 2]],
    "CPU indices": lambda x: x[torch.tensor([0, 2])],
}
NO_WAIT = {
    "a fill by a mask": lambda x: x.masked_fill_(x > 1, 0.0),
    "a number by a mask": lambda x: x.__setitem__(x > 0, 1.0),
    "known lengths": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "pinned memory": lambda x: torch.ones(3).pin_memory().to(SECOND, non_blocking=True),
    "a view of pinned memory": lambda x: x.copy_(torch.ones(5).pin_memory()[1:4], non_blocking=True),
    "memory that is made pinned": lambda x: torch.zeros(3, pin_memory=True).to(SECOND, non_blocking=True),
    "from device to device": lambda x: x.to(FIRST),
    "made there": lambda x: torch.arange(5, device=SECOND) + torch.zeros(5, device=SECOND),
    "where of three": lambda x: torch.where(x > 0, x, 0.0),
    "nothing": lambda x: torch.tensor([], device=SECOND),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_operation_is_a_fault(cuda, name):
    x = torch.ones(3, device=SECOND)
    MIXED[name](x)
    assert len(cuda.faults) == 1 and "test_devices.py:" in cuda.faults[0].place
    with pytest.raises(AssertionError, match="test_devices.py"):
        cuda.check()


@pytest.mark.parametrize("name", RIGHT)
def test_what_cuda_takes_is_no_fault(cuda, name):
    RIGHT[name](torch.ones(3, device=SECOND))
    cuda.check()


def test_numpy_of_a_device_tensor_is_a_fault(cuda):
    x = torch.ones(3, device=FIRST)
    for read in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="cuda:0"):
            read()
    assert len(cuda.faults) == 2


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted_once(cuda, name):
    x = torch.ones(3, device=SECOND)
    with cuda.counting() as waits:
        READS[name](x)
    assert len(waits.reads) == 1 and not waits.copies and not cuda.faults, waits.table()


@pytest.mark.parametrize("name", COPIES)
def test_blocking_copies_are_counted_once(cuda, name):
    x = torch.ones(3, device=SECOND)
    with cuda.counting() as waits:
        COPIES[name](x)
    assert len(waits.copies) == 1 and not waits.reads and not cuda.faults, waits.table()


@pytest.mark.parametrize("name", NO_WAIT)
def test_what_does_not_wait_is_not_counted(cuda, name):
    x = torch.ones(3, device=SECOND)
    with cuda.counting() as waits:
        NO_WAIT[name](x)
    assert not waits.copies and not waits.reads and not cuda.faults, waits.table()


def test_float64_on_a_device_is_noted(cuda):
    torch.ones(3).double().float().to(FIRST).sum()
    assert not cuda.doubles
    torch.ones(3, device=FIRST).double().sum()
    assert {event.operation for event in cuda.doubles} == {"_to_copy", "sum"}


def test_the_numbers_are_those_of_a_cpu(devices):
    """Training in both forms: parameters, tied ones, buffers, dropout, autocast, checkpointing, Adam, clipping."""

    def train(place):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.LayerNorm(4))
        model[3].weight = model[0].weight
        model.to(place)
        assert model[3].weight is model[0].weight and next(model.parameters()).device == torch.device(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        x = torch.linspace(-1, 1, 12).reshape(3, 4).to(place)
        for _ in range(3):
            with torch.autocast(torch.device(place).type, dtype=torch.bfloat16):
                y = checkpoint(model, x, use_reentrant=False)
                query = y[None, None]
                y = nn.functional.scaled_dot_product_attention(query, query, query)
            y.float().square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return {name: value.cpu() for name, value in model.to(torch.float64).state_dict().items()}

    plain = train("cpu")
    with devices.LogicalCuda() as cuda:
        logical = train(SECOND)
    cuda.check()
    assert all(torch.equal(plain[name], logical[name]) for name in plain)


def test_what_torch_says_of_its_devices(devices):
    before = torch.cuda.is_available(), torch.Generator, torch.autocast.__init__
    with devices.LogicalCuda(devices=2) as cuda:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and torch.cuda.is_bf16_supported()
        assert torch.zeros(1).cuda().device == torch.device(FIRST) == torch.zeros(1, device="cuda").device
        with torch.cuda.device(1):
            assert torch.cuda.current_device() == 1 and torch.zeros(1, device="cuda").get_device() == 1
        with torch.device(SECOND):
            assert torch.zeros(1).device == torch.device(SECOND) == torch.ones(1).to(FIRST).cuda(1).device
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        with pytest.raises(RuntimeError, match="ordinal 2"):
            torch.zeros(1, device="cuda:2")
        assert torch.tensor([1.0], device="meta").is_meta and torch.zeros(1, device="cpu").device.type == "cpu"
        x = torch.zeros(2, device=SECOND)
        assert x.is_cuda and not x.is_cpu and x.new_ones(1).device == x.device and "cuda:1" in repr(x)
        loader = torch.utils.data.DataLoader([torch.ones(2)] * 2, batch_size=2, pin_memory=True)
        assert next(iter(loader)).is_pinned() and not torch.ones(2).is_pinned()
        torch.manual_seed(3)
    cuda.check()
    assert (torch.cuda.is_available(), torch.Generator, torch.autocast.__init__) == before
    assert torch.tensor([1.0], device="cpu").item() == 1.0
