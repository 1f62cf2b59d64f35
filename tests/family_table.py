"""The table of families in docs/families.md, made from what attaching really does: `make families` writes it.

Each family is built and extended, alone and in its multimodal model; the table says by which rule it routes, which
tensors a new expert adds to its router, and where a family is refused, why.
"""

import sys
from pathlib import Path

import transformers
from families import FAMILIES, make_family, variants_of
from plain_routing import ROUTING

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.families_moextend import find_moe_layers

PAGE = Path(__file__).parent.parent / "docs/families.md"
START, END = "<!-- families -->\n", "<!-- /families -->"


def attach(name, variant=None):
    """Names of the router tensors that one new expert adds.

    Raises:
        ValueError: the family's refusal.
    """
    base = make_family(name, variant)
    plan = {max(find_moe_layers(base.get_decoder())): [0]}
    model = MoExtendForCausalLM.from_base(base, plan, scope="all", selection="compete", calibration="none")
    return tuple(key.split(".router.")[1] for key in model.adapter_tensors() if ".router." in key)


def supported():
    """(family -> router tensors of a new expert, family -> refusal)."""
    tensors, refusals = {}, {}
    for name in sorted(FAMILIES):
        try:
            tensors[name] = attach(name)
            if "multimodal" in variants_of(name):
                assert attach(name, "multimodal") == tensors[name], f"{name} differs inside its multimodal model"
        except ValueError as error:
            refusals[name] = error
    return tensors, refusals


def table():
    """Markdown: a row for each rule, then the refused families."""
    tensors, refusals = supported()
    rows = {}
    for name, added in tensors.items():
        rule = ROUTING[name]
        row = rule.words, f"`{rule.rows}`", ", ".join(map("`{}`".format, added)), "yes" if rule.groups else ""
        rows.setdefault(row, []).append(f"{name}\\*" if FAMILIES[name].whole else name)
    lines = [
        "| rule | its rows | a new expert adds | groups | families that can be extended |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {' | '.join(row)} | {', '.join(names)} |"
        for row, names in sorted(rows.items(), key=lambda row: -len(row[1]))
    ]
    lines += ["", f"{len(tensors)} of {len(FAMILIES)} families; \\* also as, or only as, a multimodal model.", ""]
    lines += ["| refused | why |", "|---|---|"]
    lines += [f"| {name} | {FAMILIES[name].why} |" for name in refusals]
    return "\n".join(lines) + "\n"


def main():
    transformers.logging.set_verbosity_error()
    before, rest = PAGE.read_text().split(START)
    text = before + START + table() + END + rest.split(END)[1]
    changed = text != PAGE.read_text()
    PAGE.write_text(text)
    print(f"{PAGE}: {'written anew' if changed else 'unchanged'}", file=sys.stderr)


if __name__ == "__main__":
    main()
