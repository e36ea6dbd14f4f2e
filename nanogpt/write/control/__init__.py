"""Style and emotion of a text: what a person asks for, and how a model is led there.

`codes` puts labels in front that the model was trained behind. `prefixes` puts a sentence in front of the prompt and
raises the logits of words; nothing is trained in.
"""

from nanogpt.write.control.codes import GUIDANCE, CodesControl, codes
from nanogpt.write.control.prefixes import KINDS, NoControl, PrefixControl, Wish, build_control, language_of, prefix, read_form, takes_forms
from nanogpt.write.request import Control

__all__ = [
    "GUIDANCE", "KINDS", "CodesControl", "Control", "NoControl", "PrefixControl", "Wish", "build_control", "codes", "language_of", "prefix",
    "read_form", "takes_forms",
]
