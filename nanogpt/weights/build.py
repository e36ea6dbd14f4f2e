"""Builds models from their configuration, presets or checkpoints, and the training step around a model."""

# 从配置到模型：按预设新建、按 checkpoint 装回来，以及包好省显存各法的训练 Step
# build_model 由 _target_ 找类，自己的类也行；model_of 从 checkpoint 造，先在 meta 上核对名字与形状，再真的占内存
# build_step 是训练与预测共用的：memory= 的各项从外面包住 core 的模型与优化器，core 自己不知道
# torch 在函数里才导入：plan 查预设、命令行查配置都用不着它

import inspect
import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import yaml
from omegaconf.errors import OmegaConfBaseException

from nanogpt.base.config import (
    ROOT,
    FinetuneConfig,
    MemoryConfig,
    ModelConfig,
    TrainConfig,
    check_key,
    check_model,
    effective_batch,
    keys,
)
from nanogpt.base.hardware import GIB, free_ram
from nanogpt.base.hashed_json import DamagedError, reason_of
from nanogpt.base.language import ConfigError, say
from nanogpt.base.parts import build_part, locate_class
from nanogpt.base.saved_config import read_saved, refuse_unnamed_code, typed_node
from nanogpt.base.value_checks import check_types

# 极小的模型也可以有长上下文：位置表至少允许这么多个数
LEAST_TABLE = 2**20


def build_model(config: ModelConfig, seed: int, weights: str = "fp32"):
    """The model that config._target_ names, initialised from `seed`, its weights fp32 or bf16 from the start."""
    import torch

    kind = locate_class(config._target_, "model._target_")
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ConfigError("not_a_part", key="model._target_", got=config._target_, want="torch.nn.Module")
    check_memory_for(config, 2 if weights == "bf16" else 4)
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


def build_undrawn(config: ModelConfig):
    """Like build_model, for weights that will be loaded: those of our own class hold nothing yet."""
    from contextlib import nullcontext

    from nanogpt.core.initialize import Undrawn

    # 自己的类可能另有不在文件里的权重：照旧抽
    with Undrawn() if config._target_ == ModelConfig._target_ else nullcontext():
        return build_model(config, seed=0)


def weight_shapes(config: ModelConfig, finetune: FinetuneConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of such a model by name; allocates nothing."""
    import torch

    from nanogpt.core.memory.lora import add_adapters

    # RoPE 的表不是权重；在 meta 上算它，也会带进 torch._dynamo
    bare = replace(config, position="none") if config.position == "rope" else config
    with torch.device("meta"):
        model = build_undrawn(bare)
        if finetune.method == "lora":
            add_adapters(model, finetune, empty=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_memory_for(config: ModelConfig, bytes_each: int) -> None:
    """Refuse a model whose weights alone need more memory than is free, before the system kills a process for it."""
    import torch

    # 核对形状用的是 meta：什么也不占
    if torch.get_default_device().type == "meta":
        return
    parameters = parameters_at_least(config)
    need, have = parameters * bytes_each, free_ram()
    if need > have:
        raise ConfigError(
            "model: its weights alone are {need:.1f} GiB ({parameters:.3g} parameters), {have:.1f} GiB are free; "
            "lower model.n_layer, model.n_embd or model.vocab_size, or use memory.weights=bf16",
            need=need / GIB, parameters=float(parameters), have=have / GIB,
        )


def parameters_at_least(config: ModelConfig) -> int:
    """Number of parameters in the matrices of a GPT of this shape; a user's own class may have others."""
    config = config.completed()
    vocab, width = config.vocab_size or 1, config.n_embd
    tables = vocab * (1 if config.tie_embeddings else 2) + (config.block_size if config.position == "learned" else 0)
    tables += sum(min((vocab + 1) ** n, config.ngram_buckets) for n in config.ngrams)
    attention = 2 * (config.n_head + config.kv_heads) * config.head_size
    mlp = (3 if config.activation == "swiglu" else 2) * config.mlp_width
    return width * (tables + config.n_layer * (attention + mlp))


def build_sampler(node: dict):
    """The sampler of a conf/sampler yaml.

    `_target_` is a factory (or class) that takes the other keys and returns a callable, or itself a
    function whose first parameter is `logits`: then the other keys are passed with every call. A second
    positional parameter receives the tokens so far.
    """
    from nanogpt.core.sampling import Sampler

    target = locate_class(node["_target_"], "sampler._target_")
    settings = {key: value for key, value in node.items() if key != "_target_"}
    try:
        signature = inspect.signature(target)
        if next(iter(signature.parameters), None) == "logits":
            # 普通函数：设置在这里就核对，拼错的键名不会拖到第一次采样
            signature.bind(*[None] * _positional(signature), **settings)
            check_types(target, "sampler", settings)
            return _wrapped(lambda *inputs: target(*inputs, **settings), _positional(signature), node["_target_"])
        built = target(**settings)
        if not callable(built):
            raise ConfigError("not_a_part", key="sampler._target_", got=node["_target_"], want="sampler: __call__")
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError("bad_part", key="sampler", reason=error) from None
    if isinstance(built, Sampler):
        return built
    return _wrapped(built, _positional(inspect.signature(built)), node["_target_"])


def _positional(signature: inspect.Signature) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # 有默认值的，是自己的设置还是前文，只有名字说得清
    asked = (p.default is p.empty or p.name == "tokens" for p in signature.parameters.values() if p.kind in kinds)
    return min(2, sum(asked))


def _wrapped(stage: Callable, inputs: int, name: str):
    """A stage of somebody's own as a Sampler that checks what it returns."""
    import torch

    from nanogpt.core.sampling import Sampler

    def checked(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # 模型自己算坏了的行由别处说；采样器可能就地改写，要先看
        broken, shape = ~logits.amax(-1).isfinite(), logits.shape
        kept = stage(*(logits, tokens)[:inputs])
        # 没有一个有限的数也能抽出一个 id 来：写出的全是同一个字，看不出错在哪里
        fits = isinstance(kept, torch.Tensor) and kept.shape == shape
        if not (fits and kept.is_floating_point() and bool((kept.amax(-1).isfinite() | broken).all())):
            got = list(kept.shape) if isinstance(kept, torch.Tensor) and not fits else type(kept).__name__
            raise ConfigError(
                "sampler: {name} must return logits of the shape {want}, neither NaN nor +inf among them and not only "
                "-inf in any row; it returned {got}",
                name=name, want=list(shape), got=got,
            )
        return kept

    return Sampler((checked,), inputs == 2)


def build_step(cfg: TrainConfig, model, precision):
    """The core.step.Step of a model as cfg.memory and cfg.optimizer ask for; training and planning use the same one."""
    from nanogpt.core.distributed import world
    from nanogpt.core.loss import chunked_cross_entropy
    from nanogpt.core.memory.in_backward import InBackward
    from nanogpt.core.memory.lean_optimizers import Lean, configure
    from nanogpt.core.memory.recompute import fit_budget, recompute_blocks
    from nanogpt.core.optimizers import Optimizer
    from nanogpt.core.sharding import applies, shard, shard_step
    from nanogpt.core.step import Step
    from nanogpt.core.tables import RowGradient

    memory, expect = cfg.memory, None
    model.cross_entropy = partial(chunked_cross_entropy, chunk_mib=memory.loss_chunk_mib)
    if memory.activation_checkpointing != "none":
        recompute_blocks(model, memory.activation_checkpointing, second_in=precision.again)
    if memory.activation_checkpointing == "budget":
        expect = partial(fit_budget, model, budget_mib=memory.activation_budget_mib, context=precision.context)
    if applies(cfg.parallel):
        shard(model, precision.device_type)
    optimizer = build_part(cfg.optimizer, "optimizer", model)
    check_trained(optimizer, model)
    configure(optimizer, memory, precision.device_type)
    for group in optimizer.param_groups if precision.bf16_updates else ():
        if group.get("rule") == "muon":
            group["ns_bf16"] = True
    alone = world() == 1 and not applies(cfg.parallel)
    if precision.device_type == "cpu" and alone and not isinstance(optimizer, Lean):
        for p in (p for group in optimizer.param_groups if group.get("rule") == "rows" for p in group["params"]):
            p.row_gradient = RowGradient()
    in_backward = InBackward(optimizer, cfg.grad_clip) if memory.optimizer_in_backward else None
    step = Step(model, optimizer, precision, in_backward=in_backward, expect=expect)
    if applies(cfg.parallel):
        if not isinstance(optimizer, Optimizer):
            raise ConfigError("not_sharded", key=f"optimizer={type(optimizer).__name__}")
        rows = -(-effective_batch(cfg) // world())
        shard_step(step, passes=-(-rows // cfg.batch_size), every=cfg.parallel.sum_gradients == "every")
    if isinstance(cfg.batch_size, int):
        step.expect(cfg.batch_size)
    return step


def check_trained(optimizer, model) -> None:
    """Refuse an optimizer that holds none of the model's parameters; say how many it leaves out."""
    # 自己写的优化器漏了参数，训练照样走完，只是什么也没学到
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    total = sum(p.requires_grad for p in model.parameters())
    if total and len(left_out) == total:
        raise ConfigError(
            "optimizer={name} holds none of the model's parameters and would train nothing; let its param_groups hold "
            "those of model.parameters()",
            name=type(optimizer).__name__,
        )
    if left_out:
        say(
            "optimizer={name} leaves out {count} of the model's {total} parameters, {first} among them: they stay as "
            "they are",
            name=type(optimizer).__name__, count=len(left_out), total=total, first=left_out[0],
        )


def model_of(source, named: str | None = None, fill: Callable | None = None):
    """The model of a checkpoint.Checkpoint on the CPU, LoRA adapters merged into plain weights.

    A user's own class is run only if it was `named` on the command line. `fill` (model, pieces) loads a model of ours
    piece by piece in a form of its own.
    """
    from nanogpt.core.memory.lora import add_adapters, merge

    try:
        saved = read_saved(source.config_text())
        refuse_unnamed_code(saved, {"_target_": named}, source.folder, ("model",))
        if named not in (None, have := saved["model"].get("_target_", ModelConfig._target_)):
            raise ConfigError(
                "model: {got} was typed, but the model of {path} is {have}; leave model=… out or name that one",
                got=named, path=source.folder, have=have,
            )
        # 早于 LoRA 的训练没有 finetune 一节
        config = typed_node(ModelConfig, saved["model"])
        finetune = typed_node(FinetuneConfig, saved.get("finetune", {}))
    except (DamagedError, OmegaConfBaseException, TypeError) as error:
        raise source.damaged(f"config.yaml: {reason_of(error)}") from None
    check_weights(source, config, finetune)
    model = build_undrawn(config)
    if fill and config._target_ == ModelConfig._target_:
        readers = source.readers()
        fill(model, (merged(readers, config, finetune) if finetune.method == "lora" else readers).pieces())
        return model
    if finetune.method == "lora":
        add_adapters(model, finetune, empty=True)
    source.load_model(model)
    return merge(model)


def merged(tensors, config: ModelConfig, finetune: FinetuneConfig):
    """The tensors.Readers of a LoRA run as those of the plain model, each merged as core.memory.lora.merge() does."""
    import torch

    from nanogpt.core.memory.nf4 import dequantize, pairs
    from nanogpt.weights.tensors import Readers, reader_of

    shapes, readers = weight_shapes(config, FinetuneConfig()), {}

    def merge(name: str, frozen: str, module: str) -> torch.Tensor:
        weight = tensors[frozen]
        if weight.dtype == torch.uint8:
            scales = tensors[frozen.removesuffix("weight") + "scales"]
            weight = dequantize(weight, scales, pairs(weight.device), shapes[name], torch.float32)
        if f"{module}.lora_a" not in tensors:
            return weight
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        return weight.float() + finetune.alpha / finetune.rank * (b.float() @ a.float())

    for name in shapes:
        module, _, part = name.rpartition(".")
        frozen = name if name in tensors else f"{module}.base.{part}"
        if part == "weight" and {f"{module}.lora_a", f"{module}.scales"} & set(tensors):
            readers[name] = partial(merge, name, frozen, module)
        elif frozen in tensors:
            # 绑在一起的输出层不在文件里
            readers[name] = reader_of(tensors, frozen)
    return Readers(readers)


def check_weights(source, config: ModelConfig, finetune: FinetuneConfig) -> None:
    """Refuse a checkpoint.Checkpoint whose weights do not have the names and shapes of this config; allocates nothing.

    A config that asks for a billion layers does not get the memory to build them. Only our own model class is checked:
    what a user's own class does, nothing here can know.
    """
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
        want = weight_shapes(config, finetune)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise source.damaged(f"config.yaml: {reason_of(error)}") from None
    shared = {"lm_head.weight"} if config.tie_embeddings else set()
    wrong = sorted((set(have) ^ set(want)) - shared) or sorted(n for n in set(have) & set(want) if have[n] != want[n])
    if wrong:
        raise source.damaged(f"model.safetensors: other parameters: {wrong[:3]}")


def preset_names() -> list[str]:
    """Names of all model presets in conf/model."""
    return sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


def memory_options() -> dict[str, MemoryConfig]:
    """The options of conf/memory that change nothing else, the default first, then from cheap to thorough."""
    files = sorted((ROOT / "conf" / "memory").glob("*.yaml"))
    read = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    # lora4 还换了训练的方法：要自己选
    nodes = {name: typed_node(MemoryConfig, node) for name, node in read.items() if "memory" not in node}

    def thoroughness(name: str) -> tuple[bool, int]:
        # 逐个参数裁剪、不能累积的，训练本身也变了：放在最后；其余按改动了几项
        changed = [field for field in fields(MemoryConfig) if getattr(nodes[name], field.name) != field.default]
        return nodes[name].optimizer_in_backward, len(changed)

    return {name: nodes[name] for name in sorted(nodes, key=thoroughness)}


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
    # 这里不知道文字有多少
    return config.completed()


def create_model(name: str, *, vocab_size: int, seed: int = 1337, arch: str | None = None, **changes):
    """A freshly initialised preset: create_model("tiny", vocab_size=65, dropout=0.1)."""
    # 命令行会查的，从 Python 里写的也查
    for key, field in keys(ModelConfig, "model."):
        if field.name in changes:
            check_key(key, field, changes[field.name])
    return build_model(preset(name, arch, vocab_size=vocab_size, **changes), seed)
