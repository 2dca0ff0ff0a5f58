"""Names and types of arguments, known without importing what takes seconds, and job files that are held against them.

`declared` reads a dataclass's fields from its source; `expected` says what a field takes; `yaml_file` and `convert` turn a job
file into values of those types; `job_file` checks the whole file; `near` knows other libraries' names. stdlib and PyYAML only.
"""

from hasten.schema.declared import fields_of
from hasten.schema.expected import Expected, parse
from hasten.schema.near import suggestion
from hasten.schema.passed import HUB, PASSED
from hasten.schema.typed import mistyped, text_for_other

__all__ = ["HUB", "PASSED", "Expected", "fields_of", "mistyped", "parse", "suggestion", "text_for_other"]
