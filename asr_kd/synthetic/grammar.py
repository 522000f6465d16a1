"""The sentences of the synthetic corpus: a small grammar of English whose words are easily taken for one another.

A sentence is drawn by filling a template's slots, a slot by one word of its class; no class holds two words that sound alike,
for no recogniser could tell them apart. Many sounds like another by one phone (bag, bad, back; ship, sheep; fifteen, fifty).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CLASSES = {
    "person": """farmer teacher doctor captain sailor painter singer driver baker lawyer soldier student neighbor brother sister
        mother father uncle cousin child woman man girl boy king queen guard hunter dancer waiter tailor judge nurse clerk
        pilot stranger leader rider writer banker barber""",
    "people": """farmers teachers doctors captains sailors painters singers drivers bakers lawyers soldiers students neighbors
        brothers sisters children women men girls boys guards hunters dancers waiters judges nurses pilots strangers riders
        writers bankers barbers""",
    "animal": "dog cat horse cow sheep goat hen fox wolf lion mouse rat pig duck goose bird snake frog lamb calf pony rabbit",
    "thing": """basket bottle letter ladder lamp table chair hammer bucket blanket mirror candle kettle carpet jacket pocket
        ticket bag box book boat ship cart card cup cap coat coin key bell ball bowl wheel map clock rope knife pen pan pin
        pot tool stool stone picture paper pillow shovel saddle wagon lantern barrel parcel package pencil needle violin""",
    "things": """baskets bottles letters ladders lamps tables chairs hammers buckets blankets mirrors candles kettles carpets
        jackets tickets bags boxes books boats ships carts cards cups caps coats coins keys bells bowls wheels maps clocks
        ropes knives pens pans pins pots tools stones pictures papers pillows barrels parcels pencils needles""",
    "place": """market harbor garden kitchen forest village river beach bridge station church castle valley mountain island
        library school tower cottage field hospital office stable cellar theater street corner hill mill mall hall lake farm
        barn shop chapel prison palace museum""",
    "trait": """old young tall small little quiet clever gentle angry hungry lonely lazy lucky famous foreign strange strong thin sick
        rich bold""",
    "adjective": """old small heavy broken empty golden silver wooden yellow purple orange little big better dirty simple narrow broad
        long wrong thick black blank clean green round brown cold warm dark sharp short red bitter""",
    "transitive": """carried found followed watched painted dropped lifted borrowed bought brought taught caught counted hid
        covered cleaned lost left kept sold told pushed pulled packed picked washed wanted needed moved opened ordered held
        showed touched noticed liked loved hated helped""",
    "base": """carry find follow watch paint drop lift borrow buy bring teach catch count hide cover clean lose leave keep sell
        tell push pull pack pick wash want need move open order hold show touch notice like love hate help""",
    "motion": "walked ran sailed traveled hurried wandered climbed marched jumped rode drove returned turned moved crept raced",
    "go": "walk run sail travel hurry wander climb march jump ride drive return turn move creep race",
    "direction": "to from toward across past behind around near beyond through into along",
    "location": "in near behind beside under above beyond outside inside on",
    "moment": """yesterday today tonight tomorrow again later often never always sometimes early late soon slowly quickly quietly
        suddenly together alone""",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "part": "morning evening afternoon night",
    "number": """three five six seven nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
        twenty thirty forty fifty sixty seventy eighty ninety""",
    "determiner": "the a the the this that every another our his my one",
    "many": "the these those some many all both few several our his my",
    "pronoun": "he she they we you i",
    "object": "him them us me it",
    "auxiliary": "will can must should may could would might",
    "degree": "very rather quite so almost",
    "season": "winter summer autumn spring dinner supper breakfast lunch midnight sunset noon",
}  # fmt: skip

# One in so many; a bare word is itself, {class} a word of that class
TEMPLATES = {
    "{determiner} {person} {transitive} {determiner} {thing}": 3,
    "{determiner} {trait} {person} {transitive} {determiner} {adjective} {thing}": 4,
    "{determiner} {person} and {determiner} {person} {motion} {direction} the {place}": 3,
    "{number} {people} {motion} {direction} the {adjective} {place} {moment}": 4,
    "{many} {people} {transitive} {number} {things} {location} the {place}": 5,
    "on {day} {part} {pronoun} {transitive} {determiner} {thing}": 3,
    "on {day} {determiner} {person} {transitive} {many} {adjective} {things}": 3,
    "after {season} {pronoun} {motion} {direction} the {place}": 3,
    "before {season} {determiner} {animal} {motion} {direction} {determiner} {adjective} {place}": 3,
    "did {determiner} {person} {base} {determiner} {adjective} {thing}": 3,
    "{pronoun} {auxiliary} {base} {many} {things} {moment}": 3,
    "{pronoun} {auxiliary} {go} {direction} the {place} after {season}": 3,
    "{pronoun} {auxiliary} not {base} {object}": 2,
    "please {base} {determiner} {thing} {location} the {thing}": 3,
    "the {thing} {location} the {place} was {degree} {adjective}": 4,
    "the {things} were {adjective} and {adjective}": 2,
    "{determiner} {trait} {animal} {motion} {direction} {determiner} {thing}": 3,
    "{pronoun} {transitive} the {animal} with {determiner} {adjective} {thing}": 3,
    "{pronoun} {transitive} {number} {things} from {determiner} {person} {moment}": 4,
    "when the {person} {motion} {moment} the {animal} {transitive} {object}": 3,
    "the {thing} of the {person} was {location} the {thing}": 4,
    "the {people} of the {place} {transitive} the {trait} {people}": 3,
    "{number} {things} and {number} {things} {location} {determiner} {thing}": 3,
    "where did {pronoun} {base} the {adjective} {things}": 2,
    "why {auxiliary} the {person} {base} {determiner} {thing} {moment}": 2,
    "the {people} {motion} {moment}": 1,
    "{many} {people} {motion} {direction} the {place}": 2,
    "{pronoun} {transitive} {object}": 1,
    "{pronoun} {transitive} {object} {moment}": 1,
    "the {person} was {degree} {trait} and the {people} were {trait}": 2,
    "the {trait} {person} and the {trait} {people} {transitive} {number} {things} on {day}": 2,
    "before {season} the {person} {transitive} {number} {adjective} {things} from the {adjective} {thing}": 2,
    "{pronoun} {auxiliary} {base} the {thing} and the {thing} {location} the {adjective} {thing}": 2,
    "{determiner} {person} who {transitive} the {thing} {auxiliary} {go} {moment}": 3,
    "{pronoun} {moment} {transitive} {number} {adjective} {things} {location} {determiner} {place}": 3,
}  # fmt: skip


def vocabulary() -> tuple[str, ...]:
    """Every word of the grammar, upper case, sorted."""
    fillers = {word for words in CLASSES.values() for word in words.split()}
    fixed = {word for template in TEMPLATES for word in template.split() if not word.startswith("{")}
    return tuple(sorted(word.upper() for word in fillers | fixed | {"an"}))


def sentences(rng: np.random.Generator) -> Iterator[tuple[str, ...]]:
    """Sentences without end, upper case, 3 to 12 words; each is drawn anew, so some come twice."""
    classes = {name: words.split() for name, words in CLASSES.items()}
    templates = [template.split() for template in TEMPLATES]
    weights = np.array(list(TEMPLATES.values()), dtype=float)
    cumulative = np.cumsum(weights / weights.sum())
    while True:
        template = templates[int(np.searchsorted(cumulative, rng.random(), side="right"))]
        words = [_fill(slot, classes, rng) for slot in template]
        yield tuple(word.upper() for word in _with_an(words))


def distinct_sentences(rng: np.random.Generator, count: int, taken: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """`count` sentences that are not in `taken`, each once; they are added to `taken`."""
    found: list[tuple[str, ...]] = []
    source = sentences(rng)
    while len(found) < count:
        sentence = next(source)
        if sentence not in taken:
            taken.add(sentence)
            found.append(sentence)
    return found


def _fill(slot: str, classes: dict[str, list[str]], rng: np.random.Generator) -> str:
    if not slot.startswith("{"):
        return slot
    words = classes[slot[1:-1]]
    return words[int(rng.integers(len(words)))]


def _with_an(words: list[str]) -> list[str]:
    return ["an" if word == "a" and follower[:1] in "aeiou" else word for word, follower in zip(words, [*words[1:], "-"], strict=True)]
