"""Predict what a config takes and how fast it is, without allocating anything."""

# 规划的中心：把追踪、分配器模型、屋顶线（roofline）合成一份 Plan：峰值由什么组成、放不放得下、每步多久
# Planner 管一个设备，记住追踪过的；Estimate 用一两层的浅追踪粗估，只用来少做几次几秒钟的完整追踪，答案都由后者说了算
# predict 是最短的入口；show、advice、matrix、autopsy、sweep 都从这里拿结果
# 放得下的意思是：分配器模型在容量的 95% 之内走得完

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch

from nanogpt.base.cli import implied_dataset
from nanogpt.base.config import ParallelConfig, TrainConfig, check, not_sharded, span_of, tokens_per_step
from nanogpt.base.groups import train_config
from nanogpt.base.quoting import quoted
from nanogpt.base.value_checks import refuse_keys
from nanogpt.core import distributed
from nanogpt.plan.allocator import Replay, replay
from nanogpt.plan.budget import Budget, budget_for, on_cpu
from nanogpt.plan.communication import BACKWARD, Communication, Gradient, Network, ShardedCommunication
from nanogpt.plan.filled_config import filled
from nanogpt.plan.roofline import Rates, rates_of
from nanogpt.plan.trace import Shape, Trace, trace
from nanogpt.run import cpu_units
from nanogpt.run.loop import share_batch
from nanogpt.run.regularize import counts_time

# ---- 粗略的峰值 ----

DEPTHS = (1, 2)
# 碎片与取整的常见比例，段不增长与增长时
RESERVED = {False: 1.04, True: 1.01}


def bilinear(corner: Callable[[int, int], float], x: float, y: float, rows: tuple[int, int]) -> float:
    """The bilinear function through corner(i, j) at DEPTHS[i], rows[j], at depth x and y rows."""
    u = (x - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    v = (y - rows[0]) / (rows[1] - rows[0])
    weights = {(i, j): (u if i else 1 - u) * (v if j else 1 - v) for i in (0, 1) for j in (0, 1)}
    # 一个角要一次追踪：用不着的不去问
    return sum(weight * corner(*at) for at, weight in weights.items() if weight)


class Estimate:
    """A quick guess of the peak at any number of rows, from shallow traces; full traces decide, this only saves some.

    Blocks are alike, so that every phase's peak is affine in the depth and, on either side of the number of rows whose
    logits fill one chunk of the loss, in the rows, apart from rounding.
    """

    # 两种层数、两种行数的四次浅追踪，就够估附近的任何行数

    def __init__(self, cfg: TrainConfig, device_type: str):
        self.cfg = cfg
        # 自己的模型各层可以不同：照原来的层数追踪
        self.shallow = cfg.model._target_ == "nanogpt.core.model.GPT" and cfg.model.n_layer > 2 * DEPTHS[1]
        self.device_type = device_type
        self.shards = shards_of(cfg)
        self._corners: dict[tuple[int, int], Trace] = {}
        # 到这么多条，输出层的一块 logits 正好装满；再多就分块，临时张量不再增长
        tokens = cfg.memory.loss_chunk_mib * 2**20 // (4 * cfg.model.vocab_size)
        self.full_chunk = max(1, -(-tokens // cfg.model.block_size))

    def rows(self, wanted: int) -> tuple[int, int]:
        """The two numbers of rows whose traces say something about `wanted` rows."""
        # 峰值是几条直线的最大值，隔得太远会换一条：取离得近的两点
        near = 1 if wanted <= 8 else 8 if wanted <= 64 else 64
        first = max(near, self.full_chunk) if wanted > self.full_chunk else min(near, self.full_chunk)
        return first, 2 * first

    def corner(self, i: int, rows: int) -> Trace:
        """The trace at DEPTHS[i] (or the full depth) and `rows` rows, made when first asked for."""
        key = (i if self.shallow else 0, rows)
        if key not in self._corners:
            model = replace(self.cfg.model, n_layer=DEPTHS[key[0]]) if self.shallow else self.cfg.model
            total = self.cfg.global_batch_size
            accumulation = 1 if self.cfg.memory.optimizer_in_backward or total == 1 else 2
            shape = Shape(rows, accumulation, self.cfg.eval_batch_size or rows, self.device_type, self.shards)
            self._corners[key] = trace(replace(self.cfg, model=model), shape)
        return self._corners[key]

    def live(self, rows: int) -> float:
        """Peak of the live bytes."""
        at, depth = self.rows(rows), self.cfg.model.n_layer
        phases = self.corner(0, at[rows >= at[1]]).events

        def peak(phase: str) -> float:
            return bilinear(lambda i, j: self.corner(i, at[j]).peaks()[phase], depth, rows, at)

        return max(map(peak, phases))

    def fits(self, rows: int, budget: Budget, part: float) -> bool:
        """Whether `part` of the capacity probably suffices."""
        more = RESERVED[budget.growing] if budget.device_type == "cuda" else 1
        return self.live(rows) * more <= budget.capacity * part


MIB = 2**20
TIGHT = 0.95
"""A setting fits when the allocator model succeeds within this part of the capacity; tight when it needs more."""
# deterministic=true 设 CUBLAS_WORKSPACE_CONFIG=:4096:8；否则是 Ampere 的默认值 :4096:2:16:8
CUBLAS_WORKSPACE = {True: 8 * 4 * MIB, False: 2 * 4 * MIB + 8 * 16 * 1024}
CUBLAS_HANDLES = 2
"""cuBLAS keeps a workspace per thread: the program's and autograd's."""
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Parts:
    """Where the predicted peak comes from, bytes."""

    # 前五项来自追踪，其余来自分配器与预算；加起来就是整张卡的峰值

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    rounding: int
    """What the allocator reserves beyond what is live: rounding up, fragments, whole segments."""
    workspace: int
    context: int
    desktop: int


@dataclass(frozen=True)
class Plan:
    """The prediction for one config; bytes and seconds."""

    # 全是数，不含张量：可以留着比较，也可以传给另一个进程

    cfg: TrainConfig
    budget: Budget
    rates: Rates
    parts: Parts
    allocated: int
    """As torch.cuda.max_memory_allocated would say; on a CPU the live bytes."""
    reserved: int
    """As torch.cuda.max_memory_reserved would say; on a CPU the live bytes."""
    ram: int
    """Optimizer state in RAM beside a card."""
    verdict: str
    """fits | tight | does_not_fit"""
    batch_size: int
    accumulation: int
    parameters: int
    size: str
    """The parameters, for people."""
    precision: str
    vocab_source: str
    step_s: float
    """With what the sums of gradients add to it."""
    communication: Communication | None
    """Of several processes."""
    tokens_per_s: float
    train_s: float
    """The steps of the budget and their evaluations."""
    iters: int
    """Those steps."""

    @property
    def total(self) -> int:
        """Predicted peak of the device, other programs included."""
        return sum(asdict(self.parts).values())


class Planner:
    """Traces configs for one device and remembers the traces."""

    # 一次追踪要几秒，建议与表会反复问相近的设置：记住的键是所有影响追踪的部分

    def __init__(self, cfg: TrainConfig):
        if cfg.threads:
            # 测这台机器的峰值时，也用训练会用的那么多
            torch.set_num_threads(cfg.threads)
        self.budget = budget_for(cfg)
        self.rates = rates_of(cfg.hardware, self.budget, tf32=cfg.precision.tf32)
        self._traces: dict[str, Trace] = {}
        self._estimates: dict[str, Estimate] = {}

    def budget_of(self, cfg: TrainConfig) -> Budget:
        """What tensors may take with the settings of cfg: on a CPU these decide what the process itself takes."""
        return on_cpu(cfg, self.budget.total) if self.budget.device_type == "cpu" else self.budget

    def share(self, other: "Planner") -> None:
        """Use the traces of another planner for the same kind of device."""
        self._traces, self._estimates = other._traces, other._estimates

    def trace(self, cfg: TrainConfig, rows: int, total: int, eval_rows: int) -> Trace:
        """The trace of cfg with micro-batches of `rows` out of `total`."""
        # 累积两次以上与两次的内存相同
        shape = Shape(rows, min(2, -(-total // rows)), eval_rows, self.budget.traced_as, shards_of(cfg))
        key = repr((
            cfg.model, cfg.precision, cfg.hardware.dtype, cfg.memory, cfg.optimizer, cfg.finetune, cfg.seed, shape,
            cfg.parallel.sum_gradients,
        ))
        if key not in self._traces:
            self._traces[key] = trace(cfg, shape)
        return self._traces[key]

    def predict(self, cfg: TrainConfig, overrides: list[str] | None = None) -> Plan:
        """The plan of cfg; `overrides` as typed say which model fields override init_from."""
        return self._predict(cfg, overrides, self.steps(cfg, overrides) if counts_time(cfg) else None)

    def steps(self, cfg: TrainConfig, overrides: list[str] | None = None) -> int:
        """How many steps the budget of cfg is good for, by the speed of what a few passes would be trained with."""
        # 读几遍要看多快，多快又看留下哪些表：差得不多，不再来回
        return self._predict(cfg, overrides, None).iters

    def _predict(self, cfg: TrainConfig, overrides: list[str] | None, steps: int | None) -> Plan:
        cfg, vocab_source = filled(cfg, overrides, steps)
        cfg = replace(cfg, precision=cpu_units.settled(cfg.precision, cfg.model, self.budget.device_type))
        if cfg.precision.cpu_bf16 == "all" and not cfg.hardware.peak_tflops_half:
            # 量过的训练知道单元有多快；不用单元的，16 位只是取整
            self.rates = replace(self.rates, half_flops=self.rates.fp32_flops * cpu_units.gain_of_products())
        if cfg.batch_size == "auto":
            rows = self.largest_batch(cfg, BATCHES) or 1
            cfg = replace(cfg, batch_size=rows, gradient_accumulation_steps=1)
        for parallel in parallels(cfg):
            plan = self.judge(replace(cfg, parallel=parallel), vocab_source)
            if plan.verdict != "does_not_fit":
                break
        return plan

    def largest_batch(self, cfg: TrainConfig, candidates: tuple[int, ...]) -> int | None:
        """The largest of `candidates` rows that fits by a full trace, None where not even the first does."""
        limit = cfg.global_batch_size or candidates[-1]
        candidates = tuple(c for c in candidates if c <= limit)
        guess = self.estimate(cfg)
        promising = [c for c in candidates if guess.fits(c, self.budget, TIGHT)]
        at = max(0, len(promising) - 1)
        # 估计只用来少追踪几次；答案都由完整的追踪说了算
        if self.fits(cfg, candidates[at]):
            for larger in candidates[at + 1 :]:
                if not (guess.fits(larger, self.budget, 1.0) and self.fits(cfg, larger)):
                    break
                at += 1
            return candidates[at]
        while at > 0:
            at -= 1
            if self.fits(cfg, candidates[at]):
                return candidates[at]
        return None

    def estimate(self, cfg: TrainConfig) -> Estimate:
        """The peak of cfg at any number of rows, from shallow traces; remembered."""
        key = repr((
            cfg.model, cfg.precision, cfg.memory, cfg.optimizer, cfg.finetune, cfg.eval_batch_size,
            cfg.global_batch_size, shards_of(cfg), cfg.parallel.sum_gradients,
        ))
        if key not in self._estimates:
            self._estimates[key] = Estimate(cfg, self.budget.traced_as)
        return self._estimates[key]

    def fits(self, cfg: TrainConfig, rows: int) -> bool:
        """Whether accumulated micro-batches of `rows` fit, by a full trace."""
        if not self.estimate(cfg).fits(rows, self.budget, 1.3):
            # 差得远：不必花几秒去证实
            return False
        # 按会累积来算：第二个微批时梯度已经在了；反向里更新的不能累积
        total = cfg.global_batch_size or (1 if cfg.memory.optimizer_in_backward else 2) * rows
        traced = self.trace(cfg, rows, total, cfg.eval_batch_size or rows)
        return self._within(cfg, traced, TIGHT).fits

    def _within(self, cfg: TrainConfig, traced: Trace, part: float) -> Replay:
        capacity = int(self.budget_of(cfg).capacity * part)
        if self.budget.device_type != "cuda":
            live, _ = traced.peak()
            return Replay(live + traced.ram <= capacity, live, live)
        return self._replay(cfg, traced, capacity)

    def _replay(self, cfg: TrainConfig, traced: Trace, capacity: int | None = None) -> Replay:
        return replay(with_workspace(cfg, traced), capacity, growing=self.budget.growing)

    def judge(self, cfg: TrainConfig, vocab_source: str) -> Plan:
        """The plan of a filled config with a batch_size."""
        world, budget = cfg.parallel.world or distributed.world(), self.budget_of(cfg)
        total, rows = share_batch(cfg, world)
        traced = self.trace(cfg, rows, total, cfg.eval_batch_size or rows)
        result, verdict = self._within(cfg, traced, TIGHT), "fits"
        if not result.fits:
            result, verdict = self._within(cfg, traced, 1.0), "tight"
        if not result.fits:
            verdict = "does_not_fit"
            if self.budget.device_type == "cuda":
                # 放不下也要说清楚差多少：按没有上限的情形报
                result = self._replay(cfg, traced)
        live, by_kind = traced.peak()
        on_cuda = self.budget.device_type == "cuda"
        workspace = CUBLAS_HANDLES * CUBLAS_WORKSPACE[cfg.deterministic] if on_cuda else 0
        parts = Parts(
            **by_kind, rounding=max(0, result.reserved - workspace - live), workspace=workspace,
            context=budget.context, desktop=budget.desktop,
        )
        step_s, evaluation_s = step_seconds(traced, self.rates, total), self._evaluation_s(cfg, traced) / world
        communication = None
        if world > 1:
            communication = self._communication(cfg, traced, world, step_s, -(-total // rows))
            step_s += communication.exposed_s
        span = span_of(cfg)
        steps = span.iters or math.inf
        if span.seconds:
            steps = max(1, min(steps, int(span.seconds / (step_s + evaluation_s / cfg.eval_interval))))
        return Plan(
            cfg=cfg, budget=budget, rates=self.rates, parts=parts, allocated=result.allocated,
            reserved=result.reserved, ram=traced.ram, verdict=verdict, batch_size=traced.shape.rows,
            accumulation=-(-total // traced.shape.rows), parameters=traced.parameters, size=traced.size,
            precision=str(traced.dtype).removeprefix("torch."), vocab_source=vocab_source, step_s=step_s,
            communication=communication, tokens_per_s=tokens_per_step(cfg) / step_s,
            train_s=steps * step_s + -(-steps // cfg.eval_interval) * evaluation_s, iters=steps,
        )

    def _communication(
        self, cfg: TrainConfig, traced: Trace, world: int, compute_s: float, micro_batches: int
    ) -> Communication:
        """The sums of gradients in a step that computes for compute_s."""
        last = max(phase for phase in traced.ops if phase.startswith("steady_micro"))
        parts = tuple(Gradient(*part) for part in traced.gradients)
        backward_s = BACKWARD * self.rates.seconds(traced.ops[last])
        known = Network.of(cfg.parallel, world), parts, compute_s, backward_s
        if traced.shape.shards == 1:
            return Communication(*known)
        return ShardedCommunication(
            *known, micro_batches, micro_batches if cfg.parallel.sum_gradients == "every" else 1
        )

    def _evaluation_s(self, cfg: TrainConfig, traced: Trace) -> float:
        """One evaluation, 0 where eval_tokens leaves its size to the data."""
        if cfg.eval_tokens is None:
            return 0.0
        batches = cfg.eval_tokens / (traced.shape.eval_rows * (cfg.eval_stride or cfg.model.block_size))
        return batches * self.rates.seconds(traced.ops["evaluate"])


def parallels(cfg: TrainConfig) -> list[ParallelConfig]:
    """What parallel= may be, the fastest first: with auto the whole model in each process, or rows of everything."""
    parallel = cfg.parallel
    if parallel.mode != "auto":
        return [parallel]
    several = (parallel.world or distributed.world()) > 1
    sums = dict.fromkeys([parallel.sum_gradients, "every"] if several and not not_sharded(cfg) else [])
    return [replace(parallel, mode="ddp"), *(replace(parallel, mode="fsdp", sum_gradients=when) for when in sums)]


def shards_of(cfg: TrainConfig) -> int:
    """Over how many processes parameters, gradients and states are shared out; 1: each holds all of them."""
    return (cfg.parallel.world or distributed.world()) if cfg.parallel.mode == "fsdp" else 1


def step_seconds(traced: Trace, rates: Rates, rows: int) -> float:
    """One optimizer step over `rows` sequences in micro-batches of traced.shape.rows."""
    first = rates.seconds(traced.ops["steady_micro_0"])
    later = rates.seconds(traced.ops.get("steady_micro_1", Counter())) or first
    micro_batches = rows / traced.shape.rows
    # 最后一个微批可以不满：按行数折算
    update = rates.seconds(traced.ops["steady_update"])
    return first * min(1.0, micro_batches) + later * max(0.0, micro_batches - 1) + update


def predict(cfg: TrainConfig, overrides: list[str] | None = None) -> Plan:
    """What training cfg takes on the device that it names; fetches nothing, writes nothing but a CPU's measurements."""
    return Planner(cfg).predict(cfg, overrides)


def plan_for(*overrides: str) -> Plan:
    """The same for keys of conf/train.yaml as they are typed: plan_for("model=medium", "batch_size=8").

    `verdict` is fits, tight or does_not_fit; ConfigError says in one line what is wrong.
    """
    # 悄悄不理会，得到的就是别的训练的计划
    refuse_keys(overrides, ("resume", "plan"), "python_plan")
    typed = [quoted(one) for one in (*implied_dataset(list(overrides)), *overrides)]
    cfg = train_config(typed)
    check(cfg)
    return predict(cfg, typed)


def with_workspace(cfg: TrainConfig, traced: Trace) -> Iterator[tuple[int, int]]:
    """The trace's events behind the allocations of cuBLAS, which come with the first product and stay."""
    each = CUBLAS_WORKSPACE[cfg.deterministic]
    set_up = traced.events["set_up"]
    rest = traced.timeline()
    # 工作区在第一次乘积时才申请，排在权重之后；负的编号不会与 storage 的相撞
    for _ in set_up:
        next(rest)
    return chain(set_up, ((-1 - n, each) for n in range(CUBLAS_HANDLES)), rest)
