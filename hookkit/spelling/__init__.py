"""Hooks as short texts, for a terminal, a file of hooks, or a notebook: VERB:WHAT@WHERE.

    ablate:z.9.3                       ablate:resid_post.6,resid_post.7@-1
    scale:mlp_out.4*0.5                skip_block:3
    knockout:9.3@query=-1,key=at('Mary')
    steer:mood.safetensors*3           steer:resid_post.12:mood.safetensors@dose=0.3
    patch:resid_post.6:She takes green tea with@-1
    force: coffee@0                    force: coffee@when=entropy_above(2.0)
    ban: coffee, tea                   boost: tea=2.5, coffee=-1
    cap: coffee@prob=0.1               swap: coffee, tea                set_rank: coffee=3

WHAT is one site or several, tokens as they stand (a leading space counts), or a token in quotes where it has one of
`,=@` in it; id(123) is a token by its number, phrase(' a cup of tea') several in a row. WHERE is a position of an inner
hook, a step of one on logits, or any keyword of the hook's own function: `@pos=1:,rows=0`. What `Hook.to_json` wrote is
read as well.

words     the grammar: what stands before and after the @
reading   hook, load_hooks
writing   spell
"""

from .reading import hook as hook
from .reading import load_hooks as load_hooks
from .writing import spell as spell
