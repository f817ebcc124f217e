"""Edge attribution against plain transformers and hooks by hand, in which every receiver reads a stream of its own."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

import hookkit as hk
from hookkit.errors import BadHook

CLEAN = [[5, 6, 7, 8, 9, 30], [9, 10, 3, 11, 12, 40]]
CORRUPTED = [[5, 6, 17, 8, 9, 30], [9, 11, 3, 11, 14, 40]]
DIFF = hk.metrics.logit_diff(5, 7)
FAMILIES = ["llama", "gpt2", "gemma2", "mixtral"]


def linear(weight, bias, values):
    return torch.nn.functional.linear(values, weight, bias)


class ByHand:
    """A plain model in float64 whose receivers each read the stream plus a tensor of their own.

    `added` has that tensor for each receiver, and `runs` what each component writes. A run's `put`
    replaces what a component writes: z of a layer, the MLP's output, or the embedding.
    """

    def __init__(self, family):
        self.lm = hk.tiny(family)
        self.model = self.lm.model.double()
        if family == "mixtral":  # its grouped kernel has no float64
            self.model.set_experts_implementation("eager")
        gpt2 = family == "gpt2"
        base = self.model.transformer if gpt2 else self.model.model
        self.layers = list(base.h if gpt2 else base.layers)
        self.final_norm = base.ln_f if gpt2 else base.norm
        self.gpt2, self.gemma2 = gpt2, family == "gemma2"
        config = self.model.config
        self.n_heads = config.num_attention_heads
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.n_kv = getattr(config, "num_key_value_heads", self.n_heads)

    def norms(self, layer):
        block = self.layers[layer]
        if self.gpt2:
            return block.ln_1, block.ln_2
        second = "pre_feedforward_layernorm" if self.gemma2 else "post_attention_layernorm"
        return block.input_layernorm, getattr(block, second)

    def projections(self, layer):
        """For each of q, k, v: its module, the function of a normed stream, and its heads."""
        attn = self.layers[layer].attn if self.gpt2 else self.layers[layer].self_attn
        for part, name in enumerate("qkv"):
            heads = self.n_heads if name == "q" else self.n_kv
            if self.gpt2:
                columns = slice(part * attn.c_attn.nf // 3, (part + 1) * attn.c_attn.nf // 3)
                weight, bias = attn.c_attn.weight[:, columns].T, attn.c_attn.bias[columns]
                yield name, attn.c_attn, functools.partial(linear, weight, bias), heads
            else:
                module = getattr(attn, f"{name}_proj")
                yield name, module, functools.partial(linear, module.weight, module.bias), heads

    def reads(self, layer):
        """For each of q, k, v: its module, and a hook that computes each head from its own stream."""

        def read(name, project, heads, norm, streams, outputs, added, _, args, output):
            values = []
            for head in range(heads):
                own = streams[0] + added.get(f"{name}.{layer}.{head}", 0)
                columns = slice(head * self.d_head, (head + 1) * self.d_head)
                values.append(project(norm.forward(own))[..., columns])
            outputs.extend(values)
            if self.gpt2:  # the three hooks of one module: the last has all
                return torch.cat(outputs, -1) if name == "v" else output
            return torch.cat(values, -1)

        for name, module, project, heads in self.projections(layer):
            yield module, functools.partial(read, name, project, heads)

    def receivers(self):
        names = []
        for layer in range(len(self.layers)):
            for name, _, _, heads in self.projections(layer):
                names += [f"{name}.{layer}.{head}" for head in range(heads)]
            names.append(f"mlp_in.{layer}")
        return [*names, "logits"]

    def write(self, layer, z):
        """What attention adds for the heads' z."""
        block = self.layers[layer]
        out = block.attn.c_proj(z) if self.gpt2 else block.self_attn.o_proj(z)
        return block.post_attention_layernorm(out) if self.gemma2 else out

    def run(self, tokens, added, put=()):
        """Returns the metric of each row and what each component writes."""
        written, hooks = {}, []

        def replace(name, args, output=None):
            value = dict(put).get(name, args[0] if output is None else output)
            written[name] = value
            return value if output is not None else (value, *args[1:])

        def add(name, args):
            return (args[0] + added.get(name, 0), *args[1:])

        def before(module, function, name):
            hooks.append(module.register_forward_pre_hook(lambda _, args: function(name, args)))

        def after(module, function, name):
            hooks.append(module.register_forward_hook(lambda _, *both: function(name, *both)))

        before(self.layers[0], replace, "embed")
        for layer, block in enumerate(self.layers):
            streams, outputs = [], []
            first, second = self.norms(layer)
            before(first, lambda streams, args: streams.append(args[0]), streams)
            for module, read in self.reads(layer):
                read = functools.partial(read, first, streams, outputs, added)
                hooks.append(module.register_forward_hook(read))
            projection = block.attn.c_proj if self.gpt2 else block.self_attn.o_proj
            before(projection, replace, f"z.{layer}")
            before(second, add, f"mlp_in.{layer}")
            mlp = block.post_feedforward_layernorm if self.gemma2 else block.mlp
            after(mlp, replace, f"mlp_out.{layer}")
        before(self.final_norm, add, "logits")
        logits = self.model(torch.tensor(tokens), use_cache=False).logits[:, -1]
        for hook in hooks:
            hook.remove()
        return logits[:, 5] - logits[:, 7], written

    def gradients(self, put=()):
        """The metric's gradient at what every receiver reads."""
        shape = (*np.shape(CLEAN), self.model.config.hidden_size)
        added = {}
        for name in self.receivers():
            added[name] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        metric, _ = self.run(CLEAN, added, put)
        gradients = torch.autograd.grad(metric.sum(), list(added.values()), allow_unused=True)
        return dict(zip(added, gradients, strict=True))

    def differences(self, exact=False):
        """For each sender what it writes on the corrupted prompts minus on the clean ones."""
        with torch.no_grad():
            _, clean = self.run(CLEAN, {})
            _, corrupted = self.run(CORRUPTED, {})
        differences = {}
        for name in clean:
            if not name.startswith("z."):
                differences[name] = corrupted[name] - clean[name]
                continue
            layer = int(name.split(".")[1])
            for head in range(self.n_heads):
                change = torch.zeros_like(clean[name])
                span = slice(head * self.d_head, (head + 1) * self.d_head)
                change[..., span] = (corrupted[name] - clean[name])[..., span]
                write = lambda z, at=layer: self.write(at, z)  # noqa: E731
                if exact:
                    written = write(clean[name] + change) - write(clean[name])
                else:
                    _, written = torch.func.jvp(write, (clean[name],), (change,))
                differences[f"{name}.{head}"] = written.detach()
        return differences, clean, corrupted


def stage(name):
    """Where on the stream a component stands."""
    kind, *numbers = name.split(".")
    if not numbers:
        return {"embed": -1, "logits": 1000}[kind]
    return 2 * int(numbers[0]) + (kind in ("mlp_in", "mlp_out"))


def component(sender):
    """What a run replaces for a sender: all heads of its layer, or itself."""
    return sender.rpartition(".")[0] if sender.startswith("z.") else sender


def mean_gradients(by_hand, clean, corrupted, name, points):
    total = {}
    for point in points:
        between = clean[name] + point * (corrupted[name] - clean[name])
        for receiver, gradient in by_hand.gradients({name: between}).items():
            total.setdefault(receiver, []).append(gradient)
    return total


def scores_by_hand(family, points_at, points):
    """The score of every edge; `points_at` is the component that runs replace for a sender."""
    by_hand = ByHand(family)
    differences, clean, corrupted = by_hand.differences()
    by_component, records = {}, {}
    for sender, difference in differences.items():
        name = points_at(sender)
        if name not in by_component:
            by_component[name] = (
                mean_gradients(by_hand, clean, corrupted, name, points)
                if name
                else {r: [g] for r, g in by_hand.gradients().items()}
            )
        for receiver, gradients in by_component[name].items():
            if stage(sender) < stage(receiver):
                mean = torch.stack(gradients).mean(0)
                records[sender, receiver] = float((difference * mean).sum()) / len(CLEAN)
    return by_hand, pd.Series(records)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "points_at", "points"),
    [
        ({}, lambda sender: None, ()),
        ({"method": "integrated", "steps": 3}, lambda sender: "embed", (0, 1 / 3, 2 / 3)),
        (
            {"method": "integrated_activations", "steps": 2, "points": "middle"},
            component,
            (0.25, 0.75),
        ),
    ],
    ids=["gradient", "integrated", "integrated_activations"],
)
def test_every_edge_is_what_hooks_by_hand_give(family, settings, points_at, points):
    by_hand, expected = scores_by_hand(family, points_at, points)
    table = hk.edge_attribution(by_hand.lm, CLEAN, CORRUPTED, DIFF, **settings)
    scores = table.set_index(["sender", "receiver"])["logit_diff_delta"]
    assert set(scores.index) == set(expected.index)
    errors = (scores - expected).abs()
    assert errors.max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_edge_is_the_run_in_which_only_its_receiver_reads_the_difference(family):
    by_hand = ByHand(family)
    differences, _, _ = by_hand.differences(exact=True)
    table = hk.edge_attribution(by_hand.lm, CLEAN, CORRUPTED, DIFF, method="exact")
    with torch.no_grad():
        before, _ = by_hand.run(CLEAN, {})
        for row in table.to_dict("records"):
            after, _ = by_hand.run(CLEAN, {row["receiver"]: differences[row["sender"]]})
            assert row["logit_diff_delta"] == pytest.approx(
                float((after - before).mean()), abs=1e-5
            )
    assert table["logit_diff_delta"].abs().max() > 0.1


def test_only_the_edges_that_are_named_are_patched():
    lm = hk.tiny("llama")
    table = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF)
    strongest = table.nlargest(5, "logit_diff_delta")
    some = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, method="exact", edges=strongest)
    every = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, method="exact")
    ends = ["sender", "receiver"]
    assert some[ends].values.tolist() == strongest[ends].values.tolist()
    pd.testing.assert_frame_equal(some, strongest[ends].merge(every, on=ends), atol=1e-6)
    unknown = pd.DataFrame({"sender": ["mlp_out.1"], "receiver": ["q.0.1"]})
    with pytest.raises(BadHook, match="mlp_out.1 to q.0.1, which is no edge"):
        hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, edges=unknown)
    with pytest.raises(BadHook, match="columns sender and receiver"):
        hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, edges=unknown[["sender"]])


def test_the_edges_of_a_layer_add_up_to_patching_it():
    """The integral of a gradient is a difference: a closed form for "integrated_activations"."""
    lm = hk.tiny("llama")
    settings = {"method": "integrated_activations", "steps": 48, "points": "middle"}
    table = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, **settings)
    sums = table.groupby(table["sender"].map(component))["logit_diff_delta"].sum()
    source = hk.forward(lm, CORRUPTED, hk.capture(["resid_pre.0", "z", "mlp_out"]))
    before = DIFF(hk.forward(lm, CLEAN))
    assert len(sums) == 7
    for name in sums.index:
        site = "resid_pre.0" if name == "embed" else name
        after = DIFF(hk.forward(lm, CLEAN, hk.patch(site, source)))
        assert sums[name] == pytest.approx(float((after - before).mean()), rel=2e-3)


def test_steps_belong_to_the_integrated_methods():
    lm = hk.tiny("llama")
    with pytest.raises(BadHook, match="have no effect with 'gradient'"):
        hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, steps=3)
