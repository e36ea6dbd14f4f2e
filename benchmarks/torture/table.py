"""What the attacks have counted, as the table of docs/trust.md and docs/trust.zh-CN.md.

    python benchmarks/torture/table.py             # prints the rows in both languages
"""

import json

from ledger import RESULTS

# 攻击 -> 攻击什么（英文、中文），次序就是表里的次序
ATTACKS = {
    "kill": (
        "`kill -9` at random moments, aimed at saves, deletions and single changes of files",
        "随机时刻 `kill -9`，瞄准保存、删除和单次文件改动",
    ),
    "damage": (
        "flipped, lost, swapped and planted files in runs, data sets and weights",
        "训练目录、数据集、权重里的坏文件、丢失、调换与恶意文件",
    ),
    "disk": (
        "full disk, no more files, read-only, quota, nobody reads the output",
        "磁盘满、文件数用尽、只读、配额、输出没人读",
    ),
    "power": (
        "the power goes after any operation on a file: what was not synced lost, zeroed, torn, out of order",
        "任一次文件操作之后断电：没有同步的丢失、变成零、断开、乱序",
    ),
    "folders": (
        "two runs and more in one folder, locks of dead processes",
        "同一目录里两次以上的训练，死掉的进程留下的锁",
    ),
    "numerics": (
        "NaN and Inf in losses, gradients, weights and states, overflow storms, absurd rates",
        "损失、梯度、权重、状态里的 NaN 与 Inf，溢出风暴，离谱的学习率",
    ),
    "memory": (
        "out of memory in every part, in the words of every library",
        "每一处的显存不足，各个库的各种说法",
    ),
    "overrides": (
        "mistyped commands and config files",
        "写错的命令与配置文件",
    ),
    "texts": (
        "texts that are none: encodings, sizes, binaries, broken lines",
        "不成样子的文本：编码、大小、二进制、断行",
    ),
    "server": (
        "fuzzed, slow, vanishing and crowding clients of the page and API",
        "对网页与 API 的模糊请求、慢客户端、断线、拥挤",
    ),
    "sweeps": (
        "trials that crash, hang or are killed; sweeps killed and typed again",
        "崩溃、卡死、被杀的试跑；被杀后重新输入的扫描",
    ),
    "supply": (
        "downloads that are wrong, endless, silent or redirected; pins",
        "错误、没完没了、不出声、被重定向的下载；版本锁定",
    ),
}


def rows(language: str) -> list[str]:
    """One row of the table per attack that has a result file; language: en or zh."""
    found = []
    for name, words in ATTACKS.items():
        path = RESULTS / f"torture_{name}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            link = f"[`{name}.py`](../benchmarks/torture/{name}.py)"
            found.append(f"| {link} | {words[language == 'zh']} | {record['cases']:,} | {len(record['broken'])} |")
    return found


if __name__ == "__main__":
    for language in ("en", "zh"):
        print("\n".join(rows(language)), "\n")
