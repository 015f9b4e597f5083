"""The scheduler: SGLang's class is replaced by a subclass that forms each batch by token deadlines."""

from slos_sglang.engine.seams import Seam

SEAM = Seam(
    name="scheduler",
    target="sglang.srt.managers.scheduler:Scheduler",
    kind="replace",
    process="scheduler",
    hook="slos_sglang.engine.scheduler:SLOScheduler",
    why="SGLang has no way to plug in a batch-forming scheduler; the subclass overrides methods and calls super.",
    can_go_when="SGLang takes the scheduler class from its arguments (as it does for the tokenizer manager)",
    fingerprints={
        "sglang.srt.managers.scheduler": {
            "Scheduler.__init__": "72cff5bab57e364a",
            "Scheduler._abort_on_queued_limit": "a021b5a75ede1437",
            "Scheduler._add_request_to_queue": "bfa9f807d4a52247",
            "Scheduler._get_new_batch_prefill_raw": "7c15425aad4bc66a",
            "Scheduler._release_aborted_request": "3e3e516c211a0134",
            "Scheduler._should_defer_prefill": "c947b2f10a3e6907",
            "Scheduler.event_loop_normal": "8ea223071e73dc06",
            "Scheduler.event_loop_overlap": "a7132f09fbec8928",
            "Scheduler.get_init_info": "a43fc197d37b385e",
            "Scheduler.get_new_batch_prefill": "8bd392dee037fcb0",
            "Scheduler.get_next_batch_to_run": "976d6a6bdcc80722",
            "Scheduler.get_num_allocatable_reqs": "33545656035e5b5e",
            "Scheduler.get_output_streamer_class": "b5ecedad5b7ce7a2",
            "Scheduler.get_prefill_adder_class": "c5c24e4050174dce",
            "Scheduler.ingest_requests": "aa2524b601bfc673",
            "Scheduler.init_chunked_prefill": "e13c41a96e78049e",
            "Scheduler.init_output_streamer": "7cbfe7643e9be1b4",
            "Scheduler.init_request_receiver": "1613c6ce72f17c2f",
            "Scheduler.on_idle": "3e0b66330f0e19dc",
            "Scheduler.process_batch_result": "d04f06e2a851666b",
            "Scheduler.process_input_requests": "fbfbee9b33c526c6",
            "Scheduler.run_batch": "acaf10e48d36a49b",
            "Scheduler.send_abort_output": "663a8769ba9e476f",
            "Scheduler.stash_chunked_request": "ec61b8ea179724aa",
            "Scheduler.update_running_batch": "37a2d79c422454cb",
            "_make_abort_req": "56975083fb7aa481",
            "run_scheduler_process": "c1bdc2fb77b68669",
        },
        "sglang.srt.managers.schedule_batch": {
            "FINISH_ABORT": "299c244e708c0085",
            "NextBatchPlan": "d372cb7fb1d8b233",
            "Req.init_next_round_input": "0f4d809c2d006626",
            "ScheduleBatch.check_decode_mem": "3eb8e8cbc59d0e1f",
            "ScheduleBatch.copy": "edfb7f43fb2a8420",
            "ScheduleBatch.filter_batch": "966d47dd74a511a8",
            "ScheduleBatch.merge_batch": "741c11abe785ba11",
            "ScheduleBatch.mix_with_running": "cea78141488b4c67",
            "ScheduleBatch.prepare_for_decode": "a0062f39a5ed18e4",
            "ScheduleBatch.prepare_for_extend": "1c9abbadd234cbce",
        },
        "sglang.srt.managers.schedule_policy": {
            "PrefillAdder": "2e45f282ce7f4309",
        },
        "sglang.srt.managers.scheduler_components.output_streamer": {
            "SchedulerOutputStreamer": "24f5835393851c18",
            "_GenerationStreamAccumulator": "091de51675fb7159",
        },
        "sglang.srt.managers.scheduler_components.request_receiver": {
            "SchedulerRequestReceiver._broadcast_reqs_across_ranks": "446d0e7456b81e67",
            "SchedulerRequestReceiver._pull_raw_reqs": "e3d1d5afe06857c3",
            "SchedulerRequestReceiver.recv_requests": "0e53cd6eac6db782",
        },
        "sglang.srt.mem_cache.common": {
            "match_kv_cache": "2d21decb26be6bdb",
            "release_kv_cache": "ef87e967bb9b7246",
        },
        "sglang.srt.mem_cache.base_prefix_cache": {
            "BasePrefixCache.lock": "543b5e1a7adbe07f",
            "BasePrefixCache.unlock": "89bbe5570e7e32a0",
            "MatchPrefixParams": "c8c2c36f59923559",
        },
        "sglang.srt.mem_cache.radix_cache": {
            "RadixKey.__init__": "6eb24a5fa5a07e37",
        },
        "sglang.srt.mem_cache.unified_radix_cache": {
            "UnifiedRadixCache.lock": "e769a8956943e76b",
            "UnifiedRadixCache.match_prefix": "052de0160b8a0700",
            "UnifiedRadixCache.unlock": "f83485452103c624",
        },
        "sglang.srt.constrained.grammar_manager": {
            "GrammarManager.get_ready_grammar_requests": "d107de2630831a87",
            "GrammarManager.has_waiting_grammars": "364c6f6220f7e81d",
        },
        "sglang.srt.sampling.sampling_batch_info": {
            "SamplingBatchInfo.filter_batch": "0476f13c9ad87137",
            "SamplingBatchInfo.merge_batch": "8d3079b2a21be423",
        },
        "sglang.srt.sampling.penaltylib.orchestrator": {
            "BatchedPenalizerOrchestrator": "24ff826fd7b5da8a",
            "_BatchedPenalizer": "cb43f2b183a7191d",
        },
        "sglang.srt.managers.scheduler_components.batch_result_processor": {
            "SchedulerBatchResultProcessor.process_batch_result_decode": "ed2858c952502da7",
            "SchedulerBatchResultProcessor.process_batch_result_prefill": "92f5809ed511f8b4",
        },
        "sglang.srt.runtime_context": {
            "get_memory": "89afbb424832cc46",
            "get_parallel": "d29687b841257f0a",
        },
    },
)
