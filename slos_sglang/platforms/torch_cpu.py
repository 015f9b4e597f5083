"""The platform that lets SGLang's stock wheel serve on any CPU, with defaults that fit one.

It chooses only what the user left open. Two of its defaults matter more than any scheduling: one OpenMP thread (a
second one waits for every busy neighbour, and a step of 9 ms becomes one of 200) and float32 where the CPU has no
bfloat16 of its own.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

ATTENTION_BACKEND = "torch_cpu"
KV_TOKENS = 131_072  # SGLang fills this memory with zeros at the start; all of a machine's would take a minute
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, ARM


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Plain PyTorch on the CPU: no kernels of SGLang's own, no graphs, no Triton."""

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
            add_attention_backend_choices([ATTENTION_BACKEND])

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"  # SGLang's default for --device takes the name, not the torch.device of the mixin

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"  # the default needs a C++ compiler, and stops serving for most of a minute at the first penalty

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        return None

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open; SGLang records each assignment as a default of this platform.

        By now SGLang has put its own choice for the CPU where the user gave no attention back end, so the raw input
        is asked. The two flags can only be switched on by a user, never off.
        """
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = "1"  # for the scheduler process, which inherits it
            torch.set_num_threads(1)
        server_args.device = "cpu"
        if server_args._raw_input["attention_backend"] is None:
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.dtype == "auto":
            server_args.dtype = _default_dtype(server_args)
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = KV_TOKENS  # or fewer, where memory is short
        server_args.disable_overlap_schedule = True  # the forward is synchronous: it would only delay each token
        server_args.sleep_on_idle = True

    def init_backend(self) -> None:
        """Once in each worker process, before the model runner is made."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.mem_cache import allocation

        from slos_sglang.platforms.attention import TorchCpuAttnBackend

        register_attention_backend(ATTENTION_BACKEND)(TorchCpuAttnBackend)
        # SGLang tells back ends without Triton by their names here, and does not know ours.
        allocation.get_last_loc_triton = allocation.get_last_loc_torch
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))


def _default_dtype(server_args: Any) -> str:
    """bfloat16 for a 16-bit checkpoint on a CPU that computes in it, float32 for everything else.

    A float32 checkpoint is never rounded (SGLang's own `auto` would make it float16).
    """
    if not has_native_bf16():
        return "float32"
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(
        server_args.model_path,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.revision,
    )
    dtype = str(getattr(config.get_text_config(), "dtype", None)).removeprefix("torch.")
    return "bfloat16" if dtype in ("bfloat16", "float16") else "float32"


@cache
def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; False where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())
