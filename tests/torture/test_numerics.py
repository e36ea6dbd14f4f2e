"""NaN and Inf in losses, gradients, weights and optimizer states, fp16 overflows, absurd learning rates."""

# 一步坏了就跳过：之后与从没见过那一步的训练逐位相同；一直坏、权重坏了就停，一行话指名最后一个好的 checkpoint
# 对照的那一份不靠程序自己的跳过：skip() 另写了一遍跳过应当等于什么

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from attack import LONG, assert_equal, assert_good_checkpoints, cases, fit, quick, raising, snapshot
from conftest import new_trainer, resumed_trainer
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.base.language import ConfigError
from nanogpt.run.health import Diverged
from nanogpt.weights import checkpoint

pytestmark = pytest.mark.torture
# memory=minimal 去掉重算：它要导入 torch._dynamo，几秒钟，而这里要攻击的不是它
MINIMAL = ("precision.dtype=bf16", "memory.weights=bf16", "memory.optimizer_state=int8", "memory.optimizer_in_backward=true")
SHORT = [("optimizer=muon", "precision.dtype=fp16"), ("optimizer=muon", *MINIMAL)]
VARIANTS = SHORT if not LONG else [
    *SHORT, *((f"optimizer={optimizer}", *more) for optimizer in ("adamw", "muon") for more in (
        ("precision=fp32",), ("precision=fp16",), ("precision=bf16",), ("memory=lean8",), ("precision=bf16", "memory=minimal"),
    )), ("optimizer=adamw", "precision=bf16", "memory=offload"),
]
WHOLE = VARIANTS if LONG else [("optimizer=muon", "memory.optimizer_state=int8")]
FP16 = [variant for variant in VARIANTS if "fp16" in variant[1]]
VALUES = st.sampled_from([math.nan, math.inf, -math.inf])
STEPS = 10
# fp16 的初值减半这么多次到 1
HALVINGS = 16 if LONG else 2


@dataclass
class Fault:
    """What goes wrong, at which iterations (0-based)."""

    # kind：loss 是值与梯度都坏；value 只有值坏；gradient 是一个参数的梯度里坏了一个数
    kind: str
    value: float
    steps: frozenset[int]
    parameter: int = 0
    """Number of the parameter, modulo their count, for kind=gradient."""
    micro: int = 0
    """Number of the micro-batch that is hit."""


FAULTS = st.builds(
    Fault, st.sampled_from(["gradient", "loss", "value"]), VALUES, st.frozensets(st.integers(0, STEPS - 1), min_size=1, max_size=4),
    st.integers(0, 99), st.integers(0, 1),
)


def parameter_of(trainer, fault: Fault) -> tuple[str, torch.Tensor]:
    named = list(trainer.model.named_parameters())
    return named[fault.parameter % len(named)]


@contextlib.contextmanager
def injected(trainer, fault: Fault) -> Iterator[None]:
    """Let `fault` happen while the block runs."""
    real, seen = trainer.model.loss, [(-1, 0)]

    def hit() -> bool:
        # 数这一步里的第几个微批；一步只有一个微批时都算
        return trainer.progress.iteration in fault.steps and seen[0][1] == fault.micro % math.ceil(trainer.local_rows / trainer.micro_batch)

    def loss(x, y):
        step, number = seen[0]
        seen[0] = (trainer.progress.iteration, number + 1 if step == trainer.progress.iteration else 0)
        result = real(x, y)
        if not (trainer.model.training and hit()):
            return result
        return result * fault.value if fault.kind == "loss" else result + fault.value if fault.kind == "value" else result

    def spoilt(gradient):
        if not hit():
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[gradient.numel() // 2] = fault.value
        return gradient

    trainer.model.loss = loss
    hook = parameter_of(trainer, fault)[1].register_hook(spoilt) if fault.kind == "gradient" else None
    try:
        yield
    finally:
        del trainer.model.loss
        if hook:
            hook.remove()


def good_step(trainer) -> None:
    trainer.step()
    trainer.progress.nonfinite_in_a_row = 0


def skip(trainer, fault: Fault) -> None:
    """What a skipped step must amount to, written down without the trainer's own skipping."""
    progress, scaler = trainer.progress, trainer.precision.scaler
    if fault.kind == "gradient" and trainer.computation.in_backward:
        # 反向里更新：只有坏梯度的那个参数不动，其余照常；随机舍入的随机数也照抽
        name, parameter = parameter_of(trainer, fault)
        if not trainer.optimizer.state:
            trainer.computation.prepare()
        kept = (parameter, *trainer.optimizer.state[name].values())
        before = [t.detach().clone() for t in kept]
        trainer.step()
        with torch.no_grad():
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
        counted = True
    else:
        overflow, scale = scaler.is_enabled() and fault.kind != "value", scaler.get_scale()
        if overflow:
            scaler.scale(torch.zeros(()))
            # 与 GradScaler 的说明一致：溢出时减半，计数从头来；scale 只能由状态写入
            scaler.load_state_dict({**scaler.state_dict(), "scale": max(1.0, scale / 2), "_growth_tracker": 0})
        progress.iteration += 1
        progress.samples_seen += trainer.global_rows
        progress.tokens_trained += trainer.global_rows * trainer.block_size
        # 会自愈的溢出不算坏步；scale 已到 1 的要算
        counted = not (overflow and fault.kind == "gradient") or scale <= 1
    progress.nonfinite_steps += counted
    progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if counted else progress.nonfinite_in_a_row


def pair(corpus_folder, in_tmp, variant: tuple[str, ...]) -> list:
    """Two trainers of a variant at iteration 0, equal bit for bit."""
    more = [*variant, "max_iters=99", f"precision.initial_loss_scale={2.0**HALVINGS}", "overwrite=true"]
    if not set(variant) & {"memory=minimal", *MINIMAL[3:]}:
        # 第二个微批坏了，第一个的梯度也不能用
        more += ["batch_size=2", "gradient_accumulation_steps=2"]
    return [new_trainer(quick(corpus_folder, *more), out=f"outputs/{name}") for name in ("real", "reference")]


def assert_same(real, reference) -> None:
    """Both stand at the same point, but for clock times."""
    assert_equal(snapshot(real), snapshot(reference))
    counters = [{key: value for key, value in vars(t.progress).items() if key not in ("train_s", "wall_s")} for t in (real, reference)]
    assert counters[0] == counters[1] and real.precision.scaler.state_dict() == reference.precision.scaler.state_dict()


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@cases(2, 60)
@given(fault=FAULTS, stop=st.integers(1, STEPS))
def test_a_step_with_bad_numbers_is_skipped_and_all_else_is_bit_exact_across_a_resume_too(corpus_folder, in_tmp, variant, fault, stop):
    real, reference = pair(corpus_folder, in_tmp, variant)
    with injected(real, fault):
        for _ in range(stop):
            real.step()
    if stop < STEPS:
        real._save(final=False)
        real = resumed_trainer("outputs/real")
        with injected(real, fault):
            for _ in range(STEPS - stop):
                real.step()
    # 挂了 hook 的表，梯度照 autograd 的次序相加：对照也挂上，只是什么也不坏
    with injected(reference, replace(fault, steps=frozenset())):
        for iteration in range(STEPS):
            skip(reference, fault) if iteration in fault.steps else good_step(reference)
    assert_same(real, reference)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@cases(1, 6)
@given(kind=st.sampled_from(["loss", "value"]), value=VALUES)
def test_bad_steps_without_end_stop_the_run_with_its_weights_as_they_were(corpus_folder, in_tmp, variant, kind, value):
    real, reference = pair(corpus_folder, in_tmp, variant)
    limit = real.cfg.max_nonfinite_steps
    with injected(real, Fault(kind, value, frozenset(range(2, 99)))), pytest.raises(Diverged, match=r"learning_rate=") as ended:
        for _ in range(limit + 9):
            real.step()
    for _ in range(2):
        reference.step()
    assert_equal(snapshot(real), snapshot(reference))
    assert real.progress.iteration == 1 + limit and "\n" not in str(ended.value)


@pytest.mark.parametrize("variant", FP16, ids=" ".join)
@cases(2, 20)
@given(length=st.sampled_from([HALVINGS + 10, 3, HALVINGS + 4]) | st.integers(1, 40), value=st.sampled_from([math.inf, -math.inf]), at=st.integers(0, 99))
def test_a_storm_of_overflows_is_survived_or_stops_the_run_at_scale_1(corpus_folder, in_tmp, variant, length, value, at):
    real, reference = pair(corpus_folder, in_tmp, variant)
    fault, allowed = Fault("gradient", value, frozenset(range(2, 2 + length)), at), HALVINGS + real.cfg.max_nonfinite_steps
    with injected(real, fault):
        if length >= allowed:
            with pytest.raises(Diverged, match="not finite"):
                [real.step() for _ in range(2 + length)]
            assert real.progress.iteration == 2 + allowed - 1 and real.precision.scaler.get_scale() == 1
            return
        [real.step() for _ in range(2 + length + 3)]
    with injected(reference, replace(fault, steps=frozenset())):
        for iteration in range(2 + length + 3):
            skip(reference, fault) if iteration in fault.steps else good_step(reference)
    assert_same(real, reference)


# ---- 整个训练 ----


@pytest.fixture(scope="module")
def clean(corpus_folder, tmp_path_factory):
    """clean(variant) -> the tensors at the end of a training in which nothing goes wrong."""
    found = {}

    def of(variant: tuple[str, ...]) -> dict[str, torch.Tensor]:
        if variant not in found:
            with contextlib.chdir(tmp_path_factory.mktemp("clean")):
                trainer = new_trainer(quick(corpus_folder, *variant))
                assert fit(trainer) is None
                found[variant] = snapshot(trainer)
        return found[variant]

    return of


@pytest.mark.parametrize("variant", WHOLE, ids=" ".join)
@cases(2, 10)
@given(at=st.integers(5, 11) | st.integers(1, 11), value=VALUES, where=st.sampled_from(["optimizer", "weights"]), chance=st.randoms(use_true_random=False))
def test_a_bad_weight_or_state_is_never_saved_and_the_last_checkpoint_goes_on(corpus_folder, in_tmp, clean, variant, at, value, where, chance):
    trainer = new_trainer(quick(corpus_folder, *variant, "overwrite=true"))
    real, hit = trainer.step, []

    def step():
        if trainer.progress.iteration == at and not hit:
            tensors = dict(trainer.model.named_parameters())
            if where == "optimizer":
                # 8 位的码装不下 NaN：坏的只能是它们的 scale
                states = trainer.optimizer.state.items()
                tensors = {f"{n}.{k}": t for n, s in states for k, t in s.items() if t.is_floating_point() and t.dim()}
            hit.append(chance.choice(sorted(tensors)))
            with torch.no_grad():
                tensors[hit[0]].view(-1)[chance.randrange(tensors[hit[0]].numel())] = value
        return real()

    trainer.step = step
    ended = fit(trainer)
    found = assert_good_checkpoints(trainer.saver.run_dir)
    assert isinstance(ended, Diverged) and "cannot recover" in str(ended) and all(one.iteration <= at for one in found)
    if found:
        assert found[-1].name in str(ended)
        again = resumed_trainer(trainer.saver.run_dir)
        assert fit(again) is None
        assert_equal(snapshot(again), clean(variant))


def assert_strict_json(run_dir) -> None:
    """NaN and Infinity are no JSON, though Python's json takes them."""
    for file in [run_dir / "summary.json", run_dir / "metrics.jsonl", *(run_dir / "ckpt").glob("iter_*/manifest.json")]:
        text = file.read_text(encoding="utf-8")
        for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=raising(ValueError("NaN or Infinity")))


@pytest.mark.parametrize("variant", WHOLE, ids=" ".join)
@cases(1, 5)
@given(bad=st.sets(st.sampled_from([4, 8, 12]), min_size=1), value=VALUES)
def test_a_bad_validation_loss_or_sample_is_passed_over(corpus_folder, in_tmp, clean, capsys, variant, bad, value):
    trainer = new_trainer(quick(corpus_folder, *variant, "early_stop_evals=3", "sample_tokens=4", "overwrite=true"))
    real = trainer.model.loss
    trainer.model.loss = lambda x, y: real(x, y) * (value if trainer.progress.iteration in bad and not trainer.model.training else 1)
    trainer.write_sample = raising(ConfigError("nonfinite_logits"))
    assert fit(trainer) is None and "no sample is written" in capsys.readouterr().out
    found = assert_good_checkpoints(trainer.saver.run_dir)
    assert found and all((one.val_loss is None) == (one.iteration in bad) for one in found)
    assert_strict_json(trainer.saver.run_dir)
    assert_equal(snapshot(trainer), clean(variant))


@cases(2, 60)
@given(
    rate=st.integers(-10, 30).map(lambda n: 10 ** (n / 10)), arch=st.sampled_from(["modern", "gpt2"]), optimizer=st.sampled_from(["muon", "adamw"]),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]), schedule=st.sampled_from(["constant", "linear"]), clip=st.sampled_from([0.0, 1.0]),
)
def test_an_absurd_learning_rate_ends_with_a_good_checkpoint_and_one_line(corpus_folder, in_tmp, rate, arch, optimizer, dtype, schedule, clip):
    iters = 160 if LONG else 40
    given = [
        f"arch={arch}", f"optimizer={optimizer}", f"precision.dtype={dtype}", f"learning_rate={rate}", f"lr_schedule={schedule}",
        f"grad_clip={clip}", f"max_iters={iters}", f"eval_interval={iters // 4}", "log_interval=50", "overwrite=true",
    ]
    trainer = new_trainer(quick(corpus_folder, *given, *(["model.ngrams=[]"] if arch == "gpt2" else [])))
    ended, found = fit(trainer), assert_good_checkpoints(trainer.saver.run_dir)
    if ended is None:
        return assert_strict_json(trainer.saver.run_dir)
    assert isinstance(ended, Diverged) and "learning_rate=" in str(ended)
    named = checkpoint.best_of(found) if "the run has diverged" in str(ended) else None
    assert not found or (named or found[-1]).name in str(ended)
