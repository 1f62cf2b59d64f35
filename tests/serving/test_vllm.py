"""Served by vLLM, an adapter gives the tokens that `generate` gives."""

import pytest
from bases import ADAPTERS, FAMILIES
from conftest import ask, check, running, several


def test_adapters_of_every_kind_and_the_base_in_one_batch(workshop):
    """Twice: the second time from the prefix cache. Requests of one step share prefixes as well."""
    base = workshop.base()
    folders = {name: workshop.adapter(name) for name in ADAPTERS}
    engine, requests = several(base, folders)
    references = {name: workshop.reference(folder) for name, folder in folders.items()} | {
        None: workshop.reference(base)
    }
    changed = [references[name][2]["new"] != references[None][2]["new"] for name in folders]
    assert sum(changed) > len(folders) / 2, "the references say little"
    with engine as engine:
        for turn in range(2):
            jobs = [(name, place) for place in range(7) for name in references]
            outputs = ask(engine, [(references[name][place], requests.get(name)) for name, place in jobs])
            assert turn == 0 or sum(output.num_cached_tokens > 0 for output in outputs) > len(outputs) / 4
            for name, items in references.items():
                check(items, [output for output, job in zip(outputs, jobs, strict=True) if job[0] == name])


@pytest.mark.parametrize("kind", ["gate", "low_rank"])
def test_one_adapter_in_the_place_of_a_model(workshop, kind):
    folder = workshop.adapter(kind)
    items = workshop.reference(folder)
    with running(folder) as engine:
        check(items, ask(engine, [(item, None) for item in items]))


ARCHITECTURES = {"olmoe": "OlmoeForCausalLM", "granitemoe": "GraniteMoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}
ARCHITECTURES |= {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
ARCHITECTURES |= {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(workshop, family):
    base = workshop.base(family)
    folders = {kind: workshop.adapter(kind, family) for kind in ("paper", "all_routed", "gate", "low_rank", "all_deltas")}
    engine, requests = several(base, folders, architecture=ARCHITECTURES[family])
    references = {None: workshop.reference(base)}
    references |= {name: workshop.reference(folder) for name, folder in folders.items()}
    with engine as engine:
        jobs = [(name, place) for place in range(7) for name in references]
        outputs = ask(engine, [(references[name][place], requests.get(name)) for name, place in jobs])
        for name, items in references.items():
            check(items, [output for output, job in zip(outputs, jobs, strict=True) if job[0] == name])
