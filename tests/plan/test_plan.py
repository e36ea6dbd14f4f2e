"""plan=true: the verdict follows the allocator model, advice makes it fit, nothing is written."""

import sys
from dataclasses import asdict, replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config
from rich.cells import cell_len
from typed import typed

from nanogpt.base import hardware, language
from nanogpt.base.console import Console
from nanogpt.base.hardware import GIB, allocator_cap
from nanogpt.base.language import ConfigError
from nanogpt.core import machine
from nanogpt.plan import advice, budget, filled_config, matrix, roofline
from nanogpt.plan.allocator import replay
from nanogpt.plan.budget import STEP_BYTES, budget_for
from nanogpt.plan.plan import TIGHT, Planner, plan_for, predict, step_seconds, with_workspace
from nanogpt.plan.roofline import rates_of
from nanogpt.plan.show import run_plan, show, table

SMALL = (
    "model.n_layer=1", "model.n_head=2", "model.n_embd=64", "model.block_size=64", "model.vocab_size=300", "model.ngrams=[]", "precision=bf16",
    "hardware=rtx3060_8gb", "eval_batch_size=1",
)


def small(*overrides):
    return make_config(*SMALL, *overrides)


def with_vram(cfg, gib):
    """cfg on a card of which the allocator may take `gib`."""
    return replace(cfg, hardware=replace(cfg.hardware, vram_gib=gib + 1, context_gib=0.5, desktop_gib=0.5))


@pytest.fixture(scope="module", autouse=True)
def native_linux():
    """The same plans on every system: those of native Linux."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "segments_grow", lambda: True)
        yield


@pytest.fixture(scope="module")
def plan():
    return predict(small("batch_size=8", "gradient_accumulation_steps=2"))


def test_the_parts_add_up_to_the_total_and_the_table_shows_them(plan):
    assert plan.total == sum(asdict(plan.parts).values()) == plan.reserved + plan.parts.context + plan.parts.desktop
    assert plan.allocated <= plan.reserved and plan.verdict == "fits"
    lines = table(plan)
    assert len(lines) == 12 and f"{plan.total / GIB:.2f}" in lines[-2] and "7.70" in lines[-1]
    language.set_language("zh")
    assert all(cell_len(a[: a.index(".")]) == cell_len(b[: b.index(".")]) for a, b in zip(table(plan)[1:], table(plan)[2:], strict=False))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_plan_far_beyond_the_budget_is_one_table_in_80_columns(plan, lang, monkeypatch, capsys):
    language.set_language(lang)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    budget = replace(plan.budget, total=7 * GIB)
    large = replace(plan, budget=budget, parts=replace(plan.parts, activations=900 * GIB, rounding=99 * GIB))
    lines = table(large)
    assert len(lines) == 12 and max(map(cell_len, lines)) < 80 and not any("…" in line for line in lines)


def test_fits_means_that_the_replay_succeeds_under_the_capacity(plan):
    cfg = plan.cfg
    reserved = plan.reserved / GIB
    for gib, verdict in ((reserved / TIGHT + 0.001, "fits"), (reserved / TIGHT - 0.001, None), (reserved + 0.001, None), (reserved / 3, "does_not_fit")):
        limited = with_vram(cfg, gib)
        planner = Planner(limited)
        got = planner.predict(limited)
        traced = planner.trace(got.cfg, 8, 16, 1)
        capacity, growing = planner.budget.capacity, planner.budget.growing
        assert (got.verdict == "fits") == replay(with_workspace(limited, traced), int(capacity * TIGHT), growing=growing).fits
        assert (got.verdict == "does_not_fit") != replay(with_workspace(limited, traced), capacity, growing=growing).fits
        assert verdict in (None, got.verdict)


def test_segments_grow_in_a_plan_where_they_would_in_a_training_and_it_says_where_they_do_not(plan, monkeypatch, capsys):
    first = Planner(plan.cfg)
    for growing in (True, False):
        monkeypatch.setattr(machine, "segments_grow", lambda growing=growing: growing)
        planner = Planner(plan.cfg)
        planner.share(first)
        got = planner.judge(plan.cfg, "")
        assert planner.budget.growing is growing and not budget_for(make_config("hardware=cpu")).growing
        assert got.reserved == replay(with_workspace(plan.cfg, planner.trace(plan.cfg, 8, 16, 1)), growing=growing).reserved
        show(got, Console())
        assert ("without growing segments" in capsys.readouterr().out) != growing


def test_the_allocators_cap_is_the_capacity_of_the_plan():
    cfg = small()
    assert budget_for(cfg).capacity == allocator_cap(cfg.hardware) == int((7.7 - 0.4 - 0.4) * GIB)
    assert allocator_cap(make_config().hardware) is None
    with pytest.raises(ConfigError, match="hardware.vram_gib=0.5"):
        allocator_cap(make_config("hardware=rtx3060_8gb", "hardware.vram_gib=0.5").hardware)


@pytest.mark.parametrize(("overrides", "kind"), [
    (("hardware=cpu",), "cpu"), (("hardware=rtx3060_12gb", "device=cpu"), "cpu"), (("hardware=rtx3060_12gb",), "cuda"), (("hardware.vram_gib=8",), "cuda"),
])
def test_the_stated_hardware_decides_what_is_planned_for(overrides, kind):
    assert budget_for(make_config(*overrides)).device_type == kind


def test_a_cpu_is_planned_with_its_ram():
    got = predict(make_config(*SMALL, "hardware=cpu", "hardware.ram_gib=2", "hardware.peak_tflops_fp32=0.1", "hardware.peak_tflops_half=0.1",
                              "hardware.bandwidth_gb_per_s=10", "precision=fp32"))
    assert got.budget.total == 2 * GIB and got.parts.context > 50 * 2**20 and got.parts.workspace == got.parts.rounding == 0
    assert got.verdict == "fits" and len(table(got)) == 9


def test_what_a_setting_imports_does_not_count_into_the_plans_of_others_that_come_later(monkeypatch):
    class Growing:
        sizes = iter(range(1, 9))

        def memory_info(self):
            return self

        @property
        def rss(self):
            return next(self.sizes) * GIB

    monkeypatch.setattr("psutil.Process", Growing)
    budget._resident.cache_clear()
    cfgs = [make_config(*SMALL, "hardware=cpu", "hardware.ram_gib=8", *more) for more in (("parallel=fsdp", "parallel.world=2"), ("memory=lean",), ())]
    sharded, recomputed, plain = (budget_for(cfg).context for cfg in cfgs)
    budget._resident.cache_clear()
    assert (plain, recomputed, sharded) == (GIB + STEP_BYTES, 2 * GIB + STEP_BYTES, 3 * GIB + STEP_BYTES)


def test_the_largest_batch_fits_and_is_planned_for_auto():
    cfg = with_vram(small("batch_size=auto", "global_batch_size=96"), 0.12)
    planner = Planner(cfg)
    got = planner.predict(cfg)
    assert got.verdict == "fits" and got.batch_size * got.accumulation >= 96 and 1 <= got.batch_size < 96
    assert not planner.fits(filled_config.filled(cfg)[0], 96)


def test_advice_fits_keeps_the_effective_batch_and_is_sorted_by_speed(monkeypatch):
    # 20 MiB 一页，对这么小的卡太粗
    monkeypatch.setattr(machine, "segments_grow", lambda: False)
    # 一个键、一个成套设置：两条路都走到，不必追踪全部
    monkeypatch.setattr(advice, "KEYS", tuple(c for c in advice.KEYS if "optimizer_state" in c.fields))
    presets = advice.presets()
    monkeypatch.setattr(advice, "presets", lambda: presets[:1])
    cfg = with_vram(small("model.n_layer=2", "batch_size=64", "memory.loss_chunk_mib=1", "model.logit_softcap=15"), 0.1)
    planner = Planner(cfg)
    got = planner.predict(cfg)
    assert got.verdict == "does_not_fit"
    found = advice.advise(got, planner)
    assert found and [a.speed for a in found] == sorted((a.speed for a in found), reverse=True)
    for each in found:
        assert each.plan.verdict == "fits" and each.plan.batch_size * each.plan.accumulation == 64
        typed = [*SMALL, "batch_size=64", *each.typed.split()]
        assert make_config(*typed).memory.activation_checkpointing == each.plan.cfg.memory.activation_checkpointing
    assert any("batch_size=" in a.typed for a in found)


def test_advice_goes_on_to_heavier_presets_only_until_one_fits(plan, monkeypatch):
    tried, fitting = [], "lean8"

    def ways(plan, planner, changes, accepted=("fits",)):
        tried.append(" ".join(change.typed for change in changes))
        return [advice.Advice(tried[-1], 1.0, plan)] if fitting in tried[-1] else []

    monkeypatch.setattr(advice, "_ways", ways)
    monkeypatch.setattr(advice, "_is_useful", lambda change, *_: "weights" in change.typed)
    assert [found.typed for found in advice.advise(plan, None)] == ["memory=lean8"]
    assert tried == ["", "memory=lean", "memory=lean8", "memory.weights=bf16"]
    # 时间用完而一个也没有：成套的仍逐个问
    monkeypatch.setattr(advice, "SECONDS", -1.0)
    assert [found.typed for found in advice.advise(plan, None)] == ["memory=lean8"]


def test_where_nothing_that_accumulates_fits_a_single_row_is_advised():
    planner = SimpleNamespace(
        budget_of=lambda cfg: None, judge=lambda cfg, source: SimpleNamespace(verdict="fits", tokens_per_s=5.0),
        estimate=lambda cfg: SimpleNamespace(fits=lambda rows, budget, part: cfg.memory.optimizer_in_backward and cfg.batch_size == 1),
    )
    plan = SimpleNamespace(cfg=make_config(*SMALL, "batch_size=8", "gradient_accumulation_steps=4"), vocab_source="-", tokens_per_s=10.0)
    (found,) = advice._one_row(plan, planner, [(), *((change,) for change in advice.presets())], lambda: False)
    assert (found.typed, found.speed) == ("batch_size=1 gradient_accumulation_steps=1 memory=minimal", 0.5)


def test_on_a_cpu_every_setting_is_judged_beside_what_its_own_process_takes(monkeypatch):
    cfg, lean = (make_config(*SMALL, "hardware=cpu", "hardware.ram_gib=2", *more) for more in ((), ("memory=lean",)))
    planner = Planner(cfg)
    monkeypatch.setattr("nanogpt.plan.budget.process_bytes", lambda cfg: GIB * (2 if cfg.memory.activation_checkpointing != "none" else 1))
    assert [planner.predict(one).parts.context for one in (cfg, lean)] == [GIB + STEP_BYTES, 2 * GIB + STEP_BYTES]
    assert [planner.predict(one).verdict for one in (cfg, lean)] == ["fits", "does_not_fit"]


def test_every_change_that_advice_knows_is_a_key_of_the_schema():
    cfg = small()
    for change in (*advice.KEYS, *advice.presets()):
        assert all(hasattr(cfg.memory, key) for key in change.fields)
        typed = make_config(*SMALL, change.typed)
        assert all(getattr(typed.memory, key) == value for key, value in change.fields.items()), change.typed


def test_time_grows_with_work_and_shrinks_with_a_faster_card(plan):
    cfg = plan.cfg
    planner = Planner(cfg)
    traced = planner.trace(cfg, 8, 16, 1)
    rates = rates_of(cfg.hardware, planner.budget)
    once, twice, thrice = (step_seconds(traced, rates, rows) for rows in (8, 16, 24))
    assert once < twice < thrice and thrice - twice == pytest.approx(twice - once, rel=0.3)
    slower = replace(rates, half_flops=rates.half_flops / 1000)
    assert step_seconds(traced, slower, 8) > once
    assert plan.tokens_per_s == pytest.approx(16 * 64 / plan.step_s) and plan.train_s > plan.iters * plan.step_s


VOCABULARIES = {
    "dataset=shakespeare_bpe": 50257, "dataset=plays_char dataset.tokenizer=gpt2": 50257, "dataset=plays_char dataset.tokenizer=byte": 256,
    "dataset=plays_char init_from=gpt2-medium": 50257,
}


def test_the_bandwidth_of_a_busy_cpu_is_what_one_thread_copies_in_its_own_time(monkeypatch):
    # 墙上的每一次抄写都要等别的程序 100 秒，线程自己只用了 0.8 秒抄 8 次
    walls, owns = count(step=100), iter((5.0, 5.8))
    monkeypatch.setattr("time.perf_counter", lambda: next(walls))
    monkeypatch.setattr("time.thread_time", lambda: next(owns))
    threads = torch.get_num_threads()
    assert roofline.copy_bandwidth.__wrapped__(torch.device("cpu")) == pytest.approx(2 * roofline.COPY_BYTES / 0.1 / 1e9)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("overrides", VOCABULARIES)
def test_the_vocabulary_is_known_without_preparing_data(overrides, tmp_path):
    cfg = make_config(*overrides.split(), f"dataset.dir={tmp_path / 'none'}")
    got, source = filled_config.filled(cfg)
    assert got.model.vocab_size == VOCABULARIES[overrides] and source and not list(tmp_path.iterdir())


def test_a_prepared_data_set_says_its_vocabulary(corpus_folder):
    got, source = filled_config.filled(make_config("dataset=text_file", f"dataset.dir={corpus_folder}"))
    assert got.model.vocab_size < 40 and source == "the prepared data set"


def test_weights_that_would_have_to_be_fetched_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="init_from=someone/model: the plan needs a local copy") as error:
        filled_config.filled(make_config("init_from=someone/model"))
    assert "\n" not in str(error.value)


def test_presets_of_init_from_have_their_own_shape():
    got, _ = filled_config.filled(make_config("init_from=gpt2-xl"))
    assert (got.model.n_layer, got.model.n_embd, got.model.position) == (48, 1600, "learned")


def test_the_matrix_covers_every_card(monkeypatch):
    memories = {"lean": make_config("memory=lean").memory}
    monkeypatch.setattr(matrix, "memories", lambda chosen: memories)
    monkeypatch.setattr(matrix, "preset_names", lambda: ["tiny"])
    # 要紧的是覆盖与放得下的行数，不是模型的大小
    monkeypatch.setattr(matrix, "preset", lambda name, **_: small().model)
    monkeypatch.setattr(matrix, "MAX_TOKENS", 2 * 64)
    got = list(matrix.rows(make_config("optimizer=adamw")))
    assert {precision for _, precision, *_ in got} == {"fp32", "fp16", "bf16"}
    assert all(list(largest) == ["rtx3060_12gb", "rtx3060_8gb", "rtx3060_laptop_6gb"] for *_, largest in got)
    assert all(n == 2 for *_, largest in got for n in largest.values())


def test_plan_true_prints_a_verdict_and_writes_nothing(tmp_path):
    done = typed("run_train.py", tmp_path, *SMALL, "plan=true", "batch_size=2")
    assert not done.stderr and not list(tmp_path.iterdir())
    assert "FITS: 0.8" in done.stdout and "tokens/s" in done.stdout and "hardware=rtx3060_8gb" in done.stdout


def test_the_plan_of_a_resume_is_for_what_it_still_has_to_do(own_run, capsys):
    def planned(*words):
        run_plan(make_config("resume=outputs/run", "plan=true", *words, checked=False), list(words))
        return capsys.readouterr().out

    assert "for 4 iterations with evaluation" in planned("max_iters=10")
    # 预热早已走完：剩下的比它短也不是错
    assert "for 1 iterations with evaluation" in planned("max_iters=7")
    with pytest.raises(ConfigError, match="already stands at iteration 6 of max_iters=6; add max_iters=12"):
        planned()
    shown = planned("max_tokens=1000000")
    assert "max_iters=6 was the end of this run; it goes on to max_tokens=1000000" in shown and "for 6 iterations" not in shown


def test_what_does_not_fit_ends_with_advice_and_exit_code_1(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advice, "advise", lambda plan, planner, looked: [advice.Advice("memory=lean", 0.71, plan)])
    with pytest.raises(SystemExit) as stopped:
        run_plan(with_vram(small("plan=true", "batch_size=64"), 0.05), [])
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and "DOES NOT FIT" in shown and "  0.71x  memory=lean" in shown and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups")
def test_a_container_that_allows_less_than_the_machine_has_is_planned_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    cpu = small("hardware=cpu", "device=cpu")
    for name, content in (("memory.max", "max\n"), ("memory.current", f"{GIB}\n"), ("memory.stat", f"anon 5\ninactive_file {GIB // 2}\n")):
        (tmp_path / name).write_text(content, encoding="ascii")
    most = budget_for(cpu).capacity
    (tmp_path / "memory.max").write_text(f"{GIB + GIB // 4}\n", encoding="ascii")
    # 读过的文件还留在内存里：内核随时可以让出来
    assert budget_for(cpu).capacity == GIB * 3 // 4 - STEP_BYTES < most


def test_a_plan_from_python_takes_what_the_command_takes_and_refuses_what_it_cannot_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("resume=outputs/run", "plan=matrix"):
        with pytest.raises(ConfigError, match=rf"^{word.partition('=')[0]}=…: plan_for\(\) plans one new training"):
            plan_for("model=tiny", word)
    # 与命令行一样，dataset.path 自己就说明了是哪种数据集
    (tmp_path / "my.txt").write_text("ab" * 3000, encoding="utf-8")
    assert plan_for("dataset.path=my.txt", "model=tiny", "hardware=cpu", "hardware.ram_gib=8").verdict == "fits"
