"""A program's requests carry their SLO."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="lang request",
    target="sglang.lang.backend.runtime_endpoint:http_request",
    kind="around",
    process="client",
    hook="slos_sglang.lang.carry:http_request",
    why="Every request for tokens leaves through this function, with a fixed list of sampling parameters.",
    can_go_when="SGLang's nodes can carry custom_params of their own, hidden requests included",
    fingerprints={
        "sglang.lang.backend.runtime_endpoint": {
            "http_request": "d8fdb441f292e6d4",
            "RuntimeEndpoint.generate": "df95a43f1b5653da",
            "RuntimeEndpoint.generate_stream": "be389226b3de8e79",
            "RuntimeEndpoint.commit_lazy_operations": "b2392518dff7633f",
            "RuntimeEndpoint.fill_image": "57987b1f43194fa6",
            "RuntimeEndpoint.cache_prefix": "d8d4a114f9d0e627",
        },
        "sglang.utils": {
            "http_request": "18176f143706b0a7",
        },
    },
)
