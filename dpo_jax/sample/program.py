"""What compiled generation depends on beside shapes, and the weights that it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dpo_jax import mesh as meshes
from dpo_jax.config import TENSOR, TRAINING, Narrow, SampleConfig, SampleLayout
from dpo_jax.errors import InputError
from dpo_jax.model import llama, narrow, variables as model_variables
from dpo_jax.model.quantised import is_quantised, whole
from dpo_jax.sample import layout as layouts


class Program(NamedTuple):
    """What compiled functions depend on beside shapes; hashable.

    Attributes:
      model:          computes the prompts.
      unrolled:       whether the tokens after them go through unrolled layers; see `Llama.unrolled`.
      cache:          dtype of the cache, by name.
      implementation: of the random numbers, by name.
      layout:         where the weights lie; see `sample/layout.py`.
      mesh:           the one of that layout, or None.
    """

    model: llama.Llama
    unrolled: bool
    cache: str
    implementation: str
    layout: SampleLayout
    mesh: Mesh | None

    @classmethod
    def of(
        cls, model: llama.Llama, config: SampleConfig, implementation: str, mesh: Mesh | None, variables: Any
    ) -> "Program":
        """For the mesh that `variables` lie on, or none; `Weights` have chosen their layout.

        Raises `InputError` where `config.weights` is int8 and this device's integer products are wrong.
        """
        chosen = variables.layout if isinstance(variables, Weights) else None
        if chosen is None:
            chosen = layouts.resolved(config, model, variables, mesh).layout
        elif config.layout not in (None, chosen):
            raise InputError(f"these weights were laid out as {chosen}, and config.layout is {config.layout}")
        assert chosen is not None, "resolved"
        mesh = None if mesh is None else meshes.for_sampling(mesh, whole_rows=chosen == TENSOR)
        with meshes.in_force(mesh):
            if config.weights == "int8" and meshes.platform() == jax.default_backend():  # else they are absent
                narrow.check_integer_products()
            # What is copied anyway may be copied layer by layer: a scan moves every slot of its caches for each token.
            unrolled = chosen != TRAINING or meshes.platform() == "cpu"
        cache = jnp.dtype(config.cache or model.dtype).name
        return cls(model, unrolled, cache, implementation, chosen, mesh)


@partial(jax.tree_util.register_dataclass, data_fields=["prompt", "own"], meta_fields=["layout"])
@dataclass(frozen=True)
class Weights:
    """What a compiled program is given.

    Attributes:
      prompt: variables for the prompts.
      own:    those for the tokens after them, where they are unrolled or narrow; None: the same, which then are one
              argument of the program and not two.
      layout: where they lie; static.
    """

    prompt: Any
    own: Any = None
    layout: SampleLayout = TRAINING

    @property
    def token(self) -> Any:
        """Variables for the tokens after the prompts."""
        return self.prompt if self.own is None else self.own


def make_weights(program: Program, variables: Any, to: Narrow | None) -> Weights:
    """Made once for many tokens: what is laid out anew, unrolled or narrow is a copy. What is made stays as it is.

    With `program.mesh` in force. Raises `InputError` where that was made for another `to`, which is
    `SampleConfig.weights`.
    """
    if isinstance(variables, Weights):
        made = narrow.kind(variables.token)
        if made != to:
            raise InputError(f"these weights were prepared as {made}, and config.weights is {to}")
        return variables
    return _weights(program, variables, to, lambda make, **how: make(variables, program=program, **how))


def _weights(program: Program, variables: Any, to: Narrow | None, made: Callable[..., Any]) -> Weights:
    """`made`: what calls a function that makes weights."""
    own = made(_token_weights, to=to) if program.unrolled or to is not None else None
    # Prompts are computed at once and may gather a layer at a time, where each device has rows of its own.
    prompt = made(_laid_out) if program.layout == TENSOR else _in_place(program, variables)
    return Weights(prompt, own, program.layout)


def _in_place(program: Program, variables: Any) -> Any:
    """The variables as they lie, by the names of the program's mesh: nothing is moved."""
    mesh = program.mesh
    if mesh is None:
        return variables

    def name(path: tuple[Any, ...], x: Any) -> Any:
        where = x.sharding
        if not isinstance(where, NamedSharding) or where.mesh == mesh:
            return x
        where = meshes.sharding(mesh, model_variables.axes_of(path))
        return x.update(sharding=where) if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, where)

    return jax.tree_util.tree_map_with_path(name, variables)


@partial(jax.jit, static_argnames=("program", "to"))
def _token_weights(variables: Any, *, program: Program, to: Narrow | None) -> Any:
    made = variables if to is None else narrow.narrow_variables(variables, to)
    made = model_variables.unroll(made) if program.unrolled else made
    return made if program.layout == TRAINING else _laid_out(made, program=program)


@partial(jax.jit, static_argnames=("program",))
def _laid_out(variables: Any, *, program: Program) -> Any:
    """The variables in the layout of the program, matrices in the dtype that its model computes in."""

    def lay(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if path[0].key == "heads":  # of a reward model, which is refused where it is asked for logits
            return x
        if path[-1].key in ("kernel", "embedding"):
            x = whole(x, program.model.dtype)
        return meshes.constrain(x, _axes(path))

    return jax.tree_util.tree_map_with_path(lay, variables, is_leaf=is_quantised)


def _axes(path: tuple[Any, ...]) -> meshes.LogicalAxes:
    """Logical axes of a weight that every device has the whole width of."""
    return tuple(None if axis == "embed" else axis for axis in model_variables.axes_of(path))


def prepared_shapes(model: llama.Llama, variables: Any, config: SampleConfig, mesh: Mesh) -> Weights:
    """What `prepare` gives for `variables` of shapes with shardings on `mesh`: shapes too, with theirs."""
    program = Program.of(model, config, "", mesh, variables)
    drawn = program.mesh
    assert drawn is not None

    def place(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = model_variables.axes_of(path) if program.layout == TRAINING else _axes(path)
        return x.update(sharding=meshes.sharding(drawn, axes))

    def made(function: Any, **options: Any) -> Any:
        with meshes.in_force(drawn):
            shapes = jax.eval_shape(partial(function, program=program, **options), variables)
        return jax.tree_util.tree_map_with_path(place, shapes)

    return _weights(program, variables, config.weights, made)


def is_narrow(config: SampleConfig) -> bool:
    """Whether weights or caches are: what is drawn is not quite as likely under the model as the sampler says."""
    return config.weights is not None or config.cache is not None


def prepare(model: llama.Llama, variables: Any, config: SampleConfig, *, mesh: Mesh | None = None) -> Weights:
    """What generation reads, made once for many calls: pass it on in place of `variables`.

    It holds a copy where the layout or `config.weights` ask for one, and on CPUs, where layers are unrolled; whoever
    has it gives it up.
    """
    program = Program.of(model, config, "", mesh, variables)
    with meshes.in_force(program.mesh):
        return make_weights(program, variables, config.weights)
