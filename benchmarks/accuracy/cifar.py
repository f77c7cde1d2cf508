"""CIFAR-10 and CIFAR-100, small and whole, from folders of JPEG files: what --data-dir holds.

    DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg, DIR/human_labels.csv       CIFAR-10, with the labels of CIFAR-10N
    DIR/cifar100/train/<class>/*.jpg, …                                         CIFAR-100, with those of CIFAR-100N

human_labels.csv has a column of paths, one that is called clean, and one for each label set.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from launch.data import CIFAR_MEAN, CIFAR_STD


@dataclass(frozen=True)
class Cifar:
    """What of a data set is taken.

    folder: in --data-dir. train, test: images per class, the first ones. side: to which they are averaged.
    superclasses: whether labels are CIFAR-100's twenty superclasses.
    """

    folder: str
    train: int
    test: int
    side: int
    superclasses: bool = False


CIFARS = {
    "small cifar10": Cifar("", 250, 100, 16),
    "small cifar100": Cifar("cifar100", 25, 20, 16, superclasses=True),
    "cifar100": Cifar("cifar100", 500, 100, 32),
    "tenth of cifar100": Cifar("cifar100", 50, 100, 32),
    "tiny cifar100": Cifar("cifar100", 2, 1, 32),  # for a rehearsal
}

# As CIFAR-100 has them, in its order: https://www.cs.toronto.edu/~kriz/cifar.html
SUPERCLASSES = (
    "beaver dolphin otter seal whale",
    "aquarium_fish flatfish ray shark trout",
    "orchid poppy rose sunflower tulip",
    "bottle bowl can cup plate",
    "apple mushroom orange pear sweet_pepper",
    "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe",
    "bee beetle butterfly caterpillar cockroach",
    "bear leopard lion tiger wolf",
    "bridge castle house road skyscraper",
    "cloud forest mountain plain sea",
    "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk",
    "crab lobster snail spider worm",
    "baby boy girl man woman",
    "crocodile dinosaur lizard snake turtle",
    "hamster mouse rabbit shrew squirrel",
    "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "bicycle bus motorcycle pickup_truck train",
    "lawn_mower rocket streetcar tank tractor",
)

Part = tuple[Tensor, Tensor]  # images (n, 3, side, side), labels (n,)


def read_cifar(data: str, folder: Path) -> tuple[Part, Part, int, dict[str, Tensor]]:
    """Return the training part, the test part, the number of classes, and other labels of the training part by name.

    Raises:
        ValueError: the folder does not hold it, or its clean labels are not those of the folders.
    """
    cifar = CIFARS[data]
    home = folder / cifar.folder
    table = home / "human_labels.csv"
    if not table.is_file():
        raise ValueError(f"--data-dir must hold {cifar.folder or 'train, test'} and human_labels.csv, found {folder}")
    kinds, tested = (sorted(kind.name for kind in (home / part).iterdir()) for part in ("train", "test"))
    if kinds != tested:
        raise ValueError(f"{home}/test must have the classes of train, differs by {sorted({*kinds} ^ {*tested})}")
    classes = torch.arange(len(kinds))
    if cifar.superclasses:
        above = {name: number for number, names in enumerate(SUPERCLASSES) for name in names.split()}
        classes = torch.tensor([above[kind] for kind in kinds])
    (images, labels), names = _first_of_each(home, "train", cifar.train, cifar.side)
    test, _ = _first_of_each(home, "test", cifar.test, cifar.side)
    human = {} if cifar.superclasses else _columns(table, names, labels)
    return (images, classes[labels]), (test[0], classes[test[1]]), len(classes.unique()), human


def _columns(table: Path, names: list[str], labels: Tensor) -> dict[str, Tensor]:
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    by_path = {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    columns = {column: torch.tensor([by_path[name][i] for name in names]) for i, column in enumerate(header[1:])}
    if not torch.equal(columns["clean"], labels):
        raise ValueError("human_labels.csv must have the folders' labels as its clean column, found others")
    return columns


def _first_of_each(home: Path, part: str, count: int, side: int) -> tuple[Part, list[str]]:
    from torchvision.io import decode_image

    images, names, labels = [], [], []
    for label, kind in enumerate(sorted((home / part).iterdir())):
        paths = sorted(kind.iterdir())[:count]
        if len(paths) < count:
            raise ValueError(f"{kind} must have at least {count} images, found {len(paths)}")
        for path in paths:
            image = decode_image(str(path)).float() / 255
            images.append(image if side == image.shape[-1] else functional.adaptive_avg_pool2d(image, side))
            names.append(path.relative_to(home).as_posix())
            labels.append(label)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return ((torch.stack(images) - mean) / std, torch.tensor(labels)), names
