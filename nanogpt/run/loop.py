"""The training loop: one function that steps, evaluates, logs, saves, samples and stops."""

# 训练循环：什么时候走步、评估、打印、保存、写样本、停下；怎么算一步在 core/trainer
# fit() 里就是整个循环；每一项到期才做，做之前先等显卡把最近一步的数交出来（judge_latest）
# 坏步由 health 计数，checkpoint 由 saver 写，总结由 summary 写；写样本的函数由 run_train.py 交进来
# session 造出 Training 并调用 fit；试跑用它的子类 TrialTrainer，只走其中的步

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanogpt.base.config import MANY, TrainConfig, effective_batch, schedule_of, span_of
from nanogpt.base.console import Console, duration
from nanogpt.base.errors import is_out_of_memory, not_divisible
from nanogpt.base.hardware import allocator_cap, device_memory, peak_tflops_of, reference
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, text
from nanogpt.base.quoting import command
from nanogpt.base.value_checks import unescaped
from nanogpt.core import distributed
from nanogpt.core.compilation import compile_hidden, compile_updates, launch_bound, pays, use_loops
from nanogpt.core.machine import any_kernels
from nanogpt.core.ngrams import table_count
from nanogpt.core.progress import Progress, StepResult
from nanogpt.core.recorded import use_graphs
from nanogpt.core.sampling import sampler
from nanogpt.core.step import Step
from nanogpt.core.trainer import LARGEST_SEED, Trainer
from nanogpt.data.tokens import ORDER, TokenData
from nanogpt.run.health import Health
from nanogpt.run.loggers import Loggers
from nanogpt.run.metrics import Forecast, Stopwatch, flops_per_token, memory_gib, peak_tflops
from nanogpt.run.regularize import has_risen, past_turn
from nanogpt.run.saving import Saver, state_of
from nanogpt.run.summary import write_summary

# 评估取样、生成样本各用自己的种子流，互不干扰
SAMPLE_STREAM = 1_000_003
# 没有进度条时，要停这么久（秒）的评估先说一声；一行的前向约是一整步的三分之一
LONG_S, FORWARD = 30, 1 / 3
# 没有进度条时，走了这么多步就说一次还要多久；这么快（秒）就完的不必说
FEW, SHORT_S = 5, 60
# 连着这么多次评估没有变好，就说验证损失已经掉头；一两次多半只是起伏
TURNED = 3


@dataclass
class Interval:
    """What the next log line is about."""

    # 一行日志说的是一段，不是一步：中间各步的损失都算进平均
    results: list[StepResult] = field(default_factory=list)
    tokens: int = 0
    """Of the steps that were timed."""
    seconds: float = 0.0
    """Of the same steps."""


class _ToldToEndError(Exception):
    """Ends an evaluation halfway."""

    # 只在这个文件里：评估会走好几分钟，被叫停时不能等它


class Training(Trainer):
    """A Trainer with a run around it: its saver, its console and loggers, its health."""

    # 继承而不是另拿一个 trainer：走一步的两处插话（prepare、judge）要在计数之前发生

    def __init__(
        self, cfg: TrainConfig, *, computation: Step, data: TokenData, loggers: Loggers, saver: Saver,
        console: Console, write_sample: Callable[..., str] | None = None, progress: Progress | None = None,
        order: int = ORDER,
    ):
        """`write_sample` is that of nanogpt.write.engine; without it no samples are written."""
        _, micro_batch = share_batch(cfg, distributed.world())
        at = progress or Progress()
        self.span = span_of(cfg, at.iteration, at.tokens_trained)
        super().__init__(
            computation, data, schedule=schedule_of(cfg, self.span), seed=cfg.seed, rows=effective_batch(cfg),
            micro_batch=micro_batch, eval_batch=cfg.eval_batch_size, eval_tokens=cfg.eval_tokens,
            grad_clip=cfg.grad_clip, progress=at, order=order,
        )
        self.cfg, self.loggers, self.saver, self.console = cfg, loggers, saver, console
        # 写作在训练之上：由 run_train.py 交进来
        self.write_sample = write_sample
        self.evaluated_at: int | None = None
        self.last_sample = ""
        self.peak_source, self.peak = peak_tflops(cfg.hardware, self.device, self.precision)
        self.stopwatch, self.interval = Stopwatch(), Interval()
        work = FORWARD * len(self.windows) / self.global_rows
        self.forecast = Forecast(self.span.iters or MANY, cfg.eval_interval, cfg.save_interval, work)
        self.latest_loss = math.nan
        self.told_turned = False
        self.ended: str | None = None
        """Why the training that is gone on with had stopped for good; None: it goes on."""
        self.unjudged: StepResult | None = None
        self.shapes_met: set[int] = set()
        self.health = Health(
            self.model, self.optimizer, self.progress, max_nonfinite_steps=cfg.max_nonfinite_steps, say=console.line,
            partial_updates=bool(computation.in_backward),
            remedy=lambda best: saver.remedy(cfg.learning_rate / 3, best=best),
        )
        obstacle, worth = self._no_compile(), self._compiling_pays()
        self.compiles = compile_hidden(self.model, cfg.compile, self.device, console, obstacle=obstacle, pays=worth)
        compile_updates(self.optimizer, cfg.compile, self.device, console)
        # 试跑只有几步
        length = {"steps": self.span.iters or math.inf, "seconds": self.span.seconds or math.inf}
        self.loops = not cfg.trial.enabled and use_loops(
            computation, cfg.compile, self.device, console, compiled=self.compiles, **length
        )
        use_graphs(computation, console, capacity=self._room_for_graphs())

    def _no_compile(self) -> str | None:
        """What speaks against torch.compile in these settings, or None."""
        # 编译后的反向一次交出全部梯度，逐个释放就落空了
        if self.computation.in_backward:
            return "memory.optimizer_in_backward=true"
        if self.computation.sums:
            return "parallel=fsdp"
        # 重算时再舍入靠 TorchFunctionMode，编译器不认
        if self.precision.rounded and self.cfg.memory.activation_checkpointing != "none":
            kept = f"memory.activation_checkpointing={self.cfg.memory.activation_checkpointing}"
            return f"precision={self.precision.name} on a CPU with {kept}"
        return None

    def _compiling_pays(self) -> bool:
        # 每次试跑都是新进程，编译比要量的几步还久
        if self.cfg.trial.enabled:
            return False
        micro_batches = math.ceil(self.local_rows / self.micro_batch)
        flops = flops_per_token(self.model)
        tokens, layers = self.local_rows * self.block_size, self.model.config.n_layer
        steps, seconds = self.span.iters or math.inf, self.span.seconds or math.inf
        return pays(layers, flops, tokens, micro_batches, steps, self.peak, seconds)

    def _room_for_graphs(self) -> int | None:
        """Bytes of the card that are this process's, where steps recorded as CUDA graphs would be faster; else None."""
        cfg = self.cfg
        # 重算要存、取随机数的状态，录不进去
        wanted = cfg.compile.lower() != "false" and cfg.memory.activation_checkpointing == "none"
        if self.device.type != "cuda" or not wanted:
            return None
        tokens = self.micro_batch * self.block_size
        if not launch_bound(self.model.config.n_layer, flops_per_token(self.model), tokens, self.peak):
            return None
        room, cap = device_memory(self.device)[0] + torch.cuda.memory_reserved(self.device), allocator_cap(cfg.hardware)
        return room if cap is None else min(cap, room)

    # ---- 一步前后 ----

    def prepare(self) -> None:
        """Allocate the optimizer's states; refuse to begin with weights or states that are not finite."""
        self.health.before_start()
        super().prepare()

    def judge(self, result: StepResult) -> None:
        """Count a skipped step and stop a run that cannot go on; on a card one step later or in judge_latest()."""
        # 显卡上晚一步才读数：马上读就要等它算完，下一步排不上队
        self.judge_latest()
        self.unjudged = result
        if not self.reads_late:
            self.judge_latest()

    def judge_latest(self) -> None:
        """Wait for the latest step and judge it: before anything that is shown or kept."""
        result, self.unjudged = self.unjudged, None
        if result is not None:
            self.latest_loss = result.loss
            self.health.after_update(
                result.loss, result.gradient_norm, iteration=result.iteration, healing=result.healing
            )

    def shrink(self, detail: str) -> None:
        """Halve the micro-batch after an out-of-memory error, and say so."""
        old = self.micro_batch
        super().shrink(detail)
        accumulation = math.ceil(self.local_rows / self.micro_batch) * distributed.world()
        self.console.line(
            "iter {iteration}: out of memory; micro-batch {old} -> {new}, accumulation {accum}, same step again with "
            "the same data",
            iteration=self.progress.iteration + 1, old=old, new=self.micro_batch, accum=accumulation,
        )

    # ---- 整个训练 ----

    def fit(self) -> dict:
        """Train to the end of the budget or until something asks to stop; return the summary."""
        progress, reason = self.progress, self.ended
        # 以前各程的时间也算：从那里接着走的钟
        self.began = time.perf_counter() - progress.wall_s
        self._count_time()
        try:
            if progress.evaluation_owed is not None and self.spent < 1 and reason is None:
                reason = self._make_up()
            with self.console.progress(*self._of_span()) as advance:
                while self.spent < 1 and reason is None:
                    # 能分小的都分过了：还有别处的内存不足，也是一种结局
                    with not_divisible("training", rows=self.micro_batch):
                        result = self._timed_step()
                        self._advance(advance)
                        reason = self._between_steps(result)
            if self.saver.saved_at < progress.iteration:
                self._save(final=True)
        except BaseException:
            # 出事前的曲线最有用，TensorBoard 攒着的也要写出；关不上也不能盖住真正的原因
            with contextlib.suppress(Exception):
                self.loggers.close()
            raise
        self.loggers.close()
        return self._summary(reason or self._end())

    def _make_up(self) -> str | None:
        """The evaluation that was due where the training was told to end, and what follows it; the reason to stop."""
        # 最好的是哪一份、何时算掉头，都看每一次评估：少一次，续训就与不间断的不同
        self.latest_loss = self.progress.evaluation_owed
        reason, iteration = self._evaluate_and_judge(), self.progress.iteration
        if self.evaluated_at == iteration:
            validation = self._validation()
            self.loggers.log(iteration, validation)
            self._show(validation)
            if reason or self.spent >= 1:
                # 到此为止：再接着训的，从这次评估之后算起
                self._save(final=True)
            else:
                # 权重没有变，还是接着训的那一份；计数随下一次保存
                self.saver.note_loss(val_loss=validation["val/loss"], val_bpb=validation.get("val/bpb"))
            if self.cfg.sample_tokens and self.write_sample:
                self._write_sample()
        return reason

    def _end(self) -> str:
        """What the summary says of a training that used up its budget."""
        key = self.span.ended_by(self.progress.iteration)
        return "finished" if key == "max_iters" else key

    def _count_time(self) -> None:
        """Read the clock of the first process, and from it the share of the budget that is used up."""
        # 各进程用同一个钟：学习率、停不停才处处一样；没有时间预算就不必为它通信
        passed = time.perf_counter() - self.began
        if self.span.seconds:
            passed, = distributed.largest([0.0 if distributed.rank() else passed], self.device)
        self.progress.wall_s = passed
        self.spent = self.span.spent(self.progress.iteration, self.progress.wall_s)

    def _of_span(self) -> tuple[int, int]:
        """(all, done) of what the bar counts: iterations, or seconds where only these are limited."""
        if self.span.iters:
            return self.span.iters, self.progress.iteration
        return round(self.span.seconds), round(self.progress.wall_s)

    def _summary(self, reason: str) -> dict:
        progress, wall_s = self.progress, self.progress.wall_s
        timed = progress.tokens_trained - progress.untimed_tokens
        # 只走了编译的那一步：速度只能连编译一起算
        measured = self.metrics(timed, progress.train_s) if timed else self.metrics(progress.tokens_trained, wall_s)
        return write_summary(
            self.saver.run_dir, progress, measured, stopped_by=reason, wall_s=wall_s, micro_batch=self.micro_batch,
            parameters=self.model.parameter_count(), table_parameters=table_count(self.model),
            precision=self.precision, device=self.device, console=self.console, bits=self.bits,
        )

    def _between_steps(self, result: StepResult) -> str | None:
        """Evaluate, log, save and sample if it is time to; the reason to stop, or None."""
        cfg, progress, began, reason = self.cfg, self.progress, time.perf_counter(), None
        last = self.spent >= 1
        evaluated = last or (self._every(cfg.eval_interval) and self._leaves_time())
        if result.stop_requested and not last:
            # 不再评估：手里的损失是上一次的，不能记在这一步上
            progress.evaluation_owed = self.latest_loss if evaluated else None
            reason, evaluated = "interrupted", False
        elif evaluated:
            reason = self._evaluate_and_judge()
        if evaluated or reason or self._every(cfg.log_interval):
            self._log(result, evaluated and progress.val_loss is not None)
        # 说好了最好的一定留着：另有保存的间隔，或者上次没存下，也不等它
        best = progress.best_iteration == progress.iteration
        save_due = self._every(cfg.save_interval) if cfg.save_interval else evaluated
        final = bool(reason) or last
        if best or final or self.saver.is_due(save_due):
            self._save(final=final)
        if evaluated and cfg.sample_tokens and self.write_sample and reason != "interrupted":
            self._write_sample()
        if evaluated or save_due:
            self.forecast.pause("evaluation" if evaluated else "save", time.perf_counter() - began)
        return reason

    def _leaves_time(self) -> bool:
        """Whether there is time for steps behind an evaluation: if not, the one at the end is enough."""
        # 评估正好用完最后的时间，学习率就降不到底
        if self.span.seconds is None:
            return True
        too_long = self.forecast.evaluation_s >= self.span.seconds - self.progress.wall_s
        return not distributed.largest([float(too_long)], self.device)[0]

    def _advance(self, advance: Callable[..., None]) -> None:
        """Move the bar to this iteration, where there is one."""
        if not self.console.live:
            return
        step_s = self.forecast.step_s
        speed = self.global_rows * self.block_size / step_s if step_s else 0.0
        note = text("loss {loss:.4f}, {speed:.0f} tok/s", loss=self.latest_loss, speed=speed)
        left = [self.forecast.left_s(self.progress.iteration)] if step_s and self.span.iters else []
        left += [self.span.seconds - self.progress.wall_s] if self.span.seconds else []
        advance(self._of_span()[1], note, min(left, default=None))

    def _say_left(self) -> None:
        """Say how long the training will take, where no bar says it and the budget is not a time."""
        if self.console.live or not self.span.iters:
            return
        iteration, wall_s = self.progress.iteration, self.progress.wall_s
        left = self.forecast.left_s(iteration)
        if SHORT_S < left < (self.span.seconds or math.inf) - wall_s:
            self.console.line(
                "about {time} to go (iterations: {iters:,}, evaluations: {evaluations:,})", time=duration(left),
                iters=self.span.iters - iteration, evaluations=self.forecast.evaluations_left(iteration),
            )

    def _every(self, interval: int | None) -> bool:
        return bool(interval) and self.progress.iteration % interval == 0

    def _timed_step(self) -> StepResult:
        """One step, timed unless it is the first with its micro-batch and that costs extra: on a card, and compiled."""
        cfg, tokens = self.cfg, self.global_rows * self.block_size
        self.stopwatch.start()
        result = self.step()
        self._count_time()
        self.interval.results.append(result)
        costs_extra = self.device.type != "cpu" or self.compiles or self.loops
        if self.micro_batch not in self.shapes_met and costs_extra:
            # 编译、加载 kernel 要几十秒：算进速度，短训练就只剩零头；要等它做完，才不拖到下一步里
            self.judge_latest()
            self.stopwatch.cancel()
            self.progress.untimed_tokens += tokens
        else:
            # 接着要显示、保存它的结果：等它做完的时间也算这一步的
            few = self.forecast.timed + 1 == FEW
            due = any(map(self._every, (cfg.eval_interval, cfg.log_interval, cfg.save_interval)))
            if self.spent >= 1 or few or due:
                self.judge_latest()
            self.forecast.step(self.stopwatch.stop())
            if few:
                self._say_left()
            self.interval.tokens += tokens
        self.shapes_met.add(self.micro_batch)
        return result

    def _save(self, *, final: bool) -> None:
        # 最后一步的好坏也要记进去；token 数存下了，走它们的时间也要
        self.judge_latest()
        self._take_time()
        # 坏掉的权重宁可不存：它会把完好的旧 checkpoint 挤掉
        self.health.before_save()
        progress = self.progress
        # 两次评估之间存的没有验证损失：最好的只能是评估过的那一份
        loss = progress.val_loss if self.evaluated_at == progress.iteration else None
        self.saver.save(
            self.model, state_of(self.computation, progress, self.data, self.order), iteration=progress.iteration,
            val_loss=loss, val_bpb=self.bits * loss if loss is not None and self.bits else None, final=final,
        )

    def _evaluate_and_judge(self) -> str | None:
        progress, loss = self.progress, self._evaluate_in_sight()
        self._count_time()
        cut_short = self._cut_short(loss)
        progress.evaluation_owed = self.latest_loss if cut_short else None
        if cut_short:
            progress.val_loss = None
            return "interrupted"
        # 开始时机器忙，峰值可能偏低：不计时的间隙里再量，只升不降
        self.peak_source, self.peak = peak_tflops(self.cfg.hardware, self.device, self.precision)
        if not self.health.after_evaluation(loss):
            # 这份 checkpoint 没有验证损失，就不会被当成最好的
            progress.val_loss = None
            return None
        progress.val_loss, self.evaluated_at = loss, progress.iteration
        if progress.val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_iteration = progress.val_loss, progress.iteration
            progress.evals_without_gain = progress.evals_risen = 0
        else:
            progress.evals_without_gain += 1
            risen = has_risen(loss, progress.best_val_loss, self.latest_loss, self.data.val_targets(self.windows))
            progress.evals_risen = progress.evals_risen + 1 if risen else 0
        if self.cfg.target_val_loss is not None and progress.val_loss <= self.cfg.target_val_loss:
            self.console.line("target_reached", loss=progress.val_loss, target=self.cfg.target_val_loss)
            return "target_reached"
        # 预算正好用完的，不是提前停：那时没有“接着训”可言
        return self._judge_turn() if self.spent < 1 else None

    def _cut_short(self, loss: float) -> bool:
        """Whether an evaluation gave no number because one of the processes was told to end meanwhile."""
        return math.isnan(loss) and distributed.largest([float(self.stop_requested)], self.device)[0] > 0

    def _judge_turn(self) -> str | None:
        """Stop, or say once, where validation gets no better any more; the reason to stop, or None."""
        progress, cfg = self.progress, self.cfg
        count, limit = progress.evals_without_gain, cfg.early_stop_evals
        since = progress.iteration - progress.since_best(cfg.eval_interval)
        if limit is None and past_turn(progress, cfg.eval_interval, self.spent):
            self.console.line("turned_for_good", loss=progress.val_loss, best=progress.best_val_loss, since=since)
            return "early_stop"
        if limit and count >= limit:
            self.console.line("early_stop", count=count, best=progress.best_val_loss, since=since)
            return "early_stop"
        # 还不停：学习率还要降，最后一段常常又好起来；试跑与短的训练评估不了这么多次，不会说
        if count >= TURNED and not self.told_turned:
            self.told_turned = True
            resume = f"{command('run_train.py')} {self.saver.resuming} early_stop_evals={count}"
            self.console.line(
                "validation has not improved since iteration {since}: more text, or a new training with "
                "dropout={dropout}, goes further; Ctrl-C saves and stops, the best checkpoint is kept; {stops}",
                since=since, dropout=0.2 if cfg.dropout < 0.2 else min(0.5, cfg.dropout + 0.1),
                stops=text("to have it stop by itself:\n  {resume}", resume=resume) if limit == 0 else text(
                    "it stops by itself if that goes on (early_stop_evals)",
                ),
            )
        return None

    def _evaluate_in_sight(self) -> float:
        """evaluate() with a bar, or with a line before it where there is none and it takes long."""
        about, done = self.forecast.evaluation_s, 0
        if not self.console.live and about > LONG_S:
            self.console.line(
                "iter {iteration}: evaluating and saving, about {time} …",
                iteration=self.progress.iteration, time=duration(about),
            )

        def told(rows: int) -> None:
            nonlocal done
            done += rows
            advance(done)
            if self.stop_requested and self.spent < 1:
                raise _ToldToEndError

        with self.console.progress(len(self.windows) // distributed.world(), title="progress_evaluating") as advance:
            try:
                return self.evaluate(told)
            except _ToldToEndError:
                # 收回机器之前也许只有半分钟：先存；别的进程在等这次求和
                distributed.total(torch.full((2,), math.nan, dtype=torch.float64, device=self._sums_on()))
                return math.nan

    @functools.cached_property
    def bits(self) -> float | None:
        """Bits per byte of the evaluated text for each nat of validation loss; None where that is not known."""
        # 评估的窗口固定，字节数就是个常数：数一次，之后不花时间
        return self.data.bits_per_byte(self.windows)

    def metrics(self, tokens: int, seconds: float) -> dict[str, float]:
        """Speed, utilisation and memory of `tokens` trained in `seconds`."""
        speed = tokens / seconds if seconds else 0.0
        flops = speed * flops_per_token(self.model) / distributed.world()
        of_reference = peak_tflops_of(reference(), half=self.precision.half, tf32=False)
        memory = {f"memory/{name}_gib": value for name, value in memory_gib(self.device).items()}
        mfu, mfu_reference = flops / self.peak / 1e12, flops / of_reference / 1e12
        return {"tokens_per_s": speed, "mfu": mfu, "mfu_rtx3060": mfu_reference, **memory}

    def _take_time(self) -> None:
        """Add what the stopwatch counted to the run's time and to that of the next log line."""
        seconds = self.stopwatch.take()
        self.progress.train_s += seconds
        self.interval.seconds += seconds

    def _log(self, result: StepResult, evaluated: bool) -> None:
        self._take_time()
        self.judge_latest()
        finite = [result.loss for result in self.interval.results if math.isfinite(result.loss)]
        record = {
            "train/loss": sum(finite) / len(finite) if finite else math.nan,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "tokens": self.progress.tokens_trained,
            **self.metrics(self.interval.tokens, self.interval.seconds),
        }
        if not self.interval.tokens:
            # 这一段只有编译的那一步：没有速度可言
            del record["tokens_per_s"], record["mfu"], record["mfu_rtx3060"]
        if evaluated:
            record |= self._validation()
        if self.precision.scaler.is_enabled():
            record["loss_scale"] = self.precision.scaler.get_scale()
        self.interval = Interval()
        # NaN 不是合法的 JSON，也画不成曲线
        self.loggers.log(self.progress.iteration, {k: v for k, v in record.items() if math.isfinite(v)})
        self.console.iteration(self.progress.iteration, record, self.device.type)
        if evaluated:
            self._show(record)

    def _validation(self) -> dict[str, float]:
        """What the latest evaluation found, as it is logged."""
        loss = self.progress.val_loss
        return {"val/loss": loss} | ({"val/bpb": self.bits * loss} if self.bits else {})

    def _show(self, record: dict[str, float]) -> None:
        best, peak = self.progress.best_val_loss, memory_gib(self.device)["peak"]
        self.console.evaluation(self.progress.iteration, record, self.device.type, best=best, peak=peak)

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
            named = known.get(getattr(error, "message", None), "sample_failed")
            line = "sample_skipped" if is_out_of_memory(error) else named
            self.console.line(line, iteration=self.progress.iteration, reason=reason_of(error))
            return
        self.last_sample = sample
        self.loggers.text(self.progress.iteration, sample)

    def sample_prompt(self) -> str | None:
        """The configured prompt, else a question where the data has some; None: the one with which writing begins."""
        given = self.cfg.sample_prompt
        return self.data.question if given is None else unescaped(given)


def share_batch(cfg: TrainConfig, world: int) -> tuple[int, int]:
    """(rows of a step in the largest share, rows per micro-batch), for the same effective batch whatever `world` is."""
    if cfg.memory.optimizer_in_backward and world > 1:
        raise ConfigError(
            "memory.optimizer_in_backward=true uses each gradient before {world} processes could add them up; start "
            "one process, or memory.optimizer_in_backward=false",
            world=world,
        )
    total = effective_batch(cfg)
    if total < world:
        raise ConfigError(
            "batch_size: the {batch} rows of a step cannot be shared by {world} processes; start at most {batch}, or "
            "raise global_batch_size",
            batch=total, world=world,
        )
    # 除不尽也没关系：有的进程多一条，最后一个微批短一些，等效批量仍然精确
    rows = -(-total // world)
    return rows, min(cfg.batch_size, rows)
