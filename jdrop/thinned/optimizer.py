"""An optimizer that leaves deleted units unchanged, for steps at full size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdrop.thinned.units import ThinningError


def freeze_deleted(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that leaves deleted units as they were: their weights, and its state for them.

    Where `kept` is True, the update and the state are those of `optimizer`. Elsewhere the update
    is 0, and the state, for instance the moments, does not change. A zero gradient alone does not
    achieve this: momentum continues, and moments and weights decay. State that belongs to no
    parameter, such as a count of steps, always advances.

    The state is that of `optimizer`. `update` needs one more argument, `kept`: a tree like the
    parameters, of Boolean arrays that broadcast to them, True where entries belong to kept units.

    Args:
        optimizer: any optax optimizer whose update of an entry does not depend on other entries.
            Others, such as `optax.lamb`, also see the entries of deleted units.

    Raises:
        TypeError: an update without `kept`.
        ThinningError: an optimizer that accumulates the gradients of several steps, or whose state
            does not consist of arrays like the parameters.

    Example:
        >>> import jdrop
        >>> params = {"w": jnp.ones((3, 8)), "b": jnp.ones((1, 8)), "v": jnp.ones((8, 2))}
        >>> optimizer = freeze_deleted(optax.adamw(0.1))
        >>> state = optimizer.init(params)
        >>> mask = jdrop.keep_mask(jax.random.key(0), (1, 8), 0.5)  # one for the batch
        >>> def loss(params, x):
        ...     hidden = jnp.tanh(x @ params["w"] + params["b"])
        ...     return jnp.mean(jnp.square(jdrop.apply_mask(mask, hidden, 0.5) @ params["v"]))
        >>> grads = jax.grad(loss)(params, jnp.ones((4, 3)))
        >>> kept = {"w": mask, "b": mask, "v": mask.T}
        >>> updates, state = optimizer.update(grads, state, params, kept=kept)
        >>> bool(jnp.array_equal(updates["b"] != 0, mask))
        True

    Reference:
        Hinton et al. 2012, arXiv:1207.0580, which restores deleted units after each step.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(
        updates: Any, state: Any, params: Any = None, *, kept: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if kept is None:
            raise TypeError(
                "update needs kept, a tree like the parameters that is True where entries belong "
                "to kept units. `fit` and `train_step` do not give it; train a network of `thin` "
                "with the optimizer itself instead, which leaves deleted units unchanged too."
            )
        new_updates, new_state = inner.update(updates, state, params, **extra)

        def zero_if_deleted(update: Any, kept: Any) -> Any:
            return update if _is_masked(update) else jnp.where(kept, update, jnp.zeros_like(update))

        new_updates = jax.tree.map(zero_if_deleted, new_updates, kept, is_leaf=_is_masked)
        kept_state = map_state(inner, lambda _, kept: kept, state, updates, kept, jnp.array(True))
        return new_updates, jax.tree.map(jnp.where, kept_state, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def map_state(
    optimizer: optax.GradientTransformation,
    function: Callable[[Any, Any], Any],
    state: Any,
    params: Any,
    values: Any,
    otherwise: Any,
) -> Any:
    """Maps `function` over the state arrays that belong to parameters.

    All other leaves become `otherwise`.

    Args:
        optimizer: the optimizer of the state.
        function: `function(array, value)`, with the value of the parameter that the array is for.
        state: the state of the optimizer.
        params: the parameters, or arrays of their shapes.
        values: a tree like the parameters.
        otherwise: the leaf in place of arrays that belong to no parameter.

    Raises:
        ThinningError: an optimizer that accumulates the gradients of several steps, or whose state
            does not consist of arrays like the parameters.
    """

    def accumulates(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    if any(map(accumulates, jax.tree.leaves(state, is_leaf=accumulates))):
        raise ThinningError(
            "optax.MultiSteps accumulates the gradients of several steps. Each step deletes other "
            "units, so no unit would stay as it was; use larger batches instead."
        )

    def map_array(array: Any, param: Any, value: Any) -> Any:
        # optax.masked leaves a MaskedNode in place of a parameter that it does not update.
        if _is_masked(array):
            return array
        if array.shape != param.shape:
            raise ThinningError(
                f"the optimizer keeps an array of shape {array.shape} for parameters of shape "
                f"{param.shape}, so the state of deleted units cannot be taken out; use an "
                "optimizer whose state has the shape of the parameters, such as optax.adam."
            )
        return function(array, value)

    try:
        return optax.tree.map_params(
            optimizer,
            map_array,
            state,
            params,
            values,
            transform_non_params=lambda leaf: otherwise,
            is_leaf=_is_masked,
        )
    except ThinningError:
        raise
    except (IndexError, TypeError, ValueError) as error:
        raise ThinningError(
            "optax cannot tell which arrays of the optimizer's state belong to which parameter; "
            "use another optimizer, such as optax.adam."
        ) from error


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
