"""Stop a training that no longer makes sense: skipped steps, values that are not finite, divergence.

Each of these ends the run with one line before anything bad reaches a checkpoint, and names where to go on from.
"""

# 看一次训练还有没有意义：连着跳过的步、不是有限数的权重、比乱猜还差的损失
# loop 在开始、每次更新、评估、存盘时各问一次；不行就抛出 Diverged，一句话说清从哪里接着、学习率降到多少
# 坏的状态绝不进 checkpoint：存之前先查，查出就停，上一份好的还在
# 多进程时各进程用同样的数做同样的决定，不必再通信

import math
from collections import deque
from collections.abc import Callable

from nanogpt.base.language import ConfigError
from nanogpt.core import distributed
from nanogpt.core.progress import Progress
from nanogpt.weights.tensors import first_not_finite, floating

# 最近这么多步里，多半的训练损失高于“乱猜”才算发散：偏高的学习率开头也会冲上去十几步，但会自己下来
RUNAWAY_STEPS = 100
# 高出这么多 nat 才算：随机数据、刚初始化的模型就在乱猜的水平上下浮动
RUNAWAY_MARGIN = 0.5


class Diverged(ConfigError):  # noqa: N818 - 与 OutOfMemory 一样，是一种结局
    """The training cannot go on in a useful way; the line says where to continue from and how."""

    # 单独一类：试跑据此判为 crashed，而不是配置写错


def broken_tensor(model, optimizer) -> str | None:
    """Name of the first weight or optimizer state that holds NaN or Inf, None when all are finite."""
    state = optimizer.state_dict()
    # 分片的只看得见自己的行：谁发现了，大家都要知道
    return distributed.first_found(
        first_not_finite([*floating(model.state_dict()), *floating(state.get("state", state), "optimizer.")])
    )


class Health:
    """Watches over the weights and the losses of a training; every process decides alike, from the same numbers."""

    # 只看数，不改训练的步子；要存进 checkpoint 的计数在 Progress 里，续训时才接得上

    def __init__(
        self, model, optimizer, progress: Progress, *, max_nonfinite_steps: int, partial_updates: bool = False,
        say: Callable[..., None], remedy: Callable[[bool], str],
    ):
        """partial_updates: a step may have changed some parameters before a bad gradient is met (in the backward pass).

        say(line, **values) shows a line; remedy(best) says how to go on from the last or the best checkpoint.
        """
        self.model, self.optimizer, self.progress = model, optimizer, progress
        self.max_nonfinite_steps, self.partial_updates = max_nonfinite_steps, partial_updates
        self.say, self.remedy = say, remedy
        self.lowest = math.inf
        """Smallest training loss of a step since this process began."""
        self.absurd: deque[bool] = deque(maxlen=RUNAWAY_STEPS)
        """Whether each of the latest steps was worse than guessing and than every one before it."""
        self.uniform = math.log(model.config.vocab_size)
        """Loss of guessing every token with the same probability, nats."""

    def before_start(self) -> None:
        """Refuse to train from weights or states that are not finite."""
        # 旧版本存下的、别人给的权重都可能已经坏了
        if tensor := broken_tensor(self.model, self.optimizer):
            raise Diverged(
                "{tensor} is not finite in what this run starts from; choose another checkpoint=… (best, or an older "
                "iter_…) or another init_from",
                tensor=tensor,
            )

    def before_save(self) -> None:
        """Refuse to write a checkpoint with weights or optimizer states that are not finite: they never heal."""
        self._require_finite(self.progress.iteration)

    def _require_finite(self, iteration: int) -> None:
        if tensor := broken_tensor(self.model, self.optimizer):
            raise Diverged(
                "iter {iteration}: {tensor} is not finite any more and cannot recover; this state is not saved; "
                "{remedy}",
                iteration=iteration, tensor=tensor, remedy=self.remedy(False),
            )

    def after_update(self, loss: float, norm: float, *, iteration: int, healing: bool) -> None:
        """Count a step (`iteration`, from 1) whose loss or gradient norm is not finite, and stop at too many in a row.

        `healing` says that an fp16 overflow has just lowered the loss scale: that is no fault, but no good step either.
        """
        progress = self.progress
        if math.isfinite(loss) and math.isfinite(norm):
            progress.nonfinite_in_a_row = 0
            self._compare_with_guessing(loss)
            return
        # 权重或状态坏了就不会好：不必等够次数
        self._require_finite(iteration)
        if healing:
            return
        progress.nonfinite_steps += 1
        progress.nonfinite_in_a_row += 1
        what = "gradient" if math.isfinite(loss) else "loss"
        # 反向里边走边更新：其余参数已经更新，跳过的只有坏梯度的那些
        partly = what == "gradient" and self.partial_updates
        line = "nonfinite_partly" if partly else "nonfinite"
        self.say(line, iteration=iteration, what=what, count=progress.nonfinite_in_a_row)
        if progress.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise Diverged(
                "{count} steps in a row were not finite; {remedy}",
                count=progress.nonfinite_in_a_row, remedy=self.remedy(False),
            )

    def after_evaluation(self, loss: float) -> bool:
        """Whether a validation loss is a number; one that is not counts as no evaluation."""
        if math.isfinite(loss):
            return True
        iteration = self.progress.iteration
        self._require_finite(iteration)
        self.say(
            "iter {iteration}: the validation loss is not finite although every weight is; this evaluation does not "
            "count",
            iteration=iteration,
        )
        return False

    def _compare_with_guessing(self, loss: float) -> None:
        """Stop when most of the latest losses are above that of guessing and above every earlier one.

        Gradient clipping hides a divergence of this kind: every step stays finite. A pretrained model may
        begin above it (text in another language); going up from there is what counts.
        """
        self.lowest = min(self.lowest, loss)
        # 续训时这一程的最低值还不可靠，参考存下来的最好验证损失
        known = min(self.lowest, self.progress.best_val_loss)
        self.absurd.append(loss > max(self.uniform, known) + RUNAWAY_MARGIN)
        if sum(self.absurd) > RUNAWAY_STEPS // 2:
            raise Diverged(
                "{count} of the last {steps} steps had a training loss above that of guessing ({uniform:.2f}; now "
                "{loss:.2f}), which had been lower before: the run has diverged; {remedy}",
                loss=loss, count=sum(self.absurd), steps=RUNAWAY_STEPS, uniform=self.uniform,
                remedy=self.remedy(True),
            )
