"""Distributed runs (torchrun): ranks, sums and agreement between processes.

Without torchrun there is one process, and everything here is free.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from utils.command import InputError, warn

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}  # of several processes, by device
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


@dataclass(frozen=True)
class World:
    """This process: its rank among `size` processes, and its device. Rank 0 writes and prints."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, in place, and returns the sum."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def agree(self, value: int) -> int:
        """Returns rank 0's value on every process."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        distributed.broadcast(tensor, 0)
        return int(tensor)

    def agree_on(self, text: str) -> str:
        """Returns rank 0's text on every process."""
        if self.size == 1:
            return text
        size = self.agree(len(text.encode()))
        letters = torch.tensor(list(text.encode().ljust(size)[:size]), device=self.device)
        distributed.broadcast(letters, 0)
        return bytes(letters.tolist()).decode()

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def wait(self) -> None:
        """Waits until every process gets here."""
        self.any(False)  # reads the sum: without that a GPU waits, and Python goes on

    def wrap(self, network: nn.Module) -> nn.Module:
        """Returns the network with its gradients averaged over all processes."""
        if self.size == 1:
            return network
        # Compiled 1x1 convolutions: strides of their dimensions of size 1, which are never used.
        warnings.filterwarnings("ignore", r"(?s)Grad strides do not match.*\[\d+, \d+, 1, 1\]")
        ids = None if self.device.type == "cpu" else [self.device.index]
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)


@contextmanager
def join_world(device_name: str | None) -> Iterator[World]:
    """Yields this process's World on the device, connected to the others that torchrun started.

    BACKENDS says what they talk through. Raises InputError for a missing device, or one that
    several processes cannot share, or if connecting fails.
    """
    launched = was_launched()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if launched and accelerator is not None and device_name in (None, accelerator.type):
        device_name = f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"
    elif launched and ":" in (device_name or "") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise InputError(
            f"--device {device_name}: several processes cannot work on it; give --device "
            f"{str(device_name).partition(':')[0]}, and each takes one of its own"
        )
    device = choose_device(device_name)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if not launched:
        yield World(device)
        return
    if device.type not in BACKENDS:
        raise InputError(
            f"--device {device.type}: several processes cannot work on it; start one, or give "
            "--device cpu"
        )
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        warn(
            "torchrun --max-restarts: after a restart the processes may look for each other where "
            "they were before (pytorch issue 135712), and fail; run it with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    try:
        distributed.init_process_group(BACKENDS[device.type])
    except (ValueError, distributed.DistError) as error:
        raise InputError(f"the processes cannot connect: {str(error).splitlines()[0]}") from None
    try:
        yield World(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def take_all_threads() -> None:
    """Gives this process the threads of all on this machine, for work that it does alone."""
    torch.set_num_threads(torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def was_launched() -> bool:
    """Returns whether torchrun, or a similar launcher, has started this process.

    Raises InputError if its environment variables are incomplete or invalid.
    """
    values = {name: os.environ.get(name) for name in LAUNCHED}
    alone = values["WORLD_SIZE"] is None or values["MASTER_ADDR"] is None
    if values["RANK"] is None or (values["RANK"] == "0" and alone):
        return False
    for name, value in values.items():
        wrong = "not set, though RANK is" if value is None else f"{value!r} is no whole number"
        if value is None or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise InputError(
                f"{name}: {wrong}; start several processes with torchrun, or unset RANK"
            )
    if int(values["RANK"]) >= int(values["WORLD_SIZE"] or 0):
        raise InputError(f"RANK: {values['RANK']} of {values['WORLD_SIZE']}; it counts from 0")
    return True


def choose_device(name: str | None) -> torch.device:
    """Returns the device, with its index unless it is the CPU.

    None: the accelerator that torch finds (a GPU: cuda, xpu, mps), else the CPU. Raises InputError
    for a device that this machine does not have.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    name = known[-1] if name is None else name
    try:
        device = torch.device(name)
        if device.type not in known:
            raise ValueError(name)
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise InputError(f"--device {name}: its memory is full; free it, or take cpu") from None
    except (RuntimeError, AssertionError, ValueError):
        raise InputError(
            f"--device {name}: not a device of this machine; take {' or '.join(known)}"
        ) from None
    if device.type != "cpu" and device.index is None:
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device
