"""Cost models by name, and the format of calibration files (INTERFACES, section 4).

A named model says how long a batch takes on one server of so many GPUs, and how many KV tokens that server holds:

    kv_tokens = (0.9 * memory of a GPU * GPUs - weights) / bytes of KV a token

with the GPUs' memory in decimal bytes (an A100 has 40 GB here), weights and KV in 16 bits, and a token's KV being
2 (key and value) * layers * KV heads * head size * 2 bytes. Sources: the paper's appendix for the OPT, ToolLLaMA and
R1 models (no term for context), linear fits to published per-operator measurements for the others.

What must stay true: reading back what was written gives an equal model, and an unknown key is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from slos_sglang.policy.batch_time import CostModel, Piece

A100_BYTES, H100_BYTES, H200_BYTES = 40e9, 80e9, 141e9
# Share of the GPUs' memory that weights and KV may take.
MEMORY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class NamedCostModel:
    """What one server can do: the pieces of its cost model, its KV capacity, how many GPUs it stands on.

    fit  how a calibration came about: `r2`, `mape`, `quantiles`, `source`; empty for the built-in ones
    """

    name: str
    pieces: tuple[Piece, ...]
    kv_tokens: int
    gpus: int = 1
    fit: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty text, not {self.name!r}")
        if not self.pieces:
            raise ValueError("pieces must hold at least one piece, not []")
        for piece in self.pieces:
            for key, value in asdict(piece).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                    raise ValueError(f"pieces.{key} must be a finite number of at least 0, not {value!r}")
        for name in ("kv_tokens", "gpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if unknown := sorted(set(self.fit) - set(_FIT_KEYS)):
            raise ValueError(f"fit has an unknown key {unknown[0]!r}; known keys: {', '.join(_FIT_KEYS)}")

    def cost(self, acceptance: float = 0.0) -> CostModel:
        """The cost model itself; with its draft model, if tokens of that are to be accepted with some probability.

        Raises `ValueError` where nobody knows what a draft model takes there.
        """
        if acceptance and not any(piece.spec_steps_ms for piece in self.pieces):
            raise ValueError(f"acceptance must be 0 with cost model {self.name!r}, which has no draft model")
        return CostModel(*self.pieces, acceptance=acceptance)

    def to_json(self) -> str:
        """The text of a calibration file."""
        body = {"name": self.name, "pieces": [asdict(piece) for piece in self.pieces], "kv_tokens": self.kv_tokens}
        return json.dumps({**body, "gpus": self.gpus, "fit": dict(self.fit)}, indent=2) + "\n"


_FIT_KEYS = ("r2", "mape", "quantiles", "source")


def parse_cost_model(text: str) -> NamedCostModel:
    """The model that the text of a calibration file describes. Raises `ValueError` naming the field and the value."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    given = _known("the cost model", body, tuple(f.name for f in fields(NamedCostModel)))
    pieces = given.get("pieces")
    if not isinstance(pieces, list):
        raise ValueError(f"pieces must be a list of objects, not {pieces!r}")
    keys = tuple(f.name for f in fields(Piece))
    given["pieces"] = tuple(Piece(**_known("a piece", piece, keys)) for piece in pieces)
    given["fit"] = _known("fit", given.get("fit") or {}, _FIT_KEYS)
    if missing := [name for name in ("name", "kv_tokens") if name not in given]:
        raise ValueError(f"{missing[0]} is missing")
    return NamedCostModel(**given)


def _known(what: str, body: object, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ValueError(f"{what} must be an object, not {body!r}")
    for key in body:
        if key not in keys:
            raise ValueError(f"{what} has an unknown key {key!r} (value {body[key]!r}); known keys: {', '.join(keys)}")
    return body


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What KV capacity depends on: `kv_heads * head_size` is `kv_width`; weights in bytes, 16 bits a parameter."""

    layers: int
    kv_width: int
    weights: float

    @property
    def token_bytes(self) -> int:
        """KV of one token: key and value, 2 bytes each."""
        return 2 * self.layers * self.kv_width * 2

    def kv_tokens(self, memory: float, gpus: int) -> int:
        """KV tokens on `gpus` GPUs of `memory` bytes each."""
        return int((MEMORY_SHARE * memory * gpus - self.weights) / self.token_bytes)


# OPT and LLaMA have no grouped-query attention: their KV is as wide as the model.
OPT_6_7B = Dimensions(layers=32, kv_width=4096, weights=13.4e9)
OPT_13B = Dimensions(layers=40, kv_width=5120, weights=26e9)
OPT_30B = Dimensions(layers=48, kv_width=7168, weights=60e9)
TOOLLAMA_7B = Dimensions(layers=32, kv_width=4096, weights=13.5e9)
R1_QWEN_1_5B = Dimensions(layers=28, kv_width=2 * 128, weights=3.1e9)
LLAMA_3_1_8B = Dimensions(layers=32, kv_width=8 * 128, weights=16.06e9)
QWEN_2_5_7B = Dimensions(layers=28, kv_width=4 * 128, weights=15.23e9)
QWEN_3_32B = Dimensions(layers=64, kv_width=8 * 128, weights=65.5e9)


def _model(name: str, dimensions: Dimensions, memory: float, *pieces: Piece, gpus: int = 1) -> NamedCostModel:
    return NamedCostModel(name=name, pieces=pieces, kv_tokens=dimensions.kv_tokens(memory, gpus), gpus=gpus)


def _linear(tokens_ms: float, const_ms: float, context_ms: float = 0.0, spec_steps_ms: float = 0.0) -> Piece:
    return Piece(tokens_ms=tokens_ms, context_ms=context_ms, spec_steps_ms=spec_steps_ms, const_ms=const_ms)


COST_MODELS: Mapping[str, NamedCostModel] = {
    model.name: model
    for model in (
        _model(
            "opt-6.7b-a100",
            OPT_6_7B,
            A100_BYTES,
            _linear(6.878e-2, 24.80, spec_steps_ms=1.25e-3),
            _linear(7.523e-2, 3.03, spec_steps_ms=3.465),
        ),
        _model("opt-13b-a100-tp2", OPT_13B, A100_BYTES, _linear(7.213e-2, 31.73, spec_steps_ms=3.341), gpus=2),
        _model("opt-30b-a100-tp4", OPT_30B, A100_BYTES, _linear(9.314e-2, 37.88, spec_steps_ms=2.797), gpus=4),
        _model("opt-13b-h100", OPT_13B, H100_BYTES, _linear(4.177e-2, 27.43)),
        _model("toolllama-7b-a100", TOOLLAMA_7B, A100_BYTES, _linear(6.572e-2, 27.52)),
        _model("r1-distill-qwen-1.5b-a100", R1_QWEN_1_5B, A100_BYTES, _linear(2.916e-1, 18.04)),
        _model("llama-3.1-8b-h200", LLAMA_3_1_8B, H200_BYTES, _linear(2.090e-2, 5.08, context_ms=1.504e-5)),
        _model("llama-3.1-8b-h100", LLAMA_3_1_8B, H100_BYTES, _linear(2.068e-2, 5.99, context_ms=4.16e-5)),
        _model("llama-3.1-8b-a100", LLAMA_3_1_8B, A100_BYTES, _linear(6.686e-2, 17.9, context_ms=4.73e-5)),
        _model("qwen2.5-7b-h200", QWEN_2_5_7B, H200_BYTES, _linear(2.019e-2, 2.96, context_ms=5.54e-6)),
        _model("qwen2.5-7b-h100", QWEN_2_5_7B, H100_BYTES, _linear(1.977e-2, 4.27, context_ms=8.84e-6)),
        _model("qwen3-32b-h100-tp4", QWEN_3_32B, H100_BYTES, _linear(1.570e-2, 8.36, context_ms=3.45e-5), gpus=4),
    )
}
