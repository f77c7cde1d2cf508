"""Stage 6: the paper's set-up, micro-batches in one process: averaging, the filter, and as many random skips."""

import math
import time
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from benchmarks.accuracy.images import Images, read_images
from benchmarks.on_gpu.job import Job
from benchmarks.on_gpu.rows import Row
from gaf_ddp import MicrobatchFilter
from launch.models import build_model

TAU, BATCH, LR, WEIGHT_DECAY = 0.97, 100, 0.1, 5e-4  # BATCH: images of a micro-batch, the paper's tau
LABELS = {"right labels": "clean", "human labels": "fine"}  # and the column of human_labels.csv
_TRIAL, _MOST_EPOCHS = 10, 200
_SPARE = 0.85  # of the time that is left: epochs may take longer than the trial said


@dataclass(frozen=True)
class Scale:
    """What a run is made of, and a rehearsal."""

    data: str
    model: str
    batch: int


FULL, REHEARSED = Scale("cifar100", "resnet18", BATCH), Scale("tiny cifar100", "conv", 10)


@dataclass(frozen=True)
class Part:
    """Images `(n, 3, 32, 32)` and labels on the device."""

    images: Tensor
    labels: Tensor


class Arm:
    """One network that learns, from its own labels and by its own way.

    micro: micro-batches of a step. filtered: whether `MicrobatchFilter` averages them.
    like: the arm that skips as large a share of the steps, for a control that draws which.
    """

    def __init__(
        self, train: Part, classes: int, scale: Scale, micro: int, filtered: bool, like: "Arm | None" = None
    ) -> None:
        torch.manual_seed(0)
        network = build_model(scale.model, (3, 32, 32), classes).to(train.images.device)
        self.model = network.to(memory_format=torch.channels_last)
        self.train, self.micro, self.batch = train, micro, scale.batch
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        self.filter = MicrobatchFilter(self.model.parameters(), TAU) if filtered else None
        self.like, self._random = like, torch.Generator().manual_seed(1)
        self.steps = self.skipped = 0

    @property
    def share(self) -> float:
        """The share of steps skipped so far."""
        return self.skipped / max(self.steps, 1)

    @property
    def steps_of_an_epoch(self) -> int:
        """How many steps all images make."""
        return len(self.train.labels) // (self.micro * self.batch)

    def epoch(self, number: int, epochs: int, most: int | None = None) -> None:
        """Train one of so many epochs, at most so many steps of it; of the same number all arms draw alike."""
        random = torch.Generator().manual_seed(number)
        order = torch.randperm(len(self.train.labels), generator=random).to(self.train.labels.device)
        torch.manual_seed(number)  # for how images are shifted
        steps = self.steps_of_an_epoch
        for place, chosen in enumerate(order[: steps * self.micro * self.batch].split(self.micro * self.batch)[:most]):
            self.optimizer.param_groups[0]["lr"] = LR * schedule((number + place / steps) / epochs)
            self._step(chosen)

    def _step(self, chosen: Tensor) -> None:
        for each in chosen.split(self.batch):
            loss = self._loss(shifted(self.train.images[each]), self.train.labels[each])
            if self.filter is None:
                (loss / self.micro).backward()
            else:
                loss.backward()
                self.filter.accumulate()
        agreed = self._agrees()
        if agreed:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.skipped += not agreed

    def _agrees(self) -> bool:
        """Return whether a step is taken."""
        if self.like is not None:
            return float(torch.rand((), generator=self._random)) >= self.like.share
        return self.filter is None or self.filter.finish()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            scores = self.model(images)
        return cross_entropy(scores.float(), labels)

    @torch.no_grad()
    def accuracy(self, test: Part) -> float:
        """Return the share of test images that are told right, in %."""
        self.model.eval()
        with torch.autocast(test.images.device.type, torch.bfloat16):
            answers = torch.cat([self.model(chunk).argmax(1) for chunk in test.images.split(1000)])
        self.model.train()
        return 100 * float((answers == test.labels).float().mean())


def schedule(done: float) -> float:
    """Return the share of the learning rate: up over the first tenth of the training, then down a half cosine."""
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def shifted(images: Tensor) -> Tensor:
    """Return images moved by up to four pixels, and mirrored or not, each its own way."""
    count, device = len(images), images.device
    moves = torch.randint(9, (2, count, 1), device=device)
    places = torch.arange(32, device=device)
    rows, columns = moves[0] + places, moves[1] + places
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1))
    which = torch.arange(count, device=device)[:, None, None]
    moved = pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)  # as channels_last has them in memory


def run(job: Job) -> None:
    """Train all arms epoch by epoch in turn, for as many epochs as the time allows."""
    scale = REHEARSED if job.rehearse else FULL
    torch.backends.cudnn.benchmark = True
    begun = time.monotonic()
    images = read_images(scale.data, job.data_dir)
    arms, test = arms_of(images, scale, job)
    job.rows.note(f"{len(images.labels)} training images, read in {time.monotonic() - begun:.0f} s.")
    epochs = 1 if job.rehearse else planned(images, scale, job, test)
    job.rows.note(
        f"Micro-batches of {scale.batch} images, tau {TAU}, SGD, learning rate {LR}, epochs: {epochs}, one seed. "
        "Beside an accuracy: the share of steps that were left out, by the filter or at random."
    )
    took = 0.0 if epochs else math.inf
    for number in range(max(epochs, 1)):
        if job.left() < took:
            job.rows.note(f"Time was up after {number} of {epochs} epochs.")
            return
        begun = time.monotonic()
        job.rows.add({"epoch": number + 1, **one_epoch(arms, number, epochs, test)})
        took = time.monotonic() - begun


def arms_of(images: Images, scale: Scale, job: Job) -> tuple[dict[str, Arm], Part]:
    """Return all arms by name, and the test images."""
    device = job.device
    train, test = (each.to(device, memory_format=torch.channels_last) for each in (images.train, images.test))
    parts = {name: Part(train, images.human[column].to(device)) for name, column in LABELS.items()}
    arms: dict[str, Arm] = {}
    for micro, name in product(job.micro_batches, LABELS):
        given = parts[name], images.classes, scale, micro
        found = {"averaged": Arm(*given, filtered=False), "filtered": Arm(*given, filtered=True)}
        found["skipped at random"] = Arm(*given, filtered=False, like=found["filtered"])
        arms |= {f"{name}, {micro} {way}": arm for way, arm in found.items()}
    return arms, Part(test, images.test_labels.to(device))


def planned(images: Images, scale: Scale, job: Job, test: Part) -> int:
    """Return how many epochs of all arms the time allows, by a few steps of other arms."""
    seconds = 0.0
    for arm in arms_of(images, scale, job)[0].values():
        arm.epoch(0, 1, most=_TRIAL)
        arm.accuracy(test)  # waits for the device
        begun = time.monotonic()
        arm.epoch(0, 1, most=_TRIAL)
        next(arm.model.parameters()).detach().sum().item()  # waits too
        middle = time.monotonic()
        arm.accuracy(test)
        seconds += (middle - begun) / _TRIAL * arm.steps_of_an_epoch + time.monotonic() - middle
    return min(int(_SPARE * job.left() / seconds), _MOST_EPOCHS)


def one_epoch(arms: dict[str, Arm], number: int, epochs: int, test: Part) -> Row:
    """Train every arm for an epoch; return the columns."""
    row: Row = {}
    for name, arm in arms.items():
        begun = time.monotonic()
        arm.epoch(number, epochs)
        skipped = f" (skipped {arm.share:.0%})" if arm.skipped else ""
        row[name] = f"{arm.accuracy(test):.2f}{skipped}"
        row[f"{name}: s"] = time.monotonic() - begun
    return row
