"""Which Nyström heads use what their spec's `beyond` says, retrieval or exact attention, and how they come to do so."""

import torch

from ..core.parameters import HeadParameters, NystromParameters

SELECTIONS = ("error", "probe")
# Of the key heads, where a probe chooses and nobody says how many.
SHARE = 0.1


def beyond_heads(state, results: list[dict], max_error: float, groups: int) -> list[int]:
    """Return the Nyström heads of a module with an error above `max_error`, of key heads with `groups` query heads.

    Of a spec with beyond="retrieval" all those that share a key head with one: its keys are kept for that one anyway.
    """
    chosen = []
    for heads, group, result in zip(state.head_lists, state.groups, results, strict=True):
        if isinstance(group, NystromParameters):
            heads = list(range(state.num_heads)) if heads is None else heads
            errors = result["output_error"].tolist()
            over = [head for head, error in zip(heads, errors, strict=True) if error > max_error]
            if group.spec.beyond == "retrieval":
                key_heads = {head // groups for head in over}
                over = [head for head in heads if head // groups in key_heads]
            chosen += over
    return chosen


@torch.no_grad()
def take_beyond(model, name: str, state, results: list[dict], chosen: list[int]) -> list[dict]:
    """Take heads out of a module's Nyström heads: they retrieve, or are left exact, as the spec's `beyond` says.

    Returns the figures of the groups that there are then: a group that has no head left goes, one that retrieves has
    none.
    """
    entries = model.config.distattn["modules"][name]["groups"]
    for number in reversed(range(len(state.groups))):
        group = state.groups[number]
        heads = list(range(state.num_heads)) if state.head_lists[number] is None else state.head_lists[number]
        gone = sorted(set(heads) & set(chosen))
        if not isinstance(group, NystromParameters) or not gone:
            continue
        spec, entry = group.spec, entries[number]
        kept = [head for head in heads if head not in gone]
        if kept:
            is_kept = torch.tensor([head in kept for head in heads])
            smaller = NystromParameters(spec, len(kept), group.head_dim, group.has_origin)
            smaller.to(group.landmarks)
            for key, tensor in smaller.fitted_tensors().items():
                tensor.copy_(group.fitted_tensors()[key][is_kept])
            state.groups[number], state.head_lists[number] = smaller, kept
            entries[number] = {**entry, "heads": kept}
            results[number] = {key: values[is_kept] for key, values in results[number].items()}
        else:
            for grouped in (state.groups, state.head_lists, entries, results):
                del grouped[number]
        if spec.beyond == "retrieval":
            state.groups.append(HeadParameters(spec.beyond_spec(), len(gone), group.head_dim, group.has_origin))
            state.head_lists.append(gone)
            entries.append({**entry, "heads": gone, "beyond": True})
            results.append({})
    return results


def largest_errors(model, results: dict[str, list[dict]], groups: dict[str, int]) -> dict[tuple[str, int], float]:
    """Return {(module name, key head): the largest output error of its Nyström heads}."""
    errors: dict[tuple[str, int], float] = {}
    for name, state in model.attention_states.items():
        for (heads, _), result in zip(state.parts(), results[name]):
            for head, error in zip(heads, result["output_error"].tolist() if "output_error" in result else ()):
                key_head = name, head // groups[name]
                errors[key_head] = max(error, errors.get(key_head, 0.0))
    return errors


def take_share(
    model, results: dict[str, list[dict]], scores: dict[tuple[str, int], float], groups: dict[str, int], options
) -> None:
    """Take the key heads of the largest scores from the Nyström heads, options.beyond_share of them and at least one.

    results: figures of each module's groups of heads, which follow.
    """
    count = max(1, round(options.beyond_share * len(scores)))
    chosen = sorted(scores, key=scores.get, reverse=True)[:count]
    for name, state in model.attention_states.items():
        heads = [head for head in range(state.num_heads) if (name, head // groups.get(name, 1)) in chosen]
        results[name] = take_beyond(model, name, state, results[name], heads)
