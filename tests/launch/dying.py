"""launch.train with a rank that is killed at each of the first five starts; for torchrun to start again."""

import os
import signal
import sys

from torch import Tensor

import launch.train
from launch.trainer import Trainer

# Of each start: the rank, the method, and the call of backward in it that does not end.
DEATHS = [(1, "gaf", 7), (0, "gaf", 3), (1, "gaf", 6), (1, "paper", 2), (0, "paper", 12)]


class _Dying(Trainer):
    _backwards = 0

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        self._backwards += 1
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if (self.here.rank, self.method, self._backwards) in DEATHS[start : start + 1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._backward(images, labels)


if __name__ == "__main__":
    launch.train.Trainer = _Dying  # type: ignore[attr-defined]
    sys.exit(launch.train.main())
