"""Scope: which tokens may use new experts, and how that lives on in the key-value cache.

`scope="all"` needs nothing. `scope="modality"` starts at the first image token of a token's own sequence and lasts to
that sequence's end: it is causal, so a cached prefix stays valid when an image comes later. Its state is, per cache
row, the place of that first image token, so that a cropped cache forgets an image that was cut off, and reordered rows
(beams) carry their own. `scope="gate"` is decided inside the pass, by the gate of the lowest extended layer; its state
is what the gate sums up, per row and cache slot, so that a cropped cache falls back to the sums of its last token.

Each active adapter has a scope of its own. The cache keeps one state a gate, by its adapter's name, and one for the
images, whichever adapter sees them: an adapter that joins a conversation later finds where its images are.
"""

import functools
from typing import NamedTuple

import torch

from .gate_moextend import GatedPass

NEVER = torch.iinfo(torch.long).max  # place of the first image token in a row that has none
STATE = "moextend_state"  # attribute of a cache: a dict of what follows, or not there
IMAGES = "__images__"  # -> [B] places in cache slots; every other key is an adapter: [B, L, 2 D] sums of its gate


class Pass(NamedTuple):
    """What scope has to know of one forward pass.

    input_ids [B, S], image tokens still in it, or `None` where only inputs_embeds [B, S, H] was given; image_token_id:
    `None` where no adapter of this pass sees; position_ids [B, S] or `None`: where they fall back, a new sequence
    starts (packed rows); attention_mask [B, past + S], 0 for padding, another shape or `None`: nothing is known of
    padding; cache: the key-value cache or `None`, whose state is read here and written by `remember`; past_length:
    number of tokens in it before this pass; rows: adapter name -> [B] bool, rows of the batch that it serves, `{}`:
    every adapter serves all.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    image_token_id: int | None
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    cache: object
    past_length: int
    rows: dict


def token_scopes(scopes, tracked, now):
    """Which tokens of this forward pass may use new experts.

    Args:
        scopes: adapter name -> its scope, of the adapters that take part.
        tracked: whether any loaded adapter has `scope="modality"`, so that images are to be remembered.
        now: a `Pass`.

    Returns:
        (adapter name -> [B * S] bool, without those whose tokens all may, or whose gate decides later; adapter name ->
        `GatedPass`, which the gate fills; key -> new state of the cache).

    Raises:
        ValueError: `scope="modality"` and no `input_ids` to find the image tokens in.
    """
    if "modality" in scopes.values() and now.input_ids is None:
        raise ValueError(
            "scope='modality' finds the image tokens in input_ids, but only inputs_embeds was given. Pass input_ids "
            "(with pixel_values), or use scope='all'."
        )
    tokens, found, state = now.inputs_embeds[..., 0] if now.input_ids is None else now.input_ids, {}, {}
    gated = {name: gated_pass(tokens, name, now) for name, scope in scopes.items() if scope == "gate"}
    seen = None
    if tracked and now.input_ids is not None:
        is_image = torch.zeros_like(tokens, dtype=torch.bool)
        is_image = is_image if now.image_token_id is None else tokens == now.image_token_id
        is_real = real_tokens(now.attention_mask, tokens.shape[1], now.past_length)
        seen, state[IMAGES] = modality_scope(is_image, now.position_ids, now.cache, now.past_length, is_real)
    for name in scopes.keys() - gated.keys():
        parts = [seen] if scopes[name] == "modality" else []
        parts += [now.rows[name].to(tokens.device).unsqueeze(1).expand_as(tokens)] if now.rows else []
        if parts:
            found[name] = functools.reduce(torch.logical_and, parts).reshape(-1)
    return found, gated, {**state, **gated}


def real_tokens(attention_mask, length, past_length):
    """[B, S] bool: the tokens of this pass that are no padding; `None` where no 2-D mask says."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    if attention_mask.shape[1] < past_length + length:
        return attention_mask[:, -length:].bool()
    return attention_mask[:, past_length : past_length + length].bool()


def gated_pass(tokens, name, now):
    """The `GatedPass` of `tokens` [B, S] for the gate of the adapter `name`: what it has to know of this pass."""
    is_real = real_tokens(now.attention_mask, tokens.shape[1], now.past_length)
    is_real = torch.ones_like(tokens, dtype=torch.bool) if is_real is None else is_real.to(tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(is_real)
    starts = sequence_starts(is_real, now.position_ids, columns)
    return GatedPass(is_real, starts, cached_state(now.cache, name), now.past_length, now.rows.get(name))


def modality_scope(is_image, position_ids, cache, past_length, is_real=None):
    """[B, S] bool: at or after the first image token of its own sequence. And [B]: the state after this pass."""
    places = past_length + torch.arange(is_image.shape[1], device=is_image.device).expand_as(is_image)
    is_real = torch.ones_like(is_image) if is_real is None else is_real.to(is_image.device)
    starts = sequence_starts(is_real, position_ids, places)
    # The newest image token so far, per token; one that lies before the token's own sequence does not count.
    newest = torch.where(is_image, places, -1).cummax(dim=1).values
    in_scope = (newest >= starts) & (newest >= 0)
    cached = cached_first(cache, is_image.shape[0], past_length, is_image.device)
    in_scope = in_scope | ((starts < 0) & (cached < NEVER).unsqueeze(1))
    first = torch.where(in_scope, places, NEVER).masked_fill(places < starts[:, -1:], NEVER).amin(dim=1)
    return in_scope, torch.where(starts[:, -1] < 0, torch.minimum(first, cached), first)


def cached_state(cache, key):
    """What `cache` remembers under `key` (`IMAGES`, or the name of an adapter with a gate), or `None`."""
    return (getattr(cache, STATE, None) or {}).get(key)


def remember(cache, state):
    """Keeps `state` (key -> tensor or `GatedPass`) with `cache`, so that the next pass and every move of its rows find
    it. What other adapters have left there stays."""
    state = {key: value.sums if isinstance(value, GatedPass) else value for key, value in state.items()}
    state = {key: value for key, value in state.items() if value is not None}
    if cache is not None and state:
        setattr(follow_rows(cache), STATE, {**(getattr(cache, STATE, None) or {}), **state})


def sequence_starts(is_real, position_ids, places):
    """[B, S]: the one of `places` [B, S] where each token's sequence starts, -1: before this pass or at its head.

    A token starts a sequence whose position is not above that of the token before it, or is 0 where this pass has none
    before it. Padding (not `is_real` [B, S]) is passed over: it starts nothing, whatever its positions say.
    """
    if position_ids is not None and position_ids.dim() == 3:  # of a multimodal base: text, time, height and width
        position_ids = position_ids[0] if len(position_ids) == 4 else None
    if position_ids is None:
        return torch.full_like(places, -1)
    position_ids = position_ids.expand_as(is_real)
    columns = torch.arange(is_real.shape[1], device=is_real.device).expand_as(is_real)
    latest = torch.where(is_real, columns, -1).cummax(dim=1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)  # -1: none in this pass
    previous = position_ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, 0)
    return torch.where(is_real & (position_ids <= previous), places, -1).cummax(dim=1).values


def cached_first(cache, batch_size, past_length, device):
    """[B]: the state of `cache`, without images that a crop has cut off; `NEVER` where there is none yet."""
    state = cached_state(cache, IMAGES)
    if state is None:
        return torch.full((batch_size,), NEVER, device=device)
    state = state.to(device)
    return torch.where(state < past_length, state, NEVER)


def seen_tokens(cache):
    """Number of tokens that `cache` holds; layers without keys (linear attention) say 0 in some families."""
    if cache is None:
        return 0
    lengths = [layer.get_seq_length() for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    return max(int(length) for length in (cache.get_seq_length(), *lengths))


def cut(cache, state, *_):
    """The state of a cropped cache: without images, or sums, of tokens that are cut off."""
    length = seen_tokens(cache)
    return state[:, :length] if state.dim() == 3 else torch.where(state < length, state, NEVER)


MOVES = {  # cache methods that move rows or cut tokens off -> what becomes of the state
    "reorder_cache": lambda cache, state, index: state.index_select(0, index.to(state.device)),
    "batch_select_indices": lambda cache, state, index: state[index.to(state.device)],
    "batch_repeat_interleave": lambda cache, state, repeats: state.repeat_interleave(repeats, dim=0),
    "crop": cut,
    "reset": lambda cache, state: None,
}


def follow_rows(cache):
    """Makes `cache` move its state whenever it moves its rows or is cut, and returns it.

    Moves are methods of the cache's own class, of which there are many; a subclass serves them all, keeps
    `isinstance` true and survives `deepcopy` and pickling, which a patched instance method would not.
    """
    if not hasattr(type(cache), "moextend_follows"):
        cache.__class__ = following_class(type(cache))
    return cache


@functools.cache
def following_class(cache_class):
    """`cache_class`, with the state moved along. No import finds it, so pickling makes it anew."""

    def reduce(cache, protocol):
        return following_instance, (cache_class,), cache.__dict__

    moves = {name: following(getattr(cache_class, name), MOVES[name]) for name in MOVES.keys() & dir(cache_class)}
    return type(cache_class.__name__, (cache_class,), {"moextend_follows": True, "__reduce_ex__": reduce, **moves})


def following_instance(cache_class):
    """An empty instance, which unpickling and `deepcopy` fill."""
    follows = following_class(cache_class)
    return follows.__new__(follows)


def following(method, move):
    """The cache method `method`, with the state moved along."""

    @functools.wraps(method)
    def moving(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        state = getattr(self, STATE, None)
        if state is not None:
            moved = {key: move(self, value, *args, *kwargs.values()) for key, value in state.items()}
            setattr(self, STATE, {key: value for key, value in moved.items() if value is not None} or None)
        return result

    return moving
