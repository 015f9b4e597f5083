"""wip"""

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend


class TorchCpuAttnBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    pass
