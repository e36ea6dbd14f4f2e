"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, their base somewhere else."""

# 只存 LoRA 的两个小矩阵的文件夹，PEFT 与认得它的引擎都读得了；底座不在里面，adapter_config.json 只写着它的名字
# 写：write_adapter 从训练目录取出小矩阵；我们合成一个的 c_attn、c_fc 拆回 q、k、v 与 gate、up：B 按行分开，A 各抄一份
# 读：open_pretrained 认出这样的文件夹，先读底座，merged_into 把增量加进权重，之后就是普通的模型，什么都能接着做
# 因此读进来的 q、k、v 各有自己的 A 也无妨；PEFT 的花样很多，会改变结果而我们没有算的，一律拒绝，说出文件与字段

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from nanogpt.base import run_names
from nanogpt.base.config import FinetuneConfig, ModelConfig
from nanogpt.base.files import write_json
from nanogpt.base.language import ConfigError, text
from nanogpt.base.saved_config import read_saved, typed_node
from nanogpt.data import tokenizer as tokenizers
from nanogpt.weights import families, hub
from nanogpt.weights.build import check_weights
from nanogpt.weights.checkpoint import Checkpoint
from nanogpt.weights.foreign_files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    DOCUMENTS,
    check_finite,
    read_json,
    read_safetensors,
    read_torch,
)
from nanogpt.weights.tensors import UNREADABLE, Readers, first_not_finite, read_tensors, write_plain

# 不改变怎样计算的字段；别的只有空着才行
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "megatron_core", "qalora_group_size", "eva_config",
    "ensure_weight_tying", "runtime_config", "base_model_class", "parent_library",
}
# PiSSA、OLoRA 之类的初值先改了底座
STARTS = (True, False, "gaussian", "eva", "orthogonal")
ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": STARTS}
PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / ADAPTER).is_file()


# ---- 读 ----


def base_folder(folder: Path, key: str, typed: str = "") -> tuple[Path, str]:
    """The folder of the base that an adapter names, downloaded if it is on a hub, and the base's name.

    The base of an adapter that was `typed` as modelscope:owner/name is looked for there.
    """
    named = read_json(folder / ADAPTER).get("base_model_name_or_path")
    path = Path(str(named))
    if (path / "config.json").is_file():
        return path, path.resolve().name
    if not isinstance(named, str) or path.exists() or hub.repository_of(named) is None:
        raise ConfigError(
            "{file}: base_model_name_or_path={got}: there is no such folder with config.json here, and it is no name "
            "on the hub; write into that file where the base of this adapter is",
            file=folder / ADAPTER, got=named,
        )
    place = hub.MODELSCOPE if typed.startswith(hub.MODELSCOPE) and not named.startswith(hub.MODELSCOPE) else ""
    return hub.download(place + named, key), Path(named).name


def merged_into(folder: Path, tensors: Readers, transposed: tuple[str, ...]) -> Readers:
    """The tensors of a base, by the names of its file, with the update of an adapter added to them in float32.

    `transposed` are endings of the names of matrices that are stored as (in, out).
    """
    file, given = folder / ADAPTER, read_json(folder / ADAPTER)
    for field, got in given.items():
        allowed = ALLOWED.get(field, ())
        if field not in HARMLESS and (got not in allowed if allowed else got not in (None, False, {}, [])):
            raise families.unsupported(file, field, got, " | ".join(map(str, allowed or (None,))))
    alpha = families.number(file, given, "lora_alpha")
    paths = [folder / name for name in ADAPTER_WEIGHTS]
    weights = next((path for path in paths if path.is_file()), paths[0])
    read = read_torch if weights.suffix == ".bin" else read_safetensors
    pairs = matrices(weights, check_finite(weights, read(weights)))
    # GPT-2 的旧文件没有最外面那一截
    known = {name.removeprefix("transformer."): name for name in tensors}
    changed = dict(tensors.readers)
    for module, (a, b) in pairs.items():
        name = known.get(f"{module}.weight".removeprefix("transformer."))
        if name and name.endswith(transposed):
            a, b = b.t(), a.t()
        shape, scale = (len(b), a.size(1)), alpha / (b.size(1) ** 0.5 if given.get("use_rslora") else b.size(1))
        if name is None or tensors[name].shape != shape:
            found = "missing" if name is None else tuple(tensors[name].shape)
            reason = f"{module}: {shape}, in the base: {found}"
            raise ConfigError("pretrained_damaged", file=weights, reason=reason)
        changed[name] = partial(_updated, tensors.readers[name], a, b, scale)
    return Readers(changed)


def _updated(reader: Callable[[], Tensor], a: Tensor, b: Tensor, scale: float) -> Tensor:
    # 合并的留在 fp32：小增量加在 bf16 上会丢位
    return reader().float() + scale * (b.float() @ a.float())


def matrices(file: Path, tensors: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Module of the base -> its A (rank, in) and B (out, rank)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", str(name))
        if not part or not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ConfigError("pretrained_damaged", file=file, reason=f"{name}: not a matrix of a LoRA adapter")
        found.setdefault(part[1], {})[part[2]] = tensor
    for module, pair in found.items():
        if len(pair) < 2 or len(pair["A"]) != pair["B"].size(1) or not len(pair["A"]):
            raise ConfigError("pretrained_damaged", file=file, reason=f"{module}: A and B do not fit each other")
    if not found:
        raise ConfigError("pretrained_damaged", file=file, reason=text("no adapter in it"))
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


# ---- 写 ----


def write_adapter(source: Checkpoint, folder: Path) -> str:
    """Write the adapter of a run that was trained with finetune=lora into a folder; return the name of its base."""
    saved = read_saved(source.config_text())
    config, finetune = typed_node(ModelConfig, saved["model"]), typed_node(FinetuneConfig, saved.get("finetune", {}))
    if finetune.method != "lora":
        raise ConfigError(
            "{path} was trained without finetune=lora: it has no adapter; export the model itself", path=source.folder
        )
    check_weights(source, config, finetune)
    base = base_named(source, saved.get("init_from"), config)
    try:
        tensors = read_tensors(source.folder / "model.safetensors")
    except UNREADABLE as error:
        raise source.damaged(f"model.safetensors: {error}") from None
    lora = {name: tensor for name, tensor in tensors.items() if name.endswith((".lora_a", ".lora_b"))}
    if name := first_not_finite(lora.items()):
        raise source.damaged(text("nan_weights", tensor=name))
    written = {}
    for module in sorted({name.rpartition(".")[0] for name in lora}):
        for theirs, rows in split(config, module, lora[f"{module}.lora_b"]).items():
            # 几个模块共用的 A 各抄一份：一个文件里不许共享
            written[f"{PREFIX}{theirs}.lora_A.weight"] = lora[f"{module}.lora_a"].clone()
            written[f"{PREFIX}{theirs}.lora_B.weight"] = rows.contiguous().clone()
    write_plain(folder / ADAPTER_WEIGHTS[0], written)
    write_json(folder / ADAPTER, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": finetune.rank,
        "lora_alpha": finetune.alpha, "lora_dropout": finetune.dropout, "bias": "none", "inference_mode": True,
        "target_modules": sorted({name.split(".")[-3] for name in written}), "fan_in_fan_out": not config.norm_gain,
        "init_lora_weights": True, "use_rslora": False,
    })
    if config.separator is not None:
        labels = tokenizers.load(source.folder / "tokenizer.json").labels
        names = {kind: list(listed) for kind, listed in labels.items()}
        write_json(folder / DOCUMENTS, {"document_separator": config.separator, "document_labels": names})
    return base


def split(config: ModelConfig, module: str, b: Tensor) -> dict[str, Tensor]:
    """Modules of transformers that one of ours stands for, and the rows of B that belong to each."""
    if not config.norm_gain:
        return {f"transformer.{module}": b}
    theirs = families.their_tensors(config, {f"{module}.weight": b})
    return {name.removesuffix(".weight"): rows for name, rows in theirs.items()}


def base_named(source: Checkpoint, named: str | None, config: ModelConfig) -> str:
    """How PEFT finds the base of a run: its name on the hub or its folder; ConfigError where it is neither."""
    if named and (Path(named) / "config.json").is_file():
        return str(Path(named).resolve())
    elsewhere = named and not Path(named).exists() and not run_names.is_latest(named) and hub.repository_of(named)
    fetched = elsewhere and hub.model_on_hub(named, "init_from").folder()
    # 那里若是 adapter，这次的底座是合并过的，名字指不到它
    if not elsewhere or (fetched and is_adapter(fetched)) or not (families.family_of(config) or config.arch == "gpt2"):
        raise ConfigError(
            "{path}: its base is init_from={got}, and PEFT needs a model of transformers, a folder or a name on the "
            "hub, to put an adapter beside; export the merged model instead, which needs no base",
            path=source.folder, got=named,
        )
    return elsewhere

