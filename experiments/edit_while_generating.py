"""Is a word gone from a text when its token is banned?

Yes, if the model names the capital of a country without the ban, and not with it, not even with
other tokens that spell the name. The control bans the capital of another country.

python -m experiments.edit_while_generating    a minute; writes results/edit_while_generating/
"""

from typing import Any

import pandas as pd

import hookkit as hk

COUNT, NEW, SEED = 24, 12, 0  # prompts, and generated tokens of each
QUESTION = "Is a word gone from a text when its token is banned?"


def main() -> None:
    lm = hk.load(device="cpu")
    pairs = hk.datasets.capitals(lm, COUNT, seed=SEED).solved(lm, top1=True)
    banned = {"no edit": [], "ban": pairs.answers, "control": pairs.wrong}
    with hk.record("results/edit_while_generating", question=QUESTION, lm=lm, seed=SEED) as results:
        rows, runs = [], {}
        for edit, tokens in banned.items():
            bans = [hk.ban(token, rows=row) for row, token in enumerate(tokens)]
            run = hk.generate(lm, pairs.clean, *bans, max_new_tokens=NEW, do_sample=False)
            runs[edit] = results.run(edit, run)
            for city, text in zip(map(str, pairs.answers), run.text, strict=True):
                rows.append({"edit": edit, "city": city, "text": text, "named": city in text})
        texts = results.table("texts", pd.DataFrame(rows), caption="named: the city is in the text")
        shift: Any = hk.rank_shift(runs["no edit"], runs["ban"], step=0)
        shift = shift[shift["row"] == 0]
        title = f"The first token after “{pairs.clean[0]}”, without and with the ban"
        results.figure("ranks", hk.figures.rank_bump(shift, title=title), caption=title)
        results.answer(answer({"texts": texts}))
    print(results.answered)


def answer(tables: dict[str, Any]) -> str:
    named = tables["texts"].groupby("edit")["named"]
    count, n = named.sum(), named.size().iloc[0]
    verdict = "Yes" if count["ban"] == 0 and count["control"] == count["no edit"] else "Not always"
    return (
        f"{verdict}: with the city's token banned, {count['ban']} of {n} texts name the city. "
        f"Without an edit {count['no edit']} do, and with another city's token banned "
        f"{count['control']} do."
    )


if __name__ == "__main__":
    main()
