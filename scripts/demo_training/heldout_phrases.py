"""What the new held-out questions say: their words and phrasings, none of which training uses (a test compares)."""

from __future__ import annotations

_REAL = """
anchor aspen badger bamboo banjo beaver beetle blossom bonnet breeze cactus canoe canyon cedar cello cherry clover
comet cookie cricket daisy desert dice dome ferret fiddle flint garlic ginger goblet gravel hamster harbor heron hive
igloo jelly kayak kiwi koala lantern lava lizard llama locket magnet mango meadow melody mitten moose muffin noodle
oyster panda parrot peanut pebble pigeon plaza pretzel prune pumpkin quail radish raisin raven reef ribbon rocket
saddle salmon shrimp sketch sparrow spruce squid stork summit swan syrup tavern temple thistle thunder tractor tundra
umbrella vine vulture waffle walrus willow yarn zipper den elf fib gap hub jab keg lad nap pub rib tub
"""
HELDOUT_WORDS = tuple(_REAL.split())
ORDINALS = ("first", "second", "third", "fourth", "fifth")
SIDES = (("left of", "to the left"), ("right of", "to the right"), ("above", "up"), ("below", "down"))
SIGNS = "ABCDEFGHJKLMNPRSTUVXYZ2345679"
INKS = ("red", "orange", "green", "blue", "purple", "black")  # yellow writing is hard to see on paper
DONT_KNOW = "I do not know this one."
ASKED: dict[str, tuple[str, ...]] = {
    "colour": ("What is the colour of the {0}?", "What's the color of the {0}?"),
    "shape": ("The {0} one is what shape?", "What form does the {0} shape have?"),
    "size": ("Is the {0} a small one or a large one?", "Small or large: what is the {0}?"),
    "exists": ("Is a {0} among the shapes?", "Is a {0} to be seen?"),
    "count": ("How many {0} can you count?", "What is the count of {0}?"),
    "left or right": (
        "Does the {0} lie to the left or to the right of the {1}?",
        "Compared with the {1}, is the {0} to the left or to the right?",
    ),
    "above or below": ("Does the {0} lie above or below the {1}?", "Compared with the {1}, is the {0} above or below?"),
    "describe one": ("What has been drawn here?", "Give a description of the picture."),
    "describe several": ("What has been drawn here?", "Give a description of the picture."),
    "number": ("What number can you see in the picture?", "Please read out the number."),
    "word": ("What word can you see in the picture?", "Please read out the word."),
    "handwritten digit": ("Which digit did somebody write by hand?", "A digit written by hand: which one is it?"),
    "value of a bar": ("What value has the {0} bar?", "The {0} bar goes up to what value?"),
    "highest or lowest bar": ("Which colour belongs to the {0} bar?", "What colour has the {0} bar?"),
    "which of two pictures": (
        "Is it the first or the second picture that has a {0}?",
        "The {0} is in which picture, the first or the second?",
    ),
    "count in one of two": (
        "What is the count of shapes in the {0} picture?",
        "How many shapes can you count in the {0} picture?",
    ),
    "row and column": ("What do you find in row {0} and column {1}?", "Which one is at row {0}, column {1}?"),
    "so many from the side": (
        "What do you find {0} from the {1} in row {2}?",
        "Which one is the {0} from the {1} in the {3} row?",
    ),
    "beside": ("What do you find immediately {0} the {1}?", "Which one stands immediately {0} the {1}?"),
    "two steps away": ("What do you find two steps {2} from the {1}?", "Which one stands two cells {0} the {1}?"),
    "along a line": ("Read along the line, beginning at the ring.", "What does the line join, beginning at the ring?"),
    "nearer of two": (
        "Of the two {0}s, is the {2} or the {3} one nearer to the {1}?",
        "To which {0} is the {1} nearer, the {2} or the {3} one?",
    ),
    "cell in one of two": (
        "What do you find in row {0}, column {1} of the {2} picture?",
        "Which one is at row {0}, column {1} in the {2} picture?",
    ),
    "beside in one of two": (
        "What do you find immediately {0} the {1} in the {2} picture?",
        "Which one stands immediately {0} the {1} in the {2} picture?",
    ),
    "nearer in which picture": (
        "Is the {0} nearer to the {1} in the first or in the second picture?",
        "The {0} is nearer to the {1} in which picture, the first or the second?",
    ),
    "a photograph": ("What is this a picture of?", "What has been photographed here?"),
}  # fmt: skip
KINDS = tuple(ASKED)
# What tells a decoder that knows where image tokens are from one that does not.
OF_POSITIONS = KINDS[KINDS.index("row and column") : KINDS.index("a photograph")]
