"""A step that was compiled serves all runs of the process that have its options, model and mesh."""

from collections import Counter
from pathlib import Path

import jax
import tiny
from pairs import make_batch

from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig, LoraConfig, OptimizerConfig
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.weights.pretrained import load_pretrained


def test_a_second_run_compiles_no_step(tmp_path: Path) -> None:
    """Its model is read anew, and its options are another object; other options are another program."""
    folder, mesh = tiny.folder(tmp_path / "model", layers=1, vocab=300), make_mesh(1, devices=jax.devices()[:1])
    compiled: Counter[str] = Counter()

    def listen(event: str, seconds: float, **about: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled[str(about.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        losses, counts = [], []
        for rate, rank in ((1e-3, 0), (1e-3, 0), (1e-2, 0), (1e-3, 2)):
            lora = LoraConfig(rank=rank)
            model, variables = load_pretrained(str(folder), mesh=mesh, lora=lora)
            config = DPOConfig(reference="live", optimizer=OptimizerConfig(learning_rate=rate))
            state = dpo.init_state(model, variables, config)
            for _ in range(2):
                state, metrics = dpo.jit_train_step(config, mesh)(state, put_batch(mesh, make_batch(2)))
            losses.append(float(metrics["loss"]))
            counts.append(compiled["jit(train_step)"])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts == [1, 1, 2, 3]
    assert losses[0] == losses[1] != losses[2]
