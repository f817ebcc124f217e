"""The second route: what is at each site, by plain transformers and hooks written by hand. No hookkit here."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.convert_slow_tokenizer import bytes_to_unicode


def module_of(
    model: nn.Module, site: str, layer: int | None
) -> tuple[nn.Module, str, Callable[[Tensor], Tensor]]:
    """The module, its side and the view for a site, as one would write it down reading the model's code."""
    same = lambda x: x  # noqa: E731
    if model.config.model_type == "llama":
        block = model.model.layers[layer] if layer is not None else None
        heads = lambda count: lambda x: x.view(*x.shape[:2], count, 8)  # noqa: E731
        table = {
            "embed": lambda: (model.model.embed_tokens, "out", same),
            "resid_pre": lambda: (block, "in", same),
            "attn_in": lambda: (block.input_layernorm, "out", same),
            "q": lambda: (block.self_attn.q_proj, "out", heads(4)),
            "k": lambda: (block.self_attn.k_proj, "out", heads(2)),
            "v": lambda: (block.self_attn.v_proj, "out", heads(2)),
            "z": lambda: (block.self_attn.o_proj, "in", heads(4)),
            "attn_out": lambda: (block.self_attn.o_proj, "out", same),
            "resid_mid": lambda: (block.post_attention_layernorm, "in", same),
            "mlp_in": lambda: (block.post_attention_layernorm, "out", same),
            "mlp_pre": lambda: (block.mlp.gate_proj, "out", same),
            "mlp_post": lambda: (block.mlp.down_proj, "in", same),
            "mlp_out": lambda: (block.mlp.down_proj, "out", same),
            "resid_post": lambda: (block, "out", same),
            "final_norm": lambda: (model.lm_head, "in", same),
            "lm_head": lambda: (model.lm_head, "out", same),
        }
    else:
        block = model.transformer.h[layer] if layer is not None else None
        third = lambda n: lambda x: x[..., 32 * n : 32 * (n + 1)].view(*x.shape[:2], 4, 8)  # noqa: E731
        table = {
            "embed": lambda: (model.transformer.wte, "out", same),
            "pos_embed": lambda: (model.transformer.wpe, "out", same),
            "resid_pre": lambda: (block, "in", same),
            "attn_in": lambda: (block.ln_1, "out", same),
            "q": lambda: (block.attn.c_attn, "out", third(0)),
            "k": lambda: (block.attn.c_attn, "out", third(1)),
            "v": lambda: (block.attn.c_attn, "out", third(2)),
            "z": lambda: (block.attn.c_proj, "in", lambda x: x.view(*x.shape[:2], 4, 8)),
            "attn_out": lambda: (block.attn.resid_dropout, "out", same),
            "resid_mid": lambda: (block.ln_2, "in", same),
            "mlp_in": lambda: (block.ln_2, "out", same),
            "mlp_pre": lambda: (block.mlp.c_fc, "out", same),
            "mlp_post": lambda: (block.mlp.act, "out", same),
            "mlp_out": lambda: (block.mlp.dropout, "out", same),
            "resid_post": lambda: (block, "out", same),
            "final_norm": lambda: (model.lm_head, "in", same),
            "lm_head": lambda: (model.lm_head, "out", same),
        }
    return table[site]()


def captured(model: nn.Module, ids: list[int], site: str, layer: int | None) -> Tensor:
    """The values at a site for one prompt, [1, pos, ...]."""
    module, side, view = module_of(model, site, layer)
    found = []

    def keep(_module: nn.Module, args: tuple, output: object = None) -> None:
        value = args[0] if side == "in" else output[0] if isinstance(output, tuple) else output
        found.append(view(value.clone()))

    handle = (
        module.register_forward_pre_hook(keep)
        if side == "in"
        else module.register_forward_hook(keep)
    )
    try:
        logits(model, ids)
    finally:
        handle.remove()
    (value,) = found
    return value


def logits(model: nn.Module, ids: list[int]) -> Tensor:
    """What plain transformers says, [1, pos, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def with_hook(module: nn.Module, side: str, edit: Callable[[Tensor], Tensor]):
    """A handle of a hook that edits the first tensor at one side of a module."""
    if side == "in":

        def before(_module: nn.Module, args: tuple, kwargs: dict):
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: tuple, output: object):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(after)


def edited_logits(
    model: nn.Module, ids: list[int], site: str, layer: int | None, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits of plain transformers with a hand-written hook at a site; `edit` sees the whole tensor of the module."""
    module, side, _ = module_of(model, site, layer)
    handle = with_hook(module, side, edit)
    try:
        return logits(model, ids)
    finally:
        handle.remove()


def greedy(
    model: nn.Module,
    ids: list[int],
    steps: int,
    change: Callable[[Tensor, int], Tensor] = lambda said, step: said,
) -> list[int]:
    """A decoding loop without a cache: `change(logits, step)` edits what the model says before the largest is taken."""
    ids = list(ids)
    for step in range(steps):
        ids.append(int(change(logits(model, ids)[0, -1].clone(), step).argmax()))
    return ids


LogitEdit = Callable[[Tensor, int, list[int]], Tensor]


class Edited(LogitsProcessor):
    """An edit of what the model says, row by row: `edit(logits, step, tokens so far)`, a fresh one for each row."""

    def __init__(
        self, edits: Sequence[Callable[[], LogitEdit]], pads: list[int], width: int
    ) -> None:
        self.edits, self.pads, self.width = edits, pads, width
        self.rows: dict[int, LogitEdit] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = []
        for row, said in enumerate(scores):
            prompt = row * len(self.pads) // len(scores)
            edit = self.rows.setdefault(row, self.edits[prompt]())
            new.append(
                edit(
                    said.clone(),
                    input_ids.shape[1] - self.width,
                    input_ids[row, self.pads[prompt] :].tolist(),
                )
            )
        return torch.stack(new)


def generated(
    model: nn.Module,
    rows: list[list[int]],
    edits: Sequence[Callable[[], LogitEdit]],
    seed: int,
    settings: dict,
) -> list[list[int]]:
    """What plain transformers writes behind rows that are padded on the left, with an edit of each row's logits.

    The edit is a logits processor; in beams, whose processors are given log-probabilities, a hook on the model.
    """
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)])
    edited = Edited(edits, pads, width)
    given = {"input_ids": ids, "attention_mask": mask, **settings}
    torch.manual_seed(seed)
    if "num_beams" not in settings:
        return model.generate(**given, logits_processor=LogitsProcessorList([edited]))[
            :, width:
        ].tolist()

    def after(_module: nn.Module, _args: tuple, kwargs: dict, output: dict) -> dict:
        output.logits[:, -1] = edited(kwargs["input_ids"], output.logits[:, -1])
        return output

    handle = model.register_forward_hook(after, with_kwargs=True)
    try:
        return model.generate(**given | {"use_cache": False})[:, width:].tolist()
    finally:
        handle.remove()


def token_text(tokenizer, token_id):
    """The text of a token of a byte-level tokenizer; a byte that is no text is <0xE2>."""
    text = tokenizer.decode([token_id])
    if "\ufffd" not in text:
        return text
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    data = bytes(letters[letter] for letter in tokenizer.convert_ids_to_tokens(token_id))
    text = data.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)
