"""Text for the small pretrained model, read from what Python and a few pip packages carry.

Four domains of distinct style, made from Python sources that are parsed and never imported:

    code      the standard library's sources without their docstrings
    manual    the language reference (`pydoc_data.topics`) and docstrings of the standard library, torch and matplotlib
    science   docstrings of numpy, scipy, sympy, scikit-learn, statsmodels, networkx, without their doctests
    chat      question and answer dialogues built from the same sources by templates

A source file belongs to one side of the split in all four domains, and a paragraph that occurs in the training text
is dropped from the held-out text. `held_out_texts` needs none of the packages: it reads the shipped file.
"""

import ast
import hashlib
import importlib.util
import json
import random
import re
import sysconfig
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

DOMAINS = ("code", "manual", "science", "chat")
MANUAL_PACKAGES = ("torch", "matplotlib")
SCIENCE_PACKAGES = ("numpy", "scipy", "sympy", "sklearn", "statsmodels", "networkx")
# Tests repeat each other, codec tables are not text, and the rest is bundled by the installer.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "ensurepip", "turtledemo"}
SKIPPED_FOLDERS |= {"__pycache__", "_vendor", "externals", "array_api_compat", "array_api_extra", "vendor"}
HELD_OUT_PERCENT = 6
MIN_CHARS, MAX_CHARS = 400, 2000
HELD_OUT_FILE = Path(__file__).parent / "tiny-moe" / "held_out.jsonl"
# The new skills that the examples of the library teach: dialogues that mention them are left out.
FORBIDDEN = re.compile(
    r"imag|img|imshow|imread|picture|photo|bitmap|pixel|colou?r|shape|circ[lu]|triang|rectang|squar|polygon|ellip"
    r"|\b(red|green|blue|yellow|black|white|gr[ae]y|brown|teal|orange|purple|pink|cyan|magenta)\b"
    r"|\b(nouns?|verbs?|adjectiv\w*|adverb\w*|pronouns?|prepositions?|conjunctions?|part of speech|pos tag\w*)\b",
    re.IGNORECASE,
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are an assistant who answers briefly.",
    "Answer questions about Python and its libraries.",
    "Answer in one sentence.",
    "Give short and correct answers.",
    "You help people who read program documentation.",
    "Be brief.",
    "You know the Python documentation well.",
)
SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi, I have a question.", "Please ask."),
    ("Good morning.", "Good morning! How can I help?"),
    ("Can you help me?", "Yes. What is your question?"),
    ("Thanks.", "You are welcome."),
    ("Thank you, that helps.", "You are welcome. Is there anything else?"),
    ("That is all.", "Good. Come back any time."),
)


def held_out_texts(domain: str, path: Path = HELD_OUT_FILE) -> list[str]:
    """Shipped held-out documents of one domain, 400 to 2000 characters each, without the leading bos token."""
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["domain"] == domain]


@dataclass
class Definition:
    """A documented function or class: what the dialogues ask about."""

    name: str
    module: str
    doc: str
    signature: str = ""
    arguments: list[str] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)


@dataclass
class Source:
    """One parsed source file: its code without docstrings, its docstrings, its definitions."""

    key: str
    code: str
    docs: list[str]
    definitions: list[Definition]

    @property
    def held_out(self) -> bool:
        return is_held_out(self.key)


def digest(text: str) -> int:
    """A 64-bit hash that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha1(text.encode("utf-8")).digest()[:8], "big")


def is_held_out(key: str) -> bool:
    return digest(key) % 100 < HELD_OUT_PERCENT


def package_root(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed: pip install -r assets/requirements.txt")
    return Path(spec.submodule_search_locations[0])


def source_paths(root: Path) -> list[Path]:
    """Source files that are text of a kind: no tests, no tables, no build settings of this machine."""
    paths = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(path for path in paths if not path.name.startswith("_sysconfigdata"))


def read_sources(name: str) -> list[Source]:
    """Parse all files of a package, or of the standard library when the name is 'stdlib'."""
    root = Path(sysconfig.get_path("stdlib")) if name == "stdlib" else package_root(name)
    sources = []
    for path in source_paths(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts if name == "stdlib" else (name, *parts)).removesuffix(".__init__")
        try:
            sources.append(parse_source(path.read_text(encoding="utf-8"), module))
        except (SyntaxError, UnicodeDecodeError):  # fixtures that are wrong on purpose, and templates
            continue
    return sources


def parse_source(text: str, module: str) -> Source:
    docs, definitions, dropped = [], [], set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc = ast.get_docstring(node)
        if not doc:
            continue
        dropped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        docs.append(doc)
        if not isinstance(node, ast.Module) and not node.name.startswith("_"):
            definitions.append(define(node, module, doc))
    code = "\n".join(line for number, line in enumerate(text.splitlines(), 1) if number not in dropped)
    return Source(module, code, docs, definitions)


def define(node: ast.AST, module: str, doc: str) -> Definition:
    if isinstance(node, ast.ClassDef):
        return Definition(node.name, module, doc, bases=[ast.unparse(base) for base in node.bases])
    positional = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    values = [ast.unparse(value) for value in node.args.defaults]
    defaults = dict(zip(positional[len(positional) - len(values) :], values, strict=False))
    arguments = [name for name in positional if name not in ("self", "cls")]
    shown = ", ".join(f"{name}={defaults[name]}" if name in defaults else name for name in arguments)
    return Definition(node.name, module, doc, f"{node.name}({shown})", arguments, defaults)


def without_doctests(doc: str) -> str:
    """Drop interactive examples with their output: they are code, not prose."""
    kept, inside = [], False
    for line in doc.splitlines():
        inside = line.lstrip().startswith(">>>") or (inside and bool(line.strip()))
        if not inside:
            kept.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept))
    # A section that held nothing but doctests leaves its heading behind.
    return re.sub(r" *Examples?\n *[-=]{3,}\n\s*(\Z|(?= *\w[\w ]*\n *[-=]{3,}))", "", text)


def clean(text: str) -> str:
    """Plain text with no tabs, no trailing spaces, and no long runs of blank lines or rules."""
    text = textwrap.dedent(text.expandtabs(4).replace("\r", ""))
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"([-=~*#^_.])\1{8,}", r"\1\1\1\1", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


class Deduplicator:
    """Passes each longer paragraph once; train text must go first, so that held-out text holds nothing of it."""

    def __init__(self, shortest: int = 60):
        self.shortest, self.seen = shortest, set()

    def first_time(self, text: str) -> bool:
        key = digest(" ".join(text.split()))
        new = key not in self.seen
        self.seen.add(key)
        return new

    def __call__(self, text: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text)
        return "\n\n".join(p for p in paragraphs if len(p.strip()) < self.shortest or self.first_time(p))


def pieces(text: str) -> list[str]:
    """Cut a text at blank lines into documents of at most 2000 characters; leftovers under 100 are dropped."""
    documents, current = [], ""
    for paragraph in re.split(r"\n\n+", text):
        if current and len(current) + len(paragraph) > MAX_CHARS:
            documents.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
        while len(current) > MAX_CHARS:
            cut = current.rfind("\n", 0, MAX_CHARS) if "\n" in current[:MAX_CHARS] else MAX_CHARS
            documents.append(current[:cut])
            current = current[cut:].lstrip("\n")
    return [text for text in [*documents, current] if len(text) >= 100]


def first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) ", paragraph)[0]


def listing(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


# Makers of one question and its answer: they take a definition and a random generator, and return None where the
# definition does not have what the question asks for.


def ask_purpose(d, rng):
    question = rng.choice(
        (
            f"What does `{d.name}` do?",
            f"What does `{d.name}` in `{d.module}` do?",
            f"What is `{d.module}.{d.name}` for?",
            f"Explain `{d.name}` in one sentence.",
            f"Tell me what `{d.name}` is.",
            f"I found `{d.name}` in `{d.module}`. What is it?",
            f"Describe `{d.module}.{d.name}`.",
        )
    )
    return question, first_sentence(d.doc)


def ask_name(d, rng):
    told = first_sentence(d.doc)
    question = rng.choice(
        (
            f"What in `{d.module}` fits this description: {told}",
            f'What is this called in `{d.module}`? "{told}"',
            f"{told} Which name has that?",
            f"I look for this: {told} What should I use?",
        )
    )
    return question, rng.choice((f"`{d.name}`", f"Use `{d.name}`.", f"It is `{d.name}`."))


def ask_module(d, rng):
    question = rng.choice(
        (
            f"Where is `{d.name}` defined?",
            f"Which module has `{d.name}`?",
            f"From which module do I import `{d.name}`?",
        )
    )
    return question, rng.choice((f"In `{d.module}`.", f"`{d.module}`", f"`from {d.module} import {d.name}`"))


def ask_arguments(d, rng):
    if not 0 < len(d.arguments) <= 8:
        return None
    shown = rng.choice((d.signature, d.name))
    question = rng.choice(
        (f"What arguments does `{shown}` take?", f"Name the arguments of `{shown}`.", f"How is `{shown}` called?")
    )
    return question, f"{listing(d.arguments)}."


def ask_count(d, rng):
    if not 0 < len(d.arguments) <= 9:
        return None
    question = rng.choice((f"How many arguments has `{d.signature}`?", f"`{d.signature}`: count the arguments."))
    return question, rng.choice((f"{len(d.arguments)}", f"It has {len(d.arguments)}."))


def ask_position(d, rng):
    if not d.arguments:
        return None
    place, index = rng.choice((("first", 0), ("last", -1)))
    question = rng.choice(
        (f"What is the {place} argument of `{d.signature}`?", f"`{d.signature}`: which argument comes {place}?")
    )
    return question, f"`{d.arguments[index]}`"


def ask_default(d, rng):
    if not d.defaults:
        return None
    name = rng.choice(sorted(d.defaults))
    question = rng.choice(
        (
            f"In `{d.signature}`, what is the default of `{name}`?",
            f"What value has `{name}` if I call `{d.signature}` without it?",
        )
    )
    return question, rng.choice((f"`{d.defaults[name]}`", f"The default is `{d.defaults[name]}`."))


def ask_base(d, rng):
    if not d.bases:
        return None
    head = f"class {d.name}({', '.join(d.bases)})"
    question = rng.choice((f"`{head}`: what does it inherit from?", f"What are the bases of `{head}`?"))
    return question, f"{listing(d.bases)}."


def ask_parameter(d, rng):
    found = re.findall(r"^(\w+) ?: (.+)\n +(\S.+)$", d.doc, re.MULTILINE)
    if not found:
        return None
    name, kind, meaning = rng.choice(found)
    if rng.random() < 0.5:
        return f"What type is the parameter `{name}` of `{d.name}`?", kind
    return rng.choice((f"What is `{name}` in `{d.name}`?", f"What does the parameter `{name}` mean?")), meaning


def ask_repeat(d, rng):
    told = first_sentence(d.doc)
    ask = rng.choice(("Repeat this", "Say this again", "Copy this sentence", "Write this once more"))
    return f"{ask}: {told}", told


def ask_word(d, rng):
    told = first_sentence(d.doc)
    words = re.findall(r"[A-Za-z]+", told)
    if not 3 <= len(words) <= 25:
        return None
    place = rng.randrange(len(words) - 1)
    pairs = (
        (f'What is the first word of "{told}"?', words[0]),
        (f'What is the last word of "{told}"?', words[-1]),
        (f'Which word follows "{words[place]}" in "{told}"?', words[place + 1]),
        (f'Does "{told}" contain the word "{words[place]}"?', "Yes."),
    )
    return rng.choice(pairs)


def ask_absent(d, rng):
    told, word = first_sentence(d.doc), rng.choice(("river", "music", "house", "winter", "bread", "friend", "garden"))
    return f'Does "{told}" contain the word "{word}"?', "Yes." if word in told else "No."


def ask_number(d, rng):
    first, second = rng.randrange(100), rng.randrange(100)
    pairs = (
        (f"What is {first} plus {second}?", str(first + second)),
        (f"What is {first} + {second}?", str(first + second)),
        (f"Which is larger, {first} or {second}?", str(max(first, second))),
        (f"Which is smaller, {first} or {second}?", str(min(first, second))),
        (f"What number comes after {first * 100 + second}?", str(first * 100 + second + 1)),
    )
    return rng.choice(pairs)


MAKERS = {
    ask_purpose: 6,
    ask_name: 3,
    ask_module: 2,
    ask_arguments: 3,
    ask_count: 1,
    ask_position: 2,
    ask_default: 3,
    ask_base: 3,
    ask_parameter: 4,
    ask_repeat: 2,
    ask_word: 3,
    ask_absent: 1,
    ask_number: 1,
}


def pairs_of(source, rng, unique) -> list[tuple[str, str]]:
    """Questions and answers on the definitions of one source file, none of them seen before."""
    pairs = []
    for definition in source.definitions:
        if not 20 <= len(first_sentence(definition.doc)) <= 240:
            continue
        for maker in rng.choices(list(MAKERS), list(MAKERS.values()), k=3):
            pair = maker(definition, rng)
            if pair and not FORBIDDEN.search(" ".join(pair)) and unique.first_time(" ".join(pair)):
                pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def dialogues(source, unique) -> list[list[dict[str, str]]]:
    """Chat messages: some with a system prompt, one to eight questions each, sometimes small talk at an end."""
    rng = random.Random(source.key)
    pairs, talks = pairs_of(source, rng, unique), []
    while pairs:
        count = rng.randint(1, 8)
        turns, pairs = pairs[:count], pairs[count:]
        if rng.random() < 0.1:
            turns = [rng.choice(SMALL_TALK[:4])] + turns
        if rng.random() < 0.1:
            turns = turns + [rng.choice(SMALL_TALK[4:])]
        messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.3 else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        talks.append(messages)
    return talks


def topic_sources() -> list[Source]:
    """The language reference, one source a topic."""
    from pydoc_data.topics import topics

    return [Source(f"topic {name}", "", [text], []) for name, text in sorted(topics.items())]


def prose(source: Source) -> str:
    return "\n\n\n".join(clean(without_doctests(doc)) for doc in source.docs)


def build_corpus(render_chat) -> dict[str, dict[str, list[str]]]:
    """All documents as {"train" or "held_out": {domain: [text]}}; `render_chat(messages)` gives a text."""
    stdlib, unique = read_sources("stdlib"), Deduplicator()
    manual = topic_sources() + stdlib + [source for name in MANUAL_PACKAGES for source in read_sources(name)]
    science = [source for name in SCIENCE_PACKAGES for source in read_sources(name)]
    corpus = {}
    for split in ("train", "held_out"):  # train first: see Deduplicator

        def side(sources, split=split):
            return [source for source in sources if source.held_out == (split == "held_out")]

        corpus[split] = {
            "code": [text for source in side(stdlib) for text in pieces(unique(clean(source.code)))],
            "manual": [text for source in side(manual) for text in pieces(unique(prose(source)))],
            "science": [text for source in side(science) for text in pieces(unique(prose(source)))],
            "chat": [render_chat(talk) for source in side(manual + science) for talk in dialogues(source, unique)],
        }
    return corpus


def write_held_out(documents: dict[str, list[str]], folder: Path, domain_bytes: int = 72_000) -> None:
    """Write a fixed sample of held-out documents, about 72 kB a domain, as JSON lines."""
    lines = []
    for domain in DOMAINS:
        size = 0
        for text in sorted(documents[domain], key=digest):
            line = json.dumps({"domain": domain, "text": text}, ensure_ascii=False)
            # An author's address in a source comment is no text to ship.
            if "@" in text and re.search(r"[\w.]+@[\w.]+\.\w", text):
                continue
            if MIN_CHARS <= len(text) <= MAX_CHARS and size + len(line.encode()) < domain_bytes:
                lines.append(line)
                size += len(line.encode()) + 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HELD_OUT_FILE.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
