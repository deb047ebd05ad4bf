"""What the SuperLink's door reads of a request, with an application behind it that says what reached it."""

import asyncio
import socket
from base64 import b64encode
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from pisa_fl.flower import door

KEY = generate_private_key(SECP384R1())
PUBLIC = public_key_to_bytes(KEY.public_key())
HERE, AWAY = ("127.0.0.1", 1), ("192.0.2.7", 1)
MOST = 50_000


class Application:
    """Answers with the length of the body; to who asks for messages, with one if there is one."""

    def __init__(self):
        nodes = SimpleNamespace(
            get_node_id_by_public_key=lambda key: 1 if key == PUBLIC else None,
            get_task_by_token=lambda token: "task" if token == "mine" else None,
        )
        self.state = SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: nodes))
        self.message = b""

    async def __call__(self, scope, receive, send):
        length, more = 0, True
        while more:
            event = await receive()
            length, more = length + len(event["body"]), event["more_body"]
        body = self.message if scope["path"] == door.PULL else str(length).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def application():
    return Application()


@pytest.fixture
def ask(application):
    """Sends requests one after the other; the statuses of the answers."""
    known = set()
    behind = door.Door(application, "the secret", MOST, known)

    def send(*requests, client=AWAY):
        async def all_of_them():
            transport = httpx.ASGITransport(behind, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as http:
                return [
                    (await http.post(path, content=body, headers=headers)).status_code
                    for path, body, headers in requests
                ]

        return asyncio.run(all_of_them())

    send.known = known
    return send


def signed(key=KEY):
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-signature": b64encode(sign_message(key, b"now")).decode(),
        "flwr-timestamp": "now",
    }


def test_a_clients_reply_has_an_end_and_the_next_instruction_allows_another(ask, application):
    part, look = (door.PUSH, bytes(20_000), signed()), (door.PULL, b"", signed())
    assert ask(part, part, part, look, part) == [200, 200, 413, 200, 413]
    application.message = b"an instruction"
    assert ask(look, part, part, part) == [200, 200, 200, 413]
    assert ask.known == {"192.0.2.7"}


def test_what_is_no_part_of_a_reply_is_short(ask):
    short, long = bytes(door.REQUEST), bytes(door.REQUEST + 1)
    messages = door.FLEET + "push-messages"
    assert ask((messages, short, signed()), (messages, long, signed())) == [200, 413]
    stranger = signed(generate_private_key(SECP384R1()))
    short, long = bytes(door.STRANGER), bytes(door.STRANGER + 1)
    assert ask((messages, short, stranger), (messages, long, stranger)) == [200, 413]


def test_this_host_needs_a_token_or_the_secret(ask):
    secret, token = {"authorization": "Bearer the secret"}, {"flwr-task-token": "mine"}
    long, control, task = bytes(2 * door.REQUEST), "/v1/control/start-run", door.RUNTIME + "push-object"
    assert ask(
        (control, b"", {}),
        (control, b"", {"authorization": "Bearer another"}),
        (control, long, secret),
        (task, long, {"flwr-task-token": "yours"}),
        (task, long, token),
        ("/health", b"", {}),
        client=HERE,
    ) == [403, 403, 200, 413, 200, 200]
    assert ask((control, b"", secret), (task, b"", token)) == [403, 403], "from elsewhere nothing helps"


def test_a_body_that_comes_too_slowly_is_not_waited_for(ask, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.1)

    async def drops():
        while True:
            yield b"a"
            await asyncio.sleep(0.01)

    assert ask((door.PUSH, drops(), signed())) == [408]


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("127.0.0.1", None),
        ("127.9.9.9", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_connections_are_counted_by_address_or_network(address, source):
    assert door.origin(address) == source


def test_too_many_connections_are_closed_and_those_of_clients_are_not(monkeypatch):
    monkeypatch.setattr(door, "origin", lambda address: None if address == "127.0.0.1" else address)
    monkeypatch.setattr(door, "STRANGERS", 3)
    bound, known = socket.create_server(("127.0.0.1", 0)), set()
    with door.Listener(bound, 2, known) as listener, ExitStack() as stack:

        def connect(source):
            """The two ends of a connection; None in place of ours if it is closed at once."""
            theirs = socket.create_connection(listener.getsockname(), source_address=(source, 0))
            stack.enter_context(theirs)
            try:
                return stack.enter_context(listener.accept()[0])
            except ConnectionAbortedError:
                assert theirs.recv(1) == b""
                return None

        ends = [connect("127.0.0.2") for _ in range(3)]
        assert [end is None for end in ends] == [False, False, True], "two of one address"
        assert connect("127.0.0.3")
        assert connect("127.0.0.4") is None, "three of all strangers"
        known |= {"127.0.0.2", "127.0.0.4"}
        assert connect("127.0.0.4"), "a client's address"
        assert all(connect("127.0.0.1") for _ in range(5)), "this host"
        ends[0].close()
        ends[0].close()
        assert connect("127.0.0.2")
        assert connect("127.0.0.2") is None, "one has gone, and not two"
