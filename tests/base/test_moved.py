"""Names of an earlier version are still found."""

from importlib import import_module

import pytest
from conftest import make_config, make_sample_config

from nanogpt.base.config import targets, trusted_targets
from nanogpt.base.moved import MODULES, OBJECTS, present_name
from nanogpt.base.parts import locate_class
from nanogpt.core.model import GPT


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_earlier_module_gives_what_the_present_one_holds(old):
    if old.endswith("modeling_nanogpt"):
        pytest.importorskip("transformers")
    present = import_module(MODULES[old])
    for name in [name for name in vars(present) if not name.startswith("_")][:1]:
        assert getattr(import_module(old), name) is getattr(present, name)
    with pytest.raises(ImportError):
        exec(f"from {old} import nothing_of_this_name")


def test_an_earlier_target_is_the_same_class_and_as_trusted():
    assert locate_class("nanogpt.model.GPT", "model._target_") is GPT
    assert make_config("model._target_=nanogpt.model.GPT").model._target_ == "nanogpt.core.model.GPT"
    assert targets({"optimizer": {"_target_": "nanogpt.optimizers.muon"}}) <= trusted_targets()
    assert all(callable(locate_class(name, "control._target_")) for name in OBJECTS)
    assert make_sample_config("control._target_=nanogpt.control.NoControl").control["_target_"].endswith("NoControl")
    # 表里没有的原样还回去，不会去猜
    assert present_name("nanogpt.modelled.GPT") == "nanogpt.modelled.GPT" and present_name("os.system") == "os.system"
