"""The networks of a linen module, see `jdrop.linen.as_network`."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
from flax.core import freeze
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jax import Array
from jax.typing import ArrayLike

from jdrop import stochastic_depth
from jdrop.attention_sites import NO_KEY, with_site
from jdrop.calls import CallFn, ModeCheck, call_parameters, mode_attributes
from jdrop.linen_swap import call_swapped, call_with_attributes, is_pending
from jdrop.network import AttentionDropout, DropoutSite, Network, ReplaceFn, Variables


@dataclass(frozen=True, eq=False)
class LinenAdapter:
    """Makes networks of one module.

    Attributes:
        module: the module in no particular mode.
        call: calls the module.
        choose: chooses what predictions are made of.
        check: looks whether the mode reaches the layers.
    """

    module: nn.Module
    call: CallFn
    choose: Callable[[Any], Any]
    check: ModeCheck

    @cached_property
    def modules(self) -> dict[bool, nn.Module]:
        """The module in prediction, False, and in training, True."""
        taken = {p.name for p in call_parameters(type(self.module)) or ()}
        attributes = {
            field.name: getattr(self.module, field.name)
            for field in dataclasses.fields(self.module)
            if field.init and field.name not in ("parent", "name", *taken)
        }
        changed = {train: mode_attributes(attributes, train=train) for train in (False, True)}
        return {
            train: self.module.clone(**changes) if changes else self.module
            for train, changes in changed.items()
        }

    def network(self, replace: ReplaceFn | None, attention_dropout: AttentionDropout) -> Network:
        """The network, with `replace` called in place of its dropout layers."""

        def method(
            key: Array | None, *, train: bool, running_statistics: bool
        ) -> Callable[[nn.Module, Any], Any]:
            """What `module.apply` runs in place of the module's own call."""

            def run(bound: nn.Module, inputs: Any) -> Any:
                if replace is not None:
                    bound = _bound_with_fresh_flag(bound)
                elif not running_statistics:
                    return self.call(bound, inputs, train=train, key=key)
                interceptor = _Interceptor(replace, attention_dropout, running_statistics)
                with nn.intercept_methods(interceptor):
                    return self.call(bound, inputs, train=train, key=key)

            return run

        deterministic = method(None, train=False, running_statistics=False)

        def init(key: Array, inputs: Any) -> Variables:
            rngs, _ = self._keys(key)
            variables = dict(self.modules[False].init(rngs, inputs, method=deterministic))
            if replace is None:
                self._check_training(variables, inputs, key)
            return variables

        def predict(variables: Variables, inputs: Any) -> Any:
            try:
                return self.modules[False].apply(variables, inputs, method=deterministic)
            except (InvalidRngError, ModifyScopeVariableError) as error:
                error.add_note(
                    "The network has no key, so it must neither draw masks nor change batch "
                    f"statistics. {self.check.explain(inputs)}"
                )
                raise

        def apply(variables: Variables, inputs: Any, key: Array | None) -> Any:
            if key is None:
                return self.choose(predict(variables, inputs))
            if replace is None:
                self._check_training(variables, inputs, key)
            rngs, call_key = self._keys(key)
            sample = method(call_key, train=True, running_statistics=True)
            return self.choose(
                self.modules[True].apply(variables, inputs, rngs=rngs, method=sample)
            )

        def apply_train(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
            if replace is None:
                self._check_training(variables, inputs, key)
            rngs, call_key = self._keys(key)
            mutable = [name for name in variables if name != "params"]
            train = method(call_key, train=True, running_statistics=False)
            outputs, updates = self.modules[True].apply(
                variables, inputs, rngs=rngs, mutable=mutable, method=train
            )
            return outputs, {**variables, **updates}

        return Network(apply, init, apply_train, self.network, choose_fn=self.choose)

    def _keys(self, key: Array) -> tuple[dict[str, Array], Array | None]:
        """The keys of the rng streams, and the key that the call gets."""
        params_key, dropout_key = jax.random.split(key)
        # Not a third child, so that masks do not depend on whether the call takes a key.
        call_key = jax.random.fold_in(key, 2) if self.check.needs_key else None
        return {"params": params_key, "dropout": dropout_key}, call_key

    def _check_training(self, variables: Variables, inputs: Any, key: Array) -> None:
        if not self.check.is_done("training"):
            network = self.network(None, True)
            self.check.training(network, _batch_stats, variables, inputs, key)


def _batch_stats(variables: Variables) -> Any:
    return variables.get("batch_stats", {})


_passes = itertools.count()


def _bound_with_fresh_flag(bound: nn.Module) -> nn.Module:
    """Binds a module again, with a flag that no pass before has had.

    `nn.jit` caches by the flags of a scope, so it reuses no program that was compiled for another
    replacement. Modules among the attributes got their scopes when the module was bound.
    """
    assert bound.scope is not None
    scope = bound.scope.rewound()
    scope.flags = freeze({**scope.flags, "pass": next(_passes)})
    return bound.clone(parent=scope, _deep_clone=True)


@dataclass(frozen=True)
class _Interceptor:
    """Stands between a module and the calls of its layers, in ONE pass.

    Attributes:
        replace: called in place of dropout layers; other layers then accept fewer units.
        attention_dropout: whether attention layers drop weights, or what chooses their keys.
        running_statistics: whether batch and spectral normalisation use their running statistics,
            whatever their flags say.
        num_calls: how often each dropout layer was called in the pass so far.
        running: paths of the dropout layers whose own call is running. A call inside it comes from
            a subclass that calls its base class, and is no second call of the layer.
    """

    replace: ReplaceFn | None
    attention_dropout: AttentionDropout
    running_statistics: bool
    num_calls: Counter[str] = field(default_factory=Counter)
    running: set[tuple[str, ...]] = field(default_factory=set)

    def __call__(
        self, next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        """Calls the layer itself, `next_method`, or what stands in its place."""
        layer = context.module
        if context.method_name != "__call__":
            return next_method(*args, **kwargs)
        if is_pending(layer):
            return call_swapped(layer, next_method, args, kwargs)
        changed: dict[str, Any] = {}
        match layer:
            case nn.Dropout() if self.replace is not None:
                return self._call_dropout(layer, next_method, *args, **kwargs)
            case nn.MultiHeadDotProductAttention() if not self.attention_dropout:
                changed = {"dropout_rate": 0.0}
            case nn.MultiHeadDotProductAttention() if callable(self.attention_dropout):
                if layer.path not in self.running:
                    return self._call_attention(layer, next_method, args, kwargs)
            case nn.SpectralNorm() if self.running_statistics:
                return next_method(*args, **{**kwargs, "update_stats": False})
            case nn.BatchNorm() if self.running_statistics:
                # Flax accepts the flag either in the module or in the call, where it is the second
                # argument.
                changed = {"use_running_average": None}
                args, kwargs = args[:1], {**kwargs, "use_running_average": True}
            case _ if self.replace is not None:
                changed = _features_of_given_weights(layer)
        return call_with_attributes(layer, changed, next_method, args, kwargs)

    def _call_dropout(
        self, layer: Any, own_call: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls `replace` in place of a dropout layer, and the layer if `replace` returns None."""
        assert self.replace is not None
        if layer.path in self.running:
            return own_call(inputs, *args, **kwargs)
        if kwargs.get("branch") is not None:
            inputs = kwargs["branch"](inputs)
            kwargs["branch"] = stochastic_depth.return_computed
        outputs = self.replace(*self._site_and_inputs(layer, inputs, *args, **kwargs))
        if outputs is not None:
            return outputs
        self.running.add(layer.path)
        try:
            return own_call(inputs, *args, **kwargs)
        finally:
            self.running.remove(layer.path)

    def _call_attention(
        self, layer: Any, own_call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Calls an attention layer whose dropout goes to `attention_dropout` instead."""
        name = "/".join(layer.path)

        def choose_key(**properties: Any) -> Array | None:
            assert callable(self.attention_dropout)
            index = self.num_calls[name]
            self.num_calls[name] += 1
            site = DropoutSite(name=name, index=index, layer_class=type(layer), **properties)
            return self.attention_dropout(site)

        attention_fn = with_site(layer.attention_fn, choose_key, partial(layer.make_rng, "dropout"))
        if kwargs.get("dropout_rng") is None and len(args) < 4:
            # A pass without a key cannot make one, but can tell that the layer wants one.
            kwargs = {**kwargs, "dropout_rng": NO_KEY}
        self.running.add(layer.path)
        try:
            return call_with_attributes(
                layer, {"attention_fn": attention_fn}, own_call, args, kwargs
            )
        finally:
            self.running.remove(layer.path)

    def _site_and_inputs(
        self,
        layer: Any,
        inputs: Array,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        rate: ArrayLike | None = None,
        branch: Any = None,
    ) -> tuple[DropoutSite, Array]:
        name = "/".join(layer.path)
        index = self.num_calls[name]
        self.num_calls[name] += 1

        def make_key() -> Array:
            return layer.make_rng(layer.rng_collection) if rng is None else rng

        site = DropoutSite(
            name=name,
            index=index,
            shape=inputs.shape,
            rate=layer.rate if rate is None else rate,
            broadcast_dims=_broadcast_dims(layer, inputs),
            deterministic=nn.merge_param("deterministic", layer.deterministic, deterministic),
            make_key=make_key,
            fixed_count=branch is not None,
            layer_class=type(layer),
        )
        return site, inputs


def _broadcast_dims(layer: nn.Dropout, inputs: Array) -> tuple[int, ...]:
    # The layers are in a room above. Only a `DropPath` has this attribute.
    per_sample = getattr(layer, "per_sample", None)
    if per_sample is None:
        return tuple(layer.broadcast_dims)
    return stochastic_depth.shared_dims(inputs.ndim, per_sample)


def _features_of_given_weights(layer: nn.Module) -> dict[str, Any]:
    """The attribute `features` that fits the weights given, against which Flax checks them."""
    kernel = nn.meta.unbox(layer.variables.get("params", {}).get("kernel"))
    if kernel is None:
        return {}
    match layer:
        case nn.DenseGeneral(features=tuple() | list() as features):
            return {"features": kernel.shape[-len(features) :]}
        case nn.Dense() | nn.DenseGeneral() | nn.Conv() | nn.ConvTranspose(transpose_kernel=False):
            return {"features": kernel.shape[-1]}
        case _:
            return {}
