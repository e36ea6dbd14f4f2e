"""From configuration nodes to objects: models, optimizers, loggers."""

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.config import ROOT, FinetuneConfig, ModelConfig, check_model, untrusted_targets
from nanogpt.messages import ConfigError
from nanogpt.saved_config import read_saved
from nanogpt.sealed import DamagedError, reason_of

# 极小的模型也可以有长上下文：位置表至少允许这么多个数
LEAST_TABLE = 2**20


def locate_class(target: str, key: str) -> Any:
    """The class or function of a dotted name."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("no_such_class", key=key, got=target, reason=error) from None


def build_model(config: ModelConfig, seed: int, weights: str = "fp32"):
    """The model that config._target_ names, its weights drawn from `seed` and stored as `weights` (fp32 | bf16) from the start."""
    import torch

    kind = locate_class(config._target_, "model._target_")
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    try:
        # 直接造成 bf16：大模型的 fp32 副本可能根本放不下
        torch.set_default_dtype(torch.bfloat16 if weights == "bf16" else usual)
        return kind(config)
    except ValueError as error:
        raise ConfigError("bad_part", key="model", reason=error) from None
    finally:
        torch.set_default_dtype(usual)


def build_part(node: dict, key: str, *arguments) -> Any:
    """Call a node's `_target_` with the given arguments and the node's other keys."""
    kind = locate_class(node["_target_"], f"{key}._target_")
    settings = {name: value for name, value in node.items() if name != "_target_"}
    try:
        return kind(*arguments, **settings)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError("bad_part", key=key, reason=error) from None


def model_of(source):
    """The model of a checkpoint.Checkpoint on the CPU, LoRA adapters merged into plain weights."""
    from nanogpt.lora import add_adapters, merge

    try:
        saved = read_saved(source.config_text())
        if foreign := untrusted_targets({"model": saved["model"]}, {}):
            raise ConfigError("untrusted", path=source.folder, targets=", ".join(foreign))
        # 早于 LoRA 的训练没有 finetune 一节
        config, finetune = typed_node(ModelConfig, saved["model"]), typed_node(FinetuneConfig, saved.get("finetune", {}))
    except (DamagedError, OmegaConfBaseException, TypeError) as error:
        raise source.damaged(f"config.yaml: {reason_of(error)}") from None
    check_weights(source, config, finetune)
    model = build_model(config, seed=0)
    if finetune.method == "lora":
        add_adapters(model, finetune)
    source.load_model(model)
    return merge(model)


def check_weights(source, config: ModelConfig, finetune: FinetuneConfig) -> None:
    """ConfigError unless the weights of a checkpoint.Checkpoint have the names and shapes of this config; allocates nothing.

    A config that asks for a billion layers does not get the memory to build them. Only for our own model class: what a
    person's own class does is theirs to know.
    """
    import torch

    from nanogpt.lora import add_adapters

    if config._target_ != ModelConfig._target_:
        return
    have = source.weight_shapes()
    total = sum(math.prod(shape) for shape in have.values())
    try:
        if min(config.n_layer, config.n_head, config.n_embd, config.block_size, config.mlp_ratio) < 1:
            raise ValueError("a size below 1")
        check_model(config)
        # 每层至少有几个张量；RoPE 的表不在文件里，不许大过权重许多
        if config.n_layer > len(have) or config.block_size * config.n_embd > max(total, LEAST_TABLE) * 64:
            raise ValueError(f"{config.n_layer} layers and {config.block_size} positions for {total} weights")
        with torch.device("meta"):
            model = build_model(config, seed=0)
            if finetune.method == "lora":
                add_adapters(model, finetune)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise source.damaged(f"config.yaml: {reason_of(error)}") from None
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = {"lm_head.weight"} if config.tie_embeddings else set()
    wrong = sorted(name for name in set(have) ^ set(want) if name not in shared) or sorted(n for n in set(have) & set(want) if have[n] != want[n])
    if wrong:
        raise source.damaged(f"model.safetensors: other parameters: {wrong[:3]}")


def typed_node(schema: type, node: dict) -> Any:
    """The dataclass `schema` with the values of a saved config node."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))


def preset_names() -> list[str]:
    """Names of all model presets in conf/model."""
    return sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


def preset(name: str, arch: str | None = None, /, **changes) -> ModelConfig:
    """The ModelConfig of conf/model/<name>.yaml over conf/arch/<arch>.yaml, with changes on top."""
    if name not in preset_names():
        raise ConfigError("unknown_option", group="model", got=name, options=", ".join(preset_names()))
    shape = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    wanted = [entry["override /arch"] for entry in shape.pop("defaults", []) if "override /arch" in entry]
    recipe_file = ROOT / "conf" / "arch" / f"{arch or (wanted or ['modern'])[0]}.yaml"
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    # 与 Hydra 的次序相同：先 arch 后 model，最后是调用者的改动
    config = replace(ModelConfig(), **{**recipe, **shape.get("model", shape), **changes})
    check_model(config)
    return config


def create_model(name: str, *, vocab_size: int, seed: int = 1337, arch: str | None = None, **changes):
    """A freshly initialised preset: create_model("tiny", vocab_size=65, dropout=0.1)."""
    return build_model(preset(name, arch, vocab_size=vocab_size, **changes), seed)
