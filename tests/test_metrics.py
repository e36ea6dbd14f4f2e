"""Peaks, memory and what is made of them."""

import time

import pytest
import torch
from conftest import make_config

from nanogpt.build import preset
from nanogpt.cards import known_card
from nanogpt.metrics import Stopwatch, memory_gib, peak_tflops
from nanogpt.oom import is_out_of_memory
from nanogpt.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "card"), [
    ("NVIDIA GeForce RTX 3060", "RTX 3060"), ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop"), ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA GeForce RTX 3060 Ti", None), ("NVIDIA GeForce RTX 4070 SUPER", None), ("Some other card", None),
])
def test_cards_are_known_by_their_exact_model(name, card):
    found = known_card(name)
    assert (found[0] if found else None) == card


def test_a_stated_peak_counts_and_the_cpu_is_measured_otherwise():
    cfg = make_config("hardware=rtx3060_12gb")
    assert peak_tflops(cfg.hardware, CPU, Precision(cfg.precision, CPU)) == ("hardware=rtx3060_12gb", 12.7)
    source, peak = peak_tflops(make_config().hardware, CPU, Precision(make_config("precision=fp16").precision, CPU))
    assert source == "CPU, matmul" and 0 < peak < 100


def test_memory_is_that_of_this_process():
    before = memory_gib(CPU)
    block = torch.ones(2**27)
    after = memory_gib(CPU)
    # 512 MiB
    assert after["allocated"] - before["allocated"] == pytest.approx(0.5, abs=0.1) and after["peak"] >= after["allocated"] - 0.01
    del block


def test_the_stopwatch_counts_only_between_start_and_stop():
    watch = Stopwatch()
    watch.start()
    watch.stop()
    before = watch.total_s
    time.sleep(0.02)
    assert watch.total_s == before and watch.take() == before and watch.total_s == 0


def test_flops_per_token_follow_the_palm_formula_and_look_ups_are_free():
    from nanogpt.build import build_model

    with torch.device("meta"):
        gpt2 = build_model(preset("gpt2", vocab_size=50257), 0)
        tiny = build_model(preset("tiny", vocab_size=65), 0)
        bare = build_model(preset("tiny", vocab_size=65, ngrams=[]), 0)
    # 位置表只是查表：总参数减去 1024 x 768
    assert gpt2.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert tiny.flops_per_token() == bare.flops_per_token() and tiny.parameter_count() > 4 * bare.parameter_count()


@pytest.mark.parametrize(("error", "expected"), [
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True), (RuntimeError("CUDA error: out of memory"), True), (MemoryError(), True),
    (RuntimeError("DataLoader worker exited"), False), (ValueError("out of memory"), False),
])
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected
