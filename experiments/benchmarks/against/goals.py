"""What the sweeps aimed at, and whether this run reached it."""

import pandas as pd

SPEED = [("a", "by hand", "one by one", 60), ("a", "nnsight", "batched invokes", 12)]
SPEED += [("b", "by hand", "one by one", 10), ("c", "by hand", "one by one", 10)]
APART = 1e-4  # of a cell, from the loop's
MEMORY = 2.0  # times the batch's by hand
FIRST = 1.5  # times a later sweep


def goals(table: pd.DataFrame, peaks: pd.DataFrame, first: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per goal: its limit, the ratios in wall-clock and CPU time, whether met."""
    found = []
    for letter, whose, how, wanted in SPEED:
        rows = table[
            (table["workload"] == letter) & (table["whose"] == whose) & (table["how"] == how)
        ]
        for times, used in zip(rows["times"], rows["times_processor"], strict=True):
            goal = f"{letter}: at least {wanted} times as fast as {whose}, {how}"
            found.append([goal, wanted, times, used, times >= wanted])
    loops = table[(table["whose"] == "by hand") & (table["how"] == "one by one")]
    largest = loops["apart"].max()
    found.append(
        [f"every cell within {APART} of the loop's", APART, largest, largest, largest <= APART]
    )
    sweeps = peaks[peaks["run"] == "hk.sweep"]
    for column in ("ratio_process", "ratio_beside_model"):
        most = sweeps[column].max()
        goal = (
            f"memory under {MEMORY:g} times the batch's by hand, "
            f"{column.removeprefix('ratio_').replace('_', ' ')}"
        )
        found.append([goal, MEMORY, most, most, most < MEMORY])
    for row in first.to_dict("records"):
        goal = f"a: first sweep at most {FIRST} times a later one, {row['process']}"
        found.append([goal, FIRST, row["times"], row["times_processor"], row["times"] <= FIRST])
    return pd.DataFrame(found, columns=["goal", "wanted", "found", "found_processor", "met"])
