"""Harvesting: what is at some sites, for more texts than fit in memory, on the disk or as statistics.

texts       what is given: numbered texts to rows of tokens
windows     the rows that come next, in batches of like length
values      what is at the sites, from one forward
computing   the values of a batch, here or on an actor
progress    a line in the terminal
disk        files that are whole or not there
folder      the settings, the index and the shards
columns     the rows of all shards
moments     mean, variance, covariance, norms
strongest   the tokens at which a unit is largest
summary     Statistics
reading     open_harvest -> Harvest
writing     harvest
collecting  statistics
"""

from .collecting import statistics as statistics
from .reading import Harvest as Harvest
from .reading import open_harvest as open_harvest
from .summary import SiteStatistics as SiteStatistics
from .summary import Statistics as Statistics
from .summary import load_statistics as load_statistics
from .writing import harvest as harvest
