"""What compiled generation depends on beside shapes, and the weights that it reads."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import Narrow, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import llama, narrow
from dpo_jax.model import variables as model_variables


class Program(NamedTuple):
    """What compiled functions depend on beside shapes; hashable.

    Attributes:
      model:          computes the prompts.
      unrolled:       whether the tokens after them go through unrolled layers; see `Llama.unrolled`.
      cache:          dtype of the cache, by name.
      implementation: of the random numbers, by name.
      mesh:           or None.
    """

    model: llama.Llama
    unrolled: bool
    cache: str
    implementation: str
    mesh: Mesh | None

    @classmethod
    def of(cls, model: llama.Llama, config: SampleConfig, implementation: str, mesh: Mesh | None) -> "Program":
        """For a mesh that is in force, or none."""
        cache = jnp.dtype(config.cache or model.dtype).name
        return cls(model, meshes.platform() == "cpu", cache, implementation, mesh)


class Weights(NamedTuple):
    """What a compiled program is given.

    Attributes:
      prompt: variables for the prompts.
      own:    those for the tokens after them, where they are unrolled or narrow; None: the same, which then are one
              argument of the program and not two.
    """

    prompt: Any
    own: Any = None

    @property
    def token(self) -> Any:
        """Variables for the tokens after the prompts."""
        return self.prompt if self.own is None else self.own


def make_weights(program: Program, variables: Any, to: Narrow | None) -> Weights:
    """Made once for many tokens: what is unrolled or narrow is a copy. What is made already stays as it is.

    Raises `InputError` where that was made for another `to`, which is `SampleConfig.weights`.
    """
    if isinstance(variables, Weights):
        made = narrow.kind(variables.token)
        if made != to:
            raise InputError(f"these weights were prepared as {made}, and config.weights is {to}")
        return variables
    if not program.unrolled and to is None:
        return Weights(variables)
    return Weights(variables, _token_weights(variables, to=to, unrolled=program.unrolled))


@partial(jax.jit, static_argnames=("to", "unrolled"))
def _token_weights(variables: Any, *, to: Narrow | None, unrolled: bool) -> Any:
    made = variables if to is None else narrow.narrow_variables(variables, to)
    return model_variables.unroll(made) if unrolled else made


def prepare(model: llama.Llama, variables: Any, config: SampleConfig, *, mesh: Mesh | None = None) -> Weights:
    """What generation reads, made once for many calls: pass it on in place of `variables`.

    It holds a copy where `config.weights` asks for fewer bits, and on CPUs, where layers are unrolled.
    """
    mesh = None if mesh is None else meshes.for_sampling(mesh)
    with meshes.in_force(mesh):
        return make_weights(Program.of(model, config, "", mesh), variables, config.weights)
