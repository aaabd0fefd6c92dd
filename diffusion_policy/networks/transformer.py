"""A diffusion transformer over the steps of a sequence: DiT blocks with adaLN-Zero (Peebles & Xie 2023, arXiv
2212.09748, section 3.2).

A token is a step of the noised sequence; all see all. Each sublayer f of a block changes a token x to

    x + gate · f((1 + scale) · LN(x) + shift),

where scale, shift and gate are linear in the embedded noise level and the condition. They start at zero, so that a new
network passes every token on as it is and predicts zeros.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.networks.blocks import Films, LevelEmbedding
from diffusion_policy.networks.encoders import CondPart


class TemporalTransformer(nn.Module):
    """(xt (B, T, D), level (B,), cond (B, C)) → (B, T, outputs). It promises what `diffusion.process.Network` says."""

    def __init__(
        self,
        target_dim: int,
        cond_parts: Sequence[CondPart],
        steps: int,
        *,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        conditioning: str = "adaln",
        level_dim: int = 128,
        outputs: int | None = None,
        level_inputs: int = 1,
    ) -> None:
        """`target_dim`: D, numbers of a step of the sequence; `cond_parts`: what stands side by side in a condition;
        `steps`: T; `width`: numbers of a token, a multiple of `heads`; `outputs`: numbers predicted for each step, by
        default D; `level_inputs`: numbers that say a level, (B, level_inputs) where there are several. `conditioning`:
        `adaln`, where the condition stands beside the noise level in scale, shift and gate; or `cross-attention`, where
        each of its rows is a token that every block attends to (as in PixArt-α, Chen et al. 2023, arXiv 2310.00426,
        section 2.3, but with a gate)."""
        super().__init__()
        self.steps = steps
        self.embed_level = LevelEmbedding(level_dim, level_inputs)
        self.embed = nn.Linear(target_dim, width)
        self.positions = _learned_rows(steps, width)
        crosses = conditioning == "cross-attention"
        self.observe = CondTokens(cond_parts, width) if crosses else None
        vectors = level_dim, 0 if crosses else sum(part.rows * part.numbers for part in cond_parts), width
        self.blocks = nn.ModuleList(
            DiTBlock(Modulation(*vectors, 9 if crosses else 6), width, heads, mlp_ratio, dropout, crosses=crosses)
            for _ in range(layers)
        )
        self.modulation = Modulation(*vectors, 2)
        self.out = nn.Linear(width, outputs or target_dim)
        for block in self.blocks:
            block.apply(_initialize)  # pyright: ignore[reportAttributeAccessIssue]
        for last in (self.out, *(one.linear for one in self.modules() if isinstance(one, Modulation))):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        """Raises ValueError for sequences that have not T steps."""
        return self.denoise(xt, self.condition(level, cond).at(...))

    def condition(self, level: Tensor, cond: Tensor) -> Films:
        """Levels (L,) and conditions (B, C) → scale, shift and gate of each block's sublayers; behind those of a block
        the keys and values that it attends to; at the end scale and shift of the output."""
        embedded = functional.silu(self.embed_level(level))  # (L, level_dim)
        tokens = None if self.observe is None else functional.silu(self.observe(cond))  # (B, M, width)
        cond = functional.silu(cond)
        parts = [part for block in self.blocks for part in block.condition(embedded, cond, tokens)]  # pyright: ignore
        parts.append(self.modulation(embedded, cond))
        return Films(tuple(one for one, _ in parts), tuple(other for _, other in parts))

    def denoise(self, xt: Tensor, films: Sequence[Tensor]) -> Tensor:
        """Sequences (B, T, D) under `films.at` their levels, (B, features) a layer → (B, T, outputs). Raises ValueError
        for sequences that have not T steps."""
        if xt.shape[1] != self.steps:
            raise ValueError(f"this network is for sequences of {self.steps} steps; got {xt.shape[1]}")
        each = 1 if self.observe is None else 2  # films of a block
        x = self.embed(xt) + self.positions  # (B, T, width)
        for i, block in enumerate(self.blocks):
            x = block(x, *films[each * i : each * (i + 1)])
        shift, scale = films[-1].unsqueeze(1).chunk(2, dim=-1)
        return self.out(modulate(x, shift, scale))

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Those without weight decay: biases, and learned positions; the norms have no parameters."""
        positions = [self.positions] if self.observe is None else [self.positions, self.observe.positions]
        return [weight for weight in self.parameters() if weight.ndim == 1] + positions


class Modulation(nn.Module):
    """Vectors, side by side, that are linear in the embedded level and, but where `cond_dim` is 0, in the condition."""

    def __init__(self, level_dim: int, cond_dim: int, width: int, vectors: int) -> None:
        super().__init__()
        self.linear = nn.Linear(level_dim + cond_dim, vectors * width)
        self._sizes = [level_dim, cond_dim]

    def forward(self, level: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """The parts that embedded levels (L, level_dim) and conditions (B, C) give, both after SiLU,
        (L, vectors · width) and (B, vectors · width): Linear([a; b]) = A a + B b + c, so each is computed once."""
        of_level, of_cond = self.linear.weight.split(self._sizes, dim=1)
        if self._sizes[1] == 0:
            return functional.linear(level, of_level), self.linear.bias.expand(len(cond), -1)
        return functional.linear(level, of_level), functional.linear(cond, of_cond, self.linear.bias)


class DiTBlock(nn.Module):
    """Self-attention, attention to other tokens where the block `crosses`, and an MLP, each scaled, shifted and gated:
    (B, T, width) → (B, T, width)."""

    def __init__(
        self, modulation: Modulation, width: int, heads: int, mlp_ratio: int, dropout: float, *, crosses: bool
    ) -> None:
        super().__init__()
        self.modulation = modulation
        self.attention = SelfAttention(width, heads, dropout)
        self.cross_attention = CrossAttention(width, heads, dropout) if crosses else None
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def condition(self, level: Tensor, cond: Tensor, tokens: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """What does not depend on the sequence, as parts of levels and of conditions: the vectors of the modulation,
        and where the block crosses, keys and values of the tokens (B, M, width), of which levels say nothing."""
        vectors = self.modulation(level, cond)
        if self.cross_attention is None or tokens is None:
            return [vectors]
        keys_values = self.cross_attention.keys_values(tokens).flatten(1)  # (B, M · 2 width)
        return [vectors, (keys_values.new_zeros(1).expand(len(level), keys_values.shape[1]), keys_values)]

    def forward(self, x: Tensor, vectors: Tensor, keys_values: Tensor | None = None) -> Tensor:
        """x: (B, T, width), vectors: (B, 6 width), or (B, 9 width) with keys and values (B, M · 2 width) → like x."""
        sublayers: list[Callable[[Tensor], Tensor]] = [self.attention, self.mlp]
        if self.cross_attention is not None:
            sublayers.insert(1, partial(self.cross_attention, keys_values=keys_values))
        vectors = rearrange(
            vectors, "b (sublayers three width) -> sublayers three b 1 width", three=3, width=x.shape[-1]
        )
        for sublayer, (shift, scale, gate) in zip(sublayers, vectors, strict=True):
            x = x + gate * self.dropout(sublayer(modulate(x, shift, scale)))
        return x


class SelfAttention(nn.Module):
    """Each step attends to all steps, before and behind it: (B, T, width) → (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(
            self.queries_keys_values(x), "b t (three h d) -> three b h t d", three=3, h=self.heads
        )
        return self.out(attend(query, key, value, self.dropout if self.training else 0.0))


class CrossAttention(nn.Module):
    """Each step attends to other tokens: (B, T, width) → (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.queries = nn.Linear(width, width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """`keys_values`: what the layer of this name makes of the tokens, (B, M · 2 width)."""
        query = rearrange(self.queries(x), "b t (h d) -> b h t d", h=self.heads)
        key, value = rearrange(keys_values, "b (m two h d) -> two b h m d", two=2, h=self.heads, d=query.shape[-1])
        return self.out(attend(query, key, value, self.dropout if self.training else 0.0))


class CondTokens(nn.Module):
    """A token for each row of a condition, such as a key at one step: (B, C) → (B, M, width). Rows of one part share a
    layer; a learned position tells them apart."""

    def __init__(self, parts: Sequence[CondPart], width: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.embed = nn.ModuleList(nn.Linear(part.numbers, width, bias=False) for part in parts)
        self.positions = _learned_rows(sum(part.rows for part in parts), width)

    def forward(self, cond: Tensor) -> Tensor:
        rows = [
            embed(numbers.unflatten(1, tuple(part)))
            for embed, part, numbers in zip(
                self.embed, self.parts, cond.split([math.prod(part) for part in self.parts], dim=1), strict=True
            )
        ]
        return torch.cat(rows, dim=1) + self.positions


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LN(x) + shift, where LN has no weights: (B, T, width)."""
    return (1 + scale) * functional.layer_norm(x, x.shape[-1:]) + shift


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1): (B, heads, T, d) and twice
    (B, heads, M, d) → (B, T, heads · d)."""
    found = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return rearrange(found, "b h t d -> b t (h d)")


def _learned_rows(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(rows, width), std=0.02))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
