"""Hooks: frozen values that say what to do at which sites. They are declared, printed, compared and saved as data.

codec       to JSON and back
base        what every hook is
looking     capture
edits       edit, steer, scale, project_out, skip_block
replacing   ablate, patch
logits      force, ban, boost, swap, set_rank
"""

from .base import EditHook as EditHook
from .base import Here as Here
from .base import Hook as Hook
from .edits import edit as edit
from .edits import project_out as project_out
from .edits import scale as scale
from .edits import skip_block as skip_block
from .edits import steer as steer
from .logits import ban as ban
from .logits import boost as boost
from .logits import force as force
from .logits import set_rank as set_rank
from .logits import swap as swap
from .looking import Capture as Capture
from .looking import capture as capture
from .replacing import ablate as ablate
from .replacing import patch as patch
