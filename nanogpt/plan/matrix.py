"""The table of plan=matrix: the largest micro-batch of every model, number format and memory preset."""

# plan=matrix 的表：每个模型、数字格式、memory 预设，在几张卡上最多放得下多大的微批
# 追踪与显存大小无关，所以各卡共用一份追踪，只有“放不放得下”各算各的；fp16 与 bf16 也只追踪一次
# show 由 plan/show 的 run_plan 调用；每个模型算完就打印，不必等整张表

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from nanogpt.base.config import HardwareConfig, MemoryConfig, PrecisionConfig, TrainConfig
from nanogpt.base.console import Console
from nanogpt.base.hardware import REFERENCE, cards
from nanogpt.base.language import say
from nanogpt.core.machine import segments_grow
from nanogpt.plan.filled_config import GPT2_VOCAB
from nanogpt.plan.plan import BATCHES, Planner
from nanogpt.weights.build import memory_options, preset, preset_names

MAX_TOKENS = 2**15
"""Tokens per micro-batch beyond which nothing is gained, so that nothing is tried."""


def chosen_cards(hardware: HardwareConfig) -> dict[str, HardwareConfig]:
    """The card that was typed, else all of the reference card's family, the largest memory first."""
    if hardware.vram_gib is not None:
        return {hardware.name: hardware}
    # 所有的卡并排放不下一张表：默认只看参考卡的几种显存
    family = REFERENCE.partition("_")[0]
    return {name: card for name, card in cards().items() if name.partition("_")[0] == family}


def memories(cfg: TrainConfig) -> dict[str, MemoryConfig]:
    """The fastest, a cheap and the most thorough option, or the one that was typed, with what else was typed of it."""
    if (chosen := cfg.groups["memory"]) != "default":
        return {chosen: cfg.memory}
    # 其余几档在命令行写 memory=… 单独看
    options = memory_options()
    names = list(options)
    return {name: options[name] for name in (*names[:2], names[-1])}


def rows(cfg: TrainConfig) -> Iterator[tuple[str, str, str, dict[str, int | None]]]:
    """(model, precision, memory, largest batch by card) of every combination at the vocabulary of GPT-2."""
    hardware = chosen_cards(cfg.hardware)
    planners = {name: Planner(replace(cfg, device="auto", hardware=node)) for name, node in hardware.items()}
    first, *others = planners.values()
    for other in others:
        # 追踪与显存大小无关：各卡共用
        other.share(first)
    for model in preset_names():
        for memory, node in memories(cfg).items():
            known: dict[str, dict[str, int | None]] = {}
            for precision in ("fp32", "fp16", "bf16"):
                # 配置检查也不许的组合：bf16 权重只配 bf16，反向里更新不能配 loss scaling
                scaled_in_backward = node.optimizer_in_backward and precision == "fp16"
                if (node.weights == "bf16" and precision != "bf16") or scaled_in_backward:
                    continue
                # fp16 与 bf16 的每个张量同样大（有测试）：只追踪一次
                same = "fp32" if precision == "fp32" else "16"
                if same not in known:
                    say("tracing {what} …", what=f"{model} {precision} memory={memory}")
                    candidate = replace(
                        cfg, model=preset(model, vocab_size=GPT2_VOCAB), precision=PrecisionConfig(dtype=precision),
                        memory=node, gradient_accumulation_steps=1, global_batch_size=None, init_from=None,
                    )
                    sizes = batches(candidate.model.block_size)
                    known[same] = {name: planner.largest_batch(candidate, sizes) for name, planner in planners.items()}
                yield model, precision, memory, known[same]


def batches(block_size: int) -> tuple[int, ...]:
    """The numbers of rows that are tried."""
    return tuple(rows for rows in BATCHES if rows * block_size <= MAX_TOKENS)


def show(cfg: TrainConfig, console: Console) -> None:
    """Print the matrix as a Markdown table."""
    names = list(chosen_cards(cfg.hardware))
    optimizer = str(cfg.optimizer["_target_"]).rpartition(".")[2]
    console.line(
        "largest batch_size that fits, at the model's block_size, {optimizer}, vocabulary {vocab}; - : not even one "
        "row, + : more was not tried",
        optimizer=f"optimizer={optimizer}", vocab=GPT2_VOCAB,
    )
    if not segments_grow():
        console.line("segments_fixed")
    console.plain("")
    console.plain(f"| model | memory | precision | {' | '.join(names)} |")
    console.plain("|---|---|---|" + "--:|" * len(names))
    for model, found in groupby(rows(cfg), key=lambda row: row[0]):
        most = batches(preset(model).block_size)[-1]
        # 到了上限还放得下的，加号说明没有再往上试
        cells = {None: "-", most: f"{most}+"}
        merged: dict[tuple, list[str]] = {}
        for _, precision, memory, largest in found:
            shown = [cells.get(largest[name], str(largest[name])) for name in names]
            # 结果相同的格式并成一行
            merged.setdefault((memory, *shown), []).append(precision)
        # 每个模型算完就打印：中途停下也留得住前面的
        for (memory, *largest), precisions in merged.items():
            console.plain(f"| `{model}` | {memory} | {', '.join(precisions)} | {' | '.join(largest)} |")
