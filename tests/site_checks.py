"""Checks of the built site, which `nox -s docs` runs: its search, its links, what it fetches.

The environment of that session has no torch: the sources are read, not imported.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import griffe
import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
FETCHED = re.compile(
    r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=\"?(?:https?:)?//[^\s\">]+"
)

DOCUMENTED = {
    "danon": "create_msra_model create_dala_model create_ucsa_model create_super_hybrid_model "
    "BaseAttention BaseAttention.setup_attention BaseAttention.compute_attention",
    "danon.config": "AttentionConfig MSRAConfig DALAConfig UCSAConfig SuperHybridConfig "
    "MSRAConfig.from_dict MSRAConfig.hidden_size MSRAConfig.num_levels MSRAConfig.num_layers "
    "MSRAConfig.compression_factor MSRAConfig.calibration_factor MSRAConfig.bidirectional_flow "
    "MSRAConfig.feature_fusion MSRAConfig.stability_factor MSRAConfig.gradient_checkpointing "
    "MSRAConfig.memory_efficient DALAConfig.num_heads DALAConfig.max_sequence_length "
    "DALAConfig.use_adaptive_router DALAConfig.router_temperature "
    "DALAConfig.importance_threshold DALAConfig.state_update_frequency DALAConfig.memory_size "
    "DALAConfig.attention_dropout UCSAConfig.sparsity_factor UCSAConfig.compression_ratio "
    "UCSAConfig.enable_cache UCSAConfig.max_cache_size UCSAConfig.local_window_size "
    "UCSAConfig.global_tokens UCSAConfig.error_tolerance UCSAConfig.cache_strategy "
    "SuperHybridConfig.sparsity_factor SuperHybridConfig.compression_ratio "
    "SuperHybridConfig.enable_all_optimizations SuperHybridConfig.advanced_features",
    "danon.models": "Backbone.enable_gradient_checkpointing Backbone.performance_monitor "
    "Backbone.get_performance_stats",
    "danon.models.performance_monitor": "PerformanceStats.computation_time "
    "PerformanceStats.memory_usage PerformanceStats.attention_distribution",
    "danon.training": "BaseTrainer Trainer TrainingConfig DataLoader DataLoader.set_prefetch "
    "BaseTrainer.setup_training "
    "BaseTrainer.train_step BaseTrainer.compute_loss BaseTrainer.backward_step "
    "TrainingConfig.from_dict TrainingConfig.gradient_accumulation_steps "
    "TrainingConfig.mixed_precision TrainingConfig.gradient_clipping TrainingConfig.warmup_steps",
    "danon.optimization": "DynamicBatchProcessor MixedPrecisionTrainer MixedPrecisionTrainer.train "
    "BaseOptimizer BaseOptimizer.setup_optimizer BaseOptimizer.update_param",
    "danon.distributed": "DistributedTrainer DistributedTrainer.fit "
    "DistributedTrainer.set_gradient_accumulation_steps "
    "DistributedTrainer.enable_advanced_training DistributedTrainer.enable_progressive_training "
    "DistributedTrainer.enable_dynamic_batching AdvancedDistributedTrainer "
    "AdvancedDistributedTrainer.set_advanced_options DynamicSharding DynamicSharding.apply",
    "danon.quantization": "quantize_dynamic",
    "danon.utils": "enable_mixed_precision",
}
"""Names of the project's description that exist: module, then names with their class."""
MISSING = {
    "danon": "SystemConfig",
    "danon.config": "SystemConfig",
    "danon.models": "Backbone.optimize_attention",
    "danon.optimization": "MemoryOptimizer MemoryOptimizer.apply_optimizations ComputeOptimizer "
    "AutoOptimizer AutoOptimizer.auto_optimize jit_compile "
    "DynamicBatchInferencer InferenceOptimizer",
    "danon.monitoring": "PerformanceMonitor",
    "danon.debugging": "PerformanceProfiler PerformanceProfiler.get_statistics MemoryAnalyzer "
    "MemoryAnalyzer.get_report MemoryAnalyzer.get_memory_peaks MemoryAnalyzer.analyze_memory "
    "GradientChecker GradientChecker.check_gradients",
    "danon.visualization": "TrainingVisualizer TrainingVisualizer.plot_metrics "
    "TrainingVisualizer.plot_resources AttentionVisualizer "
    "AttentionVisualizer.plot_attention_weights AttentionVisualizer.generate_attention_flow "
    "MetricsPlotter",
    "danon.experiment": "ExperimentManager ExperimentManager.create_experiment "
    "ExperimentManager.log_metrics ModelVersioning ModelVersioning.save_version "
    "ModelVersioning.load_version",
    "danon.deployment": "ModelExporter ModelServer",
    "danon.utils": "analyze_performance optimize_memory debug_gradients "
    "debug_memory visualize_attention plot_training_metrics",
}
"""Names of the description that do not exist yet; one that is written moves to the names above."""
PARTS = (
    "DynamicCompression AdaptivePooling FeatureSelection CompressionRate RecursiveAttention "
    "StateTracking MemoryOptimization GradientControl StabilityEnhancer Normalization "
    "ResidualConnections GradientClipping MultiScaleFeatureFusion FeatureAlignment "
    "CrossScaleAttention AdaptiveWeighting ImportanceNetwork FeatureExtraction ScoreCalculation "
    "ThresholdLearning DynamicRouter PathSelection LoadBalancing RoutingOptimization "
    "RecursiveStateUpdate StateManagement MemoryControl UpdateStrategy InfiniteAttention "
    "StreamProcessing WindowManagement AttentionComputation LocalAttention WindowProcessing "
    "LocalityOptimization HierarchicalCompression LayerCompression CompressionControl "
    "GlobalSparsityControl SparsityEstimation ThresholdAdjustment PatternRecognition "
    "ThreadSafeCache CacheStrategy ThreadManagement"
)
"""The description's parts of the mechanisms: words for what classes of other names do."""
COMMANDS = ("bench", "choose", "doctor", "gate", "plan", "report", "train", "tune")
MISSING_COMMANDS = ("serve",)
DICTIONARIES = ("attention_config", "training_config")
MISSING_DICTIONARIES = ("system_config",)


def paths(names: dict[str, str]) -> list[str]:
    return [f"{module}.{name}" for module, listed in names.items() for name in listed.split()]


def last(path: str) -> str:
    return path.rpartition(".")[2]


@cache
def package() -> griffe.Module:
    found = griffe.load("danon", search_paths=[str(ROOT)])
    assert isinstance(found, griffe.Module)
    return found


def exists(path: str) -> bool:
    """Return True if the sources of danon define the path, inherited members included."""
    item: griffe.Object | griffe.Alias = package()
    for part in path.split(".")[1:]:
        members = item.members if item.is_module else item.all_members
        if part not in members:
            return False
        item = members[part]
    return True


class Search:
    """The index of the built site, with the words that its search splits texts into."""

    def __init__(self, index: dict[str, object]) -> None:
        self.separator = re.compile(index["config"]["separator"])  # type: ignore[index]
        self.pages: dict[str, set[str]] = {}
        for section in index["docs"]:  # type: ignore[attr-defined]
            text = html.unescape(re.sub(r"<[^>]+>", "", f"{section['title']} {section['text']}"))
            page = section["location"].partition("#")[0]
            self.pages.setdefault(page, set()).update(self.words(text))

    def words(self, text: str) -> set[str]:
        return {word.lower() for word in self.separator.split(text) if word}

    def found(self, query: str) -> set[str]:
        """Return the pages that have every word of a query."""
        words = self.words(query)
        return {page for page, known in self.pages.items() if words and words <= known}


def reference_pages(search: Search, path: str) -> set[str]:
    """Return the pages of the API that have a name; the list of names itself does not count."""
    pages = search.found(last(path)) - {"reference/specification.html"}
    return {page for page in pages if page.startswith("reference/")}


@pytest.fixture(scope="module")
def search() -> Search:
    return Search(json.loads((SITE / "search/search_index.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", paths(DOCUMENTED))
def test_name_of_the_description_is_found(search: Search, path: str) -> None:
    assert exists(path), f"{path} is gone"
    assert reference_pages(search, path), f"{path} is only in {search.found(last(path))}"


@pytest.mark.parametrize("path", paths(MISSING))
def test_missing_name_is_missing(search: Search, path: str) -> None:
    assert not exists(path), f"{path} exists now: list it among the documented names"
    found = reference_pages(search, path)
    assert not found, f"the reference documents {path}, which does not exist: {found}"


@pytest.mark.parametrize("name", [*PARTS.split(), *DICTIONARIES, *(f"danon {x}" for x in COMMANDS)])
def test_word_of_the_description_is_found(search: Search, name: str) -> None:
    assert search.found(name)


def test_missing_commands_and_dictionaries_are_missing(search: Search) -> None:
    assert {f.stem for f in (ROOT / "danon/cli").glob("*.py")} >= set(COMMANDS)
    assert not {f.stem for f in (ROOT / "danon/cli").glob("*.py")} & set(MISSING_COMMANDS)
    assert not [name for name in MISSING_DICTIONARIES if search.found(name)]


def test_a_name_that_no_page_has_is_not_found(search: Search) -> None:
    assert search.found("create_msra_model") and not search.found("create_nothing_model")
    assert exists("danon.config.MSRAConfig.hidden_size") and not exists("danon.config.MSRA.hidden")


def test_parts_of_a_qualified_name_are_found(search: Search) -> None:
    for query in ("danon.config.MSRAConfig", "model.performance_monitor()", "MSRAConfig("):
        assert search.found(query), query


def test_no_page_fetches_anything_from_elsewhere() -> None:
    pages = sorted(SITE.rglob("*.html"))
    fetched = {page.name: FETCHED.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert len(pages) > 25 and {name: urls for name, urls in fetched.items() if urls} == {}


def test_something_that_is_fetched_is_noticed() -> None:
    assert FETCHED.findall('<link rel=stylesheet href="https://fonts.example/css?family=Roboto">')
    assert FETCHED.findall("<script src=//cdn.example/a.js></script>")
    assert not FETCHED.findall('<a href="https://docs.ray.io">Ray</a> <img src="../a.png">')


MARKDOWN = """[a](docs/gate.md#outcomes) [b](CONTRIBUTING.md) [c](https://docs.ray.io) [d](#here)
![e](results/gate_validation/power.png) [f](docs/none.md) [g](docs/how-to/ci.md)

```text
[h](docs/gate.md)
```
"""


def test_links_of_the_home_page_lead_into_the_site(site_pages: ModuleType) -> None:
    text, linked = site_pages.site_links(MARKDOWN, "index.md")
    assert text.splitlines() == [
        "[a](gate.md#outcomes) [b](contributing.md) [c](https://docs.ray.io) [d](#here)",
        "![e](results/gate_validation/power.png) [f](docs/none.md) [g](how-to/ci.md)",
        "",
        "```text",
        "[h](docs/gate.md)",
        "```",
    ]
    assert linked == ["results/gate_validation/power.png"]


def test_links_of_a_page_in_a_folder_lead_into_the_site(site_pages: ModuleType) -> None:
    text, linked = site_pages.site_links(
        "[a](../gate.md) [b](../../README.md#commands) [c](../../examples/ci/github-actions.yml)",
        "how-to/ci.md",
    )
    assert text == (
        "[a](../gate.md) [b](../index.md#commands) [c](../examples/ci/github-actions.yml)"
    )
    assert linked == ["examples/ci/github-actions.yml"]


def test_every_page_of_the_repository_is_in_the_site() -> None:
    built = {page.relative_to(SITE).with_suffix("").as_posix() for page in SITE.rglob("*.html")}
    docs = ROOT / "docs"
    written = {page.relative_to(docs).with_suffix("").as_posix() for page in docs.rglob("*.md")}
    assert built - {"404"} == written | {"index", "contributing", "changelog"}


def test_cross_references_of_docstrings_are_links() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (SITE / "reference").glob("*.html")]
    assert not [x for page in pages for x in re.findall(r":(?:class|meth|func|attr):|::</p>", page)]
    assert any('href="config.html#danon.config.MSRAConfig.level_width"' in page for page in pages)
