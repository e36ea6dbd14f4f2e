# 训练走到了哪里：一步的结果，和存进 checkpoint 的计数
"""What a step reports, and the counters of a training."""

import math
from dataclasses import dataclass

from nanogpt.core.machine import Reading


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; a card may still be computing its numbers, and asking for one waits for it."""

    # 数值先不取：主机问一次，GPU 就停一次

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
class Progress:
    """Everything that changes during training besides tensors; goes into the checkpoint."""

    # 字段的名字写在 checkpoint 里：改了名，旧的训练就接不上

    iteration: int = 0
    """Optimizer steps tried so far."""
    samples_seen: int = 0
    """Sequences drawn so far, all processes together."""
    best_val_loss: float = math.inf
    best_iteration: int | None = None
    """When that was; None before the first evaluation, and from a checkpoint of a version that did not keep it."""
    evals_without_gain: int = 0
    evals_risen: int = 0
    """Latest evaluations in a row that were clearly above best_val_loss; see run.regularize."""
    nonfinite_steps: int = 0
    """Steps skipped in all."""
    nonfinite_in_a_row: int = 0
    val_loss: float | None = None
    """Of the latest evaluation."""
    evaluation_owed: float | None = None
    """Loss of the last step, where the training was told to end although an evaluation was due: with it begins what
    goes on from there."""
    train_s: float = 0.0
    """Seconds in steps, without evaluation and saving, and without the first step of each shape where that compiles."""
    tokens_trained: int = 0
    untimed_tokens: int = 0
    """Those of tokens_trained whose seconds are not in train_s."""
    wall_s: float = 0.0
    """Seconds since the training began, with its evaluations and saves but without the time between two resumes; 0 in a
    checkpoint of a version that did not count them."""

    def since_best(self, eval_interval: int) -> int:
        """Iterations since the best evaluation; an older checkpoint knows only how many brought no gain."""
        # 间隔可以在续训时改，收尾的那次评估也不在整数倍上：记得住就不去推算
        known = self.best_iteration is not None
        return self.iteration - self.best_iteration if known else self.evals_without_gain * eval_interval

    def measure_anew(self) -> None:
        """Forget what earlier evaluations reached: later ones measure something else."""
        self.best_val_loss, self.best_iteration, self.evals_without_gain, self.evals_risen = math.inf, None, 0, 0
