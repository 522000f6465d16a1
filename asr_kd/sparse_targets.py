"""One frame's distribution in a few dozen bytes, without bias: the large probabilities as they are, a sample of the rest.

Truncating a distribution to its top k is biased: the student is taught that the rest is impossible, and at T > 1 over thousands
of states the rest holds most of the mass (Anshumann et al., Sparse Logit Sampling, ACL 2025). Here the largest probabilities are
kept ("exact" entries) and the rest is represented by states drawn with probability proportional to theirs, all of one weight
(Horvitz-Thompson estimate). The draw is systematic: one uniform number per frame, equal steps along the cumulative
distribution in the order of the state ids. So the number of drawn states is fixed, they differ, the entries sum to one, and
neighbouring state ids (the same phone) are represented in proportion almost without variance.

A record is `bytes_per_frame // 2` words of 16 bits: j | ids of j exact entries | their probabilities in 1/65535 | ids of the drawn states.
An exact entry costs two words, a drawn one a single word, since the drawn ones share what the exact ones leave of the mass.
j is the smallest number for which no drawn state has more probability than that share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asr_kd.errors import AsrKdError
from asr_kd.losses import SparseTargets

UNITS = 65535
MAX_STATES = 65536
SMALLEST_RECORD_BYTES = 8


def check_record_size(bytes_per_frame: int, num_states: int) -> None:
    """Raise `AsrKdError` unless frames over `num_states` states can be written in records of `bytes_per_frame`."""
    if bytes_per_frame < SMALLEST_RECORD_BYTES or bytes_per_frame % 2:
        raise AsrKdError(f"sparse soft targets of {bytes_per_frame} bytes per frame; expected an even number, at least {SMALLEST_RECORD_BYTES}")
    if num_states > MAX_STATES:
        raise AsrKdError(f"sparse soft targets over {num_states} states; state ids are stored in 16 bits, at most {MAX_STATES}: use the dense form")


def encode(posteriors: Tensor, uniforms: Tensor, bytes_per_frame: int) -> Tensor:
    """Records of distributions; the expectation of `decode(encode(p, u))` over the uniforms is p.

    Args:
        posteriors: (N, S), non-negative, rows of sum 1.
        uniforms: (N, 2) in [0, 1), independent: one for drawing the states, one for rounding the exact entries.
        bytes_per_frame: size of a record.

    Returns:
        (N, bytes_per_frame // 2) int16, the bits of unsigned words.
    """
    num_slots = bytes_per_frame // 2 - 1
    precise = posteriors.double()
    top, top_ids, num_exact = _exact_entries(posteriors, precise.sum(1, keepdim=True), num_slots)
    is_exact = torch.arange(top.shape[1], device=top.device) < num_exact[:, None]
    rest = precise.scatter(1, top_ids, torch.where(is_exact, 0.0, top)).cumsum(1)  # (N, S) cumulative, exact entries left out
    top = torch.where(is_exact, top, 0.0)
    units = round_to_units(torch.cat([top, rest[:, -1:]], 1), uniforms[:, :1].double())[:, :-1]
    drawn_ids = draw(rest, num_slots, uniforms[:, 1:].double(), (num_slots - 2 * num_exact)[:, None])
    return _pack(num_exact, top_ids, units, drawn_ids, num_slots)


def decode(records: Tensor) -> SparseTargets:
    """Records (N, W) of int16 words -> entries (N, W - 1) that sum to 1 in every frame; unused slots hold state 0 with probability 0."""
    words = unsigned_words(records)
    num_slots = words.shape[1] - 1
    num_exact = words[:, :1]
    slot = torch.arange(num_slots, device=words.device)[None]
    is_exact = slot < num_exact
    is_used = slot < num_slots - num_exact
    id_word = torch.where(is_exact, slot + 1, slot + 1 + num_exact).clamp(max=num_slots)
    units = words.gather(1, (slot + 1 + num_exact).clamp(max=num_slots)) * is_exact
    drawn = (UNITS - units.sum(1, keepdim=True)).float() / (UNITS * (num_slots - 2 * num_exact))
    probabilities = torch.where(is_exact, units.float() / UNITS, drawn) * is_used
    indices = words.gather(1, id_word) * is_used
    return SparseTargets(indices, probabilities)


def _exact_entries(posteriors: Tensor, total: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (N, J) in float64 with their ids, and how many of them (N,) to keep exactly; `total` (N, 1) is the mass of all."""
    num_states = posteriors.shape[1]
    most = min((num_slots - 1) // 2, num_states)
    top, ids = posteriors.topk(min(most + 1, num_states), dim=1)
    top = top.double()
    left = (total - torch.nn.functional.pad(top.cumsum(1), (1, 0))[:, :most]).clamp(min=0)  # mass left by 0..J-1 exact entries
    slots_left = num_slots - 2 * torch.arange(most, device=top.device)
    enough = top[:, :most] * slots_left <= left  # (N, J): no drawn state would have more than the common weight
    num_exact = torch.where(enough.any(1), enough.int().argmax(1), most)
    return top[:, :most], ids[:, :most], num_exact


def draw(cumulative: Tensor, num_slots: int, uniform: Tensor, num_drawn: Tensor | None = None) -> Tensor:
    """Systematic sample from masses of cumulative sums (N, S): ids (N, num_slots), of which the first `num_drawn` (N, 1) of each row count."""
    points = (torch.arange(num_slots, device=cumulative.device) + uniform) * (cumulative[:, -1:] / (num_slots if num_drawn is None else num_drawn))
    return torch.searchsorted(cumulative, points, right=True).clamp(max=cumulative.shape[1] - 1)


def _pack(num_exact: Tensor, top_ids: Tensor, units: Tensor, drawn_ids: Tensor, num_slots: int) -> Tensor:
    """Lay out the words: j, j ids, j probabilities, the drawn ids."""
    word = torch.arange(num_slots, device=units.device)[None]
    exact = num_exact[:, None]
    most = top_ids.shape[1] - 1
    body = torch.where(word < exact, top_ids.gather(1, word.clamp(max=most).expand(len(units), -1)),
                       torch.where(word < 2 * exact, units.gather(1, (word - exact).clamp(0, most)), drawn_ids.gather(1, (word - 2 * exact).clamp(min=0))))
    return signed_words(torch.cat([exact, body], 1))


def round_to_units(masses: Tensor, uniform: Tensor | float) -> Tensor:
    """Whole numbers of sum 65535 in every row, proportional to `masses` (N, J) in expectation over `uniform` (N, 1), and always within 1."""
    edges = masses.cumsum(1)
    edges = torch.floor(edges * (UNITS / edges[:, -1:]) + uniform)
    edges[:, -1] = UNITS  # rounding of the product must not lose the last unit
    return torch.diff(edges, dim=1, prepend=torch.zeros_like(edges[:, :1])).long()


def signed_words(words: Tensor) -> Tensor:
    """Integers below 65536 as int16 of the same bits: torch computes with no unsigned 16-bit type."""
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def unsigned_words(words: Tensor) -> Tensor:
    """What `signed_words` was given, int64."""
    return words.long() & 0xFFFF
