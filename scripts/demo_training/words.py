"""Words to read: real ones, and made-up ones, which cannot be guessed from a part of them."""

from __future__ import annotations

from random import Random

# None of them is in scenes.WORDS or in the held-out list (heldout_phrases.py); a test compares.
_REAL = """
able about acid actor after again agent air alarm album alive alley alone along amber angel anger angle animal ant
arch area arm army arrow art ash ask atlas attic aunt autumn away axe baby back badge bag bake ball band bank bar barn
base basic basket bath bay beach bead beam bean bear beat bed bee beef bell belt bench berry best bike bill bin bit
black blade blank blue board boat body bold bolt bomb bone boot border born boss both bottle bottom bowl box boy brain
branch brass brave brick bridge brief bright broom brown brush bubble bucket bud bug build bulb bull bus bush busy
butter button buy cabin cable cage calf call calm camel camera camp can candle cap cape card care cargo carpet carrot
cart case castle cave cell cent chain chair chalk chance change chart check cheese chess chest chicken child chin
circle city clay clean clear clerk cliff climb clock close cloth cloud clown club coach coal coast coat code coffee
coin cold collar colour comb come cook cool copper copy coral cork corn corner cotton couch count court cousin cover
cow crab crane cream crop cross crowd crown cube cup curve daily dance danger dark dawn day deal deep deer desk dial
diet dinner dirt dish dive doctor doll dolphin donkey dot double down dragon draw dream dress drift drill drink drive
drop drum dry duck dust duty eagle ear earth east easy eat edge egg eight elbow empty end engine enter entry equal
eraser even event exit eye face fact fair fall fame family fan far farm fast fat father fence fern ferry field fig
film fine finger fire firm first fist five flag flame flat floor flour flow flute fly foam fog fold food foot forest
fork form fort found four fox frame free fresh friend front fruit full fun fur gallery game garage gas gate gear ghost
giant gift give glad glass globe glove glue goal goat gold golf good goose grain grand grape graph gray great grey
ground group grow guard guess guest guide gum habit hair half hall ham hammer hand handle hang happy hard hat hawk hay
head heart heat heavy heel help hen herb hero hide high hill hint hip hobby hold hole holiday hook hope horn horse hot
hotel hour hunt hut ice idea ink inn insect iron island item ivory jacket jam jar jaw jeans jet jewel job join joke
joy judge juice jump jungle jury keep kettle key kick kind kiss kitchen kite knee knife knot ladder lady lake lamb
land lane large last late laugh lawn law layer lazy leaf learn leather leg lemon lens letter level lid life lift light
lily line lion lip list live load loaf local lock log long look lost loud love low luck lunch lung magic mail main
make man map maple marble march mark market mask mat match meal meat medal melon member menu metal middle mile mill
mind mine mint minute mirror mix model money monkey month mop morning moss mother motor mountain mouse mouth move
movie mud mug mule muscle music nail name napkin narrow navy near neck need nest net never new news next nice night
nine noise noon north nose note number nurse nut oak oar oat ocean off office oil old olive one onion orange order
organ oven over owl own page pain paint pair palm pan panel paper parcel park part party pass past path paw pea peach
pear pen pencil people pepper phone photo piano pick picture pie piece pig pilot pin pine pink pipe place plain plan
plane plant plate play plum pocket poem point pole pond pony pool poor port post pot potato powder power press price
print prize proof puddle pull pump pupil puppy purple purse push puzzle queen quick quiet quilt quiz rabbit race rack
radio raft rail ram ranch rat raw ray razor read ready real red rest rice rich ride right river road robin robot rock
rod roll roof room root rope rose rough round route row royal rub rug rule run sack sad safe sail salad salt same sand
sauce save saw scale scarf school score scout screen sea seal seat second seed sell send seven shadow shape shark
sharp sheep sheet shelf shell shirt shoe shop short show shut side sign silk silver simple sing sink sister site six
size skate ski skill skin skirt sky sled sleep slice slow small smart smell smile smoke smooth snack snail snake soap
sock sofa soft soil soldier song soon sort sound soup south space spade spark speak speed spider spoon sport spot
spring square stable stage stair stamp stand start state station steam steel stem step stick still stone store storm
story stove straw stream street string strong student sugar suit summer supper sweet swim swing sword table tail take
talk tall tank tape taste taxi tea teach team tear ten tent test text thick thin thing think third thread three throat
thumb ticket tide tie tiger tile time tin tiny tip toad toast today toe tomato tone tool tooth top torch touch tour
towel tower town toy track trade trail train tray trip truck true trumpet trunk try tube tulip tune turkey turn turtle
twelve twig twin two uncle under uniform unit upper use valley value van vase velvet verb vest view village violin
visit voice volcano vote wagon waist wait walk wall walnut want war warm wash wasp watch water wave wax way weather
web week weight well west whale wheat wheel whistle white wide wife wild win wind wing winner wire wise wish woman
wonder wood wool word work world worm wrap wrist write yard year yes yogurt young zebra zero zinc zone zoo
"""
WORDS = tuple(_REAL.split())
_ENDS = ("b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "x", "z", "sh", "ck", "nd", "st", "lf", "")
_STARTS = ("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "q", "r", "s", "t", "v", "w", "y", "z", "br")
_VOWELS = ("a", "e", "i", "o", "u", "y", "ee", "ou", "ai")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_ALIKE = set("cosuvwxz")  # letters that are alike in both cases but for their height


def made_up(rng: Random) -> str:
    """One to three syllables; most are no words."""
    return "".join(rng.choice(_STARTS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(rng.randint(1, 3)))


def word_to_read(rng: Random, longest: int) -> str:
    """At most ``longest`` letters (three at least), in lower case, upper case or with a capital."""
    while True:
        chance = rng.random()
        if chance < 0.45:
            word = rng.choice(WORDS)
        elif chance < 0.8:
            word = made_up(rng)
        else:
            word = "".join(rng.choice(_ALPHABET) for _ in range(rng.randint(2, 7)))
        if 2 <= len(word) <= longest:
            break
    case = rng.random()
    if case < 0.45 or (set(word) <= _ALIKE and case < 0.9):
        return word
    return word.capitalize() if case > 0.85 and word[0] not in _ALIKE else word.upper()


def number_to_read(rng: Random, longest: int) -> str:
    """One to five digits, the first hardly ever a zero."""
    count = min(longest, rng.choice((1, 1, 1, 2, 2, 2, 3, 3, 4, 5)))
    text = "".join(rng.choice("0123456789") for _ in range(count))
    return text if count == 1 or rng.random() < 0.1 else str(rng.randint(1, 9)) + text[1:]
