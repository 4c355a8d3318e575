"""The losses and metrics of each member while it trains, with a schedule of the learning rate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jdrop.linen
from jdrop import ensemble, metrics, train


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


def loss_and_accuracy(logits, labels):
    """What is beside the losses is not trained; jdrop returns its mean over an epoch."""
    is_right = logits.argmax(-1) == labels
    return train.cross_entropy(logits, labels), {"accuracy": is_right.mean()}


@jax.jit
def validate(variables):
    """The validation loss and accuracy of each member, read without dropout."""
    members = ensemble.predict(None, network, variables, valid_x)  # [member, batch, class]
    nll, error = (jax.vmap(f, (0, None))(members, valid_y) for f in (metrics.nll, metrics.error))
    return nll, 1 - error


images, labels = load_digits(return_X_y=True)
images, labels = jnp.float32(images / 16), jnp.int32(labels)
train_x, valid_x = jnp.split(images[:800], [500])
train_y, valid_y = jnp.split(labels[:800], [500])

steps_per_epoch, num_epochs = 10, 30
schedule = optax.cosine_decay_schedule(5e-3, decay_steps=num_epochs * steps_per_epoch)
network, (init_key, fit_key) = jdrop.linen.as_network(MLP()), jax.random.split(jax.random.key(0))
state = ensemble.init_ensemble(
    init_key, network, optax.adam(schedule), train_x[:1], ensemble_size=5, loss_fn=loss_and_accuracy
)
for epoch in range(num_epochs):
    key = jax.random.clone(fit_key)  # Parts with clones of one key equal a single fit.
    state, (loss, aux) = ensemble.fit_ensemble(
        key, state, train_x, train_y, num_epochs=1, batch_size=50
    )
    nll, accuracy = validate(state.variables)
    # Whatever should happen after an epoch happens here: logging, plots, checkpoints.
    if epoch % 10 == 9:
        print(f"epoch {epoch + 1}, learning rate {schedule(state.step[0]):.4f}, for each member:")
        rows = {"training loss": loss[:, 0], "training accuracy": aux["accuracy"][:, 0]}
        rows |= {"validation NLL": nll, "validation accuracy": accuracy}
        for name, values in rows.items():
            print(f"  {name}", np.asarray(values).round(3))
