"""What each part of the recipe is worth: one study is a table of variants, each trained with several seeds.

    python benchmarks/ablate.py STUDY [--seeds 1337 1 2] [--tokens 1500000] [--equal time|tokens] [--jobs 2] [--only NAME …]
                                [--device cpu|cuda] [--out FOLDER]

Studies: see STUDIES below. Every training has a process of its own with one thread; with `--equal time` a variant trains
on as many more tokens as it is faster than the first one, measured in turn, unless the study says how often the text is
read, or how many tokens. A variant is judged on the last tenth of the *training* part of tiny-shakespeare, so that the
validation part stays unseen.

Writes benchmarks/results/ablate_<study>.json after every training; the same command goes on where it stopped.
`--quick` trains a few iterations of a small model and writes nothing.
"""

import argparse
import concurrent.futures
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# nanoGPT 的切法：前九成训练，后一成验证；这里只用前九成，其中的最后一成拿来挑选
TRAINING_PART = 0.9
SMALL = ["model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.block_size=64", "batch_size=32"]
CHAR, BPE, GPT2 = (["dataset.tokenizer=char"], ["dataset.tokenizer=bpe", "dataset.vocab_size=4096"], ["dataset.tokenizer=gpt2"])

# 什么都不收敛着的默认值
WITHOUT = ["model.ngrams=[2,3,4,5]", "dropout=0", "optimizer.ngram_lr_scale=3", "optimizer.weight_decay=0.1"]

# 读几遍、每张表的学习率、丢多少，哪个组合在哪种文字上最好：run/regularize.py 的规则由它定
def held_back(characters: int, passes: int, *settings: str, decay: float | None = None) -> dict[str, list[str]]:
    """Variants of a text of so many characters read so often: 'tables rate dropout' each."""
    found = {}
    for setting in settings:
        tables, rate, dropout = setting.split()
        name = f"{characters // 1000}k characters, {passes} passes, tables {tables} x {rate}, dropout {dropout}"
        found[name + (f", decay {decay}" if decay else "")] = [
            f"model.ngrams=[{','.join(tables.strip('-'))}]", f"optimizer.ngram_lr_scale={rate}", f"dropout={dropout}",
            f"passes={passes}", f"characters={characters}", f"optimizer.weight_decay={decay or 0.1}",
        ]
    return found


def decay_and_rate(characters: int) -> dict[str, list[str]]:
    """Variants of eight passes over so many characters."""
    return {
        f"decay {decay}, rate {rate:g}": [f"optimizer.weight_decay={decay}", f"learning_rate={rate:g}", "passes=8", f"characters={characters}"]
        for decay in (0.5, 1.0) for rate in (1e-2, 5e-3)
    }


def dropped(characters: int, *cells: str) -> dict[str, list[str]]:
    """Variants of so many characters: 'passes rows dropout' each."""
    found = {}
    for cell in cells:
        passes, rows, dropout = cell.split()
        found[f"{passes} passes, {rows} rows, dropout {dropout}"] = [
            f"passes={passes}", f"characters={characters}", f"batch_size={rows}", f"dropout={dropout}",
        ]
    return found


# 默认配方的每一部分：换掉或关掉，一次一样
PARTS: dict[str, list[str]] = {
    "soft-cap 15": [],
    "no tables": ["model.ngrams=[]"],
    "table of 2": ["model.ngrams=[2]"],
    "tables of 2 and 3": ["model.ngrams=[2,3]"],
    "4096 rows": ["model.ngram_buckets=4096"],
    "65536 rows": ["model.ngram_buckets=65536"],
    "tables' rate x 1": ["optimizer.ngram_lr_scale=1"],
    "dropout 0.1": ["dropout=0.1"],
    "gelu": ["model.activation=gelu"],
    "swiglu": ["model.activation=swiglu"],
    "no soft-cap": ["model.logit_softcap=0"],
    "no qk-norm": ["model.qk_norm=false"],
    "tied": ["model.tie_embeddings=true"],
    "gpt2 init": ["model.init=gpt2"],
    "no embed-norm": ["model.embed_norm=false"],
    "embedding's rate x 1": ["optimizer.embedding_lr_scale=1"],
    "embedding's rate x 10": ["optimizer.embedding_lr_scale=10"],
    "adamw": ["optimizer=adamw", "learning_rate=3e-3"],
}

# 量它们的时候默认还有限幅；量完就去掉了
CAPPED = "model.logit_softcap=15"
NO_CAP, SLOWER = PARTS["no soft-cap"], PARTS["embedding's rate x 10"]
# 短训练里单独换时更好的，训练久一点还好不好
LONGER: dict[str, list[str]] = {
    **{name: PARTS[name] for name in ("soft-cap 15", "no soft-cap")},
    **{f"no soft-cap, {name}": [*NO_CAP, *PARTS[name]] for name in ("embedding's rate x 10", "no embed-norm", "no qk-norm")},
}
# 一个 token 三四个字符：同样的文字步数少得多，批量也小些
SMALL_BPE = [*SMALL, *BPE, "batch_size=16"]

# 注意力的 values 也查一张表（benchmarks/value_embeddings.py）：1 个或 2 个 token 的，每个 block 或只有头尾
WITH_VALUES = "model._target_=benchmarks.value_embeddings.ValueGPT"
VALUES: dict[str, list[str]] = {
    "default": [],
    "values of 1": [WITH_VALUES, "+model.extra.ngrams=[1]"],
    "values of 1, first and last block": [WITH_VALUES, "+model.extra.ngrams=[1]", "+model.extra.ends=true"],
    "values of 2": [WITH_VALUES, "+model.extra.ngrams=[2]"],
    "values of 1 in place of tables": [WITH_VALUES, "+model.extra.ngrams=[1]", "model.ngrams=[]"],
}

# 研究 -> (共有的设置, 变体)；第一个变体是基准
STUDIES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "parts_char": ([*SMALL, *CHAR, CAPPED], PARTS),
    "parts_bpe": ([*SMALL_BPE, CAPPED], PARTS),
    # 宽一倍、上下文长一倍的 model=tiny：最要紧的几样还是不是一样
    "parts_tiny": ([*CHAR, "model=tiny", "batch_size=16"], {
        "default": [],
        **{name: PARTS[name] for name in ("no tables", "tables of 2 and 3", "swiglu", "no qk-norm", "tied", "gpt2 init", "adamw")},
    }),
    "parts_gpt2": ([*SMALL, *GPT2, "batch_size=16", CAPPED], PARTS),
    "values_char": ([*SMALL, *CHAR], VALUES),
    "values_bpe": (SMALL_BPE, VALUES),
    "values_gpt2": ([*SMALL, *GPT2, "batch_size=16"], VALUES),
    "longer_bpe": ([*SMALL_BPE, CAPPED], LONGER),
    # 读一遍的文字越大，几个 token 的表才值得；--text 换成大的文字，--tokens 给一遍
    "once": ([*SMALL_BPE, *NO_CAP, *SLOWER], {
        f"tables {','.join(map(str, tables)) or '-'}": [f"model.ngrams={tables}".replace(" ", "")]
        for tables in ([], [2], [2, 3], [2, 3, 4], [2, 3, 4, 5])
    }),
    # 输入 embedding 的学习率倍数；一遍约二十七万个 token
    "embedding": ([*SMALL_BPE, CAPPED], {
        f"{tokens // 1000}k tokens, x {scale}": [f"tokens={tokens}", f"optimizer.embedding_lr_scale={scale}"]
        for tokens in (270_000, 1_080_000) for scale in (1, 10, 30)
    }),
    # 同样的 token、四种宽度、五种学习率：最好的学习率该不该随宽度变
    "rates": (
        [*CHAR, "model.n_layer=4", "model.n_head=4", "model.block_size=64", "batch_size=32"],
        {
            f"{width} wide, {rate:g}": [f"model.n_embd={width}", f"learning_rate={rate:g}"]
            for width in (64, 128, 256, 384)
            for rate in (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
        },
    ),
    # CPU 的 bf16 单元与 fp32 训出来的是不是一样好
    "formats": ([*CHAR, "model=small"], {"fp32": ["precision=fp32"], "bf16": ["precision=auto", "precision.cpu_bf16=all"]}),
    # 文字多大、读几遍：读得多的那次不该更差；表与 dropout 由文字定，对比全部的表、不丢
    "turn": (
        [*SMALL, *CHAR],
        {
            f"{characters // 1000}k characters, {passes} passes{name}": [*settings, f"passes={passes}", f"characters={characters}"]
            for characters in (62_000, 250_000)
            for passes in (2, 4, 8)
            for name, settings in {"": [], ", all tables, no dropout": WITHOUT}.items()
        },
    ),
    # 4/4/128，一个线程
    "held_back": ([*SMALL, *CHAR], {
        **held_back(250_000, 8, "234 1 0.1", "23 1 0.05", "234 1 0.05", "23 1 0.1", "2 1 0.1", "23 1 0.2", "2 1 0.2"),
        **held_back(250_000, 4, "2345 1 0.05", "234 1 0", "2345 1 0.1", "234 1 0.05", "23 1 0.05", "23 1 0.1", "2 1 0.05", "234 1 0.1"),
        **held_back(62_000, 8, "23 1 0.1", "23 1 0.05", "234 1 0.1", "2 3 0", "2 1 0.1", "2 1 0.2"),
        **held_back(250_000, 2, "2345 1 0", "234 1 0"),
        **held_back(62_000, 4, "23 1 0", "234 1 0", "234 1 0.05", "2345 1 0.05"),
        **held_back(62_000, 2, "2345 1 0", "234 1 0", "2345 1 0.05"),
        **held_back(1_000_000, 2, "2345 1 0", "234 1 0", "23 1 0"),
    }),
    # 大得多的模型在同样的文字上，还有衰减多少
    "held_back_small": ([*CHAR, "model=small"], {
        **held_back(250_000, 8, "- 1 0.1", "- 1 0.2", "2 1 0.2", "- 1 0.3", decay=0.1),
        **held_back(250_000, 4, "- 1 0", "- 1 0.1", "23 1 0.1", "- 1 0.2", decay=0.1),
        **held_back(250_000, 8, "- 1 0.2", decay=0.5),
        **held_back(250_000, 4, "- 1 0.1", decay=0.5),
        **held_back(1_000_000, 8, "- 1 0.2", "- 1 0.1", decay=0.5),
        **held_back(1_000_000, 4, "- 1 0.1", "23 1 0.1", decay=0.5),
        **held_back(1_000_000, 4, "- 1 0.1", "23 1 0.1", "- 1 0", decay=0.1),
        # 后一个是以前的默认值
        **held_back(1_000_000, 8, "- 1 0.2", "23 3 0.1", decay=0.1),
    }),
    # 衰减多少与学习率多高，两样一起定：同样的大模型读一百万个字符，4/4/128 读二十五万个
    "decay_and_rate": ([*CHAR, "model=small", "model.ngrams=[]", "dropout=0.1"], decay_and_rate(1_000_000)),
    "decay_and_rate_128": ([*SMALL, *CHAR, "model.ngrams=[2,3]", "optimizer.ngram_lr_scale=1", "dropout=0.1"], decay_and_rate(250_000)),
    # 背起来以后会不会再好起来：early_stop_evals=null 照着这些曲线定，tests/run/test_regularize.py 核对
    "stop": (
        ["model.n_layer=2", "model.n_head=4", "model.n_embd=64", "model.block_size=64", "batch_size=16", "dropout=0", *CHAR],
        {
            f"{characters // 1000}k characters, {passes} passes, {schedule}, {name}": [
                f"lr_schedule={schedule}", f"model.ngrams={tables}", f"passes={passes}", f"characters={characters}", "evaluations=30",
            ]
            for characters, passes in ((40_000, 8), (40_000, 24), (120_000, 8))
            for schedule in ("linear", "wsd")
            for name, tables in {"all tables": "[2,3,4,5]", "no tables": "[]"}.items()
        },
    ),
    # 预设照默认值训练：读得多的那次不该更差
    "presets": (CHAR, {
        f"{preset}, {characters // 1000}k characters, {passes} passes": [f"model={preset}", f"passes={passes}", f"characters={characters}"]
        for preset, characters, most in (
            ("tiny", 250_000, 8), ("medium", 100_000, 8), ("small", 250_000, 8), ("tiny", 1_000_000, 8), ("small", 1_000_000, 8),
            ("medium", 1_000_000, 8), ("large", 1_000_000, 8),
        )
        for passes in (most // 4, most // 2, most)
    }),
    # 同上，文字大得多：poems.py 写的诗，5 MB 与全部 52 MB；批量照一张卡取
    "large_texts": (CHAR, {
        f"{preset}, {size}, {passes:g} passes": [f"model={preset}", f"batch_size={rows}", f"passes={passes}", f"characters={characters}"]
        for preset, rows, size, characters, most in (
            ("tiny", 64, "52 MB", 18_579_434, 2), ("small", 64, "52 MB", 18_579_434, 2),
            ("tiny", 64, "5 MB", 1_770_000, 8), ("small", 64, "5 MB", 1_770_000, 8), ("medium", 16, "5 MB", 1_770_000, 8),
        )
        for passes in (most, most / 2, most / 4)
    } | {
        f"tiny, 5 MB, 8 passes, {name}": ["model=tiny", "batch_size=64", "passes=8", "characters=1770000", *settings]
        for name, settings in {"dropout 0.15": ["dropout=0.15"], "dropout 0.2": ["dropout=0.2"], "table of 2": ["model.ngrams=[2]"]}.items()
    } | {
        f"medium, 5 MB, {passes} passes, dropout {dropout}": ["model=medium", "batch_size=16", f"passes={passes}", "characters=1770000", f"dropout={dropout}"]
        for passes, dropout in ((8, 0.3), (8, 0.4), (4, 0.2), (4, 0.3))
    }),
    # 同样多得多的参数，英文的字符
    "dropout_medium": (
        [*CHAR, "model=medium"], dropped(1_000_000, *(f"{passes} 16 {dropout}" for passes in (8, 4) for dropout in (0.1, 0.2, 0.3))),
    ),
    # 该丢多少，还看不看批量与词表：剧本的字符，剧本的 BPE，诗（poems.py，--text）的字；后两样一个 token 的内容是字符的两倍
    "dropout": ([*CHAR, "model=tiny"], dropped(250_000, "8 64 0.1", "8 64 0.15", "8 64 0.2", "8 16 0.1", "8 16 0.15")),
    "dropout_bpe": (SMALL_BPE, {
        f"{passes} passes, dropout {dropout}": [f"tokens={passes * 243_000}", f"dropout={dropout}"]
        for passes, all_of in ((8, (0.1, 0.2, 0.3)), (4, (0.05, 0.1, 0.2)))
        for dropout in all_of
    }),
    "dropout_bpe_tiny": ([*BPE, "model=tiny"], {f"8 passes, dropout {dropout}": ["tokens=1944000", f"dropout={dropout}"] for dropout in (0.1, 0.15, 0.2)}),
    "dropout_poems": ([*CHAR, "model=tiny"], dropped(350_000, "8 16 0.1", "8 16 0.15", "8 16 0.2", "8 16 0.3", "4 16 0.05", "4 16 0.1")),
    # 同样的诗，短得多：输出层衰减多少，丢弃多少照默认值
    "head_decay": ([*CHAR, "model=tiny", "batch_size=16"], {
        f"{characters // 1000}k characters, {passes} passes, decay {decay:g}": [
            f"characters={characters}", f"passes={passes}", f"optimizer.head_weight_decay={decay:g}",
        ]
        for characters, passes, decays in (
            (60_000, 8, (0, 3)), (120_000, 8, (0, 1, 3, 10)), (120_000, 4, (0, 1.5, 3)), (350_000, 8, (0, 3)),
        )
        for decay in decays
    }),
    "head_decay_small": ([*CHAR, "model=small", "batch_size=16"], {
        f"60k characters, {passes} passes, decay {decay:g}": ["characters=60000", f"passes={passes}", f"optimizer.head_weight_decay={decay:g}"]
        for passes, decays in ((8, (0, 3, 6)), (4, (0, 1.5)))
        for decay in decays
    }),
    # nanoGPT 的 GPU 例子的形状与批量，读 27 遍：批量大、遍数多，就要丢得多；held_back_small 的小批量少读几遍，反而更好
    "reference": (
        [*CHAR, "model.n_layer=6", "model.n_head=6", "model.n_embd=384", "model.block_size=256", "batch_size=64"],
        {
            name: [f"model.ngrams={tables}", f"dropout={dropout}", f"optimizer.weight_decay={decay}", f"learning_rate={rate:g}", "passes=27"]
            for name, tables, dropout, decay, rate in (
                ("dropout 0.3", "[]", 0.3, 0.1, 1e-2), ("dropout 0.4", "[]", 0.4, 0.1, 1e-2), ("dropout 0.2", "[]", 0.2, 0.1, 1e-2),
                ("dropout 0.3, decay 0.5", "[]", 0.3, 0.5, 1e-2), ("dropout 0.3, table of 2", "[2]", 0.3, 0.1, 1e-2),
                ("dropout 0.3, rate 2e-2", "[]", 0.3, 0.1, 2e-2),
            )
        },
    ),
}
# 不是设置，是研究自己的话
OURS = ("passes=", "tokens=", "characters=", "evaluations=")
# 各种 CPU 上都是同一种数字格式，除非命令行上写了 precision=；计时与训练一样
ON_CPU = ["compile=false", "precision=fp32"]
QUICK = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "batch_size=4", "eval_tokens=512"]


def on_cpu(overrides: list[str]) -> list[str]:
    """How a CPU computes where `overrides` do not say so."""
    typed = {override.partition("=")[0] for override in overrides}
    return [setting for setting in ON_CPU if setting.partition("=")[0] not in typed]


def run(text: Path, out: Path, overrides: list[str], *, device: str, environment: dict[str, str]) -> dict:
    """Train in a process of its own; what its summary and its evaluations say."""
    how = on_cpu(overrides) if device == "cpu" else ["eval_batch_size=128"]
    command = [
        sys.executable, str(ROOT / "run_train.py"), "dataset=text_file", f"dataset.path={text.as_posix()}", f"device={device}", *how,
        "sample_tokens=0", "logger=jsonl", "log_interval=1000000", "bundle_data_mib=0", "keep=1", "early_stop_evals=0", "lang=en",
        f"out_dir={out.as_posix()}",
        *overrides,
    ]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(overrides)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary["curve"] = [[r["tokens"], round(r["val/loss"], 4)] for r in records if "val/loss" in r]
    summary["train_loss"] = next((round(r["train/loss"], 4) for r in reversed(records) if "train/loss" in r), None)
    return summary


class Study:
    """One study under way: what is known of it on disk, and how its trainings are started."""

    # 每训完一次就存：中断之后再敲一遍，只补没训的

    def __init__(self, arguments: argparse.Namespace, work: Path):
        self.arguments, self.work = arguments, work
        self.shared, self.variants = STUDIES[arguments.study]
        self.shared = [*self.shared, *(QUICK if arguments.quick else []), *arguments.overrides]
        # 现在就建：训完几个小时才发现存不下，就都丢了
        arguments.out.mkdir(parents=True, exist_ok=True)
        self.file = arguments.out / f"ablate_{arguments.study}.json"
        whole = arguments.text.read_text(encoding="utf-8")
        self.part = whole[: int(len(whole) * TRAINING_PART)]
        about = {"shared": self.shared, "tokens": arguments.tokens, "equal": arguments.equal, "characters": len(self.part)}
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() and not arguments.quick else {}
        if kept.get("about", about) != about:
            sys.exit(f"{self.file.name} holds another study ({kept['about']}); move it away first")
        self.found = {"about": about, "device": kept.get("device"), "speed": kept.get("speed", {}), "runs": kept.get("runs", [])}
        # 每次训练一个线程：两次并排也互不争核
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def of(self, variant: str, key: str) -> float | None:
        """What a variant says of its text (characters), its budget (passes or tokens) or how often it is judged
        (evaluations)."""
        return next((float(o.partition("=")[2]) for o in self.variants[variant] if o.startswith(f"{key}=")), None)

    def text(self, variant: str) -> Path:
        """The beginning of the training part that a variant is trained on."""
        part = self.part[: 20_000 if self.arguments.quick else int(self.of(variant, "characters") or len(self.part))]
        file = self.work / f"text-{len(part)}.txt"
        if not file.is_file():
            file.write_text(part, encoding="utf-8", newline="\n")
        return file

    def settings(self, variant: str) -> list[str]:
        """Overrides of a variant, and where its prepared text lies."""
        typed = [*self.shared, *(o for o in self.variants[variant] if not o.startswith(OURS))]
        vocabulary = "-".join(o.partition("=")[2] for o in typed if o.startswith(("dataset.tokenizer", "dataset.vocab_size")))
        prepared = self.work / f"prepared-{self.text(variant).stem}-{vocabulary}"
        return [*typed, f"dataset.dir={prepared.as_posix()}"]

    def tokens_per_iteration(self, variant: str) -> int:
        """Rows times context of one step."""
        values = dict(o.split("=", 1) for o in self.settings(variant))
        if "model.block_size" not in values:
            preset = (ROOT / "conf" / "model" / f"{values['model']}.yaml").read_text(encoding="utf-8")
            values["model.block_size"] = re.search(r"block_size: (\d+)", preset)[1]
        return int(values.get("batch_size", 16)) * int(values["model.block_size"])

    def time_all(self, rounds: int = 3) -> None:
        """The best tokens/s of each variant as a multiple of the first one's, measured in turn."""
        if self.arguments.equal == "tokens" or self.arguments.quick or any(self.of(v, "passes") or self.of(v, "tokens") for v in self.variants):
            return
        missing = [v for v in self.chosen if v not in self.found["speed"]]
        base = next(iter(self.variants))
        timed = list(dict.fromkeys([base, *missing])) if missing else []
        # 别的程序只会使它慢：取最快的一次，一次打扰就不会偏袒谁
        best = dict.fromkeys(timed, 0.0)
        for variant in timed * rounds:
            best[variant] = max(best[variant], self.speed(variant))
        self.found["speed"] |= {v: round(best[v] / best[base], 3) for v in missing}
        self.save()

    def speed(self, variant: str) -> float:
        """Tokens/s of a short trial."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out, settings = Path(folder) / "trial", self.settings(variant)
            command = [
                sys.executable, str(ROOT / "run_train.py"), "experiment=fit", "trial.again=true", "trial.steps=12", "trial.skip_predicted=false",
                "dataset=text_file", f"dataset.path={self.text(variant).as_posix()}", "device=cpu", *on_cpu(settings), f"out_dir={out.as_posix()}",
                *settings,
            ]
            subprocess.run(command, cwd=folder, env=self.environment, check=True, stdout=subprocess.DEVNULL)
            return json.loads((out / "trial.json").read_text(encoding="utf-8"))["tokens_per_s"]

    def train(self, variant: str, seed: int) -> dict:
        """One training of a variant."""
        passes, text = self.of(variant, "passes"), self.text(variant)
        # 文字的后一成是验证部分；按字符切，一个字符一个 token
        whole = passes and passes * 0.9 * len(text.read_text(encoding="utf-8"))
        tokens = whole or self.of(variant, "tokens") or self.arguments.tokens * self.found["speed"].get(variant, 1.0)
        iterations = 4 if self.arguments.quick else max(8, round(tokens / self.tokens_per_iteration(variant)))
        interval = max(1, iterations // int(self.of(variant, "evaluations") or 8))
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            summary = run(
                text, Path(folder) / "run",
                [*self.settings(variant), f"seed={seed}", f"max_iters={iterations}", f"eval_interval={interval}",
                 *([] if self.arguments.quick else ["eval_tokens=null"])],
                device=self.arguments.device, environment=self.environment,
            )
        kept = ("val_loss", "best_val_loss", "val_bpb", "train_loss", "iters", "tokens", "parameters", "train_s", "curve")
        figures = {k: round(v, 4) if isinstance(v, float) else v for k in kept if (v := summary.get(k)) is not None}
        self.found["device"] = summary["device"]
        return {"variant": variant, "seed": seed, **figures}

    @property
    def chosen(self) -> list[str]:
        """Names of the variants to train."""
        only = self.arguments.only
        if unknown := [name for name in only or [] if name not in self.variants]:
            sys.exit(f"--only {unknown[0]}: choose of {', '.join(self.variants)}")
        return [v for v in self.variants if not only or v in only]

    def save(self) -> None:
        """Keep what is known."""
        if not self.arguments.quick:
            self.file.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def prepare(self, missing: list[tuple[str, int]]) -> None:
        """Prepare each text once, before trainings beside each other would all do it."""
        folders = {self.settings(variant)[-1]: variant for variant, _ in missing}

        def one(item: tuple[str, str]) -> None:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                toy = [*self.settings(item[1]), *QUICK, "model=tiny", "model.ngrams=[]", "max_iters=1"]
                run(self.text(item[1]), Path(folder) / "run", toy, device="cpu", environment=self.environment)

        with concurrent.futures.ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(one, folders.items()))

    def finish(self) -> None:
        """Train what is missing, the seeds outermost so that every variant has as many."""
        self.time_all()
        done = {(r["variant"], r["seed"]) for r in self.found["runs"]}
        missing = [(v, s) for s in self.arguments.seeds for v in self.chosen if (v, s) not in done]
        self.prepare(missing)
        with concurrent.futures.ThreadPoolExecutor(self.arguments.jobs) as pool:
            under_way = [pool.submit(self.train, *job) for job in missing]
            for done_one in concurrent.futures.as_completed(under_way):
                try:
                    self.found["runs"].append(found := done_one.result())
                except RuntimeError as error:
                    # 一次失败不该带走别的
                    print(f"failed: {error}", flush=True)
                    continue
                self.save()
                print(f"{found['variant']}, seed {found['seed']}: {found['val_loss']:.4f} (best {found['best_val_loss']:.4f})", flush=True)
        for line in table(self.found, self.chosen):
            print(line)


def table(found: dict, variants: list[str]) -> list[str]:
    """Mean and spread of each variant, the best first."""
    rows = []
    for variant in variants:
        runs = [r for r in found["runs"] if r["variant"] == variant]
        if runs:
            losses, best = [r["val_loss"] for r in runs], [r["best_val_loss"] for r in runs]
            spread = max(losses) - min(losses)
            rows.append((statistics.mean(losses), variant, spread, statistics.mean(best), runs[0], len(runs)))
    lines = [f"{'variant':28} {'loss':>8} {'spread':>7} {'best':>8} {'train':>7} {'M par.':>7} {'speed':>6} seeds"]
    for loss, variant, spread, best, one, count in sorted(rows, key=lambda row: row[0]):
        speed = found["speed"].get(variant, 1.0)
        lines.append(
            f"{variant:28} {loss:8.4f} {spread:7.4f} {best:8.4f} {one['train_loss'] or 0:7.4f} {one['parameters'] / 1e6:7.2f} {speed:6.2f} {count:5}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("overrides", nargs="*", help="settings of every variant, for example model.n_embd=256")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--tokens", type=float, default=1.5e6, help="of the first variant")
    parser.add_argument("--equal", choices=("time", "tokens"), default="time")
    parser.add_argument("--jobs", type=int, default=2, help="trainings beside each other, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--text", type=Path, default=Path(os.environ.get("NANOGPT_ASSETS", "."), "tinyshakespeare.txt"))
    arguments = parser.parse_intermixed_args()
    if not arguments.text.is_file():
        sys.exit(f"--text {arguments.text}: no such file; fetch tiny-shakespeare with data/shakespeare_char/prepare.py or name a text")
    with tempfile.TemporaryDirectory() as work:
        Study(arguments, Path(work)).finish()


if __name__ == "__main__":
    main()
