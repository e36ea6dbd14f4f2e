"""Schemas of the fixed-shape parts of the configuration, and every check that needs no torch.

`check(cfg)` runs before torch is imported, so that a typing mistake answers within a second.
"""

# 训练配置的形状（dataclass）与不需要 torch 的全部检查
# 每个键的范围、允许的词与英文说明就写在它旁边，顶层的默认值与中文注释在 conf/ 的 yaml 里
# conf/*.yaml 由 Hydra 按这里的 schema 拼；写错的键在拼的时候就报，写错的值由 check(cfg) 报，都在导入 torch 之前
# 几乎每个房间都从这里取 dataclass；core 只拿普通参数与其中小的几个，从不拿整个 cfg
# 旧的训练目录里存着全部键：改名、删键要先想到它们还得能 resume

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING as REQUIRED
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt.base.language import ConfigError
from nanogpt.base.moved import present_name

PACKAGE = Path(__file__).resolve().parents[1]
# conf/、data/*/prepare.py 与两个脚本所在之处：在仓库里（含可编辑安装）是仓库根目录
# 装成 wheel 后在包内（setup.py 放进去的）
INSTALLED = (PACKAGE / "shipped").is_dir()
ROOT = PACKAGE / "shipped" if INSTALLED else PACKAGE.parent

# 没有哪次训练会走这么多步；再大多半是打错了，还可能溢出
MANY = 10**12
# float32 装得下的数
HUGE = 1e38


# ---- 一个键：类型、范围与说明在这里，顶层的默认值与中文注释在 yaml 里 ----


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes, with low and high included unless `open` says otherwise."""

    # 范围写在字段旁边，检查与错误消息都从这一处取，不会各说各的

    low: float
    high: float = math.inf
    open: str = ""
    """low | high: the end that is excluded."""

    def __contains__(self, got: float) -> bool:
        # NaN 与任何数比较都为假，也就不在里面
        return (got > self.low or (got == self.low and self.open != "low")) and (
            got < self.high or (got == self.high and self.open != "high")
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f">= {self.low:g}"
        if not self.open:
            return f"{self.low:g} … {self.high:g}"
        above, below = ">" if self.open == "low" else ">=", "<" if self.open == "high" else "<="
        return f"{above} {self.low:g}, {below} {self.high:g}"


def number(low: float, high: float, default: Any = REQUIRED, *, open: str = "", lean: Any = None) -> Any:
    """A field whose value is in a Range; a limit is not advice, it only stops typing errors that would take all memory.

    Without a default, a yaml of conf/ gives it. `lean` is the value that saves memory, if there is one.
    """
    return field(default=default, metadata={"range": Range(low, high, open), "lean": lean})


def choice(*allowed: str, default: Any = REQUIRED, lean: Any = None) -> Any:
    """A field whose value is one of these words; see number() for the rest."""
    return field(default=default, metadata={"choices": allowed, "lean": lean})


def lean(value: Any, default: Any) -> Any:
    """A field of any value of its type, of which `value` saves memory."""
    return field(default=default, metadata={"lean": value})


# model.ngrams=null 从这些里面挑
ALL_NGRAMS = (2, 3, 4, 5)


@dataclass
class ModelConfig:
    """Shape (conf/model) and recipe (conf/arch) of a GPT."""

    # 形状与配方都在一处：checkpoint 的 config.yaml 里存的就是它，从它能把模型原样造回来

    _target_: str = "nanogpt.core.model.GPT"
    """Class that is built from this config."""
    name: str = "custom"
    """Preset name, for titles and default folder names."""
    n_layer: int = number(1, 10**4, 4)
    """Transformer blocks."""
    n_head: int = number(1, 10**5, 4)
    """Attention heads; n_embd is a multiple of it unless head_dim is set."""
    n_kv_head: int | None = number(1, 10**5, None)
    """Heads of keys and values, of which each serves n_head / n_kv_head heads of queries; None: n_head."""
    head_dim: int | None = number(1, 10**5, None)
    """Size of a head; None: n_embd / n_head."""
    n_embd: int = number(1, 10**6, 256)
    """Width of the residual stream."""
    block_size: int = number(1, 10**8, 128)
    """Longest context in tokens."""
    vocab_size: int | None = number(1, 10**9, None)
    """Rows of the embedding; None takes the data set's vocabulary."""
    dropout: float | None = number(0, 1, None, open="high")
    """Probability that a value is dropped; the key dropout sets it."""
    arch: str = "modern"
    """Name of the recipe, for titles."""
    position: str = choice("rope", "learned", default="rope")
    """Rotary position encoding or learned position embeddings."""
    norm: str = choice("rmsnorm", "layernorm", default="rmsnorm")
    """Normalisation; rmsnorm has no parameters unless norm_gain=true."""
    norm_gain: bool = False
    """Whether RMSNorm, that of qk_norm included, has a trained gain for each value."""
    norm_eps: float = number(0, 1, 1e-6, open="low")
    """What RMSNorm adds to the mean square; LayerNorm adds 1e-5 to the variance."""
    activation: str = choice("relu2", "gelu", "gelu_tanh", "swiglu", default="relu2")
    """Of the feed-forward layer; relu2 is the square of ReLU, swiglu multiplies a SiLU of one half with the other."""
    mlp_ratio: int = number(1, 1000, 4)
    """Width of the feed-forward layer in units of n_embd."""
    intermediate_size: int | None = number(1, 10**7, None)
    """Width of the feed-forward layer; None: mlp_ratio x n_embd, with swiglu two thirds of it, up to a multiple of
    64."""
    bias: bool = False
    """Whether linears and LayerNorms have biases."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases where bias=false (Qwen2)."""
    qk_norm: bool = True
    """Normalise queries and keys, which allows a higher learning rate."""
    embed_norm: bool = True
    """Normalise once behind the embedding."""
    tie_embeddings: bool = False
    """Share the weights of input and output embedding."""
    init: str = choice("modern", "gpt2", default="modern")
    """Initialisation; modern starts the residual projections at zero."""
    logit_softcap: float = number(0, HUGE, 0.0)
    """Bound of |logit|; 0 switches the cap off."""
    rope_base: float = number(1, HUGE, 10000.0)
    """Base of the rotary frequencies."""
    rope_scaling: str = choice("none", "linear", "llama3", "yarn", default="none")
    """How rotary positions were stretched for a longer context: not, all by rope_factor, or only the slow ones (llama3,
    and yarn, arXiv:2309.00071)."""
    rope_factor: float = number(1, HUGE, 1.0)
    """By how much the context was stretched."""
    rope_low_freq_factor: float = number(0, HUGE, 1.0, open="low")
    """llama3, yarn: frequencies with fewer turns than this in rope_original_length are divided by rope_factor."""
    rope_high_freq_factor: float = number(0, HUGE, 4.0, open="low")
    """llama3, yarn: frequencies with more turns than this in rope_original_length stay as they are."""
    rope_original_length: int = number(1, 10**8, 8192)
    """llama3, yarn: the context before it was stretched."""
    rope_attention_factor: float = number(0, HUGE, 1.0, open="low")
    """yarn: what the rotated queries and keys are multiplied by."""
    ngrams: list[int] | None = None
    """Sizes n of the hashed n-gram embeddings, each 2 … 8, for example [2, 3]; [] has none. None: 2 … 5, the
    fewer the more often the budget reads the text and the larger vocabulary and blocks."""
    ngram_buckets: int = number(1, 10**9, 16384)
    """Rows of each n-gram table."""
    separator: int | None = None
    """Id that begins every document and ends the one before; set from the data. None: the text runs on."""
    marked: bool = False
    """Whether the first id of each packed document is written as -1 - id instead; set from the data."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Settings of a model class of the user's own."""

    def __post_init__(self):
        # 旧的训练目录与自己的 yaml 写着旧名字
        self._target_ = present_name(self._target_)

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward layer behind the activation."""
        width = self.mlp_ratio * self.n_embd
        # SwiGLU 有三个矩阵：缩到三分之二，参数才与两个矩阵的一样多
        return self.intermediate_size or (-(-width // 96) * 64 if self.activation == "swiglu" else width)

    def completed(self) -> "ModelConfig":
        """The same with ngrams and dropout filled in, as where no text is known; run.regularize knows the text."""
        ngrams = list(ALL_NGRAMS) if self.ngrams is None else self.ngrams
        return replace(self, ngrams=ngrams, dropout=self.dropout or 0.0)


@dataclass
class PrecisionConfig:
    """Number format of the training step."""

    # auto 在卡上取它的张量核心会做的：bf16，否则 fp16 加 loss scale；在 CPU 上量一次，bf16 单元快得多才用

    dtype: str = choice("auto", "fp32", "fp16", "bf16", default="auto")
    """Format of the matrix products; auto takes bf16 or fp16 where the card, or bf16 where the CPU is fast with it."""
    cpu_bf16: str = choice("auto", "none", "optimizer", "all", default="auto")
    """What runs on a CPU's own bf16 units: nothing (bf16 is then rounded and computed in float32), Muon's iteration
    alone, or all products; auto measures once on a machine, and a run keeps what it began with."""
    tf32: bool = True
    """Let CUDA cards use TF32 for float32 products."""
    initial_loss_scale: float = number(1, HUGE, 65536.0)
    """What the loss is multiplied by at first in fp16."""
    loss_scale_growth_interval: int = number(1, MANY, 2000)
    """Steps without an overflow after which the loss scale doubles."""


@dataclass
class MemoryConfig:
    """What is traded for memory."""

    # 每一项都拿时间或精度换显存，多数可以同时用；memory= 的预设是其中几种组合

    activation_checkpointing: str = choice(
        "none", "every_block", "selective", "budget", default="none", lean="selective"
    )
    """What the backward pass recomputes: nothing, every block, its cheap operations, or what a budget leaves over."""
    activation_budget_mib: int | None = number(1, 10**9, None)
    """Activations kept for the backward pass by activation_checkpointing=budget, MiB."""
    loss_chunk_mib: int = number(1, 10**9, 256, lean=16)
    """Largest piece of float32 logits, MiB."""
    weights: str = choice("fp32", "bf16", default="fp32", lean="bf16")
    """Format in which the weights are stored and trained."""
    bf16_rounding: str = choice("stochastic", "kahan", default="stochastic")
    """How small updates survive in bf16 weights."""
    optimizer_state: str = choice("fp32", "int8", default="fp32", lean="int8")
    """Format of the optimizer's state; int8 is about a quarter."""
    optimizer_in_backward: bool = lean(True, False)
    """Update each parameter as soon as its gradient is there, and free the gradient; no accumulation."""
    offload_optimizer: bool = lean(True, False)
    """Keep the optimizer's state in RAM."""


@dataclass
class FinetuneConfig:
    """Which weights are trained; see nanogpt.core.memory.lora."""

    # 与 init_from 合用：LoRA 只训练小矩阵，显存省在梯度与优化器状态上

    method: str = choice("full", "lora", default="full")
    """All weights, or low-rank matrices beside the linears of the blocks."""
    rank: int = number(1, 10**6, 8)
    """Of the low-rank matrices."""
    alpha: float = number(0, HUGE, 16.0)
    """The low-rank update is multiplied by alpha / rank."""
    dropout: float = number(0, 1, 0.0, open="high")
    """On the input of the low-rank branch only; 0.05 to 0.1 where there is little text."""
    frozen_weights: str = choice("same", "nf4", default="same")
    """Format of the frozen linears in the blocks: as memory.weights has it, or NF4, 4.5 bits each (QLoRA,
    arXiv:2305.14314)."""
    linears: list[str] = field(default_factory=lambda: ["c_attn", "c_proj", "c_fc"])
    """Names of the linears inside the blocks that get adapters; c_attn is q, k and v, c_fc gate and up of SwiGLU."""


@dataclass
class HardwareConfig:
    """The machine that figures refer to; None is read or measured."""

    # 没写的由程序读或量；写了的就当真，一张大卡可以装成小卡来试

    name: str = "auto"
    """Of the option."""
    device_names: list[str] = field(default_factory=list)
    """What the driver calls this card, so that hardware=auto knows it; cards of one name may differ in memory."""
    dtype: str | None = choice("bf16", "fp16", "fp32", "null", default=None)
    """What precision=auto takes on this card; None asks the card."""
    peak_tflops_fp32: float | None = number(0, 10**9, None)
    """Dense float32 peak, TFLOP/s."""
    peak_tflops_half: float | None = number(0, 10**9, None)
    """Dense fp16/bf16 peak with float32 accumulation, TFLOP/s."""
    bandwidth_gb_per_s: float | None = number(0.1, 10**9, None)
    """Memory bandwidth, 10^9 bytes/s."""
    pcie_gb_per_s: float | None = number(0.1, 10**9, None)
    """Copies between RAM and the card, 10^9 bytes/s, each way."""
    vram_gib: float | None = number(0.1, 10**6, None)
    """Memory of the card, GiB; a larger card is capped to behave like it."""
    context_gib: float = number(0, 10**6, 0.4)
    """VRAM that CUDA itself takes, beside the allocator."""
    desktop_gib: float = number(0, 10**6, 0.0)
    """VRAM that the desktop and other programs take."""
    ram_gib: float | None = number(0.1, 10**6, None)
    """Memory budget on a CPU, GiB; None takes what the machine has free."""


@dataclass
class ParallelConfig:
    """Several processes that train one model; see nanogpt.core.distributed and nanogpt.plan.communication."""

    # 进程由 torchrun 起：这里只说怎样分担、规划时有几个、线路多快，以及等多久算是停住了

    mode: str = choice("ddp", "fsdp", "auto", default="ddp")
    """What each process holds: the whole model (ddp), or some rows of every parameter, gradient and state (fsdp); auto:
    ddp where that fits by the plan, else fsdp."""
    sum_gradients: str = choice("last", "every", default="last")
    """fsdp: sum gradients over the processes in the last micro-batch of a step, with whole gradients kept until then,
    or in every micro-batch, with only this process's rows kept."""
    world: int | None = number(1, 10**6, None)
    """Processes; None: as many as torchrun has started, and only plan=true takes another number."""
    nodes: int = number(1, 10**6, 1)
    """Machines that they are spread over; for plan=true."""
    link_gb_per_s: float = number(0, 10**6, 12.0, open="low")
    """Between two cards of one machine, 10^9 bytes/s each way, for plan=true: about 12 for PCIe 3.0 x16, 24 for PCIe
    4.0, 50 to 450 for NVLink."""
    network_gbit: float = number(0, 10**6, 10.0, open="low")
    """Of each machine's network, 10^9 bits/s each way; for plan=true."""
    timeout_s: float = number(1, 10**7, 600)
    """Seconds without an answer after which the other processes say which one hangs, and end; longer than a save
    takes."""


@dataclass
class LaunchConfig:
    """Where a training runs, if not here: on the nodes of a cluster; see nanogpt.run.launching and ray_cluster."""

    # 三个选项的键都一样：写错一个字，提交之前就说；分区、账号一类各处不同的，原样写在 options 里

    name: str = choice("none", "slurm", "ray", default="none")
    """Here, through Slurm or through Ray; of the option."""
    nodes: int = number(1, math.inf, 1)
    """Machines."""
    gpus: int = number(0, 1000, 1)
    """Cards of each machine, a process for each; 0: none."""
    processes: int | None = number(1, 1000, None)
    """Processes on each machine; None: one for each card, one where there is none."""
    cpus: int | None = number(1, 10**5, None)
    """Cores for each process; None: what the cluster gives, one with Ray."""
    minutes: int | None = number(1, 10**7, None)
    """Slurm: time limit of the job, which saves before it and queues again; None: the cluster's own."""
    grace_s: int = number(1, 10**5, 120)
    """Seconds for the last step and its save, when the time is up or the job is told to end."""
    restarts: int = number(0, 10**4, 3)
    """How often processes that died are started again within a job, and nodes that vanished with Ray."""
    options: str = ""
    """Slurm: more options of sbatch, such as '--partition=gpu --account=me'; they win over those above."""
    setup: str = ""
    """Slurm: what the shell does first, such as 'module load cuda'."""

    @property
    def processes_each(self) -> int:
        """Processes on each machine."""
        return self.processes or max(1, self.gpus)


@dataclass(kw_only=True)
class AdamWConfig:
    """The settings of optimizer=adamw (conf/optimizer); nanogpt.core.optimizers.adamw takes them."""

    # 只为范围与说明：optimizer 是可换的组，值在 yaml 里，由 _target_ 的函数收

    weight_decay: float = number(0, 10)
    """Of matrices and embeddings, not of biases and gains."""
    beta1: float = number(0, 0.99999)
    """How much of the running mean of gradients is kept at each step."""
    beta2: float = number(0, 0.99999)
    """The same of their squares; 0.99 where a step has few tokens."""
    eps: float = number(0, 1)
    """What is added to the root of that mean before dividing by it."""


@dataclass(kw_only=True)
class MuonConfig:
    """The settings of optimizer=muon (conf/optimizer); nanogpt.core.optimizers.muon takes them."""

    # 前三个只管 block 内的矩阵，末三个是其余参数的 AdamW

    weight_decay: float = number(0, 10)
    """Of the matrices in the blocks alone; 0.5 beats 0.1 where a text is read several times, read once they are
    alike."""
    head_weight_decay: float | None = number(0, 100)
    """Of an output layer with weights of its own. None: none for a text that is read up to twice, whose tokens occur
    often, or for small blocks; from model=tiny on 1.5 with each further doubling of the passes where a token occurs up
    to 60 times, as thousands of Chinese characters do in a short text."""
    momentum: float = number(0, 0.99999)
    """How much of the running mean of gradients is kept at each step."""
    ns_steps: int = number(1, 20)
    """Newton-Schulz iterations: fewer are faster, more come nearer to orthogonal."""
    embedding_lr_scale: float | None = number(0, 10**6)
    """What the learning rate is multiplied by for the input embedding. None: 30 if it starts from values
    around 1 (model.init=modern); 1 if it is the output layer too or the training begins from other weights."""
    head_lr_scale: float = number(0, 10**6)
    """The same for the output layer."""
    ngram_lr_scale: float | None = number(0, 10**6)
    """The same for the n-gram tables. None: 3 for a text that is read once, whose rows are seldom updated; 1 for one
    that is read several times, so that the tables learn it by heart more slowly."""
    beta1: float = number(0, 0.99999)
    """How much of the running mean is kept in AdamW's part: head, positions and vectors."""
    beta2: float = number(0, 0.99999)
    """The same of the squared gradients there, and of those of the n-gram tables and the input embedding."""
    eps: float = number(0, 1)
    """What is added to the root of their mean there."""


@dataclass(kw_only=True)
class TrialConfig:
    """A bounded trial in a process of its own instead of a training; see nanogpt.sweep.trial."""

    # 试跑在子进程里：显存不足、崩溃、超时都只是一个结果，不连累别的试验

    enabled: bool
    """Run trials, not a training; experiment=fit sets it."""
    warmup_steps: int = number(0, 10**6)
    """Optimizer steps before the clock starts."""
    steps: int = number(1, 10**6)
    """Timed optimizer steps."""
    timeout_s: float = number(1, 10**7)
    """Seconds after which a trial is ended."""
    skip_predicted: bool
    """Skip what is predicted not to fit."""
    margin: float = number(0, 0.9)
    """Part of the budget that stays free."""
    again: bool
    """Measure anew what an earlier sweep has measured."""


@dataclass
class SearchConfig:
    """A search for the settings that learn most in a given time; see nanogpt.sweep.search."""

    # 只要 minutes 就够用；其余的键说怎样分这段时间

    enabled: bool = False
    """Search instead of a training; experiment=search sets it."""
    minutes: float = number(0, 10**6, 60.0, open="low")
    """Wall-clock minutes of the whole search."""
    trials: int = number(1, 10**5, 27)
    """Settings that are tried, at most."""
    eta: int = number(2, 100, 3)
    """Of so many settings one goes on to the next rung, which is so many times as long."""
    rungs: int = number(1, 10, 3)
    """At most so many budgets, each eta times the one before."""
    top: int = number(1, 1000, 2)
    """So many of the best settings are trained with all seeds."""
    seeds: int = number(1, 1000, 3)
    """Trainings of each of the best settings, with different seeds."""
    jobs: int = number(1, 1000, 1)
    """Trials beside each other, each on a card of its own; on a CPU only with a loss as objective, sharing its
    cores."""
    space: list[str] = field(default_factory=list)
    """What is searched, a line for each key, written as in a sweep; keys that are typed beside experiment=search
    replace theirs, with one value or with several."""
    typed: list[str] = field(default_factory=list)
    """Keys that were typed with several values; filled in by the program."""


@dataclass(kw_only=True)
class TrainConfig:
    """Top level of conf/train.yaml, which has the defaults."""

    # 最外层的键；默认值之外还要说何时该改，那在 conf/train.yaml 的注释里

    out_dir: str | None
    """Run folder; None: outputs/<data>-<model>-<time>."""
    overwrite: bool
    """Clear a run that is already in out_dir."""
    resume: str | None
    """Run folder, or latest, to train on from, bit-exactly; auto: out_dir, if a training has begun in
    it."""
    checkpoint: str | None
    """Which one of that run: last, best or iter_00001000; None resumes from the last and starts from the best."""
    init_from: str | None
    """Weights to start from: gpt2 … gpt2-xl, owner/name, modelscope:owner/name, a folder, a run or ckpt.pt; None:
    random ones."""
    seed: int = number(0, 2**63 - 1)
    """Same seed, machine and versions: same result."""
    device: str
    """auto | cpu | cuda | cuda:0 … | xpu (Intel) | mps (Mac)."""
    threads: int | None = number(1, 4096)
    """CPU threads; None: OMP_NUM_THREADS, or every core. Another number of threads may change the last digits of what
    is computed."""
    lang: str = choice("auto", "zh", "en")
    """Language of the console; auto takes the system's."""
    compile: str = choice("auto", "true", "false")
    """torch.compile of training steps; auto on a card with Triton when the training is long enough, never in trials.
    Unless it is false, steps of small models are also recorded as CUDA graphs, and on a CPU with numba (extra `fast`)
    the small operations of trainings of 300 steps and more are loops compiled once per machine."""
    deterministic: bool
    """Deterministic kernels on a card, or an error."""
    max_iters: int | None = number(1, MANY)
    """Optimizer steps; None: 250, or no limit where max_tokens or max_minutes is given. What is reached first ends the
    training."""
    max_tokens: int | str | None
    """Training tokens; auto: 20 for each parameter of the blocks (Chinchilla, arXiv:2203.15556), but at most 4 passes
    over the training text (arXiv:2305.16264)."""
    max_minutes: float | None = number(0, 10**7, open="low")
    """Minutes of training with its evaluations and saves, those before a resume included; the last evaluation and save
    come on top. How many steps that is depends on the machine: such a run cannot be repeated bit-exactly."""
    plan: str = choice("false", "true", "matrix")
    """Say what would fit and how fast it would be, train nothing; matrix: a table of presets and formats."""
    objective: str = choice("tokens_per_s", "val_loss", "val_bpb")
    """What trials measure and are ranked by."""
    holdout: float = number(0, 0.5)
    """Part of the training split to validate on instead."""
    batch_size: int | str
    """Rows per micro-batch, or auto: the fastest that fits, by trials."""
    gradient_accumulation_steps: int = number(1, 10**6)
    """Micro-batches per optimizer step."""
    global_batch_size: int | None = number(1, 10**7)
    """Rows per optimizer step, instead of batch_size x gradient_accumulation_steps."""
    learning_rate: float = number(0, 1000, open="low")
    """Peak of the schedule."""
    min_lr: float = number(0, 1000)
    """End of the decay."""
    warmup_iters: int | None = number(0, MANY)
    """Steps of linear warm-up; step i (from 0) takes (i + 1) / warmup_iters of learning_rate, so the last one takes all
    of it; nanoGPT divides by warmup_iters + 1. None: 2% of the budget, 100 at most."""
    lr_decay_iters: int | None = number(1, MANY)
    """Step at which min_lr is reached; None: at the end."""
    lr_schedule: str = choice("cosine", "linear", "wsd", "constant")
    """Decay behind the warm-up; wsd stays at the peak until its last part."""
    decay_fraction: float = number(0, 1)
    """Part of the training in which lr_schedule=wsd decays."""
    grad_clip: float = number(0, HUGE)
    """Limit of the global L2 gradient norm; 0: no clipping."""
    dropout: float | None = number(0, 1, open="high")
    """Probability that a value is dropped. None: as the passes over the text want it, 0 for weights that were trained
    before."""
    label_dropout: float = number(0, 1)
    """Probability that a training document loses its labels."""
    eval_interval: int = number(1, MANY)
    """Steps between two evaluations."""
    eval_tokens: int | None = number(1, 10**15)
    """Tokens of the validation split, always the same ones, that an evaluation reads; None: all."""
    eval_stride: int | None = number(1, 10**6)
    """Tokens from one window of an evaluation to the next; None: model.block_size, so that windows do not overlap. With
    fewer, each token behind the first window has block_size - eval_stride tokens before it in sight, and an evaluation
    takes block_size / eval_stride times as long."""
    eval_batch_size: int | None = number(1, 10**6)
    """Rows per micro-batch when evaluating; None: batch_size."""
    early_stop_evals: int | None = number(0, MANY)
    """Stop after so many evaluations without a better loss; 0: never. None: where the best loss lies a fifth of the
    budget back and the last 4 evaluations were all 5% above it or more while the training loss is below it."""
    target_val_loss: float | None
    """Stop at this validation loss; None never does."""
    log_interval: int = number(1, MANY)
    """Steps between two lines."""
    save_interval: int | None = number(1, MANY)
    """Steps between saves, new bests aside; None: as evals."""
    keep: int = number(1, MANY)
    """Latest checkpoints that are kept, beside the best one."""
    max_nonfinite_steps: int = number(1, MANY)
    """Stop after so many steps in a row whose loss or gradient is not finite."""
    sample_tokens: int = number(0, 10**7)
    """Tokens of the sample behind each evaluation; 0: none."""
    sample_prompt: str | None
    """Beginning of the sample, or its question."""
    sample_temperature: float = number(0, 100)
    """Of the sample; 0 is greedy."""
    cache_data_gib: float = number(0, 10**6, open="low")
    """Most that data behind an address takes in the cache."""
    bundle_data_mib: int = number(0, 10**9)
    """Data sets up to this size are copied into the run."""
    verify: bool
    """Check all data again, also large unchanged files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: Any
    """A `_target_` and its settings."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    trial: TrialConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    dataset: Any
    """Name, folder and the options of its preparation."""
    logger: Any = field(default_factory=dict)
    """name: a `_target_` and its settings."""
    groups: dict[str, str] = field(default_factory=dict)
    """Option chosen in each config group; filled in by the program."""


# 值是路径、是文字的键，训练与写作共用：命令行上敲的就是它，不经 Hydra 的语法
PATH_KEYS = (
    "out_dir", "resume", "init_from", "dataset.path", "dataset.dir", "dataset.source", "prompts", "output",
    "hydra.sweep.dir",
)
TEXT_KEYS = (
    "sample_prompt", "start", "system", "control.style", "control.emotion", "launch.options", "launch.setup",
)
# 这些后缀的 dataset.path 是一条条记录，不是连着的文字
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def plain(cfg: Any) -> dict[str, Any]:
    """A config as nested dicts, lists and plain values."""
    # 不经过 OmegaConf：那样一次要 50 ms，开始一次训练要好几次
    return asdict(cfg)


def lookup(cfg: Any, key: str) -> Any:
    """Value at a dotted key of nested dataclasses."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(dotted key, field) of a schema and the schemas in it."""
    for one in fields(schema):
        yield prefix + one.name, one
        if is_dataclass(one.type):
            yield from keys(one.type, f"{prefix}{one.name}.")


def range_of(schema: type, key: str) -> Range:
    """The range of a dotted key."""
    return dict(keys(schema))[key].metadata["range"]


def choices_of(schema: type, key: str) -> tuple[str, ...]:
    """The words that a dotted key takes."""
    return dict(keys(schema))[key].metadata["choices"]


def check_keys(cfg: Any) -> None:
    """Refuse a number outside the range of its key, and a word that is not one of the allowed ones."""
    for key, one in keys(type(cfg)):
        check_key(key, one, lookup(cfg, key))


def check_key(key: str, one: Field, value: Any) -> None:
    """Refuse a value that the field of a key does not allow."""
    if "choices" in one.metadata:
        check_choice(key, value, one.metadata["choices"])
    elif "range" in one.metadata:
        check_in(key, value, one.metadata["range"])


def check_choice(key: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not one of the allowed ones; "null" allows None."""
    got = "null" if value is None else str(value)
    # compile=true 会被 YAML 读成布尔，再变成 "True"
    if got.lower() not in allowed:
        raise ConfigError("not_a_choice", key=key, got=got, allowed=" | ".join(allowed))


def check_range(key: str, got: float | None, low: float, high: float | None) -> None:
    """Refuse a number outside low … high (None: no limit); None passes."""
    check_in(key, got, Range(low, math.inf if high is None else high))


def check_in(key: str, got: float | None, allowed: Range) -> None:
    """Refuse a number outside a range; None passes."""
    if got is not None and got not in allowed:
        raise ConfigError("out_of_range", key=key, got=got, wanted=allowed)


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
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", named):
        raise ConfigError("not_a_choice", key="device", got=named, allowed="auto | cpu | cuda | cuda:0 | xpu | mps")


def check_start(init_from: str | None) -> None:
    """Refuse nanoGPT's words for where a model comes from: they are no weights."""
    if init_from in ("scratch", "resume") and not Path(init_from).exists():
        raise ConfigError(
            "init_from=scratch: random weights need no key here; leave it out",
        ) if init_from == "scratch" else ConfigError(
            "init_from=resume: name the run: resume=outputs/my-run to train it on, out_dir=outputs/my-run to write "
            "with it",
        )


def check_model(model: Any) -> None:
    """Rules between the fields of a ModelConfig."""
    if model.head_dim is None and model.n_embd % model.n_head:
        raise ConfigError(
            "not_a_multiple", key="model.n_embd", got=model.n_embd, other="model.n_head", by=model.n_head,
        )
    if model.n_head % model.kv_heads:
        raise ConfigError(
            "model.n_head={got} is not divisible by model.n_kv_head={by}; choose a divisor of {got}",
            got=model.n_head, by=model.n_kv_head,
        )
    if model.position == "rope" and (model.head_dim or 0) % 2:
        raise ConfigError(
            "model.head_dim={got} is odd, and RoPE turns pairs; choose an even one or model.position=learned",
            got=model.head_dim,
        )
    if model.rope_scaling in ("llama3", "yarn") and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise ConfigError(
            "out_of_range", key="model.rope_low_freq_factor", got=model.rope_low_freq_factor,
            wanted=f"> 0, < {model.rope_high_freq_factor:g}",
        )
    if model.position == "rope" and model.head_size % 2:
        raise ConfigError(
            "model.n_embd={n_embd} / model.n_head={n_head} is odd, and RoPE turns pairs; choose an even head size or "
            "model.position=learned",
            n_embd=model.n_embd, n_head=model.n_head,
        )
    for n in model.ngrams or []:
        if not 2 <= n <= 8:
            raise ConfigError("out_of_range", key="model.ngrams", got=list(model.ngrams), wanted="2 … 8")


def check_schedule(cfg: Any) -> None:
    """Rules between learning rates and iteration counts."""
    if cfg.min_lr > cfg.learning_rate:
        raise ConfigError("above_other", key="min_lr", got=cfg.min_lr, other="learning_rate", limit=cfg.learning_rate)
    span = span_of(cfg)
    end = cfg.lr_decay_iters or span.iters
    if end is not None and (cfg.warmup_iters or 0) >= end:
        other = "lr_decay_iters" if cfg.lr_decay_iters else "max_iters"
        raise ConfigError(
            "warmup_iters={got} is not shorter than {other}={limit}; lower warmup_iters or train longer",
            got=cfg.warmup_iters, other=other, limit=end,
        )


def check_stride(stride: int, block_size: int) -> None:
    """Refuse windows of an evaluation with gaps between them."""
    if stride > block_size:
        raise ConfigError("above_other", key="eval_stride", got=stride, other="model.block_size", limit=block_size)


def check_parallel(cfg: Any) -> None:
    """Refuse processes that machines cannot share evenly, and what does not go with sharded parameters."""
    parallel = cfg.parallel
    world = parallel.world or parallel.nodes
    if world % parallel.nodes:
        raise ConfigError(
            "not_a_multiple", key="parallel.world", got=world, other="parallel.nodes", by=parallel.nodes,
        )
    if parallel.mode == "fsdp" and (key := not_sharded(cfg)):
        raise ConfigError("not_sharded", key=key)


def not_sharded(cfg: Any) -> str | None:
    """What of this config a sharded training cannot do, as it is typed; None: nothing."""
    memory = cfg.memory
    wishes = {
        "memory.weights=bf16": memory.weights == "bf16",
        "memory.optimizer_state=int8": memory.optimizer_state == "int8",
        "memory.optimizer_in_backward=true": memory.optimizer_in_backward,
        "memory.offload_optimizer=true": memory.offload_optimizer,
        "memory.activation_checkpointing=budget": memory.activation_checkpointing == "budget",
        "finetune.frozen_weights=nf4": cfg.finetune.frozen_weights == "nf4",
        # 试跑只有一个进程
        "batch_size=auto": cfg.batch_size == "auto" and cfg.plan.lower() == "false",
    }
    return next((key for key, wish in wishes.items() if wish), None)


def check_launch(cfg: Any) -> None:
    """Refuse what cannot be started on other machines, or would begin anew with every restart."""
    launch = cfg.launch
    if launch.name == "none":
        return
    if launch.options and not re.fullmatch(r"-\S[^\n\r]*", launch.options):
        raise ConfigError(
            "launch.options={got!r}: options of sbatch begin with -, on one line, for example "
            "launch.options=--partition=gpu",
            got=launch.options,
        )
    if (cfg.trial.enabled or cfg.search.enabled) and launch.name == "slurm":
        raise ConfigError(
            "launch=slurm starts one training; trials go to a cluster by launch=ray, or by -m "
            "hydra/launcher=submitit_slurm",
        )
    if cfg.resume and cfg.checkpoint not in (None, "last"):
        raise ConfigError(
            "checkpoint={got}: a job that is started again would go back to it each time; leave it out, or start from "
            "its weights with init_from",
            got=cfg.checkpoint,
        )


def check_budget(cfg: Any) -> None:
    """Refuse a number of tokens that is none."""
    if isinstance(cfg.max_tokens, int):
        check_range("max_tokens", cfg.max_tokens, 1, 10**15)
    elif cfg.max_tokens not in (None, "auto"):
        raise ConfigError("not_a_choice", key="max_tokens", got=cfg.max_tokens, allowed="1 … 1e+15 | auto | null")


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
    if cfg.finetune.frozen_weights == "nf4" and cfg.finetune.method != "lora":
        raise ConfigError(
            "finetune.frozen_weights=nf4: finetune.method={got} freezes no weights; take finetune=lora, or leave "
            "finetune.frozen_weights out",
            got=cfg.finetune.method,
        )
    if memory.optimizer_in_backward:
        # 梯度一到就用掉：没有什么可以累积、还原或求和
        if cfg.precision.dtype.lower() == "fp16":
            raise ConfigError(
                "precision=fp16: memory.optimizer_in_backward=true has no loss scaling; choose precision=bf16, or "
                "memory.optimizer_in_backward=false",
            )
        batch = cfg.batch_size if isinstance(cfg.batch_size, int) else None
        rows = cfg.global_batch_size or (None if batch is None else batch * cfg.gradient_accumulation_steps)
        if batch is not None and rows > batch:
            raise ConfigError(
                "memory.optimizer_in_backward=true frees gradients at once and cannot accumulate {rows} rows in "
                "pieces of batch_size={batch}; set gradient_accumulation_steps=1 and no global_batch_size, or "
                "memory.optimizer_in_backward=false",
                rows=rows, batch=cfg.batch_size,
            )


# 什么也没写时先看一眼的长度
FIRST_LOOK = 250
# 计算量一定时，每个参数看 20 个 token 左右损失最低；同一段文字读到第 4 遍，还几乎和新的一样有用
TOKENS_PER_PARAMETER, PASSES = 20, 4


@dataclass(frozen=True)
class Span:
    """How long a training lasts: to the first of its limits."""

    # token 数在一次训练里折成步数，与 max_iters 是同一件事，学习率逐位相同；只有时间事先不知道是多少步

    iters: int | None
    """Optimizer steps; None: no limit."""
    seconds: float | None
    """On the clock of Progress.wall_s; None: no limit."""
    key: str = "max_iters"
    """Where iters comes from: max_iters or max_tokens."""

    def spent(self, iteration: int, wall_s: float) -> float:
        """The share that is used up; the training ends at 1."""
        return max(iteration / self.iters if self.iters else 0.0, wall_s / self.seconds if self.seconds else 0.0)

    def ended_by(self, iteration: int) -> str:
        """The key whose limit is reached after this step."""
        return self.key if self.iters and iteration >= self.iters else "max_minutes"


def span_of(cfg: Any, iteration: int = 0, tokens: int = 0) -> Span:
    """The span of a training that stands at `iteration` and has been trained on so many tokens."""
    iters, key = cfg.max_iters, "max_iters"
    if iters is None and cfg.max_tokens is None and cfg.max_minutes is None:
        iters = FIRST_LOOK
    if cfg.max_tokens is not None:
        limit = auto_tokens(cfg.model) if cfg.max_tokens == "auto" else cfg.max_tokens
        # 走完的步按那时的批量计，剩下的按现在的
        steps = iteration + max(0, math.ceil((limit - tokens) / tokens_per_step(cfg)))
        if iters is None or steps < iters:
            iters, key = steps, "max_tokens"
    return Span(iters, cfg.max_minutes and cfg.max_minutes * 60, key)


def effective_batch(cfg: Any) -> int:
    """Sequences of one optimizer step, all processes together."""
    return cfg.global_batch_size or cfg.batch_size * cfg.gradient_accumulation_steps


def tokens_per_step(cfg: Any) -> int:
    """Tokens of one optimizer step, all processes together."""
    return effective_batch(cfg) * cfg.model.block_size


def block_parameters(model: ModelConfig) -> int:
    """Weights of the matrices in the blocks: what computes, without embeddings, look-up tables and head."""
    return model.n_layer * (4 + 2 * model.mlp_ratio) * model.n_embd**2


def auto_tokens(model: ModelConfig, text_tokens: int | None = None) -> int:
    """The budget of max_tokens=auto; text_tokens: of the training split, None where it is not prepared yet."""
    wanted = TOKENS_PER_PARAMETER * block_parameters(model)
    return wanted if text_tokens is None else min(wanted, PASSES * text_tokens)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule with every default filled in; see core.schedule.learning_rate_at."""

    # 与配置分开：None 都填好了，算学习率的地方不必再猜

    learning_rate: float
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int | None
    """None: with the share of the budget that is used up, where time is part of it."""
    lr_schedule: str
    decay_fraction: float

    def __post_init__(self):
        check_choice("lr_schedule", self.lr_schedule, choices_of(TrainConfig, "lr_schedule"))


def schedule_of(cfg: TrainConfig, span: Span) -> Schedule:
    """The schedule of a run; decay ends with the run and warm-up takes 2% of it unless set otherwise."""
    end = cfg.lr_decay_iters or (None if span.seconds else span.iters)
    # 短跑几步的试验也能用默认值，不会撞上“预热比训练长”
    warmup = min(100, MANY if end is None else end // 50) if cfg.warmup_iters is None else cfg.warmup_iters
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
    check_keys(cfg)
    check_parts(cfg)
    check_model(cfg.model)
    check_batch(cfg)
    check_memory(cfg)
    check_parallel(cfg)
    check_launch(cfg)
    check_budget(cfg)
    check_schedule(cfg)
    check_checkpoint(cfg)
    check_device(cfg.device)
    check_start(cfg.init_from)
    if cfg.eval_stride and not cfg.init_from:
        # 微调的上下文长度来自权重，打开之后再查
        check_stride(cfg.eval_stride, cfg.model.block_size)
    if missing := {"name", "dir"} - set(cfg.dataset):
        raise ConfigError("missing_key", key=f"dataset.{min(missing)}")
    name = str(cfg.dataset["name"])
    if name != "hf" and "subset" in cfg.dataset:
        raise ConfigError(
            "dataset.name={got}: this key names data/hf/prepare.py; a part of a data set on the hub is "
            "dataset.subset={got}",
            got=name,
        )
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


@functools.cache
def trusted_targets() -> frozenset[str]:
    """The program's own classes that a saved config may name: the model, those in conf/optimizer and conf/logger."""
    # 运行目录里的配置可能来自陌生人：只有这些直接执行；自己加进 conf/ 的类照旧要在命令行指名
    files = (file for group in ("optimizer", "logger") for file in (ROOT / "conf" / group).glob("*.yaml"))
    named = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    own = re.findall(r"^\s*_target_: *(nanogpt\.[\w.]+)", named, flags=re.MULTILINE)
    return frozenset({ModelConfig._target_, *own})


def targets(node: Any) -> set[str]:
    """All dotted `_target_`s in a config of plain values, by their present names."""
    if isinstance(node, dict):
        found = {present_name(node["_target_"])} if isinstance(node.get("_target_"), str) else set()
        return found.union(*(targets(v) for v in node.values()))
    return set().union(*(targets(v) for v in node)) if isinstance(node, list) else set()


def untrusted_targets(saved: Any, typed: Any) -> list[str]:
    """Dotted `_target_`s of a saved config that are neither nanogpt's own nor in the config just typed."""
    return sorted(targets(saved) - targets(typed) - trusted_targets())
