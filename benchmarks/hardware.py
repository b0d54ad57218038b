"""What decides how fast this machine is, for a result that is read by itself."""

import os
from pathlib import Path
from typing import Any

import torch

from sslmed.training.trainer import TrainConfig, lightning_precision

# What changes the arithmetic or the memory of a process from outside.
PREFIXES = (
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "ONEDNN_",
    "DNNL_",
    "ATEN_",
    "MALLOC_",
    "PYTORCH_",
    "TORCH_",
    "NVIDIA_TF32",
)
NAMES = ("LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")


def flags() -> dict[str, Any]:
    """Of processor, torch and environment. ``load`` is what else the machine does: processes in the last minute."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": bool(capabilities.get("amx_bf16", False)),
        "capabilities": sorted(
            name for name, there in capabilities.items() if there is True and name[:3] in ("amx", "avx")
        ),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn": torch.backends.mkldnn.is_available(),
        "fp32 products": torch.get_float32_matmul_precision(),
        "precision auto": lightning_precision(TrainConfig()),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _decides(name)},
        "load": round(os.getloadavg()[0], 2),
    }
    return found | (_gpu() if torch.cuda.is_available() else {})


def available_bytes() -> int:
    """Memory that a process may still take: of the GPU where there is one, else of the machine and its container."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _decides(name: str) -> bool:
    return name in NAMES or name.startswith(PREFIXES)


def _gpu() -> dict[str, Any]:
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "gpu_bytes": about.total_memory,
        "compute_capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
