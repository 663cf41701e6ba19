"""The devices that a benchmark runs on: accelerators when there are enough of them, else virtual CPU devices."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax

from bench.processes.rendezvous import meet
from pallas_kernels.chips import Chip, chip_of

MAX_VIRTUAL_DEVICES = 256
_VIRTUAL_DEVICES = 8
"""Where nobody says how many."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
      devices: those that the mesh is made of, on all hosts.
      is_virtual: whether they are slices of a CPU, whose times say nothing of an accelerator.
      note: one sentence on what they are.
    """

    devices: tuple[jax.Device, ...]
    is_virtual: bool
    note: str

    @property
    def memory_bytes(self) -> int:
        """Memory of all of them together."""
        if self.is_virtual:
            return _host_memory_bytes() * jax.process_count()
        stats = jax.local_devices()[0].memory_stats()
        try:
            per_device = known_chip(self.devices[0]).hbm_bytes if stats is None else stats["bytes_limit"]
        except ValueError as error:
            raise ValueError(f"{self.note} do not say how much memory they have, and {error}") from None
        return int(per_device) * len(self.devices)


def known_chip(device: jax.Device) -> Chip:
    """What a device is.

    Raises:
      ValueError: it is none of those that are known.
    """
    if (chip := chip_of(device)) is None:
        raise ValueError(f"pallas_kernels/chips.py has no row for {device.device_kind!r}; add one")
    return chip


def start(
    num_devices: int | None,
    *,
    say: Callable[[str], None],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Devices:
    """Finds `num_devices` devices. Call before anything else touches JAX.

    Joins the other hosts first when `coordinator` is given or the environment is that of a cluster job. With fewer
    accelerators than asked for on a single host, it makes virtual CPU devices.

    Args:
      num_devices: how many devices the mesh needs; None takes all accelerators, or else makes eight virtual devices.
      say: is told for whom it waits.
      coordinator: host:port of process 0, for `jax.distributed`.
      num_processes: processes in all.
      process_id: number of this one.

    Raises:
      ValueError: so many devices cannot be had, or not all processes come; the message says how many there are and
        what to do.
    """
    joined = _join(coordinator, num_processes, process_id, say)
    num_virtual = num_devices or _VIRTUAL_DEVICES
    if num_virtual <= MAX_VIRTUAL_DEVICES:
        share = -(-num_virtual // (num_processes or 1))
        jax.config.update("jax_num_cpu_devices", share)
    found = jax.devices()
    if num_devices is None:
        num_devices = num_virtual if found[0].platform == "cpu" else len(found)
    if found[0].platform != "cpu" and len(found) >= num_devices:
        kind = found[0].device_kind
        return Devices(tuple(found[:num_devices]), False, f"{num_devices} of {len(found)} {kind} devices")
    seen = "no accelerator" if found[0].platform == "cpu" else f"only {len(found)} {found[0].device_kind}"
    if joined and found[0].platform != "cpu":
        raise ValueError(f"--ep {num_devices} needs as many devices, the job has {seen}; lower --ep or add hosts")
    virtual = jax.devices("cpu")
    if len(virtual) < num_devices:
        raise ValueError(
            f"--ep {num_devices} needs as many devices, this machine has {seen} and can make at most "
            f"{MAX_VIRTUAL_DEVICES} virtual ones on its CPU ({len(virtual)} made); lower --ep, or run on a cluster"
        )
    jax.config.update("jax_default_device", jax.local_devices(backend="cpu")[0])
    note = f"{num_devices} virtual CPU devices on {os.cpu_count()} cores ({seen} found)"
    return Devices(tuple(virtual[:num_devices]), True, note)


def _join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, say: Callable[[str], None]
) -> bool:
    if coordinator is not None and num_processes is not None and process_id is not None:
        meet(coordinator, num_processes, process_id, say)
        # Only CPU processes need it, and it must be chosen before the first use of JAX.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes, process_id)
        return True
    if (coordinator, num_processes, process_id) != (None, None, None):
        raise ValueError("--coordinator, --num-processes and --process-id go together: give all three or none")
    if _is_cluster_job():
        say("waiting for the other processes of this job, at most 300 s")
        jax.distributed.initialize()
        return True
    return False


def _is_cluster_job() -> bool:
    """Whether this looks like one of several processes that jax.distributed can find by itself."""
    env = os.environ
    return (
        "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or int(env.get("SLURM_NTASKS", "1")) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "JAX_COORDINATOR_ADDRESS" in env
    )


def _host_memory_bytes() -> int:
    """Physical memory, or the container's limit where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return memory if text == "max" else min(memory, int(text))
