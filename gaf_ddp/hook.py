"""gaf_hook: Gradient Agreement Filtering as a DDP communication hook (arXiv 2412.18052), in two ways.

One step late, `GAFState()`: the consensus rule judges by the last hundred steps, so its verdict may lag one behind.

    sketch += fold(bucket)                       (k,)    this rank's own, one reading of the bucket
    bucket *= share                              (N,)    this rank's own, from the last verdict
    all_reduce(bucket), all_reduce(share)                at once, on DDP's own group
    all_gather(ballot)                                   once a step: sketches, from which all draw the next verdict

At once, `GAFState(tau=t)` or `weighting=`: a decision on this step's gradients, which waits for them.

    rows    = exchange.scatter(bucket)           (W, n)  what this rank judges of every rank's gradient
    gramian = exchange.sum(gram(rows))           (W, W)  all inner products between the ranks' gradients
    weights = decide(gramian, weighting)         (W,)    which ranks agree, and how much each counts
    bucket  = exchange.gather(rows, weights)     (N,)    the filtered average, the same on every rank
"""  # DDP checks the hook's annotations: no `from __future__ import annotations` here.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gaf_ddp.ballots.late import LateFilter
from gaf_ddp.connect import connect
from gaf_ddp.kernels.scale import correct
from gaf_ddp.runtime.backward import at_end_of_backward
from gaf_ddp.runtime.device import beside_backward
from gaf_ddp.runtime.errors import named
from gaf_ddp.state import GAFState


def gaf_hook(
    state: GAFState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Replace a bucket's all-reduce by the average of the gradients that agree.

        model.register_comm_hook(GAFState(), gaf_hook)

    One step late a rank sends an all-reduce's bytes, 16 bytes more a bucket, and once a step 4 k bytes to each other
    rank. It launches at most 8 operations a bucket and 25 a step with Triton, and waits for nothing of this step.

    At once, with the sharded exchange, a rank sends a ring all-reduce's bytes, `2 (W − 1)/W N` elements, and
    all-reduces at most `W (W + 1)` float64 numbers. With several ranks per host more leaves a host: see
    `ShardedExchange`. On CPU groups the hook, and backward with it, waits for the other ranks; on accelerators
    everything is enqueued on a side stream and the host waits for nothing.

    The first bucket compares the ranks' settings, and the first step's exchange norms.

    Args:
        state: settings and statistics; one state per DDP model.
        bucket: DDP's flat gradients `(N,)` of this rank, overwritten with the result.

    Returns:
        A future of the bucket's buffer. An error of this rank comes out of its `backward()`. The other ranks, which
        miss it then, raise an error that names the step and the bucket; on NCCL its watchdog ends them, after the
        group's time-out.

    Raises:
        TypeError: state is no GAFState, bucket is no GradBucket, or holds a sparse gradient.
        ValueError: there is no process group or it is not the model's, the ranks' settings differ, the state is
            another model's, the model is on several devices, or tau's schedule or the weighting returned something
            invalid.
        RuntimeError: replicas differ, or an average is not that of the gradients (`check_every`); backward is captured
            in a CUDA graph.
    """
    _require(state, bucket)
    way = connect(state, bucket)
    return _late(state, way, bucket) if isinstance(way, LateFilter) else way.take(bucket)


def _late(state: GAFState, late: LateFilter, bucket: Any) -> Future[Tensor]:
    """Fold, scale, all-reduce; after the last bucket send the ballot."""
    buffer: Tensor = bucket.buffer()
    late.begin_if_first(bucket.index())
    if state._model.leaves_out_buckets:
        at_end_of_backward(late.end_if_open)
    share, spans = late.weigh(buffer, bucket.parameters())
    sent = buffer if late.wire_dtype is None else buffer.to(late.wire_dtype)
    sums = [dist.all_reduce(each, group=late.group, async_op=True) for each in (sent, share)]
    with beside_backward(buffer.device):  # NCCL's newer back end makes the current stream wait for the sums here
        futures = [work.get_future() for work in sums]
    check = late.checks.sums  # read before the step ends, which begins another
    where = f"step {state.step}, bucket {bucket.index()} (has a rank ended? if not, are all loaders of one length?)"
    if bucket.is_last():
        late.end()

    def corrected(added: Future[Any]) -> Tensor:
        with named(where):
            for each in (added, *futures):
                each.wait()  # it is done: this raises its error, and makes an accelerator's stream here wait for it
        average = correct(buffer if sent is buffer else buffer.copy_(sent), share)
        if check is not None:
            check.add(average, spans, sent.dtype)
        return average

    # An accelerator's future is done once its work is enqueued, and runs what follows on a stream ordered behind it.
    # `collect_all` knows no devices: what follows would run on backward's own stream, before the sums are there.
    done = torch.futures.collect_all(futures) if buffer.device.type == "cpu" else futures[-1]
    return done.then(corrected)


def _require(state: object, bucket: object) -> None:
    """Raise TypeError unless these are what a hook is called with; RuntimeError in the capture of a CUDA graph."""
    if not isinstance(state, GAFState):
        raise TypeError(f"state must be a GAFState, found {state!r}; register_comm_hook(GAFState(), gaf_hook)")
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(
            f"bucket must be a torch.distributed.GradBucket, found {type(bucket).__name__}; "
            "torch.compile's optimize_ddp='python_reducer' passes none: "
            "set torch._dynamo.config.optimize_ddp to True or False"
        )
    if bucket.buffer().is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("backward must not be captured in a CUDA graph: replays would not call the hook")
    if bucket.buffer().is_sparse:
        raise TypeError("gradients must be dense, found a sparse one, as nn.Embedding(sparse=True) makes")
