"""One decoding step on a CUDA card as a recorded graph: one launch instead of a few hundred.

Small models at few rows are bound by the launches. Shapes in a graph are fixed, so positions live on
the card and attention looks at a whole bucket of positions, the unfilled ones masked. Every recording
is compared with the same step run plainly; a card or driver that cannot record goes on without.
"""

# 显卡上的一步录成 CUDA graph：小模型、少行时时间花在发射几百个 kernel 上，回放一次只发射一回
# 图里的形状与地址是死的：位置放在显存里，注意力看一整档位置，没填的遮住；行数、长度各按档录，用到才录
# 每次录完都与直接跑的结果比一遍，录不了或对不上就放弃，退回普通的一步，只是慢些
# GraphStep 由 acceleration 装到模型上，模型的 next_logits 每步交给它

import weakref
from collections.abc import Callable

import torch

from nanogpt.base.language import first_line, say
from nanogpt.core.kv_cache import KVCache
from nanogpt.core.machine import on_device
from nanogpt.core.recorded import aside, record

# 位置与行数都按 2 的幂分档：多看的空位、多算的空行不到一倍，而一次录制抵得上几十步
FIRST_BUCKET = 128
MAX_ROWS = 32
# 录的与直接跑的是同一串 kernel，只有求和次序可能不同
TOLERANCE = 0.02


def rounded_up(n: int, first: int, limit: int) -> int:
    """The first of first, 2 first, 4 first … that is at least n, but at most limit."""
    while first < n:
        first *= 2
    return min(first, limit)


class FixedShapes:
    """Inputs at fixed addresses for `rows` rows that see the first `end` positions of a cache.

    It also runs without a graph.
    """

    # 图只认录制时的地址：每步先把数抄到这里，再回放；直接跑也用同一份输入，两边才比得了

    def __init__(self, model, rows: int, end: int):
        self.model, self.rows, self.end = model, rows, end
        self.idx = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=model.device)

    def set(self, idx: torch.Tensor, lengths: list[int]) -> None:
        """Bring this step's ids and positions to the card; rows beyond them count as empty."""
        spare = self.rows - len(lengths)
        self.idx[: len(idx)].copy_(idx)
        self.position.copy_(on_device([*lengths, *[0] * spare], self.position.device)[:, None])

    def run(self, cache: KVCache) -> torch.Tensor:
        """Logits (rows, V) of the ids that set() brought; the host's lengths stay as they are."""
        lengths, cache.lengths = cache.lengths, [0] * self.rows
        cache.fixed = (self.position, self.end)
        try:
            return self.model.logits(self.model.hidden(self.idx[:, None], cache)[:, -1])
        finally:
            cache.fixed, cache.lengths = None, lengths


class GraphStep:
    """Called as step(idx (B,), cache) -> logits (B, V)."""

    # (行数档, 长度档) -> 录好的图；跟着一个缓存走，换了缓存就全部作废

    max_rows = MAX_ROWS

    def __init__(self, model):
        self.model = model
        self.recorded: dict[tuple[int, int], tuple[FixedShapes, Callable[[], None], torch.Tensor]] = {}
        self._cache: Callable[[], KVCache | None] = lambda: None
        self._pool = None

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits behind idx; writes the cache as the model itself would."""
        if cache is not self._cache():
            self._follow(cache)
        rows = rounded_up(len(idx), 1, cache.k.size(1))
        key = rows, rounded_up(max(cache.lengths) + 1, FIRST_BUCKET, cache.max_length)
        if key not in self.recorded and not self._record(key, idx, cache):
            return self.model.next_logits(idx, cache)
        inputs, replay, logits = self.recorded[key]
        inputs.set(idx, cache.lengths)
        replay()
        cache.lengths = [length + 1 for length in cache.lengths]
        # 下一次回放会覆盖它
        return logits[: len(idx)].clone()

    def _follow(self, cache: KVCache) -> None:
        """Record anew for this cache, whose addresses the graphs hold; what was recorded goes with the cache."""
        self.recorded = recorded = {}
        # 池里的图都没了，池也就不能再用：再录进去是断言失败，还会让默认的随机数发生器停在录制中
        self._pool = None
        # 弱引用：旧缓存一释放，录好的图与它们的显存池也一起释放，不必有人记得来清
        self._cache = weakref.ref(cache, lambda _: recorded.clear())

    def _record(self, key: tuple[int, int], idx: torch.Tensor, cache: KVCache) -> bool:
        """Record a graph and compare it with the plain step; on any failure give graphs up."""
        inputs = FixedShapes(self.model, *key)
        try:
            replay, logits, plain = self._captured(inputs, idx, cache)
            self._compare(inputs, replay, logits, plain, idx, cache)
        except RuntimeError as error:
            # 录不了只是慢一些，不该让写作失败；显存不足也在其内
            say(
                "this card records no CUDA graph ({reason}); writing goes on step by step, more slowly",
                reason=first_line(error),
            )
            self.model.fast_step = None
            self.recorded.clear()
            return False
        self.recorded[key] = (inputs, replay, logits)
        return True

    def _captured(
        self, inputs: FixedShapes, idx: torch.Tensor, cache: KVCache
    ) -> tuple[Callable[[], None], torch.Tensor, list[torch.Tensor]]:
        """(replays the graph, its logits, the plain logits of both of `trials`)."""
        with aside(self.model.device):
            # 录制前先跑：cuBLAS 的工作区不能在录制中申请
            plain = [self._plain(inputs, trial, cache) for trial in self._trials(idx)]
        # 一个个回放，用完就拷走：所有的图共用一个显存池
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        replay, logits = record(lambda: inputs.run(cache), self.model.device, self._pool)
        return replay, logits, plain

    def _trials(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two inputs that a recording must tell apart; the real one last, so that the cache ends up with it."""
        return (idx + 1) % self.model.config.vocab_size, idx

    def _plain(self, inputs: FixedShapes, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        inputs.set(idx, cache.lengths)
        return inputs.run(cache)

    def _compare(
        self, inputs, replay, logits: torch.Tensor, plain: list[torch.Tensor], idx: torch.Tensor, cache: KVCache
    ) -> None:
        """RuntimeError unless a replay writes the logits of the plain step, for two inputs."""
        n = len(idx)
        for trial, wanted in zip(self._trials(idx), plain, strict=True):
            # 什么都没录到的图不写 logits：先填 NaN，才看得出来
            logits.fill_(torch.nan)
            inputs.set(trial, cache.lengths)
            replay()
            got, wanted = logits[:n].float(), wanted[:n].float()
            error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()
            if not error < TOLERANCE or not torch.equal(got.argmax(-1), wanted.argmax(-1)):
                raise RuntimeError(f"the recorded step differs by {error:.2g}")
