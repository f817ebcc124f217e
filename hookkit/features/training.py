"""hk.train_dictionary: trains a sparse autoencoder on the values of a harvest.

topk       the k largest features of each token are kept, and features that no longer fire learn
           from the error of the others (AuxK): Gao et al. 2024, "Scaling and evaluating sparse
           autoencoders"
batchtopk  the k largest features per token on average over a batch; the mean over batches of the
           smallest one is the threshold of the jumprelu dictionary that is saved: Bussmann et al.
           2024, "BatchTopK Sparse Autoencoders"

The first position of a text and values of far more than the usual norm are left out: models store
nothing there but a huge norm (attention sinks), which would make up most of the loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..arguments import check_arguments, check_integer, check_number, check_seed
from ..data.harvest.folder import refuse_other_settings
from ..data.harvest.harvest import Column, Harvest
from ..data.harvest.texts import TextsLike
from ..display import progress_bar
from ..errors import BadHook, OtherModel, TooFew, Unsupported
from ..files.atomic import format_csv, lock_folder, write_tensors, write_text
from ..files.untrusted import check_folder, parse_json, read_tensors
from ..models.lm import LM
from ..models.provenance import weights_hash
from ..models.sites import Site, parse_site
from . import sae_lens
from .dictionary import Dictionary
from .dictionary_files import load_dictionary
from .dictionary_parts import check_dictionary_site
from .quality import are_no_outliers

CHUNK = 8192  # rows of a harvest that are read at once
SAMPLE = 8192  # rows from which the scale and the first bias are computed
AUXILIARY = 1 / 32  # the weight of the loss of dead features (Gao et al.)
DEAD_AFTER = 50  # batches without firing, after which a feature is dead
WARM_UP, COOL_DOWN = 0.05, 0.2  # shares of the steps in which the learning rate rises and falls
THRESHOLD_BATCHES = 32  # from which the threshold of a batchtopk dictionary is computed
CHECKPOINT, CHECKPOINT_STEPS = "checkpoint.safetensors", 250
QUALITY = "quality.csv"
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")

Architecture = Literal["topk", "batchtopk"]


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training, which with the harvest decide every number of the dictionary."""

    architecture: Architecture
    features: int
    k: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


@check_arguments
def train_dictionary(
    lm: LM,
    harvest: Harvest,
    site: str | Site | None = None,
    *,
    out: str | os.PathLike[str],
    features: int | None = None,
    k: int = 32,
    architecture: Architecture = "topk",
    epochs: int = 6,
    batch_size: int = 512,
    learning_rate: float | None = None,
    seed: int = 0,
    held_out: TextsLike | None = None,
    progress: bool | None = None,
) -> Dictionary:
    """Trains a sparse autoencoder on a harvest, writes it to a folder, and returns it.

    harvest        the values of one site of this model, from `hk.harvest` or `hk.open_harvest`;
                   `site` chooses one if it has several
    out            the folder: `cfg.json` and `sae_weights.safetensors` in SAELens' format
    features       the number of features, by default four times the width of the site
    k              how many features are kept at a token, with "batchtopk" on average
    epochs         how often the harvest is read, in batches of `batch_size` tokens
    learning_rate  of Adam, by default 2e-4 · √(16,384 / features), as in Gao et al. 2024
    held_out       texts that are not in the harvest: `dictionary.quality(lm, held_out)` is then
                   written to quality.csv

    A training that was killed continues from its last checkpoint, and gives the same numbers (on
    one machine, with as many threads). The first token of each text, and values of more than ten
    times the median norm, are left out.

    Raises `OtherModel` for a harvest of another model, `HarvestChanged` if the folder has a
    dictionary of other settings, and `TooFew` if the harvest has less than one batch.

    >>> small = hk.tiny("llama")
    >>> texts = [list(range(first, first + 40)) for first in range(2, 60)]
    >>> made = hk.harvest(small, texts, "resid_post.1", "harvest", progress=False)
    >>> train_dictionary(small, made, out="sae", k=8, epochs=1, batch_size=256, progress=False)
    Dictionary(resid_post.1: 128 features of 32, topk k=8)
    """
    if lm.ranks is not None:
        raise Unsupported("a dictionary is trained in one process: load the model without tp_plan")
    site = _choose_site(harvest, site)
    hook = sae_lens.hook_of_site(site)
    _check_model(lm, harvest)
    folder, rows = check_folder(out, "out"), read_training_rows(harvest, site)
    settings = _read_settings(
        rows.width, features, k, architecture, epochs, batch_size, learning_rate, seed
    )
    if len(rows.numbers) < batch_size:
        raise TooFew(
            f"the harvest has {len(rows.numbers)} values to train on, and a batch has {batch_size}:"
            " harvest more texts, or say a smaller batch_size"
        )
    identity = {
        "site": str(site),
        "weights_sha256": harvest.about["model"]["weights_sha256"],
        "texts": harvest.texts,
        "texts_sha256": harvest.shards.all[-1].stream,
        "tokens": len(rows.numbers),
        "left_out": rows.left_out,
        **asdict(settings),
    }
    with lock_folder(folder, "is training a dictionary"):
        if (folder / sae_lens.CONFIG).is_file():
            old = sae_lens.read_training(folder)
            refuse_other_settings(folder, "a dictionary", old, identity)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                trainer = _Trainer(rows, settings, folder / CHECKPOINT, identity)
                trainer.run(progress)
            model_name = str(harvest.about["model"]["name"])
            metadata = {"hook_name": hook, "model_name": model_name, "training": identity}
            k_of_file = k if architecture == "topk" else None
            sae_lens.write_folder(folder, trainer.final_weights(), k_of_file, site, metadata)
            (folder / CHECKPOINT).unlink(missing_ok=True)
    dictionary = load_dictionary(folder)
    if held_out is not None:
        table = dictionary.quality(lm, held_out, context=harvest.about["context"])
        write_text(folder / QUALITY, format_csv(table))
    return dictionary


def _choose_site(harvest: Harvest, site: str | Site | None) -> Site:
    """Returns the site that is trained on, which must be one of the harvest and of dictionaries."""
    if site is None:
        if len(harvest.sites) > 1:
            raise BadHook(f"the harvest has {harvest.sites}: say which one, with site=")
        site = str(harvest.sites[0])
    parsed = parse_site(site) if isinstance(site, str) else site
    return check_dictionary_site(parsed, "site")


def _check_model(lm: LM, harvest: Harvest) -> None:
    model = harvest.about["model"]
    if model["weights_sha256"] != weights_hash(lm):
        raise OtherModel(
            f"the harvest is of {model['name']!r}, whose weights are not those of {lm.name!r}: "
            "give the model that was harvested, or harvest this one"
        )


def _read_settings(
    width: int,
    features: int | None,
    k: int,
    architecture: Architecture,
    epochs: int,
    batch_size: int,
    learning_rate: float | None,
    seed: int,
) -> TrainingSettings:
    features = 4 * width if features is None else features
    check_integer(features, "features", least=2, meaning="how many features,", error=BadHook)
    check_integer(k, "k", least=1, most=features, meaning="how many are kept,", error=BadHook)
    check_integer(epochs, "epochs", least=1, error=BadHook)
    check_integer(batch_size, "batch_size", least=2, meaning="tokens of a batch,", error=BadHook)
    check_seed(seed)
    if learning_rate is None:
        learning_rate = 2e-4 * (2**14 / features) ** 0.5
    rate = check_number(learning_rate, "learning_rate", above=0.0, meaning="the length of a step,")
    return TrainingSettings(architecture, features, k, epochs, batch_size, rate, seed)


# ---- the rows of a harvest


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The rows of a harvest that are trained on: not the first of a text, and no outliers."""

    column: Column
    numbers: Int[Tensor, " row"]
    left_out: int

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return self.column[:1].numel()

    def read(self, indices: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Returns some rows, as float32."""
        return self.column[self.numbers[indices]].flatten(1).float()


def read_training_rows(harvest: Harvest, site: Site) -> TrainingRows:
    """Returns the rows that are trained on. Raises if a value is infinite or NaN."""
    column, positions = harvest[site], harvest["pos"][:]
    assert isinstance(column, Column)  # a sparse column is of features
    norms = torch.empty(len(column))
    for start in range(0, len(column), CHUNK):
        values = column[start : start + CHUNK].flatten(1).float()
        norms[start : start + len(values)] = values.norm(dim=-1)
    if not bool(norms.isfinite().all()):
        raise BadHook(f"the harvest has infinite or NaN values at {site}: harvest in float32")
    numbers = (positions > 0).nonzero().flatten()
    numbers = numbers[are_no_outliers(norms[numbers])]
    return TrainingRows(column, numbers, len(column) - len(numbers))


# ---- the training


class _Trainer:
    """A training. It owns the weights, Adam's moments, and since when each feature is silent.

    Values are divided by a constant, so that their mean norm is √width; `final_weights` undoes it.
    """

    def __init__(
        self,
        rows: TrainingRows,
        settings: TrainingSettings,
        checkpoint: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.rows, self.settings = rows, settings
        self.checkpoint, self.identity = checkpoint, identity
        self.batches = len(rows.numbers) // settings.batch_size
        self.steps = self.batches * settings.epochs
        draws = torch.Generator().manual_seed(settings.seed)
        sample = rows.read(torch.randperm(len(rows.numbers), generator=draws)[:SAMPLE])
        self.scale = float(rows.width**0.5 / sample.norm(dim=-1).mean())
        directions = torch.randn(settings.features, rows.width, generator=draws)
        decoder = directions / directions.norm(dim=-1, keepdim=True)
        self.weights = {
            "W_enc": decoder.T.clone(),
            "b_enc": torch.zeros(settings.features),
            "W_dec": decoder,
            "b_dec": geometric_median(sample * self.scale),
        }
        self.silent = torch.zeros(settings.features, dtype=torch.int64)  # batches since it fired
        parameters = [weight.requires_grad_() for weight in self.weights.values()]
        self.adam = torch.optim.Adam(parameters, lr=settings.learning_rate, eps=6.25e-10)
        self.step = 0
        self._load()

    def run(self, progress: bool | None) -> None:
        """Takes the steps that are left."""
        with progress_bar(progress, total=self.steps, initial=self.step, desc="dictionary") as bar:
            for indices in self._indices():
                loss = self._train(self._read(indices))
                self.step += 1
                bar.update()
                dead = int((self.silent >= DEAD_AFTER).sum())
                bar.set_postfix_str(f"unexplained {loss:.3f}, {dead} dead", refresh=False)
                if self.step % CHECKPOINT_STEPS == 0 or self.step == self.steps:
                    self._save()

    def _read(self, indices: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        return self.rows.read(indices) * self.scale

    def _indices(self) -> Iterator[Int[Tensor, " batch"]]:
        """Yields the rows of each batch that is left; each epoch has an order of its own."""
        size = self.settings.batch_size
        for epoch in range(self.step // self.batches, self.settings.epochs):
            draws = torch.Generator().manual_seed(self.settings.seed + epoch)
            order = torch.randperm(len(self.rows.numbers), generator=draws)
            for batch in range(self.step - epoch * self.batches, self.batches):
                yield order[batch * size : (batch + 1) * size]

    def _train(self, values: Float[Tensor, "batch width"]) -> float:
        """Takes a step of Adam, and returns the fraction of variance unexplained before it."""
        decoder = self.weights["W_dec"]
        before = self._before(values)
        active, features, starts = self._largest(before)
        decoded = embedding_bag(features, decoder, starts, mode="sum", per_sample_weights=active)
        error = values - self.weights["b_dec"] - decoded
        spread = (values - values.mean(0)).square().sum()
        unexplained = error.square().sum() / spread
        self.silent += 1
        self.silent[features[active > 0]] = 0
        loss = unexplained + AUXILIARY * self._auxiliary_loss(before, error.detach())
        self.adam.zero_grad()
        loss.backward()
        assert decoder.grad is not None
        with torch.no_grad():  # a step keeps the length of each feature's direction
            along = (decoder.grad * decoder).sum(-1, keepdim=True)
            decoder.grad -= along * decoder
            self.adam.param_groups[0]["lr"] = self._learning_rate()
            self.adam.step()
            decoder /= decoder.norm(dim=-1, keepdim=True)
        return float(unexplained.detach())

    def _before(self, values: Float[Tensor, "batch width"]) -> Float[Tensor, "batch feature"]:
        """Returns the features before the activation function."""
        return (values - self.weights["b_dec"]) @ self.weights["W_enc"] + self.weights["b_enc"]

    def _largest(self, before: Float[Tensor, "batch feature"]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the values and numbers of the features that are kept, and each token's first."""
        k = self.settings.k
        if self.settings.architecture == "topk":
            values, features = before.topk(k, dim=-1, sorted=False)
            return values.relu().flatten(), features.flatten(), torch.arange(0, values.numel(), k)
        _, numbers = before.flatten().topk(k * len(before), sorted=False)
        numbers = numbers.sort().values
        tokens, features = numbers // before.shape[1], numbers % before.shape[1]
        counts = torch.bincount(tokens, minlength=len(before))
        return before.flatten()[numbers].relu(), features, counts.cumsum(0) - counts

    def _auxiliary_loss(self, before: Tensor, error: Tensor) -> Tensor | float:
        """Returns the loss of the dead features, which are to explain the error of the others."""
        dead = (self.silent >= DEAD_AFTER).nonzero().flatten()
        if not len(dead):
            return 0.0
        count = min(len(dead), max(1, self.rows.width // 2))
        active, numbers = before[:, dead].topk(count, dim=-1, sorted=False)
        explained = embedding_bag(
            dead[numbers], self.weights["W_dec"], mode="sum", per_sample_weights=active.relu()
        )
        return (error - explained).square().sum() / (error - error.mean(0)).square().sum()

    def _learning_rate(self) -> float:
        rising = (self.step + 1) / max(1.0, WARM_UP * self.steps)
        falling = (self.steps - self.step) / max(1.0, COOL_DOWN * self.steps)
        return self.settings.learning_rate * min(1.0, rising, falling)

    def final_weights(self) -> dict[str, Tensor]:
        """Returns the weights for values as the model has them."""
        weights = {name: weight.detach().clone() for name, weight in self.weights.items()}
        if self.settings.architecture == "batchtopk":
            weights["threshold"] = self._threshold().repeat(self.settings.features)
        for name in ("b_enc", "b_dec", "threshold"):
            if name in weights:
                weights[name] /= self.scale
        return weights

    @torch.no_grad()
    def _threshold(self) -> Float[Tensor, ""]:
        """Returns the mean over batches of the smallest activation that is kept."""
        smallest: list[Tensor] = []
        self.step = 0  # of an epoch again, whose batches are read
        for indices in islice(self._indices(), min(THRESHOLD_BATCHES, self.batches)):
            active, _, _ = self._largest(self._before(self._read(indices)))
            smallest.append(active[active > 0].min())
        return torch.stack(smallest).mean()

    def _save(self) -> None:
        tensors = {name: weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = self.adam.state[weight][moment]
        tensors["silent"] = self.silent
        texts = {"training": json.dumps(self.identity), "step": str(self.step)}
        write_tensors(self.checkpoint, tensors, texts)

    def _load(self) -> None:
        """Continues from the checkpoint, if there is one."""
        if not self.checkpoint.is_file():
            return
        tensors, texts = read_tensors(self.checkpoint)
        old = parse_json(texts.get("training", "{}"), CHECKPOINT)
        refuse_other_settings(self.checkpoint.parent, "a training", old, self.identity)
        self.step = int(texts["step"])
        self.silent = tensors["silent"].clone()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])
                state = self.adam.state[weight]
                state["step"] = torch.tensor(float(self.step))
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = tensors[f"{name}.{moment}"].clone()


def geometric_median(points: Float[Tensor, "point width"]) -> Float[Tensor, " width"]:
    """Returns the point with the smallest mean distance to all points (Weiszfeld's algorithm)."""
    median = points.mean(0)
    for _ in range(20):
        closeness = 1 / (points - median).norm(dim=-1).clamp(min=1e-6)
        median = (points * closeness[:, None]).sum(0) / closeness.sum()
    return median
