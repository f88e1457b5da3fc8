"""Checks of the samplers' arguments: ValueError that names the argument and says what was expected."""

import torch
from torch import Tensor


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None, device: torch.device
) -> None:
    matches = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {['*' if n is None else n for n in shape]}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the logits are on {device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def check_unit_stride(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} is not contiguous in its last dimension")


def check_logits(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    check_tensor(name, tensor, shape, None, device)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float dtype")
    if tensor.shape[-1] == 0:
        raise ValueError(f"{name} has an empty vocabulary")


def check_rows(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Raises ValueError unless `tensor` holds logits that the kernels can read."""
    check_logits(name, tensor, shape, device)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    check_unit_stride(name, tensor)
    check_current(name, device)


def check_current(name: str, device: torch.device) -> None:
    """Triton launches on the current GPU, whichever holds the tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(f"{name} is on {device}, not on the current GPU: call torch.cuda.set_device({device.index})")


def check_integers(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    check_tensor(name, tensor, shape, None, device)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.int32 or torch.int64")
    if tensor.dim() == 1:
        check_contiguous(name, tensor)


def check_requests(
    batch: int, device: torch.device, temperature: Tensor, seeds: Tensor, positions: Tensor, slots: Tensor | None
) -> int:
    """Checks the per-request arguments; returns the number of slots (of requests without `slots`)."""
    num_slots = batch
    check_integers("positions", positions, (batch,), device)
    if slots is not None:
        check_integers("slots", slots, (batch,), device)
        num_slots = temperature.shape[0] if temperature.dim() else 0
    check_tensor("temperature", temperature, (num_slots,), torch.float32, device)
    check_tensor("seeds", seeds, (num_slots,), torch.int64, device)
    check_contiguous("temperature", temperature)
    check_contiguous("seeds", seeds)
    return num_slots


def check_num_rows(name: str, tensor: Tensor, num_requests: int, slots: Tensor | None) -> int:
    """Returns the tensor's number of rows: by slot there may be any, by request one each."""
    if slots is None and tensor.shape[0] != num_requests:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, expected {num_requests}")
    return tensor.shape[0]
