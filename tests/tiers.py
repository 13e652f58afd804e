"""The tiers of the suite: which tests are slow.

`pytest -m "not slow"` is the quick tier. Slow is what takes seconds: commands and other processes, training, real
browsers (`browser`) and databases (`database`), and lists of hundreds of cases. A test that starts a process must be
here; `conftest.py` refuses it otherwise.
"""

from typing import Any, NoReturn

import pytest

# Modules of which every test is slow. Those that take longest are first: they begin first where several workers run.
MODULES = (
    "test_train_command",
    "test_sweep_command",
    "test_contract",
    "test_signals",
    "test_speed_benches",
    "test_text_command",
    "test_option_pairs",
    "test_hostile",
    "test_hostile_text",
    "test_evaluate_command",
    "test_explore_command",
    "test_atomic",
    "test_checkpoint",
    "test_explorer_page",
    "test_explorer_live",
    "test_explorer_files",
    "test_explorer_server",
    "test_explorer_connections",
    "test_export",
    "test_export_command",
    "test_foreign",
    "test_health",
    "test_hooks_compiled",
    "test_house",
    "test_importer",
    "test_locks",
    "test_model_hub",
    "test_open_files",
    "test_ops_products",
    "test_ops_steps",
    "test_optim",
    "test_own_architecture",
    "test_pretrain",
    "test_publish",
    "test_quality_bench",
    "test_steer_command",
    "test_stream",
    "test_train",
    "test_wrong_flags",
)
# Slow tests of other modules.
TESTS: dict[str, tuple[str, ...]] = {}
# Fixtures that make a test slow, and the mark that says why.
FIXTURES = {"browser": "browser", "cluster": "database"}


def mark(items: list[pytest.Item]) -> None:
    """Mark every test that is in a table above, or uses a fixture of one."""
    for item in items:
        module, name = module_of(item), getattr(item, "originalname", item.name)
        reasons = [reason for fixture, reason in FIXTURES.items() if fixture in getattr(item, "fixturenames", ())]
        for reason in reasons:
            item.add_marker(reason)
        if reasons or module in MODULES or name in TESTS.get(module, ()):
            item.add_marker("slow")


def module_of(item: pytest.Item) -> str:
    """Return the name of the module that a test is in."""
    return item.path.stem


def place(item: pytest.Item) -> int:
    """Return where a test's module stands in the order of the suite; all but the long ones keep the order they have."""
    module = module_of(item)
    return MODULES.index(module) if module in MODULES else len(MODULES)


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for starting a process, in a test of the quick tier."""
    pytest.fail("this test starts a process: name it in tests/tiers.py, or start none", pytrace=False)
