"""The trainer of a trial: the same steps, but running out of memory is its result and is not repaired."""

# 试跑用的训练器：步子与真的训练一样，只是显存不足时不把微批改小，而是当作结果报出去
# 由 child 交给 run/session 的 build_trial 来造；评估与样本只为量出它们的显存峰值
# 学的试跑用 LearningTrainer，它在末尾多看一眼验证部分

from typing import Any

from nanogpt.base.config import TrainConfig
from nanogpt.core.machine import any_kernels
from nanogpt.core.sampling import sampler
from nanogpt.data.opening import open_data
from nanogpt.run.loop import Training
from nanogpt.run.summary import keep_summary
from nanogpt.write.engine import write_sample


class TrialTrainer(Training):
    """A Training that never takes smaller micro-batches than it was asked to."""

    # 继承而不是另写：量到的必须就是训练要走的那些步

    def shrink(self, detail: str) -> None:
        # 缩小后再量，量到的就不是问的那个设置了
        raise MemoryError(detail)

    def evaluate(self, *told) -> float:
        """Mean loss over the validation windows, at the batch size that was asked for."""
        asked = self.eval_batch
        loss = super().evaluate(*told)
        if self.eval_batch != asked:
            raise MemoryError(f"out of memory while evaluating {asked} rows (eval_batch_size)")
        return loss

    def evaluate_once(self) -> float:
        """Mean loss over one batch of windows: as much memory as the whole evaluation, a fraction of its time."""
        self.windows = self.windows[: self.eval_batch]
        return self.evaluate()

    def short_sample(self, tokens: int) -> None:
        """Write and forget a text, for the memory that it takes."""
        if not tokens:
            return
        with any_kernels():
            write_sample(
                self.model, self.data.tokenizer, self.sample_prompt(), tokens,
                sampler=sampler(temperature=self.cfg.sample_temperature), seed=self.cfg.seed,
            )


# 最后看一眼验证部分，用这么多 token：只看一次，看得准些；慢的模型少看些，至多是一次评估的 LOOK 倍
VALIDATION_TOKENS, LOOK = 2**18, 8


def looks(cfg: TrainConfig, summary: dict[str, Any]) -> bool:
    """Whether a training that ended with this summary looks at the validation split that holdout hides."""
    ended = cfg.lr_decay_iters in (None, summary["iters"]) or summary["stopped_by"] == "early_stop"
    return bool(cfg.holdout) and ended and summary["stopped_by"] != "interrupted"


class LearningTrainer(TrialTrainer):
    """The trainer of a trial that learns; at its very end it looks once at the validation split that holdout hides."""

    # 挑选只用留出的那份；这个数在全部挑完之后才用，说给人听

    def fit(self) -> dict:
        """Train, and add what it reaches on the validation split to the summary."""
        summary, cfg = super().fit(), self.cfg
        if looks(cfg, summary):
            self.data = open_data(self.data.folder, cfg.label_dropout, cache_gib=cfg.cache_data_gib)
            if cfg.eval_stride:
                self.data.slide(cfg.eval_stride, self.block_size)
            tokens = min(VALIDATION_TOKENS, LOOK * cfg.eval_tokens) if cfg.eval_tokens else VALIDATION_TOKENS
            self.windows = self.data.val_windows(self.block_size, tokens)
            loss, bits = self.evaluate(), self.data.bits_per_byte(self.windows)
            summary["validation"] = {"val_loss": loss, "val_bpb": bits and bits * loss}
            # 记下它才算训完：停在这之前的，下次再看
            keep_summary(self.saver.run_dir, summary, self.console)
        return summary
