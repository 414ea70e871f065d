"""The statements by which conversations are written, read and swept."""

from __future__ import annotations

from aioserver.gateway.sqlite.file import VERSION
from aioserver.gateway.turn import MAX_READ

# A turn is not kept if its conversation was deleted after its question had come.
_NOT_DELETED = """NOT EXISTS (
    SELECT 1 FROM deletions WHERE caller = :caller AND at >= :asked
    AND ((name = :name AND address = '') OR (name = '' AND address = :address)))"""
KEEP_CONVERSATION = f"""
INSERT INTO conversations (caller, name, address, updated)
SELECT :caller, :name, :address, :ended WHERE {_NOT_DELETED}
ON CONFLICT (caller, name) DO UPDATE SET address = excluded.address,
    updated = max(updated, excluded.updated)
"""
KEEP_TURN = f"""
INSERT INTO turns (conversation, ended, question_tokens, answer_tokens, size, question, answer)
SELECT id, :ended, :question_tokens, :answer_tokens, :turn_size, :question, :answer
FROM conversations WHERE caller = :caller AND name = :name AND {_NOT_DELETED}
"""  # noqa: S608
# A turn that a killed process has left may be written already.
KEEP_LEFT_TURN = f"""{KEEP_TURN}
AND NOT EXISTS (SELECT 1 FROM turns WHERE conversation = conversations.id
    AND ended = :ended AND question = :question)
"""  # noqa: S608
# The turns that `retention.Bounds.kept` leaves out: of one conversation, and of those with the ids of a range.
_BEYOND = """
SELECT id FROM (
    SELECT id, ended, row_number() OVER newest AS number,
        sum(question_tokens + answer_tokens) OVER newest AS tokens, sum(size) OVER newest AS size
    FROM turns WHERE {which} AND ended >= :oldest
    WINDOW newest AS (PARTITION BY conversation ORDER BY id DESC)
) WHERE number > 1 AND (tokens > :tokens OR number > :turns OR size > :size)
"""
_ONE = "conversation = (SELECT id FROM conversations WHERE caller = :caller AND name = :name)"
_RANGE = "conversation > :first AND conversation <= :last"
TRIM = f"DELETE FROM turns WHERE id IN ({_BEYOND.format(which=_ONE)})"  # noqa: S608
TRIM_OLD = f"DELETE FROM turns WHERE {_ONE} AND ended < :oldest"  # noqa: S608
TRIM_RANGE = f"DELETE FROM turns WHERE id IN ({_BEYOND.format(which=_RANGE)})"  # noqa: S608
LAST_CONVERSATION = "SELECT coalesce(max(id), 0) FROM conversations"
EXPIRE = "DELETE FROM turns WHERE id IN (SELECT id FROM turns WHERE ended < :oldest LIMIT :limit)"
DROP_EMPTY = """
DELETE FROM conversations WHERE id IN (
    SELECT id FROM conversations WHERE updated < :oldest
    AND NOT EXISTS (SELECT 1 FROM turns WHERE conversation = conversations.id) LIMIT :limit)
"""
FORGET_DELETIONS = "DELETE FROM deletions WHERE at < :before"
TOTALS = "SELECT count(*), coalesce(sum(size), 0) FROM conversations"
DROP_OLDEST = """
DELETE FROM conversations WHERE id IN (SELECT id FROM conversations ORDER BY updated LIMIT :limit)
"""
SHRINK = "PRAGMA incremental_vacuum(1000);"
# It writes a page, although nothing changes.
PROBE = f"PRAGMA user_version = {VERSION}"

LOAD = """
SELECT question, answer, ended, question_tokens, answer_tokens, turns.size
FROM conversations JOIN turns ON turns.conversation = conversations.id
WHERE caller = :caller AND name = :name AND ended >= :oldest ORDER BY turns.id
"""
LIST = f"""
SELECT name,
    (SELECT substr(question, 1, {MAX_READ}) FROM turns
        WHERE conversation = conversations.id AND ended >= :oldest ORDER BY id LIMIT 1),
    updated,
    (SELECT 2 * count(*) FROM turns WHERE conversation = conversations.id AND ended >= :oldest)
FROM conversations
WHERE caller = :caller AND address = :address AND updated >= :oldest
    AND (updated, name) < (:updated, :after)
ORDER BY updated DESC, name DESC LIMIT :limit
"""  # noqa: S608
NOTE_DELETION = "INSERT OR REPLACE INTO deletions VALUES (:caller, '', :name, :at)"
NOTE_ALL_DELETED = """
INSERT OR REPLACE INTO deletions
SELECT caller, '', name, :at FROM conversations
WHERE caller = :caller AND address = :address AND updated >= :oldest
UNION ALL SELECT :caller, :address, '', :at
"""
# First those that are over already, and then those that count.
_EXPIRED = " AND updated < :oldest"
DELETE = "DELETE FROM conversations WHERE caller = :caller AND name = :name"
DELETE_EXPIRED = DELETE + _EXPIRED
DELETE_ALL = "DELETE FROM conversations WHERE caller = :caller AND address = :address"
DELETE_ALL_EXPIRED = DELETE_ALL + _EXPIRED
