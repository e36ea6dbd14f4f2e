# 命令的名字不随模块搬家而变
"""python -m nanogpt.control evaluate | plot: see nanogpt.write.judge.command."""

from nanogpt.write.control import NoControl, codes, prefix
from nanogpt.write.judge.command import main

__all__ = ["NoControl", "codes", "main", "prefix"]

# 早先这里是一个包：import nanogpt.control.codes 由 base/moved.py 接住
__path__: list[str] = []

if __name__ == "__main__":
    main()
