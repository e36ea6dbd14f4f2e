# 文字少、读的遍数多，模型就会背诵，n-gram 表背得最快
# 所以 model.ngrams=null、dropout=null 时，由训练文本与预算来定：读几遍、每个 n-gram 平均出现几次
# 定下的数写进配置，续训与写作照着它；命令行上写了的不动
# 仍然背了起来的，early_stop_evals=null 时由 past_turn 叫停：宁可晚停，不停会好起来的
"""What a run takes against learning its text by heart, where the person leaves it open."""

import math
from dataclasses import replace

import numpy as np

from nanogpt.base.config import ALL_NGRAMS, PASSES, ModelConfig, TrainConfig, span_of, tokens_per_step
from nanogpt.core.progress import Progress

# 一遍之内背不下来，表都占便宜；再多，一种 n-gram 平均每遍要出现这么多次，它的表才留下：少见的 n-gram 在表里几乎独占一行
# 训练超过 LONG 个 token，要求按平方根提高：block 自己也学会了这些，表只剩下背诵
OCCURRENCES, LONG = 2.5, 500_000
# 从读这么多遍起丢弃，每翻一倍多丢 0.05；两处的数都量自 benchmarks/ablate.py turn
FRESH, EACH_DOUBLING, MOST_DROPOUT = 2, 0.05, 0.3
# 数 n-gram 只看开头这么多 token：更长的文字里平均次数只会更高
COUNTED = 2**21
# 每读完一遍，验证损失会跳高百分之一二再回来；学习率降完时也拿得回这么多：高出 5% 才算升了
# 连着这么多次都高，最好的又在预算的这么一份之前，才停
RISEN, RISEN_EVALS, RISEN_SHARE = 0.05, 4, 0.2
# 评估的 token 少时，要高出这么多个标准误；一个 token 的损失，标准差与均值差不多
ERRORS = 4


def passes_of(cfg: TrainConfig, text_tokens: int) -> float:
    """How many times the training reads its text; of a budget in time alone, the most that max_tokens=auto takes."""
    iters = span_of(cfg).iters
    return PASSES if iters is None else iters * tokens_per_step(cfg) / max(1, text_tokens)


def occurrences(tokens: np.ndarray, n: int) -> float:
    """How often an n-gram of the text occurs in it, on average, in at most the first 2M tokens."""
    ids = np.asarray(tokens[:COUNTED]).astype(np.uint64)
    if len(ids) < n:
        return 0.0
    # 溢出时自然回绕：只要不同的 n-gram 几乎总得到不同的数
    key = ids[n - 1 :].copy()
    for back in range(1, n):
        key = key * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1 - back : len(ids) - back]
    return len(key) / len(np.unique(key))


def held_back(cfg: TrainConfig, tokens: np.ndarray | None) -> ModelConfig:
    """The config's model with ngrams and dropout filled in; tokens: the training split, None where not prepared."""
    model, text_tokens = cfg.model, len(tokens) if tokens is not None else 0
    passes = passes_of(cfg, text_tokens) if text_tokens else 0.0
    if model.ngrams is None:
        often = OCCURRENCES * passes * math.sqrt(max(1, passes * text_tokens / LONG))
        kept = [n for n in ALL_NGRAMS if round(passes) <= 1 or occurrences(tokens, n) >= often]
        model = replace(model, ngrams=kept)
    if model.dropout is None:
        # 训练过的权重学得慢，也背得慢：微调照旧从 0 起，要多少由人写
        model = replace(model, dropout=0.0 if cfg.init_from else dropout_for(passes))
    return model


def dropout_for(passes: float) -> float:
    """Dropout for a text that is read so many times: EACH_DOUBLING for each doubling beyond FRESH passes."""
    doublings = math.log2(max(passes, FRESH) / FRESH)
    return round(min(MOST_DROPOUT, EACH_DOUBLING * doublings), 2)


def has_risen(loss: float, best: float, train_loss: float, targets: int) -> bool:
    """Whether a validation loss over so many targets is clearly above the best one: the text is learned by heart."""
    # 训练损失也高的不是背诵，是一时不稳：多半会回来
    margin = max(1.0, best) * max(RISEN, ERRORS / math.sqrt(targets))
    return train_loss < best < loss - margin


def past_turn(progress: Progress, eval_interval: int, spent: float) -> bool:
    """Whether a training that has used up this share of its budget would only get worse."""
    back = progress.evals_without_gain * eval_interval / progress.iteration * spent
    return progress.evals_risen >= RISEN_EVALS and back >= RISEN_SHARE
