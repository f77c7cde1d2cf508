"""Every rank's gradient of one model, `(W, N)`: a perceptron's all in one pass, others' rank by rank."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


def all_gradients(model: nn.Module, batches: list[Batch], temperature: float = 1.0) -> Tensor:
    """Return the flat gradients `(W, N)` of the mean loss of each rank's batch, in the parameters' order.

    Logits are divided by the temperature.
    """
    equal = len({len(labels) for _, labels in batches}) == 1
    if equal and isinstance(model, nn.Sequential) and all(isinstance(layer, _SIMPLE) for layer in model):
        return _at_once(model, batches, temperature)
    parameters = list(model.parameters())
    rows = []
    for images, labels in batches:
        gradients = torch.autograd.grad(cross_entropy(model(images) / temperature, labels), parameters)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def mean_distance(rows: Tensor) -> Tensor:
    """Return the mean cosine distance of two of the rows `(W, N)`, a scalar; NaN with one row."""
    unit = torch.nn.functional.normalize(rows)
    count = len(rows)
    return 1 - ((unit @ unit.T).sum() - count) / (count * (count - 1))


_SIMPLE = (nn.Flatten, nn.ReLU, nn.Linear)


def _at_once(model: nn.Sequential, batches: list[Batch], temperature: float) -> Tensor:
    """Give every rank its own view of the parameters, so that one backward keeps their gradients apart."""
    count = len(batches)
    own = [p.detach().expand(count, *p.shape).requires_grad_() for p in model.parameters()]
    left = iter(own)
    values = torch.stack([images for images, _ in batches])
    for layer in model:
        if isinstance(layer, nn.Flatten):
            values = values.flatten(2)
        elif isinstance(layer, nn.ReLU):
            values = values.relu()
        else:
            weight = next(left)
            bias = next(left) if layer.bias is not None else None
            values = values @ weight.mT if bias is None else torch.baddbmm(bias[:, None], values, weight.mT)
    labels = torch.cat([labels for _, labels in batches])
    loss = cross_entropy(values.flatten(0, 1) / temperature, labels, reduction="sum") / len(batches[0][1])
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, own)], dim=1)
