"""Hugging Face's format in both directions: pretrained weights in, `python -m nanogpt.huggingface export` out."""

from nanogpt.pretrained import Pretrained, build_pretrained, open_pretrained

__all__ = ["Pretrained", "build_pretrained", "open_pretrained"]
