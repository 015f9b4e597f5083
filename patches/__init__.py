"""What this fork changes in SGLang: one file a seam (see `slos_sglang.engine.seams`).

The files only declare and bind; every hook's body lives in `slos_sglang.engine` (or `lang`). Renew the fingerprints
with `python -m slos_sglang.engine.seams --write` after reading what changed in SGLang.
"""

from slos_sglang.patches import (
    admission,
    decline,
    http_server,
    lang_batch,
    lang_execute,
    lang_request,
    lang_run,
    lang_select,
    lang_submit,
    receipts,
    scheduler,
)

SEAMS = (
    scheduler.SEAM,
    http_server.SEAM,
    admission.SEAM,
    decline.SEAM,
    receipts.SEAM,
    lang_submit.SEAM,
    lang_execute.SEAM,
    lang_request.SEAM,
    lang_select.SEAM,
    lang_run.SEAM,
    lang_batch.SEAM,
)
