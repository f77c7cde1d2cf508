"""Gradient Agreement Filtering (arXiv 2412.18052) as a communication hook for DistributedDataParallel.

from gaf_ddp import GAFState, gaf_hook
model = DistributedDataParallel(model)
model.register_comm_hook(GAFState(), gaf_hook)
"""

from gaf_ddp.attach import attach
from gaf_ddp.average import filter_average
from gaf_ddp.checks.audit import audit
from gaf_ddp.checks.replicas import check_replicas
from gaf_ddp.engines.fsdp import filter_fsdp
from gaf_ddp.engines.parameters import filter_parameters
from gaf_ddp.hook import gaf_hook
from gaf_ddp.kernels.gram import combine, filter_gradients, gram
from gaf_ddp.microbatch import MicrobatchFilter
from gaf_ddp.monitor.log import AgreementLog
from gaf_ddp.rules.agreement import Agreement
from gaf_ddp.rules.consensus import ConsensusAgreement
from gaf_ddp.rules.neighborhood import NeighborhoodAgreement
from gaf_ddp.rules.sequential import SequentialAgreement
from gaf_ddp.rules.weighting import Mean, Weighting
from gaf_ddp.skip import skip_on_disagreement
from gaf_ddp.state import GAFState

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
    "filter_average",
    "filter_fsdp",
    "filter_gradients",
    "filter_parameters",
    "gaf_hook",
    "gram",
    "skip_on_disagreement",
]
