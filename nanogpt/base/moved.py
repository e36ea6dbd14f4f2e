"""Maps module and class names of earlier versions to where they are now."""

# 模块搬进各个房间之前的名字 -> 现在的：旧的训练目录、自己的 yaml、自己的类与导出的模型里还写着它们
# 读配置时由 present_name 换；`from nanogpt.model import …` 由挂在 sys.meta_path 末尾的查找器接住
# 表是写死的：名字来自文件，只能换成这里列出的，不会因此执行别处的代码

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "nanogpt.attention": "nanogpt.core.attention",
    "nanogpt.build": "nanogpt.weights.build",
    "nanogpt.config": "nanogpt.base.config",
    "nanogpt.control.codes": "nanogpt.write.control.codes",
    "nanogpt.control.prefixes": "nanogpt.write.control.prefixes",
    "nanogpt.corpus": "nanogpt.data.corpus",
    "nanogpt.documents": "nanogpt.data.documents",
    "nanogpt.fit": "nanogpt.plan",
    "nanogpt.fit.sweep": "nanogpt.sweep.jobs",
    "nanogpt.generate": "nanogpt.core.generate",
    "nanogpt.labels": "nanogpt.data.labels",
    "nanogpt.loggers": "nanogpt.run.loggers",
    "nanogpt.loss": "nanogpt.core.loss",
    "nanogpt.messages": "nanogpt.base.language",
    "nanogpt.model": "nanogpt.core.model",
    "nanogpt.modeling_nanogpt": "nanogpt.weights.modeling_nanogpt",
    "nanogpt.optimizers": "nanogpt.core.optimizers",
    "nanogpt.pretrained": "nanogpt.weights.pretrained",
    "nanogpt.sampling": "nanogpt.core.sampling",
    "nanogpt.source_text": "nanogpt.data.source_text",
    "nanogpt.splitting": "nanogpt.data.splitting",
    "nanogpt.sweep_folder": "nanogpt.base.sweep_folder",
    "nanogpt.tokenizer": "nanogpt.data.tokenizer",
}
"""Modules that docs/extend.md or a yaml could name: old name -> new name."""
OBJECTS = {f"nanogpt.control.{name}": f"nanogpt.write.control.{name}" for name in ("NoControl", "codes", "prefix")}


def present_name(target: str) -> str:
    """The present dotted name of a class or function; one that is not in the table is returned as it is."""
    if target in OBJECTS:
        return OBJECTS[target]
    module, _, name = target.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else target


class _EarlierModules(MetaPathFinder, Loader):
    """Import hook that lets `from nanogpt.model import GPT` in users' classes and exported models work as before."""

    # 接在 sys.meta_path 末尾：别处都找不到时才问到这里，平常的导入不会变慢
    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self, is_package=True) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        # 用到哪个名字才导入真正的模块：旧名字本身不占时间
        module.__getattr__ = lambda name: getattr(import_module(MODULES[module.__name__]), name)


def keep_earlier_names() -> None:
    """Make the earlier names importable, once in a process."""
    if not any(isinstance(finder, _EarlierModules) for finder in sys.meta_path):
        sys.meta_path.append(_EarlierModules())
