"""Labels of documents (style, emotion) as special tokens of a vocabulary, such as <|style:宋词|>."""

# 文章的标签（体裁、情感）在词表里的写法：一个特殊 token，如 <|style:宋词|>
# 自己的词表为每个标签长出一个 token；别人的词表大小不能变，标签就当普通文字写，占好几个 id
# documents 把它们放在文章前面，control=codes 写作时照样放；导出、读别人的文件夹时由名字认回来

import re

from nanogpt.base.language import ConfigError, joined
from nanogpt.data.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, Labels, Tokenizer, from_dict

# 文章可以有的标签种类
LABEL_KINDS = ("style", "emotion")
# 标签 token 的写法；由它也能从别人保存的词表里认出标签
LABEL = re.compile(rf"<\|({'|'.join(LABEL_KINDS)}):(.+)\|>")
# 诗词曲的体裁：段数与每段字数 -> 近体诗的四种；数据集与评判认的是同一套
FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}
CI, QU = "宋词", "元曲"


def label_word(kind: str, name: str) -> str:
    """The special token that stands for a label, for example <|style:宋词|>."""
    return f"<|{kind}:{name}|>"


def with_labels(tokenizer: Tokenizer, names: dict[str, list[str]], *, grow: bool) -> Tokenizer:
    """The tokenizer with an end of text and with `labels` for all names of each kind.

    A new vocabulary grows by one special token for each label. With grow=False (the vocabulary of a pretrained model,
    which must keep its size), a label that it lacks is written as ordinary text.
    """
    if grow:
        words = [END_OF_TEXT, *(label_word(kind, name) for kind, listed in names.items() for name in listed)]
        tokenizer = grown(tokenizer, words)
    else:
        # 另做一个：模型自己的词表不因这份数据而变
        tokenizer = from_dict({**tokenizer.to_dict(), "labels": {}})
    if tokenizer.end_of_text is None:
        raise ConfigError(
            "dataset: documents need a vocabulary with an end of text, this one ({kind}) has none; choose "
            "dataset.tokenizer=char, byte, gpt2 or bpe, or init_from a model that was trained on documents",
            kind=tokenizer.kind,
        )
    for kind, listed in names.items():
        tokenizer.labels[kind] = {name: _label_ids(tokenizer, kind, name) for name in listed}
    return tokenizer


def _label_ids(tokenizer: Tokenizer, kind: str, name: str) -> tuple[int, ...]:
    """The special token of a label, else its word as text."""
    word, special = label_word(kind, name), getattr(tokenizer, "special", {})
    if word in special:
        return (special[word],)
    try:
        return tuple(tokenizer.encode(word).tolist())
    except ConfigError:
        # 字符词表里多半没有 < 与 |：只能用它已有的标签
        have = joined(labels_in(special).get(kind, {})) or "-"
        raise ConfigError(
            "{kind}={got}: the model of init_from has no token for this label and no characters to write it with; use "
            "its own labels ({have}), or train without init_from",
            kind=kind, got=name, have=have,
        ) from None


def grown(tokenizer: Tokenizer, words: list[str]) -> Tokenizer:
    """A new tokenizer with these special tokens behind the existing ids."""
    special = list(dict.fromkeys([*tokenizer.special, *words]))
    if isinstance(tokenizer, CharTokenizer):
        return CharTokenizer(tokenizer.characters, tuple(special))
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenizer(tuple(special))
    assert isinstance(tokenizer, BPETokenizer), "only vocabularies of our own grow"
    first = tokenizer.vocab_size
    new = {word: first + i for i, word in enumerate(w for w in special if w not in tokenizer.special)}
    return BPETokenizer(tokenizer.name, tokenizer.pattern, tokenizer.ranks, {**tokenizer.special, **new})


def labels_in(special: dict[str, int]) -> Labels:
    """The labels among the words of special tokens."""
    found: Labels = {}
    for word, token in special.items():
        if match := LABEL.fullmatch(word):
            found.setdefault(match[1], {})[match[2]] = (token,)
    return found


def label_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids of the special tokens that stand for labels; labels that are ordinary text have none."""
    # 当普通文字写的标签，没有词表会用一个 token 写完
    return sorted({ids[0] for listed in tokenizer.labels.values() for ids in listed.values() if len(ids) == 1})
