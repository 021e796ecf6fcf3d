"""What makes Triton's interpreter quick enough for tests of kernels that are made of many device functions."""

from typing import Any

import pytest

from fusewright_kernels import triton_support


def patch_language_once_per_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter replaces functions of its language for a launch, and again at every call of a device function.

    The latter is needed for the first function of a module that names other parts of the language than the kernel's
    does. Replacing again what is replaced changes nothing, and nothing is put back before the launch ends, but it takes
    most of the time of kernels as long as those of attention.
    """
    if not triton_support.INTERPRETED:
        return
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    patched_modules: set[str] = set()

    def launch_anew(self: Any, *arguments: Any, **keywords: Any) -> Any:
        patched_modules.clear()
        return launch(self, *arguments, **keywords)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.fn.__module__ not in patched_modules:
            interpreter._patch_lang(self.fn)
            patched_modules.add(self.fn.__module__)
        return self.rewrite()(*arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
