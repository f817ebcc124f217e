"""The tuned lens: an affine translator for each layer, for a better reading of its states."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import (
    check_arguments,
    check_file,
    check_integer,
    check_number,
    check_prompts,
    check_seed,
)
from ..errors import BadFile, BadHook, BadPrompt
from ..files.untrusted import check_strings, parse_json, read_tensors
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.next_token import kl_divergence
from ..models.prompts import Prompts, as_rows
from ..models.provenance import about_model, weights_hash
from ..models.sites import Site, SitesLike
from ..models.training import refuse_no_gradient
from ..runs.forward import forward
from .logit_lens import stream_sites
from .model_end import ModelEnd, model_end_of

BATCH = 8  # windows that run together
# of the states' mean square; each layer takes the strength that is best on held-out text
RIDGE = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.1  # of the windows
JUDGED = 10  # steps between two evaluations on held-out text


@dataclass(frozen=True, eq=False)
class TunedLens:
    """An affine translator for each site: state + state @ change + offset.

    Made by `train_lens`, used by `logit_lens`.

    change    site -> [d_model, d_model], and offset: site -> [d_model], both on the CPU
    history   the mean KL(final ‖ lens) on held-out text at each site, before training (the logit
              lens) and after, in nats
    about     the model, and how the lens was trained
    """

    change: Mapping[str, Float[Tensor, "d_model d_model"]]
    offset: Mapping[str, Float[Tensor, " d_model"]]
    history: pd.DataFrame
    about: Mapping[str, object] = field(default_factory=dict)

    def translated(
        self, site: Site, states: Float[Tensor, "state d_model"]
    ) -> Float[Tensor, "state d_model"]:
        """Returns the states as the final norm is to read them."""
        if str(site) not in self.change:
            raise BadHook(
                f"this tuned lens was not trained at {site}: it has {', '.join(self.change)}"
            )
        change = self.change[str(site)].to(states)
        return states + states @ change + self.offset[str(site)].to(states)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the lens to a safetensors file, with its history and the model that it is for."""
        from ..files.tensors import save_tensors

        tensors = {f"change/{site}": tensor for site, tensor in self.change.items()}
        tensors |= {f"offset/{site}": tensor for site, tensor in self.offset.items()}
        about = {
            "about": json.dumps(dict(self.about)),
            "history": self.history.to_json(orient="records"),
        }
        return save_tensors(tensors, path, about=about)


@check_arguments
def load_lens(path: str | os.PathLike[str], *, lm: LM | None = None) -> TunedLens:
    """The tuned lens that `save` wrote.

    Raises `BadHook` if `lm` is given and its weights are not those that the lens was trained on.

    >>> small = hk.tiny("llama")
    >>> lens = train_lens(small, [list(range(2, 90))], window=16, steps=2, progress=False)
    >>> load_lens(lens.save("lens.safetensors"), lm=small).history.columns.tolist()
    ['site', 'layer', 'kl_before', 'kl_after']
    """
    tensors, words = read_tensors(check_file(path))
    if "history" not in words or "about" not in words:
        raise BadHook(f"{os.fspath(path)!r} is no tuned lens: it was not written by TunedLens.save")
    name = f"the tuned lens in {os.fspath(path)!r}"
    about = parse_json(words["about"], name, finite=False)
    about = check_strings(about, ("weights_sha256", "model"), name)
    if "weights_sha256" not in about:
        raise BadFile(
            f"{name} does not say which model it is for: give a file that TunedLens.save wrote"
        )
    if lm is not None and about["weights_sha256"] != weights_hash(lm):
        model = about.get("model")
        raise BadHook(
            f"the lens in {path} was trained on {model!r}, whose weights are not those of "
            f"{lm.name!r}"
        )
    history = _read_history(parse_json(words["history"], name), name)
    sites = list(history["site"])
    change = _tensors_of(tensors, "change/", sites, name)
    offset = _tensors_of(tensors, "offset/", sites, name)
    _check_shapes(list(change.values()), list(offset.values()), name)
    return TunedLens(change, offset, history, about)


def _read_history(rows: Any, name: str) -> pd.DataFrame:
    """Returns the table of a lens's training, after checking its columns."""
    columns = ["site", "layer", "kl_before", "kl_after"]
    valid = isinstance(rows, list) and bool(rows)
    if not valid or any(not isinstance(row, dict) or list(row) != columns for row in rows):
        raise BadFile(
            f"{name} has a history of other columns than {', '.join(columns)}: it was changed"
        )
    return pd.DataFrame(rows, columns=columns)


def _tensors_of(
    tensors: Mapping[str, Tensor], prefix: str, sites: list[Any], name: str
) -> dict[str, Tensor]:
    """Returns the tensors whose names have this prefix, by site, in the order of the history."""
    by_site = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            by_site[key.removeprefix(prefix)] = tensor
    if set(by_site) != set(sites):
        raise BadFile(
            f"{name} has translators of other sites than its history names: it was changed"
        )
    return {site: by_site[site] for site in dict.fromkeys(sites)}


def _check_shapes(changes: list[Tensor], offsets: list[Tensor], name: str) -> None:
    """Raises `BadFile` if the tensors are not affine translators."""
    widths = {tuple(tensor.shape) for tensor in offsets}
    width = next(iter(widths))
    squares = {tuple(tensor.shape) for tensor in changes}
    if len(widths) != 1 or len(width) != 1 or squares != {width * 2}:
        raise BadFile(f"{name} has tensors that are no affine translators: it was changed")


@check_arguments
def train_lens(
    lm: LM,
    texts: Prompts,
    *,
    sites: SitesLike = "resid_post",
    window: int = 128,
    steps: int = 100,
    states: int = 8,
    lr: float = 2e-4,
    seed: int = 0,
    progress: bool | None = None,
) -> TunedLens:
    """A tuned lens for this model, trained on these texts.

    The texts are cut into windows of `window` tokens; the last tenth of them is held out. Each
    translator starts as the ridge regression of the model's last state on the site's (positions are
    weighted by the scale of the final norm), whose strength is selected on held-out text. Then
    `steps` steps of Adam lower KL(final ‖ lens), each on `states` positions of every site. The
    result has at each site the translator that was best on held-out text, which may be the logit
    lens itself. `seed` is the seed of all draws. `progress` shows a bar; the default is to show it
    in a terminal.

    Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens"; the
    start: Din et al. 2023, "Jump to Conclusions".
    """
    from tqdm.auto import tqdm

    refuse_no_gradient(lm)
    for name, value, least in (("window", window, 2), ("steps", steps, 1), ("states", states, 1)):
        check_integer(value, name, least=least, error=BadHook)
    check_number(lr, "lr", above=0.0, meaning="the length of a step,")
    check_seed(seed)
    end = Site("resid_post", lm.n_layers - 1)
    trained = [site for site in stream_sites(lm, sites) if site != end]
    windows = _windows(lm, texts, window)
    n_held_out = max(1, int(len(windows) * HELD_OUT))
    train, test = windows[:-n_held_out], windows[-n_held_out:]
    draws = torch.Generator().manual_seed(seed)
    total = -(-len(train) // BATCH) + steps
    hidden = None if progress is None else not progress
    with tqdm(total=total, disable=hidden, desc="tuned lens") as bar:
        trainer = _Trainer(lm, (*trained, end), model_end_of(lm, (), ()), bar)
        trainer.draw_test_states(test, 4 * states, draws)
        kl_before = trainer.best.kl
        trainer.fit_ridge(train)
        trainer.descend(train, steps, states, lr, draws)
    best, names = trainer.best, list(map(str, trained))
    history = pd.DataFrame(
        {
            "site": names,
            "layer": [site.layer for site in trained],
            "kl_before": kl_before.tolist(),
            "kl_after": best.kl.tolist(),
        }
    )
    about = {
        **about_model(lm),
        "weights_sha256": weights_hash(lm),
        "windows": len(train),
        "window": window,
        "steps": steps,
        "states": states,
        "lr": lr,
        "seed": seed,
    }
    change = dict(zip(names, best.change, strict=True))
    return TunedLens(change, dict(zip(names, best.offset, strict=True)), history, about)


def _windows(lm: LM, texts: Prompts, window: int) -> list[list[int]]:
    windows = []
    for row in as_long_rows(lm, texts):
        for start in range(0, len(row), window):
            if len(row) - start > 1:
                windows.append(list(row[start : start + window]))
    if len(windows) < 2:
        raise BadPrompt(
            f"the texts make {len(windows)} windows of {window} tokens: give more text, a tenth is "
            "held out"
        )
    return windows


def as_long_rows(lm: LM, texts: Prompts) -> Sequence[Sequence[int]]:
    """Returns the tokens of texts of any length."""
    rows: list[Sequence[int]] = []
    for text in check_prompts(texts):
        if isinstance(text, str) and lm.tokenizer is not None:
            rows.append(lm.encode(text))
        else:
            rows.append(as_rows(lm, [text])[0])  # raises if it cannot be read
    return rows


def _batches(windows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(windows), BATCH):
        yield list(windows[start : start + BATCH])


@dataclass(eq=False)
class _Best:
    """The translators that were best on held-out text, site by site, and their mean KL.

    Owned by a `_Trainer`; `offer` changes it.
    """

    change: Float[Tensor, "site d_model d_model"]
    offset: Float[Tensor, "site d_model"]
    kl: Float[Tensor, " site"]

    def offer(self, change: Tensor, offset: Tensor, kl: Tensor) -> None:
        """Takes the translators that are better."""
        better = kl < self.kl
        self.change[better], self.offset[better] = change.detach()[better], offset.detach()[better]
        self.kl = torch.where(better, kl, self.kl)


@dataclass(eq=False)
class _Trainer:
    """The training of one lens: its sites, the last of which is the end, and the best translators.

    `train_lens` owns it for the time of the training.
    """

    lm: LM
    sites: tuple[Site, ...]
    tail: ModelEnd
    bar: Any
    test: Tensor = field(init=False)  # [site, state, d_model], held out
    best: _Best = field(init=False)

    def states(self, windows: Sequence[list[int]]) -> Float[Tensor, "site state d_model"]:
        """Returns the states at every site, of all tokens of some windows."""
        run = forward(self.lm, windows, capture(list(self.sites)), logits=False)
        end = run.captured(self.sites[-1])
        assert end.positions is not None
        device = end.values.device
        real = (end.positions >= 0).to(device)
        return torch.stack([run[site].to(device)[real].float() for site in self.sites])

    def draw_test_states(
        self, windows: Sequence[list[int]], count: int, draws: torch.Generator
    ) -> None:
        """Draws the held-out states, and evaluates the logit lens on them."""
        states = self.states(windows)
        self.test = states[:, torch.randperm(states.shape[1], generator=draws)[:count]]
        sites, width = len(self.sites) - 1, states.shape[-1]
        change, offset = states.new_zeros(sites, width, width), states.new_zeros(sites, width)
        self.best = _Best(change, offset, self.evaluate(change, offset))

    def evaluate(self, change: Tensor, offset: Tensor) -> Float[Tensor, " site"]:
        """Returns the mean KL of each site on the held-out states."""
        means = []
        with torch.no_grad():
            final = self._logprobs(self.test[-1])
            for number, states in enumerate(self.test[:-1]):
                translated = states + states @ change[number] + offset[number]
                means.append(kl_divergence(final, self._logprobs(translated)).mean())
        return torch.stack(means)

    def _logprobs(self, states: Tensor) -> Tensor:
        dtype = getattr(self.lm.root, "dtype", torch.float32)
        return self.tail.logits(states.to(dtype)).float().log_softmax(-1)

    def fit_ridge(self, windows: Sequence[list[int]]) -> None:
        """Offers the ridge regressions of the last state's change on each site's state."""
        square, cross = self._moments(windows)
        width = square.shape[-1] - 1
        mean = square.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
        for ridge in RIDGE:
            strength = torch.diag_embed((ridge * mean)[:, None].expand(-1, width + 1))
            strength[:, -1, -1] = 0  # the offset is free
            solutions = []
            for left, right in zip(square + strength, cross, strict=True):
                solutions.append(torch.cholesky_solve(right, torch.linalg.cholesky(left)))
            solution = torch.stack(solutions).float().to(self.test.device)
            change, offset = solution[:, :-1], solution[:, -1]
            self.best.offer(change, offset, self.evaluate(change, offset))

    def _moments(self, windows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns the sums of products of each site's states with themselves and with the change to
        the last state, each state with a 1 for the offset."""
        sites, width = len(self.sites) - 1, self.test.shape[-1]
        square = torch.zeros(sites, width + 1, width + 1, dtype=torch.float64)
        cross = torch.zeros(sites, width + 1, width, dtype=torch.float64)
        for batch in _batches(windows):
            states = self.states(batch).cpu()
            weight = states[-1].square().mean(-1).rsqrt()[:, None]  # the final norm's scale
            for number in range(sites):
                padded = torch.nn.functional.pad(states[number], (0, 1), value=1.0) * weight
                square[number] += (padded.T @ padded).double()
                cross[number] += (padded.T @ ((states[-1] - states[number]) * weight)).double()
            self.bar.update()
        return square, cross

    def descend(
        self,
        windows: Sequence[list[int]],
        steps: int,
        count: int,
        lr: float,
        draws: torch.Generator,
    ) -> None:
        """Lowers the KL by gradient descent, from the best translators so far."""
        # the offset is in units of the root mean square of a state's numbers
        unit = self.test[:-1].square().mean((1, 2)).sqrt()[:, None]
        change = self.best.change.clone().requires_grad_()
        shift = (self.best.offset / unit).requires_grad_()
        optimizer = torch.optim.Adam([change, shift], lr=lr)
        for step in range(steps):
            window = windows[int(torch.randint(len(windows), (), generator=draws))]
            states = self.states([window])
            states = states[:, torch.randperm(states.shape[1], generator=draws)[:count]]
            with torch.no_grad():
                final = self._logprobs(states[-1])
            with torch.enable_grad():
                translated = states[:-1] + torch.bmm(states[:-1], change) + (shift * unit)[:, None]
                logprobs = self._logprobs(translated.flatten(0, 1))
                loss = kl_divergence(final.repeat(len(translated), 1), logprobs).mean()
                change.grad, shift.grad = torch.autograd.grad(loss, [change, shift])
            optimizer.step()
            if (step + 1) % JUDGED == 0 or step + 1 == steps:
                kl = self.evaluate(change, shift.detach() * unit)
                self.best.offer(change, shift * unit, kl)
            self.bar.update()
            self.bar.set_postfix_str(f"KL {float(loss.detach()):.3f}", refresh=False)
