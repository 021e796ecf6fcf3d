"""What is exact: integers and masks that follow from a seed or a rotation, the same bits on every device and backend.

A changed bit changes which elements a trained model dropped or which keys a query met, so digests are kept and never
updated: a new rule for them is a new golden result under a new name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusewright import functional

KEPT = Path(__file__).with_name("golden.json")

Compute = Callable[[torch.device, str | None], Tensor]


@dataclass(frozen=True)
class Comparison:
    """A golden result as computed here; ``kept`` is None where none is on record, ``refusal`` why none was computed."""

    name: str
    digest: str | None
    kept: str | None
    refusal: str | None = None

    @property
    def failure(self) -> str | None:
        if self.digest is None or self.kept is None or self.digest == self.kept:
            return None
        return f"its bits have changed: digest {self.digest[:12]}, kept {self.kept[:12]}"


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and values in row-major order."""
    host = tensor.detach().cpu().contiguous()
    head = f"{host.dtype} {tuple(host.shape)} ".encode()
    return hashlib.sha256(head + bytes(host.view(torch.uint8).flatten().tolist())).hexdigest()


def load() -> dict[str, str]:
    """The kept digests by name."""
    kept: dict[str, str] = json.loads(KEPT.read_text(encoding="utf-8"))
    return kept


def compare(backend: str | None, device: torch.device, kept: Mapping[str, str] | None = None) -> Iterator[Comparison]:
    """Compute every golden result on ``backend`` and compare its digest; a backend may lack the op of some."""
    kept = load() if kept is None else kept
    for name, compute in GOLDEN.items():
        try:
            found = digest(compute(device, backend))
        except ValueError as refusal:
            yield Comparison(name, None, kept.get(name), str(refusal))
        else:
            yield Comparison(name, found, kept.get(name))


def _row_dropout(probability: float, columns: int) -> Compute:
    def keep_mask(device: torch.device, backend: str | None) -> Tensor:
        ones = torch.ones(37, columns, device=device)
        kept = functional.add_rms_norm(
            ones, torch.zeros_like(ones), columns, dropout_p=probability, seed=2**40 + 7, backend=backend
        )[1]
        return kept != 0

    return keep_mask


def _attention_dropout(device: torch.device, backend: str | None) -> Tensor:
    """Queries of 0 weigh all keys alike; values that are rows of the identity make each weight one output."""
    heads, keys = 3, 64
    query = torch.zeros(2, heads, 70, keys, device=device)
    value = torch.eye(keys, device=device).expand(2, heads, keys, keys).contiguous()
    output = functional.scaled_dot_product_attention(
        query, torch.zeros_like(value), value, dropout_p=0.3, seed=12345, backend=backend
    )
    assert isinstance(output, Tensor)
    return output != 0


def _buckets(n_buckets: int) -> Compute:
    def buckets(device: torch.device, backend: str | None) -> Tensor:
        generator = torch.Generator().manual_seed(3)

        def coarse(*size: int) -> Tensor:
            # Multiples of 1/16 below 8 make every sum exact in float32, whatever its order.
            return (torch.randint(-127, 128, size, generator=generator) / 16).to(device)

        return functional.lsh_hash(coarse(2, 3, 100, 32), coarse(3, 32, 4, n_buckets // 2), backend=backend)

    return buckets


GOLDEN: dict[str, Compute] = {
    "add_rms_norm dropout 0.1, 37x129": _row_dropout(0.1, 129),
    "add_rms_norm dropout 0.5, 37x1024": _row_dropout(0.5, 1024),
    "attention dropout 0.3, 2x3x70x64": _attention_dropout,
    "lsh_hash 8 buckets": _buckets(8),
    "lsh_hash 64 buckets": _buckets(64),
}
