"""The token gate of `scope="gate"`: which tokens look like the new task, judged from what came before them.

Letters: B batch items, S tokens of this pass, L tokens in the cache after it, T = B * S, H hidden size, D gate size.

One gate serves all extended layers of its adapter. It reads the router input of the lowest one, which no new expert of
that adapter has touched: so it can be trained once, on hidden states of the base (or of what the adapter was trained
on top of) computed once, and no later training moves what it decides.
"""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

SCORE_LIMIT = 8.0  # scores are kept within e^-8 ... e^8, so that sums over a long context neither vanish nor overflow
CLOSED = -1.0  # margin of an untrained gate, for every token


class TokenGate(nn.Module):
    """z_t = MLP([h_t, m_t]); m_t, per channel, is a mean of v(h_s) over s <= t with weights exp(k(h_s)).

    The weighted mean is attention without queries (as in AFT, arXiv 2105.14103): two running sums give it, in one step
    a token. Weights let a single telling token stand out in a long context, where a plain mean fades as 1/t.

    key, value [D, H], fc1 [D, H + D], fc2 [1, D]. fc2 starts at zero with bias -1: an untrained gate is closed.
    """

    checked = False  # whether the first training pass has looked at it

    def __init__(self, hidden_size: int, gate_size: int, device=None):
        super().__init__()
        options = {"device": device, "dtype": torch.float32}
        self.key = nn.Linear(hidden_size, gate_size, **options)
        self.value = nn.Linear(hidden_size, gate_size, **options)
        self.fc1 = nn.Linear(hidden_size + gate_size, gate_size, **options)
        self.fc2 = nn.Linear(gate_size, 1, **options)
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, CLOSED)

    def forward(self, hidden_states: torch.Tensor, gated: "GatedPass") -> torch.Tensor:
        """Routing margins z [B, S] of hidden states [B, S, H], in float32 whatever the base's dtype.

        `gated` (a `GatedPass`) says where sequences start and what the cache holds; it gets the new sums.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):  # the same decision in training and in use
            hidden = hidden_states.detach().float()
            weights = linear(self.key, hidden).clamp(-SCORE_LIMIT, SCORE_LIMIT).exp()
            sums = gated.add(torch.cat([weights * linear(self.value, hidden), weights], dim=-1))
            total, weight = sums.chunk(2, dim=-1)
            context = total / weight.clamp_min(torch.finfo(torch.float32).tiny)
            inner = F.gelu(linear(self.fc1, torch.cat([hidden, context], dim=-1)))
            return linear(self.fc2, inner).squeeze(-1)


def is_at_hand(tensor):
    """Whether a branch may go by the values of `tensor`: else an accelerator is waited for, or a graph breaks."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def linear(layer, hidden):
    """`layer`, computed in float32 whatever dtype a user has cast the model to."""
    return F.linear(hidden, layer.weight.float(), layer.bias.float())


def warn_if_closed(name, part, threshold):
    """Says once, in training, that the gate of the adapter `name` was never trained and keeps every token from new
    experts (`part`: its `NewExperts` in the lowest layer) that are to train."""
    gate = part.rows.gate
    trains = gate.training and torch.is_grad_enabled() and any(p.requires_grad for p in part.experts.parameters())
    if gate.checked or not trains:
        return
    gate.checked = True
    if not gate.fc2.weight.any() and float(gate.fc2.bias) <= threshold:
        warnings.warn(
            f"The gate of adapter {name!r} was never trained and lets no token through: its new experts learn nothing."
            " MoExtendSFTTrainer trains the gate before them; load what it has saved, open the gate to every token "
            f"(model.gate_threshold = {2 * CLOSED}), or make the adapter with from_base(..., scope='all').",
            stacklevel=2,
        )


class GatedPass:
    """One forward pass as the gate of one adapter sees it. What it finds: `in_scope` [T] bool, the tokens let through,
    and `sums` [B, L, 2 D] float32, the state of the cache after this pass; `None` before.

    Args:
        is_real: [B, S] bool, no padding.
        starts: [B, S] column of this pass at which each token's sequence starts, -1: before this pass.
        cached: [B, up to past, 2 D] sums after every token in the cache; `None`: no pass with the gate before.
        past_length: number of tokens in the cache, by default those of `cached`; others (the adapter was off, or not
            active) count for nothing.
        items: [B] bool, items of the batch that the gate's adapter serves; `None`: all of them.
        threshold: a token is let through when its margin is above it.
    """

    def __init__(self, is_real, starts, cached=None, past_length=None, items=None, threshold=0.0):
        self.is_real, self.starts, self.cached, self.threshold = is_real, starts, cached, threshold
        self.allowed = is_real if items is None else is_real & items.to(is_real.device).unsqueeze(1)
        known = 0 if cached is None else cached.shape[1]
        self.past_length = known if past_length is None else past_length
        packed = (starts >= 0).any()
        self.packed = bool(packed) if is_at_hand(packed) else packed
        self.sums = self.in_scope = None

    def apply_gate(self, gate, hidden_states):
        """Asks the gate about hidden states [T, H]; returns its margins [T]."""
        margins = gate(hidden_states.reshape(*self.is_real.shape, -1), self)
        in_scope = (margins > self.threshold) & self.allowed.to(margins.device)
        self.in_scope = in_scope.detach().reshape(-1)
        return margins.reshape(-1)

    def add(self, terms):
        """Sums [B, S, 2 D] of `terms` over each token's own sequence so far; padding and items of other adapters add
        nothing."""
        terms = terms.masked_fill(~self.allowed.to(terms.device).unsqueeze(-1), 0)
        starts = self.starts.to(terms.device).unsqueeze(-1)
        sums = terms.cumsum(dim=1)
        if self.packed is not False:  # one sum is taken from another, which float32 is too coarse for
            wide = torch.float32 if terms.device.type == "mps" else torch.float64  # MPS has no wider one
            exact = terms.to(wide).cumsum(dim=1)
            before = F.pad(exact, (0, 0, 1, 0))[:, :-1]  # what came before each token
            exact = (exact - before.gather(1, starts.clamp(min=0).expand_as(exact))).float()
            sums = exact if self.packed is True else torch.where(self.packed.to(exact.device), exact, sums)
        if self.past_length:
            cached = self.filled(sums)
            sums = sums + cached[:, -1:].masked_fill(starts >= 0, 0)
        self.sums = torch.cat([cached, sums.detach()], dim=1) if self.past_length else sums.detach()
        return sums

    def filled(self, sums):
        """[B, past, 2 D]: the cache's sums, the last ones repeated (or zeros) where tokens came without the gate."""
        cached = sums.new_zeros(len(sums), 0, sums.shape[-1]) if self.cached is None else self.cached.to(sums.device)
        cached = cached[:, : self.past_length]
        last = cached[:, -1:] if cached.shape[1] else sums.new_zeros(len(sums), 1, sums.shape[-1])
        return torch.cat([cached, last.expand(-1, self.past_length - cached.shape[1], -1)], dim=1)
