"""Random programs of blocks that are entered and left in any order, and runs in between, against hooks by hand."""

import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hookkit as hk

KINDS = ("steer", "scale", "pattern", "force", "capture")


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that a module tree carries, by module: attributes by identity, hooks by key and identity."""
    streams = [
        thread
        for thread in threading.enumerate()
        if thread.name == "hookkit.stream" and thread.is_alive()
    ]
    state: dict[str, Any] = {"streams": len(streams)}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            kept = (
                [(key, id(item)) for key, item in value.items()]
                if isinstance(value, dict)
                else id(value)
            )
            state[f"{path}:{name}"] = kept
    for name, weight in model.named_parameters():
        state[f"grad:{name}"] = weight.requires_grad
    return state


def same_state(model: torch.nn.Module, before: dict[str, Any]) -> list[str]:
    """What differs from a state that was noted before."""
    now = state_of(model)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


class Program:
    """A random program: `seed` makes it the same again."""

    def __init__(self, lm: hk.LM, draw: random.Random) -> None:
        self.lm, self.draw = lm, draw
        self.open: list[tuple[Any, list[Callable[[Tensor], Tensor]], bool]] = []
        self.streams: list[Any] = []
        self.ids = [draw.randrange(3, 300) for _ in range(draw.randrange(2, 6))]

    def run(self) -> None:
        """Run it, and hold the model against what it was."""
        before, unedited = state_of(self.lm.model), self._plain()
        try:
            for _ in range(self.draw.randrange(3, 9)):
                getattr(
                    self,
                    self.draw.choice(
                        ["enter", "enter", "leave", "check", "check_run", "stream", "fail"]
                    ),
                )()
        finally:
            self.draw.shuffle(self.open)
            while self.open:
                self.leave()
            for stream in self.streams:
                stream.close()
        assert same_state(self.lm.model, before) == []
        assert torch.equal(self._plain(), unedited)

    def hook(self) -> tuple[Any, Callable[[Tensor], Tensor] | None]:
        """A hook, and what it does to the residual stream after block 1, written by hand."""
        kind = self.draw.choice(KINDS)
        if kind == "steer":
            vector = torch.randn(
                32, generator=torch.Generator().manual_seed(self.draw.randrange(9))
            )
            return hk.steer("resid_post.1", vector), lambda x: x + vector
        if kind == "scale":
            factor = self.draw.choice([0.5, 2.0])
            return hk.scale("resid_post.1", factor), lambda x: x * factor
        if kind == "pattern":
            return hk.capture(self.draw.choice(["pattern.1", "scores.0", "q_rot.2"])), lambda x: x
        if kind == "capture":
            return hk.capture(["resid_post", "z.1", "logits"]), lambda x: x
        return hk.edit("mlp_out.2", lambda x: x), lambda x: x

    def enter(self) -> None:
        """Enter a block, by itself or in a generator."""
        hook, edit = self.hook()
        block = hk.attach(self.lm, hook)
        if self.draw.random() < 0.3:
            steps = _in_a_generator(block)
            next(steps)
            self.open.append((steps, [edit], True))
        else:
            block.__enter__()
            self.open.append((block, [edit], False))
        self._run_model()  # so that every hook fires

    def leave(self) -> None:
        """Leave any of the open blocks."""
        if not self.open:
            return
        block, _, generator = self.open.pop(self.draw.randrange(len(self.open)))
        if generator:
            block.close()
        else:
            block.__exit__(None, None, None)

    def check(self) -> None:
        """A plain forward has the edits of all open blocks, the outer first."""
        assert torch.allclose(self._run_model(), self._by_hand([]), atol=1e-4)

    def check_run(self) -> None:
        """A run has them too, and then its own."""
        hook, edit = self.hook()
        logits = hk.forward(self.lm, [self.ids], hook).logits
        assert torch.allclose(logits, self._by_hand([edit]), atol=1e-4)
        if not self.open:
            hk.generate(self.lm, [self.ids], hook, max_new_tokens=2, do_sample=False)

    def stream(self) -> None:
        """A stream that stays open beside what follows."""
        steps = iter(
            hk.stream(
                self.lm,
                [self.ids],
                self.hook()[0],
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=None,
            )
        )
        if self.open:
            return  # it would be of the open blocks too, in the midst of which no other forward is allowed
        next(steps)
        self.streams.append(steps)

    def fail(self) -> None:
        """A run that ends in an error of the user's."""
        try:
            hk.forward(self.lm, [self.ids], self.hook()[0], hk.edit("mlp_out.1", lambda x: 1 / 0))
        except ZeroDivisionError:
            return
        raise AssertionError("the error was lost")

    def _run_model(self) -> Tensor:
        with torch.no_grad():
            return self.lm.model(torch.tensor([self.ids])).logits

    def _plain(self) -> Tensor:
        return self._run_model()

    def _by_hand(self, more: list[Any]) -> Tensor:
        """Plain transformers, built anew from the weights, with the edits in one hook that is written by hand."""
        edits = [edit for _, edits, _ in self.open for edit in edits] + more
        model = twin(self.lm)

        def after(_module: Any, _args: Any, output: Tensor) -> Tensor:
            for edit in edits:
                output = edit(output)
            return output

        handle = model.model.layers[1].register_forward_hook(after)
        try:
            with torch.no_grad():
                return model(torch.tensor([self.ids])).logits
        finally:
            handle.remove()


_TWINS: dict[int, Any] = {}


def twin(lm: hk.LM) -> Any:
    """Another model with the same weights, which no block is ever on."""
    key = id(lm.model)
    if key not in _TWINS:
        model: Any = lm.model
        _TWINS[key] = type(model)(model.config).eval()
        _TWINS[key].load_state_dict(model.state_dict())
    return _TWINS[key]


def _in_a_generator(block: Any) -> Any:
    with block:
        yield
