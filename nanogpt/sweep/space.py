"""The space of a search: which keys take which values, in the words that a sweep is typed with."""

# 搜索空间：一个键一行，写法就是 -m 扫描的写法（逗号、choice、range、interval、tag(log, …)），由 Hydra 自己的语法来读
# 默认的空间在 conf/experiment/search.yaml；命令行上写几个值的键换掉那一行，只写一个值的键就此定下，不再搜索
# shape 不是配置里的键：同样的计算量下换一种宽与深，由 shapes 换成 model.n_layer 等

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nanogpt.base.config import ModelConfig, TrainConfig, check_choice, check_key, effective_batch, keys, plain
from nanogpt.base.groups import parsed
from nanogpt.base.language import ConfigError
from nanogpt.base.user_yaml import group_options, is_group
from nanogpt.base.value_checks import wanted_type

# 搜索自己定的键：每次试跑训多久、怎样收尾、用哪个种子
OWN = (
    "max_iters", "max_minutes", "max_tokens", "lr_schedule", "lr_decay_iters", "decay_fraction", "warmup_iters", "seed",
    "batch_size", "gradient_accumulation_steps", "objective", "holdout", "eval_tokens", "eval_stride", "eval_interval",
    "experiment", "resume", "out_dir", "init_from", "dataset", "search", "trial",
)
# 宽与深由 shape 一起定
SHAPE = ("model.n_layer", "model.n_head", "model.n_embd", "model")
SHAPES = ("as_is", "deeper", "wider")


@dataclass(frozen=True)
class Dimension:
    """One key and the values that it may take: a list of words, or all numbers between two."""

    # 词都是字符串，与命令行上敲的一样：一套写法，从空间一直用到 best.yaml

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Integers only."""

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}={','.join(self.choices)}"
        return f"{self.key}={self.low:g} … {self.high:g}{' (log)' if self.log else ''}"

    def distribution(self):
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def drawn(self, random: Random) -> Any:
        """One of the values, as likely as any other."""
        if self.choices:
            return random.choice(self.choices)
        scale, back = (math.log, math.exp) if self.log else (float, float)
        value = back(random.uniform(scale(self.low), scale(self.high)))
        return round(value) if self.whole else value

    def word(self, value: Any) -> str:
        """A value as it is typed; four digits of a number are more than a search can tell apart."""
        return value if isinstance(value, str) else str(value) if self.whole else f"{value:.4g}"


def space_of(
    lines: Sequence[str], typed: Sequence[str], fixed: Sequence[str], *, own: Sequence[str] = OWN
) -> list[Dimension]:
    """The dimensions of a search: `lines` of the configuration, `typed` over them, without what is `fixed`.

    The keys of `own` are the search's and refused.
    """
    given = {one.key: one for one in (dimension(line, own) for line in lines)}
    mine = [dimension(line, own) for line in typed]
    if twice := [one.key for one in mine if sum(other.key == one.key for other in mine) > 1]:
        raise ConfigError("{key} is given twice; write all its values into one: {key}=a,b,c", key=twice[0])
    decided = {override.key_or_group for override in map(_parsed, fixed)} | {one.key for one in mine}
    typed_keys = {one.key for one in mine}
    if "shape" in given and "shape" not in typed_keys and (decided & {*SHAPE[:3]} or typed_keys & {*SHAPE}):
        # 自己定了宽或深，或者搜几个模型：默认的 shape 就不再管它
        del given["shape"]
    space = {key: one for key, one in given.items() if key not in decided} | {one.key: one for one in mine}
    clash = sorted({*SHAPE} & {*space})
    # 只有 as_is 的 shape 什么也不改
    if clash and "shape" in space and space["shape"].choices != SHAPES[:1]:
        raise ConfigError(
            "the search space contradicts itself: shape and {key} both decide the model's width and depth; leave "
            "one of the two out",
            key=clash[0],
        )
    if all(len(one.choices) == 1 for one in space.values()):
        raise ConfigError(
            "the search space is empty: no key has several values; give one of them several, such as "
            "learning_rate=5e-3,1e-2",
        )
    return list(space.values())


def without_model(lines: Sequence[str]) -> list[str]:
    """The lines but those that weights decide from which a training starts."""
    # 模型是那些权重的：除了 dropout，没有可换的
    return [line for line in lines if not re.match(r"shape=|model(?!\.dropout=)[.=]", line)]


def dimension(line: str, own: Sequence[str] = OWN) -> Dimension:
    """One line of a search space; ConfigError where it cannot be read or holds no value."""
    override = _parsed(line)
    key, value = override.key_or_group, override.value()
    if key.split(".")[0] in own:
        raise ConfigError(
            "{line}: the search decides {key} by itself; leave it out (search.minutes, search.seeds and search.trials "
            "say how long and how many)",
            line=line, key=key,
        )
    if not _known(override):
        raise ConfigError(
            "{line}: there is no key {key} that could be searched; docs/settings.md has their names",
            line=line, key=key,
        )
    if isinstance(value, IntervalSweep):
        one = _interval(line, override, value)
    else:
        several = isinstance(value, ChoiceSweep | RangeSweep)
        words = [part.partition("=")[2] for part in _each(override)] if several else [line.partition("=")[2]]
        one = Dimension(_name(override), _different(key, words))
        if not words or override.is_delete():
            raise _nothing_left(line, key)
    _check_values(key, one)
    return one


def _nothing_left(line: str, key: str) -> ConfigError:
    return ConfigError(
        "{line}: no value is left to search; write {key}=a,b,c or {key}=interval(1,2)", line=line, key=key,
    )


def _different(key: str, words: Sequence[str]) -> tuple[str, ...]:
    """The words without those that mean a value again."""
    # 0 与 0.0 是一个：两个设置不能共用一个训练目录
    found: dict[Any, str] = {}
    for word in words:
        value = parsed(key, word)
        if _counts(key) and isinstance(value, int | float) and value % 1 == 0 and not isinstance(value, bool):
            # 0x10、1e1 也是整数：往后只写数字
            word = str(int(value))
        found.setdefault(value if isinstance(value, int | float) else str(value), word)
    return tuple(found.values())


def _parsed(line: str) -> Override:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        raise ConfigError(
            "search.space: {line}: this cannot be read ({reason}); write it as in a sweep: learning_rate=1e-3,1e-2 or "
            "learning_rate=tag(log,interval(1e-3,1e-1))",
            line=line, reason=str(error).partition("\n")[0],
        ) from None


def _known(override: Override) -> bool:
    """Whether there is such a key or group; options of swappable groups are known only to what they build."""
    key = override.key_or_group
    if key == "shape" or override.is_add() or is_group(key) or key.startswith("optimizer."):
        return True
    return key in dict(keys(TrainConfig))


def _check_values(key: str, one: Dimension) -> None:
    """Refuse what a key cannot be, now and not when its turn comes."""
    # 两小时的搜索，写错的一个值不要等提到它时才说
    if key == "shape" or is_group(key):
        options = SHAPES if key == "shape" else group_options(key)
        for word in one.choices:
            check_choice(key, word, tuple(options))
        return
    known, numbers = dict(keys(TrainConfig)).get(key), int if _counts(key) else int | float
    for value in [parsed(key, word) for word in one.choices] or [one.low, one.high]:
        # 几行的批量要说出个数来：一级里走几步、最快的微批，都由它算
        fits = key != "global_batch_size" if value is None else isinstance(value, numbers)
        if known and "range" in known.metadata and (isinstance(value, bool) or not fits):
            got, want = ("null", "int") if value is None else (value, wanted_type(TrainConfig, key))
            raise ConfigError("wrong_type", key=key, got=got, want=want)
        if known:
            check_key(key, known, value)


def _counts(key: str) -> bool:
    """Whether a key is a whole number."""
    return wanted_type(TrainConfig, key) in ("int", "int | null")


def _name(override: Override) -> str:
    return ("+" if override.is_add() else "") + override.key_or_group


def _each(override: Override) -> list[str]:
    key = override.get_key_element()
    return [f"{key}={word}" for word in override.sweep_string_iterator()]


def _interval(line: str, override: Override, value: IntervalSweep) -> Dimension:
    low, high, log = value.start, value.end, "log" in value.tags
    if not low < high:
        raise ConfigError(
            "{line}: the search space contradicts itself: {low} is not below {high}",
            line=line, low=low, high=high,
        )
    if log and low <= 0:
        raise ConfigError("{line}: a logarithmic interval begins above 0, not at {low}", line=line, low=low)
    whole = _counts(override.key_or_group) or (isinstance(low, int) and isinstance(high, int))
    if whole:
        # 没有尽头的，留给 _check_values 来拒绝
        low = low if math.isinf(low) else math.ceil(low)
        high = high if math.isinf(high) else math.floor(high)
        if low >= high:
            raise _nothing_left(line, override.key_or_group)
    return Dimension(_name(override), low=low, high=high, log=log, whole=whole)


# ---- 从空间里的词到配置 ----


def with_own(space: Sequence[Dimension], typed: Sequence[str], cfg: TrainConfig) -> list[Dimension]:
    """The space with the numbers of the configuration itself in it; keys that were `typed` have what was typed."""
    # 空间是默认的，批量却是自己写的 12：不搜索时会训的那个设置，也要第一个试
    wider, mine = [], {line.partition("=")[0] for line in typed}
    for one in space:
        value = _own(one, cfg)
        if one.key == "shape":
            # 只有一两层的，换了形也是原样
            model, as_is = cfg.model, f"model.n_layer={cfg.model.n_layer}"
            first = {(shaped(model, word) or [as_is])[0]: word for word in reversed(one.choices)}
            one = replace(one, choices=tuple(word for word in one.choices if word in first.values()))
        if one.key not in mine and isinstance(value, int | float) and not isinstance(value, bool):
            words = {word: parsed(one.key, word) for word in one.choices}
            if words and value not in words.values() and all(isinstance(n, int | float) for n in words.values()):
                words[one.word(value) if isinstance(value, float) else str(value)] = value
                one = replace(one, choices=tuple(sorted(words, key=words.get)))
            elif not words and (value > 0 or not one.log):
                one = replace(one, low=min(one.low, value), high=max(one.high, value))
        wider.append(one)
    return wider


def _own(one: Dimension, cfg: TrainConfig) -> Any:
    """What the configuration itself has for a key."""
    if one.key == "shape":
        return "as_is"
    if one.key != "model" and is_group(one.key):
        return cfg.groups.get(one.key)
    settings = OmegaConf.create(plain(cfg))
    value = cfg.model.name if one.key == "model" else OmegaConf.select(settings, one.key.lstrip("+"))
    if value is None and "null" not in one.choices and one.key in ("dropout", "model.dropout", "model.ngrams"):
        # 由文字定的，空间里却没有这个词：第一个试的，取文字不限的那种
        value = getattr(cfg.model.completed(), one.key.rpartition(".")[2])
    if one.key == "global_batch_size" and value is None and isinstance(cfg.batch_size, int):
        value = effective_batch(cfg)
    return value


def default_of(space: Sequence[Dimension], cfg: TrainConfig) -> dict[str, Any]:
    """What the configuration itself has, as far as it lies in the space: the first setting that is tried."""
    found = {}
    for one in space:
        value = _own(one, cfg)
        same = [word for word in one.choices if parsed(one.key, word) == _plain(value)]
        if same:
            found[one.key] = same[0]
        elif not one.choices and isinstance(value, int | float) and one.low <= value <= one.high:
            found[one.key] = value
    return found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def overrides_of(setting: dict[str, str], model: ModelConfig) -> list[str]:
    """The setting as one would type it."""
    words = []
    for key, word in setting.items():
        words += shaped(model, word) if key == "shape" else [f"{key}={word}"]
    return words


def shaped(model: ModelConfig, word: str) -> list[str]:
    """Width and depth with about the same work per token; `word` is one of SHAPES.

    The blocks of a GPT take 12 n_layer n_embd² products per token: half as many layers may be 1.41 times as wide.
    """
    # 步子不会恰好一样快：每个设置按自己实测的步时换算成步数，比的总是同样的时间，这里只要差不多
    if word == "as_is":
        return []
    factor = 1.5 if word == "deeper" else 1 / 1.5
    layers = max(1, round(model.n_layer * factor))
    head = model.n_embd // model.n_head
    # 头的大小不变，宽度仍是它的倍数
    heads = max(1, round(model.n_embd * (model.n_layer / layers) ** 0.5 / head))
    return [f"model.n_layer={layers}", f"model.n_head={heads}", f"model.n_embd={heads * head}"]
