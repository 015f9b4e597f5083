"""A select brings back a receipt."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="lang select",
    target="sglang.lang.backend.runtime_endpoint:RuntimeEndpoint.select",
    kind="around",
    process="client",
    hook="slos_sglang.lang.carry:select",
    why="It drops the meta_info of its requests, and with that their receipts.",
    can_go_when="SGLang's select keeps the meta_info of its requests",
    fingerprints={
        "sglang.lang.backend.runtime_endpoint": {
            "RuntimeEndpoint.select": "6f00767c1677a824",
            "RuntimeEndpoint._generate_http_request": "8db7b7177c50a824",
        },
        "sglang.lang.choices": {
            "ChoicesDecision": "57ba29479afa670f",
        },
    },
)
