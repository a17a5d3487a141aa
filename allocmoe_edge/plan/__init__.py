"""What a budget is spent on: the plan of a model, how it is made from a profile, and how it travels in a GGUF file."""

from .plan import (
    TOKEN_RULES,
    VALUES,
    Plan,
    PlanError,
    integer_tuple,
    looks_like_percent,
    parse_budget,
    share_text,
    shown,
)
from .planner import allocate

__all__ = [
    "TOKEN_RULES",
    "VALUES",
    "Plan",
    "PlanError",
    "allocate",
    "integer_tuple",
    "looks_like_percent",
    "parse_budget",
    "share_text",
    "shown",
]
