"""Step time and peak memory of the DPO step on SmolLM2-135M, in turns with a bare PyTorch loop.

    python benchmarks/dpo_step.py --length 256 --rounds 9

Full fine-tuning in float32, a live reference, `--pairs` pairs of exactly `--length` tokens, half of them prompt. Each
contender is a process of its own (so that its peak memory is its own) and holds its weights all the time; in each
round each takes one step, in turns, while the others sleep. Machines drift, so what counts is the median over rounds
of the ratio within a round. All contenders start from the same random weights of SmolLM2's shape, and the log-
probabilities that they see in the first step are compared, so that nobody wins by computing something else.

    windows     ours, prompts once, packed: the default of `dpo-jax dpo`; where all rows are as long, no less work than
    shared      ours, the prompt computed once for both responses, padded
    separate    ours, two whole sequences a pair: the work that the PyTorch loop does
    torch       transformers' LlamaForCausalLM, head on response positions only, torch.optim.AdamW
    torch-fused the same with AdamW(fused=True)
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CONTENDERS = ("windows", "shared", "separate", "torch", "torch-fused")
BETA, LEARNING_RATE, SEED = 0.1, 1e-6, 0
Step = Callable[[], dict[str, float]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens of one sequence (prompt and response)")
    parser.add_argument("--prompt", type=int, default=None, help="of these, prompt tokens (default: half)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a step")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one that warms up")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots", help="ours: what is recomputed")
    parser.add_argument("--layers", type=int, default=30, help="fewer than 30 for a quick look")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=None, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prompt is None:
        options.prompt = options.length // 2
    if not 0 < options.prompt < options.length:
        parser.error(f"--prompt {options.prompt} must lie between 0 and --length {options.length}")
    return options


def architecture(layers: int) -> dict:
    """SmolLM2-135M's configuration, in Hugging Face's words."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def token_ids(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, P] and responses [B, 2, R]: random ids."""
    random = np.random.default_rng(SEED)
    shape = (options.pairs, 2, options.length - options.prompt)
    return random.integers(3, 49152, (options.pairs, options.prompt)), random.integers(3, 49152, shape)


def write_weights(folder: Path, layers: int) -> None:
    """Random weights that every contender reads."""
    import jax

    import dpo_jax
    from dpo_jax.model.architecture import from_hf
    from dpo_jax.model.llama import Llama
    from dpo_jax.model.variables import init_variables

    model = Llama(from_hf(architecture(layers), "SmolLM2-135M"))
    dpo_jax.save_pretrained(folder, model, init_variables(model, jax.random.key(SEED)), None)


def our_step(options: argparse.Namespace) -> Step:
    """`dpo.jit_train_step` on a mesh of one device."""
    import jax

    import dpo_jax
    from dpo_jax import mesh as meshes
    from dpo_jax.align import dpo
    from dpo_jax.config import DPOConfig, OptimizerConfig
    from dpo_jax.data.sets.group_packing import Packing, pack_batch
    from dpo_jax.types import PreferenceBatch

    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.01, clip_norm=None)
    config = DPOConfig(beta=BETA, reference="live", layout=options.worker, optimizer=optimizer)
    mesh = dpo_jax.make_mesh(devices=jax.devices()[:1])
    model, variables = dpo_jax.load_pretrained(options.weights, mesh=mesh, remat=options.remat)
    state = dpo.init_state(model, variables, config)
    del variables
    step = dpo.jit_train_step(config, mesh)
    prompts, responses = (x.astype(np.int32) for x in token_ids(options))
    batch = PreferenceBatch(
        prompts=prompts,
        prompt_lengths=np.full(prompts.shape[:1], prompts.shape[1], np.int32),
        responses=responses,
        response_lengths=np.full(responses.shape[:2], responses.shape[2], np.int32),
        weights=np.ones(prompts.shape[:1], np.float32),
        rows=np.arange(options.pairs, dtype=np.int32) + 1,
    )
    if options.worker == "windows":
        batch = pack_batch(batch, Packing(1))

    def take() -> dict[str, float]:
        nonlocal state
        state, metrics = step(state, meshes.put_batch(mesh, batch))
        jax.block_until_ready(state)
        return {name: float(metrics[name]) for name in ("loss", "logps/chosen", "logps/rejected")}

    return take


def torch_step(options: argparse.Namespace) -> Step:
    """The same step in plain PyTorch. Rows are chosen and rejected sequences, all of one length: no padding mask."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(options.weights, dtype=torch.float32)
    reference = copy.deepcopy(policy).requires_grad_(False)
    fused = True if options.worker == "torch-fused" else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=fused)
    prompts, responses = token_ids(options)
    rows = np.concatenate([np.concatenate([prompts, responses[:, k]], axis=1) for k in range(2)])
    tokens = torch.tensor(rows)
    targets = tokens[:, options.prompt :]

    def sums(model: torch.nn.Module) -> torch.Tensor:
        hidden = model.model(tokens).last_hidden_state[:, options.prompt - 1 : -1]
        logits = model.lm_head(hidden)
        at_target = torch.gather(logits, -1, targets[..., None])[..., 0]
        return (at_target - torch.logsumexp(logits, dim=-1)).sum(-1)

    def take() -> dict[str, float]:
        with torch.no_grad():
            base = sums(reference)
        logps = sums(policy)
        chosen, rejected = (logps - base).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        means = [half.mean().item() for half in logps.detach().chunk(2)]
        return {"loss": loss.item(), "logps/chosen": means[0], "logps/rejected": means[1]}

    return take


def work(options: argparse.Namespace) -> None:
    """A contender: one step for each line on stdin, one line of figures on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    take = torch_step(options) if options.worker.startswith("torch") else our_step(options)
    print("ready", file=answers)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        figures = take()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        share = cpu / wall / len(os.sched_getaffinity(0))
        print(json.dumps({**figures, "seconds": wall, "cpu_share": share, "peak_gib": peak}), file=answers)


class Contender:
    """A worker process, and what it measured."""

    def __init__(self, name: str, weights: Path):
        self.name, self.steps = name, []
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--weights", str(weights)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        return line

    def take(self) -> None:
        """One step."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        self.steps.append(json.loads(self._read()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(contenders: list[Contender]) -> dict:
    """Medians of each contender, and of the ratios to the last one within each round."""
    base = contenders[-1]
    table = {}
    for contender in contenders:
        timed = contender.steps[1:]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(timed, base.steps[1:], strict=True)]
        table[contender.name] = {
            "seconds": statistics.median(s["seconds"] for s in timed),
            f"ratio_to_{base.name}": statistics.median(ratios),
            "first_step_seconds": contender.steps[0]["seconds"],
            "peak_gib": contender.steps[-1]["peak_gib"],
            "cpu_share": statistics.median(s["cpu_share"] for s in timed),
            "first_logps": [contender.steps[0][f"logps/{which}"] for which in ("chosen", "rejected")],
        }
    return table


def main() -> None:
    options = arguments()
    if options.worker:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        write_weights(weights, options.layers)
        contenders = [Contender(name, weights) for name in options.contenders]
        for turn in range(options.rounds + 1):
            for contender in contenders:
                contender.take()
                print(f"round {turn} {contender.name:12} {contender.steps[-1]['seconds']:7.2f} s", file=sys.stderr)
                time.sleep(0.3)  # lets the threads of this one go to sleep
        for contender in contenders:
            contender.close()
    table = compare(contenders)
    base = contenders[-1].name
    shape = f"{options.pairs} pairs of {options.length} tokens, {options.prompt} of them prompt"
    print(f"{shape}; medians of {options.rounds} rounds")
    print(f"{'':12} {'s/step':>8} {'/ ' + base:>13} {'first step':>11} {'peak GiB':>9} {'CPU share':>10}")
    for name, row in table.items():
        print(
            f"{name:12} {row['seconds']:8.2f} {row[f'ratio_to_{base}']:13.2f} {row['first_step_seconds']:11.2f} "
            f"{row['peak_gib']:9.2f} {row['cpu_share']:10.2f}"
        )
    spread = np.ptp([row["first_logps"] for row in table.values()], axis=0).max()
    print(f"log-probabilities of the first step agree within {spread:.1e} nats a response")
    if min(row["cpu_share"] for row in table.values()) < 0.8:
        print("warning: a contender had less than 80 % of the processors; discard this run if the machine was busy")
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("length", "prompt", "pairs", "rounds", "remat", "layers")}
        options.out.write_text(json.dumps({"settings": settings, "figures": table}, indent=2))
    return None


if __name__ == "__main__":
    main()
