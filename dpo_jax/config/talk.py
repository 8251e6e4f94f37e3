"""Options of the commands that talk: chat, serve."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.checks import Options, require
from dpo_jax.config.sections import MeshConfig, SampleConfig

TALKING = SampleConfig(max_new_tokens=1024, temperature=0.7, top_p=0.9)
"""How `chat` draws where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class TalkOptions(Options):
    """What both need."""

    template: str | None = None
    """Chat template: llama2, llama3, zephyr or chatml. Not given: the tokenizer's own."""
    batch_size: int = 8
    """Responses written at once, over all devices; one that is done makes room for the next."""
    max_length: int | None = None
    """Most tokens of a prompt and its response together. Not given: the model's context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of a model's config.json that are not known here and change nothing: they are left out."""

    def __post_init__(self) -> None:
        self.mesh.draws_only()
        self.at_least("--", batch_size=1, max_length=2)


@dataclass(frozen=True, kw_only=True)
class ServeRun(TalkOptions):
    """Models behind an OpenAI-compatible endpoint: `dpo-jax serve`.

    /v1/chat/completions, /v1/completions and /v1/models, streamed or not, with seed, logprobs, stop and n. Every
    request has settings of its own and joins those that are being written; its text depends on none of them.
    """

    model: tuple[str, ...]
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2; several: --model A
    --model B. Requests call them by the same names."""
    host: str = "127.0.0.1"
    """Address to listen at. One that others can reach needs the environment variable DPO_JAX_SERVE_TOKEN, which their
    requests send as the API key."""
    port: int = 8000
    """0: any that is free, which is said."""
    queue: int = 256
    """Requests that may wait for a model; more are answered with 429."""
    max_body: int = 8 * 2**20
    """Most bytes of a request; longer ones are answered with 413."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.model, "--model names at least one model")
        double = [name for i, name in enumerate(self.model) if name in self.model[:i]]
        require(not double, f"--model {' '.join(double)} is given twice")
        self.at_least("--", queue=1, max_body=1)
        require(0 <= self.port < 2**16, "--port must lie in [0, 65536)")


@dataclass(frozen=True, kw_only=True)
class ChatRun(TalkOptions):
    """Talk to a model in the terminal: `dpo-jax chat`.

    /system TEXT, /reset, /undo, /save FILE and /quit; Ctrl-C ends a response, not the chat.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    against: str | None = None
    """Another model, which answers each line too, in a dialogue of its own."""
    system: str | None = None
    """System prompt to begin with."""
    seed: int | None = None
    """Seed of the draw, to say the same again. Not given: another each time."""
    batch_size: int = 1
    """Responses written at once."""
    sample: SampleConfig = field(default_factory=lambda: TALKING)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seed is None or 0 <= self.seed < 2**32, "--seed must lie in [0, 2^32)")
