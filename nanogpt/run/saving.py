"""What of a training goes into its checkpoints, and how a training continues from one."""

# 训练里有哪些东西要进 checkpoint，怎样从里面接着走，使续训与不间断的训练逐位相同
# state_of 列出权重之外下一步所依赖的一切；存不下（磁盘满、内存不够）时报一行，过一会儿再试
# loop 与 session 用它；文件的格式、校验与保留几份在 weights/checkpoint

import json
import time

from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.hashed_json import reason_of
from nanogpt.base.language import ConfigError
from nanogpt.core import distributed
from nanogpt.core.progress import Progress
from nanogpt.data.tokens import ORDERS
from nanogpt.weights import checkpoint

# 存不下时过这么久再试：磁盘腾出来就存上，又不至于每步都卡在写盘上
RETRY_S = 60


def state_of(trainer) -> dict:
    """Everything besides the weights that the next iteration depends on."""
    return {
        "progress": vars(trainer.progress).copy(), "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.precision.scaler.state_dict(), "fingerprint": trainer.data.fingerprint,
        "order": trainer.order,
    }


def save(trainer, *, final: bool) -> None:
    """Write a checkpoint; a failed one is reported, tried again later and, unless it was the last chance, survived."""
    if distributed.rank():
        return
    cfg, progress = trainer.cfg, trainer.progress
    try:
        trainer.saved = checkpoint.save(
            trainer.run_dir, model=trainer.model, state=state_of(trainer), iteration=progress.iteration,
            # 两次评估之间存的没有验证损失：最好的只能是评估过的那一份
            val_loss=progress.val_loss if trainer.evaluated_at == progress.iteration else None,
            # 词表取自内存：训练目录里那份是给人看的，坏了不该传进 checkpoint
            config_text=trainer.config_text,
            tokenizer_text=json.dumps(trainer.data.tokenizer.to_dict(), ensure_ascii=False), keep=cfg.keep,
            run=trainer.run_id,
        )
        trainer.retry_at = None
    except Exception as error:
        # 磁盘满了可以腾，抄到内存里的那一份也可能放不下：训练不必停，只有最后一次存不下才算失败
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        # MemoryError 多半什么也不说
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        if final:
            older = trainer.saved.name if trainer.saved else "-"
            raise ConfigError(
                "the last checkpoint could not be saved ({reason}); the newest one is {checkpoint}; free some disk "
                "space and continue with {resume}",
                reason=reason, resume=trainer.resuming, checkpoint=older,
            ) from None
        trainer.retry_at = time.monotonic() + RETRY_S
        trainer.console.line(
            "could not save a checkpoint ({reason}); the older ones are kept, trying again in {seconds} s; free some "
            "disk space",
            reason=reason, seconds=RETRY_S,
        )


def overdue(trainer) -> bool:
    """Whether it is time to try again what could not be saved."""
    return trainer.retry_at is not None and time.monotonic() >= trainer.retry_at


def restore(trainer, source: checkpoint.Checkpoint) -> None:
    """Continue from a checkpoint: weights and optimizer in the present memory= settings, scaler, position, counters."""
    state = source.load_state()
    try:
        if state["fingerprint"] != trainer.data.fingerprint:
            raise ConfigError("vocab_mismatch", name=trainer.data.name, reason="fingerprint")
        source.load_model(trainer.model)
        # 先装权重：状态的格式要看参数是 fp32 还是 bf16
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.precision.scaler.load_state_dict(state["scaler"])
        trainer.progress = Progress(**state["progress"])
        # 早先的 checkpoint 没有这一项：次序照旧，接着训才逐位一致
        trainer.order = state.get("order", 1)
        if trainer.order not in ORDERS:
            raise ValueError(f"order {trainer.order}")
    except ConfigError:
        raise
    except checkpoint.UNFIT as error:
        if is_out_of_memory(error):
            raise
        # 摘要对得上、内容却合不上：换了优化器，或者不是这个程序写的
        raise source.damaged(f"state: {reason_of(error)}") from None
    trainer.saved = source
