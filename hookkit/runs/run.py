"""Run: all that came of one forward or one generate.

What forward and generate are asked alike: which logits to keep, of a model that they can run.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..display import shown
from ..errors import EmptySelection, NotCaptured, Unsupported
from ..files.tensors import save_tensors
from ..hooks.base import Hook
from ..hooks.captured_values import Captured, Captures
from ..models.lm import LM
from ..models.sites import AnySite, Sites
from .outcomes import CaptureStore
from .trace import Recorded


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What one forward or generate gave.

    tokens          [row, pos]   ids, the generated ones included; a shorter row is filled up at its end
    mask            [row, pos]   True for real tokens
    prompt_rows     the prompt that each row is of (several rows are of one prompt where several sequences return)
    prompt_lengths  how many tokens of each row are its prompt
    output          what transformers returned
    arguments       what generate was given for transformers
    recorded        the record of each step of a generate with trace=, for `decoding` and `decisions`
    """

    lm: LM
    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    prompt_rows: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    hooks: tuple[Hook, ...]
    kept: Captures
    kept_logits: Captured | None
    settings: Mapping[str, Any]
    output: Any
    _keeping: CaptureStore | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recorded: Recorded | None = None

    @property
    def logits(self) -> Float[Tensor, "row pos vocab"]:
        """The logits that the model returned, every edit in them: [row, pos, vocab] of a forward, one position for
        logits="last"; of a generate [row, step, vocab], those that chose each generated token."""
        return self.captured_logits().values

    def captured_logits(self) -> Captured:
        """The logits, with the position at which each stands. `NotCaptured` where the run did not keep them."""
        if self.kept_logits is None:
            raise NotCaptured(
                "this run kept no logits: it was made with logits=False; make it with logits='all'"
            )
        return self.kept_logits

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return self.mask.sum(dim=1).tolist()

    @cached_property
    def text(self) -> list[str]:
        """Each row as text, special tokens included."""
        return [
            self.lm.text(row[:length])
            for row, length in zip(self.tokens.tolist(), self.lengths, strict=True)
        ]

    @cached_property
    def generated(self) -> list[str]:
        """What the model wrote behind each prompt, as text, so that the prompt's text and it are `text`; empty for a
        forward."""
        rows = zip(self.tokens.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [self.lm.added(row[:start], row[start:end]) for row, start, end in rows]

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        """The captured values at a site [row, pos, ...]; `run[site, name]` where several captures kept it."""
        return self.kept[key]

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """The captured values at a site, with their rows and positions."""
        return self.kept.captured(site, name)

    @property
    def sites(self) -> Sites:
        """The sites that were captured."""
        return self.kept.sites

    def stack(self, name: str) -> Tensor:
        """The captured values of every layer of a site, such as "resid_post": [layer, row, pos, ...]."""
        return self.kept.stack(name)

    def tensors(self) -> dict[str, Tensor]:
        """The captured values by site, and by site and name where several captures kept a site."""
        captured = self.kept.all
        return {
            f"{each.site}/{each.name}" if each.name else str(each.site): each.values
            for each in captured
        }

    def tensor_words(self) -> dict[str, str]:
        """How the run was made, as a text that a file of tensors holds; the same run gives the same text."""
        facts = {name: value for name, value in self.about.items() if name != "seconds"}
        return {"about": json.dumps(facts)}

    def save_tensors(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
    ) -> Path:
        """Writes the captured values to a safetensors file, with how the run was made, and returns the file's path.

        `about` adds texts of the user's own. `hk.load_tensors` reads the values back. Of the processes that hold a
        split model together, the first one alone writes.
        """
        if not self.lm.is_writer:
            return Path(path)
        return save_tensors(self.tensors(), path, about={**self.tensor_words(), **(about or {})})

    @cached_property
    def log(self) -> pd.DataFrame:
        """Where each hook fired. Columns: hook, do, site, forward, row, positions, numbers, changed."""
        assert self._keeping is not None
        log = self._keeping.log()
        return pd.DataFrame(log[log["hook"] < len(self.hooks)]).reset_index(drop=True)

    @cached_property
    def about(self) -> dict[str, Any]:
        """How the run was made: model, versions, prompts, hooks, settings; plain values, ready for JSON."""
        from ..models.provenance import about_model

        prompts = [
            self.lm.text(row[:end])
            for row, end in zip(self.tokens.tolist(), self.prompt_lengths, strict=True)
        ]
        hooks = [hook.to_json(tensors="digest") for hook in self.hooks]
        return {**about_model(self.lm), "prompts": prompts, "hooks": hooks, **self.settings}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all but the way to the log, which is written."""
        return {**self.__dict__, "log": self.log, "_keeping": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Run":
        """A run with values of its own, of the same model and the same hooks."""
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
                "this run's values are on the path of a gradient, which torch cannot copy: copy what you need of it, "
                "such as run.logits.detach().clone()"
            ) from error
        return new

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers behind `run["`."""
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {}
        if self.kept_logits is not None:
            facts["logits"] = str(list(self.kept_logits.values.shape))
        facts |= {"hooks": "; ".join(map(str, self.hooks))} if self.hooks else {}
        facts |= {"captured": f"{self.sites}"} if len(self.sites) else {}
        rows: list[dict[str, object]] = []
        for row, text in enumerate(self.text):
            written = {"written": repr(self.generated[row])} if any(self.generated) else {}
            rows.append({"row": row, "tokens": self.lengths[row], "text": repr(text), **written})
        return shown(f"Run: {self.settings.get('verb', '')}", facts, rows)

    def __repr__(self) -> str:
        rows = f"{len(self.lengths)} row{'s' if len(self.lengths) > 1 else ''} of up to {max(self.lengths)} tokens"
        logits = (
            "no logits"
            if self.kept_logits is None
            else f"logits {list(self.kept_logits.values.shape)}"
        )
        return f"Run({rows}; {logits}; captured {self.sites})"


Logits: TypeAlias = Literal["all", "last", "none"] | bool | None

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, whose tensors autograd can use later, also where it is called in torch.inference_mode.

    Whether gradients are on is afterwards as it was, also where Ctrl-C came while torch.no_grad was left.
    """

    @functools.wraps(function)
    def outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        gradients = torch.is_grad_enabled()
        if not torch.is_inference_mode_enabled():
            try:
                return function(*args, **kwargs)
            except BaseException:
                torch.set_grad_enabled(gradients)
                raise
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


def refuse_two_texts(lm: LM) -> None:
    """Raise `Unsupported` for a model that reads one text and writes another."""
    if lm.two_texts:
        raise Unsupported(
            f"{type(lm.root).__name__} is an encoder-decoder, which reads one text and writes another: run it yourself "
            "in a block of hk.attach, with hooks at hk.module(path)"
        )


def wanted_logits(logits: Logits) -> Literal["all", "last", "none"]:
    """Which logits a run is to keep."""
    if logits in ("all", True):
        return "all"
    if logits in ("none", False, None):
        return "none"
    if logits == "last":
        return "last"
    raise EmptySelection(f"logits={logits!r} is unknown: say 'all', 'last' or False")
