"""The cosines between the ranks' gradients as a picture for TensorBoard: −1 orange, 0 white, 1 blue."""

from typing import Any

import torch
from torch import Tensor

Cosines = list[list[float | None]]
_CELL = 24  # pixels of a pair of ranks without labels
_DPI = 100
_ALL_NAMED = 16  # ranks; of more every second, fourth … one is named
_ALL_TOLD = 8  # ranks up to which each pair's number is written into its cell


def picture(cosine: Cosines) -> Tensor:
    """Return cosines `(W, W)` as a picture `(3, h, w)` in [0, 1]; with labels where matplotlib is installed."""
    try:
        return labelled(cosine)
    except ImportError:
        return plain(cosine)


def plain(cosine: Cosines) -> Tensor:
    """Return a square of one colour for each pair; what is unknown is white."""
    values = torch.tensor([[value or 0.0 for value in row] for row in cosine])
    blue, orange = torch.tensor([0.0, 0.447, 0.698]), torch.tensor([0.835, 0.369, 0.0])
    towards = torch.where(values[..., None] > 0, blue, orange)
    colours = 1 - values.abs().clamp(max=1)[..., None] * (1 - towards)
    return colours.permute(2, 0, 1).repeat_interleave(_CELL, 1).repeat_interleave(_CELL, 2)


def labelled(cosine: Cosines) -> Tensor:
    """Return the same with the ranks beside it, and a legend; what is unknown is grey. ImportError: no matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(max(4.0, 0.45 * len(cosine)), 8.0)  # inches
    figure = Figure(figsize=(side + 1, side), dpi=_DPI, layout="constrained")
    _draw(figure.add_subplot(), cosine)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)
    return pixels[..., :3].permute(2, 0, 1) / 255


def _draw(axis: Any, cosine: Cosines) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ranks = range(len(cosine))
    colours = LinearSegmentedColormap.from_list("cosine", ["#D55E00", "#ffffff", "#0072B2"])
    values = [[float("nan") if value is None else value for value in row] for row in cosine]
    image = axis.imshow(values, cmap=colours.with_extremes(bad="#bbbbbb"), vmin=-1, vmax=1)
    named = [rank for rank in ranks if rank % _stride(len(ranks)) == 0]
    axis.set_xticks(named, map(str, named))
    axis.set_yticks(named, map(str, named))
    axis.set(xlabel="rank", ylabel="rank", title="Cosine of two ranks' gradients")
    bar = axis.figure.colorbar(image, ax=axis, ticks=[-1, 0, 1], shrink=0.8)
    bar.ax.set_yticklabels(["-1 opposed", "0", "1 alike"])
    for row, column in [(row, column) for row in ranks for column in ranks if len(ranks) <= _ALL_TOLD]:
        value = values[row][column]
        text, ink = "?" if value != value else f"{value:.2f}", "white" if abs(value) > 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", color=ink)


def _stride(ranks: int) -> int:
    """Return the distance between ranks that are named: 1, 2, 4 and so on."""
    stride = 1
    while ranks > stride * _ALL_NAMED:
        stride *= 2
    return stride
