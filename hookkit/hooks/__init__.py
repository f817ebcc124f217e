"""Hooks: frozen values that say what to do at which sites. They are declared, printed, compared and saved as data.

codec       to JSON and back
base        what every hook is
looking     capture
edits       edit, steer, scale, project_out, skip_block
stand_ins   values of other texts, for ablate and patch
replacing   ablate, patch
cutting     knockout
conditions  entropy_above, rank_of … when a logit edit acts
phrases     phrase
logits      what every hook on logits is
choosing    force, ban, restrict
moving      boost, cap, swap, set_rank
"""

from .base import EditHook as EditHook
from .base import Here as Here
from .base import Hook as Hook
from .choosing import ban as ban
from .choosing import force as force
from .choosing import restrict as restrict
from .conditions import entropy_above as entropy_above
from .conditions import entropy_below as entropy_below
from .conditions import margin_above as margin_above
from .conditions import margin_below as margin_below
from .conditions import prob_of as prob_of
from .conditions import rank_of as rank_of
from .cutting import knockout as knockout
from .edits import edit as edit
from .edits import project_out as project_out
from .edits import scale as scale
from .edits import skip_block as skip_block
from .edits import steer as steer
from .looking import Capture as Capture
from .looking import capture as capture
from .moving import boost as boost
from .moving import cap as cap
from .moving import set_rank as set_rank
from .moving import swap as swap
from .phrases import phrase as phrase
from .replacing import ablate as ablate
from .replacing import patch as patch
