"""Exits with 0 where vLLM itself generates a token from a tiny model, without hooks.

.ci/run asks this first: a processor that vLLM's build does not know is no fault of hookkit.
"""

import os
import sys
import tempfile

import hookkit as hk

SETTINGS = {"hidden_size": 128, "vocab_size": 320, "max_position_embeddings": 64}  # heads of 32


def main() -> int:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        hk.tiny("llama", config=SETTINGS).save(folder)
        engine = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=2**26,
            max_model_len=64,
        )
        settings = SamplingParams(max_tokens=1, detokenize=False)
        [output] = engine.generate([{"prompt_token_ids": [1, 2, 3]}], settings, use_tqdm=False)
    return 0 if len(output.outputs[0].token_ids) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
