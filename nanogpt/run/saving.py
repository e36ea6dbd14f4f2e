"""The checkpoints of one training: written into its run folder, and read again to continue from."""

# 训练里有哪些东西要进 checkpoint，怎样从里面接着走，使续训与不间断的训练逐位相同
# state_of 列出权重之外下一步所依赖的一切，restore 照着装回去
# Saver 写盘，存不下（磁盘满、内存不够）报一行，过一会儿再试
# session 造 Saver、调用 restore，loop 决定何时存；文件的格式、校验与保留几份在 weights/checkpoint

import json
import sys
import time
from pathlib import Path

import torch

from nanogpt.base.console import Console
from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError, text
from nanogpt.core import distributed
from nanogpt.core.optimizers import Optimizer
from nanogpt.core.progress import Progress
from nanogpt.core.sharding import fetching, whole_shape
from nanogpt.core.step import Step
from nanogpt.data.tokens import ORDERS, TokenData
from nanogpt.weights import checkpoint

# 存不下时过这么久再试：磁盘腾出来就存上，又不至于每步都卡在写盘上
RETRY_S = 60


def state_of(computation: Step, progress: Progress, data: TokenData, order: int) -> dict:
    """Everything besides the weights that the next iteration depends on."""
    return {
        "progress": vars(progress).copy(), "optimizer": computation.optimizer.state_dict(),
        "scaler": computation.precision.scaler.state_dict(), "fingerprint": data.fingerprint, "order": order,
    }


def restore(source: checkpoint.Checkpoint, computation: Step, data: TokenData) -> tuple[Progress, int]:
    """Load weights, optimizer and scaler in the present memory= settings; return the counters and the order of data."""
    state = source.load_state(mapped=computation.sums is not None)
    try:
        if state["fingerprint"] != data.fingerprint:
            raise ConfigError("vocab_mismatch", name=data.name, reason="fingerprint")
        source.load_model(computation.model)
        # 先装权重：状态的格式要看参数是 fp32 还是 bf16
        computation.optimizer.load_state_dict(state["optimizer"])
        # 别的格式没有缩放的状态：换到 fp16 接着训，从头找缩放的倍数
        if state["scaler"]:
            computation.precision.scaler.load_state_dict(state["scaler"])
        # 早先的 checkpoint 没有次序这一项：照旧，接着训才逐位一致
        progress, order = Progress(**state["progress"]), state.get("order", 1)
        if order not in ORDERS:
            raise ValueError(f"order {order}")
    except ConfigError:
        raise
    except checkpoint.UNFIT as error:
        if is_out_of_memory(error):
            raise
        # 摘要对得上、内容却合不上：换了优化器，或者不是这个程序写的
        raise source.damaged(f"state: {reason_of(error)}") from None
    return progress, order


def largest_bytes(computation: Step) -> int:
    """How large a checkpoint can become: weights and optimizer states, every row of them filled."""
    optimizer = computation.optimizer
    weights = sum(tensor.nbytes for tensor in checkpoint.model_tensors(computation.model).values())
    if not isinstance(optimizer, Optimizer):
        # 别人的优化器：多半与 AdamW 一样，每个参数两份 fp32
        return weights + sum(8 * p.numel() for group in optimizer.param_groups for p in group["params"])
    # 照真的那样造一遍，只是造在 meta 上、造完放回：各种省法各有各的格式，不必另记一份
    before, optimizer.state = optimizer.state, {}
    try:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                whole = torch.empty(whole_shape(optimizer, name, p), dtype=p.dtype, device="meta")
                optimizer.started(name, whole, group)
        return weights + sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    finally:
        optimizer.state = before


class Saver:
    """Writes the checkpoints of one run folder and knows how to go on from them."""

    # 配置、词表、编号每份都一样：造的时候交进来，存的时候只说权重与状态；多进程时只有第一个写

    def __init__(
        self, run_dir: Path, *, keep: int, tokenizer, console: Console, resuming: str, config_text: str = "",
        run_id: str | None = None, saved: checkpoint.Checkpoint | None = None,
    ):
        """resuming: what is typed to continue this run; saved: the checkpoint from which it goes on."""
        self.run_dir, self.run_id, self.resuming, self.saved = run_dir, run_id, resuming, saved
        self._keep, self._tokenizer, self._console, self._config_text = keep, tokenizer, console, config_text
        self.saved_at = saved.iteration if saved else -1
        """Iteration of the newest checkpoint, in every process."""
        self._retry_at: float | None = None
        self._unnoted: tuple[checkpoint.Checkpoint, float, float | None] | None = None

    def is_due(self, due: bool) -> bool:
        """Whether to save now: where the last save failed, when it is time to try again, in place of when it is due.

        Every process asks, the first one's clock counts.
        """
        # 存不下的盘，每次都要先写上一阵才知道：到点再试，不必每到间隔就写一遍
        return due if self._retry_at is None else distributed.broadcast(time.monotonic() >= self._retry_at)

    def save(
        self, model, state: dict, *, iteration: int, val_loss: float | None, val_bpb: float | None, final: bool
    ) -> None:
        """Write a checkpoint; if that fails, say so and try again later; only where it was the last chance, raise.

        val_loss is None for weights that were not evaluated: the best checkpoint is always an evaluated one.
        """
        reason = None
        try:
            # 分片的张量要大家一起凑：别的进程等在这里，要哪个给哪个
            with fetching(checkpoint.model_tensors(model), state) as first:
                if first:
                    # 还没有记上损失的那一份可能是最好的：记不上也照样存，只是先一份也不删
                    self._note()
                    keep = sys.maxsize if self._unnoted else self._keep
                    self.saved = checkpoint.save(
                        self.run_dir, model=model, state=state, iteration=iteration, val_loss=val_loss, val_bpb=val_bpb,
                        # 词表取自内存：训练目录里那份是给人看的，坏了不该传进 checkpoint
                        config_text=self._config_text, keep=keep, run=self.run_id,
                        tokenizer_text=json.dumps(self._tokenizer.to_dict(), ensure_ascii=False),
                    )
        except Exception as error:
            # 磁盘满了可以腾，抄到内存里的那一份也可能放不下：训练不必停，只有最后一次存不下才算失败
            if not isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            # MemoryError 多半什么也不说
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        # 存没存下，大家都要知道：再存一次要一起来
        if distributed.broadcast(reason) is None:
            self.saved_at, self._retry_at = iteration, None
            return
        if reason and final:
            raise ConfigError(
                "the last checkpoint could not be saved ({reason}); the newest one is {checkpoint}; free some disk "
                "space and continue with {resume}",
                reason=reason, resume=self.resuming, checkpoint=self.saved.name if self.saved else "-",
            )
        self._try_later(reason)

    def note_loss(self, *, val_loss: float, val_bpb: float | None) -> None:
        """Note in the newest checkpoint the loss of an evaluation that was not made before it was saved."""
        reason = None
        if not distributed.rank():
            self._unnoted = self.saved, val_loss, val_bpb
            reason = self._note()
        if reason := distributed.broadcast(reason):
            self._try_later(reason)

    def _note(self) -> str | None:
        """Note the loss that is left to be noted, if there is one; why it could not be done."""
        if not self._unnoted:
            return None
        at, *losses = self._unnoted
        try:
            noted = at.evaluated(*losses)
        except OSError as error:
            if not at.folder.is_dir():
                # 有人删了它：没有什么要护着的了
                self._unnoted = None
            return error.strerror or str(error)
        self.saved, self._unnoted = noted if self.saved is at else self.saved, None
        return None

    def _try_later(self, reason: str | None) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        self._console.line(
            "could not save a checkpoint ({reason}); the older ones are kept, trying again in {seconds} s; free some "
            "disk space",
            reason=reason, seconds=RETRY_S,
        )

    def remedy(self, rate: float, *, best: bool) -> str:
        """What to type: go on from the last (or best) checkpoint at a lower rate, or begin again without one."""
        found = checkpoint.checkpoints(self.run_dir)
        if not found:
            return text(
                "nothing has been saved yet; start again with a lower rate: learning_rate={rate:.1e}", rate=rate,
            )
        evaluated = checkpoint.best_of(found) if best else None
        chosen = evaluated or found[-1]
        which = "" if chosen.iteration == found[-1].iteration else f" checkpoint={chosen.name}"
        line = "remedy_best" if evaluated else "remedy_last"
        return text(line, checkpoint=chosen.name, resume=self.resuming, which=which, rate=rate)
