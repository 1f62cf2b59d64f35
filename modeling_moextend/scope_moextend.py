"""A pass: which adapters serve it, which tokens may use their new experts, and what of that lives on in the cache.

What holds for a pass is taken once, at its start, into a `PassPlan` that the layers read and nobody changes. So a pass
is one adapter set from its first layer to its last, whatever other threads switch, load or delete meanwhile.

`scope="modality"` lasts from the first placeholder of any sense in a token's own sequence to that sequence's end: it
is causal, so that a cached prefix stays valid when an image or a clip comes later. Its state in the cache is, per item
of the batch, the index of that token. `scope="gate"` is decided inside the pass, by the gate of the lowest extended
layer; its state is what the gate sums up, per item and cache slot.

Letters: B items of the batch, S tokens of this pass, T = B * S, L tokens in the cache after it, D gate size.
"""

import contextlib
import functools
import threading
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from .gate_moextend import GatedPass, is_at_hand

BASE = "__base__"  # in adapter_names: an item of the batch that no adapter serves
NEVER = torch.iinfo(torch.long).max  # slot of the first placeholder in an item that has none
STATE = "moextend_state"  # attribute of a cache: a dict of what follows, or not there
IMAGES = "__images__"  # -> [B] slots of the cache; every other key is an adapter: [B, L, 2 D] sums of its gate


class NewExperts(NamedTuple):
    """What one adapter adds to one layer, two modules."""

    rows: torch.nn.Module
    experts: torch.nn.Module


class LayerPlan(NamedTuple):
    """New experts of one layer, or deltas of one shared layer, in one pass."""

    parts: dict  # adapter name -> `NewExperts`, or a delta
    spans: dict  # adapter name -> (first, stop): indices of its new experts, counted after the base's
    idle: tuple  # experts, or deltas, of the adapters that do not take part


class Selection(NamedTuple):
    """Which adapters serve a pass, or all passes of one `generate`."""

    adapters: dict  # name -> `Adapter`, all that the model has
    names: tuple  # those asked for, ascending
    groups: tuple  # tuples of names; adapters of different tuples never meet on one token
    per_item: tuple | None = None  # names for each item of the batch; `None`: all serve every item
    enabled: bool = True  # whether new experts take part at all
    thresholds: dict = {}  # adapter name -> threshold of its gate

    @property
    def taking_part(self):
        """Names of the adapters whose new experts take part, in the order of their spans."""
        return tuple(name for group in self.groups for name in group) if self.enabled else ()

    @property
    def sensing(self):
        """Modality -> the `Adapter` with which this pass takes it: of those that serve it, one has the encoder."""
        return {modality: self.adapters[name] for name in self.names for modality in self.adapters[name].encoders}

    def placeholders(self, input_ids):
        """[B, S] bool: the tokens that stand for features, of any sense."""
        ids = [getattr(adapter.config, f"{modality}_token_id") for modality, adapter in self.sensing.items()]
        return functools.reduce(
            torch.logical_or, (input_ids == one for one in ids), torch.zeros_like(input_ids).bool()
        )

    def served(self, num_items):
        """Adapter name -> [B] bool, the items that it serves; `{}`: all. `generate` repeats items, for beams."""
        if self.per_item is None:
            return {}
        repeats = num_items // len(self.per_item)
        return {
            name: torch.tensor([name in names for names in self.per_item for _ in range(repeats)])
            for name in self.taking_part
        }


class AdapterSet(NamedTuple):
    """A model's adapters at one moment; replaced as a whole, never changed."""

    adapters: dict = {}  # name -> `Adapter`
    active: tuple = ()  # names of those that take part, ascending
    trained: str | None = None  # what is trained and saved where no name is given: the only active one, or the top one
    switched_on: bool = True  # `False` after `disable_adapters`
    fused: bool = False  # after `fuse`, until `unfuse`
    layer_plans: dict = {}  # names -> `layer_plans_of` them


def layer_plans_of(adapters, names):
    """Decoder layer, or name of a delta's site -> `LayerPlan` of a pass with the adapters `names`; all that any of
    `adapters` has."""
    plans = {}
    for layer in sorted({layer for adapter in adapters.values() for layer in adapter.layers}):
        parts, spans, first = {}, {}, 0
        for name in names:
            if layer in adapters[name].layers:
                parts[name] = adapters[name].layers[layer]
                spans[name] = first, first + parts[name].rows.num_new
                first = spans[name][1]
        others = (adapter for name, adapter in adapters.items() if name not in parts and layer in adapter.layers)
        plans[layer] = LayerPlan(parts, spans, tuple(adapter.layers[layer].experts for adapter in others))
    for site in {site for adapter in adapters.values() for site in adapter.deltas}:
        deltas = {name: adapter.deltas[site] for name, adapter in adapters.items() if site in adapter.deltas}
        parts = {name: deltas[name] for name in names if name in deltas}
        plans[site] = LayerPlan(parts, {}, tuple(delta for name, delta in deltas.items() if name not in parts))
    return plans


@dataclass(frozen=True)
class PassPlan:
    """What one forward pass was started with; the layers read it."""

    layers: dict  # decoder layer, or name of a delta's site -> `LayerPlan`
    groups: tuple = ()  # as in `Selection`
    scopes: dict = field(default_factory=dict)  # adapter name -> [T] bool: tokens in its scope; not there: all tokens
    gates: dict = field(default_factory=dict)  # adapter name -> the `GatedPass` in which its gate decides
    records: dict | None = None  # filled with a `RoutingRecord` a layer where somebody listens
    selections: dict = field(default_factory=dict)  # adapter name -> how it selects
    input_ids: torch.Tensor | None = None  # [B, S]
    fused: bool = False  # whether what no token needs may be computed, where asking would cost more
    found: dict = field(default_factory=dict)  # what was asked already: of an adapter's scope, of a delta's site

    def scope(self, names, like):
        """[T] bool: tokens in the scope of at least one of `names`; `None`: every token of `like` [T, ...]."""
        scopes = [self.gates[name].in_scope if name in self.gates else self.scopes.get(name) for name in names]
        if not scopes or any(scope is None for scope in scopes):
            return None
        scopes = [scope.to(like.device) for scope in scopes]
        return torch.stack(scopes).any(dim=0) if len(scopes) > 1 else scopes[0]

    def reaches(self, name):
        """Whether any token of this pass is in the scope of the adapter."""
        if name in self.gates and self.gates[name].in_scope is None:
            return False  # a gate that was not asked lets no token through
        scope = self.gates[name].in_scope if name in self.gates else self.scopes.get(name)
        if scope is None or (self.fused and not is_at_hand(scope)):
            return True
        known, reached = self.found.get(name, (None, False))
        if known is not scope:
            known, reached = self.found[name] = scope, bool(scope.any())
        return reached

    def takes_part(self, name):
        """Whether its logits are needed: for a token in scope, a gradient or a record; else as if not loaded."""
        if name in self.gates and self.gates[name].in_scope is None:
            return False
        return self.records is not None or torch.is_grad_enabled() or self.reaches(name)


class ThreadState(threading.local):
    """A thread's pass under way, and what holds for those that it begins."""

    plan = None  # `PassPlan`
    enabled = None  # `False` inside `disable_adapter`; `None`: as the model says
    selection = None  # the one that a whole `generate` keeps
    records = None  # where routing is recorded
    thresholds = {}  # adapter name -> threshold of its gate in place of its own; replaced, never written to


class Passes:
    """Shared by a model and its MoE layers: the adapters that the next pass begins with; each thread's own pass."""

    def __init__(self):
        self.current = AdapterSet()
        self.thread, self.lock = ThreadState(), threading.RLock()

    def __reduce__(self):  # a pass under way is not copied or pickled along
        return Passes, (), {"current": self.current}

    def change(self, **values):
        """Replaces the adapter set by one with other values; passes under way keep the one they began with."""
        with self.lock:
            self.current = self.current._replace(**values, layer_plans={})

    def selection(self):
        """Which adapters serve a pass that this thread begins now and that names none itself."""
        current = self.current
        chosen = self.thread.selection
        if chosen is None:
            configs = {name: adapter.config for name, adapter in current.adapters.items()}
            thresholds = {name: one.gate_threshold for name, one in configs.items() if one.scope == "gate"}
            active, on = current.active, current.switched_on
            chosen = Selection(current.adapters, active, (active,), enabled=on, thresholds=thresholds)
        return chosen if self.thread.enabled is None else chosen._replace(enabled=self.thread.enabled)

    def layer_plans(self, selection):
        """`layer_plans_of` a selection, made once for each adapter set."""
        current, names = self.current, selection.taking_part
        if current.adapters is not selection.adapters:  # it has been replaced meanwhile
            return layer_plans_of(selection.adapters, names)
        if names not in current.layer_plans:
            current.layer_plans[names] = layer_plans_of(current.adapters, names)
        return current.layer_plans[names]

    @property
    def plan(self):
        """The `PassPlan` of the pass under way in this thread.

        Where a layer is called without a pass of the model, adapters of `scope="all"` take part: nothing tells which
        tokens are in another scope.
        """
        if self.thread.plan is not None:
            return self.thread.plan
        chosen = self.selection()
        open_to_all = {name for name in chosen.names if chosen.adapters[name].config.scope == "all"}
        groups = tuple(tuple(sorted(open_to_all.intersection(group))) for group in chosen.groups)
        return PassPlan(self.layer_plans(chosen._replace(groups=groups)), groups, records=self.thread.records)

    @contextlib.contextmanager
    def using(self, **values):
        """Sets attributes of this thread's `ThreadState` for the length of a `with` block."""
        before = [(name, getattr(self.thread, name)) for name in values]
        for name, value in values.items():  # one by one: torch.compile can't trace `__dict__.update`
            setattr(self.thread, name, value)
        try:
            yield
        finally:
            for name, value in before:
                setattr(self.thread, name, value)

    def checkpoint_contexts(self, other=None):
        """`context_fn` of `torch.utils.checkpoint`: the recomputation, in whichever thread, sees the plan of its own
        forward pass. `other` is a `context_fn` to run inside this one."""
        forward, recompute = other() if other else (contextlib.nullcontext(), contextlib.nullcontext())
        plan = replace(self.plan, records=None)

        @contextlib.contextmanager
        def replay():
            with self.using(plan=plan), recompute:
                yield

        return forward, replay()


def merge_overlapping(groups):
    """Names that meet in `groups` (lists of names), as sorted tuples; none is in two of them."""
    merged = []
    for group in map(set, groups):
        group = group.union(*(other for other in merged if other & group))
        merged = [other for other in merged if not other & group] + [group]
    return tuple(sorted(tuple(sorted(group)) for group in merged if group))


class PassInputs(NamedTuple):
    """What scope has to know of one forward pass."""

    input_ids: torch.Tensor | None  # [B, S], image tokens still in it; `None` where only embeddings were given
    inputs_embeds: torch.Tensor | None  # [B, S, H]
    position_ids: torch.Tensor | None  # [B, S]: where they fall back, a new sequence starts (packed batches)
    attention_mask: object  # [B, past + S], 0 for padding; or as `real_tokens` says
    past_key_values: object  # the cache; its state is read here

    @property
    def tokens(self):
        """[B, S] tensor of the tokens' shape and device."""
        return self.inputs_embeds[..., 0] if self.input_ids is None else self.input_ids


def plan_pass(passes, selection, inputs, make_gated):
    """The `PassPlan` of a pass, and the new state of its cache (key -> tensor or `GatedPass`); see `remember`.
    `make_gated`: `gated_pass`, or what continuous batching has in its place."""
    takes_part = selection.enabled or torch.is_grad_enabled()  # of adapters that are off, gradients stay defined
    layers = passes.layer_plans(selection) if takes_part else {}
    plan = PassPlan(layers, records=passes.thread.records, fused=passes.current.fused)
    extending = {name: one.config for name, one in selection.adapters.items() if one.config.extended_layers}
    if not selection.enabled or not extending:
        return plan, {}
    names = [name for name in selection.taking_part if name in extending]
    scopes = {name: extending[name].scope for name in names}
    if "modality" in scopes.values() and inputs.input_ids is None:
        raise ValueError(
            "scope='modality' finds image and audio tokens in input_ids, but only inputs_embeds was given. Pass "
            "input_ids (with pixel_values or input_features), or use scope='all'."
        )
    served, state, gates = selection.served(len(inputs.tokens)), {}, {}
    kept = {config.scope for config in extending.values()} != {"all"}  # whether a cache keeps anything of scope
    past_length = seen_tokens(inputs.past_key_values) if kept else 0
    for name in (name for name in names if scopes[name] == "gate"):
        threshold = passes.thread.thresholds.get(name, selection.thresholds[name])
        gates[name] = make_gated(name, inputs, past_length, served.get(name), threshold)
    after_image = None
    if inputs.input_ids is not None and any(config.scope == "modality" for config in extending.values()):
        is_image = selection.placeholders(inputs.input_ids)
        is_real = real_tokens(inputs, past_length)
        after_image, state[IMAGES] = modality_scope(
            is_image, inputs.position_ids, inputs.past_key_values, past_length, is_real
        )
    decided = {}
    for name in (name for name in names if name not in gates):
        parts = [after_image] if scopes[name] == "modality" else []
        parts += [served[name].to(inputs.tokens.device).unsqueeze(1).expand_as(inputs.tokens)] if served else []
        if parts:
            decided[name] = functools.reduce(torch.logical_and, parts).reshape(-1)
    if inputs.input_ids is None and any("embedding" in extending[name].deltas for name in names):
        raise ValueError(
            "deltas=('embedding', ...) adds to what input_ids stand for, but only inputs_embeds was given. Pass "
            "input_ids, or use an adapter without it."
        )
    selections = {name: extending[name].selection for name in names}
    decisions = {"groups": selection.groups, "scopes": decided, "gates": gates, "selections": selections}
    plan = replace(plan, **decisions, input_ids=inputs.input_ids)
    return plan, {**state, **gates}


def real_tokens(inputs, past_length):
    """[B, S] bool: the tokens of this pass that are no padding. A mask of more dimensions, as `generate` makes for a
    static cache, shows it on its diagonal: padding is nobody's key, not even its own. `None`: there is none."""
    mask, (size, length) = inputs.attention_mask, inputs.tokens.shape
    if isinstance(mask, dict):  # kind of attention -> its mask
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return torch.ones_like(inputs.tokens, dtype=torch.bool)
    first = min(past_length, mask.shape[-1] - length)  # a mask of a sliding cache has no columns for its oldest tokens
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask[:, first : first + length].to(inputs.tokens.device).bool()
    index = torch.arange(length, device=inputs.tokens.device)
    if isinstance(mask, torch.Tensor):
        diagonal = mask[:, 0].to(index.device)[:, index, first + index]
        is_real = diagonal > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else diagonal.bool()
    else:  # a BlockMask of flex attention
        items = torch.arange(size, device=index.device).unsqueeze(1)
        is_real = mask.mask_mod(items, index.new_zeros(()), index, first + index)
    return is_real.expand_as(inputs.tokens)


def gated_pass(name, inputs, past_length, served, threshold):
    """The `GatedPass` for the gate of the adapter `name`."""
    is_real = real_tokens(inputs, past_length)
    columns = torch.arange(is_real.shape[1], device=is_real.device).expand_as(is_real)
    starts = sequence_starts(is_real, inputs.position_ids, columns)
    return GatedPass(is_real, starts, cached_state(inputs.past_key_values, name), past_length, served, threshold)


def modality_scope(is_image, position_ids, cache, past_length, is_real=None):
    """[B, S] bool: at or after the first image token of its own sequence. And [B]: the state after this pass.

    is_image, is_real [B, S] bool: image tokens; tokens that are no padding, `None`: all.
    """
    slots = past_length + torch.arange(is_image.shape[1], device=is_image.device).expand_as(is_image)
    starts = sequence_starts(torch.ones_like(is_image) if is_real is None else is_real, position_ids, slots)
    # The newest image token so far, per token; one that lies before the token's own sequence does not count.
    newest = torch.where(is_image, slots, -1).cummax(dim=1).values
    in_scope = (newest >= starts) & (newest >= 0)
    cached = cached_first(cache, is_image.shape[0], past_length, is_image.device)
    in_scope = in_scope | ((starts < 0) & (cached < NEVER).unsqueeze(1))
    first = torch.where(in_scope, slots, NEVER).masked_fill(slots < starts[:, -1:], NEVER).amin(dim=1)
    return in_scope, torch.where(starts[:, -1] < 0, torch.minimum(first, cached), first)


def sequence_starts(is_real, position_ids, slots):
    """[B, S]: the one of `slots` [B, S] where each token's sequence starts, -1: before this pass or at its head.

    A token starts a sequence whose position is not above that of the token before it, or is 0 where this pass has none
    before it. Padding (not `is_real` [B, S]) is passed over: it starts nothing, whatever its positions say.
    """
    if position_ids is not None and position_ids.dim() == 3:  # of a multimodal base: text, time, height and width
        position_ids = position_ids[0] if len(position_ids) == 4 else None
    if position_ids is None:
        return torch.full_like(slots, -1)
    position_ids = position_ids.expand_as(is_real)
    columns = torch.arange(is_real.shape[1], device=is_real.device).expand_as(is_real)
    latest = torch.where(is_real, columns, -1).cummax(dim=1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)  # -1: none in this pass
    previous = position_ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, 0)
    return torch.where(is_real & (position_ids <= previous), slots, -1).cummax(dim=1).values


def cached_state(cache, key):
    """What `cache` remembers under `key` (`IMAGES`, or the name of an adapter with a gate), or `None`."""
    return (getattr(cache, STATE, None) or {}).get(key)


def cached_first(cache, batch_size, past_length, device):
    """[B]: the state of `cache`, without images that a crop has cut off; `NEVER` where there is none yet."""
    state = cached_state(cache, IMAGES)
    if state is None:
        return torch.full((batch_size,), NEVER, device=device)
    state = state.to(device)
    return torch.where(state < past_length, state, NEVER)


def remember(cache, state):
    """Keeps `state` (key -> tensor or `GatedPass`) with `cache`, so that the next pass and every move of its items
    find it. What other adapters have left there stays."""
    state = {key: value.sums if isinstance(value, GatedPass) else value for key, value in state.items()}
    state = {key: value for key, value in state.items() if value is not None}
    if cache is not None and state:
        setattr(follow_items(cache), STATE, {**(getattr(cache, STATE, None) or {}), **state})


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


MOVES = {  # cache methods that move items or cut tokens off -> what becomes of the state
    "reorder_cache": lambda cache, state, index: state.index_select(0, index.to(state.device)),
    "batch_select_indices": lambda cache, state, index: state[index.to(state.device)],
    "batch_repeat_interleave": lambda cache, state, repeats: state.repeat_interleave(repeats, dim=0),
    "crop": cut,
    "reset": lambda cache, state: None,
}


def follow_items(cache):
    """Makes `cache` move its state whenever it moves its items or is cut, and returns it. A subclass of whatever class
    it has keeps `isinstance` true and survives `deepcopy` and pickling, which patched methods would not."""
    if not hasattr(type(cache), "moextend_follows"):
        cache.__class__ = following_class(type(cache))
    return cache


@functools.cache
def following_class(cache_class):
    """`cache_class`, with the state moved along. No import finds it, so pickling makes it anew."""

    def reduce(cache, protocol):
        return empty_instance, (following_class, cache_class), cache.__dict__

    moves = {name: following(getattr(cache_class, name), MOVES[name]) for name in MOVES.keys() & dir(cache_class)}
    return type(cache_class.__name__, (cache_class,), {"moextend_follows": True, "__reduce_ex__": reduce, **moves})


def empty_instance(make_class, *args):
    """An empty instance of a class made at run time, which unpickling and `deepcopy` fill."""
    return object.__new__(make_class(*args))


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
