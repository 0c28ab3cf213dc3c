"""Absent devices: TPU slices and GPU nodes, as described to their compilers.

XLA compiles for a described machine. libtpu describes a TPU by the name of its topology
("v5p:4x4x4"); the CUDA plugin takes the properties of a GPU (`_GPU_FIGURES`) and the
number per node. None of this needs the accelerator, a driver or a network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GPUS_PER_NODE = 8
TPU_EXTRA = "pip install 'racm3_jax[tpu-compile]'"
GPU_EXTRA = "pip install 'racm3_jax[gpu-compile]'"


class MachineError(ValueError):
    """A machine that does not exist, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      name: of the device, as in `training.hardware.DEVICES`, or "cpu".
      num_devices: over all slices.
      topology: "4x4x4" chips of one TPU slice; "1x2x8" (groups x nodes x GPUs) of GPUs;
        "" on a CPU.
      num_slices: TPU slices, connected by the data-centre network.
    """

    name: str
    num_devices: int
    topology: str
    num_slices: int = 1

    @property
    def platform(self) -> str:
        if self.name in _TPUS:
            return "tpu"
        return "gpu" if self.name in _GPU_FIGURES else "cpu"

    def __str__(self) -> str:
        if self.platform == "cpu":
            return f"{self.num_devices} cpu"
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        return f"{slices}{self.name}:{self.topology}"


@dataclasses.dataclass(frozen=True)
class _TPU:
    """libtpu's name of a TPU, and its slices.

    Attributes:
      prefix: before the colon of the topology's name.
      axes: of the torus, 2 or 3.
      devices_per_chip: JAX devices per chip.
    """

    prefix: str
    axes: int
    devices_per_chip: int = 1


_TPUS = {
    "v5e": _TPU("v5e", 2),
    "v6e": _TPU("v6e", 2),
    "v5p": _TPU("v5p", 3),
    "tpu7x": _TPU("tpu7x", 3, devices_per_chip=2),
}


# GPU properties for XLA. Clocks and widths only affect the choice of kernels;
# the memory and the compute capability decide what fits and what is generated.
_GPU_FIGURES: dict[str, dict[str, Any]] = {
    "h100": {
        "description": "NVIDIA H100 80GB HBM3",
        "capability": 9,
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "bandwidth": 3_352_320_000_000,
        "l2": 52_428_800,
        "memory": 85_044_297_728,
        "shared": 233_472,
        "shared_optin": 232_448,
    },
    "h200": {
        "description": "NVIDIA H200",
        "capability": 9,
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "bandwidth": 4_800_000_000_000,
        "l2": 62_914_560,
        "memory": 150_754_820_096,
        "shared": 233_472,
        "shared_optin": 232_448,
    },
    "a100": {
        "description": "NVIDIA A100-SXM4-80GB",
        "capability": 8,
        "cores": 108,
        "fpus": 64,
        "clock": 1.41,
        "bandwidth": 2_039_000_000_000,
        "l2": 41_943_040,
        "memory": 84_987_740_160,
        "shared": 167_936,
        "shared_optin": 166_912,
    },
}

COMPILED_FOR = (*_TPUS, *_GPU_FIGURES, "cpu")


def find_machine(
    name: str, num_devices: int, topology: str = "", num_slices: int = 1
) -> Machine:
    """The machine of `--device=name:number`, or of `--topology`, which has precedence.

    Args:
      name: of the device.
      num_devices: of one slice or node; with a topology, 1 means "not given".
      topology: see `Machine`; by default the usual one for this number of devices.
      num_slices: of TPUs.

    Raises:
      MachineError: names the alternatives.
    """
    if name not in COMPILED_FOR:
        raise MachineError(
            f"--device={name}: there is no compiler for it; --compile supports "
            f"{', '.join(COMPILED_FOR)}"
        )
    if num_slices < 1 or (num_slices > 1 and name not in _TPUS):
        raise MachineError(
            f"--slices={num_slices}: give a number of TPU slices >= 1; for GPUs use "
            "--device=h100:16 for several nodes"
        )
    if name == "cpu":
        if topology:
            raise MachineError(f"--topology={topology}: CPU devices have none")
        return Machine(name, num_devices, "")
    find = _find_slice if name in _TPUS else _find_nodes
    topology, found = find(name, num_devices, topology)
    if topology and num_devices not in (1, found):
        raise MachineError(
            f"--topology={topology} has {found} devices, but --device={name}:"
            f"{num_devices} says {num_devices}: give one of them"
        )
    return Machine(name, found * num_slices, topology, num_slices)


def _find_slice(name: str, num_devices: int, topology: str) -> tuple[str, int]:
    tpu = _TPUS[name]
    if not topology:
        chips = num_devices // tpu.devices_per_chip
        topology = "x".join(map(str, usual_slice(name, chips)))
        if math.prod(_read_sizes(topology)) * tpu.devices_per_chip != num_devices:
            raise MachineError(
                f"--device={name}:{num_devices}: JAX sees {tpu.devices_per_chip} "
                "devices per chip; give an even number"
            )
    sizes = _read_sizes(topology)
    if len(sizes) != tpu.axes:
        example = "4x4" if tpu.axes == 2 else "2x2x4"
        raise MachineError(
            f"--topology={topology}: a {name} slice has {tpu.axes} axes, e.g. {example}"
        )
    return topology, math.prod(sizes) * tpu.devices_per_chip


def _find_nodes(name: str, num_devices: int, topology: str) -> tuple[str, int]:
    if topology:
        sizes = _read_sizes(topology)
        if len(sizes) != 3:
            raise MachineError(
                f"--topology={topology}: give groups x nodes x GPUs, e.g. 1x2x8"
            )
        return topology, math.prod(sizes)
    nodes, rest = divmod(num_devices, GPUS_PER_NODE)
    if num_devices < GPUS_PER_NODE:
        nodes, rest = 1, 0
    if rest:
        raise MachineError(
            f"--device={name}:{num_devices}: several nodes need a multiple of "
            f"{GPUS_PER_NODE} GPUs; for other nodes give --topology=1xNODESxGPUS"
        )
    return f"1x{nodes}x{num_devices // nodes}", num_devices


def _read_sizes(topology: str) -> list[int]:
    parts = topology.split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise MachineError(f"--topology={topology}: give sizes, e.g. 4x4 or 2x2x4")
    return [int(part) for part in parts]


def usual_slice(name: str, chips: int) -> tuple[int, ...]:
    """The usual shape of a cloud slice with this number of chips: nearly square.

    ```
    v5e, v6e   1: 1x1   4: 2x2   8: 2x4   16: 4x4   32: 4x8     64: 8x8
    v5p        1: 1x1x1 4: 2x2x1 8: 2x2x2 16: 2x2x4 32: 2x4x4   64: 4x4x4
    ```

    Raises:
      MachineError: not a power of two; other slices need `--topology`.
    """
    axes = _TPUS[name].axes
    if chips < 1 or chips & (chips - 1):
        raise MachineError(
            f"--device={name}: slices of {chips} chips have no usual shape; give "
            f"a --topology, e.g. {'x'.join(['4'] * axes)}"
        )
    power = chips.bit_length() - 1
    sizes = sorted(2 ** ((power + i) // axes) for i in range(axes))
    # A host has 2x2x1 chips: a small slice is flat.
    return tuple(sizes if chips >= 8 or axes == 2 else reversed(sizes))


def find_devices(machine: Machine) -> Sequence[Any]:
    """The devices of a machine for a mesh, attached or not.

    Raises:
      MachineError: its compiler is not installed, or does not know this topology.
    """
    if machine.platform == "cpu":
        return _find_cpus(machine.num_devices)
    from jax.experimental import topologies

    make = _describe_tpu if machine.platform == "tpu" else _describe_gpu
    name, options = make(machine)
    try:
        found = topologies.get_topology_desc(
            name, "tpu" if machine.platform == "tpu" else "cuda", **options
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:300]
        raise MachineError(f"{machine} cannot be described: {text}") from None
    return list(found.devices)


def use_host_only(num_devices: int = 1) -> None:
    """Keeps this process from using an accelerator; call it before JAX starts.

    Args:
      num_devices: number of JAX CPU devices, unless JAX_NUM_CPU_DEVICES is set.
    """
    # libtpu and the CUDA plugin print to stderr that there is no accelerator.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_platforms", "cpu")
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # already running: `find_devices` checks
        jax.config.update("jax_num_cpu_devices", num_devices)


def _find_cpus(number: int) -> Sequence[Any]:
    import jax

    devices = jax.devices("cpu")
    if len(devices) < number:
        raise MachineError(
            f"--device=cpu:{number}: JAX shows {len(devices)} CPU devices; set "
            f"JAX_NUM_CPU_DEVICES={number}"
        )
    return devices[:number]


def _describe_tpu(machine: Machine) -> tuple[str, dict[str, Any]]:
    if importlib.util.find_spec("libtpu") is None:
        raise MachineError(
            f"compiling for {machine.name} needs libtpu, which is not installed: "
            f"{TPU_EXTRA}"
        )
    # Otherwise libtpu queries a cloud's metadata server.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    sizes = _read_sizes(machine.topology)
    if math.prod(sizes) < 4:
        options["chips_per_host_bounds"] = [*sizes, 1, 1][:3]
    if machine.num_slices > 1:
        options["num_slices"] = machine.num_slices
    return f"{_TPUS[machine.name].prefix}:{machine.topology}", options


def _describe_gpu(machine: Machine) -> tuple[str, dict[str, Any]]:
    found = importlib.util.find_spec("jax_cuda12_plugin")
    if found is None:
        raise MachineError(
            f"compiling for {machine.name} needs JAX's CUDA plugin, which is not "
            f"installed: {GPU_EXTRA}"
        )
    _find_ptxas(machine.name)
    import jax

    jax.devices()  # finds the plugin and registers it
    text = describe_gpu(machine.name)
    return machine.name, {"target_config": text, "topology": machine.topology}


def _find_ptxas(name: str) -> None:
    """Sets XLA's path to ptxas of the package `nvidia-cuda-nvcc`."""
    if "xla_gpu_cuda_data_dir" in os.environ.get("XLA_FLAGS", ""):
        return
    parent = importlib.util.find_spec("nvidia")
    places = list(parent.submodule_search_locations or ()) if parent else []
    root = next(
        (
            Path(place) / folder
            for place in places
            for folder in ("cuda_nvcc", "cu12", "cu13")
            if (Path(place) / folder / "bin" / "ptxas").is_file()
        ),
        None,
    )
    if root is None:
        raise MachineError(
            f"compiling for {name} needs ptxas of nvidia-cuda-nvcc-cu12, which is not "
            f"installed: {GPU_EXTRA}"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={root}".strip()
    os.environ["PATH"] = f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"


def describe_gpu(name: str) -> str:
    """A GPU as text of XLA's `GpuTargetConfigProto`."""
    card = _GPU_FIGURES[name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card["shared"]}
  shared_memory_per_block_optin: {card["shared_optin"]}
  threads_per_core_limit: 2048
  core_count: {card["cores"]}
  fpus_per_core: {card["fpus"]}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {card["bandwidth"]}
  l2_cache_size: {card["l2"]}
  clock_rate_ghz: {card["clock"]}
  device_memory_size: {card["memory"]}
  cuda_compute_capability {{ major: {card["capability"]} minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card["description"]}"
"""


@contextlib.contextmanager
def absent_cudnn(machine: Machine) -> Iterator[None]:
    """Answers JAX's cuDNN queries while tracing for absent GPUs.

    Before emitting a cuDNN call, JAX queries the version of this process's cuDNN and
    the GPU's capability. Whether cuDNN has a kernel for the shapes is decided on the
    real machine, when the program is loaded.
    """
    if machine.platform != "gpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    capability = f"{_GPU_FIGURES[machine.name]['capability']}.0"
    answers = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda asked: float(asked) <= float(capability),
        "is_cuda_compute_capability_equal": lambda asked: asked == capability,
    }
    before = {name: getattr(cudnn, name) for name in answers}
    for name, answer in answers.items():
        setattr(cudnn, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(cudnn, name, function)
