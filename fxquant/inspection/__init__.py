"""What is in a checkpoint, and what is wrong with it: everything that can be told without building the model."""

from fxquant.inspection.checks import inspect
from fxquant.inspection.data import HeldWeight, Inspection, Problem, StoredFile, StoredKind

__all__ = ["HeldWeight", "Inspection", "Problem", "StoredFile", "StoredKind", "inspect"]
