"""The classes of what hookkit returns and accepts, for annotations and `isinstance`.

def first_token(run: hk.types.Run) -> str: ...
"""

from .attributions.backward import Gradients
from .attributions.faithfulness import Faithfulness
from .checks.doctor import Checkup
from .data.datasets.pairs import Pairs
from .data.harvest.harvest import Harvest
from .data.harvest.statistics import Statistics
from .features.dictionary import Dictionary
from .features.graph import Graph
from .hooks.base import Condition, EditContext, Hook
from .hooks.capture import Captured
from .hooks.probe import Probe
from .hooks.subspace import Subspace
from .hooks.vector import Vectors
from .lenses.head_weights import OV, QK
from .lenses.jacobian_lens import JacobianLens
from .lenses.tuned_lens import TunedLens
from .models.chat import Chat
from .models.families.schema import ModuleLocation
from .models.sites import ModuleSite, Sites
from .reports.diff.model_diff import Difference
from .reports.feature_report import FeatureReport
from .reports.page import Report
from .reports.record import Record
from .reports.scan import Scan
from .reports.shift.corpus_page import TokenShifts
from .runs.manager import HookManager
from .runs.run import Run
from .runs.trace import Trace
from .steering.probes import Probes
from .steering.subspaces import SubspaceFit
from .sweeps.plan import Plan
from .tables.counterfactuals import Comparison
from .tables.decoding import Stream
from .tables.metrics.metric import Metric, MetricInput

__all__ = [
    "OV",
    "QK",
    "Captured",
    "Chat",
    "Checkup",
    "Comparison",
    "Condition",
    "Dictionary",
    "Difference",
    "EditContext",
    "Faithfulness",
    "FeatureReport",
    "Gradients",
    "Graph",
    "Harvest",
    "Hook",
    "HookManager",
    "JacobianLens",
    "Metric",
    "MetricInput",
    "ModuleLocation",
    "ModuleSite",
    "Pairs",
    "Plan",
    "Probe",
    "Probes",
    "Record",
    "Report",
    "Run",
    "Scan",
    "Sites",
    "Statistics",
    "Stream",
    "Subspace",
    "SubspaceFit",
    "TokenShifts",
    "Trace",
    "TunedLens",
    "Vectors",
]


def __dir__() -> list[str]:
    return __all__
