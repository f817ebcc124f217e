"""The tuned lens: an affine translator for each layer, so that the model's own end can read states from its midst."""

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

from ..arguments import checks_arguments, file_of, finite_number, prompt_rows, seed_of, whole_number
from ..errors import BadFile, BadHook, BadPrompt
from ..files.untrusted import json_of, strings_of, tensors_in
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.prompts import Prompts, as_rows
from ..models.provenance import about_model, weights_hash
from ..models.sites import Site, SitesLike
from ..models.training import refuse_no_gradient
from ..runs.forward import forward
from .logit_lens import stream_sites
from .model_end import ModelEnd, tail_of

BATCH = 8  # windows that run together
RIDGE = (
    1e-3,
    1e-2,
    1e-1,
    1.0,
)  # of the states' mean square; each layer takes the one that does best on held-out text
HELD_OUT = 0.1  # of the windows
JUDGED = 10  # steps from one look at held-out text to the next


@dataclass(frozen=True, eq=False)
class TunedLens:
    """An affine translator for each site: state + state @ change + offset. Made by `train_lens`, used by `logit_lens`.

    change    site -> [d_model, d_model], and offset: site -> [d_model], both on the CPU
    history   the mean KL(final ‖ lens) on held-out text at each site, before (the logit lens) and after, in nats
    about     the model, and how it was trained
    """

    change: Mapping[str, Float[Tensor, "d_model d_model"]]
    offset: Mapping[str, Float[Tensor, " d_model"]]
    history: pd.DataFrame
    about: Mapping[str, object] = field(default_factory=dict)

    def translated(
        self, site: Site, states: Float[Tensor, "state d_model"]
    ) -> Float[Tensor, "state d_model"]:
        """The states as the final norm is to read them."""
        if str(site) not in self.change:
            raise BadHook(
                f"this tuned lens was not trained at {site}: it has {', '.join(self.change)}"
            )
        change = self.change[str(site)].to(states)
        return states + states @ change + self.offset[str(site)].to(states)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the lens to a safetensors file, with its history and the model that it is for."""
        from ..files.tensors import save_tensors

        tensors = {f"change/{site}": tensor for site, tensor in self.change.items()}
        tensors |= {f"offset/{site}": tensor for site, tensor in self.offset.items()}
        about = {
            "about": json.dumps(dict(self.about)),
            "history": self.history.to_json(orient="records"),
        }
        return save_tensors(tensors, path, about=about)


@checks_arguments
def load_lens(path: str | os.PathLike[str], *, lm: LM | None = None) -> TunedLens:
    """The tuned lens that `save` wrote. `BadHook` where `lm` is given and its weights are not those it was trained on.

    >>> small = hk.tiny("llama")
    >>> lens = train_lens(small, [list(range(2, 90))], window=16, steps=2, progress=False)
    >>> load_lens(lens.save("lens.safetensors"), lm=small).history.columns.tolist()
    ['site', 'layer', 'kl_before', 'kl_after']
    """
    tensors, words = tensors_in(file_of(path))
    if "history" not in words or "about" not in words:
        raise BadHook(f"{os.fspath(path)!r} is no tuned lens: it was not written by TunedLens.save")
    name = f"the tuned lens in {os.fspath(path)!r}"
    about = strings_of(
        json_of(words["about"], name, finite=False), ("weights_sha256", "model"), name
    )
    if "weights_sha256" not in about:
        raise BadFile(
            f"{name} does not say which model it is for: give a file that TunedLens.save wrote"
        )
    if lm is not None and about["weights_sha256"] != weights_hash(lm):
        model = about.get("model")
        raise BadHook(
            f"the lens in {path} was trained on {model!r}, whose weights are not those of {lm.name!r}"
        )
    parts = [
        {
            name.partition("/")[2]: tensor
            for name, tensor in tensors.items()
            if name.startswith(kind)
        }
        for kind in ("change/", "offset/")
    ]
    history = _history(json_of(words["history"], name), name)
    _check_shapes(list(history["site"]), parts[0], parts[1], name)
    order = {site: number for number, site in enumerate(history["site"])}
    change, offset = (
        {site: part[site] for site in sorted(part, key=order.__getitem__)} for part in parts
    )
    return TunedLens(change, offset, history, about)


def _history(rows: Any, name: str) -> pd.DataFrame:
    """The table of a lens's training, as it was."""
    columns = ["site", "layer", "kl_before", "kl_after"]
    if (
        not isinstance(rows, list)
        or not rows
        or any(not isinstance(row, dict) or list(row) != columns for row in rows)
    ):
        raise BadFile(
            f"{name} has a history of other columns than {', '.join(columns)}: it was changed"
        )
    return pd.DataFrame(rows, columns=columns)


def _check_shapes(
    sites: list[Any], change: Mapping[str, Tensor], offset: Mapping[str, Tensor], name: str
) -> None:
    """Raise `BadFile` where the tensors are not an affine translator for each of these sites."""
    if not set(sites) == set(change) == set(offset):
        raise BadFile(
            f"{name} has translators of other sites than its history names: it was changed"
        )
    widths = {tuple(tensor.shape) for tensor in offset.values()}
    width = next(iter(widths))
    square = {tuple(tensor.shape) for tensor in change.values()}
    if len(widths) != 1 or len(width) != 1 or square != {width * 2}:
        raise BadFile(f"{name} has tensors that are no affine translators: it was changed")


@checks_arguments
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
    """A tuned lens for this model, trained on these texts: it reads a state as the model's end would read its last one.

    The texts are cut into windows of `window` tokens; a tenth of them, the last ones, are held out. Each translator
    starts as the ridge regression of the model's last state on the site's (positions weighed by how the final norm will
    scale them), whose strength held-out text chooses. Then `steps` steps of Adam lower KL(final ‖ lens), each on
    `states` positions of every site. What is kept at each site is what did best on held-out text, which may be the
    logit lens itself. Draws start from `seed`. `progress` shows a bar; by default where there is a terminal.

    Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens"; the start: Din et al.
    2023, "Jump to Conclusions".
    """
    from tqdm.auto import tqdm

    refuse_no_gradient(lm)
    for name, value, least in (("window", window, 2), ("steps", steps, 1), ("states", states, 1)):
        whole_number(value, name, least=least, error=BadHook)
    finite_number(lr, "lr", above=0.0, meaning="the length of a step,")
    seed_of(seed)
    end = Site("resid_post", lm.n_layers - 1)
    wanted = [site for site in stream_sites(lm, sites) if site != end]
    windows = _windows(lm, texts, window)
    held = max(1, int(len(windows) * HELD_OUT))
    train, test = windows[:-held], windows[-held:]
    draws = torch.Generator().manual_seed(seed)
    with tqdm(
        total=-(-len(train) // BATCH) + steps, disable=_silent(progress), desc="tuned lens"
    ) as bar:
        trainer = _Trainer(lm, (*wanted, end), tail_of(lm, (), ()), bar)
        trainer.look(test, 4 * states, draws)
        before = trainer.kept.kl
        trainer.start(train)
        trainer.descend(train, steps, states, lr, draws)
    names = [str(site) for site in wanted]
    history = pd.DataFrame({"site": names, "layer": [site.layer for site in wanted]})
    history = history.assign(kl_before=before.tolist(), kl_after=trainer.kept.kl.tolist())
    about = {
        **about_model(lm),
        "weights_sha256": weights_hash(lm),
        "windows": len(train),
        "window": window,
    }
    about |= {"steps": steps, "states": states, "lr": lr, "seed": seed}
    change, offset = trainer.kept.change, trainer.kept.offset
    return TunedLens(
        dict(zip(names, change, strict=True)), dict(zip(names, offset, strict=True)), history, about
    )


def _silent(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _windows(lm: LM, texts: Prompts, window: int) -> list[list[int]]:
    rows = as_long_rows(lm, texts)
    found = [
        list(row[start : start + window]) for row in rows for start in range(0, len(row), window)
    ]
    found = [row for row in found if len(row) > 1]
    if len(found) < 2:
        raise BadPrompt(
            f"the texts make {len(found)} windows of {window} tokens: give more text, a tenth is held out"
        )
    return found


def as_long_rows(lm: LM, texts: Prompts) -> Sequence[Sequence[int]]:
    """The tokens of texts of any length."""
    rows: list[Sequence[int]] = []
    for text in prompt_rows(texts):
        if isinstance(text, str) and lm.tokenizer is not None:
            rows.append(lm.encode(text))
        else:
            rows.append(as_rows(lm, [text])[0])  # raises where it cannot be read
    return rows


def _batches(windows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(windows), BATCH):
        yield list(windows[start : start + BATCH])


@dataclass(eq=False)
class _Best:
    """The translators that did best on held-out text, site by site, and their mean KL."""

    change: Float[Tensor, "site d_model d_model"]
    offset: Float[Tensor, "site d_model"]
    kl: Float[Tensor, " site"]

    def offer(self, change: Tensor, offset: Tensor, kl: Tensor) -> None:
        """Take those that are better."""
        better = kl < self.kl
        self.change[better], self.offset[better] = change.detach()[better], offset.detach()[better]
        self.kl = torch.where(better, kl, self.kl)


@dataclass(eq=False)
class _Trainer:
    """The training of one lens: its sites, the last of which is the end, and what was best so far."""

    lm: LM
    sites: tuple[Site, ...]
    tail: ModelEnd
    bar: Any
    test: Tensor = field(init=False)  # [site, state, d_model], held out
    kept: _Best = field(init=False)

    def states(self, windows: Sequence[list[int]]) -> Float[Tensor, "site state d_model"]:
        """The states at every site, of all tokens of some windows."""
        run = forward(self.lm, windows, capture(list(self.sites)), logits=False)
        end = run.captured(self.sites[-1])
        assert end.positions is not None
        real = (end.positions >= 0).to(end.values.device)
        return torch.stack([run[site].to(end.values.device)[real].float() for site in self.sites])

    def look(self, windows: Sequence[list[int]], count: int, draws: torch.Generator) -> None:
        """Draw the states on which the lens is judged; the logit lens is the first that is."""
        found = self.states(windows)
        self.test = found[:, torch.randperm(found.shape[1], generator=draws)[:count]]
        sites, width = len(self.sites) - 1, found.shape[-1]
        change, offset = found.new_zeros(sites, width, width), found.new_zeros(sites, width)
        self.kept = _Best(change, offset, self.judged(change, offset))

    def judged(self, change: Tensor, offset: Tensor) -> Float[Tensor, " site"]:
        """The mean KL of each site on the held-out states."""
        with torch.no_grad():
            wanted = self._logprobs(self.test[-1])
            each = zip(self.test[:-1], change, offset, strict=True)
            return torch.stack(
                [
                    self._kl(states + states @ one + other, wanted).mean()
                    for states, one, other in each
                ]
            )

    def _logprobs(self, states: Tensor) -> Tensor:
        dtype = getattr(self.lm.root, "dtype", torch.float32)
        return self.tail.logits(states.to(dtype), [(0, 0)] * len(states)).float().log_softmax(-1)

    def _kl(self, states: Tensor, wanted: Tensor) -> Tensor:
        said = self._logprobs(states)
        return torch.where(wanted > -torch.inf, wanted.exp() * (wanted - said), 0.0).sum(-1)

    def start(self, windows: Sequence[list[int]]) -> None:
        """The ridge regression of the last state's change on each site's state."""
        sites, width = len(self.sites) - 1, self.test.shape[-1]
        square = torch.zeros(sites, width + 1, width + 1, dtype=torch.float64)
        cross = torch.zeros(sites, width + 1, width, dtype=torch.float64)
        for batch in _batches(windows):
            states = self.states(batch).cpu()
            weight = (
                states[-1].square().mean(-1).rsqrt()[:, None]
            )  # as the final norm will scale them
            for number in range(sites):
                given = torch.nn.functional.pad(states[number], (0, 1), value=1.0) * weight
                square[number] += (given.T @ given).double()
                cross[number] += (given.T @ ((states[-1] - states[number]) * weight)).double()
            self.bar.update()
        mean = square.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
        for ridge in RIDGE:
            strength = torch.diag_embed((ridge * mean)[:, None].expand(-1, width + 1))
            strength[:, -1, -1] = 0  # the offset is free
            pairs = zip(square + strength, cross, strict=True)
            solved = [
                torch.cholesky_solve(right, torch.linalg.cholesky(left)) for left, right in pairs
            ]
            found = torch.stack(solved).float().to(self.test.device)
            change, offset = found[:, :-1], found[:, -1]
            self.kept.offer(change, offset, self.judged(change, offset))

    def descend(
        self,
        windows: Sequence[list[int]],
        steps: int,
        count: int,
        lr: float,
        draws: torch.Generator,
    ) -> None:
        """Lower the KL by gradient descent, from what is best so far."""
        size = (
            self.test[:-1].square().mean((1, 2)).sqrt()[:, None]
        )  # of a state's numbers: an offset is counted in it
        change = self.kept.change.clone().requires_grad_()
        shift = (self.kept.offset / size).requires_grad_()
        optimizer = torch.optim.Adam([change, shift], lr=lr)
        for step in range(steps):
            window = windows[int(torch.randint(len(windows), (), generator=draws))]
            states = self.states([window])
            chosen = torch.randperm(states.shape[1], generator=draws)[:count]
            states = states[:, chosen]
            with torch.no_grad():
                wanted = self._logprobs(states[-1])
            with torch.enable_grad():
                moved = states[:-1] + torch.bmm(states[:-1], change) + (shift * size)[:, None]
                loss = self._kl(moved.flatten(0, 1), wanted.repeat(len(moved), 1)).mean()
                change.grad, shift.grad = torch.autograd.grad(loss, [change, shift])
            optimizer.step()
            if (step + 1) % JUDGED == 0 or step + 1 == steps:
                self.kept.offer(change, shift * size, self.judged(change, shift.detach() * size))
            self.bar.update()
            self.bar.set_postfix_str(f"KL {float(loss.detach()):.3f}", refresh=False)
