"""FilteredGroup for torchft's Manager, whose replicas die and come back; `torchft-nightly` must be installed."""

import gc
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torchft import ProcessGroupGloo
from torchft.work import _DummyWork

from gaf_ddp.average import filter_average
from gaf_ddp.engines.parameters import filter_parameters
from gaf_ddp.settings import require
from gaf_ddp.state import GAFState


class FilteredGroup(ProcessGroupGloo):  # type: ignore[misc]
    """Let torchft average the gradients of the replicas that agree; on CPUs, one process a replica.

        group = FilteredGroup(network.parameters(), timeout=timedelta(seconds=10))
        manager = Manager(pg=group, use_async_quorum=False, …)
        …
        optimizer.zero_grad()
        loss = …
        try:
            loss.backward()
            group.state.advance()
        except RuntimeError as error:
            manager.report_error(error)
        optimizer.step()

    The replicas of each new quorum vote in torch's default group, which is made for it and ended after it, and begin
    with a new state: who is where has changed. A replica that is lost fails the step, as torchft has it.

    Args:
        parameters: that torchft averages gradients of, as `filter_parameters` has them. None: what the manager
            averages is itself averaged by `filter_average`, as DiLoCo's moves; each time one tensor of the same size
            (`use_bucketization=True`).
        timeout: who is silent for longer is lost.
        **settings: of each quorum's state, see `GAFState`.

    Attributes:
        state: of the quorum that is.

    Raises:
        ValueError: a setting is out of its range, or there is a default group already.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | None = None,
        timeout: timedelta = timedelta(seconds=60),
        **settings: Any,
    ) -> None:
        rule = "the default group is made for each quorum: call no init_process_group"
        require(not dist.is_initialized(), rule, "one that is there")
        super().__init__(timeout)
        self.state = GAFState(**settings)
        self._parameters = None if parameters is None else list(parameters)
        self._wait, self._settings = timeout, settings
        self._undo = _nothing

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        """Add up, as the manager divides by how many replicas there are."""
        if self._parameters is not None:
            return super().allreduce(tensors, opts)
        filter_average(tensors, self.state)
        for each in tensors:
            each *= self.size()
        return _DummyWork(tensors)

    def shutdown(self) -> None:
        """End the default group, too."""
        self._end()
        super().shutdown()

    def _create_pg(self, store: Store, rank: int, world_size: int) -> Any:
        """Begin a quorum; torchft takes what is raised here for a step that failed."""
        self._end()
        ours = PrefixStore("gaf", store)
        dist.init_process_group("gloo", store=ours, rank=rank, world_size=world_size, timeout=self._wait)
        if self._parameters is not None:
            self._undo = filter_parameters(self._parameters, self.state)
        return super()._create_pg(store, rank, world_size)

    def _end(self) -> None:
        """End a quorum's vote, and hang up: who waits for this replica learns from it that it need not."""
        with suppress(RuntimeError):  # who died owes a ballot
            self._undo()
        self._undo, self.state = _nothing, GAFState(**self._settings)
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # gloo hangs up as the last reference to the group goes, and not before


def _nothing() -> None:
    """Nothing is to be undone."""
