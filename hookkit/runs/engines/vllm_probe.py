"""The proof of an engine: what vLLM computes beside what transformers computes.

Before the first run of an engine, some short prompts run in it, and through the first blocks of the
same model in transformers. Values at all sites must agree, and the logits, and an edit at each
site. A later run of an engine that differs raises `Unsupported`.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...errors import HookkitError, Unsupported
from ...hooks.ablation import ablate
from ...hooks.base import Hook
from ...hooks.capture import Captured, capture
from ...hooks.edits import scale
from ...hooks.logits import force
from ...models.layout import text_config
from ...models.lm import LM
from ...models.loading import auto_class, hidden_progress_bars
from ...models.sites import Site, Sites
from ..forward import forward
from ..run import Run
from .vllm_run import SampledRun, ServedResult, ServedRun
from .vllm_sites import PROVED_IN_OWN_CODE

# The largest difference that is allowed, as a part of the largest value of the row at the site.
# Healthy models differed by up to 2e-5, 5e-3 and 2e-2, and faulty ones by more than 0.1.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
LENGTHS = (5, 3, 12)  # of the prompts without edits
EDITED_LENGTH, EDITED_POSITION = 4, 1
N_NEW_TOKENS = 3  # so that each row is also read one token at a time
FORCED_STEP = 1
LOGITS = Site("logits")
BEFORE, AFTER, FINAL = "before", "after", "final"  # captures before and after the edits
MAX_WINDOW = 1024  # a prompt is as long as a sliding window, up to this


@dataclass(frozen=True, eq=False)
class EngineProof:
    """What was compared between an engine and transformers.

    table    one row for each comparison: `compared` ("values", "edit", "logits" or "token"), its
             `site`, the `row` with the largest `difference` as a part of the row's largest value,
             the `tolerance`, and whether it `holds`
    blocks   how many blocks of transformers' model were read
    windows  the sliding windows that no prompt was longer than
    """

    table: pd.DataFrame
    blocks: int
    windows: tuple[int, ...] = ()

    @cached_property
    def broken(self) -> pd.DataFrame:
        """The comparisons that do not hold."""
        return self.table.loc[~self.table["holds"].astype(bool)]


def check_proved(lm: LM) -> None:
    """Proves the engine of an LM once; raises `Unsupported` if it differs from transformers."""
    proof = prove_engine(lm)
    if proof.broken.empty:
        return
    worst: Any = proof.broken.iloc[0]
    raise Unsupported(
        f"{_code(lm)} does not compute {lm.name} as transformers does: {_describe(worst)}. Hooks "
        f"would act on another model. {_advice(lm)}; hk.doctor(lm) lists all that was compared"
    )


def _code(lm: LM) -> str:
    """The code of vLLM that computes a model, in words."""
    assert lm.engine is not None
    if lm.engine.facts["code"] == "vllm":
        return "vLLM's own code"
    return "vLLM's backend of transformers"


def _advice(lm: LM) -> str:
    """Another code of vLLM that may serve the model, or none."""
    assert lm.engine is not None
    if lm.engine.facts["code"] == "vllm":
        return "Try model_impl='transformers', or leave engine= out"
    if text_config(lm.config).model_type in PROVED_IN_OWN_CODE:
        return "Try model_impl='vllm', or leave engine= out"
    return "Leave engine= out"


def _describe(row: Any) -> str:
    what = {
        "values": f"the values at {row['site']}",
        "edit": f"after an edit at {row['site']}, the values after block {row['block']}",
        "logits": "the logits of the same last residual stream",
        "token": "the tokens",
    }[row["compared"]]
    if row["compared"] == "token":
        return f"{what} of row {row['row']} are not those of the logits, or of hk.force"
    return (
        f"{what} differ in row {row['row']} by {row['difference']:.2g} of the largest of them; "
        f"{row['tolerance']:.0e} is allowed"
    )


def prove_engine(lm: LM) -> EngineProof:
    """Returns the proof of the engine of an LM, which is made once."""
    engine = lm.engine
    assert engine is not None
    if engine.proof is None:
        engine.proof = _Probe(lm).prove()
    return engine.proof


class _Probe:
    """The prompts, edits and sites of a proof. `prove_engine` owns it.

    The first rows are prompts without edits, and each further one has an edit at one site.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.engine: Any = lm.engine
        self.dtype: torch.dtype = getattr(torch, self.engine.facts["dtype"])
        self.n_blocks = count_blocks(lm)
        self.last = Site("resid_post", self.n_blocks - 1)
        self.final = Site("resid_post", lm.n_layers - 1)
        self.sites = self._sites_in_order()
        self.edited = self._edited_sites()
        room = self.engine.facts["context"] - N_NEW_TOKENS
        windows = _windows(text_config(lm.config))
        longest = max([LENGTHS[-1], *[window + 4 for window in windows if window <= MAX_WINDOW]])
        lengths = [*LENGTHS[:-1], longest, *[EDITED_LENGTH] * len(self.edited)]
        self.prompts: list[tuple[int, ...]] = []
        for row, length in enumerate(lengths):
            self.prompts.append(self._prompt(row, min(length, room)))
        self.windows = tuple(window for window in windows if window >= min(longest, room))
        self.forced = self.prompts[0][0]

    def _sites_in_order(self) -> list[Site]:
        """All sites of the blocks, in the order in which the model computes them."""
        before: list[Site] = []
        after: list[Site] = []
        in_blocks: list[list[Site]] = [[] for _ in range(self.n_blocks)]
        for name in self.lm.layout.names:
            own_layers = self.lm.layout.layers(name)
            if own_layers is not None:
                for layer, sites in enumerate(in_blocks):
                    if layer in own_layers:
                        sites.append(Site(name, layer))
            elif name == "final_norm":
                after.append(Site(name))
            elif name != "logits":
                before.append(Site(name))
        return [*before, *chain.from_iterable(in_blocks), *after]

    def _edited_sites(self) -> list[Site]:
        """The last site of each name."""
        return list({site.name: site for site in self.sites}.values())

    def _prompt(self, row: int, length: int) -> tuple[int, ...]:
        """Arbitrary tokens, other ones in each row."""
        numbers = [7919 * position + 104729 * row + 97 for position in range(length)]
        return tuple(number % self.lm.n_tokens for number in numbers)

    def _edits_of(self, row: int, rows: list[int] | None) -> list[Hook]:
        """The edit of a row: the values at one position of one site change their sign."""
        if row < len(LENGTHS):
            return []
        return [scale(self.edited[row - len(LENGTHS)], -1.0, pos=EDITED_POSITION, rows=rows)]

    # ---- the two runs

    def prove(self) -> EngineProof:
        """Runs the prompts in both, and returns the comparison."""
        try:
            result = self._run_in_engine()
        except HookkitError:
            raise
        except Exception as error:
            raise Unsupported(
                f"hooks do not work in {_code(self.lm)} of {self.lm.name}: {error}. "
                f"{_advice(self.lm)}"
            ) from error
        values = {(kept.site, kept.name): kept for kept in result.captures}
        runs: list[Run] = []
        with _quiet(), torch.random.fork_rng(devices=[]):
            reference = read_blocks(self.lm, self.n_blocks, self.dtype)
            for row, ids in enumerate(result.rows):
                final = of_row(values[self.final, FINAL], row)
                if len(final) != len(ids) - 1:
                    raise Unsupported(
                        f"{_code(self.lm)} of {self.lm.name} gave {len(final)} positions of row "
                        f"{row}, which has {len(ids)} tokens: {_advice(self.lm)}"
                    )
                runs.append(self._run_reference(reference, row, ids, final))
        table = pd.DataFrame(self._comparisons(result, values, runs))
        return EngineProof(table, self.n_blocks, self.windows)

    def _run_in_engine(self) -> ServedResult:
        count = len(self.prompts)
        edits: list[Hook] = []
        for row in range(count):
            edits += self._edits_of(row, [row])
        hooks = (
            capture(Sites(tuple(self.sites)), rows=range(len(LENGTHS)), name=BEFORE),
            capture("logits", name=BEFORE),
            *edits,
            capture(self.last, name=AFTER),
            capture(self.final, name=FINAL),
            force(self.forced, step=FORCED_STEP, rows=[0]),
        )
        run = ServedRun(hooks, (), tuple(self.prompts), 1, N_NEW_TOKENS, frozenset())
        settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        settings["max_tokens"] = N_NEW_TOKENS
        salts: list[str | None] = [None] * count
        if self.engine.arguments.get("enable_prefix_caching"):
            salts = [secrets.token_hex(16) for _ in range(count)]
        return self.engine.call("run", SampledRun(run, settings, [None] * count, salts))

    def _run_reference(self, reference: LM, row: int, ids: list[int], final: Tensor) -> Run:
        """Runs a row through the blocks, and the engine's last stream through norm and head."""
        sites: list[Site] = [self.last]
        if row < len(LENGTHS):
            sites = self.sites
        return forward(
            reference,
            [ids[:-1]],
            capture(Sites(tuple(sites)), name=BEFORE),
            *self._edits_of(row, None),
            capture(self.last, name=AFTER),
            ablate(self.last, to=final[None].to(self.dtype)),
        )

    # ---- the comparison

    def _comparisons(
        self, result: ServedResult, values: Mapping[Any, Captured], runs: list[Run]
    ) -> Iterator[dict[str, Any]]:
        """Yields the rows of the table, in the order in which the model computes the sites."""
        for site in self.sites:
            differences: list[float] = []
            for row in range(len(LENGTHS)):
                expected = runs[row][site, BEFORE][0]
                differences.append(_difference(of_row(values[site, BEFORE], row), expected))
            yield self._as_row("values", site, differences)
        for row, site in enumerate(self.edited, len(LENGTHS)):
            actual = of_row(values[self.last, AFTER], row)
            difference = _difference(actual, runs[row][self.last, AFTER][0])
            yield self._as_row("edit", site, [difference], first=row)
        logits = values[LOGITS, BEFORE]
        differences = []
        wrong: list[float] = []
        for row, run in enumerate(runs):
            actual = of_row(logits, row)
            differences.append(_difference(actual, run.logits[0, -len(actual) :]))
            tokens = actual.argmax(dim=-1).tolist()
            if row == 0:
                tokens[FORCED_STEP] = self.forced
            wrong.append(float(tokens != result.rows[row][-N_NEW_TOKENS:]))
        yield self._as_row("logits", LOGITS, differences)
        yield self._as_row("token", LOGITS, wrong)

    def _as_row(
        self, compared: str, site: Site, differences: list[float], first: int = 0
    ) -> dict[str, Any]:
        largest = max(differences)
        tolerance = TOLERANCES[self.dtype]
        return {
            "compared": compared,
            "site": str(site),
            "block": self.n_blocks - 1,
            "row": first + differences.index(largest),
            "difference": largest,
            "tolerance": tolerance,
            "holds": largest <= tolerance,
        }


def of_row(captured: Captured, row: int) -> Tensor:
    """Returns the values [pos, ...] of a row, without padding."""
    index = captured.rows.index(row)
    assert captured.positions is not None
    return captured.values[index][captured.positions[index] >= 0]


def _difference(values: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest value; infinite where there is none."""
    if values.shape != expected.shape:
        return float("inf")
    values, expected = values.cpu().double(), expected.cpu().double()
    if not (values.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    largest = expected.abs().max().clamp_min(1e-30)
    return float((values - expected).abs().max() / largest)


# ---- the reference


def count_blocks(lm: LM) -> int:
    """Returns the smallest number of first blocks, at least two, that has one of each kind."""
    kinds = [_kind(lm, layer) for layer in range(lm.n_layers)]
    new = [kinds.index(kind) for kind in kinds]
    return min(lm.n_layers, max(2, max(new) + 1))


def _kind(lm: LM, layer: int) -> tuple[Any, ...]:
    """What tells the blocks of a model apart: its settings by block, modules and weights."""
    block = lm.submodule(lm.family.block.format(layer=layer))
    settings = [values[layer] for _, values in settings_by_block(text_config(lm.config))]
    modules = [type(module) for module in block.modules()]
    weights = [(name, weight.shape) for name, weight in block.named_parameters()]
    return str(settings), tuple(modules), tuple(weights)


def settings_by_block(config: Any) -> list[tuple[str, list[Any]]]:
    """Returns the settings of a configuration that have a value for each block."""
    count = config.num_hidden_layers
    settings: list[tuple[str, list[Any]]] = []
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            settings.append((name, list(value)))
    return settings


def _windows(config: Any) -> list[int]:
    """The sliding windows of a model."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return [window] if window and "sliding_attention" in types else []


def read_blocks(lm: LM, count: int, dtype: torch.dtype) -> LM:
    """Returns the model of an engine as transformers reads it, with its first blocks only."""
    engine = lm.engine
    assert engine is not None
    config = copy.deepcopy(lm.config)
    text = text_config(config)
    for name, values in settings_by_block(text):
        setattr(text, name, values[:count])
    text.num_hidden_layers = count
    options = {name: engine.arguments.get(name) for name in ("revision", "trust_remote_code")}
    try:
        model = auto_class(config).from_pretrained(
            engine.source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",  # others leave out the soft-cap of scores
            **{name: value for name, value in options.items() if value is not None},
        )
    except Exception as error:
        raise Unsupported(
            f"{lm.name} cannot be read by transformers here, so that what vLLM computes cannot be "
            f"proved: {error}"
        ) from error
    return LM(model.eval(), lm.tokenizer, lm.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what transformers says of the weights of other blocks."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with hidden_progress_bars():
            yield
    finally:
        logging.set_verbosity(level)
