"""Chat templates: a conversation as the text and the ids that a model reads, and which of them are its answers."""

# 对话 -> 模型读的文字与 id：模板是 tokenizer.chat_template 里的 Jinja 原文，导入的模型用自己的，没有的用这里的 TEMPLATE
# 模板是别人文件里的数据：只在 jinja2 的沙箱里跑，碰不到 Python 的对象与文件
# 哪些字是回答，由“问到这里”与“答完这一句”两次渲染的差得来：不要求模板写 {% generation %}
# 会改写前文的模板（Qwen3 丢掉从前的思考），一段对话就拆成几个样本：每一个都与写作时读到的逐字相同
# 内容里写着 <|im_end|> 也只是普通文字：插一个记号拆开它，编码之前再拿掉

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nanogpt.base.language import ConfigError, first_line
from nanogpt.data.labels import grown
from nanogpt.data.tokenizer import END_OF_TEXT, CharTokenizer, LibraryTokenizer, Tokenizer, begin_of, from_dict

ROLES = ("system", "user", "assistant")
# role 与 content
Message = dict[str, str]
# 每一句前面一个 token 说是谁，后面一个结束符：字符词表也装得下，不必有冒号与换行；词表不能变大的，角色写成普通文字
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# 有开头 token 的词表，前面加上它
BEGIN = "{{ bos_token }}"
# Unicode 保留、不会是文字的码点
MARK = "\ufdd0"


def with_template(tokenizer: Tokenizer, *, grow: bool) -> Tokenizer:
    """The tokenizer with a chat template: its own, else ours.

    A new vocabulary grows by a token for the end and one for each role; with grow=False (that of a pretrained model)
    roles that it has no token for are written as ordinary text.
    """
    if grow:
        tokenizer = grown(tokenizer, [END_OF_TEXT, *(f"<|{role}|>" for role in ROLES)])
    else:
        tokenizer = from_dict(tokenizer.to_dict())
    if tokenizer.chat_template is None:
        words = {token: word for word, token in tokenizer.special.items()}
        if tokenizer.end_of_text not in words:
            raise ConfigError(
                "dataset=chat: this vocabulary ({kind}) has neither a chat template nor an end of text; choose "
                "dataset.tokenizer=char, byte, gpt2 or bpe, or another init_from",
                kind=tokenizer.kind,
            )
        begin = words.get(next(iter(begin_of(tokenizer)), None), "")
        template = BEGIN + TEMPLATE if begin else TEMPLATE
        tokenizer.chat_template = {
            "template": template, "bos_token": begin, "eos_token": words[tokenizer.end_of_text],
        }
    end = turn_end(tokenizer)
    if isinstance(tokenizer, LibraryTokenizer) and end not in (tokenizer.end_of_text, *tokenizer.other_ends):
        # 底座模型的结尾是 <|endoftext|>，对话却以 <|im_end|> 结束：导出的也要知道
        tokenizer.other_ends = (*tokenizer.other_ends, end)
    return tokenizer


# ---- 渲染 ----


@functools.lru_cache(maxsize=4)
def _compiled(source: str):
    # 启动时用不着：jinja2 要用才载入
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # transformers 的 {% generation %}：只标出回答，文字不变
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(reason: str):
        raise ValueError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    # 不给今天的日期（strftime_now）：同样的对话任何一天都是同样的文字
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def rendered(tokenizer: Tokenizer, messages: Iterable[Message], *, asking: bool = False) -> str:
    """The text of a conversation; `asking` adds the head of an answer. ConfigError says why the template refuses it."""
    chat = tokenizer.chat_template
    try:
        return _compiled(chat["template"]).render(
            messages=[{**message, "content": _guarded(tokenizer, message["content"])} for message in messages],
            add_generation_prompt=asking, tools=None, documents=None, bos_token=chat["bos_token"],
            eos_token=chat["eos_token"],
        )
    except Exception as error:
        # 模板来自陌生人，渲染时什么都可能抛出来
        raise ConfigError("chat_refused", reason=first_line(error)) from None


def _guarded(tokenizer: Tokenizer, content: str) -> str:
    """The content with a mark inside of every word that would be a special token."""
    found = _special(tokenizer)
    return found.sub(lambda word: word[0][0] + MARK + word[0][1:], content) if found else content


def _special(tokenizer: Tokenizer) -> re.Pattern | None:
    words = sorted(tokenizer.special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def encoded(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a rendered text, and the place in it at which each begins, both (n,)."""
    if isinstance(tokenizer, LibraryTokenizer) and MARK not in text:
        # 库自己认特殊 token：它们两边的空白、开头的 ▁，各家有各家的规矩
        return tokenizer.encode_places(text, special=True)
    ids, starts, at = [], [], 0
    for word in [*(_special(tokenizer) or re.compile("(?!)")).finditer(text), None]:
        part = text[at : word.start() if word else len(text)]
        places = np.array([at + i for i, c in enumerate(part) if c != MARK], dtype=np.int64)
        found, begins = _plain(tokenizer, part.replace(MARK, ""))
        ids += [found]
        starts += [places[begins]]
        if word:
            ids += [[tokenizer.special[word[0]]]]
            starts += [[word.start()]]
            at = word.end()
    return np.concatenate(ids).astype(np.int64), np.concatenate(starts).astype(np.int64)


def _plain(tokenizer: Tokenizer, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text without special tokens, and the character in which each begins."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.encode_places(part, special=False)
    ids = tokenizer.encode(part)
    # 每个 token 的字节固定：数到第几个字节，就知道在第几个字
    begins = np.cumsum([0, *(len(tokenizer.token_bytes(int(token))) for token in ids)])[:-1]
    sizes = np.cumsum([len(c.encode("utf-8", errors="replace")) for c in part])
    return ids, np.searchsorted(sizes, begins, side="right")


# ---- 回答 ----


@dataclass(frozen=True)
class Sample:
    """Ids of a conversation or of its beginning, (n,), and which of them are answers, (n,) bool, ends included."""

    # 一段对话通常是一个样本；模板会改写前文时，每个回答一个

    ids: np.ndarray
    answers: np.ndarray


def samples(tokenizer: Tokenizer, messages: list[Message]) -> list[Sample]:
    """What is trained on of a conversation: every answer, behind what the template puts before it when it is written.

    The end of an answer is a special token and is trained on; what the template puts behind it is not.
    """
    found: list[tuple[str, list[tuple[int, int]]]] = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, told = rendered(tokenizer, messages[:k], asking=True), rendered(tokenizer, messages[: k + 1])
        # 有的模板在问到这里时已替模型写下 <think>：从两者分开的地方算起
        start = next((i for i, (one, other) in enumerate(zip(asked, told)) if one != other), min(len(asked), len(told)))
        if start < len(asked) and start < len(rendered(tokenizer, messages[:k])):
            raise ConfigError("chat_refused", reason="an answer changes what stands before it")
        before = found.pop() if found and asked.startswith(found[-1][0]) else ("", [])
        found.append((told, [*before[1], (start, len(told))]))
    return [_sample(tokenizer, *one) for one in found]


def _sample(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> Sample:
    ids, starts = encoded(tokenizer, text)
    special, answers = np.isin(ids, list(tokenizer.special.values())), np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        inside = np.flatnonzero((starts >= start) & (starts < end))
        ends = np.flatnonzero(special[inside])
        if not len(ends):
            raise ConfigError("chat_refused", reason="no special token ends an answer")
        answers[inside[: ends[0] + 1]] = True
    return Sample(ids, answers)


def written_with(tokenizer: Tokenizer, messages: list[Message]) -> list[Message]:
    """The messages without the characters that a character vocabulary lacks."""
    if not isinstance(tokenizer, CharTokenizer):
        return messages
    known = frozenset(tokenizer.characters)
    return [{**m, "content": "".join(filter(known.__contains__, m["content"]))} for m in messages]


def turn_end(tokenizer: Tokenizer) -> int:
    """The special token with which every answer ends."""
    # 字符词表里未必有 1；空的内容，有的模板会整句略去
    word = tokenizer.characters[-1:] if isinstance(tokenizer, CharTokenizer) else "1"
    (last,) = samples(tokenizer, [{"role": "user", "content": word}, {"role": "assistant", "content": word}])
    return int(last.ids[last.answers][-1])


def question_ids(tokenizer: Tokenizer, messages: list[Message]) -> np.ndarray:
    """What the model reads before it answers, (n,)."""
    return encoded(tokenizer, rendered(tokenizer, messages, asking=True))[0]
