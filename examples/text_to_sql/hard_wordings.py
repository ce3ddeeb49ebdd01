"""How the hard questions are asked, in training and in held-out wordings; both build on the words of `wordings`.

Knows nothing of tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import wordings
from .wordings import Wordings

__all__ = ["HARD_HELD_OUT", "HARD_TRAIN", "MONTH_NAMES", "HardWordings"]

MONTH_NAMES = "January February March April May June July August September October November December".split()

# Slots: {rows} noun of the rows   {c} measured column   {agg} "average", ...   {cat} grouping column   {z} the column
#        that may be missing       {label} what is listed, plural                {where} conditions    {x} a value
#        {size} a condition on the number of rows        {op} a condition on the measured column


@dataclass(frozen=True)
class HardWordings:
    """One side's wordings.

    Attributes:
        easy: words for plain conditions, aggregates and comparisons.
        frames: sentences by form of question.
        parent: how a column ``{c}`` of the other table, whose rows are called ``{p}``, is named.
        parent_equal: conditions ``{c}`` = ``{x}`` on the other table.
        parent_compare: conditions ``{c}`` ``{op}`` on it.
        missing, present: conditions ``{c} is null`` and ``{c} is not null``.
        sizes: words for ``count(*) > x`` and ``count(*) < x``.
        between, month, year: conditions on a date ``{c}``, with ``{a}`` and ``{b}``, or with ``{x}``.
    """

    easy: Wordings
    frames: dict[str, tuple[str, ...]]
    parent: tuple[str, ...]
    parent_equal: tuple[str, ...]
    parent_compare: tuple[str, ...]
    sizes: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]
    present: tuple[str, ...]
    between: tuple[str, ...]
    month: tuple[str, ...]
    year: tuple[str, ...]


_TRAIN_LIST = (
    "List the {label} of the {rows} {where}.",
    "What are the {label} of the {rows} {where}?",
    "Give the {label} of {rows} {where}.",
    "Show me the {label} for all {rows} {where}.",
    "Find the {rows} {where} and name their {label}.",
    "Which {label} belong to {rows} {where}?",
    "I need the {label} of every one of the {rows} {where}.",
    "For {rows} {where}, list the {label}.",
)
_TRAIN_COUNT = (
    "How many {rows} are there {where}?",
    "Count the {rows} {where}.",
    "What is the number of {rows} {where}?",
    "Give the count of {rows} {where}.",
    "Tell me how many {rows} there are {where}.",
    "I need the number of {rows} {where}.",
    "Find out how many {rows} exist {where}.",
    "Of all the {rows}, how many are there {where}?",
)
_TRAIN_AGGREGATE = (
    "What is the {agg} {c} of {rows} {where}?",
    "Give the {agg} {c} for the {rows} {where}.",
    "Find the {agg} {c} among {rows} {where}.",
    "For {rows} {where}, compute the {agg} {c}.",
    "Show the {agg} {c} over all {rows} {where}.",
    "Tell me the {agg} {c} of the {rows} {where}.",
    "I need the {agg} {c} of {rows} {where}.",
    "Considering only {rows} {where}, what is the {agg} {c}?",
)
_TRAIN_GROUP = (
    "What is the {agg} {c} for each {cat}?",
    "Give the {agg} {c} of the {rows} per {cat}.",
    "Show the {agg} {c} of the {rows} by {cat}.",
    "For each {cat}, compute the {agg} {c}.",
    "List every {cat} with the {agg} {c} of its {rows}.",
    "Group the {rows} by {cat} and give the {agg} {c}.",
    "I need the {agg} {c} in each {cat}.",
    "For every {cat}, what is the {agg} {c} of the {rows}?",
)
_HELD_LIST = (
    "Look up {rows} {where} and return their {label}.",
    "Could you write down the {label} for any {rows} {where}?",
    "Out of all {rows}, pick those {where} and report the {label}.",
)
_HELD_COUNT = (
    "Can you say what number of {rows} we have {where}?",
    "Please tally up all {rows} {where}.",
    "In total, how many of the {rows} do we see {where}?",
)
_HELD_AGGREGATE = (
    "Looking only at {rows} {where}, what does the {agg} {c} come to?",
    "Take just the {rows} {where} and report their {agg} {c}.",
    "Could you work out the {agg} {c} across all {rows} {where}?",
)
_HELD_GROUP = (
    "Break the {agg} {c} of the {rows} down by {cat}.",
    "Split the {rows} by {cat} and work out the {agg} {c} of every group.",
    "How does the {agg} {c} of the {rows} differ from one {cat} to the next?",
)

HARD_TRAIN = HardWordings(
    easy=wordings.TRAIN,
    frames={
        "join_list": _TRAIN_LIST,
        "join_count": _TRAIN_COUNT,
        "join_aggregate": _TRAIN_AGGREGATE,
        "join_group": _TRAIN_GROUP,
        "null_list": _TRAIN_LIST,
        "null_count": _TRAIN_COUNT,
        "null_fill": (
            "What is the average {z} of {rows}, counting a missing one as {x}?",
            "Give the average {z} of the {rows}, with {x} where it is missing.",
            "Compute the mean {z} over all {rows}, taking missing values as {x}.",
            "Treat a missing {z} as {x}: what is the average {z} of the {rows}?",
            "If every missing {z} were {x}, what would the average {z} of the {rows} be?",
            "Find the average {z} of the {rows} when missing values are set to {x}.",
            "With {x} for every unknown {z}, what is the mean {z} of the {rows}?",
            "I need the average {z} over all the {rows}; use {x} where there is none.",
        ),
        "null_fill_where": (
            "What is the average {z} of {rows} {where}, counting a missing one as {x}?",
            "Give the average {z} of the {rows} {where}, with {x} where it is missing.",
            "Compute the mean {z} over all {rows} {where}, taking missing values as {x}.",
            "Treat a missing {z} as {x}: what is the average {z} of the {rows} {where}?",
            "If every missing {z} were {x}, what would the average {z} of {rows} {where} be?",
            "For {rows} {where}, find the average {z} when missing values are set to {x}.",
            "With {x} for every unknown {z}, what is the mean {z} of {rows} {where}?",
            "I need the average {z} over the {rows} {where}; use {x} where there is none.",
        ),
        "null_group": (
            "For each {cat}, how many {rows} are there {where}?",
            "Count the {rows} {where} for each {cat}.",
            "Show the number of {rows} {where} per {cat}.",
            "How many {rows} {where} does each {cat} have?",
            "List every {cat} with its number of {rows} {where}.",
            "Give the count of {rows} {where} by {cat}.",
            "Group the {rows} {where} by {cat} and count them.",
            "I need the number of {rows} {where} in each {cat}.",
        ),
        "date_list": _TRAIN_LIST,
        "date_count": _TRAIN_COUNT,
        "date_aggregate": _TRAIN_AGGREGATE,
        "date_group": _TRAIN_GROUP,
        "having_count": (
            "Which {cat} values have {size} {rows}?",
            "List each {cat} with {size} {rows}.",
            "Give the {cat} values that have {size} {rows}.",
            "For which {cat} are there {size} {rows}?",
            "Find every {cat} that occurs in {size} {rows}.",
            "Show the {cat} of each group of {size} {rows}.",
            "Name the {cat} values with {size} {rows}.",
            "I need each {cat} that has {size} {rows}.",
        ),
        "having_value": (
            "Which {cat} values have a {agg} {c} {op}?",
            "List each {cat} whose {agg} {c} is {op}.",
            "Give the {cat} values with a {agg} {c} {op}.",
            "For which {cat} is the {agg} {c} of the {rows} {op}?",
            "Find every {cat} that has a {agg} {c} {op}.",
            "Show each {cat} where the {agg} {c} of its {rows} is {op}.",
            "Name the {cat} values whose {rows} have a {agg} {c} {op}.",
            "I need each {cat} with a {agg} {c} that is {op}.",
        ),
    },
    parent=("{c} of the {p}", "{p} {c}", "{c} of its {p}"),
    parent_equal=(
        "whose {p} has the {c} {x}",
        "where the {c} of the {p} is {x}",
        "with a {p} whose {c} is {x}",
        "whose {p} has {x} as its {c}",
        "with {x} as the {c} of the {p}",
        "whose {p}'s {c} equals {x}",
    ),
    parent_compare=(
        "whose {p} has a {c} {op}",
        "where the {c} of the {p} is {op}",
        "with a {p} whose {c} is {op}",
        "whose {p}'s {c} is {op}",
    ),
    sizes={
        ">": ("more than {x}", "over {x}", "strictly more than {x}", "a number above {x} of"),
        "<": ("fewer than {x}", "under {x}", "strictly fewer than {x}", "a number below {x} of"),
    },
    missing=(
        "without a {c}",
        "with no {c}",
        "whose {c} is missing",
        "where the {c} is missing",
        "whose {c} is unknown",
        "where no {c} is recorded",
    ),
    present=(
        "that have a {c}",
        "whose {c} is known",
        "where the {c} is not missing",
        "where a {c} is recorded",
        "with a known {c}",
    ),
    between=(
        "with a {c} between {a} and {b}",
        "with a {c} from {a} to {b}",
        "whose {c} is between {a} and {b}",
        "where the {c} lies from {a} to {b}",
        "whose {c} is not before {a} and not after {b}",
    ),
    month=(
        "with a {c} in {x}",
        "whose {c} is in {x}",
        "where the {c} falls in {x}",
        "whose {c} is in the month of {x}",
    ),
    year=(
        "with a {c} in {x}",
        "whose {c} is in {x}",
        "where the {c} falls in {x}",
        "whose {c} is in the year {x}",
    ),
)

HARD_HELD_OUT = HardWordings(
    easy=wordings.HELD_OUT,
    frames={
        "join_list": _HELD_LIST,
        "join_count": _HELD_COUNT,
        "join_aggregate": _HELD_AGGREGATE,
        "join_group": _HELD_GROUP,
        "null_list": _HELD_LIST,
        "null_count": _HELD_COUNT,
        "null_fill": (
            "Could you work out the mean {z} across all {rows}, putting {x} in place of each gap?",
            "Report the average {z} of the whole table of {rows}, filling gaps with {x}.",
            "Replace gaps in {z} by {x}, and then average it over the {rows}.",
        ),
        "null_fill_where": (
            "Could you work out the mean {z} across {rows} {where}, putting {x} in place of each gap?",
            "Take just the {rows} {where} and report the average {z}, filling gaps with {x}.",
            "Replace gaps in {z} by {x}, and then average it over {rows} {where}.",
        ),
        "null_group": (
            "Break the number of {rows} {where} down by {cat}.",
            "Tally up the {rows} {where} separately for each {cat}.",
            "Split the {rows} {where} by {cat} and say how many each part holds.",
        ),
        "date_list": _HELD_LIST,
        "date_count": _HELD_COUNT,
        "date_aggregate": _HELD_AGGREGATE,
        "date_group": _HELD_GROUP,
        "having_count": (
            "Report just those {cat} values that come with {size} {rows}.",
            "Could you pick out each {cat} to which {size} {rows} belong?",
            "When the {rows} are split by {cat}, which ones end up with {size} {rows}?",
        ),
        "having_value": (
            "Report just those {cat} values for which the {agg} {c} comes out {op}.",
            "Could you pick out each {cat} with an overall {agg} {c} {op}?",
            "When the {rows} are split by {cat}, which ones end up with a {agg} {c} {op}?",
        ),
    },
    parent=("{c} belonging to the {p}", "{p}'s {c}"),
    parent_equal=(
        "that belong to a {p} having {x} for its {c}",
        "for which the {p}'s {c} is {x}",
        "going with a {p} of {c} {x}",
    ),
    parent_compare=("that belong to a {p} having a {c} {op}", "for which the {p}'s {c} is {op}"),
    sizes={
        ">": ("a number greater than {x} of", "in excess of {x}"),
        "<": ("less than {x}", "a number smaller than {x} of"),
    },
    missing=("lacking a {c}", "for which nobody noted the {c}", "that have an empty {c}"),
    present=("for which somebody noted the {c}", "that come with a {c}"),
    between=(
        "having a {c} no earlier than {a} and no later than {b}",
        "for which the {c} is anywhere from {a} through {b}",
    ),
    month=("having a {c} that belongs to {x}", "for which the {c} is some day of {x}"),
    year=("having a {c} that belongs to {x}", "for which the {c} is some day of {x}"),
)
