"""gaf_hook: Gradient Agreement Filtering as a DDP communication hook (arXiv 2412.18052).

rows    = exchange.scatter(bucket)         (W, n)  this rank's slice of every rank's gradient
gramian = exchange.sum(gram(rows))         (W, W)  all inner products between the ranks' gradients
verdict = Verdict(gramian)                 (W,)    which ranks agree, and how much each counts
bucket  = exchange.gather(rows, verdict)   (N,)    the filtered average, the same on every rank

With `vote_momentum` the Gramian is that of the rows' momenta; the rest is the same.
"""  # DDP checks the hook's annotations: no `from __future__ import annotations` here.

import warnings
from functools import partial

import torch
import torch.distributed as dist

from gaf_ddp.gramian import gram
from gaf_ddp.momenta import judged
from gaf_ddp.state import GAFState, Share
from gaf_ddp.verdict import Verdict


def gaf_hook(
    state: GAFState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Replace a bucket's all-reduce by the average of the gradients that agree.

        model.register_comm_hook(GAFState(tau=0.97), gaf_hook)

    With the sharded exchange it sends an all-reduce's bytes, per rank `2 (W − 1)/W N` elements, and all-reduces
    at most `W²` floats; on the CPU, up to 16 ranks, `(W − 1) W²` of them in one hop. On CPU groups a thread works
    beside backward; on accelerators everything is enqueued on a side stream and the host waits for nothing. The
    first bucket also compares the ranks' settings.

    Args:
        state: settings and statistics; one state per DDP model.
        bucket: DDP's flat gradients `(N,)` of this rank, overwritten with the result.

    Returns:
        A future of the bucket's buffer. What a rank raises on the way comes out of its `backward()`.

    Raises:
        TypeError: state is no GAFState, bucket is no GradBucket, or holds a sparse gradient.
        ValueError: there is no process group, the ranks' settings differ, the model is on several devices, or
            tau's schedule or the weighting returned something invalid.
    """
    if not isinstance(state, GAFState):
        raise TypeError(f"state must be a GAFState, found {state!r}; register_comm_hook(GAFState(), gaf_hook)")
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(
            f"bucket must be a torch.distributed.GradBucket, found {type(bucket).__name__}; "
            "torch.compile's optimize_ddp='python_reducer' passes none: "
            "set torch._dynamo.config.optimize_ddp to True or False"
        )
    buffer = bucket.buffer()
    if buffer.is_sparse:
        raise TypeError("gradients must be dense, found a sparse one, as nn.Embedding(sparse=True) makes")
    lane, exchange = state.connect(buffer)
    if lane.group.size() == 1 and state.step == 0 and bucket.index() == 0:
        warnings.warn("gaf_ddp: world size 1, there are no other gradients to filter against", stacklevel=2)
    promise = lane.promise()
    first, last = bucket.index() == 0, bucket.is_last()
    share = Share(buffer, bucket.parameters(), first, last, promise, exchange, exchange.scatter(buffer))
    # DDP copies one bucket's result into the gradients while others' are on their way; not so in the first step:
    # ranks that fail there must not enter the next forward, where DDP broadcasts new buckets.
    first_step = state.step == 0
    lane.run(partial(_filter, state, share))
    if last:
        lane.run(partial(_land, state), awaited=first_step)
    return lane.result(promise)


def _filter(state: GAFState, share: Share) -> None:
    """Receive one bucket's rows; once a decision is due, take it for every bucket that waits for it."""
    if share.is_first:  # a backward that broke off may have left some on their way
        _land(state)
    rows = share.arrive()
    gramian = gram(rows) if state.momenta is None else state.momenta.measure(share.key, rows)
    waiting = state.wait(share, rows, gramian)
    if not waiting:
        return
    gramian = share.exchange.sum(_total([gramian for _, _, gramian in waiting]))
    gramian = gramian if state.momenta is None else judged(gramian)
    verdict = Verdict(gramian, state.weighting_now(), state.max_norm_ratio)
    for share, rows, _ in waiting:
        state.send(share, share.exchange.gather(rows, verdict, share.buffer))
    state.record(verdict.agreement, [share for share, _, _ in waiting])


def _land(state: GAFState) -> None:
    """Wait for every average that is on its way, and hand them over."""
    for share, arrive in state.sent():
        arrive()
        share.promise.set_result(share.buffer)


def _total(gramians: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum, in float64 where one of them is."""
    if len(gramians) == 1:
        return gramians[0]
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gramians) else torch.float32
    return torch.stack([g.double() for g in gramians]).sum(0).to(wide)
