"""Style and emotion without training: a sentence before the prompt and raised logits for fitting words.

A control is an object with `apply(request, tokenizer) -> request` and `known()`. `PrefixControl` puts a
sentence in front of the prompt, which the model reads and nobody sees, and raises the logits of words that
belong to the emotion (`nanogpt.write.control.words`). Both depend on a model that understands such sentences and words.
"""

# control=prefix 与 control=none：不需要训练的控制，在开头之前放一句读者看不见的话，再给相关的词加分
# prefix 是 conf/control/prefix.yaml 的构造函数；read_form 认出开头里手写的 style:…| 与 emotion:…|
# 语言随开头走，词表写不出的换另一种语言，再不行就略去并说一声；同一句话整个进程只说一次

import re
from dataclasses import dataclass, field, replace
from typing import Any

from nanogpt.base.config import check_range
from nanogpt.base.language import ConfigError, joined, presentable, say
from nanogpt.base.parts import build_part
from nanogpt.data.labels import LABEL_KINDS as KINDS
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.write.control.words import CJK, WordBias, ids_of, word_bias
from nanogpt.write.request import Control, Request

# 用户手写的两种标记，全角半角都收；值里不能有竖线和换行
FORM = re.compile(r"\s*(style|emotion|风格|情绪|情感|心情)\s*[:：]([^|｜\n]*)[|｜]", re.IGNORECASE)
FORM_NAMES = {"风格": "style", "情绪": "emotion", "情感": "emotion", "心情": "emotion"}
# “充满诗意的语言，|”：竖线前顺手打的标点不是内容
TRAILING = " \t\u3000,，.。;；、"
# 同一句话整个进程只说一次：一批一百个开头不该说一百遍
_said: set[tuple] = set()
MOST_SAID = 50


@dataclass(frozen=True)
class NoControl:
    """control=none."""

    # 什么也不改：开头里的 style:…| 也照原样读

    style: str | None = None
    emotion: str | None = None

    def apply(self, request: Request, tokenizer: Tokenizer) -> Request:
        return request

    def known(self, tokenizer: Tokenizer) -> dict[str, list[str]]:
        return {kind: [] for kind in KINDS}


@dataclass(frozen=True)
class Label:
    """A style or emotion with its names and words in each language; the first name stands in the sentence."""

    # conf/control 里写好的那些；别的词也能用，只是没有可以加分的词

    name: str
    names: dict[str, list[str]]
    words: dict[str, list[str]]

    def is_called(self, typed: str) -> bool:
        """Whether `typed` is one of its names."""
        return typed.lower() in {name.lower() for name in self.all_names()}

    def all_names(self) -> list[str]:
        """Every name, in every language."""
        return distinct([self.name, *(n for names in self.names.values() for n in names)])

    def name_in(self, language: str, typed: str) -> str:
        """The typed word where it is in that language, else the first name there."""
        return typed if language_of(typed) == language else self.names[language][0]


@dataclass(frozen=True)
class PrefixControl:
    """A sentence before the prompt for each of style and emotion, and a bias towards their words.

    The language (zh or en) is the prompt's, or that of the typed words where the prompt has no letters.
    What the vocabulary cannot write in that language is taken in the other one, or left out with a line.
    """

    # tells：由 codes 借用时不说话，那边一句话说完

    style: str | None
    emotion: str | None
    strength: float
    """Added to the logits of the words' next tokens, nats."""
    templates: dict[str, dict[str, str]]
    labels: dict[str, list[Label]]
    bias: bool = True
    tells: bool = True
    """Whether it says what it has no words for or had to leave out."""

    def apply(self, request: Request, tokenizer: Tokenizer) -> Request:
        asked = {kind: typed for kind in KINDS if (typed := getattr(self, kind))}
        if not asked:
            return request
        first = language_of(request.prompt, *asked.values())
        languages = (first, "en" if first == "zh" else "zh")
        prefix = "".join(self._sentence(kind, typed, languages, tokenizer) for kind, typed in asked.items())
        biases = [b for kind, typed in asked.items() if (b := self._words(kind, typed, languages, tokenizer))]
        sampler = request.sampler
        # 倒着套：排在前面的种类，阶段也在前面
        for bias in reversed(biases):
            sampler = bias.before(sampler)
        return replace(request, prefix=prefix, sampler=sampler)

    def known(self, tokenizer: Tokenizer) -> dict[str, list[str]]:
        return {
            kind: [name for label in labels for name in (label.name, label.names["zh"][0])]
            for kind, labels in self.labels.items()
        }

    def label(self, kind: str, typed: str) -> Label | None:
        """The entry that a typed word is a name of."""
        return next((label for label in self.labels[kind] if label.is_called(typed)), None)

    def _sentence(self, kind: str, typed: str, languages: tuple[str, str], tokenizer: Tokenizer) -> str:
        label, missing = self.label(kind, typed), []
        for language in languages:
            if not (template := self.templates.get(language, {}).get(kind)):
                continue
            # 不用 str.format：用户写的花括号不是占位符
            sentence = template.replace("{" + kind + "}", label.name_in(language, typed) if label else typed)
            if not (lacking := missing_characters(tokenizer, sentence)):
                return sentence
            missing.append(lacking)
        if missing and self.tells:
            # 说差得最少的那种语言缺什么：中文词表只缺换行，不必数英文字母
            say_once(
                "control.{kind}={got}: the vocabulary lacks {characters} of its sentence, which is left out",
                kind=kind, got=typed, characters=min(missing, key=len),
            )
        return ""

    def _words(self, kind: str, typed: str, languages: tuple[str, str], tokenizer: Tokenizer) -> WordBias | None:
        if not (self.bias and self.strength):
            return None
        label = self.label(kind, typed)
        if not label or not any(label.words.values()):
            listed = self.known(tokenizer)[kind]
            known = joined(n for n in listed if (found := self.label(kind, n)) and any(found.words.values()))
            if self.tells:
                say_once(
                    "control.{kind}={got} is used as it is written, without words to lead the text to; those with "
                    "words: {known}",
                    kind=kind, got=typed, known=known,
                )
            return None
        for language in languages:
            if words := [w for w in label.words[language] if ids_of(w, tokenizer)]:
                return word_bias(tokenizer, tuple(words), float(self.strength))
        if self.tells:
            say_once("control.{kind}={got}: the vocabulary can write none of its words; no bias", kind=kind, got=typed)
        return None


@dataclass(frozen=True)
class RequestedLabels:
    """The style and emotion that a prompt's own form asks for, and the prompt without it."""

    # asked 里是敲的原话，种类 -> 词；是不是模型的标签由控制去认

    asked: dict[str, str] = field(default_factory=dict)
    prompt: str = ""


def read_form(prompt: str) -> RequestedLabels:
    """Take `style:…|` and `emotion:…|`, in any order, from the beginning of a prompt: "emotion:happy| 今天"."""
    asked: dict[str, str] = {}
    while match := FORM.match(prompt):
        kind = FORM_NAMES.get(match[1], match[1].lower())
        asked[kind] = match[2].strip().rstrip(TRAILING)
        prompt = prompt[match.end() :]
    # 竖线后的空格是排版，不是开头的一部分；换行留下
    return RequestedLabels(asked, prompt.lstrip(" \t\u3000") if asked else prompt)


def takes_forms(node: dict[str, Any]) -> bool:
    """Whether prompts may name their own style and emotion: those of control=none are read as they are."""
    return all(kind in node for kind in KINDS)


def build_control(node: dict[str, Any]) -> Control:
    """The control of a conf/control yaml."""
    return build_part(node, "control")


def prefix(
    *, style: str | None = None, emotion: str | None = None, strength: float = 0.0, bias: bool = True,
    templates: dict | None = None, styles: dict | None = None, emotions: dict | None = None,
) -> PrefixControl:
    """The control of conf/control/prefix.yaml; the keys are explained there."""
    check_range("control.strength", strength, -100, 100)
    labels = {"style": _labels("styles", styles), "emotion": _labels("emotions", emotions)}
    listed = table("control.templates", templates)
    sentences = {language: table(f"control.templates.{language}", node) for language, node in listed.items()}
    for language, node in sentences.items():
        for kind, sentence in node.items():
            if not isinstance(sentence, str | None):
                raise ConfigError("wrong_type", key=f"control.templates.{language}.{kind}", got=sentence, want="str")
    named = {kind: typed and typed.strip() for kind, typed in (("style", style), ("emotion", emotion))}
    return PrefixControl(**named, strength=strength, bias=bias, templates=sentences, labels=labels)


def table(key: str, node: dict | None) -> dict:
    """A part of a control's yaml that has names of its own; null is an empty one."""
    if not isinstance(node, dict | None):
        raise ConfigError("wrong_type", key=key, got=node, want="{name: …} | null")
    return node or {}


def _labels(key: str, node: dict | None) -> list[Label]:
    labels = []
    for name, entry in table(f"control.{key}", node).items():
        try:
            names = {language: [str(n) for n in entry[language]] for language in ("zh", "en")}
            given = entry.get("words") or {}
            words = {language: [str(w) for w in given.get(language) or []] for language in ("zh", "en")}
        except (KeyError, TypeError, AttributeError):
            raise ConfigError("bad_label", key=f"control.{key}.{name}") from None
        if not all(names.values()):
            raise ConfigError("bad_label", key=f"control.{key}.{name}")
        labels.append(Label(str(name), names, words))
    return labels


def distinct(names: list[str]) -> list[str]:
    """Each name once, the first of those that differ in case only."""
    return list({name.lower(): name for name in reversed(names)}.values())[::-1]


def language_of(prompt: str, *typed: str) -> str:
    """zh when the prompt (or, where it has no letters, the typed words) has a Chinese character, else en."""
    text = prompt if any(c.isalpha() for c in prompt) else "".join(typed)
    return "zh" if CJK.search(text) else "en"


def missing_characters(tokenizer: Tokenizer, text: str) -> str:
    """The characters of a text that a vocabulary lacks, up to ten, each once."""
    if writable(tokenizer, text):
        return ""
    return " ".join([repr(c) for c in dict.fromkeys(text) if not writable(tokenizer, c)][:10])


def writable(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a vocabulary has all characters of a text."""
    try:
        tokenizer.encode(text)
    except ConfigError:
        return False
    return True


def say_once(message: str, **values) -> None:
    """Print a message on stderr, unless it was printed before or MOST_SAID others were."""
    # 词来自请求：控制字符会操纵终端，太长会淹没屏幕
    values = {name: presentable(value) for name, value in values.items()}
    key = (message, *sorted(values.items()))
    # 服务器上谁都可以写新词：说满就不再说，内存不涨，没人读的管道也不会被写满而卡住写作
    if key not in _said and len(_said) < MOST_SAID:
        _said.add(key)
        say(message, **values)
