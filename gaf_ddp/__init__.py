"""Gradient Agreement Filtering (arXiv 2412.18052) as a communication hook for DistributedDataParallel.

from gaf_ddp import GAFState, gaf_hook
model = DistributedDataParallel(model)
model.register_comm_hook(GAFState(), gaf_hook)
"""

from gaf_ddp.agreement import Agreement
from gaf_ddp.attach import attach
from gaf_ddp.audit import audit
from gaf_ddp.consensus import ConsensusAgreement
from gaf_ddp.fsdp import filter_fsdp
from gaf_ddp.gramian import combine, filter_gradients, gram
from gaf_ddp.hook import gaf_hook
from gaf_ddp.log import AgreementLog
from gaf_ddp.microbatch import MicrobatchFilter
from gaf_ddp.replicas import check_replicas
from gaf_ddp.skip import skip_on_disagreement
from gaf_ddp.state import GAFState
from gaf_ddp.weighting import Mean, NeighborhoodAgreement, SequentialAgreement, Weighting

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "AgreementLog",
    "ConsensusAgreement",
    "GAFState",
    "Mean",
    "MicrobatchFilter",
    "NeighborhoodAgreement",
    "SequentialAgreement",
    "Weighting",
    "attach",
    "audit",
    "check_replicas",
    "combine",
    "filter_fsdp",
    "filter_gradients",
    "gaf_hook",
    "gram",
    "skip_on_disagreement",
]
