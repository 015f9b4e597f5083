"""Admission in the HTTP process: every request's SLO is checked, bounded and written back before it is queued."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="admission",
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
    kind="around",
    process="http",
    hook="slos_sglang.engine.hooks:generate_request",
    why="The one place that every route (native, OpenAI, Anthropic, Ollama) passes with its sampling parameters and "
    "the HTTP request, before anything is tokenized or queued.",
    can_go_when="SGLang lets plugins validate requests",
    fingerprints={
        "sglang.srt.managers.tokenizer_manager": {
            "TokenizerManager.generate_request": "7c5fd3470a1ec11a",
            "TokenizerManager._handle_batch_request": "45a8cbd70c1c579e",
        },
        "sglang.srt.managers.io_struct": {
            "GenerateReqInput.normalize_batch_and_arguments": "9230eef3193942b1",
        },
        "sglang.srt.sampling.sampling_params": {
            "CustomParamValue": "cb5eaae585985020",
        },
        "sglang.srt.entrypoints.openai.protocol": {
            "ChatCompletionRequest.to_sampling_params": "45bd0e423a1f3bea",
        },
        "sglang.srt.entrypoints.openai.serving_base": {
            "OpenAIServingBase.handle_request": "a7f230c0b9b7fcdb",
        },
        "sglang.srt.entrypoints.openai.serving_chat": {
            "OpenAIServingChat._handle_streaming_request": "31e46d33930cee68",
        },
        "sglang.srt.entrypoints.openai.serving_completions": {
            "OpenAIServingCompletion._handle_streaming_request": "c2e43d55d46be86d",
            "OpenAIServingCompletion._build_sampling_params": "cc465ad7fc10fdee",
        },
    },
)
