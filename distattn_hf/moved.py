"""Where modules went that had other names: their import says the new one."""

from importlib.abc import MetaPathFinder

# Old name -> new one, within the package.
MOVED = {
    "analysis.evaluate_metrics": "evaluation.task_metrics",
    "analysis.evaluation": "evaluation.score",
    "analysis.figures": "analysis.report.figures",
    "analysis.inputs": "analysis.samples",
    "analysis.lambda_search": "training.lambda_search",
    "analysis.maps": "analysis.weights",
    "analysis.patterns": "analysis.head_patterns",
    "analysis.scorecard": "evaluation.scorecard",
    "analysis.section_heads": "analysis.report.heads",
    "analysis.section_models": "analysis.report.compared",
    "analysis.section_text": "analysis.report.text",
    "analysis.sections": "analysis.report.parts",
    "conversion.checkpoints": "storage.models",
    "conversion.companions": "storage.companions",
    "conversion.embedded": "storage.embedded",
    "conversion.files": "storage.files",
    "conversion.pooling": "storage.pooling",
    "conversion.rows": "conversion.fit",
    "conversion.saving": "storage.folders",
    "conversion.specs": "data.config",
    "conversion.texts": "data.batches",
    "conversion.yaml_file": "data.config",
    "core.cache": "core.nystrom_cache",
    "core.cpp_backward": "core.kernel_cpp_backward",
    "core.cpp_decode": "core.kernel_cpp_forward",
    "core.cpp_far": "functional.nystrom_cpp",
    "core.cpp_forward": "core.kernel_cpp_forward",
    "core.cpp_hybrid": "core.kernel_cpp_hybrid",
    "core.cpp_library": "core.kernel_cpp_library",
    "core.cpp_tiles": "core.kernel_cpp_tiles",
    "core.explain": "core.backends",
    "core.far_cpu": "functional.nystrom_cpp",
    "core.hybrid": "core.nystrom_hybrid",
    "core.hybrid_cpu": "core.kernel_cpp_hybrid",
    "core.landmarks": "functional.landmarks",
    "core.layers": "layers.attention_layers",
    "core.layers_factory": "layers.factory",
    "core.layers_stack": "layers.blocks",
    "core.linear": "core.nystrom_heads",
    "core.loading": "core.families",
    "core.masks": "core.inputs",
    "core.monitor": "analysis.monitor",
    "core.nystrom": "functional.nystrom",
    "core.options": "core.attention_spec",
    "core.sdpa_cosine": "core.backend_sdpa",
    "core.statistics": "functional.row_statistics",
    "core.triton_backward": "core.kernel_triton_backward",
    "core.triton_forward": "core.kernel_triton_forward",
    "core.triton_tile": "core.kernel_triton_tile",
    "core.versions": "core.attention_spec",
    "experiments.adapt": "training.adapt",
    "experiments.benchmark": "benchmark.command",
    "experiments.benchmark_check": "benchmark.exact_check",
    "experiments.benchmark_config": "benchmark.exact_options",
    "experiments.benchmark_load": "benchmark.command",
    "experiments.benchmark_measure": "benchmark.measure",
    "experiments.benchmark_native": "benchmark.run_native",
    "experiments.benchmark_nystrom": "benchmark.run_nystrom",
    "experiments.benchmark_nystrom_config": "benchmark.nystrom_options",
    "experiments.benchmark_nystrom_inputs": "benchmark.nystrom_inputs",
    "experiments.benchmark_nystrom_peers": "benchmark.nystrom_peers",
    "experiments.benchmark_nystrom_report": "benchmark.run_nystrom",
    "experiments.benchmark_options": "benchmark.fields",
    "experiments.benchmark_plot": "benchmark.plot",
    "experiments.benchmark_report": "benchmark.results",
    "experiments.benchmark_run": "benchmark.run",
    "experiments.beyond_quality": "experiments.long_context",
    "experiments.from_scratch": "training.from_scratch",
    "experiments.gpu_check": "benchmark.gpu_check",
    "experiments.gpu_check_cases": "benchmark.gpu_check_cases",
    "experiments.gpu_check_speed": "benchmark.gpu_check_speed",
    "experiments.gpu_check_worker": "benchmark.gpu_check_worker",
    "experiments.retrieval_quality": "experiments.long_context",
    "training.checkpoints": "storage.runs",
    "training.data": "data.datasets",
    "training.learned_tokenizer": "data.tokenizer",
    "training.rows": "data.rows",
    "training.schedules": "training.annealing",
    "training.scratch": "training.arguments_scratch",
    "training.sources": "data.sources",
}


class MovedModules(MetaPathFinder):
    """Raises `ModuleNotFoundError` with the new name for an import of a module that has moved.

    Asked last: what exists is found before.
    """

    def find_spec(self, name, path=None, target=None):
        """Find nothing, and say where a module of before is now."""
        package, _, module = name.partition(".")
        if package == __package__ and module in MOVED:
            raise ModuleNotFoundError(f"{name} is {package}.{MOVED[module]} now", name=name)
        return
