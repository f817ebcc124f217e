"""`hookkit generate --engine vllm` prints what the command prints without an engine."""

from served_models import PROMPTS, needs_vllm

pytestmark = needs_vllm

ARGUMENTS = (
    "max_model_len=128",
    "max_num_seqs=4",
    "block_size=32",
    "kv_cache_memory_bytes=33554432",
)


def test_the_command_serves_a_model(hookkit, model_folder):
    words = ["generate", *PROMPTS[:3], "--model", str(model_folder), "--dtype", "float32"]
    words += ["--ban", "e", "--ablate", "mlp_out.1", "--max-new-tokens", "6", "--csv"]
    expected = hookkit(*words)
    assert expected.exit_code == 0, expected.stderr
    serving = ["--engine", "vllm"]
    for argument in (*ARGUMENTS, "model_impl=transformers"):
        serving += ["--engine-argument", argument]
    done = hookkit(*words, *serving)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == expected.stdout


def test_what_is_impossible_ends_with_status_2_and_no_engine(hookkit, model_folder):
    words = ["generate", PROMPTS[0], "--model", str(model_folder), "--engine", "vllm"]
    for more, message in (
        (["--engine-argument", "enable_lora=true"], "enable_lora=True"),
        (["--engine-argument", "enforce_eager=false"], "enforce_eager=False"),
        (["--device", "cpu"], "vLLM places its model"),
    ):
        done = hookkit(*words, *more)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr.splitlines()[-1]
