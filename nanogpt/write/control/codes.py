"""Style and emotion as labels that the model was trained behind, with control=prefix for all other words."""

# control=codes：模型训练时每篇文章前面放着标签，写作时把想要的标签放在最前面；guidance 是推得多用力
# 敲的词先认成模型的标签（同名、同义词、别名表），认不出的仍走 control=prefix 的办法，并说一声
# codes 是 conf/control/codes.yaml 的构造函数；标签的 token 与名字在 tokenizer 里，来自训练数据

from dataclasses import dataclass, replace

from nanogpt.base.config import check_range
from nanogpt.base.language import ConfigError, joined, text
from nanogpt.base.value_checks import check_types
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.write.control.prefixes import KINDS, PrefixControl, distinct, prefix, say_once, table
from nanogpt.write.request import Request

# 再大就只剩下标签，文字散了
GUIDANCE = (0, 20)


@dataclass(frozen=True)
class CodesControl:
    """The label of the model that a typed word means, in front of the text, and how far it pushes.

    A word means, in this order: the label of that name; the label that is another name of the same mood or style of
    control=prefix; the label of an alias list in which the word, or the mood it is a name of, stands.
    """

    # 包着一个 PrefixControl：没有标签的模型用它，结果与 control=prefix 逐字相同

    words: PrefixControl
    """For what the model has no label for."""
    guidance: float
    aliases: dict[str, dict[str, list[str]]]
    """Kind -> label -> words people use for it."""

    @property
    def style(self) -> str | None:
        return self.words.style

    @property
    def emotion(self) -> str | None:
        return self.words.emotion

    def apply(self, request: Request, tokenizer: Tokenizer) -> Request:
        typed = {kind: word for kind in KINDS if (word := getattr(self, kind))}
        labels = {kind: label for kind, word in typed.items() if (label := self.label(kind, word, tokenizer))}
        # 没有标签的模型与 control=prefix 完全一样；有标签的，下面一句话说完
        rest = replace(self.words, **dict.fromkeys(labels), tells=not tokenizer.labels)
        self._say(rest, request, labels, tokenizer)
        request = rest.apply(request, tokenizer)
        if not labels:
            return request
        ids = [i for kind, label in labels.items() for i in tokenizer.labels[kind][label]]
        return replace(request, prefix_ids=tuple(ids), labels=labels, guidance=float(self.guidance))

    def known(self, tokenizer: Tokenizer) -> dict[str, list[str]]:
        others = self.words.known(tokenizer)
        return {kind: distinct([*tokenizer.labels.get(kind, ()), *others[kind]]) for kind in KINDS}

    def label(self, kind: str, typed: str, tokenizer: Tokenizer) -> str | None:
        """The model's label that a typed word means, or None."""
        named = {label.lower(): label for label in tokenizer.labels.get(kind, ())}
        return next((named[word] for group in self._groups(kind, typed) for word in group if word in named), None)

    def _groups(self, kind: str, typed: str) -> list[list[str]]:
        """Words in lower case that may mean the same as `typed`, the closest first."""
        word, mood = typed.lower(), self.words.label(kind, typed)
        # 别名表里写 happy，就连同它的同义词
        means = {word, mood.name.lower()} if mood else {word}
        aliases = self.aliases.get(kind, {}).items()
        lists = [[label.lower(), *(other.lower() for other in listed)] for label, listed in aliases]
        synonyms = [name.lower() for name in mood.all_names()] if mood else []
        return [[word], synonyms, *(group for group in lists if means & set(group))]

    def _say(self, rest: PrefixControl, request: Request, labels: dict[str, str], tokenizer: Tokenizer) -> None:
        """What has no label, and whether the rest can ask for it; that guidance has nothing to strengthen."""
        known_labels = tokenizer.labels.items()
        known = " | ".join(text("{kind}: {names}", kind=kind, names=joined(names)) for kind, names in known_labels)
        for kind in KINDS if known else ():
            if not (typed := getattr(rest, kind)):
                continue
            asked = replace(rest, **{other: None for other in KINDS if other != kind}).apply(request, tokenizer)
            if asked.prefix or asked.sampler is not request.sampler:
                say_once(
                    "control.{kind}={got} is not a label of this model (it knows {known}); a sentence and words ask "
                    "for it as with control=prefix",
                    kind=kind, got=typed, known=known,
                )
            else:
                say_once(
                    "control.{kind}={got} is not a label of this model (it knows {known}), whose vocabulary cannot "
                    "write it either; left out",
                    kind=kind, got=typed, known=known,
                )
        if self.guidance != 1 and not labels:
            if known:
                say_once(
                    "control.guidance={got} has no effect on a text without a label; the model knows {known}",
                    got=self.guidance, known=known,
                )
            else:
                say_once(
                    "control.guidance={got} has no effect: the model was trained without labels",
                    got=self.guidance,
                )


def codes(*, guidance: float = 1.0, aliases: dict | None = None, **settings) -> CodesControl:
    """The control of conf/control/codes.yaml; the keys are explained there, `settings` in prefix.yaml."""
    check_types(prefix, "control", settings)
    check_range("control.guidance", guidance, *GUIDANCE)
    listed = table("control.aliases", aliases)
    lists = {kind: _lists(f"control.aliases.{kind}", listed.get(kind)) for kind in KINDS}
    return CodesControl(prefix(**settings), guidance, lists)


def _lists(key: str, node: dict | None) -> dict[str, list[str]]:
    if not isinstance(node or {}, dict) or not all(isinstance(listed, list) for listed in (node or {}).values()):
        raise ConfigError("wrong_type", key=key, got=node, want="{label: [words]}")
    return {str(label): [str(word) for word in listed] for label, listed in (node or {}).items()}
