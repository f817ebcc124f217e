"""Where the sites of a model are whose family is not in the table: found by one dry run, and proved by value.

watching    what happens in the dry run
matching    same values or not
attending   the sites of attention
stream      what a block adds to the residual stream
neurons     the sites of the MLP
blocks      one block of each kind, and one row for all of them
whole       the sites that are there once, and the row
looking_up  the row for any model
"""

from .looking_up import row_of as row_of
from .whole import found_out as found_out
