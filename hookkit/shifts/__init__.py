"""The ranked-token-shift report: what edits did to what a model says, for which tokens, where inside, and why.

naming     edits and controls by name and in words; tokens as they are shown
measuring  the forwards, and every prompt's numbers
inside     the shown prompts: layer by layer, and component by component
texts      what is written before and after
drawing    the figures
page       shift_report
"""

from .page import shift_report as shift_report
