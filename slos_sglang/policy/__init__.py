"""Pure decisions: who is promised what, and what the next batch holds.

No SGLang, no torch, no clock, no I/O: the time is an argument, so that a server, its tensor-parallel ranks and a
simulator take the same decisions from the same state. Read `scheduler.py` first; the rest it calls by name:

    request     a request's targets, due times and progress
    batch_time  the cost model: what a batch takes, corrected by what batches took
    plan        how promised work is batched, and what that leads to: the guarantee
    admission   which promises can be made
    batches     what bounds a batch, and who fills the room that promised work leaves
    lengths     how long an output will be
"""
