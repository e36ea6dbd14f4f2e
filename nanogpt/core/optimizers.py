# AdamW 与 Muon：一个类，三条更新公式；哪些参数归哪条，由 adamw() 与 muon() 分组时定下（rule）
# 状态按参数的名字存，checkpoint 打开就能读懂；8 位、放在 RAM 里的状态由 core/memory 从外面包上来
# 凡有 param_groups、step、zero_grad、state_dict、load_state_dict 的都能当优化器，torch.optim 的也行
# 组里的 lr_scale 乘在学习率上
"""Optimizers: AdamW and Muon over named parameters, and which parameters go where."""

from dataclasses import fields

import torch

from nanogpt.base.config import AdamWConfig, MuonConfig
from nanogpt.core import kernels
from nanogpt.core.kernels import orthogonalized, update_scale
from nanogpt.core.tables import FRESH_NGRAM_SCALE, ROW_AVG_SQ, embedding_scale, from_adamw, update_table

# 同形状的矩阵一起正交化：小模型快数倍，大模型不为此多占显存
STACK_BYTES = 64 * 2**20
# 8 位的状态另有一份 scale，名字是状态的名字加上它
SCALE = "_scale"
RANGES = {one.name: one.metadata["range"] for schema in (AdamWConfig, MuonConfig) for one in fields(schema)}
ADAMW_STATES = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Base of ours: groups of named parameters, state kept by name, so that a checkpoint is readable.

    A group's `rule` is adamw, muon or rows. Not a torch.optim.Optimizer, whose first use imports torch._dynamo (3 s).
    """

    takes_factor = False
    """Whether step() takes a factor for the gradients."""
    stack_bytes = STACK_BYTES

    def __init__(self, groups: list[dict]):
        # 每组：params、names、rule、states、lr、lr_scale、weight_decay，余下由各个 rule 定义
        self.param_groups = [group for group in groups if group["params"]]
        self.state: dict[str, dict[str, torch.Tensor]] = {}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        # 置 None 而不是清零：省一次写，峰值显存也低
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict:
        """State tensors by parameter name (not copies)."""
        return {"state": self.state}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict returned."""
        by_name = {name: p for g in self.param_groups for name, p in zip(g["names"], g["params"], strict=True)}
        if set(state["state"]) - set(by_name):
            raise ValueError(
                "optimizer: the checkpoint's state belongs to other parameters; "
                "resume with the same model and optimizer"
            )
        for name, tensors in state["state"].items():
            for key, tensor in tensors.items():
                # 形状不对的状态要到更新时才出事，那时参数已改了一半
                values = {"step": 1, ROW_AVG_SQ: by_name[name].shape[:1].numel()}.get(key, by_name[name].numel())
                if not key.endswith(SCALE) and tensor.numel() != values:
                    raise ValueError(f"optimizer: {key} of {name} has {tensor.numel()} values")
        by_rows = {name for group in self.param_groups if group["rule"] == "rows" for name in group["names"]}
        saved = {n: from_adamw(self, t, by_name[n]) if n in by_rows else t for n, t in state["state"].items()}
        self.state = {name: self.converted(tensors, by_name[name]) for name, tensors in saved.items()}

    def converted(self, saved: dict[str, torch.Tensor], p: torch.Tensor) -> dict[str, torch.Tensor]:
        """A checkpoint's states of p where p lies."""
        return {key: tensor.to(p.device) for key, tensor in saved.items()}

    def start(self, state: dict[str, torch.Tensor], key: str, p: torch.Tensor) -> None:
        """Add a state of zeros of p under `key`."""
        state[key] = torch.zeros_like(p)

    def started(self, name: str, p: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
        """The states of a parameter, zeros at first."""
        state = self.state.setdefault(name, {})
        for key in group["states"]:
            if key not in state and key in ("step", ROW_AVG_SQ):
                shape = () if key == "step" else (len(p), 1)
                state[key] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            elif key not in state:
                self.start(state, key, p)
        return state

    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate every state that is not there yet, before the first step.

        Allocated between the temporaries of the first update they would tear the card's memory to pieces for good.
        """
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                self.started(name, p, group)

    @torch.no_grad()
    def step(self, *, skip: torch.Tensor | None = None, factor: torch.Tensor | None = None) -> None:
        """Update every parameter that has a gradient.

        skip () is 1.0 where nothing may change; factor () multiplies the gradients, only where `takes_factor`.
        """
        for group in self.param_groups:
            named = zip(group["names"], group["params"], strict=True)
            self.update(group, [(name, p) for name, p in named if p.grad is not None], skip=skip, factor=factor)

    def update(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        """Update (name, parameter) pairs of a group from their gradients."""
        for portion in kernels.portions(named, self.stack_bytes) if group["rule"] == "muon" else [named]:
            getattr(self, group["rule"])(group, portion, skip=skip, factor=factor)

    def adamw(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        """One AdamW update."""
        states = [self.started(name, p, group) for name, p in named]
        if states:
            moments = tuple([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            kernels.adamw([p for _, p in named], [p.grad for _, p in named], moments, group, skip)

    def rows(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        """One update of look-up tables (rows, cols): see kernels.update_rows()."""
        for name, p in named:
            update_table(p, self.started(name, p, group), group, skip)

    def muon(self, group: dict, named: list[tuple[str, torch.Tensor]], *, skip=None, factor=None) -> None:
        """One Muon update (Jordan 2024; scaled as in Moonlight, arXiv:2502.16982) of matrices.

        It is orthogonalised Nesterov momentum times 0.2 * sqrt(max(rows, cols)), whose RMS is that of an AdamW update,
        so one learning rate serves both.
        """
        momenta = [self.started(name, p, group)["momentum"] for name, p in named]
        gradients = [p.grad for _, p in named]
        if skip is not None:
            # 坏的一步：拿动量当梯度，动量就一位不动，方向也仍是有限数；梯度用完就丢，写在原处
            for momentum, gradient in zip(momenta, gradients, strict=True):
                torch.where(skip > 0, momentum, gradient, out=gradient)
        # foreach：显卡上几十个矩阵一次启动；CPU 上就是逐个做
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        # Nesterov：向前多看一步
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        del gradients
        weights, updates, scales = self.directions(group, named, ahead)
        del ahead
        kept = 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            for update in updates:
                update.masked_fill_(skip > 0, 0.0)
            kept = torch.where(skip > 0, 1.0, kept)
        torch._foreach_mul_(weights, kept)
        by_scale: dict[float, list[int]] = {}
        for i, scale in enumerate(scales):
            by_scale.setdefault(scale, []).append(i)
        for scale, indices in by_scale.items():
            kernels.subtract([weights[i] for i in indices], [updates[i] for i in indices], group["lr"] * scale)

    def directions(self, group: dict, named: list, ahead: list[torch.Tensor]) -> tuple[list, list, list]:
        """Matrices inside named weights, and `ahead` of each orthogonalised, with the scale of that update."""
        splits = [group["splits"].get(name) or [len(p)] for name, p in named]
        parts = [part for matrix, rows in zip(ahead, splits, strict=True) for part in matrix.split(rows)]
        weights = [part for (_, p), rows in zip(named, splits, strict=True) for part in p.detach().split(rows)]
        return weights, orthogonalized(parts, group), [update_scale(part.shape) for part in weights]


def split_parameters(model: torch.nn.Module) -> tuple[list, list, list]:
    """Return (matrices inside blocks, embeddings and head, vectors), each a list of (name, parameter)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.dim() == 2 and name.startswith("h.")]
    tables = [(name, p) for name, p in trained if p.dim() > 2 or (p.dim() == 2 and not name.startswith("h."))]
    return matrices, tables, [(name, p) for name, p in trained if p.dim() < 2]


def joined_rows(model: torch.nn.Module) -> dict[str, list[int]]:
    """Rows of the matrices inside each weight of the blocks that holds several: q, k, v; gate and up of SwiGLU."""
    c = model.config
    rows = {"attn.c_attn.weight": [heads * c.head_size for heads in (c.n_head, c.kv_heads, c.kv_heads)]}
    if c.activation == "swiglu":
        rows["mlp.c_fc.weight"] = [c.mlp_width] * 2
    named = ((name, p, rows.get(name.split(".", 2)[-1])) for name, p in model.named_parameters())
    # 各自正交化：合在一起的只有一个谱，会互相牵制；使用者自己的层可以有别的形状
    return {name: sizes for name, p, sizes in named if sizes and p.dim() == 2 and sum(sizes) == len(p)}


def _group(named: list, **settings) -> dict:
    return {"names": [n for n, _ in named], "params": [p for _, p in named], "lr": 0.0, **settings}


def _check(**values: float) -> None:
    for key, value in values.items():
        if value not in RANGES[key]:
            raise ValueError(f"optimizer.{key}={value} is out of range; it must be {RANGES[key]}")


def adamw(model: torch.nn.Module, *, weight_decay: float, beta1: float, beta2: float, eps: float) -> Optimizer:
    """AdamW on everything; only matrices and embeddings are decayed."""
    _check(beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps)
    matrices, tables, vectors = split_parameters(model)
    shared = {"betas": (beta1, beta2), "eps": eps, "lr_scale": 1.0, "rule": "adamw", "states": ADAMW_STATES}
    # bias 与归一化的增益不衰减：它们不参与矩阵乘，缩小没有正则意义
    decayed = _group(matrices + tables, weight_decay=weight_decay, **shared)
    return Optimizer([decayed, _group(vectors, weight_decay=0.0, **shared)])


def muon(
    model: torch.nn.Module, *, weight_decay: float, momentum: float, ns_steps: int,
    embedding_lr_scale: float | None, head_lr_scale: float, ngram_lr_scale: float | None, beta1: float,
    beta2: float, eps: float, head_weight_decay: float | None = None,
) -> Optimizer:
    """Muon on the blocks' matrices, each row of tables and untied embedding by its own mean square, else AdamW.

    ngram_lr_scale None is 3, head_weight_decay None is 0, embedding_lr_scale None what embedding_scale() says.
    """
    tied = model.config.tie_embeddings
    ngram_lr_scale = FRESH_NGRAM_SCALE if ngram_lr_scale is None else ngram_lr_scale
    embedding_lr_scale = embedding_scale(model.config) if embedding_lr_scale is None else embedding_lr_scale
    # 早先的训练没有这一项，接着训也不衰减
    head_weight_decay = head_weight_decay or 0.0
    _check(
        beta1=beta1, beta2=beta2, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps, eps=eps,
        embedding_lr_scale=embedding_lr_scale, head_lr_scale=head_lr_scale, ngram_lr_scale=ngram_lr_scale,
        head_weight_decay=head_weight_decay,
    )
    matrices, tables, vectors = split_parameters(model)
    shared = {"betas": (beta1, beta2), "eps": eps, "weight_decay": 0.0, "rule": "adamw", "states": ADAMW_STATES}
    kinds = ("lm_head", "ngrams", "wte")
    head, ngrams, embedding = ([(n, p) for n, p in tables if n.startswith(kind)] for kind in kinds)
    positions = [(n, p) for n, p in tables if not n.startswith(kinds)]
    by_rows = {**shared, "rule": "rows", "states": ("step", ROW_AVG_SQ)}
    groups = [
        _group(
            matrices, rule="muon", states=("momentum",), lr_scale=1.0, weight_decay=weight_decay, momentum=momentum,
            ns_steps=ns_steps, ns_bf16=False, splits=joined_rows(model),
        ),
        _group(embedding, lr_scale=embedding_lr_scale, **(shared if tied else by_rows)),
        _group(positions, lr_scale=1.0, **shared),
        _group(ngrams, lr_scale=ngram_lr_scale, **by_rows),
        _group(head, lr_scale=head_lr_scale, **{**shared, "weight_decay": head_weight_decay}),
        _group(vectors, lr_scale=1.0, **shared),
    ]
    return Optimizer(groups)
