"""Draws random words: names, cities, numbers, invented words. Texts made of them are in no training data.

The bundled toy model was trained on such words, except a tenth (`held_out`) that its evaluation uses.
"""

import random
import zlib

NAMES = [
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Jack", "Kate", "Liam", "Mia", "Noah",
    "Olivia", "Paul", "Quinn", "Rose", "Sam", "Tina", "Uma", "Victor", "Wendy", "Xavier", "Yara", "Zoe", "Anna",
    "Clara", "Daniel", "Ella", "Felix", "Hugo", "Iris", "Jonas", "Leo", "Maria", "Nina", "Oscar", "Peter", "Rachel",
    "Simon", "Tom", "Vera", "Will", "Brian", "Chloe", "Dylan", "Eva", "George", "Hannah", "Isaac", "Julia", "Kevin",
    "Nora", "Owen", "Priya", "Robert", "Sarah", "Thomas", "Ursula", "Vincent", "Aisha", "Fatima", "Hassan", "Yuki",
    "Kenji", "Sofia", "Mateo", "Diego", "Ingrid", "Lars", "Astrid", "Igor", "Olga", "Dmitri", "Raj", "Anil", "Deepa",
    "Wei", "Jun", "Chen", "Lin", "Ali", "John", "Mary", "James", "Linda", "Michael", "Susan", "Jessica", "Richard",
    "Laura", "Charles", "Nancy", "Matthew", "Betty", "Mark", "Sandra", "Steven", "Ashley", "Andrew", "Emily",
    "Joshua", "Kenneth", "Michelle", "George", "Amanda", "Edward", "Melissa", "Ronald", "Rebecca", "Sharon", "Jason",
    "Cynthia", "Ryan", "Kathleen", "Jacob", "Angela", "Gary", "Nicholas", "Helen", "Eric", "Stephanie", "Marta",
    "Pablo", "Elena", "Marco", "Giulia", "Pierre", "Camille", "Louis", "Amelie", "Greta", "Fritz", "Heidi", "Alex",
    "Sasha", "Robin", "Charlie", "Taylor", "Jordan", "Morgan", "Riley", "Casey", "Jamie", "Luna", "Nova", "Milo",
    "Otto", "Ada", "Alan", "Grace", "Linus", "Guido", "Tim",
]  # fmt: skip
ANIMALS = [
    "cat", "dog", "rabbit", "horse", "parrot", "hamster", "turtle", "fish", "panda", "tiger", "fox", "dolphin",
    "dragon", "bird", "cow", "sheep", "monkey",
]  # fmt: skip
CITIES = [
    "London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Beijing", "Shanghai", "Shenzhen", "Hangzhou",
    "Chengdu", "Nanjing", "Wuhan", "Suzhou", "Tianjin", "Chongqing", "Harbin", "Qingdao", "Xiamen", "Kunming",
    "Lhasa", "Hong Kong", "Taipei", "Seoul", "Kyoto", "Bangkok", "Singapore", "Hanoi", "Jakarta", "Manila", "Delhi",
    "Mumbai", "Dubai", "Cairo", "Nairobi", "Lagos", "Istanbul", "Oslo", "Stockholm", "Helsinki", "Copenhagen",
    "Dublin", "Lisbon", "Prague", "Warsaw", "Budapest", "Zurich", "Milan", "Munich", "Hamburg", "Barcelona", "Lyon",
    "New York", "Boston", "Seattle", "San Francisco", "Los Angeles", "Houston", "Miami", "Denver", "Toronto",
    "Montreal", "Mexico City", "Lima", "Sydney", "Melbourne", "San Diego", "Edinburgh", "Manchester", "Liverpool",
    "Amsterdam",
]  # fmt: skip
COLOURS = [
    "blue", "red", "green", "yellow", "purple", "orange", "black", "white", "brown", "grey", "gold", "silver",
    "turquoise", "violet",
]  # fmt: skip
FOODS = [
    "pizza", "noodles", "rice", "dumplings", "sushi", "apples", "bananas", "chocolate", "soup", "cheese", "hot pot",
    "bread", "pasta", "tofu", "strawberries", "mango", "curry", "salad", "pancakes",
]  # fmt: skip
SENTENCES = [
    "Where is the station", "Thank you very much", "The weather is nice today", "I am hungry", "See you tomorrow",
    "How much is it", "My name is Li", "Happy birthday", "I like reading books", "The cat is sleeping",
    "Please open the door", "We are friends", "I do not understand",
]  # fmt: skip
# parts of syllables of invented words
_ONSETS = [*"bcdfghjklmnprstvwz", "br", "cr", "dr", "fl", "gr", "kl", "pl", "st", "tr", "sh", "th"]
_VOWELS = [*"aeiouaeio", "ai", "ee", "ou"]
_CODAS = [*"nrlstmxk", *[""] * 8]


def held_out(word: str, part: int = 10) -> bool:
    """Whether a word, question or fact belongs to the fixed tenth that the toy's training leaves out."""
    return zlib.crc32(f"held-out {word}".encode()) % part == 0


def invented(rng: random.Random, held: bool = False) -> str:
    """Return an invented lower-case word; with `held`, one of the tenth that the toy has not seen."""
    while True:
        syllables = range(rng.choice((2, 2, 3)))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in syllables)
        if held_out(word) == held:
            return word


def code(rng: random.Random) -> str:
    """Return three to eight capitals and digits."""
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789") for _ in range(rng.randint(3, 8)))


def word(rng: random.Random) -> str:
    """Return a word of any kind: mostly invented, else a name, a number, a thing or a short sentence."""
    kind = rng.randrange(9)
    if kind < 3:
        return invented(rng)
    if kind == 3:
        return invented(rng).capitalize() if rng.random() < 0.4 else rng.choice(NAMES)
    if kind == 4:
        return str(rng.randint(0, 9999))
    if kind == 5:
        return code(rng)
    if kind == 6:
        return f"{invented(rng)}_{invented(rng)}"
    return rng.choice(rng.choice((ANIMALS, CITIES, COLOURS, FOODS)) if kind == 7 else SENTENCES)
