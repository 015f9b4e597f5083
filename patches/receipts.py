"""Receipts: one object a request in `meta_info.slo`."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="receipts",
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
    kind="around",
    process="http",
    hook="slos_sglang.engine.hooks:update_request_meta_info",
    why="SGLang takes every customized value for a list with one element a token and joins the lists; a receipt is "
    "one object for the whole request.",
    can_go_when="SGLang hands request-level customized values through as they are",
    fingerprints={
        "sglang.srt.managers.tokenizer_manager": {
            "TokenizerManager.update_request_meta_info": "ca82bc2e34df0d82",
            "TokenizerManager._handle_batch_output": "c2fe8ed40e4150bb",
            "_slice_streaming_output_meta_info": "3019551faa1b8226",
        },
    },
)
