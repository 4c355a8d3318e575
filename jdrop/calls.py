"""How the call of a Flax module is bound: what it gets for the inputs, the mode and the key.

`bind_call` reads the arguments of a module's call. `ModeCheck` looks whether the mode arrives.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from itertools import takewhile
from typing import Any

from jax import Array

from jdrop.dependence import TracedFunction, trace
from jdrop.network import DropoutSite, Network, Variables, site_lister

CallFn = Callable[..., Any]
"""`call(module, inputs, *, train, key)` -> outputs. In prediction `train=False` and `key=None`."""

MODE_FLAGS = {
    "deterministic": False,
    "enable_dropout": True,
    "is_training": True,
    "train": True,
    "training": True,
    "use_running_average": False,
}
"""Arguments and attributes that set the mode of a module, and their values in training."""

LEFT_ALONE = frozenset(
    (
        "debug",
        "decode",
        "init",
        "init_cache",
        "mutable",
        "prefill",
        "sow_weights",
        "stop_gradient",
        "use_cache",
        "verbose",
    )
)
"""Arguments with Boolean defaults that are no modes of dropout; they keep their defaults."""

LEFT_ALONE_PREFIXES = ("capture_", "output_", "return_")

_ON_WORDS = ("train", "dropout")
_OFF_WORDS = ("determin", "eval", "infer", "predict", "test")


class ModeError(ValueError):
    """A module whose masks or batch statistics do not follow the mode."""


@dataclass(frozen=True)
class BoundCall:
    """A `CallFn` for a module, made from the arguments of the module's call.

    Attributes:
        name: of the module's class.
        parameters: of the call, without `self`.
        make_rngs: makes the argument `rngs` from a key; None: the argument gets nothing.
    """

    name: str
    parameters: tuple[Parameter, ...]
    make_rngs: Callable[[Array], Any] | None

    def __call__(self, module: Any, inputs: Any, *, train: bool, key: Array | None) -> Any:
        """Calls the module."""
        args, kwargs = self._place_inputs(inputs)
        given = {*self._inputs_in_order()[: len(args)], *kwargs}
        for parameter in self.parameters:
            name, default = parameter.name, parameter.default
            if name in given:
                continue
            if _is_flag(parameter):
                kwargs[name] = MODE_FLAGS[name] == train
            elif self._takes_key(parameter) and (key is not None or default is Parameter.empty):
                make = self.make_rngs if name == "rngs" else None
                kwargs[name] = key if make is None or key is None else make(key)
            elif default is Parameter.empty and parameter.kind not in _VARIADIC:
                raise ValueError(
                    f"the call of {self.name} needs an argument {name!r}, which the inputs do not "
                    "give; make the inputs a dictionary whose keys are the names of the arguments, "
                    f"or a tuple of them, or give `call=`, for instance {self.example(inputs)}."
                )
        return module(*args, **kwargs)

    def _place_inputs(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as arguments: by position, and by name."""
        if isinstance(inputs, Mapping):
            known = {p.name for p in self.parameters if not _is_flag(p)} & set(inputs)
            unknown = sorted(set(inputs) - known, key=str)
            if known and unknown and not self._has(Parameter.VAR_KEYWORD):
                raise ValueError(
                    f"inputs has the key {unknown[0]!r}, but the call of {self.name} takes "
                    f"{', '.join(p.name for p in self.parameters)}; leave the key out, or give "
                    f"`call=`, for instance {self.example(inputs)}."
                )
            if known:
                return (), dict(inputs)
        names = self._inputs_in_order()
        values = inputs if type(inputs) is tuple and self._takes_several() else (inputs,)
        in_front = [p.name for p in self.parameters if p.kind is not Parameter.KEYWORD_ONLY]
        pairs = zip(names[: len(values)], in_front, strict=False)
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if count == len(names) and self._has(Parameter.VAR_POSITIONAL):
            count = len(values)
        if len(values) - count > len(names[count:]):
            raise ValueError(
                f"inputs is a tuple of {len(values)}, but the call of {self.name} takes "
                f"{len(names)} inputs: {', '.join(names)}; give `call=`, for instance "
                f"{self.example(inputs)}."
            )
        return values[:count], dict(zip(names[count:], values[count:], strict=False))

    def example(self, inputs: Any = None) -> str:
        """A `call=` to write for the module, as a guess."""
        placed = "inputs"
        if isinstance(inputs, Mapping):
            placed = "**inputs"
        elif type(inputs) is tuple and self._takes_several():
            placed = "*inputs"
        words = [placed, *(word for p in self.parameters if (word := _switch(p)))]
        if len(words) == 1:
            words.append("train=train")
        return f"`call=lambda module, inputs, *, train, key: module({', '.join(words)})`"

    @property
    def takes_key(self) -> bool:
        """Whether the call gets a key."""
        return any(self._takes_key(parameter) for parameter in self.parameters)

    def _has(self, kind: Any) -> bool:
        return any(parameter.kind is kind for parameter in self.parameters)

    def _takes_key(self, parameter: Parameter) -> bool:
        """Whether an argument is a key, and no keys of attention."""
        names = {p.name for p in self.parameters}
        if parameter.name == "rngs":
            return self.make_rngs is not None
        return parameter.name in ("key", "rng") and names.isdisjoint(("query", "value", "values"))

    def _inputs_in_order(self) -> list[str]:
        """The arguments that can be inputs."""
        return [
            p.name
            for p in self.parameters
            if p.kind not in _VARIADIC
            and p.name not in MODE_FLAGS
            and not isinstance(p.default, bool)
            and not self._takes_key(p)
        ]

    def _takes_several(self) -> bool:
        arrays = [
            p.name
            for p in self.parameters
            if p.name in self._inputs_in_order()
            and (p.default is None or p.default is Parameter.empty)
        ]
        return len(arrays) > 1 or self._has(Parameter.VAR_POSITIONAL)


_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _is_flag(parameter: Parameter) -> bool:
    """Whether an argument sets the mode."""
    # By default None, it follows another flag.
    follows = parameter.name == "use_running_average" and parameter.default is None
    return parameter.name in MODE_FLAGS and not follows


def _switch(parameter: Parameter) -> str | None:
    """The argument as it could be given in a `call=`; None: it is no mode, as far as names tell."""
    name, default = parameter.name, parameter.default
    if _is_flag(parameter):
        return f"{name}={'train' if MODE_FLAGS[name] else 'not train'}"
    if default is Parameter.empty or name in LEFT_ALONE or name.startswith(LEFT_ALONE_PREFIXES):
        return None
    if isinstance(default, str):
        is_mode = any(word in default for word in _OFF_WORDS)
        return f"{name}='train' if train else {default!r}" if is_mode else None
    if isinstance(default, float):
        return None
    if any(word in name for word in _OFF_WORDS):
        return f"{name}=not train"
    return f"{name}=train" if any(word in name for word in _ON_WORDS) else None


def call_parameters(module_class: type) -> tuple[Parameter, ...] | None:
    """Returns the arguments of a module's call without `self`; None: the module has no call."""
    call = next((vars(c)["__call__"] for c in module_class.__mro__ if "__call__" in vars(c)), None)
    return None if call is None else tuple(inspect.signature(call).parameters.values())[1:]


def bind_call(module_class: type, make_rngs: Callable[[Array], Any] | None = None) -> BoundCall:
    """Reads the arguments of a module's call.

    Args:
        module_class: the class of a linen or nnx module.
        make_rngs: makes the argument `rngs` of the call from a key; None: leave it alone.

    Raises:
        ValueError: a class without `__call__`; an argument with a Boolean default that is no known
            flag. It may be a mode flag of another name; with its default, the network would train
            without dropout.
    """
    name, parameters = module_class.__name__, call_parameters(module_class)
    if parameters is None:
        raise ValueError(
            f"{name} has no __call__; give `call=`, for instance `call=lambda module, inputs, *, "
            "train, key: module.encode(inputs, train=train)`."
        )
    bound = BoundCall(name, parameters, make_rngs)
    for parameter in parameters:
        if (
            isinstance(parameter.default, bool)
            and parameter.name not in {*MODE_FLAGS, *LEFT_ALONE}
            and not parameter.name.startswith(LEFT_ALONE_PREFIXES)
        ):
            raise ValueError(
                f"the call of {name} has an argument {parameter.name!r} that is "
                f"{parameter.default} by default; as_network sets {', '.join(MODE_FLAGS)} and "
                "cannot tell whether it is a mode of dropout too. Give `call=`, for instance "
                f"{bound.example()}."
            )
    return bound


def mode_attributes(attributes: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
    """Returns the attributes that set the mode of a module, with their values.

    Args:
        attributes: of the module. One may be a dataclass, such as a configuration, with a field
            that sets the mode.
        train: the mode.

    Example:
        >>> mode_attributes({"features": 3, "deterministic": True}, train=True)
        {'deterministic': False}
    """
    changed: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in MODE_FLAGS and (value is None or isinstance(value, bool)):
            changed[name] = MODE_FLAGS[name] == train
        elif (
            dataclasses.is_dataclass(value) and not isinstance(value, type) and not callable(value)
        ):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            flags = {
                name: MODE_FLAGS[name] == train
                for name, flag in fields.items()
                if name in MODE_FLAGS and isinstance(flag, bool)
            }
            if flags:
                changed[name] = dataclasses.replace(value, **flags)
    return changed


def output_chooser(outputs: Callable[[Any], Any] | str | int | None) -> Callable[[Any], Any]:
    """Returns the function that chooses what predictions are made of from a module's outputs.

    Args:
        outputs: the function; or a key, the name of an attribute, or an index; None: everything.
            The function raises ValueError if the module's outputs have no such key.
    """
    if outputs is None:
        return lambda everything: everything
    if callable(outputs):
        return outputs

    def choose(everything: Any) -> Any:
        try:
            if isinstance(outputs, str) and not isinstance(everything, Mapping):
                return getattr(everything, outputs)
            return everything[outputs]
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            keys = f" with {', '.join(map(str, everything))}" * isinstance(everything, Mapping)
            raise ValueError(
                f"outputs={outputs!r} is not in what the module returns, "
                f"{type(everything).__name__}{keys}; give another key or index, or a function."
            ) from error

    return choose


@dataclass(eq=False)
class ModeCheck:
    """Looks once whether the masks and the batch statistics of a module follow the mode.

    A pass that cannot be traced is not checked: what stands against tracing it, the pass itself
    tells when it runs.

    Attributes:
        call: how the module is called.
        has_dropout: whether masks must be drawn in training.
        done: the modes that have been checked.
    """

    call: CallFn
    has_dropout: bool
    done: set[str] = field(default_factory=set)

    def is_done(self, mode: str) -> bool:
        """Whether this mode has been checked."""
        return mode in self.done

    @property
    def needs_key(self) -> bool:
        """Whether the call gets a key."""
        return self.call.takes_key if isinstance(self.call, BoundCall) else True

    def training(
        self,
        network: Network,
        batch_stats: Callable[[Variables], Any],
        variables: Variables,
        inputs: Any,
        key: Array,
    ) -> None:
        """Raises if training draws no mask, or leaves all batch statistics as they are.

        Args:
            network: the network; its dropout sites can be listed.
            batch_stats: returns the batch statistics among variables.
            variables: of the network, or their shapes and dtypes.
            inputs: of the network.
            key: any key; it is not consumed.

        Raises:
            ModeError: no dropout layer is switched on, and nothing depends on the key; batch
                statistics that no pass changes, unless the user has given the call.
        """
        sites: list[DropoutSite] = []
        listing = network.replace_dropout(site_lister(sites), attention_dropout=True)

        def run(params: Any, state: Any, inputs: Any, key: Array) -> tuple[Any, ...]:
            outputs, updated = listing.apply_train({**params, **state}, inputs, key)
            return (outputs, updated), batch_stats(updated)

        params = {name: value for name, value in variables.items() if name == "params"}
        state = {name: value for name, value in variables.items() if name != "params"}
        traced = _trace_or_none(run, params, state, inputs, key)
        if traced is None:
            return
        is_on = any(not site.deterministic for site in sites)
        if self.has_dropout and not is_on and not traced.depends(outputs=[0], arguments=[3]):
            layers = ", ".join(dict.fromkeys(site.name or "itself" for site in sites))
            reason = "it has no dropout layer, or none that its mode switches on"
            if layers:
                reason = f"its dropout layers are switched off: {layers}"
            raise ModeError(
                f"the network draws no mask in training: {reason}. {self.explain(inputs)} Give "
                "`has_dropout=False` for a network that is meant to have no dropout."
            )
        is_frozen = 1 in traced.outputs and not traced.depends(outputs=[1], arguments=[0, 2])
        if is_frozen and isinstance(self.call, BoundCall):
            raise ModeError(
                "the batch statistics of the network stay as they are in training. "
                f"{self.explain(inputs)} If they are meant to stay, give that `call=` without the "
                "flag."
            )
        self.done.add("training")

    def prediction(
        self,
        run: Callable[[Any, Any, Array, list[DropoutSite]], tuple[Any, Any]],
        variables: Variables,
        inputs: Any,
        key: Array,
    ) -> None:
        """Raises if a prediction draws masks, or uses the statistics of its batch.

        Args:
            run: maps variables, inputs, the key of the rng streams, and a list that it fills with
                the dropout sites, to outputs and batch statistics, as in a prediction.
            variables: of the network.
            inputs: of the network.
            key: any key; it is not consumed.

        Raises:
            ModeError: outputs that depend on the key, batch statistics that depend on the inputs.
        """
        sites: list[DropoutSite] = []

        def run_listing(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Any]:
            return run(variables, inputs, key, sites)

        traced = _trace_or_none(run_listing, variables, inputs, key)
        if traced is None:
            return
        if traced.depends(outputs=[0, 1], arguments=[2]):
            layers = [site.name or "itself" for site in sites if not site.deterministic]
            places = list(dict.fromkeys(layers)) or traced.consumptions([0, 1], 2)
            raise ModeError(
                f"the network draws masks without a key: {', '.join(places)} stays on in "
                f"prediction. {self.explain(inputs)}"
            )
        if traced.depends(outputs=[1], arguments=[1]):
            raise ModeError(
                "the network uses the statistics of its batch in prediction, so that an example "
                f"sees the others. {self.explain(inputs)}"
            )
        self.done.add("prediction")

    def explain(self, inputs: Any) -> str:
        """What was given to the call, and what to give."""
        if not isinstance(self.call, BoundCall):
            return "Check what your `call` gives the module for `train` and `key`."
        flags = [p.name for p in self.call.parameters if _is_flag(p)]
        name, example = self.call.name, self.call.example(inputs)
        if name == "Sequential":
            return (
                "A Sequential passes flags to its first layer only; give a `call=` that calls its "
                "layers: `def call(module, inputs, *, train, key)`, with a loop over "
                "`module.layers`."
            )
        if flags:
            return (
                f"as_network sets {' and '.join(flags)} by name, and {name} does not pass this on; "
                f"give `call=` to set it in another way, for instance {example} with the flag by "
                "position."
            )
        return (
            f"The call of {name} takes no flag that as_network knows; give `call=` to switch its "
            f"layers, for instance {example}."
        )


def _trace_or_none(function: Callable[..., Any], *arguments: Any) -> TracedFunction | None:
    try:
        return trace(function, *arguments)
    except Exception:  # A user's module may raise anything.
        return None
