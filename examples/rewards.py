"""Reward functions for grpo recipes: (prompt, completion, row) → a number, the higher the better.

`prompt` is what the user said (the recipe's `prompt` template filled in), `completion` the sampled
answer as text, `row` all columns of the data row. A function must return a finite number for every
completion, also for an empty one.
"""

import re


def facts_told(prompt: str, completion: str, row: dict) -> float:
    """The share of the facts in the row's `mr` (E2E's "name[Aromi], area[riverside]") that the text
    tells; 0 for a copy of the `mr`.
    """
    if "[" in completion:
        return 0.0
    facts = re.findall(r"(\w+(?: \w+)?)\[(.*?)\]", row["mr"])
    return sum(_told(name, value.lower(), completion.lower()) for name, value in facts) / len(facts)


def facts_told_in_full(prompt: str, completion: str, row: dict) -> float:
    """`facts_told`, half of it where the text does not end with a full stop: else a policy learns
    to run on to the limit.
    """
    share = facts_told(prompt, completion, row)
    return share if completion.rstrip().endswith(".") else share / 2


def _told(name: str, value: str, text: str) -> bool:
    if name == "familyFriendly":
        friendly = re.search(r"famil|child|kid", text) is not None
        denied = re.search(r"\b(no|non|not|isn't|doesn't|aren't|don't|adults?)\b", text) is not None
        return (friendly and denied == (value == "no")) or (value == "no" and "adult" in text)
    return any(word in text for word in [value, *OTHER_WORDS.get(value, ())])


OTHER_WORDS = {  # in the data set's own sentences
    "less than £20": ["under £20", "cheap", "low price", "low-price", "inexpensive", "low cost"],
    "more than £30": ["over £30", "expensive", "high price", "high-price"],
    "£20-25": ["£20 to £25", "£20 and £25", "moderate"],
    "cheap": ["low price", "low-price", "inexpensive", "low cost", "low-cost"],
    "moderate": ["mid price", "average price", "medium price"],
    "high": ["expensive", "well rated", "excellent"],
    "5 out of 5": [
        "5-star",
        "5 star",
        "five star",
        "five-star",
        "five out of five",
        "5/5",
        "5 of 5",
    ],
    "3 out of 5": [
        "3-star",
        "3 star",
        "three star",
        "three-star",
        "three out of five",
        "3/5",
        "3 of 5",
    ],
    "1 out of 5": ["1-star", "1 star", "one star", "one-star", "one out of five", "1/5", "1 of 5"],
    "city centre": ["city center", "centre of the city", "center of the city"],
    "riverside": ["river"],
    "fast food": ["fast-food"],
}
