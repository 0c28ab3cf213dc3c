"""Compiles the 2.7B training step, at small depth, for absent devices.

    python tests/golden/training/lower_2b7.py all > tests/golden/training/lowering_2b7.json

Width, vocabulary and row length are the paper's, one row of 4096 a device; the layers
are scanned, so that a deeper model is the same program with more trips. Nothing is
allocated: only shapes go through the compiler, whose report is printed, bytes of one
device and the collectives in its program, loop trips counted. "8" is eight CPU devices,
whose plain attention holds the scores of a row (1.3 GB a copy), which no accelerator
does; the others are TPU slices (`pip install 'jax[tpu]'`; no TPU is needed).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

NUM_LAYERS = 4
# Remat and mesh of each; "splash" without remat once failed to initialise.
MACHINES: dict[str, tuple[str, dict[str, int]]] = {
    "8": ("full", {"data": 1, "fsdp": 8}),
    "v5e:4x4": ("none", {"data": -1, "fsdp": -1}),
    "v5p:4x4x4": ("dots", {"data": -1, "fsdp": -1}),
    "v6e:4x4": ("none", {"data": 1, "fsdp": -1, "tensor": 4}),
}
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def lower(machine: str) -> dict[str, Any]:
    """Memory of one device, and collectives by kind."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from racm3_jax import sharding
    from racm3_jax.model.config import racm3_2b7
    from racm3_jax.model.transformer import Transformer, head_weights, init_params
    from racm3_jax.training.collectives import count_collectives
    from racm3_jax.training.loss import make_generator_loss
    from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
    from racm3_jax.training.step import abstract_state, make_train_step
    from racm3_jax.types import Batch
    from racm3_jax.vocab import Vocab

    remat, sizes = MACHINES[machine]
    config = racm3_2b7(remat=remat, num_layers=NUM_LAYERS)
    model: Any = Transformer(config)
    devices = (
        topologies.get_topology_desc(machine, "tpu").devices
        if ":" in machine
        else jax.devices()
    )
    mesh = sharding.make_mesh(**sizes, devices=devices)
    optimizer = build_optimizer(OptimizerConfig())
    state = abstract_state(
        lambda key: init_params(config, key, boxed=True), optimizer, mesh
    )
    loss_fn = make_generator_loss(
        lambda params, *inputs: model.apply({"params": params}, *inputs),
        lambda params: head_weights(params, config),
        Vocab(65_536 - 8192 - 512 - 4, 8192, 1024, 512),
    )
    step = make_train_step(loss_fn, optimizer, mesh, state)
    dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32, jnp.bool_)
    rows = sharding.batch_sharding(mesh)
    shape = (mesh.size // sizes.get("tensor", 1), 4096)
    batch = Batch(
        *(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes)
    )
    with jax.set_mesh(mesh):
        compiled = step.compiled.lower(state, batch).compile()  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": {
            kind: {
                "count": traffic.count,
                "asynchronous": traffic.asynchronous_count,
                "bytes_on_wire": round(traffic.bytes_on_wire),
            }
            for kind, traffic in count_collectives(compiled.as_text()).items()
        },
    }


def main(machines: list[str]) -> None:
    if machines != ["all"]:
        print(json.dumps(lower(machines[0]), indent=1))
        return
    results = {}
    for machine in MACHINES:  # the number of devices is fixed once jax has started
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
        done = subprocess.run(
            [sys.executable, __file__, machine],
            env=os.environ | TPU_ENVIRONMENT | environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        results[machine] = json.loads(done.stdout)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
