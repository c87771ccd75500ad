"""What a deployed node must not forget: its secret, its hold-out, its maps, and how often it was asked about its data.

One SQLite file (0600) under the node's state-dir: every entry is there as a whole or not at all, whatever process dies.
Rows and files stand in it as keyed hashes alone: it holds no text.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from heterotune_flwr.errors import ConfigError

FILE = "node.sqlite"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS secret (value BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS spent (account TEXT, kind TEXT, request TEXT, PRIMARY KEY (account, kind, request))",
    "CREATE TABLE IF NOT EXISTS held (account TEXT, row TEXT, PRIMARY KEY (account, row))",
    "CREATE TABLE IF NOT EXISTS draws (account TEXT PRIMARY KEY, number INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS pinned (name TEXT PRIMARY KEY, digest TEXT NOT NULL)",
)
#: Seconds to wait for another process of this node.
_PATIENCE = 60.0


class NodeBook:
    """The book of one state-dir (ConfigError where it is damaged or cannot be written)."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        with self._open() as book:
            for table in _TABLES:
                book.execute(table)
            if book.execute("SELECT value FROM secret").fetchone() is None:
                book.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
            (self._secret,) = book.execute("SELECT value FROM secret").fetchone()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(sqlite3.connect(self._path, timeout=_PATIENCE)) as book:
                book.isolation_level = None
                book.execute("BEGIN IMMEDIATE")
                yield book
                book.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{self._path} cannot be used: {error}; mend its folder, or put a copy of the file back (without it "
                "this node forgets its hold-out and what it was asked)"
            ) from error

    def keyed(self, text: str) -> str:
        """A hash that nobody without this node's secret can make (hex)."""
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def charge(self, account: str, kind: str, request: str, most: int) -> bool:
        """Take a request off the budget of an account; False where it is spent. What was answered before is free."""
        entry = (account, kind, request)
        with self._open() as book:
            found = "SELECT 1 FROM spent WHERE account = ? AND kind = ? AND request = ?"
            if book.execute(found, entry).fetchone() is not None:
                return True
            count = "SELECT count(*) FROM spent WHERE account = ? AND kind = ?"
            if book.execute(count, entry[:2]).fetchone()[0] >= most:
                return False
            book.execute("INSERT INTO spent VALUES (?, ?, ?)", entry)
            return True

    def spent(self, account: str, kind: str) -> int:
        """How many different requests of a kind were answered."""
        with self._open() as book:
            count = "SELECT count(*) FROM spent WHERE account = ? AND kind = ?"
            return int(book.execute(count, (account, kind)).fetchone()[0])

    def held(self, account: str) -> set[str]:
        """The rows that are held out (keyed hashes); empty before the first draw."""
        with self._open() as book:
            found = book.execute("SELECT row FROM held WHERE account = ?", (account,))
            return {row for (row,) in found.fetchall()}

    def draw_number(self, account: str) -> int:
        """How often the hold-out was drawn."""
        with self._open() as book:
            found = "SELECT number FROM draws WHERE account = ?"
            row = book.execute(found, (account,)).fetchone()
            return int(row[0]) if row else 0

    def hold(self, account: str, rows: Iterable[str]) -> None:
        """Keep these rows in the place of those held before."""
        with self._open() as book:
            book.execute("DELETE FROM held WHERE account = ?", (account,))
            entries = [(account, row) for row in sorted(set(rows))]
            book.executemany("INSERT INTO held VALUES (?, ?)", entries)
            book.execute(
                "INSERT INTO draws VALUES (?, 1) ON CONFLICT (account) DO UPDATE SET number = number + 1",
                (account,),
            )

    def pin(self, name: str, digest: str, anew: bool) -> str:
        """The digest that stands under a name: the one given where none does yet, or ``anew``."""
        with self._open() as book:
            clash = "REPLACE" if anew else "IGNORE"
            book.execute(f"INSERT OR {clash} INTO pinned VALUES (?, ?)", (name, digest))
            found = "SELECT digest FROM pinned WHERE name = ?"
            return str(book.execute(found, (name,)).fetchone()[0])
