"""When the CPU platform steps in, and what it chooses where the user chose nothing."""

import os
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from slos_sglang import platforms  # noqa: E402


def test_stays_out_of_the_way_of_sglangs_own_engines(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(platforms, "accelerator", lambda: None)
    assert platforms.activate() == platforms.PLATFORM
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platforms.activate() is None
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "0")
    monkeypatch.setattr(platforms, "accelerator", lambda: "cuda")
    assert platforms.activate() is None


@pytest.mark.parametrize("name", ["cuda", "xpu", "npu"])
def test_an_accelerator_is_seen(monkeypatch, name):
    for other in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, other), "is_available", lambda: False)
    assert platforms.accelerator() is None
    monkeypatch.setattr(torch, name, SimpleNamespace(is_available=lambda: True), raising=False)
    assert platforms.accelerator() == name


def test_torchvision_can_be_imported_after_activation(monkeypatch):
    monkeypatch.setattr(platforms, "accelerator", lambda: None)
    platforms.activate()
    assert all(hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms"))


@pytest.fixture
def torch_cpu():
    if platforms.accelerator() is not None:
        pytest.skip("SGLang serves this machine's device itself")
    from slos_sglang.platforms import torch_cpu

    return torch_cpu


def arguments(**chosen):
    open_to_defaults = {"attention_backend": None, "max_total_tokens": None, "dtype": "auto", "device": "cpu"}
    raw = open_to_defaults | {"disable_overlap_schedule": False, "sleep_on_idle": False} | chosen
    resolved = raw | {"attention_backend": raw["attention_backend"] or "intel_amx"}  # what SGLang puts there first
    return SimpleNamespace(**resolved, model_path="none", _raw_input=raw)


@pytest.fixture
def threads(monkeypatch):
    """What `torch.set_num_threads` is called with."""
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield calls
    os.environ.pop("OMP_NUM_THREADS", None)  # monkeypatch restores what was there before


def test_defaults_fit_the_cpu(torch_cpu, threads, monkeypatch):
    monkeypatch.setattr(torch_cpu, "has_native_bf16", lambda: False)
    args = arguments()
    torch_cpu.TorchCpuPlatform().apply_server_args_defaults(args)
    assert (args.device, args.attention_backend, args.dtype) == ("cpu", "torch_cpu", "float32")
    assert args.disable_overlap_schedule
    assert args.sleep_on_idle
    assert args.max_total_tokens == torch_cpu.KV_TOKENS
    assert (threads, os.environ["OMP_NUM_THREADS"]) == ([1], "1")


def test_what_the_user_chose_stays(torch_cpu, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    args = arguments(attention_backend="torch_native", dtype="bfloat16", max_total_tokens=512)
    torch_cpu.TorchCpuPlatform().apply_server_args_defaults(args)
    assert (args.attention_backend, args.dtype, args.max_total_tokens) == ("torch_native", "bfloat16", 512)
    assert (threads, os.environ["OMP_NUM_THREADS"]) == ([], "3")


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags : fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_native_bfloat16_is_read_off_the_cpu(torch_cpu, tmp_path, cpuinfo, native):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert torch_cpu.has_native_bf16(path) is native
    assert torch_cpu.has_native_bf16(tmp_path / "missing") is False


@pytest.mark.parametrize(
    ("checkpoint", "chosen"),
    [(torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16"), (torch.float32, "float32"), (None, "float32")],
)
def test_only_a_16_bit_checkpoint_is_computed_in_bfloat16(torch_cpu, threads, monkeypatch, checkpoint, chosen):
    from sglang.srt.utils import hf_transformers_utils

    config = SimpleNamespace(dtype=checkpoint)
    config.get_text_config = lambda: config
    monkeypatch.setattr(hf_transformers_utils, "get_config", lambda *_, **__: config)
    monkeypatch.setattr(torch_cpu, "has_native_bf16", lambda: True)
    args = arguments(trust_remote_code=False, revision=None)
    torch_cpu.TorchCpuPlatform().apply_server_args_defaults(args)
    assert args.dtype == chosen
