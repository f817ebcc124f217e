# The figures that hookkit draws. `__init__.py` reads this file.

from .calibration import reliability_diagram as reliability_diagram
from .calibration import roc_curves as roc_curves
from .circuits import circuit_graph as circuit_graph
from .circuits import faithfulness_curve as faithfulness_curve
from .decoding import prob_against as prob_against
from .decoding import rank_lines as rank_lines
from .internals import attention_view as attention_view
from .internals import lens_map as lens_map
from .internals import logit_bars as logit_bars
from .ranks import delta_bars as delta_bars
from .ranks import logit_panels as logit_panels
from .ranks import logit_scatter as logit_scatter
from .ranks import rank_bump as rank_bump
from .strips import decision_strip as decision_strip
from .strips import surprisal_strip as surprisal_strip
from .sweeps import damage_curves as damage_curves
from .sweeps import dose as dose
from .sweeps import heat_map as heat_map
from .sweeps import interval_lines as interval_lines
