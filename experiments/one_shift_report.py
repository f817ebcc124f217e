"""Does a vector that tells happy from unhappy sentences make the next word a happy one?

Yes, if " great" becomes more likely and " terrible" less likely on average over the openings, both
by more than under random vectors of the same length.

python -m experiments.one_shift_report    two minutes; writes results/one_shift_report/
"""

from typing import Any

import hookkit as hk

LAYER, DOSE, SEED = 16, 0.2, 0  # the dose is a part of the length of the residual stream
THINGS = ("film", "hotel", "meal", "concert", "book", "journey", "lesson", "party", "game", "visit")
HAPPY = [f"I loved the {thing}. It was wonderful!" for thing in THINGS]
UNHAPPY = [f"I hated the {thing}. It was horrible!" for thing in THINGS]
OPENINGS = [
    "The weather this morning is", "My sister's new house looks", "Our neighbour's dog is",
    "The soup at the restaurant tasted", "Working with them has been", "Our museum is",
    "His first week at school was", "The speech that she gave sounded", "Living in this town is",
    "The room that they gave us was", "The painting on the wall looks", "The last chapter was",
]  # fmt: skip
QUESTION = "Does a vector that tells happy from unhappy sentences make the next word a happy one?"


def main() -> None:
    lm = hk.load(device="cpu")
    vector = hk.mean_difference(lm, HAPPY, UNHAPPY, f"resid_post.{LAYER}")[0]
    edit = {"happier": vector.steer(dose=DOSE)}
    page = hk.shift_report(
        lm, OPENINGS, edit, watch=(" great", " terrible"), details=1,
        title="A vector of mood", question=QUESTION, seed=SEED,
    )  # fmt: skip
    page.write("results/one_shift_report")
    print(answer(page.tables))


def answer(tables: dict[str, Any]) -> str:
    table = tables["against_control"]
    table = table[table["measure"] == "logprob_delta"]  # a row for each watched token
    great, terrible = table.iloc[0], table.iloc[1]
    verdict = "Yes" if great["gain_low"] > 0 and terrible["gain_high"] < 0 else "No"
    return (
        f"{verdict}: over {great['n']} openings the vector changes the log-probability of ' great' "
        f"by {great['effect']:+.2f} nats and that of ' terrible' by {terrible['effect']:+.2f} on "
        f"average. {great['draws']} random vectors of the same length change them by "
        f"{great['control']:+.2f} and {terrible['control']:+.2f}."
    )


if __name__ == "__main__":
    main()
