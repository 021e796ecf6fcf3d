"""Counter-based random bits: Philox4x32-10, the same bits on every backend.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A block of four 32-bit words is a function of
a 64-bit key (the seed) and a 64-bit counter. Dropout over rows of N elements gives element i of row r word i % 4 of
block r * ceil(N / 4) + i // 4, so that a backward redraws the mask from the seed alone. This is the plain PyTorch
form; the kernels' forms agree with it bit for bit.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit words held in int64; in halves, as int64 would overflow."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    low = low_half + ((high_half & 0xFFFF) << 16)
    return ((high_half >> 16) + (low >> 32)) & _MASK, low & _MASK


def random_words(seed: Tensor, blocks: Tensor) -> Tensor:
    """The four words of each counter, shape (*blocks.shape, 4), int64 holding values in [0, 2^32).

    Args:
        seed: int64 tensor of one element.
        blocks: int64 counters of any shape.
    """
    words = [blocks & _MASK, (blocks >> 32) & _MASK, torch.zeros_like(blocks), torch.zeros_like(blocks)]
    keys = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], words[0])
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + step) & _MASK for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(words, dim=-1)


def keep_threshold(dropout_p: float) -> int:
    """Elements whose word is at least this are kept; 2^32, above every word, keeps none."""
    return round(dropout_p * 2**32)


def keep_scale(dropout_p: float) -> float:
    """What the elements kept are multiplied by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def keep_mask(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """Dropout's keep mask of shape (rows, columns), bool."""
    blocks_per_row = -(-columns // 4)
    blocks = torch.arange(rows * blocks_per_row, dtype=torch.int64, device=seed.device)
    words = random_words(seed.reshape(()), blocks).reshape(rows, blocks_per_row * 4)
    return words[:, :columns] >= keep_threshold(dropout_p)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as an int64 tensor of shape (1,) on ``device``; None draws one from torch's default generator."""
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64).reshape(1)
    return torch.tensor([seed], dtype=torch.int64, device=device)
