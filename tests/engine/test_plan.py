"""A step's plan groups equal specs, finds rows where they are, and changes nothing."""

from __future__ import annotations

import copy

from logitengine.link.messages import GenerationRequest, HiddenStatesSpec, LogitsSpec, SamplingParams
from logitengine.run.plan import StepPlan, plan_step
from logitengine.run.sampler import Sampler
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence

TOP = LogitsSpec(top_k=3)
ALL = LogitsSpec(positions="all")


def sequence_of(
    arrival: int,
    prompt: int,
    *,
    logits: LogitsSpec | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    hidden_states: HiddenStatesSpec | None = None,
    generated: int = 0,
) -> Sequence:
    request = GenerationRequest(
        request_id=f"r{arrival}",
        prompt_token_ids=[10 * arrival + i for i in range(prompt)],
        sampling=SamplingParams(max_tokens=9),
        logits=logits,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        hidden_states=hidden_states,
    )
    sequence = Sequence.of(request, 0, arrival)
    sequence.token_ids += [7] * generated
    sequence.block_table = list(range(8))
    return sequence


def plan(*chunks: Chunk) -> StepPlan:
    return plan_step(list(chunks), 4, Sampler([2]).row)


def chunk(sequence: Sequence, start: int, stop: int, rows: range | None = None) -> Chunk:
    given = sequence.num_rows_given
    return Chunk(sequence, start, stop, range(given, given) if rows is None else rows)


def test_rows_of_the_draw_are_grouped_by_what_is_asked() -> None:
    sequences = [
        sequence_of(0, 3, logits=TOP, generated=1),
        sequence_of(1, 3, generated=1),
        sequence_of(2, 3, logits=LogitsSpec(top_k=3), logprobs=2, generated=1),
        sequence_of(3, 3, logits=LogitsSpec(), logprobs=2, generated=1),
    ]
    long = sequence_of(4, 6, logprobs=2)
    step = plan(*(chunk(sequence, 3, 4) for sequence in sequences), chunk(long, 0, 5))
    assert [(group.spec, group.rows) for group in step.logits] == [(TOP, [0, 2]), (LogitsSpec(), [3])]
    assert [(group.spec, group.rows) for group in step.logprobs] == [(2, [2, 3])]
    assert [drawing.sequence for drawing in step.drawing] == sequences, "the long prompt has not ended"
    assert len(step.sampling) == 4
    assert (step.prompts, step.holds) == ([], [])


def test_prompt_rows_are_found_among_the_held_and_in_the_batch() -> None:
    """Positions 2 and 3 are held, 4 to 6 are computed, and 6 is to be held."""
    decoding = sequence_of(0, 3, generated=1)
    sequence = sequence_of(1, 9, logits=ALL)
    sequence.num_rows_given = 2
    step = plan(chunk(decoding, 3, 4), chunk(sequence, 4, 7, range(2, 6)))
    ((member,),) = (group.members for group in step.prompts)
    assert (member.rows, member.num_held, member.batch_start) == (range(2, 6), 2, 1)
    assert member.following == sequence.prompt.token_ids[3:7]
    assert [(hold.sequence, hold.start, hold.stop) for hold in step.holds] == [(sequence, 3, 4)]


def test_a_step_may_consist_of_prompt_rows_alone() -> None:
    sequence = sequence_of(1, 9, logits=ALL)
    step = plan(chunk(sequence, 8, 8, range(5)))
    assert (step.batch, step.drawing, step.sampling, step.holds) == (None, [], [], [])
    ((member,),) = (group.members for group in step.prompts)
    assert (member.num_held, member.ends_prompt) == (5, False)


def test_prompts_that_ask_alike_go_through_the_head_together() -> None:
    first, second = (sequence_of(i, 4, logits=ALL, logprobs=i) for i in range(2))
    third = sequence_of(2, 4, prompt_logprobs=1, hidden_states=HiddenStatesSpec())
    step = plan(*(chunk(sequence, 0, 4, range(4)) for sequence in (first, second, third)))
    assert [[member.sequence for member in group.members] for group in step.prompts] == [
        [first, second],
        [third],
    ]
    assert step.prompts[0].outputs.logprobs is None, "what is asked of drawn rows does not set prompts apart"
    assert step.prompts[1].outputs.hidden_states is None
    last = step.prompts[1].members[0]
    assert (last.ends_prompt, last.following) == (True, [*third.prompt.token_ids[1:], 0])


def test_planning_changes_nothing() -> None:
    sequence = sequence_of(0, 6, logits=ALL, prompt_logprobs=1)
    chunks = [chunk(sequence, 0, 5, range(2))]
    before = copy.copy(sequence)
    plan(*chunks)
    assert all(getattr(sequence, name) == getattr(before, name) for name in Sequence.__slots__)
