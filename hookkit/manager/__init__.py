"""HookManager: the hooks of a block on a model.

    with hk.attach(lm, hk.force(" coffee"), hk.capture("resid_post.6")) as manager:
        ...                             # any code that runs the model: forwards, generate, a pipeline
    manager["resid_post.6"], manager.log

Inside the block every forward of the model is read and edited. All hooks go on together or not at all, and on leaving,
however that happens, the model carries exactly what it carried before.

precedence  whose hooks act first
again       checkpointed blocks, which run again in the backward pass
running     the texts that run in a block
forwards    what the hooks do in each forward
block       HookManager, the only file that registers hooks on modules
"""

from .block import HookManager as HookManager
from .block import attach as attach
from .forwards import Stop as Stop
from .precedence import hooks_of_others as hooks_of_others
