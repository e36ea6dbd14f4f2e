"""Fill in what a plan needs of a config and training would take from data or weights, fetching nothing."""

# 把配置补全到可以规划：词表多大、有没有篇章分隔符、init_from 的权重是什么形状
# 训练时这些来自准备好的数据与权重；规划时什么也不下载、不准备，读得到就读，读不到就用写明的假定
# filled 是入口，plan 用它；结果里带着词表的出处，打印时说给人听

from dataclasses import replace
from pathlib import Path

from nanogpt.base import run_names
from nanogpt.base.config import ModelConfig, TrainConfig, auto_tokens
from nanogpt.base.language import ConfigError, text
from nanogpt.base.saved_config import read_saved, refuse_unnamed_code, typed_node
from nanogpt.data import corpus
from nanogpt.data import tokenizer as tokenizers
from nanogpt.data.tokens import read_meta, unchecked
from nanogpt.run import rundir
from nanogpt.run.regularize import held_back
from nanogpt.weights.build import preset

GPT2_VOCAB = 50257
BYTE_VOCAB = 256
# 还没准备数据时的假定：英文剧本 76 到 79 个字符，中文语料常见几千字
ENGLISH_CHARACTERS = 100
OTHER_CHARACTERS = 6000


def filled(
    cfg: TrainConfig, overrides: list[str] | None = None, steps: int | None = None,
) -> tuple[TrainConfig, str]:
    """(a copy of cfg whose model has its final shape and vocabulary, where the vocabulary comes from).

    steps: what the time of the budget is good for, if that is known.
    """
    if cfg.init_from:
        model, source = _pretrained_model(cfg, overrides or []), text("init_from")
    elif cfg.model.vocab_size is not None:
        model, source = cfg.model, text("model.vocab_size")
    else:
        vocab, separator, source = vocabulary(cfg)
        model = replace(cfg.model, vocab_size=vocab, separator=separator)
    # 对话与文章一样多一张“谁看得见谁”的表，还没准备好的也知道
    chat = cfg.dataset["name"] == "chat"
    model = replace(model, separator=None if chat else model.separator, marked=chat)
    return for_the_text(replace(cfg, model=model), steps), source


def for_the_text(cfg: TrainConfig, steps: int | None = None) -> TrainConfig:
    """The same with what the text decides as numbers; where it is not prepared, with the most memory that may be."""
    options = {k: v for k, v in cfg.dataset.items() if k not in ("name", "dir")}
    folder, tokens = corpus.folder_of(cfg.dataset["name"], cfg.dataset["dir"], options), 0
    if (folder / "meta.json").is_file():
        tokens = len(unchecked(folder))
    if cfg.max_tokens == "auto":
        cfg = replace(cfg, max_tokens=auto_tokens(cfg.model, tokens or None))
    return held_back(cfg, tokens, steps)


def vocabulary(cfg: TrainConfig) -> tuple[int, int | None, str]:
    """(size, separator of documents, where it comes from) of the data set's vocabulary."""
    options = {k: v for k, v in cfg.dataset.items() if k not in ("name", "dir")}
    name, tokenizer = cfg.dataset["name"], cfg.dataset.get("tokenizer")
    folder = corpus.folder_of(name, cfg.dataset["dir"], options)
    if (folder / "meta.json").is_file():
        data = tokenizers.load(folder / "tokenizer.json")
        # 成篇的数据多一张“谁看得见谁”的表，注意力也换一个 kernel
        return data.vocab_size, data.end_of_text if "documents" in read_meta(folder) else None, text(
            "the prepared data set",
        )
    if name == "hf" and tokenizer == "auto":
        tokenizer = "gpt2"
    if tokenizer in ("gpt2", "byte"):
        return GPT2_VOCAB if tokenizer == "gpt2" else BYTE_VOCAB, None, text("plan_vocab_tokenizer")
    if tokenizer == "bpe":
        return cfg.dataset["vocab_size"], None, text("plan_vocab_tokenizer")
    if name.endswith("_char"):
        return ENGLISH_CHARACTERS, None, text("plan_vocab_assumed")
    if tokenizer in ("auto", "char"):
        return OTHER_CHARACTERS, None, text("plan_vocab_assumed")
    return GPT2_VOCAB, None, text("plan_vocab_assumed")


def _pretrained_model(cfg: TrainConfig, overrides: list[str]) -> ModelConfig:
    """Shape of the weights that cfg.init_from names, with this run's dropout and, if typed, its context."""
    have = _shape_of(cfg.init_from, cfg.model._target_)
    typed = rundir.typed_model_fields(overrides, cfg.model)
    block = cfg.model.block_size if "block_size" in typed else have.block_size
    return replace(have, dropout=cfg.model.dropout, block_size=block)


def _shape_of(named: str, code: str) -> ModelConfig:
    from nanogpt.weights.families import published, read_family
    from nanogpt.weights.hub import GPT2_NAMES, model_on_hub, repository_of
    from nanogpt.weights.peft import base_folder, is_adapter
    from nanogpt.weights.pretrained import open_pretrained, read_config

    path = Path(named)
    if is_adapter(path):
        path, _ = base_folder(path, "init_from")
    if (path / "config.json").is_file():
        # 只读形状：几百 MB 的权重用不着
        return read_config(path / "config.json", path.resolve().name)
    if run_names.names_run(named):
        content, file = rundir.saved_settings(run_names.locate(named, key="init_from"))
        saved = read_saved(content)
        refuse_unnamed_code(saved, {"_target_": code}, file, ("model",))
        return typed_node(ModelConfig, saved["model"])
    if path.is_file():
        return open_pretrained(named).config
    if named in GPT2_NAMES:
        return preset(named.replace("-", "_"), vocab_size=GPT2_VOCAB)
    # 以前取过的，缓存里有它的形状
    fetched = repository_of(named) and model_on_hub(named, "init_from").folder()
    if fetched and is_adapter(fetched):
        fetched, _ = base_folder(fetched, "init_from", named)
    if fetched and (fetched / "config.json").is_file():
        return read_config(fetched / "config.json", path.name)
    if known := published(repository_of(named) or ""):
        return read_family(path, known, path.name)
    raise ConfigError(
        "init_from={got}: the plan needs a local copy, gpt2, gpt2-medium, gpt2-large, gpt2-xl or Qwen/Qwen3-0.6B, "
        "1.7B, 4B, 8B; download it, or plan with model=… of its shape",
        got=named,
    )
