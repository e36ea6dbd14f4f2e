"""Evaluate whether a model writes what it is asked for, and what that costs in perplexity.

Every label is written `samples` times, judged, and set beside real texts under the same judge. A hit is a text that
the judge gives the label that was asked for; a text of the set that occurs twice counts once, and a poem that was cut
off at max_new_tokens has no form.
"""

# 整个评估：每种标签写 samples 段，评判逐段认，与真实文本放在同一把尺下，再量各 guidance 下的困惑度
# 从上到下：困惑度、数据、写、量、evaluate 把它们串起来；每得出一部分就交给 show，中途停下也不白等
# 记录是一个 JSON 的 dict，table 与 picture 只认它；命令行在 command
# 公平之处：各标签用同样的种子，真实文本取同样多篇，写重复的同一段只算一次命中

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml

from nanogpt.base.console import Console
from nanogpt.base.groups import option
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import SampleConfig
from nanogpt.data import corpus
from nanogpt.data.documents import Document, DocumentData, read_judge_part
from nanogpt.data.labels import CI, LABEL_KINDS
from nanogpt.data.opening import open_data
from nanogpt.data.tokens import find_prepared
from nanogpt.run.summary import device_name, versions
from nanogpt.weights import checkpoint
from nanogpt.write.control.prefixes import language_of
from nanogpt.write.judge.judges import Judge, Verdict, build_judge, lengths
from nanogpt.write.judge.measures import COPY, TrainingTexts, distinct, mean_share, share, without_space
from nanogpt.write.loading import Model, Settings, open_model
from nanogpt.write.request import Result

# ---- 困惑度 ----

# 验证部分至多用这么多 token，均匀取样；各 guidance 用同一批，差别因此可比
MOST_TOKENS = 50_000
# 一次前向的 token 数
AT_ONCE = 8192
# 一次算出的 logits
CHUNK_BYTES = 2**28


@torch.inference_mode()
def guided_perplexity(
    model: Model, data: DocumentData, guidances: Sequence[float], *, limit: int | None = MOST_TOKENS
) -> list[float]:
    """Perplexity per token of the validation documents at each guidance, teacher-forced, without any sampling.

    A token's probability is softmax(u + g (c - u)): c are the logits behind the document's labels, u those without
    any. So g = 1 is the model's own validation loss, exponentiated, and g = 0 that of the same texts without labels.
    """
    sums, count = torch.zeros(len(guidances), dtype=torch.float64), 0
    for c, u, targets in _logits(model, data, limit):
        for i, guidance in enumerate(guidances):
            mixed = torch.lerp(u, c, guidance)
            sums[i] += torch.nn.functional.cross_entropy(mixed, targets, reduction="sum").cpu().double()
        count += len(targets)
    return [math.exp(total / count) for total in sums.tolist()]


def _logits(
    model: Model, data: DocumentData, limit: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits with labels and without, both (N, V) float32, and their targets (N,), in pieces."""
    network = model.network
    T, V = network.config.block_size, network.config.vocab_size
    rows = [start for start, _ in data.val_windows(T, limit)]
    batch = max(1, AT_ONCE // T)
    # 全部 logits 可能有几 GB：一次只算这么多个位置的
    piece = max(1, CHUNK_BYTES // (4 * V))
    for first in range(0, len(rows), batch):
        starts = np.array(rows[first : first + batch])
        hidden = []
        for labelled in (True, False):
            x, y = (t.to(network.device) for t in data.rows("val", starts, T, labelled=labelled))
            with model.context():
                hidden.append(network.hidden(x)[y >= 0])
        # 两种行里的目标一一对应，次序相同，只是位置错开了标签那几格
        targets = y[y >= 0]
        for at in range(0, len(targets), piece):
            with model.context():
                c, u = (network.logits(h[at : at + piece]).float() for h in hidden)
            yield c, u, targets[at : at + piece]


FORMAT = 1
# 为什么不算命中；前几种由评判说，这两种由写作的结果定
UNFINISHED, REPEATED = "unfinished", "repeated"


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure: texts per label, guidance values of control=codes, and whether to measure the baselines too."""

    # 命令行选的那几项；与写作的设置（SampleConfig）分开，后者对所有标签相同

    samples: int
    guidance: Sequence[float]
    baseline: bool = False
    keep_texts: bool = False


@dataclass
class Reference:
    """What all settings of an evaluation are compared with: judge, training texts, tunes of real ci."""

    # 训练评判、给训练文本编索引都要时间：做一次，各个设置共用

    kind: str
    labels: list[str]
    judge: Judge
    accuracy: dict[str, dict]
    """Per label: the judge on real texts that it has not seen (measures.share)."""
    training_texts: TrainingTexts
    tunes: set[tuple[int, ...]]
    """Sequences of segment lengths of real ci, where 宋词 is a label."""


# ---- 数据 ----


def data_of_run(run_dir: Path, model: Model) -> DocumentData:
    """The documents that the run was trained on: its own data/, else the data set folder that its config.yaml names."""
    folder = run_dir / "data"
    if not (folder / "meta.json").is_file():
        folder = _named_folder(run_dir)
    data = open_data(folder) if folder and (folder / "meta.json").is_file() else None
    if data is None:
        raise ConfigError(
            "OUT_DIR={path}: its texts are neither in its data/ nor in {folder}; put the data set folder there, or "
            "train with a larger bundle_data_mib",
            path=run_dir, folder=folder or "-",
        )
    if not isinstance(data, DocumentData) or data.tokenizer.to_dict() != model.tokenizer.to_dict():
        raise ConfigError("vocab_mismatch", name=data.name, reason="tokenizer.json")
    return data


def _named_folder(run_dir: Path) -> Path | None:
    try:
        dataset = dict(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["dataset"])
        name, directory = dataset.pop("name"), dataset.pop("dir")
        # 运行目录可能来自陌生人：名字里不许有路径
        if not re.fullmatch(r"\w+", name):
            return None
        found = checkpoint.checkpoints(run_dir)
        # 同名的数据可能准备过几份：先找训练时的那一份
        prepared = found and not directory and find_prepared(name, found[-1].data_fingerprint())
        return prepared or corpus.folder_of(name, directory, dataset)
    except (ConfigError, OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return None


def choose_kind(model: Model, wanted: str | None) -> str:
    """The kind of labels to evaluate: the one asked for, else the first that the model has."""
    have = [kind for kind in LABEL_KINDS if model.tokenizer.labels.get(kind)]
    if not have:
        raise ConfigError(
            "{model} knows no labels of style or emotion; train with dataset=chinese_poetry, chinese_reviews or "
            "labelled",
            model=model.name,
        )
    if wanted and wanted not in have:
        raise ConfigError(
            "--kind {got}: the model has labels for {have} only; choose that",
            got=wanted, have=", ".join(have),
        )
    return wanted or have[0]


def build_reference(data: DocumentData, kind: str, labels: list[str]) -> Reference:
    """Train the judge and index the training texts."""
    part = read_judge_part(data.folder)
    judge, accuracy = build_judge(kind, labels, part)
    trained_on = list(data.documents("train"))
    has_tunes = judge.name == "form" and CI in labels
    tunes = {lengths(d.text) for d in [*trained_on, *part] if d.style == CI} if has_tunes else set()
    return Reference(kind, labels, judge, accuracy, TrainingTexts(d.text for d in trained_on), tunes)


# ---- 写 ----


def settings_of(
    reference: Reference, options: EvaluationOptions
) -> Iterator[tuple[str, float | None, Callable[[str], dict]]]:
    """(control, guidance, control node for a label) of everything to measure."""
    for guidance in options.guidance:
        yield "codes", guidance, lambda label, g=guidance: {**_node("codes"), reference.kind: label, "guidance": g}
    if options.baseline:
        yield "prefix", None, lambda label: in_words(reference, label)
        yield "none", None, lambda label: _node("none")


def in_words(reference: Reference, label: str) -> dict:
    """control=prefix as a person types it: the label by its name in the language of the texts, nothing else changed."""
    names = [label, *_node("codes")["aliases"][reference.kind].get(label, [])]
    # 词表写不出的句子，命令行上会略去：这里也一样，另做一套就不是同一个东西的成绩
    typed = next((name for name in names if (language_of(name) == "zh") == reference.training_texts.chinese), label)
    return {**_node("prefix"), reference.kind: typed}


@cache
def _node(control: str) -> dict:
    # 拼一次配置要零点几秒；只读，用时另抄一份再改
    return option("control", control, temperature=1.0)


def _asked(model: Model, base: Settings, node: dict) -> tuple:
    """What a control makes of an empty prompt."""
    request = dataclasses.replace(base, control=node).request("")
    # 词表写不出那句话的前缀，什么也没有加：控制不同，问的还是同一件事
    request = request.control.apply(request, model.tokenizer) if request.control else request
    return request.prefix, request.prefix_ids, request.sampler


def write(
    model: Model, cfg: SampleConfig, labels: list[str], node: Callable[[str], dict], samples: int
) -> dict[str, list[Result]]:
    """`samples` texts for each label, from nothing but the label, with the same seeds from cfg.seed on for each."""
    base, requests = Settings.of(cfg), []
    # 不控制时各标签问的是同一件事：种子错开，才不是同样的文字
    alike = _asked(model, base, node(labels[0])) == _asked(model, base, node(labels[-1]))
    for number, label in enumerate(labels):
        settings = dataclasses.replace(base, control=node(label))
        requests += [settings.request("", number * samples * alike + i) for i in range(samples)]
    writer = model.writer_of(requests, batch_size=cfg.batch_size)
    results: dict[int, Result] = {}
    with Console(stream="stderr").progress(len(requests), 0, title="progress_writing") as advance:
        for piece in writer.write():
            if piece.result:
                results[piece.key] = piece.result
                advance(len(results))
    return {label: [results[number * samples + i] for i in range(samples)] for number, label in enumerate(labels)}


# ---- 量 ----


def judged(judge: Judge, texts: list[str], finished: list[bool]) -> list[Verdict]:
    """Verdicts on the texts written for one label: a repeated one has none, nor has a poem that was cut off."""
    verdicts, before = [], set()
    for verdict, text, is_finished in zip(judge.verdicts(texts), map(without_space, texts), finished):
        if judge.name == "form" and not is_finished:
            verdict = Verdict(None, UNFINISHED)
        elif verdict.label and text in before:
            # 总写同一首好诗，不能算一百次
            verdict = Verdict(None, REPEATED)
        before.add(text)
        verdicts.append(verdict)
    return verdicts


def described(texts: list[str], training_texts: TrainingTexts) -> dict:
    """What is measured of texts besides their label."""
    known = [pairs for text in texts if (pairs := training_texts.known_pairs(text)) is not None]
    return {
        "distinct": [distinct(texts, n) for n in (1, 2, 3)],
        "known_pairs": statistics.fmean(known) if known else None,
        "copies": share(sum(map(training_texts.copies, texts)), len(texts)),
        "length": statistics.fmean(len(without_space(text)) for text in texts) if texts else None,
    }


def measured(
    reference: Reference, written: dict[str, list[tuple[str, bool]]], verdicts: dict[str, list[Verdict]]
) -> dict:
    """The record of one setting from (text, finished) and the verdict on each text of each label."""
    rows = {}
    for label, pairs in written.items():
        texts, finished = [text for text, _ in pairs], [done for _, done in pairs]
        rows[label] = {
            **share(sum(v.label == label for v in verdicts[label]), len(texts)),
            "judged": dict(Counter(v.label or v.why for v in verdicts[label]).most_common()),
            **described(texts, reference.training_texts), "finished": sum(finished) / len(finished),
        }
    together = [pair for pairs in written.values() for pair in pairs]
    total = {
        **mean_share(list(rows.values())), **described([text for text, _ in together], reference.training_texts),
        "finished": sum(done for _, done in together) / len(together),
    }
    return {"labels": rows, "total": total, "tunes": tunes(reference, [text for text, _ in written.get(CI, [])])}


def tunes(reference: Reference, ci: list[str]) -> dict | None:
    """Share of ci whose segment lengths are exactly those of a real one; None where the question makes no sense."""
    return share(sum(lengths(text) in reference.tunes for text in ci), len(ci)) if reference.tunes and ci else None


def real_texts(reference: Reference, data: DocumentData, samples: int) -> dict:
    """The same record of as many validation texts, or of all where there are fewer.

    Its hits are the judge's own accuracy.
    """
    by_label: dict[str, list[Document]] = {label: [] for label in reference.labels}
    for document in data.documents("val"):
        if (label := getattr(document, reference.kind)) in by_label:
            by_label[label].append(document)
    # 同样多篇才可比：不同 n 元的比例随篇数下降
    def spread(found: list[Document]) -> list[str]:
        at = np.linspace(0, len(found), min(samples, len(found)), endpoint=False).astype(int)
        return [found[i].text for i in at]

    chosen = {label: spread(found) for label, found in by_label.items()}
    together = [text for texts in chosen.values() for text in texts]
    known, accuracy = reference.training_texts, reference.accuracy
    rows = {label: {**accuracy[label], **described(texts, known), "finished": None} for label, texts in chosen.items()}
    total = {**mean_share(list(accuracy.values())), **described(together, known), "finished": None}
    return {"labels": rows, "total": total, "tunes": tunes(reference, [d.text for d in by_label.get(CI, [])])}


# ---- 整个评估 ----


def evaluate(
    cfg: SampleConfig, run_dir: Path, options: EvaluationOptions, kind: str | None, show: Callable[[str, dict], None]
) -> dict:
    """Measure a run and return what --output holds; show(name, record so far) is called after every part of it."""
    model = open_model(cfg, run_dir)
    kind = choose_kind(model, kind)
    data = data_of_run(run_dir, model)
    labels = list(data.labels.get(kind, []))
    reference = build_reference(data, kind, labels)
    record = {
        "format": FORMAT, "run": str(run_dir), "checkpoint": Path(model.name).name, "kind": kind, "labels": labels,
        "samples": options.samples, "device": device_name(model.network.device),
        "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        "settings": _plain_settings(cfg), "copy_characters": COPY,
        "judge": {"name": reference.judge.name, "accuracy": mean_share(list(reference.accuracy.values()))},
        "real": real_texts(reference, data, options.samples), "results": [],
    }
    show("real", record)
    perplexity = guided_perplexity(model, data, [0.0, *options.guidance])
    record["perplexity_without_labels"] = perplexity[0]
    by_guidance = dict(zip(options.guidance, perplexity[1:]))
    for control, guidance, node in settings_of(reference, options):
        written = write(model, cfg, labels, node, options.samples)
        pairs = {label: [(r.text, r.finish != "length") for r in results] for label, results in written.items()}
        verdicts = {label: judged(reference.judge, *map(list, zip(*listed))) for label, listed in pairs.items()}
        entry = {
            "control": control, "guidance": guidance,
            "perplexity": by_guidance.get(guidance) if control == "codes" else None,
            **measured(reference, pairs, verdicts),
        }
        if options.keep_texts:
            entry["texts"] = {
                label: [
                    {"text": r.text, "finish": r.finish, "seed": r.request.seed, "judged": v.label or v.why}
                    for r, v in zip(results, verdicts[label])
                ]
                for label, results in written.items()
            }
        record["results"].append(entry)
        show("result", record)
    return record


def _plain_settings(cfg: SampleConfig) -> dict:
    keys = ("checkpoint", "max_new_tokens", "stop", "stop_at_end_of_text", "seed", "batch_size")
    return {**{key: getattr(cfg, key) for key in keys}, "precision": cfg.precision.dtype, "sampler": dict(cfg.sampler)}
