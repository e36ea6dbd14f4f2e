# 训练的计算：走一步、评一次；取数、累积、显存不足时减半重来、各进程合起来，都在这里
# 什么时候评估、打印、保存、停下，由 run/loop 决定：它继承 Trainer，只在 prepare 与 judge 两处插话
# 一批的路：step() -> data.rows -> Step.micro_batch（前向、反向）-> Step.finish（裁剪、更新）
"""Trainer: step computes, evaluate measures."""

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from nanogpt.base.config import Schedule
from nanogpt.base.errors import OutOfMemory, is_out_of_memory, not_divisible, release
from nanogpt.core import distributed
from nanogpt.core.machine import has_float64, on_device
from nanogpt.core.progress import Progress, StepResult
from nanogpt.core.schedule import learning_rate_at
from nanogpt.core.step import Step
from nanogpt.data.tokens import ORDER, TokenData

# torch 的种子是 64 位有符号整数：合法的大种子乘出来会超过它
LARGEST_SEED = 2**63


class Trainer:
    """Trains one model on one data set in one process (of several under torchrun)."""

    def __init__(
        self, computation: Step, data: TokenData, *, schedule: Schedule, seed: int, rows: int,
        micro_batch: int | None = None, eval_batch: int | None = None, eval_tokens: int | None = None,
        grad_clip: float = 0.0, progress: Progress | None = None, order: int = ORDER,
    ):
        """rows: sequences per step, all processes together; eval_tokens: of the validation part, None for all.

        progress and order: where a training that goes on stands, and which order its data has.
        """
        self.computation = computation
        self.model, self.optimizer, self.precision = computation.model, computation.optimizer, computation.precision
        self.parameters = computation.parameters
        self.device = self.parameters[0].device
        self.data, self.order = data, order
        self.schedule, self.seed, self.limit = schedule, seed, grad_clip or math.inf
        self.global_rows, self.mine = rows, distributed.share(rows)
        self.local_rows = self.mine.stop - self.mine.start
        self.micro_batch = micro_batch or self.local_rows
        self.gradients = computation.sums or distributed.GradientSum(self.parameters)
        self.eval_batch = eval_batch or self.micro_batch
        self.block_size = self.model.config.block_size
        self.windows = data.val_windows(self.block_size, eval_tokens)
        self.progress = progress or Progress()
        self.spent = 0.0
        """Share of the budget that is used up, where the schedule goes by it; whoever drives the steps keeps it."""
        self.stop_requested = False
        # 显卡上由设备自己决定跳不跳过，数值晚一步再看：主机不必每步停下来等它
        self.reads_late = self.device.type == "cuda" and computation.decides_on_device
        self.prepared, self.expected_rows = False, 0

    def prepare(self) -> None:
        """Allocate the optimizer's states, behind a restore and before the first step."""
        with not_divisible("update", rows=self.micro_batch):
            self.computation.prepare()
        self.prepared = True

    def judge(self, result: StepResult) -> None:
        """Called with each step before it is counted."""

    def step(self) -> StepResult:
        """One optimizer step on the next global_rows sequences; skipped when it is not finite.

        A step that runs out of memory is repeated with half the micro-batch on the same data.
        """
        if not self.prepared:
            self.prepare()
        progress = self.progress
        rate = learning_rate_at(progress.iteration, self.schedule, self.spent)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        starts = self.data.starts(self.seed, progress.samples_seen, self.global_rows, self.block_size, order=self.order)
        # 装箱的行填得有多有少：每行按它的目标数计权，切成多少微批、几个进程，梯度都相同
        targets = self.data.targets(starts, self.block_size)
        while True:
            loss, detail = self._accumulate(starts[self.mine], targets[self.mine], int(targets.sum()))
            with not_divisible("sum", rows=self.micro_batch):
                # 各进程的求和必须步调一致：一个进程失败，谁也不能单独重做
                self.gradients.finish(failed=detail is not None)
                loss, (failed, stop) = distributed.agree(loss, [detail is not None, self.stop_requested])
            if not failed:
                break
            self.shrink(detail or "")
        # 更新到一半停下的参数退不回去：不能重做，已存的 checkpoint 还在
        with not_divisible("update", rows=self.micro_batch):
            reading, healing = self.computation.finish(loss, self.limit, late=self.reads_late)
        result = StepResult(progress.iteration + 1, reading, rate, stop, healing)
        self.judge(result)
        progress.iteration += 1
        progress.samples_seen += self.global_rows
        progress.tokens_trained += self.global_rows * self.block_size
        return result

    def _accumulate(self, starts: np.ndarray, targets: np.ndarray, total: int) -> tuple[torch.Tensor, str | None]:
        """Accumulate gradients over rows `starts` with so many targets each, of `total` in the step.

        Returns this process's share of the mean loss, shape (), and what was said where memory ran out, else None.
        """
        try:
            if self.expected_rows != self.micro_batch:
                # 在能减半的地方做：它自己也要跑一个 block 的前向，也会显存不足
                self.computation.expect(self.micro_batch)
                self.expected_rows = self.micro_batch
            # 每步由 (seed, iteration, rank) 重新播种：续训、重做都得到同样的 dropout，不必保存随机状态
            seed = (self.seed * 1_000_003 + self.progress.iteration) * 1009 + distributed.rank()
            torch.manual_seed(seed % LARGEST_SEED)
            self.model.train()
            loss = torch.zeros((), device=self.device)
            for first in range(0, len(starts), self.micro_batch):
                rows = slice(first, first + self.micro_batch)
                x, y = self.to_device(*self.data.rows("train", starts[rows], self.block_size))
                if rows.stop >= len(starts):
                    self.gradients.begin()
                loss += self.computation.micro_batch(x, y, float(targets[rows].sum() / total))
            return loss, None
        except Exception as error:
            # 只接住显存不足，其余原样抛出
            if not is_out_of_memory(error):
                raise
            detail = str(error)
        # 出了 except 才清理：异常对象的 traceback 还引用着那些张量
        self.computation.drop_gradients()
        release(self.device)
        return torch.zeros((), device=self.device), detail

    def shrink(self, detail: str) -> None:
        """Halve the micro-batch after an out-of-memory error that said `detail`, or give up at one row."""
        # 别的进程失败时，这里没有失败，但也要从头来
        self.computation.drop_gradients()
        # 反向里已更新过的参数退不回去，没更新过也不能分几次累积
        if self.micro_batch == 1 or self.computation.in_backward:
            raise OutOfMemory("forward", rows=self.micro_batch, detail=detail)
        self.micro_batch = (self.micro_batch + 1) // 2

    def to_device(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows (B, T) where the model is."""
        # 异步拷贝：与上一个微批的反向重叠
        return [on_device(t, self.device) for t in rows]

    # ---- 评估 ----

    @torch.no_grad()
    def evaluate(self, told: Callable[[int], None] = lambda rows: None) -> float:
        """Mean cross-entropy over the fixed validation windows; batches shrink where memory runs out.

        told(rows) is called when a batch of so many of this process's windows is done.
        """
        self.model.eval()
        by_length = defaultdict(list)
        for start, length in self.windows[distributed.rank() :: distributed.world()]:
            # 末尾的窗口可能短一截：同样长的才能拼成一批
            by_length[length].append(start)
        sums = torch.zeros(2, dtype=torch.float64, device=self._sums_on())
        for length, starts in by_length.items():
            sums += self._sums(starts, length, told)
        loss_sum, count = self.gradients.evaluated(sums, self.windows, self.eval_batch).tolist()
        return loss_sum / count

    def _sums_on(self) -> torch.device:
        """Where losses are added up in float64."""
        # 没有 float64 的设备（MPS）上，每批取回两个数，在主机上加
        return self.device if has_float64(self.device) else torch.device("cpu")

    def _sums(self, starts: list[int], length: int, told: Callable[[int], None]) -> torch.Tensor:
        """(sum of losses, number of targets) of windows of one length, in batches of self.eval_batch or fewer."""
        # 累加留在设备上：每批取回一次，GPU 就要停一次
        where = self._sums_on()
        total = torch.zeros(2, dtype=torch.float64, device=where)
        again = False
        while starts:
            batch, said = np.array(starts[: self.eval_batch]), None
            try:
                x, y = self.to_device(*self.data.rows("val", batch, length))
                with self.precision.context():
                    loss = self.model.loss(x, y)
                # 标签与行尾的空位（-1）不算
                count, loss = (y >= 0).sum().to(where).double(), loss.to(where).double()
                total += torch.stack((loss * count, count))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error)
            if said is None:
                told(len(batch))
                starts, again = starts[len(batch) :], False
                continue
            release(self.device)
            if len(batch) > 1:
                self.eval_batch = (len(batch) + 1) // 2
            elif again:
                raise OutOfMemory("evaluation", rows=1, detail=said)
            else:
                # 单独一条也失败：清理之后再试一次，可能只是碎片
                again = True
        return total
