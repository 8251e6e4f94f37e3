"""Do our GGUF files say in llama.cpp what they say here? Greedy responses of both, token for token.

    pip install llama-cpp-python      # builds llama.cpp from its source: a compiler, some 20 minutes on two cores
    python benchmarks/llama_cpp.py --model smollm2 [--dtypes float32 float16 q8_0] [--tokens 32] [--json FILE]

`dpo-jax convert` writes MODEL at each dtype; `dpo-jax generate` and llama.cpp, each in a process of its own, read that
file and continue the same prompts as they stand, so that the tokenizer inside the file is compared too. llama.cpp
multiplies q8_0 weights by activations rounded to 8 bits (this package computes in float32), so a near tie may fall the
other way there: where two texts part is told, and how many of each side stay as they were with the first dtype.
`--engine xllamacpp` asks that package's wheel instead.

    PYTHONPATH=.:tests/support python benchmarks/llama_cpp.py --families

Log-probabilities of random small models of every family (tests/support/gguf_families.py), written as float32, by
llama-cpp-python with float32 caches: the largest difference, over 24 tokens and over the first 7, which lie in every
window.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "List three fruits:\n1.",
    "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
    "Die Hauptstadt von Österreich heißt",
    "2 + 2 =  4\n3 + 3 =",
)
LLAMA_CPP_PYTHON = """
import json, sys
from llama_cpp import Llama
path, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=512, verbose=False)
for prompt in prompts:
    print(json.dumps(model.create_completion(prompt, max_tokens=tokens, temperature=0)["choices"][0]["text"]))
"""
XLLAMACPP = """
import json, sys, xllamacpp
path, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
told = xllamacpp.CommonParams()
told.model.path, told.n_ctx, told.n_parallel = path, 512, 1
server = xllamacpp.Server(told)
for prompt in prompts:
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "top_k": 1}
    print(json.dumps(server.handle_completions(asked)["choices"][0]["text"]))
"""
FAMILY = """
import sys
import numpy as np
from llama_cpp import Llama
tokens = np.load(sys.argv[2])["tokens"]
model = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
model.eval(tokens.tolist())
np.save(sys.argv[3], model.scores[: len(tokens)].astype(np.float64))
"""
SHORT = {"phi3": {"original_max_position_embeddings": 512, "max_position_embeddings": 1024}}
"""llama.cpp takes LongRoPE's long factors wherever its cache could hold more than the original length; it holds 256."""
ENGINES = {"llama-cpp-python": LLAMA_CPP_PYTHON, "xllamacpp": XLLAMACPP}


def ours(file: Path, folder: Path, tokens: int) -> list[str]:
    """The responses that `dpo-jax generate` writes with the weights of `file`."""
    prompts, out = folder / "prompts.jsonl", folder / f"{file.stem}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    dpo_jax(
        *("generate", "--model", str(file), "--prompts", str(prompts), "--out", str(out), "--raw"),
        *("--sample.temperature", "0", "--sample.max_new_tokens", str(tokens)),
    )
    return [json.loads(line)["response"] for line in out.read_text().splitlines()]


def theirs(engine: str, python: str, file: Path, tokens: int) -> list[str]:
    """The same of llama.cpp."""
    command = [python, "-c", ENGINES[engine], str(file), json.dumps(PROMPTS), str(tokens)]
    printed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith('"')]


def families(python: str) -> None:
    """The differences, family by family."""
    import gguf_families
    import jax.numpy as jnp
    from jax.nn import log_softmax

    from dpo_jax import load_pretrained

    for name in gguf_families.CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder, file = Path(temporary), Path(temporary) / "model.gguf"
            source = gguf_families.folder(folder / "random", name, **SHORT.get(name, {}))
            tokens = np.random.default_rng(1).integers(3, 320, gguf_families.LENGTH)
            ours = gguf_families.logps(*load_pretrained(source), jnp.asarray(tokens, jnp.int32)[None])[0]
            np.savez(folder / "asked.npz", tokens=tokens)
            dpo_jax("convert", "--from", str(source), "--to", str(file), "--format", "gguf", "--dtype", "float32")
            told = [str(file), str(folder / "asked.npz"), str(folder / "found.npy")]
            subprocess.run([python, "-c", FAMILY, *told], check=True, stderr=subprocess.DEVNULL)
            apart = np.abs(np.asarray(log_softmax(jnp.asarray(np.load(told[2])), -1)) - ours)
            print(f"| {name} | {apart.max():.1e} | {apart[:7].max():.1e} |", flush=True)


def dpo_jax(*words: str) -> None:
    """A command of this checkout."""
    subprocess.run([sys.executable, "-m", "dpo_jax", *words], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "q8_0"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--engine", choices=list(ENGINES), default="llama-cpp-python")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the engine")
    parser.add_argument("--families", action="store_true", help="random models of every family instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.families:
        families(options.python)
        return 0
    told = {}
    first: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for dtype in options.dtypes:
            file = folder / f"{dtype}.gguf"
            dpo_jax("convert", "--from", options.model, "--to", str(file), "--format", "gguf", "--dtype", dtype)
            pairs = list(
                zip(
                    ours(file, folder, options.tokens),
                    theirs(options.engine, options.python, file, options.tokens),
                    strict=True,
                )
            )
            equal = sum(a == b for a, b in pairs)
            first = first or pairs
            own = [sum(a[side] == b[side] for a, b in zip(first, pairs, strict=True)) for side in (0, 1)]
            told[dtype] = {"prompts": len(pairs), "equal": equal, "as_first": {"ours": own[0], "llama.cpp": own[1]}}
            print(
                f"{dtype:<9} {equal} of {len(pairs)} responses equal over {options.tokens} tokens;"
                f" as with {options.dtypes[0]}: ours {own[0]}, llama.cpp {own[1]}",
                flush=True,
            )
            for a, b in pairs:
                if a != b:
                    common = next(i for i in range(max(len(a), len(b))) if a[: i + 1] != b[: i + 1])
                    print(f"    after {a[:common]!r}: ours {a[common:][:30]!r}, llama.cpp {b[common:][:30]!r}")
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
