# 旧版本写下的训练目录：改名、搬家之后仍要逐位接着训，写出同样的字
# tests/runs/ 下每个目录由当时的代码训出，同名的 .json 记着那时接着训的损失与贪心写出的文字
# gpt2_adamw_labels 有 dropout：CPU 上抽它的办法换过一次，损失是换过之后记的，验证损失差 0.0007 以内
"""Run folders of an earlier version go on and write as they did then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_sample_config, resumed_trainer

from nanogpt.run.metrics import processor_name
from nanogpt.write.loading import open_model
from nanogpt.write.samples import write_samples

RUNS = Path(__file__).parents[1] / "runs"


def kernels() -> dict[str, str]:
    """What decides the last digits of a sum on this machine."""
    # 指令一样也不够：矩阵乘的库在 AMD 与 Intel 上求和的次序不同
    return {"torch": torch.__version__.partition("+")[0], "cpu": processor_name(torch.device("cpu"))}


def resumed_losses(folder: str) -> list[float]:
    """Train four more iterations; training losses, gradient norms and validation losses, in order."""
    trainer = resumed_trainer(folder, "max_iters=44", "eval_interval=2", "log_interval=1")
    # 那时不会自己停下：接着训也不会
    assert trainer.cfg.early_stop_evals == 0
    trainer.fit()
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["iteration"] > 40]
    return [record[key] for record in records for key in ("train/loss", "gradient_norm", "val/loss") if key in record]


def greedy_text(folder: str, capsys, *overrides: str) -> str:
    """What run_sample.py prints."""
    capsys.readouterr()
    cfg = make_sample_config(f"out_dir={folder}", "sampler=greedy", "max_new_tokens=40", "device=cpu", *overrides)
    write_samples(cfg, open_model(cfg, Path(folder)))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["modern_muon", "gpt2_adamw_labels", "lora_minimal"])
def test_a_run_of_an_earlier_version_goes_on_and_writes_as_it_did_then(name, in_tmp, capsys):
    shutil.copytree(RUNS / name, in_tmp / name)
    then = json.loads((RUNS / f"{name}.json").read_text(encoding="utf-8"))
    text, losses = greedy_text(name, capsys, *then["overrides"]), resumed_losses(name)
    if kernels() == then["kernels"]:
        assert (text, losses) == (then["text"], then["losses"])
    else:
        # 别的 CPU、别的 torch 版本求和次序不同，末几位会变；贪心遇到几乎相等的两个字也会选另一个
        assert losses == pytest.approx(then["losses"], rel=1e-3)
