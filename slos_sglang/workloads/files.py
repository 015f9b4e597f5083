"""Workload files: JSON lines, one program a line (INTERFACES, section 5).

What must stay true: reading back what was written gives equal programs; whatever is wrong in a file is a `ValueError`
of one line, with the file's name, the line number, the field and the value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from slos_sglang.slo import nearest
from slos_sglang.workloads.program import Program, Stage


def write_workload(programs: Iterable[Program], file: Path) -> None:
    """Write `programs`, one a line; what has its default is left out."""
    lines = [json.dumps(_program_json(program)) for program in programs]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_workload(file: Path, *, kv_tokens: int | None = None) -> list[Program]:
    """The programs of a workload file, each of which must fit into `kv_tokens` of KV.

    Raises `ValueError`, also where the file can't be read or holds no program.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    programs: list[Program] = []
    ids: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            program = _program(line)
            if programs and program.arrival_s < programs[-1].arrival_s:
                raise ValueError(
                    f"arrival_s must not be less than the line before's {programs[-1].arrival_s!r}, "
                    f"not {program.arrival_s!r}"
                )
            if program.id in ids:
                raise ValueError(f"id {program.id!r} was given to an earlier program")
            if kv_tokens is not None:
                _check_fits(program, kv_tokens)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        ids.add(program.id)
        programs.append(program)
    if not programs:
        raise ValueError(f"{file}: holds no program")
    return programs


def _check_fits(program: Program, kv_tokens: int) -> None:
    for stage in program.stages:
        if stage.prompt_tokens + stage.output_tokens > kv_tokens:
            raise ValueError(
                f"stage {stage.name!r}: prompt_tokens {stage.prompt_tokens} and output_tokens {stage.output_tokens} "
                f"exceed the KV capacity of {kv_tokens} tokens"
            )


def _program(line: str) -> Program:
    try:
        body = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    given = _given("program", body, Program)
    stages = given["stages"]
    if not isinstance(stages, list):
        raise ValueError(f"stages must be a list of objects, not {stages!r}")
    made = []
    for position, stage in enumerate(stages):
        try:
            made.append(Stage(**_given("stage", stage, Stage)))
        except ValueError as error:
            raise ValueError(f"stages[{position}]: {error}") from None
    return Program(**{**given, "stages": tuple(made)})


def _given(what: str, body: object, kind: type[Program] | type[Stage]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ValueError(f"a {what} must be an object, not {body!r}")
    known = tuple(field.name for field in fields(kind))
    for key in body:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"the {what} has an unknown key {key!r} (value {body[key]!r}){hint}")
    for field in fields(kind):
        if field.default is MISSING and field.name not in body:
            raise ValueError(f"the {what} has no {field.name}")
    return body


def _program_json(program: Program) -> dict[str, Any]:
    stages = [
        {
            field.name: getattr(stage, field.name)
            for field in fields(Stage)
            if getattr(stage, field.name) != field.default
        }
        for stage in program.stages
    ]
    return {"id": program.id, "arrival_s": program.arrival_s, "app": program.app, "stages": stages}
