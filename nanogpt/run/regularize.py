# 文字少、读的遍数多，模型就会背诵：n-gram 表背得最快，大模型也快
# 所以 model.ngrams、dropout、optimizer.ngram_lr_scale 为 null 时，由预算读几遍文字、block 多大来定
# optimizer.head_weight_decay 还看每个 token 在文字里出现几次
# optimizer.embedding_lr_scale 为 null 时，看是不是从头训练
# 定下的数写进配置，续训与写作照着它；命令行上写了的不动
# 仍然背了起来的，early_stop_evals=null 时由 past_turn 叫停：宁可晚停，不停会好起来的
"""What a run takes against learning its text by heart, where the person leaves it open."""

import math
from dataclasses import replace

from nanogpt.base.config import (
    ALL_NGRAMS,
    PASSES,
    ModelConfig,
    TrainConfig,
    block_parameters,
    span_of,
    tokens_per_step,
)
from nanogpt.core.progress import Progress
from nanogpt.core.tables import FRESH_NGRAM_SCALE, embedding_scale

# 字符读一遍，表都占便宜；再多，n 越大的表越早只剩下背诵：5 读 2 遍还留着，4 到 4 遍，3 到 8 遍，2 到 16 遍
# 这是 SMALL 个 block 参数的模型；更大的自己就学得会，遍数按参数之比的 LARGER 次方折算
PASSES_OF_2, SMALL, LARGER = 16, 0.8e6, 0.75
# 以上量自英文的字符；一个 token 越有内容，同样的 n 背下的越多：n 按词表的对数折算，BPE 4096 的 2 当作字符的 4
# 读一遍时也照此折算：BPE 4096 的 2 与 3 最好，27 万与 150 万个 token 都是（ablate.py parts_bpe、once）
CHARACTERS = 65
# 从差不多读两遍起，表学得慢些更好：一遍时 3 倍好 0.026，两遍时相当，四遍以上 1 倍才能多留一张表
TWICE = 1.75
# 从读这么多遍起丢弃，每翻一倍多丢 0.05；都量自 benchmarks/ablate.py held_back 与 held_back_small
FRESH, EACH_DOUBLING, MOST_DROPOUT = 2, 0.05, 0.3
# 词表大、block 也大的，要丢得更多：词表的对数每多一倍多丢这么多倍，block 到 SMALL 的四倍为止逐渐加上
# model=tiny 读 8 遍：BPE 4096 的剧本与一百万字节的诗 0.2 好于 0.1，五百万字节的诗 0.15 最好
# 4/4/128 读 BPE 4096 的剧本，却是 0.1 最好（ablate.py dropout、dropout_*、large_texts）
RICH = 2 / 3
# 比 model=small 还大的 block，每大到 LARGER_BY 倍多丢一份：medium 读 8 遍一百万个英文字符，
# 0.1 在途中 1.407 就掉头，到底是 1.453，0.2 到底 1.402；4 遍五百万字节的诗，0.2 好于 0.09（large_texts）
LARGE, LARGER_BY = 10.7e6, 8
# 词表大、文字短、block 也大的，先把文字背下来的是输出层：每个 token 只见过几十次，它却各有一整行权重
# model=tiny 读 8 遍 6 万、12 万与 35 万字的诗：不衰减到底是 6.80、6.20 与 5.42，衰减 3 是 5.95、5.53 与 5.10，
# 途中几乎不掉头（ablate.py head_decay；最后一份一个种子）；small 读 6 万字，6.96 与 6.25（head_decay_small）
# GPT-2 的词表、25 万个字符的剧本，每个 token 只出现一两次：5.25 与 4.82，衰减 8 是 4.78（各一个种子）
# 只读一遍的，衰减 1 就差 0.07；4/4/128 读 8 遍 BPE 4096 也用不着，3 差 0.15
# 英文的字符每个出现几千次，更用不着
EACH_DECAY, MOST_DECAY, SELDOM = 1.5, 6.0, 60
# 每读完一遍，验证损失会跳高百分之一二再回来；学习率降完时也拿得回这么多：高出 5% 才算升了
# 连着这么多次都高，最好的又在预算的这么一份之前，才停
RISEN, RISEN_EVALS, RISEN_SHARE = 0.05, 4, 0.2
# 评估的 token 少时，要高出这么多个标准误；一个 token 的损失，标准差与均值差不多
ERRORS = 4


def passes_of(cfg: TrainConfig, text_tokens: int, steps: int | None = None) -> float:
    """How many times the training reads its text.

    `steps` is what the time of the budget is good for; where that is not known, a budget in time alone counts as the
    most passes that max_tokens=auto takes.
    """
    known = [count for count in (span_of(cfg).iters, steps) if count is not None]
    if not known:
        return PASSES
    # 学习率要到更远处才降完的，是打算接着训：照那里算，搜索的每一级、每个种子也就是同一个配方
    return max(min(known), cfg.lr_decay_iters or 0) * tokens_per_step(cfg) / max(1, text_tokens)


def counts_time(cfg: TrainConfig) -> bool:
    """Whether something is left to the number of passes and that depends on how fast the training is."""
    left = (cfg.optimizer.get(key, 0) for key in ("ngram_lr_scale", "head_weight_decay"))
    return bool(cfg.max_minutes) and not cfg.init_from and None in (cfg.model.ngrams, cfg.model.dropout, *left)


def held_back(cfg: TrainConfig, text_tokens: int, steps: int | None = None) -> TrainConfig:
    """The config with ngrams, dropout, the optimizer's scales of the learning rate and its decay of the output layer
    filled in; text_tokens of the training split, 0: unknown; steps: see passes_of()."""
    model, passes = cfg.model, passes_of(cfg, text_tokens, steps) if text_tokens else 0.0
    if model.ngrams is None:
        model = replace(model, ngrams=tables_for(passes, block_parameters(model), model.vocab_size))
    if model.dropout is None:
        # 训练过的权重学得慢，也背得慢：微调照旧从 0 起，要多少由人写
        model = replace(model, dropout=0.0 if cfg.init_from else dropout_of(model, passes))
    optimizer = cfg.optimizer
    if "ngram_lr_scale" in optimizer and optimizer["ngram_lr_scale"] is None:
        optimizer = {**optimizer, "ngram_lr_scale": FRESH_NGRAM_SCALE if passes < TWICE else 1.0}
    if "head_weight_decay" in optimizer and optimizer["head_weight_decay"] is None:
        decay = 0.0 if cfg.init_from or not text_tokens else head_decay_of(model, passes, text_tokens)
        optimizer = {**optimizer, "head_weight_decay": decay}
    if "embedding_lr_scale" in optimizer and optimizer["embedding_lr_scale"] is None:
        optimizer = {**optimizer, "embedding_lr_scale": embedding_scale(model, fresh=not cfg.init_from)}
    return replace(cfg, model=model, dropout=model.dropout, optimizer=optimizer)


def decided(cfg: TrainConfig) -> dict[str, object]:
    """What held_back() fills in against learning by heart, by the keys that set it; None: still open."""
    decay = cfg.optimizer.get("head_weight_decay", 0.0)
    return {"dropout": cfg.model.dropout, "model.ngrams": cfg.model.ngrams, "optimizer.head_weight_decay": decay}


def tables_for(passes: float, parameters: int, vocabulary: int | None = None) -> list[int]:
    """Sizes n of the n-gram tables of a model with so many parameters in its blocks, for a text read so many times, of
    so many different tokens; None: characters."""
    # 只读一遍背不下来，block 再大也一样；但一个 token 内容多的，长的 n 几乎不重复，留着只是白算
    scaled = passes * max(1.0, parameters / SMALL) ** LARGER if round(passes) > 1 else 1.0
    each = content_of(vocabulary)
    # 界线在两档的几何平均处
    return [n for n in ALL_NGRAMS if scaled < math.sqrt(2) * PASSES_OF_2 / 2 ** (n * each - 2)]


def content_of(vocabulary: int | None) -> float:
    """How much a token of such a vocabulary says, in English characters; None: characters."""
    return max(1.0, math.log(vocabulary or CHARACTERS, CHARACTERS))


def dropout_of(model: ModelConfig, passes: float) -> float:
    """Dropout of a model whose text is read so many times: EACH_DOUBLING for each doubling beyond FRESH passes, up to
    twice that where a token says more than a character and the blocks have room to learn it by heart, and twice that
    again where the blocks are eight times those of model=small."""
    richness = 1 + RICH * (content_of(model.vocab_size) - 1) * room_of(model)
    size = 1 + max(0.0, math.log(block_parameters(model) / LARGE, LARGER_BY))
    return round(min(MOST_DROPOUT, EACH_DOUBLING * richness * size * doublings_of(passes)), 2)


def head_decay_of(model: ModelConfig, passes: float, text_tokens: int) -> float:
    """Weight decay of the output layer of a model that reads so many tokens so many times: EACH_DECAY for each doubling
    beyond FRESH passes where a token occurs SELDOM times in the text, less where it occurs more often and where the
    blocks have less room to learn it by heart."""
    # 与 embedding 共享权重的，不是这样量的
    if model.tie_embeddings or not model.vocab_size:
        return 0.0
    occurs = text_tokens / model.vocab_size
    return round(min(MOST_DECAY, EACH_DECAY * doublings_of(passes)) * min(1.0, SELDOM / occurs) * room_of(model), 2)


def doublings_of(passes: float) -> float:
    """How many times the passes over a text have doubled since FRESH, up to which it is as good as new."""
    return math.log2(max(passes, FRESH) / FRESH)


def room_of(model: ModelConfig) -> float:
    """How much room the blocks have to learn by heart what tokens that say much have to say, 0 … 1."""
    return min(1.0, max(0.0, math.log(block_parameters(model) / SMALL, 4)))


def has_risen(loss: float, best: float, train_loss: float, targets: int) -> bool:
    """Whether a validation loss over so many targets is clearly above the best one: the text is learned by heart."""
    # 训练损失也高的不是背诵，是一时不稳：多半会回来
    margin = max(1.0, best) * max(RISEN, ERRORS / math.sqrt(targets))
    return train_loss < best < loss - margin


def past_turn(progress: Progress, eval_interval: int, spent: float) -> bool:
    """Whether a training that has used up this share of its budget would only get worse."""
    back = progress.since_best(eval_interval) / progress.iteration * spent
    return progress.evals_risen >= RISEN_EVALS and back >= RISEN_SHARE
