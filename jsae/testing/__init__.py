"""The contract tests of an architecture, for test files: `TestMine = jsae.testing.contract(MySAE)`."""

from jsae.testing.contract import Contract, contract

__all__ = ["Contract", "contract"]
