"""Each run of a program has an id, and its body runs within the caller's stage."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="lang run",
    target="sglang.lang.interpreter:run_program",
    kind="around",
    process="client",
    hook="slos_sglang.lang.carry:run_program",
    why="With stream=True the body runs on a thread that starts with an empty context.",
    can_go_when="SGLang's frontend runs bodies and executors in the context of their caller",
    fingerprints={
        "sglang.lang.interpreter": {
            "run_program": "2b539a8e7e7545eb",
            "run_internal": "f2b65f1312d21ab1",
        },
        "sglang.lang.ir": {
            "SglFunction.__init__": "9266bca7ebee2d89",
            "SglFunction.run": "8baae38fbcec12b5",
        },
    },
)
