"""The commands that have a module of their own, each with the class of its configuration; `bench` has several."""

import importlib

_NAMES = {
    "train": "RunConfig",
    "pretrain": "PretrainConfig",
    "steer": "SteerConfig",
    "finetune": "FinetuneConfig",
    "collect": "CollectConfig",
    "evaluate": "EvaluateConfig",
    "diff": "DiffConfig",
    "explore": "ExploreConfig",
    "export": "ExportConfig",
    "publish": "PublishConfig",
    "provenance": "ProvenanceConfig",
    "stability": "StabilityConfig",
    "trace": "TraceConfig",
    "lens": "LensConfig",
}
CONFIGS: dict[str, type] = {
    command: getattr(importlib.import_module(f"experiments.{command}"), name) for command, name in _NAMES.items()
}
