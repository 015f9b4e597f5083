"""A batch of runs belongs to the caller's stage, its common prefix too."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="lang batch",
    target="sglang.lang.interpreter:run_program_batch",
    kind="around",
    process="client",
    hook="slos_sglang.lang.carry:run_program_batch",
    why="The runs of a batch are on a pool's threads, which can't see the stage the batch is in.",
    can_go_when="SGLang's frontend runs bodies and executors in the context of their caller",
    fingerprints={
        "sglang.lang.interpreter": {
            "run_program_batch": "5c6fffa5e14d0a50",
            "_run_program_batch_generator": "4d322767b43a1899",
            "cache_program": "3000ec4184bc6f3d",
        },
        "sglang.lang.ir": {
            "SglFunction.run_batch": "8ad841fc8a27bab8",
        },
    },
)
