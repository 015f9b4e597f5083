"""Where SGLang runs on a machine without a GPU: the entry point `torch_cpu` of `sglang.srt.platforms`.

SGLang calls `activate` inside its first import, in every process, before torchvision is imported. It must stay cheap,
and must stay out of the way wherever SGLang has a platform of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PLATFORM = "slos_sglang.platforms.torch_cpu:TorchCpuPlatform"
_OWN_PLATFORM_DEVICES = ("cuda", "xpu", "npu", "mps", "hpu", "musa")
_TORCHVISION_OPS = ("nms", "qnms")

# A Library unregisters its operators when it is collected: keep it.
_libraries: list[torch.library.Library] = []


def activate() -> str | None:
    """The platform class for SGLang, or None where a device (or SGLang's own CPU engine) is to serve."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or accelerator() is not None:
        return None
    _define_torchvision_ops()
    return PLATFORM


def accelerator() -> str | None:
    """The name of the first device that SGLang serves by itself and that is present, or None."""
    import torch

    for name in _OWN_PLATFORM_DEVICES:
        device = getattr(torch, name, None)
        if device is not None and device.is_available():
            return name
    return None


def _define_torchvision_ops() -> None:
    """Declare the operators a torchvision built for CUDA lacks beside a CPU build of torch.

    Without their schemas `import torchvision` fails, and with it SGLang; nobody calls them.
    """
    import torch

    missing = [name for name in _TORCHVISION_OPS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _libraries.append(library)
