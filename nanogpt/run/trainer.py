"""Trainer: step computes, evaluate measures, fit decides when; nothing here knows Hydra."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nanogpt.base.config import TrainConfig, schedule_of
from nanogpt.base.console import Console
from nanogpt.base.errors import OutOfMemory, is_out_of_memory, not_divisible, release
from nanogpt.base.hardware import peak_tflops_of, reference
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.base.value_checks import unescaped
from nanogpt.core import distributed, evaluation
from nanogpt.core.compilation import compile_hidden, compile_updates, pays
from nanogpt.core.machine import any_kernels
from nanogpt.core.optimizers import learning_rate_at
from nanogpt.core.precision import settle_scale
from nanogpt.core.sampling import sampler
from nanogpt.core.step import Reading, Step
from nanogpt.data.tokens import ORDER, TokenData
from nanogpt.run import saving
from nanogpt.run.health import Health
from nanogpt.run.loggers import Loggers
from nanogpt.run.metrics import Stopwatch, memory_gib, peak_tflops
from nanogpt.run.saving import Progress
from nanogpt.run.summary import write_summary
from nanogpt.weights import checkpoint

# 评估取样、生成样本各用自己的种子流，互不干扰
SAMPLE_STREAM = 1_000_003
# torch 的种子是 64 位有符号整数：合法的大种子乘出来会超过它
LARGEST_SEED = 2**63


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; a card may still be computing loss and gradient_norm, and asking for one waits for it."""

    iteration: int
    """1 for the first."""
    reading: Reading
    learning_rate: float
    stop_requested: bool
    healing: bool = False
    """Whether an fp16 overflow has lowered the loss scale."""

    @property
    def loss(self) -> float:
        """Mean over the effective batch, nats per token."""
        return self.reading.read()[0]

    @property
    def gradient_norm(self) -> float:
        """Before clipping."""
        return self.reading.read()[1]


@dataclass
class Interval:
    """What the next log line is about."""

    results: list[StepResult] = field(default_factory=list)
    tokens: int = 0
    """Of the steps that were timed."""


class Trainer:
    """Trains one model on one data set in one process (of several under torchrun)."""

    def __init__(
        self, cfg: TrainConfig, *, computation: Step, data: TokenData, device: torch.device, loggers: Loggers, run_dir: Path, console: Console,
        write_sample: Callable[..., str] | None = None,
    ):
        """`write_sample` is that of nanogpt.write.engine; without it no samples are written."""
        self.cfg = cfg
        self.computation = computation
        self.model, self.optimizer, self.precision = computation.model, computation.optimizer, computation.precision
        self.data = data
        self.device = device
        self.loggers = loggers
        self.run_dir = run_dir
        self.console = console
        # 写作在训练之上：由 run_train.py 交进来
        self.write_sample = write_sample
        self.config_text = ""
        self.run_id: str | None = None
        # 说“接着训”时写给人敲的
        self.resuming = f"resume={run_dir}"
        self.retry_at: float | None = None
        self.evaluated_at: int | None = None
        self.schedule = schedule_of(cfg)
        self.parameters = computation.parameters
        self.progress = Progress()
        self.order = ORDER
        self.block_size = self.model.config.block_size
        self.local_rows, self.micro_batch = share_batch(cfg, distributed.world())
        self.eval_batch = cfg.eval_batch_size or self.micro_batch
        self.windows = data.val_windows(self.block_size, cfg.eval_tokens)
        self.stop_requested = False
        self.prepared = False
        self.peak_source, self.peak = peak_tflops(cfg.hardware, device, self.precision)
        self.stopwatch = Stopwatch()
        self.interval = Interval()
        self.unjudged: StepResult | None = None
        # 显卡上由设备自己决定跳不跳过，数值晚一步再看：主机不必每步停下来等它
        self.reads_late = device.type == "cuda" and computation.decides_on_device
        self.shapes_met: set[int] = set()
        self.saved: checkpoint.Checkpoint | None = None
        self.last_sample = ""
        self.health = Health(self)
        self.expected_rows: int | None = None
        self.compiles = compile_hidden(self.model, cfg.compile, device, console, obstacle=self._no_compile(), pays=self._compiling_pays())
        compile_updates(self.optimizer, cfg.compile, device, console)

    def _no_compile(self) -> str | None:
        """What speaks against torch.compile in these settings, or None."""
        # 编译后的反向一次交出全部梯度，逐个释放就落空了
        if self.computation.in_backward:
            return "memory.optimizer_in_backward=true"
        # 重算时再舍入靠 TorchFunctionMode，编译器不认
        if self.precision.rounded and self.cfg.memory.activation_checkpointing != "none":
            return f"precision={self.precision.name} on a CPU with memory.activation_checkpointing={self.cfg.memory.activation_checkpointing}"
        return None

    def _compiling_pays(self) -> bool:
        # 每次试跑都是新进程，编译比要量的几步还久
        if self.cfg.trial.enabled:
            return False
        micro_batches = math.ceil(self.local_rows / self.micro_batch)
        return pays(self.model, self.local_rows * self.block_size, micro_batches, self.cfg.max_iters, self.peak)

    # ---- 一步 ----

    @property
    def global_rows(self) -> int:
        """Sequences per optimizer step, all processes together."""
        return self.local_rows * distributed.world()

    def step(self) -> StepResult:
        """One optimizer step on the next global_rows sequences; skipped when it is not finite.

        A step that runs out of memory is repeated with half the micro-batch on the same data.
        """
        self._prepare()
        rate = learning_rate_at(self.progress.iteration, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        starts = self.data.starts(self.cfg.seed, self.progress.samples_seen, self.global_rows, self.block_size, order=self.order)
        targets = self.data.targets(starts, self.block_size)
        # 装箱的行填得有多有少：每行按它的目标数计权，切成多少微批、几个进程，梯度都相同
        mine = slice(distributed.rank() * self.local_rows, (distributed.rank() + 1) * self.local_rows)
        loss, stop = self._accumulate_until_it_fits(starts[mine], targets[mine], int(targets.sum()))
        # 各进程的求和必须步调一致：一个进程失败，谁也不能单独重做
        with not_divisible("sum", rows=self.micro_batch):
            distributed.sum_gradients(self.parameters)
        # 更新到一半停下的参数退不回去：不能重做，已存的 checkpoint 还在
        with not_divisible("update", rows=self.micro_batch):
            reading, healing = self._update(loss)
        result = StepResult(self.progress.iteration + 1, reading, rate, stop, healing)
        self._judge(result)
        self.progress.iteration += 1
        self.progress.samples_seen += self.global_rows
        self.progress.tokens_trained += self.global_rows * self.block_size
        return result

    def _judge(self, result: StepResult) -> None:
        """Count a step that was skipped, stop a run that has come to nothing; on a card one step later, or at settle()."""
        self.settle()
        self.unjudged = result
        if not self.reads_late:
            self.settle()

    def settle(self) -> None:
        """Wait for the latest step and judge it: before anything that is shown or kept."""
        result, self.unjudged = self.unjudged, None
        if result is not None:
            self.health.after_update(result.loss, result.gradient_norm, iteration=result.iteration, healing=result.healing)

    def _prepare(self) -> None:
        """Allocate the optimizer's states once, behind a restore and before the first step."""
        if self.prepared:
            return
        self.health.before_start()
        with not_divisible("update", rows=self.micro_batch):
            self.computation.prepare()
        self.prepared = True

    def _accumulate_until_it_fits(self, starts: np.ndarray, targets: np.ndarray, total: int) -> tuple[torch.Tensor, bool]:
        """Accumulate gradients over rows `starts` with so many targets each, of `total` in the step.

        Returns (mean loss over all processes, shape (); stop requested anywhere).
        """
        while True:
            failed, detail = False, ""
            try:
                loss = self._accumulate(starts, targets, total)
            except Exception as error:
                # 只接住显存不足，其余原样抛出
                if not is_out_of_memory(error):
                    raise
                failed, detail = True, str(error)
            if failed:
                # 出了 except 才清理：异常对象的 traceback 还引用着那些张量
                self._drop_gradients()
                release(self.device)
                loss = torch.zeros((), device=self.device)
            loss = distributed.total(loss.detach().clone())
            failed, stop = (bool(flag) for flag in distributed.largest([failed, self.stop_requested], self.device))
            if not failed:
                return loss, stop
            self._shrink(detail)

    def _accumulate(self, starts: np.ndarray, targets: np.ndarray, total: int) -> torch.Tensor:
        """Forward and backward over all rows in micro-batches; return this process's share of the mean loss."""
        if self.expected_rows != self.micro_batch:
            # 在能减半的地方做：它自己也要跑一个 block 的前向，也会显存不足
            self.computation.expect(self.micro_batch)
            self.expected_rows = self.micro_batch
        # 每步由 (seed, iteration, rank) 重新播种：续训、重做都得到同样的 dropout，不必保存随机状态
        torch.manual_seed(((self.cfg.seed * 1_000_003 + self.progress.iteration) * 1009 + distributed.rank()) % LARGEST_SEED)
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for first in range(0, len(starts), self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            x, y = self.to_device(*self.data.rows("train", starts[rows], self.block_size))
            loss += self.computation.micro_batch(x, y, float(targets[rows].sum() / total))
        return loss

    def _shrink(self, detail: str) -> None:
        """Halve the micro-batch after an out-of-memory error, or give up at one row; `detail` is what the library said."""
        # 别的进程失败时，这里没有失败，但也要从头来
        self._drop_gradients()
        # 反向里已更新过的参数退不回去，没更新过也不能分几次累积
        if self.micro_batch == 1 or self.computation.in_backward:
            raise OutOfMemory("forward", rows=self.micro_batch, detail=detail)
        old, self.micro_batch = self.micro_batch, (self.micro_batch + 1) // 2
        accumulation = math.ceil(self.local_rows / self.micro_batch) * distributed.world()
        self.console.line(
            "iter {iteration}: out of memory; micro-batch {old} -> {new}, accumulation {accum}, same step again with "
            "the same data",
            iteration=self.progress.iteration + 1, old=old, new=self.micro_batch, accum=accumulation,
        )

    def _drop_gradients(self) -> None:
        # 不靠优化器：它可能只管一部分参数，剩下的半份梯度会混进下一步
        for p in self.parameters:
            p.grad = None

    def _update(self, loss: torch.Tensor) -> tuple[Reading, bool]:
        """Clip and apply the gradients unless something is not finite; return (loss, norm before clipping), and whether fp16 has healed itself."""
        scaler, limit = self.precision.scaler, self.cfg.grad_clip or math.inf
        # 先还原再裁剪，否则阈值会被 loss scale 放大
        if scaler.is_enabled():
            scaler.unscale_(self.optimizer)
        norm = self.computation.gradient_norm()
        reading = Reading(loss, norm)
        healing = False
        if self.reads_late:
            self.computation.update_if_finite(loss, norm, limit)
        else:
            healing = self._update_if_read_finite(reading, norm, limit)
        self._drop_gradients()
        return reading, healing

    def _update_if_read_finite(self, reading: Reading, norm: torch.Tensor, limit: float) -> bool:
        """The same decided by the host; returns whether an fp16 overflow has lowered the loss scale."""
        scaler = self.precision.scaler
        loss_is_finite, norm_is_finite = map(math.isfinite, reading.read())
        finite = loss_is_finite and norm_is_finite
        if finite and reading.read()[1] > limit:
            # 没超过阈值就不必把全部梯度再读写一遍
            self.computation.clip(norm, limit)
        if finite:
            # 范数有限，梯度就没有溢出：不必让 scaler.step 再问一次设备
            self.computation.update()
        if not scaler.is_enabled():
            return False
        # 梯度溢出是 fp16 的日常：跳过这一步并减半 scale，下一步就好了
        return settle_scale(scaler, skipped=not finite, overflow=not norm_is_finite) and loss_is_finite

    def to_device(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows x, y (B, T) where the model is."""
        if self.device.type == "cpu":
            return x, y
        # 锁页内存加异步拷贝：与上一个微批的反向重叠
        return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))

    # ---- 评估 ----

    def evaluate(self) -> float:
        """Mean cross-entropy over the fixed validation windows."""
        return evaluation.mean_loss(self)

    # ---- 整个训练 ----

    def fit(self) -> dict:
        """Train to max_iters or until something asks to stop; return the summary."""
        started = time.perf_counter()
        try:
            reason = self._train()
            if self.saved is None or self.saved.iteration < self.progress.iteration:
                self._save(final=True)
        except BaseException:
            # 出事前的曲线最有用，TensorBoard 攒着的也要写出；关不上也不能盖住真正的原因
            with contextlib.suppress(Exception):
                self.loggers.close()
            raise
        self.loggers.close()
        return write_summary(self, reason or "finished", time.perf_counter() - started)

    def _train(self) -> str | None:
        """Steps, and what is due after each; returns why it stopped early, or None."""
        reason = None
        with self.console.progress(self.cfg.max_iters, self.progress.iteration) as advance:
            while self.progress.iteration < self.cfg.max_iters and reason is None:
                # 能分小的都分过了：还有别处的内存不足，也是一种结局
                with not_divisible("training", rows=self.micro_batch):
                    result = self._timed_step()
                    advance(self.progress.iteration)
                    reason = self._after_step(result)
        return reason

    def _timed_step(self) -> StepResult:
        self.stopwatch.start()
        result = self.step()
        self.interval.results.append(result)
        tokens = self.global_rows * self.block_size
        if self._is_first_of_its_shape():
            # 编译、加载 kernel 要几十秒：算进速度，短训练就只剩零头；要等它做完，才不拖到下一步里
            self.settle()
            self.stopwatch.cancel()
            self.progress.untimed_tokens += tokens
        else:
            if self._due():
                self.settle()
            self.stopwatch.stop()
            self.interval.tokens += tokens
        return result

    def _is_first_of_its_shape(self) -> bool:
        """Whether the step just taken was the first with its micro-batch where that costs time: on a card, and compiled."""
        known = self.micro_batch in self.shapes_met
        self.shapes_met.add(self.micro_batch)
        return not known and (self.device.type == "cuda" or self.compiles)

    def _due(self) -> bool:
        """Whether the latest step is followed by something that shows or keeps what it came to."""
        cfg, iteration = self.cfg, self.progress.iteration
        intervals = (cfg.eval_interval, cfg.log_interval, cfg.save_interval)
        return iteration == cfg.max_iters or any(every and iteration % every == 0 for every in intervals)

    def _after_step(self, result: StepResult) -> str | None:
        """Evaluate, log, sample and save as due; return why to stop, or None."""
        cfg, iteration = self.cfg, self.progress.iteration
        last = iteration == cfg.max_iters
        evaluated = iteration % cfg.eval_interval == 0 or last
        reason = "interrupted" if result.stop_requested else None
        if evaluated and not reason:
            reason = self._evaluate_and_judge()
            # 开始时机器忙，峰值可能偏低：不计时的间隙里再量，只升不降
            self.peak_source, self.peak = peak_tflops(self.cfg.hardware, self.device, self.precision)
        if iteration % cfg.log_interval == 0 or evaluated or reason:
            self._log(result, evaluated and self.progress.val_loss is not None)
        save_due = iteration % cfg.save_interval == 0 if cfg.save_interval else evaluated
        if save_due or reason or saving.overdue(self):
            self._save(final=bool(reason) or last)
        if evaluated and cfg.sample_tokens and self.write_sample and reason != "interrupted":
            self._write_sample()
        return reason

    def _save(self, *, final: bool) -> None:
        # 最后一步的好坏也要记进去
        self.settle()
        # 坏掉的权重宁可不存：它会把完好的旧 checkpoint 挤掉
        self.health.before_save()
        saving.save(self, final=final)

    def _evaluate_and_judge(self) -> str | None:
        progress, loss = self.progress, self.evaluate()
        if not self.health.after_evaluation(loss):
            # 这份 checkpoint 没有验证损失，就不会被当成最好的
            progress.val_loss = None
            return None
        progress.val_loss, self.evaluated_at = loss, progress.iteration
        if progress.val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.evals_without_gain = progress.val_loss, 0
        else:
            progress.evals_without_gain += 1
        if self.cfg.target_val_loss is not None and progress.val_loss <= self.cfg.target_val_loss:
            self.console.line("target_reached", loss=progress.val_loss, target=self.cfg.target_val_loss)
            return "target_reached"
        if self.cfg.early_stop_evals and progress.evals_without_gain >= self.cfg.early_stop_evals:
            self.console.line("early_stop", count=progress.evals_without_gain)
            return "early_stop"
        return None

    def metrics(self, tokens: int, seconds: float) -> dict[str, float]:
        """Speed, utilisation and memory of `tokens` trained in `seconds`."""
        speed = tokens / seconds if seconds else 0.0
        flops = speed * self.model.flops_per_token() / distributed.world()
        of_reference = peak_tflops_of(reference(), half=self.precision.half, tf32=False)
        memory = {f"memory/{name}_gib": value for name, value in memory_gib(self.device).items()}
        return {"tokens_per_s": speed, "mfu": flops / self.peak / 1e12, "mfu_rtx3060": flops / of_reference / 1e12, **memory}

    def _log(self, result: StepResult, evaluated: bool) -> None:
        seconds = self.stopwatch.take()
        self.progress.train_s += seconds
        self.settle()
        finite = [result.loss for result in self.interval.results if math.isfinite(result.loss)]
        record = {
            "train/loss": sum(finite) / len(finite) if finite else math.nan,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "tokens": self.progress.tokens_trained,
            **self.metrics(self.interval.tokens, seconds),
        }
        if not self.interval.tokens:
            # 这一段只有编译的那一步：没有速度可言
            del record["tokens_per_s"], record["mfu"], record["mfu_rtx3060"]
        if evaluated:
            record["val/loss"] = self.progress.val_loss
        if self.precision.scaler.is_enabled():
            record["loss_scale"] = self.precision.scaler.get_scale()
        self.interval = Interval()
        # NaN 不是合法的 JSON，也画不成曲线
        self.loggers.log(self.progress.iteration, {k: v for k, v in record.items() if math.isfinite(v)})
        self.console.iteration(self.progress.iteration, record, self.device.type)

    def _write_sample(self) -> None:
        if distributed.rank():
            return
        try:
            seed = (self.cfg.seed * SAMPLE_STREAM + self.progress.iteration) % LARGEST_SEED
            # 按累积概率抽字没有确定性的 kernel；样本写成怎样不影响训练
            with any_kernels():
                sample = self.write_sample(
                    self.model, self.data.tokenizer, self.sample_prompt(), self.cfg.sample_tokens,
                    sampler=sampler(temperature=self.cfg.sample_temperature), seed=seed,
                )
        except Exception as error:
            # 样本只是给人看的：无论为什么写不成，训练照常
            known = {"sample_oom": "sample_skipped", "nonfinite_logits": "sample_nonfinite"}
            line = "sample_skipped" if is_out_of_memory(error) else known.get(getattr(error, "message", None), "sample_failed")
            self.console.line(line, iteration=self.progress.iteration, reason=reason_of(error))
            return
        self.last_sample = sample
        self.loggers.text(self.progress.iteration, sample)

    def sample_prompt(self) -> str | None:
        """The configured prompt; None: the one with which writing begins."""
        given = self.cfg.sample_prompt
        return None if given is None else unescaped(given)


def share_batch(cfg: TrainConfig, world: int) -> tuple[int, int]:
    """(rows per process and step, rows per micro-batch) for the same effective batch with any number of processes."""
    if cfg.memory.optimizer_in_backward and world > 1:
        raise ConfigError(
            "memory.optimizer_in_backward=true uses each gradient before {world} processes could add them up; start "
            "one process, or memory.optimizer_in_backward=false",
            world=world,
        )
    batch, accumulation = cfg.batch_size, cfg.gradient_accumulation_steps
    if total := cfg.global_batch_size:
        if total % world:
            raise ConfigError(
                "batch_size={batch} x gradient_accumulation_steps={accum} cannot be shared by {world} processes; make "
                "one of them a multiple of {world}",
                batch=total, accum=1, world=world,
            )
        # 除不尽也没关系：最后一个微批短一些，等效批量仍然精确
        return total // world, min(batch, total // world)
    if accumulation % world == 0:
        return batch * accumulation // world, batch
    if batch % world == 0:
        # 累积次数分不开就把微批分开，等效批量不变
        return batch * accumulation // world, batch // world
    raise ConfigError(
        "batch_size={batch} x gradient_accumulation_steps={accum} cannot be shared by {world} processes; make one of "
        "them a multiple of {world}",
        batch=batch, accum=accumulation, world=world,
    )
