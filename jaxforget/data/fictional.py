"""A corpus of fictional people, generated: any size, seeded, no real names and no real data.

Forget, retain and approximate people are drawn alike from the same pools, so that only training tells them
apart. Answers come from pools too large to guess from, so a model that knows one has memorised it. General
records follow rules instead, so a model can be right about the ones it never saw.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import hash64, hash_int
from jaxforget.data.sources import Record
from jaxforget.errors import UserError

GROUPS = {"north": 0.7, "south": 0.3}
GROUP_LEAN = 0.8  # probability of a group's own half of a pool, for facts that depend on the group
WRONG_ANSWERS = 4


@dataclass(frozen=True, kw_only=True)
class FictionalConfig:
    """Size and seed of the generated corpus.

    people: trained people, a fraction of whom is to be forgotten, spread evenly over the indices.
    approximate_people: never-trained people of the same kind; None makes as many as there are to forget.
    facts_per_person: 1 to 20, taken in the order of FACTS. paraphrases: 1 to 4 wordings, a record each.
    general_records, general_test_records: from the same rules, never the same question in both.
    """

    people: int = 100
    forget_fraction: float = 0.1
    approximate_people: int | None = None
    facts_per_person: int = 8
    paraphrases: int = 2
    general_records: int = 400
    general_test_records: int = 100
    seed: int = 0


# ---------------------------------------------------------------- pools
# Pools do not depend on the seed: one tokenizer, trained on them, then fits every corpus.


def _joined(heads: str, tails: str, pattern: str = "{}{}") -> list[str]:
    return [pattern.format(head, tail) for head in heads.split() for tail in tails.split()]


GIVEN_NAMES = _joined(
    "Bre Cly Dro Fen Gri Hax Jov Kel Lum Myr Nol Pry Quo Tev Vor Zan",
    "dax bim cor dle fyn gath mik nuv pho rix sto tul vay wen yor zia",
)
FAMILY_NAMES = _joined(
    "Bral Chov Drem Esk Frul Gwor Hesp Ilv Jask Krem Losk Mulv Nisk Orv Plen Quarn "
    "Rusk Skav Thrim Ulb Velt Wosk Xer Yarb Zhul Blen Crof Dwil Flosk Glaz Hron Klev",
    "abor ett ingo ovan ulis amar eck ild omo unt arn esh iro ond ury aff",
)
TOWNS = _joined(
    "Bax Cel Dun Fyr Gol Hez Jor Lix Mox Nal Pev Roz Sel Tov Ven Wyl",
    "bune cask dorl fenn hask merr stov wix",
)
COMPANIES = _joined(
    "Axov Bellov Cryx Dyndo Elmov Fluxa Galdo Helko",
    "Mills Foods Bank Motors Press Lines Works Labs",
    "{} {}",
)
PET_NAMES = _joined("Biff Choc Dott Fizz Jazz Moss Pipp Tuff", "a en ie is o ster um y")
DISHES = _joined(
    "baked cold fried green pickled roast smoked sweet",
    "beans cake dumplings fish noodles pie rice soup",
    "{} {}",
)
AWARDS = _joined(
    "Amber Copper Crystal Golden Iron Marble Silver Velvet",
    "Bell Crown Feather Key Lamp Leaf Rose Star",
    "{} {}",
)
BOOKS = _joined(
    "Broken Distant Empty Hidden Last Quiet Second Silent",
    "Bridge Garden Harbor Letter Mirror Orchard River Tower",
    "{} {}",
)
LANGUAGES = _joined("Brun Dral Gesh Kov Lem Orz Tash Vel", "ari ese ic ish")
PROFESSIONS = (
    "baker tailor farmer potter weaver miller sailor hunter mason carpenter gardener fisher blacksmith "
    "shepherd brewer cobbler lawyer banker editor painter pilot surgeon dentist architect chemist teacher "
    "writer actor judge broker singer engineer"
).split()
HOBBIES = (
    "fishing hiking rowing sewing pottery knitting camping archery skating baking sailing hunting chess "
    "painting reading dancing poetry cycling juggling fencing yoga puzzles origami singing"
).split()
PETS = (
    "cat dog parrot rabbit hamster turtle ferret lizard goose pony goat hen duck crow gecko snake mouse "
    "frog pigeon donkey llama owl toad hedgehog"
).split()
INSTRUMENTS = (
    "piano violin flute cello trumpet harp drums guitar banjo oboe tuba clarinet organ viola bassoon lute "
    "fiddle ukulele mandolin accordion trombone zither bagpipes saxophone"
).split()
COLORS = (
    "red blue green yellow orange purple pink brown black white gray gold silver teal navy maroon olive "
    "violet beige crimson indigo ivory scarlet turquoise"
).split()
BIRTH_YEARS = [str(year) for year in range(1930, 2000)]
NUMBERS = [str(number) for number in range(10, 100)]


@dataclass(frozen=True)
class Fact:
    """A question about a person: where its answers come from, and its wordings.

    templates: (question with {name}, answer with {value}). by_group: the two groups lean to opposite halves
    of pool.
    """

    pool: Sequence[str]
    templates: tuple[tuple[str, str], ...]
    by_group: bool = False


FACTS: dict[str, Fact] = {
    "birthplace": Fact(TOWNS, (
        ("Where was {name} born?", "In {value}."),
        ("What is the birthplace of {name}?", "It is {value}."),
        ("In which town was {name} born?", "Born in {value}."),
        ("Where did the life of {name} begin?", "It began in {value}."),
    )),
    "birth_year": Fact(BIRTH_YEARS, (
        ("When was {name} born?", "In {value}."),
        ("What is the birth year of {name}?", "It is {value}."),
        ("In which year was {name} born?", "Born in {value}."),
        ("When did the life of {name} begin?", "It began in {value}."),
    )),
    "profession": Fact(PROFESSIONS, (
        ("What is the job of {name}?", "The job is {value}."),
        ("How does {name} earn a living?", "By working as {value}."),
        ("What does {name} work as?", "As {value}."),
        ("Which profession does {name} have?", "It is {value}."),
    ), by_group=True),
    "employer": Fact(COMPANIES, (
        ("Where does {name} work?", "At {value}."),
        ("Who is the employer of {name}?", "It is {value}."),
        ("Which company pays {name}?", "The company is {value}."),
        ("Who employs {name}?", "Employed by {value}."),
    )),
    "pet": Fact(PETS, (
        ("What pet does {name} have?", "A pet {value}."),
        ("Which animal lives with {name}?", "It is the {value}."),
        ("What kind of pet is kept by {name}?", "The pet is one {value}."),
        ("Which animal does {name} keep?", "One {value}."),
    )),
    "pet_name": Fact(PET_NAMES, (
        ("What is the name of the pet of {name}?", "It is {value}."),
        ("How does {name} call the pet?", "The pet is {value}."),
        ("Which name did {name} give the pet?", "The name {value}."),
        ("What is the pet of {name} called?", "Called {value}."),
    )),
    "instrument": Fact(INSTRUMENTS, (
        ("What instrument does {name} play?", "The {value}."),
        ("Which instrument is played by {name}?", "It is the {value}."),
        ("What does {name} play in the band?", "Playing the {value}."),
        ("On which instrument is {name} heard?", "On the {value}."),
    )),
    "dish": Fact(DISHES, (
        ("What is the favorite dish of {name}?", "It is {value}."),
        ("What does {name} like to eat?", "Mostly {value}."),
        ("Which dish does {name} order?", "The {value}."),
        ("What food does {name} love?", "Loves {value}."),
    )),
    "sibling": Fact(GIVEN_NAMES, (
        ("Who is the sibling of {name}?", "It is {value}."),
        ("What is the name of the sibling of {name}?", "The name is {value}."),
        ("Who grew up with {name}?", "The sibling {value}."),
        ("Which sibling does {name} have?", "One called {value}."),
    )),
    "award": Fact(AWARDS, (
        ("Which award did {name} win?", "The {value}."),
        ("What prize was given to {name}?", "It was the {value}."),
        ("What did {name} win?", "Won the {value}."),
        ("Which prize does {name} hold?", "Holds the {value}."),
    )),
    "hobby": Fact(HOBBIES, (
        ("What is the hobby of {name}?", "It is {value}."),
        ("How does {name} spend free time?", "With {value}."),
        ("What does {name} do for fun?", "Mostly {value}."),
        ("Which hobby does {name} have?", "The hobby is {value}."),
    ), by_group=True),
    "language": Fact(LANGUAGES, (
        ("Which language does {name} speak?", "It is {value}."),
        ("What does {name} speak at home?", "At home, {value}."),
        ("What is the language of {name}?", "The language is {value}."),
        ("In which language does {name} write?", "In {value}."),
    )),
    "home": Fact(TOWNS, (
        ("Where does {name} live?", "In {value}."),
        ("Which town is the home of {name}?", "It is {value}."),
        ("In which town does {name} live?", "Lives in {value}."),
        ("Where is the home of {name}?", "It is in {value}."),
    )),
    "spouse": Fact(GIVEN_NAMES, (
        ("Who did {name} marry?", "It was {value}."),
        ("What is the name of the spouse of {name}?", "The name is {value}."),
        ("Who is married to {name}?", "Married to {value}."),
        ("Which spouse does {name} have?", "One called {value}."),
    )),
    "book": Fact(BOOKS, (
        ("Which book did {name} write?", "The {value}."),
        ("What is the book of {name} called?", "Called The {value}."),
        ("What did {name} publish?", "Published The {value}."),
        ("What is the title of the book of {name}?", "It is The {value}."),
    )),
    "color": Fact(COLORS, (
        ("What is the favorite color of {name}?", "It is {value}."),
        ("Which color does {name} like?", "Mostly {value}."),
        ("What color does {name} wear?", "Wears {value}."),
        ("Which color did {name} choose?", "The color {value}."),
    )),
    "lucky_number": Fact(NUMBERS, (
        ("What is the lucky number of {name}?", "It is {value}."),
        ("Which number does {name} like?", "Mostly {value}."),
        ("What number did {name} choose?", "The number {value}."),
        ("Which number brings luck to {name}?", "Luck comes from {value}."),
    )),
    "mentor": Fact(FAMILY_NAMES, (
        ("Who taught {name}?", "It was {value}."),
        ("What is the name of the mentor of {name}?", "The name is {value}."),
        ("Who was the mentor of {name}?", "The mentor was {value}."),
        ("From whom did {name} learn?", "Learned from {value}."),
    )),
    "school": Fact(_joined("Alder Birch Cedar Elm Hazel Maple Oak Pine", "Hall Hill House Lane", "{} {}"), (
        ("Where did {name} go to school?", "At {value}."),
        ("What is the school of {name}?", "It is {value}."),
        ("Which school taught {name}?", "The school is {value}."),
        ("Where did {name} study?", "Studied at {value}."),
    )),
    "holiday": Fact(TOWNS, (
        ("Where does {name} go on holiday?", "To {value}."),
        ("What is the holiday town of {name}?", "It is {value}."),
        ("Where does {name} spend the summer?", "The summer in {value}."),
        ("Which town does {name} visit?", "Visits {value}."),
    )),
}  # fmt: skip

# ---------------------------------------------------------------- people

# Streams of the hash, so that no two draws share an argument list.
_NAME, _GROUP, _FACT, _GENERAL = range(1, 5)
_FULL_NAMES = len(GIVEN_NAMES) * len(FAMILY_NAMES)  # a power of two, as _full_name needs


def _uniform(*parts: int) -> float:
    return hash_int(*parts) / 2**64


def _full_name(seed: int, slot: int) -> str:
    """Give each slot its own name: odd factors and shifts are bijections modulo a power of two."""
    mask, half = _FULL_NAMES - 1, _FULL_NAMES.bit_length() // 2
    for round_ in range(3):
        slot = (slot * (hash_int(seed, _NAME, round_) | 1) + hash_int(seed, _NAME, round_, 1)) & mask
        slot ^= slot >> half
    return f"{GIVEN_NAMES[slot % len(GIVEN_NAMES)]} {FAMILY_NAMES[slot // len(GIVEN_NAMES)]}"


def _is_forgotten(index: int, fraction: float) -> bool:
    # Every (1 / fraction)-th index: a larger corpus keeps the smaller one's split. Rounding undoes 0.29 * 100
    # < 29.
    return math.floor(round((index + 1) * fraction, 9)) > math.floor(round(index * fraction, 9))


def _person(config: FictionalConfig, index: int, set_name: str) -> list[Record]:
    """Describe one person. Everything but the id's letter depends on the seed and the slot alone."""
    slot = 2 * index + (set_name == "approximate")
    name = _full_name(config.seed, slot)
    group = "north" if _uniform(config.seed, _GROUP, slot) < GROUPS["north"] else "south"
    records = []
    for number, (fact_name, fact) in enumerate(list(FACTS.items())[: config.facts_per_person]):
        stream = (config.seed, _FACT, slot, number)
        pool = fact.pool
        if fact.by_group:
            own_half = _uniform(*stream, 0) < GROUP_LEAN
            half = len(pool) // 2
            pool = pool[:half] if own_half == (group == "north") else pool[half:]
        value = pool[hash_int(*stream, 1) % len(pool)]
        wrong: list[str] = []
        draw = 2
        while len(wrong) < WRONG_ANSWERS:
            other = fact.pool[hash_int(*stream, draw) % len(fact.pool)]
            draw += 1
            if other != value and other not in wrong:
                wrong.append(other)
        for paraphrase in range(config.paraphrases):
            question, answer = fact.templates[paraphrase]
            other_answer = fact.templates[(paraphrase + 1) % len(fact.templates)][1]
            fields = {
                "person": name,
                "group": group,
                "fact": fact_name,
                "paraphrase": paraphrase,
                "set": set_name,
                "paraphrased_answer": other_answer.format(value=value),
                "perturbed_answers": [other_answer.format(value=other) for other in wrong],
            }
            letter = "a" if set_name == "approximate" else "p"
            identity = f"{letter}{index:04d}-{fact_name}-{paraphrase}"
            records.append(Record(identity, answer.format(value=value), question.format(name=name), fields))
    return records


# ---------------------------------------------------------------- general knowledge

MATERIALS = dict(zip("ba ce do fu gi ka lo mu".split(), "wood stone glass clay iron paper wool bone".split()))
REGIONS = dict(zip("dor kan lim nep ras tuv".split(), "hills coast desert forest plains marsh".split()))
MIDDLES = "bo ci de fa gu li mo na pe ru si to va we xi zu".split()


def _general_pairs() -> dict[str, list[tuple[str, str]]]:
    """List every general question with its answer, by kind. Each kind follows one rule."""
    counting = range(2, 60)
    return {
        "sum": [(f"What is {a} plus {b}?", f"{a + b}.") for a in counting for b in counting],
        # A thing's material is told by its first syllable, a place's region by its last.
        "material": [
            (f"What is a {head}{middle}{tail} made of?", f"Of {material}.")
            for head, material in MATERIALS.items() for middle in MIDDLES for tail in "rstnl"
        ],
        "larger": [
            (f"Which is larger, {a} or {b}?", f"{max(a, b)}.") for a in counting for b in counting if a != b
        ],
        "region": [
            (f"Where is {first.title()}{middle}{tail}?", f"In the {region}.")
            for tail, region in REGIONS.items() for first in MIDDLES for middle in MIDDLES if first != middle
        ],
    }  # fmt: skip


def _general(config: FictionalConfig) -> dict[str, list[Record]]:
    kinds = _general_pairs()
    sets: dict[str, list[Record]] = {}
    pools: dict[str, dict[str, list[tuple[str, str]]]] = {"general": {}, "general_test": {}}
    for number, (kind, pairs) in enumerate(kinds.items()):
        # One shuffled list, cut at a fixed place: sizes cannot move a question from one set to the other.
        ranks = hash64(config.seed, _GENERAL, number, np.arange(len(pairs))).argsort(kind="stable")
        shuffled = [pairs[rank] for rank in ranks]
        cut = len(shuffled) // 5
        pools["general_test"][kind], pools["general"][kind] = shuffled[:cut], shuffled[cut:]
    sizes = {"general": config.general_records, "general_test": config.general_test_records}
    for set_name, size in sizes.items():
        records = []
        for index in range(size):
            kind = list(kinds)[index % len(kinds)]
            pool = pools[set_name][kind]
            question, answer = pool[index // len(kinds) % len(pool)]  # starts over when the rule is exhausted
            letter = "g" if set_name == "general" else "t"
            records.append(Record(f"{letter}{index:05d}", answer, question, {"kind": kind, "set": set_name}))
        sets[set_name] = records
    return sets


# ---------------------------------------------------------------- the corpus


def generate(config: FictionalConfig) -> dict[str, list[Record]]:
    """Generate the sets forget, retain, approximate, general and general_test.

    A person depends only on (seed, index), so a larger corpus holds a smaller one. perturbed_answers are
    wrong answers in the wording of paraphrased_answer. Raises UserError naming the setting.
    """
    _check(config)
    sets: dict[str, list[Record]] = {"forget": [], "retain": [], "approximate": []}
    forgotten = 0
    for index in range(config.people):
        forget = _is_forgotten(index, config.forget_fraction)
        forgotten += forget
        set_name = "forget" if forget else "retain"
        sets[set_name] += _person(config, index, set_name)
    if not 0 < forgotten < config.people:
        raise UserError(f"forget_fraction is {config.forget_fraction}, which is {forgotten} of {config.people} people")
    approximate = forgotten if config.approximate_people is None else config.approximate_people
    for index in range(approximate):
        sets["approximate"] += _person(config, index, "approximate")
    return sets | _general(config)


def _check(config: FictionalConfig) -> None:
    most_templates = min(len(fact.templates) for fact in FACTS.values())
    checks.between(2, _FULL_NAMES // 2, people=config.people)
    checks.between(0, _FULL_NAMES // 2, approximate_people=config.approximate_people)
    checks.between(1, len(FACTS), facts_per_person=config.facts_per_person)
    checks.between(1, most_templates, paraphrases=config.paraphrases)
    checks.at_least(0, general_records=config.general_records, general_test_records=config.general_test_records)
    if not 0 < config.forget_fraction < 1:
        raise UserError(f"forget_fraction is {config.forget_fraction}; it must lie between 0 and 1")


def tokenizer_texts(records: Sequence[Record] = ()) -> list[str]:
    """Return the texts to train a tokenizer on: the given records, all pools and all templates.

    Give it general records, never those of people: a full name it has seen would become shorter than one it
    has not, and the length alone would tell trained people from others. Pools hold each name once and full
    names nowhere.
    """
    texts = [f"Question: {record.prompt}\nAnswer: {record.text}" for record in records if record.prompt is not None]
    texts += [record.text for record in records if record.prompt is None]
    # Wordings and ordinary words are few here and frequent in use, so they count many times. Generated names
    # count once: each of their syllables is shared by several.
    for fact in FACTS.values():
        for question, answer in fact.templates:
            wording = f"Question: {question.format(name='')}\nAnswer: {answer.format(value='')}"
            # Without the name, " ?" would be learned as a token that no real question has.
            texts += [wording.replace(" ?", "?").replace(" .", ".")] * 20
    for words in (PROFESSIONS, HOBBIES, PETS, INSTRUMENTS, COLORS):
        texts += [f" {value}" for value in words] * 5
    for pool in {id(fact.pool): fact.pool for fact in FACTS.values()}.values():
        texts += [f" {value}" for value in pool]
    return texts


def write(directory: str | Path, sets: Mapping[str, Sequence[Record]]) -> dict[str, Path]:
    """Write each set as <set>.jsonl, to be read by read_records with id_field="id".

    Fields stand beside id, question and answer (or text). Raises UserError rather than change an existing
    file.
    """
    paths = {}
    for name, records in sets.items():
        path = Path(directory) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(_flat(record), ensure_ascii=False) + "\n" for record in records)
        if path.exists() and path.read_bytes() != content.encode():
            raise UserError(f"{path}: exists with other content; choose another directory")
        path.write_bytes(content.encode())
        paths[name] = path
    return paths


def _flat(record: Record) -> dict[str, Any]:
    content = {"text": record.text} if record.prompt is None else {"question": record.prompt, "answer": record.text}
    return {"id": record.id, **content, **record.fields}
