"""A character transformer small enough for a CPU: what comes next in a window of text."""

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 64, 4, 2


class Transformer(nn.Module):
    """Two layers that look back; from letters `(batch, length)` to scores `(batch, letters, length)`."""

    def __init__(self, length: int, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(length, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.scores = nn.Linear(WIDTH, letters)
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, window: Tensor) -> Tensor:
        """Return what follows each letter, as scores."""
        seen = self.letters(window) + self.places
        scores: Tensor = self.scores(self.layers(seen, mask=self.ahead))
        return scores.transpose(1, 2)
