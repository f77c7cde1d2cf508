"""launch.train with a rank 1 that is killed the first time; for torchrun to start again."""

import os
import signal
import sys

from torch import Tensor

import launch.train
from launch.trainer import Trainer

# The method, and the call of backward in it that does not end.
DEATH = ("gaf", 7)


class _Dying(Trainer):
    _backwards = 0

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        self._backwards += 1
        first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_start and self.here.rank == 1 and (self.method, self._backwards) == DEATH:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._backward(images, labels)


if __name__ == "__main__":
    launch.train.Trainer = _Dying  # type: ignore[attr-defined]
    sys.exit(launch.train.main())
