"""A program's requests are sent from within their stage."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="lang execute",
    target="sglang.lang.interpreter:StreamExecutor._execute",
    kind="around",
    process="client",
    hook="slos_sglang.lang.carry:execute",
    why="Requests are sent from inside this method, on the executor's thread, hidden ones included.",
    can_go_when="SGLang's nodes can carry custom_params of their own, hidden requests included",
    fingerprints={
        "sglang.lang.interpreter": {
            "StreamExecutor._execute": "9922308e817cf889",
            "StreamExecutor._thread_worker_func": "0834fff7771f2ac1",
            "StreamExecutor._execute_gen": "80318fa1ff18d0c3",
            "StreamExecutor._execute_select": "4df1e489c0060448",
            "StreamExecutor._execute_commit_lazy_operations": "87febd253b885a4c",
        },
    },
)
