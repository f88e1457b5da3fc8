"""An illegal access leaves the GPU of no use to the process that made it: it starts itself again.

What failed is on file by then, and is not tried again.
"""

import os
import sys
from typing import NoReturn

import torch


class LostGpu(Exception):
    """The device answers every call of this process with the error of an earlier one."""


def raise_if_lost() -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise LostGpu(str(error)) from error


def start_again(minutes_left: float) -> NoReturn:
    print("the GPU is lost to this process: starting another", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", f"{minutes_left:.2f}"])
