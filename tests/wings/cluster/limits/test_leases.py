"""What an instance does by itself: at the start, when the server is away, after it was stopped,
when it comes back.
"""

from __future__ import annotations

import pytest

from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import SECOND, TIMES, decode_answer
from tests.support.cluster_simulation import NAME, Instance, Load, Simulation
from tests.support.renew_script import Stale, decode_request

IDLE = Load(rate=0.0)
LIMIT = 20


def cluster(count: int = 3) -> tuple[Simulation, list[Instance]]:
    """Instances without requests that have joined, and know each other."""
    simulation = Simulation(1, limit=LIMIT)
    simulation.on_step = simulation.check
    instances = [simulation.add(IDLE) for _ in range(count)]
    simulation.advance(TIMES.grace + 3 * TIMES.beat)
    assert all(each.leases.state is State.JOINED for each in instances)
    return simulation, instances


def ask(instance: Instance, count: int, seconds: float = 1000.0) -> None:
    """Let *count* requests come that run for *seconds*."""
    instance.load = Load(0.0, seconds)
    for _ in range(count):
        instance.waiting.append(instance.simulation.now)
    instance.serve()
    instance.grant.wait_begins()
    instance.simulation.advance(0.1)


def test_instance_that_was_never_told_who_lives_has_no_share() -> None:
    simulation = Simulation(1, limit=LIMIT)
    simulation.kill_server()
    stranger = simulation.add(IDLE)

    simulation.advance(3 * TIMES.lease)

    assert stranger.grant.granted == 0


def test_fixed_share_is_used_once_no_other_can_have_more() -> None:
    simulation = Simulation(1, limit=LIMIT, fixed=3)
    simulation.kill_server()
    worker = simulation.add(IDLE)

    simulation.advance(TIMES.lease - TIMES.bound)
    assert worker.grant.granted == 0
    simulation.advance(3 * TIMES.bound)

    assert worker.grant.granted == 7


def test_fixed_share_is_used_at_once_where_there_is_no_server() -> None:
    simulation = Simulation(1, limit=LIMIT, fixed=3)
    simulation.kill_server()
    workers = [simulation.add(IDLE) for _ in range(3)]

    for each in workers:
        each.leases.use_fixed()

    assert [each.grant.granted for each in workers] == [7, 7, 6]


def test_newcomer_has_no_share_before_all_others_know_of_it() -> None:
    simulation, instances = cluster(2)
    deaf = instances[0]
    simulation.cut_off.add(deaf.number)
    newcomer = simulation.add(IDLE)
    simulation.advance(2 * TIMES.beat)
    assert newcomer.leases.state is State.JOINED

    assert newcomer.grant.share == 0
    assert instances[1].grant.share <= 7

    simulation.cut_off.clear()
    simulation.advance(3 * TIMES.beat)
    assert sorted(each.grant.share for each in simulation.instances) == [6, 7, 7]


def test_instance_that_was_stopped_starts_nothing_before_it_is_answered() -> None:
    simulation, instances = cluster()
    first, other, _ = instances
    ask(first, 5)
    first.stop()
    simulation.advance(TIMES.lease + 1.0)
    ask(other, LIMIT)
    assert other.inside == LIMIT

    first.waiting.extend([simulation.now] * 5)
    first.stopped = False
    first.serve()

    assert first.grant.granted == 0
    assert first.inside == 5
    simulation.advance(1.0)
    assert first.inside == 5


def test_answer_that_was_read_after_a_stop_gives_nothing() -> None:
    simulation, (first, *_) = cluster()
    answers: list[bytes] = []
    first.leases.call_soon()
    first.timer += 1
    request = first.leases.request(simulation.run)
    answers.append(simulation.script.renew(request, round(simulation.now * SECOND))[0])
    simulation.now += TIMES.lease

    first.leases.answered(answers[0])

    assert first.leases.state is State.ALONE
    assert first.grant.granted == 0


def test_answer_that_cannot_be_read_is_a_failed_call() -> None:
    simulation, (first, *_) = cluster()
    first.timer += 1
    first.leases.request(simulation.run)

    first.leases.answered(b"\x90")

    assert first.leases.state is State.UNHEARD


def test_hand_is_raised_to_the_share_only_when_all_other_leases_are_over() -> None:
    simulation, (first, other, _) = cluster()
    ask(other, 15, seconds=5.0)
    granted = first.grant.granted
    simulation.kill_server()
    end = first.leases.lease_end
    simulation.advance(end - simulation.now + 0.5)
    assert first.leases.state is State.ALONE

    assert first.grant.granted <= granted < first.grant.share
    simulation.advance(TIMES.beat + 2 * TIMES.bound)

    assert first.grant.granted == first.grant.share


@pytest.mark.parametrize("inside", [2, 12])
def test_instance_that_comes_back_says_that_it_has_its_share_or_what_is_inside(
    inside: int,
) -> None:
    simulation, (first, *_) = cluster()
    ask(first, inside)
    simulation.kill_server()
    simulation.advance(TIMES.lease + TIMES.beat + 3 * TIMES.bound)
    assert first.leases.state is State.ALONE
    if first.leases.busy:
        first.leases.failed("no answer")

    (op,) = decode_request(first.leases.request(simulation.run)).ops

    # It may start so much until it is answered.
    assert op.have == max(inside, first.grant.share)


@pytest.mark.parametrize("fault", ["away", "another process"])
def test_server_that_was_away_gives_nothing_before_all_have_called(fault: str) -> None:
    simulation, (first, other, _) = cluster()
    ask(first, 12)
    simulation.keep()
    ask(first, 8)
    assert first.inside == LIMIT
    simulation.cut_off.add(first.number)
    if fault == "away":
        simulation.pause()
        simulation.advance(TIMES.lease + 0.5)
        simulation.go_on()
    else:
        # The last places that it gave are forgotten.
        simulation.roll_back()
    ask(other, LIMIT)
    simulation.advance(1.0)

    assert simulation.in_flight == LIMIT
    simulation.cut_off.clear()
    simulation.advance(TIMES.grace + TIMES.beat)
    assert simulation.in_flight == LIMIT


def test_server_that_has_lost_its_state_is_told_everything_at_once() -> None:
    simulation, (first, *_) = cluster()
    ask(first, 12)
    # The next call mentions nothing that has not changed.
    first.leases.woken([""])
    simulation.advance(0.3)

    simulation.empty()
    first.leases.call_soon()
    simulation.advance(0.3)

    assert simulation.script.holders(NAME)[first.leases.instance] >= 12


def test_call_that_was_given_up_is_refused_when_it_arrives_after_a_later_one() -> None:
    simulation, (first, *_) = cluster()
    ask(first, 10)
    first.timer += 1
    early = first.leases.request(simulation.run)
    first.leases.failed("no answer")
    simulation.script.renew(first.leases.request(simulation.run), round(simulation.now * SECOND))

    with pytest.raises(Stale):
        simulation.script.renew(early, round(simulation.now * SECOND))


def test_places_of_a_killed_instance_are_free_within_ten_seconds() -> None:
    simulation, (killed, other, _) = cluster()
    ask(killed, 15)
    killed.kill()
    ask(other, LIMIT)

    simulation.advance(10.0)

    assert other.inside >= LIMIT - 1


def test_places_of_an_instance_that_has_ended_for_certain_are_free_at_once() -> None:
    simulation, (killed, other, third) = cluster()
    ask(killed, 15)
    killed.kill()
    ask(other, LIMIT)
    third.leases.ended(killed.leases.instance)

    simulation.advance(0.2)

    assert other.inside == LIMIT


def test_instance_that_leaves_says_so_when_nothing_is_inside() -> None:
    simulation, (leaving, other, _) = cluster()
    ask(leaving, 5, seconds=3.0)
    leaving.leases.leave()
    simulation.advance(1.0)
    assert not leaving.leases.left
    assert leaving.inside == 5

    simulation.advance(5.0)
    ask(other, LIMIT)

    assert leaving.leases.left
    assert other.inside == LIMIT


def test_instance_that_leaves_starts_nothing_in_a_place_that_ended_during_a_call() -> None:
    simulation, (leaving, *_) = cluster()
    ask(leaving, 1)
    leaving.leases.leave()
    simulation.advance(0.1)
    leaving.timer += 1
    answer, _ = simulation.script.renew(
        leaving.leases.request(simulation.run), round(simulation.now * SECOND)
    )
    leaving.waiting.append(simulation.now)
    leaving.end()

    leaving.leases.answered(answer)

    assert leaving.inside == 0


def test_lone_request_beside_two_floods_has_its_turn() -> None:
    simulation = Simulation(5, limit=8)
    simulation.on_step = simulation.check
    for _ in range(2):
        simulation.add(Load(100.0, 0.1, patience=1000.0))
    lone = simulation.add(Load(2.0, 0.1))
    simulation.advance(6.0)
    lone.longest_wait = 0.0

    simulation.advance(8.0)

    # A turn is 0.1 s / 8 places; one of each of the others may come before it.
    assert lone.longest_wait < 0.1


def test_what_one_instance_tells_all_others_hear_and_newcomers_too() -> None:
    simulation, instances = cluster()
    heard: list[tuple[str, str, int]] = []

    def hear(name: str, word: str, seconds: float) -> None:
        heard.append((name, word, round(seconds)))

    for each in instances[1:]:
        each.leases.announcements._on_announced = hear
    instances[0].leases.announcements.announce("openai", "cooling", 30.0)
    simulation.advance(0.1)
    assert heard == [("openai", "cooling", 30)] * 2

    newcomer = simulation.add(IDLE)
    newcomer.leases.announcements._on_announced = hear
    simulation.advance(0.1)
    assert heard[2:] == [("openai", "cooling", 30)]

    instances[1].leases.announcements.announce("openai", "cooling", 0.0)
    simulation.advance(0.1)
    assert heard[3:].count(("openai", "cooling", 0)) >= 2


def test_server_that_has_lost_its_state_ends_nothing_that_was_told() -> None:
    simulation, (first, other, _) = cluster()
    heard: list[float] = []
    other.leases.announcements._on_announced = lambda _name, _word, seconds: heard.append(seconds)
    first.leases.announcements.announce("openai", "cooling", 30.0)
    simulation.advance(0.1)

    simulation.empty()
    simulation.advance(10.0)

    assert len(heard) == 1
    assert heard[0] > 29.0


def test_answer_names_the_members_only_when_they_have_changed() -> None:
    simulation, (first, *_) = cluster()
    first.timer += 1

    answer, _ = simulation.script.renew(
        first.leases.request(simulation.run), round(simulation.now * SECOND)
    )

    assert decode_answer(answer).members == []
    assert sorted(first.leases.members) == ["i0", "i1", "i2"]


@pytest.mark.parametrize("joined_since", [False, True])
def test_places_that_an_older_state_lacks_are_nobody_elses(joined_since: bool) -> None:
    simulation, (deaf, other, third) = cluster()
    simulation.keep()
    if joined_since:
        deaf = simulation.add(IDLE)
        simulation.advance(3 * TIMES.beat)
    simulation.advance(TIMES.lease)
    count = 3 if joined_since else 8
    ask(deaf, count)
    assert deaf.inside == count
    simulation.cut_off.add(deaf.number)

    simulation.roll_back()
    ask(other, LIMIT)
    ask(third, LIMIT)
    simulation.advance(deaf.leases.lease_end - simulation.now - 0.2)

    # It may still start what it was granted.
    assert deaf.leases.state is not State.ALONE
    assert simulation.in_flight <= LIMIT
    simulation.advance(TIMES.lease)
    assert other.inside + third.inside == LIMIT
