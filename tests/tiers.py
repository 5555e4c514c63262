"""What runs when: the one table that says which tier each test is in, and what a run says of those it leaves out.

    bash scripts/test.sh           unit and model: what a change of the code can break, in minutes
    bash scripts/test.sh all       and system: other processes, other libraries' own tests, compilers
    bash scripts/test.sh quality   quality: real checkpoints

A test is in the tier of the longest entry that its name begins with: a folder, a file, or a file and a function. Of a
table of many cases a part is (see `beyond_the_sample`).
"""

import re
from collections import Counter

TIERS = {
    "unit": "one function or kernel at a time, without a model",
    "model": "tiny models: conversion, training, analysis, the command line, in this process",
    "system": "fresh processes, the Hub, two processes, transformers' common tests, compile and export",
    "quality": "real checkpoints keep their quality",
}

TABLE = {
    "tests/": "model",
    "tests/core/": "unit",
    "tests/quality/": "quality",
    # Whole models.
    "tests/core/test_compatibility.py": "model",
    "tests/core/test_layers_stack.py": "model",
    "tests/core/test_monitor.py": "model",
    "tests/core/test_register_metric.py": "model",
    # transformers' own tests, and one architecture of every kind.
    "tests/common/": "system",
    "tests/native/test_common_causal.py": "system",
    "tests/native/test_common_encoder.py": "system",
    "tests/native/test_common_seq2seq.py": "system",
    "tests/sweep/": "system",
    # Processes of their own: saved and loaded, with and without the package; killed and resumed; two at once.
    "tests/test_fresh_process.py": "system",
    "tests/fixtures/": "system",
    "tests/hub/test_push.py": "system",
    "tests/test_moved.py::test_an_old_folder": "system",
    "tests/test_release.py": "system",
    "tests/conversion/test_save_load.py::test_importing_the_package_imports_no_model_file": "system",
    "tests/native/test_save_load.py::test_a_head_that_transformers_makes_loads_without_the_package": "system",
    "tests/core/test_compatibility.py::test_a_newer_transformers_is_warned_of_at_import": "system",
    "tests/test_startup.py": "system",
    "tests/test_readme.py::test_the_readmes_code": "system",
    "tests/test_self_check.py::test_all_is_well": "system",
    "tests/test_gpu_check.py": "system",
    "tests/documents/test_distance_attention.py::test_run_comprehensive": "system",
    "tests/test_sequence_parallel.py": "system",
    "tests/test_onnx.py": "system",
    "tests/test_lm_eval.py": "system",
    "tests/test_serve.py": "system",
    "tests/evaluation/test_ruler.py::test_one_that": "system",
    "tests/evaluation/test_ruler.py::test_the_command": "system",
    "tests/experiments/test_long_context.py::test_a_run_that_was_killed": "system",
    "tests/experiments/test_sequence_speed.py::test_a_small": "system",
    "tests/experiments/test_quality_experiments.py::test_digits": "system",
    "tests/experiments/test_quality_experiments.py::test_speech": "system",
    "tests/training/test_distributed.py": "system",
    "tests/training/test_long_sequences.py::test_five": "system",
    "tests/training/test_resume.py": "system",
    "tests/training/test_sharded.py": "system",
    "tests/training/test_tensor_parallel.py::test_five": "system",
    "tests/training/test_tensor_parallel.py::test_what_cannot": "system",
    "tests/analysis/test_evaluate_metrics.py::test_two_processes": "system",
    "tests/test_cli.py::test_a_process_of_its_own": "system",
    # Whole runs of a command where one of its kind stays in model, the processes that measure memory, and pictures.
    "tests/training/test_adapt.py": "system",
    "tests/training/test_adapt.py::test_an_encoder": "model",
    "tests/training/test_adapt.py::test_bad": "model",
    "tests/training/test_from_scratch.py::test_each_task_trains_scores_and_reloads[masked-lm]": "system",
    "tests/training/test_from_scratch.py::test_each_task_trains_scores_and_reloads[seq2seq]": "system",
    "tests/training/test_from_scratch.py::test_compare_trains": "system",
    "tests/training/test_from_scratch.py::test_what_was_trained_loads": "system",
    "tests/training/test_from_scratch.py::test_a_run_that": "system",
    "tests/training/test_from_scratch.py::test_a_finished_run": "system",
    "tests/training/test_from_scratch.py::test_a_tokenizer_of_a_run": "system",
    "tests/training/test_trainer.py::test_resuming": "system",
    "tests/training/test_trainer.py::test_bfloat16": "system",
    "tests/training/test_trainer.py::test_gradient_checkpointing": "system",
    "tests/native/test_training.py::test_half_precision": "system",
    "tests/native/test_constant_cache.py::test_a_prompt_compiles": "system",
    "tests/native/test_documents.py::test_a_compiled": "system",
    "tests/native/test_segments.py::test_a_compiled": "system",
    "tests/native/test_documents.py::test_where_no_mask": "system",
    "tests/conversion/test_quantised.py": "system",
    # Continuous batching has a thread, and seconds, of its own; one metric and all refusals are in model.
    "tests/conversion/test_paged_batches.py::test_every": "system",
    "tests/conversion/test_paged_batches.py::test_every_metric[l2": "model",
    "tests/conversion/test_paged_batches.py::test_persistent": "system",
    "tests/conversion/test_paged_batches.py::test_an_untouched": "system",
    "tests/conversion/test_nystrom_t5_bias.py::test_nothing_quadratic_is_made": "system",
    "tests/analysis/test_lambda_search.py::test_the_grid": "system",
    "tests/analysis/test_report.py::test_figures_draw": "system",
    "tests/analysis/test_report.py::test_the_page": "system",
    "tests/analysis/test_report.py::test_files_are_complete": "system",
    "tests/analysis/test_report.py::test_other_families": "system",
    "tests/analysis/test_report.py::test_the_command_line": "system",
    "tests/test_benchmark.py::test_memory": "system",
    "tests/test_benchmark.py::test_a_measuring_process": "system",
    "tests/test_benchmark.py::test_plots": "system",
    "tests/test_benchmark_nystrom.py::test_memory": "system",
    # Every pairing of what an offloaded model may be; each kind once is in model.
    "tests/conversion/test_absolute_models.py::test_offloaded_layers_change_nothing": "system",
    "tests/conversion/test_offload.py::test_native": "system",
    "tests/conversion/test_offload.py::test_offloaded_layers_generate": "system",
    # Fits of trained models; untrained ones are fitted in model. Of gpt-oss and Gemma 2, which take seconds each, what
    # other families show, too.
    "tests/conversion/test_sinks_and_caps.py::test_a_fit_of_a_trained_model": "system",
    "tests/conversion/test_sinks_and_caps.py::test_a_fit_helps": "system",
    "tests/conversion/test_sinks_and_caps.py::test_saved_and_loaded": "system",
    "tests/conversion/test_sinks_and_caps.py::test_folding": "system",
    "tests/conversion/test_sinks_and_caps.py::test_revert": "system",
    "tests/conversion/test_sinks_and_caps.py::test_steps_with_a_cache_are_one_forward_pass[l1": "system",
    "tests/conversion/test_sinks_and_caps.py::test_eager_is_the_same_attention_and_returns_the_weights[l1": "system",
    "tests/analysis/test_statistics.py::test_a_long_text_needs_no_more_than_one_head_map[nystrom": "system",
    "tests/analysis/test_statistics.py::test_a_long_text_needs_no_more_than_one_head_map[dot": "system",
    "tests/conversion/test_softening.py::test_saved_and_loaded": "system",
    "tests/conversion/test_wrapped_teachers.py::test_the_way_that_works": "system",
    "tests/training/test_trainer.py::test_parts_of_a_step": "system",
    "tests/training/test_schedules.py::test_where_lambda_follows": "system",
    "tests/training/test_adapt.py::test_stages_one_after_another": "system",
    # Gradients by finite differences beside one of each kind in unit, and PyTorch's checks of an operator.
    "tests/core/test_retrieval.py::test_gradients_equal_finite_differences": "system",
    "tests/core/test_retrieval.py::test_gradients_equal_finite_differences[cross]": "unit",
    "tests/core/test_retrieval.py::test_gradients_through_the_far_field": "system",
    "tests/core/test_retrieval.py::test_gradients_through_the_far_field[causal-dot]": "unit",
    "tests/core/test_cpp.py::test_operators_keep_their_promises": "system",
    "tests/core/test_softening.py::test_gradcheck": "system",
    # Large shapes; smaller ones of the same tests are in unit.
    "tests/core/test_hybrid.py::test_gradients_equal_finite_differences[False": "system",
    "tests/core/test_hybrid.py::test_gradients_equal_finite_differences[True-3": "system",
    "tests/core/test_cpp.py::test_many_tiles[1000": "system",
    "tests/core/test_sdpa_on_gpu.py::test_half_precision_error_is_within_twice_pytorchs": "system",
    # Compilers: PyTorch's, Triton's (and its interpreter), C++.
    "tests/conversion/test_nystrom_compile.py": "system",
    "tests/conversion/test_retrieval_models.py::test_compiled": "system",
    "tests/core/test_cosine_memory.py::test_one_graph": "system",
    "tests/core/test_softening.py::test_one_graph": "system",
    "tests/core/test_absolute_logits.py::test_a_cap_in_one_graph": "system",
    "tests/conversion/test_absolute_models.py::test_compiled": "system",
    "tests/core/test_cpp.py::test_one_graph": "system",
    "tests/core/test_cpp.py::test_two_processes_build_at_the_same_time": "system",
    "tests/core/test_cpp.py::test_without_a_compiler": "system",
    "tests/core/test_cpp.py::test_without_a_cache": "system",
    "tests/core/test_cpp.py::test_a_build_is_used_again": "system",
    "tests/core/test_cpp.py::test_with_a_compiler_that_fails": "system",
    "tests/core/test_triton.py::TestCompiler": "system",
    "tests/core/test_triton.py::test_kernels_in_the_interpreter": "system",
}


# Tests of as many cases are tables of metrics, backends and shapes: where they would run each time, every third case
# does, and each that is the first with some word in its name (a metric, a backend); the others are in system.
MANY, SHARE = 16, 3
# Tables that are quick, and that a change of any file concerns.
WHOLE = ("tests/core/test_layering.py", "tests/test_cli_flags.py", "tests/test_moved.py", "tests/test_tiers.py")


# What shares a fixture that takes seconds (processes, a server, a build): the tests whose names begin with one entry
# run in one worker, which makes it once.
TOGETHER = (
    "tests/analysis/test_report.py",
    "tests/hub/test_measured.py",
    "tests/hub/test_push.py",
    "tests/quality/test_quality.py::test_iglm",
    "tests/quality/test_quality.py::test_minilm",
    "tests/quality/test_quality.py::test_smollm2",
    "tests/test_fresh_process.py",
    "tests/test_release.py",
    "tests/test_sequence_parallel.py",
    "tests/training/test_distributed.py",
    "tests/training/test_long_sequences.py",
    "tests/training/test_resume.py::test_killed",
    "tests/training/test_sharded.py",
    "tests/training/test_tensor_parallel.py",
)


def together(name: str) -> str:
    """Return the entry of `TOGETHER` that a test's name begins with, or the name itself."""
    return next((entry for entry in TOGETHER if name.startswith(entry)), name)


def scheduler(config, log):
    """Return the scheduler that hands tests out by `TOGETHER`, the largest groups first.

    pytest-xdist's own mark for this, xdist_group, does nothing under pytest 9.2, which keeps the names of tests in
    another place: each worker made every fixture.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    return Together(config, log)


def beyond_the_sample(names: list[str]) -> set[str]:
    """Return those of the collected tests' names that are in system because their table has too many cases."""
    tables: dict[str, list[str]] = {}
    for name in names:
        if not name.startswith(WHOLE) and tier_of(name) in ("unit", "model"):
            tables.setdefault(name.partition("[")[0], []).append(name)
    beyond = set()
    for cases in tables.values():
        seen: set[str] = set()
        for number, name in enumerate(cases if len(cases) >= MANY else ()):
            words = set(re.findall(r"[^\W\d_]+", name.partition("[")[2]))
            if number % SHARE and words <= seen:
                beyond.add(name)
            else:
                seen |= words
    return beyond


def tier_of(name: str) -> str:
    """Return the tier of a test's name ("tests/core/test_masks.py::test_no_mask")."""
    return TABLE[max((entry for entry in TABLE if name.startswith(entry)), key=len)]


def left_out(tests) -> dict[str, int]:
    """Count tests, (name, tier) each, by tier and file, as "tier: file"."""
    return dict(Counter(f"{tier}: {name.partition('::')[0]}" for name, tier in tests))


def lines(counts: dict[str, int]) -> list[str]:
    """Say what was left out, a line a tier with its files, each with its number of tests."""
    told = []
    for tier, meaning in TIERS.items():
        files = {key.removeprefix(f"{tier}: "): n for key, n in sorted(counts.items()) if key.startswith(f"{tier}: ")}
        if files:
            each = ", ".join(f"{file.removeprefix('tests/')} {n}" for file, n in files.items())
            told.append(f"left out of {tier} ({meaning}): {sum(files.values())} tests: {each}")
    return told
