"""Peaks, memory and what is made of them."""

import json
import math
import mmap
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GPT2_RECIPE, QWEN3_RECIPE, make_config, tiny_model_config
from torch.utils.flop_counter import FlopCounterMode

from nanogpt.base.config import FinetuneConfig, HardwareConfig
from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.hardware import cards, known_card, peak_tflops_of, reference
from nanogpt.core.machine import cap_allocator
from nanogpt.core.memory.lora import add_adapters
from nanogpt.core.precision import Precision, default_format
from nanogpt.run import metrics
from nanogpt.run.metrics import Forecast, Stopwatch, flops_per_token, memory_gib, peak_tflops
from nanogpt.run.session import Session
from nanogpt.weights.build import build_model, preset

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "gib", "card"), [
    ("NVIDIA GeForce RTX 3060", 11.75, "rtx3060_12gb"), ("NVIDIA GeForce RTX 3060", 8.0, "rtx3060_8gb"),
    ("NVIDIA GeForce RTX 3060 Laptop GPU", 5.8, "rtx3060_laptop_6gb"), ("NVIDIA H100 80GB HBM3", 79.1, "h100_80gb"),
    ("NVIDIA GeForce RTX 3060 Ti", 7.8, "rtx3060ti_8gb"), ("NVIDIA GeForce RTX 4070 SUPER", 11.7, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None), ("NVIDIA H100 PCIe", 79.1, None), ("Some other card", 8, None),
])
def test_cards_are_known_by_their_exact_name_and_memory(name, gib, card):
    found = known_card(name, gib)
    assert (found.name if found else None) == card


def test_every_card_states_what_a_plan_needs_and_the_reference_is_one_of_them():
    assert reference().name == "rtx3060_12gb"
    for card in cards().values():
        assert card.dtype and card.peak_tflops_fp32 and card.peak_tflops_half and card.bandwidth_gb_per_s and card.vram_gib
        # 消费级卡的 16 位峰值（fp32 累加）是 fp32 的两倍，多数表格把不计累加的四倍写了进来
        if card.name.startswith("rtx"):
            assert card.peak_tflops_half == pytest.approx(2 * card.peak_tflops_fp32, rel=0.01)


@pytest.mark.parametrize(("bf16", "capability", "name", "stated", "dtype"), [
    (True, (8, 6), "NVIDIA GeForce RTX 3060", None, "bf16"), (False, (7, 5), "Tesla T4", None, "fp16"), (False, (6, 0), "Tesla P100-PCIE-16GB", None, "fp32"),
    (False, (7, 5), "NVIDIA GeForce GTX 1660", None, "fp32"), (True, (9, 0), "NVIDIA H100 80GB HBM3", "fp16", "fp16"), (False, (7, 5), "Tesla T4", "bf16", "fp16"),
])
def test_precision_auto_takes_the_first_format_that_the_cards_tensor_cores_have(monkeypatch, bf16, capability, name, stated, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert default_format(torch.device("cuda"), stated) == dtype and default_format(CPU, stated) == "fp32"


def test_tf32_counts_against_the_tensor_cores_and_not_against_plain_fp32():
    a100, t4 = cards()["a100_40gb"], cards()["t4_16gb"]
    assert [peak_tflops_of(a100, half=half, tf32=tf32) for half, tf32 in ((False, False), (False, True), (True, True))] == [19.5, 156, 312]
    assert peak_tflops_of(t4, half=False, tf32=True) == 8.1


@pytest.mark.parametrize(("platform", "stated", "free", "share"), [
    ("linux", None, 7.0, None), ("win32", None, 7.0, 6.75 / 8), ("linux", 6.0, 7.0, 5.5 / 8), ("win32", 6.0, 7.0, 5.5 / 8), ("linux", 9.0, 7.0, 7.5 / 8),
])
def test_the_allocator_is_capped_by_what_is_stated_by_the_card_and_on_windows_by_what_is_free(monkeypatch, capsys, platform, stated, free, share):
    caps = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free * 2**30), 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device=None: caps.append(fraction))
    cap_allocator(torch.device("cuda"), HardwareConfig(vram_gib=stated, context_gib=0.25, desktop_gib=0.25))
    assert caps == ([] if share is None else [pytest.approx(share)])
    assert ("has 8.00 GiB" in capsys.readouterr().err) == (stated == 9.0)


def test_a_stated_peak_counts_and_the_cpu_is_measured_otherwise():
    cfg = make_config("hardware=rtx3060_12gb")
    assert peak_tflops(cfg.hardware, CPU, Precision(cfg.precision, CPU)) == ("hardware=rtx3060_12gb", 12.7)
    source, peak = peak_tflops(make_config().hardware, CPU, Precision(make_config("precision=fp16").precision, CPU))
    assert source.startswith(f"{torch.get_num_threads()} x the fastest one-thread matrix product seen on ") and 0 < peak < 100


def test_a_measured_peak_only_rises_and_is_kept_for_the_next_process(monkeypatch, tmp_path):
    """A busy machine shows its peak now and then; whatever is in the file, training goes on."""
    seen, file = [], tmp_path / "cache" / metrics.PEAKS
    monkeypatch.setenv("NANOGPT_CACHE", str(file.parent))
    monkeypatch.setattr(metrics, "_burst", lambda device, dtype: seen.pop(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def measured(*bursts, age=0.0, keep=True):
        seen[:] = bursts
        monkeypatch.setattr(metrics, "_measured", {key: (best, at - age) for key, (best, at) in metrics._measured.items()})
        peak = metrics.measured_peak(CPU, torch.float32, keep=keep)
        assert not seen
        return peak

    def next_process():
        monkeypatch.setattr(metrics, "_measured", {})

    next_process()
    # 计划什么也不写
    assert measured(0.25, keep=False) == 0.75 and not file.exists()
    next_process()
    assert measured(0.25) == measured() == measured(0.125, age=100) == 0.75 and measured(0.5, age=100) == 1.5
    next_process()
    assert measured(0.25) == 1.5
    (key,) = json.loads(file.read_text(encoding="utf-8"))
    for damaged in ("", "[1]", '{"a": 1}', f'{{"{key}": "fast"}}', f'{{"{key}": Infinity}}'):
        file.write_text(damaged, encoding="utf-8")
        next_process()
        assert measured(0.25) == 0.75
    monkeypatch.setenv("NANOGPT_CACHE", str(file / "no folder"))
    next_process()
    assert measured(0.25) == 0.75


def test_a_run_looks_at_its_peak_again_at_every_evaluation(in_tmp, tiny_overrides, monkeypatch):
    peaks = iter(range(1, 9))
    monkeypatch.setattr("nanogpt.run.loop.peak_tflops", lambda *_: ("somewhere", next(peaks)))
    trainer = Session.new(make_config(*tiny_overrides, "out_dir=run", "sample_tokens=0"), in_tmp / "run")._build()
    assert trainer.peak == 1
    trainer.fit()
    assert trainer.peak == 3


def test_a_long_evaluation_is_announced_where_there_is_no_bar(in_tmp, tiny_overrides, capsys):
    trainer = Session.new(make_config(*tiny_overrides, "out_dir=run"), in_tmp / "run")._build()
    capsys.readouterr()
    for seconds, said in ((20.0, ""), (90.0, "iter 0: evaluating and saving, about 90.0 s …\n")):
        trainer.forecast.pause("evaluation", seconds)
        trainer._evaluate_in_sight()
        assert capsys.readouterr().out == said


def test_memory_is_that_of_this_process():
    before = memory_gib(CPU)
    # 512 MiB，直接向系统要：堆里可能还有前面的测试释放的，不算新占的
    block = mmap.mmap(-1, 2**29)
    np.frombuffer(block, np.uint8)[:] = 1
    after = memory_gib(CPU)
    assert after["allocated"] - before["allocated"] == pytest.approx(0.5, abs=0.1) and after["peak"] >= after["allocated"] - 0.01
    del block


def test_the_stopwatch_counts_only_between_start_and_stop():
    watch = Stopwatch()
    watch.start()
    watch.stop()
    before = watch.total_s
    time.sleep(0.02)
    assert watch.total_s == before and watch.take() == before and watch.total_s == 0


@pytest.mark.parametrize("linears", [None, ["c_attn", "c_proj", "c_fc"], ["c_fc"], ["c_proj"]])
@pytest.mark.parametrize("recipe", [{}, GPT2_RECIPE, QWEN3_RECIPE], ids=["modern", "gpt2", "qwen3"])
def test_flops_per_token_are_those_that_a_training_step_counts(recipe, linears):
    """None: all weights are trained; else LoRA beside these linears. The rows are short, so that attention is explicit products."""
    model = build_model(tiny_model_config(**recipe), 0)
    if linears:
        add_adapters(model, FinetuneConfig(method="lora", rank=3, linears=linears))
    idx = torch.zeros(2, model.config.block_size, dtype=torch.long)
    def products(_, a, b, **__):
        # 计数器不认识就地的 baddbmm_，注意力的反向用的正是它
        return 2 * math.prod(a) * b[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: products}) as counter:
        model.loss(idx, idx).backward()
    assert flops_per_token(model) * idx.numel() == counter.get_total_flops()


def test_flops_per_token_follow_the_palm_formula_and_look_ups_are_free():
    with torch.device("meta"):
        gpt2 = build_model(preset("gpt2", vocab_size=50257), 0)
        tiny = build_model(preset("tiny", vocab_size=65), 0)
        bare = build_model(preset("tiny", vocab_size=65, ngrams=[]), 0)
    # 位置表只是查表，偏置与 LayerNorm 不是矩阵
    vectors = sum(p.numel() for p in gpt2.parameters() if p.dim() == 1)
    assert flops_per_token(gpt2) == 6 * (124_439_808 - 1024 * 768 - vectors) + 12 * 12 * 768 * 1024
    assert flops_per_token(tiny) == flops_per_token(bare) and tiny.parameter_count() > 4 * bare.parameter_count()


@pytest.mark.parametrize(("error", "expected"), [
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True), (RuntimeError("CUDA error: out of memory"), True), (MemoryError(), True),
    (RuntimeError("DataLoader worker exited"), False), (ValueError("out of memory"), False),
])
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(("max_iters", "evaluations", "saves"), [(50, 10, None), (50, 7, 5), (50, None, 4), (12, 30, 6), (50, 10, 20)])
def test_the_forecast_of_a_steady_training_is_the_time_that_it_takes(max_iters, evaluations, saves):
    forecast = Forecast(max_iters, evaluations, saves, 4.0)
    assert forecast.step_s == forecast.left_s(1) == 0
    forecast.step(2.0)
    # 第一次评估之前：按它的计算量估
    assert forecast.evaluation_s == 8.0
    forecast.pause("evaluation", 9.0)
    forecast.pause("save", 3.0)

    def pause(iteration):
        evaluated = iteration == max_iters or (bool(evaluations) and iteration % evaluations == 0)
        return 9.0 if evaluated else 3.0 if saves and iteration % saves == 0 else 0.0

    for done in range(1, max_iters + 1):
        assert forecast.left_s(done) == 2.0 * (max_iters - done) + sum(map(pause, range(done, max_iters + 1)))
