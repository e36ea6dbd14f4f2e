"""The trainer of a trial: the same steps, but running out of memory is its result and is not repaired."""

# 试跑用的训练器：步子与真的训练一样，只是显存不足时不把微批改小，而是当作结果报出去
# 由 child 交给 run/session 的 build_trial 来造；评估与样本只为量出它们的显存峰值

from nanogpt.core.machine import any_kernels
from nanogpt.core.sampling import sampler
from nanogpt.run.loop import Training
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
