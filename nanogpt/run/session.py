"""One training run, from its checked config to the last line on the screen."""

# 一次训练的从头到尾：打开数据，造模型与训练循环，占住目录，训练，最后说出结果与接下来可以敲什么
# new 从头开始，resume 接着以前的；次序按“错误应该多早出现”来排：不花时间的先查，目录最后才动
# 占住目录之前什么也不写：开不成的新训练不留痕迹，接着训的也不会被改坏
# run_train.py 调用它，Hooks 里是上层交进来的能力；试跑只用它的 build_trial

import contextlib
import math
import os
import shutil
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nanogpt.base import run_names
from nanogpt.base.config import (
    MANY,
    PATH_KEYS,
    ParallelConfig,
    TrainConfig,
    auto_tokens,
    block_parameters,
    check,
    not_sharded,
    plain,
    span_of,
    tokens_per_step,
)
from nanogpt.base.console import Console, file_size, rounded, short, when_window_closes
from nanogpt.base.errors import OutOfMemory
from nanogpt.base.files import folders_around, sync_names, write_text
from nanogpt.base.groups import leaves, naming
from nanogpt.base.hashed_json import DamagedError, read_object, reason_of
from nanogpt.base.language import ConfigError, text
from nanogpt.base.lock import Lock
from nanogpt.base.parts import build_part
from nanogpt.base.quoting import command, override, word
from nanogpt.base.run_names import RunRecord
from nanogpt.base.saved_config import PARTS, read_saved
from nanogpt.base.value_checks import unescaped
from nanogpt.core import distributed, machine
from nanogpt.core.memory.lora import add_adapters
from nanogpt.core.ngrams import size_text
from nanogpt.core.precision import Precision
from nanogpt.core.progress import Progress
from nanogpt.core.sharding import applies
from nanogpt.core.step import Step
from nanogpt.data import corpus
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.conversations import ConversationData
from nanogpt.data.opening import open_data
from nanogpt.data.remote import is_address
from nanogpt.data.tokens import ORDER, TokenData, copy_dataset, dataset_bytes, find_prepared
from nanogpt.run import cpu_units, rundir
from nanogpt.run.folders import size_of
from nanogpt.run.loggers import JsonlLogger, Loggers
from nanogpt.run.loop import Training, share_batch
from nanogpt.run.regularize import counts_time, decided, dropout_of, held_back, passes_of
from nanogpt.run.saving import Saver, largest_bytes, restore
from nanogpt.run.summary import versions
from nanogpt.weights import checkpoint
from nanogpt.weights.build import build_model, build_step, check_weights
from nanogpt.weights.pretrained import Pretrained, adapted, build_pretrained, check_vocabulary, open_pretrained

# 各种预算；接着训时写了新的，已经到头的旧的就不再管
LIMITS = ("max_iters", "max_tokens", "max_minutes")
# 预算之外让训练停下的，总结里各有一个词
STOPPED = ("early_stop", "target_reached")
# 换了也还是同一条命令：不影响训练怎样走下去
HARMLESS = ("resume", "out_dir", "overwrite", "device", "lang", "logger", "groups", "plan", "batch_size", "compile")
# 停下时预算还没用完：接着训不必再给
EARLY = ("interrupted", "early_stop")
# 大于它的学习率几步之内就会冲掉预训练学到的东西
HIGH_FINETUNE_RATE = 1e-3


@dataclass(frozen=True)
class Hooks:
    """What a run asks of the rooms above it; run_train.py hands them in."""

    # run 不导入 plan、sweep、write：要它们做的事从这里交进来，没有交的就不做
    choose_batch: Callable[..., int] | None = None
    """nanogpt.sweep.auto_batch.choose: the micro-batch for batch_size=auto."""
    choose_parallel: Callable[..., ParallelConfig] | None = None
    """nanogpt.plan.show.chosen_parallel: ddp or fsdp for parallel=auto."""
    count_steps: Callable[[TrainConfig], int] | None = None
    """nanogpt.plan.plan.Planner.steps: how many steps the time of a budget is good for."""
    explain: Callable[..., None] | None = None
    """nanogpt.plan.autopsy.show: what did not fit, and what to type."""
    write_sample: Callable[..., str] | None = None
    """nanogpt.write.engine.write_sample: the text that is shown after an evaluation."""
    remember: bool = True
    """Whether `latest` means this run from now on."""

    def measure_batch(self, cfg: TrainConfig, overrides: list[str]) -> int | str:
        """Measure batch_size=auto (first process only) and put the outcome into cfg; returns it."""
        if cfg.batch_size == "auto" and distributed.rank() == 0:
            cfg.batch_size = self.choose_batch(cfg, overrides, processes=distributed.world(), console=Console())
        return cfg.batch_size

    def parallel(self, cfg: TrainConfig) -> ParallelConfig:
        """cfg.parallel with auto decided, in the first process."""
        if cfg.parallel.mode != "auto" or distributed.rank():
            return cfg.parallel
        if distributed.world() == 1 or not_sharded(cfg) or not self.choose_parallel:
            return replace(cfg.parallel, mode="ddp")
        # 模型的形状此时已经定了：不必再去读 init_from 的权重
        return self.choose_parallel(replace(cfg, init_from=None), console=Console())

    def steps(self, cfg: TrainConfig) -> int | None:
        """How many steps the time of the budget is good for, if something depends on that and it can be told."""
        if not counts_time(cfg):
            return None
        found = None
        if self.count_steps and not distributed.rank():
            # 自己的模型不一定规划得了：只为挑几个默认值，不值得停下
            with contextlib.suppress(Exception):
                found = self.count_steps(cfg)
        return distributed.broadcast(found)


NO_HOOKS = Hooks()


class Session:
    """Wires data, model, optimizer, loggers and trainer together in the order in which mistakes should show."""

    # 多进程时每个进程各有一个；读写目录、准备数据只由第一个做，再告诉别的

    def __init__(
        self, cfg: TrainConfig, run_dir: Path, source: checkpoint.Checkpoint | None, *, other_data: bool = False,
        pretrained: Pretrained | None = None, lock: Lock | None = None, record: RunRecord | None = None,
        hooks: Hooks = NO_HOOKS, limits: Collection[str] = (), same: bool = False,
    ):
        """`lock` and `record` are those of a run that is resumed, or begun again because it has no checkpoint yet.

        `limits` are the budgets that were typed for a resume; `same`: by the command that began the run.
        """
        self.cfg, self.source, self.other_data, self.pretrained = cfg, source, other_data, pretrained
        self.lock, self.record, self.hooks, self.limits, self.same = lock, record, hooks, limits, same
        self.saved = read_saved(source.config_text()) if source else {}
        """The config of the checkpoint from which it goes on."""
        self.by_hand = self.told_to_end = False
        """Whether a training was ended before its time by the person at the keyboard, or by what launched it."""
        # 锁在手里却没有 checkpoint：同一次训练重新开始
        self.begun_again = source is None and lock is not None
        self.why_format: str | None = None
        self.console = Console(quiet=distributed.rank() > 0)
        self.device = machine.choose_device(cfg.device, cfg.hardware)
        if cfg.parallel.world not in (None, distributed.world()):
            raise ConfigError(
                "parallel.world={got}, but {world} processes were started: begin the command with torchrun "
                "--nproc_per_node={got}, or leave parallel.world out",
                got=cfg.parallel.world, world=distributed.world(),
            )
        if cfg.batch_size != "auto":
            share_batch(cfg, distributed.world())
        machine.set_up(
            self.device, deterministic=cfg.deterministic, hardware=cfg.hardware, threads=cfg.threads,
        )
        parallel = hooks.parallel(cfg)
        distributed.start(self.device, cfg.parallel.timeout_s)
        # 默认目录名含时间，batch_size=auto 由第一个进程实测：各进程要用同一个
        self.run_dir, cfg.batch_size, self.parallel = distributed.broadcast((run_dir, cfg.batch_size, parallel))
        self.data = self._open_data()
        if cfg.holdout:
            self.data.hold_out(cfg.holdout)
        self._check_against_data()
        # 记下算出的数：接着训时要加，就在它上面加
        text_tokens = len(self.data.tokens["train"])
        if cfg.max_tokens == "auto":
            cfg.max_tokens = auto_tokens(cfg.model, text_tokens)
        now = plain(cfg)
        self.changed = {key for key, value in self.saved.items() if key in now and now[key] != value}
        """Keys that a resume changes."""
        self.left_open = [key for key, value in decided(cfg).items() if value is None]
        steps = hooks.steps(cfg)
        self.passes = passes_of(cfg, text_tokens, steps)
        filled = held_back(cfg, text_tokens, steps)
        cfg.model, cfg.dropout, cfg.optimizer = filled.model, filled.dropout, filled.optimizer
        distributed.check_alike(self._facts())

    def _facts(self) -> dict[str, str]:
        """What has to be the same in every process: settings, versions, data, and where the training goes on."""
        # 各机器的路径与设备可以不同；数据与 checkpoint 比的是内容
        settings = leaves(plain(self.cfg))
        apart = {key: str(value) for key, value in settings.items() if key not in (*PATH_KEYS, "device", "lang")}
        source, software = self.source, versions()
        return {
            **apart, **{name: software[name] for name in ("torch", "nanogpt", "numpy")},
            "dataset": self.data.fingerprint,
            "checkpoint": f"{source.name} ({min(source.sha256.values())[:8]})" if source else "-",
        }

    @classmethod
    def new(
        cls, cfg: TrainConfig, run_dir: Path, overrides: list[str] | None = None, hooks: Hooks = NO_HOOKS
    ) -> "Session":
        """A run from iteration 0 in run_dir, from random or from pretrained weights."""
        pretrained = None
        if cfg.init_from:
            typed = rundir.typed_model_fields(overrides or [], cfg.model)
            opened = open_pretrained(cfg.init_from, which=cfg.checkpoint, code=cfg.model._target_)
            pretrained = adapted(opened, cfg.model, typed, cfg.init_from)
            cfg.model = pretrained.config
        hooks.measure_batch(cfg, overrides or [])
        return cls(cfg, run_dir, None, pretrained=pretrained, hooks=hooks)

    @classmethod
    def resume(cls, typed: TrainConfig, overrides: list[str], run_dir: Path, hooks: Hooks = NO_HOOKS) -> "Session":
        """The run in run_dir, from the checkpoint that typed.checkpoint names, with what was typed laid over.

        A run that was killed before its first checkpoint begins again.
        """
        # 先拿到锁再看里面：活着的那次还在写、还在删
        lock = rundir.hold(run_dir) if distributed.rank() == 0 else None
        try:
            record = rundir.read_record(run_dir)
            found = checkpoint.listed(run_dir)
            if not found.good and not found.bad:
                return cls._again(typed, overrides, run_dir, record, lock, hooks)
            return cls._going_on(typed, overrides, run_dir, record, lock, hooks)
        except BaseException:
            if lock:
                lock.release(remove=lock.made)
            raise

    @classmethod
    def _again(
        cls, typed: TrainConfig, overrides: list[str], run_dir: Path, record: RunRecord | None, lock: Lock | None,
        hooks: Hooks,
    ) -> "Session":
        content, file = rundir.begun_with(run_dir, record)
        cfg = replace(rundir.resumed_config(content, typed, overrides, file), resume=str(run_dir))
        check(cfg)
        pretrained = None
        if cfg.init_from:
            # 形状早已对好；dropout 与上下文长度取当时写下的
            opened = open_pretrained(cfg.init_from, which=cfg.checkpoint, code=cfg.model._target_)
            pretrained = adapted(opened, cfg.model, {"dropout", "block_size"}, cfg.init_from)
        cfg.batch_size = hooks.measure_batch(replace(cfg, resume=None), [])
        return cls(cfg, run_dir, None, pretrained=pretrained, lock=lock, record=record, hooks=hooks)

    @classmethod
    def _going_on(
        cls, typed: TrainConfig, overrides: list[str], run_dir: Path, record: RunRecord | None, lock: Lock | None,
        hooks: Hooks,
    ) -> "Session":
        source = checkpoint.find(run_dir, typed.checkpoint or "last")
        source.refuse_without_state()
        cfg = replace(rundir.resumed_config(source.config_text(), typed, overrides, source.folder), resume=str(run_dir))
        check(cfg)
        check_weights(source, cfg.model, cfg.finetune)
        limits = typed_limits(cfg, overrides)
        # 同一条命令再敲一遍、torchrun 再启动一次：早已训完的，补上可能没写完的总结，照样成功
        same = typed.out_dir is not None and Path(typed.out_dir) == Path(typed.resume)
        # 时间与 token 数在状态里，要读完才知道；步数马上就说
        leave_behind(cfg, limits, Progress(source.iteration), Console(quiet=distributed.rank() > 0), same=same)
        bundled = run_dir / "data"
        # 试的是同一个形状：权重是什么不影响快慢与内存
        dataset = {**cfg.dataset, "dir": str(bundled)} if bundled.is_dir() else cfg.dataset
        trial = replace(cfg, resume=None, init_from=None, dataset=dataset)
        cfg.batch_size = hooks.measure_batch(trial, [])
        other_data = any(o.startswith("dataset.dir=") for o in overrides)
        return cls(
            cfg, run_dir, source, other_data=other_data, lock=lock, record=record, hooks=hooks, limits=limits,
            same=same,
        )

    # ---- 数据 ----

    def _open_data(self) -> TokenData:
        bundled = self.run_dir / "data"
        if self.source and (bundled / "meta.json").is_file() and not self.other_data:
            # 运行目录自带数据：拷到别的机器上也能接着训
            return open_data(bundled, self.cfg.label_dropout, verify=self.cfg.verify)
        options = {k: v for k, v in self.cfg.dataset.items() if k not in ("name", "dir")}
        if options.get("tokenizer") == "auto" and self.cfg.init_from:
            # 微调沿用模型自己的词表；续训时它在运行目录里
            saved = self.source and tokenizers.load(self.source.folder / "tokenizer.json")
            options["tokenizer"] = saved if self.source else self.pretrained.tokenizer
        name, directory = self.cfg.dataset["name"], self.cfg.dataset["dir"]

        def prepared() -> Path:
            if self.source and not directory and (folder := find_prepared(name, self.source.data_fingerprint())):
                corpus.say_reused(name, folder)
                return folder
            try:
                return corpus.prepare(name, directory, options, verify=self.cfg.verify)
            except tokenizers.UnknownCharacters as error:
                if self.cfg.init_from is None:
                    raise
                raise ConfigError(
                    "init_from={got}: the vocabulary of that model lacks {characters}; leave these characters out of "
                    "the text, or train without init_from",
                    got=self.cfg.init_from, characters=error.values["characters"],
                ) from None

        # 放在别处的，每台机器有自己的缓存：各取各的
        folder = prepared() if is_address(directory) else distributed.from_first(prepared)
        cfg = self.cfg
        return open_data(folder, cfg.label_dropout, verify=cfg.verify, cache_gib=cfg.cache_data_gib)

    def _check_against_data(self) -> None:
        model, data = self.cfg.model, self.data
        if self.pretrained:
            check_vocabulary(self.pretrained, data.tokenizer, self.cfg.init_from)
        data.check_block_size(model.block_size)
        if self.cfg.eval_stride:
            data.slide(self.cfg.eval_stride, model.block_size)
        # 文章之间不互相看：由数据决定，不由人写
        model.separator, model.marked = data.separator, data.marked
        if model.vocab_size is None:
            model.vocab_size = data.vocab_size
        elif model.vocab_size < data.vocab_size:
            raise ConfigError(
                "model.vocab_size={got} is smaller than the data set's vocabulary of {need}; leave it null or choose "
                "at least {need}",
                got=model.vocab_size, need=data.vocab_size,
            )
        if self.cfg.sample_prompt is not None:
            # 词表里没有的字现在就说，不要等到第一次评估
            data.tokenizer.encode(unescaped(self.cfg.sample_prompt))

    # ---- 训练 ----

    def run(self, kind: type[Training] = Training) -> dict:
        """Build, announce, train, show what came out; the summary."""
        try:
            trainer = self._build(kind)
            self._announce(trainer)
            self._catch_signals(trainer)
            try:
                trainer.ended = distributed.broadcast(self._ended())
                self._measure_anew(trainer)
                summary = trainer.fit()
            except OutOfMemory as error:
                self._explain(error, has_checkpoint=trainer.saver.saved is not None)
                raise
            finally:
                distributed.stop()
            self.told_to_end = summary["stopped_by"] == "interrupted" and not self.by_hand
            if distributed.rank() == 0:
                self._finish(trainer, summary)
        finally:
            if self.lock:
                self.lock.release()
        if self.console.gone:
            # 读的一方先走了：该存的都存了，再照常结束
            raise BrokenPipeError
        return summary

    def _measure_anew(self, trainer: Training) -> None:
        """Where a training goes on and its validation is other text than before, forget what was reached on that."""
        at = trainer.progress
        goes_on = trainer.ended is None and trainer.span.spent(at.iteration, at.wall_s) < 1
        if not (self.changed & {"eval_tokens", "eval_stride"} and goes_on and math.isfinite(at.best_val_loss)):
            return
        # 写的数变了，量的未必变：验证部分可能本来就没那么长
        before = self.data.val_windows(trainer.block_size, self.saved.get("eval_tokens"))
        if "eval_stride" in self.changed or len(before) != len(trainer.windows):
            self.console.line(
                "validation is measured otherwise than before (eval_tokens, eval_stride): the best loss and early "
                "stopping count anew from here; checkpoint=best still compares all of them",
            )
            at.measure_anew()

    def _ended(self) -> str | None:
        """Why this run had stopped for good, where the same command is typed again; None: there is something to do."""
        if not (self.source and self.same) or self.changed - {*HARMLESS}:
            return None
        with contextlib.suppress(DamagedError):
            summary = read_object(self.run_dir / "summary.json")
            if summary.get("iters") == self.source.iteration and summary.get("stopped_by") in STOPPED:
                return summary["stopped_by"]
        return None

    def _build(self, kind: type[Training] = Training) -> Training:
        backends = [build_part(node, f"logger.{name}") for name, node in (self.cfg.logger or {}).items()]
        loggers = Loggers([JsonlLogger(), *backends] if distributed.rank() == 0 else [])
        computation = self._build_step()
        progress, order = restore(self.source, computation, self.data) if self.source else (Progress(), ORDER)
        leave_behind(self.cfg, self.limits, progress, self.console, same=self.same)
        settings = plain(self.cfg)
        config_text = OmegaConf.to_yaml(OmegaConf.create(settings))
        if distributed.rank() == 0:
            # auto 是哪个设备，到这里才定
            config = {**settings, "device": str(self.device)}
            self._begin(loggers, config_text, config, progress.iteration)
        return kind(
            self.cfg, computation=computation, data=self.data, loggers=loggers, saver=self._saver(config_text),
            console=self.console, write_sample=self._write_sample, progress=progress, order=order,
        )

    def build_trial(self, kind: type[Training] = Training) -> Training:
        """The trainer that a run would have, at iteration 0, and nothing written: for trials and measurements."""
        return kind(
            self.cfg, computation=self._build_step(), data=self.data, loggers=Loggers([]), saver=self._saver(""),
            console=self.console, write_sample=self._write_sample,
        )

    @property
    def _write_sample(self) -> Callable[..., str] | None:
        # 写样本只有第一个进程做，分片的模型却要大家一起算
        return None if applies(self.parallel) else self.hooks.write_sample

    def _saver(self, config_text: str) -> Saver:
        """What writes checkpoints into the run folder."""
        # 说“接着训”时写给人敲的
        resuming = " ".join(map(word, [*self._named("train"), override("resume", self.run_dir)]))
        distributed.to_go_on(f"{command('run_train.py')} {resuming}")
        return Saver(
            self.run_dir, keep=self.cfg.keep, tokenizer=self.data.tokenizer, console=self.console, resuming=resuming,
            config_text=config_text, run_id=self.record.id if self.record else None, saved=self.source,
        )

    def _begin(self, loggers: Loggers, config_text: str, config: dict, iteration: int) -> None:
        """Take the run folder and open the loggers.

        A new run that one of them refuses leaves nothing, a resumed one is as it was.
        """
        fresh = not self.lock
        with folders_around(self.run_dir) if fresh else contextlib.nullcontext():
            try:
                self._claim_folder(config_text)
                loggers.open(self.run_dir, config, iteration)
                if self.source:
                    checkpoint.set_aside_newer(self.run_dir, self.source.iteration)
                if self.hooks.remember:
                    run_names.remember(self.run_dir)
            except BaseException as error:
                if fresh and self.lock:
                    # 一步都还没训：不留下半个训练目录
                    rundir.abandon(self.run_dir, self.lock)
                if isinstance(error, OSError):
                    raise ConfigError("not_writable", path=self.run_dir, reason=reason_of(error)) from None
                raise

    def _build_step(self) -> Step:
        """The model and the computation of its steps, on the device."""
        self._settle_format()
        model = self._build_model()
        if not applies(self.parallel):
            # 分片的整个放不下也无妨：一个 block 一个 block 地分好，只留自己的行
            model = model.to(self.device)
        weights, automatic = self.cfg.memory.weights, self.cfg.hardware.dtype
        precision = Precision(self.cfg.precision, self.device, weights, automatic=automatic)
        return build_step(replace(self.cfg, parallel=self.parallel), model, precision)

    def _settle_format(self) -> None:
        """Decide what precision.cpu_bf16=auto is on this CPU; the run folder and every process keep the answer."""
        before = cfg = self.cfg.precision
        if distributed.rank() == 0:
            cfg = cpu_units.settled(before, self.cfg.model, self.device.type)
            self.why_format = cpu_units.reason(cfg, self.cfg.model) if cfg is not before else None
        self.cfg.precision = distributed.broadcast(cfg)

    def _build_model(self):
        """The model with its starting weights, and with adapters beside them under finetune=lora."""
        cfg = self.cfg
        weights = cfg.memory.weights
        if self.pretrained:
            model = build_pretrained(self.pretrained, cfg.seed, weights)
        else:
            model = build_model(cfg.model, cfg.seed, weights)
        # 几百 MB 的权重已抄进模型，不必再留一份
        self.pretrained = None
        if cfg.finetune.method == "lora":
            add_adapters(model, cfg.finetune, empty=self.source is not None)
        return model

    def _claim_folder(self, config_text: str) -> None:
        """Write what a run folder holds from the start; run.json first, so that it can be begun again from then on."""
        if not self.lock:
            self.run_dir, self.lock = self._own_folder()
        if not self.source or not self.record:
            # 早先版本的训练没有编号：从这里起有；run.json 被删掉的，编号还在 checkpoint 里
            known = self.record.id if self.record else self.source.run if self.source else None
            self.record = run_names.write_record(self.run_dir, config_text, known)
        (self.run_dir / "ckpt").mkdir(exist_ok=True)
        # checkpoint 自己落了盘，它上面的名字也要在：断电后才找得到；上级可能是 Hydra 建的，没有同步
        sync_names(self.run_dir)
        write_text(self.run_dir / "config.yaml", config_text)
        tokenizers.save(self.data.tokenizer, self.run_dir / "tokenizer.json")
        bundled = self.run_dir / "data"
        small = not self.data.elsewhere and dataset_bytes(self.data.folder) <= self.cfg.bundle_data_mib * 2**20
        if small and not bundled.exists():
            copy_dataset(self.data.folder, bundled)

    def _own_folder(self) -> tuple[Path, Lock]:
        """The folder of a new run, and its lock.

        It has another name where another process was faster and the name is the program's to choose.
        """
        while True:
            try:
                return self.run_dir, rundir.claim(self.run_dir, overwrite=self.cfg.overwrite)
            except ConfigError as error:
                if self.cfg.out_dir is not None or error.message not in ("run_in_use", "out_dir_exists"):
                    raise
                # 同一秒启动的两次训练选了同一个名字
                self.run_dir = rundir.choose(self.cfg)

    def _announce(self, trainer: Training) -> None:
        cfg, line = self.cfg, self.console.line
        if not self.source and self.begun_again:
            line("{path} has no checkpoint yet: beginning again from iteration 0", path=self.run_dir)
        if self.source:
            line("continuing {path} at iteration {iteration}", path=self.run_dir, iteration=trainer.progress.iteration)
        elif cfg.init_from:
            line("starting from the weights of {named}", named=cfg.init_from)
            if cfg.finetune.method == "full" and cfg.learning_rate > HIGH_FINETUNE_RATE:
                line(
                    "learning_rate={rate:g} is high for trained weights and may wipe out what they know; "
                    "experiment=finetune_gpt2 uses 5e-5 with adamw",
                    rate=cfg.learning_rate,
                )
        if cfg.finetune.method == "lora":
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            line(
                "LoRA: {trained:,} parameters are trained, the others of {size} are frozen",
                trained=trained, size=size_text(trainer.model),
            )
            if not cfg.init_from:
                line(
                    "finetune=lora without init_from: the frozen weights are random; type init_from=gpt2 (or a "
                    "folder, or a run) to start from trained ones",
                )
        described = self._described(trainer)
        line("size_line", **described)
        line("run_line", **described)
        if applies(self.parallel):
            line(
                "parallel=fsdp: parameters, gradients and optimizer states are shared out over {world} processes; no "
                "samples are written during the training",
                world=distributed.world(),
            )
        if self.why_format:
            self.console.plain(self.why_format)
        line(
            "MFU, the share of the peak that the model's products reach: 100% is {tflops:.2f} TFLOP/s, {source}",
            source=trainer.peak_source, tflops=trainer.peak,
        )
        self._announce_budget(trainer)
        every = self.data.val_windows(trainer.block_size, None)
        line(
            "validation: {tokens:,} of {total:,} tokens, the same ones every time{hint}",
            tokens=self.data.val_targets(trainer.windows), total=self.data.val_targets(every),
            hint=text(
                "; behind the first {block:,}, {seen:,} or more tokens are in sight of each",
                block=trainer.block_size, seen=self.data.overlap,
            ) if self.data.overlap else "",
        )
        self._announce_left_out(trainer.block_size)
        self._announce_size(trainer)

    def _announce_left_out(self, block_size: int) -> None:
        """Say what of conversations does not fit a row."""
        if not isinstance(self.data, ConversationData):
            return
        total, longer, lost = self.data.left_out(block_size)
        if longer:
            self.console.line(
                "{longer:,} of {total:,} conversations are longer than model.block_size={block:,} and lose their ends; "
                "{lost:,} of them lose all their answers and are left out",
                longer=longer, total=total, block=block_size, lost=lost,
            )

    def _announce_size(self, trainer: Training) -> None:
        """Say how much the checkpoints will take, and warn where the disk has no room for them."""
        if distributed.rank():
            return
        cfg, each = self.cfg, largest_bytes(trainer.computation)
        there = len(checkpoint.listed(self.run_dir).good)
        # 只有时间预算时不知道会有多少步：当作存得满
        left = (trainer.span.iters or MANY) - trainer.progress.iteration
        # 评估出了新的最好也会存：按每次评估都存来算
        saves = math.ceil(left / min(cfg.save_interval or cfg.eval_interval, cfg.eval_interval))
        # 最好的可能另算一份；步数少的训练存不了那么多
        kept = max(1, min(cfg.keep + 1, there + saves))
        self.console.line(
            "checkpoints: up to {each} each, at most {kept} kept (keep={keep} and the best): {total}",
            each=file_size(each), kept=kept, keep=cfg.keep, total=file_size(kept * each),
        )
        # 新的写完才删旧的：删之前多占一份
        need = (min(kept + 1, there + saves) - there) * each
        free = shutil.disk_usage(self.run_dir).free
        if need > free:
            self.console.line(
                "the disk may become full: {free} are free in {path}, and the checkpoints can take {need}; free some "
                "disk space (nanogpt clean), choose another out_dir, or keep=1",
                free=file_size(free), path=self.run_dir, need=file_size(need),
            )

    def _described(self, trainer: Training) -> dict[str, Any]:
        """The model and its training: the values of size_line and run_line."""
        world, model = distributed.world(), self.cfg.model
        return {
            "model": model.name, "size": size_text(trainer.model), "arch": model.arch,
            "precision": trainer.precision.label, "device": self.device,
            "tokens": trainer.global_rows * trainer.block_size, "batch": trainer.micro_batch,
            "accum": math.ceil(trainer.local_rows / trainer.micro_batch), "block": trainer.block_size,
            "world": f" x {world}" if world > 1 else "",
        }

    def _announce_budget(self, trainer: Training) -> None:
        """What the budget is in passes over the text and in tokens per parameter, and what would be in proportion."""
        cfg, text_tokens, line = self.cfg, len(self.data.tokens["train"]), self.console.line
        if cfg.max_minutes:
            used = trainer.progress.wall_s / 60
            line("budget: {minutes:g} minutes, of which {used:.1f} are used", minutes=cfg.max_minutes, used=used)
        passes = self.passes
        if trainer.span.iters:
            tokens, wanted = trainer.span.iters * tokens_per_step(cfg), auto_tokens(cfg.model, text_tokens)
            # 上一个终点可能刚刚放下：照此刻的预算算
            passes = tokens / text_tokens
            more = text("; max_tokens=auto would read {tokens}", tokens=short(wanted))
            line(
                "budget: {iters:,} iterations read {tokens} tokens: {passes} passes over the text, {each} per "
                "parameter of the blocks{hint}",
                iters=trainer.span.iters, tokens=short(tokens), passes=rounded(passes),
                each=rounded(tokens / block_parameters(cfg.model)), hint=more if tokens < wanted / 2 else "",
            )
        if self.left_open and round(self.passes) > 1:
            chosen = [f"{key}={value}" for key, value in decided(cfg).items() if key in self.left_open]
            line(
                "for about {passes} passes over the text it takes {settings}; what you type goes before",
                passes=rounded(self.passes), settings=" ".join(chosen),
            )
        # 表已经训进去了，去不掉；丢多少还可以改，但接着训不自己改：与一口气训完的要逐位一样
        longer = self.source and self.changed & {*LIMITS}
        if longer and not cfg.init_from and cfg.dropout < (wanted := dropout_of(cfg.model, passes)):
            line(
                "for about {passes} passes over the text a new training would take dropout={wanted:g}; this one goes "
                "on with dropout={got:g}: add dropout={wanted:g} if its validation loss no longer falls",
                passes=rounded(passes), wanted=wanted, got=cfg.dropout,
            )

    def _explain(self, error: OutOfMemory, *, has_checkpoint: bool) -> None:
        """One screen about what did not fit and what to type instead."""
        # 分片的训练到处是通信：此刻规划不了，那一行已说了怎么办
        if self.hooks.explain and distributed.rank() == 0 and not applies(self.parallel):
            resume = [*self._named("train"), override("resume", self.run_dir)] if has_checkpoint else []
            self.hooks.explain(error, self.cfg, self.console, resume=resume)

    def _catch_signals(self, trainer: Training) -> None:
        """First Ctrl-C, SIGTERM or closed terminal: finish the step, save, leave; second: leave at once."""

        def handle(number, _frame):
            if distributed.lost():
                # 正要说出少了谁：存不了，也不必存
                return
            if trainer.stop_requested and "TORCHELASTIC_RUN_ID" in os.environ:
                # Slurm 发给每个进程，torchrun 又转发一遍：是同一个意思；等不及的由 torchrun 来杀
                return
            if trainer.stop_requested:
                os._exit(128 + number)
            self.by_hand = number != signal.SIGTERM
            trainer.stop_requested = True
            self.console.line("interrupted: saving after this step; once more to exit at once")

        def stop() -> None:
            trainer.stop_requested = True

        self.console.on_gone = stop
        distributed.when_left_alone(stop)
        if self.console.gone:
            # 开头几行还没说完，人就走了
            stop()
        # SIGHUP：终端关了或网络断了；SIGBREAK 是 Windows 的 Ctrl-Break，那里关窗口另有一条路
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            # nohup 已让它忽略 SIGHUP：照旧忽略
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, handle)
        # 在 Python 自己的之后登记，就先被问到
        when_window_closes(stop)

    def _named(self, script: str) -> list[str]:
        """What a command for this run says of the classes of one's own that it needs."""
        cfg = self.cfg
        nodes = {"model": {"_target_": cfg.model._target_}, "optimizer": cfg.optimizer, "logger": cfg.logger}
        return naming(nodes, cfg.groups, PARTS if script == "train" else ("model",))

    def _finish(self, trainer: Training, summary: dict) -> None:
        console, path = self.console, self.run_dir
        curves = any((path / "logs").glob("events.*"))
        commands = self._next(summary, curves=curves)
        reported = self._report(trainer, summary, commands)
        if summary["stopped_by"] == "interrupted":
            console.line(
                "stopped at iteration {iteration}, saved; continue with:\n  {command}",
                iteration=summary["iters"], command=commands["next_resume"],
            )
            return
        if trainer.last_sample:
            console.line("what it writes now:")
            console.plain("  | " + trainer.last_sample.strip("\n").replace("\n", "\n  | "))
        minutes, seconds = divmod(round(summary["wall_s"]), 60)
        bits = text(", {bits:.3f} bits per byte,", bits=summary["val_bpb"]) if summary["val_bpb"] is not None else ""
        console.line(
            "done: val loss {val_loss:.4f} (best {best:.4f}){bits} after {iteration} iterations in {wall}, {speed:.0f} "
            "tokens/s",
            bits=bits, val_loss=summary["val_loss"], best=summary["best_val_loss"], iteration=summary["iters"],
            wall=f"{minutes}:{seconds:02d}", speed=summary["tokens_per_s"],
        )
        console.line(
            "everything is in {path} ({size}): {report}ckpt/ (weights), metrics.jsonl, {logs}config.yaml, summary.json",
            path=path, size=file_size(size_of(path)), report=text("report.html, ") if reported else "",
            logs=text("logs/ (TensorBoard), ") if curves else "",
        )
        console.line("next:")
        for what, typed in commands.items():
            # 说明另起一行：cmd 与 zsh 不认行末的 #
            console.line("  {what}:\n    {command}", what=text(what), command=typed)

    def _report(self, trainer: Training, summary: dict, commands: dict[str, str]) -> bool:
        """Write report.html; whether that was possible."""
        # 只在这里用到：jinja2 不必每个进程都载入
        from nanogpt.run.report import write_report

        try:
            described = self._described(trainer)
            model = f"{text('size_line', **described)}; {text('run_line', **described)}"
            write_report(self.run_dir, self.cfg, summary, model=model, commands=commands)
            return True
        except Exception as error:
            # 权重与曲线都已存好：报告只是给人看的，无论为什么写不成
            self.console.line("report.html is not written ({reason}); all else is saved", reason=reason_of(error))
            return False

    def _next(self, summary: dict, *, curves: bool) -> dict[str, str]:
        """What may be typed now: the name of what it does -> the command."""
        path, dataset = self.run_dir, self.cfg.dataset
        labels = self.data.tokenizer.labels
        label = [override(f"control.{kind}", name) for kind, names in labels.items() for name in names][:1]
        chat = ["chat=true"] if self.data.marked else []
        # 因为它们停下的，不关掉就又会停在原处；提前停下的，预算还没用完
        ends = {"early_stop": ["early_stop_evals=0"], "target_reached": ["target_val_loss=null"]}
        off = ends.get(summary["stopped_by"], [])
        again = ["run_train.py", *self._named("train"), override("resume", path)]
        span = span_of(self.cfg)
        key = span.key if span.iters and summary["stopped_by"] != "max_minutes" else "max_minutes"
        # 达到目标而停的，预算还没用完：加倍的是预算
        iters = max(summary["iters"], (span.iters or 0) if off else 0)
        more = 2 * iters if key == "max_iters" else _doubled(self.cfg, key, summary["tokens"], summary["wall_s"])
        # 学习率写明到哪里降完的，之后就是零：跟着加长
        ends = self.cfg.lr_decay_iters
        decay = [f"lr_decay_iters={2 * iters}"] if ends and ends < 2 * iters else []
        longer = {"next_longer": command(*again, f"{key}={more}", *decay, *off)}
        commands = {
            "next_sample": command("run_sample.py", *self._named("sample"), override("out_dir", path), *label, *chat),
            **({"next_resume": command(*again, *off)} if summary["stopped_by"] in EARLY else longer),
        }
        if curves:
            # outputs/ 里的几次训练画在一起比
            folder = run_names.OUTPUTS if path.parent == run_names.OUTPUTS else path
            commands["next_curves"] = f"tensorboard --logdir {word(str(folder))}"
        if not {"path", "source"} & set(dataset):
            # 用的是现成的文本
            commands["next_own"] = command("run_train.py", "dataset=text_file", "dataset.path=my.txt")
        return commands


def typed_limits(cfg: TrainConfig, overrides: list[str]) -> list[str]:
    """The budgets that were typed for a resume."""
    typed = {override.partition("=")[0] for override in overrides}
    return [key for key in LIMITS if key in typed and getattr(cfg, key) is not None]


def leave_behind(
    cfg: TrainConfig, limits: Collection[str], progress: Progress, console: Console, *, same: bool,
) -> None:
    """Drop a limit that is reached where others were typed (`limits`); ConfigError where none was, or it was itself.

    Typed by the `same` command again, such a run has nothing left to do, and that is no mistake.
    """
    at = progress.iteration
    while (span := span_of(cfg, at, progress.tokens_trained)).spent(at, progress.wall_s) >= 1:
        key = span.ended_by(at)
        if same and (not limits or key in limits):
            return
        got = span.iters if key == "max_iters" else getattr(cfg, key)
        if limits and key not in limits:
            goal = " ".join(f"{limit}={getattr(cfg, limit)}" for limit in limits)
            console.line("{key}={got} was the end of this run; it goes on to {goal}", key=key, got=got, goal=goal)
            setattr(cfg, key, None)
        elif key == "max_iters":
            raise ConfigError(
                "the run already stands at iteration {iteration} of max_iters={max_iters}; add max_iters={more} to "
                "train on",
                iteration=at, max_iters=got, more=2 * at,
            )
        else:
            more = _doubled(cfg, key, progress.tokens_trained, progress.wall_s)
            raise ConfigError("{key}={got} is used up; add {key}={more} to train on", key=key, got=got, more=more)


def _doubled(cfg: TrainConfig, key: str, tokens: int, wall_s: float) -> float:
    """Twice max_tokens or max_minutes, or twice what is used where that is more: enough to go on with."""
    got, used = getattr(cfg, key), tokens if key == "max_tokens" else wall_s / 60
    # 一步就用完几倍的，加倍也不够
    return 2 * max(got, math.ceil(used) if 2 * got <= used else 0)
