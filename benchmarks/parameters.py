"""filter_parameters' folding: parameter by parameter, as hooks see them, against one pass over all of them.

    python -m benchmarks.parameters --models resnet18 resnet50 vit_b_16

`one by one` folds each parameter's gradient as its hook does. `one pass` copies all into one vector first, and folds
that; `fold alone` has the vector already. `share` is one by one over a forward and backward of --batch-size images.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.command_line import described, positive
from benchmarks.cost import SKETCH_SIZE
from benchmarks.measure import banner, hardware, interleaved, say
from gaf_ddp.kernels.fold import Span, fold, fold_into, whole


def ways(gradients: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return the ways to fold them."""
    device, places, place = gradients[0].device, [], 0
    for each in gradients:
        places.append((Span(0, place, each.numel()),))
        place += each.numel()
    sketch, square = torch.zeros(SKETCH_SIZE, device=device), torch.zeros((), dtype=torch.float64, device=device)

    def one_by_one() -> None:
        for each, spans in zip(gradients, places, strict=True):
            fold_into(each.view(-1), spans, sketch, square)

    flat, spans = torch.cat([each.view(-1) for each in gradients]), whole(place)
    return {
        "one by one": one_by_one,
        "one pass": lambda: fold(torch.cat([each.view(-1) for each in gradients]), spans, SKETCH_SIZE),
        "fold alone": lambda: fold(flat, spans, SKETCH_SIZE),
    }


def row(name: str, batch: int, repeats: int, device: torch.device) -> str:
    """Return a model's line of the table."""
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)().to(device)
    side = 224 if name.startswith("vit") else 64
    images = torch.randn(batch, 3, side, side, device=device)
    gradients = [torch.randn_like(each) for each in model.parameters()]

    def step() -> None:
        model(images).square().mean().backward()

    times = interleaved({**ways(gradients), "step": step}, repeats, device)
    found = {way: 1e3 * median(seconds) for way, seconds in times.items()}
    numbers = sum(each.numel() for each in gradients)
    cells = [f"{found[way]:.1f}" for way in ("one by one", "one pass", "fold alone")]
    share = f"{100 * found['one by one'] / found['step']:.1f} %"
    return f"| {name} | {len(gradients)} | {numbers / 1e6:.1f} | " + " | ".join(cells) + f" | {share} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = described(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vit_b_16"], help="of torchvision")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--repeats", "-n", type=positive, default=7)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    say(banner(hardware(device)))
    say("| | parameters | million numbers | one by one, ms | one pass, ms | fold alone, ms | share |")
    say("|---|--:|--:|--:|--:|--:|--:|")
    for name in given.models:
        say(row(name, given.batch_size, given.repeats, device))


if __name__ == "__main__":
    main()
