"""The process of an engine: vLLM with a model, and the hooks of one run after another.

`hk.load(engine="vllm")` starts it: `python -m hookkit.runs.engines.vllm_process ADDRESS`. Messages
are pickled values over a connection of this machine that both ends prove to know a key. The process
ends when the connection does. vLLM runs inside it, and not in a further process: it changes the
classes of transformers where its transformers backend is used, and its settings are environment
variables.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from ...errors import BadArgument, Unsupported
from ...models.dictionaries import SiteDictionary
from ...models.engine import EngineFailure, StartEngine
from ...models.layout import text_config
from ...models.lm import LM
from .chunk_passes import Chunk
from .vllm_hooks import EngineHooks
from .vllm_run import SampledRun, ServedResult
from .vllm_sites import Code, Served, served_family

ROW = "hookkit_row"  # the name of a request's row among its extra arguments
NAMES_OF_RUNNER = ("input_batch", "requests", "query_start_loc", "model")
ENVIRONMENT = {  # of vLLM, which reads it when it is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second model runner has other names
    "VLLM_NO_USAGE_STATS": "1",
}
NAMES_OF_BATCH = ("req_ids", "num_computed_tokens_cpu", "num_tokens_no_spec", "token_ids_cpu")


class EngineProcess:
    """The engine, its model as an LM, and the batch that it computes. Owned by `main`."""

    def __init__(self, start: StartEngine) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.engine = LLM(start.source, **start.arguments).llm_engine
        self.runner = _model_runner(self.engine)
        root = self.runner.model
        code: Code = "vllm"
        if type(root).__name__.startswith("Transformers"):
            code = "transformers"
        self._code: Code = code
        served = Served(start.family, code, start.sizes)
        family = served_family(served, dict(root.named_modules()), type(root).__name__)
        self.lm = LM(root, start.tokenizer, start.label, row=family)
        self._plain_lm = self.lm
        self._numbers: dict[int, int] = {}  # the index of each row in the current batch
        self._runs = 0
        self._owner = os.getppid()

    @property
    def facts(self) -> dict[str, Any]:
        """What the LM in the user's process reads here: its sites, and why others are missing."""
        import vllm  # pyright: ignore[reportMissingImports]

        config: Any = self.lm.config
        return {
            "names": self.lm.layout.names,
            "missing": dict(self.lm.family.missing),
            "class": type(self.runner.model).__name__,
            "code": self._code,
            "context": self.engine.model_config.max_model_len,
            "dtype": str(self.engine.model_config.dtype).removeprefix("torch."),
            "device": torch.device(self.runner.device).type,
            "version": vllm.__version__,
            "scale": _logit_scale(text_config(config)),
        }

    def set_dictionaries(self, dictionaries: tuple[SiteDictionary, ...]) -> None:
        """Makes the features of these dictionaries sites of the runs that follow."""
        self.lm = replace(self._plain_lm, dictionaries=dictionaries)

    # ---- a run

    def run(self, sampled: SampledRun) -> ServedResult:
        """Runs the requests of a run to their end."""
        hooks = EngineHooks(self.lm, sampled.run, self._read_batch, self._tokens_of_row)
        rows: dict[int, list[int]] = {}
        self._runs += 1
        names: dict[str, int] = {}
        hooks.register(self.runner.model)
        try:
            for row in sampled.run.rows:
                ids = sampled.run.prompts[row // sampled.run.returned]
                prompt: Any = {"prompt_token_ids": list(ids)}
                if sampled.salts[row] is not None:
                    prompt["cache_salt"] = sampled.salts[row]
                params = _sampling_params(sampled, row)
                name = self.engine.add_request(f"{self._runs}-{row}", prompt, params)
                names[name] = names[f"{self._runs}-{row}"] = row
            while self.engine.has_unfinished_requests():
                if os.getppid() != self._owner:
                    raise SystemExit("the process that owns this engine has ended")
                for output in self.engine.step():
                    if output.finished:
                        row = names[output.request_id]
                        ids = sampled.run.prompts[row // sampled.run.returned]
                        rows[row] = [*ids, *output.outputs[0].token_ids]
                if hooks.error is not None:
                    raise hooks.error
            return hooks.finish([rows[row] for row in sampled.run.rows])
        finally:
            hooks.remove()
            self._stop(list(names))

    def _stop(self, names: list[str]) -> None:
        """Ends the requests that are still there after an error."""
        if not self.engine.has_unfinished_requests():
            return
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _read_batch(self) -> list[Chunk]:
        """Returns the chunks of the step that begins."""
        batch = self.runner.input_batch
        names = list(batch.req_ids)
        starts = self.runner.query_start_loc.np[: len(names) + 1].tolist()
        chunks: list[Chunk] = []
        self._numbers = {}
        for number, name in enumerate(names):
            arguments = self.runner.requests[name].sampling_params.extra_args
            past = int(batch.num_computed_tokens_cpu[number])
            count = starts[number + 1] - starts[number]
            samples = past + count >= int(batch.num_tokens_no_spec[number])
            row = arguments[ROW]
            self._numbers[row] = number
            chunks.append(Chunk(row, starts[number], past, count, samples))
        return chunks

    def _tokens_of_row(self, row: int, start: int, stop: int) -> list[int]:
        """Returns the tokens of a row in the current batch; an empty list for others."""
        if row not in self._numbers:
            return []
        batch, number = self.runner.input_batch, self._numbers[row]
        stop = min(stop, int(batch.num_tokens_no_spec[number]))
        return batch.token_ids_cpu[number, start:stop].tolist()


def _model_runner(engine: Any) -> Any:
    """Returns the runner of vLLM's model; raises `Unsupported` if it is not the one known here."""
    worker = engine.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    batch = getattr(runner, "input_batch", None)
    missing = [name for name in NAMES_OF_RUNNER if not hasattr(runner, name)]
    missing += [name for name in NAMES_OF_BATCH if not hasattr(batch, name)]
    if missing:
        raise Unsupported(
            f"vLLM's {type(runner).__name__} has no {missing[0]}: hookkit knows the first version "
            "of its model runner; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    return runner


def _sampling_params(sampled: SampledRun, row: int) -> Any:
    """Returns vLLM's parameters for a row; raises `BadArgument` where it refuses them."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    try:
        return SamplingParams(**sampled.settings, seed=sampled.seeds[row], extra_args={ROW: row})
    except Exception as error:  # noqa: BLE001  a class of vLLM
        raise BadArgument(f"vLLM refuses the arguments of this generate: {error}") from None


def _logit_scale(config: Any) -> float:
    """The number by which the head's output is multiplied, as the configuration says it."""
    scale = getattr(config, "logit_scale", None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def main(address: str) -> None:
    """Starts the engine that the first message describes, then answers one message after another.

    An answer is a pair: True and a value, or False and an `EngineFailure`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which ends this process
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    key = bytes.fromhex(os.environ.pop("HOOKKIT_ENGINE_KEY"))
    connection = Client(address, authkey=key)
    process: EngineProcess | None = None
    while True:
        try:
            name, value = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            if name == "start":
                process = EngineProcess(value)
                answer = process.facts
            else:
                answer = getattr(process, name)(value)
        except Exception as error:  # noqa: BLE001  it is raised in the user's process
            _send(connection, (False, EngineFailure.of(error)))
            continue
        _send(connection, (True, answer))


def _send(connection: Connection, answer: Any) -> None:
    connection.send_bytes(pickle.dumps(answer, protocol=5))


if __name__ == "__main__":
    main(sys.argv[1])
