"""What the metrics are at a sweep's target, from which the effect is counted."""

from collections.abc import Callable

from ..errors import BadHook, Unsupported
from ..metrics import Loss, Said, last_logits
from ..prompts import Prompts, as_batch
from ..runs import Run
from .cells import check_reached
from .passes import Trunk, run_trunk
from .planning import Plan
from .reading import Reading, read
from .saying import UNEDITED, Saying, Values, unedited

Part = tuple[int, ...]


def aims(made: Plan, target: Run | Prompts, pos: int) -> list[list[float]]:
    """The metrics of each prompt's target: a run, or prompts, which are run under the hooks of every cell."""
    measured = _of_run(made, target, pos) if isinstance(target, Run) else _of_prompts(made, target, pos)
    found: Values = {}
    for rows in made.chunks():
        before = None
        if any(metric.compares for metric in made.metrics):
            before = unedited(made.reading, _trunk(made, made.reading, rows), made.metrics)
        found |= measured(rows, Saying(made.reading, made.measures, before))
    return [found[UNEDITED, row] for row in range(len(made.reading))]


def _of_run(made: Plan, run: Run, pos: int) -> Callable[[Part, Saying], Values]:
    if any(isinstance(metric, Loss) for metric in made.metrics):
        raise Unsupported("a run has not read the continuation whose loss is meant: give prompts as the target")
    logits, count = last_logits(run, pos), len(made.reading)
    _check(len(logits), count)
    logits = logits.expand(count, -1)

    def measured(rows: Part, saying: Saying) -> Values:
        earlier = saying.earlier(rows)
        said = Said(logits[list(rows)], rows, None if earlier is None else earlier.cpu())
        return saying.measured([(UNEDITED, row) for row in rows], said)

    return measured


def _of_prompts(made: Plan, prompts: Prompts, pos: int) -> Callable[[Part, Saying], Values]:
    rows, count = as_batch(made.lm, prompts).rows, len(made.reading)
    _check(len(rows), count)
    theirs = read(made.lm, [list(row) for row in (rows if len(rows) == count else rows * count)], made.metrics, pos)
    check_reached(made.under, theirs)

    def measured(rows: Part, saying: Saying) -> Values:
        logits = _trunk(made, theirs, rows).logits
        return Saying(theirs, made.measures, saying.before).values([(UNEDITED, row) for row in rows], logits)

    return measured


def _check(found: int, count: int) -> None:
    if found not in (1, count):
        raise BadHook(f"the target has {found} rows, and there are {count} prompts: give as many, or one")


def _trunk(made: Plan, reading: Reading, rows: Part) -> Trunk:
    return run_trunk(reading, rows, made.under, (), 1, cache=False)
