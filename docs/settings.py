# 由字段旁的英文说明与 yaml 里的中文注释生成 docs/settings.md 与 docs/settings.zh-CN.md
# 改了键就重新运行一次；忘了的话，tests/test_docs.py 会说
"""Write docs/settings.md and docs/settings.zh-CN.md: python docs/settings.py."""

from collections.abc import Iterator

from nanogpt.base.config import (
    ROOT,
    AdamWConfig,
    FinetuneConfig,
    HardwareConfig,
    LaunchConfig,
    MemoryConfig,
    ModelConfig,
    MuonConfig,
    ParallelConfig,
    PrecisionConfig,
    Range,
    SearchConfig,
    TrainConfig,
    TrialConfig,
)
from nanogpt.base.help import commented, described
from nanogpt.base.sample_config import SampleConfig, SamplerConfig, ServerConfig

# 哪个 schema 的键写在哪个 yaml 的哪一层
SECTIONS = (
    ("nanogpt train", "", TrainConfig, "train.yaml"), ("trial", "trial.", TrialConfig, "train.yaml"),
    ("experiment=search", "search.", SearchConfig, "experiment/search.yaml"),
    ("model", "model.", ModelConfig, "model/tiny.yaml"), ("arch", "model.", ModelConfig, "arch/modern.yaml"),
    ("arch=qwen3", "model.", ModelConfig, "arch/qwen3.yaml"),
    ("optimizer=muon", "optimizer.", MuonConfig, "optimizer/muon.yaml"),
    ("optimizer=adamw", "optimizer.", AdamWConfig, "optimizer/adamw.yaml"),
    ("precision", "precision.", PrecisionConfig, "precision/auto.yaml"),
    ("memory", "memory.", MemoryConfig, "memory/default.yaml"),
    ("finetune=lora", "finetune.", FinetuneConfig, "finetune/lora.yaml"),
    ("hardware", "hardware.", HardwareConfig, "hardware/auto.yaml"),
    ("parallel", "parallel.", ParallelConfig, "parallel/ddp.yaml"),
    ("launch", "launch.", LaunchConfig, "launch/none.yaml"),
    ("nanogpt sample", "", SampleConfig, "sample.yaml"), ("sampler", "sampler.", SamplerConfig, "sampler/temperature.yaml"),
    ("server", "server.", ServerConfig, "sample.yaml"),
)
HEADS = {
    "en": (
        "Settings", "[中文](settings.zh-CN.md)",
        "Every key with its default and its range; `docs/settings.py` writes this page from the code and conf/. `python run_train.py --help` and `python run_sample.py --help` show it in short. Data sets, loggers and the labels of `control` have keys of their own, with their comments in conf/dataset, conf/logger and conf/control.",
        "| key | default | range | |",
    ),
    "zh": ("设置", "[English](settings.md)", "每个键、默认值与范围；本页由 `docs/settings.py` 从代码与 conf/ 生成。`python run_train.py --help` 与 `python run_sample.py --help` 列出其中的要点。数据集、logger 与 `control` 的标签另有自己的键，写在 conf/dataset、conf/logger、conf/control 里，各带注释。", "| 键 | 默认 | 范围 | |"),
}


def rows(prefix: str, schema: type, yaml: str, language: str, shown: set[str]) -> Iterator[str]:
    """A row of the table for each key that has a line of its own and is not among those `shown` above."""
    english, lines = described(schema), commented(ROOT / "conf" / yaml)
    for name, field in schema.__dataclass_fields__.items():
        # 一组自己的 yaml 里，键不带组名
        line = lines.get(f"{prefix}{name}") or (lines.get(name) if "/" in yaml else None)
        if line is None or name not in english or (prefix + name in shown and schema is ModelConfig):
            continue
        shown.add(prefix + name)
        allowed: Range | str = field.metadata.get("range", " ".join(field.metadata.get("choices", ())))
        text = english[name] if language == "en" else line.comment
        text = text.replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{prefix}{name}` | `{line.default}` | {allowed} | {text} |"


def page(language: str) -> str:
    """The whole page."""
    title, other, about, head = HEADS[language]
    parts, shown = [f"# {title}", other, about], set()
    for heading, prefix, schema, yaml in SECTIONS:
        parts += [f"## {heading}", "\n".join([head, "|---|---|---|---|", *rows(prefix, schema, yaml, language, shown)])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for name, language in (("settings.md", "en"), ("settings.zh-CN.md", "zh")):
        (ROOT / "docs" / name).write_text(page(language), encoding="utf-8", newline="\n")
