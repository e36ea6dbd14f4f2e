# n-gram 表与输入 embedding 怎么训练：公式是 kernels.update_rows，一行一个均方，没有动量
# 下面是 CPU 上只碰该碰的行的那套做法
# 一步只碰到几百行，却要为整张表的梯度清零、求范数、更新，小模型上占一步的七分之一
# RowGradient 留着一块与表同大的和，只加、只清、只读碰到的行；p.grad 就是它，别处照旧可以当普通的梯度用
# 只在单进程、状态不压缩时用（weights.build.build_step 接上）；显卡上读写整张表本来就快，也不必等下标
"""Training of look-up tables: on a CPU a step reads and writes only the rows that it touches."""

import torch

from nanogpt.core import kernels

# 一行一个数，(rows, 1)：不压成 8 位，也不搬去 RAM
ROW_AVG_SQ = "row_avg_sq"
# 学习率的倍数：n-gram 表的，适合只读一遍的文字；从头训练的输入 embedding 的
# 后者从标准差 1 出发，照一倍走，短训练里几乎没动
FRESH_NGRAM_SCALE, FRESH_EMBEDDING_SCALE = 3.0, 30.0


def embedding_scale(config, fresh: bool = True) -> float:
    """What the learning rate of an input embedding is multiplied by, also if it is not `fresh` but trained before."""
    # 与输出层共享的、从 0.02 出发的，一步本来就不小
    large = config.init == "modern" and not config.tie_embeddings
    return FRESH_EMBEDDING_SCALE if fresh and large else 1.0


class RowGradient:
    """The gradient of one table (rows, cols), kept from its first backward pass on and zeroed row by row."""

    most = 0.5
    """Touched rows, repetitions counted, for each of the table's that are still few."""

    def __init__(self):
        self.sum: torch.Tensor | None = None
        self._ids: list[torch.Tensor] = []
        # 自己最后一次写它时的版本：别人也写过，就不知道碰过哪些行了
        # 使用者的模型照普通的办法再查这张表时，autograd 就加进同一块内存
        self._version = 0

    def tensors(self) -> list[torch.Tensor]:
        """What is kept between two steps."""
        return [] if self.sum is None else [self.sum, *self._ids]

    def add(self, table: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Add grad (n, cols) to the rows ids (n,) of the table's gradient."""
        if self.sum is None:
            self.sum = torch.zeros_like(table.detach())
        if table.grad is None:
            # 上一步的梯度已经不要了：它碰过的行清零，其余本来就是 0
            if not self._known:
                self.sum.zero_()
            elif self._ids:
                self.sum.index_fill_(0, self.ids(), 0.0)
            self._ids, self._version, table.grad = [], self.sum._version, self.sum
        self._ids.append(ids)
        known = self._known
        self.add_rows(table.grad, ids, grad)
        self._version = self.sum._version if known else -1

    def add_rows(self, total: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Add grad (n, cols) to the rows ids (n,) of total (rows, cols)."""
        total.index_add_(0, ids, grad)

    @property
    def _known(self) -> bool:
        """Whether nobody else has written to the gradient."""
        return self.sum._version == self._version

    @property
    def few(self) -> bool:
        """Whether the touched rows are known and so few that going through them beats going through the table."""
        return self._known and sum(map(len, self._ids)) <= self.most * len(self.sum)

    def ids(self) -> torch.Tensor:
        """The touched rows (n,), some more than once."""
        # 不去掉重复的：个数要看数值，规划显存的追踪就走不通；重复的算出同样的数，写几遍都一样
        return torch.cat(self._ids)

    def once(self) -> torch.Tensor:
        """The gradient's touched rows (n, cols), zeros in place of repetitions: its norm is that of the gradient."""
        ids = self.ids().sort()[0]
        touched = self.sum.index_select(0, ids)
        touched[1:].masked_fill_((ids[1:] == ids[:-1])[:, None], 0.0)
        return touched

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply the gradient with factor ()."""
        ids = self.ids()
        self.sum.index_copy_(0, ids, self.sum.index_select(0, ids).mul_(factor))
        self._version = self.sum._version


def row_gradient(p: torch.Tensor) -> RowGradient | None:
    """The RowGradient that p's gradient is and that is worth going through; None: an ordinary one."""
    rows = getattr(p, "row_gradient", None)
    return rows if rows is not None and p.grad is rows.sum and rows.few else None


class _LookUp(torch.autograd.Function):
    """table[ids]; the backward pass adds to the table's RowGradient by itself."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        ctx.table = table
        return table.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        ctx.table.row_gradient.add(ctx.table, ids.flatten(), grad.reshape(-1, grad.size(-1)).to(ctx.table.dtype))
        return None, None


def look_up(table: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """table(ids), (..., cols)."""
    weight = table.weight
    # 使用者挂了 hook 的，梯度要经过 autograd
    by_rows = hasattr(weight, "row_gradient") and torch.is_grad_enabled() and not weight._backward_hooks
    return _LookUp.apply(weight, ids) if by_rows and not torch.compiler.is_compiling() else table(ids)


def update_table(p: torch.Tensor, state: dict[str, torch.Tensor], group: dict, skip: torch.Tensor | None) -> None:
    """One update of a table (rows, cols) with the states step () and row_avg_sq (rows, 1)."""
    squares, gradient = state[ROW_AVG_SQ], row_gradient(p)
    if gradient is None:
        kernels.update_rows(p, p.grad, squares, state["step"], group, skip)
    else:
        ids = gradient.ids()
        weights, sums, means = (t.index_select(0, ids) for t in (p, gradient.sum, squares))
        kernels.update_rows(weights, sums, means, state["step"], group, skip)
        p.index_copy_(0, ids, weights)
        squares.index_copy_(0, ids, means)
    state["step"].add_(1 if skip is None else 1 - skip)


def from_adamw(optimizer, saved: dict[str, torch.Tensor], p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The states of a table in a checkpoint, also of one that AdamW trained: its mean squares row by row."""
    # 早先的训练用 AdamW 更新这些表：接着它每行的均方走，动量不要了
    if "exp_avg_sq" not in saved:
        return saved
    squares = saved["exp_avg_sq"]
    if hasattr(optimizer, "storage"):
        # 可能是 8 位的
        squares = optimizer.storage.read(saved, "exp_avg_sq", slice(0, p.numel()), squares.device)
    return {"step": saved["step"], ROW_AVG_SQ: squares.view(p.shape).float().mean(1, keepdim=True)}
