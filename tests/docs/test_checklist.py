"""A list of the tests that show what happens in each of the faults that the server is made for.

A line is one fault, or a few of a kind, and what must come of it; below it stand its tests, by file
and name. Beside what a client sees they look at the counters of /metrics and that nothing is left
held; `tests/conftest.py` fails each that leaves a task or a socket behind.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROVIDER: dict[str, dict[str, tuple[str, ...]]] = {
    "refused, unreachable, DNS failure, DNS of 10 s, connect timeout: failover, else 502/504; "
    "loop not blocked": {
        "end_to_end/test_provider_out_of_reach.py": (
            "test_a_provider_out_of_reach_is_an_error_on_every_face",
            "test_another_provider_answers_in_place_of_one_out_of_reach",
            "test_only_faults_that_may_pass_are_tried_again",
            "test_a_name_that_is_found_late_holds_up_nobody",
            "test_a_name_that_is_not_found_in_time_is_a_connect_timeout",
        ),
        "end_to_end/test_provider_faults.py": (
            "test_a_provider_that_is_not_there_is_a_connect_error",
        ),
        "providers/test_pool.py": ("test_a_full_accept_queue_is_a_connect_timeout",),
    },
    "TLS expired, wrong name, stalled handshake: no retry there, 502 without detail": {
        "end_to_end/test_provider_out_of_reach.py": (
            "test_a_provider_out_of_reach_is_an_error_on_every_face",
            "test_only_faults_that_may_pass_are_tried_again",
        ),
        "providers/test_pool.py": (
            "test_a_certificate_that_does_not_hold_is_a_fault_of_its_own",
            "test_a_stalled_tls_handshake_is_a_connect_timeout",
        ),
    },
    "429 with Retry-After (seconds, date, ms, absurd): cooled down, failover, else 429; a storm "
    "makes no retry wave": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_before_the_first_event_has_its_status_and_code",
            "test_a_fault_of_an_answer_in_one_piece_has_its_status_and_code",
        ),
        "end_to_end/test_provider_flapping.py": (
            "test_where_all_limit_us_each_face_shows_the_soonest",
            "test_a_429_under_load_lets_nobody_in_before_its_time",
        ),
        "gateway/test_provider_trouble.py": (
            "test_a_429_goes_to_the_fallback_without_a_backoff",
            "test_while_a_provider_rests_its_fallback_is_asked_at_once",
            "test_waiters_of_a_provider_that_begins_to_rest_go_elsewhere",
            "test_a_storm_of_429_makes_no_wave_of_retries",
            "test_a_storm_of_faults_makes_no_storm_of_retries",
        ),
        "providers/test_provider.py": (
            "test_after_a_429_the_provider_is_left_alone",
            "test_retry_after_is_told",
            "test_a_retry_after_that_is_not_sane_is_none",
            "test_a_date_to_retry_after",
            "test_the_providers_remaining_requests_lower_the_pace",
        ),
        "providers/test_pace.py": (
            "test_no_window_has_more_than_its_share_and_the_burst",
            "test_nothing_starts_in_a_rest_and_no_burst_behind_it",
        ),
    },
    "insufficient_quota, 401, 402, 403: final, 502, provider flagged, none of its text outside": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_before_the_first_event_has_its_status_and_code",
            "test_a_fault_of_an_answer_in_one_piece_has_its_status_and_code",
        ),
        "gateway/test_provider_trouble.py": (
            "test_faults_that_stay_or_may_have_been_paid_are_not_tried_again",
            "test_a_provider_that_refuses_our_key_is_not_asked_again_for_a_while",
            "test_credits_that_are_used_up_are_told_within_a_stream",
        ),
        "protocol/test_openai.py": ("test_the_code_of_an_error_under_200_says_what_it_means",),
        "providers/test_sinks.py": (
            "test_an_error_about_our_key_is_not_passed_on_in_the_middle_either",
        ),
        "providers/test_provider.py": ("test_a_callers_word_does_not_use_up_the_quota",),
    },
    "500, 502, 503, 529: retried before the first byte; 400, 404, 413, 422: passed on as they "
    "are": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_before_the_first_event_has_its_status_and_code",
            "test_the_callers_own_fault_passes_with_status_and_body",
        ),
        "gateway/test_provider_trouble.py": (
            "test_faults_that_may_pass_are_tried_again",
            "test_after_the_first_event_nothing_is_tried_again",
            "test_the_callers_fault_and_a_broken_answer_are_not_passed_on",
        ),
    },
    "HTML body, wrong content type, empty 200, JSON error under 200: provider_bad_response": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_before_the_first_event_has_its_status_and_code",
            "test_a_fault_of_an_answer_in_one_piece_has_its_status_and_code",
        ),
    },
    "silence before headers, before the first token, in mid-stream, after half a line: "
    "read_timeout; half a line is never passed on; comments are no token": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_before_the_first_event_has_its_status_and_code",
            "test_a_fault_within_the_answer_is_one_error_event_and_no_done",
            "test_half_an_answer_in_one_piece_is_no_answer",
            "test_a_fault_after_a_head_sent_for_silence_is_an_error_event",
            "test_comments_for_ever_are_no_answer_and_end_with_their_reader",
        ),
        "providers/test_sinks.py": ("test_half_an_event_is_never_passed_on",),
        "providers/test_exchange.py": ("test_silence_ends_with_the_read_timeout",),
    },
    "reset in mid-chunk, clean end without finish, wrong Content-Length: provider_disconnected, "
    "never a false [DONE]": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_within_the_answer_is_one_error_event_and_no_done",
            "test_half_an_answer_in_one_piece_is_no_answer",
        ),
        "providers/test_sinks.py": ("test_an_end_without_a_finish_reason_is_no_end",),
        "providers/test_exchange.py": (
            "test_a_connection_closed_early_is_told_and_nothing_is_made_up",
            "test_a_reset_in_a_body_without_a_length_is_no_end",
        ),
    },
    "missing [DONE] added; data after [DONE] ignored, connection not pooled": {
        "end_to_end/test_provider_faults.py": (
            "test_a_missing_done_is_put_to_it",
            "test_data_behind_done_is_not_passed_on",
            "test_done_without_an_end_of_the_body_ends_at_once_and_is_not_kept",
        ),
        "providers/test_sinks.py": ("test_nothing_behind_done_is_passed_on",),
        "providers/test_exchange.py": (
            "test_done_and_more_behind_it_close_the_connection",
            "test_done_and_then_silence_close_the_connection_after_a_moment",
        ),
    },
    "10 MB line, endless line: cut at the bound; endless stream: flat memory, ends with its last "
    "reader": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_within_the_answer_is_one_error_event_and_no_done",
            "test_an_endless_answer_ends_with_its_reader_on_the_openai_face",
            "test_an_endless_answer_keeps_a_bounded_part_of_itself",
            "test_cancel_closes_the_providers_connection_at_once",
        ),
        "providers/test_sinks.py": ("test_an_endless_line_is_cut_at_its_bound",),
    },
    "any cut of the bytes, CRLF, CR, BOM, multi-line data, split UTF-8: identical result; broken "
    "JSON or UTF-8 in one event: provider_bad_response": {
        "end_to_end/test_provider_faults.py": (
            "test_unusual_but_good_answers_read_the_same_on_every_face",
            "test_a_fault_within_the_answer_is_one_error_event_and_no_done",
        ),
        "providers/test_sinks.py": (
            "test_every_framing_and_every_cut_gives_the_same_text",
            "test_every_framing_and_every_cut_passes_the_same_bytes",
            "test_an_event_that_is_no_object_ends_an_answer_in_frames",
            "test_an_event_that_is_no_object_ends_an_answer_in_bytes",
        ),
        "providers/test_exchange.py": ("test_every_cut_of_an_answer_reads_as_aiohttp_reads_it",),
        "streams/test_fast_path.py": (
            "test_anything_behind_texts_has_the_same_effect_on_both_ways",
        ),
    },
    "redirect not followed; Set-Cookie dropped; 100 kB of headers refused": {
        "end_to_end/test_provider_faults.py": (
            "test_a_fault_before_the_first_event_has_its_status_and_code",
            "test_unusual_but_good_answers_read_the_same_on_every_face",
        ),
        "providers/test_provider.py": (
            "test_a_redirect_is_not_followed",
            "test_only_harmless_headers_of_the_provider_pass",
        ),
        "providers/test_exchange.py": ("test_a_head_of_100_kb_is_refused",),
    },
    "idle pooled connection closed by the provider: repeated once, invisible; stuck upload: "
    "write_timeout": {
        "end_to_end/test_provider_faults.py": (
            "test_a_dead_kept_connection_is_seen_by_nobody",
            "test_a_stuck_upload_is_a_write_timeout",
        ),
        "gateway/test_provider_trouble.py": (
            "test_a_kept_connection_that_is_lost_late_is_not_stale",
        ),
        "providers/test_exchange.py": (
            "test_a_dead_kept_connection_is_stale_and_a_fresh_one_is_not",
            "test_a_stuck_upload_ends_with_the_write_timeout",
        ),
    },
    "flapping: dead, and tried again; all dead: 503 with Retry-After; sick: answers what it can; "
    "running streams untouched": {
        "end_to_end/test_provider_flapping.py": (
            "test_a_flapping_provider_is_left_alone_and_asked_again",
            "test_where_half_of_all_fail_the_other_half_is_answered",
            "test_where_all_are_dead_each_face_says_so",
        ),
        "gateway/test_provider_trouble.py": (
            "test_a_trial_finds_out_that_it_is_back",
            "test_where_all_are_dead_a_client_comes_back_soon",
            "test_waiters_are_refused_when_their_provider_dies",
        ),
        "providers/test_breaker.py": (
            "test_trials_are_bounded_whatever_happens",
            "test_an_attempt_from_before_its_death_ends_it_too",
            "test_failures_from_before_its_death_prolong_nothing",
        ),
    },
    "provider faster than the client: memory bounded, slot given back at the provider's end": {
        "end_to_end/test_provider_flapping.py": (
            "test_a_provider_faster_than_its_clients_is_done_with_before_them",
        ),
        "end_to_end/test_provider_faults.py": (
            "test_a_client_slower_than_the_read_timeout_gets_its_whole_answer",
        ),
        "end_to_end/test_slow_readers.py": (
            "test_clients_that_read_nothing_delay_nobody_and_are_dropped",
        ),
    },
}


@pytest.mark.parametrize("fault", PROVIDER)
def test_every_fault_of_a_provider_has_its_tests(fault: str) -> None:
    missing = [
        f"{file}::{name}"
        for file, names in PROVIDER[fault].items()
        for name in names
        if not re.search(rf"^(?:async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]

    assert PROVIDER[fault]
    assert missing == []
