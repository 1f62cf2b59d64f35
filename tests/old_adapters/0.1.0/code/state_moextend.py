"""What a model's forward passes tell its MoE layers: which adapters take part, for which tokens, and who listens."""

import contextlib
import threading

import torch

BASE = "__base__"  # in adapter_names: a row of the batch that no adapter serves


def meeting(rows):
    """Names that share tokens in `rows` (for each row of the batch its names), as sorted tuples; none is in two."""
    groups = []
    for row in map(set, rows):
        row = row.union(*(group for group in groups if group & row))
        groups = [group for group in groups if not group & row] + [row]
    return tuple(sorted(tuple(sorted(group)) for group in groups if group))


class PassState(threading.local):
    """What the forward passes of one thread tell every MoE layer; each thread has values of its own.

    Attributes:
        enabled: whether new experts take part; `None`: as `RoutingState.switched_on` says.
        rows: for each row of the batch the names of the adapters that serve it, `()`: the base alone; `None`: the
            active adapters serve every row.
        groups: tuples of adapter names, those of a tuple share tokens; `None`: the active ones do.
        scopes: adapter name -> [T] bool, tokens that may use its new experts; not in it: every token, but with
            `scope="gate"` none until its gate has decided.
        gated: adapter name -> the `GatedPass` from which its gate makes its scope.
        records: filled with a `RoutingRecord` a layer while someone listens.
    """

    enabled = None
    rows = None
    groups = None
    scopes = {}  # replaced, never written to
    gated = {}
    records = None


class RoutingState:
    """One object a model, shared by its MoE layers: what holds for all threads, and the pass of each thread.

    Attributes:
        switched_on: `False` after `disable_adapters`.
        active: names of the adapters that take part, in ascending order.
        target: the adapter that is trained, saved and asked for its tensors where no name is given: the only active
            one, or the one that was trained on top of the others; `None` where there is no such one.
    """

    def __init__(self, switched_on=True, active=(), target=None):
        self.switched_on, self.active, self.target = switched_on, active, target
        self.now = PassState()

    def __reduce__(self):
        # a pass under way is not copied or pickled along
        return RoutingState, (self.switched_on, self.active, self.target)

    @property
    def enabled(self):
        return self.switched_on if self.now.enabled is None else self.now.enabled

    @property
    def wanted(self):
        """Names of the adapters that this pass is for, whether they are switched on or not."""
        return self.active if self.now.rows is None else tuple(sorted({name for row in self.now.rows for name in row}))

    @property
    def groups(self):
        """Tuples of adapter names; adapters of different tuples never meet on one token. Empty while switched off."""
        if not self.enabled:
            return ()
        return (self.active,) if self.now.groups is None else self.now.groups

    @property
    def names(self):
        """Adapters whose new experts take part in this pass. In ascending order, as `active` and `wanted` are, so that
        the order of loading or naming changes no sum."""
        return [name for group in self.groups for name in group]

    def rows_of(self, names, tokens):
        """Adapter name -> [B] bool, the rows of `tokens` [B, ...] that it serves; `{}`: every adapter serves all.

        `generate` asks for a row a prompt and then repeats the rows, for beams and for several answers.
        """
        rows = self.now.rows
        if rows is None:
            return {}
        repeats = len(tokens) // len(rows)
        return {name: torch.tensor([name in row for row in rows for _ in range(repeats)]) for name in names}

    @property
    def scopes(self):
        return self.now.scopes

    @property
    def gated(self):
        return self.now.gated

    @property
    def records(self):
        return self.now.records

    @contextlib.contextmanager
    def using(self, **values):
        """Sets attributes of this thread's `PassState` for the length of a `with` block."""
        before = [(name, getattr(self.now, name)) for name in values]
        for name, value in values.items():  # one by one: torch.compile can't trace `__dict__.update`
            setattr(self.now, name, value)
        try:
            yield
        finally:
            for name, value in before:
                setattr(self.now, name, value)

    def checkpoint_contexts(self, other=None):
        """`context_fn` of `torch.utils.checkpoint`: the recomputation in backward sees what its forward saw.

        Without it a layer recomputed after the forward pass would route every token as if in scope. `other` is a
        `context_fn` to run inside this one. The values are set in the thread that recomputes.
        """
        forward, recompute = other() if other else (contextlib.nullcontext(), contextlib.nullcontext())
        seen = {"enabled": self.enabled, "groups": self.groups, "rows": self.now.rows, "scopes": self.scopes}
        seen |= {"gated": self.gated, "records": None}

        @contextlib.contextmanager
        def replay():
            with self.using(**seen), recompute:
                yield

        return forward, replay()
