"""A small actor runtime on trio: state behind a mailbox, typed messages, supervision, the same calls over a link.

It needs nothing of the rest of swarmlm but its errors, so that it can be used alone:

    import trio
    from swarmlm.actors.core import Actor, Body, Connection, Message, handles, memory_links, open_supervisor, serve

    class BankRole:                                                  # who is spoken to
        pass

    class Balance(Body, tag="balance", frozen=True):                 # what it answers
        cents: int

    class Deposit(Message[BankRole, Balance], tag="deposit", frozen=True):
        cents: int

    class Bank(Actor[BankRole]):                                     # who answers: one message at a time, no locks
        def __init__(self) -> None:
            self.cents = 0

        @handles(Deposit)
        async def deposit(self, message: Deposit) -> Balance:
            self.cents += message.cents
            return Balance(self.cents)

    async def main() -> None:
        async with open_supervisor() as supervisor:                  # actors live in this block, replaced if they crash
            bank = await supervisor.start(Bank)                      # a Ref[BankRole]: a type checker knows the reply
            print((await bank.call(Deposit(5), deadline=1.0)).cents)

            ours, theirs = memory_links("teller", "bank")            # or any stream between two machines
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, theirs, {Deposit: bank})   # that end answers,
                connection = Connection(ours)                        # this one calls
                await nursery.start(connection.run)
                print((await connection.ref().call(Deposit(7), deadline=1.0)).cents)
                await connection.aclose()

    trio.run(main)                                                   # prints 5, then 12

`message` says what travels, `ref` how to send it, `mailbox` how it waits, `actor` how it is handled, `supervisor` how
actors live and die, `remote` how calls cross a link. Every call has a deadline, every queue a bound, and a caller that
goes away takes its work with it. Errors are those of `swarmlm.errors`.
"""

from swarmlm.actors.core.actor import Actor, handles
from swarmlm.actors.core.link import Link, MemoryLink, memory_links
from swarmlm.actors.core.mailbox import Inbox, Mailbox, Request
from swarmlm.actors.core.message import Blob, Body, Message, Ok
from swarmlm.actors.core.ref import Ref
from swarmlm.actors.core.remote import Connection, serve
from swarmlm.actors.core.supervisor import Supervisor, open_supervisor

__all__ = [
    "Actor",
    "Blob",
    "Body",
    "Connection",
    "Inbox",
    "Link",
    "Mailbox",
    "MemoryLink",
    "Message",
    "Ok",
    "Ref",
    "Request",
    "Supervisor",
    "handles",
    "memory_links",
    "open_supervisor",
    "serve",
]
