"""Continuous batching gives the tokens of `generate`, whatever becomes of the blocks of its paged cache.

The manager's own thread computes. Its cache of `num_blocks` blocks of `page_size` tokens is small here, so that
requests are cut into chunks, preempted and begun anew.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_base, make_encoder, shake
from test_gate_moextend import open_gate
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.serving import batching

IMAGE = 96
NEW = 6  # tokens of each answer
CHOICES = {
    "gate": {"scope": "gate"},
    "gate, compete, calibrated": {"scope": "gate", "selection": "compete", "calibration": "all", "deltas": ()},
    "gate, one expert": {"scope": "gate", "extended_layers": {2: [1]}, "deltas": ("attention",)},
    "all": {"scope": "all", "selection": "exclusive"},
    "paper": {"paper": True},
    "modality": {"scope": "modality", "encoder": True},
}


def make(choice="gate", family="mixtral", seed=0, **config):
    options = {"extended_layers": {1: [0, 3], 3: [2]}, **CHOICES[choice]}
    if options.pop("encoder", False):
        options |= {"encoder": make_encoder(), "image_token_id": IMAGE}
    model = shake(MoExtendForCausalLM.from_base(make_base(family, **config), **options), seed=seed).eval()
    return open_gate(model, seed) if options.get("scope") == "gate" else model


def random_ids(length, seed):
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = random_ids(40, 0)
PROMPTS = [PREFIX + random_ids(length, length) for length in (5, 9)] + [
    random_ids(length, length) for length in (4, 30)
]


def one_by_one(model, prompts=PROMPTS):
    """What `generate` answers."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts]


def settings(**sizes):
    return ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 96, "max_batch_tokens": 256, **sizes})


def greedy(returned=1):
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config.num_return_sequences = returned  # its constructor takes more than one for sampling only
    return config


def in_batches(model, prompts=PROMPTS, returned=1, persistent_manager=False, **sizes):
    """What `generate_batch` answers."""
    options = {"warmup": False, "persistent_manager": persistent_manager}
    given = {"generation_config": greedy(returned), "continuous_batching_config": settings(**sizes)}
    found = model.generate_batch(prompts, **given, **options).values()
    assert not [output.error for output in found if output.error]
    return [output.generated_tokens for output in found]


@contextlib.contextmanager
def counted(monkeypatch, owner, name, happened=bool):
    """A list of what the method `name` of `owner` answers that has `happened`, while inside."""
    answers, method = [], getattr(owner, name)

    def counting(self, *args, **kwargs):
        answer = method(self, *args, **kwargs)
        answers.extend([answer] if happened(answer) else [])
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield answers


# ---------------------------------------------------------------- equal tokens


slow = pytest.mark.slow


@pytest.mark.parametrize("sizes", [{}, {"max_batch_tokens": 16}], ids=["whole", "in chunks"])
@pytest.mark.parametrize("choice", [pytest.param(one, marks=[] if one == "gate" else [slow]) for one in CHOICES])
def test_every_scope_gives_the_tokens_of_generate(choice, sizes):
    model = make(choice)
    expected = one_by_one(model)
    assert in_batches(model, **sizes) == expected
    if choice != "modality":  # of which text feels nothing
        model.disable_adapters()
        assert one_by_one(model) != expected
        assert in_batches(model, **sizes) == one_by_one(model)


@slow
@pytest.mark.parametrize(
    ("family", "config"), [("gpt_oss", {}), ("qwen3_moe", {}), ("olmoe", {}), ("mixtral", {"sliding_window": 16})]
)
def test_every_kind_of_attention_has_a_place_for_the_sums(family, config):
    """gpt_oss has full and sliding layers, a sliding Mixtral sliding ones only: a ring of slots."""
    model = make("gate", family, **config)
    for sizes in ({}, {"max_batch_tokens": 16}):
        assert in_batches(model, **sizes) == one_by_one(model)


def test_a_base_in_bfloat16_keeps_sums_in_float32():
    model = make("gate").to(torch.bfloat16)
    manager = model.init_continuous_batching(greedy(), settings())
    cache = manager._create_batch_processor().cache
    # 2 D = 128 numbers; keys and values of a layer are 2 x 2 heads x 8 numbers of 2 bytes, half as many of 4
    pages = cache.moextend_gates.pages["default"]
    assert len(cache.layer_to_allocator) == 4 + 8
    assert len(pages) == 16
    assert {page.dtype for page in pages} == {torch.float32}
    assert {page.shape[1] for page in pages} == {8}


@slow
@pytest.mark.parametrize("fused", [False, True])
def test_several_adapters_at_once(fused, tmp_path):
    model = make("gate")
    make("gate, one expert", seed=3).save_pretrained(tmp_path / "b")
    make("all", seed=4).save_pretrained(tmp_path / "c")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.load_adapter(tmp_path / "c", adapter_name="c")
    if fused:
        model.fuse()
    answers = []
    for names in (["default", "b"], "default", "b", "c"):
        model.set_adapter(names)
        answers.append(one_by_one(model))
        assert in_batches(model) == answers[-1]
    assert len({str(answer) for answer in answers}) == 4


# ---------------------------------------------------------------- what becomes of blocks


@slow
def test_a_common_prefix_in_one_step_and_in_later_ones(monkeypatch):
    """In one step each request computes it and their blocks become one; later ones find it in the cache."""
    model = make("gate")
    prompts = [PREFIX + random_ids(length, length) for length in (5, 9, 3, 8)]
    expected = one_by_one(model, prompts)
    with counted(monkeypatch, PagedAttentionCache, "search_prefix_match") as matches:
        assert in_batches(model, prompts) == expected
        assert not matches
        assert in_batches(model, prompts, max_requests_per_batch=2) == expected
        assert matches == [40, 40]
        assert in_batches(model, prompts, persistent_manager=True) == expected
        assert in_batches(model, prompts, persistent_manager=True) == expected  # all of it from the first call
        assert len(matches) == 6
    model.destroy_cached_continuous_batching_manager()


def test_forks_have_sums_of_their_own(monkeypatch):
    model = make("gate")
    expected = [answer for answer in one_by_one(model) for _ in range(3)]
    with counted(monkeypatch, PagedAttentionCache, "prepare_fork_request") as forks:
        assert in_batches(model, returned=3) == expected
        assert in_batches(model, returned=3, allow_block_sharing=False) == expected  # every block is copied
    assert len(forks) == 2 * len(PROMPTS)


@slow
def test_preempted_requests_begin_anew(monkeypatch):
    model = make("gate")
    with counted(monkeypatch, RequestState, "create_equivalent_initial_request") as resets:
        assert in_batches(model, num_blocks=12, allow_block_sharing=False) == one_by_one(model)
    assert resets


@slow
def test_requests_moved_to_the_cpu_come_back_with_their_sums(monkeypatch):
    """Pinned memory needs an accelerator: ordinary memory stands in its place."""
    model, empty = make("gate"), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    with counted(monkeypatch, OffloadingManager, "_offload_to_cpu") as moved:
        sizes = {"num_blocks": 12, "allow_block_sharing": False, "cpu_offload_space": 0.01}
        assert in_batches(model, **sizes) == one_by_one(model)
    assert moved


@slow
def test_what_moves_a_block_moves_the_sums(monkeypatch):
    """Without them, forks answer otherwise: the copy of a block is all that a fork knows of its prompt."""
    model = make("gate")
    prompts = [random_ids(7, seed) for seed in range(8)]  # no whole block, so that all of it is copied
    expected = [answer for answer in one_by_one(model, prompts) for _ in range(2)]
    assert in_batches(model, prompts, returned=2) == expected
    copy_blocks, pages = FullAttentionCacheAllocator.copy_blocks, []

    def without_sums(allocator, source, dest):
        copy_blocks(allocator, source, dest)
        for page in pages:
            for block in dest:
                page[block * allocator.block_physical_stride :][: allocator.tokens_per_page] = 0

    class Watched(batching.PagedGates):
        def __init__(self, *args):
            super().__init__(*args)
            pages.extend(page for gate in self.pages.values() for page in gate)

    monkeypatch.setattr(batching, "PagedGates", Watched)
    monkeypatch.setattr(FullAttentionCacheAllocator, "copy_blocks", without_sums)
    assert in_batches(model, prompts, returned=2) != expected


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    "asked",
    [
        {"max_blocks_per_request": 4},
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"use_async_batching": True},
        {"varlen_compile_config": CompileConfig()},
        {"decode_compile_config": CompileConfig()},
        {"default_compile_level": 1},
    ],
    ids=str,
)
def test_what_was_not_run_with_a_gate_is_refused_where_it_is_asked_for(asked):
    given = settings(**asked)
    kept = copy.deepcopy(given)
    for choice in ("gate", "modality"):
        with pytest.raises(ValueError, match=f"goes without .*{next(iter(asked))}"):
            make(choice).init_continuous_batching(greedy(), given)
    assert given == kept
    manager = make("gate").init_continuous_batching(greedy(), settings(use_cuda_graph=(False, False)))
    assert manager.continuous_batching_config.max_blocks_per_request == 0


@slow
def test_adapters_that_are_switched_under_a_manager_are_refused(tmp_path):
    model = make("gate")
    make("gate", seed=3).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="b")
    model.set_adapter("default")
    changes = {
        "set_adapter": (lambda: model.set_adapter("b"), lambda: model.set_adapter("default")),
        "threshold": (lambda: setattr(model, "gate_threshold", 0.5), lambda: setattr(model, "gate_threshold", 0.0)),
        "off": (model.disable_adapters, model.enable_adapters),
    }
    for change, undo in changes.values():
        expected = one_by_one(model)
        assert in_batches(model, persistent_manager=True) == expected
        change()
        with pytest.raises(AssertionError, match="begun by other adapters, or other thresholds"):
            in_batches(model, persistent_manager=True)
        model.destroy_cached_continuous_batching_manager()
        assert in_batches(model) == one_by_one(model) != expected
        undo()


@slow
def test_a_plain_manager_is_no_place_for_a_gate(tmp_path):
    model = make("all")
    make("gate").save_pretrained(tmp_path)
    assert in_batches(model, persistent_manager=True) == one_by_one(model)
    model.load_adapter(tmp_path, adapter_name="b")
    model.set_adapter("b")
    with pytest.raises(AssertionError, match="begun by other adapters"):
        in_batches(model, persistent_manager=True)
    model.destroy_cached_continuous_batching_manager()


def test_what_holds_for_one_thread_is_refused():
    model = make("gate")
    with model.disable_adapter(), pytest.raises(ValueError, match=r"disable_adapters\(\) or set_adapter"):
        in_batches(model)
    with pytest.raises(ValueError, match="adapter_names are one thread's"):
        model.generate(
            torch.tensor(PROMPTS[:1]), adapter_names=["__base__"], cache_implementation="paged", max_new_tokens=2
        )


def test_prompts_with_images_are_refused():
    model = make("modality")
    with pytest.raises(ValueError, match="takes no images"):
        in_batches(model, [[3, IMAGE, 4]])
    manager = model.init_continuous_batching(greedy(), settings())
    with pytest.raises(ValueError, match="takes no images"):
        manager.add_request([3, IMAGE, 4])


@slow
def test_an_image_token_that_was_generated_is_read_as_in_generate():
    """`generate` takes another token's embedding for it, and no image begins."""
    encoder = make_encoder()
    model = MoExtendForCausalLM.from_base(make_base(), {1: [0, 3]}, encoder=encoder, image_token_id=95).eval()
    shake(model)
    answers = one_by_one(model)
    favourite = max({token for answer in answers for token in answer}, key=lambda t: sum(t in a for a in answers))
    model = MoExtendForCausalLM.from_base(make_base(), {1: [0, 3]}, encoder=encoder, image_token_id=favourite).eval()
    prompts = [[token for token in prompt if token != favourite] for prompt in PROMPTS]
    expected = one_by_one(shake(model), prompts)
    assert any(favourite in answer[:-1] for answer in expected)
    assert in_batches(model, prompts) == expected


def test_a_pass_of_another_manager_is_refused():
    """As when transformers' manager was made by hand."""

    class Cache:
        pass

    with pytest.raises(ValueError, match="begin with a new manager"), torch.no_grad():
        make("gate")(torch.tensor([[3, 4, 5]]), cache=Cache(), cu_seq_lens_k={})


def test_a_new_request_knows_nothing_of_whose_slots_it_is_given():
    """One request with three tokens in the cache goes on, one begins, where another has left sums in every slot."""
    pages = [torch.arange(16.0)[:, None].expand(16, 2).clone() for _ in range(2)]
    inputs = {
        "position_ids": torch.tensor([[3, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 1, 3]),
        "cu_seq_lens_k": {"full_attention": torch.tensor([0, 4, 6])},
        "read_index": [torch.tensor([8, 9, 10, 11, 4, 5])],
        "write_index": [torch.tensor([11, 4, 5])],
    }
    places = batching.Places.of_step(inputs, SimpleNamespace(index=0, layer_type="full_attention"))
    found = batching.PagedPass(torch.zeros(1, 3), 0.0, places, pages).add(torch.ones(1, 3, 3))
    assert found[0, :, 0].tolist() == [10 + 1, 1, 2]
    assert torch.equal(torch.cat(pages, dim=1)[[11, 4, 5], :3], found[0])
    assert [page[12, 0].item() for page in pages] == [12, 12]
