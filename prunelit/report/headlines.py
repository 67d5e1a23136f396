"""The numbers on top of a run's page, and what to do next where the run is not finished.

What was not measured is left out.
"""

import math
from collections.abc import Iterator, Mapping

from prunelit.report.format_numbers import format_count, format_perplexity
from prunelit.report.page.parts import Code, Fact, Part
from prunelit.report.record import STATES, Record

_COSTS = (
    ("parameters", "Parameters"),
    ("active_parameters", "Active parameters"),
    ("macs_per_token", "MACs per token"),
    ("kv_bytes_per_token", "KV cache per token"),
)
_MEGABYTE = 1e6
_LEAST_LOSS = 0.005
"""Nats that a cut must have cost before a share of them says something."""


def compute_regained_share(dense: float | None, pruned: float | None, recovered: float | None) -> float | None:
    """Compute which share of the loss that a cut added is gone after recovery.

    Args:
        dense, pruned, recovered: perplexities on the same text; the loss is their logarithm.

    Returns:
        1 where the model is as good as the dense one, and more where it is better; None where something was not
        measured, or where the cut cost next to nothing.

    Example:
        >>> compute_regained_share(10.0, 40.0, 20.0)
        0.5
    """
    if not (dense and pruned and recovered) or not all(map(math.isfinite, (dense, pruned, recovered))):
        return None
    cost = math.log(pruned / dense)
    return round(math.log(pruned / recovered) / cost, 6) if cost >= _LEAST_LOSS else None


def list_headline_facts(record: Record) -> Iterator[Fact]:
    """List the headline numbers: quality and how much of it is regained, size on the disk, speed, what was removed.

    Args:
        record: the run.

    Example:
        >>> record = Record(facts={"disk_bytes": {"dense": 2_000_000, "pruned": 1_500_000}})
        >>> [(fact.name, fact.value, fact.note) for fact in list_headline_facts(record)]
        [('Size on the disk', '1.5 MB', 'dense 2 MB; 25.0% less')]
    """
    states = [name for name in STATES if name in record.measured]
    perplexity_by_state = {name: record.measured[name].get("perplexity") for name in states}
    measured = {name: value for name, value in perplexity_by_state.items() if value is not None}
    if measured:
        values = [format_perplexity(value) for value in measured.values()]
        yield Fact("Perplexity", " \N{RIGHTWARDS ARROW} ".join(values), ", ".join(measured), wide=len(values) > 1)
    regained = compute_regained_share(*(perplexity_by_state.get(name) for name in STATES))
    if regained is not None:
        yield Fact("Quality regained", f"{regained:.0%}", "of the loss (nats per token) that the cut added")
    yield from _list_disk_facts(record.facts.get("disk_bytes") or {})
    yield from _list_speed_facts(record)
    if record.plan is not None:
        predicted = record.plan.predicted
        share_of_all = f"{predicted['ratio_of_all_parameters']:.1%} of all parameters"
        yield Fact("Removed of the decoder layers", f"{predicted['ratio_of_block_parameters']:.1%}", share_of_all)
    if len(states) > 1:
        first_row, last_row = record.measured[states[0]], record.measured[states[-1]]
        for name, title in _COSTS:
            if first_row.get(name) and last_row.get(name) is not None:
                unit = " B" if name.startswith("kv") else ""
                before, after = first_row[name], last_row[name]
                note = f"dense {format_count(before)}{unit}; {1 - after / before:.1%} less"
                yield Fact(title, f"{format_count(after)}{unit}", note if after != before else "as the dense model")


def _list_disk_facts(disk_bytes: Mapping[str, float]) -> Iterator[Fact]:
    sizes = [(state, disk_bytes[state]) for state in STATES if disk_bytes.get(state)]
    if not sizes or sizes[-1][0] == "dense":
        return
    (_, before), (_, after) = sizes[0], sizes[-1]
    note = ""
    if len(sizes) > 1:
        change = f"{1 - after / before:.1%} less" if after <= before else f"{after / before - 1:.1%} more"
        note = f"dense {_format_bytes(before)}; {change}"
    yield Fact("Size on the disk", _format_bytes(after), note)


def _format_bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / _MEGABYTE:.3g} MB"


def _list_speed_facts(record: Record) -> Iterator[Fact]:
    """Speed, as the perplexity passes over one text took it; the first of them also warms the machine up."""
    tokens = (record.facts.get("protocol") or {}).get("tokens")
    seconds = {stage["name"].removeprefix("evaluate_"): stage["seconds"] for stage in record.stages}
    timed = [state for state in STATES if seconds.get(state, 0) > 0]
    if tokens and len(timed) > 1 and timed[0] == "dense":
        last = timed[-1]
        ratio = seconds["dense"] / seconds[last]
        note = f"{tokens / seconds[last]:,.0f} tokens/s in the perplexity pass, dense {tokens / seconds['dense']:,.0f}"
        yield Fact("Times as fast", f"{ratio:.2f}", f"{note}; one pass each")


def list_next_steps(record: Record) -> Iterator[Part]:
    """List what to do with a run that was refused or stopped; nothing for one that is finished.

    Args:
        record: the run.

    Example:
        >>> list(list_next_steps(Record(kind="fit", facts={"ended_by": "no memory; lower --data.batch_size"})))
        ['The run ended early: no memory; lower --data.batch_size']
    """
    facts = record.facts
    if record.kind != "fit" or facts.get("trained_steps"):
        return
    if ended_by := facts.get("ended_by"):
        yield f"The run ended early: {ended_by}"
    done = [name for name in STATES if name in record.measured]
    if done:
        trained = f", and {record.training[-1]['step']:,} steps of training" if record.training else ""
        yield f"Known so far: {', '.join(done)}{trained}. What is done is kept and not computed again."
    if resume := facts.get("resume"):
        yield Code(resume, "Go on where it stopped; options after the file replace those in it")


def describe_plan_share(record: Record) -> str:
    """Describe in one line what a run removes: the title of its page.

    Args:
        record: the run.

    Example:
        >>> describe_plan_share(Record(title="tiny"))
        'tiny'
    """
    if record.plan is None:
        return record.title or "A run of prunelit"
    share = record.plan.predicted["ratio_of_block_parameters"]
    return f"{record.plan.model.name}: {share:.1%} of its layers removed by {record.plan.method}"
