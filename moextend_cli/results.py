"""The results of the commands, printed for people."""

import json
from typing import Any

from .terminal import Terminal


def show_inspect(console: Terminal, result: dict[str, Any]) -> None:
    console.say(f"{result['adapter']} (format {result['format']}, {', '.join(result['files'])})")
    for role in ("base", "encoder", "audio_encoder"):
        if result.get(role) is not None:
            part = result[role]
            location = f"{part['subfolder']}/ in this checkpoint" if part["subfolder"] else part["name_or_path"]
            revision = f" at {part['revision']}" if part["revision"] and not part["subfolder"] else ""
            console.say(f"{role.replace('_', ' ')}: {location}{revision} ({part['model_type']})")
    console.say(", ".join(f"{name} {result[name]}" for name in ("scope", "selection", "calibration")))
    if result["deltas"]:
        ranks = (f"{kind} ({f'rank {rank}' if rank else 'whole'})" for kind, rank in result["deltas"].items())
        console.say(f"deltas of {', '.join(ranks)}")
    if result["expert_rank"] is not None:
        console.say(f"new experts of rank {result['expert_rank']}: each is its source expert and a low-rank delta")
    if result["gate_threshold"] is not None:
        console.say(f"gate threshold {result['gate_threshold']}")
    if result["not_finite"]:
        console.say(f"NaN or infinity in {', '.join(result['not_finite'])}")
    lines = [
        [entry["layer"], " ".join(map(str, entry["source_experts"])), *sizes(entry)] for entry in result["layers"]
    ]
    lines += [[entry["part"], "", *sizes(entry)] for entry in result["others"]] + [["all", "", *sizes(result)]]
    console.table(["layer", "source experts", "tensors", "parameters", "bytes"], lines)


def show_inspect_all(console: Terminal, result: dict[str, Any]) -> None:
    show_inspect(console, result)
    lines = [[entry["name"], entry["dtype"], " x ".join(map(str, entry["shape"]))] for entry in result["tensors"]]
    console.table(["tensor", "dtype", "shape"], lines)


def sizes(entry: dict[str, Any]) -> list[str]:
    return [f"{entry[name]:,}" for name in ("num_tensors", "num_parameters", "num_bytes")]


def show_verify(console: Terminal, result: dict[str, Any]) -> None:
    lines = [["ok" if check["ok"] else "FAILED", check["check"], check["detail"]] for check in result["checks"]]
    console.table(["", "check", result["adapter"]], lines, allowed="\n")
    for name, text in (result["sample"] or {}).items():
        console.say(f"{name}: {text}", allowed="\n\t")


def show_diff(console: Terminal, result: dict[str, Any]) -> None:
    if result["equal"]:
        console.say("equal: config and every tensor, bit by bit")
        return
    names = result["adapters"]
    lines = [[entry["entry"], *map(short, entry["values"])] for entry in result["config"]]
    lines += [[entry["name"], *map(short, entry["values"])] for entry in result["shapes"]]
    lines += [[name, "is there", ""] for name in result["only_in"][0]]
    lines += [[name, "", "is there"] for name in result["only_in"][1]]
    console.table(["entry or tensor", *names], lines)
    lines = [
        [entry["name"], number(entry["max_abs"]), number(entry["relative"])]
        for entry in result["tensors"]
        if not entry["equal"]
    ]
    console.table(["tensor", "max |a - b|", "|a - b| / |a|"], lines)
    console.say(
        f"{len(result['tensors']) - len(lines)} of {len(result['tensors'])} tensors in both are equal, bit by bit"
    )


def short(value: object, length: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def show_merge(console: Terminal, result: dict[str, Any]) -> None:
    console.say(
        f"{result['folder']}: a {result['kind']} checkpoint, {result['files']} files, {result['bytes']:,} bytes"
    )


def show_compress(console: Terminal, result: dict[str, Any]) -> None:
    lines = [[entry["layer"], number(entry["relative"]), number(entry["max_abs"])] for entry in result["layers"]]
    console.table(["layer", "|error| / |difference to the source|", "max |error|"], lines)
    sizes = f"{result['bytes']:,} bytes of tensors, before {result['bytes_before']:,}"
    console.say(f"{result['folder']}: new experts of rank {result['rank']}, {sizes}")


def show_plan(console: Terminal, result: dict[str, Any]) -> None:
    base, adapter, layers, methods = (result[name] for name in ("base", "adapter", "layers", "methods"))
    console.say(f"base: {base['name']}, {counted(base['parameters'])} parameters, {counted(base['bytes'])}B")
    text = f"{len(layers)} layers ({', '.join(map(str, layers))})"
    sizes = f"{counted(adapter['parameters'])} parameters, {counted(adapter['bytes'])}B on disk"
    console.say(f"new experts in {text}: {sizes}")
    lines = [["parameters that train", *(counted(one["parameters"]) for one in methods.values())]]
    lines.append(["operations a step and GPU", *(counted(one["flops"]) for one in methods.values())])
    for part in next(iter(methods.values()))["memory"]:
        lines.append([f"memory: {part}", *(f"{counted(one['memory'][part])}B" for one in methods.values())])
    for way, name in (("ddp", "a GPU, DDP"), ("fsdp2", "a GPU, FSDP2")):
        needs = [one["per_gpu"][way] for one in methods.values()]
        lines.append([name, *(f"{counted(n['bytes'])}B{'' if n['fits'] else ': does not fit'}" for n in needs)])
    if next(iter(methods.values()))["hours"] is not None:
        lines.append(["hours", *(f"{one['hours']:,.1f}" for one in methods.values())])
    console.table(["", *methods], lines)


def counted(value: float) -> str:
    """A number with three digits and a unit: 2.82G."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            return f"{value:.3g} {unit}".rstrip() if unit else f"{value:.3g}"
        value /= 1000
    raise AssertionError


def show_push(console: Terminal, result: dict[str, Any]) -> None:
    if "files" in result:
        console.say("\n".join(result["files"]), allowed="\n")
    else:
        console.say(f"published: {result['url']}")


def show_train(console: Terminal, result: dict[str, Any]) -> None:
    size = f"{result['parameters']:,} parameters, {counted(result['bytes'])}B"
    console.say(f"Adapter in {result['adapter']}: {size}")
    console.say(f"Next: moextend inspect {result['adapter']}; moextend chat {result['adapter']}")


def show_evaluate(console: Terminal, result: dict[str, Any]) -> None:
    for entry in result["results"]:
        console.say(f"{entry['measure']}: {' -> '.join(filter(None, (entry['base'], entry['with the adapter'])))}")
    console.say(f"Report in {result['folder']}: {', '.join(result['files'])}")


def show_report(console: Terminal, result: dict[str, Any]) -> None:
    measures = list(dict.fromkeys(entry["measure"] for report in result["reports"] for entry in report["results"]))
    found = [
        {entry["measure"]: " -> ".join(filter(None, (entry["base"], entry["with the adapter"]))) for entry in entries}
        for entries in (report["results"] for report in result["reports"])
    ]
    titles = [report["title"] for report in result["reports"]]
    console.table(["", *titles], [[name, *(values.get(name, "") for values in found)] for name in measures])
    if result["picture"] is not None:
        console.say(f"Picture in {result['picture']}")


def show_nothing(console: Terminal, result: dict[str, Any]) -> None:
    """It was printed on the way."""


def show_completion(console: Terminal, result: dict[str, Any]) -> None:
    console.say(result["code"], allowed="\n\t")
