"""Style and emotion of a text: what a person asks for, and how a model is led there.

`codes` puts labels in front that the model was trained behind. `prefixes` puts a sentence in front of the prompt and
raises the logits of words; nothing is trained in.
"""

# 风格与情绪的控制：codes 用模型训练时见过的标签，prefixes 用一句话加上词的偏向，不需要训练；words 是词的偏向本身
# conf/control 里的 yaml 选一种；它们都只改写 Request，引擎不知道控制这回事
# 载入、一问一答与服务器从这里取名字

from nanogpt.write.control.codes import GUIDANCE, codes
from nanogpt.write.control.prefixes import KINDS, NoControl, build_control, language_of, prefix, read_form, takes_forms
from nanogpt.write.request import Control

__all__ = [
    "GUIDANCE", "KINDS", "Control", "NoControl", "build_control", "codes", "language_of", "prefix", "read_form",
    "takes_forms",
]
