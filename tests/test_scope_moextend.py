"""Scope: hand-written tables of which token may use new experts, and its state through every move of a cache."""

import copy
import io

import pytest
import torch
from conftest import PAPER, frozen_copy, make_base, make_encoder, shake
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.scope_moextend import (
    IMAGES,
    NEVER,
    STATE,
    PassInputs,
    cached_first,
    cached_state,
    modality_scope,
    real_tokens,
    remember,
)

IMAGE = 96
TABLE = [  # name, tokens (i: image), position ids, scope, state
    ("no image", "......", None, "......", [NEVER]),
    ("from the first image token on", "..ii..", None, "..####", [2]),
    ("an image at the very start", "ii....", None, "######", [0]),
    ("several images", "..i.i.", None, "..####", [2]),
    ("rows apart", "..i... ......", None, "..#### ......", [2, NEVER]),
    ("left padding repeats a position", "...i..", [[1, 1, 0, 1, 2, 3]], "...###", [3]),
    ("packed: the next sequence starts afresh", "..i...", [[0, 1, 2, 3, 0, 1]], "..##..", [NEVER]),
    ("packed: only the second has an image", "....i.", [[0, 1, 2, 0, 1, 2]], "....##", [4]),
    ("packed: both have one", "i..i..", [[0, 1, 2, 0, 1, 2]], "######", [3]),
    ("packed: an image ends the first sequence", "..i...", [[0, 1, 2, 0, 1, 2]], "..#...", [NEVER]),
    ("packed: an image begins the second", "...i..", [[0, 1, 2, 0, 1, 2]], "...###", [3]),
]


def parse(picture, sign):
    return torch.tensor([[character == sign for character in row] for row in picture.split()])


@pytest.mark.parametrize(
    ("picture", "positions", "scope", "state"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_scope_of_a_pass_without_cache(picture, positions, scope, state):
    positions = None if positions is None else torch.tensor(positions)
    found, found_state = modality_scope(parse(picture, "i"), positions, None, 0)
    assert torch.equal(found, parse(scope, "#"))
    assert found_state.tolist() == state


class Cache:
    """The least that carries a state."""

    def __init__(self, *state):
        setattr(self, STATE, {IMAGES: torch.tensor(state)})


@pytest.mark.parametrize(
    ("picture", "positions", "cached", "scope", "state"),
    [
        ("..", [[4, 5]], [2], "##", [2]),  # an image in the cached part
        ("..", [[4, 5]], [NEVER], "..", [NEVER]),
        (".i", [[4, 5]], [NEVER], ".#", [5]),  # the image comes later: the cached prefix stays what it was
        (".i", [[4, 5]], [2], "##", [2]),
        ("..", [[4, 5]], [4], "..", [NEVER]),  # a crop to length 4 has cut the image at place 4 off
        ("..", [[0, 1]], [2], "..", [NEVER]),  # position 0 at the head: another sequence
        ("..", [[4, 0]], [2], "#.", [NEVER]),  # the old sequence ends in this pass
        ("..", None, [2], "##", [2]),
        (". .", [[4], [4]], [1, NEVER], "# .", [1, NEVER]),
    ],
)
def test_scope_of_a_pass_after_four_cached_tokens(picture, positions, cached, scope, state):
    positions = None if positions is None else torch.tensor(positions)
    found, found_state = modality_scope(parse(picture, "i"), positions, Cache(*cached), 4)
    assert torch.equal(found, parse(scope, "#"))
    assert found_state.tolist() == state


@pytest.mark.parametrize(
    ("picture", "mask", "positions", "scope", "state"),
    [
        ("..i...", "####..", [[0, 1, 2, 3, 0, 0]], "..####", [2]),  # right padding at 0, or at 1
        ("..i...", "####..", [[0, 1, 2, 3, 1, 1]], "..####", [2]),
        ("..i...", "####.#", [[0, 1, 2, 3, 9, 4]], "..####", [2]),  # a turn after it
        ("..i...", "####.#", [[0, 1, 2, 3, 9, 0]], "..###.", [NEVER]),  # another sequence after it
        ("...i..", "..####", [[1, 1, 0, 1, 2, 3]], "...###", [3]),
    ],
)
def test_padding_starts_no_sequence(picture, mask, positions, scope, state):
    found, found_state = modality_scope(parse(picture, "i"), torch.tensor(positions), None, 0, parse(mask, "#"))
    assert torch.equal(found, parse(scope, "#"))
    assert found_state.tolist() == state


def test_right_padding_keeps_the_image_for_the_tokens_after_it():
    model = seeing()
    image, text = torch.tensor([[5, 96, 96, 96, 96, 7, 8]]), torch.tensor([[9, 10, 11]])
    pixels, new = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([[9]])
    alone = model(torch.cat([image, new], dim=1), pixel_values=pixels).logits[0, -1]
    ids = torch.cat([torch.cat([image, image], dim=0), torch.cat([text * 0, text], dim=0)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
    pixels = pixels.expand(2, -1, -1, -1)
    cache = model(ids, attention_mask=mask, position_ids=positions, pixel_values=pixels).past_key_values
    length, mask = mask.sum(dim=1, keepdim=True), torch.cat([mask, torch.ones(2, 1).long()], dim=1)
    found = model(new.expand(2, 1), attention_mask=mask, position_ids=length, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_scope_is_causal():
    """What a token may use never depends on what follows it."""
    is_image = torch.rand(20, 12, generator=torch.Generator().manual_seed(0)) < 0.1
    whole, _ = modality_scope(is_image, None, None, 0)
    for length in range(1, 12):
        assert torch.equal(modality_scope(is_image[:, :length], None, None, 0)[0], whole[:, :length])


@pytest.mark.parametrize(
    ("row", "split"),
    [(row, split) for row in TABLE for split in range(1, len(row[1].split()[0]))],
    ids=lambda value: str(value if isinstance(value, int) else value[0]),
)
def test_two_passes_over_a_cache_mark_what_one_pass_marks(row, split):
    _, picture, positions, scope, state = row
    is_image = parse(picture, "i")
    rows = torch.arange(is_image.shape[1]).expand_as(is_image) if positions is None else torch.tensor(positions)
    first, kept = modality_scope(is_image[:, :split], rows[:, :split], None, 0)
    second, kept = modality_scope(is_image[:, split:], rows[:, split:], Cache(*kept.tolist()), split)
    assert torch.equal(torch.cat([first, second], dim=1), parse(scope, "#"))
    assert kept.tolist() == state


# ---------------------------------------------------------------- the state moves with the cache's rows


def filled_cache(*state):
    cache = DynamicCache()
    keys = torch.arange(len(state)).float().view(-1, 1, 1, 1).expand(-1, 1, 6, 2).clone()
    cache.update(keys, keys, 0)
    remember(cache, {IMAGES: torch.tensor(state)})
    return cache


def rows_of(cache):
    return cache.layers[0].keys[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("move", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.reorder_cache(beam_idx=torch.tensor([1, 1, 2])), [1, 1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(indices=torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_repeat_interleave(repeats=2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_the_state_moves_as_the_rows_do(move, rows):
    cache = filled_cache(4, NEVER, 1)
    move(cache)
    assert rows_of(cache) == rows
    assert cached_state(cache, IMAGES).tolist() == [[4, NEVER, 1][row] for row in rows]


def test_a_cropped_cache_forgets_the_images_that_are_cut_off():
    cache = filled_cache(4, NEVER, 1)
    cache.crop(-2)
    assert cached_state(cache, IMAGES).tolist() == [NEVER, NEVER, 1]


def test_a_reset_cache_has_seen_no_image():
    cache = filled_cache(4, NEVER, 1)
    cache.reset()
    assert cached_first(cache, 3, 0, "cpu").tolist() == [NEVER] * 3


def pickled(cache):
    stream = io.BytesIO()
    torch.save(cache, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copied_or_pickled_cache_keeps_a_state_of_its_own(duplicate):
    cache = filled_cache(4, NEVER, 1)
    twin = duplicate(cache)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert cached_state(twin, IMAGES).tolist() == [4, NEVER, 1] and rows_of(twin) == [0, 1, 2]
    twin.batch_select_indices(torch.tensor([2]))
    assert cached_state(twin, IMAGES).tolist() == [1] and rows_of(twin) == [2]


def test_a_cache_stays_an_instance_of_its_class_and_is_changed_once():
    cache = filled_cache(4)
    changed = type(cache)
    remember(cache, {IMAGES: torch.tensor([2])})
    assert isinstance(cache, DynamicCache) and changed.__name__ == "DynamicCache" and type(cache) is changed
    assert type(filled_cache(1)) is changed


# ---------------------------------------------------------------- in the model


def seeing(scope="modality", **choices):
    torch.manual_seed(5)
    choices = {**PAPER, "calibration": "none", "scope": scope, **choices}
    return shake(MoExtendForCausalLM.from_base(make_base(), {1: [0, 3], 3: [2]}, encoder=make_encoder(), **choices))


@pytest.mark.parametrize("choices", [{}, {"calibration": "all"}, {"selection": "exclusive"}], ids=str)
def test_text_is_bit_equal_to_the_base_and_so_are_tokens_before_an_image(choices):
    model = seeing(**choices)
    ids, pixels = torch.tensor([[5, 6, 7, IMAGE, IMAGE, IMAGE, IMAGE, 8, 9]]), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), model.record_routing() as records:
        model(ids, pixel_values=pixels)
    expected = [False] * 3 + [True] * 6
    assert all(record.scope.tolist() == expected for record in records.values())
    assert all((record.index[:3] < 6).all() for record in records.values())
    assert any((record.index[3:] >= 6).any() for record in records.values())
    text = ids[:, :3]
    assert torch.equal(model(text).logits, frozen_copy(make_base())(text).logits)


def test_packed_rows_do_not_see_their_neighbours_images():
    model = seeing()
    one, other = [5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7], [8, 9, 10]
    positions = torch.tensor([[*range(len(one)), *range(len(other))]])
    with model.record_routing() as records:
        model(torch.tensor([one + other]), position_ids=positions, pixel_values=torch.randn(1, 3, 16, 16))
    assert records[1].scope.tolist() == [False] + [True] * 6 + [False] * 3


def test_embeddings_alone_are_refused_because_no_image_token_can_be_found_in_them():
    model = seeing()
    with pytest.raises(ValueError, match="scope='modality' finds image and audio tokens in input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))
    assert seeing(scope="all")(inputs_embeds=torch.randn(1, 4, 32)).logits.shape == (1, 4, 96)


@torch.no_grad()
def test_cropping_a_cache_behind_an_image_brings_the_base_back():
    model, base = seeing(), frozen_copy(make_base())
    text, image = torch.tensor([[5, 6, 7]]), torch.tensor([[IMAGE] * 4 + [8]])
    cache = model(text, use_cache=True).past_key_values
    model(image, past_key_values=cache, pixel_values=torch.randn(1, 3, 16, 16))
    assert cached_state(cache, IMAGES).tolist() == [3]
    cache.crop(-5)
    base_cache = base(text, use_cache=True).past_key_values
    expected = base(torch.tensor([[9]]), past_key_values=base_cache).logits
    assert torch.equal(model(torch.tensor([[9]]), past_key_values=cache).logits, expected)
    assert cached_state(cache, IMAGES).tolist() == [NEVER]


@torch.no_grad()
def test_a_static_cache_carries_the_state_too():
    model = seeing()
    ids, pixels = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6]]), torch.randn(1, 3, 16, 16)
    expected = model(torch.cat([ids, torch.tensor([[7, 8]])], dim=1), pixel_values=pixels).logits[:, -1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    model(ids, pixel_values=pixels, past_key_values=cache, use_cache=True)
    assert cached_state(cache, IMAGES).tolist() == [1]
    model(torch.tensor([[7]]), past_key_values=cache)
    found = model(torch.tensor([[8]]), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def wide_masks(real, past, length, columns):
    """[B, past + S] bool as a causal mask of each kind, for the last S of these tokens and `columns` keys."""
    padded = torch.nn.functional.pad(real, (0, max(columns - real.shape[1], 0)))[:, -columns:]
    offset = min(past, columns - length)
    causal = torch.arange(columns) <= offset + torch.arange(length)[:, None]
    allowed = causal & padded[:, None, None]
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    block = create_block_mask(
        lambda b, h, q, k: (k <= offset + q) & padded[b, k], len(real), None, length, columns, device="cpu"
    )
    return {
        "bool": allowed,
        "float": added,
        "-inf": torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf),
        "int": allowed.long(),
        "of each kind of attention": {"full_attention": None, "sliding_attention": added},
        "block": block,
    }


@pytest.mark.parametrize("kind", wide_masks(torch.ones(1, 2, dtype=torch.bool), 0, 2, 2))
@pytest.mark.parametrize(
    ("past", "length", "columns"),
    [(0, 6, 6), (0, 6, 10), (3, 3, 6), (3, 3, 10), (5, 1, 10), (4, 2, 3)],
    ids=["whole", "static", "in two parts", "static, in two parts", "static, one token", "sliding"],
)
def test_padding_is_found_in_every_kind_of_mask(kind, past, length, columns):
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0]]).bool()
    mask = wide_masks(real, past, length, columns)[kind]
    inputs = PassInputs(torch.zeros(4, length, dtype=torch.long), None, None, mask, None)
    assert torch.equal(real_tokens(inputs, past), real[:, past : past + length])
    whole = inputs._replace(attention_mask=real.long())
    assert torch.equal(real_tokens(whole, past), real[:, past : past + length])
    assert real_tokens(inputs._replace(attention_mask=None), past).all()
