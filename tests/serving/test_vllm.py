"""Served by vLLM, an adapter gives the tokens that `generate` gives."""

import shutil
from itertools import takewhile

import pytest
from bases import ADAPTERS, FAMILIES
from engines import ask, check, running, several
from vllm.config import CompilationMode

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.tools.merge import merge


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


def test_state_lives_through_chunks_preemption_and_cached_prefixes(workshop):
    """40 tokens a step at most, and blocks for about two requests: others are thrown out, and begin anew."""
    from vllm.v1.core.sched.scheduler import Scheduler

    folder = workshop.adapter("gate")
    items, preempted, preempt = workshop.reference(folder), [], Scheduler._preempt_request

    def counted(*args, **options):
        preempted.append(1)
        return preempt(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_preempt_request", counted)
        options = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 9, "max_model_len": 128, "block_size": 32}
        with running(folder, **options) as engine:
            for _ in range(2):
                check(items, ask(engine, [(item, None) for item in items]))
    assert preempted


def test_speculative_decoding_by_n_grams(workshop, monkeypatch):
    """What a token adds to its sequence's sums is its own: that of a rejected one is overwritten by the next. In a
    process of its own: where numba is loaded, as it is for this, vLLM can't start another engine."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    base, kinds = workshop.base(), ("paper", "all_routed", "gate", "low_rank")
    folders = {kind: workshop.adapter(kind) for kind in kinds}
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    engine, requests = several(base, folders, speculative_config=speculation, disable_log_stats=False)
    references = {None: workshop.reference(base)}
    references |= {name: workshop.reference(folder) for name, folder in folders.items()}
    jobs = [(item, requests.get(name)) for name, items in references.items() for item in items]
    with engine as engine:
        check([item for item, _ in jobs], ask(engine, jobs))
        counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    accepted, drafted = (counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("accepted", "draft"))
    assert 20 < accepted < drafted - 20


def test_a_native_export_is_served_unchanged(workshop, tmp_path):
    folder = workshop.adapter("native")
    merge(folder, tmp_path / "native", native=True)
    with running(tmp_path / "native") as engine:
        assert engine.llm_engine.model_config.architectures == ["MixtralForCausalLM"]
        items = workshop.reference(folder)
        check(items, ask(engine, [(item, None) for item in items]))


def test_compiled(workshop, tmp_path, monkeypatch):
    """Compiled graphs are kept on disk. An adapter that was trained anew in the same folder gets its own: these two
    differ in the layers that have deltas, and in the gate's threshold."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    base, folder, keys = workshop.base(), tmp_path / "adapter", set()
    for layers in ({2: [1]}, {1: [1, 5], 3: [3, 0]}):
        shutil.rmtree(folder, ignore_errors=True)
        model = MoExtendForCausalLM.from_base(base, extended_layers=layers, dtype="float32", expert_rank=4).eval()
        workshop.save(model, folder, seed=len(layers))
        items = workshop.reference(folder)
        with running(folder, enforce_eager=False) as engine:  # beside LoRA requests vLLM compiles nothing on a CPU
            config = engine.llm_engine.vllm_config
            assert config.compilation_config.mode != CompilationMode.NONE
            check(items, ask(engine, [(item, None) for item in items]))
            keys.add(config.compute_hash())  # which vLLM finds graphs by
    assert len(keys) == 2


def test_bfloat16_differs_by_rounding_as_the_base_itself_does(workshop):
    """Two programs that sum in other orders part ways where two tokens are nearly equal: 60 tokens of 84 at least come
    before that."""
    base, folder = workshop.base(dtype="bfloat16"), workshop.adapter("gate", dtype="bfloat16")
    engine, requests = several(base, {"gate": folder}, dtype="bfloat16")
    with engine as engine:
        for items, request in ((workshop.reference(base), None), (workshop.reference(folder), requests["gate"])):
            same = 0
            for item, output in zip(items, ask(engine, [(item, request) for item in items]), strict=True):
                pairs = zip(output.outputs[0].token_ids, item["new"], strict=True)
                same += len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            assert same >= 60


ARCHITECTURES = {"olmoe": "OlmoeForCausalLM", "gpt_oss": "GptOssForCausalLM", "granitemoe": "GraniteMoeForCausalLM"}
ARCHITECTURES |= {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
ARCHITECTURES |= {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(workshop, family):
    """Random bases of large weights, of which rounding is multiplied: 1e-4."""
    base = workshop.base(family)
    kinds = ("paper", "all_routed", "gate", "low_rank", "all_deltas")
    folders = {kind: workshop.adapter(kind, family) for kind in kinds}
    options = {"block_size": None} if family.startswith("deepseek") else {}
    engine, requests = several(base, folders, architecture=ARCHITECTURES[family], **options)
    references = {None: workshop.reference(base)}
    references |= {name: workshop.reference(folder) for name, folder in folders.items()}
    with engine as engine:
        jobs = [(name, place) for place in range(7) for name in references]
        outputs = ask(engine, [(references[name][place], requests.get(name)) for name, place in jobs])
        for name, items in references.items():
            check(items, [output for output, job in zip(outputs, jobs, strict=True) if job[0] == name], 1e-4)
