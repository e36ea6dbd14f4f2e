"""Opens a prepared data set folder as what it holds: running text, documents or conversations."""

# 三种数据各有一个类，给训练的接口相同：是哪一种，由 meta.json 说

from pathlib import Path

from nanogpt.data.conversations import ConversationData
from nanogpt.data.documents import DocumentData
from nanogpt.data.tokens import CACHE_GIB, TokenData, read_meta


def open_data(
    folder: Path, label_dropout: float = 0.0, *, verify: bool = False, cache_gib: float = CACHE_GIB
) -> TokenData:
    """Open a data set folder; the labels of documents are dropped with probability label_dropout.

    Files that were checked before and have not changed since are read whole again only with `verify`. Files of the
    training split that lie elsewhere take up to cache_gib of the local cache.
    """
    meta = read_meta(Path(folder))
    if "conversations" in meta:
        return ConversationData(folder, verify=verify)
    if "documents" in meta:
        return DocumentData(folder, label_dropout, verify=verify)
    return TokenData(folder, verify=verify, cache_gib=cache_gib)
