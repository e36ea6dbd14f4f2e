# 早先的命令：nanogpt export 之前叫这个名字，脚本里可能还写着
"""python -m nanogpt.huggingface export: the former name of `nanogpt export`."""

import sys

from nanogpt.weights.export import export, main

__all__ = ["export", "main"]

if __name__ == "__main__":
    main(sys.argv[2:] if sys.argv[1:2] == ["export"] else None)
