"""How the wide set asks: patterns with choices in brackets, apart from what draws the pictures.

``[a|b|]`` stands for one of its parts, {name} for what is asked about. No pattern gives a phrasing of the held-out
sets; a test expands them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from random import Random

from demo_training.questions import PHRASINGS

_HERE = "[| here| in this image| in the image| shown]"
_SEE = "[can you see|do you see|can you find|are shown|are visible]"
_WHAT_IS = "[What is|What's|Which thing is|Name what is|Say what is]"
PATTERNS: dict[str, tuple[str, ...]] = {
    "colour": (
        "[Tell me|Say|Give me] [what|which] [colour|color] the {shape} [is|has].",
        "[There is|You see|I see] a {shape}. [What|Which] [colour|color] is it?",
        "The [colour|color] of the {shape}?",
        "In [what|which] [colour|color] is the {shape} [drawn|shown]?",
        "Is the {shape} red, blue or [another|some other] [colour|color]: which?",
        f"[What|Which] [colour|color] [is the {{shape}}|has the {{shape}}]{_HERE}?",
        "[Name|Give|State|Say] the [colour|color] of the {shape}.",
        "The {shape} is [what|which] [colour|color]?",
        "The {shape}: what [colour|color] is it?",
    ),
    "shape": (
        "[Tell me|Say] what the {colour} [shape|one|thing] is.",
        "[There is|You see|I see] something {colour}. [What|Which] shape is it?",
        "The shape of the {colour} [one|object]?",
        "Is the {colour} [shape|one|thing] a circle, a square or [another|some other] shape: which?",
        "What is {colour}[| here| in the picture]?",
        f"[What|Which] shape is the {{colour}} [thing|one|figure|object]{_HERE}?",
        "[Name|Give|Say] the shape of the {colour} [thing|figure|object].",
        "The {colour} [thing|figure|object]: what shape is it?",
        "[What|Which] shape is {colour} in this image?",
        "What is the {colour} [thing|figure|object]?",
    ),
    "only_shape": (
        "[Is this|Is it] a circle, a square or [another|some other] shape: which?",
        "Which of the shapes is [this|it|shown|drawn]?",
        "The shape [shown here|in this picture] is what?",
        "[What|Which] shape [do you see|is shown|is drawn|is in this picture|is in the picture|is this|is it]?",
        "[Name|Say] the shape[| in the picture| that you see].",
        "What kind of shape is [this|in the picture|shown]?",
    ),
    "only_colour": (
        "[Tell me|Say] [what|which] [colour|color] [this|it] is.",
        "[What|Which] [colour|color] do you see?",
        "[What|Which] [colour|color] has been used[| for the shape]?",
        "[What|Which] [colour|color] is [it|the shape|this shape|the object|the figure][| in the picture]?",
        "[Name|Say] the [colour|color] of the [shape|figure|object].",
        "[What|Which] [colour|color] does [it|the shape|the figure] have?",
    ),
    "size": (
        "[Tell me|Say] [whether|if] the {name} is [large or small|small or large].",
        "[What|Which] size [is|has] the {name}?",
        "Would you say the {name} is [large or small|small or large]?",
        "Is the {name} [big|large] or small[| here| in this image]?",
        "The {name}: [large or small|small or large]?",
        "[How large|How big] is the {name}: [large or small|small or large]?",
    ),
    "count": (
        "[Tell me|Say] the number of {what}[| in the picture| here].",
        "[What|Which] number of {what} [is there|do you see|is shown|does the picture have]?",
        "There are how many {what}[| here| in the picture| in all]?",
        "{what}: how many [are there|do you see|can you see]?",
        "Of {what}, how many [are there|do you see]?",
        f"How many {{what}} {_SEE}[| in the picture| in this image]?",
        "How many {what} [are here|does the picture show|does this image have|are in this picture|are in the image]?",
        "[Count|Please count] [the {what} in this image|all {what}|all the {what}].",
        "[Say|Tell me] how many {what} there are.",
        "[Give|State] the number of {what}.",
        "The number of {what}[ in the picture|]?",
    ),
    "exists": (
        "[Tell me|Say] [whether|if] there is a {name}[| here| in the picture].",
        "Is [one of the shapes|any of the shapes|something here] a {name}?",
        "[Among the shapes|Among these], is there a {name}?",
        "Has [the picture|this image] [got |]a {name}?",
        "There is a {name}[| here| in the picture]: yes or no?",
        "Yes or no: is there a {name}?",
        "[Could|Would] you [say|tell me] [whether|if] a {name} is [here|shown]?",
        "Is there [any|some] {name}[| here| in this image]?",
        "[Can you see|Can you find|Is there] a {name}[ here| in this image| anywhere]?",
        "Does [this image|the image|this picture] [show|contain|have] a {name}?",
        "A {name}: [is there one|do you see one]?",
    ),
    "left_or_right": (
        "[Tell me|Say] [whether|if] the {name} is left or right of the {other}.",
        "Is the {name} [further|more] to the left or to the right than the {other}?",
        "[Left or right|To the left or to the right]: where is the {name}, [seen from|from] the {other}?",
        "Next to the {other}, is the {name} [left or right|on the left or on the right]?",
        "Is the {name} [on the left or on the right|on the left or right|left or right] of the {other}[| here]?",
        "Relative to the {other}, is the {name} [left or right|to the left or to the right|on the left or the right]?",
        "[Seen from|Looking from] the {other}, is the {name} left or right?",
        "The {name}: left or right of the {other}?",
        "Which side of the {other} is the {name} on, left or right?",
    ),
    "above_or_below": (
        "[Tell me|Say] [whether|if] the {name} is above or below the {other}.",
        "[Above or below|Below or above]: where is the {name}, [seen from|from] the {other}?",
        "Is the {name} [further up or further down than|higher up or lower down than] the {other}: above or below?",
        "Relative to the {other}, is the {name} [above or below|higher or lower: above or below]?",
        "The {name}: above or below the {other}?",
        "Is the {name} [above the {other} or below it|below the {other} or above it]?",
        "Does the {name} stand above or below the {other}?",
    ),
    "describe": (
        "[What|Which things] [are|is] [in|on] [the|this] [picture|image|drawing]?",
        "[Give|Write] [me |]a [short |]description[| of this image| of what you see].",
        "[Explain|Report] what [you see|is shown|has been shown].",
        "What [would you say|can you say] [this is|is shown here|is in this image]?",
        "This [picture|image|drawing] shows what?",
        "[Someone drew|Somebody painted] this. What is it?",
        "[Describe|Please describe] [this picture|the image|this image|what you see|what is here].",
        "[What is shown|What is drawn|What can you see|What can be seen][| here| in the picture| in this image]?",
        "What [is in the picture|is in the image|is this|does this image show|is here|do you see here]?",
        "[Say|Tell me] what [you see|this is|the picture shows|is in the picture].",
        "[List|Name] what is in the picture.",
    ),
    "number": (
        "[Tell me|Say] [what|which] number [you see|this is|is written|it is].",
        "[Please |]read [this|the] number[| to me| for me| aloud].",
        "[What|Which] number [has been written|can be read|can you make out][| here| in the image]?",
        "The number [here|in this image|that is written] is what?",
        "There is a number[| here| in the picture]. [What|Which] is it?",
        "What is the number[| here| in the picture| shown]?",
        "[What|Which] number [is this|is it|is shown|is in this image|does the picture show|can you read|stands here]?",
        "What number is [in the picture|in the image|in this picture|there]?",
        "[Read|Give|Say|Name] the [number|digits][| in the image| shown| you see].",
        "What does the [number|writing] say?",
        "[What|Which] digits [are written|do you see|are in the picture|are these]?",
    ),
    "word": (
        "[Tell me|Say] [what|which] word [you see|this is|is written|it is].",
        "[Please |]read [this|the] word[| to me| for me| aloud].",
        "[What|Which] word [has been written|can be read|can you make out][| here| in the image]?",
        "The word [here|in this image|that is written] is what?",
        "There is a word[| here| in the picture]. [What|Which] is it?",
        "What is the word[| here| in the picture| shown]?",
        "[What|Which] word [is this|is it|is shown|is in this image|does the picture show|can you read|stands here]?",
        "What word is [in the picture|in the image|in this picture|there]?",
        "[Read|Give|Say|Name|Spell] the [word|text|letters][| in the image| shown| you see].",
        "What does [the text|the word|it|the writing] say?",
        "[What text|What] [is written|can be read|do you read][| here| in the picture]?",
    ),
    "digit": (
        "[Tell me|Say] which digit [somebody wrote|has been written|was written by hand].",
        "A [person|hand|child] wrote this[ digit|]. [What|Which digit] is it?",
        "[Please |]read the digit[| that was written| in handwriting].",
        "[What|Which] [handwritten digit|digit in handwriting] is [this|shown|it|in the picture]?",
        "[Read|Name|Say] the [handwritten|hand-written] [digit|number].",
        "[What|Which] [digit|number] [was|is] written by hand[| here]?",
        "[What|Which] digit is [this|it|shown|in the picture]?",
    ),
    "chart_extreme": (
        "The {most} bar: [what|which] [colour|color] is it?",
        "[Tell me|Say] [what|which] [colour|color] the {most} bar [is|has].",
        "Of [all|these|the] bars, [what|which] [colour|color] is the {most}?",
        "[Which|What] [colour|color] is the {most} [column|bar in the chart|bar of all|bar here]?",
        "The {most} bar is [what|which] [colour|color]?",
        "[Name|Say] the [colour|color] of the {most} [column|bar in the chart|bar here].",
    ),
    "chart_value": (
        "The {colour} bar: what [value|number] [is it|does it show|does it have]?",
        "[Tell me|Say] the value of the {colour} bar[| in the chart].",
        "[Up to|To] [what|which] value does the {colour} bar [go|rise|reach]?",
        "[What|Which] [value|number|height] [does the {colour} bar show|does the {colour} bar reach]?",
        "[Give|State|Say] the [value|height] of the {colour} [bar|column].",
        "The {colour} [bar|column] [stands for|reaches] what value?",
        "[How high|How tall] is the {colour} [column|bar in the chart|bar here]?",
    ),
    "which_picture": (
        "[Tell me|Say] which picture [shows|has] a {name}, the first or the second.",
        "A {name} is [in|shown in] [the first or the second picture|which picture, first or second]?",
        "[First or second|The first or the second]: which picture has a {name}?",
        "[Which image|Which of the pictures|Which of both] [shows|has] a {name}, [|the ]first or second?",
        "Is [the|a] {name} in the first [picture or the second|or the second picture|or in the second one]?",
        "In which image [is the {name}|do you see a {name}], [first or second|the first or the second]?",
    ),
    "count_in_one": (
        "[Tell me|Say] how many shapes [are in|you see in] the {which} picture.",
        "[Give|State] the number of shapes in the {which} [picture|image].",
        "The {which} [picture|image] has how many shapes?",
        "How many shapes [does the {which} picture show|does the {which} image have|are in the {which} image]?",
        "[Count|Please count] the [shapes of the {which} picture|shapes in the {which} image].",
        "The {which} picture: how many shapes[ are there| are in it|]?",
    ),
    "cell": (
        "[Look at|Go to] row {row}, column {column}[.|:] [What|Which thing] is [there|it]?",
        "What [can you see|do you see|is shown] in row {row}[,| and] column {column}?",
        "[Tell me|Say] what [is|stands] in [the cell at |]row {row}, column {column}.",
        f"{_WHAT_IS} in row {{row}}, column {{column}}?",
        f"{_WHAT_IS} in column {{column}} of row {{row}}?",
        "[What|Which thing] [stands|is] in the {nth_row} row and [the |]{nth_column} column?",
        "Row {row}, column {column}: what is [there|it|in it]?",
        "[Read|Name] the cell at row {row}, column {column}.",
    ),
    "cell_of": (
        "[In which|In what] row and column is the {item}?",
        "Where is the {item}: [which|what] row and column?",
        "[Give|Name|Say] the row and the column of the {item}.",
    ),
    "in_row": (
        "[Tell me|Say] what is {nth} from the {side} in [the {nth_row} row|row {row}].",
        "What [can you see|do you see] as the {nth} from the {side} [in|of] row {row}?",
        "Which [one|thing] [comes|stands] {nth} from the {side} in the {nth_row} row?",
        f"{_WHAT_IS} the {{nth}} from the {{side}} in the {{nth_row}} row?",
        "In the {nth_row} row, what is the {nth} from the {side}?",
        "[Name|Say] the {nth} [thing|one] from the {side} in row {row}.",
        "Row {row}, {nth} from the {side}: what is it?",
        "Counting from the {side}, what is the {nth} [thing |]in the {nth_row} row?",
    ),
    "in_column": (
        f"{_WHAT_IS} the {{nth}} from the {{side}} in the {{nth_column}} column?",
        "In the {nth_column} column, what is the {nth} from the {side}?",
        "Column {column}, {nth} from the {side}: what is it?",
    ),
    "beside": (
        "What [can you see|do you see|stands] [directly|just|right] {side} the {item}?",
        "[Tell me|Say] what [stands|is] [directly |just |]{side} the {item}.",
        "[Find|Look at] the {item}. What is [directly |just |]{side} it?",
        "The {item} has what [directly |just |]{side} it?",
        "[What|Which thing] is [directly|right|just] {side} the {item}?",
        "[Name|Say] what is [directly|just] {side} the {item}.",
    ),
    "steps": (
        "What [can you see|do you see|stands] {steps} places {side} the {item}?",
        "[Tell me|Say] what [is|stands] {steps} places {side} the {item}.",
        "[Find|Look at] the {item}. What is {steps} places {side} it?",
        "Count {steps} places {to} from the {item}[,|:] what is there?",
        "[What|Which thing] is {steps} [places|cells] {side} the {item}?",
        "[Go {steps} places {to} from the {item}|From the {item}, go {steps} places {to}]: what is there?",
    ),
    "beside_in_one": (
        "[Look at|See] the {which} picture. What is [directly |just ]{side} the {item}?",
        "[Tell me|Say] what is [directly |just |]{side} the {item} in the {which} picture.",
        "In the {which} [picture|image], what is [directly|right|just] {side} the {item}?",
        "[What|Which thing] is [directly|right|just] {side} the {item} in the {which} [picture|image]?",
    ),
    "path": (
        "[Tell me|Say] [what|which characters] the [line|path] [passes|goes through], from the ring.",
        "[Begin|Start] at the ring and [follow|go along] the [line|path]: what do you [meet|find|pass]?",
        "[What|Which characters] [do you meet|do you pass] along the [line|path], starting at the ring?",
        "[Follow|Go along] the [line|path] from the ring[:| and] [read|name|list] the characters.",
        "[What stands|Which characters are] along the [line|path], from the ring?",
        "Starting at the ring, [what does the line read|in what order are the characters|what is along the line]?",
    ),
    "path_next": (
        "[What|Which character] [comes|is] [after|next after] {item} [along|on] the [line|path] from the ring?",
        "[Follow|On] the [line|path] from the ring: what [follows|comes after] {item}?",
    ),
    "nearer": (
        "[Tell me|Say] which {name} is [nearer|closer] to the {other}, the {one} or the {two} one.",
        "Which {name} has the smaller distance to the {other}, the {one} or the {two} one?",
        "Which {name} is [nearer|closer] to the {other}, the {one} or the {two} one?",
        "Is the {one} or the {two} {name} [nearer|closer] to the {other}?",
        "The {other} is [nearer|closer] to which {name}: the {one} or the {two} one?",
    ),
    "nearer_picture": (
        "[Tell me|Say] in which picture the {name} is [nearer|closer] to the {other}, the first or the second.",
        "Where is the {name} [nearer|closer] to the {other}: in the first or in the second picture?",
        "[First or second|The first or the second]: in which picture is the {name} [nearer|closer] to the {other}?",
        "In which picture is the {name} [nearer|closer] to the {other}, [first or second|the first or the second]?",
        "[Which picture|Which image] has the {name} [nearer|closer] to the {other}: [|the ]first or second?",
    ),
    "cell_in_one": (
        "[Look at|See] the {which} picture. What is in row {row}, column {column}?",
        "[Tell me|Say] what is in row {row}, column {column} in the {which} picture.",
        f"{_WHAT_IS} in row {{row}}, column {{column}} of the {{which}} picture?",
        "In the {which} [picture|image], what is in row {row}, column {column}?",
        "The {which} picture, row {row}, column {column}: what is [there|it]?",
    ),
    "cell_same": (
        "[Is row {row}, column {column} the same|Does row {row}, column {column} hold the same] in both pictures?",
        "Do both pictures [have|show] the same in row {row}, column {column}?",
        "Row {row}, column {column}: is it the same in [both|the two] pictures?",
    ),
}
OPENINGS = ("",) * 9 + ("Please answer: ", "Look closely. ", "Tell me: ", "Quick question: ")
_HELD_OUT = frozenset(phrasings[-1] for phrasings in PHRASINGS.values())
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expansions(pattern: str) -> Iterator[str]:
    """Every phrasing that a pattern gives."""
    pieces = _CHOICE.split(pattern)
    for chosen in product(*(piece.split("|") if number % 2 else [piece] for number, piece in enumerate(pieces))):
        yield "".join(chosen)


@lru_cache
def phrasings_of(kind: str) -> tuple[tuple[str, ...], ...]:
    """Of each pattern of a kind, what it gives, without the old held-out phrasings."""
    return tuple(tuple(text for text in expansions(pattern) if text not in _HELD_OUT) for pattern in PATTERNS[kind])


def phrase(rng: Random, kind: str, blanks: dict[str, str]) -> str:
    """A question of this kind; one in twelve without its capital, or its last mark, as people type."""
    text = rng.choice(rng.choice(phrasings_of(kind))).format(**blanks)
    for vowel in ("orange", "upper"):
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    text = rng.choice(OPENINGS) + text
    if rng.random() < 1 / 12:
        return text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 1 / 24 else text
