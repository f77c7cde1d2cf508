"""gaf_hook: Gradient Agreement Filtering as a DDP communication hook (arXiv 2412.18052).

rows      = exchange.scatter(bucket)         (W, n)  what this rank judges of every rank's gradient
gramian   = exchange.sum(gram(rows))         (W, W)  all inner products between the ranks' gradients
agreement = decide(gramian, weighting)       (W,)    which ranks agree, and how much each counts
bucket    = exchange.gather(rows, weights)   (N,)    the filtered average, the same on every rank

With `vote_momentum` the Gramian is that of the rows' momenta; the rest is the same.
"""  # DDP checks the hook's annotations: no `from __future__ import annotations` here.

from functools import partial

import torch
import torch.distributed as dist

from gaf_ddp.connect import connect, shared
from gaf_ddp.errors import named
from gaf_ddp.lanes import at_end_of_backward
from gaf_ddp.pipeline import Arrival, Pipeline
from gaf_ddp.settings import as_text
from gaf_ddp.state import GAFState


def gaf_hook(
    state: GAFState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Replace a bucket's all-reduce by the average of the gradients that agree.

        model.register_comm_hook(GAFState(tau=0.97), gaf_hook)

    With the sharded exchange a rank sends a ring all-reduce's bytes, `2 (W − 1)/W N` elements, and all-reduces at
    most `W (W + 1)` float64 numbers; on the CPU, up to 16 ranks, `(W − 1) W (W + 1)` of them in one hop. With
    several ranks per host more leaves a host: see `ShardedExchange`. On CPU groups a thread works beside backward;
    on accelerators everything is enqueued on a side stream and the host waits for nothing. The first bucket also
    compares the ranks' settings.

    Args:
        state: settings and statistics; one state per DDP model.
        bucket: DDP's flat gradients `(N,)` of this rank, overwritten with the result.

    Returns:
        A future of the bucket's buffer. What a rank raises on the way comes out of its `backward()`; what others
        raise for want of it names step, bucket and rank.

    Raises:
        TypeError: state is no GAFState, bucket is no GradBucket, or holds a sparse gradient.
        ValueError: there is no process group or it is not the model's, the ranks' settings differ, the model is on
            several devices, or tau's schedule or the weighting returned something invalid.
    """
    if not isinstance(state, GAFState):
        raise TypeError(f"state must be a GAFState, found {state!r}; register_comm_hook(GAFState(), gaf_hook)")
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(
            f"bucket must be a torch.distributed.GradBucket, found {type(bucket).__name__}; "
            "torch.compile's optimize_ddp='python_reducer' passes none: "
            "set torch._dynamo.config.optimize_ddp to True or False"
        )
    if bucket.buffer().is_sparse:
        raise TypeError("gradients must be dense, found a sparse one, as nn.Embedding(sparse=True) makes")
    pipeline = connect(state, bucket)
    arrival = pipeline.take(bucket, state.step)
    in_backward = at_end_of_backward(partial(_finish, state, pipeline))
    pipeline.lane.run(partial(_filter, state, pipeline, arrival, in_backward))
    if arrival.is_last:
        # DDP copies one bucket's result into the gradients while others' are on their way. Not so in the first
        # step: ranks that fail there must not enter the next forward, where DDP broadcasts new buckets.
        pipeline.lane.run(pipeline.land, awaited=pipeline.first_step)
    if not in_backward:
        pipeline.lane.wait()
    return pipeline.lane.result(arrival.promise)


def _filter(state: GAFState, pipeline: Pipeline, arrival: Arrival, in_backward: bool) -> None:
    """Receive one bucket's rows; once a decision is due, take it for every bucket that waits for it."""
    with named(arrival.name):
        if arrival.is_first and state.check_every is not None:
            # Before any bucket is handed back, after which the parameters may change. A rank outside of backward
            # is in DDP's Join, and stays as it is while the others train.
            parameters = [parameter for decision in state.decisions for parameter in decision.parameters]
            # Not among the gradients: to watch, their all-reduces are started in the hook, beside this thread.
            group, hosts = pipeline.lane.small_messages, state._statistics.hosts
            state._replicas.start(state.step, parameters, group, hosts, in_backward)
        arrivals = pipeline.measure(arrival)
        if arrivals:
            _decide(state, pipeline, arrivals)
        if arrival.is_last:
            state._end_step(pipeline.end_step())


def _decide(state: GAFState, pipeline: Pipeline, arrivals: list[Arrival]) -> None:
    weighting = state._weighting_now()
    settings = as_text(shared(state, weighting, pipeline.device))
    measured, numbers = pipeline.sum(arrivals, settings)
    keys = [arrival.key for arrival in arrivals]
    agreement = pipeline.judge.decide(keys, measured, weighting, state.max_norm_ratio)
    pipeline.send(arrivals, agreement, numbers)


def _finish(state: GAFState, pipeline: Pipeline) -> None:
    """End the step with backward: DDP leaves out the last bucket if no rank used its parameters."""
    if pipeline.close():
        pipeline.lane.run(partial(_close, state, pipeline))
    pipeline.lane.wait()


def _close(state: GAFState, pipeline: Pipeline) -> None:
    """Decide on what waits for a bucket that never came, and end the step."""
    arrivals = pipeline.due()
    if arrivals:
        with named(arrivals[0].name):
            _decide(state, pipeline, arrivals)
    state._end_step(pipeline.end_step())
    pipeline.land()
