"""What each rank of a run learns from: its labels, the examples it may draw, the draws themselves."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy.declare import Labels, Run
from benchmarks.accuracy.images import Images, read_images
from launch.labels import add_label_noise, shift_labels

NOISE_SEED = 424_242  # apart from the validation part's, which must not be the noisy part
SHUFFLE_SEED = 171_717
REFERENCE_SEED = 535_353
VALIDATION = 0.15  # of the training data, held out for early stopping, with the labels training would see


@dataclass(frozen=True)
class Task:
    """One run's data. `labels[i]` and `draws[i]` belong to the i-th rank that takes part.

    labels: (n,) each, as that rank sees them. draws: (steps, batch) indices into images.
    references: what each rank reads of held-out data, () where it has none.
    few: bool (test examples,), of classes or registers that the fewest ranks see; all where everyone sees all.
    mislabelled: up to 1,000 training images whose label is wrong, and that label, as the rank with most of them has it.
    augments: the seed that training images are shifted and turned by, None where they are not.
    """

    images: Tensor
    labels: list[Tensor]
    draws: list[Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    few: Tensor
    classes: int
    references: tuple[tuple[Tensor, Tensor], ...] = ()
    mislabelled: tuple[Tensor, Tensor] | None = None
    augments: int | None = None

    def batch(self, member: int, step: int) -> tuple[Tensor, Tensor]:
        """Return images and labels that one member sees at one step."""
        chosen = self.draws[member][step]
        images = self.images[chosen]
        if self.augments is not None:
            seed = (self.augments * 1009 + member) * 1_000_003 + step
            images = augmented(images, torch.Generator().manual_seed(seed))
        return images, self.labels[member][chosen]


def build_task(run: Run, folder: Path | None) -> Task:
    """Return the data of a run, a pure function of its declaration and the folder's contents."""
    source = read_images(run.data, folder)
    order = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(run.seed))
    count = round(VALIDATION * len(order))
    held, kept = order[:count], order[count:]
    seen = {rank: _labels(source, run.labels, rank, run.seed) for rank in run.ranks}
    owners = torch.tensor(run.ranks)[torch.arange(len(held)) % len(run.ranks)]
    answers = torch.stack([seen[int(rank)][i] for rank, i in zip(owners, held, strict=True)])
    return Task(
        source.train,
        [seen[rank] for rank in run.ranks],
        [_draws(run, rank, kept, source.groups, seen[rank]) for rank in run.ranks],
        (source.train[held], answers),
        (source.test, source.test_labels),
        _seen_by_few(run.labels, source.test_groups),
        source.classes,
        _references(run, source, held, kept, seen),
        _mislabelled(source, kept, seen),
        run.seed if run.augment else None,
    )


def augmented(images: Tensor, random: torch.Generator, most: int = 4) -> Tensor:
    """Return images (n, channels, side, side), each shifted by up to so many pixels, half turned left to right."""
    count, _, _, side = images.shape
    padded = torch.nn.functional.pad(images, (most,) * 4)
    down, right = torch.randint(2 * most + 1, (2, count, 1), generator=random)
    turned = torch.rand(count, generator=random) < 0.5
    columns = torch.where(turned[:, None], torch.arange(side).flip(0), torch.arange(side)) + right
    rows = torch.arange(side) + down
    which = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _references(
    run: Run, source: Images, held: Tensor, kept: Tensor, seen: dict[int, Tensor]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return each rank's share of the held-out data that a run's rule is given, with right labels where not told."""
    told = run.rule.reference
    if told is None:
        return ()
    if told.training:
        groups = source.groups[kept]
        own = run.labels.classes if run.labels.kind == "own classes" else ()
        mine = [kept[torch.isin(groups, torch.tensor(own[r]))] if own else kept for r in run.ranks]
        parts = [chosen[place :: len(run.ranks)][:64] for place, chosen in enumerate(mine)]
        return tuple((source.train[c], seen[r][c]) for r, c in zip(run.ranks, parts, strict=True))
    labels = source.labels
    if told.wrong:
        labels = add_label_noise(labels, source.classes, told.wrong, REFERENCE_SEED + run.seed)
    chosen = held[~torch.isin(source.groups[held], torch.tensor(told.lacks))][: told.examples]
    world = len(run.ranks)
    parts = [chosen if told.same else chosen[place::world] for place in range(world)]
    return tuple((source.train[part], labels[part]) for part in parts)


def _mislabelled(source: Images, kept: Tensor, seen: dict[int, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return images `(n, …)` whose label is wrong, and that label `(n,)`; None where no label is wrong."""
    if source.labels.dim() > 1:  # text: a label for each letter
        return None
    wrong = {rank: kept[labels[kept] != source.labels[kept]][:1000] for rank, labels in seen.items()}
    rank = max(wrong, key=lambda rank: len(wrong[rank]))
    return (source.train[wrong[rank]], seen[rank][wrong[rank]]) if len(wrong[rank]) else None


def _labels(source: Images, wrong: Labels, rank: int, seed: int) -> Tensor:
    """Return all training labels as this rank sees them."""
    if wrong.kind in ("clean", "own classes") or (wrong.ranks and rank not in wrong.ranks):
        return source.labels
    if wrong.kind == "shift":
        return shift_labels(source.labels, source.classes)
    if wrong.kind == "shuffled":
        order = torch.randperm(source.labels.numel(), generator=torch.Generator().manual_seed(SHUFFLE_SEED + seed))
        return source.labels.flatten()[order].view_as(source.labels)
    if wrong.kind == "uniform":
        return add_label_noise(source.labels, source.classes, wrong.share, NOISE_SEED + seed)
    if wrong.column not in source.human:
        raise ValueError(f"--data-dir must hold human labels {wrong.column!r}, found {sorted(source.human)}")
    return source.human[wrong.column]


def _draws(run: Run, rank: int, kept: Tensor, groups: Tensor, labels: Tensor) -> Tensor:
    """Return indices (steps, batch), drawn with replacement from what this rank may see."""
    if run.labels.kind == "own classes":
        kept = kept[torch.isin(groups[kept], torch.tensor(run.labels.classes[rank]))]
    random = torch.Generator().manual_seed(1_000_003 * run.seed + rank)
    seen = labels[kept]
    parts = [kept[seen == label] for label in seen.unique()] if run.balanced else [kept]
    if run.batch % len(parts):
        raise ValueError(f"batch of a balanced run must be a multiple of its {len(parts)} classes, found {run.batch}")
    size = (run.steps, run.batch // len(parts))
    return torch.cat([part[torch.randint(len(part), size, generator=random)] for part in parts], 1)


def _seen_by_few(wrong: Labels, groups: Tensor) -> Tensor:
    if wrong.kind != "own classes":
        return torch.ones_like(groups, dtype=torch.bool)
    seen = [sum(group in classes for classes in wrong.classes) for group in range(int(groups.max()) + 1)]
    return torch.isin(groups, torch.tensor([group for group, n in enumerate(seen) if n == min(seen)]))
