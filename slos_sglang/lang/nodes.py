"""`gen` and `select`: SGLang's own nodes with an SLO attached.

SGLang refuses node types it doesn't know, so the SLO is an attribute of the node, fixed when the node is built.
"""

from __future__ import annotations

from typing import Any

import sglang as sgl
from sglang.lang.ir import SglExpr, SglExprList, SglGen, SglSelect

from slos_sglang.slo import SLO


def gen(name: str | None = None, *args: Any, slo: SLO | None = None, **kwargs: Any) -> SglGen | SglSelect:
    """`sglang.gen` with targets: accepts everything that it accepts, `choices` included.

    An `e2e_ms` of `slo` runs from the moment the request is sent. Raises `ValueError` where `slo` is no `SLO`.
    """
    return _with_slo(sgl.gen(name, *args, **kwargs), name, slo)


def select(name: str | None = None, *args: Any, slo: SLO | None = None, **kwargs: Any) -> SglSelect:
    """`sglang.select` with targets; all its requests (the common prefix, the choices) carry them."""
    return _with_slo(sgl.select(name, *args, **kwargs), name, slo)


def _with_slo(node: Any, name: str | None, slo: SLO | None) -> Any:
    if slo is not None and not isinstance(slo, SLO):
        raise ValueError(f"slo of {name!r} must be an SLO, not {slo!r}")
    node.slo = slo
    return node


def slo_of(node: SglExpr) -> SLO | None:
    """The SLO the node was built with; None for SGLang's own."""
    return getattr(node, "slo", None)


def call_names(expr: object) -> set[str]:
    """Names of the generation calls in an expression."""
    if isinstance(expr, SglGen | SglSelect):
        return set() if expr.name is None else {expr.name}
    if isinstance(expr, SglExprList):
        return {name for part in expr.expr_list for name in call_names(part)}
    return set()
