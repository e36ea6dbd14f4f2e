# 打 wheel 时把顶层的 conf/、data/*/prepare.py 与两个脚本放进包内的 nanogpt/shipped/：装好之后从哪里都找得到
# 可编辑安装不必放：程序直接用仓库里的；不用符号链接，Windows 上也一样
"""What setup.cfg cannot say: the files at the top level that a wheel holds too."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("conf/**/*.yaml", "data/*/prepare.py", "run_*.py")


class BuildWithShipped(build_py):
    """Copies the shipped files into the package that is being built."""

    def run(self):
        if self.editable_mode:
            super().run()
            return
        built = Path(self.build_lib, "nanogpt")
        # build/ 会留下早先版本的模块，也会被装进去
        shutil.rmtree(built, ignore_errors=True)
        super().run()
        root = Path(__file__).parent
        for file in (file for pattern in SHIPPED for file in root.glob(pattern)):
            target = built / "shipped" / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithShipped})
