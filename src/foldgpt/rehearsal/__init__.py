"""A recipe rehearsed before it is paid for: the whole run on a tiny model, and what the real one will take."""

from foldgpt.rehearsal.expectation import Expectation, Memory, expect
from foldgpt.rehearsal.rehearse import Rehearsal, rehearse
from foldgpt.rehearsal.tables import expectation_lines, expectation_table

__all__ = ["Expectation", "Memory", "Rehearsal", "expect", "expectation_lines", "expectation_table", "rehearse"]
