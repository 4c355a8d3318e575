"""The rule that deleted units stay as they were, for steps at full size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdrop.thinned.structure import ThinningError


def freeze_deleted(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that leaves deleted units as they were: weights, and its own state for them.

    Where `kept` is True, the update and the state are those of `optimizer`; elsewhere the update
    is 0 and the state, moments for instance, is what it was. A zero gradient alone does not do
    that: momentum goes on, moments and weights decay. What the state holds for no parameter in
    particular, such as a count of steps, always goes on.

    The state is that of `optimizer`. `update` needs one argument more: `kept`, a tree like the
    parameters of Boolean arrays that broadcast to them, as `Thinning.entries` gives it.

    Args:
        optimizer: any optax optimizer whose updates of one entry do not depend on other entries;
            others, such as `optax.lamb`, see those of deleted units.

    Raises:
        TypeError: an update without `kept`.
        ThinningError: an optimizer that gathers the gradients of several steps, or whose state is
            not made of arrays like the parameters.

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
        Hinton et al. 2012, arXiv:1207.0580: deleted units are restored as they were.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(
        updates: Any, state: Any, params: Any = None, *, kept: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if kept is None:
            raise TypeError(
                "update needs kept, a tree like the parameters that is True where entries belong "
                "to kept units. `fit` and `train_step` do not give it: there a network of `thin` "
                "and the optimizer itself do the same."
            )
        new_updates, new_state = inner.update(updates, state, params, **extra)

        def at_kept(new: Any, kept: Any) -> Any:
            return new if _is_left_out(new) else jnp.where(kept, new, jnp.zeros_like(new))

        new_updates = jax.tree.map(at_kept, new_updates, kept, is_leaf=_is_left_out)
        in_state = map_state(inner, lambda leaf, kept: kept, state, updates, kept, jnp.array(True))
        return new_updates, jax.tree.map(jnp.where, in_state, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def map_state(
    optimizer: optax.GradientTransformation,
    function: Callable[[Any, Any], Any],
    state: Any,
    params: Any,
    of_params: Any,
    otherwise: Any,
) -> Any:
    """A tree like an optimizer's state: of its arrays for parameters, and for the rest `otherwise`.

    Args:
        optimizer: what the state is of.
        function: of an array of the state and what `of_params` holds for its parameter.
        state: of the optimizer.
        params: the parameters, or what has their shapes.
        of_params: a tree like the parameters.
        otherwise: stands for arrays that are for no parameter in particular.

    Raises:
        ThinningError: see `freeze_deleted`.
    """

    def gathers(part: Any) -> bool:
        return isinstance(part, optax.MultiStepsState)

    if any(map(gathers, jax.tree.leaves(state, is_leaf=gathers))):
        raise ThinningError(
            "optax.MultiSteps gathers the gradients of several steps, in each of which other units "
            "are deleted, so that none stays as it was; take larger batches, and `num_groups` of "
            "`thin` for more than one mask in each."
        )

    def at(leaf: Any, param: Any, of_param: Any) -> Any:
        # In the place of a parameter that this part of the optimizer does not see.
        if _is_left_out(leaf):
            return leaf
        if leaf.shape != param.shape:
            raise ThinningError(
                f"the optimizer keeps an array of shape {leaf.shape} for parameters of shape "
                f"{param.shape}, so that no part of it can be taken out; take an optimizer "
                "whose state is of the shape of the parameters, such as optax.adam."
            )
        return function(leaf, of_param)

    try:
        return optax.tree.map_params(
            optimizer,
            at,
            state,
            params,
            of_params,
            transform_non_params=lambda leaf: otherwise,
            is_leaf=_is_left_out,
        )
    except ThinningError:
        raise
    except (IndexError, TypeError, ValueError) as error:
        raise ThinningError(
            "optax cannot tell which arrays of the optimizer's state are for which parameter; take "
            "another optimizer, such as optax.adam."
        ) from error


def _is_left_out(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
