"""The output of plan=true: the table of a plan, its verdict, its speed and what to type if it does not fit."""

# plan=true 与 plan=matrix 从这里进来：只打印，什么也不写
# run_plan 由 run_train.py 调用，决定打印哪一种；table 与 show 只把一份 Plan 变成行，autopsy 也用这张表
# 放不下时以退出码 1 结束，脚本里就能用它判断；在 -m 里不行，后面的设置还要接着看

import math
import sys
from dataclasses import asdict, replace

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from nanogpt.base import run_names
from nanogpt.base.config import ParallelConfig, TrainConfig, check, effective_batch, span_of
from nanogpt.base.console import Console, aligned, duration
from nanogpt.base.hardware import GIB
from nanogpt.base.language import sentence, text
from nanogpt.core.progress import Progress
from nanogpt.plan import advice, matrix
from nanogpt.plan.communication import EFFICIENT, ShardedCommunication
from nanogpt.plan.filled_config import for_the_text
from nanogpt.plan.plan import Plan, Planner
from nanogpt.plan.roofline import BANDWIDTH_EFFICIENCY, LAUNCH_S, PRODUCT_EFFICIENCY
from nanogpt.run import rundir
from nanogpt.run.session import leave_behind, typed_limits
from nanogpt.weights.checkpoint import find, listed

BAR = 30
NAMES = {
    "weights": sentence("weights"), "gradients": sentence("gradients"), "optimizer": sentence("optimizer state"),
    "activations": sentence("activations"), "temporaries": sentence("temporaries"),
    "rounding": sentence("rounding, fragments"), "workspace": sentence("cuBLAS workspace"),
    "context": sentence("CUDA context"), "desktop": sentence("desktop, others"),
}
VERDICTS = {"fits": sentence("FITS"), "tight": "plan_tight", "does_not_fit": sentence("DOES NOT FIT")}


def show(plan: Plan, console: Console) -> None:
    """Print the table, the verdict and the speed of a plan."""
    cfg, line = plan.cfg, console.line
    line(
        "plan: {model}, {parameters}, {precision}, memory={memory}, batch {batch} x {accum} x {block}, {device}",
        model=cfg.model.name, parameters=plan.size, precision=plan.precision,
        memory=cfg.groups.get("memory", "default"), batch=plan.batch_size, accum=plan.accumulation,
        block=cfg.model.block_size, device=plan.budget.name,
    )
    line("vocabulary {vocab} ({source})", vocab=cfg.model.vocab_size, source=plan.vocab_source)
    for row in table(plan):
        console.plain(row)
    if plan.ram:
        line("optimizer state in RAM: {gib:.2f} GiB", gib=plan.ram / GIB)
    line(
        "{verdict}: {total:.2f} of {budget:.2f} GiB (fits: within 95% of what the allocator may reserve)",
        verdict=text(VERDICTS[plan.verdict]), total=plan.total / GIB, budget=plan.budget.total / GIB,
    )
    if plan.budget.device_type == "cuda" and not plan.budget.growing:
        line("segments_fixed")
    line(
        "about {speed:,.0f} tokens/s, {step}/step, {wall} for {iters} iterations with evaluation",
        speed=plan.tokens_per_s, step=duration(plan.step_s), wall=duration(plan.train_s), iters=plan.iters,
    )
    if plan.communication:
        show_communication(plan, console)
    rates, kind = plan.rates, plan.budget.device_type
    line(
        "roofline: {half:.1f} (16-bit) and {fp32:.1f} (fp32) TFLOP/s, {bandwidth:.0f} GB/s [{source}], of which "
        "{products:.0%} and {passes:.0%} are reached, {launch:.0f} us per operation; without torch.compile",
        half=rates.half_flops / 1e12, fp32=rates.fp32_flops / 1e12, bandwidth=rates.bandwidth / 1e9,
        source=rates.source, products=PRODUCT_EFFICIENCY[kind], passes=BANDWIDTH_EFFICIENCY[kind],
        launch=LAUNCH_S[kind] * 1e6,
    )


def show_communication(plan: Plan, console: Console) -> None:
    """Print what summing the gradients costs, and where the network binds."""
    parallel, sums = plan.cfg.parallel, plan.communication
    world = sums.network.world
    console.line(
        "processes: {world}, machines: {nodes}, rows of a step in each process: {rows}, slowest link: {rate:.3g} GB/s",
        world=world, nodes=parallel.nodes, rows=-(-effective_batch(plan.cfg) // world),
        rate=sums.network.bytes_per_s / 1e9,
    )
    if isinstance(sums, ShardedCommunication):
        _show_sharded(sums, console)
        return
    console.line(
        "gradients: {size:.1f} MiB, each process sends {sent:.1f} MiB a step in {total} (ring or tree), of which "
        "{exposed} are not hidden behind the backward pass: {efficiency:.0%} of a step computes",
        size=sums.size / 2**20, sent=sums.sent / 2**20, total=duration(sums.total_s),
        exposed=duration(sums.exposed_s), efficiency=sums.efficiency,
    )
    if sums.efficiency < EFFICIENT:
        needed = sums.bytes_per_s_needed()
        console.line(
            "the network binds: {goal:.0%} would compute with global_batch_size={batch}{rate}", goal=EFFICIENT,
            batch=math.ceil(effective_batch(plan.cfg) * sums.times_the_work_needed()),
            rate=text(", or links of {rate:.3g} GB/s", rate=needed / 1e9) if needed else "",
        )


def _show_sharded(sums: ShardedCommunication, console: Console) -> None:
    console.line(
        "parallel=fsdp: each process sends {sent:.1f} MiB a step in {total} (ring), of which {exposed} are not hidden "
        "behind the computation: {efficiency:.0%} of a step computes",
        sent=sums.sent / 2**20, total=duration(sums.total_s), exposed=duration(sums.exposed_s),
        efficiency=sums.efficiency,
    )
    # 多累积几次没有用：每个微批都要凑齐一遍
    if sums.efficiency < EFFICIENT and (needed := sums.bytes_per_s_needed()):
        console.line(
            "the network binds: {goal:.0%} would compute with links of {rate:.3g} GB/s, or more rows in each "
            "micro-batch (batch_size)",
            goal=EFFICIENT, rate=needed / 1e9,
        )


def table(plan: Plan) -> list[str]:
    """Lines of aligned columns: part, GiB, share of the budget as a bar."""
    kind = plan.budget.device_type
    names = NAMES | ({"context": sentence("the process itself")} if kind == "cpu" else {})
    # CPU 上没有分配器的取整、工作区与桌面；别家的 GPU 怎样取整不知道
    hidden = {"cpu": ("rounding", "workspace", "desktop"), "cuda": ()}.get(kind, ("rounding", "workspace"))
    rows = [(text(names[key]), size) for key, size in asdict(plan.parts).items() if key not in hidden]
    rows += [(text("predicted peak"), plan.total), (text("budget"), plan.budget.total)]
    cells = []
    for name, size in rows:
        share = size / plan.budget.total
        # 超出预算的部分用另一种字符，一眼看出；超出很多的，80 列放不下，看百分数
        bar = "#" * round(min(share, 1) * BAR) + "!" * min(BAR // 3, round(max(0.0, share - 1) * BAR))
        cells.append((name, f"{size / GIB:7.2f}", f"{share:6.{1 if share < 10 else 0}%} {bar}"))
    return aligned((text("part"), "GiB", text("of the budget")), cells, sides="lrl")


def chosen_parallel(cfg: TrainConfig, *, console: Console) -> ParallelConfig:
    """What parallel=auto takes for a training, and a line that says so."""
    plan = Planner(cfg).predict(cfg)
    _say_chosen(plan, console)
    return plan.cfg.parallel


def _say_chosen(plan: Plan, console: Console) -> None:
    parallel = plan.cfg.parallel
    more = " parallel.sum_gradients=every" if (parallel.mode, parallel.sum_gradients) == ("fsdp", "every") else ""
    console.line(
        "parallel=auto takes parallel={chosen}: {need:.2f} of {budget:.2f} GiB in each process by the plan",
        chosen=parallel.mode + more, need=plan.total / GIB, budget=plan.budget.total / GIB,
    )


def _what_is_left(typed: TrainConfig, overrides: list[str], console: Console) -> TrainConfig:
    """The settings of a resume, with what it still has to do as its budget."""
    run_dir = run_names.locate(typed.resume)
    saved, file = rundir.saved_settings(run_dir)
    cfg = rundir.resumed_config(saved, typed, overrides, file)
    check(cfg)
    if not listed(run_dir).good:
        # 还没存过：从头来
        return cfg
    state = find(run_dir, typed.checkpoint or "last").load_state(mapped=True)
    at, cfg = Progress(**state["progress"]), for_the_text(cfg)
    leave_behind(cfg, typed_limits(cfg, overrides), at, console, same=False)
    span = span_of(cfg, at.iteration, at.tokens_trained)
    # 预热早已走完：留着它，剩下的步数短了，建议里的每一条都会被当成写错了
    return replace(
        cfg, max_iters=span.iters and span.iters - at.iteration, max_tokens=None, warmup_iters=0,
        max_minutes=span.seconds and (span.seconds - at.wall_s) / 60,
    )


EXIT_DOES_NOT_FIT = 1


def run_plan(cfg: TrainConfig, overrides: list[str]) -> None:
    """Print what cfg.plan asks for; exit code 1 when the setting does not fit."""
    console = Console()
    if cfg.resume:
        cfg = _what_is_left(cfg, overrides, console)
    else:
        check(cfg)
    if cfg.plan.lower() == "matrix":
        matrix.show(cfg, console)
        return
    planner = Planner(cfg)
    plan = planner.predict(cfg, overrides)
    if cfg.parallel.mode == "auto":
        _say_chosen(plan, console)
    show(plan, console)
    if cfg.batch_size == "auto":
        console.line(
            "batch_size=auto: {batch} is the largest that fits by the model; the training itself measures which is "
            "fastest",
            batch=plan.batch_size,
        )
    if plan.verdict == "does_not_fit":
        advice.show(plan, planner, console)
        # -m 时别的设置还要接着看：退出码只对单个设置有意义
        if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
            sys.exit(EXIT_DOES_NOT_FIT)
