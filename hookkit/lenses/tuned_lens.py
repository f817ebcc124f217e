"""The tuned lens: an affine translator for each layer, for a better reading of its states."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_integer, check_number, check_seed, shorten
from ..display import count_of, describe_outcome, progress_bar
from ..errors import BadFile, BadHook, BadPrompt
from ..files.untrusted import check_file, check_mapping, parse_json, read_tensors
from ..hooks.capture import capture
from ..models.lm import LM, refuse_no_gradient
from ..models.next_token import kl_divergence
from ..models.prompt_row import Row, piece_of_row
from ..models.prompts import Prompts, as_rows
from ..models.provenance import about_model, weights_hash
from ..models.sites import Site, SitesLike
from ..runs.forward import forward
from ..runs.model_end import model_end_of
from .jacobian_lens import PUBLISHED, JacobianLens, read_jacobian, read_published
from .logit_lens import stream_sites

BATCH = 8  # windows that run together
# of the states' mean square; each layer takes the strength that is best on held-out text
RIDGE = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.1  # of the windows
JUDGED = 10  # steps between two evaluations on held-out text
HISTORY = ["site", "layer", "kl_before", "kl_after"]  # the columns of `TunedLens.history`


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

    def __repr__(self) -> str:
        sites = shorten(", ".join(self.change))
        text = f"TunedLens({count_of(len(self.change), 'site')}: {sites})"
        return describe_outcome(text, "hk.logit_lens(lm, prompts, lens=lens)", "lens.history")

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
        from ..files.atomic import save_tensors

        tensors = {f"change/{site}": tensor for site, tensor in self.change.items()}
        tensors |= {f"offset/{site}": tensor for site, tensor in self.offset.items()}
        # DataFrame.to_json would make a ValueError of Ctrl-C
        history = self.history.astype(object).where(self.history.notna(), None).to_dict("records")
        about = {"about": json.dumps(dict(self.about)), "history": json.dumps(history)}
        return save_tensors(tensors, path, about=about)


@check_arguments
def load_lens(path: str | os.PathLike[str], *, lm: LM | None = None) -> TunedLens | JacobianLens:
    """The tuned lens or the Jacobian lens that `save` wrote, or a published Jacobian lens.

    A file whose name ends in .pt is a lens of anthropics/jacobian-lens or of TransformerLens. It is
    unpickled with `weights_only=True`, and does not say which weights it is for. For other files,
    `BadHook` is raised if `lm` is given and its weights are not those that the lens was fitted on.

    >>> small = hk.tiny("llama")
    >>> lens = train_lens(small, [list(range(2, 90))], window=16, steps=2, progress=False)
    >>> load_lens(lens.save("lens.safetensors"), lm=small).history.columns.tolist()
    ['site', 'layer', 'kl_before', 'kl_after']
    """
    file = check_file(path)
    if file.suffix == PUBLISHED:
        return read_published(file, lm)
    tensors, words = read_tensors(file)
    if "jacobian" in words:
        name = f"the lens in {os.fspath(path)!r}"
        return read_jacobian(tensors, words["jacobian"], name, lm)
    if "history" not in words or "about" not in words:
        raise BadHook(
            f"{os.fspath(path)!r} is no lens: neither TunedLens.save nor JacobianLens.save wrote it"
        )
    name = f"the tuned lens in {os.fspath(path)!r}"
    about = _read_about(words["about"], name)
    if lm is not None and about["weights_sha256"] != weights_hash(lm):
        model = about.get("model")
        raise BadHook(
            f"the lens in {path} was trained on {model!r}, whose weights are not those of "
            f"{lm.name!r}"
        )
    history = _read_history(parse_json(words["history"], name), name)
    change, offset = _read_translators(tensors, list(history["site"]), name)
    return TunedLens(change, offset, history, about)


def _read_about(text: str, name: str) -> dict[str, Any]:
    """Returns what a lens says about its model. Raises `BadFile` if it does not say which."""
    about = check_mapping(parse_json(text, name, finite=False), name, "weights_sha256", "model")
    if "weights_sha256" not in about:
        raise BadFile(
            f"{name} does not say which model it is for: give a file that TunedLens.save wrote"
        )
    return about


def _read_history(rows: Any, name: str) -> pd.DataFrame:
    """Returns the table of a lens's training, after checking its columns."""
    valid = isinstance(rows, list) and bool(rows)
    if not valid or any(not isinstance(row, dict) or list(row) != HISTORY for row in rows):
        raise BadFile(
            f"{name} has a history of other columns than {', '.join(HISTORY)}: it was changed"
        )
    return pd.DataFrame(rows, columns=HISTORY)


def _read_translators(
    tensors: Mapping[str, Tensor], sites: list[Any], name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the changes and the offsets by site, in the order of the history, after checking that
    they are affine translators."""
    translators: list[dict[str, Tensor]] = []
    for prefix in ("change/", "offset/"):
        keys = [key for key in tensors if key.startswith(prefix)]
        if {key.removeprefix(prefix) for key in keys} != set(sites):
            raise BadFile(
                f"{name} has translators of other sites than its history names: it was changed"
            )
        translators.append({site: tensors[f"{prefix}{site}"] for site in dict.fromkeys(sites)})
    change, offset = translators
    width = offset[sites[0]].numel()
    shapes = {(*square.shape, *offset[site].shape) for site, square in change.items()}
    if shapes != {(width, width, width)}:
        raise BadFile(f"{name} has tensors that are no affine translators: it was changed")
    return change, offset


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
    refuse_no_gradient(lm)
    check_integer(window, "window", least=2, error=BadHook)
    check_integer(steps, "steps", least=1, error=BadHook)
    check_integer(states, "states", least=1, error=BadHook)
    check_number(lr, "lr", above=0.0, meaning="the length of a step,")
    check_seed(seed)
    end = Site("resid_post", lm.n_layers - 1)
    trained = [site for site in stream_sites(lm, sites) if site != end]
    windows = _windows(lm, texts, window)
    n_held_out = max(1, int(len(windows) * HELD_OUT))
    train, test = windows[:-n_held_out], windows[-n_held_out:]
    total = -(-len(train) // BATCH) + steps
    with progress_bar(progress, total=total, desc="tuned lens") as bar:
        draws = torch.Generator().manual_seed(seed)
        trainer = _Trainer(lm, (*trained, end), test, 4 * states, draws, bar)
        kl_before = trainer.kl
        trainer.fit_ridge(train)
        trainer.descend(train, steps, states, lr)
    names, layers = list(map(str, trained)), [site.layer for site in trained]
    rows = zip(names, layers, kl_before.tolist(), trainer.kl.tolist(), strict=True)
    history = pd.DataFrame(rows, columns=HISTORY)
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
    change = dict(zip(names, trainer.change, strict=True))
    return TunedLens(change, dict(zip(names, trainer.offset, strict=True)), history, about)


def _windows(lm: LM, texts: Prompts, window: int) -> list[Row]:
    windows: list[Row] = []
    for row in as_rows(lm, texts):
        for start in range(0, len(row) - 1, window):
            windows.append(piece_of_row(row, 0, start, start + window))
    if len(windows) < 2:
        raise BadPrompt(
            f"the texts make {len(windows)} windows of {window} tokens: give more text, a tenth is "
            "held out"
        )
    return windows


class _Trainer:
    """The training of one lens: its sites, the last of which is the end, and the held-out states.

    It owns the translators that were best on held-out text, site by site: `change` [site, d_model,
    d_model], `offset` [site, d_model] and their mean KL, `kl` [site]. At first they are the logit
    lens. `train_lens` owns the trainer for the time of the training.
    """

    def __init__(
        self,
        lm: LM,
        sites: tuple[Site, ...],
        test_windows: Sequence[Row],
        n_test_states: int,
        draws: torch.Generator,
        bar: Any,
    ) -> None:
        self.lm, self.sites, self.draws, self.bar = lm, sites, draws, bar
        self.model_end = model_end_of(lm, (), ())
        self.test = self.draw_states(test_windows, n_test_states)
        n_sites, width = len(sites) - 1, self.test.shape[-1]
        self.change = self.test.new_zeros(n_sites, width, width)
        self.offset = self.test.new_zeros(n_sites, width)
        self.kl = self.evaluate(self.change, self.offset)

    def states(self, windows: Sequence[Row]) -> Float[Tensor, "site state d_model"]:
        """Returns the states at every site, of all tokens of some windows."""
        run = forward(self.lm, windows, capture(list(self.sites)), logits=False)
        end = run.captured(self.sites[-1])
        assert end.positions is not None
        device = end.values.device
        real = (end.positions >= 0).to(device)
        return torch.stack([run[site].to(device)[real].float() for site in self.sites])

    def draw_states(
        self, windows: Sequence[Row], count: int
    ) -> Float[Tensor, "site state d_model"]:
        """Returns the states at every site, of some random tokens."""
        states = self.states(windows)
        return states[:, torch.randperm(states.shape[1], generator=self.draws)[:count]]

    def evaluate(self, change: Tensor, offset: Tensor) -> Float[Tensor, " site"]:
        """Returns the mean KL of each site on the held-out states."""
        means = []
        with torch.no_grad():
            final = self._logprobs(self.test[-1])
            for number, states in enumerate(self.test[:-1]):
                translated = states + states @ change[number] + offset[number]
                means.append(kl_divergence(final, self._logprobs(translated)).mean())
        return torch.stack(means)

    def offer(self, change: Tensor, offset: Tensor) -> None:
        """Takes the translators of those sites at which they are better."""
        kl = self.evaluate(change, offset)
        better = kl < self.kl
        self.change[better], self.offset[better] = change[better], offset[better]
        self.kl = torch.where(better, kl, self.kl)

    def _logprobs(self, states: Tensor) -> Tensor:
        dtype = getattr(self.lm.root, "dtype", torch.float32)
        return self.model_end.logits(states.to(dtype)).float().log_softmax(-1)

    def fit_ridge(self, windows: Sequence[Row]) -> None:
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
            self.offer(solution[:, :-1], solution[:, -1])

    def _moments(self, windows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Returns the sums of products of each site's states with themselves and with the change to
        the last state, each state with a 1 for the offset."""
        sites, width = len(self.sites) - 1, self.test.shape[-1]
        square = torch.zeros(sites, width + 1, width + 1, dtype=torch.float64)
        cross = torch.zeros(sites, width + 1, width, dtype=torch.float64)
        for start in range(0, len(windows), BATCH):
            states = self.states(windows[start : start + BATCH]).cpu()
            weight = states[-1].square().mean(-1).rsqrt()[:, None]  # the final norm's scale
            for number in range(sites):
                padded = torch.nn.functional.pad(states[number], (0, 1), value=1.0) * weight
                square[number] += (padded.T @ padded).double()
                cross[number] += (padded.T @ ((states[-1] - states[number]) * weight)).double()
            self.bar.update()
        return square, cross

    def descend(self, windows: Sequence[Row], steps: int, n_states: int, lr: float) -> None:
        """Lowers the KL by gradient descent, from the best translators so far."""
        # the offset is in units of the root mean square of a state's numbers
        unit = self.test[:-1].square().mean((1, 2)).sqrt()[:, None]
        change = self.change.clone().requires_grad_()
        shift = (self.offset / unit).requires_grad_()
        optimizer = torch.optim.Adam([change, shift], lr=lr)
        for step in range(steps):
            window = windows[int(torch.randint(len(windows), (), generator=self.draws))]
            states = self.draw_states([window], n_states)
            with torch.no_grad():
                final = self._logprobs(states[-1])
            with torch.enable_grad():
                translated = states[:-1] + torch.bmm(states[:-1], change) + (shift * unit)[:, None]
                logprobs = self._logprobs(translated.flatten(0, 1))
                loss = kl_divergence(final.repeat(len(translated), 1), logprobs).mean()
                change.grad, shift.grad = torch.autograd.grad(loss, [change, shift])
            optimizer.step()
            if (step + 1) % JUDGED == 0 or step + 1 == steps:
                self.offer(change.detach(), shift.detach() * unit)
            self.bar.update()
            self.bar.set_postfix_str(f"KL {float(loss.detach()):.3f}", refresh=False)
