"""What guidance costs: the perplexity of real texts under the guided model."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nanogpt.data.documents import DocumentData
from nanogpt.write.loading import Model

# 验证部分至多用这么多 token，均匀取样；各 guidance 用同一批，差别因此可比
MOST_TOKENS = 50_000
# 一次前向的 token 数
AT_ONCE = 8192
# 一次算出的 logits
CHUNK_BYTES = 2**28


@torch.inference_mode()
def guided_perplexity(model: Model, data: DocumentData, guidances: Sequence[float], *, limit: int | None = MOST_TOKENS) -> list[float]:
    """Perplexity per token of the validation documents at each guidance, teacher-forced, without any sampling.

    A token's probability is softmax(u + g (c - u)): c are the logits behind the document's labels, u those without any. So
    g = 1 is the model's own validation loss, exponentiated, and g = 0 that of the same texts without labels.
    """
    sums, count = torch.zeros(len(guidances), dtype=torch.float64), 0
    for c, u, targets in _logits(model, data, limit):
        for i, guidance in enumerate(guidances):
            mixed = torch.lerp(u, c, guidance)
            sums[i] += torch.nn.functional.cross_entropy(mixed, targets, reduction="sum").double().cpu()
        count += len(targets)
    return [math.exp(total / count) for total in sums.tolist()]


def _logits(model: Model, data: DocumentData, limit: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits with labels and without, both (N, V) float32, and their targets (N,), in pieces."""
    network = model.network
    T, V = network.config.block_size, network.config.vocab_size
    rows = [start for start, _ in data.val_windows(T, limit)]
    batch = max(1, AT_ONCE // T)
    # 全部 logits 可能有几 GB：一次只算这么多个位置的
    piece = max(1, CHUNK_BYTES // (4 * V))
    for first in range(0, len(rows), batch):
        starts = np.array(rows[first : first + batch])
        hidden = []
        for labelled in (True, False):
            x, y = (t.to(network.device) for t in data.rows("val", starts, T, labelled=labelled))
            with model.context():
                hidden.append(network.hidden(x)[y >= 0])
        # 两种行里的目标一一对应，次序相同，只是位置错开了标签那几格
        targets = y[y >= 0]
        for at in range(0, len(targets), piece):
            with model.context():
                c, u = (network.logits(h[at : at + piece]).float() for h in hidden)
            yield c, u, targets[at : at + piece]
