"""Ids: of the forms that RFC 9562 gives them, and never twice."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid

from proxy.ids import request_id, session_id


def test_session_ids_are_of_version_7_and_in_the_order_of_time() -> None:
    made = []
    for _ in range(300):
        made.append(session_id())
        time.sleep(0.0001)
    assert len(set(made)) == len(made)
    for text in made:
        read = uuid.UUID(text)
        assert (str(read), read.version, read.variant) == (text, 7, uuid.RFC_4122)
        assert abs(int(text.replace("-", "")[:12], 16) / 1000 - time.time()) < 60
    moments = [text[:13] for text in made]
    assert moments == sorted(moments)


def test_request_ids_are_of_version_4() -> None:
    made = [request_id() for _ in range(2_000)]
    assert len(set(made)) == len(made)
    for text in made:
        read = uuid.UUID(text)
        assert (str(read), read.version, read.variant) == (text, 4, uuid.RFC_4122)


def test_no_part_of_one_id_comes_again_in_another() -> None:
    made = [request_id().replace("-", "") for _ in range(500)]
    tails = [text[17:] for text in made]
    heads = [text[:12] for text in made]
    assert len({*tails}) == len({*heads}) == len(made)
    assert not any(head in tail for head in heads for tail in tails)


FORKS = """
import os
from proxy.ids import request_id

request_id()
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, request_id().encode())
    os._exit(0)
os.wait()
print(os.read(reader, 100).decode(), request_id())
"""


def test_a_child_process_does_not_mint_its_parents_ids() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    childs, parents = done.stdout.split()
    assert childs != parents
    assert {uuid.UUID(childs).version, uuid.UUID(parents).version} == {4}
