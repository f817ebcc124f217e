"""The exact effect of an edge: the metric when one sender's value of the other prompts reaches one
receiver, and nothing else is changed.

The receiver reads the residual stream plus the difference of what the sender writes. A first run,
in which the whole stream has this difference, gives what the receiver reads. A second one, in which
only the receiver reads it, gives the metric. Many edges run in one forward, where prompts repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, cat

from ..hooks.capture import capture
from ..models.sites import AnySite, Site
from .backward import CAPTURE_NAME, PromptMetric

ROWS = 64  # of one forward


@dataclass(frozen=True, eq=False)
class EdgePatching:
    """Prompts that run with other values in one edge.

    values    their own values at each site
    source    the values that an edge carries
    """

    target: PromptMetric
    values: Mapping[AnySite, Tensor]
    source: Mapping[AnySite, Tensor]

    def difference(self, sender: Site) -> Float[Tensor, "row pos d_model"]:
        """Returns the difference of what a sender writes into the stream, after any norm."""
        if sender.head is None:
            return self.source[sender] - self.values[sender]
        z, attn_out = Site("z", sender.layer), Site("attn_out", sender.layer)
        values = self.values[z].clone()
        values[:, :, sender.head] = self.source[z][:, :, sender.head]
        ((_, written),) = self._runs(z, [values], attn_out)
        return written - self.values[attn_out]

    def metrics(
        self, stream: Site, receiver: Site, differences: Sequence[Tensor]
    ) -> Iterator[Float[Tensor, " row"]]:
        """Yields the metric for each difference that a receiver reads beside the stream."""
        streams = [self.values[stream] + difference for difference in differences]
        read = Site(receiver.name, receiver.layer)
        if read == stream:  # the logits
            yield from (metric for metric, _ in self._runs(stream, streams, stream))
            return
        variants = []
        for _, values in self._runs(stream, streams, read):
            if receiver.head is not None:
                alone = self.values[read].clone()
                alone[:, :, receiver.head] = values[:, :, receiver.head]
                values = alone
            variants.append(values)
        yield from (metric for metric, _ in self._runs(read, variants, read))

    def _runs(
        self, site: Site, variants: Sequence[Tensor], read: Site
    ) -> Iterator[tuple[Float[Tensor, " row"], Tensor]]:
        """Yields for each variant of a site's values the metric and the values at `read`."""
        rows = self.target.rows
        at_once = 1  # base hooks may name rows
        if not self.target.hooks:
            at_once = max(1, ROWS // len(rows))
        for start in range(0, len(variants), at_once):
            chunk = variants[start : start + at_once]
            repeated = replace(self.target, rows=list(rows) * len(chunk))
            run = repeated.with_values(site, cat(list(chunk))).run(capture(read, name=CAPTURE_NAME))
            metrics = repeated.of_run(run).split(len(rows))
            yield from zip(metrics, run[read, CAPTURE_NAME].split(len(rows)), strict=True)
