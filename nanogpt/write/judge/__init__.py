"""Evaluate how well a model writes in the style or emotion that it was asked for, and what that costs."""

# 评估控制灵不灵：照每种标签写许多段，由评判逐段认，数命中，再与真实的文本比
# command 是命令行（python -m nanogpt.control），evaluate 是整个过程，judges 是评判，measures 是几把尺，
# table 与 picture 把记录变成屏幕上的表与一张图
