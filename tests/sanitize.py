"""``make sanitize``: the CPU kernels under AddressSanitizer with UBSan, and under ThreadSanitizer.

The op tests run in a Python whose process preloads the sanitizer's runtime, on libraries compiled with it. For
ThreadSanitizer torch's OpenMP runtime is a stranger: it cannot see its barriers and would report every parallel
region, so the kernels are driven by a small program with plain threads instead, split the way the ops split them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fusewright_kernels import toolchain

ROOT = Path(__file__).resolve().parents[1]
OP_TESTS = (
    "tests/test_normalization_numerics.py",
    "tests/test_normalization_layouts.py",
    "tests/test_softmax.py",
    "tests/test_cross_entropy.py",
    "tests/test_feed_forward.py",
    "tests/test_attention_numerics.py",
    "tests/test_attention_decode.py",
    "tests/test_additive_attention.py",
    "tests/test_lsh_attention.py",
    "tests/test_linear_attention.py",
    "tests/test_recurrent_numerics.py",
    "tests/test_linear.py",
    "tests/test_embedding.py",
)


def runtime(name: str) -> str:
    """Path of the compiler's sanitizer runtime, which Python must load before anything else."""
    command = [toolchain.cxx_compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def address_and_undefined() -> int:
    sanitized = {**os.environ, "FUSEWRIGHT_SANITIZER": "address"}
    # Before anything is preloaded: the compiler itself would run ten times slower under the sanitizer.
    build = [sys.executable, "-m", "fusewright_kernels.build", "cpu", "ops_cpu"]
    subprocess.run(build, cwd=ROOT, env=sanitized, check=True)
    environment = {
        **sanitized,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')} {runtime('libstdc++.so')}",
        # Python and torch leak by design and throw through frames that were built without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # A report ends the process: what pytest has captured by then is lost.
    chosen = ["--capture=no", "-x", "-k", "not triton and not reference and not compile"]
    command = [sys.executable, "-m", "pytest", *chosen, *OP_TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def threads() -> int:
    os.environ["FUSEWRIGHT_SANITIZER"] = "thread"
    recipe = toolchain.LIBRARIES["cpu"]()
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for step in recipe.compilations:
            target = str(Path(folder) / step.object_name)
            subprocess.run([*step.command, "-c", str(step.source), "-o", target], check=True)
            objects.append(target)
        program = str(Path(folder) / "race")
        base = recipe.compilations[-1].command  # the baseline instruction set
        subprocess.run([*base, str(ROOT / "tests/native/race.cpp"), *objects, "-pthread", "-o", program], check=True)
        return subprocess.run([program], check=False).returncode


def main() -> int:
    results = {"address and undefined": address_and_undefined(), "thread": threads()}
    for name, code in results.items():
        print(f"{name}: {'clean' if code == 0 else f'exit code {code}'}")
    return max(results.values())


if __name__ == "__main__":
    sys.exit(main())
