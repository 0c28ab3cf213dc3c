"""Compiles the paper's 2.7B training step for devices that are not there.

    python tests/golden/training/lower_2b7.py 8 64 > tests/golden/training/lowering_2b7.json

Weights split over all devices (fsdp), one row of 4096 a device, full rematerialisation.
Nothing is allocated: only shapes go through the compiler, whose report is printed, bytes
of one device and the number of collectives in its program. The CPU compiler's plain
attention holds the scores of a row (1.3 GB a copy), which the GPU and TPU kernels never
form; its figures are for finding changes, not for planning.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")


def lower(num_devices: int) -> dict[str, Any]:
    """Memory of one device and collectives, with so many devices."""
    import jax
    import jax.numpy as jnp

    from racm3_jax import sharding
    from racm3_jax.model.config import racm3_2b7
    from racm3_jax.model.transformer import Transformer, head_weights, init_params
    from racm3_jax.training.loss import make_generator_loss
    from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
    from racm3_jax.training.step import abstract_state, make_train_step
    from racm3_jax.types import Batch
    from racm3_jax.vocab import Vocab

    config = racm3_2b7(remat="full")
    model: Any = Transformer(config)
    mesh = sharding.make_mesh(data=1, fsdp=num_devices)
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
    batch = Batch(
        *(
            jax.ShapeDtypeStruct((num_devices, 4096), dtype, sharding=rows)
            for dtype in dtypes
        )
    )
    with jax.set_mesh(mesh):
        compiled = step.compiled.lower(state, batch).compile()  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": {
            name: len(re.findall(rf" {name}(?:-start)?\(", text))
            for name in COLLECTIVES
        },
    }


def main(numbers: list[str]) -> None:
    if len(numbers) == 1:
        print(json.dumps(lower(int(numbers[0])), indent=1))
        return
    import subprocess

    results = {}
    for number in numbers:  # the number of devices is fixed once jax has started
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": number,
        }
        done = subprocess.run(
            [sys.executable, __file__, number],
            env=environment,
            check=True,
            capture_output=True,
        )
        results[number] = json.loads(done.stdout)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
