"""hk.prove: every law, tried on a model."""

from collections.abc import Iterable

import pandas as pd

from ..arguments import checks_arguments, whole_numbers
from ..errors import HookkitError
from ..model import LM
from ..sites import Site
from . import editing, looking, reading
from .law import Finding, Law
from .study import Study, of_each_kind, some_prompts

LAWS = [each for part in (looking, editing, reading) for each in vars(part).values() if isinstance(each, Law)]
UNTRIED = "this law ended in an error, and was not tried here to its end"


def _blocks(lm: LM, layers: Iterable[int] | None) -> list[int] | None:
    """The blocks to try, each of which the model has."""
    if layers is None:
        return None
    blocks = whole_numbers(layers, "layers", least=0, meaning="the blocks to try,")
    for block in blocks:
        lm.place(Site("resid_post", block))  # raises where there is none
    return blocks


@checks_arguments
def prove(
    lm: LM, *, prompts: "list[list[int]] | list[str] | None" = None, layers: Iterable[int] | None = None
) -> pd.DataFrame:
    """The laws on a model, one row for each law and site (the worst of the blocks that were tried).

    Columns: law, site, difference (a part of the largest value there), limit, holds, note (the reason, where the family
    is an exception, or what was raised). A law that raised was not tried to its end, and holds at none of the sites
    that it names. `prompts` are three or more of different lengths; ids from the whole vocabulary if left out.
    `layers` are the blocks to try: the first, middle and last of each kind if left out.

    >>> prove(tiny("gpt_neox"))["holds"].all()
    np.True_
    """
    study = Study(lm, some_prompts(lm) if prompts is None else prompts, of_each_kind(lm, _blocks(lm, layers)))
    rows = []
    for law in LAWS:
        found = _checked(law, study)
        for site in dict.fromkeys(each.site for each in found):
            worst = max((each for each in found if each.site == site), key=_badness)
            excused = lm.family.exceptions.get(law.name) or lm.family.exceptions.get(f"{law.name} {site}")
            rows.append(
                {
                    "law": law.name,
                    "site": site,
                    "difference": worst.difference,
                    "limit": worst.limit,
                    "holds": worst.holds,
                    "note": f"exception: {excused}" if excused and not worst.holds else worst.note,
                }
            )
    return pd.DataFrame(rows, columns=["law", "site", "difference", "limit", "holds", "note"])


def _badness(finding: Finding) -> tuple[bool, float]:
    number = finding.difference if finding.difference == finding.difference else float("inf")
    return not finding.holds, -number if finding.at_least else number


def _checked(law: Law, study: Study) -> list[Finding]:
    """What a law finds. If it raises, it holds nowhere: of a site that it came to, some block or row may be untried."""
    found: list[Finding] = []
    try:
        found.extend(law.check(study))
    except (HookkitError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        said = str(error).split("\n")[0][:300]
        found.append(Finding("", float("nan"), 0.0, f"could not be tried: {type(error).__name__}: {said}"))
        failed = {each.site for each in found if not each.holds}
        there = {site.name for site in study.sites} - failed
        found += [Finding(site, float("nan"), 0.0, UNTRIED) for site in law.sites if site in there]
    return found
