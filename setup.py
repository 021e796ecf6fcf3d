"""Packaging beyond what pyproject.toml can say: the C++ and CUDA sources travel as data of fusewright_kernels.

Nothing is compiled here and torch is not needed; the sources are compiled on first use on the user's machine.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithSources(build_py):
    """``build_py`` that lays csrc inside the package; an editable installation reads the checkout's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fusewright_kernels" / "csrc"
            shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithSources})
