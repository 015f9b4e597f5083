"""The HTTP server: one ASGI layer, so that a refusal has its status on every route, streaming or not."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="http-server",
    target="sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
    kind="around",
    process="http",
    hook="slos_sglang.engine.hooks:serve_http",
    why="SGLang starts a native stream with status 200 before it knows whether the request will be served, and "
    "drops the headers of an abort: a 400 or a 429 with Retry-After needs the response to wait for the first event.",
    can_go_when="SGLang takes ASGI middleware from plugins",
    fingerprints={
        "sglang.srt.managers.data_parallel_controller": {
            "SCHEDULER_PIDS_ARG": "28e725949ec747e4",
            "DataParallelController.get_init_info": "d4f03c8bfeddaaec",
        },
        "sglang.srt.entrypoints.engine": {
            "_wait_for_scheduler_ready": "ea2a101b5544c267",
        },
        "sglang.srt.entrypoints.http_server": {
            "app": "a3def3acf9088aae",
            "_setup_and_run_http_server": "9e635305bf41ed5e",
            "serve_generate_request": "f6022dd5661c9fad",
        },
    },
)
