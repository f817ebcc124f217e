"""hk.stats.evaluate: the score of a hooked model on tasks of lm-evaluation-harness.

`harness_model` returns the model as the harness takes it: its HFLM, with the hooks in each forward
and each generate. A task's context is the prompt, and its continuation counts as generated, in
requests for likelihoods too.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, MissingExtra, NeverFired, Unsupported
from ..hooks.base import Hook
from ..models.lm import LM
from ..models.prompts import as_batch
from ..runs.manager import HookManager

Text: TypeAlias = tuple[list[int], list[int]]  # the tokens of a context and of its continuation

NAMES = ("alias", "name", "sample_len", "sample_count")  # of a task's results that are no metric


@check_arguments
def evaluate(
    lm: LM,
    tasks: str | list[Any],
    *hooks: Hook,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns the scores of a hooked model on tasks of lm-evaluation-harness, one metric a row.

    Columns: task, metric, filter, value, stderr (NaN if the harness gives none), n (documents).

    `tasks` are names of the harness, or configurations of tasks; `include_path` is a folder with
    more of them, as YAML. Of each task `limit` documents are read (default all), with `num_fewshot`
    examples (default the task's own number). Without hooks, the scores are those of the harness.

    A task's context is the prompt, and its continuation counts as generated: step 0 of a hook on
    logits chooses the first token of an answer, and `hk.PROMPT` is the context. A step that an
    answer does not have is left out, and `rows` cannot be given, since the harness orders the
    documents. `NeverFired` is raised for a hook that acted in no document. Needs the extra
    `hookkit[eval]`; tasks that are not on this machine are downloaded by the harness.

    >>> evaluate(lm, "arc_easy", hk.scale("mlp_out.12", 0.5), limit=50)  # doctest: +SKIP
    """
    lm.refuse_engine("the harness reads the logits at every position")
    model = harness_model(lm, *hooks, batch_size=batch_size)
    task_manager = import_module("lm_eval.tasks").TaskManager(include_path=include_path)
    with _random_state():
        outcome = import_module("lm_eval").simple_evaluate(
            model,
            tasks=[tasks] if isinstance(tasks, str) else list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=task_manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
    model.forwards.check_fired()
    return pd.DataFrame(list(_rows(outcome)))


@contextmanager
def _random_state() -> Iterator[None]:
    """Restores the random numbers of Python, numpy and torch, which the harness seeds."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _rows(outcome: Any) -> Iterator[dict[str, Any]]:
    for task, scores in outcome["results"].items():
        count = outcome["n-samples"].get(task, {}).get("effective", 0)
        for key, value in scores.items():
            metric, _, filter_name = key.partition(",")
            if key in NAMES or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{filter_name}", float("nan"))
            stderr = error if isinstance(error, float) else float("nan")
            row = {"task": task, "metric": metric, "filter": filter_name, "value": value}
            yield {**row, "stderr": stderr, "n": count}


def harness_model(lm: LM, *hooks: Hook, batch_size: int = 8) -> Any:
    """Returns the hooked model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`."""
    if find_spec("lm_eval") is None:
        raise MissingExtra(
            "evaluate needs lm-evaluation-harness, which is not installed: "
            "pip install 'hookkit[eval]'"
        )
    for hook in hooks:
        if hook.where.rows is not None:
            raise BadHook(
                f"{hook} names rows, and the harness puts documents into batches in an order of "
                "its own: leave rows out"
            )
    _check_model(lm)
    check_integer(batch_size, "batch_size", least=1)
    return _model_class()(lm, hooks, batch_size)


def _check_model(lm: LM) -> None:
    if lm.tokenizer is None or lm.two_texts or lm.is_masked:
        raise Unsupported("the harness needs a causal language model and its tokenizer")
    if lm.root.training:
        raise Unsupported("the model is in training mode: call model.eval() first")


class _HookedForwards:
    """The forwards of a model under hooks. Owns the numbers of the hooks that have acted."""

    def __init__(self, lm: LM, hooks: tuple[Hook, ...]) -> None:
        self.lm, self.hooks = lm, hooks
        self.fired: set[int] = set()

    @contextmanager
    def hooked(self) -> Iterator[HookManager]:
        """A context with the hooks, which notes those that acted."""
        manager = HookManager(self.lm, self.hooks)
        try:
            with suppress(NeverFired), manager:
                yield manager
        finally:
            manager.close()
            self.fired |= {firing[0].number for firing in manager.captures.firings}

    def check_fired(self) -> None:
        """Raises `NeverFired` for a hook that acted in no document."""
        for number, hook in enumerate(self.hooks):
            if number not in self.fired:
                raise NeverFired(f"{hook} acted in no document of the tasks: none came to it")

    def batched_likelihoods(
        self, texts: Sequence[Text], batch_size: int, longest: int, dtype: torch.dtype | None
    ) -> list[tuple[float, bool]]:
        """Returns the likelihoods of texts, which run in batches, the longest texts first."""
        lengths = [len(context) + len(answer) for context, answer in texts]
        longest_first = sorted(range(len(texts)), key=lambda index: -lengths[index])
        scores: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(texts), batch_size):
            indices = longest_first[start : start + batch_size]
            batch = [texts[index] for index in indices]
            scores.update(zip(indices, self.likelihoods(batch, longest, dtype), strict=True))
        return [scores[index] for index in range(len(texts))]

    def likelihoods(
        self, texts: Sequence[Text], longest: int, dtype: torch.dtype | None
    ) -> Iterator[tuple[float, bool]]:
        """Yields the log-likelihood of each continuation, and whether it is the greedy one."""
        rows: list[list[int]] = []
        starts: list[int] = []
        for context, answer in texts:
            rows.append([*context, *answer][-(longest + 1) : -1])
            starts.append(len(rows[-1]) + 1 - len(answer))
        batch = as_batch(self.lm, rows)
        with torch.no_grad(), self.hooked() as manager:
            manager.expect(batch, starts)
            logits = self.lm.model(**batch.inputs(self.lm)).logits
        logprobs = logits.log_softmax(dim=-1, dtype=dtype)
        for number, (_, answer) in enumerate(texts):
            scores = logprobs[number, starts[number] - 1 : len(rows[number])]
            ids = torch.tensor(answer, device=scores.device)
            total = float(scores.gather(1, ids[:, None]).sum())
            yield total, torch.equal(scores.argmax(dim=-1), ids)


def _model_class() -> Callable[..., Any]:
    """Returns a subclass of the harness's model for transformers, which is imported here only."""
    base: Any = import_module("lm_eval.models.huggingface").HFLM

    class HookedModel(base):
        """A model of the harness whose forwards have hooks."""

        def __init__(self, lm: LM, hooks: tuple[Hook, ...], batch_size: int) -> None:
            self.forwards = _HookedForwards(lm, hooks)
            tokenizer = copy.deepcopy(lm.tokenizer)  # to which the harness gives a pad token
            super().__init__(pretrained=lm.model, tokenizer=tokenizer, batch_size=batch_size)

        def _model_generate(self, *args: Any, **settings: Any) -> Tensor:
            with self.forwards.hooked():
                return super()._model_generate(*args, **settings)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None
        ) -> list[tuple[float, bool]]:
            if not self.forwards.hooks:
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            texts = [request[1:] for request in requests]
            return self.forwards.batched_likelihoods(
                texts, self.batch_size, self.max_length, self.softmax_dtype
            )

    return HookedModel
