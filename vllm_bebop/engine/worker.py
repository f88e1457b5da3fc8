"""The worker: vLLM's own, with its drafting and its sampler exchanged for bebop's.

`parallel_config.worker_cls` is a public, string-valued option. It names `vllm_bebop.engine.worker.Worker`, or
`...Worker[their/module/TheirWorker]` where a framework had set a worker of its own: attributes of this module are made
on demand, each a subclass of the worker it stands for. `--worker-extension-cls` composes with either.

Upstream symbols: `Worker.{init_device, load_model, compile_or_warm_up_model, sleep, wake_up, use_v2_model_runner,
start_weight_update, start_draft_weight_update, finish_weight_update}`,
`model_runner.{drafter, sampler, rejection_sampler}` (model runner V1), `model_runner.{speculator, sampler,
rejection_sampler}` (V2).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_bebop.config import BebopConfig, BebopConfigError
from vllm_bebop.engine import (
    draft_loader,  # noqa: F401  (registers the load format "bebop")
    lifeline,
    pushed_head,
    sleeping_head,
)
from vllm_bebop.engine.versions import refuse_unusable_v2
from vllm_bebop.kernels.tally import read_totals


def _worker_over(base: type) -> type:
    class Worker(base):  # type: ignore[misc, valid-type]
        """See the module's docstring."""

        _kept_head: dict[str, torch.Tensor] = {}
        _totals: torch.Tensor | None = None
        head_is_pushed = False

        def init_device(self) -> None:
            lifeline.follow_server()
            super().init_device()
            _runner_module(self).upgrade_drafting(self.model_runner, BebopConfig.from_vllm(self.vllm_config))

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            super().load_model(*args, **kwargs)
            config = BebopConfig.from_vllm(self.vllm_config)
            self._totals = _runner_module(self).upgrade_sampling(self.model_runner, config)
            pushed_head.guard(self)

        def compile_or_warm_up_model(self) -> Any:
            if self._totals is None:
                return super().compile_or_warm_up_model()
            counted = self._totals.clone()
            times = super().compile_or_warm_up_model()
            self._totals.copy_(counted)  # requests made up for the warm-up do not count
            return times

        def bebop_totals(self) -> dict[str, list[float]] | None:
            """For `collective_rpc("bebop_totals")`: sums since the start by draft step, see `kernels.tally`.

            Tensor-parallel ranks return the same, unless vLLM's batch-sharded sampling gives each its own requests;
            then, and for data-parallel ranks, the sums add up. Pipeline ranks but the last return None.
            """
            return None if self._totals is None else read_totals(self._totals)

        def start_weight_update(self, *args: Any, **kwargs: Any) -> None:
            self.head_is_pushed = False
            super().start_weight_update(*args, **kwargs)

        if hasattr(base, "start_draft_weight_update"):  # since vLLM 0.26

            def start_draft_weight_update(self) -> None:
                super().start_draft_weight_update()
                self.head_is_pushed = True

        def finish_weight_update(self) -> None:
            super().finish_weight_update()
            self.head_is_pushed = False

        def sleep(self, level: int = 1) -> None:
            self._kept_head = sleeping_head.copy_head(self) if level == 2 else {}
            super().sleep(level)

        def wake_up(self, tags: list[str] | None = None) -> None:
            super().wake_up(tags)
            if tags is None or "weights" in tags:
                sleeping_head.restore_head(self, self._kept_head)
                self._kept_head = {}

    Worker.__module__ = __name__
    return Worker


def _runner_module(worker: Any) -> Any:
    """Our module for the model runner in use."""
    refuse_unusable_v2(worker.use_v2_model_runner)
    if worker.use_v2_model_runner:
        from vllm_bebop.engine import runner_v2

        return runner_v2
    from vllm_bebop.engine import runner_v1

    return runner_v1


def _platform_worker() -> type:
    if current_platform.is_cpu():
        return resolve_obj_by_qualname("vllm.v1.worker.cpu_worker.CPUWorker")
    if current_platform.is_cuda_alike():
        return resolve_obj_by_qualname("vllm.v1.worker.gpu_worker.Worker")
    raise BebopConfigError(f"bebop runs on CUDA, ROCm and CPU builds of vLLM, not on {current_platform.device_name}")


def __getattr__(name: str) -> type:
    if name == "Worker":
        worker = _worker_over(_platform_worker())
    elif name.startswith("Worker[") and name.endswith("]"):
        base = resolve_obj_by_qualname(name[len("Worker[") : -1].replace("/", "."))
        if not hasattr(base, "init_device") or not hasattr(base, "load_model"):
            raise BebopConfigError(
                f"worker_cls {base.__module__}.{base.__qualname__} is not a subclass of vLLM's worker"
            )
        worker = _worker_over(base)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    worker.__qualname__ = name
    globals()[name] = worker
    return worker
