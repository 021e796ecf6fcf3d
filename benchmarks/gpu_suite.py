"""Everything a GPU machine should run, in one call: build, test, sanitize, measure.

    python benchmarks/gpu_suite.py OUT [--budget SECONDS]

Runs with the torch and Triton that are installed, without a network, and writes one log per step, the results and a
summary to OUT. A step that fails does not stop the next: on rented time every answer counts. Exits with 1 if one did.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = [str(ROOT / folder) for folder in ("engine", "kernels", "benchmarks")]

# Small, and through every kernel: compute-sanitizer slows a kernel a hundredfold.
SANITIZER_CASE = """
import torch
from fusewright import functional, nn
for dtype in (torch.float32, torch.bfloat16):
    for columns in (7, 64, 768, 1025, 20000):
        x = torch.randn(5, columns, device="cuda", dtype=dtype, requires_grad=True)
        w = torch.ones(columns, device="cuda", requires_grad=True)
        b = torch.zeros(columns, device="cuda", requires_grad=True)
        functional.layer_norm(x, columns, w, b, backend="cuda").sum().backward()
        functional.rms_norm(x.T.contiguous().T, columns, w, backend="cuda").sum().backward()
        functional.add_layer_norm(x, x, columns, w, b, dropout_p=0.1, backend="cuda")[0].sum().backward()
        functional.softmax(x, 0, backend="cuda").sum().backward()
        functional.softmax(x, 1, backend="cuda").sum().backward()
for cell in ("LSTM", "GRU", "RNN"):
    layer = getattr(nn, cell)(40, 300, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([3, 0, 7, 5], device="cuda")
    layer(torch.randn(7, 4, 40, device="cuda", dtype=torch.bfloat16), lengths=lengths)[0].sum().backward()
if torch.cuda.get_device_capability() == (9, 0):
    for width in (64, 128):
        q = torch.randn(1, 2, 300, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k = torch.randn(1, 1, 300, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            o = functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True, backend="cuda")
            o.backward(torch.ones_like(o))
        torch.use_deterministic_algorithms(False)
        cache, lengths = q.detach(), torch.tensor([299], device="cuda")
        functional.decode_attention(q.detach()[:, :, :2], cache, cache, lengths, window=200, backend="cuda")
torch.cuda.synchronize()
"""


def steps(out: Path, budget: int) -> dict[str, list[str]]:
    """Command of each step by name, in order."""
    python = sys.executable
    bench = [python, "-m", "fusewright_bench", "bench", "--device", "cuda"]
    result = {
        "machine": ["nvidia-smi"],
        "build": [python, "-m", "fusewright_kernels.build"],
        "doctor": [python, "-m", "fusewright_bench", "doctor"],
        # What runs on the GPU: the rest passes on any machine and would take the time that the measurements need.
        "tests": [
            python,
            "-m",
            "pytest",
            "-q",
            "--maxfail=20",
            "tests",
            "--ignore=tests/test_packaging.py",
            "-k",
            "cuda or triton or gpu",
        ],
        "verify-cuda": [python, "-m", "fusewright_bench", "verify", "--backend", "cuda", "--details"],
        "verify-triton": [python, "-m", "fusewright_bench", "verify", "--backend", "triton", "--details"],
    }
    for tool in ("memcheck", "racecheck", "initcheck"):
        if shutil.which("compute-sanitizer"):
            result[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", python, "-c", SANITIZER_CASE]
    for suite in ("micro", "models"):
        files = ["--json", str(out / f"{suite}.json"), "--markdown", str(out / f"{suite}.md")]
        result[f"bench-{suite}"] = [*bench, "--suite", suite, "--budget", str(budget), *files]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--budget", type=int, default=100, help="seconds for each benchmark suite")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The CPU kernels of one instruction set are enough to compare with.
    environment = {"FUSEWRIGHT_CPU_ISAS": "avx2", **os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join([*SOURCE_ROOTS, os.environ.get("PYTHONPATH", "")])}
    summary = []
    for name, command in steps(arguments.out, arguments.budget).items():
        start = time.monotonic()
        with (arguments.out / f"{name}.log").open("w") as log:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        summary.append(f"{name:14} exit {code}  {time.monotonic() - start:.0f} s")
        print(summary[-1], flush=True)
    (arguments.out / "summary.txt").write_text("\n".join(summary) + "\n")
    return 0 if all(" exit 0 " in line for line in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
