"""Devices other than CUDA's: which one is taken, and a whole run on a pretended Mac, whose GPU has no float64."""

import ctypes
import json
import math
import sys
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import train
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nanogpt.base.config import HardwareConfig, PrecisionConfig, check_device
from nanogpt.base.errors import is_out_of_memory, release
from nanogpt.base.language import ConfigError
from nanogpt.core import distributed, kernels, machine
from nanogpt.core.compilation import unavailable
from nanogpt.core.precision import Precision, default_format
from nanogpt.core.sampling import sampler
from nanogpt.plan import roofline
from nanogpt.plan.plan import plan_for
from nanogpt.run import metrics
from nanogpt.run.metrics import memory_gib
from nanogpt.run.summary import device_name

GIB = 2**30
MPS = torch.device("mps", 0)


def accelerator(monkeypatch, kind, count=1):
    """This torch has an accelerator of this kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


class OnMac(torch.Tensor):
    """A tensor that says that it lies on a Mac's GPU."""


def on_mac(x):
    return x if isinstance(x, OnMac) or not isinstance(x, torch.Tensor) else x.as_subclass(OnMac)


def refuse_float64(x):
    if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


class NoFloat64(TorchDispatchMode):
    """Inside of a backward pass everything lies on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map(refuse_float64, result)
        return result


class Mac(TorchFunctionMode):
    """Tensors asked for on mps are marked, refuse float64, tensors of the host beside them, and numpy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        marked = any(isinstance(x, OnMac) for x in tensors)
        if func == torch.Tensor.device.__get__:
            return MPS if marked else args[0].as_subclass(torch.Tensor).device
        if func is torch.device or func.__name__ in ("_parse_to", "_has_compatible_shallow_copy_type"):
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            # autograd 交给反向的张量没有记号：那里只看 float64
            with NoFloat64():
                return func(*args, **kwargs)
        if func == torch.Tensor.grad.__get__:
            # autograd 存下的梯度没有记号
            return on_mac(func(*args)) if marked else func(*args)
        if func is torch.Tensor.numpy and marked:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        moved = [x for x in (*args, *kwargs.values()) if isinstance(x, (torch.device, str)) and str(x).startswith(("mps", "cpu"))]
        args, kwargs = tree_map(lambda x: torch.device("cpu") if isinstance(x, torch.device) else "cpu" if x == "mps" else x, (args, kwargs))
        copies = func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.copy_)
        if marked and not copies and any(not isinstance(x, OnMac) and x.dim() for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and mps ({func})")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        there = str(moved[0]).startswith("mps") if moved else marked and func is not torch.Tensor.cpu
        if not there:
            return tree_map(lambda x: x.as_subclass(torch.Tensor) if isinstance(x, OnMac) else x, result)
        tree_map(refuse_float64, result)
        return tree_map(on_mac, result)


@pytest.fixture
def mac(monkeypatch):
    """A Mac with Apple silicon, as far as a CPU can be one."""
    accelerator(monkeypatch, "mps")
    told = {
        "recommended_max_memory": lambda: 10 * GIB, "driver_allocated_memory": lambda: 3 * GIB,
        "current_allocated_memory": lambda: 2 * GIB, "empty_cache": lambda: None, "synchronize": lambda: None,
        "set_per_process_memory_fraction": lambda part: told.update(part=part),
    }
    for name, function in list(told.items()):
        monkeypatch.setattr(torch.mps, name, function)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
    # psutil 在 Mac 上只说这几项
    used = namedtuple("pmem", "rss vms pfaults pageins")(GIB, 4 * GIB, 1, 1)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: used)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2", raising=False)
    for user in (metrics, roofline):
        monkeypatch.setattr(user, "measured_peak", lambda *_, **__: 1.0)
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: 10.0)
    # 换掉参数对象本身：改 .data 就丢了记号
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with Mac():
        yield told


@pytest.mark.parametrize(("kind", "named", "got"), [
    ("cuda", "auto", "cuda:0"), ("xpu", "auto", "xpu:0"), ("mps", "auto", "mps"), (None, "auto", "cpu"), ("hpu", "auto", "cpu"),
    ("xpu", "xpu:1", "xpu:1"), ("mps", "cpu", "cpu"), ("mps", "mps", "mps"),
])
def test_auto_takes_the_accelerator_that_torch_has_and_a_name_that_one(monkeypatch, kind, named, got):
    accelerator(monkeypatch, kind, count=2)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "set_device", lambda device: None)
    check_device(named)
    assert str(machine.choose_device(named, HardwareConfig())) == got
    assert str(machine.choose_device("auto", HardwareConfig(name="cpu"))) == "cpu"


@pytest.mark.parametrize(("kind", "named", "words"), [
    (None, "mps", "this machine offers cpu: choose device=cpu"), ("cuda", "mps", "choose device=cuda:0"),
    (None, "xpu", "the XPU build of torch"), ("mps", "cuda", "choose device=mps or install the CUDA build"), ("cuda", "cuda:1", "offers cuda:0;"),
])
def test_a_device_that_is_not_there_is_one_line_that_names_those_that_are(monkeypatch, kind, named, words):
    accelerator(monkeypatch, kind)
    with pytest.raises(ConfigError) as error:
        machine.choose_device(named, HardwareConfig())
    assert words in str(error.value) and str(error.value).startswith(f"device={named}") and "\n" not in str(error.value)


def test_a_torch_that_looks_up_other_rows_on_a_mac_is_refused(monkeypatch):
    accelerator(monkeypatch, "mps")
    monkeypatch.setattr(machine, "TORCH", (2, 7))
    with pytest.raises(ConfigError, match=r"install torch 2\.8 or later .pip install -U torch., or choose device=cpu"):
        machine.choose_device("auto", HardwareConfig())
    assert str(machine.choose_device("cpu", HardwareConfig())) == "cpu"


def test_several_processes_on_a_mac_are_refused(monkeypatch):
    accelerator(monkeypatch, "mps")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(ConfigError, match="several processes"):
        machine.choose_device("auto", HardwareConfig())


@pytest.mark.parametrize("more", [["optimizer=adamw", "precision=fp16"], ["memory.optimizer_state=int8"]], ids=str)
def test_a_run_on_a_mac_trains_evaluates_saves_and_writes_without_float64(mac, in_tmp, tiny_overrides, capsys, more):
    plain = [o for o in tiny_overrides if o != "device=cpu"]
    trainer = train(plain, *more, "device=mps", "max_iters=3", "eval_interval=3")
    said = capsys.readouterr().out
    assert trainer.device == MPS and all(isinstance(p, OnMac) for p in trainer.model.parameters())
    assert "iter 1: loss" in said and said.count("VRAM") >= 3
    summary = json.loads((in_tmp / "outputs/run/summary.json").read_text(encoding="utf-8"))
    assert math.isfinite(summary["val_loss"]) and summary["peak_vram_gib"] == 3 and summary["device"] == "Apple M2"


def test_a_mac_computes_what_a_cpu_does(mac, in_tmp, tiny_overrides):
    there = train([o for o in tiny_overrides if o != "device=cpu"], "device=mps", "max_iters=3", out="there")
    here = train(tiny_overrides, "max_iters=3", out="here")
    assert there.progress.val_loss == pytest.approx(here.progress.val_loss, rel=1e-5)
    assert there.last_sample == here.last_sample
    logits, filters = torch.randn(3, 30), sampler(top_k=20, top_p=0.7, typical=0.8, repetition_penalty=1.2, no_repeat_ngram=2)
    tokens = torch.randint(0, 30, (3, 9))
    assert torch.equal(filters(logits.to("mps"), tokens.to("mps")).cpu(), filters(logits, tokens))


def test_a_macs_memory_is_what_metal_recommends_and_its_figures_are_in_every_line(mac, monkeypatch):
    assert memory_gib(MPS) == {"allocated": 2, "reserved": 3, "peak": 3} and device_name(MPS) == "Apple M2"
    monkeypatch.setattr("nanogpt.base.hardware.free_ram", lambda: 100 * GIB)
    plan = plan_for("model=tiny", "device=mps", "hardware=auto", "model.vocab_size=65")
    assert plan.budget.device_type == "mps" and plan.budget.total == 10 * GIB and plan.budget.capacity == 7 * GIB
    assert plan.precision == "float32" and plan.verdict == "fits" and plan.parts.workspace == 0
    # 写明的预算也是真的
    machine.cap_allocator(MPS, HardwareConfig(vram_gib=5.0, context_gib=0.0, desktop_gib=0.0))
    assert mac["part"] == 0.5
    release(MPS)
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.96 GB, other allocations: 1 GB, max allowed: 9.07 GB)."))


def test_a_macs_number_format_is_fp32_unless_another_one_works_when_asked(mac, monkeypatch):
    assert default_format(MPS) == "fp32" and unavailable(MPS) == "not tried on mps"
    assert Precision(PrecisionConfig(dtype="fp16"), MPS).scaler.is_enabled()

    def refuses(device, **_):
        raise RuntimeError("MPS bfloat16 is only supported on macOS 14+\nmore")

    monkeypatch.setattr(torch, "autocast", refuses)
    with pytest.raises(ConfigError, match=r"^precision.dtype=bf16 does not work on Apple M2 \(MPS bfloat16 .* 14\+\); use precision=fp32$"):
        Precision(PrecisionConfig(dtype="bf16"), MPS)


def test_a_skipped_adamw_update_changes_nothing_where_the_kernel_does_not_look(monkeypatch):
    # MPS 的 kernel 不看 found_inf
    monkeypatch.setattr(kernels, "device_type", lambda x: "mps")
    group = {"betas": (0.9, 0.95), "lr": 0.1, "weight_decay": 0.1, "eps": 1e-8}
    for skip, moved in ((1.0, False), (0.0, True)):
        p, states = torch.ones(4), ([torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())])
        kernels.adamw([p], [torch.full((4,), math.nan if skip else 1.0)], states, group, torch.tensor(skip))
        assert torch.equal(p, torch.ones(4)) is not moved and states[2][0].item() == moved


@pytest.mark.parametrize("mib", [1, 7])
def test_large_pages_are_asked_for_whole_ones_inside_of_a_tensor_whose_values_stay(monkeypatch, mib):
    asked, advise = [], ctypes.CDLL(None).madvise if sys.platform == "linux" else lambda *_: 0

    def seen(start, size, advice):
        asked.append((start.value, size.value))
        return advise(start, size, advice)

    x = torch.arange(mib * 2**18, dtype=torch.float32)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=seen))
    machine.use_large_pages(x)
    assert torch.equal(x, torch.arange(len(x), dtype=torch.float32))
    page = machine.LARGE_PAGE
    # 页界落在哪里由系统定：7 MiB 里至少有两整页
    assert bool(asked) == (sys.platform == "linux" and mib == 7)
    for start, size in asked:
        assert start % page == size % page == 0 and x.data_ptr() <= start and start + size <= x.data_ptr() + x.nbytes
        assert x.nbytes - size < 2 * page
