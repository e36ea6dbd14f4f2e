"""Mean loss over fixed validation windows, in batches that shrink where memory runs out; the value stays the same."""

from collections import defaultdict

import numpy as np
import torch

from nanogpt.base.errors import OutOfMemory, is_out_of_memory, release
from nanogpt.core import distributed


@torch.no_grad()
def mean_loss(trainer) -> float:
    """Mean cross-entropy over trainer.windows, shared among the processes."""
    trainer.model.eval()
    by_length = defaultdict(list)
    for start, length in trainer.windows[distributed.rank() :: distributed.world()]:
        # 末尾的窗口可能短一截：同样长的才能拼成一批
        by_length[length].append(start)
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    for length, starts in by_length.items():
        sums += _sums(trainer, starts, length)
    loss_sum, count = distributed.total(sums).tolist()
    return loss_sum / count


def _sums(trainer, starts: list[int], length: int) -> torch.Tensor:
    """(sum of losses, number of targets) of windows of one length, in batches of trainer.eval_batch or fewer."""
    # 累加留在设备上：每批取回一次，GPU 就要停一次
    total = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    again = False
    while starts:
        batch, said = np.array(starts[: trainer.eval_batch]), None
        try:
            total += _loss_sum(trainer, batch, length)
        except Exception as error:
            # 只接住显存不足，其余原样抛出
            if not is_out_of_memory(error):
                raise
            said = str(error)
        if said is None:
            starts, again = starts[len(batch) :], False
            continue
        # 出了 except 才清理：异常的 traceback 还引用着那些张量
        release(trainer.device)
        if len(batch) > 1:
            trainer.eval_batch = (len(batch) + 1) // 2
        elif again:
            raise OutOfMemory("evaluation", rows=1, detail=said)
        else:
            # 单独一条也失败：清理之后再试一次，可能只是碎片
            again = True
    return total


def _loss_sum(trainer, starts: np.ndarray, length: int) -> torch.Tensor:
    x, y = trainer.to_device(*trainer.data.rows("val", starts, length))
    with trainer.precision.context():
        loss = trainer.model.loss(x, y)
    # 标签与行尾的空位（-1）不算
    count = (y >= 0).sum().double()
    return torch.stack((loss.double() * count, count))
