"""Run: the result of one `hk.forward` or one `hk.generate`."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..display import render_html
from ..errors import NotCaptured, Unsupported
from ..files.atomic import save_tensors
from ..hooks.base import Hook
from ..hooks.capture import Captured, Captures
from ..models.lm import LM
from ..models.sites import AnySite, Sites
from .texts import CaptureStore
from .trace import GenerationRecord


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The result of one forward or one generate.

    tokens          [row, pos]   ids, with the generated ones; shorter rows are padded at the end
    mask            [row, pos]   True for real tokens
    prompt_rows     the prompt of each row (several rows have one prompt if num_return_sequences is
                    more than 1)
    prompt_lengths  the number of tokens of each row that are its prompt
    output          what transformers returned
    arguments       the arguments of generate that were passed on to transformers
    recorded        the record of each step of a generate with trace=, for `decoding` and
                    `decisions`
    """

    lm: LM
    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    prompt_rows: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    hooks: tuple[Hook, ...]
    captures: Captures
    kept_logits: Captured | None
    settings: Mapping[str, Any]
    output: Any
    _captures: CaptureStore | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recorded: GenerationRecord | None = None

    @property
    def logits(self) -> Float[Tensor, "row pos vocab"]:
        """The logits that the model returned, after every edit.

        Of a forward [row, pos, vocab], with one position for logits="last". Of a generate
        [row, step, vocab]: the logits that chose each generated token.
        """
        return self.captured_logits().values

    def captured_logits(self) -> Captured:
        """Returns the logits with their positions; `NotCaptured` if the run has none."""
        if self.kept_logits is None:
            raise NotCaptured(
                "this run kept no logits: it was made with logits=False; make it with logits='all'"
            )
        return self.kept_logits

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return self.mask.sum(dim=1).tolist()

    @cached_property
    def text(self) -> list[str]:
        """Each row as text, with special tokens."""
        rows = zip(self.tokens.tolist(), self.lengths, strict=True)
        return [self.lm.text(row[:length]) for row, length in rows]

    @cached_property
    def generated(self) -> list[str]:
        """The text that the model wrote after each prompt; empty for a forward.

        The prompt's text, followed by this, is `text`.
        """
        rows = zip(self.tokens.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [self.lm.added(row[:start], row[start:end]) for row, start, end in rows]

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        """The captured values at a site [row, pos, ...].

        `run[site, name]` if several captures were at the site.
        """
        return self.captures[key]

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """Returns the captured values at a site, with their rows and positions."""
        return self.captures.captured(site, name)

    @property
    def sites(self) -> Sites:
        """The sites that were captured."""
        return self.captures.sites

    def stack(self, name: str) -> Tensor:
        """Returns the values of every captured layer of a site: [layer, row, pos, ...].

        `name` is the site without its layer, such as "resid_post".
        """
        return self.captures.stack(name)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the captured values by site, or by site and name if the capture has a name."""
        tensors = {}
        for captured in self.captures.all:
            key = str(captured.site)
            if captured.name:
                key = f"{key}/{captured.name}"
            tensors[key] = captured.values
        return tensors

    def tensor_words(self) -> dict[str, str]:
        """Returns how the run was made, as text for a file of tensors.

        The same run gives the same text.
        """
        facts = {name: value for name, value in self.about.items() if name != "seconds"}
        return {"about": json.dumps(facts)}

    def save_tensors(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
    ) -> Path:
        """Writes the captured values to a safetensors file and returns the file's path.

        The file also holds how the run was made, and the texts in `about`.
        `hk.results.load_tensors` reads the values back. If several processes hold a split model
        together, only the first writes.
        """
        if not self.lm.is_writer:
            return Path(path)
        return save_tensors(self.tensors(), path, about={**self.tensor_words(), **(about or {})})

    @cached_property
    def log(self) -> pd.DataFrame:
        """Where each hook fired.

        Columns: hook, do, site, forward, row, positions, numbers, changed.
        """
        assert self._captures is not None
        log = self._captures.log()
        # a run that `dataclasses.replace` made may have fewer hooks than those that acted
        return pd.DataFrame(log[log["hook"] < len(self.hooks)]).reset_index(drop=True)

    @cached_property
    def about(self) -> dict[str, Any]:
        """How the run was made: model, versions, prompts, hooks and settings, ready for JSON."""
        from ..models.provenance import about_model

        rows = zip(self.tokens.tolist(), self.prompt_lengths, strict=True)
        prompts = [self.lm.text(row[:length]) for row, length in rows]
        hooks = [hook.to_json(tensors="digest") for hook in self.hooks]
        return {**about_model(self.lm), "prompts": prompts, "hooks": hooks, **self.settings}

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which has the log itself and not the firings."""
        return {**self.__dict__, "log": self.log, "_captures": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Run":
        """A run with values of its own, and the same model and hooks."""
        for shared in (self.lm, self.hooks):
            memo[id(shared)] = shared
        new = object.__new__(type(self))
        memo[id(self)] = new
        try:
            new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        except RuntimeError as error:
            if "deepcopy protocol" not in str(error):
                raise
            raise Unsupported(
                "this run's values are on the path of a gradient, which torch cannot copy: copy "
                "what you need of it, such as run.logits.detach().clone()"
            ) from error
        return new

    def _ipython_key_completions_(self) -> list[str]:
        """The keys that a notebook offers after `run["`."""
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {}
        if self.kept_logits is not None:
            facts["logits"] = str(list(self.kept_logits.values.shape))
        if self.hooks:
            facts["hooks"] = "; ".join(map(str, self.hooks))
        if len(self.sites):
            facts["captured"] = f"{self.sites}"
        rows: list[dict[str, object]] = []
        for row, text in enumerate(self.text):
            cells: dict[str, object] = {"row": row, "tokens": self.lengths[row], "text": repr(text)}
            if any(self.generated):
                cells["written"] = repr(self.generated[row])
            rows.append(cells)
        return render_html(f"Run: {self.settings.get('verb', '')}", facts, rows)

    def __repr__(self) -> str:
        rows = "1 row" if len(self.lengths) == 1 else f"{len(self.lengths)} rows"
        logits = "no logits"
        if self.kept_logits is not None:
            logits = f"logits {list(self.kept_logits.values.shape)}"
        return f"Run({rows} of up to {max(self.lengths)} tokens; {logits}; captured {self.sites})"
