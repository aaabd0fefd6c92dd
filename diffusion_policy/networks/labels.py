"""What a label of an episode, its mode or its instruction, is to a network: the row of numbers that stands in the
condition.

A label that is known by its index alone is a one-hot row, of which the network's first layer makes a learned embedding.
Where instructions have embeddings (what an encoder made of their texts), the row is where the instruction lies among
those that the policy was trained on: the embedding less their mean, in the directions in which they differ, in numbers
of about one. So a text that is new has a place among them, and what else its embedding says is left out.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

FLAT = 1e-4
"""Of the widest direction: embeddings that differ by less in a direction do not differ there."""


class LabelRows(nn.Module):
    """Index of a label → its row, (B,) → (B, numbers)."""

    def __init__(self, count: int, size: int = 0) -> None:
        """`size`: of the embeddings; 0 where the labels have none."""
        super().__init__()
        self.size = size
        self.numbers = min(count - 1, size) if size else count
        """Of a row."""
        if size:
            self.register_buffer("rows", torch.zeros(count, self.numbers))
            self.register_buffer("mean", torch.zeros(size))
            self.register_buffer("directions", torch.zeros(size, self.numbers))

    def fit(self, embeddings: np.ndarray) -> None:
        """Take the embeddings of all labels, (labels, size). Raises ValueError where they do not tell two apart."""
        exact = embeddings.astype(np.float64)
        if len(np.unique(exact, axis=0)) < len(exact):
            raise ValueError("two instructions have the same embedding, so no policy could tell them apart")
        mean = exact.mean(axis=0)
        _, wide, directions = np.linalg.svd(exact - mean, full_matrices=False)
        wide, directions = wide[: self.numbers], directions[: self.numbers].T
        scale = np.sqrt(np.square(wide).sum() / (len(exact) * self.numbers))  # root mean square of a number
        directions = directions * (wide > FLAT * wide[0]) / scale
        rows = (exact - mean) @ directions
        for name, numbers in (("rows", rows), ("mean", mean), ("directions", directions)):
            self.get_buffer(name).copy_(torch.from_numpy(numbers))

    def with_label(self, embedding: np.ndarray) -> "LabelRows":
        """These, and one more label. Raises ValueError for an embedding of another size."""
        if embedding.shape != (self.size,):
            raise ValueError(f"the policy knows embeddings of {self.size} numbers; got shape {embedding.shape}")
        known = self.get_buffer("rows")
        mean, directions = (self.get_buffer(name).cpu().double().numpy() for name in ("mean", "directions"))
        row = torch.from_numpy((embedding.astype(np.float64) - mean) @ directions).to(known)
        other = copy.copy(self)
        other._buffers = {**self._buffers, "rows": torch.cat([known, row[None]])}
        return other

    def forward(self, labels: Tensor) -> Tensor:
        """Rows of labels (B,) int64; zeros where one is −1."""
        if not self.size:
            return labels[:, None] == torch.arange(self.numbers, device=labels.device)
        return self.get_buffer("rows")[labels.clamp(min=0)] * (labels >= 0)[:, None]
