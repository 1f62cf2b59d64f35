"""What two tasks are written from by rules: appointments as recurrence rules, and dialogues of follow-up questions.

Each is drawn by a seed, as many as are asked for; `tasks.py` makes records of them.
"""

import random
import string
from collections.abc import Iterator

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """4207 -> "four thousand two hundred seven" (0 to 999,999)."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = f" {in_words(number % size)}" if number % size else ""
    return f"{in_words(number // size)} {name}{rest}"


# ---------------------------------------------------------------- appointments: words -> RRULE (RFC 5545, 3.3.10)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
PLACES = {"first": "1", "second": "2", "third": "3", "last": "-1"}
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
MINUTES = {"{}": 0, "a quarter past {}": 15, "half past {}": 30}
THINGS = (
    "Water the plants",
    "Call the office",
    "Back up the files",
    "Clean the kitchen",
    "Meet the team",
    "Take out the bins",
    "Check the logs",
    "Feed the fish",
    "Practise the piano",
    "Restart the server",
    "Write the report",
    "Pay the bills",
)


def code(day: str) -> str:
    return day[:2].upper()


def every_few_days(generator: random.Random) -> tuple[str, str]:
    number = generator.randint(1, 9)
    words = {1: "every day", 2: "every other day"}.get(number, f"every {in_words(number)} days")
    return words, "FREQ=DAILY" + (f";INTERVAL={number}" if number > 1 else "")


def every_week(generator: random.Random) -> tuple[str, str]:
    days = sorted(generator.sample(range(7), generator.choice((1, 2))))
    names = [DAYS[day] for day in days]
    words = generator.choice((f"every {' and '.join(names)}", f"on {'s and '.join(names)}s"))
    return words, "FREQ=WEEKLY;BYDAY=" + ",".join(map(code, names))


def every_few_weeks(generator: random.Random) -> tuple[str, str]:
    day, number = generator.choice(DAYS), generator.randint(2, 5)
    words = f"every other {day}" if number == 2 else f"every {in_words(number)} weeks on {day}"
    return words, f"FREQ=WEEKLY;INTERVAL={number};BYDAY={code(day)}"


def every_month(generator: random.Random) -> tuple[str, str]:
    day, place = generator.choice(DAYS), generator.choice(list(PLACES))
    words = f"on the {place} {day} of {generator.choice(('the', 'every', 'each'))} month"
    return words, f"FREQ=MONTHLY;BYDAY={PLACES[place]}{code(day)}"


def every_year(generator: random.Random) -> tuple[str, str]:
    month, day = generator.randrange(12), generator.randrange(len(ORDINALS))
    return (
        f"every year on the {ORDINALS[day]} of {MONTHS[month]}",
        f"FREQ=YEARLY;BYMONTH={month + 1};BYMONTHDAY={day + 1}",
    )


def time_of_day(generator: random.Random) -> tuple[str, str]:
    """6:00 to 22:30; "half past six in the evening" is 18:30."""
    hour, (phrase, minute) = generator.randint(6, 22), generator.choice(list(MINUTES.items()))
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    words = f"at {phrase.format(UNITS[(hour - 1) % 12 + 1])} in the {part}"
    return words, f";BYHOUR={hour}" + (f";BYMINUTE={minute}" if minute else "")


def appointment(generator: random.Random) -> tuple[str, str]:
    """("Call the office every other Friday at six in the evening.", "FREQ=WEEKLY;INTERVAL=2;BYDAY=FR;BYHOUR=18")."""
    makers = (every_few_days, every_week, every_few_weeks, every_month, every_year)
    when, rule = generator.choice(makers)(generator)
    time, hours = time_of_day(generator)
    return f"{generator.choice(THINGS)} {when} {time}.", rule + hours


def appointments(number: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`number` sentences with their rules; no rule comes twice."""
    generator, seen = random.Random(seed), set()
    while len(seen) < number:
        sentence, rule = appointment(generator)
        if rule not in seen:
            seen.add(rule)
            yield sentence, rule


# ---------------------------------------------------------------- dialogues: questions on earlier answers

SERIES = {  # kind -> its members in order; the first two go round
    "day": DAYS,
    "month": MONTHS,
    "number": [in_words(number) for number in range(1, 21)],
    "letter": list(string.ascii_uppercase),
}
ROUND = ("day", "month")
STEPS = {"right after": 1, "right before": -1, "two after": 2, "two before": -2}
FOLLOW_UPS = ("And {} that?", "And what is {} that one?", "Which one is {} that?")
RETURNS = ("And {} the one I asked about first?", "Back to my first question: what is {} that one?")
ASIDES = (("Thanks.", "You are welcome."), ("Good to know.", "What else?"), ("I see.", "Please ask."))


def member(kind: str, index: int) -> str | None:
    """The member at `index`, which goes round for days and months; `None` past an end."""
    members = SERIES[kind]
    if kind in ROUND:
        return members[index % len(members)]
    return members[index] if 0 <= index < len(members) else None


def dialogue(generator: random.Random) -> tuple[tuple[str, ...], tuple, bool]:
    """(contents of user and assistant in turn, what it asks, whether it is sound).

    Three or four questions: the first names a member, the others only "that", the last answer, or "the first one". It
    is sound where no answer is past an end or was said before: the last answer stands nowhere in the dialogue.
    """
    kinds = list(SERIES)
    kind = generator.choices(kinds, [len(SERIES[kind]) for kind in kinds])[0]
    first = now = generator.randrange(len(SERIES[kind]))
    contents, asked, said = [], [kind, first], [member(kind, first)]
    for number in range(generator.randint(3, 4)):
        words, step = generator.choice(list(STEPS.items()))
        back = number > 1 and generator.random() < 0.3
        if number and generator.random() < 0.1:
            contents += generator.choice(ASIDES)
        if number == 0:
            question = f"Which {kind} comes {words} {said[0]}?"
        else:
            question = generator.choice(RETURNS if back else FOLLOW_UPS).format(words)
        now = (first if back else now) + step
        contents += [question, member(kind, now) or ""]
        asked += [back, step]
        said.append(member(kind, now))
    return tuple(contents), tuple(asked), None not in said and len(set(said)) == len(said)


def dialogues(number: int, seed: int = 0) -> Iterator[tuple[tuple[str, ...], tuple]]:
    """`number` dialogues, (contents in turn, what is asked); none asks what another one asks, in other words."""
    generator, seen = random.Random(seed), set()
    while len(seen) < number:
        contents, asked, sound = dialogue(generator)
        if sound and asked not in seen:
            seen.add(asked)
            yield contents, asked
