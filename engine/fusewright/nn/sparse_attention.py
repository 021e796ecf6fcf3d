"""Self-attention over few pairs as a module: windows, dilated or not, global tokens, block patterns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn.checks import self_attention_inputs
from fusewright.nn.linear import Linear
from fusewright.patterns import Pattern
from fusewright_kernels.checks import probability, value_error

Heads = tuple[Tensor, Tensor, Tensor]


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention in which a position meets a window, the positions of a pattern, and global tokens.

    Without window and pattern all positions meet. A global token meets every position and is met by every one; with
    ``separate_global`` it does so by projections of its own, as in Longformer.

    Args:
        embed_dim, num_heads: E and H.
        window: positions met on either side, or (left, right); -1 is no limit.
        dilation: distance between neighbours in the window, one for all heads or one each: with 3 and a window of 2 a
            position meets those 6 and 3 before and behind it.
        pattern: blocks of pairs of which both window and pattern must take part; see :mod:`fusewright.patterns`. Not
            with a dilation.
        separate_global: whether global tokens have query, key and value projections of their own.
        is_causal: only positions up to the own one are met, global ones too.
        dropout: of the weights, in training.
        bias: whether the projections have one.

    Shape: (B, T, E) to the same. A position that meets nobody gets the output projection of zeros.

    Source: Child et al., "Generating long sequences with sparse transformers", 2019; Beltagy, Peters, Cohan,
    "Longformer: the long-document transformer", 2020; Zaheer et al., "Big Bird: transformers for longer sequences",
    2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int | tuple[int, int] | None = None,
        dilation: int | Sequence[int] = 1,
        pattern: Pattern | None = None,
        separate_global: bool = False,
        is_causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise value_error("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}")
        probability("dropout", dropout)
        self.dilations = (dilation,) * num_heads if isinstance(dilation, int) else tuple(dilation)
        if len(self.dilations) != num_heads or min(self.dilations) < 1:
            raise value_error("dilation", dilation, f"an int >= 1 or {num_heads} of them")
        if pattern is not None and max(self.dilations) > 1:
            raise value_error("dilation", dilation, "1 where a pattern is given")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.window, self.pattern, self.is_causal = window, pattern, is_causal
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.in_proj = Linear(embed_dim, 3 * embed_dim, **options)
        self.global_in_proj = Linear(embed_dim, 3 * embed_dim, **options) if separate_global else None
        self.out_proj = Linear(embed_dim, embed_dim, **options)

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, global_mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            hidden: (B, T, E).
            key_padding_mask: (B, T), bool, True for padding, which is met by nobody.
            global_mask: (B, T), bool, True for global tokens.
        """
        self_attention_inputs(hidden, self.embed_dim, key_padding_mask=key_padding_mask, global_mask=global_mask)
        heads = self._project(self.in_proj, hidden)
        present = None if key_padding_mask is None else ~key_padding_mask
        if global_mask is None:
            attended = self._local(heads, present)[0]
        else:
            attended = self._with_global(hidden, heads, present, global_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _project(self, projection: nn.Linear, hidden: Tensor) -> Heads:
        packed = projection(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
        return query, key, value

    def _attend(self, heads: Heads, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        dropout = self.dropout if self.training else 0.0
        output, lse = functional.scaled_dot_product_attention(
            *heads, attn_mask=mask, dropout_p=dropout, return_lse=True, **options
        )
        return output, lse

    def _local(self, heads: Heads, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention within window and pattern over the keys that are ``present`` (B, T): output and log-sum-exp."""
        if max(self.dilations) == 1:
            return self._within(heads, present)
        # Positions of one remainder by the dilation meet each other only: each is a sequence of its own.
        parts: list[tuple[Tensor, Tensor]] = [None] * self.num_heads  # type: ignore[list-item]
        for dilation in sorted(set(self.dilations)):
            chosen = [head for head, own in enumerate(self.dilations) if own == dilation]
            results = self._dilated(tuple(tensor[:, chosen] for tensor in heads), present, dilation)
            for place, head in enumerate(chosen):
                parts[head] = (results[0][:, place], results[1][:, place])
        return torch.stack([part[0] for part in parts], 1), torch.stack([part[1] for part in parts], 1)

    def _within(self, heads: Heads, present: Tensor | None) -> tuple[Tensor, Tensor]:
        left, right = self._window()
        if self.is_causal:
            right = 0
        mask = None if present is None else present[:, None, None, :]
        return self._attend(heads, mask, window=(left, right), pattern=self.pattern)

    def _window(self) -> tuple[int, int]:
        if self.window is None:
            return -1, -1
        return (self.window, self.window) if isinstance(self.window, int) else self.window

    def _dilated(self, heads: Any, present: Tensor | None, dilation: int) -> tuple[Tensor, Tensor]:
        batch, _, length, _ = heads[0].shape
        padding = -length % dilation
        kept = torch.ones(batch, length, dtype=torch.bool, device=heads[0].device) if present is None else present

        def split(tensor: Tensor) -> Tensor:
            """(B, H, T, D) to (B * dilation, H, T / dilation, D)."""
            padded = nn.functional.pad(tensor, (0, 0, 0, padding))
            return padded.unflatten(2, (-1, dilation)).permute(0, 3, 1, 2, 4).flatten(0, 1)

        def join(tensor: Tensor) -> Tensor:
            parts = tensor.unflatten(0, (batch, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            return parts[:, :, :length]

        kept = nn.functional.pad(kept, (0, padding)).unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1)
        output, lse = self._within(tuple(split(tensor) for tensor in heads), kept)  # type: ignore[arg-type]
        return join(output), join(lse[..., None])[..., 0]

    def _with_global(self, hidden: Tensor, heads: Heads, present: Tensor | None, global_mask: Tensor) -> Tensor:
        query, key, value = heads
        is_present = torch.ones_like(global_mask) if present is None else present
        # As many places as the sequence with most global tokens has; (B, G), in order of their positions.
        most = int(global_mask.sum(1).max()) if global_mask.numel() > 0 else 0
        places = global_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        taken = global_mask.gather(1, places)
        local = self._local(heads, is_present & ~global_mask)
        mask = (taken & is_present.gather(1, places))[:, None, None, :]
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if self.is_causal:
            mask = mask & (places[:, None, None, :] <= positions[:, None])
        met = self._attend((query, _rows(key, places), _rows(value, places)), mask)
        attended = _joined(local, met)
        # Global tokens as queries meet everybody.
        wide = heads if self.global_in_proj is None else self._project(self.global_in_proj, hidden)
        mask = is_present[:, None, None, :]
        if self.is_causal:
            mask = mask & (positions <= places[:, None, :, None])
        from_global, _ = self._attend((_rows(wide[0], places), wide[1], wide[2]), mask)
        index = places[:, None, :, None].expand_as(from_global)
        unchanged = attended.gather(2, index)
        return attended.scatter(2, index, torch.where(taken[:, None, :, None], from_global, unchanged))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, window={self.window}, dilations={self.dilations}"


def _rows(tensor: Tensor, places: Tensor) -> Tensor:
    """Rows ``places`` (B, G) of (B, H, T, D)."""
    index = places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over the keys of two, from the output and log-sum-exp of each."""
    larger = torch.maximum(first[1], second[1]).detach()
    larger = torch.where(larger.isneginf(), 0.0, larger)
    weights = [torch.exp(lse - larger) for lse in (first[1], second[1])]
    total = weights[0] + weights[1]
    total = torch.where(total == 0.0, 1.0, total)
    shares = [(weight / total)[..., None].to(first[0].dtype) for weight in weights]
    return shares[0] * first[0] + shares[1] * second[0]
