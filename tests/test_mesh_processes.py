"""Members on a mesh whose devices are those of several processes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from subprocesses import finish, free_port

MESH = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
num_processes = int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 4 // num_processes)
if num_processes > 1:
    jax.distributed.initialize(sys.argv[1], num_processes, int(sys.argv[5]))
from jax.experimental.multihost_utils import process_allgather
from jdrop import ensemble
from jdrop.early_stopping import fit_with_early_stopping
from jdrop.network import Network
def init_fn(key, x):
    return {"params": jax.random.normal(key, (x.shape[1], 2))}
def apply_fn(variables, x, key):
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    return x @ variables["params"]
network = Network(apply_fn, init_fn)
assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("member",))
x, y = jnp.eye(4), jnp.array([0, 1, 0, 1])
key = jax.random.key(0, impl=sys.argv[3])
init_key, fit_key, stop_key, mask_key = jax.random.split(key, 4)
state = ensemble.init_ensemble(
    init_key, network, optax.sgd(0.1), x, ensemble_size=int(sys.argv[4]), mesh=mesh
)
state, losses = ensemble.fit_ensemble(
    fit_key, state, x, y, num_epochs=2, batch_size=2, mesh=mesh
)
stopped = fit_with_early_stopping(
    stop_key, state, x, y, validation_data=(x, y), num_epochs=4, patience=1, batch_size=2, mesh=mesh
)
masked = ensemble.predict(mask_key, network, stopped.state.variables, x, mesh=mesh)
values = [losses, masked, stopped.state.variables["params"]]
if num_processes > 1:
    values = process_allgather(values, tiled=True)
values += [stopped.train_losses, stopped.validation_losses]  # Each process has all of these.
print(json.dumps(np.concatenate([np.ravel(value) for value in values]).tolist()))
"""
"""Trains members on a mesh of four devices, of any number of processes."""


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "ensemble_size"), [("threefry2x32", 4), ("rbg", 5)])
def test_a_mesh_may_span_processes(tmp_path, impl, ensemble_size):
    def numbers(num_processes):
        address = f"127.0.0.1:{free_port()}"
        arguments = num_processes, impl, ensemble_size
        results = finish(
            [
                subprocess.Popen(
                    [sys.executable, "-c", MESH, address, *map(str, arguments), str(index)],
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for index in range(num_processes)
            ]
        )
        assert all(code == 0 for code, _, _ in results), results
        return [json.loads(printed.splitlines()[-1]) for _, printed, _ in results]

    one, two = numbers(1), numbers(2)
    np.testing.assert_array_equal(two[0], two[1])
    # Terms of order 1, rounded at 6e-8, through at most 12 steps of size 0.1.
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5, atol=1e-5)
