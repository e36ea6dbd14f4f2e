"""Compare an exported model with the model that it was: weights read back, logits, and greedy ids of the engine."""

# nanogpt export --check 用它：写出来的再读回来，用我们的模型算一遍；再让它要去的那个程序（装了的话）接着写几个 id
# 两步分开比：先看权重，每个数与原来的差不得超过数字格式的舍入；再看那个程序，与“同样舍入过的我们”相比
# 那个程序的激活也用同样的格式，所以允许差几倍于权重舍入的影响，另加一点各家算法的出入（如查表的 GELU）
# 贪心的 id 不必另写一遍：沿着它写的走，每一步我们的 argmax 都是它的选择，两边写的就相同

import importlib
import importlib.metadata
import json
import logging
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.base.language import say
from nanogpt.weights import gguf_file, huggingface
from nanogpt.weights.pretrained import Pretrained, build_pretrained, open_pretrained

# 接着写多少个 id
COUNT = 24
# 各家算法的出入，相对最大的 logit
ARITHMETIC = 5e-3
# 词表大时，llama.cpp 每一步只要这么多个最可能的
MOST_PROBABLE = 300


@dataclass(frozen=True)
class Comparison:
    """How an exported model differs from the model that it was."""

    # benchmarks/formats.py 也用它：每一格都是一个

    scale: float
    """The largest logit of the model."""
    rounding: float
    """The largest difference that the numbers of the file alone make to a logit."""
    weight: str | None
    """A weight that differs by more than its number format rounds; None: none does."""
    engine: str
    """Package and version of the program that the file is for; the package alone if it is not installed."""
    difference: float | None
    """The largest difference of a log-probability between that program and this one with the same weights."""
    equal: int = 0
    """How many of its greedy ids are those that we would write there; if all are, both write the same."""
    count: int = 0
    texts: bool | None = None
    """Whether it reads a text as the same ids; None: that was not asked."""

    @property
    def allowed(self) -> float:
        """The difference that the number format explains."""
        return ARITHMETIC * self.scale + 4 * self.rounding

    @property
    def good(self) -> bool:
        """Whether the number format explains it; greedy ids may differ where the best two are that near."""
        return self.weight is None and self.texts is not False and (self.difference or 0.0) <= self.allowed


def check(folder: Path, pretrained: Pretrained, form: str, kind: str) -> bool:
    """Say how what was written differs from the model; returns whether the number format explains it."""
    found = compared(folder, pretrained, form, kind)
    say(
        "check: read back, a logit differs by at most {rounding:.2g} (the largest is {scale:.2g}), numbers in {kind}",
        rounding=found.rounding, scale=found.scale, kind=kind,
    )
    if found.difference is None:
        say("check: {package} is not installed, so only the files were read back", package=found.engine)
    else:
        say(
            "check: {engine}: a log-probability differs by at most {difference:.2g} (allowed {allowed:.2g}), {equal} "
            "of {count} greedy ids are equal",
            engine=found.engine, difference=found.difference, allowed=found.allowed, equal=found.equal,
            count=found.count,
        )
    if found.weight:
        say("check: {tensor} is not what the model has", tensor=found.weight)
    if found.texts is False:
        say("check: {engine} reads a text as other ids", engine=found.engine)
    if not found.good:
        say("check: {folder} differs by more than its numbers explain; do not use it", folder=folder)
    return found.good


@torch.no_grad()
def compared(folder: Path, pretrained: Pretrained, form: str, kind: str) -> Comparison:
    """Read an exported folder back and let the program that it is for write."""
    config = pretrained.config
    model, again, weight = build_pretrained(pretrained).eval(), pretrained, None
    if form == "gguf":
        again = replace(pretrained, tensors=gguf_file.read_back(folder, config))
    elif form == "ct2":
        again = replace(pretrained, tensors={name: rounded(tensor, kind) for name, tensor in again.tensors.items()})
    elif (folder / f"{huggingface.OWN_MODULE}.py").is_file():
        # 自己的类只有带着它的代码才造得出来：读回权重就够
        again = replace(pretrained, tensors=huggingface.own_tensors(folder))
    else:
        again = open_pretrained(str(folder))
    if form != "ct2":
        weight = strange(pretrained.tensors, again.tensors, kind)
    written = build_pretrained(again).eval()
    known = pretrained.tokenizer.vocab_size
    ids = torch.randint(0, known, (1, config.block_size), generator=torch.Generator().manual_seed(1))[:, :256]
    logits = model(ids).float()
    found = Comparison(
        float(logits.abs().max()), float((written(ids).float() - logits).abs().max()), weight, PACKAGES[form], None
    )
    prompt = ids[0, : min(8, config.block_size // 2)].tolist()
    try:
        importlib.import_module(PACKAGES[form])
    except ImportError:
        return found
    steps, texts = ENGINES[form](folder, pretrained, prompt, min(COUNT, config.block_size - len(prompt)))
    read = torch.tensor([prompt + [token for token, _ in steps[:-1]]])
    ours = written(read)[0, len(prompt) - 1 :].float().log_softmax(-1)
    theirs = torch.tensor([token for token, _ in steps])
    return replace(
        found, engine=f"{PACKAGES[form]} {importlib.metadata.version(PACKAGES[form])}", texts=texts, count=len(steps),
        difference=float(torch.cat([(row[known] - told).abs() for row, (_, (known, told)) in zip(ours, steps)]).max()),
        equal=int((ours.argmax(-1) == theirs).sum()),
    )


# ---- 数字格式 ----


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """A tensor as a number format keeps it."""
    if kind in ("f16", "bf16"):
        return tensor.to(torch.float16 if kind == "f16" else torch.bfloat16).float()
    if kind == "int8" and tensor.dim() == 2:
        step = tensor.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (tensor / step).round() * step
    return tensor.float()


def strange(wanted: dict[str, Tensor], got: dict[str, Tensor], kind: str) -> str | None:
    """The first weight that is missing or differs by more than this number format rounds; None: none."""
    for name in sorted(wanted.keys() | got.keys()):
        if name not in wanted and not got[name].any():
            # 补上的零 bias
            continue
        if name not in wanted or name not in got or wanted[name].shape != got[name].shape:
            return name
        tensor = wanted[name].float()
        if bool(((got[name].float() - tensor).abs() > step_of(tensor, kind)).any()):
            return name
    return None


def step_of(tensor: Tensor, kind: str) -> Tensor:
    """How far a number format may move each value."""
    if kind == "q8_0" and tensor.dim() == 2 and tensor.size(-1) % 32 == 0:
        largest = tensor.reshape(-1, 32).abs().amax(-1, keepdim=True)
        # 半级，加上每块的倍数自己舍入到 f16 的那一点
        return (largest * (0.51 / 127 + 2**-11) + 4e-6).expand(-1, 32).reshape(tensor.shape)
    share = {"f32": 0.0, "bf16": 2**-8}.get(kind, 2**-11)
    return tensor.abs() * share + (2**-24 if share else 0.0)


# ---- 各个程序：提示的 id -> 它接着写的 id，与每一步它知道的 log 概率 (哪些 id, 各是多少) ----

Steps = list[tuple[int, tuple[Tensor, Tensor]]]


def whole(token: int, logits: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
    """A step of a program that tells all logits."""
    return token, (torch.arange(len(logits)), logits.float().log_softmax(-1))


def transformers_steps(folder: Path, pretrained: Pretrained, prompt: list[int], count: int) -> tuple[Steps, None]:
    """What transformers writes, with its cache."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    trust = not huggingface.is_plain(pretrained.config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    # 写到够数为止，不在结尾停下
    model.generation_config.eos_token_id = None
    done = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )
    ids = done.sequences[0, len(prompt) :].tolist()
    return [whole(token, logits[0]) for token, logits in zip(ids, done.logits, strict=True)], None


def llama_cpp_steps(folder: Path, pretrained: Pretrained, prompt: list[int], count: int) -> tuple[Steps, bool]:
    """What llama.cpp writes, and whether it reads a text as the ids that we do."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(folder / gguf_file.FILE), len(prompt) + count, 1
    params.verbosity, params.warmup, params.fit_params, params.n_gpu_layers = -1, False, False, 0
    # 线程多于核，忙时会空转着等；也不必把提示的状态另存一份
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_ram_mib = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    try:
        text, steps = pretrained.tokenizer.decode(prompt), []
        ours = pretrained.tokenizer.encode(text, skip_unknown=True).tolist()
        asked = {"content": text, "add_special": False, "parse_special": False}
        theirs = ask(server.listening_address, "/tokenize", asked)["tokens"]
        for _ in range(count):
            # 一次一个：几个 token 拼成一个字的，一次多写几个时它只说最后那个的概率
            told = ask(server.listening_address, "/completion", {
                "prompt": prompt + [token for token, _ in steps], "n_predict": 1, "temperature": 0,
                "samplers": ["temperature"], "n_probs": min(pretrained.config.vocab_size, MOST_PROBABLE),
                "return_tokens": True,
            })
            likely = [one for step in told.get("completion_probabilities", ()) for one in step["top_logprobs"]]
            known = torch.tensor([one["id"] for one in likely], dtype=torch.long)
            steps.append((told["tokens"][0], (known, torch.tensor([one["logprob"] for one in likely]))))
    finally:
        del server
    return steps, theirs == ours


def ask(address: str, path: str, body: dict) -> dict:
    """The answer of a server in this process."""
    # 本机的地址不走代理
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(opener.open(request, timeout=60))


def ctranslate2_steps(folder: Path, pretrained: Pretrained, prompt: list[int], count: int) -> tuple[Steps, None]:
    """What CTranslate2 writes."""
    import ctranslate2
    import numpy as np

    words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    # 存成半精度的，CPU 换成 float32 来算，每次都警告
    ctranslate2.set_log_level(logging.ERROR)
    generator = ctranslate2.Generator(str(folder), device="cpu", intra_threads=torch.get_num_threads())
    (done,) = generator.generate_batch(
        [[words[token] for token in prompt]], max_length=count, sampling_topk=1, include_prompt_in_result=False,
        return_logits_vocab=True,
    )
    logits = [torch.from_numpy(np.array(step)) for step in done.logits[0]]
    return [whole(token, line) for token, line in zip(done.sequences_ids[0], logits)], None


PACKAGES = {"hf": "transformers", "gguf": "xllamacpp", "ct2": "ctranslate2"}
ENGINES: dict[str, Callable] = {"hf": transformers_steps, "gguf": llama_cpp_steps, "ct2": ctranslate2_steps}
