"""The cupy lane: what the ce lane does, in Python, for installs where the core shall not call the
driver itself. It needs CuPy and cuda-python, and is the one file that imports them: when a lane is
opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import torch

from .config import BalancerConfig
from .cupy_device import CupyDevice, PeerArena
from .cupy_gpu import Arena, Gpu, Packages
from .links import check_nvlink

if TYPE_CHECKING:
    from .lanes import OpenSegment
    from .peers import DomainRanks, Peers

_CANARY_BYTES = 64 << 20  # at 400 GB/s many times what the submission takes
_OLDEST_DRIVER, _FIRST_DRIVER_WITH_BATCHES = 11070, 12080


def import_packages() -> Packages:
    """Import CuPy and cuda-python.

    Raises:
        RuntimeError: one of them cannot be imported; with the line that installs both.
    """
    try:
        import cupy
        from cuda.bindings import driver
    except ImportError as error:
        majors = (torch.version.cuda or "12 or 13").split(".")[0].split(" or ")
        lines = (f"pip install cupy-cuda{major}x 'cuda-python=={major}.*'" for major in majors)
        raise RuntimeError(
            f"lane='cupy' needs CuPy and cuda-python, and they cannot be imported here "
            f"({type(error).__name__}: {error}). Install them for the CUDA version of PyTorch, "
            f"{' or '.join(lines)}; or use lane='ce', which needs neither."
        ) from error
    return Packages(cupy.cuda.runtime, driver)


class CupyLane:
    """One rank's end, on the GPU that is current when the Balancer is built; see ``lanes.Lane``.

    Raises:
        ValueError: arenas were to be shared in a way that CuPy has not.
        RuntimeError: no CuPy, no cuda-python, no driver, or one without what the config asks for.
    """

    def __init__(self, config: BalancerConfig) -> None:
        from . import _core

        if config.arena_handle == "vmm":
            raise ValueError(
                "lane='cupy' shares arenas by CUDA IPC alone. Use arena_handle='ipc' or 'auto', or "
                "lane='ce'."
            )
        packages = import_packages()
        has_gpu = torch.cuda.is_available()
        if not has_gpu and not packages.is_stand_in:
            raise RuntimeError(
                f"lane='cupy': PyTorch {torch.__version__} sees no GPU (torch.cuda.is_available() "
                "is False). Install a CUDA build of it, look at CUDA_VISIBLE_DEVICES and at what "
                "the container was given (docker: --gpus all), or use lane='host'."
            )
        _check_driver(packages)
        ordinal = torch.cuda.current_device() if has_gpu else 0
        self.device = torch.device("cuda", ordinal) if has_gpu else torch.device("cpu")
        self._is_stand_in = packages.is_stand_in
        self._gpu = Gpu(packages, ordinal)
        self._copies = choose_copy_call(config.copy_call, packages)
        flags = "memops" if config.flag_call == "auto" else config.flag_call
        self._lane = CupyDevice(self._gpu, self._copies, flags)
        self.core: Any = _core.PythonLane(self._lane)
        self.description = f"cupy ({self._copies} copies, flags by {flags}, ipc arena)"
        self.canary_bytes = _CANARY_BYTES
        self.has_links = True
        self._arenas: list[Arena] = [Arena(self._gpu)]  # this rank's own, later all

    def reserve(self, create: OpenSegment, rank: int, num_bytes: int) -> None:
        self._arenas[0].allocate(num_bytes)

    def share(
        self, peers: Peers, domain: DomainRanks, name: str, num_bytes: int, deadline_s: float
    ) -> None:
        own = self._arenas[0]
        said = peers.together(lambda: (own.export(), self._gpu.uuids(), self._gpu.ordinal))
        of_ranks = [said[rank] for rank in domain.group_ranks]
        if not self._is_stand_in:  # it has no NVML beside it
            gpus = [uuid_text(uuids[ordinal]) for _, uuids, ordinal in of_ranks]
            peers.together(lambda: check_nvlink(gpus, domain.global_ranks))

        def open_all() -> None:
            self._arenas = [
                own if rank == domain.rank else self._open(handle)
                for rank, (handle, _, _) in enumerate(of_ranks)
            ]
            if self._copies == "peer":
                gpus = [uuids[ordinal] for _, uuids, ordinal in of_ranks]
                self._name_peers(gpus, said[peers.rank][1], num_bytes)

        peers.together(open_all)

    def _open(self, handle: bytes) -> Arena:
        arena = Arena(self._gpu)
        arena.open(handle)
        return arena

    def _name_peers(self, gpus: Sequence[bytes], visible: Sequence[bytes], num_bytes: int) -> None:
        if not set(gpus) <= set(visible):
            raise RuntimeError(
                'copy_call="peer" must know the GPUs of all ranks, and this process does not see '
                'them. Make them visible (CUDA_VISIBLE_DEVICES), or use "plain" or "batch".'
            )
        self._lane.peers = [
            PeerArena(arena.address, num_bytes, visible.index(gpu))
            for arena, gpu in zip(self._arenas, gpus, strict=True)
        ]

    def arenas(self, open_segment: OpenSegment, domain: DomainRanks, num_bytes: int) -> list[Any]:
        from . import _core

        held, self._arenas = self._arenas, []
        return [_core.PythonMapping(address=arena.address, owner=arena) for arena in held]


def uuid_text(uuid: bytes) -> str:
    """As nvidia-smi writes it: GPU-, then groups of 8, 4, 4, 4 and 12 digits."""
    return f"GPU-{UUID(bytes=uuid)}"


def _check_driver(packages: Packages) -> None:
    supported = packages.runtime.driverGetVersion()
    if supported < _OLDEST_DRIVER:
        raise RuntimeError(
            f"the CUDA driver is too old: it supports CUDA {supported // 1000}."
            f"{supported % 1000 // 10}, feplb needs 11.7 or newer, for streams that wait for a "
            "flag. Update the NVIDIA driver."
        )


def choose_copy_call(wanted: str, packages: Packages) -> str:
    """``auto``: batches, where driver and bindings have them.

    Raises:
        RuntimeError: batches were asked for and are not to be had.
    """
    supported = packages.runtime.driverGetVersion()
    # Bindings of CUDA 13 know a form of the call that drivers before it have not.
    needed = max(_FIRST_DRIVER_WITH_BATCHES, packages.driver.CUDA_VERSION // 1000 * 1000)
    has_batches = hasattr(packages.driver, "cuMemcpyBatchAsync") and supported >= needed
    if wanted == "batch" and not has_batches:
        raise RuntimeError(
            f'copy_call="batch" needs cuda-python 12.8 or newer, not newer than the driver, which '
            f"supports CUDA {supported // 1000}.{supported % 1000 // 10} here (cuda-python: "
            f'{packages.driver.CUDA_VERSION // 1000}). Update them, or use "plain".'
        )
    if wanted != "auto":
        return wanted
    return "batch" if has_batches else "plain"
