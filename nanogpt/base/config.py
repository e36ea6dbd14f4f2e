"""Schemas of the fixed-shape parts of the configuration, and every check that needs no torch.

`check(cfg)` runs before torch is imported, so that a typing mistake answers within a second.
"""

# 训练配置的形状（dataclass）与不需要 torch 的全部检查：默认值、允许的词、范围、键与键之间的规矩
# conf/*.yaml 由 Hydra 按这里的 schema 拼；写错的键在拼的时候就报，写错的值由 check(cfg) 报，都在导入 torch 之前
# 几乎每个房间都从这里取 dataclass；core 只拿普通参数与其中小的几个，从不拿整个 cfg
# 旧的训练目录里存着全部键：改名、删键要先想到它们还得能 resume

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nanogpt.base.language import ConfigError
from nanogpt.base.moved import present_name

PACKAGE = Path(__file__).resolve().parents[1]
# conf/、data/*/prepare.py 与两个脚本所在之处：在仓库里（含可编辑安装）是仓库根目录，装成 wheel 后在包内（setup.py 放进去的）
INSTALLED = (PACKAGE / "shipped").is_dir()
ROOT = PACKAGE / "shipped" if INSTALLED else PACKAGE.parent

# 运行目录里保存的配置可能来自陌生人：只有这些 _target_ 允许被直接执行
TRUSTED_TARGETS = {
    "nanogpt.core.model.GPT",
    "nanogpt.core.optimizers.adamw",
    "nanogpt.core.optimizers.muon",
    "nanogpt.run.loggers.TensorBoardLogger",
    "nanogpt.run.loggers.WandbLogger",
}


@dataclass
class ModelConfig:
    """Shape (conf/model) and recipe (conf/arch) of a GPT."""

    _target_: str = "nanogpt.core.model.GPT"
    """Class that is built from this config."""
    name: str = "custom"
    """Preset name, for titles and default folder names."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 128
    """Longest context in tokens."""
    vocab_size: int | None = None
    """Rows of the embedding; None takes the data set's vocabulary."""
    dropout: float = 0.0
    arch: str = "modern"
    position: str = "rope"
    """rope | learned"""
    norm: str = "rmsnorm"
    """rmsnorm | layernorm"""
    activation: str = "relu2"
    """relu2 | gelu | gelu_tanh"""
    mlp_ratio: int = 4
    bias: bool = False
    qk_norm: bool = True
    embed_norm: bool = True
    tie_embeddings: bool = False
    init: str = "modern"
    """modern | gpt2"""
    logit_softcap: float = 15.0
    """Bound of |logit|; 0 switches the cap off."""
    rope_base: float = 10000.0
    ngrams: list[int] = field(default_factory=lambda: [2, 3, 4, 5])
    """Sizes n of the hashed n-gram embeddings, for example [2, 3]."""
    ngram_buckets: int = 16384
    separator: int | None = None
    """Id that begins every document and ends the one before; set from the data. None: the text runs on."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Settings of a model class of the user's own."""

    def __post_init__(self):
        # 旧的训练目录与自己的 yaml 写着旧名字
        self._target_ = present_name(self._target_)


@dataclass
class PrecisionConfig:
    """Number format of the training step."""

    dtype: str = "auto"
    """auto | fp32 | fp16 | bf16"""
    tf32: bool = True
    """Let CUDA cards use TF32 for float32 products."""
    initial_loss_scale: float = 65536.0
    loss_scale_growth_interval: int = 2000


@dataclass
class MemoryConfig:
    """What is traded for memory."""

    activation_checkpointing: str = "none"
    """none | every_block | selective | budget"""
    activation_budget_mib: int | None = None
    """Activations kept for the backward pass by activation_checkpointing=budget, MiB."""
    loss_chunk_mib: int = 256
    """Largest piece of float32 logits, MiB."""
    weights: str = "fp32"
    """fp32 | bf16: format in which the weights are stored and trained."""
    bf16_rounding: str = "stochastic"
    """stochastic | kahan: how small updates survive in bf16 weights."""
    optimizer_state: str = "fp32"
    """fp32 | int8"""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as its gradient is there, and free the gradient."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in RAM."""


@dataclass
class FinetuneConfig:
    """Which weights are trained; see nanogpt.core.memory.lora."""

    method: str = "full"
    """full | lora"""
    rank: int = 8
    alpha: float = 16.0
    """The low-rank update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """On the input of the low-rank branch only."""
    linears: list[str] = field(default_factory=lambda: ["c_attn", "c_proj", "c_fc"])
    """Names of the linears inside the blocks that get adapters."""


@dataclass
class HardwareConfig:
    """The machine that figures refer to; None is read or measured."""

    name: str = "auto"
    device_names: list[str] = field(default_factory=list)
    """What the driver calls this card, so that hardware=auto knows it; several cards may share a name and differ in memory."""
    dtype: str | None = None
    """bf16 | fp16 | fp32: what precision=auto takes on this card; None asks the card."""
    peak_tflops_fp32: float | None = None
    """Dense float32 peak, TFLOP/s."""
    peak_tflops_half: float | None = None
    """Dense fp16/bf16 peak with float32 accumulation, TFLOP/s."""
    bandwidth_gb_per_s: float | None = None
    """Memory bandwidth, 10^9 bytes/s."""
    pcie_gb_per_s: float | None = None
    """Copies between RAM and the card, 10^9 bytes/s, each way."""
    vram_gib: float | None = None
    """Memory of the card, GiB; a larger card is capped to behave like it."""
    context_gib: float = 0.4
    """VRAM that CUDA itself takes, beside the allocator."""
    desktop_gib: float = 0.0
    """VRAM that the desktop and other programs take."""
    ram_gib: float | None = None
    """Memory budget on a CPU, GiB; None takes what the machine has free."""


@dataclass
class TrialConfig:
    """A bounded trial in a process of its own instead of a training; see nanogpt.sweep.trial."""

    enabled: bool = False
    warmup_steps: int = 2
    """Optimizer steps before the clock starts."""
    steps: int = 5
    """Timed optimizer steps."""
    timeout_s: float = 600.0
    skip_predicted: bool = True
    """Skip a setting whose predicted peak is above the budget."""
    margin: float = 0.05
    """Part of the budget that stays free."""
    again: bool = False
    """Measure anew what an earlier sweep has measured."""


@dataclass
class TrainConfig:
    """Top level of conf/train.yaml; the comments there say when to change what."""

    out_dir: str | None = None
    overwrite: bool = False
    resume: str | None = None
    checkpoint: str | None = None
    """Of the run that resume or init_from names; None: its last to go on from, its best to start from."""
    init_from: str | None = None
    """Pretrained weights to start from; see nanogpt.weights.pretrained."""
    seed: int = 1337
    device: str = "auto"
    lang: str = "auto"
    compile: str = "auto"
    """auto | true | false: torch.compile of training steps; auto on a card with Triton when the training is long enough, never in trials."""
    deterministic: bool = True
    """Demand deterministic kernels on a card; an operation without one is an error."""
    max_iters: int = 250
    plan: str = "false"
    """false | true | matrix: say what would fit, train nothing."""
    batch_size: int | str = 16
    """Rows per micro-batch, or auto."""
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    """Rows per optimizer step, instead of batch_size x gradient_accumulation_steps."""
    learning_rate: float = 1e-2
    min_lr: float = 0.0
    warmup_iters: int | None = None
    """Linear warm-up: step i (from 0) takes (i + 1) / warmup_iters of learning_rate, so the last one takes all of it; nanoGPT divides by
    warmup_iters + 1. None: 2% of the training, 100 at most."""
    lr_decay_iters: int | None = None
    lr_schedule: str = "linear"
    decay_fraction: float = 0.2
    grad_clip: float = 1.0
    dropout: float = 0.0
    """Goes into model.dropout."""
    eval_interval: int = 125
    eval_tokens: int | None = None
    eval_batch_size: int | None = None
    early_stop_evals: int = 0
    target_val_loss: float | None = None
    log_interval: int = 10
    save_interval: int | None = None
    keep: int = 2
    max_nonfinite_steps: int = 10
    label_dropout: float = 0.1
    """Probability that a training document loses its labels."""
    sample_tokens: int = 300
    sample_prompt: str | None = None
    sample_temperature: float = 0.8
    bundle_data_mib: int = 32
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: Any = MISSING
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trial: TrialConfig = field(default_factory=TrialConfig)
    dataset: Any = MISSING
    logger: Any = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    """Option chosen in each config group; filled in by the program."""


# 值是路径、是文字的键，训练与写作共用：命令行上敲的就是它，不经 Hydra 的语法
PATH_KEYS = (
    "out_dir", "resume", "init_from", "dataset.path", "dataset.dir", "dataset.source", "prompts", "output", "hydra.sweep.dir",
)
TEXT_KEYS = ("sample_prompt", "start", "control.style", "control.emotion")
# 这些后缀的 dataset.path 是一条条记录，不是连着的文字
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")

CHOICES = {
    "lang": ("auto", "zh", "en"),
    "compile": ("auto", "true", "false"),
    "lr_schedule": ("cosine", "linear", "wsd", "constant"),
    "model.position": ("rope", "learned"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.activation": ("relu2", "gelu", "gelu_tanh"),
    "model.init": ("modern", "gpt2"),
    "precision.dtype": ("auto", "fp32", "fp16", "bf16"),
    "hardware.dtype": ("bf16", "fp16", "fp32", "null"),
    "memory.activation_checkpointing": ("none", "every_block", "selective", "budget"),
    "memory.weights": ("fp32", "bf16"),
    "memory.bf16_rounding": ("stochastic", "kahan"),
    "memory.optimizer_state": ("fp32", "int8"),
    "plan": ("false", "true", "matrix"),
    "finetune.method": ("full", "lora"),
}
# 没有哪次训练会走这么多步；再大多半是打错了，还可能溢出
MANY = 10**12
# float32 装得下的数
HUGE = 1e38
# 下限（含）与上限（含）：上限不是建议，只拦住会吃光内存的打字错误
RANGES = {
    "seed": (0, 2**63 - 1),
    "max_iters": (1, MANY),
    "global_batch_size": (1, 10**7),
    "gradient_accumulation_steps": (1, 10**6),
    "min_lr": (0, 1000),
    "warmup_iters": (0, MANY),
    "lr_decay_iters": (1, MANY),
    "decay_fraction": (0, 1),
    "grad_clip": (0, HUGE),
    "label_dropout": (0, 1),
    "eval_interval": (1, MANY),
    "eval_tokens": (1, 10**15),
    "eval_batch_size": (1, 10**6),
    "early_stop_evals": (0, MANY),
    "log_interval": (1, MANY),
    "save_interval": (1, MANY),
    "keep": (1, MANY),
    "max_nonfinite_steps": (1, MANY),
    "sample_tokens": (0, 10**7),
    "sample_temperature": (0, 100),
    "bundle_data_mib": (0, 10**9),
    "model.n_layer": (1, 10**4),
    "model.n_head": (1, 10**5),
    "model.n_embd": (1, 10**6),
    "model.block_size": (1, 10**8),
    "model.vocab_size": (1, 10**9),
    "model.mlp_ratio": (1, 1000),
    "model.logit_softcap": (0, HUGE),
    "model.rope_base": (1, HUGE),
    "model.ngram_buckets": (1, 10**9),
    "precision.initial_loss_scale": (1, HUGE),
    "precision.loss_scale_growth_interval": (1, MANY),
    "memory.loss_chunk_mib": (1, 10**9),
    "memory.activation_budget_mib": (1, 10**9),
    "finetune.rank": (1, 10**6),
    "finetune.alpha": (0, HUGE),
    "hardware.peak_tflops_fp32": (0, 10**9),
    "hardware.peak_tflops_half": (0, 10**9),
    "hardware.bandwidth_gb_per_s": (0.1, 10**9),
    "hardware.pcie_gb_per_s": (0.1, 10**9),
    "hardware.vram_gib": (0.1, 10**6),
    "hardware.context_gib": (0, 10**6),
    "hardware.desktop_gib": (0, 10**6),
    "hardware.ram_gib": (0.1, 10**6),
    "trial.warmup_steps": (0, 10**6),
    "trial.steps": (1, 10**6),
    "trial.timeout_s": (1, 10**7),
    "trial.margin": (0, 0.9),
}


def lookup(cfg: Any, key: str) -> Any:
    """Value at a dotted key of nested dataclasses."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def check_choices(cfg: Any, choices: dict[str, tuple[str, ...]]) -> None:
    """Refuse a word that is not one of the allowed ones."""
    for key, allowed in choices.items():
        value = lookup(cfg, key)
        got = "null" if value is None else str(value)
        # compile=true 会被 YAML 读成布尔，再变成 "True"
        if got.lower() not in allowed:
            raise ConfigError("not_a_choice", key=key, got=got, allowed=" | ".join(allowed))


def check_range(key: str, got: float | None, low: float, high: float | None) -> None:
    """Refuse a number outside low … high (None: no limit); None passes."""
    # 写成 not (>=) 而不是 <：NaN 与任何数比较都为假，也要拦下
    if got is not None and (not got >= low or (high is not None and not got <= high)):
        wanted = f">= {low:g}" if high is None else f"{low:g} … {high:g}"
        raise ConfigError("out_of_range", key=key, got=got, wanted=wanted)


def check_checkpoint(cfg: Any) -> None:
    """Refuse a checkpoint that is none, and one of no run."""
    if cfg.checkpoint is None:
        return
    if not re.fullmatch(r"last|best|iter_\d+", cfg.checkpoint):
        raise ConfigError("not_a_choice", key="checkpoint", got=cfg.checkpoint, allowed="last | best | iter_00001000 …")
    if not cfg.resume and not cfg.init_from:
        raise ConfigError(
            "checkpoint={got}: there is no run to take it from; add resume=<run folder> to go on from it, or "
            "init_from=<run folder> to start from it",
            got=cfg.checkpoint,
        )


def check_device(named: str) -> None:
    """Refuse a device name that no machine has."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", named):
        raise ConfigError("not_a_choice", key="device", got=named, allowed="auto | cpu | cuda | cuda:0 | cuda:1 …")


def check_start(init_from: str | None) -> None:
    """Refuse nanoGPT's words for where a model comes from: they are no weights."""
    if init_from in ("scratch", "resume") and not Path(init_from).exists():
        raise ConfigError(
            "init_from=scratch: random weights need no key here; leave it out",
        ) if init_from == "scratch" else ConfigError(
            "init_from=resume: name the run: resume=outputs/my-run to train it on, out_dir=outputs/my-run to write "
            "with it",
        )


def check_ranges(cfg: Any, ranges: dict[str, tuple[float, float | None]]) -> None:
    """Refuse a number outside its stated range."""
    for key, (low, high) in ranges.items():
        check_range(key, lookup(cfg, key), low, high)


def check_rates(cfg: Any) -> None:
    """Ranges with an open end."""
    if not 0 < cfg.learning_rate <= 1000:
        raise ConfigError("out_of_range", key="learning_rate", got=cfg.learning_rate, wanted="> 0, <= 1000")
    for key in ("model.dropout", "finetune.dropout"):
        if not 0 <= lookup(cfg, key) < 1:
            raise ConfigError("out_of_range", key=key, got=lookup(cfg, key), wanted=">= 0, < 1")


def check_model(model: Any) -> None:
    """Rules between the fields of a ModelConfig."""
    if model.n_embd % model.n_head:
        raise ConfigError(
            "{key}={got} is not divisible by {other}={by}; choose a multiple of {by}",
            key="model.n_embd", got=model.n_embd, other="model.n_head", by=model.n_head,
        )
    if model.position == "rope" and (model.n_embd // model.n_head) % 2:
        raise ConfigError(
            "model.n_embd={n_embd} / model.n_head={n_head} is odd, and RoPE turns pairs; choose an even head size or "
            "model.position=learned",
            n_embd=model.n_embd, n_head=model.n_head,
        )
    for n in model.ngrams:
        if not 2 <= n <= 8:
            raise ConfigError("out_of_range", key="model.ngrams", got=list(model.ngrams), wanted="2 … 8")


def check_schedule(cfg: Any) -> None:
    """Rules between learning rates and iteration counts."""
    if cfg.min_lr > cfg.learning_rate:
        raise ConfigError(
            "{key}={got} is above {other}={limit}; lower {key} or raise {other}",
            key="min_lr", got=cfg.min_lr, other="learning_rate", limit=cfg.learning_rate,
        )
    end = cfg.lr_decay_iters or cfg.max_iters
    if (cfg.warmup_iters or 0) >= end:
        other = "lr_decay_iters" if cfg.lr_decay_iters else "max_iters"
        raise ConfigError(
            "warmup_iters={got} is not shorter than {other}={limit}; lower warmup_iters or train longer",
            got=cfg.warmup_iters, other=other, limit=end,
        )


def check_batch(cfg: Any) -> None:
    """Rules between the keys that say how many rows a step takes."""
    batch, total, accumulation = cfg.batch_size, cfg.global_batch_size, cfg.gradient_accumulation_steps
    if batch == "auto":
        # auto 自己决定累积几次：要有一个总数可凑
        if total is None:
            raise ConfigError(
                "batch_size=auto needs global_batch_size: the rows of one optimizer step, for example "
                "global_batch_size=64",
            )
        return
    if not isinstance(batch, int):
        raise ConfigError("not_a_choice", key="batch_size", got=batch, allowed="1 2 3 … | auto")
    check_range("batch_size", batch, 1, 10**6)
    # 默认的 1 等于没写；写了就必须说的是同一件事
    if total is not None and accumulation != 1 and batch * accumulation != total:
        raise ConfigError(
            "global_batch_size={total} is not batch_size={batch} x gradient_accumulation_steps={accum} = {product}; "
            "drop one of the two",
            batch=batch, accum=accumulation, product=batch * accumulation, total=total,
        )


def check_memory(cfg: Any) -> None:
    """Rules between the parts of memory= and the rest."""
    memory = cfg.memory
    if (memory.activation_checkpointing == "budget") != (memory.activation_budget_mib is not None):
        raise ConfigError(
            "memory.activation_checkpointing={mode} with memory.activation_budget_mib={budget}; set the budget if and "
            "only if the mode is budget",
            mode=memory.activation_checkpointing, budget=memory.activation_budget_mib,
        )
    if memory.weights == "bf16" and cfg.precision.dtype.lower() not in ("auto", "bf16"):
        raise ConfigError(
            "precision.dtype={got}: memory.weights=bf16 computes in bf16; choose precision=bf16 or memory.weights=fp32",
            got=cfg.precision.dtype,
        )
    if memory.optimizer_in_backward:
        # 梯度一到就用掉：没有什么可以累积、还原或求和
        if cfg.precision.dtype.lower() == "fp16":
            raise ConfigError(
                "precision=fp16: memory.optimizer_in_backward=true has no loss scaling; choose precision=bf16, or "
                "memory.optimizer_in_backward=false",
            )
        rows = cfg.global_batch_size or (cfg.batch_size * cfg.gradient_accumulation_steps if isinstance(cfg.batch_size, int) else None)
        if isinstance(cfg.batch_size, int) and rows > cfg.batch_size:
            raise ConfigError(
                "memory.optimizer_in_backward=true frees gradients at once and cannot accumulate {rows} rows in "
                "pieces of batch_size={batch}; set gradient_accumulation_steps=1 and no global_batch_size, or "
                "memory.optimizer_in_backward=false",
                rows=rows, batch=cfg.batch_size,
            )


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule with every default filled in; see core.schedule.learning_rate_at."""

    learning_rate: float
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int
    lr_schedule: str
    decay_fraction: float


def schedule_of(cfg: TrainConfig) -> Schedule:
    """The schedule of a run; decay ends with the run and warm-up takes 2% of it unless set otherwise."""
    end = cfg.lr_decay_iters or cfg.max_iters
    # 短跑几步的试验也能用默认值，不会撞上“预热比训练长”
    warmup = min(100, end // 50) if cfg.warmup_iters is None else cfg.warmup_iters
    return Schedule(cfg.learning_rate, cfg.min_lr, warmup, end, cfg.lr_schedule, cfg.decay_fraction)


def check_parts(cfg: Any) -> None:
    """Refuse parts that are not written as a `_target_` with its settings."""
    loggers = cfg.logger or {}
    if not isinstance(loggers, dict):
        raise ConfigError("wrong_type", key="logger", got=loggers, want="{name: {_target_: …}}")
    for key, node in {"optimizer": cfg.optimizer, **{f"logger.{name}": node for name, node in loggers.items()}}.items():
        if not isinstance(node, dict):
            raise ConfigError("wrong_type", key=key, got=node, want="{_target_: …}")
        if not isinstance(node.get("_target_"), str):
            raise ConfigError("missing_key", key=f"{key}._target_")
    if not isinstance(cfg.dataset, dict):
        raise ConfigError("wrong_type", key="dataset", got=cfg.dataset, want="{name: …}")


def check(cfg: Any) -> None:
    """Refuse every wrong value or combination that can be seen without torch or data; one line each."""
    check_choices(cfg, CHOICES)
    check_ranges(cfg, RANGES)
    check_parts(cfg)
    check_rates(cfg)
    check_model(cfg.model)
    check_batch(cfg)
    check_memory(cfg)
    check_schedule(cfg)
    check_checkpoint(cfg)
    check_device(cfg.device)
    check_start(cfg.init_from)
    if missing := {"name", "dir"} - set(cfg.dataset):
        raise ConfigError("missing_key", key=f"dataset.{min(missing)}")
    name = str(cfg.dataset["name"])
    # 名字会拼成脚本路径：限制字符，配置文件就不能指向别处的代码
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or not prepare_script(name).is_file():
        raise ConfigError(
            "dataset.name={got}: there is no data/{got}/prepare.py; choose another dataset or write that script",
            got=name,
        )


def prepare_script(name: str) -> Path:
    """data/<name>/prepare.py of the program, else the one in the current folder, whether or not it is there."""
    shipped = ROOT / "data" / name / "prepare.py"
    return shipped if shipped.is_file() else Path("data", name, "prepare.py")


def targets(node: Any) -> set[str]:
    """All dotted `_target_`s in a config of plain values, by their present names."""
    if isinstance(node, dict):
        found = {present_name(node["_target_"])} if isinstance(node.get("_target_"), str) else set()
        return found.union(*(targets(v) for v in node.values()))
    return set().union(*(targets(v) for v in node)) if isinstance(node, list) else set()


def untrusted_targets(saved: Any, typed: Any) -> list[str]:
    """Dotted `_target_`s of a saved config that are neither nanogpt's own nor in the config just typed."""
    return sorted(targets(saved) - targets(typed) - TRUSTED_TARGETS)
