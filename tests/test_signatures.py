"""Modules with the calls of public code bases become networks.

Each module is small and written for this test; only its call is that of the code base. The table is
`SIGNATURES`: a test for each says that it initialises, trains with masks, and predicts without.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.network import consumed_keys, dropout_sites, predict

X = jnp.linspace(-1, 1, 24).reshape(4, 6)
IDS = jnp.arange(24).reshape(4, 6) % 5
MASK = jnp.ones((4, 6)).at[0, 3:].set(0)


class Graph(NamedTuple):
    nodes: Any
    edges: Any


@flax.struct.dataclass
class Output:
    logits: Any
    hidden: Any


class Linen(nn.Module):
    """What most modules below compute: a hidden layer, dropout, and logits."""

    @nn.compact
    def run(self, x, train):
        x = nn.relu(nn.Dense(8, name="hidden")(x))
        x = jdrop.linen.Dropout(0.5, name="drop")(x, deterministic=not train)
        return nn.Dense(3, name="out")(x)


def embedded(*tokens):
    return sum(jax.nn.one_hot(t, 6).sum(1) for t in tokens)


class VisionTransformer(Linen):
    def __call__(self, inputs, *, train):
        return self.run(inputs, train)


class Init2winit(Linen):
    def __call__(self, x, train):
        return self.run(x, train)


class Conformer(Linen):
    def __call__(self, inputs, paddings, train):
        return self.run(inputs * paddings, train), paddings


class GraphNet(Linen):
    def __call__(self, graph, train):
        return self.run(graph.nodes + graph.edges, train)


class Jaxrl(Linen):
    def __call__(self, x, training=False):
        return self.run(x, training)


class ResNetEncoder(Linen):
    def __call__(self, observations, train: bool = True, stop_gradient: bool = False):
        return self.run(observations, train)


class VGG(Linen):
    @nn.compact
    def __call__(self, x, train=True):
        return self.run(nn.BatchNorm(use_running_average=not train)(x), train)


class GPT2(Linen):
    def __call__(self, input_ids, past=None, use_cache=False, training=False):
        return {"logits": self.run(embedded(input_ids), training), "past": past}


class EfficientNet(Linen):
    @nn.compact
    def __call__(self, inputs, train, use_running_average=None):
        use_running_average = not train if use_running_average is None else use_running_average
        return self.run(nn.BatchNorm(use_running_average)(inputs), train)


class Taxonomy(Linen):
    def __call__(self, inputs, train):
        return Output(self.run(inputs, train), inputs)


class Scenic(Linen):
    def __call__(self, x, *, train, debug: bool = False):
        return self.run(x, train)


class DETR(Linen):
    def __call__(self, inputs, train, *, padding_mask=None, debug: bool = False):
        return {"pred_logits": self.run(inputs * padding_mask, train), "pred_boxes": inputs}


@flax.struct.dataclass
class WMTConfig:
    width: int = 8
    deterministic: bool = False
    decode: bool = False


class WMT(Linen):
    config: WMTConfig = WMTConfig()

    def __call__(self, inputs, targets, inputs_positions=None):
        return self.run(embedded(inputs, targets), not self.config.deterministic)


class OGBG(Linen):
    deterministic: bool = True

    def __call__(self, graphs):
        return graphs._replace(nodes=self.run(graphs.nodes, not self.deterministic))


class NLPSeq(Linen):
    def __call__(self, *, inputs, train):
        return self.run(inputs, train)


class SST2(Linen):
    def __call__(self, token_ids, lengths, *, deterministic=None):
        mask = jnp.arange(6)[None] < lengths[:, None]
        return self.run(mask * embedded(token_ids), not deterministic)


class BigVision(Linen):
    def __call__(self, image, *, train=False):
        x = self.run(image, train)
        return x, {"pre_logits": x}


class Captioner(Linen):
    def __call__(self, image, text, *, decode: bool = False, train: bool = False):
        return self.run(image + embedded(text), train)


class T5X(Linen):
    def __call__(
        self, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
        encoder_segment_ids=None, *, enable_dropout: bool = True, decode: bool = False,
        max_decode_length=None,
    ):  # fmt: skip
        return self.run(embedded(encoder_input_tokens, decoder_input_tokens), enable_dropout)


class HuggingFace(Linen):
    def __call__(
        self, input_ids, attention_mask, token_type_ids=None, position_ids=None, head_mask=None,
        deterministic: bool = True, output_attentions: bool = False,
        output_hidden_states: bool = False, return_dict: bool = True,
    ):  # fmt: skip
        logits = self.run(embedded(input_ids) * attention_mask, not deterministic)
        return Output(logits, input_ids) if return_dict else (logits,)


class Kauldron(Linen):
    @property
    def is_training(self):
        return self.has_rng("dropout") and not self.is_initializing()

    def __call__(self, image):
        return self.run(image, self.is_training)


class VMoE(Linen):
    deterministic: bool = False

    def __call__(self, inputs):
        return self.run(inputs, not self.deterministic), {"auxiliary_loss": inputs.mean()}


class NestNet(Linen):
    train: bool = False

    def __call__(self, inputs):
        return self.run(inputs, self.train)


class Octo(Linen):
    def __call__(self, observations, tasks, pad_mask, train=True, verbose=False):
        return {"action": self.run(observations["image"] + tasks["text"] * pad_mask, train)}


class Openpi(Linen):
    def compute_loss(self, rng, observation, actions):
        x = self.run(observation["state"], rng is not None)
        return x if rng is None else x + jax.random.normal(rng, x.shape) * actions.mean()


class WalkInThePark(Linen):
    def __call__(self, observations, actions, training: bool = False):
        return self.run(observations + actions, training)


class Ensemble(nn.Module):
    net: nn.Module

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class AlgoPerf(nn.Module):
    """Draws its masks itself, with a rate of its own at the call."""

    @nn.compact
    def __call__(self, x, train, dropout_rate=0.5):
        x = nn.Dense(8)(x)
        if train:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - dropout_rate, x.shape)
            x = jnp.where(keep, x / (1 - dropout_rate), 0)
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    """The same in nnx; the dropout layer has a stream of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.drop = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def run(self, x, **mode):
        return self.out(self.drop(nnx.relu(self.hidden(x)), **mode))


class NnxKeyless(Nnx):
    """The dropout layer has no stream."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.drop = jdrop.nnx.Dropout(0.5)


class AIStack(Nnx):
    def __call__(self, x):
        return self.run(x)


class AIStackTranslation(Nnx):
    def __call__(self, encoder_inputs, decoder_inputs, mask=None, deterministic: bool = False):
        return self.run(embedded(encoder_inputs, decoder_inputs), deterministic=deterministic)


class MNISTTutorial(NnxKeyless):
    def __call__(self, x, rngs=None):
        return self.run(x, rngs=rngs)


class Gemma(NnxKeyless):
    def __call__(self, tokens, positions, cache, attention_mask, rngs):
        return self.run(embedded(tokens) * attention_mask, rngs=rngs), cache


class BonsaiViT(NnxKeyless):
    def __call__(self, x, *, rngs):
        return self.run(x, rngs=rngs)


class ConvNeXt(NnxKeyless):
    """Masks by hand, from the streams at the call."""

    def __call__(self, x, *, rngs, train: bool = False):
        x = self.hidden(x)
        if train:
            x = x * jax.random.bernoulli(rngs.dropout(), 0.5, x.shape) * 2
        return self.out(x)


class EasyDeL(Nnx):
    def __call__(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None,
        mode=None, past_key_values=None, output_attentions=None, output_hidden_states=None,
    ):  # fmt: skip
        return Output(self.run(embedded(input_ids) * attention_mask), input_ids)


@dataclasses.dataclass(frozen=True)
class NnxConfig:
    width: int = 8
    is_training: bool = False


class OwnMode(Nnx):
    """The mode is an attribute, another is in a configuration, another is a property."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.training, self.config, self._train = False, NnxConfig(), False

    @property
    def enable_dropout(self):
        return self._train

    @enable_dropout.setter
    def enable_dropout(self, value):
        self._train = value

    def __call__(self, x):
        on = self.training and self.config.is_training and self.enable_dropout
        return self.run(x, deterministic=not on)


class SigLIP(NnxKeyless):
    def __call__(self, images, deterministic=True, rngs=None):
        return self.run(images, deterministic=deterministic, rngs=rngs)


linen, nnx_ = jdrop.linen.as_network, jdrop.nnx.as_network


def through_sequential(module, inputs, *, train, key):
    for layer in module.layers:
        inputs = layer(inputs, train=train) if isinstance(layer, Init2winit) else layer(inputs)
    return inputs


TOKENS = {"input_ids": IDS, "attention_mask": MASK}
PAIR = (IDS, IDS + 1)
GRAPH = Graph(X, 2 * X)
SIGNATURES: dict[str, Any] = {
    "vision_transformer": (linen(VisionTransformer()), X),
    "init2winit": (linen(Init2winit()), X),
    "init2winit, conformer": (linen(Conformer(), outputs=0), (X, MASK)),
    "init2winit, graphs": (linen(GraphNet()), GRAPH),
    "jaxrl": (linen(Jaxrl()), X),
    "ogbench, ResNet": (linen(ResNetEncoder()), X),
    "jax-ai-stack": (nnx_(AIStack), X),
    "jax-ai-stack, translation": (nnx_(AIStackTranslation), PAIR),
    "flaxmodels, VGG": (linen(VGG()), X),
    "flaxmodels, GPT-2": (linen(GPT2(), outputs="logits"), IDS),
    "perch, EfficientNet": (linen(EfficientNet()), X),
    "perch, taxonomy": (linen(Taxonomy(), outputs="logits"), X),
    "scenic": (linen(Scenic()), X),
    "scenic, DETR": (
        linen(DETR(), outputs=lambda outputs: outputs["pred_logits"]),
        {"inputs": X, "padding_mask": MASK},
    ),
    "flax, MNIST tutorial": (nnx_(MNISTTutorial), X),
    "flax, wmt": (linen(WMT()), PAIR),
    "flax, ogbg": (linen(OGBG(), outputs="nodes"), GRAPH),
    "flax, nlp_seq": (linen(NLPSeq()), X),
    "flax, sst2": (linen(SST2()), {"token_ids": IDS, "lengths": jnp.array([1, 2, 3, 6])}),
    "flax, gemma": (nnx_(Gemma, outputs=0), (IDS, IDS, X, MASK)),
    "bonsai, ViT": (nnx_(BonsaiViT), X),
    "bonsai, ConvNeXt": (nnx_(ConvNeXt), X),
    "big_vision": (linen(BigVision(), outputs=0), X),
    "big_vision, captioner": (linen(Captioner()), {"image": X, "text": IDS}),
    "T5X": (linen(T5X()), (IDS, IDS, IDS)),
    "Hugging Face": (linen(HuggingFace(), outputs="logits"), TOKENS),
    "EasyLM": (
        linen(
            HuggingFace(),
            call=lambda module, inputs, *, train, key: module(
                **inputs, deterministic=not train, return_dict=False
            )[0],
        ),
        TOKENS,
    ),
    "EasyDeL": (nnx_(EasyDeL, outputs="logits"), TOKENS),
    "kauldron": (linen(Kauldron()), X),
    "vmoe": (linen(VMoE(), outputs=0), X),
    "nested-transformer": (linen(NestNet()), X),
    "octo": (
        linen(Octo(), outputs="action"),
        {"observations": {"image": X}, "tasks": {"text": X}, "pad_mask": MASK},
    ),
    "openpi": (
        linen(
            Openpi(),
            call=lambda module, inputs, *, train, key: module.compute_loss(key, *inputs),
        ),
        ({"state": X}, X),
    ),
    "walk_in_the_park": (linen(WalkInThePark()), (X, X)),
    "rlpd, ensemble": (
        linen(
            Ensemble(WalkInThePark()),
            call=lambda module, inputs, *, train, key: module(*inputs, training=train),
        ),
        (X, X),
    ),
    "algorithmic-efficiency": (linen(AlgoPerf()), X),
    "tunix, SigLIP": (nnx_(SigLIP), X),
    "modes of one's own": (nnx_(OwnMode), X),
    "nn.Sequential": (linen(nn.Sequential([nn.Dense(6), Init2winit()]), through_sequential), X),
}  # fmt: skip

OWN_MASKS = ("algorithmic-efficiency", "bonsai, ConvNeXt", "openpi")
"""Modules whose masks, or other random numbers, no dropout layer draws."""


@pytest.fixture(params=SIGNATURES)
def signature(request):
    return request.param


def differs(one, two):
    return any(
        not jnp.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def test_initialises_trains_with_masks_and_predicts_without(signature, getkey):
    network, inputs = SIGNATURES[signature]
    variables = network.init(getkey(), inputs)
    trained, updated = network.apply_train(variables, inputs, getkey())
    assert differs(trained, network.apply_train(variables, inputs, getkey())[0])
    assert jax.tree.structure(updated) == jax.tree.structure(variables)
    sampled = network(variables, inputs, getkey())
    assert differs(sampled, network(variables, inputs, getkey()))

    # In a prediction every layer returns its inputs.
    log_probs = predict(None, network, variables, inputs)
    assert log_probs.shape == (4, 3)
    without = network.replace_dropout(lambda site, x: x)
    assert jnp.array_equal(log_probs, predict(None, without, variables, inputs))

    # Only keys that a module consumes itself remain without its layers.
    assert consumed_keys(network, variables, inputs)
    places = consumed_keys(without, variables, inputs)
    assert bool(places) == (signature in OWN_MASKS)
    assert all("test_signatures.py:" in place for place in places)


def test_dropout_that_is_always_on_needs_a_key(getkey):
    class SBX(Linen):
        def __call__(self, obs, action):
            return self.run(obs + action, True)

    network, inputs = linen(SBX()), (X, X)
    variables = network.init(getkey(), inputs)
    assert differs(network(variables, inputs, getkey()), network(variables, inputs, getkey()))
    with pytest.raises(flax.errors.InvalidRngError) as raised:
        network(variables, inputs, None)
    assert any("give `call=`" in note for note in raised.value.__notes__)


def test_the_sites_of_a_call_of_ones_own_are_those_of_the_module(getkey):
    network, inputs = SIGNATURES["EasyLM"]
    sites = dropout_sites(network, network.init(getkey(), inputs), inputs)
    assert [(site.name, site.rate) for site in sites] == [("drop", 0.5)]


@pytest.mark.parametrize(
    ("as_network", "module"), [(linen, Init2winit()), (nnx_, partial(AIStack))]
)
def test_a_call_that_says_what_as_network_does_draws_the_same_masks(as_network, module, getkey):
    flags = {} if as_network is nnx_ else {"train": None}

    def call(module, inputs, *, train, key):
        return module(inputs, **dict.fromkeys(flags, train))

    one, two = as_network(module), as_network(module, call)
    init_key, key = getkey(), getkey()
    variables = one.init(jax.random.clone(init_key), X)
    assert not differs(variables, two.init(init_key, X))
    outputs = [network(variables, X, jax.random.clone(key)) for network in (one, two)]
    assert jnp.array_equal(*outputs)
