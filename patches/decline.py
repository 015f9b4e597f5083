"""Declined requests: the scheduler's abort keeps its reason and its time to retry on the way to the client."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="decline",
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_abort_finish_reason",
    kind="around",
    process="http",
    hook="slos_sglang.engine.hooks:handle_abort",
    why="SGLang reduces an abort to a status and a message (not streaming) or to a last event (streaming); the time "
    "to retry would be lost.",
    can_go_when="SGLang's aborts carry response headers",
    fingerprints={
        "sglang.srt.managers.tokenizer_manager": {
            "TokenizerManager._handle_abort_finish_reason": "23d969fdecef3c0f",
            "TokenizerManager._handle_abort_req": "a0aa7486faf12b94",
            "TokenizerManager._stream_one_response": "4a14de00a8d4359f",
        },
        "sglang.srt.managers.io_struct": {
            "AbortReq": "86a66ca556d15f2d",
            "FinishReasonDict": "173d689994c911c5",
        },
    },
)
