"""Trains a byte-level BPE vocabulary on a text with the `tokenizers` library."""

# 在自己的文字上学一份 BPE 词表（dataset.tokenizer=bpe）：合并规则由 tokenizers 库来学，编码仍用 BPETokenizer
# 字节在前、合并在后、次序不变，得到的与 GPT-2 是同一个类，存取与导出就不必另写
# 只该看训练部分的文字：验证里的词也拿来学，验证损失就偏低（由各 prepare.py 负责）

import re
from collections.abc import Iterable, Iterator

from nanogpt.base.language import ConfigError, say
from nanogpt.data.tokenizer import GPT2_PATTERN, BPETokenizer, byte_letters, bytes_of_letters

# 256 个字节之上至少要有一些合并；上限是 uint16 放得下的
SMALLEST, LARGEST = 300, 65000

PART = 2**14
# 非空白之间的单个空格之前、单个换行之后，汉字与逗号句号之间：在这里切开，切出的词一个也不变
# 连着的空白里切开就会变
WORDS_END = re.compile(r"\S(?= \S)|\S\n(?=\S)|[\u4e00-\u9fff](?=[，。])")


def check_vocab_size(got) -> None:
    """Refuse a vocabulary size that is not an integer or is out of range."""
    if isinstance(got, bool) or not isinstance(got, int) or not SMALLEST <= got <= LARGEST:
        raise ConfigError("out_of_range", key="dataset.vocab_size", got=got, wanted=f"{SMALLEST} … {LARGEST}")


def parts(piece: str) -> Iterator[str]:
    """The piece in parts of about PART characters, between which no word of GPT2_PATTERN lies."""
    # 库为一段文字里的每个字节记下出处，要几十倍的内存：段短就少
    start = 0
    while found := WORDS_END.search(piece, start + PART):
        yield piece[start : found.end()]
        start = found.end()
    yield piece[start:]


def train_bpe(pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
    """At most vocab_size tokens: the 256 bytes and the most frequent merges, fewer if the text yields no more."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("missing_package", what="dataset.tokenizer=bpe", package="tokenizers") from None
    say("training a vocabulary of {vocab:,} tokens …", vocab=vocab_size)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=sorted(byte_letters()),
        special_tokens=[],
    )
    library.train_from_iterator((part for piece in pieces for part in parts(piece)), trainer)
    vocab = library.get_vocab()
    byte_of = bytes_of_letters()
    tokens = [bytes(byte_of[letter] for letter in word) for word in sorted(vocab, key=vocab.__getitem__)]
    # 库给字节的编号按字母表；换成字节值本身，合并的次序不变
    ordered = [bytes((i,)) for i in range(256)] + [token for token in tokens if len(token) > 1]
    return BPETokenizer("bpe", GPT2_PATTERN, {token: rank for rank, token in enumerate(ordered)}, {})
