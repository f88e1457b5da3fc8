"""Stand-ins for what RL frameworks bring along: a worker class and a worker extension of their own."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class FrameworkWorker(PlatformWorker):
    """A framework's worker, with a method it calls remotely."""

    def framework_ping(self) -> str:
        return f"pong from rank {self.rank}"


class FrameworkExtension:
    """What --worker-extension-cls names."""

    def extension_ping(self) -> str:
        return "pong from the extension"
