"""What is on disk: folders of results, saved tensors and saved statistics.

    hk.results.list_results("results")[["result", "answer"]]
    hk.results.compare_results("results/old", "results/new")

`hk.record` writes a folder of results. `read_table` reads a CSV of one with the tokens as they are,
where pandas would read the token "NA" as a missing value and "1" as a number.
"""

from .data.harvest.statistics import load_statistics
from .files.atomic import save_tensors
from .files.untrusted import load_tensors
from .reports.gallery import list_results, write_index
from .reports.results_diff import changed_cells, changed_settings, compare_results, read_table

__all__ = [
    "changed_cells",
    "changed_settings",
    "compare_results",
    "list_results",
    "load_statistics",
    "load_tensors",
    "read_table",
    "save_tensors",
    "write_index",
]


def __dir__() -> list[str]:
    return __all__
