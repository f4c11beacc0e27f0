"""Flax modules, linen and nnx, as pure functions of their weights."""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen, traverse_util
from flax.errors import InvalidRngError
from jax.extend.core import get_opaque_trace_state

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers
from gsdd_jax.nets.conv import conv_general_dilated

Init: TypeAlias = Callable[[jax.Array], Any]
Apply: TypeAlias = Callable[[Any, jax.Array], Any]


def functions(network: Any, image_shape: tuple[int, ...]) -> tuple[Init, Apply]:
    """Returns `init` and `apply` of a `gsdd_jax.nets.Network` for a Flax module.

    Args:
        network: a linen module; or a class of nnx modules or another function of `rngs` that returns one, which is put
            into evaluation mode (`module.eval()`).
        image_shape: (h, w, c), or (t, h, w, c).

    Raises:
        ValueError: The module keeps more than weights, or draws random numbers when it is called.
        TypeError: Neither of the two kinds of modules, or an nnx module whose weights are drawn already.
    """
    if isinstance(network, linen.Module):
        return _of_linen(network, image_shape)
    # Half a second to import, and only for those who have nnx modules.
    from flax import nnx

    name = type(network).__name__
    if isinstance(network, nnx.Module):
        raise InputError(
            f"network: this {name} has its weights already, and each training draws them anew; expected its class or a "
            f"function of rngs, such as lambda rngs: {name}(..., rngs=rngs)"
        )
    if not callable(network) or (isinstance(network, type) and not issubclass(network, nnx.Module)):
        found = f"the class {network.__name__}" if isinstance(network, type) else f"{network!r}"
        raise InputError(
            f"network: expected a NetSpec, a Network, a flax.linen module, or a flax.nnx class or function of rngs; "
            f"found {found}"
        )
    return _of_nnx(network)


def _of_linen(module: linen.Module, image_shape: tuple[int, ...]) -> tuple[Init, Apply]:
    name = type(module).__name__

    def init(key: jax.Array) -> Any:
        variables = dict(module.init(key, jnp.zeros((1, *image_shape), jnp.float32)))
        params = variables.pop("params", {})
        _refuse_state(name, list(traverse_util.flatten_dict(variables)))
        return params

    def apply(params: Any, images: jax.Array) -> Any:
        inputs = _DenseInputs()

        def note(call: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
            layer = context.module
            if isinstance(layer, linen.Conv) and layer.conv_general_dilated is None:
                # That of JAX is slow on CPU in loops, which training is. The layer is a copy for this call.
                object.__setattr__(layer, "conv_general_dilated", conv_general_dilated)
            outputs = call(*args, **kwargs)
            if isinstance(layer, linen.Dense) and context.method_name == "__call__":
                inputs.note([*args, *kwargs.values()][0], outputs)
            return outputs

        with linen.intercept_methods(note):
            try:
                outputs, state = module.apply({"params": params}, images, mutable="intermediates")
            except InvalidRngError as error:
                raise _random(name, str(error).partition(" (http")[0]) from error
        return _with_features(outputs, traverse_util.flatten_dict(state.get("intermediates", {})), inputs)

    return layers.at_once(init), apply


def _of_nnx(make: Callable[..., Any]) -> tuple[Init, Apply]:
    from flax import nnx

    name = getattr(make, "__name__", "network")
    by_name = isinstance(make, type) or "rngs" in inspect.signature(make).parameters

    def split(key: jax.Array) -> Any:
        rngs = nnx.Rngs(key)
        module = make(rngs=rngs) if by_name else make(rngs)
        if not isinstance(module, nnx.Module):
            raise InputError(f"network: expected {name} to return a flax.nnx module, found {type(module).__name__}")
        module.eval()
        graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
        params, rng_state, others = states
        # Arrays of no `nnx.Variable` are taken for static ones while they are traced.
        arrays = [
            (*p, k) for p, part in nnx.iter_modules(module) for k, x in vars(part).items() if isinstance(x, jax.Array)
        ]
        _refuse_state(name, [*arrays, *(path for path, _ in nnx.to_flat_state(others))])
        return graph, nnx.to_pure_dict(params), rng_state

    graph, _, rng_state = jax.eval_shape(split, jax.eval_shape(lambda: jax.random.key(0)))

    def random_counts(module: nnx.Module) -> dict[tuple[Any, ...], jax.Array]:
        return {path: count.get_value() for path, count in nnx.to_flat_state(nnx.state(module, nnx.RngCount))}

    def apply(params: Any, images: jax.Array) -> Any:
        # Dropout holds random keys even where it is switched off.
        keys = jax.tree.map(
            lambda x: (
                jax.random.key(0) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros(x.shape, x.dtype)
            ),
            rng_state,
        )
        module = nnx.merge(graph, params, keys)
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.Conv) and layer.conv_general_dilated is jax.lax.conv_general_dilated:
                layer.conv_general_dilated = conv_general_dilated
            if isinstance(layer, nnx.Linear):
                object.__setattr__(layer, "__class__", _noting(type(layer)))
        counts = random_counts(module)
        inputs = _DenseInputs()
        token = _INPUTS.set(inputs)
        try:
            outputs, sown = nnx.capture(module, nnx.Intermediate)(images)
        finally:
            _INPUTS.reset(token)
        for path, count in random_counts(module).items():
            if count is not counts[path]:
                raise _random(name, ".".join(map(str, path)))
        sown = {path: variable.get_value() for path, variable in nnx.to_flat_state(sown)}
        return _with_features(outputs, sown, inputs)

    return lambda key: split(key)[1], apply


class _DenseInputs:
    """What the dense layers of one call read, in order, and how wide their outputs are.

    Layers inside remat, scan and other transformations are left out: what they read cannot leave these.
    """

    def __init__(self) -> None:
        self._trace = get_opaque_trace_state()
        self.seen: list[tuple[jax.Array, int]] = []

    def note(self, inputs: jax.Array, outputs: jax.Array) -> None:
        if get_opaque_trace_state() == self._trace:
            self.seen.append((inputs, outputs.shape[-1]))


_INPUTS: ContextVar[_DenseInputs] = ContextVar("_INPUTS")  # of the call of an nnx module


@cache
def _noting(layer: type) -> type:
    """Derives an nnx layer that notes what it reads; nnx has no interceptors, as linen does."""

    def __call__(self: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        outputs = layer.__call__(self, inputs, *args, **kwargs)
        _INPUTS.get().note(inputs, outputs)
        return outputs

    return type(layer.__name__, (layer,), {"__call__": __call__})


def _refuse_state(name: str, paths: list[tuple[Any, ...]]) -> None:
    if paths:
        raise InputError(
            f"network: {name} keeps {'.'.join(map(str, paths[0]))} beside its weights; expected a function of weights "
            "and images alone, for instance with GroupNorm in place of BatchNorm"
        )


def _random(name: str, where: str) -> InputError:
    return InputError(
        f"network: {name} draws random numbers when it is called: {where}; expected a function of weights and images "
        "alone, with Dropout(deterministic=True)"
    )


def _with_features(outputs: Any, sown: dict[tuple[Any, ...], Any], inputs: _DenseInputs) -> Any:
    """Adds features to logits that come alone: what was sown as "features", else what the last dense layer reads."""
    if not isinstance(outputs, jax.Array) or outputs.ndim != 2:
        return outputs  # `Network.outputs` tells whether these are logits and features
    found = [values for path, values in sown.items() if path[-1] == "features"]
    features = [x for values in found for x in (values if isinstance(values, tuple) else (values,))]
    features = features or [x for x, width in inputs.seen if width == outputs.shape[1]][-1:]
    if len(features) != 1:
        raise InputError(
            f"network: logits come alone, and {len(features)} arrays were sown as 'features'; expected one, or a last "
            "layer that is Dense (nnx: Linear) and outside of remat and scan, or (logits, features) as outputs"
        )
    return outputs, features[0]
