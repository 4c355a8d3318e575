"""Modules with the calls of public code bases, for several tests.

Each module is small and written for the tests; only its call is that of the code base. The layers
are Flax's, as in modules that were not written for jdrop. The table is `SIGNATURES`.
"""

import dataclasses
from functools import cached_property, partial
from operator import itemgetter
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.calls import output_chooser
from jdrop.network import Network
from jdrop.train import cross_entropy

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
    """What many modules below compute: a hidden layer, dropout, and logits."""

    @nn.compact
    def run(self, x, train):
        x = nn.relu(nn.Dense(8, name="hidden")(x))
        x = nn.Dropout(0.5, name="drop")(x, deterministic=not train)
        return nn.Dense(3, name="out")(x)


class Transformer(nn.Module):
    """What the others compute: a block with attention, a hidden layer and two residual branches."""

    @nn.compact
    def run(self, x, train):
        is_off = not train
        x = nn.Dense(4, name="embed")(x[..., None])
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="attention")
        x = x + attention(nn.LayerNorm(name="norm")(x), deterministic=is_off)
        y = nn.relu(nn.Dense(8, name="hidden")(x))
        y = nn.Dropout(0.5, name="drop")(y, deterministic=is_off)
        y = nn.Dense(4, name="back")(y)
        x = x + nn.Dropout(0.5, name="branch_drop")(y, deterministic=is_off)
        return nn.Dense(3, name="out")(x.mean(1))


def embedded(*tokens):
    return sum(jax.nn.one_hot(t, 6).sum(1) for t in tokens)


class VisionTransformer(Transformer):
    def __call__(self, inputs, *, train):
        return self.run(inputs, train)


class Init2winit(Linen):
    def __call__(self, x, train):
        return self.run(x, train)


class Conformer(Transformer):
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


class GPT2(Transformer):
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


class Scenic(Transformer):
    def __call__(self, x, *, train, debug: bool = False):
        return self.run(x, train)


class DETR(Transformer):
    def __call__(self, inputs, train, *, padding_mask=None, debug: bool = False):
        return {"pred_logits": self.run(inputs * padding_mask, train), "pred_boxes": inputs}


@flax.struct.dataclass
class WMTConfig:
    width: int = 8
    deterministic: bool = False
    decode: bool = False


class WMT(Transformer):
    config: WMTConfig = WMTConfig()

    def __call__(self, inputs, targets, inputs_positions=None):
        return self.run(embedded(inputs, targets), not self.config.deterministic)


class OGBG(Linen):
    deterministic: bool = True

    def __call__(self, graphs):
        return graphs._replace(nodes=self.run(graphs.nodes, not self.deterministic))


class NLPSeq(Transformer):
    def __call__(self, *, inputs, train):
        return self.run(inputs, train)


class SST2(Linen):
    def __call__(self, token_ids, lengths, *, deterministic=None):
        mask = jnp.arange(6)[None] < lengths[:, None]
        return self.run(mask * embedded(token_ids), not deterministic)


class BigVision(Transformer):
    def __call__(self, image, *, train=False):
        x = self.run(image, train)
        return x, {"pre_logits": x}


class Captioner(Transformer):
    def __call__(self, image, text, *, decode: bool = False, train: bool = False):
        return self.run(image + embedded(text), train)


class T5X(Transformer):
    def __call__(
        self, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
        encoder_segment_ids=None, *, enable_dropout: bool = True, decode: bool = False,
        max_decode_length=None,
    ):  # fmt: skip
        return self.run(embedded(encoder_input_tokens, decoder_input_tokens), enable_dropout)


class HuggingFace(Transformer):
    def __call__(
        self, input_ids, attention_mask, token_type_ids=None, position_ids=None, head_mask=None,
        deterministic: bool = True, output_attentions: bool = False,
        output_hidden_states: bool = False, return_dict: bool = True,
    ):  # fmt: skip
        logits = self.run(embedded(input_ids) * attention_mask, not deterministic)
        return Output(logits, input_ids) if return_dict else (logits,)


class Kauldron(Transformer):
    @property
    def is_training(self):
        return self.has_rng("dropout") and not self.is_initializing()

    def __call__(self, image):
        return self.run(image, self.is_training)


class VMoE(Transformer):
    deterministic: bool = False

    def __call__(self, inputs):
        return self.run(inputs, not self.deterministic), {"auxiliary_loss": inputs.mean()}


class NestNet(Transformer):
    train: bool = False

    def __call__(self, inputs):
        return self.run(inputs, self.train)


class Octo(Transformer):
    def __call__(self, observations, tasks, pad_mask, train=True, verbose=False):
        return {"action": self.run(observations["image"] + tasks["text"] * pad_mask, train)}


class Openpi(Transformer):
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
    """The hidden layer in nnx; the dropout layer has a stream of its own, unless it is keyless."""

    def __init__(self, rngs: nnx.Rngs, keyless: bool = False):
        self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=None if keyless else rngs)

    def run(self, x, **mode):
        return self.out(self.drop(nnx.relu(self.hidden(x)), **mode))


class NnxTransformer(nnx.Module):
    """The block in nnx; its layers have streams of their own, unless they are keyless."""

    def __init__(self, rngs: nnx.Rngs, keyless: bool = False):
        self.embed, self.hidden = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 8, rngs=rngs)
        self.back, self.out = nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 4, dropout_rate=0.5, decode=False, keep_rngs=not keyless, rngs=rngs
        )
        streams = None if keyless else rngs
        self.drop, self.branch_drop = (nnx.Dropout(0.5, rngs=streams) for _ in range(2))

    def run(self, x, **mode):
        x = self.embed(x[..., None])
        x = x + self.attention(self.norm(x), **mode)
        y = self.back(self.drop(nnx.relu(self.hidden(x)), **mode))
        x = x + self.branch_drop(y, **mode)
        return self.out(x.mean(1))


class AIStack(NnxTransformer):
    def __call__(self, x):
        return self.run(x)


class AIStackTranslation(NnxTransformer):
    def __call__(self, encoder_inputs, decoder_inputs, mask=None, deterministic: bool = False):
        return self.run(embedded(encoder_inputs, decoder_inputs), deterministic=deterministic)


class MNISTTutorial(Nnx):
    def __call__(self, x, rngs=None):
        return self.run(x, rngs=rngs)


class Gemma(NnxTransformer):
    def __call__(self, tokens, positions, cache, attention_mask, rngs):
        return self.run(embedded(tokens) * attention_mask, rngs=rngs), cache


class BonsaiViT(NnxTransformer):
    def __call__(self, x, *, rngs):
        return self.run(x, rngs=rngs)


class ConvNeXt(Nnx):
    """Masks by hand, from the streams at the call."""

    def __call__(self, x, *, rngs, train: bool = False):
        x = self.hidden(x)
        if train:
            x = x * jax.random.bernoulli(rngs.dropout(), 0.5, x.shape) * 2
        return self.out(x)


class EasyDeL(NnxTransformer):
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


class SigLIP(NnxTransformer):
    def __call__(self, images, deterministic=True, rngs=None):
        return self.run(images, deterministic=deterministic, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Signature:
    """A module with the call of a code base, and what `as_network` needs besides.

    Attributes:
        module: a linen module, or a function of `rngs` that makes an nnx module.
        inputs: for 4 examples.
        call: the `call=` to give.
        outputs: the `outputs=` to give.
    """

    module: Any
    inputs: Any
    call: Any = None
    outputs: Any = None

    def network_of(self, module: Any) -> Network:
        """The network of this module, or of another one with the same call."""
        library = jdrop.linen if isinstance(module, nn.Module) else jdrop.nnx
        return library.as_network(module, self.call, outputs=self.outputs)

    @cached_property
    def network(self) -> Network:
        return self.network_of(self.module)

    def loss_fn(self, outputs: Any, labels: Any) -> Any:
        """A loss of the chosen outputs: training sees all of them."""
        return cross_entropy(output_chooser(self.outputs)(outputs), labels)


def through_sequential(module, inputs, *, train, key):
    for layer in module.layers:
        inputs = layer(inputs, train=train) if isinstance(layer, Init2winit) else layer(inputs)
    return inputs


def as_a_tuple(module, inputs, *, train, key):
    return module(**inputs, deterministic=not train, return_dict=False)[0]


def compute_loss(module, inputs, *, train, key):
    return module.compute_loss(key, *inputs)


def through_wrapper(module, inputs, *, train, key):
    return module(*inputs, training=train)


TOKENS = {"input_ids": IDS, "attention_mask": MASK}
PAIR = (IDS, IDS + 1)
GRAPH = Graph(X, 2 * X)
OBSERVATIONS = {"observations": {"image": X}, "tasks": {"text": X}, "pad_mask": MASK}
SIGNATURES: dict[str, Signature] = {
    "vision_transformer": Signature(VisionTransformer(), X),
    "init2winit": Signature(Init2winit(), X),
    "init2winit, conformer": Signature(Conformer(), (X, MASK), outputs=0),
    "init2winit, graphs": Signature(GraphNet(), GRAPH),
    "jaxrl": Signature(Jaxrl(), X),
    "ogbench, ResNet": Signature(ResNetEncoder(), X),
    "jax-ai-stack": Signature(AIStack, X),
    "jax-ai-stack, translation": Signature(AIStackTranslation, PAIR),
    "flaxmodels, VGG": Signature(VGG(), X),
    "flaxmodels, GPT-2": Signature(GPT2(), IDS, outputs="logits"),
    "perch, EfficientNet": Signature(EfficientNet(), X),
    "perch, taxonomy": Signature(Taxonomy(), X, outputs="logits"),
    "scenic": Signature(Scenic(), X),
    "scenic, DETR": Signature(
        DETR(), {"inputs": X, "padding_mask": MASK}, outputs=itemgetter("pred_logits")
    ),
    "flax, MNIST tutorial": Signature(partial(MNISTTutorial, keyless=True), X),
    "flax, wmt": Signature(WMT(), PAIR),
    "flax, ogbg": Signature(OGBG(), GRAPH, outputs="nodes"),
    "flax, nlp_seq": Signature(NLPSeq(), X),
    "flax, sst2": Signature(SST2(), {"token_ids": IDS, "lengths": jnp.array([1, 2, 3, 6])}),
    "flax, gemma": Signature(partial(Gemma, keyless=True), (IDS, IDS, X, MASK), outputs=0),
    "bonsai, ViT": Signature(partial(BonsaiViT, keyless=True), X),
    "bonsai, ConvNeXt": Signature(ConvNeXt, X),
    "big_vision": Signature(BigVision(), X, outputs=0),
    "big_vision, captioner": Signature(Captioner(), {"image": X, "text": IDS}),
    "T5X": Signature(T5X(), (IDS, IDS, IDS)),
    "Hugging Face": Signature(HuggingFace(), TOKENS, outputs="logits"),
    "EasyLM": Signature(HuggingFace(), TOKENS, as_a_tuple),
    "EasyDeL": Signature(EasyDeL, TOKENS, outputs="logits"),
    "kauldron": Signature(Kauldron(), X),
    "vmoe": Signature(VMoE(), X, outputs=0),
    "nested-transformer": Signature(NestNet(), X),
    "octo": Signature(Octo(), OBSERVATIONS, outputs="action"),
    "openpi": Signature(Openpi(), ({"state": X}, X), compute_loss),
    "walk_in_the_park": Signature(WalkInThePark(), (X, X)),
    "rlpd, ensemble": Signature(Ensemble(WalkInThePark()), (X, X), through_wrapper),
    "algorithmic-efficiency": Signature(AlgoPerf(), X),
    "tunix, SigLIP": Signature(partial(SigLIP, keyless=True), X),
    "modes of one's own": Signature(OwnMode, X),
    "nn.Sequential": Signature(nn.Sequential([nn.Dense(6), Init2winit()]), X, through_sequential),
}

OWN_MASKS = ("algorithmic-efficiency", "bonsai, ConvNeXt", "openpi")
"""Modules whose masks, or other random numbers, no dropout layer draws."""
