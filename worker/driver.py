"""Begins what CUDA's driver does first in a process, beside the import of PyTorch, which would ask for it only then."""

from __future__ import annotations

import ctypes
import threading


def begin_context(device: int) -> None:
    """Have the driver set up, and its context on this device, without waiting for it.

    PyTorch uses the same context, and waits for the driver where it is not done. What fails here fails there too, and
    is told there. The context stays for as long as the process, also in one that goes on to compute on the CPU, since
    its PyTorch knows no GPU.
    """
    threading.Thread(target=_begin, args=(device,), name="cuda", daemon=True).start()


def _begin(number: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # its calls let other threads run
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
