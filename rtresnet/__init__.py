"""Residual networks from images to measured TensorRT engines.

    import rtresnet as rt

    run = rt.train(rt.TrainConfig(model="resnet20", data="digits"))
    onnx = rt.export(run.checkpoint, "engines/resnet20.onnx")
    int8 = rt.quantize(onnx.path, rt.QuantizeConfig(precision="int8", calib="digits"))
    plan = rt.build(int8.path, rt.BuildConfig(targets=("sm_89",)))
    with rt.load(int8.path) as session:
        logits = session(session.prepare(images))

Every step is a function that takes a frozen config and returns a frozen result. Nothing is imported
before it is requested: `load` needs NumPy and one inference library only. Functions print nothing;
progress and notes go to `logging.getLogger("rtresnet")`, or to a `Reporter` that you pass.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtresnet.core.artifacts import read_sidecar
    from rtresnet.core.errors import (
        ArtifactError,
        CheckFailedError,
        DataError,
        InputError,
        QueueFullError,
        RtresnetError,
        UnavailableError,
        UnknownNameError,
    )
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.core.reporter import Reporter
    from rtresnet.core.sidecar import Sidecar
    from rtresnet.reporting.report import ReportResult, report
    from rtresnet.runtime.batcher import Batcher
    from rtresnet.runtime.cuda import pinned
    from rtresnet.runtime.session import Session
    from rtresnet.serving.config import ServeConfig
    from rtresnet.workflows.adopt import AdoptResult, adopt
    from rtresnet.workflows.advisor import AdviceResult, advise
    from rtresnet.workflows.benchmark import BenchmarkConfig, BenchmarkResult, benchmark
    from rtresnet.workflows.benchmark_search import (
        BenchmarkSearchResult,
        SearchConfig,
        search_benchmark,
    )
    from rtresnet.workflows.build import BuildConfig, BuildResult, build, build_per_target
    from rtresnet.workflows.check import CheckConfig, CheckResult, check
    from rtresnet.workflows.compare import CompareConfig, CompareResult, compare
    from rtresnet.workflows.data import (
        AugmentedBatch,
        DataInspectConfig,
        DataInspectResult,
        augmented_batch,
        inspect_data,
    )
    from rtresnet.workflows.detect_check import CheckDetectorResult, check_detector
    from rtresnet.workflows.detect_compare import CompareDetectorsResult, compare_detectors
    from rtresnet.workflows.detect_evaluate import EvaluateDetectorResult, evaluate_detector
    from rtresnet.workflows.detect_predict import DetectResult, detect
    from rtresnet.workflows.detect_train import (
        TrainDetectorConfig,
        TrainDetectorResult,
        train_detector,
    )
    from rtresnet.workflows.doctor import DoctorResult, doctor
    from rtresnet.workflows.embedded import EmbedConfig
    from rtresnet.workflows.estimate import EstimateConfig, EstimateResult, estimate
    from rtresnet.workflows.evaluate import (
        EvaluateConfig,
        EvaluateResult,
        evaluate,
        record_accuracy,
    )
    from rtresnet.workflows.explain import ExplainResult, explain
    from rtresnet.workflows.export import ExportConfig, ExportResult, export
    from rtresnet.workflows.input_spec import InputConfig
    from rtresnet.workflows.inspect import FolderResult, InspectResult, inspect, inspect_folder
    from rtresnet.workflows.lint import LintResult, lint
    from rtresnet.workflows.loading import RuntimeConfig, load
    from rtresnet.workflows.models import ModelsResult, list_models
    from rtresnet.workflows.pack import PackConfig, PackResult, pack
    from rtresnet.workflows.package import PackageConfig, PackageResult, package
    from rtresnet.workflows.package_server import ImageConfig, ServerPackageResult, package_server
    from rtresnet.workflows.predict import (
        PredictResult,
        PredictTableResult,
        TableConfig,
        predict,
        predict_table,
    )
    from rtresnet.workflows.predictor import PredictConfig, Predictor
    from rtresnet.workflows.profile import ProfileConfig, ProfileResult, profile
    from rtresnet.workflows.quantize import QuantizeConfig, QuantizeResult, quantize
    from rtresnet.workflows.quickstart import QuickstartConfig, QuickstartResult, quickstart
    from rtresnet.workflows.serve import serve
    from rtresnet.workflows.study import (
        ResponsesResult,
        StudyConfig,
        StudyResult,
        study_blocks,
        study_degradation,
        study_responses,
        study_shortcuts,
    )
    from rtresnet.workflows.study_analysis import (
        CostResult,
        GradientsConfig,
        GradientsResult,
        LesionsResult,
        study_cost,
        study_gradients,
        study_lesions,
    )
    from rtresnet.workflows.study_detection import (
        DetectionStudyConfig,
        DetectionStudyResult,
        study_detection,
    )
    from rtresnet.workflows.train import TrainResult, train
    from rtresnet.workflows.train_job import TrainConfig
    from rtresnet.workflows.weights import WeightsResult, export_weights, import_weights

__version__ = "0.1.0"

_MODULES = {
    "core.errors": (
        "ArtifactError CheckFailedError DataError InputError QueueFullError "
        "RtresnetError UnavailableError UnknownNameError"
    ),
    "core.preprocess": "Preprocess",
    "core.reporter": "Reporter",
    "core.sidecar": "Sidecar",
    "core.artifacts": "read_sidecar",
    "runtime.batcher": "Batcher",
    "runtime.cuda": "pinned",
    "runtime.session": "Session",
    "serving.config": "ServeConfig",
    "workflows.loading": "load RuntimeConfig",
    "workflows.input_spec": "InputConfig",
    "workflows.train": "train TrainResult",
    "workflows.train_job": "TrainConfig",
    "workflows.detect_train": "train_detector TrainDetectorConfig TrainDetectorResult",
    "workflows.detect_evaluate": "evaluate_detector EvaluateDetectorResult",
    "workflows.detect_predict": "detect DetectResult",
    "workflows.detect_compare": "compare_detectors CompareDetectorsResult",
    "workflows.detect_check": "check_detector CheckDetectorResult",
    "workflows.pack": "pack PackConfig PackResult",
    "workflows.data": (
        "inspect_data augmented_batch DataInspectConfig DataInspectResult AugmentedBatch"
    ),
    "workflows.weights": "export_weights import_weights WeightsResult",
    "workflows.explain": "explain ExplainResult",
    "workflows.export": "export ExportConfig ExportResult",
    "workflows.adopt": "adopt AdoptResult",
    "workflows.quantize": "quantize QuantizeConfig QuantizeResult",
    "workflows.lint": "lint LintResult",
    "workflows.embedded": "EmbedConfig",
    "workflows.build": "build build_per_target BuildConfig BuildResult",
    "workflows.evaluate": "evaluate record_accuracy EvaluateConfig EvaluateResult",
    "workflows.compare": "compare CompareConfig CompareResult",
    "workflows.check": "check CheckConfig CheckResult",
    "workflows.predict": "predict predict_table PredictResult PredictTableResult TableConfig",
    "workflows.predictor": "Predictor PredictConfig",
    "workflows.benchmark": "benchmark BenchmarkConfig BenchmarkResult",
    "workflows.benchmark_search": "search_benchmark SearchConfig BenchmarkSearchResult",
    "workflows.profile": "profile ProfileConfig ProfileResult",
    "workflows.advisor": "advise AdviceResult",
    "workflows.estimate": "estimate EstimateConfig EstimateResult",
    "workflows.package": "package PackageConfig PackageResult",
    "workflows.package_server": "package_server ImageConfig ServerPackageResult",
    "workflows.serve": "serve",
    "workflows.inspect": "inspect inspect_folder InspectResult FolderResult",
    "workflows.study": (
        "study_blocks study_degradation study_shortcuts study_responses StudyConfig StudyResult "
        "ResponsesResult"
    ),
    "workflows.study_analysis": (
        "study_cost study_gradients study_lesions GradientsConfig CostResult GradientsResult "
        "LesionsResult"
    ),
    "workflows.study_detection": "study_detection DetectionStudyConfig DetectionStudyResult",
    "workflows.models": "list_models ModelsResult",
    "workflows.doctor": "doctor DoctorResult",
    "workflows.quickstart": "quickstart QuickstartConfig QuickstartResult",
    "reporting.report": "report ReportResult",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AdoptResult",
    "AdviceResult",
    "ArtifactError",
    "AugmentedBatch",
    "Batcher",
    "BenchmarkConfig",
    "BenchmarkResult",
    "BenchmarkSearchResult",
    "BuildConfig",
    "BuildResult",
    "CheckConfig",
    "CheckDetectorResult",
    "CheckFailedError",
    "CheckResult",
    "CompareConfig",
    "CompareDetectorsResult",
    "CompareResult",
    "CostResult",
    "DataError",
    "DataInspectConfig",
    "DataInspectResult",
    "DetectResult",
    "DetectionStudyConfig",
    "DetectionStudyResult",
    "DoctorResult",
    "EmbedConfig",
    "EstimateConfig",
    "EstimateResult",
    "EvaluateConfig",
    "EvaluateDetectorResult",
    "EvaluateResult",
    "ExplainResult",
    "ExportConfig",
    "ExportResult",
    "FolderResult",
    "GradientsConfig",
    "GradientsResult",
    "ImageConfig",
    "InputConfig",
    "InputError",
    "InspectResult",
    "LesionsResult",
    "LintResult",
    "ModelsResult",
    "PackConfig",
    "PackResult",
    "PackageConfig",
    "PackageResult",
    "PredictConfig",
    "PredictResult",
    "PredictTableResult",
    "Predictor",
    "Preprocess",
    "ProfileConfig",
    "ProfileResult",
    "QuantizeConfig",
    "QuantizeResult",
    "QueueFullError",
    "QuickstartConfig",
    "QuickstartResult",
    "ReportResult",
    "Reporter",
    "ResponsesResult",
    "RtresnetError",
    "RuntimeConfig",
    "SearchConfig",
    "ServeConfig",
    "ServerPackageResult",
    "Session",
    "Sidecar",
    "StudyConfig",
    "StudyResult",
    "TableConfig",
    "TrainConfig",
    "TrainDetectorConfig",
    "TrainDetectorResult",
    "TrainResult",
    "UnavailableError",
    "UnknownNameError",
    "WeightsResult",
    "__version__",
    "adopt",
    "advise",
    "augmented_batch",
    "benchmark",
    "build",
    "build_per_target",
    "check",
    "check_detector",
    "compare",
    "compare_detectors",
    "detect",
    "doctor",
    "estimate",
    "evaluate",
    "evaluate_detector",
    "explain",
    "export",
    "export_weights",
    "import_weights",
    "inspect",
    "inspect_data",
    "inspect_folder",
    "lint",
    "list_models",
    "load",
    "pack",
    "package",
    "package_server",
    "pinned",
    "predict",
    "predict_table",
    "profile",
    "quantize",
    "quickstart",
    "read_sidecar",
    "record_accuracy",
    "report",
    "search_benchmark",
    "serve",
    "study_blocks",
    "study_cost",
    "study_degradation",
    "study_detection",
    "study_gradients",
    "study_lesions",
    "study_responses",
    "study_shortcuts",
    "train",
    "train_detector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rtresnet' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rtresnet.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
