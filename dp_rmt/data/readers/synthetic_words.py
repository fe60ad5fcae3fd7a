"""The words of the synthetic reviews. Topics have words of their own, and share others."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Topic:
    """What the reviews of one topic talk about.

    Attributes:
        things: what is reviewed.
        aspects: what a clause judges.
        occasions: neutral phrases that fit the topic.
        praise: adjectives that praise this topic's aspects.
        blame: adjectives that blame them.
    """

    things: tuple[str, ...]
    aspects: tuple[str, ...]
    occasions: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


def _topic(things: str, aspects: str, occasions: str, praise: str, blame: str) -> Topic:
    return Topic(
        tuple(things.split()),
        tuple(aspects.split()),
        tuple(phrase.strip() for phrase in occasions.split(",")),
        tuple(praise.split()),
        tuple(blame.split()),
    )


TOPICS: dict[str, Topic] = {
    "film": _topic(
        "film movie drama comedy thriller sequel documentary remake",
        "acting plot script cast dialogue ending camera soundtrack director villain",
        "at the cinema, on the big screen, after the trailer, with popcorn",
        "gripping moving witty hilarious suspenseful",
        "predictable wooden cheesy plodding overacted",
    ),
    "restaurant": _topic(
        "restaurant diner cafe bakery bistro pizzeria bar buffet",
        "food soup service waiter menu dessert coffee bread pasta sauce",
        "for lunch, for dinner, near the station, at a table outside",
        "delicious tasty fresh crispy juicy",
        "greasy stale bland soggy overcooked",
    ),
    "book": _topic(
        "book novel memoir biography anthology paperback mystery poem",
        "prose chapter narrator hero style cover preface opening language translation",
        "before bed, in one weekend, on the train, from the library",
        "eloquent thoughtful lyrical absorbing insightful",
        "longwinded pretentious shallow muddled dense",
    ),
    "hotel": _topic(
        "hotel hostel resort motel inn apartment cabin guesthouse",
        "room bed bathroom lobby pool view staff breakfast balcony reception",
        "for two nights, on a business trip, during the holidays, near the beach",
        "spotless cozy welcoming spacious quiet",
        "noisy dirty cramped smelly shabby",
    ),
    "gadget": _topic(
        "phone laptop tablet camera headset speaker printer watch",
        "battery screen keyboard software charger speed button design warranty signal",
        "out of the box, after the update, for work, on the road",
        "responsive durable sleek reliable intuitive",
        "sluggish fragile buggy bulky unresponsive",
    ),
    "game": _topic(
        "game console puzzle shooter adventure expansion simulator racer",
        "graphics level gameplay quest controls physics tutorial multiplayer boss score",
        "on hard mode, with my brother, over the internet, after the patch",
        "addictive immersive balanced inventive playable",
        "repetitive unfair laggy glitchy grindy",
    ),
    "course": _topic(
        "course class lecture seminar workshop lesson bootcamp training",
        "teacher homework exam syllabus textbook project slides explanation pace forum",
        "in the first semester, before the exam, at the university, every tuesday",
        "instructive rigorous practical encouraging lucid",
        "outdated disorganized superficial confusing rushed",
    ),
    "concert": _topic(
        "concert show festival gig recital opera musical performance",
        "singer band stage sound lights orchestra guitar drummer crowd encore",
        "on saturday night, in the front row, at the arena, with old friends",
        "energetic soulful electrifying rousing tuneful",
        "offkey deafening lifeless shrill sloppy",
    ),
}

# How often each topic is written about. The public part hardly mentions the private part's own topics, as text from the
# web hardly mentions what a company's customers write about. Their words are known, but rare.
TOPIC_WEIGHTS: dict[str, dict[str, float]] = {
    "public": {
        "film": 0.26,
        "restaurant": 0.26,
        "book": 0.21,
        "hotel": 0.21,
        "gadget": 0.015,
        "game": 0.015,
        "course": 0.015,
        "concert": 0.015,
    },
    "private": {
        "film": 0.1,
        "restaurant": 0.1,
        "gadget": 0.25,
        "game": 0.2,
        "course": 0.2,
        "concert": 0.15,
    },
}

PRAISE = (
    "good",
    "great",
    "excellent",
    "wonderful",
    "superb",
    "brilliant",
    "amazing",
    "charming",
    "delightful",
    "impressive",
    "outstanding",
    "perfect",
    "lovely",
    "fantastic",
    "terrific",
    "pleasant",
    "enjoyable",
    "remarkable",
    "beautiful",
    "splendid",
    "fine",
    "clever",
    "memorable",
    "refreshing",
    "satisfying",
    "stunning",
    "marvelous",
    "magnificent",
    "solid",
    "admirable",
)
BLAME = (
    "bad",
    "terrible",
    "awful",
    "horrible",
    "poor",
    "dreadful",
    "boring",
    "disappointing",
    "mediocre",
    "ugly",
    "weak",
    "lousy",
    "annoying",
    "dull",
    "pathetic",
    "unpleasant",
    "tedious",
    "worthless",
    "ridiculous",
    "inferior",
    "miserable",
    "forgettable",
    "frustrating",
    "tiresome",
    "appalling",
    "atrocious",
    "abysmal",
    "dismal",
    "clumsy",
    "painful",
)
NEUTRAL = (
    "new",
    "old",
    "long",
    "short",
    "famous",
    "modern",
    "typical",
    "simple",
    "ordinary",
    "recent",
    "usual",
    "common",
    "local",
    "foreign",
    "popular",
)
# These are pairs of (past, base) forms: "i loved it", "i did not love it".
PRAISE_VERBS = (
    ("loved", "love"),
    ("enjoyed", "enjoy"),
    ("liked", "like"),
    ("admired", "admire"),
    ("adored", "adore"),
    ("appreciated", "appreciate"),
    ("praised", "praise"),
    ("treasured", "treasure"),
)
BLAME_VERBS = (
    ("hated", "hate"),
    ("disliked", "dislike"),
    ("regretted", "regret"),
    ("despised", "despise"),
    ("detested", "detest"),
    ("resented", "resent"),
    ("loathed", "loathe"),
    ("dreaded", "dread"),
)
INTENSIFIERS = (
    "very",
    "really",
    "truly",
    "quite",
    "extremely",
    "absolutely",
    "simply",
    "rather",
    "incredibly",
    "completely",
    "so",
    "pretty",
)
LINKING_VERBS = ("was", "seemed", "felt", "looked", "is", "remained", "turned out")
PEOPLE = ("i", "we", "my wife", "my husband", "my friend", "our group", "my parents", "everyone")
TIMES = (
    "last week",
    "yesterday",
    "in may",
    "last winter",
    "this morning",
    "two days ago",
    "once",
    "again",
    "last summer",
    "in the evening",
    "on my birthday",
    "for the first time",
)
EXPERIENCED = ("tried", "chose", "picked", "found", "discovered", "tested")
ADVANCED = ("better", "nicer", "stronger")
DECLINED = ("worse", "poorer", "weaker")
