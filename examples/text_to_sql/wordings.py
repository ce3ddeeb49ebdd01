"""The wordings: how each kind of question is asked, in the training wordings and in the held-out ones.

A held-out wording is another way to say the same thing, not a training one with a word changed; it also has
words of its own for "above", "highest", ... and other ways to state a condition. Knows nothing of tables.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HELD_OUT", "TRAIN", "Wordings"]

# Slots: {rows} noun of the table's rows   {c} measured column   {agg} "average", ...   {cat} grouping column
#        {label} what is listed, plural    {where} condition     {k} how many            {top} "highest", ...


@dataclass(frozen=True)
class Wordings:
    """One side's wordings.

    Attributes:
        frames: sentences by kind of question.
        equal: conditions ``{c}`` = ``{x}``.
        compare: conditions on ``{c}``, with ``{op}`` from ``ops``.
        ops: words for ``>``, ``<``, ``>=``, ``<=`` with ``{x}``.
        aggs: adjectives for ``avg``, ``sum``, ``min``, ``max``.
        tops: adjectives for ``desc``, ``asc``.
    """

    frames: dict[str, tuple[str, ...]]
    equal: tuple[str, ...]
    compare: tuple[str, ...]
    ops: dict[str, tuple[str, ...]]
    aggs: dict[str, tuple[str, ...]]
    tops: dict[str, tuple[str, ...]]


TRAIN = Wordings(
    frames={
        "aggregate": (
            "What is the {agg} {c} of all {rows}?",
            "Give the {agg} {c}.",
            "Find the {agg} {c} of the {rows}.",
            "Show the {agg} {c} over all {rows}.",
            "Compute the {agg} {c} of all {rows}.",
            "What is the {agg} {c}?",
            "Tell me the {agg} {c} of the {rows}.",
            "For all {rows}, what is the {agg} {c}?",
            "I need the {agg} {c} of the {rows}.",
            "Please calculate the {agg} {c} for the whole set of {rows}.",
            "Over every row, determine the {agg} {c}.",
            "How much is the {agg} {c} overall?",
            "If we put all {rows} into one group, which {agg} {c} do we get?",
            "Considering all the {rows} at once, name the {agg} {c}.",
            "Can you tell me what the {agg} {c} is?",
            "The {agg} {c} of all the {rows}, please.",
            "Across everything in the table, how large is the {agg} {c}?",
            "What is the {agg} {c} that was recorded?",
            "Of all {rows} together, I want the {agg} {c}.",
            "Use every one of the {rows} and say what the {agg} {c} amounts to.",
            "It would help to have the {agg} {c} of the entire table.",
            "Would you find out the {agg} {c} over all of the {rows}?",
        ),
        "filter": (
            "What is the {agg} {c} of {rows} {where}?",
            "Give the {agg} {c} for {rows} {where}.",
            "For {rows} {where}, what is the {agg} {c}?",
            "Find the {agg} {c} among {rows} {where}.",
            "Compute the {agg} {c} of the {rows} {where}.",
            "Show the {agg} {c} over {rows} {where}.",
            "Tell me the {agg} {c} of {rows} {where}.",
            "I need the {agg} {c} for the {rows} {where}.",
            "Among {rows} {where}, find the {agg} {c}.",
            "Considering only the {rows} {where}, determine their {agg} {c}.",
            "Restrict the table to {rows} {where} and calculate the {agg} {c}.",
            "How much is the {agg} {c} when we keep nothing but {rows} {where}?",
            "There are {rows} {where}. Which {agg} {c} do they have?",
            "Can you tell me what the {agg} {c} is for {rows} {where}?",
            "Please calculate the {agg} {c}, but only over the {rows} {where}.",
            "The {agg} {c} of all the {rows} {where}, please.",
            "Suppose there are only {rows} {where}. What would the {agg} {c} be?",
            "Keep the {rows} {where}, and say what their {agg} {c} amounts to.",
            "How large is the {agg} {c} across the {rows} {where}?",
            "It would help to have the {agg} {c} of those {rows} {where}.",
            "Would you find out the {agg} {c} over all {rows} {where}?",
            "Our subject is {rows} {where}. Their {agg} {c}, please.",
        ),
        "count": (
            "How many {rows} are there {where}?",
            "How many {rows} {where} are there?",
            "Count the {rows} {where}.",
            "What is the number of {rows} {where}?",
            "Give the number of {rows} {where}.",
            "Find how many {rows} there are {where}.",
            "Tell me the count of {rows} {where}.",
            "I need the number of {rows} {where}.",
            "Show how many {rows} exist {where}.",
            "Please count all of the {rows} {where}.",
            "How large is the set of {rows} {where}?",
            "Considering only {rows} {where}, how many are left?",
            "Determine the total number of {rows} {where}.",
            "Can you count every one of the {rows} {where}?",
            "Of all the {rows}, how many are there {where}?",
            "The number of {rows} {where}, please.",
            "Would you find out how many {rows} exist {where}?",
            "It would help to have a count of the {rows} {where}.",
            "Go through the {rows} and say how many you find {where}.",
            "Altogether, how many {rows} {where} are in the table?",
            "Keep the {rows} {where}: how many are they?",
            "Our subject is {rows} {where}. Their number, please.",
        ),
        "compare": (
            "List the {label} of {rows} {where}.",
            "What are the {label} of the {rows} {where}?",
            "Show the {label} of all {rows} {where}.",
            "Give the {label} for {rows} {where}.",
            "Find the {label} of {rows} {where}.",
            "For {rows} {where}, list the {label}.",
            "Which {label} belong to {rows} {where}?",
            "Tell me the {label} of the {rows} {where}.",
            "I need the {label} of all {rows} {where}.",
            "Considering only the {rows} {where}, name their {label}.",
            "Restrict the table to {rows} {where} and display the {label}.",
            "Search for {rows} {where}, and output their {label}.",
            "There are {rows} {where}. What {label} do they have?",
            "Can you tell me the {label} of every one of the {rows} {where}?",
            "Please go through the {rows} and list the {label} of those {where}.",
            "The {label} of all the {rows} {where}, please.",
            "Would you find the {label} for all {rows} {where}?",
            "It would help to have the {label} of those {rows} {where}.",
            "Keep the {rows} {where}, and output nothing but their {label}.",
            "Our subject is {rows} {where}. Their {label}, please.",
            "From all the {rows}, take those {where} and give the {label}.",
        ),
        "top": (
            "List the {label} of the {k} {rows} with the {top} {c}.",
            "What are the {label} of the {k} {rows} with the {top} {c}?",
            "Which {k} {label} have the {top} {c}?",
            "Give the {k} {label} with the {top} {c}.",
            "Show the {label} of the {k} {rows} that have the {top} {c}.",
            "Find the {k} {rows} with the {top} {c} and give their {label}.",
            "For the {k} {rows} with the {top} {c}, list the {label}.",
            "Tell me the {k} {label} that have the {top} {c}.",
            "By {c}, what are the {label} of the {k} {top} {rows}?",
            "Order the {rows} by {c} and name the {label} of the {k} {top} ones.",
            "When the {rows} are ordered by {c}, {top} ahead of the rest, what are the first {k} {label}?",
            "Considering {c}, choose the {k} {top} {rows} and output their {label}.",
            "I need the {label} of {k} {rows}: those whose {c} is {top}.",
            "Please go through the {rows} and list the {label} of the {k} where {c} is the {top}.",
            "Arrange the {rows} by {c}, start from the {top}, and display {k} {label}.",
            "The {k} {label} with the {top} {c}, please.",
            "Would you find the {label} of the {k} {rows} whose {c} is the {top}?",
            "It would help to have the {label} of the {k} {rows} with the {top} {c}.",
            "Judged by {c}, choose the {k} {top} {rows} and name their {label}.",
            "List the {rows} from the {top} {c} on, and stop after {k} {label}.",
            "Order by {c} so that the {top} stands at the top, and show {k} {label}.",
        ),
        "group": (
            "What is the {agg} {c} for each {cat}?",
            "Give the {agg} {c} per {cat}.",
            "Show the {agg} {c} of the {rows} by {cat}.",
            "List each {cat} with its {agg} {c}.",
            "For each {cat}, what is the {agg} {c}?",
            "Find the {agg} {c} of {rows} for every {cat}.",
            "Compute the {agg} {c} grouped by {cat}.",
            "For every {cat}, give the {agg} {c} of the {rows}.",
            "I need the {agg} {c} in each {cat}.",
            "Group the {rows} by {cat} and calculate the {agg} {c} of each group.",
            "Which {agg} {c} does each {cat} have?",
            "Put the {rows} of one {cat} together, and determine the {agg} {c} for all of them.",
            "Considering the {cat} groups one by one, name their {agg} {c}.",
            "In what way is the {agg} {c} tied to the {cat}? Show both.",
            "Please display every {cat} next to the {agg} {c} of its {rows}.",
            "The {agg} {c} of all {rows}, separately for each {cat}, please.",
            "Would you find out the {agg} {c} for all {cat} groups?",
            "Compare every {cat} by its {agg} {c}.",
            "It would help to have the {agg} {c} of each {cat} on its own.",
            "How large is the {agg} {c} in every single {cat}?",
            "Divide the {rows} among their {cat} values and show each one's {agg} {c}.",
            "Name all {cat} values, and beside each the {agg} {c} of its {rows}.",
        ),
    },
    equal=(
        "whose {c} is {x}",
        "with {c} {x}",
        "where {c} is {x}",
        "where the {c} equals {x}",
        "with a {c} of {x}",
        "that have {c} {x}",
        "of which the {c} is exactly {x}",
    ),
    compare=(
        "with {c} {op}",
        "whose {c} is {op}",
        "where {c} is {op}",
        "that have {c} {op}",
        "with a {c} {op}",
        "of which the {c} is {op}",
        "where the {c} is {op}",
    ),
    ops={
        ">": ("above {x}", "over {x}", "more than {x}", "beyond {x}", "bigger than {x}", "strictly more than {x}"),
        "<": ("below {x}", "under {x}", "fewer than {x}", "short of {x}", "less than {x}", "strictly less than {x}"),
        ">=": ("at least {x}", "{x} or more", "{x} or above", "no less than {x}", "not below {x}"),
        "<=": ("at most {x}", "{x} or less", "{x} or below", "no more than {x}", "not above {x}"),
    },
    aggs={
        "avg": ("average", "mean"),
        "sum": ("total", "summed", "combined"),
        "min": ("minimum", "lowest", "smallest", "least"),
        "max": ("maximum", "highest", "largest", "biggest"),
    },
    tops={"desc": ("highest", "largest", "biggest", "greatest"), "asc": ("lowest", "smallest", "least")},
)

HELD_OUT = Wordings(
    frames={
        "aggregate": (
            "Taking the {rows} all together, report their {agg} {c}.",
            "Could you work out the {agg} {c} across the whole table?",
            "Looking at every one of the {rows}, what does the {agg} {c} come to?",
            "We would like to know the {agg} {c} on record.",
        ),
        "filter": (
            "Looking only at {rows} {where}, what does the {agg} {c} come to?",
            "Take just the {rows} {where} and report their {agg} {c}.",
            "Could you work out the {agg} {c} across all {rows} {where}?",
            "We are interested in {rows} {where}: how much is their {agg} {c}?",
        ),
        "count": (
            "Can you say what number of {rows} we have {where}?",
            "Work out the size of the group of {rows} {where}.",
            "Please tally up all {rows} {where}.",
            "In total, how many of the {rows} do we see {where}?",
        ),
        "compare": (
            "Look up {rows} {where} and return their {label}.",
            "We only care about {rows} {where}: print their {label}.",
            "Out of all {rows}, pick those {where} and report the {label}.",
            "Could you write down the {label} for any {rows} {where}?",
        ),
        "top": (
            "Rank the {rows} by {c} and return the {label} of the {k} {top}.",
            "Going by {c}, pick the {k} {top} {rows} and report their {label}.",
            "Sort the {rows} so that the {top} {c} comes first, then print the first {k} {label}.",
            "Could you write down the {label} for the {k} {rows} where {c} is {top}?",
        ),
        "group": (
            "Break the {agg} {c} down by {cat}.",
            "How does the {agg} {c} differ from one {cat} to the next?",
            "Split the {rows} by {cat} and work out the {agg} {c} of every group.",
            "Report all the {cat} values together with the {agg} {c} found in them.",
        ),
    },
    equal=("having {c} equal to {x}", "that have {x} as their {c}", "for which the {c} is {x}"),
    compare=("having {c} {op}", "for which the {c} is {op}", "that show {c} {op}"),
    ops={
        ">": ("greater than {x}", "higher than {x}", "larger than {x}"),
        "<": ("lower than {x}", "smaller than {x}", "less than {x}"),
        ">=": ("{x} or higher", "at least {x}", "no lower than {x}"),
        "<=": ("{x} or lower", "at most {x}", "no higher than {x}"),
    },
    aggs={
        "avg": ("average", "mean"),
        "sum": ("combined", "total"),
        "min": ("smallest", "minimum"),
        "max": ("largest", "maximum"),
    },
    tops={"desc": ("greatest", "highest"), "asc": ("lowest", "smallest")},
)
