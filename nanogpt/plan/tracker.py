"""A dispatch mode below FakeTensorMode that follows every storage and counts the work of every operation."""

# 追踪的最底层：每个运算都经过这里，记下新出现与释放的 storage，数出它的 FLOPs 与读写的字节
# 上半是一次运算的代价（flops_of、traffic_of、workspace_of），下半是 Tracker 本身
# 活着与否靠 storage 的弱引用，与真实运行同样的时刻释放；编号而不用地址，因为地址会被再用
# FakeTensorMode 很慢，还为此导入 sympy 与 torch.distributed.tensor；_compute 里的几条捷径让一次追踪快几倍，
# 结果必须与不走捷径相同

import math
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

# ---- 一次运算的代价 ----

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# 建张量而不写它，或只改形状：不花时间
UNTOUCHED = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "_local_scalar_dense",
}
# RTX 3060 的 SM 数：确定性的 flash 反向按它决定要几份 dq
SM_COUNT = 28
FLASH_TILE = 128


def is_free(func, made_storage: bool) -> bool:
    """Whether an operation only makes a view or reserves memory."""
    name = func._schema.name
    if name.rpartition("::")[2] in UNTOUCHED:
        return True
    # 这几种运算只要没有造出新的 storage，就没有搬动字节
    changes_nothing = func.is_view or name.endswith(("::_to_copy", "::detach", "::lift_fresh"))
    return not made_storage and not func._schema.is_mutable and bool(changes_nothing)


def product(*sizes: int) -> int:
    """FLOPs of a matrix product: two per multiply-add."""
    return 2 * math.prod(sizes)


def flops_of(func, args, out) -> tuple[int, bool]:
    """(floating-point operations in products, whether on 16-bit units); element-wise work counts as traffic only."""
    packet = func._overloadpacket
    if packet in (aten.mm, aten.bmm):
        a, b = args[0], args[1]
        return product(*a.shape, b.shape[-1]), a.dtype in HALF
    if packet in (aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_):
        a, b = args[1], args[2]
        return product(*a.shape, b.shape[-1]), a.dtype in HALF
    name = packet.__name__
    if "scaled_dot_product" in name:
        q, k = (args[1], args[2]) if name.endswith("backward") else (args[0], args[1])
        causal = any(a is True for a in args) or q.size(-2) == k.size(-2)
        # 前向两次乘积，反向重算一次再加四次；因果的一半被跳过
        flops = (5 if name.endswith("backward") else 2) * product(*q.shape, k.size(-2))
        return flops // 2 if causal else flops, q.dtype in HALF
    return 0, False


def nbytes(t: torch.Tensor) -> int:
    """Bytes that reading a tensor touches; a broadcast one touches its storage only."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def traffic_of(func, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes read and written by one operation."""
    name = func._schema.name.rpartition("::")[2]
    written = sum(map(nbytes, outputs))
    if name in ("embedding", "gather", "index", "index_select"):
        # 只读用到的行，不读整张表
        return 2 * written
    if name in ("zeros", "zeros_like", "ones", "full", "fill_", "zero_", "normal_", "scatter_add_"):
        return written
    read = sum(map(nbytes, inputs))
    if func._schema.is_mutable and not outputs:
        # 融合的优化器：四份张量读，三份写回
        return 2 * read - sum(nbytes(t) for t in inputs[: len(inputs) // 4])
    return read + written


def workspace_of(func, args) -> int:
    """Scratch bytes of the CUDA kernel that an attention backward stands for, 0 for other operations.

    Assumes deterministic=true.
    """
    name = func._overloadpacket.__name__
    if not ("scaled_dot_product" in name and name.endswith("backward")):
        return 0
    q = args[1]
    B, nh, T, hs = q.shape
    if q.dtype not in HALF:
        return B * nh * T * 4
    rows = math.ceil(T / FLASH_TILE) * FLASH_TILE
    width = math.ceil(hs / 32) * 32
    # dq 用 fp32 累加；要求确定性时，SM 多于 (行 × head) 就分成几份再相加
    parts = math.ceil(SM_COUNT / (B * nh))
    return parts * B * nh * rows * width * 4 + B * nh * rows * 4


# (运算, 参数的形状) -> 结果的形状；与模型、设备无关，各次追踪共用
_REMEMBERED: dict[tuple, tuple] = {}


class Tracker(TorchDispatchMode):
    """Follows storages and counts work; sits inside a FakeTensorMode."""

    # events 是 (编号, ±字节) 的流水，ops 是各种代价出现的次数；take 一次就是一个阶段

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode
        self.events: list[tuple[int, int]] = []
        self.ops: Counter = Counter()
        self.ids: dict[int, tuple[weakref.ref, int, int]] = {}
        self.host: set[int] = set()
        self.count = 0
        self._recorded: dict[tuple, tuple[list[tuple[int, int]], Counter, int]] = {}
        # 同样的活只追踪一遍，按这么多遍计
        self.times = 1
        # 此刻新出现的 storage 是否在显卡旁边的 RAM 里
        self.in_ram = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            # 三分之二的调用只是在问设备：不必绕一大圈
            return args[0].fake_device
        before = self.count
        out = self._compute(func, args, kwargs or {})
        outputs = tensors_in(out)
        for t in outputs:
            self.follow(t)
        if is_free(func, self.count > before):
            return out
        inputs = tensors_in((*args, *kwargs.values()) if kwargs else args)
        if workspace := workspace_of(func, args):
            self.count += 1
            self.events += [(self.count, workspace), (self.count, -workspace)]
        over_pcie = self._over_pcie(inputs)
        flops, half = flops_of(func, args, out)
        self.ops[(flops, 0 if over_pcie else traffic_of(func, inputs, outputs), half, over_pcie)] += self.times
        return out

    def _compute(self, func, args, kwargs):
        """func(*args, **kwargs); of new tensors what depends on shapes alone is remembered."""
        schema = func._schema
        if schema.is_mutable:
            # 原地运算没有值可算，结果就是被写的那一个
            if not schema.returns:
                return None
            written = args[0] if schema.name.endswith("_") else kwargs.get("out")
            # 空的 out= 会变大
            known = isinstance(written, torch.Tensor) and (written is args[0] or written.numel() > 0)
            return written if known and len(schema.returns) == 1 else func(*args, **kwargs)
        if (func.is_view or func is aten._unsafe_view.default) and isinstance(args[0], FakeTensor):
            # 视图与原来的共用 storage：在它自己身上算
            with in_kernel_invocation_manager(self.mode):
                return self._as_fake(func(*args, **kwargs), args[0].fake_device)
        # 不写 dtype 的 torch.empty 随默认类型而变：bf16 权重就是这样造出来的
        key = (func, torch.get_default_dtype(), _signature(args), _signature(tuple(kwargs.items())))
        try:
            known = _REMEMBERED.get(key)
        except TypeError:
            return func(*args, **kwargs)
        if known is not None:
            new = [_fresh(self.mode, one) for one in known[1]]
            return new if known[0] else new[0]
        mark = self.count
        out = self._on_meta(func, args, kwargs)
        several = isinstance(out, (tuple, list))
        made = out if several else [out]
        if self.count == mark and self._are_fresh(made):
            _REMEMBERED[key] = several, [(t.shape, t.stride(), t.dtype, t.fake_device) for t in made]
        return out

    def _are_fresh(self, made) -> bool:
        # 只记全新的：别的结果下次不能凭空造出来
        if not all(isinstance(t, FakeTensor) and t.storage_offset() == 0 for t in made):
            return False
        places = {t.untyped_storage()._cdata for t in made}
        return len(places) == len(made) and not places & self.ids.keys()

    def _on_meta(self, func, args, kwargs):
        """func(*args, **kwargs) by its kernel for meta tensors, or by FakeTensorMode where shapes do not suffice."""
        inputs = tensors_in((*args, *kwargs.values()))
        device = kwargs.get("device") or (inputs[0].device if inputs else None)
        if device is None or not all(isinstance(t, FakeTensor) and t.constant is None for t in inputs):
            return func(*args, **kwargs)
        try:
            with torch._C._DisableTorchDispatch():
                out = func(*_twin(args), **_twin(kwargs))
        except RuntimeError:
            # 没有 meta 的实现，或要看数值：由它去算，或由它去说
            return func(*args, **kwargs)
        return self._as_fake(out, device)

    def _as_fake(self, out, device: torch.device):
        if isinstance(out, (tuple, list)):
            return [self._as_fake(t, device) for t in out]
        return FakeTensor(self.mode, out, device) if isinstance(out, torch.Tensor) else out

    def follow(self, t: torch.Tensor) -> int:
        """The id of a tensor's storage; its allocation is noted when it is new."""
        storage = t.untyped_storage()
        key = storage._cdata
        known = self.ids.get(key)
        if known is not None and known[0]() is not None:
            return known[1]
        self.count += 1
        number, size = self.count, storage.nbytes()
        self.ids[key] = (weakref.ref(storage, lambda _, key=key, number=number: self._freed(key, number)), number, size)
        if self.in_ram:
            self.host.add(number)
        elif size:
            self.events.append((number, size))
        return number

    def resized(self, t: torch.Tensor) -> None:
        """Note that the storage of a tensor has another size than before."""
        number, storage = self.follow(t), t.untyped_storage()
        ref, _, before = self.ids[storage._cdata]
        if (size := storage.nbytes()) == before:
            return
        self.ids[storage._cdata] = (ref, number, size)
        self.events += [(number, change) for change in (-before, size) if change]

    def _freed(self, key: int, number: int) -> None:
        # 地址可能已被新的 storage 占用，那一条不能删
        known = self.ids.get(key)
        if known is None or known[1] != number:
            return
        del self.ids[key]
        if number not in self.host and known[2]:
            self.events.append((number, -known[2]))

    def repeated(self, key, compute: Callable[[], object]) -> None:
        """compute(), which keeps nothing; with a key that was seen before, what it did then is written down again."""
        if (known := self._recorded.get(key)) is not None:
            events, ops, made = known
            self.events += [(self.count + number, size) for number, size in events]
            self.ops.update(ops)
            self.count += made
            return
        start, mark, before = self.count, len(self.events), self.ops.copy()
        compute()
        events = [(number - start, size) for number, size in self.events[mark:]]
        # 留下或放掉了别的（第一次才造的表）：下次仍照做
        if all(number > 0 for number, _ in events) and sum(size for _, size in events) == 0:
            self._recorded[key] = events, self.ops - before, self.count - start

    def live(self) -> dict[int, int]:
        """Bytes of every live storage by id."""
        return {number: size for ref, number, size in self.ids.values() if ref() is not None}

    def take(self) -> list[tuple[int, int]]:
        """The events so far; starts a new list."""
        events, self.events = self.events, []
        return events

    def take_ops(self) -> Counter:
        """The work so far; starts from nothing."""
        ops, self.ops = self.ops, Counter()
        return ops

    def _over_pcie(self, inputs: list[torch.Tensor]) -> int:
        """Bytes that an operation moves between RAM and the card, 0 unless it has tensors on both sides."""
        if not self.host:
            return 0
        places = {self.follow(t) in self.host for t in inputs}
        return max(t.numel() * t.element_size() for t in inputs) if len(places) == 2 else 0


def _signature(value):
    """A key of what shapes depend on; tensors by shape, strides and type."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    # True == 1 而 hash 也相同：连类型一起记
    return (type(value), value)


def _twin(value):
    """The same arguments with plain meta tensors for fake ones: kernels for these ask nobody what they are."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {key: _twin(one) for key, one in value.items()}
    return type(value)(map(_twin, value)) if isinstance(value, (tuple, list)) else value


def _fresh(mode: FakeTensorMode, known: tuple) -> torch.Tensor:
    """A new tensor without storage that looks as an earlier result did."""
    shape, stride, dtype, device = known
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device)


def tensors_in(value) -> list[torch.Tensor]:
    """All tensors in a tensor, a list or nested lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_in(item)]
    return []
