"""A program's expressions keep the stage they were submitted in."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="lang submit",
    target="sglang.lang.interpreter:StreamExecutor.submit",
    kind="around",
    process="client",
    hook="slos_sglang.lang.carry:submit",
    why="The executor's thread can't see the stage that the program's body is in.",
    can_go_when="SGLang's frontend runs bodies and executors in the context of their caller",
    fingerprints={
        "sglang.lang.interpreter": {
            "StreamExecutor.submit": "fa074572cb7016ad",
            "StreamExecutor.__init__": "463ae3b8c87f853c",
            "StreamExecutor.fork": "7e1297f2bb0e427f",
            "StreamExecutor._init_var_event": "754b1e9a57d452dd",
        },
    },
)
