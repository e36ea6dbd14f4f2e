# 命令的名字不随模块搬家而变
"""python -m nanogpt.huggingface export: see nanogpt.weights.huggingface."""

from nanogpt.weights.huggingface import export, main

__all__ = ["export", "main"]

if __name__ == "__main__":
    main()
