"""The contract that every architecture keeps, for test files: `TestMine = jsae.testing.contract(MySAE)`."""

from jsae.testing.contract import Contract, contract

__all__ = ["Contract", "contract"]
