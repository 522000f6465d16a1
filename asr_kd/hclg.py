"""The last step of the decoding graph: C o L o G with phone windows on its arcs becomes HCLG with HMM states on them.

An arc with state ids (a, b, c) becomes three self-looping nodes:

    source --a--> first --b--> second --c--> third --> destination

`first` belongs to (source, a), so that words that begin alike are followed once; `second` to (destination, b, c) and `third`
to (destination, c), so that words that end alike are too. A destination that only one `third` enters is merged with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr_kd.const_fst import ARC, STATE, ConstFst, ConstFstWriter
from asr_kd.hmm.model import HmmModel

IntArray = NDArray[np.int64]

_CHUNK_STATES = 1 << 18
_MAX_SPLICED_ARCS = 8  # a state of more arcs stays behind its epsilon, where one token can be pruned for all of them


def write_hclg(clg: ConstFst, windows: IntArray, hmm: HmmModel, path: Path, transition_scale: float, chunk_states: int = _CHUNK_STATES) -> dict[str, int]:
    """Replace each arc of C o L o G by three self-looping states, and write the result as a ConstFst.

    Args:
        clg: input labels index `windows`.
        windows: (K, 3) phone ids left, centre, right; -1 where the label is epsilon or a disambiguation symbol.
        hmm: state ids, (S,) log transitions.
        path: written.
        transition_scale: factor on the log transition probabilities.
        chunk_states: states of `clg` handled at a time; bounds memory, does not change the result.

    Returns:
        `num_states` and `num_arcs` of the graph.
    """
    emits = windows[:, 1] >= 0  # (K,)
    state_ids = np.full(windows.shape, -1, np.int64)
    state_ids[emits] = hmm.state_ids(*windows[emits].T)
    clg = contract_epsilons(clg, emits)
    plan = _plan(clg, state_ids, hmm.num_states)
    loop_cost = (-transition_scale * np.asarray(hmm.log_self_loop)).astype(np.float32)  # (S,)
    advance_cost = (-transition_scale * np.asarray(hmm.log_advance)).astype(np.float32)  # (S,)
    with ConstFstWriter(path, int(plan.node[clg.start]), int(plan.node[-1]), plan.num_arcs) as writer:
        for begin in range(0, len(clg.states), chunk_states):
            writer.append(*_expand(clg, plan, begin, min(begin + chunk_states, len(clg.states)), loop_cost, advance_cost))
    return {"num_states": int(plan.node[-1]), "num_arcs": plan.num_arcs}


def contract_epsilons(clg: ConstFst, emits: NDArray[np.bool_]) -> ConstFst:
    """The same paths with fewer epsilon arcs, so that the search visits fewer states.

    A state whose one arc is an epsilon gives way to that arc's destination; a state that one epsilon arc alone enters gives its
    arcs to that arc's source. Start and final states stay. States that nothing enters any more are left out.

    Args:
        clg: to be contracted; input labels index `emits`.
        emits: (K,) False for labels that stand for epsilon.
    """
    arcs = np.array(clg.arcs)
    final = np.array(clg.states["final"])
    source = np.repeat(np.arange(len(final)), clg.states["num_arcs"])
    fixed = np.isfinite(final)
    fixed[clg.start] = True
    source, arcs = _skip_states_before_epsilon(source, arcs, fixed, emits)
    source, arcs = _splice_states_after_epsilon(source, arcs, fixed, emits)
    return _compact(clg.start, final, source, arcs)


def _skip_states_before_epsilon(
    source: IntArray, arcs: NDArray[np.void], fixed: NDArray[np.bool_], emits: NDArray[np.bool_]
) -> tuple[IntArray, NDArray[np.void]]:
    leaving = np.bincount(source, minlength=len(fixed))
    bare = ~emits[arcs["ilabel"]] & (arcs["olabel"] == 0) & (leaving[source] == 1) & ~fixed[source]
    cost = np.zeros(len(fixed), np.float32)
    cost[source[bare]] = arcs["weight"][bare]
    target, cost = _follow(source[bare], arcs["next_state"][bare], cost)
    source, arcs = source[~bare], arcs[~bare]
    arcs["weight"] += cost[arcs["next_state"]]
    arcs["next_state"] = target[arcs["next_state"]]
    return source, arcs


def _splice_states_after_epsilon(
    source: IntArray, arcs: NDArray[np.void], fixed: NDArray[np.bool_], emits: NDArray[np.bool_]
) -> tuple[IntArray, NDArray[np.void]]:
    entering = np.bincount(arcs["next_state"], minlength=len(fixed))
    leaving = np.bincount(source, minlength=len(fixed))
    destination = arcs["next_state"]
    bare = ~emits[arcs["ilabel"]] & (arcs["olabel"] == 0) & (entering[destination] == 1) & (leaving[destination] <= _MAX_SPLICED_ARCS) & ~fixed[destination]
    cost = np.zeros(len(fixed), np.float32)
    cost[destination[bare]] = arcs["weight"][bare]
    owner, cost = _follow(destination[bare], source[bare], cost)
    source, arcs = source[~bare], arcs[~bare]
    arcs["weight"] += cost[source]
    return owner[source], arcs


def _follow(states: IntArray, others: IntArray, cost: NDArray[np.float32]) -> tuple[IntArray, NDArray[np.float32]]:
    """(D,) where `states[i] -> others[i]` leads when followed to its end, and the summed (D,) cost; pointers double each round."""
    pointer = np.arange(len(cost))
    pointer[states] = others
    for _ in range(len(cost).bit_length()):
        further = pointer[pointer]
        if (further == pointer).all():
            break
        cost, pointer = cost + cost[pointer], further
    return pointer, cost


def _compact(start: int, final: NDArray[np.float32], source: IntArray, arcs: NDArray[np.void]) -> ConstFst:
    """Number anew the states that are the start or have an arc in or out, and group arcs by source."""
    used = np.zeros(len(final), bool)
    used[start] = True
    used[source] = used[arcs["next_state"]] = True
    number = np.cumsum(used) - 1
    order = np.argsort(source, kind="stable")
    arcs = arcs[order]
    arcs["next_state"] = number[arcs["next_state"]]
    states = np.zeros(int(used.sum()), STATE)
    states["final"] = final[used]
    states["num_arcs"] = np.bincount(number[source], minlength=len(states))
    states["first_arc"] = _offsets(states["num_arcs"])[:-1]
    return ConstFst(int(number[start]), states, arcs)


@dataclass(frozen=True)
class _Plan:
    """Which nodes HCLG has for the D states of CLG: the state itself if kept, its firsts, then the seconds and thirds that enter it.

    E emitting arcs in order of (source, first state id), F firsts, M seconds, N thirds.
    """

    order: IntArray  # (E,) positions of the emitting arcs in CLG
    state_ids: IntArray  # (E, 3)
    entry_cost: NDArray[np.float32]  # (F,) least weight of a first's arcs
    first_begin: IntArray  # (F + 1,) its arcs in `order`
    first_of: IntArray  # (D + 1,) offsets of each state's firsts
    second_of: IntArray  # (D + 1,)
    third_of: IntArray  # (D + 1,)
    second_ids: IntArray  # (M, 2) the last two state ids
    third_id: IntArray  # (N,) the last state id
    second_third: IntArray  # (M,) the third that each second leads to
    arc_second: IntArray  # (E,) the second that each emitting arc leads to
    arc_begin: IntArray  # (D + 1,) each state's emitting arcs in `order`
    epsilon: NDArray[np.bool_]  # (A,)
    kept: NDArray[np.bool_]  # (D,)
    node: IntArray  # (D + 1,)
    num_arcs: int


def _plan(clg: ConstFst, label_ids: IntArray, num_state_ids: int) -> _Plan:
    num_clg, base = len(clg.states), num_state_ids
    source = np.repeat(np.arange(num_clg), clg.states["num_arcs"])
    destination = clg.arcs["next_state"].astype(np.int64)
    ids = label_ids[clg.arcs["ilabel"]]  # (A, 3)
    epsilon = ids[:, 0] < 0
    emitting = np.flatnonzero(~epsilon)
    order = emitting[np.argsort(source[emitting] * base + ids[emitting, 0], kind="stable")]
    ids = ids[order]  # (E, 3)
    first_key, first_begin = np.unique(source[order] * base + ids[:, 0], return_index=True)
    second_key, arc_second = np.unique((destination[order] * base + ids[:, 1]) * base + ids[:, 2], return_inverse=True)
    third_key, second_third = np.unique(second_key // base // base * base + second_key % base, return_inverse=True)
    firsts, seconds, thirds = (np.bincount(states, minlength=num_clg) for states in (first_key // base, second_key // base // base, third_key // base))
    kept = thirds != 1
    kept[destination[epsilon]] = True
    kept[clg.start] = True
    weights = clg.arcs["weight"][order]
    return _Plan(
        order=order, state_ids=ids,
        entry_cost=np.minimum.reduceat(weights, first_begin) if len(order) else weights,
        first_begin=np.append(first_begin, len(order)),
        first_of=_offsets(firsts), second_of=_offsets(seconds), third_of=_offsets(thirds),
        second_ids=np.stack([second_key // base % base, second_key % base], 1), third_id=third_key % base,
        second_third=second_third.reshape(-1), arc_second=arc_second.reshape(-1),
        arc_begin=_offsets(np.bincount(source[order], minlength=num_clg)),
        epsilon=epsilon, kept=kept, node=_offsets(kept + firsts + seconds + thirds),
        num_arcs=int(epsilon.sum() + 2 * len(first_key) + len(order) + 2 * len(second_key) + len(third_key) + thirds[kept].sum()),
    )


def _expand(
    clg: ConstFst, plan: _Plan, begin: int, end: int, loop_cost: NDArray[np.float32], advance_cost: NDArray[np.float32]
) -> tuple[NDArray[np.float32], IntArray, NDArray[np.void]]:
    """Final costs (n,), numbers of arcs (n,) and arcs of the nodes that stand for CLG states `begin`..`end`."""
    base = int(plan.node[begin])
    kept, node = plan.kept[begin:end], plan.node[begin:end] - base
    local = {name: _members(offsets, begin, end) for name, offsets in (("first", plan.first_of), ("second", plan.second_of), ("third", plan.third_of))}
    first, first_state = local["first"]
    second, second_state = local["second"]
    third, third_state = local["third"]
    first_node, second_node, third_node = (_nodes(plan, kind, np.arange(members.start, members.stop), states + begin) - base
                                           for kind, (members, states) in enumerate(local.values()))
    holder = node.copy()  # (n,) who has the state's own arcs: itself, or the one third that enters it
    merged = ~kept[third_state]
    holder[third_state[merged]] = third_node[merged]

    first_size = np.diff(plan.first_begin)[first]
    arcs_slice = slice(int(clg.states["first_arc"][begin]), int(clg.states["first_arc"][begin] + clg.states["num_arcs"][begin:end].sum(dtype=np.int64)))
    own_epsilon = plan.epsilon[arcs_slice]
    epsilon_state = np.repeat(np.arange(end - begin), clg.states["num_arcs"][begin:end])[own_epsilon]
    epsilons = np.bincount(epsilon_state, minlength=end - begin)
    firsts = np.diff(plan.first_of[begin : end + 1])
    num_arcs = np.zeros(int(plan.node[end]) - base, np.int64)
    num_arcs[first_node] = 1 + first_size
    num_arcs[second_node] = 2
    num_arcs[third_node] = 1 + kept[third_state]
    num_arcs[holder] += firsts + epsilons
    place = _offsets(num_arcs)
    arcs = np.zeros(int(place[-1]), ARC)
    final = np.full(len(num_arcs), np.inf, np.float32)
    exit_cost = np.zeros(end - begin, np.float32)  # of leaving the third that was merged with the state
    exit_cost[third_state[merged]] = advance_cost[plan.third_id[third][merged]]
    final[holder] = clg.states["final"][begin:end] + exit_cost

    in_order = slice(int(plan.arc_begin[begin]), int(plan.arc_begin[end]))
    ids, order = plan.state_ids[in_order], plan.order[in_order]
    first_id = plan.state_ids[plan.first_begin[:-1][first], 0]
    second_ids, third_id = plan.second_ids[second], plan.third_id[third]
    for nodes, state_id in ((first_node, first_id), (second_node, second_ids[:, 0]), (third_node, third_id)):
        _put(arcs, place[nodes], state_id + 1, loop_cost[state_id], nodes + base)

    own = place[holder] + ~kept
    _put(arcs, own[first_state] + _ranks(firsts), first_id + 1, plan.entry_cost[first] + exit_cost[first_state], first_node + base)
    epsilon_arcs = clg.arcs[arcs_slice][own_epsilon]
    at = own[epsilon_state] + firsts[epsilon_state] + _ranks(epsilons)
    _put(arcs, at, 0, epsilon_arcs["weight"] + exit_cost[epsilon_state], plan.node[epsilon_arcs["next_state"]], epsilon_arcs["olabel"])

    arc_first = np.repeat(np.arange(len(first_size)), first_size)
    emitting = clg.arcs[order]
    target = _nodes(plan, 1, plan.arc_second[in_order], emitting["next_state"].astype(np.int64))
    weight = emitting["weight"] - plan.entry_cost[first][arc_first] + advance_cost[ids[:, 0]]
    _put(arcs, place[first_node][arc_first] + 1 + _ranks(first_size), ids[:, 1] + 1, weight, target, emitting["olabel"])

    to_third = _nodes(plan, 2, plan.second_third[second], second_state + begin)
    _put(arcs, place[second_node] + 1, second_ids[:, 1] + 1, advance_cost[second_ids[:, 0]], to_third)
    leaves = kept[third_state]
    _put(arcs, place[third_node[leaves]] + 1, 0, advance_cost[third_id[leaves]], node[third_state[leaves]] + base)
    return final, num_arcs, arcs


def _members(offsets: IntArray, begin: int, end: int) -> tuple[slice, IntArray]:
    """Which firsts, seconds or thirds belong to states `begin`..`end`, and to which of them (counted from `begin`)."""
    return slice(int(offsets[begin]), int(offsets[end])), np.repeat(np.arange(end - begin), np.diff(offsets[begin : end + 1]))


def _nodes(plan: _Plan, kind: int, members: IntArray, states: IntArray) -> IntArray:
    """Node numbers of firsts (kind 0), seconds (1) or thirds (2), given the CLG states they belong to."""
    before = plan.node[states] + plan.kept[states]
    if kind > 0:
        before += plan.first_of[states + 1] - plan.first_of[states]
    if kind > 1:
        before += plan.second_of[states + 1] - plan.second_of[states]
    return before + members - (plan.first_of, plan.second_of, plan.third_of)[kind][states]


def _put(arcs: NDArray[np.void], place: IntArray, ilabel: Any, weight: Any, next_state: IntArray, olabel: Any = 0) -> None:
    for name, values in (("ilabel", ilabel), ("weight", weight), ("next_state", next_state), ("olabel", olabel)):
        arcs[name][place] = values


def _ranks(counts: IntArray) -> IntArray:
    """0 .. n - 1 for each n of `counts`, one after another."""
    return np.arange(int(counts.sum())) - np.repeat(_offsets(counts)[:-1], counts)


def _offsets(counts: NDArray[Any]) -> IntArray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
