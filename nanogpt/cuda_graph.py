"""One decoding step on a CUDA card as a recorded graph: one launch instead of a few hundred.

Small models at few rows are bound by the launches. Shapes in a graph are fixed, so positions live on
the card and attention looks at a whole bucket of positions, the unfilled ones masked. Every recording
is compared with the plain step once; a card or driver that cannot record goes on without.
"""

import torch

from nanogpt.attention import KVCache
from nanogpt.messages import say

# 注意力按这么多个位置一档：录得少，多看的空位也不多
BUCKET = 128
MAX_ROWS = 32
# 半精度下两种算法的求和次序不同；相差超过这些就不用
TOLERANCE = 0.05


class FixedShapes:
    """Inputs at fixed addresses for `rows` rows that see the first `end` positions of a cache; also runs without a graph."""

    def __init__(self, model, cache: KVCache, rows: int, end: int):
        self.model, self.cache, self.rows, self.end = model, cache, rows, end
        self.idx = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=model.device)

    def set(self, idx: torch.Tensor) -> None:
        """Bring this step's ids and positions to the card."""
        self.idx.copy_(idx)
        self.position.copy_(torch.tensor(self.cache.lengths)[:, None], non_blocking=True)

    def run(self) -> torch.Tensor:
        """Logits (rows, V) of the ids that set() brought; the host's lengths stay as they are."""
        lengths = list(self.cache.lengths)
        self.cache.fixed = (self.position, self.end)
        try:
            return self.model.logits(self.model.hidden(self.idx[:, None], self.cache)[:, -1])
        finally:
            self.cache.fixed = None
            self.cache.lengths = lengths


class GraphStep:
    """Called as step(idx (B,), cache) -> logits (B, V)."""

    max_rows = MAX_ROWS

    def __init__(self, model):
        self.model = model
        self.cache: KVCache | None = None
        self.recorded: dict[tuple[int, int], tuple[FixedShapes, torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits behind idx; writes the cache as the model itself would."""
        if cache is not self.cache:
            # 图里记着缓存的地址：换了缓存就重录
            self.cache, self.recorded = cache, {}
        end = min(-(-(max(cache.lengths) + 1) // BUCKET) * BUCKET, cache.max_length)
        key = (len(idx), end)
        if key not in self.recorded and not self._record(key, idx):
            return self.model.next_logits(idx, cache)
        inputs, graph, logits = self.recorded[key]
        inputs.set(idx)
        graph.replay()
        cache.lengths = [length + 1 for length in cache.lengths]
        # 下一次回放会覆盖它
        return logits.clone()

    def _record(self, key: tuple[int, int], idx: torch.Tensor) -> bool:
        """Record a graph and compare it with the plain step; on any failure give graphs up."""
        try:
            inputs = FixedShapes(self.model, self.cache, *key)
            inputs.set(idx)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # 录制前先跑一遍：cuBLAS 的工作区不能在录制中申请
                plain = inputs.run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = inputs.run()
            graph.replay()
            error = (logits.float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-6)
            if not error.item() < TOLERANCE:
                raise RuntimeError(f"the recorded step differs by {error.item():.2g}")
        except RuntimeError as error:
            # 录不了只是慢一些，不该让写作失败；显存不足也在其内
            say("no_graph", reason=str(error).splitlines()[0])
            self.model.fast_step, self.recorded = None, {}
            return False
        self.recorded[key] = (inputs, graph, logits)
        return True
